"""The sentences at the top of the page say what the numbers say, with their noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import interp
from interp.analyses.task_accuracy import SIDES, TaskAccuracyResult
from interp.analyses.token_divergence import TokenDivergenceResult
from interp.analyses.tuco import TucoResult
from interp.analyses.tuco_detection import TucoDetectionResult
from interp.verdict import _join, at_chance, by_pair, cautions, verdict


def stamped(result, analysis: str, base: str = "a", tuned: str = "b", weights: str = "12"):
    models = tuple({"name": n, "fingerprint": f * 8} for n, f in zip((base, tuned), weights, strict=True))
    object.__setattr__(result, "meta", SimpleNamespace(analysis=analysis, models=models))
    return result


def answers(task: str, before: int, after: int, n: int = 200, chance: float | None = 0.5, jitter: int = 0, **models: str):
    """The first ``before`` and the first ``after`` questions are right: flips are as few as they can be."""
    right = torch.stack([torch.arange(n) < before, torch.arange(n) < after])
    said = {side: ("",) * n for side in SIDES}
    result = TaskAccuracyResult(
        right=right, margin=torch.zeros(2, n), jitter=torch.tensor([jitter, 0]), task=task, among="options", chance=chance,
        texts=("",) * n, answers=("",) * n, said=said, tags={}, labels={"side": SIDES},
    )  # fmt: skip
    return stamped(result, "task_accuracy", **models)


def texts(kl: float, nll: float, noise: float = 0.0, n: int = 40, floor: float = 1e-9):
    """Texts of three tokens with this divergence and this change of the loss, the latter +- ``noise`` from text to text."""
    shape = (n, 3)
    change = torch.full(shape, nll) + noise * torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)[:, None]
    change[:, -1] = torch.nan  # nothing follows the last token
    zero = torch.zeros(2, *shape)
    result = TokenDivergenceResult(
        kl=torch.full(shape, kl), reverse_kl=torch.full(shape, kl), jsd=torch.full(shape, kl),
        nll=torch.stack([torch.zeros(shape), change]),
        rank=zero, entropy=zero, top=zero.long(), ids=torch.zeros(shape, dtype=torch.long), kind=torch.zeros(shape, dtype=torch.long),
        floor=torch.full((2, 4), floor), half=False, kinds=("all",), vocabulary={0: "x"}, shared=5, labels={"side": SIDES},
    )  # fmt: skip
    return stamped(result, "token_divergence")


def test_the_ledger_tells_learned_lost_unchanged_and_chance_apart() -> None:
    results = [
        answers("new", 20, 180, chance=0.1), answers("old", 190, 100), answers("kept", 180, 178), answers("noise", 101, 99),
        answers("small", 110, 150), answers("text", 0, 30, chance=None),
    ]  # fmt: skip
    learned, lost, same, chance = verdict(results)
    # 160 of 200 more: +80 points; the half width of its interval is 1.96 sqrt(161 - 160^2 / 202) / 202 = 5.7, its centre 160 / 202
    # 160 of 200 gained: the interval is 160 / 202 +- 1.96 sqrt(161 - 160^2 / 202) / 202 = 79.2 +- 5.7 points
    assert learned.startswith(
        "Tuning raised new (10% to 90%, change +80 [+74, +85] points; 160 gained, 0 lost, n = 200, chance 10%), small"
    )
    assert "and text (0% to 15%" in learned and "n = 200)" in learned
    assert lost.startswith("Tuning lowered old (95% to 50%, change -45 [")
    assert same.startswith("No change beyond noise on kept (90% to 89%")
    assert chance == "Neither model is above chance on noise: these tasks say nothing about the tuning."
    assert at_chance(results) == ["noise"]
    (rose,) = verdict([answers("to chance", 20, 100)])  # 10% to 50% of two options: never above chance, and yet moved
    assert rose.startswith("Tuning raised to chance (10% to 50%")


def test_behaviour_names_forgetting_only_beyond_its_noise() -> None:
    def told(**numbers: float) -> str:
        (sentence,) = verdict([texts(**numbers)])
        return sentence

    forgot = told(kl=0.5, nll=0.2, noise=0.1)
    # noise: standard error of +-0.1 over 40 texts = 0.1 / sqrt(39) = 0.016
    assert "On 40 plain texts the predictions moved by 0.5" in forgot and "forgot some of that" in forgot and "+0.2 +- 0.02" in forgot
    assert "without forgetting that shows: its loss there changed by +0.01 +- 0.02" in told(kl=0.5, nll=0.01, noise=0.1)
    assert "became better at that" in told(kl=0.5, nll=-0.2, noise=0.1)
    assert told(kl=1e-10, nll=0.0).endswith("numerical floor 1e-09): no more than rounding.")


def test_cautions_name_small_samples_rounding_and_what_was_not_asked() -> None:
    lines = cautions([texts(kl=1e-10, nll=0.0, n=12)])
    assert any(line.startswith("Small samples: token_divergence has 12 texts;") for line in lines)
    assert any("100% of the tokens differ by less than the numerical floor" in line for line in lines)
    assert any(line.startswith("No task was scored") for line in lines)
    assert cautions([texts(kl=0.5, nll=0.2), answers("a", 10, 190)]) == []
    half = texts(kl=0.5, nll=0.2)
    object.__setattr__(half, "half", True)
    assert [line for line in cautions([half]) if line.startswith("Half precision moves predictions too")]
    assert cautions([answers("a", 100, 103, jitter=9)]) == ["On a rounding alone flips 9 answers, and tuning flips 3."]
    check = SimpleNamespace(
        meta=SimpleNamespace(analysis="pair_check", models=()), warnings=("far apart",),
        items=({"item": "chat template", "status": "note", "says": "only tuned has one"}, {"item": "dtype", "status": "note", "says": "x"}),
    )  # fmt: skip
    assert cautions([check]) == ["far apart", "only tuned has one"]


def contribution(shares: list[float], sets: list[str], closure: float = 1e-7, rounding: list[float] | None = None):
    """Prompts with these TuCos."""
    n = len(shares)
    x = torch.tensor(shares, dtype=torch.float64)[:, None]
    pos = torch.zeros(n, 1, dtype=torch.double)
    known = {f"{a}_{b}": (1 - x if a == "pre" else x) for a in ("pre", "tuning") for b in ("sum", "layer", "whole", "token")}
    zero = torch.zeros(n, dtype=torch.long)
    result = TucoResult(
        **known, base_output=None, output_change=None, closure=torch.full((n,), closure).double(), floor=torch.tensor([1e-8]).double(),
        rounding=torch.tensor(rounding or []).double(), ids=pos.long(), scored=zero, answer=zero - 1, vocabulary={0: "x"},
        sets=tuple(sets), norm="l1", position="END", draw_seed=0, notes=(),
    )  # fmt: skip
    return stamped(result, "tuco")


def test_tuning_share_is_told_by_set() -> None:
    sets = [name for name in ("text", "ioi", "boxes") for _ in range(12)]
    shares = [{"text": 0.1, "ioi": 0.2, "boxes": 0.4}[name] + (0.01 if i % 2 else -0.01) for i, name in enumerate(sets)]
    (told,) = verdict([contribution(shares, sets)])
    # the bootstrap of 12 values of +-0.01 has a standard error of 0.01 / sqrt(12) = 0.0029
    assert told.startswith("Of 3 sets of prompts, tuning's share of what was written into the stream was highest on boxes (0.4 [0.39")
    assert "lowest on text (0.1 [0.09" in told and "n = 12)" in told and cautions([contribution(shares, sets)]) == []
    alone = contribution(shares[:12], [])
    alone.meta.inputs = ({"text": "mine.txt"},)
    assert verdict([alone])[0].startswith("The mean TuCo, tuning's share of what was written into the stream, on mine.txt (0.1 [")
    (none,) = verdict([contribution([0.0] * 12, [])])
    assert none == "At the end of no prompt did tuning write more of the stream than rounding (TuCo at most 1e-08)."


def test_tuning_share_comes_with_its_cautions() -> None:
    shares, sets = [0.1] * 12, ["a"] * 9 + ["b"] * 3
    assert cautions([contribution(shares, sets)]) == [
        "Small samples: tuco has 3 prompts in its smallest set; --effort full takes more, where they come from tasks and not from a file."
    ]
    assert cautions([contribution(shares, [], rounding=[0.02])]) == [
        "Tuco: rounding to half precision alone gives TuCo 0.02, and the median prompt has 0.1."
    ]
    assert cautions([contribution(shares, [], rounding=[0.001])]) == []
    (open_,) = cautions([contribution(shares, [], closure=0.05)])
    assert open_ == "Tuco: what the blocks were seen to write misses the stream by up to 0.05 of it."


def detection(apart: float, length: int):
    """Twenty positives that have so much more TuCo, and are so much longer, than twenty negatives."""
    spread = torch.arange(20).double() / 1000
    tuning = torch.cat([0.3 + apart + spread, 0.3 + spread])
    result = TucoDetectionResult(
        tuning=tuning, pre=1 - tuning, length=torch.tensor([5 + length] * 20 + [5] * 20), is_positive=torch.arange(40) < 20,
        base_output=None, output_change=None, closure=torch.zeros(40).double(), floor=torch.zeros(1).double(),
        rounding=torch.zeros(0).double(), texts=tuple(map(str, range(40))), sets=("boxes", "text"), norm="l1", position="END", draw_seed=0,
        forms=("", ""), repeats=0,
    )  # fmt: skip
    found = stamped(result, "tuco_detection")
    found.meta.inputs = ()
    return found


def test_sets_told_apart_by_length_are_a_caution() -> None:
    (told,) = verdict([detection(0.1, 0)])
    assert told.startswith("TuCo tells positive (boxes) from negative (text) with AUC 1 [") and told.endswith("] (n = 20 and 20).")
    (less,) = verdict([detection(-0.1, 0)])
    assert "with AUC 0 [" in less and "], the first having less of it (n = 20 and 20)." in less
    assert cautions([detection(0.1, 0)]) == []
    (longer,) = cautions([detection(0.1, 3)])
    assert longer.startswith("The length of the prompts alone tells positive (boxes) from negative (text) with AUC 1 [")


def test_pairs_are_told_apart_by_their_weights() -> None:
    results = [answers("x", 20, 180, weights="12"), answers("x", 20, 20, weights="13"), answers("x", 20, 180, tuned="c", weights="14")]
    assert list(by_pair(results)) == ["a -> b (22222222)", "a -> b (33333333)", "a -> c"]
    starts = [sentence.split(": ")[0] for sentence in verdict(results)]
    assert starts == ["a -> b (22222222)", "a -> b (33333333)", "a -> c"]


def test_lists_read_well() -> None:
    assert (_join(["a"]), _join(["a", "b"]), _join(["a", "b", "c"])) == ("a", "a and b", "a, b and c")


def test_heads_of_circuits_are_counted_once_whatever_their_stages() -> None:
    """One head in two stages is one head, and contexts that come twice are not two prompts."""
    from interp.analyses.circuit_evaluation import circuit_evaluation
    from interp.analyses.circuit_overlap import circuit_overlap
    from interp.circuit import Circuit, Ranking
    from interp.organisms import hand_built
    from interp.sites import parse_sites

    sites = parse_sites(["L0H3.z@END", "L1H2.z@END", "L0H3.z@S2"])
    chosen = {"mover": tuple(sites[:2]), "inhibition": tuple(sites[1:])}
    circuit = Circuit((4, 6, 3), tuple(sites), roles={sites[0]: "mover"}, rankings={r: Ranking({}, some) for r, some in chosen.items()})
    overlap = circuit_overlap(circuit, Circuit.of((4, 6, 3), {"mover": "L0H3.z@END"}))
    assert int(overlap.size_a[overlap.main]) == 4
    (told,) = [line for line in verdict([overlap]) if "circuit has" in line]
    assert told.startswith("Base's circuit has 2 heads and tuned's 1; 1 is in both, where chance gives 0.083 (p = 0.083)")
    made = hand_built("ioi")
    pairs = made.task.generate(made.model, 8)[[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    few: Any = {"completeness_random": 0, "greedy": 0, "random_circuits": 0, "ablation": "zero"}
    (told,) = verdict([circuit_evaluation(made.model, pairs, made.circuit, **few)])
    assert f"(n = {len(set(pairs.contexts))} contexts of 9 prompts)" in told


def test_what_a_circuit_brings_across_is_told_with_its_share_or_without_one() -> None:
    from interp.analyses.cmap import CmapResult

    def crossed(base: int, patched: int, tuned: int, n: int = 40, control: int | None = None):
        right = lambda k: (torch.arange(n) < k).float().expand(3, n)  # noqa: E731
        draws = torch.full((3, 1, 1, 2, n), torch.nan) if control is None else right(control)[:, None, None, None].expand(3, 1, 1, 2, n)
        result = CmapResult(
            patched=right(patched)[:, None, None], control=draws, base=right(base), tuned=right(tuned), floor=torch.zeros(3, 1),
            deviation=0.0, checked=0, sites=("",), heads=(5,), choices=(9,), rest=(),
            output="receiver", among="vocabulary", unit="logit", draw_seed=0,
            notes=(), labels={"measure": ("accuracy", "margin", "logit_diff"), "direction": ("tuned_to_base",), "cell": ("circuit",)},
        )  # fmt: skip
        return stamped(result, "cmap")

    # 30 of 40 are right with the heads, 10 without, 35 in tuned: (30 - 10) / (35 - 10) = 0.8
    (told,) = verdict([crossed(10, 30, 35, control=15)])
    assert told.startswith("The 5 heads of tuned's circuit, set in base, bring its accuracy from 25% to 75% (tuned has 88%): 0.8 [")
    assert told.endswith("of what tuning changed, random heads 0.2 (n = 40).")
    (told,) = verdict([crossed(10, 10, 11)])
    assert "too close to say which share of the change that is (tuned - base 0.025 +- " in told
    assert "cmap has 40 prompts" in " ".join(cautions([crossed(10, 30, 35)]))
    assert not [line for line in cautions([crossed(10, 130, 135, n=200)]) if "cmap" in line]


# ---- the first look, on real results


@pytest.fixture(scope="module")
def looks():
    """Pair -> results of the first look on a few prompts."""
    found = {}
    for tuned in ("base", "boxes-tuned"):
        pair = interp.ModelPair.load("base", tuned)
        text, boxes = interp.task("plain_text").generate(pair, 6), interp.task("boxes").generate(pair, 12)
        found[tuned] = [
            interp.completions(pair, boxes[:3], new_tokens=3, samples=1),
            interp.token_shift(pair, text),
            interp.weight_path(pair, boxes, text, alphas=(0.0, 0.5, 1.0)),
            interp.activation_difference(pair, text, draws=2),
            interp.logit_lens(pair, boxes),
            interp.logit_attribution(pair, boxes),
            interp.attention_patterns(pair, boxes),
        ]
    return found


def test_base_against_base_is_no_difference_in_every_sentence(looks) -> None:
    told = verdict(looks["base"])
    assert len(told) == 7 and all("beyond rounding" in sentence for sentence in told), told


def test_sentences_of_the_first_look_have_the_numbers_of_the_results(looks) -> None:
    results = {r.meta.analysis: r for r in looks["boxes-tuned"]}
    told = verdict(looks["boxes-tuned"])
    assert not any("beyond rounding" in sentence or "nan" in sentence for sentence in told), told
    path, lens, difference = (results[n] for n in ("weight_path", "logit_lens", "activation_difference"))
    (line,) = (s for s in told if s.startswith("On the straight line"))
    right = path.curve("right")
    assert f"{float(right.value[1]):.0%} [{float(right.low[1]):.0%}, {float(right.high[1]):.0%}] at 0.5" in line and "(n = 12)" in line
    (layers,) = (s for s in told if s.startswith("Read layer by layer"))
    for side in ("base", "tuned"):
        first, low, high = lens.decision(side)
        assert f"{'no layer' if first == 'never' else first}{'' if low == high else f' [{low} to {high}]'}" in layers
    (streams,) = (s for s in told if s.startswith("The residual streams differ"))
    undone = difference.undone()
    assert ("undoes" in streams) == (undone is not None) and (undone is None or f"at {undone[0]}, undoes" in streams)


def test_what_has_no_answers_is_not_called_an_answer() -> None:
    pair = interp.ModelPair.load("base", "boxes-tuned")
    text = interp.task("plain_text").generate(pair, 4)
    (layers, parts) = verdict([interp.logit_lens(pair, text), interp.logit_attribution(pair, text)])
    assert "half of the tokens that base holds most likely" in layers and "Of what writes the token that base holds most likely" in parts
