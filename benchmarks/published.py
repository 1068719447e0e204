"""What the papers report of GPT-2, beside what this package measures on the same model.

Indirect object identification in GPT-2 small (Wang et al. 2023, arXiv 2211.00593): F is the mean logit difference, M the model, C their 26
heads, K a class of heads, means by template. Colored Objects in GPT-2 medium (Merullo et al. 2024, arXiv 2310.08744): accuracy with the
attention rows of four heads set by hand. The tasks are theirs, templates and words this package's, so a difference is not an error of
either. A model is a folder or a Hub id; one that cannot be had is skipped. The overlap has four stages: into the logits, the queries of
what that finds, the values of those at S2 or the object asked for, and the queries of those; every stage hands on the strongest 2 % of
heads, which is our reading of the paper.

    python benchmarks/published.py [--gpt2 gpt2] [--gpt2-medium gpt2-medium] [--n 1000] [--evaluated 500] [--searched 100]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import interp
from interp.analyses.circuit_discovery import CircuitDiscoveryResult
from interp.circuit import Circuit, Edge
from interp.errors import InputError
from interp.sites import Site
from interp.stats import bootstrap, recovered, wilson

SMALL, MEDIUM = "IOI, gpt2", "Colored Objects, gpt2-medium"
SKIPPED = "skipped: no weights"
TOP = 0.02
"""Share of the heads that a stage of the overlap keeps."""

PUBLISHED: dict[tuple[str, str], float] = {
    (SMALL, "mean logit difference F(M)"): 3.56,
    (SMALL, "IO above S"): 0.993,
    (SMALL, "probability of IO"): 0.49,
    (SMALL, "F(C)"): 2.838,
    (SMALL, "F(C) - F(M)"): -0.464,
    (SMALL, "F(C) / F(M)"): 0.87,
    (SMALL, "without mover: F(C \\ K)"): 0.93,
    (SMALL, "without mover: F(M \\ K)"): 1.53,
    (SMALL, "without negative_mover: F(C \\ K)"): 4.27,
    (SMALL, "without negative_mover: F(M \\ K)"): 5.62,
    (SMALL, "without inhibition: F(C \\ K)"): 0.23,
    (SMALL, "without inhibition: F(M \\ K)"): 0.30,
    (SMALL, "without induction: F(C \\ K)"): 1.04,
    (SMALL, "without induction: F(M \\ K)"): 1.57,
    (SMALL, "without duplicate: F(C \\ K)"): 0.72,
    (SMALL, "without duplicate: F(M \\ K)"): 1.52,
    (SMALL, "without previous: F(C \\ K)"): 1.52,
    (SMALL, "without previous: F(M \\ K)"): 2.90,
    (MEDIUM, "accuracy, no edit"): 0.496,
    (MEDIUM, "accuracy, negative mover edited"): 0.781,
    (MEDIUM, "accuracy, inhibition edited"): 0.815,
    (MEDIUM, "accuracy, all four edited"): 0.937,
    (MEDIUM, "newly wrong, all four edited"): 0.0,
    (MEDIUM, "accuracy, gatherers kept from the question"): 0.35,
    (MEDIUM, "accuracy, other heads kept from it"): 0.499,
    (MEDIUM, "movers' attention to the right color"): 0.027,
    (MEDIUM, "movers' attention to wrong colors"): -0.087,
    (MEDIUM, "Spearman, change of logits by importance"): 0.69,
    (MEDIUM, "heads shared with IOI, top 2 % per stage"): 25 / 32,
}
"""Study and quantity -> the number in the paper, or in its released runs (F of the circuit, 100 prompts)."""

IOI_HEADS = {
    "mover": "END 9.9 9.6 10.0",
    "backup": "END 10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9",
    "negative_mover": "END 10.7 11.10",
    "inhibition": "END 7.3 7.9 8.6 8.10",
    "induction": "S2 5.5 5.8 5.9 6.9",
    "duplicate": "S2 0.1 0.10 3.0",
    "previous": "S1+1 2.2 4.11",
}
COLOR_HEADS = {
    "mover": "END 15.14 16.15 17.4 18.5 19.15",
    "inhibition": "END 12.3 13.4 13.13",
    "negative_mover": "END 19.1",
    "gatherer": "END 11.6 11.7 12.15",
}
"""Role -> position and heads, as layer.head."""


@dataclass(frozen=True)
class Ours:
    """A measured number.

    Attributes:
        value: the number.
        low: lower end of its 95 % interval; NaN where there is none.
        high: upper end.
        n: prompts, or what else was counted.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def __str__(self) -> str:
        """With its interval, where it has one."""
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


