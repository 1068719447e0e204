"""Activation patching of one model and of a pair; the patches themselves are tested with the sweeps."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_checkpoints import tiny
from torch import Tensor

from interp import store
from interp.analyses.activation_patching import ActivationPatchingResult, activation_patching
from interp.edits import ActivationChange, Edit
from interp.errors import InputError
from interp.metrics import Metric, Targets
from interp.models import HookedModel, ModelPair, restart
from interp.prompts import PromptPairs, Prompts
from interp.sites import Site
from interp.stats import changed, permutation, recovered
from interp.sweeps import plain, saved

# 6 pairs, 3 layers, 4 heads (2 key/value heads), 24 = d_model; positions S, P, END
CLEAN = [[3, 4, 5, 6, 7, 8], [10, 11, 12, 29], [13, 14, 15, 16, 17], [18, 19, 20, 21, 22], [24, 25, 26, 27, 28, 1, 2], [7, 9, 11, 13]]
LONGER = [
    [3, 4, 9, 5, 6, 7, 8],
    [12, 11, 12, 30, 29],
    [13, 14, 15, 16, 16, 17],
    [18, 1, 20, 21, 22],
    [24, 25, 26, 27, 28, 1, 2],
    [8, 9, 11, 13],
]
LEVEL = [[3, 4, 5, 6, 7], [10, 11, 12, 29, 8], [13, 14, 15, 16, 17], [18, 19, 20, 21, 22], [24, 25, 26, 27, 28], [7, 9, 11, 13, 15]]
LEVEL_TOO = [[3, 4, 9, 6, 7], [12, 11, 12, 29, 8], [13, 1, 15, 16, 17], [18, 19, 20, 2, 22], [24, 5, 26, 27, 28], [8, 9, 11, 13, 15]]


def prompts(rows: list[list[int]], **positions: tuple[tuple[int, ...], ...]) -> Prompts:
    ids = tuple(tuple(r) for r in rows)
    return Prompts(tuple(" ".join(map(str, r)) for r in rows), ids, positions=positions)


def toward(model: HookedModel, clean: Prompts, corrupt: Prompts) -> PromptPairs:
    """Pairs whose answer is what the model prefers on the clean prompt, so that there is something to recover."""
    gap = model.logits(clean, at="END") - model.logits(corrupt, at="END")
    answers, distractors = tuple(gap.argmax(-1).tolist()), tuple(gap.argmin(-1).tolist())
    return PromptPairs(replace(clean, answers=answers, distractors=distractors), corrupt)


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny("llama", seed=2)


@pytest.fixture(scope="module")
def model(base: Any) -> HookedModel:
    return HookedModel.load(base)


@pytest.fixture(scope="module")
def pair(base: Any, model: HookedModel) -> ModelPair:
    """The tuned model does not hear head 1 of the last layer."""
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[2].self_attn.o_proj.weight[:, 8:16] = 0  # d_head is 8
    return ModelPair.load(model, HookedModel.load(tuned))


@pytest.fixture(scope="module")
def unequal(model: HookedModel) -> PromptPairs:
    words = ((3, 4), (0, 1), (1, 2), (1, 3), (2, 4), (0, 2))
    clean = prompts(CLEAN, S=tuple((i,) for i in (1, 0, 2, 3, 1, 2)), P=tuple((i,) for i in (0, 0, 1, 1, 0, 0)), words=words)
    corrupt = prompts(LONGER, S=tuple((i,) for i in (2, 3, 3, 3, 1, 2)), P=tuple((i,) for i in (0, 1, 1, 1, 0, 0)), words=words)
    return toward(model, clean, corrupt)


@pytest.fixture(scope="module")
def level(model: HookedModel) -> PromptPairs:
    return toward(model, prompts(LEVEL), prompts(LEVEL_TOO))


@pytest.fixture(scope="module")
def single(model: HookedModel, unequal: PromptPairs) -> ActivationPatchingResult:
    return activation_patching(model, unequal, sites=("resid_pre", "resid_post", "z"))


@pytest.fixture(scope="module")
def both(pair: ModelPair, level: PromptPairs) -> ActivationPatchingResult:
    return activation_patching(pair, level, sites=("z", "resid_pre", "mlp_out", "k"), seed=3)


def said(figure: Any) -> str:
    """All text of a figure on one line."""
    return figure.to_json().replace("\\u003cbr\\u003e", " ").replace("<br>", " ")


def test_shapes_and_named_positions_in_reading_order(single: ActivationPatchingResult) -> None:
    assert single.patched["resid_pre"].shape == (1, 3, 3, 6) and single.patched["z"].shape == (1, 3, 4, 6)
    assert single.positions == ("P", "S", "END") and single.left_out == ("words",) and not single.by_token
    assert single.heads_at == "END"  # the prompts of a pair differ in length
    assert (
        single.sides == ("model",)
        and str(single.sites("z")[1][3]) == "L1H3.z@END"
        and str(single.sites("resid_pre")[2][1]) == "L2.resid_pre@S"
    )


def test_the_end_of_the_stream_recovers_everything(single: ActivationPatchingResult) -> None:
    share = single.recovered("resid_post")
    assert float(share.value[2, 2]) == pytest.approx(1, abs=1e-5)
    assert float(share.low[2, 2]) == pytest.approx(1, abs=1e-5) and float(share.high[2, 2]) == pytest.approx(1, abs=1e-5)
    assert torch.equal(single.effect("resid_post")[2, :2], torch.zeros(2, 6))  # the last layer moves END only
    torch.testing.assert_close(single.patched["resid_post"][0, 2, 2], single.clean[0], atol=1e-6, rtol=0)


def test_recovered_is_a_ratio_of_means(single: ActivationPatchingResult) -> None:
    start, goal, patched = single.corrupt[0].double(), single.clean[0].double(), single.patched["z"][0, 1, 2].double()
    hand = (patched.mean() - start.mean()) / (goal.mean() - start.mean())
    assert float(single.recovered("z").value[1, 2]) == pytest.approx(float(hand))


def test_noise_runs_the_other_way(model: HookedModel, unequal: PromptPairs, single: ActivationPatchingResult) -> None:
    noise = activation_patching(model, unequal, sites=("resid_post",), direction="noise")
    assert torch.equal(noise.clean, single.clean) and torch.equal(noise.start, single.goal)
    torch.testing.assert_close(noise.patched["resid_post"][0, 2, 2], single.corrupt[0], atol=1e-6, rtol=0)
    assert float(noise.recovered("resid_post").value[2, 2]) == pytest.approx(1, abs=1e-5)
    assert "noise: corrupt activations into the clean run" in noise.summary()


def test_a_head_that_is_not_heard_matters_in_the_base_only(both: ActivationPatchingResult) -> None:
    assert both.sides == ("base", "tuned")
    assert both.effect("z", "tuned")[2, 1].abs().max() <= 4 * both.floor[1]
    assert both.effect("z", "base")[2, 1].abs().mean() > 100 * both.floor[0]
    change = both.change("z").value
    assert float(change[2, 1]) == pytest.approx(-float(both.recovered("z", "base").value[2, 1]), abs=1e-6)
    assert both.patched["k"].shape == (2, 3, 2, 6)  # key/value heads


def test_every_token_when_only_end_is_named(both: ActivationPatchingResult, level: PromptPairs) -> None:
    assert both.by_token and len(both.positions) == 5 and both.heads_at == "all"
    assert both.positions[0] == "(0)"  # the prompts differ there
    assert both.patched["resid_pre"].shape == (2, 3, 5, 6)
    ends = both.effect("resid_pre", "tuned")[0]  # layer 0: an input token that is the same in both prompts
    same = torch.tensor([[a == b for a, b in zip(x, y, strict=True)] for x, y in zip(LEVEL, LEVEL_TOO, strict=True)]).T
    assert torch.equal(ends == 0, same)


def test_a_model_of_a_pair_is_patched_as_alone(pair: ModelPair, both: ActivationPatchingResult, level: PromptPairs) -> None:
    alone = activation_patching(pair.tuned, level, sites=("mlp_out",))
    torch.testing.assert_close(alone.patched["mlp_out"][0], both.patched["mlp_out"][1], atol=2e-6, rtol=0)  # in waves of other sizes


def test_how_exact_it_is_is_in_the_result_and_its_sentence(single: ActivationPatchingResult, both: ActivationPatchingResult) -> None:
    assert single.checked.tolist() == [8] and both.checked.tolist() == [8, 8] and single.notes == both.notes == ()
    for result in (single, both):
        assert (result.deviation <= 4 * result.floor).all() and (result.floor < 1e-5).all() and (result.floor > 0).all()
        assert (
            f"{float(result.deviation.max()):.1g}, rounding moves logit_diff by up to {float(result.floor.max()):.1g}" in result.summary()
        )
    assert "; 8 runs checked the plain way are off by at most " in single.summary()


def test_what_is_not_accelerated_is_said(tmp_path: Any, pair: ModelPair, level: PromptPairs) -> None:
    off = Edit((ActivationChange(Site("z", 0, 1), "scale", torch.tensor(0.5)),))
    settings: Any = {"sites": ("resid_pre",), "positions": ("END",)}
    with pair.tuned.edited(off):
        plainly = activation_patching(pair, level, **settings)
        alone = activation_patching(pair.tuned, level, **settings)
    assert plainly.checked.tolist() == [8, 0]
    assert plainly.notes == ("tuned: the plain way, one run per patch: activations are being changed while it runs",)
    assert alone.notes == ("the plain way, one run per patch: activations are being changed while it runs",)
    assert alone.notes[0] in alone.summary() and torch.equal(alone.patched["resid_pre"][0], plainly.patched["resid_pre"][1])
    assert ActivationPatchingResult.load(plainly.save(tmp_path / "r")).notes == plainly.notes


def test_every_component(level: PromptPairs) -> None:
    """What is patched where, against one plain run per patch."""
    model = HookedModel.load(tiny("gpt2", seed=2))
    pairs = toward(model, level.clean, level.corrupt)
    sites = ("z", "q", "k", "v", "pattern", "attn_out", "mlp_out", "mlp_post", "resid_pre", "resid_mid", "resid_post")
    for heads_at, positions in (("all", ()), ("3", ("END",))):
        found = activation_patching(model, pairs, sites=sites, heads_at=heads_at, positions=positions)
        assert found.notes == () and set(found.patched) == set(sites)
        patches = [s for c in sites for row in found.sites(c) for s in row]
        reader = Metric.parse("logit_diff").reader(pairs)
        into, source = model.batch(pairs.corrupt), model.batch(pairs.clean)
        want = plain(model, into, patches, (model, source), reader)
        got = torch.cat([found.patched[c][0].flatten(0, 1) for c in sites])
        torch.testing.assert_close(got, want, atol=4 * float(found.floor), rtol=0)


def test_metrics(model: HookedModel, level: PromptPairs) -> None:
    kl = activation_patching(model, level, sites=("resid_post",), metric="kl", positions=("END",))
    assert torch.allclose(kl.clean, torch.zeros(6), atol=1e-6) and kl.corrupt.min() > 0
    assert kl.positions == ("END",) and kl.metric == "kl" and kl.unit == "KL(clean || run), nats"


def test_a_metric_of_the_users(model: HookedModel, level: PromptPairs) -> None:
    def answer(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        return logits.gather(1, targets.answers[:, None])[:, 0]  # type: ignore[index]

    own = activation_patching(model, level, sites=("resid_post",), metric=answer, positions=("END",))  # type: ignore[arg-type]
    assert own.metric == "user function" and not own.meta.replayable
    logits = model.logits(level.clean, at="END")
    assert torch.allclose(own.clean[0], logits[torch.arange(6), list(level.answers or ())])


def test_changed_is_the_difference_with_paired_resamples() -> None:
    draws = torch.Generator().manual_seed(0)
    start, goal = torch.zeros(40), torch.ones(40) + 0.1 * torch.randn(40, generator=draws)
    patched = torch.randn(40, 2, 3, generator=draws)
    same = changed((patched, start, goal), (patched, start, goal))
    assert torch.equal(same.value, torch.zeros(2, 3)) and torch.equal(same.low, same.high)  # one resample for both
    moved = changed((patched, start, goal), (patched + 0.5 * goal[:, None, None], start, goal))
    assert torch.allclose(moved.value, torch.full((2, 3), 0.5, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(moved.low, moved.value, atol=1e-6) and torch.allclose(moved.high, moved.value, atol=1e-6)
    alone = changed((start[:, None].repeat(1, 2), start, goal), (patched[:, 0, :2], start, goal), seed=5)
    wanted = recovered(patched[:, 0, :2], start, goal, seed=5)
    assert torch.allclose(alone.value, wanted.value) and torch.allclose(alone.low, wanted.low) and torch.allclose(alone.high, wanted.high)


def test_table(single: ActivationPatchingResult, both: ActivationPatchingResult) -> None:
    table = single.to_frame()
    assert len(table) == 3 * 3 + 3 * 3 + 3 * 4 and set(table.side) == {"model"}
    row = table[table.site == "L2.resid_post@END"].iloc[0]
    assert row.recovered == pytest.approx(1, abs=1e-5) and row.effect == pytest.approx(
        float((single.clean - single.corrupt).mean()), rel=1e-5
    )
    assert (table.low <= table.recovered + 1e-9).all() and (table.recovered <= table.high + 1e-9).all()
    assert len(single.to_frame(per="prompt")) == 6 * len(table)
    two = both.to_frame()
    assert set(two.side) == {"base", "tuned", "tuned - base"} and len(two) == 3 * 3 * (4 + 5 + 5 + 2)
    by = two[two.site == "L1H2.z"].set_index("side").recovered
    assert by["tuned - base"] == pytest.approx(by["tuned"] - by["base"])
    with pytest.raises(InputError, match="per must be 'prompt'"):
        single.to_frame(per="head")


def test_strongest_cells_and_their_tests(single: ActivationPatchingResult, both: ActivationPatchingResult) -> None:
    table = single.strongest(5)
    every = single.to_frame()
    every = every[~every.component.isin(["resid_pre", "resid_mid", "resid_post"])]
    wanted = every.reindex(every.recovered.abs().sort_values(ascending=False, kind="stable").index)
    assert table.site.tolist() == wanted.site.tolist()[:5] and table.recovered.tolist() == wanted.recovered.tolist()[:5]
    effects = torch.cat([single.effect(c).flatten(0, 1) for c in single.patched]).T
    test = permutation(effects, seed=single.draw_seed)
    assert sorted(single.to_frame().p) == pytest.approx(sorted(test.p.tolist()))
    assert sorted(single.to_frame().p_adjusted) == pytest.approx(sorted(test.adjusted.tolist()))
    row = table.iloc[0]
    effect = single.effect("z" if ".z" in row.site else row.site.split(".")[1].split("@")[0])
    own = next(e for e in effect.flatten(0, 1) if float(e.mean()) == pytest.approx(row.effect, rel=1e-6))
    assert row.p == pytest.approx(float(permutation(own).p)) and row.p <= row.p_adjusted
    changes = both.strongest(3)
    assert set(changes.side) == {"tuned - base"} and list(changes.columns[:2]) == ["side", "site"]
    parts = both.to_frame().query("side == 'tuned - base' and component != 'resid_pre'")
    assert changes.site[0] == parts.set_index("site").recovered.abs().idxmax()
    # exchanging the models of every prompt: what is tested is the difference of the shares
    gaps = (both.goal - both.start).mean(-1)
    shares = [both.effect("z", side)[1, 2] / gaps[i] for i, side in enumerate(both.sides)]
    assert float(both.tests("tuned - base")["z"].p[1, 2]) == pytest.approx(float(permutation(shares[1] - shares[0]).p))


def test_a_killed_run_goes_on(model: HookedModel, unequal: PromptPairs, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "EVERY", 0.0)
    want = activation_patching(model, unequal)
    real, calls = restart.Restart.__call__, []

    def dies(self: Any, wave: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, wave)

    monkeypatch.setattr(restart.Restart, "__call__", dies)
    run = store.cached(activation_patching, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(model, unequal)
    assert len(list((tmp_path / ".unfinished").iterdir())) == 1
    calls[:] = [1] * 50
    got = run(model, unequal)
    again = len(calls) - 50
    assert all(torch.equal(got.patched[c], want.patched[c]) for c in want.patched)
    activation_patching(model, unequal)
    assert len(calls) - 50 - again == again + 4 and not (tmp_path / ".unfinished").exists()


def test_summary(single: ActivationPatchingResult, both: ActivationPatchingResult) -> None:
    values = single.recovered("z").value
    layer, head = divmod(int(values.abs().argmax()), 4)
    assert single.summary().startswith(f"L{layer}H{head}.z@END recovers {float(values[layer, head]):.2f} [")
    assert "n = 6 prompt pairs" in single.summary() and "logit_diff" in single.summary()
    change = both.change("z").value
    layer, head = divmod(int(change.abs().argmax()), 4)
    assert both.summary().startswith(f"L{layer}H{head}.z changed the most: ") and " in tuned and " in both.summary()
    only = replace(single, patched={"resid_post": single.patched["resid_post"]})
    assert only.summary().startswith("L") and "the first layer there with half" in only.summary()
    assert "\n" not in single.summary() + both.summary()


def test_figures(single: ActivationPatchingResult, both: ActivationPatchingResult) -> None:
    assert list(both.figures())[:3] == ["z, tuned - base", "z, base", "z, tuned"] and len(both.figures()) == 4 * 3
    maps = both.figures()
    assert (maps["z, base"].data[0].zmin, maps["z, base"].data[0].zmax) == (maps["z, tuned"].data[0].zmin, maps["z, tuned"].data[0].zmax)
    assert maps["z, base"].data[0].zmin == -maps["z, base"].data[0].zmax
    assert maps["resid_pre, base"].layout.xaxis.title.text == "position" and maps["z, base"].layout.yaxis.title.text == "layer"
    assert "share of logit_diff recovered" in said(maps["z, base"])
    values = torch.as_tensor(single.figures()["z, model"].data[0].z)
    there = ~values.isnan()
    assert torch.allclose(values[there], single.recovered("z").value[there], atol=1e-6)
    assert single.plot().to_json() == next(iter(single.figures().values())).to_json()
    grey = single.figures()["resid_post, model"].data[0].z
    assert torch.as_tensor(grey)[2, :2].isnan().all()  # patches that cannot reach END are under the floor


def test_token_labels_are_escaped(both: ActivationPatchingResult) -> None:
    evil = replace(both, positions=("<b>", "<b>", "a & b", "$x$", "\n"))
    text = evil.figures()["resid_pre, base"].to_json()
    assert "<b>" not in text.replace("\\u003c", "<").replace("</b>", "") and len(evil.figures()["resid_pre, base"].data[0].z[0]) == 5


def test_round_trip(tmp_path: Any, both: ActivationPatchingResult) -> None:
    again = ActivationPatchingResult.load(both.save(tmp_path / "r"))
    assert again.summary() == both.summary() and torch.equal(again.patched["z"], both.patched["z"]) and again.labels == both.labels
    assert again.to_frame().equals(both.to_frame())
    assert both.meta.settings["sites"] == ["z", "resid_pre", "mlp_out", "k"] and both.meta.seed == 3


def test_a_model_in_which_nothing_can_be_recovered(both: ActivationPatchingResult) -> None:
    """Base at chance: its map is in units of the metric, the change too, and the sentence says so."""
    torch.manual_seed(0)
    noise = torch.randn(6)
    chance = replace(both, clean=torch.stack([noise, both.clean[1]]), corrupt=torch.stack([noise.flip(0), both.corrupt[1]]))
    assert chance.resolved.tolist() == [False, True]
    assert chance.recovered("z", "base").value.isnan().all() and chance.change("z").value.isnan().all()
    assert not chance.recovered("z", "tuned").value.isnan().any()
    maps = chance.figures()
    assert "not normalised" in said(maps["z, base"])
    assert "not normalised" in said(maps["z, tuned - base"])
    assert "share of logit_diff recovered" in said(maps["z, tuned"])
    assert "difference 0 +- 1.1, too close to normalise; " in chance.summary() and " in tuned, the most of all z" in chance.summary()


def test_one_pair_is_not_normalised(model: HookedModel, level: PromptPairs) -> None:
    one = activation_patching(model, level[0], sites=("z",))
    assert one.summary().startswith("L") and " changes logit_diff by " in one.summary() and "n = 1 prompt pairs" in one.summary()
    assert one.to_frame().recovered.isna().all() and not one.to_frame().effect.isna().any()
    assert "not normalised" in said(one.plot())


def test_refusals(model: HookedModel, unequal: PromptPairs, level: PromptPairs) -> None:
    def run(prompts: Any = unequal, **settings: Any) -> None:
        activation_patching(model, prompts, **{"sites": ("resid_pre",), **settings})

    with pytest.raises(InputError, match="no site to patch named 'resid_pred'; nearest: resid_pre"):
        run(sites=("resid_pred",))
    with pytest.raises(InputError, match="several different ones, but it is z, z"):
        run(sites=("z", "z"))
    with pytest.raises(InputError, match="denoise or noise, but it is 'denoising'"):
        run(direction="denoising")
    with pytest.raises(InputError, match="no metric named 'logitdiff'"):
        run(metric="logitdiff")
    with pytest.raises(InputError, match="positions=all needs prompts of one length, but these have 4 to 7 tokens"):
        run(positions=("all",))
    with pytest.raises(InputError, match="position 'words' names 2 tokens"):
        run(positions=("words",))
    with pytest.raises(InputError, match="no position 'S9'"):
        run(positions=("S9",))
    with pytest.raises(InputError, match="L0.z sets every position"):
        run(sites=("resid_pre", "z"), heads_at="all")
    with pytest.raises(InputError, match="clean and corrupt prompts are the same"):
        run(PromptPairs(level.clean, replace(level.clean, answers=None)))
    with pytest.raises(InputError, match=r"needs clean and corrupt prompts \(PromptPairs\), not Prompts"):
        run(unequal.clean)
    with pytest.raises(InputError, match="one distractor token"):
        run(PromptPairs(replace(level.clean, distractors=None), level.corrupt))
    with pytest.raises(InputError, match="no patched component named 'v'"):
        activation_patching(model, level, sites=("z",)).recovered("v")
