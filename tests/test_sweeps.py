"""Sweeps against the plain Hugging Face model with hooks written by hand; what they skip, check, save, and say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_hooks
import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from torch import Tensor, nn

from interp import progress
from interp.edits import ActivationChange, Edit, WeightChange
from interp.errors import InputError
from interp.metrics import Metric, Targets
from interp.models import Batch, HookedModel, restart
from interp.prompts import Prompts
from interp.sites import Site
from interp.sweeps import Swept, engine, floor, plain, run, saved, sweep

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


def literal(hf: nn.Module, into: Prompts, source: Prompts, patches: list[tuple[Site, ...]]) -> Tensor:
    """The logit difference of every patch and pair, by the book: one prompt, one forward, no padding."""
    assert into.answers is not None and into.distractors is not None
    out = torch.empty(len(patches), len(into))
    for row in range(len(into)):
        seen = plain_hooks.seen(hf, source.ids[row], list({(s.component, s.layer) for p in patches for s in p if s.layer is not None}))
        for i, patch in enumerate(patches):
            sets = []
            for s in patch:
                assert s.layer is not None
                value = plain_hooks.part(seen[s.component, s.layer], s.component, s.head, place(source, s, row))
                sets.append(plain_hooks.Set(s.component, s.layer, s.head, place(into, s, row), value))
            logits = plain_hooks.patched(hf, into.ids[row], sets)[-1]
            out[i, row] = logits[into.answers[row]] - logits[into.distractors[row]]
    return out


def place(prompts: Prompts, site: Site, row: int) -> int | None:
    if not isinstance(site.position, str):
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


DIFF = Metric.parse("logit_diff").reader(WORLD["clean"])
LIMIT = 8 * torch.finfo(torch.float32).eps  # times the largest logit, about 1


def from_other(model: HookedModel, patches: list[Any], source: str = "other", **settings: Any) -> Swept:
    return sweep(model, WORLD["clean"].batch(), patches, (model, WORLD[source].batch()), DIFF, **settings)


def test_named_positions_agree_with_plain_hooks(hf: nn.Module, model: HookedModel) -> None:
    into, donor = WORLD["clean"], WORLD["other"]
    patches = [(Site.parse(p),) for p in PATCHES] + [(Site.parse("L0.mlp_out@S"), Site.parse("L1H2.z@END"))]
    got = from_other(model, patches)
    assert got.way == "restart" and got.notes == () and got.checked == 8 and got.deviation <= 4 * got.floor < 1e-5
    assert got.values.shape == (10, 5) and torch.equal(got.baseline, run(model, into.batch(), DIFF))
    torch.testing.assert_close(got.values, literal(hf, into, donor, patches), atol=2 * LIMIT * 3, rtol=0)
    assert (got.values - got.baseline).abs().mean() > 0.01


def test_whole_prompts_agree_with_plain_hooks(hf: nn.Module, model: HookedModel) -> None:
    patches = [(Site.parse(p),) for p in WHOLE]
    got = from_other(model, patches, "same")
    assert got.way == "restart"
    torch.testing.assert_close(got.values, literal(hf, WORLD["clean"], WORLD["same"], patches), atol=2 * LIMIT * 3, rtol=0)


def test_the_plain_way_is_the_same(model: HookedModel) -> None:
    into, donor = WORLD["clean"].batch(), WORLD["same"].batch()
    texts = [
        *PATCHES,
        *WHOLE,
        "L1.mlp_post@S",
        "L2H3.q@S",
        "L0H1.v",
        "L1H0.k@S",
        "L0.pattern",
        "L1H1.pattern",
        "L2H0.pattern@1",
        "L1.pattern@0",
        "L1H2.result@S",
        "L2H0.result@END",
        "L0H3.result",
        "L1.result",
        "L0.result@END",
    ]
    patches = [Site.parse(t) for t in texts]
    got = sweep(model, into, patches, (model, donor), DIFF)
    assert got.way == "restart"
    torch.testing.assert_close(got.values, plain(model, into, patches, (model, donor), DIFF), atol=3e-6, rtol=0)
    assert (got.values != got.baseline).any(1).sum() >= len(patches) - 6


def test_the_prompt_into_itself_changes_nothing_at_all(model: HookedModel) -> None:
    patches = [Site.parse(p) for p in (*PATCHES, *WHOLE, "L1.mlp_post", "L2H3.q@S", "L0H1.v", "L1H2.pattern")]
    got = sweep(model, WORLD["clean"].batch(), patches, (model, WORLD["clean"].batch()), DIFF)
    assert torch.equal(got.values, got.baseline.expand_as(got.values)) and got.checked == 0


def test_everything_at_the_bottom_or_the_end_at_the_top_is_the_other_run(model: HookedModel) -> None:
    clean, other = WORLD["clean"], WORLD["same"]
    goal = run(model, clean.batch(), DIFF)
    last = model.shape.n_layers - 1
    bottom_top = [Site("resid_pre", 0), Site("resid_post", last, position="END")]
    got = sweep(model, other.batch(), bottom_top, (model, clean.batch()), DIFF).values
    torch.testing.assert_close(got, goal.expand_as(got), atol=1e-6, rtol=0)
    assert (run(model, other.batch(), DIFF) - goal).abs().max() > 0.02


def test_what_comes_after_the_place_that_is_read_has_no_effect_at_all(model: HookedModel) -> None:
    """Causality: END lies after S, and heads and MLPs of the last layer move nothing but their own position."""
    clean, other = prompts(CLEAN, (2, 0, 3, 1, 2)), prompts(SAME, (1, 0, 0, 4, 2))
    source = (model, other.batch())
    late = [Site("z", 0, 3, "END"), Site("z", 2, 1, "END"), Site("resid_pre", 0, position="END")]
    got = sweep(model, clean.batch(), late, source, Metric.parse("logit_diff@S").reader(clean))
    assert torch.equal(got.values, got.baseline.expand_as(got.values))
    got = sweep(model, clean.batch(), [Site("z", 2, 1, "S"), Site("mlp_out", 2, position="S"), Site("z", 1, 1, "S")], source, DIFF)
    assert torch.equal(got.values[:2], got.baseline.expand(2, -1)) and not torch.equal(got.values[2], got.baseline)


def test_what_the_prompts_share_is_skipped(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two tokens are the same, so nothing differs there: not one row is computed."""
    rows = [[3, 4, 5, 6], [7, 8, 9, 1], [2, 3, 4, 5], [9, 8, 7, 6], [1, 2, 3, 4]]
    clean, other = prompts(rows, (0,) * 5), prompts([[a, b, b, a] for a, b, *_ in rows], (0,) * 5)
    computed: list[int] = []
    restart.means(model)  # tries the model out once
    real = restart.Restart.__call__
    monkeypatch.setattr(restart.Restart, "__call__", lambda self, wave: (computed.append(wave.start), real(self, wave))[1])
    patches = [Site(c, 0, position=p) for c in ("resid_pre", "mlp_out") for p in range(4)] + [Site("z", 1), Site("v", 0)]
    got = sweep(model, clean.batch(), patches, (model, other.batch()), Metric.parse("logit_diff").reader(clean))
    shared = [0, 1, 4, 5]
    assert computed and set(computed) <= {2, 3} and torch.equal(got.values[shared], got.baseline.expand(4, -1))
    assert (got.values[[2, 3, 6, 7, 8, 9]] != got.baseline).all()


