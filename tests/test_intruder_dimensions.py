"""Intruder dimensions: planted ones, none where none are, the literal definition on plain tensors, and what scaling them does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import FOUR, saved, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

import interp
from interp import linalg
from interp.analyses.intruder_dimensions import IntruderDimensionsResult, intruder_dimensions
from interp.analyses.intruder_scaling import _others, intruder_scaling, losses
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import HookedModel, ModelPair, weights
from interp.models.intruders import Settings, intruders, overlap
from interp.organisms import planted
from interp.sites import Site

LARGER = {"hidden_size": 192, "intermediate_size": 264, "num_hidden_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 192, "n_inner": 264, "n_layer": 2},
    "llama": {**LARGER, "head_dim": 56},
    "qwen2": LARGER,
    "neox": LARGER,
}
HEADS = 4


def plain_matrix(hf: Any, kind: str, layer: int, module: str) -> Tensor:
    """A matrix as x @ W, a view into the plain model, by the layout that Hugging Face documents; [in, head, d_head] for GPT-NeoX's QKV."""
    if kind == "gpt2":
        block = hf.transformer.h[layer]
        if module in ("W_Q", "W_K", "W_V"):
            return block.attn.c_attn.weight.split(block.attn.c_proj.weight.shape[0], dim=1)[("W_Q", "W_K", "W_V").index(module)]
        return {"W_O": block.attn.c_proj, "W_in": block.mlp.c_fc, "W_out": block.mlp.c_proj}[module].weight
    if kind == "neox":
        block = hf.gpt_neox.layers[layer]
        if module in ("W_Q", "W_K", "W_V"):
            fused = block.attention.query_key_value.weight
            return fused.unflatten(0, (HEADS, 3, -1))[:, ("W_Q", "W_K", "W_V").index(module)].permute(2, 0, 1)
        return {"W_O": block.attention.dense, "W_in": block.mlp.dense_h_to_4h, "W_out": block.mlp.dense_4h_to_h}[module].weight.T
    block = hf.model.layers[layer]
    attention, mlp = block.self_attn, block.mlp
    names = {"W_Q": attention.q_proj, "W_K": attention.k_proj, "W_V": attention.v_proj, "W_O": attention.o_proj}
    return (names | {"W_in": mlp.up_proj, "W_gate": mlp.gate_proj, "W_out": mlp.down_proj})[module].weight.T


def modules(kind: str) -> tuple[str, ...]:
    return tuple(m for m in weights.MODULES if m != "W_gate" or kind in ("llama", "qwen2"))


def realistic(kind: str) -> Any:
    """A model whose matrices have falling singular values, as trained ones do."""
    hf = tiny(kind, **SIZES[kind])
    with torch.no_grad():
        for layer in range(2):
            for module in modules(kind):
                view = plain_matrix(hf, kind, layer, module)
                u, s, vh = torch.linalg.svd(view.reshape(view.shape[0], -1), full_matrices=False)
                fall = s[0] * torch.arange(1, len(s) + 1) ** -0.4
                view.copy_(((u * fall) @ vh).reshape(view.shape))
    return hf


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: saved(realistic(kind), root / kind) for kind in FOUR}


def with_plant(base: Path, folder: Path, kind: str = "rank1", **settings: Any) -> ModelPair:
    model = HookedModel.load(base)
    model.save(folder, edit=planted(kind, model, **settings))
    return ModelPair.load(base, folder)


def tenth(base: Path, layer: int, module: str) -> float:
    return float(torch.linalg.svdvals(HookedModel.load(base).weight(Site(module, layer)))[9])


def found_in(result: IntruderDimensionsResult) -> list[str]:
    table = result.to_frame()
    return [name for name, n in zip(table.weight, table.intruders, strict=True) for _ in range(n) if "H" not in name]


# ------------------------------------------------------------------------------------------ finding them


