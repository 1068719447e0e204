"""The study of memory in flat directions: its choices, its retentions by hand, its learnt baseline, and a quick run of all of it."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "studies"))

import balanced_subnet as learnt  # noqa: E402
import memorisation as study  # noqa: E402
import memorisation_tables as tables  # noqa: E402
from memorisation_tables import EDIT_DISTANCE, RANKS, TEXT, TOKENS, UNCUT, MemorisationResult  # noqa: E402

import interp  # noqa: E402
from interp.errors import InputError  # noqa: E402
from interp.models import HookedModel  # noqa: E402
from interp.models.batch import Batch  # noqa: E402
from interp.models.curvature import eigen, staircase  # noqa: E402
from interp.models.curvature_edits import curvature_edit, curvature_edits  # noqa: E402
from interp.models.factors import Factors  # noqa: E402
from interp.sites import Site  # noqa: E402
from interp.sweeps.language import block_losses  # noqa: E402
from interp.tasks import reciting  # noqa: E402


@pytest.fixture(scope="module")
def base() -> HookedModel:
    return HookedModel.load(study.BASE)


@pytest.fixture(scope="module")
def at() -> study.Measures:
    return study.measures(16)


def setting(mass: float, method: str = "curvature") -> study.Setting:
    return study.Setting(method, (0,), ("W_in",), mass)


def tried(mass: float, strict: float, matched: float, ratio: float) -> study.Tried:
    return study.Tried(setting(mass), strict, matched, ratio)


# ---- choosing


def test_a_canary_is_chosen_on_or_held_out_and_texts_differ(at) -> None:
    dev, held = set(at.dev.prompts), set(at.held.ids)
    assert not dev & held and len(dev) == 8 and len(held) == 16
    whole: Any = interp.task("recitation").generate(at.base, 200, 0)
    assert {t for half in whole.split(seed=0) for t in half.ids} == set(whole.ids)
    assert not set(map(tuple, at.dev_text.rows())) & set(map(tuple, at.text.rows()))
    mixture = set(study.mixture(1))
    canaries = {t[:60] for t in whole.texts}
    prose = {t[:40] for t in interp.task("plain_text(source=prose)").generate(at.base, 68).texts}  # type: ignore[union-attr]
    assert len(mixture) > 100 and not {t[:60] for t in mixture} & canaries and not {t[:40] for t in mixture} & prose
    asked = {t for _, prompts in at.tasks.values() for t in getattr(prompts, "clean", prompts).texts}
    assert sum(any(t.startswith(a) for a in asked if len(a) > 80) for t in mixture) == 0


def test_the_strongest_setting_is_within_the_limit() -> None:
    some = [tried(0.6, 0, 0.0, 1.26), tried(0.8, 0, 0.02, 1.25), tried(0.9, 0, 0.02, 1.1), tried(0.95, 0, 0.3, 1.0)]
    assert study.strongest(some) is some[2] and study.strongest(some[:1]) is None is study.strongest([])


def test_the_mildest_setting_suppresses() -> None:
    some = [tried(0.6, 0, 0.0, 1.26), tried(0.8, 0, 0.1, 1.05), tried(0.9, 0.11, 0.1, 1.01), tried(0.95, 0.1, 0.11, 1.0)]
    assert study.mildest(some) is some[1] and study.mildest(some[2:]) is None and study.mildest(some[:1]) is None


def test_a_setting_tried_is_recitation_and_perplexity_under_its_edit(at, base, tmp_path) -> None:
    sizes = {site: at.model.weight(site).shape for site in map(Site.parse, ("L0.W_in", "L2.W_in"))}
    draw = torch.Generator().manual_seed(0)

    def square(n: int) -> torch.Tensor:
        x = torch.randn(2 * n, n, generator=draw, dtype=torch.float64) * torch.logspace(0, -3, n, dtype=torch.float64)
        return x.T @ x

    folder = tmp_path / "factors"
    factors = Factors.write(folder, {s: (square(a), square(b)) for s, (a, b) in sizes.items()}, n=9, fingerprint=base.fingerprint)
    edit = curvature_edit(base, factors, layers=2, modules="W_in", mass=0.9)
    cutter = study.Cutter(at.model, factors, (0.5, 0.9), 0)
    cutter.cuts["curvature"] = study.curvature_cuts(at.model, factors, layers=(0, 2), modules=("W_in",), masses=(0.5, 0.9))
    where = study.Setting("curvature", (2,), ("W_in",), 0.9)
    mine = cutter(where)
    assert [e.digest for e in cutter.draws(where)] == [mine.digest]
    e = eigen(factors, "L2.W_in")
    left = int(staircase(e.lam, e.mu, 0.9).sum())
    total = sizes[Site.parse("L2.W_in")].numel()
    assert cutter.removed(where) == f"{total - left:,} of {total:,} pairs removed"
    cutter.cuts["random pairs"] = study.curvature_cuts(
        at.model, factors, layers=(0, 2), modules=("W_in",), masses=(0.5, 0.9), control="random"
    )
    drawn = cutter.draws(study.Setting("random pairs", (2,), ("W_in",), 0.9))
    again = [curvature_edit(base, factors, layers=2, modules="W_in", mass=0.9, control="random", seed=i) for i in range(5)]
    assert len({e.weights[0].delta.sum().item() for e in drawn}) == 5
    assert all(torch.equal(x.weights[0].delta, y.weights[0].delta) for x, y in zip(drawn, again, strict=True))
    (a,), (b,) = mine.weights, edit.weights
    assert a.site == b.site and torch.equal(a.delta, b.delta)
    found = at.tried(setting(0.9), mine)
    with base.edited(edit):
        written = base.generate([list(p) for p in at.dev.prompts], 30, stop=())
        losses, counts = block_losses(base, at.dev_text), at.dev_text.lengths - 1
    right = [[x == y for x, y in zip(w, r, strict=False)] for w, r in zip(written, at.dev.rests, strict=True)]
    matched = [len(row) if all(row) else row.index(False) for row in right]
    lengths = [len(r) for r in at.dev.rests]
    assert found.strict == sum(m == n for m, n in zip(matched, lengths, strict=True)) / 8
    assert found.matched == pytest.approx(sum(m / n for m, n in zip(matched, lengths, strict=True)) / 8, abs=1e-9)
    before = block_losses(base, at.dev_text)
    assert found.ratio == pytest.approx(float((((losses - before) * counts).sum() / counts.sum()).exp()), rel=1e-6)
    assert at.tried(setting(1), interp.Edit(())) == study.Tried(setting(1), 1.0, 1.0, 1.0)


def test_factors_of_other_texts_are_refused(base, tmp_path) -> None:
    a, b = base.weight("L0.W_in").shape
    eye = {Site("W_in", 0): (torch.eye(a), torch.eye(b))}
    some = study.kfac_factors(base, ["The cat sat."], tmp_path / "f", modules=("W_gate", "W_in", "W_out"))
    assert study.collected(base, ["The cat sat."], tmp_path / "f").digest == some.digest
    with pytest.raises(InputError, match=r"f holds factors of other texts \(1 of them\) than these 1; give another --out"):
        study.collected(base, ["The dog sat."], tmp_path / "f")
    assert Factors.open(tmp_path / "f").digest == some.digest
    Factors.write(tmp_path / "g", eye, n=9, fingerprint="other", meta={"prompts": 1})
    with pytest.raises(InputError, match="belong to"):
        study.collected(base, ["The"], tmp_path / "g")


def test_the_notebook_finds_its_factors_again(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "notebooks" / "07_memorisation_in_flat_directions.ipynb").read_text(encoding="utf-8"))["cells"]
    wanted = ("interp.HookedModel.load(", "kfac_factors(base")
    code = [c for c in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code") if any(w in c for w in wanted)][:2]
    assert wanted[0] in code[0] and wanted[1] in code[1]
    found = []
    for _ in range(2):
        names: dict[str, Any] = {}
        for cell in code:
            exec(cell, names)
        found.append(names["factors"])
    assert found[0].digest == found[1].digest and found[0].path == found[1].path


# ---- what it is about


def test_what_is_learnt_by_heart_falls_before_clean_loss_does(at, base, tmp_path) -> None:
    """Canaries that base recites, from a ladder of cuts: flat directions, as much curvature at the sharp end, as many random pairs."""
    where: dict[str, Any] = {"layers": 0, "modules": ("W_gate", "W_in")}
    factors = study.kfac_factors(base, study.mixture(1), tmp_path / "f", modules=where["modules"], layers=[0])
    before, counts = block_losses(base, at.text), at.text.lengths - 1
    canaries = reciting.passages(base, at.held)

    def recited() -> float:
        return float((reciting.forced(base, canaries) == canaries.lengths).double().mean())

    def ladder(*masses: float, control: Any = None, seed: int = 0) -> dict[float, tuple[float, float]]:
        """Mass -> share recited, and what the loss of clean text grows by."""
        found = {}
        for mass, edit in zip(masses, curvature_edits(base, factors, **where, masses=masses, control=control, seed=seed), strict=True):
            with base.edited(edit):
                grown = ((block_losses(base, at.text) - before) * counts).sum() / counts.sum()
                found[mass] = (recited(), float(grown))
        return found

    assert recited() == 1
    flat, mild = ladder(0.95, 0.98, 0.995, 0.998), (0.995, 0.998)
    sharp, random = ladder(*mild, control="top_removed"), [ladder(*mild, control="random", seed=seed) for seed in (0, 1)]
    for mass in mild:
        assert flat[mass][0] == 0 and flat[mass][1] < 0.02, "nothing is recited, while the loss is still what it was"
        assert sharp[mass][0] == 1, "the same share of the curvature, taken away at the sharp end, leaves recitation"
        assert all(cut[mass][1] > max(0.03, 5 * flat[mass][1]) for cut in random), "as many pairs at random cost several times more"
    assert flat[0.98][1] > 0.05 and flat[0.95][1] > 0.3, "the loss rises later"


# ---- the table


def made() -> MemorisationResult:
    """Two cuts; one row per kind, and three prompts or four."""
    rows = {study.HELD: [1, 1, 1, 1], study.HELD_LOOSE: [1, 1, 1, 1], study.HEARD: [1, 1, 0, 1], study.DEV: [1, 1, 1, 1]}
    rows |= {"arithmetic: a": [1, 1, 1, 0], "closed book: c": [1, 1, 1, 1], "open book: o": [1, 0, 1, 1], "logic: l": [1, 1, 1, 1]}
    rows |= {TEXT: [1.0, 2.0, 3.0], TOKENS: [10, 20, 40], RANKS: [1.0] * 3, EDIT_DISTANCE: [0.0] * 4}
    after = {study.HELD: [0, 0, 0, 0], study.HELD_LOOSE: [0, 0, 1, 0], study.HEARD: [1, 0, 0, 0], study.DEV: [0, 0, 0, 1]}
    after |= {"arithmetic: a": [1, 0, 0, 0], "closed book: c": [1, 0, 1, 0], "open book: o": [1, 0, 1, 1], "logic: l": [1, 1, 1, 1]}
    after |= {TEXT: [1.1, 2.0, 3.2], TOKENS: [10, 20, 40], RANKS: [0.9, 0.8, 0.7], EDIT_DISTANCE: [0.9, 0.8, 0.2, 0.9]}
    values = {f"{cut} | {k}": torch.tensor(v, dtype=torch.float64) for cut, some in ((UNCUT, rows), ("x", after)) for k, v in some.items()}
    return MemorisationResult(values=values, settings={"x": "a setting"}, seed=0)


def test_retention_is_a_share_of_base() -> None:
    found = made()
    assert float(found.retention("x", "arithmetic: a").value) == pytest.approx(1 / 3)
    assert float(found.retention("x", "closed book: c").value) == 0.5
    prose = found.retention("x", study.HEARD)
    assert float(prose.value) == pytest.approx(1 / 3) and prose.low <= prose.value <= prose.high
    none, everything = found.retention("x", study.HELD), found.retention("x", "logic: l")
    assert (float(none.value), float(none.low), float(none.high)) == (0, 0, pytest.approx(0.4437, abs=0.01))  # Beta(0.5, 4.5)
    assert (float(everything.value), float(everything.low), float(everything.high)) == (1, pytest.approx(0.5563, abs=0.01), 1)
    some = found.retention("x", "closed book: c")  # Beta(2.5, 2.5)
    assert (float(some.low), float(some.high)) == (pytest.approx(0.1228, abs=0.01), pytest.approx(0.8772, abs=0.01))
    ratio = found.ratio("x")
    assert float(ratio.value) == pytest.approx(math.exp((10 * 0.1 + 40 * 0.2) / 70), rel=1e-9)  # of all tokens, as it is chosen by
    gap = found.gap("x")
    assert float(gap.value) == pytest.approx((1 + 1) / 2 - (1 / 3 + 1 / 2) / 2) and gap.low < gap.value < gap.high
    assert float(found.gap(UNCUT).value) == 0


def one_cut(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> MemorisationResult:
    values = {f"{cut} | {row}": x.double() for cut, some in ((UNCUT, before), ("x", after)) for row, x in some.items()}
    return MemorisationResult(values=values, settings={"x": "s"}, seed=0)


def test_intervals_have_width_where_nothing_flips() -> None:
    known = torch.arange(24) < 16
    for before in (known, torch.ones(24)):
        rows = {"closed book: c": before, "open book: o": before}
        found = one_cut(rows, rows)
        e, gap = found.retention("x", "open book: o"), found.gap("x")
        assert float(e.value) == 1 and 0.75 < float(e.low) < 0.95 and 1 <= float(e.high) < 1.3
        assert float(gap.value) == 0 and -0.4 < float(gap.low) < -0.05 and 0.05 < float(gap.high) < 0.4
    unknown = one_cut({"logic: l": torch.zeros(4)}, {"logic: l": torch.ones(4)}).retention("x", "logic: l")
    assert bool(unknown.low.isnan()) and bool(unknown.high.isnan())


@pytest.mark.parametrize(("share", "kept"), [(1.0, 0.97), (0.67, 0.97), (0.67, 0.6), (1.0, 0.0)])
def test_intervals_of_retentions_hold_the_truth(share: float, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base is right with chance ``share``; the cut keeps ``kept`` of that, and is right by chance in a tenth of what base does not know."""
    monkeypatch.setattr(tables, "DRAWS", 2000)
    draw, held, n, times = torch.Generator().manual_seed(1), 0, 24, 300
    for _ in range(times):
        before = torch.rand(n, generator=draw) < share
        after = torch.rand(n, generator=draw) < torch.where(before, kept, 0.1)
        e = one_cut({"logic: l": before}, {"logic: l": after}).retention("x", "logic: l")
        held += bool(e.low <= kept + 0.1 * (1 - share) / share <= e.high)
    assert held >= 0.9 * times


