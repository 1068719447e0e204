"""What models write, side by side: where they part is marked, what is common is faint, tokens can be coloured by a value each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from interp.plots.colours import FAINT, FLOOR, GRID, INK, LINE, PANEL, is_dark, shade
from interp.plots.frame import FONT, array, under_floor
from interp.plots.text import escape, visible, whole_characters

_TEXT = f"font:15px/1.6 {FONT};white-space:pre-wrap;overflow-wrap:anywhere"
_CLONE = "-webkit-box-decoration-break:clone;box-decoration-break:clone;print-color-adjust:exact"


def marked_text(tokens: Sequence[object], *, ended: bool, same: int = 0, mark: int | None = None, paint: str = INK, note: str = "") -> str:
    """A text as it reads, its beginning faint and one token boxed.

    Args:
        tokens: as they are; everything is escaped.
        ended: the writer ended it; otherwise it was cut off.
        same: so many tokens at the beginning are faint.
        mark: the token in the box; one behind the last is the end.
        paint: colour of the box.
        note: plain text shown on hovering over the box.
    """
    shown = [escape(t) for t in whole_characters(tokens)]
    same = len(shown) if mark is None and same > len(shown) else same
    box = f"border:2px solid {paint};border-radius:3px;padding:0 2px;{_CLONE}"
    pieces = [f'<span style="color:{FAINT};opacity:.75">{"".join(shown[:same])}</span>' if same and shown else ""]
    rest = shown[same:]
    if mark is not None and mark < len(shown):
        whole = whole_characters(tokens)[mark]
        inside = visible(whole) if not whole.strip() else escape(whole)
        rest = [*shown[same:mark], f'<span style="{box}" title="{escape(note)}">{inside}</span>', *shown[mark + 1 :]]
    pieces += rest
    if ended:
        here = mark is not None and mark >= len(shown)
        style = f"{box};color:{FAINT}" if here else f"color:{FAINT}"
        pieces.append(f' <span style="{style};font-size:12px" title="{escape(note) if here else ""}">end</span>')
    else:
        pieces.append(f'<span style="color:{FAINT}"> …</span>')
    return f'<div style="{_TEXT}">{"".join(pieces)}</div>'


def shaded_text(tokens: Sequence[object], values: Any, *, top: float, floor: float, unit: str, ended: bool) -> str:
    """A text as it reads, every token on the colour of its value between ``-top`` and ``top``; below the floor it is grey.

    Args:
        tokens: as they are; everything is escaped.
        values: ``[token]``, shown on hovering; NaN stays without colour.
        top: the value of the strongest colour.
        floor: tokens with |value| below it are grey.
        unit: what the values measure.
        ended: the writer ended it; otherwise it was cut off.
    """
    numbers = array(values)
    spans = []
    for token, value, under in zip(whole_characters(tokens), numbers, under_floor(numbers, floor), strict=True):
        paint = FLOOR if under else None if math.isnan(value) else shade(value, -top, top, True)
        said = "" if math.isnan(value) else f"{visible(token)}\n{value:+.3g} {escape(unit)}" + (" (under the floor)" if under else "")
        look = "" if paint is None else f"background:{paint};color:{'#fff' if is_dark(paint) else '#111'};border-radius:2px;{_CLONE}"
        spans.append(f'<span style="{look}" title="{said}">{escape(token)}</span>')
    close = '<span style="font-size:12px"> end</span>' if ended else " …"
    return f'<div style="{_TEXT}">{"".join(spans)}<span style="color:{FAINT}">{close}</span></div>'


def shades_key(top: float, low: str, high: str) -> str:
    """Which colour means what: ``-top`` and ``top`` with a few words each."""
    box = "display:inline-block;width:22px;height:11px;print-color-adjust:exact"
    boxes = "".join(f'<span style="{box};background:{shade(at, -1, 1, True)}"></span>' for at in (-1, -0.5, 0, 0.5, 1))
    frame = f'<span style="display:inline-block;border:1px solid {LINE};line-height:0;vertical-align:-1px">{boxes}</span>'
    return f'<span style="white-space:nowrap">{escape(low)} ({-top:.2g})</span> {frame} <span>{escape(high)} (+{top:.2g})</span>'


def side_by_side(cells: Sequence[tuple[str, str, str]]) -> str:
    """Boxes beside each other where there is room, else one below the other.

    Args:
        cells: heading, colour of the line above, and content, which is HTML already.
    """
    made = "".join(
        f'<div style="border-top:3px solid {paint};background:{PANEL};padding:4px 10px 8px;min-width:0">'
        f'<div style="font:600 12px {FONT};color:{FAINT};margin:2px 0">{escape(heading)}</div>{content}</div>'
        for heading, paint, content in cells
    )
    return f'<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:8px;margin:6px 0">{made}</div>'


def asked_text(text: str, width: int = 400) -> str:
    """A prompt: the end of it, where it is long."""
    shown = text if len(text) <= width else "… " + text[-width:]
    return f'<div style="{_TEXT};border-left:4px solid {GRID};padding:2px 0 2px 10px;margin:4px 0;color:{INK}">{escape(shown)}</div>'
