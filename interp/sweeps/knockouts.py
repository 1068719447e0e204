"""Which nodes of a circuit to knock out, so that what it lacks and what it does not need shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from torch import Tensor

from interp.circuit import Circuit
from interp.errors import InputError
from interp.models.checkpoint import Shape
from interp.names import unknown
from interp.sites import Site
from interp.sweeps.ablation import Ablations, Knockout
from interp.sweeps.draws import unread

Nodes = tuple[Site, ...]
Given = Literal["role", "greedy"]
GIVEN = ("role", "greedy")
_CHECKED = 4  # runs of each model that are computed both ways


@dataclass(frozen=True)
class Search:
    """What is tried; names as the settings of ``circuit_evaluation``."""

    roles: Mapping[str, Nodes]
    completeness_random: int
    greedy: int
    greedy_steps: int
    greedy_candidates: int
    minimality: Given
    random_circuits: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse what is no number of draws or steps.

        Raises:
            InputError: that, or an unknown minimality.
        """
        if self.minimality not in GIVEN:
            raise unknown("minimality", str(self.minimality), GIVEN)
        steps = ("greedy_steps", "greedy_candidates")
        for name in ("completeness_random", "greedy", "random_circuits", *steps):
            count, least = getattr(self, name), int(name in steps)
            if type(count) is not int or count < least:
                raise InputError(f"{name} is a whole number from {least} up, but it is {count!r}")


@dataclass(frozen=True, eq=False)
class Evaluated:
    """All runs of one model.

    Attributes:
        name: of the model.
        order: the nodes, the most important first.
        sizes: numbers of nodes along the curve.
        subsets: name -> K of completeness.
        given: the K of every node.
        values: the fields of the result, without the side.
        notes: what stood in for knocked-out heads.
    """

    name: str
    order: Nodes
    sizes: tuple[int, ...]
    subsets: dict[str, Nodes]
    given: Sequence[Nodes]
    values: dict[str, Tensor]
    notes: tuple[str, ...]


def live(circuit: Circuit, mlps: bool) -> Nodes:
    """The nodes that can be knocked out.

    Raises:
        InputError: there are none.
    """
    nodes = tuple(node for node in circuit.nodes if node.component in ("z", *(["mlp_out"] if mlps else [])))
    if nodes:
        return nodes
    what = "heads or MLPs" if mlps else "heads (MLPs count with mlps=True)"
    came = f"the nodes of this one are {', '.join(map(str, circuit.nodes[:3]))}" if circuit.nodes else "this one has no nodes"
    raise InputError(f"a circuit is evaluated by knocking out {what}, but {came}")


def by_role(circuit: Circuit, nodes: Nodes, wanted: Sequence[str]) -> dict[str, Nodes]:
    """Role -> its nodes, for those that are wanted, or all.

    Raises:
        InputError: a role that no node has.
    """
    known = dict.fromkeys(circuit.roles[node] for node in nodes if node in circuit.roles)
    for role in wanted:
        if role not in known:
            raise unknown("role", role, known)
    return {role: tuple(node for node in nodes if circuit.roles.get(node) == role) for role in wanted or known}


def evaluated(runs: Ablations, circuit: Circuit, nodes: Nodes, search: Search, order: Nodes | None, name: str) -> Evaluated:
    """Runs everything for one model.

    Args:
        runs: the model under knockouts.
        circuit: the circuit.
        nodes: those of its nodes that can be knocked out.
        search: what is tried.
        order: of the nodes along the curve; None is by score where all have one, else by how much they matter.
        name: of the model.
    """
    seed, steps, candidates = search.seed, search.greedy_steps, search.greedy_candidates
    drawn = {f"random {i}": k for i, k in enumerate(random_subsets(nodes, search.completeness_random, seed))}
    sought = {f"greedy {i}": greedy_subset(runs, nodes, steps, candidates, f"{seed} greedy {i}") for i in range(search.greedy)}
    subsets = {**search.roles, **drawn, **sought}
    given = own_class(nodes, circuit.roles)
    if search.minimality == "greedy":
        given = telling(runs, nodes, given, steps, candidates, seed)
    before, after = without_each(runs, nodes, given)
    order = order or _order(circuit, nodes, runs.mean(after - before).double().mean(-1))
    nobody = unread(runs.batch, circuit.nodes, [runs.reader])
    sizes, circuits = sizes_of(len(order)), other_circuits(order, circuit.nodes, runs.model.shape, search.random_circuits, seed, nobody)
    grown = runs([Knockout.all_but(chain[:k]) for chain in (order, *circuits) for k in sizes], f"circuits, {name}")
    curve, random = grown[: len(sizes)], grown[len(sizes) :].unflatten(0, (len(circuits), len(sizes)))
    circuit_without, model_without = incompleteness(runs, nodes, list(subsets.values()), f"subsets, {name}")
    checked, deviation = runs.checked(_CHECKED, seed)
    values = {"full": runs.intact, "circuit": curve[-1], "empty": curve[0], "curve": curve, "random": random}
    values |= {"circuit_without": circuit_without, "model_without": model_without, "before": before, "after": after}
    values |= {"floor": torch.tensor(runs.floor), "deviation": torch.tensor(deviation), "checked": torch.tensor(checked)}
    return Evaluated(name, order, sizes, subsets, given, values, runs.notes)


