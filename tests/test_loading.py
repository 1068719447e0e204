"""Loading from memory, folders and the Hub's cache: the logits are plain Hugging Face's, and nothing else passes for a model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FOUR, saved, tiny

from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import Batch, HookedModel, loading
from interp.models.checkpoint import resolve
from interp.sites import Site

ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7]]


def plain_logits(plain, row):
    with torch.no_grad():
        return plain(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def check_equal(model, plain):
    """Within 8 eps times the largest logit."""
    got = model.logits(ROWS)
    for i, row in enumerate(ROWS):
        want = plain_logits(plain, row)
        eps = max(torch.finfo(want.dtype).eps, torch.finfo(torch.float32).eps)
        assert got.dtype == want.dtype
        assert (got[i, : len(row)] - want).abs().max() <= 8 * eps * want.abs().max()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: saved(tiny(kind), root / kind) for kind in FOUR}


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def rewrite(folder: Path, change) -> Path:
    """Change the tensors of a folder: name -> tensor, in place or as a new mapping."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reconfigure(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# ---- the same model, however it comes


@pytest.mark.parametrize("kind", FOUR)
def test_a_model_in_memory(kind):
    plain = tiny(kind)
    model = HookedModel.load(plain)
    assert model.loaded is False and model.checkpoint is None
    check_equal(model, plain)
    assert HookedModel.load(model) is model


@pytest.mark.parametrize("kind", FOUR)
def test_a_folder(folders, kind, monkeypatch):
    model = HookedModel.load(folders[kind])
    text = HookedModel.load(str(folders[kind]))
    assert not model.loaded and model.dtype == torch.float32 and model.name == kind, "only configs and headers are read"
    check_equal(model, tiny(kind))
    assert model.loaded and torch.equal(text.logits(ROWS), model.logits(ROWS))
    assert not any(p.requires_grad for p in model.wrapped.source.parameters()) and not model.wrapped.runner.training
    model.release()
    assert not model.loaded
    check_equal(model, tiny(kind))


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_with_and_without_a_stored_head(kind, tied, tmp_path):
    plain = tiny(kind, tie_word_embeddings=tied)
    folder = saved(plain, tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    head = [n for n in stored if "lm_head" in n or "embed_out" in n]
    assert len(head) == (0 if tied else 1)
    model = HookedModel.load(folder)
    assert model.shape.tied == tied
    check_equal(model, plain)
    assert torch.equal(model.weight("W_U"), plain.get_output_embeddings().weight.T)
    if tied:  # old checkpoints store the same numbers twice
        embedding = next(v for n, v in stored.items() if v.shape == (31, 24))
        name = "embed_out.weight" if kind == "neox" else "lm_head.weight"
        twice = HookedModel.load(rewrite(copy(folder, tmp_path / "twice"), lambda t: {**t, name: embedding.clone()}))
        assert twice.shape.tied
        check_equal(twice, plain)
        assert torch.equal(twice.weight("W_U"), embedding.T)


@pytest.mark.parametrize("kind", FOUR)
def test_shards_with_an_index(kind, tmp_path):
    plain = tiny(kind)
    folder = saved(plain, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model = HookedModel.load(folder)
    check_equal(model, plain)
    assert torch.equal(model.weight("L2.W_out"), HookedModel.load(plain).weight("L2.W_out"))


@pytest.mark.parametrize("kind", FOUR)
def test_names_without_the_models_prefix(folders, kind, tmp_path):
    def bare(tensors):
        return {re.sub(r"^(model|transformer|gpt_neox)\.", "", name): t for name, t in tensors.items()}

    folder = rewrite(copy(folders[kind], tmp_path / "bare"), bare)
    assert not any(re.match(r"(model|transformer|gpt_neox)\.", n) for n in load_file(folder / "model.safetensors"))
    check_equal(HookedModel.load(folder), tiny(kind))


def test_constants_that_old_checkpoints_store(folders, tmp_path, recwarn):
    """Causal masks and rotary frequencies beside the weights are no weights, whatever they hold."""
    gpt2 = {"transformer.h.0.attn.bias": torch.ones(1, 1, 5, 5), "transformer.h.2.attn.masked_bias": torch.tensor([-1e9])}
    neox = {"gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(3), "gpt_neox.layers.0.attention.bias": torch.ones(2)}
    for kind, more in (("gpt2", gpt2), ("neox", neox), ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})):
        check_equal(HookedModel.load(rewrite(copy(folders[kind], tmp_path / kind), lambda t, more=more: {**t, **more})), tiny(kind))
    assert not [w for w in recwarn if "no part of the language model" in str(w.message)]


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "bfloat16") for kind in FOUR), ("llama", "float16")])
def test_half_precision(kind, dtype, tmp_path):
    dtype = getattr(torch, dtype)
    plain = tiny(kind).to(dtype)
    model = HookedModel.load(saved(plain, tmp_path / "m"))
    assert model.dtype == dtype
    check_equal(model, plain)
    assert model.weight("L1.W_Q").dtype == model.dtype == dtype


