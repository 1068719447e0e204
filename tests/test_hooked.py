"""The verbs of a model against plain Hugging Face with hand-written hooks, on four architectures."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tiny_checkpoints import FOUR, tiny

from interp.edits import ActivationChange, Edit, WeightChange
from interp.errors import InputError
from interp.models import Batch, HookedModel
from interp.models.validate import logit_difference, validate
from interp.sites import Site

ROWS = [[3, 9, 4, 1, 5], [2, 7], [6, 5, 3, 5, 8, 9, 7], [11, 4, 30, 20, 2, 8]]
EPS = torch.finfo(torch.float32).eps


def batch():
    return Batch.of(ROWS, {"mid": tuple((len(r) // 2,) for r in ROWS)})


@pytest.fixture(scope="module", autouse=True)
def _softmax_in_fp64():
    """Hugging Face takes the softmax in fp32 even in fp64 models; lifted here, so that everything can be compared at 1e-12."""
    real = torch.nn.functional.softmax

    def softmax(x, dim=None, dtype=None, **more):
        return real(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.nn.functional, "softmax", softmax)
    yield
    patch.undo()


@pytest.fixture(scope="module", params=FOUR)
def both(request):
    """(kind, plain fp64 model on eager attention, the same wrapped)."""
    plain = tiny(request.param).double()
    plain.set_attn_implementation("eager")
    return request.param, plain, HookedModel.load(plain)


def layers(plain):
    base = plain.base_model
    return base.h if hasattr(base, "h") else base.layers


def attention(block):
    return getattr(block, "attn", None) or getattr(block, "self_attn", None) or block.attention


def out_projection(block):
    a = attention(block)
    return next(getattr(a, n) for n in ("c_proj", "o_proj", "dense") if hasattr(a, n))


def down_projection(block):
    return next(getattr(block.mlp, n) for n in ("c_proj", "down_proj", "dense_4h_to_h") if hasattr(block.mlp, n))


def plain_run(plain, row, hooks=()):
    """Logits of one unpadded prompt with hand-written hooks [(module, 'in' | 'out', fn)]."""
    handles = []
    for module, side, fn in hooks:
        if side == "in":
            handles.append(module.register_forward_pre_hook(lambda m, args, fn=fn: (fn(args[0]), *args[1:])))
        else:

            def hook(m, args, out, fn=fn):
                return (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out)

            handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            return plain(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    finally:
        for h in handles:
            h.remove()


def plain_sites(plain, kind, layer):
    """Where each component is in the plain model: component -> (module, side)."""
    block = layers(plain)[layer]
    where = {
        "resid_pre": (block, "in"),
        "resid_post": (block, "out"),
        "attn_out": (attention(block), "out"),
        "mlp_out": (block.mlp, "out"),
        "z": (out_projection(block), "in"),
        "mlp_post": (down_projection(block), "in"),
    }
    if kind in ("llama", "qwen2"):
        where |= {c: (getattr(attention(block), f"{c}_proj"), "out") for c in "qkv"}
    return where


def test_logits_are_plain_hugging_face(both):
    _, plain, model = both
    got = model.logits(batch())
    for i, row in enumerate(ROWS):
        want = plain_run(plain, row)
        assert (got[i, : len(row)] - want).abs().max() <= 1e-12
        assert not got[i, len(row) :].any()


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_other_precisions(kind, dtype):
    model = HookedModel.load(tiny(kind).to(dtype))
    difference, tolerance = logit_difference(model)
    assert difference <= tolerance and model.dtype == dtype


def test_a_model_that_makes_much_of_its_rounding_is_not_refused():
    """Attention so sharp that plain Hugging Face is far from itself when the last place of a number moves."""
    source = tiny("gpt2", seed=2)
    with torch.no_grad():
        for name, p in source.named_parameters():
            if "c_attn.weight" in name:
                p.mul_(16)
    difference, tolerance = logit_difference(HookedModel.load(source))  # would be refused at 8 eps of the largest logit
    assert 0 < difference <= tolerance and tolerance > 8 * EPS * source(torch.tensor([[3, 10, 17]])).logits.abs().max()


@pytest.mark.parametrize("kind", FOUR)
def test_unequal_prompts_in_fp32(kind):
    model = HookedModel.load(tiny(kind))
    together = model.logits(batch())
    for i, row in enumerate(ROWS):
        alone = model.logits([row])[0]
        assert (together[i, : len(row)] - alone).abs().max() <= 8 * EPS * alone.abs().max()


def test_logits_at_a_position(both):
    _, _, model = both
    whole = model.logits(batch())
    for at in ("END", "mid", 1, -2):
        got = model.logits(batch(), at=at)
        assert torch.allclose(got, whole[torch.arange(4), batch().index(at)], atol=1e-12, rtol=0)


def test_capture_equals_hand_written_hooks(both):
    kind, plain, model = both
    for layer in range(3):
        for component, (module, side) in plain_sites(plain, kind, layer).items():
            site = Site(component, layer)
            got = model.capture(batch(), site)[site]
            for i, row in enumerate(ROWS):
                seen = []
                plain_run(plain, row, [(module, side, lambda x, seen=seen: seen.append(x.clone()) or x)])
                want = seen[0][0].reshape(len(row), *got.shape[2:])
                assert (got[i, : len(row)] - want).abs().max() <= 1e-12, site
                assert not got[i, len(row) :].any()


def test_patterns_equal_hugging_face_and_positions_select(both):
    _, plain, model = both
    whole = model.capture(batch(), ["L1.pattern", "L1H3.pattern@END", "L1H2.z@mid", "L1.z", "L1H2.pattern", "L1.pattern@END"])
    for i, row in enumerate(ROWS):
        n = len(row)
        with torch.no_grad():
            want = plain(input_ids=torch.tensor([row]), output_attentions=True, use_cache=False).attentions[1][0]
        got = whole[Site("pattern", 1)][i]
        assert (got[:, :n, :n] - want).abs().max() <= 1e-12
        assert torch.equal(whole[Site("pattern", 1, 3, "END")][i], got[3, n - 1])
        assert torch.equal(whole[Site("pattern", 1, 2)][i], got[2])
        assert torch.equal(whole[Site("pattern", 1, None, "END")][i], got[:, n - 1])
        assert torch.equal(whole[Site("z", 1, 2, "mid")][i], whole[Site("z", 1)][i, n // 2, 2])


@pytest.mark.parametrize("at", [None, "END", "mid"])
def test_patches_equal_hand_written_hooks(both, at):
    kind, plain, model = both
    draws = torch.Generator().manual_seed(1)
    for component, (module, side) in plain_sites(plain, kind, 1).items():
        site = Site(component, 1, None, at)
        now = model.capture(batch(), site)[site]
        value = torch.randn(now.shape, generator=draws, dtype=now.dtype)
        with model.patched({site: value}) as ledger:
            got = model.logits(batch())
        assert ledger.entries[0].fired == 1
        for i, row in enumerate(ROWS):

            def put(x, i=i, row=row, value=value):
                x = x.clone()
                where = slice(None) if at is None else batch().at(at)[i][0]
                x[0, where] = (value[i, : len(row)] if at is None else value[i]).reshape(x[0, where].shape)
                return x

            want = plain_run(plain, row, [(module, side, put)])
            assert (got[i, : len(row)] - want).abs().max() <= 1e-11, site


def output_matrix(plain, layer):
    """W_O, [head, d_head, d_model]."""
    weight = out_projection(layers(plain)[layer]).weight.detach()
    return (weight if hasattr(plain, "transformer") else weight.T).reshape(
        4, -1, weight.shape[0] if not hasattr(plain, "transformer") else 24
    )


def test_what_heads_add(both):
    """z of a head times its W_O; all of them and b_O are what attention adds."""
    _, plain, model = both
    found = model.capture(batch(), ["L1.z", "L1.attn_out", "L1.result", "L1H2.result@END", "L1.result@mid", "L1H3.result"])
    z, out, results = (found[Site(c, 1)] for c in ("z", "attn_out", "result"))
    want = torch.stack([z[:, :, h] @ output_matrix(plain, 1)[h] for h in range(4)], 2)
    assert (results - want).abs().max() <= 1e-12
    bias = getattr(out_projection(layers(plain)[1]), "bias", None)
    together = (results.sum(2) + (0 if bias is None else bias)) * batch().mask[..., None]
    assert (together - out).abs().max() <= 1e-12
    for i, row in enumerate(ROWS):
        assert torch.equal(found[Site("result", 1, 2, "END")][i], results[i, len(row) - 1, 2])
        assert torch.equal(found[Site("result", 1, None, "mid")][i], results[i, len(row) // 2])
        assert torch.equal(found[Site("result", 1, 3)][i], results[i, :, 3])
    sites = ["L1.result", "L0H2.result", "L2H1.result@END", "L1.result@mid"]
    held = model.capture(Batch.of([ROWS[0]], {"mid": ((2,),)}), sites)
    assert model.capture_bytes(Batch.of([ROWS[0]], {"mid": ((2,),)}), sites) == sum(t.numel() * t.element_size() for t in held.values())


@pytest.mark.parametrize(
    "sites", [["L1H2.result"], ["L1H0.result@END", "L1H3.result@mid", "L2H1.result"], ["L0.result"], ["L2.result@END"]]
)
def test_what_heads_add_is_set_by_hand(both, sites):
    """The head's own contribution is taken out of what attention adds, and the value put in."""
    _, plain, model = both
    draws = torch.Generator().manual_seed(2)
    sites = [Site.parse(s) for s in sites]
    now = model.capture(batch(), sites)
    values = {s: torch.randn(now[s].shape, generator=draws, dtype=torch.float64) for s in sites}
    with model.patched(values) as ledger:
        got, seen = model.logits(batch()), model.capture(batch(), sites)
    assert [e.fired for e in ledger.entries] == [2] * len(sites)
    for i, row in enumerate(ROWS):
        hooks = []
        for layer in {s.layer for s in sites}:
            z = []
            hooks.append((out_projection(layers(plain)[layer]), "in", lambda x, z=z: (z.append(x[0].reshape(len(x[0]), 4, -1)), x)[1]))

            def add(x, i=i, row=row, layer=layer, z=z):
                x = x.clone()
                for s in (s for s in sites if s.layer == layer):
                    for h in range(4) if s.head is None else [s.head]:
                        where = range(len(row)) if s.position is None else batch().at(s.position)[i]
                        for at in where:
                            v = values[s][i]
                            v = v[at] if s.position is None else v
                            x[0, at] += (v[h] if s.head is None else v) - z[0][at, h] @ output_matrix(plain, layer)[h]
                return x

            hooks.append((attention(layers(plain)[layer]), "out", add))
        assert (got[i, : len(row)] - plain_run(plain, row, hooks)).abs().max() <= 1e-11
    for s in sites:
        mask = batch().mask.reshape(4, -1, *[1] * (seen[s].ndim - 2)) if s.position is None else True
        assert ((seen[s] - values[s]) * mask).abs().max() == 0


