"""What the study of channels found: its rows, its tables and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.sites import Site
from interp.stats import Estimate, bootstrap, resample_counts

THROUGH = ("receiver", "heads", "all")
"""Who reads the change: one input of one receiver; queries, keys and values of all later heads, but no MLP; everybody."""
SAID = ("that input of the receiver alone", "all inputs of all later heads, but no MLP", "everybody")
LEVEL, LEAST = 0.05, 0.01
"""Level of the intervals, and the share of the logit difference that an effect which counts has at least."""
SHOWN = 2
"""Components of each channel in the table."""


@dataclass(frozen=True)
class Asked:
    """One sender, and one input of a receiver.

    Attributes:
        task: whose prompts.
        sender: a head at a token.
        receiver: a later head.
        kind: ``q``, ``k`` or ``v``.
        why: where the pair comes from.
    """

    task: str
    sender: Site
    receiver: Site
    kind: str
    why: str

    @property
    def title(self) -> str:
        """As in ``L1H5@END -> L3H2.v``."""
        return f"{head_name(self.sender)}@{self.sender.position} -> {head_name(self.receiver)}.{self.kind}"


@dataclass(frozen=True, eq=False)
class Line:
    """What was found for one of them. A unit is a component, or several whose strengths are nearly equal: those go together.

    Attributes:
        asked: the pair.
        units: components of each.
        score: from weights.
        z: of the score, beside random directions.
        place: of the score among the components of all earlier heads.
        rivals: how many those are.
        effect: what deleting a unit takes from the logit difference [through unit context].
        head: the same of all that the sender writes [through context].
        random: the same of random directions [through draw context].
        attention: what deleting a unit takes from the receiver's attention from END, through that input alone [unit context].
        looked: to which token that is: the sender's, or one of ``LOOKED_AT``.
        intact: the logit difference [context].
        note: of the runs.
    """

    asked: Asked
    units: tuple[tuple[int, ...], ...]
    score: Tensor
    z: Tensor
    place: Tensor
    rivals: int
    effect: Tensor
    head: Tensor
    random: Tensor
    attention: Tensor
    looked: str
    intact: Tensor
    note: str

    def name(self, unit: int) -> str:
        """As in ``L1H5.0`` or ``L1H5.0-3``."""
        ranks = self.units[unit]
        return f"{head_name(self.asked.sender)}.{ranks[0]}" + (f"-{ranks[-1]}" if len(ranks) > 1 else "")

    @property
    def order(self) -> list[int]:
        """Units by score, best first."""
        return self.score.argsort(descending=True, stable=True).tolist()

    def best(self, through: int) -> int:
        """The unit with the largest effect."""
        return int(self.effect[through].mean(-1).abs().argmax())

    def agreement(self, through: int, seed: int = 0) -> Estimate | None:
        """Spearman correlation of scores and sizes of mean effects; the interval resamples contexts. None for fewer than four units."""
        values = self.effect[through].T  # [context unit]
        if len(self.units) < 4 or float(values.abs().max()) == 0:
            return None
        drawn = resample_counts(len(values), seed) @ values / len(values)
        mine = _ranks(self.score)
        value, many = _correlation(mine, _ranks(values.mean(0).abs())), _correlation(mine, _ranks(drawn.abs()))
        low, high = many.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return Estimate(value, low, high)

    def holds(self, through: int, *, tests: int = 1, seed: int = 0) -> bool:
        """Whether the best score's unit matters: beyond noise, corrected for so many tests, and every random one, with LEAST at least."""
        values = self.effect[through, self.order[0]]
        ends, drawn = bootstrap(values, seed=seed, level=1 - LEVEL / tests), self.random[through].mean(-1).abs()
        beyond, size = float(ends.low) > 0 or float(ends.high) < 0, abs(float(values.mean()))
        return beyond and size > float(drawn.max()) and size >= LEAST * abs(float(self.intact.mean()))


