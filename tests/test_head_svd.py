"""What heads read and write, and which heads tuning turned: against dense algebra, planted changes and noise."""

from __future__ import annotations

import math
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import scipy.linalg
import torch
from scipy.optimize import linear_sum_assignment
from test_heads import CENTRED, dense, normal
from tiny_checkpoints import FOUR, saved, tiny

from interp.analyses import find
from interp.analyses.head_svd import HeadSVDResult, head_svd
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.linalg import effective_rank
from interp.models import HookedModel, ModelPair, turned
from interp.models.heads import folded_heads
from interp.organisms.handmade import hand_built
from interp.organisms.planted import planted
from interp.results import Result
from interp.sites import Site

RANK = 3
WIDE = {"gpt2": {"n_embd": 96}, **dict.fromkeys(("llama", "qwen2"), {"hidden_size": 96, "head_dim": 24}), "neox": {"hidden_size": 96}}


def module() -> ModuleType:
    import sys

    return sys.modules[head_svd.__module__]


def moved(kind: str, size: float = 0.03) -> Any:
    """A tiny model whose every weight differs from ``tiny(kind)``."""
    hf = tiny(kind)
    with torch.no_grad():
        for i, p in enumerate(hf.parameters()):
            p.add_(size * normal(*p.shape, seed=i).float())
    return hf


@pytest.fixture(scope="module")
def sources() -> dict[str, tuple[Any, Any]]:
    return {kind: (tiny(kind), moved(kind)) for kind in FOUR}


def first_row(found: HeadSVDResult) -> dict[str, Any]:
    table = found.strongest()
    assert table is not None and len(table) == int((found.change > 0).sum())  # type: ignore[operator]
    return table.iloc[0].to_dict()


def pair_of(sources: Any, kind: str) -> ModelPair:
    return ModelPair(*map(HookedModel.load, sources[kind]))


@pytest.fixture(scope="module")
def base() -> HookedModel:
    return HookedModel.load("base")


# ---- one model


@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("kind", FOUR)
def test_strengths_and_tokens_of_dense_matrices(sources, kind: str, circuit: Any) -> None:
    hf = sources[kind][0]
    model = HookedModel.load(hf)
    found = head_svd(model, circuit=circuit, rank=RANK, tokens=2, draws=2)
    assert found.sides == ("model",) and found.turn is None and found.turned == [] and found.change is None
    norm = hf.transformer.ln_f if kind == "gpt2" else hf.gpt_neox.final_layer_norm if kind == "neox" else hf.model.norm
    entering = hf.get_input_embeddings().weight.detach().double()
    entering = entering - (entering.mean(1, keepdim=True) if kind in CENTRED else 0)
    entering = entering / entering.norm(dim=1, keepdim=True)
    leaving = entering if circuit == "qk" else (hf.get_output_embeddings().weight * norm.weight).detach().double()
    for layer in range(3):
        for head in range(4):
            u, s, vh = torch.linalg.svd(dense(hf, kind, layer, head, circuit))
            torch.testing.assert_close(found.spectrum[0, layer, head], s[: model.shape.d_head], rtol=1e-10, atol=1e-13 * float(s[0]))
            assert float(found.effective_rank[0, layer, head]) == pytest.approx(effective_rank(s[: model.shape.d_head]))
            for i in range(RANK):
                if not bool(found.identified[0, layer, head, i]):
                    continue
                sign = -1 if vh[i, vh[i].abs().argmax()] < 0 else 1
                for way, along in (("read", entering @ (sign * u[:, i])), ("write", leaving @ (sign * vh[i]))):
                    order = along.argsort(descending=True).tolist()
                    ids = getattr(found, f"{way}_tokens")[0, layer, head, i].tolist()
                    assert ids == [order[:2], order[: -2 - 1 : -1]], (layer, head, i, way)
                    scores = getattr(found, f"{way}_scores")[0, layer, head, i].double()
                    torch.testing.assert_close(scores, along[torch.tensor(ids)], rtol=1e-4, atol=1e-5)
    assert float(found.random_rank.min()) > 1 and f"OV of {3 * 4} heads".replace("OV", circuit.upper()) in found.summary()
    distance = "distance 0" in found.summary()
    assert distance == (circuit == "qk" and kind != "gpt2")


