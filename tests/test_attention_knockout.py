"""Blocked attention layer by layer, against plain Hugging Face models that are handed masks of their own."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import test_cross_patching
import torch
from test_attention_edit import masked
from test_cmap import answered, measured, small
from test_cross_patching import EPS, PROMPTS
from torch import Tensor, nn

from interp.analyses.attention_knockout import attention_knockout
from interp.errors import InputError
from interp.models import ModelPair
from interp.organisms import hand_built
from interp.prompts import Prompts
from interp.stats import mcnemar, paired_change

world = test_cross_patching.world

PLACES = {"S": PROMPTS.positions["S"], "set": ((0, 3), (0, 1), (1, 3), (2, 4), (0, 2))}


def named(base: nn.Module, tuned: nn.Module) -> Prompts:
    """S is one token before END, ``set`` two."""
    return replace(answered(base, tuned), positions=PLACES)


def by_hand(hf: nn.Module, ids: tuple[int, ...], blocked: list[tuple[int, int | None]], query: int, keys: tuple[int, ...]) -> Tensor:
    with torch.no_grad(), ExitStack() as stack:
        for layer, head in blocked:
            stack.enter_context(masked(hf, layer, head, [query], keys))
        return hf(torch.tensor([list(ids)]), use_cache=False, attention_mask=None if not blocked else full_mask(len(ids))).logits[0, -1]


def full_mask(n: int) -> Tensor:
    """The causal mask as a tensor, so that each layer is handed one to change."""
    return torch.zeros(1, 1, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), torch.finfo(torch.float32).min)


def test_every_layer_against_plain_masks(world: Any) -> None:
    """All heads, some heads, and windows; both models; the random tokens too."""
    _, base, tuned, pair = world
    prompts = named(base, tuned)
    assert prompts.answers is not None and prompts.distractors is not None
    ways: list[tuple[dict[str, Any], Any]] = [
        ({}, lambda layer: [(i, None) for i in range(layer, 3)]),
        ({"heads": "L0H1,L2H3,L2H0", "width": 2}, lambda layer: [(i, h) for i, h in ((0, 1), (2, 3), (2, 0)) if layer <= i < layer + 2]),
    ]
    for settings, blocked in ways:
        found = attention_knockout(pair, prompts, keys=("S", "set", "0"), control=1, seed=2, **settings)
        assert found.labels == {"measure": ("accuracy", "margin", "logit_diff"), "side": ("base", "tuned"), "key": ("S", "set", "0")}
        moved = 0.0
        for s, hf in enumerate((base, tuned)):
            for row, ids in enumerate(prompts.ids):
                for k, keys in enumerate((PLACES["S"][row], PLACES["set"][row], (0,))):
                    for layer in range(3):
                        logits = by_hand(hf, ids, blocked(layer), len(ids) - 1, keys)
                        want = torch.tensor(measured(logits, prompts.answers[row], prompts.distractors[row]))
                        assert (found.blocked[:, s, k, layer, row] - want).abs().max() <= 2 * 8 * EPS * float(logits.abs().max())
                        moved = max(moved, abs(float(want[2] - found.intact[2, s, row])))
        assert moved > 1e-2
        # Three tokens leave nothing to draw beside the first and the two of the set: no control, and it says so.
        assert bool(found.control[:, :, 1].isnan().all()) and "set: too few others before END" in found.notes[0]


def test_random_tokens_are_others_before_the_query_and_each_prompts_own() -> None:
    pair, prompts = small()
    long = replace(prompts[[0, 2, 3]], positions={"S": ((3,), (2,), (1,))})
    found = attention_knockout(pair.base, long, keys=("S",), control=6, seed=5)
    sets = [{t for t in range(1, len(ids) - 1)} - {p} for ids, p in zip(long.ids, (3, 2, 1), strict=True)]
    hf: Any = pair.base.wrapped.source
    for row, (ids, pool) in enumerate(zip(long.ids, sets, strict=True)):
        literal = [by_hand(hf, ids, [(0, None), (1, None), (2, None)], len(ids) - 1, (t,)) for t in sorted(pool)]
        values = torch.stack([x[long.answers[row]] - x[long.distractors[row]] for x in literal])  # type: ignore[index]
        nearest = (found.control[2, 0, 0, 0, :, row][:, None] - values).abs().min(1)
        assert nearest.values.max() <= 1e-5 and len(set(nearest.indices.tolist())) > 1
    again = attention_knockout(pair.base, long[:2], keys=("S",), control=6, seed=5)
    torch.testing.assert_close(again.control, found.control[..., :2], atol=1e-5, rtol=0)


def test_blocking_nothing_or_what_cannot_matter_is_the_baseline() -> None:
    pair, prompts = small()
    some = replace(prompts, positions={"S": ((2,), (1,), (3,), (1,), (2,)), "K": ((1,), (0,), (1,), (0,), (1,))})
    found = attention_knockout(pair, some, query="S", keys=("K",), control=0)
    assert torch.equal(found.blocked[:, :, 0, 2], found.intact)  # the last layer moves nothing from S to END any more
    assert (found.blocked[1, :, 0, 0] - found.intact[1]).abs().max() > 1e-3
    heads = attention_knockout(pair, some, heads="L0H1", keys=("K",), control=0)
    assert torch.equal(heads.blocked[:, :, 0, 1:], heads.intact[:, :, None].expand(-1, -1, 2, -1))
    same = attention_knockout(ModelPair(pair.base, pair.base), some, keys=("K",), control=1)
    assert torch.equal(same.blocked[:, 0], same.blocked[:, 1]) and torch.equal(
        same.control[:, 0].nan_to_num(), same.control[:, 1].nan_to_num()
    )
    alone = attention_knockout(pair.tuned, some, query="S", keys=("K",), control=0)
    assert torch.equal(alone.blocked[:, 0], found.blocked[:, 1]) and alone.sides == ("model",) and "side" not in alone.strongest()


def test_the_layers_of_a_hand_built_circuit() -> None:
    """Inhibition heads of layer 2 look at S2 from END, the mover of layer 3 at the names; a duplicate head of layer 1 at S1 from S2."""
    built = hand_built("ioi")
    prompts = built.task.generate(built.model, 12, seed=1)
    heads = {role: next(iter(built.circuit.heads(role))).heads for role in ("mover", "inhibition")}
    found = attention_knockout(built.model, prompts, keys=("IO", "S2"), control=0)
    assert found.intact[0].mean() == 1
    assert found.needed_until("IO") == 1 + max(i for i, _ in heads["mover"]) and found.needed_until("S2") == 1 + heads["inhibition"][0][0]
    assert f"from layer {found.needed_until('S2' if 'without S2' in found.summary() else 'IO')} on it can be spared" in found.summary() or (
        found.needed_until("IO") == found.blocked.shape[3]
    )
    window = attention_knockout(built.model, prompts, keys=("S2",), width=1, control=0)
    lost = (window.effect().mean(-1)[0] < 0).nonzero().flatten().tolist()
    assert lost == [heads["inhibition"][0][0]]
    assert f"without S2 in layer {lost[0]} the accuracy" in window.summary() and "blocked in 1 layer at a time" in window.summary()
    two = attention_knockout(built.model, prompts, keys=("S2",), width=2, control=0)
    assert "without S2 in layers " in two.summary() and "blocked in 2 layers at a time" in two.summary()
    figure: Any = window.plot()
    assert figure.layout.xaxis.dtick == 1 and figure.layout.xaxis.title.text.endswith("blocked in this layer alone")
    earlier = attention_knockout(built.model, prompts, query="S2", control=1)
    assert earlier.labels["key"] == ("IO", "S1") and earlier.needed_until("S1") is not None and earlier.needed_until("IO") is None


def test_tables_are_counts_by_hand() -> None:
    pair, prompts = small()
    found = attention_knockout(pair, prompts[[0, 2, 3]], keys=("-2", "-3"), control=2)
    frame, every = found.to_frame(), found.to_frame("prompt")
    assert len(frame) == 3 * 2 * 2 * 3 and len(every) == len(frame) * 3
    rows: Any = frame.query("measure == 'accuracy'").itertuples()
    for row in rows:
        runs = every.query("measure == 'accuracy' and side == @row.side and key == @row.key and layer == @row.layer")
        up = int(((runs.blocked == 1) & (runs.intact == 0)).sum())
        down = int(((runs.blocked == 0) & (runs.intact == 1)).sum())
        assert row.p_mcnemar == mcnemar(up, down) and (row.effect_low, row.effect_high) == paired_change(up, down, 3)
    assert list(found.figures()) == ["accuracy, base", "accuracy, tuned", "logit_diff, base", "logit_diff, tuned"]
    assert len(found.strongest()) == 4
    bare = replace(prompts, positions={})
    assert attention_knockout(pair.base, bare, control=0).labels["key"] == ("-2", "-3")  # the shortest has three tokens


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keys": ("IO",)}, "IO"),
        ({"query": "IO"}, "IO"),
        ({"query": "S", "keys": ("END",)}, "a query sees nothing behind it, and the key END comes after the query S (token "),
        ({"heads": "L3H0"}, "L3H0 is not in a model of 3 layers with 4 heads each"),
        ({"heads": "L0H4"}, "L0H4 is not in a model"),
        ({"heads": "L0H1@S"}, "names a position"),
        ({"heads": "some"}, "names no heads"),
        ({"width": -1}, "width is a number of layers"),
        ({"control": -1}, "control is a number of draws"),
        ({"metric": "kl"}, "compares with another run"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    pair, prompts = small()
    with pytest.raises(InputError) as error:
        attention_knockout(pair, prompts, **{"keys": ("S",), **settings})
    assert said in str(error.value)


def test_one_prompt_is_too_few() -> None:
    pair, prompts = small()
    with pytest.raises(InputError, match="at least two prompts"):
        attention_knockout(pair, prompts[:1], keys=("S",))
