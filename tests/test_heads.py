"""Heads as folded, factored matrices: against dense algebra on plain weights, and against what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, sharp, tiny
from torch import Tensor

from interp import linalg
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.linalg import SVD
from interp.models import Batch, HookedModel
from interp.models.heads import FoldedHeads, HeadCircuit, component, folded_heads, folded_vocabulary, outside
from interp.sites import Site

ROWS = [[3, 9, 4, 1, 5, 7, 2], [2, 7, 11, 30]]
CENTRED = ("gpt2", "neox")
GQA = ("llama", "qwen2")
CIRCUITS: tuple[HeadCircuit, ...] = ("ov", "qk")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(hf: Any, layer: int) -> dict[str, Tensor]:
    """W_Q, W_K, W_V [d, head, d_head] and W_O [head, d_head, d] of query heads, biases, the norm's gain and bias; in float64."""
    config = hf.config.get_text_config()
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.model_type == "gpt2":
        block = hf.transformer.h[layer]
        qkv, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        parts = dict(zip("QKV", qkv.chunk(3, 1), strict=True)), dict(zip("QKV", bias.chunk(3), strict=True))
        norm, out = block.ln_1, block.attn.c_proj.weight
    elif config.model_type == "gpt_neox":
        block = hf.gpt_neox.layers[layer]
        fused = block.attention.query_key_value
        by_head = fused.weight.T.unflatten(1, (heads, 3, -1)), fused.bias.unflatten(0, (heads, 3, -1))
        parts = tuple({name: x[..., i, :].flatten(-2) for i, name in enumerate("QKV")} for x in by_head)
        norm, out = block.input_layernorm, block.attention.dense.weight.T
    else:
        block = hf.model.layers[layer]
        linear = {name: getattr(block.self_attn, f"{name.lower()}_proj") for name in "QKV"}
        parts = (
            {k: m.weight.T for k, m in linear.items()},
            {k: m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for k, m in linear.items()},
        )
        norm, out = block.input_layernorm, block.self_attn.o_proj.weight.T
    found = {}
    for name in "QKV":
        repeat = 1 if name == "Q" else heads // kv
        count = heads // repeat
        found[f"W_{name}"] = parts[0][name].unflatten(1, (count, -1)).repeat_interleave(repeat, 1)
        found[f"b_{name}"] = parts[1][name].unflatten(0, (count, -1)).repeat_interleave(repeat, 0)
    shift = getattr(norm, "bias", None)
    found |= {"W_O": out.unflatten(0, (heads, -1)), "gain": norm.weight, "shift": torch.zeros_like(norm.weight) if shift is None else shift}
    return {name: x.detach().double() for name, x in found.items()}


def dense(hf: Any, kind: str, layer: int, head: int, circuit: str) -> Tensor:
    """The d x d matrix that this project never forms."""
    w = plain(hf, layer)
    d = len(w["gain"])
    centre = torch.eye(d, dtype=torch.float64) - (1 / d if kind in CENTRED else 0)
    read = {name: centre @ w["gain"].diag() @ w[f"W_{name}"][:, head] for name in "QKV"}
    return read["V"] @ w["W_O"][head] @ centre if circuit == "ov" else read["Q"] @ read["K"].T


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    return {kind: tiny(kind) for kind in FOUR}


# ---- SVD of heads


@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("kind", FOUR)
def test_factored_svd_is_that_of_the_dense_matrix(sources, kind: str, circuit: Any) -> None:
    model = HookedModel.load(sources[kind])
    for layer in range(model.shape.n_layers):
        u, s, vh = folded_heads(model, layer).components(circuit)
        assert s.shape == (4, model.shape.d_head) and bool((s.diff(dim=-1) <= 0).all())
        for basis in (u.mT @ u, vh @ vh.mT):
            torch.testing.assert_close(basis, torch.eye(model.shape.d_head, dtype=torch.float64).expand_as(basis), rtol=0, atol=1e-12)
        for head in range(4):
            matrix = dense(sources[kind], kind, layer, head, circuit)
            torch.testing.assert_close((u * s[:, None])[head] @ vh[head], matrix, rtol=0, atol=1e-12 * float(s[head, 0]))
            wanted = torch.linalg.svd(matrix)
            torch.testing.assert_close(s[head], wanted.S[: s.shape[1]], rtol=1e-10, atol=1e-13 * float(s[head, 0]))
            sure = linalg_gaps(s[head]) > 1e-3
            across = (wanted.Vh[: s.shape[1]] * vh[head]).sum(-1), (wanted.U[:, : s.shape[1]] * u[head]).sum(0)
            for cosine in across:
                torch.testing.assert_close(cosine.abs()[sure], torch.ones_like(cosine)[sure], rtol=0, atol=1e-9)
            assert torch.equal(across[0].sign()[sure], across[1].sign()[sure])  # read and write flip together


