"""TuCo as a score that tells two sets of prompts apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_contribution import SIZES, tuco_of, twin
from tiny_checkpoints import FOUR, tiny
from tiny_pairs import save_pair, written

from interp import stats
from interp.analyses.tuco import tuco
from interp.analyses.tuco_detection import TucoDetectionResult, tuco_detection
from interp.cli import main
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.prompts import PromptPairs, Prompts
from interp.prompts.asked import as_chats
from interp.prompts.transforms import transformed
from interp.tasks import task

HERE, THERE = [[3, 4, 5], [6, 7], [9, 2, 8, 11]], [[12, 3], [5, 6, 7, 8, 9], [13, 14, 3], [20, 4]]


def prompts_of(rows) -> Prompts:
    return Prompts(tuple(map(str, rows)), tuple(map(tuple, rows)))


def result_of(positive, negative, lengths=None) -> TucoDetectionResult:
    """A result with these values of TuCo."""
    x = torch.tensor([*positive, *negative], dtype=torch.float64)
    nothing = torch.zeros(0, dtype=torch.float64)
    return TucoDetectionResult(
        tuning=x,
        pre=1 - x,
        length=torch.tensor([*lengths]) if lengths else torch.full((len(x),), 7),
        is_positive=torch.arange(len(x)) < len(positive),
        base_output=None,
        output_change=None,
        closure=torch.zeros(len(x)).double(),
        floor=nothing,
        rounding=nothing,
        texts=tuple(f"text {i} <b>" for i in range(len(x))),
        sets=("chats", ""),
        forms=("", ""),
        norm="l1",
        position="last_prompt",
        draw_seed=0,
        repeats=0,
    )


def values(n: int, shift: float, seed: int) -> list[float]:
    draws = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()
    return torch.special.ndtr(draws + shift).tolist()  # in (0, 1), and the order stays


# ------------------------------------------------------------------------------- planted values


def test_a_known_auc_and_the_sentence() -> None:
    found = result_of([0.5, 0.2, 0.4], [0.1, 0.4, 0.3, 0.05])
    # 0.5 beats all 4; 0.2 beats 0.1 and 0.05; 0.4 beats three and ties with one
    assert float(found.auc.value) == pytest.approx((4 + 2 + 3.5) / 12)
    assert float(found.auc_of("prompt length").value) == 0.5
    said = found.summary()
    assert said.startswith("TuCo tells positive (chats) from the negative prompts with AUC 0.792 [")
    for words in (
        "higher TuCo means positive;",
        "over n = 3",
        "over n = 4",
        "at 5% false positives",
        "prompt length alone: AUC 0.5",
        "7 against 7",
    ):
        assert words in said
    alone = result_of([0.5], [0.1, 0.4]).summary()
    assert "AUC 1 (" in alone and "nan" not in alone


def test_orientation() -> None:
    high, low = values(40, 1.0, 0), values(50, 0.0, 1)
    found, turned = result_of(high, low), result_of(low, high)
    truth = float(torch.special.ndtr(torch.tensor(1 / 2**0.5)))  # of two normals a standard deviation apart
    assert float(found.auc.low) < truth < float(found.auc.high) and found.auc.low > 0.5
    assert float(turned.auc.value) == pytest.approx(1 - float(found.auc.value))
    assert "below one half, so here the positives have less" in turned.summary() and "below one half" not in found.summary()


def test_sets_alike_give_one_half() -> None:
    found = result_of(values(60, 0.0, 2), values(60, 0.0, 3))
    assert found.auc.low < 0.5 < found.auc.high and abs(float(found.auc.value) - 0.5) < 0.1
    same = result_of([0.1, 0.2], [0.1, 0.2])
    assert float(same.auc.value) == 0.5
    nothing = result_of([0.0] * 5, [0.0] * 4)
    assert float(nothing.auc.value) == 0.5 and nothing.plot() is not None


def test_length_is_told_beside() -> None:
    found = result_of(values(20, 0.0, 4), values(20, 0.0, 5), [*range(21, 41), *range(1, 21)])
    assert float(found.auc_of("prompt length").value) == 1 and "prompt length alone: AUC 1 [" in found.summary()
    assert "tells them apart as well: take sets of equal lengths" in found.summary()
    assert found.to_frame().set_index("score").auc["prompt length"] == 1
    alike = result_of(values(20, 1.0, 4), values(20, 0.0, 5), [*range(2, 12), *range(2, 12)] * 2)
    assert "equal lengths" not in alike.summary() and "prompt length alone: AUC 0.5 [" in alike.summary()


def test_tables_and_figures() -> None:
    found = result_of(values(9, 1.0, 0), values(8, 0.0, 1))
    table = found.to_frame().set_index("score")
    assert table.index.tolist() == ["TuCo", "prompt length"] and (table.low <= table.auc).all() and (table.auc <= table.high).all()
    assert table.positive_n.tolist() == [9, 9] and table.negative_n.tolist() == [8, 8]
    x = found.tuco
    assert table.positive_mean["TuCo"] == pytest.approx(float(x[:9].mean())) and table.negative_mean["TuCo"] == pytest.approx(
        float(x[9:].mean())
    )
    assert table.tpr_at_5_percent["TuCo"] == pytest.approx(float((x[:9] > x[9:].max()).double().mean()))  # 5 % of 8 is none
    rows = found.to_frame("prompt")
    assert rows.tuco.tolist() == x.tolist() and rows.prompt.tolist() == [*range(9), *range(8)]
    assert rows.set.tolist() == ["positive (chats)"] * 9 + ["negative"] * 8
    ends = found.strongest(4)
    assert ends.tuco.tolist() == [float(v) for v in (x[:9].max(), x[:9].min(), x[9:].max(), x[9:].min())]
    assert len(found.strongest(100)) == 17 and len(found.strongest(10)) == 10
    figures = found.figures()
    assert list(figures) == ["TuCo of both sets", "ROC", "Against length"]
    bars = figures["TuCo of both sets"].data
    assert [float(sum(b.y)) for b in bars] == pytest.approx([1, 1])
    curve = figures["ROC"].data[-1]
    assert float(torch.trapezoid(torch.tensor(curve.y), torch.tensor(curve.x))) == pytest.approx(float(found.auc.value))
    with pytest.raises(InputError, match="per must be"):
        found.to_frame("set")


def test_sets_are_called_what_is_known_of_them(tmp_path) -> None:
    save_pair(tmp_path)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    sets = Prompts.of(pair, ["The ring is red", "The blue"]), Prompts.of(pair, ["A man went", "One two three"])
    found = tuco_detection(pair, *sets)
    assert found.sets == ("", "") and found.summary().startswith("TuCo tells the positive prompts from the negative prompts with AUC")
    assert [b.name for b in found.plot().data] == ["positive", "negative"]
    asked = task("ioi").generate(pair, 3).clean
    assert tuco_detection(pair, asked, sets[0]).told_apart == ("positive (ioi)", "the negative prompts")


def test_the_length_alone_is_said_where_it_tells_the_sets_apart() -> None:
    found = result_of([0.5, 0.6], [0.1, 0.2])
    assert not found.confounded and "take sets of equal lengths" not in found.summary()
    longer = replace(found, length=torch.tensor([9, 8, 1, 2]))
    assert longer.confounded and float(longer.by_length.value) == 1 and "take sets of equal lengths" in longer.summary()


def test_histograms_count_every_prompt_once() -> None:
    found = result_of([0.0, 0.05, 1.0], [0.5, 0.5])
    first, second = (list(b.y) for b in found.plot().data)
    assert first[0] == first[1] == first[19] == pytest.approx(1 / 3) and second[10] == 1 and sum(first) == pytest.approx(1)


# ---------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", FOUR)
def test_the_numbers_are_the_twins(kind) -> None:
    base, tuned = tiny(kind, 0), tiny(kind, 1)
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    found = tuco_detection(pair, prompts_of(HERE), prompts_of(THERE), output_co=True)
    for rows, positive in ((HERE, True), (THERE, False)):
        torch.testing.assert_close(found.tuco[found.is_positive == positive].float(), tuco_of(twin(base, tuned, rows)), **SIZES)
        assert found.length[found.is_positive == positive].tolist() == [len(r) for r in rows]
        whole = tuco(pair, prompts_of(rows), output_co=True)
        torch.testing.assert_close(found.output_co[found.is_positive == positive], whole.output_co, **SIZES)
    each = [tuco_of(twin(base, tuned, rows)).double() for rows in (HERE, THERE)]
    assert float(found.auc.value) == float(stats.auc(*each).value)
    assert float(found.closure.max()) < 1e-5 and float(found.floor.max()) < 1e-5 and "OutputCo alone: AUC" in found.summary()
    back = tuco_detection(pair, prompts_of(THERE), prompts_of(HERE))
    assert float(back.auc.value) == pytest.approx(1 - float(found.auc.value))
    same = tuco_detection(ModelPair(pair.base, pair.base), prompts_of(HERE), prompts_of(THERE))
    assert not same.tuco.any() and float(same.auc.value) == 0.5


def test_planted_tokens_are_told_apart() -> None:
    base, tuned = tiny("llama", 0), tiny("llama", 0)
    with torch.no_grad():  # tuning writes where token 30 stands, and nowhere else
        out, inner = tuned.model.layers[-1].mlp.down_proj.weight, {}
        hook = tuned.model.layers[-1].mlp.down_proj.register_forward_pre_hook(lambda _, x: inner.update(x=x[0]))
        tuned(torch.tensor([[30], [3]]))
        hook.remove()
        here, there = inner["x"][:, -1]
        direction = here - there * (here @ there) / (there @ there)
        out += torch.outer(torch.ones(len(out)), direction) * 5 / direction.norm()
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    marked = prompts_of([[30]])
    bare = prompts_of([[3]])
    found = tuco_detection(pair, marked, bare)
    assert float(found.tuco[0]) > 0.1 and float(found.tuco[1]) < 1e-4 and float(found.auc.value) == 1


def test_a_prompt_that_is_there_twice_counts_once() -> None:
    pair = ModelPair(HookedModel.load(tiny("llama", 0)), HookedModel.load(tiny("llama", 1)))
    once, more = (
        tuco_detection(pair, prompts_of(HERE), prompts_of(THERE)),
        tuco_detection(pair, prompts_of([*HERE, *HERE]), prompts_of(THERE)),
    )
    assert torch.equal(once.is_positive, more.is_positive) and float(once.auc.low) == float(more.auc.low)
    assert more.repeats == len(HERE) and f"{len(HERE)} repeated prompts counted once" in more.summary() and not once.repeats


def test_settings(tmp_path) -> None:
    save_pair(tmp_path)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    sets = Prompts.of(pair, ["The ring is red", "The blue"]), Prompts.of(pair, ["A man went to the market", "One two three", "One two"])
    found = tuco_detection(pair, *sets)
    lazy = ModelPair.load(tmp_path / "base", tmp_path / "tuned", load="one at a time")
    streamed = tuco_detection(lazy, *sets, stream=True)
    torch.testing.assert_close(streamed.tuco, found.tuco, atol=1e-6, rtol=0)
    assert not lazy.base.loaded and "no numerical floor" in streamed.summary()
    other = tuco_detection(pair, *sets, norm="l2")
    torch.testing.assert_close(other.tuco[:2], tuco(pair, sets[0], norm="l2").tuco, **SIZES)
    at = [replace(s, positions={"first": ((0,),) * len(s)}) for s in sets]
    first = tuco_detection(pair, *at, position="first")
    assert set(first.length.tolist()) == {1}
    again = tuco_detection(pair, *sets, seed=1)
    assert torch.equal(again.tuco, found.tuco) and again.identity != found.identity


def test_bad_input() -> None:
    pair = ModelPair(HookedModel.load(tiny("llama", 0)), HookedModel.load(tiny("llama", 1)))
    here, there = prompts_of(HERE), prompts_of(THERE)
    with pytest.raises(InputError, match="negative must be prompts, one text each, since two sets are told apart; but nothing came"):
        tuco_detection(pair, here, None)
    with pytest.raises(InputError, match="positive must be prompts, .* but PromptPairs came"):
        tuco_detection(pair, PromptPairs(here, here), there)
    with pytest.raises(InputError, match="3 of the 3 negative prompts are among the positive ones, too"):
        tuco_detection(pair, here, here)
    with pytest.raises(InputError, match=r"a negative prompt is among the positive ones, too.*\[12, 3\]"):
        tuco_detection(pair, prompts_of([*HERE, THERE[0]]), there)
    with pytest.raises(InputError, match="norm is 'l0'"):
        tuco_detection(pair, here, there, norm="l0")
    with pytest.raises(InputError, match="ask for one of them"):
        tuco_detection(pair, here, there, stream=True, output_co=True)
    with pytest.raises(InputError, match="no position 'third'"):
        tuco_detection(pair, here, there, position="third")
    with pytest.raises(InputError, match="no prompts"):
        prompts_of([])


def test_the_command_line_names_both_sets(tmp_path, monkeypatch, capsys) -> None:
    save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "own.jsonl", "The ring is red", "The blue", "One two", "The red")
    words = ["run", "tuco_detection", "--base=base", "--tuned=tuned"]
    assert main([*words, "--positive=own.jsonl", "--positive-n=3", "--negative=plain_text", "--negative-n=4", "--negative-seed=2"]) == 0
    place = next((tmp_path / "results" / "tuco_detection").iterdir())
    out = capsys.readouterr().out
    assert "over n = 3" in out and "over n = 4" in out and "negative (plain_text)" in out
    assert main(["replay", str(place)]) == 0
    out = capsys.readouterr().out
    assert "--positive=own.jsonl --positive-n=3 --negative=plain_text --negative-n=4 --negative-seed=2" in out and "to the last bit" in out
    assert main([*words, "--positive=own.jsonl"]) == 2
    assert "tuco_detection needs --negative FILE or --negative TASK" in capsys.readouterr().err
    assert main([*words, "--positive=own.jsonl", "--negative=own.jsonl"]) == 2
    assert "4 of the 4 negative prompts are among the positive ones" in capsys.readouterr().err
    assert main([*words, "--task=plain_text"]) == 2
    assert "does not take '--task=plain_text'" in capsys.readouterr().err


# -------------------------------------------------------------------------------- the shipped pair


@pytest.fixture(scope="module")
def shipped() -> ModelPair:
    return ModelPair.load("base", "assistant")


@pytest.mark.parametrize("kind", ["instructions", "refusals"])
def test_chats_have_more_tuco_than_plain_text(shipped, kind) -> None:
    chats, text = task(kind).generate(shipped.tuned, 24, seed=1).clean, task("plain_text").generate(shipped.tuned, 24, seed=1)
    found = tuco_detection(shipped, chats, text)
    assert float(found.auc.value) >= 0.9 and f"positive ({kind}" in found.summary(), found.summary()


def test_it_is_neither_the_length_nor_the_template(shipped) -> None:
    chats = task("instructions").generate(shipped.tuned, 24, seed=1).clean
    text = task("plain_text(sentences=1)").generate(shipped.tuned, 60, seed=1)
    text = text[sorted({words: i for i, words in enumerate(text.texts)}.values())][:24]
    found = tuco_detection(shipped, chats, text, chat="template")
    assert float(found.auc.low) > 0.9 and abs(float(found.auc_of("prompt length").value) - 0.5) < 0.4, found.summary()


def test_the_template_goes_around_text_alone(shipped) -> None:
    chats, text = task("instructions").generate(shipped.tuned, 4, seed=1).clean, task("plain_text").generate(shipped.tuned, 4, seed=1)
    found = tuco_detection(shipped, chats, text, chat="template")
    want = tuco_detection(shipped, chats, as_chats(shipped.tuned, text, "template"))
    assert torch.equal(found.tuco, want.tuco) and found.texts == want.texts and found.texts[4].startswith("<|user|>")
    leet = transformed(shipped.tuned, chats, "leet")
    told = tuco_detection(shipped, chats, leet)
    assert told.sets[1].endswith(", leet") and not told.meta.replayable
