"""What attention heads attend to and write: scores of the roles that heads are known for.

Every score is the mean attention that a head pays to certain tokens, averaged over the queries for which there are such tokens,
beside what even attention would give. The first token is never a target: many heads rest there. Attention to the token before is that
of Olsson et al. 2022 (arXiv 2209.11895), as is induction: attention to the token behind an earlier mention of the present one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.restart import logits_of
from interp.sites import Site
from interp.tasks.base import Stream

if TYPE_CHECKING:
    from interp.metrics import Reader
    from interp.models import Batch, HookedModel

Pattern = Literal["previous_token", "duplicate_token", "induction"]
PATTERNS: tuple[Pattern, ...] = ("previous_token", "duplicate_token", "induction")
"""Attention that the tokens themselves define: to the token before; to earlier mentions; behind earlier mentions."""

CLEAR = 0.2
"""A head has a role by name where its attention is this far above chance and control. A rule to read tables by, no test."""

_HELD = 2**27  # bytes of patterns at once


def targets(pattern: Pattern, batch: Batch, back: int = 1) -> Bool[Tensor, "prompt query key"]:
    """The keys that a head of this kind attends to from every query.

    Args:
        pattern: which kind.
        batch: the prompts.
        back: how many tokens ago the token before is; another number is a control.
    """
    ids, n = batch.ids, batch.ids.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    there = (batch.mask[:, :, None] & batch.mask[:, None]) & (key >= 1)
    if pattern == "previous_token":
        return there & (key == query - back)
    same = ids[:, :, None] == ids[:, None]
    if pattern == "duplicate_token":
        return there & same & (key < query)
    behind = torch.zeros_like(same)
    behind[:, :, 1:] = (same & (key < query))[:, :, :-1]  # a key whose predecessor is an earlier mention
    return there & behind & (key <= query)


def named(batch: Batch, position: str | int) -> Bool[Tensor, "prompt key"]:
    """The tokens that a position names; it may name several, or none."""
    found = torch.zeros_like(batch.mask)
    for row, places in enumerate(batch.at(position)):
        found[row, list(places)] = True
    return found


def even(batch: Batch) -> Float[Tensor, "prompt query key"]:
    """Attention that is spread evenly over all tokens up to the query."""
    n = batch.ids.shape[1]
    return torch.tril(torch.ones(n, n, dtype=torch.float64)).expand(len(batch), n, n) / torch.arange(1, n + 1)[:, None]


def paid(attention: Float[Tensor, "prompt head query key"], target: Bool[Tensor, "prompt query key"]) -> Float[Tensor, "prompt head"]:
    """Attention to the targets, averaged over the queries that have any; NaN for prompts where none has."""
    asked = target.any(-1).sum(-1).double()
    total = torch.where(target[:, None], attention.double(), 0.0).sum((-2, -1))
    return total / torch.where(asked == 0, torch.nan, asked)[:, None]


def patterns(model: HookedModel, batch: Batch) -> Iterator[tuple[slice, Float[Tensor, "layer prompt head query key"]]]:
    """Attention patterns of all layers, some prompts at a time."""
    s, n = model.shape, batch.ids.shape[1]
    step = max(1, _HELD // (4 * s.n_layers * s.n_heads * n * n))
    for first in range(0, len(batch), step):
        rows = list(range(first, min(first + step, len(batch))))
        found = model.capture(batch.select(rows), [Site("pattern", layer) for layer in range(s.n_layers)])
        yield slice(rows[0], rows[-1] + 1), torch.stack(list(found.values())).float().cpu()


def scores(
    model: HookedModel, batch: Batch, wanted: Sequence[Bool[Tensor, "prompt query key"]]
) -> Float[Tensor, "target layer head prompt"]:
    """Attention that every head pays to several sets of targets."""
    s = model.shape
    found = torch.full((len(wanted), s.n_layers, s.n_heads, len(batch)), torch.nan, dtype=torch.float64)
    for rows, attention in patterns(model, batch):
        for i, target in enumerate(wanted):
            met = target[rows, : attention.shape[-1], : attention.shape[-1]]  # these prompts may all be shorter
            found[i, ..., rows] = torch.stack([paid(layer, met) for layer in attention]).movedim(1, -1)
    return found


def attention_from(model: HookedModel, batch: Batch, position: str | int) -> Float[Tensor, "prompt layer head key"]:
    """Attention of every head from one token of each prompt."""
    return torch.cat([attention for _, attention in _rows_from(model, batch, position)])


def _rows_from(model: HookedModel, batch: Batch, position: str | int) -> Iterator[tuple[slice, Float[Tensor, "prompt layer head key"]]]:
    """The same, some prompts at a time."""
    batch.index(position)  # one token each, or a sentence about it
    sites, width = [Site("pattern", layer, position=position) for layer in range(model.shape.n_layers)], batch.ids.shape[1]
    step = max(1, _HELD // (4 * model.shape.n_heads * width * max(width, 2 * len(sites))))  # a layer has all its rows for a moment
    for first in range(0, len(batch), step):
        rows = list(range(first, min(first + step, len(batch))))
        found = torch.stack(list(model.capture(batch.select(rows), sites).values()), dim=1).float().cpu()
        wide = torch.nn.functional.pad(found, (0, width - found.shape[-1]))  # these prompts may all be shorter
        yield slice(rows[0], rows[-1] + 1), wide


def targets_from(pattern: Pattern, batch: Batch, where: Int[Tensor, " prompt"]) -> Bool[Tensor, "prompt key"]:
    """The keys that a head of this kind attends to from one token of each prompt: rows of ``targets``, without the others."""
    ids, key, query = batch.ids, torch.arange(batch.ids.shape[1])[None], where[:, None]
    there = batch.mask & (key >= 1)
    if pattern == "previous_token":
        return there & (key == query - 1)
    same = (ids == ids.gather(1, query)) & (key < query)
    if pattern == "duplicate_token":
        return there & same
    behind = torch.zeros_like(same)
    behind[:, 1:] = same[:, :-1]
    return there & behind & (key <= query)


def even_from(batch: Batch, where: Int[Tensor, " prompt"]) -> Float[Tensor, "prompt key"]:
    """Attention that is spread evenly over all tokens up to one of each prompt."""
    return (torch.arange(batch.ids.shape[1])[None] <= where[:, None]).double() / (where[:, None] + 1)


def looks(
    model: HookedModel, batch: Batch, places: Sequence[str | int]
) -> tuple[Float[Tensor, "place kind layer head"], Float[Tensor, "place kind"]]:
    """Where every head looks from some positions: mean attention to every pattern and named position, and if it were even.

    Means are over the prompts in which there is something of the kind up to the position, NaN where there are none. Kinds are those of
    ``PATTERNS``, then the named positions but END, as they come.
    """
    done: dict[str | int, tuple[Tensor, Tensor]] = {}
    batch = batch.to("cpu")
    names = [name for name in batch.positions if name != "END"]
    for place in dict.fromkeys(places):
        where = batch.index(place)
        before = torch.arange(batch.ids.shape[1])[None] <= where[:, None]
        patterned = [targets_from(pattern, batch, where) for pattern in PATTERNS]
        wanted = torch.stack([*patterned, *(named(batch, name) & before for name in names)])  # [kind prompt key]
        total = torch.zeros(len(wanted), model.shape.n_layers, model.shape.n_heads, dtype=torch.float64)
        for rows, attention in _rows_from(model, batch, place):
            total += torch.einsum("kpt,plht->klh", wanted[:, rows].double(), attention.double())
        some = wanted.any(-1)
        count = torch.where(some.any(1), some.sum(1).double(), torch.nan)
        uniform = (wanted * even_from(batch, where)).sum((1, 2)) / count
        done[place] = total / count[:, None, None], uniform
    return torch.stack([done[place][0] for place in places]), torch.stack([done[place][1] for place in places])


@dataclass(frozen=True, eq=False)
class Repeats:
    """Random tokens that come twice, and the same first halves followed by other random tokens.

    Attributes:
        twice: [first, a, b, c, a, b, c] with the token that the tokenizer puts first, if it does.
        once: [first, a, b, c, x, y, z], all different: what a head does at the same places without the repetition.
    """

    twice: Batch
    once: Batch


def repeats(model: HookedModel, n: int, seed: int, length: int = 24) -> Repeats:
    """Sequences of random tokens for any model: within a half no token comes twice.

    Args:
        model: its vocabulary without special tokens, and its context, limit the sequences.
        n: how many.
        seed: of the streams, one for every sequence.
        length: of a half, at most.

    Raises:
        InputError: ``n`` is not positive, or the vocabulary or the context is too small.
    """
    if type(n) is not int or n < 1:
        raise InputError(f"n is {n!r}, expected at least 1 sequence of random tokens")
    first, usable = _vocabulary(model)
    length = min(length, (model.shape.n_ctx - len(first)) // 2, len(usable) // 2)
    if length < 3:
        raise InputError(f"{model.name} has {len(usable)} usable tokens and a context of {model.shape.n_ctx}: too few to repeat any")
    halves = [Stream("repeats", seed, i).sample(usable, 2 * length) for i in range(n)]
    twice = [[*first, *row[:length], *row[:length]] for row in halves]
    return Repeats(model.batch(twice), model.batch([[*first, *row] for row in halves]))


def _vocabulary(model: HookedModel) -> tuple[list[int], list[int]]:
    """The tokens put before every text, and those that are not special."""
    everything = list(range(model.shape.d_vocab))
    try:
        tokenizer = model.tokenizer
    except InputError:  # given as an object without one: nothing is put before its tokens, and none is special
        return [], everything
    special = {int(i) for i in tokenizer.all_special_ids}
    start = model.tokens(model.decode([next(i for i in everything if i not in special)]))
    first = start[:1] if start[0] == tokenizer.bos_token_id else []
    return first, [i for i in everything[: len(tokenizer)] if i not in special]


def direct_effect(model: HookedModel, batch: Batch, reader: Reader) -> Float[Tensor, "layer head prompt"]:
    """How far the metric falls when what a head writes at its position is taken out of the last stream, all else as it was.

    This is direct logit attribution with the final norm taken anew, so that no formula of a norm is needed.
    """
    s, at = model.shape, reader.position
    found = torch.empty(s.n_layers, s.n_heads, len(batch))
    last = Site("resid_post", s.n_layers - 1, position=at)
    stream = model.capture(batch, [last])[last]
    before = _judged(model, stream, reader)
    for layer in range(s.n_layers):
        (wrote,) = model.capture(batch, [Site("result", layer, position=at)]).values()
        for head in range(s.n_heads):
            found[layer, head] = before - _judged(model, stream - wrote[:, head], reader)
    return found


def _judged(model: HookedModel, stream: Float[Tensor, "prompt d_model"], reader: Reader) -> Float[Tensor, " prompt"]:
    if reader.columns is None:
        return reader(logits_of(model, stream)).cpu()
    return reader.values(logits_of(model, stream, reader.columns.to(stream.device))).cpu()
