"""A run of prompts that is kept, so that others can go on from it: the stream, keys and values of every block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from interp.models.batch import Batch
from interp.models.interventions import Hooks, Part
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
    """

    stream: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    projected: list[dict[str, Tensor]]


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


def keep(model: Running, batch: Batch) -> Kept:
    """Run prompts once and keep what rows need to go on from them."""
    n = model.shape.n_layers
    sites = [*(Site("resid_pre", layer) for layer in range(n)), Site("resid_post", n - 1)]
    full: dict[object, Tensor] = {}

    def run(part: Part) -> dict[object, Tensor]:
        seen: dict[Site, Tensor] = {}
        cache = Recorded()

        def prepare(hooks: Hooks) -> None:
            for site in sites:
                hooks.read(site, seen)

        with torch.no_grad(), _outputs(model.wrapped) as made:
            model.forward(part, prepare, trunk=True, cache=cache)
        size = part.batch.ids.shape
        return {
            **seen,
            **{("keys", layer): k for layer, (k, _) in cache.kept.items()},
            **{("values", layer): v for layer, (_, v) in cache.kept.items()},
            **{name: x for name, x in made.items() if x.shape[:-1] == size},
        }

    for part, got in model.each(batch, model._bytes_per_token(), run):
        for name, x in got.items():
            axis = 1 if x.ndim == 3 else 2
            if name not in full:
                size = list(x.shape)
                size[0], size[axis] = batch.ids.shape
                full[name] = x.new_zeros(size)
            full[name].narrow(axis, 0, x.shape[axis])[part.rows.to(x.device)] = x
    keys, values = ([full[name, i] for i in range(n)] for name in ("keys", "values"))
    projected = [{c: full[c, i] for c in ("q", "k", "v") if (c, i) in full} for i in range(n)]
    return Kept([full[s] for s in sites], keys, values, projected)


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
