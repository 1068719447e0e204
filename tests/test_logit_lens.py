"""The logit lens against plain Hugging Face norms and unembeddings, hand-built and planted answers, null cases, odd prompts."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_hooks import seen
from tiny_checkpoints import FOUR, tiny

from interp.analyses import logit_lens as home
from interp.analyses.logit_lens import LogitLensResult, logit_lens
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.organisms import hand_built, planted
from interp.prompts import PromptPairs, Prompts

# 5 prompts of 7, 2, 1, 4 and 5 tokens; 3 layers, 4 heads, width 24, 31 token ids
ROWS = ((3, 4, 5, 6, 7, 8, 9), (12, 13), (14,), (15, 16, 17, 18), (21, 22, 23, 24, 25))
ANSWERS, DISTRACTORS = (9, 8, 7, 6, 5), (1, 2, 3, 4, 10)
TEXTS = tuple(map(str, ROWS))


def prompts(answers: bool = True, distractors: bool = True, **more: Any) -> Prompts:
    return Prompts(TEXTS, ROWS, answers=ANSWERS if answers else None, distractors=DISTRACTORS if distractors else None, **more)


def shaken(model: Any, size: float = 0.05) -> Any:
    tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn(p.shape, generator=draws)
    return tuned


def by_hand(hf: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [layer vocab] that the model's own norm and unembedding make of the stream after each block."""
    norm = next(m for n, m in hf.base_model.named_children() if n in ("ln_f", "norm", "final_layer_norm"))
    n = hf.config.num_hidden_layers
    wanted = [("resid_pre", 0), *(("resid_post", i) for i in range(n))]
    got = seen(hf, ids, wanted)
    with torch.no_grad():
        return torch.stack([hf.get_output_embeddings()(norm(got[site][-1])).log_softmax(-1) for site in wanted]).double()


@pytest.mark.parametrize("kind", FOUR)
def test_every_number_is_that_of_the_plain_model(kind: str) -> None:
    base: Any = tiny(kind, seed=3)
    tuned = shaken(base)
    for hf in (base, tuned):
        hf.set_attn_implementation("eager")
    r = logit_lens(ModelPair.load(base, tuned), prompts(), top=3)
    assert r.logprob.shape == (2, 4, 5) and r.top.shape == (2, 4, 5, 3) and r.layers == ("embedding", "L0", "L1", "L2")
    for side, hf in enumerate((base, tuned)):
        for p, ids in enumerate(ROWS):
            hand = by_hand(hf, ids)
            torch.testing.assert_close(r.logprob[side, :, p].double(), hand[:, ANSWERS[p]], atol=1e-5, rtol=0)
            assert r.distractor_logprob is not None
            torch.testing.assert_close(r.distractor_logprob[side, :, p].double(), hand[:, DISTRACTORS[p]], atol=1e-5, rtol=0)
            assert r.rank[side, :, p].tolist() == (1 + (hand > hand[:, ANSWERS[p], None]).sum(-1)).tolist()
            kl = (hand[-1].exp() * (hand[-1] - hand)).sum(-1)
            torch.testing.assert_close(r.kl[side, :, p].double(), kl, atol=1e-5, rtol=1e-4)
            assert r.top[side, :, p].tolist() == hand.topk(3).indices.tolist()
            torch.testing.assert_close(r.top_prob[side, :, p].double(), hand.topk(3).values.exp(), atol=1e-6, rtol=1e-4)
            on_top = (hand.argmax(-1) == ANSWERS[p]).tolist()
            first = next((i for i in range(4) if all(on_top[i:])), math.nan)
            assert float(r.decided[side, p]) == first or (math.isnan(first) and bool(r.decided[side, p].isnan()))
    assert (r.kl[:, -1] == 0).all()


@pytest.mark.parametrize("kind", FOUR)
def test_the_last_row_is_the_models_own_to_the_last_bit(kind: str) -> None:
    model = HookedModel.load(tiny(kind, seed=3))
    for asked in (prompts(), prompts()[2:3]):
        r = logit_lens(model, asked)
        logp = model.logits(asked, at="END").log_softmax(-1)
        assert torch.equal(r.logprob[0, -1], logp.gather(1, torch.tensor(asked.answers)[:, None])[:, 0])


