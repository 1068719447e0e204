"""Patches against the plain Hugging Face model with hooks written by hand, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from torch import Tensor, nn

from interp.edits import ActivationChange, Edit
from interp.errors import InputError
from interp.metrics import Metric
from interp.models import Batch, HookedModel
from interp.prompts import Prompts
from interp.sites import Site
from interp.sweeps import floor, run, sweep

# 5 pairs, 3 layers, 4 heads, 24 = d_model, up to 9 tokens, 2 named positions: no two sizes are alike
CLEAN = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23], [24, 25, 26, 27]]
SAME = [[5, 4, 5, 16, 7, 8, 9], [10, 21, 12], [13, 14, 25, 16, 17], [18, 9, 20, 21, 22, 23], [14, 25, 26, 27]]
OTHER = [[5, 4, 5, 16, 7, 8, 9, 3, 1], [10, 12], [13, 14, 25, 16], [18, 9, 20, 21, 22, 23], [14, 25, 26, 27, 11]]
SUBJECT = {"clean": (2, 0, 3, 1, 2), "same": (1, 2, 0, 4, 2), "other": (6, 0, 1, 1, 3)}


def prompts(rows: list[list[int]], subject: tuple[int, ...]) -> Prompts:
    places = {"S": tuple((i,) for i in subject)}
    ids = tuple(tuple(r) for r in rows)
    return Prompts(tuple(str(r) for r in rows), ids, positions=places, answers=(4, 9, 2, 7, 30), distractors=(1, 5, 0, 3, 28))


WORLD = {"clean": prompts(CLEAN, SUBJECT["clean"]), "same": prompts(SAME, SUBJECT["same"]), "other": prompts(OTHER, SUBJECT["other"])}


@pytest.fixture(scope="module", params=FOUR)
def plain(request: pytest.FixtureRequest) -> nn.Module:
    return tiny(request.param, seed=1)


@pytest.fixture(scope="module")
def model(plain: nn.Module) -> HookedModel:
    return HookedModel.load(plain)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel.load(tiny("llama", seed=1))


def module(hf: Any, component: str, layer: int) -> tuple[nn.Module, bool]:
    """The plain module that makes or takes an activation, and whether it takes it (as its first argument)."""
    if hasattr(hf, "transformer"):
        block = hf.transformer.h[layer]
        parts = {"z": block.attn.c_proj, "attn_out": block.attn, "mlp_out": block.mlp}
    elif hasattr(hf, "gpt_neox"):
        block = hf.gpt_neox.layers[layer]
        parts = {"z": block.attention.dense, "attn_out": block.attention, "mlp_out": block.mlp}
    else:
        block = hf.model.layers[layer]
        parts = {"z": block.self_attn.o_proj, "attn_out": block.self_attn, "mlp_out": block.mlp}
    return parts.get(component, block), component in ("z", "resid_pre")


def hooked(hf: nn.Module, site: Site, change: Callable[[Tensor], None]) -> Any:
    """A plain PyTorch hook that lets ``change`` read or overwrite a copy of the activation [1 pos d]."""
    where, takes = module(hf, site.component, site.layer)

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        change(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).clone()
        change(x)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    return where.register_forward_pre_hook(before, with_kwargs=True) if takes else where.register_forward_hook(after)


def literal(hf: Any, into: Prompts, source: Prompts, patches: list[tuple[Site, ...]], d_head: int) -> Tensor:
    """The logit difference of every patch and pair, by the book: one prompt, one forward, no padding."""
    assert into.answers is not None and into.distractors is not None
    out = torch.empty(len(patches), len(into))
    for row in range(len(into)):
        seen: dict[Site, Tensor] = {}
        with torch.no_grad(), ExitStack() as stack:
            for site in {s for p in patches for s in p}:
                stack.callback(hooked(hf, site, lambda x, site=site, seen=seen: seen.__setitem__(site, x.clone())).remove)
            hf(torch.tensor([source.ids[row]]))
        for i, patch in enumerate(patches):
            logits = patched_logits(hf, into, source, patch, d_head, row, seen)
            out[i, row] = logits[into.answers[row]] - logits[into.distractors[row]]
    return out


def patched_logits(
    hf: Any, into: Prompts, source: Prompts, patch: tuple[Site, ...], d_head: int, row: int, seen: dict[Site, Tensor]
) -> Tensor:
    def write(x: Tensor, site: Site) -> None:
        columns = slice(None) if site.head is None else slice(site.head * d_head, (site.head + 1) * d_head)
        here: Any = slice(None) if site.position is None else place(into, site, row)
        there: Any = slice(None) if site.position is None else place(source, site, row)
        x[0, here, columns] = seen[site][0, there, columns]

    with torch.no_grad(), ExitStack() as stack:
        for site in patch:
            stack.callback(hooked(hf, site, lambda x, site=site: write(x, site)).remove)
        return hf(torch.tensor([into.ids[row]])).logits[0, -1]


def place(prompts: Prompts, site: Site, row: int) -> int:
    if isinstance(site.position, int):
        return site.position
    return len(prompts.ids[row]) - 1 if site.position == "END" else prompts.positions["S"][row][0]


PATCHES = [
    "L0.resid_pre@S",
    "L2.resid_pre@END",
    "L1.resid_post@S",
    "L2.resid_post@END",
    "L1.attn_out@S",
    "L0.mlp_out@END",
    "L1H3.z@S",
    "L2H0.z@END",
    "L0.resid_pre@1",
]
WHOLE = ["L1.resid_pre", "L2H2.z", "L0H3.z", "L1.mlp_out", "L0.attn_out"]


def test_named_positions_agree_with_plain_hooks(plain: nn.Module, model: HookedModel) -> None:
    into, donor = WORLD["clean"], WORLD["other"]
    patches = [(Site.parse(p),) for p in PATCHES] + [(Site.parse("L0.mlp_out@S"), Site.parse("L1H2.z@END"))]
    got = sweep(model, into.batch(), patches, (model, donor.batch()), Metric.parse("logit_diff").reader(into))
    wanted = literal(plain, into, donor, patches, model.shape.d_head)
    assert got.shape == (10, 5)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)
    assert (got - run(model, into.batch(), Metric.parse("logit_diff").reader(into))).abs().mean() > 0.01


def test_whole_prompts_agree_with_plain_hooks(plain: nn.Module, model: HookedModel) -> None:
    into, donor = WORLD["clean"], WORLD["same"]
    patches = [(Site.parse(p),) for p in WHOLE]
    got = sweep(model, into.batch(), patches, (model, donor.batch()), Metric.parse("logit_diff").reader(into))
    wanted = literal(plain, into, donor, patches, model.shape.d_head)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)


def test_the_prompt_into_itself_changes_nothing_at_all(model: HookedModel) -> None:
    batch, reader = WORLD["clean"].batch(), Metric.parse("logit_diff").reader(WORLD["clean"])
    base = run(model, batch, reader)
    got = sweep(model, batch, [Site.parse(p) for p in (*PATCHES, *WHOLE, "L1.mlp_post", "L2H3.q@S", "L0H1.v")], (model, batch), reader)
    assert torch.equal(got, base.expand_as(got))


def test_everything_at_the_bottom_or_the_end_at_the_top_is_the_other_run(model: HookedModel) -> None:
    clean, other = WORLD["clean"], WORLD["same"]
    reader = Metric.parse("logit_diff").reader(clean)
    goal = run(model, clean.batch(), reader)
    last = model.shape.n_layers - 1
    got = sweep(model, other.batch(), [Site("resid_pre", 0), Site("resid_post", last, position="END")], (model, clean.batch()), reader)
    torch.testing.assert_close(got, goal.expand_as(got), atol=1e-6, rtol=0)
    assert (run(model, other.batch(), reader) - goal).abs().max() > 0.02


def test_what_comes_after_the_place_that_is_read_has_no_effect_at_all(model: HookedModel) -> None:
    """Causality: END lies after S, and heads and MLPs of the last layer move nothing but their own position."""
    clean, other = prompts(CLEAN, (2, 0, 3, 1, 2)), prompts(SAME, (1, 0, 0, 4, 2))
    reader = Metric.parse("logit_diff@S").reader(clean)
    base = run(model, clean.batch(), reader)
    late = [Site("z", 0, 3, "END"), Site("z", 2, 1, "END"), Site("resid_pre", 0, position="END")]
    got = sweep(model, clean.batch(), late, (model, other.batch()), reader)
    assert torch.equal(got, base.expand_as(got))
    reader = Metric.parse("logit_diff").reader(clean)
    base = run(model, clean.batch(), reader)
    got = sweep(model, clean.batch(), [Site("z", 2, 1, "S"), Site("mlp_out", 2, position="S")], (model, other.batch()), reader)
    assert torch.equal(got, base.expand_as(got))
    assert not torch.equal(sweep(model, clean.batch(), [Site("z", 1, 1, "S")], (model, other.batch()), reader)[0], base)


def test_between_models_only_the_planted_head_matters(model: HookedModel, plain: nn.Module) -> None:
    """The same prompts in a model one head of which is off: below and beside it no patch does anything."""
    batch, reader = WORLD["clean"].batch(), Metric.parse("logit_diff").reader(WORLD["clean"])
    planted = Edit((ActivationChange(Site("z", 1, 2), "add", torch.ones(model.shape.d_head)),))
    heads = [Site("z", layer, head) for layer in range(2) for head in range(4)]
    donor = HookedModel.load(plain)
    base = run(model, batch, reader)
    with donor.edited(planted):
        tuned = run(donor, batch, reader)
        got = sweep(model, batch, heads, (donor, batch), reader)
    effect = (got - base).abs().amax(1)
    assert effect.nonzero().flatten().tolist() == [6]  # L1H2
    torch.testing.assert_close(got[6], tuned, atol=1e-6, rtol=0)
    assert (tuned - base).abs().max() > 0.05


def test_patches_of_one_run_act_together(llama: HookedModel) -> None:
    clean, other = WORLD["clean"].batch(), WORLD["same"].batch()
    reader = Metric.parse("logit_diff").reader(WORLD["clean"])
    both = (Site("z", 1, 0), Site("z", 1, 3))
    together, one, two, again = sweep(llama, clean, [both, both[0], both[1], both[::-1]], (llama, other), reader)
    base = run(llama, clean, reader)
    assert torch.equal(together, again)
    assert (together - base - (one - base) - (two - base)).abs().max() > 1e-4  # not additive, so not a sum of singles


def test_the_order_of_patches_does_not_matter(llama: HookedModel) -> None:
    clean, other = WORLD["clean"].batch(), WORLD["same"].batch()
    reader = Metric.parse("answer_prob").reader(WORLD["clean"])
    sites = [Site.parse(p) for p in (*PATCHES, *WHOLE)]
    forward = sweep(llama, clean, sites, (llama, other), reader)
    backward = sweep(llama, clean, sites[::-1], (llama, other), reader)
    assert torch.equal(forward, backward.flip(0))


def test_the_model_leaves_as_it_came_also_by_exception(llama: HookedModel) -> None:
    clean = WORLD["clean"].batch()
    reader = Metric.parse("logit_diff").reader(WORLD["clean"])
    before = run(llama, clean, reader)

    def fails(logits: Tensor, targets: object) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sweep(llama, clean, [Site.parse("L0.resid_pre@S")], (llama, WORLD["same"].batch()), Metric.parse(fails).reader(WORLD["clean"]))
    assert torch.equal(run(llama, clean, reader), before)


def test_refusals(llama: HookedModel) -> None:
    clean, other = WORLD["clean"].batch(), WORLD["other"].batch()
    reader = Metric.parse("logit_diff").reader(WORLD["clean"])

    def patch(site: str, donor: Batch = other) -> None:
        sweep(llama, clean, [Site.parse(site)], (llama, donor), reader)

    with pytest.raises(InputError, match=r"one length; in pair 0 they have 7 and 9 tokens; name a position, as in L1H2.z@END"):
        patch("L1H2.z")
    with pytest.raises(InputError, match="5 prompts and 3 sources"):
        patch("L1.resid_pre@END", other[:3])
    with pytest.raises(InputError, match="no position 'S3'"):
        patch("L1.resid_pre@S3")
    with pytest.raises(InputError, match="outside prompt 1"):
        patch("L1.resid_pre@2")
    for site in ("L1H2.pattern@END", "L0.W_Q", "L0H1.0"):
        with pytest.raises(InputError, match="only activations with a token axis"):
            patch(site)
    with pytest.raises(InputError, match="layer 3 is out of range"):
        patch("L3.resid_pre@END")


def test_the_floor_is_rounding_only(model: HookedModel) -> None:
    reader = Metric.parse("logit_diff").reader(WORLD["clean"])
    batch = WORLD["clean"].batch()
    assert floor(model, batch, reader) < 1e-5
    assert floor(model, batch[:1], reader[:1]) < 1e-5
