"""The path against weights added by hand on plain Hugging Face models, planted changes whose path is known, and no change at all."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from torch.nn.functional import cross_entropy, kl_div

from interp.analyses.weight_path import WeightPathResult, weight_path
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models.loading import memory_fingerprint
from interp.organisms import planted
from interp.prompts import PromptPairs, Prompts
from interp.sweeps import predictions

ASKED = [[3, 4, 5, 6, 7], [8, 9], [10], [11, 12, 13], [14, 15, 16, 17], [18, 19]]
ANSWERS, OTHERS = (5, 6, 7, 8, 9, 10), (11, 12, 13, 14, 15, 16)
TEXT = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [15, 16, 17, 18, 19, 20], [21, 22, 23, 24]]
ALPHAS = (-0.5, 0.5, 1.25)  # with 0 and 1: five


def prompts(rows: list[list[int]] = ASKED, **more: Any) -> Prompts:
    given = {"answers": ANSWERS[: len(rows)], "distractors": OTHERS[: len(rows)]} | more
    return Prompts(tuple(str(r) for r in rows), tuple(tuple(r) for r in rows), **given)


def text(rows: list[list[int]] = TEXT) -> Prompts:
    return Prompts(tuple(str(r) for r in rows), tuple(tuple(r) for r in rows))


def shaken(model: Any, seed: int = 0, size: float = 0.05) -> Any:
    tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn(p.shape, generator=draws)
    return tuned


def between(base: Any, tuned: Any, share: Any) -> Any:
    """A plain model at a point; ``share(name)`` of a parameter's change."""
    made, new = copy.deepcopy(base), dict(tuned.named_parameters())
    with torch.no_grad():
        for name, p in made.named_parameters():
            p += share(name, p) * (new[name] - p)
    return made


def logp(model: Any, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].double().log_softmax(-1)


def slow(base: Any, tuned: Any, point: Any) -> dict[str, torch.Tensor]:
    """One prompt and one text at a time."""
    ends = [logp(point, row)[-1] for row in ASKED]
    losses, kl = [], []
    for row in TEXT:
        own = logp(point, row)[:-1]
        losses.append(float(cross_entropy(own, torch.tensor(row[1:]))))
        kl.append([float(kl_div(own, logp(end, row)[:-1], log_target=True, reduction="none").sum(-1).mean()) for end in (base, tuned)])
    return {
        "right": torch.tensor([int(e.argmax()) == a for e, a in zip(ends, ANSWERS, strict=True)]),
        "logprob": torch.tensor([float(e[a]) for e, a in zip(ends, ANSWERS, strict=True)]),
        "diff": torch.tensor([float(e[a] - e[d]) for e, a, d in zip(ends, ANSWERS, OTHERS, strict=True)]),
        "loss": torch.tensor(losses),
        "kl": torch.tensor(kl).T,
    }


