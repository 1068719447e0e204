"""Singular vectors of a tuned matrix that base's matrix does not have: "intruder dimensions" (Shuttleworth et al. 2024, arXiv 2410.21228).

Matrices act as ``x @ W``, so a component ``s_j u_j v_j^T`` reads from the stream along ``u_j`` (a row space of inputs) and writes ``v_j``.
The authors look at the left singular vectors of ``nn.Linear.weight``, which is [out, in]: those are the ``v_j`` here, the side that writes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import linalg
from interp.edits import WeightChange
from interp.errors import InputError
from interp.linalg import SVD
from interp.models import weights
from interp.models.changes import Change, changes
from interp.models.heads import upcast
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.checkpoint import Shape
    from interp.models.pair import ModelPair

SIDES = ("read", "write")
Side = Literal["write", "read", "both"]
Circuit = Literal["ov", "qk"]
CIRCUITS: tuple[Circuit, ...] = ("ov", "qk")
FACTORS: Mapping[Circuit, tuple[str, str]] = {"ov": ("W_V", "W_O"), "qk": ("W_Q", "W_K")}
OWN: Mapping[Circuit, str] = {"ov": "W_O", "qk": "W_Q"}
"""The factor that every query head has to itself."""

_WIDEST = 32  # components to either side, at 768 of them
_POWERS = 12  # of the iteration for matrices that are too large for a whole SVD: weights have flat spectra


@dataclass(frozen=True, eq=False)
class Settings:
    """How components are compared.

    Attributes:
        k: how many of tuned's strongest components.
        draws: random changes of the same norm.
        window: components to either side for ``inside``; None is a 24th of them, at most 32.
        exact: smaller side up to which tuned's SVD is a whole one, in float64.
        seed: of the random changes, and of the iteration beyond ``exact``.
    """

    k: int
    draws: int = 0
    window: int | None = None
    exact: int = 1024
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Overlap:
    """Where tuned's components lie among base's.

    Attributes:
        cosine: largest |cos| with any singular vector of base.
        match: which one that is.
        inside: norm of the part that lies in base's singular vectors of nearly the same place in the order.
    """

    cosine: Float[Tensor, "*batch component side"]
    match: Int[Tensor, "*batch component side"]
    inside: Float[Tensor, "*batch component side"]


@dataclass(frozen=True, eq=False)
class Compared:
    """Tuned's strongest components of one matrix, or of one circuit of every head of a layer (then with an axis for heads in front).

    Attributes:
        sigma: singular values of tuned.
        base_sigma: those of base, the same number.
        overlap: where tuned's components lie among base's.
        chance: ``cosine`` for base with a random change of the same norm.
        change: ||tuned - base|| / ||base||; of heads, of their two matrices together.
        delta_sigma: largest singular value of what tuning added.
        norm: ||tuned||.
        left: what components read; unit vectors, as columns.
        right: what components write; unit vectors, as rows.
        exact: whole SVDs.
        similar: |cos| of every component with base's first ones, on both sides.
    """

    sigma: Float[Tensor, "*batch component"]
    base_sigma: Float[Tensor, "*batch component"]
    overlap: Overlap
    chance: Float[Tensor, "draw *batch component side"]
    change: Float[Tensor, "*batch"]
    delta_sigma: Float[Tensor, "*batch"]
    norm: Float[Tensor, "*batch"]
    left: Float[Tensor, "*batch rows component"]
    right: Float[Tensor, "*batch component cols"]
    exact: bool
    similar: Float[Tensor, "*batch component base_component side"]


def intruders(cosine: Float[Tensor, "*cell side"], threshold: float, side: Side) -> Bool[Tensor, "*cell"]:
    """Which components are intruders: no singular vector of base has |cos| of ``threshold`` or more; ``both``: on neither side."""
    under = cosine < threshold
    return under.all(-1) if side == "both" else under[..., SIDES.index(side)]


def check(threshold: float, side: str) -> None:
    """Refuse what no intruder can be told by.

    Raises:
        InputError: a threshold outside of (0, 1], or an unknown side.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise InputError(f"threshold is {threshold!r}, expected a cosine above 0 and at most 1")
    if side not in ("read", "write", "both"):
        raise InputError(f"side is {side!r}, expected write, read or both")


def block_changes(pair: ModelPair, settings: Settings, desc: str = "intruders") -> Iterator[Change]:
    """The matrices of all blocks, as they are stored.

    Raises:
        InputError: an architecture whose weights are not known by site, or more components than the smallest matrix has.
    """
    shape = pair.shape
    if not weights.known(shape):
        raise InputError(f"the weights of {shape.architecture} are not known by site; known: {', '.join(sorted(weights.FAMILIES))}")
    ranks = {m: min(weights.weight_shape(m, shape)) for m in weights.modules(shape)}
    smallest = min(ranks, key=ranks.__getitem__)
    if isinstance(settings.k, bool) or not isinstance(settings.k, int) or not 1 <= settings.k <= ranks[smallest]:
        raise InputError(f"k is {settings.k!r}, expected 1 to {ranks[smallest]}: {smallest} of {pair.name} has that many singular vectors")
    names = frozenset(str(Site(m, layer)) for layer in range(shape.n_layers) for m in ranks)
    yield from changes(pair, desc=desc, only=names)