def test_between_models_only_the_planted_head_matters(model: HookedModel, hf: nn.Module) -> None:
    """The same prompts in a model one head of which is off: below and beside it no patch does anything."""
    batch = WORLD["clean"].batch()
    planted = Edit((ActivationChange(Site("z", 1, 2), "add", torch.ones(model.shape.d_head)),))
    heads = [Site("z", layer, head) for layer in range(2) for head in range(4)]
    donor = HookedModel.load(hf)
    with donor.edited(planted):
        tuned = run(donor, batch, DIFF)
        got = sweep(model, batch, heads, (donor, batch), DIFF)
    effect = (got.values - got.baseline).abs().amax(1)
    assert effect.nonzero().flatten().tolist() == [6]  # L1H2
    assert got.way == "restart"
    torch.testing.assert_close(got.values[6], tuned, atol=1e-6, rtol=0)
    assert (tuned - got.baseline).abs().max() > 0.05


def test_patches_of_one_run_act_together(llama: HookedModel) -> None:
    both = (Site("z", 1, 0), Site("z", 1, 3))
    got = from_other(llama, [both, both[0], both[1], both[::-1]], "same")
    assert got.way == "restart"
    together, one, two, again = got.values
    torch.testing.assert_close(together, again, atol=1e-6, rtol=0)
    base = got.baseline
    assert (together - base - (one - base) - (two - base)).abs().max() > 1e-4  # not additive, so not a sum of singles