def linalg_gaps(s: Tensor) -> Tensor:
    """Distance of each singular value to its nearest neighbour, as a share of the first."""
    gaps = torch.nn.functional.pad((s[:-1] - s[1:]) / s[0], (1, 1), value=1.0)
    return torch.minimum(gaps[:-1], gaps[1:])


@pytest.mark.parametrize("kind", FOUR)
def test_signs_depend_on_the_product_alone(sources, kind: str) -> None:
    """The same product in other factors, W_V G and G^-1 W_O, has the same components with the same signs."""
    folded = folded_heads(HookedModel.load(sources[kind]), 1)
    left, right = folded.factors("ov")
    first = folded.components("ov")
    assert bool((first.Vh.gather(-1, first.Vh.abs().argmax(-1, keepdim=True)) > 0).all())
    mixed = torch.linalg.qr(normal(*left.shape[:1], left.shape[2], left.shape[2])).Q * 3
    again = linalg.signed(linalg.svd_of_products(left @ mixed, torch.linalg.solve(mixed, right)))
    for head in range(4):
        sure = linalg_gaps(first.S[head]) > 1e-3
        torch.testing.assert_close(first.U[head][:, sure], again.U[head][:, sure], rtol=0, atol=1e-9)
        torch.testing.assert_close(first.Vh[head][sure], again.Vh[head][sure], rtol=0, atol=1e-9)
    flipped = linalg.signed(SVD(-first.U, first.S, -first.Vh))
    assert torch.equal(flipped.U, first.U) and torch.equal(flipped.Vh, first.Vh)


@pytest.mark.parametrize("kind", FOUR)
def test_moving_the_gain_into_the_readers_changes_nothing(kind: str) -> None:
    """A model with gain 1 and readers multiplied by the gain computes the same; so do the folded matrices."""
    hf: Any = tiny(kind)
    first = folded_heads(HookedModel.load(hf), 1)
    norm = hf.transformer.h[1].ln_1 if kind == "gpt2" else (hf.gpt_neox if kind == "neox" else hf.model).layers[1].input_layernorm
    with torch.no_grad():
        gain = norm.weight.clone()
        if kind == "gpt2":
            hf.transformer.h[1].attn.c_attn.weight.mul_(gain[:, None])
        elif kind == "neox":
            hf.gpt_neox.layers[1].attention.query_key_value.weight.mul_(gain)
        else:
            for name in "qkv":
                getattr(hf.model.layers[1].self_attn, f"{name}_proj").weight.mul_(gain)
        norm.weight.fill_(1)
        if getattr(norm, "bias", None) is not None:
            norm.bias.div_(gain)
    second = folded_heads(HookedModel.load(hf), 1)
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), rtol=1e-5, atol=1e-6)
    for circuit in ("ov", "qk"):
        torch.testing.assert_close(second.components(circuit).S, first.components(circuit).S, rtol=1e-5, atol=1e-6)


# ---- what the model computes


@pytest.mark.parametrize("kind", FOUR)
def test_pattern_and_output_of_a_head_from_folded_matrices(kind: str) -> None:
    """From the stream entering a block, divided by its scale, to attention and to what each head writes."""
    hf = sharp(kind).double()
    model = HookedModel.load(hf)
    close = {"rtol": 0, "atol": 1e-8 if kind == "gpt2" else 3e-6}  # the others norm and take the softmax in float32
    batch = Batch.of(ROWS)
    for layer in range(model.shape.n_layers):
        sites = [Site("resid_pre", layer), Site("pattern", layer), Site("result", layer)]
        found = model.capture(batch, sites)
        folded = folded_heads(model, layer)
        for i, row in enumerate(ROWS):
            x, pattern, result = (found[site][i] for site in sites)
            x, pattern, result = x[: len(row)], pattern[:, : len(row), : len(row)], result[: len(row)]
            for head in range(4):
                attention, written = by_hand(hf, kind, folded, head, x)
                torch.testing.assert_close(attention, pattern[head], **close)
                seen = result[:, head] - (result[:, head].mean(-1, keepdim=True) if kind in CENTRED else 0)
                torch.testing.assert_close(written, seen, **close)
            assert float((pattern[0] - pattern[1]).abs().max()) > 1e-2


