"""How many prompts fit into one pass: found by trying, backing off when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from interp.errors import InputError

T = TypeVar("T")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


class Budget:
    """Bytes that one pass may use for activations; halves when a pass runs out of memory."""

    def __init__(self, size: int | None = None) -> None:
        """Begin with 256 MiB where there is a GPU to keep busy; on a CPU 64 MiB are faster, as its caches are small."""
        self.size = size or (2**28 if torch.cuda.is_available() else 2**26)

    def rows(self, bytes_per_row: int) -> int:
        """Prompts per pass, at least one."""
        return max(1, self.size // max(1, bytes_per_row))

    def attempt(self, run: Callable[[], T], rows: int) -> tuple[bool, T | None]:
        """Run a pass; (False, None) when memory ran out and a smaller one is worth trying.

        Raises:
            InputError: one prompt alone does not fit.
        """
        try:
            return True, run()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if rows == 1:
                raise InputError("memory ran out on a single prompt; use shorter prompts, a smaller dtype, or fewer sites") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = max(1, self.size // 2)
        return False, None
