"""The table of tensor names, against what the Hugging Face modules compute."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_checkpoints import FOUR, GQA, SIZES, randomised, tiny
from torch import nn

from interp.errors import InputError
from interp.models import weights
from interp.models.checkpoint import read_shape
from interp.models.weights import StateTensors
from interp.sites import Site

GPT = {"vocab_size": 31, "n_embd": 24, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MORE = {
    "Mistral": {**GQA, "head_dim": None},
    "Qwen3": {**GQA, "head_dim": 8},
    "Gemma": {**GQA, "head_dim": 8},
    "Gemma2": {**GQA, "head_dim": 8},
    "Gemma3Text": {**GQA, "head_dim": 8},
    "Granite": GQA,
    "Olmo": GQA,
    "Olmo2": GQA,
    "SmolLM3": GQA,
    "StableLm": GQA,
    "Starcoder2": GQA,
    "Phi": GQA,
    "Phi3": GQA,
    "Bloom": {"vocab_size": 31, "hidden_size": 24, "n_layer": 3, "n_head": 4},
    "GPTJ": {**GPT, "rotary_dim": 2},
    "GPTNeo": {
        "vocab_size": 31,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 40,
        "attention_types": [[["global"], 2]],
    },
    "OPT": {
        "vocab_size": 31,
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
}


@pytest.fixture(scope="module")
def four() -> dict[str, nn.Module]:
    return {kind: tiny(kind, seed=i) for i, kind in enumerate(FOUR)}


def source(model: nn.Module) -> StateTensors:
    return StateTensors(model.state_dict())


def blocks(model: nn.Module) -> nn.ModuleList:
    body = model.base_model
    body = getattr(body, "decoder", body)
    return body.h if hasattr(body, "h") else body.layers


def slow_qkv(kind: str, block: nn.Module, x: torch.Tensor, d_head: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a block's normalised input, [pos, head * d_head], as the architecture's own code makes them."""
    if kind == "gpt2":
        return block.attn.c_attn(x).split(24, dim=-1)
    if kind == "neox":
        fused = block.attention.query_key_value(x).view(x.shape[0], -1, 3 * d_head)  # [pos, head, q k v]
        return tuple(part.flatten(1) for part in fused.chunk(3, dim=-1))
    attention = block.self_attn
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


