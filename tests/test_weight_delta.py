"""The atlas of weight changes against planted changes and dense algebra."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONFIGS, FOUR, saved, tiny
from torch import Tensor

from interp import linalg
from interp.analyses.weight_delta import PROJECTIONS, WeightDeltaResult, weight_delta
from interp.errors import InputError
from interp.models import weights
from interp.models.changes import adapter_of
from interp.models.checkpoint import resolve
from interp.models.pair import ModelPair
from interp.sites import Site

SPECTRAL = ("spectral_ratio", "stable_rank", "effective_rank", "rank90", "numerical_rank")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(kind: str, folder: Path, change) -> Path:
    """A copy of a tiny checkpoint in which ``change(site, matrix)`` gives new values (or None) for every site."""
    saved(tiny(kind), folder)
    shape = resolve(folder).shape
    tensors = load_file(folder / "model.safetensors")
    sites = [s for key, t in tensors.items() for s in weights.matrices(key, t, shape)]
    for site in sites:
        ((key, view),) = weights.locate(site, tensors, shape)
        matrix = weights.matrices(key, tensors[key], shape)[site]
        if (new := change(site, matrix.clone())) is not None:
            view(tensors[key]).copy_(new.reshape(view(tensors[key]).shape))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def delta(base: Path, tuned: Path, **settings) -> WeightDeltaResult:
    return weight_delta(ModelPair.load(base, tuned), **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: saved(tiny(kind), root / kind) for kind in FOUR}


@pytest.mark.parametrize("kind", FOUR)
def test_one_direction_in_one_module(folders, kind, tmp_path) -> None:
    """A rank-one change in L1.W_K, and exact zeros everywhere else, also in the matrices fused with it."""
    there = Site("W_K", 1)
    u, v = {}, {}

    def change(site: Site, matrix: Tensor) -> Tensor | None:
        if site != there:
            return None
        u["x"], v["x"] = normal(matrix.shape[0]), normal(matrix.shape[1], seed=1)
        return matrix + 0.5 * torch.outer(u["x"], v["x"])

    result = delta(folders[kind], planted(kind, tmp_path / "tuned", change))
    for name in result.names:
        found = result.of(name)
        if name == str(there):
            assert found["stable_rank"] == pytest.approx(1, abs=1e-4)
            assert found["numerical_rank"] == found["rank90"] == 1
            assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
            assert found["change"] == pytest.approx(0.5 * float(u["x"].norm() * v["x"].norm()), rel=1e-5)
            assert found["under_floor"] == 0 and found["changed"] == 1
        else:
            assert (found["change"], found["relative"], found["largest"], found["changed"], found["cosine"]) == (0, 0, 0, 0, 1)
            assert found["under_floor"] == 1
            assert all(math.isnan(found[k]) or found[k] == 0 for k in SPECTRAL)
    assert result.summary().startswith(f"{100 * result.total:.3g} % relative weight change") and "largest in L1.W_K" in result.summary()
    assert f"1 of {len(result.names)} weights" in result.summary()


@pytest.mark.parametrize("kind", FOUR)
def test_every_number_against_dense_algebra(folders, kind, tmp_path) -> None:
    """The slow twin: whole models in memory, numpy, one definition per line."""

    def change(site: Site, matrix: Tensor) -> Tensor:
        return matrix + 0.05 * normal(*matrix.shape, seed=zlib.crc32(str(site).encode()))

    tuned = planted(kind, tmp_path / "tuned", change)
    result = delta(folders[kind], tuned, rank=5)
    one, two = resolve(folders[kind]), resolve(tuned)
    for name in result.names:
        site = Site.parse(name)
        w0, w1 = (weights.read(site, c, c.shape).double().numpy() for c in (one, two))
        tau, got = w1 - w0, result.of(name)
        expected = {
            "change": np.sqrt((tau**2).sum()),
            "base_norm": np.sqrt((w0**2).sum()),
            "relative": np.sqrt((tau**2).sum() / (w0**2).sum()),
            "largest": np.abs(tau).max(),
            "changed": 1.0,
            "cosine": (w0 * w1).sum() / np.sqrt((w0**2).sum() * (w1**2).sum()),
            "kurtosis": ((tau - tau.mean()) ** 4).mean() / tau.var() ** 2,
        }
        if tau.ndim == 2:
            s, u, sv, vh = np.linalg.svd(tau, compute_uv=False), *np.linalg.svd(w0, full_matrices=False)
            p = s / s.sum()
            expected |= {
                "spectral_ratio": s[0] / sv[0],
                "stable_rank": (s**2).sum() / s[0] ** 2,
                "effective_rank": np.exp(-(p * np.log(p)).sum()),
                "rank90": 1 + int(np.argmax(np.cumsum(s**2) >= 0.9 * (s**2).sum())),
                "numerical_rank": min(tau.shape),
                "read_share": ((u[:, :5].T @ tau) ** 2).sum() / (tau**2).sum(),
                "write_share": ((tau @ vh[:5].T) ** 2).sum() / (tau**2).sum(),
                "read_chance": 5 / tau.shape[0],
                "write_chance": 5 / tau.shape[1],
            }
            np.testing.assert_allclose(result.spectra[name], s, rtol=1e-4, atol=1e-6)
        for field, value in expected.items():
            assert got[field] == pytest.approx(value, rel=2e-4), (name, field)
    assert len(result.names) == len({*result.names})
    total = sum(((c.get(n).double()) ** 2).sum() for c in (one,) for n in c.names())
    assert float((result.base_norm**2).sum()) == pytest.approx(float(total), rel=1e-9)


@pytest.mark.parametrize("kind", FOUR)
def test_heads_add_up_and_are_the_right_slices(folders, kind, tmp_path) -> None:
    sizes = {"W_Q": 1.0, "W_K": 2.0, "W_V": 3.0, "W_O": 4.0}

    def change(site: Site, matrix: Tensor) -> Tensor | None:
        """Head h of layer l moves by size * (1 + h + 10 l) in Frobenius norm."""
        if site.component not in sizes:
            return None
        heads = weights.heads(site, matrix, resolve(folders[kind]).shape)
        for h, part in enumerate(heads):
            noise = normal(*part.shape, seed=h)
            part += 0.01 * sizes[site.component] * (1 + h + 10 * site.layer) * noise / noise.norm()
        return matrix

    result = delta(folders[kind], planted(kind, tmp_path / "tuned", change))
    shape = resolve(folders[kind]).shape
    for p, name in enumerate(PROJECTIONS):
        n = shape.n_kv_heads if name in ("W_K", "W_V") else shape.n_heads
        assert bool(result.head_change[p, :, n:].isnan().all())
        for layer in range(shape.n_layers):
            expected = [0.01 * sizes[name] * (1 + h + 10 * layer) for h in range(n)]
            np.testing.assert_allclose(result.head_change[p, layer, :n], expected, rtol=1e-4)
            whole = result.of(f"L{layer}.{name}")
            assert float((result.head_change[p, layer, :n] ** 2).sum()) == pytest.approx(whole["change"] ** 2, rel=1e-9)
            assert float((result.head_base[p, layer, :n] ** 2).sum()) == pytest.approx(whole["base_norm"] ** 2, rel=1e-9)
            floor = whole["floor"] * whole["base_norm"]
            assert float((result.head_floor[p, layer, :n] ** 2).sum()) == pytest.approx(floor**2, rel=1e-9)


def test_a_head_axis_is_not_a_layer_axis(folders, tmp_path) -> None:
    """Only head 3 of layer 1 moves: 3 layers and 4 heads, so a swapped axis has no place for it."""

    def change(site: Site, matrix: Tensor) -> Tensor | None:
        if site != Site("W_O", 1):
            return None
        weights.heads(site, matrix, resolve(folders["llama"]).shape)[3] += 0.1
        return matrix

    result = delta(folders["llama"], planted("llama", tmp_path / "tuned", change))
    assert result.head_change.shape == (4, 3, 4)
    assert torch.nonzero(result.head_change.nan_to_num() > 0).tolist() == [[3, 1, 3]]


@pytest.mark.parametrize("kind", FOUR)
def test_a_neuron_that_reads_and_writes_anew_is_the_one_that_moved(folders, kind, tmp_path) -> None:
    """Neuron 5 of layer 2: its column of W_in grows by 3 in the first row, its row of W_out by 4 in the last column; the norm is 5."""

    def change(site: Site, matrix: Tensor) -> Tensor | None:
        if site == Site("W_in", 2):
            matrix[0, 5] += 3
        elif site == Site("W_out", 2):
            matrix[5, -1] += 4
        else:
            return None
        return matrix

    result = delta(folders[kind], planted(kind, tmp_path / "tuned", change))
    held = resolve(folders[kind])
    shape = held.shape
    assert result.neuron_change.shape == (shape.n_layers, shape.d_mlp)
    assert torch.nonzero(result.neuron_change).tolist() == [[2, 5]]
    assert float(result.neuron_change[2, 5]) == pytest.approx(5, rel=1e-5)
    base = {s: m for k in held.names() for s, m in weights.matrices(k, held.get(k), shape).items()}
    parts = [base[Site("W_in", 1)][:, 7], base[Site("W_out", 1)][7], *([base[Site("W_gate", 1)][:, 7]] if shape.gated else [])]
    assert float(result.neuron_base[1, 7]) == pytest.approx(float(torch.cat(parts).double().norm()), rel=1e-6)
    assert "layer 2, neuron 5" in str(result.figures()["Neurons that moved most"].to_dict())


@pytest.mark.parametrize("rel", [1e-3, 0.05])
def test_noise_of_a_given_size_everywhere(folders, rel, tmp_path) -> None:
    def change(site: Site, matrix: Tensor) -> Tensor:
        noise = normal(*matrix.shape, seed=len(str(site)))
        return matrix + rel * noise * matrix.norm() / noise.norm()

    result = delta(folders["qwen2"], planted("qwen2", tmp_path / "tuned", change))
    np.testing.assert_allclose(result.relative, rel, rtol=1e-3)
    assert result.total == pytest.approx(rel, rel=1e-3)
    matrices = ~result.stable_rank.isnan()
    assert float(result.kurtosis[matrices].median()) == pytest.approx(3, abs=0.3)
    chance = (result.read_share / result.read_chance)[matrices]
    assert float(chance.median()) == pytest.approx(1, abs=0.1)  # noise reads from nowhere in particular


@pytest.mark.parametrize("kind", FOUR)
def test_identical_models(folders, kind, tmp_path) -> None:
    result = delta(folders[kind], saved(tiny(kind), tmp_path / "same"))
    assert bool(result.under_floor.all()) and float(result.change.max()) == 0 and result.total == 0
    assert result.summary().startswith("0 % relative weight change") and "float32" in result.summary()
    assert list(result.figures()) == ["Relative change by layer and module", "Relative change by head"]
    assert all(np.isnan(np.array(f.data[0].z, dtype=float)).all() for f in result.figures().values())  # all grey


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_copy_is_at_the_floor(folders, dtype, tmp_path) -> None:
    tuned = saved(tiny("llama").to(dtype), tmp_path / "rounded")
    for result in (delta(folders["llama"], tuned), delta(tuned, folders["llama"])):
        matrices = ~result.stable_rank.isnan()
        ratio = (result.relative / result.floor)[matrices]
        assert float(ratio.min()) > 0.9 and float(ratio.max()) < 1.1
        assert bool(result.under_floor[matrices].all()) and bool(result.head_under_floor[0].all())
        assert result.total_floor == pytest.approx({torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4}[dtype], rel=0.05)
        assert float(result.numerical_rank[matrices].max()) == 0  # nothing above rounding
        assert result.dtype == str(dtype).removeprefix("torch.")
        grey = [t for t in result.plot().data if t.showscale is False]
        assert len(grey) == 1 and int(np.isfinite(np.array(grey[0].z, dtype=float)).sum()) == 3 * 7


def test_a_change_above_the_floor_of_its_dtype_is_not_grey(tmp_path) -> None:
    base, tuned = saved(tiny("llama").to(torch.bfloat16), tmp_path / "base"), tmp_path / "tuned"
    model = tiny("llama").to(torch.bfloat16)
    model.model.layers[2].mlp.gate_proj.weight.data *= 1.05
    result = delta(base, saved(model, tuned))
    assert [n for n, under in zip(result.names, result.under_floor, strict=True) if not under] == ["L2.W_gate"]
    assert result.of("L2.W_gate")["relative"] == pytest.approx(0.05, rel=0.05)


# ---- adapters


def lora(kind: str, folder: Path, base: Path, **settings) -> tuple[Path, Path]:
    """An adapter folder and the folder of its merged model."""
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "neox": ["query_key_value", "dense_4h_to_h"]}.get(kind, ["q_proj", "v_proj", "down_proj"])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=kind == "gpt2", **settings)
    model = peft.get_peft_model(tiny(kind), config)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p.copy_(0.1 * normal(*p.shape, seed=i))
            elif "modules_to_save" in name:
                p.add_(0.01 * normal(*p.shape, seed=i))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", saved(model.merge_and_unload(), folder / "merged")


@pytest.mark.parametrize("kind", FOUR)
def test_factors_give_the_numbers_of_the_merged_model(folders, kind, tmp_path) -> None:
    adapter, merged = lora(kind, tmp_path, folders[kind])
    pair = ModelPair.load(folders[kind], adapter)
    assert adapter_of(pair) is not None
    one, two = weight_delta(pair), delta(folders[kind], merged)
    assert not pair.tuned.loaded and not pair.base.loaded  # no model was built
    assert one.names == two.names
    for field in ("relative", "change", "largest", "cosine", "kurtosis", "read_share", "write_share", *SPECTRAL):
        a, b = getattr(one, field), getattr(two, field)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6, err_msg=field)
    np.testing.assert_allclose(one.head_change, two.head_change, rtol=1e-3, atol=1e-6)
    touched = {n for n, change in zip(one.names, one.change, strict=True) if change > 0}
    fused = ("W_Q", "W_K", "W_V", "W_out") if kind in ("gpt2", "neox") else ("W_Q", "W_V", "W_out")
    assert touched == {f"L{layer}.{m}" for layer in range(3) for m in fused}
    assert all(one.of(n)["numerical_rank"] == 3 and one.of(n)["floor"] == 0 for n in touched)
    assert bool(one.exact[[one.names.index(n) for n in touched]].all())


def test_modules_trained_whole_and_embeddings(folders, tmp_path) -> None:
    adapter, merged = lora("llama", tmp_path, folders["llama"], modules_to_save=["lm_head"])
    one, two = delta(folders["llama"], adapter), delta(folders["llama"], merged)
    np.testing.assert_allclose(one.relative, two.relative, rtol=1e-3, atol=1e-7)
    assert one.of("W_U")["change"] > 0 and one.unembedding_change.shape == (31,)


# ---- vocabulary, unknown architectures, large matrices


def test_tokens_that_moved(folders, tmp_path) -> None:
    def change(site: Site, matrix: Tensor) -> Tensor | None:
        if site == Site("W_E"):
            matrix[[7, 30]] *= torch.tensor([[1.5], [2.0]])
            return matrix
        if site == Site("W_U"):
            matrix[:, 4] *= 1.25
            return matrix
        return None

    result = delta(folders["llama"], planted("llama", tmp_path / "tuned", change))
    share = result.embedding_change / result.embedding_base
    assert share.argsort(descending=True)[:2].tolist() == [30, 7]
    assert (float(share[30]), float(share[7])) == pytest.approx((1.0, 0.5), rel=1e-5)
    assert int((share > 0).sum()) == 2
    columns = result.unembedding_change / result.unembedding_base
    assert torch.nonzero(columns).tolist() == [[4]] and float(columns[4]) == pytest.approx(0.25, rel=1e-5)
    assert {"Tokens whose embedding moved most", "Tokens whose unembedding moved most"} <= set(result.figures())


def test_extra_vocabulary_rows_are_left_out(folders, tmp_path) -> None:
    model = tiny("llama")
    model.resize_token_embeddings(37, mean_resizing=False)
    model.model.embed_tokens.weight.data[5] *= 2
    result = delta(folders["llama"], saved(model, tmp_path / "more"))
    assert result.embedding_change.shape == (31,) and int((result.embedding_change > 0).sum()) == 1
    assert result.of("W_U")["change"] == 0


def test_a_tied_base_and_an_untied_tuned_model(folders, tmp_path) -> None:
    tuned = tiny("qwen2", tie_word_embeddings=False)
    tuned.load_state_dict(tiny("qwen2").state_dict())
    tuned.lm_head.weight = torch.nn.Parameter(1.5 * tuned.lm_head.weight.detach())
    folder = saved(tuned, tmp_path / "untied")
    for one, two, rel in ((folders["qwen2"], folder, 0.5), (folder, folders["qwen2"], 1 / 3)):
        result = delta(one, two)
        assert result.of("W_U")["relative"] == pytest.approx(rel, rel=1e-5) and result.of("W_E")["change"] == 0
        assert result.only == ()
    assert "W_U" not in delta(folders["qwen2"], folders["qwen2"]).names


def test_a_tied_matrix_stored_twice_counts_once(folders, tmp_path) -> None:
    twice = saved(tiny("qwen2"), tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, twice / "model.safetensors")
    for one, two in ((twice, twice), (folders["qwen2"], twice), (twice, folders["qwen2"])):
        result = delta(one, two)
        assert "W_U" not in result.names and "W_E" in result.names and result.only == ()


def test_an_unknown_architecture_gives_raw_tensors(tmp_path) -> None:
    import transformers
    from tiny_checkpoints import randomised

    def model() -> torch.nn.Module:
        config = transformers.MptConfig(d_model=24, n_heads=4, n_layers=2, vocab_size=31, expansion_ratio=2, max_seq_len=19)
        return randomised(transformers.AutoModelForCausalLM.from_config(config), 0)

    base, tuned = saved(model(), tmp_path / "base"), model()
    tuned.transformer.blocks[1].ffn.up_proj.weight.data += 0.1
    result = delta(base, saved(tuned, tmp_path / "tuned"))
    assert not result.guaranteed and result.head_change is None
    assert [n for n, c in zip(result.names, result.change, strict=True) if c > 0] == ["blocks.1.ffn.up_proj.weight"]
    assert result.of("blocks.1.ffn.up_proj.weight")["numerical_rank"] == 1
    assert all(len(f.data) for f in result.figures().values())


def test_large_matrices_get_their_leading_components(folders, tmp_path) -> None:
    def change(site: Site, matrix: Tensor) -> Tensor:
        left, right = normal(matrix.shape[0], 2), normal(2, matrix.shape[1], seed=1) if matrix.ndim == 2 else None
        return matrix + (0.1 * left @ right if right is not None else 0)

    tuned = planted("llama", tmp_path / "tuned", lambda site, m: change(site, m) if m.ndim == 2 else None)
    whole = delta(folders["llama"], tuned)
    cut = delta(folders["llama"], tuned, exact=4, components=6)
    for name in (n for n in whole.names if not math.isnan(whole.of(n)["stable_rank"])):
        a, b = whole.of(name), cut.of(name)
        assert a["exact"] == 1 and b["exact"] == 0 and math.isnan(b["effective_rank"])
        for field in ("stable_rank", "spectral_ratio", "rank90", "numerical_rank", "read_share"):
            assert b[field] == pytest.approx(a[field], rel=1e-4), (name, field)
        assert a["numerical_rank"] == 2 and len(cut.spectra[name]) == 6
    for field in ("relative", "kurtosis", "cosine"):
        assert torch.equal(getattr(whole, field).nan_to_num(), getattr(cut, field).nan_to_num())


# ---- the result


def test_saving_frames_and_figures(folders, tmp_path) -> None:
    result = delta(folders["gpt2"], planted("gpt2", tmp_path / "tuned", lambda site, m: m * 1.01))
    again = WeightDeltaResult.load(result.save(tmp_path / "result"))
    assert again.summary() == result.summary() and torch.equal(again.relative, result.relative)
    frame = result.to_frame()
    assert list(frame["weight"]) == list(result.names) and {"relative", "floor", "under_floor", "stable_rank"} <= set(frame.columns)
    assert result.meta.analysis == "weight_delta" and result.meta.seed == 0
    cells, modules = result.grid(result.relative)
    assert modules == ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out") and cells.shape == (3, 6)
    np.testing.assert_allclose(cells, 0.01, rtol=1e-3)
    for heading, figure in result.figures().items():
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text, heading
        assert all(t.hovertemplate or t.type == "scatter" for t in figure.data), heading


def test_figures_show_the_planted_layer_and_module(folders, tmp_path) -> None:
    there = Site("W_V", 2)
    result = delta(folders["neox"], planted("neox", tmp_path / "tuned", lambda site, m: m * 1.5 if site == there else None))
    live = next(t for t in result.plot().data if t.showscale is not False)
    z = np.array(live.z, dtype=float)
    assert z.shape == (3, 6) and np.argwhere(np.isfinite(z)).tolist() == [[2, 2]] and z[2, 2] == pytest.approx(50, rel=1e-5)
    heads = next(t for t in result.figures()["Relative change by head"].data if t.showscale is not False)
    z = np.array(heads.z, dtype=float)
    assert z.shape == (3, 16) and np.argwhere(np.isfinite(z)).tolist() == [[2, c] for c in range(8, 12)]


def test_what_is_refused(folders, tmp_path) -> None:
    broken = planted("llama", tmp_path / "nan", lambda site, m: m / 0 if site == Site("W_in", 1) else None)
    with pytest.raises(InputError, match=r"960 of 960 entries of model\.layers\.1\.mlp\.up_proj\.weight of tuned are NaN or infinite"):
        delta(folders["llama"], broken)
    with pytest.raises(InputError, match="rank must be at least 1, but it is 0"):
        delta(folders["llama"], folders["llama"], rank=0)
    pair = ModelPair.load(folders["llama"], folders["llama"])
    with pytest.raises(InputError, match="no weight L9.W_Q"):
        weight_delta(pair).of("L9.W_Q")


def test_models_in_memory(folders) -> None:
    from interp.models.weights import StateTensors

    class Given:
        """What an analysis asks a model for, without files."""

        def __init__(self, model: torch.nn.Module) -> None:
            from interp.models.checkpoint import read_shape

            self.shape, self.name, self.dtype, self.fingerprint, self.active_edits = read_shape(model.config), "it", torch.float32, "0", ()
            self.checkpoint = self.adapter = None
            self.weights = lambda: StateTensors(model.state_dict())

    class Pair:
        def __init__(self, base: Given, tuned: Given) -> None:
            self.base, self.tuned, self.shape = base, tuned, base.shape

        def sides(self):
            return [("base", self.base), ("tuned", self.tuned)]

        def token_strings(self, ids):
            raise InputError("no tokenizer")

    for kind in FOUR:
        tuned = tiny(kind)
        with torch.no_grad():
            for p in tuned.parameters():
                p.mul_(1.02)
        result = weight_delta(Pair(Given(tiny(kind)), Given(tuned)))
        np.testing.assert_allclose(result.relative, 0.02, rtol=1e-3)
        assert set(result.names) == set(delta(folders[kind], folders[kind]).names)


def test_sizes_are_pairwise_different() -> None:
    """The other tests lean on it: a swapped axis must not fit."""
    for kind in CONFIGS:
        s = resolve_shape(kind)
        assert len({s.n_layers, s.n_heads, s.d_model, s.d_mlp, s.d_vocab, s.n_ctx, s.d_head}) == 7


def resolve_shape(kind: str):
    from interp.models.checkpoint import read_shape

    return read_shape(tiny(kind).config)


def test_rounding_floor_is_per_head(folders, tmp_path) -> None:
    """A head with small weights rounds in small steps."""

    def change(site: Site, matrix: Tensor) -> Tensor | None:
        if site != Site("W_Q", 0):
            return None
        weights.heads(site, matrix, resolve(folders["llama"]).shape)[2].mul_(1 / 64)
        return matrix

    base = planted("llama", tmp_path / "base", change)
    tuned = tmp_path / "tuned"
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(base / "model.safetensors").items()}
    tuned.mkdir()
    (tuned / "config.json").write_text((base / "config.json").read_text())
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    result = delta(base, tuned)
    assert float(result.head_floor[0, 0, 2] / result.head_floor[0, 0, 1]) == pytest.approx(1 / 64, rel=0.2)
    np.testing.assert_allclose(result.head_change[0, 0] / result.head_floor[0, 0], 1, atol=0.15)
    assert linalg.norm(result.head_change[0, 0]) == pytest.approx(result.of("L0.W_Q")["change"])
