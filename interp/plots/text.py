"""Text that plotly and HTML show as it is."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Sequence

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;", "$": "&#36;"})  # plotly knows no &quot;
_SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # among them the marks that turn the direction of writing
_KEPT = "\n\t\u200c\u200d"  # joiners belong to emoji and to some scripts


def escape(text: object) -> str:
    """Text for plotly and HTML: no markup, no entities, no TeX; hidden characters spelled out."""
    plain = "".join(_spelled(c) if c not in _KEPT and unicodedata.category(c) in _HIDDEN else c for c in str(text))
    return plain.translate(_ENTITIES)


def _spelled(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")


def whole_characters(tokens: Sequence[object]) -> list[str]:
    """Tokens of a running text in which characters that are cut into bytes are put together again.

    Neighbours such as ``<0xF0><0x9F>``, ``<0x98>``, ``<0x80>`` that make up characters become the characters at the first of
    them and ``…`` at the others; bytes that make up none stay as they are.
    """
    shown = [str(t) for t in tokens]
    at = 0
    while at < len(shown):
        # A character has at most four bytes, so four neighbours are enough to look at.
        for stop in range(at + 1, min(at + 4, len(shown)) + 1):
            if not _BYTES.fullmatch(shown[stop - 1]):
                break
            try:
                text = bytes.fromhex("".join(shown[at:stop]).replace("<0x", "").replace(">", "")).decode("utf-8")
            except UnicodeDecodeError:
                continue
            shown[at:stop] = [text] + ["…"] * (stop - at - 1)
            at = stop - 1
            break
        at += 1
    return shown


def visible(token: object, width: int | None = None) -> str:
    """A token for display, escaped: spaces, tabs and newlines visible, an empty one as ∅, cut to ``width`` characters."""
    return escape(_cut(str(token).translate(_SIGNS) or "∅", width))


def label(text: object, width: int | None = None) -> str:
    """A label that is not a token: escaped, on one line, cut to ``width`` characters; spaces stay spaces."""
    return escape(_cut(str(text).replace("\n", "↵"), width))


def _cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def wrap(text: object, width: int = 60) -> str:
    """Escaped text on lines of at most ``width`` characters, broken with ``<br>``."""
    return "<br>".join(escape(line) for line in textwrap.wrap(str(text), width))
