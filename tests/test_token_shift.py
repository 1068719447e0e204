"""Which tokens tuned prefers, against loops over plain Hugging Face forwards, planted preferences and the same model twice."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from toy_results import NASTY

import interp
from interp.analyses import token_shift as home
from interp.analyses.token_shift import DIRECTIONS, ORDERINGS, TokenShiftResult, token_shift
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.organisms import planted
from interp.prompts import PromptPairs, Prompts
from interp.stats import permutation
from interp.sweeps import predictions, shifts
from interp.sweeps.shifts import MEASURES
from interp.sweeps.topics import topics
from interp.sweeps.windows import shuffled_extremes, windows_of

# 5 prompts, up to 9 tokens, 22 in all; 31 token ids, 3 layers, 4 heads
ROWS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18, 19, 20], [21, 22, 23, 24]]


def prompts(rows: list[list[int]] = ROWS, **more: Any) -> Prompts:
    return Prompts(tuple(str(r) for r in rows), tuple(tuple(r) for r in rows), **more)


def shaken(model: Any, seed: int = 0, size: float = 0.05) -> Any:
    tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn(p.shape, generator=draws)
    return tuned


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    plain = tiny("llama", seed=3)
    return ModelPair.load(plain, shaken(plain))


@pytest.fixture(scope="module")
def result(pair: ModelPair) -> TokenShiftResult:
    return token_shift(pair, prompts(), top=4, window=3, step=2)


def slow(base: Any, tuned: Any, rows: list[list[int]], top: int) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """One text at a time in float64: every measure by text and token, and the log-likelihood ratios."""
    found = {m: torch.zeros(len(rows), 31, dtype=torch.float64) for m in MEASURES}
    llr = []
    for i, ids in enumerate(rows):
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0, :, :31].double().log_softmax(-1) for m in (base, tuned))
        llr.append([float(q[t, ids[t + 1]] - p[t, ids[t + 1]]) for t in range(len(ids) - 1)])
        for t in range(len(ids)):
            d = q[t] - p[t]
            ranked = sorted(range(31), key=lambda v: -float(d[v]))
            for v in range(31):
                found["up"][i, v] += d[v] > 0 and v in ranked[:top]
                found["down"][i, v] += d[v] < 0 and v in ranked[-top:]
                found["more"][i, v] += d[v] > 0
                found["less"][i, v] += d[v] < 0
                found["gain"][i, v] += q[t, v].exp() * d[v]
                found["loss"][i, v] -= p[t, v].exp() * d[v]
                found["change"][i, v] += d[v]
    return found, llr


@pytest.mark.parametrize("kind", FOUR)
def test_agrees_with_plain_forwards(kind: str) -> None:
    base = tiny(kind, seed=1)
    tuned = shaken(base)
    got = token_shift(ModelPair.load(base, tuned), prompts(), top=4)
    want, llr = slow(base, tuned, ROWS, 4)
    assert got.positions.tolist() == [9, 2, 1, 6, 4] and len(got.tokens) > 20
    for m, name in enumerate(MEASURES):
        torch.testing.assert_close(got.sums[m].double(), want[name][:, got.tokens], atol=2e-4, rtol=1e-3)
    for i, row in enumerate(llr):
        torch.testing.assert_close(got.llr[i, : len(row)].double(), torch.tensor(row, dtype=torch.float64), atol=1e-4, rtol=0)
        assert got.llr[i, len(row) :].isnan().all()
    kl = want["gain"].sum() / 22  # over all tokens: KL(tuned || base)
    assert float(kl) > 0.01
    if len(got.tokens) == 31:
        assert float(got.mean("gain").sum()) == pytest.approx(float(kl), rel=1e-3)
    order = sorted(range(31), key=lambda v: (-float(want["up"][:, v].sum()), -float(want["change"][:, v].sum())))
    assert [int(got.tokens[i]) for i in got.first("tuned", "count", 5)] == order[:5]


@pytest.mark.parametrize(("kind", "c"), [*((kind, 3.0) for kind in FOUR), ("gpt2", -3.0)])
def test_a_planted_preference_comes_first_by_every_ordering(kind: str, c: float) -> None:
    """The logit of token 9 changes by c everywhere: its increase is c - log Z, that of all others -log Z."""
    plain = tiny(kind, seed=5)
    pair = ModelPair(HookedModel.load(plain), HookedModel.load(copy.deepcopy(plain)))
    with pair.tuned.edited(planted("token_logit", pair.tuned, token=9, c=c)):
        got = token_shift(pair, prompts([[i, i + 1, i + 2] for i in range(10, 18)]), top=5)
    prefers, names = ("tuned", ("up", "more", "gain")) if c > 0 else ("base", ("down", "less", "loss"))
    for by, name in zip(ORDERINGS, names, strict=True):
        first = got.first(prefers, by)
        assert [int(got.tokens[i]) for i in first] == [9]  # and no other token
        if by != "shift":
            assert float(got.mean(name)[first[0]]) == 1
    i = got.first(prefers)[0]
    assert float(got.p[i]) == 2 / 256 == float(got.p_adjusted[i])  # the pattern found and its opposite, of 8 texts
    assert f"{prefers} prefers '<9>' most" in got.summary()
    if c > 0:
        assert got.topic_mass.tolist() == [1.0] and got.topic_tokens.tolist() == [9]


def test_the_edit_is_what_was_planted() -> None:
    plain = tiny("llama", seed=5)
    pair = ModelPair(HookedModel.load(plain), HookedModel.load(copy.deepcopy(plain)))
    with pair.tuned.edited(planted("token_logit", pair.tuned, token=9, c=2.0)):
        got = token_shift(pair, prompts())
        wanted = pair.tuned.logits(prompts())
    with pair.base.edited(got.edit()):
        torch.testing.assert_close(pair.base.logits(prompts()), wanted, atol=1e-4, rtol=0)
    delta = got.edit().weights[0].delta
    assert float(delta[9]) == pytest.approx(2.0, abs=1e-4) and int((delta != 0).sum()) == 1


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.full) for kind in FOUR if kind != "llama")])
def test_a_model_against_itself_prefers_nothing(kind: str) -> None:
    plain = tiny(kind, seed=3)
    same = token_shift(ModelPair.load(plain, copy.deepcopy(plain)), prompts())
    assert same.nothing and same.largest == 0 and len(same.tokens) == 0 and "no difference beyond rounding" in same.summary()
    assert len(same.topic_mass) == 0 and same.llr.nan_to_num(0.0).abs().max() == 0
    assert all(f.to_json() for f in same.figures().values()) and "No difference beyond rounding" in same.html()
    with pytest.raises(InputError, match="prefers no token"):
        same.edit()


def test_rounding_is_no_preference(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are all moved by one number, another one at every position: the models say the same."""
    plain = tiny("gpt2", seed=3)
    other = ModelPair.load(plain, copy.deepcopy(plain))
    run = HookedModel.run_on
    monkeypatch.setattr(HookedModel, "run_on", lambda self, *a, **k: run(self, *a, **k) + 0.37 * (self is other.tuned))
    moved = token_shift(other, prompts())
    assert 0 < moved.largest <= moved.numerical_floor and moved.nothing and len(moved.tokens) == 0


