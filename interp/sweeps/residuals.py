"""Residual streams of two models on the same tokens, a few prompts at a time: sums by place in the text, and what rounding does to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.linalg import cka
from interp.progress import progress
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.batch import Batch
    from interp.models.hooked import HookedModel
    from interp.models.pair import ModelPair

ALL, BEHIND, START = "all", "after token 0", "token 0"
MEASURES = ("relative", "centred_cosine", "cka")
"""What the floor is given of: a relative norm, and how far the other two are from 1."""

_FLOOR_PROMPTS, _FLOOR_TOKENS = 4, 1024
STILL = 64.0
"""Roundings within which tokens count as all the same."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where tokens stand in their texts.

    Attributes:
        part: of each token, an index into ``parts``; -1 at padding.
        parts: places that no two share: ``token 0``, ``first 10``, ``later``, and where prompts name them ``prompt`` and ``template``.
        names: of the places looked at: the parts, and unions of them.
        members: which parts each place is made of.
    """

    part: Int[Tensor, "prompt pos"]
    parts: tuple[str, ...]
    names: tuple[str, ...]
    members: Bool[Tensor, "place part"]

    @classmethod
    def of(cls, batch: Batch, first: int) -> Places:
        """The places of prompts; only those that have tokens.

        Args:
            batch: a position ``response`` says where the response starts, ``template`` which tokens are template.
            first: how many tokens, from the response or the text on, count as the first; the very first of the text stands alone.
        """
        names = [START, f"first {first}", "later", "prompt", "template"]
        part = torch.full(tuple(batch.ids.shape), -1, dtype=torch.long)
        start = batch.at("response") if "response" in batch.positions else [(0,)] * len(batch)
        template = batch.at("template") if "template" in batch.positions else [()] * len(batch)
        for row, n in enumerate(batch.lengths.tolist()):
            since = torch.arange(n) - min(start[row], default=0)
            part[row, :n] = torch.where(since < 0, 3, torch.where(since < first, 1, 2))
            part[row, list(template[row])] = 4
            part[row, 0] = 0
        there = [i for i in range(len(names)) if bool((part == i).any())]
        part = torch.where(part < 0, part, torch.tensor([there.index(i) if i in there else -1 for i in range(len(names))])[part])
        parts = tuple(names[i] for i in there)
        own = torch.eye(len(parts), dtype=torch.bool)
        unions = [(ALL, [True] * len(parts)), (BEHIND, [name != START for name in parts])]
        unions = [(name, members) for name, members in unions if sum(members) > 1]
        members = torch.cat([torch.tensor([m for _, m in unions], dtype=torch.bool).reshape(-1, len(parts)), own])
        return cls(part, parts, (*(name for name, _ in unions), *parts), members)

    @property
    def behind(self) -> str:
        """The place of everything but the very first tokens; these where there is nothing else."""
        return BEHIND if BEHIND in self.names else next((name for name in self.parts if name != START), START)

    def joined(self, by_part: Tensor, axis: int) -> Tensor:
        """Sums by part put together to sums by place."""
        return (by_part.movedim(axis, -1) @ self.members.to(by_part).T).movedim(-1, axis)


@dataclass(frozen=True, eq=False)
class Tokens:
    """The real tokens of some prompts.

    Attributes:
        rows: the prompt of each.
        part: its part of the text.
        read: per site the streams of base and tuned, [token d_model] in float64.
    """

    rows: Int[Tensor, " token"]
    part: Int[Tensor, " token"]
    read: dict[Site, tuple[Tensor, Tensor]]

    def streams(self, site: Site) -> tuple[Tensor, Tensor]:
        """Base's and tuned's, in float64."""
        a, b = self.read[site]
        return a.double(), b.to(a.device).double()


def stream_sites(n_layers: int) -> list[Site]:
    """What enters the first block, and what leaves each."""
    return [Site("resid_pre", 0), *(Site("resid_post", layer) for layer in range(n_layers))]


def tokens_of(pair: ModelPair, batch: Batch, sites: Sequence[Site], places: Places) -> Iterator[Tokens]:
    """Both models' streams, as many prompts at a time as fit the memory.

    Raises:
        InputError: a stream that is not finite.
    """
    shape = pair.base.shape
    per_token = (8 * shape.d_model + 2 * shape.d_mlp + 4 * len(sites) * shape.d_model) * 4
    sides = (("base", pair.base), ("tuned", pair.tuned))
    for part, got in pair.base.each(batch, per_token, lambda part: [model.read(part, sites) for _, model in sides]):
        mask = part.batch.mask.cpu()
        where = mask.nonzero(as_tuple=True)
        rows = part.rows[where[0]]
        read: dict[Site, tuple[Tensor, Tensor]] = {}
        for site in sites:
            both = [_home(one[site])[mask.to(_home(one[site]).device)] for one in got]
            for (side, model), x in zip(sides, both, strict=True):
                if not bool(x.isfinite().all()):
                    raise InputError(
                        f"{site} of {side} ({model.name}) is not finite in one of the prompts {sorted(set(rows.tolist()))[:5]}; "
                        f"{str(model.dtype).removeprefix('torch.')} may be too narrow for it, float32 or bfloat16 are wider"
                    )
            read[site] = (both[0], both[1])
        yield Tokens(rows, places.part[rows, where[1]], read)


def _home(x: Tensor) -> Tensor:
    """Where float64 is known."""
    return x.cpu() if x.device.type == "mps" else x


# ---- sums


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over tokens by place, in float64.

    Attributes:
        tokens: how many.
        relative: of |tuned - base| / |base|.
        cosine: of the cosine of base and tuned.
        base: of base's stream, by weights of the prompts.
        difference: of tuned's stream less base's.
        squares: of every dimension's square, of both models.
        energy: of |tuned - base|^2.
    """

    tokens: Int[Tensor, "place prompt"]
    relative: Float[Tensor, "site place prompt"]
    cosine: Float[Tensor, "site place prompt"]
    base: Float[Tensor, "weight site place d_model"]
    difference: Float[Tensor, "weight site place d_model"]
    squares: Float[Tensor, "side site place d_model"]
    energy: Float[Tensor, "site place"]


