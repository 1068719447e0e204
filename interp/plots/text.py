"""Text that plotly and HTML show as it is."""

from __future__ import annotations

import textwrap
import unicodedata

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
