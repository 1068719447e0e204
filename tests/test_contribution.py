"""What tuning adds block by block, against plain Hugging Face: a hook on each tuned block runs base's block on what it was given."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import transformers
from plain_hooks import _after, _parts
from test_adapters_loading import adapted
from tiny_checkpoints import FOUR, GQA, randomised, saved, tiny

from interp.errors import InputError
from interp.models import Batch, HookedModel, ModelPair
from interp.models.contribution import Step, StoredBlocks, contributions, share
from interp.models.interventions import Part
from interp.models.norms import _Tally, contribution_norms, norm_of
from interp.models.parts import block_parts

ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7], [4, 4, 8]]
SIZES = {"atol": 0, "rtol": 2e-5}
EPS = torch.finfo(torch.float32).eps


def first(out):
    return out[0] if isinstance(out, tuple) else out


def blocks(hf):
    return list(hf.base_model.h if hasattr(hf.base_model, "h") else hf.base_model.layers)


def twin(base, tuned, rows, alphas=None, own_calls=False, attention="eager"):
    """PTC and FTC of every layer [prompt pos d], x_0, x_L and logits; two plain models, rows padded on the left."""
    base.set_attn_implementation(attention), tuned.set_attn_implementation(attention)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": False}
    theirs: dict[int, dict] = {}
    if own_calls:
        with ExitStack() as stack:
            for i, block in enumerate(blocks(base)):
                keep = lambda _, args, kwargs, i=i: theirs.__setitem__(i, kwargs)  # noqa: E731
                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            with torch.no_grad():
                base(**given)
    pre, tuning, seen = [], [], []

    def hook(layer):
        def run(_, args, kwargs, out):
            x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            other = {k: v for k, v in theirs.get(layer, kwargs).items() if k != "hidden_states"}
            y, o = first(blocks(base)[layer](x, *rest, **other)), first(out)
            pre.append(y - x), tuning.append(o - y), seen.append(x)
            if alphas is None:
                seen.append(o)
                return None
            new = x + (y - x) + alphas[layer] * (o - y)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return run

    with ExitStack() as stack:
        for i, block in enumerate(blocks(tuned)):
            stack.callback(block.register_forward_hook(hook(i), with_kwargs=True).remove)
        with torch.no_grad():
            logits = tuned(**given).logits
    return {"pre": pre, "tuning": tuning, "x_0": seen[0], "x_L": seen[-1], "logits": logits}


def tuco_of(found, order=1):
    a, b = (sum(found[k])[:, -1].norm(order, dim=-1) for k in ("pre", "tuning"))
    return b / (a + b)


def measured(pair, rows=ROWS, norm="l1", **settings):
    batch = pair.tuned.batch(rows)
    found = contribution_norms(pair, batch, batch.lengths - 1, norm, **settings)
    return share(found["tuning_sum"][:, -1], found["pre_sum"][:, -1]).float(), found


def pair_of(kind, seeds=(0, 1)):
    return ModelPair(*(HookedModel.load(tiny(kind, seed)) for seed in seeds))


# -------------------------------------------------------------------------------- the decomposition


@pytest.mark.parametrize("kind", FOUR)
def test_it_is_what_hooks_on_two_plain_models_give(kind) -> None:
    base, tuned = tiny(kind, 0), tiny(kind, 1)
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    want = twin(base, tuned, ROWS)
    for norm, order in (("l1", 1), ("l2", 2)):
        got, found = measured(pair, norm=norm)
        torch.testing.assert_close(got, tuco_of(want, order), **SIZES)
        for name in ("pre", "tuning"):
            each = torch.stack([x[:, -1].norm(order, dim=-1) for x in want[name]], 1)
            torch.testing.assert_close(found[f"{name}_layer"].float(), each, **SIZES)
            sums = torch.stack(want[name]).cumsum(0)
            torch.testing.assert_close(found[f"{name}_sum"].float(), sums[:, :, -1].norm(order, dim=-1).T, **SIZES)
            for row, ids in enumerate(ROWS):
                whole = sums[:, row, -len(ids) :].flatten(1).norm(order, dim=1)
                torch.testing.assert_close(found[f"{name}_whole"][row].float(), whole, **SIZES)
                token = sums[-1, row, -len(ids) :].norm(order, dim=-1)
                torch.testing.assert_close(found[f"{name}_token"][row, : len(ids)].float(), token, **SIZES)
                assert found[f"{name}_token"][row, len(ids) :].isnan().all()
        torch.testing.assert_close(found["final"], want["x_L"][:, -1], atol=32 * EPS * float(want["x_L"].abs().max()), rtol=0)
        assert float(found["closure"].max()) < 1e-6


@pytest.mark.parametrize("kind", FOUR)
def test_a_batch_gives_what_prompts_alone_and_parts_of_it_give(kind) -> None:
    pair = pair_of(kind)
    together, whole = measured(pair)
    alone = [measured(pair, [row]) for row in ROWS]
    torch.testing.assert_close(together, torch.cat([x for x, _ in alone]), **SIZES)
    pair.tuned._budget.size = 1  # one prompt per pass
    apart, found = measured(pair)
    torch.testing.assert_close(apart, together, **SIZES)
    for name, x in whole.items():
        torch.testing.assert_close(found[name], x, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", FOUR)
def test_sdpa_in_plain_models_is_within_1e5(kind) -> None:
    got = measured(pair_of(kind))[0]
    torch.testing.assert_close(got, tuco_of(twin(tiny(kind, 0), tiny(kind, 1), ROWS, attention="sdpa")), atol=1e-5, rtol=0)


OTHERS = {
    "gptj": lambda: transformers.GPTJConfig(vocab_size=31, n_embd=24, n_layer=3, n_head=4, rotary_dim=4, n_positions=19, eos_token_id=2),
    "bloom": lambda: transformers.BloomConfig(vocab_size=31, hidden_size=24, n_layer=3, n_head=4),
    "mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=3),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_blocks_that_return_more_and_masks_of_their_own(kind, tmp_path) -> None:
    base, tuned = (randomised(transformers.AutoModelForCausalLM.from_config(OTHERS[kind]()), seed) for seed in (0, 1))
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    want = torch.cat([tuco_of(twin(base, tuned, [row])) for row in ROWS])
    torch.testing.assert_close(measured(pair)[0], want, **SIZES)
    stored = ModelPair.load(*(saved(m, tmp_path / name) for m, name in ((base, "base"), (tuned, "tuned"))))
    torch.testing.assert_close(measured(stored, stream=True)[0], want, **SIZES)
    logits = pair.tuned.logits(ROWS)
    torch.testing.assert_close(pair.scaled(1).logits(ROWS), logits, atol=8 * EPS * float(logits.abs().max()), rtol=0)
    half = pair.scaled(0.5)
    new = half.generate(ROWS[:1], 4, stop=())[0]
    assert half.logits([[*ROWS[0], *new]])[0, len(ROWS[0]) - 1 : -1].argmax(-1).tolist() == new


@pytest.mark.parametrize("kind", FOUR)
def test_known_values(kind) -> None:
    model = tiny(kind, 0)
    same = ModelPair(*(HookedModel.load(model) for _ in range(2)))
    got, found = measured(same)
    assert not got.any() and not found["tuning_token"].nan_to_num(0.0).any()  # exactly 0
    one = HookedModel.load(model)
    assert not measured(ModelPair(one, one))[0].any()  # the very same object on both sides
    pair = pair_of(kind)
    found = measured(pair)[1]
    swapped = share(found["pre_sum"], found["tuning_sum"])
    torch.testing.assert_close(swapped, 1 - share(found["tuning_sum"], found["pre_sum"]))
    silent = tiny(kind, 0)
    with torch.no_grad():
        for layer in range(3):
            _, _, out, _, down = _parts(silent, layer)
            for p in (*out.parameters(), *down.parameters()):
                p.zero_()
    assert bool((measured(ModelPair(HookedModel.load(silent), HookedModel.load(tiny(kind, 1))))[0] == 1).all())


@pytest.mark.parametrize("kind", ("gpt2", "llama"))
def test_other_quantities_are_told_apart(kind) -> None:
    base, tuned = tiny(kind, 0), tiny(kind, 1)
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    got, found = measured(pair)
    batch = pair.tuned.batch(ROWS)
    site = [f"L{layer}.{c}" for layer in range(3) for c in ("resid_pre", "resid_post")]
    own = pair.base.capture(batch, site)
    rows, last = torch.arange(len(ROWS)), batch.lengths - 1
    mine = {str(s): x[rows, last] for s, x in own.items()}
    total = found["final"] - pair.tuned.capture(batch, ["L0.resid_pre"]).popitem()[1][rows, last]
    a = mine["L2.resid_post"] - mine["L0.resid_pre"]
    elsewhere = share(norm_of(total - a, "l1"), norm_of(a, "l1"))
    ((part, parts),) = block_parts(pair, batch, last)
    b = sum(p.attention + p.mlp for p in parts)
    a = sum(p.pre + p.mlp_through for p in parts)
    sublayers = torch.empty(len(ROWS), dtype=torch.float64).index_copy_(0, part.rows, share(norm_of(b, "l1"), norm_of(a, "l1")))
    per_layer = share(found["tuning_layer"].sum(1), found["pre_layer"].sum(1))
    begin = share(found["tuning_token"][:, 0], found["pre_token"][:, 0])
    for wrong in (elsewhere, sublayers, per_layer, begin, measured(pair, norm="l2")[0]):
        assert float((wrong - got).abs().max()) > 1e-3


# --------------------------------------------------------------------------------- hand calculation


def tally_of(pre, tuning, x_0):
    tally, x = _Tally(Part.of(Batch.of([[1]])), torch.tensor([0]), "l1"), x_0
    for layer, (p, q) in enumerate(zip(pre, tuning, strict=True)):
        tally.add(Step.of(layer, x, x + p + q, x + p))
        x = x + p + q
    found = tally.found()
    return found, {k: share(found[f"tuning_{k}"], found[f"pre_{k}"])[0].tolist() for k in ("sum", "whole")}


def test_unit_vectors() -> None:
    h = torch.tensor([[[2.0, -4.0, 6.0]]])
    nothing = torch.zeros_like(h)
    found, shares = tally_of([nothing, nothing, h, -h / 2], [h, -h / 2, nothing, nothing], torch.ones_like(h))
    # Sums: FTC h, h/2, h/2, h/2; PTC 0, 0, h, h/2.
    assert shares["whole"] == pytest.approx([1, 1, 1 / 3, 1 / 2]) and shares["sum"][-1] == pytest.approx(0.5)
    assert float(found["closure"]) < 1e-6
    # Base adds h, then the stream; tuned adds 2h, then nothing. Both end at 2h, with TuCo (|-h|) / (|3h| + |-h|) = 1/4.
    x, pre, tuning = nothing, [], []
    for of_base, of_tuned in ((lambda x: h, lambda x: 2 * h), (lambda x: x, lambda x: nothing)):
        pre.append(of_base(x)), tuning.append(of_tuned(x) - of_base(x))
        x = x + of_tuned(x)
    assert torch.equal(pre[1], 2 * h) and torch.equal(tuning[0], h) and torch.equal(tuning[1], -2 * h)
    found, shares = tally_of(pre, tuning, nothing)
    assert shares["sum"][-1] == pytest.approx(0.25) and torch.equal(found["final"], 2 * h[0])
    assert float(share(norm_of(2 * h - 2 * h, "l1"), norm_of(2 * h, "l1"))) == 0  # OutputCo
    assert float(share(torch.tensor(0.0), torch.tensor(0.0))) == 0  # where both vanish


def test_closure_can_fail() -> None:
    tally, x = _Tally(Part.of(Batch.of([[1]])), torch.tensor([0]), "l1"), torch.ones(1, 1, 3)
    tally.add(Step.of(0, x, 2 * x, x))
    tally.add(Step.of(1, 3 * x, 4 * x, 3 * x))  # something was added between the blocks
    assert float(tally.found()["closure"]) == pytest.approx(0.25)


# ------------------------------------------------------------------------------- adapters and disks


@pytest.mark.parametrize("kind", FOUR)
def test_an_adapter_is_the_same_weights_with_it_off(kind, tmp_path) -> None:
    folder = saved(tiny(kind), tmp_path / "base")
    peft_model = adapted(kind, tmp_path / "adapter")
    pair = ModelPair.load(folder, tmp_path / "adapter")
    shared = {p.data_ptr() for p in pair.base.wrapped.source.parameters()} & {p.data_ptr() for p in pair.tuned.wrapped.source.parameters()}
    assert shared
    got = measured(pair)[0]
    want = []
    for row in ROWS:  # every block of the unmerged model runs again with its adapter off
        inner, sums = peft_model.get_base_model(), {"pre": [], "tuning": []}
        off = [False]

        def hook(module, args, kwargs, out, sums=sums, off=off):
            if off[0]:
                return
            off[0] = True
            with peft_model.disable_adapter():
                y = first(module(*args, **kwargs))
            off[0] = False
            x = args[0] if args else kwargs["hidden_states"]
            sums["pre"].append(y - x), sums["tuning"].append(first(out) - y)

        with ExitStack() as stack, torch.no_grad():
            for block in blocks(inner):
                stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
            inner(torch.tensor([row]), use_cache=False)
        want.append(tuco_of(sums))
    torch.testing.assert_close(got, torch.cat(want), **SIZES)
    merged = saved(pair.tuned.wrapped.source, tmp_path / "merged")
    torch.testing.assert_close(measured(ModelPair.load(folder, merged))[0], got, atol=1e-6, rtol=0)
    torch.testing.assert_close(measured(pair, stream=True)[0], got, atol=1e-6, rtol=0)
    adapted(kind, tmp_path / "zero", scale=0.0)
    assert not measured(ModelPair.load(folder, tmp_path / "zero"))[0].any()


@pytest.mark.parametrize("kind", FOUR)
def test_streamed_from_disk_it_is_the_same(kind, tmp_path) -> None:
    places = [saved(tiny(kind, seed), tmp_path / str(seed), max_shard_size="8KB") for seed in (0, 1)]
    pair = ModelPair.load(*places, load="one at a time")
    got, found = measured(pair, stream=True)
    assert not pair.base.loaded
    whole = ModelPair.load(*places)
    want, all_of_it = measured(whole)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    for name, x in found.items():
        torch.testing.assert_close(x, all_of_it[name], atol=1e-5, rtol=1e-5, equal_nan=True)
    stored = StoredBlocks(pair.base, pair.tuned.wrapped)
    held = lambda: sum(p.untyped_storage().nbytes() for m in stored.modules for p in m.parameters())  # noqa: E731
    empty = held()
    with stored.holding(1):
        own = {id(p): p for p in stored.modules[1].parameters()}
        assert held() > 1000 and all(p.untyped_storage().nbytes() == p.numel() * 4 for p in own.values())
    assert held() == empty <= 4 * sum(1 for m in stored.modules for _ in m.parameters())


def test_streaming_in_groups_gives_every_prompt_its_row(tmp_path, monkeypatch) -> None:
    places = [saved(tiny("llama", seed), tmp_path / str(seed)) for seed in (0, 1)]
    pair = ModelPair.load(*places)
    want = measured(pair)[0]
    monkeypatch.setattr("interp.models.contribution.free_bytes", lambda device: 1)
    pair.tuned._budget.size = 1
    torch.testing.assert_close(measured(pair, stream=True)[0], want, **SIZES)


# --------------------------------------------------------------------------------- unlike settings


def test_base_has_rotary_tables_of_its_own() -> None:
    rope = {"rope_type": "default", "rope_theta": 50.0}
    base, tuned = tiny("llama", 0, rope_parameters=rope), tiny("llama", 1)
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    assert any("rotary" in note for note in pair.notes)
    got = measured(pair)[0]
    torch.testing.assert_close(got, tuco_of(twin(base, tuned, ROWS, own_calls=True)), **SIZES)
    assert float((got - tuco_of(twin(base, tuned, ROWS))).abs().max()) > 1e-4


def test_refusals(tmp_path) -> None:
    pair = pair_of("llama")
    batch = pair.tuned.batch(ROWS)
    begin = lambda part: _Tally(part, batch.lengths - 1, "l1")  # noqa: E731
    with pytest.raises(InputError, match="cannot be streamed"):
        list(contributions(pair, batch, begin, stream=True))
    with pair.base.patched({"L0.resid_post": torch.zeros(24)}):
        pair.base.logits(batch)
        with pytest.raises(InputError, match="activations of base are being changed"):
            list(contributions(pair, batch, begin))
    with pytest.raises(InputError, match="prompt 0 has 20 tokens; the models take at most 19"):
        list(contributions(pair, Batch.of([[1] * 20]), begin))
    with pytest.raises(InputError, match="norm is 'l3'"):
        contribution_norms(pair, batch, batch.lengths - 1, "l3")
    places = [saved(tiny("llama", seed), tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(InputError, match="one at a time"):
        list(contributions(ModelPair.load(*places, load="one at a time"), batch, begin))


def test_models_are_left_as_they_came_also_by_an_exception() -> None:
    pair = pair_of("gpt2")
    batch = pair.tuned.batch(ROWS)
    before = [m.logits(batch) for m in (pair.base, pair.tuned)]

    class Failing:
        def add(self, step: Step) -> None:
            if step.layer == 1:
                raise KeyError("on purpose")

    with pytest.raises(KeyError):
        list(contributions(pair, batch, lambda part: Failing()))
    for model, logits in zip((pair.base, pair.tuned), before, strict=True):
        assert not any("forward" in b.__dict__ for b in model.wrapped.bridge.blocks)
        assert torch.equal(model.logits(batch), logits)


def test_blocks_that_hand_on_more_than_the_stream_are_refused() -> None:
    pair, runs = pair_of("llama"), []

    def beside(module, args, out):
        runs.append(args)
        return out + len(runs)  # something that is not in the stream goes in

    pair.tuned.wrapped.bridge.blocks[2].original_component.register_forward_hook(beside)
    with pytest.raises(InputError, match="hand on more than the stream"):
        measured(pair)


# ---------------------------------------------------------------------------------- parts of blocks


@pytest.mark.parametrize("kind", FOUR)
def test_parts_are_what_the_submodules_give_and_sum_to_the_block(kind) -> None:
    base, tuned = tiny(kind, 0), tiny(kind, 1)
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    row = ROWS[2]
    batch = pair.tuned.batch([row])
    at = torch.tensor([4])
    ((_, parts),) = block_parts(pair, batch, at)
    streams, kwargs_of = {}, {}

    def note(i):
        def before(_, args, kwargs):
            streams[i] = args[0] if args else kwargs["hidden_states"]
            kwargs_of[i] = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}

        return before

    with ExitStack() as stack, torch.no_grad():
        for i, block in enumerate(blocks(tuned)):
            stack.callback(block.register_forward_pre_hook(note(i), with_kwargs=True).remove)
        tuned(torch.tensor([row]), use_cache=False)

    def run(hf, layer, replace=None):
        """attn_out, mlp_out, z of a block on the tuned model's stream."""
        found = {}
        _, attention, out, mlp, _ = _parts(hf, layer)
        with ExitStack() as stack, torch.no_grad():
            if replace is not None:
                _after(stack, attention, lambda x: x.copy_(replace))
            stack.callback(attention.register_forward_hook(lambda _, a, o: found.__setitem__("attn", first(o))).remove)
            stack.callback(mlp.register_forward_hook(lambda _, a, o: found.__setitem__("mlp", first(o))).remove)
            stack.callback(out.register_forward_pre_hook(lambda _, a: found.__setitem__("z", a[0])).remove)
            args, kwargs = kwargs_of[layer]
            found["out"] = first(blocks(hf)[layer](streams[layer], *args, **kwargs))
        return {k: v[0, 4] for k, v in found.items()} | {"whole": found["attn"]}

    for layer, p in enumerate(parts):
        own, old = run(tuned, layer), run(base, layer)
        between = run(base, layer, own["whole"])["mlp"]
        near = {"atol": 2e-5, "rtol": 0}
        torch.testing.assert_close(p.tuning[0], own["out"] - old["out"], **near)
        torch.testing.assert_close(p.pre[0], old["out"] - streams[layer][0, 4], **near)
        torch.testing.assert_close(p.attention[0], own["attn"] - old["attn"], **near)
        torch.testing.assert_close(p.mlp[0], own["mlp"] - between, **near)
        torch.testing.assert_close(p.mlp_through[0], between - old["mlp"], **near)
        torch.testing.assert_close(p.attention + p.mlp + p.mlp_through, p.tuning, **near)
        for head in range(4):
            each = []
            for hf, run_of in ((tuned, own), (base, old)):
                only, out = torch.zeros_like(run_of["z"]), _parts(hf, layer)[2]
                width = len(only) // 4
                only[head * width : (head + 1) * width] = run_of["z"][head * width : (head + 1) * width]
                each.append(out(only[None])[0] - out(torch.zeros_like(only)[None])[0])
            torch.testing.assert_close(p.heads[0, head], each[0] - each[1], **near)
        if kind == "neox":
            assert not p.mlp_through.any()