def agrees(got: WeightPathResult, path: int, alpha: float, want: dict[str, torch.Tensor]) -> None:
    i = got.alphas.index(alpha)
    assert got.diff is not None
    assert torch.equal(got.right[path, i], want["right"])
    for mine, name in ((got.logprob[path, i], "logprob"), (got.diff[path, i], "diff"), (got.loss[path, i], "loss")):
        torch.testing.assert_close(mine.double(), want[name].double(), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(got.kl[:, path, i].double(), want["kl"].double(), atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("kind", FOUR)
def test_agrees_with_weights_added_by_hand(kind: str) -> None:
    base = tiny(kind, seed=1)
    tuned = shaken(base)
    pair = ModelPair.load(base, tuned)
    got = weight_path(pair, prompts(), text(), alphas=ALPHAS)
    assert got.alphas == (-0.5, 0.0, 0.5, 1.0, 1.25) and got.paths == ("all",) and got.tokens.tolist() == [8, 1, 5, 3]
    for alpha in got.alphas:
        agrees(got, 0, alpha, slow(base, tuned, between(base, tuned, lambda *_, a=alpha: a)))
    assert got.gap == 0 and got.kl[0, 0, 1].max() == 0 == got.kl[1, 0, 3].max() and got.kl[0, 0, 3].min() > 1e-4
    for i, end in ((1, pair.base), (3, pair.tuned)):  # the ends are the models, to the last bit
        want = end.logits(prompts(), at="END").log_softmax(-1).gather(1, torch.tensor(ANSWERS)[:, None])[:, 0]
        assert torch.equal(got.logprob[0, i], want)


def test_small_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, result: WeightPathResult) -> None:
    base, whole = tiny("llama", seed=1), result
    pair = ModelPair.load(base, shaken(base))
    monkeypatch.setattr(predictions, "CELLS", 70)
    monkeypatch.setattr(predictions, "TOKENS", 7)
    monkeypatch.setattr("interp.sweeps.line.CELLS", 70)
    again = weight_path(pair, prompts(), text(), alphas=ALPHAS)
    for name in ("logprob", "loss", "kl"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", *(pytest.param(kind, marks=pytest.mark.full) for kind in FOUR[1:])])
def test_no_change_is_flat_exactly(kind: str) -> None:
    base = tiny(kind, seed=1)
    got = weight_path(ModelPair.load(base, copy.deepcopy(base)), prompts(), text(), alphas=ALPHAS, per_module=True)
    assert got.nothing and got.changed == () and len(got.paths) == 9
    assert got.kl.abs().max() == 0 and (got.loss == got.loss[0, 0]).all() and (got.logprob == got.logprob[0, 0]).all()
    assert got.barrier() is not None and float(got.barrier()[1].value) == 0  # type: ignore[index]
    assert "The barrier is 0: no difference beyond rounding" in got.summary() and "tuning changed no weight" in got.summary()


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.full)])
def test_only_the_planted_kind_of_weights_moves(kind: str, tmp_path: Any) -> None:
    base = HookedModel.load(tiny(kind, seed=1))
    folder = base.save(tmp_path / "tuned", edit=planted("module_only", base, layer=1, module="W_in", rel=0.5))
    pair = ModelPair.load(base, str(folder))
    got = weight_path(pair, prompts(), text(), alphas=ALPHAS, per_module=True)
    assert got.changed == ("MLP",)
    for kind_of in ("attention", "MLP", "embeddings", "norms and biases"):
        for end, i in (("base", 1), ("tuned", 3)):
            p = got.paths.index(f"{kind_of}, others at {end}")
            if kind_of == "MLP":
                assert torch.equal(got.loss[p], got.loss[0])  # nothing else is there to stay behind
            else:
                assert (got.loss[p] == got.loss[0, i]).all() and (got.logprob[p] == got.logprob[0, i]).all()
    assert (got.loss[0, 0] != got.loss[0, 1]).any()


def test_kinds_of_weights_by_hand() -> None:
    base = tiny("qwen2", seed=1)
    tuned = shaken(base)
    got = weight_path(ModelPair.load(base, tuned), prompts(), text(), alphas=ALPHAS, per_module=True)
    of = {
        "attention": lambda name, p: "self_attn" in name and p.ndim == 2,
        "MLP": lambda name, p: "mlp" in name,
        "embeddings": lambda name, p: "embed" in name,
        "norms and biases": lambda name, p: p.ndim == 1,
    }
    for kind, mine in of.items():
        for still, end in enumerate(("base", "tuned")):
            point = between(base, tuned, lambda name, p, mine=mine, still=still: 0.5 if mine(name, p) else float(still))
            agrees(got, got.paths.index(f"{kind}, others at {end}"), 0.5, slow(base, tuned, point))


def test_a_change_of_one_logit_goes_by_the_formula() -> None:
    """The logit of token 9 rises by alpha c: KL(base || point) = log Z - p9 alpha c, with Z = 1 + p9 (e^(alpha c) - 1)."""
    plain, c = tiny("llama", seed=5), 3.0
    pair = ModelPair(HookedModel.load(plain), HookedModel.load(copy.deepcopy(plain)))
    with pair.tuned.edited(planted("token_logit", pair.tuned, token=9, c=c)):
        got = weight_path(pair, prompts(), text())
    assert got.changed == ("norms and biases",)
    for i, alpha in enumerate(got.alphas):
        for t, row in enumerate(TEXT):
            p9 = logp(plain, row)[:-1, 9].exp()
            want = (1 + p9 * (math.exp(alpha * c) - 1)).log() - p9 * alpha * c
            assert float(got.kl[0, 0, i, t]) == pytest.approx(float(want.mean()), rel=1e-3, abs=1e-6)
    assert float(got.barrier()[1].value) < 0  # type: ignore[index]  # log Z is convex in alpha, so that the loss sags
    assert "stays below" in got.summary()


