"""Attention rows set by hand: which rows and tokens under which condition, what the model answers, and what changes behind them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuit import Circuit
from interp.edits import attention_edit
from interp.errors import InputError
from interp.models import HookedModel
from interp.models.attribution import logit_attribution
from interp.prompts import Prompts
from interp.sites import HeadGroup, Heads, Site

CHUNK = 128
"""Prompts whose logits over the whole vocabulary are held at a time."""

_MEASURED = 2**28  # bytes of what heads add to the stream, held at a time
RIGHT, WRONG, RANDOM, GUESSED, TOP_WRONG = "right_option", "wrong_options", "random_tokens", "own_guess_wrong_options", "top_wrong_option"
"""Positions that are named for the edits, beside those the prompts have."""


DRAWN = ("random tokens", "other heads", "other heads blocked")
"""Kinds of conditions that are drawn several times."""


@dataclass(frozen=True)
class Condition:
    """One way to run the prompts.

    Attributes:
        name: as a person would say it.
        kind: what it has in common with others of its kind, such as draws of one control.
        heads: text form of the heads whose rows change; "" for none.
        keys: position whose tokens the rows are set to, or may not see.
        block: the tokens are taken out instead of set.
        draw: which of the random draws of tokens; else -1.
    """

    name: str
    kind: str
    heads: str = ""
    keys: str = WRONG
    block: bool = False
    draw: int = -1


def chosen(text: str | Heads, circuit: Circuit | None, query: str | int) -> Heads:
    """Groups of heads from their text, or from roles of a circuit; those without a position have their rows at the query.

    Raises:
        InputError: neither heads nor a role of the circuit.
    """
    groups: list[HeadGroup] = []
    for part in str(text).split(";"):
        name = part.strip()
        if circuit is not None and re.fullmatch(r"[A-Za-z_]\w*", name) and not re.fullmatch(r"L\d+H\d+", name):
            groups += circuit.heads(name)
        else:
            groups += Heads.parse(name)
    return Heads(tuple(g if g.position is not None else replace(g, position=query) for g in groups))


def check_heads(heads: Heads, model: HookedModel) -> Heads:
    """The heads, if the model has them and none is named twice.

    Raises:
        InputError: it has not, or one is.
    """
    sites = heads.sites()
    model.sites(sites)
    seen = [(s.layer, s.head) for s in sites]
    if twice := [s for s in sites if seen.count((s.layer, s.head)) > 1]:
        raise InputError(f"L{twice[0].layer}H{twice[0].head} is in two groups of heads ({heads}); name it once")
    return heads


def conditions(edited: Heads, gatherers: Heads | None, question: str, model: HookedModel, draws: int, seed: int) -> list[Condition]:
    """No edit first, then the edit of all heads, its parts, and the controls."""
    groups, every = [str(HeadGroup(g.heads, g.position)) for g in edited], _text(edited)
    found = [Condition("no edit", "no edit"), Condition("all heads", "all heads", every)]
    if len(groups) > 1:
        names = [g.name for g in edited]
        for text, group in zip(groups, edited, strict=True):
            own = group.name if group.name and names.count(group.name) == 1 else text
            found += [Condition(own, "group", text)] if len(group.heads) > 1 else []
    if len(edited.sites()) > 1:
        found += [Condition(f"L{s.layer}H{s.head}", "single head", f"L{s.layer}H{s.head}@{s.position}") for s in edited.sites()]
    found += [Condition("all heads, right option", "right option", every, RIGHT)]
    found += [Condition("all heads, wrong by its own guess", "own guess", every, GUESSED)]
    found += [Condition("all heads, its top wrong option", "top wrong option", every, TOP_WRONG)]
    found += [Condition(f"all heads, random tokens {i + 1}", "random tokens", every, RANDOM, draw=i) for i in range(draws)]
    for i, other in enumerate(others(edited, model, draws, seed)):
        found.append(Condition(f"other heads {i + 1}", "other heads", _text(other)))
    if gatherers is not None:
        found.append(Condition("gatherers blocked", "gatherers blocked", _text(gatherers), question, block=True))
        for i, other in enumerate(others(gatherers, model, draws, seed + 1)):
            found.append(Condition(f"other heads blocked {i + 1}", "other heads blocked", _text(other), question, block=True))
    return found


def _text(heads: Heads) -> str:
    return "; ".join(str(HeadGroup(g.heads, g.position)) for g in heads)


def others(heads: Heads, model: HookedModel, draws: int, seed: int) -> Iterator[Heads]:
    """As many other heads of the same layers, drawn at random; no draws where a layer has too few."""
    taken = {(s.layer, s.head) for s in heads.sites()}
    free = {layer: [h for h in range(model.shape.n_heads) if (layer, h) not in taken] for layer, _ in taken}
    if any(len(free[layer]) < sum(i == layer for i, _ in taken) for layer in free):
        return
    for draw in range(draws):
        pick = random.Random(f"{seed}/{draw}/heads")
        left = {layer: pick.sample(pool, len(pool)) for layer, pool in free.items()}
        yield Heads(tuple(HeadGroup(tuple((i, left[i].pop()) for i, _ in g.heads), g.position) for g in heads))


def options_of(prompts: Prompts, text: str) -> list[list[int]]:
    """The token of every option of a prompt, in the order of ``prompts.options``.

    Args:
        prompts: with answers and options.
        text: a position that names all of them, or several, separated by commas.

    Raises:
        InputError: no answers or options, an unknown position, not as many tokens as options, or an answer that is not one option.
    """
    if prompts.answers is None or prompts.options is None:
        raise InputError("these prompts have no one-token answers with options to choose among, so no option is wrong")
    names = [name.strip() for name in text.split(",")]
    if missing := [name for name in names if name not in prompts.positions]:
        raise InputError(f"no position {missing[0]!r} in these prompts; they name {', '.join(prompts.positions)}")
    places = [[i for name in names for i in prompts.positions[name][row]] for row in range(len(prompts))]
    for row, (place, options, answer) in enumerate(zip(places, prompts.options, prompts.answers, strict=True)):
        if len(place) != len(options):
            raise InputError(f"{text} names {len(place)} tokens of prompt {row}, which has {len(options)} options")
        if options.count(answer) != 1 or len(options) < 2:
            raise InputError(
                f"the answer of prompt {row} is {options.count(answer)} of its {len(options)} options; expected one of several"
            )
    return places


def strangers(model: HookedModel, prompts: Prompts, places: list[list[int]], text: str) -> list[str]:
    """A note where the tokens that a position names are not the options themselves, as far as letters go; none where they are."""

    def word(token: int) -> str:
        try:
            return model.token_text(token).strip().casefold()
        except InputError:  # given as an object without a tokenizer
            return f"token {token}"

    def strange(row: int) -> tuple[int, int] | None:
        pairs = zip((prompts.ids[row][i] for i in places[row]), (prompts.options or ())[row], strict=True)
        return next(((came, option) for came, option in pairs if came != option and word(came) != word(option)), None)

    found = [(row, pair) for row in range(len(prompts)) if (pair := strange(row)) is not None]
    if not found:
        return []
    row, (came, option) = found[0]
    such = f"{word(came)!r} in place of {word(option)!r} in prompt {row}"
    return [f"the tokens that {text} names are not the options themselves in {len(found)} of {len(prompts)} prompts ({such})"]


def with_rows(prompts: Prompts, places: list[list[int]], scores: Float[Tensor, "prompt option"], query: str | int) -> Prompts:
    """The prompts with names for the tokens that rows are set to.

    Args:
        prompts: with answers and options.
        places: the token of each option.
        scores: logit of each option without an edit, -inf where a prompt has fewer.
        query: whose rows are set, to check that the options stand before it.

    Raises:
        InputError: an option stands behind the query.
    """
    right = [options.index(answer) for options, answer in zip(prompts.options or (), prompts.answers or (), strict=True)]
    guess = scores.argmax(1).tolist()
    beaten = scores.clone()
    beaten[torch.arange(len(right)), right] = -torch.inf
    rival = beaten.argmax(1).tolist()
    asked = prompts.batch().at(query)
    for row, (place, where) in enumerate(zip(places, asked, strict=True)):
        if where and max(place) > min(where):
            raise InputError(f"option {max(place)} of prompt {row} stands behind {query}, token {min(where)}, which cannot attend to it")

    def but(place: list[int], i: int) -> tuple[int, ...]:
        return tuple(p for k, p in enumerate(place) if k != i)

    named = {
        RIGHT: tuple((place[i],) for place, i in zip(places, right, strict=True)),
        WRONG: tuple(but(place, i) for place, i in zip(places, right, strict=True)),
        GUESSED: tuple(but(place, i) for place, i in zip(places, guess, strict=True)),
        TOP_WRONG: tuple((place[i],) for place, i in zip(places, rival, strict=True)),
    }
    return replace(prompts, positions={**prompts.positions, **named})


def with_random_tokens(prompts: Prompts, places: list[list[int]], query: str | int, draw: int, seed: int) -> Prompts:
    """The prompts with as many random tokens named as there are wrong options: from before the query, and no options.

    Raises:
        InputError: too few tokens are left to draw from.
    """
    rows = []
    for row, (place, where) in enumerate(zip(places, prompts.batch().at(query), strict=True)):
        free = [i for i in range(min(where)) if i not in place]
        if len(free) < len(place) - 1:
            raise InputError(f"prompt {row} has {len(free)} tokens before {query} that are no options; {len(place) - 1} are needed")
        rows.append(tuple(sorted(random.Random(f"{seed}/{draw}/{row}").sample(free, len(place) - 1))))
    return replace(prompts, positions={**prompts.positions, RANDOM: tuple(rows)})


def editing(model: HookedModel, condition: Condition, query: str | int) -> AbstractContextManager[object]:
    """A context in which the rows of a condition are changed."""
    if not condition.heads:
        return nullcontext()
    kind = "block" if condition.block else "set"
    return model.edited(attention_edit(condition.heads, keys=condition.keys, query=query, kind=kind, name=condition.name))


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answers, on the CPU.

    Attributes:
        said: the most likely token of the whole vocabulary.
        options: logit of every option, -inf where a prompt has fewer.
    """

    said: Tensor
    options: Float[Tensor, "prompt option"]


