"""Generation with interventions: one key/value cache per group of prompts of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.interventions import Part

if TYPE_CHECKING:
    from interp.models.running import Running


def generate(
    model: Running, batch: Batch, max_new_tokens: int, temperature: float, seed: int, stop: Sequence[int] | None
) -> list[list[int]]:
    """See ``HookedModel.generate``."""
    if max_new_tokens < 1 or temperature < 0:
        raise InputError(f"generate needs max_new_tokens >= 1 and temperature >= 0; got {max_new_tokens} and {temperature}")
    check_room(model, batch, max_new_tokens)
    ends = set(end_tokens(model) if stop is None else stop)
    answers: list[list[int]] = [[] for _ in range(len(batch))]
    lengths = batch.lengths.tolist()
    # Prompts of equal length need no padding, so that every prompt is computed exactly as alone.
    for n in sorted(set(lengths)):
        rows = [i for i, m in enumerate(lengths) if m == n]
        per_token = model._bytes_per_token() * 2
        at = 0
        while at < len(rows):
            some = rows[at : at + model._budget.rows((n + max_new_tokens) * per_token)]
            done, got = model._budget.attempt(
                lambda some=some: _group(model, batch, some, max_new_tokens, temperature, seed, ends), len(some)
            )
            if done and got is not None:
                for row, ids in zip(some, got, strict=True):
                    answers[row] = ids
                at += len(some)
    return answers


def check_room(model: Running, batch: Batch, new_tokens: int) -> None:
    """Refuse prompts behind which so many tokens do not fit.

    Raises:
        InputError: the longest is too long.
    """
    longest = int(batch.lengths.max()) + new_tokens
    if longest > model.shape.n_ctx:
        raise InputError(f"the longest prompt and {new_tokens} new tokens make {longest}; {model.name} takes at most {model.shape.n_ctx}")


def end_tokens(model: Running) -> list[int]:
    """End-of-sequence ids of the generation config, the config, or none."""
    source = model.wrapped.source
    for config in (getattr(source, "generation_config", None), source.config):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return list(end) if isinstance(end, list | tuple) else [int(end)]
    return []


def _group(
    model: Running, batch: Batch, rows: list[int], max_new_tokens: int, temperature: float, seed: int, ends: set[int]
) -> list[list[int]]:
    from transformers import DynamicCache

    part = Part.of(batch, rows)
    cache = DynamicCache(config=model.wrapped.runner.config)
    out: list[list[int]] = [[] for _ in rows]
    open_rows = set(range(len(rows)))
    last = torch.tensor([part.batch.ids.shape[1] - 1])
    with torch.no_grad():
        for step in range(max_new_tokens):
            logits = model.forward(part, keep=last, cache=cache).logits[:, -1]
            new = choose(logits, [(seed, row) for row in rows], step, temperature)
            for i in list(open_rows):
                if new[i] in ends:
                    open_rows.discard(i)
                else:
                    out[i].append(new[i])
            if not open_rows:
                break
            ids = torch.tensor(new)[:, None]
            part = replace(part, batch=Batch(ids, torch.ones_like(ids, dtype=torch.bool)), phase="new")
            last = torch.tensor([0])
    return out


def choose(logits: Tensor, streams: Sequence[tuple[int, int]], step: int, temperature: float) -> list[int]:
    """The next token of every row: the most likely one at temperature 0, else drawn from the row's stream.

    Args:
        logits: [row, vocab]; -inf is never drawn.
        streams: seed and prompt of every row; with the step they are the key of a draw, so that batching changes nothing.
        step: number of the new token.
        temperature: divides the logits.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probs = torch.softmax(logits.double().cpu() / temperature, -1)
    chosen = []
    for (seed, row), p in zip(streams, probs, strict=True):
        stream = torch.Generator().manual_seed(hash((seed, row, step)) & (2**63 - 1))
        chosen.append(int(torch.multinomial(p, 1, generator=stream)))
    return chosen
