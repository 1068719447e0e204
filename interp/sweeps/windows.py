"""Windows of texts and their log-likelihood ratio: the stretches that one model explains better than another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 20
"""How often tokens are shuffled within their texts."""


@dataclass(frozen=True)
class Window:
    """Neighbouring tokens of a text.

    Attributes:
        prompt: the text.
        start: its first token; from 1, as nothing predicts the first of a text.
        stop: behind its last token.
        llr: sum of the log-likelihood ratios of its tokens.
    """

    prompt: int
    start: int
    stop: int
    llr: float

    def overlaps(self, other: Window) -> bool:
        """They share a token."""
        return self.prompt == other.prompt and self.start < other.stop and other.start < self.stop


def windows_of(llr: Float[Tensor, "prompt pos"], size: int, step: int) -> list[Window]:
    """Every window; the last of a text ends with it, and a text that is shorter is one.

    Args:
        llr: at the position that predicts a token; NaN where there is none, which counts as 0 within a text.
        size: tokens of a window.
        step: from one to the next.
    """
    places = _places(llr, size, step)
    return [Window(p, a + 1, b + 1, v) for (p, a, b), v in zip(places.tolist(), _sums(llr.nan_to_num(0.0), places).tolist(), strict=True)]


def shuffled_extremes(llr: Float[Tensor, "prompt pos"], size: int, step: int, seed: int) -> Float[Tensor, "draw 2"]:
    """The largest and the smallest window when the tokens of each text stand in random order; no rows where there is no window."""
    places = _places(llr, size, step)
    if not len(places):
        return torch.zeros(0, 2, dtype=torch.float64)
    values, found = llr.nan_to_num(0.0), []
    ends = _ends(llr)
    behind = torch.arange(llr.shape[1]) >= ends[:, None]
    draws = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS):
        keys = torch.rand(llr.shape, generator=draws).masked_fill(behind, 2.0)
        sums = _sums(values.gather(1, keys.argsort(1)), places)
        found.append(torch.stack([sums.max(), sums.min()]))
    return torch.stack(found)


def _ends(llr: Tensor) -> Tensor:
    """How many tokens of each text are predicted: up to the last that has a number."""
    there = ~llr.isnan()
    return (there * torch.arange(1, llr.shape[1] + 1)).amax(1)


def _places(llr: Tensor, size: int, step: int) -> Tensor:
    """Text, first position and behind the last, of every window; [window 3]."""
    found = []
    for prompt, n in enumerate(_ends(llr).tolist()):
        last = max(n - size, 0)
        starts = [*range(0, last, step), last] if n else []
        found += [(prompt, a, min(a + size, n)) for a in starts]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 3)


def _sums(values: Tensor, places: Tensor) -> Tensor:
    run = torch.cat([torch.zeros(len(values), 1, dtype=torch.float64), values.double().cumsum(1)], 1)
    return run[places[:, 0], places[:, 2]] - run[places[:, 0], places[:, 1]]
