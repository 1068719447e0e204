"""Does a circuit do on its own what the model does, and does it need every part?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.circuit import Circuit
from interp.errors import InputError
from interp.metrics import Metric
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.stats import Estimate, bootstrap, changed, permutation, plus_minus, recovered, standard_error
from interp.sweeps.ablation import ABLATIONS, Ablation, Ablations, comparable
from interp.sweeps.answers import unseen
from interp.sweeps.knockouts import Evaluated, Given, Nodes, Search, by_role, evaluated, live
from interp.sweeps.staged import by_context, grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair


@dataclass(frozen=True, eq=False)
class CircuitEvaluationResult(Result):
    """The metric F of every run, per prompt. M is the model, C the circuit: M with all else knocked out.

    Prompts of one context are no independent draws, so means, intervals and tests are of means per context.

    Attributes:
        full: F(M).
        circuit: F(C).
        empty: F of the model with everything knocked out.
        curve: F of the first nodes of C alone, for a growing number of them.
        random: the same for random circuits: other heads, at the same positions in the same order.
        circuit_without: F(C without K), for subsets K of the nodes.
        model_without: F(M without K), where nothing but K is knocked out.
        before: F(C without K) of every node, with a K of its own that does not have it.
        after: F(C without K and the node).
        floor: largest change of F(M) by rounding alone.
        deviation: largest difference of runs that were computed both ways, many together and one by one.
        checked: how many were.
        asked: the prompts that are judged, by their numbers among those given.
        group: context of each, as they first come.
        sizes: numbers of nodes along the curve.
        order: the nodes in the order of the curve.
        ordered_by: what this order is.
        subsets: the nodes in each K of ``circuit_without``, for each model.
        given: the nodes in the K of every node, for each model.
        roles: of every node; "" where it has none.
        ablation: ``mean``, ``resample`` or ``zero``.
        minimality: how the K of a node was chosen.
        metric: text form.
        unit: of the metric.
        draw_seed: of the bootstrap and all draws.
        notes: what stands in for knocked-out heads, and what is not tested.
        labels: of the axes: sides (base and tuned, or model), subsets, nodes.
    """

    full: Float[Tensor, "side prompt"]
    circuit: Float[Tensor, "side prompt"]
    empty: Float[Tensor, "side prompt"]
    curve: Float[Tensor, "side size prompt"]
    random: Float[Tensor, "side draw size prompt"]
    circuit_without: Float[Tensor, "side subset prompt"]
    model_without: Float[Tensor, "side subset prompt"]
    before: Float[Tensor, "side node prompt"]
    after: Float[Tensor, "side node prompt"]
    floor: Float[Tensor, " side"]
    deviation: Float[Tensor, " side"]
    checked: Int[Tensor, " side"]
    asked: Int[Tensor, " prompt"]
    group: Int[Tensor, " prompt"]
    sizes: tuple[int, ...]
    order: tuple[str, ...]
    ordered_by: str
    subsets: tuple[tuple[str, ...], ...]
    given: tuple[tuple[str, ...], ...]
    roles: tuple[str, ...]
    ablation: Ablation
    minimality: Given
    metric: str
    unit: str
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    def _side(self, side: str | None) -> int:
        if side is not None and side not in self.sides:
            raise InputError(f"there is no model {side!r} in this result; it has {', '.join(self.sides)}")
        return len(self.sides) - 1 if side is None else self.sides.index(side)

    @property
    def n(self) -> str:
        """How many prompts, or contexts where several prompts share one, the statistics are of."""
        prompts, contexts = len(self.group), int(self.group.max()) + 1
        return f"{prompts} prompts" if prompts == contexts else f"{contexts} contexts of {prompts} prompts"

    def _mean(self, values: Float[Tensor, "... prompt"]) -> Float[Tensor, "... context"]:
        return by_context(values.movedim(-1, 0), self.group).movedim(0, -1)

    def _share(self, top: Tensor, i: int, contexts: slice = slice(None)) -> Estimate:
        """mean(top) / F(M) for [context ...]; refused where F(M) is close to 0."""
        full = self._mean(self.full[i])[contexts]
        found = recovered(top, torch.zeros_like(full), full, seed=self.draw_seed)
        near = f"F(M) is {plus_minus(full)}, within two standard errors of 0"
        return replace(found, refused=near) if found.refused else found

    def difference(self, side: str | None = None) -> Estimate:
        """F(C) - F(M); 95 % interval from resampling contexts, the same ones for both.

        Args:
            side: which model; by default the tuned one, or the only one.
        """
        i = self._side(side)
        return bootstrap(self._mean(self.circuit[i] - self.full[i]), seed=self.draw_seed)

    def ratio(self, side: str | None = None) -> Estimate:
        """F(C) / F(M), a ratio of means; refused where F(M) is within two standard errors of 0."""
        i = self._side(side)
        return self._share(self._mean(self.circuit[i]), i)

    def faithfulness(self, side: str | None = None) -> Estimate:
        """(F(C) - F(empty)) / (F(M) - F(empty)), from 0 to 1; refused where the two ends are within two standard errors."""
        i = self._side(side)
        return recovered(*(self._mean(x[i]) for x in (self.circuit, self.empty, self.full)), seed=self.draw_seed)

    def change(self) -> Estimate:
        """Faithfulness in the tuned model minus that in the base.

        Raises:
            InputError: only one model.
        """
        sides = (self._side("base"), self._side("tuned"))
        ends = ([self._mean(x[i]) for x in (self.circuit, self.empty, self.full)] for i in sides)
        return changed(*ends, seed=self.draw_seed)

    def gap(self, side: str | None = None) -> Float[Tensor, "subset prompt"]:
        """F(C without K) - F(M without K), 0 for a complete circuit."""
        i = self._side(side)
        return self.circuit_without[i] - self.model_without[i]

    @property
    def judged(self) -> slice:
        """The contexts that nodes are judged on: those that did not choose their K."""
        return slice(1, None, 2) if self.minimality == "greedy" else slice(None)

    def effect(self, side: str | None = None) -> Float[Tensor, "node context"]:
        """F(C without K and the node) - F(C without K), on the contexts that nodes are judged on; negative for what supports the answer."""
        i = self._side(side)
        return self._mean(self.after[i] - self.before[i])[:, self.judged]

    def needed(self, side: str | None = None) -> Bool[Tensor, " node"]:
        """Nodes without which F changes by at least 1 % of F(M) (the bar of Wang et al.), more than rounding does, at p < 0.05."""
        i, effect = self._side(side), self.effect(side)
        size = effect.double().mean(-1).abs()
        enough = size >= 0.01 * self._mean(self.full[i]).double().mean().abs()
        return enough & (size > self.floor[i]) & (permutation(effect.T, seed=self.draw_seed).adjusted < 0.05)

    def random_faithfulness(self, side: str | None = None) -> Float[Tensor, "draw size"]:
        """Faithfulness of random circuits of every size, NaN where it is refused."""
        i = self._side(side)
        gain, whole = (self._mean(x - self.empty[i]).double().mean(-1) for x in (self.random[i], self.full[i]))
        return gain / whole * (torch.nan if self.faithfulness(side).refused else 1)

    def summary(self) -> str:
        """Faithfulness beside random circuits, the widest gap, and how many nodes are needed."""
        told = [self._told(side) + (f" in {side}" if len(self.sides) > 1 else "") for side in reversed(self.sides)]
        if len(self.sides) > 1 and not (change := self.change()).refused:
            told.insert(0, f"faithfulness changed by {change.at()}")
        how = [f"{self.ablation} ablation", f"n = {self.n}", self.exactness]
        return f"The circuit of {len(self.order)} node{'' if len(self.order) == 1 else 's'}: {'; '.join(told)} ({'; '.join(how)})"

    def _told(self, side: str) -> str:
        i, share = self._side(side), self.faithfulness(side)
        circuit, empty, full = (self._mean(x[i]) for x in (self.circuit, self.empty, self.full))
        if share.refused:
            main = f"faithfulness has no meaning, F(M) - F(empty) is {plus_minus(full - empty)}"
        else:
            draws = self.random_faithfulness(side)[:, -1]
            spread = f" +- {float(draws.std()):.2g}" if len(draws) > 1 else ""
            main = f"faithfulness {share.at()}" + (f", random circuits {float(draws.mean()):.2g}{spread}" if len(draws) else "")
        main += f", F(C) {plus_minus(circuit)} of F(M) {plus_minus(full)} {self.metric}"
        gaps = self._mean(self.gap(side))
        if len(gaps):
            widest = int(gaps.double().mean(-1).abs().argmax())
            main += f", widest gap {plus_minus(gaps[widest])} ({self.labels['subset'][widest]})"
        return main + f", {int(self.needed(side).sum())} of its nodes needed"

    @property
    def exactness(self) -> str:
        """How exact the values are, in words, and what stood in."""
        deviation, floor = float(self.deviation.max()), float(self.floor.max())
        off = f"{int(self.checked.sum())} runs done one by one are off by at most {deviation:.1g}, rounding moves F by up to {floor:.1g}"
        return "; ".join([off, *self.notes])

    def _compared(self, i: int) -> Iterator[tuple[str, list[tuple[str, int, str]], Tensor, Tensor, slice]]:
        """Kind, (name, number of nodes, K) of each, F of each, and what it is compared with, [row prompt]; contexts judged on."""
        every, n = slice(None), len(self.order)
        whole = [("circuit", n, ""), ("nothing", 0, "")]
        yield "faithfulness", whole, torch.stack([self.circuit[i], self.empty[i]]), self.full[i].expand(2, -1), every
        yield "curve", [(str(k), k, "") for k in self.sizes], self.curve[i], self.full[i].expand(len(self.sizes), -1), every
        draws = self.random[i][:, -1]
        yield "random", [(f"random {d}", n, "") for d in range(len(draws))], draws, self.full[i].expand(len(draws), -1), every
        names = zip(self.labels["subset"], self.subsets[i], strict=True)
        rows = [(name, n - _count(k), k) for name, k in names]
        yield "completeness", rows, self.circuit_without[i], self.model_without[i], every
        names = zip(self.labels["node"], self.given[i], strict=True)
        yield "minimality", [(name, n - _count(k) - 1, k) for name, k in names], self.after[i], self.before[i], self.judged

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """The share of the whole model's work that the circuit does alone."""
        shares = {side if len(self.sides) == 2 else "tuned": self.faithfulness(side) for side in self.sides}
        return {"faithfulness of base's circuit": shares} if len(self.sides) == 2 else {"faithfulness of the circuit": shares}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per run, model and what it is compared with; ``per="prompt"`` the metric of both.

        ``value`` is F of the run; ``against`` is F(M) for the circuit, the curve and random circuits, F(M without K) for completeness, and
        F(C without K) for minimality. ``difference`` is value - against, ``share`` that over F(M), with a 95 % interval; ``p`` is that of a
        sign-flip test, ``p_adjusted`` corrected for all rows of the kind.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        make = self._per_prompt if per else self._rows
        return pd.DataFrame([row for i in range(len(self.sides)) for kind in self._compared(i) for row in make(i, *kind)])

    def _per_prompt(self, i: int, kind: str, names: Any, value: Tensor, against: Tensor, contexts: slice) -> Iterator[dict[str, Any]]:
        for (name, _, without), own, other in zip(names, value.tolist(), against.tolist(), strict=True):
            for prompt, x, y in zip(self.asked.tolist(), own, other, strict=True):
                row = {"side": self.sides[i], "kind": kind, "name": name, "without": without, "prompt": prompt}
                yield {**row, "value": x, "against": y}

    def _rows(self, i: int, kind: str, names: Any, value: Tensor, against: Tensor, contexts: slice) -> Iterator[dict[str, Any]]:
        if not len(value):
            return
        value, against = (self._mean(x)[:, contexts].double() for x in (value, against))
        gap = (value - against).T
        share, test = self._share(gap, i, contexts), permutation(gap, seed=self.draw_seed)
        columns = {"value": value.mean(-1), "value_se": standard_error(value.T), "against": against.mean(-1)}
        columns |= {"difference": gap.mean(0), "difference_se": standard_error(gap)}
        columns |= {"share": share.value, "low": share.low, "high": share.high, "p": test.p, "p_adjusted": test.adjusted}
        for row, (name, size, without) in enumerate(names):
            start = {"side": self.sides[i], "kind": kind, "name": name, "nodes": size, "without": without}
            yield {**start, **{k: float(x[row]) for k, x in columns.items()}}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The nodes that matter most: what F(C without K) changes by without the node too; ``recovered`` is its share of F(M)."""
        import pandas as pd

        found = []
        for i in range(len(self.sides)):
            *_, minimality = self._compared(i)
            for row, role in zip(self._rows(i, *minimality), self.roles, strict=True):
                effect = {"effect": row["difference"], "effect_se": row["difference_se"], "recovered": row["share"]}
                rest = {k: row[k] for k in ("low", "high", "p", "p_adjusted")}
                found.append({"side": row["side"], "node": row["name"], "role": role, "without": row["without"], **effect, **rest})
        frame = pd.DataFrame(found).sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True).head(n)
        return frame if len(self.sides) > 1 else frame.drop(columns="side")

    def plot(self) -> go.Figure:
        """How faithful the circuit is by its size, beside random circuits."""
        series, bands, resolved = {}, {}, all(self.faithfulness(side).refused is None for side in self.sides)
        for i, side in enumerate(self.sides):
            values, empty, full = (self._mean(x[i]) for x in (self.curve, self.empty, self.full))
            values = values.T
            share = recovered(values, empty, full, seed=self.draw_seed) if resolved else bootstrap(values, seed=self.draw_seed)
            name = side if len(self.sides) > 1 else "circuit"
            series[name], bands[name] = share.value, (share.low, share.high)
            if self.random.shape[1]:
                draws = self.random_faithfulness(side) if resolved else self._mean(self.random[i]).double().mean(-1)
                name = f"random, {side}" if len(self.sides) > 1 else "random circuits"
                series[name], bands[name] = draws.mean(0), (draws.amin(0), draws.amax(0))
        beside = f"; random: range of {self.random.shape[1]} draws" if self.random.shape[1] else ""
        return plots.lines(
            series,
            self.sizes,
            bands=bands,
            title=f"Faithfulness by size, {self.ablation} ablation (n = {self.n}{beside})",
            xlabel=f"nodes kept, by {self.ordered_by}",
            ylabel=f"share of {self.metric} kept" if resolved else f"{self.unit} (not normalised)",
        )

    def figures(self) -> dict[str, go.Figure]:
        """Faithfulness by size; what circuit and model do without subsets of the nodes; how much each node matters."""
        found = {"faithfulness": self.plot()}
        if len(self.labels["subset"]):
            found["completeness"] = self._completeness()
        return found | {"minimality": self._minimality()}

    def _completeness(self) -> go.Figure:
        names = self.labels["subset"]
        kinds = [name.split()[0] if " " in name else "roles" for name in names]
        labels = [f"{name}: without {without or 'nothing'}" for own in self.subsets for name, without in zip(names, own, strict=True)]
        several = len(self.sides) > 1
        return plots.scatter(
            self._mean(self.model_without).double().mean(-1).flatten(),
            self._mean(self.circuit_without).double().mean(-1).flatten(),
            labels=labels,
            groups=[f"{kind}, {side}" if several else kind for side in self.sides for kind in kinds],
            title=f"Completeness: on the line, circuit and model do alike without K (n = {self.n})",
            xlabel=f"model without K, {self.metric}",
            ylabel=f"circuit without K, {self.metric}",
            diagonal=True,
        )

    def _minimality(self) -> go.Figure:
        resolved = all(self.ratio(side).refused is None for side in self.sides)
        series, intervals = {}, {}
        for i, side in enumerate(self.sides):
            effect = self.effect(side).T
            found = self._share(effect, i, self.judged) if resolved else bootstrap(effect, seed=self.draw_seed)
            series[side], intervals[side] = found.value, (found.low, found.high)
        scale = float(self._mean(self.full).double().mean(-1).abs().min()) if resolved else 1.0
        others = "other nodes chosen for it" if self.minimality == "greedy" else "the other heads of its role"
        return plots.bars(
            [f"{node} {role}" for node, role in zip(self.labels["node"], self.roles, strict=True)],
            series,
            intervals=intervals,
            title=f"Minimality: what goes with a node, without {others} (n = {'half of ' if self.minimality == 'greedy' else ''}{self.n})",
            xlabel="node",
            ylabel=f"change as a share of the model's {self.metric}" if resolved else f"change of {self.unit}",
            floor=float(self.floor.max()) / scale,
        )


@analysis(version=3)
def circuit_evaluation(
    model: HookedModel | ModelPair,
    prompts: Prompts | PromptPairs,
    circuit: Circuit,
    *,
    metric: Metric | str = "logit_diff",
    ablation: Ablation = "mean",
    by: str | None = None,
    mlps: bool = False,
    roles: tuple[str, ...] = (),
    completeness_random: int = 20,
    greedy: int = 2,
    greedy_steps: int = 10,
    greedy_candidates: int = 5,
    minimality: Given = "role",
    random_circuits: int = 10,
    seed: int = 0,
) -> CircuitEvaluationResult:
    """Does a circuit do on its own what the model does, and does it need every part?

    The three criteria of Wang et al. (2023, arXiv 2211.00593). F is the mean of the metric; the circuit C runs alone when every head at
    every token that it does not name is knocked out, while its own heads go on computing from what they then get. A node without a
    position is kept at all tokens. Embeddings are never knocked out, and edges are not tested.

    - *Faithfulness*: F(C) beside F(M), as a difference, a ratio, and between everything knocked out (0) and nothing (1); along
      a growing circuit, and for random circuits with as many heads at each position, none of them its own there.
    - *Completeness*: F(C without K) beside F(M without K), where M loses nothing but K. K is each role, random subsets, and subsets
      sought greedily for a wide gap; the gap of the last is the widest found on these prompts, so it is rather too large.
    - *Minimality*: what F(C without K) changes by when a node goes too. K is the other heads of its role by default; the same head
      at another position stays, since one may carry what the other reads. A node that rests while another works (a backup) shows with
      none of them; ``minimality="greedy"`` looks for the K that makes each node matter, on one half of the contexts, and judges it on
      the other.

    Where prompts share a context, all statistics are of means per context, and n counts contexts. Prompts that nothing can stand in for,
    since no other context is like theirs in what ``by`` names, are left out, and the result says how many. Evaluate on other prompts than
    the circuit was found on: prompts with a context of the discovery are refused.

    Args:
        model: one model, or a pair: the same circuit in both, each with its own activations.
        prompts: what F is taken over; of pairs the clean ones.
        circuit: the circuit, or a result that found it; it has to have heads (or, with ``mlps``, MLPs).
        metric: what counts as the answer; ``kl`` is measured from the whole model.
        ablation: what a knocked-out head gives: ``mean`` of its z at that token over the corrupt prompts of pairs, otherwise
            over the prompts, each time without those of the prompt's own context, its partner among them; ``resample``, its z at that
            token of the corrupt partner, or of a prompt of another context; ``zero``. Means over fewer than ten prompts are noisy.
        by: which prompts share means: those with the same value of a tag, or of several, ``template,order``; ``length`` is their
            number of tokens; ``all``. They must have one length. By default ``template`` where prompts have this tag, else ``length``
            where they differ in it, else ``all``.
        mlps: MLPs can be knocked out too, and are wherever the circuit does not have them; otherwise all of them run free.
        roles: whose nodes are knocked out together; all roles by default.
        completeness_random: random subsets K.
        greedy: greedy searches for a K with a wide gap.
        greedy_steps: nodes that a search adds at most.
        greedy_candidates: nodes that are tried in each step.
        minimality: which K goes with a node: ``role`` or ``greedy``.
        random_circuits: draws of random circuits.
        seed: of all draws, of the bootstrap, and of the runs that are checked.

    Raises:
        InputError: a circuit of another shape, without heads, or found on these contexts; an unknown role, tag, ablation or
            metric; fewer contexts than standard errors take; lengths that differ where tokens must correspond.
    """
    asked = _asked(prompts, circuit.check(model.shape), ablation, by, 4 if minimality == "greedy" else 2)
    nodes = live(circuit, mlps)
    sets = by_role(circuit, nodes, roles)
    search = Search(sets, completeness_random, greedy, greedy_steps, greedy_candidates, minimality, random_circuits, seed)
    given, prompts = len(prompts), prompts[asked]
    judge, found = Metric.parse(metric), list[Evaluated]()
    for side, one in model.sides():
        reader = judge.reader(prompts, _reference(one, prompts, judge))
        runs = Ablations(one, prompts, reader, ablation=ablation, by=by, mlps=mlps, seed=seed)
        found.append(evaluated(runs, circuit, nodes, search, found[0].order if found else None, side))
    told = [f"{given - len(asked)} of {given} prompts left out: no other context is like theirs"] if given > len(asked) else []
    rows = {"asked": torch.tensor(asked), "group": grouped(prompts.contexts)}
    return _result(found, rows, told, circuit, nodes, search, judge, ablation)


def _result(
    found: Sequence[Evaluated],
    rows: dict[str, Tensor],
    told: list[str],
    circuit: Circuit,
    nodes: Nodes,
    search: Search,
    judge: Metric,
    ablation: Ablation,
) -> CircuitEvaluationResult:
    first = found[0]
    rest = [str(node) for node in circuit.nodes if node not in nodes]
    told += [f"{', '.join(rest[:3])}{' and others' if len(rest) > 3 else ''} not tested: never knocked out here"] if rest else []
    if search.random_circuits and not first.values["random"].shape[0]:
        told.append("no random circuits: at some position the circuit has more nodes than there are others")
    matter = "how much they matter" + (f" in {first.name}" if len(found) > 1 else "")
    return CircuitEvaluationResult(
        **{name: torch.stack([side.values[name] for side in found]) for name in first.values},
        **rows,
        sizes=first.sizes,
        order=tuple(map(str, first.order)),
        ordered_by="score" if all(node in circuit.scores for node in nodes) else matter,
        subsets=tuple(tuple(", ".join(map(str, k)) for k in side.subsets.values()) for side in found),
        given=tuple(tuple(", ".join(map(str, k)) for k in side.given) for side in found),
        roles=tuple(circuit.roles.get(node, "") for node in nodes),
        ablation=ablation,
        minimality=search.minimality,
        metric=str(judge),
        unit=(judge.unit or str(judge)).replace("KL(clean", "KL(model"),
        draw_seed=search.seed,
        notes=(*first.notes, *told),
        labels={"side": tuple(s.name for s in found), "subset": tuple(first.subsets), "node": tuple(map(str, nodes))},
    )


def _asked(prompts: Prompts | PromptPairs, circuit: Circuit, ablation: Ablation, by: str | None, need: int) -> list[int]:
    """The prompts that can be judged; refuses what cannot be evaluated, before anything runs."""
    if not isinstance(prompts, Prompts | PromptPairs):
        raise InputError(f"circuit_evaluation needs Prompts or PromptPairs, not {type(prompts).__name__}")
    if ablation not in ABLATIONS:
        raise unknown("ablation", str(ablation), ABLATIONS)
    unseen(prompts, circuit)
    asked = comparable(prompts, ablation, by)
    if (contexts := len({prompts.contexts[i] for i in asked})) < need:
        alone = f" that are not alone in what by={by or 'template or length'} names" if len(asked) < len(prompts) else ""
        raise InputError(f"circuit_evaluation needs prompts of at least {need} contexts{alone} for standard errors, got {contexts}")
    return asked


def _reference(model: HookedModel, prompts: Prompts | PromptPairs, judge: Metric) -> Tensor | None:
    """Logits of the whole model, for a metric that compares with them."""
    asked = clean_prompts(prompts)
    return model.logits(model.batch(asked), at=judge.position).cpu() if judge.needs_reference else None


def _count(nodes: str) -> int:
    return nodes.count(",") + bool(nodes)
