"""What the tasks on lists of nouns share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from interp.tasks.base import Example, Spans, Task
from interp.tasks.words import OBJECTS, WordList

NOUNS = OBJECTS[:14]


@dataclass(frozen=True, kw_only=True)
class ListTask(Task):
    """A task whose prompts are lists of nouns and whose answer is one of them."""

    @property
    def chance(self) -> float:
        """A guess between the answer and the counterfactual's."""
        return 1 / 2

    def word_lists(self) -> dict[str, WordList]:
        """The nouns."""
        return {"nouns": WordList(NOUNS, len(NOUNS))}


def pair(
    rows: tuple[Sequence[str], Sequence[str]], answers: tuple[str, str], places: Mapping[str, int], tags: Mapping[str, str] | None = None
) -> Example:
    """An example and its counterfactual from their tokens, each with its space where it has one.

    Args:
        rows: the tokens of the clean and of the corrupt prompt.
        answers: of the two; each is the other's distractor.
        places: name of a position -> its token.
        tags: of both.
    """

    def spans(row: Sequence[str]) -> Spans:
        begins = [sum(map(len, row[:i])) for i in range(len(row))]
        return {name: ((begins[i] + row[i].startswith(" "), begins[i] + len(row[i])),) for name, i in places.items()}

    clean, corrupt = rows
    context = "".join(sorted(answers)).strip()
    other = Example("".join(corrupt), answers[1], answers[0], answers, spans(corrupt), None, context, tags or {})
    return Example("".join(clean), answers[0], answers[1], answers, spans(clean), other, context, tags or {})
