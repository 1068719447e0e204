"""What a notebook shows of a value: a few facts, or a table; every text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from interp.plots.text import escape

SHOWN = 8
"""Rows of a table that are shown; the others are counted."""

_WIDTH = 160


def facts(title: str, rows: Mapping[str, object]) -> str:
    """A heading and a line per fact; what is None or empty has no line."""
    lines = "".join(_row((name, value), ("th", "td")) for name, value in rows.items() if value not in (None, "", ()))
    return f'<div class="interp-value"><b>{escape(title)}</b><table>{lines}</table></div>'


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, of: int | None = None) -> str:
    """A heading and the first rows of a table.

    Args:
        title: plain text, as is everything else.
        columns: their names.
        rows: the cells; only the first ``SHOWN`` are shown.
        of: how many rows there are, where ``rows`` are not all.
    """
    more = (len(rows) if of is None else of) - len(rows[:SHOWN])
    body = "".join(_row(row, ("td",) * len(row)) for row in rows[:SHOWN])
    rest = f"<div>… and {more} more</div>" if more > 0 else ""
    return f'<div class="interp-value"><b>{escape(title)}</b><table><tr>{_cells(columns, "th")}</tr>{body}</table>{rest}</div>'


def _row(cells: Sequence[object], tags: Sequence[str]) -> str:
    return f"<tr>{''.join(_cells([cell], tag) for cell, tag in zip(cells, tags, strict=True))}</tr>"


def _cells(values: Sequence[object], tag: str) -> str:
    return "".join(f'<{tag} style="text-align:left;white-space:pre-wrap">{_shown(value)}</{tag}>' for value in values)


def _shown(value: object) -> str:
    text = "" if value is None else "yes" if value is True else "no" if value is False else str(value)
    return escape(text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…")