def narrow(pair: ModelPair) -> tuple[str, ...]:
    """Sentences for the reader where weights are stored in less than float32; with the side where it holds for one."""
    told = {side: upcast(model, "float32 or float64") for side, model in pair.sides()}
    said = [note for notes in told.values() for note in notes]
    both = len(set(said)) == 1 and len(said) == len(told)
    return (said[0],) if both else tuple(f"{side}: {note}" for side, notes in told.items() for note in notes)


def compared(change: Change, settings: Settings) -> Compared:
    """A matrix of tuned beside base's. One that tuning left alone has its own components, exactly."""
    base, size = change.base, linalg.norm(change.delta)
    whole = min(base.shape) <= settings.exact
    base, delta = (x.double() if whole else x for x in (base, change.delta))
    if not size:
        old = SVD(*linalg.svd(base))
        return _same(old, settings, whole)
    old, tuned = linalg.svd(base), base + delta
    new = _top(tuned, settings, whole)
    added = linalg.svd_of_product(*change.factors).S if change.factors is not None else _top(delta, settings, whole).S
    chance = [
        overlap(old, _top(base + _noise(base, size, (settings.seed, change.name, draw)), settings, whole), settings).cosine
        for draw in range(settings.draws)
    ]
    return Compared(
        new.S[: settings.k],
        old.S[: settings.k],
        overlap(old, new, settings),
        _stacked(chance, settings.k),
        torch.tensor(linalg.ratio(size, linalg.norm(base)), dtype=torch.float64),
        added[0],
        torch.tensor(linalg.norm(tuned), dtype=torch.float64),
        new.U[:, : settings.k],
        new.Vh[: settings.k],
        whole,
        _similar(old, new, settings),
    )


def compared_heads(parts: Mapping[str, Change], circuit: Circuit, settings: Settings, shape: Shape) -> Compared:
    """OV or QK of every query head of a layer, from the matrices as they are (norms not folded in), without forming their products.

    Base has as many singular vectors there as a head is wide; a direction outside of them is new.
    """
    first, second = (parts[name] for name in FACTORS[circuit])
    base = _factors(first, first.base, circuit, 0, shape), _factors(second, second.base, circuit, 1, shape)
    delta = _factors(first, first.delta, circuit, 0, shape), _factors(second, second.delta, circuit, 1, shape)
    tuned = base[0] + delta[0], base[1] + delta[1]
    old, new = linalg.svd_of_products(*base), linalg.svd_of_products(*tuned)
    k = min(settings.k, old.S.shape[-1])
    settings = replace(settings, k=k)
    # tuned - base = delta_0 tuned_1 + base_0 delta_1
    added = linalg.svd_of_products(torch.cat([delta[0], base[0]], -1), torch.cat([tuned[1], delta[1]], -2)).S[..., 0]
    sizes = [d.flatten(1).norm(dim=1) for d in delta]
    chance = []
    for draw in range(settings.draws):
        noisy = [
            b
            + torch.stack(
                [_noise(one, float(s), (settings.seed, c.name, circuit, h, draw)) for h, (one, s) in enumerate(zip(b, z, strict=True))]
            )
            for b, z, c in zip(base, sizes, (first, second), strict=True)
        ]
        chance.append(overlap(old, linalg.svd_of_products(*noisy), settings).cosine)
    found = overlap(old, new, settings)
    still = (sizes[0] == 0) & (sizes[1] == 0)
    was = _identity(settings, len(still))
    kept = Overlap(*(torch.where(still[:, None, None], a, b) for a, b in zip(_tuple(was), _tuple(found), strict=True)))
    ones = torch.ones(k, len(SIDES), dtype=torch.float64)
    all_ = [torch.where(still[:, None, None], ones, c) for c in chance]
    return Compared(
        torch.where(still[:, None], old.S[..., :k], new.S[..., :k]),
        old.S[..., :k],
        kept,
        _stacked(all_, len(still), k),
        (sizes[0].square() + sizes[1].square()).sqrt() / (_energy(base[0]) + _energy(base[1])).sqrt(),
        torch.where(still, 0.0, added),
        new.S.square().sum(-1).sqrt(),
        new.U[..., :k],
        new.Vh[..., :k, :],
        True,
        _similar(old, new, settings),
    )


