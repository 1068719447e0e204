"""Pure linear algebra on weights: spectra, ranks, subspaces, and what rounding alone does.

Matrices are [rows, cols]; norms are taken in float64 whatever the dtype; singular values come strongest first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_FORMATS = {torch.float64: (52, -1022), torch.float32: (23, -126), torch.bfloat16: (7, -126), torch.float16: (10, -14)}
# Mantissa bits and smallest normal exponent.


class SVD(NamedTuple):
    """Factors with ``matrix = U @ diag(S) @ Vh``; only the strongest components where a rank was asked for."""

    U: Float[Tensor, "*batch rows rank"]
    S: Float[Tensor, "*batch rank"]
    Vh: Float[Tensor, "*batch rank cols"]


def norm(x: Tensor) -> float:
    """Frobenius norm in float64, without a float64 copy."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def relative_norm(delta: Tensor, reference: Tensor) -> float:
    """||delta|| / ||reference|| (Frobenius); 0 for 0 / 0."""
    return ratio(norm(delta), norm(reference))


def ratio(a: float, b: float) -> float:
    """A / b, with 0 / 0 = 0 and a / 0 = inf."""
    return a / b if b else (math.inf if a else 0.0)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors as vectors; 1 for two zero tensors, 0 if only one is zero."""
    aa, bb = dot(a, a), dot(b, b)
    if not aa or not bb:
        return float(aa == bb)
    return float(torch.tensor(dot(a, b) / math.sqrt(aa * bb), dtype=torch.float64).clamp(-1, 1))  # keeps NaN


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors, summed in float64 by blocks."""
    x, y = a.reshape(-1), b.reshape(-1)
    return float(sum(float(p.double() @ q.double()) for p, q in zip(x.split(2**22), y.split(2**22), strict=True)))


def kurtosis(x: Tensor) -> float:
    """Fourth standardised moment; 3 for a Gaussian, large when few entries carry the change; NaN for a constant."""
    n, flat = x.numel(), x.reshape(-1)
    mean = sum(float(p.double().sum()) for p in flat.split(2**22)) / n
    second = fourth = 0.0
    for part in flat.split(2**22):
        square = (part.double() - mean).square_()
        second += float(square.sum())
        fourth += float(square.square_().sum())
    return n * fourth / second**2 if second else math.nan


# ---- spectra


def svd_of_product(left: Float[Tensor, "rows rank"], right: Float[Tensor, "rank cols"]) -> SVD:
    """SVD of ``left @ right`` without forming it: QR of both factors, SVD of the [rank, rank] core. Float64."""
    if left.shape[1] > min(left.shape[0], right.shape[1]):
        return SVD(*torch.linalg.svd(left.double() @ right.double(), full_matrices=False))
    q, r = torch.linalg.qr(left.double())
    p, t = torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(r @ t.T)
    return SVD(q @ u, s, vh @ p.T)


def svd_of_products(left: Float[Tensor, "*#batch rows rank"], right: Float[Tensor, "*#batch rank cols"]) -> SVD:
    """``svd_of_product`` of many pairs of factors at once, in their own dtype: U [.. rows rank], S [.. rank], Vh [.. rank cols].

    Errors are of the order of eps * ||left|| * ||right||, however ill-conditioned the factors are. A factor that pairs share may have
    an axis of size 1, and is then taken apart once.
    """
    q, r = torch.linalg.qr(left)
    p, t = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r @ t.mT, full_matrices=False)
    return SVD(q @ u, s, vh @ p.mT)


def signed(factors: SVD) -> SVD:
    """The same product with signs that are unique: the largest entry of each row of ``Vh`` is positive."""
    at = factors.Vh.abs().argmax(-1, keepdim=True)
    sign = torch.where(factors.Vh.gather(-1, at) < 0, -1.0, 1.0).to(factors.Vh)
    return SVD(factors.U * sign.mT, factors.S, factors.Vh * sign)


