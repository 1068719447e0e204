"""Two circuits that share a head: what comes after a word, and what comes before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from interp.circuit import Circuit
from interp.organisms.handmade import HandBuilt
from interp.organisms.handmade.blueprint import TARGET, Blueprint, Head, Match, Move, Offset, coded, plain
from interp.organisms.handmade.lists import NOUNS, ListTask, pair
from interp.sites import Heads
from interp.tasks.base import Example, Stream, Words, balanced

ABOUT = (
    "A row of words and a question: 'drum precedes' asks for the word behind the drum, 'drum follows' for the one before it. One "
    "head of layer 0 serves both: it writes at every token which word stood before. At the question that is the word asked about, "
    "so both circuits have their query from it. In the row, 'precedes' is answered by a head of layer 1 that looks for it in the "
    "keys (an induction head), 'follows' by a head of layer 2 that looks for the word itself and takes it from there as the value. "
    "Each of the two rests on the first token at the other question. `parts` has the two circuits one by one."
)


@dataclass(frozen=True, kw_only=True)
class Neighbours(ListTask):
    """A row of seven words, then a word of it and a question: which word does it precede, or follow?

    Positions: ``FROM`` and ``READ`` (two neighbours of the row, one asked about, the other the answer), ``ASKED`` (the
    word again). The counterfactual has two other words there. All prompts are equally long.

    Attributes:
        question: ``precedes`` (ASKED is the word at FROM, the answer that at READ), ``follows`` (the other way round), or both in turn.
    """

    question: Literal["mixed", "precedes", "follows"] = "mixed"

    name: ClassVar[str] = "neighbours"
    summary: ClassVar[str] = "Which word of a row stands behind a word, or before it."
    paper: ClassVar[str] = "Olsson et al. 2022, arXiv 2209.11895"

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        stream = Stream(self.name, seed, index)
        question = self.question
        if question == "mixed":
            question = ("precedes", "follows")[balanced(2, index, self.name, seed)]
        a, b, c, d, *others = (f" {word}" for word in stream.sample(words["nouns"], 9))
        place = stream.below(len(others) + 1)

        def row(two: tuple[str, str]) -> list[str]:
            asked = two[0] if question == "precedes" else two[1]
            return ["Row", ":", *others[:place], *two, *others[place:], ".", asked, f" {question}"]

        answers = (b, d) if question == "precedes" else (a, c)
        places = {"FROM": 2 + place, "READ": 3 + place, "ASKED": 2 + len(others) + 3}
        return pair((row((a, b)), row((c, d))), answers, places, {"question": question})


# The word asked about is mentioned again at ASKED, and END's own predecessor is that word: neither is meant.
BEHIND = (Match("prev", "prev", TARGET), Match("const", "question", -TARGET), Match("follows", "start", TARGET))
BEFORE = (Match("prev", "code", TARGET), Match("const", "asked", -TARGET), Match("precedes", "start", TARGET))

BLUEPRINT = Blueprint(
    sizes=(3, 6, 2, 32),
    spaces={"stop": 1, "asked": 1, "question": 1, "precedes": 1, "follows": 1, "prior": 1}
    | dict.fromkeys(("code", "prev", "out", "junk"), len(NOUNS)),
    words={
        **coded(NOUNS),
        ".": {"stop": 0},
        " precedes": {"question": 0, "precedes": 0},
        " follows": {"question": 0, "follows": 0},
        **plain("Row", ":"),
    },
    heads={
        (0, 1): Head((Offset(1),), (Move("word", "prior", 0.05),)),
        (0, 3): Head((Offset(2),), (Move("code", "junk"), Move("stop", "asked", 0))),
        (0, 4): Head((Offset(1),), (Move("code", "prev"), Move("stop", "asked"))),
        (1, 1): Head(BEHIND, (Move("code", "out"),)),
        (1, 2): Head(BEHIND, (Move("code", "junk"),)),
        (2, 5): Head(BEFORE, (Move("prev", "out"),)),
    },
    answers={"out": [f" {noun}" for noun in NOUNS], "prior": [f" {NOUNS[0]}"]},
)

# Heads 3, 4 and 5 share key/value head 1, heads 0, 1 and 2 share key/value head 0.
INPUT = ("embed@FROM", "embed@READ", "embed@ASKED")
SHARED = ["embed@FROM -> L0H1.v@FROM", "embed@ASKED -> L0H1.v@ASKED"]
PRECEDES = Circuit.of(
    (3, 6, 2),
    {"input": INPUT, "previous": ("L0H4.z@READ", "L0H4.z@END"), "behind": "L1H1.z@END"},
    [
        *SHARED,
        "L0H4.z@END -> L1H1.q@END",
        "L0H4.z@READ -> L1H0.k@READ",
        "embed@READ -> L1H0.v@READ",
        "L1H1.z@END -> L2.resid_post@END",
    ],
)
FOLLOWS = Circuit.of(
    (3, 6, 2),
    {"input": INPUT, "previous": ("L0H4.z@READ", "L0H4.z@END"), "before": "L2H5.z@END"},
    [
        *SHARED,
        "L0H4.z@END -> L2H5.q@END",
        "embed@READ -> L2H1.k@READ",
        "L0H4.z@READ -> L2H1.v@READ",
        "L2H5.z@END -> L2.resid_post@END",
    ],
)

HAND_BUILT = HandBuilt(
    name="shared_head",
    about=ABOUT,
    blueprint=BLUEPRINT,
    circuit=PRECEDES | FOLLOWS,
    task=Neighbours(),
    bystanders=Heads.of([(0, 1)]),
    decoys=Heads.of([(0, 3), (1, 2)]),
    parts=((Neighbours(question="precedes"), PRECEDES), (Neighbours(question="follows"), FOLLOWS)),
)
