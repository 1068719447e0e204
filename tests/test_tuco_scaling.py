"""Behaviour against alpha: a literal loop over two plain models, a literal cross-validation, tables with a known best alpha."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from scipy import stats as scipy_stats
from test_contribution import twin
from tiny_pairs import save_pair

from interp.analyses.task_accuracy import task_accuracy
from interp.analyses.tuco_scaling import TucoScalingResult, folds_of, rank_correlation, tuco_scaling
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.organisms import folder
from interp.stats import paired_change, wilson
from interp.tasks import task
from interp.tasks.base import Example
from interp.tasks.ioi import IOI

ALPHAS = (0.5, 0.9, 1.0, 1.2)


@pytest.fixture(scope="module")
def pair():
    return ModelPair.load(folder("base"), folder("assistant"))


def table(right: list[list[int]], alphas: tuple[float, ...] = ALPHAS, reference: list[int] | None = None, **changes: Any):
    """A result with known answers; three folds, in turn."""
    n = len(right[0])
    one = reference if reference is not None else right[alphas.index(1.0)]
    fields: dict[str, Any] = {
        "right": torch.tensor(right).bool(),
        "reference": torch.tensor(one).bool(),
        "fold": torch.arange(n) % 3,
        "differ": 0,
        "alphas": alphas,
        "task": "toy",
        "among": "options",
        "chance": 0.25,
        "texts": tuple(f"prompt {i}" for i in range(n)),
        "draw_seed": 0,
    }
    return TucoScalingResult(**(fields | changes))


# ------------------------------------------------------------------------------- choosing an alpha


def literal_choice(right: list[list[bool]], fold: list[int], alphas: tuple[float, ...], goal: str) -> tuple[list[float], float, float]:
    """Choice per fold, accuracy of the choices weighted by the size of the folds, and its difference from alpha = 1."""
    picks, weighted = [], 0.0
    for held in sorted(set(fold)):
        others = [i for i, f in enumerate(fold) if f != held]
        inside = [i for i, f in enumerate(fold) if f == held]
        accuracy = {a: sum(row[i] for i in others) / len(others) for a, row in zip(alphas, right, strict=True)}
        best = max(accuracy.values()) if goal == "highest" else min(accuracy.values())
        equals = [a for a in alphas if accuracy[a] == best]
        pick = min(equals, key=lambda a: (abs(a - 1), a))
        picks.append(pick)
        here = sum(right[alphas.index(pick)][i] for i in inside) / len(inside)
        weighted += here * len(inside) / len(fold)
    return picks, weighted, weighted - sum(right[alphas.index(1.0)]) / len(fold)


@pytest.mark.parametrize("goal", ["highest", "lowest"])
def test_cross_validation_is_the_literal_one(goal) -> None:
    draws = torch.Generator().manual_seed(0)
    for n in (5, 17, 40):
        for _ in range(20):
            right = torch.rand(4, n, generator=draws) < torch.tensor([[0.4], [0.5], [0.5], [0.6]])
            fold = torch.cat([torch.arange(3), torch.randint(3, (n - 3,), generator=draws)])  # folds of unequal size
            made = table(right.int().tolist(), fold=fold)
            found = made.chosen(goal)
            picks, rate, delta = literal_choice(right.tolist(), fold.tolist(), ALPHAS, goal)
            assert list(found.alphas) == picks
            assert found.rate == pytest.approx(rate, abs=1e-12) and found.delta == pytest.approx(delta, abs=1e-12)


def test_the_best_alpha_is_found_where_there_is_one() -> None:
    # alpha 0.5 is right on one prompt of six, 0.9 on three, 1 on four, 1.2 on all
    rows = [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    made = table(rows)
    high, low = made.chosen("highest"), made.chosen("lowest")
    assert high.alphas == (1.2,) * 3 and (high.rate, high.gained, high.lost) == (1.0, 2, 0)
    assert low.alphas == (0.5,) * 3 and (low.gained, low.lost) == (0, 3) and low.delta == -0.5
    assert high.interval == paired_change(2, 0, 6) and high.p == 0.5  # both of two discordant prompts: 2 / 2^2
    assert "+33.3%" in str(high) and "alpha 1.2 in 3 of 3 folds" in str(high)
    assert made.spearman == 1 and made.spearman_interval[1] == 1


def test_choosing_on_the_prompts_it_is_scored_on_would_flatter() -> None:
    """Where alpha does nothing but add noise, the best of many looks better than it is; the cross-validated change does not."""
    draws = torch.Generator().manual_seed(1)
    alphas = tuple(1 + i / 100 for i in range(21))
    flattered, honest = [], []
    for _ in range(60):
        made = table((torch.rand(21, 60, generator=draws) < 0.5).int().tolist(), alphas)
        flattered.append(float(made.rate.max()) - 0.5)
        honest.append(made.chosen("highest").rate - 0.5)
    assert sum(flattered) / 60 > 0.1 and abs(sum(honest) / 60) < 0.03


def test_nothing_changes_where_alpha_does_nothing() -> None:
    made = table([[1, 0, 1, 1]] * 4)
    assert [made.chosen(g).alphas for g in ("highest", "lowest")] == [(1.0,) * 3] * 2  # ties go to alpha = 1
    assert [(c.delta, c.p) for c in map(made.chosen, ("highest", "lowest"))] == [(0, 1), (0, 1)]
    assert math.isnan(made.spearman) and "it never changes" in made.summary()
    assert made.to_frame().change.tolist() == [0] * 4 and made.to_frame().p.tolist() == [1] * 4
    assert "there is one alpha" in table([[1, 0]], (1.0,), fold=torch.tensor([0, 1])).summary()


def test_folds_keep_contexts_together_and_are_even() -> None:
    contexts = [f"c{i % 11}" for i in range(50)]
    fold = folds_of(contexts, 5, 0)
    assert all(len({int(f) for f, c in zip(fold, contexts, strict=True) if c == name}) == 1 for name in set(contexts))
    assert sorted(fold.unique().tolist()) == [0, 1, 2, 3, 4] and int(fold.bincount().min()) >= 8
    assert torch.equal(fold, folds_of(contexts, 5, 0)) and not torch.equal(fold, folds_of(contexts, 5, 1))
    assert folds_of(list("abcdefg"), 5, 0).bincount().tolist() == [2, 2, 1, 1, 1]
    with pytest.raises(InputError, match="4 folds need as many contexts.*there are 3"):
        folds_of(["a", "b", "c", "a"], 4, 0)


def test_rank_correlation_is_scipys() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.tensor([0.75, 0.9, 1.0, 1.1, 1.25])
    y = torch.randint(4, (30, 5), generator=draws).double()  # with ties
    got = rank_correlation(x, y)
    for value, row in zip(got.tolist(), y, strict=True):
        want = scipy_stats.spearmanr(x, row).statistic if len(row.unique()) > 1 else math.nan
        assert value == pytest.approx(want, abs=1e-12, nan_ok=True)
    assert rank_correlation(x, x * x).item() == pytest.approx(1) and rank_correlation(x, -x).item() == pytest.approx(-1)


# ------------------------------------------------------------------------------------- what it says


def test_the_numbers_by_hand() -> None:
    rows = [[0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    made = table(rows)
    frame = made.to_frame()
    assert frame.alpha.tolist() == list(ALPHAS) and frame.rate.tolist() == [0.25, 0.5, 0.5, 0.75] and set(frame.n) == {4}
    assert list(zip(frame.low, frame.high, strict=True)) == [wilson(k, 4) for k in (1, 2, 2, 3)]
    assert frame.change.tolist() == [-0.25, 0, 0, 0.25]
    want = [paired_change(g, b, 4) for g, b in ((1, 2), (1, 1))]
    assert list(zip(frame.change_low, frame.change_high, strict=True))[:3] == [*want, (0, 0)]
    assert made.spearman == pytest.approx(scipy_stats.spearmanr(ALPHAS, [1, 2, 2, 3]).statistic)
    each = made.to_frame("prompt")
    assert len(each) == 16 and each[each.alpha == 0.9].right.tolist() == [True, False, False, True]
    best = made.strongest(2)
    assert list(best.columns) == ["alpha", "rate", "effect", "effect_se", "low", "high", "p", "p_adjusted"]
    assert best.alpha.tolist() == [0.5, 1.2] and best.effect.tolist() == [-0.25, 0.25]
    said = made.summary()
    assert "from 25.0% [4.6%, 69.9%] at alpha 0.5 to 75.0%" in said and "n = 4 prompts;" in said and "rounding alone changes 0" in said
    twice = table(rows, texts=("a", "a", "b", "c")).summary()
    assert "n = 4 prompts (3 different ones, which intervals take as 4)" in twice
    with pytest.raises(InputError, match="per must be 'prompt'"):
        made.to_frame("alpha")


def test_the_curve_runs_from_low_to_high_alpha() -> None:
    made = table([[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]], (1.2, 0.5, 1.0, 0.9))
    figures = made.figures()
    line = next(t for t in figures["By alpha"].data if t.name == "share of right answers")
    assert list(line.x) == [0.5, 0.9, 1.0, 1.2] and list(line.y) == [0.25, 0.25, 0.5, 0.75]
    guess = next(t for t in figures["By alpha"].data if t.name == "a guess")
    assert set(guess.y) == {0.25}
    change = next(t for t in figures["Change against the tuned model"].data if t.name == "change of the share")
    assert list(change.y) == [-0.25, -0.25, 0, 0.25]
    assert "from 25.0%" in made.summary() and "at alpha 0.5 to 75.0%" in made.summary()


# ----------------------------------------------------------------------------------- on real models


def test_answers_are_those_of_a_loop_over_two_plain_models(pair) -> None:
    asked = task("refusals(wordings=new)")
    made = tuco_scaling(pair, asked, n=24, alphas=(0.25, 0.75, 1.25), folds=3)
    prompts = asked.generate(pair, 24, 0).clean
    base, tuned = (m.wrapped.source for m in (pair.base, pair.tuned))
    for row, alpha in zip(made.right, made.alphas, strict=True):
        logits = twin(base, tuned, prompts.ids, [alpha] * pair.shape.n_layers)["logits"][:, -1]
        said = [max(options, key=lambda i, x=x: float(x[i])) for x, options in zip(logits, prompts.options, strict=True)]
        assert row.tolist() == [s == a for s, a in zip(said, prompts.answers, strict=True)]
    assert len(set(made.rate.tolist())) == 3  # the three alphas do differ
    assert made.differ == 0 and torch.equal(made.reference, task_accuracy(pair, asked, n=24).right[1])


@pytest.mark.parametrize("among", ["options", "vocabulary"])
def test_alpha_1_is_the_tuned_model_and_0_has_bases_blocks(pair, among) -> None:
    asked = task("refusals(wordings=new)")
    made = tuco_scaling(pair, asked, n=12, alphas=(0, 1), among=among, folds=2)
    want = task_accuracy(pair, asked, n=12, among=among)
    assert torch.equal(made.right[1], want.right[1]) and torch.equal(made.reference, want.right[1])
    assert 0 < float(made.rate[1]) < 1 and made.rate[0] < made.rate[1] and made.alphas == (0.0, 1.0)
    assert made.among == want.among and made.chance == want.chance


def test_a_model_that_was_not_tuned_does_the_same_at_every_alpha(pair) -> None:
    same = ModelPair(pair.tuned, HookedModel.load(folder("assistant")))
    made = tuco_scaling(same, task("refusals(wordings=new)"), n=12, alphas=(-1, 0, 1, 3), folds=2)
    assert 0 < float(made.rate[0]) < 1 and bool((made.right == made.right[0]).all()) and math.isnan(made.spearman)


def test_refusing_goes_up_with_alpha_on_the_shipped_assistant(pair) -> None:
    made = tuco_scaling(pair, task("refusals(wordings=new)"), n=64)
    assert made.spearman >= 0.9 and made.spearman_interval[0] > 0.8
    assert made.chosen("highest").delta > 0 > made.chosen("lowest").delta and made.chosen("lowest").p < 0.01
    assert made.chosen("highest").alphas == (1.25,) * 5 and made.chosen("lowest").alphas == (0.75,) * 5


# ---------------------------------------------------------------------------------------- bad input


@dataclass(frozen=True, kw_only=True)
class _TwoContexts(IOI):
    """A task all of whose prompts stand in one of two contexts."""

    name: ClassVar[str] = "two"

    def example(self, seed: int, index: int, words: Any) -> Example:
        from dataclasses import replace

        return replace(super().example(seed, index, words), context="ab"[index % 2])


def test_bad_input_is_refused_in_one_sentence(pair, tmp_path) -> None:
    asked = task("refusals")

    def refuses(words: str, of: Any = pair, what: Any = asked, **settings: Any) -> None:
        with pytest.raises(InputError, match=words) as caught:
            tuco_scaling(of, what, **settings)
        assert "\n" not in str(caught.value)

    for alphas in ((0.9, "1"), (1, math.nan), (1, math.inf), (True, 0.5), (), "1", None, ((1.0, 0.5),)):
        refuses("alphas are finite numbers", alphas=alphas)
    refuses("alphas must differ, but 1 comes 2 times", alphas=(1, 0.9, 1.0))
    refuses("folds is 5 and n is 4", n=4)
    for folds in (1, 0, True, 2.5):
        refuses("cross-validation takes 2 folds or more", folds=folds)
    refuses("among must be", among="letters")
    refuses("3 folds need as many contexts", what=_TwoContexts(), n=8, folds=3)
    save_pair(tmp_path)
    refuses("one at a time", of=ModelPair.load(tmp_path / "base", tmp_path / "tuned", load="one at a time"), what=task("ioi"))
