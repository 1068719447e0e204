"""The straight line through the weights of a pair: base + alpha (tuned - base), of all weights or of kinds of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.errors import InputError
from interp.models import loading, weights
from interp.models.hooked import HookedModel
from interp.models.validate import probe_batch
from interp.models.wrap import structure_copy

if TYPE_CHECKING:
    from interp.models.pair import ModelPair

GROUPS = ("attention", "MLP", "embeddings", "norms and biases")
"""Kinds of weights: matrices of the heads, matrices of the MLPs, embedding with positions and unembedding, all vectors."""

OTHER = "other"
"""Matrices of an architecture whose weights are not known by site."""

_KINDS = {**dict.fromkeys(("W_Q", "W_K", "W_V", "W_O"), 0), **dict.fromkeys(("W_in", "W_gate", "W_out"), 1), "W_E": 2, "W_U": 2, "W_pos": 2}
_LOOSE = 0.05  # of the largest logit: what half precision may do to a model, and another architecture does not stop at


@dataclass(frozen=True, eq=False)
class _Moved:
    """A tensor that tuning changed.

    Attributes:
        own: the line's tensor.
        base: base's, as many rows as both sides have.
        tuned: tuned's, likewise.
        group: its kind.
    """

    own: nn.Parameter
    base: Tensor
    tuned: Tensor
    group: str


class Line:
    """Models on the straight line between a base and a tuned model; neither of the two is ever written.

    It holds a copy of the tensors that tuning changed (one model's memory at most) and shares the others with base. Weights are
    computed in float32 or better, and those of 0 and 1 are base's and tuned's own, to the last bit.

    Attributes:
        model: the model at the point that was asked for last.
        groups: the kinds of weights that tuning changed, out of ``GROUPS`` and ``OTHER``.
        dtype: models of half precision are computed in float32 here, or rounding would bend the line.
        rounded: that did not fit the memory, so points between the ends are rounded to half precision.
        gap: largest difference of logits, on a few tokens, between the ends of the line and the two models run by themselves.
    """

    def __init__(self, pair: ModelPair) -> None:
        """Copy what tuning changed, and try both ends.

        Raises:
            InputError: a pair loaded one at a time, edits of activations in force, tensors of other shapes, weights that are not
                floating point or not in memory; or models that differ in more than weights.
        """
        if pair.one_at_a_time:
            raise InputError("the line between two models needs both at once, but the pair is loaded one at a time")
        for model in (pair.base, pair.tuned):
            if any(edit.activations for edit in model._edits):
                raise InputError(f"an edit of activations of {model.name} is in force, which no weights on a line can hold; leave it first")
        base, tuned = _tensors(pair.base), _tensors(pair.tuned)
        self.dtype, self.rounded = _precision(pair)
        copy = structure_copy(pair.base.wrapped.source).eval()
        self._moved = _taken(copy, base, tuned, pair)
        self.groups = tuple(g for g in (*GROUPS, OTHER) if any(m.group == g for m in self._moved))
        self.model = HookedModel.load(copy, tokenizer=pair.base._tokenizer, bos=pair.base._bos)
        self.model.name = f"the line from {pair.base.name} to {pair.tuned.name}"
        self.gap = self._ends(pair)

    def at(self, alpha: float | Mapping[str, float]) -> HookedModel:
        """The model at a point of the line; it is the same object at every point, with other weights.

        Args:
            alpha: 0 is base, 1 is tuned; or one number for each kind of weights, 0 for those that are not named.
        """
        for moved in self._moved:
            a = alpha.get(moved.group, 0.0) if isinstance(alpha, Mapping) else alpha
            _put(moved, a)
        return self.model

    def _ends(self, pair: ModelPair) -> float:
        """Largest difference of logits from both models.

        Raises:
            InputError: it is more than rounding.
        """
        batch, worst = probe_batch(min(pair.base, pair.tuned, key=lambda m: m.shape.d_vocab)), 0.0
        for alpha, model in ((0, pair.base), (1, pair.tuned)):
            got, want = (m.logits(batch)[..., : pair.shared_vocab].double().cpu() for m in (self.at(alpha), model))
            gap, largest = float((got - want).abs().max()), float(want.abs().max())
            eps = max(torch.finfo(model.dtype).eps, torch.finfo(torch.float32).eps)
            allowed = _LOOSE if model.dtype in loading.HALF else 64 * eps
            if not gap <= allowed * largest:
                raise InputError(
                    f"{pair.base.name} and {pair.tuned.name} differ in more than weights (base's configuration with the weights of "
                    f"{model.name} gives logits {gap:.2g} away from its own), so no line between weights leads from one to the other"
                )
            worst = max(worst, gap)
        return worst


def _put(moved: _Moved, alpha: float) -> None:
    """Write the tensor of a point; the ends are copied, not computed."""
    with torch.no_grad():
        if alpha in (0, 1):
            value = moved.tuned if alpha else moved.base
        else:
            wide = torch.promote_types(torch.promote_types(moved.base.dtype, moved.tuned.dtype), torch.float32)
            base, tuned = moved.base.to(wide), moved.tuned.to(moved.base.device, wide)
            value = torch.lerp(base, tuned, alpha)
        moved.own[: len(value)].copy_(value)  # a vocabulary may have more rows in base


def _precision(pair: ModelPair) -> tuple[torch.dtype, bool]:
    """The dtype of the line, and whether half precision had to stay."""
    coarse = torch.promote_types(pair.base.dtype, pair.tuned.dtype)
    if coarse not in loading.HALF:
        return coarse, False
    numbers = sum(p.numel() for p in pair.base.wrapped.source.parameters())
    fits = 4 * numbers <= 0.8 * loading.free_bytes(pair.base.wrapped.device)
    return (torch.float32, False) if fits else (coarse, True)


def _tensors(model: HookedModel) -> dict[tuple[str, str], Tensor | None]:
    """Every parameter that the modules of a model have or could have, by module and name, with edits of weights in force."""
    wrapped = model.wrapped
    wrapped.refresh()
    paths = {id(module): path for path, module in wrapped.source.named_modules()}
    return {(paths[id(src)], name): dst._parameters.get(name) for src, dst in wrapped._links for name in src._parameters}


def _taken(copy: nn.Module, base: dict[Any, Tensor | None], tuned: dict[Any, Tensor | None], pair: ModelPair) -> list[_Moved]:
    """Give a structure copy of base a tensor of its own wherever tuning changed one; tied ones stay tied where both sides tie them."""
    modules, made, shared = dict(copy.named_modules()), dict[Any, _Moved](), dict[int, nn.Parameter]()
    dtype = _precision(pair)[0]
    for (path, name), given in base.items():
        other = tuned.get((path, name))
        if given is None and other is None:
            continue
        label, key = f"{path}.{name}", (id(given), id(other))
        first, second = _alike(label, given, other, pair)
        rows, wide = min(len(first), len(second)), torch.promote_types(first.dtype, second.dtype)
        if key in made:
            kept = made[key].own
        elif given is not None and (first is second or torch.equal(first[:rows].to(wide), second[:rows].to(first.device, wide))):
            kept = shared.setdefault(id(given), nn.Parameter(first.detach().to(dtype), requires_grad=False))
        else:
            kept = nn.Parameter(first.detach().to(dtype, copy=True), requires_grad=False)
            made[key] = _Moved(kept, first.detach()[:rows], second.detach()[:rows], _group(label, first, pair))
        modules[path]._parameters[name] = kept
    return list(made.values())


def _alike(label: str, first: Tensor | None, second: Tensor | None, pair: ModelPair) -> tuple[Tensor, Tensor]:
    """Both sides; a bias that one of them lacks is 0 there.

    Raises:
        InputError: shapes that do not belong together, or weights that are no numbers in memory.
    """
    given = first if first is not None else second
    assert given is not None
    if (first is None or second is None) and given.ndim != 1:
        raise InputError(f"{label} is a weight of one model only, so there is no line between {pair.base.name} and {pair.tuned.name}")
    one, two = (torch.zeros_like(given) if t is None else t for t in (first, second))
    for side, tensor in (("base", one), ("tuned", two)):
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            raise InputError(f"{label} of {side} is {tensor.dtype} on {tensor.device}, but a line needs floating-point weights in memory")
    rows = weights.sites_of(label, pair.shape)[:1]
    longer = rows and rows[0].component in ("W_E", "W_U", "W_pos", "b_U")
    if one.shape != two.shape and not (longer and one.shape[1:] == two.shape[1:]):
        raise InputError(f"{label} is {list(one.shape)} in base and {list(two.shape)} in tuned, so there is no line between them")
    return one, two


def _group(label: str, tensor: Tensor, pair: ModelPair) -> str:
    """The kind of a weight; of an architecture without sites only vectors are known."""
    kinds = {_KINDS.get(site.component, 3) for site in weights.sites_of(label, pair.shape)}
    if len(kinds) == 1:
        return GROUPS[kinds.pop()]
    return GROUPS[3] if tensor.ndim == 1 else OTHER
