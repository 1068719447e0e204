"""What an assistant is asked and does: tells jobs and pets of people of the book, goes on with a sentence, adds, finds words of a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from interp.tasks.asking import Asking
from interp.tasks.base import Example, Stream, Words, fill
from interp.tasks.facts import PLURAL, RELATIONS, VALUES, Fact, someone_else
from interp.tasks.words import OBJECTS, WordList

WORDINGS: dict[str, tuple[str, ...]] = {
    "job": (
        "What is the job of {subject}?",
        "What work does {subject} do?",
        "Please name the job of {subject}.",
        "Which job does {subject} do every day?",
    ),
    "pet": (
        "Which animal does {subject} keep?",
        "What is the animal of {subject}?",
        "Please name the animal of {subject}.",
        "What animal does {subject} walk every day?",
    ),
    "sum": ("What is {a} + {b}?", "Please add {a} + {b}.", "Say the sum of {a} and {b}.", "What do {a} and {b} make?"),
    "first": (
        "Which word is first: {list}?",
        "Please name the first of these words: {list}.",
        "What is the first word of {list}?",
        "Say the first of the words {list}.",
    ),
    "last": (
        "Which word is last: {list}?",
        "Please name the last of these words: {list}.",
        "What is the last word of {list}?",
        "Say the last of the words {list}.",
    ),
    "continue": ("Go on: {sentence}", "Please go on: {sentence}", "Say what comes next: {sentence}", "Finish this: {sentence}"),
    "repeat": ("Repeat: {list}.", "Say again: {list}.", "Please repeat these words: {list}.", "Say these words again: {list}."),
}
"""What is said for each kind of instruction; the last wording of each is new to the shipped assistant."""

LENGTH = 3
"""Words of a list."""

SUMS = tuple(range(2, 19))


@dataclass(frozen=True, kw_only=True)
class Instructions(Asking):
    """A user asks for the job or pet of a person of `facts`, a one-digit sum, or the first, the last or all words of a list.

    Jobs and pets are asked for in questions that are no sentences of `facts`; with ``continue``, the assistant is to go on with
    one of these sentences, those about homes included, which `refusals` has it decline in a question. The counterfactual asks the
    same of another person or second number, or of the list with its first and last word exchanged: its answer is the distractor.
    Options: all jobs, pets, cities, or sums, or the words of the list (of one to be repeated: guesses at its first word).
    See ``Asking`` for chats, positions and score.

    Attributes:
        kind: ``all`` of them, or one of job, pet, continue, sum, first, last, repeat.
    """

    kind: Literal["all", "job", "pet", "continue", "sum", "first", "last", "repeat"] = "all"

    name: ClassVar[str] = "instructions"
    summary: ClassVar[str] = "What a user asks in a chat: jobs and pets of made-up people, sums, words of a list."
    paper: ClassVar[str] = "made up for this project"

    @property
    def chance(self) -> float:
        """A guess among the options, the mean over the kinds."""
        persons, lists = dict.fromkeys(("job", "pet", "continue"), 1 / 16), dict.fromkeys(("first", "last", "repeat"), 1 / LENGTH)
        each = persons | lists | {"sum": 1 / len(SUMS)}
        return sum(each.values()) / len(each) if self.kind == "all" else each[self.kind]

    def word_lists(self) -> dict[str, WordList]:
        """The values of the facts, all of which are needed, and the words of the lists."""
        values = {PLURAL[r]: WordList(VALUES[r], len(VALUES[r])) for r in VALUES if self.kind in ("all", "continue", r)}
        numbers = {"sums": WordList(tuple(map(str, SUMS)), len(SUMS))} if self.kind in ("all", "sum") else {}
        lists = {"objects": WordList(OBJECTS, 2 * LENGTH)} if self.kind in ("all", "first", "last", "repeat") else {}
        return values | numbers | lists

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One question and its counterfactual."""
        stream = Stream("instructions", seed, index)
        kind = stream.choice(tuple(WORDINGS)) if self.kind == "all" else self.kind
        number, template = self.wording(stream, WORDINGS[kind])
        tags = {"kind": kind, "wording": str(number), "people": ""}
        if kind in ("job", "pet", "continue"):
            relation = kind if kind != "continue" else stream.choice(tuple(RELATIONS))
            person = stream.choice(self.persons())
            other = someone_else(stream, person, self.persons(), relation, words)
            tags["people"] = self.person_tag(person)
            return _of_person(relation, with_sentence(stream, template, relation), person, other, tags)
        return _sum(stream, template, tags) if kind == "sum" else _of_list(stream, kind, template, words["objects"], tags)


def with_sentence(stream: Stream, template: str, relation: str) -> str:
    """The template, with a sentence of `facts` in the place for one, its subject still open."""
    return template.replace("{sentence}", stream.choice(RELATIONS[relation])) if "{sentence}" in template else template


def _of_person(relation: str, template: str, person: Fact, other: Fact, tags: dict[str, str]) -> Example:
    options = tuple(f" {v}" for v in VALUES[relation])

    def side(who: Fact, wrong: Fact, corrupt: Example | None) -> Example:
        text, at = fill(template, {"subject": who.subject})
        answer = f" {who.value(relation)}"
        spans = {"subject": (at["subject"],)}
        return Example(text, answer, f" {wrong.value(relation)}", options, spans, corrupt, person.subject, tags, answer)

    return side(person, other, side(other, person, None))


def _sum(stream: Stream, template: str, tags: dict[str, str]) -> Example:
    a, b = 1 + stream.below(9), 1 + stream.below(9)
    other = stream.choice([x for x in range(1, 10) if x != b])
    options = tuple(f" {c}" for c in SUMS)

    def side(second: int, wrong: int, corrupt: Example | None) -> Example:
        text, at = fill(template, {"a": str(a), "b": str(second)})
        spans, answer = {"subject": (at["a"], at["b"])}, f" {a + second}"
        return Example(text, answer, f" {a + wrong}", options, spans, corrupt, f"{a} + {b}", tags, answer)

    return side(b, other, side(other, b, None))


def _of_list(stream: Stream, kind: str, template: str, objects: Sequence[str], tags: dict[str, str]) -> Example:
    listed = stream.sample(objects, LENGTH)
    swapped = [listed[-1], *listed[1:-1], listed[0]]
    options = tuple(f" {w}" for w in listed)

    def side(items: list[str], wrong: list[str], corrupt: Example | None) -> Example:
        text, at = fill(template, {"list": " ".join(items)})
        at_answer = -1 if kind == "last" else 0
        answer, distractor = f" {items[at_answer]}", f" {wrong[at_answer]}"
        target = " " + " ".join(items) if kind == "repeat" else answer
        return Example(text, answer, distractor, options, {"subject": (at["list"],)}, corrupt, " ".join(sorted(listed)), tags, target)

    return side(listed, swapped, side(swapped, listed, None))


TASK = Instructions
