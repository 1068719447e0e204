"""What does a model do when the contribution of tuning is turned down or up?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.progress import progress
from interp.prompts import clean_prompts
from interp.results import Result, analysis
from interp.stats import mcnemar, paired_change, permutation, resample_counts, standard_error, wilson

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import ModelPair
    from interp.tasks.base import Task

Goal = Literal["highest", "lowest"]


@dataclass(frozen=True)
class Chosen:
    """An alpha chosen by cross-validation, and what it gives on prompts that had no part in choosing it.

    Attributes:
        alphas: the choice of each fold, made on the other folds.
        rate: share of right answers, each prompt at the alpha chosen without its fold.
        gained: prompts that are right there and wrong at alpha = 1.
        lost: the reverse.
        n: prompts.
    """

    alphas: tuple[float, ...]
    rate: float
    gained: int
    lost: int
    n: int

    @property
    def delta(self) -> float:
        """``rate`` less the share at alpha = 1."""
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of ``delta``, paired over prompts, for the choices as they were made."""
        return paired_change(self.gained, self.lost, self.n)

    @property
    def p(self) -> float:
        """Exact McNemar test that ``delta`` is 0."""
        return mcnemar(self.lost, self.gained)

    def __str__(self) -> str:
        """The change, its noise, and how often which alpha was chosen."""
        low, high = self.interval
        counts = ", ".join(f"{a:g} in {self.alphas.count(a)}" for a in sorted(set(self.alphas)))
        return f"{self.delta:+.1%} [{low:+.1%}, {high:+.1%}], p = {self.p:.2g} (alpha {counts} of {len(self.alphas)} folds)"


