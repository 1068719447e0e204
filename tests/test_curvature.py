"""The staircase beside a full sort, the edit's identities on four architectures, spectra and bands beside naive tables."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_checkpoints import FOUR, tiny

from interp.analyses.curvature import QUANTILES, curvature
from interp.analyses.curvature_bands import curvature_bands
from interp.edits import Edit
from interp.errors import InputError
from interp.models import HookedModel
from interp.models.batch import Batch
from interp.models.curvature import (
    Eigen,
    band,
    coordinates,
    eigen,
    grid,
    kept,
    mask,
    mass_of,
    products,
    random_shares,
    random_sharpness,
    rotated,
    sharpest,
    staircase,
    threshold,
    wanted_sites,
)
from interp.models.curvature_bands import Reader, Rows, bands, continued, strengths, thinned
from interp.models.curvature_edits import chosen, curvature_cuts, curvature_edit, curvature_edits
from interp.models.factors import Factors
from interp.prompts import Prompts
from interp.sites import Site

MASSES = (0.05, 0.3, 0.6, 0.9, 0.999)
PROMPTS = [[3, 9, 4, 7, 5], [6, 2, 8], [11, 5, 5, 13, 2, 30, 17]]


def moment(d: int, seed: int, rows: int | None = None) -> torch.Tensor:
    """A random positive matrix with a steep spectrum."""
    x = torch.randn(rows or 3 * d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.linspace(0, 3, d, dtype=torch.float64).neg().exp()
    return x.T @ x / len(x)


def basis(rows: int, cols: int, seed: int = 0) -> Eigen:
    found = []
    for d, s in ((cols, 2 * seed), (rows, 2 * seed + 1)):
        values, vectors = torch.linalg.eigh(moment(d, s))
        found += [values.flip(0), vectors.flip(1)]
    return Eigen(*found)


def full_sort(lam: torch.Tensor, mu: torch.Tensor, mass: float) -> torch.Tensor:
    """The pairs kept, [in out], from a sort of all products."""
    products = mu[:, None] * lam
    order = products.flatten().sort(descending=True).values
    total = order.cumsum(0)
    last = int((total < mass * total[-1]).sum())
    return products >= order[min(last, len(order) - 1)]


def written(model: HookedModel, folder, sites=None, n: int = 1000) -> Factors:
    """Random factors of a model's matrices."""
    shared: dict[tuple[int, str], torch.Tensor] = {}
    factors = {}
    every = [Site(m, layer) for layer in range(model.shape.n_layers) for m in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")]
    for i, site in enumerate(every):
        if (sites is not None and site not in sites) or (site.component == "W_gate" and not model.shape.gated):
            continue
        rows, cols = model.weight(site).shape
        group = "qkv" if site.component in ("W_Q", "W_K", "W_V") else "up" if site.component in ("W_in", "W_gate") else site.component
        a = shared.setdefault((site.layer, group), moment(rows, 100 + i))
        factors[site] = (a, moment(cols, 200 + i))
    return Factors.write(folder, factors, n=n, fingerprint=model.fingerprint, meta={"model": model.name, "labels": "sampled"})


# ---- which pairs


@pytest.mark.parametrize(("mass", "count"), [(0.49, 1), (0.50, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1, 4), (1.0, 4)])
def test_the_hand_case(mass: float, count: int) -> None:
    lam, mu = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])  # products 6, 3, 2, 1 of 12
    assert int(staircase(lam, mu, mass).sum()) == count


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (13, 1), (17, 30), (41, 8), (64, 64)])
@pytest.mark.parametrize("mass", MASSES)
def test_the_staircase_is_the_full_sort(shape: tuple[int, int], mass: float) -> None:
    for seed in range(4):
        draws = torch.Generator().manual_seed(seed)
        mu, lam = (torch.randn(n, generator=draws, dtype=torch.float64).mul(3).exp().sort(descending=True).values for n in shape)
        assert torch.equal(mask(staircase(lam, mu, mass), len(mu)), full_sort(lam, mu, mass))
        assert mass <= mass_of(lam, mu, staircase(lam, mu, mass)) + 1e-15