def answers(model: HookedModel, prompts: Prompts) -> Answers:
    """Read the logits at END, with whatever edit is in force."""
    listed = prompts.options or ()
    said = torch.empty(len(prompts), dtype=torch.long)
    found = torch.full((len(prompts), max(map(len, listed))), -torch.inf, dtype=torch.float64)
    for start in range(0, len(prompts), CHUNK):
        some = prompts[start : start + CHUNK]
        logits = model.logits(some.batch(), at="END")
        said[start : start + len(some)] = logits.argmax(-1).cpu()
        for row, options in enumerate(some.options or ()):
            found[start + row, : len(options)] = logits[row, list(options)].double().cpu()
    return Answers(said, found)


def direction(model: HookedModel, prompts: Prompts) -> Float[Tensor, "prompt d_model"]:
    """The answer's column of W_U less the mean of those of the wrong options."""
    columns = model.weight("W_U").detach().T
    rows = []
    for options, answer in zip(prompts.options or (), prompts.answers or (), strict=True):
        wrong = [o for o in options if o != answer]
        rows.append(columns[answer].double() - columns[wrong].double().mean(0))
    return torch.stack(rows).to(torch.promote_types(model.dtype, torch.float32))


def downstream(model: HookedModel, prompts: Prompts, along: Float[Tensor, "prompt d_model"], query: str | int) -> Mapping[str, Tensor]:
    """Where every head looks from the query, and what it adds to the logits at END, with whatever edit is in force.

    Returns:
        ``attention`` [prompt layer head option], to the right and to all wrong options, and ``attribution`` [prompt layer head], the
        final norm's scale held at that of the run, in logits of the answer less the mean wrong option.
    """
    s = model.shape
    layers = range(s.n_layers)
    patterns = [Site("pattern", i, position=query) for i in layers]
    added = [Site("result", i, position="END") for i in layers]
    last = Site("resid_post", s.n_layers - 1, position="END")
    step = max(1, _MEASURED // (4 * s.n_layers * s.n_heads * s.d_model))
    found: dict[str, list[Tensor]] = {"attention": [], "attribution": []}
    for start in range(0, len(prompts), step):
        some = prompts[start : start + step]
        batch = some.batch()
        seen = model.capture(batch, [*patterns, *added, last])
        rows = torch.stack([seen[site] for site in patterns], 1).double().cpu()  # [prompt layer head key]
        looked = []
        for name in (RIGHT, WRONG):
            there = torch.zeros(batch.ids.shape, dtype=torch.float64)
            for row, tokens in enumerate(batch.at(name)):
                there[row, list(tokens)] = 1
            looked.append((rows * there[:, None, None]).sum(-1))
        found["attention"].append(torch.stack(looked, -1))
        u = along[start : start + len(some)]
        parts = [logit_attribution(model, seen[last], seen[site], u) for site in added]
        found["attribution"].append(torch.stack(parts, 1).double().cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def importance(circuit: Circuit | None, sizes: Sequence[int]) -> Float[Tensor, "layer head"]:
    """Scores of the heads of a circuit, the one of largest size where a head is a node at several positions; NaN for all others."""
    found = torch.full((sizes[0], sizes[1]), torch.nan, dtype=torch.float64)
    for part, score in circuit.scores.items() if circuit is not None else ():
        if isinstance(part, Site) and part.layer is not None and part.head is not None:
            old = float(found[part.layer, part.head])
            if not abs(old) >= abs(score):
                found[part.layer, part.head] = score
    return found
