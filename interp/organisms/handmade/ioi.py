"""Duplicate token -> inhibition -> copy: indirect object identification (Wang et al. 2023, arXiv 2211.00593) in small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from interp.circuit import Circuit
from interp.organisms.handmade import HandBuilt
from interp.organisms.handmade.blueprint import TARGET, Blueprint, Head, Match, Move, Offset, coded, plain
from interp.sites import Heads
from interp.tasks.base import Example, Stream, Task, Words, balanced, fill
from interp.tasks.words import NAMES, PLACES, THINGS, WordList

PEOPLE = NAMES[:12]
TEMPLATE = "When {first} and {second} met at the {place}, {S2} gave a {thing} to"

ABOUT = (
    "At S2 a duplicate head finds the earlier mention of the same name and writes down that name. At END two inhibition heads, "
    "which share their keys and values, look at S2 and carry the name on; the mover, which looks at every name of the first "
    "clause, is turned away from the one they carry and copies the other. That S2 is the name of the second clause is marked by a "
    "head that sees the comma before it: it is the same in every prompt, so no patch between prompts shows it."
)


@dataclass(frozen=True, kw_only=True)
class SmallIOI(Task):
    """Two people are named, one of them (S) acts; the other (IO) receives. Which name comes next?

    Positions: ``IO``, ``S1``, ``S2``. Half of the prompts name IO first. The counterfactual writes IO in place of S2,
    which makes S the answer and differs in that one token.
    """

    name: ClassVar[str] = "small_ioi"
    summary: ClassVar[str] = "Which of two named people receives something: not the one who gives."
    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2211.00593"

    @property
    def chance(self) -> float:
        """A guess between the two names."""
        return 1 / 2

    def word_lists(self) -> dict[str, WordList]:
        """Names, places and things."""
        return {"names": WordList(PEOPLE, 2), "places": WordList(PLACES, 1), "things": WordList(THINGS, 1)}

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        stream = Stream(self.name, seed, index)
        io, s = stream.sample(words["names"], 2)
        io_first = bool(balanced(2, index, self.name, seed))
        first, second = (io, s) if io_first else (s, io)
        nouns = {"place": stream.choice(words["places"]), "thing": stream.choice(words["things"])}

        def prompt(actor: str, other: str, corrupt: Example | None) -> Example:
            text, at = fill(TEMPLATE, {"first": first, "second": second, "S2": actor, **nouns})
            places = (at["first"], at["second"]) if io_first else (at["second"], at["first"])
            spans = {"IO": (places[0],), "S1": (places[1],), "S2": (at["S2"],)}
            tags = {"order": "ABBA" if io_first else "BABA"}
            return Example(text, f" {other}", f" {actor}", (f" {io}", f" {s}"), spans, corrupt, " ".join(sorted((io, s))), tags)

        return prompt(s, io, prompt(io, s, None))


NAMED = Match("const", "name", TARGET)
ACTOR, NOT_ACTOR = Match("const", "actor", TARGET), Match("const", "actor", -TARGET)
SAME_NAME = Match("code", "code", TARGET)
# Six below its target score a name gets e^-6 of what it had, and the other name the attention of both.
INHIBITED = Match("inhibit", "code", -6.0)
INHIBITION = (0.6, 0.4)

BLUEPRINT = Blueprint(
    sizes=(4, 6, 3, 32),
    spaces={"name": 1, "comma": 1, "actor": 1, "prior": 1} | dict.fromkeys(("code", "twice", "inhibit", "out", "junk"), len(PEOPLE)),
    words={
        **coded(PEOPLE, "name"),
        ",": {"comma": 0},
        **plain("When", " and", " met", " at", " the", " gave", " a", " to", *(f" {word}" for word in (*PLACES, *THINGS))),
    },
    heads={
        (0, 0): Head((Offset(1),), (Move("code", "junk"),)),
        (0, 2): Head((Offset(1),), (Move("comma", "actor"),)),
        (0, 4): Head((Offset(1),), (Move("word", "prior", 0.05),)),
        # At S2 itself the name matches too; it is the actor, and the earlier mention is wanted.
        (1, 4): Head((SAME_NAME, NOT_ACTOR), (Move("code", "twice"),)),
        (1, 5): Head((SAME_NAME, NOT_ACTOR), (Move("code", "junk"),)),
        (2, 0): Head((ACTOR,), (Move("twice", "inhibit", INHIBITION[0]),)),
        (2, 1): Head((ACTOR,), (Move("twice", "inhibit", INHIBITION[1]),)),
        (2, 3): Head((ACTOR,), (Move("code", "junk"),)),
        (3, 2): Head((NAMED, NOT_ACTOR, INHIBITED), (Move("code", "out"),)),
        (3, 3): Head((NAMED, NOT_ACTOR, INHIBITED), (Move("code", "junk"),)),
    },
    answers={"out": [f" {name}" for name in PEOPLE], "prior": [f" {PEOPLE[0]}"]},
)

CIRCUIT = Circuit.of(
    (4, 6, 3),
    {"input": "embed@S2", "duplicate": "L1H4.z@S2", "inhibition": ("L2H0.z@END", "L2H1.z@END"), "mover": "L3H2.z@END"},
    [
        "embed@S2 -> L1H4.q@S2",
        "L1H4.z@S2 -> L2H0.v@S2",  # key/value head 0, of both inhibition heads
        "L2H0.z@END -> L3H2.q@END",
        "L2H1.z@END -> L3H2.q@END",
        "L3H2.z@END -> L3.resid_post@END",
    ],
)

HAND_BUILT = HandBuilt(
    name="ioi",
    about=ABOUT,
    blueprint=BLUEPRINT,
    circuit=CIRCUIT,
    task=SmallIOI(),
    bystanders=Heads.of([(0, 2), (0, 4)]),
    decoys=Heads.of([(0, 0), (1, 5), (2, 3), (3, 3)]),
)