@pytest.mark.parametrize("kind", FOUR)
def test_one_planted_direction_is_one_intruder_in_its_matrix(kind, bases, tmp_path) -> None:
    """One of the matrices that may be fused, alone; then all others of the layer, one direction each.

    No law: of 24 single plants of three times the tenth singular value, with other seeds, 23 gave exactly one intruder; the literal
    definition says the same of the one that did not.
    """
    base, names = HookedModel.load(bases[kind]), modules(kind)
    for i, planted_in in enumerate((["W_K"], [m for m in names if m != "W_K"])):
        edits = [planted("rank1", base, layer=1, module=m, sigma=3 * tenth(bases[kind], 1, m)) for m in planted_in]
        pair = ModelPair.load(bases[kind], base.save(tmp_path / str(i), edit=sum(edits[1:], edits[0])))
        result = intruder_dimensions(pair, draws=1)
        for side in ("write", "read", "both"):
            assert found_in(replace(result, side=side)) == [f"L1.{m}" for m in planted_in], side
            assert int(replace(result, side=side).windowed.sum()) == len(planted_in)
        assert not bool(result.chance_count.any()) and not bool(result.delta_sigma[0].any())
        for module, edit in zip(planted_in, edits, strict=True):
            change, at, sigma = edit.weights[0], names.index(module), 3 * tenth(bases[kind], 1, module)
            (j,) = result.intruder[1, at].nonzero().flatten().tolist()
            assert abs(float(change.right[0] @ result.right[f"L1.{module}"][j])) > 0.9
            assert abs(float(change.left[:, 0] @ result.left[f"L1.{module}"][:, j])) / sigma > 0.9
            assert float(result.ratio[1, at]) == pytest.approx(3, rel=1e-4)
        n = len(planted_in)
        told = f"{n} intruder dimension{'s' * (n > 1)} (random changes of the same norm: 0, 0 to 0 in 1 draws)"
        assert result.summary().startswith(told) and set(result.strongest(n).weight) == set(found_in(result))
        assert bool(result.strongest(n).intruder.all()) and not bool(result.strongest(n + 1).intruder[n])


@pytest.mark.parametrize("kind", FOUR)
def test_a_planted_direction_in_one_head_is_seen_in_that_head(kind, bases, tmp_path) -> None:
    model = HookedModel.load(bases[kind])
    for circuit, module, side in (("ov", "W_O", "write"), ("qk", "W_Q", "read")):
        sigma = 4 * float(torch.linalg.svdvals(model.weight(Site(module, 1, 2)))[0])
        pair = with_plant(bases[kind], tmp_path / module, layer=1, module=module, sigma=sigma, head=2)
        result = intruder_dimensions(pair, k=4, side=side)
        at = {"ov": 0, "qk": 1}
        assert result.head_intruder[at[circuit]].nonzero()[:, :2].tolist() == [[1, 2]]
        assert not bool(result.head_intruder[1 - at[circuit]].any())
        assert not bool(result._intruders(result.head_chance)[:, 1 - at[circuit]].any())
        others = [(layer, h) for layer in range(2) for h in range(HEADS) if (layer, h) != (1, 2)]
        assert all(bool((result.head_cosine[at[circuit], layer, h] == 1).all()) for layer, h in others), (
            "untouched heads are exactly base's"
        )


@pytest.mark.parametrize("kind", FOUR)
def test_dense_noise_and_no_change_make_none(kind, bases, tmp_path) -> None:
    noisy = intruder_dimensions(with_plant(bases[kind], tmp_path / "noisy", "dense", rel=0.03), draws=1)
    assert found_in(noisy) == [] and not bool(noisy.chance_count.any()) and float(noisy.change.min()) == pytest.approx(0.03, rel=1e-3)
    assert "0 intruder dimensions" in noisy.summary() and noisy.edit(0).changes == ()
    same = intruder_dimensions(ModelPair.load(bases[kind], bases[kind]), draws=1)
    assert found_in(same) == [] and bool((same.cosine == 1).all()) and bool((same.head_cosine == 1).all())
    assert bool((same.chance == 1).all()) and bool((same.match[..., 0] == torch.arange(10)).all())
    assert not bool(same.change.any() or same.delta_sigma.any() or same.head_delta_sigma.any()) and same.left == {}
    assert len(same.figures()) >= 4 and len(same.strongest()) == 10


