"""Heads of a circuit from one model in the other, against plain Hugging Face models with hooks written by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import test_cross_patching
import torch
from test_cross_patching import EPS, PROMPTS, by_the_book, other_blocks, plain
from tiny_checkpoints import FOUR
from torch import Tensor, nn

from interp.analyses.cmap import CmapResult, cmap
from interp.circuit import Circuit
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.organisms import planted
from interp.prompts import Prompts
from interp.sites import Site
from interp.stats import mcnemar, paired_change, wilson
from interp.stats import recovered as plain_share
from interp.sweeps.answers import margin
from interp.sweeps.draws import distinct, how_many, other_heads
from interp.sweeps.groups import head_sites
from interp.tasks import task

world = test_cross_patching.world

ROLES = {"early": ("L0H1.z@S", "L0H3.z@S"), "late": ("L2H0.z@END", "L1H2.z@END"), "wide": "L1H0.z"}
CIRCUIT = {"gpt2": Circuit.of((3, 4, 4), ROLES), "neox": Circuit.of((3, 4, 4), ROLES)}
CIRCUIT |= dict.fromkeys(("llama", "qwen2"), Circuit.of((3, 4, 2), ROLES))


def answered(base: nn.Module, tuned: nn.Module) -> Prompts:
    """Prompts whose answer is what tuned says (the first three), what base says, and neither: accuracies differ."""
    with torch.no_grad():
        said = [[int(hf(torch.tensor([list(ids)])).logits[0, -1].argmax()) for ids in PROMPTS.ids] for hf in (base, tuned)]
    answers = (*said[1][:3], said[0][3], 30)
    return replace(PROMPTS, answers=answers, distractors=tuple((a + 1) % 31 for a in answers))


def measured(logits: Tensor, answer: int, distractor: int) -> list[float]:
    """Accuracy, margin and logit difference of one prompt, literally."""
    others = [float(x) for i, x in enumerate(logits) if i != answer]
    return [float(int(logits.argmax()) == answer), float(logits[answer]) - max(others), float(logits[answer] - logits[distractor])]


def rest_of(cell: str, n_layers: int = 3, n_heads: int = 4) -> tuple[Site, ...]:
    heads = tuple(Site("z", i, h) for i in range(n_layers) for h in range(n_heads))
    mlps = tuple(Site("mlp_out", i) for i in range(n_layers))
    return {"+ other heads": heads, "+ MLPs": heads + mlps, "+ embeddings": (Site("resid_pre", 0), *heads, *mlps)}[cell]


@cache
def full(kind: str, output: Any, pair: ModelPair, base: nn.Module, tuned: nn.Module) -> CmapResult:
    direction = "both" if output == "sender" else "tuned_to_base"
    return cmap(pair, answered(base, tuned), CIRCUIT[kind], direction=direction, output=output, rest=True, control=2, seed=3)


@pytest.mark.parametrize("output", [pytest.param("receiver", marks=pytest.mark.full), "sender"])
def test_every_run_against_plain_hooks(world: Any, output: Any) -> None:
    """Every cell, one draw of random heads, both ways, all three measures."""
    kind, base, tuned, pair = world
    prompts, circuit = answered(base, tuned), CIRCUIT[kind]
    found = full(kind, output, pair, base, tuned)
    assert found.labels["cell"] == ("circuit", "early", "wide", "late", "+ other heads", "+ MLPs", "+ embeddings")
    assert found.labels["measure"] == ("accuracy", "margin", "logit_diff") and found.heads == (5, 2, 1, 2, 12, 12, 12)
    assert prompts.answers is not None and prompts.distractors is not None and found.checked == 16 * len(found.directions)
    flipped = 0
    for j, (receiver, sender) in enumerate(((base, tuned), (tuned, base))[: len(found.directions)]):
        for i, cell in enumerate(found.cells):
            group = rest_of(cell) if cell.startswith("+") else tuple(n for n in circuit.nodes if cell in ("circuit", circuit.roles[n]))
            runs: list[tuple[tuple[Site, ...], Tensor]] = [(group, found.patched[:, j, i])]
            if cell == "late":  # one draw, at the same position, from its layers
                drawn = other_heads(group, circuit.nodes, pair.shape, 2, f"3 {cell}").sets[1]
                assert len(drawn) == 2 and not set(drawn) & set(group) and {s.layer for s in drawn} <= {1, 2}
                runs.append((drawn, found.control[:, j, i, 1]))
            for sites, values in runs:
                for row in range(5):
                    logits = by_the_book(receiver, sender, row, sites, output)
                    want = torch.tensor(measured(logits, prompts.answers[row], prompts.distractors[row]))
                    assert (values[:, row] - want).abs().max() <= 2 * 8 * EPS * float(logits.abs().max()), (cell, row)
                    flipped += int(float(want[0]) != float(found.start(direction=found.directions[j])[row]))
    assert (
        (flipped > 4 or output == "receiver")
        and bool(found.control[:, :, 4:].isnan().all())
        and not bool(found.control[:, :, [0, 2, 3]].isnan().any())
    )
    # two of the other two heads of layer 0 at S; one of two of layer 1; two of five of layers 1 and 2 at END
    assert found.choices == (1 * 2 * 10, 1, 2, 10, 0, 0, 0) and bool(found.control[:, :, 1, 1].isnan().all())
    assert "of random heads the only ones there are beside early, all 2 sets there are beside wide" in found.notes[-1]
    assert found.base[0].tolist()[3] == 1 and found.tuned[0].tolist()[:3] == [1, 1, 1]


def test_all_of_the_sender_is_the_sender_and_the_gains_add_up(world: Any) -> None:
    kind, base, tuned, pair = world  # tuned has the final norm and the unembedding of base
    found = full(kind, "sender", pair, base, tuned)
    limit = 2 * 8 * EPS * float(pair.tuned.logits(PROMPTS, at="END").abs().max())
    for direction in found.directions:
        for measure in found.labels["measure"]:
            goal, start = found.goal(measure, direction), found.start(measure, direction)
            m, j = found.labels["measure"].index(measure), found.directions.index(direction)
            assert (found.patched[m, j, -1] - goal).abs().max() <= limit
            table = found.adds_up(measure, direction)
            assert list(table["added"]) == ["circuit", "+ other heads", "+ MLPs", "+ embeddings", "final norm and unembedding"]
            assert sum(table["gain"].tolist()) == pytest.approx(float((goal - start).double().mean()), abs=1e-6)
            gains, values = table["gain"].tolist(), table["value"].tolist()
            assert abs(gains[-1]) <= limit and values[-1] == pytest.approx(float(goal.double().mean()), abs=1e-6)
    margin_gains = found.adds_up("margin")["gain"]
    assert min(margin_gains.abs().tolist()[:2]) > 1e-3
    if kind != "llama":
        return
    with torch.no_grad():  # other embeddings: only the last addition brings them
        moved: Any = other_blocks(kind)
        moved.model.embed_tokens.weight += 0.5 * torch.randn(31, 24, generator=torch.Generator().manual_seed(5))
    apart = cmap(
        ModelPair.load(pair.base, HookedModel.load(moved)),
        answered(base, moved),
        CIRCUIT[kind],
        direction="tuned_to_base",
        output="sender",
        rest=True,
        control=0,
    )
    assert (apart.patched[1:, 0, -1] - apart.tuned[1:]).abs().max() <= limit < (apart.patched[1:, 0, -2] - apart.tuned[1:]).abs().max()
    own = cmap(pair, answered(base, tuned), CIRCUIT[kind], direction="tuned_to_base", rest=True, control=0)
    assert (own.patched[1, 0, -1] - own.tuned[1]).abs().max() > 1e-2 and "W_O" in own.adds_up()["added"].iloc[-1]


@pytest.mark.parametrize("output", ["receiver", "sender"])
def test_a_model_into_itself_is_a_no_op(output: Any) -> None:
    model = HookedModel.load(plain("llama", 1))
    found = cmap(ModelPair(model, model), answered(*[plain("llama", 1)] * 2), CIRCUIT["llama"], output=output, rest=True, control=2)
    for j in range(2):
        assert torch.equal(found.patched[:, j], found.base[:, None].expand_as(found.patched[:, j]))
    assert torch.equal(found.base, found.tuned) and torch.equal(
        found.control[:, :, [0, 2, 3]], found.base[:, None, None, None].expand(3, 2, 3, 2, 5)
    )
    assert found.recovered().refused and bool(found.random_heads().isnan().all()) and "too close to say which share" in found.summary()
    table = found.to_frame()
    assert set(table["effect"]) == {0.0} and set(table["p"]) == {1.0}


@pytest.mark.parametrize("kind", FOUR)
def test_a_planted_offset_is_ranked_first_and_recovered(kind: str) -> None:
    hf = plain(kind, 1)
    pair = ModelPair(HookedModel.load(hf), HookedModel.load(hf))
    circuit = Circuit.of(CIRCUIT[kind].model, {f"h{i}{h}": f"L{i}H{h}.z" for i, h in ((0, 1), (1, 2), (1, 3), (2, 0))})
    with pair.tuned.edited(planted("head_offset", pair.tuned, layer=1, head=2, scale=6.0)):
        gap = pair.tuned.logits(PROMPTS, at="END") - pair.base.logits(PROMPTS, at="END")
        said = pair.tuned.logits(PROMPTS, at="END").argmax(-1).tolist()
        prompts = replace(PROMPTS, answers=tuple(said), distractors=tuple(gap.argmin(-1).tolist()))
        found = cmap(pair, prompts, circuit, direction="tuned_to_base", control=1)
    at = found.cells.index("h12")
    share = found.recovered("logit_diff")
    groups = [i for i, name in enumerate(found.cells) if name != "circuit"]
    assert share.refused is None and max(groups, key=lambda i: float(share.value[i])) == at
    assert float(share.value[at]) == pytest.approx(1, abs=1e-5) and float(share.value[0]) == pytest.approx(1, abs=1e-5)
    others = [i for i in groups if i not in (at, found.cells.index("h20"))]  # a head behind it reads it, one before or beside does not
    assert torch.equal(found.patched[:, 0, others], found.base[:, None].expand(-1, len(others), -1))
    assert torch.equal(found.patched[0, 0, at], torch.ones(5)) and torch.equal(found.tuned[0], torch.ones(5))
    table = found.strongest()
    if not found.recovered().refused:
        assert set(table["group"][:2]) == {"circuit", "h12"} and "h12 alone 1.00" in found.summary()


def test_an_adapter_and_its_merged_folder_give_the_same(tmp_path: Any) -> None:
    lora = ModelPair.load("base", "boxes-lora")
    lora.tuned.save(tmp_path / "merged")
    merged = ModelPair.load("base", str(tmp_path / "merged"))
    circuit = Circuit.of((4, 6, 2), {"fetch": ("L2H1.z@END", "L3H4.z@END"), "find": "L1H0.z@query_label"})
    prompts = task("boxes(n_boxes=2)").generate(lora, 10, seed=3)
    one, other = (cmap(p, prompts, circuit, direction="tuned_to_base", control=1, rest=True) for p in (lora, merged))
    torch.testing.assert_close(one.patched, other.patched, atol=1e-4, rtol=0)
    assert torch.equal(one.base, other.base) and (one.tuned - other.tuned).abs().max() <= 1e-4 < (one.tuned - one.base).abs().max()


@cache
def small(kind: str = "llama") -> tuple[ModelPair, Prompts]:
    base, tuned = plain(kind, 1), other_blocks(kind)
    return ModelPair.load(HookedModel.load(base), HookedModel.load(tuned)), answered(base, tuned)


def test_tables_are_counts_by_hand() -> None:
    pair, prompts = small()
    found = cmap(pair, prompts, CIRCUIT["llama"], control=2)
    frame = found.to_frame()
    assert len(frame) == 3 * 2 * 4 and len(found.to_frame("prompt")) == 3 * 2 * 4 * 5
    every = found.to_frame("prompt")
    for direction in found.directions:
        for cell in found.cells:
            row = frame[(frame.measure == "accuracy") & (frame.direction == direction) & (frame.group == cell)].iloc[0]
            runs = every.query("measure == 'accuracy' and direction == @direction and group == @cell")
            up = int(((runs.patched == 1) & (runs.start == 0)).sum())
            down = int(((runs.patched == 0) & (runs.start == 1)).sum())
            assert (row.gained, row.lost) == (up, down) and row.p_mcnemar == mcnemar(up, down)
            assert row.effect == pytest.approx((up - down) / 5) and (row.effect_low, row.effect_high) == paired_change(up, down, 5)
            assert row.to_goal == pytest.approx((runs.patched - runs.goal).mean())
    single = cmap(pair, prompts, CIRCUIT["llama"], direction="base_to_tuned", control=2)
    assert torch.equal(single.patched[:, 0], found.patched[:, 1]) and torch.equal(single.base, found.base)
    assert torch.equal(single.control[:, 0].nan_to_num(), found.control[:, 1].nan_to_num()) and single.directions == ("base_to_tuned",)
    assert list(found.figures()) == [f"{m}, {d}" for m in ("accuracy", "logit_diff") for d in ("tuned to base", "base to tuned")]
    lone = Circuit.of((3, 4, 2), {"only": "L1H1.z@END"})
    bare = cmap(pair, prompts, lone, metric="accuracy", direction="tuned_to_base", control=0)
    assert bare.cells == ("circuit",) and bare.labels["measure"] == ("accuracy", "margin") and len(bare.figures()) == 2


def test_the_margin_says_what_argmax_says() -> None:
    pair, prompts = small()
    logits = pair.base.logits(prompts, at="END")
    assert prompts.answers is not None
    right = logits.argmax(-1) == torch.tensor(prompts.answers)
    assert torch.equal(margin(prompts)(logits) > 0, right)
    options = tuple((a, (a + 3) % 31, *((a + 7) % 31 for _ in range(i % 2))) for i, a in enumerate(prompts.answers))
    got = margin(replace(prompts, options=options), "options")(logits)
    for i, own in enumerate(options):
        assert float(got[i]) == float(logits[i, own[0]] - max(logits[i, o] for o in own[1:]))
    tie = torch.zeros(5, 31)
    assert not bool((margin(prompts)(tie) > 0).any())
    with pytest.raises(InputError, match="among"):
        margin.__wrapped__(prompts, "words")  # not checked by its annotation
    with pytest.raises(InputError, match="at least two options"):
        margin(replace(prompts, options=tuple((a,) for a in prompts.answers)), "options")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"circuit": Circuit.of((3, 4, 4), {"a": "L0H1.z@END"})}, "the circuit is of a model with"),
        ({"circuit": Circuit((3, 4, 2), ())}, "no attention heads among its 0 nodes"),
        ({"circuit": Circuit.of((3, 4, 2), {"a": "L0.mlp_out@END"})}, "no attention heads among its 1 nodes"),
        ({"circuit": Circuit.of((3, 4, 2), {"a": "L0H1.z@IO"})}, "IO"),
        ({"circuit": Circuit.of((3, 4, 2), {"circuit": "L0H1.z@END"})}, "rename the role"),
        ({"circuit": replace(CIRCUIT["llama"], contexts=PROMPTS.contexts[:1])}, "was found on these prompts (1 of their contexts"),
        ({"prompts": PROMPTS[:1]}, "at least two prompts"),
        ({"prompts": replace(PROMPTS, answers=None)}, "no one-token answers"),
        ({"prompts": replace(PROMPTS, distractors=None)}, "distractor"),
        ({"direction": "both ways"}, "direction"),
        ({"output": "tuned"}, "output"),
        ({"among": "options"}, "at least two options"),
        ({"control": -1}, "number of draws"),
        ({"metric": "kl"}, "compares with another run"),
    ],
)
def test_bad_inputs(changes: dict[str, Any], said: str) -> None:
    pair, prompts = small()
    given: dict[str, Any] = {"prompts": prompts, "circuit": CIRCUIT["llama"], "control": 0, **changes}
    with pytest.raises(InputError) as error:
        cmap(pair, given.pop("prompts"), given.pop("circuit"), **given)
    assert said in str(error.value)


def test_a_pair_at_chance_is_refused_before_the_search() -> None:
    pair, prompts = small()
    said = [pair.base.logits(prompts, at="END"), pair.tuned.logits(prompts, at="END")]
    never = ((said[0] + said[1]).argmin(-1)).tolist()  # neither model says it
    wrong = replace(prompts, answers=tuple(never), options=tuple((a, (a + 1) % 31, (a + 2) % 31) for a in never))
    with pytest.raises(InputError, match="no model does this task: among the options of 5 prompts, base 0 of 5 and tuned 0 of 5 .* 33%"):
        cmap(pair, wrong, CIRCUIT["llama"])


def test_half_a_circuit_without_roles_is_grouped_by_position() -> None:
    pair, prompts = small()
    nodes = tuple(map(Site.parse, ("L0H1.z@S", "L1H2.z@END", "L2.mlp_out@END")))
    found: CmapResult = cmap(pair, prompts, Circuit((3, 4, 2), nodes), direction="tuned_to_base", control=1)
    assert found.cells == ("circuit", "heads@S", "heads@END") and found.notes[-1] == "L2.mlp_out@END of the circuit not set: heads only"
    every = Circuit((3, 4, 2), tuple(s.at("END") for s in head_sites("z", pair.shape)))
    assert "no random heads beside circuit" in cmap(pair, prompts, every, direction="tuned_to_base", control=1).summary()


def test_random_heads_are_of_the_layers_of_each_position_and_can_act() -> None:
    """Heads at S of layer 0 are not replaced by heads of layers that END spans, and the last layer at S is read by nobody."""
    pair, prompts = small()
    circuit = Circuit.of((3, 4, 2), {"early": ("L0H1.z@S", "L0H3.z@S"), "late": ("L1H2.z@END", "L2H0.z@END"), "wide": "L1H0.z@S"})
    batch = pair.batch(prompts)
    ends = {p for p in ("S", "END") if any(e in t for e, t in zip((batch.lengths - 1).tolist(), batch.at(p), strict=True))}
    assert "END" in ends
    every = other_heads(circuit.nodes, circuit.nodes, pair.shape, 40, "0", {"S"})
    for some in every.sets:
        at = {p: [(s.layer, s.head) for s in some if s.position == p] for p in ("S", "END")}
        assert len(at["S"]) == 3 and len(at["END"]) == 2 and {i for i, _ in at["S"]} <= {0, 1} and {i for i, _ in at["END"]} <= {1, 2}
        assert not {(s.layer, s.head) for s in some} & {(n.layer, n.head) for n in circuit.nodes}
    assert len({frozenset(s) for s in every.sets}) == 40 and every.there == math.comb(4, 3) * math.comb(5, 2)
    spans = tuple(Site("z", layer, 0, "S") for layer in (0, 2))
    assert {s.layer for some in other_heads(spans, spans, pair.shape, 99, "0", {"S"}).sets for s in some} == {0, 1}
    assert {s.layer for some in other_heads(spans, spans, pair.shape, 99, "0").sets for s in some} == {0, 1, 2}
    last = Circuit.of((3, 4, 2), {"x": ("L2H0.z@S", "L2H1.z@S"), "y": "L1H0.z@END"})
    apart = replace(prompts, positions={"S": tuple((0,) for _ in range(5))})
    found = cmap(pair, apart, last, direction="tuned_to_base", control=3)
    assert torch.equal(found.effect("margin")[found.cells.index("x")], torch.zeros(5)), "what S writes last, nobody reads"
    assert found.choices == (0, 3, 0) and "no random heads beside circuit, x" in found.summary()


def test_draws_are_sets_and_no_set_comes_twice() -> None:
    lone = distinct([("abc", 3)], 10, "0")
    assert lone.sets == (("a", "b", "c"),) and lone.there == 1 and distinct([("ab", 3)], 10, "0").there == 0
    some = distinct([("abcde", 2), ("xy", 1)], 19, "0")
    assert len({frozenset(s) for s in some.sets}) == 19 and some.there == 20
    assert len(distinct([("abcde", 2)], 10, "0", but="ab").sets) == 9 and distinct([("abcde", 2)], 0, "0").sets == ()
    assert how_many(1, 1) == "the only ones there are" and how_many(3, 3) == "all 3 sets there are" and how_many(1, 9) == "1 draw"
    pair, prompts = small()
    one = cmap(pair, prompts, Circuit.of((3, 4, 2), {"a": ("L1H0.z@END", "L1H2.z@END")}), direction="tuned_to_base", control=10)
    assert one.control.shape[3] == 1 == one.choices[0], "two of the other two heads of the layer"
    frame = one.to_frame()
    assert set(frame.draws) == {1} and bool(frame.control_sd.isna().all()) and bool(frame.control_effect_sd.isna().all())


def made(patched: list[float], **changes: Any) -> CmapResult:
    """Of 48 prompts tuned answers all and base the first 32."""
    base, tuned = torch.tensor([[1.0] * 32 + [0.0] * 16] * 3), torch.ones(3, 48)
    cells = torch.tensor([[[patched]]]).expand(3, 1, 1, 48)
    fields: dict[str, Any] = {"patched": cells, "control": torch.zeros(3, 1, 1, 0, 48), "base": base, "tuned": tuned}
    fields |= {"floor": torch.zeros(3, 1), "deviation": 0.0, "checked": 0, "sites": ("",), "heads": (4,), "choices": (0,), "rest": ()}
    fields |= {"output": "receiver", "among": "vocabulary", "unit": "u", "draw_seed": 0, "notes": ()}
    labels = {"measure": ("accuracy", "margin", "logit_diff"), "direction": ("tuned_to_base",), "cell": ("circuit",)}
    return CmapResult(**{**fields, "labels": labels, **changes})


def test_an_interval_has_a_width_where_every_answer_follows() -> None:
    whole, nothing, most = (made([1.0] * 32 + [float(x)] * 16).recovered() for x in (1, 0, 0))
    assert (float(whole.value[0]), float(whole.low[0]), float(whole.high[0])) == (1.0, *wilson(16, 16)), "16 of the 16 that differ"
    assert (float(nothing.value[0]), float(nothing.low[0]), float(nothing.high[0])) == (0.0, *wilson(0, 16))
    most = made([1.0] * 32 + [1.0] * 15 + [0.0]).recovered()
    resampled = plain_share(torch.tensor([[1.0] * 47 + [0.0]]).T, made([1.0] * 48).base[0], torch.ones(48), seed=0)
    assert float(most.low[0]) == float(resampled.low[0]) < 1 and "[0.81, 1.00]" in made([1.0] * 48).summary()
    bar: Any = made([1.0] * 48).plot().data[0]
    assert 1 - float(bar.error_y.arrayminus[0]) == pytest.approx(wilson(48, 48)[0])


def test_random_heads_are_told_in_one_unit() -> None:
    """Two draws that answer 36 and 40 of 48: 4 and 8 of the 16 that tuning gained."""
    control = torch.tensor([[[[[1.0] * k + [0.0] * (48 - k) for k in (36, 40)]]]]).expand(3, 1, 1, 2, 48)
    row = made([1.0] * 48, control=control, choices=(9,)).to_frame().iloc[0]
    assert (row.control, row.control_sd) == pytest.approx((0.375, (0.5 - 0.25) / 2**0.5)) and (row.draws, row.sets) == (2, 9)
    assert (row.control_effect, row.control_effect_sd) == pytest.approx((6 / 48, 4 / 48 / 2**0.5))
    assert "random heads 0.38 +- 0.18 (2 draws)" in made([1.0] * 48, control=control, choices=(9,)).summary()
