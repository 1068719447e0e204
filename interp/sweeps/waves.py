"""Which cells of a sweep need computing, from which block and position on, and how they are packed into waves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.models.restart import OWN_POSITION, Wave, Write
from interp.sweeps.patches import Setting


@dataclass(frozen=True, eq=False)
class Cells:
    """The (patch, prompt) pairs in which something changes that can reach what is read; those of one wave are neighbours.

    Attributes:
        patch: index of the patch.
        prompt: index of the prompt.
        start: the first position that changes.
        end: the position that is read.
        layer: the first block that is concerned.
        alone: True where the change leaves that block at ``start`` only.
    """

    patch: Int[Tensor, " cell"]
    prompt: Int[Tensor, " cell"]
    start: Int[Tensor, " cell"]
    end: Int[Tensor, " cell"]
    layer: Int[Tensor, " cell"]
    alone: Bool[Tensor, " cell"]

    def __len__(self) -> int:
        """How many."""
        return len(self.patch)

    @classmethod
    def of(cls, patches: Sequence[Sequence[Setting]], read: Int[Tensor, " prompt"], n_layers: int) -> Cells:
        """The cells of patches when each prompt is read at one position."""
        found = [_entry(patch, read, n_layers) for patch in patches]
        start, layer, alone = (torch.stack([f[i] for f in found]) for i in range(3))
        patch, prompt = (start >= 0).nonzero(as_tuple=True)
        start, layer, alone, end = start[patch, prompt], layer[patch, prompt], alone[patch, prompt], read[prompt]
        width = int(read.max()) + 1
        order = torch.argsort(((start * width + end) * n_layers + layer) * 2 + alone, stable=True)
        return cls(*(x[order] for x in (patch, prompt, start, end, layer, alone)))

    def waves(self, fit: Callable[[int, int], int]) -> Iterator[tuple[int, int]]:
        """Runs of neighbours that cover the same positions; ``fit(start, end)`` says how many may go together."""
        same = (self.start.diff() == 0) & (self.end.diff() == 0)
        if not len(self):
            return
        edges = [0, *((~same).nonzero().flatten() + 1).tolist(), len(self)]
        for first, last in pairwise(edges):
            step = fit(int(self.start[first]), int(self.end[first]))
            yield from ((at, min(at + step, last)) for at in range(first, last, step))


def _entry(patch: Sequence[Setting], read: Tensor, n_layers: int) -> tuple[Tensor, Tensor, Tensor]:
    """First position (-1: nothing changes), first block, and whether the change stays in place there; per prompt."""
    far = int(read.max()) + 1
    spans = []
    if not patch:
        return torch.full_like(read, -1), torch.zeros_like(read), torch.zeros_like(read, dtype=torch.bool)
    for s in patch:
        component, layer = entrance(s, n_layers)
        stays = component in OWN_POSITION
        # What keeps to its position matters in the last block only where it is read.
        matters = s.differs & ((s.where == read[:, None]) if stays and layer == n_layers - 1 else (s.where <= read[:, None]))
        low = s.where.masked_fill(~matters, far).amin(1)
        high = s.where.masked_fill(~matters, -1).amax(1)
        spans.append((low, high, torch.where(high >= 0, layer, n_layers), torch.full_like(high, stays, dtype=torch.bool)))
    low, high, layers, stays = (torch.stack(x) for x in zip(*spans, strict=True))
    start, layer = low.amin(0), layers.amin(0)
    first = layers == layer
    alone = (~first | (stays & (low == start) & (high == start))).all(0)
    return torch.where(start < far, start, -1), layer, alone


def entrance(setting: Setting, n_layers: int) -> tuple[str, int]:
    """Component and block of a setting: the stream leaving a block is the one entering the next."""
    site = setting.site
    assert site.layer is not None
    if site.component == "resid_post" and site.layer < n_layers - 1:
        return "resid_pre", site.layer + 1
    return site.component, site.layer


@dataclass(frozen=True, eq=False)
class Table:
    """Settings of one kind from many patches, so that those of a wave are gathered at once.

    Attributes:
        component: what is set.
        layer: in which block.
        slot: for every patch its row in this table, or -1.
        where: positions, [row prompt n].
        heads: [row], or None for all heads.
        values: [row prompt n ...].
    """

    component: str
    layer: int
    slot: Int[Tensor, " patch"]
    where: Int[Tensor, "row prompt n"]
    heads: Int[Tensor, " row"] | None
    values: Tensor

    def write(self, patch: Tensor, prompt: Tensor) -> Write:
        """What is set in the rows of a wave."""
        slot = self.slot[patch]
        rows = (slot >= 0).nonzero().flatten()
        slot, prompt = slot[rows], prompt[rows]
        heads = None if self.heads is None else self.heads[slot]
        return Write(self.component, self.layer, rows, self.where[slot, prompt], heads, self.values[slot, prompt])


def tables(patches: Sequence[Sequence[Setting]], n_layers: int) -> list[Table]:
    """All settings by kind, in the order in which those of a patch overwrite each other."""
    kinds: dict[tuple[int, str, int, bool, torch.Size], dict[int, Setting]] = {}
    for i, patch in enumerate(patches):
        # Leaving a block comes before entering the next, though both set the same stream.
        for turn, s in enumerate(sorted(patch, key=lambda s: s.site.component != "resid_post")):
            kinds.setdefault((turn, *entrance(s, n_layers), s.site.head is None, s.values.shape), {})[i] = s
    found = []
    for (_, component, layer, _, _), held in sorted(kinds.items(), key=lambda kind: kind[0][0]):
        first = next(iter(held.values()))
        slot = torch.full((len(patches),), -1, device=first.where.device)
        slot[list(held)] = torch.arange(len(held), device=slot.device)
        where, values = (torch.stack([getattr(s, f) for s in held.values()]) for f in ("where", "values"))
        heads = None if first.site.head is None else torch.tensor([s.site.head for s in held.values()], device=slot.device)
        found.append(Table(component, layer, slot, where, heads, values))
    return found


def wave(cells: Cells, at: int, stop: int, held: Sequence[Table]) -> Wave:
    """Cells ``at`` up to ``stop``, which cover the same positions."""
    patch, prompt, layer = (x[at:stop] for x in (cells.patch, cells.prompt, cells.layer))
    lowest = int(layer[0])
    writes = [t.write(patch, prompt) for t in held if t.layer >= lowest]
    return Wave(prompt, layer, cells.alone[at:stop], int(cells.start[at]), int(cells.end[at]), [w for w in writes if len(w.rows)])
