"""Path patching against four literal runs of the plain Hugging Face model; planted circuits; what it refuses and says."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import plain_hooks
import pytest
import torch
from plain_hooks import difference, path_patched
from tiny_checkpoints import FOUR, sharp
from torch import Tensor, nn

from interp.analyses.path_patching import PathPatchingResult, path_patching
from interp.edits import ActivationChange, Edit, WeightChange
from interp.errors import InputError
from interp.metrics import Metric, Reader
from interp.models import HookedModel, ModelPair, paths
from interp.organisms import hand_built
from interp.prompts import PromptPairs, Prompts
from interp.sites import Heads, Site, parse_sites
from interp.sweeps import ends
from interp.sweeps.paths import Paths, path_sweep

# 5 pairs, 3 layers, 4 heads (2 key/value heads), 24 = d_model, up to 9 tokens: no two sizes are alike
CLEAN = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23], [24, 25, 26, 27]]
SAME = [[5, 4, 5, 16, 7, 8, 9], [10, 21, 12], [13, 14, 25, 16, 17], [18, 9, 20, 21, 22, 23], [14, 25, 26, 27]]
OTHER = [[5, 4, 5, 16, 7, 8, 9, 3, 1], [10, 12], [13, 14, 25, 16], [18, 9, 20, 21, 22, 23], [14, 25, 26, 27, 11]]
SUBJECT = {"clean": (2, 0, 3, 1, 2), "same": (1, 2, 0, 4, 2), "other": (6, 0, 1, 1, 3)}
TWO = {"clean": ((0, 3), (0, 1), (1, 3), (2, 5), (0, 2)), "same": ((1, 2), (0, 2), (0, 3), (2, 4), (1, 2))}
TWO["other"] = ((1, 8), (0, 1), (1, 3), (2, 5), (0, 4))


def prompts(rows: list[list[int]], which: str) -> Prompts:
    places = {"S": tuple((i,) for i in SUBJECT[which]), "two": TWO[which]}
    ids = tuple(tuple(r) for r in rows)
    return Prompts(tuple(str(r) for r in rows), ids, positions=places, answers=(4, 9, 2, 7, 30), distractors=(1, 5, 0, 3, 28))


WORLD = {"clean": prompts(CLEAN, "clean"), "same": prompts(SAME, "same"), "other": prompts(OTHER, "other")}
DIFF = Metric.parse("logit_diff").reader(WORLD["clean"])
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", params=FOUR)
def hf(request: pytest.FixtureRequest) -> nn.Module:
    return sharp(request.param)


@pytest.fixture(scope="module")
def model(hf: nn.Module) -> HookedModel:
    return HookedModel.load(hf)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel.load(sharp("llama"))


def groups(*texts: str) -> list[tuple[Site, ...]]:
    return [tuple(parse_sites(t.split())) for t in texts]


SENDERS = groups(
    "L0H1.z@END", "L1H3.z@S", "L1.mlp_out@END", "embed@END", "L0.mlp_out@S", "L0H0.z@END L1H2.z@END L0.mlp_out@END", "L0H2.z@two"
)
SENDERS += groups("L2H1.z@END", "L2.mlp_out@END", "embed@two L0H3.z@S L1H1.z@two")
RECEIVERS = groups("L2.resid_post@END", "L2H3.q@END", "L1H0.k@S", "L2H1.v@END", "L1.resid_mid@END", "L2.resid_mid@END")
RECEIVERS += groups("L2H0.q@END L1H1.k@S L2H1.v@two L1H2.q@two L1.resid_mid@S")


def swept(model: HookedModel, source: str, senders: Any, receivers: Any, **settings: Any) -> Paths:
    return path_sweep(model, WORLD["clean"].batch(), WORLD[source].batch(), senders, receivers, DIFF, **settings)


def agree(got: Paths, logits: Tensor) -> None:
    """To 8 eps of the largest logit, and to the bit where nothing arrives."""
    want = difference(logits, WORLD["clean"])
    torch.testing.assert_close(got.values, want, atol=8 * EPS * float(logits.abs().max()), rtol=0)
    assert torch.equal(got.values[got.blocked != 0], got.start.expand_as(got.values)[got.blocked != 0])
    effect = (want - got.start).abs().amax(-1)[got.blocked == 0]
    assert (effect > 20 * EPS * float(logits.abs().max())).float().mean() > 0.9


@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_named_positions_agree_with_four_plain_runs(hf: nn.Module, model: HookedModel, freeze_mlps: bool) -> None:
    receivers = RECEIVERS[4:] if freeze_mlps else RECEIVERS
    got = swept(model, "other", SENDERS, receivers, freeze_mlps=freeze_mlps)
    assert got.notes == () and got.checked == 2 and got.deviation <= 4 * got.floor < 1e-5
    assert 3 < int((got.blocked != 0).sum()) < 60
    agree(got, path_patched(hf, WORLD["clean"], WORLD["other"], SENDERS, receivers, freeze_mlps))


def test_whole_prompts_agree_with_four_plain_runs(hf: nn.Module, model: HookedModel) -> None:
    """Without a position: all tokens, and values move between positions where receivers are read."""
    senders = groups("L0H1.z", "embed", "L1.mlp_out", "L0H2.z@S L1H0.z")
    receivers = groups("L2.resid_post@END", "L2H3.q", "L1H1.k", "L2H0.v", "L1.resid_mid", "L1H2.q L2H1.k@S")
    got = swept(model, "same", senders, receivers)
    assert got.notes == () and got.deviation <= 4 * got.floor
    agree(got, path_patched(hf, WORLD["clean"], WORLD["same"], senders, receivers))


@pytest.mark.parametrize("kind", FOUR)
def test_to_the_last_digits_of_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face takes softmax and some norms in float32, and metrics are float32: here nothing is."""
    real = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim=None, dtype=None, **kw: real(x, dim=dim))
    monkeypatch.setattr(Reader, "values", lambda self, read: read[:, 0] - read[:, 1])
    hf = sharp(kind).double()
    for module in hf.modules():
        if "RMSNorm" in type(module).__name__:
            own = lambda self, x: self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))  # noqa: E731
            monkeypatch.setattr(type(module), "forward", own)
    torch.set_default_dtype(torch.float64)
    try:
        got = swept(HookedModel.load(hf), "other", SENDERS[4:], RECEIVERS[1:])
        want = difference(path_patched(hf, WORLD["clean"], WORLD["other"], SENDERS[4:], RECEIVERS[1:]), WORLD["clean"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.notes == () and got.values.dtype == torch.float64
    torch.testing.assert_close(got.values, want, atol=1e-12, rtol=0)


def test_the_prompt_into_itself_changes_nothing_at_all(model: HookedModel) -> None:
    got = swept(model, "clean", SENDERS, RECEIVERS)
    assert torch.equal(got.values, got.start.expand_as(got.values)) and torch.equal(got.start, got.goal) and got.checked == 0


def test_holding_only_the_position_that_is_read_is_the_same() -> None:
    """Causality: senders and receivers share a position, so what other positions do cannot come between."""
    hf, into, source = sharp("llama"), WORLD["clean"], WORLD["other"]
    senders, receivers = groups("L0H1.z@END", "L1.mlp_out@END", "embed@END"), groups("L2.resid_post@END", "L2H3.q@END", "L2H1.v@END")
    one, other = (path_patched(hf, into, source, senders, receivers, only_at=at) for at in (None, "END"))
    torch.testing.assert_close(one, other, atol=8 * EPS * float(one.abs().max()), rtol=0)


def last_stream(hf: Any, ids: Any) -> Tensor:
    return plain_hooks.seen(hf, ids, [("resid_post", hf.config.num_hidden_layers - 1)])["resid_post", hf.config.num_hidden_layers - 1][-1]


def out_matrix(hf: Any, layer: int) -> Tensor:
    """W_O, [heads * d_head, d_model]."""
    weight = plain_hooks._parts(hf, layer)[2].weight.detach()
    return weight if hasattr(hf, "transformer") else weight.T


def test_with_mlps_held_a_path_is_one_addition(hf: nn.Module, model: HookedModel) -> None:
    """The receiver's input, before its norm, moves by the sum of (z_corrupt - z_clean) W_O."""
    into, source = WORLD["clean"], WORLD["other"]
    senders = groups("L0H1.z@END", "L2H3.z@END", "L0H0.z@END L1H2.z@END L2H1.z@END")
    got = swept(model, "other", senders, groups("L2.resid_post@END"), freeze_mlps=True)
    assert got.notes == ()  # the chain was not given up
    norm = next(m for name, m in hf.named_modules() if name.endswith(("ln_f", "model.norm", "final_layer_norm")))
    layers, d_head = [("z", i) for i in range(3)], out_matrix(hf, 0).shape[0] // 4
    for row in range(len(into)):
        here, there = (plain_hooks.seen(hf, p.ids[row], layers) for p in (into, source))
        for i, group in enumerate(senders):
            x = last_stream(hf, into.ids[row])
            for s in group:
                change = there["z", s.layer][-1, s.head] - here["z", s.layer][-1, s.head]
                x = x + change @ out_matrix(hf, s.layer or 0)[(s.head or 0) * d_head :][:d_head]
            with torch.no_grad():
                logits = hf.get_output_embeddings()(norm(x))
            want = logits[into.answers[row]] - logits[into.distractors[row]]
            assert float((got.values[i, 0, row] - want).abs()) <= 8 * EPS * float(logits.abs().max())


def test_all_heads_together_are_not_the_sum_of_them(model: HookedModel) -> None:
    heads = [Site("z", layer, head, "END") for layer in range(3) for head in range(4)]
    got = swept(model, "other", [tuple(heads), *((h,) for h in heads)], groups("L2.resid_post@END"))
    assert got.deviation <= 4 * got.floor
    joint, singles = got.values[0, 0] - got.start, (got.values[1:, 0] - got.start).sum(0)
    assert (joint - singles).abs().max() > 0.01
    hf = model.wrapped.source
    logits = path_patched(hf, WORLD["clean"], WORLD["other"], [tuple(heads)], groups("L2.resid_post@END"))
    torch.testing.assert_close(got.values[:1], difference(logits, WORLD["clean"]), atol=8 * EPS * float(logits.abs().max()), rtol=0)


def test_what_is_written_too_late_or_elsewhere_is_exactly_nothing(model: HookedModel) -> None:
    late = groups("L2H3.z@END", "L2H0.z@END", "L1.mlp_out@END L2.mlp_out@END", "L1H1.z@S")
    got = swept(model, "other", late, groups("L2H3.q@END", "L1H3.q@END L0H1.k@END", "L2H1.v@END", "L1.resid_mid@END"))
    assert got.blocked.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1], [2, 1, 2, 1 if model.shape.parallel else 2]]
    assert torch.equal(got.values[got.blocked != 0], got.start.expand_as(got.values)[got.blocked != 0])
    assert (got.values[2, 0] != got.start).all()


