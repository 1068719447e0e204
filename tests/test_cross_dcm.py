"""Masks over heads that are mixed with another model's, against two plain Hugging Face models with hooks written by hand."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import peft
import plain_hooks
import pytest
import torch
from test_dcm import GROUPS, PAIRS, place
from tiny_checkpoints import FOUR, tiny
from torch import Tensor, nn

from interp.analyses.cross_dcm import cross_dcm
from interp.analyses.dcm import dcm
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.organisms import hand_built
from interp.organisms.handmade import HandBuilt
from interp.prompts import PromptPairs
from interp.sites import Site
from interp.sweeps.mask_search import group_of
from interp.sweeps.masks import Side

EPS = torch.finfo(torch.float32).eps


def plain(kind: str, seed: int) -> Any:
    model: Any = tiny(kind, seed=seed)
    model.set_attn_implementation("eager")
    return model


def output_weight(hf: Any, layer: int) -> Tensor:
    """W_O, [head * d_head, d_model]."""
    if hasattr(hf, "transformer"):
        return hf.transformer.h[layer].attn.c_proj.weight
    return (hf.gpt_neox.layers[layer].attention.dense if hasattr(hf, "gpt_neox") else hf.model.layers[layer].self_attn.o_proj).weight.T


def by_hand(receiver: nn.Module, sender: nn.Module, group: list[Site], weight: Tensor, row: int, output: str, source: str) -> Tensor:
    """Logits at END of one clean prompt in one model, its heads mixed with what the other has on a source prompt."""
    theirs = PAIRS.corrupt if source == "corrupt" else PAIRS.clean
    seen = plain_hooks.seen(sender, theirs.ids[row], [("z", layer) for layer in range(3)])
    with torch.no_grad(), ExitStack() as stack:
        for layer in range(3):
            here = [(weight[i], s.head, place(PAIRS.clean, s, row), place(theirs, s, row)) for i, s in enumerate(group) if s.layer == layer]
            own: list[Tensor] = []

            def mix(x: Tensor, layer: int = layer, here: list[Any] = here, own: list[Tensor] = own) -> None:
                own.append(x.clone())
                for w, head, pos, there in here if output == "receiver" else []:
                    x[pos, head] = w * x[pos, head] + (1 - w) * seen["z", layer][there, head]

            def add(x: Tensor, layer: int = layer, here: list[Any] = here, own: list[Tensor] = own) -> None:
                z = own.pop()
                mine, them = (output_weight(hf, layer).reshape(4, z.shape[-1], -1) for hf in (receiver, sender))
                for w, head, pos, there in here if output == "sender" else []:
                    x[pos] += (1 - w) * (seen["z", layer][there, head] @ them[head] - z[pos, head] @ mine[head])

            stack.enter_context(plain_hooks.hooked(receiver, "z", layer, mix))
            stack.enter_context(plain_hooks.hooked(receiver, "attn_out", layer, add))
        return receiver(torch.tensor([list(PAIRS.clean.ids[row])]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("output", ["receiver", "sender"])
def test_masked_runs_are_runs_of_two_plain_models(kind: str, output: str) -> None:
    base, tuned = plain(kind, 1), plain(kind, 2)
    pair, rows = ModelPair(HookedModel.load(base), HookedModel.load(tuned)), [4, 0, 5, 1]
    component: Any = "z" if output == "receiver" else "result"
    group = group_of(GROUPS["two positions"], pair.shape)
    weight = torch.rand(len(group), generator=torch.Generator().manual_seed(3))
    for source in ("corrupt", "clean"):
        want = torch.stack([by_hand(base, tuned, group, weight, row, output, source) for row in rows])
        side = Side.of(pair.base, PAIRS, pair.tuned, group, component, source)
        target = PAIRS.distractors if source == "corrupt" else PAIRS.answers
        assert target is not None and side.target.tolist() == list(target)
        assert not side.runs.allowed.obstacle
        allowed = 2 * 8 * EPS * float(want.abs().max())
        with torch.no_grad():
            got = side.runs.logit(weight, rows, side.target)
            assert (side.runs.plain(weight, rows) - want).abs().max() <= allowed
        assert (got - want[torch.arange(4), side.target[rows]]).abs().max() <= allowed
        assert side.runs.top(weight, rows).tolist() == want.argmax(-1).tolist()


def broken(built: HandBuilt, matrix: str, heads: list[tuple[int, int]]) -> ModelPair:
    """The hand-built model as tuned, and as base one whose heads write or read nothing."""
    hf: Any = copy.deepcopy(built.model.wrapped.source)
    d = built.model.shape.d_head
    with torch.no_grad():
        for layer, head in heads:
            here = slice(head * d, (head + 1) * d)
            if matrix == "W_O":
                hf.model.layers[layer].self_attn.o_proj.weight[:, here] = 0
            else:
                hf.model.layers[layer].self_attn.v_proj.weight[here] = 0
    return ModelPair(HookedModel.load(hf, tokenizer=built.model.tokenizer), built.model)


def test_the_head_that_base_lacks() -> None:
    built = hand_built("offset_copy")
    prompts: Any = built.task.generate(built.model, 300, seed=0)
    prompts = prompts[[i for i, ids in enumerate(prompts.clean.ids) if len(ids) == 12]]  # prompts of one length go on together
    group = "L0H0,L0H2,L1H4,L2H0,L2H1,L2H2@END"
    reads = broken(built, "W_V", [(2, 1)])  # W_O is there: its z from tuned is what base lacks
    for found in (
        cross_dcm(reads, prompts, source="clean", group=group, control=2),
        cross_dcm(reads, prompts.clean, source="clean", group=group, output="sender", control=2),
        cross_dcm(reads, prompts, group=group, control=2),  # of the counterfactual
    ):
        assert found.chosen == ("L2H1.z@END",) and found.accuracy == 1 and found.floor < 0.2 and found.ceiling == 1
        assert "in base; n = " in found.summary() and "tuned answers 100% of" in found.summary()
    writes = broken(built, "W_O", [(2, 1)])
    mute = cross_dcm(writes, prompts, source="clean", group=group)
    assert mute.chosen == () and mute.accuracy == mute.floor, "base does not write it"
    loud = cross_dcm(writes, prompts, source="clean", group=group, output="sender")
    assert loud.chosen == ("L2H1.z@END",) and loud.accuracy == 1
    back = cross_dcm(reads, prompts, source="clean", group=group, direction="base_to_tuned")
    assert back.chosen == () and back.floor == 1, "nothing of base makes tuned better"


def test_a_model_with_itself_is_one_model() -> None:
    built = hand_built("ioi")
    prompts = built.task.generate(built.model, 100, seed=0)
    assert isinstance(prompts, PromptPairs)
    one, two = dcm(built.model, prompts, control=2), cross_dcm(ModelPair(built.model, built.model), prompts, control=2)
    for name in ("mask", "loss", "hit", "goal", "alone", "control", "validation"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert two.chosen == one.chosen and two.told() == "z of tuned on the counterfactual in base"


@pytest.mark.filterwarnings("ignore:(base|tuned) answers")
def test_an_adapter_is_its_merged_folder(tmp_path: Any) -> None:
    adapted: Any = peft.get_peft_model(tiny("llama", seed=1), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny("llama", seed=1).save_pretrained(tmp_path / "base")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    pairs = [ModelPair.load(tmp_path / "base", tmp_path / name) for name in ("adapter", "merged")]
    group = group_of("L1H0,L1H2,L2H1", pairs[0].shape)
    runs = Side.of(pairs[0].base, PAIRS, pairs[0].tuned, group, "z", "corrupt").runs
    with torch.no_grad():  # targets that mixing speaks for, or the mask would stay at 1
        target = (runs.plain(torch.zeros(3), range(7)) - runs.plain(torch.ones(3), range(7))).argmax(-1)
    prompts = PromptPairs(replace(PAIRS.clean, answers=None, distractors=tuple(target.tolist())), PAIRS.corrupt)
    for output in ("receiver", "sender"):
        one, two = (cross_dcm(pair, prompts, group="L1H0,L1H2,L2H1", output=output, penalty=0.001, control=2) for pair in pairs)
        scale = float(pairs[0].base.logits(PAIRS.clean).abs().max())
        assert (one.loss - two.loss).abs().max() <= 1e-4 * scale and (one.mask - two.mask).abs().max() <= 1e-3
        assert one.loss.std() > 1e-3 and one.chosen == two.chosen


def test_only_the_sender_is_asked_where_both_read_the_same_prompts(recwarn: pytest.WarningsRecorder) -> None:
    built = hand_built("offset_copy")
    prompts: Any = built.task.generate(built.model, 60, seed=0)
    reads = broken(built, "W_V", [(2, 1)])
    found = cross_dcm(reads, prompts, source="clean", group="L2H0,L2H1@END", control=0)
    assert found.solved.startswith("tuned answers 100% of") and "base answers" not in found.solved
    assert not any("may be no variable" in str(w.message) for w in recwarn) and "may be no variable" not in found.summary()
    back = cross_dcm(reads, prompts, source="clean", group="L2H0,L2H1@END", direction="base_to_tuned", control=0)
    assert back.solved.startswith("base answers ")
    with pytest.raises(InputError, match="the circuit was found on these prompts"):
        cross_dcm(reads, prompts, replace(built.circuit, prompts=None, contexts=prompts.contexts[:2]))


def test_refusals() -> None:
    pair = ModelPair(*(HookedModel.load(tiny("llama", seed=i)) for i in (1, 2)))

    def refused(match: str, given: Any = PAIRS, **settings: Any) -> None:
        with pytest.raises(InputError, match=match):
            cross_dcm(pair, given, **settings)

    refused("no direction named 'base_to_tune'; nearest: base_to_tuned", direction="base_to_tune")
    refused("no output named 'sending'", output="sending")
    refused("no source named 'noise'", source="noise")
    refused("takes PromptPairs, not Prompts", given=PAIRS.clean)
    refused("source=clean asks for the answers", given=replace(PAIRS.clean, answers=None), source="clean")
    refused("L9H1.z@END: layer 9 is out of range", group="L9H1")
    same = PromptPairs(replace(PAIRS.clean, distractors=PAIRS.answers), PAIRS.corrupt)
    refused("in 7 of 7 pairs the target is the clean answer", given=same)
