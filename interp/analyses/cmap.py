"""Is what tuning gained in the circuit: do its heads of one model make the other answer as the first does?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp import plots
from interp.circuit import Circuit
from interp.errors import InputError
from interp.metrics import Metric, Reader
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.sites import Site
from interp.stats import Estimate, bootstrap, mcnemar, paired_change, permutation, plus_minus, standard_error
from interp.sweeps import Swept, check, run, sweep
from interp.sweeps.answers import Among, above_chance, head_groups, heads_of, means, measures, names, readers, unseen
from interp.sweeps.answers import share as share_of
from interp.sweeps.draws import checked_draws, how_many, moments, other_heads, present, unread
from interp.sweeps.groups import head_sites, written

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel, ModelPair
    from interp.models.checkpoint import Shape

Direction = Literal["both", "tuned_to_base", "base_to_tuned"]
Output = Literal["receiver", "sender"]
Group = tuple[Site, ...]

_SIDES = {"tuned_to_base": ("tuned", "base"), "base_to_tuned": ("base", "tuned")}
_OUTPUTS = ("receiver", "sender")
_WHOLE = "circuit"


@dataclass(frozen=True, eq=False)
class CmapResult(Result):
    """The measures of every patched run, per prompt: ``accuracy`` (0 or 1), ``margin`` and the metric.

    Attributes:
        patched: measures of the receiving model with the heads of each cell set.
        control: the same with other heads in their place, drawn at random, no two draws alike; NaN where there is no such draw.
        choices: how many sets of other heads there are for each cell.
        base: measures of base.
        tuned: measures of tuned on the same prompts.
        floor: largest change by rounding alone; for the accuracy the share of runs whose margin is within it.
        deviation: largest difference of runs that were computed both ways: going on from a cached run, and plainly.
        checked: how many were.
        sites: what each cell sets.
        heads: how many heads that is.
        rest: cells that add up, the circuit first, until all of the stream is the sender's.
        output: whose W_O takes a head's z.
        among: which tokens an answer has to beat to be right.
        unit: of the metric.
        draw_seed: of the bootstrap and of the random heads.
        notes: what was not accelerated, not patched or not compared, and why.
        labels: of the axes: measures, directions, cells.
    """

    patched: Float[Tensor, "measure direction cell prompt"]
    control: Float[Tensor, "measure direction cell draw prompt"]
    base: Float[Tensor, "measure prompt"]
    tuned: Float[Tensor, "measure prompt"]
    floor: Float[Tensor, "measure direction"]
    deviation: float
    checked: int
    sites: tuple[str, ...]
    heads: tuple[int, ...]
    choices: tuple[int, ...]
    rest: tuple[str, ...]
    output: Output
    among: Among
    unit: str
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def cells(self) -> tuple[str, ...]:
        """The whole circuit, its groups, and what was added to it."""
        return self.labels["cell"]

    @property
    def directions(self) -> tuple[str, ...]:
        """Which way activations went."""
        return self.labels["direction"]

    def _at(self, measure: str, direction: str | None) -> tuple[int, int]:
        for axis, name in (("measure", measure), ("direction", direction)):
            if name is not None and name not in self.labels[axis]:
                raise unknown(axis, name, self.labels[axis])
        return self.labels["measure"].index(measure), self.directions.index(direction) if direction else 0

    def start(self, measure: str = "accuracy", direction: str | None = None) -> Float[Tensor, " prompt"]:
        """The measure of the receiving model."""
        i, j = self._at(measure, direction)
        return getattr(self, _SIDES[self.directions[j]][1])[i]

    def goal(self, measure: str = "accuracy", direction: str | None = None) -> Float[Tensor, " prompt"]:
        """The measure of the sending model."""
        i, j = self._at(measure, direction)
        return getattr(self, _SIDES[self.directions[j]][0])[i]

    def effect(self, measure: str = "accuracy", direction: str | None = None) -> Float[Tensor, "cell prompt"]:
        """What each cell changes."""
        i, j = self._at(measure, direction)
        return self.patched[i, j] - self.start(measure, direction)

    def recovered(self, measure: str = "accuracy", direction: str | None = None) -> Estimate:
        """Share of the difference of the two models that each cell carries over, [cell]; 95 % interval from resampling prompts.

        Where every answer follows alike, the interval of the accuracy is Wilson's, for so many of those that differ. Refused where the
        models are within two standard errors.

        Args:
            measure: ``accuracy``, ``margin`` or the metric.
            direction: by default the first.
        """
        i, j = self._at(measure, direction)
        ends = self.start(measure, direction), self.goal(measure, direction)
        return share_of(self.patched[i, j].T, *ends, of_answers=measure == "accuracy", seed=self.draw_seed)

    def random_heads(self, measure: str = "accuracy", direction: str | None = None) -> Float[Tensor, "cell draw"]:
        """The share that every draw of random heads carries over; NaN where there is none, or nothing can be normalised."""
        i, j = self._at(measure, direction)
        start, goal = self.start(measure, direction), self.goal(measure, direction)
        found = (self.control[i, j] - start).double().mean(-1) / (goal - start).double().mean()
        return found * torch.nan if self.recovered(measure, direction).refused else found

    def adds_up(self, measure: str = "accuracy", direction: str | None = None) -> pd.DataFrame:
        """Where the whole difference of the two models is: what each addition brings, the last one the final norm and unembedding.

        With ``output="sender"`` all of the stream is the sender's in the end, so what is left is how it is read. Otherwise each W_O stays
        the receiver's, and the last row holds that too.

        Raises:
            InputError: the result was made without ``rest``.
        """
        import pandas as pd

        if not self.rest:
            raise InputError("nothing was added to the circuit here; call cmap with rest=True")
        i, j = self._at(measure, direction)
        start, goal = self.start(measure, direction), self.goal(measure, direction)
        steps = [start, *(self.patched[i, j, self.cells.index(name)] for name in self.rest), goal]
        last = "final norm and unembedding" if self.output == "sender" else "W_O, b_O, final norm and unembedding"
        rows = [
            {"added": name, "value": float(now.double().mean()), "gain": float((now - was).double().mean()), "gain_se": _error(now - was)}
            for name, was, now in zip((*self.rest, last), steps, steps[1:], strict=False)
        ]
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """What the circuit's heads do to the accuracy each way, beside random heads, and the group that does most."""
        told = [self._told(direction) for direction in self.directions]
        way = "its own W_O" if self.output == "sender" else "W_O of the receiver"
        how = f"z of the sender through {way}; right among {self.among}; n = {self.base.shape[1]} prompts"
        return f"The circuit's {self.heads[0]} heads: {'; '.join(told)} ({how}; {self.exactness})"

    def _told(self, direction: str) -> str:
        sender, receiver = _SIDES[direction]
        start, goal = self.start(direction=direction), self.goal(direction=direction)
        i, j = self._at("accuracy", direction)
        accuracy = f"its accuracy from {_mean(start)} to {_mean(self.patched[i, j, 0])}, {sender} has {_mean(goal)}"
        here = f"of {sender} in {receiver} they bring {accuracy}"
        share = self.recovered(direction=direction)
        if share.refused:
            return f"{here}, too close to say which share that is (difference {plus_minus(goal - start)})"
        draws = present(self.random_heads(direction=direction)[0])
        told = [f"{here}: recovered {_at(share, 0)}"]
        told += [f"random heads {_spread(draws, self.choices[0])}"] if len(draws) else []
        groups = [k for k, name in enumerate(self.cells) if name != _WHOLE and name not in self.rest]
        if groups:
            best = max(groups, key=lambda k: float(share.value[k]))
            told.append(f"{self.cells[best]} alone {_at(share, best)}, the most of {len(groups)} groups")
        return ", ".join(told)

    @property
    def exactness(self) -> str:
        """How exact the values are, in words."""
        margin, unsure = float(self.floor[1].max()), float(self.floor[0].max())
        rounding = f"rounding moves the margin by up to {margin:.1g}" + (f", which leaves {unsure:.2%} of answers open" if unsure else "")
        if self.checked:
            rounding = f"{self.checked} runs checked the plain way are off by at most {self.deviation:.1g}, {rounding}"
        return "; ".join([rounding, *self.notes])

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per measure, direction and cell; ``per="prompt"`` every run.

        ``effect`` is value - start with its interval (of Agresti and Min for the accuracy, else bootstrap), ``gained`` and ``lost`` count
        the answers that became right and wrong and ``p_mcnemar`` is the exact test of these; ``to_goal`` is value - goal. ``p`` is that of
        a sign-flip test, ``p_adjusted`` corrected for all cells of the row's measure and direction. Of random heads, ``control`` and
        ``control_sd`` are mean and standard deviation over draws of the share they carry over (as ``recovered``), ``control_effect`` and
        ``control_effect_sd`` those of what they change (as ``effect``, in the measure's unit); ``draws`` are of the ``sets`` there are.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        make = self._per_prompt if per else self._rows
        return pd.DataFrame([row for m in self.labels["measure"] for d in self.directions for row in make(m, d)])

    def _per_prompt(self, measure: str, direction: str) -> Iterator[dict[str, Any]]:
        i, j = self._at(measure, direction)
        ends = list(zip(self.start(measure, direction).tolist(), self.goal(measure, direction).tolist(), strict=True))
        for cell, values in zip(self.cells, self.patched[i, j].tolist(), strict=True):
            for prompt, ((start, goal), value) in enumerate(zip(ends, values, strict=True)):
                row = {"measure": measure, "direction": direction, "group": cell, "prompt": prompt}
                yield {**row, "start": start, "goal": goal, "patched": value}

    def _rows(self, measure: str, direction: str) -> Iterator[dict[str, Any]]:
        i, j = self._at(measure, direction)
        effect, goal = self.effect(measure, direction).double(), self.goal(measure, direction)
        share, test = self.recovered(measure, direction), permutation(effect.T, seed=self.draw_seed)
        ends, draws = bootstrap(effect.T, seed=self.draw_seed), self.random_heads(measure, direction)
        for k, cell in enumerate(self.cells):
            value, one = self.patched[i, j, k].double(), effect[k]
            low, high, flips = float(ends.low[k]), float(ends.high[k]), {"gained": -1, "lost": -1, "p_mcnemar": torch.nan}
            if measure == "accuracy":
                up, down = int((one > 0).sum()), int((one < 0).sum())
                (low, high), flips = paired_change(up, down, len(one)), {"gained": up, "lost": down, "p_mcnemar": mcnemar(up, down)}
            row = {"measure": measure, "direction": direction, "group": cell, "heads": self.heads[k], "value": float(value.mean())}
            row |= {
                "value_se": _error(value),
                "effect": float(one.mean()),
                "effect_se": _error(one),
                "effect_low": low,
                "effect_high": high,
            }
            row |= {**flips, "recovered": float(share.value[k]), "low": float(share.low[k]), "high": float(share.high[k])}
            row |= {"p": float(test.p[k]), "p_adjusted": float(test.adjusted[k])}
            row |= {"to_goal": float((value - goal).mean()), "to_goal_se": _error(value - goal)}
            random = present(self.control[i, j, k].double().mean(-1)) - float(self.start(measure, direction).double().mean())
            row |= dict(zip(("control", "control_sd"), moments(draws[k]), strict=True))
            row |= dict(zip(("control_effect", "control_effect_sd"), moments(random), strict=True))
            yield row | {"draws": len(random), "sets": self.choices[k]}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The whole circuit and its groups by what they change of the accuracy, strongest first."""
        import pandas as pd

        rows = [row for d in self.directions for row in self._rows("accuracy", d) if row["group"] not in self.rest[1:]]
        columns = ["group", "direction", "heads", "value", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted"]
        columns += ["control", "control_sd"]
        return pd.DataFrame(sorted(rows, key=lambda row: -abs(row["effect"]))[:n]).reindex(columns=columns)

    def plot(self) -> go.Figure:
        """The accuracy with the heads of each cell set, beside random heads, between lines for the two models."""
        return self._bars("accuracy", self.directions[0])

    def figures(self) -> dict[str, go.Figure]:
        """Each direction for the accuracy, then for the metric; and how it adds up."""
        last = self.labels["measure"][-1]
        found = {f"{m}, {d.replace('_', ' ')}": self._bars(m, d) for m in ("accuracy", last) for d in self.directions}
        if self.rest:
            found |= {f"How {m} adds up": self._added(m) for m in ("accuracy", last)}
        return found

    def _bars(self, measure: str, direction: str) -> go.Figure:
        i, j = self._at(measure, direction)
        shown = [k for k, name in enumerate(self.cells) if name not in self.rest[1:]]
        found = means(self.patched[i, j, shown].T, of_answers=measure == "accuracy", seed=self.draw_seed)
        series, intervals = {"heads": found.value}, {"heads": (found.low, found.high)}
        draws = self.control[i, j, shown].double().mean(-1)
        if draws.shape[1] and not bool(draws.isnan().all()):
            series["random heads"] = draws.nanmean(-1)
            intervals["random heads"] = draws.nanquantile(0.0, -1), draws.nanquantile(1.0, -1)
        sender, receiver = _SIDES[direction]
        beside = f"; random: range of at most {draws.shape[1]} draws" if len(series) > 1 else ""
        made = plots.bars(
            [f"{self.cells[k]} ({self.heads[k]})" for k in shown],
            series,
            intervals=intervals,
            title=f"Heads of {sender} in {receiver} (n = {self.base.shape[1]}{beside})",
            xlabel="heads set (how many)",
            ylabel=measure if measure != self.labels["measure"][-1] else self.unit,
            horizontal=False,
        )
        for side, at in (("base", "bottom right"), ("tuned", "top right")):
            height = float(getattr(self, side)[i].double().mean())
            dash = "solid" if side == receiver else "dash"
            made.add_hline(y=height, line_color=plots.colour(side), line_dash=dash, annotation_text=side, annotation_position=at)
        return made

    def _added(self, measure: str) -> go.Figure:
        tables = {d: self.adds_up(measure, d) for d in self.directions}
        first = next(iter(tables.values()))
        return plots.bars(
            list(first["added"]),
            {d.replace("_", " "): t["gain"].to_numpy() for d, t in tables.items()},
            intervals={
                d.replace("_", " "): ((t.gain - 2 * t.gain_se).to_numpy(), (t.gain + 2 * t.gain_se).to_numpy()) for d, t in tables.items()
            },
            title=f"What each addition brings (n = {self.base.shape[1]}, +- 2 s.e.)",
            xlabel="added",
            ylabel=f"change of {measure if measure == 'accuracy' else self.unit}",
        )


@analysis(version=2)
def cmap(
    pair: ModelPair,
    prompts: Prompts | PromptPairs,
    circuit: Circuit,
    *,
    direction: Direction = "both",
    output: Output = "receiver",
    metric: Metric | str = "logit_diff",
    among: Among = "vocabulary",
    rest: bool = False,
    control: int = 10,
    seed: int = 0,
) -> CmapResult:
    """Do a circuit's heads, taken from one model, make the other answer as the first does?

    Cross-model activation patching (CMAP: Prakash et al. 2024, arXiv 2402.14811). Both models run on the same prompts, and z of the
    circuit's heads at their positions is set in the other model, all together and each group (role) alone; whatever follows runs free.
    An answer is right if its logit is above all others (``margin`` > 0). Late groups recover much because z there already holds
    what earlier heads of the sender computed: an early group that recovers is the telling one. The control are random
    heads: at each position as many, from the layers that the cell's own heads span there, none of them in the circuit, and none of the last
    layer at a position that only it could still read. No two draws are alike; where there are fewer sets than draws, all are taken.

    ``rest=True`` goes on from the circuit to all heads, then all MLPs, then the embeddings, at all positions, each on top of the last.
    With ``output="sender"`` the stream is then that of the sender, and ``adds_up`` shows where the whole difference is.

    Args:
        pair: the two models.
        prompts: what both read; of clean and corrupt prompts the clean ones. They need answers.
        circuit: whose heads; found on prompts of other contexts.
        direction: ``tuned_to_base`` sets activations of tuned in base, ``base_to_tuned`` the other way.
        output: whose W_O takes a head's z, ``receiver`` or ``sender``; with ``sender`` b_O goes along where all heads of a layer are set.
        metric: what is measured besides accuracy and margin.
        among: an answer is right among the whole ``vocabulary``, or among the ``options`` of its prompt.
        rest: add all else to the circuit, step by step.
        control: draws of random heads beside the circuit and each group.
        seed: of the bootstrap, the random heads, and the runs that are checked.

    Raises:
        InputError: a circuit of another shape, without heads, or found on these contexts; a position the prompts do not name; fewer than
            two prompts; no model that answers better than a guess among the options; an unknown setting.
    """
    asked = _checked(pair, prompts, circuit, direction, output, control)
    read, shape = readers(prompts, metric, among), pair.shape
    groups = _cells(circuit, shape, rest)
    batch = pair.batch(asked)
    check([s for g in groups.values() for s in g], batch, batch)
    nobody = unread(batch, groups[_WHOLE], read.values())
    own = {name: g for name, g in groups.items() if name not in _added_names(rest)}
    drawn = {name: other_heads(g, groups[_WHOLE], shape, control, f"{seed} {name}", nobody) for name, g in own.items()}
    cells = [*groups.values(), *(g for draws in drawn.values() for g in draws.sets)]
    todo = [written(g, shape, added=output == "sender") for g in cells]
    above_chance(asked, {side: model for side, model in pair.sides()})
    ways = tuple(_SIDES) if direction == "both" else (direction,)
    swept = {way: _swept(pair, batch, way, todo, read, seed) for way in ways}
    ends = {_SIDES[way][1]: measures([s.baseline for s in found]) for way, found in swept.items()}
    for side, model in pair.sides():
        if side not in ends:
            ends[side] = measures([run(model, batch, reader) for reader in read.values()])
    values = torch.stack([measures([s.values for s in found]) for found in swept.values()], dim=1)
    many = [len(drawn[name].sets) if name in drawn else 0 for name in groups]
    every = [s for found in swept.values() for s in found]
    return CmapResult(
        patched=values[:, :, : len(groups)],
        control=_control(values[:, :, len(groups) :], many),
        base=ends["base"],
        tuned=ends["tuned"],
        floor=torch.stack([_floor(found) for found in swept.values()], dim=1),
        deviation=max(s.deviation for s in every),
        checked=sum(s.checked for s in every),
        sites=tuple(",".join(map(str, p)) for p in todo[: len(groups)]),
        heads=tuple(sum(s.head is not None for s in g) for g in groups.values()),
        choices=tuple(drawn[name].there if name in drawn else 0 for name in groups),
        rest=(_WHOLE, *_added_names(rest)) if rest else (),
        output=output,
        among=among,
        unit=Metric.parse(metric).unit or str(Metric.parse(metric)),
        draw_seed=seed,
        notes=_notes(circuit, every, {name: (len(d.sets), d.there) for name, d in drawn.items()} if control else {}),
        labels={"measure": names(read), "direction": tuple(ways), "cell": tuple(groups)},
    )


def _checked(pair: ModelPair, prompts: object, circuit: Circuit, direction: str, output: str, control: int) -> Prompts:
    """The prompts that are asked; refuses settings that are unknown."""
    for value, name, known in ((direction, "direction", ("both", *_SIDES)), (output, "output", _OUTPUTS)):
        if value not in known:
            raise unknown(name, str(value), known)
    checked_draws(control)
    if not isinstance(prompts, Prompts | PromptPairs):
        raise InputError(f"cmap needs Prompts or PromptPairs, not {type(prompts).__name__}")
    if pair.one_at_a_time:
        raise InputError("cmap needs both models in memory; load the pair with load='together'")
    if len(prompts) < 2:
        raise InputError("cmap needs at least two prompts for standard errors, got one")
    unseen(prompts, circuit.check(pair.shape))
    return clean_prompts(prompts)


def _added_names(rest: bool) -> tuple[str, ...]:
    return ("+ other heads", "+ MLPs", "+ embeddings") if rest else ()


def _cells(circuit: Circuit, shape: Shape, rest: bool) -> dict[str, Group]:
    """The whole circuit, its groups if there are several, and what is added to it."""
    groups = head_groups(circuit)
    if _WHOLE in groups:
        raise InputError(f"a role of the circuit is called {_WHOLE!r}, which here is the name of all of it; rename the role")
    found = {_WHOLE: heads_of(circuit)} | (groups if len(groups) > 1 else {})
    if rest:
        heads = tuple(head_sites("z", shape))
        mlps = tuple(Site("mlp_out", layer) for layer in range(shape.n_layers))
        found |= dict(zip(_added_names(rest), (heads, (*heads, *mlps), (Site("resid_pre", 0), *heads, *mlps)), strict=True))
    return found


def _swept(pair: ModelPair, batch: Batch, way: str, todo: Sequence[Group], read: Mapping[str, Reader], seed: int) -> list[Swept]:
    """One sweep per reader."""
    sender, receiver = (getattr(pair, side) for side in _SIDES[way])
    models: tuple[HookedModel, HookedModel] = sender, receiver
    desc = way.replace("_", " ")
    return [
        sweep(models[1], batch, [*todo], (models[0], batch), reader, seed=seed, desc=f"{name}, {desc}") for name, reader in read.items()
    ]


def _floor(found: Sequence[Swept]) -> Float[Tensor, " measure"]:
    """By rounding: the share of answers left open, then the floors."""
    unsure = (found[0].values.abs() <= found[0].floor).float().mean()
    return torch.stack([unsure, *(torch.tensor(s.floor) for s in found)])


def _control(values: Tensor, draws: Sequence[int]) -> Float[Tensor, "measure direction cell draw prompt"]:
    """What was drawn beside every cell, NaN where there is nothing."""
    n, at = max(draws, default=0), 0
    found = values.new_full((*values.shape[:2], len(draws), n, values.shape[-1]), torch.nan)
    for i, many in enumerate(draws):
        found[:, :, i, :many] = values[:, :, at : at + many]
        at += many
    return found


def _notes(circuit: Circuit, swept: Sequence[Swept], drawn: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    others = [str(n) for n in circuit.nodes if n.component != "z" or n.head is None]
    left = [f"{', '.join(others[:3])}{' and others' if len(others) > 3 else ''} of the circuit not set: heads only"] if others else []
    lone = [name for name, (_, there) in drawn.items() if not there]
    bare = [f"no random heads beside {', '.join(lone)}: at some position it has more heads than its layers have others"] if lone else []
    few = [f"{how_many(n, there)} beside {name}" for name, (n, there) in drawn.items() if there and n == there]
    few = [f"of random heads {', '.join(few)}"] if few else []
    return (*dict.fromkeys(note for s in swept for note in s.notes), *left, *bare, *few)


def _at(share: Estimate, cell: int) -> str:
    """With its interval, which there is not if the models are alike in some of the resamples."""
    return f"{float(share.value[cell]):.2f} (no interval)" if bool(share.low[cell].isnan()) else share.at(cell)


def _mean(values: Tensor) -> str:
    return f"{float(values.double().mean()):.2f}"


def _error(values: Tensor) -> float:
    return float(standard_error(values))


def _spread(draws: Tensor, there: int) -> str:
    mean, sd = moments(draws)
    return f"{mean:.2f}{f' +- {sd:.2g}' if len(draws) > 1 else ''} ({how_many(len(draws), there)})"
