"""The identity card of a pair: what is compared, what is said, and what kind of tuning it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FOUR, randomised, saved, tiny
from torch import Tensor, nn

from interp.analyses.pair_check import PairCheckResult, pair_check
from interp.errors import InputError
from interp.models import weights
from interp.models.checkpoint import resolve
from interp.models.pair import ModelPair
from interp.sites import Site


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(model: nn.Module, rel: float, seed: int = 5) -> nn.Module:
    """Full tuning: noise on every parameter."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            noise = normal(*p.shape, seed=seed + i)
            p.add_(rel * noise * p.norm() / noise.norm())
    return model


def low_rank(model: nn.Module, rank: int, size: float) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(p for name, p in model.named_parameters() if p.ndim == 2 and ("layers" in name or ".h." in name)):
            p.add_(size * normal(p.shape[0], rank, seed=i) @ normal(rank, p.shape[1], seed=i + 100))
    return model


def check(base: Path, tuned: Path) -> PairCheckResult:
    return pair_check(ModelPair.load(base, tuned))


def item(result: PairCheckResult, name: str) -> dict[str, str]:
    (found,) = [i for i in result.items if i["item"] == name]
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: saved(tiny(kind), root / kind) for kind in FOUR}


@pytest.mark.parametrize("kind", FOUR)
def test_cosine_of_every_matrix(folders, kind, tmp_path) -> None:
    tuned = saved(shaken(tiny(kind), 0.05), tmp_path / "tuned")
    pair = ModelPair.load(folders[kind], tuned)
    result = pair_check(pair)
    assert not pair.base.loaded and not pair.tuned.loaded
    one, two = resolve(folders[kind]), resolve(tuned)
    for i, name in enumerate(result.names):
        a, b = (weights.read(Site.parse(name), c, c.shape).double().numpy().ravel() for c in (one, two))
        assert float(result.cosine[i]) == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), rel=1e-9), name
        assert float(result.relative[i]) == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5), name
    assert {f"L{layer}.{m}" for layer in range(3) for m in weights.modules(one.shape)} <= set(result.names)
    assert result.kind == "full" and "full tuning" in result.guess
    assert item(result, "cosine")["status"] == "ok" and not result.warnings
    assert len(result.summary()) < 300 and "0 warnings, 0 notes" in result.summary()


@pytest.mark.parametrize("kind", FOUR)
def test_a_merged_low_rank_update_is_recognised(folders, kind, tmp_path) -> None:
    result = check(folders[kind], saved(low_rank(tiny(kind), 3, 0.01), tmp_path / "tuned"))
    found = result.rank[~result.rank.isnan()]
    # GPT-2's and NeoX's fused projections share one update of rank 3; each part has rank 3.
    assert result.kind == "low rank" and "rank 3 in" in result.guess and set(found.tolist()) == {3.0}
    assert len(found) == len(weights.modules(resolve(folders[kind]).shape))


@pytest.mark.parametrize("rank", [2, 6])
def test_a_low_rank_update_merged_into_bfloat16(rank, tmp_path) -> None:
    """Rounding after merging gives the change full rank; what stands out of it is the update."""
    base = saved(tiny("llama").to(torch.bfloat16), tmp_path / "base")
    tuned = low_rank(tiny("llama").to(torch.bfloat16).float(), rank, 0.05).to(torch.bfloat16)
    result = check(base, saved(tuned, tmp_path / "tuned"))
    assert result.kind == "low rank" and f"rank {rank} in" in result.guess


def test_full_tuning_just_above_the_rounding_of_bfloat16(tmp_path) -> None:
    """Few of its components stand out of the noise, but the rest of it is more than noise."""
    base = saved(tiny("llama").to(torch.bfloat16), tmp_path / "base")
    for size in (0.003, 0.004, 0.01, 0.05):
        tuned = shaken(tiny("llama").to(torch.bfloat16).float(), size).to(torch.bfloat16)
        assert check(base, saved(tuned, tmp_path / f"tuned{size}")).kind == "full"


def adapter(kind: str, folder: Path, **settings) -> Path:
    targets = {"gpt2": ["c_attn"], "neox": ["query_key_value"]}.get(kind, ["q_proj", "v_proj"])
    config = peft.LoraConfig(r=3, target_modules=targets, fan_in_fan_out=kind == "gpt2", **settings)
    model = peft.get_peft_model(tiny(kind), config)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p.copy_(0.1 * normal(*p.shape, seed=i))
                if "layers.0" in name or ".h.0." in name:
                    p[:1] *= 0 if "lora_A" in name else 1  # layer 0 uses two of its three components
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", FOUR)
def test_an_adapter_says_its_rank_per_matrix(folders, kind, tmp_path) -> None:
    result = check(folders[kind], adapter(kind, tmp_path / "adapter"))
    parts = ("W_Q", "W_K", "W_V") if kind in ("gpt2", "neox") else ("W_Q", "W_V")
    expected = {f"L{layer}.{m}": 2.0 if layer == 0 else 3.0 for layer in range(3) for m in parts}
    assert {n: r for n, r in zip(result.names, result.rank.tolist(), strict=True) if not math.isnan(r)} == expected
    assert result.kind == "adapter"
    assert f"rank 2 to 3 on {len(expected)} matrices, {len(parts)} of them below the rank 3 of its config" in result.guess
    assert float(result.floor.max()) == 0


