"""What analyses of circuits ask first: is an answer right and by how much, is the circuit one of other prompts, which are its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuit import Circuit
from interp.errors import InputError
from interp.metrics import Metric, Reader, Targets
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.sites import Site
from interp.stats import Estimate, bootstrap, recovered, wilson
from interp.sweeps.plain import run

if TYPE_CHECKING:
    from interp.models import HookedModel

Among = Literal["vocabulary", "options"]
AMONG = ("vocabulary", "options")


def margin(prompts: Prompts, among: Among = "vocabulary") -> Reader:
    """logit(answer) - the largest other logit, at END: an answer is right where that is above 0 (a tie is wrong).

    One number that says both whether the answer is on top and by how much, so that a sweep need not run twice.

    Args:
        prompts: with answers.
        among: other logits of the whole ``vocabulary``, or of the ``options`` of each prompt.

    Raises:
        InputError: prompts without answers, or without at least two options each.
    """
    if among not in AMONG:
        raise unknown("among", str(among), AMONG)
    if prompts.answers is None:
        raise InputError("these prompts have no one-token answers to score")
    targets, columns = Targets(torch.tensor(prompts.answers)), None
    if among == "options":
        others = [[o for o in dict.fromkeys(own) if o != a] for a, own in zip(prompts.answers, _options(prompts), strict=True)]
        widest = max(map(len, others))
        # Shorter rows repeat an option, which leaves the largest as it is.
        columns = torch.tensor([[a, *o, *o[:1] * (widest - len(o))] for a, o in zip(prompts.answers, others, strict=True)])
    function, unit = (_margin if columns is None else _first_margin), f"logit(answer) - largest other among {among}"
    return Reader(Metric(f"margin among {among}", function, unit, needs=("answers",)), targets, columns)  # the name tells sweeps apart


def _options(prompts: Prompts) -> Sequence[Sequence[int]]:
    if prompts.options is None or any(len(set(o)) < 2 for o in prompts.options):
        raise InputError("among=options needs at least two options for every prompt, and these prompts have fewer; use among=vocabulary")
    return prompts.options


def _first_margin(read: Tensor, targets: Targets) -> Tensor:
    return read[:, 0] - read[:, 1:].amax(-1)


def _margin(logits: Tensor, targets: Targets) -> Tensor:
    assert targets.answers is not None
    if int(targets.answers.max()) >= logits.shape[1]:
        raise InputError(f"answer token {int(targets.answers.max())} is outside the vocabulary of {logits.shape[1]} tokens")
    answers = targets.answers[:, None]
    return logits.gather(1, answers)[:, 0] - logits.scatter(1, answers, -torch.inf).amax(-1)


def readers(prompts: Prompts | PromptPairs, metric: Metric | str, among: Among) -> dict[str, Reader]:
    """What has to be read: the margin, and the metric where it is another one.

    Raises:
        InputError: as ``margin``; or a metric that compares with another run.
    """
    asked = clean_prompts(prompts)
    judge, found = Metric.parse(metric), {"margin": margin(asked, among)}
    if judge.needs_reference:
        raise InputError(f"the metric {judge} compares with another run; here it is one of answers, such as logit_diff or answer_logprob")
    return found if str(judge) == "accuracy" else found | {str(judge): judge.reader(prompts)}


def measures(values: Sequence[Tensor]) -> Float[Tensor, "measure ..."]:
    """What ``readers`` gave, with the accuracy in front: [accuracy, margin, metric]."""
    return torch.stack([(values[0] > 0).to(values[0]), *values])


def names(read: Mapping[str, Reader]) -> tuple[str, ...]:
    """Names of the measures."""
    return ("accuracy", *read)


def above_chance(prompts: Prompts | PromptPairs, models: Mapping[str, HookedModel]) -> None:
    """Refuse prompts on which no model can be told from a guess among the options; without options that is not known.

    Raises:
        InputError: it says how often each is right.
    """
    asked = clean_prompts(prompts)
    if asked.options is None or asked.answers is None or any(len(set(o)) < 2 for o in asked.options):
        return
    chance, n = sum(1 / len(set(o)) for o in asked.options) / len(asked), len(asked)
    right = {name: int((run(m, m.batch(asked), margin(asked, "options")) > 0).sum()) for name, m in models.items()}
    if all(wilson(k, n, level=0.9)[0] <= chance for k in right.values()):  # one-sided at 5 %
        told = " and ".join(f"{name} {k} of {n}" for name, k in right.items())
        raise InputError(
            f"no model does this task: among the options of {n} prompts, {told} are right, and a guess gives {chance:.0%}; take another "
            "task, or more prompts"
        )


def unseen(prompts: Prompts | PromptPairs, circuit: Circuit, name: str = "the circuit") -> None:
    """Refuse prompts that a circuit was found on.

    Raises:
        InputError: they share contexts.
    """
    shared = set(prompts.contexts) & set(circuit.contexts)
    if shared or circuit.prompts == prompts.digest:
        which = f"{len(shared)} of their contexts, such as {min(shared)[:60]!r}, were seen there" if shared else "they are the same ones"
        raise InputError(f"{name} was found on these prompts ({which}); take others, as prompts.split() gives")


def head_groups(circuit: Circuit, name: str = "the circuit") -> dict[str, tuple[Site, ...]]:
    """Role -> its heads, each at its position; heads without a role are together by position.

    Raises:
        InputError: the circuit has no heads.
    """
    found: dict[str, tuple[Site, ...]] = {}
    for node in heads_of(circuit, name):
        group = circuit.roles.get(node) or ("no role" if circuit.roles else "heads") + (
            "" if node.position is None else f"@{node.position}"
        )
        found[group] = (*found.get(group, ()), node)
    return found


def heads_of(circuit: Circuit, name: str = "the circuit") -> tuple[Site, ...]:
    """The heads of a circuit.

    Raises:
        InputError: it has none.
    """
    heads = tuple(node for node in circuit.nodes if node.component == "z" and node.head is not None)
    if not heads:
        raise InputError(f"{name} has no attention heads among its {len(circuit.nodes)} nodes")
    return heads


def share(patched: Tensor, start: Tensor, goal: Tensor, *, of_answers: bool, seed: int) -> Estimate:
    """How far a measure gets from ``start`` to ``goal``, as ``stats.recovered``, with an interval that has a width.

    Where every prompt follows alike, each resample gives the same, however few they are. Of answers, which are 0 or 1, the interval is
    then Wilson's for so many that follow of so many that differ; of other measures it is left as it is: there is nothing left that varies.

    Args:
        patched: [prompt, ...].
        start: [prompt].
        goal: [prompt].
        of_answers: the measure is the accuracy.
        seed: of the resampling.
    """
    found = recovered(patched, start, goal, seed=seed)
    if not of_answers or found.refused:
        return found
    differ = round(abs(float((goal - start).double().sum())))
    low, high = found.low.clone(), found.high.clone()
    flat = zip(found.value.reshape(-1).tolist(), low.view(-1), high.view(-1), strict=True)
    for value, below, above in flat:
        if float(below) == float(above) and value in (0.0, 1.0):
            ends = wilson(round(value * differ), differ)
            below.fill_(ends[0])
            above.fill_(ends[1])
    return Estimate(found.value, low, high)


def means(values: Tensor, *, of_answers: bool, seed: int) -> Estimate:
    """Means over prompts, [prompt, ...], with 95 % intervals: Wilson's of answers, which has a width if all are alike, else resampled."""
    if not of_answers:
        return bootstrap(values, seed=seed)
    n, right = len(values), values.double().sum(0)
    ends = torch.tensor([wilson(round(k), n) for k in right.reshape(-1).tolist()], dtype=torch.float64)
    return Estimate(right / n, ends[:, 0].reshape(right.shape), ends[:, 1].reshape(right.shape))
