"""Channels as edits against plain Hugging Face models with hooks written by hand, one prompt at a time."""

from __future__ import annotations

import math
import re
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from plain_hooks import Set, _before, _parts, hooked, patched, seen
from tiny_checkpoints import FOUR, saved, sharp, tiny
from torch import Tensor

from interp import organisms
from interp.analyses.composition import composition
from interp.edits import ChannelChange, Edit, WeightChange
from interp.errors import InputError
from interp.models import Batch, HookedModel
from interp.models.channels import channel_edit, coefficients, named
from interp.models.heads import component, folded_heads
from interp.sites import Site

ROWS = [[3, 9, 4, 1, 5], [2, 7, 8], [6, 5, 3, 5, 8, 9, 7], [4, 4, 1, 2]]
TWO = ((1, 3), (0, 1), (2, 5), (1, 3))
ONE = ((2,), (1,), (4,), (1,))
BATCH = Batch.of(ROWS, {"TWO": TWO, "ONE": ONE})


def near(got: Tensor, want: Tensor, times: float = 8) -> None:
    assert got.shape == want.shape
    assert not got.numel() or (got - want).abs().max() <= times * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.fixture(scope="module", params=FOUR)
def both(request: Any) -> tuple[Any, HookedModel]:
    plain = cast("Any", tiny(request.param, seed=2))
    plain.set_attn_implementation("eager")
    return plain, HookedModel.load(plain)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel.load(tiny("llama", seed=2))


def write(hf: Any, layer: int, head: int) -> Tensor:
    """W_O of a head in a plain model, [d_head d_model]."""
    out = _parts(hf, layer)[2]
    matrix = out.weight if hasattr(hf, "transformer") else out.weight.T
    d_head = len(matrix) // hf.config.num_attention_heads
    return matrix.detach()[head * d_head : (head + 1) * d_head]


def norm(hf: Any, layer: int) -> Any:
    block = _parts(hf, layer)[0]
    return block.ln_1 if hasattr(hf, "transformer") else block.input_layernorm


def sent(hf: Any, ids: list[int], layer: int, head: int, v: Tensor) -> Tensor:
    """The coefficient that a head writes at every token of a prompt, from a plain run."""
    z = seen(hf, ids, [("z", layer)])["z", layer][:, head]
    return z @ write(hf, layer, head) @ v.float()


# ---- for all readers


@pytest.mark.parametrize("settings", [{"to": 2.5}, {"scale": -1.5}, {"delete": True}])
@pytest.mark.parametrize("at", [None, "TWO", "END"])
def test_all_readers_see_the_new_coefficient(both: tuple[Any, HookedModel], settings: dict[str, Any], at: str | None) -> None:
    hf, model = both
    v = component(model, "L1H2.1")[2].float()
    with model.edited(channel_edit(model, "L1H2.1", at=at, **settings)) as ledger:
        got = model.logits(BATCH)
    for row, ids in enumerate(ROWS):
        where = list(range(len(ids))) if at is None else list(BATCH.at(at)[row])
        c = sent(hf, ids, 1, 2, v)[where]
        new = settings.get("to", 0.0) if "scale" not in settings else settings["scale"] * c

        def add(x: Tensor, where: list[int] = where, step: Any = new - c) -> None:
            x[where] += step[:, None] * v

        with torch.no_grad(), hooked(hf, "attn_out", 1, add):
            want = hf(torch.tensor([ids]), use_cache=False).logits[0]
        near(got[row, : len(ids)], want)
        clean = model.logits([ids])[0]
        near(got[row, : min(where)], clean[: min(where)])  # nothing before the steered token moves
        assert (got[row, min(where) : len(ids)] - clean[min(where) :]).abs().max() > 1e-3
    assert ledger.change > 0