@pytest.mark.parametrize("kind", FOUR)
def test_every_number_is_the_literal_one(kind, bases, tmp_path) -> None:
    """Plain tensors in float64, one line per definition; the products of heads are formed."""
    pair = with_plant(bases[kind], tmp_path / "t", "dense", rel=0.4)
    k, window = 7, 3
    result = intruder_dimensions(pair, k=k, window=window, draws=0)
    one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (bases[kind], tmp_path / "t"))

    def both(layer: int, module: str) -> list[np.ndarray]:
        parts = [plain_matrix(hf, kind, layer, module).detach() for hf in (one, two)]
        return [x.reshape(len(x), -1).double().numpy() for x in parts]

    def check(w0: np.ndarray, w1: np.ndarray, rank: int, of: dict[str, Tensor], tol: float) -> None:
        u, s, vh = np.linalg.svd(w0, full_matrices=False)
        a, t, bh = np.linalg.svd(w1, full_matrices=False)
        for j in range(k):
            for side, (new, old) in enumerate(((a[:, j], u[:, :rank].T), (bh[j], vh[:rank]))):
                cosines = np.abs(old @ new)
                near = [cosines[i] ** 2 for i in range(rank) if abs(i - j) <= window]
                assert float(of["cosine"][j, side]) == pytest.approx(max(cosines), abs=tol)
                assert float(of["inside"][j, side]) == pytest.approx(math.sqrt(sum(near)), abs=tol)
                if "match" in of:
                    assert int(of["match"][j, side]) == int(np.argmax(cosines))
        np.testing.assert_allclose(of["sigma"], t[:k], rtol=1e-5)
        np.testing.assert_allclose(of["base_sigma"], s[:k], rtol=1e-5)
        assert float(of["delta_sigma"]) == pytest.approx(np.linalg.svd(w1 - w0, compute_uv=False)[0], rel=1e-5)

    for layer in range(2):
        for m, module in enumerate(modules(kind)):
            w0, w1 = both(layer, module)
            fields = ("cosine", "inside", "match", "sigma", "base_sigma", "delta_sigma")
            check(w0, w1, min(w0.shape), {f: getattr(result, f)[layer, m] for f in fields}, 1e-5)
            assert float(result.change[layer, m]) == pytest.approx(np.linalg.norm(w1 - w0) / np.linalg.norm(w0), rel=1e-5)
            flags = result.cosine[layer, m, :, 1] < 0.5
            assert float(result.energy[layer, m]) == pytest.approx(
                float((result.sigma[layer, m][flags] ** 2).sum()) / np.linalg.norm(w1) ** 2, rel=1e-5, abs=1e-12
            )
        for head in range(HEADS):
            q, key, v, o = (both(layer, m) for m in ("W_Q", "W_K", "W_V", "W_O"))
            width = pair.shape.d_head
            kv = head // (HEADS // pair.shape.n_kv_heads)
            here, there = slice(head * width, (head + 1) * width), slice(kv * width, (kv + 1) * width)
            ov = [a[:, there] @ b[here] for a, b in zip(v, o, strict=True)]
            qk = [a[:, here] @ b[:, there].T for a, b in zip(q, key, strict=True)]
            for c, (w0, w1) in enumerate((ov, qk)):
                fields = {
                    f: getattr(result, f"head_{f}")[c, layer, head] for f in ("cosine", "inside", "sigma", "base_sigma", "delta_sigma")
                }
                check(w0, w1, width, fields, 1e-5)
    assert int(result.count.sum()) == len(found_in(result))