def _order(circuit: Circuit, nodes: Nodes, effects: Tensor) -> Nodes:
    """The most important node first."""
    scored = all(node in circuit.scores for node in nodes)
    by = {node: abs(circuit.scores[node]) if scored else e for node, e in zip(nodes, effects.abs().tolist(), strict=True)}
    return tuple(sorted(nodes, key=lambda node: -by[node]))


def random_subsets(nodes: Nodes, many: int, seed: int) -> list[Nodes]:
    """Subsets in which every node is with probability 1/2."""
    streams = [Random(f"{seed} subset {i}") for i in range(many)]
    return [tuple(node for node in nodes if draw.random() < 0.5) for draw in streams]


def sizes_of(n: int, many: int = 20) -> tuple[int, ...]:
    """0 to n: all sizes, or so many in equal steps."""
    steps = min(n, many)
    return tuple(sorted({round(i * n / steps) for i in range(steps + 1)}))


def other_circuits(
    order: Nodes, known: Iterable[Site], shape: Shape, many: int, seed: int, unread: Collection[str | int | None] = ()
) -> list[Nodes]:
    """Other heads in place of those of a circuit, one by one at the same position; MLPs in place of MLPs.

    Args:
        order: the nodes of the circuit.
        known: all its nodes, none of which is drawn.
        shape: of the model.
        many: how many circuits.
        seed: of the draws.
        unread: positions at which nobody reads what the last layer writes, so that its nodes there would be none to compare with.

    Returns:
        One per draw; none where a position has more nodes in the circuit than others. A node without a position is at all of them, so
        none of its other heads is drawn a second time at a single one.
    """
    classes = Counter((node.component, node.position) for node in order)
    taken = [*known]
    last = shape.n_layers - 1
    pools = {
        kind: [s for s in _every(*kind, shape) if not any(_meet(s, node) for node in taken) and not (s.layer == last and kind[1] in unread)]
        for kind in classes
    }
    for component, position in classes:
        everywhere = classes[component, None] if position is not None else 0
        if classes[component, position] + everywhere > len(pools[component, position]):
            return []
    return [_other(order, pools, Random(f"{seed} circuit {i}")) for i in range(many)]


def _every(component: str, position: str | int | None, shape: Shape) -> list[Site]:
    """All heads, or MLPs, at a position."""
    parts = range(shape.n_heads) if component == "z" else (None,)
    return [Site(component, layer, head, position) for layer in range(shape.n_layers) for head in parts]


def _meet(a: Site, b: Site) -> bool:
    """Whether two nodes are one head at one place; a node without a position is at all of them."""
    return a.at(None) == b.at(None) and (a.position == b.position or None in (a.position, b.position))


def _other(order: Nodes, pools: Mapping[tuple[str, str | int | None], Sequence[Site]], draw: Random) -> Nodes:
    """One random circuit."""
    number = Counter((node.component, node.position) for node in order)
    drawn: dict[tuple[str, str | int | None], list[Site]] = {}
    for kind in sorted(number, key=lambda kind: kind[1] is not None):
        everywhere = drawn.get((kind[0], None), [])
        drawn[kind] = draw.sample([s for s in pools[kind] if s.at(None) not in everywhere], number[kind])
    left = {kind: iter(sites) for kind, sites in drawn.items()}
    return tuple(next(left[node.component, node.position]) for node in order)


