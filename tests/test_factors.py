"""Kronecker factors against plain Hugging Face models with hooks by hand, exact cases, and everything that may interrupt them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import FOUR, randomised, tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import Factors, HookedModel, ModelPair, kfac, kfac_factors, weights
from interp.models.curvature_edits import curvature_edit, curvature_edits
from interp.models.factors import cut, whole
from interp.models.outer_sums import OuterSums
from interp.results import Result, analysis
from interp.sites import Site

PROMPTS = [[3, 9, 4, 11, 5, 3, 8], [7, 1, 30], [12, 12, 6, 2, 9], [5], [21, 14, 3, 17]]
SCORED = sum(len(p) - 1 for p in PROMPTS)

pytestmark = pytest.mark.filterwarnings("ignore:.* positions give factors of at most that rank")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "factors"


# --------------------------------------------------------------------------- by hand, one prompt at a time


def modules_of(hf: Any, layer: int) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Component -> the module that computes it, and which of its outputs [pos, ...] are its own."""

    def all_of(x: Tensor) -> Tensor:
        return x

    if hasattr(hf, "transformer"):
        block = hf.transformer.h[layer]
        third = hf.config.n_embd
        found = {f"W_{c}": (block.attn.c_attn, lambda x, i=i: x[:, i * third : (i + 1) * third]) for i, c in enumerate("QKV")}
        return found | {"W_O": (block.attn.c_proj, all_of), "W_in": (block.mlp.c_fc, all_of), "W_out": (block.mlp.c_proj, all_of)}
    if hasattr(hf, "gpt_neox"):
        block = hf.gpt_neox.layers[layer]
        heads = hf.config.num_attention_heads
        apart = {f"W_{c}": lambda x, i=i: x.reshape(len(x), heads, 3, -1)[:, :, i].flatten(1) for i, c in enumerate("QKV")}
        found = {c: (block.attention.query_key_value, f) for c, f in apart.items()}
        found |= {"W_O": (block.attention.dense, all_of), "W_in": (block.mlp.dense_h_to_4h, all_of)}
        return found | {"W_out": (block.mlp.dense_4h_to_h, all_of)}
    block = hf.model.layers[layer]
    found = {f"W_{c.upper()}": (getattr(block.self_attn, f"{c}_proj"), all_of) for c in "qkvo"}
    return found | {f"W_{c}": (getattr(block.mlp, f"{n}_proj"), all_of) for c, n in (("in", "up"), ("gate", "gate"), ("out", "down"))}


def labelled(logits: Tensor, ids: list[int], labels: str, seed: int, prompt: int) -> Tensor:
    """One label per scored position, from the stream of the prompt."""
    if labels == "gold":
        return torch.tensor(ids[1:])
    p = logits.double().softmax(-1).numpy()
    uniform = np.random.default_rng([seed, prompt]).random(len(p))
    return torch.tensor([int(np.searchsorted(np.cumsum(row), u * row.sum(), side="right")) for row, u in zip(p, uniform, strict=True)])


def rows_by_hand(hf: Any, prompts: list[list[int]], labels: str = "gold", seed: int = 0) -> dict[Site, list[tuple[Tensor, Tensor]]]:
    """Site -> for every prompt the inputs [pos, in] and the gradients [pos, out], the last position included."""
    hf = hf.float() if next(hf.parameters()).dtype == torch.bfloat16 else hf
    layers = range(hf.config.num_hidden_layers)
    found: dict[Site, list[tuple[Tensor, Tensor]]] = {Site(c, i): [] for i in layers for c in modules_of(hf, i)}
    for number, ids in enumerate(prompts):
        if len(ids) < 2:
            continue
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def keep(module: nn.Module, args: Any, out: Tensor, seen: Any = seen) -> None:
            seen[module] = args[0], out

        places = {module: None for i in layers for module, _ in modules_of(hf, i).values()}
        handles = [module.register_forward_hook(keep) for module in places]
        logits = hf(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, labelled(logits.detach(), ids, labels, seed, number), reduction="sum")
        gradients = dict(zip(places, torch.autograd.grad(loss, [seen[m][1] for m in places]), strict=True))
        for handle in handles:
            handle.remove()
        for site, rows in found.items():
            module, own = modules_of(hf, site.layer or 0)[site.component]
            rows.append((seen[module][0][0].detach(), own(gradients[module][0])))
    return found


