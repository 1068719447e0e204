"""Runs in which heads and MLPs give something else at some tokens: every row of a pass has knocked-out parts of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.interventions import Hooks, Part
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

Mask = Callable[[Site, Tensor, int], Bool[Tensor, "row pos part"]]
"""Of a layer's heads (or its MLP, one part), some rows and so many columns: what is knocked out."""


@dataclass(frozen=True, eq=False)
class StandIn:
    """What knocked-out parts give: the same at all tokens that share an entry.

    Attributes:
        entry: which entry each token has, [prompt pos]; padding has 0.
        table: ``z`` of a layer -> [entry head d_head]; ``mlp_out`` of a layer -> [entry d_model]. There may be more than are named.
    """

    entry: Int[Tensor, "prompt pos"]
    table: Mapping[Site, Float[Tensor, "entry ..."]]

    def at(self, site: Site, prompts: Tensor, width: int, like: Tensor) -> Tensor:
        """The values for some prompts, [prompt pos ...]."""
        table = self.table[site]
        return table[self.entry[prompts, :width].to(table.device)].to(like)


def parts(model: HookedModel, mlps: bool) -> list[Site]:
    """What can be knocked out: heads of every layer, and MLPs if wanted."""
    return [Site(c, layer) for layer in range(model.shape.n_layers) for c in ("z", *(["mlp_out"] if mlps else []))]


def zeros(model: HookedModel, batch: Batch, sites: Sequence[Site]) -> StandIn:
    """Nothing at all."""
    s, like = model.shape, {"dtype": model.dtype, "device": model.device}
    sizes = {"z": (1, s.n_heads, s.d_head), "mlp_out": (1, s.d_model)}
    return StandIn(torch.zeros_like(batch.ids), {site: torch.zeros(sizes[site.component], **like) for site in sites})


def recorded(model: HookedModel, source: Batch, partner: Sequence[int], entry_of: Batch, sites: Sequence[Site]) -> StandIn:
    """What they give at the same token of another prompt.

    Args:
        model: the model.
        source: prompts that values come from.
        partner: for every prompt one of the source, as long as it is.
        entry_of: the prompts.
        sites: what ``parts`` names.

    Raises:
        InputError: the activations do not fit into memory.
    """
    width = source.ids.shape[1]
    entry = torch.tensor(partner)[:, None] * width + torch.arange(entry_of.ids.shape[1])
    entry = entry.masked_fill(~entry_of.mask.cpu(), 0)
    return StandIn(entry, {site: x.flatten(0, 1) for site, x in model.capture(source, sites).items()})


def means(
    model: HookedModel,
    source: Batch,
    slot: Int[Tensor, "source pos"],
    left_out: Int[Tensor, "way source pos"],
    whole: Int[Tensor, " entry"],
    entry: Int[Tensor, "prompt pos"],
    sites: Sequence[Site],
) -> StandIn:
    """Means over tokens of the source that share a slot, each entry without some of them: the sum of all less the sum of those.

    Slots are summed in float64 while the prompts pass through.

    Args:
        model: the model.
        source: prompts that values come from.
        slot: which sum each of their tokens enters, from 0 up; nothing is read of padding.
        left_out: the entries that leave a token out; one past the last entry is none.
        whole: the slot of every entry.
        entry: which entry each token of the ablated prompts gets.
        sites: what ``parts`` names.
    """
    real, many = source.mask.cpu(), len(whole)
    count = torch.bincount(slot[real], minlength=int(whole.max()) + 1)
    without = torch.bincount(left_out[:, real].flatten(), minlength=many + 1)
    rest = (count[whole] - without[:many]).clamp_min(1)  # 0 where no token ever looks
    wide = torch.promote_types(model.dtype, torch.float32)
    sums: dict[Site, Tensor] = {}
    table: dict[Site, Tensor] = {}
    kept = sum(model.shape.d_model if s.component == "mlp_out" else model.shape.n_heads * model.shape.d_head for s in sites)
    for part, got in model.each(source, model._bytes_per_token(kept), lambda part: model.read(part, sites)):
        mask = part.batch.mask.cpu()
        columns = mask.shape[1]
        for site, x in got.items():
            if site not in sums:
                sums[site] = torch.zeros(len(count), *x.shape[2:], dtype=torch.float64, device=x.device)
                table[site] = torch.zeros(many + 1, *x.shape[2:], dtype=wide, device=x.device)
            values = x[mask.to(x.device)]
            sums[site].index_add_(0, slot[part.rows, :columns][mask].to(x.device), values.double())
            for way in left_out:
                table[site].index_add_(0, way[part.rows, :columns][mask].to(x.device), values.to(wide))
    for site, x in table.items():  # in place: this is as large as all activations of the prompts
        n = rest.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        x[:many] = ((sums.pop(site)[whole.to(x.device)] - x[:many]) / n).to(wide)
    return StandIn(entry, table)


@torch.no_grad()
def ablated(
    model: HookedModel, batch: Batch, prompts: Sequence[int], mask: Mask, stand_in: StandIn, at: str | int
) -> Iterator[tuple[Tensor, Float[Tensor, "row vocab"]]]:
    """Runs of rows, each with its own parts knocked out; whatever is not knocked out runs free.

    Args:
        model: the model.
        batch: prompts.
        prompts: the prompt of every row.
        mask: what is knocked out.
        stand_in: what knocked-out parts give.
        at: the position whose logits are read.

    Yields:
        Some rows, and their logits; memory holds as many at a time as fit.

    Raises:
        InputError: a part of this architecture that no pass goes through.
    """
    which = torch.tensor(prompts)
    width = model.shape.n_heads * model.shape.d_head

    def run(part: Part) -> Tensor:
        here, columns, fired = which[part.rows], part.batch.ids.shape[1], set[Site]()

        def put(x: Tensor, site: Site) -> Tensor:
            fired.add(site)
            out = mask(site, part.rows, columns).to(x.device)
            return torch.where(out if site.component == "mlp_out" else out[..., None], stand_in.at(site, here, columns, x), x)

        def prepare(hooks: Hooks) -> None:
            for site in stand_in.table:
                hooks.on(site.component, site.layer, lambda x, site=site: put(x, site))

        where, inverse = part.batch.index(at).unique(return_inverse=True)
        logits = model.forward(part, prepare, keep=where).logits[torch.arange(len(inverse)), inverse]
        if silent := [str(site) for site in stand_in.table if site not in fired]:
            raise InputError(f"{', '.join(silent)} of {model.name} cannot be knocked out: no pass went through it")
        return logits

    for part, logits in model.each(batch.select(prompts), model._bytes_per_token(4 * width), run):
        yield part.rows, logits
