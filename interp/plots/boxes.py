"""Values group by group: every one as a point, their spread as a box, their mean with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from interp.plots.colours import FLOOR, INK, colour, faint, ranks
from interp.plots.frame import array, axis, figure, hover_name
from interp.plots.text import escape, label

_ROW = 46


def boxes(
    groups: Mapping[str, Any],
    *,
    means: Mapping[str, tuple[float, float, float]] | None = None,
    labels: Mapping[str, list[str]] | None = None,
    title: str = "",
    xlabel: str = "",
    floor: float | None = None,
) -> go.Figure:
    """One lying box per group, with its points above it, the first group on top.

    Args:
        groups: name -> values ``[point]``; the number of points stands beside the name.
        means: name -> mean and the ends of its interval, a bar in ink.
        labels: name -> text of each point, shown on hovering.
        title: plain text, as are all labels.
        xlabel: title of the horizontal axis, with its unit.
        floor: numerical floor, a grey stripe up to it.
    """
    number, traces = ranks(list(groups)), []
    for row, (name, values) in enumerate(groups.items()):
        across, paint = array(values), colour(name, number[name])
        told = [label(text, 80) for text in labels[name]] if labels else [label(name)] * len(across)
        shown = dict(customdata=told, hovertemplate=f"%{{customdata}}<br>{hover_name(xlabel, 'value')}: %{{x:.4g}}<extra></extra>")
        dots = dict(boxpoints="all", pointpos=0, jitter=0.7, marker=dict(color=paint, size=5, opacity=0.6), hoveron="points")
        look = dict(line=dict(color=paint, width=1.5), fillcolor=faint(paint, 0.12), width=0.62, showlegend=False)
        traces.append(go.Box(x=across, y=[row] * len(across), orientation="h", name=escape(name), **dots, **look, **shown))
    if means:
        traces.append(_means(list(groups), means, xlabel))
    names = [f"{name} (n = {len(values)})" for name, values in groups.items()]
    rows = axis(names, width=44)
    rows["range"] = [len(names) - 0.5, -0.5]
    made = figure(*traces, title=title, xlabel=xlabel, height=130 + _ROW * len(names), yaxis=rows)
    if floor:
        made.add_vrect(x0=0, x1=floor, fillcolor=FLOOR, opacity=0.5, line_width=0, layer="below")
    return made


def _means(names: list[str], means: Mapping[str, tuple[float, float, float]], xlabel: str) -> go.Scatter:
    value, low, high = (array([means[name][i] for name in names]) for i in range(3))
    ends = dict(type="data", symmetric=False, array=high - value, arrayminus=value - low, color=INK, thickness=2, width=7)
    told = [f"mean of {label(n)}: {v:.4g} [{a:.4g}, {b:.4g}]" for n, v, a, b in zip(names, value, low, high, strict=True)]
    return go.Scatter(
        x=value,
        y=list(range(len(names))),
        mode="markers",
        marker=dict(color=INK, symbol="diamond", size=8),
        error_x=ends,
        name=f"mean {escape(xlabel)}",
        showlegend=False,
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
    )
