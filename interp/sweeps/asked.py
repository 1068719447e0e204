"""What single prompts are asked at one position: the token whose logit counts, and what rounding does to numbers read there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.prompts import Prompts
from interp.stats import Estimate

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel, ModelPair

_APART = 8  # prompts that are run again in a batch of their own


def position(at: str) -> str | int:
    """A position from its text: a name, or a number that counts tokens."""
    text = str(at)
    return int(text) if text.removeprefix("-").isdigit() else text


def known_vocabulary(model: HookedModel | ModelPair) -> int:
    """Token ids below which logits are read: all of a model's, those that both models of a pair know."""
    return getattr(model, "shared_vocab", model.shape.d_vocab)


def given(prompts: Prompts, vocab: int, what: str) -> Int[Tensor, " prompt"] | None:
    """The ``answers`` or ``distractors`` of prompts, or None where they come without.

    Raises:
        InputError: one is outside the vocabulary that is read.
    """
    ids = getattr(prompts, what)
    if ids is None:
        return None
    tokens = torch.tensor(ids)
    if bool((tokens >= vocab).any()):
        row = int((tokens >= vocab).nonzero()[0])
        raise InputError(f"the {what[:-1]} of prompt {row} is token {int(tokens[row])}, but logits are read for ids below {vocab}")
    return tokens


def own_top(model: HookedModel, batch: Batch, at: str | int, vocab: int) -> Int[Tensor, " prompt"]:
    """The token that a model itself holds most likely, which stands in for an answer."""
    step = max(1, 2**24 // model.shape.d_vocab)
    rows = [list(range(start, min(start + step, len(batch)))) for start in range(0, len(batch), step)]
    return torch.cat([model.logits(batch.select(some), at=at)[:, :vocab].argmax(-1).cpu() for some in rows])


def units(group: Int[Tensor, " prompt"], what: str = "prompt") -> str:
    """How many prompts, or contexts where several prompts share one, numbers are means of; a single one has no interval.

    Args:
        group: context of each prompt, from 0.
        what: name of a prompt.
    """
    n, contexts = len(group), int(group.max()) + 1
    if contexts == 1:
        return f"1 {what}, so no interval" if n == 1 else f"1 context of {n} {what}s, so no interval"
    return f"{n} {what}s" if n == contexts else f"{contexts} contexts of {n} {what}s"


def with_ends(found: Estimate, *cell: int, form: str = ".3g") -> str:
    """``0.42 [0.31, 0.55]``, or ``0.42`` where there is no interval.

    Args:
        found: the estimate.
        cell: of many, which.
        form: of the numbers.
    """
    value, low, high = (f"{float(x[cell]) + 0.0:{form}}" for x in (found.value, found.low, found.high))  # no -0.00
    return value if bool(found.low[cell].isnan()) else f"{value} [{low}, {high}]"


Measure = Callable[["HookedModel", list[int]], Tensor]
"""Numbers [prompt ...] of some prompts, by a model."""


def rounding(model: HookedModel, found: Float[Tensor, "prompt ..."], measure: Measure) -> tuple[Float[Tensor, "..."], bool]:
    """What rounding alone does to numbers of every prompt: the largest change when some of the prompts run in a batch of another size.

    In half precision also when they are computed by the same weights in float32.

    Args:
        model: the model.
        found: what was measured of all prompts together.
        measure: measures some of them, by their indices.

    Returns:
        The largest change over prompts [...], and whether the model's float32 copy was wanted and could not be had.
    """
    rows = list(range(len(found)))
    parts: Sequence[list[int]] = [rows[:_APART]] if len(rows) > _APART else [rows[::2], rows[1::2]] if len(rows) > 1 else [[0, 0]]
    worst = torch.zeros_like(found[0])
    for part in parts:
        worst = torch.maximum(worst, _largest(measure(model, part), found[part]))
    if model.dtype.itemsize >= 4:
        return worst, False
    finer = None if model.active_edits else model.in_dtype(torch.float32)
    if finer is None:
        return worst, True
    return torch.maximum(worst, _largest(measure(finer, rows[:_APART]), found[: len(rows[:_APART])])), False


def _largest(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().amax(0)
