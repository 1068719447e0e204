"""The colours and what they mean."""

from __future__ import annotations

BASE = "#0072B2"
TUNED = "#D55E00"
FLOOR = "#BFBFBF"
INK = "#222222"
FAINT = "#595959"
GRID = "#E6E6E6"
LINE = "#9A9A9A"
PAPER = "#FFFFFF"
MISSING = "#EFE7D3"
WARNING = "#FFF4D6"
PANEL = "#F6F7F8"
LINK = "#005A8F"

OTHERS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#332288", "#882255")
"""For series that are neither base nor tuned, in this order."""

DIFFERENCE = ((0.0, "#08418A"), (0.25, "#5AA2D6"), (0.5, "#FFFFFF"), (0.75, "#F2955A"), (1.0, "#A33B00"))
"""Diverging map, centred on 0."""

MAGNITUDE = ((0.0, "#FFFFE5"), (0.2, "#C9E9B4"), (0.4, "#7BCBBC"), (0.6, "#3094C0"), (0.8, "#2255A4"), (1.0, "#0A1D58"))
"""Sequential map, light to dark, without grey."""

MARKERS = {"base": "circle", "tuned": "diamond"}
DASHES = {"base": "solid", "tuned": "dash"}
HATCHES = {"tuned": "/"}
_STROKES = ("solid", "dot", "dashdot", "longdash", "longdashdot", "dash")
_SYMBOLS = ("square", "triangle-up", "x", "star", "cross", "hexagon")


def colour(series: str, index: int = 0) -> str:
    """Colour of a series: base and tuned have their own; others take number ``index`` of the palette."""
    return {"base": BASE, "tuned": TUNED, "floor": FLOOR}.get(series, OTHERS[index % len(OTHERS)])


def symbol(series: str, index: int = 0) -> str:
    """Marker of a series, as for its colour."""
    return MARKERS.get(series, _SYMBOLS[_shifted(index) % len(_SYMBOLS)])


def dash(series: str, index: int = 0) -> str:
    """Stroke of a series, as for its colour."""
    return DASHES.get(series, _STROKES[_shifted(index) % len(_STROKES)])


def _shifted(index: int) -> int:
    """Where colours begin again, their markers and strokes are others than the first time."""
    return index + index // len(OTHERS)


def ranks(names: list[str]) -> dict[str, int]:
    """Name -> its number among the series that are neither base nor tuned."""
    others = [name for name in names if name not in MARKERS]
    return {name: others.index(name) if name in others else 0 for name in names}


def rgb(paint: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of ``#rrggbb``."""
    return int(paint[1:3], 16), int(paint[3:5], 16), int(paint[5:7], 16)


def faint(paint: str, alpha: float = 0.18) -> str:
    """A see-through version of a colour."""
    return f"rgba({','.join(map(str, rgb(paint)))},{alpha})"


def is_dark(paint: str) -> bool:
    """Whether white text reads better on it than black."""
    red, green, blue = rgb(paint)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def shade(value: float, low: float, high: float, difference: bool) -> str:
    """Colour of a value on the map between ``low`` and ``high``, as ``#rrggbb``."""
    stops = DIFFERENCE if difference else MAGNITUDE
    at = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5
    for (left, first), (right, second) in zip(stops, stops[1:], strict=False):
        if at <= right:
            mix = (at - left) / (right - left)
            return "#" + "".join(f"{round(a + (b - a) * mix):02x}" for a, b in zip(rgb(first), rgb(second), strict=True))
    return stops[-1][1]