def test_table_and_strongest_of_one_model(base: HookedModel) -> None:
    found = head_svd(base, draws=2)
    frame, strongest = found.to_frame(), found.strongest(5)
    assert strongest is not None and len(frame) == found.spectrum.numel() and len(strongest) == 5
    top = found.spectrum[0, ..., 0].max()
    assert strongest["strength"][0] == float(top) and strongest["strength"].is_monotonic_decreasing
    row = frame.set_index("site").loc[strongest["site"][0]]
    assert row["spectrum"] == float(top) and row["reads +"] == strongest["reads +"][0] != ""
    assert set(frame.loc[frame["rank"] >= found.rank, "writes -"]) == {""}
    layer, head, rank = map(int, re.fullmatch(r"L(\d+)H(\d+)\.(\d+)", strongest["site"][0]).groups())  # type: ignore[union-attr]
    ids = found.write_tokens[0, layer, head, rank, 0, :5].tolist()
    assert found.tokens(layer, head, rank)["writes +"] == " ".join(map(repr, base.token_strings(ids)))
    assert set(found.figures()) == {"Effective rank of heads", "Strengths of components"}


# ---- a pair


@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("kind", FOUR)
def test_angles_matches_and_changes_of_dense_matrices(sources, kind: str, circuit: Any) -> None:
    found = head_svd(pair_of(sources, kind), circuit=circuit, rank=RANK, tokens=1, draws=2)
    assert found.read_angles is not None and found.write_angles is not None and found.match_cosine is not None
    assert found.matched is not None and found.change is not None and found.spectral_change is not None
    assert found.turn is not None and found.read_overlap is not None
    size = found.spectrum.shape[-1]
    for layer in range(3):
        for head in range(4):
            at = layer, head
            old, new = (dense(hf, kind, layer, head, circuit) for hf in sources[kind])
            (u, s, vh), (u2, s2, vh2) = (tuple(torch.linalg.svd(m)) for m in (old, new))
            for angles, a, b in ((found.read_angles, u, u2), (found.write_angles, vh.T, vh2.T)):
                wanted = scipy.linalg.subspace_angles(a[:, :RANK].numpy(), b[:, :RANK].numpy())
                np.testing.assert_allclose(np.sort(wanted), angles[at].numpy(), rtol=0, atol=1e-7)
            shared = (u[:, :RANK].T @ u2[:, :RANK]).square().sum() / RANK
            assert float(found.read_overlap[at]) == pytest.approx(float(shared), abs=1e-9)
            assert float(found.change[at]) == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-9)
            assert float(found.spectral_change[at]) == pytest.approx(float((s2 - s).norm() / s.norm()), rel=1e-9)
            energy = s2[:RANK].square()
            for share, a, b in ((found.read_turn, u, u2), (found.write_turn, vh.T, vh2.T)):
                outside = 1 - (a[:, :RANK].T @ b[:, :RANK]).square().sum(0)
                assert share is not None and float(share[at]) == pytest.approx(float((energy * outside).sum() / energy.sum()), abs=1e-12)
            fits = (u2[:, :size].T @ u[:, :size]).abs() * (vh2[:size] @ vh[:size].T).abs()
            rows, columns = linear_sum_assignment(-fits.numpy())
            assert found.matched[at].tolist() == columns[:RANK].tolist()
            np.testing.assert_allclose(found.match_cosine[at].numpy(), fits.numpy()[rows, columns][:RANK], atol=1e-8)
    assert found.read_turn is not None and found.write_turn is not None
    torch.testing.assert_close(found.turn, (found.read_turn + found.write_turn) / 2)


@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("kind", FOUR)
def test_a_pair_of_a_model_with_itself(sources, kind: str, circuit: Any) -> None:
    """Exactly: the same subspaces, no change, every component its own partner; also of what random changes do."""
    found = head_svd(ModelPair(HookedModel.load(sources[kind][0]), HookedModel.load(tiny(kind))), circuit=circuit, rank=RANK, draws=2)
    assert found.read_overlap is not None and found.write_overlap is not None and found.noise_turn is not None
    assert bool((found.read_overlap == 1).all()) and bool((found.write_overlap == 1).all())
    for zero in (found.turn, found.change, found.spectral_change, found.noise_turn, found.z, found.noise_spectral_change):
        assert zero is not None and not zero.any()
    assert bool((found.p_adjusted == 1).all()) and bool((found.match_cosine == 1).all())
    assert found.matched is not None and torch.equal(found.matched, torch.arange(RANK).expand_as(found.matched))
    assert found.turned == [] and found.strongest() is None
    assert found.summary().startswith(f"0 of 12 heads turned: {circuit.upper()} of every head is the same")
    found.figures()


