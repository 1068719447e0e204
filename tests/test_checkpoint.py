"""Finding, checking and reading checkpoints and adapters as files."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FOUR, randomised, saved, tiny
from torch import nn

import interp.organisms
from interp.errors import InputError
from interp.models import checkpoint, weights
from interp.models.adapters import AdaptedTensors, is_adapter, read_adapter
from interp.models.checkpoint import read_tokenizer, resolve
from interp.models.weights import StateTensors
from interp.sites import Site


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: saved(tiny(kind), root / kind) for kind in FOUR}


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- reading


@pytest.mark.parametrize("kind", FOUR)
def test_tensors_come_as_the_model_has_them(folders, kind) -> None:
    found, model = resolve(folders[kind]), tiny(kind)
    assert found.name == kind and found.dtype == torch.float32
    for name, tensor in model.state_dict().items():  # includes the tied unembedding and NeoX's renamed one
        assert torch.equal(found.get(name), tensor), name
        assert found.info(name).shape == tuple(tensor.shape)
    assert found.n_parameters == sum(p.numel() for p in model.parameters()) == found.n_bytes // 4
    for site in (Site("W_Q", 1), Site("W_U"), Site("W_O", 2, 3)):
        assert torch.equal(weights.read(site, found, found.shape), weights.read(site, StateTensors(model.state_dict()), found.shape))


def test_shards_with_an_index(tmp_path) -> None:
    folder = saved(tiny("llama"), tmp_path / "shards", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    found = resolve(folder)
    for name, tensor in tiny("llama").state_dict().items():
        assert torch.equal(found.get(name), tensor)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"lacks 1 of the {len(shards)} shards its index names; the first is {shards[1].name}"):
        resolve(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"safetensors files but no model\.safetensors\.index\.json"):
        resolve(folder)


def test_names_without_the_models_prefix(folders, tmp_path) -> None:
    folder = copy(folders["gpt2"], tmp_path / "bare")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(resolve(folder).get("transformer.h.1.attn.c_attn.weight"), tiny("gpt2").transformer.h[1].attn.c_attn.weight)
    assert torch.equal(resolve(folder).get("lm_head.weight"), tiny("gpt2").lm_head.weight)


def test_half_precision_is_said(tmp_path) -> None:
    found = resolve(saved(tiny("llama").to(torch.bfloat16), tmp_path / "half"))
    assert found.dtype == torch.bfloat16 and found.get("lm_head.weight").dtype == torch.bfloat16
    assert found.n_bytes == 2 * found.n_parameters


# ---- finding


def test_hub_cache_with_revisions(folders, tmp_path, monkeypatch) -> None:
    """A cache laid out by hand: snapshots of links to blobs, and refs that name commits."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    home = tmp_path / "hub" / "models--some--model"
    for ref, commit, seed in (("main", "a" * 40, 0), ("step1000", "b" * 40, 7)):
        folder = saved(tiny("neox", seed=seed), tmp_path / ref)
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "refs").mkdir(exist_ok=True)
        (home / "blobs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(commit)
        for file in folder.iterdir():
            blob = home / "blobs" / f"{ref}-{file.name}"
            shutil.copy(file, blob)
            (home / "snapshots" / commit / file.name).symlink_to(blob)
    assert torch.equal(resolve("some/model").get("lm_head.weight"), tiny("neox", seed=0).lm_head.weight)
    for found in (resolve("some/model@step1000"), resolve("some/model", revision="step1000"), resolve("some/model@" + "b" * 40)):
        assert torch.equal(found.get("lm_head.weight"), tiny("neox", seed=7).lm_head.weight)
    assert resolve("some/model@step1000").name == "some/model@step1000"
    assert resolve("some/model").fingerprint != resolve("some/model@step1000").fingerprint
    with pytest.raises(InputError, match="does not hold some/model at revision nowhere"):
        resolve("some/model@nowhere")
    with pytest.raises(InputError, match="names the revision step1000, but revision='main'"):
        resolve("some/model@step1000", revision="main")


def test_unknown_names_list_near_ones(folders, tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(interp.organisms, "names", lambda: ("base", "tuned-facts"))
    with pytest.raises(InputError, match="'tuned-fact' is no folder and no organism.*near: tuned-facts"):
        resolve("tuned-fact")
    with pytest.raises(InputError, match="no Hub id"):
        resolve("two words?")
    with pytest.raises(InputError, match=f"there is no folder {folders['gpt2']}2; near: gpt2"):
        resolve(f"{folders['gpt2']}2")
    with pytest.raises(InputError, match="no revision 'main'"):
        resolve(folders["gpt2"], revision="main")
    with pytest.raises(InputError, match="is a file, expected the folder"):
        resolve(folders["gpt2"] / "config.json")


def test_a_folder_wins_over_an_organism_and_says_so(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(interp.organisms, "names", lambda: ("twin", "other"))
    monkeypatch.setattr(interp.organisms, "folder", lambda name: folders["llama"])
    assert resolve("other").name == "other" and resolve("other").shape.architecture == "LlamaForCausalLM"
    copy(folders["gpt2"], tmp_path / "twin")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="'twin' is a folder here and an organism; the folder is used"):
        assert resolve("twin").shape.architecture == "GPT2LMHeadModel"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("./twin")


# ---- refusing


def test_damaged_files_are_refused(folders, tmp_path) -> None:
    whole = (folders["gpt2"] / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for i, (content, message) in enumerate(
        [
            (whole[:-1000], f"cut short: {len(whole) - 1000} bytes, expected {len(whole)}"),
            (whole[: header // 2], f"expected a header of {header} bytes"),
            (b"", "cut short or no safetensors file: 0 bytes"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer"),
            (struct.pack("<Q", 4) + b"nope" + bytes(20), "no safetensors file"),
            (b"PK\x03\x04" + bytes(200), "no safetensors file"),
        ]
    ):
        folder = copy(folders["gpt2"], tmp_path / str(i))
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            resolve(folder)
        assert "\n" not in str(error.value)


def test_pickles_are_refused_by_name_and_never_opened(folders, tmp_path) -> None:
    folder = copy(folders["llama"], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only as a pickle \(pytorch_model\.bin\), which is never opened.*save_pretrained"):
        resolve(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"has no weights: expected model\.safetensors"):
        resolve(folder)


def test_folders_that_are_no_model(folders, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter, not a model; give its base as the model"):
        resolve(tmp_path / "empty")
    shutil.copy(folders["llama"] / "config.json", tmp_path / "empty")  # as some trainers leave it beside the adapter
    with pytest.raises(InputError, match="is an adapter, not a model"):
        resolve(tmp_path / "empty")
    assert is_adapter(tmp_path / "empty") and not is_adapter(folders["llama"])
    folder = copy(folders["llama"], tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "martian"}))
    with pytest.raises(InputError, match="martian"):
        resolve(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be used"):
        resolve(folder)


def test_tensors_that_do_not_make_the_model(folders, tmp_path) -> None:
    """What transformers would fill with random numbers is refused."""
    folder = copy(folders["llama"], tmp_path / "a")
    rewrite(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(
        InputError, match=r"lacks layers\.2\.mlp\.up_proj\.weight, which its config \(LlamaForCausalLM, layers 0 to 2\) needs"
    ):
        resolve(folder)
    folder = copy(folders["llama"], tmp_path / "b")
    rewrite(folder, lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(24, 16)}))
    with pytest.raises(InputError, match=r"k_proj\.weight has shape \[24, 16\], but the config makes it \[16, 24\]"):
        resolve(folder)
    folder = copy(folders["llama"], tmp_path / "c")
    rewrite(folder, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(33, 24)}))
    with pytest.raises(InputError, match="embeds 33 tokens, but its config says vocab_size 31"):
        resolve(folder)


def test_weights_that_are_not_finite(folders, tmp_path) -> None:
    folder = copy(folders["qwen2"], tmp_path / "nan")
    rewrite(folder, lambda t: t["model.layers.1.self_attn.q_proj.bias"][4:6].fill_(float("nan")))
    resolve(folder).check()
    with pytest.raises(InputError, match=r"2 of 24 entries of model\.layers\.1\.self_attn\.q_proj\.bias are NaN or infinite"):
        resolve(folder).check(finite=True)


# ---- identity


def test_fingerprint_follows_weights_and_config_and_not_the_place(folders, tmp_path) -> None:
    first = resolve(folders["gpt2"]).fingerprint
    assert resolve(copy(folders["gpt2"], tmp_path / "moved")).fingerprint == first
    rewrite(tmp_path / "moved", lambda t: t["transformer.ln_f.bias"][3].add_(1e-3))
    assert resolve(tmp_path / "moved").fingerprint != first
    folder = copy(folders["gpt2"], tmp_path / "config")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "0", "_name_or_path": "elsewhere"}))
    assert resolve(folder).fingerprint == first
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))
    assert resolve(folder).fingerprint != first


