"""Noise beside numbers: standard errors, intervals, exact tests. Everything in float64.

Resampling draws prompts with replacement, so a value and what it is compared with stay together (paired).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError

RESAMPLES = 2000
_CHUNK = 2**23  # numbers of resampled means held at once


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number, or a tensor of numbers, with the ends of its interval.

    Attributes:
        value: the estimate, [...].
        low: lower end of the interval, [...].
        high: upper end, [...].
        refused: why there is no estimate (then all three are NaN), else None.
    """

    value: Float[Tensor, "*cell"]
    low: Float[Tensor, "*cell"]
    high: Float[Tensor, "*cell"]
    refused: str | None = None

    def __str__(self) -> str:
        """``0.42 [0.31, 0.55]`` for a single number."""
        if self.value.numel() != 1:
            return f"estimates of shape {list(self.value.shape)}"
        if self.refused:
            return f"none ({self.refused})"
        return f"{float(self.value):.3g} [{float(self.low):.3g}, {float(self.high):.3g}]"

    def at(self, *cell: int) -> str:
        """``0.42 [0.31, 0.55]`` for one of many, to two places."""
        ends = (float(x[cell]) + 0.0 for x in (self.value, self.low, self.high))  # no -0.00
        return "{:.2f} [{:.2f}, {:.2f}]".format(*ends)


def single(value: float, low: float = math.nan, high: float = math.nan) -> Estimate:
    """One number with the ends of its interval, NaN where it has none."""
    v, a, b = (torch.tensor(float(x), dtype=torch.float64) for x in (value, low, high))
    return Estimate(v, a, b)


def within(value: float, error: float | None) -> Estimate:
    """One number with an interval of two standard errors on either side."""
    return single(value) if error is None else single(value, value - 2 * error, value + 2 * error)


def _numbers(values: object, what: str) -> Tensor:
    x = values.detach().cpu().double() if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    if x.ndim == 0 or x.shape[0] == 0:
        raise InputError(f"{what} must be [prompt, ...] with at least one prompt, but its shape is {list(x.shape)}")
    return x


def standard_error(values: object) -> Float[Tensor, "*cell"]:
    """Standard error of the mean over the first axis, [prompt, ...] -> [...]; NaN for a single prompt."""
    x = _numbers(values, "values")
    if x.shape[0] < 2:
        return torch.full(x.shape[1:], math.nan, dtype=torch.float64)
    return x.std(0, correction=1) / math.sqrt(x.shape[0])


def plus_minus(values: Tensor) -> str:
    """``3.2 +- 0.4``: mean over prompts with its standard error, which a single prompt has not."""
    error = f" +- {float(standard_error(values)):.2g}" if len(values) > 1 else ""
    return f"{float(values.double().mean()):.3g}{error}"


def resample_counts(n: int, seed: int, resamples: int = RESAMPLES) -> Float[Tensor, "resample prompt"]:
    """How often each of ``n`` prompts is drawn in each resample; every row sums to n."""
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))


def bootstrap(values: object, *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES) -> Estimate:
    """Mean over prompts with a percentile bootstrap interval (Efron 1979).

    A difference of two sides on the same prompts is ``bootstrap(tuned - base)``.

    Args:
        values: [prompt, ...].
        seed: of the resampling.
        level: coverage of the interval.
        resamples: number of resamples.

    Returns:
        Estimates [...]; a single prompt has NaN ends.
    """
    x = _numbers(values, "values")
    return ratio_of_means(x, torch.ones(x.shape[0]), seed=seed, level=level, resamples=resamples)


