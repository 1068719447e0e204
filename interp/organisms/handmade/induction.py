"""Previous token -> induction (Olsson et al. 2022, arXiv 2209.11895)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from interp.circuit import Circuit
from interp.organisms.handmade import HandBuilt
from interp.organisms.handmade.blueprint import TARGET, Blueprint, Head, Match, Move, Offset, coded, plain
from interp.organisms.handmade.lists import NOUNS, ListTask, pair
from interp.sites import Heads
from interp.tasks.base import Example, Stream, Words

ABOUT = (
    "A head of layer 0 writes at every token which word stood before it. At END, the second mention of a word, the induction head "
    "of layer 1 looks for the token whose predecessor is that word, and copies it. All three heads of a layer share one key/value "
    "head."
)


@dataclass(frozen=True, kw_only=True)
class Repeat(ListTask):
    """A list of words and one of them again: which word follows?

    Positions: ``FIRST`` (the first mention of the last word), ``NEXT`` (the word behind it, which is the answer). The
    counterfactual has other words at FIRST and END and at NEXT, so that every step of the circuit differs.
    """

    name: ClassVar[str] = "repeat"
    summary: ClassVar[str] = "Which word followed the last word when it came before."
    paper: ClassVar[str] = "Olsson et al. 2022, arXiv 2209.11895"

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        stream = Stream(self.name, seed, index)
        a, b, c, d, *others = (f" {word}" for word in stream.shuffled(words["nouns"]))
        others = others[: 4 + stream.below(5)]
        first = stream.below(len(others) + 1)

        def row(asked: str, answer: str) -> list[str]:
            return ["Words", ":", *others[:first], asked, answer, *others[first:], asked]

        return pair((row(a, b), row(c, d)), (b, d), {"FIRST": 2 + first, "NEXT": 3 + first})


SAME_BEFORE = Match("code", "prev", TARGET)

BLUEPRINT = Blueprint(
    sizes=(2, 3, 1, 32),
    spaces={"prior": 1} | dict.fromkeys(("code", "prev", "out", "junk"), len(NOUNS)),
    words={**coded(NOUNS), **plain("Words", ":")},
    heads={
        # One key/value head: each head names both sources, and leaves one out by an amount of 0.
        (0, 0): Head((Offset(1),), (Move("code", "junk", 0), Move("word", "prior", 0.05))),
        (0, 1): Head((Offset(1),), (Move("code", "prev"), Move("word", "prior", 0))),
        (0, 2): Head((Offset(2),), (Move("code", "junk"), Move("word", "prior", 0))),
        (1, 0): Head((SAME_BEFORE,), (Move("code", "out"),)),
        (1, 1): Head((SAME_BEFORE,), (Move("code", "junk"),)),
    },
    answers={"out": [f" {noun}" for noun in NOUNS], "prior": [f" {NOUNS[0]}"]},
)

CIRCUIT = Circuit.of(
    (2, 3, 1),
    {"input": ("embed@FIRST", "embed@NEXT", "embed@END"), "previous": "L0H1.z@NEXT", "induction": "L1H0.z@END"},
    [
        "embed@FIRST -> L0H0.v@FIRST",
        "L0H1.z@NEXT -> L1H0.k@NEXT",
        "embed@END -> L1H0.q@END",
        "embed@NEXT -> L1H0.v@NEXT",
        "L1H0.z@END -> L1.resid_post@END",
    ],
)

HAND_BUILT = HandBuilt(
    name="induction",
    about=ABOUT,
    blueprint=BLUEPRINT,
    circuit=CIRCUIT,
    task=Repeat(),
    bystanders=Heads.of([(0, 0)]),
    decoys=Heads.of([(0, 2), (1, 1)]),
)
