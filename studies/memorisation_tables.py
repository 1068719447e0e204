"""The numbers of the memorisation study: what each cut leaves of memory, skills and text, as shares of what base has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp import plots
from interp.models import HookedModel
from interp.prompts import Prompts
from interp.results import Result, analysis
from interp.stats import Estimate, bootstrap, ratio_of_means, resample_counts, wilson

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

UNCUT = "base"
KINDS = ("memorised", "arithmetic", "closed book", "open book", "logic")
"""Rows are named ``kind: what``. The last two find the answer in the prompt, the two before them in the weights."""
CLOSED, OPEN = ("arithmetic", "closed book"), ("open book", "logic")
TEXT, RANKS = "text: loss", "text: nDCG@10"
EDIT_DISTANCE = "distance: held-out canaries"


@dataclass(frozen=True, eq=False)
class MemorisationResult(Result):
    """What every cut leaves.

    Attributes:
        values: ``cut | kind: what`` -> per prompt 1 where it was right, the loss, the agreement, or the edit distance.
        settings: cut -> what it is.
        seed: of the resampling.
    """

    values: dict[str, Tensor]
    settings: dict[str, str]
    seed: int

    def of(self, cut: str, row: str) -> Tensor:
        """Per prompt."""
        return self.values[f"{cut} | {row}"].double()

    def rows(self, *kinds: str) -> list[str]:
        """Rows of some kinds, as they were measured in base."""
        names = [key.partition(" | ")[2] for key in self.values if key.startswith(f"{UNCUT} | ")]
        return [name for name in names if name.partition(": ")[0] in kinds]

    def retention(self, cut: str, row: str) -> Estimate:
        """Right answers after the cut over those before, resampled over prompts; Wilson's interval where all or none are right after it."""
        after, before = self.of(cut, row), self.of(UNCUT, row)
        k, n = int(after.sum()), len(after)
        if k not in (0, n):
            return ratio_of_means(after, before, seed=self.seed)
        share = before.mean()
        low, high = (x / share for x in wilson(k, n))
        return Estimate(after.mean() / share, low, high)

    def ratio(self, cut: str) -> Estimate:
        """Perplexity over base's: exp of the difference of the mean losses."""
        e = bootstrap(self.of(cut, TEXT) - self.of(UNCUT, TEXT), seed=self.seed)
        return Estimate(e.value.exp(), e.low.exp(), e.high.exp())

    def gap(self, cut: str) -> Estimate:
        """Mean retention of what is looked up in the prompt minus that of what only the weights know; prompts of each task resampled."""
        sides = []
        for kinds in (OPEN, CLOSED):
            each = []
            for i, row in enumerate(self.rows(*kinds)):
                after, before = self.of(cut, row), self.of(UNCUT, row)
                counts = resample_counts(len(after), self.seed + 100 * (kinds == OPEN) + i)
                each.append(torch.cat([(after.mean() / before.mean())[None], (counts @ after) / (counts @ before)]))
            sides.append(torch.stack(each).mean(0))
        drawn = sides[0] - sides[1]
        low, high = drawn[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return Estimate(drawn[0], low, high)

    def summary(self) -> str:
        """Held-out recitation and perplexity of the first cut."""
        cut, row = next(iter(self.settings)), self.rows("memorised")[0]
        return f"{cut} ({self.settings[cut]}) leaves {self.retention(cut, row)} of the {row}, at {self.ratio(cut)} times base's perplexity"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per cut and what was measured; ``per="prompt"`` one per prompt."""
        import pandas as pd

        if per:
            return pd.DataFrame(
                {"cut": cut, "row": row, "prompt": i, "value": x}
                for key, column in self.values.items()
                for cut, _, row in [key.partition(" | ")]
                for i, x in enumerate(column.tolist())
            )
        found = []
        for cut, setting in self.settings.items():
            for row in self.rows(*KINDS):
                e, n = self.retention(cut, row), len(self.of(cut, row))
                base = float(self.of(UNCUT, row).mean())
                found.append(_row(cut, setting, row, "retention", e, n) | {"base": base, "after": float(self.of(cut, row).mean())})
            found.append(_row(cut, setting, "text: perplexity", "ratio", self.ratio(cut), len(self.of(cut, TEXT))))
            for row, what in ((RANKS, "nDCG"), (EDIT_DISTANCE, "mean")):
                found.append(_row(cut, setting, row, what, bootstrap(self.of(cut, row), seed=self.seed), len(self.of(cut, row))))
        return pd.DataFrame(found)

    def strongest(self, n: int = 400) -> pd.DataFrame:
        """All of them."""
        return self.to_frame().head(n)

    def plot(self) -> go.Figure:
        """The first cut."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """Retention of everything, one figure per cut."""
        return {cut: self._bars(cut, setting) for cut, setting in self.settings.items()}

    def _bars(self, cut: str, setting: str) -> go.Figure:
        rows = self.rows(*KINDS)
        left = [self.retention(cut, row) for row in rows]
        return plots.bars(
            rows,
            {"retention": [float(e.value) for e in left]},
            intervals={"retention": ([float(e.low) for e in left], [float(e.high) for e in left])},
            title=f"{cut}: {setting}, perplexity x {float(self.ratio(cut).value):.3f}",
            ylabel="share of base's right answers, 95 % interval",
            reference=1.0,
            reference_label="base",
            horizontal=True,
        )


def _row(cut: str, setting: str, row: str, what: str, e: Estimate, n: int) -> dict[str, object]:
    low, high = _ends(e)
    return {"cut": cut, "setting": setting, "row": row, "what": what, "value": float(e.value), "low": low, "high": high, "n": n}


def _ends(e: Estimate) -> tuple[float, float]:
    return float(e.low), float(e.high)


@analysis(version=1)
def memorisation(
    model: HookedModel, prompts: Prompts, measured: dict[str, list[float]], settings: dict[str, str], *, seed: int = 0
) -> MemorisationResult:
    """What every cut leaves of memory, skills and text.

    Args:
        model: the model that is cut.
        prompts: the held-out canaries.
        measured: ``cut | kind: what`` -> one number per prompt.
        settings: cut -> what it is.
        seed: of the resampling.
    """
    values = {name: torch.tensor(column, dtype=torch.float64) for name, column in measured.items()}
    return MemorisationResult(values=values, settings=settings, seed=seed)


def printed(found: MemorisationResult) -> str:
    """The table as text: rows are cuts."""
    rows = found.rows(*KINDS)
    lines = ["Share of base's right answers that is left, 95 % interval; in the first line those of base", ""]
    width = max(len(cut) for cut in found.settings) + 2
    for some in (rows[:4], rows[4:7], rows[7:]):
        if not some:
            continue
        lines.append(" " * width + "".join(f"{row:>34}" for row in some))
        lines.append(f"{UNCUT:{width}}" + "".join(f"{float(found.of(UNCUT, row).mean()):>34.2f}" for row in some))
        for cut in found.settings:
            cells = "".join(f"{_told(found.retention(cut, row)):>34}" for row in some)
            lines.append(f"{cut:{width}}{cells}")
        lines.append("")
    lines.append(" " * width + "".join(f"{what:>26}" for what in ("perplexity ratio", "nDCG@10", "edit distance / L", "open - closed")))
    for cut, setting in found.settings.items():
        more = (bootstrap(found.of(cut, row), seed=found.seed) for row in (RANKS, EDIT_DISTANCE))
        cells = "".join(f"{_told(e):>26}" for e in (found.ratio(cut), *more, found.gap(cut)))
        lines.append(f"{cut:{width}}{cells}   {setting}")
    return "\n".join(lines)


def _told(e: Estimate) -> str:
    return f"{float(e.value):.2f} [{float(e.low):.2f}, {float(e.high):.2f}]"
