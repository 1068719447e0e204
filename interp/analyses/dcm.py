"""Which heads of a group carry a variable from a counterfactual prompt into the answer?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.circuit import Circuit
from interp.prompts import PromptPairs
from interp.results import analysis
from interp.sites import Heads
from interp.sweeps.mask_search import MaskSearchResult, check_circuit, check_targets, group_of, schedule_of, search
from interp.sweeps.masks import Ties

if TYPE_CHECKING:
    from interp.models import HookedModel


@dataclass(frozen=True, eq=False)
class DCMResult(MaskSearchResult):
    """The heads of a group that carry a variable; fields as in the base class."""


@analysis(version=2)
def dcm(
    model: HookedModel,
    prompts: PromptPairs,
    circuit: Circuit | None = None,
    *,
    group: Heads | str | None = None,
    penalty: float = 0.01,
    penalties: tuple[float, ...] = (),
    rate: float = 0.1,
    batch: int = 32,
    epochs: int = 2,
    ties: Ties = "more",
    control: int = 10,
    seed: int = 0,
) -> DCMResult:
    """Which heads of a group carry a variable from a counterfactual prompt into the answer?

    Desiderata-based component masking (Davies et al. 2023, arXiv 2307.03637; Prakash et al. 2024, arXiv 2402.14811). Every pair
    is a clean prompt, a counterfactual with another value of the variable, and a target: the distractor of the clean prompt, which
    is what the model says if the variable moves over. Of boxes, ``boxes(corrupt=object)``, ``label`` and ``position`` are such
    desiderata. Each head has a weight W in [0, 1], first 1, and in a run of the clean prompt its z at the group's position is
    ``W * own + (1 - W) * counterfactual``, where own already answers to what was mixed in earlier layers, and the other is
    taken at the counterfactual's own position. W is trained on ``-mean(logit of the target) + penalty * sum(1 - W)``; every four
    steps it is rounded and judged on validation prompts, and the best mask is kept. A mask that is no better there than doing
    nothing selects no heads.

    Accuracy is that of held-out prompts: the target is the most likely token. Beside it stand doing nothing, the whole group,
    and random heads of the group. Pairs to train on (half), to choose by and to judge by (a quarter each) share no context.

    Args:
        model: the model.
        prompts: pairs with distractors.
        circuit: a circuit that the group comes from, found on prompts of other contexts.
        group: heads at positions, ``L2H0,L2H3@END`` or ``heads@END``; one without a position is meant at END. By default every
            head of the upper half of the layers at END. Of a circuit: one of its roles, by default all its heads.
        penalty: what a selected head costs, in units of the logit.
        penalties: further penalties, each with a mask of its own.
        rate: of Adam.
        batch: prompts per step.
        epochs: how often every pair is trained on; more often where that makes fewer than 16 steps.
        ties: of masks that are right equally often on the validation prompts, keep the one with ``more`` heads, as in the paper, or
            with ``fewer``.
        control: draws of random heads.
        seed: of the split, the order of training and the random heads.

    Raises:
        InputError: pairs without a target or with the clean answer as one, too few contexts, heads or positions that are not there,
            or a setting out of range.
    """
    check_targets(prompts)
    check_circuit(circuit, prompts, model.shape)
    sites = group_of(group, model.shape, circuit)
    settings = {"rate": rate, "batch": batch, "epochs": epochs, "ties": ties, "seed": seed}
    schedules = [schedule_of(p, **settings) for p in dict.fromkeys((penalty, *penalties))]
    return DCMResult(**search(model, prompts, model, sites, schedules, control=control))