def test_the_coverage_that_is_told_is_the_coverage() -> None:
    """Summed over all outcomes of 24 prompts that base gets right, for every share that is kept."""
    n, kept = 24, torch.arange(0.001, 1, 0.001, dtype=torch.float64)
    cases = [one_cut({"logic: l": torch.ones(n)}, {"logic: l": torch.arange(n) < k}).retention("x", "logic: l") for k in range(n + 1)]
    inside = torch.stack([(e.low <= kept) & (kept <= e.high) for e in cases])
    k = torch.arange(n + 1, dtype=torch.float64)[:, None]
    held = (torch.distributions.Binomial(n, kept[None]).log_prob(k).exp() * inside).sum(0)
    told = " ".join((MemorisationResult.draws.__doc__ or "").split())
    assert (
        f"in {float(held.min()):.0%}".replace("%", " %") in told
        and f"holds the truth in {float(held.mean()):.0%}".replace("%", " %") in told
    )
    assert min(abs(float(kept[held.argmin()]) - s) for s in (0.1, 0.9)) < 0.01 and "s = 0.9" in told


@pytest.mark.parametrize(("n", "kept"), [(24, 0.99), (24, 0.97), (24, 0.9), (120, 0.97)])
def test_intervals_of_the_gap_hold_zero(n: int, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "DRAWS", 2000)
    draw, held, times = torch.Generator().manual_seed(2), 0, 200
    rows = ("arithmetic: a", "closed book: f", "open book: b", "open book: c", "open book: d", "logic: l", "logic: i")
    for _ in range(times):
        after = {row: torch.rand(n, generator=draw) < kept for row in rows}
        gap = one_cut({row: torch.ones(n) for row in rows}, after).gap("x")
        held += bool(gap.low <= 0 <= gap.high) and bool(gap.low < gap.high)
    assert held >= 0.9 * times


