"""LoRA adapters merged into a base: against PEFT's own unmerged model, with the base left bit for bit as it was."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FOUR, saved, tiny

from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models.loading import merge_adapter

ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7]]
EPS = torch.finfo(torch.float32).eps
ALL = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
FUSED = {"gpt2": ["c_attn"], "neox": ["query_key_value"], "llama": ["q_proj", "v_proj"], "qwen2": ["k_proj"]}
PATTERNS = {
    "gpt2": {"rank_pattern": {"h.1.attn.c_attn": 5}, "alpha_pattern": {"mlp.c_fc": 11}},
    "neox": {"rank_pattern": {"query_key_value": 2}, "alpha_pattern": {"layers.0.attention.query_key_value": 11}},
    "llama": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.2.self_attn.v_proj": 2}},
    "qwen2": {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"down_proj": 3}},
}
NORM = {"gpt2": ["ln_f"], "neox": ["final_layer_norm"], "llama": ["norm"], "qwen2": ["norm"]}
KINDS = [
    *((kind, "every linear", {}) for kind in FOUR),
    *((kind, "patterns", PATTERNS[kind]) for kind in FOUR),
    *((kind, "one projection", {"target_modules": FUSED[kind]}) for kind in FOUR),
    *((kind, "rank stabilised", {"use_rslora": True, "r": 4}) for kind in ("gpt2", "llama")),
    *((kind, "some layers", {"layers_to_transform": [0, 2]}) for kind in ("neox",)),
    *((kind, "trained biases", {"bias": "all"}) for kind in ("gpt2", "neox", "qwen2")),
    *((kind, "biases beside", {"bias": "lora_only"}) for kind in ("gpt2", "qwen2")),
    *((kind, "a whole norm", {"modules_to_save": NORM[kind]}) for kind in ("neox", "llama")),
]


def adapted(kind, folder, base=None, scale=0.2, **settings):
    """PEFT's model with a random adapter, which is saved into the folder; never merged."""
    plain = tiny(kind) if base is None else base
    config = {"r": 3, "lora_alpha": 7, "target_modules": ALL[kind], "fan_in_fan_out": kind == "gpt2", **settings}
    model = peft.get_peft_model(plain, peft.LoraConfig(**config))
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (p.requires_grad and name.endswith("bias")):
                p.copy_(torch.randn(p.shape, generator=draws) * scale)
    model.save_pretrained(folder)
    return model.eval()