def means(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, g = (torch.cat([pair[i][:-1].double() for pair in rows]) for i in (0, 1))
    return x.T @ x / len(x), g.T @ g / len(g)


def far(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def differs(found: Factors, known: Factors) -> float:
    assert found.sites == known.sites and found.n == known.n
    return max(far(of(s), to(s)) for s in found.sites for of, to in ((found.A, known.A), (found.G, known.G)))


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("labels", ["gold", "sampled"])
def test_factors_are_the_means_by_hand(kind: str, labels: Any, folder: Path) -> None:
    """Unequal lengths in one pass against one prompt at a time: padding and the last position are in neither factor nor count."""
    found = kfac_factors(HookedModel.load(tiny(kind)), PROMPTS, folder, labels=labels, seed=4)
    rows = rows_by_hand(tiny(kind), PROMPTS, labels, seed=4)
    assert set(found.sites) == set(rows) and found.n == SCORED
    for site, pairs in rows.items():
        assert all(not g[-1].any() for _, g in pairs), "nothing is scored at the last position"
        a, g = means(pairs)
        assert far(found.A(site), a) < 1e-6 and far(found.G(site), g) < 5e-6, site
        for matrix in (found.A(site), found.G(site)):
            assert torch.equal(matrix, matrix.T) and matrix.dtype == torch.float64
            assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-6 * float(matrix.trace())


@pytest.mark.parametrize("kind", FOUR)
def test_rows_add_up_to_the_gradient_of_the_weights(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into A and what goes into G are rows of the same positions: x^T g is autograd's gradient of W."""
    rows: dict[str, list[Tensor]] = {}
    add = OuterSums.add
    monkeypatch.setattr(OuterSums, "add", lambda self, name, x: (rows.setdefault(name, []).append(x.double()), add(self, name, x))[1])
    hf: Any = tiny(kind)
    found = kfac_factors(HookedModel.load(hf), PROMPTS, folder, labels="gold")
    for ids in PROMPTS:
        if len(ids) > 1:
            logits = hf(torch.tensor([ids]), use_cache=False).logits[0, :-1]
            nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").backward()
    shape = HookedModel.load(hf).shape
    known = {s: w for k, p in hf.named_parameters() if p.grad is not None for s, w in weights.matrices(k, p.grad, shape).items()}
    for site in found.sites:
        x, g = (torch.cat(rows[name]) for name in (f"A {found.shares(site)}", f"G {site}"))
        assert far(x.T @ g, known[site]) < 1e-5, site


@pytest.mark.parametrize("kind", FOUR)
def test_maps_that_read_one_tensor_share_its_factor(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    add = OuterSums.add
    monkeypatch.setattr(OuterSums, "add", lambda self, name, x: (names.append(name), add(self, name, x))[1])
    found = kfac_factors(HookedModel.load(tiny(kind)), PROMPTS[:1], folder)
    shared = {c: str(found.shares(Site(c, 1))) for c in weights.modules(HookedModel.load(tiny(kind)).shape)}
    assert shared["W_Q"] == shared["W_K"] == shared["W_V"]
    assert len(set(shared.values())) == 4, "attention, its output, the MLP, its output"
    assert "W_gate" not in shared or shared["W_gate"] == shared["W_in"]
    assert len([n for n in names if n.startswith("A ")]) == 4 * 3 and len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------- exact cases


def enumerated(hf: Any, ids: list[int], site: Site) -> Tensor:
    """The expectation of G over all labels of all positions together; the gradient is linear in the labels."""
    module, own = modules_of(hf, site.layer or 0)[site.component]
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out))
    logits = hf(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    handle.remove()
    log_p = logits.log_softmax(-1)
    vocab = logits.shape[1]
    per = [
        [own(torch.autograd.grad(-log_p[s, y], seen[0], retain_graph=True)[0][0])[:-1] for y in range(vocab)] for s in range(len(logits))
    ]
    assert len(per) == 2
    p = log_p.detach().exp().double()
    out = torch.zeros(per[0][0].shape[1], per[0][0].shape[1], dtype=torch.float64)
    for y in range(vocab):
        for z in range(vocab):
            g = (per[0][y] + per[1][z]).double()
            out += p[0, y] * p[1, z] * g.T @ g
    return out / len(per)


def test_sampled_labels_come_to_the_expectation_and_gold_ones_do_not(tmp_path: Path) -> None:
    hf, ids, site = tiny("llama"), [4, 11, 7], Site("W_in", 1)
    exact = enumerated(hf, ids, site)
    model = HookedModel.load(hf)
    errors = {}
    for draws in (64, 1024):
        found = [
            kfac_factors(model, [ids] * draws, tmp_path / f"{draws} {seed}", modules=["W_in"], layers=[1], seed=seed) for seed in range(6)
        ]
        errors[draws] = sum(far(f.G(site), exact) ** 2 for f in found) ** 0.5 / 6**0.5
    assert errors[1024] < 0.2 and 2.8 < errors[64] / errors[1024] < 5.7, errors  # a quarter, for 16 times the draws
    gold = kfac_factors(model, [ids] * 4, tmp_path / "gold", modules=["W_in"], layers=[1], labels="gold")
    assert far(gold.G(site), exact) > 3 * errors[1024]


def test_one_position_is_exact(folder: Path) -> None:
    """With one scored position, G kron A is the outer product of the weight's gradient with itself: the order of the two as well."""
    hf: Any = tiny("neox")
    found = kfac_factors(HookedModel.load(hf), [[5, 8]], folder, modules=("W_Q", "W_out"), layers=(0,), labels="gold")
    ((x, g),) = rows_by_hand(tiny("neox"), [[5, 8]])[Site("W_out", 0)]
    logits = hf(torch.tensor([[5, 8]]), use_cache=False).logits[0, :1]
    nn.functional.cross_entropy(logits, torch.tensor([8]), reduction="sum").backward()
    gradient = hf.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.grad.T.double()  # x @ W: [in, out]
    assert far(x.T.double() @ g.double(), gradient) < 1e-6
    flat = gradient.flatten()
    assert far(torch.kron(found.A("L0.W_out"), found.G("L0.W_out")), flat[:, None] * flat) < 1e-6  # rows of [in, out] one after another


def linear_behind_w_out() -> LlamaForCausalLM:
    """A Llama where W_out is 0 and writes into dimensions that nothing else writes to, and W_U reads only these.

    Attention adds nothing and all embeddings have one norm, so the logits are linear in W_out with the same map at every position, and
    what is predicted is the same everywhere: the one case in which the factors give the whole block of the curvature exactly.
    """
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
    )
    hf: Any = randomised(LlamaForCausalLM(config), 3)
    with torch.no_grad():
        hf.model.embed_tokens.weight[:, 5:] = 0
        hf.model.embed_tokens.weight.div_(hf.model.embed_tokens.weight.norm(dim=1, keepdim=True))
        hf.model.layers[0].self_attn.o_proj.weight.zero_()
        hf.model.layers[0].mlp.down_proj.weight.zero_()
        hf.lm_head.weight[:, :5] = 0
    return hf.double()


def test_a_linear_network_against_its_gauss_newton_block(folder: Path) -> None:
    hf: Any = linear_behind_w_out()
    inputs = [1, 4, 6, 9]
    # Every label once behind every input: what is predicted is uniform, so this is its expectation.
    found = kfac_factors(HookedModel.load(hf), [[i, y] for i in inputs for y in range(11)], folder, modules=["W_out"], labels="gold")
    down = hf.model.layers[0].mlp.down_proj

    def logits(weight: Tensor) -> Tensor:
        ids = torch.tensor([[i] for i in inputs])
        return torch.func.functional_call(hf, {"model.layers.0.mlp.down_proj.weight": weight.T}, (ids,), {"use_cache": False}).logits[:, 0]

    weight = down.weight.detach().T.clone()  # [in, out]
    jacobian = torch.autograd.functional.jacobian(logits, weight).flatten(2)  # type: ignore[union-attr]  # [position, vocab, in * out]
    p = logits(weight).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    block = torch.einsum("tvi,tvw,twj->ij", jacobian, hessian, jacobian) / len(inputs)
    assert far(p, torch.full_like(p, 1 / 11)) < 1e-9
    a, g = found.A("L0.W_out"), found.G("L0.W_out")
    assert far(torch.kron(a, g), block) < 1e-6 and torch.linalg.matrix_rank(a) == 4


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_curvlinops_has_the_same_factors(kind: str, folder: Path) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    ids = torch.tensor([[3, 9, 4, 11, 5, 8], [7, 1, 30, 2, 2, 6], [12, 3, 6, 22, 9, 1]])
    hf: Any = tiny(kind)
    found = kfac_factors(HookedModel.load(tiny(kind)), ids.tolist(), folder, labels="gold")
    wanted = {f"{n}.weight" for n, m in hf.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    for name, p in hf.named_parameters():
        p.requires_grad_(name in wanted)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hf = hf

        def forward(self, x: Tensor) -> Tensor:
            return self.hf(x, use_cache=False).logits.mT

    operator = curvlinops.KFACLinearOperator(
        Logits(),
        nn.CrossEntropyLoss(reduction="sum"),
        [p for p in hf.parameters() if p.requires_grad],
        [(ids[:, :-1], ids[:, 1:])],
        fisher_type=curvlinops.FisherType.EMPIRICAL,
        check_deterministic=False,
        num_data=3,
        num_per_example_loss_terms=5,
    )
    operator.compute_kronecker_factors()
    for site in found.sites:
        module, _ = modules_of(hf, site.layer or 0)[site.component]
        name = next(f"hf.{n}" for n, m in hf.named_modules() if m is module)
        assert far(operator._input_covariances[name], found.A(site)) < 1e-5
        assert far(operator._gradient_covariances[name] / found.n, found.G(site)) < 1e-5


# ------------------------------------------------------------- passes, groups, interruptions, more prompts


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A pass for every prompt, saved after each; the rows of the passes."""
    passes: list[list[int]] = []
    run = kfac._Collection._pass
    for name, value in {"EVERY": 0.0, "TIMES": 0.0, "CHUNK": 1}.items():
        monkeypatch.setattr(kfac, name, value)
    monkeypatch.setattr(kfac._Collection, "_pass", lambda self, rows: (passes.append(rows), run(self, rows))[1])
    return passes


def test_neither_passes_nor_groups_nor_chunks_change_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedModel.load(tiny("llama").double())
    known = kfac_factors(model, PROMPTS, tmp_path / "known", seed=3)
    grouped = kfac_factors(model, PROMPTS, tmp_path / "grouped", seed=3, groups=5)
    assert differs(grouped, known) < 1e-12 and len(list((tmp_path / "grouped").glob("group*"))) == 5
    monkeypatch.setattr(kfac, "CHUNK", 1)
    assert differs(kfac_factors(model, PROMPTS, tmp_path / "chunks", seed=3), known) < 1e-7
    assert differs(kfac_factors(model, PROMPTS, tmp_path / "other", seed=8), known) > 0.1
    some = kfac_factors(model, PROMPTS, tmp_path / "some", seed=3, modules="W_out", layers=[2, 0])
    assert [str(s) for s in some.sites] == ["L0.W_out", "L2.W_out"]
    assert all(far(some.G(s), known.G(s)) < 1e-12 and far(some.A(s), known.A(s)) < 1e-12 for s in some.sites)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_killed_collection_goes_on(groups: int, tmp_path: Path, one_by_one: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = HookedModel.load(tiny("gpt2")), tmp_path / "factors"
    known = kfac_factors(model, PROMPTS, tmp_path / "known", groups=groups)
    run, left = kfac._Collection._pass, [7 if groups > 1 else 2]

    def dies(self: Any, rows: list[int]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        run(self, rows)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(kfac._Collection, "_pass", dies)
        kfac_factors(model, PROMPTS, folder, groups=groups)
    with pytest.raises(InputError, match="interrupted"):
        Factors.open(folder)
    with pytest.raises(InputError, match="these begin with others"):
        kfac_factors(model, PROMPTS[::-1], folder)
    with pytest.raises(InputError, match="other labels"):
        kfac_factors(model, PROMPTS, folder, labels="gold")
    one_by_one.clear()
    found = kfac_factors(model, PROMPTS, folder)
    assert one_by_one == ([[2], [3], [4]] if groups == 1 else [[2], [3], [4], *([i] for i in range(5))])
    assert differs(found, known) < 1e-12 and found.digest == known.digest
    assert not list(folder.glob("*.part"))


def test_more_prompts_go_on_with_the_sums(tmp_path: Path, one_by_one: list[list[int]]) -> None:
    model, folder = HookedModel.load(tiny("qwen2")), tmp_path / "factors"
    known = kfac_factors(model, PROMPTS, tmp_path / "known")
    first = kfac_factors(model, PROMPTS[:2], folder)
    assert first.n == 8 and first.meta["prompts"] == 2
    one_by_one.clear()
    found = kfac_factors(model, PROMPTS[2:], folder)
    assert len(one_by_one) == 3 and differs(found, known) < 1e-12
    assert found.digest == known.digest != first.digest and found.meta == known.meta
    with pytest.raises(InputError, match=r"1 of these 2 prompts, the first of them prompt 1.*already"):
        kfac_factors(model, [[8, 9], PROMPTS[2]], folder)
    assert Factors.open(folder).n == SCORED  # a refusal leaves them whole


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("passes", [0, 1])
def test_a_killed_extension_counts_nothing_twice(
    passes: int, groups: int, tmp_path: Path, one_by_one: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first save, the first factors are what the folder has; afterwards only the same prompts go on."""
    model, folder, more = HookedModel.load(tiny("llama")), tmp_path / "factors", [[8, 9, 2], [17, 2, 4, 4]]
    known = kfac_factors(model, [*PROMPTS, *more], tmp_path / "known")
    first = kfac_factors(model, PROMPTS, folder, groups=groups)
    run, left = kfac._Collection._pass, [passes]

    def dies(self: Any, rows: list[int]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        run(self, rows)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(kfac._Collection, "_pass", dies)
        kfac_factors(model, more, folder)
    one_by_one.clear()
    if not passes:
        assert Factors.open(folder).digest == first.digest
        again = kfac_factors(model, PROMPTS, folder)
        assert again.n == SCORED and again.digest == first.digest and not one_by_one
        with pytest.raises(InputError, match=r"have 1 of these 2 prompts, the first of them prompt 1, already"):
            kfac_factors(model, [[8, 9], PROMPTS[0]], folder)
    else:
        message = r"unfinished collection: 1 prompts were done .* give again those that were being added to the 5 before to go on, or"
        for others in (PROMPTS, [*PROMPTS, *more]):
            with pytest.raises(InputError, match=message):
                kfac_factors(model, others, folder)
        with pytest.raises(InputError, match=r"have 5 of these 6 prompts, the first of them prompt 1, already; give again"):
            kfac_factors(model, [more[0], *PROMPTS], folder)
        with pytest.raises(InputError, match="interrupted"):
            Factors.open(folder)
    found = kfac_factors(model, more, folder)
    assert differs(found, known) < 1e-12 and found.digest == known.digest and found.meta == known.meta


@pytest.mark.parametrize("parts", [1, 2])
def test_the_same_prompts_again_are_nothing_to_do(parts: int, tmp_path: Path, one_by_one: list[list[int]]) -> None:
    model, folder = HookedModel.load(tiny("gpt2")), tmp_path / "factors"
    for some in (PROMPTS,) if parts == 1 else (PROMPTS[:2], PROMPTS[2:]):
        known = kfac_factors(model, some, folder, seed=3)
    files = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}
    one_by_one.clear()
    with pytest.warns(UserWarning, match="15 positions"):  # said again
        found = kfac_factors(model, PROMPTS, folder, seed=3)
    assert found.digest == known.digest and differs(found, known) == 0 and not one_by_one
    assert found.meta["prompts_digest"] == kfac.prompts_digest(model.batch(PROMPTS)) != kfac.prompts_digest(model.batch(PROMPTS[::-1]))
    others: list[tuple[dict[str, Any], str]] = [({"seed": 4}, "seed"), ({"labels": "gold"}, "labels"), ({"layers": [1]}, "sites")]
    for changed, what in others:
        with pytest.raises(InputError, match=rf"something else \(other {what}\)"):
            kfac_factors(model, PROMPTS, folder, **{"seed": 3, **changed})
    for some in (PROMPTS[::-1], PROMPTS[:3], [*PROMPTS, [8, 9]]):  # draws go by the number of a prompt
        with pytest.raises(InputError, match="have .* of these .* already"):
            kfac_factors(model, some, folder, seed=3)
    assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()} == files


def test_a_pass_that_runs_out_of_memory_is_not_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedModel.load(tiny("llama").double())
    known = kfac_factors(model, PROMPTS, tmp_path / "known")
    add, calls = OuterSums.add, [0]

    def scarce(self: OuterSums, name: str, x: Tensor) -> None:
        calls[0] += 1
        if calls[0] in (20, 70):  # in the middle of a pass, when some of its products have been added
            raise torch.OutOfMemoryError
        add(self, name, x)

    monkeypatch.setattr(OuterSums, "add", scarce)
    for name, value in {"EVERY": 0.0, "TIMES": 0.0, "CHUNK": 9}.items():
        monkeypatch.setattr(kfac, name, value)
    assert differs(kfac_factors(model, PROMPTS, tmp_path / "scarce"), known) < 1e-7 and calls[0] > 70


# --------------------------------------------------------------------------- the model, and edits of it


def test_edits_of_weights_count(tmp_path: Path) -> None:
    hf: Any = tiny("qwen2")
    model = HookedModel.load(hf)
    delta = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)) * 0.2
    bias = torch.linspace(-1, 1, 31)  # which the model does not have
    edit = Edit((WeightChange(Site("W_in", 1), delta), WeightChange(Site("b_U"), bias)))
    plain = kfac_factors(model, PROMPTS, tmp_path / "plain")
    with model.edited(edit):
        found = kfac_factors(model, PROMPTS, tmp_path / "edited")
        found.check(model)
        with pytest.raises(InputError, match="0 edits in force"):
            plain.check(model)
        with pytest.raises(InputError, match="other edits"):
            kfac_factors(model, [[9, 9]], tmp_path / "plain")
    with pytest.raises(InputError, match="1 edits in force"):
        found.check(model)
    plain.check(model)
    other: Any = tiny("qwen2")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += delta.T
        other.lm_head.bias = nn.Parameter(bias)
    assert differs(found, kfac_factors(HookedModel.load(other), PROMPTS, tmp_path / "known")) < 1e-6
    assert differs(found, plain) > 1e-2
    with pytest.raises(InputError, match="belong to Qwen2ForCausalLM"):
        plain.check(HookedModel.load(other))
    with pytest.raises(InputError, match="edits of weights only"), model.patched({"L0.mlp_out": torch.zeros(1, 7, 24)}):
        kfac_factors(model, PROMPTS[:1], tmp_path / "patched")


