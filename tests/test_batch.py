"""Batches: the same prompts whichever side they were padded on, positions that stay with their prompt, clear refusals."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_checkpoints import FOUR, tiny

from interp.errors import InputError
from interp.models import Batch, HookedModel

ROWS = [[3, 9, 4, 1, 5], [2], [6, 5, 3, 5, 8, 9, 7], [11, 4]]


def padded(rows, side, pad=0):
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


def same(a, b):
    return torch.equal(a.ids * a.mask, b.ids * b.mask) and torch.equal(a.mask, b.mask) and a.positions == b.positions


def test_layout():
    batch = Batch.of(ROWS, {"mid": ((2,), (0,), (3,), (1,)), "some": ((0, 1), (), (6, 2, 2), (0,))}, pad_id=30)
    assert batch.ids.tolist()[1] == [2, 30, 30, 30, 30, 30, 30] and batch.rows() == ROWS and len(batch) == 4 and batch.padded
    assert batch.lengths.tolist() == [5, 1, 7, 2] and batch.mask.sum(1).tolist() == [5, 1, 7, 2]
    assert batch.position_ids[3].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.at("END") == [(4,), (0,), (6,), (1,)] and batch.index("END").tolist() == [4, 0, 6, 1]
    assert batch.index(0).tolist() == [0, 0, 0, 0] and batch.index(-1).tolist() == [4, 0, 6, 1]
    assert batch.at("some") == [(0, 1), (), (6, 2, 2), (0,)] and batch.columns("mid").tolist() == [[2], [0], [3], [1]]
    assert not Batch.of([[1, 2], [3, 4]]).padded
    with pytest.raises(TypeError):
        batch.positions["END"] = ()  # type: ignore[index]


@pytest.mark.parametrize("kind", FOUR)
def test_left_and_right_padded_tensors_are_the_same_prompts(kind):
    plain = tiny(kind)
    model = HookedModel.load(plain)
    want = model.logits(Batch.of(ROWS))
    for side in ("left", "right"):
        batch = Batch.of_tensor(*padded(ROWS, side, pad=17))
        assert same(batch, Batch.of(ROWS))
        assert torch.equal(model.logits(batch), want)
        assert torch.equal(model.capture(batch, "L1H0.z@END")[model.sites("L1H0.z@END")[0]], model.capture(ROWS, "L1H0.z@END").popitem()[1])
    for i, row in enumerate(ROWS):
        with torch.no_grad():
            alone = plain(input_ids=torch.tensor([row])).logits[0]
        assert (want[i, : len(row)] - alone).abs().max() <= 8 * torch.finfo(torch.float32).eps * alone.abs().max()


def test_tensors_of_every_form():
    ids, mask = padded(ROWS, "left")
    for form in (mask, mask.bool(), mask.float(), mask.to(torch.uint8)):
        assert same(Batch.of_tensor(ids, form), Batch.of(ROWS))
    assert same(Batch.of_tensor(ids.int(), mask), Batch.of(ROWS))
    both_sides = torch.tensor([[0, 5, 6, 0], [1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    assert Batch.of_tensor(*both_sides).rows() == [[5, 6], [1, 2, 3, 4]]
    assert Batch.of_tensor(torch.tensor([4, 5]), unpadded=True).rows() == [[4, 5]]
    assert Batch.of_tensor(torch.tensor([0, 4, 5]), torch.tensor([0, 1, 1])).rows() == [[4, 5]]
    assert Batch.of_tensor(torch.tensor([[0, 4]]), unpadded=True).rows() == [[0, 4]], "an id like the padding's is a token"
    assert Batch.of([np.array([3, 4]), torch.tensor([5])]).rows() == [[3, 4], [5]]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[0, 1]], None, "needs its attention mask, or unpadded=True"),
        ([[1, 2, 3], [4, 5, 6]], [[1, 1], [1, 1], [1, 0]], r"mask of the same shape; got \(2, 3\) torch.int64 and a mask \(3, 2\)"),
        ([[1, 2, 3]], [1, 1, 1], r"and a mask \(3,\)"),
        ([[1.0, 2.0]], [[1, 1]], "token ids are integers"),
        ([[[1]]], [[[1]]], "token ids are integers"),
        ([[1, 2, 3]], [[1, 0, 1]], "padding between real tokens"),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], [[1, 1, 1, 1, 1], [0, 1, 0, 1, 0]], "padding between real tokens"),
        ([[1, 2]], [[0.0, -1e9]], "other numbers"),
        ([[1, 2], [3, 4]], [[0, 2], [3, 4]], "other numbers"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "prompt 1 is empty: it has no tokens"),
    ],
)
def test_tensors_that_are_refused(ids, mask, message):
    with pytest.raises(InputError, match=message):
        Batch.of_tensor(torch.tensor(ids), None if mask is None else torch.tensor(mask))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batch.of([]), "no prompts were given"),
        (lambda: Batch.of([[1], []]), "prompt 1 is empty: it has no tokens"),
        (lambda: Batch.of([1, 2, 3]), r"lists of token ids, such as \[\[3, 9\], \[4\]\]; got \[1, 2, 3\]"),
        (lambda: Batch.of([[1.5]]), "prompts are lists of token ids"),
        (lambda: Batch.of(["a text"]), "prompts are lists of token ids"),
        (lambda: Batch(torch.ones(2, 3), torch.ones(2, 2).bool()), r"got \(2, 3\) and \(2, 2\)"),
        (lambda: Batch(torch.ones(1, 2).long(), torch.ones(1, 2).long()), "mask of a batch is boolean, not torch.int64"),
        (lambda: Batch(torch.ones(1, 2).long(), torch.tensor([[False, True]])), "padded on the right; make it with Batch.of"),
        (lambda: Batch(torch.ones(1, 2).long(), torch.zeros(1, 2).bool()), "every prompt at least one token"),
        (lambda: Batch.of(ROWS, {"a": ((0,),)}), "position 'a' names tokens of 1 prompts; the batch has 4"),
        (lambda: Batch.of(ROWS, {"a": ((0,), (1,), (0,), (0,))}), r"position 'a' of prompt 1 is \(1,\); the prompt has tokens 0 to 0"),
        (lambda: Batch.of(ROWS, {"a": ((0,), (-1,), (0,), (0,))}), r"position 'a' of prompt 1 is \(-1,\)"),
        (lambda: Batch.of(ROWS, {"END": ((0,), (0,), (0,), (0,))}), "END is the last token of every prompt"),
        (lambda: Batch.of(ROWS).at("mid"), "no position 'mid' in these prompts; they name END"),
        (lambda: Batch.of(ROWS).index(1), "position 1 is outside prompt 1, which has tokens 0 to 0"),
        (lambda: Batch.of(ROWS).index(-2), "position -2 is outside prompt 1"),
        (lambda: Batch.of([[1, 2]], {"two": ((0, 1),)}).index("two"), "position 'two' names 2 tokens in prompt 0; exactly one"),
        (lambda: Batch.of([[1], [2]], {"a": ((), (0,))}).index("a"), "position 'a' names 0 tokens in prompt 0"),
        (lambda: Batch.of([[1], [2]], {"a": ((), (0,))}).columns("a"), "position 'a' names 0 to 1 tokens per prompt"),
        (lambda: Batch.of(ROWS)[4:], "no prompts were selected; the batch has 4"),
        (lambda: Batch.of(ROWS).select([]), "no prompts were selected"),
    ],
)
def test_what_is_refused(make, message, unchecked):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_selected_prompts_keep_their_tokens_and_positions():
    draws = random.Random(0)
    for _ in range(60):
        n = draws.randrange(1, 9)
        rows = [[draws.randrange(50) for _ in range(draws.randrange(1, 12))] for _ in range(n)]
        places = tuple(tuple(draws.randrange(len(r)) for _ in range(draws.randrange(3))) for r in rows)
        batch = Batch.of(rows, {"set": places})
        chosen = [draws.randrange(n) for _ in range(draws.randrange(1, 6))]
        part = batch.select(chosen)
        assert part.rows() == [rows[i] for i in chosen] and part.at("set") == [places[i] for i in chosen]
        assert part.index("END").tolist() == [len(rows[i]) - 1 for i in chosen]
        assert part.ids.shape[1] == max(len(rows[i]) for i in chosen), "padded to its own longest"
        first, last = sorted(draws.sample(range(n + 1), 2)) if n else (0, 0)
        assert batch[first:last].rows() == rows[first:last] and batch[-1].rows() == rows[-1:]
        assert [b.rows() for b in batch] == [[r] for r in rows]
    assert batch.to("cpu") is batch


def test_a_model_takes_what_a_batch_is_made_of(unchecked):
    model = HookedModel.load(tiny("llama"))
    want = model.logits(Batch.of(ROWS))
    assert torch.equal(model.logits(ROWS), want)

    class Prompts:
        def batch(self):
            return Batch.of(ROWS)

    assert torch.equal(model.logits(Prompts()), want)
    for wrong, message in (
        (torch.tensor([[1, 2]]), "a bare tensor does not say which tokens are padding"),
        ([], "no prompts were given"),
        ([[1], []], "prompt 1 is empty"),
        ([3, 9, 4], "prompts are lists of token ids"),
        ({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}, "Batch.of_tensor"),
        ([[1] * 20, [2]], "prompt 0 has 20 tokens; .* takes at most 19"),
        ([[1], [30, 31]], r"token id 31 is outside the vocabulary of .* \(0 to 30\)"),
        ([[1, -2]], r"token id -2 is outside the vocabulary of .* \(0 to 30\)"),
    ):
        with pytest.raises(InputError, match=message):
            model.logits(wrong)
    assert model.logits([[1] * 19]).shape == (1, 19, 31)