def test_weight_edits_are_in_force_and_changes_of_activations_take_the_plain_way(llama: HookedModel) -> None:
    plainly = swept(llama, "other", SENDERS[:6], RECEIVERS[:4])
    d = llama.shape.d_model
    delta = torch.randn(d, d, generator=torch.Generator().manual_seed(0))
    with llama.edited(
        Edit(
            (
                WeightChange(
                    Site("W_O", 1),
                    delta[: llama.shape.n_heads * llama.shape.d_head].repeat(2, 1)[: llama.shape.n_heads * llama.shape.d_head],
                ),
            )
        )
    ):
        got = swept(llama, "other", SENDERS[:6], RECEIVERS[:4])
    assert got.notes == () and got.deviation <= 4 * got.floor and (got.values - plainly.values).abs().max() > 0.1
    with llama.edited(Edit((ActivationChange(Site("z", 1, 1), "scale", torch.tensor(0.0)),))):
        got = swept(llama, "other", SENDERS[:6], RECEIVERS[:4])
    assert got.notes == ("the plain way, four runs per path: activations are being changed while it runs",) and got.checked == 0
    assert (got.values - plainly.values).abs().max() > 1e-3
    assert torch.equal(got.values[got.blocked != 0], got.start.expand_as(got.values)[got.blocked != 0])