def test_small_pieces_change_nothing(pair: ModelPair, result: TokenShiftResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "CELLS", 70)  # 2 tokens at a time
    monkeypatch.setattr(predictions, "TOKENS", 7)
    sizes = []
    whole = shifts._measured
    monkeypatch.setattr(shifts, "_measured", lambda b, *rest: sizes.append(len(b)) or whole(b, *rest))
    again = token_shift(pair, prompts(), top=4, window=3, step=2)
    assert max(sizes) == 2 and sum(sizes) == 22
    assert torch.equal(again.tokens, result.tokens) and again.first() == result.first()
    torch.testing.assert_close(again.sums, result.sums, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.llr, result.llr, equal_nan=True, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.topic_mass, result.topic_mass, atol=1e-3, rtol=0)


def test_positions_of_topics_are_every_so_many(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, block = pair.batch(prompts()), torch.arange(5)
    whole = shifts.shifts(pair, batch, block, 4, 0.0)
    assert whole.sample.shape == (22, 2) and (whole.sampled.diff(dim=1) <= 0).all()
    monkeypatch.setattr(shifts, "SAMPLED", 8)
    monkeypatch.setattr(predictions, "CELLS", 70)
    some = shifts.shifts(pair, batch, block, 4, 0.0)
    assert torch.equal(some.sample, whole.sample[::3]) and torch.equal(some.sampled_ids, whole.sampled_ids[::3])


def test_more_texts_than_groups(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of one context are one unit; beyond so many units they share groups, and sums over groups are the same."""
    rows = [[3 + i, 4 + i, 5 + i] for i in range(8)]
    contexts = ("a", "a", "b", "c", "d", "e", "f", "g")
    each = token_shift(pair, prompts(rows, contexts=contexts), top=4)
    assert len(each.positions) == 7 == each.texts and each.positions[0] == 6
    monkeypatch.setattr(home, "BLOCKS", 3)
    few = token_shift(pair, prompts(rows, contexts=contexts), top=4)
    assert len(few.positions) == 3 and few.texts == 7 and "3 groups of 7 texts" in few.summary()
    torch.testing.assert_close(few.sums.sum(1), each.sums.sum(1), atol=1e-4, rtol=1e-4)


def test_standard_errors_and_halves(result: TokenShiftResult, pair: ModelPair) -> None:
    i = result.first()[0]
    each, n = result.sums[0, :, i].double(), result.positions
    off = each - each.sum() / n.sum() * n
    assert float(result.error("up")[i]) == pytest.approx(float((off.square().sum() * 5 / 4).sqrt() / 22))
    test = permutation((result.sums[0] - result.sums[1]).double())  # as often among the increases as among the decreases
    assert torch.equal(test.p, result.p) and (result.p_adjusted >= result.p).all() and len(result.p.unique()) > 1
    assert result.agreement.shape == (2, 3) and (result.agreement >= 0).all() and (result.agreement <= 1).all()
    alike = token_shift(pair, prompts([ROWS[0]] * 2, contexts=("a", "b")), top=4)  # both halves are the same text
    assert (alike.agreement == 1).all()
    alone = token_shift(pair, prompts(ROWS[:1]), top=4)
    assert alone.agreement.isnan().all() and alone.error("up").isnan().all() and alone.summary() and alone.figures()


def test_more_token_ids_in_the_tuned_model(pair: ModelPair) -> None:
    base = tiny("llama", seed=3)
    tuned, larger = shaken(base), tiny("llama", seed=9, vocab_size=34)
    with torch.no_grad():
        for (name, to), source in zip(larger.named_parameters(), tuned.parameters(), strict=True):
            to[:31] = source if "embed" in name or "lm_head" in name else to[:31]
            if "embed" not in name and "lm_head" not in name:
                to.copy_(source)
    narrow, wide = (token_shift(ModelPair.load(base, t), prompts(), top=4) for t in (tuned, larger))
    assert (narrow.shared, wide.shared, wide.sizes) == (31, 31, (31, 34)) and torch.equal(narrow.tokens, wide.tokens)
    torch.testing.assert_close(wide.sums, narrow.sums, atol=1e-3, rtol=1e-3)
    assert wide.edit(side="tuned").weights[0].delta.shape == (34,)


def test_half_precision() -> None:
    base = tiny("llama", seed=3).bfloat16()
    half = token_shift(ModelPair.load(base, shaken(base, size=0.3)), prompts(), top=4)
    assert half.numerical_floor > 0.01 and not half.half and not half.nothing
    assert half.counted < 0.5 * half.numerical_floor and "counted is what is above the typical" in half.summary()


def test_one_coarse_cell_does_not_blind_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision one log-probability may round badly; shifts below that are counted all the same, as they are in float32."""
    plain = tiny("llama", seed=3)
    base, tuned = copy.deepcopy(plain).bfloat16(), shaken(plain, size=0.1).bfloat16()
    fine = token_shift(ModelPair.load(copy.deepcopy(base).float(), copy.deepcopy(tuned).float()), prompts(), top=4)
    sizes = home.rounding_sizes

    def one_bad_cell(*given: Any) -> Any:
        return replace(sizes(*given), largest=0.4 * fine.largest)

    monkeypatch.setattr(home, "rounding_sizes", one_bad_cell)
    half = token_shift(ModelPair.load(base, tuned), prompts(), top=4)
    more, less = (r.sums[[MEASURES.index("more"), MEASURES.index("less")]].sum() / r.positions.sum() for r in (fine, half))
    assert (
        half.numerical_floor == pytest.approx(0.8 * fine.largest)
        and fine.counted == fine.numerical_floor
        and float(less) > 0.5 * float(more)
    )


def test_half_precision_against_itself_is_nothing() -> None:
    base = tiny("llama", seed=3).bfloat16()
    same = token_shift(ModelPair.load(base, copy.deepcopy(base)), prompts(), top=4)
    assert same.largest == 0 and same.nothing and len(same.tokens) == 0 and same.summary().startswith("0 tokens")


def test_rounding_sizes_by_hand(pair: ModelPair) -> None:
    """Weights in bfloat16 against the same weights in float32, one prompt at a time."""
    half = HookedModel.load(copy.deepcopy(tiny("llama", seed=3)).bfloat16())
    found = predictions.rounding_sizes(half, half.batch(prompts()), 31)
    logits = [
        [m(torch.tensor([row])).logits[0].float().log_softmax(-1) for row in ROWS]
        for m in (half.wrapped.source, copy.deepcopy(half.wrapped.source).float())
    ]
    off = torch.cat([a - b for a, b in zip(*logits, strict=True)]).detach().double()
    assert found.largest >= float(off.abs().max()) * 0.99 and not found.lacking
    assert found.typical == pytest.approx(float(off.square().mean().sqrt()), rel=0.1) and found.typical < 0.5 * found.largest


def test_one_text_is_no_test(pair: ModelPair) -> None:
    told = token_shift(pair, prompts(ROWS[:1]), top=4).summary()
    assert "1 text, so no test" in told and "1 texts" not in told and "nan" not in told and "noise" not in told and "p = " not in told


def test_windows_by_hand() -> None:
    nan = math.nan
    llr = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, nan, nan], [3.0, nan, nan, nan, nan, nan, nan], [nan] * 7])
    got = [(w.prompt, w.start, w.stop, w.llr) for w in windows_of(llr, 2, 2)]
    assert got == [(0, 1, 3, 3.0), (0, 3, 5, 12.0), (0, 4, 6, 24.0), (1, 1, 2, 3.0)]  # the last ends with its text, a short text is one
    assert [(w.start, w.stop) for w in windows_of(llr, 9, 5)] == [(1, 6), (1, 2)]
    ends = shuffled_extremes(llr, 2, 2, 0)
    assert ends.shape == (20, 2) and float(ends[:, 0].max()) <= 24 and float(ends[:, 1].min()) >= 3
    assert shuffled_extremes(llr[2:], 2, 2, 0).shape == (0, 2)
    whole = shuffled_extremes(llr[:1], 5, 1, 0)
    assert torch.equal(whole, torch.full((20, 2), 31.0, dtype=torch.float64))  # nothing from outside a text comes in