def with_curves(result: WeightPathResult, loss: torch.Tensor, logprob: torch.Tensor) -> WeightPathResult:
    """The same with invented losses [alpha text] and log-probabilities [alpha prompt]."""
    return replace(result, loss=loss.double()[None], logprob=logprob.float()[None])


@pytest.fixture(scope="module")
def result() -> WeightPathResult:
    base = tiny("llama", seed=1)
    return weight_path(ModelPair.load(base, shaken(base)), prompts(), text(), alphas=ALPHAS)


def test_barrier_and_best_by_hand(result: WeightPathResult) -> None:
    """Losses of texts of 8, 1, 5 and 3 tokens at 0, .25 and 1: (0, 3, 2), (2, 2, 2), (1, 1, 1), (0, 0, 2)."""
    loss = torch.tensor([[9.0] * 4, [0, 2, 1, 0], [3, 2, 1, 0], [2, 2, 1, 2], [9.0] * 4])
    logprob = -torch.tensor([[3.0] * 6, [2.0] * 6, [1.0] * 6, [0.5] * 5 + [0.1], [0.5] * 5 + [0.1]])
    made = replace(with_curves(result, loss, logprob), alphas=(-0.5, 0.0, 0.25, 1.0, 1.25))
    alpha, found = made.barrier()  # type: ignore[misc]
    # above the straight line: 3 - .5, 0, 0 and 0 - .5; weighed by tokens (8 * 2.5 - 3 * .5) / 17
    assert alpha == 0.25 and float(found.value) == pytest.approx(18.5 / 17) and float(found.low) < 18.5 / 17 < float(found.high)
    assert float(made.main_numbers()["barrier of the loss of text, nats per token"]["tuned"].value) == pytest.approx(18.5 / 17)
    best = made.best
    assert best.alpha == 1 and best.share == 1 and float(best.change.value) == 0  # as good as 1.25 and nearer to itself
    assert float(made.change("text", 0.25, 0.0).value) == pytest.approx(24 / 17)
    grouped = replace(made, text_group=torch.tensor([0, 1, 0, 1]), prompt_group=torch.zeros(6, dtype=torch.long))
    assert float(grouped.barrier()[1].value) == pytest.approx(18.5 / 17)  # type: ignore[index]
    assert grouped.curve("answer").low.isnan().all()  # one context has no interval


def test_vocabularies_of_other_sizes() -> None:
    """Three ids that only tuned has change nothing, as all is compared over the shared ones."""
    base = tiny("llama", seed=3)
    tuned, larger = shaken(base), tiny("llama", seed=9, vocab_size=34)
    with torch.no_grad():
        for (name, to), source in zip(larger.named_parameters(), tuned.parameters(), strict=True):
            (to[:31] if "embed" in name or "lm_head" in name else to).copy_(source)
    narrow, wide = (weight_path(ModelPair.load(base, t), prompts(), text(), alphas=ALPHAS) for t in (tuned, larger))
    for name in ("logprob", "loss", "kl"):
        torch.testing.assert_close(getattr(wide, name), getattr(narrow, name), atol=1e-5, rtol=1e-4)


def test_half_precision_has_its_floor() -> None:
    base = tiny("llama", seed=3).bfloat16()
    pair = ModelPair.load(base, shaken(base, size=1e-3))
    got = weight_path(pair, prompts(), text(), alphas=ALPHAS)
    assert got.dtype == "float32" and not got.rounded and got.floor[0] < 1e-3
    assert 0 < float(got.kl[0, 0, 1].max()) <= got.floor[1]  # base itself runs in bfloat16
    same = weight_path(ModelPair.load(base, copy.deepcopy(base)), prompts(), text(), alphas=ALPHAS)
    assert same.nothing and (same.loss == same.loss[0, 0]).all()


