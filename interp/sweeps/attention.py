"""Where heads look: statistics of attention patterns of one or two models, read a few prompts and layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.progress import progress
from interp.roles import named
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

Layers = Mapping[int, Sequence[int]]
"""Layer -> its heads that are read."""

MEASURES = ("first token", "itself", "previous token", "entropy")
"""What a token that looks pays to the first token, to itself, to the one before, and how spread out that is (nats)."""

ELSEWHERE = "no named token"
_HELD = 2**27  # bytes of patterns at once
_FLOOR_PROMPTS = 8


@dataclass(frozen=True, eq=False)
class Attended:
    """Statistics of every head on every prompt; NaN for prompts of one token.

    Attributes:
        measures: ``MEASURES``, means over the tokens that look.
        looks: attention from END to some tokens; NaN where a prompt has none of them.
        distance: ``total_variation`` of the second model from the first; NaN for one model.
    """

    measures: Float[Tensor, "side measure head prompt"]
    looks: Float[Tensor, "side place head prompt"]
    distance: Float[Tensor, "head prompt"]


@dataclass(frozen=True, eq=False)
class Rounding:
    """What rounding does to these statistics in one model, the largest over some prompts.

    Attributes:
        measures: change of ``MEASURES``.
        looks: change of attention from END.
        distance: total variation of the model against itself.
        cell: change of any one number of a pattern.
        lacking: the model computes in half precision and no float32 copy of it could be compared.
    """

    measures: Float[Tensor, "measure head"]
    looks: Float[Tensor, "place head"]
    distance: Float[Tensor, " head"]
    cell: Float[Tensor, " head"]
    lacking: bool


def attended(models: Sequence[HookedModel], batch: Batch, layers: Layers, at: Bool[Tensor, "place prompt key"]) -> Attended:
    """Statistics of one model or of two on the same tokens.

    Args:
        models: one, or two that are compared row by row.
        batch: prompts, on the CPU.
        layers: the heads.
        at: tokens to which attention from END is summed, as ``places`` gives them.
    """
    start, n = {}, 0
    for layer, heads in layers.items():
        start[layer], n = n, n + len(heads)
    found = Attended(
        torch.full((len(models), len(MEASURES), n, len(batch)), torch.nan),
        torch.full((len(models), len(at), n, len(batch)), torch.nan),
        torch.full((n, len(batch)), torch.nan),
    )
    groups = list(_groups(batch, layers, models[0].shape.n_heads * len(models)))
    for rows, some in progress(groups, "attention"):
        part = batch.select(rows)
        columns = slice(start[min(some)], start[max(some)] + len(some[max(some)]))
        patterns = [_read(m, part, some) for m in models]
        for i, pattern in enumerate(patterns):
            found.measures[i][:, columns, rows] = measured(pattern, part.mask)
            found.looks[i][:, columns, rows] = _from_end(pattern, part, at[:, rows, : part.ids.shape[1]])
        if len(patterns) == 2:
            found.distance[columns, rows] = total_variation(patterns[0], patterns[1], part.mask)
    return found


def measured(pattern: Float[Tensor, "prompt head query key"], mask: Bool[Tensor, "prompt pos"]) -> Float[Tensor, "measure head prompt"]:
    """``MEASURES`` of patterns, means over the tokens that look, from the second on; NaN for prompts of one token."""
    before = torch.nn.functional.pad(pattern.diagonal(-1, 2, 3), (1, 0))
    rows = torch.stack([pattern[..., 0], pattern.diagonal(0, 2, 3), before, torch.special.entr(pattern).sum(-1)])
    return _over_rows(rows, mask)


def total_variation(one: Tensor, other: Tensor, mask: Bool[Tensor, "prompt pos"]) -> Float[Tensor, "head prompt"]:
    """Half the sum of absolute differences of rows, mean over the tokens that look, from the second on.

    Args:
        one: patterns [prompt head query key].
        other: of the same shape, perhaps on another device.
        mask: which tokens are real.
    """
    return _over_rows((one - other.to(one.device)).abs().sum(-1) / 2, mask)


def _over_rows(rows: Float[Tensor, "*some prompt head query"], mask: Bool[Tensor, "prompt query"]) -> Float[Tensor, "*some head prompt"]:
    """Means over the second and later tokens, summed in float64."""
    asks = mask.clone().to(rows.device)
    asks[:, 0] = False  # it sees only itself
    count = asks.sum(1).double()
    total = torch.where(asks[:, None], rows.double(), 0.0).sum(-1)
    return (total / torch.where(count == 0, torch.nan, count)[:, None]).transpose(-1, -2).cpu().float()


def _from_end(
    pattern: Float[Tensor, "prompt head query key"], batch: Batch, at: Bool[Tensor, "place prompt key"]
) -> Float[Tensor, "place head prompt"]:
    """Attention from END to some tokens."""
    rows = pattern[torch.arange(len(batch)), :, batch.lengths - 1].cpu().double()
    return _where(at.any(-1)[:, None], torch.einsum("nhk,pnk->phn", rows, at.double()), batch)


def _where(there: Tensor, values: Float[Tensor, "*some prompt"], batch: Batch) -> Float[Tensor, "*some prompt"]:
    """Values of prompts that have the tokens asked for, and more than one token; NaN elsewhere."""
    return torch.where(there & (batch.lengths > 1), values, torch.nan).float()


def even(batch: Batch, at: Bool[Tensor, "place prompt key"]) -> tuple[Float[Tensor, "measure prompt"], Float[Tensor, "place prompt"]]:
    """``MEASURES``, and attention from END, where a token pays the same to all it sees."""
    seen = torch.arange(1, batch.ids.shape[1] + 1, dtype=torch.float64)
    share, entropy = (1 / seen).cumsum(0) - 1, seen.log().cumsum(0)  # sums over the second and later tokens
    rows = batch.lengths - 1
    count = torch.where(rows == 0, torch.nan, rows.double())
    measures = torch.stack([share[rows] / count] * 3 + [entropy[rows] / count]).float()
    return measures, _where(at.any(-1), at.sum(-1) / batch.lengths, batch)


def places(batch: Batch) -> tuple[Bool[Tensor, "place prompt key"], tuple[str, ...]]:
    """The tokens of the named positions, of END, and all others, with their names; nothing where only END is named.

    Positions that no prompt of two or more tokens has are left out.
    """
    names = [name for name in batch.positions if name != "END"]
    if not names:
        return torch.zeros(0, *batch.ids.shape, dtype=torch.bool), ()
    found = torch.stack([named(batch, name) for name in (*names, "END")])
    found = torch.cat([found, (batch.mask & ~found.any(0))[None]])
    there = found[:, batch.lengths > 1].any(-1).any(-1).tolist()
    return found[there], tuple(name for name, some in zip((*names, "END", ELSEWHERE), there, strict=True) if some)


def _groups(batch: Batch, layers: Layers, heads: int) -> Iterator[tuple[list[int], Layers]]:
    """Prompts of like length, and layers, whose patterns fit the memory that is meant for them; ``heads`` of them per layer."""
    lengths = batch.lengths.tolist()
    order, names = sorted(range(len(batch)), key=lambda row: -lengths[row]), list(layers)
    while order:
        one = 4 * heads * lengths[order[0]] ** 2
        at_once = max(1, min(len(names), _HELD // one))
        rows = order[: max(1, _HELD // (one * at_once))]
        order = order[len(rows) :]
        for start in range(0, len(names), at_once):
            yield rows, {layer: layers[layer] for layer in names[start : start + at_once]}


def _read(model: HookedModel, batch: Batch, layers: Layers) -> Float[Tensor, "prompt head query key"]:
    """Patterns of some heads, layer by layer."""
    found = model.capture(batch, [Site("pattern", layer) for layer in layers])
    some = [x[:, list(heads)] for x, heads in zip(found.values(), layers.values(), strict=True)]
    return torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)) for x in some], dim=1)


def kept_tokens(length: int, most: int) -> tuple[int, ...]:
    """Which tokens of a prompt are kept: all, or the first and the last ones."""
    return tuple(range(length)) if length <= most else (0, *range(length - most + 1, length))


def whole(models: Sequence[HookedModel], batch: Batch, layers: Layers, kept: Sequence[int]) -> Float[Tensor, "side head query key"]:
    """Patterns of one prompt among its kept tokens."""
    some, found = torch.tensor(kept), []
    for model in models:
        parts = (_read(model, batch, part)[0] for _, part in _groups(batch, layers, model.shape.n_heads))
        found.append(torch.cat([part[:, some][:, :, some].cpu().float() for part in parts]))
    return torch.stack(found)


def rounding(model: HookedModel, batch: Batch, layers: Layers, at: Bool[Tensor, "place prompt key"]) -> Rounding:
    """A model against itself: some prompts alone and in a batch, and half precision against the same weights in float32.

    At least the last place of a share: a softmax is computed in float32, also in models that are float64.
    """
    long = (batch.lengths > 1).nonzero().flatten().tolist()
    n = min(len(long), _FLOOR_PROMPTS)
    rows = [long[i * len(long) // n] for i in range(n)]
    narrow = model.dtype.itemsize < 4
    # A copy of an edited model would lack its edits.
    wide = model.in_dtype(torch.float32) if narrow and not model.active_edits else None
    names, one = list(layers), 4 * model.shape.n_heads * int(batch.lengths[rows].max()) ** 2
    at_once = max(1, _HELD // (one * (n + 2)))  # the prompts together, and one of them alone, twice
    pieces = [{layer: layers[layer] for layer in names[start : start + at_once]} for start in range(0, len(names), at_once)]
    found = [_apart(model, wide, batch, rows, piece, at) for piece in pieces]
    least = torch.finfo(torch.float32).eps
    return Rounding(*(torch.cat(parts, dim=-1).clamp_min(least) for parts in zip(*found, strict=True)), lacking=narrow and wide is None)


def _apart(
    model: HookedModel, wide: HookedModel | None, batch: Batch, rows: Sequence[int], layers: Layers, at: Tensor
) -> tuple[Tensor, ...]:
    """The largest changes over prompts: ``measures``, ``looks``, ``distance`` and ``cell``."""
    together = _read(model, batch.select(rows if len(rows) > 1 else [*rows, *rows]), layers)  # a single prompt stands twice there
    changes: list[tuple[Tensor, ...]] = []
    for i, row in enumerate(rows):
        one = batch.select([row])
        n = one.ids.shape[1]
        alone = _read(model, one, layers)
        for other in [together[i : i + 1, :, :n, :n], *([] if wide is None else [_read(wide, one, layers)])]:
            measures = (measured(alone, one.mask) - measured(other, one.mask)).abs()[..., 0]
            looks = (_from_end(alone, one, at[:, [row], :n]) - _from_end(other, one, at[:, [row], :n])).abs()[..., 0]
            cell = (alone - other).abs().amax((0, 2, 3)).cpu().float()
            changes.append((measures, looks.nan_to_num(0.0), total_variation(alone, other, one.mask)[:, 0], cell))
    return tuple(torch.stack(parts).amax(0) for parts in zip(*changes, strict=True))