def totals(pair: ModelPair, batch: Batch, sites: Sequence[Site], places: Places, weights: Float[Tensor, "weight prompt"]) -> Totals:
    """One run of the prompts through both models.

    Args:
        pair: the models.
        batch: the prompts.
        sites: of the stream.
        places: where tokens stand.
        weights: of the prompts, for each of several sums of whole vectors; the first is for all of them, with 1.
    """
    n, k, d = len(sites), len(places.parts), pair.base.shape.d_model
    wide: dict[str, Any] = dict(dtype=torch.float64)
    relative, cosine = (torch.zeros(n, k, len(batch), **wide) for _ in range(2))
    base, difference = (torch.zeros(len(weights), n, k, d, **wide) for _ in range(2))
    squares, energy = torch.zeros(2, n, k, d, **wide), torch.zeros(n, k, **wide)
    for tokens in progress(tokens_of(pair, batch, sites, places), "streams"):
        cell = tokens.part * len(batch) + tokens.rows
        known, small = cell.unique(return_inverse=True)
        by_part = weights[:, known % len(batch)] * torch.nn.functional.one_hot(known // len(batch), k).T[:, None]  # [part weight cell]
        for i, site in enumerate(sites):
            a, b = tokens.streams(site)
            change = b - a
            here = small.to(a.device)
            for into, x in ((base, a), (difference, change)):
                sums = x.new_zeros(len(known), d).index_add_(0, here, x).cpu()
                into[:, i] += (by_part @ sums).movedim(0, 1)
            part = tokens.part.to(a.device)
            for side, x in enumerate((a, b)):
                squares[side, i] += x.new_zeros(k, d).index_add_(0, part, x.square()).cpu()
            length = change.norm(dim=1)
            energy[i] += length.new_zeros(k).index_add_(0, part, length.square()).cpu()
            for into, x in ((relative, torch.where(length == 0, 0.0, length / a.norm(dim=1))), (cosine, cosines(a, b))):
                into[i].view(-1).index_add_(0, cell, x.cpu())
    cells = torch.nn.functional.one_hot(places.part.clamp_min(0), k) * (places.part >= 0)[..., None]
    return Totals(
        tokens=places.joined(cells.sum(1).T.double(), 0).long(),
        relative=places.joined(relative, 1),
        cosine=places.joined(cosine, 1),
        base=places.joined(base, 2),
        difference=places.joined(difference, 2),
        squares=places.joined(squares, 2),
        energy=places.joined(energy, 1),
    )


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of rows; 1 for equal ones, exactly, and 0 where one is zero."""
    size = a.norm(dim=1) * b.norm(dim=1)
    found = torch.where(size > 0, (a * b).sum(1) / torch.where(size > 0, size, 1.0), 0.0)
    return torch.where((a == b).all(1), 1.0, found)


# ---- what rounding does


def floor(pair: ModelPair, batch: Batch, sites: Sequence[Site]) -> tuple[Float[Tensor, "measure side site"], bool]:
    """A model against itself on some of the prompts: alone and in a batch, and half precision against its weights in float32.

    Returns:
        The larger of the two, as ``MEASURES`` have it; and whether the float32 copy of a model did not fit the memory.
    """
    n = min(len(batch), _FLOOR_PROMPTS)
    rows, tokens = [], 0
    for row in (i * len(batch) // n for i in range(n)):
        tokens += int(batch.lengths[row])
        if not rows or tokens <= _FLOOR_TOKENS:
            rows.append(row)
    some, lacking, found = batch.select(rows), False, []
    for model in (pair.base, pair.tuned):
        alone = [_streams(model, batch.select([row]), sites) for row in rows]
        together = _streams(model, some if len(rows) > 1 else batch.select([rows[0]] * 2), sites)
        own = [torch.cat([one[i] for one in alone]) for i in range(len(sites))]
        apart = torch.stack([_apart(x, y[: len(x)]) for x, y in zip(own, together, strict=True)], 1)
        if model.dtype.itemsize < 4:
            wide = None if model.active_edits else model.in_dtype(torch.float32)
            if wide is not None:
                finer = _streams(wide, some, sites)
                apart = torch.maximum(apart, torch.stack([_apart(y, x) for x, y in zip(own, finer, strict=True)], 1))
            lacking |= wide is None
        apart[0] = apart[0].clamp_min(torch.finfo(model.dtype).eps)  # on some machines no batch changes a bit
        found.append(apart)
    return torch.stack(found, 1), lacking


def _streams(model: HookedModel, batch: Batch, sites: Sequence[Site]) -> list[Float[Tensor, "token d_model"]]:
    got = model.capture(batch, list(sites))
    return [_home(got[site])[batch.mask.to(_home(got[site]).device)].double().cpu() for site in sites]


def _apart(x: Tensor, y: Tensor) -> Float[Tensor, " measure"]:
    """How far streams of the same model are apart; NaN counts as nothing."""
    length, change = x.norm(dim=1), (y - x).norm(dim=1)
    relative = torch.where(change == 0, 0.0, change / length).mean()
    if not bool((x - x.mean(0)).norm() > STILL * torch.finfo(torch.bfloat16).eps * x.norm()):
        return torch.stack([relative, relative.new_zeros(()), relative.new_zeros(())])  # one token, or all the same
    centred = 1 - cosines(x - x.mean(0), y - y.mean(0)).mean()
    return torch.stack([relative, centred.abs(), torch.tensor(abs(1 - cka(x, y)), dtype=torch.float64).nan_to_num(0.0)])
