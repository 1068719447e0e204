"""How far a change of its weights turned what a head reads and writes, and how far a random change of the same size would."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import linalg
from interp.linalg import SVD
from interp.models.heads import FoldedHeads, HeadCircuit

LIVE = 1e-6
"""A component is there when its strength is more than this share of the strongest one's; float32 rounding of weights makes smaller ones."""

MATCHED = 8
"""So many of the random changes have their components matched too, which is dear; only the mean of their cosines is told."""


def live(strength: Float[Tensor, "head rank"]) -> Int[Tensor, " head"]:
    """How many components each head has; 0 for a head whose matrix is zero."""
    return ((strength > LIVE * strength[:, :1]) & (strength > 0)).sum(-1)


@dataclass(frozen=True, eq=False)
class Turned:
    """One layer's heads before and after a change.

    Attributes:
        read: principal angles between the subspaces that the strongest components read, in radians, smallest first.
            NaN beyond the number of components that both sides have.
        write: the same for what they write.
        read_turn: share of the changed head's strength (squared, of its strongest components) that reads outside the subspace that the
            strongest components read before: 0 the same, 1 orthogonal. NaN for a head whose matrix has become zero.
        write_turn: the same for what it writes.
        matched: of each of the strongest components after the change, the one before that fits it best.
        cosine: of the two, |cos of what they read| * |cos of what they write|; NaN for a component of strength 0.
    """

    read: Float[Tensor, "head component"]
    write: Float[Tensor, "head component"]
    read_turn: Float[Tensor, " head"]
    write_turn: Float[Tensor, " head"]
    matched: Int[Tensor, "head component"]
    cosine: Float[Tensor, "head component"]


def turned(before: SVD, after: SVD, rank: int) -> Turned:
    """What a change did to the ``rank`` strongest components of every head."""
    there = torch.minimum(live(before.S), live(after.S)).clamp(max=rank)
    read = _angles(before.U, after.U, there, rank)
    write = _angles(before.Vh.mT, after.Vh.mT, there, rank)
    reading = _outside(before.U, after.U, before.S, after.S, rank)
    writing = _outside(before.Vh.mT, after.Vh.mT, before.S, after.S, rank)
    return Turned(read, write, reading, writing, *_matched(before, after, rank))


def _angles(a: Float[Tensor, "head d_model rank"], b: Float[Tensor, "head d_model rank"], there: Tensor, rank: int) -> Tensor:
    """Principal angles between the first columns of each head's bases, as many as are there."""
    found = a.new_full((len(a), rank), torch.nan)
    for size in there.unique().tolist():
        heads = there == size
        if size:
            found[heads, :size] = linalg.principal_angles(a[heads, :, :size], b[heads, :, :size])
    return found


def _outside(a: Tensor, b: Tensor, before: Tensor, after: Tensor, rank: int) -> Float[Tensor, " head"]:
    """Share of the squared strengths ``after`` whose directions b [head d_model rank] leave the span of the first columns of a."""
    a, b, energy = a[..., :rank], b[..., :rank], after[:, :rank].square()
    there = a * (torch.arange(rank) < live(before)[:, None])[:, None]
    rest = (b - there @ (there.mT @ b)).square().sum(1)
    return torch.where((a == b).all(-1).all(-1), 0.0, (energy * rest).sum(-1) / energy.sum(-1))


def _matched(before: SVD, after: SVD, rank: int) -> tuple[Tensor, Tensor]:
    """Of each strong component after, its partner before and their cosine: the pairing of all components with the largest sum."""
    from scipy.optimize import linear_sum_assignment

    fits = (after.U.mT @ before.U).abs() * (after.Vh @ before.Vh.mT).abs()
    same = (after.U == before.U).all(1)[..., None] & (after.Vh == before.Vh).all(2)[..., None]
    fits = torch.where(same & torch.eye(fits.shape[-1], dtype=torch.bool), 1.0, fits.clamp(max=1))
    matched = torch.stack([torch.from_numpy(linear_sum_assignment(head.numpy(), maximize=True)[1]) for head in fits])[:, :rank]
    cosine = fits[:, :rank].gather(-1, matched[..., None])[..., 0]
    absent = torch.arange(rank) >= live(after.S)[:, None]
    return matched, cosine.masked_fill(absent, torch.nan)


