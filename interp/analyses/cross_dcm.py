"""Which heads of one model, set in the other, carry what they know?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from interp.circuit import Circuit
from interp.errors import InputError
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts
from interp.results import analysis
from interp.sites import Heads
from interp.sweeps.mask_search import MaskSearchResult, check_circuit, check_targets, group_of, schedule_of, search
from interp.sweeps.masks import Ties

if TYPE_CHECKING:
    from interp.models import ModelPair

Direction = Literal["tuned_to_base", "base_to_tuned"]
Output = Literal["receiver", "sender"]
Source = Literal["corrupt", "clean"]

_SIDES: dict[str, tuple[str, str]] = {"tuned_to_base": ("tuned", "base"), "base_to_tuned": ("base", "tuned")}


@dataclass(frozen=True, eq=False)
class CrossDCMResult(MaskSearchResult):
    """The heads of one model that carry a variable into the other.

    Attributes:
        direction: which model receives.
        output: whose W_O takes a head's z.
        source: which prompts the sender reads.
    """

    direction: Direction
    output: Output
    source: Source

    def told(self) -> str:
        """What is mixed in, in words."""
        sender, receiver = _SIDES[self.direction]
        what = f"z of {sender}" if self.output == "receiver" else f"what heads add in {sender}, through its own W_O,"
        return f"{what} on the {'counterfactual' if self.source == 'corrupt' else 'same prompts'} in {receiver}"


@analysis(version=2)
def cross_dcm(
    pair: ModelPair,
    prompts: Prompts | PromptPairs,
    circuit: Circuit | None = None,
    *,
    direction: Direction = "tuned_to_base",
    source: Source = "corrupt",
    output: Output = "receiver",
    group: Heads | str | None = None,
    penalty: float = 0.01,
    penalties: tuple[float, ...] = (),
    rate: float = 0.1,
    batch: int = 32,
    epochs: int = 2,
    ties: Ties = "more",
    control: int = 10,
    seed: int = 0,
) -> CrossDCMResult:
    """Which heads of one model, set in the other, carry what they know?

    As ``dcm`` (Davies et al. 2023, arXiv 2307.03637; Prakash et al. 2024, arXiv 2402.14811), but what heads are mixed with comes
    from the other model, the sender. With ``source="corrupt"`` it reads the counterfactuals, and the target is the distractor of
    the clean prompt: heads are found whose variable the receiver understands. With ``source="clean"`` it reads the same prompts, and
    the target is their answer: heads are found that bring the sender's skill along. Doing nothing then gives the receiver's own
    accuracy. Late heads already hold what earlier ones of the sender computed.

    Args:
        pair: the two models.
        prompts: pairs with distractors; with ``source="clean"`` prompts with answers do.
        circuit: a circuit that the group comes from, found on prompts of other contexts.
        direction: ``tuned_to_base`` mixes activations of tuned into base, ``base_to_tuned`` the other way.
        source: the prompts that the sender reads, ``corrupt`` or ``clean``.
        output: whose W_O takes a head's z, ``receiver`` or ``sender``.
        group: heads at positions, ``L2H0,L2H3@END`` or ``heads@END``; one without a position is meant at END. By default every
            head of the upper half of the layers at END. Of a circuit: one of its roles, by default all its heads.
        penalty: what a selected head costs, in units of the logit.
        penalties: further penalties, each with a mask of its own.
        rate: of Adam.
        batch: prompts per step.
        epochs: how often every pair is trained on; more often where that makes fewer than 16 steps.
        ties: of masks that are right equally often on the validation prompts, keep the one with ``more`` heads, or with ``fewer``.
        control: draws of random heads.
        seed: of the split, the order of training and the random heads.

    Raises:
        InputError: prompts without a target or with the clean answer as one, too few contexts, heads or positions that are not there,
            a pair that is not in memory as a whole, or a setting out of range.
    """
    for value, name, known in (
        (direction, "direction", tuple(_SIDES)),
        (output, "output", ("receiver", "sender")),
        (source, "source", ("corrupt", "clean")),
    ):
        if value not in known:
            raise unknown(name, str(value), known)
    if pair.one_at_a_time:
        raise InputError("cross_dcm needs both models in memory; load the pair with load='together'")
    pairs = prompts if isinstance(prompts, PromptPairs) else PromptPairs(prompts, prompts) if source == "clean" else prompts
    if source == "corrupt":
        check_targets(pairs)
    elif prompts.answers is None:
        raise InputError("source=clean asks for the answers of the prompts, and these have none")
    names = _SIDES[direction]
    sender, receiver = (getattr(pair, side) for side in names)
    check_circuit(circuit, prompts, receiver.shape)
    sites = group_of(group, receiver.shape, circuit)
    settings = {"rate": rate, "batch": batch, "epochs": epochs, "ties": ties, "seed": seed}
    schedules = [schedule_of(p, **settings) for p in dict.fromkeys((penalty, *penalties))]
    found = search(
        receiver,
        pairs,  # type: ignore[arg-type]
        sender,
        sites,
        schedules,
        component="z" if output == "receiver" else "result",
        source=source,
        control=control,
        names=(names[1], names[0]),
    )
    return CrossDCMResult(**found, direction=direction, output=output, source=source)
