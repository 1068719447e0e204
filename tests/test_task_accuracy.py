"""Flips and accuracies against tables counted by hand, and a task of our own on real models."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from small_tokenizers import tokenizer
from tiny_checkpoints import tiny

from interp.analyses.task_accuracy import TaskAccuracyResult, candidates, task_accuracy
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.prompts import PromptPairs, Prompts
from interp.tasks.scoring import most_likely

# 10 prompts: 4 right in both, 1 lost, 3 gained, 2 wrong in both
BASE = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
TUNED = [1, 1, 1, 1, 0, 1, 1, 1, 0, 0]


def table(base: list[int] = BASE, tuned: list[int] = TUNED, **changes: Any) -> TaskAccuracyResult:
    n = len(base)
    fields: dict[str, Any] = {
        "right": torch.tensor([base, tuned]).bool(),
        "margin": torch.stack([torch.arange(n) - 4.5, 4.5 - 2.0 * torch.arange(n)]),
        "jitter": torch.tensor([0, 1]),
        "task": "toy",
        "among": "options",
        "chance": 0.25,
        "texts": tuple(f"prompt {i}" for i in range(n)),
        "answers": tuple(f" a{i}" for i in range(n)),
        "said": {s: tuple(f" {s}{i}" for i in range(n)) for s in ("base", "tuned")},
        "tags": {"order": tuple("AB"[i % 2] for i in range(n)), "alone": ("x",) * n},
        "labels": {"side": ("base", "tuned")},
    }
    return TaskAccuracyResult(**(fields | changes))


def test_counts_by_hand() -> None:
    r = table()
    assert r.accuracy.tolist() == [0.5, 0.7] and (r.nfr, r.pfr) == (0.1, 0.3)
    assert [r.flip(i) for i in range(10)] == ["right in both"] * 4 + ["lost"] + ["gained"] * 3 + ["wrong in both"] * 2
    assert r.independent == pytest.approx((0.5 * 0.3, 0.5 * 0.7))
    assert r.p_value == pytest.approx(2 * (1 + 4) / 16)  # binomial: 1 of 4 discordant, two-sided
    # Wilson (1927) for 5 of 10 at 95 %: 0.2366 to 0.7634
    assert r.interval("base") == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert r.above_chance.tolist() == [False, True]


def test_positive_minus_negative_flips_is_the_change_of_accuracy_exactly() -> None:
    draws = torch.Generator().manual_seed(0)
    for n in (1, 3, 7, 200, 333):
        right = torch.rand(2, n, generator=draws) < 0.6
        r = table(right[0].int().tolist(), right[1].int().tolist(), tags={}, right=right)
        assert int(r.gained.sum()) - int(r.lost.sum()) == int(right[1].sum()) - int(right[0].sum())
        assert r.to_frame().change[0] == (int(right[1].sum()) - int(right[0].sum())) / n
        assert r.pfr - r.nfr == pytest.approx(float(r.accuracy[1] - r.accuracy[0]), abs=1e-15)


def test_two_independent_models_flip_as_often_as_the_reference_says() -> None:
    right = torch.rand(2, 20000, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.7], [0.9]])
    r = table(right[0].int().tolist(), right[1].int().tolist(), tags={})
    assert (r.nfr, r.pfr) == pytest.approx(r.independent, abs=0.01) and r.independent == pytest.approx((0.07, 0.27), abs=0.01)


def test_frame_per_tag_and_per_prompt() -> None:
    frame = table().to_frame()
    assert list(zip(frame.tag, frame.value, frame.n, strict=True)) == [
        ("all", "", 10),
        ("order", "A", 5),
        ("order", "B", 5),
        ("alone", "x", 10),
    ]
    a = frame.iloc[1]  # prompts 0 2 4 6 8: base 1 1 1 0 0, tuned 1 1 0 1 0
    assert (a.accuracy_base, a.accuracy_tuned, a.nfr, a.pfr) == (0.6, 0.6, 0.2, 0.2) and a.change == 0
    assert a.margin_base == pytest.approx(-0.5)  # mean of 0 2 4 6 8 is 4, less 4.5
    rows = table().to_frame(per="prompt")
    assert len(rows) == 10 and rows.flip[4] == "lost" and rows.said_tuned[4] == " tuned4" and rows.order[3] == "B"
    with pytest.raises(InputError, match="per must be 'prompt'"):
        table().to_frame(per="tag")


def test_summary() -> None:
    text = table().summary()
    assert text.startswith("Accuracy on toy goes from 50.0% [23.7%, 76.3%] in base to 70.0% [")
    assert "3 answers gained (30.0%; 35.0% if the models erred independently) and 1 lost (10.0%; 15.0%)" in text
    assert "chance 25.0%" in text and "not above chance: base" in text and "p = 0.62" in text and "rounding alone flips 1" in text
    assert "chance" not in table(chance=None).summary()


def test_flips_are_listed_with_the_largest_change_first_and_escaped() -> None:
    r = table()
    assert r.flipped("gained") == [7, 6, 5] and r.flipped("lost") == [4]  # |9 - 3 i| at 5, 6, 7 is 6, 9, 12
    evil = replace(r, texts=tuple("<script>x</script>\n$a$" for _ in range(10)), answers=("<img src=x>",) * 10)
    page = evil.html()
    assert "<script>" not in page and "<img" not in page and page.count("<tr>") == 2 + 4
    assert "&lt;script&gt;" in page and "tuned7" in page
    none = table(BASE, BASE)
    assert none.html().count("None of 10 prompts.") == 2 and none.p_value == 1.0


def test_figures() -> None:
    drawn = table().figures()
    assert list(drawn) == ["Accuracy", "Answers gained and lost", "Margins", "Accuracy by order"]  # a tag with one value says nothing
    bars = drawn["Accuracy"].data
    assert [float(b.y[0]) for b in bars] == [0.5, 0.7] and any(s.y0 == 0.25 for s in drawn["Accuracy"].layout.shapes)
    flips = drawn["Answers gained and lost"].data
    assert [float(v) for v in flips[0].y] == [0.1, 0.3] and [float(v) for v in flips[1].y] == pytest.approx([0.15, 0.35])
    assert "Margins" not in table(margin=torch.full((2, 10), torch.nan)).figures()
    many = table(tags={"n": tuple(str(i) for i in range(10))})
    ticks = many.figures()["Accuracy by n"].data[0]
    assert len(ticks.y) == 10
    assert [row for _, row, _ in many._groups()][1:] == [str(i) for i in range(10)]


def test_candidates_rule_out_everything_but_the_options() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert candidates(logits, None) is logits
    got = candidates(logits, [(1, 2), (0, 2)])
    assert got[0].tolist() == [-torch.inf, 1, 2] and got[1].tolist() == [0, -torch.inf, 1]


@dataclass(frozen=True)
class Toy:
    """A task on token ids: the base is right on some prompts, by construction of the answers."""

    answers: tuple[int, ...]
    options: tuple[tuple[int, ...], ...] | None = None
    pairs: bool = False
    name: str = "toy"
    chance: float | None = 1 / 3

    def __str__(self) -> str:
        return self.name

    def generate(self, model: Any, n: int, seed: int = 0) -> Prompts | PromptPairs:
        rows = tuple((seed + 3 + i, 4, 5 + i)[: 2 + i % 2] for i in range(n))
        tags = {"parity": tuple(str(i % 2) for i in range(n))}
        found = Prompts(tuple(str(r) for r in rows), rows, answers=self.answers[:n], options=self.options and self.options[:n], tags=tags)
        return PromptPairs(found, found) if self.pairs else found

    def score(self, model: Any, prompts: Prompts, among: Any = "vocabulary") -> torch.Tensor:
        return most_likely(model, prompts, among)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    """The tuned model prefers token 9 by far."""
    base = tiny("gpt2", seed=4, tie_word_embeddings=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.lm_head.weight[9] = 2 * base.lm_head.weight[9]
    return ModelPair.load(base, tuned)


@pytest.fixture(scope="module")
def tops(pair: ModelPair) -> tuple[int, ...]:
    prompts = Toy((0,) * 7).generate(None, 7)
    return tuple(pair.base.logits(prompts, at="END").argmax(-1).tolist())


def test_right_margin_and_said_are_the_models_own(pair: ModelPair, tops: tuple[int, ...]) -> None:
    answers = (*tops[:4], 1, 2, 3)  # by construction the base is right on the first four at least
    result = task_accuracy(pair, Toy(answers), n=7)  # type: ignore[arg-type]
    logits = torch.stack([m.logits(Toy(answers).generate(None, 7), at="END") for _, m in pair.sides()])
    assert result.right[0, :4].all() and result.among == "vocabulary" and result.chance is None
    assert torch.equal(result.right, logits.argmax(-1) == torch.tensor(answers))
    for side in range(2):
        for i, a in enumerate(answers):
            others = [float(v) for t, v in enumerate(logits[side, i]) if t != a]
            assert float(result.margin[side, i]) == pytest.approx(float(logits[side, i, a]) - max(others), abs=1e-5)
    assert torch.equal(result.margin > 0, result.right)
    assert result.said["tuned"] == tuple(f"<{int(t)}>" for t in logits[1].argmax(-1)) and result.answers[0] == f"<{tops[0]}>"
    assert result.jitter.tolist() == [0, 0] and result.tags["parity"][:3] == ("0", "1", "0")


def test_among_options(pair: ModelPair, tops: tuple[int, ...]) -> None:
    options = tuple((t, (t + 1) % 31, (t + 2) % 31) for t in tops)
    result = task_accuracy(pair, Toy(tops, options, pairs=True), n=7)  # type: ignore[arg-type]
    assert result.among == "options" and result.chance == pytest.approx(1 / 3) and result.right[0].all()
    logits = pair.tuned.logits(Toy(tops).generate(None, 7), at="END")
    for i, o in enumerate(options):
        assert float(result.margin[1, i]) == pytest.approx(float(logits[i, o[0]] - max(logits[i, o[1]], logits[i, o[2]])), abs=1e-5)
    whole = task_accuracy(pair, Toy(tops, options), n=7, among="vocabulary")  # type: ignore[arg-type]
    assert whole.among == "vocabulary" and whole.margin[1, 0] <= result.margin[1, 0] + 1e-6
    with pytest.raises(InputError, match="no options to choose among"):
        task_accuracy(pair, Toy(tops), n=7, among="options")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="auto, options or vocabulary, but it is 'all'"):
        task_accuracy(pair, Toy(tops), n=7, among="all")  # type: ignore[arg-type]


def test_written_answers_are_shown_for_flipped_prompts_only() -> None:
    words = tokenizer("byte_level")
    models = [HookedModel.load(tiny("gpt2", seed=s, vocab_size=len(words), n_positions=40), tokenizer=words) for s in (6, 7)]

    class Written(Toy):
        def generate(self, model: Any, n: int, seed: int = 0) -> Prompts:
            texts = tuple(f"When Mary gave a {thing} to" for thing in ("ring", "book", "drink", "ball")[:n])
            return replace(Prompts.of(model, texts), targets=(" Mary and Alice",) * n)

        def score(self, model: Any, prompts: Prompts, among: Any = "vocabulary") -> torch.Tensor:
            wrong = () if model is models[0] else ("When Mary gave a book to", "When Mary gave a ball to")
            return torch.tensor([text not in wrong for text in prompts.texts])

    pair = ModelPair.load(*models)
    result = task_accuracy(pair, Written(()), n=4)  # type: ignore[arg-type]
    assert result.among == "text" and result.chance == pytest.approx(1 / 3) and result.margin.isnan().all()
    assert result.answers == (" Mary and Alice",) * 4 and result.flipped("lost") == [1, 3]
    for side, model in pair.sides():
        new = model.generate(result.texts, 5)  # the target's three tokens and two more
        assert result.said[side] == ("", model.decode(new[1]), "", model.decode(new[3]))
    assert "Margins" not in result.figures() and result.to_frame().margin_base.isna().all()


def test_a_model_against_itself_flips_nothing(pair: ModelPair, tops: tuple[int, ...]) -> None:
    same = task_accuracy(ModelPair.load(pair.base, HookedModel.load(pair.base.wrapped.source)), Toy(tops), n=5, seed=1)  # type: ignore[arg-type]
    assert same.nfr == same.pfr == 0 and torch.equal(same.margin[0], same.margin[1]) and same.p_value == 1


def test_round_trip(tmp_path: Any, pair: ModelPair, tops: tuple[int, ...]) -> None:
    result = task_accuracy(pair, Toy(tops), n=6, seed=2)  # type: ignore[arg-type]
    again = TaskAccuracyResult.load(result.save(tmp_path / "r"))
    assert again.to_frame().equals(result.to_frame()) and again.summary() == result.summary() and again.said == result.said
    assert result.meta.seed == 2 and result.meta.settings == {"n": 6, "among": "auto"} and result.meta.inputs[0]["text"] == "toy"


def test_one_model_is_no_pair() -> None:
    with pytest.raises(InputError, match="task_accuracy compares two models: pair is a ModelPair, but HookedModel came"):
        task_accuracy(HookedModel.load(tiny("llama")), "ioi")  # type: ignore[arg-type]
