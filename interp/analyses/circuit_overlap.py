"""Do two circuits use the same heads for the same jobs, more than chance would?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp import plots
from interp.circuit import Circuit
from interp.errors import InputError
from interp.results import Result, analysis
from interp.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Head = tuple[int, int]
Stages = Mapping[str, Mapping[Head, float | None]]

ALL, ANY = "all stages", "whatever the stage"
_NO_ROLE = "no role"
_SIDES = ("a", "b")
_USUAL = 0.02  # the cut-off of Merullo et al.


@dataclass(frozen=True, eq=False)
class CircuitOverlapResult(Result):
    """How many heads two circuits share, stage by stage, and how many two random ones would.

    An entry is a head in a stage, so a head with two roles counts twice in ``all stages`` and once in ``whatever the stage``. Stages have
    the names of their roles: ``inhibition / gatherer`` is one that has two names, ``mover, negative_mover`` one sweep of two roles.

    Attributes:
        shared: entries in both.
        size_a: entries of a.
        size_b: entries of b.
        chance: mean of ``shared`` if the heads of every stage were drawn from all heads of the model.
        chance_low: 2.5 % of such draws share at most about so many.
        chance_high: 97.5 % share at most so many.
        p: how often such draws share as many as were found, or more.
        layer_chance: the same mean if heads were drawn from those of the same layers, as many per layer as each circuit has there.
        layer_low: its 2.5 % point.
        layer_high: its 97.5 % point.
        layer_p: how often such draws share as many.
        scores: of every entry, NaN where a circuit gives none; a search scores heads that it did not choose, too.
        stages: of every row.
        cutoffs: of every row, the share of all heads that is taken per stage; None: the circuits as they are.
        entries: stage and head, in the order of ``scores``.
        nodes: nodes that are no heads: shared, of a, of b.
        edges: shared, of a, of b.
        one_sided: stages that only a, or only b, has.
        heads: heads of the model.
        notes: which cut-offs could not be taken, and why.
        labels: of the axes ``row`` and ``circuit``.
    """

    shared: Float[Tensor, " row"]
    size_a: Float[Tensor, " row"]
    size_b: Float[Tensor, " row"]
    chance: Float[Tensor, " row"]
    chance_low: Float[Tensor, " row"]
    chance_high: Float[Tensor, " row"]
    p: Float[Tensor, " row"]
    layer_chance: Float[Tensor, " row"]
    layer_low: Float[Tensor, " row"]
    layer_high: Float[Tensor, " row"]
    layer_p: Float[Tensor, " row"]
    scores: Float[Tensor, "entry circuit"]
    stages: tuple[str, ...]
    cutoffs: tuple[float | None, ...]
    entries: tuple[tuple[str, str, str], ...]
    nodes: tuple[int, int, int]
    edges: tuple[int, int, int]
    one_sided: dict[str, tuple[str, ...]]
    heads: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def jaccard(self) -> Float[Tensor, " row"]:
        """Shared entries over all entries of either; NaN where neither has any."""
        return self.shared / (self.size_a + self.size_b - self.shared)

    @property
    def main(self) -> int:
        """The row of the main number: all stages together, or heads whatever their stage where no stage is in both.

        Circuits that hold every head of every stage, for their scores, share all of them; of these it is the cut-off nearest to 2 %.
        """
        whole = [i for i, cutoff in enumerate(self.cutoffs) if cutoff is None]
        wanted = ANY if len(whole) == 1 or not self._common else ALL
        row = next((i for i in whole if self.stages[i] == wanted), whole[0])
        cut = [i for i, c in enumerate(self.cutoffs) if c is not None]
        cut = [i for i in cut if self.stages[i] == ALL] or (cut if len({self.stages[i] for i in cut}) == 1 else [])
        if cut and float(self.chance_low[row]) == float(torch.minimum(self.size_a, self.size_b)[row]):  # nothing else could come out
            return min(cut, key=lambda i: abs((self.cutoffs[i] or 0.0) - _USUAL))
        return row

    @property
    def _common(self) -> list[str]:
        whole = [s for s, cutoff in zip(self.stages, self.cutoffs, strict=True) if cutoff is None]
        return [s for s in whole if s not in (ALL, ANY, *self.one_sided["a"], *self.one_sided["b"])]

    @property
    def distinct(self) -> int:
        """The row of the circuits' heads, each counted once whatever its stages."""
        whole = [i for i, cutoff in enumerate(self.cutoffs) if cutoff is None]
        return next((i for i in whole if self.stages[i] == ANY), whole[0])

    def summary(self) -> str:
        """How many entries are shared, beside chance, of both kinds; edges; what is on one side only."""
        i = self.main
        what = "heads, whatever their stage," if self.stages[i] == ANY else "(stage, head) entries"
        cutoff = self.cutoffs[i]
        what += "" if cutoff is None else f", of the top {100 * cutoff:g} % of heads per stage,"
        found, a, b = (int(x[i]) for x in (self.shared, self.size_a, self.size_b))
        parts = [
            f"chance gives {_band(self.chance, self.chance_low, self.chance_high, i)}, p = {_p(self.p[i])}",
            f"heads of the same layers {_band(self.layer_chance, self.layer_low, self.layer_high, i)}, p = {_p(self.layer_p[i])}",
        ]
        if self.edges[1] and self.edges[2]:
            parts.append(f"{self.edges[0]} edge{'' if self.edges[0] == 1 else 's'} shared of {self.edges[1]} in a and {self.edges[2]} in b")
        parts += [f"only {side} has {', '.join(names)}" for side, names in self.one_sided.items() if names]
        told = f"{found / a:.0%} of the {a} in a, {found / b:.0%} of the {b} in b, Jaccard {float(self.jaccard[i]):.2f}"
        return f"{found} {what} are in both circuits: {told} ({'; '.join([*parts, *self.notes])})"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per stage and cut-off, and for all stages together.

        Raises:
            InputError: ``per`` is given; nothing here is per prompt.
        """
        import pandas as pd

        if per is not None:
            raise InputError(f"an overlap of circuits stores nothing per prompt or the like, so per must be left out, but it is {per!r}")
        columns = {k: getattr(self, k).tolist() for k in ("size_a", "size_b", "shared")}
        columns |= {"jaccard": self.jaccard.tolist(), "share_of_a": (self.shared / self.size_a).tolist()}
        columns |= {"share_of_b": (self.shared / self.size_b).tolist()}
        columns |= {k: getattr(self, k).tolist() for k in _NULL}
        cutoffs = [math.nan if c is None else c for c in self.cutoffs]
        return pd.DataFrame({"stage": list(self.stages), "cutoff": cutoffs, **columns})

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """Entries with the largest scores in either circuit, relative to the largest there; without scores the shared ones first."""
        import pandas as pd

        top = self.scores.abs().nan_to_num(0.0).amax(0).clamp_min(torch.finfo(torch.float64).tiny) if len(self.entries) else 1.0
        size = (self.scores.abs().nan_to_num(0.0) / top).amax(1)
        order = sorted(range(len(self.entries)), key=lambda i: (-float(size[i]), self.entries[i][2] != "both"))[:n]
        rows = [(*self.entries[i], *self.scores[i].tolist()) for i in order]
        return pd.DataFrame(rows, columns=["stage", "site", "in", "score_a", "score_b"])

    def plot(self) -> go.Figure:
        """The circuits as they are: shared entries as a share of the smaller circuit, beside both kinds of chance."""
        rows = [i for i, cutoff in enumerate(self.cutoffs) if cutoff is None]
        most = torch.minimum(self.size_a, self.size_b)[rows].clamp_min(1)
        bands = {"chance": ("chance", "chance_low", "chance_high")}
        bands |= {"chance within layers": ("layer_chance", "layer_low", "layer_high")}
        values = {name: [getattr(self, field)[rows] / most for field in fields] for name, fields in bands.items()}
        return plots.bars(
            [self.stages[i] for i in rows],
            {"found": self.shared[rows] / most, **{name: mean for name, (mean, *_) in values.items()}},
            intervals={name: (low, high) for name, (_, low, high) in values.items()},
            title=f"Heads that both circuits have, of {self.heads} heads of the model",
            ylabel="share of the smaller set, with 95 % of random draws",
            horizontal=True,
        )

    def figures(self) -> dict[str, go.Figure]:
        """By stage, and by cut-off where both circuits have scores."""
        drawn = {"By stage": self.plot()}
        cut = [i for i, c in enumerate(self.cutoffs) if c is not None and not bool(self.shared[i].isnan())]
        series: dict[str, list[int]] = {}
        for i in cut:
            series.setdefault(self.stages[i], []).append(i)
        steps = sorted({self.cutoffs[i] or 0.0 for i in cut})
        if len(steps) > 1:
            drawn["By cut-off"] = self._lines(series, steps)
        return drawn

    def _lines(self, series: Mapping[str, Sequence[int]], steps: Sequence[float]) -> go.Figure:
        def along(values: Tensor, rows: Sequence[int]) -> list[float]:
            by_step = {self.cutoffs[i]: float(values[i] / self.size_a[i]) for i in rows}
            return [by_step.get(step, math.nan) for step in steps]

        together = series.get(ALL) or next(iter(series.values()))
        shown = {name: along(self.shared, rows) for name, rows in series.items()} | {"chance": along(self.chance, together)}
        return plots.lines(
            shown,
            [100 * step for step in steps],
            bands={"chance": (along(self.chance_low, together), along(self.chance_high, together))},
            title="Share of the strongest heads that both circuits have, by how many are taken per stage",
            xlabel="heads taken per stage, % of all heads",
            ylabel="share of them in both",
        )


_NULL = ("chance", "chance_low", "chance_high", "p", "layer_chance", "layer_low", "layer_high", "layer_p")


def _p(p: Tensor) -> str:
    """No p is exactly 0 or written with more digits than it has."""
    return f"{float(p):.2g}"


def _band(mean: Tensor, low: Tensor, high: Tensor, row: int) -> str:
    return f"{float(mean[row]):.3g} [{float(low[row]):.0f}, {float(high[row]):.0f}]"


@analysis(version=2)
def circuit_overlap(a: Circuit, b: Circuit, *, cutoffs: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)) -> CircuitOverlapResult:
    """Do two circuits use the same heads for the same jobs, more than chance would?

    Two tasks on one model (Merullo et al. 2024, arXiv 2310.08744), or a base and a tuned model on one task. An entry is a head in a
    stage; positions do not matter, since tasks name theirs differently. ``shared`` counts entries in both. With scores, each cut-off
    takes the ceil(cutoff x layers x heads) heads of largest |score| of every stage that both circuits have; where fewer have scores there
    is no such row, and the result says so.

    Circuits that ``circuit_discovery`` found say what the heads of a stage send to, back from the logits, and so are matched: the
    inhibition heads of one task and the gatherers of another both send to the queries of what writes the answer, and are one stage. They
    bring the scores of all heads that could send in a stage, and every stage in which a head was chosen (``rankings``). Heads that support
    the answer and heads that oppose it are two stages of the circuits as they are, and one where a cut-off ranks by size, since
    they are found in one sweep. Stages that send to the same from several positions are one.

    The stages of any other circuit are its roles, matched by name. It has scores of its nodes alone, and a node has one role: a cut-off
    then ranks those nodes, without heads that are named after another stage.

    Chance is exact. If the heads of every stage are drawn without replacement from all heads of the model, what is shared is
    hypergeometric in a stage, and the sum over stages, drawn independently, is the convolution of these. Circuits also resemble each other
    because a stage has its place in depth: the stricter chance draws heads within their layers, as many in each as the circuits have there.
    p is one-sided: the probability of sharing as many or more. Both say nothing about what the heads do.

    Args:
        a: one circuit, or a result that found it.
        b: another, of a model of the same shape.
        cutoffs: shares of all heads taken per stage.

    Raises:
        InputError: circuits of different models, one without heads, or a cut-off outside (0, 1].
    """
    for name, circuit in (("a", a), ("b", b)):
        if not any(n.component == "z" for n in circuit.nodes):
            raise InputError(f"circuit {name} has no attention heads among its {len(circuit.nodes)} nodes, so there is nothing to share")
    if a.model != b.model:
        raise InputError(f"circuit a is of a model with (layers, heads, key/value heads) {a.model}, circuit b of one with {b.model}")
    if bad := [c for c in cutoffs if isinstance(c, bool) or not isinstance(c, int | float) or not 0 < c <= 1]:
        raise InputError(f"a cut-off is a share of all heads, more than 0 and at most 1, but one is {bad[0]!r}")
    jobs, sweeps = _keys(a, b, apart=True), _keys(a, b, apart=False)
    kept, scored = (_stages(a), _stages(b)), (_ranked(a), _ranked(b))
    names = _names(kept, jobs)
    sides, ranked = _matched(kept, jobs, names), _matched(scored, sweeps, _names(scored, sweeps))
    rows, notes = list(_whole(*sides)), list[str]()
    bare = [name for name, stages in zip(_SIDES, ranked, strict=True) if {s for h in stages.values() for s in h.values()} == {None}]
    if bare and cutoffs:
        notes.append(f"no cut-offs, since {' and '.join(bare)} {'has' if len(bare) == 1 else 'have'} no scores of heads")
    for cutoff in cutoffs if not bare else ():
        taken, why = _taken(*ranked, cutoff, a.model[0] * a.model[1])
        rows += [(stage, cutoff, *sets) for stage, sets in taken]
        notes += why
    plain = [name for name, circuit in zip(_SIDES, (a, b), strict=True) if _apart(circuit)]
    if plain and any(cutoff is not None for _, cutoff, *_ in rows):
        notes.append(f"cut-offs rank the nodes of {' and '.join(plain)}, of which each has one role")
    measured = [_measured(x, y, a.model[:2]) for _, _, x, y in rows]
    columns = {k: torch.tensor([m[k] for m in measured], dtype=torch.float64) for k in ("shared", "size_a", "size_b", *_NULL)}
    entries, scores = _entries(sides, _matched(scored, jobs, names))
    others = [{n for n in c.nodes if n.component != "z"} for c in (a, b)]
    return CircuitOverlapResult(
        **columns,
        scores=torch.tensor(scores, dtype=torch.float64),
        stages=tuple(stage for stage, *_ in rows),
        cutoffs=tuple(cutoff for _, cutoff, *_ in rows),
        entries=entries,
        nodes=(len(others[0] & others[1]), len(others[0]), len(others[1])),
        edges=(len({*a.edges} & {*b.edges}), len(a.edges), len(b.edges)),
        one_sided={"a": tuple(s for s in sides[0] if s not in sides[1]), "b": tuple(s for s in sides[1] if s not in sides[0])},
        heads=a.model[0] * a.model[1],
        notes=tuple(notes),
        labels={"row": tuple(s if c is None else f"{s}, top {100 * c:g} %" for s, c, *_ in rows), "circuit": _SIDES},
    )


def _stages(circuit: Circuit) -> Stages:
    """Stage -> head -> its score of largest size over positions, None where it has none; a head is in every stage that chose it."""
    entries = [(role, site, ranking.scores.get(site)) for role, ranking in circuit.rankings.items() for site in ranking.chosen]
    told = {site for _, site, _ in entries}
    named = [node for node in circuit.nodes if node.head is not None and node not in told]
    every = [*entries, *((circuit.roles.get(node, _NO_ROLE), node, circuit.scores.get(node)) for node in named)]
    return _largest((role, _head(site), score) for role, site, score in every)


Both = tuple[Stages, Stages]
Keys = tuple[Mapping[str, str], Mapping[str, str]]
"""Role -> what makes two stages the same one, of both circuits."""


def _keys(a: Circuit, b: Circuit, *, apart: bool) -> Keys:
    """What the stages of both circuits are matched by.

    That is what they send to where all searches say so, and roles everywhere else.

    Args:
        a: one circuit.
        b: the other.
        apart: heads that support the answer and heads that oppose it are two stages; otherwise roles of one sweep are one.
    """
    both = (a, b)
    if all(c.rankings and all(ranking.sends for ranking in c.rankings.values()) for c in both):
        told = [{role: r.sends + (f" {r.sign}" if apart else "") for role, r in c.rankings.items()} for c in both]
        return told[0], told[1]
    if apart:
        return {}, {}
    # Without that, a sweep shows by its scores: it gives the same ones to both of its roles.
    same: dict[str, str] = {}
    for role in dict.fromkeys(role for c in both for role in c.rankings):
        same[role] = next((k for first, k in same.items() if first == k and _one_sweep(first, role, both)), role)
    return same, same


def _one_sweep(first: str, second: str, circuits: Sequence[Circuit]) -> bool:
    ranked = [c.rankings for c in circuits if first in c.rankings and second in c.rankings]
    return bool(ranked) and all(r[first].scores == r[second].scores for r in ranked)


def _of(role: str, known: Mapping[str, str]) -> str:
    return known.get(role, f"role {role}")


def _names(sides: Both, keys: Keys) -> dict[str, str]:
    """Key -> the name of its stage, made of the roles that it has in a and in b."""
    roles: dict[str, tuple[list[str], list[str]]] = {}
    for side, (stages, known) in enumerate(zip(sides, keys, strict=True)):
        for role in stages:
            roles.setdefault(_of(role, known), ([], []))[side].append(role)
    names = {key: " / ".join(dict.fromkeys(", ".join(own) for own in both if own)) for key, both in roles.items()}
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {key: f"{name} ({key})" if name in twice else name for key, name in names.items()}


def _matched(sides: Both, keys: Keys, names: Mapping[str, str]) -> Both:
    """The same with stages of one key under one name; without those that have no name."""
    found = []
    for stages, known in zip(sides, keys, strict=True):
        heads = ((_of(role, known), head, score) for role, of in stages.items() for head, score in of.items())
        found.append(_largest((names[key], head, score) for key, head, score in heads if key in names))
    return found[0], found[1]


def _apart(circuit: Circuit) -> bool:
    """Whether two stages share a position, and no ranking says which of its heads another stage has taken."""
    at = {(role, node.position) for node, role in circuit.roles.items() if node.head is not None}
    return not circuit.rankings and len(at) > len({position for _, position in at})


def _ranked(circuit: Circuit) -> Stages:
    """The same with every head that has a score in a stage, in the circuit or not."""
    scored = [(role, site, score) for role, ranking in circuit.rankings.items() for site, score in ranking.scores.items()]
    found = {role: dict(heads) for role, heads in _stages(circuit).items() if role not in circuit.rankings}
    return found | _largest((role, _head(site), score) for role, site, score in scored)


def _head(site: Site) -> Head:
    assert site.layer is not None and site.head is not None
    return site.layer, site.head


def _largest(entries: Iterable[tuple[str, Head, float | None]]) -> dict[str, dict[Head, float | None]]:
    """Stage -> head -> the score of largest size among the entries."""
    found: dict[str, dict[Head, float | None]] = {}
    for stage, head, new in entries:
        heads = found.setdefault(stage, {})
        old = heads.get(head)
        heads[head] = new if old is None or (new is not None and abs(new) > abs(old)) else old
    return found


Sets = tuple[list[set[Head]], list[set[Head]]]
"""Heads of a and of b, stage by stage."""


def _whole(a: Stages, b: Stages) -> Iterator[tuple[str, None, list[set[Head]], list[set[Head]]]]:
    """Rows of the circuits as they are: every stage, all together, and heads without regard to stages."""
    names = list(dict.fromkeys([*a, *b]))
    pairs = [(set(a.get(name, ())), set(b.get(name, ()))) for name in names]
    for name, (x, y) in zip(names, pairs, strict=True):
        yield name, None, [x], [y]
    if len(names) > 1:
        yield ALL, None, [x for x, _ in pairs], [y for _, y in pairs]
        yield ANY, None, [set().union(*(x for x, _ in pairs))], [set().union(*(y for _, y in pairs))]


def _taken(a: Stages, b: Stages, cutoff: float, heads: int) -> tuple[list[tuple[str, Sets]], list[str]]:
    """The strongest heads of the stages in both circuits; and why where there are none."""
    k = math.ceil(cutoff * heads - 1e-9)
    rows, short = list[tuple[str, Sets]](), dict[str, list[str]]()
    common = [name for name in a if name in b]
    for name in common:
        tops = []
        for side, stages in zip(_SIDES, (a, b), strict=True):
            scored = {h: abs(s) for h, s in stages[name].items() if s is not None}
            if len(scored) < k:
                short.setdefault(side, []).append(f"{len(scored)} for {name}")
            tops.append(set(sorted(scored, key=lambda h: (-scored[h], h))[:k]))
        if all(len(top) == k for top in tops):
            rows.append((name, ([tops[0]], [tops[1]])))
    if len(rows) == len(common) > 1:
        rows.append((ALL, ([x[0] for _, (x, _) in rows], [y[0] for _, (_, y) in rows])))
    lacks = "; ".join(f"{side} has {', '.join(found)}" for side, found in short.items())
    return rows, [f"the top {100 * cutoff:g} % needs {k} scored heads per stage, but {lacks}"] if short else []


def _measured(a: Sequence[set[Head]], b: Sequence[set[Head]], size: Sequence[int]) -> dict[str, float]:
    """Counts of a row, and both kinds of chance."""
    layers, heads = size
    shared = sum(len(x & y) for x, y in zip(a, b, strict=True))
    found: dict[str, float] = {"shared": shared, "size_a": sum(map(len, a)), "size_b": sum(map(len, b))}

    def within(some: set[Head], layer: int) -> int:
        return sum(i == layer for i, _ in some)

    anywhere = _sum_of(_hypergeometric(layers * heads, len(x), len(y)) for x, y in zip(a, b, strict=True))
    by_layer = _sum_of(
        _hypergeometric(heads, within(x, i), within(y, i)) for x, y in zip(a, b, strict=True) for i in range(layers) if within(x, i)
    )
    for names, chances in ((_NULL[:4], anywhere), (_NULL[4:], by_layer)):
        mean = sum(i * p for i, p in enumerate(chances))
        found |= dict(zip(names, (mean, _quantile(chances, 0.025), _quantile(chances, 0.975), sum(chances[shared:])), strict=True))
    return found


def _hypergeometric(pool: int, first: int, second: int) -> list[float]:
    """Probability that two sets of these sizes, drawn from a pool, share 0, 1, 2, ... members."""
    ways = math.comb(pool, second)
    return [math.comb(first, i) * math.comb(pool - first, second - i) / ways for i in range(min(first, second) + 1)]


def _sum_of(parts: Iterable[list[float]]) -> list[float]:
    """Probabilities of a sum of independent counts."""
    whole = [1.0]
    for part in parts:
        sums = [0.0] * (len(whole) + len(part) - 1)
        for i, p in enumerate(whole):
            for j, q in enumerate(part):
                sums[i + j] += p * q
        whole = sums
    return whole


def _quantile(chances: Sequence[float], level: float) -> float:
    below = 0.0
    for count, p in enumerate(chances):
        below += p
        if below >= level - 1e-12:
            return float(count)
    return float(len(chances) - 1)


def _entries(sides: Both, ranked: Both) -> tuple[tuple[tuple[str, str, str], ...], list[list[float]]]:
    """Stage, head and who has it, of every entry; and its scores in both circuits."""
    found, scores = [], []
    for stage in dict.fromkeys([*sides[0], *sides[1]]):
        for head in sorted({head for side in sides for head in side.get(stage, ())}):
            held = [head in side.get(stage, ()) for side in sides]
            found.append((stage, f"L{head[0]}H{head[1]}", "both" if all(held) else _SIDES[held.index(True)]))
            given = [side.get(stage, {}).get(head) for side in ranked]
            scores.append([math.nan if s is None else s for s in given])
    return tuple(found), scores
