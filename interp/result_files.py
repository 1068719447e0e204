"""Results on disk: ``result.json`` and ``tensors.safetensors`` in a folder, whole or not there at all.

A folder may come from a stranger: nothing in it is executed, and every value is checked against the
annotations of the class it is loaded into.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_type_hints

from torch import Tensor

from interp.errors import InputError
from interp.fields import TENSOR, hints, typed
from interp.provenance import Meta, sha256

if TYPE_CHECKING:
    from interp.results import Result

R = TypeVar("R", bound="Result")

FORMAT = 1
"""Version of the layout of ``result.json``."""

_JSON, _TENSORS = "result.json", "tensors.safetensors"


def encode(result: Result) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields as JSON values, each tensor replaced by its name, and the tensors by name."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            name = where
            while name in tensors:
                name += "'"
            tensors[name] = value.detach().contiguous().clone()  # safetensors refuses tensors that share memory
            return {TENSOR: name}
        if isinstance(value, dict):
            return {str(k): walk(v, f"{where}/{k}") for k, v in value.items()}
        return [walk(v, f"{where}/{i}") for i, v in enumerate(value)] if isinstance(value, list | tuple) else value

    return {f.name: walk(getattr(result, f.name), f.name) for f in fields(cast("Any", result))}, tensors


def content_digest(result: Result) -> str:
    """Digest (sha256, hex) of all numbers of a result."""
    from safetensors.torch import save

    values, tensors = encode(result)
    return _contents(values, save(tensors))


def _contents(values: Any, blob: bytes) -> str:
    return sha256([values, hashlib.sha256(blob).hexdigest()])


def write(result: Result, folder: Path) -> Path:
    """Write a result into a folder, which appears whole or not at all; an earlier result there is replaced.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    from safetensors.torch import save

    result.check()
    identity = result.identity
    values, tensors = encode(result)
    blob = save(tensors)
    page = {
        "format": FORMAT,
        "analysis": result.meta.analysis,
        "kind": type(result).__name__,
        "identity": identity,
        "contents": _contents(values, blob),
        "summary": result.summary(),
        "meta": asdict(result.meta),
        "fields": values,
    }
    text = json.dumps(page, indent=1, allow_nan=False)
    with writing(f"save a result in {folder}"):
        if folder.exists() and not (folder.is_dir() and (is_result(folder) or not any(folder.iterdir()))):
            raise InputError(f"cannot save a result in {folder}: it exists and holds something else")
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
        try:
            scratch.mkdir()
            (scratch / _TENSORS).write_bytes(blob)
            (scratch / _JSON).write_text(text, encoding="utf-8")
            _swap(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an operating system's refusal into one sentence: ``cannot save ...: Permission denied``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot {what}: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> Path:
    """Write a text file, which appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with writing(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
        try:
            scratch.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    return path


def _swap(scratch: Path, folder: Path) -> None:
    """Give ``scratch`` the name ``folder``. A full folder cannot be renamed over, so it steps aside first."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(scratch, folder)
        return
    aside = folder.parent / f"{scratch.name}.old"
    os.replace(folder, aside)
    try:
        os.replace(scratch, folder)
    finally:
        if not folder.exists():
            os.replace(aside, folder)
        shutil.rmtree(aside, ignore_errors=True)


def is_result(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a saved result."""
    return (Path(folder) / _JSON).is_file() and (Path(folder) / _TENSORS).is_file()


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``result.json``, with ``meta`` as a checked :class:`Meta` and the tensors' bytes as ``blob``.

    Raises:
        InputError: no result folder, unreadable, of an unknown format, or damaged.
    """
    path = Path(folder)
    if not is_result(path):
        what = f"lacks {_JSON} and {_TENSORS}" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise InputError(f"{path} is not a saved result: it {what}")
    with writing(f"read the result in {path}"):
        text, blob = (path / _JSON).read_bytes(), (path / _TENSORS).read_bytes()
    page = _parsed(text, path / _JSON)
    if page.get("format") != FORMAT:
        raise InputError(f"{path} is a result of format {page.get('format')!r}; this version of interp reads format {FORMAT}")
    meta, parts = page.get("meta"), get_type_hints(Meta)
    if not isinstance(meta, dict) or set(meta) != set(parts) or not isinstance(page.get("fields"), dict):
        raise InputError(f"{path / _JSON} lacks parts of a result: it needs meta ({', '.join(parts)}) and fields")
    if _contents(page["fields"], blob) != page.get("contents"):
        raise InputError(f"the result in {path} is damaged: its contents do not fit their digest")
    known = Meta(**{k: typed(hint, meta[k], f"{path}: meta.{k}") for k, hint in parts.items()})
    _check_meta(known, path / _JSON)
    if known.analysis != page.get("analysis"):
        raise InputError(f"the result in {path} is damaged: it names two analyses, {page.get('analysis')!r} and {known.analysis!r}")
    return {**page, "meta": known, "blob": blob}


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        page = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not valid JSON") from None
    if not isinstance(page, dict):
        raise InputError(f"{path} is not the JSON of a result")
    return page


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not JSON")
    return number


def _check_meta(meta: Meta, path: Path) -> None:
    wanted = [(m, ("side", "name", "fingerprint", "dtype"), "models") for m in meta.models]
    wanted += [(i, ("parameter", "kind", "digest", "text"), "inputs") for i in meta.inputs]
    for entry, keys, part in wanted:
        if missing := next((k for k in keys if not isinstance(entry.get(k), str)), None):
            raise InputError(f"{path} is damaged: an entry of meta.{part} has no text {missing!r}")
    if not all(isinstance(m.get("edits"), list) and all(isinstance(e, str) for e in m["edits"]) for m in meta.models):
        raise InputError(f"{path} is damaged: each entry of meta.models must list the digests of its edits")


def restore(cls: type[R], page: Mapping[str, Any], path: Path) -> R:
    """Build a result of class ``cls`` from what :func:`read` gave.

    Raises:
        InputError: it is a result of another kind, or its fields do not fit the class.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if page.get("kind") != cls.__name__:
        raise InputError(f"the result in {path} is a {page.get('kind')}, not a {cls.__name__}")
    known, given = hints(cls), page["fields"]
    if odd := sorted(set(given) ^ set(known)):
        raise InputError(f"the result in {path} does not fit this version of {cls.__name__}: the fields {', '.join(odd)} differ")
    try:
        tensors = load(page["blob"])
    except SafetensorError as error:
        raise InputError(f"{path / _TENSORS} cannot be read: {error}") from None
    values = {k: typed(hint, given[k], f"{path}: {k}", tensors) for k, hint in known.items()}
    try:
        result = cls(**values)
        result.check()
    except ValueError as error:
        raise InputError(f"the result in {path} does not fit {cls.__name__}: {error}") from None
    object.__setattr__(result, "meta", page["meta"])
    if page.get("identity") != result.identity:
        raise InputError(f"the result in {path} is damaged: its provenance does not fit its identity")
    return result