def test_the_tables_say_what_was_measured() -> None:
    found = made()
    frame = found.to_frame()
    row = frame[frame.row == "arithmetic: a"].iloc[0]
    assert (row["base"], row["after"], row["value"]) == (0.75, 0.25, pytest.approx(1 / 3))
    text = tables.printed(found)
    assert "0.50 [" in text and "1.14 [" in text and text.splitlines()[-1].endswith("a setting")
    assert len(found.to_frame(per="prompt")) == 2 * (8 * 4 + 3 + 3 + 3 + 4)
    assert "leaves 0 [0," in found.summary() and list(found.figures()) == ["x"]


def test_the_answer_follows_from_the_numbers() -> None:
    found, table = study.Found(), made()
    names = ("curvature, strongest", "sharp end removed, where the strongest is", "random pairs, strongest")
    values = {f"{UNCUT} | {row}": table.of(UNCUT, row) for row in (k.partition(" | ")[2] for k in table.values if k.startswith("x | "))}
    values |= {f"{cut} | {k.partition(' | ')[2]}": v for cut in names for k, v in table.values.items() if k.startswith("x | ")}
    values[f"{names[1]} | {study.HELD}"] = torch.ones(4, dtype=torch.float64)
    values[f"{names[2]} | {TEXT}"] = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    found.chosen = dict.fromkeys(names, "a setting")
    found.table = MemorisationResult(values=values, settings=found.chosen, seed=0)
    lines = study.verdict(found)
    assert lines[0].startswith("Reached, and by no control, strongest setting (a setting): 0 [0, 0.4")
    assert "sharp end removed 1.00 at 1.137;" in lines[1] and "random pairs 0.00 at 2.718;" in lines[1]
    assert "no setting within the limit suppresses: sharp end removed, singular values, rectangular" in lines[1]
    assert "closed-book facts fall more" in lines[2] or "beyond noise" in lines[2]
    assert lines[3] == "No setting suppresses recitation within the limit (mildest)."
    values[f"{names[0]} | {study.HELD}"] = torch.tensor([0, 1, 0, 0], dtype=torch.float64)
    assert study.verdict(found)[0].startswith("Not reached, nor by any control, strongest")
    values[f"{names[0]} | {study.HELD}"] = torch.zeros(4, dtype=torch.float64)
    values[f"{names[2]} | {TEXT}"] = table.of("x", TEXT)
    assert study.verdict(found)[0].startswith("Reached, and by controls too (random pairs), strongest")
    assert "random pairs 0.00 at 1.137 (does it too)" in study.verdict(found)[1]


