"""Tuning's change in base's eigenbasis: planted changes, exact Fisher on single positions, adapters, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_curvature import basis, drawn_prompts, full_sort, moment, prompts, written
from tiny_checkpoints import FOUR, saved, tiny

from interp.analyses.delta_curvature import CHANGED, delta_curvature
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models.curvature import Eigen, along, eigen, predicted, staircase
from interp.models.factors import Factors
from interp.models.kfac import kfac_factors
from interp.models.weights import locate
from interp.sites import Site
from interp.sweeps.likelihood import loss_and_kl
from interp.tasks import task

MASSES = (0.5, 0.9, 0.99)


def changed(source, deltas: dict[str, torch.Tensor]):
    """A copy of a plain model with matrices changed, x @ W orientation."""
    tuned = copy.deepcopy(source)
    shape = HookedModel.load(source).shape
    with torch.no_grad():
        for site, delta in deltas.items():
            ((key, view),) = locate(Site.parse(site), [n for n, _ in tuned.named_parameters()], shape)
            found = view(tuned.get_parameter(key))
            found += delta.to(found).reshape(found.shape)
    return tuned


def pair_of(source, deltas) -> ModelPair:
    return ModelPair.load(source, changed(source, deltas))


def random_change(model: HookedModel, site: str, seed: int = 0, size: float = 0.1) -> torch.Tensor:
    shape = model.weight(site).shape
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the arithmetic


def test_along_is_the_naive_sum_for_matrices_and_factors(monkeypatch) -> None:
    monkeypatch.setattr("interp.models.curvature._BLOCK", 3 * 13)  # several blocks of rows
    e, draws = basis(10, 13), torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, m, generator=draws, dtype=torch.float64) for n, m in ((10, 3), (3, 13)))
    cuts = [staircase(e.lam, e.mu, m) for m in (*MASSES, 1)]
    c = e.U_A.T @ left @ right @ e.U_G
    inside = [full_sort(e.lam, e.mu, m) for m in MASSES] + [torch.ones(10, 13, dtype=torch.bool)]
    bands = [inside[0], *(b & ~a for a, b in zip(inside, inside[1:], strict=False))]
    for change in (left @ right, (left, right)):
        found = along(change, e, cuts)
        torch.testing.assert_close(found.energy, torch.stack([c[b].square().sum() for b in bands]))
        assert found.curvature == pytest.approx(float((c.square() * e.mu[:, None] * e.lam).sum()))
    a, g = (u * values @ u.T for u, values in ((e.U_A, e.mu), (e.U_G, e.lam)))
    flat = (left @ right).flatten()
    assert found.curvature == pytest.approx(float(flat @ torch.kron(a, g) @ flat))


def test_a_quadratic_loss_is_predicted_exactly() -> None:
    """Linear regression on its own labels: loss |x D M|^2 / 2 for a change D behind which a fixed map M stands (a deep linear network)."""
    draws = torch.Generator().manual_seed(1)
    x, m, d = (torch.randn(*size, generator=draws, dtype=torch.float64) for size in ((50, 6), (8, 5), (6, 8)))
    a, g = x.T @ x / 50, m @ m.T
    mu, u_a = torch.linalg.eigh(a)
    lam, u_g = torch.linalg.eigh(g)
    e = Eigen(lam.flip(0).clamp(min=0), u_g.flip(1), mu.flip(0), u_a.flip(1))
    measured = (x @ d @ m).square().sum(1).mean() / 2
    assert predicted(along(d, e, []).curvature) == pytest.approx(float(measured), rel=1e-12)


def exact_g(source, site: str, rows: list[list[int]], shape) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A and G of a matrix by going through all labels, for prompts of two tokens: one scored position each."""
    from interp.models.weights import module_sites, split_columns

    name, module = next((n, m) for n, m in source.named_modules() if Site.parse(site) in module_sites(n, shape))
    got: dict[str, torch.Tensor] = {}
    handle = module.register_forward_hook(lambda _, args, out: got.update(x=args[0], y=out))
    a = g = 0
    for row in rows:
        logp = source(input_ids=torch.tensor([row])).logits[0, 0].log_softmax(-1)
        x = got["x"][0, 0].detach()
        a = a + torch.outer(x, x)
        for label, p in enumerate(logp.exp().tolist()):
            (by_y,) = torch.autograd.grad(-logp[label], got["y"], retain_graph=True)
            one = split_columns(name, by_y[0, :1], shape)[Site.parse(site)][0]
            g = g + p * torch.outer(one, one)
    handle.remove()
    return a / len(rows), g / len(rows), len(rows)


