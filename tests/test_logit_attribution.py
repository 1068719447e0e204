"""Direct logit attribution: parts against formulas on plain Hugging Face models, sums, planted and hand-built models, null cases."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from plain_hooks import seen
from tiny_checkpoints import FOUR, tiny
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from interp.analyses.logit_attribution import LogitAttributionResult, logit_attribution
from interp.edits import ActivationChange, Edit
from interp.errors import InputError
from interp.models import Batch, HookedModel, ModelPair
from interp.models.attribution import FinalNorm, logit_parts
from interp.models.attribution import logit_attribution as along
from interp.organisms import hand_built, planted
from interp.prompts import PromptPairs, Prompts
from interp.sites import Site

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


def part(r: LogitAttributionResult, name: str, side: int = 0) -> torch.Tensor:
    return r.added[side, r.parts.index(name)]


# ------------------------------------------------------------------------------------------------ by hand


def by_hand(hf: Any, ids: tuple[int, ...], u: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every part adds along a direction behind the final norm, by the formulas of LayerNorm and RMSNorm, in float64."""
    base = hf.base_model
    norm = next(m for n, m in base.named_children() if n in ("ln_f", "norm", "final_layer_norm"))
    centred = isinstance(norm, nn.LayerNorm)
    layers, heads = hf.config.num_hidden_layers, hf.config.num_attention_heads
    blocks = base.h if hasattr(base, "h") else base.layers
    wanted = [("resid_pre", 0), ("resid_post", layers - 1)] + [(c, i) for c in ("z", "mlp_out") for i in range(layers)]
    got = {k: v[-1].double() for k, v in seen(hf, ids, wanted).items()}
    x = got["resid_post", layers - 1]
    centre = (lambda v: v - v.mean()) if centred else (lambda v: v)
    eps = norm.eps if centred else norm.variance_epsilon
    scale = (centre(x).square().mean() + eps).sqrt()

    def logit(v: torch.Tensor) -> torch.Tensor:
        return (centre(v) * norm.weight.double() / scale) @ u

    token = hf.get_input_embeddings().weight[ids[-1]].double()
    found = {"embed": logit(token), "W_pos": logit(got["resid_pre", 0] - token)}
    for i, block in enumerate(blocks):
        attention = next(m for n, m in block.named_children() if n in ("attn", "self_attn", "attention"))
        out = next(m for n, m in attention.named_children() if n in ("c_proj", "o_proj", "dense"))
        down = next(m for n, m in block.mlp.named_children() if n in ("c_proj", "down_proj", "dense_4h_to_h"))
        z = got["z", i]
        weight = (out.weight if type(out).__name__ == "Conv1D" else out.weight.T).double().unflatten(0, (heads, -1))
        for head in range(heads):
            found[f"L{i}H{head}"] = logit(z[head] @ weight[head])
        bias = down.bias.double() if down.bias is not None else torch.zeros(24).double()
        found[f"L{i}.b_O"] = logit(out.bias.double()) if out.bias is not None else torch.zeros(()).double()
        found[f"L{i}.mlp_out"], found[f"L{i}.b_out"] = logit(got["mlp_out", i] - bias), logit(bias)
    found["b_ln_final"] = norm.bias.double() @ u if centred else torch.zeros(()).double()
    return found


@cache
def loaded(kind: str) -> tuple[Any, HookedModel]:
    """A plain model on eager attention, and the same as ours."""
    hf: Any = tiny(kind, seed=3)
    hf.set_attn_implementation("eager")
    return hf, HookedModel.load(hf)


@pytest.mark.parametrize("metric", ["logit_diff", "answer_logit"])
@pytest.mark.parametrize("kind", FOUR)
def test_every_part_is_that_of_the_formula(kind: str, metric: Any) -> None:
    hf, model = loaded(kind)
    r = logit_attribution(model, prompts(), metric=metric)
    columns = hf.get_output_embeddings().weight.detach().double()
    for p, ids in enumerate(ROWS):
        with torch.no_grad():
            logits = hf(torch.tensor([ids])).logits[0, -1].double()
            wrong = columns[DISTRACTORS[p]] if metric == "logit_diff" else columns.mean(0)
            hand = by_hand(hf, ids, columns[ANSWERS[p]] - wrong)
        whole = logits[ANSWERS[p]] - (logits[DISTRACTORS[p]] if metric == "logit_diff" else logits.mean())
        assert float(r.whole[0, p]) == pytest.approx(float(whole), abs=1e-5)
        for name in r.parts:
            assert float(part(r, name)[p]) == pytest.approx(float(hand[name]), rel=1e-4, abs=1e-5), (name, p)
        left_out = set(hand) - set(r.parts)
        assert all(hand[name] == 0 for name in left_out)
    assert r.closure < 1e-5 and r.metric == metric and r.sides == ("model",) and r.added.shape[2] == 5
    assert (kind in ("gpt2", "neox")) == ("b_ln_final" in r.parts) == ("L2.b_out" in r.parts) and ("W_pos" in r.parts) == (kind == "gpt2")


