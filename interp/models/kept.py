"""A run of prompts that is kept, so that others can go on from it: the stream, keys and values of every block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from interp.models.batch import Batch
from interp.models.interventions import Hooks, Part, mask_padding, position_axes
from interp.models.wrap import Wrapped
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.running import Running


@dataclass(frozen=True, eq=False)
class Kept:
    """A run of whole prompts from which rows go on.

    Attributes:
        stream: entering every block, and last leaving the last one; [prompt pos d_model] each.
        keys: of every block, [prompt head pos d_head] each.
        values: of every block, alike.
        projected: what ``projections`` of every block give, by name, [prompt pos d]; those that cannot be told apart are left out.
        seen: other activations that were asked for, as ``capture`` gives them.
        logits: at the position that was asked for, [prompt vocab].
    """

    stream: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    projected: list[dict[str, Tensor]]
    seen: dict[Site, Tensor]
    logits: Tensor | None

    def of(self, rows: slice, width: int) -> Kept:
        """That of neighbouring prompts of at most some width; it shares what is kept."""

        def cut(x: Tensor, axes: Sequence[int]) -> Tensor:
            for axis in axes:
                x = x.narrow(axis, 0, min(width, x.shape[axis]))
            return x[rows]

        return Kept(
            [cut(x, [1]) for x in self.stream],
            [cut(x, [2]) for x in self.keys],
            [cut(x, [2]) for x in self.values],
            [{name: cut(x, [1]) for name, x in made.items()} for made in self.projected],
            {site: cut(x, position_axes(site, x.ndim)) for site, x in self.seen.items()},
            None if self.logits is None else self.logits[rows],
        )


class Recorded(DynamicCache):
    """Keeps keys and values and hands them back as they came, so that the run is the one without a cache."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep them."""
        self.kept[layer_idx] = key_states, value_states
        return key_states, value_states


def projections(wrapped: Wrapped, layer: int) -> dict[str, Any]:
    """The modules that make q, k and v of a block's normed stream, position by position; none where TransformerLens names none."""
    attention = getattr(wrapped.bridge.blocks[layer], "attn", None)
    found = {name: getattr(getattr(attention, name, None), "original_component", None) for name in ("q", "k", "v")}
    return {name: module for name, module in found.items() if isinstance(module, torch.nn.Module)}


def keep(model: Running, batch: Batch, also: Sequence[Site] = (), at: str | int | None = None) -> Kept:
    """Run prompts once and keep what rows need to go on from them.

    Args:
        model: the model.
        batch: the prompts.
        also: whole activations to keep besides.
        at: a position whose logits are kept too.
    """
    n = model.shape.n_layers
    sites = [*(Site("resid_pre", layer) for layer in range(n)), Site("resid_post", n - 1)]
    full: dict[object, Tensor] = {}

    def run(part: Part) -> dict[object, Tensor]:
        seen: dict[Site, Tensor] = {}
        cache = Recorded()

        def prepare(hooks: Hooks) -> None:
            for site in dict.fromkeys((*sites, *also)):
                hooks.read(site, seen)

        columns, which = (None, None) if at is None else part.batch.index(at).unique(return_inverse=True)
        with torch.no_grad(), _outputs(model.wrapped) as made:
            out = model.forward(part, prepare, trunk=at is None, keep=columns, cache=cache)
        size = part.batch.ids.shape
        return {
            **({} if which is None else {"logits": out.logits[torch.arange(len(which)), which]}),
            **{site: mask_padding(x, site, part) if site in also else x for site, x in seen.items()},
            **{("keys", layer): k for layer, (k, _) in cache.kept.items()},
            **{("values", layer): v for layer, (_, v) in cache.kept.items()},
            **{name: x for name, x in made.items() if x.shape[:-1] == size},
        }

    for part, got in model.each(batch, model._bytes_per_token(), run):
        if part.rows.tolist() == list(range(len(batch))):
            full = dict(got)  # all prompts in their order: nothing to put together
            break
        for name, x in got.items():
            axes = position_axes(name, x.ndim) if isinstance(name, Site) else () if x.ndim == 2 else (1 if x.ndim == 3 else 2,)
            if name not in full:
                size = list(x.shape)
                size[0] = len(batch)
                for axis in axes:
                    size[axis] = batch.ids.shape[1]
                full[name] = x.new_zeros(size)
            full[name][(part.rows.to(x.device), *(slice(0, n) for n in x.shape[1:]))] = x
    keys, values = ([full[name, i] for i in range(n)] for name in ("keys", "values"))
    projected = [{c: full[c, i] for c in ("q", "k", "v") if (c, i) in full} for i in range(n)]
    return Kept([full[s] for s in sites], keys, values, projected, {site: full[site] for site in also}, full.get("logits"))


@contextmanager
def _outputs(wrapped: Wrapped) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Keep what the projections give while a pass runs."""
    made: dict[tuple[str, int], Tensor] = {}
    handles = []
    try:
        for layer in range(wrapped.shape.n_layers):
            for name, module in projections(wrapped, layer).items():
                handles.append(module.register_forward_hook(lambda _, args, out, key=(name, layer): made.update({key: out})))
        yield made
    finally:
        for handle in handles:
            handle.remove()
