"""What tuning did to the weights, one matrix at a time: base and tuned are never both in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp import linalg
from interp.errors import InputError
from interp.models import weights
from interp.models.adapters import AdaptedTensors, Adapter, read_adapter
from interp.models.weights import TensorSource
from interp.progress import progress
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.checkpoint import Shape
    from interp.models.pair import ModelPair

AT_FLOOR = 1.5
"""A change up to so many times the expected rounding error is at the floor; two independent roundings give 1.41."""

_VOCABULARY = ("W_E", "W_U", "b_U")
_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


@dataclass(frozen=True, eq=False)
class Change:
    """One weight in base and tuned, in float32.

    Attributes:
        name: the site's text form ("L3.W_Q"), or the raw tensor name where the architecture is not known.
        site: the weight's site; None for a raw tensor.
        base: the weight in base; matrices act on row vectors, x @ W.
        tuned: the weight in tuned; None for an adapter that gives the change as factors.
        factors: (left [rows, rank], right [rank, cols]) with ``delta = left @ right``; else None.
        dtype: the coarser of the two stored dtypes: what rounding can have done.
    """

    name: str
    site: Site | None
    base: Tensor
    tuned: Tensor | None
    factors: tuple[Tensor, Tensor] | None
    dtype: torch.dtype

    @cached_property
    def delta(self) -> Tensor:
        """Tuned minus base, float32."""
        if self.factors is not None:
            return self.factors[0] @ self.factors[1]
        return torch.zeros_like(self.base) if self.tuned is None else self.tuned - self.base

    @property
    def rounding(self) -> float:
        """Frobenius norm that rounding alone can give the change; 0 where an adapter gives it exactly."""
        return 0.0 if self.tuned is None else linalg.rounding_norm(self.tuned, self.dtype)

    @property
    def noise(self) -> float:
        """Largest singular value that rounding alone can give the change of a matrix, with a fifth of margin."""
        rows, cols = self.base.shape
        return 1.2 * self.rounding * (rows**0.5 + cols**0.5) / (rows * cols) ** 0.5

    def rounding_per_head(self, shape: Shape) -> list[float]:
        """The same for every head of a W_Q, W_K, W_V or W_O."""
        assert self.site is not None
        split = weights.heads(self.site, self.base if self.tuned is None else self.tuned, shape)
        return [0.0 if self.tuned is None else linalg.rounding_norm(head, self.dtype) for head in split]


def adapter_of(pair: ModelPair) -> Adapter | None:
    """The adapter that makes tuned out of base, if its factors say all there is to say."""
    path = getattr(pair.tuned, "adapter", None)
    if path is None or pair.tuned.active_edits or pair.base.active_edits or not weights.known(pair.shape):
        return None
    ours, theirs = pair.base.checkpoint, pair.tuned.checkpoint
    if ours is None or theirs is None or getattr(pair.base, "adapter", None) is not None:
        return None
    if ours is not theirs and ours.fingerprint != theirs.fingerprint:
        return None
    adapter = read_adapter(path)
    adapter.check(pair.shape)
    return adapter


def unmatched(pair: ModelPair) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Bare names of tensors that only base has, and only tuned; a tied unembedding is no difference."""
    only: tuple[list[str], list[str]] = ([], [])
    if adapter_of(pair) is None:
        for name, base, tuned in weights.matched(pair.base.weights(), pair.tuned.weights()):
            if base is None or tuned is None:
                tied = pair.base.shape.tied if base is None else pair.tuned.shape.tied
                if not (tied and name == weights.key_of("W_U", pair.shape)) and not _buffer(name):
                    only[base is None].append(name)
    return tuple(only[0]), tuple(only[1])


