"""What a model recites: distances, cuts and teacher forcing beside plain greedy decoding, one text at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tokenizers import tokenizer
from tiny_checkpoints import FOUR, tiny
from tiny_pairs import save_pair

import interp
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.prompts import Prompts
from interp.sites import Site
from interp.stats import wilson
from interp.tasks.reciting import Passages, distances, forced, loose, matched, passages, recitations, shifted


def by_the_book(a: list[int], b: list[int]) -> int:
    """Levenshtein distance by its definition (Wagner and Fischer 1974)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def greedy(hf: Any, ids: tuple[int, ...], n: int) -> tuple[int, ...]:
    """One text, no cache, no padding; end-of-text tokens are tokens like others."""
    row = list(ids)
    with torch.no_grad():
        for _ in range(n):
            row.append(int(hf(torch.tensor([row])).logits[0, -1].argmax()))
    return tuple(row[len(ids) :])


def made(kind: str, n_texts: int = 7, **changes: int) -> tuple[Any, HookedModel, Passages]:
    """Texts of unequal lengths whose rests a model goes on with for a while; the last two not at all, and one wholly."""
    hf = tiny(kind, **changes)
    model, draw = HookedModel.load(hf), torch.Generator().manual_seed(3)
    prompts, rests = [], []
    for i in range(n_texts):
        ids = tuple(torch.randint(31, (3 + i % 4,), generator=draw).tolist())
        rest = greedy(hf, ids, 3 + (2 * i) % 5)
        wrong = len(rest) if i == 0 else min(i, len(rest) - 1) if i < n_texts - 2 else 0
        prompts.append(ids)
        rests.append(rest[:wrong] + tuple((x + 1) % 31 for x in rest[wrong:]))
    return hf, model, Passages(tuple(prompts), tuple(rests), (0,) * n_texts)


# ---- distances


def test_distance_is_the_fewest_edits() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [([2, 3, 4], [1, 2, 3]), ([], [5]), ([7], [7]), ([40000, 1], [1, 40000])]
    pairs += [
        tuple(torch.randint(4, (int(n),), generator=draw).tolist() for n in torch.randint(9, (2,), generator=draw)) for _ in range(60)
    ]
    found = distances([a for a, _ in pairs], [b for _, b in pairs])
    assert found.tolist() == [by_the_book(a, b) for a, b in pairs]
    assert found[:4].tolist() == [2, 1, 0, 2]


def test_loose_is_a_quarter_of_the_tokens_wrong_at_most() -> None:
    d, length = torch.tensor([0, 12, 13, 2, 3, 1, 1]), torch.tensor([48, 48, 48, 8, 8, 4, 3])
    assert loose(d, length).tolist() == [True, True, False, True, False, True, False]
    assert torch.equal(loose(d, length), 1 - d / length.double() >= 0.75)


def test_matched_counts_to_the_first_wrong_token() -> None:
    assert matched([(1, 2, 3), (1, 9, 3), (9, 2, 3), (1, 2)], [(1, 2, 3)] * 4).tolist() == [3, 1, 0, 2]


# ---- generation


@pytest.mark.parametrize("kind", FOUR)
def test_written_and_forced_are_greedy_decoding_one_by_one(kind: str) -> None:
    hf, model, texts = made(kind)
    plain = [greedy(hf, ids, len(rest)) for ids, rest in zip(texts.prompts, texts.rests, strict=True)]
    assert recitations(model, texts) == plain
    assert forced(model, texts).tolist() == matched(plain, texts.rests).tolist()
    assert len(set(forced(model, texts).tolist())) > 3, "the texts differ in how far they go"


def test_an_end_of_text_token_ends_nothing() -> None:
    hf, model, texts = made("llama")
    first = greedy(hf, texts.prompts[0], 1)[0]
    hf.generation_config.eos_token_id = first
    assert model.generate([list(texts.prompts[0])], 4) == [[]], "the model says it at once"
    assert recitations(model, texts)[0] == greedy(hf, texts.prompts[0], len(texts.rests[0])) == texts.rests[0]


def test_texts_that_fit_one_by_one_fit_together() -> None:
    """The longest beginning and the longest rest together would not."""
    hf, model, _ = made("gpt2")  # 19 tokens
    prompts = (tuple(range(1, 16)), (4, 5))
    rests = ((3, 3, 3), tuple(range(12)))
    written = recitations(model, Passages(prompts, rests, (0, 0)))
    assert written == [greedy(hf, p, len(r)) for p, r in zip(prompts, rests, strict=True)]


def test_forced_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, texts = made("qwen2")
    whole = forced(model, texts)
    monkeypatch.setattr("interp.tasks.reciting.CELLS", 31 * 20)
    assert torch.equal(forced(model, texts), whole)


