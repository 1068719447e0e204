"""The loss's curvature by pairs of directions: spectra of K-FAC factors, and which pairs hold the most of it.

For a matrix W [in, out], acting as ``x @ W``, the curvature is approximated by A (second moment of what it reads) and G (second moment
of the loss's gradient by what it writes). With ``A = U_A diag(mu) U_A^T`` and ``G = U_G diag(lam) U_G^T`` the pair (i, j) of a direction
read and one written has curvature ``mu_i lam_j``, and the weight's part along it is ``C_ij``, with ``C = U_A^T W U_G``
(Merullo et al. 2025, arXiv 2510.24256). Eigenvalues are sorted, largest first, so that the pairs above any threshold are a staircase:
of the direction written j, the first ``counts[j]`` directions read. Everything is in float64, and no [in, out] table of products is made.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import linalg
from interp.errors import InputError
from interp.models import weights
from interp.models.factors import Factors
from interp.models.linear_maps import listed
from interp.sites import Site

_BLOCK = 2**22  # coordinates held at a time


class Eigen(NamedTuple):
    """Eigenvalues, largest first and not negative, and eigenvectors as columns in the same order."""

    lam: Float[Tensor, " d_out"]
    U_G: Float[Tensor, "d_out d_out"]
    mu: Float[Tensor, " d_in"]
    U_A: Float[Tensor, "d_in d_in"]


def eigen(factors: Factors, site: Site | str) -> Eigen:
    """Eigenvalues and eigenvectors of a matrix's factors; what rounding made negative is 0."""
    return Eigenbases(factors)[Site.parse(site)]


class Eigenbases:
    """``eigen`` of several matrices, one at a time; neighbours that read the same input share its decomposition."""

    def __init__(self, factors: Factors) -> None:
        """Nothing is read yet."""
        self.factors = factors
        self._last: tuple[Site, Tensor, Tensor] | None = None

    def __getitem__(self, site: Site) -> Eigen:
        """Of one matrix."""
        shared = self.factors.shares(site)
        if self._last is None or self._last[0] != shared:
            self._last = None  # let go of it before the next one is made
            self._last = (shared, *_decomposed(self.factors.A(site)))
        return Eigen(*_decomposed(self.factors.G(site)), *self._last[1:])


def _decomposed(moment: Float[Tensor, "d d"]) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0).clamp(min=0), vectors.flip(1)


# ---- which pairs


def staircase(lam: Float[Tensor, " d_out"], mu: Float[Tensor, " d_in"], mass: float) -> Int[Tensor, " d_out"]:
    """The fewest pairs, sharpest first, that hold a share of the curvature: of each ``lam`` its first so many ``mu``.

    The pair that crosses the share is in, with all pairs that are exactly as sharp. A share of 1 is every pair, flat ones too.

    Args:
        lam: eigenvalues of G, descending.
        mu: eigenvalues of A, descending.
        mass: the share, in (0, 1].

    Raises:
        InputError: a share outside of (0, 1], or no curvature at all.
    """
    check_mass(mass)
    lam, mu = lam.double(), mu.double()
    if mass == 1:
        return torch.full((len(lam),), len(mu), dtype=torch.long)
    sums = _sums(mu)
    total = float((lam * sums[-1]).sum())
    if not total > 0:
        raise InputError("the factors are zero: no direction has any curvature, so no pairs hold a share of it")
    return _sharpest(lam, mu, lambda counts: float((lam * sums[counts]).sum()) >= mass * total)


def sharpest(lam: Float[Tensor, " d_out"], mu: Float[Tensor, " d_in"], share: float) -> Int[Tensor, " d_out"]:
    """The sharpest pairs that are a share of all pairs, as ``staircase`` gives them; those as sharp as the last one are in."""
    check_mass(share, "share of the pairs")
    wanted = share * len(lam) * len(mu) * (1 - 1e-12)
    return _sharpest(lam.double(), mu.double(), lambda counts: int(counts.sum()) >= wanted)