@pytest.mark.parametrize("kind", FOUR)
def test_a_planted_direction_is_the_head_that_turned(kind: str) -> None:
    """Rank one in one head's W_O: only that head changes, and it turns towards what was planted."""
    model, other = (HookedModel.load(tiny(kind, **WIDE[kind])) for _ in range(2))
    site = Site("W_O", 1, 2)
    edit = planted("rank1", model, layer=1, module="W_O", head=2, sigma=5 * float(torch.linalg.matrix_norm(model.weight(site), 2)))
    with other.edited(edit):
        found = head_svd(ModelPair(model, other), rank=4, draws=39)
    assert found.turned == [(1, 2)] and found.turn is not None and found.change is not None and found.z is not None
    assert found.change.count_nonzero() == found.turn.count_nonzero() == 1 and float(found.z[1, 2]) > 2
    row = first_row(found)
    assert row["site"] == "L1H2" and row["p_adjusted"] <= 0.05
    assert found.summary().startswith("1 of 12 heads turned further than chance (p <= 0.05 over all heads), most L1H2 by 0.")
    (change,) = edit.changes
    direction = change.right[0].double()  # type: ignore[union-attr]
    direction = direction - (direction.mean() if kind in CENTRED else 0)
    with other.edited(edit):
        components = folded_heads(other, 1).components("ov")
    towards = int(row["towards"].removeprefix("L1H2."))
    cosines = (components.Vh[2] @ direction / direction.norm()).abs()
    assert towards == int(cosines.argmax()) == 0 and float(cosines[towards]) > 0.8
    assert row["cosine"] < row["cosine_by_chance"] - 0.05


def test_a_head_turned_by_a_known_angle() -> None:
    """W_O rotated in the plane of one direction that it writes and one that it does not: one angle, known; strengths stay."""
    hf: Any = tiny("llama")
    model = HookedModel.load(hf)
    write = folded_heads(model, 2).components("ov").Vh[3]
    away = torch.linalg.qr(write.T, mode="complete").Q[:, -1]
    a, angle = write[0], 0.4
    outer = torch.outer
    turn = (math.cos(angle) - 1) * (outer(a, a) + outer(away, away)) + math.sin(angle) * (outer(a, away) - outer(away, a))
    weight = model.weight(Site("W_O", 2, 3)).detach().double()
    with (other := HookedModel.load(tiny("llama"))).edited(Edit((WeightChange(Site("W_O", 2, 3), (weight @ turn).float()),))):
        found = head_svd(ModelPair(model, other), rank=RANK, draws=2)
    assert found.read_angles is not None and found.write_angles is not None and found.spectral_change is not None
    torch.testing.assert_close(found.write_angles[2, 3], torch.tensor([0.0, 0.0, 0.4], dtype=torch.float64), rtol=0, atol=1e-5)
    assert float(found.read_angles[2, 3].max()) < 1e-5 and float(found.spectral_change.max()) < 1e-6
    energy = found.spectrum[1, 2, 3, :RANK].square()
    share = float(energy[0] / energy.sum())
    assert found.turn is not None and float(found.turn[2, 3]) == pytest.approx(math.sin(angle) ** 2 * share / 2, rel=1e-4)


def test_noise_is_not_turning(base: HookedModel) -> None:
    """Dense noise in all matrices turns no head further than noise does; the tuned model of the shipped pair has some."""
    for seed in range(2):
        other = HookedModel.load("base")
        with other.edited(planted("dense", base, rel=0.05, seed=seed)):
            found = head_svd(ModelPair(base, other), draws=19)
        assert found.turned == [] and found.turn is not None and float(found.turn.min()) > 0
        assert ", the first being L" in found.summary() and "0 of 24 heads" in found.summary()
    tuned = head_svd(ModelPair.load("base", "boxes-tuned"))
    assert tuned.turned and tuned.turn is not None and tuned.noise_turn is not None
    assert all(float(tuned.turn[cell]) > float(tuned.noise_turn[:, *cell].max()) for cell in tuned.turned)


