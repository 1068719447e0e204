"""Edits as values, and what they do to a model: against hand-made changes of the raw Hugging Face tensors."""

from __future__ import annotations

import copy
import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FOUR, saved, tiny

from interp.edits import ActivationChange, Edit, WeightChange
from interp.errors import InputError
from interp.models import Batch, HookedModel
from interp.sites import Site

ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7]]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- on models


def by_hand(plain, kind, site):
    """The raw tensor of a site as [rows, cols] of ``x @ W``, written out per architecture."""
    layer, head, what = site.layer, site.head, site.component
    if what in ("W_E", "W_U"):
        embedding, head_weight = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
        return embedding.data if what == "W_E" else head_weight.data.T
    if what == "ln_final":
        return {"gpt2": lambda: plain.transformer.ln_f, "neox": lambda: plain.gpt_neox.final_layer_norm}.get(
            kind, lambda: plain.model.norm
        )().weight.data
    if kind == "gpt2":
        block = plain.transformer.h[layer]
        if what[2:] in ("Q", "K", "V"):
            first = 24 * "QKV".index(what[2]) + (0 if head is None else 6 * head)
            where = slice(first, first + (24 if head is None else 6))
            return block.attn.c_attn.weight.data[:, where] if what[0] == "W" else block.attn.c_attn.bias.data[where]
        whole = {"W_O": block.attn.c_proj, "W_in": block.mlp.c_fc, "W_out": block.mlp.c_proj, "ln1": block.ln_1}[what].weight.data
        return whole if head is None else whole[6 * head : 6 * head + 6]
    if kind == "neox":
        block = plain.gpt_neox.layers[layer]
        if what[2:] in ("Q", "K", "V"):
            fused = block.attention.query_key_value
            first = 18 * head + 6 * "QKV".index(what[2])  # every head's q, k and v rows lie together
            return fused.weight.data[first : first + 6].T if what[0] == "W" else fused.bias.data[first : first + 6]
        module = {"W_O": block.attention.dense, "W_in": block.mlp.dense_h_to_4h, "W_out": block.mlp.dense_4h_to_h}.get(what)
        whole = block.input_layernorm.weight.data if what == "ln1" else module.weight.data.T
        return whole if head is None else whole[6 * head : 6 * head + 6]
    block, d_head = plain.model.layers[layer], 8 if kind == "llama" else 6
    names = {"Q": "q_proj", "K": "k_proj", "V": "v_proj", "O": "o_proj"}
    if what[2:] in names:
        module = getattr(block.self_attn, names[what[2:]])
        head = head // 2 if head is not None and what[2] in "KV" else head  # two query heads share a key/value head
        where = slice(None) if head is None else slice(d_head * head, d_head * head + d_head)
        if what[0] == "b":
            return module.bias.data[where]
        return module.weight.data.T[where] if what == "W_O" else module.weight.data.T[:, where]
    if what == "ln1":
        return block.input_layernorm.weight.data
    return {"W_in": block.mlp.up_proj, "W_gate": block.mlp.gate_proj, "W_out": block.mlp.down_proj}[what].weight.data.T


def sites_of(kind):
    heads = [Site(w, 1, h) for w in ("W_Q", "W_K", "W_V", "W_O") for h in (0, 1, 3)]
    whole = [Site(w, 2) for w in ("W_O", "W_in", "W_out", "ln1")] + [Site("W_E"), Site("W_U"), Site("ln_final")]
    whole += [] if kind == "neox" else [Site(w, 0) for w in ("W_Q", "W_K", "W_V")]
    whole += [Site("W_gate", 0)] if kind in ("llama", "qwen2") else []
    biases = [] if kind == "llama" else [Site("b_V", 1, 2), Site("b_Q", 2, 1)]
    return heads + whole + biases


@pytest.fixture(scope="module", params=FOUR)
def both(request):
    plain = tiny(request.param).double()
    plain.set_attn_implementation("eager")
    return request.param, plain, HookedModel.load(plain)


