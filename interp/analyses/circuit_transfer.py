"""Does a circuit found in one model do its work in the other, and how much of it is the other's own circuit?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.circuit import Circuit
from interp.errors import InputError
from interp.metrics import Metric
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.sites import Site
from interp.stats import Estimate, mcnemar, paired_change, permutation, plus_minus, standard_error
from interp.sweeps.ablation import ABLATIONS, Ablation, Ablations, Knockout, comparable
from interp.sweeps.answers import Among, above_chance, head_groups, heads_of, means, measures, names, readers, share, unseen
from interp.sweeps.draws import unread
from interp.sweeps.knockouts import other_circuits

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.metrics import Reader
    from interp.models import HookedModel, ModelPair
    from interp.models.checkpoint import Shape

_CHECKED = 4
_ALL = "all"
_TRIES = 50  # draws for every random circuit that is wanted: enough to find every one of a handful


@dataclass(frozen=True, eq=False)
class CircuitTransferResult(Result):
    """The measures of every circuit in both models, per prompt: ``accuracy`` (0 or 1), ``margin`` and the metric.

    Attributes:
        full: of the whole model.
        empty: of the model with every head knocked out.
        circuit: of each circuit alone, in each model.
        random: of random circuits, as many heads at each position as the circuit has, none of them its own, no two alike; NaN where there
            are no others.
        size_base: heads at positions that base's circuit has of each role; one that was chosen for two roles counts in the one it has.
        size_tuned: that tuned's circuit has.
        shared: heads that both have, at one position.
        expected: how many would be shared by chance, were the heads of each role and position drawn from all heads.
        p: how often such a draw shares as many, or more.
        floor: largest change by rounding alone; for the accuracy the share of answers whose margin is within it.
        deviation: largest difference of runs that were computed both ways, many together and one by one.
        checked: how many were.
        ablation: ``mean``, ``resample`` or ``zero``.
        among: which tokens an answer has to beat to be right.
        unit: of the metric.
        draw_seed: of the bootstrap and the random circuits.
        notes: what stood in for knocked-out heads, and what was left out.
        labels: of the axes: measures, sides, circuits, roles.
    """

    full: Float[Tensor, "measure side prompt"]
    empty: Float[Tensor, "measure side prompt"]
    circuit: Float[Tensor, "measure circuit side prompt"]
    random: Float[Tensor, "measure circuit side draw prompt"]
    size_base: Int[Tensor, " role"]
    size_tuned: Int[Tensor, " role"]
    shared: Int[Tensor, " role"]
    expected: Float[Tensor, " role"]
    p: Float[Tensor, " role"]
    floor: Float[Tensor, "measure side"]
    deviation: float
    checked: int
    ablation: Ablation
    among: Among
    unit: str
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    def _at(self, **names: str) -> tuple[int, ...]:
        for axis, name in names.items():
            if name not in self.labels[axis]:
                raise unknown(axis, name, self.labels[axis])
        return tuple(self.labels[axis].index(name) for axis, name in names.items())

    def faithfulness(self, circuit: str, side: str, measure: str = "accuracy") -> Estimate:
        """(F(C) - F(empty)) / (F(M) - F(empty)): 1 for a circuit that does as well as the whole model, more if it does better."""
        m, c, s = self._at(measure=measure, circuit=circuit, side=side)
        return share(self.circuit[m, c, s], self.empty[m, s], self.full[m, s], of_answers=not m, seed=self.draw_seed)

    def ratio(self, circuit: str, side: str, measure: str = "accuracy") -> Estimate:
        """F(C) / F(M), as Prakash et al. call faithfulness; refused where F(M) is within two standard errors of 0."""
        m, c, s = self._at(measure=measure, circuit=circuit, side=side)
        full = self.full[m, s]
        if float(full.double().mean().abs()) > 2 * _error(full):
            return share(self.circuit[m, c, s], torch.zeros_like(full), full, of_answers=not m, seed=self.draw_seed)
        none = torch.tensor(torch.nan)
        return Estimate(none, none, none, f"F(M) is {plus_minus(full)}, within two standard errors of 0")

    def difference(self, side: str, measure: str = "accuracy") -> Float[Tensor, " prompt"]:
        """What tuned's circuit gives more than base's, in one of the models."""
        m, s = self._at(measure=measure, side=side)
        return self.circuit[m, self._at(circuit="tuned")[0], s] - self.circuit[m, self._at(circuit="base")[0], s]

    def summary(self) -> str:
        """How each circuit does in tuned and in base, beside random ones, and how many heads they share."""
        told = [self._told(side) for side in reversed(self.labels["side"])]
        a, b, both = (int(x[-1]) for x in (self.size_base, self.size_tuned, self.shared))
        chance = f"chance {float(self.expected[-1]):.2g}, p = {float(self.p[-1]):.2g}"
        told.append(f"{both} of the {a} heads of base's circuit are among the {b} of tuned's, {chance}")
        how = f"{self.ablation} ablation; right among {self.among}; n = {self.full.shape[2]} prompts; {self.exactness}"
        return f"Accuracy {'; '.join(told)} ({how})"

    def _told(self, side: str) -> str:
        (s,) = self._at(side=side)
        parts = []
        for c, name in enumerate(self.labels["circuit"]):
            ratio = self.ratio(name, side)
            as_share = "" if ratio.refused else f", {float(ratio.value):.2f} of it"
            parts.append(f"{_of(name)} {_mean(self.circuit[0, c, s])}{as_share}")
        draws = self.random[0, :, s].double().mean(-1)
        known = draws[~draws.isnan()]
        parts += [f"random ones {float(known.mean()):.2f} ({len(known)} draws)"] if len(known) else []
        low, high = paired_change(*self._flips(side), self.full.shape[2])
        gap = f"tuned's circuit minus base's {float(self.difference(side).double().mean()):.2f} [{low:.2f}, {high:.2f}]"
        return f"in {side} {_mean(self.full[0, s])}: with {', '.join(parts)}, {gap}"

    def _flips(self, side: str) -> tuple[int, int]:
        d = self.difference(side)
        return int((d > 0).sum()), int((d < 0).sum())

    @property
    def exactness(self) -> str:
        """How exact the values are, in words."""
        off = f"{self.checked} runs done one by one are off by at most {self.deviation:.1g}"
        unsure = float(self.floor[0].max())
        rounding = f"rounding moves the margin by up to {float(self.floor[1].max()):.1g}"
        return "; ".join([off, rounding + (f", which leaves {unsure:.2%} of answers open" if unsure else ""), *self.notes])

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per measure, circuit and model; ``per="prompt"`` every run.

        ``difference`` is F(C) - F(M), with ``gained``, ``lost`` and the exact test ``p_mcnemar`` of the answers; ``ratio`` is F(C) / F(M),
        ``recovered`` the faithfulness with its interval; ``random`` and ``random_sd`` mean and standard deviation of that measure over
        ``draws`` random circuits. ``p`` is that of a sign-flip test of the
        difference, ``p_adjusted`` corrected for all circuits and models.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        make = self._per_prompt if per else self._rows
        return pd.DataFrame([row for m in range(len(self.labels["measure"])) for row in make(m)])

    def _per_prompt(self, m: int) -> Iterator[dict[str, Any]]:
        start = {"measure": self.labels["measure"][m]}
        for s, side in enumerate(self.labels["side"]):
            whole = [("whole model", self.full[m, s]), ("no heads", self.empty[m, s])]
            for name, values in [*whole, *zip(self.labels["circuit"], self.circuit[m, :, s], strict=True)]:
                for prompt, value in enumerate(values.tolist()):
                    yield {**start, "circuit": name, "side": side, "prompt": prompt, "value": value}

    def _rows(self, m: int) -> Iterator[dict[str, Any]]:
        measure, gap = self.labels["measure"][m], (self.circuit[m] - self.full[m]).double()
        test = permutation(gap.movedim(-1, 0), seed=self.draw_seed)
        for c, name in enumerate(self.labels["circuit"]):
            for s, side in enumerate(self.labels["side"]):
                own, one, found = self.circuit[m, c, s].double(), gap[c, s], self.faithfulness(name, side, measure)
                up, down = (int((one > 0).sum()), int((one < 0).sum())) if not m else (-1, -1)
                draws = self.random[m, c, s].double().mean(-1)
                draws = draws[~draws.isnan()]
                row = {"measure": measure, "circuit": name, "side": side, "value": float(own.mean()), "value_se": _error(own)}
                row |= {"full": float(self.full[m, s].double().mean()), "empty": float(self.empty[m, s].double().mean())}
                row |= {"difference": float(one.mean()), "difference_se": _error(one), "gained": up, "lost": down}
                row |= {"p_mcnemar": mcnemar(up, down) if not m else torch.nan, "ratio": float(self.ratio(name, side, measure).value)}
                row |= {"recovered": float(found.value), "low": float(found.low), "high": float(found.high)}
                row |= {
                    "random": float(draws.mean()),
                    "random_sd": float(draws.std()) if len(draws) > 1 else torch.nan,
                    "draws": len(draws),
                }
                yield row | {"p": float(test.p[c, s]), "p_adjusted": float(test.adjusted[c, s])}

    def overlap(self) -> pd.DataFrame:
        """Heads of each role in both circuits, in all in the last row: how many, shared, the share of each, and what chance gives."""
        import pandas as pd

        table = pd.DataFrame({"role": self.labels["role"], "base": self.size_base, "tuned": self.size_tuned, "shared": self.shared})
        table["share_of_base"], table["share_of_tuned"] = table["shared"] / table["base"], table["shared"] / table["tuned"]
        return table.assign(chance=self.expected, p=self.p)

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """Every circuit in every model by accuracy: ``effect`` is what is lost or gained against the whole model."""
        import pandas as pd

        rows = [{**row, "effect": row["difference"], "effect_se": row["difference_se"]} for row in self._rows(0)]
        columns = [
            "circuit",
            "side",
            "value",
            "full",
            "effect",
            "effect_se",
            "ratio",
            "recovered",
            "low",
            "high",
            "p",
            "p_adjusted",
            "random",
        ]
        return pd.DataFrame(rows[:n]).reindex(columns=columns)

    def plot(self) -> go.Figure:
        """Accuracy of both models whole, with each circuit alone, and with random ones."""
        return self._bars(0)

    def figures(self) -> dict[str, go.Figure]:
        """Accuracy, the metric, and the overlap by role."""
        last = len(self.labels["measure"]) - 1
        return {"accuracy": self._bars(0), self.labels["measure"][last]: self._bars(last), "overlap": self._overlap()}

    def _bars(self, m: int) -> go.Figure:
        rows = {"whole model": self.full[m]} | {f"{_of(c)} alone": x for c, x in zip(self.labels["circuit"], self.circuit[m], strict=True)}
        rows["no heads"] = self.empty[m]
        found = {name: means(x.T, of_answers=not m, seed=self.draw_seed) for name, x in rows.items()}
        series = {side: torch.stack([e.value[s] for e in found.values()]) for s, side in enumerate(self.labels["side"])}
        intervals = {
            side: tuple(torch.stack([getattr(e, end)[s] for e in found.values()]) for end in ("low", "high"))
            for s, side in enumerate(self.labels["side"])
        }
        labels = list(rows)
        for c, name in enumerate(self.labels["circuit"][:2]):
            draws = self.random[m, c].double().mean(-1)
            draws = draws[:, ~draws.isnan().any(0)]
            if draws.shape[-1]:
                labels.append(f"random, as {_of(name)}")
                for s, side in enumerate(self.labels["side"]):
                    own = draws[s]
                    series[side] = torch.cat([series[side], own.mean()[None]])
                    intervals[side] = tuple(torch.cat([x, e[None]]) for x, e in zip(intervals[side], (own.min(), own.max()), strict=True))
        return plots.bars(
            labels,
            series,
            intervals=intervals,  # pyright: ignore[reportArgumentType]
            title=f"Circuits alone, {self.ablation} ablation (n = {self.full.shape[2]}; random: range)",
            xlabel="what runs",
            ylabel="accuracy" if not m else self.unit,
            horizontal=True,
        )

    def _overlap(self) -> go.Figure:
        counts = {"base": self.size_base, "shared": self.shared, "tuned": self.size_tuned, "shared by chance": self.expected}
        return plots.bars(self.labels["role"], counts, title="Heads of each role in both circuits", xlabel="role", ylabel="heads")


@analysis(version=2)
def circuit_transfer(
    pair: ModelPair,
    prompts: Prompts | PromptPairs,
    circuit_base: Circuit,
    circuit_tuned: Circuit,
    *,
    metric: Metric | str = "logit_diff",
    among: Among = "vocabulary",
    ablation: Ablation = "mean",
    by: str | None = None,
    random_circuits: int = 10,
    seed: int = 0,
) -> CircuitTransferResult:
    """Does a circuit found in one model do its work in the other, and how much of it is the other's own circuit?

    The table of Prakash et al. (2024, arXiv 2402.14811): each circuit alone in each model. A circuit runs alone when every head at every
    token that it does not name is knocked out, with what the model itself gives in its place (``ablation``); MLPs and embeddings run free.
    ``shared`` is a third circuit: the heads that both have at one position. Random circuits have as many heads at each position as
    base's or tuned's, none of them its own, no two alike. A circuit may do better than the model, if what is knocked out was in the way.

    Args:
        pair: the two models.
        prompts: what is asked; of pairs the clean ones, and means come from the corrupt ones. They need answers.
        circuit_base: the circuit found in base.
        circuit_tuned: the one found in tuned.
        metric: what is measured besides accuracy and margin.
        among: an answer is right among the whole ``vocabulary``, or among the ``options`` of its prompt.
        ablation: what a knocked-out head gives: ``mean``, ``resample`` or ``zero``, as for circuit_evaluation.
        by: which prompts share means, as for circuit_evaluation.
        random_circuits: draws of random circuits, for each of the two.
        seed: of the draws, the bootstrap, and the runs that are checked.

    Raises:
        InputError: a circuit of another shape, without heads, or found on these contexts; fewer than two prompts; no model that answers
            better than a guess among the options; an unknown setting.
    """
    circuits = _circuits(pair, prompts, {"base": circuit_base, "tuned": circuit_tuned}, ablation, random_circuits)
    asked = comparable(prompts, ablation, by)
    if len(asked) < 2:
        raise InputError(f"circuit_transfer needs two prompts or more that others stand in for; of {len(prompts)} there are {len(asked)}")
    out = [f"{len(prompts) - len(asked)} of {len(prompts)} prompts left out: no other stands in for them"] * (len(asked) < len(prompts))
    prompts = prompts[asked]
    read, shape = readers(prompts, metric, among), pair.shape
    above_chance(prompts, dict(pair.sides()))
    nodes = {name: heads_of(c, f"{name}'s circuit") for name, c in circuits.items()}
    both = tuple(node for node in nodes["base"] if node in nodes["tuned"])
    nodes |= {"shared": both} if both and set(both) not in map(set, nodes.values()) else {}
    batch = pair.batch(clean_prompts(prompts))
    nobody = unread(batch, [node for own in nodes.values() for node in own], read.values())
    drawn = {name: _drawn(own, shape, 0 if name == "shared" else random_circuits, seed, nobody) for name, own in nodes.items()}
    sides = {side: _side(model, prompts, read, nodes, drawn, ablation, by, seed) for side, model in pair.sides()}
    found = list(sides.values())
    few = {name: len(drawn[name]) for name in circuits if len(drawn[name]) < random_circuits}
    return CircuitTransferResult(
        **{name: torch.stack([side.values[name] for side in found], dim=axis) for name, axis in _AXES.items()},
        **_overlap(circuits, shape),
        deviation=max(side.deviation for side in found),
        checked=sum(side.checked for side in found),
        ablation=ablation,
        among=among,
        unit=Metric.parse(metric).unit or str(Metric.parse(metric)),
        draw_seed=seed,
        notes=(*dict.fromkeys(n for side in found for n in side.notes), *_notes(circuits, few), *out),
        labels={
            "measure": names(read),
            "side": tuple(sides),
            "circuit": tuple(nodes),
            "role": (*dict.fromkeys(r for c in circuits.values() for r in head_groups(c)), _ALL),
        },
    )


_AXES = {"full": 1, "empty": 1, "circuit": 2, "random": 2, "floor": 1}
"""Where the side comes among the axes of a field."""


@dataclass(frozen=True, eq=False)
class _Side:
    """All runs of one model: the fields of the result without the side."""

    values: dict[str, Tensor]
    deviation: float
    checked: int
    notes: tuple[str, ...]


def _side(
    model: HookedModel,
    prompts: Prompts | PromptPairs,
    read: dict[str, Reader],
    nodes: dict[str, tuple[Site, ...]],
    drawn: dict[str, list[tuple[Site, ...]]],
    ablation: Ablation,
    by: str | None,
    seed: int,
) -> _Side:
    todo = [Knockout.all_but(kept) for kept in ((), *nodes.values(), *(c for draws in drawn.values() for c in draws))]
    runs = [Ablations(model, prompts, reader, ablation=ablation, by=by, seed=seed) for reader in read.values()]
    values = [r(todo, f"circuits, {name}") for r, name in zip(runs, read, strict=True)]
    checks = [r.checked(_CHECKED, seed) for r in runs]
    every, many = measures(values), len(nodes)
    deepest = max(map(len, drawn.values()))
    random = every.new_full((len(every), many, deepest, every.shape[-1]), torch.nan)
    at = 1 + many
    for i, draws in enumerate(drawn.values()):
        random[:, i, : len(draws)] = every[:, at : at + len(draws)]
        at += len(draws)
    unsure = (values[0].abs() <= runs[0].floor).float().mean()
    found = {"full": measures([r.intact for r in runs]), "empty": every[:, 0], "circuit": every[:, 1 : 1 + many], "random": random}
    found["floor"] = torch.stack([unsure, *(torch.tensor(float(r.floor)) for r in runs)])
    return _Side(found, max(off for _, off in checks), sum(n for n, _ in checks), tuple(dict.fromkeys(n for r in runs for n in r.notes)))


def _circuits(pair: ModelPair, prompts: object, circuits: dict[str, Circuit], ablation: str, draws: int) -> dict[str, Circuit]:
    """The circuits; refuses what cannot be compared, before anything runs."""
    if not isinstance(prompts, Prompts | PromptPairs):
        raise InputError(f"circuit_transfer needs Prompts or PromptPairs, not {type(prompts).__name__}")
    if ablation not in ABLATIONS:
        raise unknown("ablation", str(ablation), ABLATIONS)
    if type(draws) is not int or draws < 0:
        raise InputError(f"random_circuits is a number of draws, but it is {draws!r}")
    if len(prompts) < 2:
        raise InputError("circuit_transfer needs at least two prompts for standard errors, got one")
    for name, circuit in circuits.items():
        heads_of(circuit.check(pair.shape), f"{name}'s circuit")
        unseen(prompts, circuit, f"{name}'s circuit")
        if _ALL in circuit.roles.values():
            raise InputError(f"a role of {name}'s circuit is called {_ALL!r}, which here is the name of all of them; rename the role")
    return circuits


def _overlap(circuits: dict[str, Circuit], shape: Shape) -> dict[str, Tensor]:
    """Heads of each role in both circuits, and in all."""
    a, b = (head_groups(c) for c in circuits.values())
    roles = dict.fromkeys([*a, *b])
    rows = [(set(a.get(role, ())), set(b.get(role, ()))) for role in roles] + [tuple(set(heads_of(c)) for c in circuits.values())]
    counts = torch.tensor([(len(x), len(y), len(x & y)) for x, y in rows])
    return {
        "size_base": counts[:, 0],
        "size_tuned": counts[:, 1],
        "shared": counts[:, 2],
        "expected": torch.tensor([_expected(x, y, shape) for x, y in rows], dtype=torch.float64),
        "p": torch.tensor([_as_many(x, y, shape) for x, y in rows], dtype=torch.float64),
    }


def _expected(a: set[Site], b: set[Site], shape: Shape) -> float:
    """Mean of what two sets share, if heads are drawn from all heads, as many at each position."""
    return sum(x * y for x, y in _at_places(a, b)) / (shape.n_layers * shape.n_heads)


def _at_places(a: set[Site], b: set[Site]) -> list[tuple[int, int]]:
    """How many heads the two have at each position."""
    places = {node.position for node in a | b}
    return [(sum(n.position == place for n in a), sum(n.position == place for n in b)) for place in places]


def _as_many(a: set[Site], b: set[Site], shape: Shape) -> float:
    """Probability that sets drawn so share as many or more: at each position hypergeometric, and the sum over positions."""
    pool, ways = shape.n_layers * shape.n_heads, [1.0]
    for x, y in _at_places(a, b):
        here = [math.comb(x, i) * math.comb(pool - x, y - i) / math.comb(pool, y) for i in range(min(x, y) + 1)]
        ways = [sum(ways[i] * here[k - i] for i in range(len(ways)) if 0 <= k - i < len(here)) for k in range(len(ways) + len(here) - 1)]
    return min(1.0, sum(ways[len(a & b) :]))


def _drawn(own: tuple[Site, ...], shape: Shape, many: int, seed: int, nobody: set[str | int | None]) -> list[tuple[Site, ...]]:
    """Random circuits of which no two are alike: fewer than asked for where there are no more of them."""
    found: dict[frozenset[Site], tuple[Site, ...]] = {}
    for some in other_circuits(own, own, shape, many * _TRIES, seed, nobody):
        found.setdefault(frozenset(some), some)
        if len(found) == many:
            break
    return list(found.values())


def _notes(circuits: dict[str, Circuit], few: dict[str, int]) -> list[str]:
    found = []
    for name, circuit in circuits.items():
        others = [str(n) for n in circuit.nodes if n.component != "z" or n.head is None]
        found += (
            [f"{', '.join(others[:3])}{' and others' if len(others) > 3 else ''} of {name}'s circuit not tested: heads only"]
            if others
            else []
        )
    lone = [
        f"no random circuits like {name}'s: at some position it has more heads than there are others" for name, n in few.items() if not n
    ]
    return found + lone + [f"only {n} different random circuit{'s' * (n > 1)} like {name}'s" for name, n in few.items() if n]


def _of(circuit: str) -> str:
    return "what both share" if circuit == "shared" else f"{circuit}'s circuit"


def _mean(values: Tensor) -> str:
    return f"{float(values.double().mean()):.2f}"


def _error(values: Tensor) -> float:
    return float(standard_error(values))
