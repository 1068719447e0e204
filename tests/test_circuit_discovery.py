"""The staged search against one by hand on plain models, on models whose circuit is planted, and what it refuses and says."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_hooks
import pytest
import torch
from plain_hooks import difference, path_patched
from tiny_checkpoints import FOUR, sharp
from torch import Tensor

from interp import organisms
from interp.analyses.circuit_discovery import CircuitDiscoveryResult, circuit_discovery
from interp.circuit import Edge
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.prompts import PromptPairs, Prompts
from interp.sites import Site
from interp.stages import READY, Stage, Stages
from interp.sweeps.staged import by_context, grouped
from interp.tasks import task

# 7 pairs, 3 layers, 4 heads (2 key/value heads): no two sizes are alike, nor the lengths of clean and corrupt prompts
CLEAN = [
    [3, 4, 5, 6, 7, 8, 9],
    [10, 11, 12],
    [13, 14, 15, 16, 17],
    [18, 19, 20, 21, 22, 23],
    [24, 25, 26, 27],
    [5, 6, 28, 9],
    [29, 1, 2, 30],
]
OTHER = [
    [5, 4, 5, 16, 7, 8, 9, 3, 1],
    [10, 12],
    [13, 14, 25, 16],
    [18, 9, 20, 21, 2, 23],
    [14, 25, 26, 27, 11],
    [6, 6, 2, 9, 4],
    [9, 1, 12],
]
ROWS = {"clean": CLEAN, "other": OTHER}
WHERE = {"clean": (2, 0, 3, 1, 2, 1, 2), "other": (6, 0, 1, 1, 3, 2, 1)}
EPS = torch.finfo(torch.float32).eps


def far_apart(model: HookedModel) -> PromptPairs:
    """The pairs with answers that the clean prompt says and the corrupt one does not, so that there is something to search for."""
    sides = [
        Prompts(tuple(map(str, rows)), tuple(map(tuple, rows)), {"S": tuple((i,) for i in WHERE[which])}) for which, rows in ROWS.items()
    ]
    gap = model.logits(sides[0], at="END") - model.logits(sides[1], at="END")
    told = {"answers": tuple(gap.argmax(1).tolist()), "distractors": tuple(gap.argmin(1).tolist())}
    return PromptPairs(*(replace(side, **told) for side in sides))


def stages(*rows: tuple[str, str] | tuple[str, str, str], **settings: Any) -> str:
    """Text of stages: (role, receivers) or (role, receivers, position)."""
    return json.dumps({"stages": [dict(zip(("role", "receivers", "at"), row, strict=False), **settings) for row in rows]})


CHAIN = stages(("writer", "logits"), ("feeder", "writer.q"), ("source", "feeder.v, writer.k", "S"), sign="both", least=0, top=0.2)
LEVEL = 0.985


# ---- by hand


def signs_by_hand(effects: Tensor) -> list[float]:
    """p of every row of [head prompt] corrected for all of them, by every pattern of signs."""
    alive = [row.double() for row in effects]
    size = [float(row.square().sum().sqrt()) or 1.0 for row in alive]
    found = [abs(float(row.sum())) / s for row, s in zip(alive, size, strict=True)]
    largest = [
        max(abs(float((row * torch.tensor(flips)).sum())) / s for row, s in zip(alive, size, strict=True))
        for flips in itertools.product((1.0, -1.0), repeat=effects.shape[1])
    ]
    return [1.0 if f == 0 else sum(x >= f - 1e-9 for x in largest) / len(largest) for f in found]


def choice_by_hand(moved: Tensor, stage: Stage) -> set[Site]:
    """The strongest heads of [head prompt] that are beyond noise, at most three of twelve."""
    adjusted = signs_by_hand(moved)
    order = sorted((i for i in range(12) if adjusted[i] <= LEVEL), key=lambda i: -abs(float(moved[i].double().mean())))
    return {Site("z", i // 4, i % 4, stage.at) for i in order[: math.ceil(0.2 * 12)]}


def receivers_by_hand(stage: Stage, earlier: list[tuple[str, set[Site]]], kv: int) -> list[Site]:
    """What a stage sends to; k and v of a head are those of its group."""
    if stage.receivers == "logits":
        return [Site("resid_post", 2, position="END")]
    read: dict[Site, None] = {}
    for role, part in stage.sources:
        for site in (s for name, sites in earlier if name == role for s in sites):
            read[Site(part, site.layer, site.head if part == "q" else (site.head or 0) // (4 // kv), stage.at)] = None
    return list(read)


@pytest.mark.parametrize("kind", [k if k == "llama" else pytest.param(k, marks=pytest.mark.full) for k in FOUR])
def test_is_the_search_by_hand(kind: str) -> None:
    """Every stage, given what the ones before it chose: one prompt and one path at a time."""
    hf = sharp(kind)
    model = HookedModel.load(hf)
    pairs = far_apart(model)
    result = circuit_discovery(model, pairs, stages=CHAIN, level=LEVEL)
    tolerance = 8 * EPS * max(float(plain_hooks.patched(hf, ids, []).abs().max()) for ids in CLEAN)
    got = {Edge.parse(name.removeprefix("model ")): x for name, x in zip(result.labels["edge"], result.edges["model"], strict=True)}
    earlier: list[tuple[str, set[Site]]] = []
    count = 0
    for k, stage in enumerate(result.steps):
        read = receivers_by_hand(stage, earlier, model.shape.n_kv_heads)
        senders = [(Site("z", layer, head, stage.at),) for layer in range(3) for head in range(4)]
        alone = [(r,) for r in read if len(read) > 1]
        found = difference(path_patched(hf, pairs.clean, pairs.corrupt, senders, [tuple(read), *alone]), pairs.clean)
        torch.testing.assert_close(result.patched[0, k].flatten(0, 1), found[:, 0], atol=tolerance, rtol=0)
        moved = (result.patched[0, k] - result.clean[0]).flatten(0, 1)
        assert result.test(k).adjusted.flatten().tolist() == pytest.approx(signs_by_hand(moved), abs=1e-9)
        chosen = {Site("z", a, b, stage.at) for a, b in result.chosen[0, k].nonzero().tolist()}
        assert chosen == choice_by_hand(moved, stage)
        for (sender,), (j, receiver) in itertools.product(senders, enumerate(read)):
            if sender in chosen and (stage.receivers == "logits" or (sender.layer or 0) < (receiver.layer or 0)):
                want = found[(sender.layer or 0) * 4 + (sender.head or 0), j + 1 if alone else 0]
                torch.testing.assert_close(got[Edge(sender, receiver)], want, atol=tolerance, rtol=0)
                count += 1
        earlier.append((stage.role, chosen))
    assert count == len(got) > 3 and earlier[1][1], "the search goes on"


def test_what_is_reported_follows_from_the_values() -> None:
    model = HookedModel.load(sharp("llama"))
    result = circuit_discovery(model, far_apart(model), stages=CHAIN, level=LEVEL)
    frame, each = result.to_frame(), result.to_frame(per="prompt")
    assert len(frame) == 3 * 12 and len(each) == 3 * 12 * 7
    means = (
        each.assign(fall=each.clean - each.patched, gap=each.clean - each.corrupt)
        .groupby(["stage", "site"], sort=False)
        .mean(numeric_only=True)
    )
    assert frame.effect.to_numpy() == pytest.approx(means.fall.to_numpy(), abs=1e-6)
    assert frame.recovered.to_numpy() == pytest.approx((means.fall / means.gap).to_numpy(), rel=1e-4, abs=1e-5)
    first = result.strongest(3)
    strongest = frame[frame.chosen].iloc[frame[frame.chosen].recovered.abs().argsort()[::-1].to_numpy()]
    assert list(first.site) == list(strongest.site[:3])
    assert ((first.low <= first.recovered) & (first.recovered <= first.high)).all()
    unreached = frame[~torch.tensor(result.reaches.flatten().tolist()).numpy()]
    assert len(unreached) and (unreached.effect == 0).all() and (unreached.p == 1).all(), "exactly 0"


# ---- planted

PLANTED = {
    "ioi": stages(("mover", "logits"), ("inhibition", "mover.q"), ("duplicate", "inhibition.v", "S2")),
    "induction": stages(("induction", "logits"), ("previous", "induction.k", "NEXT")),
    "offset_copy": stages(("second_hop", "logits"), ("first_hop", "second_hop.v", "RELAY")),
    "majority": stages(("carry", "logits"), ("count", "carry.v", "STOP")),
    "precedes": stages(("behind", "logits"), ("previous", "behind.q"), ("previous", "behind.k", "READ")),
    "follows": stages(("before", "logits"), ("previous", "before.q"), ("previous", "before.v", "READ")),
}


def built(name: str) -> tuple[Any, Any, Any]:
    """A hand-built model, its task and its circuit."""
    if name not in ("precedes", "follows"):
        made = organisms.hand_built(name)
        return made, made.task, made.circuit
    made = organisms.hand_built("shared_head")
    return made, *made.parts[name == "follows"]


@pytest.mark.parametrize("name", PLANTED)
def test_planted_heads_come_back_in_their_roles(name: str) -> None:
    made, asked, circuit = built(name)
    pairs = asked.generate(made.model, 8, seed=3)
    result = circuit_discovery(made.model, pairs, stages=PLANTED[name])
    found = result.circuit()
    heads = {site: role for site, role in circuit.roles.items() if site.component == "z"}
    assert dict(found.roles) == heads and set(found.nodes) == heads.keys()
    between = {e for e in circuit.edges if e.sender in heads and e.receiver.component != "resid_mid"}
    through_mlp = {e for e in found.edges if e not in between}
    assert between <= set(found.edges) and (not through_mlp or name == "majority"), "MLPs are not searched, only heads behind them"
    assert found.prompts == pairs.digest and found.contexts == tuple(sorted(set(pairs.contexts))) and found.check(made.model.shape)
    frame = result.to_frame()
    idle = {str(s.at(None)) for group in (made.bystanders,) for s in group.sites()}
    assert (frame.effect[frame.site.str.partition("@")[0].isin(idle)].abs() < 1e-6).all()
    writer = frame[(frame.stage == frame.stage[0]) & frame.chosen]
    assert writer.recovered.tolist() == pytest.approx([1], abs=1e-3) and result.notes == ()


def test_where_planted_heads_look() -> None:
    made, asked, _ = built("ioi")
    table = circuit_discovery(made.model, asked.generate(made.model, 8), stages=PLANTED["ioi"]).strongest().set_index("site").pattern
    assert table["L3H2.z@END"].startswith("@IO 0.90") and table["L2H0.z@END"].startswith("@S2 0.90")
    assert table["L1H4.z@S2"].startswith("duplicate_token 0.90")
    body = json.loads(PLANTED["ioi"])
    body["stages"][0]["attends"], body["stages"][1]["attends"] = "S2", "S2"
    table = circuit_discovery(made.model, asked.generate(made.model, 8), stages=json.dumps(body)).strongest().set_index("site").pattern
    assert table["L3H2.z@END"].endswith(", expected @S2 0.00") and "expected" not in table["L2H0.z@END"]
    made, asked, _ = built("induction")
    table = circuit_discovery(made.model, asked.generate(made.model, 8), stages=PLANTED["induction"]).strongest().set_index("site").pattern
    assert table["L1H0.z@END"].startswith("induction 0.90") and table["L0H1.z@NEXT"].startswith("previous_token 0.90")


def test_a_backup_that_rests_writes_little_and_is_held_back_by_the_mover() -> None:
    made = organisms.hand_built("backup_head")
    text = {"stages": [{"role": "writer", "receivers": "logits"}, {"role": "brake", "receivers": "writer.q", "sign": "opposes"}]}
    result = circuit_discovery(made.model, made.task.generate(made.model, 8, seed=3), stages=json.dumps(text))
    assert result.chosen[0].nonzero().tolist() == [[0, 1, 2], [0, 3, 1], [1, 1, 2]]
    assert float(result.recovered(0).value[1, 2]) > 0.9 and 0.01 < float(result.recovered(0).value[3, 1]) < 0.1
    assert float(result.effect(1)[1, 2].mean()) < 0, "another name from the mover sets the backup free, which says the answer"
    # A node has one role, that in which it carries more; its edges are of both.
    circuit = result.circuit()
    mover = Site.parse("L1H2.z@END")
    assert circuit.roles[mover] == "writer" and Edge.parse("L1H2.z@END -> L3H1.q@END") in circuit.edges
    weaker = result.patched.clone()
    weaker[0, 0, 1, 2] = result.clean[0] - 0.01 * (result.clean[0] - result.corrupt[0])
    assert replace(result, patched=weaker).circuit().roles[mover] == "brake"


def test_stages_of_one_sweep_share_a_figure() -> None:
    made, asked, _ = built("ioi")
    body = json.loads(PLANTED["ioi"])
    body["stages"].insert(1, {"role": "negative", "receivers": "logits", "sign": "opposes"})
    result = circuit_discovery(made.model, asked.generate(made.model, 8), stages=json.dumps(body))
    figures = result.figures()
    assert list(figures) == ["circuit", "1 mover, 2 negative", "3 inhibition", "4 duplicate"]
    assert "chosen: mover L3H2; negative none" in figures["1 mover, 2 negative"].layout.title.text.replace("<br>", " ")


def test_stages_that_find_nothing() -> None:
    made, asked, _ = built("ioi")
    pairs = asked.generate(made.model, 8)
    text = stages(("mover", "logits"), ("inhibition", "mover.q"), ("previous", "inhibition.k", "S1"), ("more", "previous.v", "S1"))
    result = circuit_discovery(made.model, pairs, stages=text)
    assert not result.chosen[0, 2:].any() and result.searched[0].tolist() == [True, True, True, False]
    assert "no previous found: what inhibition.k can read of heads at S1 is the same in clean and corrupt prompts" in result.notes
    assert "more not searched, because no previous was found" in result.notes and all(note in result.summary() for note in result.notes)
    assert torch.equal(result.patched[0, 2], result.clean[0].expand(4, 6, 8)), "exactly the clean run"
    assert "4 more" not in result.to_frame().stage.tolist()
    first = circuit_discovery(
        organisms.hand_built("induction").model,
        organisms.hand_built("induction").task.generate(organisms.hand_built("induction").model, 8),
        stages=stages(("i", "logits"), ("j", "i.k", "NEXT"), ("k", "j.v", "FIRST")),
    )
    assert first.notes == ("no k found: no head comes before j.v",)


def test_no_difference_no_search() -> None:
    """Every other pair the other way round: what the answer is cancels, and there is nothing to find."""
    made, asked, _ = built("ioi")
    pairs = asked.generate(made.model, 8)
    fixed = [pairs.answers, pairs.distractors]
    rows = [(pairs.clean, pairs.corrupt)[i % 2].ids[i] for i in range(8)], [(pairs.corrupt, pairs.clean)[i % 2].ids[i] for i in range(8)]
    sides = [Prompts(pairs.clean.texts, tuple(ids), pairs.clean.positions, *fixed, contexts=pairs.contexts) for ids in rows]
    with pytest.raises(InputError, match="does not differ between clean and corrupt"):
        circuit_discovery(made.model, PromptPairs(*sides), stages=PLANTED["ioi"])


# ---- settings


def test_prompts_of_one_context_count_once() -> None:
    """Six pairs and the same six copied ten times: the same statistics, whatever the order; every prompt keeps its values."""
    model = HookedModel.load("base")
    one = task("ioi").generate(model, 6, seed=7)
    once = circuit_discovery(model, one, stages="ioi")
    many = circuit_discovery(model, one[[3, 0, 5, 1, 4, 2] + list(range(6)) * 9], stages="ioi")
    assert torch.equal(once.chosen, many.chosen) and many.patched.shape[-1] == 60
    for k in range(len(once.steps)):
        if once.searched[0, k]:
            torch.testing.assert_close(many.test(k).adjusted, once.test(k).adjusted, atol=0, rtol=0)
            torch.testing.assert_close(many.recovered(k).value, once.recovered(k).value, atol=1e-4, rtol=1e-4)
    assert set(many.circuit().edges) == set(once.circuit().edges)
    assert "n = 6 contexts of 60 prompt pairs" in many.summary() and "n = 6 prompt pairs" in once.summary()
    frames = [r.to_frame().set_index(["stage", "site"]) for r in (once, many)]
    for column in ("effect", "effect_se", "p"):
        assert frames[1][column].to_numpy() == pytest.approx(frames[0][column].to_numpy(), rel=1e-3, abs=1e-4)
    assert len(many.to_frame(per="prompt")) == 10 * len(once.to_frame(per="prompt"))


def test_means_per_context() -> None:
    group = grouped(("b", "a", "b", "c"))
    assert group.tolist() == [0, 1, 0, 2]
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 8.0], [7.0, 0.0]])
    assert by_context(values, group).tolist() == [[3, 5], [3, 4], [7, 0]]
    assert by_context(values, grouped("abcd")) is values


def test_an_edge_carries_what_its_own_stage_asks_for() -> None:
    """Another stage that asks for less lets no edge of this one in."""
    made, asked, _ = built("ioi")
    body = json.loads(PLANTED["ioi"])
    result = circuit_discovery(made.model, asked.generate(made.model, 8), stages=json.dumps(body))
    values, found = result.edges["model"], [Edge.parse(text.removeprefix("model ")) for text in result.labels["edge"]]
    sent, weaker = Edge.parse("L1H4.z@S2 -> L2H0.v@S2"), Edge.parse("L1H4.z@S2 -> L2H1.v@S2")
    assert sent in result.circuit().edges and weaker not in found
    # as if another inhibition head had been found, whose key/value head gets a tenth as much
    tenth = result.clean[0] + 0.1 * (values[found.index(sent)] - result.clean[0])
    chosen, edges = result.chosen.clone(), torch.cat([values, tenth[None]])
    chosen[0, 1, 2, 2] = True
    labels = {**result.labels, "edge": (*result.labels["edge"], f"model {weaker}")}
    altered = replace(result, edges={"model": edges}, labels=labels, chosen=chosen)
    share = float((result.clean[0] - tenth).mean() / (result.clean[0] - result.corrupt[0]).mean())
    for least, there in ((share / 2, True), (share * 2, False)):
        body["stages"][2]["least"] = least  # of the stage of this edge; those of the others stay at 1 %
        assert (weaker in replace(altered, stages=json.dumps(body)).circuit().edges) == there


def test_a_circuit_brings_the_scores_of_all_heads() -> None:
    made, asked, _ = built("ioi")
    result = circuit_discovery(made.model, asked.generate(made.model, 8), stages=PLANTED["ioi"])
    circuit = result.circuit()
    for k, stage in enumerate(result.steps):
        ranking, share = circuit.rankings[stage.role], result.recovered(k).value
        assert set(ranking.scores) == {Site("z", a, b, stage.at) for a, b in result.reaches[0, k].nonzero().tolist()}
        assert all(x == float(share[s.layer, s.head]) for s, x in ranking.scores.items())
        assert set(ranking.chosen) == {Site("z", a, b, stage.at) for a, b in result.chosen[0, k].nonzero().tolist()}
    # chosen twice: one role, but in both rankings
    both = result.chosen.clone()
    both[0, 1, 3, 2] = True
    twice = replace(result, chosen=both).circuit()
    site = Site("z", 3, 2, "END")
    assert twice.roles[site] == "mover" and all(site in twice.rankings[role].chosen for role in ("mover", "inhibition"))


def test_top_and_least() -> None:
    made, asked, _ = built("ioi")
    pairs = asked.generate(made.model, 8)
    one = circuit_discovery(made.model, pairs, stages=PLANTED["ioi"], top=1 / 24)
    assert [int(c.sum()) for c in one.chosen[0]] == [1, 1, 1] and one.chosen[0, 1, 2, 0], "the stronger of the two"
    assert json.loads(one.stages)["stages"][0]["top"] == 1 / 24
    body = json.loads(PLANTED["ioi"])
    body["stages"][1]["least"] = 0.5
    assert circuit_discovery(made.model, pairs, stages=json.dumps(body)).chosen[0, 1].nonzero().tolist() == [[2, 0]]
    body["stages"][1] |= {"sign": "opposes", "least": 0}
    assert not circuit_discovery(made.model, pairs, stages=json.dumps(body)).chosen[0, 1, 2, :2].any()
    none = circuit_discovery(made.model, pairs, stages=PLANTED["ioi"], level=0.001)
    assert not none.chosen.any() and not none.circuit().nodes and "none beyond noise" in none.summary(), "8 prompts give p = 0.0078"


def test_mlps_can_be_held() -> None:
    made, asked, _ = built("majority")
    held = circuit_discovery(made.model, asked.generate(made.model, 8), stages=PLANTED["majority"], freeze_mlps=True)
    assert held.chosen[0, 0].any() and not held.chosen[0, 1].any(), "the count goes through an MLP"


def test_default_stages() -> None:
    model = HookedModel.load("base")
    known = circuit_discovery(model, task("ioi(order=ABBA)").generate(model, 8))
    assert known.stages == str(Stages.parse("ioi")) and not any("general" in note for note in known.notes)
    tiny = HookedModel.load(sharp("llama"))
    other = circuit_discovery(tiny, far_apart(tiny), level=LEVEL)
    assert other.stages == str(Stages.parse("general")) and other.notes[0] == "general stages: none are known for these prompts"


# ---- pairs


@pytest.fixture(scope="module")
def two() -> ModelPair:
    """Of the tuned model one inhibition head is gone."""
    made = organisms.hand_built("ioi")
    hf: Any = copy.deepcopy(made.model.wrapped.source)
    hf.model.layers[2].self_attn.o_proj.weight.data[:, 32:64] = 0
    return ModelPair.load(made.model, HookedModel.load(hf, tokenizer=made.model.tokenizer))


def test_a_pair_is_two_searches(two: ModelPair, tmp_path: Path) -> None:
    pairs = organisms.hand_built("ioi").task.generate(two.base, 8)
    both = circuit_discovery(two, pairs, stages=PLANTED["ioi"])
    for i, (side, model) in enumerate(two.sides()):
        alone = circuit_discovery(model, pairs, stages=PLANTED["ioi"])
        assert torch.equal(both.patched[i], alone.patched[0]) and torch.equal(
            both.attention[i].nan_to_num(), alone.attention[0].nan_to_num()
        )
        assert both.circuit(side) == alone.circuit()
    lost = both.circuit("base") - both.circuit("tuned")
    assert [*map(str, lost.nodes), *map(str, lost.edges)] == ["L2H1.z@END", "L2H1.z@END -> L3H2.q@END"]
    assert "3 of 4 heads at positions are in both circuits" in both.summary() and list(both.figures())[:2] == [
        "circuit, tuned",
        "circuit, base",
    ]
    again = CircuitDiscoveryResult.load(both.save(tmp_path / "both"))
    assert again.circuit("base") == both.circuit("base") and again.to_frame().equals(both.to_frame())
    assert list(both.strongest().columns)[:3] == ["site", "side", "role"]


def test_a_side_that_cannot_do_the_task_is_not_searched() -> None:
    made = organisms.hand_built("ioi")
    hf: Any = copy.deepcopy(made.model.wrapped.source)
    hf.model.layers[3].self_attn.o_proj.weight.data.zero_()
    pair = ModelPair.load(HookedModel.load(hf, tokenizer=made.model.tokenizer), made.model)
    result = circuit_discovery(pair, made.task.generate(made.model, 8), stages=PLANTED["ioi"])
    assert result.searched.any(1).tolist() == [False, True] and len(result.circuit().nodes) == 4 and not result.circuit("base").nodes
    assert any(note.startswith("base: nothing searched, since clean and corrupt do not differ") for note in result.notes)
    assert set(result.to_frame().side) == {"tuned"} and result.summary() and len(result.figures()) == 4


# ---- stages, and wrong input


@pytest.mark.parametrize("name", READY)
def test_stages_that_ship(name: str, tmp_path: Path) -> None:
    ready = Stages.parse(name)
    assert Stages.parse(str(ready)) == ready == Stages.load(ready.save(tmp_path / "mine.json")) and ready.about
    if name != "general":
        model = HookedModel.load("base")
        positions = task(name).generate(model, 1).clean.positions
        assert all(stage.at in positions for stage in ready.stages)
        patterns = ("previous_token", "duplicate_token", "induction")
        assert all(stage.attends is None or stage.attends in (*positions, *patterns) for stage in ready.stages)


ROW = {"role": "a", "receivers": "logits"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("[]", "this|no set of stages"),
        ("{", "no JSON"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [ROW], "more": 1}, "no field of stages named 'more'"),
        ({"stages": [{**ROW, "reciever": "x"}]}, "no field of stages named 'reciever'"),
        ({"stages": [{"role": "a"}]}, "stage 1 has no receivers"),
        ({"stages": [3]}, "stage 1 is 3, expected an object"),
        ({"stages": ROW}, "its stages are a list"),
        ({"stages": [ROW, {"role": "b", "receivers": "moover.q"}]}, "no role named 'moover'"),
        ({"stages": [{"role": "b", "receivers": "nobody.q"}]}, "the first stage, b, sends to nobody, which no stage finds"),
        ({"stages": [ROW, {"role": "b", "receivers": "b.q"}]}, "the stage b sends to itself"),
        ({"stages": [{"role": "a", "receivers": "b.q"}, {"role": "b", "receivers": "a.q"}]}, "sends to b, which comes later"),
        ({"stages": [ROW, {"role": "b", "receivers": "a.z"}]}, "cannot send to 'a.z'"),
        ({"stages": [{**ROW, "sign": "plus"}]}, "expected supports, opposes or both"),
        ({"stages": [{**ROW, "top": 0}]}, "top of the stage a is 0"),
        ({"stages": [{**ROW, "least": -1}]}, "least of the stage a is -1"),
        ({"stages": [{**ROW, "role": "a b"}]}, "'a b' is not a name"),
        ({"stages": [{**ROW, "at": "?"}]}, "neither a name such as END nor an integer"),
        ({"stages": [{**ROW, "at": None}]}, "at of a stage is None"),
        ({"stages": [ROW, ROW]}, "is there twice"),
    ],
)
def test_wrong_stages(body: Any, said: str, tmp_path: Path) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    with pytest.raises(InputError, match=said):
        Stages.parse(text)
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(InputError, match=r"mine\.json"):
        Stages.parse(str(tmp_path / "mine.json"))


def test_wrong_input(unchecked: None) -> None:
    made, asked, _ = built("ioi")
    pairs = asked.generate(made.model, 8)

    def refused(said: str, given: Any = pairs, **settings: Any) -> None:
        with pytest.raises(InputError, match=said):
            circuit_discovery(made.model, given, **{"stages": PLANTED["ioi"], **settings})

    refused("no set of stages named 'iio'; nearest: ioi", stages="iio")
    refused("there are no stages at nowhere.json", stages="nowhere.json")
    refused("stages are a name, a file or JSON, not int", stages=3)
    refused("'S9'", stages=stages(("mover", "logits"), ("x", "mover.q", "S9")))
    refused("no attention pattern or position named 'S9'", stages=stages(("mover", "logits"), attends="S9"))
    refused("sends to the logits at S2; they are read at END", stages=stages(("mover", "logits", "S2")))
    refused("needs prompts of at least 6 contexts, since fewer .* but 5 prompts of 5 contexts came", given=pairs[:5])
    refused("but 8 prompts of 1 context came", given=pairs[[0] * 8])
    refused("needs clean and corrupt prompts", given=pairs.clean)
    refused("clean and corrupt prompts are the same", given=PromptPairs(pairs.clean, pairs.clean))
    refused("reads the answer at END, but the metric is logit_diff@S2", metric="logit_diff@S2")
    refused("no metric named", metric="logit_dif")
    refused("level is 2, expected", level=2)
    refused("top of the stage mover is 3", top=3)
    result = circuit_discovery(made.model, pairs, stages=PLANTED["ioi"])
    with pytest.raises(InputError, match="no model 'base'"):
        result.circuit("base")
    with pytest.raises(InputError, match="per must be"):
        result.to_frame(per="head")


def test_a_file_of_stages_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    made, asked, _ = built("ioi")
    pairs, path = asked.generate(made.model, 8), tmp_path / "mine.json"
    described = []
    for text in (PLANTED["ioi"], PLANTED["ioi"], stages(("mover", "logits"))):
        path.write_text(text)
        described.append(circuit_discovery.describe(made.model, pairs, stages=str(path)))
    assert described[0].identity == described[1].identity != described[2].identity
    assert f"--stages={path}" in described[0].command() and not any("stages" in o for o in described[0].obstacles)
    named = circuit_discovery.describe(made.model, pairs, stages="ioi")
    assert "--stages=ioi" in named.command()