@dataclass(frozen=True, eq=False)
class TucoScalingResult(Result):
    """Right and wrong answers at every alpha on the same prompts.

    Attributes:
        right: the answer is right, or the behaviour is there.
        reference: the same at alpha = 1, along the same kind of stream.
        fold: of the cross-validation; prompts of one context are in one fold.
        differ: answers at alpha = 1 that the tuned model run by itself gets otherwise: only rounding can do that.
        alphas: of the rows of ``right``.
        task: text form.
        among: candidates: ``options`` of the prompt, the whole ``vocabulary``, or ``text`` for a written continuation.
        chance: share that a guess gets right, or None.
        texts: the prompts.
        draw_seed: of folds and resampling.
    """

    right: Bool[Tensor, "alpha prompt"]
    reference: Bool[Tensor, " prompt"]
    fold: Int[Tensor, " prompt"]
    differ: int
    alphas: tuple[float, ...]
    task: str
    among: str
    chance: float | None
    texts: tuple[str, ...]
    draw_seed: int

    @property
    def rate(self) -> Float[Tensor, " alpha"]:
        """Share of right answers."""
        return self.right.double().mean(1)

    @property
    def spearman(self) -> float:
        """Rank correlation of alpha and ``rate``; NaN where the rate is the same at every alpha, or there is one alpha."""
        return float(rank_correlation(torch.tensor(self.alphas), self.rate))

    @property
    def spearman_interval(self) -> tuple[float, float]:
        """95 % of ``spearman`` when prompts are resampled; resamples without any change have none and are left out."""
        # Counts, not shares: equal shares must tie exactly.
        counts = resample_counts(len(self.texts), self.draw_seed) @ self.right.double().T
        ends = rank_correlation(torch.tensor(self.alphas), counts).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return float(ends[0]), float(ends[1])

    def chosen(self, goal: Goal) -> Chosen:
        """The alpha with the ``highest`` or ``lowest`` share of right answers, by cross-validation."""
        picked = cross_validated(self.right, self.fold, self.alphas, goal)
        out = self.right[picked[self.fold], torch.arange(len(self.fold))]
        gained, lost = int((out & ~self.reference).sum()), int((~out & self.reference).sum())
        return Chosen(tuple(self.alphas[i] for i in picked.tolist()), float(out.double().mean()), gained, lost, len(out))

    def summary(self) -> str:
        """The share at both ends and at 1, its rank correlation with alpha, and what choosing alpha changes."""
        n, distinct = len(self.texts), len(set(self.texts))
        low, high = (self.alphas.index(end(self.alphas)) for end in (min, max))
        ends = f"from {_share(self.right[low])} at alpha {self.alphas[low]:g} to {_share(self.right[high])} at {self.alphas[high]:g}"
        repeats = "" if distinct == n else f" ({distinct} different ones, which intervals take as {n})"
        return (
            f"Along the alpha-stream the share of right answers on {self.task} goes {ends}, and is {_share(self.reference)} at 1, the "
            f"tuned model: {self._order()}; n = {n} prompts{repeats}; "
            f"alpha chosen by cross-validation changes it by {self.chosen('highest')} for the highest share and by {self.chosen('lowest')} "
            f"for the lowest; rounding alone changes {self.differ} answers at alpha 1"
        )

    def _order(self) -> str:
        if math.isnan(self.spearman):
            return "its order by alpha is not defined, as " + ("there is one alpha" if len(self.alphas) < 2 else "it never changes")
        low, high = self.spearman_interval
        return f"rank correlation with alpha {self.spearman:.2f} [{low:.2f}, {high:.2f}] over {len(self.alphas)} alphas"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per alpha; ``per="prompt"``: one row per alpha and prompt.

        ``change`` is against alpha = 1 on the same prompts; ``p`` that of a sign-flip test, ``p_adjusted`` corrected for all alphas.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            columns = {"text": self.texts, "fold": self.fold.tolist()}
            each = [
                {"alpha": a, "prompt": range(len(self.texts)), **columns, "right": r.tolist()}
                for a, r in zip(self.alphas, self.right, strict=True)
            ]
            return pd.concat([pd.DataFrame(rows) for rows in each], ignore_index=True)
        flips = (self.right.double() - self.reference.double()).T
        test, error = permutation(flips, seed=self.draw_seed), standard_error(flips)
        picks = {f"folds_{goal}": self.chosen(goal).alphas for goal in ("highest", "lowest")}
        rows = []
        for i, alpha in enumerate(self.alphas):
            change = self._change(i)
            row: dict[str, Any] = {"alpha": alpha, "n": len(self.texts), "rate": float(self.rate[i])}
            row |= dict(zip(("low", "high"), _interval(self.right[i]), strict=True))
            row |= {"change": change[0], "change_se": float(error[i]), "change_low": change[1], "change_high": change[2]}
            row |= {"p": float(test.p[i]), "p_adjusted": float(test.adjusted[i])}
            rows.append(row | {name: found.count(alpha) for name, found in picks.items()})
        return pd.DataFrame(rows)

    def _change(self, i: int) -> tuple[float, float, float]:
        """Change of the share against alpha = 1, and its interval; alpha = 1 itself has none."""
        if self.alphas[i] == 1:
            return 0.0, 0.0, 0.0
        gained, lost = int((self.right[i] & ~self.reference).sum()), int((~self.right[i] & self.reference).sum())
        return (gained - lost) / len(self.texts), *paired_change(gained, lost, len(self.texts))

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The alphas at which most changes, of either sign."""
        names = {"change": "effect", "change_se": "effect_se", "change_low": "low", "change_high": "high"}
        table = (
            self.to_frame()
            .loc[:, ["alpha", "rate", *names, "p", "p_adjusted"]]
            .set_axis(["alpha", "rate", *names.values(), "p", "p_adjusted"], axis=1)
        )
        order = table.effect.abs().sort_values(ascending=False, kind="stable").index[:n]
        return table.loc[order].reset_index(drop=True)

    def plot(self) -> go.Figure:
        """Share of right answers against alpha with its interval."""
        ends = [_interval(row) for row in self.right]
        name = "share of right answers"
        chance = {} if self.chance is None else {"a guess": [self.chance] * len(self.alphas)}
        return self._curve(
            {name: self.rate.tolist(), **chance},
            {name: ends},
            f"{self.task} when what tuning adds is multiplied by alpha (n = {len(self.texts)})",
            "share of right answers, 95 % interval",
        )

    def figures(self) -> dict[str, go.Figure]:
        """By alpha, and the change on the same prompts."""
        found = [self._change(i) for i in range(len(self.alphas))]
        name = "change of the share"
        title = f"{self.task}: share of right answers less that at alpha = 1, on the same prompts"
        change = self._curve({name: [c[0] for c in found]}, {name: [c[1:] for c in found]}, title, "change of the share, 95 % interval")
        return {"By alpha": self.plot(), "Change against the tuned model": change}

    def _curve(self, series: dict[str, list[float]], ends: dict[str, list[tuple[float, float]]], title: str, ylabel: str) -> go.Figure:
        order = sorted(range(len(self.alphas)), key=self.alphas.__getitem__)
        bands = {k: ([v[i][0] for i in order], [v[i][1] for i in order]) for k, v in ends.items()}
        values = {k: [v[i] for i in order] for k, v in series.items()}
        xlabel = "alpha; 1 is the tuned model, 0 has base's blocks"
        return plots.lines(values, [self.alphas[i] for i in order], bands=bands, title=title, xlabel=xlabel, ylabel=ylabel)


@analysis(version=1)
def tuco_scaling(
    pair: ModelPair,
    task: Task,
    *,
    alphas: tuple[float, ...] = (0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25),
    n: int = 200,
    folds: int = 5,
    among: Literal["auto", "options", "vocabulary"] = "auto",
    seed: int = 0,
) -> TucoScalingResult:
    """What does the model do when the contribution of tuning is turned down or up?

    Both models' blocks run on one stream, x_{l+1} = x_l + PTC_l + alpha FTC_l, and the task is asked along it (Nuti et al., ICML 2025,
    arXiv 2506.23423): alpha = 1 is the tuned model, alpha = 0 runs base's blocks between its embedding and unembedding. All alphas
    answer the same prompts, so changes are paired. An alpha that is best on the prompts it was chosen on flatters itself; so
    it is chosen by cross-validation: for every fold the one with the highest (or lowest) share on the other folds, ties going to
    the alpha nearest 1, scored on the fold. Folds keep prompts of one context together and weigh by their size.

    Args:
        pair: the two models, both in memory.
        task: draws the prompts and judges the answers, or the behaviour.
        alphas: factors of what tuning adds; 0 and values above 1 and below 0 are allowed.
        n: number of prompts.
        folds: of the cross-validation.
        among: candidates for the answer: the ``options`` of the prompt, or the whole ``vocabulary``, which for chat tasks judges what is
            written; ``auto`` takes the options where there are any.
        seed: of prompts, folds and resampling.

    Raises:
        InputError: alphas that are not finite, or not different numbers, fewer prompts than folds, a pair that is loaded one at a time, or
            a task that does not fit the models.
    """
    factors = _checked(alphas)
    if among not in ("auto", "options", "vocabulary"):
        raise InputError(f"among must be auto, options or vocabulary, but it is {among!r}")
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= n:
        raise InputError(f"cross-validation takes 2 folds or more and as many prompts or more, but folds is {folds!r} and n is {n!r}")
    pair.scaled(1.0)  # refuses a pair that cannot run side by side before anything is drawn
    drawn = task.generate(pair, n, seed)
    asked = clean_prompts(drawn)
    if among == "auto":
        among = "options" if asked.answers is not None and asked.options is not None else "vocabulary"
    fold = folds_of(asked.contexts, folds, seed)

    def answered(model: Any) -> Bool[Tensor, " prompt"]:
        return task.score(cast("Any", model), asked, among).bool().cpu()

    right = {a: answered(pair.scaled(a)) for a in progress(list(dict.fromkeys([1.0, *factors])), "alphas")}
    return TucoScalingResult(
        right=torch.stack([right[a] for a in factors]),
        reference=right[1.0],
        fold=fold,
        differ=int((answered(pair.tuned) != right[1.0]).sum()),
        alphas=factors,
        task=str(task),
        among=among if asked.answers is not None else "text",
        chance=task.chance if among == "options" or asked.answers is None else None,
        texts=asked.texts,
        draw_seed=seed,
    )


def cross_validated(
    right: Bool[Tensor, "alpha prompt"], fold: Int[Tensor, " prompt"], alphas: Sequence[float], goal: Goal
) -> Int[Tensor, " fold"]:
    """For every fold the index of the alpha with most (or fewest) right answers on the other folds; ties go to the alpha nearest 1."""
    sign = 1 if goal == "highest" else -1
    nearest = sorted(range(len(alphas)), key=lambda i: (abs(alphas[i] - 1), alphas[i]))
    picked = []
    for held in range(int(fold.max()) + 1):
        score = sign * right[:, fold != held].sum(1)
        picked.append(max(nearest, key=lambda i, score=score: int(score[i])))  # max keeps the first of equals
    return torch.tensor(picked)


def folds_of(contexts: Sequence[str], folds: int, seed: int) -> Int[Tensor, " prompt"]:
    """A fold for every prompt: contexts in random order, each to the fold that is smallest so far.

    Raises:
        InputError: there are fewer contexts than folds.
    """
    counts = Counter(contexts)
    names = list(counts)
    if len(names) < folds:
        raise InputError(f"{folds} folds need as many contexts, since prompts of one context stay together, but there are {len(names)}")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes, where = [0] * folds, {}
    for i in order:
        smallest = sizes.index(min(sizes))
        where[names[i]] = smallest
        sizes[smallest] += counts[names[i]]
    return torch.tensor([where[c] for c in contexts])


def rank_correlation(x: Float[Tensor, " point"], y: Float[Tensor, "*draw point"]) -> Float[Tensor, "*draw"]:
    """Spearman's rank correlation along the last axis, equal values sharing their mean rank; NaN where a side is constant."""
    a, b = _ranks(x.double()), _ranks(y.double())
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(scale == 0, torch.nan, (a * b).sum(-1) / scale)