@pytest.mark.parametrize("mass", MASSES)
def test_ties_stay_together_and_zeros_stay_out(mass: float) -> None:
    for seed in range(20):
        draws = torch.Generator().manual_seed(seed)
        mu, lam = (torch.randint(0, 4, (n,), generator=draws).double().sort(descending=True).values for n in (9, 14))
        mu[0], lam[0] = 3, 3
        found = mask(staircase(lam, mu, mass), len(mu))
        assert torch.equal(found, full_sort(lam, mu, mass))
        assert not bool(found[(mu[:, None] * lam) == 0].any())
        assert bool(mask(staircase(lam, mu, 1), len(mu)).all()), "all of the curvature is every pair, flat ones too"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 0.5, 1])
def test_shares_of_the_list(share: float) -> None:
    e = basis(11, 18)
    products = (e.mu[:, None] * e.lam).flatten().sort(descending=True).values
    n = math.ceil(share * len(products))
    counts = sharpest(e.lam, e.mu, share)
    assert int(counts.sum()) == n
    assert threshold(e.lam, e.mu, share) == float(products[n - 1])


def test_negative_eigenvalues_are_zero(tmp_path) -> None:
    model = HookedModel.load(tiny("gpt2"))
    a = moment(24, 0, rows=3)  # rank 3: rounding makes some of the others negative
    site = Site("W_in", 0)
    factors = Factors.write(tmp_path / "f", {site: (a, moment(40, 1))}, n=3, fingerprint=model.fingerprint)
    e = eigen(factors, site)
    assert float(torch.linalg.eigvalsh(factors.A(site)).min()) < 0 <= float(e.mu.min())
    assert bool((e.mu.diff() <= 0).all()) and bool((e.lam.diff() <= 0).all())
    torch.testing.assert_close(e.U_A * e.mu @ e.U_A.T, a, atol=1e-12, rtol=0)
    torch.testing.assert_close(e.U_G * e.lam @ e.U_G.T, factors.G(site), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mass", [0, -0.1, 1.01, float("nan"), True, None, "0.5"])
def test_a_mass_is_a_share(mass) -> None:
    with pytest.raises(InputError, match="mass is .*expected a share above 0 and at most 1"):
        staircase(torch.ones(3), torch.ones(2), mass)


def test_zero_factors_have_no_curvature() -> None:
    with pytest.raises(InputError, match="no direction has any curvature"):
        staircase(torch.zeros(3), torch.ones(2), 0.5)


# ---- what is kept of a matrix


@pytest.mark.parametrize("mass", MASSES)
def test_identities_of_the_edit(mass: float) -> None:
    e, w = basis(12, 19), torch.randn(12, 19, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    part = kept(w, e, mass)
    close = {"atol": 1e-12, "rtol": 0}
    slow = sum(
        (e.U_A[:, i] @ w @ e.U_G[:, j]) * torch.outer(e.U_A[:, i], e.U_G[:, j]) for i, j in full_sort(e.lam, e.mu, mass).nonzero().tolist()
    )
    torch.testing.assert_close(part, slow, **close)
    torch.testing.assert_close(kept(part, e, mass), part, **close)  # a projection
    assert torch.equal(kept(w, e, 1), w)
    counts = staircase(e.lam, e.mu, mass)
    assert bool((counts.diff() <= 0).all()), "a staircase"
    held = mass_of(e.lam, e.mu, counts)
    assert mass <= held <= mass + float(e.lam[0] * e.mu[0] / (e.lam.sum() * e.mu.sum())) + 1e-12
    norms = [float(kept(w, e, m).norm()) for m in (*MASSES, 1)]
    assert norms == sorted(norms) and norms[-1] <= float(w.norm()) + 1e-12
    for scaled in (e._replace(lam=e.lam * 7.3), e._replace(mu=e.mu * 1e-5)):
        torch.testing.assert_close(kept(w, scaled, mass), part, **close)
    q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).Q
    torch.testing.assert_close(kept(q.T @ w, e._replace(U_A=q.T @ e.U_A), mass), q.T @ part, **close)
    torch.testing.assert_close(kept(w, e._replace(U_A=-e.U_A, U_G=-e.U_G), mass), part, **close)


def test_a_planted_matrix_loses_its_flat_pairs_only() -> None:
    e = basis(9, 13)
    sharp, flat = torch.outer(e.U_A[:, 0], e.U_G[:, 0]), torch.outer(e.U_A[:, 8], e.U_G[:, 12])
    torch.testing.assert_close(kept(3 * sharp + 5 * flat, e, 0.9), 3 * sharp, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", FOUR)
def test_an_edit_in_a_model_is_the_dense_formula(kind: str, tmp_path) -> None:
    model = HookedModel.load(tiny(kind).double())
    factors = written(model, tmp_path / "f")
    asked = ("W_Q", "W_V", "W_O", "W_in", "W_out")
    before = {site: model.weight(site).clone() for site in factors.sites}
    edit = curvature_edit(model, factors, layers=(0, 2), modules=asked, mass=0.6)
    assert {c.site for c in edit.weights} == {Site(m, layer) for m in asked for layer in (0, 2)}
    with model.edited(edit):
        inside = {site: model.weight(site).clone() for site in factors.sites}
    for site in factors.sites:
        assert torch.equal(model.weight(site), before[site])
        if site.component not in asked or site.layer == 1:
            assert torch.equal(inside[site], before[site])
            continue
        mu, u_a = torch.linalg.eigh(factors.A(site))
        lam, u_g = torch.linalg.eigh(factors.G(site))
        c = torch.where(full_sort(lam, mu, 0.6), u_a.T @ before[site] @ u_g, 0.0)
        torch.testing.assert_close(inside[site], u_a @ c @ u_g.T, atol=1e-12, rtol=0)
    rest = curvature_edit(model, factors, layers=(0, 2), modules=asked, mass=0.6, control="complement")
    with model.edited(rest):
        for site in (Site("W_Q", 0), Site("W_out", 2)):
            torch.testing.assert_close(model.weight(site) + inside[site], before[site], atol=1e-12, rtol=0)
    assert curvature_edit(model, factors, layers=(0, 2), modules=asked, mass=1).changes == ()


def test_half_precision_is_rounded_once(tmp_path) -> None:
    wide = HookedModel.load(tiny("llama"))
    model = HookedModel.load(tiny("llama").bfloat16())
    factors = written(model, tmp_path / "f", {Site("W_in", 1)})
    edit = curvature_edit(model, factors, layers=1, modules="W_in", mass=0.7)
    assert edit.weights[0].delta.dtype == torch.float32
    w = model.weight("L1.W_in").double()
    exact = kept(w, eigen(factors, Site("W_in", 1)), 0.7)
    with model.edited(edit):
        got = model.weight("L1.W_in")
    assert got.dtype == torch.bfloat16
    # Within half a place of the exact number, and a little for the delta being float32.
    error = (got.double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())
    assert not torch.equal(wide.weight("L1.W_in").bfloat16(), got)


def test_several_masses_at_once_and_files(tmp_path) -> None:
    model = HookedModel.load(tiny("gpt2"))
    factors = written(model, tmp_path / "f")
    several = curvature_edits(model, factors, layers=1, modules=("W_in", "W_out"), masses=(0.4, 0.8))
    for mass, edit in zip((0.4, 0.8), several, strict=True):
        alone = curvature_edit(model, factors, layers=1, modules=("W_in", "W_out"), mass=mass)
        assert edit.digest == alone.digest and f"{mass:g}" in edit.name
    assert Edit.load(several[0].save(tmp_path / "e")).digest == several[0].digest


def test_controls(tmp_path) -> None:
    model = HookedModel.load(tiny("qwen2").double())
    site = Site("W_gate", 1)
    factors = written(model, tmp_path / "f", {site})
    e, w = eigen(factors, site), model.weight(site)
    total, products = float(e.lam.sum() * e.mu.sum()), e.mu[:, None] * e.lam

    def cut(control, mass=0.7, seed=0):
        ((found,),) = curvature_cuts(model, factors, layers=1, modules="W_gate", masses=(mass,), control=control, seed=seed)
        return found

    own = cut(None)
    assert own.mass == pytest.approx(mass_of(e.lam, e.mu, staircase(e.lam, e.mu, 0.7))) and 0 < own.pairs < 0.5
    assert own.norm == pytest.approx(float((w + own.delta).norm() / w.norm()))
    torch.testing.assert_close(own.delta + cut("complement").delta, -w, atol=1e-12, rtol=0)
    assert own.pairs + cut("complement").pairs == pytest.approx(1) == own.mass + cut("complement").mass
    # The same mass at the sharp end: 1 - 0.7, and the pair that crosses it.
    top = cut("top_removed")
    gone = full_sort(e.lam, e.mu, 1 - 0.7)
    assert top.mass == pytest.approx(1 - float(products[gone].sum()) / total) and 0.7 - float(products.max()) / total <= top.mass <= 0.7
    torch.testing.assert_close(coordinates(top.delta, e), torch.where(gone, -coordinates(w, e), 0.0), atol=1e-12, rtol=0)
    # As many pairs, others.
    random, again, other = cut("random"), cut("random"), cut("random", seed=1)
    assert random.pairs == own.pairs and torch.equal(random.delta, again.delta) and not torch.equal(random.delta, other.delta)
    assert random.mass < own.mass
    # Singular components: a rank, and a share of the squared norm.
    svd = cut("svd")
    s = torch.linalg.svdvals(w)
    n = round(svd.pairs * len(s))
    assert float(s[:n].square().sum() / s.square().sum()) >= 0.7 > float(s[: n - 1].square().sum() / s.square().sum())
    torch.testing.assert_close(torch.linalg.svdvals(w + svd.delta)[:n], s[:n])
    assert float(torch.linalg.svdvals(w + svd.delta)[n]) < 1e-12
    # Chosen apart: P_A W P_G.
    rect = cut("rectangular")
    a, g = (int((x.cumsum(0) < 0.7 * x.sum()).sum()) + 1 for x in (e.mu, e.lam))
    p, q = (u[:, :k] @ u[:, :k].T for u, k in ((e.U_A, a), (e.U_G, g)))
    torch.testing.assert_close(w + rect.delta, p @ w @ q, atol=1e-12, rtol=0)
    for control in (None, "top_removed", "random", "svd", "rectangular"):
        assert not bool(cut(control, mass=1).delta.any()), control
    assert not bool(chosen(e, 1, "complement").any())


def test_what_an_edit_refuses(tmp_path, unchecked) -> None:
    model, other = HookedModel.load(tiny("gpt2")), HookedModel.load(tiny("gpt2", seed=5))
    factors = written(model, tmp_path / "f", {Site(m, layer) for m in ("W_in", "W_out") for layer in (0, 1)})

    def edit(of=model, **changes):
        return curvature_edit(of, factors, **({"layers": 0, "modules": "W_in", "mass": 0.5} | changes))

    edit()
    with pytest.raises(InputError, match="weights are not those of"):
        edit(other)
    with pytest.raises(InputError, match="no factors of layer 2; there are some of 0, 1"):
        edit(layers=(0, 2))
    with pytest.raises(InputError, match="no factors of module 'W_gate'; there are some of W_in, W_out"):
        edit(modules=("W_gate",))
    with pytest.raises(InputError, match="no modules were given"):
        edit(modules=())
    with pytest.raises(InputError, match="mass is 0, expected"):
        edit(mass=0)
    with pytest.raises(InputError, match="control is 'bottom', expected None or one of complement"):
        edit(control="bottom")
    with pytest.raises(InputError, match="layers is one of them or a list, such as 0,2, but 1.5 came"):
        edit(layers=1.5)
    folder = str(tmp_path / "f")
    for asked in (
        lambda: curvature_edit(model, folder, layers=0, modules="W_in", mass=0.5),  # type: ignore[arg-type]
        lambda: curvature(model, folder),  # type: ignore[arg-type]
        lambda: curvature_bands(model, drawn_prompts(3, 0), drawn_prompts(3, 1), folder),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=r"factors are what kfac_factors returns or Factors.open\(folder\) opens, but '.*f' came"):
            asked()
    with pytest.raises(InputError, match="but None came"):
        curvature(model, None)  # type: ignore[arg-type]
    assert list(map(str, wanted_sites(factors))) == ["L0.W_in", "L0.W_out", "L1.W_in", "L1.W_out"]


# ---- expectations of random changes


def test_an_edit_refuses_weights_that_two_blocks_share(tmp_path) -> None:
    """Factors made by hand, or before the weights were tied: the edit of one layer would change the other, too."""
    hf = tiny("llama")
    hf.model.layers[1].mlp.up_proj.weight = hf.model.layers[0].mlp.up_proj.weight
    model = HookedModel.load(hf)
    factors = written(model, tmp_path / "f")
    for layer in (0, 1):
        with pytest.raises(InputError, match="^L0.W_in and L1.W_in of .* are one tensor"):
            curvature_edit(model, factors, layers=layer, modules="W_in", mass=0.5)
    edit = curvature_edit(model, factors, layers=(0, 2), modules=("W_gate", "W_out"), mass=0.5)
    with model.edited(edit):
        assert torch.equal(model.weight("L1.W_gate"), hf.model.layers[1].mlp.gate_proj.weight.T)


def test_random_changes_are_as_expected() -> None:
    e = basis(5, 7)
    d = torch.randn(40000, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = d / d.flatten(1).norm(dim=1)[:, None, None]
    sizes = (4, 10, 21)
    flat = d.flatten(1).square()
    drawn = torch.stack([x.sum(1) for x in flat.split(sizes, dim=1)], 1)
    found = random_shares(sizes)
    torch.testing.assert_close(drawn.mean(0), found.mean, atol=0.003, rtol=0)
    torch.testing.assert_close(drawn.std(0), found.sd, atol=0.003, rtol=0)
    quadratic = (d.square() * e.mu[:, None] * e.lam).sum((1, 2))
    sharp = random_sharpness(e)
    assert float(quadratic.mean()) == pytest.approx(float(sharp.mean), rel=0.02)
    assert float(quadratic.std()) == pytest.approx(float(sharp.sd), rel=0.03)


@pytest.mark.parametrize("singular", [(1.0,), (2.0, 1.0), (1.0, 1.0, 1.0, 1.0, 1.0), (3.0, 2.0, 1.0, 0.5, 0.25)])
def test_random_changes_of_low_rank_stray_further(singular: tuple[float, ...]) -> None:
    """Turned at random on both sides: against draws, in the quadratic form and in bands of the staircase."""
    e, draws, generator = basis(5, 7), 40000, torch.Generator().manual_seed(1)
    s = torch.tensor(singular, dtype=torch.float64)

    def turned(n: int) -> torch.Tensor:
        q, r = torch.linalg.qr(torch.randn(draws, n, len(s), generator=generator, dtype=torch.float64))
        return q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # Haar

    d = (turned(5) * s) @ turned(7).mT / s.norm()
    spread = float(s.pow(4).sum() / s.square().sum().square())
    quadratic = (d.square() * e.mu[:, None] * e.lam).sum((1, 2))
    found = rotated(products(e), spread)
    assert float(quadratic.mean()) == pytest.approx(float(found.mean), rel=0.02)
    assert float(quadratic.std()) == pytest.approx(float(found.sd), rel=0.03)
    cuts = [torch.zeros(7, dtype=torch.long), staircase(e.lam, e.mu, 0.5), staircase(e.lam, e.mu, 0.9), torch.full((7,), 5)]
    for inner, outer in zip(cuts, cuts[1:], strict=False):
        place = torch.arange(5)[:, None]
        inside = (place < outer) & (place >= inner)
        share = d.square()[:, inside].sum(1)
        found = rotated(band(inner, outer, 5), spread)
        assert float(found.mean) == pytest.approx(float(inside.double().mean()))
        assert float(share.std()) == pytest.approx(float(found.sd), rel=0.03), (inner, outer)


def test_the_spread_of_one_direction_is_that_of_the_sphere() -> None:
    """1 x n: there is one singular value and nothing to turn on the other side, so it is the isotropic change."""
    e = Eigen(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64), torch.eye(3), torch.ones(1, dtype=torch.float64), torch.eye(1))
    assert float(rotated(products(e), 1.0).sd) == pytest.approx(float(random_sharpness(e).sd), rel=1e-12)


# ---- the analysis of spectra


def test_spectra_beside_a_table_of_all_products(tmp_path) -> None:
    model = HookedModel.load(tiny("llama"))
    factors = written(model, tmp_path / "f", n=300)
    result = curvature(model, factors, masses=(0.5, 0.9))
    assert result.names == tuple(map(str, wanted_sites(factors))) and result.meta.inputs[0]["kind"] == "Factors"
    for i, name in enumerate(result.names):
        mu, lam = (torch.linalg.eigvalsh(x).flip(0) for x in (factors.A(name), factors.G(name)))
        products, w = mu[:, None] * lam, model.weight(name).double()
        c = torch.linalg.eigh(factors.A(name))[1].flip(1).T @ w @ torch.linalg.eigh(factors.G(name))[1].flip(1)
        for k, mass in enumerate((0.5, 0.9)):
            inside = full_sort(lam, mu, mass)
            assert float(result.pairs[i, k]) == pytest.approx(float(inside.double().mean()))
            assert float(result.energy[i, k]) == pytest.approx(float(c[inside].square().sum() / w.square().sum()))
        assert float(result.mean[i]) == pytest.approx(float(products.mean()))
        order = products.flatten().sort(descending=True).values
        at = [order[max(0, math.ceil(q * len(order)) - 1)] / products.mean() for q in QUANTILES]
        torch.testing.assert_close(result.quantile[i], torch.stack(at), rtol=1e-9, atol=1e-12)
        p = products.flatten() / products.sum()
        entropy = -float((p * p.log()).sum())
        assert float(result.effective[i]) == pytest.approx(math.exp(entropy) / len(p))
        torch.testing.assert_close(result.mu[name], mu, atol=1e-12, rtol=0)
    assert float(result.positions_per_dimension.min()) == pytest.approx(300 / 40)
    assert "300 positions, 7.5 per dimension of L0.W_in" in result.summary()
    assert set(result.figures()) == {"How concentrated", "How sharp", "Mass curves", "Product spectra", "Spectra of A and G"}
    assert len(result.strongest(4)) == 4 and len(result.to_frame()) == len(result.names) * 2


def test_too_few_positions_are_told_and_dead_matrices_have_no_numbers(tmp_path) -> None:
    model = HookedModel.load(tiny("gpt2"))
    sites = {Site("W_in", 0): (moment(24, 0, 8), moment(40, 1, 8)), Site("W_out", 0): (moment(40, 2), torch.zeros(24, 24))}
    factors = Factors.write(tmp_path / "f", sites, n=8, fingerprint=model.fingerprint)
    result = curvature(model, factors)
    assert result.read_rank.tolist()[0] == 8 and "2 matrices have fewer positions than dimensions" in result.summary()
    assert result.names == ("L0.W_in", "L0.W_out") and bool(result.pairs[1].isnan().all()) and float(result.mean[1]) == 0
    assert all(result.figures().values())
    with pytest.raises(InputError, match="weights are not those of"):
        curvature(HookedModel.load(tiny("gpt2", seed=3)), factors)
    with pytest.raises(InputError, match="masses is .*ascending"):
        curvature(model, factors, masses=(0.9, 0.5))
    with pytest.raises(InputError, match="mass is 1.5"):
        curvature(model, factors, masses=(1.5,))


def test_the_grid_leaves_holes() -> None:
    cells, layers, modules = grid(("L1.W_in", "L4.W_Q", "L4.W_in"), (1.0, 2.0, 3.0))
    assert layers == (1, 4) and modules == ("W_Q", "W_in")
    assert cells[0, 0].isnan() and cells[:, 1].tolist() == [1, 3] and float(cells[1, 0]) == 2


# ---- bands


def test_strengths_beside_a_loop_over_pairs() -> None:
    e, draws = basis(6, 8), torch.Generator().manual_seed(1)
    w, x = (torch.randn(n, m, generator=draws, dtype=torch.float64) for n, m in ((6, 8), (5, 6)))
    cuts = bands(e, (0.1, 0.5, 1))
    found = strengths(x, w, e, cuts)
    order = (e.mu[:, None] * e.lam).flatten().argsort(descending=True).tolist()
    for b, (start, stop) in enumerate(((0, 5), (5, 24), (24, 48))):
        pairs = [divmod(k, 8) for k in order[start:stop]]
        c = sum((e.U_A[:, i] @ w @ e.U_G[:, j]) * torch.outer(e.U_A[:, i], e.U_G[:, j]) for i, j in pairs)
        for t in range(5):
            assert float(found[0, b, t]) == pytest.approx(sum(abs(float(e.U_A[:, i] @ x[t])) for i, _ in pairs) / len(pairs))
            assert float(found[1, b, t]) == pytest.approx(float((x[t] @ c).norm()))


@pytest.mark.parametrize("kind", FOUR)
def test_inputs_are_those_of_the_plain_model(kind: str) -> None:
    source = tiny(kind)
    model = HookedModel.load(source)
    batch = Batch.of(PROMPTS)
    rows = continued(batch, None)
    assert rows.read.sum(1).tolist() == [4, 2, 6]
    sites = [Site("W_in", 2), Site("W_O", 1), Site("W_K", 0)]
    reader = Reader(model, sites)
    assert {site for group in reader.shares().values() for site in group} == set(sites)
    for share, group in reader.shares().items():
        (site,) = group
        x = reader.inputs(share, rows)
        got: list[torch.Tensor] = []
        name = next(n for n, m in source.named_modules() if site in reader_sites(n, model) and hasattr(m, "weight"))
        handle = source.get_submodule(name).register_forward_pre_hook(lambda _, args, got=got: got.append(args[0][0, :-1]))
        with torch.no_grad():
            for row in PROMPTS:
                source(input_ids=torch.tensor([row]))
        handle.remove()
        torch.testing.assert_close(x, torch.cat(got), atol=1e-5, rtol=1e-5)
    assert not any(m._forward_pre_hooks for m in source.modules())


def reader_sites(name: str, model: HookedModel) -> tuple[Site, ...]:
    from interp.models.weights import module_sites

    return module_sites(name, model.shape)


def prompts(rows) -> Prompts:
    return Prompts(tuple(" ".join(map(str, row)) for row in rows), tuple(map(tuple, rows)))


def drawn_prompts(n: int, seed: int, low: int = 0, high: int = 31) -> Prompts:
    draws = torch.Generator().manual_seed(seed)
    return prompts([torch.randint(low, high, (6 + i % 5,), generator=draws).tolist() for i in range(n)])


def test_the_same_texts_are_as_strong_and_flat_ones_are_found(tmp_path) -> None:
    model = HookedModel.load(tiny("llama"))
    one, site = drawn_prompts(9, 0, high=15), Site("W_in", 1)
    other = drawn_prompts(8, 1, low=16)
    factors = written(model, tmp_path / "random", {site, Site("W_Q", 0), Site("W_K", 0)})
    same = curvature_bands(model, one, one, factors)
    for reading in ("read", "through"):
        for norm in ("raw", "unit"):
            assert torch.equal(same.ratio(reading, norm).value, torch.ones(3, 4, dtype=torch.float64))
            assert bool((same.ratio(reading, norm).low <= 1).all()) and bool((same.ratio(reading, norm).high >= 1).all())
    assert same.summary().startswith("1.00 [")
    # A curvature whose sharp direction is where clean texts differ from the others: these must be weaker there, and stronger in the rest.
    reader = Reader(model, [site])
    x = {name: reader.inputs(str(site), continued(model.batch(p), None, 1)).double() for name, p in (("one", one), ("other", other))}
    gap = torch.linalg.eigh(x["one"].T @ x["one"] / len(x["one"]) - x["other"].T @ x["other"] / len(x["other"])).eigenvectors[:, -1]
    a = 1e-3 * torch.eye(24, dtype=torch.float64) + torch.outer(gap, gap)
    planted = Factors.write(tmp_path / "planted", {site: (a, torch.eye(40, dtype=torch.float64))}, n=500, fingerprint=model.fingerprint)
    found = curvature_bands(model, one, other, planted, ends=(1 / 24, 1.0))
    ratio = found.ratio(norm="unit")
    assert float(ratio.high[0, 0]) < 1 < float(ratio.value[0, 1] / ratio.value[0, 0])
    e = eigen(planted, site)
    values = strengths(x["other"], model.weight(site), e, bands(e, (1 / 24, 1)))
    torch.testing.assert_close(found.strength[1, :, 0, 0], values.mean(-1))
    torch.testing.assert_close(found.strength[1, :, 1, 0], (values / x["other"].norm(dim=1)).mean(-1))
    assert found.clean_tokens.sum() <= found.memorised_tokens.sum() and set(found.figures()) == {
        "By band",
        "In the flattest band",
        "In the sharpest band",
    }
    assert len(found.to_frame()) == 1 * 2 * 4 and len(found.to_frame("prompt")) == 2 * 4 * 17 and len(found.strongest()) == 1


def test_positions_that_predict_an_ending() -> None:
    batch = Batch.of([[1, 2, 3], [4, 5]])
    rows = continued(batch, [[6, 7], [8]])
    assert rows.batch.rows() == [[1, 2, 3, 6, 7], [4, 5, 8]]
    assert rows.read.nonzero().tolist() == [[0, 2], [0, 3], [1, 1]]
    assert rows.owners.tolist() == [0, 0, 1]
    some = thinned(Rows(Batch.of([[1] * 9, [2] * 3]), torch.arange(9)[None] < torch.tensor([[8], [2]])), 4, seed=0)
    assert int(some.read.sum()) == 4 and bool(some.read.any(1).all())
    with pytest.raises(InputError, match="prompt 1 has 1 tokens and no position to read"):
        continued(Batch.of([[1, 2], [3]]), None)


def test_what_bands_refuse(tmp_path, unchecked) -> None:
    model = HookedModel.load(tiny("gpt2"))
    factors = written(model, tmp_path / "f", {Site("W_in", 0)})
    one = drawn_prompts(3, 0)
    with pytest.raises(InputError, match="ends is .*ascending order up to 1"):
        curvature_bands(model, one, one, factors, ends=(0.5, 0.9))
    with pytest.raises(InputError, match="no factors of layer 2; there are some of 0"):
        curvature_bands(model, one, one, factors, layers=(2,))
    for name, sets in (("clean", (["text"], one)), ("memorised", (one, [[1, 2]])), ("clean", ("text", "text"))):
        with pytest.raises(InputError, match=f"^{name} of curvature_bands are Prompts, such as a task generates, but a (list|str) came$"):
            curvature_bands(model, *sets, factors)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokens is 'some'"):
        curvature_bands(model, one, one, factors, tokens="some")
    with pytest.raises(InputError, match="weights are not those of"):
        curvature_bands(HookedModel.load(tiny("gpt2", seed=3)), one, one, factors)
