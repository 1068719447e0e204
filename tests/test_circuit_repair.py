"""Repairs: plain Hugging Face models with attention rows set by hand, a model whose repair is written into it, and exact identities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_hooks import _parts
from small_tokenizers import tokenizer
from tiny_checkpoints import FOUR, tiny
from torch import Tensor, nn

from interp import organisms, store
from interp.analyses.circuit_repair import CircuitRepairResult, _ranks, _spearman, circuit_repair
from interp.circuit import Circuit
from interp.edits import Edit, WeightChange, attention_edit
from interp.errors import InputError
from interp.models import HookedModel
from interp.organisms.handmade.blueprint import Head, Move, Offset
from interp.organisms.handmade.ioi import BLUEPRINT, INHIBITED, NAMED, NOT_ACTOR
from interp.organisms.handmade.weights import written
from interp.prompts import Prompts
from interp.sites import Heads, Site
from interp.stats import wilson
from interp.sweeps.repairs import conditions, others, with_random_tokens
from interp.tasks import task

ROWS = ((3, 9, 4, 1, 5, 11), (2, 7, 8, 12, 6), (6, 5, 3, 13, 8, 9, 7), (4, 14, 1, 2, 17, 16))
PLACES = ((1, 2, 4), (0, 3), (2, 1, 4), (3, 1, 2))
OPTIONS = tuple(tuple(ids[p] for p in places) for ids, places in zip(ROWS, PLACES, strict=True))
ANSWERS = (4, 2, 8, 14)
ASKED = ((2, 3), (1,), (3, 4, 5), (2,))
PROMPTS = Prompts(
    ("a", "b", "c", "d"), ROWS, {"colors": PLACES, "question": ASKED}, answers=ANSWERS, options=OPTIONS, contexts=("1", "2", "3", "4")
)
RIGHT = [options.index(answer) for options, answer in zip(OPTIONS, ANSWERS, strict=True)]
WRONG = [[p for k, p in enumerate(places) if k != i] for places, i in zip(PLACES, RIGHT, strict=True)]
HEADS = "inhibition=L1H0,L1H3; L0H2"
GATHERERS = "L0H1,L1H2"
EDITED = [(0, 2), (1, 0), (1, 3)]


@contextmanager
def attending(change: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Eager attention hands its weights [head query key] to a dropout, which does nothing here; layers take turns."""
    real, turn = nn.functional.dropout, [0]

    def dropout(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim == 4:
            x = x.clone()
            change(turn[0], x[0])
            turn[0] += 1
        return x

    nn.functional.dropout = dropout
    try:
        yield
    finally:
        nn.functional.dropout = real


class ByHand:
    """One prompt of a plain model with the END rows of some heads set, or kept from keys; everything that is measured, recomputed."""

    def __init__(self, hf: Any, ids: tuple[int, ...], heads: list[tuple[int, int]], keys: list[int], block: bool = False) -> None:
        self.rows: dict[int, Tensor] = {}
        z: dict[int, Tensor] = {}
        last: list[Tensor] = []

        def change(layer: int, pattern: Tensor) -> None:
            for head in [h for i, h in heads if i == layer]:
                row = torch.zeros(len(ids))
                row[keys] = 1 / len(set(keys))
                if block:
                    row = pattern[head, -1].clone()
                    row[keys] = 0
                    row /= row.sum()
                pattern[head, -1] = row
            self.rows[layer] = pattern[:, -1].clone()

        layers = hf.config.num_hidden_layers
        norm = (
            hf.transformer.ln_f
            if hasattr(hf, "transformer")
            else hf.gpt_neox.final_layer_norm
            if hasattr(hf, "gpt_neox")
            else hf.model.norm
        )
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(attending(change))
            for i in range(layers):
                hook = _parts(hf, i)[2].register_forward_pre_hook(lambda _, args, i=i: z.__setitem__(i, args[0][0, -1].clone()))
                stack.callback(hook.remove)
            stack.callback(norm.register_forward_pre_hook(lambda _, args: last.append(args[0][0, -1].clone())).remove)
            self.logits = hf(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        self.hf, self.norm, self.z, self.stream = hf, norm, z, last[0].double()

    def attribution(self, layer: int, head: int, answer: int, wrong: list[int]) -> float:
        """By the formulas of LayerNorm and RMSNorm, in float64."""
        out, d_head = _parts(self.hf, layer)[2], len(self.z[layer]) // self.hf.config.num_attention_heads
        alone = torch.zeros_like(self.z[layer])
        alone[head * d_head : (head + 1) * d_head] = self.z[layer][head * d_head : (head + 1) * d_head]
        with torch.no_grad():
            added = (out(alone[None]) - out(torch.zeros_like(alone)[None]))[0].double()
        centred = isinstance(self.norm, nn.LayerNorm)
        x = self.stream - self.stream.mean() if centred else self.stream
        eps = self.norm.eps if centred else self.norm.variance_epsilon
        part = (added - added.mean() if centred else added) * self.norm.weight.detach().double() / (x.square().mean() + eps).sqrt()
        columns = self.hf.get_output_embeddings().weight.detach().double()
        return float(part @ (columns[answer] - columns[wrong].mean(0)))


@pytest.mark.parametrize("kind", FOUR)
def test_every_condition_is_the_plain_model_with_rows_set_by_hand(kind: str) -> None:
    hf: Any = tiny(kind, seed=4)
    hf.set_attn_implementation("eager")
    r = circuit_repair(HookedModel.load(hf), PROMPTS, heads=HEADS, gatherers=GATHERERS, movers="L2H1,L2H3", draws=2)
    near = 8 * torch.finfo(torch.float32).eps
    groups = {"no edit": [], "all heads": EDITED, "inhibition": [(1, 0), (1, 3)]} | {f"L{i}H{h}": [(i, h)] for i, h in EDITED}
    for i, name in enumerate(r.labels["condition"]):
        for p, ids in enumerate(ROWS):
            heads, keys, block = groups.get(name, EDITED), WRONG[p], False
            if name == "all heads, right option":
                keys = [PLACES[p][RIGHT[p]]]
            elif name in ("all heads, wrong by its own guess", "all heads, its top wrong option"):
                logits = ByHand(hf, ids, [], []).logits[list(OPTIONS[p])]
                guess = int(logits.argmax())
                rival = max((k for k in range(len(OPTIONS[p])) if k != RIGHT[p]), key=lambda k: float(logits[k]))
                keys = [q for k, q in enumerate(PLACES[p]) if k != guess] if "guess" in name else [PLACES[p][rival]]
            elif name == "gatherers blocked":
                heads, keys, block = [(0, 1), (1, 2)], list(ASKED[p]), True
            elif "random" in name or "other" in name:
                continue  # what they draw is looked at below
            hand = ByHand(hf, ids, heads, keys, block)
            options, k = hand.logits[list(OPTIONS[p])].double(), RIGHT[p]
            margin = options[k] - max(options[j] for j in range(len(options)) if j != k)
            assert abs(float(r.margin[i, p] - margin)) <= 2 * near * float(hand.logits.abs().max()), (name, p)
            assert bool(r.right[i, p]) == (int(hand.logits.argmax()) == ANSWERS[p])
            if name in ("no edit", "all heads"):
                state, wrong = r.labels["state"].index(name), [o for o in OPTIONS[p] if o != ANSWERS[p]]
                for layer in range(3):
                    looked = torch.stack([hand.rows[layer][:, PLACES[p][k]], hand.rows[layer][:, WRONG[p]].sum(1)], 1)
                    assert (r.attention[state, p, layer] - looked).abs().max() <= near
                    for head in range(4):
                        want = hand.attribution(layer, head, ANSWERS[p], wrong)
                        assert float(r.attribution[state, p, layer, head]) == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert r.attention[1, :, 1, 0].sum(-1).allclose(torch.ones(4, dtype=torch.float64))  # the rows that are set sum to 1


def test_the_conditions_are_these() -> None:
    model = HookedModel.load(tiny("llama"))
    r = circuit_repair(model, PROMPTS, heads=HEADS, gatherers=GATHERERS, draws=2)
    names = ["no edit", "all heads", "inhibition", "L1H0", "L1H3", "L0H2", "all heads, right option", "all heads, wrong by its own guess"]
    names += [
        "all heads, its top wrong option",
        "all heads, random tokens 1",
        "all heads, random tokens 2",
        "other heads 1",
        "other heads 2",
    ]
    assert list(r.labels["condition"]) == [*names, "gatherers blocked", "other heads blocked 1", "other heads blocked 2"]
    assert r.edited == ((1, 0), (1, 3), (0, 2)) and r.movers == () and r.notes == ()
    one = circuit_repair(model, PROMPTS, heads="L1H0", draws=1)
    assert one.labels["condition"][:3] == ("no edit", "all heads", "all heads, right option")
    drawn = [c for c in conditions(Heads.parse(HEADS), None, "", model, 30, 0) if c.kind == "other heads"]
    for c in drawn:  # as many of each layer, none that is edited
        heads = [(s.layer, s.head) for s in Heads.parse(c.heads).sites()]
        assert sorted(i for i, _ in heads) == [0, 1, 1] and not set(heads) & set(EDITED) and len(set(heads)) == 3
    assert len({c.heads for c in drawn}) > 3
    assert not list(others(Heads.parse("L1H0,L1H1,L1H2"), model, 3, 0))
    short = circuit_repair(model, PROMPTS, heads="L1H0,L1H1,L1H2", draws=2)
    assert short.notes == ("no control with other heads: a layer has too few",) and short.notes[0] in short.summary()


# ------------------------------------------------------------------------------------------------ a planted repair

BLIND = replace(
    BLUEPRINT,
    heads={
        (0, 2): BLUEPRINT.heads[0, 2],
        # Twelve tokens back of END stands the first name. The head inhibits it, whoever it is; the mover is turned to the other one.
        (2, 0): Head((Offset(12),), (Move("code", "inhibit"),)),
        (3, 2): Head((NAMED, NOT_ACTOR, INHIBITED), (Move("code", "out"),)),
    },
)


@pytest.fixture(scope="module")
def planted() -> tuple[CircuitRepairResult, Tensor]:
    """A head that inhibits, and does not know whom: right where S happens to come first."""
    model = written(BLIND, "blind")
    circuit = Circuit.of((4, 6, 3), {"inhibition": "L2H0.z@END", "mover": "L3H2.z@END"})
    pairs: Any = organisms.hand_built("ioi").task.generate(model, 24, seed=3)
    apart = replace(pairs.clean, contexts=tuple(f"{i}" for i in range(24)))  # names come twice, which would weigh them by halves
    return circuit_repair(model, apart, circuit, draws=3), torch.tensor([order == "BABA" for order in pairs.tags["order"]])


def test_a_planted_repair_is_found(planted: tuple[CircuitRepairResult, Tensor]) -> None:
    r, s_first = planted
    right = dict(zip(r.labels["condition"], r.right, strict=True))
    assert torch.equal(right["no edit"], s_first) and int(s_first.sum()) == 12
    assert right["all heads"].all() and not right["all heads, right option"].any(), "it inhibits what it looks at"
    assert torch.equal(right["all heads, wrong by its own guess"], s_first), "what it believes it believes the more"
    assert right["all heads, its top wrong option"].all()  # there are two options
    assert all(torch.equal(right[f"other heads {i}"], s_first) for i in (1, 2, 3))
    assert r.newly() == ((~s_first).nonzero().flatten().tolist(), [])
    assert r.summary().startswith("Accuracy goes from 50.0% [31.4%, 68.6%] to 100.0% [86.2%, 100.0%] with 1 head set to look from END")
    assert "12 newly right, 0 newly wrong, exact McNemar p = 0.00049" in r.summary()  # 2 / 2^12
    assert r.strongest(3).effect.abs().tolist() == [0.5] * 3


def test_movers_follow_a_planted_repair(planted: tuple[CircuitRepairResult, Tensor]) -> None:
    """Inhibited, a name keeps e^-6 of the mover's attention, which the other takes; the mover writes all there is of an answer."""
    r, s_first = planted
    before, after = r.attention[:, :, 3, 2]
    for row, right in zip(before.tolist(), s_first.tolist(), strict=True):
        assert row[not right] > 0.85 and row[right] < 0.01
    assert after[:, 0].amin() > 0.85 and after[:, 1].amax() < 0.01
    logits = r.attribution[:, :, 3, 2]
    assert (logits[0][s_first] > 4).all() and (logits[0][~s_first] < -4).all() and (logits[1] > 4).all()
    rest = r.attribution.clone()
    rest[:, :, 3, 2] = 0
    assert rest.abs().max() < 0.1
    assert (logits[1] - r.margin[1]).abs().max() < 0.1, "the margin of two options is what the mover adds"


def test_random_tokens_are_no_options_and_stand_before_the_query() -> None:
    seen = set()
    for draw in range(20):
        rows = with_random_tokens(PROMPTS, [list(p) for p in PLACES], "END", draw, 0).positions["random_tokens"]
        for p, row in enumerate(rows):
            assert len(set(row)) == len(row) == len(PLACES[p]) - 1 and not set(row) & set(PLACES[p])
            assert max(row) < len(ROWS[p]) - 1
        seen.add(rows)
    assert len(seen) > 4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_heads_that_write_nothing_change_nothing_exactly(kind: str) -> None:
    model = HookedModel.load(tiny(kind, seed=1))
    dead = Edit(tuple(WeightChange(Site("W_O", i, h), -model.weight(Site("W_O", i, h)).detach()) for i, h in ((1, 0), (1, 3), (0, 2))))
    with model.edited(dead):
        r = circuit_repair(model, PROMPTS, heads=HEADS, draws=2)
    edited = [i for i, kind in enumerate(r.kinds) if kind not in ("other heads",)]
    assert (r.margin[edited] - r.margin[0]).abs().max() == 0 and (r.right[edited] == r.right[0]).all()
    assert (r.margin - r.margin[0]).abs().max() > 1e-3, "other heads do write"
    assert (r.attention[1] - r.attention[0])[:, 2].abs().max() == 0


def test_rows_that_are_as_set_already_change_nothing() -> None:
    """An attention row of two tokens, all on the first: set there once, and again."""
    model = HookedModel.load(tiny("gpt2", seed=1))
    right, wrong = ({"colors": ((0, 2), (3, 1))}, ((5, 6), (6, 5)))
    prompts = Prompts(("a", "b"), ((5, 9, 6, 7), (4, 5, 1, 6, 2)), right, answers=(6, 6), options=wrong, contexts=("a", "b"))
    named = replace(prompts, positions={**prompts.positions, "there": ((0,), (1,))})
    with model.edited(attention_edit("L1H2@END", keys="there")):  # where the wrong options stand
        r = circuit_repair(model, named, heads="L1H2", draws=1)
    assert torch.equal(r.margin[1], r.margin[0]) and torch.equal(r.attention[1], r.attention[0]) and r.newly() == ([], [])
    assert r.attention[0, :, 1, 2].tolist() == [[0, 1], [0, 1]]


def test_batches_do_not_matter() -> None:
    model = HookedModel.load(tiny("neox", seed=2))
    many = circuit_repair(model, PROMPTS, heads=HEADS, draws=2)
    for two in ([0, 1], [2, 1], [3, 2]):
        few = circuit_repair(model, PROMPTS[two], heads=HEADS, draws=2)
        fixed = [i for i, kind in enumerate(few.kinds) if kind != "random tokens"]  # those are drawn by the prompt's place
        assert (few.margin[fixed] - many.margin[fixed][:, two]).abs().max() < 1e-4
        assert (few.attribution - many.attribution[:, two]).abs().max() < 1e-4
    assert many.jitter == 0


TABLE = ("accuracy", "accuracy_low", "accuracy_high", "effect", "effect_se", "low", "high", "p", "margin", "margin_change")


def test_prompts_of_one_context_count_once() -> None:
    """Every prompt ten times over tells nothing new: shares, intervals and tests stay, and n is that of the contexts."""
    model = HookedModel.load(tiny("llama", seed=1))
    eight = PROMPTS[[0, 1, 2, 3, 0, 1, 2, 3]]
    eight = replace(eight, contexts=tuple("abcdefgh"))
    ten = eight[list(range(8)) * 10]
    once, often = (circuit_repair(model, p, heads="L1H0,L1H3", movers="L2H1", draws=1, among="options") for p in (eight, ten))
    kept = [i for i, kind in enumerate(once.kinds) if kind != "random tokens"]  # those are drawn by the prompt's place
    a, b = (r.to_frame().iloc[kept] for r in (once, often))
    for name in TABLE:
        assert b[name].to_numpy() == pytest.approx(a[name].to_numpy(), abs=1e-4 if "margin" in name else 1e-9), name
    assert a.effect.abs().max() > 0 and (b.newly_right + b.newly_wrong).sum() == 10 * (a.newly_right + a.newly_wrong).sum()
    assert "n = 8 prompts" in once.summary() and "exact McNemar p" in once.summary()
    assert "n = 8 contexts of 80 prompts" in often.summary() and "McNemar" not in often.summary()
    assert float(often.chance) == pytest.approx(once.chance)
    told = [r.summary().split("attention of 1 mover moves by ")[1].split(";")[0] for r in (once, often)]
    assert told[0] == told[1]


def test_contexts_of_unequal_size_weigh_the_same() -> None:
    """By hand: three right of four in one context and none in another are 3 of 8, not 3 of 5."""
    r = circuit_repair(HookedModel.load(tiny("llama")), replace(PROMPTS, contexts=("a", "a", "a", "b")), heads="L1H0", draws=1)
    right = torch.tensor([[True, False, False, False], [True, True, False, False]])
    r = replace(r, right=torch.cat([right, right[1:].expand(len(r.kinds) - 2, -1)]), margin=torch.ones(len(r.kinds), 4).double())
    row = r.to_frame().iloc[1]
    assert row.accuracy == pytest.approx((2 / 3 + 0) / 2) and row.effect == pytest.approx((1 / 3 + 0) / 2)
    assert row.effect_se == pytest.approx(1 / 6) and (row.newly_right, row.newly_wrong) == (1, 0)
    assert (row.accuracy_low, row.accuracy_high) == pytest.approx(wilson(2 / 3, 2)) and row.p == 1


def test_tokens_that_are_no_options_are_said() -> None:
    words = tokenizer("byte_level")
    model = HookedModel.load(tiny("llama", vocab_size=len(words), max_position_embeddings=128), tokenizer=words)
    pairs: Any = task("colored_objects").generate(model, 5)
    said = "the tokens that objects names are not the options themselves in 5 of 5 prompts"
    assert said in circuit_repair(model, pairs, heads="L1H0", options="objects", draws=1).summary()
    assert "not the options" not in circuit_repair(model, pairs, heads="L1H0", draws=1).summary()
    other = replace(PROMPTS, options=((9, 4, 30), *OPTIONS[1:]))
    (note,) = circuit_repair(HookedModel.load(tiny("llama")), other, heads="L1H0", draws=1).notes
    assert note.endswith("in 1 of 4 prompts ('token 5' in place of 'token 30' in prompt 0)")


def test_the_model_is_left_alone() -> None:
    hf = tiny("llama")
    before = {k: v.clone() for k, v in hf.state_dict().items()}
    model = HookedModel.load(hf)
    plain = model.logits(PROMPTS.batch())
    circuit_repair(model, PROMPTS, heads=HEADS, draws=1)
    assert torch.equal(model.logits(PROMPTS.batch()), plain) and not model.active_edits
    assert all(torch.equal(v, before[k]) for k, v in hf.state_dict().items())


def test_movers_that_are_edited_are_not_told_as_followers() -> None:
    model = HookedModel.load(tiny("llama"))
    r = circuit_repair(model, PROMPTS, heads="L1H0", movers="L1H0,L2H3", draws=1)
    alone = circuit_repair(model, PROMPTS, heads="L1H0", movers="L2H3", draws=1)
    said = "attention of 1 mover moves by"
    assert r.summary().split(said)[1] == alone.summary().split(said)[1] and "1 of 2 movers is edited and not told of here" in r.summary()
    same = circuit_repair(model, PROMPTS, heads="L1H0", movers="L1H0", draws=1).summary()
    assert "attention of" not in same and "1 of 1 mover is edited" in same
    for heads, said in (("L1H0", "when 1 head is edited"), ("L1H0,L2H1", "when all 2 heads are edited")):
        figure = circuit_repair(model, PROMPTS, heads=heads, draws=1).figures()["Change of logits"]
        assert said in figure.layout.title.text.replace("<br>", " ")


def test_rank_correlation() -> None:
    assert _ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3, 0.5, 3, 1.5]  # from 0.5 on, ties share
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert float(_spearman(x, x**3, 0).value) == pytest.approx(1) and float(_spearman(x, -x, 0).value) == pytest.approx(-1)
    y = torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])  # 1 - 6 * 4 / (5 * 24) = 0.8
    found = _spearman(x, y, 0)
    assert float(found.value) == pytest.approx(0.8) and float(found.low) <= 0.8 <= float(found.high)
    ties = _spearman(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]), 0)
    assert float(ties.value) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert _spearman(x[:3], y[:3], 0).refused and _spearman(x, torch.ones(5), 0).refused


