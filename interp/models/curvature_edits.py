"""Weights cut down to the sharp directions of the loss, as edits; and the cuts that such an edit is to be compared with.

The curvature edit of Merullo et al. 2025 (arXiv 2510.24256, section 3): of every matrix only the part along the pairs of directions that
hold a share of the curvature is left, each matrix for itself, with factors of the unedited model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp import linalg
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models.curvature import (
    Eigen,
    Eigenbases,
    check_mass,
    coordinates,
    mask,
    restored,
    staircase,
    wanted_sites,
)
from interp.models.linear_maps import check_apart, check_one_model
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.editing import Editing
    from interp.models.factors import Factors

Control = Literal["complement", "top_removed", "random", "svd", "rectangular"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What an edit leaves of one matrix.

    Attributes:
        site: the matrix.
        pairs: share of the pairs of directions that is left; of its singular components for ``svd``.
        mass: share of the curvature along them; of the squared singular values for ``svd``.
        norm: ||W'|| / ||W||.
        delta: W' - W, in float32 (float64 for a float64 model).
    """

    site: Site
    pairs: float
    mass: float
    norm: float
    delta: Float[Tensor, "d_in d_out"]


def curvature_edit(
    model: Editing,
    factors: Factors,
    *,
    layers: int | Sequence[int],
    modules: str | Sequence[str],
    mass: float,
    control: Control | None = None,
    seed: int = 0,
    name: str = "",
) -> Edit:
    """Keep of matrices what lies along the sharpest pairs of directions, which hold a share of the curvature; or a control of that.

    The fewest pairs whose products of eigenvalues add up to ``mass`` of the total, the one that crosses it included; pairs that
    are exactly as sharp as the last one stay together with it. ``mass=1`` changes nothing. The edit is a projection, and W' mostly has
    full rank. Controls:

    * ``complement``: what the edit takes away stays, and nothing else.
    * ``top_removed``: the same mass, 1 - ``mass``, is taken away at the sharp end.
    * ``random``: as many pairs as the edit keeps, drawn at random.
    * ``svd``: the strongest singular components of W that hold ``mass`` of its squared norm; no data.
    * ``rectangular``: directions read and directions written are chosen apart, each ``mass`` of the eigenvalues of A and of G.

    Args:
        model: whose weights they are.
        factors: of this very model; weights of several layers are changed without collecting factors anew.
        layers: which layers.
        modules: which matrices, such as ``W_gate, W_in``.
        mass: share of the curvature to keep, in (0, 1].
        control: None for the edit itself.
        seed: of the random pairs.
        name: of the edit.

    Raises:
        InputError: no single model, factors of another one, a mass outside of (0, 1], layers or modules without factors (those with some
            are listed), or a matrix that is one tensor with that of another block.
    """
    return curvature_edits(model, factors, layers=layers, modules=modules, masses=(mass,), control=control, seed=seed, name=name)[0]


def curvature_edits(
    model: Editing,
    factors: Factors,
    *,
    layers: int | Sequence[int],
    modules: str | Sequence[str],
    masses: Sequence[float],
    control: Control | None = None,
    seed: int = 0,
    name: str = "",
) -> list[Edit]:
    """``curvature_edit`` for several masses, with one decomposition of every matrix."""
    cuts = curvature_cuts(model, factors, layers=layers, modules=modules, masses=masses, control=control, seed=seed)
    edits = []
    for mass, found in zip(masses, cuts, strict=True):
        what = "curvature" if control is None else f"curvature ({control})"
        title = name or f"{mass:g} of the {what} of {', '.join(str(c.site) for c in found)}"
        edits.append(Edit(tuple(WeightChange(c.site, c.delta) for c in found if bool(c.delta.any())), title))
    return edits