@pytest.mark.parametrize("kind", FOUR)
def test_in_float64_the_parts_add_up_to_1e_12(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:  # Hugging Face goes through float32 here
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", forward)
    model = HookedModel.load(tiny(kind, seed=4).double())
    for against in (torch.tensor(DISTRACTORS), None):
        parts = logit_parts(model, Batch.of(ROWS), torch.tensor(ANSWERS), against)
        assert float((parts.rest.abs() / parts.size).max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_half_precision_has_a_floor_of_its_own(dtype: torch.dtype) -> None:
    model = HookedModel.load(tiny("llama", seed=3).to(dtype))
    r, exact = (logit_attribution(m, prompts()) for m in (model, model.in_dtype(torch.float32)))
    assert r.closure < 32 * torch.finfo(dtype).eps and not r.half
    assert (r.added - exact.added).abs().max() <= r.floor[0] + exact.floor[0]
    assert r.floor[0] > 50 * exact.floor[0] > 0


def test_before_the_norm_is_the_transpose_of_it() -> None:
    for kind in ("gpt2", "llama"):
        model = HookedModel.load(tiny(kind, seed=2))
        x, u = (torch.randn(6, 24, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        norm = FinalNorm.of(model)
        torch.testing.assert_close((norm.linear(x) * u).sum(-1), (x * norm.before(u)).sum(-1), atol=1e-4, rtol=1e-4)
        stream = torch.randn(6, 24, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(along(model, stream, x[:, None], u)[:, 0], (x * norm.before(u)).sum(-1) * norm.per_scale(stream))


# ------------------------------------------------------------------------------------------------ known answers


def test_the_mover_writes_the_answer_of_the_hand_built_model() -> None:
    made = hand_built("ioi")
    asked = made.task.generate(made.model, 12).clean
    r = logit_attribution(made.model, asked)
    assert r.strongest().site[0] == "L3H2" and "L3H2" in r.summary() and r.metric == "logit_diff"
    first = made.blueprint.answers["prior"][0]  # the bystander L0H4 always writes 0.05 of what a mover does for this name
    for p, (answer, distractor) in enumerate(zip(asked.answers, asked.distractors, strict=True)):
        sign = (made.model.token(first) == answer) - (made.model.token(first) == distractor)
        assert float(part(r, "L0H4")[p]) == pytest.approx(sign * 0.05 * float(part(r, "L3H2")[p]), abs=0.01)
    others = [i for i, name in enumerate(r.parts) if name not in ("L3H2", "L0H4")]
    assert r.values()[:, others].abs().max() < 1e-3
    row = r.strongest().iloc[0]
    assert row.p_adjusted < 0.05 and row.low <= row.effect <= row.high and row.share == pytest.approx(1, abs=0.1)


def test_a_planted_logit_shows_in_the_unembedding_bias() -> None:
    plain = tiny("llama", seed=5)
    base, tuned = HookedModel.load(plain), HookedModel.load(plain)
    with tuned.edited(planted("token_logit", tuned, token=9, c=2.0)):
        r = logit_attribution(ModelPair.load(base, tuned), prompts())
    change = r.added[1] - r.added[0]
    assert change[r.parts.index("b_U")].tolist() == [2.0, 0, 0, 0, 0]  # token 9 is the answer of the first prompt
    assert change[[i for i, name in enumerate(r.parts) if name != "b_U"]].abs().max() == 0
    assert not r.alike and r.strongest().site[0] == "b_U" and r.closure < 1e-5


def test_a_planted_logit_in_a_column_shows_in_the_constant_channel() -> None:
    """With a LayerNorm the column rises along what its output always has; the bias of the norm is part of that."""
    plain = tiny("gpt2", seed=5, tie_word_embeddings=False)
    base, tuned = HookedModel.load(plain), HookedModel.load(plain)
    with tuned.edited(planted("token_logit", tuned, token=9, c=2.0, through="W_U")):
        r = logit_attribution(ModelPair.load(base, tuned), prompts())
    change = r.added[1] - r.added[0]
    assert float(change[r.parts.index("b_ln_final"), 0]) == pytest.approx(2, abs=1e-4)
    assert change[[i for i, name in enumerate(r.parts) if name != "b_ln_final"]].abs().max() < 1e-4


def test_a_head_without_output_writes_nothing_and_the_edit_says_what_it_did() -> None:
    hf = tiny("llama", seed=6)
    model = HookedModel.load(hf)
    r = logit_attribution(model, prompts())
    last = max((name for name in r.parts if name.startswith("L2H")), key=lambda name: abs(float(part(r, name).mean())))
    with model.edited(r.edit(last)):
        without = logit_attribution(model, prompts())
    assert part(without, last).abs().max() == 0
    with model.edited(r.edit(last, gain=1.0)):
        assert torch.equal(logit_attribution(model, prompts()).added, r.added)
    assert str(r.edit("L1.mlp_out").changes[0].site) == "L1.mlp_out@END"  # type: ignore[union-attr]
    for wrong in ("L9H0", "embed", "L0.b_O"):
        with pytest.raises(InputError, match="head or MLP"):
            r.edit(wrong)


# ------------------------------------------------------------------------------------------------ null, batches, answers


@pytest.mark.parametrize(
    "kind", ["gpt2", pytest.param("llama", marks=pytest.mark.full), pytest.param("qwen2", marks=pytest.mark.full), "neox"]
)
def test_base_against_base_is_zero(kind: str) -> None:
    hf = tiny(kind, seed=1)
    r = logit_attribution(ModelPair.load(hf, copy.deepcopy(hf)), prompts())
    assert (r.added[1] - r.added[0]).abs().max() == 0 and r.alike and "no difference beyond rounding" in r.summary()
    assert (r.test().p == 1).all()
    with pytest.raises(InputError, match="no part changed"):
        r.edit()


def test_a_pair_whose_tuned_model_has_more_tokens() -> None:
    base, larger = tiny("llama", seed=3), tiny("llama", seed=9, vocab_size=34)
    tuned = shaken(base)
    with torch.no_grad():
        for (name, to), source in zip(larger.named_parameters(), tuned.parameters(), strict=True):
            (to[:31] if "embed" in name or "lm_head" in name else to).copy_(source)
    one, more = (logit_attribution(ModelPair.load(base, t), prompts(distractors=False)) for t in (tuned, larger))
    torch.testing.assert_close(one.added, more.added, atol=1e-5, rtol=1e-5)
    assert not one.alike and one.metric == "answer_logit" and one.closure < 1e-5 and "in tuned" in one.summary()
    with pytest.raises(InputError, match="answer of prompt 1 is token 33"):
        logit_attribution(ModelPair.load(base, larger), Prompts(TEXTS, ROWS, answers=(1, 33, 2, 3, 4)))


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("gpt2")[1]
    r = logit_attribution(model, prompts())
    monkeypatch.setattr("interp.models.attribution._CELLS", 1)
    monkeypatch.setattr("interp.models.attribution._ROWS", 5)
    again = logit_attribution(model, prompts())
    torch.testing.assert_close(again.added, r.added, atol=1e-5, rtol=1e-5)


def test_without_answers_the_top_token_of_base_stands_in() -> None:
    hf = tiny("llama", seed=3)
    base, tuned = HookedModel.load(hf), HookedModel.load(shaken(hf))
    r = logit_attribution(ModelPair.load(base, tuned), prompts(answers=False, distractors=False))
    top = base.logits(prompts(), at="END").argmax(-1)
    for side, m in enumerate((base, tuned)):
        logits = m.logits(prompts(), at="END").double()
        torch.testing.assert_close(r.whole[side], logits.gather(1, top[:, None])[:, 0] - logits.mean(1), atol=1e-5, rtol=1e-5)
    assert r.stand_in and "most likely token of base" in r.summary()


def test_another_position_pairs_and_contexts() -> None:
    model = loaded("gpt2")[1]
    first = prompts(positions={"first": ((0,),) * 5}, contexts=("a", "a", "b", "c", "c"))
    r = logit_attribution(model, first, at="first")
    starts = Prompts(TEXTS, tuple(row[:1] for row in ROWS), answers=ANSWERS, distractors=DISTRACTORS)
    torch.testing.assert_close(r.added, logit_attribution(model, starts).added, atol=1e-5, rtol=1e-4)
    assert r.n == "3 contexts of 5 prompts" and r.values().shape == (3, len(r.parts))
    torch.testing.assert_close(r.values()[0], r.added[0, :, :2].mean(1))
    assert torch.equal(logit_attribution(model, first, at="0").added, r.added)
    pairs = PromptPairs(prompts(), starts)
    assert torch.equal(logit_attribution(model, pairs).added, logit_attribution(model, prompts()).added)


def test_one_prompt_has_no_interval_and_still_speaks() -> None:
    r = logit_attribution(loaded("llama")[1], prompts()[:1])
    assert "n = 1 prompt" in r.summary() and r.to_frame().low.isna().all() and len(r.figures()) == 3


def test_one_prompt_of_a_pair_claims_nothing_about_noise() -> None:
    hf: Any = tiny("llama", seed=3)
    pair = ModelPair.load(hf, shaken(hf, 0.3))
    one = logit_attribution(pair, Prompts(TEXTS[:1], ROWS[:1], answers=ANSWERS[:1])).summary()
    same = logit_attribution(pair, Prompts(TEXTS[:2], ROWS[:2], answers=ANSWERS[:2], contexts=("a", "a"))).summary()
    single = logit_attribution(pair.base, Prompts(TEXTS[:1], ROWS[:1], answers=ANSWERS[:1])).summary()
    assert "n = 1 prompt, so no interval" in one and "n = 1 context of 2 prompts, so no interval" in same
    for told in (one, same, single):
        assert "nan" not in told and "[" not in told and "noise" not in told and "p = " not in told and "clear" not in told


def test_a_small_change_on_every_prompt_is_told_before_a_large_one_on_few() -> None:
    hf = tiny("llama", seed=3)
    many = Prompts(TEXTS[:1] * 12, ROWS[:1] * 12, answers=(9,) * 12, contexts=tuple(map(str, range(12))))
    r = logit_attribution(ModelPair.load(hf, copy.deepcopy(hf)), many)
    added = r.added.clone()
    added[1, r.parts.index("L1H2"), 0] += 30
    assert "no part writes more or less" in replace(r, added=added).summary()
    added[1, r.parts.index("L2H0")] += 0.1
    assert replace(r, added=added).summary().startswith("L2H0 adds 0.10 [0.10, 0.10] more")
    added[1, r.parts.index("L2H0")] -= 0.1 - float(r.floor.sum()) / 2  # on every prompt, but within rounding
    assert "no part writes more or less" in replace(r, added=added).summary()


def test_frames_and_figures() -> None:
    hf = tiny("gpt2", seed=3)
    r = logit_attribution(ModelPair.load(hf, shaken(hf)), prompts())
    frame = r.to_frame()
    assert len(frame) == 3 * len(r.parts) and len(r.to_frame(per="prompt")) == 2 * len(r.parts) * 5
    for view in r.views:
        rows = frame[frame.side == view]
        assert rows.effect.sum() == pytest.approx(float(r.total(view).mean()), abs=1e-5)
        assert rows.share.sum() == pytest.approx(1, abs=1e-4)
    grid = r.figures()["tuned"].data[0].z  # [layer, heads, MLP and biases]
    assert grid.shape == (3, 6) and grid[2][1] == pytest.approx(float(part(r, "L2H1", 1).mean()))
    assert grid[1][5] == pytest.approx(float((part(r, "L1.b_O", 1) + part(r, "L1.b_out", 1)).mean()))
    line = next(t for t in r.figures()["Added up by layer"].data if t.name == "tuned" and t.y is not None and len(t.y) == 4)
    assert line.y[-1] == pytest.approx(float(r.whole[1].mean()), abs=1e-5)


# ------------------------------------------------------------------------------------------------ wrong input, bent logits


def test_refusals() -> None:
    model = loaded("llama")[1]
    with pytest.raises(InputError, match="metric"):
        logit_attribution(model, prompts(), metric="kl")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="logit_diff needs an answer and a distractor"):
        logit_attribution(model, prompts(distractors=False), metric="logit_diff")
    with pytest.raises(InputError, match="no position 'S9'"):
        logit_attribution(model, prompts(), at="S9")
    with pytest.raises(InputError, match="exactly one"):
        logit_attribution(model, prompts(positions={"two": ((0, 1), (0,), (0,), (0,), (0,))}), at="two")
    with pytest.raises(InputError, match="view"):
        logit_attribution(model, prompts()).values("tuned")


def test_logits_that_are_no_sum_are_refused() -> None:
    hf: Any = tiny("llama")

    class Capped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * torch.tanh(super().forward(x) / 0.5)

    hf.lm_head.__class__ = Capped
    with pytest.raises(InputError, match="soft-cap"):
        logit_attribution(HookedModel.load(hf), prompts())
    model = loaded("gpt2")[1]
    push = Edit((ActivationChange(Site("resid_post", 1), "add", torch.arange(24.0)),))
    with model.edited(push), pytest.raises(InputError, match="an edit"):
        logit_attribution(model, prompts())