@pytest.mark.parametrize("site", ["L1.W_in", "L2.W_out", "L0.W_V"])
@pytest.mark.parametrize("copies", [1, 4])
def test_the_second_order_is_exact_for_one_position(site: str, copies: int, tmp_path) -> None:
    source = tiny("gpt2").double()
    model = HookedModel.load(source)
    rows = [[5, 7]] * copies  # more of the same changes no mean
    a, g, n = exact_g(source, site, rows, model.shape)
    factors = Factors.write(tmp_path / "f", {site: (a, g)}, n=n, fingerprint=model.fingerprint)
    pair = pair_of(source, {site: random_change(model, site)})
    result = delta_curvature(pair, factors, prompts(rows), step=1e-3, per_weight=True)
    assert float(result.small_kl.value) == pytest.approx(float(result.predicted.sum()), rel=1e-4)
    assert float(result.measured_kl.value) == pytest.approx(float(result.predicted.sum()), rel=0.5), "higher orders"
    torch.testing.assert_close(result.weight_kl[0], result.kl[CHANGED.index("all")])
    torch.testing.assert_close(result.loss[CHANGED.index("all")], result.loss[CHANGED.index("tuned")])
    assert result.tokens.tolist() == [1] * copies


@pytest.mark.full
def test_the_mean_over_positions_is_right_on_a_trained_model(tmp_path) -> None:
    """Many positions per text: without the right normalisation the prediction would be off by their number, about 50."""
    base = HookedModel.load("base")
    texts = task("plain_text").generate(base, 48, 0)
    factors = kfac_factors(base, texts, tmp_path / "f", modules=("W_in", "W_out"), layers=(1, 3))
    for i, site in enumerate(("L3.W_out", "L1.W_in")):
        pair = pair_of(base.wrapped.source, {site: random_change(base, site, size=0.01)})
        only = Factors.write(tmp_path / f"f{i}", {site: (factors.A(site), factors.G(site))}, n=factors.n, fingerprint=pair.base.fingerprint)
        result = delta_curvature(pair, only, texts)
        assert 0.5 < float(result.predicted.sum() / result.small_kl.value) < 2


def test_chance_takes_changes_of_low_rank_further(tmp_path) -> None:
    """Of rank 1 in every matrix, drawn at random: the spread that is said is the one that is seen (an isotropic one is a third)."""
    source = tiny("llama")
    model = HookedModel.load(source)
    factors = written(model, tmp_path / "f")
    names, found = ("L0.W_in", "L1.W_out", "L2.W_gate"), []
    for draw in range(14):
        g = torch.Generator().manual_seed(draw)
        deltas = {}
        for name in names:
            rows, columns = model.weight(name).shape
            deltas[name] = torch.randn(rows, 1, generator=g) @ torch.randn(1, columns, generator=g) / 30
        result = delta_curvature(pair_of(source, deltas), factors)
        i = [result.names.index(n) for n in names]
        found.append((result.sharpness[i] - 1) / result.sharpness_sd[i])
    z = torch.stack(found)
    assert 0.7 < float(z.square().mean().sqrt()) < 1.4 and abs(float(z.mean())) < 0.5
    assert float(result.whole[1]) > 0 and result.whole[0] == pytest.approx(
        float(result.predicted.nansum() / result.predicted_random.nansum())
    )


# ---- the analysis


