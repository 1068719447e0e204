"""Through which edges does the answer flow, and did fine-tuning change them?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.circuit import Circuit, Edge
from interp.errors import InputError
from interp.metrics import Metric, Reader
from interp.models.edges import receivers, senders
from interp.prompts import PromptPairs
from interp.results import Result, analysis
from interp.sites import Site
from interp.stats import Estimate, changed, permutation, recovered, standard_error
from interp.sweeps import floor, run
from interp.sweeps.edges import EdgeStats, Meeting, Method, edge_scores, edges_there, flips, place_names

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel, ModelPair

_WHAT = {"eap": "first order at the clean run", "eap_ig": "gradients along the way to the corrupt input", "exact": "one run per edge"}
_CHANGE = "tuned - base"
_DRAWN = 20  # edges with a bar
_BLOCK = 40  # edges whose senders and receivers span the map


@dataclass(frozen=True, eq=False)
class EdgeAttributionResult(Result):
    """How far the metric of the clean run falls when one edge carries what it carries in the corrupt run.

    Attributes:
        score: mean over prompts, in units of the metric; positive supports the answer. NaN where there is no edge.
        error: standard error of that mean, for every model, and for a pair also of tuned - base on the same prompts.
        clean: metric of the clean run.
        corrupt: metric of the corrupt run.
        floor: change of the metric by rounding alone, which no run could tell from a smaller score.
        kept: edges whose scores are kept for every prompt, as rows of ``edges``: all, or the strongest of all models and changes.
        values: these scores.
        adjusted: p values of the kept edges, corrected for all there are; None where all are kept, since they follow from ``values``.
        method: ``eap``, ``eap_ig`` or ``exact``.
        steps: gradients per prompt of ``eap_ig``.
        metric: text form.
        unit: of the metric.
        model: layers, heads and key/value heads of the model.
        prompts: digest of the prompts.
        contexts: contexts of the prompts.
        notes: which tokens have no part where clean and corrupt differ in length.
        labels: of ``side`` and ``view`` (the sides, and for a pair the change), and text forms along ``sender`` and ``receiver``;
            ``position`` is ``all``, or names and token indices.
    """

    score: Float[Tensor, "side sender receiver position"]
    error: Float[Tensor, "view sender receiver position"]
    clean: Float[Tensor, "side prompt"]
    corrupt: Float[Tensor, "side prompt"]
    floor: Float[Tensor, " side"]
    kept: Int[Tensor, " kept"]
    values: Float[Tensor, "side prompt kept"]
    adjusted: Float[Tensor, "view kept"] | None
    method: Method
    steps: int
    metric: str
    unit: str
    model: tuple[int, int, int]
    prompts: str
    contexts: tuple[str, ...]
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def change(self) -> Float[Tensor, "sender receiver position"]:
        """Score in the tuned model less score in the base.

        Raises:
            InputError: only one model.
        """
        return self._score(self._view(_CHANGE))

    @property
    def resolved(self) -> Bool[Tensor, " side"]:
        """Models in which clean and corrupt differ by more than two standard errors."""
        return torch.tensor([recovered(k, k, c).refused is None for c, k in zip(self.clean, self.corrupt, strict=True)])

    def recovered(self, side: str | None = None) -> Float[Tensor, "sender receiver position"]:
        """Score as a share of the whole fall from clean to corrupt; NaN where that is within two standard errors of 0.

        Args:
            side: a model, by default the tuned or only one; or ``tuned - base`` for how much the share changed.

        Raises:
            InputError: no such model.
        """
        view = self._view(side)
        if view == _CHANGE:
            return self.recovered("tuned") - self.recovered("base")
        i = self.sides.index(view)
        gap = float((self.clean[i].double() - self.corrupt[i].double()).mean())
        return self.score[i] / gap if self.resolved[i] else torch.full_like(self.score[i], torch.nan)

    @property
    def edges(self) -> tuple[str, ...]:
        """Every edge as text, ``L0H1.z -> L2H0.q``, in the order of the table."""
        return tuple(str(self._edge(cell)) for cell in self._cells().tolist())

    def _cells(self) -> Tensor:
        """[edge, 3]: sender, receiver and position of every edge."""
        return (~self.score[0].isnan()).nonzero()

    def _edge(self, cell: list[int]) -> Edge:
        sender, receiver, place = (self.labels[axis][i] for axis, i in zip(("sender", "receiver", "position"), cell, strict=True))
        where = None if place == "all" else place
        return Edge(Site.parse(sender).at(where), Site.parse(receiver).at(where))

    def _view(self, side: str | None) -> str:
        """The tuned or only model, unless another one or the change is asked for."""
        views = self.labels["view"]
        if side is not None and side not in views:
            raise InputError(f"there is no model {side!r} in this result; it has {', '.join(views)}")
        return self.sides[-1] if side is None else side

    def _views(self) -> tuple[str, ...]:
        """In the order they are told: the change first."""
        return (*self.labels["view"][2:], *self.sides)

    def _score(self, view: str) -> Tensor:
        return self.score[1] - self.score[0] if view == _CHANGE else self.score[self.sides.index(view)]

    def _error(self, view: str) -> Tensor:
        return self.error[self.labels["view"].index(view)]

    def _floor(self, view: str) -> float:
        """Of a change it is that of both models together."""
        return float(self.floor.sum() if view == _CHANGE else self.floor[self.sides.index(view)])

    def _values(self, view: str) -> Tensor:
        """[prompt kept]."""
        return self.values[1].double() - self.values[0].double() if view == _CHANGE else self.values[self.sides.index(view)]

    def _order(self, view: str, n: int) -> Tensor:
        """Rows of the edges with the largest scores of either sign."""
        return self._score(view)[tuple(self._cells().T)].abs().argsort(descending=True, stable=True)[:n]

    def _ranked(self, view: str, n: int) -> tuple[list[Edge], Tensor, Tensor]:
        """The edges with the largest scores of either sign; score and error of each."""
        cells = self._cells()[self._order(view, n)]
        where = tuple(cells.T)
        return [self._edge(c) for c in cells.tolist()], self._score(view)[where], self._error(view)[where]

    def top(self, n: int = 50, *, side: str | None = None) -> Circuit:
        """The ``n`` edges with the largest scores of either sign, and what sends through them, as a circuit.

        Args:
            n: number of edges.
            side: a model, by default the tuned or only one; or ``tuned - base`` for the edges that changed the most.

        Raises:
            InputError: n is not a number of edges that there are, or there is no such model.
        """
        if type(n) is not int or not 1 <= n <= len(self._cells()):
            raise InputError(f"top takes 1 to {len(self._cells())} edges, not {n!r}")
        edges, values, _ = self._ranked(self._view(side), n)
        nodes = tuple(dict.fromkeys(edge.sender for edge in edges))
        scores: dict[Site | Edge, float] = dict(zip(edges, values.tolist(), strict=True))
        return Circuit(self.model, nodes, tuple(edges), scores=scores, prompts=self.prompts, contexts=self.contexts)

    def summary(self) -> str:
        """The edge with the largest score, for a pair the one that changed the most, and how far clean and corrupt are apart."""
        view, n = self._views()[0], self.clean.shape[1]
        (edge,), value, error = self._ranked(view, 1)
        count, live = len(self._cells()), int((self._score(view).abs() > self._floor(view)).sum())
        told = f"{self.method}: {_WHAT[self.method]}" + (f", {self.steps} steps" if self.method == "eap_ig" else "")
        apart = [
            _told(float(gap.mean()), float(standard_error(gap))) + ("" if len(self.sides) == 1 else f" in {side}")
            for side, gap in zip(self.sides, self.clean - self.corrupt, strict=True)
        ]
        above = f"above the floor of {self._floor(view):.1g}"
        tail = "; ".join([f"({told}", f"n = {n} prompt pairs", f"clean - corrupt {', '.join(apart)}", *self.notes]) + ")"
        number = _told(float(value), float(error))
        if view != _CHANGE:
            return f"{edge} carries {number} of {self.metric}, the most of {count} edges, of which {live} are {above} {tail}"
        cell = tuple(self._cells()[self._order(view, 1)[0]])
        both = " and ".join(f"{_told(float(self._score(s)[cell]), float(self._error(s)[cell]))} in {s}" for s in ("tuned", "base"))
        return f"{edge} changed by {number} of {self.metric}, the most of {count} edges, of which {live} are {above}: {both} {tail}"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per edge and model: ``effect`` is the score, positive where the edge supports the answer, with its standard error.

        For a pair there are rows of ``tuned - base`` too. ``per="prompt"`` gives the scores of every prompt, where they are kept.
        Intervals and tests of the strongest edges are in ``strongest``.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        edges, cells = self._columns()
        if per:
            n, rows = self.clean.shape[1], self.kept.repeat(self.clean.shape[1])
            named = {"prompt": torch.arange(n).repeat_interleave(len(self.kept)), **{k: v[rows] for k, v in edges.items()}}
            return pd.concat(
                [pd.DataFrame({"side": s, **named, "effect": self._values(s).flatten()}) for s in self.sides], ignore_index=True
            )
        where = tuple(cells.T)
        parts = [(v, {"effect": self._score(v), "effect_se": self._error(v), "recovered": self.recovered(v)}) for v in self._views()]
        return pd.concat(
            [pd.DataFrame({"side": v, **edges, **{k: x[where].numpy() for k, x in part.items()}}) for v, part in parts],
            ignore_index=True,
        )

    def _columns(self) -> tuple[dict[str, Any], Tensor]:
        """What every edge is, as columns of a table, and its cell."""
        import numpy as np

        cells = self._cells()
        axes = {a: np.array(self.labels[a])[cells[:, k]] for k, a in enumerate(("sender", "receiver", "position"))}
        return {"edge": np.array(self.edges), **axes}, cells

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The edges with the largest scores, for a pair those that changed the most.

        ``low`` and ``high`` are the 95 % bootstrap interval of ``recovered``; ``p`` is that of a sign-flip test of the score,
        ``p_adjusted`` corrected for all edges. At most as many as are kept for every prompt.
        """
        import pandas as pd

        view = self._views()[0]
        place = torch.full((len(self._cells()),), -1)
        place[self.kept] = torch.arange(len(self.kept))
        rows = self._order(view, len(place))
        rows = rows[place[rows] >= 0][:n]
        at, cells = place[rows], self._cells()[rows]
        where, share = tuple(cells.T), self._shares(view, at)
        tested = permutation(self._values(view), resamples=flips(len(self.kept)))
        adjusted = tested.adjusted if self.adjusted is None else self.adjusted[self.labels["view"].index(view)]
        columns = {"effect": self._score(view)[where], "effect_se": self._error(view)[where]}
        columns |= {"recovered": share.value, "low": share.low, "high": share.high, "p": tested.p[at], "p_adjusted": adjusted[at]}
        side = {} if len(self.sides) == 1 else {"side": view}
        return pd.DataFrame({"edge": [str(self._edge(c)) for c in cells.tolist()], **side, **{k: v.numpy() for k, v in columns.items()}})

    def _shares(self, view: str, at: Tensor) -> Estimate:
        """Recovered by some of the kept edges, with its interval."""
        runs = [(v[:, at], torch.zeros_like(gap), gap) for v, gap in zip(self.values, self.clean - self.corrupt, strict=True)]
        return changed(runs[0], runs[1]) if view == _CHANGE else recovered(*runs[self.sides.index(view)])

    def plot(self) -> go.Figure:
        """The strongest edges with their intervals; for a pair those that changed the most."""
        return self._bars(self._views()[0])

    def figures(self) -> dict[str, go.Figure]:
        """The strongest edges, and the map between their senders and receivers; for a pair the change first."""
        found = {}
        for view in self._views():
            of = "" if len(self.sides) == 1 else f", {view}"
            found |= {f"strongest edges{of}": self._bars(view), f"senders and receivers{of}": self._map(view)}
        return found

    def _titled(self, view: str, text: str) -> str:
        return ("" if len(self.sides) == 1 else f"{view}: ") + f"{text} by {self.method} (n = {self.clean.shape[1]})"

    def _bars(self, view: str) -> go.Figure:
        edges, value, error = self._ranked(view, _DRAWN)
        name = f"fall of {self.metric}"
        what = "fall when the edge is corrupt, tuned - base" if view == _CHANGE else "fall when the edge is corrupt"
        return plots.bars(
            edges,
            {name: value},
            intervals={name: (value - 1.96 * error, value + 1.96 * error)} if self.clean.shape[1] > 1 else None,
            title=self._titled(view, f"Strongest of {len(self._cells())} edges"),
            xlabel="edge",
            ylabel=f"{what}: {self.unit}",
            floor=self._floor(view),
            horizontal=True,
        )

    def _map(self, view: str) -> go.Figure:
        """Scores between the ends of the strongest edges, summed over the positions there are."""
        edges, _, _ = self._ranked(view, _BLOCK)
        rows, columns = (
            sorted({self.labels[axis].index(str(end.at(None))) for end in ends})
            for axis, ends in (("sender", [e.sender for e in edges]), ("receiver", [e.receiver for e in edges]))
        )
        cells = self._score(view)[rows][:, columns]
        values = cells.nansum(-1).masked_fill(cells.isnan().all(-1), torch.nan)
        return plots.heatmap(
            values,
            x=[self.labels["receiver"][i] for i in columns],
            y=[self.labels["sender"][i] for i in rows],
            title=self._titled(view, "Edges"),
            xlabel="receiver",
            ylabel="sender",
            unit=f"fall of {self.metric}" + (", tuned - base" if view == _CHANGE else ""),
            floor=self._floor(view),
            difference=True,
        )


