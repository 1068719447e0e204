"""How the log-probability of every token differs between two models, summed up over positions while they stream by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.models.batch import Batch
from interp.sweeps.predictions import following, predictions

if TYPE_CHECKING:
    from interp.models.pair import ModelPair

BLOCKS = 64
"""Sums are kept for so many groups of texts at most, so that memory does not grow with their number."""

SAMPLED = 4096
"""Positions whose largest increases are kept one by one."""

MEASURES: tuple[str, ...] = ("up", "down", "more", "less", "gain", "loss", "change")


@dataclass(frozen=True, eq=False)
class Shifts:
    """Sums over positions.

    Attributes:
        sums: for every token, by group of texts: ``up`` and ``down``, how often its increase (decrease) is among the ``top`` largest of
            a position; ``more`` and ``less``, how often it is above the floor at all; ``gain`` and ``loss``, the difference of its
            log-probability times tuned's (minus it, times base's) probability, which add up to the KL; ``change``, the difference.
        positions: by group of texts.
        largest: of all differences, in size.
        llr: log p_tuned - log p_base of the actual token, at the position that predicts it; NaN where there is none.
        sample: positions (every so many) of which the largest increases are kept, as prompt and position.
        sampled_ids: their tokens, by size; -1 where there is no increase above the floor.
        sampled: the increases.
    """

    sums: Float[Tensor, "measure block vocab"]
    positions: Float[Tensor, " block"]
    largest: float
    llr: Float[Tensor, "prompt pos"]
    sample: Int[Tensor, "sample 2"]
    sampled_ids: Int[Tensor, "sample rank"]
    sampled: Float[Tensor, "sample rank"]


def shifts(pair: ModelPair, batch: Batch, block: Int[Tensor, " prompt"], top: int, floor: float) -> Shifts:
    """Compare both models after every token of every text.

    Differences are of log-probabilities, each model's normalised over the shared ids: logits are known up to a constant only, which
    is another one at every position and in each model, so that differences of logits could not be compared between positions.

    Args:
        pair: the models.
        batch: the texts.
        block: group of every text, from 0.
        top: how many tokens of a position count as its largest increases.
        floor: differences up to it are not counted.
    """
    vocab, n_blocks = pair.shared_vocab, int(block.max()) + 1
    device = pair.base.device
    sums = torch.zeros(len(MEASURES), n_blocks, vocab, device=device)
    llr = torch.full(tuple(batch.ids.shape), torch.nan)
    every, seen, largest = max(1, -(-int(batch.lengths.sum()) // SAMPLED)), 0, 0.0
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for piece in predictions([pair.base, pair.tuned], batch, vocab, "token shift"):
        base, tuned = piece.logp
        d = tuned - base
        largest = max(largest, float(d.abs().max()))
        measured, best = _measured(base, tuned, d, min(top, vocab), floor)
        of = block[piece.prompt]
        for b in of.unique().tolist():
            here = (of == b).to(device)
            for i, values in enumerate(measured):
                sums[i, b] += values[here].sum(0)
        after = following(batch, piece, vocab)
        actual = d.gather(1, after.clamp(min=0).to(device)[:, None])[:, 0].float().cpu()
        llr[piece.prompt, piece.pos] = torch.where(after < 0, torch.nan, actual)
        first = -seen % every
        place = torch.stack([piece.prompt, piece.pos], 1)[first::every]
        ids = torch.where(best.values > floor, best.indices, -1)[first::every].cpu()
        kept.append((place, ids, torch.where(best.values > floor, best.values, 0.0)[first::every].float().cpu()))
        seen += len(d)
    sample, ids, increases = (torch.cat(x) for x in zip(*kept, strict=True))
    positions = torch.zeros(n_blocks, dtype=torch.float64).index_add_(0, block, batch.lengths.cpu().double())
    return Shifts(sums.cpu(), positions, largest, llr, sample, ids, increases)


def _measured(base: Tensor, tuned: Tensor, d: Tensor, top: int, floor: float) -> tuple[list[Tensor], torch.return_types.topk]:
    """What is summed, in the order of ``MEASURES``, and the largest increases."""
    best = d.topk(top, dim=-1)
    least = d.topk(top, dim=-1, largest=False).values[:, -1:]
    more, less = d > floor, d < -floor
    found = [more & (d >= best.values[:, -1:]), less & (d <= least), more, less, tuned.exp() * d, -base.exp() * d, d]
    return [x.float() for x in found], best
