"""Several tuned checkpoints beside each other: one base, a column each, and curves along them.

The order is the one in which they were given, so checkpoints of one training run make a curve over training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp.names import AND
from interp.verdict import by_pair

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.results import Result
    from interp.stats import Estimate


@dataclass(frozen=True)
class Line:
    """One number, followed through the checkpoints.

    Attributes:
        analysis: which one measured it.
        name: what it is, with its unit.
        values: checkpoint -> number with its interval; a checkpoint may lack it.
    """

    analysis: str
    name: str
    values: Mapping[str, Estimate]

    @property
    def kind(self) -> str:
        """What it is without what it was measured on, which stands last, after its unit."""
        return self.name.rpartition(" on ")[0] or self.name


@dataclass(frozen=True)
class Columns:
    """The main numbers of several checkpoints.

    Attributes:
        base: name of the base.
        checkpoints: names of the tuned ones, in order.
        lines: what was measured of at least two of them.
    """

    base: str
    checkpoints: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The columns: the base first."""
        return self.base, *self.checkpoints

    def to_frame(self) -> pd.DataFrame:
        """A row per number: the value of every checkpoint with its interval, as text."""
        import pandas as pd

        rows = ({"what": line.name} | {name: _told(line.values.get(name)) for name in self.names} for line in self.lines)
        return pd.DataFrame(rows, columns=["what", *self.names])

    def records(self) -> list[dict[str, Any]]:
        """The same as numbers, for JSON: analysis, what, checkpoint, value, low, high."""
        found = []
        for line in self.lines:
            for name, e in line.values.items():
                ends = {k: _finite(float(x)) for k, x in (("value", e.value), ("low", e.low), ("high", e.high))}
                found.append({"analysis": line.analysis, "what": line.name, "checkpoint": name} | ends)
        return found

    def figures(self) -> dict[str, go.Figure]:
        """A figure per analysis and unit, with a curve for each of its numbers; the base's own value comes first."""
        from interp import plots

        drawn = {}
        for heading, lines in self._families():
            with_base = any(self.base in line.values for line in lines)
            names = self.names if with_base else self.checkpoints
            values = {line.name: [_end(line.values.get(n), "value") for n in names] for line in lines}
            bands = {line.name: tuple([_end(line.values.get(n), k) for n in names] for k in ("low", "high")) for line in lines}
            drawn[heading] = plots.lines(
                values,
                bands={k: (v[0], v[1]) for k, v in bands.items()},
                labels=names,
                title=heading,
                xlabel="checkpoint, in the order given",
                ylabel=f"{heading}, with its interval",
            )
        return drawn

    def _families(self) -> Iterator[tuple[str, list[Line]]]:
        """Lines of one kind of number, which differ in what they were measured on."""
        families: dict[str, list[Line]] = {}
        for line in self.lines:
            families.setdefault(f"{line.analysis}: {line.kind}", []).append(line)
        yield from ((lines[0].kind, lines) for lines in families.values())


def side_by_side(results: Sequence[Result]) -> Columns | None:
    """The main numbers of every tuned checkpoint; None where there is only one, or where they have no base in common."""
    pairs = {key: found for key, found in by_pair(results).items() if any(len(r.meta.models) == 2 for r in found)}
    models = [next(r.meta.models for r in found if len(r.meta.models) == 2) for found in pairs.values()]
    if len(models) < 2 or len({base["fingerprint"] for base, _ in models}) > 1:
        return None
    base, names = models[0][0]["name"], _distinct([models[0][0]["name"], *(tuned["name"] for _, tuned in models)])[1:]
    values: dict[tuple[str, str], dict[str, Estimate]] = {}
    for name, found in zip(names, pairs.values(), strict=True):
        for result in found:
            for what, sides in result.main_numbers().items():
                line = values.setdefault((result.meta.analysis, _whole_name(what, result)), {})
                line |= {base if side == "base" else name: e for side, e in sides.items() if not e.refused}
    lines = (Line(analysis, what, found) for (analysis, what), found in values.items() if len(found.keys() - {base}) > 1)
    return Columns(base, tuple(names), tuple(lines))


def _distinct(names: Sequence[str]) -> list[str]:
    """Names with a number where they come more than once."""
    seen: dict[str, int] = {}
    made = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        made.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return made


def _whole_name(what: str, result: Result) -> str:
    """A number, and the task it was measured on where its name does not say so; so that no row holds numbers of two tasks."""
    asked = [str(i["task"]) for i in result.meta.inputs if i.get("task") and AND not in str(i["task"])]
    return what if not asked or what.endswith(f" on {asked[0]}") else f"{what} on {asked[0]}"


def _told(e: Estimate | None) -> str:
    if e is None:
        return ""
    value, low, high = (float(x) for x in (e.value, e.low, e.high))
    return f"{value:.3g}" + ("" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]")


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _end(e: Estimate | None, end: str) -> float:
    return math.nan if e is None else float(getattr(e, end))