def incompleteness(runs: Ablations, nodes: Nodes, subsets: Sequence[Nodes], desc: str = "subsets") -> tuple[Tensor, Tensor]:
    """The metric of the circuit, and of the whole model, without some of its nodes, [subset prompt] each."""
    ways = [*(_left(nodes, gone) for gone in subsets), *(Knockout.of(gone) for gone in subsets)]
    found = runs(ways, desc)
    return found[: len(subsets)], found[len(subsets) :]


def greedy_subset(runs: Ablations, nodes: Nodes, steps: int, candidates: int, seed: str) -> Nodes:
    """A subset whose removal sets circuit and model far apart (Wang et al. 2023).

    In each step, of some nodes drawn at random, the one is added that widens the gap of the means the most, if any does.
    """
    draw, gone = Random(seed), tuple[Site, ...]()
    best = _gap(runs, *incompleteness(runs, nodes, [gone]))[0]
    for _ in range(steps):
        rest = [node for node in nodes if node not in gone]
        tried = [(*gone, node) for node in draw.sample(rest, min(candidates, len(rest)))]
        if not tried:
            break
        gaps = _gap(runs, *incompleteness(runs, nodes, tried, "greedy subsets"))
        first = max(range(len(tried)), key=gaps.__getitem__)
        if gaps[first] > best:
            gone, best = tried[first], gaps[first]
    return gone


def own_class(nodes: Nodes, roles: Mapping[Site, str]) -> list[Nodes]:
    """For every node the other heads, or MLPs, of its role; none for a node without.

    The node's own head at another position is not among them: with it gone, what reads the node may have nothing left to read.
    """
    return [tuple(n for n in nodes if n.at(None) != node.at(None) and node in roles and roles.get(n) == roles[node]) for node in nodes]


def telling(runs: Ablations, nodes: Nodes, given: Sequence[Nodes], steps: int, candidates: int, seed: int) -> list[Nodes]:
    """For every node others without which it matters the most, on the prompts of every second context from the first.

    It starts without any or without those of ``given``, whichever tells more; in each step, of some nodes drawn at random, the one is
    added that helps the most, until none does.
    """
    found = []
    for node, others in zip(nodes, given, strict=True):
        draw = Random(f"{seed} given {node}")
        start = [(), others] if others else [()]
        best, gone = max(zip(_worth(runs, nodes, node, start), start, strict=True), key=lambda x: x[0])
        for _ in range(steps):
            rest = [n for n in nodes if n != node and n not in gone]
            tried = [(*gone, n) for n in draw.sample(rest, min(candidates, len(rest)))]
            worth = _worth(runs, nodes, node, tried)
            if not tried or max(worth) <= best:
                break
            best, gone = max(zip(worth, tried, strict=True), key=lambda x: x[0])
        found.append(gone)
    return found


def without_each(runs: Ablations, nodes: Nodes, given: Sequence[Nodes]) -> tuple[Tensor, Tensor]:
    """The metric of the circuit without what is given for each node, and without that and the node, [node prompt] each."""
    ways = [_left(nodes, gone) for gone in given] + [_left(nodes, (*gone, node)) for node, gone in zip(nodes, given, strict=True)]
    found = runs(ways, "nodes")
    return found[: len(nodes)], found[len(nodes) :]


def _left(nodes: Nodes, gone: Iterable[Site]) -> Knockout:
    """The circuit without some nodes."""
    return Knockout.all_but(set(nodes) - set(gone))


def _gap(runs: Ablations, circuit: Tensor, model: Tensor, step: int = 1) -> list[float]:
    """How far the means over contexts, or over every second one, are apart."""
    return runs.mean(circuit - model)[:, ::step].double().mean(-1).abs().tolist()


def _worth(runs: Ablations, nodes: Nodes, node: Site, subsets: Sequence[Nodes]) -> list[float]:
    """How much a node matters without some others, on every second context."""
    found = runs([_left(nodes, gone) for gone in subsets] + [_left(nodes, (*gone, node)) for gone in subsets], "nodes")
    return _gap(runs, found[: len(subsets)], found[len(subsets) :], 2)