def test_importance_comes_from_the_circuit() -> None:
    model = HookedModel.load(tiny("gpt2", seed=3))
    nodes = [Site("z", i, h, "END") for i in range(3) for h in range(4)]
    circuit = Circuit(
        (3, 4, 4), tuple(nodes), roles={nodes[1]: "inhibition", nodes[9]: "mover"}, scores={n: float(i) for i, n in enumerate(nodes)}
    )
    r = circuit_repair(model, PROMPTS, circuit, draws=1)
    assert r.edited == ((0, 1),) and r.movers == ((2, 1),) and r.importance.flatten().tolist() == list(range(12))
    rho, n = r.correlation()
    change = (r.attribution[1] - r.attribution[0]).mean(0)
    assert n == 8  # heads of later layers only: what stands beside the edited head looks where it did
    assert (r.attention[1] - r.attention[0])[:, 0, [0, 2, 3]].abs().max() == 0
    ranks = torch.stack([_ranks(change[1:].flatten()), torch.arange(8).double() + 0.5])
    assert float(rho.value) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    assert list(r.figures()) == ["Accuracy", "Change of logits", "By importance"]
    named = circuit_repair(model, PROMPTS, circuit, heads="L0H1", draws=1)
    assert named.edited == r.edited and torch.equal(named.right, r.right), "a single head is no role"


