"""Prompts: texts with their tokens, named positions and answers, alone or in clean/corrupt pairs."""

from __future__ import annotations

from pathlib import Path

from interp.prompts.encoding import Tokenizing
from interp.prompts.files import numbered_lines
from interp.prompts.values import PromptPairs, Prompts, clean_prompts

__all__ = ["PromptPairs", "Prompts", "clean_prompts", "read_prompts"]


def read_prompts(path: str | Path, model: Tokenizing) -> Prompts | PromptPairs:
    """Prompts or pairs, whichever the file holds; see ``Prompts.read`` and ``PromptPairs.read``."""
    _, first = numbered_lines(path)[0]
    pairs = isinstance(first, dict) and "text" not in first and ("clean" in first or "corrupt" in first)
    return PromptPairs.read(path, model) if pairs else Prompts.read(path, model)