def overlap(base: SVD, tuned: SVD, settings: Settings) -> Overlap:
    """Where tuned's first components lie among base's."""
    cosine = _cosines(base, tuned, settings.k)
    value, match = cosine.max(-2)
    rank = cosine.shape[-2]
    window = max(1, round(min(_WIDEST, rank / 24))) if settings.window is None else settings.window
    near = (torch.arange(settings.k)[:, None] - torch.arange(rank)).abs() <= window
    return Overlap(value.clamp(max=1), match, (cosine.square() * near[..., None]).sum(-2).sqrt().clamp(max=1))


def scaled_components(
    site: Site, left: Float[Tensor, "rows n"], sigma: Float[Tensor, " n"], right: Float[Tensor, "n cols"], strength: float
) -> WeightChange:
    """The change that makes components of a matrix ``strength`` times as strong: 0 removes them, 1 is no change."""
    return WeightChange(site, ((strength - 1) * left * sigma).float(), right.float())


def head_factors(
    of: Compared, change: Change, circuit: Circuit, flagged: Bool[Tensor, "head component"], shape: Shape
) -> dict[Site, tuple[Tensor, Tensor]]:
    """Of heads with intruders the matrix to change and factors, so that adding (g - 1) left @ right makes the intruders g times as strong.

    Exact: OV (I + (g - 1) v v^T) leaves all other components alone, and so does (I + (g - 1) u u^T) QK. Heads that share keys and
    values stay as they are, since only ``W_O`` (OV) or ``W_Q`` (QK) changes, which is the matrix ``change`` has to be of.
    """
    assert change.site is not None
    tuned = weights.heads(change.site, change.base.double() + change.delta.double(), shape)
    found = {}
    for head in flagged.any(-1).nonzero().flatten().tolist():
        chosen = flagged[head]
        left, right = of.left[head][:, chosen], of.right[head][chosen]
        factors = (tuned[head] @ right.T, right) if circuit == "ov" else (left, left.T @ tuned[head])
        found[Site(change.site.component, change.site.layer, head)] = factors[0].float(), factors[1].float()
    return found


def normal(shape: tuple[int, ...], *key: object) -> Tensor:
    """Standard normal float64 numbers from a stream of their own for each key."""
    seed = int.from_bytes(hashlib.sha256(repr(tuple(map(str, key))).encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _noise(like: Tensor, size: float, key: tuple[object, ...]) -> Tensor:
    if not size:
        return torch.zeros_like(like)
    draw = normal(tuple(like.shape), *key)
    return (draw * (size / float(draw.norm()))).to(like)


def _cosines(base: SVD, tuned: SVD, k: int) -> Float[Tensor, "*batch component base_component side"]:
    read, write = tuned.U[..., :k].mT @ base.U, tuned.Vh[..., :k, :] @ base.Vh.mT
    return torch.stack([read, write], -1).abs()


def _similar(base: SVD, tuned: SVD, settings: Settings) -> Tensor:
    return _cosines(base, tuned, settings.k)[..., : 4 * settings.k, :].clamp(max=1)


def _top(matrix: Tensor, settings: Settings, whole: bool) -> SVD:
    if whole:
        return linalg.svd(matrix)
    return linalg.svd_top(matrix, settings.k, seed=settings.seed, oversample=max(16, 3 * settings.k), powers=_POWERS)


def _same(base: SVD, settings: Settings, whole: bool) -> Compared:
    k = settings.k
    zero = torch.zeros((), dtype=torch.float64)
    chance = torch.ones(settings.draws, k, len(SIDES), dtype=torch.float64)
    size = torch.tensor(math.sqrt(float(base.S.double().square().sum())), dtype=torch.float64)
    own = _similar(base, base, settings)
    return Compared(base.S[:k], base.S[:k], _identity(settings), chance, zero, zero, size, base.U[:, :k], base.Vh[:k], whole, own)


def _identity(settings: Settings, *batch: int) -> Overlap:
    ones = torch.ones(*batch, settings.k, len(SIDES), dtype=torch.float64)
    own = torch.arange(settings.k)[:, None].expand(*batch, settings.k, len(SIDES))
    return Overlap(ones, own, ones)


def _tuple(x: Overlap) -> tuple[Tensor, Tensor, Tensor]:
    return x.cosine, x.match, x.inside


def _stacked(parts: list[Tensor], *shape: int) -> Tensor:
    return torch.stack(parts).double() if parts else torch.zeros(0, *shape, len(SIDES), dtype=torch.float64)


def _factors(change: Change, matrix: Tensor, circuit: Circuit, place: int, shape: Shape) -> Tensor:
    """[head d_model d_head] in the first place, [head d_head d_model] in the second, one for every query head."""
    assert change.site is not None
    apart = weights.heads(change.site, matrix.double(), shape)
    if change.site.component in ("W_K", "W_V"):
        apart = apart.repeat_interleave(shape.n_heads // shape.n_kv_heads, 0)
    return apart.mT if circuit == "qk" and place == 1 else apart


def _energy(matrices: Float[Tensor, "head rows cols"]) -> Float[Tensor, " head"]:
    return matrices.flatten(1).square().sum(1)
