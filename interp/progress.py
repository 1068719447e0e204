"""Progress bars: on stderr, only when somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], desc: str, total: int | None = None, unit: str = "it") -> Iterable[T]:
    """Go through items under a progress bar; silent when stderr is not watched (a log file, a test)."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(items, desc=desc, total=total, unit=unit, file=sys.stderr, disable=not watched, leave=False)
