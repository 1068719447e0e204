"""Indirect object identification (Wang et al. 2023, arXiv 2211.00593)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from interp.tasks.base import Example, Rules, Spans, Stream, Task, Words, balanced, fill
from interp.tasks.words import NAMES, PLACES, THINGS, WordList

TEMPLATES = (
    "When {first} and {second} walked to the {place}, {S2} gave a {thing} to",
    "Then {first} and {second} met at the {place}, and {S2} handed a {thing} to",
    "After {first} and {second} had lunch near the {place}, {S2} passed a {thing} to",
    "While {first} and {second} waited outside the {place}, {S2} offered a {thing} to",
    "Yesterday {first} and {second} went to the {place}, where {S2} sold a {thing} to",
    "Because {first} and {second} were new at the {place}, {S2} lent a {thing} to",
    "Last week {first} and {second} argued at the {place}, and later {S2} sent a {thing} to",
    "Once {first} and {second} got back from the {place}, {S2} brought a {thing} to",
    "In the morning {first} and {second} worked at the {place}. {S2} showed a {thing} to",
    "The day {first} and {second} visited the {place}, {S2} decided to give a {thing} to",
    "Since {first} and {second} were friends from the {place}, {S2} wanted to lend a {thing} to",
    "Long ago {first} and {second} lived behind the {place}. One day {S2} threw a {thing} to",
    "Before {first} and {second} left the {place}, {S2} promised a {thing} to",
    "On Monday {first} and {second} cleaned the {place}. Afterwards {S2} mailed a {thing} to",
    "As {first} and {second} drove past the {place}, {S2} described a {thing} to",
)


def _prompt(template: str, abba: bool, io: str, s1: str, s2: str, **nouns: str) -> tuple[str, Spans]:
    first, second = (io, s1) if abba else (s1, io)
    text, at = fill(template, {"first": first, "second": second, "S2": s2, **nouns})
    where = {"IO": at["first" if abba else "second"], "S1": at["second" if abba else "first"], "S2": at["S2"]}
    return text, {name: (span,) for name, span in where.items()}


@dataclass(frozen=True, kw_only=True)
class IOI(Task):
    """Two people are named, one of them (S) acts; the other (IO) receives. Which name comes next?

    Positions: ``IO``, ``S1``, ``S1+1`` (the token after S1), ``S2``, ``END``. Half of the prompts name
    IO first (ABBA), half S first (BABA). Answer: IO; distractor and second option: S; chance 1/2.

    Attributes:
        corrupt: ``flip`` (default) writes IO in place of S2, which makes S the answer (Merullo et al.
            2024, arXiv 2310.08744); ``ABC`` puts three names that do not occur in the clean prompt in
            place of IO, S1 and S2, which leaves no answer (Wang et al.); ``order`` exchanges the two
            names of the first clause, which keeps the answer.
        order: ``mixed``, or one of ``ABBA`` and ``BABA``.
    """

    corrupt: Literal["flip", "ABC", "order"] = "flip"
    order: Literal["mixed", "ABBA", "BABA"] = "mixed"

    name: ClassVar[str] = "ioi"
    summary: ClassVar[str] = "Which of two named people receives something: not the one who gives (indirect object identification)."
    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2211.00593"
    rules: ClassVar[Rules] = Rules(following=("S1",))

    @property
    def chance(self) -> float:
        """A guess between the two names."""
        return 1 / 2

    def word_lists(self) -> dict[str, WordList]:
        """Names, places and things."""
        return {
            "names": WordList(NAMES, 5 if self.corrupt == "ABC" else 2),
            "places": WordList(PLACES, 1),
            "things": WordList(THINGS, 1),
        }

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual; the names of a prompt all differ."""
        stream = Stream("ioi", seed, index)
        abba = bool(balanced(2, index, "ioi", seed)) if self.order == "mixed" else self.order == "ABBA"
        number = stream.below(len(TEMPLATES))
        nouns = {"place": stream.choice(words["places"]), "thing": stream.choice(words["things"])}
        io, s, *others = stream.sample(words["names"], 5 if self.corrupt == "ABC" else 2)
        template = TEMPLATES[number]
        text, spans = _prompt(template, abba, io, s, s, **nouns)
        tags = {"template": str(number), "order": "ABBA" if abba else "BABA"}
        context = f"{number} {' '.join(sorted((io, s)))}"

        def counterfactual(abba: bool, names: tuple[str, str, str], answer: str, distractor: str | None) -> Example:
            other, places = _prompt(template, abba, *names, **nouns)
            options = (f" {io}", f" {s}") if answer else ()
            return Example(other, answer, distractor, options, places, context=context, tags=tags)

        if self.corrupt == "flip":
            corrupt = counterfactual(abba, (io, s, io), f" {s}", f" {io}")
        elif self.corrupt == "order":
            corrupt = counterfactual(not abba, (io, s, s), f" {io}", f" {s}")
        else:
            corrupt = counterfactual(abba, (others[0], others[1], others[2]), "", None)
        return Example(text, f" {io}", f" {s}", (f" {io}", f" {s}"), spans, corrupt, context, tags)


TASK = IOI
