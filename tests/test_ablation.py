"""Knockouts against the plain Hugging Face model with hooks written by hand; what stands in, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import plain_hooks
import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from torch import Tensor, nn

from interp.errors import InputError
from interp.metrics import Metric, Reader
from interp.models import HookedModel
from interp.models import ablated as running
from interp.prompts import PromptPairs, Prompts
from interp.sites import Site, parse_sites
from interp.sweeps import ablation as module
from interp.sweeps.ablation import Ablations, Knockout, comparable, stand_in

# 5 pairs, 3 layers, 4 heads, 24 = d_model, three prompts of 7 tokens and two of 4
CLEAN = [[3, 4, 5, 6, 7, 8, 9], [24, 25, 26, 27], [13, 14, 15, 16, 17, 30, 2], [10, 11, 12, 28], [18, 19, 20, 21, 22, 23, 1]]
CORRUPT = [[5, 4, 5, 16, 7, 8, 9], [14, 25, 26, 27], [13, 14, 25, 16, 17, 3, 6], [10, 22, 12, 9], [18, 9, 20, 21, 22, 23, 11]]
PLACES = {"S": ((2,), (0,), (3,), (1,), (5,)), "two": ((1, 4), (1, 2), (0, 6), (0, 3), (2, 6))}
TAGS = {"form": ("a", "b", "a", "b", "a"), "half": ("x", "x", "x", "y", "y")}
EPS = torch.finfo(torch.float32).eps


def prompts(rows: Sequence[Sequence[int]], **more: Any) -> Prompts:
    ids = tuple(tuple(r) for r in rows)
    world = {"positions": PLACES, "answers": (4, 9, 2, 7, 30), "distractors": (1, 5, 0, 3, 28), "tags": TAGS}
    return Prompts(tuple(map(str, rows)), ids, **(world | more))


PAIRS = PromptPairs(prompts(CLEAN), prompts(CORRUPT))
NODES = [
    [],
    ["L0H1.z@S", "L1H3.z@END", "L2H0.z@two"],
    ["L0H0.z", "L0H1.z", "L1H2.z@2", "L1H2.z@-1", "L2H3.z@END"],
    ["L2H1.z@END", "L0H3.z@S", "L1.mlp_out@END", "L0.mlp_out"],
]
KNOCKOUTS = [Knockout(frozenset(parse_sites(texts)), rest) for texts in NODES for rest in (True, False)]


def tokens(node: Site, row: int) -> list[int]:
    length = len(CLEAN[row])
    if node.position is None:
        return list(range(length))
    if isinstance(node.position, int):
        return [node.position % length]
    return [length - 1] if node.position == "END" else list(PLACES[node.position][row])


Value = Callable[[str, int, int, int], Tensor]
"""What stands in, by component, layer, prompt and token."""


def literal(hf: nn.Module, knockouts: Sequence[Knockout], value: Value, mlps: bool) -> Tensor:
    """The logit difference of every knockout and prompt: one prompt, one forward; what is not set runs free."""
    heads, layers = hf.config.num_attention_heads, hf.config.num_hidden_layers
    out = torch.empty(len(knockouts), len(CLEAN))
    for i, knockout in enumerate(knockouts):
        for row, ids in enumerate(CLEAN):
            named = {(n.component, n.layer, n.head or 0, t) for n in knockout.nodes for t in tokens(n, row)}

            def change(x: Tensor, component: str, layer: int, row: int = row, named: Any = named, rest: bool = knockout.rest) -> None:
                for t in range(len(x)):
                    for head in range(heads if component == "z" else 1):
                        if ((component, layer, head, t) in named) != rest:
                            new = value(component, layer, row, t)
                            if component == "z":
                                x[t, head] = new[head]
                            else:
                                x[t] = new

            with torch.no_grad(), ExitStack() as stack:
                for layer in range(layers):
                    for c in ("z", "mlp_out") if mlps else ("z",):
                        stack.enter_context(plain_hooks.hooked(hf, c, layer, lambda x, c=c, layer=layer: change(x, c, layer)))
                logits = hf(torch.tensor([ids]), use_cache=False).logits[0, -1]
            out[i, row] = logits[PAIRS.answers[row]] - logits[PAIRS.distractors[row]]
    return out


OTHERS = ((2, 4), (3,), (0, 4), (1,), (0, 2))


def values_of(hf: nn.Module, kind: str, others: Sequence[Sequence[int]] = OTHERS, rows: Any = CORRUPT) -> Value:
    """Stand-ins by the book; means over the other rows of a group."""
    every = [(c, layer) for layer in range(3) for c in ("z", "mlp_out")]
    seen = [plain_hooks.seen(hf, ids, every) for ids in rows]

    def value(component: str, layer: int, row: int, t: int) -> Tensor:
        if kind == "zero":
            return torch.zeros_like(seen[0][component, layer][0])
        of = [row] if kind == "resample" else others[row]
        mean = sum(seen[i][component, layer][t].double() for i in of) / len(of)
        return torch.as_tensor(mean).to(seen[0][component, layer])

    return value


def ablations(model: HookedModel, given: Prompts | PromptPairs = PAIRS, **settings: Any) -> Ablations:
    return Ablations(model, given, Metric.parse("logit_diff").reader(given), **settings)


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


@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("kind", ["mean", "resample", "zero"])
def test_agrees_with_one_plain_forward_per_knockout_and_prompt(hf: nn.Module, model: HookedModel, kind: Any, mlps: bool) -> None:
    chosen = KNOCKOUTS if mlps else KNOCKOUTS[:6]
    runs = ablations(model, ablation=kind, mlps=mlps, by="form" if kind == "mean" else None)
    got, want = runs(chosen), literal(hf, chosen, values_of(hf, kind), mlps)
    top = float(model.logits(runs.batch).abs().max())
    torch.testing.assert_close(got, want, atol=8 * EPS * top, rtol=0)
    changed = (want - runs.intact).abs()[[0, *range(2, len(chosen))]]
    assert (changed > 100 * EPS * top).float().mean() > 0.9
    done, off = runs.checked(6, seed=3)
    assert done == 6 and off <= 8 * EPS * top


@pytest.mark.parametrize("kind", FOUR)
def test_to_the_last_digits_of_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face takes softmax and some norms in float32, and metrics are float32: here nothing is."""
    real = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim=None, dtype=None, **kw: real(x, dim=dim))
    monkeypatch.setattr(Reader, "values", lambda self, read: read[:, 0] - read[:, 1])
    hf: Any = tiny(kind, seed=1).double()
    hf.set_attn_implementation("eager")
    for part in hf.modules():
        if "RMSNorm" in type(part).__name__:
            own = lambda self, x: self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))  # noqa: E731
            monkeypatch.setattr(type(part), "forward", own)
    torch.set_default_dtype(torch.float64)
    try:
        runs = ablations(HookedModel.load(hf), by="form", mlps=True)
        got, want = runs(KNOCKOUTS), literal(hf, KNOCKOUTS, values_of(hf, "mean"), True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_what_knocks_out_nothing_is_the_model_to_the_bit(model: HookedModel) -> None:
    heads = [Site("z", layer, head) for layer in range(3) for head in range(4)]
    mlps = [Site("mlp_out", layer) for layer in range(3)]
    for ablation in ("mean", "resample", "zero"):
        runs = ablations(model, ablation=ablation, by="form" if ablation == "mean" else None)
        nothing = [Knockout.of(()), Knockout.all_but(heads)]
        assert torch.equal(runs(nothing), runs.intact.expand(2, -1))
    same = PAIRS[[0, 2]]
    one_by_one = [site.at(t) for site in heads for t in range(7)]
    runs = ablations(model, same)
    assert torch.equal(runs([Knockout.all_but(one_by_one)])[0], runs.intact)
    runs = ablations(model, same, mlps=True)
    assert torch.equal(runs([Knockout.all_but(heads + mlps)])[0], runs.intact)
    assert not torch.equal(runs([Knockout.all_but(heads)])[0], runs.intact)


def test_the_prompt_itself_as_its_stand_in_changes_nothing(model: HookedModel) -> None:
    places = {name: rows[:1] * 3 for name, rows in PLACES.items()}
    thrice = prompts(CLEAN[:1] * 3, positions=places, answers=(4, 9, 2), distractors=(1, 5, 0), tags={}, contexts=("v", "w", "x"))
    for given in (thrice, PromptPairs(thrice, thrice)):
        runs = ablations(model, given)
        top = float(model.logits(runs.batch).abs().max())
        torch.testing.assert_close(runs(KNOCKOUTS[:6]), runs.intact.expand(6, -1), atol=8 * EPS * top, rtol=0)


def test_no_mean_has_anything_of_the_prompt_or_its_partner(llama: HookedModel) -> None:
    """Its own row may hold anything at all."""
    plain = ablations(llama, by="form")(KNOCKOUTS[:1])[0]
    for i in range(5):
        rows = [[9, 1, 30, 2, 8, 3, 12][: len(row)] if j == i else row for j, row in enumerate(CORRUPT)]
        other = ablations(llama, replace(PAIRS, corrupt=prompts(rows)), by="form")(KNOCKOUTS[:1])[0]
        moved = (other - plain).abs() > 1e-4
        assert moved.tolist() == [i in OTHERS[j] for j in range(5)], i


def test_means_and_draws_leave_out_whole_contexts(hf: nn.Module, model: HookedModel) -> None:
    """Copies, other questions on one text, and pairs that are mirror images of each other."""
    seven, chosen = [0, 2, 4], KNOCKOUTS[:6]

    def same(given: PromptPairs, others: Sequence[Sequence[int]], rows: Any) -> None:
        runs = ablations(model, given, by="form")
        want = literal(hf, chosen, values_of(hf, "mean", others, rows), False)
        torch.testing.assert_close(runs(chosen), want, atol=8 * EPS * float(model.logits(runs.batch).abs().max()), rtol=0)

    shared = replace(PAIRS, clean=replace(PAIRS.clean, contexts=("p", "q", "p", "r", "s")))
    same(shared, ((4,), (3,), (4,), (1,), (0, 2)), CORRUPT)
    rows = [CLEAN[2], CORRUPT[1], CLEAN[0], CORRUPT[3], CORRUPT[4]]  # 0 and 2 are the two sides of one pair
    same(PromptPairs(prompts(CLEAN), prompts(rows)), ((4,), (3,), (4,), (1,), (0, 2)), rows)
    assert comparable(shared, "mean", "form") == [0, 1, 2, 3, 4] and comparable(shared[[0, 2, 1, 3]], "mean", "form") == [2, 3]
    assert comparable(shared.clean[seven], "mean") == [0, 1, 2] and comparable(shared.clean[[0, 1, 2]], "mean", "form") == []
    assert comparable(shared.clean[[0, 1, 2]], "zero") == [0, 1, 2] == comparable(shared[[0, 1, 2]], "resample")
    assert comparable(shared.clean[[0, 1, 3]], "resample") == [1, 2]
    drawn = [stand_in(model, shared.clean[seven], "resample", seed=seed)[0].entry[:, 0] // 7 for seed in range(6)]
    assert {(int(x[0]), int(x[1])) for x in drawn} == {(2, 2)} and {int(x[2]) for x in drawn} == {0, 1}


def test_what_is_touched_is_where_a_mask_is(llama: HookedModel) -> None:
    every = [Site("z", layer, head) for layer in range(3) for head in range(4)]
    some = [Knockout.all_but([n if n.head else n.at(t) for n in every for t in range(4)]) for _ in range(1)]
    chosen = [*KNOCKOUTS[:6], Knockout.all_but(every), Knockout.all_but([n.at("S") for n in every]), *some]
    masks = module._Masks(PAIRS.clean.batch(), chosen, ablations(llama, by="form").stand_in.table)
    slow = torch.zeros(len(chosen), 5, dtype=torch.bool)
    for k in range(len(chosen)):
        for row in range(5):
            outs = [masks(Site("z", layer), torch.tensor([k]), torch.tensor([row]), len(CLEAN[row])) for layer in range(3)]
            slow[k, row] = any(bool(out.any()) for out in outs)
    assert torch.equal(masks.touched(), slow) and slow[-3:].tolist() == [[False] * 5, [True] * 5, [True, False] * 2 + [True]]


def test_complements_are_one_knockout(model: HookedModel) -> None:
    """All but a circuit, written as the list of what is not in it."""
    given, heads = PAIRS[[0, 2]], [Site("z", layer, head, t) for layer in range(3) for head in range(4) for t in range(7)]
    runs, circuit = ablations(model, given), heads[5:40:3]
    one, other = runs([Knockout.all_but(circuit), Knockout.of(set(heads) - set(circuit))])
    assert torch.equal(one, other) and not torch.equal(one, runs.intact)


def test_small_passes_and_memory_that_runs_out_give_the_same(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, rows = ablations(llama, by="form"), []
    want = runs(KNOCKOUTS[:6])
    real = HookedModel.forward

    def counted(self: HookedModel, part: Any, *args: Any, **kwargs: Any) -> Any:
        if len(part.batch) > 3:
            raise torch.OutOfMemoryError("too many rows")
        rows.append(len(part.batch))
        return real(self, part, *args, **kwargs)

    again = ablations(llama, by="form")
    monkeypatch.setattr(HookedModel, "forward", counted)
    monkeypatch.setattr(module, "_ROWS", 11)
    monkeypatch.setattr(llama._budget, "size", 2**16)
    got = again(KNOCKOUTS[:6])
    top = float(want.abs().max())
    torch.testing.assert_close(got, want, atol=64 * EPS * top, rtol=0)
    assert max(rows) <= 3 and sum(rows) == 5 * 5  # the knockout of nothing is not run


def test_each_knockout_runs_once(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, asked = ablations(llama, by="form"), []
    real = running.ablated
    monkeypatch.setattr(module, "ablated", lambda *args: asked.append(len(args[2])) or real(*args))
    first = runs([KNOCKOUTS[2], KNOCKOUTS[3], KNOCKOUTS[2]])
    assert torch.equal(first[0], first[2]) and asked == [10]
    assert torch.equal(runs([KNOCKOUTS[3], KNOCKOUTS[4]])[0], first[1]) and asked == [10, 5]
    assert runs([]).shape == (0, 5)


def test_the_check_sees_a_wrong_value(llama: HookedModel) -> None:
    runs = ablations(llama, by="form")
    runs(KNOCKOUTS[2:3])
    assert runs.checked(9, 0)[0] == 5 and runs.checked(5, 0)[1] < 1e-4
    runs._known[KNOCKOUTS[2]][3] += 0.5
    assert runs.checked(5, 0)[1] == pytest.approx(0.5, abs=1e-3)


def test_prompts_alone_take_means_over_themselves(hf: nn.Module, model: HookedModel) -> None:
    four = prompts(CLEAN)[[0, 1, 2, 3]]
    runs = ablations(model, four, by="length")
    want = literal(hf, KNOCKOUTS[:6], values_of(hf, "mean", ((2,), (3,), (0,), (1,), (0,)), CLEAN), False)[:, :4]
    torch.testing.assert_close(runs(KNOCKOUTS[:6]), want, atol=8 * EPS * float(model.logits(runs.batch).abs().max()), rtol=0)
    assert runs.notes == ("means over the prompts of other contexts by length, 1 each: fewer than 10 are noisy",)


def test_means_go_by_template_where_there_are_templates(llama: HookedModel) -> None:
    named = replace(PAIRS, clean=replace(PAIRS.clean, tags=TAGS | {"template": TAGS["form"]}))
    chosen = KNOCKOUTS[:6]
    by_form = ablations(llama, named, by="form")(chosen)
    assert torch.equal(ablations(llama, named)(chosen), by_form)
    assert torch.equal(ablations(llama, named, by="template,length")(chosen), by_form)
    assert torch.equal(ablations(llama, PAIRS, by="length")(chosen), by_form)  # each form has its own length here
    assert torch.equal(ablations(llama, PAIRS)(chosen), by_form)
    fine = replace(named, clean=replace(named.clean, tags=TAGS | {"template": ("a", "b", "a", "b", "a"), "half": tuple("xyxyx")}))
    assert torch.equal(ablations(llama, fine, by="template, half")(chosen), by_form)
    assert comparable(named, "mean", "template, half") == [0, 2]
    same = named[[0, 2]]
    assert torch.equal(ablations(llama, same, by="all")(chosen), ablations(llama, same)(chosen))
    few = "means over the corrupt prompts of other contexts, 1 each: fewer than 10 are noisy"
    assert ablations(llama, PAIRS[[0, 2]]).notes == (few,)
    plenty = prompts([[i, 5, 6] for i in range(11)], positions={}, answers=(1,) * 11, distractors=(2,) * 11, tags={})
    assert ablations(llama, plenty).notes == ("means over the prompts of other contexts, 10 each",)


def test_another_prompt_of_the_same_length_is_drawn(llama: HookedModel) -> None:
    rows = [CLEAN[0], CLEAN[2], CORRUPT[0], CORRUPT[2], [9, 8, 7, 6, 5, 4, 3]]
    asked = prompts(rows, positions={}, tags={"form": tuple("aabba")})
    found = {seed: stand_in(llama, asked, "resample", seed=seed)[0].entry[:, 0] // 7 for seed in range(12)}
    drawn = torch.stack(list(found.values()))
    assert bool((drawn != torch.arange(5)).all()) and len(drawn.unique()) == 5
    assert torch.equal(found[3], stand_in(llama, asked, "resample", seed=3)[0].entry[:, 0] // 7)
    within = stand_in(llama, asked, "resample", by="form", seed=0)[0].entry[:, 0] // 7
    assert within[2:4].tolist() == [3, 2] and set(within.tolist()[:2] + within.tolist()[4:]) <= {0, 1, 4}
    one = ablations(llama, asked, ablation="resample", by="form")
    pairs = PromptPairs(asked, asked[within.tolist()])
    other = ablations(llama, pairs, ablation="resample")
    torch.testing.assert_close(one(KNOCKOUTS[:1]), other(KNOCKOUTS[:1]), atol=1e-5, rtol=0)
    assert one.notes == ("another prompt drawn for each",)


def test_hooks_and_weights_are_left_alone(llama: HookedModel) -> None:
    before = llama.logits(PAIRS.clean.batch())
    runs = ablations(llama, by="form")
    with pytest.raises(InputError, match="no position 'nowhere'"):
        runs([Knockout.of(parse_sites("L0H1.z@nowhere"))])
    runs(KNOCKOUTS[:2])
    assert torch.equal(llama.logits(PAIRS.clean.batch()), before)


def test_edits_in_force_count(llama: HookedModel) -> None:
    """Means and runs are those of the edited model."""
    from interp.edits import ActivationChange, Edit

    edit = Edit((ActivationChange(Site("resid_pre", 1), "add", torch.linspace(-1, 1, 24)),))
    plain = ablations(llama, by="form")(KNOCKOUTS[:1])
    with llama.edited(edit):
        runs = ablations(llama, by="form")
        assert not torch.allclose(runs(KNOCKOUTS[:1]), plain) and runs.checked(3, 0)[1] < 1e-4


def refused(match: str, given: Prompts | PromptPairs = PAIRS, **settings: Any) -> None:
    with pytest.raises(InputError, match=match):
        stand_in(HookedModel.load(tiny("llama", seed=1)), given, **({"ablation": "mean"} | settings))


def test_bad_input_is_refused_in_one_sentence(unchecked: None, llama: HookedModel) -> None:
    refused("there is no ablation named 'median'", ablation="median")
    refused("by=template: these prompts have no tag 'template'; they have form, half, and by=length or by=all need none", by="template")
    refused("they have no tags", replace(prompts(CLEAN), tags={}), by="form")
    refused("have 4 to 7 tokens, and means are taken token by token; use by=length, or ablation=zero", by="all")
    refused("prompts with half=x have 4 to 7 tokens.*by=half,length", by="half")
    refused("prompt 0 has no prompt of another context to take a mean over; give more prompts$", prompts(CLEAN)[[1]])
    lone = prompts(CLEAN)[[0, 2, 3]]
    refused("prompt 2 has no prompt of another context to take a mean over, with form=b; give more.*less than by=form", lone, by="form")
    refused("prompt 1 has no corrupt prompt of another context.*with form=a, half=y", PAIRS[[0, 4, 2]], by="form,half")
    refused("prompt 0 has no corrupt prompt of another context", replace(PAIRS, clean=replace(PAIRS.clean, contexts=("p",) * 5)))
    refused("would not be used: ablation=zero", ablation="zero", by="form")
    refused("would not be used: ablation=resample", ablation="resample", by="form")
    refused("needs another prompt of 4 tokens and another context for prompt 2", lone, ablation="resample")
    longer = replace(PAIRS, corrupt=prompts([*CORRUPT[:3], [*CORRUPT[3], 5], CORRUPT[4]]))
    refused("the prompts of pair 3 have 4 and 5 tokens; use ablation=mean with by=length, or zero", longer, ablation="resample")
    other = PromptPairs(PAIRS.clean[[1]], prompts(CORRUPT)[[0]])
    refused("prompt 0 has no corrupt prompt of another context to take a mean over, with length=4", other, by="length")
    runs = ablations(llama, by="form")
    for text in ("L0.mlp_out@END", "L0H1.q@END", "embed"):
        with pytest.raises(InputError, match="cannot be knocked out here; what can is z"):
            runs([Knockout.of(parse_sites(text))])
