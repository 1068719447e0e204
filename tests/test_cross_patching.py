"""Parts of one model in another, against two plain Hugging Face models with hooks written by hand."""

from __future__ import annotations

import copy
import random
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import plain_hooks
import pytest
import torch
from test_restart import _everything_in_fp64, restarted  # noqa: F401 - used by every test here
from test_sweeps import CLEAN, SAME, WORLD, place
from tiny_checkpoints import FOUR, tiny
from torch import Tensor, nn

from interp.analyses.cross_patching import CrossPatchingResult, cross_patching
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models.interventions import Part
from interp.organisms import hand_built
from interp.prompts import PromptPairs, Prompts
from interp.sites import Heads, Site
from interp.stats import permutation, recovered
from interp.sweeps import engine
from interp.sweeps.draws import present
from interp.sweeps.groups import HEADS, STREAM, groups_of, random_heads, written
from interp.sweeps.patches import as_captured, settings

PROMPTS = WORLD["clean"]  # 5 prompts of 3 to 7 tokens, a position S that differs; 3 layers, 4 heads (2 key/value heads), 24 = d_model
LEVEL = [row[:3] for row in CLEAN]
EPS = torch.finfo(torch.float32).eps
PLANTED = (1, 2)
D_HEAD = {"gpt2": 6, "llama": 8, "qwen2": 6, "neox": 6}


def plain(kind: str, seed: int) -> Any:
    model: Any = tiny(kind, seed=seed)
    model.set_attn_implementation("eager")
    return model


def other_blocks(kind: str) -> nn.Module:
    """A model with other blocks and embeddings, and the final norm and unembedding of the one with seed 1."""
    base, tuned = plain(kind, 1), plain(kind, 2)
    own = dict(base.named_parameters())
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if not any(part in name for part in (".h.", "layers.")):
                p.copy_(own[name])
    return tuned


@pytest.fixture(scope="module", params=FOUR)
def world(request: pytest.FixtureRequest) -> tuple[str, nn.Module, nn.Module, ModelPair]:
    """Kind, plain base, plain tuned, both hooked; every block differs, b_O with it."""
    base, tuned = plain(request.param, 1), other_blocks(request.param)
    return request.param, base, tuned, ModelPair.load(HookedModel.load(base), HookedModel.load(tuned))


def output_weight(hf: Any, layer: int) -> Tensor:
    """W_O, [head * d_head, d_model]."""
    if hasattr(hf, "transformer"):
        return hf.transformer.h[layer].attn.c_proj.weight
    return (hf.gpt_neox.layers[layer].attention.dense if hasattr(hf, "gpt_neox") else hf.model.layers[layer].self_attn.o_proj).weight.T


