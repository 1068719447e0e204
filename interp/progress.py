"""Progress of long work: bars on stderr when somebody watches, and where its finished parts are kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

_UNFINISHED: ContextVar[Path | None] = ContextVar("unfinished", default=None)
_FILES: ContextVar[list[Path] | None] = ContextVar("files", default=None)


def progress(items: Iterable[T], desc: str, total: int | None = None, unit: str = "it") -> Iterable[T]:
    """Go through items under a progress bar; silent when stderr is not watched (a log file, a test)."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(items, desc=desc, total=total, unit=unit, file=sys.stderr, disable=not watched, leave=False)


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Long work inside keeps its finished parts in a folder; run again after a kill, it goes on from them.

    What ``unfinished_file`` named inside is removed when all of it is done.
    """
    files: list[Path] = []
    tokens = _UNFINISHED.set(folder), _FILES.set(files)
    try:
        yield
        for file in files:
            file.unlink(missing_ok=True)
        if files and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    finally:
        _UNFINISHED.reset(tokens[0])
        _FILES.reset(tokens[1])


def unfinished() -> Path | None:
    """The folder of the finished parts of long work, None where nobody keeps them."""
    return _UNFINISHED.get()


def unfinished_file(name: str) -> Path | None:
    """A file there, until the work around is done; None where nobody keeps it."""
    folder, files = _UNFINISHED.get(), _FILES.get()
    if folder is None or files is None:
        return None
    files.append(folder / name)
    return folder / name