def singular_values(matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, " rank"]:
    """All singular values, from the eigenvalues of the smaller Gram matrix in float64; exact to about 1e-8 of the largest.

    Two to four times faster than an SVD of a wide float32 matrix, and more accurate.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=matrix.device)
    for block in wide.split(4096, dim=1):
        columns = block.double()
        gram.addmm_(columns, columns.T)
    return torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_().flip(0)


def svd(matrix: Float[Tensor, "rows cols"]) -> SVD:
    """Exact thin SVD."""
    return SVD(*torch.linalg.svd(matrix, full_matrices=False))


def svd_top(matrix: Float[Tensor, "rows cols"], rank: int, *, seed: int = 0, oversample: int = 16, powers: int = 4) -> SVD:
    """The strongest ``rank`` components by randomised subspace iteration (Halko, Martinsson, Tropp 2011, arXiv:0909.4061, alg. 4.4).

    Costs ``2 (powers + 1)`` products with [cols, rank + oversample]. Exact when rank + oversample reaches the smaller side.
    Singular values are never over-estimated; where the spectrum is flat around ``rank`` the last ones fall short.
    """
    width = min(rank + oversample, *matrix.shape)
    if width == min(matrix.shape):
        return SVD(*(t[..., :rank, :] if i == 2 else t[..., :rank] for i, t in enumerate(svd(matrix))))
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed)).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(powers):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return SVD((basis @ u)[:, :rank], s[:rank], vh[:rank])


def stable_rank(s: Float[Tensor, " rank"], energy: float | None = None) -> float:
    """||A||_F^2 / ||A||_2^2, between 1 and the rank; 0 for a zero matrix.

    Args:
        s: singular values, strongest first; the first is enough when ``energy`` is given.
        energy: ||A||_F^2, if ``s`` is not the whole spectrum.
    """
    s = s.double()
    top = float(s[0]) ** 2 if s.numel() else 0.0
    return ratio(float(s.square().sum()) if energy is None else energy, top)


def effective_rank(s: Float[Tensor, " rank"]) -> float:
    """Exponential of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007); 0 for a zero matrix."""
    s = s.double()
    total = float(s.sum())
    if not total:
        return 0.0
    p = s[s > 0] / total
    return math.exp(-float((p * p.log()).sum()))


def rank_for_energy(s: Float[Tensor, " rank"], share: float = 0.9, energy: float | None = None) -> int | None:
    """Fewest components that hold ``share`` of the squared norm; 0 for a zero matrix; None if ``s`` is cut off before."""
    squares = s.double().square()
    total = float(squares.sum()) if energy is None else energy
    if not total:
        return 0
    enough = torch.nonzero(squares.cumsum(0) >= share * total * (1 - 1e-12))
    return int(enough[0]) + 1 if len(enough) else None


def numerical_rank(s: Float[Tensor, " rank"], size: tuple[int, int], dtype: torch.dtype = torch.float32, noise: float = 0.0) -> int:
    """Number of singular values above max(size) * eps(dtype) * s[0] and above a spectral norm of noise."""
    if not s.numel() or not float(s[0]):
        return 0
    return int((s.double() > max(max(size) * torch.finfo(dtype).eps * float(s[0]), noise)).sum())


def energy_inside(delta: Float[Tensor, "rows cols"], basis: Float[Tensor, "rows rank"]) -> float:
    """Share of ||delta||^2 inside the column space of an orthonormal basis; NaN for a zero delta. Chance is rank / rows."""
    total = norm(delta) ** 2
    return norm(basis.T @ delta) ** 2 / total if total else math.nan


# ---- subspaces


def principal_angles(a: Float[Tensor, "*batch rows rank"], b: Float[Tensor, "*batch rows rank"]) -> Float[Tensor, "*batch rank"]:
    """Angles between the column spaces of orthonormal bases, in radians, smallest first; exactly 0 for equal bases.

    Small angles come from their sines and large ones from their cosines (Knyazev & Argentati 2002), each where it is exact.
    """
    shared = a.mT @ b
    cos = torch.linalg.svdvals(shared).clamp(max=1)
    sin = torch.linalg.svdvals(b - a @ shared).clamp(max=1).flip(-1)
    angles = torch.where(cos.square() > 0.5, sin.asin(), cos.acos())
    return torch.where((a == b).all(-1).all(-1, keepdim=True), 0.0, angles)


def subspace_overlap(angles: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch"]:
    """Mean squared cosine of principal angles: 1 for the same subspace, rank / rows for random ones; NaN angles are left out."""
    return angles.cos().square().nanmean(-1)


def product_change(left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor) -> Float[Tensor, "*batch"]:
    """||new_left @ new_right - left @ right|| (Frobenius) from the factors' changes, without forming the products; exactly 0 for none."""
    d, e = new_left - left, new_right - right
    both = (d.mT @ left) * (new_right @ e.mT)  # <d new_right, left e>, entry by entry of [rank, rank]
    squares = (d.mT @ d) * (new_right @ new_right.mT) + 2 * both + (left.mT @ left) * (e @ e.mT)
    return squares.sum((-2, -1)).clamp(min=0).sqrt()


# ---- similarity of representations


