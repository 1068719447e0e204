"""What all figures share: the look, axes with labels, scales, the floor."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from interp.plots.colours import BASE, DIFFERENCE, FAINT, GRID, INK, LINE, MAGNITUDE, OTHERS, PAPER, TUNED
from interp.plots.text import escape, label, visible, whole_characters, wrap

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
HEIGHT = 420
TICKS = 48
"""Tick texts that fit beside each other at a width of 700 px."""

LINE_HEIGHT = 20
"""Pixels of one line of a title."""

_LEGEND, _NOTE, _UPRIGHT = 30, 20, 70  # pixels for a legend, for a note; characters of tick texts beside each other at 700 px


def template() -> go.layout.Template:
    """The look of all figures."""
    line = dict(
        gridcolor=GRID,
        zerolinecolor=LINE,
        linecolor=LINE,
        ticks="outside",
        tickcolor=LINE,
        automargin=True,
        exponentformat="power",
        minexponent=4,
    )
    title = dict(font=dict(size=15), x=0, xref="container", xanchor="left", y=1, yref="paper", yanchor="bottom", pad=dict(l=12))
    return go.layout.Template(
        layout=dict(
            font=dict(family=FONT, size=13, color=INK),
            title=title,
            paper_bgcolor=PAPER,
            plot_bgcolor=PAPER,
            colorway=[BASE, TUNED, *OTHERS],
            xaxis=line | dict(title=dict(standoff=8)),
            yaxis=line | dict(title=dict(standoff=8)),
            legend=dict(orientation="h", x=0, xanchor="left", y=1, yanchor="bottom"),
            hoverlabel=dict(font=dict(family=MONO, size=12), align="left"),
            margin=dict(l=56, r=24, t=24, b=48),
            colorscale=dict(diverging=[list(c) for c in DIFFERENCE], sequential=[list(c) for c in MAGNITUDE]),
        )
    )


def figure(
    *traces: Any,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    height: int = HEIGHT,
    xaxis: Mapping[str, Any] | None = None,
    yaxis: Mapping[str, Any] | None = None,
    note: str = "",
) -> go.Figure:
    """A figure of any traces in our look; it takes the width it is given.

    Args:
        traces: plotly traces, their texts already escaped.
        title: plain text, wrapped; so are the labels.
        xlabel: title of the horizontal axis, with its unit.
        ylabel: title of the vertical axis, with its unit.
        height: pixels.
        xaxis: further plotly settings of the horizontal axis, such as ``token_axis(tokens)``.
        yaxis: the same for the vertical axis.
        note: a few words in small print above the plot, at the right.
    """
    made = go.Figure(list(traces))
    legend = sum(t.showlegend is not False and bool(t.name) for t in traces) > 1
    text, above = wrap(title), _LEGEND if legend else _NOTE if note else 8
    below = text.count("<br>")  # lines below the first, whose baseline is what plotly puts in place
    top = above + 8 + (LINE_HEIGHT * (below + 1) if text else 0)
    made.update_layout(template=template(), height=height, autosize=True, showlegend=legend, margin=dict(t=top))
    made.update_layout(title=dict(text=text, pad=dict(b=above + LINE_HEIGHT * below)))
    made.update_xaxes(title_text=wrap(xlabel, 80), **_upright(xaxis or {}))
    made.update_yaxes(title_text=wrap(ylabel, 44), **(yaxis or {}))
    if note:
        corner = dict(xref="paper", yref="paper", x=1, y=1, xanchor="right", yanchor="bottom", showarrow=False)
        made.add_annotation(text=escape(note), font=dict(size=11, color=FAINT), **corner)
    return made


def _upright(xaxis: Mapping[str, Any]) -> dict[str, Any]:
    """Axis settings with tick texts that stand upright where they would not fit beside each other; plotly drops some otherwise."""
    texts = [html.unescape(text) for text in xaxis.get("ticktext", ())]
    crowded = sum(max(len(text), 2) + 1 for text in texts) > _UPRIGHT
    return {"tickangle": 90 if crowded else 0, **xaxis} if texts else dict(xaxis)


def axis(labels: Sequence[object], *, width: int = 24, limit: int | None = None, lines: int | None = None) -> dict[str, Any]:
    """Plotly axis settings for named entries at integer positions 0..n-1.

    Args:
        labels: of the entries.
        width: characters after which a label is cut.
        limit: how many tick texts are shown; more are thinned out.
        lines: characters after which a label goes on in a second line.
    """
    texts = [label(text, width) for text in labels]
    return _ticks([wrap(html.unescape(text), lines) if lines and len(html.unescape(text)) > lines else text for text in texts], limit)


def token_axis(tokens: Sequence[object], *, width: int = 14, limit: int | None = None) -> dict[str, Any]:
    """Plotly axis settings for tokens at integer positions 0..n-1, in a small monospaced font, whitespace visible."""
    return _ticks([visible(token, width) for token in whole_characters(tokens)], limit) | {"tickfont": dict(family=MONO, size=11)}


def count_axis(size: int) -> dict[str, Any]:
    """Plotly axis settings for positions 0..n-1 without names."""
    return {"range": [-0.5, size - 0.5], "showgrid": False, "zeroline": False, "tickformat": "d"} | (
        {"tick0": 0, "dtick": 1} if size <= 16 else {"nticks": 16}
    )


def _ticks(texts: list[str], limit: int | None) -> dict[str, Any]:
    step = 1 if limit is None else max(1, math.ceil(len(texts) / limit))
    shown = list(range(0, len(texts), step))
    ticks = {"tickmode": "array", "tickvals": shown, "ticktext": [texts[i] for i in shown]}
    return ticks | {"range": [-0.5, len(texts) - 0.5], "showgrid": False, "zeroline": False}


def array(values: Any) -> np.ndarray:
    """Tensors, lists and arrays as a float64 array."""
    return np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, dtype=np.float64)


def under_floor(values: np.ndarray, floor: Any) -> np.ndarray:
    """Which values are to be grey: below a number (or numbers, broadcast) in size, or marked by a boolean mask."""
    if floor is None:
        return np.zeros(values.shape, dtype=bool)
    given = np.asarray(floor.detach().cpu() if hasattr(floor, "detach") else floor)
    if given.dtype != bool:
        return np.abs(values) < given.astype(np.float64)
    if given.shape != values.shape:
        raise ValueError(f"the mask of the floor must have the shape {list(values.shape)} of the values, but it has {list(given.shape)}")
    return given & ~np.isnan(values)


def scale(values: np.ndarray, difference: bool | None, limits: tuple[float, float] | None) -> tuple[bool, float, float]:
    """Whether values get the diverging map (where they have both signs, unless said), and the ends of the map."""
    finite = values[np.isfinite(values)]
    signed = bool((finite < 0).any() and (finite > 0).any()) if difference is None else difference
    if limits is not None:
        return signed, *limits
    if signed:
        top = float(np.abs(finite).max(initial=0)) or 1.0
        return True, -top, top
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    return (False, low, high) if high > low else (False, 0.0, 1.0)


def hover_name(text: str, otherwise: str) -> str:
    """The name of an axis inside a hover template, where % and braces would be read as a place for a value."""
    return escape(text or otherwise).replace("%", "&#37;").replace("{", "&#123;")
