"""What models predict after every token of the same texts, a few tokens at a time, so that no [prompt pos vocab] is ever held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.models.batch import Batch
from interp.progress import progress
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.hooked import HookedModel

CELLS = 2**22
"""Tokens x vocabulary of log-probabilities held at a time, for each model."""

TOKENS = 2**13
"""Tokens whose final residual stream is held at a time, for each model."""

_LEAST = -1e4  # log-probability of what a model excludes: no infinity, whose difference would be none
_APART = 8  # prompts that are run again by themselves


@dataclass(frozen=True, eq=False)
class Piece:
    """The predictions of several models after some tokens.

    Attributes:
        prompt: row of the batch that a token is of.
        pos: its position.
        logp: log-probabilities of what follows, over the ids below the vocabulary that was asked for, renormalised to them.
    """

    prompt: Int[Tensor, " token"]
    pos: Int[Tensor, " token"]
    logp: list[Float[Tensor, "token vocab"]]


def stretches(batch: Batch, tokens: int | None = None) -> Iterator[list[int]]:
    """Prompts of like length, together at most so many tokens (or one prompt).

    Args:
        batch: the prompts.
        tokens: by default ``TOKENS``.
    """
    limit, group, lengths = TOKENS if tokens is None else tokens, list[int](), batch.lengths.tolist()
    for row in sorted(range(len(batch)), key=lambda r: -lengths[r]):
        if group and (len(group) + 1) * lengths[group[0]] > limit:
            yield group
            group = []
        group.append(row)
    yield group


def final(model: HookedModel, batch: Batch) -> Float[Tensor, "token d_model"]:
    """The residual stream after the last block, of all real tokens, prompt by prompt."""
    site = Site("resid_post", model.shape.n_layers - 1)
    resid = model.capture(batch, [site])[site]
    return resid[batch.mask.to(resid.device)]


def logp(model: HookedModel, resid: Float[Tensor, "token d_model"], vocab: int) -> Float[Tensor, "token vocab"]:
    """Log-probabilities over the first ids from final residual streams, in float32 or better.

    Every token stands as a prompt of one token whose blocks are skipped.
    """
    logits = model.run_on(model.shape.n_layers, resid[:, None], Batch.of([[0]] * len(resid)), at="END")[:, :vocab]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).clamp_min(_LEAST)


def pieces(models: Sequence[HookedModel], finals: Sequence[Tensor], rows: Sequence[int], batch: Batch, vocab: int) -> Iterator[Piece]:
    """The predictions of all tokens of some prompts, from the final residual streams there, in order.

    Args:
        models: the models.
        finals: what ``final`` gives for each of them on ``batch.select(rows)``.
        rows: the prompts.
        batch: they are of.
        vocab: number of ids.
    """
    at, pos = batch.select(list(rows)).mask.cpu().nonzero(as_tuple=True)
    prompt, step = torch.tensor(rows)[at], max(1, CELLS // vocab)
    for start in range(0, len(pos), step):
        here = slice(start, start + step)
        found = [logp(model, resid[here], vocab) for model, resid in zip(models, finals, strict=True)]
        yield Piece(prompt[here], pos[here], [x.to(found[0].device) for x in found])


def predictions(models: Sequence[HookedModel], batch: Batch, vocab: int, desc: str) -> Iterator[Piece]:
    """The predictions of all tokens of all prompts.

    Args:
        models: the models.
        batch: the prompts.
        vocab: ids below it are compared.
        desc: text beside the progress bar.
    """
    groups = list(stretches(batch))
    for rows in progress(groups, desc, total=len(groups)):
        part = batch.select(rows)
        yield from pieces(models, [final(model, part) for model in models], rows, batch, vocab)


def following(batch: Batch, piece: Piece, vocab: int) -> Int[Tensor, " token"]:
    """The token that comes next; -1 at the end of a prompt, and where it is beyond the vocabulary."""
    last = piece.pos + 1 >= batch.lengths.cpu()[piece.prompt]
    after = batch.ids.cpu()[piece.prompt, (piece.pos + 1).clamp(max=batch.ids.shape[1] - 1)]
    return torch.where(last | (after >= vocab), -1, after)


@dataclass(frozen=True)
class Rounding:
    """Changes of log-probabilities by rounding alone.

    Attributes:
        largest: of all.
        typical: their root mean square.
        lacking: the part that half precision adds could not be measured.
    """

    largest: float
    typical: float
    lacking: bool


def rounding(model: HookedModel, batch: Batch, vocab: int) -> tuple[float, bool]:
    """The largest change of any log-probability by rounding alone, and whether its part in half precision could not be measured."""
    found = rounding_sizes(model, batch, vocab)
    return found.largest, found.lacking


def rounding_sizes(model: HookedModel, batch: Batch, vocab: int) -> Rounding:
    """What rounding alone does to log-probabilities.

    That is the last place of the largest log-probability, and some prompts alone against the same in a batch; of a model in half
    precision also its weights computed in float32, for which its memory has to suffice.
    """
    n = min(len(batch), _APART)
    rows = [i * len(batch) // n for i in range(n)]
    some = batch.select(rows)
    alone = torch.cat([final(model, batch.select([row])) for row in rows])
    together = final(model, some if n > 1 else batch.select([rows[0]] * 2))[: len(alone)]  # a single prompt stands twice there
    worst = _apart((model, alone), (model, together), vocab)
    if model.dtype.itemsize >= 4:
        return Rounding(*worst, lacking=False)
    wide = model.in_dtype(torch.float32)
    if wide is None:
        return Rounding(*worst, lacking=True)
    finer = _apart((model, alone), (wide, final(wide, some)), vocab)
    return Rounding(max(worst[0], finer[0]), max(worst[1], finer[1]), lacking=False)


def _apart(one: tuple[HookedModel, Tensor], other: tuple[HookedModel, Tensor], vocab: int) -> tuple[float, float]:
    """Largest difference of log-probabilities from two sets of final residual streams, and the root of their mean square."""
    step, worst, squares = max(1, CELLS // vocab), 0.0, 0.0
    for start in range(0, len(one[1]), step):
        sides = [logp(model, resid[start : start + step], vocab) for model, resid in (one, other)]
        last_place = torch.finfo(sides[0].dtype).eps * float(sides[0].abs().max())
        off = (sides[0] - sides[1]).abs()
        worst, squares = max(worst, last_place, float(off.max())), squares + float(off.double().square().sum())
    return worst, (squares / (len(one[1]) * vocab)) ** 0.5
