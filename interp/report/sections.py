"""One section per result: heading, sentence, figures, table, and a fold with the command and the provenance."""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from interp.plots import HEIGHT, escape, label
from interp.plots.frame import LINE_HEIGHT
from interp.provenance import Meta, setting_text
from interp.results import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

OPEN_ROWS = 12
"""Longer tables are folded."""

SHOWN_ROWS = 200
"""Rows of a table on the page; the file beside it has all of them."""


@dataclass(frozen=True)
class Section:
    """A piece of a page: its anchor, its heading as plain text, its HTML, and the part of the page it belongs to."""

    anchor: str
    heading: str
    html: str
    part: str = ""


class Beside(Protocol):
    """Main numbers of several checkpoints in columns."""

    @property
    def base(self) -> str: ...  # noqa: D102

    @property
    def checkpoints(self) -> tuple[str, ...]: ...  # noqa: D102

    def to_frame(self) -> pd.DataFrame: ...  # noqa: D102

    def figures(self) -> dict[str, go.Figure]: ...  # noqa: D102

    def records(self) -> list[dict[str, Any]]: ...  # noqa: D102


def sections(
    results: Sequence[Result], frames: Sequence[pd.DataFrame], data: str, parts: Mapping[str, Sequence[str]] | None = None
) -> list[Section]:
    """One section per result and its table.

    Args:
        results: in order.
        frames: the table of each.
        data: name of the file with all rows.
        parts: heading -> names of the analyses under it.
    """
    names = _headings(results)
    part = {name: heading for heading, some in (parts or {}).items() for name in some}
    made = [_section(f"result-{i}", n, r, f, data) for i, (n, r, f) in enumerate(zip(names, results, frames, strict=True))]
    return [replace(section, part=part.get(r.meta.analysis, "")) for section, r in zip(made, results, strict=True)]


def beside(columns: Beside, data: str) -> Section:
    """The section of several checkpoints: a column each, and a curve per number."""
    drawn = [_figure(f"columns-figure-{i}", "", figure) for i, figure in enumerate(columns.figures().values())]
    names = ", ".join(columns.checkpoints)
    told = f"{len(columns.checkpoints)} checkpoints tuned from {columns.base}, in the order given: {names}."
    table = _table(columns.to_frame(), data, open_rows=SHOWN_ROWS)
    head = f'<section class="result" id="columns"><h2>Side by side</h2><p class="summary">{escape(told)}</p>'
    return Section("columns", "Side by side", "\n".join([head, table, *drawn, "</section>"]))


def rows(frame: pd.DataFrame) -> Iterable[tuple[Any, ...]]:
    """The rows of a table as plain Python values."""
    return zip(*(frame[column].tolist() for column in frame.columns), strict=True)


def _headings(results: Sequence[Result]) -> list[str]:
    """The name of the analysis, and what it was about where it comes more than once."""
    names = [r.meta.analysis.replace("_", " ").capitalize() for r in results]
    return [name if names.count(name) == 1 else f"{name}: {_subject(r.meta)}" for name, r in zip(names, results, strict=True)]


def _subject(meta: Meta) -> str:
    models = " → ".join(m["name"] for m in meta.models)
    inputs = [i.get("task") or i["text"] or f"{i.get('some_of') or i['kind']} {i['digest'][:8]}" for i in meta.inputs]
    return ", ".join([*([models] if models else []), *map(str, inputs)])


def _section(anchor: str, heading: str, result: Result, frame: pd.DataFrame, data: str) -> Section:
    meta = result.meta
    drawn = [_figure(f"{anchor}-figure-{i}", name, figure) for i, (name, figure) in enumerate(result.figures().items())]
    extra, strongest = result.html(), result.strongest()
    page = "\n".join(
        [
            f'<section class="result" id="{anchor}"><h2>{escape(heading)}</h2>',
            f'<p class="subject">{escape(_subject(meta))}</p>',
            f'<p class="summary">{escape(result.summary())}</p>',
            *drawn,
            f"<h3>Strongest</h3>{_table(strongest, data)}" if strongest is not None and len(strongest) else "",
            f'<div class="extra scroll">{extra}</div>' if extra else "",
            _table(frame, data),
            _provenance(result),
            "</section>",
        ]
    )
    return Section(anchor, heading, page)