@pytest.mark.parametrize("kind", FOUR)
def test_shares_and_sums_beside_the_naive_ones(kind: str, tmp_path) -> None:
    source = tiny(kind)
    model = HookedModel.load(source)
    factors = written(model, tmp_path / "f")
    deltas = {name: random_change(model, name, i) for i, name in enumerate(("L0.W_Q", "L1.W_O", "L2.W_in", "L2.W_V"))}
    pair = pair_of(source, deltas)
    result = delta_curvature(pair, factors, masses=MASSES)
    assert set(result.names) == set(map(str, factors.sites)) and result.labels["band"][0] == "sharpest 50 %"
    for i, name in enumerate(result.names):
        mu, u_a = torch.linalg.eigh(factors.A(name))
        lam, u_g = torch.linalg.eigh(factors.G(name))
        inside = [full_sort(lam, mu, m) for m in MASSES] + [torch.ones(len(mu), len(lam), dtype=torch.bool)]
        bands = [inside[0], *(b & ~a for a, b in zip(inside, inside[1:], strict=False))]
        w = u_a.T @ model.weight(name).double() @ u_g
        torch.testing.assert_close(result.base_energy[i], torch.stack([w[b].square().sum() for b in bands]) / w.square().sum())
        torch.testing.assert_close(result.chance[i], torch.stack([b.double().mean() for b in bands]))
        if name not in deltas:
            assert float(result.change[i]) == 0 == float(result.curvature[i]) and bool(result.energy[i].isnan().all())
            continue
        c = u_a.T @ (pair.tuned.weight(name) - pair.base.weight(name)).double() @ u_g
        torch.testing.assert_close(result.energy[i], torch.stack([c[b].square().sum() for b in bands]) / c.square().sum())
        assert float(result.predicted[i]) == pytest.approx(float((c.square() * mu[:, None] * lam).sum() / 2))
        # Random changes are at chance within what their spread allows.
        assert bool(((result.energy[i] - result.chance[i]).abs() < 5 * result.chance_sd[i] + 1e-12).all())
        assert abs(float(result.sharpness[i]) - 1) < 5 * float(result.sharpness_sd[i])
    assert len(result.to_frame()) == len(result.names) and result.strongest(2).weight.isin(deltas).all()


def test_a_pair_with_itself_is_exactly_zero(tmp_path) -> None:
    source = tiny("llama")
    factors = written(HookedModel.load(source), tmp_path / "f")
    result = delta_curvature(pair_of(source, {}), factors, drawn_prompts(5, 0), per_weight=True)
    assert not bool(result.change.any()) and not bool(result.curvature.any()) and not bool(result.predicted.any())
    assert bool(result.energy.isnan().all()) and not bool(result.kl.any()) and not bool(result.weight_kl.any())
    assert result.summary().startswith("0 nats") and all(result.figures().values())
    assert float(result.measured_loss.value) == 0 == float(result.gradient.value)


def test_planted_changes_are_found_where_they_are(tmp_path) -> None:
    source = tiny("llama")
    model = HookedModel.load(source)
    factors = written(model, tmp_path / "f", {Site("W_in", 0), Site("W_in", 1)})
    bases = {name: eigen(factors, name) for name in ("L0.W_in", "L1.W_in")}
    sharp = torch.outer(bases["L0.W_in"].U_A[:, 0], bases["L0.W_in"].U_G[:, 0])
    flat = torch.outer(bases["L1.W_in"].U_A[:, -1], bases["L1.W_in"].U_G[:, -1])
    result = delta_curvature(pair_of(source, {"L0.W_in": sharp, "L1.W_in": flat}), factors, drawn_prompts(6, 0), masses=(0.1, 0.9, 0.999))
    assert float(result.energy[0, 0]) > 1 - 1e-9 and float(result.energy[1, -1]) > 1 - 1e-9
    top = bases["L0.W_in"]
    assert float(result.curvature[0]) == pytest.approx(float(top.lam[0] * top.mu[0]), rel=1e-4)
    assert float(result.sharpness[0]) > 40 and float(result.sharpness[1]) < 1e-3
    assert result.strongest(1).weight.tolist() == ["L0.W_in"] and "of base's" in result.summary()
    assert {"Where the change is", "Predicted loss", "Predicted and measured"} < set(result.figures())
    assert len(result.to_frame("prompt")) == 6 * len(CHANGED)


def _not_of_factors(change) -> torch.Tensor:
    assert change.factors is None, "the product of an adapter's factors was made"
    return torch.zeros_like(change.base)


