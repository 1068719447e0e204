"""Which prompts a model answers rightly."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.errors import InputError
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.prompts.encoding import continuations, encode

if TYPE_CHECKING:
    from interp.models import HookedModel

CHUNK = 256
"""Prompts whose logits over the whole vocabulary are held at a time."""


def most_likely(
    model: HookedModel, prompts: Prompts | PromptPairs, among: Literal["vocabulary", "options"] = "vocabulary"
) -> Bool[Tensor, " prompt"]:
    """Where the answer is the most likely token at END, of the whole vocabulary or among the prompt's options.

    Raises:
        InputError: the prompts have no one-token answers, or no options.
    """
    if among not in ("vocabulary", "options"):
        raise InputError(f"among is {among!r}, expected vocabulary or options")
    asked = clean_prompts(prompts)
    if asked.answers is None:
        raise InputError("these prompts have no one-token answers to score")
    if among == "options" and asked.options is None:
        raise InputError("these prompts have no options to choose among")
    right = []
    for start in range(0, len(asked), CHUNK):
        part = asked[start : start + CHUNK]
        logits = model.logits(part.batch(), at="END").float()
        if among == "options" and part.options is not None:
            allowed = torch.full_like(logits, float("-inf"))
            for row, options in enumerate(part.options):
                allowed[row, list(options)] = 0.0
            logits = logits + allowed
        answers = torch.tensor(part.answers, device=logits.device)
        right.append((logits.argmax(-1) == answers).cpu())
    return torch.cat(right)


def greedy_integer(model: HookedModel, prompts: Prompts | PromptPairs) -> Bool[Tensor, " prompt"]:
    """Where the first line of the greedy continuation begins with the integer of the target."""
    asked = clean_prompts(prompts)
    wanted = _targets(asked)
    # Two tokens more than the number needs, so that a longer number is seen to go on.
    length = max(len(ids) for ids in continuations(model, encode(model, asked.texts), wanted)) + 2
    written = [model.decode(ids) for ids in model.generate(asked.batch(), length)]
    found = [re.match(r"[^\S\n]*(-?\d+)", text) for text in written]
    return torch.tensor([m is not None and int(m[1]) == int(w) for m, w in zip(found, wanted, strict=True)])


def written(model: HookedModel, prompts: Prompts) -> list[str]:
    """What greedy decoding writes behind each prompt, with some tokens more than its target has."""
    longest = max(len(ids) for ids in continuations(model, encode(model, prompts.texts), _targets(prompts)))
    return [model.decode(ids) for ids in model.generate(prompts.batch(), longest + 8)]


def begins(text: str, answer: str) -> bool:
    """Whether a text begins with exactly this answer: no word continues it, unless the answer is a finished sentence."""
    goes_on = r"(?![^\S\n]*\w)" if answer[-1:].isalnum() else ""
    return re.match(r"\s*" + re.escape(answer.strip()) + goes_on, text) is not None


def mentions(text: str, word: str) -> bool:
    """Whether a word stands anywhere in a text, in any case."""
    return re.search(rf"\b{re.escape(word.strip())}\b", text, re.IGNORECASE) is not None


def begun(model: HookedModel, prompts: Prompts | PromptPairs) -> Bool[Tensor, " prompt"]:
    """Where what greedy decoding writes begins with exactly the target."""
    asked = clean_prompts(prompts)
    return torch.tensor([begins(text, target) for text, target in zip(written(model, asked), _targets(asked), strict=True)])


def _targets(prompts: Prompts) -> tuple[str, ...]:
    if prompts.targets is None:
        raise InputError("these prompts have no target texts to score")
    return prompts.targets