def test_file_digest_is_right_and_remembered(folders, tmp_path, monkeypatch) -> None:
    file = copy(folders["gpt2"], tmp_path / "x") / "model.safetensors"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert checkpoint.file_digest(file) == expected
    monkeypatch.setattr(hashlib, "file_digest", None)  # a second reading would fail
    assert checkpoint.file_digest(file) == expected
    monkeypatch.undo()
    file.write_bytes(b"other")
    assert checkpoint.file_digest(file) == hashlib.sha256(b"other").hexdigest()


# ---- tokenizers


def test_tokenizers(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(tmp_path / "words")
    assert read_tokenizer(tmp_path / "words")("the cat")["input_ids"] == [1, 2]
    assert checkpoint.has_tokenizer(tmp_path / "words") and not checkpoint.has_tokenizer(tmp_path)
    with pytest.raises(InputError, match="has no tokenizer"):
        read_tokenizer(tmp_path)


# ---- adapters

ALL_LINEAR = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
}


def adapted(kind: str, folder: Path, **settings) -> nn.Module:
    """A model with a random adapter, which is saved into a folder."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ALL_LINEAR[kind], "fan_in_fan_out": kind == "gpt2", **settings})
    model = peft.get_peft_model(tiny(kind), config)
    randomised_parts = [p for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n]
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in randomised_parts:
            p.copy_(torch.randn(p.shape, generator=draws) * 0.2)
    model.save_pretrained(folder)
    return model


PATTERNS = {
    "gpt2": {"rank_pattern": {"h.1.attn.c_attn": 5}, "alpha_pattern": {"mlp.c_fc": 11}},
    "neox": {"rank_pattern": {"query_key_value": 2}, "alpha_pattern": {"layers.0.attention.query_key_value": 11}},
    "llama": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.2.self_attn.v_proj": 2}},
    "qwen2": {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"down_proj": 3}},
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", FOUR)
@torch.no_grad()
def test_factors_are_pefts_merge(kind, rslora, tmp_path) -> None:
    model = adapted(kind, tmp_path / "adapter", use_rslora=rslora, **PATTERNS[kind])
    merged, base = model.merge_and_unload().state_dict(), StateTensors(tiny(kind).state_dict())
    adapter = read_adapter(tmp_path / "adapter")
    shape = checkpoint.read_shape(tiny(kind).config)
    factors = adapter.factors(shape)
    assert {(s.layer, s.component) for s in factors} == {(i, m) for i in range(3) for m in weights.modules(shape)}
    for site, (left, right) in factors.items():
        delta = weights.read(site, StateTensors(merged), shape) - weights.read(site, base, shape)
        torch.testing.assert_close(left @ right, delta, rtol=0, atol=2e-6)
        assert delta.norm() > 0.1 and left.dtype == right.dtype == torch.float32
    both = AdaptedTensors(base, adapter, shape)
    for name in base.names():
        torch.testing.assert_close(both.get(name), merged[name], rtol=0, atol=2e-6)
    assert is_adapter(tmp_path / "adapter") and adapter.kind == "lora" and adapter.rank == 3


@torch.no_grad()
def test_embeddings_and_whole_modules(tmp_path) -> None:
    targets = ["q_proj", "embed_tokens"]
    model = adapted("llama", tmp_path / "adapter", target_modules=targets, modules_to_save=["lm_head", "norm"])
    merged, base = model.merge_and_unload().state_dict(), StateTensors(tiny("llama").state_dict())
    shape = checkpoint.read_shape(tiny("llama").config)
    adapter = read_adapter(tmp_path / "adapter")
    both = AdaptedTensors(base, adapter, shape)
    for name in base.names():
        torch.testing.assert_close(both.get(name), merged[name], rtol=0, atol=2e-6)
        assert both.info(name).shape == tuple(merged[name].shape)
    left, right = adapter.factors(shape)[Site("W_E")]
    assert (left.shape, right.shape) == ((31, 3), (3, 24))
    assert {"lm_head.weight", "norm.weight"} <= set(adapter.replaced)


def test_adapters_that_are_refused(tmp_path) -> None:
    shape = checkpoint.read_shape(tiny("llama").config)
    adapted("llama", tmp_path / "dora", use_dora=True, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"adapter dora is of kind dora.*merge it first"):
        read_adapter(tmp_path / "dora").factors(shape)
    adapted("llama", tmp_path / "ok", target_modules=["q_proj"])
    config = json.loads((tmp_path / "ok" / "adapter_config.json").read_text())
    for i, (change, message) in enumerate(
        [
            ({"peft_type": "IA3"}, "of kind ia3"),
            ({"init_lora_weights": "pissa_niter_4"}, "started from pissa_niter_4, which changes the base"),
            ({"trainable_token_indices": [1]}, "trained single tokens"),
            ({"use_qalora": True}, "QALoRA"),
        ]
    ):
        folder = copy(tmp_path / "ok", tmp_path / f"bad{i}")
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            read_adapter(folder).factors(shape)
    with pytest.raises(
        InputError, match=r"does not fit: its model\.layers\.0\.self_attn\.q_proj has 24 inputs and 32 outputs, .* 24 and 24"
    ):
        read_adapter(tmp_path / "ok").check(checkpoint.read_shape(tiny("qwen2").config))
    with pytest.raises(InputError, match=r"trains .*layers\.2\.self_attn\.q_proj, which a LlamaForCausalLM of 2 layers does not have"):
        read_adapter(tmp_path / "ok").check(checkpoint.read_shape(tiny("llama", num_hidden_layers=2).config))
    with pytest.raises(InputError, match="q_proj, which a GPT2LMHeadModel"):
        read_adapter(tmp_path / "ok").check(checkpoint.read_shape(tiny("gpt2").config))
    adapted("qwen2", tmp_path / "tied", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(InputError, match="which the base ties together"):
        read_adapter(tmp_path / "tied").check(checkpoint.read_shape(tiny("qwen2").config))
    (tmp_path / "ok" / "adapter_model.safetensors").rename(tmp_path / "ok" / "adapter_model.bin")
    with pytest.raises(InputError, match="only as a pickle"):
        read_adapter(tmp_path / "ok")
    with pytest.raises(InputError, match="is no adapter"):
        read_adapter(tmp_path)


def test_adapter_fingerprint_follows_its_scale(tmp_path) -> None:
    adapted("gpt2", tmp_path / "a", target_modules=["c_attn"])
    folder = copy(tmp_path / "a", tmp_path / "b")
    assert read_adapter(folder).fingerprint == read_adapter(tmp_path / "a").fingerprint
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    assert read_adapter(folder).fingerprint != read_adapter(tmp_path / "a").fingerprint


def test_random_models_are_random_everywhere() -> None:
    """The other tests lean on it."""
    assert all(float(p.detach().std()) > 0.1 for p in randomised(tiny("qwen2"), 3).parameters())