def test_weights_that_two_blocks_share_are_refused(tmp_path: Path) -> None:
    """One tensor in two blocks: gradients of both places would make its curvature, and an edit of one changes the other."""
    hf: Any = tiny("llama")
    hf.model.layers[1].mlp.up_proj.weight = hf.model.layers[0].mlp.up_proj.weight
    model = HookedModel.load(hf)
    message = r"^L0.W_in and L1.W_in of \w+ are one tensor \(tied\), so .*[^.]$"
    for layers in (None, [0], [1]):
        with pytest.raises(InputError, match=message):
            kfac_factors(model, PROMPTS, tmp_path / "f", layers=layers)
    assert not (tmp_path / "f").exists()
    apart = kfac_factors(model, PROMPTS, tmp_path / "f", modules=["W_gate", "W_out"])
    assert len(apart.sites) == 6 and curvature_edit(model, apart, layers=0, modules="W_gate", mass=0.5).weights
    with pytest.raises(InputError, match=message), model.edited(Edit((WeightChange(Site("W_in", 0), torch.ones(24, 40)),))):
        kfac_factors(model, PROMPTS, tmp_path / "g", layers=[1])
    for kind, one, other in (
        ("gpt2", "W_Q", "transformer.h.{}.attn.c_attn.weight"),
        ("neox", "W_out", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
    ):
        hf = tiny(kind)
        owner = hf.get_submodule(other.format(2).rpartition(".")[0])
        owner.weight = hf.get_parameter(other.format(0))
        with pytest.raises(InputError, match=f"L0.{one} and L2.{one} of"):
            kfac_factors(HookedModel.load(hf), PROMPTS, tmp_path / kind)


def test_the_model_is_left_as_it_came(tmp_path: Path) -> None:
    hf: Any = tiny("gpt2").train()
    fired: list[int] = []
    hf.transformer.h[0].mlp.register_forward_hook(lambda *_: fired.append(1))
    hf.transformer.h[1].attn.c_proj.weight.requires_grad_(False)
    model = HookedModel.load(hf)
    _ = model.wrapped
    fired.clear()

    def state() -> list[Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training) for m in hf.modules()]
        return [hooks, [(id(p), p.requires_grad, p.grad, p._version) for p in hf.parameters()], torch.get_float32_matmul_precision()]

    before, logits = state(), model.logits(PROMPTS)
    torch.set_float32_matmul_precision("high")
    try:
        before[2] = "high"
        kfac_factors(model, PROMPTS, tmp_path / "a")
        assert state() == before and not fired
        with pytest.MonkeyPatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(kfac._Collection, "_gradient", lambda *_: 1 / 0)
            kfac_factors(model, PROMPTS, tmp_path / "b")
        assert state() == before and not fired
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(model.logits(PROMPTS), logits)


