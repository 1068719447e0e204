"""Divergences against formulas, and the analysis against plain Hugging Face forwards in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from torch.nn.functional import kl_div

from interp.analyses import token_divergence as home
from interp.analyses.token_divergence import TokenDivergenceResult, divergences, mean_and_error, token_divergence
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.organisms import planted
from interp.prompts import PromptPairs, Prompts

# 5 prompts, up to 9 tokens, 31 token ids, 3 layers, 4 heads
ROWS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18, 19, 20], [21, 22, 23, 24]]


def prompts(rows: list[list[int]] = ROWS, **positions: tuple[tuple[int, ...], ...]) -> Prompts:
    return Prompts(tuple(str(r) for r in rows), tuple(tuple(r) for r in rows), positions=positions)


def shaken(model: Any, seed: int = 0, size: float = 0.05) -> Any:
    tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn(p.shape, generator=draws)
    return tuned


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", seed=3)


@pytest.fixture(scope="module")
def pair(llama: Any) -> ModelPair:
    return ModelPair.load(llama, shaken(llama))


@pytest.fixture(scope="module")
def result(pair: ModelPair) -> TokenDivergenceResult:
    return token_divergence(pair, prompts(), first=3)


def test_two_unigram_heads() -> None:
    """p = (1/2, 1/4, 1/4) in base and q = (1/4, 1/4, 1/2) in tuned; the next token is 2."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    got = divergences(p.log() + 7, q.log() - 3, torch.tensor([2]))  # logits are known up to a constant
    log2 = math.log(2)
    assert got["kl"].item() == pytest.approx(0.25 * log2, abs=1e-6)  # 1/4 log 1/2 + 0 + 1/2 log 2
    assert got["reverse_kl"].item() == pytest.approx(0.25 * log2, abs=1e-6)
    middle = -2 * 0.375 * math.log(0.375) - 0.25 * math.log(0.25)
    assert got["jsd"].item() == pytest.approx(middle - 1.5 * log2, abs=1e-6)  # entropy of the mean less the mean entropy
    assert got["nll"][:, 0].tolist() == pytest.approx([math.log(4), math.log(2)])
    assert got["entropy"][:, 0].tolist() == pytest.approx([1.5 * log2, 1.5 * log2])
    assert got["rank"][:, 0].tolist() == [2, 1] and got["top"][:, 0].tolist() == [0, 2]  # nothing is more likely than a tie


def test_jsd_is_bounded_by_log_2() -> None:
    apart = divergences(torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]]), torch.tensor([0]))
    assert apart["jsd"].item() == pytest.approx(math.log(2), abs=1e-6) and apart["kl"].item() == pytest.approx(60, rel=1e-5)


def test_an_unknown_next_token_is_nan() -> None:
    got = divergences(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([-1, 4]))
    assert got["nll"].isnan().all() and got["rank"].isnan().all() and not got["kl"].isnan().any()


@pytest.mark.parametrize("kind", FOUR)
def test_agrees_with_plain_forwards(kind: str) -> None:
    base = tiny(kind, seed=1)
    tuned = shaken(base)
    got = token_divergence(ModelPair.load(base, tuned), prompts())
    for row, ids in enumerate(ROWS):
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0].double().log_softmax(-1) for m in (base, tuned))
        n = len(ids)
        slow = {
            "kl": kl_div(p, q, log_target=True, reduction="none").sum(-1),
            "reverse_kl": kl_div(q, p, log_target=True, reduction="none").sum(-1),
        }
        m = ((p.exp() + q.exp()) / 2).log()
        slow["jsd"] = sum(kl_div(m, x, log_target=True, reduction="none").sum(-1) for x in (p, q)) / 2
        for name, wanted in slow.items():
            torch.testing.assert_close(getattr(got, name)[row, :n].double(), wanted, atol=1e-6, rtol=1e-3)
            assert getattr(got, name)[row, n:].isnan().all()
        for side, x in enumerate((p, q)):
            after = torch.tensor(ids[1:], dtype=torch.long)
            mine = x[:-1].gather(1, after[:, None])
            torch.testing.assert_close(got.nll[side, row, : n - 1].double(), -mine[:, 0], atol=1e-5, rtol=0)
            assert got.rank[side, row, : n - 1].tolist() == (1 + (x[:-1] > mine).sum(-1)).tolist()
            torch.testing.assert_close(got.entropy[side, row, :n].double(), -(x.exp() * x).sum(-1), atol=1e-5, rtol=0)
            assert got.top[side, row].tolist() == x.argmax(-1).tolist() + [-1] * (9 - n)
            assert got.nll[side, row, n - 1 :].isnan().all()
    assert got.kl.nanmean() > 0.001 and got.ids[1].tolist() == [12, 13] + [-1] * 7


def test_a_model_against_itself(pair: ModelPair) -> None:
    same = token_divergence(ModelPair.load(pair.base, HookedModel.load(pair.base.wrapped.source)), prompts())
    there = ~same.kl.isnan()
    assert same.kl[there].max() == 0 and same.jsd[there].abs().max() < 1e-6 and same.disagrees[there].max() == 0
    assert 0 <= same.numerical_floor < 1e-6 and same.nll_change.nan_to_num(0).abs().max() == 0