def test_later_ones_overwrite_earlier_ones(llama: HookedModel) -> None:
    """All heads and one of them, in both orders; and leaving a block comes before entering the next."""
    every, one, left, entered = map(Site.parse, ("L1.z@S", "L1H2.z@S", "L0.resid_post@S", "L1.resid_pre@S"))
    values = {s: torch.full((), float(i)) for i, s in enumerate((every, one, left, entered))}
    patches = [(every, one), (one, every), (every,), (entered, left), (left, entered), (entered,)]
    batch = WORLD["clean"].batch()
    got = sweep(llama, batch, patches, values, DIFF)
    assert got.way == "restart"
    torch.testing.assert_close(got.values, plain(llama, batch, patches, values, DIFF), atol=3e-6, rtol=0)
    torch.testing.assert_close(got.values[[1, 3, 4]], got.values[[2, 5, 5]], atol=1e-6, rtol=0)
    assert (got.values[0] - got.values[1]).abs().max() > 1e-4


def test_what_heads_add_overlaps_as_everything_does(model: HookedModel) -> None:
    """All heads and one of them, in both orders; positions that name one token; with z and with what attention adds."""
    every, one, end, last = map(Site.parse, ("L1.result@S", "L1H2.result@S", "L0H1.result@END", "L0H1.result@-1"))
    head, out, same = map(Site.parse, ("L1H2.z@S", "L1.attn_out@S", "L1H2.result@S"))
    ramp = torch.linspace(-1, 1, 24).square()
    values = {s: 0.2 * (i + 1) * ramp[: model.shape.d_head if s is head else 24] for i, s in enumerate((every, one, end, last, head, out))}
    patches = [
        (every, one),
        (one, every),
        (every,),
        (end, last),
        (last,),
        (one, head),
        (one,),
        (one, out),
        (out,),
        (one, same),
        (every, head),
    ]
    batch = WORLD["clean"].batch()
    got = sweep(model, batch, patches, values, DIFF)
    assert got.way == "restart"
    torch.testing.assert_close(got.values, plain(model, batch, patches, values, DIFF), atol=3e-6, rtol=0)
    # z of a head that is set matters no more
    torch.testing.assert_close(got.values[[1, 3, 5, 7, 9, 10]], got.values[[2, 4, 6, 8, 6, 2]], atol=2e-6, rtol=0)
    assert (got.values[0] - got.values[1]).abs().max() > 1e-4