def test_topics_of_planted_blocks() -> None:
    """Two sets of tokens that rise at different positions, once as strongly."""
    draws = torch.Generator().manual_seed(0)
    left = torch.zeros(60, 2)
    left[:30, 0], left[30:, 1] = 2 * (1 + torch.rand(30, generator=draws)), 1 + torch.rand(30, generator=draws)
    right = torch.tensor([[0.5, 0.3, 0.2, 0, 0, 0], [0, 0, 0, 0.1, 0.2, 0.7]])
    found = topics(left @ right, 2, 0)
    torch.testing.assert_close(found.weight, right.double(), atol=1e-3, rtol=0)
    share = float(left[:, 0].sum() / left.sum())
    assert found.mass.tolist() == pytest.approx([share, 1 - share], abs=1e-3)
    assert found.stability.min() > 0.99 and found.error < 1e-3 < 0.1 < found.shuffled
    assert len(topics(torch.zeros(4, 3), 2, 0).mass) == 0 and len(topics(left @ right, 0, 0).mass) == 0
    assert topics(torch.ones(1, 3), 3, 0).mass.shape == (1,)


def test_tables_figures_and_page(result: TokenShiftResult) -> None:
    frame = result.to_frame()
    assert len(frame) == len(result.tokens) and frame.up.is_monotonic_decreasing
    each = result.to_frame(per="prompt")
    assert len(each) == 17 and each.llr.sum() == pytest.approx(float(result.llr.nansum()), rel=1e-4)
    assert each.token[0] == "<4>" and each.pos[0] == 1
    table = result.strongest(3)
    assert len(table) == 6 and set(table["preferred by"]) == set(DIRECTIONS)
    assert list(result.figures()) == ["What tuned prefers", "What base prefers", "Expected shift", "Windows of text", "Topics"]
    odd = dict(zip(result.vocabulary, NASTY * 2, strict=False))
    page = replace(result, vocabulary=result.vocabulary | odd)
    assert "<script" not in page.html() and "<img" not in page.html() and page.summary() and page.figures()