def test_a_random_control_is_as_many_draws_and_the_learnt_one_has_its_mark() -> None:
    found, table = study.Found(), made()
    name = "random pairs, strongest"
    cuts = ["curvature, strongest", *(f"{name}{tables.DRAW}{i}" for i in (1, 2, 3)), study.SUBNET]
    values = {k: v for k, v in table.values.items() if k.startswith(UNCUT)}
    values |= {f"{cut} | {k.partition(' | ')[2]}": v for cut in cuts for k, v in table.values.items() if k.startswith("x | ")}
    values[f"{cuts[2]} | {study.HELD}"] = torch.tensor([1, 1, 0, 0], dtype=torch.float64)
    values[f"{cuts[3]} | {TEXT}"] = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    found.chosen, found.sizes = dict.fromkeys(cuts, "a setting"), "Chosen on 60."
    found.table = MemorisationResult(values=values, settings=found.chosen, seed=0)
    lines = study.verdict(found)
    assert lines[0].startswith("Reached, and by controls too (random pairs (1 of 3 draws), balanced subnet), strongest setting")
    spread = "random pairs 0.17 at 1.664 (mean of 3 draws, 0.00 to 0.50 at 1.137 to 2.718; 1 of them do it too)"
    assert spread in lines[1]
    assert "times the perplexity (does it too)." in next(line for line in lines if line.startswith("The learnt baseline"))
    assert "Chosen on 60." in lines
    assert list(found.table.families()) == [cuts[0], name, study.SUBNET] == list(found.table.figures())
    row = found.table.strongest().query("row == @study.HELD and cut == @name").iloc[0]
    assert (row["value"], row["low"], row["high"], row["after"]) == (pytest.approx(1 / 6), 0, 0.5, pytest.approx(1 / 6))
    assert row["what"] == "retention, mean of 3 draws, least and most"
    assert set(found.table.to_frame()["cut"]) == set(cuts) and "of 3 random draws their mean" in tables.printed(found.table)
    assert len(found.table.figures()[name].data) == 3