@dataclass(frozen=True, eq=False)
class KernelSums:
    """What the unbiased HSIC of two linear kernels needs of the tokens beside ``X^T Y``; sums of parts of the tokens add up to it.

    Attributes:
        n: tokens.
        x: sum of the rows of X.
        y: the same of Y.
        x_weighted: sum of x |y|^2.
        y_weighted: sum of y |x|^2.
        squares: sums of |x|^2, of |y|^2 and of |x|^2 |y|^2.
    """

    n: int
    x: Float[Tensor, " d_x"]
    y: Float[Tensor, " d_y"]
    x_weighted: Float[Tensor, " d_x"]
    y_weighted: Float[Tensor, " d_y"]
    squares: Float[Tensor, "3"]

    @classmethod
    def of(cls, x: Float[Tensor, "token d_x"], y: Float[Tensor, "token d_y"]) -> KernelSums:
        """Of some tokens."""
        a, b = x.square().sum(1), y.square().sum(1)
        return cls(len(x), x.sum(0), y.sum(0), b @ x, a @ y, torch.stack([a.sum(), b.sum(), a @ b]))

    def __add__(self, other: KernelSums) -> KernelSums:
        """Of these tokens and those."""
        names = ("n", "x", "y", "x_weighted", "y_weighted", "squares")
        return KernelSums(*(getattr(self, name) + getattr(other, name) for name in names))


def unbiased_hsic(cross: Float[Tensor, "d_x d_y"], sums: KernelSums) -> float:
    """Unbiased HSIC of two linear kernels (Song et al. 2012, eq. 5) from sums over the tokens; NaN for fewer than four.

    With K and L the kernels without their diagonals it is
    ``(tr K L + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1) / (n (n-3))``, and each of these follows from ``X^T Y`` and the sums.

    Args:
        cross: ``X^T Y``, of rows that need not be centred.
        sums: of the same tokens.
    """
    n, (a, b, ab) = sums.n, sums.squares
    if n < 4:
        return math.nan
    product = cross.square().sum() - ab
    ends = (sums.x.square().sum() - a) * (sums.y.square().sum() - b)
    rows = sums.x @ cross @ sums.y - sums.x @ sums.x_weighted - sums.y @ sums.y_weighted + ab
    return float((product + ends / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3)))


def cka(x: Float[Tensor, "token d_x"], y: Float[Tensor, "token d_y"], *, unbiased: bool = True) -> float:
    """Linear CKA of two representations of the same tokens (Kornblith et al. 2019): 1 for a rotated or scaled copy.

    The biased form is near 1 for independent data of fewer tokens than dimensions; the unbiased one is 0 there on average, and may be
    negative. NaN where one side does not vary, or for fewer than four tokens (unbiased).
    """
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)  # changes neither, and loses fewer digits
    pairs = ((x, y), (x, x), (y, y))
    both, one, other = (unbiased_hsic(p.T @ q, KernelSums.of(p, q)) if unbiased else float((p.T @ q).square().sum()) for p, q in pairs)
    return aligned(both, one, other)


def aligned(both: float, one: float, other: float) -> float:
    """``both / sqrt(one other)``; NaN where one of these is not positive."""
    return both / math.sqrt(one * other) if one > 0 and other > 0 else math.nan


# ---- rounding


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of a dtype's numbers at |x|, in float64; subnormal spacing near 0."""
    bits, lowest = _FORMATS[dtype]
    exponent = torch.frexp(x.detach().double()).exponent - 1
    exponent = torch.where(x == 0, lowest, exponent).clamp(min=lowest)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - bits)


def rounding_norm(x: Tensor, dtype: torch.dtype) -> float:
    """Frobenius norm that rounding x to a dtype is expected to change it by: errors uniform within half a spacing, ulp / sqrt(12)."""
    bits, lowest = _FORMATS[dtype]
    # The spacing depends on the exponent only, so counting exponents is enough; float32 keeps it in bits 23 to 30.
    exponents = x.detach().float().reshape(-1).view(torch.int32).bitwise_and(0x7FFFFFFF).bitwise_right_shift(23)
    counts = torch.bincount(exponents, minlength=256).double()
    spacing = torch.arange(256, device=x.device).sub(127).clamp(min=lowest).sub(bits).double().exp2()
    return math.sqrt(float((counts * spacing.square()).sum()) / 12)


def rounding_floor(x: Tensor, dtype: torch.dtype) -> float:
    """Expected relative Frobenius error of storing x in a dtype; about 1.7e-3 for bfloat16, 2.1e-4 for float16; inf for zeros."""
    return ratio(rounding_norm(x, dtype), norm(x))


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype with fewer mantissa bits."""
    return min(a, b, key=lambda d: _FORMATS.get(d, (0, 0))[0])