def test_an_adapter_is_taken_as_factors(tmp_path, monkeypatch) -> None:
    source = tiny("llama")
    base = saved(source, tmp_path / "base")
    torch.manual_seed(0)
    tuned = get_peft_model(copy.deepcopy(source), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    pair = ModelPair.load(str(base), str(tmp_path / "adapter"))
    factors = written(pair.base, tmp_path / "f")
    with monkeypatch.context() as patch:
        patch.setattr("interp.models.changes.Change.delta", property(_not_of_factors))
        found = delta_curvature(pair, factors, drawn_prompts(4, 0))
    merged = saved(tuned.merge_and_unload(), tmp_path / "merged")
    dense = delta_curvature(ModelPair.load(str(base), str(merged)), factors, drawn_prompts(4, 0))
    live = found.change > 0
    assert sum(live) == 6 and torch.equal(live, dense.change > 1e-6)
    for field in ("energy", "curvature", "change", "curvature_sd", "chance_sd"):
        torch.testing.assert_close(getattr(found, field)[live], getattr(dense, field)[live], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.kl[CHANGED.index("all")], found.kl[CHANGED.index("tuned")], rtol=1e-3, atol=1e-7)
    assert not bool(found.rounding.any())


def test_the_gradient_is_the_first_order(tmp_path) -> None:
    source = tiny("gpt2").double()
    model = HookedModel.load(source)
    site, texts = "L1.W_in", drawn_prompts(4, 3)
    delta = random_change(model, site, size=0.02)
    factors = written(model, tmp_path / "f", {Site.parse(site)})
    result = delta_curvature(pair_of(source, {site: delta}), factors, texts, step=1e-3)
    weight = source.get_parameter("transformer.h.1.mlp.c_fc.weight")
    loss, n = torch.zeros((), dtype=torch.float64), 0
    for row in texts.ids:
        logits = source(input_ids=torch.tensor([row])).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
        n += len(row) - 1
    (gradient,) = torch.autograd.grad(loss / n, weight)
    assert float(result.gradient.value) == pytest.approx(float((gradient * delta).sum()), rel=1e-3)


def test_loss_and_kl_beside_the_plain_model() -> None:
    source = tiny("qwen2")
    model, other = HookedModel.load(source), tiny("qwen2", seed=2)
    texts = drawn_prompts(7, 1)
    loss, kl = loss_and_kl(model, model.batch(texts), [None, HookedModel.load(other)])
    for i, row in enumerate(texts.ids):
        with torch.no_grad():
            p, q = (m(input_ids=torch.tensor([row])).logits[0, :-1].double().log_softmax(-1) for m in (source, other))
        after = torch.tensor(row[1:])[:, None]
        assert float(loss[0, i]) == pytest.approx(float(-p.gather(1, after).mean()), rel=1e-5)
        assert float(loss[1, i]) == pytest.approx(float(-q.gather(1, after).mean()), rel=1e-5)
        assert float(kl[0, i]) == 0 and float(kl[1, i]) == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    with pytest.raises(InputError, match="prompt 1 is a single token"):
        loss_and_kl(model, model.batch([[1, 2], [3]]), [None])


def test_weights_that_two_blocks_share_are_refused(tmp_path) -> None:
    """Each change would be made in both places, and measured there."""
    hf = tiny("llama")
    hf.model.layers[1].mlp.up_proj.weight = hf.model.layers[0].mlp.up_proj.weight
    pair = ModelPair.load(hf, tiny("llama", seed=2))
    factors = written(pair.base, tmp_path / "f")
    for texts in (None, drawn_prompts(3, 0)):
        with pytest.raises(InputError, match="^L0.W_in and L1.W_in of .* are one tensor"):
            delta_curvature(pair, factors, texts)
    some = written(pair.base, tmp_path / "g", {Site("W_gate", 0)})
    assert delta_curvature(pair, some).names == ("L0.W_gate",)


def test_what_it_refuses(tmp_path, unchecked) -> None:
    source = tiny("gpt2")
    pair = pair_of(source, {"L0.W_in": torch.ones(24, 40)})
    of_tuned = Factors.write(tmp_path / "t", {"L0.W_in": (moment(24, 0), moment(40, 1))}, n=9, fingerprint=pair.tuned.fingerprint)
    factors = written(pair.base, tmp_path / "f", {Site("W_in", 0)})
    with pytest.raises(InputError, match="weights are not those of"):
        delta_curvature(pair, of_tuned)
    with pytest.raises(InputError, match="factors are what kfac_factors returns .* but 'folder' came"):
        delta_curvature(pair, "folder")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="masses is .*ascending"):
        delta_curvature(pair, factors, masses=(0.9, 0.9))
    with pytest.raises(InputError, match="mass is 0, expected"):
        delta_curvature(pair, factors, masses=(0,))
    with pytest.raises(InputError, match="step is 0"):
        delta_curvature(pair, factors, step=0)
    with pytest.raises(InputError, match="per_weight measures on prompts, but none were given"):
        delta_curvature(pair, factors, per_weight=True)
    with pytest.raises(InputError, match="prompt 1 is a single token"):
        delta_curvature(pair, factors, prompts([[1, 2], [3]]))
    result = delta_curvature(pair, factors)
    with pytest.raises(InputError, match="nothing was measured"):
        _ = result.measured_kl
    assert "measured" not in result.summary() and result.loss is None