def test_a_model_has_another_name_for_a_while(base) -> None:
    with pytest.raises(ZeroDivisionError), study._called(base, "base with x"):
        assert base.name == "base with x"
        _ = 1 / 0
    assert base.name == "base"


# ---- the learnt baseline


def test_a_mask_zeroes_its_share_and_lets_gradients_through() -> None:
    score = torch.tensor([[0.1, -0.5, 0.02], [-0.3, 0.9, -0.04]], requires_grad=True)
    found = learnt.mask(score, 1 / 3)
    assert torch.equal(found.detach(), torch.tensor([[1.0, 1, 0], [1, 1, 0]]))
    (found * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert torch.equal(score.grad, torch.arange(6.0).reshape(2, 3) * score.detach().sign())
    assert bool((learnt.mask(score, 0.0) == 1).all())


def test_the_learnt_baseline_forgets_what_it_is_shown(base) -> None:
    prompts: Any = interp.task("recitation").generate(base, 6, 0)
    forget = [tuple(base.tokens(t + r)) for t, r in zip(prompts.texts, prompts.targets, strict=True)]
    keep = list(interp.task("plain_text").generate(base, 6, 9).ids)  # type: ignore[union-attr]
    edit = learnt.balanced_subnet(base, forget, keep, ratio=0.05, epochs=8)
    none = learnt.balanced_subnet(base, forget, keep, ratio=0.05, epochs=0)
    assert len(edit.weights) == 12
    for change in edit.weights:
        w = base.weight(change.site)
        gone = change.delta != 0
        assert torch.equal(change.delta[gone], -w[gone]) and int(gone.sum()) == round(0.05 * w.numel())

    def losses(rows: Any, change: Any) -> float:
        with base.edited(change):
            return float(block_losses(base, Batch.of(rows)).mean())

    assert losses(forget, edit) > losses(forget, none) + 0.5
    assert losses(keep, edit) < losses(keep, none) + 0.5


# ---- all of it


@pytest.mark.full
def test_a_quick_run_writes_the_page(tmp_path, capsys) -> None:
    assert study.main(["--quick", "--n", "16", "--out", str(tmp_path)]) == 0
    told, page = capsys.readouterr().out, (tmp_path / "memorisation.html").read_text(encoding="utf-8")
    for what in ("strict recitation of held-out canaries", "Controls, share of held-out recitation left", "The learnt baseline"):
        assert what in told and what in page, what
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert len(set(headings)) == len(headings) and sum(h.startswith("Recitation: ") for h in headings) >= 2
    assert "Chosen on 8 canaries and 8 texts; tested on 16 other canaries" in told and " pairs removed)" in told
    assert "gate+in of 0" in told and "perplexity ratio" in told
    with pytest.raises(SystemExit):
        study.main(["--n", "3"])
    assert "--n is 3, expected 16 or more" in capsys.readouterr().err