def plain_logits(plain, row):
    with torch.no_grad():
        return plain(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def check_equal(model, plain):
    got = model.logits(ROWS)
    for i, row in enumerate(ROWS):
        want = plain_logits(plain, row)
        assert (got[i, : len(row)] - want).abs().max() <= 2e-6 * want.abs().max()
    return got


def test_weight_edits_are_the_same_changes_made_by_hand(both):
    kind, plain, model = both
    clean = model.logits(ROWS)
    for n, site in enumerate(sites_of(kind)):
        hand = copy.deepcopy(plain)
        target = by_hand(hand, kind, site)
        delta = drawn(*target.shape, seed=n) * 0.5
        target += delta
        assert torch.equal(model.weight(site) + delta, target), site
        with model.edited(Edit((WeightChange(site, delta),))):
            assert (check_equal(model, hand) - clean).abs().max() > 1e-3, site
        if target.ndim == 2 and n % 2:
            low = WeightChange(site, drawn(target.shape[0], 2, seed=n), drawn(2, target.shape[1], seed=n + 1))
            target += low.left @ low.right - delta
            with model.edited(Edit((low,))):
                check_equal(model, hand)
    assert torch.equal(model.logits(ROWS), clean)


def test_whole_projections_of_interleaved_heads(both):
    """GPT-NeoX has no [d_model, heads * d_head] tensor, its heads are gathered; elsewhere the heads are blocks of columns."""
    kind, plain, model = both
    hand = copy.deepcopy(plain)
    changes = []
    for what in ("W_Q", "W_V"):
        width = model.weight(Site(what, 1)).shape[1]
        delta = drawn(24, width, seed=3)
        changes.append(WeightChange(Site(what, 1), delta))
        d_head, group = model.shape.d_head, 1 if what == "W_Q" else model.shape.n_heads // model.shape.n_kv_heads
        for head in range(0, model.shape.n_heads, group):
            first = head // group * d_head
            by_hand(hand, kind, Site(what, 1, head)).add_(delta[:, first : first + d_head])
            assert torch.equal(model.weight(Site(what, 1))[:, first : first + d_head], model.weight(Site(what, 1, head)))
    with model.edited(Edit(tuple(changes))):
        check_equal(model, hand)


def test_a_tied_embedding_is_one_weight(both):
    kind, plain, model = both
    tied = kind in ("gpt2", "qwen2")
    assert model.shape.tied == tied
    delta = drawn(31, 24, seed=2) * 0.3
    before = model.weight("W_U").clone()
    with model.edited(Edit((WeightChange(Site("W_E"), delta),))):
        assert torch.equal(model.weight("W_U"), before + delta.T if tied else before)
    with model.edited(Edit((WeightChange(Site("W_E"), delta), WeightChange(Site("W_U"), delta.T)))):
        hand = copy.deepcopy(plain)
        hand.get_input_embeddings().weight.data += delta * (2 if tied else 1)
        if not tied:
            hand.get_output_embeddings().weight.data += delta
        check_equal(model, hand)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_config_that_says_tied_of_weights_that_are_not(kind, tmp_path):
    """transformers keeps both tensors then; W_U must not be read from the embedding."""
    plain = tiny(kind, tie_word_embeddings=False)
    folder = saved(plain, tmp_path / "untied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    plain.config.tie_word_embeddings = True
    for model in (HookedModel.load(folder), HookedModel.load(plain)):
        assert not model.shape.tied
        assert torch.equal(model.weight("W_U"), plain.lm_head.weight.T)
        hand = copy.deepcopy(plain)
        delta = drawn(24, 31, seed=4, dtype=torch.float32)
        hand.lm_head.weight.data += delta.T
        with model.edited(Edit((WeightChange(Site("W_U"), delta),))):
            check_equal(model, hand)


@pytest.mark.parametrize("kind", FOUR)
def test_a_delta_is_added_in_fp32_and_rounded_once(kind):
    plain = tiny(kind).bfloat16()
    model = HookedModel.load(plain)
    site = Site("W_O", 1)
    weight = model.weight(site).clone()
    change = WeightChange(site, drawn(weight.shape[0], 3, dtype=torch.float32) * 0.01, drawn(3, 24, seed=1, dtype=torch.float32))
    with model.edited(Edit((change, change))):
        twice = ((weight.float() + change.delta).bfloat16().float() + change.delta).bfloat16()
        assert torch.equal(model.weight(site), twice) and model.weight(site).dtype == torch.bfloat16
    with model.edited(Edit((change,))):
        assert torch.equal(model.weight(site), (weight.float() + change.delta).bfloat16())
    assert torch.equal(model.weight(site), weight)


@pytest.mark.parametrize("kind", FOUR)
def test_a_saved_edited_model_is_the_edited_model(kind, tmp_path):
    model = HookedModel.load(saved(tiny(kind), tmp_path / "base"))
    changes = [WeightChange(s, drawn(*model.weight(s).shape, seed=n, dtype=torch.float32) * 0.3) for n, s in enumerate(sites_of(kind))]
    first, second = Edit(tuple(changes[:9]), "one"), Edit(tuple(changes[9:]), "two")
    clean, before = model.logits(ROWS), model.fingerprint
    with model.edited(first):
        assert model.active_edits == (first.digest,) and model.fingerprint == before
        model.save(tmp_path / "edited", edit=second)
        with model.edited(second):
            want = model.logits(ROWS)
            assert model.active_edits == (first.digest, second.digest)
    again = HookedModel.load(tmp_path / "edited")
    assert (again.logits(ROWS) - want).abs().max() <= 8 * torch.finfo(torch.float32).eps * want.abs().max()
    assert again.fingerprint != before and again.shape == model.shape
    assert torch.equal(model.logits(ROWS), clean) and not model.active_edits
    assert torch.equal(HookedModel.load(tmp_path / "base").logits(ROWS), clean)
    with pytest.raises(InputError, match="an edit of activations cannot be saved in a checkpoint"):
        model.save(tmp_path / "no", edit=Edit((ActivationChange(Site("z", 0), "scale", torch.tensor(0.0)),)))


@pytest.mark.parametrize(
    ("site", "shape", "message"),
    [
        (Site("W_in", 1), (40, 24), r"a delta of shape \(40, 24\) does not fit L1.W_in, which is \(24, 40\)"),  # as Hugging Face keeps it
        (Site("W_O", 1, 2), (24, 8), r"\(24, 8\) does not fit L1H2.W_O, which is \(8, 24\)"),
        (Site("W_Q", 1, 2), (8, 24), r"\(8, 24\) does not fit L1H2.W_Q, which is \(24, 8\)"),
        (Site("W_Q", 1), (24, 8), r"\(24, 8\) does not fit L1.W_Q, which is \(24, 32\)"),
        (Site("W_K", 1), (24, 32), r"\(24, 32\) does not fit L1.W_K, which is \(24, 16\)"),
        (Site("W_U"), (31, 24), r"\(31, 24\) does not fit W_U, which is \(24, 31\)"),
        (Site("ln1", 1), (1,), r"\(1,\) does not fit L1.ln1, which is \(24,\)"),
        (Site("W_Q", 3), (24, 32), "L3.W_Q: layer 3 is out of range|the model has layers 0 to 2"),
        (Site("W_Q", 1, 4), (24, 8), "heads 0 to 3"),
        (Site("b_Q", 1), (32,), r"has no weight L1.b_Q"),
    ],
)
def test_deltas_that_do_not_fit_change_nothing(site, shape, message):
    model = HookedModel.load(tiny("llama"))
    clean = model.logits(ROWS)
    with (
        pytest.raises(InputError, match=message),
        model.edited(Edit((WeightChange(Site("W_O", 0), torch.ones(32, 24)), WeightChange(site, torch.ones(shape))))),
    ):
        pass
    assert torch.equal(model.logits(ROWS), clean) and not model.active_edits


def test_activation_changes_in_a_model(both):
    _, _, model = both
    batch = Batch.of(ROWS, {"mid": ((2,), (1,), (3,))})
    unit = drawn(24, seed=5) / drawn(24, seed=5).norm()
    formulas = {
        "set": (unit, lambda x: unit.expand_as(x)),
        "add": (unit, lambda x: x + unit),
        "scale": (torch.tensor(0.25), lambda x: x / 4),
        "project": (unit, lambda x: x - (x @ unit)[..., None] * unit),
    }
    for (kind, (value, formula)), strength, position in itertools.product(formulas.items(), (1, 0.5, -2, 0), (None, "mid")):
        site = Site("resid_post", 1, None, position)
        x = model.capture(batch, site)[site]
        edit = Edit((ActivationChange(site, kind, value),)).scaled(strength)
        with model.edited(edit):
            got = model.capture(batch, site)[site]
        want = x + strength * (formula(x) - x)
        if position is None:
            want = want * batch.mask[..., None]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 if strength != 0 else 0)
        if kind == "project" and strength == 1:
            assert (got @ unit).abs().max() < 1e-12
    row = torch.tensor([0.25, 0.75])
    with model.edited(Edit((ActivationChange(Site("pattern", 1, 2, 1), "pattern", row),))):
        got = model.capture([ROWS[1]], "L1.pattern")[Site("pattern", 1)]
    assert torch.equal(got[0, 2, 1], row.double()) and torch.equal(got[0, 0, 0], torch.tensor([1.0, 0.0]).double())


# ---- as values

ACTIVATION = (("set", ()), ("set", (8,)), ("add", (24,)), ("scale", ()), ("project", (24,)), ("pattern", (7,)))


def random_edit(draws: random.Random) -> Edit:
    changes = []
    for _ in range(draws.randrange(1, 5)):
        seed, dtype = draws.randrange(10**6), draws.choice([torch.float32, torch.float64, torch.bfloat16])
        if draws.random() < 0.5:
            rows, cols, rank = draws.randrange(1, 6), draws.randrange(1, 6), draws.randrange(4)
            dense = draws.random() < 0.4
            left = drawn(rows, cols if dense else rank, seed=seed, dtype=dtype)
            changes.append(
                WeightChange(
                    Site(*draws.choice([("W_Q", 1, 2), ("W_out", 0), ("W_U",)])),
                    left,
                    None if dense else drawn(rank, cols, seed=seed + 1, dtype=dtype),
                )
            )
        else:
            kind, shape = draws.choice(ACTIVATION)
            value = drawn(*shape, seed=seed)
            value = value / value.norm() if kind == "project" else value.to(dtype)
            site = Site("pattern", 1, 2, "END") if kind == "pattern" else Site("resid_post", 2, None, draws.choice([None, "END", 3]))
            changes.append(ActivationChange(site, kind, value, draws.choice(["prompt", "new", "all"]), draws.choice([1.0, 1, 0.5, -2])))
    return Edit(tuple(changes), draws.choice(["", "a name"]))


def test_edits_read_back_as_themselves(tmp_path):
    draws = random.Random(0)
    digests = {}
    for n in range(150):
        edit = random_edit(draws)
        again = Edit.load(edit.save(tmp_path / str(n)))
        assert again.digest == edit.digest and again.name == edit.name and len(again.changes) == len(edit.changes)
        for a, b in zip(again.changes, edit.changes, strict=True):
            assert type(a) is type(b) and a.site == b.site
            if isinstance(a, WeightChange):
                assert torch.equal(a.delta, b.delta) and a.left.dtype == b.left.dtype and (a.right is None) == (b.right is None)
            else:
                x = drawn(2, 24 if b.value.ndim and len(b.value) == 24 else 8 if b.value.ndim and len(b.value) == 8 else 7, seed=n)
                assert (a.kind, a.at, a.strength) == (b.kind, b.at, b.strength)
                torch.testing.assert_close(a.apply(x), b.apply(x), rtol=0, atol=1e-12)
        assert digests.setdefault(edit.digest, n) == n, "two edits have one digest"
    assert {p.name for p in (tmp_path / "0").iterdir()} == {"edit.json", "edit.safetensors"}


def test_a_factor_that_two_changes_share_is_saved(tmp_path):
    left, right = drawn(24, 2), drawn(2, 24)
    edit = Edit((WeightChange(Site("W_O", 0), left, right), WeightChange(Site("W_O", 1), left[:8], right)))
    both = edit + edit.scaled(1)
    again = Edit.load(both.save(tmp_path))
    assert again.digest == both.digest and torch.equal(again.weights[3].left, left[:8])


def test_scaling_and_adding():
    draws = random.Random(1)
    for _ in range(50):
        one, two = random_edit(draws), random_edit(draws)
        both = one + two
        assert both.changes == one.changes + two.changes and both.digest != (two + one).digest
        assert set(both.weights) | set(both.activations) == set(both.changes)
        assert one.scaled(1).digest == one.digest
        assert one.scaled(2).digest != one.digest or all(c.left.numel() == 0 for c in one.weights) and not one.activations
        assert one.scaled(2).scaled(0.5).digest == one.digest, "powers of two are exact"
        for change, scaled in zip(one.weights, one.scaled(-3).weights, strict=True):
            torch.testing.assert_close(scaled.delta.double(), -3 * change.delta.double(), rtol=0.02, atol=0.02)
        assert not any(c.delta.any() for c in one.scaled(0).weights)
        x = drawn(2, 5, 24)
        for change in one.scaled(0).activations:
            if change.value.ndim == 0 or len(change.value) == 24:
                assert torch.equal(change.apply(x), x)
    assert (Edit((), "a") + Edit((), "b")).name == "a + b" and (Edit(()) + Edit((), "b")).name == "b"


def test_the_digest_follows_everything_but_the_name():
    weight = WeightChange(Site("W_O", 1, 2), drawn(6, 2), drawn(2, 24))
    act = ActivationChange(Site("resid_post", 1, None, "END"), "add", drawn(24))
    edit = Edit((weight, act))
    assert Edit((weight, act), "other name").digest == edit.digest == Edit((replace(weight, left=weight.left.clone()), act)).digest
    bumped = weight.left.clone()
    bumped[5, 1] = torch.nextafter(bumped[5, 1], torch.tensor(9.0, dtype=torch.float64))
    swapped = act.value.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    others = [
        (replace(weight, site=Site("W_O", 1, 3)), act),
        (replace(weight, left=bumped), act),
        (WeightChange(weight.site, weight.delta), act),
        (replace(weight, left=weight.left.float(), right=weight.right.float()), act),
        (weight, replace(act, site=Site("resid_post", 1))),
        (weight, replace(act, kind="set")),
        (weight, replace(act, at="new")),
        (weight, replace(act, strength=0.999)),
        (weight, replace(act, value=swapped)),
        (act, weight),
        (weight,),
        (weight, act, act),
    ]
    digests = {Edit(changes).digest for changes in others}
    assert len(digests) == len(others) and edit.digest not in digests
    transposed = drawn(24, 6).T
    assert (
        Edit((WeightChange(Site("W_O", 1, 2), transposed),)).digest
        == Edit((WeightChange(Site("W_O", 1, 2), transposed.contiguous()),)).digest
    )
    assert Edit((replace(act, value=act.value.requires_grad_(True)),)).digest == Edit((act,)).digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightChange(Site("z", 1), torch.ones(2)), "L1.z is an activation; a WeightChange needs a weight site"),
        (lambda: WeightChange(Site("W_O", 1), torch.ones(3, 2), torch.ones(3, 2)), r"factors of L1.W_O do not fit: \(3, 2\) @ \(3, 2\)"),
        (lambda: WeightChange(Site("W_O", 1), torch.ones(3), torch.ones(3, 2)), "do not fit"),
        (lambda: ActivationChange(Site("W_O", 1), "set", torch.ones(2)), "L1.W_O is not an activation"),
        (lambda: ActivationChange(Site("svd", 1, 1, None, 0), "set", torch.ones(2)), "L1H1.0 is not an activation"),
        (
            lambda: ActivationChange(Site("z", 1), "multiply", torch.ones(2)),
            "unknown kind 'multiply' of activation change; known: set, add",
        ),
        (lambda: ActivationChange(Site("z", 1), "set", torch.ones(2), "later"), "at='later' is not one of prompt, new, all"),
        (lambda: ActivationChange(Site("z", 1), "pattern", torch.ones(2)), "kind 'pattern' and the site L1.z do not go together"),
        (lambda: ActivationChange(Site("pattern", 1), "add", torch.ones(2)), "do not go together"),
        (
            lambda: ActivationChange(Site("resid_post", 1), "project", torch.ones(4)),
            "project needs a unit vector at L1.resid_post; its norm is 2",
        ),
    ],
)
def test_changes_that_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_folders_that_hold_no_whole_edit(tmp_path):
    edit = Edit((WeightChange(Site("W_O", 1), drawn(4, 4)), ActivationChange(Site("z", 1), "scale", torch.tensor(2.0))), "e")
    with pytest.raises(InputError, match="holds no edit: edit.json and edit.safetensors are expected"):
        Edit.load(tmp_path)

    def broken(n, change):
        folder = edit.save(tmp_path / str(n))
        body = json.loads((folder / "edit.json").read_text())
        change(folder, body)
        with pytest.raises(InputError, match="holds an edit that is not whole"):
            Edit.load(folder)

    def write(folder, body):
        (folder / "edit.json").write_text(json.dumps(body))

    whole = (edit.save(tmp_path / "whole") / "edit.safetensors").read_bytes()
    broken(0, lambda folder, body: (folder / "edit.json").write_text("{"))
    broken(1, lambda folder, body: write(folder, []))
    broken(2, lambda folder, body: (folder / "edit.safetensors").write_bytes(whole[:-8]))
    broken(3, lambda folder, body: save_file({}, folder / "edit.safetensors"))
    broken(4, lambda folder, body: write(folder, body | {"format": 2}))
    broken(5, lambda folder, body: write(folder, body | {"changes": [{**body["changes"][0], "site": "L1.nothing"}]}))
    broken(6, lambda folder, body: write(folder, body | {"changes": [{**body["changes"][0], "site": "L2.W_O"}, body["changes"][1]]}))
    broken(7, lambda folder, body: write(folder, body | {"changes": [{"type": "strange", "site": "L1.z"}]}))
    # A kill between the two files leaves tensors of one edit beside the text of another.
    broken(
        8,
        lambda folder, body: save_file(
            {**load_file(folder / "edit.safetensors"), "0.left": drawn(4, 4, seed=9)}, folder / "edit.safetensors"
        ),
    )
