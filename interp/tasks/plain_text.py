"""Plain running text: from a grammar whose entropy is known, or short pieces of prose written for this project."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn

from interp.data_files import data_path
from interp.errors import InputError
from interp.tasks.base import Example, Rules, Stream, Task, Words
from interp.tasks.grammar import entropy, scene

if TYPE_CHECKING:
    from interp.models import HookedModel
    from interp.prompts import PromptPairs, Prompts


@cache
def prose() -> tuple[dict[str, str], ...]:
    """The shipped pieces: ``text`` and ``kind`` of each."""
    lines = data_path("plain_text", "prose.jsonl").read_text(encoding="utf-8").split("\n")
    return tuple(json.loads(line) for line in lines if line)


@dataclass(frozen=True, kw_only=True)
class PlainText(Task):
    """Text to compare two models on, without a right answer and without a score.

    With ``source="grammar"`` the surprise of every text, -log p(text) in nats, is known exactly (tag
    ``nats``); a model's mean loss per text minus the mean of that tag is its distance (KL) from the
    truth. With ``source="prose"`` the texts are short pieces in several registers (tag ``kind``).

    Attributes:
        source: ``grammar`` or ``prose``.
        sentences: sentences per text of the grammar.
    """

    source: Literal["grammar", "prose"] = "grammar"
    sentences: int = 4

    name: ClassVar[str] = "plain_text"
    summary: ClassVar[str] = "Running text without a right answer: from a grammar of known entropy, or short pieces of prose."
    paper: ClassVar[str] = "made up for this project"
    rules: ClassVar[Rules] = Rules(one_token=False)
    ranges: ClassVar[dict[str, tuple[int, int]]] = {"sentences": (1, 50)}

    @property
    def chance(self) -> None:
        """There is no score."""

    @property
    def entropy(self) -> float | None:
        """Nats per text of the grammar, the least mean loss; None for prose, whose entropy nobody knows."""
        return entropy(self.sentences) if self.source == "grammar" else None

    def draw(self, n: int, seed: int, words: Words) -> list[Example]:
        """``n`` texts.

        Raises:
            InputError: there are fewer pieces of prose than that.
        """
        if self.source == "prose" and n > len(prose()):
            raise InputError(f"plain_text: n is {n}, but there are {len(prose())} pieces of prose; source=grammar has no end")
        return super().draw(n, seed, words)

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One text."""
        if self.source == "grammar":
            text, nats = scene(Stream("plain_text", seed, index), self.sentences)
            return Example(text, "", context=text, tags={"nats": f"{nats:.9g}"})
        pieces = prose()
        piece = pieces[Stream("plain_text", "order", seed).shuffled(range(len(pieces)))[index]]
        return Example(piece["text"], "", context=piece["text"], tags={"kind": piece["kind"]})

    def score(self, model: HookedModel, prompts: Prompts | PromptPairs, among: Literal["vocabulary", "options"] = "vocabulary") -> NoReturn:
        """Plain text has no right answer.

        Raises:
            InputError: always.
        """
        raise InputError("plain_text has no right answers to score; compare the models on it token by token instead")


TASK = PlainText