def test_identical_and_rounded_and_unrelated(folders, tmp_path) -> None:
    same = check(folders["llama"], folders["llama"])
    assert (same.kind, same.status) == ("identical", "ok") and "identical to base" in same.summary()
    assert float(same.cosine.min()) == 1
    rounded = check(folders["llama"], saved(tiny("llama").to(torch.bfloat16), tmp_path / "half"))
    assert rounded.kind == "at the floor" and item(rounded, "rounding")["status"] == "warning"
    assert item(rounded, "dtype")["status"] == "note" and "float32 in base, bfloat16 in tuned" in item(rounded, "dtype")["says"]
    other = check(folders["llama"], saved(tiny("llama", seed=9), tmp_path / "other"))
    assert other.kind == "unrelated" and item(other, "cosine")["status"] == "warning" and abs(float(other.cosine.median())) < 0.1
    far = check(folders["llama"], saved(shaken(tiny("llama"), 0.3), tmp_path / "far"))
    assert far.kind == "full" and "a long tuning" in item(far, "cosine")["says"] and far.status == "warning"


def test_one_changed_matrix_among_many(folders, tmp_path) -> None:
    model = tiny("neox")
    model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight.data += 0.1 * normal(40, 24)
    result = check(folders["neox"], saved(model, tmp_path / "tuned"))
    assert result.kind == "full" and "1 of 20 matrices changed" in result.guess
    live = next(t for t in result.plot().data if t.showscale is not False)
    z = np.array(live.z, dtype=float)
    assert z.shape == (3, 6) and np.argwhere(np.isfinite(z)).tolist() == [[1, 4]]


def test_only_vectors_changed(folders, tmp_path) -> None:
    model = tiny("qwen2")
    model.model.norm.weight.data *= 1.1
    result = check(folders["qwen2"], saved(model, tmp_path / "tuned"))
    assert result.kind == "full" and "only vectors" in result.guess


def test_config_differences_are_said(folders, tmp_path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "tuned"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 38, "transformers_version": "5.0.0", "attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    result = check(folders["llama"], folder)
    assert "10000.0" in item(result, "rotary settings")["says"] and "500000.0" in item(result, "rotary settings")["says"]
    assert item(result, "rotary settings")["status"] == item(result, "context")["status"] == "note"
    assert item(result, "other settings") == {
        "item": "other settings",
        "status": "warning",
        "says": "the configs differ in rms_norm_eps: 1e-06 in base, 1e-05 in tuned",
    }
    assert result.warnings == (item(result, "other settings")["says"],)


def test_tensors_without_a_match_and_more_vocabulary(folders, tmp_path) -> None:
    model = tiny("llama")
    model.resize_token_embeddings(37, mean_resizing=False)
    folder = saved(model, tmp_path / "tuned")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = check(folders["llama"], folder)
    assert item(result, "tensor names")["says"] == "tensors without a match: 1 only in tuned, such as layers.1.self_attn.q_proj.bias"
    assert item(result, "embedding rows")["says"].startswith("31 in base, 37 in tuned")
    assert result.card["embedding rows"] == {"base": "31", "tuned": "37"}


def test_tokenizers_and_templates_are_on_the_card(folders, tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    both = []
    for side in ("base", "tuned"):
        folder = Path(shutil.copytree(folders["gpt2"], tmp_path / side))
        words = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
        if side == "tuned":
            words.chat_template = "{{ messages }}"
        words.save_pretrained(folder)
        both.append(folder)
    result = check(*both)
    assert result.card["tokenizer entries"] == {"base": "3", "tuned": "3"}
    assert item(result, "chat template")["status"] == "note" and result.card["chat template"]["base"] == "none"
    assert item(check(folders["gpt2"], folders["gpt2"]), "tokenizer entries")["says"] == "none in both"


def test_an_unknown_architecture_is_not_guaranteed(tmp_path) -> None:
    import transformers

    def model() -> nn.Module:
        config = transformers.MptConfig(d_model=24, n_heads=4, n_layers=2, vocab_size=31, expansion_ratio=2, max_seq_len=19)
        return randomised(transformers.AutoModelForCausalLM.from_config(config), 0)

    result = check(saved(model(), tmp_path / "a"), saved(shaken(model(), 0.01), tmp_path / "b"))
    assert not result.guaranteed and "not guaranteed: the tensor names of MptForCausalLM" in item(result, "architecture")["says"]
    assert result.kind == "full" and len(result.plot().data)


def test_saving_and_showing(folders, tmp_path) -> None:
    result = check(folders["gpt2"], saved(shaken(tiny("gpt2"), 0.01), tmp_path / "<b>tuned"))
    again = PairCheckResult.load(result.save(tmp_path / "result"))
    assert again.summary() == result.summary() and again.items == result.items and again.card == result.card
    html = result.html()
    assert "&lt;b&gt;tuned" in html and "<b>" not in html
    assert all(i["says"].split()[0] in html for i in result.items)
    assert {"cosine", "relative", "floor"} <= set(result.to_frame().columns)
    figure = result.plot()
    assert figure.layout.xaxis.title.text == "module" and figure.layout.yaxis.title.text == "layer"


def test_quantised_and_broken_weights_are_refused(folders, tmp_path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "tuned"))
    tensors = load_file(folder / "model.safetensors")
    whole = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = whole.to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight of tuned is stored as float8_e4m3fn, .* before quantisation"):
        check(folders["llama"], folder)
    tensors["model.norm.weight"] = whole / 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"24 of 24 entries of model\.norm\.weight of tuned are NaN or infinite"):
        check(folders["llama"], folder)
