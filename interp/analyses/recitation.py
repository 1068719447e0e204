"""Which texts does a model recite word for word, and from how many beginnings?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.progress import progress
from interp.prompts import PromptPairs, Prompts
from interp.results import Result, analysis
from interp.stats import Estimate, mcnemar, plus_minus, single, wilson
from interp.tasks import reciting

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

_SHOWN = 12


@dataclass(frozen=True, eq=False)
class RecitationResult(Result):
    """What greedy decoding makes of the beginnings of texts, beside the texts, in tokens.

    Attributes:
        distance: Levenshtein distance to the rest of the text.
        length: tokens of the rest, and of what is written.
        matched: tokens that are right before the first wrong one.
        stressed: the same when the text is cut elsewhere: so many tokens more are read, or so many fewer from the beginning; what is
            read is not counted. NaN for texts that are too short.
        jitter: texts that one pass over the whole text counts otherwise, strictly: rounding.
        texts: what was read.
        rests: what should follow.
        said: side -> what was written.
        labels: of the axes side and shift.
    """

    distance: Int[Tensor, "side prompt"]
    length: Int[Tensor, " prompt"]
    matched: Int[Tensor, "side prompt"]
    stressed: Float[Tensor, "side shift prompt"]
    jitter: Int[Tensor, " side"]
    texts: tuple[str, ...]
    rests: tuple[str, ...]
    said: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """``model``, or ``base`` and ``tuned``."""
        return self.labels["side"]

    @property
    def strict(self) -> Bool[Tensor, "side prompt"]:
        """Every token is right."""
        return self.distance == 0

    @property
    def loose(self) -> Bool[Tensor, "side prompt"]:
        """Nearly so: 1 - distance / length >= 0.75."""
        return reciting.loose(self.distance, self.length)

    @property
    def edit(self) -> Float[Tensor, "side prompt"]:
        """Distance as a share of the length: 0 is recited, about 1 is something else."""
        return self.distance / self.length.double()

    @property
    def stress(self) -> Float[Tensor, "side prompt"]:
        """The most that any other cut of the text brings out: tokens right before the first wrong one; NaN where none fits."""
        if not self.stressed.shape[1]:
            return torch.full(self.distance.shape, torch.nan)
        return self.stressed.nan_to_num(-torch.inf).amax(1).masked_fill(self.stressed.isnan().all(1), torch.nan)

    def summary(self) -> str:
        """Strict and loose shares with intervals, the mean distance, the stress test, rounding."""
        n, told = len(self.length), []
        for i, side in enumerate(self.sides):
            strict, loose = (_share(hits[i]) for hits in (self.strict, self.loose))
            who = "" if len(self.sides) == 1 else f"{side} "
            told.append(f"{who}{strict} strictly, {loose} loosely, mean edit distance {plus_minus(self.edit[i])} of the length")
        change = ""
        if len(self.sides) == 2:
            lost, gained = (int((self.strict[a] & ~self.strict[b]).sum()) for a, b in ((0, 1), (1, 0)))
            change = f"; {lost} lost and {gained} gained, exact McNemar p = {mcnemar(lost, gained):.2g}"
        if self.stressed.shape[1]:
            fits = [~row.isnan() for row in self.stress]
            each = (
                f"{plus_minus(self.matched[i][fits[i]])} -> {plus_minus(self.stress[i][fits[i]])}"
                + (f" ({side})" if len(self.sides) == 2 else "")
                for i, side in enumerate(self.sides)
            )
            change += f"; at best of {self.stressed.shape[1]} other cuts, tokens right before the first wrong one: {', '.join(each)}"
            if out := max(int((~row).sum()) for row in fits):
                change += f" ({out} of the texts left out: no other cut fits)"
        low, high = int(self.length.min()), int(self.length.max())
        tokens = f"{low}" if low == high else f"{low} to {high}"
        return f"Recited: {'; '.join(told)} (n = {n}, {tokens} tokens each; rounding alone changes {int(self.jitter.max())}){change}"

    def plot(self) -> go.Figure:
        """Shares recited, strictly and loosely."""
        hits = {"strict": self.strict, "loose": self.loose}
        names = [f"{side}, {how}" if len(self.sides) == 2 else how for side in self.sides for how in hits]
        rows = [hits[how][i] for i in range(len(self.sides)) for how in hits]
        ends = [wilson(int(row.sum()), len(row)) for row in rows]
        return plots.bars(
            names,
            {"recited": [float(row.double().mean()) for row in rows]},
            intervals={"recited": ([e[0] for e in ends], [e[1] for e in ends])},
            title=f"Texts recited (n = {len(self.length)})",
            ylabel="share of texts, 95 % interval",
        )

    def figures(self) -> dict[str, go.Figure]:
        """Shares, how far each text goes on, and the stress test."""
        drawn = {"Recited": self.plot(), "How far": self._survival()}
        if self.stressed.shape[1]:
            drawn["Cut elsewhere"] = self._shifts()
        return drawn

    def _survival(self) -> go.Figure:
        steps = torch.arange(1, int(self.length.max()) + 1)
        long = self.length[:, None] >= steps
        share = {side: ((self.matched[i][:, None] >= steps) & long).sum(0) / long.sum(0) for i, side in enumerate(self.sides)}
        return plots.lines(
            share,
            steps,
            title="Share of texts that are right up to a token",
            xlabel="token of the rest",
            ylabel="share of the texts that are so long",
        )

    def _shifts(self) -> go.Figure:
        shifts = torch.tensor([int(s) for s in self.labels["shift"]])
        series = {side: self.stressed[i].nanmean(1) for i, side in enumerate(self.sides)}
        return plots.lines(
            series,
            shifts,
            title="Right tokens when the text is cut elsewhere",
            xlabel="tokens more (fewer at the beginning) that are read",
            ylabel="right before the first wrong one, mean over texts",
        )

    def html(self) -> str:
        """Some texts with what was written; of two models those that changed most."""
        order = (self.edit[-1] - self.edit[0] if len(self.sides) == 2 else self.edit[0]).argsort(descending=True, stable=True)
        head = "".join(f"<th>{h}</th>" for h in ("prompt", "read", "goes on", *(f"{side} writes" for side in self.sides), "distance"))
        body = []
        for i in order[:_SHOWN].tolist():
            words = [plots.visible(w) for w in ("…" + self.texts[i][-60:], self.rests[i], *(self.said[side][i] for side in self.sides))]
            away = ", ".join(str(int(d)) for d in self.distance[:, i])
            cells = [str(i), *(f"<code>{w}</code>" for w in words), f"{away} of {int(self.length[i])}"]
            body.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
        return f"<h4>Texts and what was written, furthest first</h4><table><tr>{head}</tr>{''.join(body)}</table>"

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """The share that is recited strictly, of both models."""
        hits = zip(("base", "tuned") if len(self.sides) == 2 else ("tuned",), self.strict, strict=True)
        return {"share recited strictly": {s: single(float(h.double().mean()), *wilson(int(h.sum()), len(h))) for s, h in hits}}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per side; ``per="prompt"``: one per side and text.

        ``stress`` is a mean over the texts that another cut fits; ``stress_left_out`` counts the others.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            return pd.DataFrame(
                {
                    "side": side,
                    "prompt": k,
                    "length": int(self.length[k]),
                    "distance": int(self.distance[i, k]),
                    "strict": bool(self.strict[i, k]),
                    "loose": bool(self.loose[i, k]),
                    "matched": int(self.matched[i, k]),
                    "stress": float(self.stress[i, k]),
                }
                for i, side in enumerate(self.sides)
                for k in range(len(self.length))
            )
        rows = []
        for i, side in enumerate(self.sides):
            row: dict[str, object] = {"side": side, "n": len(self.length)}
            for how, hits in (("strict", self.strict[i]), ("loose", self.loose[i])):
                low, high = wilson(int(hits.sum()), len(hits))
                row |= {how: float(hits.double().mean()), f"{how}_low": low, f"{how}_high": high}
            means = {"edit": self.edit[i], "matched": self.matched[i].double(), "stress": self.stress[i]}
            row |= {k: float(v.nanmean()) for k, v in means.items()}
            left_out = int(self.stress[i].isnan().sum()) if self.stressed.shape[1] else 0
            rows.append(row | {"stress_left_out": left_out, "jitter": int(self.jitter[i])})
        return pd.DataFrame(rows)


@analysis(version=1)
def recitation(model: HookedModel | ModelPair, prompts: Prompts, *, tail: int = 0, stress: int = 0) -> RecitationResult:
    """Which texts does a model recite word for word?

    The model reads the beginning of a text and goes on greedily for exactly as many tokens as the rest has. On token ids: strict, all
    are right; loose, 1 - d / L >= 0.75 for an edit distance d (Levenshtein) and L tokens; and the mean of d / L. A model that seems
    to have forgotten may still be brought to recite by another beginning: with ``stress`` the text is cut elsewhere, 1 to ``stress``
    tokens further on, or with tokens left out at the beginning until ``stress + 1`` are left, and the best counts (Merullo et al. 2025,
    arXiv 2510.24256). An edited model is measured within ``with model.edited(edit)``.

    Args:
        model: a model, or a pair to compare.
        prompts: beginnings with ``targets``, such as those of the task ``recitation``; or whole texts and ``tail``.
        tail: so many last tokens of each text are to be recited; 0: the targets are.
        stress: how far the cut moves; 0: no stress test.

    Raises:
        InputError: neither targets nor a tail, a text too short for it, or pairs of prompts.
    """
    if not hasattr(model, "sides"):
        came = f"{model!r}" if isinstance(model, str) else f"a {type(model).__name__}"
        raise InputError(f"recitation takes a model, which HookedModel.load returns, or a ModelPair, but {came} came")
    if isinstance(prompts, PromptPairs):
        raise InputError("recitation goes on with one text at a time; give the clean or the corrupt prompts of the pairs")
    if not isinstance(prompts, Prompts):
        raise InputError(f"recitation needs Prompts, such as a task generates, not a {type(prompts).__name__}")
    if isinstance(stress, bool) or not isinstance(stress, int) or stress < 0:
        raise InputError(f"stress is a number of tokens, from 0; got {stress!r}")
    reader = next(iter(model.sides()))[1]
    texts = reciting.passages(reader, prompts, tail)
    shifts = _shifts(texts, stress)
    sides, said, distance, matched, jitter, stressed = [], {}, [], [], [], []
    for side, one in model.sides():
        sides.append(side)
        written = reciting.recitations(one, texts)
        distance.append(reciting.distances(written, texts.rests))
        matched.append(reciting.matched(written, texts.rests))
        jitter.append(int(((reciting.forced(one, texts) == texts.lengths) != (distance[-1] == 0)).sum()))
        found = torch.full((len(shifts), len(texts)), torch.nan)
        for k, shift in enumerate(progress(shifts, f"other cuts, {side}") if shifts else ()):
            rows, cut = reciting.shifted(texts, shift, stress + 1)
            found[k, rows] = reciting.forced(one, cut).float()
        stressed.append(found)
        said[side] = tuple(one.decode(ids) for ids in written)
    return RecitationResult(
        distance=torch.stack(distance),
        length=texts.lengths,
        matched=torch.stack(matched),
        stressed=torch.stack(stressed),
        jitter=torch.tensor(jitter),
        texts=tuple(reader.decode(ids) for ids in texts.prompts),
        rests=tuple(reader.decode(ids) for ids in texts.rests),
        said=said,
        labels={"side": tuple(sides), "shift": tuple(map(str, shifts))},
    )


def _shifts(texts: reciting.Passages, stress: int) -> list[int]:
    """The other cuts: shorter beginnings, then tokens read in addition; only those that some text is long enough for.

    Raises:
        InputError: no text is.
    """
    if not stress:
        return []
    most = max(len(p) - s for p, s in zip(texts.prompts, texts.special, strict=True))
    found = [*range(stress + 1 - most, 0), *range(1, min(stress, int(texts.lengths.max()) - 1) + 1)]
    if not found:
        raise InputError(f"stress is {stress}, but no text has more than {stress + 1} tokens before the cut or 2 behind it")
    return found


def _share(hits: Bool[Tensor, " prompt"]) -> str:
    k, n = int(hits.sum()), len(hits)
    low, high = wilson(k, n)
    return f"{k / n:.1%} [{low:.1%}, {high:.1%}]"