@pytest.mark.parametrize("kind", FOUR)
def test_other_precisions_are_asked_for_by_name(folders, kind):
    for dtype, word in ((torch.float64, "float64"), (torch.bfloat16, "bf16" if kind == "llama" else torch.bfloat16)):
        model = HookedModel.load(folders[kind], dtype=word, device="cpu")
        assert model.dtype == dtype, "known before anything is loaded"
        check_equal(model, tiny(kind).to(dtype))
        assert model.dtype == dtype


def test_a_device_map(folders):
    model = HookedModel.load(folders["llama"], device_map={"": "cpu"})
    check_equal(model, tiny("llama"))


def test_a_training_model_with_dropout_is_read_in_evaluation_mode():
    plain = tiny("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    got = HookedModel.load(plain).logits(ROWS)
    assert plain.training
    assert torch.equal(got, HookedModel.load(plain).logits(ROWS))
    check_equal(HookedModel.load(plain), plain.eval())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 10}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("neox", {"use_parallel_residual": False}),
        ("neox", {"rotary_pct": 1.0}),
        ("gpt2", {"n_inner": None}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"activation_function": "relu"}),
    ],
)
def test_settings_that_change_the_computation(kind, changes, tmp_path):
    plain = tiny(kind, **changes)
    model = HookedModel.load(saved(plain, tmp_path / "m"))
    check_equal(model, plain)
    default = tiny(kind)
    if all(a.shape == b.shape for a, b in zip(plain.parameters(), default.parameters(), strict=False)) and "n_inner" not in changes:
        assert (plain_logits(plain, ROWS[2]) - plain_logits(default, ROWS[2])).abs().max() > 1e-3, "the setting must matter"
    for site in ("L1.W_K", "L1.W_O", "L1.W_in"):
        assert model.weight(site).ndim == 2
    assert model.capture(ROWS, "L1.k")[Site("k", 1)].shape == (3, 7, model.shape.n_kv_heads, model.shape.d_head)


# ---- the Hub


