"""Tokens for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from interp.errors import InputError


class Spelling(Protocol):
    """A model or a pair."""

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The text of every token."""
        ...


def spelled(model: Spelling, ids: Sequence[int]) -> list[str]:
    """The text of every token, or its number, ``<17>``, where a model was given as an object without a tokenizer."""
    try:
        return model.token_strings(list(ids))
    except InputError:
        return [f"<{i}>" for i in ids]