Found = dict[str, Ours | str]
"""Quantity -> the number, or why there is none."""


def _of(estimate: Any, n: int) -> Ours | str:
    if estimate.refused:
        return f"not measured: {estimate.refused}"
    return Ours(float(estimate.value), float(estimate.low), float(estimate.high), n)


def _share(right: torch.Tensor) -> Ours:
    return Ours(float(right.double().mean()), *wilson(int(right.sum()), len(right)), n=len(right))


def circuit(model: Any, heads: Mapping[str, str]) -> Circuit:
    """The published circuit.

    Raises:
        InputError: the model has other numbers of layers or heads.
    """
    s, roles = model.shape, {}
    for role, text in heads.items():
        position, *names = text.split()
        roles[role] = ["L{}H{}.z@{}".format(*name.split("."), position) for name in names]
    return Circuit.of((s.n_layers, s.n_heads, s.n_kv_heads), roles)


def _clean(name: str, model: Any, n: int) -> Any:
    pairs: Any = interp.task(name).generate(model, n=n, seed=0)
    return pairs.clean


def ioi(model: Any, n: int, evaluated: int) -> Found:
    """GPT-2 small: behaviour on n prompts, the circuit on fewer."""
    prompts = _clean("ioi", model, n)
    logits, rows = model.logits(prompts, at="END").double().cpu(), torch.arange(n)
    right, wrong = (logits[rows, torch.tensor(ids)] for ids in (prompts.answers, prompts.distractors))
    found: Found = {"mean logit difference F(M)": _of(bootstrap(right - wrong), n)}
    found |= {"IO above S": _share(right > wrong), "probability of IO": _of(bootstrap((right - logits.logsumexp(-1)).exp()), n)}
    pairs = interp.task("ioi(corrupt=ABC)").generate(model, n=evaluated, seed=1)
    settings: Any = {"by": "template,order", "completeness_random": 0, "greedy": 0, "random_circuits": 0}
    result = interp.circuit_evaluation(model, pairs, circuit(model, IOI_HEADS), **settings)
    found["F(C)"] = _of(bootstrap(result.circuit[0]), evaluated)
    found |= {"F(C) - F(M)": _of(result.difference(), evaluated), "F(C) / F(M)": _of(result.ratio(), evaluated)}
    for i, role in enumerate(result.labels["subset"]):
        found[f"without {role}: F(C \\ K)"] = _of(bootstrap(result.circuit_without[0, i]), evaluated)
        found[f"without {role}: F(M \\ K)"] = _of(bootstrap(result.model_without[0, i]), evaluated)
    return found


def colored(model: Any, n: int, searched: int) -> Found:
    """GPT-2 medium: the edit of four heads on n prompts; what is searched for, on fewer pairs."""
    prompts = _clean("colored_objects", model, n)
    told = circuit(model, COLOR_HEADS)
    search = _search(model, "colored_objects", "query_object", searched)
    result = interp.circuit_repair(model, prompts, told if isinstance(search, str) else _important(told, search))
    rows = {name: result.right[i] for i, name in enumerate(result.labels["condition"])}
    drawn = torch.stack([right for name, right in rows.items() if name.startswith("other heads blocked ")]).double().mean(1)
    middle, spread = float(drawn.mean()), 1.96 * float(drawn.std())
    layers, heads = zip(*result.movers, strict=True)
    moved = [bootstrap(change[:, layers, heads].mean(1)) for change in (result.attention[1] - result.attention[0]).unbind(-1)]
    rho, correlated = result.correlation()
    found: Found = {
        "accuracy, no edit": _share(rows["no edit"]),
        "accuracy, negative mover edited": _share(rows["L19H1"]),
        "accuracy, inhibition edited": _share(rows["inhibition"]),
        "accuracy, all four edited": _share(rows["all heads"]),
        "newly wrong, all four edited": _share(rows["no edit"] & ~rows["all heads"]),
        "accuracy, gatherers kept from the question": _share(rows["gatherers blocked"]),
        "accuracy, other heads kept from it": Ours(middle, middle - spread, middle + spread, n),
        "movers' attention to the right color": _of(moved[0], n),
        "movers' attention to wrong colors": _of(moved[1], n),
        "Spearman, change of logits by importance": search if isinstance(search, str) else _of(rho, correlated),
    }
    other = _search(model, "ioi", "S2", searched)
    return found | {"heads shared with IOI, top 2 % per stage": _shared(search, other)}


