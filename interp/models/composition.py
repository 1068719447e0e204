"""How well later heads read what earlier ones write, from weights alone: composition scores of heads and of their SVD components.

With X = OV of the sender and Y what the receiver does with the stream (QK for its queries, QK^T for its keys, OV for its values),
``CS = |X Y|_F / (|X|_F |Y|_F)``, and for component i of X, which writes along the unit vector v_i, ``CS_i = |v_i Y| / |Y|_F``
(Elhage et al. 2021; Merullo, Eickhoff & Pavlick 2024, arXiv 2406.09519). The whole is made of its parts:
``CS^2 = sum_i s_i^2 CS_i^2 / sum_i s_i^2``. No d_model x d_model matrix is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.directions import overlaps, shares
from interp.errors import InputError
from interp.models import weights
from interp.models.checkpoint import Shape
from interp.models.heads import FoldedHeads, folded_heads
from interp.models.hooked import HookedModel
from interp.progress import progress
from interp.sites import Heads

Composing = Literal["q", "k", "v"]
Head = tuple[int, int]

CLOSE = 1e-3
"""Singular values closer than this share of the largest leave their components open: any basis of their span would do."""


@dataclass(frozen=True, eq=False)
class Composed:
    """The scores of one model; NaN where a receiver is not later than a sender, or a component has no strength.

    Attributes:
        score: of whole matrices.
        p: how often it is as high with the sender's directions turned at random.
        component: of single components.
        place: among the components of all earlier heads, asked for or not, 1 for the strongest in this receiver; 0 where there is no score.
        rivals: how many components that is.
        strength: singular values of the senders' OV.
        reads: squared singular values of what receivers read with, as shares of their sum.
        write: what components write, unit vectors.
    """

    score: Float[Tensor, "sender receiver"]
    p: Float[Tensor, "sender receiver"]
    component: Float[Tensor, "sender rank receiver"]
    place: Int[Tensor, "sender rank receiver"]
    rivals: Int[Tensor, " receiver"]
    strength: Float[Tensor, "sender rank"]
    reads: Float[Tensor, "receiver rank"]
    write: Float[Tensor, "sender rank d_model"]


def readers(heads: FoldedHeads, kind: Composing) -> Float[Tensor, "head d_model rank"]:
    """A narrow matrix M for every query head with ``|x @ M| = |x @ Y|`` for whatever x.

    Y = left @ right, and behind orthonormal rows that span right's no length changes, so that M = left @ R^T with right^T = Q R.
    """
    left, right = heads.factors("ov" if kind == "v" else "qk")
    if kind == "k":
        left, right = right.mT, left.mT
    return left @ torch.linalg.qr(right.mT).R.mT


def component_scores(write: Float[Tensor, "*sender d_model"], readers: Float[Tensor, "head d_model rank"]) -> Float[Tensor, "*sender head"]:
    """``|v Y| / |Y|_F`` of unit vectors; NaN where a reader is zero."""
    read = (write @ readers.movedim(0, 1).flatten(1)).unflatten(-1, (readers.shape[0], -1))
    return read.norm(dim=-1) / readers.norm(dim=(-2, -1))


def whole_scores(component: Float[Tensor, "*sender rank head"], strength: Float[Tensor, "*sender rank"]) -> Float[Tensor, "*sender head"]:
    """Scores of whole matrices from those of their components; NaN where a sender is zero."""
    return (shares(strength)[..., None] * component.square()).sum(-2).sqrt()


def alive(strength: Float[Tensor, "*sender rank"], width: int) -> Bool[Tensor, "*sender rank"]:
    """Components with a singular value above rounding; of others not even the direction means anything."""
    return strength > width * torch.finfo(strength.dtype).eps * strength[..., :1]


def spans(strength: Float[Tensor, "*sender rank"]) -> Int[Tensor, "*sender rank"]:
    """The first component of the run of nearly equal singular values that a component is in; itself where it stands alone."""
    near = strength[..., :-1] - strength[..., 1:] <= CLOSE * strength[..., :1]
    index = torch.arange(strength.shape[-1]).expand(strength.shape)
    begins = torch.cat([torch.ones_like(near[..., :1]), ~near], -1)
    return torch.where(begins, index, 0).cummax(-1).values


def merged(
    score: Float[Tensor, "sender rank receiver"], place: Int[Tensor, "sender rank receiver"], strength: Float[Tensor, "sender rank"]
) -> tuple[Float[Tensor, "sender rank receiver"], Int[Tensor, "sender rank receiver"], Int[Tensor, "sender rank receiver"]]:
    """Scores of spans, at their first components and NaN elsewhere: root mean square, the best place, and how many components they have.

    The root mean square over a span does not depend on the basis that the SVD happened to take.
    """
    there = ~score.isnan()
    where = spans(strength)[..., None].expand(score.shape)
    total = torch.zeros_like(score, dtype=torch.float64).scatter_add_(1, where, score.double().square().nan_to_num(0.0))
    number = torch.zeros_like(where).scatter_add_(1, where, there.long())
    best = torch.full_like(place, 2**30).scatter_reduce_(1, where, place.where(there, 2**30), "amin")
    return torch.where(number > 0, total / number, torch.nan).sqrt(), best, number


def ends(shape: Shape, senders: str | Heads | None, receivers: str | Heads | None) -> tuple[list[Head], list[Head]]:
    """The heads asked for, in the order of the layers, each with somebody to talk to; None is all that have.

    Raises:
        InputError: no such head, a position, or a head that can talk to nobody.
    """
    if shape.n_layers < 2:
        raise InputError("composition needs a model of two layers or more, and this one has 1")
    sending, reading = _asked("senders", senders, shape), _asked("receivers", receivers, shape)
    first, last = min(sending)[0], max(reading)[0]
    if senders is None:
        sending, first = [head for head in sending if head[0] < last], 0
    if receivers is None:
        reading = [head for head in reading if head[0] > first]
        last = shape.n_layers - 1
    for layer, head in reading:
        if layer <= first:
            raise InputError(f"the receiver L{layer}H{head} is not in a later layer than any sender; it reads nothing that they write")
    for layer, head in sending:
        if layer >= last:
            raise InputError(f"the sender L{layer}H{head} is in no earlier layer than any receiver; nobody reads what it writes")
    return sending, reading


def _asked(what: str, heads: str | Heads | None, shape: Shape) -> list[Head]:
    if heads is None:
        return [(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
    found = []
    for group in Heads.parse(heads):
        if group.position is not None:
            raise InputError(f"{what} of composition are of weights and have no position, but {group} names {group.position}")
        for layer, head in group.heads:
            if layer >= shape.n_layers or head >= shape.n_heads:
                size = f"{shape.n_layers} layers of {shape.n_heads} heads"
                raise InputError(f"{what}: L{layer}H{head} does not exist; the model has {size}, from 0")
            found.append((layer, head))
    return sorted(set(found))


def composed(
    model: HookedModel, kind: Composing, senders: Sequence[Head], receivers: Sequence[Head], *, draws: int = 1000, seed: int = 0
) -> Composed:
    """All scores of some senders in some receivers.

    Goes through the layers once and holds the matrices of one of them, besides what earlier heads write.

    Raises:
        InputError: an architecture whose weights are not known by site.
    """
    shape = model.shape
    dims, n = directions(model), min(shape.d_head, shape.d_model)
    squares = list(overlaps(dims, n, draws, seed))
    size = (len(senders), n, len(receivers))
    component, place = torch.full(size, torch.nan, dtype=torch.float64), torch.zeros(size, dtype=torch.int32)
    score, p = torch.full((2, *size[::2]), torch.nan, dtype=torch.float64)
    reads, rivals = torch.zeros(size[2], n, dtype=torch.float64), torch.zeros(size[2], dtype=torch.int32)
    write: list[Tensor] = []
    strength: list[Tensor] = []
    last = max((layer for layer, _ in (*senders, *receivers)), default=-1)
    for layer in progress(range(last + 1), f"{kind} composition", total=last + 1, unit="layer"):
        heads = folded_heads(model, layer)
        columns = [j for j, (at, _) in enumerate(receivers) if at == layer]
        if columns and layer:
            read = readers(heads, kind)[[receivers[j][1] for j in columns]]
            power = torch.linalg.eigvalsh(read.mT @ read).flip(-1).clamp_min(0)
            reads[columns] = power / power.sum(-1, keepdim=True)
            found, s = torch.cat([component_scores(w, read) for w in write]), torch.cat(strength)
            known = torch.where(alive(s, dims)[..., None], found, torch.nan)
            order, rivals[columns] = _places(known)
            for i, (at, head) in enumerate(senders):
                if at < layer:
                    row = at * shape.n_heads + head
                    component[i, :, columns], place[i, :, columns] = known[row], order[row]
                    score[i, columns] = whole_scores(found[row], s[row])
            rows = [i for i, (at, _) in enumerate(senders) if at < layer]
            taken = shares(s[[senders[i][0] * shape.n_heads + senders[i][1] for i in rows]])
            cells = torch.tensor(rows)[:, None], torch.tensor(columns)
            p[cells] = _permuted(score[cells], taken, reads[columns], squares)
        if layer < last:
            parts = heads.components("ov")
            write.append(parts.Vh)
            strength.append(parts.S)
    rows = [layer * shape.n_heads + head for layer, head in senders]
    return Composed(score, p, component, place, rivals, torch.cat(strength)[rows], reads, torch.cat(write)[rows])


def directions(model: HookedModel) -> int:
    """Dimensions of the stream that heads can tell apart; one fewer where norms subtract the mean."""
    return model.shape.d_model - int(weights.centred(model.shape))


def _places(score: Float[Tensor, "sender rank head"]) -> tuple[Int[Tensor, "sender rank head"], Int[Tensor, " head"]]:
    """1 + how many components have more in a receiver, 0 for those without a score; how many have one."""
    flat = score.flatten(0, 1).mT.contiguous()
    there = ~flat.isnan()
    values = flat.nan_to_num(-1.0)
    above = values.shape[1] - torch.searchsorted(values.sort(-1).values, values, right=True)
    return torch.where(there, above + 1, 0).mT.reshape(score.shape).int(), there.sum(-1).int()


def _permuted(score: Tensor, taken: Tensor, read: Tensor, squares: Sequence[Tensor]) -> Float[Tensor, "sender receiver"]:
    """How often a whole matrix scores as high with its directions turned at random, itself counted in."""
    count, total = torch.ones_like(score), 1
    for some in squares:
        drawn = (taken[:, : some.shape[1]] @ some) @ read[:, : some.shape[2]].mT
        count += (drawn >= score.square()).sum(0)
        total += len(some)
    return torch.where(score.isnan(), torch.nan, count / total)


def matched(base: Composed, tuned: Composed) -> tuple[Int[Tensor, "sender rank"], Float[Tensor, "sender rank"]]:
    """For every component of base the one of tuned that writes most alike, no two the same; and the cosine of the two, signs aside."""
    from scipy.optimize import linear_sum_assignment

    found, close = torch.zeros(base.strength.shape, dtype=torch.int64), torch.zeros_like(base.strength)
    width = base.write.shape[-1]
    for i, (a, b) in enumerate(zip(base.write, tuned.write, strict=True)):
        there = alive(base.strength[i], width)[:, None] & alive(tuned.strength[i], width)
        cosine = torch.where(there, (a @ b.mT).abs(), 0.0)
        found[i] = torch.from_numpy(linear_sum_assignment(cosine.numpy(), maximize=True)[1])
        close[i] = torch.where(there, cosine, torch.nan).gather(1, found[i][:, None])[:, 0].clamp_max(1)
    return found, close