def hub_model(cache: Path, name: str, revisions: dict[str, tuple[str, torch.nn.Module]]) -> None:
    """A model in a Hub cache laid out by hand: snapshots of links to blobs, and refs that name commits."""
    home = cache / f"models--{name.replace('/', '--')}"
    for ref, (commit, plain) in revisions.items():
        folder = saved(plain, cache / f"made-{ref}")
        for part in ("refs", "blobs", f"snapshots/{commit}"):
            (home / part).mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
        for file in folder.iterdir():
            shutil.copy(file, home / "blobs" / f"{ref}-{file.name}")
            (home / "snapshots" / commit / file.name).symlink_to(home / "blobs" / f"{ref}-{file.name}")


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_revisions_of_a_hub_model_are_different_models(kind, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first, second = tiny(kind, seed=0), tiny(kind, seed=7)
    hub_model(tmp_path, "some/model", {"main": ("a" * 40, first), "step1000": ("b" * 40, second)})
    main = HookedModel.load("some/model")
    check_equal(main, first)
    for what, revision in (("some/model@step1000", None), ("some/model", "step1000"), ("some/model@" + "b" * 40, None)):
        model = HookedModel.load(what, revision=revision)
        check_equal(model, second)
        assert model.name == f"some/model@{revision or what.split('@')[1]}"
        assert (model.logits(ROWS) - main.logits(ROWS)).abs().max() > 0.1
        assert model.fingerprint != main.fingerprint
    with pytest.raises(InputError, match="does not hold some/model at revision step1, and HF_HUB_OFFLINE is set"):
        HookedModel.load("some/model@step1")


# ---- identity


def test_the_fingerprint_of_files(folders, tmp_path):
    model = HookedModel.load(folders["llama"])
    assert model.fingerprint == HookedModel.load(copy(folders["llama"], tmp_path / "same")).fingerprint and not model.loaded
    other = rewrite(copy(folders["llama"], tmp_path / "other"), lambda t: t["model.norm.weight"][3].add_(1e-6))
    assert HookedModel.load(other).fingerprint != model.fingerprint
    edit = Edit((WeightChange(Site("ln_final"), torch.ones(24)),))
    with model.edited(edit):
        assert model.active_edits == (edit.digest,)
    assert model.active_edits == ()


@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", torch.float32), ("llama", torch.bfloat16), ("neox", torch.float64)])
def test_the_fingerprint_in_memory_follows_every_entry(kind, dtype):
    plain = tiny(kind).to(dtype)
    model = HookedModel.load(plain)
    first = model.fingerprint
    assert first == model.fingerprint == HookedModel.load(tiny(kind).to(dtype)).fingerprint
    seen = {first}
    draws = torch.Generator().manual_seed(0)
    named = [p for _, p in plain.named_parameters()]
    with torch.no_grad():
        for n in range(20):
            p = named[int(torch.randint(len(named), (1,), generator=draws))].view(-1)
            i, j = torch.randperm(len(p), generator=draws)[:2].tolist()
            before = p[[i, j]].clone()
            if n % 5 == 0:
                p[[i, j]] = before.flip(0)  # swapped within a tensor: every plain sum stays the same
                changed = bool(before[0] != before[1])
            elif n % 5 == 1:
                p[i], p[j] = before[0] + 1, before[1] - 1
                changed = True
            elif n % 5 == 2:
                p[i] = -before[0]
                changed = True
            elif n % 5 == 3:
                p[[i, j]] = -before  # the highest bit twice, which a sum of products forgets
                changed = True
            else:
                p[i] = torch.nextafter(before[0].float(), torch.tensor(9.0)) if dtype != torch.bfloat16 else before[0] * 1.01
                changed = bool(p[i] != before[0])
            now = model.fingerprint
            assert (now not in seen) == changed, (n, i, j)
            seen.add(now)
            p[[i, j]] = before
            assert model.fingerprint == first


def test_the_fingerprint_in_memory_tells_tensors_and_settings_apart(tmp_path):
    plain = tiny("llama")
    model = HookedModel.load(plain)
    first = model.fingerprint
    a, b = plain.model.layers[0].input_layernorm, plain.model.layers[1].input_layernorm
    with torch.no_grad():
        one, two = a.weight.clone(), b.weight.clone()
        a.weight.copy_(two), b.weight.copy_(one)
    assert model.fingerprint != first, "two tensors changed places"
    with torch.no_grad():
        a.weight.copy_(one), b.weight.copy_(two)
    assert model.fingerprint == first
    assert HookedModel.load(tiny("llama", rms_norm_eps=0.1)).fingerprint != first
    assert HookedModel.load(tiny("llama").bfloat16()).fingerprint != first
    plain.save_pretrained(tmp_path)  # writes notes into the config
    assert model.fingerprint == first
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert HookedModel.load(again).fingerprint == first, "the folder it came from is no part of it"


# ---- refused


def test_what_is_no_model(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    pickled = copy(folders["gpt2"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    bare = copy(folders["gpt2"], tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    cut = copy(folders["gpt2"], tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    both = copy(folders["llama"], tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    file = folders["gpt2"] / "config.json"
    for what, message in (
        (f"{folders['gpt2']}x", "there is no folder .*gpt2x; near: gpt2"),
        (tmp_path / "empty", r"empty has no config\.json; expected a checkpoint folder"),
        (bare, r"bare has no weights: expected model\.safetensors"),
        (pickled, r"only as a pickle \(pytorch_model\.bin\), which is never opened here; convert it"),
        (cut, "is cut short: .* bytes, expected .* \\(was a download interrupted\\?\\)"),
        (adapter, "adapter is an adapter, not a model; give its base as the model and this folder as its adapter"),
        (both, "both holds a whole model and an adapter; keep them in two folders"),
        (file, "is a file, expected the folder of a checkpoint"),
        ("no-such-model", "'no-such-model' is no folder and no organism; the Hub cache does not hold no-such-model"),
        ("no such model", "is no folder, no organism and no Hub id"),
    ):
        with pytest.raises(InputError, match=message) as error:
            HookedModel.load(what)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", FOUR)
def test_tensors_that_are_missing_are_never_drawn_at_random(folders, kind, tmp_path):
    """transformers initialises what it does not find, with a warning."""
    names = list(load_file(folders[kind] / "model.safetensors"))
    for n, name in enumerate(names[:: max(1, len(names) // 7)]):
        folder = rewrite(copy(folders[kind], tmp_path / str(n)), lambda t, name=name: t.pop(name))
        with pytest.raises(InputError, match=f"lacks .*{re.escape(name.split('.', 1)[1])}|lacks 1 of the tensors its config asks for"):
            HookedModel.load(folder).logits(ROWS)


@pytest.mark.parametrize("kind", FOUR)
def test_an_untied_model_without_its_head(kind, tmp_path):
    folder = saved(tiny(kind, tie_word_embeddings=False), tmp_path / "m")
    rewrite(folder, lambda t: {n: v for n, v in t.items() if "lm_head" not in n and "embed_out" not in n})
    with pytest.raises(InputError, match=r"lacks 1 of the tensors its config asks for, such as lm_head\.weight"):
        HookedModel.load(folder).logits(ROWS)


@pytest.mark.parametrize("kind", FOUR)
def test_tensors_that_the_config_has_no_place_for(folders, kind, tmp_path):
    """A config that says fewer layers than the files have, or no bias where one was trained: transformers leaves them out."""

    def another_layer(tensors):
        return tensors | {re.sub(r"\.2\.", ".3.", n): t.clone() for n, t in tensors.items() if re.search(r"\.(h|layers)\.2\.", n)}

    with pytest.raises(InputError, match=r"has \d+ tensors that its config has no place for, such as .*\.3\."):
        HookedModel.load(rewrite(copy(folders[kind], tmp_path / "deep"), another_layer)).logits(ROWS)
    if kind in ("llama", "qwen2"):
        for n, name in enumerate(("self_attn.o_proj.bias", "mlp.up_proj.bias", "self_attn.q_norm.weight", "mlp.up_proj.weight_scale")):
            folder = copy(folders[kind], tmp_path / str(n))
            rewrite(folder, lambda t, name=name: {**t, f"model.layers.1.{name}": torch.ones(40 if "up_proj.bias" in name else 24)})
            with pytest.raises(InputError, match=f"1 tensors that its config has no place for, such as model.layers.1.{name}"):
                HookedModel.load(folder).logits(ROWS)
    folder = rewrite(copy(folders[kind], tmp_path / "value"), lambda t: {**t, "v_head.summary.weight": torch.ones(24)})
    with pytest.warns(UserWarning, match=r"v_head\.summary\.weight and 0 more are no part of the language model"):
        check_equal(HookedModel.load(folder), tiny(kind))


@pytest.mark.parametrize(("kind", "bad"), [*((kind, float("nan")) for kind in FOUR), ("gpt2", float("inf"))])
def test_weights_that_are_not_finite(folders, kind, bad, tmp_path):
    name = next(n for n in load_file(folders[kind] / "model.safetensors") if re.search(r"\.1\..*(up_proj|c_fc|h_to_4h)\.weight", n))
    folder = rewrite(copy(folders[kind], tmp_path / "m"), lambda t: t[name][2, 3:5].fill_(bad))
    model = HookedModel.load(folder)
    with pytest.raises(InputError, match=rf"m: 2 of 960 entries of .*{re.escape(name.split('.', 1)[1])} are NaN or infinite"):
        model.logits(ROWS)


def test_numbers_too_large_for_the_dtype_asked_for(folders, tmp_path):
    folder = rewrite(copy(folders["llama"], tmp_path / "m"), lambda t: t["lm_head.weight"][0, 0].fill_(1e6))
    HookedModel.load(folder).logits(ROWS)
    with pytest.raises(InputError, match="1 of 744 entries of lm_head.weight are NaN or infinite"):
        HookedModel.load(folder, dtype="float16").logits(ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"lacks layers\.3\."),
        ({"num_attention_heads": 6, "head_dim": None}, r"has shape \[16, 24\], but the config makes it \[8, 24\]"),
        ({"intermediate_size": 48}, "but the config makes it"),
        ({"vocab_size": 33}, "embeds 31 tokens, but its config says vocab_size 33"),
        ({"num_key_value_heads": 3}, "4 heads, which 3 key/value heads do not divide"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification, expected a causal language model"),
        ({"model_type": "martian"}, "martian"),
        ({"model_type": "bert", "architectures": None}, "no causal language model|lacks|BertLMHeadModel"),
    ],
)
def test_configs_that_do_not_fit_the_files(folders, changes, message, tmp_path):
    folder = reconfigure(copy(folders["llama"], tmp_path / "m"), **changes)
    with pytest.raises(InputError, match=message):
        HookedModel.load(folder).logits(ROWS)


def test_settings_of_loading_that_are_refused(folders, unchecked):
    folder = folders["gpt2"]
    for settings, message in (
        ({"dtype": "float33"}, "dtype 'float33' is not auto, float32, float64, bfloat16 or float16"),
        ({"dtype": "int8"}, "dtype 'int8' is not"),
        ({"dtype": torch.int8}, "dtype 'int8' is not"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not"),
        ({"device": "gpu"}, "device 'gpu' is not auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there; this machine has [0-9]+ CUDA devices"),
        ({"device": torch.device("cuda", 99)}, "device 'cuda:99' is not there"),
        ({"bos": "sometimes"}, "bos='sometimes' is not auto, always or never"),
        ({"revision": "main"}, "is a folder, which has no revision 'main'"),
    ):
        with pytest.raises(InputError, match=message):
            HookedModel.load(folder, **settings)
    plain = tiny("gpt2")
    model = HookedModel.load(plain, bos="never")
    for what, settings, message in (
        (plain, {"dtype": "float64"}, "LMHeadModel is taken as it is, with dtype torch.float32; dtype=torch.float64 is for loading"),
        (model, {"dtype": "bfloat16"}, "is taken as it is, with dtype torch.float32"),
        (model, {"bos": "always"}, "with bos never; bos=always is for loading checkpoints"),
        (plain, {"revision": "main"}, "revision=main is for loading"),
    ):
        with pytest.raises(InputError, match=message):
            HookedModel.load(what, **settings)
    assert HookedModel.load(model, dtype="float32", bos="never") is model is HookedModel.load(model)


def test_a_model_that_transformerlens_cannot_see_whole():
    """LoRA inside a fused projection is dropped by the wrapper: the check against plain Hugging Face says so."""
    import peft

    for kind, target in (("gpt2", "c_attn"), ("neox", "query_key_value")):
        plain = peft.get_peft_model(
            tiny(kind), peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
        )
        with pytest.raises(InputError, match="logits through TransformerLens differ from plain Hugging Face"):
            HookedModel.load(plain.get_base_model()).logits(ROWS)
        with pytest.raises(InputError, match="PeftModel"):
            HookedModel.load(plain).logits(ROWS)
    model = HookedModel.load(tiny("gpt2"))
    with pytest.raises(InputError, match="already wrapped by TransformerLens"):
        HookedModel.load(model.wrapped.runner).logits(ROWS)


def test_layers_and_heads_out_of_range(folders):
    model = HookedModel.load(folders["qwen2"])
    for site, message in (
        ("L3.z", "L3.z: layer 3 is out of range; the model has layers 0 to 2"),
        ("L0H4.z", "L0H4.z: head 4 is out of range; the model has heads 0 to 3"),
        ("L0H2.v", "head 2 is out of range; the model has key/value heads 0 to 1"),
        ("L0H4.W_K", "head 4 is out of range; the model has heads 0 to 3"),
        ("L7.W_O", "layer 7 is out of range; the model has layers 0 to 2"),
    ):
        with pytest.raises(InputError, match=message):
            model.weight(site) if "W_" in site else model.capture(ROWS, site)
    with pytest.raises(InputError, match="has no weight W_pos"):
        model.weight("W_pos")
    with pytest.raises(InputError, match=r"has no weight L0\.b_O"):
        model.weight("L0.b_O")


# ---- pieces


def test_bytes_needed_and_announced(folders, capsys, monkeypatch):
    found = resolve(folders["llama"])
    parameters = sum(p.numel() for p in tiny("llama").parameters())
    assert loading.needed_bytes(found, None) == parameters * 4 and loading.needed_bytes(found, torch.bfloat16) == parameters * 2
    loading.announce([("a", 2**27)], torch.device("cpu"))
    assert capsys.readouterr().err == "", "small models load without a word"
    monkeypatch.setattr(loading, "free_bytes", lambda device: 2**30)
    loading.announce([("a", 2**29), ("b", 2**28)], torch.device("cpu"))
    assert "a 0.5 GiB, b 0.2 GiB on cpu, 1.0 GiB free: fits" in capsys.readouterr().err
    loading.announce([("a", 2**30), ("b", 2**28)], torch.device("cpu"))
    assert "does not fit at once: use load='one at a time'" in capsys.readouterr().err
    assert Batch.of(ROWS).ids.device.type == "cpu" and loading.read_device("cpu:0").index == 0


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

OwnModel.__name__ = "LlamaForCausalLM"
"""


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [str(tmp_path / "modules"), *sys.path])
    plain = tiny("llama")
    folder = saved(plain, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + CODE)
    with pytest.raises(InputError, match="custom code"):
        HookedModel.load(folder).logits([[3, 9, 4]])
    assert not (tmp_path / "ran").exists()
    got = HookedModel.load(folder, trust_remote_code=True).logits([[3, 9, 4]])
    assert (tmp_path / "ran").exists()
    assert torch.allclose(got[0], plain(torch.tensor([[3, 9, 4]])).logits[0], atol=1e-5)