def _search(model: Any, name: str, place: str, n: int) -> CircuitDiscoveryResult | str:
    """Four stages of which every one keeps the strongest heads, whatever the sign; or why there is no such search."""
    common: dict[str, Any] = {"sign": "both", "top": TOP, "least": 0}
    rows = [("first", "logits", "END"), ("second", "first.q", "END"), ("third", "second.v", place), ("fourth", "third.q", place)]
    stages = [{"role": role, "receivers": receivers, "at": at, **common} for role, receivers, at in rows]
    pairs = interp.task(name).generate(model, n=n, seed=1)
    try:
        return interp.circuit_discovery(model, pairs, stages=json.dumps({"stages": stages}), level=0.999)
    except InputError as why:
        return f"not measured: {why}"


def _important(told: Circuit, search: CircuitDiscoveryResult) -> Circuit:
    """The published circuit with every head's share of the logits, as its importance."""
    share = recovered(search.patched[0, 0].movedim(-1, 0), search.clean[0], search.corrupt[0], resamples=1).value
    layers, heads, _ = told.model
    sites = [Site("z", layer, head, "END") for layer in range(layers) for head in range(heads)]
    scores: dict[Site | Edge, float] = dict(zip(sites, share.flatten().tolist(), strict=True))
    return Circuit(told.model, tuple(sites), roles=told.roles, scores=scores)


def _shared(one: CircuitDiscoveryResult | str, other: CircuitDiscoveryResult | str) -> Ours | str:
    """The share of (stage, head) entries that two searches have in common, with what chance gives as the interval."""
    for search in (one, other):
        if isinstance(search, str):
            return search
        if not bool(search.searched.all()):
            return "not measured: " + "; ".join(search.notes)
    a, b = (_strongest(search) for search in (one, other) if not isinstance(search, str))
    result = interp.circuit_overlap(a, b, cutoffs=())
    i = result.labels["row"].index("all stages")
    return Ours(float(result.shared[i] / result.size_a[i]), n=int(result.size_a[i]))


def _strongest(search: CircuitDiscoveryResult) -> Circuit:
    """The heads of largest effect of every stage as a circuit; a head may be in several stages, so positions are numbers of stages."""
    layers, heads, _ = search.model
    roles = {}
    for k, stage in enumerate(search.steps):
        size = (search.effect(k).mean(-1).abs() * search.reaches[0, k]).flatten()
        top = size.argsort(descending=True, stable=True)[: math.ceil(TOP * layers * heads)].tolist()
        roles[stage.role] = ["L{}H{}.z@{}".format(*divmod(i, heads), k) for i in top]
    return Circuit.of(search.model, roles)


def measured(what: str, study: Callable[[Any], Found]) -> tuple[Found | str, str]:
    """What a study found, or that it was skipped; and which model it was, or why it was skipped."""
    try:
        model = interp.HookedModel.load(what)
    except InputError as why:
        return SKIPPED, str(why)
    try:
        model.logits("The")  # weights load now, and are held against plain Hugging Face
    except InputError as why:
        return "skipped: refused", str(why)
    return study(model), f"{what}, {model.shape.n_layers} layers of {model.shape.n_heads} heads"


def table(found: Mapping[str, Found | str]) -> str:
    """A row per published number: ours with its interval, the difference, and n."""
    rows = [("study", "quantity", "published", "difference", "n", "ours [95 %]")]
    for (study, quantity), published in PUBLISHED.items():
        known = found[study]
        ours = known if isinstance(known, str) else known[quantity]
        gap, n = ("", "") if isinstance(ours, str) else (f"{ours.value - published:+.3f}", str(ours.n))
        rows.append((study, quantity, f"{published:.3f}", gap, n, str(ours)))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(words: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gpt2", default="gpt2", help="folder or Hub id")
    options.add_argument("--gpt2-medium", default="gpt2-medium", help="folder or Hub id")
    options.add_argument("--n", type=int, default=1000, help="prompts for what the models answer")
    options.add_argument("--evaluated", type=int, default=500, help="pairs on which the circuit is evaluated")
    options.add_argument("--searched", type=int, default=100, help="pairs on which heads are searched")
    given = options.parse_args(words)
    small, about_small = measured(given.gpt2, lambda model: ioi(model, given.n, given.evaluated))
    medium, about_medium = measured(given.gpt2_medium, lambda model: colored(model, given.n, given.searched))
    print(f"gpt2: {about_small}\ngpt2-medium: {about_medium}\n")
    print(table({SMALL: small, MEDIUM: medium}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
