"""Which tokens rise together: topics by non-negative matrix factorisation (Lee & Seung 1999)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

RUNS = 5
"""Starts from which a factorisation is made; they show how far the topics depend on the start."""

_STEPS = 300
_DIGIT = 6  # of what is factorised: rounding must not choose between starts that are as good


@dataclass(frozen=True, eq=False)
class Topics:
    """A factorisation of [position token] into [position topic] times [topic token], the topics by their share.

    Attributes:
        weight: of the tokens of a topic; they add up to 1.
        mass: share of a topic in the whole of what the factorisation gives.
        stability: cosine with the topic most like it from other starts, mean over these; NaN where there is one topic only.
        error: Frobenius norm of what is left over that of the matrix.
        shuffled: the same for a matrix whose columns were shuffled each by itself, so that no tokens rise together.
    """

    weight: Float[Tensor, "topic token"]
    mass: Float[Tensor, " topic"]
    stability: Float[Tensor, " topic"]
    error: float
    shuffled: float


def topics(matrix: Float[Tensor, "position token"], n: int, seed: int) -> Topics:
    """Factorise a non-negative matrix by least squares, from several seeded starts; the best of them is the result.

    Args:
        matrix: no negative entries.
        n: topics asked for; no more than the matrix has rows and columns with anything in them.
        seed: of the starts and of the shuffling.
    """
    x = np.round(matrix.double().numpy(), _DIGIT)
    n = min(n, int((x.sum(0) > 0).sum()), int((x.sum(1) > 0).sum()))
    if n < 1:
        nothing = torch.zeros(0, dtype=torch.float64)
        return Topics(torch.zeros(0, matrix.shape[1], dtype=torch.float64), nothing, nothing.clone(), 0.0, 0.0)
    runs = [_factorised(x, n, seed + i) for i in range(RUNS)]
    best = min(range(RUNS), key=lambda i: (round(runs[i][2], 9), i))
    left, right, error = runs[best]
    size = left.sum(0) * right.sum(1)
    order = np.argsort(-size, kind="stable")
    others = [_likeness(right, other) for i, (_, other, _) in enumerate(runs) if i != best]
    draws = np.random.default_rng(seed)
    shuffled = _factorised(draws.permuted(x, axis=0), n, seed)[2]
    weight = right / right.sum(1, keepdims=True).clip(1e-300)
    stability = np.mean(others, axis=0) if n > 1 else np.full(1, np.nan)
    ranked = [torch.from_numpy(np.ascontiguousarray(v[order])) for v in (weight, size / size.sum(), stability)]
    return Topics(ranked[0], ranked[1], ranked[2], error, shuffled)


def _factorised(x: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Both factors, and the relative error."""
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    settings: dict[str, Any] = {"n_components": n, "init": "random", "random_state": seed % 2**32, "max_iter": _STEPS}
    model: Any = NMF(beta_loss="frobenius", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        left = model.fit_transform(x)
    right = model.components_
    return left, right, float(np.linalg.norm(x - left @ right) / np.linalg.norm(x))


def _likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of every topic with its partner in another factorisation, each partner taken once."""
    from scipy.optimize import linear_sum_assignment

    first, second = (v / np.linalg.norm(v, axis=1, keepdims=True).clip(1e-300) for v in (one, other))
    cosine = first @ second.T
    rows, columns = linear_sum_assignment(-cosine)
    return cosine[rows, columns]
