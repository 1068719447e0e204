"""The shell of a page: what stands around the sections, its style and its script.

The page fetches nothing. Its two scripts are named by their digests in the content security policy, so that
text which should slip through as markup could still not run, nor reach the network.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from itertools import groupby
from urllib.parse import quote

from interp.plots import FONT, MONO, escape
from interp.plots.colours import FAINT, GRID, INK, LINK, PANEL, PAPER, TUNED, WARNING
from interp.report.sections import Section


def page(
    title: str, sections: Sequence[Section], *, verdict: Sequence[str], warnings: Sequence[str], plan: Sequence[str], data: str
) -> str:
    """The HTML of a page.

    Args:
        title: heading; plain text, as are ``verdict``, ``warnings``, ``plan`` and ``data``.
        sections: one per result.
        verdict: sentences on top.
        warnings: a box below them.
        plan: what was left out; lines after the first of an entry are commands.
        data: name of the file with all numbers.
    """
    from plotly.offline import get_plotlyjs

    library = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")  # as a browser reads it, for the digest
    policy = f"default-src 'none'; script-src {_digest(library)} {_digest(_DRAW)}; style-src 'unsafe-inline'; img-src data: blob:"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            _boxes(verdict, warnings),
            _contents(sections, bool(plan)),
            *_body(sections),
            _left_out(plan),
            f'<footer>All numbers of this page: <a href="{quote(data)}">{escape(data)}</a>.</footer>',
            "</main>",
            f"<script>{library}</script>",
            f"<script>{_DRAW}</script>",
            "</body></html>\n",
        ]
    )


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _boxes(verdict: Sequence[str], warnings: Sequence[str]) -> str:
    answer = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict)
    alarm = "".join(f"<li>{escape(sentence)}</li>" for sentence in warnings)
    boxes = f'<section class="verdict">{answer}</section>' if answer else ""
    return boxes + (f'<section class="warnings"><h2>Before you believe it</h2><ul>{alarm}</ul></section>' if alarm else "")


def _body(sections: Sequence[Section]) -> list[str]:
    """The sections, and a heading where a part of the page begins."""
    made, part = [], ""
    for section in sections:
        if section.part not in ("", part):
            made.append(f'<h2 class="part">{escape(section.part)}</h2>')
        part = section.part
        made.append(section.html)
    return made


def _contents(sections: Sequence[Section], plan: bool) -> str:
    entries = [(s.anchor, s.heading, s.part) for s in sections] + ([("left-out", "Left out", "")] if plan else [])
    groups = [(part, list(some)) for part, some in groupby(entries, key=lambda entry: entry[2])]
    size, first, lists = "many" if len(entries) > 8 else "few", 1, []
    for part, some in groups:
        links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading, _ in some)
        lists.append((f"<h3>{escape(part)}</h3>" if part else "") + f'<ol class="{size}" start="{first}">{links}</ol>')
        first += len(some)
    return f"<nav><h2>Contents</h2>{''.join(lists)}</nav>" if entries else ""


def _left_out(plan: Sequence[str]) -> str:
    if not plan:
        return ""
    entries = []
    for entry in plan:
        sentence, *commands = entry.split("\n")
        entries.append(f"<li>{escape(sentence)}" + (f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else "") + "</li>")
    return f'<section id="left-out"><h2>Left out</h2><ul>{"".join(entries)}</ul></section>'


_STYLE = f"""
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%}}
body{{margin:0;background:{PAPER};color:{INK};font:16px/1.5 {FONT};overflow-wrap:break-word}}
main{{max-width:1120px;margin:0 auto;padding:24px 20px 64px}}
h1{{font-size:1.75rem;line-height:1.25;margin:.2em 0 .6em}}
h2{{font-size:1.3rem;line-height:1.3;margin:0 0 .3em}}
h3,h4{{font-size:1rem;margin:1em 0 .2em}}
p{{margin:.4em 0;max-width:75ch}}
a{{color:{LINK}}}
ul,ol{{padding-left:1.4em;margin:.4em 0}}
code,pre{{font:.82rem/1.5 {MONO}}}
code{{overflow-wrap:anywhere}}
pre{{background:{PANEL};padding:10px 12px;margin:.5em 0;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}}
.verdict{{border-left:4px solid {TUNED};padding:2px 0 2px 16px;margin:0 0 20px;font-size:1.08rem}}
.warnings{{background:{WARNING};padding:12px 16px;margin:0 0 20px}}
.warnings h2{{font-size:1rem}}
nav{{background:{PANEL};padding:12px 16px;margin:0 0 8px}}
nav h2{{font-size:1rem}}
nav ol.many{{columns:20em 2;column-gap:2em}}
h2.part{{font-size:1.5rem;margin:2em 0 0;padding-top:.4em;border-top:3px solid {INK}}}
h2.part+section.result{{border-top:0;margin-top:8px}}
nav h3{{font-size:.9rem;margin:.6em 0 0}}
section.result,#left-out{{border-top:1px solid {GRID};margin-top:36px;padding-top:20px}}
.subject{{color:{FAINT};font-size:.9rem;margin:0 0 .4em;overflow-wrap:anywhere}}
.summary{{font-size:1.05rem}}
figure{{margin:18px 0;min-width:0}}
figcaption{{margin:.1em 0 .4em;max-width:85ch}}
.plotly-graph-div{{width:100%;min-width:560px}}
.scroll{{overflow-x:auto;max-width:100%}}
table{{border-collapse:collapse;font-size:.85rem;margin:.6em 0}}
th,td{{padding:3px 10px;border-bottom:1px solid {GRID};text-align:left;vertical-align:top;white-space:pre-wrap}}
td{{min-width:4ch;max-width:70ch}}
thead th{{border-bottom:2px solid {GRID}}}
th,.number{{white-space:pre}}
.number{{text-align:right;font-variant-numeric:tabular-nums}}
.extra th,.extra td{{white-space:pre-wrap}}
.facts th{{font-weight:normal;color:{FAINT}}}
.facts td{{white-space:normal;overflow-wrap:anywhere}}
details{{margin:.7em 0}}
summary{{cursor:pointer;color:{LINK};width:fit-content}}
.rest,footer{{color:{FAINT};font-size:.9rem}}
footer{{border-top:1px solid {GRID};margin-top:36px;padding-top:12px}}
@media (max-width:720px){{main{{padding:16px 12px 48px}}body{{font-size:15px}}}}
@media print{{main{{max-width:none;padding:0}}figure,tr,.verdict,.warnings{{break-inside:avoid}}
h2,h3{{break-after:avoid}}.modebar{{display:none}}}}
"""

_DRAW = """
"use strict";
const bar = matchMedia("(hover: hover)").matches ? "hover" : false;
const config = {responsive: true, displaylogo: false, displayModeBar: bar, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
const places = [...document.querySelectorAll(".plotly-graph-div")];
const drawn = places.map((place) => {
  const spec = JSON.parse(place.nextElementSibling.textContent);
  return Plotly.newPlot(place, spec.data, spec.layout, config);
});
Promise.all(drawn).then(() => { document.documentElement.dataset.drawn = drawn.length; });
addEventListener("beforeprint", () => places.forEach((place) => Plotly.relayout(place, {width: 680})));
addEventListener("afterprint", () => places.forEach((place) => Plotly.relayout(place, {width: null, autosize: true})));
"""
