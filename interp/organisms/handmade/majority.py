"""Majority of votes: a head that counts, an MLP that decides, a head that carries the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from interp.circuit import Circuit
from interp.organisms.handmade import HandBuilt
from interp.organisms.handmade.blueprint import HIT, REST, Blueprint, Head, Match, Move, Neuron, Offset, plain
from interp.sites import Heads
from interp.tasks.base import Example, Rules, Stream, Task, Words, balanced

VOTES = (5, 7, 9)
"""How many votes a prompt has."""

ABOUT = (
    "At the full stop a head of layer 0 looks at all votes alike and writes down the shares of yes and no. The MLP of layer 1 "
    "sharpens their difference into a verdict: a ramp that is steep around a draw. At END a head of layer 2 fetches the verdict "
    "from two tokens before. It is the model in which an MLP is a node."
)


@dataclass(frozen=True, kw_only=True)
class Majority(Task):
    """Some votes, yes and no: does the motion pass?

    Positions: ``SWING`` (as many votes of the majority as it is ahead by), ``STOP`` (the full stop behind the votes). The
    counterfactual has the opposite votes at SWING, which turns the majority round and leaves it as large.

    Attributes:
        ahead: by how many votes the majority wins.
    """

    ahead: int = 1

    name: ClassVar[str] = "majority"
    summary: ClassVar[str] = "Whether more votes are yes or no."
    paper: ClassVar[str] = "Lindner et al. 2023, arXiv 2301.05062"
    rules: ClassVar[Rules] = Rules(several=("SWING",))

    def __post_init__(self) -> None:
        """Refuse what the votes cannot give."""
        super().__post_init__()
        if self.ahead not in (1, 3):
            self._refuse("ahead", self.ahead, "1 or 3")

    @property
    def chance(self) -> float:
        """A guess between yes and no."""
        return 1 / 2

    def words(self) -> tuple[str, ...]:
        """The votes."""
        return (" yes", " no")

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        stream = Stream(str(self), seed, index)
        n = VOTES[balanced(len(VOTES), index // 2, self.name, seed)]
        winner, loser = (" yes", " no") if balanced(2, index, self.name, "winner", seed) else (" no", " yes")
        ahead = (n + self.ahead) // 2
        votes = stream.shuffled([winner] * ahead + [loser] * (n - ahead))
        swing = sorted(stream.sample([i for i, vote in enumerate(votes) if vote == winner], self.ahead))
        turned = [loser if i in swing else vote for i, vote in enumerate(votes)]
        context = " /".join(sorted("".join(v) for v in (votes, turned))).strip()

        def prompt(votes: list[str], answer: str, distractor: str, corrupt: Example | None) -> Example:
            begins = [len("Votes:" + "".join(votes[:i])) for i in range(n + 1)]
            at = tuple((begins[i] + 1, begins[i + 1]) for i in swing)
            spans = {"SWING": at, "STOP": ((begins[n], begins[n] + 1),)}
            text = "Votes:" + "".join(votes) + ". Passed:"
            return Example(text, answer, distractor, (" yes", " no"), spans, corrupt, context)

        return prompt(votes, winner, loser, prompt(turned, loser, winner, None))


# Seven votes together take the share HIT of the attention from the first token; five take 0.87, nine take 0.92.
VOTE = Match("const", "vote", REST + math.log(HIT / (1 - HIT) / 7))

# A ramp in x, the difference of the shares: silu(k (x + w)) - silu(k (x - w)) goes from 0 to 2 k w as x goes from -w to w.
# Width and steepness keep one vote of nine, x = 0.11, above a third of the way, and its slope alive where it is used.
STEEP, WIDTH = 8.0, 0.35


def ramp(sign: float, shift: float, coordinate: int) -> Neuron:
    """One of the two neurons of a ramp towards ``coordinate`` of the verdict, which rises with sign * x."""
    written = math.copysign(1 / (2 * STEEP * WIDTH), shift)
    gate = {"tally": (sign * STEEP, -sign * STEEP), "const": (STEEP * shift,)}
    return Neuron(gate, {"verdict": (written, 0.0) if coordinate == 0 else (0.0, written)})


BLUEPRINT = Blueprint(
    sizes=(3, 4, 2, 12),
    spaces={"vote": 1, "prior": 1} | dict.fromkeys(("ballot", "tally", "verdict", "out", "junk"), 2),
    words={" yes": {"vote": 0, "ballot": 0}, " no": {"vote": 0, "ballot": 1}, **plain("Votes", ":", ".", " Passed")},
    heads={
        (0, 0): Head((VOTE,), (Move("ballot", "junk"),)),
        (0, 1): Head((VOTE,), (Move("ballot", "tally"),)),
        (0, 3): Head((Offset(1),), (Move("word", "prior", 0.05),)),
        # The verdicts of yes and no are both between 0 and 1: this brings logits to where those of the other models are.
        (2, 2): Head((Offset(2),), (Move("verdict", "out", 1.6),)),
        (2, 3): Head((Offset(2),), (Move("verdict", "junk"),)),
    },
    neurons={1: (ramp(1, WIDTH, 0), ramp(1, -WIDTH, 0), ramp(-1, WIDTH, 1), ramp(-1, -WIDTH, 1))},
    answers={"out": [" yes", " no"], "prior": [" yes"]},
)

CIRCUIT = Circuit.of(
    (3, 4, 2),
    {"input": "embed@SWING", "count": "L0H1.z@STOP", "decide": "L1.mlp_out@STOP", "carry": "L2H2.z@END"},
    [
        "embed@SWING -> L0H0.v@SWING",
        "L0H1.z@STOP -> L1.resid_mid@STOP",
        "L1.mlp_out@STOP -> L2H1.v@STOP",
        "L2H2.z@END -> L2.resid_post@END",
    ],
)

HAND_BUILT = HandBuilt(
    name="majority",
    about=ABOUT,
    blueprint=BLUEPRINT,
    circuit=CIRCUIT,
    task=Majority(),
    bystanders=Heads.of([(0, 3)]),
    decoys=Heads.of([(0, 0), (2, 3)]),
)
