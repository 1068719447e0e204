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
from interp.sweeps.ablation import Ablations, Knockout
from interp.sweeps.answers import margin, readers
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


def at_list(circuit: Circuit) -> list[Site]:
    """Every head at the tokens of the list, which a search on one list cannot see."""
    layers, heads, _ = circuit.model
    return [Site("z", layer, head, place) for place in LIST for layer in range(layers) for head in range(heads)]


def of_layer(circuit: Circuit, layer: int) -> list[Site]:
    """Every head of a layer, at all tokens."""
    return [Site("z", layer, head) for head in range(circuit.model[1])]


def joined(circuit: Circuit, more: Sequence[Site], role: str) -> Circuit:
    """The circuit with more heads; one that is added at all tokens takes the place of its node at a single one."""
    everywhere = {(s.layer, s.head) for s in more if s.position is None}
    own = tuple(n for n in circuit.nodes if (n.layer, n.head) not in everywhere)
    new = tuple(s for s in more if s not in own)
    roles = {n: r for n, r in circuit.roles.items() if n in own}
    known = {"prompts": circuit.prompts, "contexts": circuit.contexts}
    return Circuit(circuit.model, (*own, *new), roles={**roles, **dict.fromkeys(new, role)}, **known)


def additions(circuit: Circuit) -> dict[str, Circuit]:
    """The circuit alone, and with what may be missing: a layer at all tokens, single heads of the first, the list, all at END."""
    layers, heads, _ = circuit.model
    first, end = of_layer(circuit, 0), [Site("z", layer, head, "END") for layer in range(layers) for head in range(heads)]
    found = {"circuit": circuit} | {f"+ layer {i}": joined(circuit, of_layer(circuit, i), "layer") for i in range(layers)}
    found |= {f"+ {_short(s)}": joined(circuit, [s], "head") for s in first}
    found |= {"+ list": joined(circuit, at_list(circuit), "list"), "+ all heads at END": joined(circuit, end, "end")}
    return found | {"+ layer 0 + all heads at END": joined(joined(circuit, end, "end"), first, "layer")}