@pytest.mark.parametrize("kind", FOUR)
@torch.no_grad()
def test_qkv_are_what_the_module_computes(four, kind) -> None:
    model = four[kind]
    shape, x = read_shape(model.config), torch.randn(5, 24)
    for layer, block in enumerate(blocks(model)):
        for part, expected in zip("QKV", slow_qkv(kind, block, x, shape.d_head), strict=True):
            matrix = weights.read(Site(f"W_{part}", layer), source(model), shape)
            bias = weights.read(Site(f"b_{part}", layer), source(model), shape)
            assert matrix.shape == weights.weight_shape(f"W_{part}", shape)
            got = x @ matrix + (0 if bias is None else bias)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            split = weights.heads(Site(f"W_{part}", layer), matrix, shape)
            group = shape.n_heads // split.shape[0]
            for head in range(shape.n_heads):
                one = weights.read(Site(f"W_{part}", layer, head), source(model), shape)
                assert torch.equal(one, split[head // group])
                torch.testing.assert_close(x @ one, (x @ matrix)[:, (head // group) * shape.d_head :][:, : shape.d_head])


@pytest.mark.parametrize("kind", FOUR)
@torch.no_grad()
def test_output_projection_and_mlp_are_what_the_modules_compute(four, kind) -> None:
    model = four[kind]
    shape = read_shape(model.config)
    out, up, down = {
        "gpt2": ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        "neox": ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    }.get(kind, ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))
    z, x, hidden = torch.randn(5, shape.n_heads * shape.d_head), torch.randn(5, 24), torch.randn(5, 40)
    for layer, block in enumerate(blocks(model)):
        for name, inputs, matrix, bias in ((out, z, "W_O", "b_O"), (up, x, "W_in", "b_in"), (down, hidden, "W_out", "b_out")):
            w, b = (weights.read(Site(c, layer), source(model), shape) for c in (matrix, bias))
            torch.testing.assert_close(inputs @ w + (0 if b is None else b), block.get_submodule(name)(inputs), rtol=0, atol=1e-5)
        w = weights.heads(Site("W_O", layer), weights.read(Site("W_O", layer), source(model), shape), shape)
        apart = torch.einsum("phd,hdm->pm", z.unflatten(1, (shape.n_heads, shape.d_head)), w)
        bias = weights.read(Site("b_O", layer), source(model), shape)
        torch.testing.assert_close(apart + (0 if bias is None else bias), block.get_submodule(out)(z), rtol=0, atol=1e-5)
        assert torch.equal(w[3], weights.read(Site("W_O", layer, 3), source(model), shape))


@pytest.mark.parametrize("kind", FOUR)
@torch.no_grad()
def test_embedding_and_unembedding(four, kind) -> None:
    model = four[kind]
    shape = read_shape(model.config)
    x = torch.randn(5, 24)
    assert torch.equal(weights.read(Site("W_E"), source(model), shape), model.get_input_embeddings().weight)
    torch.testing.assert_close(x @ weights.read(Site("W_U"), source(model), shape), model.get_output_embeddings()(x))
    assert shape.tied == (kind in ("gpt2", "qwen2"))


@pytest.mark.parametrize("kind", FOUR)
def test_every_tensor_is_covered_once(four, kind) -> None:
    """Sites cover all entries of all tensors, so nothing an analysis sums over is lost or counted twice."""
    model = four[kind]
    shape = read_shape(model.config)
    found = [site for key, t in model.state_dict().items() for site in weights.matrices(key, t, shape)]
    assert len(found) == len(set(found))
    total = sum(m.numel() for key in source(model).names() for m in weights.matrices(key, source(model).get(key), shape).values())
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", FOUR)
def test_writing_a_view_changes_the_tensor_there_and_only_there(four, kind) -> None:
    model = four[kind]
    shape = read_shape(model.config)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    sites = [Site("W_Q", 1), Site("W_K", 2, 3), Site("W_O", 0, 1), Site("W_V", 1, 0), Site("W_in", 2), Site("W_U"), Site("ln_final")]
    for site in sites:
        if shape.tied and site == Site("W_U"):
            continue
        fresh = {k: v.clone() for k, v in state.items()}
        before = weights.read(site, StateTensors(fresh), shape).clone()
        ((key, accessor),) = weights.locate(site, fresh, shape)
        view = accessor(fresh[key])
        view += torch.arange(before.numel()).reshape(before.shape).reshape(view.shape)
        after = weights.read(site, StateTensors(fresh), shape)
        torch.testing.assert_close(after - before, torch.arange(before.numel()).reshape(before.shape).float(), rtol=0, atol=1e-4)
        assert sum(int((fresh[k] != state[k]).sum()) for k in state) == before.numel() - 1  # the first gets + 0


@pytest.mark.parametrize("kind", FOUR)
def test_views_share_memory_and_agree_with_matrices(four, kind) -> None:
    model = four[kind]
    shape = read_shape(model.config)
    for key, tensor in model.state_dict().items():
        whole = weights.matrices(key, tensor, shape)
        for site, view in weights.views(key, tensor, shape).items():
            assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            if site.head is not None and site.component != "W_O":
                expected = whole[Site(site.component, site.layer)].unflatten(-1, (-1, shape.d_head))[..., site.head, :]
                assert torch.equal(view, expected)


@pytest.mark.parametrize("name", MORE)
def test_other_architectures_have_all_their_matrices(name) -> None:
    config = getattr(transformers, f"{name}Config")(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **MORE[name]})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = read_shape(model.config)
    state = model.state_dict()
    assert weights.known(shape) and shape.n_layers == len(blocks(model))
    for layer in range(shape.n_layers):
        for module in weights.modules(shape):
            ((key, accessor),) = weights.locate(Site(module, layer), state, shape)
            view = accessor(state[key])
            assert view.numel() == torch.Size(weights.weight_shape(module, shape)).numel(), (key, module)
    for site in (Site("W_E"), Site("W_U"), *([] if name == "Olmo" else [Site("ln_final")])):  # OLMo's norms have no gain
        assert len(weights.locate(site, state, shape)) == 1, site
    sizes = {"d_model": 24, "n_heads": 4, "d_vocab": 31}
    assert {k: getattr(shape, k) for k in sizes} == sizes


def test_phi3_and_bloom_fused_projections() -> None:
    config = transformers.Phi3Config(**{**GQA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    model = randomised(transformers.AutoModelForCausalLM.from_config(config), 0)
    shape, x = read_shape(config), torch.randn(5, 24)
    with torch.no_grad():
        gate, up = model.model.layers[1].mlp.gate_up_proj(x).chunk(2, dim=-1)
        torch.testing.assert_close(x @ weights.read(Site("W_gate", 1), source(model), shape), gate)
        torch.testing.assert_close(x @ weights.read(Site("W_in", 1), source(model), shape), up)
        q, k, v = model.model.layers[1].self_attn.qkv_proj(x).split([24, 12, 12], dim=-1)
        for part, expected in zip("QKV", (q, k, v), strict=True):
            torch.testing.assert_close(x @ weights.read(Site(f"W_{part}", 1), source(model), shape), expected)
        config = transformers.BloomConfig(vocab_size=31, hidden_size=24, n_layer=2, n_head=4)
        model = randomised(transformers.AutoModelForCausalLM.from_config(config), 0)
        attention = model.transformer.h[1].self_attention
        parts = attention._reshape(attention.query_key_value(x[None]))  # [1, head, pos, d_head] each
        for part, expected in zip("QKV", parts, strict=True):
            w, b = (weights.read(Site(f"{kind}_{part}", 1), source(model), read_shape(config)) for kind in "Wb")
            torch.testing.assert_close(x @ w + b, expected[0].transpose(0, 1).flatten(1))


def test_names_with_and_without_prefixes() -> None:
    model = tiny("llama")
    shape = read_shape(model.config)
    plain = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    wrapped = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    for state in (plain, wrapped):
        assert torch.equal(weights.read(Site("W_K", 2), StateTensors(state), shape), model.model.layers[2].self_attn.k_proj.weight.T)
        assert torch.equal(StateTensors(state).get("model.layers.0.mlp.up_proj.weight"), model.model.layers[0].mlp.up_proj.weight)
    pairs = weights.matched(StateTensors(plain), StateTensors(wrapped))
    assert all(b is not None and t is not None for _, b, t in pairs) and len(pairs) == len(plain)
    del plain["norm.weight"]
    assert ("norm.weight", None, "_orig_mod.model.norm.weight") in weights.matched(StateTensors(plain), StateTensors(wrapped))


def test_a_tied_model_in_memory_gives_its_embedding_once() -> None:
    model = tiny("qwen2")
    names = StateTensors(model.state_dict()).names()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    shape = read_shape(model.config)
    found = weights.views("model.embed_tokens.weight", model.get_input_embeddings().weight.data, shape)
    assert set(found) == {Site("W_E"), Site("W_U")} and found[Site("W_U")].shape == (24, 31)


def test_what_is_refused() -> None:
    model = tiny("llama")
    shape = read_shape(model.config)
    with pytest.raises(InputError, match=r"tensor layers\.0\.self_attn\.q_proj\.weight has shape \[24, 32\], .* \[32, 24\]"):
        weights.matrices("layers.0.self_attn.q_proj.weight", torch.zeros(24, 32), shape)
    with pytest.raises(InputError, match="activation"):
        weights.locate(Site("z", 0), [], shape)
    with pytest.raises(InputError, match="layers 0 to 2"):
        weights.locate(Site("W_Q", 3), [], shape)
    with pytest.raises(InputError, match="heads 0 to 3"):
        weights.read(Site("W_Q", 0, 4), source(model), shape)
    with pytest.raises(InputError, match="no tensor nonsense"):
        source(model).get("nonsense")
    assert weights.locate(Site("b_Q", 0), source(model).names(), shape) == []  # Llama has no such bias
    mamba = read_shape(transformers.MptConfig(d_model=24, n_heads=4, n_layers=2, vocab_size=31))
    assert not weights.known(mamba) and weights.matrices("transformer.blocks.0.attn.Wqkv.weight", torch.zeros(72, 24), mamba) == {}
    with pytest.raises(InputError, match="MptForCausalLM are not known"):
        weights.locate(Site("W_Q", 0), [], mamba)


def test_finiteness_names_the_first_tensor() -> None:
    model = tiny("gpt2")
    weights.check_finite(source(model), "it")
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = float("nan")
    model.transformer.h[2].mlp.c_fc.weight.data[3, 4] = float("inf")
    with pytest.raises(InputError, match=r"it: 1 of 960 entries of transformer\.h\.1\.mlp\.c_fc\.weight are NaN or infinite"):
        weights.check_finite(source(model), "it")


def test_sizes_from_configs() -> None:
    assert read_shape(tiny("llama").config).d_head == 8  # given: 4 * 8 is not d_model
    assert read_shape(tiny("qwen2").config).d_head == 6  # derived
    neox = read_shape(tiny("neox").config)
    assert (neox.n_layers, neox.d_model, neox.n_heads, neox.n_kv_heads, neox.d_mlp, neox.d_vocab, neox.n_ctx) == (3, 24, 4, 4, 40, 31, 19)
    assert neox.parallel and not neox.gated and not neox.tied
    assert not read_shape(tiny("neox", use_parallel_residual=False).config).parallel
    gpt2 = read_shape(tiny("gpt2", n_inner=None).config)
    assert gpt2.d_mlp == 96 and gpt2.n_ctx == 19 and gpt2.tied and not gpt2.gated
    llama = read_shape(tiny("llama").config)
    assert (llama.n_kv_heads, llama.gated, llama.parallel, llama.architecture) == (2, True, False, "LlamaForCausalLM")
    bert = transformers.BertConfig(architectures=["BertForMaskedLM"])
    with pytest.raises(InputError, match="BertForMaskedLM, expected a causal language model"):
        read_shape(bert)
    assert read_shape(transformers.GPT2Config(architectures=["GPT2Model"])).architecture == "GPT2LMHeadModel"
    with pytest.raises(InputError, match="do not divide"):
        read_shape(transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 3}))