def test_what_heads_add_follows_edits_and_z_whenever_that_is_set(both):
    _, _, model = both
    d = model.shape.d_head
    ones = {"L1H2.z@END": torch.ones(d, dtype=torch.float64)}
    delta = torch.randn(d, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    site = Site("result", 1, 2, "END")
    with model.edited(Edit((WeightChange(Site("W_O", 1, 2), delta),))), model.patched(ones):
        got, weight = model.capture(batch(), site)[site], model.weight("L1H2.W_O")
        assert (got - weight.sum(0)).abs().max() <= 1e-12
    assert (model.weight("L1H2.W_O") - weight + delta).abs().max() <= 1e-12
    value = {"L1H2.result@END": torch.linspace(-1, 1, 24, dtype=torch.float64)}
    with model.patched(value):
        want = model.logits(batch())
    for order in ({**value, **ones}, {**ones, **value}):
        with model.patched(order):
            assert (model.logits(batch()) - want).abs().max() <= 1e-12
    with model.edited(Edit((ActivationChange(site, "scale", torch.tensor(0.0)),))):
        scaled = model.logits(batch())
    with model.patched({site: torch.zeros(())}):
        assert (model.logits(batch()) - scaled).abs().max() <= 1e-12


def test_the_gradient_by_what_a_head_adds_is_that_by_what_attention_adds(both):
    _, _, model = both

    def loss(logits):
        return (logits[:, -1].softmax(-1)[:, :5] * torch.arange(5)).sum()

    rows = [ROWS[0], ROWS[2][:5]]
    alone = model.gradients(rows, loss, ["L1.attn_out", "L1.z"])
    got = model.gradients(rows, loss, ["L1.result", "L1.attn_out", "L1H2.result@END", "L1.z"])
    for h in range(4):
        assert (got[Site("result", 1)][:, :, h] - alone[Site("attn_out", 1)]).abs().max() <= 1e-12
    assert torch.equal(got[Site("result", 1, 2, "END")], got[Site("result", 1)][:, -1, 2])
    assert (got[Site("z", 1)] - alone[Site("z", 1)]).abs().max() <= 1e-12


def test_heads_without_a_result_of_their_own_are_refused():
    """A norm behind W_O: what one head adds depends on the others."""
    import transformers
    from tiny_checkpoints import GQA, randomised

    for name, more in (("Gemma2", {"head_dim": 8}), ("Granite", {"residual_multiplier": 0.3})):
        config = getattr(transformers, f"{name}Config")(bos_token_id=1, eos_token_id=2, pad_token_id=0, **GQA, **more)
        model = HookedModel.load(randomised(transformers.AutoModelForCausalLM.from_config(config), 0))
        for use in (
            lambda m=model: m.capture(batch(), "L1.result"),
            lambda m=model: m.patched({"L1H0.result": torch.zeros(())}).__enter__(),
        ):
            with pytest.raises(
                InputError, match=f"heads of {name}ForCausalLM have no result of their own: .* normed, gated or scaled behind W_O"
            ):
                use()
        assert all(not point.fwd_hooks for point in model.wrapped.bridge.hook_dict.values())
        model.capture(batch(), ["L1.z", "L1.attn_out"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_heads_add_in_other_precisions(dtype):
    for kind in FOUR:
        model = HookedModel.load(tiny(kind).to(dtype))
        whole = model.capture(batch(), "L1.result")[Site("result", 1)]
        assert whole.dtype == dtype
        plain = model.logits(batch())
        with model.patched({"L1.result": whole}):
            assert torch.equal(model.logits(batch()), plain)  # what is there already


def test_one_head_is_patched_alone(both):
    _, plain, model = both
    d = model.shape.d_head
    value = torch.linspace(-1, 1, d, dtype=torch.float64)
    with model.patched({"L2H1.z@END": value}):
        got = model.logits(batch(), at="END")
    for i, row in enumerate(ROWS):

        def put(x):
            x = x.clone()
            x[0, -1, d : 2 * d] = value
            return x

        want = plain_run(plain, row, [(out_projection(layers(plain)[2]), "in", put)])[-1]
        assert (got[i] - want).abs().max() <= 1e-12


def test_resid_mid_is_written_on_the_skip_connection_too(both):
    kind, _, model = both
    if kind == "neox":
        with pytest.raises(InputError, match="no resid_mid"):
            model.capture(batch(), "L1.resid_mid")
        return
    other = Batch.of([[r % 29 + 1 for r in row] for row in ROWS])
    source = model.capture(other, ["L1.resid_mid", "L1.resid_post", "L1.mlp_out"])
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, model.patched({"L1.resid_mid": source[Site("resid_mid", 1)]}):
            got = model.capture(batch(), ["L1.resid_post", "L1.mlp_out", "L1.resid_mid"])
        for site, x in got.items():
            assert (x - source[site]).abs().max() <= 1e-12, site


def test_attention_rows_are_set(both):
    _, _, model = both
    n, p = len(ROWS), 7
    row = torch.zeros(n, p, dtype=torch.float64)
    row[:, 1] = 1
    with model.patched({"L1H2.pattern@END": row}):
        z = model.capture(batch(), "L1H2.z@END")[Site("z", 1, 2, "END")]
    kv = 2 * model.shape.n_kv_heads // model.shape.n_heads
    v = model.capture(batch(), "L1.v")[Site("v", 1)][:, 1, kv]
    assert (z - v).abs().max() <= 1e-12


def test_gradients_are_finite_differences(both):
    kind, _, model = both
    weights = torch.randn(4, 7, 31, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(logits):
        return (torch.tanh(logits) * weights * batch().mask[..., None]).sum()

    names = [
        "embed",
        "L1.resid_pre",
        "L1.resid_post",
        "L1.attn_out",
        "L1.mlp_out",
        "L1.q",
        "L1H1.k",
        "L1.v",
        "L1H3.z@END",
        "L1.pattern",
        "L1.mlp_post",
        "L0.z@mid",
    ]
    if kind != "neox":
        names.append("L1.resid_mid")
    sites = [Site.parse(n) for n in names]
    grads = model.gradients(batch(), loss, sites)
    now = model.capture(batch(), sites)
    # RMSNorm computes in fp32 even in an fp64 model, so its differences need a wide step and cannot be as sharp.
    step, tolerance = (5e-3, 5e-3) if kind in ("llama", "qwen2") else (1e-3, 1e-5)
    for site in sites:
        way = torch.randn(now[site].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.1
        if site.component == "pattern":  # stay below the diagonal and on real tokens
            way = way * (now[site] != 0)
        values = []
        for steps in (1, -1, 2, -2):
            with model.patched({site: now[site] + steps * step * way}):
                values.append(float(loss(model.logits(batch()))))
        numeric = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)
        mask = batch().mask if site.position is None and site.component != "pattern" else None
        analytic = grads[site] * way
        if mask is not None:
            analytic = analytic * mask.reshape(4, 7, *[1] * (analytic.ndim - 2))
        assert abs(float(analytic.sum()) - numeric) <= tolerance * max(1, abs(numeric)), site


def test_run_on_restarts_at_any_layer(both):
    _, _, model = both
    want = model.logits(batch())
    for layer in range(3):
        resid = model.capture(batch(), f"L{layer}.resid_pre")[Site("resid_pre", layer)]
        assert (model.run_on(layer, resid, batch()) - want).abs().max() <= 1e-12
    last = model.capture(batch(), "L2.resid_post")[Site("resid_post", 2)]
    assert (model.run_on(3, last, batch()) - want).abs().max() <= 1e-12
    assert (model.logits(batch()) - want).abs().max() == 0
    with pytest.raises(InputError, match="0 to 3"):
        model.run_on(4, last, batch())


def test_values_of_other_prompts_are_refused(both):
    _, _, model = both
    for shape in ((3, 7, 24), (4, 8, 24), (4, 6, 24)):
        with pytest.raises(InputError, match="does not fit"), model.patched({"L1.resid_post": torch.zeros(shape)}):
            model.logits(batch())


def test_patches_hold_on_the_prompt_while_generating(both):
    _, _, model = both
    value = torch.randn(4, 24, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 3
    with model.patched({"L1.resid_post@END": value}):
        got = model.generate(batch(), 3, stop=())
    for i, row in enumerate(ROWS):
        ids = list(row)
        for _ in range(3):
            one = Batch.of([ids], {"last": ((len(row) - 1,),)})
            with model.patched({"L1.resid_post@last": value[i]}):
                ids.append(int(model.logits(one, at="END").argmax()))
        assert got[i] == ids[len(row) :]
    assert got != model.generate(batch(), 3, stop=())


@pytest.mark.parametrize("kind", FOUR)
def test_generation_is_hugging_faces(kind):
    plain = tiny(kind).double()
    model = HookedModel.load(plain)
    got = model.generate(batch(), 6, stop=())
    for row, new in zip(ROWS, got, strict=True):
        with torch.no_grad():
            want = plain.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert new == want[0, len(row) :].tolist()
    first = got[0][2]
    assert model.generate([ROWS[0]], 6, stop=[first]) == [got[0][: got[0].index(first)]]
    one = model.generate(batch(), 5, temperature=1.0, seed=4, stop=())
    assert (
        one == model.generate(batch(), 5, temperature=1.0, seed=4, stop=()) != model.generate(batch(), 5, temperature=1.0, seed=5, stop=())
    )


def test_edits_in_generation_at_prompt_new_and_all(both):
    _, _, model = both
    value = torch.linspace(-3, 3, 24, dtype=torch.float64)
    row = ROWS[0]

    def slow(at):
        """Every step anew without a cache, adding the vector where the edit says."""
        ids = list(row)
        for _ in range(4):
            add = torch.zeros(1, len(ids), 24, dtype=torch.float64)
            add[:, : len(row)] += value if at in ("prompt", "all") else 0
            add[:, len(row) :] += value if at in ("new", "all") else 0
            now = model.capture([ids], "L1.resid_post")[Site("resid_post", 1)]
            with model.patched({"L1.resid_post": now + add}):
                ids.append(int(model.logits([ids], at="END").argmax()))
        return ids[len(row) :]

    seen = set()
    for at in ("prompt", "new", "all"):
        edit = Edit((ActivationChange(Site("resid_post", 1), "add", value, at),))
        with model.edited(edit):
            got = model.generate([row], 4, stop=())[0]
        assert got == slow(at), at
        seen.add(tuple(got))
    assert len(seen) > 1


WEIGHTS = ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate", "b_Q", "b_O", "ln1", "ln2"]


def test_weight_edits_change_every_weight_they_name_and_nothing_else(both):
    kind, plain, model = both
    clean = model.logits(batch())
    names = [Site(w, 1) for w in WEIGHTS] + [
        Site("W_Q", 2, 3),
        Site("W_K", 2, 2),
        Site("W_O", 0, 1),
        Site("W_E"),
        Site("W_U"),
        Site("ln_final"),
    ]
    done = 0
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    for site in names:
        try:
            weight = model.weight(site).clone()
        except InputError:
            continue
        delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        with model.edited(Edit((WeightChange(site, delta),))):
            assert torch.allclose(model.weight(site), weight + delta, atol=1e-12)
            edited = model.logits(batch())
            assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items()), "the user's tensors were touched"
            state = {k: v.clone() for k, v in HookedModelState(model).items()}
        assert torch.equal(model.logits(batch()), clean), site
        hand = copy.deepcopy(plain)
        hand.load_state_dict(state)
        for i, row in enumerate(ROWS):
            assert (plain_run(hand, row) - edited[i, : len(row)]).abs().max() <= 1e-11, site
        changed = {k for k in state if not torch.equal(state[k], before[k])}
        assert len({plain.state_dict()[k].data_ptr() for k in changed}) == 1, (site, changed)
        assert (edited - clean).abs().max() > 1e-6, site
        done += 1
    assert done >= 12


class HookedModelState(dict):
    """The plain state dict with the edits in force."""

    def __init__(self, model):
        source = model.wrapped.source
        super().__init__({k: model.wrapped.parameter(k).detach() for k, _ in source.named_parameters(remove_duplicate=False)})


def test_edits_nest_and_add(both):
    _, _, model = both
    a = Edit(
        (
            WeightChange(
                Site("W_V", 1),
                torch.randn(24, 1, dtype=torch.float64),
                torch.randn(1, model.weight("L1.W_V").shape[1], dtype=torch.float64),
            ),
        ),
        "a",
    )
    b = Edit(
        (
            WeightChange(Site("W_V", 1, 0), torch.randn(24, model.shape.d_head, dtype=torch.float64)),
            ActivationChange(Site("mlp_out", 0), "scale", torch.tensor(0.5)),
        ),
        "b",
    )
    clean = model.logits(batch())
    with model.edited(a), model.edited(b):
        nested = model.logits(batch())
        assert len(model.active_edits) == 2
    with model.edited(a + b):
        assert torch.allclose(model.logits(batch()), nested, atol=1e-12)
    with model.edited((a + b).scaled(0)):
        assert torch.equal(model.logits(batch()), clean)
    assert torch.equal(model.logits(batch()), clean) and not model.active_edits


def test_a_patch_that_never_fires_is_an_error(both):
    _, _, model = both
    with pytest.raises(InputError, match="never fired"), model.patched({"L1.resid_post": torch.zeros(24)}):
        pass
    with model.patched({"L1.resid_post": model.capture(batch(), "L1.resid_post")[Site("resid_post", 1)]}) as ledger:
        model.logits(batch())
    assert ledger.entries[0].fired == 1 and ledger.change < 1e-12
    with pytest.raises(InputError, match="does not fit"), model.patched({"L1.resid_post": torch.zeros(23)}):
        model.logits(batch())
    with pytest.raises(InputError, match="layers 0 to 2"), model.patched({"L3.resid_post": torch.zeros(24)}):
        pass


def test_nothing_is_left_behind(both):
    """Random sequences of entering and leaving, with exceptions, interrupts and abandoned generators."""
    _, plain, model = both
    clean = model.logits(batch())
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    draws = random.Random(0)
    edit = [
        Edit((WeightChange(Site("W_O", i), torch.ones(32 if model.shape.d_head == 8 else 24, 24, dtype=torch.float64)),)) for i in range(3)
    ]

    def contexts():
        if draws.random() < 0.5:
            return model.patched({Site("resid_post", draws.randrange(3)): torch.ones(24)})
        return model.edited(edit[draws.randrange(3)])

    def abandoned():
        with contexts():
            yield model.logits(batch())
            yield None

    def step(depth):
        try:
            with contexts():
                model.logits(batch())
                if depth and draws.random() < 0.6:
                    step(depth - 1)
                what = draws.random()
                if what < 0.2:
                    raise KeyboardInterrupt
                if what < 0.4:
                    raise RuntimeError
        except (KeyboardInterrupt, RuntimeError):
            pass
        except InputError as e:
            assert "in force" in str(e)

    left = []
    for _ in range(60):
        if draws.random() < 0.3:
            try:
                g = abandoned()
                next(g)
                left.append(g)
            except InputError as e:
                assert "in force" in str(e)
        if left and draws.random() < 0.5:
            left.pop(draws.randrange(len(left))).close()
        step(2)
    for g in left:
        g.close()
    assert torch.equal(model.logits(batch()), clean)
    assert not model._active and not model._edits and not model.wrapped._overrides
    assert all(not p.fwd_hooks and not p._forward_hooks for p in model.wrapped.bridge.hook_dict.values())
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    assert not plain.training


@pytest.mark.parametrize("kind", FOUR)
def test_the_users_object_stays_whole_and_its_updates_are_seen(kind, tmp_path):
    plain = tiny(kind).train()
    calls = []
    handle = layers(plain)[0].register_forward_hook(lambda *a: calls.append(1))
    keys = list(plain.state_dict())
    model = HookedModel.load(plain)
    first = model.logits(batch())
    assert plain.training and list(plain.state_dict()) == keys and not calls
    plain.eval()
    for update in ("in place", "data", "replaced"):
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if "query_key_value" in name or "c_attn" in name or "q_proj" in name:
                    if update == "in place":
                        p.add_(0.05)
                    elif update == "data":
                        p.data = p.data * 1.1
                    else:
                        owner = plain.get_submodule(name.rpartition(".")[0])
                        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(p * 0.9))
        now = model.logits(batch())
        assert (now - first).abs().max() > 1e-5, update
        want = plain_run(plain, ROWS[2])
        assert (now[2] - want).abs().max() <= 1e-5, update
        first = now
    assert calls
    handle.remove()
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(plain_run(again, ROWS[0]), plain_run(plain, ROWS[0]))


def test_a_module_replaced_in_the_users_model_is_seen():
    from peft import LoraConfig, get_peft_model

    plain = tiny("llama")
    model = HookedModel.load(plain)
    before = model.logits(batch())
    get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    after = model.logits(batch())
    assert (after - before).abs().max() > 1e-5
    assert (after[2] - plain_run(plain, ROWS[2])).abs().max() <= 1e-5


def test_memory_that_runs_out_makes_smaller_passes(both, monkeypatch):
    _, _, model = both
    want = model.logits(batch())
    real = model.forward

    def greedy(part, *a, **k):
        if len(part.batch) > 2:
            raise torch.OutOfMemoryError("no more")
        return real(part, *a, **k)

    monkeypatch.setattr(model, "forward", greedy)
    monkeypatch.setattr(model._budget, "size", 2**28)
    assert torch.allclose(model.logits(batch()), want, atol=1e-12)
    assert model._budget.size < 2**28


def test_patches_follow_their_prompts_through_small_passes(both, monkeypatch):
    _, _, model = both
    value = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    with model.patched({"L1.resid_post": value}):
        want = model.logits(batch())
    monkeypatch.setattr(model._budget, "size", 1)
    with model.patched({"L1.resid_post": value}):
        assert torch.allclose(model.logits(batch()), want, atol=1e-12)


def test_validation_says_what_is_guaranteed(both, monkeypatch):
    kind, _, model = both
    found = validate(model)
    missing = {"resid_mid"} if kind == "neox" else set()
    assert {n.split(":")[0] for n in found.not_guaranteed} == missing
    assert len(found.guaranteed) == 12 - len(missing)


def test_wrapping_that_computes_something_else_is_refused(monkeypatch):
    model = HookedModel.load(tiny("llama"))
    from interp.models import wrap

    real = wrap.Wrapped.refresh

    def broken(self):
        real(self)
        self.runner.model.layers[1].mlp.original_component.down_proj  # noqa: B018 - the module is there
        self.override("model.layers.1.mlp.down_proj.weight", self.source.get_parameter("model.layers.1.mlp.down_proj.weight") * 1.01)
        real(self)

    monkeypatch.setattr(wrap.Wrapped, "refresh", broken)
    for _ in range(2):  # and not let through the next time
        with pytest.raises(InputError, match="differ from plain Hugging Face"):
            model.logits(batch())
    with pytest.raises(InputError, match="differ from plain Hugging Face"):
        model.logits(batch())