def test_large_matrices_by_iteration(bases, tmp_path) -> None:
    sigma = 3 * tenth(bases["llama"], 0, "W_in")
    pair = with_plant(bases["llama"], tmp_path / "t", layer=0, module="W_in", sigma=sigma)
    whole, top = (intruder_dimensions(pair, exact=exact, draws=1) for exact in (1024, 16))
    assert bool(whole.exact.all()) and not bool(top.exact.any())
    torch.testing.assert_close(top.sigma, whole.sigma, rtol=1e-3, atol=0)
    torch.testing.assert_close(top.cosine, whole.cosine, rtol=0, atol=0.02)
    assert found_in(top) == found_in(whole) == ["L0.W_in"]


def test_overlap_by_hand() -> None:
    """Base has e0, e1, e2; tuned's first vector lies between e0 and e2, its second is e1, on both sides."""
    eye = torch.eye(3, dtype=torch.float64)
    turned = torch.stack([(eye[0] + eye[2]) / math.sqrt(2), eye[1], (eye[0] - eye[2]) / math.sqrt(2)])
    base = linalg.SVD(eye, torch.tensor([3.0, 2, 1]), eye)
    found = overlap(base, linalg.SVD(turned.T, base.S, turned), Settings(2, window=1))
    torch.testing.assert_close(found.cosine, torch.tensor([[0.5**0.5] * 2, [1, 1]], dtype=torch.float64))
    assert found.inside[0].tolist() == pytest.approx([0.5**0.5] * 2) and found.match[1].tolist() == [1, 1]
    assert overlap(base, linalg.SVD(turned.T, base.S, turned), Settings(2, window=2)).inside[0].tolist() == pytest.approx([1, 1])
    cosine = torch.tensor([[0.4, 0.6], [0.6, 0.4], [0.4, 0.4], [0.5, 0.5]])  # read, write
    assert [intruders(cosine, 0.5, side).tolist() for side in ("read", "write", "both")] == [
        [True, False, True, False],
        [False, True, True, False],
        [False, False, True, False],
    ]