def _ranks(x: Tensor) -> Tensor:
    """Rank less a constant: how many values are lower, and half of those that are equal."""
    return (x[..., :, None] > x[..., None, :]).double().sum(-1) + 0.5 * (x[..., :, None] == x[..., None, :]).double().sum(-1)


def _checked(alphas: Any) -> tuple[float, ...]:
    given = tuple(alphas) if isinstance(alphas, list | tuple) else (alphas,)
    wrong = [a for a in given if not isinstance(a, int | float) or isinstance(a, bool) or not math.isfinite(a)]
    if wrong or not given:
        raise InputError(f"alphas are finite numbers, one or more, such as (0.9, 1, 1.1), not {str(wrong[0] if wrong else alphas)[:60]!r}")
    if len(set(given)) < len(given):
        twice = next(a for a in given if given.count(a) > 1)
        raise InputError(f"alphas must differ, but {twice:g} comes {given.count(twice)} times")
    return tuple(float(a) for a in given)


def _interval(right: Bool[Tensor, " prompt"]) -> tuple[float, float]:
    return wilson(int(right.sum()), len(right))


def _share(right: Bool[Tensor, " prompt"]) -> str:
    low, high = _interval(right)
    return f"{float(right.double().mean()):.1%} [{low:.1%}, {high:.1%}]"