def test_an_answer_that_is_lost_on_the_way_is_decided_late() -> None:
    """Only the layers from which on it stays on top count."""
    logits = torch.zeros(5, 4, 6)  # [prompt layer vocab]
    tops = torch.tensor([[2, 2, 2, 2], [2, 0, 2, 2], [0, 0, 0, 2], [2, 2, 2, 0], [1, 1, 1, 1]])
    logits.scatter_(2, tops[..., None], 3.0)
    stays = [(tops[p] == 2).tolist() for p in range(5)]
    wanted = [0, 2, 3, math.nan, math.nan]
    read = [
        home._read(logits[:, i], logits[:, i].log_softmax(-1), logits[:, 3].log_softmax(-1), torch.full((5,), 2), None, 2) for i in range(4)
    ]
    assert torch.stack([x["on_top"] for x in read], 1).tolist() == stays
    got = home.decision(torch.stack([x["on_top"] for x in read], 1))
    assert [None if math.isnan(x) else x for x in got.tolist()] == [None if math.isnan(x) else x for x in wanted]
    assert read[0]["rank"].tolist() == [1, 1, 2, 1, 2]


# ------------------------------------------------------------------------------------------------ known answers


def test_the_hand_built_model_knows_after_its_mover() -> None:
    made = hand_built("ioi")
    asked = made.task.generate(made.model, 12).clean
    r = logit_lens(made.model, asked)
    # 4 blocks, the mover in the last; only the name that a bystander of the first block always writes a little is on top at once.
    first = made.model.token(made.blueprint.answers["prior"][0])
    assert r.decided[0].tolist() == [1.0 if answer == first else 4.0 for answer in asked.answers or ()]
    assert 0 < sum(answer == first for answer in asked.answers or ()) < 6
    assert r.decision()[0] == "L3" and "decided after L3" in r.summary() and "12 of 12" in r.summary()
    assert r.strongest().site[0] == "block 3"


def test_a_planted_logit_raises_its_token_at_every_layer() -> None:
    plain = tiny("llama", seed=5)
    base, tuned = HookedModel.load(plain), HookedModel.load(plain)
    with tuned.edited(planted("token_logit", tuned, token=9, c=2.0)):
        r = logit_lens(ModelPair.load(base, tuned), prompts())
    p = r.logprob[0].double().exp()
    change = (r.logprob[1] - r.logprob[0]).double()
    risen = torch.log(1 + p[:, 0] * (math.exp(2) - 1))  # log Z of the first prompt, whose answer is token 9
    torch.testing.assert_close(change[:, 0], 2 - risen, atol=1e-5, rtol=0)
    assert (change[:, 1:] < 0).all() and not r.alike and "in tuned" in r.summary()


def test_dead_blocks_leave_the_prediction_as_it_is() -> None:
    hf: Any = tiny("llama", seed=3)
    with torch.no_grad():
        for block in hf.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    r = logit_lens(HookedModel.load(hf), prompts(answers=False, distractors=False))
    assert torch.equal(r.logprob[0, 1], r.logprob[0, 3]) and r.kl[0, 1:].abs().max() == 0
    assert bool((r.decided <= 1).all())  # the stand-in is on top at the end, so after the first block at the latest
    assert r.stand_in and "most likely token of model" in r.summary()


# ------------------------------------------------------------------------------------------------ null, batches, odd prompts


@pytest.mark.parametrize(
    "kind", ["gpt2", pytest.param("llama", marks=pytest.mark.full), pytest.param("qwen2", marks=pytest.mark.full), "neox"]
)
def test_base_against_base_is_zero(kind: str) -> None:
    hf = tiny(kind, seed=1)
    r = logit_lens(ModelPair.load(hf, copy.deepcopy(hf)), prompts())
    assert (r.logprob[1] - r.logprob[0]).abs().max() == 0 and (r.kl[1] - r.kl[0]).abs().max() == 0
    assert r.alike and "no difference beyond rounding" in r.summary() and 0 < r.floor.max() < 1e-4
    answer = r.answer("tuned - base")
    assert answer.value.abs().max() == answer.low.abs().max() == answer.high.abs().max() == 0