def test_an_adapter_gives_what_its_merged_model_gives(tmp_path) -> None:
    pair = ModelPair.load("base", "boxes-lora")
    factors = intruder_dimensions(pair, draws=0, threshold=0.6)
    pair.tuned.save(tmp_path / "merged")
    merged = intruder_dimensions(ModelPair.load("base", tmp_path / "merged"), draws=0, threshold=0.6)
    assert torch.equal(factors.intruder, merged.intruder) and torch.equal(factors.head_intruder, merged.head_intruder)
    assert int(factors.count.sum()) > 3, "there is something to compare"
    torch.testing.assert_close(factors.cosine, merged.cosine, rtol=0, atol=2e-3)
    torch.testing.assert_close(factors.delta_sigma, merged.delta_sigma, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors.head_delta_sigma, merged.head_delta_sigma, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- as an edit


def test_strength_one_changes_nothing_and_zero_takes_a_plant_out(bases, tmp_path) -> None:
    base = HookedModel.load(bases["neox"])
    for module in ("W_K", "W_out"):
        whole = base.weight(Site(module, 1)).clone()
        # Base without 80 directions on either side, the planted ones among them: the plant is a singular vector of tuned, exactly.
        change = planted("rank1", base, layer=1, module=module, sigma=1.0).weights[0]
        draws = torch.Generator().manual_seed(0)
        u, v = (torch.linalg.qr(torch.cat([x, torch.randn(len(x), 79, generator=draws)], 1)).Q for x in (change.left, change.right.T))
        hole = whole - u @ (u.T @ whole)
        hole = hole - (hole @ v) @ v.T
        holed = HookedModel.load(base.save(tmp_path / f"{module} base", edit=Edit((WeightChange(Site(module, 1), hole - whole),))))
        sigma = 3 * tenth(holed.checkpoint.path, 1, module)
        pair = with_plant(holed.checkpoint.path, tmp_path / f"{module} tuned", layer=1, module=module, sigma=sigma)
        result = intruder_dimensions(pair, draws=0)
        assert found_in(result) == [f"L1.{module}"]
        before = pair.tuned.logits([[3, 4, 5, 6]])
        with pair.tuned.edited(result.edit(1)):
            assert torch.equal(pair.tuned.logits([[3, 4, 5, 6]]), before)
        with pair.tuned.edited(result.edit(0)):
            left = pair.tuned.weight(Site(module, 1)) - pair.base.weight(Site(module, 1))
            assert float(left.norm()) < 1e-5 * sigma, "rounding to float32, ten times, is all that is left"
            torch.testing.assert_close(pair.tuned.logits([[3, 4, 5, 6]]), pair.base.logits([[3, 4, 5, 6]]), rtol=0, atol=1e-4)
        with pair.tuned.edited(result.edit(0.25)):
            left = pair.tuned.weight(Site(module, 1)) - pair.base.weight(Site(module, 1))
            torch.testing.assert_close(left, 0.25 * sigma * change.left @ change.right, rtol=0, atol=1e-5 * sigma)
        assert torch.equal(pair.tuned.logits([[3, 4, 5, 6]]), before)


def test_what_is_left_of_any_plant_is_bounded(bases, tmp_path) -> None:
    """A plant that is not orthogonal to base mixes with it: by no more than r / gap (Wedin), r what base makes of its directions."""
    base = HookedModel.load(bases["gpt2"])
    w = base.weight(Site("W_V", 0))
    sigma = 3 * float(torch.linalg.svdvals(w)[0])
    pair = with_plant(bases["gpt2"], tmp_path / "t", layer=0, module="W_V", sigma=sigma)
    change = planted("rank1", base, layer=0, module="W_V", sigma=1.0).weights[0]
    with pair.tuned.edited(intruder_dimensions(pair, draws=0).edit(0)):
        now = pair.tuned.weight(Site("W_V", 0))
    r = max(float((w @ change.right[0]).norm()), float((change.left[:, 0] @ w).norm()))
    top = float(torch.linalg.svdvals(w)[0])
    assert float((now - w).norm()) < r + 2 * (sigma + r) * r / (sigma - top) < float((pair.tuned.weight(Site("W_V", 0)) - w).norm())
    assert float(torch.linalg.svdvals(now)[0]) <= top * (1 + 1e-5), "with its first component gone nothing is larger than base's largest"


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_intruders_of_heads_are_scaled_alone(kind, bases, tmp_path) -> None:
    model = HookedModel.load(bases[kind])
    for circuit, module, side in (("ov", "W_O", "write"), ("qk", "W_Q", "read")):
        sigma = 4 * float(torch.linalg.svdvals(model.weight(Site(module, 1, 3)))[0])
        pair = with_plant(bases[kind], tmp_path / module, layer=1, module=module, sigma=sigma, head=3)
        result = intruder_dimensions(pair, k=4, side=side, draws=0)

        def spectrum(head: int, circuit: str = circuit, pair: ModelPair = pair) -> Tensor:
            a, b = pair.tuned.ov(1, head) if circuit == "ov" else pair.tuned.qk(1, head)
            return torch.linalg.svdvals((a @ (b if circuit == "ov" else b.T)).double())

        before = [spectrum(h) for h in range(HEADS)]
        (j,) = result.head_intruder[("ov", "qk").index(circuit), 1, 3].nonzero().flatten().tolist()
        with pair.tuned.edited(result.edit(0, of=circuit)):
            after = [spectrum(h) for h in range(HEADS)]
        want = torch.cat([before[3][:j], before[3][j + 1 :], torch.zeros(1)])
        torch.testing.assert_close(after[3], want.double(), rtol=0, atol=1e-4 * float(before[3][0]))
        assert all(torch.equal(after[h], before[h]) for h in range(3)), "a shared key/value head is not touched"


# ------------------------------------------------------------------------------------------------ scaling


@pytest.fixture(scope="module")
def lora() -> SimpleNamespace:
    pair = ModelPair.load("base", "boxes-lora")
    prompts = interp.task("boxes").generate(pair, n=10, seed=0)
    text = interp.task("plain_text").generate(pair, n=4, seed=0)
    more = {"factors": (0.0, 1.0, 1.5), "threshold": 0.6, "draws": 2, "seed": 3}
    return SimpleNamespace(pair=pair, prompts=prompts, text=text, more=more, found=intruder_scaling(pair, prompts, text, **more))


def test_scaling_is_the_literal_loop(lora, tmp_path) -> None:
    """Plain models with their weights changed by hand."""
    found, dims = lora.found, intruder_dimensions(lora.pair, threshold=0.6, draws=0)
    lora.pair.tuned.save(tmp_path / "merged")
    n = int(dims.count.sum())
    assert found.counts == (n,) * 5 and n > 3 and len(found.where) == n
    for f, g in enumerate((0.0, 1.0, 1.5)):
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
        with torch.no_grad():
            for layer in range(4):
                for m, module in enumerate(dims.labels["module"]):
                    view = plain_matrix(hf, "llama", layer, module)
                    u, s, vh = np.linalg.svd(view.double().numpy(), full_matrices=False)
                    for j in dims.intruder[layer, m].nonzero().flatten().tolist():
                        view += torch.tensor((g - 1) * s[j] * np.outer(u[:, j], vh[j])).float()
            for i, (ids, answer) in enumerate(zip(lora.prompts.clean.ids, lora.prompts.answers, strict=True)):
                logits = hf(torch.tensor([ids])).logits[0, -1].double()
                others = torch.cat([logits[:answer], logits[answer + 1 :]])
                assert float(found.margin[0, f, i]) == pytest.approx(float(logits[answer] - others.max()), abs=2e-3)
            for i, ids in enumerate(lora.text.ids):
                assert float(found.loss[0, f, i]) == pytest.approx(
                    float(hf(torch.tensor([ids]), labels=torch.tensor([ids])).loss), abs=2e-4
                )
    assert float((found.margin[0, 0] - found.tuned_margin).abs().max()) > 0.1, "it did something"


def test_low_precision_is_said(lora, bases) -> None:
    half = HookedModel.load(realistic("llama").bfloat16())
    pair = ModelPair(half, HookedModel.load(realistic("llama").bfloat16()))
    said = "weights are bfloat16; they are taken apart in float32 or float64"
    assert intruder_dimensions(pair, draws=0).notes == (said,) and intruder_dimensions(pair, draws=0).summary().endswith(said)
    one = ModelPair(HookedModel.load(realistic("llama")), half)
    assert intruder_dimensions(one, draws=0).notes == (f"tuned: {said}",)
    assert intruder_dimensions(lora.pair, draws=0).notes == () == lora.found.notes
    assert said in replace(lora.found, notes=(said,)).summary()


def test_one_draw_has_no_extent(lora) -> None:
    several = lora.found.plot()
    kept = [i for i, name in enumerate(lora.found.conditions) if name in ("intruders", "others 1", "random 1")]
    one = replace(
        lora.found,
        margin=lora.found.margin[kept],
        loss=lora.found.loss[kept],
        counts=tuple(lora.found.counts[i] for i in kept),
        labels={"condition": tuple(lora.found.conditions[i] for i in kept)},
    ).plot()
    bands = [sum(trace.fill == "toself" for trace in figure.data) for figure in (several, one)]
    assert bands == [3, 1] and "extent" not in str([trace.name for trace in one.data])


def test_factor_one_is_tuned_and_the_table_says_what_changed(lora) -> None:
    found = lora.found
    assert all(torch.equal(found.margin[c, 1], found.tuned_margin) and torch.equal(found.loss[c, 1], found.tuned_loss) for c in range(5))
    torch.testing.assert_close(found.base_loss, losses(lora.pair.base, lora.text), rtol=0, atol=0)
    frame = found.to_frame()
    assert len(frame) == 15 and len(found.to_frame("prompt")) == 150 and list(found.conditions) == frame.condition.unique().tolist()
    ones = frame[frame.factor == 1]
    assert not ones[["right_change", "right_change_low", "margin_change", "loss_change_high"]].to_numpy().any() and set(ones.loss_p) == {1}
    row = frame[(frame.condition == "intruders") & (frame.factor == 0)].iloc[0]
    assert row.margin_change == pytest.approx(float((found.margin[0, 0] - found.tuned_margin).mean()))
    assert row.right_change == pytest.approx(float((found.margin[0, 0] > 0).double().mean() - (found.tuned_margin > 0).double().mean()))
    assert "intruder dimensions of tuned are made 0 times as strong" in found.summary() and "in 2 draws" in found.summary()
    assert set(found.strongest().condition) == set(found.conditions) and len(found.figures()) == 3


def test_controls_are_as_many_in_the_same_matrices_where_there_are_enough() -> None:
    a, b, c = (Site("W_in", layer) for layer in range(3))
    flags = {
        a: torch.tensor([True, False, False, False]),
        b: torch.tensor([True, True, True, False]),
        c: torch.tensor([False] * 4),
    }
    for draw in range(20):
        chosen = _others(flags, 0, draw)
        assert sum(int(f.sum()) for f in chosen.values()) == 4 and not any(bool((chosen[s] & flags[s]).any()) for s in flags)
        assert int(chosen[a].sum()) >= 1 and int(chosen[b].sum()) == 1
    assert len({str(_others(flags, 0, d)) for d in range(20)}) > 3
    full = {a: torch.tensor([True, True, True, False])}
    assert int(_others(full, 0, 0)[a].sum()) == 1, "as many as there are"


# ----------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_in_one_sentence(bases, lora) -> None:
    pair, same = lora.pair, ModelPair.load(bases["gpt2"], bases["gpt2"])
    for wrong, settings, said in (
        (pair, {"k": 121}, "k is 121, expected 1 to 64"),
        (pair, {"k": 0}, "k is 0, expected 1 to 64"),
        (pair, {"threshold": 0}, "threshold is 0, expected a cosine above 0 and at most 1"),
        (pair, {"threshold": 1.1}, "threshold is 1.1"),
        (pair, {"threshold": math.nan}, "threshold is nan"),
        (pair, {"side": "left"}, "side is 'left', expected write, read or both"),
        (pair, {"draws": -1}, "draws is -1"),
        (pair.base, {}, "compares two models: pair is a ModelPair"),
    ):
        with pytest.raises(InputError, match=said):
            intruder_dimensions(wrong, **settings)
        if "k" not in settings:
            with pytest.raises(InputError, match=said):
                intruder_scaling(wrong, lora.prompts, lora.text, **settings)
    result = intruder_dimensions(same, draws=0)
    for strength, of, said in ((math.inf, "matrices", "strength is inf"), (1, "heads", "of is 'heads', expected matrices, ov or qk")):
        with pytest.raises(InputError, match=said):
            result.edit(strength, of=of)
    with pytest.raises(InputError, match="nothing here is per prompt"):
        result.to_frame("prompt")
    for factors in ((), (0, 0), (0, math.nan), ("a",)):
        with pytest.raises(InputError, match="factors are different finite numbers"):
            intruder_scaling(pair, lora.prompts, lora.text, factors=factors)
    with pytest.raises(InputError, match="boxes-tuned has no intruder dimension .k = 10, .cos. < 0.5, side write., so there is nothing"):
        intruder_scaling(ModelPair.load("base", "boxes-tuned"), lora.prompts, lora.text)
    with pytest.raises(InputError, match="text 1 has one token only"):
        intruder_scaling(pair, lora.prompts, interp.Prompts.of(pair, ["The key is", "The"]), threshold=0.6)
