"""Channels between heads as edits: the coefficient of an SVD component that a head writes is set, scaled or deleted.

A component's direction v is the one that the head's OV circuit writes to (``heads.component``); its coefficient is that of the head's own
contribution, c = (z @ W_O) . v, without ``b_O``. See Merullo et al. 2024, arXiv 2406.09519.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import ActivationChange, Change, ChannelChange, Edit, WeightChange, When
from interp.errors import InputError
from interp.models.composition import spans
from interp.models.heads import component, folded_heads, upcast
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.editing import Editing
    from interp.models.hooked import HookedModel

Where = Literal["activations", "weights"]


def channel_edit(
    model: HookedModel,
    channels: str | Site | Sequence[str | Site],
    *,
    to: float | None = None,
    scale: float | None = None,
    delete: bool = False,
    where: Where = "activations",
    at: str | int | None = None,
    receivers: str | Sequence[str | Site] | None = None,
    when: When = "all",
    name: str = "",
) -> Edit:
    """Set, scale or delete what heads send along components of their SVD; the edit holds plain vectors, no model.

    In activations the head's contribution gains ``(c* - c) v``, with ``c*`` the value given, ``scale`` times c, or 0: for all readers, or
    for the receivers named alone, which read a changed copy of the stream through their own norm. In weights ``W_O`` becomes
    ``W_O (I + (g - 1) v v^T)``, which multiplies the component's singular value by g and leaves the others, at every position.
    Deleting in weights is deleting in activations at all positions. Where singular values are nearly equal, or weights are stored in
    less than float32, a warning says so.

    Args:
        model: whose components they are; an edit of weights is made of its ``W_O`` too, with the edits now in force.
        channels: ``L8H10.1, L7H3.0`` or ``L8H10.1@END``.
        to: the coefficient to set.
        scale: what the coefficient is multiplied by.
        delete: the same as ``scale=0``.
        where: ``activations`` or ``weights``.
        at: the position, for channels that name none; None is every position.
        receivers: ``L9H6.q, L9H9.q``: who reads the change; None is everybody behind the head. ``k`` and ``v`` count key/value heads, as
            activations do and as ``composition`` names them (``L9H1.v for L9H6`` is ``L9H1.v``), and all heads of the group read it.
        when: during generation: positions of the prompt, new tokens, or both.
        name: of the edit.

    Raises:
        InputError: no component of a head, one beyond its rank or named twice; a receiver that is not later than a sender; more or
            less than one of ``to``, ``scale`` and ``delete``; what weights cannot do.
    """
    gain, value = _wanted(to, scale, delete)
    sites = named(model, channels, at)
    _refuse_twice(sites, gain, receivers)
    if where not in get_args(Where):
        raise InputError(f"where={where!r} is not one of {', '.join(get_args(Where))}")
    vectors = {site: component(model, site.at(None))[2] for site in sites}
    for doubt in doubts(model, sites):
        warnings.warn(doubt, stacklevel=2)
    what = "deleted" if not gain and not value else f"times {gain:g}" if to is None else f"set to {value:g}"
    title = name or f"{', '.join(map(str, sites))} {what}"
    if where == "weights":
        _refuse_in_weights(sites, to, receivers, when)
        return Edit(tuple(_in_weights(model, vectors, gain)), title)
    if receivers is None:
        return Edit(tuple(change for site, v in vectors.items() for change in _for_all(site, v, gain, value, when)), title)
    readers = model.sites([part for text in _listed(receivers) for part in _split(text)])
    k, heads = len(sites), tuple(Site("result", s.layer, s.head, s.position) for s in sites)
    change = ChannelChange(heads, torch.stack(list(vectors.values())), (gain,) * k, (value,) * k, tuple(readers), when)
    return Edit((change,), f"{title} for {', '.join(map(str, readers))}")


def named(model: Editing, channels: str | Site | Sequence[str | Site], at: str | int | None = None) -> list[Site]:
    """Components of heads from their text, at their positions or at ``at``.

    Raises:
        InputError: what is no component of a head of this model, or one that is named twice.
    """
    sites = model.sites([part for text in _listed(channels) for part in _split(text)])
    for site in sites:
        if site.rank is None:
            raise InputError(f"{site} is no component of a head; write L8H10.1")
    sites = [site.at(at) if site.position is None else site for site in sites]
    for i, site in enumerate(sites):
        if any(site.at(None) == s.at(None) and (s.position == site.position or None in (s.position, site.position)) for s in sites[:i]):
            raise InputError(f"{site} is named twice; a channel is changed once")
    if not sites:
        raise InputError("no channels were given; write L8H10.1, L7H3.0")
    return sites


def doubts(model: HookedModel, sites: Sequence[Site]) -> tuple[str, ...]:
    """What a reader should know of components: those that are no single directions, with their span, and weights of low precision."""
    found: dict[str, None] = {}
    strength = {layer: folded_heads(model, layer).components("ov").S for layer in {site.layer or 0 for site in sites}}
    for site in sites:
        layer, head = site.layer or 0, site.head or 0
        begins = spans(strength[layer][head])
        span = (begins == begins[site.rank or 0]).nonzero().flatten().tolist()
        asked = {s.rank for s in sites if (s.layer, s.head, s.position) == (site.layer, site.head, site.position)}
        if len(span) > 1 and not asked.issuperset(span):
            ends = f"components {span[0]} to {span[-1]} of L{layer}H{head} have nearly equal singular values"
            found[f"{ends}: their span is identified, the direction of {site.at(None)} in it is not"] = None
    return (*found, *upcast(model))


def _refuse_twice(sites: Sequence[Site], gain: float, receivers: object) -> None:
    """One component at two positions that may be one token would be multiplied there twice; deleting and setting it twice is the same."""
    if receivers is not None or not gain:
        return
    for i, site in enumerate(sites):
        if others := [s for s in sites[:i] if s.at(None) == site.at(None)]:
            raise InputError(f"{others[0]} and {site} may be the same token, whose channel would be multiplied twice; name one position")


def _listed(texts: str | Site | Sequence[str | Site]) -> list[str | Site]:
    return [texts] if isinstance(texts, str | Site) else list(texts)


def _split(text: str | Site) -> list[str | Site]:
    return [text] if isinstance(text, Site) else [part for part in re.split(r"\s*[,;]\s*", text.strip()) if part]


def _wanted(to: float | None, scale: float | None, delete: bool) -> tuple[float, float]:
    """What a coefficient is multiplied by, and what is then added."""
    given = [n for n, there in (("to", to is not None), ("scale", scale is not None), ("delete", delete)) if there]
    if len(given) != 1:
        came = " and ".join(given) or "nothing"
        raise InputError(f"a channel is either set (to=), multiplied (scale=) or deleted (delete=True), but {came} was given")
    number = 0.0 if delete else to if scale is None else scale
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise InputError(f"{given[0]} is a finite number, but it is {number!r}")
    return (0.0, float(number)) if to is not None else (float(number), 0.0)


def _for_all(site: Site, v: Tensor, gain: float, value: float, when: When) -> list[Change]:
    """The change for all readers: the component is taken away to the share wanted, then the value is put in."""
    head = Site("result", site.layer, site.head, site.position)
    changes: list[Change] = [ActivationChange(head, "project", v, when, 1 - gain)]
    return changes + ([ActivationChange(head, "add", value * v, when)] if value else [])


def _refuse_in_weights(sites: Sequence[Site], to: float | None, receivers: object, when: str) -> None:
    if to is not None:
        raise InputError("weights multiply what a head writes and cannot set it; use scale= or delete=True, or where='activations'")
    if receivers is not None:
        raise InputError("W_O writes for all readers, so a change of weights takes no receivers; use where='activations'")
    if placed := [str(site) for site in sites if site.position is not None]:
        raise InputError(f"{placed[0]}: a change of weights is one at all positions; leave the position out, or use where='activations'")
    if when != "all":
        raise InputError(f"a change of weights holds for the prompt and for new tokens, not when={when!r} alone")


def _in_weights(model: HookedModel, vectors: Mapping[Site, Tensor], gain: float) -> list[WeightChange]:
    """One change of low rank per head."""
    by_head: dict[tuple[int | None, int | None], list[Tensor]] = {}
    for site, v in vectors.items():
        by_head.setdefault((site.layer, site.head), []).append(v)
    changes = []
    for (layer, head), found in by_head.items():
        where, written = Site("W_O", layer, head), torch.stack(found)
        changes.append(WeightChange(where, (gain - 1) * (model.weight(where).detach().cpu().double() @ written.mT), written))
    return changes


def coefficients(model: HookedModel, prompts: object, channels: Sequence[Site], directions: Float[Tensor, "channel d_model"]) -> Tensor:
    """What heads write along directions, [prompt channel]: (z @ W_O) . v at the one token that each channel's position names."""
    batch = model.batch(prompts)
    places = [Site("z", c.layer, c.head, c.position) for c in channels]
    for place in places:
        if place.position is None:
            raise InputError(f"{place} names no position; coefficients are read at one token, as in {place}@END")
        batch.index(place.position)
    found = model.capture(batch, list(dict.fromkeys(places)))
    columns = []
    for place, v in zip(places, directions, strict=True):
        out = model.weight(Site("W_O", place.layer, place.head)).double()
        columns.append(found[place].double() @ (out @ v.to(out)))
    return torch.stack(columns, dim=1).cpu()