def test_what_a_head_adds_between_models(model: HookedModel, hf: nn.Module) -> None:
    """Of its W_O: a head with another one adds something else, with the same z; and in itself a model is the baseline to the bit."""
    batch = WORLD["clean"].batch()
    donor = HookedModel.load(hf)
    delta = torch.randn(model.shape.d_head, 24, generator=torch.Generator().manual_seed(0))
    heads = [Site("result", 2, h) for h in range(4)]
    with donor.edited(Edit((WeightChange(Site("W_O", 2, 1), delta),))):
        tuned = run(donor, batch, DIFF)
        got = sweep(model, batch, [*heads, tuple(heads), Site("z", 2, 1)], (donor, batch), DIFF)
    assert got.way == "restart" and torch.equal(got.values[[0, 2, 3, 5]], got.baseline.expand(4, -1))
    torch.testing.assert_close(got.values[[1, 4]], tuned.expand(2, -1), atol=2e-6, rtol=0)
    assert (tuned - got.baseline).abs().max() > 0.02
    same = sweep(model, batch, [*heads, Site("result", 0)], (model, batch), DIFF)
    assert torch.equal(same.values, same.baseline.expand_as(same.values))


def test_sets_of_positions(model: HookedModel) -> None:
    """A name that is two tokens of every prompt, others in the source."""
    places = {"pair": ((0, 3), (0, 1), (1, 3), (2, 5), (0, 2))}, {"pair": ((1, 2), (0, 2), (0, 3), (2, 4), (1, 2))}
    (clean, other) = (Batch.of(rows, where) for rows, where in zip((CLEAN, SAME), places, strict=True))
    patches = [
        Site("resid_pre", 1, position="pair"),
        Site("z", 0, 2, "pair"),
        (Site("v", 1, 0, "pair"), Site("mlp_out", 2, position="pair")),
    ]
    got = sweep(model, clean, patches, (model, other), DIFF)
    assert got.way == "restart"
    torch.testing.assert_close(got.values, plain(model, clean, patches, (model, other), DIFF), atol=3e-6, rtol=0)


