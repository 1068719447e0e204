"""A circuit as a layered graph: layers from bottom to top, the tokens of the prompt side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from interp.plots.colours import FAINT, INK, LINE, OTHERS, PAPER, faint, is_dark, rgb
from interp.plots.frame import figure
from interp.plots.text import escape, label

if TYPE_CHECKING:
    from interp.circuit import Circuit, Edge
    from interp.sites import Site

_KINDS = {"q": "into q", "k": "into k", "v": "into v", "resid_mid": "into an MLP", "resid_post": "into the logits"}
_PAINTS = {"q": "#0072B2", "k": "#CC79A7", "v": "#009E73", "resid_mid": "#E69F00", "resid_post": INK}
_STEPS = (0.25, 0.5, 0.75, 1.0)  # edges are drawn in so many widths
_WIDTH = 900  # pixels that a figure usually has for its plot
_ROW, _MARKER, _SMALLEST = 66, 36, 32  # pixels of a row of nodes, of a node, and of one that still has room for its name
_LABEL = 40  # pixels from the middle of a label to what it should not cover
_GAP = 0.7  # between the columns of two positions, in nodes


@dataclass(frozen=True)
class _Layout:
    """Where everything stands.

    Attributes:
        at: node -> (x, y).
        rows: text of every row, from below.
        columns: position -> (left, right).
        pixels: room for one node.
        tall: how much higher rows are than usual, where nodes of a row stand on two lines.
    """

    at: dict[Site, tuple[float, float]]
    rows: list[str]
    columns: dict[str, tuple[float, float]]
    pixels: float
    tall: float


def layered_graph(circuit: Circuit, title: str = "", labels: Mapping[Edge, str] | None = None) -> go.Figure:
    """Nodes by layer and position, coloured by role; edges as wide and dark as their score is large.

    Only layers with nodes have a row. Edges of negative score are dotted; without scores all are alike. Hollow nodes are no part
    of the circuit: they only read. Keys and values that several heads share lead to all those of them that are nodes.

    Args:
        circuit: what is drawn.
        title: plain text.
        labels: a few characters to stand on an edge.
    """
    arrows = [(edge, edge.sender, reader) for edge in circuit.edges for reader in _readers(circuit, edge)]
    parts = list(dict.fromkeys([*circuit.nodes, *(end for _, *ends in arrows for end in ends)]))
    layout = _layout(parts)
    traces = [*_edges(circuit, arrows, layout), *_nodes(circuit, parts, layout)]
    middles = {name: (left + right) / 2 for name, (left, right) in layout.columns.items()}
    made = figure(
        *traces,
        note="width: |score|" if any(edge in circuit.scores for edge in circuit.edges) else "",
        title=title or f"A circuit of {len(circuit.nodes)} nodes and {len(circuit.edges)} edges",
        xlabel="position in the prompt" if list(layout.columns) != [_EVERYWHERE] else "",
        ylabel="layer",
        height=int(130 + _ROW * layout.tall * max(len(layout.rows), 2)),
        xaxis=_ticks(list(middles.values()), [label(name, 18) for name in middles], layout.columns.values(), _GAP / 2),
        yaxis=_ticks(range(len(layout.rows)), layout.rows, [(0.0, max(len(layout.rows) - 1.0, 0.0))], 0.6),
    )
    # Many roles do not fit above the plot in one line, where the legend of other figures is.
    made.update_layout(showlegend=True, legend=dict(orientation="v", x=1.01, y=1, yanchor="top"), hovermode="closest")
    for (_, left), (right, _) in itertools.pairwise(layout.columns.values()):
        made.add_vline(x=(left + right) / 2, line=dict(color=LINE, width=1, dash="dot"), layer="below")
    taken = list(layout.at.values())
    for edge, *ends in (arrow for arrow in arrows if arrow[0] in (labels or {})):
        x, y = _freest(layout, _way(layout, edge.receiver.component, *ends), taken)
        taken.append((x, y))
        look = dict(showarrow=False, font=dict(size=10), bgcolor=faint(PAPER, 0.85), borderpad=1)
        made.add_annotation(x=x, y=y, text=escape((labels or {})[edge]), **look)
    return made


def _ticks(values: Iterable[float], texts: Sequence[str], ends: Iterable[tuple[float, float]], room: float) -> dict[str, Any]:
    spans = list(ends)
    low, high = (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else (0.0, 1.0)
    shown = {"tickmode": "array", "tickvals": list(values), "ticktext": list(texts), "tickangle": 0}
    return shown | {"range": [low - room, high + room], "showgrid": False, "zeroline": False}


# ------------------------------------------------------------------------------------------ where things stand

_EVERYWHERE = "all positions"


def _readers(circuit: Circuit, edge: Edge) -> list[Site]:
    """Where the arrow of an edge ends: the nodes that the receiver belongs to, or a node of its own."""
    to, (_, n_heads, n_kv) = edge.receiver, circuit.model
    if to.component == "resid_post":
        return [to]
    if to.component == "resid_mid":
        return [type(to)("mlp_out", to.layer, position=to.position)]
    shared = 1 if to.component == "q" else n_heads // n_kv
    heads = range((to.head or 0) * shared, ((to.head or 0) + 1) * shared)
    owners = [n for n in circuit.nodes if n.component == "z" and n.layer == to.layer and n.head in heads]
    # A query is read where its head writes; keys and values may come from elsewhere.
    here = [n for n in owners if n.position == to.position]
    found = here or (owners if to.component != "q" else [])
    return found or [to if shared > 1 else type(to)("z", to.layer, to.head, to.position)]


def _row(site: Site, top: int) -> tuple[int, int]:
    """Layer, and which row of the layer."""
    if site.component == "embed":
        return -1, 0
    if site.component == "resid_post":
        return top, 2
    return site.layer or 0, int(site.component == "mlp_out")


def _row_name(row: tuple[int, int]) -> str:
    layer, part = row
    return "embed" if layer < 0 else "logits" if part == 2 else f"L{layer} MLP" if part else f"L{layer}"


def _layout(parts: Sequence[Site]) -> _Layout:
    top = max((p.layer or 0 for p in parts), default=0)
    rows = sorted({_row(p, top) for p in parts})
    cells: dict[tuple[str, int], list[Site]] = {}
    for part in parts:
        where = _EVERYWHERE if part.position is None else str(part.position)
        cells.setdefault((where, rows.index(_row(part, top))), []).append(part)
    names = sorted({where for where, _ in cells}, key=lambda name: _order(name, [row for where, row in cells if where == name]))
    columns, at, left = {}, {}, 0.0
    for name in names:
        width = max(len(found) for (where, _), found in cells.items() if where == name)
        columns[name] = (left, left + width)
        for (where, row), found in cells.items():
            for i, part in enumerate(sorted(found, key=lambda s: (s.component, s.head or 0))):
                if where == name:  # spread over the column; odd and even rows a little apart, so that edges do not hide in one line
                    at[part] = (left + width * (i + 0.5) / len(found) + (0.12 if row % 2 else -0.12) * (len(found) == 1), float(row))
        left += width + _GAP
    pixels = _WIDTH / max(left, 1.0)
    if pixels >= _SMALLEST:
        return _Layout(at, [_row_name(r) for r in rows], columns, pixels, 1.0)
    # Every second node of a long row stands higher.
    for found in cells.values():
        for i, part in enumerate(sorted(found, key=lambda s: at[s][0]) if len(found) > 1 else []):
            at[part] = (at[part][0], at[part][1] + (0.2 if i % 2 else -0.2))
    return _Layout(at, [_row_name(r) for r in rows], columns, 2 * pixels, 1.5)


def _order(name: str, rows: Sequence[int]) -> tuple[int, float, str]:
    """Positions from left to right: indices by size, names by the depth of what happens there, END last."""
    if name.lstrip("-").isdigit():
        return (0 if int(name) >= 0 else 2), float(name), ""
    return (3 if name == "END" else 1), sum(rows) / len(rows), name


# ------------------------------------------------------------------------------------------------ what is drawn


def _paint(index: int) -> str:
    """Colour of a role; past the palette its colours come again, lighter."""
    paint = OTHERS[index % len(OTHERS)]
    if index < len(OTHERS):
        return paint
    return "#" + "".join(f"{round(0.45 * part + 0.55 * 255):02x}" for part in rgb(paint))


def _name(site: Site) -> str:
    """What stands in a node."""
    if site.component in ("k", "v"):
        return f"L{site.layer}kv{site.head}"
    if site.component == "mlp_out":
        return "MLP"
    return {"embed": "embed", "resid_post": "logits"}.get(site.component, f"L{site.layer}H{site.head}")


def _nodes(circuit: Circuit, parts: Sequence[Site], layout: _Layout) -> Iterable[go.Scatter]:
    """One trace per role, then those without one, then those that only read."""
    roles = list(dict.fromkeys(circuit.roles.values()))
    groups: dict[str | None, list[Site]] = {role: [] for role in roles} | {None: []}
    reading = [p for p in parts if p not in circuit.nodes]
    for part in circuit.nodes:
        groups[circuit.roles.get(part)].append(part)
    for i, (role, found) in enumerate(groups.items()):
        if found:
            paint = _paint(i) if role is not None else "#8C8C8C"
            yield _node_trace(circuit, found, layout, escape(role or ("node" if roles else "nodes")), paint, paint)
    if reading:
        yield _node_trace(circuit, reading, layout, "only reads", PAPER, FAINT)


def _node_trace(circuit: Circuit, parts: Sequence[Site], layout: _Layout, name: str, paint: str, edge: str) -> go.Scatter:
    size = max(14.0, min(_MARKER, 0.94 * layout.pixels))
    shapes = {"z": "circle", "mlp_out": "square", "embed": "octagon", "resid_post": "octagon"}
    return go.Scatter(
        x=[layout.at[p][0] for p in parts],
        y=[layout.at[p][1] for p in parts],
        mode="markers+text",
        name=name,
        text=[_name(p) for p in parts],
        textfont=dict(size=max(6.0, min(10.0, size / 3.5)), color=PAPER if is_dark(paint) else INK),
        marker=dict(size=size, color=paint, symbol=[shapes.get(p.component, "circle") for p in parts], line=dict(color=edge, width=1.5)),
        customdata=[_told(circuit, p) for p in parts],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _told(circuit: Circuit, part: Site) -> str:
    """Hover text of a node."""
    lines = [escape(part if part.component != "resid_post" else f"logits ({part})")]
    lines += [f"role: {escape(circuit.roles[part])}"] if part in circuit.roles else []
    lines += [f"score: {circuit.scores[part]:.4g}"] if part in circuit.scores else []
    count = sum(e.sender == part for e in circuit.edges)
    return "<br>".join([*lines, *([f"edges from here: {count}"] if count else [])])


def _edges(circuit: Circuit, arrows: Sequence[tuple[Edge, Site, Site]], layout: _Layout) -> Iterable[go.Scatter]:
    """Edges of one kind, sign and width share a trace; the middle of each has its hover text."""
    top = max((abs(circuit.scores[e]) for e, *_ in arrows if e in circuit.scores), default=0.0)
    found: dict[tuple[str, bool, float], list[tuple[Edge, Site, Site]]] = {}
    for arrow in sorted(arrows, key=lambda a: list(_KINDS).index(a[0].receiver.component)):
        score = circuit.scores.get(arrow[0])
        share = 0.5 if score is None or not top else abs(score) / top
        step = next(s for s in _STEPS if share <= s + 1e-9)
        found.setdefault((arrow[0].receiver.component, (score or 0.0) < 0, step), []).append(arrow)
    for (kind, negative, step), some in sorted(found.items(), key=lambda item: item[0][2]):
        xs, ys = _joined([_way(layout, kind, a, b) for _, a, b in some])
        line = dict(color=faint(_PAINTS[kind], 0.25 + 0.6 * step), width=0.8 + 4 * step, dash="dot" if negative else "solid")
        yield go.Scatter(x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", showlegend=False, legendgroup=kind)
    keys = [_key(_KINDS[kind], kind, color=_PAINTS[kind], width=3) for kind in _KINDS if any(kind == k for k, *_ in found)]
    yield from keys
    if any(negative for _, negative, _ in found):
        yield _key("negative score", None, color=LINE, width=3, dash="dot")
    if arrows:
        middles = [_way(layout, e.receiver.component, a, b)[_HALF] for e, a, b in arrows]
        shown = [escape(e) + (f"<br>score: {circuit.scores[e]:.4g}" if e in circuit.scores else "") for e, *_ in arrows]
        places = dict(x=[x for x, _ in middles], y=[y for _, y in middles], customdata=shown)
        yield go.Scatter(
            **places, mode="markers", marker=dict(size=9, opacity=0), hovertemplate="%{customdata}<extra></extra>", showlegend=False
        )


def _key(name: str, group: str | None, **line: Any) -> go.Scatter:
    """An entry of the legend."""
    return go.Scatter(x=[None], y=[None], mode="lines", name=name, line=line, legendgroup=group)


_POINTS = 24
_HALF = _POINTS // 2

Point = tuple[float, float]


def _ends(layout: _Layout, kind: str, sender: Site, reader: Site) -> tuple[Point, Point]:
    """Queries arrive at the left of a node, values at its right, so that edges between the same two nodes are seen side by side."""
    (x, y), shift = layout.at[reader], {"q": -0.12, "v": 0.12}.get(kind, 0.0)
    return layout.at[sender], (x + shift * _MARKER / max(layout.pixels, _MARKER) * 2, y)


_BENDS = (0.0, *(side * size for size in (0.3, 0.5, 0.75, 1.0, 1.3) for side in (1, -1)))
_CLEAR = _MARKER / 2 + 8  # pixels between the middle of a node and an edge that is not its own


def _way(layout: _Layout, kind: str, sender: Site, reader: Site) -> list[Point]:
    """The way of an edge, bent as little as keeps it off other nodes, or it would look like two edges through one of them."""
    start, end = _ends(layout, kind, sender, reader)
    others = [p for part, p in layout.at.items() if part not in (sender, reader) and start[1] < p[1] < end[1]]
    for bend in _BENDS if others else (0.0,):
        if not any(_meets(layout, start, end, bend, other) for other in others):
            return _curve(start, end, bend)
    return _curve(start, end, _BENDS[1])


def _freest(layout: _Layout, way: Sequence[Point], taken: Sequence[Point]) -> Point:
    """Where on its way a label is furthest from nodes and other labels, or half way where that is far enough."""
    across, up = layout.pixels / (2 if layout.tall > 1 else 1), _ROW * layout.tall

    def room(point: Point) -> float:
        return min(min(math.hypot((point[0] - x) * across, (point[1] - y) * up) for x, y in taken), _LABEL)

    return max((way[_HALF + i] for i in (0, -2, 2, -4, 4, -6, 6)), key=room)


def _meets(layout: _Layout, start: Point, end: Point, bend: float, node: Point) -> bool:
    """Whether a way comes close to a node."""
    across, up = layout.pixels / (2 if layout.tall > 1 else 1), _ROW * layout.tall
    middle, near = (node[1] - start[1]) / (end[1] - start[1]), _CLEAR / up / (end[1] - start[1])
    places = [_point(start, end, bend, middle + share * near) for share in (-0.8, -0.4, 0.0, 0.4, 0.8)]
    return any(math.hypot((x - node[0]) * across, (y - node[1]) * up) < _CLEAR for x, y in places)


def _point(start: Point, end: Point, bend: float, t: float) -> Point:
    (x0, y0), (x1, y1) = start, end
    return x0 + (x1 - x0) * t * t * (3 - 2 * t) + 4 * bend * t * (1 - t), y0 + (y1 - y0) * t


def _curve(start: Point, end: Point, bend: float) -> list[Point]:
    """A way from one node to another that leaves upwards and comes from below, bent to the right, or where negative to the left."""
    return [_point(start, end, bend, i / _POINTS) for i in range(_POINTS + 1)]


def _joined(ways: Sequence[Sequence[Point]]) -> tuple[list[float | None], list[float | None]]:
    """Many ways in one trace, None between them."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for way in ways:
        xs += [*(x for x, _ in way), None]
        ys += [*(y for _, y in way), None]
    return xs, ys
