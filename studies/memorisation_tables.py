"""The numbers of the memorisation study: what each cut leaves of memory, skills and text, as shares of what base has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp import plots
from interp.models import HookedModel
from interp.prompts import Prompts
from interp.results import Result, analysis
from interp.stats import Estimate, bootstrap, ratio_of_means

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

UNCUT = "base"
KINDS = ("memorised", "arithmetic", "closed book", "open book", "logic")
"""Rows are named ``kind: what``. The last two find the answer in the prompt, the two before them in the weights."""
CLOSED, OPEN = ("arithmetic", "closed book"), ("open book", "logic")
TEXT, TOKENS, RANKS = "text: loss", "text: tokens", "text: nDCG@10"
EDIT_DISTANCE = "distance: held-out canaries"
DRAW = ", draw "
"""Cuts named ``name, draw 1``, ``name, draw 2``, ... are one random control, drawn several times."""
DRAWS, ENDS = 20_000, torch.tensor([0.025, 0.975], dtype=torch.float64)


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
        """Right answers after the cut over those before, with the 95 % interval of ``draws``; its ends hold the value itself."""
        after, before = self.of(cut, row), self.of(UNCUT, row)
        value = after.mean() / before.mean()
        low, high = self.draws(cut, row).quantile(ENDS)
        return Estimate(value, torch.minimum(low, value) * bool(after.any()), torch.maximum(high, value))

    def draws(self, cut: str, row: str) -> Float[Tensor, " draw"]:
        """What the retention may be, given how the prompts came out: draws from its posterior.

        With q the chance that base is right, s that the cut model is right where base is (what it keeps), and g that it is right where
        base is not (what it gains), retention is ``s + g (1 - q) / q``. Each of the three is drawn from the posterior of a share under
        Jeffreys' prior, Beta(k + 1/2, n - k + 1/2), which has width also when k is 0 or n; a bootstrap has none then, and says
        [1, 1] of 24 answers that all stayed right. Where base is right throughout, nothing can be gained, and retention is s.
        (Brown, Cai and DasGupta 2001, Statistical Science 16, 101, for one share; that it is put together of three is ours.)

        Of 24 prompts that base gets all right (q = 1), the 95 % interval holds the truth in 95 % of cuts on average over s, in 89 % at
        worst (s = 0.9); of 120, in 88 % at worst (s = 0.98). Where base fails now and then but was right throughout, gains are not seen:
        the upper end is then 1 for a truth of 1 + g (1 - q) / q (1.003 for q = 0.97, g = 0.1 and s = 1, missed by half of the intervals).
        """
        after, before = self.of(cut, row) > 0, self.of(UNCUT, row) > 0
        draw = np.random.default_rng([self.seed % 2**64, *row.encode()])  # rows are drawn apart, all cuts from the same stream
        n, known = len(before), int(before.sum())
        if not known:
            return torch.full((DRAWS,), torch.nan, dtype=torch.float64)

        def share(k: int, of: int) -> np.ndarray:
            return draw.beta(k + 0.5, of - k + 0.5, DRAWS)

        found = share(int((after & before).sum()), known)
        if known < n:
            q = share(known, n)
            found = found + share(int((after & ~before).sum()), n - known) * (1 - q) / q
        return torch.from_numpy(found)

    def ratio(self, cut: str) -> Estimate:
        """Perplexity over base's, both exp of the mean loss of all tokens of all texts; texts are resampled."""
        tokens = self.of(UNCUT, TOKENS)
        e = ratio_of_means((self.of(cut, TEXT) - self.of(UNCUT, TEXT)) * tokens, tokens, seed=self.seed)
        return Estimate(e.value.exp(), e.low.exp(), e.high.exp())

    def gap(self, cut: str) -> Estimate:
        """Mean retention of what is looked up in the prompt minus that of what only the weights know; the interval is that of ``draws``."""
        value, drawn = [], []
        for kinds in (OPEN, CLOSED):
            rows = self.rows(*kinds)
            value.append(torch.stack([self.retention(cut, row).value for row in rows]).mean())
            drawn.append(torch.stack([self.draws(cut, row) for row in rows]).mean(0))
        found = value[0] - value[1]
        low, high = (drawn[0] - drawn[1]).quantile(ENDS)
        return Estimate(found, torch.minimum(low, found), torch.maximum(high, found))

    def families(self) -> dict[str, list[str]]:
        """The cuts by name; those of a random control, which differ in the draw only, together."""
        found: dict[str, list[str]] = {}
        for cut in self.settings:
            found.setdefault(cut.partition(DRAW)[0], []).append(cut)
        return found

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
        return pd.DataFrame([row for cut in self.settings for row in self._rows(cut, [cut])])

    def _rows(self, name: str, cuts: list[str]) -> list[dict[str, object]]:
        """What is measured of a cut, or of the draws of a control together."""
        many = f", mean of {len(cuts)} draws, least and most" if len(cuts) > 1 else ""
        found = []

        def add(row: str, what: str, values: str, number: Callable[[str], Estimate], **more: float) -> None:
            e, n = over_draws(cuts, number), len(self.of(cuts[0], values))
            ends = {"value": float(e.value), "low": float(e.low), "high": float(e.high)}
            found.append({"cut": name, "setting": self.settings[cuts[0]], "row": row, "what": what + many, **ends, "n": n, **more})

        for row in self.rows(*KINDS):
            after = torch.stack([self.of(cut, row) for cut in cuts]).mean()
            shares = {"base": float(self.of(UNCUT, row).mean()), "after": float(after)}
            add(row, "retention", row, lambda cut, row=row: self.retention(cut, row), **shares)
        add("text: perplexity", "ratio", TEXT, self.ratio)
        for row, what in ((RANKS, "nDCG"), (EDIT_DISTANCE, "mean")):
            add(row, what, row, lambda cut, row=row: self.mean(cut, row))
        return found

    def mean(self, cut: str, row: str) -> Estimate:
        """Over prompts."""
        return bootstrap(self.of(cut, row), seed=self.seed)

    def strongest(self, n: int = 400) -> pd.DataFrame:
        """All of them; the draws of a random control together."""
        import pandas as pd

        return pd.DataFrame([row for name, cuts in self.families().items() for row in self._rows(name, cuts)]).head(n)

    def plot(self) -> go.Figure:
        """The first cut."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """Retention of everything, one figure per cut; the draws of a random control in one."""
        return {name: self._bars(name, cuts) for name, cuts in self.families().items()}

    def _bars(self, name: str, cuts: list[str]) -> go.Figure:
        rows = self.rows(*KINDS)
        left = {cut.partition(DRAW)[2] or "retention": [self.retention(cut, row) for row in rows] for cut in cuts}
        series = {f"draw {k}" if k.isdigit() else k: v for k, v in left.items()}
        ratio = over_draws(cuts, self.ratio)
        return plots.bars(
            rows,
            {k: [float(e.value) for e in v] for k, v in series.items()},
            intervals={k: ([float(e.low) for e in v], [float(e.high) for e in v]) for k, v in series.items()},
            title=f"{name}: {self.settings[cuts[0]]}, perplexity x {float(ratio.value):.3f}",
            ylabel="share of base's right answers, 95 % interval",
            reference=1.0,
            reference_label="base",
            horizontal=True,
        )


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
    rows, families = found.rows(*KINDS), found.families()
    most = max(map(len, families.values()))
    drawn = f" (of {most} random draws their mean, with the least and the most)" if most > 1 else ""
    lines = [f"Share of base's right answers that is left, 95 % interval{drawn}; in the first line those of base", ""]
    width = max(map(len, families)) + 2
    for some in (rows[:4], rows[4:7], rows[7:]):
        if not some:
            continue
        lines.append(" " * width + "".join(f"{row:>34}" for row in some))
        lines.append(f"{UNCUT:{width}}" + "".join(f"{float(found.of(UNCUT, row).mean()):>34.2f}" for row in some))
        for name, cuts in families.items():
            cells = (over_draws(cuts, lambda cut, row=row: found.retention(cut, row)) for row in some)
            lines.append(f"{name:{width}}" + "".join(f"{_told(e):>34}" for e in cells))
        lines.append("")
    lines.append(" " * width + "".join(f"{what:>26}" for what in ("perplexity ratio", "nDCG@10", "edit distance / L", "open - closed")))
    numbers = (found.ratio, lambda cut: found.mean(cut, RANKS), lambda cut: found.mean(cut, EDIT_DISTANCE), found.gap)
    for name, cuts in families.items():
        cells = "".join(f"{_told(over_draws(cuts, number)):>26}" for number in numbers)
        lines.append(f"{name:{width}}{cells}   {found.settings[cuts[0]]}")
    return "\n".join(lines)


def over_draws(cuts: Sequence[str], number: Callable[[str], Estimate]) -> Estimate:
    """A number of a cut with its interval; of several draws of one their mean, with the least and the most of them as ends."""
    found = [number(cut) for cut in cuts]
    if len(found) == 1:
        return found[0]
    values = torch.stack([e.value for e in found])
    return Estimate(values.mean(), values.min(), values.max())


def _told(e: Estimate) -> str:
    return f"{float(e.value):.2f} [{float(e.low):.2f}, {float(e.high):.2f}]"