def _sharpest(lam: Tensor, mu: Tensor, enough: Callable[[Tensor], bool]) -> Int[Tensor, " d_out"]:
    """Pairs at or above the highest threshold that lets in enough of them.

    Positive floating-point numbers are in the order of their bits, so halving the bits ends at the very product of the last pair, in at
    most 62 steps: the same pairs as those of a full sort. It is found earlier where a single pair is left between the two ends.
    """
    ascending = mu.flip(0).contiguous()
    low, high = 0, _bits(float(lam[0] * mu[0])) + 1  # at 0 everything is in, above the largest product nothing is
    found, few = torch.full((len(lam),), len(mu)), 0
    while high - low > 1 and int(found.sum()) - few > 1:
        middle = (low + high) // 2
        counts = _above(lam, mu, ascending, _number(middle))
        if enough(counts):
            low, found = middle, counts
        else:
            high, few = middle, int(counts.sum())
    return found


_SLACK = 8 * torch.finfo(torch.float64).eps
_LEAST = 1e-290  # under it quotients are not exact to a few places


def _above(lam: Tensor, mu: Tensor, ascending: Tensor, threshold: float) -> Int[Tensor, " d_out"]:
    """Of each ``lam``, how many ``mu`` have a product, as it is rounded, of at least the threshold.

    Quotients say so but for a few roundings; between the two ends these leave, mostly one and the same, products are looked at.
    """
    n = len(mu)
    if threshold < _LEAST:
        least, most = torch.zeros_like(lam, dtype=torch.long), torch.full_like(lam, n, dtype=torch.long)
    else:
        least, most = (n - torch.searchsorted(ascending, threshold / lam * (1 + slack)) for slack in (_SLACK, -_SLACK))
    while bool((unsure := least < most).any()):
        middle = (least + most + 1) // 2
        good = lam * mu[(middle - 1).clamp(min=0)] >= threshold
        least, most = torch.where(unsure & good, middle, least), torch.where(unsure & ~good, middle - 1, most)
    return least


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def _sums(mu: Tensor) -> Float[Tensor, " d_in_and_none"]:
    return torch.cat([torch.zeros(1, dtype=torch.float64), mu.cumsum(0)])


def check_mass(mass: float, what: str = "mass") -> None:
    """Refuse what is no share.

    Raises:
        InputError: it is not in (0, 1].
    """
    if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 < mass <= 1:
        raise InputError(f"{what} is {mass!r}, expected a share above 0 and at most 1")


def mass_of(lam: Float[Tensor, " d_out"], mu: Float[Tensor, " d_in"], counts: Int[Tensor, " d_out"]) -> float:
    """Share of the curvature that pairs hold; 0 of none."""
    sums = _sums(mu.double())
    return linalg.ratio(float((lam.double() * sums[counts]).sum()), float((lam.double() * sums[-1]).sum()))


def mask(counts: Int[Tensor, " d_out"], rows: int) -> Bool[Tensor, "d_in d_out"]:
    """The pairs as a table."""
    return torch.arange(rows)[:, None] < counts


def threshold(lam: Float[Tensor, " d_out"], mu: Float[Tensor, " d_in"], share: float) -> float:
    """Curvature of the pair at a share of the list of pairs, sharpest first: a quantile of ``lam_j mu_i``."""
    counts = sharpest(lam, mu, share)
    return float((lam.double() * mu.double()[(counts - 1).clamp(min=0)])[counts > 0].min())


# ---- weights in the eigenbasis


def coordinates(w: Float[Tensor, "d_in d_out"], e: Eigen) -> Float[Tensor, "d_in d_out"]:
    """A matrix in the eigenbasis, ``C = U_A^T W U_G``."""
    return e.U_A.T @ w.double() @ e.U_G


def restored(c: Float[Tensor, "d_in d_out"], e: Eigen) -> Float[Tensor, "d_in d_out"]:
    """The matrix with these coordinates."""
    return e.U_A @ c @ e.U_G.T


def kept(w: Float[Tensor, "d_in d_out"], e: Eigen, mass: float) -> Float[Tensor, "d_in d_out"]:
    """What is left of a matrix along the sharpest pairs that hold a share of the curvature; float64."""
    if mass == 1:
        return w.double()
    return restored(coordinates(w, e) * mask(staircase(e.lam, e.mu, mass), len(e.mu)), e)


class Along(NamedTuple):
    """A change of a matrix in the eigenbasis.

    Attributes:
        energy: squared norm within each band of pairs.
        curvature: sum over pairs of ``mu_i lam_j C_ij^2``, which is delta^T (G kron A) delta.
    """

    energy: Float[Tensor, " band"]
    curvature: float


