"""What a matrix shows of directions that mean nothing: the null of ``|v Y|^2 / |Y|^2`` for a unit vector v drawn evenly in all directions.

The matrix counts only by its spectrum, ``read`` [.. rank]: squared singular values as shares of their sum, for it is all the same
whether v is turned or Y. A sender of several orthonormal directions that are turned together counts by the shares of its own, ``taken``.
The mean is ``1 / dims``, whatever the spectra.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 16  # draws at once; part of what a seed means
_STEP = 0.05  # between the places where an integrand is taken, in units of how far it reaches; errors fall exponentially with 1 / step


def shares(singular: Float[Tensor, "*matrix rank"]) -> Float[Tensor, "*matrix rank"]:
    """Squared singular values as shares of their sum; NaN for a zero matrix."""
    squares = singular.double().square()
    return squares / squares.sum(-1, keepdim=True)


def concentration(part: Float[Tensor, "*matrix rank"]) -> Float[Tensor, "*matrix"]:
    """Sum of the squares of shares: 1 for a single direction, 1/k for k equal ones."""
    return part.double().square().sum(-1)


def spread(taken: Float[Tensor, "*sender"], read: Float[Tensor, "*receiver"], dims: int) -> Tensor:
    """Standard deviation of ``sum_i taken_i |v_i Y|^2 / |Y|^2`` over random orthonormal v, exactly; [*sender *receiver], NaN for none.

    From the concentrations of both. For symmetric A and G, ``tr(O A O^T G)`` over all rotations O has the variance
    ``2 (tr A^2 - (tr A)^2 / n) (tr G^2 - (tr G)^2 / n) / ((n - 1) (n + 2))``.
    """
    a, b = ((x - 1 / dims).clamp_min(0) for x in (taken, read))
    sd = (2 / ((dims - 1) * (dims + 2)) * a[(...,) + (None,) * b.ndim] * b).sqrt()
    return torch.where(sd > 0, sd, torch.nan)


def overlaps(dims: int, rank: int, draws: int, seed: int) -> Iterator[Float[Tensor, "draw rank rank"]]:
    """Squared cosines of ``rank`` random orthonormal directions with ``rank`` fixed ones, some draws at a time."""
    source = torch.Generator().manual_seed(seed)
    for first in range(0, draws, _CHUNK):
        gauss = torch.randn(_CHUNK, dims, min(rank, dims), generator=source, dtype=torch.float64)[: draws - first]
        yield torch.linalg.qr(gauss).Q[:, :rank].mT.square()


def tail(value: Float[Tensor, " cell"], read: Float[Tensor, "cell rank"], dims: int) -> Float[Tensor, " cell"]:
    """How likely a random direction has ``|v Y|^2 / |Y|^2`` of at least ``value``, computed and not drawn.

    Exact to about 1e-7 of itself far out, to 1e-4 where it is more likely than not.

    With v = x / |x| for a Gaussian x the question is P(sum_j (read_j - value) x_j^2 > 0).
    """
    c = value.double()[:, None]
    read = read.double()[:, :dims]
    weight = torch.cat([read, torch.zeros(len(read), 1, dtype=torch.float64)], 1) - c
    times = torch.ones(weight.shape[1], dtype=torch.float64)
    times[-1] = max(dims - read.shape[1], 0)
    # Nothing reaches beyond the largest share, everything reaches 0.
    found = torch.where(read.max(1).values <= value, 0.0, 1.0).double().where(~(weight * times).isnan().any(1), torch.nan)
    inside = (value > 0) & (value < read.max(1).values)
    if bool(inside.any()):
        w = weight[inside]
        upper = (w * times).sum(1, keepdim=True) > 0  # more likely than not: the rest is computed
        p = _positive(torch.where(upper, -w, w), times)
        found[inside] = torch.where(upper[:, 0], 1 - p, p)
    return found


def _positive(weight: Float[Tensor, "cell term"], times: Float[Tensor, " term"]) -> Float[Tensor, " cell"]:
    """P(sum_j weight_j * chi^2 with times_j degrees of freedom > 0), at most about 1/2, where weights have both signs.

    The transform ``exp(phi(s))``, phi(s) = -1/2 sum_j times_j log(1 - 2 s weight_j) - log s, is inverted along a parabola that leaves the
    saddle on the real axis in the direction of steepest descent, so that nothing oscillates or cancels (Daniels 1954).
    """
    w = weight / weight.max(1, keepdim=True).values  # the question does not depend on the scale
    low, high = torch.zeros(len(w), 1, dtype=torch.float64), torch.full((len(w), 1), 0.5, dtype=torch.float64)
    for _ in range(60):  # where phi' changes its sign
        at = (low + high) / 2
        rising = (times * w / (1 - 2 * at * w)).sum(1, keepdim=True) > 1 / at
        low, high = torch.where(rising, low, at), torch.where(rising, at, high)
    at = low
    ratio = w / (1 - 2 * at * w)
    second = (2 * times * ratio.square()).sum(1, keepdim=True) + at**-2
    third = (8 * times * ratio**3).sum(1, keepdim=True) - 2 * at**-3
    bend = (third / (6 * second)).clamp_min(0)
    # The scales along the way may lie far apart; steps that grow reach all of them.
    u = torch.arange(0, 8, _STEP, dtype=torch.float64)
    t = u.sinh() * second.rsqrt()
    s = torch.complex(at + bend * t.square(), t)
    phi = -s.log()
    for j in range(w.shape[1]):
        phi -= 0.5 * times[j] * (1 - 2 * s * w[:, j, None]).log()
    steps = second.rsqrt() * u.cosh() * _STEP
    steps[:, 0] /= 2
    return ((phi.exp() * torch.complex(torch.ones_like(t), -2 * bend * t)).real * steps).sum(1) / math.pi


def critical(level: float, read: Float[Tensor, "cell rank"], dims: int) -> Float[Tensor, " cell"]:
    """The ``|v Y|^2 / |Y|^2`` that a random direction reaches with a probability of at most ``level``, to a millionth of its largest."""
    high = read.double().max(1).values
    low = torch.zeros_like(high)
    for _ in range(20):
        middle = (low + high) / 2
        above = tail(middle, read, dims) > level
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high
