"""Heatmaps, lines, bars and points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from interp.plots.colours import (
    BASE,
    DIFFERENCE,
    FLOOR,
    HATCHES,
    INK,
    LINE,
    MAGNITUDE,
    MISSING,
    PAPER,
    colour,
    dash,
    faint,
    ranks,
    symbol,
)
from interp.plots.frame import HEIGHT, TICKS, array, axis, count_axis, figure, hover_name, scale, token_axis, under_floor
from interp.plots.text import escape, label, visible

Labels = Sequence[object]
Interval = tuple[Any, Any]
FEW = 16
"""Whole numbers along an axis up to which each has a tick."""


def heatmap(
    z: Any,
    x: Labels | None = None,
    y: Labels | None = None,
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    unit: str = "",
    floor: Any = None,
    difference: bool | None = None,
    tokens: str = "",
    limits: tuple[float, float] | None = None,
    height: int | None = None,
) -> go.Figure:
    """Coloured cells, row 0 on top.

    Args:
        z: ``[row, column]``; NaN cells stay empty.
        x: labels of the columns, in order; equal labels are fine. None: 0..n-1.
        y: labels of the rows. None: 0..n-1.
        title: plain text, as are all labels.
        xlabel: what the columns are.
        ylabel: what the rows are.
        unit: what the colour measures, as in "nats".
        floor: a number (cells with |z| below it are grey), or a boolean array like ``z`` (True is grey).
        difference: diverging map centred on 0; None: where ``z`` has both signs.
        tokens: axes whose labels are tokens: "x", "y" or "xy".
        limits: ends of the colour map; None: from the cells above the floor.
        height: pixels; None: by the number of rows.

    Raises:
        ValueError: ``z`` is no matrix, or the labels are not as many as its rows and columns.
    """
    cells = array(z)
    if cells.ndim != 2:
        raise ValueError(f"a heatmap needs values [row, column], but they have the shape {list(cells.shape)}")
    for name, labels, size in (("y", y, cells.shape[0]), ("x", x, cells.shape[1])):
        if labels is not None and len(labels) != size:
            raise ValueError(f"the axis {name} of a heatmap of {list(cells.shape)} cells needs {size} labels, but it has {len(labels)}")
    grey = under_floor(cells, floor)
    notes = [f"colour: {unit}"] * bool(unit) + ["grey: under the floor"] * bool(grey.any())
    blank = bool(np.isnan(cells).any())
    notes += ["beige: no value"] * blank
    hover = _places(cells.shape, x, y, xlabel or "column", ylabel or "row", tokens)
    made = figure(
        *_cells(cells, grey, hover, difference, limits),
        title=title,
        xlabel=xlabel,
        ylabel=ylabel,
        height=height or _height(cells.shape[0], x, y),
        xaxis=_side(x, cells.shape[1], "x" in tokens, TICKS),
        yaxis=_side(y, cells.shape[0], "y" in tokens, None) | {"range": [cells.shape[0] - 0.5, -0.5]},
        note="; ".join(notes),
    )
    if blank:  # white would look like a value of 0
        made.update_layout(plot_bgcolor=MISSING)
    return made


def _cells(cells: np.ndarray, grey: np.ndarray, hover: np.ndarray, difference: bool | None, limits: Any) -> list[go.Heatmap]:
    """One trace for the cells with a colour, one for those under the floor."""
    live = np.where(grey, np.nan, cells)
    signed, low, high = scale(live, difference, limits)
    bar = dict(thickness=14, len=1, outlinewidth=0, exponentformat="power", minexponent=4)
    gap = dict(xgap=1 if cells.shape[1] <= 64 else 0, ygap=1 if cells.shape[0] <= 64 else 0, hoverongaps=False)
    shown = "%{customdata}<br>value: %{z:.4g}<extra></extra>"
    paints = [list(stop) for stop in (DIFFERENCE if signed else MAGNITUDE)]
    traces = [go.Heatmap(z=live, zmin=low, zmax=high, colorscale=paints, colorbar=bar, customdata=hover, hovertemplate=shown, **gap)]
    if grey.any():
        told = np.array([f"{h}<br>value: {v:.4g} (under the floor)" for h, v in zip(hover.flat, cells.flat, strict=True)], dtype=object)
        flat = dict(colorscale=[[0, FLOOR], [1, FLOOR]], showscale=False, hovertemplate="%{customdata}<extra></extra>")
        traces.append(go.Heatmap(z=np.where(grey, 0.0, np.nan), customdata=told.reshape(cells.shape), **flat, **gap))
    return traces


def _places(shape: tuple[int, ...], x: Labels | None, y: Labels | None, xlabel: str, ylabel: str, tokens: str) -> np.ndarray:
    """Hover text of each cell: which row and which column."""
    rows, columns = _names(y, shape[0], "y" in tokens), _names(x, shape[1], "x" in tokens)
    up, across = label(ylabel, 40), label(xlabel, 40)
    return np.array([[f"{up} {r}<br>{across} {c}" for c in columns] for r in rows], dtype=object).reshape(shape)


def _names(labels: Labels | None, size: int, tokens: bool) -> list[str]:
    if labels is None:
        return [str(i) for i in range(size)]
    return [f"{i}: {visible(text, 40) if tokens else label(text, 60)}" for i, text in enumerate(labels)]


def _side(labels: Labels | None, size: int, tokens: bool, limit: int | None) -> dict[str, Any]:
    if labels is None:
        return count_axis(size)
    return token_axis(labels, limit=limit) if tokens else axis(labels, limit=limit)


def _height(rows: int, x: Labels | None, y: Labels | None) -> int:
    """Pixels for rows that can be read, with room for column labels that stand upright."""
    below = 6 * min(max((len(str(text)) for text in x or ()), default=0), 24)
    return int(min(max(150 + rows * (17 if y is not None else 13), 240) + below, 4000 if y is not None else 900))


def lines(
    series: Mapping[str, Any],
    x: Any = None,
    *,
    bands: Mapping[str, Interval] | None = None,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    floor: float | None = None,
    tokens: Labels | None = None,
    labels: Labels | None = None,
    height: int = HEIGHT,
) -> go.Figure:
    """Lines with error bands.

    Args:
        series: name -> values ``[x]``; "base" and "tuned" have their own colour, marker and dash.
        x: numeric positions; None: 0..n-1.
        bands: name -> (low, high) for the series that have an interval.
        title: plain text, as are all labels.
        xlabel: title of the horizontal axis, with its unit.
        ylabel: title of the vertical axis, with its unit.
        floor: numerical floor, a grey stripe around 0.
        tokens: the token at each position 0..n-1.
        labels: what stands at each position 0..n-1, where it is no token.
        height: pixels.
    """
    number = ranks(list(series))
    named = tokens if tokens is not None else labels
    traces: list[Any] = []
    for name, values in series.items():
        heights = array(values)
        places = np.arange(len(heights)) if x is None else array(x)
        paint = colour(name, number[name])
        if bands and name in bands:
            traces += _band(places, array(bands[name][0]), array(bands[name][1]), paint, name)
        where = f"{hover_name(xlabel, 'x')} %{{x}}" if named is None else "%{customdata}"
        look = dict(line=dict(color=paint, width=2, dash=dash(name, number[name])), marker=dict(symbol=symbol(name, number[name]), size=6))
        traces.append(
            go.Scatter(
                x=places,
                y=heights,
                name=escape(name),
                mode="lines+markers" if len(heights) <= 80 else "lines",
                legendgroup=escape(name),
                customdata=None if named is None else _names(named, len(named), tokens is not None),
                hovertemplate=f"{hover_name(name, 'value')}<br>{where}<br>%{{y:.4g}}<extra></extra>",
                **look,
            )
        )
    below = _whole(traces) if named is None else _side(named, len(named), tokens is not None, TICKS)
    made = figure(*traces, title=title, xlabel=xlabel, ylabel=ylabel, height=height, xaxis=below)
    if floor:
        made.add_hrect(y0=-floor, y1=floor, fillcolor=FLOOR, opacity=0.5, line_width=0, layer="below")
    return made


def _whole(traces: Sequence[Any]) -> dict[str, Any] | None:
    """A tick at every position, where these are whole numbers and few: a layer has no half."""
    places = np.concatenate([np.asarray(trace.x, dtype=np.float64) for trace in traces]) if traces else np.zeros(0)
    whole = len(places) > 0 and bool(np.all(places == np.round(places)))
    return {"dtick": 1, "tick0": 0, "tickformat": "d"} if whole and np.ptp(places) <= FEW else None


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, paint: str, name: str) -> list[go.Scatter]:
    """A band as one closed outline per stretch without NaN."""
    there = np.isfinite(low) & np.isfinite(high)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], there.astype(int), [0]])))
    look = dict(fill="toself", fillcolor=faint(paint), line=dict(width=0), mode="lines", hoverinfo="skip", showlegend=False)
    made = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        outline = [np.concatenate([v[start:stop], w[start:stop][::-1]]) for v, w in ((x, x), (high, low))]
        made.append(go.Scatter(x=outline[0], y=outline[1], legendgroup=escape(name), **look))
    return made


def bars(
    labels: Labels,
    series: Mapping[str, Any],
    *,
    intervals: Mapping[str, Interval] | None = None,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    reference: float | None = None,
    reference_label: str = "",
    floor: float | None = None,
    horizontal: bool | None = None,
    tokens: bool = False,
    height: int | None = None,
) -> go.Figure:
    """Bars side by side, with intervals.

    Args:
        labels: one per group of bars; equal labels are fine.
        series: name -> values ``[label]``.
        intervals: name -> (low, high), the ends of the interval, not the distances.
        title: plain text, as are all labels.
        xlabel: what the labels are (also where they stand at the side).
        ylabel: what the values are, with the unit.
        reference: a line across, such as chance.
        reference_label: text at that line.
        floor: bars with |value| below it are grey.
        horizontal: the bars lie; None: where the labels are many or long.
        tokens: the labels are tokens.
        height: pixels; None: by the number of bars.

    Raises:
        ValueError: a series has another number of values than there are labels.
    """
    names = [str(text) for text in labels]
    lying = (len(names) > 12 or sum(map(len, names)) > 60) if horizontal is None else horizontal
    number = ranks(list(series))
    traces: list[go.Bar] = []
    for name, values in series.items():
        sizes = array(values)
        if len(sizes) != len(names):
            raise ValueError(f"the series {name!r} has {len(sizes)} values for {len(names)} labels")
        ends = None if not intervals or name not in intervals else intervals[name]
        grey = under_floor(sizes, floor)
        traces += _bar(name, sizes, ends, grey, colour(name, number[name]), lying, _names(names, len(names), tokens))
    side = token_axis(names, width=24) if tokens else axis(names, width=72 if lying else 30, lines=36 if lying else None)
    if lying:
        tall = height or int(min(max(130 + 18 * len(names) * len(series) + 8 * len(names), 220), 4000))
        side["range"] = [len(names) - 0.5, -0.5]
        made = figure(*traces, title=title, xlabel=ylabel, ylabel=xlabel, height=tall, yaxis=side)
    else:
        made = figure(*traces, title=title, xlabel=xlabel, ylabel=ylabel, height=height or HEIGHT, xaxis=side)
        if made["layout"]["xaxis"]["tickangle"] == 90 and not height:  # the labels stand upright, and take nothing from the bars
            made.update_layout(height=HEIGHT + 6 * min(max(map(len, names)), 30))
    made.update_layout(barmode="group", bargap=0.25)
    if reference is not None:
        _reference(made, reference, reference_label, lying)
    return made


def _bar(name: str, sizes: np.ndarray, ends: Interval | None, grey: np.ndarray, paint: str, lying: bool, names: list[str]) -> list[go.Bar]:
    """The bars of a series, those under the floor grey; the legend keeps the colour of the series."""
    whiskers, span = None, [""] * len(sizes)
    if ends is not None:
        low, high = array(ends[0]), array(ends[1])
        whiskers = dict(type="data", symmetric=False, array=high - sizes, arrayminus=sizes - low, color=INK, thickness=1.5, width=4)
        span = [f" [{a:.4g}, {b:.4g}]" for a, b in zip(low, high, strict=True)]
    at = np.arange(len(sizes))
    place = dict(y=at, x=sizes, error_x=whiskers, orientation="h") if lying else dict(x=at, y=sizes, error_y=whiskers)
    told = [f"{escape(name)}<br>{n}<br>{v:.4g}{s}" for n, v, s in zip(names, sizes, span, strict=True)]
    same = dict(name=escape(name), legendgroup=escape(name), offsetgroup=escape(name), orientation="h" if lying else "v")
    hatch = dict(shape=HATCHES.get(name, ""), fgcolor=PAPER, fillmode="overlay", size=6, solidity=0.15)
    paints = [FLOOR if g else paint for g in grey] if grey.any() else paint
    shown = dict(customdata=told, hovertemplate="%{customdata}<extra></extra>", showlegend=not grey.any())
    drawn = go.Bar(**place | same | shown, marker=dict(color=paints, pattern=hatch))
    return [drawn] if not grey.any() else [go.Bar(x=[None], y=[None], **same, marker=dict(color=paint, pattern=hatch)), drawn]


def _reference(made: go.Figure, at: float, text: str, lying: bool) -> None:
    look: dict[str, Any] = dict(
        line_dash="dot",
        line_color=INK,
        line_width=1.5,
        annotation_text=escape(text),
        annotation_font_size=11,
        annotation_bgcolor=faint(PAPER, 0.8),
    )
    if lying:
        made.add_vline(x=at, annotation_position="bottom right", **look)
    else:
        made.add_hline(y=at, annotation_position="top right", **look)


def scatter(
    x: Any,
    y: Any,
    *,
    labels: Labels | None = None,
    groups: Sequence[str] | None = None,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    diagonal: bool = False,
    height: int = HEIGHT,
) -> go.Figure:
    """Points.

    Args:
        x: ``[point]``.
        y: ``[point]``.
        labels: text of each point, shown on hovering.
        groups: name of each point's group, which gives colour, marker and legend.
        title: plain text, as are all labels.
        xlabel: title of the horizontal axis, with its unit.
        ylabel: title of the vertical axis, with its unit.
        diagonal: draw y = x.
        height: pixels.
    """
    across, up = array(x), array(y)
    owners = [""] * len(across) if groups is None else [str(g) for g in groups]
    told = np.array([str(i) for i in range(len(across))] if labels is None else [label(text, 80) for text in labels], dtype=object)
    number = ranks(list(dict.fromkeys(owners)))
    shown = f"%{{customdata}}<br>{hover_name(xlabel, 'x')}: %{{x:.4g}}<br>{hover_name(ylabel, 'y')}: %{{y:.4g}}<extra></extra>"
    traces = []
    for name, rank in number.items():
        here = np.array([owner == name for owner in owners], dtype=bool)
        look = dict(color=colour(name, rank) if name else BASE, symbol=symbol(name, rank) if name else "circle", size=7, opacity=0.75)
        points = dict(x=across[here], y=up[here], customdata=told[here])
        traces.append(go.Scatter(**points, mode="markers", name=escape(name) or None, marker=look, hovertemplate=shown))
    made = figure(*traces, title=title, xlabel=xlabel, ylabel=ylabel, height=height)
    both = np.concatenate([across, up])
    both = both[np.isfinite(both)]
    if diagonal and both.size:
        ends = dict(x0=both.min(), y0=both.min(), x1=both.max(), y1=both.max())
        made.add_shape(type="line", line=dict(color=LINE, dash="dot", width=1), layer="below", **ends)
    return made