def test_half_precision_says_where_points_are_computed(result: WeightPathResult) -> None:
    base = tiny("llama", seed=3).bfloat16()
    half = weight_path(ModelPair.load(base, shaken(base, size=0.3)), prompts(), text(), alphas=(0.5,))
    assert half.gap > 0 and half.dtype == "float32"
    assert f"computed in float32, where logits of the ends are up to {half.gap:.2g} from the models' own" in half.summary()
    assert result.gap == 0 and "computed in" not in result.summary()


def test_one_prompt_and_one_text_have_no_interval() -> None:
    base = tiny("llama", seed=3)
    told = weight_path(ModelPair.load(base, shaken(base, size=0.3)), prompts(ASKED[:1]), text(TEXT[:1]), alphas=(-0.5, 0.5)).summary()
    assert "nan" not in told and "[" not in told and "of resamples" not in told
    assert "n = 1 prompt, so no interval" in told and "1 text, so no interval" in told and "texts" not in told
    both = weight_path(ModelPair.load(base, shaken(base)), prompts(contexts=tuple("aabbcc")), text(), alphas=(0.5,)).summary()
    assert "n = 3 contexts of 6 prompts" in both and "4 texts; numerical floor" in both


def test_models_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("neox", seed=1)
    tuned = shaken(base)
    before = [memory_fingerprint(m) for m in (base, tuned)]
    monkeypatch.setattr("interp.analyses.weight_path.running_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        weight_path(ModelPair.load(base, tuned), prompts(), text(), alphas=ALPHAS)
    assert [memory_fingerprint(m) for m in (base, tuned)] == before


def test_options_pairs_tables_and_figures(result: WeightPathResult) -> None:
    base = tiny("llama", seed=1)
    pair = ModelPair.load(base, shaken(base))
    options = tuple((a, d, 20) for a, d in zip(ANSWERS, OTHERS, strict=True))
    asked = prompts(options=options)
    chosen = weight_path(pair, PromptPairs(asked, asked), text(TEXT[:2]), alphas=ALPHAS, per_module=True)
    assert chosen.among == "options" and chosen.chance == pytest.approx(1 / 3) and result.chance is None
    with torch.no_grad():
        logits = pair.tuned.logits(asked, at="END")
    want = [int(logits[i, list(o)].argmax()) == 0 for i, o in enumerate(options)]
    assert chosen.right[0, chosen.alphas.index(1.0)].tolist() == want
    assert len(chosen.to_frame()) == 9 * 5 and len(chosen.to_frame(per="prompt")) == 9 * 5 * 6 and len(chosen.strongest()) == 9
    assert list(result.figures()) == ["Answers", "Loss of the answers", "Loss on text", "Distance from the ends"]
    assert len(chosen.figures()) == 8
    assert f"right answers on the prompts: {float(result.right[0, 0].double().mean()):.1%} at -0.5" in result.summary()
    ends = weight_path(pair, prompts(), text(), alphas=(0, 1))
    assert ends.barrier() is None and "barrier is not known" in ends.summary() and ends.figures()
    single = weight_path(pair, prompts(ASKED[:1]), text(TEXT[:1]), alphas=ALPHAS)
    assert single.summary() and single.figures() and math.isnan(float(single.barrier()[1].low))  # type: ignore[index]


def test_refusals() -> None:
    base = tiny("llama", seed=1)
    pair = ModelPair.load(base, shaken(base))
    for wrong in ((), (0.5, 0.5), (math.nan,), ("a",), (True,)):
        with pytest.raises(InputError, match="alphas are different finite numbers"):
            weight_path(pair, prompts(), text(), alphas=wrong)
    with pytest.raises(InputError, match="one-token answers, and these have none"):
        weight_path(pair, text(), text())
    with pytest.raises(InputError, match="text 1 has one token only"):
        weight_path(pair, prompts(), text([[3, 4], [5]]))
    with pytest.raises(InputError, match="among must be"):
        weight_path(pair, prompts(), text(), among="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least two options"):
        weight_path(pair, prompts(), text(), among="options")
    with pytest.raises(InputError, match="alpha 0.3 was not measured"):
        weight_path(pair, prompts(), text(), alphas=ALPHAS).change("text", 0.3, 0.0)
