"""How far a model goes on word for word, on token ids (measures of Merullo et al. 2025, arXiv 2510.24256)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.prompts.encoding import continuations, encode

if TYPE_CHECKING:
    from interp.models import HookedModel
    from interp.prompts import Prompts

Row = tuple[int, ...]

CELLS = 2**23
"""Tokens x vocabulary of logits held at a time."""


@dataclass(frozen=True)
class Passages:
    """Texts cut in two, as tokens.

    Attributes:
        prompts: what the model reads.
        rests: what should follow, at least one token each.
        special: how many special tokens each prompt begins with.
    """

    prompts: tuple[Row, ...]
    rests: tuple[Row, ...]
    special: tuple[int, ...]

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.rests)

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Tokens to be recited of each text."""
        return torch.tensor([len(rest) for rest in self.rests])


def passages(model: HookedModel, prompts: Prompts, tail: int = 0) -> Passages:
    """The prompts and their targets; or, with ``tail``, the prompts without their last tokens, which are then what should follow.

    Raises:
        InputError: no targets and no tail, or a text that is no longer than the tail.
    """
    if isinstance(tail, bool) or not isinstance(tail, int) or tail < 0:
        raise InputError(f"tail is a number of tokens, from 0; got {tail!r}")
    encoded = encode(model, prompts.texts)
    special = tuple(e.special for e in encoded)
    if not tail:
        if prompts.targets is None:
            raise InputError("these prompts have no target texts to score; with tail=8, say, the last 8 tokens of each are to be recited")
        rests = tuple(continuations(model, encoded, prompts.targets))
        if empty := [i for i, rest in enumerate(rests) if not rest]:
            raise InputError(f"the target of prompt {empty[0]} is empty, so there is nothing to recite")
        return Passages(tuple(e.ids for e in encoded), rests, special)
    if short := [i for i, e in enumerate(encoded) if len(e.ids) - e.special <= tail]:
        n = len(encoded[short[0]].ids) - special[short[0]]
        raise InputError(f"prompt {short[0]} has {n} tokens; to have the last {tail} recited, it must have more than that")
    return Passages(tuple(e.ids[:-tail] for e in encoded), tuple(e.ids[-tail:] for e in encoded), special)


def recitations(model: HookedModel, texts: Passages) -> list[Row]:
    """What greedy decoding writes: as many tokens as should follow, also past an end-of-text token.

    Prompts of one length run together and others apart, so that there is no padding on either side.
    """
    rows = range(len(texts))
    longest = max(map(len, texts.prompts)) + max(map(len, texts.rests))
    groups = [list(rows)]
    if longest > model.shape.n_ctx:  # every text may fit all the same
        groups = [[i for i in rows if len(texts.rests[i]) == n] for n in sorted(set(map(len, texts.rests)))]
    found: list[Row] = [()] * len(texts)
    for group in groups:
        batch = Batch.of([texts.prompts[i] for i in group])
        written = model.generate(batch, max(len(texts.rests[i]) for i in group), stop=())
        for i, ids in zip(group, written, strict=True):
            found[i] = tuple(ids[: len(texts.rests[i])])
    return found


def distances(written: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> Int[Tensor, " prompt"]:
    """Levenshtein distance of every two rows of token ids: the fewest insertions, deletions and replacements."""
    return torch.tensor([Levenshtein.distance(tuple(a), tuple(b)) for a, b in zip(written, wanted, strict=True)], dtype=torch.long)


def loose(distance: Int[Tensor, "*cell"], length: Int[Tensor, "*cell"]) -> Bool[Tensor, "*cell"]:
    """Nearly recited: ``1 - distance / length >= 3/4``, in whole numbers; of 48 tokens 12 may be wrong."""
    return 4 * distance <= length


def matched(written: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> Int[Tensor, " prompt"]:
    """How many tokens are right before the first wrong one."""
    counts = []
    for mine, right in zip(written, wanted, strict=True):
        same = [a == b for a, b in zip(mine, right, strict=False)]
        counts.append(same.index(False) if False in same else len(same))
    return torch.tensor(counts, dtype=torch.long)


def forced(model: HookedModel, texts: Passages) -> Int[Tensor, " prompt"]:
    """``matched`` of what greedy decoding writes, from one pass that reads the rest too (teacher forcing).

    Up to the first wrong token the two read the same, so it stands at the same place, but for ties and rounding.
    """
    found = torch.zeros(len(texts), dtype=torch.long)
    for rows in _groups(texts, model.shape.d_vocab):
        whole = Batch.of([(*texts.prompts[i], *texts.rests[i][:-1]) for i in rows])
        best = model.logits(whole).argmax(-1).cpu()
        for row, i in enumerate(rows):
            start = len(texts.prompts[i]) - 1
            found[i] = matched([best[row, start : start + len(texts.rests[i])].tolist()], [texts.rests[i]])[0]
    return found


def _groups(texts: Passages, vocab: int) -> Iterator[list[int]]:
    """Texts of like length whose logits fit."""
    sizes = [len(p) + len(r) for p, r in zip(texts.prompts, texts.rests, strict=True)]
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if group and (len(group) + 1) * sizes[group[0]] * vocab > CELLS:
            yield group
            group = []
        group.append(i)
    yield group


def shifted(texts: Passages, shift: int, least: int = 1) -> tuple[list[int], Passages]:
    """The texts cut at another place: what else the model could be asked with to bring out the rest.

    Args:
        texts: the texts.
        shift: so many tokens of the rest are read, too; a negative number leaves out so many at the beginning of the prompt,
            behind its special tokens.
        least: tokens of the prompt that must be left then.

    Returns:
        Which texts are long enough, and these.
    """
    rows, prompts, rests = [], [], []
    for i, (prompt, rest, special) in enumerate(zip(texts.prompts, texts.rests, texts.special, strict=True)):
        if shift >= 0 and len(rest) > shift:
            prompt, rest = (*prompt, *rest[:shift]), rest[shift:]
        elif shift < 0 and len(prompt) - special + shift >= least:
            prompt = (*prompt[:special], *prompt[special - shift :])
        else:
            continue
        rows.append(i)
        prompts.append(prompt)
        rests.append(rest)
    return rows, Passages(tuple(prompts), tuple(rests), tuple(texts.special[i] for i in rows))