def test_colored_objects_have_what_a_repair_needs() -> None:
    words = tokenizer("byte_level")
    hf = tiny("llama", vocab_size=len(words), max_position_embeddings=128)
    model = HookedModel.load(hf, tokenizer=words)
    pairs: Any = task("colored_objects").generate(model, 5)
    r = circuit_repair(model, pairs, heads="L1H0,L2H3", gatherers="L0H1", draws=1, among="options")
    assert "gatherers blocked" in r.labels["condition"] and r.chance == pytest.approx(1 / 3)
    clean = pairs.clean
    for row, ids in enumerate(clean.ids):
        asked = [ids[i] for i in clean.positions["question"][row]]
        assert model.decode(asked).strip() == clean.texts[row].split("\n")[-2].rsplit(". ", 1)[1]
        assert clean.positions["query_object"][row][0] in clean.positions["question"][row]


def test_a_result_is_a_result(tmp_path) -> None:
    r = circuit_repair(HookedModel.load(tiny("llama")), PROMPTS, heads=HEADS, gatherers=GATHERERS, movers="L2H1", draws=2)
    again = store.load(store.save(r, tmp_path))
    assert again.summary() == r.summary() and again.to_frame().equals(r.to_frame()) and again.identity == r.identity
    frame = r.to_frame("prompt")
    assert len(frame) == len(r.kinds) * 4 and frame.right.tolist() == r.right.flatten().tolist()
    table = r.to_frame().set_index("condition")
    gained, lost = r.newly()
    assert table.loc["all heads", "effect"] == pytest.approx((len(gained) - len(lost)) / 4) == float(r.accuracy[1] - r.accuracy[0])
    assert set(r.strongest().condition) >= {"all heads", "other heads", "all heads, random tokens"} and (r.strongest().draws > 1).sum() == 3
    with pytest.raises(InputError, match="per must be"):
        r.to_frame("head")
    with pytest.raises(InputError, match="there is no condition 'none'"):
        r.newly("none")