def test_half_precision_is_summed_in_full(folder: Path) -> None:
    found = kfac_factors(HookedModel.load(tiny("llama").bfloat16()), PROMPTS, folder, labels="gold")
    known = {site: means(rows) for site, rows in rows_by_hand(tiny("llama").bfloat16(), PROMPTS).items()}
    assert all(far(found.A(s), known[s][0]) < 0.02 for s in found.sites) and found.A("L2.W_out").dtype == torch.float64
    assert all(far(found.G(s), known[s][1]) < 0.1 for s in found.sites) and found.meta["dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": ["W_gate"]}, "has no W_gate; its matrices are W_Q, W_K, W_V, W_O, W_in, W_out"),
        ({"modules": ["W_U"]}, r"W_U has no factors: they are one tensor here \(tied\)"),
        ({"modules": []}, "no matrices were asked for"),
        ({"layers": [3]}, "has no layer 3; it has 0 to 2"),
        ({"layers": [-1]}, "has no layer -1"),
        ({"layers": ["a"]}, "has no layer 'a'; it has 0 to 2"),
        ({"layers": "0"}, "has no layer '0'; it has 0 to 2"),
        ({"layers": [True]}, "has no layer True"),
        ({"layers": [1.0]}, "has no layer 1.0"),
        ({"layers": 1.5}, "layers is one of them or a list, such as 0,2, but 1.5 came"),
        ({"modules": 3}, "has no 3; its matrices are"),
        ({"labels": "true"}, "labels are 'sampled' or 'gold', not 'true'"),
        ({"groups": 0}, "number of parts, from 1; got 0"),
        ({"groups": "2"}, "number of parts, from 1; got '2'"),
        ({"groups": 1.5}, "number of parts, from 1; got 1.5"),
        ({"groups": True}, "number of parts, from 1; got True"),
        ({"seed": 1.5}, "whole number"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": 5}, "kfac_factors reads Prompts, texts, or lists of token ids, but 5 came"),
        ({"prompts": None}, "kfac_factors reads Prompts, texts, or lists of token ids, but None came"),
        ({"folder": None}, "given by its path, such as 'results/factors', but None came"),
        ({"model": "base"}, "^kfac_factors takes one model, what HookedModel.load returns, but 'base' came$"),
        ({"model": None}, "^kfac_factors takes one model, what HookedModel.load returns, but a NoneType came$"),
        ({"prompts": [[3], [4]]}, "no prompt has two tokens"),
        ({"prompts": [[3, 99]]}, "token id 99 is outside"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        kfac_factors(**{"model": HookedModel.load(tiny("gpt2")), "prompts": PROMPTS, "folder": folder, **settings})
    assert not folder.exists()


def test_a_pair_or_a_name_is_no_model_of_theirs(folder: Path) -> None:
    model = HookedModel.load(tiny("gpt2"))
    pair: Any = ModelPair(model, model)
    with pytest.raises(InputError, match=r"^kfac_factors takes one model, pair.base or pair.tuned, but a ModelPair came$"):
        kfac_factors(pair, PROMPTS, folder)
    found = kfac_factors(model, PROMPTS, folder, layers=[0], modules=["W_in"])
    where: dict[str, Any] = {"layers": 0, "modules": "W_in", "mass": 0.5}
    others: list[tuple[Any, str]] = [
        (pair, "pair.base or pair.tuned, but a ModelPair"),
        ("base", "what HookedModel.load returns, but 'base'"),
    ]
    for given, message in others:
        with pytest.raises(InputError, match=f"^a curvature edit takes one model, {message} came$"):
            curvature_edit(given, found, **where)
    with pytest.raises(InputError, match="seed of random pairs is a whole number, but 'a' came"):
        curvature_edit(model, found, **where, control="random", seed="a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"masses is a list, such as \[0.9, 0.99\], but 0.5 came"):
        curvature_edits(model, found, layers=0, modules="W_in", masses=0.5)  # type: ignore[arg-type]
    nowhere: list[Any] = [5, None, b"f"]
    for path in nowhere:
        with pytest.raises(InputError, match="^a folder of factors is given by its path, .* came$"):
            Factors.open(path)


def test_a_loss_that_is_not_finite_names_its_prompt(folder: Path) -> None:
    hf: Any = tiny("llama")
    model = HookedModel.load(hf)
    _ = model.wrapped
    with torch.no_grad():
        hf.model.embed_tokens.weight[17] = torch.inf
    with pytest.raises(InputError, match="the loss of prompt 4 is not finite"):
        kfac_factors(model, PROMPTS, folder)
    assert kfac_factors(model, PROMPTS[:4], folder).n == SCORED - 3  # nothing of it was kept


def test_too_few_positions_are_said(tmp_path: Path) -> None:
    model = HookedModel.load(tiny("gpt2"))
    with pytest.warns(UserWarning, match="15 positions.*L0.W_in has 40 dimensions.*at least 40 positions are needed"):
        kfac_factors(model, PROMPTS, tmp_path / "few")
    many = [torch.randint(31, (15,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac_factors(model, many, tmp_path / "many")


def test_folders_of_something_else(tmp_path: Path) -> None:
    model = HookedModel.load(tiny("gpt2"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        kfac_factors(model, PROMPTS, tmp_path / "taken")
    with pytest.raises(InputError, match="is not there"):
        Factors.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no factors"):
        Factors.open(tmp_path / "taken")
    model.capture(PROMPTS, "L0.resid_post", to=tmp_path / "capture")
    with pytest.raises(InputError, match="is not the index of factors"):
        Factors.open(tmp_path / "capture")
    found = kfac_factors(model, PROMPTS, tmp_path / "good", layers=[1])
    with pytest.MonkeyPatch.context() as m, pytest.raises(InputError, match="these factors take .* choose fewer modules"):
        m.setattr(kfac.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        kfac_factors(model, [[8, 9]], tmp_path / "good", layers=[1])
    assert Factors.open(tmp_path / "good").n == SCORED  # what was there is still good
    with pytest.raises(InputError, match=r"no factors of L0.W_in in .*; it has L1.W_Q"):
        found.G("L0.W_in")
    next(found.path.glob("group*")).unlink()
    with pytest.raises(InputError, match="lack group0-5"):
        Factors.open(found.path)


# ------------------------------------------------------------------------------ the folder, and analyses


@pytest.mark.parametrize("size", [1, 7, 128, 129, 300, 1100])
def test_strips_are_the_whole_matrix(size: int) -> None:
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix + matrix.T
    assert torch.equal(whole(cut(matrix)), matrix)
    assert size < 1000 or sum(s.numel() for s in cut(matrix)) < 0.6 * matrix.numel()


def test_sums_of_wide_rows() -> None:
    x, sums = torch.randn(50, 300, dtype=torch.float64), OuterSums()
    for part in x.split(20):
        sums.add("A x", part)
    assert torch.allclose(whole(sums.strips["A x"]), x.T @ x, atol=1e-12)


def made(folder: Path) -> Factors:
    a, g = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.1]])
    return Factors.write(folder, {"L0.W_gate": (a, g), Site("W_in", 0): (a, 2 * g)}, n=7, fingerprint="f", meta={"model": "toy"})


def test_factors_made_by_hand(tmp_path: Path) -> None:
    found = made(tmp_path / "hand")
    assert found.n == 7 and found.fingerprint == "f" and found.meta == {"model": "toy"} and len(found.sites) == 2
    assert found.G("L0.W_in").tolist() == (2 * torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.1]]).double()).tolist()
    assert found.shares("L0.W_in") == Site("W_gate", 0) and found.A("L0.W_in").tolist() == [[2, 0], [0, 1]]
    assert made(tmp_path / "again").digest == found.digest
    with pytest.raises(InputError, match="made by hand"):
        kfac_factors(HookedModel.load(tiny("gpt2")), PROMPTS, tmp_path / "hand")
    eye = torch.eye(3)
    bad = {
        "not empty": {"folder": tmp_path / "hand"},
        "no factors": {"factors": {}},
        "at least one": {"n": 0},
        "not symmetric": {"factors": {"L0.W_in": (eye, torch.triu(torch.ones(3, 3)))}},
        "not finite": {"factors": {"L0.W_in": (eye * torch.nan, eye)}},
        "square": {"factors": {"L0.W_in": (eye[:2], eye)}},
    }
    for message, settings in bad.items():
        with pytest.raises(InputError, match=message):
            Factors.write(**{"folder": tmp_path / "bad", "factors": {"L0.W_in": (eye, eye)}, "n": 3, "fingerprint": "f", **settings})


def test_an_analysis_knows_factors_by_their_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @analysis(version=1)
    def looked_at(factors: Factors) -> Result:
        raise NotImplementedError

    monkeypatch.chdir(tmp_path)
    made(Path("hand"))
    meta = looked_at.describe(Factors.open("hand"))
    assert meta.inputs[0]["digest"] == made(tmp_path / "again").digest and meta.replayable
    assert meta.command() == ["interp", "run", "looked_at", "--factors=hand"]
    assert meta.inputs[0]["path"] == str(tmp_path / "hand")


def test_the_command_line_collects(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.cli import main

    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The key is in the box. " * 40)
    assert main(["factors", "base", "--text=text.txt", "--n=1", "--modules=W_in", "--layers=0", "--out=f"]) == 0
    assert "A and G of 1 matrices of base" in capsys.readouterr().out
    assert Factors.open("f").meta["prompts"] == 1
    assert main(["factors", "base", "--task=plain_text", "--n=3", "--modules=W_in", "--layers=0", "--out=f"]) == 0
    assert Factors.open("f").meta["prompts"] == 4
    for words, message in {
        ("--out=g",): "needs one of --prompts FILE, --task TASK and --text FILE",
        ("--text=none.txt", "--out=g"): "there is no file none.txt",
        ("--text=text.txt", "--layers=a", "--out=g"): "--layers takes layers as 3,4,5",
        ("--text=text.txt",): "--out",
    }.items():
        assert main(["factors", "base", *words]) == 2
        assert message in capsys.readouterr().err