def along(change: Tensor | tuple[Tensor, Tensor], e: Eigen, cuts: Sequence[Int[Tensor, " d_out"]]) -> Along:
    """Where a change of a matrix lies among the pairs.

    Args:
        change: [in, out], or its factors ([in, rank], [rank, out]), which are not multiplied out.
        e: the eigenbasis.
        cuts: nested staircases, smallest first; band 0 is the first, band b what the next one adds.
    """
    left, right = change if isinstance(change, tuple) else (change, None)
    p = e.U_A.T @ left.double()
    q = e.U_G if right is None else right.double() @ e.U_G
    energy, curvature = torch.zeros(len(cuts), dtype=torch.float64), 0.0
    rows = max(1, _BLOCK // len(e.lam))
    for start in range(0, len(p), rows):
        squares = (p[start : start + rows] @ q).square_()
        curvature += float(e.mu[start : start + rows] @ (squares @ e.lam))
        place = torch.arange(start, start + len(squares))[:, None]
        before: Tensor | None = None
        for b, counts in enumerate(cuts):
            here = place < counts
            energy[b] += float(squares[here if before is None else here & ~before].sum())
            before = here
    return Along(energy, curvature)


def predicted(curvature: float) -> float:
    """Change of the mean loss per predicted position that the curvature gives a change of weights: half of its quadratic form.

    A and G are means over positions, with g the gradient of the summed loss of all positions. Over the T predicted positions of a text
    the Fisher matrix is then T times ``A kron G``, when different positions, and what is read and the gradient, are taken as
    independent; a T-th of half its quadratic form has no T in it. With labels drawn from the model itself this is the second order of
    the mean KL(before || after), which has no first order; the loss on given text has one, the gradient, which is left out here.
    """
    return curvature / 2


class Isotropic(NamedTuple):
    """What a random change has, every direction alike: expectation and standard deviation."""

    mean: Tensor
    sd: Tensor


def random_shares(sizes: Sequence[int]) -> Isotropic:
    """Shares of the squared norm of a random change in sets of pairs of these sizes, which are all pairs: exact, of a Beta law."""
    k = torch.tensor(sizes, dtype=torch.float64)
    n = k.sum()
    return Isotropic(k / n, (2 * k * (n - k) / (n.square() * (n + 2))).sqrt())


def random_sharpness(e: Eigen) -> Isotropic:
    """Of delta^T (G kron A) delta / ||delta||^2 for a random change: exact."""
    n = len(e.lam) * len(e.mu)
    mean = e.lam.mean() * e.mu.mean()
    square = e.lam.square().mean() * e.mu.square().mean()
    return Isotropic(mean, (2 * (square - mean.square()).clamp(min=0) / (n + 2)).sqrt())


class Table(NamedTuple):
    """What the spread of a random change needs of a non-negative table M [read, written]: sums, and how large it is.

    Attributes:
        total: sum of M.
        rows: sum of the squares of M's row sums.
        columns: of its column sums.
        squares: of its entries.
        sizes: (rows, columns).
    """

    total: float
    rows: float
    columns: float
    squares: float
    sizes: tuple[int, int]


def rotated(table: Table, concentration: float) -> Isotropic:
    """Of sum_ij M_ij delta_ij^2 / ||delta||^2 for a change with given singular values, turned at random on both sides: exact.

    A change of low rank spreads over fewer directions, so chance takes it further from the mean than one of full rank. With
    delta = sum_k s_k u_k v_k^T, u and v Haar-distributed and orthonormal, moments of order four on the sphere give the variance; signs
    of u_k make all mixed terms 0 but those of one pair (k, l) with itself.

    Args:
        table: of M; ``M_ij = mu_i lam_j`` gives the curvature, a mask of 0 and 1 the share in a band.
        concentration: sum of s_k^4 over the square of the sum of s_k^2: 1 for rank 1, 1 / r for r equal singular values.
    """
    (d, e), p = table.sizes, concentration

    def summed(same: float, other: float, same_e: float, other_e: float) -> float:
        """Sum over two entries of M, of a factor for equal or different rows times one for equal or different columns."""
        a, b = same - other, same_e - other_e
        return other * other_e * table.total**2 + a * other_e * table.rows + other * b * table.columns + a * b * table.squares

    def moments(n: int) -> tuple[float, float, float, float, float, float]:
        """E of u_i^4, u_i^2 u_j^2; of u_i^2 w_i^2, u_i^2 w_j^2; of u_i w_i u_i w_i, u_i w_i u_j w_j, for u, w orthonormal."""
        whole, rest = 1 / (n * (n + 2)), 1 / (n * max(n - 1, 1) * (n + 2))
        return 3 * whole, whole, whole, (n + 1) * rest, whole, -rest

    x, y = moments(d), moments(e)
    mean = table.total / (d * e)
    alone = summed(x[0], x[1], y[0], y[1]) - mean**2
    apart = (summed(x[2], x[3], y[2], y[3]) - mean**2 + 2 * summed(x[4], x[5], y[4], y[5])) if p < 1 else 0.0
    variance = max(0.0, p * alone + (1 - p) * apart)
    return Isotropic(torch.tensor(mean, dtype=torch.float64), torch.tensor(math.sqrt(variance), dtype=torch.float64))


def products(e: Eigen) -> Table:
    """The table of all products of eigenvalues, without making it."""
    mu, lam = e.mu.double(), e.lam.double()
    sums, squares = (float(mu.sum()), float(lam.sum())), (float(mu.square().sum()), float(lam.square().sum()))
    return Table(sums[0] * sums[1], squares[0] * sums[1] ** 2, sums[0] ** 2 * squares[1], squares[0] * squares[1], (len(mu), len(lam)))


def band(inner: Tensor, outer: Tensor, height: int) -> Table:
    """The mask of the pairs that one cut has and a sharper one lacks, both as counts of rows by column."""
    columns = (outer - inner).double()
    rows = _longer(outer, height) - _longer(inner, height)
    n = float(columns.sum())
    return Table(n, float(rows.double().square().sum()), float(columns.square().sum()), n, (height, len(columns)))


def _longer(counts: Tensor, height: int) -> Tensor:
    """How many columns reach beyond row 0, 1, ..., [row]."""
    return len(counts) - torch.bincount(counts.long(), minlength=height + 1).cumsum(0)[:height]


# ---- tables


def grid(names: Sequence[str], values: Sequence[float] | Tensor) -> tuple[Tensor, tuple[int, ...], tuple[str, ...]]:
    """One number per weight as [layer module], with the layers and the modules; NaN where there is no such weight."""
    sites = [Site.parse(name) for name in names]
    layers = tuple(sorted({site.layer for site in sites if site.layer is not None}))
    modules = tuple(m for m in weights.MODULES if any(site.component == m for site in sites))
    cells = torch.full((len(layers), len(modules)), math.nan, dtype=torch.float64)
    for site, value in zip(sites, values, strict=True):
        if site.layer is not None and site.component in modules:
            cells[layers.index(site.layer), modules.index(site.component)] = float(value)
    return cells, layers, modules


def wanted_sites(factors: Factors, layers: int | Sequence[int] | None = None, modules: str | Sequence[str] | None = None) -> list[Site]:
    """Sites of factors in the layers and modules asked for, layer by layer; None is all that have factors.

    Raises:
        InputError: no factors, or a layer or a module without them; those that have some are listed.
    """
    if not isinstance(factors, Factors):
        raise InputError(f"factors are what kfac_factors returns or Factors.open(folder) opens, but {factors!r} came")
    have = [site for site in factors.sites if site.layer is not None]
    known = {"layers": sorted({int(s.layer) for s in have if s.layer is not None}), "modules": _ordered({s.component for s in have})}
    asked = {
        "layers": known["layers"] if layers is None else listed(layers, "layers"),
        "modules": known["modules"] if modules is None else listed(modules, "modules"),
    }
    for what, values in asked.items():
        if not values:
            raise InputError(f"no {what} were given; there are factors of the {what} {', '.join(map(str, known[what]))}")
        for value in values:
            if isinstance(value, bool) or value not in known[what]:
                raise InputError(f"there are no factors of {what[:-1]} {value!r}; there are some of {', '.join(map(str, known[what]))}")
    found = [site for layer in sorted(set(asked["layers"])) for m in _ordered(set(asked["modules"])) if (site := Site(m, layer)) in have]
    if not found:
        raise InputError(f"none of the matrices asked for has factors; there are some of {', '.join(map(str, have))}")
    return found


def _ordered(modules: set[str]) -> list[str]:
    return [m for m in weights.MODULES if m in modules] + sorted(modules - set(weights.MODULES))
