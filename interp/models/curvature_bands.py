"""How strongly inputs of a matrix lie along sharp and along flat directions (the bands of Merullo et al. 2025, arXiv 2510.24256)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.curvature import Eigen, coordinates, mask, sharpest
from interp.models.interventions import StopForward
from interp.models.linear_maps import Linear, linear_maps, plain_copy

if TYPE_CHECKING:
    from interp.models.hooked import HookedModel
    from interp.sites import Site

READINGS = ("read", "through")
"""``read``: mean |x . v| over the band's pairs, v being the pair's direction read, so that one in many pairs counts many times.
``through``: |x C_b|, what the matrix's part within the band makes of x."""

_CHUNK = 2**22  # coordinates held at a time


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs at chosen positions.

    Attributes:
        batch: the texts.
        read: at which positions inputs are read.
    """

    batch: Batch
    read: Bool[Tensor, "prompt pos"]

    @property
    def owners(self) -> Int[Tensor, " token"]:
        """The prompt of every position that is read."""
        return self.read.nonzero()[:, 0]


class Reader:
    """Inputs of matrices; those that several read are taken once."""

    def __init__(self, model: HookedModel, sites: Sequence[Site]) -> None:
        """Find the modules that hold the matrices."""
        self.model, self.plain = model, plain_copy(model)
        self.maps = linear_maps(self.plain, sites, model.shape)

    def inputs(self, share: str, rows: Rows) -> Float[Tensor, "token d_in"]:
        """What the matrices read that share an input, at the chosen positions, prompt by prompt."""
        (m,) = (m for m in self.maps if m.share == share and m.records)
        found: dict[int, Tensor] = {}
        for part, got in self.model.each(rows.batch, self.model._bytes_per_token(), lambda part: self._pass(part, m)):
            for row, x in zip(part.rows.tolist(), got, strict=True):
                found[row] = x[rows.read[row, : x.shape[0]].to(x.device)].cpu()
        return torch.cat([found[row] for row in sorted(found)])

    def _pass(self, part: Any, m: Linear) -> Tensor:
        batch = part.batch.to(self.model.device)
        got: list[Tensor] = []

        def read(_: Any, args: tuple[Tensor, ...]) -> None:
            got.append(args[0].detach())
            raise StopForward

        inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False} | (
            {"attention_mask": batch.mask.long()} if batch.padded else {}
        )
        handle = m.module.register_forward_pre_hook(read)
        try:
            with torch.no_grad():
                self.plain(**inputs)
        except StopForward:
            pass
        finally:
            handle.remove()
        return got[0].reshape(*batch.ids.shape, -1)

    def shares(self) -> Mapping[str, list[Site]]:
        """Name of an input -> the matrices that read it."""
        found: dict[str, list[Site]] = {}
        for m in self.maps:
            found.setdefault(m.share, []).extend(m.outputs)
        return found


def bands(e: Eigen, ends: Sequence[float]) -> list[Int[Tensor, " d_out"]]:
    """Nested staircases: the sharpest pairs up to each share of the list of all pairs."""
    return [sharpest(e.lam, e.mu, end) for end in ends]


def strengths(
    x: Float[Tensor, "token d_in"], w: Float[Tensor, "d_in d_out"], e: Eigen, cuts: Sequence[Int[Tensor, " d_out"]]
) -> Float[Tensor, "reading band token"]:
    """How strongly inputs lie in bands of pairs, by both readings; NaN for a band without pairs.

    Args:
        x: inputs of the matrix.
        w: the matrix.
        e: its eigenbasis.
        cuts: nested staircases; band b is what is in the b-th and not in the one before.
    """
    rows, c = len(e.mu), coordinates(w, e)
    inside: list[Tensor] = []
    for b, counts in enumerate(cuts):
        here = mask(counts, rows)
        inside.append(here if b == 0 else here & ~mask(cuts[b - 1], rows))
    pairs = torch.stack([m.sum(1) for m in inside]).double()  # [band d_in]: how often a direction read is in a band
    out = torch.zeros(len(READINGS), len(cuts), len(x), dtype=torch.float64)
    step = max(1, _CHUNK // max(w.shape))
    for start in range(0, len(x), step):
        v = x[start : start + step].double() @ e.U_A
        here = slice(start, start + len(v))
        out[0, :, here] = (v.abs() @ (pairs / pairs.sum(1, keepdim=True)).T).T
        for b, m in enumerate(inside):
            out[1, b, here] = (v @ torch.where(m, c, 0.0)).norm(dim=1)
    out[1, pairs.sum(1) == 0] = torch.nan
    return out


def per_prompt(values: Float[Tensor, "*axis token"], rows: Rows) -> Float[Tensor, "*axis prompt"]:
    """Sums over the positions of every prompt."""
    return values.new_zeros(*values.shape[:-1], len(rows.batch)).index_add_(-1, rows.owners.cpu(), values)


def continued(batch: Batch, endings: Sequence[Sequence[int]] | None, first: int = 0) -> Rows:
    """Which positions to read: those that predict a given ending, or, without endings, all that have a next token.

    Args:
        batch: prompts.
        endings: token ids that are put behind each prompt; the positions that predict them are read.
        first: without endings, leave out so many positions at the start.

    Raises:
        InputError: nothing is left to read of some prompt.
    """
    if endings is None:
        places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        read = batch.mask & (places < batch.lengths[:, None] - 1) & (places >= first)
        whole = batch
    else:
        starts = batch.lengths.tolist()
        whole = Batch.of([[*row, *end] for row, end in zip(batch.rows(), endings, strict=True)])
        places = torch.arange(whole.ids.shape[1])
        begin = torch.tensor(starts)[:, None] - 1
        read = (places >= begin) & (places < whole.lengths[:, None] - 1)
    if not bool(read.any(1).all()):
        row = int((~read.any(1)).int().argmax())
        raise InputError(f"prompt {row} has {int(whole.lengths[row])} tokens and no position to read: a next token is needed")
    return Rows(whole, read)


def thinned(rows: Rows, n: int, seed: int) -> Rows:
    """At most ``n`` of the positions, drawn without replacement, at least one of every prompt."""
    places = rows.read.nonzero()
    if len(places) <= n:
        return rows
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    owners = places[order, 0]
    seen: set[int] = set()
    firsts = [i for i, owner in enumerate(owners.tolist()) if owner not in seen and not seen.add(owner)]
    rest = sorted(set(range(len(order))) - set(firsts))
    taken = order[torch.tensor([*firsts, *rest][: max(n, len(firsts))])]
    read = torch.zeros_like(rows.read)
    read[tuple(places[taken].T)] = True
    return replace(rows, read=read)