def curvature_cuts(
    model: Editing,
    factors: Factors,
    *,
    layers: int | Sequence[int],
    modules: str | Sequence[str],
    masses: Sequence[float],
    control: Control | None = None,
    seed: int = 0,
) -> list[list[Cut]]:
    """What ``curvature_edit`` makes of every matrix, with the numbers of pairs and the masses, [mass][matrix]."""
    check_one_model(model, "a curvature edit")
    if not isinstance(masses, Iterable):
        raise InputError(f"masses is a list, such as [0.9, 0.99], but {masses!r} came")
    for mass in masses:
        check_mass(mass)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"the seed of random pairs is a whole number, but {seed!r} came")
    if control is not None and control not in get_args(Control):
        raise InputError(f"control is {control!r}, expected None or one of {', '.join(get_args(Control))}")
    sites = wanted_sites(factors, layers, modules)
    factors.check(model)
    check_apart(model, sites)
    found: list[list[Cut]] = [[] for _ in masses]
    bases = Eigenbases(factors)
    for site in sites:
        e = bases[site]
        w = model.weight(site).detach().cpu()
        if w.shape != (len(e.mu), len(e.lam)):
            raise InputError(f"the factors of {site} are for a matrix of {len(e.mu)} x {len(e.lam)}, but it is {list(w.shape)}")
        make = _svd(w, site) if control == "svd" else _pairs(w, e, site, control, seed)
        for cuts, mass in zip(found, masses, strict=True):
            cuts.append(make(mass))
    return found


def _pairs(w: Tensor, e: Eigen, site: Site, control: Control | None, seed: int) -> Callable[[float], Cut]:
    """Cuts along pairs of directions."""
    c, size = coordinates(w, e), linalg.norm(w)

    def make(mass: float) -> Cut:
        left = chosen(e, mass, control, (seed, str(site)))
        if bool(left.all()):
            return _cut(site, w, 1.0, 1.0, 1.0, torch.zeros_like(c))
        gone = torch.where(left, 0.0, c)
        mass_left = linalg.ratio(float(e.mu @ left.double() @ e.lam), float(e.mu.sum() * e.lam.sum()))
        norm = linalg.ratio(linalg.norm(c - gone), size)
        return _cut(site, w, float(left.double().mean()), mass_left, norm, -restored(gone, e))

    return make


def chosen(e: Eigen, mass: float, control: Control | None = None, key: tuple[object, ...] = ()) -> Bool[Tensor, "d_in d_out"]:
    """The pairs that stay.

    Args:
        e: eigenvalues.
        mass: share of the curvature.
        control: which cut; ``svd`` has no pairs.
        key: of the stream that random pairs are drawn from.
    """
    rows = len(e.mu)
    if control == "top_removed":
        if mass == 1:
            return torch.ones(rows, len(e.lam), dtype=torch.bool)
        return ~mask(staircase(e.lam, e.mu, 1 - mass), rows)
    if control == "rectangular":
        one = torch.ones(1, dtype=torch.float64)
        read, written = (int(staircase(one, x, mass)) for x in (e.mu, e.lam))
        return (torch.arange(rows) < read)[:, None] & (torch.arange(len(e.lam)) < written)
    left = mask(staircase(e.lam, e.mu, mass), rows)
    if control == "complement":
        return ~left
    if control == "random":
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
        drawn = torch.randperm(left.numel(), generator=torch.Generator().manual_seed(seed))[: int(left.sum())]
        return torch.zeros(left.numel(), dtype=torch.bool).index_fill_(0, drawn, True).reshape(left.shape)
    return left


def _svd(w: Tensor, site: Site) -> Callable[[float], Cut]:
    """Cuts along singular components."""
    u, s, vh = linalg.svd(w.double())
    squares = s.square()
    sums = squares.cumsum(0)

    def make(mass: float) -> Cut:
        n = len(s) if mass == 1 else min(len(s), int((sums < mass * sums[-1]).sum()) + 1)
        delta = -(u[:, n:] * s[n:]) @ vh[n:]
        share = linalg.ratio(float(sums[n - 1]), float(sums[-1]))
        return _cut(site, w, n / len(s), share, share**0.5, delta)

    return make


def _cut(site: Site, w: Tensor, pairs: float, mass: float, norm: float, delta: Tensor) -> Cut:
    return Cut(site, pairs, mass, norm, delta.to(torch.float64 if w.dtype == torch.float64 else torch.float32))