def test_what_is_refused() -> None:
    model = HookedModel.load(tiny("llama"))
    roles = Circuit.of((3, 4, 2), {"mover": "L2H0.z@END"})

    def refused(match: str, prompts: Any = PROMPTS, circuit: Circuit | None = None, **settings: Any) -> None:
        with pytest.raises(InputError, match=match):
            circuit_repair(model, prompts, circuit, **({"heads": "L1H0", "draws": 1} | settings))

    refused("no heads to edit", heads=None)
    refused("no heads to edit", circuit=roles, heads=None)
    refused("no role named 'inhibition'", circuit=roles, heads="inhibition")
    refused("names no heads", heads="inhibition")
    refused("head 7 is out of range", heads="L1H7")
    refused("is in two groups of heads", heads="L1H0; L1H0,L1H2")
    refused("the circuit is of a model with", circuit=Circuit.of((4, 4, 2), {"inhibition": "L2H0.z@END"}))
    refused("no position 'fruits'", options="fruits")
    refused("names 2 tokens of prompt 0, which has 3 options", options="question")
    refused("which positions are the options", prompts=replace(PROMPTS, positions={}))
    refused("no one-token answers with options", prompts=replace(PROMPTS, options=None))
    refused("is 0 of its 3 options", prompts=replace(PROMPTS, answers=(1, *ANSWERS[1:])))
    refused("stands behind 3", query="3")
    for first in (0, "0"):  # a token like any other, and no way to say END
        refused("stands behind 0", query=first)
    seen = replace(roles, roles={roles.nodes[0]: "inhibition"}, contexts=("7", "3"))
    refused(r"found on these prompts \(1 of their contexts, such as '3', were seen there\)", circuit=seen, heads=None)
    refused(r"found on these prompts \(all of them", circuit=replace(seen, contexts=(), prompts=PROMPTS.digest))
    refused("gatherers are kept from nothing", gatherers="L0H1", question="nothing")
    refused("among must be", among="all")
    refused("draws must be", draws=0)
    refused("needs prompts of at least 2 contexts for its intervals, got 1", prompts=replace(PROMPTS[[0, 0]], contexts=("1", "1")))
    short = Prompts(("a", "b"), ((5, 6, 3),) * 2, {"colors": ((0, 1),) * 2}, answers=(5, 5), options=((5, 6),) * 2, contexts=("a", "b"))
    refused("has 0 tokens before END that are no options", prompts=short)
