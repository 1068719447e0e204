"""Results as one self-contained page: figures, tables and where each number comes from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.fields import TENSOR
from interp.report.page import page
from interp.report.sections import Beside, beside, rows, sections
from interp.result_files import encode, write_text
from interp.results import Result

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["write_report"]


def write_report(
    results: Sequence[Result],
    path: str | os.PathLike[str],
    *,
    title: str = "What fine-tuning changed",
    verdict: Sequence[str] = (),
    warnings: Sequence[str] = (),
    plan: Sequence[str] = (),
    columns: Beside | None = None,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write results as one HTML page, and all their numbers as JSON beside it (``report.html``, ``report.json``).

    Args:
        results: in the order of the page.
        path: the page; its folder is made if need be, an earlier page is replaced.
        title: heading of the page; plain text, as is all that follows.
        verdict: sentences that answer the question; they come first.
        warnings: what a reader must know before believing the numbers.
        plan: what was left out and why; lines after the first of an entry are commands.
        columns: main numbers of several checkpoints, which stand before the results.
        parts: heading -> names of analyses: the results are put in this order, under these headings. None: in the order given.

    Raises:
        InputError: the page cannot be written, or a result was built by hand.
    """
    target = Path(path)
    if target.suffix.lower() == ".json":
        raise InputError(f"the page {target} needs another ending than .json, which is that of its numbers")
    if by_hand := [r for r in results if r.meta is None]:
        raise InputError(f"a {type(by_hand[0]).__name__} was built by hand; a report shows results that an analysis returned")
    if parts is not None:
        order = [name for names in parts.values() for name in names]
        results = sorted(results, key=lambda r: order.index(r.meta.analysis) if r.meta.analysis in order else len(order))
    frames = [result.to_frame() for result in results]
    numbers = {
        "title": title,
        "verdict": list(verdict),
        "warnings": list(warnings),
        "plan": list(plan),
        "columns": [] if columns is None else columns.records(),
        "results": [_numbers(result, frame) for result, frame in zip(results, frames, strict=True)],
    }
    data = target.with_suffix(".json")
    shown = [*([] if columns is None else [beside(columns, data.name)]), *sections(results, frames, data.name, parts or {})]
    html = page(title, shown, verdict=verdict, warnings=warnings, plan=plan, data=data.name)
    write_text(target, html)
    write_text(data, json.dumps(numbers, indent=1, allow_nan=False))
    return target


def _numbers(result: Result, frame: pd.DataFrame) -> dict[str, Any]:
    """Everything about a result but its raw tensors, which are in its folder."""
    values, tensors = encode(result)
    fields = {k: {"shape": list(tensors[v[TENSOR]].shape)} if isinstance(v, dict) and TENSOR in v else v for k, v in values.items()}
    return {
        "analysis": result.meta.analysis,
        "identity": result.identity,
        "summary": result.summary(),
        "command": result.meta.command(),
        "meta": asdict(result.meta),
        "fields": fields,
        "table": {"columns": [str(c) for c in frame.columns], "rows": [[_plain(v) for v in row] for row in rows(frame)]},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
