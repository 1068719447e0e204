"""What a patch sets, for every prompt: positions looked up, values cut out of the source, and what differs from the run itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.interventions import Part, fit
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

Patch = tuple[Site, ...] | Mapping[Site, Tensor]
"""Sites that are set together in one run; as a mapping, with the values they are set to."""

Source = tuple["HookedModel", "Batch"] | Mapping[Site, Tensor]
"""Where values come from: the partner prompts in the same or another model; or a value per site (a mean, zeros, a vector)."""


@dataclass(frozen=True, eq=False)
class Setting:
    """One site of a patch, for every prompt.

    Attributes:
        site: where.
        where: the positions in each prompt.
        values: what is set there, [prompt n d], or [prompt n head d] for all heads; the last axis of patterns counts keys.
        differs: where that is not to the bit what is there anyway.
    """

    site: Site
    where: Int[Tensor, "prompt n"]
    values: Tensor
    differs: Bool[Tensor, "prompt n"]


def sites_of(patches: Sequence[Site | Patch]) -> list[Patch]:
    """A single site is a patch of one.

    Raises:
        InputError: there are none, or an empty one.
    """
    if not patches or any(not isinstance(p, Site) and not p for p in patches):
        raise InputError("a sweep needs patches, each of at least one site; there are none" if not patches else "a patch names no site")
    return [(p,) if isinstance(p, Site) else p if isinstance(p, Mapping) else tuple(p) for p in patches]


def whole(site: Site) -> Site:
    """The activation a site is cut out of: all heads, all positions. What heads add is made of their z, which is much smaller."""
    return Site("z" if site.component == "result" else site.component, site.layer)


def wholes(model: HookedModel, patches: Sequence[Patch]) -> list[Site]:
    """The activations that the sites of patches are cut out of.

    Raises:
        InputError: the model has no such site.
    """
    return list(dict.fromkeys(whole(s) for s in model.sites(list(dict.fromkeys(s for p in patches for s in p)))))


def settings(
    model: HookedModel, part: Part, patches: Sequence[Patch], source: Source, seen: Mapping[Site, Tensor] | None = None
) -> list[list[Setting]]:
    """What every patch sets in some of the prompts; a source run is that of their partners.

    Args:
        model: the model that is patched.
        part: prompts.
        patches: what to set.
        source: where values come from.
        seen: what ``wholes`` names, of these prompts, where they have been run already.

    Raises:
        InputError: the model has no such site, or a value does not fit it.
    """
    batch = part.batch
    if seen is None:
        wanted = wholes(model, patches)
        seen = model.capture(batch, wanted) if wanted else {}
    there = seen
    given: Mapping[Site, Tensor] = {}
    if isinstance(source, tuple):
        asked = source[0].sites(list(dict.fromkeys(s for p in patches if not isinstance(p, Mapping) for s in p)))
        given = source[0].capture(source[1], list(dict.fromkeys(map(whole, asked)))) if asked else {}

    places = cache(columns)

    def one(site: Site, patch: Patch) -> Setting:
        x = there[whole(site)]
        where = places(site.position, batch).to(x.device)
        old = added(model, site, cut(x, site, where))
        if isinstance(patch, Mapping):
            new = fitted(patch[site], site, old, part)
        elif isinstance(source, tuple):
            found = given[whole(site)]
            if site.component == "pattern":  # both prompts have the same keys up to the query; behind it there is nothing
                found = torch.nn.functional.pad(found, (0, max(0, x.shape[-1] - found.shape[-1])))[..., : x.shape[-1]]
            new = added(source[0], site, cut(found, site, places(site.position, source[1]).to(found.device))).to(x)
        else:
            if site not in source:
                raise InputError(f"the source has no value for {site}; it has {', '.join(map(str, source)) or 'none'}")
            new = fitted(source[site], site, old, part)
        return Setting(site, where, new, (new != old).flatten(2).any(2))

    return [[one(site, patch) for site in patch] for patch in patches]


def columns(position: str | int | None, batch: Batch) -> Int[Tensor, "prompt n"]:
    """The tokens of a position in each prompt; None is all of them."""
    return batch.position_ids if position is None else batch.columns(position)


def cut(values: Tensor, site: Site, where: Int[Tensor, "prompt n"]) -> Tensor:
    """What a site is of its whole activation, [prompt n ...]."""
    if site.component == "pattern":
        values = values.movedim(1, 2)
    if site.head is not None:
        values = values[:, :, site.head]
    return values if site.position is None else values[torch.arange(len(values), device=values.device)[:, None], where]


def added(model: HookedModel, site: Site, values: Tensor) -> Tensor:
    """What heads add to the stream, of their z; other activations as they are."""
    if site.component != "result":
        return values
    weights = model.wrapped.output_weights(site.layer)
    return torch.einsum("pnhc,hcd->pnhd", values, weights) if site.head is None else values @ weights[site.head]


def fitted(value: Tensor, site: Site, like: Tensor, part: Part) -> Tensor:
    """A value given by hand, with the shape that ``capture`` gives or one that broadcasts to it, as [prompt n ...]."""
    value = fit(value, as_captured(like, site), part, site)
    return value.movedim(1, 2) if _rows_behind_heads(site) else value.reshape(like.shape)


def as_captured(values: Tensor, site: Site) -> Tensor:
    """[prompt n ...] as ``capture`` gives the site and ``patched`` takes it."""
    if site.position is None:
        return values.movedim(2, 1) if _rows_behind_heads(site) else values
    return values[:, 0] if values.shape[1] == 1 else values


def _rows_behind_heads(site: Site) -> bool:
    return site.component == "pattern" and site.head is None and site.position is None


def of_prompts(setting: Setting, rows: Sequence[int], width: int) -> Setting:
    """The setting of some prompts in a batch of ``width`` columns."""
    part = replace(setting, where=setting.where[rows], values=setting.values[rows], differs=setting.differs[rows])
    if setting.site.position is None:
        part = replace(part, where=part.where[:, :width], values=part.values[:, :width], differs=part.differs[:, :width])
    return replace(part, values=part.values[..., :width]) if setting.site.component == "pattern" else part


def check(sites: Iterable[Site], batch: Batch, donor: Batch | None = None) -> None:
    """Check that sites can be patched, before anything is run.

    Raises:
        InputError: the batches do not pair up, a position is unknown or not the same number of tokens, or a site is no activation.
    """
    if donor is not None and len(batch) != len(donor):
        raise InputError(f"a patch needs a source prompt for every prompt; there are {len(batch)} prompts and {len(donor)} sources")
    uneven = [] if donor is None else (batch.lengths.cpu() != donor.lengths.cpu()).nonzero().flatten().tolist()
    for site in dict.fromkeys(sites):
        if site.is_weight or site.component == "svd":
            raise InputError(f"{site} cannot be patched: only activations can, such as L3.resid_pre@END")
        if site.position is None:
            if uneven and donor is not None:
                lengths = f"{int(batch.lengths[uneven[0]])} and {int(donor.lengths[uneven[0]])}"
                raise InputError(
                    f"{site} sets every position, so both prompts of a pair need one length; in pair {uneven[0]} they have {lengths} "
                    f"tokens; name a position, as in {site}@END"
                )
            continue
        here = batch.columns(site.position)
        if donor is None:
            continue
        there = donor.columns(site.position)
        if here.shape != there.shape:
            raise InputError(
                f"position {site.position!r} names {here.shape[1]} tokens in the prompts and {there.shape[1]} in their sources"
            )
        if site.component == "pattern" and (moved := (here.cpu() != there.cpu()).any(1).nonzero().flatten().tolist()):
            at = f"{here[moved[0]].tolist()} and {there[moved[0]].tolist()}"
            raise InputError(
                f"{site} is set key by key, so its position has to be the same token of both prompts of a pair; "
                f"in pair {moved[0]} it is {at}"
            )
