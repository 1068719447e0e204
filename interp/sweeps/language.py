"""Perplexity of running text, and how far the rankings of next tokens agree (as in Merullo et al. 2025, arXiv 2510.24256)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from interp.errors import InputError
from interp.models.batch import Batch

if TYPE_CHECKING:
    from interp.models import HookedModel

CELLS = 2**23
"""Tokens x vocabulary of logits held at a time."""


def blocks(batch: Batch, size: int = 0) -> Batch:
    """Rows of ``size`` tokens of the texts put behind each other, what is left over at the end dropped; 0: the texts as they are.

    Raises:
        InputError: rows of one token, which have nothing to predict, or fewer tokens than one row has.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 0 or size == 1:
        raise InputError(f"a block has at least 2 tokens (0: every text is one), but block is {size!r}")
    if not size:
        if int(batch.lengths.min()) < 2:
            raise InputError(f"prompt {int(batch.lengths.argmin())} is a single token, which has no next token to predict")
        return batch
    ids = [i for row in batch.rows() for i in row]
    if len(ids) < size:
        raise InputError(f"the texts have {len(ids)} tokens in all, fewer than one block of {size}")
    return Batch.of([ids[at : at + size] for at in range(0, len(ids) - size + 1, size)])


def pieces(batch: Batch, vocab: int) -> Iterator[list[int]]:
    """Rows of like length whose logits fit the memory that is meant for them."""
    group: list[int] = []
    lengths = batch.lengths.tolist()
    for row in sorted(range(len(batch)), key=lambda r: -lengths[r]):
        if group and (len(group) + 1) * lengths[group[0]] * vocab > CELLS:
            yield group
            group = []
        group.append(row)
    yield group


def losses(logits: Float[Tensor, "prompt pos vocab"], batch: Batch) -> Float[Tensor, " prompt"]:
    """Mean negative log-likelihood of the next tokens of every row, in nats; float64."""
    after = torch.where(batch.mask, batch.ids, -100)[:, 1:].to(logits.device)
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    each = cross_entropy(wide.transpose(1, 2), after, reduction="none", ignore_index=-100).double().cpu()
    return each.sum(1) / (batch.lengths.cpu() - 1)


def block_losses(model: HookedModel, batch: Batch) -> Float[Tensor, " prompt"]:
    """``losses`` of a model on texts of any number."""
    found = torch.zeros(len(batch), dtype=torch.float64)
    for rows in pieces(batch, model.shape.d_vocab):
        part = batch.select(rows)
        found[rows] = losses(model.logits(part), part)
    return found


def perplexity(loss: Float[Tensor, "*side block"], tokens: Int[Tensor, " block"]) -> Float[Tensor, "*side"]:
    """The exponential of the mean loss of all predicted tokens: what is usually meant.

    Args:
        loss: mean of each block.
        tokens: predicted tokens of each block.
    """
    return ((loss * tokens).sum(-1) / tokens.sum()).exp()


def mean_block_perplexity(loss: Float[Tensor, "*side block"], group: int = 1) -> Float[Tensor, "*side"]:
    """Mean over blocks of exp of the loss of a block: never less than ``perplexity`` where blocks are equally long.

    Args:
        loss: mean of each block.
        group: blocks whose losses are averaged before the exponential; the last group may have fewer.
    """
    return grouped(loss, group).exp().mean(-1)


def grouped(loss: Float[Tensor, "*side block"], group: int) -> Float[Tensor, "*side group"]:
    """Mean losses of every so many blocks."""
    return torch.stack([part.mean(-1) for part in loss.split(group, dim=-1)], dim=-1)


def ndcg(reference: Int[Tensor, "*cell rank"], ranked: Int[Tensor, "*cell rank"]) -> Float[Tensor, "*cell"]:
    """How far a ranking of the k best tokens agrees with a reference, from 0 (none in common) to 1 (the same).

    A token at rank r (from 1) gains ``k + 1 - its rank in the reference``, 0 where that does not have it, over ``log2(r + 1)``; the sum
    is divided by that of the reference itself. With ranks of its own as gains every order of the same tokens would get 1.

    Args:
        reference: token ids, best first.
        ranked: the same of the other.
    """
    k = reference.shape[-1]
    steps = torch.arange(k, dtype=torch.float64, device=reference.device)
    gains, discounts = k - steps, 1 / torch.log2(steps + 2)
    same = ranked[..., :, None] == reference[..., None, :]
    return ((same * gains).sum(-1) * discounts).sum(-1) / (gains * discounts).sum()


def rankings_agree(
    reference: Callable[[Batch], Tensor], others: Sequence[Callable[[Batch], Tensor]], batch: Batch, vocab: int, k: int = 10
) -> Float[Tensor, "other prompt"]:
    """Mean ``ndcg`` of every row over the positions that have a next token, of runs against a reference run.

    Args:
        reference: gives the logits of some rows.
        others: likewise.
        batch: texts of at least two tokens.
        vocab: tokens that are ranked, from id 0.
        k: how many of them.

    Raises:
        InputError: k is not between 1 and the size of the vocabulary.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocab:
        raise InputError(f"k is the number of tokens ranked, 1 to {vocab}; got {k!r}")
    found = torch.zeros(len(others), len(batch), dtype=torch.float64)
    for rows in pieces(batch, vocab):
        part = batch.select(rows)
        there = part.mask[:, 1:].cpu()

        def best(run: Callable[[Batch], Tensor], part: Batch = part) -> Tensor:
            return run(part)[:, :-1, :vocab].topk(k, dim=-1).indices.cpu()

        own = best(reference)
        for i, run in enumerate(others):
            found[i, rows] = torch.where(there, ndcg(own, best(run)), 0.0).sum(1) / there.sum(1)
    return found
