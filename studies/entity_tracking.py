"""Did tuning on boxes build a new circuit, or make the one that was there better (after Prakash et al. 2024, arXiv 2402.14811)?

`base` answers boxes in part; `boxes-tuned` (all weights) and `boxes-lora` (an adapter) were tuned on them. The circuit of each is searched
for, run alone in the others, and its heads are set in base; masks say which heads carry object, label and position, and the counterfactual
is told in other ways to see what a position is made of. What was published for Llama-7B stands beside every number.

    python studies/entity_tracking.py [--out results/entity_tracking] [--n 96] [--quick]

Writes ``entity_tracking.html`` and prints the table. About seven minutes on one core, one and a half with ``--quick``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import entity_tables as tables
import torch
from torch import Tensor

import interp
from interp.circuit import Circuit
from interp.models import HookedModel, ModelPair
from interp.prompts import PromptPairs
from interp.results import Result
from interp.sites import Site
from interp.stats import paired_change
from interp.sweeps import run, sweep
from interp.sweeps.answers import head_groups, margin
from interp.sweeps.groups import written
from interp.tasks.boxes_variants import Kind

BASE, TUNED = "base", ("boxes-tuned", "boxes-lora")
ROLES, VARIABLES = ("value_fetcher", "position_transmitter", "position_detector"), ("object", "label", "position")
MAIN = (("value_fetcher", "object"), ("position_transmitter", "position"), ("position_detector", "position"))
"""What the paper says each group carries."""
LIST = ("objects", "labels")
BLOCKED = (("END", "target"), ("END", "query_label"), ("query_label", "previous_query_label"))
POINTS = 0.05


# ---------------------------------------------------------------------------------------------- prompts


@dataclass
class Drawn:
    """Prompts of which no two parts share a context.

    Attributes:
        n: how many, of every part.
        seed: of the first part.
        seen: part -> its contexts.
    """

    n: int
    seed: int
    seen: dict[str, set[str]] = field(default_factory=dict)

    def __call__(self, model: HookedModel | ModelPair, part: str, task: str) -> PromptPairs:
        """Prompts of a task for a part: discovery, masks or test. Contexts that another part has are left out.

        Raises:
            InputError: fewer than two are left.
        """
        parts = ("discovery", "masks", "test")
        pairs: Any = interp.task(task).generate(model, n=self.n, seed=self.seed + parts.index(part))  # type: ignore[arg-type]
        others = set().union(*(contexts for name, contexts in self.seen.items() if name != part))
        kept = [i for i, context in enumerate(pairs.contexts) if context not in others]
        if len(kept) < 2:
            raise interp.InputError(f"{task}: fewer than two of {self.n} prompts are not in another part of the study")
        pairs = pairs if len(kept) == len(pairs) else pairs[kept]
        self.seen.setdefault(part, set()).update(pairs.contexts)
        self.check()
        return pairs

    def check(self) -> None:
        """No context is in two parts."""
        parts = list(self.seen.items())
        for i, (name, contexts) in enumerate(parts):
            for other, more in parts[i + 1 :]:
                if both := contexts & more:
                    raise AssertionError(f"{len(both)} contexts are in {name} and in {other}")


# --------------------------------------------------------------------------------------------- measures


def right(model: HookedModel, pairs: PromptPairs) -> list[int]:
    """Whether the clean prompts are answered, as the most likely of all tokens."""
    answers = torch.tensor(pairs.answers)
    return (model.logits(model.batch(pairs.clean), at="END").argmax(-1).cpu() == answers).int().tolist()


def follows(model: HookedModel, pairs: PromptPairs, heads: Sequence[Site]) -> list[int]:
    """Whether the target comes, the distractor, where heads give what they give on the counterfactual."""
    reader = margin(replace(pairs.clean, answers=pairs.distractors))
    batch, other = model.batch(pairs.clean), model.batch(pairs.corrupt)
    if not heads:
        return _bits(run(model, batch, reader))
    patch = written(heads, model.shape, added=False)
    return _bits(sweep(model, batch, [patch], (model, other), reader, desc="heads of the counterfactual").values[0])


def with_list(circuit: Circuit) -> Circuit:
    """The circuit with every head at the tokens of the list, which a search on one list cannot see."""
    layers, heads, groups = circuit.model
    sites = [Site("z", layer, head, place) for place in LIST for layer in range(layers) for head in range(heads)]
    new = tuple(s for s in sites if s not in circuit.nodes)
    known = {"prompts": circuit.prompts, "contexts": circuit.contexts}
    return Circuit((layers, heads, groups), (*circuit.nodes, *new), roles={**circuit.roles, **dict.fromkeys(new, "list")}, **known)


def _bits(values: Tensor) -> list[int]:
    return (values > 0).int().tolist()


# ---------------------------------------------------------------------------------------------- sections


class Study:
    """What is measured, in the order of the page."""

    def __init__(self, n: int, *, quick: bool, seed: int = 0) -> None:
        self.quick, self.seed, self.draw = quick, seed, Drawn(n, 3 * seed)
        self.pairs = {name: ModelPair.load(BASE, name) for name in TUNED}
        self.models: dict[str, HookedModel] = {BASE: self.pairs[TUNED[0]].base} | {k: p.tuned for k, p in self.pairs.items()}
        self.rows: dict[str, list[int]] = {}
        self.sections: list[Result] = []
        self.circuits: dict[str, Circuit] = {}
        self.cmaps: dict[tuple[str, str], Any] = {}
        self.overlaps: dict[str, Any] = {}
        self.heads: dict[tuple[str, str, str], tuple[Site, ...]] = {}
        self.test = self.draw(self.models[BASE], "test", "boxes")

    def run(self) -> tables.EntityTrackingResult:
        """Everything."""
        for name, model in self.models.items():
            self.rows[f"accuracy: {name}"] = right(model, self.test)
        self.search()
        for name in TUNED:
            self.transfer(name)
            self.cross(name)
        self.masks()
        self.fidelity()
        self.told()
        self.blocked()
        self.draw.check()
        return tables.entity_tracking(self.pairs[TUNED[0]], self.test.clean, self.rows)  # type: ignore[arg-type]

    def search(self) -> None:
        """The circuit of each model, with prompts that ask for an absent box as counterfactuals, as in the paper."""
        for name, model in self.models.items():
            found: Any = interp.circuit_discovery(model, self.draw(model, "discovery", "boxes(corrupt=absent)"), seed=self.seed)
            self.circuits[name] = found.circuit()
            self.sections.append(found)
            if not self.circuits[name].nodes:
                raise interp.InputError(f"no heads were found in {name} on {self.draw.n} prompts; take more")

    def transfer(self, name: str) -> None:
        """Circuits in each other's model, alone, and with the heads of the list left as they are."""
        own, other = self.circuits[BASE], self.circuits[name]
        self.overlaps[name] = interp.circuit_overlap(own, other)
        few = self.test[: max(2, len(self.test) // 4)]
        for what, a, b, draws in (("circuit alone", own, other, 3), ("circuit and list", with_list(own), with_list(other), 0)):
            if draws == 0 and self.quick:
                continue
            found: Any = interp.circuit_transfer(self.pairs[name], few, a, b, random_circuits=draws, seed=self.seed)
            self.sections.append(found)
            for c, circuit in enumerate((BASE, name)):
                for s, side in enumerate((BASE, name)):
                    self.rows[f"{what}: of {circuit} in {side}"] = _bits(found.circuit[0, c, s])
        self.rows[f"{tables.COUNTED}: {name}"] = [int(node in other.nodes) for node in own.nodes]
        self.sections.append(self.overlaps[name])

    def cross(self, name: str) -> None:
        """CMAP with the circuit of the tuned model, step by step until all is there, and with that of base."""
        pair = self.pairs[name]
        for of in (name, BASE):
            settings: Any = {"rest": True} if of == name else {"direction": "tuned_to_base"}
            found: Any = interp.cmap(pair, self.test.clean, self.circuits[of], control=3 if self.quick else 10, seed=self.seed, **settings)
            self.cmaps[name, of] = found
            self.sections.append(found)
            for i, cell in enumerate(found.cells):
                what = f"{name}, {cell}" if of == name else f"{name}, {cell} as found in base"
                self.rows[f"base with heads of: {what}"] = _bits(found.patched[0, 0, i])

    def masks(self) -> None:
        """Which heads of each group carry which variable (DCM)."""
        cells = MAIN if self.quick else tuple((role, what) for role in ROLES for what in VARIABLES)
        for name, model in self.models.items():
            if self.quick and name == TUNED[1]:
                continue
            groups = head_groups(self.circuits[name])
            for role, what in cells if name != TUNED[1] else MAIN:
                if role not in groups:
                    continue
                pairs = self.draw(model, "masks", f"boxes(corrupt={what})")
                group = ",".join(f"L{s.layer}H{s.head}@{s.position}" for s in groups[role])
                found: Any = interp.dcm(model, pairs, group=group, control=5, seed=self.seed)
                self.heads[name, role, what] = tuple(Site.parse(text) for text in found.chosen)
                if name == TUNED[0] and (role, what) in MAIN:
                    self.sections.append(found)

    def fidelity(self) -> None:
        """The target on fresh prompts with the heads of a mask: in the model they were found in, and those of base in the others."""
        for (of, role, what), heads in self.heads.items():
            for into in (of,) if of != BASE else [name for name in self.models if (name, role, what) in self.heads]:
                hits = follows(self.models[into], self.draw(self.models[into], "test", f"boxes(corrupt={what})"), heads)
                self.rows[f"target by heads: {role} {what}, of {of} in {into}"] = hits

    def told(self) -> None:
        """Position heads, with the counterfactual told in other ways."""
        kinds = ("plain", "text_before", "reordered_target") if self.quick else get_args(Kind)
        for name in (BASE, TUNED[0]):
            if not (heads := self.heads.get((name, "position_transmitter", "position"))):
                continue
            for kind, follow in (*((kind, "same") for kind in kinds), ("plain", "next")):
                pairs = self.draw(self.models[name], "test", f"boxes_variants(kind={kind}, follows={follow})")
                row = kind if follow == "same" else f"{kind}, the next segment (control)"
                self.rows[f"position told, {name}: {row}"] = follows(self.models[name], pairs, heads)

    def blocked(self) -> None:
        """Up to which layer a token has to be seen."""
        few = self.test.clean[: max(2, len(self.test) // 4)]
        for query in dict.fromkeys(query for query, _ in BLOCKED):
            keys = tuple(key for q, key in BLOCKED if q == query)
            found: Any = interp.attention_knockout(self.pairs[TUNED[0]], few, query=query, keys=keys, control=1, seed=self.seed)
            self.sections.append(found)
            for k, key in enumerate(keys):
                for s, side in enumerate((BASE, TUNED[0])):
                    self.rows[f"blocked from layer 0: {query} to {key}, {side}"] = _bits(found.blocked[0, s, k, 0])


# ------------------------------------------------------------------------------------------- the answer


def verdict(study: Study, found: tables.EntityTrackingResult) -> list[str]:
    """The answers, whatever they are."""
    return [line for name in TUNED for line in (*_answer(study, found, name), *_adds_up(study, name))] + broken(found)


def _answer(study: Study, found: tables.EntityTrackingResult, name: str) -> list[str]:
    a, b = (found.hits[f"accuracy: {side}"] for side in (BASE, name))
    up, down = int(((b - a) > 0).sum()), int(((b - a) < 0).sum())
    low, high = paired_change(up, down, len(a))
    gain = f"{name} answers {found.share(f'accuracy: {name}'):.0%} where base answers {found.share('accuracy: base'):.0%}"
    gain += f" (change [{100 * low:+.0f}, {100 * high:+.0f}] points, n = {len(a)})"
    o = study.overlaps[name]
    shared, own, other, chance, p = (float(x[o.main]) for x in (o.shared, o.size_a, o.size_b, o.chance, o.p))
    chances = f"chance {chance:.2g}, p = {p:.2g}"
    both = f"{shared:.0f} of the {own:.0f} heads in their roles that base's circuit has are among the {other:.0f} of {name}'s ({chances})"
    share = study.cmaps[name, BASE].recovered("accuracy", "tuned_to_base")
    if low <= 0 <= high:
        return [f"{gain}: no gain beyond noise, so nothing to explain. {both}."]
    brought = "cannot be told" if share.refused else share.at(0)
    carried = f"heads that were found in base, given {name}'s activations, bring {brought} of the gain"
    return [f"{name}: {decision(p, share)}. {gain}; {both}; {carried}.", *_variables(found, name)]


def decision(p: float, share: Any) -> str:
    """Enhanced, new, or not to be told: from the p of the overlap and the share of the gain that base's own circuit carries."""
    if not share.refused and p < 0.05 and float(share.low[0]) > 0.5:
        return "the circuit that was there was made better"
    if not share.refused and float(share.high[0]) < 0.5:
        return "most of the gain is not in the circuit that was there"
    return "whether the circuit is new cannot be told from these prompts"


def _variables(found: tables.EntityTrackingResult, name: str) -> list[str]:
    told = []
    for role, what in MAIN:
        rows = [f"target by heads: {role} {what}, of {of} in {into}" for of, into in ((BASE, BASE), (BASE, name), (name, name))]
        if all(row in found.hits for row in rows):
            shares = [f"{found.share(row):.0%}" for row in rows]
            told.append(f"{role} the {what} ({shares[0]} in base, {shares[1]} in {name}; {name}'s own heads {shares[2]})")
    return [f"Heads that carry a variable in base carry it in {name} in that many of the prompts: {'; '.join(told)}."] if told else []


def _adds_up(study: Study, name: str) -> list[str]:
    found = study.cmaps[name, name]
    now, goal = (float(x.double().mean()) for x in (found.patched[0, 0, 0], found.goal("accuracy", "tuned_to_base")))
    start = (
        f"With the {found.heads[0]} heads of {name}'s circuit set, base answers {now:.0%}, {abs(goal - now) * 100:.0f} points from {name}"
    )
    if abs(goal - now) <= POINTS:
        return [f"{start}."]
    rest = found.adds_up("accuracy", "tuned_to_base").iloc[1:]
    return [f"{start}; the rest: {', '.join(f'{r.added} {100 * r.gain:+.0f} +- {100 * r.gain_se:.0f} points' for r in rest.itertuples())}."]


def broken(found: tables.EntityTrackingResult) -> list[str]:
    """Which ways of telling a position does not survive: the interval ends below half of what it brings told plainly."""
    rows, told = found.to_frame(), []
    for name in (BASE, TUNED[0]):
        own = rows[(rows.what == f"position told, {name}") & ~rows.row.str.contains("control")].set_index("row")
        if "plain" in own.index:
            lost = own[own.high < own.ours["plain"] / 2]
            kept = own.drop(index=[*lost.index, "plain"])
            parts = [", ".join(f"{row} {x:.0%}" for row, x in some.ours.items()) or "none" for some in (lost, kept)]
            told.append(
                f"What a position is, {name} (told plainly {own.ours['plain']:.0%}): lost with {parts[0]}; kept in part with {parts[1]}."
            )
    return told


WARNINGS = (
    tables.SOURCE,
    "The models have 4 layers of 6 heads, and the circuits a third to a half of the heads at END: random heads of the same layers "
    "are few or none, and shared heads are the less telling the larger the circuits.",
    "Late heads already hold what earlier ones of the tuned model computed: that value fetchers bring the gain says little; that "
    "position transmitters bring part of it says more.",
    "No structure readers are found: the position detectors are in the first layer, and no head comes before them.",
    "A circuit alone has all other heads at all tokens at their means, also those at the tokens of the list, from which the search "
    "sends nothing: the rows `circuit and list` leave these as they are.",
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/entity_tracking"), help="folder of the page")
    parser.add_argument("--n", type=int, help="prompts of each part: discovery, masks, test (96; 48 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer masks and ways of telling")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, masks and resampling")
    given = parser.parse_args(words)
    start = time.monotonic()
    try:
        if (n := given.n if given.n is not None else (48 if given.quick else 96)) < 16:
            raise interp.InputError(f"--n is {n}, expected 16 or more")
        study = Study(n, quick=given.quick, seed=given.seed)
        found = study.run()
        lines = verdict(study, found)
        title = "Did tuning on boxes build a new circuit?"
        page = interp.write_report(
            [found, *study.sections], given.out / "entity_tracking.html", title=title, verdict=lines, warnings=WARNINGS
        )
    except interp.InputError as error:
        parser.error(str(error))
    print(tables.printed(found), *lines, tables.SOURCE, f"{page} ({time.monotonic() - start:.0f} s)", sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