def _figure(anchor: str, heading: str, figure: go.Figure) -> str:
    """A place for a figure, and its description as inert JSON that the page's own script draws.

    The title stands above it as text of the page, which wraps at any width.
    """
    spec = json.loads(str(figure.to_json()))
    layout = spec["layout"]
    title = layout.pop("title", {}).get("text") or ""
    margin = layout.setdefault("margin", {})
    margin["t"] = max(margin.get("t", 40) - LINE_HEIGHT * (title.count("<br>") + 1 if title else 0), 0)
    words = escape(html.unescape(title.replace("<br>", " ")))
    above = (f"<h3>{escape(heading)}</h3>" if heading else "") + (
        f"<figcaption>{words}</figcaption>" if words not in ("", escape(heading)) else ""
    )
    box = f'<div id="{anchor}" class="plotly-graph-div" style="height:{int(layout.get("height") or HEIGHT)}px"></div>'
    data = json.dumps(spec).replace("<", "\\u003c")
    return f'<figure>{above}<div class="scroll">{box}<script type="application/json">{data}</script></div></figure>'


def _table(frame: pd.DataFrame, data: str, open_rows: int = OPEN_ROWS) -> str:
    if not len(frame.columns) or not len(frame):
        return ""
    numeric = {c for c in frame.columns if frame[c].dtype.kind in "iuf"}
    kinds = [' class="number"' if c in numeric else "" for c in frame.columns]
    head = "".join(f"<th{kind}>{label(c)}</th>" for c, kind in zip(frame.columns, kinds, strict=True))
    shown = [
        "".join(f"<td{kind}>{_cell(value)}</td>" for value, kind in zip(row, kinds, strict=True)) for row in rows(frame.head(SHOWN_ROWS))
    ]
    body = "".join(f"<tr>{cells}</tr>" for cells in shown)
    more = f"The first {SHOWN_ROWS} of {len(frame):,} rows; all of them are in {data}." if len(frame) > SHOWN_ROWS else ""
    rest = f'<p class="rest">{escape(more)}</p>' if more else ""
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{rest}'
    return table if len(frame) <= open_rows else f"<details><summary>Table ({len(frame):,} rows)</summary>{table}</details>"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else label(value, 120)


def _provenance(result: Result) -> str:
    """The fold with the exact command and where everything came from."""
    meta = result.meta
    note = "" if meta.replayable else f"<p>This command alone does not repeat the result: {escape('; '.join(meta.obstacles))}.</p>"
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in _facts(result) if value)
    table = f'<div class="scroll"><table class="facts"><tbody>{lines}</tbody></table></div>'
    command = f"<pre>{escape(shlex.join(meta.command()))}</pre>"
    return f'<details class="provenance"><summary>Command and provenance</summary>{command}{note}{table}</details>'


def _facts(result: Result) -> list[tuple[str, str]]:
    meta, notes = result.meta, result.meta.notes
    facts = [(m["side"] + (" model" if m["side"] != "model" else ""), _model(m)) for m in meta.models]
    facts += [(i["parameter"], _input(i)) for i in meta.inputs]
    facts += [(name, escape(setting_text(value))) for name, value in meta.settings.items()]
    facts += [("seed", "" if meta.seed is None else str(meta.seed))]
    facts += [("noted", "<br>".join(escape(n) for n in _texts(notes.get("models"))))]
    facts += [
        ("analysis", f"{escape(meta.analysis)}, version {escape(meta.version)}"),
        ("identity", _code(result.identity)),
        ("run", _code(shlex.join(_texts(notes.get("argv"))))),
        ("device", escape(notes.get("device") or "")),
        ("seconds", escape(notes.get("seconds") or "")),
        ("peak memory", escape(f"{notes['peak_mb']} MB" if notes.get("peak_mb") else "")),
        ("time", escape(notes.get("time") or "")),
        ("git", escape(notes.get("git") or "")),
        ("versions", escape(_versions(notes.get("versions")))),
    ]
    return facts


def _model(model: dict[str, Any]) -> str:
    edits = f", edits {', '.join(e[:12] for e in model['edits'])}" if model["edits"] else ""
    return f"{escape(model['name'])}, {escape(model['dtype'])}, {_code(model['fingerprint'][:16])}{escape(edits)}"


def _input(given: dict[str, Any]) -> str:
    task = f"{given['task']}, n={given.get('n')}, seed={given.get('seed')}" if given.get("task") else given["text"]
    return f"{escape(given['kind'])}{': ' if task else ''}{escape(task)}, {_code(given['digest'][:16])}"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>" if text else ""


def _texts(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else []


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
