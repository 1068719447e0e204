"""Which answers of a task did fine-tuning gain, and which did it lose?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.prompts import Prompts, clean_prompts
from interp.results import Result, analysis
from interp.spelling import spelled
from interp.stats import Estimate, mcnemar, single, wilson

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair
    from interp.tasks.base import Task

SIDES = ("base", "tuned")
FLIPS = ("right in both", "lost", "gained", "wrong in both")
_CHUNK = 128  # prompts whose logits over the whole vocabulary are held at a time
_SHOWN = 20
_MOST_VALUES = 24  # of a tag that is drawn


@dataclass(frozen=True, eq=False)
class TaskAccuracyResult(Result):
    """Right and wrong answers of two models on the same prompts.

    Attributes:
        right: the answer is right.
        margin: log-odds of the answer against the best other candidate, nats; NaN where answers are not one token.
        jitter: answers of a model that change between right and wrong when the prompts run in other batches.
        task: text form.
        among: candidates: ``options`` of the prompt, the whole ``vocabulary``, or ``text`` for a written continuation.
        chance: accuracy of a guess among the options; None among the whole vocabulary.
        texts: the prompts.
        answers: the right answers.
        said: side -> what the model answers; empty for written continuations that did not flip.
        tags: tag -> value of every prompt.
        labels: of the axis ``side``.
    """

    right: Bool[Tensor, "side prompt"]
    margin: Float[Tensor, "side prompt"]
    jitter: Int[Tensor, " side"]
    task: str
    among: str
    chance: float | None
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    said: dict[str, tuple[str, ...]]
    tags: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[str, ...]]

    @property
    def accuracy(self) -> Float[Tensor, " side"]:
        """Share of right answers."""
        return self.right.double().mean(1)

    @property
    def lost(self) -> Bool[Tensor, " prompt"]:
        """Right in the base, wrong in the tuned model: negative flips."""
        return self.right[0] & ~self.right[1]

    @property
    def gained(self) -> Bool[Tensor, " prompt"]:
        """Wrong in the base, right in the tuned model: positive flips."""
        return ~self.right[0] & self.right[1]

    @property
    def nfr(self) -> float:
        """Negative flip rate: share of the prompts that were lost."""
        return float(self.lost.double().mean())

    @property
    def pfr(self) -> float:
        """Positive flip rate: share of the prompts that were gained. ``pfr - nfr`` is the change of accuracy."""
        return float(self.gained.double().mean())

    @property
    def independent(self) -> tuple[float, float]:
        """NFR and PFR of two models with these accuracies that err independently: a0 (1 - a1) and (1 - a0) a1."""
        before, after = self.accuracy.tolist()
        return before * (1 - after), (1 - before) * after

    @property
    def p_value(self) -> float:
        """Exact McNemar test of equal accuracy."""
        return mcnemar(int(self.lost.sum()), int(self.gained.sum()))

    @property
    def above_chance(self) -> Bool[Tensor, " side"]:
        """Models whose interval lies above chance (above 0 where there is no chance level)."""
        return torch.tensor([self.interval(side)[0] > (self.chance or 0.0) for side in SIDES])

    def interval(self, side: str) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy of ``base`` or ``tuned``."""
        return _interval(self.right[SIDES.index(side)])

    def summary(self) -> str:
        """Both accuracies with intervals and chance, flips against independent models, the test and the floor."""
        n = self.right.shape[1]
        before, after = (
            f"{a:.1%} [{low:.1%}, {high:.1%}]" for a, (low, high) in zip(self.accuracy, map(self.interval, SIDES), strict=True)
        )
        chance = "" if self.chance is None else f", chance {self.chance:.1%}"
        near = [s for s, above in zip(SIDES, self.above_chance, strict=True) if not above]
        note = f"; not above chance: {' and '.join(near)}" if near and self.chance else ""
        expected_lost, expected_gained = self.independent
        gained = f"{int(self.gained.sum())} answers gained ({self.pfr:.1%}; {expected_gained:.1%} if the models erred independently)"
        lost = f"{int(self.lost.sum())} lost ({self.nfr:.1%}; {expected_lost:.1%})"
        return (
            f"Accuracy on {self.task} goes from {before} in base to {after} in tuned (n = {n}{chance}{note}): {gained} and {lost}, "
            f"exact McNemar p = {self.p_value:.2g}; rounding alone flips {int(self.jitter.max())}"
        )

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """Both accuracies."""
        accuracies = zip(SIDES, self.accuracy.tolist(), strict=True)
        return {f"accuracy on {self.task}": {side: single(value, *self.interval(side)) for side, value in accuracies}}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row for all prompts and one per value of every tag; ``per="prompt"``: one row per prompt.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        return pd.DataFrame(self._prompts() if per else [self._row(*group) for group in self._groups()])

    def _groups(self) -> Iterator[tuple[str, str, list[int]]]:
        """Tag, value and prompts: first all of them."""
        yield "all", "", list(range(len(self.texts)))
        for tag, values in self.tags.items():
            for value in sorted(set(values), key=_natural):
                yield tag, value, [i for i, v in enumerate(values) if v == value]

    def _row(self, tag: str, value: str, rows: list[int]) -> dict[str, Any]:
        right = self.right[:, rows]
        row: dict[str, Any] = {"tag": tag, "value": value, "n": len(rows)}
        for i, side in enumerate(SIDES):
            low, high = _interval(right[i])
            row |= {f"accuracy_{side}": float(right[i].double().mean()), f"low_{side}": low, f"high_{side}": high}
        gained, lost = (int(flips[rows].sum()) for flips in (self.gained, self.lost))
        before, after = row["accuracy_base"], row["accuracy_tuned"]
        row |= {"change": (gained - lost) / len(rows), "nfr": lost / len(rows), "pfr": gained / len(rows)}
        row |= {"nfr_independent": before * (1 - after), "pfr_independent": (1 - before) * after, "p": mcnemar(lost, gained)}
        margins = self.margin[:, rows].double().mean(1).tolist()
        return row | {f"margin_{side}": m for side, m in zip(SIDES, margins, strict=True)}

    def _prompts(self) -> Iterator[dict[str, Any]]:
        for i, text in enumerate(self.texts):
            row: dict[str, Any] = {"prompt": i, "text": text, "answer": self.answers[i], "flip": self.flip(i)}
            for k, side in enumerate(SIDES):
                row |= {
                    f"right_{side}": bool(self.right[k, i]),
                    f"said_{side}": self.said[side][i],
                    f"margin_{side}": float(self.margin[k, i]),
                }
            yield row | {tag: values[i] for tag, values in self.tags.items()}

    def flip(self, prompt: int) -> str:
        """What became of the answer to a prompt, one of ``FLIPS``."""
        before, after = self.right[:, prompt].tolist()
        return FLIPS[2 * (not before) + (before != after if before else not after)]

    def flipped(self, which: Literal["lost", "gained"]) -> list[int]:
        """Prompts that were lost or gained, the largest change of the margin first."""
        rows = (self.lost if which == "lost" else self.gained).nonzero().flatten()
        size = (self.margin[1] - self.margin[0])[rows].abs().nan_to_num(0.0)
        return rows[size.argsort(descending=True, stable=True)].tolist()

    def plot(self) -> go.Figure:
        """Accuracy of both models with 95 % intervals and chance."""
        return self._bars(["all prompts"], [list(range(len(self.texts)))], f"Accuracy on {self.task} (n = {len(self.texts)})")

    def figures(self) -> dict[str, go.Figure]:
        """Accuracy, flips against independent models, margins, and accuracy by every tag with few values."""
        drawn = {"Accuracy": self.plot(), "Answers gained and lost": self._flip_bars()}
        if not self.margin.isnan().all():
            drawn["Margins"] = self._margins()
        for tag, values in self.tags.items():
            if 2 <= len(set(values)) <= _MOST_VALUES:
                groups = [(value, rows) for t, value, rows in self._groups() if t == tag]
                names = [f"{value} (n={len(rows)})" for value, rows in groups]
                drawn[f"Accuracy by {tag}"] = self._bars(names, [rows for _, rows in groups], f"Accuracy on {self.task} by {tag}")
        return drawn

    def _bars(self, names: Sequence[str], groups: Sequence[list[int]], title: str) -> go.Figure:
        ends = {side: [_interval(self.right[i, rows]) for rows in groups] for i, side in enumerate(SIDES)}
        return plots.bars(
            names,
            {side: [float(self.right[i, rows].double().mean()) for rows in groups] for i, side in enumerate(SIDES)},
            intervals={side: ([e[0] for e in pair], [e[1] for e in pair]) for side, pair in ends.items()},
            title=title,
            ylabel="share of right answers, 95 % interval",
            reference=self.chance,
            reference_label="chance",
        )

    def _flip_bars(self) -> go.Figure:
        n = len(self.texts)
        counts = [int(self.lost.sum()), int(self.gained.sum())]
        ends = [wilson(k, n) for k in counts]
        return plots.bars(
            ["lost", "gained"],
            {"observed": [k / n for k in counts], "if the models erred independently": list(self.independent)},
            intervals={"observed": ([e[0] for e in ends], [e[1] for e in ends])},
            title=f"Answers lost (right in base, wrong in tuned) and gained on {self.task}",
            ylabel="share of prompts, 95 % interval",
            floor=float(self.jitter.max()) / n,
            horizontal=False,
        )

    def _margins(self) -> go.Figure:
        return plots.scatter(
            self.margin[0],
            self.margin[1],
            labels=[f"{i}: {text[-70:]}" for i, text in enumerate(self.texts)],
            groups=[self.flip(i) for i in range(len(self.texts))],
            title=f"Log-odds of the answer against the best other candidate ({self.among})",
            xlabel="margin in base, nats",
            ylabel="margin in tuned, nats",
            diagonal=True,
        )

    def html(self) -> str:
        """The flipped prompts with what each model answered, the largest change of the margin first."""
        return self._table("lost", "Lost: right in base, wrong in tuned") + self._table("gained", "Gained: wrong in base, right in tuned")

    def _table(self, which: Literal["lost", "gained"], heading: str) -> str:
        rows = self.flipped(which)
        if not rows:
            return f"<h4>{heading}</h4><p>None of {len(self.texts)} prompts.</p>"
        head = "".join(f"<th>{h}</th>" for h in ("prompt", "text", "answer", "base says", "tuned says", "margin in base", "in tuned"))
        body = []
        for i in rows[:_SHOWN]:
            words = (plots.visible(w) for w in (self.answers[i], *(self.said[side][i] for side in SIDES)))
            numbers = ("" if math.isnan(m) else f"{m:.2f}" for m in self.margin[:, i].tolist())
            cells = [str(i), plots.escape(self.texts[i]).replace("\n", "<br>"), *(f"<code>{w}</code>" for w in words), *numbers]
            body.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
        more = f"<p>The first {_SHOWN} of {len(rows)}.</p>" if len(rows) > _SHOWN else ""
        return f"<h4>{heading}</h4><table><tr>{head}</tr>{''.join(body)}</table>{more}"