def plain_logits(plain, row):
    with torch.no_grad():
        return plain(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def check_equal(model, plain, tolerance=8 * EPS):
    got = model.logits(ROWS)
    for i, row in enumerate(ROWS):
        want = plain_logits(plain, row)
        assert (got[i, : len(row)] - want).abs().max() <= tolerance * want.abs().max()


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kind", "name", "settings"), KINDS, ids=lambda x: x if isinstance(x, str) else "")
def test_an_adapter_is_pefts_unmerged_model(kind, name, settings, tmp_path):
    want = adapted(kind, tmp_path / "adapter", **settings)
    plain = tiny(kind)
    before, flags = state(plain), [p.requires_grad for p in plain.parameters()]
    base = HookedModel.load(plain)
    tuned = HookedModel.load(base, adapter=tmp_path / "adapter")
    check_equal(tuned, want)
    check_equal(base, tiny(kind))
    after = state(plain)
    assert all(torch.equal(after[k], before[k]) for k in before) and flags == [p.requires_grad for p in plain.parameters()]
    assert (tuned.logits(ROWS) - base.logits(ROWS)).abs().max() > 0.05
    shared = own = 0
    for (key, p), (_, q) in zip(plain.named_parameters(), tuned.wrapped.source.named_parameters(), strict=True):
        assert (p.data_ptr() == q.data_ptr()) == torch.equal(p, q), f"{key}: shared just where the adapter leaves it alone"
        shared, own = shared + (p.data_ptr() == q.data_ptr()), own + (p.data_ptr() != q.data_ptr())
    assert shared >= 2 and own >= 1
    if plain.config.tie_word_embeddings:
        assert tuned.wrapped.source.lm_head.weight is tuned.wrapped.source.get_input_embeddings().weight
    assert not any("lora" in n or "base_layer" in n for n, _ in tuned.wrapped.source.named_modules())


@pytest.mark.parametrize("kind", FOUR)
def test_a_pair_with_an_adapter_is_the_pair_with_the_merged_folder(kind, tmp_path):
    folder = saved(tiny(kind), tmp_path / "base")
    merged = adapted(kind, tmp_path / "adapter").merge_and_unload()
    saved(merged, tmp_path / "merged")
    one = ModelPair.load(folder, tmp_path / "adapter")
    two = ModelPair.load(str(folder), str(tmp_path / "merged"))
    assert not one.base.loaded and not one.tuned.loaded
    assert torch.equal(one.base.logits(ROWS), two.base.logits(ROWS))
    largest = two.tuned.logits(ROWS).abs().max()
    assert (one.tuned.logits(ROWS) - two.tuned.logits(ROWS)).abs().max() <= 8 * EPS * largest
    for site in ("L0.W_Q", "L1H2.W_V", "L2.W_out", "L1.W_O", "W_U"):
        torch.testing.assert_close(one.tuned.weight(site), two.tuned.weight(site), rtol=0, atol=2e-6)
        assert torch.equal(one.base.weight(site), two.base.weight(site))
    assert one.notes == two.notes == () and one.tuned.adapter == tmp_path / "adapter" and one.tuned.name == "base + adapter"
    prints = {one.base.fingerprint, one.tuned.fingerprint, two.tuned.fingerprint}
    assert len(prints) == 3 and one.base.fingerprint == two.base.fingerprint
    again = HookedModel.load(folder, adapter=str(tmp_path / "adapter"))
    assert again.fingerprint == one.tuned.fingerprint
    check_equal(again, merged)
    # Saving and loading keeps what was merged.
    check_equal(HookedModel.load(one.tuned.save(tmp_path / "saved")), merged)


@pytest.mark.parametrize("kind", FOUR)
def test_small_deltas_survive_a_half_precision_base(kind, tmp_path):
    """Merged into bf16 a delta below its spacing would vanish; both sides are loaded in fp32 instead, and it is said."""
    folder = saved(tiny(kind).bfloat16(), tmp_path / "base")
    scale = 0.006  # the product of two such factors is far below the spacing of bf16 at 0.3
    want = adapted(
        kind, tmp_path / "adapter", base=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), scale=scale
    )
    pair = ModelPair.load(folder, tmp_path / "adapter")
    assert pair.base.dtype == pair.tuned.dtype == torch.float32, "known before loading"
    assert len(pair.notes) == 1
    assert pair.notes[0].startswith("base is stored as bfloat16; both models are loaded as float32, because merging an adapter into half")
    check_equal(pair.base, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    check_equal(pair.tuned, want)
    change = (pair.tuned.logits(ROWS) - pair.base.logits(ROWS)).abs().max()
    assert 1e-6 < change < 0.01
    delta = pair.tuned.weight("L1.W_Q") - pair.base.weight("L1.W_Q")
    assert 0 < delta.abs().max() < 2**-10, "half the spacing of bf16 at 0.3"
    alone = HookedModel.load(folder, adapter=tmp_path / "adapter")
    assert alone.dtype == torch.float32 and "is stored as bfloat16 and loaded as float32" in alone.notes[0]
    assert torch.equal(alone.logits(ROWS), pair.tuned.logits(ROWS))


def test_half_precision_that_was_asked_for(tmp_path):
    folder = saved(tiny("llama").bfloat16(), tmp_path / "base")
    want = adapted("llama", tmp_path / "adapter", base=tiny("llama").bfloat16().float())
    pair = ModelPair.load(folder, tmp_path / "adapter", dtype="bfloat16")
    assert pair.base.dtype == pair.tuned.dtype == torch.bfloat16 and pair.notes == ()
    merged = want.merge_and_unload()
    assert torch.equal(pair.tuned.weight("L1.W_Q"), merged.model.layers[1].self_attn.q_proj.weight.T.bfloat16()), "rounded once"
    assert pair.tuned.logits(ROWS).dtype == torch.bfloat16


def test_a_half_precision_base_given_as_an_object_stays_as_it_is(tmp_path):
    """It belongs to the caller: it is not converted, and the note does not say that it was."""
    adapted("llama", tmp_path / "adapter", base=tiny("llama").bfloat16().float(), modules_to_save=["lm_head"])
    head = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    plain = tiny("llama").bfloat16()
    files = HookedModel.load(saved(tiny("llama").bfloat16(), tmp_path / "base"))
    for base in (plain, files):
        pair = ModelPair.load(base, tmp_path / "adapter")
        assert pair.base.dtype == torch.bfloat16 and pair.tuned.dtype == torch.float32
        assert pair.notes == ("base is bfloat16 and tuned float32; differences below rounding of the coarser are noise",)
        pair.tuned.logits(ROWS), pair.base.logits(ROWS)
        assert torch.equal(pair.tuned.weight("W_U"), head.T), "what was trained whole keeps its precision"
        assert pair.base.dtype == torch.bfloat16 and pair.tuned.dtype == torch.float32
    assert files.notes == () and plain.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", FOUR)
def test_double_precision_is_kept(kind, tmp_path):
    want = adapted(kind, tmp_path / "adapter", base=tiny(kind).double()).merge_and_unload()
    merged = merge_adapter(tiny(kind).double(), tmp_path / "adapter", None)
    got, expected = dict(merged.named_parameters()), dict(want.named_parameters())
    for name, p in expected.items():
        assert got[name].dtype == torch.float64
        torch.testing.assert_close(got[name], p, rtol=0, atol=1e-14)


def test_embeddings_and_whole_modules(tmp_path):
    want = adapted("llama", tmp_path / "a", target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    tuned = HookedModel.load(tiny("llama"), adapter=tmp_path / "a")
    check_equal(tuned, want)
    merged = want.merge_and_unload()
    torch.testing.assert_close(tuned.weight("W_E"), merged.model.embed_tokens.weight, rtol=0, atol=1e-6)
    assert torch.equal(tuned.weight("W_U"), merged.lm_head.weight.T)


def test_a_base_from_files_and_from_memory_give_the_same(tmp_path):
    adapted("gpt2", tmp_path / "adapter")
    folder = saved(tiny("gpt2"), tmp_path / "base")
    found = [HookedModel.load(base, adapter=tmp_path / "adapter") for base in (folder, tiny("gpt2"), HookedModel.load(folder))]
    assert not any(m.loaded for m in found), "merged on first use"
    for model in found:
        assert torch.equal(model.logits(ROWS), found[0].logits(ROWS))
    assert found[0].fingerprint == found[2].fingerprint != found[1].fingerprint
    found[0].release()
    assert not found[0].loaded and torch.equal(found[0].logits(ROWS), found[1].logits(ROWS))


def test_training_goes_on_after_reading(tmp_path):
    """PEFT freezes what it wraps; the caller's own model must stay trainable."""
    plain = tiny("qwen2")
    adapted("qwen2", tmp_path / "adapter", bias="all")
    tuned = HookedModel.load(plain, adapter=tmp_path / "adapter")
    before = tuned.logits(ROWS)
    loss = plain(input_ids=torch.tensor([ROWS[2]])).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.requires_grad for p in plain.parameters())
    assert all(not p.requires_grad for p in tuned.wrapped.source.parameters())
    assert torch.equal(tuned.logits(ROWS), before)


# ---- refused


def test_adapters_that_do_not_fit(tmp_path):
    adapted("llama", tmp_path / "a")
    for base, message in (
        (tiny("gpt2"), "which a GPT2LMHeadModel of 3 layers does not have"),
        (tiny("qwen2"), r"does not fit: its .*k_proj has 24 inputs and 16 outputs, the base has 24 and 12"),
        (tiny("llama", num_hidden_layers=2), r"which a LlamaForCausalLM of 2 layers does not have"),
        (tiny("llama", num_key_value_heads=4), r"does not fit: its .*k_proj has 24 inputs and 16 outputs, the base has 24 and 32"),
        (tiny("llama", intermediate_size=44), r"does not fit: its .*has 40 inputs|has 24 inputs and 40 outputs"),
    ):
        with pytest.raises(InputError, match=message) as error:
            HookedModel.load(base, adapter=tmp_path / "a")
        assert "\n" not in str(error.value)
    adapted("llama", tmp_path / "more", base=tiny("llama", vocab_size=34), modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(InputError, match="does not fit"):
        HookedModel.load(tiny("llama"), adapter=tmp_path / "more").logits(ROWS)


def test_adapters_of_other_kinds_are_refused_by_name(tmp_path):
    adapted("llama", tmp_path / "dora", use_dora=True)
    with pytest.raises(InputError, match=r"adapter dora is of kind dora, expected lora; merge it first: .*merge_and_unload"):
        HookedModel.load(tiny("llama"), adapter=tmp_path / "dora")
    with pytest.raises(InputError, match="adapter dora is of kind dora"):
        ModelPair.load(tiny("llama"), tmp_path / "dora")
    model = peft.get_peft_model(tiny("llama"), peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(InputError, match="adapter ia3 is of kind ia3"):
        HookedModel.load(tiny("llama"), adapter=tmp_path / "ia3")


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_changed_embedding_of_a_tied_base(kind, tmp_path):
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    adapted(kind, tmp_path / "rows", target_modules=[*ALL[kind], embedding], fan_in_fan_out=False)
    with pytest.raises(InputError, match="adapter rows changes the embedding or the unembedding, which the base ties together"):
        HookedModel.load(tiny(kind), adapter=tmp_path / "rows")
    adapted(kind, tmp_path / "head", modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="which the base ties together"):
        HookedModel.load(tiny(kind), adapter=tmp_path / "head")


def test_folders_that_are_no_whole_adapter(tmp_path):
    adapted("llama", tmp_path / "a")
    base = tiny("llama")

    def broken(name, change):
        folder = shutil.copytree(tmp_path / "a", tmp_path / name)
        change(folder)
        return folder

    def rewrite(folder, change):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    for folder, message in (
        (tmp_path / "nowhere", r"is no adapter: expected adapter_config\.json"),
        (
            broken("b", lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin")),
            "only as a pickle, which is never opened",
        ),
        (broken("c", lambda f: (f / "adapter_model.safetensors").unlink()), "has its weights nowhere"),
        (broken("d", lambda f: (f / "adapter_config.json").write_text("{")), "is no adapter's config"),
        (broken("e", lambda f: rewrite(f, lambda t: t.pop(key))), r"module .*q_proj has A \[3, 24\], expected A"),
        (broken("f", lambda f: rewrite(f, lambda t: t.update({key: t[key][:, :2].contiguous()}))), r"B \[32, 2\], expected A \[rank, in\]"),
    ):
        with pytest.raises(InputError, match=message):
            HookedModel.load(base, adapter=folder)
    whole = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    cut = broken("g", lambda f: (f / "adapter_model.safetensors").write_bytes(whole[:-200]))
    with pytest.raises(InputError, match="is cut short"):
        HookedModel.load(base, adapter=cut)


def test_weights_of_an_adapter_that_are_not_finite(tmp_path):
    adapted("llama", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[key][3, 1] = float("nan")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="NaN or infinite"):
        HookedModel.load(tiny("llama"), adapter=tmp_path / "a").logits(ROWS)


def test_tensors_of_an_adapter_that_reach_no_module_are_not_left_out(tmp_path):
    """PEFT drops factors that its own config does not mention, with a warning."""
    adapted("llama", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match=r"a has factors but no place for model\.layers\.0\.mlp\.down_proj, as its config chooses modules"):
        HookedModel.load(tiny("llama"), adapter=tmp_path / "a").logits(ROWS)


def test_factors_that_an_adapter_lacks_are_not_made_up(tmp_path):
    """PEFT starts modules that its config names and its file lacks from zero, with a warning."""
    adapted("llama", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1.self_attn.q_proj" not in k}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"a has no factors for model\.layers\.1\.self_attn\.q_proj, as its config chooses modules"):
        HookedModel.load(tiny("llama"), adapter=tmp_path / "a").logits(ROWS)


def test_one_adapter_at_a_time(tmp_path):
    adapted("llama", tmp_path / "a")
    tuned = HookedModel.load(saved(tiny("llama"), tmp_path / "base"), adapter=tmp_path / "a")
    with pytest.raises(InputError, match="has an adapter already"):
        HookedModel.load(tuned, adapter=tmp_path / "a")
    with pytest.raises(InputError, match="is an adapter, not a model; give its base as the model and this folder as its adapter"):
        HookedModel.load(tmp_path / "a")