def test_several_channels_are_set_together_and_later_ones_on_the_run_that_is_steered(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    edit = channel_edit(model, "L0H1.0, L0H1.3, L2H3.1", to=1.5, at="END")
    places = [Site("svd", 0, 1, "END", 0), Site("svd", 0, 1, "END", 3), Site("svd", 2, 3, "END", 1), Site("svd", 0, 1, "END", 2)]
    directions = torch.stack([component(model, p.at(None))[2] for p in places])
    before = coefficients(model, BATCH, places, directions)
    # The stream behind the heads has what was set: read from what attention adds, less the other heads.
    with model.edited(edit):
        results = model.capture(BATCH, [Site("attn_out", 0, position="END"), Site("attn_out", 2, position="END")])
        z = model.capture(BATCH, [Site("z", 0, position="END"), Site("z", 2, position="END")])
    for layer, head, ranks in ((0, 1, (0, 1)), (2, 3, (2,))):
        out = torch.stack([model.weight(Site("W_O", layer, h)) for h in range(model.shape.n_heads)])
        own = torch.einsum("phc,hcd->phd", z[Site("z", layer, position="END")], out)
        added = results[Site("attn_out", layer, position="END")] - own.sum(1)
        others = added @ directions.float().T  # less b_O, the same for all prompts
        for i in ranks:
            c = own[:, head] @ directions[i].float()
            shift = others[:, i] + c  # b_O . v + what was set
            assert (shift - shift.mean()).abs().max() < 1e-5
        if layer == 0:
            c = own[:, head].double() @ directions[3]
            assert (c - before[:, 3]).abs().max() < 1e-5
            assert (others[:, 3] - others[:, 3].mean()).abs().max() < 1e-5  # a component that was left alone


def test_steering_to_the_present_coefficient_changes_nothing(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    (place,) = named(model, "L1H3.2", "ONE")
    v = component(model, place.at(None))[2]
    c = coefficients(model, BATCH, [place], v[None])
    clean = model.logits(BATCH)
    for row in range(len(ROWS)):
        one = BATCH[row]
        with model.edited(channel_edit(model, "L1H3.2@ONE", to=float(c[row]))):
            near(model.logits(one)[0], clean[row, : len(ROWS[row])], 4)
    with model.edited(channel_edit(model, "L1H3.2", scale=1)):
        assert torch.equal(model.logits(BATCH), clean)
    with model.edited(channel_edit(model, "L1H3.2", to=3.0).scaled(0)):
        assert torch.equal(model.logits(BATCH), clean)


def test_an_edit_half_as_strong_goes_half_the_way(llama: HookedModel) -> None:
    (place,) = named(llama, "L1H3.2@END")
    v = component(llama, "L1H3.2")[2].float()
    base, out = (llama.capture(BATCH, Site("attn_out", 1, position="END")) for _ in range(2))
    whole, half = channel_edit(llama, "L1H3.2@END", to=2.0), channel_edit(llama, "L1H3.2@END", to=2.0).scaled(0.5)
    found = []
    for edit in (whole, half):
        with llama.edited(edit):
            out = llama.capture(BATCH, Site("attn_out", 1, position="END"))
        found.append(next(iter(out.values())) - next(iter(base.values())))
    near(2 * found[1], found[0], 64)
    c = coefficients(llama, BATCH, [place], v[None].double())[:, 0]
    near(found[0] @ v, (2 - c).float(), 64)


# ---- weights


def test_weights_scale_one_singular_value_and_no_other(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    before = folded_heads(model, 1).components("ov").S
    for g in (0.0, 0.5):
        edit = channel_edit(model, "L1H2.1, L1H2.4", scale=g, where="weights")
        assert len(edit.changes) == 1  # of one head together
        with model.edited(edit):
            after = folded_heads(model, 1).components("ov").S
        keep = torch.ones_like(before)
        keep[2, [1, 4]] = g
        want = (before * keep).sort(dim=-1, descending=True).values
        assert (after - want).abs().max() <= 1e-6 * before.max()  # the other heads too: W_O belongs to one query head


def test_deleting_in_weights_is_deleting_in_activations(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    text = "L0H1.1, L0H1.3, L1H2.0"
    clean = model.logits(BATCH)
    for settings in ({"delete": True}, {"scale": 3.0}):
        with model.edited(channel_edit(model, text, where="weights", **settings)):
            weights = model.logits(BATCH)
        with model.edited(channel_edit(model, text, **settings)):
            near(model.logits(BATCH), weights)
        assert (weights - clean).abs().max() > 1e-2
    assert torch.equal(model.logits(BATCH), clean)


def test_deleting_is_the_same_to_1e_7_in_double() -> None:
    model = HookedModel.load(tiny("gpt2", seed=2).double())
    got = []
    for where in ("weights", "activations"):
        with model.edited(channel_edit(model, "L0H1.1, L1H2.0", delete=True, where=where)):
            got.append(model.logits(BATCH))
    assert (got[0] - got[1]).abs().max() < 1e-7


def test_all_components_of_a_head_are_the_head(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    ranks = ", ".join(f"L1H2.{i}" for i in range(model.shape.d_head))
    with model.edited(channel_edit(model, ranks, delete=True, at="END")):
        got = model.logits(BATCH, at="END")
    with model.patched({"L1H2.z@END": torch.zeros(())}):
        near(got, model.logits(BATCH, at="END"), 16)


# ---- for some receivers only


def by_hand(hf: Any, ids: list[int], where: list[int], step: Tensor, v: Tensor, receivers: list[tuple[str, int, int]]) -> Tensor:
    """Each receiver is recorded in a run in which its norm reads a changed stream, and set in the next ones."""
    sets: list[Set] = []
    for name, layer, head in receivers:
        found: dict[str, Tensor] = {}

        def change(x: Tensor) -> None:
            x[0, where] += step[:, None] * v

        with torch.no_grad(), ExitStack() as stack:
            for s in sets:
                stack.enter_context(hooked(hf, s.component, s.layer, lambda x, s=s: x.__setitem__((slice(None), s.head), s.value)))
            _before(stack, norm(hf, layer), change)
            stack.enter_context(hooked(hf, name, layer, lambda x, found=found, head=head: found.update(x=x[:, head].clone())))
            hf(torch.tensor([ids]), use_cache=False)
        sets.append(Set(name, layer, head, None, found["x"]))
    return patched(hf, ids, sets)


@pytest.mark.parametrize("at", [None, "TWO", "END"])
def test_only_the_receivers_read_the_change(both: tuple[Any, HookedModel], at: str | None) -> None:
    hf, model = both
    v = component(model, "L0H1.1")[2].float()
    receivers = [("q", 1, 0), ("k", 2, 1), ("v", 2, 1)]
    edit = channel_edit(model, "L0H1.1", to=9.0, at=at, receivers="L1H0.q, L2H1.k, L2H1.v")
    with model.edited(edit) as ledger:
        got = model.logits(BATCH)
    for row, ids in enumerate(ROWS):
        where = list(range(len(ids))) if at is None else list(BATCH.at(at)[row])
        step = 9.0 - sent(hf, ids, 0, 1, v)[where]
        near(got[row, : len(ids)], by_hand(hf, ids, where, step, v, receivers))
        near(got[row, : min(where)], model.logits([ids])[0, : min(where)])
    assert all(e.fired == 1 and e.change > 0.1 for e in ledger.entries) and len(ledger.entries) == 3


def test_two_edits_of_one_receiver_are_read_together(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    together = channel_edit(model, "L0H1.1, L0H3.0", to=4.0, receivers="L2H1.v")
    apart = channel_edit(model, "L0H1.1", to=4.0, receivers="L2H1.v") + channel_edit(model, "L0H3.0", to=4.0, receivers="L2H1.v")
    clean, got = model.logits(BATCH), []
    for edit in (together, apart):
        with model.edited(edit):
            got.append(model.logits(BATCH))
    near(got[1], got[0])
    assert (got[0] - clean).abs().max() > 1e-3 and torch.equal(model.logits(BATCH), clean)
    whole = [
        channel_edit(model, "L0H1.1, L0H3.0", to=4.0, receivers=r)
        for r in ("L2.v", ", ".join(f"L2H{i}.v" for i in range(model.shape.n_kv_heads)))
    ]
    for edit in whole:  # a layer is all its heads
        with model.edited(edit):
            got.append(model.logits(BATCH))
    assert torch.equal(got[2], got[3])


def test_a_sender_behind_another_receiver_is_read_as_it_then_is(llama: HookedModel) -> None:
    """L1H1 is moved by what L1H1.v reads; its own coefficient for L2 is that of the moved run."""
    first = channel_edit(llama, "L0H1.1", to=30.0, receivers="L1H0.v", at="END")
    second = channel_edit(llama, "L1H1.0@END", scale=2.0, receivers="L2H1.q")
    v = component(llama, "L1H1.0")[2]
    with llama.edited(first):
        c = coefficients(llama, BATCH, named(llama, "L1H1.0@END"), v[None])[:, 0]
        alone = [2 * float(x) for x in c]
    assert (c - coefficients(llama, BATCH, named(llama, "L1H1.0@END"), v[None])[:, 0]).abs().max() > 1e-3
    for row, value in enumerate(alone):
        one, got = BATCH[row], []
        for edit in (first + second, first + channel_edit(llama, "L1H1.0@END", to=value, receivers="L2H1.q")):
            with llama.edited(edit):
                got.append(llama.logits(one))
        near(got[0], got[1])


def test_scores_move_in_proportion_at_a_fixed_norm(both: tuple[Any, HookedModel]) -> None:
    """Without rotary embeddings or at distance 0 a receiver's query moves by (c* - c) v W_Q' over the norm's scale, where scale is held."""
    _, model = both
    v, c = component(model, "L0H1.1")[2], coefficients(model, BATCH, named(model, "L0H1.1@END"), component(model, "L0H1.1")[2][None])
    folded = folded_heads(model, 1)
    x = next(iter(model.capture(BATCH, Site("resid_pre", 1, position="END")).values())).double()
    q = Site("q", 1, 2, "END")
    clean = model.capture(BATCH, q)[q].double()
    with model.edited(channel_edit(model, "L0H1.1@END", to=5.0, receivers="L1H2.q")):
        got = model.capture(BATCH, q)[q].double() - clean
    centred = model.shape.architecture in ("GPT2LMHeadModel", "GPTNeoXForCausalLM")
    new = x + (5.0 - c) * v

    def scale(y: Tensor) -> Tensor:
        eps = 1e-5 if centred else 1e-6
        y = y - y.mean(-1, keepdim=True) if centred else y
        return (y.square().mean(-1, keepdim=True) + eps).sqrt()

    moved = (5.0 - c) * (v @ folded.W_Q[2]) / scale(new)  # exactly linear in c* at the scale of what is read
    carried = (x @ folded.W_Q[2]) * (1 / scale(new) - 1 / scale(x))
    assert (got - moved - carried).abs().max() < 1e-4


# ---- as values


def test_saved_and_loaded_edits_are_the_same(llama: HookedModel, tmp_path: Any) -> None:
    edit = channel_edit(llama, "L0H1.1@END, L0H2.0", scale=0.5, receivers="L2H1.q, L1.k", when="prompt") + channel_edit(
        llama, "L1H0.0", to=1
    )
    again = Edit.load(edit.save(tmp_path / "a"))
    assert again.digest == edit.digest and isinstance(again.changes[0], ChannelChange)
    got = []
    for e in (edit, again):
        with llama.edited(e):
            got.append(llama.logits(BATCH))
    assert torch.equal(*got)
    change = cast("ChannelChange", edit.changes[0])
    for other in (replace(change, to=(1.0, 0.0)), replace(change, strength=0.5), replace(change, directions=change.directions.flip(0))):
        assert Edit((other,)).digest != Edit((change,)).digest


def test_new_tokens_are_changed_too_when_asked(llama: HookedModel) -> None:
    prompts = Batch.of([[3, 9, 4], [5, 6, 7]])

    def greedy(edit: Edit, new: bool) -> list[list[int]]:
        rows = [list(r) for r in prompts.rows()]
        for _ in range(4):
            batch = Batch.of(rows, {"HERE": tuple(tuple(range(len(r) if new else 3)) for r in rows)})
            with llama.edited(edit):
                rows = [[*r, int(t)] for r, t in zip(rows, llama.logits(batch, at="END").argmax(-1), strict=True)]
        return [r[3:] for r in rows]

    for receivers in (None, "L1H0.q, L1H1.v, L2.q"):
        with llama.edited(channel_edit(llama, "L0H1.1", to=40.0, receivers=receivers)):
            got = llama.generate(prompts, 4, stop=[])
        assert got == greedy(channel_edit(llama, "L0H1.1@HERE", to=40.0, receivers=receivers), True)


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("L1H2", {"delete": True}, "not a site"),
        ("L1H2.z", {"delete": True}, "no component of a head"),
        ("L1H2.99", {"delete": True}, "0 to 7"),
        ("L1H9.1", {"delete": True}, "head 9 is out of range"),
        ("L1H2.1, L1H2.1@END", {"delete": True}, "named twice"),
        ("L1H2.1", {}, "nothing was given"),
        ("L1H2.1", {"to": 1.0, "scale": 2.0}, "to and scale"),
        ("L1H2.1", {"to": math.inf}, "finite"),
        ("L1H2.1", {"to": 1.0, "where": "weights"}, "cannot set"),
        ("L1H2.1@END", {"delete": True, "where": "weights"}, "all positions"),
        ("L1H2.1", {"delete": True, "where": "weights", "receivers": "L2H1.q"}, "no receivers"),
        ("L1H2.1", {"delete": True, "where": "biases"}, "not one of"),
        ("L1H2.1", {"delete": True, "receivers": "L1H1.q"}, "not later than"),
        ("L1H2.1", {"delete": True, "receivers": "L0H1.q"}, "not later than"),
        ("L1H2.1", {"delete": True, "receivers": "q"}, "needs a layer"),
        ("L1H2.1", {"delete": True, "receivers": "L2H3.k"}, "key/value heads 0 to 1"),
        ("L1H2.1", {"delete": True, "receivers": "L2H1.z"}, "receivers are q, k or v"),
        ("L1H2.1", {"delete": True, "receivers": "L2H1.q, L2H1.q"}, "twice"),
        ("L1H2.1", {"delete": True, "receivers": "L2H1.q, L2.q"}, "twice"),
        ("", {"delete": True}, "no channels"),
    ],
)
def test_bad_input_is_one_sentence(llama: HookedModel, text: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        channel_edit(llama, text, **settings)
    assert "\n" not in str(error.value)


def test_a_model_is_not_saved_over_its_own_source(tmp_path: Any) -> None:
    folder = saved(tiny("gpt2"), tmp_path / "own")
    model = HookedModel.load(folder)
    edit = channel_edit(model, "L1H2.1", delete=True, where="weights")
    size = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="would be overwritten"):
        model.save(tmp_path / "x" / ".." / "own", edit=edit)
    assert (folder / "model.safetensors").read_bytes() == size
    again = HookedModel.load(model.save(tmp_path / "other", edit=edit))
    with model.edited(edit):
        near(again.logits(BATCH), model.logits(BATCH), 2)


def test_a_norm_behind_attention_is_refused() -> None:
    import transformers
    from tiny_checkpoints import GQA, randomised

    config = transformers.Olmo2Config(**{**GQA, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    model = HookedModel.load(randomised(transformers.AutoModelForCausalLM.from_config(config), 0))
    edit = channel_edit(model, "L0H1.1", delete=True)
    with pytest.raises(InputError, match="no result of their own"), model.edited(edit):
        model.logits(BATCH)


# ---- what is said of components


def test_nearly_equal_strengths_are_said_with_their_span() -> None:
    model = organisms.hand_built("induction").model  # L0H1 copies: its components are all alike
    there = int((folded_heads(model, 0).components("ov").S[1] > 1e-6).sum())
    said = f"components 0 to {there - 1} of L0H1 have nearly equal singular values: their span is identified, the direction of L0H1.2"
    with pytest.warns(UserWarning, match=re.escape(said)):
        channel_edit(model, "L0H1.2", delete=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        channel_edit(model, ", ".join(f"L0H1.{i}" for i in range(there)), delete=True)  # all of the span
        channel_edit(HookedModel.load(sharp("gpt2")), "L0H1.2", delete=True)


def test_low_precision_is_said() -> None:
    half = HookedModel.load(sharp("llama").bfloat16())
    with pytest.warns(UserWarning, match="weights are bfloat16; they are taken apart in float64"):
        channel_edit(half, "L0H1.2", delete=True)


def test_a_head_without_weights_has_no_channel() -> None:
    model = HookedModel.load(sharp("gpt2"))
    zero = Edit((WeightChange(Site("W_O", 0, 1), -model.weight("L0H1.W_O")),))
    with model.edited(zero), pytest.raises(InputError, match="L0H1.0 has no strength: all weights of its head's OV are zero"):
        channel_edit(model, "L0H1.0", delete=True)
    low = model.weight("L0H1.W_O").double()
    kept = torch.zeros_like(low)
    kept[:2] = low[:2]
    with model.edited(Edit((WeightChange(Site("W_O", 0, 1), kept - low),))):
        channel_edit(model, "L0H1.1", delete=True)
        with pytest.raises(InputError, match="L0H1.3 has no strength: its head writes along 2 components only"):
            channel_edit(model, "L0H1.3", delete=True)


def test_two_positions_that_are_one_token_are_changed_once(llama: HookedModel) -> None:
    ids = [[5, 9, 11, 8]]
    for settings in ({"delete": True}, {"to": 2.0}, {"scale": 3.0}):
        for receivers in (None, "L2H1.v"):
            if receivers is None and "scale" in settings:
                with pytest.raises(InputError, match="L0H1.0@END and L0H1.0@3 may be the same token, whose channel would be multiplied"):
                    channel_edit(llama, "L0H1.0@END, L0H1.0@3", **settings)
                continue
            found = []
            for text in ("L0H1.0@END", "L0H1.0@END, L0H1.0@3"):
                with llama.edited(channel_edit(llama, text, receivers=receivers, **settings)):
                    found.append(llama.logits(ids))
            near(found[1], found[0])
            assert not torch.equal(found[0], llama.logits(ids))


def test_receivers_are_named_as_composition_names_them(llama: HookedModel) -> None:
    """``L0H1.0 -> L2H1.v for L2H3``: the values of key/value head 1, and no others, read the change."""
    found = composition(llama, kind="v", senders="L0H1", receivers="L2H3", draws=5).top(1).channel[0]
    channel, _, receiver = found.partition(" -> ")
    reader, _, reading = receiver.partition(" for ")
    assert (reader, reading) == ("L2H1.v", "L2H3")
    ids, site = [[5, 9, 11, 8]], Site("v", 2)
    plain = llama.capture(ids, site)[site]
    with llama.edited(channel_edit(llama, channel, delete=True, receivers=reader)):
        moved = (llama.capture(ids, site)[site] - plain).abs().amax((0, 1, 3))
    assert moved[0] == 0 < moved[1]
    for kind, name in (("k", "L2H1.k for L2H3"), ("q", "L2H3.q")):
        assert composition(llama, kind=kind, senders="L0H1", receivers="L2H3", draws=5).top(1).channel[0].endswith(f" -> {name}")
    with pytest.raises(InputError, match="L2H3"):
        channel_edit(llama, channel, delete=True, receivers="L2H3.v")
