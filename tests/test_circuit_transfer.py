"""Circuits of two models in both of them, against plain Hugging Face models with every knocked-out head set by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import plain_hooks
import pytest
import test_cross_patching
import torch
from test_cmap import answered, measured, small
from test_cross_patching import EPS, PROMPTS
from torch import Tensor, nn

from interp.analyses.circuit_transfer import CircuitTransferResult, circuit_transfer
from interp.circuit import Circuit, Ranking
from interp.errors import InputError
from interp.metrics import Metric
from interp.models import HookedModel, ModelPair
from interp.organisms import hand_built
from interp.prompts import Prompts
from interp.sites import Site
from interp.stats import mcnemar, wilson
from interp.sweeps.draws import unread
from interp.sweeps.knockouts import other_circuits

world = test_cross_patching.world

A = {"reads": ("L0H1.z@S", "L0H3.z@S"), "writes": ("L2H0.z@END", "L1H2.z@END"), "all": "L1H0.z"}
B = {"reads": ("L0H1.z@S", "L1H3.z@S"), "writes": ("L2H0.z@END", "L1H1.z@END", "L2H3.z@END")}
KV = {"gpt2": 4, "neox": 4, "llama": 2, "qwen2": 2}


def circuits(kind: str) -> tuple[Circuit, Circuit]:
    first = {"everywhere" if role == "all" else role: nodes for role, nodes in A.items()}
    return Circuit.of((3, 4, KV[kind]), first), Circuit.of((3, 4, KV[kind]), B)


def by_hand(hf: nn.Module, prompts: Prompts, row: int, kept: tuple[Site, ...], stand_in: list[Tensor]) -> Tensor:
    """Logits at END of one prompt, every head at every token that is not kept set to what stands in, [layer][pos head d]."""
    ids, sets = prompts.ids[row], []
    for layer in range(3):
        for head in range(4):
            for pos in range(len(ids)):
                places = {None, *(name for name, where in prompts.positions.items() if pos in where[row])}
                if not any((n.layer, n.head) == (layer, head) and n.position in places for n in kept):
                    sets.append(plain_hooks.Set("z", layer, head, pos, stand_in[layer][pos, head]))
    return plain_hooks.patched(hf, ids, sets)[-1]


def test_every_circuit_in_every_model_against_plain_hooks(world: Any) -> None:
    """With zeros, and with means over prompts of one length."""
    kind, base, tuned, pair = world
    first, second = circuits(kind)
    prompts = answered(base, tuned)
    level = replace(
        prompts, ids=tuple(row[-3:] for row in prompts.ids), positions={"S": tuple((i % 2,) for i in range(5))}, texts=tuple("abcde")
    )
    level = replace(level, contexts=tuple("abcde"))
    for asked, ablation in ((prompts, "zero"), (level, "mean")):
        found = circuit_transfer(pair, asked, first, second, ablation=ablation, random_circuits=2, seed=1)  # type: ignore[arg-type]
        assert found.labels["circuit"] == ("base", "tuned", "shared") and found.labels["side"] == ("base", "tuned")
        kept = [first.nodes, second.nodes, tuple(n for n in first.nodes if n in second.nodes)]
        nobody = unread(pair.batch(asked), [*kept[0], *kept[1]], [Metric.parse("logit_diff")])
        for s, hf in enumerate((base, tuned)):
            seen = [plain_hooks.seen(hf, ids, [("z", i) for i in range(3)]) for ids in asked.ids]
            for row in range(5):
                stand_in = [torch.zeros_like(seen[row]["z", i]) for i in range(3)]
                if ablation == "mean":
                    stand_in = [torch.stack([own["z", i] for j, own in enumerate(seen) if j != row]).mean(0) for i in range(3)]
                runs = [(kept[c], found.circuit[:, c, s, row]) for c in range(3)]
                runs += [((), found.empty[:, s, row])]
                runs += [(other_circuits(kept[1], kept[1], pair.shape, 2, 1, nobody)[1], found.random[:, 1, s, 1, row])]
                for nodes, values in runs:
                    logits = by_hand(hf, asked, row, nodes, stand_in)
                    want = torch.tensor(measured(logits, asked.answers[row], asked.distractors[row]))  # type: ignore[index]
                    assert (values - want).abs().max() <= 2 * 8 * EPS * max(1.0, float(logits.abs().max())), (s, row)
                with torch.no_grad():
                    logits = hf(torch.tensor([list(asked.ids[row])])).logits[0, -1]
                want = torch.tensor(measured(logits, asked.answers[row], asked.distractors[row]))  # type: ignore[index]
                assert (found.full[:, s, row] - want).abs().max() <= 8 * EPS * 4
        assert bool(found.random[:, 2].isnan().all()) and not bool(found.random[:, :2].isnan().any())


def test_prompts_that_nothing_stands_in_for_are_left_out_and_told(world: Any) -> None:
    kind, base, tuned, pair = world
    level = replace(
        answered(base, tuned),
        ids=tuple(row[-3:] for row in answered(base, tuned).ids),
        positions={"S": tuple((i % 2,) for i in range(5))},
        texts=tuple("abcde"),
        contexts=tuple("abcde"),
        tags={"template": ("one", "two", "one", "one", "one")},
    )
    most, four = (circuit_transfer(pair, some, *circuits(kind), random_circuits=0) for some in (level, level[[0, 2, 3, 4]]))
    assert most.full.shape[2] == four.full.shape[2] == 4
    torch.testing.assert_close(most.circuit, four.circuit, atol=1e-5, rtol=0)
    said = "1 of 5 prompts left out: no other stands in for them"
    assert said in most.notes and said in most.summary() and not any("left out" in note for note in four.notes)
    with pytest.raises(InputError, match="of 2 there are 0"):
        circuit_transfer(pair, level[:2], *circuits(kind), random_circuits=0)


def test_overlap_is_counted_by_role_and_position() -> None:
    pair, prompts = small()
    first, second = circuits("llama")
    found = circuit_transfer(pair, prompts, first, second, ablation="zero", random_circuits=0)
    table = found.overlap().set_index("role")
    assert table.loc["reads", ["base", "tuned", "shared"]].tolist() == [2, 2, 1]
    assert table.loc["writes", ["base", "tuned", "shared"]].tolist() == [2, 3, 1]
    assert table.loc["everywhere", ["base", "tuned", "shared"]].tolist() == [1, 0, 0]
    assert table.loc["all", ["base", "tuned", "shared"]].tolist() == [5, 5, 2] and table.loc["all", "share_of_base"] == 0.4
    assert table.loc["writes", "chance"] == pytest.approx(2 * 3 / 12) and table.loc["all", "chance"] == pytest.approx((4 + 6) / 12)
    assert "2 of the 5 heads of base's circuit are among the 5 of tuned's, chance 0.83, p = " in found.summary()
    # at S two heads of twelve each, at END two and three, everywhere one and none
    at_s, at_end = ([math.comb(2, i) * math.comb(10, k - i) / math.comb(12, k) for i in range(3)] for k in (2, 3))
    two_or_more = sum(at_s[i] * at_end[j] for i in range(3) for j in range(3) if i + j >= 2)
    assert table.loc["all", "p"] == pytest.approx(two_or_more) and table.loc["everywhere", "p"] == 1


def test_a_head_chosen_for_two_roles_is_one_head() -> None:
    pair, prompts = small()
    first, second = circuits("llama")
    twice = {"reads": Ranking({}, tuple(n for n in second.nodes if n.position == "S")), "writes": Ranking({}, second.nodes)}
    found = circuit_transfer(pair, prompts, first, replace(second, rankings=twice), ablation="zero", random_circuits=0)
    assert int(found.size_tuned[-1]) == len(second.nodes) == int(found.size_tuned[:-1].sum())


def test_random_circuits_are_different_ones() -> None:
    pair, prompts = small()
    most = Circuit((3, 4, 2), tuple(Site("z", i, h, "END") for i in range(3) for h in range(4) if (i, h) not in ((0, 0), (2, 1))))
    lone = Circuit((3, 4, 2), (Site("z", 1, 1, "END"), *(Site("z", 2, h, "S") for h in range(4))))
    few = Circuit((3, 4, 2), tuple(Site("z", i, h, "END") for i in range(3) for h in range(4) if i + h < 3))  # 6 of 12: one other set
    found = circuit_transfer(pair, prompts, few, lone, ablation="zero", random_circuits=4)
    assert (~found.random[0, 0, 0, :, 0].isnan()).sum() == 1 and "only 1 different random circuit like base's" in found.notes
    assert len({tuple(x) for x in found.random[2, 1, 0].tolist()}) == 4
    row = found.to_frame().query("circuit == 'base' and side == 'base' and measure == 'accuracy'").iloc[0]
    assert row.draws == 1 and row.random == row.random and row.random_sd != row.random_sd
    none = circuit_transfer(pair, prompts, most, lone, ablation="zero", random_circuits=1)
    assert "no random circuits like base's" in none.notes[-1]


def test_an_interval_has_a_width_where_all_prompts_are_alike() -> None:
    pair, prompts = small()
    every = Circuit((3, 4, 2), tuple(Site("z", i, h) for i in range(3) for h in range(4)))
    found = circuit_transfer(pair, prompts, every, circuits("llama")[1], ablation="zero", random_circuits=0)
    ratio, right = found.ratio("base", "tuned"), int(found.full[0, 1].sum())
    assert float(ratio.value) == 1 and (float(ratio.low), float(ratio.high)) == wilson(right, right)


def test_the_whole_model_as_a_circuit_is_the_model_and_equal_circuits_do_alike() -> None:
    pair, prompts = small()
    every = Circuit((3, 4, 2), tuple(Site("z", i, h) for i in range(3) for h in range(4)))
    _, some = circuits("llama")
    found = circuit_transfer(pair, prompts, every, some, ablation="zero", random_circuits=1)
    assert torch.equal(found.circuit[:, 0], found.full) and found.labels["circuit"] == ("base", "tuned")
    assert bool(found.random[:, 0].isnan().all()) and "no random circuits like base's" in found.notes[-1]
    assert float(found.ratio("base", "tuned").value) == 1
    same = circuit_transfer(pair, prompts, some, some, ablation="zero", random_circuits=1)
    assert torch.equal(same.circuit[:, 0], same.circuit[:, 1]) and torch.equal(same.difference("tuned"), torch.zeros(5))
    assert int(same.shared[-1]) == int(same.size_base[-1]) == 5 and same.labels["circuit"] == ("base", "tuned")
    into_itself = circuit_transfer(ModelPair(pair.base, pair.base), prompts, some, some, ablation="zero", random_circuits=0)
    assert torch.equal(into_itself.circuit[:, :, 0], into_itself.circuit[:, :, 1])


def test_a_hand_built_circuit_works_in_its_model_and_bystanders_do_not() -> None:
    built = hand_built("ioi")
    prompts = built.task.generate(built.model, 10, seed=0)
    others = Circuit(
        (built.model.shape.n_layers, built.model.shape.n_heads, built.model.shape.n_kv_heads), tuple(built.bystanders.sites("z"))
    )
    own = replace(built.circuit, contexts=(), prompts=None)
    found: CircuitTransferResult = circuit_transfer(
        ModelPair(built.model, built.model), prompts, own, others, ablation="mean", by="order", random_circuits=3
    )
    rows = found.to_frame().query("measure == 'accuracy' and side == 'tuned'").set_index("circuit")
    assert rows.loc["base", "value"] == 1 == rows.loc["base", "full"] and rows.loc["base", "gained"] == 0 == rows.loc["base", "lost"]
    assert rows.loc["tuned", "value"] < 0.5 and rows.loc["base", "random"] < 0.6
    lost = int(rows.loc["tuned", "lost"])
    assert lost >= 5 and rows.loc["tuned", "p_mcnemar"] == mcnemar(0, lost)
    assert len(found.to_frame("prompt")) == 3 * 2 * 4 * 10 and list(found.figures()) == ["accuracy", "logit_diff", "overlap"]


@pytest.mark.parametrize(
    ("which", "given", "said"),
    [
        (0, Circuit.of((3, 4, 4), {"a": "L0H1.z@END"}), "the circuit is of a model with"),
        (1, Circuit((3, 4, 2), ()), "tuned's circuit has no attention heads"),
        (1, Circuit.of((3, 4, 2), {"a": "L0H1.z@IO"}), "IO"),
        (0, Circuit.of((3, 4, 2), {"all": "L0H1.z@END"}), "rename the role"),
        (1, replace(Circuit.of((3, 4, 2), {"a": "L0H1.z@END"}), contexts=PROMPTS.contexts[:2]), "tuned's circuit was found on these"),
    ],
)
def test_bad_circuits(which: int, given: Circuit, said: str) -> None:
    pair, prompts = small()
    both = [*circuits("llama")]
    both[which] = given
    with pytest.raises(InputError) as error:
        circuit_transfer(pair, prompts, *both, ablation="zero")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"random_circuits": -1}, "number of draws"),
        ({"ablation": "zero", "by": "template"}, "by=template would not be used"),
        ({"ablation": "mean", "by": "all"}, "3 to 7 tokens"),
        ({"ablation": "zero", "metric": "kl"}, "compares with another run"),
        ({"ablation": "zero", "among": "options"}, "at least two options"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    pair, prompts = small()
    with pytest.raises(InputError) as error:
        circuit_transfer(pair, prompts, *circuits("llama"), **settings)
    assert said in str(error.value)


def test_one_prompt_is_too_few() -> None:
    pair, prompts = small()
    with pytest.raises(InputError, match="at least two prompts"):
        circuit_transfer(pair, prompts[:1], *circuits("llama"))
    assert isinstance(pair.base, HookedModel)