def ratio_of_means(numerator: object, denominator: object, *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES) -> Estimate:
    """mean(numerator) / mean(denominator) over prompts, with an interval from resampling both together.

    Args:
        numerator: [prompt, ...].
        denominator: [prompt], shared by all cells of the numerator.
        seed: of the resampling.
        level: coverage of the interval.
        resamples: number of resamples.

    Returns:
        Estimates [...]; a single prompt has NaN ends.

    Raises:
        InputError: the two have different numbers of prompts, or the denominator is not [prompt].
    """
    top, bottom = _numbers(numerator, "numerator"), _numbers(denominator, "denominator")
    if bottom.ndim != 1 or top.shape[0] != bottom.shape[0]:
        raise InputError(f"a ratio of means needs [prompt, ...] over [prompt], but they are {list(top.shape)} and {list(bottom.shape)}")
    if not 0 < level < 1:
        raise InputError(f"the level of an interval lies between 0 and 1, but it is {level}")
    value = top.mean(0) / bottom.mean()
    if top.shape[0] < 2 or not value.numel():
        return Estimate(value, torch.full_like(value, math.nan), torch.full_like(value, math.nan))
    counts = resample_counts(top.shape[0], seed, resamples)
    below = (counts @ bottom)[:, None]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    columns = top.reshape(top.shape[0], -1).split(max(1, _CHUNK // resamples), dim=1)
    # A resample without any difference says nothing where its numerator is 0, too; elsewhere it is as wide as can be.
    low, high = torch.cat([torch.nanquantile(counts @ cells / below, ends, dim=0) for cells in columns], dim=1)
    return Estimate(value, low.reshape(value.shape), high.reshape(value.shape))


def recovered(patched: object, start: object, goal: object, *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES) -> Estimate:
    """How far a patch moves a metric from ``start`` to ``goal``: mean(patched - start) / mean(goal - start).

    A ratio of means over prompts, not a mean of ratios, so that prompts without an effect do not blow it up; the
    interval resamples prompts. 0 is no effect, 1 the whole effect.

    Args:
        patched: metric under the patch, [prompt, ...].
        start: metric of the run that is patched, [prompt].
        goal: metric of the run the patch comes from, [prompt].
        seed: of the resampling.
        level: coverage of the interval.
        resamples: number of resamples.

    Returns:
        Estimates [...]. Refused (NaN, with the reason) where mean(goal - start) is within two standard errors of 0,
        or where one prompt gives no standard error.

    Raises:
        InputError: shapes that do not belong together.
    """
    p, s, g = _numbers(patched, "patched"), _numbers(start, "start"), _numbers(goal, "goal")
    if s.ndim != 1 or s.shape != g.shape or p.shape[0] != s.shape[0]:
        came = f"{list(s.shape)}, {list(g.shape)} and {list(p.shape)}"
        raise InputError(f"recovered needs start and goal as [prompt] and patched as [prompt, ...], but they are {came}")
    gap = g - s
    mean, error = float(gap.mean()), float(standard_error(gap))
    if not abs(mean) > 2 * error:
        nothing = torch.full(p.shape[1:], math.nan, dtype=torch.float64)
        why = (
            "one prompt gives no standard error"
            if len(gap) < 2
            else f"goal - start is {mean:.3g}, within two standard errors ({error:.3g}) of 0"
        )
        return Estimate(nothing, nothing.clone(), nothing.clone(), why)
    return ratio_of_means(p - s.reshape(-1, *[1] * (p.ndim - 1)), gap, seed=seed, level=level, resamples=resamples)


def changed(first: Sequence[Tensor], second: Sequence[Tensor], seed: int = 0) -> Estimate:
    """``recovered`` in a second model minus ``recovered`` in a first, on the same prompts: change of a patch's effect by tuning.

    The interval resamples prompts, the same ones in both models.

    Args:
        first: patched [prompt, ...], start [prompt] and goal [prompt] of the first model.
        second: the same of the second.
        seed: of the resampling.

    Returns:
        Estimates [...]; refused where either model's are.
    """
    sides = [recovered(*side, seed=seed) for side in (first, second)]
    value = sides[1].value - sides[0].value
    refused = next((s.refused for s in sides if s.refused), None)
    if refused:
        return Estimate(value, value, value, refused)
    counts = resample_counts(len(first[1]), seed)
    low, high = [], []
    step = max(1, _CHUNK // len(counts))
    for cells in range(0, value.numel(), step):
        draws = []
        for patched, start, goal in (first, second):
            gain = (patched.double() - start.double().reshape(-1, *[1] * (patched.ndim - 1))).reshape(len(start), -1)
            gain = gain[:, cells : cells + step]
            draws.append(counts @ gain / (counts @ (goal - start).double())[:, None])
        ends = (draws[1] - draws[0]).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        low.append(ends[0])
        high.append(ends[1])
    return Estimate(value, torch.cat(low).reshape(value.shape), torch.cat(high).reshape(value.shape))


def wilson(k: int | float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion k / n (Wilson 1927, score interval); (0, 1) when n is 0.

    k may be a sum of n shares from 0 to 1: they vary no more than whole draws of the same mean, so the interval is rather too wide.

    Raises:
        InputError: k is not between 0 and n.
    """
    if not 0 <= k <= n:
        raise InputError(f"{k} of {n} is no proportion")
    if n == 0:
        return 0.0, 1.0
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def paired_change(gained: int | float, lost: int | float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of the change of a proportion on the same n prompts, (gained - lost) / n.

    The adjusted Wald interval of Agresti and Min (2005), which adds half a prompt to each cell of the table: unlike a bootstrap it
    has a width also when nothing flipped. ``gained`` and ``lost`` may be sums of n shares, as ``k`` of ``wilson``.

    Raises:
        InputError: gained and lost do not fit into n.
    """
    if gained < 0 or lost < 0 or not 0 < n >= gained + lost:
        raise InputError(f"{gained} gained and {lost} lost do not fit into {n} prompts")
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    up, down, all_ = gained + 0.5, lost + 0.5, n + 2
    centre = (up - down) / all_
    half = z * math.sqrt(up + down - (up - down) ** 2 / all_) / all_
    return max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p value that two sides are right equally often (McNemar 1947, binomial form).

    Args:
        only_first: prompts that only the first gets right.
        only_second: prompts that only the second gets right.
    """
    if only_first < 0 or only_second < 0:
        raise InputError(f"counts of prompts cannot be negative: {only_first}, {only_second}")
    n, few = only_first + only_second, min(only_first, only_second)
    term, tail = 1, 0
    for i in range(few + 1):  # exact integers: the sum of the binomial coefficients up to the smaller count
        tail += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


@dataclass(frozen=True, eq=False)
class Permutation:
    """A sign-flip test per cell.

    Attributes:
        p: two-sided p value that the mean is 0, [...]; 1 where every prompt gives exactly 0.
        adjusted: the same, corrected for looking at all cells and pointing to the largest.
    """

    p: Float[Tensor, "*cell"]
    adjusted: Float[Tensor, "*cell"]


_EXACT = 11  # prompts up to which every pattern of signs is gone through


def permutation(values: object, *, seed: int = 0, resamples: int = RESAMPLES) -> Permutation:
    """Is the mean over prompts 0? A permutation test by flipping signs (Fisher 1935), corrected by the maximum (Westfall & Young 1993).

    If patching does nothing on average, effects are as likely positive as negative, so each prompt's sign is flipped at random
    and the mean in units of its own spread is compared with the one found. Of a difference of two sides it is
    the test that exchanges the sides. Up to eleven prompts every pattern of signs is gone through, so that p is exact; fewer
    than six cannot give p < 0.05.

    Args:
        values: effects, [prompt, ...].
        seed: of the signs.
        resamples: how many patterns of signs are drawn where there are more.

    Returns:
        p values, [...].
    """
    x = _numbers(values, "values")
    n = x.shape[0]
    flat = x.reshape(n, -1)
    # The sum of squares is the same for every pattern of signs, so this statistic orders patterns as Student's t does.
    scaled = flat / flat.square().sum(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    if n <= _EXACT:
        signs = 1 - 2 * ((torch.arange(2 ** max(n - 1, 0))[:, None] >> torch.arange(n)) & 1).double()  # a pattern and its opposite are one
        more = 0
    else:
        signs = 1 - 2 * torch.randint(2, (resamples, n), generator=torch.Generator().manual_seed(seed)).double()
        more = 1  # the pattern found is one of them
    found = scaled.sum(0).abs()
    # Equal patterns differ by rounding; those are ties, which count.
    beaten = found - 1e-9
    above, highest = torch.zeros_like(found), torch.zeros(len(signs), dtype=torch.float64)
    step = max(1, _CHUNK // len(signs))
    for at in range(0, flat.shape[1], step):
        drawn = (signs @ scaled[:, at : at + step]).abs()
        above[at : at + step] = (drawn >= beaten[at : at + step]).sum(0)
        highest = torch.maximum(highest, drawn.amax(1))
    # searchsorted counts the maxima below; the rest reach what was found.
    higher = len(signs) - torch.searchsorted(highest.sort().values, beaten)
    p, adjusted = ((count + more) / (len(signs) + more) for count in (above, higher.double()))
    dead = found == 0
    shape = x.shape[1:]
    return Permutation(p.masked_fill(dead, 1.0).reshape(shape), adjusted.masked_fill(dead, 1.0).reshape(shape))


@dataclass(frozen=True, eq=False)
class Roc:
    """How well a score tells two sets apart, threshold by threshold, from calling none positive to calling all so.

    Attributes:
        threshold: scores from here up are called positive, [point]; descending, the first is infinite.
        false_positive: share of the negatives that are, [point].
        true_positive: share of the positives that are, [point].
    """

    threshold: Float[Tensor, " point"]
    false_positive: Float[Tensor, " point"]
    true_positive: Float[Tensor, " point"]


def _scores(positive: object, negative: object) -> tuple[Tensor, Tensor]:
    found = _numbers(positive, "scores of positives"), _numbers(negative, "scores of negatives")
    for x in found:
        if x.ndim != 1 or bool(x.isnan().any()):
            raise InputError(f"scores are [prompt] without NaN, but a set has shape {list(x.shape)} and {int(x.isnan().sum())} NaN")
    return found


def roc(positive: object, negative: object) -> Roc:
    """Shares called positive at every threshold: one point per different score, so that ties are one step.

    Args:
        positive: scores of the positives, [prompt].
        negative: scores of the negatives.
    """
    scores = _scores(positive, negative)
    threshold = torch.cat([torch.full((1,), math.inf, dtype=torch.float64), torch.cat(scores).unique().flip(0)])
    called = [(x >= threshold[:, None]).double().mean(1) for x in scores]
    return Roc(threshold, false_positive=called[1], true_positive=called[0])


def auc(positive: object, negative: object, *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES) -> Estimate:
    """Area under the ROC curve: how often a positive scores above a negative, a tie counting one half.

    The interval resamples the prompts of each set (percentile bootstrap). Where the sets do not overlap every resample gives
    the same, so the inner end is that of Newcombe's score interval (2006, method 5), which has a width there too.

    Args:
        positive: scores of the positives, [prompt].
        negative: scores of the negatives.
        seed: of the resampling.
        level: coverage of the interval.
        resamples: number of resamples.

    Returns:
        One number; a set of a single prompt gives NaN ends.

    Raises:
        InputError: an empty set, or scores that are NaN.
    """
    above, below = _scores(positive, negative)
    n, m = len(above), len(below)
    wins = (above[:, None] > below).double() + (above[:, None] == below).double() / 2
    value = wins.mean()
    if min(n, m) < 2:
        return Estimate(value, torch.full_like(value, math.nan), torch.full_like(value, math.nan))
    drawn = ((resample_counts(n, seed, resamples) @ wins) * resample_counts(m, seed + 1, resamples)).sum(1) / (n * m)
    low, high = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    if value in (0.0, 1.0):
        inner = _separated(n, m, level)
        low, high = (torch.full_like(value, x) for x in ((inner, 1.0) if value else (0.0, 1 - inner)))
    return Estimate(value, low, high)


def _separated(n: int, m: int, level: float) -> float:
    """Lower end of the interval of an AUC of 1: where 1 - x = z sqrt(V(x)), with the variance of Hanley and McNeil (1982)."""
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    more = (n + m) / 2 - 1
    low, high = 0.0, 1.0
    for _ in range(60):  # halving
        x = (low + high) / 2
        variance = x * (1 - x) * (1 + more * (1 - x) / (2 - x) + more * x / (1 + x)) / (n * m)
        low, high = (x, high) if 1 - x > z * math.sqrt(variance) else (low, x)
    return low


def tpr_at(positive: object, negative: object, rate: float = 0.05, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The largest share of positives that a threshold finds while it calls at most this share of the negatives positive.

    No point between thresholds is made up: with fewer than 1 / rate negatives, none of them may be called. The 95 % interval
    resamples the prompts of each set, and where all or none are found is Wilson's at the threshold found.

    Args:
        positive: scores of the positives, [prompt].
        negative: scores of the negatives.
        rate: the share of negatives.
        seed: of the resampling.
        resamples: number of resamples.

    Raises:
        InputError: an empty set, scores that are NaN, or a rate outside [0, 1).
    """
    above, below = _scores(positive, negative)
    if not 0 <= rate < 1:
        raise InputError(f"a false positive rate lies in [0, 1), but it is {rate}")
    n, m = len(above), len(below)
    allowed = math.floor(rate * m + 1e-9)
    below = below.sort(descending=True).values
    value = (above > below[allowed]).double().mean()
    if min(n, m) < 2:
        return Estimate(value, torch.full_like(value, math.nan), torch.full_like(value, math.nan))
    if value in (0.0, 1.0):
        low, high = (torch.full_like(value, x) for x in wilson(n if value else 0, n))
        return Estimate(value, low, high)
    ranks = resample_counts(m, seed + 1, resamples).cumsum(1)
    limits = below[(ranks > allowed).double().argmax(1)]  # of the negatives drawn, the first that may not be called
    found = (resample_counts(n, seed, resamples) * (above > limits[:, None])).sum(1) / n
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Estimate(value, low, high)
