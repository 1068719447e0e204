"""How alike two models' residual streams are: cosines behind the means, and unbiased linear CKA with its standard error.

Nothing is kept per token: two runs of the prompts give the numbers exactly, whatever the batches.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.linalg import KernelSums, aligned, unbiased_hsic
from interp.progress import progress
from interp.sites import Site
from interp.sweeps.residuals import STILL, Places, Tokens, Totals, cosines, tokens_of

if TYPE_CHECKING:
    from interp.models.batch import Batch
    from interp.models.pair import ModelPair

_BYTES = 2**30  # of products [d_model d_model] held at a time
_PAIRS = ((0, 1), (0, 0), (1, 1))


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike two streams are.

    Attributes:
        centred_cosine: sums over tokens of the cosine after each model's mean at the place was taken away; NaN where tokens do not vary.
        cka: unbiased linear CKA of all tokens; of all dimensions, and without some.
        cka_se: its standard error with contexts as independent units, to first order.
    """

    centred_cosine: Float[Tensor, "site place prompt"]
    cka: Float[Tensor, "variant site place"]
    cka_se: Float[Tensor, "variant site place"]


def similarity(
    pair: ModelPair,
    batch: Batch,
    sites: Sequence[Site],
    places: Places,
    found: Totals,
    keep: Bool[Tensor, "site d_model"],
    group: Int[Tensor, " prompt"],
) -> Similarity:
    """Two more runs of the prompts for as many sites at a time as fit the memory.

    Args:
        pair: the models.
        batch: the prompts.
        sites: of the stream.
        places: where tokens stand.
        found: what ``totals`` gave, for the means.
        keep: dimensions that the second variant of CKA has.
        group: the context of each prompt.
    """
    shape = pair.base.shape
    n, v = len(sites), len(places.names)
    out = Similarity(
        centred_cosine=torch.zeros(n, v, len(batch), dtype=torch.float64),
        cka=torch.full((2, n, v), torch.nan, dtype=torch.float64),
        cka_se=torch.full((2, n, v), torch.nan, dtype=torch.float64),
    )
    moving = _moving(pair, found)
    step = max(1, _BYTES // (8 * 3 * (len(places.parts) + v) * shape.d_model**2))
    for at in progress(range(0, n, step), "similarity"):
        group_of = [_SiteSimilarity(i, places, found, keep[i], len(batch), group, moving[i]) for i in range(at, min(at + step, n))]
        some = [sites[one.index] for one in group_of]
        for tokens in tokens_of(pair, batch, some, places):
            for one in group_of:
                one.add(tokens, *tokens.streams(sites[one.index]))
        for one in group_of:
            one.close()
        for tokens in tokens_of(pair, batch, some, places):
            for one in group_of:
                one.influence(tokens, *tokens.streams(sites[one.index]))
        for one in group_of:
            out.centred_cosine[one.index] = torch.where(moving[one.index][:, None], one.cosine, torch.nan)
            out.cka[:, one.index], out.cka_se[:, one.index] = one.cka, one.error()
    return out


def _moving(pair: ModelPair, found: Totals) -> Bool[Tensor, "site place"]:
    """Where tokens differ by more than rounding in both models: a first token that every text has does not."""
    eps = max(torch.finfo(model.dtype).eps for model in (pair.base, pair.tuned))
    n = found.tokens.sum(1).double()[:, None]
    means = torch.stack([found.base[0], found.base[0] + found.difference[0]]) / n
    square = found.squares / n
    return ((square - means.square()).sum(-1) > (STILL * eps) ** 2 * square.sum(-1)).all(0)


class _SiteSimilarity:
    """Sums of products at one site; then their derivatives by each token."""

    def __init__(self, index: int, places: Places, found: Totals, keep: Tensor, prompts: int, group: Tensor, moving: Tensor) -> None:
        count = found.tokens.sum(1).double()[:, None]
        self.index, self.places, self.group, self.moving = index, places, group, moving
        self.means = torch.stack([found.base[0, index], found.base[0, index] + found.difference[0, index]]) / count  # [side place d_model]
        self.keep = keep.double()
        self.cosine = torch.zeros(len(places.names), prompts, dtype=torch.float64)
        self.cross: list[list[Tensor]] = []
        self.sums: list[list[list[KernelSums]]] = []
        self.cka = torch.full((2, len(places.names)), torch.nan, dtype=torch.float64)
        self.pull = torch.zeros(2, len(places.names), int(group.max()) + 1, dtype=torch.float64)

    @property
    def variants(self) -> tuple[int, ...]:
        """All dimensions, and without some if there are such."""
        return (0,) if bool(self.keep.all()) else (0, 1)

    def _kept(self, x: Tensor, variant: int) -> Tensor:
        return x * self.keep.to(x.device) if variant else x

    def _views(self, tokens: Tokens, a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Per place its prompts, and the streams there less their means."""
        for view, members in enumerate(self.places.members):
            here = members[tokens.part]
            if bool(here.any()):
                x, y = (s[here.to(s.device)] - m[view].to(s.device) for s, m in zip((a, b), self.means, strict=True))
                yield view, tokens.rows[here], x, y

    def add(self, tokens: Tokens, a: Tensor, b: Tensor) -> None:
        """Take some tokens."""
        for view, rows, x, y in self._views(tokens, a, b):
            self.cosine[view].index_add_(0, rows, cosines(x, y).cpu())
        # One shift for all places, so that sums of parts can be put together; it changes nothing but what rounding loses.
        both = [s - m[0].to(s.device) for s, m in zip((a, b), self.means, strict=True)]
        if not self.cross:
            zero = a.new_zeros(a.shape[1], a.shape[1])
            none = KernelSums.of(a[:0], a[:0])
            self.cross = [[zero.clone() for _ in _PAIRS] for _ in self.places.parts]
            self.sums = [[[none for _ in _PAIRS] for _ in self.places.parts] for _ in self.variants]
        for part in tokens.part.unique().tolist():
            here = (tokens.part == part).to(a.device)
            mine = [s[here] for s in both]
            for i, (p, q) in enumerate(_PAIRS):
                self.cross[part][i].addmm_(mine[p].T, mine[q])
                for variant in self.variants:
                    x, y = (self._kept(mine[j], variant) for j in (p, q))
                    self.sums[variant][part][i] = self.sums[variant][part][i] + KernelSums.of(x, y)

    def close(self) -> None:
        """CKA from the sums; what is kept of them are covariances by place."""
        covariances: list[list[Tensor]] = []
        for view, members in enumerate(self.places.members):
            parts = members.nonzero()[:, 0].tolist()
            cross = [_added([self.cross[part][i] for part in parts]) for i in range(3)]
            for variant in self.variants:
                sums = [_added([self.sums[variant][part][i] for part in parts]) for i in range(3)]
                found = [unbiased_hsic(self._kept(self._kept(c, variant).T, variant).T, s) for c, s in zip(cross, sums, strict=True)]
                if bool(self.moving[view]):
                    self.cka[variant, view] = aligned(*found)
            whole = [_added([self.sums[0][part][i] for part in parts]) for i in range(3)]
            covariances.append([c / s.n - torch.outer(s.x / s.n, s.y / s.n) for c, s in zip(cross, whole, strict=True)])
        if len(self.variants) == 1:
            self.cka[1] = self.cka[0]
        self.covariances, self.cross, self.sums = covariances, [], []

    def influence(self, tokens: Tokens, a: Tensor, b: Tensor) -> None:
        """Add up, per context, the derivative of log CKA by the weight of each of its tokens (without constants, which cancel)."""
        for view, rows, x, y in self._views(tokens, a, b):
            for variant in self.variants:
                total = 0.0
                for share, (p, q), c in zip((1.0, -0.5, -0.5), _PAIRS, self.covariances[view], strict=True):
                    left, right = (self._kept((x, y)[j], variant) for j in (p, q))
                    kept = self._kept(self._kept(c, variant).T, variant).T
                    total = total + share * ((left @ kept) * right).sum(1) / kept.square().sum()
                self.pull[variant, view].index_add_(0, self.group[rows], torch.as_tensor(total).cpu())

    def error(self) -> Float[Tensor, "variant place"]:
        """Standard errors; NaN for one context."""
        counts = torch.zeros(len(self.places.names), self.pull.shape[2], dtype=torch.float64)
        part = self.places.part
        for view, members in enumerate(self.places.members):
            counts[view].index_add_(0, self.group, (members[part.clamp_min(0)] & (part >= 0)).sum(1).double())
        m, n = (counts > 0).sum(1), counts.sum(1)
        pull = self.pull[[variant if variant in self.variants else 0 for variant in (0, 1)]]
        size = 2 * pull.square().sum(-1).mul(m / (m - 1).clamp_min(1)).sqrt() / n
        return (self.cka.abs() * size).masked_fill(m < 2, torch.nan)


def _added(terms: Sequence[Any]) -> Any:
    return functools.reduce(operator.add, terms)