@dataclass
class Measured:
    """Everything, in the order of the page.

    Attributes:
        lines: of the model.
        written: of models written by hand.
        results: circuits, roles and compositions.
        roles: what heads were found for roles on random tokens.
        sizes: prompts and contexts of each task.
        seed: of everything random.
    """

    lines: list[Line] = field(default_factory=list)
    written: list[tuple[str, Line]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    roles: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    seed: int = 0


def table(lines: Sequence[Line], title: str, seed: int = 0) -> str:
    """Of every channel the components with the best scores, and the one with the largest effect; then all, and the controls."""
    heads = "".join(f"{f'effect, {what}':>28}" for what in ("receiver only", "heads only", "all readers"))
    rows = [f"{title:40}{'score':>7}{'z':>7}{'place':>9}{heads}{'attention':>11}  to"]
    for line in lines:
        rows.append(f"{line.asked.task}: {line.asked.title} ({line.asked.why}; logit difference {float(line.intact.mean()):.2f})")
        for unit in dict.fromkeys([*line.order[:SHOWN], line.best(0)]):
            cells = f"{float(line.score[unit]):>7.3f}{float(line.z[unit]):>7.1f}{f'{int(line.place[unit])}/{line.rivals}':>9}"
            cells += "".join(f"{interval(values[unit], seed):>28}" for values in line.effect)
            where = "by score" if unit in line.order[:SHOWN] else "largest effect"
            rows.append(f"  {f'{line.name(unit)} ({where})':38}{cells}{float(line.attention[unit].mean()):>+11.3f}  {line.looked}")
        more = {f"all that {head_name(line.asked.sender)} writes there": [interval(values, seed) for values in line.head]}
        more[f"{line.random.shape[1]} random directions"] = [_range(values.mean(-1)) for values in line.random]
        if len(line.units) > 1:
            more[f"its {len(line.units) - 1} other components"] = [_range(values[line.order[1:]].mean(-1)) for values in line.effect]
        agreed = [line.agreement(t, seed) for t in range(len(THROUGH))]
        more["Spearman of score and |effect|"] = ["-" if a is None else a.at() for a in agreed]
        rows += [f"  {name:38}{'':23}" + "".join(f"{cell:>28}" for cell in cells) for name, cells in more.items()]
    return "\n".join(rows)


def compact(lines: Sequence[tuple[str, Line]], seed: int = 0) -> str:
    """One row per channel of models written by hand: all that the sender writes has one strength, and goes together."""
    rows = [f"{'models written by hand':50}{'score':>7}{'place':>9}{'effect, receiver only':>28}{'effect, all readers':>28}"]
    for name, line in lines:
        unit = line.order[0]
        cells = f"{float(line.score[unit]):>7.3f}{f'{int(line.place[unit])}/{line.rivals}':>9}"
        cells += "".join(f"{interval(line.effect[t, unit], seed):>28}" for t in (0, -1))
        rows.append(f"  {f'{name}: {line.asked.title} ({line.asked.why})':48}{cells}")
    return "\n".join(rows)


def verdict(found: Measured, model: str) -> list[str]:
    """The answer, whatever it is."""
    sizes = [f"{task}: {n} prompts of {contexts} contexts" for task, (n, contexts) in found.sizes.items()]
    lines = [f"Prompts that the searches did not see: {'; '.join(sizes)}; intervals are 95 % over contexts."]
    lines += [told(found.lines, t, what, found.seed) for t, what in enumerate(SAID)]
    if absent := [role.replace("_", "-") for role, heads in found.roles.items() if not heads]:
        lines.append(f"No {' and no '.join(absent)} head is in {model}, so no such channel could be tried.")
    right = [x for _, x in found.written if x.asked.why == "written"]
    wrong = [x for _, x in found.written if x.asked.why != "written"]
    if right:
        hits = sum(x.holds(0, tests=len(right), seed=found.seed) and int(x.place[x.order[0]]) == 1 for x in right)
        silent = sum(float(x.effect[0].abs().max()) <= 1e-4 * float(x.intact.abs().mean()) for x in wrong)
        lines.append(
            f"In models written by hand {hits} of {len(right)} written channels are first by score and carry the answer through that "
            f"input; {silent} of {len(wrong)} other inputs of the same receivers carry nothing."
        )
    return lines


def told(lines: Sequence[Line], through: int, what: str, seed: int = 0) -> str:
    """How often the score found a component that matters, and whether the two go together."""
    clear = [x for x in lines if x.holds(through, tests=len(lines), seed=seed)]
    first = [x for x in lines if x.order[0] == x.best(through)]
    ways = [a for x in lines if (a := x.agreement(through, seed)) is not None]
    above, below = sum(float(a.low) > 0 for a in ways), sum(float(a.high) < 0 for a in ways)
    middle = f"{float(torch.stack([a.value for a in ways]).median()):.2f}" if ways else "-"
    start = f"{'found' if clear else 'not found'} in {len(clear) if clear else 'any'} of {len(lines)} channels"
    names = [
        f"{x.name(x.order[0])} -> {head_name(x.asked.receiver)}.{x.asked.kind} in {x.asked.task}: "
        f"{interval(x.effect[through, x.order[0]], seed)} of {float(x.head[through].mean()):+.3f} for all that its head writes"
        for x in clear
    ]
    listed = f" ({'; '.join(names)})" if names else ""
    return (
        f"Deleted for {what}: {start}{listed}; found means that the component with the best score has an effect beyond noise, "
        f"corrected for all channels, beyond every random direction, and of {LEAST:.0%} of the logit difference or more. That component is "
        f"the one with the largest effect in {len(first)} of {len(lines)}. Spearman of score and |effect| is {middle} in the median, above "
        f"0 in {above} of {len(ways)} and below 0 in {below} (95 % intervals)."
    )


def interval(values: Tensor, seed: int = 0) -> str:
    """A mean over contexts with its interval."""
    found = bootstrap(values, seed=seed)
    return f"{float(found.value):+.3f} [{float(found.low):+.3f}, {float(found.high):+.3f}]"


def head_name(site: Site) -> str:
    """As in ``L1H5``."""
    return f"L{site.layer}H{site.head}"


def _range(values: Tensor) -> str:
    return f"{float(values.min()):+.3f} to {float(values.max()):+.3f}"


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(-1).argsort(-1).double()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