def test_stand_in_answers_are_those_of_base() -> None:
    hf = tiny("gpt2", seed=3)
    base, tuned = HookedModel.load(hf), HookedModel.load(shaken(hf, 0.2))
    r = logit_lens(ModelPair.load(base, tuned), prompts(answers=False, distractors=False))
    assert r.answers.tolist() == base.logits(prompts(), at="END").argmax(-1).tolist()
    assert (r.rank[0, -1] == 1).all() and not bool(r.decided[0].isnan().any()) and "most likely token of base" in r.summary()
    assert r.distractor_logprob is None


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedModel.load(tiny("llama", seed=3))
    r = logit_lens(model, prompts())
    monkeypatch.setattr(home, "_CELLS", 1)
    again = logit_lens(model, prompts())
    torch.testing.assert_close(again.logprob, r.logprob, atol=1e-5, rtol=0)
    assert torch.equal(again.top, r.top) and torch.equal(again.rank, r.rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_half_precision_has_a_floor_of_its_own(dtype: torch.dtype) -> None:
    model = HookedModel.load(tiny("llama", seed=3).to(dtype))
    r, exact = (logit_lens(m, prompts()) for m in (model, model.in_dtype(torch.float32)))
    assert (r.logprob - exact.logprob).abs().amax(2).le(r.floor + exact.floor).all()
    assert r.floor.max() > 50 * exact.floor.max() and not r.half


def test_a_pair_whose_tuned_model_has_more_tokens() -> None:
    base, larger = tiny("llama", seed=3), tiny("llama", seed=9, vocab_size=34)
    tuned = shaken(base)
    with torch.no_grad():
        for (name, to), source in zip(larger.named_parameters(), tuned.parameters(), strict=True):
            (to[:31] if "embed" in name or "lm_head" in name else to).copy_(source)
    one, more = (logit_lens(ModelPair.load(base, t), prompts()) for t in (tuned, larger))
    torch.testing.assert_close(one.logprob, more.logprob, atol=1e-5, rtol=0)
    assert int(more.top.max()) < 31
    with pytest.raises(InputError, match="answer of prompt 1 is token 33"):
        logit_lens(ModelPair.load(base, larger), Prompts(TEXTS, ROWS, answers=(1, 33, 2, 3, 4)))


def test_another_position_pairs_and_contexts() -> None:
    model = HookedModel.load(tiny("gpt2", seed=3))
    first = prompts(positions={"first": ((0,),) * 5}, contexts=("a", "a", "b", "c", "c"))
    r = logit_lens(model, first, at="first")
    starts = Prompts(TEXTS, tuple(row[:1] for row in ROWS), answers=ANSWERS, distractors=DISTRACTORS)
    torch.testing.assert_close(r.logprob, logit_lens(model, starts).logprob, atol=1e-5, rtol=0)
    assert r.n == "3 contexts of 5 prompts" and r.near.tolist() == [[row[0]] for row in ROWS]
    torch.testing.assert_close(r.answer().value, torch.stack([r.logprob[0, :, i].double().mean(1) for i in ([0, 1], [2], [3, 4])]).mean(0))
    pairs = PromptPairs(prompts(), starts)
    assert torch.equal(logit_lens(model, pairs).logprob, logit_lens(model, prompts()).logprob)


def test_one_prompt_has_no_interval_and_still_speaks() -> None:
    hf = tiny("llama", seed=3)
    r = logit_lens(ModelPair.load(hf, shaken(hf)), prompts()[2:3])
    assert "n = 1 prompt" in r.summary() and len(r.figures()) == 5 and r.to_frame().low.isna().all()


def test_one_prompt_of_a_pair_claims_nothing_about_noise() -> None:
    hf: Any = tiny("llama", seed=3)
    pair = ModelPair.load(hf, shaken(hf, 0.3))
    one = logit_lens(pair, Prompts(TEXTS[:1], ROWS[:1], answers=ANSWERS[:1])).summary()
    same = logit_lens(pair, Prompts(TEXTS[:2], ROWS[:2], answers=ANSWERS[:2], contexts=("a", "a"))).summary()
    assert "n = 1 prompt, so no interval" in one and "n = 1 context of 2 prompts, so no interval" in same
    for told in (one, same):
        assert "nan" not in told and "[" not in told and "noise" not in told and "p = " not in told and "interval " not in told


def test_earlier_is_fewer_blocks(result: LogitLensResult) -> None:
    base, tuned = torch.tensor([3.0, 2, 3, 1, 2]), torch.tensor([2.0, 2, 1, 1, 1])
    earlier = replace(result, decided=torch.stack([base, tuned]).double())
    found = earlier.moved()[0]
    assert f"tuned takes 0.8 [{-float(found.high):.3g}, {-float(found.low):.3g}] blocks fewer on the 5 prompts" in earlier.summary()
    assert (
        "tuned takes 0.8 [" in (later := replace(result, decided=torch.stack([tuned, base]).double()).summary()) and "blocks more" in later
    )
    alone = torch.full((2, 5), torch.nan).double()
    alone[0, 1], alone[1, 1] = 3, 1
    assert "tuned takes 2 blocks fewer on the 1 prompt that both decide" in replace(result, decided=alone).summary()


def test_nothing_decided_says_never() -> None:
    hf = tiny("llama", seed=3)
    model = HookedModel.load(hf)
    worst = model.logits(prompts(), at="END").argmin(-1).tolist()
    r = logit_lens(ModelPair.load(hf, shaken(hf, 0.01)), Prompts(TEXTS, ROWS, answers=tuple(worst)))
    assert r.decision("base")[0] == "never" and bool(r.decided.isnan().all())
    assert "not decided on half of the prompts" in r.summary() and "no prompt is decided in both" in r.summary()
    assert math.isnan(float(r.moved()[0].value)) and r.moved()[1] == 0


# ------------------------------------------------------------------------------------------------ frames, figures, pages


@pytest.fixture(scope="module")
def result() -> LogitLensResult:
    hf = tiny("llama", seed=3)
    return logit_lens(ModelPair.load(hf, shaken(hf, 0.2)), prompts())


def test_frames_and_figures(result: LogitLensResult) -> None:
    frame = result.to_frame()
    assert len(frame) == 8 and len(result.to_frame(per="prompt")) == 40
    row = frame[(frame.side == "tuned") & (frame.layer == "L1")].iloc[0]
    assert row.logprob == pytest.approx(float(result.logprob[1, 2].double().mean()))
    assert row["rank"] == pytest.approx(float(result.rank[1, 2].double().log().mean().exp()))
    assert row.low <= row.logprob <= row.high
    change = result.figures()["Change of the answer"].data[-1]
    assert list(change.y) == pytest.approx((result.logprob[1] - result.logprob[0]).double().mean(1).tolist())
    best = result.strongest()
    assert set(best.columns) == {"site", "side", "effect", "effect_se", "low", "high", "p", "p_adjusted"} and len(best) == 4
    assert list(best.effect.abs()) == sorted(best.effect.abs(), reverse=True)


def test_the_page_shows_both_models_and_escapes(result: LogitLensResult) -> None:
    page = result.html()
    assert page.count("<table>") == 4 and "most likely in base" in page and "rank in tuned" in page
    assert page.count("after L2") == 4 and page.count("embedding") == 4
    from dataclasses import replace

    nasty = replace(result, vocabulary=dict.fromkeys(result.vocabulary, "<b>$x$&\n</b>"))
    assert "<b>" not in nasty.html() and "&lt;b&gt;" in nasty.html()


def test_refusals() -> None:
    model = HookedModel.load(tiny("llama"))
    for top in (0, 51, True, 2.5):
        with pytest.raises(InputError, match="top is a number of tokens"):
            logit_lens(model, prompts(), top=top)  # type: ignore[arg-type]
    assert logit_lens(model, prompts(), top=50).top.shape[-1] == 31  # no more than there are
    with pytest.raises(InputError, match="no position 'S9'"):
        logit_lens(model, prompts(), at="S9")
    with pytest.raises(InputError, match="one model decides neither"):
        logit_lens(model, prompts()).moved()
    with pytest.raises(InputError, match="no model named 'base'"):
        logit_lens(model, prompts()).answer("base")
