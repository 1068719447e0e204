"""A text whose tokens are coloured by a value each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from interp.plots.colours import DIFFERENCE, FAINT, FLOOR, LINE, MAGNITUDE, is_dark, shade
from interp.plots.frame import FONT, MONO, array, scale, under_floor
from interp.plots.text import escape, visible, whole_characters


def coloured_tokens(
    tokens: Sequence[object],
    values: Any,
    *,
    difference: bool | None = None,
    limits: tuple[float, float] | None = None,
    floor: float | None = None,
    unit: str = "",
    title: str = "",
) -> str:
    """A text whose tokens are coloured by a value each, as a self-contained piece of HTML.

    Args:
        tokens: the tokens as they are; whitespace and newlines are made visible, everything is escaped.
        values: ``[token]``, shown on hovering; NaN stays without colour.
        difference: diverging map centred on 0; None: where the values have both signs.
        limits: ends of the map; give the same to texts that are compared. None: from the values.
        floor: tokens with |value| below it are grey.
        unit: what the values measure.
        title: one line above the text.

    Raises:
        ValueError: not one value per token.
    """
    numbers = array(values)
    if numbers.shape != (len(tokens),):
        raise ValueError(f"{len(tokens)} tokens need one value each, but the values have the shape {list(numbers.shape)}")
    grey = under_floor(numbers, floor)
    signed, low, high = scale(np.where(grey, np.nan, numbers), difference, limits)
    spans = []
    for i, (token, value, under) in enumerate(zip(whole_characters(tokens), numbers, grey, strict=True)):
        paint = FLOOR if under else None if math.isnan(value) else shade(value, low, high, signed)
        said = f"{i}: {visible(token)}"
        said += "" if math.isnan(value) else f"\n{value:.4g} {escape(unit)}".rstrip() + (" (under the floor)" if under else "")
        spans.append(_span(str(token), paint, said))
    head = f'<div style="font:600 13px {FONT};margin:2px 0">{escape(title)}</div>' if title else ""
    key = _key(low, high, signed, unit, bool(grey.any()))
    text = f'<div style="font:13px/1.9 {MONO};overflow-wrap:anywhere">{"".join(spans)}</div>'
    return f'<div class="tokens" style="margin:8px 0">{head}{key}{text}</div>'


def _span(token: str, paint: str | None, said: str) -> str:
    look = "" if paint is None else f"background:{paint};color:{'#fff' if is_dark(paint) else '#111'};print-color-adjust:exact;"
    shown = visible(token).replace("·", '<span style="opacity:.45">·</span>')
    box = "padding:2px 1px;border-radius:2px;-webkit-box-decoration-break:clone;box-decoration-break:clone"
    return f'<span title="{said}" style="{look}{box}">{shown}</span>' + ("<br>" * token.count("\n") or "<wbr>")


def _key(low: float, high: float, signed: bool, unit: str, grey: bool) -> str:
    """The colours and the values at their ends."""
    stops = ",".join(f"{paint} {100 * at:.0f}%" for at, paint in (DIFFERENCE if signed else MAGNITUDE))
    box = "display:inline-block;width:120px;height:10px;vertical-align:-1px;print-color-adjust:exact"
    bar = f'<span style="{box};border:1px solid {LINE};background:linear-gradient(90deg,{stops})"></span>'
    note = "; grey: under the floor" if grey else ""
    return f'<div style="font:12px {FONT};color:{FAINT};margin:2px 0 6px">{low:.3g} {bar} {high:.3g} {escape(unit)}{note}</div>'