@pytest.mark.parametrize("circuit", ["ov", pytest.param("qk", marks=pytest.mark.full)])
def test_one_more_random_change_is_found_as_often_as_meant(sources, circuit: Any) -> None:
    """Random changes, each judged by 19 others as if it were tuning: any head in one of twenty, and each head alone likewise."""
    each, blocks, any_, alone = 20, 25, 0, []
    for kind in ("gpt2", "llama"):
        found = head_svd(pair_of(sources, kind), circuit=circuit, rank=RANK, tokens=1, draws=each * blocks)
        assert found.noise_read_turn is not None and found.noise_write_turn is not None
        for block in range(blocks):
            some = slice(each * block + 1, each * (block + 1))
            reading, writing = found.noise_read_turn, found.noise_write_turn
            first = {"read_turn": reading[each * block], "write_turn": writing[each * block]}
            one = replace(found, **first, noise_read_turn=reading[some], noise_write_turn=writing[some])
            assert one.p is not None and one.p_adjusted is not None and bool((one.p <= one.p_adjusted + 1 / each).all())
            any_ += bool(one.turned)
            alone.append(float((one.p <= 0.05).double().mean()))
    n = 2 * blocks
    allowed = 0.05 + 2 * math.sqrt(0.05 * 0.95 / n)
    assert 0 < any_ / n <= allowed, any_ / n
    assert 0.02 < sum(alone) / n <= 0.05 + 2 * float(np.std(alone)) / math.sqrt(n)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.full)])
def test_random_changes_are_of_the_weights_as_stored(kind: str) -> None:
    """Noise in a checkpoint whose norms have unequal gains turns heads as far, on average, as the draws that judge them."""
    with torch.no_grad():
        models: list[Any] = [tiny(kind) for _ in range(25)]
        for i, hf in enumerate(models):
            norm = hf.transformer.h[0].ln_1 if kind == "gpt2" else hf.model.layers[0].input_layernorm
            norm.weight.copy_(normal(24, seed=77).exp())
            for j, (name, p) in enumerate(hf.named_parameters()):
                if i and p.ndim == 2 and ("attn" in name and ("c_attn" in name or "c_proj" in name or "_proj" in name)):
                    p.add_(0.1 * p.norm() / p.numel() ** 0.5 * normal(*p.shape, seed=1000 * i + j).float())
    one, *others = (folded_heads(HookedModel.load(hf), 0) for hf in models)
    for circuit in ("ov", "qk"):
        old = one.components(circuit)
        found = [
            turned.comparison(one, two, old, two.components(circuit), circuit, RANK, centred=kind in CENTRED, seed=i, draws=4)
            for i, two in enumerate(others)
        ]
        turns, drawn = (torch.stack([(x[f"{who}read_turn"] + x[f"{who}write_turn"]).log() for x in found]) for who in ("", "noise_"))
        apart = (turns - drawn.mean(1)).mean(1)  # of one model, mean over its heads
        assert abs(float(apart.mean())) < 3 * float(apart.std()) / math.sqrt(len(apart)), circuit


def test_few_draws_are_said(sources) -> None:
    few, more = (head_svd(pair_of(sources, "llama"), rank=RANK, tokens=1, draws=n) for n in (18, 19))
    said = "no p can be that small with so few draws"
    assert said in few.summary() and few.turned == [] and said not in more.summary()
    assert few.p_adjusted is not None and more.p_adjusted is not None
    assert float(few.p_adjusted.min()) >= 1 / 19 and float(more.p_adjusted.min()) >= 0.05


@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("kind", FOUR)
def test_random_changes_are_as_large_as_tuning(sources, kind: str, circuit: Any) -> None:
    one, two = (folded_heads(HookedModel.load(hf), 1) for hf in sources[kind])
    first, again, other = (
        turned.shaken(one, two, circuit, centred=kind in CENTRED, seed=seed, draw=draw) for seed, draw in ((0, 0), (0, 0), (0, 1))
    )
    mine = ("W_V", "W_O") if circuit == "ov" else ("W_Q", "W_K")
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        old, new, noisy = (getattr(x, name) for x in (one, two, first))
        if name not in mine:
            assert noisy is old
            continue
        torch.testing.assert_close((noisy - old).norm(dim=(1, 2)), (new - old).norm(dim=(1, 2)))
        assert torch.equal(noisy, getattr(again, name)) and not torch.equal(noisy, getattr(other, name))
        for axis in (1, 2):
            mean = float((noisy - old).mean(axis).abs().max())
            assert (mean < 1e-12) == (kind in CENTRED and axis == (2 if name == "W_O" else 1))
        flat = torch.nn.functional.normalize((noisy - old).flatten(1), dim=1)
        assert float((flat @ flat.T - torch.eye(len(flat))).abs().max()) < 0.5  # every head's own


