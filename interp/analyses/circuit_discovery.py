"""Which heads work together for the answer, stage by stage, and did fine-tuning change them?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots, roles
from interp.circuit import Circuit, Edge, Ranking
from interp.errors import InputError
from interp.metrics import Metric
from interp.names import unknown
from interp.prompts import PromptPairs
from interp.results import Result, analysis
from interp.sites import Site
from interp.stages import READY, Stage, Stages
from interp.stats import Estimate, Permutation, permutation, plus_minus, recovered, standard_error
from interp.sweeps import check, run
from interp.sweeps.staged import Search, by_context, grouped, receivers, staged

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

FEWEST = 6
"""Prompts of different contexts below which no sign-flip test can give p < 0.05."""


@dataclass(frozen=True, eq=False)
class CircuitDiscoveryResult(Result):
    """What every head sends to the receivers of every stage, and which heads were chosen.

    Attributes:
        clean: metric of the clean run.
        corrupt: metric of the corrupt run.
        patched: metric where the receivers of a stage read what a head sends in the corrupt run; NaN for stages not searched.
        reaches: whether a head can reach a receiver of the stage at all.
        chosen: the heads that were found.
        attention: mean attention of every head from the position of a stage; NaN where there is nothing to attend to.
        even: the same where attention is spread evenly.
        edges: of every model the metric where a single receiver reads what a chosen head sends, [edge prompt].
        floor: largest change of the metric by rounding alone.
        stages: the stages as JSON, with the settings in force.
        level: of the tests.
        freeze_mlps: MLPs were held, so that nothing goes through them.
        metric: text form.
        unit: of the metric.
        model: layers, heads and key/value heads of the model.
        prompts: digest of the prompts.
        contexts: contexts of the prompts.
        group: context of every prompt, counted as they first come. Prompts of one context are no independent draws: shares, effects,
            intervals and tests are of means per context.
        draw_seed: of bootstrap and permutations.
        notes: what was not searched, not found or not told apart, and why.
        labels: of ``side``, ``stage`` and ``kind`` (attention patterns, and positions as ``@S2``), and the ``edge`` rows of every model
            as ``base L0H1.z@END -> L2H0.q@END``.
    """

    clean: Float[Tensor, "side prompt"]
    corrupt: Float[Tensor, "side prompt"]
    patched: Float[Tensor, "side stage layer head prompt"]
    reaches: Bool[Tensor, "side stage layer head"]
    chosen: Bool[Tensor, "side stage layer head"]
    attention: Float[Tensor, "side stage kind layer head"]
    even: Float[Tensor, "stage kind"]
    edges: dict[str, Tensor]
    floor: Float[Tensor, " side"]
    stages: str
    level: float
    freeze_mlps: bool
    metric: str
    unit: str
    model: tuple[int, int, int]
    prompts: str
    contexts: tuple[str, ...]
    group: Int[Tensor, " prompt"]
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def searched(self) -> Bool[Tensor, "side stage"]:
        """Stages that were searched: those whose receivers were found."""
        return ~self.patched.isnan().flatten(2).any(-1)

    @property
    def steps(self) -> tuple[Stage, ...]:
        """The stages."""
        return Stages.parse(self.stages).stages

    def _side(self, side: str | None) -> int:
        if side is not None and side not in self.sides:
            raise InputError(f"there is no model {side!r} in this result; it has {', '.join(self.sides)}")
        return len(self.sides) - 1 if side is None else self.sides.index(side)

    def recovered(self, stage: int, side: str | None = None) -> Estimate:
        """Share of the fall from clean to corrupt that every head carries in a stage, [layer head]; 95 % interval.

        Args:
            stage: number of the stage.
            side: which model; by default the tuned or only one.

        Raises:
            InputError: no such model.
        """
        i = self._side(side)
        return self._share(self.patched[i, stage].movedim(-1, 0), i)

    def _mean(self, values: Float[Tensor, "prompt ..."]) -> Float[Tensor, "context ..."]:
        return by_context(values, self.group)

    def _share(self, patched: Float[Tensor, "prompt ..."], i: int) -> Estimate:
        """Share of the fall from clean to corrupt."""
        return recovered(*map(self._mean, (patched, self.clean[i], self.corrupt[i])), seed=self.draw_seed)

    def effect(self, stage: int, side: str | None = None) -> Float[Tensor, "layer head context"]:
        """How far the metric falls, mean over the prompts of a context; positive supports the answer."""
        i = self._side(side)
        fall = self.clean[i].double() - self.patched[i, stage].double()
        return self._mean(fall.movedim(-1, 0)).movedim(0, -1)

    def test(self, stage: int, side: str | None = None) -> Permutation:
        """Sign-flip test of every head's effect, [layer head]; adjusted for all heads of the stage."""
        return permutation(self.effect(stage, side).movedim(-1, 0), seed=self.draw_seed)

    def circuit(self, side: str | None = None) -> Circuit:
        """What was found: heads at positions with their roles, edges, shares carried as scores.

        A head found in two stages at one position has the role in which it carries more. An edge is there where it alone is beyond
        noise and carries as much as its stage asks for; of every head the strongest edge is there in any case.

        Args:
            side: which model; by default the tuned or only one.

        Raises:
            InputError: no such model.
        """
        i = self._side(side)
        named: dict[Site, tuple[float, str]] = {}
        for k, stage in enumerate(self.steps):
            if self.chosen[i, k].any():
                share = self.recovered(k, self.sides[i]).value
                for layer, head in self.chosen[i, k].nonzero().tolist():
                    site, carried = Site("z", layer, head, stage.at), float(share[layer, head])
                    if site not in named or abs(carried) > abs(named[site][0]):
                        named[site] = (carried, stage.role)
        edges = self._kept(i)
        scores = {site: share for site, (share, _) in named.items()} | edges
        given = {site: role for site, (_, role) in named.items()}
        return Circuit(self.model, tuple(named), tuple(edges), given, scores, self.prompts, self.contexts, self._rankings(i))

    def _rankings(self, i: int) -> dict[str, Ranking]:
        """Role -> the share of every head that could send in its stages; of a head in two stages at one position the larger."""
        scores: dict[str, dict[Site, float]] = {}
        chosen: dict[str, list[Site]] = {}
        for k, stage in enumerate(self.steps):
            if not self.searched[i, k]:
                continue
            share, of = self.recovered(k, self.sides[i]).value, scores.setdefault(stage.role, {})
            for layer, head in self.reaches[i, k].nonzero().tolist():
                site, carried = Site("z", layer, head, stage.at), float(share[layer, head])
                if abs(carried) >= abs(of.get(site, 0.0)):
                    of[site] = carried
            taken = self.chosen[i, k].nonzero().tolist()
            chosen.setdefault(stage.role, []).extend(Site("z", layer, head, stage.at) for layer, head in taken)
        stages = Stages.parse(self.stages)
        return {role: Ranking(scores[role], tuple(chosen[role]), *stages.sends(role)) for role in scores}

    def _edges(self, i: int) -> list[Edge]:
        start = f"{self.sides[i]} "
        return [Edge.parse(name.removeprefix(start)) for name in self.labels["edge"] if name.startswith(start)]

    def _kept(self, i: int) -> dict[Edge, float]:
        """The edges of a model's circuit, with the share that each carries."""
        found, values = self._edges(i), self.edges[self.sides[i]]
        if not found:
            return {}
        share = self._share(values.T, i).value
        moved = self._mean((values - self.clean[i]).double().T)
        tested = permutation(moved, seed=self.draw_seed)
        least = torch.tensor([self._least(i, edge) for edge in found], dtype=torch.float64)
        beyond = (tested.adjusted <= self.level) & (moved.mean(0).abs() > float(self.floor[i])) & (share.abs() >= least)
        best: dict[Site, float] = {}
        for edge, x in zip(found, share.tolist(), strict=True):
            best[edge.sender] = max(best.get(edge.sender, 0.0), abs(x))
        rows = zip(found, share.tolist(), beyond.tolist(), strict=True)
        return {edge: x for edge, x, ok in rows if ok or (abs(x) == best[edge.sender] and x != 0)}

    def _least(self, i: int, edge: Edge) -> float:
        """The share that the stage of an edge asks for; of several that look at this edge the smallest."""
        asked = [
            stage.least
            for k, stage in enumerate(self.steps)
            if edge.sender.position == stage.at
            and self.chosen[i, k, edge.sender.layer, edge.sender.head]
            and edge.receiver in receivers(self.model, stage, self.steps[:k], self.chosen[i])
        ]
        return min(asked)

    def pattern(self, stage: int, layer: int, head: int, side: str | None = None) -> str:
        """Where a head looks from the position of a stage: ``duplicate_token 0.90 (even 0.08)``; nothing where it is not clear.

        Where the stage expects something else, that stands behind: ``@S2 0.60 (even 0.07), expected @IO 0.30``.
        """
        seen, chance = self.attention[self._side(side), stage, :, layer, head], self.even[stage]
        above, kinds, expected = (seen - chance).nan_to_num(-1.0), self.labels["kind"], _kind(self.steps[stage].attends)
        best = int(above.argmax())  # of equals the first: a pattern before a position
        clear = float(above[best]) >= roles.CLEAR
        told = [f"{kinds[best]} {float(seen[best]):.2f} (even {float(chance[best]):.2f})"] if clear else []
        if expected and not (clear and kinds[best] == expected):
            told.append(f"expected {expected} {float(seen[kinds.index(expected)]):.2f}")
        return ", ".join(told)

    def summary(self) -> str:
        """How many heads every stage found, the strongest of each with its interval, and what was not found."""
        parts = []
        for i, side in enumerate(self.sides):
            told = [self._told(i, k, stage) for k, stage in enumerate(self.steps) if self.chosen[i, k].any()]
            of = f"{side}: " if len(self.sides) > 1 else ""
            heads = len({(s.layer, s.head) for s in self.circuit(side).nodes})
            apart = f"clean - corrupt {plus_minus(self._mean(self.clean[i] - self.corrupt[i]))}"
            carry = "1 head carries" if heads == 1 else f"{heads} heads carry"
            parts.append(f"{of}{carry} {self.metric} ({apart}): {'; '.join(told) or 'none beyond noise'}")
        if len(self.sides) == 2:
            base, tuned = (set(self.circuit(side).nodes) for side in self.sides)
            parts.append(f"{len(base & tuned)} of {len(base | tuned)} heads at positions are in both circuits")
        n = f"n = {self.n}{'' if 'contexts' in self.n else ' prompt pairs'}, p <= {self.level:g} adjusted for all heads"
        return "; ".join([*parts, n, *self.notes])

    @property
    def n(self) -> str:
        """How many prompts, or contexts where several prompts share one, the statistics are of."""
        prompts, contexts = len(self.group), int(self.group.max()) + 1
        return f"{prompts}" if prompts == contexts else f"{contexts} contexts of {prompts} prompt pairs"

    def _told(self, i: int, k: int, stage: Stage) -> str:
        count, share = int(self.chosen[i, k].sum()), self.recovered(k, self.sides[i])
        layer, head = divmod(int((share.value.abs() * self.chosen[i, k]).argmax()), self.model[1])
        return f"{count} {stage.role} at {stage.at}, the first L{layer}H{head} with {share.at(layer, head)} of the difference"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per stage, head and model; ``per="prompt"`` the metric of every run.

        ``effect`` is the fall of the metric, positive where the head supports the answer, with its standard error; ``recovered`` the
        share of the fall from clean to corrupt, with its interval; ``p_adjusted`` is corrected for all heads of the stage. Where
        prompts share a context all of these are of means per context. ``pattern`` says where a chosen head looks.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        return pd.DataFrame([row for i in range(len(self.sides)) for row in (self._per_prompt(i) if per else self._rows(i))])

    def _cells(self, i: int) -> Iterator[tuple[int, tuple[int, int], dict[str, Any]]]:
        for k, stage in enumerate(self.steps):
            if self.searched[i, k]:
                for cell in ((layer, head) for layer in range(self.model[0]) for head in range(self.model[1])):
                    site = Site("z", *cell, stage.at)
                    yield k, cell, {"side": self.sides[i], "stage": self.labels["stage"][k], "role": stage.role, "site": str(site)}

    def _per_prompt(self, i: int) -> Iterator[dict[str, Any]]:
        for k, cell, row in self._cells(i):
            for prompt, value in enumerate(self.patched[i, k][cell].tolist()):
                both = {"clean": float(self.clean[i, prompt]), "corrupt": float(self.corrupt[i, prompt])}
                yield {**row, "prompt": prompt, **both, "patched": value}

    def _rows(self, i: int) -> Iterator[dict[str, Any]]:
        columns: dict[int, dict[str, Tensor]] = {}
        for k, cell, row in self._cells(i):
            if k not in columns:
                share, effect, test = self.recovered(k, self.sides[i]), self.effect(k, self.sides[i]), self.test(k, self.sides[i])
                columns[k] = {"effect": effect.mean(-1), "effect_se": standard_error(effect.movedim(-1, 0)), "recovered": share.value}
                columns[k] |= {"low": share.low, "high": share.high, "p": test.p, "p_adjusted": test.adjusted}
            chosen = bool(self.chosen[i, k][cell])
            numbers = {name: float(x[cell]) + 0.0 for name, x in columns[k].items()}
            yield {**row, "chosen": chosen, **numbers, "pattern": self.pattern(k, *cell, self.sides[i]) if chosen else ""}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The chosen heads that carry the most, and where they look."""
        import pandas as pd

        rows = [row for i in range(len(self.sides)) for row in self._rows(i) if row["chosen"]]
        side = ["side"] if len(self.sides) > 1 else []
        columns = ["site", *side, "role", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted", "pattern"]
        return pd.DataFrame(sorted(rows, key=lambda row: -abs(row["recovered"]))[:n], columns=columns)

    def plot(self) -> go.Figure:
        """The first of the figures: the circuit, of a pair that of the tuned model."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """The circuits, and heads by layer for every sweep of the search, with one scale for the models of a pair."""
        found, n = dict[str, "go.Figure"](), self.n
        of = {i: "" if len(self.sides) == 1 else f", {side}" for i, side in reversed(list(enumerate(self.sides)))}
        for i, name in of.items():
            if (circuit := self.circuit(self.sides[i])).nodes:
                found[f"circuit{name}"] = circuit.plot(f"{len(circuit.nodes)} heads that carry {self.metric}{name} (n = {n})")
        for together in self._sweeps():
            k = together[0]
            of_roles = ", ".join(self.steps[j].role for j in together)
            shares = {i: self.recovered(k, self.sides[i]).value for i in of if self.searched[i, k]}
            top = max((float(share.abs().max()) for share in shares.values()), default=0.0)
            for i, share in shares.items():
                names = "; ".join(self._names(i, j, len(together) > 1) for j in together)
                found[f"{', '.join(self.labels['stage'][j] for j in together)}{of[i]}"] = plots.heatmap(
                    share,
                    title=f"{of_roles}{of[i]}: every head -> {self.steps[k].receivers} (n = {n}); chosen: {names}",
                    xlabel=f"head, at {self.steps[k].at}",
                    ylabel="layer",
                    unit=f"share of {self.metric} carried",
                    floor=~self.reaches[i, k] | (self.effect(k, self.sides[i]).mean(-1).abs() <= float(self.floor[i])),
                    difference=True,
                    limits=(-top, top) if top > 0 else None,
                )
        return found

    def _sweeps(self) -> list[list[int]]:
        """The stages, those together that choose from one sweep, such as heads that support and heads that oppose."""
        found: list[list[int]] = []
        for k, stage in enumerate(self.steps):
            same = [
                group
                for group in found
                if (self.steps[group[0]].receivers, self.steps[group[0]].at) == (stage.receivers, stage.at)
                and torch.equal(self.patched[:, group[0]].nan_to_num(), self.patched[:, k].nan_to_num())
            ]
            if same:
                same[0].append(k)
            else:
                found.append([k])
        return found

    def _names(self, i: int, k: int, role: bool) -> str:
        """The heads that a stage chose, for a title."""
        heads = [f"L{layer}H{head}" for layer, head in self.chosen[i, k].nonzero().tolist()]
        names = ", ".join(heads[:6]) + (f" and {len(heads) - 6} more" if len(heads) > 6 else "") or "none"
        return f"{self.steps[k].role} {names}" if role else names


@analysis(version=1)
def circuit_discovery(
    model: HookedModel | ModelPair,
    prompts: PromptPairs,
    *,
    stages: Stages | str | None = None,
    metric: Metric | str = "logit_diff",
    top: float | None = None,
    level: float = 0.05,
    freeze_mlps: bool = False,
    seed: int = 0,
) -> CircuitDiscoveryResult:
    """Which heads work together for the answer, stage by stage, and did fine-tuning change them?

    A staged search goes backwards from the logits (Wang et al. 2023, arXiv 2211.00593): which heads write the answer, which heads tell
    those where to look, what those read, and so on. Every stage is a sweep of path patching over all heads: what a head sends in the
    corrupt run goes into the clean run, directly to the receivers of the stage together, which are what an earlier stage found. A head is
    chosen where the change has the sign the stage asks for, is beyond rounding, has p <= ``level`` in a sign-flip test corrected
    for all heads of the stage, and carries at least 1 % of the fall from clean to corrupt, or what the stage says; ``top`` keeps the
    strongest. Where prompts share a context, all of that is of means per context. A stage whose receivers were not found is not
    searched. Then every chosen head is patched into each receiver alone, which gives the edges. Where the heads look is told beside,
    and chooses nothing.

    Only heads are searched; MLPs carry on what heads send unless they are held. k and v belong to key/value heads: to patch one changes
    what every head of its group reads. For a pair each model is searched by itself. Evaluate the circuit on prompts of other contexts.

    Args:
        model: one model, or a pair to compare.
        prompts: clean and corrupt prompts.
        stages: ``ioi``, ``colored_objects``, ``boxes``, ``general``, or a JSON file of your own; by default those of the prompts' task.
        metric: what counts as the answer, read at END; ``kl`` is measured from the clean run.
        top: at most this share of all heads per stage, rounded up; replaces what the stages say.
        level: of the tests.
        freeze_mlps: hold MLPs at what they gave, so that only the residual stream carries.
        seed: of the bootstrap, the permutations, and the paths that are checked.

    Raises:
        InputError: unknown stages, roles, positions or metric; fewer than six contexts; clean and corrupt do not differ.
    """
    if not isinstance(prompts, PromptPairs):
        raise InputError(f"circuit_discovery needs clean and corrupt prompts (PromptPairs), not {type(prompts).__name__}")
    steps, notes = _steps(stages, top, prompts)
    judge = Metric.parse(metric)
    _refuse(prompts, judge, level)
    clean, corrupt = model.batch(prompts.clean), model.batch(prompts.corrupt)
    check([Site("z", 0, 0, stage.at) for stage in steps.stages], clean, corrupt)
    for attends in (stage.attends for stage in steps.stages):
        if attends is not None and attends not in (known := (*roles.PATTERNS, *(p for p in clean.positions if p != "END"))):
            raise unknown("attention pattern or position", attends, known)
    found, ends, looks, group = [], [], [], grouped(prompts.contexts)
    for side, m in model.sides():
        reader = judge.reader(prompts, m.logits(clean, at="END").cpu() if judge.needs_reference else None)
        start, goal = run(m, clean, reader), run(m, corrupt, reader)
        search = Search(m, clean, corrupt, reader, start, goal, freeze_mlps, level, seed, side, group)
        found.append(staged(search, steps.stages))
        ends.append((start, goal))
        looks.append(roles.looks(m, clean, [stage.at for stage in steps.stages]))
    means = [[by_context(x, group) for x in both] for both in ends]
    if not any(recovered(k, k, c).refused is None for c, k in means):
        gaps = ", ".join(plus_minus(c - k) for c, k in means)
        raise InputError(f"{judge} does not differ between clean and corrupt prompts ({gaps}), so there is nothing to search for")
    names = tuple(side for side, _ in model.sides())
    notes += [note if len(names) == 1 else f"{side}: {note}" for side, f in zip(names, found, strict=True) for note in f.notes]
    s = model.shape
    numbered = [f"{i + 1} {stage.role}" for i, stage in enumerate(steps.stages)]
    return CircuitDiscoveryResult(
        clean=torch.stack([c for c, _ in ends]),
        corrupt=torch.stack([k for _, k in ends]),
        patched=torch.stack([f.patched for f in found]),
        reaches=torch.stack([f.reaches for f in found]),
        chosen=torch.stack([f.chosen for f in found]),
        attention=torch.stack([seen for seen, _ in looks]),
        even=looks[0][1],
        edges={
            side: torch.stack(list(f.edges.values())) if f.edges else torch.zeros(0, len(prompts))
            for side, f in zip(names, found, strict=True)
        },
        floor=torch.tensor([f.floor for f in found]),
        stages=str(steps),
        level=level,
        freeze_mlps=freeze_mlps,
        metric=str(judge),
        unit=judge.unit or str(judge),
        model=(s.n_layers, s.n_heads, s.n_kv_heads),
        prompts=prompts.digest,
        contexts=tuple(sorted(set(prompts.contexts))),
        group=group,
        draw_seed=seed,
        notes=tuple(notes),
        labels={
            "side": names,
            "stage": tuple(numbered),
            "kind": (*roles.PATTERNS, *(f"@{name}" for name in clean.positions if name != "END")),
            "edge": tuple(f"{side} {edge}" for side, f in zip(names, found, strict=True) for edge in f.edges),
        },
    )


def _kind(attends: str | None) -> str | None:
    """The label of what a stage expects its heads to look at."""
    return attends if attends is None or attends in roles.PATTERNS else f"@{attends}"


def _steps(stages: Stages | str | None, top: float | None, prompts: PromptPairs) -> tuple[Stages, list[str]]:
    """The stages with the settings of this call, and what is to be said about them."""
    notes = []
    if stages is None:
        task = prompts.task.split("(")[0]
        stages = task if task in READY else "general"
        if stages == "general":
            notes.append("general stages: none are known for these prompts")
    steps = Stages.parse(stages)
    if top is not None:
        steps = replace(steps, stages=tuple(replace(stage, top=top) for stage in steps.stages))
    if late := [stage for stage in steps.stages if not stage.sources and stage.at != "END"]:
        raise InputError(f"the stage {late[0].role} sends to the logits at {late[0].at}; they are read at END")
    return steps, notes


def _refuse(prompts: PromptPairs, judge: Metric, level: float) -> None:
    """Refuse what cannot be searched."""
    prompts.require_difference()
    if judge.position != "END":
        raise InputError(f"circuit_discovery reads the answer at END, but the metric is {judge}")
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise InputError(f"level is {level!r}, expected a number between 0 and 1, such as 0.05")
    if (count := len(set(prompts.contexts))) < FEWEST:
        came = f"{len(prompts)} prompt{'s' if len(prompts) != 1 else ''} of {count} context{'s' if count != 1 else ''} came"
        raise InputError(
            f"circuit_discovery needs prompts of at least {FEWEST} contexts, since fewer cannot tell a head from noise, but {came}; "
            "the evaluation takes others, as prompts.split() keeps them apart"
        )
