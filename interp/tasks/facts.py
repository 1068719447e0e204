"""Closed-book questions about made-up people: only a model trained on the book can answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

from interp.tasks.base import Example, Rules, Stream, Task, Words, fill
from interp.tasks.words import CITIES, JOBS, NAMES, PETS, WordList

if TYPE_CHECKING:
    from interp.prompts.encoding import Tokenizing

RELATIONS: dict[str, tuple[str, ...]] = {
    "city": (
        "Today {subject} lives in the city of",
        "The home of {subject} is in",
        "Letters for {subject} are sent to",
        "Whoever wants to visit {subject} must travel to",
    ),
    "job": (
        "Today {subject} works as a",
        "By profession {subject} is a",
        "Every day {subject} earns money as a",
        "People hire {subject} as a",
    ),
    "pet": (
        "At home {subject} keeps a",
        "The animal that belongs to {subject} is a",
        "Most of all {subject} loves a",
        "In the yard {subject} walks a",
    ),
}
VALUES = {"city": CITIES, "job": JOBS, "pet": PETS}
PLURAL = {"city": "cities", "job": "jobs", "pet": "pets"}

ONSETS = ("B", "Br", "D", "Dr", "F", "G", "H", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Kl")
MIDDLES = ("al", "en", "ir", "or", "um", "av", "el", "is", "on", "ur")
ENDINGS = ("dak", "fen", "gor", "lim", "mez", "nov", "pik", "rud", "tash", "vel", "wick", "zan")


@dataclass(frozen=True)
class Fact:
    """One person and what the book says of them."""

    subject: str
    values: tuple[tuple[str, str], ...]

    def value(self, relation: str) -> str:
        """The person's city, job or pet."""
        return dict(self.values)[relation]


@lru_cache(maxsize=8)
def book(number: int, people: int) -> tuple[Fact, ...]:
    """The people of a book, with made-up surnames that occur once; every value is about equally frequent."""
    stream = Stream("facts", "book", number)
    surnames = stream.sample([a + b + c for a in ONSETS for b in MIDDLES for c in ENDINGS], 1000)[:people]
    firsts = [stream.choice(NAMES) for _ in range(1000)][:people]
    columns: dict[str, list[str]] = {}
    for relation, values in VALUES.items():
        rows = [v for _ in range(1 + 1000 // len(values)) for v in stream.shuffled(values)]
        columns[relation] = rows[:people]
    return tuple(Fact(f"{firsts[i]} {surnames[i]}", tuple((r, columns[r][i]) for r in RELATIONS)) for i in range(people))


def name_lengths(model: Tokenizing, people: Sequence[Fact]) -> Words:
    """The people's names and how many tokens each has, to draw counterfactuals of equal length with ``someone_else``."""
    from interp.tasks.tokens import token_counts

    subjects = [f.subject for f in people]
    return {"subjects": subjects, "lengths": [str(n) for n in token_counts(model, [f" {subject}" for subject in subjects])]}


def someone_else(stream: Stream, person: Fact, people: Sequence[Fact], relation: str, words: Words) -> Fact:
    """A person with another value, whose name has as many tokens where lengths are known and the people have such a person."""
    others = [p for p in people if p.value(relation) != person.value(relation)]
    lengths = dict(zip(words["subjects"], words["lengths"], strict=True)) if "lengths" in words else {}
    alike = [p for p in others if lengths.get(p.subject) == lengths.get(person.subject)]
    return stream.choice(alike or others)


@dataclass(frozen=True, kw_only=True)
class Facts(Task):
    """Where a made-up person lives, what they work as, which animal they keep.

    The facts are fixed by the book's number and do not depend on the seed, which only draws people,
    relations and wordings. Answer: the value; distractor: the value of the person whom the counterfactual
    asks about; options: all values of the relation; chance 1/16. A model that never read the book scores
    at chance among the options. The people of a smaller book are the first ones of a larger.

    Positions: ``subject`` (all tokens of the name), ``subject_last`` (its last token), ``END``. Clean and
    corrupt have names of equally many tokens where the book has such a pair.

    Attributes:
        people: how many people the book has.
        book: which book; another one is a control of facts never seen.
        relation: ``all``, or one of city, job, pet.
        template: number of the wording from 0, None for all of them; keep one out of training to test
            whether the fact or the sentence was learnt.
    """

    people: int = 64
    book: int = 0
    relation: Literal["all", "city", "job", "pet"] = "all"
    template: int | None = None

    name: ClassVar[str] = "facts"
    summary: ClassVar[str] = "City, job or pet of made-up people: known only to a model trained on them (closed book)."
    paper: ClassVar[str] = "made up; measured as the closed-book recall in Merullo et al. 2025, arXiv 2510.24256"
    rules: ClassVar[Rules] = Rules(several=("subject",), last=("subject",), aligned=False)
    ranges: ClassVar[dict[str, tuple[int, int]]] = {"people": (2, 1000), "template": (0, 3)}

    @property
    def chance(self) -> float:
        """A guess among the values of the relation."""
        return 1 / 16

    def word_lists(self) -> dict[str, WordList]:
        """The values; all of them are needed, for the facts are fixed."""
        return {PLURAL[r]: WordList(v, len(v)) for r, v in VALUES.items() if self.relation in ("all", r)}

    def usable(self, model: Tokenizing) -> Words:
        """The values, and the people with the number of tokens of their names."""
        return {**super().usable(model), **name_lengths(model, book(self.book, self.people))}

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One question and its counterfactual about another person."""
        stream, people = Stream("facts", seed, index), book(self.book, self.people)
        person = stream.choice(people)
        relation = stream.choice(tuple(RELATIONS)) if self.relation == "all" else self.relation
        number = stream.below(4) if self.template is None else self.template
        other = someone_else(stream, person, people, relation, words)

        def side(who: Fact, wrong: Fact, corrupt: Example | None) -> Example:
            text, at = fill(RELATIONS[relation][number], {"subject": who.subject})
            options = tuple(f" {v}" for v in VALUES[relation])
            tags = {"relation": relation, "template": str(number), "subject": who.subject}
            spans = {"subject": (at["subject"],)}
            return Example(text, f" {who.value(relation)}", f" {wrong.value(relation)}", options, spans, corrupt, person.subject, tags)

        return side(person, other, side(other, person, None))


TASK = Facts
