"""From the text of a flag to the value of a setting, as the annotation of the setting says."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from difflib import get_close_matches

from interp.errors import InputError

_SEQUENCES = ("tuple", "list", "Sequence", "Iterable", "frozenset", "set", "Collection")


def choices(annotation: ast.expr) -> tuple[object, ...]:
    """The members of every ``Literal`` in an annotation."""
    return tuple(value for a in _alternatives(annotation) if _head(a) == "Literal" for value in _members(a))


def is_switch(annotation: ast.expr) -> bool:
    """True for a setting that is only on or off."""
    return [_head(a) for a in _alternatives(annotation)] == ["bool"]


_WORDS = {"int": "INT", "float": "NUMBER", "bool": "true|false", "None": "none"}


def describe(annotation: ast.expr) -> str:
    """What may be written for a setting: ``{ov,qk}``, ``INT``, ``TEXT,...``."""
    words = []
    for part in _alternatives(annotation):
        head = _head(part)
        if head == "Literal":
            words.append("{" + ",".join(str(m) for m in _members(part)) + "}")
        elif head in _SEQUENCES:
            words.append(f"{describe(_item(part))},...")
        elif head != "Callable":
            words.append(_WORDS.get(head, "TEXT"))
    return "|".join(dict.fromkeys(words)) or "TEXT"


def convert(name: str, annotation: ast.expr, text: str) -> object:
    """Read the text of a flag.

    Sites, heads, metrics and tasks stay text: the analysis reads their text forms itself.

    Raises:
        InputError: no alternative of the annotation fits; the message says what was expected.
    """
    try:
        return _read(annotation, text.strip())
    except ValueError as error:
        members = [str(m) for m in choices(annotation)]
        near = get_close_matches(text, members, n=1, cutoff=0.4)
        hint = f"; nearest: {near[0]}" if near else ""
        raise InputError(f"--{name.replace('_', '-')} takes {describe(annotation)}, not {text!r}{hint}") from error


def text_of(value: object) -> str:
    """The text that ``convert`` reads back as the value; empty for an empty sequence."""
    if isinstance(value, tuple | list | frozenset | set):
        return ",".join(text_of(v) for v in value)
    return "none" if value is None else str(value)


def _read(annotation: ast.expr, text: str) -> object:
    for reader in (reader for a in _ordered(annotation, text) if (reader := _reader(a))):
        try:
            return reader(text)
        except ValueError:
            continue
    raise ValueError(text)


def _ordered(annotation: ast.expr, text: str) -> list[ast.expr]:
    """The alternatives from the narrowest to the widest; a list before one text where commas were written."""
    order = ["None", "Literal", "bool", "int", "float", *(_SEQUENCES if len(_split(text)) > 1 else ("str",))]
    rank = {head: i for i, head in enumerate(order)}
    return sorted(_alternatives(annotation), key=lambda a: rank.get(_head(a), len(order)))


def _reader(annotation: ast.expr) -> Callable[[str], object] | None:
    head = _head(annotation)
    if head in _SEQUENCES:
        item = _item(annotation)
        return lambda text: tuple(_read(item, part) for part in _split(text))
    plain = {"None": _none, "bool": _bool, "int": int, "float": float, "Callable": None}
    if head == "Literal":
        return lambda text: _member(_members(annotation), text)
    return plain.get(head, str)


def _split(text: str) -> list[str]:
    """Split at commas that stand outside brackets: ``boxes(n=3,k=2),ioi`` is two."""
    parts = re.findall(r"(?:[^,(\[]|\([^)]*\)|\[[^\]]*\])+", text)
    return [p.strip() for p in parts if p.strip()]


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


def _bool(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _member(members: list[object], text: str) -> object:
    for member in members:
        if str(member) == text:
            return member
    raise ValueError(text)


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    """The members of a union, or the annotation itself."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return [*_alternatives(annotation.left), *_alternatives(annotation.right)]
    if isinstance(annotation, ast.Subscript) and _head(annotation) in ("Optional", "Union"):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        parts = [a for part in inner for a in _alternatives(part)]
        return [*parts, ast.Constant(None)] if _head(annotation) == "Optional" else parts
    return [annotation]


def _head(annotation: ast.expr) -> str:
    match annotation:
        case ast.Subscript(value=value):
            return _head(value)
        case ast.Constant(value=None):
            return "None"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ast.unparse(annotation)


def _item(annotation: ast.expr) -> ast.expr:
    if not isinstance(annotation, ast.Subscript):
        return ast.Name("str")
    inner = annotation.slice
    return inner.elts[0] if isinstance(inner, ast.Tuple) else inner


def _members(annotation: ast.expr) -> list[object]:
    if not isinstance(annotation, ast.Subscript):
        return []
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    return [ast.literal_eval(m) for m in inner]