def test_the_plain_way_gives_the_same(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = swept(model, "other", SENDERS[3:], RECEIVERS[4:])
    monkeypatch.setattr(paths.Frozen, "obstacle", lambda self: "it is an experiment")
    slow = swept(model, "other", SENDERS[3:], RECEIVERS[4:])
    assert slow.notes == ("the plain way, four runs per path: it is an experiment",) and slow.checked == 0 and 0 < slow.floor < 1e-5
    torch.testing.assert_close(fast.values, slow.values, atol=3e-6, rtol=0)


@pytest.mark.parametrize("part", ["mlp", "_plus_heads"])
def test_a_broken_chain_is_noticed(model: HookedModel, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    want = swept(model, "other", SENDERS, RECEIVERS[:1])
    real = getattr(paths.Frozen, part)
    monkeypatch.setattr(paths.Frozen, part, lambda self, *args: real(self, *args) * 1.01)
    got = swept(model, "other", SENDERS, RECEIVERS[:1])
    assert "the chain of MLPs was off by" in got.notes[0] and got.deviation > 4 * got.floor
    torch.testing.assert_close(got.values, want.values, atol=3e-6, rtol=0)


def test_parts_that_do_not_add_up_are_noticed(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_TRIED", {})
    assert paths.Frozen(model).obstacle() == ""
    monkeypatch.setattr(paths, "_TRIED", {})
    monkeypatch.setattr(paths.Frozen, "mlp", lambda self, layer, x: 2 * x)
    assert "give something else when they are called alone" in paths.Frozen(model).obstacle()
    monkeypatch.setattr(paths, "_TRIED", {})

    def fails(*args: object) -> None:
        raise TypeError("takes more")

    monkeypatch.setattr(paths.Frozen, "mlp", fails)
    assert "cannot be called alone (TypeError)" in paths.Frozen(model).obstacle()


def test_small_memory_gives_the_same(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.sweeps import paths as engine

    want = swept(llama, "other", SENDERS[:6], RECEIVERS[:4])
    monkeypatch.setattr(engine, "prompts_at_once", lambda *a: 2)
    monkeypatch.setattr(engine, "_HELD", 1000)
    monkeypatch.setattr(type(llama._budget), "rows", lambda self, size: 3)
    got = swept(llama, "other", SENDERS[:6], RECEIVERS[:4])
    torch.testing.assert_close(got.values, want.values, atol=3e-6, rtol=0)
    assert got.notes == () and got.checked == 6 and torch.equal(got.blocked, want.blocked)


@pytest.mark.parametrize("metric", ["answer_prob", "kl", "logit_diff@S"])
def test_every_metric(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, judge = HookedModel.load(sharp("qwen2")), Metric.parse(metric)
    reader = judge.reader(WORLD["clean"], model.logits(WORLD["clean"], at=judge.position))
    senders, receivers = (
        groups("L0H1.z@S", "L1.mlp_out@END", "embed@two"),
        [(Site("resid_post", 2, position=judge.position),), *groups("L1H1.v@S")],
    )
    args = (model, WORLD["clean"].batch(), WORLD["other"].batch(), senders, receivers, reader)
    got = path_sweep(*args)
    monkeypatch.setattr(paths.Frozen, "obstacle", lambda self: "it is an experiment")
    torch.testing.assert_close(got.values, path_sweep(*args).values, atol=5e-6, rtol=1e-5)
    assert got.notes == () and (got.values != got.start).any()


def toward(model: HookedModel, clean: Prompts, corrupt: Prompts) -> PromptPairs:
    """Pairs whose answer is what the model prefers on the clean prompt, so that there is something to recover."""
    gap = model.logits(clean, at="END") - model.logits(corrupt, at="END")
    answers, distractors = tuple(gap.argmax(-1).tolist()), tuple(gap.argmin(-1).tolist())
    return PromptPairs(replace(clean, answers=answers, distractors=distractors), corrupt)


@pytest.fixture(scope="module")
def pairs(llama: HookedModel) -> PromptPairs:
    return toward(llama, WORLD["clean"], WORLD["other"])


@pytest.fixture(scope="module")
def single(llama: HookedModel, pairs: PromptPairs) -> PathPatchingResult:
    return path_patching(llama, pairs)


@pytest.fixture(scope="module")
def pair(llama: HookedModel) -> ModelPair:
    """The tuned model does not hear head 1 of the last layer."""
    tuned = copy.deepcopy(llama.wrapped.source)
    with torch.no_grad():
        tuned.model.layers[2].self_attn.o_proj.weight[:, 8:16] = 0  # d_head is 8
    return ModelPair.load(llama, HookedModel.load(tuned))


@pytest.fixture(scope="module")
def both(pair: ModelPair, pairs: PromptPairs) -> PathPatchingResult:
    settings = {"sender": "all@END; some=L0H1,L1H2@END", "receiver": "logits; L2.resid_mid@END", "separately": True, "seed": 3}
    return path_patching(pair, pairs, **settings)


def test_every_planted_edge_and_nothing_else() -> None:
    """Edges of the hand-built circuit carry a large share; bystanders send the same, to the bit; decoys are heard by nobody."""
    built = hand_built("ioi")
    model, found = built.model, built.task.generate(built.model, 12)
    planted = {(str(e.sender), str(e.receiver)) for e in built.circuit.edges}
    bystanders = {str(site) for site in built.bystanders.sites()}
    for receiver in dict.fromkeys(e.receiver for e in built.circuit.edges):
        at = receiver.position
        got = path_patching(model, found, sender=f"all@{at}", receiver=str(receiver))
        share, effect = got.recovered().value[:, 0], got.effect()[:, 0].abs().amax(-1)
        for sender, value, moved in zip(got.labels["sender"], share.tolist(), effect.tolist(), strict=True):
            if (sender, str(receiver)) in planted:
                assert value > 0.3, (sender, receiver)
            elif sender.split("@")[0] in bystanders:
                assert moved == 0
            else:
                assert abs(value) < 1e-3 and moved <= max(4 * float(got.floor), 1e-3)
        strongest = got.strongest()
        top = strongest[strongest.recovered.abs() > 0.3]
        assert {p.split(" -> ")[0] for p in top.path} == {s for s, r in planted if r == str(receiver)}
        assert (top.p_adjusted < 0.01).all() and got.deviation.max() <= 4 * got.floor.max()
    everyone = path_patching(model, found, sender="movers=L2H0,L2H1@END", receiver="L3H2.q@END")
    assert float(everyone.recovered().value) == pytest.approx(1, abs=1e-3)


def test_a_model_of_a_pair_is_patched_as_alone(pair: ModelPair, both: PathPatchingResult, pairs: PromptPairs) -> None:
    assert both.sides == ("base", "tuned") and both.patched.shape == (2, 1 + 12 + 3 + 1, 2, 5)
    alone = path_patching(pair.tuned, pairs, sender="all@END; some=L0H1,L1H2@END", receiver="logits; L2.resid_mid@END", separately=True)
    torch.testing.assert_close(alone.patched[0], both.patched[1], atol=1e-6, rtol=0)
    i = both.labels["sender"].index("L2H1.z@END")
    assert both.effect("tuned")[i].abs().max() <= 4 * both.floor[1] and both.effect("base")[i].abs().mean() > 100 * both.floor[0]
    change = both.recovered("tuned - base")
    assert float(change.value[i, 0]) == pytest.approx(-float(both.recovered("base").value[i, 0]), abs=1e-6)
    assert (change.low <= change.value + 1e-9).all() and (change.value <= change.high + 1e-9).all()
    same = replace(both, patched=both.patched[[1, 1]], clean=both.clean[[1, 1]], corrupt=both.corrupt[[1, 1]]).recovered("tuned - base")
    assert not same.value.any() and not same.low.any() and not same.high.any()  # the same resamples in both


def test_denoise_runs_the_other_way(llama: HookedModel, pairs: PromptPairs, single: PathPatchingResult) -> None:
    got = path_patching(llama, pairs, direction="denoise", sender="L0H1@S; L1.mlp_out@END", receiver="L2H0.q@END; L1H1.v@S")
    assert torch.allclose(got.clean, single.clean, atol=1e-6) and torch.equal(got.start, got.corrupt)
    swap = replace(WORLD["other"], answers=pairs.answers, distractors=pairs.distractors)
    logits = path_patched(
        llama.wrapped.source, swap, WORLD["clean"], *(groups(*x) for x in (("L0H1.z@S", "L1.mlp_out@END"), ("L2H0.q@END L1H1.v@S",)))
    )
    torch.testing.assert_close(got.patched[0], difference(logits, swap), atol=8 * EPS * float(logits.abs().max()), rtol=0)


def test_what_a_sender_cannot_reach_is_said(llama: HookedModel, pairs: PromptPairs) -> None:
    got = path_patching(llama, pairs, sender="heads@END; L0H1@S", receiver="L1H2.q@END")
    assert got.notes == (
        "sender not before any receiver, so exactly 0: L1H0.z@END, L1H1.z@END, L1H2.z@END, L1H3.z@END and 4 more",
        "sender not at the position of a receiver, so exactly 0: L0H1.z@S",
    )
    assert got.reaches[:, 0].tolist() == [True] * 4 + [False] * 9 and not got.effect()[4:].any() and got.effect()[:4].all()
    assert got.notes[0] in got.summary() and "4 paths that reach a receiver, of 13" in got.summary()
    several = path_patching(llama, pairs, sender="heads@END", receiver="q@END", separately=True)
    assert several.patched.shape == (1, 12, 12, 5) and int(several.reaches.sum()) == 4 * 4 + 8 * 4
    assert several.notes[-1] == "48 other paths that are not there (too late, or at another position) are exactly 0"


def test_texts_of_ends(llama: HookedModel) -> None:
    def sent(text: str) -> list[tuple[str, str]]:
        return [(end.name, " ".join(map(str, end.sites))) for end in ends.senders(text, llama)]

    assert sent("L0H1@S2+1; L2.mlp_out@END ;embed") == [
        ("L0H1.z@S2+1", "L0H1.z@S2+1"),
        ("L2.mlp_out@END", "L2.mlp_out@END"),
        ("embed", "embed"),
    ]
    assert sent("movers=L0H1,L1H2@END; L0H3.z@S,L1.mlp_out@-1") == [
        ("movers", "L0H1.z@END L1H2.z@END"),
        ("L0H3.z@S, L1.mlp_out@-1", "L0H3.z@S L1.mlp_out@-1"),
    ]
    assert (
        len(sent("heads@END")) == 12 and len(sent("all")) == 16 and [n for n, _ in sent("mlps@S")] == [f"L{i}.mlp_out@S" for i in range(3)]
    )
    assert [(n, len(t.split())) for n, t in sent("everyone=heads@END")] == [("everyone", 12)]
    read = ends.receivers("k@S; logits", llama, "END", True)
    assert [end.name for end in read][-2:] == ["L2H1.k@S", "logits"] and len(read) == 7
    assert str(read[-1].sites[0]) == "L2.resid_post@END"
    joint = ends.receivers("q@END", llama, "END", False)
    assert [(end.name, len(end.sites)) for end in joint] == [("L0H0.q@END and 11 more", 12)]


def test_table(single: PathPatchingResult, both: PathPatchingResult) -> None:
    table = single.to_frame()
    assert len(table) == 12 and list(table.sender[:2]) == ["L0H0.z@END", "L0H1.z@END"] and set(table.receiver) == {"logits"}
    row = table[table.path == "L1H2.z@END -> logits"].iloc[0]
    assert row.effect == pytest.approx(float(single.effect()[6, 0].double().mean())) and row.low <= row.recovered <= row.high
    assert len(single.to_frame(per="prompt")) == 5 * 12
    two = both.to_frame()
    assert set(two.side) == {"base", "tuned", "tuned - base"} and len(two) == 3 * 17 * 2
    by = two[two.path == "L1H2.z@END -> logits"].set_index("side").recovered
    assert by["tuned - base"] == pytest.approx(by["tuned"] - by["base"])
    assert list(both.strongest(3).columns) == ["side", "path", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted"]
    assert list(both.strongest(3).recovered.abs()) == sorted(both.strongest(3).recovered.abs(), reverse=True)
    with pytest.raises(InputError, match="per must be 'prompt'"):
        single.to_frame(per="head")
    with pytest.raises(InputError, match="no model 'tuned'"):
        single.recovered("tuned")


def test_summary(single: PathPatchingResult, both: PathPatchingResult, llama: HookedModel, pairs: PromptPairs) -> None:
    share = single.recovered().value[:, 0]
    assert single.summary().startswith(
        f"{single.labels['sender'][int(share.abs().argmax())]} -> logits carries {float(share[share.abs().argmax()]):.2f} ["
    )
    assert "n = 5 prompt pairs" in single.summary() and "2 paths checked by four whole runs are off by at most" in single.summary()
    assert " changed the most: " in both.summary() and " in tuned and " in both.summary()
    one = path_patching(llama, pairs[0], sender="heads@END")
    assert " changes logit_diff by " in one.summary() and one.to_frame().recovered.isna().all() and len(one.strongest())
    assert "not normalised" in one.plot().to_json()


def test_figures(single: PathPatchingResult, both: PathPatchingResult, llama: HookedModel, pairs: PromptPairs) -> None:
    assert list(single.figures()) == ["logits, model"]
    drawn = torch.as_tensor(single.plot().data[0].z)
    there = ~drawn.isnan()
    assert drawn.shape == (3, 4) and torch.allclose(drawn[there], single.recovered().value.reshape(3, 4)[there].to(drawn), atol=1e-6)
    assert list(both.figures()) == ["tuned - base", "base", "tuned"] and both.plot().data[0].z.shape == (17, 2)
    few = path_patching(llama, pairs, sender="L0H1@END; L1.mlp_out@END; embed@END")
    assert list(few.figures()) == ["model"] and few.plot().data[0].type == "bar"
    evil = replace(few, labels={**few.labels, "sender": ("<b>", "<b>", "a & b")})
    assert "<b>" not in evil.plot().to_json().replace("\\u003c", "<").replace("</b>", "")


def test_round_trip(tmp_path: Any, both: PathPatchingResult) -> None:
    again = PathPatchingResult.load(both.save(tmp_path / "r"))
    assert again.summary() == both.summary() and torch.equal(again.patched, both.patched) and again.labels == both.labels
    assert again.to_frame().equals(both.to_frame())
    assert both.meta.settings["sender"] == "all@END; some=L0H1,L1H2@END" and both.meta.seed == 3


def test_heads_of_a_circuit_are_senders(llama: HookedModel, pairs: PromptPairs) -> None:
    got = path_patching(llama, pairs, sender=Heads.parse("movers=L0H1,L1H2@END; L1H0@S"))
    assert got.labels["sender"] == ("movers", "L1H0.z@S") and got.meta.settings["sender"] == "movers=L0H1,L1H2@END; L1H0@S"


def test_refusals(llama: HookedModel, pairs: PromptPairs, unchecked: None) -> None:
    def bad(match: str, prompts: Any = pairs, **settings: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            path_patching(llama, prompts, **settings)
        assert "\n" not in str(caught.value)

    bad("layer 9 is out of range; the model has layers 0 to 2", sender="L9H6@END")
    bad("head 2 is out of range; the model has key/value heads 0 to 1", receiver="L1H2.k@END")
    bad("no position 'S9'", sender="L0H1@S9")
    bad("no position 'S9'", receiver="L1H1.q@S9")
    bad("L0H1.z sets every position, so both prompts of a pair need one length", sender="L0H1")
    bad("'L1.resid_pre' does not send; write L9H6@END", sender="L1.resid_pre@END")
    bad("'L1.z' does not send", sender="L1.z@END")
    bad("'L1H1.z' does not receive; write logits", receiver="L1H1.z@END")
    bad("'L1H1' is not a site|'L1H1' does not receive", receiver="L1H1@END")
    bad("'' names no sender", sender="L0H1@END;")
    bad("sender is one text with ; between groups, not tuple", sender=("L0H1@END", "L0H2@END"))
    bad("L0H1.z@END is named twice", sender="L0H1@END; heads@END")
    bad("a sender is named twice in both=L0H1,L0H1@END", sender="both=L0H1,L0H1@END")
    bad("logits cannot receive together with others", receiver="logits; L1H1.q@END")
    bad("at END, not at S", receiver="logits@S")
    bad("noise or denoise, but it is 'noising'", direction="noising")
    bad("no metric named 'logitdiff'", metric="logitdiff")
    bad(
        "clean and corrupt prompts are the same, token for token, so there is no difference to explain",
        PromptPairs(pairs.clean, pairs.clean),
    )
    bad(r"needs clean and corrupt prompts \(PromptPairs\), not Prompts", pairs.clean)
    bad("one distractor token", PromptPairs(replace(pairs.clean, distractors=None), pairs.corrupt))
    alike = replace(pairs.clean, answers=(3,) * 5, distractors=(3,) * 5)
    for receiver in ("logits", "L1H1.q@END"):
        bad("logit_diff does not differ between clean and corrupt prompts", PromptPairs(alike, pairs.corrupt), receiver=receiver)


@pytest.mark.full
@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("receiver", ["resid_post", "q", "k", "v", "resid_mid"])
def test_many_random_paths(kind: str, receiver: str) -> None:
    hf = sharp(kind, **({"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}))
    model, draws = HookedModel.load(hf), torch.Generator().manual_seed(3)

    def pick(options: list[Any]) -> Any:
        return options[int(torch.randint(len(options), (), generator=draws))]

    places = ["S", "END", "two"]
    kv = model.shape.n_kv_heads
    heads = [Site("z", layer, head) for layer in range(4) for head in range(4)]
    parts = [*heads, *(Site("mlp_out", i) for i in range(4)), Site("embed")]
    n = 110 if receiver == "resid_post" else 22
    senders = [tuple({pick(parts).at(pick(places)): None for _ in range(pick([1, 1, 2, 4]))}) for _ in range(n)]
    heads_of = {"q": 4, "k": kv, "v": kv}

    def read() -> Site:
        head = pick(list(range(heads_of[receiver]))) if receiver in heads_of else None
        return Site(receiver, pick([1, 2, 3]), head, pick(places))

    receivers = [(Site("resid_post", 3, position="END"),)] if receiver == "resid_post" else [(read(),) for _ in range(5)]
    got = swept(model, "other", senders, receivers)
    assert got.values.numel() >= 500 and got.deviation <= 4 * got.floor
    logits = path_patched(hf, WORLD["clean"], WORLD["other"], senders, receivers)
    torch.testing.assert_close(got.values, difference(logits, WORLD["clean"]), atol=8 * EPS * float(logits.abs().max()), rtol=0)
    assert torch.equal(got.values[got.blocked != 0], got.start.expand_as(got.values)[got.blocked != 0])
    # Most paths do something, far above rounding. Some cannot: in the last layer nobody reads what queries and MLPs elsewhere make, and
    # the tokens of `two` are those of END in one prompt only, where they are alike.
    assert ((got.values - got.start).abs().amax(-1)[got.blocked == 0] > 1e-6).float().mean() > 0.5


def test_a_longer_partner_leaves_receivers_without_a_position_alone(hf: Any, model: HookedModel) -> None:
    senders, receivers = [(Site("z", 0, 1, "S"),)], [(Site("v", 1, 1),), (Site("q", 2, 1),), (Site("resid_mid", 1),)]
    batches = WORLD["clean"].batch(), WORLD["other"].batch()
    assert batches[1].ids.shape[1] > batches[0].ids.shape[1]
    got = path_sweep(model, *batches, senders, receivers, DIFF)
    rows = path_patched(hf, WORLD["clean"], WORLD["other"], senders, receivers)
    want = torch.stack([DIFF(logits) for logits in rows.flatten(0, 1)]).reshape(got.values.shape)
    torch.testing.assert_close(got.values, want, atol=16 * EPS * float(rows.abs().max()), rtol=0)
    assert (got.values != got.start).any() and got.notes == ()


def test_half_precision_rides_the_chain_too() -> None:
    exact, half = (HookedModel.load(sharp("llama").to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    senders, receivers = [(Site("z", 0, 1, "S"),), (Site("mlp_out", 1, position="END"),)], [(Site("resid_post", 2, position="END"),)]
    want, got = (path_sweep(m, WORLD["clean"].batch(), WORLD["other"].batch(), senders, receivers, DIFF) for m in (exact, half))
    assert got.notes == () and got.checked > 0 and got.deviation <= 4 * got.floor
    torch.testing.assert_close(got.values, want.values, atol=0.05, rtol=0)
