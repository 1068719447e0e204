"""A mover with a backup: redundancy as Wang et al. 2023 and McGrath et al. 2023 (arXiv 2307.15771) found it, by construction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from interp.circuit import Circuit
from interp.organisms.handmade import HandBuilt
from interp.organisms.handmade.blueprint import TARGET, Blueprint, Head, Match, Move, Offset, coded, plain
from interp.organisms.handmade.lists import NOUNS, pair
from interp.sites import Heads
from interp.tasks.base import Example, Stream, Task, Words
from interp.tasks.words import NAMES, WordList

PEOPLE = NAMES[:12]
FILLERS = NOUNS[:9]

ABOUT = (
    "Among some things there is one person, whose name is the answer. A mover of layer 1 copies the name to END. A backup of layer "
    "3 looks for the same name, but it is turned away from what END already carries, and rests. Zero or mean ablation of the mover "
    "removes what kept the backup from it, which then writes nearly all of the answer: ablating either head alone shows little, "
    "ablating both leaves nothing. Minimality sees the backup only with the mover gone, and a resampled mover, which carries "
    "another name, sets the backup free as well."
)


@dataclass(frozen=True, kw_only=True)
class OnePerson(Task):
    """Some things and a person: who is it?

    Positions: ``NAME``. The counterfactual has another name there.
    """

    name: ClassVar[str] = "one_person"
    summary: ClassVar[str] = "Which name stands among some things."
    paper: ClassVar[str] = "McGrath et al. 2023, arXiv 2307.15771"

    @property
    def chance(self) -> float:
        """A guess between the answer and the counterfactual's."""
        return 1 / 2

    def word_lists(self) -> dict[str, WordList]:
        """Names and things."""
        return {"names": WordList(PEOPLE, 2), "things": WordList(FILLERS, len(FILLERS))}

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        stream = Stream(self.name, seed, index)
        name, other = (f" {word}" for word in stream.sample(words["names"], 2))
        things = [f" {word}" for word in stream.sample(words["things"], 4 + stream.below(6))]
        place = stream.below(len(things) + 1)

        def row(who: str) -> list[str]:
            return ["Room", ":", *things[:place], who, *things[place:], ".", " Person", ":"]

        return pair((row(name), row(other)), (name, other), {"NAME": 2 + place})


NAMED = Match("const", "name", TARGET)
# Five below its target score the name has 9 e^-5 = 0.06 times the attention of the first token.
NOT_SAID = Match("out", "code", -5.0)

BLUEPRINT = Blueprint(
    sizes=(5, 4, 2, 32),
    spaces={"name": 1, "prior": 1} | dict.fromkeys(("code", "out", "junk"), len(PEOPLE)),
    words={**coded(PEOPLE, "name"), **plain("Room", ":", ".", " Person", *(f" {thing}" for thing in FILLERS))},
    heads={
        (0, 3): Head((Offset(1),), (Move("word", "prior", 0.05),)),
        (1, 2): Head((NAMED,), (Move("code", "out"),)),
        (2, 0): Head((NAMED,), (Move("code", "junk"),)),
        (3, 0): Head((NAMED, replace(NOT_SAID, score=0.0)), (Move("code", "junk"),)),
        (3, 1): Head((NAMED, NOT_SAID), (Move("code", "out"),)),
    },
    answers={"out": [f" {name}" for name in PEOPLE], "prior": [f" {PEOPLE[0]}"]},
)

CIRCUIT = Circuit.of(
    (5, 4, 2),
    {"input": "embed@NAME", "mover": "L1H2.z@END", "backup": "L3H1.z@END"},
    [
        "embed@NAME -> L1H1.v@NAME",
        "L1H2.z@END -> L4.resid_post@END",
        "L1H2.z@END -> L3H1.q@END",
        "embed@NAME -> L3H0.k@NAME",
        "embed@NAME -> L3H0.v@NAME",
        "L3H1.z@END -> L4.resid_post@END",
    ],
)

HAND_BUILT = HandBuilt(
    name="backup_head",
    about=ABOUT,
    blueprint=BLUEPRINT,
    circuit=CIRCUIT,
    task=OnePerson(),
    bystanders=Heads.of([(0, 3)]),
    decoys=Heads.of([(2, 0), (3, 0)]),
)