def by_hand(hf: Any, kind: str, folded: FoldedHeads, head: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of a head, and what it writes less its mean where norms subtract it."""
    config = hf.config.get_text_config()
    if kind in CENTRED:
        x = x - x.mean(-1, keepdim=True)
    epsilon = {"gpt2": "layer_norm_epsilon", "neox": "layer_norm_eps"}.get(kind, "rms_norm_eps")
    x = x / (x.square().mean(-1, keepdim=True) + getattr(config, epsilon)).sqrt()
    kv = folded.kv(head)
    q, k, v = (
        x @ w + b for w, b in ((folded.W_Q[head], folded.b_Q[head]), (folded.W_K[kv], folded.b_K[kv]), (folded.W_V[kv], folded.b_V[kv]))
    )
    if kind != "gpt2":
        q, k = rotated(hf, kind, q), rotated(hf, kind, k)
    scores = q @ k.T / q.shape[1] ** 0.5
    attention = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1)
    return attention, attention @ v @ folded.W_O[head]


def rotated(hf: Any, kind: str, x: Tensor) -> Tensor:
    """Rotary embedding of [pos d_head]: pairs (i, i + half) of the first dimensions turn by pos * frequency."""
    rotary = (hf.gpt_neox if kind == "neox" else hf.model).rotary_emb
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * rotary.inv_freq.double()
    half = angle.shape[1]
    a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], 1)


# ---- grouped-query attention


@pytest.mark.parametrize("kind", FOUR)
def test_edits_of_shared_and_own_weights(sources, kind: str) -> None:
    """W_O and W_Q are a query head's own; W_V and W_K belong to its whole group."""
    model = HookedModel.load(sources[kind])
    group = [2, 3] if kind in GQA else [2]
    before = folded_heads(model, 1)
    for module, circuit, changed in (("W_O", "ov", [2]), ("W_V", "ov", group), ("W_Q", "qk", [2]), ("W_K", "qk", group)):
        delta = normal(*model.weight(Site(module, 1, 2)).shape).float()
        with model.edited(Edit((WeightChange(Site(module, 1, 2), delta),))):
            after = folded_heads(model, 1)
        for product in CIRCUITS:
            (a, b), (c, d) = before.factors(product), after.factors(product)
            moved = [head for head in range(4) if not torch.equal(a[head] @ b[head], c[head] @ d[head])]
            assert moved == (changed if product == circuit else [])
    for head in range(4):
        for product, one in zip(CIRCUITS, (before.ov(head), before.qk(head)), strict=True):
            assert all(torch.equal(x, y[head]) for x, y in zip(one, before.factors(product), strict=True))


def test_a_shared_factor_is_taken_apart_once(sources, monkeypatch: pytest.MonkeyPatch) -> None:
    folded, sizes, real = folded_heads(HookedModel.load(sources["llama"]), 0), [], torch.linalg.qr
    slow = linalg.signed(linalg.svd_of_products(*folded.factors("ov")))
    monkeypatch.setattr(torch.linalg, "qr", lambda x: (sizes.append(x.shape[:-2].numel()), real(x))[1])
    for mine, wanted in zip(folded.components("ov"), slow, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    assert sorted(sizes) == [2, 4]


# ---- names, vocabulary, notes


def test_one_component_by_its_name(sources) -> None:
    model = HookedModel.load(sources["gpt2"])
    read, strength, write = component(model, "L2H1.3")
    matrix = dense(sources["gpt2"], "gpt2", 2, 1, "ov")
    torch.testing.assert_close(read @ matrix, strength * write, rtol=0, atol=1e-12)
    assert strength == pytest.approx(float(torch.linalg.svdvals(matrix)[3]))
    with pytest.raises(InputError, match="L2H1.6: heads of .* have 6 components, 0 to 5"):
        component(model, "L2H1.6")
    with pytest.raises(InputError, match="no component"):
        component(model, "L2H1.z")
    with pytest.raises(InputError, match="layer 3 does not exist; the model has layers 0 to 2"):
        folded_heads(model, 3)


@pytest.mark.parametrize("kind", FOUR)
def test_vocabulary_gives_the_logits(sources, kind: str) -> None:
    """What a vector in the last stream adds to the logits, the norm's scale apart."""
    hf: Any = sources[kind]
    entering, leaving = folded_vocabulary(HookedModel.load(hf), torch.float64)
    norm = hf.transformer.ln_f if kind == "gpt2" else hf.gpt_neox.final_layer_norm if kind == "neox" else hf.model.norm
    embedding, unembedding = hf.get_input_embeddings().weight.double(), hf.get_output_embeddings().weight.double()
    x = normal(24)
    x -= x.mean() if kind in CENTRED else 0
    torch.testing.assert_close(x @ leaving, unembedding @ (norm.weight.double() * x))
    if kind in CENTRED:
        assert float(entering.sum(1).abs().max()) < 1e-12 and float(leaving.sum(0).abs().max()) < 1e-12
        embedding = embedding - embedding.mean(1, keepdim=True)
    torch.testing.assert_close(entering, embedding)


def test_notes(sources) -> None:
    assert outside(HookedModel.load(sources["gpt2"])) == outside(HookedModel.load(sources["gpt2"]), "qk") == ()
    assert "distance 0" in outside(HookedModel.load(sources["llama"]), "qk")[0] and not outside(HookedModel.load(sources["llama"]))
    assert "bfloat16" in outside(HookedModel.load(tiny("llama").bfloat16()))[0]


# ---- the algebra


def test_svd_of_products_does_not_mind_ill_conditioned_factors() -> None:
    """Errors stay near eps of the norms whether the factors' condition is 1 or 1e12; columns of zeros too."""
    u, v = torch.linalg.qr(normal(40, 8)).Q, torch.linalg.qr(normal(30, 8, seed=1)).Q
    mix = torch.linalg.qr(normal(8, 8, seed=2)).Q
    for powers in (0.0, 6.0, 12.0):
        scale = 10 ** torch.linspace(0, -powers, 8, dtype=torch.float64)
        for left, right in ((u * scale @ mix, mix.T @ v.T), (u @ mix, (mix.T * scale) @ v.T), (u * scale, scale[:, None] * v.T)):
            for dtype in (torch.float64, torch.float32):
                a, b = left.to(dtype), right.to(dtype)
                found = linalg.svd_of_products(a, b)
                exact = a.double() @ b.double()
                allowed = 20 * torch.finfo(dtype).eps * linalg.norm(a) * linalg.norm(b)
                assert float((found.S.double() - torch.linalg.svdvals(exact)[:8]).abs().max()) < allowed
                assert float(((found.U * found.S @ found.Vh).double() - exact).abs().max()) < allowed
                for basis in (found.U.mT @ found.U, found.Vh @ found.Vh.mT):
                    assert float((basis - torch.eye(8, dtype=dtype)).abs().max()) < 20 * torch.finfo(dtype).eps
    zero = linalg.svd_of_products(torch.zeros(2, 9, 3), normal(2, 3, 7).float())
    assert not zero.S.any() and float((zero.U.mT @ zero.U - torch.eye(3)).abs().max()) < 1e-6


def test_svd_of_products_that_share_a_factor_or_have_more_columns_than_rows() -> None:
    left, right = normal(2, 1, 9, 3), normal(2, 4, 3, 7, seed=1)
    found = linalg.svd_of_products(left, right)
    assert found.U.shape == (2, 4, 9, 3) and found.Vh.shape == (2, 4, 3, 7)
    torch.testing.assert_close(found.U * found.S[..., None, :] @ found.Vh, left @ right)
    wide = linalg.svd_of_products(normal(5, 8), normal(8, 6, seed=1))
    assert wide.S.shape == (5,)
    torch.testing.assert_close(wide.U * wide.S @ wide.Vh, normal(5, 8) @ normal(8, 6, seed=1))


def test_principal_angles() -> None:
    """In the plane of e0 and e3 by 1e-9, 0.3 and a right angle, whatever bases the subspaces have."""
    eye = torch.eye(7, dtype=torch.float64)
    for angle in (0.0, 1e-9, 0.3, 1.2, torch.pi / 2):
        t = torch.tensor(angle, dtype=torch.float64)
        a, b = eye[:, :2], torch.stack([t.cos() * eye[0] + t.sin() * eye[3], eye[1]], 1)
        mix = torch.linalg.qr(normal(2, 2)).Q
        got = linalg.principal_angles(a, b @ mix)
        torch.testing.assert_close(got, torch.tensor([0.0, angle], dtype=torch.float64), rtol=1e-6, atol=1e-15 if angle < 1 else 1e-12)
        assert float(linalg.subspace_overlap(got)) == pytest.approx((1 + float(t.cos()) ** 2) / 2)
    q = torch.linalg.qr(normal(3, 9, 4)).Q
    assert not linalg.principal_angles(q, q.clone()).any()
    assert torch.equal(linalg.subspace_overlap(linalg.principal_angles(q, q)), torch.ones(3, dtype=torch.float64))


def test_overlap_of_random_subspaces_is_rank_over_rows() -> None:
    a, b = (torch.linalg.qr(normal(200, 24, 6, seed=seed)).Q for seed in (0, 1))
    overlap = linalg.subspace_overlap(linalg.principal_angles(a, b))
    assert float(overlap.mean()) == pytest.approx(6 / 24, abs=0.01)
    torch.testing.assert_close(overlap, (a.mT @ b).square().sum((1, 2)) / 6)


def test_norm_of_the_change_of_a_product() -> None:
    left, right = normal(3, 9, 4), normal(3, 4, 7, seed=1)
    new = left + 1e-6 * normal(3, 9, 4, seed=2), right + 1e-6 * normal(3, 4, 7, seed=3)
    wanted = (new[0] @ new[1] - left @ right).norm(dim=(1, 2))
    torch.testing.assert_close(linalg.product_change(left, right, *new), wanted, rtol=1e-8, atol=0)
    assert not linalg.product_change(left, right, left.clone(), right).any()