# ---- cuts


def test_a_text_cut_elsewhere() -> None:
    texts = Passages(((9, 1, 2, 3, 4), (9, 5, 6)), ((10, 11, 12), (13,)), (1, 1))
    rows, cut = shifted(texts, 2)
    assert rows == [0] and cut.prompts == ((9, 1, 2, 3, 4, 10, 11),) and cut.rests == ((12,),)
    rows, cut = shifted(texts, -1)
    assert rows == [0, 1] and cut.prompts == ((9, 2, 3, 4), (9, 6)) and cut.rests == texts.rests, "the special token stays"
    rows, cut = shifted(texts, -2, least=2)
    assert rows == [0] and cut.prompts == ((9, 3, 4),)
    assert shifted(texts, 3)[0] == [] == shifted(texts, -3, least=2)[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> ModelPair:
    return ModelPair.load(*save_pair(tmp_path_factory.mktemp("pair")))


def drawn(pair: ModelPair, texts: list[tuple[str, str]]) -> Prompts:
    return replace(Prompts.of(pair, [t for t, _ in texts]), targets=tuple(r for _, r in texts))


def planted(pair: ModelPair, far: int) -> Prompts:
    """Texts that base goes on with wholly or for some tokens; decoded bytes must read back as the same tokens."""
    base, found = pair.base, []
    words = ("ring", "cup", "ball", "book", "hat", "box", "door", "lamp", "tree", "boat", "fish", "moon")
    for i, word in enumerate(words):
        text = "The " + word + " is" * (i % 3)
        ids = tuple(base.tokens(text))
        rest = list(greedy(base.wrapped.source, ids, far))
        if i % 3:
            rest[-1 - i % far] = base.tokens(" red")[0]
        if base.tokens(text + base.decode(rest)) == [*ids, *rest]:
            found.append((text, base.decode(rest)))
    return drawn(pair, found)


def test_the_stress_test_is_the_best_of_all_other_cuts(pair) -> None:
    """Slow twin: every cut decoded greedily, one text at a time, without padding."""
    prompts, t = planted(pair, 5), 2
    assert len(prompts) >= 3
    result = interp.recitation(pair, prompts, stress=t)
    texts = passages(pair.base, prompts)
    longest = max(map(len, texts.prompts))
    for i, model in enumerate((pair.base, pair.tuned)):
        hf = model.wrapped.source
        for k, (ids, rest) in enumerate(zip(texts.prompts, texts.rests, strict=True)):
            cuts = {str(j): (ids + rest[:j], rest[j:]) for j in range(1, t + 1) if len(rest) > j}
            cuts |= {str(m - len(ids)): (ids[len(ids) - m :], rest) for m in range(t + 1, len(ids))}
            right = {s: int(matched([greedy(hf, p, len(r))], [r])[0]) for s, (p, r) in cuts.items()}
            column = dict(zip(result.labels["shift"], result.stressed[i, :, k].tolist(), strict=True))
            assert {s: v for s, v in column.items() if v == v} == right, (i, k)
            assert float(result.stress[i, k]) == max(right.values())
    assert result.labels["shift"] == tuple(str(s) for s in (*range(t + 1 - longest, 0), *range(1, t + 1)))
    assert "other cuts" in result.summary() and set(result.figures()) == {"Recited", "How far", "Cut elsewhere"}


def test_a_text_that_no_other_cut_fits_is_left_out(pair) -> None:
    """Its beginning has as few tokens as must be left, and its rest is one token."""
    longer, alone = planted(pair, 5), ("The ring", " is")
    plain = interp.recitation(pair, longer, stress=2)
    mixed = drawn(pair, [alone, *zip(longer.texts, longer.targets, strict=True)])
    result = interp.recitation(pair, mixed, stress=2)
    assert len(passages(pair.base, mixed).prompts[0]) <= 3 and result.stressed[:, :, 0].isnan().all()
    assert result.stress[:, 0].isnan().all() and torch.equal(result.stress[:, 1:], plain.stress)
    frame = result.to_frame()
    assert frame["stress"].tolist() == pytest.approx(plain.to_frame()["stress"].tolist(), abs=1e-12)
    assert frame["stress_left_out"].tolist() == [1, 1] and plain.to_frame()["stress_left_out"].tolist() == [0, 0]
    rows = result.to_frame(per="prompt")
    assert rows[rows.prompt == 0]["stress"].isna().all() and not rows[rows.prompt > 0]["stress"].isna().any()

    def told(one: Any) -> str:
        return one.summary().partition("first wrong one")[2]

    assert told(result) == told(plain) + " (1 of the texts left out: no other cut fits)"
    assert "left out" not in plain.summary() and "Cut elsewhere" in result.figures()


def test_shares_and_distances_of_a_pair(pair) -> None:
    prompts = planted(pair, 4)
    result = interp.recitation(pair, prompts)
    texts = passages(pair.base, prompts)
    for i, model in enumerate((pair.base, pair.tuned)):
        written = [greedy(model.wrapped.source, p, len(r)) for p, r in zip(texts.prompts, texts.rests, strict=True)]
        away = [by_the_book(list(a), list(b)) for a, b in zip(written, texts.rests, strict=True)]
        assert result.distance[i].tolist() == away
        row = result.to_frame().iloc[i]
        n = len(away)
        assert row.strict == sum(d == 0 for d in away) / n and row.loose == sum(1 - d / 4 >= 0.75 for d in away) / n
        assert row.edit == pytest.approx(sum(d / 4 for d in away) / n, abs=1e-12)
        assert (row.strict_low, row.strict_high) == wilson(sum(d == 0 for d in away), n)
        assert result.said[result.sides[i]] == tuple(model.decode(w) for w in written)
    assert result.strict[0].any() and not result.strict[0].all()
    assert result.jitter.tolist() == [0, 0] and not result.stressed.numel()
    assert len(result.to_frame(per="prompt")) == 2 * len(prompts) and "McNemar" in result.summary()
    assert (result.loose | ~result.strict).all(), "what is strictly recited is loosely"


def test_the_last_tokens_of_whole_texts(pair) -> None:
    prompts = planted(pair, 4)
    whole = Prompts.of(pair, [t + r for t, r in zip(prompts.texts, prompts.targets, strict=True)])
    one, other = interp.recitation(pair.base, prompts), interp.recitation(pair.base, whole, tail=4)
    assert torch.equal(one.distance, other.distance) and one.rests == other.rests and one.texts == other.texts
    assert one.sides == ("model",)


def test_edits_count_and_the_task_judges_alike(pair) -> None:
    one = interp.task("recitation")
    prompts = one.generate(pair, 5)
    base = pair.base
    with base.edited(Edit((WeightChange(Site("W_out", 0), torch.ones(tuple(base.weight("L0.W_out").shape))),))):
        edited = interp.recitation(base, prompts)
        assert torch.equal(one.score(base, prompts), edited.strict[0])
    assert edited.said != interp.recitation(base, prompts).said


@pytest.mark.parametrize("away", [0, 1, 6, 7])
def test_the_task_counts_loosely_when_asked(away: int) -> None:
    """Of 24 to 27 tokens 6 may be wrong."""
    from small_tokenizers import Reader

    words = tokenizer("byte_level")
    asked = interp.task("recitation(judged=loose)").generate(Reader(words), 3)
    texts = passages(Reader(words), asked)
    assert all(24 <= len(r) <= 27 for r in texts.rests)
    said = {p: [(x + 1) % 9 if i < away else x for i, x in enumerate(r)] for p, r in zip(texts.prompts, texts.rests, strict=True)}
    reader = Reader(words, said.__getitem__)
    for judged, right in (("loose", away <= 6), ("strict", away == 0)):
        assert interp.task("recitation", judged=judged).score(reader, asked).tolist() == [right] * 3


def test_bad_input(pair) -> None:
    plain = interp.task("plain_text").generate(pair, 2)
    with pytest.raises(InputError, match="no target texts to score; with tail=8"):
        interp.recitation(pair, plain)
    with pytest.raises(InputError, match=r"prompt 0 has \d+ tokens; to have the last 120 recited"):
        interp.recitation(pair, plain, tail=120)
    for tail in (-1, True, 1.5):
        with pytest.raises(InputError, match="tail is a number of tokens"):
            interp.recitation(pair, plain, tail=tail)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="stress is a number of tokens"):
        interp.recitation(pair, plain, tail=2, stress=-1)
    with pytest.raises(InputError, match="stress is 90, but no text"):
        interp.recitation(pair, plain, tail=1, stress=90)
    with pytest.raises(InputError, match="clean or the corrupt"):
        interp.recitation(pair, interp.task("ioi").generate(pair, 2))  # type: ignore[arg-type]
    for given in (["text"], "text", [[3, 4]]):
        with pytest.raises(InputError, match="^recitation needs Prompts, such as a task generates, not a (list|str)$"):
            interp.recitation(pair, given, tail=2)  # type: ignore[arg-type]
    for who, came in (("base", "'base'"), (None, "a NoneType")):
        with pytest.raises(InputError, match=f"^recitation takes a model, .* or a ModelPair, but {came} came$"):
            interp.recitation(who, plain, tail=2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="target of prompt 1 is empty"):
        interp.recitation(pair, drawn(pair, [("The ring", " is"), ("The cup", "")]))
