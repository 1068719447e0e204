"""The numbers of the entity-tracking study as one table: shares of prompts with their intervals, and what was published beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp import plots
from interp.models import ModelPair
from interp.prompts import Prompts
from interp.results import Result, analysis
from interp.stats import wilson

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SOURCE = (
    "Published numbers are those of Prakash et al. 2024 (arXiv 2402.14811) for Llama-7B in place of base, FLoat-7B (tuned in all "
    "weights) in place of boxes-tuned and Goat-7B (an adapter) in place of boxes-lora; but for the accuracies they are read from the "
    "authors' released notebooks. What was set in Llama are the heads of the tuned circuit that a mask chose. In their hooked runs "
    "the adapter on W_O is dropped, every label cell is 0 because the target is encoded wrongly, and a position target is met by doing "
    "nothing in about 13 % of pairs (here in none)."
)

PUBLISHED: Mapping[str, float | tuple[float, float]] = {
    "accuracy: base": 0.66,
    "accuracy: boxes-tuned": 0.82,
    "accuracy: boxes-lora": 0.82,
    "circuit alone: of base in base": 0.66,
    "circuit alone: of base in boxes-tuned": 0.72,
    "circuit alone: of boxes-tuned in base": 0.69,
    "circuit alone: of boxes-tuned in boxes-tuned": 0.82,
    "circuit alone: of base in boxes-lora": 0.73,
    "circuit alone: of boxes-lora in base": 0.77,
    "circuit alone: of boxes-lora in boxes-lora": 0.81,
    "base with heads of: boxes-tuned, circuit": 0.82,
    "base with heads of: boxes-tuned, value_fetcher": 0.82,
    "base with heads of: boxes-tuned, position_transmitter": 0.74,
    "base with heads of: boxes-tuned, position_detector": 0.56,
    "base with heads of: boxes-tuned, structure_reader": 0.65,
    "base with heads of: boxes-lora, circuit": 0.82,
    "base with heads of: boxes-lora, value_fetcher": 0.82,
    "base with heads of: boxes-lora, position_transmitter": 0.78,
    "base with heads of: boxes-lora, position_detector": 0.62,
    "base with heads of: boxes-lora, structure_reader": 0.65,
    **{
        f"target by heads: {role} {what}, of {of} in {into}": value
        for (role, what), values in {
            ("value_fetcher", "object"): (0.456, 0.633, 0.659, 0.494, 0.547),
            ("value_fetcher", "position"): (0.128, 0.134, 0.138, 0.139, 0.139),
            ("position_transmitter", "position"): (0.369, 0.471, 0.386, 0.517, 0.434),
            ("position_transmitter", "object"): (0.029, 0.037, 0.030, 0.063, 0.070),
            ("position_detector", "position"): (0.440, 0.547, 0.442, 0.495, 0.423),
            ("position_detector", "object"): (0.021, 0.029, 0.025, 0.019, 0.020),
        }.items()
        for (of, into), value in zip(
            (
                ("base", "base"),
                ("base", "boxes-tuned"),
                ("base", "boxes-lora"),
                ("boxes-tuned", "boxes-tuned"),
                ("boxes-lora", "boxes-lora"),
            ),
            values,
            strict=True,
        )
    },
    "position told, base: plain": 0.369,
    "position told, base: text_before": 0.348,
    "position told, base: text_after": 0.341,
    "position told, base: words_between": 0.388,
    "position told, base: no_commas": 0.375,
    "position told, base: comma_after_object": 0.363,
    "position told, base: segment_after": 0.305,
    "position told, base: segment_before": 0.255,
    "position told, base: boxes_before_target": 0.194,
    "position told, base: not_in_target": 0.180,
    "position told, base: reordered_target": 0.161,
    "position told, base: plain, the next segment (control)": 0.162,
    "blocked from layer 0: END to target, base": 0.04,
    "blocked from layer 0: END to query_label, base": (0.35, 0.39),
    "blocked from layer 0: query_label to previous_query_label, base": 0.05,
    "heads of base's that are in: boxes-tuned": 54 / 72,
    "heads of base's that are in: boxes-lora": 54 / 72,
}
"""By the name of a row; from and to where one value for several layers (END to the query label: up to layer 11) is all there is."""

PAPER = "published, Llama-7B"
COUNTED = "heads of base's that are in"
"""Rows of this kind count heads, which are not drawn from anything: no interval."""


@dataclass(frozen=True, eq=False)
class EntityTrackingResult(Result):
    """Every share of the study.

    Attributes:
        hits: row -> 1 where the answer or the target came, per prompt.
        published: of every row from and to, which are the same for a single number; NaN where nothing was.
    """

    hits: dict[str, Tensor]
    published: Float[Tensor, "row end"]

    def share(self, row: str) -> float:
        """The mean of a row."""
        return float(self.hits[row].double().mean())

    def summary(self) -> str:
        """The accuracies, and how many rows have a published number beside them."""
        told = [f"{name.partition(': ')[2]} {self._told(name)}" for name in self.hits if name.startswith("accuracy: ")]
        known = int((~self.published[:, 0].isnan()).sum())
        return f"Accuracy of {', '.join(told)}; {len(self.hits)} shares, {known} of them with a published number of Llama-7B beside them"

    def _told(self, row: str) -> str:
        low, high = self._ends(row)
        return f"{self.share(row):.2f} [{low:.2f}, {high:.2f}]"

    def _ends(self, row: str) -> tuple[float, float]:
        x, none = self.hits[row], float("nan")
        return (none, none) if row.startswith(COUNTED) else wilson(int(x.sum()), len(x))

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per share, with its 95 % Wilson interval; ``per="prompt"`` one per prompt.

        ``published`` is a number, and ``published_to`` another one where a range was published.
        """
        import pandas as pd

        if per:
            rows = [{"row": name, "prompt": i, "hit": x} for name, hits in self.hits.items() for i, x in enumerate(hits.tolist())]
            return pd.DataFrame(rows)
        rows = []
        for (name, hits), published in zip(self.hits.items(), self.published.tolist(), strict=True):
            what, _, row = name.partition(": ")
            low, high = self._ends(name)
            least, most = published
            there = {"published": least, "published_to": most if most != least else float("nan")}
            rows.append({"what": what, "row": row, "ours": self.share(name), "low": low, "high": high, "n": len(hits), **there})
        kinds = list(dict.fromkeys(row["what"] for row in rows))
        return pd.DataFrame(sorted(rows, key=lambda row: kinds.index(row["what"])))

    def strongest(self, n: int = 200) -> pd.DataFrame:
        """All of them."""
        return self.to_frame().head(n)

    def plot(self) -> go.Figure:
        """The first kind of rows."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """One figure per kind of rows."""
        frame, made = self.to_frame(), {}
        for what, rows in frame.groupby("what", sort=False):
            series = {"ours": rows.ours.tolist()}
            if rows.published.notna().any():
                series[PAPER] = rows.published.tolist()
            ranges = rows.published_to.fillna(rows.published).tolist()
            made[str(what)] = plots.bars(
                rows.row.tolist(),
                series,
                intervals={"ours": (rows.low.tolist(), rows.high.tolist()), PAPER: (rows.published.tolist(), ranges)},
                title=f"{what}, n = {int(rows.n.min())}",
                ylabel="share of heads" if what == COUNTED else "share of prompts, 95 % interval",
                horizontal=True,
            )
        return made


@analysis(version=1)
def entity_tracking(pair: ModelPair, prompts: Prompts, measured: dict[str, list[int]]) -> EntityTrackingResult:
    """Every share of the study beside what was published.

    Args:
        pair: the models the study is about.
        prompts: the questions.
        measured: row -> 0 or 1 per prompt.
    """
    told = [PUBLISHED.get(name, torch.nan) for name in measured]
    published = torch.tensor([x if isinstance(x, tuple) else (x, x) for x in told])
    return EntityTrackingResult(hits={name: torch.tensor(hits) for name, hits in measured.items()}, published=published)


def printed(found: EntityTrackingResult) -> str:
    """The table as text."""
    lines, before = [], ""
    for r in found.to_frame().to_dict("records"):
        if r["what"] != before:
            before = r["what"]
            lines += ["", f"{before:62} {'ours':>20} {'published':>10}"]
        ends = "" if r["low"] != r["low"] else f" [{r['low']:.2f}, {r['high']:.2f}]"
        published = "" if r["published"] != r["published"] else f"{r['published']:.2f}"
        published += "" if r["published_to"] != r["published_to"] else f"-{r['published_to']:.2f}"
        ours = f"{r['ours']:.2f}{ends}"
        lines.append(f"  {r['row']:60} {ours:>20} {published:>10}".rstrip())
    return "\n".join(lines[1:])