@analysis(version=1)
def task_accuracy(
    pair: ModelPair, task: Task, *, n: int = 200, among: Literal["auto", "options", "vocabulary"] = "auto", seed: int = 0
) -> TaskAccuracyResult:
    """Which answers of a task did fine-tuning gain, and which did it lose?

    Both models answer the same prompts. Beside the accuracies with Wilson intervals: negative and positive flips (right
    to wrong, wrong to right; Echterhoff et al. 2024, arXiv 2407.09435), whose difference is exactly the change of
    accuracy, compared with those of two models that err independently; the exact McNemar test; and the log-odds of the
    answer against the best other candidate. Answers are judged by the most likely candidate, never by sampling.

    Args:
        pair: the two models.
        task: draws the prompts and judges the answers.
        n: number of prompts.
        among: candidates for the answer: the ``options`` of the prompt, for which chance is known, or the whole ``vocabulary``;
            ``auto`` takes the options where there are any.
        seed: of the prompts.

    Raises:
        InputError: the task has no right answers or does not fit the tokenizer, or there are no options to choose among.
    """
    if among not in ("auto", "options", "vocabulary"):
        raise InputError(f"among must be auto, options or vocabulary, but it is {among!r}")
    drawn = task.generate(pair, n, seed)
    asked = clean_prompts(drawn)
    if among == "auto":
        among = "options" if asked.answers is not None and asked.options is not None else "vocabulary"
    right, jitter, margins, tops = [], [], [], []
    for _, model in pair.sides():
        right.append(task.score(model, asked, among).bool().cpu())
        again = [list(range(len(asked)))[i::2] for i in range(min(2, len(asked)))]
        other = torch.empty(len(asked), dtype=torch.bool)
        for rows in again:
            other[rows] = task.score(model, asked[rows], among).bool().cpu()
        jitter.append(int((other != right[-1]).sum()))
        margin, top = _margins(model, asked, among)
        margins.append(margin)
        tops.append(top)
    flips = (right[0] != right[1]).nonzero().flatten().tolist()
    return TaskAccuracyResult(
        right=torch.stack(right),
        margin=torch.stack(margins),
        jitter=torch.tensor(jitter),
        task=str(task),
        among=among if asked.answers is not None else "text",
        chance=task.chance if among == "options" or asked.answers is None else None,
        texts=asked.texts,
        answers=tuple(spelled(pair.base, asked.answers)) if asked.answers is not None else asked.targets or ("",) * len(asked),
        said={side: _said(model, asked, top, flips) for (side, model), top in zip(pair.sides(), tops, strict=True)},
        tags={k: tuple(v) for k, v in asked.tags.items()},
        labels={"side": SIDES},
    )


