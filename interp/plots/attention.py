"""Attention over tokens: all heads as thumbnails, and a text whose tokens show where they look."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from interp.plots.colours import DIFFERENCE, FAINT, FLOOR, GRID, INK, LINE, MAGNITUDE, MISSING, PANEL, PAPER, rgb, shade
from interp.plots.frame import FONT, MONO, axis, figure
from interp.plots.text import escape, label, visible, whole_characters

_STEPS = 240  # colours of the map in a picture
_GREY, _GAP, _NONE = range(_STEPS, _STEPS + 3)
_SIDE = 1500  # pixels of a picture, at most, before thumbnails are drawn at one pixel per token
_WIDE, _LARGEST = 860, 280  # pixels that a figure usually has for its plot, and of a thumbnail at most


def attention_grid(
    patterns: Mapping[tuple[int, int], Any],
    *,
    title: str,
    hover: Mapping[tuple[int, int], str] | None = None,
    difference: bool = False,
    top: float = 1.0,
    floor: float = 0.0,
) -> go.Figure:
    """The patterns of many heads as thumbnails, layers from top to bottom, heads side by side.

    In a thumbnail every row is a token that looks, the first on top, and every column a token that is looked at. All are one
    picture, so that thousands of heads are no burden to a page.

    Args:
        patterns: (layer, head) -> attention ``[query key]``, all of one size.
        title: plain text.
        hover: (layer, head) -> further lines for hovering, plain text.
        difference: diverging map from -top to top; otherwise from 0 to top.
        top: end of the map.
        floor: cells of a difference with a smaller size are grey.
    """
    layers, heads = (sorted({cell[i] for cell in patterns}) for i in (0, 1))
    n = len(next(iter(patterns.values())))
    size = max(1, min(_SIDE // max(1, n * max(len(layers), len(heads))), 8))  # pixels per token
    gap = max(2, round(n * size / 16))
    pitch = n * size + gap
    canvas = np.full((pitch * len(layers) + gap, pitch * len(heads) + gap), _GAP, dtype=np.uint8)
    told = np.full((len(layers), len(heads)), "", dtype=object)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            y, x = gap + row * pitch, gap + column * pitch
            tile = np.full((n, n), _NONE, dtype=np.uint8)
            if (layer, head) in patterns:
                tile = _indexed(np.asarray(patterns[layer, head], dtype=np.float64), difference, top, floor)
                more = [label(line, 90) for line in (hover or {}).get((layer, head), "").split("\n") if line]
                told[row, column] = "<br>".join([f"L{layer}H{head}", *more])
            canvas[y : y + n * size, x : x + n * size] = tile.repeat(size, 0).repeat(size, 1)
    # One unit of the axes is a thumbnail with its gap.
    picture = go.Image(
        source="data:image/png;base64," + base64.b64encode(_png(canvas, difference)).decode(),
        x0=-0.5 - gap / 2 / pitch + 0.5 / pitch,
        y0=-0.5 - gap / 2 / pitch + 0.5 / pitch,
        dx=1 / pitch,
        dy=1 / pitch,
        hoverinfo="skip",
    )
    clear = [[0, "rgba(0,0,0,0)"], [1, "rgba(0,0,0,0)"]]
    cover = go.Heatmap(
        z=np.zeros(told.shape), customdata=told, colorscale=clear, showscale=False, hovertemplate="%{customdata}<extra></extra>"
    )
    made = figure(
        cover,
        _bar(difference, top),
        title=title,
        xlabel="head; within it: the token looked at",
        ylabel="layer; within it: the token that looks",
        height=int(min(max(min(_WIDE / len(heads), _LARGEST) * len(layers) + 130, 240), 1600)),
        xaxis=axis([str(head) for head in heads]) | {"constrain": "domain"},
        yaxis=axis([str(layer) for layer in layers])
        | {"range": [len(layers) - 0.5, -0.5], "scaleanchor": "x", "constrain": "domain", "constraintoward": "top"},
        note="; ".join(["grey: under the floor"] * bool(difference and floor) + ["beige: no value (no token sees what comes after it)"]),
    )
    return made.add_trace(picture)  # which is drawn below the others wherever it stands


def _indexed(pattern: np.ndarray, difference: bool, top: float, floor: float) -> np.ndarray:
    """Cells as numbers of colours."""
    low = -top if difference else 0.0
    share = (pattern - low) / (top - low) if top > 0 else np.full(pattern.shape, 0.5 if difference else 0.0)
    cells = np.clip(np.round(share * (_STEPS - 1)), 0, _STEPS - 1).astype(np.uint8)
    if difference:
        cells[np.abs(pattern) < floor] = _GREY
    cells[np.triu_indices(len(pattern), 1)] = _NONE  # no token sees what comes after it
    return cells


def _png(canvas: np.ndarray, difference: bool) -> bytes:
    """A picture with a palette."""
    paints = [shade(i / (_STEPS - 1), 0.0, 1.0, difference) for i in range(_STEPS)] + [FLOOR, PAPER, MISSING]
    palette = bytes(part for paint in paints for part in rgb(paint))
    height, width = canvas.shape
    lines = np.concatenate([np.zeros((height, 1), dtype=np.uint8), canvas], axis=1).tobytes()  # each begins with its filter, none

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = ((b"IHDR", head), (b"PLTE", palette), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _bar(difference: bool, top: float) -> go.Scatter:
    """Nothing but the bar of colours, which a picture has not."""
    paints = [list(stop) for stop in (DIFFERENCE if difference else MAGNITUDE)]
    ends = dict(cmin=-top if difference else 0.0, cmax=top) if top > 0 else dict(cmin=-1.0 if difference else 0.0, cmax=1.0)
    bar = dict(thickness=14, len=1, outlinewidth=0, title=dict(text="change of attention" if difference else "attention", side="right"))
    marker = dict(color=[0.0], colorscale=paints, showscale=True, colorbar=bar, **ends)
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip", showlegend=False)


# ------------------------------------------------------------------------------------------------ the view of tokens


@dataclass(frozen=True, eq=False)
class AttentionPanel:
    """One head on one prompt.

    Attributes:
        head: its name, such as ``L2H3``.
        prompt: which prompt it is.
        tokens: the kept tokens, as they are.
        patterns: attention ``[side query key]`` among them.
        start: which of the tokens looks at first.
        left_out: how many tokens between the first kept one and the second were left out.
        said: a sentence about the head, plain text.
        floor: differences below it are grey.
    """

    head: str
    prompt: str
    tokens: Sequence[str]
    patterns: Any
    start: int
    left_out: int = 0
    said: str = ""
    floor: float = 0.0


def attention_view(panels: Sequence[AttentionPanel], *, sides: Sequence[str], name: str, title: str = "", note: str = "") -> str:
    """Texts whose tokens show where they look when they are pointed at, as a self-contained piece of HTML without a script.

    A token that is hovered, or else the one that was chosen by a click, a tap or the arrow keys (at first ``start``), says what it pays
    to every token: as colour, and below it in percent. This stands in style rules, one per token that looks.

    Args:
        panels: heads and prompts that can be chosen.
        sides: names of the models, one, or two of which the second less the first is the difference.
        name: letters, digits and dashes that no other view on the page has.
        title: a heading, plain text.
        note: what was left out, plain text.
    """
    heads, prompts = (list(dict.fromkeys(getattr(panel, field) for panel in panels)) for field in ("head", "prompt"))
    choices = {"h": ("head", heads), "p": ("prompt", prompts), "s": ("show", [*sides, "difference"] if len(sides) == 2 else [])}
    rules, bodies = [_style(name)], []
    for panel in panels:
        where = f"h{heads.index(panel.head)}", f"p{prompts.index(panel.prompt)}"
        rules.append(f"#{name}:has(.{where[0]}:checked):has(.{where[1]}:checked) .{where[0]}.{where[1]}{{display:block}}")
        rules += _rules(f"#{name} .{where[0]}.{where[1]}", np.asarray(panel.patterns, dtype=np.float64))
        bodies.append(_panel(panel, where, sides))
    chosen = "".join(_choice(letter, what, options) for letter, (what, options) in choices.items() if len(options) > 1)
    if len(sides) == 2:  # what is asked for first
        chosen = _checked(chosen, "s2")
    lone = "".join(
        f'<input type="radio" class="{letter}0" name="{letter}" checked hidden>' for letter, (_, o) in choices.items() if len(o) <= 1
    )
    head = f"<h4>{escape(title)}</h4>" if title else ""
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    old = '<p class="old">This browser is too old to show the attention of a token (it needs the CSS selector :has).</p>'
    how = "Point at a token (or tap it, or use the arrow keys) to see where it looks: colour, and percent below. "
    how += "It sees itself and what stands before it."
    # A form that goes nowhere keeps the choices of two copies on one page apart.
    above = f'{head}<p class="note">{escape(how)}</p>{old}<div class="choices">{chosen}{lone}</div>'
    form = f'<form method="dialog">{above}{"".join(bodies)}</form>'
    return f'<div class="attention" id="{name}"><style>{"".join(rules)}</style>{form}{told}</div>'


def _choice(letter: str, what: str, options: Sequence[str]) -> str:
    """Radio buttons in a row; the first is chosen."""
    buttons = [
        f'<label><input type="radio" class="{letter}{i}" name="{letter}"{" checked" * (i == 0)}> {label(option, 40)}</label>'
        for i, option in enumerate(options)
    ]
    return f"<span><b>{what}</b> {' '.join(buttons)}</span>"


def _checked(chosen: str, which: str) -> str:
    """The buttons with another one chosen within its row."""
    row = chosen.rindex("<span>")
    return chosen[:row] + chosen[row:].replace(" checked", "").replace(f'class="{which}"', f'class="{which}" checked')


def _rules(panel: str, patterns: np.ndarray) -> list[str]:
    """What every token pays to the others, per mille, while it is the one that is asked; nothing is said of zeros."""
    n = patterns.shape[-1]
    gap = np.clip(1 - patterns.sum(-1), 0, 1)  # to tokens that were left out
    every = np.round(1000 * np.concatenate([patterns, gap[..., None]], -1)).astype(int)
    rules = []
    for query in range(n):
        paid = [f"--{'bu'[side]}{key}:{every[side, query, key]}" for side in range(len(every)) for key in every[side, query].nonzero()[0]]
        rules.append(f"{panel}:is(:has(.q{query}:hover),:not(:has(label:hover)):has(.q{query} :checked)){{{';'.join(paid)}}}")
    return rules


def _panel(panel: AttentionPanel, where: tuple[str, str], sides: Sequence[str]) -> str:
    """The text and the meaning of its colours."""
    patterns = np.asarray(panel.patterns, dtype=np.float64)
    n, two = len(panel.tokens), len(sides) == 2
    top = float(np.abs(patterns[1] - patterns[0]).max()) if two else 0.0
    spans = []
    for i, token in enumerate(whole_characters(panel.tokens)):
        radio = f'<input type="radio" name="{where[0]}{where[1]}"{" checked" * (i == panel.start)}>'
        spans.append(_token(f"t q{i}", i, radio + f"<i>{visible(token, 40)}</i>", two) + ("<br>" * min(str(token).count("\n"), 1)))
        if i == 0 and panel.left_out:
            some = f"<i>… {panel.left_out} more tokens …</i>"
            spans.append(_token("t g", n, some, two))
    # Grey only where the floor can be told from 0 at this precision; without any difference nothing has a colour.
    grey = round(1000 * panel.floor)
    scale = f"--k:{50 / (1000 * top):.6f};--f:{grey if grey else -1}" if top > 0 else "--k:0;--f:-1"
    keys = [_key(f"k{i}", side, MAGNITUDE, "0 %", "100 %") for i, side in enumerate(sides)]
    if two:
        ends = f"{100 * -top:.3g}", f"+{100 * top:.3g} percentage points" + ("; grey: under the floor" if grey else "")
        keys.append(_key("k2", f"{sides[1]} - {sides[0]}", DIFFERENCE, *ends))
    said = f'<p class="said"><b>{label(panel.head)}</b>, {label(panel.prompt)}. {escape(panel.said)}</p>'
    return f'<div class="panel {where[0]} {where[1]}" style="{scale}">{said}{"".join(keys)}<div class="text">{"".join(spans)}</div></div>'


def _token(kind: str, number: int, inner: str, two: bool) -> str:
    other = f";--u:var(--u{number},0)" if two else ""
    tag = "label" if kind != "t g" else "span"
    return f'<{tag} class="{kind}" style="--b:var(--b{number},0){other}">{inner}</{tag}>'


def _key(kind: str, what: str, stops: Sequence[tuple[float, str]], low: str, high: str) -> str:
    paints = ",".join(f"{paint} {100 * at:.0f}%" for at, paint in stops)
    bar = f'<span style="background:linear-gradient(90deg,{paints})"></span>'
    return f'<p class="key {kind}">{escape(what)}: {escape(low)} {bar} {escape(high)}</p>'


def _style(name: str) -> str:
    """The look, and the arithmetic from per mille to a place on the map of colours and a number below the token."""
    maps = [",".join(f"{paint} {100 * at:.0f}%" for at, paint in stops) for stops in (MAGNITUDE, DIFFERENCE)]
    me = f"#{name}"
    return f"""
{me}{{font:13px {FONT};color:{INK};background:{PAPER};margin:10px 0;max-width:1080px}}
{me} h4{{margin:4px 0}}{me} .note{{color:{FAINT};margin:4px 0;max-width:90ch}}{me} .old{{display:none}}
{me} .choices{{display:flex;flex-wrap:wrap;gap:4px 24px;background:{PANEL};padding:6px 10px;margin:6px 0}}
{me} .choices label{{margin-left:8px;white-space:nowrap;cursor:pointer}}
{me} .said{{margin:8px 0 4px;max-width:none}}{me} .key{{display:none;color:{FAINT};font-size:12px;margin:2px 0 6px}}
{me} .key span{{display:inline-block;width:120px;height:10px;vertical-align:-1px;border:1px solid {LINE};print-color-adjust:exact}}
{me} .text{{font:13px/1.35 {MONO};overflow-wrap:anywhere}}
{me} .t{{display:inline-block;position:relative;vertical-align:top;margin:0 1px 4px;cursor:pointer;text-align:center;min-width:2.2em}}
{me} .t input{{position:absolute;opacity:0;width:1px;height:1px;margin:0}}
{me} .t i{{font-style:normal;display:block;padding:2px 3px;border-radius:3px;outline:1px solid {GRID};\
background-image:var(--over),var(--map);background-size:var(--cover) 100%,10000% 100%;background-repeat:no-repeat;\
background-position:0 0,var(--at) 0;color:hsl(0,0%,var(--ink));\
print-color-adjust:exact}}
{me} .g i{{color:{FAINT};font:italic 12px {FONT};padding:3px 4px}}
{me} .t::after{{counter-reset:v calc(var(--v)/10);content:counter(v);font:10px {FONT};color:{FAINT};\
opacity:calc(max(var(--v),-1*var(--v)) - 5)}}
{me} .t{{--v:var(--b);--map:linear-gradient(90deg,{maps[0]});--over:none;--cover:0%;--at:calc(var(--v)*.1%);\
--ink:calc((var(--v) - 650)*100%)}}
{me}:has(.s1:checked) .t{{--v:var(--u)}}
{me}:has(.s2:checked) .t{{--v:calc(var(--u) - var(--b));--map:linear-gradient(90deg,{maps[1]});--over:linear-gradient({FLOOR},{FLOOR});\
--cover:calc((var(--f) - max(var(--v),-1*var(--v)))*1000%);--at:calc(50% + var(--v)*var(--k)*1%);\
--ink:calc((max(var(--v),-1*var(--v))*var(--k) - 36)*100%)}}
{me} .t:has(:checked) i{{outline:2px solid {FAINT}}}{me} label.t:hover i,{me} .t:has(:focus-visible) i{{outline:2px solid {INK}}}
{me} label.t:hover~.t i,{me} .text:not(:has(label:hover)) .t:has(:checked)~.t i{{background:none;color:{LINE}}}
{me}:has(.s0:checked) .k0,{me}:has(.s1:checked) .k1,{me}:has(.s2:checked) .k2{{display:block}}
@supports selector(:has(a)){{{me} .panel{{display:none}}}}
@supports not selector(:has(a)){{{me} .old{{display:block}}}}
""".replace("\n", "")
