"""Masks over heads against the plain Hugging Face model: hooks, loss, gradient and Adam by hand; planted heads; what is refused."""

from __future__ import annotations

import math
import random
import re
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import plain_hooks
import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from torch import Tensor, nn

from interp.analyses.dcm import DCMResult, dcm
from interp.circuit import Circuit
from interp.errors import InputError
from interp.models import HookedModel, masked
from interp.models.loading import memory_fingerprint
from interp.models.masked import Masked, Mix
from interp.models.restart import Means
from interp.organisms import hand_built
from interp.prompts import PromptPairs, Prompts
from interp.sites import Heads, Site
from interp.stats import wilson
from interp.sweeps.mask_search import group_of
from interp.sweeps.masks import Schedule, Side, parts, random_subsets, trained
from interp.tasks import task

EPS = torch.finfo(torch.float32).eps

# 7 pairs, 3 layers, 4 heads (2 key/value heads), 24 = d_model; S stands elsewhere in every prompt and in its counterfactual
CLEAN = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23], [24, 25, 26, 27], [4, 9, 8, 1, 12], [6, 3, 3]]
OTHER = [[5, 4, 5, 16, 7, 8, 9, 3, 1], [10, 12], [13, 14, 25], [18, 9, 20, 21, 22, 23], [14, 25, 26, 27, 11], [2, 3, 4], [9, 8, 7, 6]]
PLACES = {"clean": (2, 0, 3, 1, 2, 3, 1), "corrupt": (6, 0, 1, 1, 3, 0, 3)}


def prompts(side: str, rows: list[list[int]]) -> Prompts:
    places = {"S": tuple((i,) for i in PLACES[side])}
    names = tuple(f"{side} {row}" for row in rows)
    return Prompts(names, tuple(map(tuple, rows)), places, answers=(4, 9, 2, 7, 30, 1, 5), distractors=(1, 5, 0, 3, 28, 6, 2))


PAIRS = PromptPairs(prompts("clean", CLEAN), prompts("corrupt", OTHER))
GROUPS = {
    "two positions": "L0H1,L1H2,L2H3@S; L1H0,L1H2,L1H3,L2H0,L2H2@END",
    "at END": "L1H0,L1H1,L2H3@END",
    "last layer": "L2H0,L2H1,L2H2,L2H3@END",
    "last layer, before END": "L2H1@S; L2H2@-2",
}
SCHEDULE = Schedule(penalty=0.002, batch=3, epochs=3, least=0, every=2)


def place(side: Prompts, site: Site, row: int) -> int:
    return side.positions[site.position][row][0] if isinstance(site.position, str) else len(side.ids[row]) + int(site.position or 0)


def by_hand(hf: nn.Module, group: list[Site], weight: Tensor, row: int, donor: nn.Module | None = None) -> Tensor:
    """Logits at END of one prompt, one forward of the whole model, z of the group mixed with the counterfactual's."""
    seen = plain_hooks.seen(donor or hf, PAIRS.corrupt.ids[row], [("z", layer) for layer in range(3)])
    with ExitStack() as stack:
        for layer in range(3):

            def change(x: Tensor, layer: int = layer) -> None:
                was = x.clone()
                for i, site in enumerate(group):
                    if site.layer == layer:
                        theirs = seen["z", layer][place(PAIRS.corrupt, site, row), site.head]
                        here = place(PAIRS.clean, site, row), site.head
                        x[here] = weight[i] * was[here] + (1 - weight[i]) * theirs

            stack.enter_context(plain_hooks.hooked(hf, "z", layer, change))
        return hf(torch.tensor([list(PAIRS.clean.ids[row])]), use_cache=False).logits[0, -1]


def trained_by_hand(hf: nn.Module, group: list[Site], target: list[int], schedule: Schedule) -> tuple[list[float], list[Tensor]]:
    """The loss before every step and the clamped mask after it."""
    mask, mean, square = torch.ones(len(group)), torch.zeros(len(group)), torch.zeros(len(group))
    losses, masks, step = [], [], 0
    for epoch in range(schedule.epochs):
        rows = list(range(len(target)))
        random.Random(f"{schedule.seed} epoch {epoch}").shuffle(rows)
        for at in range(0, len(rows), schedule.batch):
            step += 1
            mask = mask.clamp(0, 1).requires_grad_(True)
            some = rows[at : at + schedule.batch]
            loss = schedule.penalty * (1 - mask).sum() - sum(by_hand(hf, group, mask, i)[target[i]] for i in some) / len(some)
            (gradient,) = torch.autograd.grad(loss, [mask])
            losses.append(float(loss.detach()))
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            change = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            mask = mask.detach() - schedule.rate * change
            masks.append(mask.clamp(0, 1))
    return losses, masks


