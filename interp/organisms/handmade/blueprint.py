"""How a circuit is written down: named directions of the residual stream, what heads attend to and move, MLP neurons.

Every number that steers attention follows from two: how far the resting place stands out of ordinary tokens (``REST``),
and what share of the attention a target takes from it (``HIT``). All are plain values; nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

HIT = 0.9
"""Attention on a target. Far enough from 1 for live gradients; what a head moves is divided by it, so that 1 arrives."""

REST = 12.0
"""Score of the first token, where a head looks that finds nothing. Ordinary tokens have score 0, so e^-12 of its attention."""

TARGET = REST + math.log(HIT / (1 - HIT))
"""Score of a target: beside the first token alone it takes the share ``HIT``, and twenty ordinary tokens take 1e-5 of it."""

LOGIT = 6.0
"""Logit of a word whose direction arrives with length 1: the answer stands out of 50 words by a probability near 0.9."""

CONTEXT = 32
"""Longest prompt, and the range of offsets that must not be mistaken for one another."""

TURN = 5
"""Plane i of the rotary embedding turns by TURN^-i radians per token (rope_theta = TURN^(d_head / 2))."""

OFFSET_PLANES = 3
"""Planes that tell offsets apart. At most 31 tokens off, at least one of the angles 1, 1/5 and 1/25 per token is far from a full turn."""

CONTENT_PLANES = 4
"""Planes from this one on hold content: 31 tokens turn them by less than 31 / 5^4 = 0.05 radians, which leaves a product as it was."""

BEGIN, END_OF_TEXT, UNKNOWN = "<s>", "</s>", "<unk>"

Code = Mapping[str, int]
"""Space -> coordinate: the directions of length 1 that a word's embedding has."""


@dataclass(frozen=True)
class Match:
    """Attention by content: ``score`` times the product of what the query has in one space and the key in another."""

    query: str
    key: str
    score: float


@dataclass(frozen=True)
class Offset:
    """Attention by place: the token ``back`` tokens ago is a target, others are not.

    With planes turning by w_i the score of the token d away is a sum_i cos(w_i (d - back)), less what makes its peak
    ``TARGET``. ``amplitude`` is the least a that keeps every other offset ``TARGET`` below the peak, at score 0 or less.
    """

    back: int

    @property
    def amplitude(self) -> float:
        """The amplitude per plane, from the nearest rival among the offsets of a context."""
        return TARGET / min(sum(1 - math.cos(d / TURN**i) for i in range(OFFSET_PLANES)) for d in range(1, CONTEXT))


@dataclass(frozen=True)
class Move:
    """What a head carries: the content of a space, into another, where ``amount`` of it arrives from a target."""

    source: str
    target: str
    amount: float = 1.0


@dataclass(frozen=True)
class Head:
    """An attention head: scores add up over ``attend``; the first token has the score ``REST`` besides.

    Heads of a group with common keys and values must name the same key and source spaces in the same order; a query or an
    amount of 0 leaves one out.
    """

    attend: tuple[Match | Offset, ...]
    move: tuple[Move, ...]


@dataclass(frozen=True)
class Neuron:
    """A neuron of a gated MLP: ``silu(x . gate)`` times the constant 1, written along ``out``. Space -> coefficients."""

    gate: Mapping[str, tuple[float, ...]]
    out: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A model: sizes, spaces, words, heads, neurons, and which words the logits read where.

    Three spaces are always there: ``const`` (1 at every token, as long as the norm reads it), ``start`` (the first token)
    and ``word`` (every other token).

    Attributes:
        sizes: (n_layers, n_heads, n_kv_heads, d_head).
        spaces: name -> number of directions of the residual stream.
        words: every token of the vocabulary as it stands in a text, space included -> its code.
        heads: (layer, head) -> what it does; all others are zero.
        answers: space -> words whose logits its coordinates raise by ``LOGIT``.
        neurons: layer -> MLP neurons.
        d_mlp: neurons per layer, most of them zero.
    """

    sizes: tuple[int, int, int, int]
    spaces: Mapping[str, int]
    words: Mapping[str, Code]
    heads: Mapping[tuple[int, int], Head]
    answers: Mapping[str, Sequence[str]]
    neurons: Mapping[int, tuple[Neuron, ...]] = field(default_factory=dict)
    d_mlp: int = 7

    @property
    def places(self) -> dict[str, range]:
        """Space -> its coordinates in the residual stream."""
        widths = {"const": 1, "start": 1, "word": 1, **self.spaces}
        ends = accumulate(widths.values())
        return {name: range(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}

    @property
    def d_model(self) -> int:
        """Width of the residual stream: every space, and unused directions up to a multiple of the heads, which Llama's config asks for."""
        n_heads = self.sizes[1]
        return -(-max(r.stop for r in self.places.values()) // n_heads) * n_heads


def coded(words: Sequence[str], *flags: str, code: str = "code") -> dict[str, Code]:
    """Words with a coordinate of ``code`` each, and flags that all of them have."""
    return {f" {word}": {code: i, **dict.fromkeys(flags, 0)} for i, word in enumerate(words)}


def plain(*words: str) -> dict[str, Code]:
    """Words of the template, which mean nothing."""
    return {word: {} for word in words}
