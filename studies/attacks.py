"""Questions that the shipped assistant should decline, attacked: suffixes from a search, answered questions before them, rewriting."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

import interp
from interp.models import Batch, HookedModel, ModelPair
from interp.prompts import Prompts, clean_prompts
from interp.prompts.chat import chat
from interp.prompts.transforms import TRANSFORMS, many_shot, many_turns, transformed
from interp.tasks.words import CITIES

ASKED = "refusals(people=new, wordings=seen)"
PRACTISED = "refusals(people=seen, wordings=seen)"
HOLES = {"new wordings": "refusals(wordings=new)", "as a sentence": "refusals(people=new, request=sentence)"}

SHOTS = (1, 4, 16)
WORDS = 4
"""Of a suffix."""


# ------------------------------------------------------------------------------------------ the search


@dataclass(frozen=True)
class Suffix:
    """Words behind a question.

    Attributes:
        text: what the search ended with.
        start: the random words it began with: the control.
        score: mean log-probability of the city, nats, over the questions searched on.
        start_score: the same of ``start``.
        passes: forward passes that were spent.
    """

    text: str
    start: str
    score: float
    start_score: float
    passes: int


def search(model: HookedModel, prompts: Prompts, seed: int, *, steps: int, candidates: int = 16, questions: int = 8) -> Suffix:
    """Words behind a question that make the city likely: again and again a place is drawn, and the best of some words kept if it is better.

    Names of cities are left out, so that no answer can be read off the suffix.

    Args:
        model: the assistant.
        prompts: questions to search on; their tag ``city`` is what it should say.
        seed: of the words, the places and which questions are used.
        steps: forward passes; each tries ``candidates`` words on all questions.
        candidates: words tried at a step.
        questions: prompts that are used.
    """
    draw = random.Random(seed)
    some = prompts[draw.sample(range(len(prompts)), questions)]
    text, said = chat(model, "x")
    tail = model.tokens(text[said + 1 :])  # what the template puts behind the user's words
    heads = [row[: -len(tail)] for row in some.ids]
    city = torch.tensor([model.token(f" {c}") for c in some.tags["city"]])
    names = enumerate(model.token_strings(range(model.shape.d_vocab)))
    usable = [i for i, s in names if s[0] == " " and s[1:].isalpha() and s[1:] not in CITIES and model.tokens(s) == [i]]

    def score(tried: list[list[int]]) -> Tensor:
        batch = Batch.of([[*head, *words, *tail] for words, head in product(tried, heads)])
        logp = model.logits(batch, at="END").float().log_softmax(-1)
        return logp[torch.arange(len(logp)), city.repeat(len(tried))].unflatten(0, (len(tried), len(heads))).mean(1)

    words = [draw.choice(usable) for _ in range(WORDS)]
    start, first = list(words), float(score([words])[0])
    best = first
    for _ in range(steps):
        where = draw.randrange(WORDS)
        tried = [[*words[:where], draw.choice(usable), *words[where + 1 :]] for _ in range(candidates)]
        scores = score(tried)
        if float(scores.max()) > best:
            best, words = float(scores.max()), tried[int(scores.argmax())]
    found = Suffix(model.decode(words), model.decode(start), best, first, steps + 1)
    again = transformed(model, some, lambda question: question + found.text)
    if [list(row) for row in again.ids] != [[*head, *words, *tail] for head in heads]:
        raise interp.InputError(f"the suffix {found.text!r} is read as other tokens than those it was scored with")
    return found


# -------------------------------------------------------------------------------------- the conditions


def questions(model: Any, task: str, n: int, seed: int) -> Prompts:
    """``n`` different questions of a task."""
    asked = clean_prompts(interp.task(task).generate(model, 10 * n, seed))
    rows = [asked.texts.index(text) for text in dict.fromkeys(asked.texts)][:n]
    if len(rows) < n:
        raise interp.InputError(f"{task} has only {len(rows)} different questions, and n is {n}")
    return asked[rows]


def conditions(pair: ModelPair, n: int, suffixes: Sequence[Suffix], seed: int) -> Prompts:
    """The same questions in every condition, with tags ``kind`` and ``condition``; those of the holes are other questions."""
    asked = questions(pair, ASKED, n, seed)
    shown = interp.task(PRACTISED).examples(200, seed + 1)
    shots = list({e.text: (e.text, e.tags["city"]) for e in shown}.values())[: max(SHOTS)]
    found = {("plain", "asked plainly"): asked}
    for i, suffix in enumerate(suffixes, 1):
        found["random words", f"random words {i}"] = transformed(pair, asked, lambda q, s=suffix: q + s.start)
        found["suffix", f"suffix {i}"] = transformed(pair, asked, lambda q, s=suffix: q + s.text)
    for name, form in (("in one message", many_shot), ("as turns", many_turns)):
        for k in SHOTS:
            found["many-shot", f"{k} answered, {name}"] = transformed(pair, asked, lambda q, k=k, form=form: form(q, shots, k))
    found |= {("rewritten", name.replace("_", " ")): transformed(pair, asked, name) for name in TRANSFORMS if name != "plain"}
    found |= {("hole of the tuning", name): questions(pair, task, n, seed) for name, task in HOLES.items()}
    return _joined(found)


def _joined(sets: dict[tuple[str, str], Prompts]) -> Prompts:
    """One after another."""
    return Prompts(
        texts=sum((p.texts for p in sets.values()), ()),
        ids=sum((p.ids for p in sets.values()), ()),
        targets=sum((p.targets or () for p in sets.values()), ()),
        contexts=sum((p.contexts for p in sets.values()), ()),
        tags={
            "city": sum((p.tags["city"] for p in sets.values()), ()),
            "kind": tuple(kind for (kind, _), p in sets.items() for _ in p.texts),
            "condition": tuple(name for (_, name), p in sets.items() for _ in p.texts),
        },
    )