_FACTORS = {"ov": ("W_V", "W_O"), "qk": ("W_Q", "W_K")}


def shaken(before: FoldedHeads, after: FoldedHeads, circuit: HeadCircuit, *, centred: bool, seed: int, draw: int) -> FoldedHeads:
    """``before`` with a random change of both factors in place of that to ``after``, of the same norm in each head's factor.

    The change is Gaussian in the weights as checkpoints have them, and is then folded as these are: the norm's gain stretches it, and
    where norms subtract the mean it has none. A key/value head's change is that of all heads that share it.
    """
    factors = {}
    for name in _FACTORS[circuit]:
        old, new = getattr(before, name), getattr(after, name)
        noise = torch.randn(old.shape, generator=_stream(seed, draw, before.layer, name), dtype=torch.float64).to(old)
        if name != "W_O":
            noise *= before.gain[:, None]
        if centred:
            noise -= noise.mean(2 if name == "W_O" else 1, keepdim=True)
        size = share(*(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (new - old, noise)))
        factors[name] = old + size * noise
    return replace(before, **factors)


def _stream(*key: object) -> torch.Generator:
    """Random numbers of their own for each key."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1)


def comparison(
    before: FoldedHeads,
    after: FoldedHeads,
    old: SVD,
    new: SVD,
    circuit: HeadCircuit,
    rank: int,
    *,
    centred: bool,
    seed: int,
    draws: int,
) -> dict[str, Tensor]:
    """What a change did to one layer's heads, beside what as many random changes of its size do as ``draws`` says.

    Args:
        before: the heads.
        after: the changed heads.
        old: components of ``before``.
        new: components of ``after``.
        circuit: of which matrix.
        rank: how many of the strongest components are compared.
        centred: the norms subtract the mean.
        seed: of the random changes.
        draws: how many of them.

    Returns:
        ``change``: ||after - before|| / ||before|| [head]; the fields of ``Turned``, with the angles as ``read_angles`` and
        ``write_angles`` and the cosine as ``match_cosine``; of the random changes ``noise_read_turn``, ``noise_write_turn`` and
        ``noise_spectral_change`` [draw head] and, of the first ``MATCHED``, ``noise_match_cosine`` [draw head component].
    """
    ours, fits = turned(old, new, rank), []
    reading, writing, strengths = [], [], []
    for i in range(draws):
        noisy = shaken(before, after, circuit, centred=centred, seed=seed, draw=i).components(circuit)
        reading.append(_outside(old.U, noisy.U, old.S, noisy.S, rank))
        writing.append(_outside(old.Vh.mT, noisy.Vh.mT, old.S, noisy.S, rank))
        strengths.append(spectral_change(old.S, noisy.S))
        if i < MATCHED:
            fits.append(_matched(old, noisy, rank)[1])
    return {
        "change": share(linalg.product_change(*before.factors(circuit), *after.factors(circuit)), old.S.norm(dim=-1)),
        "read_angles": ours.read,
        "write_angles": ours.write,
        "read_turn": ours.read_turn,
        "write_turn": ours.write_turn,
        "matched": ours.matched,
        "match_cosine": ours.cosine,
        "noise_read_turn": torch.stack(reading),
        "noise_write_turn": torch.stack(writing),
        "noise_match_cosine": torch.stack(fits),
        "noise_spectral_change": torch.stack(strengths),
    }


def spectral_change(before: Float[Tensor, "*head rank"], after: Float[Tensor, "*head rank"]) -> Float[Tensor, "*head"]:
    """Length of the change of the strengths, as a share of their length."""
    return share((after - before).norm(dim=-1), before.norm(dim=-1))


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole, with 0 / 0 = 0."""
    return torch.where(part == 0, 0.0, part / whole)


def random_components(like: FoldedHeads, circuit: HeadCircuit, *, centred: bool, seed: int, draw: int) -> SVD:
    """The components of a head of the same sizes whose factors are Gaussian noise; axis 0 has one entry."""
    names = _FACTORS[circuit]
    zero = replace(like, gain=torch.ones_like(like.gain), **{name: torch.zeros_like(getattr(like, name)) for name in names})
    ones = replace(like, **{name: torch.ones_like(getattr(like, name)) for name in names})
    left, right = shaken(zero, ones, circuit, centred=centred, seed=seed, draw=draw).factors(circuit)
    return linalg.svd_of_products(left[:1], right[:1])
