"""What the annotations of a result's fields say: axes, and which values fit."""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from jaxtyping import jaxtyped
from torch import Tensor

from interp.errors import InputError

TENSOR = "$tensor"
"""Key of the JSON object that stands for a tensor, with its name as the value."""


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field name -> resolved annotation of a dataclass."""
    known = typing.get_type_hints(cls)
    return {f.name: known[f.name] for f in fields(cls)}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def tensor_hint(hint: Any) -> Any | None:
    """The jaxtyping annotation inside a hint (it may be ``... | None``), or None."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((h for h in options if hasattr(h, "dim_str")), None)


def axes_of(hint: Any) -> tuple[str, ...] | None:
    """Axis names of a jaxtyping annotation: ``Float[Tensor, "layer head"]`` has ("layer", "head").

    A name that comes twice gets a number: ("layer", "layer_2").
    """
    tensor = tensor_hint(hint)
    if tensor is None:
        return None
    names: list[str] = []
    for i, dim in enumerate(tensor.dim_str.split()):
        name = re.sub(r"^[#?*_]+", "", dim.split("=")[0])
        name = f"axis_{i}" if not name or name.isdigit() else name
        names.append(name if name not in names else f"{name}_{names.count(name) + 1}")
    return tuple(names)


def tensors_of(result: Any) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Field name -> (axes, tensor) for the annotated tensors that are there."""
    found = {}
    for name, hint in hints(type(result)).items():
        axes, value = axes_of(hint), getattr(result, name)
        if axes is not None and isinstance(value, Tensor) and value.ndim == len(axes):
            found[name] = (axes, value)
    return found


def check(result: Any) -> None:
    """Check the fields of a result against their annotations: kinds, number of axes, one size per axis, labels.

    Raises:
        ValueError: names the field, what was expected and what it holds.
    """
    cls = type(result).__name__
    if not is_dataclass(result):
        raise ValueError(f"{cls} must be a dataclass(frozen=True, eq=False)")
    for name, hint in hints(type(result)).items():
        value, tensor = getattr(result, name), tensor_hint(hint)
        _check_value(value, f"{cls}.{name}")
        if tensor is not None and not (value is None and hint is not tensor) and not _fits(value, tensor):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{cls}.{name} must be {tensor.__name__}, but it is {got}")
    _check_axes(result, cls)


def _fits(value: Any, tensor: Any) -> bool:
    with jaxtyped("context"):  # a context of its own: sizes of axes are compared below, with a better sentence
        return isinstance(value, tensor)


def _check_axes(result: Any, cls: str) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for name, (axes, value) in tensors_of(result).items():
        for axis, size in zip(axes, value.shape, strict=True):
            known, where = sizes.setdefault(axis, (size, name))
            if known != size and axis.isidentifier() and not axis.startswith("axis_"):
                raise ValueError(f"the axis {axis!r} of {cls} has {known} entries in {where} and {size} in {name}")
    for axis, labels in (getattr(result, "labels", None) or {}).items():
        if axis in sizes and len(labels) != sizes[axis][0]:
            raise ValueError(f"the axis {axis!r} of {cls} has {sizes[axis][0]} entries in {sizes[axis][1]} but {len(labels)} labels")


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.requires_grad or value.dtype in (torch.float16, torch.bfloat16):
            got = f"{value.dtype} on {value.device}{' with gradient' if value.requires_grad else ''}"
            raise ValueError(f"{where} must be a CPU tensor without gradient, in float32 or float64 if it has fractions, but it is {got}")
    elif isinstance(value, dict):
        for k, v in value.items():
            if isinstance(k, bool) or not isinstance(k, str | int) or (isinstance(k, str) and k.startswith("$")):
                raise ValueError(f"{where} has the key {k!r}; keys are strings (not starting with $) or integers")
            _check_value(v, f"{where}[{k!r}]")
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            _check_value(v, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; a number outside a tensor must be finite, use None for a missing one")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(f"{where} must be a tensor or a JSON value, but it is a {type(value).__name__}")


def typed(hint: Any, value: Any, where: str, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """A JSON value as its annotation says: tuples for tuples, integer keys, tensors by name.

    Pages interpolate fields into HTML, so a string where a number belongs is refused, not passed on.

    Raises:
        InputError: the value is not of that kind.
    """
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if _is_union(hint):
        return _typed_union(args, value, where, tensors)
    if isinstance(value, dict) and TENSOR in value:
        name = value[TENSOR]
        if (hint in (Tensor, Any) or tensor_hint(hint) is not None) and isinstance(name, str) and name in (tensors or {}):
            return (tensors or {})[name]
    elif kind is Literal and any(type(value) is type(a) and value == a for a in args):
        return value
    elif kind in (tuple, list, Sequence, Any) and isinstance(value, list):
        return _typed_list(kind, args, value, where, tensors)
    elif kind in (dict, Mapping, Any) and isinstance(value, dict):
        key, item = args or (str, Any)
        return {_typed_key(key, k, where): typed(item, v, where, tensors) for k, v in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Any or (hint in (str, int, bool, type(None)) and type(value) is hint):
        return value
    raise InputError(f"{where} should be {_name(hint)}, but it is {str(value)[:60]!r}")


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _typed_list(kind: Any, args: tuple[Any, ...], value: list[Any], where: str, tensors: Mapping[str, Tensor] | None) -> Any:
    """Lists are tuples unless the annotation says list: results are frozen."""
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise InputError(f"{where} should have {len(args)} entries, but it has {len(value)}")
        return tuple(typed(h, v, where, tensors) for h, v in zip(args, value, strict=True))
    inner = [typed(args[0] if args else Any, v, where, tensors) for v in value]
    return inner if kind in (list, Any) else tuple(inner)


def _typed_union(options: tuple[Any, ...], value: Any, where: str, tensors: Mapping[str, Tensor] | None) -> Any:
    exact = [o for o in options if o is type(value)]  # 1 stays an integer under int | float
    for option in [*exact, *options]:
        try:
            return typed(option, value, where, tensors)
        except InputError:
            continue
    raise InputError(f"{where} should be {' or '.join(map(_name, options))}, but it is {str(value)[:60]!r}")


def _typed_key(hint: Any, key: str, where: str) -> Any:
    if hint is not int:
        return typed(hint, key, where)
    if not re.fullmatch(r"-?\d{1,18}", key):
        raise InputError(f"{where} has the key {key[:60]!r} where an integer belongs")
    return int(key)
