"""Spectra, rounding floors and intervals against dense algebra, scipy and loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from interp import linalg, stats
from interp.errors import InputError


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- spectra


@pytest.mark.parametrize("sizes", [(30, 4, 17), (17, 4, 30), (5, 9, 7), (6, 1, 6)])
def test_svd_of_a_product_is_the_dense_one(sizes) -> None:
    rows, rank, cols = sizes
    left, right = normal(rows, rank), normal(rank, cols, seed=1)
    u, s, vh = linalg.svd_of_product(left, right)
    kept = min(rank, rows, cols)
    np.testing.assert_allclose(s[:kept], np.linalg.svd((left @ right).numpy(), compute_uv=False)[:kept], atol=1e-12)
    torch.testing.assert_close(u @ torch.diag(s) @ vh, left @ right, rtol=0, atol=1e-12)
    torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.T, torch.eye(vh.shape[0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_ranks_of_known_spectra() -> None:
    s = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0])
    assert linalg.stable_rank(s) == 4
    assert linalg.effective_rank(s) == pytest.approx(4)
    assert linalg.rank_for_energy(s, 0.75) == 3 and linalg.rank_for_energy(s) == 4
    s = torch.tensor([3.0, 1.0])  # energies 9 and 1; shares of the sum 3/4 and 1/4
    assert linalg.stable_rank(s) == pytest.approx(10 / 9)
    assert linalg.effective_rank(s) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert linalg.rank_for_energy(s, 0.9) == 1 and linalg.rank_for_energy(s, 0.91) == 2
    assert linalg.rank_for_energy(s, 0.9, energy=100.0) is None and linalg.stable_rank(s, energy=90.0) == 10
    zero = torch.zeros(3)
    assert (linalg.stable_rank(zero), linalg.effective_rank(zero), linalg.rank_for_energy(zero)) == (0, 0, 0)
    low = normal(40, 3, dtype=torch.float32) @ normal(3, 30, seed=1, dtype=torch.float32)
    assert linalg.numerical_rank(torch.linalg.svdvals(low), (40, 30)) == 3
    assert linalg.numerical_rank(zero, (3, 3)) == 0


@pytest.mark.parametrize("sizes", [(30, 17), (17, 30), (1, 9), (40, 9000)])
def test_singular_values_are_the_svds(sizes) -> None:
    x = normal(*sizes, dtype=torch.float32)
    np.testing.assert_allclose(linalg.singular_values(x), np.linalg.svd(x.double().numpy(), compute_uv=False), rtol=1e-9)
    low = normal(40, 3, dtype=torch.float32) @ normal(3, 30, seed=1, dtype=torch.float32)
    assert linalg.numerical_rank(linalg.singular_values(low), (40, 30)) == 3
    assert float(linalg.singular_values(0 * x).max()) == 0


def test_top_components_of_a_large_matrix() -> None:
    left, right = torch.linalg.qr(normal(300, 200)).Q, torch.linalg.qr(normal(250, 200, seed=1)).Q
    s = 1 / torch.arange(1, 201, dtype=torch.float64)
    top = linalg.svd_top(left @ torch.diag(s) @ right.T, 8)
    torch.testing.assert_close(top.S, s[:8], rtol=1e-6, atol=0)
    assert float((top.U.T @ left[:, :8]).abs().diagonal().min()) > 1 - 1e-6
    assert float((top.Vh @ right[:, :8]).abs().diagonal().min()) > 1 - 1e-6
    again = linalg.svd_top(left @ torch.diag(s) @ right.T, 8)
    assert torch.equal(again.S, top.S)
    flat = linalg.svd_top(normal(60, 20), 8)  # small: exact
    torch.testing.assert_close(flat.S, torch.linalg.svdvals(normal(60, 20))[:8])
    assert flat.U.shape == (60, 8) and flat.Vh.shape == (8, 20)
    assert bool((torch.linalg.svdvals(normal(400, 300))[:8] + 1e-9 >= linalg.svd_top(normal(400, 300), 8).S).all())


def test_norms_and_moments() -> None:
    x, y = normal(700, 30, dtype=torch.float32), normal(700, 30, seed=1, dtype=torch.float32)
    assert linalg.norm(x) == pytest.approx(float(np.linalg.norm(x.double().numpy())), rel=1e-12)
    assert linalg.cosine(x, y) == pytest.approx(float(torch.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0)), rel=1e-9)
    assert linalg.cosine(x, x) == 1 and linalg.cosine(x, -x) == -1 and linalg.cosine(x, 0 * x) == 0 and linalg.cosine(0 * x, 0 * x) == 1
    assert linalg.kurtosis(x) == pytest.approx(scipy.stats.kurtosis(x.double().numpy(), axis=None, fisher=False), rel=1e-9)
    assert math.isnan(linalg.kurtosis(torch.ones(5)))
    assert linalg.relative_norm(3 * x, x) == pytest.approx(3) and linalg.relative_norm(0 * x, 0 * x) == 0
    assert linalg.relative_norm(x, 0 * x) == math.inf
    tiny = torch.full((10,), 1e-30)  # its square is 0 in float32
    assert linalg.norm(tiny) == pytest.approx(math.sqrt(10) * 1e-30, rel=1e-6)


def test_energy_inside_a_subspace() -> None:
    basis = torch.linalg.qr(normal(50, 5)).Q
    assert linalg.energy_inside(basis @ normal(5, 20), basis) == pytest.approx(1)
    other = normal(50, 20)
    outside = other - basis @ (basis.T @ other)
    assert linalg.energy_inside(outside, basis) == pytest.approx(0, abs=1e-20)
    assert linalg.energy_inside(normal(50, 4000, seed=3), basis) == pytest.approx(5 / 50, rel=0.05)  # chance
    assert math.isnan(linalg.energy_inside(0 * other, basis))


# ---- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ulp_is_the_distance_to_the_next_number(dtype) -> None:
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}[dtype]
    x = (normal(1000) * torch.logspace(-9, 4, 1000).double()).abs().to(dtype)
    following = (x.view(bits) + 1).view(dtype)
    assert torch.equal(linalg.ulp(x, dtype), following.double() - x.double())
    assert float(linalg.ulp(torch.zeros(1), dtype)) == float(torch.ones(1, dtype=bits).view(dtype).double())


@pytest.mark.parametrize(("dtype", "published"), [(torch.bfloat16, 1.7e-3), (torch.float16, 2.1e-4)])
def test_rounding_floor_is_what_rounding_does(dtype, published) -> None:
    x = normal(400, 500)
    measured = linalg.relative_norm(x.to(dtype).double() - x, x)
    assert linalg.rounding_floor(x, dtype) == pytest.approx(measured, rel=0.02)
    assert measured == pytest.approx(published, rel=0.05)
    assert linalg.rounding_floor(x * 37.1, dtype) == pytest.approx(linalg.rounding_floor(x, dtype), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_norm_sums_the_spacings(dtype) -> None:
    x = (normal(3000) * torch.logspace(-12, 4, 3000).double()).float()
    x[::7] = 0
    slow = math.sqrt(float(linalg.ulp(x, dtype).square().sum()) / 12)
    assert linalg.rounding_norm(x, dtype) == pytest.approx(slow, rel=1e-12)
    assert linalg.rounding_norm(x[:1], dtype) == pytest.approx(float(linalg.ulp(x[:1], dtype)) / math.sqrt(12), rel=1e-12)


def test_the_coarser_dtype() -> None:
    assert linalg.coarser(torch.float32, torch.bfloat16) == torch.bfloat16
    assert linalg.coarser(torch.float16, torch.bfloat16) == torch.bfloat16
    assert linalg.coarser(torch.float32, torch.float32) == torch.float32


# ---- intervals


def test_standard_error() -> None:
    x = normal(50, 3)
    np.testing.assert_allclose(stats.standard_error(x), scipy.stats.sem(x.numpy(), axis=0))
    assert math.isnan(float(stats.standard_error([1.0])))
    with pytest.raises(InputError, match="at least one prompt"):
        stats.standard_error([])


def test_bootstrap_is_the_loop_over_resamples() -> None:
    x = normal(23, 2, 3)
    got = stats.bootstrap(x, seed=5, resamples=300)
    draws = torch.randint(23, (300, 23), generator=torch.Generator().manual_seed(5))
    slow = np.stack([x[rows].mean(0).numpy() for rows in draws])
    np.testing.assert_allclose(got.value, x.mean(0))
    np.testing.assert_allclose(got.low, np.quantile(slow, 0.025, axis=0))
    np.testing.assert_allclose(got.high, np.quantile(slow, 0.975, axis=0))
    assert torch.equal(stats.bootstrap(x, seed=5, resamples=300).low, got.low)
    assert not torch.equal(stats.bootstrap(x, seed=6, resamples=300).low, got.low)
    one = stats.bootstrap([3.0])
    assert float(one.value) == 3 and math.isnan(float(one.low))


def test_bootstrap_agrees_with_scipy_and_covers() -> None:
    x = normal(60).numpy()
    theirs = scipy.stats.bootstrap((x,), np.mean, method="percentile", n_resamples=4000, random_state=0).confidence_interval
    ours = stats.bootstrap(x, resamples=4000)
    assert float(ours.low) == pytest.approx(theirs.low, abs=0.02) and float(ours.high) == pytest.approx(theirs.high, abs=0.02)
    many = stats.bootstrap(normal(80, 400, seed=9), resamples=500)  # 400 samples of a mean that is 0
    covered = float(((many.low < 0) & (many.high > 0)).double().mean())
    assert 0.9 < covered < 0.98


def test_ratio_of_means_resamples_pairs() -> None:
    d = normal(40).abs() + 1
    exact = stats.ratio_of_means(d * 0.3, d)
    assert float(exact.value) == pytest.approx(0.3) and float(exact.high - exact.low) < 1e-12  # paired: no noise at all
    n = normal(40, 2, seed=1)
    got = stats.ratio_of_means(n, d, seed=3, resamples=200)
    draws = torch.randint(40, (200, 40), generator=torch.Generator().manual_seed(3))
    slow = np.stack([(n[rows].mean(0) / d[rows].mean()).numpy() for rows in draws])
    np.testing.assert_allclose(got.low, np.quantile(slow, 0.025, axis=0))
    np.testing.assert_allclose(got.value, n.mean(0) / d.mean())
    with pytest.raises(InputError, match=r"\[40, 2\] and \[40, 2\]"):
        stats.ratio_of_means(n, n)
    rare = torch.tensor([1.0, 0, 0, 0])  # a third of the resamples have neither
    some = stats.ratio_of_means(rare * 0.5, rare)
    assert (float(some.low), float(some.high)) == (0.5, 0.5) and not stats.ratio_of_means(n[:, :0], d).value.numel()


def test_changed_takes_one_value_per_prompt() -> None:
    start, goal = normal(30), normal(30, seed=1) + 4
    first, second = start + 0.25 * (goal - start), start + 0.75 * (goal - start)
    one = stats.changed((first, start, goal), (second, start, goal))
    many = stats.changed((first[:, None], start, goal), (second[:, None], start, goal))
    assert float(one.value) == pytest.approx(0.5) and one.low.ndim == 0 and torch.equal(one.low, many.low[0])


def test_recovered() -> None:
    start, goal = normal(30), normal(30, seed=1) + 4
    share = torch.tensor([0.0, 0.25, 1.0])
    patched = start[:, None] + share * (goal - start)[:, None]
    got = stats.recovered(patched, start, goal)
    np.testing.assert_allclose(got.value, share, atol=1e-12)
    assert got.refused is None and bool((got.low <= got.value + 1e-12).all())
    back = stats.recovered(patched.flip(1), goal, start)  # the other direction
    np.testing.assert_allclose(back.value, [0.0, 0.75, 1.0], atol=1e-12)
    flat = stats.recovered(patched, start, start + 0.01 * normal(30, seed=7))
    assert bool(flat.value.isnan().all() and flat.low.isnan().all()) and "within two standard errors" in (flat.refused or "")
    alone = stats.recovered(patched[:1], start[:1], goal[:1])
    assert alone.refused == "one prompt gives no standard error"
    same = stats.recovered(start, start, start)
    assert same.refused is not None and "none (" in str(same)
    with pytest.raises(InputError, match=r"\[30\], \[30\] and \[29, 3\]"):
        stats.recovered(patched[1:], start, goal)


def test_a_ratio_of_means_is_not_a_mean_of_ratios() -> None:
    start, goal = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.001])
    patched = torch.tensor([0.5, 0.5, 0.5, 0.1])
    assert float(stats.recovered(patched, start, goal).value) == pytest.approx(1.6 / 3.001)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (1, 1), (517, 1000)])
def test_wilson_is_scipys(k, n) -> None:
    theirs = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert stats.wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_limits() -> None:
    assert stats.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError, match="11 of 10"):
        stats.wilson(11, 10)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 5), (1, 9), (12, 3), (0, 1), (400, 470)])
def test_mcnemar_is_the_exact_binomial_test(b, c) -> None:
    expected = scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert stats.mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert stats.mcnemar(b, c) == stats.mcnemar(c, b)


def test_paired_change_covers_and_has_a_width_without_flips():
    """Coverage by simulation near and away from the edge; by hand for no flips in 200: +-1.96 sqrt(1) / 202."""
    low, high = stats.paired_change(0, 0, 200)
    assert low == pytest.approx(-1.959964 / 202, rel=1e-5) and high == -low
    assert stats.paired_change(7, 3, 50)[0] == -stats.paired_change(3, 7, 50)[1]
    draws = torch.Generator().manual_seed(0)
    for gain, loss, n in ((0.02, 0.01, 100), (0.2, 0.1, 60), (0.9, 0.0, 80)):
        where = torch.rand(4000, n, generator=draws)
        gained, lost = (where < gain).sum(1).tolist(), ((where >= gain) & (where < gain + loss)).sum(1).tolist()
        ends = [stats.paired_change(a, b, n) for a, b in zip(gained, lost, strict=True)]
        covered = sum(low <= gain - loss <= high for low, high in ends) / len(ends)
        assert covered > 0.93, (gain, loss, n, covered)
    for wrong in ((1, 0, 0), (-1, 0, 5), (3, 3, 5)):
        with pytest.raises(InputError, match="do not fit"):
            stats.paired_change(*wrong)


def test_permutation_is_every_pattern_of_signs() -> None:
    x = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0)).double() + 0.5
    x[:, 0, 1] = 0
    patterns = torch.tensor(list(itertools.product((1.0, -1.0), repeat=7)), dtype=torch.float64)
    t = torch.einsum("sp,pab->sab", patterns, x).abs() / (x.square().sum(0).sqrt() + 1e-300)
    seen = t[0] * (1 - 1e-12)
    got = stats.permutation(x)
    torch.testing.assert_close(got.p, (t >= seen).double().mean(0))
    torch.testing.assert_close(got.adjusted, (t.flatten(1).amax(1)[:, None, None] >= seen).double().mean(0))
    assert got.p[0, 1] == got.adjusted[0, 1] == 1 and (got.adjusted >= got.p).all()
    assert float(stats.permutation(x.square()[:, 2, 0]).p) == 2 / 2**7  # all of one sign


def test_permutation_agrees_with_scipy_and_keeps_its_level() -> None:
    x = torch.randn(30, generator=torch.Generator().manual_seed(1)).double() + 0.35
    theirs = scipy.stats.permutation_test((x.numpy(),), lambda a, axis: a.mean(axis), permutation_type="samples", n_resamples=50_000, rng=0)
    assert float(stats.permutation(x[:, None], resamples=50_000).p) == pytest.approx(theirs.pvalue, abs=0.01)
    # 400 null experiments of 5 cells: each cell is called at 5 % of the time, any of the five at 5 % too after the correction
    null = torch.randn(400, 14, 5, generator=torch.Generator().manual_seed(2)).double()
    found = [stats.permutation(e, resamples=400) for e in null]
    single = float(torch.stack([f.p for f in found]).le(0.05).double().mean())
    family = float(torch.stack([f.adjusted for f in found]).le(0.05).any(1).double().mean())
    assert 0.035 < single < 0.065 and 0.02 < family < 0.085
    assert float(torch.stack([f.p for f in found]).le(0.05).any(1).double().mean()) > 0.15  # without it


def test_permutation_is_the_same_in_pieces(monkeypatch) -> None:
    x = torch.randn(20, 33, generator=torch.Generator().manual_seed(3)).double() + 0.2
    whole = stats.permutation(x)
    monkeypatch.setattr(stats, "_CHUNK", 7 * stats.RESAMPLES)
    pieces = stats.permutation(x)
    assert torch.equal(whole.p, pieces.p) and torch.equal(whole.adjusted, pieces.adjusted)
    assert float(stats.permutation([0.3]).p) == 1


# ---- telling two sets apart


def two_sets(n: int, m: int, shift: float, seed: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, generator=draws).double() + shift, torch.randn(m, generator=draws).double()
    return (x.round(), y.round()) if ties else (x, y)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_scipys_and_sklearns(ties) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    x, y = two_sets(23, 31, 0.7, 0, ties)
    got, labels, scores = float(stats.auc(x, y).value), [1] * 23 + [0] * 31, torch.cat([x, y]).numpy()
    assert got == pytest.approx(float(roc_auc_score(labels, scores)), abs=1e-12)
    assert got == pytest.approx(scipy.stats.mannwhitneyu(x, y).statistic / (23 * 31), abs=1e-12)
    assert float(stats.auc(y, x).value) == pytest.approx(1 - got, abs=1e-12)
    assert float(stats.auc(-x, -y).value) == pytest.approx(1 - got, abs=1e-12)
    curve, (far, tpr, _) = stats.roc(x, y), roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positive, far)
    np.testing.assert_allclose(curve.true_positive, tpr)
    assert float(torch.trapezoid(curve.true_positive, curve.false_positive)) == pytest.approx(got, abs=1e-12)
    for rate in (0.0, 0.05, 0.1, 2 / 31, 0.5):
        assert float(stats.tpr_at(x, y, rate).value) == pytest.approx(tpr[far <= rate + 1e-12].max())


def test_auc_by_hand() -> None:
    # of the six comparisons five are won and one is a tie
    assert float(stats.auc([3.0, 1.0], [0.0, 1.0, 0.5]).value) == pytest.approx(5.5 / 6)
    assert float(stats.auc([1.0, 1.0], [1.0, 1.0]).value) == 0.5
    curve = stats.roc([3.0, 1.0], [0.0, 1.0])
    assert curve.threshold.tolist() == [math.inf, 3, 1, 0]
    assert curve.true_positive.tolist() == [0, 0.5, 1, 1] and curve.false_positive.tolist() == [0, 0, 0.5, 1]
    assert float(stats.tpr_at([3.0, 1.0], [0.0, 1.0], 0.5).value) == 1 and float(stats.tpr_at([3.0, 1.0], [0.0, 1.0]).value) == 0.5
    assert math.isnan(float(stats.auc([1.0], [0.0, 2.0]).low)) and float(stats.auc([1.0], [0.0, 2.0]).value) == 0.5
    for bad in ([], [[1.0]], [math.nan]):
        with pytest.raises(InputError, match="prompt"):
            stats.auc(bad, [1.0])
        with pytest.raises(InputError, match="prompt"):
            stats.tpr_at([1.0], bad)
    with pytest.raises(InputError, match="in .0, 1., but it is 1"):
        stats.tpr_at([1.0], [0.0], 1.0)


def test_intervals_of_auc_are_the_loop_over_resamples() -> None:
    x, y = two_sets(17, 23, 0.8, 1, True)
    got, found = stats.auc(x, y, seed=5, resamples=200), stats.tpr_at(x, y, 0.1, seed=5, resamples=200)
    first, second = (torch.randint(n, (200, n), generator=torch.Generator().manual_seed(s)) for n, s in ((17, 5), (23, 6)))
    pairs = [(x[a], y[b]) for a, b in zip(first, second, strict=True)]
    slow = [float(stats.auc(a, b, resamples=1).value) for a, b in pairs]
    np.testing.assert_allclose([got.low, got.high], np.quantile(slow, [0.025, 0.975]))
    slow = [float(stats.tpr_at(a, b, 0.1, resamples=1).value) for a, b in pairs]
    np.testing.assert_allclose([found.low, found.high], np.quantile(slow, [0.025, 0.975]))


def test_intervals_of_auc_cover_also_where_sets_do_not_overlap() -> None:
    for shift, n, m in ((0.0, 20, 30), (1.0, 24, 24), (3.5, 24, 16)):
        truth = float(torch.special.ndtr(torch.tensor(shift / 2**0.5)))
        ends = [stats.auc(*two_sets(n, m, shift, seed, False), resamples=300) for seed in range(300)]
        covered = sum(bool(e.low - 1e-9 <= truth <= e.high + 1e-9) for e in ends) / len(ends)
        assert covered > 0.9, (shift, covered)
    apart = stats.auc(torch.arange(24) + 100, torch.arange(24))
    assert float(apart.value) == float(apart.high) == 1 and 0.85 < float(apart.low) < 0.95
    wide = stats.auc(torch.arange(3) + 100, torch.arange(3))
    assert float(wide.low) < 0.7
    other = stats.auc(torch.arange(24), torch.arange(24) + 100)
    assert float(other.low) == 0 and float(other.high) == pytest.approx(1 - float(apart.low))
    assert float(stats.tpr_at([2.0] * 24, [1.0] * 24).low) == pytest.approx(stats.wilson(24, 24)[0])
