"""What the study of laundry lists found: its rows, its tables and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.stats import bootstrap, paired_change, ratio_of_means, wilson

TRAINED = (3, 5)
"""Lengths that base has read."""
CHOSEN_ON = 7
"""Length on which heads and channels are chosen, on prompts that are not used again."""
EDITED = (7, 8, 9, 10)
WRITERS = 5
CHOICES = ("targeted", "overall", "scaling")
"""A point for every slot, which needs to know where the answer is; one point for all; one factor per channel for all."""


@dataclass
class Cell:
    """Answers to lists of one length and order: right among the options and as the most likely token; slot and template of each."""

    among: Tensor
    top: Tensor
    slot: Tensor
    template: tuple[str, ...]


@dataclass
class EditRow:
    """A set of things made stronger or weaker in weights, by the factor that was best on dev prompts.

    Attributes:
        what: the set.
        gain: the factor.
        plain: right as it is [prompt], on prompts that nothing was chosen on.
        edited: right with the edit.
        length: of each prompt's list.
        loss: losses of texts as they are and with the edit.
        others: task -> (right before, right after).
        draws: of controls the changes of accuracy, each with a factor of its own.
    """

    what: str
    gain: float
    plain: Tensor
    edited: Tensor
    length: Tensor
    loss: tuple[Tensor, Tensor]
    others: dict[str, tuple[Tensor, Tensor]]
    draws: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Found:
    """What is measured, in the order of the page.

    Attributes:
        cells: (length, order) -> answers.
        heads: what is chosen -> head: ``reader`` looks at the list most, ``writer`` writes the answer most.
        paid: head -> mean attention from END to the items, and to their second mentions.
        direct: head -> what it writes of the logit difference.
        channels: reader or writer -> components whose coefficients are steered.
        selected: reader or writer -> how many of them were chosen by their effects too.
        steered: (reader or writer, length, grid) -> steering.
        random: (reader or writer, length, grid) -> steering of as many random components of the same heads.
        edits: edits of weights.
        results: for the page.
    """

    cells: dict[tuple[int, str], Cell] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    paid: dict[str, tuple[float, float]] = field(default_factory=dict)
    direct: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, list[str]] = field(default_factory=dict)
    selected: dict[str, int] = field(default_factory=dict)
    steered: dict[tuple[str, int, str], Any] = field(default_factory=dict)
    random: dict[tuple[str, int, str], Any] = field(default_factory=dict)
    edits: list[EditRow] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


def share(hits: Tensor) -> str:
    """A proportion with its interval."""
    low, high = wilson(int(hits.sum()), len(hits))
    return f"{float(hits.double().mean()):.2f} [{low:.2f}, {high:.2f}]"


def change(plain: Tensor, steered: Tensor) -> str:
    """A change of a proportion on the same prompts, in points."""
    up, down, n = int((steered & ~plain).sum()), int((plain & ~steered).sum()), len(plain)
    low, high = paired_change(up, down, n)
    return f"{100 * (up - down) / n:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def accuracy_table(found: Found) -> str:
    """E1: by length, order and slot."""
    rows = [f"{'length, second mentions':26}{'n':>5}{'among options':>20}{'all tokens':>20}{'T1 T2 T3':>18}  by slot, from 1 (n of each)"]
    for (length, order), cell in found.cells.items():
        slots = [cell.among[cell.slot == s + 1].double() for s in range(length)]
        by_slot = " ".join(f"{float(x.mean()):.2f}" if len(x) else "-" for x in slots)
        kinds = [cell.among[torch.tensor([t == name for t in cell.template])].double() for name in ("T1", "T2", "T3")]
        by_kind = " ".join(f"{float(x.mean()):.2f}" if len(x) else "-" for x in kinds)
        sizes = sorted({len(x) for x in slots})
        name = f"{length}, {order}" + " (trained)" * (length in TRAINED)
        told = f"({sizes[0]}-{sizes[-1]})"
        rows.append(f"  {name:24}{len(cell.among):>5}{share(cell.among):>20}{share(cell.top):>20}{by_kind:>18}  {by_slot} {told}")
    return "\n".join(rows)


def heads_table(found: Found) -> str:
    """Where heads look from END, and what they write."""
    rows = [f"{'heads':12}{'to items':>10}{'to again':>10}{'writes of logit_diff':>26}   (length {CHOSEN_ON})"]
    order = sorted(found.direct, key=lambda h: -float(found.direct[h].mean()))
    for name in dict.fromkeys([*order[:WRITERS], *found.heads.values()]):
        told = [what for what, head in found.heads.items() if head == name]
        said = f"  {', '.join(told)}: {', '.join(found.channels[told[0]])}, {found.selected[told[0]]} by effect too" if told else ""
        items, again = found.paid[name]
        rows.append(f"  {name:10}{items:>10.2f}{again:>10.2f}{bootstrap(found.direct[name]).at():>26}{said}")
    return "\n".join(rows)


def steering_table(found: Found) -> str:
    """E2 and E3, E4 by steering: slots that can be reached, and answers at points chosen on dev prompts."""
    heads = "".join(f"{name:>24}" for name in ("slot known", "one point", "one factor"))
    rows = [f"{'steering, change of accuracy in points':40}{'slots':>9}{'random':>9}{'per prompt':>11}{heads}"]
    for (what, length, grid), result in found.steered.items():
        span = slice(length, None) if what == "writer" else slice(0, length)
        size, names = length - (what == "writer"), result.labels["channel"]
        kinds = (result.targeted, result.overall, result.scaling)
        cells = "".join(f"{change(*find(0)):>24}" for find in kinds)
        random = [reached(result, span, d) for d in range(1, len(result.attention))]
        drawn = f"{min(random)}-{max(random)}" if random else "-"
        best = result.attention[0][:, span].argmax(1)
        each = sum(len(column.unique()) for column in best.T) / best.shape[1]
        name = f"{length}: {found.heads[what]} {', '.join(n.removesuffix('@END') for n in names)}{' wide' * ('wide' in grid)}"
        rows.append(f"  {name:38}{f'{reached(result, span)} of {size}':>9}{drawn:>9}{each:>11.2f}{cells}")
        sets = [("random directions", [result] * len(random), list(range(1, 1 + len(random))))]
        if (other := found.random.get((what, length, grid))) is not None:
            sets.append(("random components", [other], [0]))
        for title, results, which in sets:
            gains = [[difference(*getattr(r, kind)(d)) for r, d in zip(results, which, strict=True)] for kind in CHOICES]
            told = "".join(f"{f'{100 * min(g):+.1f} to {100 * max(g):+.1f}':>24}" for g in gains if g)
            rows.append(f"    {title:36}{'':29}{told}")
    tested = sorted({int((~r.dev).sum()) for r in found.steered.values()})
    rows += [
        f"  judged on {tested[0]} to {tested[-1]} prompts that nothing was chosen on; slots: how many get the most attention somewhere,",
        f"  items of the list for {found.heads['reader']}, second mentions for {found.heads['writer']}; random: of random directions;",
        "  wide: 12 standard deviations instead of 3.",
    ]
    return "\n".join(rows)


def reached(result: Any, slots: slice, direction: int = 0) -> int:
    """How many of some slots get more attention than the others of them at some point, mean over prompts."""
    return len(result.attention[direction][:, slots].double().mean(-1).argmax(-1).unique())


def difference(plain: Tensor, steered: Tensor) -> float:
    """Of two shares."""
    return float(steered.double().mean() - plain.double().mean())


def edits_table(found: Found) -> str:
    """E4 in weights: the best factor, what it does to lists, to other text and to other tasks."""
    rows = ["edits of weights, the factor chosen on dev prompts; changes in points, of the loss in per cent"]
    for row in found.edits:
        by_length = " ".join(
            f"{length}: {float(row.plain[m].double().mean()):.2f} to {float(row.edited[m].double().mean()):.2f}"
            for length in EDITED
            for m in [row.length == length]
        )
        loss = ratio_of_means(row.loss[1] - row.loss[0], row.loss[0])
        told = f"{100 * float(loss.value):+.2f} [{100 * float(loss.low):+.2f}, {100 * float(loss.high):+.2f}]"
        rows.append(f"  {row.what}, times {row.gain:g}: {change(row.plain, row.edited)} (n = {len(row.plain)}; {by_length})")
        other = ", ".join(f"{task} {change(*both)}" for task, both in row.others.items())
        rows.append(f"    loss of {len(row.loss[0])} plain texts {told}; {other}")
        for name, draws in row.draws.items():
            rows.append(f"    {name}: {100 * min(draws):+.1f} to {100 * max(draws):+.1f} in {len(draws)} draws")
    return "\n".join(rows)


def verdict(found: Found) -> list[str]:
    """The answer, whatever it is."""
    lines = []
    known = [f"{length} {share(cell.among)}" for (length, order), cell in found.cells.items() if order == "shuffled"]
    lines.append(f"Accuracy among the options by length: {', '.join(known)}; base has read lengths {TRAINED[0]} and {TRAINED[1]}.")
    reader, writer = (found.heads[w] for w in ("reader", "writer"))
    where = "the second mentions" if found.paid[writer][1] > found.paid[writer][0] else "the items"
    wrote = {head: bootstrap(found.direct[head]).at() for head in (reader, writer)}
    lines.append(
        f"{reader} looks at the items most ({found.paid[reader][0]:.2f} of its attention) and writes {wrote[reader]} of the "
        f"logit difference; {writer} writes most of it ({wrote[writer]}) and looks at {where} ({max(found.paid[writer]):.2f})."
    )
    made = [(r, kind) for r in found.steered.values() for kind in CHOICES]
    clear = [1 for r, kind in made if _low(*getattr(r, kind)(0)) > 0]
    most = max((r.targeted(0) for r in found.steered.values()), key=lambda choice: difference(*choice))
    lines.append(
        f"Steering queries at END: {'found' if clear else 'not found'}; {len(clear)} of {len(made)} choices gain more than noise, and the "
        f"largest gain with the slot known (an upper bound) is {change(*most)} points."
    )
    best = max(found.edits, key=lambda row: difference(row.plain, row.edited))
    drawn = [x for row in found.edits for d in row.draws.values() for x in d]
    loss = ratio_of_means(best.loss[1] - best.loss[0], best.loss[0])
    worst = min(best.others, key=lambda task: difference(*best.others[task]))
    each = {n: change(best.plain[best.length == n], best.edited[best.length == n]) for n in best.length.unique().tolist()}
    by_length = "; ".join(f"length {n}: {told}" for n, told in each.items())
    text = f"{100 * float(loss.value):+.2f} % [{100 * float(loss.low):+.2f}, {100 * float(loss.high):+.2f}]"
    lines.append(
        f"Editing weights, one factor for all prompts: the largest gain is {change(best.plain, best.edited)} points with {best.what} "
        f"times {best.gain:g} ({by_length}); controls {100 * min(drawn):+.1f} to {100 * max(drawn):+.1f}. It changes the loss of other "
        f"text by {text} and, of other tasks, {worst} most, by {change(*best.others[worst])} points."
    )
    return lines


def _low(plain: Tensor, steered: Tensor) -> float:
    return paired_change(int((steered & ~plain).sum()), int((plain & ~steered).sum()), len(plain))[0]
