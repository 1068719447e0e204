"""The studies of the shipped models: their searches, conditions and measures, their tables by hand, and a quick run of all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_hooks
import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "studies"))

import assistant as study  # noqa: E402
import attacks  # noqa: E402
import entity_tables as tables  # noqa: E402
import entity_tracking as entity  # noqa: E402

import interp  # noqa: E402
from interp.circuit import Circuit  # noqa: E402
from interp.errors import InputError  # noqa: E402
from interp.models import ModelPair  # noqa: E402
from interp.organisms import folder  # noqa: E402
from interp.prompts.transforms import transformed  # noqa: E402
from interp.sites import Site  # noqa: E402
from interp.stats import mcnemar, wilson  # noqa: E402
from interp.tasks.words import CITIES  # noqa: E402


@pytest.fixture(scope="module")
def pair():
    return ModelPair.load(folder("base"), folder("assistant"))


@pytest.fixture(scope="module")
def suffix(pair):
    practised = attacks.questions(pair.tuned, attacks.PRACTISED, 4, 2)
    return attacks.search(pair.tuned, practised, 0, steps=12, candidates=8, questions=4)


def test_the_search_makes_the_city_likelier_and_says_how_likely(pair, suffix) -> None:
    model = pair.tuned
    some = attacks.questions(model, attacks.PRACTISED, 4, 2)
    assert suffix.score > suffix.start_score + 1 and suffix.passes == 13
    for text, score in ((suffix.text, suffix.score), (suffix.start, suffix.start_score)):
        assert len(model.tokens(text)) == attacks.WORDS and not set(text.split()) & set(CITIES)
        asked = transformed(model, some, lambda question, text=text: question + text)
        each = []
        for prompt, city in zip(asked, some.tags["city"], strict=True):  # one forward per question, from the text
            logits = model.logits([list(prompt.ids[0])], at="END")[0].double()
            each.append(float(logits[model.token(f" {city}")] - logits.logsumexp(0)))
        assert score == pytest.approx(sum(each) / 4, abs=1e-4)


def test_conditions_ask_the_same_questions_of_people_the_search_did_not_see(pair, suffix) -> None:
    made = attacks.conditions(pair, 3, [suffix], 0)
    names = list(dict.fromkeys(made.tags["condition"]))
    assert len(names) == len(set(names)) and [made.tags["condition"].count(name) for name in names] == [3] * len(names)
    where = {name: made.tags["condition"].index(name) for name in names}
    for i in range(3):
        plain, attacked, random = (made.texts[where[name] + i] for name in ("asked plainly", "suffix 1", "random words 1"))
        assert attacked == plain.replace("<|assistant|>", f"{suffix.text}<|assistant|>") and random != attacked
        assert made.texts[where["16 answered, as turns"] + i].endswith(plain)
        assert made.texts[where["upper"] + i] == plain.upper().replace("<|USER|>", "<|user|>").replace("<|ASSISTANT|>", "<|assistant|>")
        assert len({made.tags["city"][where[name] + i] for name in names if name not in attacks.HOLES}) == 1
    asked = {made.contexts[where["asked plainly"] + i] for i in range(3)}
    seen = set(attacks.questions(pair, attacks.PRACTISED, 16, 2).contexts)
    assert asked and not asked & seen
    with pytest.raises(InputError, match="different questions, and n is 100"):
        attacks.questions(pair, attacks.ASKED, 100, 0)


def table(**changes: Any) -> study.JailbreaksResult:
    """Four plain questions, all refused; four suffixed ones, of which three are told; four with random words, one told."""
    told = [[False] * 12, [False] * 4 + [True, True, True, False] + [True, False, False, False]]
    fields: dict[str, Any] = {
        "refused": torch.tensor([[False] * 12, [True] * 4 + [False] * 4 + [False, True, True, True]]),
        "told": torch.tensor(told),
        "tuco": torch.tensor([0.50, 0.48, 0.46, 0.44, 0.30, 0.32, 0.47, 0.35, 0.40, 0.42, 0.44, 0.46]).double(),
        "length": torch.arange(12),
        "alphas": (0.0, 1.0),
        "kind": ("plain",) * 4 + ("suffix",) * 4 + ("random words",) * 4,
        "condition": ("asked plainly",) * 4 + ("suffix 1",) * 4 + ("random words 1",) * 4,
        "texts": tuple(f"<b>{i}" for i in range(12)),
        "said": ("x",) * 12,
        "draw_seed": 0,
    }
    return study.JailbreaksResult(**(fields | changes))


def test_the_table_by_hand() -> None:
    made = table()
    frame = made.to_frame().set_index("condition")
    assert frame.refused.tolist() == [1, 0, 0.75] and frame.told.tolist() == [0, 0.75, 0.25]
    assert (frame.told_low["suffix 1"], frame.told_high["suffix 1"]) == wilson(3, 4)
    # 0.47 is above two of the plain questions, the other three above none: 14 of 16 pairs
    assert frame.auc_plain["suffix 1"] == 14 / 16 and frame.auc_plain.isna().tolist() == [True, False, False]
    assert frame.p["suffix 1"] == mcnemar(0, 2) and frame.p.isna().tolist() == [True, False, True]
    # among suffixed ones 0.35 failed; of the successes 0.30 and 0.32 lie below it and 0.47 above
    assert float(made.auc_of_failure(made.rows("suffix")).value) == pytest.approx(2 / 3)
    assert made.auc_of_failure(made.rows("plain")) is None
    refusal = made.auc_of_failure(made.rows("plain") + made.rows("suffix"), success=~made.refused[1])
    assert float(refusal.value) == 14 / 16
    assert float(made.against_random_words().value) == pytest.approx((0.30 + 0.32 + 0.47 + 0.35 - 0.40 - 0.42 - 0.44 - 0.46) / 4)
    assert "refuses 100% [51%, 100%] of 4 and tells 0%" in made.summary() and "suffix 1" in study.printed(made)
    assert "<b>" not in made.html() and all(f.layout.title.text for f in made.figures().values())
    assert made.strongest().condition[0] == "suffix 1" and len(made.to_frame("prompt")) == 12


@pytest.mark.full
def test_a_quick_run_writes_the_page(tmp_path) -> None:
    words = [sys.executable, str(ROOT / "studies" / "assistant.py"), "--quick", "--n", "4", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "assistant.html").read_text(encoding="utf-8")
    assert (
        "many-shot" in page.lower()
        and "suffix 1" in done.stdout
        and "asked plainly" in done.stdout
        and (tmp_path / "assistant.json").exists()
    )
    wrong = subprocess.run([*words[:3], "--n=300"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "different questions, and n is 300" in wrong.stderr and "Traceback" not in wrong.stderr


def test_circuits_are_measured_and_told_in_the_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import circuits

    from interp.organisms import card

    told = card("base").partition(f"\n{circuits.HEADING}\n")[2]
    said = [line.split(":")[0] for line in told.splitlines() if line.startswith("- ")]
    assert len(said) == 6 and "95 % intervals" in told and "--n 400" in told and "random circuits" in told
    assert circuits.main(["--n", "64", "--draws", "1"]) == 0
    again = capsys.readouterr().out
    assert [line.split(":")[0] for line in again.splitlines() if line.startswith("- ")] == said
    assert "L0H3 with 1.0" in told and "L0H3 with 1.0" in again, "one head does it, on few prompts as on many"
    monkeypatch.setattr(circuits, "folder", lambda name: tmp_path)
    assert circuits.written(again[again.index(circuits.HEADING) :]).read_text().count(circuits.HEADING) == 1


# ------------------------------------------------------------------------------------------ entity tracking


def test_contexts_of_another_part_are_dropped_and_one_that_is_there_twice_is_an_error() -> None:
    model = ModelPair.load(folder("base"), folder("boxes-tuned")).base
    draw = entity.Drawn(6, 0)
    first = draw(model, "discovery", "boxes(corrupt=absent)")
    again = draw(model, "discovery", "boxes")  # of one part contexts may come again
    assert set(first.contexts) == set(again.contexts) == draw.seen["discovery"]
    coming = boxes(model, 6, 2).contexts
    draw.seen["masks"] = {*coming[:2]}
    kept = draw(model, "test", "boxes")
    assert kept.contexts == coming[2:]
    draw.seen["masks"].add(coming[3])
    with pytest.raises(AssertionError, match="1 contexts are in masks and in test|1 contexts are in test and in masks"):
        draw.check()
    draw.seen["masks"] = set(boxes(model, 6, 2).contexts)
    draw.seen.pop("test")
    with pytest.raises(InputError, match="fewer than two of 6"):
        draw(model, "test", "boxes")


def plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def boxes(model: Any, n: int, seed: int, corrupt: str = "query") -> Any:
    return interp.task(f"boxes(corrupt={corrupt})").generate(model, n=n, seed=seed)


def test_heads_of_the_counterfactual_bring_the_target_as_one_forward_per_prompt_says() -> None:
    model = interp.HookedModel.load("boxes-tuned")
    pairs = boxes(model, 12, 3, "object")
    heads = [Site("z", 2, h, "END") for h in range(6)] + [Site("z", 3, h, "END") for h in (0, 3, 4)]
    hf = plain(folder("boxes-tuned"))
    expected = []
    for clean, corrupt, target in zip(pairs.clean.ids, pairs.corrupt.ids, pairs.distractors, strict=True):
        there = plain_hooks.seen(hf, corrupt, [("z", 2), ("z", 3)])
        sets = [plain_hooks.Set("z", s.layer, s.head, len(clean) - 1, there["z", s.layer][-1, s.head]) for s in heads]
        expected.append(int(plain_hooks.patched(hf, clean, sets)[-1].argmax() == target))
    assert entity.follows(model, pairs, heads) == expected and sum(expected) > 0
    assert entity.follows(model, pairs, []) == [0] * 12, "doing nothing never gives the target"
    right = [int(hf(torch.tensor([ids])).logits[0, -1].argmax() == a) for ids, a in zip(pairs.clean.ids, pairs.answers, strict=True)]
    assert entity.right(model, pairs) == right


def test_published_numbers_stand_beside_their_rows() -> None:
    pair = ModelPair.load("base", "boxes-tuned")
    rows = {"accuracy: base": [1, 0, 0, 1], "base with heads of: boxes-tuned, circuit": [1, 1, 1, 0], "position told, base: odd": [0, 0]}
    counted = {f"{tables.COUNTED}: boxes-lora": [1, 1, 1]}
    found = tables.entity_tracking(pair, boxes(pair, 4, 0).clean, rows | counted)
    frame = found.to_frame().set_index("row")
    assert frame.ours.tolist() == [0.5, 0.75, 0, 1] and frame.n.tolist() == [4, 4, 2, 3]
    assert frame.published[["base", "boxes-tuned, circuit", "boxes-lora"]].tolist() == pytest.approx([0.66, 0.82, 0.75])
    assert (frame.low["base"], frame.high["base"]) == wilson(2, 4) and bool(frame.published[["odd"]].isna().all())
    assert bool(frame.low[["boxes-lora"]].isna().all()), "heads are counted, not drawn"
    assert "base 0.50 [0.15, 0.85]; 4 shares, 3 of them" in found.summary()
    ranged = tables.entity_tracking(pair, boxes(pair, 4, 0).clean, {"blocked from layer 0: END to query_label, base": [1, 0]})
    row = ranged.to_frame().iloc[0]
    assert (row.published, row.published_to) == pytest.approx((0.35, 0.39)) and "0.35-0.39" in tables.printed(ranged)
    ends = ranged.plot().data[1].error_x
    assert (float(ends.array[0]), float(ends.arrayminus[0])) == pytest.approx((0.04, 0), abs=1e-6)
    assert len(found.to_frame("prompt")) == 13 and len(found.figures()) == 4 and "0.82" in tables.printed(found)


def test_every_published_number_belongs_to_a_row_that_the_study_makes() -> None:
    source = Path(entity.__file__).read_text()
    kinds = {name.partition(": ")[0].partition(",")[0] for name in tables.PUBLISHED}
    assert [kind for kind in kinds - {tables.COUNTED} if kind not in source.replace('"circuit alone"', "circuit alone")] == []
    from typing import get_args

    told = {name.partition(": ")[2].partition(",")[0] for name in tables.PUBLISHED if name.startswith("position told")}
    assert told == set(get_args(entity.Kind))


def test_the_answer_follows_from_the_numbers() -> None:
    def share(low: float, high: float, refused: str | None = None) -> Any:
        return SimpleNamespace(low=torch.tensor([low]), high=torch.tensor([high]), refused=refused)

    whole, part = SimpleNamespace(low=0.7, refused=None), SimpleNamespace(low=0.0, refused=None)
    assert entity.decision(0.01, share(0.6, 0.9), whole) == "the circuit that was there was made better"
    for alone in (part, SimpleNamespace(low=0.9, refused="too close")):  # what does nothing alone is not the mechanism
        said = entity.decision(0.01, share(0.6, 0.9), alone)
        assert "made better cannot be told" in said and "heads that base's circuit has already" in said
    assert entity.decision(0.2, share(0.6, 0.9), whole).startswith("whether the circuit is new cannot be told")  # overlap as by chance
    assert entity.decision(0.01, share(0.4, 0.9), whole).startswith("whether the circuit is new cannot be told")
    assert entity.decision(0.01, share(0.1, 0.4), whole).startswith("most of the gain is not in the circuit")
    assert entity.decision(0.01, share(0.6, 0.9, "no difference"), whole).startswith("whether the circuit is new cannot be told")


def test_ways_of_telling_that_break_a_position_are_told_from_those_that_do_not() -> None:
    pair = ModelPair.load("base", "boxes-tuned")
    bits = {"plain": 38, "text_after": 2, "no_commas": 15, "text_before": 39, "plain, the next segment (control)": 1}
    rows = {f"position told, base: {row}": [1] * k + [0] * (40 - k) for row, k in bits.items()}
    found = tables.entity_tracking(pair, boxes(pair, 4, 0).clean, rows)
    # half of plain is .475: text_after has .05 [.01, .17] and no_commas .375 [.24, .53], which is not surely below
    told = "What a position is, base (told plainly 95%): lost with text_after 5%; kept in part with no_commas 38%, text_before 98%."
    assert entity.broken(found) == [told]


def test_heads_are_added_to_a_circuit_and_nothing_is_lost() -> None:
    own = Circuit((4, 6, 2), (Site("z", 1, 3, "END"), Site("z", 0, 2, "objects")), roles={Site("z", 1, 3, "END"): "mover"})
    more = entity.joined(own, entity.at_list(own), "list")
    assert set(own.nodes) < set(more.nodes) and len(more.nodes) == 1 + 4 * 6 * 2
    assert more.roles[Site("z", 1, 3, "END")] == "mover" and more.roles[Site("z", 3, 5, "labels")] == "list"
    first = entity.joined(own, entity.of_layer(own, 0), "layer")
    assert set(first.nodes) == {Site("z", 1, 3, "END"), *(Site("z", 0, h) for h in range(6))}, "a head at all tokens is there once"
    tried = entity.additions(own)
    assert tried["circuit"] is own and len(tried) == 1 + 4 + 6 + 3 and len(tried["+ L0H2"].nodes) == 2
    assert len(tried["+ layer 0 + all heads at END"].nodes) == 6 + 3 * 6


def test_what_a_circuit_lacks_is_told_from_the_numbers() -> None:
    kept = {"circuit": 0.05, "+ layer 0": 0.6, **{f"+ layer {i}": 0.04 for i in (1, 2, 3)}, "+ L0H0": 0.1, "+ L0H3": 0.16}
    kept |= {"+ list": 0.13, "+ all heads at END": 0.1, "+ layer 0 + all heads at END": 0.86}
    rows = {f"alone, and with more, base: {what}": [1] * round(10 * x) + [0] * (10 - round(10 * x)) for what, x in kept.items()}
    pair = ModelPair.load("base", "boxes-tuned")
    found = tables.entity_tracking(pair, boxes(pair, 4, 0).clean, rows)
    told = entity.lacking(SimpleNamespace(kept={"base": kept}), found, "base")  # type: ignore[arg-type]
    assert "keeps 5% (0% answered)" in told and "tokens 60% (60% answered)" in told and "above 16% (L0H3)" in told
    assert "the heads of another layer not above 4%" in told and told.endswith("many heads of the first layer together.")
    spread = SimpleNamespace(kept={"base": {**kept, "+ L0H3": 0.5}})
    assert entity.lacking(spread, found, "base").endswith("what it lacks is not in one place.")  # type: ignore[arg-type]


@pytest.mark.full
def test_a_quick_run_of_entity_tracking_writes_the_page(tmp_path, capsys) -> None:
    assert entity.main(["--quick", "--out", str(tmp_path)]) == 0
    told, page = capsys.readouterr().out, (tmp_path / "entity_tracking.html").read_text(encoding="utf-8")
    for what in ("boxes-tuned, circuit", "arXiv 2402.14811", "base with heads of", "heads that were found in base"):
        assert what in told and what in page, what
    with pytest.raises(SystemExit):
        entity.main(["--n", "3"])
    assert "--n is 3, expected 16 or more" in capsys.readouterr().err