def _margins(model: HookedModel, prompts: Prompts, among: str) -> tuple[Float[Tensor, " prompt"], Int[Tensor, " prompt"] | None]:
    """Log-odds of the answer against the best other candidate, and the best candidate; NaN and None without one-token answers."""
    if prompts.answers is None:
        return torch.full((len(prompts),), torch.nan), None
    margins, tops = [], []
    for start in range(0, len(prompts), _CHUNK):
        part = prompts[start : start + _CHUNK]
        options = part.options if among == "options" else None
        logits = candidates(model.logits(part.batch(), at="END").float().cpu(), options)
        answers = torch.tensor(part.answers)[:, None]
        mine = logits.gather(1, answers)
        margins.append((mine - logits.scatter(1, answers, -torch.inf).max(1, keepdim=True).values)[:, 0])
        tops.append(logits.argmax(1))
    return torch.cat(margins), torch.cat(tops)


def candidates(logits: Float[Tensor, "prompt vocab"], options: Sequence[Sequence[int]] | None) -> Float[Tensor, "prompt vocab"]:
    """The logits with everything but the options ruled out; unchanged without options."""
    if options is None:
        return logits
    kept = torch.full_like(logits, -torch.inf)
    for row, ids in enumerate(options):
        kept[row, list(ids)] = logits[row, list(ids)]
    return kept


def _said(model: HookedModel, prompts: Prompts, top: Int[Tensor, " prompt"] | None, flips: Sequence[int]) -> tuple[str, ...]:
    """What the model answers: the best candidate, or for written answers the continuation of the flipped prompts."""
    if top is not None:
        return tuple(spelled(model, top.tolist()))
    texts = [""] * len(prompts)
    if flips:
        length = max(len(model.tokens(t)) for t in prompts.targets or ("",)) + 2
        for row, new in zip(flips, model.generate(prompts[list(flips)].batch(), length), strict=True):
            texts[row] = model.decode(new)
    return tuple(texts)


def _interval(right: Bool[Tensor, " prompt"]) -> tuple[float, float]:
    return wilson(int(right.sum()), len(right))


def _natural(value: str) -> tuple[float, str]:
    """Numbers by size, then words."""
    return (float(value), "") if value.lstrip("-").isdigit() else (math.inf, value)
