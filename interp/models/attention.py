"""What heads attend to, changed while a model runs: rows that are set behind the softmax, keys that are blocked before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.edits import AttentionChange
from interp.errors import InputError
from interp.models.interventions import Custom, Entry, Hooks, Ledger, Part
from interp.models.wrap import Wrapped
from interp.sites import Site


@dataclass(frozen=True, eq=False)
class _Rows:
    """Attention rows of one pass: prompt and query of each [row], and what the keys get, [row key], 0 for all others."""

    prompt: Tensor
    query: Tensor
    target: Tensor


def attention(change: AttentionChange, wrapped: Wrapped, ledger: Ledger) -> Custom:
    """What carries a change of attention out in a model, with a row per layer in the ledger.

    Raises:
        InputError: the model lacks a layer, a head or the attention itself, or forgets the prompt while it generates.
    """
    component = "pattern" if change.kind == "set" else "scores"
    entries: dict[int, tuple[tuple[int, ...], Entry]] = {}
    for layer, heads in change.within(wrapped.shape.n_layers, wrapped.shape.n_heads).items():
        wrapped.hook_point(component, layer)
        if change.at != "prompt" and _slides(wrapped, layer):
            raise InputError(
                f"{change}: layer {layer} keeps a sliding window of the prompt while it generates; change the prompt only (at='prompt')"
            )
        entries[layer] = heads, Entry(Site("pattern", layer, heads[0] if len(heads) == 1 else None, change.query))
        ledger.entries.append(entries[layer][1])

    def install(hooks: Hooks) -> None:
        found: list[_Rows] = []  # looked up in the first layer, in the pass that it is for

        def write(x: Tensor, heads: tuple[int, ...], entry: Entry) -> Tensor:
            if not found:
                found.append(_rows(change, hooks.part, x))
            entry.fired += 1
            return _changed(change, x, heads, found[0], entry)

        for layer, (heads, entry) in entries.items():
            hooks.on(component, layer, lambda x, heads=heads, entry=entry: write(x, heads, entry))

    return Custom(change.at, install)


def _slides(wrapped: Wrapped, layer: int) -> bool:
    """True where generation keeps the last keys only, so that a key's place in the cache is not its place in the prompt."""
    config = wrapped.source.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer] != "full_attention"
    return any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))


def _changed(change: AttentionChange, x: Tensor, heads: tuple[int, ...], rows: _Rows, entry: Entry) -> Tensor:
    """Attention [prompt head query key] of a layer with some rows changed; scores if keys are blocked."""
    if change.strength == 0:
        return x
    where = rows.prompt[:, None], torch.tensor(heads, device=x.device)[None], rows.query[:, None]
    old = x[where]
    if change.kind == "set":
        target = rows.target.to(x)[:, None].expand_as(old)
        new = target if change.strength == 1 else old + change.strength * (target - old)
        moved = new.detach().double() - old.detach().double()
    else:
        blocked = (rows.target > 0)[:, None].expand_as(old)
        new = old.masked_fill(blocked, -torch.inf)
        # What a causal mask or a window forbids is the least number there is, which would win where all else is gone.
        if not bool((new > torch.finfo(x.dtype).min / 2).any(-1).all()):
            raise InputError(f"{change}: every key of a row would be blocked, and attention has nowhere to go")
        moved = old.detach().double().softmax(-1)[blocked]
    entry.square = entry.square + moved.square().sum()
    out = x.clone()
    out[where] = new
    return out


def _rows(change: AttentionChange, part: Part, x: Tensor) -> _Rows:
    """The rows of a pass.

    Raises:
        InputError: a prompt lacks the query or a key, or a key comes after the query.
    """
    found = list(_each(change, part, x.shape[2]))
    target = torch.zeros(len(found), x.shape[3], dtype=torch.float64)
    for row, (_, _, shares) in enumerate(found):
        for token, share in shares:
            target[row, token] += share
    prompt, query = (torch.tensor([row[i] for row in found], dtype=torch.long, device=x.device) for i in (0, 1))
    return _Rows(prompt, query, target.to(x.device))


def _each(change: AttentionChange, part: Part, queries: int) -> Iterator[tuple[int, int, list[tuple[int, float]]]]:
    """Prompt, query and (key, share) of every row."""
    prompts = part.batch if part.phase == "prompt" or part.prompts is None else part.prompts
    places = [prompts.at(key) for key in change.keys]
    asked = prompts.at(change.query) if part.phase == "prompt" else [tuple(range(queries))] * len(prompts)
    for row in range(len(prompts)):
        name = f"prompt {int(part.rows[row])}"
        tokens = [place[row] for place in places]
        if empty := [str(key) for key, some in zip(change.keys, tokens, strict=True) if not some]:
            raise InputError(f"{change}: {name} has no token {empty[0]}")
        if not asked[row]:
            raise InputError(f"{change}: {name} has no token {change.query}")
        for query in asked[row]:
            late = [token for some in tokens for token in some if token > query]
            if late and part.phase == "prompt":
                raise InputError(f"{change}: token {late[0]} of {name} comes after the query, token {query}, which cannot attend to it")
            yield row, query, _shares(change, tokens)


def _shares(change: AttentionChange, tokens: list[tuple[int, ...]]) -> list[tuple[int, float]]:
    """Key and what it gets: the weight of a name is shared by its tokens; without weights all tokens have the same."""
    if change.weights is None:
        every = sorted({token for some in tokens for token in some})
        return [(token, 1 / len(every)) for token in every]
    return [(token, weight / len(some)) for some, weight in zip(tokens, change.weights, strict=True) for token in some]
