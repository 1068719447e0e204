"""Saved results in one folder: ``results/<analysis>/<first 8 digits of the identity>/``.

A folder of results may come from a stranger: only our own analyses are imported for it, and nothing in it
can make a checkpoint run code.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from interp import analyses, progress
from interp.errors import InputError
from interp.result_files import is_result, read, restore
from interp.results import Analysis, Meta, Result

P = ParamSpec("P")
R = TypeVar("R", bound=Result)
PathLike = str | os.PathLike[str]

ROOT = "results"
_DIGITS = (8, 64)  # the long name is for two identities that begin alike


def save(result: Result, root: PathLike = ROOT) -> Path:
    """Save a result in its folder under ``root``; the same result saved before is replaced.

    Raises:
        InputError: the folder cannot be written.
    """
    identity = result.identity
    for digits in _DIGITS:
        folder = Path(root) / result.meta.analysis / identity[:digits]
        if not is_result(folder) or read(folder)["identity"] == identity:
            break
    return result.save(folder)


def find(analysis: str, identity: str, root: PathLike = ROOT) -> Path | None:
    """The folder of a saved result, None when it is not there.

    Raises:
        InputError: the folder is there but damaged.
    """
    for digits in _DIGITS:
        folder = Path(root) / analysis / identity[:digits]
        if is_result(folder) and read(folder)["identity"] == identity:
            return folder
    return None


def keeping(root: PathLike = ROOT) -> AbstractContextManager[None]:
    """Sweeps inside keep finished cells under ``root`` and go on from them when a killed run is started again."""
    return progress.keeping(Path(root) / ".unfinished")


def cached(function: Analysis[P, R], root: PathLike = ROOT) -> Callable[P, R]:
    """The analysis with a memory: ``cached(head_svd)(model, rank=4)`` computes only what is not yet under ``root``.

    A call with a function of the user's as a setting always computes, as two functions may look alike.

    Raises:
        InputError: ``root`` cannot be written, or holds a damaged result.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        meta = function.describe(*args, **kwargs)
        folder = None if meta.user_functions else find(meta.analysis, meta.identity, root)
        if folder is not None:
            return load(folder)  # type: ignore[return-value]
        with keeping(root):
            result = function(*args, **kwargs)
            save(result, root)
        return result

    return call


def load(folder: PathLike) -> Result:
    """Read a saved result of any of our analyses.

    Warns when the analysis has a newer version than the result.

    Raises:
        InputError: no result folder, a damaged one, or a result of an analysis (or of a version of it) that is not known here.
    """
    path, page = Path(folder), read(folder)
    meta: Meta = page["meta"]
    function = _function(meta, path)
    if meta.version > function.version:
        raise InputError(f"{path} was made by version {meta.version} of {meta.analysis}, but this interp has version {function.version}")
    if meta.version < function.version:
        warnings.warn(f"{path} was made by version {meta.version} of {meta.analysis}, now it is {function.version}", stacklevel=2)
    module = sys.modules[function.__wrapped__.__module__]
    kind = getattr(module, str(page.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, Result) and kind.__module__ == module.__name__):
        raise InputError(f"{path} holds a {page.get('kind')}, which {meta.analysis} does not return")
    return restore(kind, page, path)


def _function(meta: Meta, path: Path) -> Analysis[..., Any]:
    if meta.analysis not in analyses.ANALYSES:
        raise InputError(f"{path} is a result of {meta.analysis[:60]!r}, which is not an analysis of this version of interp")
    return analyses.find(meta.analysis)  # type: ignore[return-value]


def saved(root: PathLike = ROOT) -> list[Path]:
    """The folders of the results under a folder, or that folder itself if it is a result; in the order of their names.

    Raises:
        InputError: there is no such folder, or no result in it.
    """
    top = Path(root)
    if is_result(top):
        return [top]
    if not top.is_dir():
        raise InputError(f"{top} is not a folder of results: it {'is a file' if top.exists() else 'does not exist'}")
    inside = (p.parent for p in top.rglob("result.json") if not any(part.startswith(".") for part in p.relative_to(top).parts))
    found = sorted(p for p in inside if is_result(p))
    if not found:
        raise InputError(f"{top} holds no saved results: a result is a folder with result.json and tensors.safetensors")
    return found


def replay(folder: PathLike) -> list[str]:
    """The command that computes a saved result again, as words; ``shlex.join`` makes one line of them.

    The words contain one of our analyses, names of models and inputs, and settings that the analysis has;
    nothing else from the folder gets into them, and every value is attached to its flag.

    Raises:
        InputError: no result folder, or a result that a command cannot repeat; the message says why.
    """
    path, page = Path(folder), read(folder)
    meta: Meta = page["meta"]
    parameters = set(inspect.signature(_function(meta, path)).parameters)
    named = set(meta.settings) | {i["parameter"] for i in meta.inputs}
    if odd := sorted(named - parameters):
        raise InputError(f"{path} cannot be replayed: {meta.analysis} has no parameter {odd[0][:60]!r}")
    if odd := sorted({m["side"] for m in meta.models} - {"base", "tuned", "model"}):
        raise InputError(f"{path} cannot be replayed: a model is called {odd[0][:60]!r} instead of base, tuned or model")
    if meta.obstacles:
        raise InputError(f"{path} cannot be replayed: {meta.obstacles[0]}")
    return meta.command()
