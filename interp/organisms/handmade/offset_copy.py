"""Copy at a fixed offset, in two hops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from interp.circuit import Circuit
from interp.organisms.handmade import HandBuilt
from interp.organisms.handmade.blueprint import Blueprint, Head, Move, Offset, coded, plain
from interp.organisms.handmade.lists import NOUNS, ListTask, pair
from interp.sites import Heads
from interp.tasks.base import Example, Stream, Words

HOPS = (2, 3)

ABOUT = (
    "The answer is the word five before the last. A head of layer 0 carries every word two tokens on, a head of layer 2 carries "
    "what arrived there another three: attention goes by place alone, and the two heads compose through values only."
)


@dataclass(frozen=True, kw_only=True)
class FiveBack(ListTask):
    """A list of different words: which one stands five before the last?

    Positions: ``SOURCE`` (the answer), ``RELAY`` (where it is handed on). The counterfactual has another word at SOURCE.
    """

    name: ClassVar[str] = "five_back"
    summary: ClassVar[str] = "Which word stands five before the last."
    paper: ClassVar[str] = "Lindner et al. 2023, arXiv 2301.05062"

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        stream = Stream(self.name, seed, index)
        other, *row = (f" {word}" for word in stream.sample(words["nouns"], 8 + stream.below(6)))
        source = len(row) - 1 - sum(HOPS)
        clean, corrupt = ["Words", ":", *row], ["Words", ":", *row[:source], other, *row[source + 1 :]]
        return pair((clean, corrupt), (row[source], other), {"SOURCE": 2 + source, "RELAY": 2 + source + HOPS[0]})


BLUEPRINT = Blueprint(
    sizes=(3, 5, 5, 24),
    spaces={"prior": 1} | dict.fromkeys(("code", "relay", "out", "junk"), len(NOUNS)),
    words={**coded(NOUNS), **plain("Words", ":")},
    heads={
        (0, 0): Head((Offset(1),), (Move("word", "prior", 0.05),)),
        (0, 2): Head((Offset(1),), (Move("code", "junk"),)),
        (0, 3): Head((Offset(HOPS[0]),), (Move("code", "relay"),)),
        (1, 4): Head((Offset(HOPS[1]),), (Move("relay", "junk"),)),
        (2, 1): Head((Offset(HOPS[1]),), (Move("relay", "out"),)),
    },
    answers={"out": [f" {noun}" for noun in NOUNS], "prior": [f" {NOUNS[0]}"]},
)

CIRCUIT = Circuit.of(
    (3, 5, 5),
    {"input": "embed@SOURCE", "first_hop": "L0H3.z@RELAY", "second_hop": "L2H1.z@END"},
    ["embed@SOURCE -> L0H3.v@SOURCE", "L0H3.z@RELAY -> L2H1.v@RELAY", "L2H1.z@END -> L2.resid_post@END"],
)

HAND_BUILT = HandBuilt(
    name="offset_copy",
    about=ABOUT,
    blueprint=BLUEPRINT,
    circuit=CIRCUIT,
    task=FiveBack(),
    bystanders=Heads.of([(0, 0)]),
    decoys=Heads.of([(0, 2), (1, 4)]),
)
