"""Names that users type: what stands between several, and the sentence for one that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from interp.errors import InputError

AND = " + "
"""Between the sets of prompts of a mixture: ``ioi + boxes``."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among the known ones.

    It lists the nearest names where some are near, all of them where none is.
    """
    names = list(known)
    near = {n.lower(): n for n in names}
    close = [near[n] for n in get_close_matches(name.lower(), near, n=3, cutoff=0.5)]
    tail = f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(names)}" if names else "there are none"
    return InputError(f"there is no {kind} named {name!r}; {tail}")
