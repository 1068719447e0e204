"""Does `base` find the item left over by channels that can be steered (after Merullo et al. 2024, "Talking Heads", arXiv 2406.09519)?

Accuracy by length of the list and by slot; which heads look at the list and which write the answer; the channels into both, chosen by
composition scores and by effects; where these heads look when one, two or three channels are set to every point of a grid, and what that
does to the answers; one factor for all prompts instead, as an edit of weights; random directions, random components and other heads as
controls; and what the edits do to other text and other tasks. The paper reports gains that are often more than 20 %, in GPT-2 small.

    python studies/laundry_list.py [--out results/laundry_list] [--n 72] [--quick]

Writes ``laundry_list.html`` and prints the tables. About six minutes on one core, half a one with ``--quick``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from laundry_tables import (
    CHOSEN_ON,
    EDITED,
    WRITERS,
    Cell,
    EditRow,
    Found,
    accuracy_table,
    edits_table,
    heads_table,
    steering_table,
    verdict,
)
from torch import Tensor

import interp
from interp.analyses.intruder_scaling import losses
from interp.edits import Edit, WeightChange
from interp.metrics import Metric
from interp.models import HookedModel
from interp.models.channels import channel_edit
from interp.models.heads import folded_heads
from interp.models.steered import Channels, Look, Steered, Ways
from interp.prompts import PromptPairs
from interp.roles import attention_from, direct_effect, named
from interp.sites import Site
from interp.sweeps.answers import margin
from interp.sweeps.channels import generator, random_directions, sweep

MODEL, TASK = "base", "laundry_list"
LENGTHS, ORDERS = tuple(range(2, 11)), ("shuffled", "same")
STEERED = (5, 7, 9)
GRIDS: dict[str, tuple[int, int, float, tuple[float, ...]]] = {
    "1": (1, 7, 3.0, (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)),
    "2": (2, 5, 3.0, (0.0, 1.0, 2.0, 4.0)),
    "2, wide": (2, 5, 12.0, (1.0, 8.0)),
    "3": (3, 5, 3.0, (0.0, 1.0, 4.0)),
}
"""Channels steered together, points per channel, how far in standard deviations, and factors."""
GAINS = (0.0, 0.5, 1.5, 2.0, 4.0, 8.0)
LEAST_DAMAGE = 0.02
OTHERS = ("ioi", "facts", "arithmetic", "colored_objects")


# -------------------------------------------------------------------------------------------- prompts, E1


def lists(model: HookedModel, n: int, length: int, seed: int, order: str = "shuffled", without: Sequence[str] = ()) -> PromptPairs:
    """Lists of one length, each set of items once, and none of those that were used elsewhere."""
    pairs: Any = interp.task(f"{TASK}(length={length}, order={order})").generate(model, n=n, seed=seed)
    seen = set(without)
    kept = [i for i, context in enumerate(pairs.contexts) if not (context in seen or seen.add(context))]
    if len(kept) < 4:
        raise interp.InputError(f"fewer than four of {n} lists of length {length} are new; take more")
    return pairs[kept]


def answered(model: HookedModel, pairs: PromptPairs) -> Cell:
    """Which are answered."""
    logits = model.logits(model.batch(pairs.clean), at="END").cpu()
    among, top = (margin(pairs.clean, kind)(logits) > 0 for kind in ("options", "vocabulary"))  # type: ignore[arg-type]
    return Cell(among, top, torch.tensor([int(s) for s in pairs.clean.tags["slot"]]), pairs.clean.tags["template"])


# ----------------------------------------------------------------------------------- heads and channels


def choose(model: HookedModel, pairs: PromptPairs, found: Found, seed: int, draws: int) -> None:
    """Heads behind the first layer, by where they look and by what they write; then channels into their queries."""
    batch = model.batch(pairs.clean)
    attention = attention_from(model, batch, "END")
    items, again = ((attention * named(batch, name)[:, None, None]).sum(-1).mean(0) for name in ("items", "again"))
    direct = direct_effect(model, batch, Metric.parse("logit_diff").reader(pairs)).double()
    for layer in range(model.shape.n_layers):
        for head in range(model.shape.n_heads):
            name = f"L{layer}H{head}"
            found.paid[name] = (float(items[layer, head]), float(again[layer, head]))
            found.direct[name] = direct[layer, head]
    later = [name for name in found.paid if not name.startswith("L0")]
    found.heads = {"reader": max(later, key=lambda h: found.paid[h][0]), "writer": max(later, key=lambda h: float(found.direct[h].mean()))}
    for what, (to, away) in {"reader": ("target", "distractor"), "writer": ("again", "items")}.items():
        channels_into(model, pairs, what, to, away, found, seed, draws)


def channels_into(model: HookedModel, pairs: PromptPairs, what: str, to: str, away: str, found: Found, seed: int, draws: int) -> None:
    """Three components: first those chosen by score and effect, then by score alone; of single directions."""
    mover = found.heads[what]
    composed: Any = interp.composition(model, kind="q", receivers=mover, draws=100, seed=seed)
    by_score = [name for name in (c.split(" -> ")[0] for c in composed.top(8).channel) if "-" not in name]
    senders = ",".join(dict.fromkeys(name.partition(".")[0] for name in by_score[:6]))
    effects: Any = interp.channel_effects(model, pairs, senders=senders, movers=mover, to=to, away=away, draws=draws, seed=seed)
    table = effects.to_frame().set_index("channel")
    chosen = sorted(effects.names(), key=lambda name: -abs(float(table.effect[name])))
    found.channels[what] = list(dict.fromkeys([*chosen, *by_score]))[:3]
    found.selected[what] = min(3, len(chosen))
    found.results += [composed, effects]


# -------------------------------------------------------------------------------------------- steering


def steer(model: HookedModel, pairs: PromptPairs, what: str, length: int, grid: str, found: Found, *, draws: int, seed: int) -> None:
    """Some channels at once, and of one or two as many random components of the same heads."""
    k, points, span, factors = GRIDS[grid]
    names, mover = found.channels[what][:k], found.heads[what]
    slots = tuple(f"item{i + 1}" for i in range(length)) + tuple(f"again{i + 1}" for i in range(length - 1)) * (what == "writer")
    settings: dict[str, Any] = {"mover": mover, "grid": points, "span": span, "factors": factors, "slots": slots, "seed": seed}
    found.steered[what, length, grid] = interp.channel_steering(model, pairs, channels=", ".join(names), draws=draws, **settings)
    if k < 3:
        others = ", ".join(random_components(model, names, generator("laundry_list", seed, k)))
        found.random[what, length, grid] = interp.channel_steering(model, pairs, channels=others, draws=0, **settings)


def random_components(model: HookedModel, names: Sequence[str], draws: torch.Generator) -> list[str]:
    """As many other components of the same heads."""
    taken = list(names)
    for name in names:
        head = name.partition(".")[0]
        others = [f"{head}.{r}" for r in range(model.shape.d_head) if f"{head}.{r}" not in taken]
        taken.append(others[int(torch.randint(len(others), (), generator=draws))])
    return taken[len(names) :]


# ------------------------------------------------------------------------------------- edits of weights


def of_components(model: HookedModel, names: Sequence[str]) -> Callable[[float], Edit]:
    """The edit that multiplies components."""
    return lambda gain: channel_edit(model, list(names), scale=gain, where="weights")


def of_heads(model: HookedModel, names: Sequence[str]) -> Callable[[float], Edit]:
    """The edit that multiplies all that heads write."""

    def edit(gain: float) -> Edit:
        sites = [Site.parse(f"{name}.W_O") for name in names]
        return Edit(tuple(WeightChange(site, (gain - 1) * model.weight(site).detach().cpu()) for site in sites), f"heads times {gain:g}")

    return edit


def of_directions(model: HookedModel, names: Sequence[str], draws: torch.Generator) -> Callable[[float], Edit]:
    """The edit that multiplies what heads write along random directions, as many as components are named."""
    heads, drawn = [name.partition(".")[0] for name in names], dict[str, Tensor]()
    for head in dict.fromkeys(heads):
        site = Site.parse(f"{head}.W_O")
        basis = folded_heads(model, site.layer or 0).components("ov").Vh[site.head or 0]
        drawn[head] = random_directions(basis, heads.count(head), draws)

    def edit(gain: float) -> Edit:
        changes = []
        for head, v in drawn.items():
            site = Site.parse(f"{head}.W_O")
            changes.append(WeightChange(site, (gain - 1) * (model.weight(site).detach().cpu().double() @ v.mT), v))
        return Edit(tuple(changes), f"random directions times {gain:g}")

    return edit


def strongest_components(model: HookedModel, pairs: PromptPairs, heads: Sequence[str], many: int = 3) -> list[str]:
    """Of these heads the components whose deletion at END takes most from the logit difference."""
    sites = [Site.parse(f"{head}.z") for head in heads]
    write = torch.cat([folded_heads(model, s.layer or 0).components("ov").Vh[s.head or 0] for s in sites])
    batch, rank = model.batch(pairs.clean), model.shape.d_head
    owners = tuple((s.layer or 0, s.head or 0) for s in sites for _ in range(rank))
    gone = torch.cat([torch.zeros(1, len(write), dtype=torch.bool), torch.eye(len(write), dtype=torch.bool)])
    end = named(batch, "END")
    reader = Metric.parse("logit_diff").reader(pairs)
    where = batch.index("END").cpu().expand(len(write), -1)
    steered = Steered(model, batch, Channels(owners, write, where), Look((owners[0],), end[None]))
    told = sweep(steered, Ways.without(gone), lambda logits, rows: reader[rows.cpu()](logits).cpu()[:, None], desc="components").told
    assert told is not None
    effect = (told[:1] - told[1:])[..., 0].double().mean(-1)
    names = [f"{head}.{r}" for head in heads for r in range(rank)]
    return [names[i] for i in effect.argsort(descending=True).tolist()[:many]]


class Bench:
    """Prompts and texts that edits are chosen and judged on."""

    def __init__(self, model: HookedModel, n: int, others: int, seed: int, without: Sequence[str]) -> None:
        self.model = model
        both = [lists(model, 2 * n, length, seed + 1, without=without).split(fraction=0.3) for length in EDITED]
        self.dev, self.test = [pair[0] for pair in both], [pair[1] for pair in both]
        text: Any = interp.task("plain_text").generate(model, n=2 * others, seed=seed)
        self.chosen_on, self.text = text.split()
        self.tasks = {t: interp.task(t).generate(model, n=others, seed=seed) for t in OTHERS}
        self.length = torch.cat([torch.full((len(p),), length) for p, length in zip(self.test, EDITED, strict=True)])
        self.plain = self.right(self.test)
        self.loss, self.before = losses(model, self.text), losses(model, self.chosen_on).mean()
        self.score = {t: interp.task(t).score(model, p) for t, p in self.tasks.items()}  # type: ignore[arg-type]

    def right(self, parts: Sequence[PromptPairs]) -> Tensor:
        """Which lists are answered, among their options."""
        return torch.cat([answered(self.model, part).among for part in parts])

    def best(self, edit: Callable[[float], Edit], most: float = torch.inf) -> float:
        """The factor with most right answers on dev prompts, 1 among them; the nearest to 1 of equals. Texts may lose ``most`` at most."""
        found = {1.0: float(self.right(self.dev).double().mean())}
        for gain in GAINS:
            with self.model.edited(edit(gain)):
                if most == torch.inf or float(losses(self.model, self.chosen_on).mean() / self.before) - 1 < most:
                    found[gain] = float(self.right(self.dev).double().mean())
        return max(found, key=lambda g: (found[g], -abs(g - 1)))

    def row(self, what: str, edit: Callable[[float], Edit], controls: dict[str, list[Callable[[float], Edit]]], most: float) -> EditRow:
        """The best factor of a set on other prompts, other text and other tasks; controls with best factors of their own."""
        gain = self.best(edit, most)
        with self.model.edited(edit(gain)):
            edited, loss = self.right(self.test), losses(self.model, self.text)
            others = {t: (self.score[t], interp.task(t).score(self.model, p)) for t, p in self.tasks.items()}  # type: ignore[arg-type]
        row = EditRow(what, gain, self.plain, edited, self.length, (self.loss, loss), others)
        for name, many in controls.items():
            row.draws[name] = []
            for one in many:
                with self.model.edited(one(self.best(one, most))):
                    row.draws[name].append(float((self.right(self.test).double() - self.plain.double()).mean()))
        return row


def edits(model: HookedModel, pairs: PromptPairs, found: Found, bench: Bench, *, draws: int, seed: int) -> None:
    """Channels into the reader and into the writer, the heads that write the answer, and their strongest components."""
    order = sorted(found.direct, key=lambda h: -float(found.direct[h].mean()))
    writers, rest = order[:WRITERS], [h for h in order[WRITERS:] if int(h[1]) in {int(w[1]) for w in order[:WRITERS]}]
    strongest = strongest_components(model, pairs, writers)
    sets: dict[str, list[str]] = {f"channels into {found.heads[w]}": found.channels[w] for w in ("reader", "writer")}
    sets[f"components of {', '.join(writers)}"] = strongest

    def draw(name: str) -> list[torch.Generator]:
        return [generator("laundry_list", seed, name, d) for d in range(draws)]

    for name, parts in sets.items():
        controls = {
            "random components": [of_components(model, random_components(model, parts, g)) for g in draw(f"{name} components")],
            "random directions": [of_directions(model, parts, g) for g in draw(f"{name} directions")],
        }
        found.edits.append(bench.row(f"{name}: {', '.join(parts)}", of_components(model, parts), controls, torch.inf))
    some = [[rest[i] for i in torch.randperm(len(rest), generator=g)[:WRITERS].tolist()] for g in draw("heads")]
    heads, controls = of_heads(model, writers), {"other heads of these layers": [of_heads(model, s) for s in some]}
    found.edits.append(bench.row(f"heads {', '.join(writers)}", heads, controls, torch.inf))
    found.edits.append(bench.row(f"heads {', '.join(writers)}, texts lose < {LEAST_DAMAGE:.0%}", heads, {}, LEAST_DAMAGE))


def measured(n: int, *, quick: bool = False, seed: int = 0) -> Found:
    """Everything, in the order of the page."""
    found, model, draws = Found(), HookedModel.load(MODEL), 1 if quick else 2
    for length in (3, CHOSEN_ON, 9) if quick else LENGTHS:
        for order in ORDERS:
            found.cells[length, order] = answered(model, lists(model, 2 * n + 10 * length, length, seed, order))
    chooser = lists(model, n, CHOSEN_ON, seed + 2)
    choose(model, chooser, found, seed, draws)
    for length in (CHOSEN_ON,) if quick else STEERED:
        pairs = lists(model, n, length, seed + 3, without=chooser.contexts)
        for what in found.heads:
            for grid in ("1", "2") if quick else GRIDS:
                steer(model, pairs, what, length, grid, found, draws=draws, seed=seed)
    found.results += [found.steered[what, CHOSEN_ON, "2"] for what in found.heads]
    bench = Bench(model, n if quick else 2 * n, 16 if quick else 100, seed + 4, chooser.contexts)
    edits(model, chooser, found, bench, draws=1 if quick else 3, seed=seed)
    return found


WARNINGS = (
    "The task is a reconstruction: templates and lists of the paper are not published. The model is small and has read lists of 3 and 5.",
    "Points and factors are chosen on some prompts and judged on others; a point per slot needs to know where the answer is, and is an "
    "upper bound. Intervals are 95 %, of single choices: with many of them some will be clear of 0 by chance.",
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/laundry_list"), help="folder of the page")
    parser.add_argument("--n", type=int, help="prompts per length to steer (72; 24 with --quick), more for accuracies")
    parser.add_argument("--quick", action="store_true", help="fewer lengths, channels and draws")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and controls")
    given = parser.parse_args(words)
    start = time.monotonic()
    try:
        if (n := given.n if given.n is not None else (24 if given.quick else 72)) < 12:
            raise interp.InputError(f"--n is {n}, expected 12 or more")
        found = measured(n, quick=given.quick, seed=given.seed)
        lines = verdict(found)
        page = interp.write_report(
            found.results, given.out / "laundry_list.html", title="Steering laundry lists", verdict=lines, warnings=WARNINGS
        )
    except interp.InputError as error:
        parser.error(str(error))
    tables = [accuracy_table(found), heads_table(found), steering_table(found), edits_table(found)]
    print(*tables, *lines, f"{page} ({time.monotonic() - start:.0f} s)", sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