def changes(pair: ModelPair, *, desc: str = "weights", only: frozenset[str] | None = None) -> Iterator[Change]:
    """Every matched weight, tensor by tensor, in stored order; fused tensors come apart by site.

    Extra rows of the vocabulary are left out. An adapter's change comes as factors, its untouched weights as no change.

    Args:
        pair: base and tuned.
        desc: text beside the progress bar.
        only: names of changes to read; the others' tensors stay unread. None: all.

    Raises:
        InputError: matched tensors have different shapes, NaN or infinite entries, or no floating-point numbers (quantised).
    """
    shape = pair.shape
    base, adapter = pair.base.weights(), adapter_of(pair)
    tuned = base if adapter is not None else pair.tuned.weights()
    factors = {} if adapter is None else adapter.factors(shape)
    found = [
        (name, left, right)
        for name, left, right in weights.matched(base, tuned)
        if not _buffer(name) and _sources(name, left, right, pair) and (only is None or only & set(_labels(name, shape)))
    ]
    for name, left, right in progress(found, desc, total=len(found), unit="tensor"):
        w0, dtype0 = _read(base, left or name, pair.base.shape, "base")
        if adapter is None:
            w1, dtype1 = _read(tuned, right or name, pair.tuned.shape, "tuned")
        elif name in adapter.replaced:
            w1, dtype1 = AdaptedTensors(base, adapter, shape).get(name).float(), adapter.replaced[name].dtype
        else:
            w1, dtype1 = None, dtype0
        yield from _split(name, w0, w1, (dtype0, dtype1), factors, pair)


def _sources(name: str, left: str | None, right: str | None, pair: ModelPair) -> bool:
    """Whether both sides have the tensor; a tied unembedding stands in for a missing one."""
    if name == weights.key_of("W_U", pair.shape):
        tied = (pair.base.shape.tied, pair.tuned.shape.tied)
        return not all(tied) and (left is not None or tied[0]) and (right is not None or tied[1])
    return left is not None and right is not None


def _labels(name: str, shape: Shape) -> tuple[str, ...]:
    return tuple(str(site) for site in weights.sites_of(name, shape)) or (name,)


def _buffer(name: str) -> bool:
    """Constants that old checkpoints store beside the weights: causal masks and rotary frequencies."""
    return any(name == b or name.endswith("." + b) for b in _BUFFERS)


def _read(source: TensorSource, name: str, shape: Shape, side: str) -> tuple[Tensor, torch.dtype]:
    names = {weights.bare(n) for n in source.names()}
    stored = weights.key_of("W_E", shape) if weights.bare(name) not in names and shape.tied else name
    tensor = source.get(stored or name)
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name} of {side} is stored as {kind}, expected floating-point weights; give the checkpoint before quantisation")
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{bad} of {tensor.numel()} entries of {name} of {side} are NaN or infinite, expected finite weights")
    return tensor.float(), tensor.dtype


def _split(
    name: str,
    w0: Tensor,
    w1: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    factors: dict[Site, tuple[Tensor, Tensor]],
    pair: ModelPair,
) -> Iterator[Change]:
    shape, sites = pair.shape, weights.sites_of(name, pair.shape)
    if w1 is not None and w0.shape != w1.shape:
        if not (sites and sites[0].component in _VOCABULARY and w0.shape[1:] == w1.shape[1:]):
            raise InputError(f"{name} is {list(w0.shape)} in base and {list(w1.shape)} in tuned; they cannot be compared")
        rows = min(len(w0), len(w1))
        w0, w1 = w0[:rows], w1[:rows]
    parts0, parts1 = _parts(name, w0, shape), {} if w1 is None else _parts(name, w1, shape)
    for site, base in parts0.items():
        yield Change(
            name=name if site is None else str(site),
            site=site,
            base=base,
            tuned=parts1.get(site),
            factors=factors.get(site) if site is not None and w1 is None else None,
            dtype=linalg.coarser(*dtypes),
        )


def _parts(name: str, tensor: Tensor, shape: Shape) -> dict[Site | None, Tensor]:
    sites: dict[Site | None, Tensor] = {**weights.matrices(name, tensor, shape)}
    return sites or {None: tensor}
