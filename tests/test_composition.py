"""Composition scores against dense matrices and TransformerLens, channels planted in random models, and those of the hand-built ones."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from scipy.stats import beta
from tiny_checkpoints import FOUR, saved, tiny
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from interp import organisms
from interp.analyses.composition import composition
from interp.directions import concentration, critical, overlaps, shares, spread, tail
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models import composition as scores
from interp.models.heads import folded_heads, outside
from interp.sites import Site

KINDS = ("q", "k", "v")


@cache
def model(kind: str, seed: int = 0) -> HookedModel:
    return HookedModel.load(tiny(kind, seed))


def dense(m: HookedModel, layer: int, head: int) -> dict[str, Tensor]:
    """OV and QK of a query head as whole matrices, from raw weights: gains as diagonal matrices, centring as a projector."""
    d, double = m.shape.d_model, torch.float64
    gain = torch.diag(m.weight(Site("ln1", layer)).to(double))
    centre = torch.eye(d, dtype=double) - (torch.ones(d, d, dtype=double) / d if m.shape.architecture.startswith("GPT") else 0)
    q, k, v, o = (m.weight(Site(f"W_{name}", layer, head)).to(double) for name in "QKVO")
    return {"OV": centre @ gain @ v @ o @ centre, "QK": (centre @ gain @ q) @ (centre @ gain @ k).T}


def matrix(of: dict[str, Tensor], kind: str) -> Tensor:
    return {"q": of["QK"], "k": of["QK"].T, "v": of["OV"]}[kind]


def plant(m: HookedModel, kind: str, sender: tuple[int, int], receiver: tuple[int, int], *, into: str = "W_O", size: float = 20.0) -> Edit:
    """One direction that the sender writes (or, with ``W_V``, reads) and the receiver reads."""
    draws, d, d_head = torch.Generator().manual_seed(3), m.shape.d_model, m.shape.d_head
    b, a, c = (torch.randn(n, generator=draws) for n in (d, d_head, d_head))
    if m.shape.architecture.startswith("GPT"):
        b = b - b.mean()
    b, a, c = (x / x.norm() for x in (b, a, c))
    reads = b / m.weight(Site("ln1", receiver[0]))
    own = b / m.weight(Site("ln1", sender[0]))
    first = {"W_O": (size * a[:, None], b[None]), "W_V": (size * own[:, None], a[None])}[into]
    second = Site(f"W_{kind.upper()}", *receiver)
    return Edit((WeightChange(Site(into, *sender), *first), WeightChange(second, size * reads[:, None], c[None])), "channel")


# ---- the scores are what they say


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", FOUR)
def test_scores_equal_the_dense_formula_and_transformer_lens(architecture, kind):
    m = model(architecture)
    result = composition(m, kind=kind, draws=20)
    n_layers, n_heads = m.shape.n_layers, m.shape.n_heads
    heads = {(at, h): dense(m, at, h) for at in range(n_layers) for h in range(n_heads)}
    assert result.labels["sender"] == tuple(f"L{at}H{h}" for at in range(n_layers - 1) for h in range(n_heads))
    assert result.labels["receiver"] == tuple(f"L{at}H{h}" for at in range(1, n_layers) for h in range(n_heads))
    seen = 0
    for a in range(len(result.labels["sender"])):
        one = divmod(a, n_heads)
        X = heads[one]["OV"]
        U, S, Vh = torch.linalg.svd(X)
        for b in range(len(result.labels["receiver"])):
            two = (1 + b // n_heads, b % n_heads)
            if two[0] <= one[0]:
                assert result.score[0, a, b].isnan() and result.component[0, a, :, b].isnan().all() and not result.place[0, a, :, b].any()
                continue
            Y = matrix(heads[two], kind)
            assert float(result.score[0, a, b]) == pytest.approx(float((X @ Y).norm() / X.norm() / Y.norm()), abs=1e-12)
            n = result.component.shape[2]
            torch.testing.assert_close(result.component[0, a, :, b].double(), (Vh[:n] @ Y).norm(dim=1) / Y.norm(), atol=1e-6, rtol=0)
            torch.testing.assert_close(result.strength[0, a], S[:n])
            parts = result.component[0, a, :, b].double().square() @ S[:n].square() / S.square().sum()
            assert math.sqrt(parts) == pytest.approx(float(result.score[0, a, b]), abs=1e-6)
            seen += 1
    assert seen == n_heads * n_heads * n_layers * (n_layers - 1) // 2

    layers = [folded_heads(m, at) for at in range(n_layers)]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        left, right = layers[two].factors("ov" if kind == "v" else "qk")
        if kind == "k":
            left, right = right.mT, left.mT
        theirs = composition_scores(FactoredMatrix(*layers[one].factors("ov")), FactoredMatrix(left, right))
        ours = result.score[0, one * n_heads : (one + 1) * n_heads, (two - 1) * n_heads : two * n_heads]
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_size_and_sign_of_a_matrix_and_where_the_gain_stands_do_not_matter():
    m = model("llama")
    plain = composition(m, kind="k", draws=5)
    sized = Edit(
        (
            WeightChange(Site("W_O", 0, 1), 6 * m.weight("L0H1.W_O")),
            WeightChange(Site("W_V", 1), -2 * m.weight("L1.W_V")),  # the sign of a whole layer's OV
            WeightChange(Site("W_Q", 2, 3), -4 * m.weight("L2H3.W_Q")),
        )
    )
    with m.edited(sized):
        other = composition(m, kind="k", draws=5)
    torch.testing.assert_close(plain.component, other.component, atol=1e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(plain.score, other.score, atol=1e-6, rtol=0, equal_nan=True)
    moved = tiny("llama")
    with torch.no_grad():
        for block in moved.model.layers:
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                part.weight.mul_(block.input_layernorm.weight)
            block.input_layernorm.weight.fill_(1.0)
    again = composition(HookedModel.load(moved), kind="k", draws=5)
    torch.testing.assert_close(plain.score, again.score, atol=1e-6, rtol=0, equal_nan=True)


def test_a_component_without_strength_and_a_head_without_weights_have_no_score():
    m = model("qwen2")
    zero = Edit((WeightChange(Site("W_O", 0, 2), -m.weight("L0H2.W_O")), WeightChange(Site("W_Q", 2, 1), -m.weight("L2H1.W_Q"))))
    with m.edited(zero):
        result = composition(m, draws=5)
    a, b = result.labels["sender"].index("L0H2"), result.labels["receiver"].index("L2H1")
    assert result.score[0, a].isnan().all() and result.component[0, a].isnan().all() and not result.place[0, a].any()
    assert result.score[0, :, b].isnan().all() and result.p[0, :, b].isnan().all() and result.critical[0, b].isnan()
    assert result.rivals[0].tolist() == [6 * 3] * 4 + [6 * 7, 0, 6 * 7, 6 * 7]
    assert not result.top(500).channel.str.contains("L0H2|L2H1.q").any() and not result.top(500).isna().any().any()


# ---- chance


def test_what_heads_can_tell_apart():
    for architecture, dims in (("gpt2", 23), ("neox", 23), ("llama", 24), ("qwen2", 24)):
        m = model(architecture)
        assert scores.directions(m) == dims
        basis = torch.eye(24, dtype=torch.float64)
        for kind in KINDS:
            read = scores.readers(folded_heads(m, 1), kind)
            # Every direction once: their squared scores add up to 1, and the mean over those that can be told apart is 1 / dims.
            total = scores.component_scores(basis, read).square().sum(0)
            torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))
            ones = scores.component_scores(torch.full((24,), 24**-0.5, dtype=torch.float64), read)
            assert bool((ones < 1e-12).all()) == (dims == 23)


@pytest.mark.parametrize("dims", [5, 23, 120, 767])
def test_the_tail_of_a_random_direction_is_exact(dims):
    for k in (1, 3, 4):
        read = torch.zeros(7, 5, dtype=torch.float64)
        read[:, :k] = 1 / k
        value = torch.tensor([0.5 / dims, 1 / dims, 0.1 / k, 0.3 / k, 0.6 / k, 0.9 / k, 1.001 / k], dtype=torch.float64)
        found, known = tail(value, read, dims), torch.tensor(beta.sf((value * k).clamp_max(1).numpy(), k / 2, (dims - k) / 2))
        near = known > 1e-250
        error = ((found - known) / known)[near].abs()
        assert bool((error < torch.where(known[near] < 0.4, 1e-7, 1e-4)).all())
        assert bool((found[~near] < 1e-249).all()) and found[-1] == 0
    if dims > 5:  # else so near the largest possible value that bisection does not tell it apart
        level = critical(1e-7, read[:1], dims)
        assert 0.9e-7 < float(tail(level, read[:1], dims)) <= 1e-7
    assert tail(torch.zeros(1), read[:1], dims) == 1 and tail(torch.tensor([math.nan]), read[:1], dims).isnan()
    assert tail(torch.ones(1), torch.full((1, 5), math.nan), dims).isnan()


def test_moments_and_tails_agree_with_draws():
    dims, rank = 23, 6
    read = shares(torch.tensor([5.0, 3, 2, 1, 0.5, 0.1]))
    taken = shares(torch.tensor([4.0, 4, 1, 1, 1, 0]))
    squares = torch.cat(list(overlaps(dims, rank, 40_000, seed=1)))
    single = squares[:, 0] @ read
    whole = (taken @ squares) @ read
    for drawn, sd in (
        (single, spread(torch.tensor(1.0), concentration(read), dims)),
        (whole, spread(concentration(taken), concentration(read), dims)),
    ):
        assert abs(float(drawn.mean()) * dims - 1) < 4 * float(drawn.std()) / 200 * dims
        assert float(drawn.std()) == pytest.approx(float(sd), rel=0.03)
    for value in (0.05, 0.1, 0.2):
        share = float((single >= value).double().mean())
        assert float(tail(torch.tensor([value]), read[None], dims)) == pytest.approx(share, abs=4 * math.sqrt(share / 40_000))


def test_p_and_z_of_whole_matrices_are_those_of_turned_senders():
    m = model("neox")
    result = composition(m, kind="v", draws=4000)
    assert float(result.z.nan_to_num(0).abs().max()) < 5 and 0 < int((result.p < 0.05).sum()) < 0.15 * result.p.numel()
    X, Y = dense(m, 0, 1)["OV"], dense(m, 2, 3)["OV"]
    draws = torch.Generator().manual_seed(0)
    # Turned within what the norm lets through: rotations that leave the all-ones direction alone.
    basis = torch.linalg.svd(torch.eye(24, dtype=torch.float64) - 1 / 24).U[:, :23]
    drawn = []
    for _ in range(1500):
        turn = torch.linalg.qr(torch.randn(23, 23, generator=draws, dtype=torch.float64)).Q
        drawn.append((X @ basis @ turn @ basis.T @ Y).norm() / X.norm() / Y.norm())
    drawn = torch.stack(drawn)
    a, b = result.labels["sender"].index("L0H1"), result.labels["receiver"].index("L2H3")
    mine, p = result.score[0, a, b], float((drawn >= result.score[0, a, b]).double().mean())
    assert float(result.p[0, a, b]) == pytest.approx(p, abs=4 * math.sqrt(0.25 / 1500))
    squares = drawn.square()
    assert float(result.z[0, a, b]) == pytest.approx(float((mine.square() - squares.mean()) / squares.std()), abs=0.15)


# ---- channels with a known answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", FOUR)
def test_a_planted_channel_ranks_first_and_without_it_there_is_none(architecture, kind):
    m, sender, receiver = model(architecture), (0, 2), (2, 1)
    before = composition(m, kind=kind, draws=20)
    assert not bool((before.component > before.critical[:, None, None]).any()) and before.top(1).p_adjusted[0] > 0.05
    with m.edited(plant(m, kind, sender, receiver)):
        result = composition(m, kind=kind, draws=20)
    first = result.top(1, receiver="L2H1").iloc[0]
    shared = kind != "q" and architecture in ("llama", "qwen2")
    assert (
        first.channel == f"L0H2.0 -> {f'L2H0.{kind} for L2H1' if shared else f'L2H1.{kind}'}"
        and first.place == 1
        and first.of == 2 * 4 * result.component.shape[2]
    )
    a, b = result.labels["sender"].index("L0H2"), result.labels["receiver"].index("L2H1")
    assert float(result.p[0, a, b]) == pytest.approx(1 / 21)  # no draw is as high; what is tested counts as one
    assert first.score > 0.9 and first.z > 10 and first.p_adjusted < 1e-6 and first.z > 2 * before.top(1).z[0]
    assert result.top(1).channel[0].startswith("L0H2.0 -> L2H")  # of all; key/value heads may be shared with a second receiver
    assert result.component[0, a, 0, b] > result.critical[0, b] and int(result.component[0, a, :, b].argmax()) == 0
    assert "L0H2.0 -> L2H" in result.summary() and "1 of 56" not in before.summary()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_what_a_sender_reads_is_no_channel(architecture):
    m = model(architecture)
    with m.edited(plant(m, "q", (0, 2), (2, 1), into="W_V")):
        result = composition(m, draws=20)
    first = result.top(1, sender="L0H2", receiver="L2H1").iloc[0]
    assert first.z < 5 and first.score < 0.7


@pytest.mark.parametrize("name", organisms.HAND_BUILT)
def test_channels_of_hand_built_models_are_found_from_weights_alone(name):
    built = organisms.hand_built(name)
    n_heads, n_kv = built.circuit.model[1:]
    needed = {}
    for edge in built.circuit.edges:
        if edge.sender.component != "z" or edge.receiver.component not in KINDS:
            continue
        group = 1 if edge.receiver.component == "q" else n_heads // n_kv
        for node in built.circuit.nodes:  # the heads of the circuit among those that share a key/value head
            if node.component == "z" and node.layer == edge.receiver.layer and node.head // group == edge.receiver.head:
                needed.setdefault((edge.receiver.component, f"L{node.layer}H{node.head}"), set()).add(
                    f"L{edge.sender.layer}H{edge.sender.head}"
                )
    assert needed or name == "majority"  # there an MLP stands between the heads
    for (kind, receiver), senders in needed.items():
        result = composition(built.model, kind=kind, receivers=receiver, draws=50)
        whole = dict(zip(result.labels["sender"], result.score[0, :, 0].nan_to_num(-1).tolist(), strict=True))
        others = [x for head, x in whole.items() if head not in senders]
        assert min(whole[head] for head in senders) > 1.5 * max(others), (kind, receiver)
        first = result.top(len(senders))
        assert {channel.split(".")[0] for channel in first.channel} == senders, (kind, receiver)
        assert bool((result.component[0, :, :, 0][result.place[0, :, :, 0] == 1] > 0.1).all())


def test_components_of_one_strength_are_one_span():
    result = composition(organisms.hand_built("induction").model, kind="k", receivers="L1H0", draws=50)
    (row,) = result.top(20, sender="L0H1").to_dict("records")
    n = organisms.hand_built("induction").blueprint.spaces["code"]
    assert row["channel"] == f"L0H1.0-{n - 1} -> L1H0.k for L1H0" and row["energy"] == pytest.approx(1) and math.isnan(row["p"])
    assert row["score"] == pytest.approx(float(result.score[0, 1, 0]))  # all of the head is the span
    live = torch.tensor([[3.0, 2.0, 1.999, 1.997, 1.0, 0.0]])
    assert scores.spans(live).tolist() == [[0, 1, 1, 1, 4, 5]]
    score = torch.tensor([0.1, 0.3, 0.4, 0.5, 0.2, math.nan])[None, :, None]
    place = torch.tensor([5, 3, 2, 1, 4, 0], dtype=torch.int32)[None, :, None]
    merged, best, number = (x[0, :, 0] for x in scores.merged(score, place, live))
    torch.testing.assert_close(merged[:2], torch.tensor([0.1, math.sqrt(0.5 / 3)], dtype=torch.float64), atol=1e-6, rtol=0)
    assert merged[[2, 3, 5]].isnan().all() and best[:2].tolist() == [5, 1] and number.tolist() == [1, 3, 0, 0, 1, 0]


# ---- pairs


def test_a_model_and_itself_have_no_change():
    m = model("qwen2")
    result = composition(ModelPair(m, m), kind="v", draws=10)
    there = ~result.component_change.isnan()
    assert float(result.component_change[there].abs().max()) == 0 and float(result.change.nan_to_num(0).abs().max()) == 0
    assert result.match.tolist() == [list(range(6))] * 8
    torch.testing.assert_close(result.match_cosine, torch.ones_like(result.match_cosine))
    assert "no score changed" in result.summary() and result.strongest(3).effect.tolist() == [0, 0, 0]


def test_components_of_a_pair_are_matched_by_what_they_write(tmp_path):
    base = model("gpt2")
    parts = folded_heads(base, 0).components("ov")
    v = parts.Vh[1, 2].float()
    size = 2 * float(parts.S[1, 0] / parts.S[1, 2])  # component 2 of L0H1 becomes the strongest; what it writes stays
    edit = Edit((WeightChange(Site("W_O", 0, 1), (size - 1) * (base.weight("L0H1.W_O") @ v)[:, None], v[None]),))
    tuned = HookedModel.load(base.save(tmp_path / "tuned", edit=edit))
    result = composition(ModelPair(base, tuned), kind="q", draws=10)
    assert not tuned.loaded  # weights come from the files
    assert result.match[1].tolist() == [1, 2, 0, 3, 4, 5]
    assert result.match[[0, *range(2, 8)]].tolist() == [list(range(6))] * 7
    assert float(result.component_change.nan_to_num(0).abs().max()) < 1e-5
    touched = torch.zeros(8, dtype=torch.bool)
    touched[1] = True
    assert float(result.change[~touched].nan_to_num(0).abs().max()) < 1e-6 < float(result.change[1].abs().max())
    assert result.changes(3).columns.tolist()[:3] == ["channel", "effect", "base"]


def test_a_channel_that_tuning_made_is_the_largest_change():
    m = model("neox")
    other = HookedModel.load(tiny("neox"))
    edit = plant(m, "q", (0, 2), (2, 1))
    with other.edited(edit):
        result = composition(ModelPair(m, other), draws=10)
    first = result.top(1).iloc[0]
    assert first.channel == "L0H2.0 -> L2H1.q" and result.top(1, side="base").iloc[0].z < first.z / 2
    row = result.strongest(1).iloc[0]
    assert row.channel.endswith("-> L2H1.q") and row.channel.startswith("L0H2.") and row.tuned_component == "L0H2.0" and row.tuned > 0.9


# ---- what is asked for, and what cannot be


def test_some_heads_have_the_numbers_that_they_have_among_all():
    m = model("llama")
    whole, some = composition(m, draws=30), composition(m, senders="L1H2,L0H1", receivers="L2H3", draws=30)
    assert some.labels["sender"] == ("L0H1", "L1H2") and some.labels["receiver"] == ("L2H3",)
    rows, column = [whole.labels["sender"].index(x) for x in some.labels["sender"]], whole.labels["receiver"].index("L2H3")
    for name in ("score", "p", "component", "place"):
        assert torch.equal(getattr(some, name)[0, ..., 0], getattr(whole, name)[0, rows][..., column]), name
    assert some.rivals.tolist() == [[8 * 8]] and set(some.place[0].flatten().tolist()) <= set(range(1, 65))
    flat = whole.place[0, :, :, column].flatten()
    assert sorted(flat.tolist()) == list(range(1, 65))
    assert int(flat.argmin()) == int(whole.component[0, :, :, column].flatten().argmax())
    heads = composition(m, level="head", draws=30)
    assert torch.equal(heads.score.nan_to_num(7), whole.score.nan_to_num(7)) and heads.component is None and heads.place is None
    assert heads.top(3).columns.tolist() == ["channel", "score", "expected", "z", "p"] and len(heads.to_frame()) == 48
    alone = composition(m, receivers="L1H0", draws=5)
    assert alone.labels["sender"] == tuple(f"L0H{h}" for h in range(4))
    with pytest.raises(InputError, match="level='component'"):
        _ = heads.component_z


def test_a_table_figures_and_sentences():
    m = model("gpt2")
    result = composition(ModelPair(m, model("gpt2", 1)), kind="k", draws=30)
    frame = result.to_frame()
    assert len(frame) == 2 * 48 and frame[["score", "z", "p", "component_score", "component_z"]].notna().all().all()
    row = frame[(frame.side == "tuned") & (frame.sender == "L1H3") & (frame.receiver == "L2H0")].iloc[0]
    assert row.component_score == pytest.approx(float(result.component[1, 7, :, 4].max()))
    assert int(row.component) == int(result.component[1, 7, :, 4].argmax()) and row.change == float(result.change[7, 4])
    torch.testing.assert_close(result.change, result.score[1] - result.score[0], rtol=0, atol=0, equal_nan=True)
    moved = result.changes(6)
    torch.testing.assert_close(torch.tensor(moved.effect), torch.tensor(moved.tuned - moved.base), rtol=0, atol=1e-6)
    assert moved.effect.abs().is_monotonic_decreasing
    assert len(result.figures()) == 8 and all(f.layout.title.text for f in result.figures().values())
    drawn = result.network(4, side="base")
    names = {text for trace in drawn.data if trace.mode == "markers+text" for text in trace.text}
    assert names == {end.split(".")[0] for channel in result.top(4, side="base").channel for end in channel.split(" -> ")}
    top = result.top(5)
    assert top.z.is_monotonic_decreasing and (top.place <= top.of).all() and (top.p_adjusted >= top.p).all()


def test_the_network_names_what_it_shows():
    m = model("llama")
    both, heads = (composition(m, kind="k", level=level, draws=20) for level in ("component", "head"))
    assert "numbers: components" in both.plot().layout.title.text and "numbers" not in heads.plot().layout.title.text
    assert len(heads.plot().layout.annotations) == 1  # of the width of lines; no empty labels
    names = {text for trace in both.network(4).data if trace.mode == "markers+text" for text in trace.text}
    assert names == {end for c in both.top(4).channel for end in (c.partition(".")[0], c.partition(" for ")[2])}
    assert all(len(note.text) <= 20 for note in both.network(40).layout.annotations)


def test_a_pair_is_told_in_one_sentence_and_one_model_beside_its_p():
    m, other = model("gpt2"), HookedModel.load(tiny("gpt2"))
    with other.edited(plant(m, "q", (0, 2), (2, 1))):
        result = composition(ModelPair(m, other), draws=10)
        alone = composition(other, draws=10)
    row, said = result.changes(1).iloc[0], result.summary()
    assert said.startswith(f"{row.effect:+.3g} is the largest change of a score, {row.channel} from") and said.count("strongest") == 0
    assert len(said) < 300 and "above chance are 0 of 288 channels in base and " in said
    assert f"p = {alone.top(1).p_adjusted[0]:.2g} corrected for all channels" in alone.summary()


def test_queries_that_are_normed_are_said_of_queries_and_keys_only(monkeypatch):
    m = model("llama")
    names = (*m.weights().names(), "model.layers.0.self_attn.q_norm.weight")
    source = m.weights()
    monkeypatch.setattr(type(source), "names", lambda self: names)
    assert "queries and keys are normed" in " ".join(outside(m, "qk")) and outside(m, "ov") == ()


def test_notes():
    half = HookedModel.load(tiny("llama").to(torch.bfloat16))
    result = composition(half, draws=5)
    upcast = composition(HookedModel.load(tiny("llama").to(torch.bfloat16).float()), draws=5)
    assert any("bfloat16" in note for note in result.notes) and not any("bfloat16" in note for note in upcast.notes)
    assert torch.equal(result.score.nan_to_num(7), upcast.score.nan_to_num(7)) and result.score.dtype == torch.float64
    assert any("distance 0" in note for note in result.notes) and "distance 0" in result.summary()
    assert composition(model("llama"), kind="v", draws=5).notes == () == composition(model("gpt2"), draws=5).notes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "w"}, "kind of composition named 'w'"),
        ({"level": "layer"}, "'head' or 'component'"),
        ({"draws": 0}, "at least 1"),
        ({"draws": "5"}, "draws is a whole number, at least 1, but it is '5'"),
        ({"senders": "L1H0", "receivers": "L1H1"}, "receiver L1H1 is not in a later layer than any sender"),
        ({"senders": "L1H0", "receivers": "L0H1,L2H0"}, "receiver L0H1"),
        ({"senders": "L1H0,L0H1", "receivers": "L1H1"}, "sender L1H0 is in no earlier layer"),
        ({"senders": "L2H0"}, "sender L2H0 is in no earlier layer"),
        ({"receivers": "L0H0"}, "receiver L0H0"),
        ({"receivers": "L3H0"}, "L3H0 does not exist"),
        ({"senders": "L0H4"}, "L0H4 does not exist"),
        ({"senders": "L0H1@END"}, "no position"),
        ({"senders": "head 3"}, "names no heads"),
    ],
)
def test_bad_input_is_one_sentence(settings, said):
    with pytest.raises(InputError, match=said) as error:
        composition(model("gpt2"), **settings)
    assert "\n" not in str(error.value)


def test_bad_questions_to_a_result():
    result = composition(model("gpt2"), draws=5)
    for ask, said in (
        (lambda: result.top(side="tuned"), "no model named 'tuned'"),
        (lambda: result.top(sender="L9H9"), "no sender named"),
        (lambda: result.changes(), "scores of one model"),
        (lambda: result.to_frame("prompt"), "nothing per prompt"),
        (lambda: composition(HookedModel.load(tiny("llama", num_hidden_layers=1))), "two layers"),
    ):
        with pytest.raises(InputError, match=said):
            ask()


def test_nothing_that_is_left_to_say_breaks(tmp_path):
    m = HookedModel.load(saved(tiny("llama"), tmp_path / "m"))
    zero = [WeightChange(Site("W_O", at), -m.weight(f"L{at}.W_O")) for at in range(3)]
    with m.edited(Edit(tuple(zero))):
        result = composition(m, draws=5)
    assert result.summary().startswith("0 channels") and result.top().empty
    assert replace(result).strongest().empty