def test_values_by_hand(model: HookedModel) -> None:
    """Zeros, a mean, a vector, another run: one per site, or with the patch."""
    batch = WORLD["clean"].batch()
    end, head, whole = Site.parse("L1.resid_pre@END"), Site.parse("L1H2.z@S"), Site.parse("L0.mlp_out")
    mean = model.capture(batch, end)[end].mean(0)
    source = {end: mean, head: torch.zeros(()), whole: torch.linspace(-1, 1, 24)}
    got = sweep(model, batch, [*source, (end, head)], source, DIFF)
    assert got.way == "restart"
    with model.patched({end: mean, head: torch.zeros(())}):
        both = run(model, batch, DIFF)
    torch.testing.assert_close(got.values[3], both, atol=1e-6, rtol=0)
    own = sweep(model, batch, [{s: v} for s, v in source.items()] + [{end: 2 * mean}], {}, DIFF).values
    torch.testing.assert_close(own[:3], got.values[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(got.values, plain(model, batch, [*source, (end, head)], source, DIFF), atol=3e-6, rtol=0)
    assert (own[3] - own[0]).abs().max() > 1e-3


def test_the_order_of_patches_does_not_matter(llama: HookedModel) -> None:
    sites = [Site.parse(p) for p in (*PATCHES, *WHOLE)]
    forward, backward = from_other(llama, sites, "same"), from_other(llama, sites[::-1], "same")
    assert forward.way == backward.way == "restart"
    torch.testing.assert_close(forward.values, backward.values.flip(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("metric", ["answer_prob", "answer_logprob", "kl", "accuracy", "logit_diff@S"])
def test_every_metric(llama: HookedModel, metric: str) -> None:
    clean, other = WORLD["clean"], WORLD["same"]
    judge = Metric.parse(metric)
    reader = judge.reader(clean, llama.logits(other, at=judge.position))
    patches = [Site.parse(p) for p in PATCHES]
    got = sweep(llama, clean.batch(), patches, (llama, other.batch()), reader)
    assert got.way == "restart"
    torch.testing.assert_close(got.values, plain(llama, clean.batch(), patches, (llama, other.batch()), reader), atol=5e-6, rtol=1e-5)


def test_weight_edits_are_in_force_and_changes_of_activations_take_the_plain_way(llama: HookedModel) -> None:
    patches = [Site.parse(p) for p in PATCHES]
    plainly = from_other(llama, patches, "same").values
    delta = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    with llama.edited(Edit((WeightChange(Site("W_V", 1, 0), delta[:, :8]), WeightChange(Site("b_U"), torch.arange(31.0))))):
        got = from_other(llama, patches, "same")
        want = plain(llama, WORLD["clean"].batch(), patches, (llama, WORLD["same"].batch()), DIFF)
    assert got.way == "restart" and (got.values - plainly).abs().max() > 1
    torch.testing.assert_close(got.values, want, atol=3e-5, rtol=0)
    with llama.edited(Edit((ActivationChange(Site("z", 0, 1), "scale", torch.tensor(0.0)),))):
        got = from_other(llama, patches, "same")
        want = plain(llama, WORLD["clean"].batch(), patches, (llama, WORLD["same"].batch()), DIFF)
    assert got.way == "plain" and "activations are being changed" in got.notes[0] and got.checked == 0
    assert torch.equal(got.values, want)


def test_the_embedding_takes_the_plain_way(llama: HookedModel) -> None:
    patches = [Site.parse("embed@S"), Site.parse("L0.resid_pre@S")]
    got = from_other(llama, patches)
    assert got.way == "restart" and got.notes == ("1 of 2 patches took the plain way: they set the embedding",)
    torch.testing.assert_close(got.values[0], got.values[1], atol=1e-6, rtol=0)


def shuffled(past: Any, stream: Tensor) -> Tensor:
    """Every row goes on with the stream of another."""
    return stream.roll(1, 0)


def bent(past: Any, stream: Tensor) -> Tensor:
    """The kept keys are a little off."""
    past.keys = past.keys * 1.02
    return stream


@pytest.mark.parametrize("wrong", [shuffled, bent])
def test_a_broken_restart_is_noticed(model: HookedModel, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    patches = [Site.parse(p) for p in PATCHES]
    restart.means(model)  # found sound, and broken afterwards
    real = type(model.wrapped).block
    monkeypatch.setattr(type(model.wrapped), "block", lambda self, layer, x, call, past: real(self, layer, wrong(past, x), call, past))
    got = from_other(model, patches)
    assert got.way == "plain" and got.checked == 8 and got.deviation > 4 * got.floor
    assert "off by" in got.notes[0] and "rounding" in got.notes[0]
    assert torch.equal(got.values, plain(model, WORLD["clean"].batch(), patches, (model, WORLD["other"].batch()), DIFF))


def test_a_model_that_cannot_go_on_takes_the_plain_way(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise TypeError("calls its blocks in a way of its own")

    monkeypatch.setattr(type(llama.wrapped), "block", fails)
    monkeypatch.setattr(restart, "_TRIED", {})
    got = from_other(llama, [Site.parse("L1.resid_pre@END")])
    assert got.way == "plain" and got.notes == (
        "the plain way, one run per patch: LlamaForCausalLM cannot go on from a cached run (TypeError)",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", FOUR)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """As far from the weights computed in fp32 as the plain way is."""
    half = HookedModel.load(tiny(kind, seed=1).to(dtype))
    exact = half.in_dtype(torch.float32)
    assert exact is not None
    patches = [Site.parse(p) for p in (*PATCHES, "L0H1.v@S", "L1H2.q@END", "L1.mlp_post@S")]
    got = from_other(half, patches)
    clean, other = WORLD["clean"].batch(), WORLD["other"].batch()
    assert got.way == "restart" and got.deviation <= 4 * got.floor and got.floor < 0.1
    slow, true = (plain(m, clean, patches, (m, other), DIFF) for m in (half, exact))
    ours, theirs = (float((x - true).square().mean().sqrt()) for x in (got.values, slow))
    assert ours <= 1.25 * theirs + 1e-6 < 0.02 and (got.values - slow).abs().max() <= 4 * got.floor


def test_small_memory_gives_the_same(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = [Site.parse(p) for p in PATCHES]
    want = from_other(llama, patches)
    monkeypatch.setattr(engine, "prompts_at_once", lambda *a: 2)
    monkeypatch.setattr(engine, "wave_bytes", lambda *a: 2**40)
    real, tries = engine.logits_of, []

    def scarce(*args: Any) -> Tensor:
        tries.append(len(args[1]))
        if len(tries) == 1 and len(args[1]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(engine, "logits_of", scarce)
    got = from_other(llama, patches)
    torch.testing.assert_close(got.values, want.values, atol=1e-6, rtol=0)
    source = {Site.parse("L1.resid_pre"): torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(0))}
    parts = sweep(llama, WORLD["clean"].batch(), list(source), source, DIFF).values  # a value per prompt and position
    torch.testing.assert_close(parts, plain(llama, WORLD["clean"].batch(), list(source), source, DIFF), atol=3e-6, rtol=0)


def test_a_killed_sweep_goes_on(llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = [Site.parse(p) for p in (*PATCHES, "L0H1.v@S", "L1H2.q@END", "L1.mlp_post@S")]
    monkeypatch.setattr(saved, "EVERY", 0.0)
    want = from_other(llama, patches, folder=tmp_path / "whole")
    assert list((tmp_path / "whole").iterdir()) == []  # a finished one leaves nothing
    real, calls = restart.Restart.__call__, []

    def dies(self: Any, wave: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, wave)

    monkeypatch.setattr(restart.Restart, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        from_other(llama, patches, folder=tmp_path / "s")
    assert [f.name for f in (tmp_path / "s").iterdir()] == ["sweep.safetensors"]
    first = len(calls)
    got = from_other(llama, patches, folder=tmp_path / "s")
    assert torch.equal(got.values, want.values) and got.deviation == want.deviation
    second = len(calls) - first
    calls[:] = [1] * 100
    from_other(llama, patches)
    assert len(calls) - 100 == second + first - 1 and first > 1  # what was finished is not computed again
    assert list((tmp_path / "s").iterdir()) == []


def test_of_several_sweeps_those_that_are_whole_are_kept(llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "EVERY", 0.0)
    first, second = ([Site.parse(p)] for p in ("L0.mlp_out@END", "L1.mlp_out@END"))
    real, calls = restart.Restart.__call__, []
    monkeypatch.setattr(restart.Restart, "__call__", lambda self, wave: calls.append(1) or real(self, wave))
    with pytest.raises(KeyboardInterrupt), progress.keeping(tmp_path / "left"):
        want = from_other(llama, first)
        raise KeyboardInterrupt
    assert calls and len(list((tmp_path / "left").iterdir())) == 1
    calls.clear()
    with progress.keeping(tmp_path / "left"):
        got = from_other(llama, first)
        assert not calls and torch.equal(got.values, want.values)
        from_other(llama, second)
        assert calls and len(list((tmp_path / "left").iterdir())) == 2
    assert not (tmp_path / "left").exists()


def test_a_folder_of_another_sweep_is_refused(llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "EVERY", 0.0)
    monkeypatch.setattr(saved.Progress, "finish", lambda self: None)
    patches = [Site.parse(p) for p in PATCHES]
    from_other(llama, patches, folder=tmp_path)
    with pytest.raises(InputError, match="holds an unfinished sweep of something else"):
        from_other(llama, patches[1:], folder=tmp_path)
    (tmp_path / "sweep.safetensors").write_text("nothing")
    with pytest.raises(InputError, match="is no unfinished sweep"):
        from_other(llama, patches, folder=tmp_path)


def test_what_was_given_up_stays_plain_when_it_goes_on(llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "EVERY", 0.0)
    patches = [Site.parse(p) for p in PATCHES]
    real, runs = engine.patched, []

    def dies(*args: Any) -> Tensor:
        runs.append(1)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(engine, "patched", dies)
    monkeypatch.setattr(engine, "TOLERANCE", -1.0)
    with pytest.raises(KeyboardInterrupt):
        from_other(llama, patches, folder=tmp_path)
    monkeypatch.setattr(engine, "TOLERANCE", 4.0)
    got = from_other(llama, patches, folder=tmp_path)
    assert got.way == "plain" and len(runs) == 4 + len(patches) - 3
    assert torch.equal(got.values, plain(llama, WORLD["clean"].batch(), patches, (llama, WORLD["other"].batch()), DIFF))


def test_the_model_leaves_as_it_came_also_by_exception(llama: HookedModel) -> None:
    clean = WORLD["clean"].batch()
    before = run(llama, clean, DIFF)

    def fails(logits: Tensor, targets: Targets) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sweep(llama, clean, [Site.parse("L0.resid_pre@S")], (llama, WORLD["same"].batch()), Metric.parse(fails).reader(WORLD["clean"]))
    with pytest.raises(InputError, match="fit"):
        sweep(llama, clean, [{Site.parse("L0.resid_pre@S"): torch.ones(7)}], {}, DIFF)
    assert torch.equal(run(llama, clean, DIFF), before)
    assert all(not point.fwd_hooks for point in llama.wrapped.bridge.hook_dict.values())


def test_refusals(llama: HookedModel) -> None:
    clean, other = WORLD["clean"].batch(), WORLD["other"].batch()

    def patch(site: str, donor: Batch = other) -> None:
        sweep(llama, clean, [Site.parse(site)], (llama, donor), DIFF)

    with pytest.raises(InputError, match=r"one length; in pair 0 they have 7 and 9 tokens; name a position, as in L1H2.z@END"):
        patch("L1H2.z")
    with pytest.raises(InputError, match="5 prompts and 3 sources"):
        patch("L1.resid_pre@END", other[:3])
    with pytest.raises(InputError, match="no position 'S3'"):
        patch("L1.resid_pre@S3")
    with pytest.raises(InputError, match="outside prompt 1"):
        patch("L1.resid_pre@2")
    with pytest.raises(InputError, match="the same token of both prompts of a pair; in pair 0 it is \\[6\\] and \\[8\\]"):
        patch("L1H2.pattern@END")
    for site in ("L0.W_Q", "L0H1.0"):
        with pytest.raises(InputError, match="only activations can"):
            patch(site)
    with pytest.raises(InputError, match="layer 3 is out of range"):
        patch("L3.resid_pre@END")
    for none, what in (([], "there are none"), ([()], "names no site")):
        with pytest.raises(InputError, match=what):
            from_other(llama, none)
    with pytest.raises(InputError, match="the source has no value for L1.resid_pre@END; it has none"):
        sweep(llama, clean, [Site.parse("L1.resid_pre@END")], {}, DIFF)


def test_the_floor_is_rounding_only(model: HookedModel) -> None:
    batch = WORLD["clean"].batch()
    assert 0 < floor(model, batch, DIFF) < 1e-5
    assert 0 < floor(model, batch[:1], DIFF[:1]) < 1e-5


def test_a_metric_read_before_every_patch_is_told(llama: HookedModel) -> None:
    early = Metric.parse("logit_diff@0").reader(WORLD["clean"])
    got = sweep(
        llama, WORLD["clean"].batch(), [Site.parse("L0.resid_pre@END"), Site.parse("L1H1.z@END")], (llama, WORLD["other"].batch()), early
    )
    assert torch.equal(got.values, got.baseline.expand_as(got.values))
    assert got.notes == ("2 of 2 patches are behind the position that the metric reads, so they change exactly nothing",)
    assert not from_other(llama, [Site.parse("L0.resid_pre@S")]).notes