@analysis(version=2)
def edge_attribution(
    model: HookedModel | ModelPair,
    prompts: PromptPairs,
    *,
    metric: Metric | str = "logit_diff",
    method: Method = "eap",
    steps: int = 5,
    per_position: bool = False,
) -> EdgeAttributionResult:
    """Through which edges does the answer flow, and did fine-tuning change them?

    Embedding, heads and MLPs write into the residual stream; q, k and v of every head, the MLPs and the logits read it. An
    edge is what one writer adds to what one reader reads. Its score is how far the metric of the clean run falls when
    the edge alone carries its value of the corrupt run, while everything behind the reader runs free: positive supports the
    answer. Activation patching of direction ``noise`` asks the same of whole nodes, and ``recovered`` has the same sign there.

    ``exact`` computes this with one run per edge. ``eap`` takes its first order, - (corrupt - clean) . gradient by the reader's
    input before its norm, at the clean run: two passes and one backward for all edges (Nanda 2023; Syed et al. 2023, arXiv
    2310.10348). It is blind to what is saturated in the clean run. ``eap_ig`` averages the gradient over ``steps`` runs whose
    embeddings lie between clean and corrupt (Hanna et al. 2024, arXiv 2403.17806), in the middle of equal parts of the way,
    where that paper takes their ends. The scores of all edges out of a node add up to the attribution of the node;
    those out of the embedding, by ``eap_ig``, to the whole fall as the steps grow. Edges of ``exact`` add up to nothing.

    For a pair every edge is scored in both models, each with its own activations; the change is tuned - base in units of the
    metric, with a standard error over the same prompts. Where clean and corrupt differ in length in some pair, all are compared at
    named positions only; other tokens keep what they carry in the clean run, also on the way that ``eap_ig`` goes, which
    then ends at a clean prompt with some embeddings of the corrupt one.

    Norms are not frozen. b_O belongs to no head. ``k`` and ``v`` are those of key/value heads, which groups of heads share. In
    parallel blocks attention does not feed the MLP of its layer. Scores are means over prompts in units of the metric, with
    standard errors; at padding they are 0. Those of single prompts are kept for all edges, or for the strongest.

    Args:
        model: one model, or a pair to compare.
        prompts: clean and corrupt prompts.
        metric: what counts as the answer; read at END if scores are wanted per position.
        method: ``eap``, ``eap_ig`` or ``exact``.
        steps: gradients per prompt of ``eap_ig``.
        per_position: a score for every named position (summed over the tokens that it names in the clean prompt), or for every token
            where only END is named and all prompts have one length.

    Raises:
        InputError: names that do not pair up; clean and corrupt do not differ; the metric has no gradient; an architecture whose
            parts do not simply add up; more scores than memory.
    """
    judge = Metric.parse(metric)
    _refuse(prompts, judge, method, steps, per_position)
    clean, corrupt = model.batch(prompts.clean), model.batch(prompts.corrupt)
    met = Meeting.of(clean, corrupt)
    names = place_names(clean, met) if per_position else ("all",)
    if method == "exact":  # it takes long
        _refuse_if_alike({side: _ends(m, clean, corrupt, _reader(judge, prompts, m, clean)) for side, m in model.sides()}, judge)
    ends: dict[str, Tensor] = {}
    found: list[Tensor] = []
    floors: list[float] = []
    for side, m in model.sides():
        reader, of = _reader(judge, prompts, m, clean), "" if side == "model" else f", {side}"
        ends[side], scores = edge_scores(
            m, clean, corrupt, met, reader, method=method, steps=steps, names=names, desc=f"edges, batches{of}"
        )
        found.append(scores)
        floors.append(_rounding(m, clean[:4], reader[:4], ends[side]))
    _refuse_if_alike(ends, judge)
    stats, there, shape = EdgeStats.of(found), edges_there(model.shape, names), model.shape
    return EdgeAttributionResult(
        score=_spread(stats.mean[: len(found)], there),
        error=_spread(stats.error, there),
        clean=torch.stack([e[0] for e in ends.values()]),
        corrupt=torch.stack([e[1] for e in ends.values()]),
        floor=torch.tensor(floors),
        kept=stats.kept,
        values=stats.values,
        adjusted=stats.adjusted,
        method=method,
        steps=steps,
        metric=str(judge),
        unit=judge.unit or str(judge),
        model=(shape.n_layers, shape.n_heads, shape.n_kv_heads),
        prompts=prompts.digest,
        contexts=tuple(sorted(set(prompts.contexts))),
        notes=met.notes,
        labels={
            "side": tuple(ends),
            "view": tuple(ends) if len(ends) == 1 else (*ends, _CHANGE),
            "sender": tuple(map(str, senders(shape))),
            "receiver": tuple(map(str, receivers(shape))),
            "position": tuple(map(str, names)),
        },
    )