def test_one_token_each(pair: ModelPair) -> None:
    got = token_shift(pair, prompts([[5], [6]]), top=4)
    assert not got.windows and got.shuffled.shape == (0, 2) and "window" not in got.summary() and got.html() and got.figures()


def test_refusals(pair: ModelPair) -> None:
    for name, value in (("top", 0), ("topics", -1), ("window", 0), ("step", 2.5)):
        with pytest.raises(InputError, match=f"{name} is a whole number from"):
            token_shift(pair, prompts(), **{name: value})
    with pytest.raises(InputError, match="one text at a time"):
        token_shift(pair, PromptPairs(prompts(), prompts()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="outside the vocabulary"):
        token_shift(pair, prompts([[40, 41]]))
    apart = ModelPair(pair.base, pair.tuned)
    apart.one_at_a_time = True
    with pytest.raises(InputError, match="one at a time"):
        token_shift(apart, prompts())


def test_a_token_that_falls_more_often_than_it_rises_is_not_preferred() -> None:
    """With all increases and decreases swapped, what tuned prefers is what base preferred; the test has no direction of its own."""
    pair = ModelPair.load("base", "boxes-tuned")
    text = interp.task("plain_text").generate(pair, 12)
    there, back = (interp.token_shift(p, text, topics=1) for p in (pair, ModelPair.load("boxes-tuned", "base")))
    for result in (there, back):
        for prefers, other in (("tuned", "base"), ("base", "tuned")):
            found, sure = result.preferred(prefers), [i for i in result.first(prefers) if result.p_adjusted[i] < 0.05]
            assert found and not set(found) & set(result.preferred(other)), "no token is preferred by both"
            assert set(found) <= set(sure)
    names = [{r.vocabulary[int(r.tokens[i])] for i in r.preferred(p)} for r, p in ((there, "tuned"), (back, "base"))]
    assert names[0] == names[1]
    i, sums = there.preferred()[0], there.sums.clone()
    down = MEASURES.index(home._COLUMNS["base"]["count"])
    sums[down, :, i] = sums[MEASURES.index(home._COLUMNS["tuned"]["count"]), :, i] + 1
    assert i in replace(there, sums=sums).first("tuned") and i not in replace(there, sums=sums).preferred("tuned")