def _short(site: Site) -> str:
    return f"L{site.layer}H{site.head}"


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
        self.transfers: dict[str, Any] = {}
        self.kept: dict[str, dict[str, float]] = {}
        self.heads: dict[tuple[str, str, str], tuple[Site, ...]] = {}
        self.test = self.draw(self.models[BASE], "test", "boxes")

    def run(self) -> tables.EntityTrackingResult:
        """Everything."""
        for name, model in self.models.items():
            self.rows[f"accuracy: {name}"] = right(model, self.test)
        self.search()
        for name in self.models:
            self.missing(name)
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
        """Circuits in each other's model, alone, and with all heads of the first layer left as they are."""
        own, other = self.circuits[BASE], self.circuits[name]
        few = self.test[: max(2, len(self.test) // 4)]
        more = [joined(circuit, of_layer(circuit, 0), "first_layer") for circuit in (own, other)]
        for what, a, b, draws in (("circuit alone", own, other, 3), ("circuit and first layer", *more, 0)):
            found: Any = interp.circuit_transfer(self.pairs[name], few, a, b, random_circuits=draws, seed=self.seed)
            self.sections.append(found)
            self.transfers.setdefault(name, found)
            for c, circuit in enumerate((BASE, name)):
                for s, side in enumerate((BASE, name)):
                    self.rows[f"{what}: of {circuit} in {side}"] = _bits(found.circuit[0, c, s])
        self.rows[f"{tables.COUNTED}: {name}"] = [int(node in other.nodes) for node in own.nodes]

    def missing(self, name: str) -> None:
        """What the circuit of a model lacks to do the task alone, with means in place of all other heads."""
        model, few = self.models[name], self.test[: max(2, len(self.test) // 4)]
        tried = additions(self.circuits[name])
        for kind, reader in readers(few, "logit_diff", "vocabulary").items():
            runs = Ablations(model, few, reader, ablation="mean", by=None, seed=self.seed)
            empty, *values = runs(
                [Knockout.all_but(()), *(Knockout.all_but(c.nodes) for c in tried.values())], f"more than the circuit, {kind}"
            )
            if kind == "logit_diff":  # as circuit_transfer's faithfulness: 0 without any head, 1 for the whole model
                none, whole = (float(x.double().mean()) for x in (empty, runs.intact))
                self.kept[name] = {what: (float(v.double().mean()) - none) / (whole - none) for what, v in zip(tried, values, strict=True)}
            else:
                self.rows |= {f"alone, and with more, {name}: {what}": _bits(v) for what, v in zip(tried, values, strict=True)}

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
            circuit = self.circuits[name]
            for role, what in cells if name != TUNED[1] else MAIN:
                if role not in circuit.roles.values():
                    continue
                pairs = self.draw(model, "masks", f"boxes(corrupt={what})")
                found: Any = interp.dcm(model, pairs, circuit, group=role, control=5, seed=self.seed)
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
    told = [line for name in TUNED for line in (*_answer(study, found, name), *_adds_up(study, name))]
    return told + [lacking(study, found, name) for name in study.models] + broken(found)


def _answer(study: Study, found: tables.EntityTrackingResult, name: str) -> list[str]:
    a, b = (found.hits[f"accuracy: {side}"] for side in (BASE, name))
    up, down = int(((b - a) > 0).sum()), int(((b - a) < 0).sum())
    low, high = paired_change(up, down, len(a))
    gain = f"{name} answers {found.share(f'accuracy: {name}'):.0%} where base answers {found.share('accuracy: base'):.0%}"
    gain += f" (change [{100 * low:+.0f}, {100 * high:+.0f}] points, n = {len(a)})"
    t = study.transfers[name]
    shared, own, other, chance, p = (float(x[-1]) for x in (t.shared, t.size_base, t.size_tuned, t.expected, t.p))
    chances = f"chance {chance:.2g}, p = {p:.2g}"
    both = f"{shared:.0f} of the {own:.0f} heads that base's circuit has are among the {other:.0f} of {name}'s ({chances})"
    share = study.cmaps[name, BASE].recovered("accuracy", "tuned_to_base")
    if low <= 0 <= high:
        return [f"{gain}: no gain beyond noise, so nothing to explain. {both}."]
    brought = "cannot be told" if share.refused else share.at(0)
    carried = f"heads that were found in base, given {name}'s activations, bring {brought} of the gain"
    alone = t.faithfulness("base", "base", "logit_diff")
    kept = "cannot be told" if alone.refused else alone.at()
    carried += f"; base's circuit alone keeps {kept} of what base's heads do to the logit difference"
    return [f"{name}: {decision(p, share, alone)}. {gain}; {both}; {carried}.", *_variables(found, name)]


def decision(p: float, share: Any, alone: Any) -> str:
    """Enhanced, new, or not to be told.

    Args:
        p: of the heads that both circuits have.
        share: of the gain that the heads of base's circuit carry over.
        alone: of base's logit difference that its circuit keeps when it runs alone: what does not do the task alone is only a part.
    """
    if not share.refused and p < 0.05 and float(share.low[0]) > 0.5:
        if not alone.refused and float(alone.low) > 0.5:
            return "the circuit that was there was made better"
        return (
            "the gain goes through heads that base's circuit has already, but that circuit alone does not do the task, so whether the "
            "mechanism that was there was made better cannot be told from it"
        )
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


def lacking(study: Study, found: tables.EntityTrackingResult, name: str) -> str:
    """What a model's circuit needs beside itself."""
    kept, kind = study.kept[name], f"alone, and with more, {name}: "

    def told(what: str) -> str:
        return f"{kept[what]:.0%} ({found.share(kind + what):.0%} answered)"

    singles = {what: x for what, x in kept.items() if what.startswith("+ L")}
    best = max(singles, key=lambda what: singles[what])
    others = max(x for what, x in kept.items() if what.startswith("+ layer ") and what[-1].isdigit() and what != "+ layer 0")
    n, rest = len(found.hits[kind + "circuit"]), told("+ layer 0 + all heads at END")
    many = kept["+ layer 0"] - kept["circuit"] > 2 * (max(singles[best], others, kept["+ list"]) - kept["circuit"])
    why = "what it lacks are many heads of the first layer together" if many else "what it lacks is not in one place"
    parts = [
        f"Alone, the circuit of {name} keeps {told('circuit')} of what the heads do to the logit difference (n = {n})",
        f"with all heads of layer 0 at all tokens {told('+ layer 0')}, and with all heads at END besides {rest}",
        f"no single head of layer 0 brings it above {singles[best]:.0%} ({best[2:]}), the heads of another layer not above {others:.0%}",
        f"those at the list to {told('+ list')}: {why}",
    ]
    return f"{'; '.join(parts)}."


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
    "A circuit alone has all other heads at all tokens at their means, also those of the first layer that put the list together, which the "
    "search does not look for: its stages begin at the box asked for. The rows `circuit and first layer` leave these as they are.",
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