def _reader(judge: Metric, prompts: PromptPairs, m: HookedModel, clean: Batch) -> Reader:
    return judge.reader(prompts, m.logits(clean, at=judge.position).cpu() if judge.needs_reference else None)


def _ends(m: HookedModel, clean: Batch, corrupt: Batch, reader: Reader) -> Tensor:
    return torch.stack([run(m, clean, reader), run(m, corrupt, reader)])


def _spread(values: Tensor, there: Tensor) -> Tensor:
    """Numbers of the edges there are, [view edge], among all cells."""
    out = torch.full((len(values), *there.shape), torch.nan, dtype=values.dtype)
    out[:, there] = values
    return out


def _rounding(model: HookedModel, batch: Batch, reader: Reader, ends: Tensor) -> float:
    """What batches of another size do to the metric, and at least the last digit of its values."""
    return max(floor(model, batch, reader), torch.finfo(torch.float32).eps * float(ends.abs().max()))


def _refuse(prompts: PromptPairs, judge: Metric, method: Method, steps: int, per_position: bool) -> None:
    """Refuse settings and prompts that cannot give scores."""
    if not isinstance(prompts, PromptPairs):
        raise InputError(f"edge_attribution needs clean and corrupt prompts (PromptPairs), not {type(prompts).__name__}")
    if method not in _WHAT:
        raise InputError(f"method must be eap, eap_ig or exact, but it is {method!r}")
    if type(steps) is not int or steps < 1:
        raise InputError(f"steps must be a whole number from 1, but it is {steps!r}")
    if judge.needs_reference and method == "eap":
        raise InputError(f"{judge} is least at the clean run and has no slope there, so eap sees nothing; take eap_ig or exact")
    if per_position and judge.position != "END":
        raise InputError(f"scores per position need a metric that is read at END, but it is {judge}")
    prompts.require_difference()


def _refuse_if_alike(ends: Mapping[str, Tensor], judge: Metric) -> None:
    """Refuse where in no model the metric tells clean from corrupt. A single pair has no error to judge by."""
    if not any(recovered(c, c, k).refused is None or (len(c) == 1 and bool(c != k)) for c, k in ends.values()):
        gaps = {side: _told(float((c - k).mean()), float(standard_error(c - k))) for side, (c, k) in ends.items()}
        told = ", ".join(gap if len(gaps) == 1 else f"{gap} in {side}" for side, gap in gaps.items())
        raise InputError(f"{judge} does not differ between clean and corrupt prompts ({told}), so there is nothing to attribute")


def _told(value: float, error: float) -> str:
    """A number with its noise, if it has one."""
    return f"{value:.3g}" + ("" if error != error else f" +- {error:.2g}")
