"""Mean vectors of residual streams, by halves of the texts and with random signs, and what they say through the unembedding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.models.heads import folded_vocabulary
from interp.sweeps.channels import half
from interp.sweeps.residuals import Totals

if TYPE_CHECKING:
    from interp.models.pair import ModelPair


_ROUNDED = 1e-6  # of a difference that is the same in every text, rounding is what varies


def prompt_weights(contexts: Sequence[str], group: Tensor, flips: int, seed: int) -> Float[Tensor, "weight prompt"]:
    """All prompts; the two halves; and random signs of the contexts."""
    one = half(contexts, 0.5, seed) if len(set(contexts)) > 1 else torch.ones(len(contexts), dtype=torch.bool)
    draws = torch.Generator().manual_seed(_stream(seed, "signs"))
    signs = 2 * torch.randint(2, (flips, int(group.max()) + 1), generator=draws).double() - 1
    return torch.cat([torch.ones(1, len(group), dtype=torch.float64), torch.stack([one, ~one]).double(), signs[:, group]])


def _stream(*key: object) -> int:
    """A stream of its own for every key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, eq=False)
class MeanVectors:
    """Mean vectors by site and place: of all texts, of each half, and with random signs of the texts."""

    base: Float[Tensor, "site place d_model"]
    difference: Float[Tensor, "site place d_model"]
    base_halves: Float[Tensor, "half site place d_model"]
    halves: Float[Tensor, "half site place d_model"]
    flipped: Float[Tensor, "flip site place d_model"]
    between: Float[Tensor, "flip site place d_model"]
    varied: Float[Tensor, "flip site place d_model"]

    @classmethod
    def of(cls, found: Totals, weights: Tensor) -> MeanVectors:
        """From sums over tokens."""
        count = (weights @ found.tokens.double().T)[:, None, :, None]  # [weight 1 place 1]
        n = count[:1]
        tuned = found.base + found.difference
        # Less its share of the mean, a sum with random signs points where texts differ from each other.
        between, varied = ((x[3:] - count[3:] * x[:1] / n) / n for x in (tuned, found.difference))
        halves = count[1:3]
        return cls(
            base=(found.base[:1] / n)[0],
            difference=(found.difference[:1] / n)[0],
            base_halves=found.base[1:3] / halves,
            halves=found.difference[1:3] / halves,
            flipped=found.difference[3:] / n,
            between=between,
            varied=varied,
        )

    @property
    def half_cosine(self) -> Float[Tensor, "site place"]:
        """NaN where a half has no tokens, or no difference."""
        one, two = self.halves
        return (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1))

    def constant(self, found: Totals) -> Float[Tensor, "site place"]:
        """The product of the halves' means has no noise in the mean, as the square of one has."""
        return self.halves.prod(0).sum(-1) / (found.energy / found.tokens.sum(1))


def readouts(pair: ModelPair, vectors: MeanVectors, top: int, seed: int) -> dict[str, Tensor]:
    """Tokens at both ends of the vectors, and how far the strongest stands out."""
    leaving = folded_vocabulary(pair.tuned)[1][:, : pair.shared_vocab]
    top = min(top, leaving.shape[1])
    three = torch.stack([vectors.difference, vectors.base, vectors.base + vectors.difference]).float()  # [vector site place d_model]
    ids, scores, stands, flips = [], [], [], []
    for i in range(three.shape[1]):
        logits = three[:, i] @ leaving
        ends = [logits.topk(top), logits.topk(top, largest=False)]
        dead = (three[:, i] == 0).all(-1)[:, None, :, None]
        ids.append(torch.stack([end.indices for end in ends], 1).masked_fill(dead, -1))
        scores.append(torch.stack([end.values for end in ends], 1).masked_fill(dead, torch.nan))
        stands.append(_stands_out(logits))
        varied = vectors.varied[:, i]
        still = varied.norm(dim=-1) <= _ROUNDED * vectors.difference[i].norm(dim=-1)
        flips.append(torch.stack([_stands_out(one.float() @ leaving) for one in varied]).masked_fill(still, torch.nan))
    random = random_directions(seed, "readout", len(vectors.varied), three.shape[-1]).float()
    return {
        "readout": torch.stack(ids, 2),
        "score": torch.stack(scores, 2),
        "concentration": torch.stack(stands, 1),
        "varied_concentration": torch.stack(flips, 1),
        "random_concentration": _stands_out(random @ leaving),
    }


def _stands_out(logits: Float[Tensor, "*cell vocab"]) -> Float[Tensor, "*cell"]:
    """NaN for a zero vector."""
    return (logits - logits.mean(-1, keepdim=True)).abs().amax(-1) / logits.std(-1)


def random_directions(seed: int, what: object, n: int, d: int) -> Float[Tensor, "draw d_model"]:
    """Unit vectors, drawn evenly in all directions; every ``what`` has a stream of its own."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(_stream(seed, what)), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)