def by_the_book(receiver: nn.Module, sender: nn.Module, row: int, group: tuple[Site, ...], output: str) -> Tensor:
    """Logits at END of one prompt, one forward: hooks set activations; what a head adds is worked out by hand."""
    ids = PROMPTS.ids[row]
    seen = plain_hooks.seen(sender, ids, list({(s.component, s.layer) for s in group}))  # type: ignore[misc]
    with torch.no_grad(), ExitStack() as stack:
        layers: dict[int, list[Site]] = {}
        rows: list[Any] = []  # of attention weights, which take one hook
        for s in group:
            layer, where = int(s.layer or 0), place(PROMPTS, s, row)
            value = plain_hooks.part(seen[s.component, layer], s.component, s.head, where)
            if s.component == "z" and output == "sender":
                layers.setdefault(layer, []).append(s)
                continue

            def write(x: Tensor, s: Site = s, where: int | None = where, value: Tensor = value) -> None:
                at: Any = slice(None) if where is None else where
                x[(s.head, at) if s.component == "pattern" else (at, s.head) if s.component in HEADS else at] = value

            if s.component == "pattern":
                rows.append(write)
            else:
                stack.enter_context(plain_hooks.hooked(receiver, s.component, layer, write))
        if rows:
            every = group[0].layer or 0
            stack.enter_context(plain_hooks.hooked(receiver, "pattern", every, lambda x: [write(x) for write in rows] and None))
        for layer, heads in layers.items():
            own: list[Tensor] = []
            stack.enter_context(plain_hooks.hooked(receiver, "z", layer, lambda x, own=own: own.append(x.clone())))

            def add(x: Tensor, layer: int = layer, heads: list[Site] = heads, own: list[Tensor] = own) -> None:
                theirs, z = seen["z", layer], own.pop()
                n, d = z.shape[1:]
                mine, them = (output_weight(hf, layer).reshape(n, d, -1) for hf in (receiver, sender))
                for at in range(len(x)):
                    here = {s.head for s in heads if place(PROMPTS, s, row) in (None, at, at - len(x))}
                    for h in here:
                        x[at] += theirs[at, h] @ them[h] - z[at, h] @ mine[h]
                    if len(here) == n:  # every head of the layer: the bias goes along
                        x[at] += bias(sender, layer) - bias(receiver, layer)

            stack.enter_context(plain_hooks.hooked(receiver, "attn_out", layer, add))
        return receiver(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


def bias(hf: Any, layer: int) -> Tensor | float:
    if hasattr(hf, "transformer"):
        return hf.transformer.h[layer].attn.c_proj.bias
    return hf.gpt_neox.layers[layer].attention.dense.bias if hasattr(hf, "gpt_neox") else 0.0


def compare(world: tuple[str, nn.Module, nn.Module, ModelPair], kind: str, n: int, direction: str = "tuned_to_base") -> int:
    """Compare random groups of one kind on every prompt; the number of cells."""
    _, base, tuned, pair = world
    draws, shape = random.Random(f"{kind} {n}"), pair.shape
    output = "sender" if kind in ("sender", "mixed sender") else "receiver"

    def entry(what: str, layer: int) -> str:
        heads = shape.n_kv_heads if what in ("k", "v") else shape.n_heads
        head = f"H{draws.randrange(heads)}" if what in HEADS and draws.random() < 0.8 else ""
        return f"L{layer}{head}.{what}" + draws.choice(["", "@S", "@END", "@0", "@-2"])

    kinds = [c for c in HEADS + STREAM if not (c == "resid_mid" and shape.parallel)]
    texts: set[str] = set()
    while len(texts) < n:
        mixed = kind.startswith("mixed")
        several = draws.sample([k for k in kinds if k not in ("pattern", "z", "attn_out", "resid_mid")], 2)
        components = [*several, "z"] if mixed else [kind] * draws.randint(1, 3)
        layer = draws.randrange(3)
        texts.add(",".join(entry("z" if c == "sender" else c, layer if c == "pattern" else draws.randrange(3)) for c in components))
    given: Any = {"output": output, "direction": direction, "control": 0}
    text = ";".join(sorted(texts))
    found, groups = cross_patching(pair, PROMPTS, sites=text, **given), list(groups_of(text, "z", shape).values())
    receiver, sender = (base, tuned) if direction == "tuned_to_base" else (tuned, base)
    assert PROMPTS.answers is not None and PROMPTS.distractors is not None
    wrong, moved = {}, 0.0
    for row in range(len(PROMPTS)):
        for i, group in enumerate(groups):
            logits = by_the_book(receiver, sender, row, group, output)
            want = float(logits[PROMPTS.answers[row]] - logits[PROMPTS.distractors[row]])
            moved = max(moved, abs(want - float(found.start[row])))
            if not abs(want - float(found.patched[i, row])) <= 2 * 8 * EPS * float(logits.abs().max()):
                wrong[found.cells[i], row] = want, float(found.patched[i, row])
    assert wrong == {} and moved > 1e-5 and found.notes == () and found.checked == 8
    return len(groups) * len(PROMPTS)


KINDS = (*HEADS, *STREAM, "sender", "mixed", "mixed sender")


@pytest.mark.parametrize("kind", ["pattern", "sender", "mixed", "mixed sender"])
def test_a_sample_against_plain_hooks(world: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TOLERANCE", 1e9)  # the short cut itself is compared
    assert compare(world, kind, 4, "base_to_tuned" if kind == "mixed" else "tuned_to_base") == 20


@pytest.mark.full
@pytest.mark.parametrize("direction", ["tuned_to_base", "base_to_tuned"])
@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_cells_against_plain_hooks(world: Any, kind: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TOLERANCE", 1e9)
    if kind == "resid_mid" and world[0] == "neox":
        return
    assert compare(world, kind, 100, direction) >= 500


@pytest.mark.parametrize("kind", FOUR)
def test_going_on_with_what_heads_add_is_exact_in_fp64(kind: str) -> None:
    """Against runs of the whole model, themselves compared with hooks written by hand."""
    model = HookedModel.load(plain(kind, 1).double())
    texts = (
        "L0H1.result",
        "L1.result",
        "L2H3.result@END",
        "L1H0.result@S",
        "L0.result@1",
        "L1H2.result,L1H2.result@S,L2.result@END,L0H3.z",
    )
    patches: list[Any] = [tuple(map(Site.parse, t.split(","))) for t in texts]
    got = restarted(model, PROMPTS, WORLD["same"], patches, "END")
    batch, largest = PROMPTS.batch(), 0.0
    plainly = model.logits(batch, at="END")
    for i, patch in enumerate(settings(model, Part.of(batch), patches, (model, WORLD["same"].batch()))):
        with model.patched({s.site: as_captured(s.values, s.site) for s in patch}):
            want = model.logits(batch, at="END")
        largest = max(largest, float((want - plainly).abs().max()))
        for row in range(5):
            assert (got.get((i, row), plainly[row]) - want[row]).abs().max() <= 1e-12, (texts[i], row)
    assert len(got) > 20 and largest > 1e-2


def stream_with(pair: ModelPair, found: CrossPatchingResult, cell: int) -> tuple[Tensor, Tensor]:
    """The final stream of base with a cell of tuned set by hand, and that of tuned itself."""
    batch, last = PROMPTS.batch(), Site("resid_post", 2)
    values = pair.tuned.capture(batch, [Site.parse(s) for s in found.sites[cell].split(",")])
    with pair.base.patched(values):
        return pair.base.capture(batch, last)[last], pair.tuned.capture(batch, last)[last]


def test_everything_of_the_sender_is_the_sender(world: Any) -> None:
    """Also its b_O, which goes along with all heads of a layer, and only then."""
    kind, base, _, pair = world
    text = "everything; end=everything@END; parts=embed,L0.z,L1.z,L2.z,mlps; lacking=embed,L0.z,L1.z,L2H0,L2H1,L2H2,mlps"
    found = cross_patching(pair, PROMPTS, output="sender", sites=text, control=0)
    got, want = stream_with(pair, found, 0)
    assert (got - want).abs().max() <= 8 * EPS * want.abs().max() and found.sites[0] == found.sites[2]
    limit = 2 * 8 * EPS * float(pair.tuned.logits(PROMPTS, at="END").abs().max())
    assert (found.patched[:3] - found.goal).abs().max() <= limit < (found.start - found.goal).abs().max()
    assert found.sites[0].startswith("L0.resid_pre,L0.attn_out,L0.mlp_out,L1.attn_out") and "L2H0.result" in found.sites[3]
    with torch.no_grad():  # the head that is left out, and the bias, are the base's
        missing = [by_the_book(base, world[2], row, groups_of(text, "z", pair.shape)["lacking"], "sender") for row in range(5)]
    for row, logits in enumerate(missing):
        assert PROMPTS.answers is not None and PROMPTS.distractors is not None
        diff = float(logits[PROMPTS.answers[row]] - logits[PROMPTS.distractors[row]])
        assert float(found.patched[3, row]) == pytest.approx(diff, abs=limit)
    assert (found.patched[3] - found.goal).abs().max() > 1e-3
    receiver = cross_patching(pair, PROMPTS, sites="everything", control=0)
    assert "L0.z" in receiver.sites[0] and (receiver.patched - receiver.goal).abs().max() > 1e-2


@pytest.mark.parametrize("output", ["receiver", "sender"])
def test_a_model_in_itself_is_the_baseline_to_the_bit(world: Any, output: Any) -> None:
    pair = world[3]
    same = ModelPair(pair.base, pair.base)
    found = cross_patching(same, PROMPTS, output=output)
    assert torch.equal(found.patched, found.start.expand_as(found.patched)) and torch.equal(found.start, found.goal) and found.checked == 0
    assert "difference 0 +- 0, too close to normalise" in found.summary() and found.recovered.refused
    grouped = cross_patching(same, PROMPTS, output=output, sites="everything; mixed=L1H2@S,L0.mlp_out,L2H0", control=2)
    assert torch.equal(grouped.patched, grouped.start.expand_as(grouped.patched))
    assert torch.equal(grouped.control[1], grouped.start.expand(2, -1))


@cache
def planted(kind: str, matrix: str) -> tuple[ModelPair, Prompts]:
    """Tuned differs from base in W_O or W_V of one head, and prompts on which that shows."""
    base = HookedModel.load(plain(kind, 1))
    shape = (24, D_HEAD[kind]) if matrix == "W_V" else (D_HEAD[kind], 24)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    head = PLANTED if matrix == "W_O" else (PLANTED[0], PLANTED[1])
    with base.edited(Edit((WeightChange(Site(matrix, *head), delta),))):
        hf = copy.deepcopy(base.wrapped.source)
        view = {name: base.wrapped.parameter(name).detach().clone() for name, _ in base.wrapped.source.named_parameters()}
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(view[name])
    pair = ModelPair.load(base, HookedModel.load(hf))
    gap = pair.tuned.logits(PROMPTS, at="END") - base.logits(PROMPTS, at="END")
    return pair, replace(PROMPTS, answers=tuple(gap.argmax(-1).tolist()), distractors=tuple(gap.argmin(-1).tolist()))


@pytest.mark.parametrize("kind", FOUR)
def test_a_changed_w_o_is_carried_by_the_senders_output_only(kind: str) -> None:
    pair, prompts = planted(kind, "W_O")
    index = PLANTED[0] * 4 + PLANTED[1]
    through_own = cross_patching(pair, prompts)
    assert torch.equal(through_own.patched[:8], through_own.start.expand(8, -1))  # z is the same up to the layer of the change
    added = cross_patching(pair, prompts, output="sender")
    torch.testing.assert_close(added.patched[index], added.goal, atol=8 * EPS * 4, rtol=0)
    others = [i for i in range(8) if i != index]
    assert torch.equal(added.patched[others], added.start.expand(7, -1)) and float(added.recovered.value[index]) == pytest.approx(
        1, abs=1e-5
    )
    assert added.summary().startswith("L1H2.z recovers 1.00 [1.00, 1.00], the most of all z (what heads add in tuned, through its own W_O")
    back = cross_patching(pair, prompts, output="sender", direction="base_to_tuned")
    torch.testing.assert_close(back.patched[index], back.goal, atol=8 * EPS * 4, rtol=0)
    assert torch.equal(back.goal, added.start) and torch.equal(back.start, added.goal) and (back.sender, back.receiver) == ("base", "tuned")
    grouped = cross_patching(pair, prompts, output="sender", sites="planted=L1H2; end=L1H2@END; other=L1H3", control=5)
    # a layer of four heads has three others
    assert torch.equal(grouped.control[0], grouped.start.expand(3, -1)) and torch.equal(grouped.random_heads[0], torch.zeros(3).double())
    torch.testing.assert_close(grouped.patched[0], added.patched[index], atol=8 * EPS * 4, rtol=0)
    assert (grouped.patched[1] - grouped.patched[0]).abs().max() > 1e-3
    assert ", random heads 0 +- 0 (3 draws), the most of 3 groups (what heads add in tuned" in grouped.summary()


def test_a_changed_w_v_is_carried_either_way() -> None:
    pair, prompts = planted("gpt2", "W_V")
    index = PLANTED[0] * 4 + PLANTED[1]
    for output, direction in (("receiver", "base_to_tuned"), ("sender", "tuned_to_base")):
        found = cross_patching(pair, prompts, output=output, direction=direction)  # type: ignore[arg-type]
        torch.testing.assert_close(found.patched[index], found.goal, atol=8 * EPS * 4, rtol=0)
        others = [i for i in range(8) if i != index]
        assert torch.equal(found.patched[others], found.start.expand(7, -1))
    values = cross_patching(pair, prompts, component="v")
    torch.testing.assert_close(values.patched[index], values.goal, atol=8 * EPS * 4, rtol=0)
    same = cross_patching(pair, prompts, component="pattern")
    assert torch.equal(same.patched[:8], same.start.expand(8, -1))  # it attends as before
    stream = cross_patching(pair, prompts, component="resid_post", positions=("S", "END"))
    assert stream.summary().startswith("L") and "the first layer there with half" in stream.summary()
    torch.testing.assert_close(stream.patched[5], stream.goal, atol=8 * EPS * 4, rtol=0)


def test_edits_in_force_are_the_senders() -> None:
    """W_O as it is now, of the model that sends."""
    pair, prompts = planted("llama", "W_O")
    twice = ModelPair.load(pair.base, HookedModel.load(copy.deepcopy(pair.base.wrapped.source)))
    delta = torch.randn(D_HEAD["llama"], 24, generator=torch.Generator().manual_seed(0))
    with twice.tuned.edited(Edit((WeightChange(Site("W_O", *PLANTED), delta),))):
        got = cross_patching(twice, prompts, output="sender")
    torch.testing.assert_close(got.patched, cross_patching(pair, prompts, output="sender").patched, atol=8 * EPS * 4, rtol=0)
    with twice.base.edited(Edit((WeightChange(Site("W_O", *PLANTED), delta),))):
        back = cross_patching(twice, prompts, output="sender")
    torch.testing.assert_close(back.patched[6], back.goal, atol=8 * EPS * 4, rtol=0)
    assert (back.start - got.goal).abs().max() <= 8 * EPS * 4


def test_a_hand_built_circuit() -> None:
    """The mover writes nothing in base; the inhibition heads read nothing in another one."""
    built = hand_built("ioi")
    source: Any = built.model.wrapped.source
    heads = {role: next(iter(built.circuit.heads(role))).heads for role in ("mover", "inhibition")}
    d = built.model.shape.d_head
    prompts = built.task.generate(built.model, 12, seed=0)

    def without(role: str) -> ModelPair:
        broken = copy.deepcopy(source)
        with torch.no_grad():
            for layer, head in heads[role]:
                broken.model.layers[layer].self_attn.o_proj.weight[:, head * d : (head + 1) * d] = 0
        return ModelPair.load(HookedModel.load(broken, tokenizer=built.model.tokenizer), built.model)

    text = "mover=L3H2@END; inhibition=L2H0,L2H1@END; decoys=L0H0,L1H5,L2H3,L3H3; bystanders=L0H2,L0H4"
    mover = cross_patching(without("mover"), prompts, output="sender", sites=text)
    assert isinstance(prompts, PromptPairs) and len(mover.start) == 12 and mover.control.shape[::2] == (4, 12)
    share = dict(zip(mover.cells, mover.recovered.value.tolist(), strict=True))
    assert share["mover"] == pytest.approx(1, abs=1e-4) and max(abs(share[k]) for k in ("inhibition", "decoys", "bystanders")) < 1e-3
    assert present(mover.random_heads[0]).abs().max() < 1e-3 and len(present(mover.random_heads[0])) == 5  # of six heads in its layer
    own = cross_patching(without("mover"), prompts, sites=text)  # its z is there, but base does not write it
    assert own.recovered.value.abs().max() < 1e-3
    inhibition = cross_patching(without("inhibition"), prompts, output="sender", sites=text)
    share = dict(zip(inhibition.cells, inhibition.recovered.value.tolist(), strict=True))
    assert share["inhibition"] == pytest.approx(1, abs=1e-3) and abs(share["decoys"]) < 1e-3
    assert share["mover"] == pytest.approx(1, abs=1e-3)  # its z in tuned holds what the inhibition did
    assert present(inhibition.random_heads[1]).mean().abs() < 0.1
    table = inhibition.strongest(2)
    assert set(table.group) == {"inhibition", "mover"} and "random heads" in inhibition.summary()


def test_groups() -> None:
    shape = HookedModel.load(tiny("llama")).shape

    def sites(text: str, component: str = "z") -> list[list[str]]:
        return [list(map(str, group)) for group in groups_of(text, component, shape).values()]

    assert sites("movers=L1H3,L2H0@END; L0H1") == [["L1H3.z@END", "L2H0.z@END"], ["L0H1.z"]]
    assert list(groups_of("movers=L1H3, L2H0@END ; L0H1, embed", "z", shape)) == ["movers", "L0H1,embed"]
    assert sites("L1H3,L2H0@END,embed,L0.mlp_out@S,L1.attn_out") == [
        ["L1H3.z@END", "L2H0.z@END", "L0.resid_pre@S", "L0.mlp_out@S", "L1.attn_out"]
    ]
    assert sites("L1.k@-2", "q") == [["L1H0.k@-2", "L1H1.k@-2"]]
    assert len(sites("heads", "v")[0]) == 6 and sites("mlps@END") == [[f"L{i}.mlp_out@END" for i in range(3)]]
    assert sites("everything") == [
        ["L0.resid_pre", *(f"L{i}H{h}.z" for i in range(3) for h in range(4)), *(f"L{i}.mlp_out" for i in range(3))]
    ]
    assert sites("L0H1,L0H1.z,heads")[0][0] == "L0H1.z" and len(sites("L0H1,L0H1.z,heads")[0]) == 12
    assert sites(str(Heads.parse("a=L1H3,L2H0@END; L0H1@S"))) == [["L1H3.z@END", "L2H0.z@END"], ["L0H1.z@S"]]
    group = groups_of("L1.z@END,L0H1,L0H2,L2.resid_post", "z", shape)["L1.z@END,L0H1,L0H2,L2.resid_post"]
    assert list(map(str, written(group, shape, added=True))) == ["L0H1.result", "L0H2.result", "L1.attn_out@END", "L2.resid_post"]
    assert list(map(str, written(group, shape, added=False))) == ["L0H1.z", "L0H2.z", "L1.z@END", "L2.resid_post"]


def test_random_heads() -> None:
    shape = HookedModel.load(tiny("llama")).shape
    (group,) = groups_of("g=L0H1,L2H3@END,L1H0@S,L1.mlp_out", "z", shape).values()
    draws = random_heads(group, shape, 80, 0, "g")
    assert draws == random_heads(group, shape, 80, 0, "g") != random_heads(group, shape, 80, 1, "g") and len(set(draws)) == 80
    assert len(random_heads(group, shape, 200, 0, "g")) == 36 * 3  # two of nine at END, one of three at S: all there are
    seen: set[tuple[int | None, int | None]] = set()
    for draw in draws:
        heads = [s for s in draw if s.component == "z"]
        assert Site("mlp_out", 1) in draw and sorted(str(s.position) for s in heads) == ["END", "END", "S"]
        assert len({(s.layer, s.head, s.position) for s in heads}) == 3
        seen |= {(s.layer, s.head) for s in heads}
    assert seen == {(i, h) for i in range(3) for h in range(4)} - {(0, 1), (2, 3), (1, 0)}
    assert {s.layer for draw in random_heads(groups_of("L1H0", "z", shape)["L1H0"], shape, 50, 0, "") for s in draw} == {1}
    for text in ("mlps", "heads", "L1.z", "L0H1.q,L1H1.k", "L0H0,L0H1,L0H2"):
        assert random_heads(groups_of(text, "z", shape)[text], shape, 3, 0, text) == []
    # END of the last layer is read, S there is not; keys and values there are
    late = groups_of("L1H0,L2H0@S", "z", shape)["L1H0,L2H0@S"]
    assert {s.layer for d in random_heads(late, shape, 99, 0, "") for s in d} == {1, 2}
    assert {s.layer for d in random_heads(late, shape, 99, 0, "", {"S"}) for s in d} == {1}
    keys = groups_of("L2H0@S", "k", shape)["L2H0@S"]
    assert {s.layer for d in random_heads(keys, shape, 9, 0, "", {"S"}) for s in d} == {2}
    assert {s.head for draw in random_heads(groups_of("L0H1", "k", shape)["L0H1"], shape, 9, 0, "") for s in draw} == {0}


@pytest.fixture(scope="module")
def both() -> tuple[CrossPatchingResult, CrossPatchingResult]:
    """A map and groups of a planted change that shows in every prompt."""
    pair, prompts = planted("gpt2", "W_O")
    text = "planted=L1H2; some=L0H1,L2H0@END; everything"
    return cross_patching(pair, prompts, output="sender"), cross_patching(pair, prompts, output="sender", sites=text, control=4, seed=3)


def test_tables(both: Any) -> None:
    single, grouped = both
    table = single.to_frame()
    assert list(table.columns) == ["site", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted"] and len(table) == 12
    want = recovered(single.patched.T, single.start, single.goal, seed=0)
    assert table.recovered.tolist() == want.value.tolist() and table.low.tolist() == want.low.tolist()
    test = permutation(single.effect.T, seed=0)
    assert table.p.tolist() == test.p.tolist() and table.p_adjusted.tolist() == test.adjusted.tolist()
    assert single.strongest(3).site[0] == "L1H2.z" and len(single.strongest(3)) == 3
    rows = single.to_frame(per="prompt")
    assert len(rows) == 12 * 5 and rows.patched.tolist() == single.patched.flatten().tolist()
    groups = grouped.to_frame()
    assert (
        groups.group.tolist() == ["planted", "some", "everything"]
        and groups.sites[0] == "L1H2.result"
        and "sites" not in grouped.strongest()
    )
    gap = float((grouped.goal - grouped.start).double().mean())
    draws = (grouped.control[1] - grouped.start).double().mean(-1) / gap
    assert groups.control[1] == pytest.approx(float(draws.mean())) and groups.control_sd[1] == pytest.approx(float(draws.std()))
    assert groups.control.isna().tolist() == [False, False, True] and grouped.control.shape == (3, 4, 5)
    with pytest.raises(InputError, match="per must be 'prompt'"):
        single.to_frame(per="head")


def test_figures_and_sentences(both: Any) -> None:
    single, grouped = both
    drawn = single.plot()
    values = torch.as_tensor(drawn.data[0].z)
    there = ~values.isnan()
    assert torch.allclose(values[there], single.recovered.value.reshape(3, 4)[there], atol=1e-9) and not bool(
        there[0].any()
    )  # exact 0: grey
    assert drawn.layout.xaxis.title.text == "head, at all positions" and drawn.layout.yaxis.title.text == "layer"
    bars = grouped.plot()
    assert [b.name for b in bars.data if b.x is not None and len(b.x) == 3] == ["group", "random heads"]
    assert "share of logit_diff recovered" in bars.to_json() and "no random heads beside everything" in grouped.summary()
    assert "n = 5 prompts" in grouped.summary() and "\n" not in grouped.summary() + single.summary()


def test_round_trip(tmp_path: Any, both: Any) -> None:
    for i, result in enumerate(both):
        again = CrossPatchingResult.load(result.save(tmp_path / str(i)))
        assert again.summary() == result.summary() and again.to_frame().equals(result.to_frame())
    assert both[1].meta.settings["sites"] == "planted=L1H2; some=L0H1,L2H0@END; everything" and both[1].meta.seed == 3


def test_cells_by_position_and_other_metrics() -> None:
    pair, prompts = planted("llama", "W_O")
    named = cross_patching(pair, prompts, component="mlp_out")
    assert named.places == ("S", "END") and named.patched.shape == (6, 5) and named.cells[1] == "L0.mlp_out@END"
    level = Prompts(tuple(map(str, LEVEL)), tuple(map(tuple, LEVEL)), answers=prompts.answers, distractors=prompts.distractors)
    whole = cross_patching(pair, level, component="attn_out")
    assert whole.by_token and whole.places == ("(0)", "(1)", "(2)") and whole.patched.shape == (9, 5)
    other = Prompts(tuple(map(str, SAME)), tuple(map(tuple, SAME)), positions=WORLD["same"].positions)
    clean = cross_patching(pair, PromptPairs(prompts, other), component="mlp_out", positions=("S", "END"))
    assert torch.equal(clean.patched, named.patched)
    at = cross_patching(pair, prompts, heads_at="END", output="sender")
    assert at.cells[6] == "L1H2.z@END" and "L1H2.result@END" in at.sites[6]
    for metric in ("kl", "logit_diff@S"):
        found = cross_patching(pair, prompts, output="sender", sites="everything; planted=L1H2; L0H0", metric=metric, control=2)
        torch.testing.assert_close(found.patched[1], found.goal, atol=2e-5, rtol=0)
        assert torch.equal(found.patched[2], found.start)
    kl = cross_patching(pair, prompts, output="sender", sites="planted=L1H2", metric="kl", control=0)
    assert kl.unit == "KL(tuned || run), nats" and kl.goal.abs().max() < 1e-6 < kl.start.min() and kl.control.shape == (1, 0, 5)


def test_more_rows_in_the_vocabulary() -> None:
    """Padded rows mean nothing to a difference of two logits; the whole distribution cannot be compared."""
    pair = ModelPair.load(HookedModel.load(tiny("llama", seed=1)), HookedModel.load(tiny("llama", seed=2, vocab_size=37)))
    found = cross_patching(pair, PROMPTS, sites="L1H2,L0H0@END", output="sender")
    assert found.patched.shape == (1, 5) and (found.effect.abs() > 1e-4).any()
    with pytest.raises(InputError, match="kl compares whole vocabularies, and the two models have 31 and 37 entries"):
        cross_patching(pair, PROMPTS, metric="kl")


def test_one_prompt_is_not_normalised(both: Any) -> None:
    pair, prompts = planted("gpt2", "W_O")
    one = cross_patching(pair, prompts[0], output="sender", sites="planted=L1H2; L0H0", control=2)
    assert one.summary().startswith("planted changes logit_diff by ") and one.to_frame().recovered.isna().all()
    assert (
        "not normalised" in one.plot().to_json() and "not normalised" in cross_patching(pair, prompts[0], output="sender").plot().to_json()
    )


def test_refusals(unchecked: None) -> None:
    pair, prompts = planted("llama", "W_O")

    def refused(match: str, given: Any = prompts, **settings: Any) -> None:
        with pytest.raises(InputError, match=match):
            cross_patching(pair, given, **settings)

    refused("no component named 'resid_pred'; nearest: resid_pre", component="resid_pred")
    refused("no component named 'result'", component="result")
    refused("no direction named 'base_to_tune'; nearest: base_to_tuned", direction="base_to_tune")
    refused("no output named 'sending'", output="sending")
    refused("output=sender is about z", component="q", output="sender")
    refused("output=sender is about z", sites="mlps; embed", output="sender")
    refused("L1H7.z: head 7 is out of range; the model has heads 0 to 3", sites="L1H7")
    refused("L9H1.z@END: layer 9 is out of range", sites="L9H1@END")
    refused("key/value heads 0 to 1", sites="L1H3", component="k")
    refused("no position 'S9'", sites="L1H1@S9")
    refused("no position 'P'", component="mlp_out", positions=("P",))
    refused("no position 'S3'", heads_at="S3")
    refused("outside prompt 1", sites="mlps@5")
    refused("'L1' in a group is neither a head", sites="L1")
    refused("L1.W_O in a group cannot be set", sites="L1.W_O")
    refused("L1H2.result in a group cannot be set", sites="L1H2.result")
    refused("'a=' is not a group", sites="a=")
    refused("'' is not a group", sites="a=L1H1;")
    refused("two groups a;", sites="a=L1H1; a=L0H1")
    refused("heads of the component, and mlp_out has none", sites="L1H1", component="mlp_out")
    refused("sites is one text", sites=("L1H1", "L0H1"))
    refused("control is a number of draws, but it is -1", control=-1)
    refused("positions=END would not be used: z is set where heads_at says", positions=("END",))
    refused("heads_at=END would not be used: mlp_out is set where", component="mlp_out", heads_at="END")
    refused("heads_at=END would not be used: groups name", sites="L1H1", heads_at="END")
    refused("positions=all needs prompts of one length", component="mlp_out", positions=("all",))
    refused("one distractor token per prompt", given=replace(prompts, distractors=None))
    refused("needs Prompts, not list", given=["a text"])
    with pytest.raises(InputError, match="width of the residual stream is 24 in base and 32 in tuned"):
        ModelPair.load(pair.base, HookedModel.load(tiny("llama", hidden_size=32)))
    neox = HookedModel.load(tiny("neox"))
    with pytest.raises(InputError, match="has no resid_mid"):
        cross_patching(ModelPair.load(neox, HookedModel.load(tiny("neox", seed=2))), PROMPTS, component="resid_mid")


def test_the_models_leave_as_they_came(both: Any) -> None:
    pair, prompts = planted("gpt2", "W_O")
    before = [m.logits(prompts) for m in (pair.base, pair.tuned)]
    cross_patching(pair, prompts, output="sender", sites="everything; L1H2@S", control=2)
    for m, logits in zip((pair.base, pair.tuned), before, strict=True):
        assert torch.equal(m.logits(prompts), logits)
        assert all(not point.fwd_hooks for point in m.wrapped.bridge.hook_dict.values())
        assert all(not m.wrapped.output_projection(i)._forward_pre_hooks for i in range(3))
