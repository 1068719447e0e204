"""Sums over streams against plain Hugging Face forwards, CKA against its dense formula, and changes whose answer is known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from torch.nn.functional import cross_entropy, kl_div

from interp.analyses.activation_difference import TAKEN, ActivationDifferenceResult, activation_difference
from interp.edits import ActivationChange, Edit
from interp.errors import InputError
from interp.linalg import KernelSums, cka, unbiased_hsic
from interp.models import HookedModel, ModelPair
from interp.organisms import planted
from interp.prompts import PromptPairs, Prompts
from interp.sites import Site
from interp.sweeps import similarity
from interp.sweeps.channels import half
from interp.sweeps.mean_vectors import MeanVectors, prompt_weights
from interp.sweeps.residuals import Places, stream_sites, totals

# 7 prompts, up to 9 tokens, 31 token ids, 3 layers, 4 heads, d_model 24
ROWS = [
    [3, 4, 5, 6, 7, 8, 9, 10, 11],
    [12, 13],
    [14],
    [15, 16, 17, 18, 19, 20],
    [21, 22, 23, 24],
    [25, 26, 27, 28, 29],
    [5, 9, 2, 30, 1, 7, 12],
]
FIRST = 3
PLACES = ("all", "after token 0", "token 0", "first 3", "later")


def prompts(rows: list[list[int]] = ROWS, **more: Any) -> Prompts:
    return Prompts(tuple(str(r) for r in rows), tuple(tuple(r) for r in rows), **more)


def shaken(model: Any, seed: int = 0, size: float = 0.05) -> Any:
    tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn(p.shape, generator=draws)
    return tuned


def streams(model: Any, rows: list[list[int]] = ROWS) -> list[list[torch.Tensor]]:
    """[prompt][site]: what enters the first block and leaves each, by hooks on the blocks of a plain model."""
    inner = model.base_model
    blocks = inner.h if hasattr(inner, "h") else inner.layers
    found = []
    for ids in rows:
        seen: list[torch.Tensor] = []
        hooks = [
            blocks[0].register_forward_pre_hook(
                lambda m, a, kw, seen=seen: seen.append(a[0] if a else kw["hidden_states"]), with_kwargs=True
            )
        ]
        hooks += [
            b.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)) for b in blocks
        ]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        found.append([x[0].double() for x in seen])
    return found


def in_place(place: str, n: int) -> list[int]:
    """Token indices of a place in a text of n tokens."""
    at = {"all": range(n), "after token 0": range(1, n), "token 0": range(1), "first 3": range(1, min(n, 3)), "later": range(3, n)}
    return list(at[place])


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", seed=3)


@pytest.fixture(scope="module")
def pair(llama: Any) -> ModelPair:
    return ModelPair.load(llama, shaken(llama))


@pytest.fixture(scope="module")
def result(pair: ModelPair) -> ActivationDifferenceResult:
    return activation_difference(pair, prompts(), first=FIRST, draws=2)


# ---- CKA


def dense_hsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Song et al. 2012, eq. 5, word for word."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k, m, one = k - k.diag().diag(), m - m.diag().diag(), torch.ones(n, dtype=x.dtype)
    rest = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return ((k @ m).trace() + rest) / (n * (n - 3))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unbiased_hsic_is_that_of_the_dense_kernels() -> None:
    x = draw(11, 7) + 2
    y = x @ draw(7, 5, seed=1) + draw(11, 5, seed=2) - 1
    whole = unbiased_hsic(x.T @ y, KernelSums.of(x, y))
    assert whole == pytest.approx(float(dense_hsic(x, y)), rel=1e-11)
    parts = KernelSums.of(x[:4], y[:4]) + KernelSums.of(x[4:], y[4:])
    assert unbiased_hsic(x.T @ y, parts) == pytest.approx(whole, rel=1e-12)
    wanted = dense_hsic(x, y) / (dense_hsic(x, x) * dense_hsic(y, y)).sqrt()
    assert cka(x, y) == pytest.approx(float(wanted), rel=1e-10)
    assert math.isnan(cka(x[:3], y[:3]))


def test_cka_of_a_rotated_copy_and_of_independent_streams() -> None:
    x = draw(40, 6)
    q = torch.linalg.qr(draw(6, 6, seed=1)).Q
    assert cka(x, 3 * x @ q + 1) == pytest.approx(1, abs=1e-12)
    one, other = draw(64, 768, seed=2), draw(64, 768, seed=3)
    assert cka(one, other, unbiased=False) == pytest.approx(0.92, abs=0.01)  # what bias alone makes of 64 tokens
    assert abs(cka(one, other)) < 0.05
    assert abs(sum(cka(draw(20, 30, seed=i), draw(20, 30, seed=i + 99)) for i in range(50)) / 50) < 0.02


def test_one_shared_outlier_makes_independent_streams_alike() -> None:
    x, y = draw(50, 8), draw(50, 8, seed=1)
    x[:, 2] = y[:, 2] = 100 * draw(50, seed=2)
    rest = [i for i in range(8) if i != 2]
    assert cka(x, y) > 0.99 and abs(cka(x[:, rest], y[:, rest])) < 0.2


# ---- the analysis


@pytest.mark.parametrize("kind", FOUR)
def test_agrees_with_plain_forwards(kind: str) -> None:
    base = tiny(kind, seed=1)
    tuned = shaken(base)
    got = activation_difference(ModelPair.load(base, tuned), prompts(), first=FIRST, causal=())
    a, b = streams(base), streams(tuned)
    assert got.labels["site"] == ("L0.resid_pre", "L0.resid_post", "L1.resid_post", "L2.resid_post") and got.labels["place"] == PLACES
    for i in range(4):
        for k, place in enumerate(PLACES):
            picked = [[s[p][i][in_place(place, len(row))] for p, row in enumerate(ROWS)] for s in (a, b)]
            x, y = (torch.cat(one) for one in picked)
            assert int(got.tokens[k].sum()) == len(x)
            close = dict(atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(got.difference[i, k].double(), (y - x).mean(0), **close)
            torch.testing.assert_close(got.base_mean[i, k].double(), x.mean(0), **close)
            cos = torch.nn.functional.cosine_similarity
            for p in range(len(ROWS)):
                u, w = picked[0][p], picked[1][p]
                if not len(u):
                    assert got.relative[i, k, p].isnan() and got.cosine[i, k, p].isnan() and int(got.tokens[k, p]) == 0
                    continue
                torch.testing.assert_close(got.relative[i, k, p], ((w - u).norm(dim=1) / u.norm(dim=1)).mean(), **close)
                torch.testing.assert_close(got.cosine[i, k, p], cos(u, w).mean(), **close)
                torch.testing.assert_close(got.centred_cosine[i, k, p], cos(u - x.mean(0), w - y.mean(0)).mean(), **close)
            torch.testing.assert_close(got.cka[0, i, k], torch.tensor(cka(x, y), dtype=torch.float64), **close)
            assert 0 < float(got.cka[0, i, k]) < 1
        variance = torch.stack([torch.cat([s[p][i] for p in range(len(ROWS))]).var(0, correction=0) for s in (a, b)])
        wanted = (variance / variance.median(1, keepdim=True).values).amax(0)
        torch.testing.assert_close(got.spread[i], wanted, atol=1e-4, rtol=1e-4)


def test_readout_is_that_of_the_final_norm_without_bias(pair: ModelPair, result: ActivationDifferenceResult) -> None:
    source: Any = pair.tuned.wrapped.source
    for vector, x in ((0, result.difference), (1, result.base_mean), (2, result.base_mean + result.difference)):
        logits = ((x[2, 1] * source.model.norm.weight) @ source.lm_head.weight.T).detach()
        for end, sign in ((0, 1), (1, -1)):
            order = (sign * logits).argsort(descending=True)[:10]
            assert result.readout[vector, end, 2, 1].tolist() == order.tolist()
            torch.testing.assert_close(result.score[vector, end, 2, 1], logits[order], atol=1e-4, rtol=1e-4)
        assert float(result.concentration[vector, 2, 1]) == pytest.approx(
            float((logits - logits.mean()).abs().max() / logits.std()), rel=1e-4
        )


def test_readout_of_a_layer_norm_leaves_the_mean_out() -> None:
    base = tiny("gpt2", seed=1)
    got = activation_difference(ModelPair.load(base, tuned := shaken(base)), prompts(), first=FIRST, causal=())
    x = got.difference[3, 1]
    logits = ((x - x.mean()) * tuned.transformer.ln_f.weight) @ tuned.lm_head.weight.T
    assert got.readout[0, 0, 3, 1].tolist() == logits.argsort(descending=True)[:10].tolist()


def test_halves_and_random_signs_by_hand(pair: ModelPair, result: ActivationDifferenceResult) -> None:
    contexts = prompts().contexts
    weights = prompt_weights(contexts, torch.arange(len(ROWS)), 19, 0)
    assert weights[0].eq(1).all() and (weights[1] + weights[2]).eq(1).all() and weights[3:].abs().eq(1).all()
    assert torch.equal(weights[1] > 0, half(contexts, 0.5, 0)) and len({tuple(w) for w in weights[3:].tolist()}) > 3
    a, b = (streams(side.wrapped.source) for side in (pair.base, pair.tuned))
    change = [(b[p][2] - a[p][2])[1:] for p in range(len(ROWS))]  # behind block 1, after token 0
    one, other = (torch.cat([c for c, w in zip(change, row, strict=True) if w]).mean(0) for row in weights[1:3])
    square = torch.cat(change).square().sum(1).mean()
    assert float(result.half_cosine[2, 1]) == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-5)
    assert float(result.constant[2, 1]) == pytest.approx(float(one @ other / square), abs=1e-5)
    for i, signs in enumerate(weights[3:]):
        flipped = torch.cat([w * c for c, w in zip(change, signs, strict=True)]).mean(0)
        assert float(result.flipped[i, 2, 1]) == pytest.approx(float(flipped.norm()), rel=1e-5)
    sites, places = stream_sites(3), Places.of(pair.batch(prompts()), FIRST)
    vectors = MeanVectors.of(totals(pair, pair.batch(prompts()), sites, places, weights), weights)
    varied = torch.cat([w * (c - torch.cat(change).mean(0)) for c, w in zip(change, weights[7], strict=True)]).mean(0)
    torch.testing.assert_close(vectors.varied[4, 2, 1], varied, atol=1e-5, rtol=1e-4)
    mean = torch.cat([x[2][1:] for x in b]).mean(0)
    wanted = torch.cat([w * (x[2][1:] - mean) for x, w in zip(b, weights[7], strict=True)]).mean(0)
    torch.testing.assert_close(vectors.between[4, 2, 1], wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def biased(llama: Any) -> tuple[ModelPair, torch.Tensor, ActivationDifferenceResult]:
    """A constant is added behind block 1."""
    base, tuned = HookedModel.load(llama), HookedModel.load(llama)
    edit = planted("resid_bias", base, layer=1, scale=2.0, seed=5)
    pair = ModelPair.load(base, tuned)
    with tuned.edited(edit):
        found = activation_difference(pair, prompts(), first=FIRST, draws=2)
    return pair, edit.changes[0].value, found  # type: ignore[union-attr]


def test_a_planted_bias_is_found(biased: Any) -> None:
    _, vector, found = biased
    assert found.varied_concentration[:, 2].isnan().all()  # nothing but rounding varies between texts there
    assert found.difference[:2].abs().max() == 0 and found.relative[:2].nan_to_num(0).max() == 0
    assert bool((found.cka[:, :2, :2] - 1).abs().max() < 1e-12) and found.readout[0, :, :2].max() == -1
    for k in range(len(PLACES)):
        assert torch.cosine_similarity(found.difference[2, k], vector, dim=0) > 0.9999
    torch.testing.assert_close(found.difference[2, 1], vector, atol=1e-5, rtol=1e-5)
    # A constant changes nothing that is centred, and all of the difference is the constant.
    assert found.centred_cosine[2].nan_to_num(1).min() > 1 - 1e-6 and abs(float(found.cka[0, 2, 1]) - 1) < 1e-6
    assert float(found.constant[2, 1]) == pytest.approx(1, abs=1e-5) and float(found.half_cosine[2, 1]) == pytest.approx(1, abs=1e-6)
    assert found.relative[3, 1].nanmean() > 0.01 and 0 < float(found.constant[3, 1]) < 1
    assert float(found.flipped[:, 2, 1].mean()) < 0.8 * float(found.difference[2, 1].norm())
    assert "L2.resid_post" in found.summary() or "L1.resid_post" in found.summary()


def test_adding_the_difference_makes_base_the_tuned_model(biased: Any) -> None:
    pair, vector, found = biased
    c = found.labels["causal"].index("L1.resid_post")
    live = ~found.own_kl.isnan()
    assert found.own_kl[live].min() > 1e-3 and found.added_kl[0, c][live].max() < 1e-9
    assert float(found.moved().value[c]) == pytest.approx(1, abs=1e-6)
    assert found.added_kl[:, 0].isnan().all() and found.loss[:, 0].isnan().all()  # the models do not differ there
    with pair.base.edited(found.edit(1)):
        added = pair.base.logits(prompts())
    with pair.tuned.edited(planted("resid_bias", pair.base, layer=1, vector=vector)):
        torch.testing.assert_close(added, pair.tuned.logits(prompts()), atol=1e-4, rtol=1e-4)
        with pair.tuned.edited(found.edit("L1.resid_post", sign=-1, place="all")):
            torch.testing.assert_close(pair.tuned.logits(prompts()), pair.base.logits(prompts()), atol=1e-4, rtol=1e-4)


def plain_losses(model: Any, reference: Any, ids: list[int], layer: int, change: Any) -> tuple[float, float]:
    """Loss and KL(reference || model) with what a block gives out changed, by a hook on a plain model."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = model.model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    handle.remove()
    with torch.no_grad():
        wanted = reference(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float(cross_entropy(logits, torch.tensor(ids[1:]))), float(
        kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum")
    ) / len(logits)


def test_effects_agree_with_plain_hooks(pair: ModelPair, result: ActivationDifferenceResult) -> None:
    """Directions of one half, judged on the other, by hand: one forward per prompt."""
    base, tuned = pair.base.wrapped.source, pair.tuned.wrapped.source
    a, b = streams(base), streams(tuned)
    one = half(prompts().contexts, 0.5, 0)
    assert 0 < int(one.sum()) < len(ROWS)
    assert result.labels["way"][:3] == (TAKEN, "difference, to base's mean", "mean of base")
    for p, ids in enumerate(ROWS):
        if len(ids) == 1:
            assert result.loss[:, :, p].isnan().all() and result.own_kl[p].isnan()
            continue
        others = [q for q in range(len(ROWS)) if bool(one[q]) != bool(one[p]) and len(ROWS[q]) > 1]
        own = plain_losses(tuned, tuned, ids, 0, lambda x: x)
        assert float(result.own_loss[1, p]) == pytest.approx(own[0], abs=1e-5)
        for layer in range(3):
            shift = torch.cat([(b[q][layer + 1] - a[q][layer + 1])[1:] for q in others]).mean(0).float()
            mean = torch.cat([a[q][layer + 1][1:] for q in others]).mean(0).float()
            v, m = (torch.outer(x, x) / x.square().sum() for x in (shift, mean))
            ways = ((v, torch.zeros(24)), (v, mean @ v), (m, torch.zeros(24)))
            for w, (gone, more) in enumerate(ways):
                loss, kl = plain_losses(tuned, tuned, ids, layer, partial(lambda x, gone, more: x - x @ gone + more, gone=gone, more=more))
                assert float(result.loss[w, layer, p]) == pytest.approx(loss, abs=2e-5)
                assert float(result.kl[w, layer, p]) == pytest.approx(kl, abs=2e-5)
            _, kl = plain_losses(base, tuned, ids, layer, partial(torch.add, shift))
            assert float(result.added_kl[0, layer, p]) == pytest.approx(kl, abs=2e-5)


def test_base_against_itself_is_no_difference(pair: ModelPair) -> None:
    same = activation_difference(ModelPair.load(pair.base, HookedModel.load(pair.base.wrapped.source)), prompts(), draws=1)
    assert same.relative.nan_to_num(0).abs().max() == 0 and same.difference.abs().max() == 0
    assert (same.cosine.nan_to_num(1) == 1).all() and (same.centred_cosine.nan_to_num(1) == 1).all()
    assert (same.cka[0, :, 0] - 1).abs().max() < 1e-12 and not same.beyond
    assert same.summary().startswith("No difference beyond rounding") and same.html() is None and same.strongest() is None
    assert same.loss.isnan().all() and same.readout[0].max() == -1 and same.figures()
    with pytest.raises(InputError, match=r"do not differ at L1.resid_post"):
        same.edit(1)


def test_outliers_are_named_and_left_out(llama: Any) -> None:
    """One dimension of the embedding is made huge in both models, which makes them look alike."""
    base, tuned = copy.deepcopy(llama), shaken(llama, size=0.5)
    with torch.no_grad():
        for model in (base, tuned):
            model.model.embed_tokens.weight[:, 5] = 200 * draw(31, seed=7).float()
    got = activation_difference(ModelPair.load(base, tuned), prompts(), first=FIRST, causal=())
    assert got.outliers["L0.resid_pre"] == [5] and got.spread[0, 5] > 1e3
    x, y = (torch.cat([s[p][0] for p in range(len(ROWS))]) for s in (streams(base), streams(tuned)))
    rest = [i for i in range(24) if i != 5]
    assert float(got.cka[0, 0, 0]) > 0.999 and float(got.cka[1, 0, 0]) == pytest.approx(cka(x[:, rest], y[:, rest]), abs=1e-4)
    assert float(got.cka[1, 0, 0]) < 0.9
    assert len(got.figures()["Geometry"].data) >= 4


def test_error_of_cka_is_near_the_jackknife(llama: Any) -> None:
    rows = [torch.randint(0, 31, (5 + i % 4,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(24)]
    base, tuned = llama, shaken(llama, size=0.15)
    got = activation_difference(ModelPair.load(base, tuned), prompts(rows), causal=())
    a, b = streams(base, rows), streams(tuned, rows)
    left = []
    for out in range(len(rows)):
        x, y = (torch.cat([s[p][3] for p in range(len(rows)) if p != out]) for s in (a, b))
        left.append(cka(x, y))
    each = torch.tensor(left, dtype=torch.float64)
    jackknife = float((each - each.mean()).square().sum().mul(len(rows) - 1).div(len(rows)).sqrt())
    assert float(got.cka_se[0, 3, 0]) == pytest.approx(jackknife, rel=0.3)


def test_prompts_of_one_context_are_one(pair: ModelPair) -> None:
    """Every prompt twice is no new evidence: same means, same errors."""
    once = activation_difference(pair, prompts(), first=FIRST, causal=())
    twice = activation_difference(pair, prompts([*ROWS, *ROWS], contexts=tuple(map(str, ROWS)) * 2), first=FIRST, causal=())
    one, two = once.to_frame(), twice.to_frame()
    for name, close in (("relative", 1e-5), ("relative_se", 1e-5), ("constant", 1e-5), ("cka_se", 0.3)):
        # Pairs of equal tokens count in CKA itself.
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(one[name]), atol=1e-6, rtol=close, equal_nan=True)


def test_batches_change_nothing(pair: ModelPair, result: ActivationDifferenceResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BYTES", 1)  # one site at a time
    monkeypatch.setattr(pair.base._budget, "size", 1)  # and one prompt
    again = activation_difference(pair, prompts(), first=FIRST, causal=(2,), draws=2)
    for name in ("relative", "cosine", "centred_cosine", "cka", "cka_se", "spread", "difference", "constant"):
        torch.testing.assert_close(getattr(again, name), getattr(result, name), atol=1e-5, rtol=1e-4, equal_nan=True)
    for name in ("loss", "kl", "added_kl"):
        torch.testing.assert_close(getattr(again, name)[:, 0], getattr(result, name)[:, 2], atol=1e-5, rtol=1e-4, equal_nan=True)


def test_places_in_a_chat(pair: ModelPair) -> None:
    response, template = ((4,), (1,), (0,), (2,), (3,), (2,), (3,)), ((2, 3), (), (), (1,), (2,), (), ())
    named = prompts(positions={"response": response, "template": template})
    places = Places.of(pair.batch(named), 2)
    assert places.parts == ("token 0", "first 2", "later", "prompt", "template")
    assert [places.parts[i] for i in places.part[0]] == ["token 0", "prompt", "template", "template", "first 2", "first 2", *["later"] * 3]
    assert places.names[:2] == ("all", "after token 0") and places.members[1].tolist() == [False, True, True, True, True]
    got = activation_difference(pair, named, first=2, causal=())
    assert got.to_frame().set_index(["site", "place"]).tokens["L0.resid_pre", "template"] == 4


def test_a_first_token_that_every_text_has_does_not_vary(pair: ModelPair) -> None:
    same = activation_difference(pair, prompts([[1, *row] for row in ROWS]), first=FIRST, causal=())
    k = same.labels["place"].index("token 0")
    assert same.cka[0, :, k].isnan().all() and same.centred_cosine[:, k].isnan().all() and not same.relative[:, k].isnan().any()
    assert not same.cka[0, :, 0].isnan().any() and same.figures()


def test_two_texts(pair: ModelPair) -> None:
    """Signs drawn alike leave no direction between texts; such a draw says nothing, and the others do."""
    few = activation_difference(pair, prompts(ROWS[3:5]), first=FIRST, causal=(1,), draws=4)
    dead = few.loss[7:, 0].isnan().all(1)
    assert 0 < int(dead.sum()) < 4 and not few.loss[:7].isnan().any()
    assert "nan" not in few.summary() and few.figures() and few.html()
    assert few.strongest()["control_low"].notna().all()  # type: ignore[index]


def test_one_prompt_of_one_token(pair: ModelPair) -> None:
    tiniest = activation_difference(pair, prompts([[5]]))
    assert tiniest.labels["place"] == ("token 0",) and tiniest.place == "token 0" and tiniest.half_cosine.isnan().all()
    assert "not measured" in tiniest.summary() and tiniest.figures() and tiniest.html() and len(tiniest.to_frame(per="prompt")) == 4


def test_more_token_ids_in_the_tuned_model(llama: Any) -> None:
    tuned = shaken(llama)
    larger = tiny("llama", seed=9, vocab_size=34)
    with torch.no_grad():
        for (name, to), source in zip(larger.named_parameters(), tuned.parameters(), strict=True):
            if "embed" in name or "lm_head" in name:
                to[:31] = source
            else:
                to.copy_(source)
    narrow, wide = (activation_difference(ModelPair.load(llama, m), prompts(), first=FIRST, causal=(1,), draws=1) for m in (tuned, larger))
    assert (narrow.shared, wide.shared) == (31, 31) and wide.readout.max() < 31
    for name in ("relative", "cka", "score", "loss", "own_kl"):
        torch.testing.assert_close(getattr(wide, name), getattr(narrow, name), atol=1e-5, rtol=1e-4, equal_nan=True)


def test_half_precision(llama: Any) -> None:
    base = copy.deepcopy(llama).bfloat16()
    got = activation_difference(ModelPair.load(base, shaken(base, size=0.2)), prompts(), causal=(1,), draws=1)
    assert 1e-4 < float(got.floor[0].max()) < 0.05 and got.beyond and not got.lacking
    assert got.difference.dtype == torch.float32 and not got.relative[:, 0].isnan().any()


def test_effects_that_were_not_measured(pair: ModelPair) -> None:
    """No site was asked for, or there are no two halves of one text."""
    for none in (activation_difference(pair, prompts(), causal=()), activation_difference(pair, prompts(ROWS[:1]))):
        frame = none.effects()
        assert len(frame) == 0 and list(frame) == ["site", "way", "loss_change", "loss_change_se", "kl"]
        shares = none.moved()
        assert len(shares.value) == len(none.labels["causal"]) and shares.value.isnan().all() and shares.refused
        assert none.strongest() is None and none.undone() is None and not none.measured and none.figures()
        assert "what the shift does was not measured" in none.summary()


def test_one_text_has_no_interval(pair: ModelPair) -> None:
    one = activation_difference(pair, prompts(ROWS[:1])).summary()
    assert "1 text, so no interval" in one and "1 texts" not in one and "nan" not in one
    shared = activation_difference(pair, prompts(ROWS[:2], contexts=("a", "a"))).summary()
    assert "1 context of 2 texts, so no interval" in shared and "nan" not in shared


def synthetic(result: ActivationDifferenceResult, *, effect: float, noise: float, control: float, gone: float) -> Any:
    """A result of 12 texts whose effects at three sites are planted: at the last one ``effect``, elsewhere a tenth of it."""
    n, far = 12, torch.tensor([0.1, 0.1, 1.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(3)
    shake = torch.randn(n, generator=g, dtype=torch.float64)
    shake = (shake - shake.mean()) / shake.std() * noise * n**0.5  # s.e. of the mean is exactly the noise
    ways, added = len(result.labels["way"]), len(result.labels["added"])
    loss = 3 + control * torch.ones(ways, 3, n, dtype=torch.float64)
    loss[0] = 3 + effect * far[:, None] + shake
    kl = torch.ones(added, 3, n, dtype=torch.float64)
    kl[0] = 1 - gone * far[:, None] + shake
    k = dict(relative=result.relative[..., :1].expand(-1, -1, n), tokens=torch.full((5, n), 4), group=torch.arange(n))
    own = dict(own_loss=torch.full((2, n), 3.0).double(), own_kl=torch.ones(n).double(), loss=loss, kl=loss - 3, added_kl=kl)
    return replace(result, **k, **own)


def test_more_than_controls_is_said_beyond_noise_alone(result: ActivationDifferenceResult) -> None:
    same = dict(gone=0.5)
    assert "nats per token, more than control directions" in synthetic(result, effect=0.5, noise=0.02, control=0.01, **same).summary()
    noisy = synthetic(result, effect=0.08, noise=0.091, control=0.01, **same)
    assert "+0.08 +- 0.091 nats per token, within the noise between texts no more than control directions" in noisy.summary()
    # Both are far above 0, and what they differ by is not.
    near = synthetic(result, effect=0.5, noise=0.02, control=0.49, **same)
    assert "within the noise between texts no more than control" in near.summary()
    assert "token, no more than control directions" in synthetic(result, effect=0.1, noise=0.001, control=-0.3, **same).summary()
    # Losses fall here, and the control's falls less.
    assert "token, more than control" in synthetic(result, effect=-0.5, noise=0.02, control=0.1, **same).summary()


def test_where_the_shift_undoes_tuning(result: ActivationDifferenceResult, biased: Any) -> None:
    clear = synthetic(result, effect=0.5, noise=0.02, control=0.0, gone=0.6)
    site, share = clear.undone()
    assert site == result.labels["causal"][2] and float(share.value) == pytest.approx(0.6) and 0.5 < float(share.low) < 0.6
    assert f"adding it to base at {site} leaves 40 [" in clear.summary()
    # A control does as much; then nothing does anything beyond noise.
    likewise = replace(clear, added_kl=torch.cat([clear.added_kl[:1], clear.added_kl[:1], clear.added_kl[2:]]))
    assert likewise.undone() is None and "undoes no clear share of KL(tuned || base)" in likewise.summary()
    assert synthetic(result, effect=0.5, noise=0.1, control=0.0, gone=0.1).undone() is None
    assert synthetic(result, effect=0.5, noise=0.02, control=0.0, gone=-0.6).undone() is None
    assert biased[2].undone()[0] == "L1.resid_post" and float(biased[2].undone()[1].value) == pytest.approx(1, abs=1e-6)


def test_what_overflows_is_said(pair: ModelPair) -> None:
    broken = Edit((ActivationChange(Site("resid_post", 1), "add", torch.full((24,), torch.inf)),))
    with pair.tuned.edited(broken), pytest.raises(InputError, match=r"L1.resid_post of tuned .* is not finite"):
        activation_difference(pair, prompts(), causal=())


def test_tables_and_sentence(result: ActivationDifferenceResult) -> None:
    frame = result.to_frame()
    assert len(frame) == 4 * 5 and {"relative", "relative_se", "floor", "cka", "cka_without_outliers", "half_cosine"} <= set(frame)
    tokens = result.to_frame(per="prompt")
    row = tokens[(tokens.site == "L1.resid_post") & (tokens.place == "all")]
    mean = float((row.relative * row.tokens).sum() / row.tokens.sum())
    assert mean == pytest.approx(float(frame.set_index(["site", "place"]).relative["L1.resid_post", "all"]), rel=1e-6)
    strongest = result.strongest()
    assert strongest is not None and len(strongest) == 3 and strongest.effect.abs().is_monotonic_decreasing
    assert len(result.effects()) == 3 * len(result.labels["way"])
    text = result.summary()
    assert text.startswith("The residual streams differ by up to ") and "\n" not in text and "+-" in text
    with pytest.raises(InputError, match="per must be 'prompt'"):
        result.to_frame(per="token")


def test_what_is_read_out_is_escaped(result: ActivationDifferenceResult) -> None:
    evil = replace(result, vocabulary={k: f"<script>{k}</script>" for k in result.vocabulary})
    page = evil.html()
    assert page and "<script>" not in page and "&lt;script&gt;" in page


def test_round_trip(tmp_path: Any, result: ActivationDifferenceResult) -> None:
    again = ActivationDifferenceResult.load(result.save(tmp_path / "r"))
    assert again.summary() == result.summary() and again.vocabulary == result.vocabulary
    assert torch.equal(again.edit(2).changes[0].value, result.edit(2).changes[0].value)  # type: ignore[union-attr]


def test_edits(result: ActivationDifferenceResult) -> None:
    (change,) = result.edit(2, sign=-1, scale=0.5, place="later", position="END").changes
    assert change.site == Site("resid_post", 2, None, "END")  # type: ignore[union-attr]
    torch.testing.assert_close(change.value, -0.5 * result.difference[3, 4])  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"L3.resid_post"):
        result.edit(3)
    with pytest.raises(InputError, match="place"):
        result.edit(1, place="middle")
    with pytest.raises(InputError, match="sign is 1"):
        result.edit(1, sign=2)  # type: ignore[arg-type]


def test_refusals(pair: ModelPair, llama: Any) -> None:
    with pytest.raises(InputError, match="first must be a whole number of at least 1, but it is 0"):
        activation_difference(pair, prompts(), first=0)
    with pytest.raises(InputError, match="causal names layers, 0 to 2, but it has 3"):
        activation_difference(pair, prompts(), causal=(0, 3))
    with pytest.raises(InputError, match="prompt 0 has 20 tokens"):
        activation_difference(pair, prompts([[3] * 20]))
    with pytest.raises(InputError, match="one text at a time"):
        activation_difference(pair, PromptPairs(prompts(), prompts()))  # type: ignore[arg-type]