@pytest.fixture(scope="module", params=FOUR)
def hf(request: pytest.FixtureRequest) -> nn.Module:
    model: Any = tiny(request.param, seed=1)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def model(hf: nn.Module) -> HookedModel:
    return HookedModel.load(hf)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel.load(tiny("llama", seed=1))


def side(model: HookedModel, group: list[Site]) -> Side:
    return Side.of(model, PAIRS, model, group, "z", "corrupt")


@pytest.mark.parametrize("name", GROUPS)
def test_masked_runs_are_runs_of_the_whole_model(name: str, hf: nn.Module, model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(GROUPS[name], model.shape)
    weight = torch.rand(len(group), generator=torch.Generator().manual_seed(3))
    rows, target = [4, 0, 5, 1], torch.tensor(PAIRS.distractors)
    with torch.no_grad():
        want = torch.stack([by_hand(hf, group, weight, row) for row in rows])
        bare = torch.stack([hf(torch.tensor([CLEAN[row]]), use_cache=False).logits[0, -1] for row in rows])
    allowed = 8 * EPS * float(want.abs().max())
    assert (want - bare).abs().max() > 1e3 * allowed or name == "last layer, before END"

    def compare(runs: Masked) -> None:
        with torch.no_grad():
            assert (runs.plain(weight, rows) - want).abs().max() <= allowed
            got = runs.logit(weight, rows, target)
        assert not got.requires_grad and (got - want[torch.arange(4), target[rows]]).abs().max() <= allowed
        assert runs.top(weight, rows).tolist() == want.argmax(-1).tolist()

    usual = side(model, group).runs
    assert not usual.allowed.obstacle and usual._held is not None
    compare(usual)
    with monkeypatch.context() as little:
        little.setattr(masked, "free_bytes", lambda device: 0)
        runs = side(model, group).runs
        assert runs._held is None
        compare(runs)
    with monkeypatch.context() as exotic:
        exotic.setattr(masked, "means", lambda model: Means("it cannot"))
        compare(side(model, group).runs)
    with monkeypatch.context() as scaled:
        scaled.setattr(masked, "means", lambda model: Means(columns=False))
        compare(side(model, group).runs)


@pytest.mark.parametrize(("kind", "name"), zip(FOUR, ["two positions", "at END"] * 2, strict=True))
def test_training_is_training_with_whole_forwards(kind: str, name: str) -> None:
    hf: Any = tiny(kind, seed=1)
    hf.set_attn_implementation("eager")
    model = HookedModel.load(hf)
    group = group_of(GROUPS[name], model.shape)
    with torch.no_grad():  # targets that mixing speaks for, or every mask would stay at 1
        ends = [torch.stack([by_hand(hf, group, torch.full((len(group),), w), i) for i in range(7)]) for w in (0.0, 1.0)]
    target = (ends[0] - ends[1]).argmax(-1).tolist()
    both = replace(side(model, group), target=torch.tensor(target))
    losses, masks = trained_by_hand(hf, group, target, SCHEDULE)
    got = trained(both, both, SCHEDULE)
    assert len(losses) == 9 and got.steps.tolist() == [2, 4, 6, 8, 9]
    assert (got.loss - torch.tensor(losses)).abs().max() < 1e-4 * max(map(abs, losses)), "the loss of every step"
    ranks = []
    for step, right, size in zip(got.steps.tolist(), got.accuracy.tolist(), got.size.tolist(), strict=True):
        mask = masks[step - 1]
        rounded = (mask >= 0.5).float()
        with torch.no_grad():
            hits = [int(by_hand(hf, group, rounded, i).argmax()) == target[i] for i in range(len(PAIRS))]
        assert size == int((mask < 0.5).sum()) and right == pytest.approx(sum(hits) / len(hits))
        ranks.append((right, size, -step))
    best = -max(ranks)[2]
    assert (got.mask - masks[best - 1]).abs().max() < 1e-4 and len({m.sum().item() for m in masks}) > 5
    assert any(0.01 < float(x) < 0.99 for m in masks for x in m), "masks are not at their ends only"


def test_the_loss_falls_and_the_gradient_is_that_of_differences(llama: HookedModel) -> None:
    both = side(llama, group_of(GROUPS["two positions"], llama.shape))
    weight = torch.full((8,), 0.6, requires_grad=True)
    (gradient,) = torch.autograd.grad(both.runs.logit(weight, range(3), both.target).mean(), [weight])
    for i in (0, 1, 2, 5):
        ends = [weight.detach().clone().index_fill(0, torch.tensor(i), x) for x in (0.59, 0.61)]
        low, high = (float(both.runs.logit(w, range(3), both.target).detach().double().mean()) for w in ends)
        assert float(gradient[i]) == pytest.approx((high - low) / 0.02, abs=2e-3 * float(gradient.abs().max()))
    loss = trained(both, both, replace(SCHEDULE, batch=7, epochs=3)).loss
    assert loss[-1] < loss[0]


def test_ends_of_the_mask(hf: nn.Module, model: HookedModel) -> None:
    group = group_of("L1H2@S; L2H1@END", model.shape)
    both = side(model, group)
    plain = torch.stack([model.logits(PAIRS.clean[i], at="END")[0, int(both.target[i])] for i in range(7)])
    scale = 8 * EPS * float(model.logits(PAIRS.clean).abs().max())
    assert (both.logits(torch.ones(2)) - plain).abs().max() <= scale
    row = 3
    value = plain_hooks.seen(hf, OTHER[row], [("z", 1)])["z", 1][PLACES["corrupt"][row], 2]
    want = plain_hooks.patched(hf, CLEAN[row], [plain_hooks.Set("z", 1, 2, PLACES["clean"][row], value)])[-1, both.target[row]]
    assert abs(both.logits(torch.tensor([0.0, 1.0]))[row] - want) <= scale
    assert torch.equal(both.rounded(torch.tensor([True, False])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    "name", ["ioi", "offset_copy", pytest.param("majority", marks=pytest.mark.full), pytest.param("induction", marks=pytest.mark.full)]
)
def test_a_planted_group(name: str) -> None:
    built = hand_built(name)
    result = dcm(built.model, built.task.generate(built.model, 60, seed=1), group="heads@END", control=4)
    planted = [str(node) for node in built.circuit.nodes if node.component == "z" and node.position == "END"]
    assert list(result.chosen) == planted and result.accuracy > 0.97 and result.floor == 0 and result.ceiling > 0.97
    assert result.random_heads.min() < 0.1 and result.p_value < 2e-3 and result.change[0] > 0.5
    assert [str(n) for n in result.circuit.check(built.model.shape).nodes] == planted and result.heads == result.circuit.heads()
    assert all(1 - score < 0.5 for score in result.circuit.scores.values())


def test_a_planted_chain_over_two_positions() -> None:
    built = hand_built("ioi")
    result = dcm(built.model, built.task.generate(built.model, 80, seed=1), group="heads@S2; heads@END", ties="fewer", control=0)
    assert set(result.chosen) <= {str(n) for n in built.circuit.nodes} and result.accuracy > 0.97
    assert not len(result.control) and set(result.figures()) == {"", "Mask at S2", "Mask at END", "Training"}


def test_nothing_is_found_where_nothing_carries_it() -> None:
    built = hand_built("ioi")
    idle = Heads.of([*(h for g in (built.decoys, built.bystanders) for h in g.groups[0].heads)], "END")
    result = dcm(built.model, built.task.generate(built.model, 60, seed=1), group=idle)
    assert result.chosen == () and result.heads is None and not result.circuit.nodes and result.strongest() is None
    assert result.accuracy == result.floor == result.ceiling == 0 and result.alone.shape[0] == result.control.shape[0] == 0
    assert result.summary().startswith("0 of 6 heads are selected: no mask beat doing nothing on the ")
    why = result.why_none(0)
    assert set(result.to_frame().why_none) == {why} and "0.0%, 0.0% with nothing mixed in" in why
    titles = [figure.layout.title.text.replace("<br>", " ") for figure in result.figures().values()]
    assert any("none is selected: no mask beat doing nothing" in t for t in titles) and not any("selected above" in t for t in titles)
    # The mask may be far below one half all the same: then the table says what else was asked of it.
    low = replace(result, mask=torch.full_like(result.mask, 0.25))
    assert set(low.to_frame().why_none) == {why} and not low.to_frame().selected.any()
    idle_mask = replace(result, validation=result.validation + 0.5)
    assert "mixes no head by more than one half" in idle_mask.why_none(0)
    assert result.plot() is not None and len(result.to_frame()) == 6


def test_what_a_result_says() -> None:
    built = hand_built("ioi")
    pairs = built.task.generate(built.model, 80, seed=1)
    result = dcm(built.model, pairs, group="heads@END", penalties=(100.0, 0.01, 1.0), control=3)
    assert result.labels["penalty"] == ("0.01", "100", "1") and result.selected.sum(1).tolist() == [3, 0, 1]
    low, high = wilson(int(result.hit[0].sum()), len(result.nothing))
    assert result.interval == (low, high) and f"[{low:.1%}, {high:.1%}]" in result.summary()
    assert "3 of 24 heads (L2H0@END, L2H1@END, L3H2@END)" in result.summary() and "the model answers 100% of" in result.summary()
    assert result.split == tuple(map(len, parts(pairs, 0))) and sum(result.split) == 80
    frame = result.to_frame()
    assert len(frame) == 72 and frame[frame.penalty == 0.01].selected.sum() == 3
    assert frame[frame.penalty == 100].accuracy.unique().tolist() == [0.0]
    per = result.to_frame(per="prompt")
    assert len(per) == result.split[2] and per.hit.mean() == result.accuracy and "alone L3H2.z@END" in per
    table = result.strongest(2)
    assert table is not None and table.site[0] == "L3H2.z@END" and table.recovered[0] > table.recovered[1] and len(table) == 2
    with pytest.raises(InputError, match="per must be"):
        result.to_frame(per="head")
    assert isinstance(result, DCMResult) and result.checked == 8 and result.deviation < 1e-4


def test_a_share_is_of_what_all_selected_heads_do() -> None:
    built = hand_built("offset_copy")
    result = dcm(built.model, built.task.generate(built.model, 24, seed=1), group="L1H4,L2H1@END", control=0)
    assert torch.equal(result.alone[0], result.goal) and float(result.recovered.value[0]) == 1.0


def test_parts_share_no_context() -> None:
    model = hand_built("ioi").model
    pairs = hand_built("ioi").task.generate(model, 90, seed=2)
    found = parts(pairs, 5)
    contexts = [{*p.clean.contexts, *p.corrupt.contexts} for p in found]
    assert not contexts[0] & contexts[1] | contexts[0] & contexts[2] | contexts[1] & contexts[2]
    assert sum(map(len, found)) == 90 and [len(p) for p in found] == [len(p) for p in parts(pairs, 5)]
    assert [p.clean.texts for p in parts(pairs, 6)] != [p.clean.texts for p in found]
    # A counterfactual that is another pair's clean prompt ties the two together.
    tied = [f"c{i}" for i in range(7)]
    turned = PromptPairs(replace(PAIRS.clean, contexts=tuple(tied)), replace(PAIRS.corrupt, contexts=(*tied[1:4], *tied[3:])))
    with pytest.raises(InputError, match=r"7 pairs of 7 contexts, tied together into 4 by their counterfactuals; a mask takes at least 6"):
        parts(turned, 0)
    result = dcm(model, pairs, group="L3H2,L3H3@END", control=0, seed=5)
    assert set(result.contexts) == contexts[0] | contexts[1] and set(result.circuit.contexts) == set(result.contexts)


def test_random_subsets() -> None:
    def chosen(n: int, k: int) -> Tensor:
        return torch.arange(n) < k

    found, there = random_subsets(chosen(9, 4), 6, 0)
    assert [int(s.sum()) for s in found] == [4] * 6 and len({tuple(s.tolist()) for s in found}) == 6 and there == math.comb(9, 4) - 1
    assert random_subsets(chosen(9, 0), 6, 0) == ([], 0) == random_subsets(chosen(9, 9), 6, 0)
    found, there = random_subsets(chosen(12, 11), 10, 0)  # no two alike, and none is the selection
    assert len({tuple(s.tolist()) for s in found}) == 10 and there == 11 and all(bool(s[11]) for s in found)
    assert len(random_subsets(chosen(3, 2), 10, 0)[0]) == 2


def test_few_random_heads_are_told() -> None:
    built = hand_built("ioi")
    pairs = built.task.generate(built.model, 60, seed=1)
    result = dcm(built.model, pairs, group="L2H0,L2H1,L3H2,L3H3@END", control=10)
    assert len(result.chosen) == 3 and result.choices == 3 == len(result.control)
    assert (
        "with as many random ones (all 3 sets there are)" in result.summary() and "there are 3 other sets in the group" in result.summary()
    )
    every = dcm(built.model, pairs, group="L2H0,L2H1,L3H2@END", control=10)
    assert len(every.chosen) == 3 and every.choices == 0 and "the whole group is selected, and there is no other set" in every.summary()


def test_a_group_of_a_circuit_and_contexts_it_has_not_seen() -> None:
    built = hand_built("ioi")
    pairs = built.task.generate(built.model, 60, seed=1)
    found = replace(built.circuit, prompts=None, contexts=("elsewhere",))
    role = found.roles[Site("z", 3, 2, "END")]
    own = dcm(built.model, pairs, found, group=role, control=0)
    assert list(own.labels["head"]) == [str(n) for n in found.nodes if found.roles.get(n) == role and n.component == "z"]
    assert list(dcm(built.model, pairs, found, control=0).labels["head"]) == [str(n) for n in found.nodes if n.component == "z"]
    assert dcm(built.model, pairs, found, group="L3H2,L3H3@END", control=0).labels["head"] == ("L3H2.z@END", "L3H3.z@END")
    with pytest.raises(InputError, match=r"the circuit was found on these prompts \(1 of their contexts"):
        dcm(built.model, pairs, replace(found, contexts=pairs.contexts[:1]), group=role)
    with pytest.raises(InputError, match="the circuit is of a model with"):
        dcm(built.model, pairs, Circuit((1, 2, 2), (Site("z", 0, 0, "END"),)))


def test_counterfactuals_that_ask_for_nothing_are_refused() -> None:
    model = HookedModel.load("base")
    pairs = task("boxes(corrupt=absent)").generate(model, 12, seed=0)
    with pytest.raises(InputError, match="of boxes.corrupt=absent. have no answer, .* take corrupt=object, label or position"):
        dcm(model, pairs)
    with pytest.raises(InputError, match="the counterfactuals have no answer, .* take counterfactuals that have one"):
        dcm(model, replace_pairs(pairs))


def replace_pairs(pairs: Any) -> PromptPairs:
    """The same without their task."""
    return PromptPairs(replace(pairs.clean, task="", seed=None), replace(pairs.corrupt, task="", seed=None))


def test_the_default_group(llama: HookedModel) -> None:
    assert group_of(None, llama.shape) == [Site("z", layer, head, "END") for layer in (1, 2) for head in range(4)]
    assert group_of("L0H1,L2.z@S; L1H1", llama.shape)[-1] == Site("z", 1, 1, "END")
    assert len(group_of("L0H1,L2.z@S; L1H1", llama.shape)) == 6


def test_few_pairs_are_seen_often_enough(llama: HookedModel) -> None:
    both = Side.of(llama, PAIRS[[1, 6]], llama, group_of("L1H0", llama.shape), "z", "corrupt")
    assert len(trained(both, both, Schedule()).loss) == 16 and len(trained(both, both, Schedule(least=5)).loss) == 5
    assert len(trained(both, both, Schedule(least=5, batch=1)).loss) == 6, "whole epochs"


@pytest.mark.filterwarnings("ignore:the model answers")
def test_the_model_leaves_as_it_came(model: HookedModel) -> None:
    source = model.wrapped.source
    source.requires_grad_(True)
    list(source.parameters())[0].requires_grad_(False)
    flags, print_ = [p.requires_grad for p in source.parameters()], memory_fingerprint(source)
    result = dcm(model, PAIRS, group="L1H0,L1H1,L2H3@END; L1H2@S", batch=3, control=2)
    assert not result.mask.requires_grad
    assert [p.requires_grad for p in source.parameters()] == flags and memory_fingerprint(source) == print_
    assert all(p.grad is None for p in source.parameters())
    assert all(not point.fwd_hooks for point in model.wrapped.bridge.hook_dict.values())


def test_a_model_at_chance_is_told_before_the_search(llama: HookedModel) -> None:
    with pytest.warns(UserWarning, match=r"the model answers 0% of 4 clean prompts rightly, no better than a guess"):
        result = dcm(llama, PAIRS, group="L1H0@END")
    assert "answers the clean prompts no better than a guess" in result.summary()


def test_refusals(llama: HookedModel) -> None:
    def refused(match: str, given: Any = PAIRS, **settings: Any) -> None:
        with pytest.raises(InputError, match=match):
            dcm(llama, given, **settings)

    same = replace(PAIRS.clean, distractors=(4, 9, *(PAIRS.distractors or ())[2:]))
    refused("in 2 of 7 pairs the target is the clean answer", given=PromptPairs(same, PAIRS.corrupt))
    refused("these pairs have none", given=PromptPairs(replace(PAIRS.clean, distractors=None), PAIRS.corrupt))
    refused("these are 5 pairs of 5 contexts; a mask takes at least 6 apart", given=PAIRS[:5])
    refused("L9H1.z@END: layer 9 is out of range", group="L9H1")
    refused("L1H7.z@END: head 7 is out of range; the model has heads 0 to 3", group="L1H7@END")
    refused("no position 'X'", group="L1H1@X")
    refused("L1.mlp_out in the group is no head", group="L1.mlp_out")
    refused("'L1' in a group is neither a head", group="L1")
    refused(re.escape("L1H1.z@END and L1H1.z@-1 are the same head at the same token"), group="L1H1@END; b=L1H1@-1")
    refused("penalty is -1, expected a number from 0", penalty=-1)
    refused("penalty is nan", penalty=0.1, penalties=(math.nan,))
    refused("rate is 0, expected a number above 0", rate=0)
    refused("batch is 0, expected at least 1", batch=0)
    refused("epochs is 1.5", epochs=1.5)
    refused("no ties named 'most'", ties="most")
    refused("control is a number of draws, but it is -1", control=-1)
    with pytest.raises(InputError, match="there are 7 prompts and 3 to take activations from"):
        Mix.of(llama, llama.batch(PAIRS.clean), llama, llama.batch(PAIRS.corrupt[:3]), group_of("L1H1", llama.shape))


@pytest.mark.parametrize("kind", ["object", "label", "position"])
def test_desiderata_of_boxes(kind: str) -> None:
    for n_boxes in (3, 7, 11):
        for e in task("boxes", n_boxes=n_boxes, corrupt=kind).examples(200, seed=4):
            (boxes, query), (other, asked) = parsed(e.text), parsed(e.corrupt.text)
            where, there = list(boxes).index(query), list(other).index(asked)
            assert where != there and e.answer[1:] == boxes[query] and e.corrupt.answer[1:] == other[asked]
            assert not set(boxes.values()) & set(other.values()) and e.distractor != e.answer
            shared = set(boxes) & set(other)
            if kind == "object":
                assert e.distractor == e.corrupt.answer and not shared
            elif kind == "position":
                assert e.distractor[1:] == list(boxes.values())[there] and not shared
            else:
                assert e.distractor[1:] == boxes[asked] and shared == {asked}
                assert e.distractor[1:] != list(boxes.values())[there], "label and position say different things"


def parsed(text: str) -> tuple[dict[str, str], str]:
    listed, question = text.split(". ")
    found = re.findall(r"[Tt]he (\w+) is in Box ([A-Z])", listed)
    return {label: thing for thing, label in found}, question.split()[1]


def test_desiderata_read_back_and_refuse() -> None:
    assert str(task("boxes(corrupt=label, n_boxes=4)")) == "boxes(n_boxes=4, corrupt=label)"
    with pytest.raises(InputError, match="n_boxes is 2, expected 3 to 11 with corrupt=label"):
        task("boxes(corrupt=label, n_boxes=2)")