def test_a_planted_logit_gives_the_divergence_of_the_formula() -> None:
    """The logit of token 9 rises by c: q = p e^c / Z at 9 and p / Z elsewhere, so KL(q || p) = q_9 c - log Z."""
    plain = tiny("gpt2", seed=5, tie_word_embeddings=False)
    model, other = HookedModel.load(plain), HookedModel.load(plain)
    c = 2.0
    with other.edited(planted("token_logit", other, token=9, c=c, through="W_U")):
        got = token_divergence(ModelPair.load(model, other), prompts())
    p9 = model.logits(prompts()).softmax(-1)[..., 9]
    z = 1 + p9 * (math.exp(c) - 1)
    there = ~got.kl.isnan()
    wanted = p9 * math.exp(c) / z * c - z.log()
    torch.testing.assert_close(got.kl[there], wanted[there], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(got.reverse_kl[there], (z.log() - p9 * c)[there], atol=1e-5, rtol=1e-3)


def test_small_chunks_change_nothing(pair: ModelPair, result: TokenDivergenceResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_CELLS", 70)  # 2 tokens at a time
    monkeypatch.setattr(home, "_TOKENS", 7)  # and several groups of prompts
    calls = []
    whole = home.divergences
    monkeypatch.setattr(home, "divergences", lambda b, t, a: calls.append(b.shape) or whole(b, t, a))
    again = token_divergence(pair, prompts(), first=3)
    assert max(rows for rows, _ in calls) == 2 and sum(rows for rows, _ in calls) == 22
    for name in ("kl", "reverse_kl", "jsd", "nll", "entropy"):
        torch.testing.assert_close(getattr(again, name), getattr(result, name), atol=1e-6, rtol=1e-4, equal_nan=True)
    assert torch.equal(again.top, result.top) and torch.equal(again.kind, result.kind)


def test_more_token_ids_in_the_tuned_model() -> None:
    """Only shared ids are compared, renormalised: three added rows change nothing."""
    base = tiny("llama", seed=3)
    tuned = shaken(base)
    larger = tiny("llama", seed=9, vocab_size=34)
    with torch.no_grad():
        for (name, to), source in zip(larger.named_parameters(), tuned.parameters(), strict=True):
            if "embed" in name or "lm_head" in name:
                to[:31] = source
            else:
                to.copy_(source)
    narrow, wide = token_divergence(ModelPair.load(base, tuned), prompts()), token_divergence(ModelPair.load(base, larger), prompts())
    assert (narrow.shared, wide.shared) == (31, 31)
    torch.testing.assert_close(wide.kl, narrow.kl, equal_nan=True, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(wide.nll, narrow.nll, equal_nan=True, atol=1e-5, rtol=0)


def test_places_in_the_text(pair: ModelPair, result: TokenDivergenceResult) -> None:
    assert result.kinds == ("first 3", "later")
    assert result.kind[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1] and result.kind[1].tolist() == [0, 0] + [-1] * 7
    named = prompts(response=((4,), (1,), (0,), (2,), (3,)), template=((2, 3), (), (), (1,), (2,)))
    chat = token_divergence(pair, named, first=2)
    assert chat.kinds == ("first 2", "later", "prompt", "template")
    # tokens predicted by the cells of prompt 0: 1 prompt, 2 and 3 template, 4 and 5 first, the others later
    assert [chat.kinds[k] for k in chat.kind[0]] == ["prompt", "template", "template", "first 2", "first 2", *["later"] * 4]
    frame = chat.to_frame().set_index("kind")
    assert frame.tokens["all"] == 22 and frame.tokens["template"] == 4
    where = chat.kind == 3
    assert frame.kl["template"] == pytest.approx(float(chat.kl[where].mean()), rel=1e-5)


def test_error_of_a_mean_counts_prompts_not_tokens() -> None:
    """Tokens repeated within a prompt are no new evidence; with one token each it is the usual standard error."""
    one = torch.tensor([[1.0], [2.0], [4.0], [5.0]])
    assert mean_and_error(one) == pytest.approx((3.0, float(one.std()) / 2))
    assert mean_and_error(one.repeat(1, 6)) == pytest.approx(mean_and_error(one))
    ragged = torch.tensor([[1.0, 3.0], [5.0, torch.nan]])
    mean, error = mean_and_error(ragged)  # residuals of the sums: 4 - 2 * 3 = -2 and 5 - 3 = 2; sqrt(2 * (4 + 4) / 1) / 3
    assert mean == 3 and error == pytest.approx(4 / 3)
    assert mean_and_error(one[:1]) == (1.0, None)


def test_tables_and_sentence(result: TokenDivergenceResult) -> None:
    tokens = result.to_frame(per="prompt")
    assert len(tokens) == 22 and tokens.token[0] == "<3>" and tokens.top_base.str.startswith("<").all()
    assert tokens.kl.mean() == pytest.approx(result.to_frame().kl[0], rel=1e-5)
    text = result.summary()
    assert text.startswith(f"KL(tuned || base) is {result.to_frame().kl[0]:.3g} +- ") and "22 tokens" in text and "\n" not in text
    assert "one prompt, so no s.e." in replace(result, **{k: getattr(result, k)[:1] for k in ("kl", "ids")}).summary()
    with pytest.raises(InputError, match="per must be 'prompt'"):
        result.to_frame(per="token")


def test_figures(result: TokenDivergenceResult) -> None:
    drawn = result.figures()
    assert list(drawn) == ["By position", "By place in the text", "Distribution over tokens"]
    lines = [t for t in drawn["By position"].data if t.name]
    assert len(lines) == 3 and len(lines[0].y) == 4  # positions that at least 3 prompts have
    assert float(lines[0].y[0]) == pytest.approx(float(result.kl[:, 0].mean()), rel=1e-5)
    share = drawn["Distribution over tokens"].data[0]
    assert share.y[0] == 1 and share.y[-1] == 0


def test_coloured_prompts_are_escaped_and_ordered(result: TokenDivergenceResult) -> None:
    evil = replace(result, vocabulary={k: f"<script>{k}</script>" for k in result.vocabulary})
    page = evil.html()
    assert "<script>" not in page and "&lt;script&gt;" in page
    means = result.prompt_kl
    order = [page.index(f"Prompt {i}: mean KL") for i in means.argsort(descending=True).tolist()]
    assert order == sorted(order)


def test_round_trip(tmp_path: Any, result: TokenDivergenceResult) -> None:
    again = TokenDivergenceResult.load(result.save(tmp_path / "r"))
    assert again.summary() == result.summary() and again.vocabulary == result.vocabulary
    assert torch.equal(again.kl.nan_to_num(-1), result.kl.nan_to_num(-1)) and again.meta.settings == {"first": 3}


def test_the_floor_sees_what_depends_on_the_batch(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    final = home._final
    monkeypatch.setattr(home, "_final", lambda model, batch: final(model, batch) + 0.1 * torch.arange(24) * (len(batch) == 1))
    shaky = token_divergence(pair, prompts())
    assert shaky.floor.shape == (2, 22) and shaky.numerical_floor > 1e-3
    assert f"numerical floor {shaky.numerical_floor:.1g}" in shaky.summary()


def test_half_precision(llama: Any) -> None:
    base = copy.deepcopy(llama).bfloat16()
    half = token_divergence(ModelPair.load(base, shaken(base)), prompts())
    assert half.kl.dtype == torch.float32 and half.numerical_floor < 0.01 < half.kl.nanmean()


def test_one_prompt_of_one_token(pair: ModelPair) -> None:
    tiniest = token_divergence(pair, prompts([[5]]))
    assert "one prompt" in tiniest.summary() and tiniest.figures() and tiniest.html() and len(tiniest.to_frame(per="prompt")) == 1


def test_one_prompt_of_several_tokens(pair: ModelPair) -> None:
    """The floor of a single prompt: alone against twice itself, one value per token."""
    alone = token_divergence(pair, prompts([[1, 2, 3, 4]]))
    assert alone.floor.shape == (2, 4) and alone.numerical_floor < 1e-9
    assert "one prompt, so no s.e." in alone.summary()


def test_refusals(pair: ModelPair, llama: Any) -> None:
    with pytest.raises(InputError, match="first must be at least 1, but it is 0"):
        token_divergence(pair, prompts(), first=0)
    with pytest.raises(InputError, match="prompt 0 has 20 tokens"):
        token_divergence(pair, prompts([[3] * 20]))
    with pytest.raises(InputError, match="one text at a time"):
        token_divergence(pair, PromptPairs(prompts(), prompts()))  # type: ignore[arg-type]
    split = ModelPair.load(llama, shaken(llama))
    split.one_at_a_time = True
    with pytest.raises(InputError, match="needs both models at once"):
        token_divergence(split, prompts())


@pytest.mark.parametrize("kind", FOUR)
def test_the_floor_of_half_precision_is_what_rounding_does(kind):
    """Against plain Hugging Face: the same bf16 weights computed in bf16 and in fp32, prompts of unequal length alone."""
    rows = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7]]
    plain = tiny(kind).to(torch.bfloat16)
    plain.set_attn_implementation("eager")
    result = token_divergence(ModelPair(HookedModel.load(plain), HookedModel.load(copy.deepcopy(plain))), prompts(rows))
    wide = copy.deepcopy(plain).float()
    want = []
    for row in rows:
        with torch.no_grad():
            p, q = (m(torch.tensor([row])).logits[0].double().log_softmax(-1) for m in (plain, wide))
        want.append((p.exp() * (p - q)).sum(-1))
    want = torch.cat(want)
    assert float(want.max()) > 1e-6
    assert (result.floor >= want.float() * 0.99 - 1e-7).all() and not result.half
    assert result.numerical_floor == pytest.approx(float(want.max()), rel=0.02)
    assert next(plain.parameters()).dtype == torch.bfloat16
