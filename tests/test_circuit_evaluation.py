"""Circuits that were written into the weights, in the models whose they are: whole, broken, redundant, and those of somebody else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_checkpoints import tiny

from interp import progress, store
from interp.analyses.circuit_evaluation import CircuitEvaluationResult, circuit_evaluation
from interp.circuit import Circuit
from interp.errors import InputError
from interp.metrics import Metric
from interp.models import HookedModel, ModelPair
from interp.organisms import HAND_BUILT, hand_built
from interp.organisms.handmade import HandBuilt
from interp.prompts import PromptPairs, Prompts
from interp.sites import Site, parse_sites
from interp.stats import ratio_of_means
from interp.sweeps import knockouts as search
from interp.sweeps import saved
from interp.sweeps.ablation import Ablations, Knockout

LIGHT: dict[str, Any] = {"completeness_random": 3, "greedy": 1, "greedy_steps": 2, "greedy_candidates": 3, "random_circuits": 3}
BARE: dict[str, Any] = {"completeness_random": 0, "greedy": 0, "random_circuits": 0}


@cache
def built(name: str) -> HandBuilt:
    return hand_built(name)


@cache
def pairs(name: str, n: int | None = None, seed: int = 5) -> PromptPairs:
    """12 of one form, otherwise enough for means over several of each length."""
    return built(name).task.generate(built(name).model, n or {"ioi": 12, "induction": 40}.get(name, 20), seed)


def by_length(name: str) -> str | None:
    return "length" if len({len(ids) for ids in pairs(name).clean.ids}) > 1 else None


@cache
def evaluated(name: str, ablation: Any = "mean", minimality: Any = "role") -> CircuitEvaluationResult:
    by = by_length(name) if ablation == "mean" else None
    settings = LIGHT | {"ablation": ablation, "by": by, "mlps": name == "majority", "minimality": minimality}
    return circuit_evaluation(built(name).model, pairs(name), built(name).circuit, **settings)


def effects(result: CircuitEvaluationResult) -> dict[str, float]:
    """Node -> what goes with it, as a share of F(M)."""
    share = ratio_of_means(result.effect().T, result._mean(result.full[0])[result.judged]).value
    return dict(zip(result.labels["node"], share.tolist(), strict=True))


@pytest.mark.parametrize("ablation", ["mean", pytest.param("resample", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", HAND_BUILT)
def test_the_planted_circuit_is_the_model_and_others_are_nothing(name: str, ablation: str) -> None:
    result = evaluated(name, ablation)
    assert float(result.faithfulness().value) == pytest.approx(1, abs=1e-3)
    assert float(result.ratio().value) == pytest.approx(1, abs=1e-3)
    assert float((result.circuit - result.full).abs().max()) < 1e-3 * float(result.full.mean())
    assert abs(float(result.difference().value)) < 1e-3 * float(result.full.mean())
    assert result.random.shape[1] == 3 and bool((result.random_faithfulness().abs() < 1e-3).all())
    assert float(result.gap().double().mean(-1).abs().max()) < 1e-3 * float(result.full.mean())  # complete, whatever K is
    assert int(result.checked) == 4 and float(result.deviation.max()) <= 4 * float(result.floor.max()) < 1e-4


@pytest.mark.parametrize("ablation", ["mean", pytest.param("resample", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", HAND_BUILT)
def test_every_planted_node_is_needed_given_the_right_others(name: str, ablation: str) -> None:
    settings = BARE | {"ablation": ablation, "by": by_length(name) if ablation == "mean" else None, "mlps": name == "majority"}
    many = 48 if name == "shared_head" else None  # a head that serves half of the prompts
    result = circuit_evaluation(built(name).model, pairs(name, many), built(name).circuit, minimality="greedy", **settings)
    assert bool(result.needed().all()) and all(abs(share) > 0.2 for share in effects(result).values())
    assert len(result.labels["node"]) == sum(node.component != "embed" for node in built(name).circuit.nodes)


def test_a_backup_shows_only_with_its_mover_gone() -> None:
    mover, backup = "L1H2.z@END", "L3H1.z@END"
    for ablation, first in (("mean", 0.55), ("zero", 0.1)):
        role = evaluated("backup_head", ablation)
        assert role.given == (("", ""),) and all(abs(x) < first for x in effects(role).values())
        greedy = evaluated("backup_head", ablation, "greedy")
        assert greedy.given == ((backup, mover),) and all(x < -0.7 for x in effects(greedy).values())
    alone = evaluated("backup_head", "zero")
    assert float(alone.after.mean()) > 0.9 * float(alone.full.mean())  # either one does nearly all


def test_one_head_at_two_positions_does_not_hide_itself() -> None:
    """The head of a role that stands at two positions is in no K of its own: what reads it at one may hang on the other."""
    node = "L0H4.z@READ"
    role, greedy = evaluated("shared_head"), evaluated("shared_head", minimality="greedy")
    assert dict(zip(role.labels["node"], role.given[0], strict=True))[node] == "" and effects(role)[node] < -0.2
    assert role.needed()[role.labels["node"].index(node)] and effects(greedy)[node] < -0.7
    nodes = tuple(parse_sites(["L0H4.z@READ", "L0H4.z@END", "L1H1.z@END", "L2H5.z"]))
    roles = dict.fromkeys(nodes[:3], "one")
    assert search.own_class(nodes, roles) == [(nodes[2],), (nodes[2],), nodes[:2], ()]


@pytest.mark.parametrize("name", HAND_BUILT)
def test_every_planted_node_is_needed_by_default(name: str) -> None:
    """Also of the parts of a model that does two tasks. Of a mixture of tasks each head serves a part of the prompts."""
    made = built(name)
    for of, circuit in ((made.task, made.circuit), *made.parts):
        asked = of.generate(made.model, 24, 11)
        result = circuit_evaluation(made.model, asked, circuit, mlps=name == "majority", **BARE)
        assert bool(result.needed().all()), dict(zip(result.labels["node"], effects(result).items(), strict=True))


def test_what_is_the_same_in_all_prompts_may_not_become_zero() -> None:
    """A head outside the circuit marks the second clause: any mean of it is what it is, but zero is not."""
    name = "ioi"
    assert abs(float(evaluated(name, "zero").faithfulness().value)) < 0.5
    whole = built(name).circuit | Circuit.of(built(name).circuit.model, {"mark": "L0H2.z"})
    result = circuit_evaluation(built(name).model, pairs(name), whole, ablation="zero", **BARE)
    assert float(result.ratio().value) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["ioi", "backup_head"])
def test_idle_heads_in_a_circuit_are_not_needed(name: str) -> None:
    idle = [s.at("END") for heads in (built(name).bystanders, built(name).decoys) for s in heads.sites()][:3]
    fat = built(name).circuit | Circuit(built(name).circuit.model, tuple(idle), roles=dict.fromkeys(idle, "idle"))
    for minimality in ("role", "greedy"):
        result = circuit_evaluation(built(name).model, pairs(name), fat, by=by_length(name), minimality=minimality, **BARE)
        where = [result.labels["node"].index(str(s)) for s in idle]
        assert not result.needed()[where].any() and max(abs(effects(result)[str(s)]) for s in idle) < 0.01
        assert float(result.faithfulness().value) == pytest.approx(1, abs=1e-3)
    assert set(result.order[-3:]) == set(map(str, idle))


@pytest.mark.full
def test_without_any_node_faithfulness_falls() -> None:
    name = "ioi"
    heads = [n for n in built(name).circuit.nodes if n.component == "z"]
    for node in heads:
        broken = replace(built(name).circuit, nodes=tuple(n for n in heads if n != node), edges=(), roles={}, scores={})
        result = circuit_evaluation(built(name).model, pairs(name), broken, **BARE)
        assert float(result.faithfulness().value) < 0.95, node


def test_numbers_are_those_of_single_knockouts() -> None:
    """Everything in the result, each by itself."""
    model, prompts, circuit = built("shared_head").model, pairs("shared_head"), built("shared_head").circuit
    result = evaluated("shared_head")
    nodes = tuple(n for n in circuit.nodes if n.component == "z")

    def of(texts: str) -> set[Site]:
        return set(parse_sites(texts.split(", "))) if texts else set()

    def metric(knockout: Knockout) -> torch.Tensor:
        return Ablations(model, prompts, Metric.parse("logit_diff").reader(prompts))([knockout])[0]

    def same(found: torch.Tensor, knockout: Knockout) -> None:
        torch.testing.assert_close(found, metric(knockout), atol=2e-5, rtol=0)

    assert set(result.labels["subset"][:3]) == {"previous", "behind", "before"} and len(result.labels["subset"]) == 3 + 3 + 1
    for i, texts in enumerate(result.subsets[0]):
        same(result.circuit_without[0, i], Knockout.all_but(set(nodes) - of(texts)))
        same(result.model_without[0, i], Knockout.of(of(texts)))
    for i, node in enumerate(nodes):
        given = of(result.given[0][i])
        assert node not in given and {circuit.roles[n] for n in given} <= {circuit.roles[node]}
        same(result.before[0, i], Knockout.all_but(set(nodes) - given))
        same(result.after[0, i], Knockout.all_but(set(nodes) - given - {node}))
    for k, size in enumerate(result.sizes):
        same(result.curve[0, k], Knockout.all_but(parse_sites(result.order[:size])))
    assert result.sizes == (0, 1, 2, 3, 4) and torch.equal(result.curve[0, -1], result.circuit[0])
    assert torch.equal(result.curve[0, 0], result.empty[0])
    drawn = search.other_circuits(tuple(parse_sites(result.order)), circuit.nodes, model.shape, 3, seed=0)
    for d, chain in enumerate(drawn):
        same(result.random[0, d, 2], Knockout.all_but(chain[:2]))


def test_the_order_is_that_of_scores_where_there_are_scores() -> None:
    name = "ioi"
    circuit = built(name).circuit
    heads = [n for n in circuit.nodes if n.component == "z"]
    scored = replace(circuit, scores={n: (-1) ** i * float(i) for i, n in enumerate(heads)})
    result = circuit_evaluation(built(name).model, pairs(name), scored, **BARE)
    assert result.order == tuple(map(str, reversed(heads))) and result.ordered_by == "score"
    plain = evaluated(name)
    size = dict(zip(plain.labels["node"], plain.effect().mean(-1).abs().tolist(), strict=True))
    assert [size[n] for n in plain.order] == sorted(size.values(), reverse=True) and plain.ordered_by == "how much they matter"


def test_random_circuits_have_as_many_heads_at_each_position() -> None:
    circuit, shape = built("ioi").circuit, built("ioi").model.shape
    order = tuple(n for n in circuit.nodes if n.component == "z")[::-1]
    drawn = search.other_circuits(order, circuit.nodes, shape, 50, seed=1)
    assert len(set(drawn)) > 45
    for chain in drawn:
        assert [n.position for n in chain] == [n.position for n in order] and len(set(chain)) == 4 and not set(chain) & set(order)
    assert {n.layer for c in drawn for n in c} == {0, 1, 2, 3} and {n.head for c in drawn for n in c} == {0, 1, 2, 3, 4, 5}
    assert search.other_circuits(order, circuit.nodes, shape, 3, seed=1) == drawn[:3]
    crowded = tuple(Site("z", layer, head, "END") for layer in range(4) for head in range(6))[:13]
    assert search.other_circuits(crowded, crowded, shape, 3, seed=1) == []
    split = (*crowded[:9], *(s.at("S2") for s in crowded[:9]))  # 15 others at either position are enough for 9
    assert len(search.other_circuits(split, split, shape, 2, seed=1)) == 2
    everywhere = tuple(s.at(None) for s in crowded[:12])
    for chain in search.other_circuits((order[0],), everywhere, shape, 20, seed=1):
        assert not {n.at(None) for n in chain} & set(everywhere)
    mixed = (Site("z", 0, 0), Site("z", 0, 1), Site("z", 0, 2, "END"), Site("z", 0, 3, "END"), Site("z", 1, 0, "S2"))
    seen: set[Site] = set()
    for chain in search.other_circuits(mixed, mixed, shape, 200, seed=1):
        assert [n.position for n in chain] == [n.position for n in mixed] and len({n.at(None) for n in chain[:4]}) == 4
        assert not {n.at(None) for n in chain[:2]} & {n.at(None) for n in mixed} and not {n.at(None) for n in chain} & set(mixed[:2])
        assert chain[4].at(None) not in chain[:2] and not set(chain) & set(mixed)
        seen |= set(chain)
    assert Site("z", 1, 0, "END") in seen and Site("z", 0, 2, "S2") in seen and Site("z", 0, 2) not in seen
    both = (Site("z", 0, 0, "END"), Site("z", 0, 0, "S2"))
    there = search.other_circuits(both, both, shape, 99, seed=1, unread={"S2"})
    assert {n.layer for c in there for n in c[:1]} == {0, 1, 2, 3} and {n.layer for c in there for n in c[1:]} == {0, 1, 2}
    full = (*(Site("z", layer, head) for layer in range(2) for head in range(6)), *crowded[12:13])
    assert search.other_circuits(full, full, shape, 1, seed=1) == []  # 11 heads are left for 12
    assert search.sizes_of(3) == (0, 1, 2, 3) and search.sizes_of(100, 4) == (0, 25, 50, 75, 100) and len(search.sizes_of(77)) == 21


def test_a_greedy_search_finds_what_a_circuit_lacks() -> None:
    """Without its backup the circuit falls to nothing where the model does not, once the mover is gone."""
    name, mover = "backup_head", "L1H2.z@END"
    lacking = Circuit.of(built(name).circuit.model, {"mover": mover, "idle": ["L0H1.z@END", "L2H3.z@END", "L4H2.z@END"]})
    settings = LIGHT | {"completeness_random": 0, "greedy": 3, "greedy_candidates": 4}
    result = circuit_evaluation(built(name).model, pairs(name), lacking, by="length", **settings)
    assert all(texts.split(", ")[0] == mover for texts in result.subsets[0][-3:])
    assert float(result.gap()[-1].mean()) < -2 and "greedy" in result.summary() or "mover" in result.summary()
    assert result.to_frame().query("name == 'mover'").share.item() < -0.4


def test_minimality_by_search_is_judged_on_other_prompts() -> None:
    result = evaluated("ioi", minimality="greedy")
    assert result.effect().shape == (4, 6) and torch.equal(result.effect(), (result.after - result.before)[0, :, 1::2])
    assert evaluated("ioi").effect().shape == (4, 12)
    # What the contexts that judge give cannot change the choice, whatever it is; what the others give can.
    nodes, draws = search.live(built("ioi").circuit, False), torch.Generator().manual_seed(0)
    for given in (pairs("ioi"), pairs("ioi")[[i for i in range(9) for _ in range(3)]]):
        runs = ablations("ioi", given)
        chosen = search.telling(runs, nodes, [()] * 4, 2, 3, 0)
        known, kept = dict(runs._known), runs.group % 2 == 0
        for choosing, same in ((False, True), (True, False)):
            noise = {k: torch.where(kept != choosing, x, 50 * torch.randn(x.shape, generator=draws)) for k, x in known.items()}
            runs._known = noise
            found = search.telling(runs, nodes, [()] * 4, 2, 3, 0)
            assert any(chosen) and (found == chosen) is same


def ablations(name: str, prompts: Prompts | PromptPairs) -> Ablations:
    return Ablations(built(name).model, prompts, Metric.parse("logit_diff").reader(prompts))


def test_copies_of_prompts_are_no_more_prompts() -> None:
    """Everything but its n is as if each had come once: p values, intervals, the choice of K."""
    name = "ioi"
    once = pairs(name)[list(range(9))]
    thrice = once[[i for i in range(9) for _ in range(3)]]
    for minimality in ("role", "greedy"):
        settings = LIGHT | {"minimality": minimality}
        one, many = (circuit_evaluation(built(name).model, p, built(name).circuit, **settings) for p in (once, thrice))
        assert (one.n, many.n) == ("9 prompts", "9 contexts of 27 prompts") and "n = 9 contexts of 27 prompts" in many.summary()
        assert one.given == many.given and one.subsets == many.subsets and one.order == many.order
        first, second = one.to_frame(), many.to_frame()
        noise = first.difference.abs() < 1e-3  # where p says which way rounding went
        first.loc[noise, ["p", "p_adjusted"]] = second.loc[noise, ["p", "p_adjusted"]] = 1
        assert noise.sum() < len(noise) / 2
        numbers = first.select_dtypes("number").columns
        assert second[numbers].to_numpy() == pytest.approx(first[numbers].to_numpy(), abs=1e-4)
        assert torch.equal(one.needed(), many.needed()) and one.effect().shape == many.effect().shape
        for of in (one.difference, one.ratio, one.faithfulness):
            copy = getattr(many, of.__name__)()
            assert [float(x) for x in (copy.low, copy.high)] == pytest.approx([float(of().low), float(of().high)], abs=1e-5)
        torch.testing.assert_close(many.random_faithfulness(), one.random_faithfulness(), atol=1e-5, rtol=0)
        assert all("9 contexts of 27 prompts" in f.layout.title.text.replace("<br>", " ") for f in many.figures().values())
    assert many.full.shape == (1, 27) and len(many.to_frame(per="prompt")) == 3 * len(one.to_frame(per="prompt"))


def test_a_context_counts_once_however_many_prompts_it_has() -> None:
    """By hand: means of means."""
    name = "ioi"
    lopsided = pairs(name)[[0, 1, 1, 1, 2, 3, 3, 4, 5]]
    result = circuit_evaluation(
        built(name).model, lopsided, replace(built(name).circuit, nodes=built(name).circuit.nodes[:3], edges=(), roles={}), **BARE
    )
    gap = (result.circuit - result.full)[0].tolist()
    want = [gap[0], sum(gap[1:4]) / 3, gap[4], sum(gap[5:7]) / 2, gap[7], gap[8]]
    assert float(result.difference().value) == pytest.approx(sum(want) / 6, abs=1e-5)
    assert result.group.tolist() == [0, 1, 1, 1, 2, 3, 3, 4, 5]


def test_prompts_that_nothing_stands_in_for_are_left_out() -> None:
    name = "backup_head"
    some = pairs(name, 10)
    lengths = list(map(len, some.clean.ids))
    alike = [[j for j in range(10) if lengths[j] == lengths[i] and some.contexts[j] != some.contexts[i]] for i in range(10)]
    kept = [i for i in range(10) if alike[i]]
    assert 0 < 10 - len(kept) < 6
    result = circuit_evaluation(built(name).model, some, built(name).circuit, by="length", **BARE)
    assert result.asked.tolist() == kept and len(result.group) == len(kept)
    assert f"{10 - len(kept)} of 10 prompts left out: no other context is like theirs" in result.summary()
    assert sorted(set(result.to_frame(per="prompt").prompt)) == kept
    alone = circuit_evaluation(built(name).model, some[kept], built(name).circuit, by="length", **BARE)
    assert torch.equal(alone.full, result.full) and alone.to_frame().equals(result.to_frame())
    zero = circuit_evaluation(built(name).model, some, built(name).circuit, ablation="zero", **BARE)
    assert len(zero.asked) == 10


def test_what_stands_in_tells_nothing_of_the_answer() -> None:
    """With a mean that held the flipped partner, few prompts gave a large negative F of nothing."""
    for n in (6, 12, 48):
        result = circuit_evaluation(built("ioi").model, pairs("ioi", n), built("ioi").circuit, **BARE)
        assert abs(float(result.empty.double().mean())) < 0.1 * float(result.full.mean())


def test_mlps_run_free_unless_asked_for() -> None:
    free = circuit_evaluation(built("majority").model, pairs("majority"), built("majority").circuit, by=by_length("majority"), **BARE)
    assert free.labels["node"] == ("L0H1.z@STOP", "L2H2.z@END") and "L1.mlp_out@STOP" in free.notes[-1]
    held = evaluated("majority")
    assert set(held.labels["node"]) == {"L0H1.z@STOP", "L2H2.z@END", "L1.mlp_out@STOP"}
    heads_only = Circuit.of(built("majority").circuit.model, {"count": "L0H1.z@STOP", "carry": "L2H2.z@END"})
    lacking = circuit_evaluation(built("majority").model, pairs("majority"), heads_only, by=by_length("majority"), mlps=True, **BARE)
    assert float(lacking.faithfulness().value) < 0.1 < 0.9 < float(free.faithfulness().value)


def test_two_models_at_once() -> None:
    model, prompts, circuit = built("ioi").model, pairs("ioi"), built("ioi").circuit
    lame = HookedModel.load(hand_built("ioi").model.wrapped.source, tokenizer=model.tokenizer)
    with torch.no_grad():
        lame.wrapped.source.get_parameter("model.layers.3.self_attn.o_proj.weight").mul_(0.5)
    result = circuit_evaluation(ModelPair.load(model, lame), prompts, circuit, **LIGHT)
    alone = evaluated("ioi")
    assert result.sides == ("base", "tuned") and torch.equal(result.full[0], alone.full[0])
    torch.testing.assert_close(result.circuit[0], alone.circuit[0], atol=1e-5, rtol=0)
    assert float(result.full[1].mean()) < 0.9 * float(result.full[0].mean()) and result.order == alone.order
    assert result.ordered_by == "how much they matter in base" and float(result.change().value) == pytest.approx(0, abs=2e-3)
    assert set(result.strongest().side) == {"base", "tuned"} and "faithfulness changed by" in result.summary()
    assert {t.name for f in result.figures().values() for t in f.data if t.name} >= {"base", "tuned", "random, base", "roles, tuned"}
    with pytest.raises(InputError, match="there is no model 'other'"):
        result.ratio("other")


def test_tables_and_figures() -> None:
    result = evaluated("ioi")
    frame = result.to_frame()
    assert dict(frame.kind.value_counts()) == {"faithfulness": 2, "curve": 5, "random": 3, "completeness": 3 + 3 + 1, "minimality": 4}
    assert frame.difference.to_numpy() == pytest.approx((frame.value - frame.against).to_numpy(), abs=1e-12)
    assert frame.share.to_numpy() == pytest.approx((frame.difference / result.full.double().mean().item()).to_numpy(), abs=1e-9)
    whole = frame.iloc[0]
    assert whole["name"] == "circuit" and whole.nodes == 4 and whole.value == pytest.approx(float(result.circuit.double().mean()))
    per = result.to_frame(per="prompt")
    assert len(per) == 12 * len(frame)
    assert per[per.kind == "minimality"].value.to_numpy() == pytest.approx(result.after.flatten().numpy())
    top = result.strongest(3)
    assert list(top.columns) == ["node", "role", "without", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted"]
    assert len(top) == 3 and top.effect.abs().is_monotonic_decreasing and set(top.p_adjusted < 0.05) == {True}
    assert list(result.figures()) == ["faithfulness", "completeness", "minimality"]
    lines = {t.name: t for t in result.plot().data if t.name}
    assert list(lines["circuit"].y)[0] == pytest.approx(0, abs=1e-6) and list(lines["circuit"].y)[-1] == pytest.approx(1, abs=1e-3)
    assert "faithfulness 1.00 [1.00, 1.00], random circuits" in result.summary() and "4 of its nodes needed" in result.summary()
    with pytest.raises(InputError, match="per must be"):
        result.to_frame(per="side")
    bare = Circuit.of(built("ioi").circuit.model, {}, ()) | replace(built("ioi").circuit, roles={})
    short = circuit_evaluation(built("ioi").model, pairs("ioi"), bare, **BARE)
    assert list(short.figures()) == ["faithfulness", "minimality"] and short.summary() and len(short.to_frame()) == 2 + 5 + 4
    assert short.given == (("",) * 4,) and short.roles == ("",) * 4


def test_no_shares_where_the_model_knows_nothing() -> None:
    model = HookedModel.load(tiny("gpt2", seed=1))
    draws = torch.Generator().manual_seed(0)
    rows = [tuple(r) for r in torch.randint(3, 31, (12, 6), generator=draws).tolist()]
    answers = torch.randint(31, (2, 12), generator=draws).tolist()
    prompts = Prompts(tuple(map(str, rows)), tuple(rows), answers=tuple(answers[0]), distractors=tuple(answers[1]))
    circuit = Circuit.of((3, 4, 4), {"a": ["L0H1.z@END", "L1H2.z"]})
    result = circuit_evaluation(model, prompts, circuit, **LIGHT)
    assert (
        result.ratio().refused == f"F(M) is {result.summary().split('F(M) ')[2].split(' logit_diff')[0]}, within two standard errors of 0"
    )
    assert result.faithfulness().refused and "has no meaning" in result.summary() and bool(result.random_faithfulness().isnan().all())
    assert bool(result.to_frame().share.isna().all()) and bool(result.to_frame().difference.notna().all())
    assert all(f.layout.title.text for f in result.figures().values()) and "normalised" in str(result.plot().layout.yaxis.title.text)
    kl = circuit_evaluation(model, prompts, circuit, metric="kl", **BARE)
    assert float(kl.full.abs().max()) < 1e-5 < float(kl.circuit.min()) and kl.unit == "KL(model || run), nats"


def test_templates_are_used_by_themselves() -> None:
    """Prompts of several templates and lengths: means within each, as a run with the tag says."""
    from interp.tasks import task

    model = HookedModel.load("base")
    prompts = task("ioi(corrupt=ABC)").generate(model, 18, 0)
    circuit = Circuit.of((4, 6, 2), {"at_end": ["L0H3.z@END", "L0H2.z@END"], "at_s2": "L0H5.z@S2"})
    light = BARE | {"random_circuits": 2}
    own = circuit_evaluation(model, prompts, circuit, **light)
    assert len(own.asked) == 14 and "4 of 18 prompts left out: no other context is like theirs" in own.notes
    some = prompts[own.asked.tolist()]
    runs = Ablations(model, some, Metric.parse("logit_diff").reader(some), by="template")
    torch.testing.assert_close(own.circuit, runs([Knockout.all_but(circuit.nodes)]), atol=1e-4, rtol=0)
    assert "by template" in own.notes[0]
    assert float(own.faithfulness().value) > 0.6 and bool((own.random_faithfulness().abs() < 0.2).all())
    with pytest.raises(InputError, match="taken token by token; use by=length"):
        circuit_evaluation(model, prompts, circuit, by="all", **light)


def test_a_result_stands_for_its_circuit_and_a_text_for_one_role() -> None:
    class Found:
        def circuit(self) -> Circuit:
            return built("ioi").circuit

    few: Any = BARE | {"ablation": "zero", "roles": ("mover",)}
    want = circuit_evaluation(built("ioi").model, pairs("ioi"), built("ioi").circuit, **few)
    found = circuit_evaluation(built("ioi").model, pairs("ioi"), Found(), **few | {"roles": "mover"})  # type: ignore[arg-type]
    assert found.identity == want.identity and found.to_frame().equals(want.to_frame()) and found.labels["subset"] == ("mover",)


def test_bad_input_is_refused_in_one_sentence(unchecked: None) -> None:
    model, prompts, circuit = built("ioi").model, pairs("ioi"), built("ioi").circuit

    def refused(match: str, given: Any = prompts, of: Any = circuit, **settings: Any) -> None:
        with pytest.raises(InputError, match=match):
            circuit_evaluation(model, given, of, **LIGHT | settings)

    refused(r"the circuit is of a model with .* \(5, 4, 2\), this one has \(4, 6, 3\)", of=built("backup_head").circuit)
    refused("there is no role named 'movers'; nearest: mover", roles=("movers",))
    refused("there is no role named 'input'", roles=("input",))  # embeddings are not knocked out
    refused("by knocking out heads .*, but this one has no nodes", of=Circuit((4, 6, 3), ()))
    refused(
        r"heads \(MLPs count with mlps=True\), but the nodes of this one are L1.mlp_out@END",
        of=Circuit.of((4, 6, 3), {"a": "L1.mlp_out@END"}),
    )
    refused("needs prompts of at least 2 contexts for standard errors, got 1", prompts[:1], ablation="zero")
    refused("needs prompts of at least 2 contexts for standard errors, got 1", prompts[[0, 0, 0]], ablation="zero")
    refused("at least 2 contexts that are not alone in what by=template or length names for standard errors, got 0", prompts[:1])
    refused("needs prompts of at least 4 contexts for standard errors, got 3", prompts[[0, 1, 2, 2]], minimality="greedy")
    refused("these prompts have no tag 'template'; they have order, and by=length", by="template")
    refused("there is no ablation named 'means'; nearest: mean", ablation="means")
    refused("there is no minimality named 'all'", minimality="all")
    refused("greedy_steps is a whole number from 1 up, but it is 0", greedy_steps=0)
    refused("random_circuits is a whole number from 0 up, but it is 2.5", random_circuits=2.5)
    refused("random_circuits is a whole number from 0 up, but it is -1", random_circuits=-1)
    refused("there is no metric named 'loss'", metric="loss")
    refused("needs Prompts or PromptPairs, not str", "a text")
    refused("the circuit of circuit_evaluation is a NoneType, expected a Circuit, or a result that found one$", of=None)
    refused("the circuit of circuit_evaluation is a str, expected .*; Circuit.load reads a file", of="x.json")
    for seed in ("a", 1.5, True, None):
        refused(f"the seed of circuit_evaluation is a whole number, but {seed!r} came", seed=seed)
    refused("there is no role named 'movers'; nearest: mover", roles="movers")
    refused("no position 'S9' in these prompts; they name", of=Circuit.of((4, 6, 3), {"a": "L1H2.z@S9"}))
    shared = replace(circuit, contexts=prompts.contexts[3:5])
    refused(r"found on these prompts \(2 of their contexts, such as", of=shared)
    refused(r"found on these prompts \(they are the same ones\)", of=replace(circuit, prompts=prompts.digest))
    found, fresh = pairs("ioi", 24).split(seed=1)
    settled = replace(circuit, contexts=found.contexts, prompts=found.digest)
    assert circuit_evaluation(model, fresh, settled, **BARE).full.shape == (1, len(fresh))


def test_the_same_call_gives_the_same_and_another_seed_other_draws() -> None:
    model, prompts, circuit = built("ioi").model, pairs("ioi"), built("ioi").circuit
    again = circuit_evaluation(model, prompts, circuit, **LIGHT)
    assert again.to_frame().equals(evaluated("ioi").to_frame())
    other = circuit_evaluation(model, prompts, circuit, seed=1, **BARE | {"completeness_random": 3})
    assert other.subsets[0] != again.subsets[0][:6] and torch.allclose(other.circuit, again.circuit)
    fewer = circuit_evaluation(model, prompts, circuit, **LIGHT | {"completeness_random": 2, "greedy": 0, "roles": ("mover",)})
    assert fewer.labels["subset"] == ("mover", "random 0", "random 1") and fewer.subsets[0][1:] == again.subsets[0][3:5]


def test_a_killed_evaluation_goes_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "EVERY", 0.0)
    inputs = built("shared_head").model, pairs("shared_head"), built("shared_head").circuit
    want = circuit_evaluation(*inputs, by=by_length("shared_head"), **LIGHT)
    real, rows = Ablations._runs, []

    def dies(self: Any, knockouts: Any) -> Any:
        rows.append(len(knockouts))
        if len(rows) == 3:
            raise KeyboardInterrupt
        return real(self, knockouts)

    monkeypatch.setattr(Ablations, "_runs", dies)
    run = store.cached(circuit_evaluation, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(*inputs, by=by_length("shared_head"), **LIGHT)
    assert len(list((tmp_path / ".unfinished").iterdir())) == 1
    before, rows[:] = sum(rows[:2]), [0] * 10
    got = run(*inputs, by=by_length("shared_head"), **LIGHT)
    again, rows[:] = sum(rows), [0] * 10
    assert not (tmp_path / ".unfinished").exists()
    assert all(torch.equal(getattr(got, f), getattr(want, f)) for f in ("full", "curve", "random", "circuit_without", "before", "after"))
    circuit_evaluation(*inputs, by=by_length("shared_head"), **LIGHT)
    assert before and sum(rows) == again + before


def test_what_a_killed_evaluation_left_is_for_no_other(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "EVERY", 0.0)
    monkeypatch.setattr(saved, "_write", lambda file, tensors, metadata: names.append(file.name))
    names: list[str] = []
    world = built("shared_head")
    reader = Metric.parse("logit_diff").reader(pairs("shared_head"))
    for ablation, seed in (("resample", 0), ("zero", 0), ("mean", 0)):
        with progress.keeping(tmp_path):
            by = by_length("shared_head") if ablation == "mean" else None
            Ablations(world.model, pairs("shared_head"), reader, ablation=ablation, by=by, seed=seed)([Knockout.all_but(())])  # type: ignore[arg-type]
    with progress.keeping(tmp_path), world.model.patched({Site("mlp_out", 0): torch.zeros(())}):
        Ablations(world.model, pairs("shared_head"), reader, ablation="zero")([Knockout.all_but(())])
    assert len(set(names)) == len(names) == 4