def test_the_same_seed_gives_the_same_numbers(sources) -> None:
    pair = pair_of(sources, "llama")
    a, b, c = (head_svd(pair, rank=RANK, draws=3, seed=seed).noise_turn for seed in (0, 0, 1))
    assert a is not None and b is not None and c is not None and torch.equal(a, b) and not torch.equal(a, c)


# ---- LoRA, half precision, files


def test_an_adapter_is_its_merged_model(tmp_path: Path) -> None:
    base = saved(tiny("qwen2"), tmp_path / "base")
    model = peft.get_peft_model(tiny("qwen2"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p.copy_(0.1 * normal(*p.shape, seed=i))
    model.save_pretrained(str(tmp_path / "adapter"))
    merged = saved(model.merge_and_unload(), tmp_path / "merged")
    one, two = (head_svd(ModelPair.load(base, tuned), rank=RANK, draws=2) for tuned in (tmp_path / "adapter", merged))
    for name in ("spectrum", "change", "read_angles", "write_angles", "noise_read_turn", "match_cosine"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-5)
    assert one.change is not None and bool((one.change > 1e-3).all())


def test_half_precision_is_taken_apart_in_full(tmp_path: Path) -> None:
    half = tiny("llama").bfloat16()
    found = head_svd(HookedModel.load(saved(half, tmp_path)), rank=RANK, draws=2)
    assert found.spectrum.dtype == torch.float64 and "weights are bfloat16; they are taken apart in float64" in found.summary()
    for layer, head in ((0, 1), (2, 3)):
        wanted = torch.linalg.svdvals(dense(half, "llama", layer, head, "ov"))
        torch.testing.assert_close(found.spectrum[0, layer, head], wanted[:8], rtol=1e-10, atol=1e-13)


def test_one_layer_of_both_models_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded as a model, and the heads of one layer are gone before the next layer's are read."""
    pair = ModelPair.load(saved(tiny("llama"), tmp_path / "base"), saved(moved("llama"), tmp_path / "tuned"), load="one at a time")
    made: list[weakref.ref[Any]] = []
    most: list[int] = []

    def watched(*args: Any) -> Any:
        heads = folded_heads(*args)
        made.append(weakref.ref(heads))
        most.append(sum(of() is not None for of in made))
        return heads

    monkeypatch.setattr(module(), "folded_heads", watched)
    head_svd(pair, rank=RANK, draws=2)
    assert len(made) >= 6 and max(most) <= 4  # those of the layer before go when theirs come
    assert not pair.base.loaded and not pair.tuned.loaded


# ---- what is not identified


def with_strengths(strengths: list[float]) -> HookedModel:
    """A tiny Llama whose head L1H2 has these strengths."""
    hf: Any = tiny("llama")
    model = HookedModel.load(hf)
    block = hf.model.layers[1]
    read, write = (torch.linalg.qr(normal(24, 8, seed=seed)).Q for seed in (5, 6))
    with torch.no_grad():
        block.input_layernorm.weight.fill_(1)
        block.self_attn.v_proj.weight[8:] = read.T.float()  # the key/value head of heads 2 and 3
        block.self_attn.o_proj.weight[:, 16:24] = (write * torch.tensor(strengths, dtype=torch.float64)).float()
    return model


def test_nearly_equal_strengths_give_a_span() -> None:
    found = head_svd(with_strengths([4, 2, 2.001, 1.999, 1, 0.5, 0.25, 0.1]), rank=4, draws=2)
    torch.testing.assert_close(found.spectrum[0, 1, 2, :2], torch.tensor([4, 2.001], dtype=torch.float64), rtol=1e-6, atol=0)
    assert found.spans(1, 2) == ((1, 3),)
    assert found.identified[0, 1, 2].tolist() == [True, False, False, False, True, True, True, True]
    table = found.strongest(100)
    assert table is not None and table.set_index("site")["span"].loc[["L1H2.0", "L1H2.1", "L1H2.3"]].tolist() == ["", "1-3", "1-3"]
    assert re.search(
        r"in \d+ of 12 heads some of these are nearly as strong as others, so that only their span is identified", found.summary()
    )
    with pytest.raises(InputError, match="L1H4 is none of the 3 x 4 heads"):
        found.spans(1, 4)
    far = head_svd(with_strengths([4, 2, 1.5, 1.2, 1, 0.5, 0.25, 0.1]), rank=4, draws=2)
    assert far.spans(1, 2) == () and bool(far.identified[0, 1, 2].all())


def test_a_head_with_fewer_components_than_asked_for() -> None:
    """Strengths of 0 have no tokens and turn nothing; subspaces are of the components that are there."""
    low, other = with_strengths([3, 1, 0, 0, 0, 0, 0, 0]), with_strengths([3, 1.1, 0, 0, 0, 0, 0, 0])
    found = head_svd(ModelPair(low, other), rank=4, draws=2)
    assert found.read_angles is not None and found.match_cosine is not None and found.turn is not None
    assert found.read_angles[1, 2].isnan().tolist() == found.match_cosine[1, 2].isnan().tolist() == [False, False, True, True]
    assert float(found.turn[1, 2]) < 1e-9 and bool((found.write_tokens[:, 1, 2, 2:] == -1).all())
    assert found.tokens(1, 2, 2) == {"reads +": "", "reads -": "", "writes +": "", "writes -": ""}
    assert found.spans(1, 2) == ((2, 7),)


def test_heads_that_are_zero() -> None:
    model = hand_built("ioi").model
    found = head_svd(model, rank=2, draws=2)
    zero = found.spectrum[0, ..., 0] == 0
    assert bool(zero.any()) and bool((found.read_tokens[0][zero] == -1).all()) and not found.effective_rank[0][zero].any()
    assert bool((found.read_tokens[0, ~zero, 0] >= 0).all())
    itself = head_svd(ModelPair(model, hand_built("ioi").model), rank=2, draws=2)
    assert itself.turned == [] and itself.turn is not None and not itself.turn.any()
    assert itself.figures() and found.figures() and len(found.to_frame()) and found.strongest() is not None


# ---- bad input, results


def test_bad_input(base: HookedModel) -> None:
    for settings, words in (
        ({"rank": 33}, "rank is 33, but heads of base have 32 components; give 1 to 32"),
        ({"rank": 0}, "rank is 0, but heads"),
        ({"circuit": "vo"}, "vo"),
        ({"rank": 2.5}, "rank is a whole number, but it is 2.5"),
        ({"rank": None}, "rank is a whole number, but it is None"),
        ({"draws": "8"}, "draws is a whole number, but it is '8'"),
        ({"draws": 1}, "draws is 1, but a spread needs at least 2"),
        ({"tokens": 0}, "tokens is 0, but base knows"),
        ({"tokens": 10**6}, "tokens is 1000000, but base knows"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            head_svd(base, **settings)  # type: ignore[arg-type]
    found = head_svd(base, rank=1, tokens=1, draws=2)
    with pytest.raises(InputError, match=r"L0H0.1 is none of the 1 strongest components"):
        found.tokens(0, 0, 1)
    with pytest.raises(InputError, match="there is no model 'tuned' in this result; it has model"):
        found.tokens(0, 0, 0, side="tuned")
    with pytest.raises(InputError, match="per prompt"):
        found.to_frame("prompt")


def test_a_pair_on_page_and_disk(sources, tmp_path: Path) -> None:
    found = head_svd(pair_of(sources, "gpt2"), rank=RANK, tokens=2, draws=3)
    again = Result.load.__func__(HeadSVDResult, found.save(tmp_path / "r"))  # type: ignore[attr-defined]
    assert again.summary() == found.summary() and again.to_frame().equals(found.to_frame())
    frame = found.to_frame()
    assert len(frame) == 2 * 3 * 4 * 6 and {"turn", "z", "p_adjusted", "change", "identified", "reads +"} <= set(frame.columns)
    assert list(found.figures()) == ["Heads that tuning turned", "Change of strengths", "Strengths of components"]
    assert find("head_svd") is head_svd
