"""Attention edits against plain Hugging Face models whose attention weights or masks are changed by hand, one prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import transformers
from plain_hooks import _parts, hooked
from tiny_checkpoints import FOUR, GQA, randomised, tiny
from torch import Tensor, nn

from interp import organisms
from interp.edits import ActivationChange, AttentionChange, Edit, attention_edit
from interp.errors import InputError
from interp.metrics import Metric
from interp.models import Batch, HookedModel
from interp.prompts import PromptPairs, Prompts
from interp.sites import Heads, Site
from interp.sweeps import plain, sweep

ROWS = [[3, 9, 4, 1, 5], [2, 7, 8], [6, 5, 3, 5, 8, 9, 7], [4, 4, 1, 2]]
Q = ((4,), (2,), (3, 5), (3,))  # one token or two
K = ((1, 3), (0,), (2,), (0, 2))
M = ((2,), (1,), (0, 1), (1,))
BATCH = Batch.of(ROWS, {"Q": Q, "K": K, "M": M})
HEADS = 4
Shares = dict[int, float]


def near(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 8 * torch.finfo(torch.float32).eps * want.abs().max()


Row = tuple[int, int | None, Sequence[int], Shares, float]  # layer, head, queries, what the keys get, how far to go


@contextmanager
def rows_set(rows: Sequence[Row]) -> Iterator[None]:
    """Eager attention hands its weights [prompt head query key] to a dropout, which does nothing here; layers take turns."""
    real, turn = nn.functional.dropout, [0]

    def dropout(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim != 4:
            return x
        x, now = x.clone(), turn[0]
        turn[0] += 1
        for layer, head, queries, shares, strength in rows:
            for query in queries if layer == now else ():
                some = slice(None) if head is None else head
                target = torch.zeros_like(x[0, some, query])
                for key, share in shares.items():
                    target[..., key] = share
                x[0, some, query] += strength * (target - x[0, some, query])
        return x

    nn.functional.dropout = dropout
    try:
        yield
    finally:
        nn.functional.dropout = real


def even(keys: Iterable[int]) -> Shares:
    return dict.fromkeys(keys, 1 / len(set(keys)))


@contextmanager
def masked(hf: Any, layer: int, head: int | None, queries: Sequence[int], keys: Sequence[int]) -> Iterator[None]:
    """A plain model in which a layer is handed an attention mask of its own for every head."""

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].expand(-1, HEADS, -1, -1).clone()
        for query in queries:
            for key in keys:
                mask[:, slice(None) if head is None else head, query, key] = -torch.inf
        return args, {**kwargs, "attention_mask": mask}

    handle = _parts(hf, layer)[1].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def by_hand(hf: Any, ids: list[int], contexts: Sequence[AbstractContextManager[None]]) -> Tensor:
    with torch.no_grad(), ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return hf(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.fixture(scope="module", params=FOUR)
def both(request: Any) -> tuple[Any, HookedModel]:
    plain = cast("Any", tiny(request.param, seed=2))
    plain.set_attn_implementation("eager")
    return plain, HookedModel.load(plain)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel.load(tiny("llama", seed=2))


def compare(hf: Any, model: HookedModel, edit: Edit, contexts: Callable[[int], Sequence[AbstractContextManager[None]]]) -> None:
    """The edited model on a padded batch is the plain one with hooks on every prompt; rows before the query are as they were."""
    clean = model.logits(BATCH)
    with model.edited(edit) as ledger:
        got = model.logits(BATCH)
    for i, ids in enumerate(ROWS):
        near(got[i, : len(ids)], by_hand(hf, ids, contexts(i)))
        near(got[i, : min(Q[i])], clean[i, : min(Q[i])])
    assert (got - clean).abs().max() > 1e-3 and ledger.change > 0 and all(e.fired == 1 for e in ledger.entries)
    assert torch.equal(model.logits(BATCH), clean) and not model._active


# ---- against hand-made hooks


def test_rows_that_are_set(both: Any) -> None:
    hf, model = both
    edit = attention_edit("L0H1,L1H0,L2@Q", keys="K")
    places = ((0, 1), (1, 0), (2, None))
    compare(hf, model, edit, lambda i: [rows_set([(layer, h, Q[i], even(K[i]), 1.0) for layer, h in places])])
    with model.edited(edit):
        patterns = model.capture(BATCH, ["L0.pattern", "L1.pattern", "L2.pattern"])
    for i, queries in enumerate(Q):
        for layer, heads in ((0, [1]), (1, [0]), (2, [0, 1, 2, 3])):
            rows = patterns[Site("pattern", layer)][i][heads][:, list(queries)]
            want = torch.zeros(rows.shape[-1])
            want[list(K[i])] = 1 / len(K[i])
            assert torch.equal(rows, want.expand_as(rows)) and torch.allclose(rows.sum(-1), torch.ones(()))


def test_weights_and_parts_of_the_way(both: Any) -> None:
    hf, model = both

    def shares(i: int) -> Shares:
        found = dict.fromkeys({*K[i], *M[i]}, 0.0)
        for keys, weight in ((K[i], 0.75), (M[i], 0.25)):
            for key in keys:
                found[key] += weight / len(keys)
        return found

    edit = attention_edit("L1H2@Q", keys=("K", "M"), weights=(0.75, 0.25))
    compare(hf, model, edit, lambda i: [rows_set([(1, 2, Q[i], shares(i), 1.0)])])
    for strength in (0.5, -1.0):
        compare(hf, model, edit.scaled(strength), lambda i, g=strength: [rows_set([(1, 2, Q[i], shares(i), g)])])
    union = attention_edit("L1H2@Q", keys=["K", "M"])
    compare(hf, model, union, lambda i: [rows_set([(1, 2, Q[i], even({*K[i], *M[i]}), 1.0)])])


def test_blocked_keys_are_masked(both: Any) -> None:
    hf, model = both
    compare(hf, model, attention_edit("L1H2", keys="K", kind="block", query="Q"), lambda i: [masked(hf, 1, 2, Q[i], K[i])])
    edit = attention_edit("L1+; L0H3@Q", keys=("K", "M"), kind="block", query="Q")
    compare(
        hf,
        model,
        edit,
        lambda i: [masked(hf, 0, 3, Q[i], K[i] + M[i]), masked(hf, 1, None, Q[i], K[i] + M[i]), masked(hf, 2, None, Q[i], K[i] + M[i])],
    )
    with model.edited(edit):
        pattern = model.capture(BATCH, "L2.pattern")[Site("pattern", 2)]
    for i, queries in enumerate(Q):
        rows = pattern[i][:, list(queries)]
        assert (rows[..., [*K[i], *M[i]]] == 0).all() and torch.allclose(rows.sum(-1), torch.ones(()))


def test_a_block_where_all_attention_was() -> None:
    """Dividing what is left behind the softmax would be 0 / 0 there."""
    hf: Any = tiny("llama", seed=2)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        hf.model.layers[1].self_attn.q_proj.weight *= 500
    model = HookedModel.load(hf)
    batch = Batch.of(ROWS[2:3])
    top = int(model.capture(batch, "L1H0.pattern@END")[Site("pattern", 1, 0, "END")][0].argmax())
    assert model.capture(batch, "L1H0.pattern@END")[Site("pattern", 1, 0, "END")][0, top] == 1
    with model.edited(attention_edit("L1H0", keys=top, kind="block")):
        got = model.logits(batch)
        row = model.capture(batch, "L1H0.pattern@END")[Site("pattern", 1, 0, "END")][0]
    assert float(row.sum()) == pytest.approx(1) and row[top] == 0
    near(got[0], by_hand(hf, ROWS[2], [masked(hf, 1, 0, [6], [top])]))


@pytest.mark.parametrize("at", ["prompt", "new", "all"])
@pytest.mark.parametrize("kind", ["set", "block"])
def test_generated_tokens(both: Any, kind: Any, at: Any) -> None:
    """Token by token, the whole text run again in a plain model whose rows are changed."""
    hf, model = both
    edit = attention_edit("L0H1,L1,L2H3@Q", keys=("K", "M"), kind=kind, at=at)
    with model.edited(edit):
        got = model.generate(BATCH, 4)
    for i, prompt in enumerate(ROWS):
        ids, keys = list(prompt), sorted({*K[i], *M[i]})
        for _ in range(4):
            rows = [*(Q[i] if at != "new" else ()), *(range(len(prompt), len(ids)) if at != "prompt" else ())]
            places = ((0, 1), (1, None), (2, 3))
            if kind == "set":
                made = [rows_set([(layer, h, rows, even(keys), 1.0) for layer, h in places])]
            else:
                made = [masked(hf, layer, h, rows, keys) for layer, h in places]
            ids.append(int(by_hand(hf, ids, made)[-1].argmax()))
            if ids[-1] == 2:  # the end
                break
        want = ids[len(prompt) :]
        assert got[i] == [t for t in want if t != 2], (i, kind, at)


def test_generation_that_forgets_the_prompt_is_refused() -> None:
    config = transformers.Gemma2Config(bos_token_id=1, eos_token_id=2, pad_token_id=0, head_dim=8, sliding_window=4, **cast("Any", GQA))
    model = HookedModel.load(randomised(transformers.AutoModelForCausalLM.from_config(config), 2))
    kinds = config.layer_types
    assert kinds is not None and set(kinds) == {"sliding_attention", "full_attention"}
    slides, whole = kinds.index("sliding_attention"), kinds.index("full_attention")
    with (
        pytest.raises(InputError, match=f"layer {slides} keeps a sliding window of the prompt while it generates"),
        model.edited(attention_edit(f"L{slides}", keys=0, at="all")),
    ):
        pass
    for at, layer in (("prompt", slides), ("all", whole)):
        with model.edited(attention_edit(f"L{layer}", keys=0, at=cast("Any", at))):
            model.generate(BATCH, 2)
    batch = Batch.of(ROWS[2:3])
    with (  # tokens 3 to 6 are all that END sees in a window of four
        pytest.raises(InputError, match="every key of a row would be blocked"),
        model.edited(attention_edit(f"L{slides}", keys=(3, 4, 5, 6), kind="block")),
    ):
        model.logits(batch)


# ---- what it does not touch


def test_nothing_changes_where_nothing_is_asked(llama: HookedModel) -> None:
    clean = llama.logits(BATCH)
    for kind in ("set", "block"):
        edit = attention_edit("L0+@Q", keys="K", kind=cast("Any", kind))
        with llama.edited(edit.scaled(0)) as ledger:
            assert torch.equal(llama.logits(BATCH), clean)
        assert ledger.change == 0 and [e.fired for e in ledger.entries] == [1, 1, 1]
        with llama.edited(edit), pytest.raises(InputError, match="is already in force"), llama.edited(edit):
            pass
    with llama.edited(attention_edit("L0+", query=0, keys=0)) as ledger:  # the first token sees itself alone
        assert torch.equal(llama.logits(BATCH), clean)
    assert ledger.change == 0
    with pytest.raises(RuntimeError, match="mine"), llama.edited(attention_edit("L0", keys="K")):
        raise RuntimeError("mine")
    assert torch.equal(llama.logits(BATCH), clean) and not llama._active and not llama._edits


def test_several_edits_in_turn(both: Any) -> None:
    hf, model = both
    one, two = attention_edit("L0H1@Q", keys="K", kind="block"), attention_edit("L1H0@Q", keys="M")
    unit = torch.randn(24, generator=torch.Generator().manual_seed(1))
    third = Edit((ActivationChange(Site("resid_post", 2), "add", unit),))

    def contexts(i: int) -> list[AbstractContextManager[None]]:
        added = hooked(hf, "resid_post", 2, lambda x: cast("None", x.add_(unit)))
        return [masked(hf, 0, 1, Q[i], K[i]), rows_set([(1, 0, Q[i], even(M[i]), 1.0)]), added]

    for i, ids in enumerate(ROWS):
        with model.edited(one + two + third):
            near(model.logits(BATCH)[i, : len(ids)], by_hand(hf, ids, contexts(i)))
    with model.edited(one), model.edited(two):
        inside = model.logits(BATCH)
        assert sum(len(a) for _, a in model._active) == sum(len(e.activations) for e in model._edits) == 2
    with model.edited(one + two):
        assert torch.equal(model.logits(BATCH), inside)
    with model.edited(one + two + third) as ledger:
        assert len(ledger.entries) == 3 and (model.logits(BATCH) - inside).abs().max() > 1e-3


def test_sweeps_take_the_plain_way(llama: HookedModel) -> None:
    def made(rows: list[list[int]]) -> Prompts:
        positions = {"Q": Q, "K": K}
        return Prompts(tuple(" ".join(map(str, r)) for r in rows), tuple(map(tuple, rows)), positions, (7,) * 4, (8,) * 4)

    pairs = PromptPairs(made(ROWS), made([[t % 29 + 1 for t in r] for r in ROWS]))
    clean, corrupt = llama.batch(pairs.clean), llama.batch(pairs.corrupt)
    reader = Metric.parse("logit_diff").reader(pairs)
    sites = [Site("z", layer, head, "END") for layer in range(3) for head in (0, 3)]
    without = plain(llama, corrupt, sites, (llama, clean), reader)
    with llama.edited(attention_edit("L1+@Q", keys="K", kind="block")):
        swept = sweep(llama, corrupt, sites, (llama, clean), reader)
        want = plain(llama, corrupt, sites, (llama, clean), reader)
    assert torch.equal(swept.values, want) and (want - without).abs().max() > 1e-3
    assert any("activations are being changed while it runs" in note for note in swept.notes)


# ---- as a value


def test_edits_of_attention_read_back(llama: HookedModel, tmp_path: Any) -> None:
    edit = attention_edit("movers=L1H2,L2H0@Q; L0+", keys=("K", 0), weights=(0.9, 0.1), at="all", name="to K").scaled(0.5)
    both = (
        edit + attention_edit("L1", keys="K", query="Q", kind="block") + Edit((ActivationChange(Site("z", 0), "scale", torch.tensor(2.0)),))
    )
    again = Edit.load(both.save(tmp_path / "e"))
    assert again.digest == both.digest and again.changes[:3] == both.changes[:3] and again.name == "to K"
    assert [str(c) for c in again.changes[:2]] == ["L1H2,L2H0@Q only attends to K,0", "L0+@END only attends to K,0"]
    assert str(again.changes[2]) == "L1@Q cannot attend to K" and len(again.activations) == 4
    with pytest.raises(InputError, match="an edit of activations cannot be saved in a checkpoint"):
        llama.save(tmp_path / "no", edit=attention_edit("L1", keys="K"))
    body = json.loads((tmp_path / "e" / "edit.json").read_text())
    body["changes"][0]["keys"] = ["M", 0]
    (tmp_path / "e" / "edit.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match="holds an edit that is not whole"):
        Edit.load(tmp_path / "e")


def test_the_digest_follows_everything() -> None:
    change = AttentionChange("L1H2,L0", "END", ("K", 3), "set", (0.5, 0.5), "prompt", 1.0)
    others = [
        replace(change, heads="L1H2,L0+"),
        replace(change, query="Q"),
        replace(change, keys=("K", 2)),
        replace(change, weights=None),
        replace(change, weights=(0.4, 0.6)),
        replace(change, kind="block", weights=None),
        replace(change, at="all"),
        change.scaled(0.5),
    ]
    assert len({Edit((c,)).digest for c in [change, *others]}) == 9
    assert Edit((replace(change, heads=" L1H2, L0 ", keys=("K", cast("Any", "3"))),)).digest == Edit((change,)).digest
    assert attention_edit(Heads.parse("a=L9H6,L9H9@END; L7H3@S2"), keys="K").changes == (
        AttentionChange("L9H6,L9H9", "END", ("K",), "set"),
        AttentionChange("L7H3", "S2", ("K",), "set"),
    )
    assert AttentionChange("L1+,L1H0,L0H2", "END", ("K",), "set").within(3, 2 + 1) == {0: (2,), 1: (0, 1, 2), 2: (0, 1, 2)}
    block = attention_edit("L1", keys="K", kind="block")
    assert block.scaled(1).digest == block.digest and block.scaled(0).scaled(1).digest == block.scaled(0).digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attention_edit("H3", keys="K"), "'H3' names no heads; write L9H6,L9H9 or L9"),
        (lambda: attention_edit("L1H2;", keys="K"), "'' names no heads; write L9H6,L9H9@END; L7H3@S2"),
        (lambda: attention_edit("L1H2,L1H2", keys="K"), "heads appear twice in L1H2,L1H2"),
        (lambda: attention_edit("L1", keys=()), "needs at least one key"),
        (lambda: attention_edit("L1", keys="a b"), "position 'a b' is neither a name such as END nor an integer"),
        (lambda: attention_edit("L1", keys="K", kind=cast("Any", "zero")), "unknown kind 'zero' of attention edit; known: set, block"),
        (lambda: attention_edit("L1", keys="K", at=cast("Any", "later")), "at='later' is not one of prompt, new, all"),
        (lambda: attention_edit("L1", keys="K", kind="block", weights=[1]), "weights are those of the 1 keys of rows that are set"),
        (lambda: attention_edit("L1", keys="K", weights=[0.5, 0.5]), r"the 1 keys of rows that are set, not \(0.5, 0.5\)"),
        (lambda: attention_edit("L1", keys=("K", "M"), weights=[0.5, 0.4]), "weights of attention are at least 0 and add up to 1"),
        (lambda: attention_edit("L1", keys=("K", "M"), weights=[1.5, -0.5]), "are at least 0 and add up to 1"),
        (lambda: attention_edit("L1", keys="K", kind="block").scaled(0.5), "can be scaled by 0 or 1, not to 0.5"),
    ],
)
def test_edits_that_are_refused(make: Callable[[], Edit], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (attention_edit("L3H0", keys="K"), "L3H0: layer 3 is out of range; the model has layers 0 to 2"),
        (attention_edit("L2H4", keys="K"), "L2H4: head 4 is out of range; the model has heads 0 to 3"),
        (attention_edit("L1", keys="S2"), "no position 'S2' in these prompts; they name Q, K, M, empty, END"),
        (attention_edit("L1", keys="K", query="S2"), "no position 'S2' in these prompts"),
        (attention_edit("L1", keys="K", query=3), "position 3 is outside prompt"),
        (attention_edit("L1", keys="empty"), "L1@END only attends to empty: prompt 1 has no token empty"),
        (attention_edit("L1", keys="K", query="empty", kind="block"), "L1@empty cannot attend to K: prompt 1 has no token empty"),
        (attention_edit("L1", keys="Q", query="K"), "token 4 of prompt 0 comes after the query, token 1|of prompt . comes after the query"),
        (attention_edit("L1", keys=0, query=0, kind="block"), "every key of a row would be blocked"),
    ],
)
def test_what_prompts_or_models_lack(llama: HookedModel, edit: Edit, message: str) -> None:
    batch = Batch.of(ROWS, {"Q": Q, "K": K, "M": M, "empty": ((3,), (), (5,), (3,))})
    with pytest.raises(InputError, match=message), llama.edited(edit):
        llama.logits(batch)
    assert not llama._active and not llama._edits


def test_blocks_that_are_skipped_never_see_the_edit(llama: HookedModel) -> None:
    stream = llama.capture(BATCH, "L2.resid_pre")[Site("resid_pre", 2)]
    with (
        pytest.raises(InputError, match="the intervention at L1H0.pattern@END never fired"),
        llama.edited(attention_edit("L1H0,L2", keys="K")),
    ):
        llama.run_on(2, stream, BATCH)


# ---- a circuit that is known


def test_the_mover_decides_the_answer() -> None:
    """It copies the name it attends to: forced onto the wrong one it flips the answer, other heads do not."""
    built = organisms.hand_built("ioi")
    prompts = built.task.generate(built.model, n=12, seed=3).clean
    answers, others = torch.tensor(prompts.answers), torch.tensor(prompts.distractors)

    def said(edit: Edit) -> Tensor:
        with built.model.edited(edit):
            return built.model.logits(prompts, at="END").argmax(-1)

    assert (said(Edit(())) == answers).all()
    (mover,) = built.circuit.heads("mover").sites()
    name = f"L{mover.layer}H{mover.head}"
    assert (said(attention_edit(name, keys="S1")) == others).all() and (said(attention_edit(name, keys="IO")) == answers).all()
    assert (said(attention_edit(built.decoys, keys="S1", query="END")) == answers).all()
    clean = _margin(built.model, prompts, Edit(()))
    # The mover without the right name, and the duplicate head without the earlier mention: nothing tells the two names apart.
    for edit in (attention_edit(name, keys="IO", kind="block"), attention_edit("L1H4@S2", keys="S1", kind="block")):
        assert abs(_margin(built.model, prompts, edit)) < 0.15 * clean
    assert _margin(built.model, prompts, attention_edit("L1H5@S2", keys="S1", kind="block")) == pytest.approx(clean, rel=1e-3)  # a decoy


def _margin(model: HookedModel, prompts: Prompts, edit: Edit) -> float:
    """Mean logit difference."""
    reader = Metric.parse("logit_diff").reader(prompts)
    with model.edited(edit):
        return float(reader(model.logits(prompts, at="END")).mean())
