"""Through which edges does the answer flow?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp import plots
from interp.circuit import Circuit, Edge
from interp.errors import InputError
from interp.metrics import Metric, Reader
from interp.models.edges import Edges, Judge, Trace, reach, receivers, senders
from interp.progress import progress
from interp.prompts import PromptPairs
from interp.results import Result, analysis
from interp.sites import Site
from interp.stats import recovered, standard_error
from interp.sweeps import floor, run

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel

Method = Literal["eap", "eap_ig", "exact"]
_WHAT = {"eap": "first order at the clean run", "eap_ig": "gradients along the way to the corrupt input", "exact": "one run per edge"}
_DRAWN = 20  # edges with a bar
_BLOCK = 40  # edges whose senders and receivers span the map


@dataclass(frozen=True, eq=False)
class EdgeAttributionResult(Result):
    """How far the metric of the clean run falls when one edge carries what it carries in the corrupt run.

    Attributes:
        score: mean over prompts, in units of the metric; positive supports the answer. NaN where there is no edge.
        error: standard error of that mean; NaN for a single prompt.
        clean: metric of the clean run.
        corrupt: metric of the corrupt run.
        floor: change of the metric by rounding alone, which no run could tell from a smaller score.
        method: ``eap``, ``eap_ig`` or ``exact``.
        steps: gradients per prompt of ``eap_ig``.
        metric: text form.
        unit: of the metric.
        model: layers, heads and key/value heads of the model.
        prompts: digest of the prompts.
        contexts: contexts of the prompts.
        labels: text forms along ``sender`` and ``receiver``; ``position`` is ``all``, or names and token indices.
    """

    score: Float[Tensor, "sender receiver position"]
    error: Float[Tensor, "sender receiver position"]
    clean: Float[Tensor, " prompt"]
    corrupt: Float[Tensor, " prompt"]
    floor: float
    method: Method
    steps: int
    metric: str
    unit: str
    model: tuple[int, int, int]
    prompts: str
    contexts: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def recovered(self) -> Float[Tensor, "sender receiver position"]:
        """Score as a share of the whole fall from clean to corrupt; NaN where that is within two standard errors of 0."""
        whole = recovered(self.corrupt, self.clean, self.corrupt)
        gap = float((self.clean.double() - self.corrupt.double()).mean())
        return self.score / gap if whole.refused is None else torch.full_like(self.score, torch.nan)

    @property
    def edges(self) -> tuple[str, ...]:
        """Every edge as text, ``L0H1.z -> L2H0.q``, in the order of the table."""
        return tuple(str(self._edge(cell)) for cell in self._cells().tolist())

    def _cells(self) -> Tensor:
        """[edge, 3]: sender, receiver and position of every edge."""
        return (~self.score.isnan()).nonzero()

    def _edge(self, cell: list[int]) -> Edge:
        sender, receiver, place = (self.labels[axis][i] for axis, i in zip(("sender", "receiver", "position"), cell, strict=True))
        where = None if place == "all" else place
        return Edge(Site.parse(sender).at(where), Site.parse(receiver).at(where))

    def _ranked(self, n: int) -> tuple[list[Edge], Tensor, Tensor]:
        """The edges with the largest scores of either sign; score and error of each."""
        cells = self._cells()
        values = self.score[tuple(cells.T)]
        order = values.abs().argsort(descending=True, stable=True)[:n]
        return [self._edge(c) for c in cells[order].tolist()], values[order], self.error[tuple(cells[order].T)]

    def top(self, n: int = 50) -> Circuit:
        """The ``n`` edges with the largest scores of either sign, and what sends through them, as a circuit.

        Raises:
            InputError: n is not a number of edges that there are.
        """
        if type(n) is not int or not 1 <= n <= len(self._cells()):
            raise InputError(f"top takes 1 to {len(self._cells())} edges, not {n!r}")
        edges, values, _ = self._ranked(n)
        nodes = tuple(dict.fromkeys(edge.sender for edge in edges))
        scores: dict[Site | Edge, float] = dict(zip(edges, values.tolist(), strict=True))
        return Circuit(self.model, nodes, tuple(edges), scores=scores, prompts=self.prompts, contexts=self.contexts)

    def summary(self) -> str:
        """The strongest edge, and how far clean and corrupt are apart."""
        (edge,), value, error = self._ranked(1)
        n, count = len(self.clean), len(self._cells())
        noise = f" +- {float(error):.2g}" if n > 1 else ""
        live = int((self.score.abs() > self.floor).sum())
        gap = self.clean - self.corrupt
        apart = f"{float(gap.mean()):.3g}" + (f" +- {float(standard_error(gap)):.2g}" if n > 1 else "")
        told = f"{self.method}: {_WHAT[self.method]}" + (f", {self.steps} steps" if self.method == "eap_ig" else "")
        return (
            f"{edge} carries {float(value):.3g}{noise} of {self.metric}, the most of {count} edges, of which {live} are above the floor of "
            f"{self.floor:.1g} ({told}; n = {n} prompt pairs; clean - corrupt {apart})"
        )

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per edge: score with its standard error and 95 % interval (normal), and the share of the whole fall.

        Raises:
            InputError: ``per`` is given; scores are kept as means over prompts only.
        """
        import pandas as pd

        if per is not None:
            raise InputError(f"edge scores are kept as means over prompts; there is no table per {per!r}")
        cells = self._cells()
        where = tuple(cells.T)
        score, error = self.score[where], self.error[where]
        axes = {axis: [self.labels[axis][i] for i in cells[:, k].tolist()] for k, axis in enumerate(("sender", "receiver", "position"))}
        columns = {"score": score, "error": error, "low": score - 1.96 * error, "high": score + 1.96 * error}
        columns |= {"recovered": self.recovered[where]}
        return pd.DataFrame({"edge": self.edges, **axes, **{name: x.numpy() for name, x in columns.items()}})

    def plot(self) -> go.Figure:
        """The strongest edges with their intervals."""
        edges, value, error = self._ranked(_DRAWN)
        name = f"fall of {self.metric}"
        return plots.bars(
            edges,
            {name: value},
            intervals={name: (value - 1.96 * error, value + 1.96 * error)} if len(self.clean) > 1 else None,
            title=f"Strongest of {len(self._cells())} edges by {self.method} (n = {len(self.clean)})",
            xlabel="edge",
            ylabel=f"fall when the edge is corrupt: {self.unit}",
            floor=self.floor,
            horizontal=True,
        )

    def figures(self) -> dict[str, go.Figure]:
        """The strongest edges, and the map between their senders and receivers."""
        return {"strongest edges": self.plot(), "senders and receivers": self._map()}

    def _map(self) -> go.Figure:
        """Scores between the ends of the strongest edges, summed over the positions there are."""
        edges, _, _ = self._ranked(_BLOCK)
        rows, columns = (
            sorted({self.labels[axis].index(str(end.at(None))) for end in ends})
            for axis, ends in (("sender", [e.sender for e in edges]), ("receiver", [e.receiver for e in edges]))
        )
        cells = self.score[rows][:, columns]
        values = cells.nansum(-1).masked_fill(cells.isnan().all(-1), torch.nan)
        return plots.heatmap(
            values,
            x=[self.labels["receiver"][i] for i in columns],
            y=[self.labels["sender"][i] for i in rows],
            title=f"Edges by {self.method} (n = {len(self.clean)})",
            xlabel="receiver",
            ylabel="sender",
            unit=f"fall of {self.metric}",
            floor=self.floor,
            difference=True,
        )


@analysis(version=1)
def edge_attribution(
    model: HookedModel,
    prompts: PromptPairs,
    *,
    metric: Metric | str = "logit_diff",
    method: Method = "eap",
    steps: int = 5,
    per_position: bool = False,
) -> EdgeAttributionResult:
    """Through which edges does the answer flow, from every part of the model to every later one?

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

    Norms are not frozen. b_O belongs to no head. ``k`` and ``v`` are those of key/value heads, which groups of heads share. In
    parallel blocks attention does not feed the MLP of its layer. Scores are means over prompts in units of the metric, with
    standard errors; at padding they are 0.

    Args:
        model: the model.
        prompts: clean and corrupt prompts, of one length within each pair.
        metric: what counts as the answer; read at END if scores are wanted per position.
        method: ``eap``, ``eap_ig`` or ``exact``.
        steps: gradients per prompt of ``eap_ig``.
        per_position: a score for every named position (summed over the tokens that it names in the clean prompt), or for every token
            where only END is named and all prompts have one length.

    Raises:
        InputError: the lengths of a pair differ; clean and corrupt do not; the metric has no gradient; an architecture whose parts
            do not simply add up.
    """
    judge = Metric.parse(metric)
    _refuse(prompts, judge, method, steps, per_position)
    clean, corrupt = model.batch(prompts.clean), model.batch(prompts.corrupt)
    names = _names(clean) if per_position else ("all",)
    reference = model.logits(clean, at=judge.position).cpu() if judge.needs_reference else None
    reader = judge.reader(prompts, reference)
    if method == "exact":  # it takes long
        _refuse_if_alike(run(model, clean, reader), run(model, corrupt, reader), judge)
    graph, ends, moments = Edges(model), torch.empty(2, len(clean)), _Moments()
    _check(graph, clean, corrupt, reader)
    score = _scorer(graph, corrupt, reader, method, steps, names)
    for part, (values, found) in progress(model.each(clean, _bytes(model, clean, names), score), "edges, batches"):
        ends[:, part.rows] = values
        moments = moments.joined(found)
    _refuse_if_alike(ends[0], ends[1], judge)
    there = _there(model, names)
    return EdgeAttributionResult(
        score=moments.mean.masked_fill(~there, torch.nan),
        error=moments.error.masked_fill(~there, torch.nan),
        clean=ends[0],
        corrupt=ends[1],
        floor=_rounding(model, clean[:4], reader[:4], ends),
        method=method,
        steps=steps,
        metric=str(judge),
        unit=judge.unit or str(judge),
        model=(model.shape.n_layers, model.shape.n_heads, model.shape.n_kv_heads),
        prompts=prompts.digest,
        contexts=tuple(sorted(set(prompts.contexts))),
        labels={
            "sender": tuple(map(str, senders(model.shape))),
            "receiver": tuple(map(str, receivers(model.shape))),
            "position": tuple(map(str, names)),
        },
    )


@dataclass(frozen=True, eq=False)
class _Moments:
    """Mean over prompts, and what its standard error needs; parts of the prompts are joined as they come (Chan et al. 1979)."""

    n: int = 0
    mean: Tensor = torch.tensor(0.0, dtype=torch.float64)
    squares: Tensor = torch.tensor(0.0, dtype=torch.float64)

    @classmethod
    def of(cls, values: Tensor) -> _Moments:
        """Of values [prompt ...]."""
        values = values.cpu().double()
        return cls(len(values), values.mean(0), (values - values.mean(0)).square().sum(0))

    def joined(self, other: _Moments) -> _Moments:
        """Of both."""
        n, gap = self.n + other.n, other.mean - self.mean
        return _Moments(n, self.mean + gap * (other.n / n), self.squares + other.squares + gap.square() * (self.n * other.n / n))

    @property
    def error(self) -> Tensor:
        """Standard error of the mean; NaN for a single prompt."""
        if self.n < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self.squares / (self.n * (self.n - 1))).sqrt()


def _scorer(
    graph: Edges, corrupt: Batch, reader: Reader, method: Method, steps: int, names: tuple[str | int, ...]
) -> Callable[[Any], tuple[Tensor, _Moments]]:
    """A function that gives, for some of the prompts, the metric of both runs [2 prompt] and the moments of every edge."""

    def score(part: Any) -> tuple[Tensor, _Moments]:
        judge = _judge(reader[part.rows])
        here = graph.trace(part.batch, judge, slopes=method == "eap")
        there = graph.trace(corrupt.select(part.rows.tolist()), judge, slopes=False)
        change = graph.changes(here, there)
        places = _places(part.batch, names).to(change)
        if method == "exact":
            found = _exact(graph, here, change, places, judge)
        else:
            change = change.movedim(1, 0).contiguous()
            runs = [here] if method == "eap" else _between(graph, here, there, judge, steps)
            found = sum((_first_order(graph, each, change, places) for each in runs), torch.zeros(())) / (
                steps if method == "eap_ig" else 1
            )
        return torch.stack([here.value, there.value]).cpu(), _Moments.of(found)

    return score


def _check(graph: Edges, clean: Batch, corrupt: Batch, reader: Reader) -> None:
    """Check on the first pair that differs that this architecture has the edges that are meant."""
    i = int((clean.ids != corrupt.ids).any(1).nonzero()[0])
    judge = _judge(reader[i : i + 1])
    graph.check_reading(*(graph.trace(batch[i], judge, slopes=False) for batch in (clean, corrupt)))


def _judge(reader: Reader) -> Judge:
    return Judge(lambda logits, rows: reader[rows](logits), reader.position)


def _between(graph: Edges, here: Trace, there: Trace, judge: Judge, steps: int) -> Iterator[Trace]:
    """Runs whose embeddings lie in the middle of equal parts of the way from clean to corrupt."""
    begin, end = here.sent[Site("embed")], there.sent[Site("embed")]
    for k in range(steps):
        yield graph.trace(here.batch, judge, start=begin + (end - begin) * ((k + 0.5) / steps))


def _first_order(graph: Edges, at: Trace, change: Tensor, places: Tensor) -> Float[Tensor, "prompt sender receiver position"]:
    """- change . gradient for all edges; a matrix product per layer of readers. ``change`` is [prompt sender pos d_model]."""
    out, shape = [], graph.shape
    for layer in range(shape.n_layers + 1):
        slope = graph.slopes(at, layer).movedim(1, 0)
        n = reach(shape, Site("resid_mid", layer)) if layer < shape.n_layers else change.shape[1]
        if places.shape[-1] == 1:
            product = torch.bmm(change[:, :n].flatten(2), (slope * places[:, None]).flatten(2).mT)[..., None]
        else:
            product = torch.einsum("pstd,prtd,ptk->psrk", change[:, :n], slope, places)
        out.append(torch.nn.functional.pad(-product, (0, 0, 0, 0, 0, change.shape[1] - n)))
    return torch.cat(out, dim=2)


def _exact(graph: Edges, here: Trace, change: Tensor, places: Tensor, judge: Judge) -> Float[Tensor, "prompt sender receiver position"]:
    """The fall of the metric in one run per edge; an edge that carries the same in both runs has none."""
    readers = receivers(graph.shape)
    out = torch.zeros(len(here.batch), len(change), len(readers), places.shape[-1])
    for r, receiver in enumerate(progress(readers, "readers")):
        for k in range(places.shape[-1]):
            carries = change[: reach(graph.shape, receiver)] * places[None, :, :, k, None]
            live = carries.flatten(1).any(1).nonzero().flatten()
            # The unchanged run goes along in the same batch, so that a change nobody reads gives exactly 0.
            values = graph.carried(here, receiver, torch.cat([torch.zeros_like(carries[:1]), carries[live]]), judge)
            out[:, live.cpu(), r, k] = (values[0] - values[1:]).T
    return out


def _there(model: HookedModel, names: tuple[str | int, ...]) -> Tensor:
    """Which edges there are, [sender receiver position]: the logits are read at END only."""
    shape = model.shape
    order = torch.arange(len(senders(shape)))[:, None, None]
    readers = receivers(shape)
    ends = torch.tensor(
        [[reach(shape, r) if r.component != "resid_post" or name in ("all", "END") else 0 for name in names] for r in readers]
    )
    return order < ends


def _names(clean: Batch) -> tuple[str | int, ...]:
    """The named positions from left to right; every token where only END is named."""
    if set(clean.positions) == {"END"} and not clean.padded:
        return (*range(clean.ids.shape[1] - 1), "END")
    mean = {name: sum(sum(p) / max(len(p), 1) for p in clean.at(name)) / len(clean) for name in clean.positions}
    return tuple(name for _, name in sorted((m, name) for name, m in mean.items()))


def _places(batch: Batch, names: tuple[str | int, ...]) -> Tensor:
    """Which tokens each position stands for, [prompt pos position]; no padding."""
    if names == ("all",):
        return batch.mask[..., None].float()
    out = torch.zeros(*batch.ids.shape, len(names))
    for k, name in enumerate(names):
        for row, tokens in enumerate(batch.at(name)):
            out[row, list(tokens), k] = 1
    return out


def _bytes(model: HookedModel, batch: Batch, names: tuple[str | int, ...]) -> int:
    """Memory per token of a pass: activations with their graph, what senders write, gradients of a layer, and scores.

    A quarter of it: a pass of few tokens spends its time on reading the weights, and where memory does run out parts are halved.
    """
    s = model.shape
    n_senders, n_readers, longest = len(senders(s)), len(receivers(s)), int(batch.lengths.max())
    graph = s.n_layers * (16 * s.d_model + 4 * s.d_mlp + 4 * s.n_heads * longest)
    edges = (2 * n_senders + 6 * (s.n_heads + 2 * s.n_kv_heads)) * s.d_model
    scores = 4 * n_senders * n_readers * len(names) // longest
    return (graph + edges + scores) * max(model.dtype.itemsize, 4) // 4


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
    for i, (a, b) in enumerate(zip(prompts.clean.ids, prompts.corrupt.ids, strict=True)):
        if len(a) != len(b):
            raise InputError(
                f"edges are compared token by token, so a pair needs one length, but pair {i} has {len(a)} and {len(b)} tokens"
            )
    if prompts.clean.ids == prompts.corrupt.ids:
        raise InputError("clean and corrupt prompts are the same, so there is no difference to attribute")


def _refuse_if_alike(clean: Tensor, corrupt: Tensor, judge: Metric) -> None:
    """Refuse where the metric does not tell clean from corrupt. A single pair has no error to judge by."""
    if recovered(clean, clean, corrupt).refused is not None and not (len(clean) == 1 and bool(clean != corrupt)):
        gap = clean - corrupt
        noise = f" +- {float(standard_error(gap)):.2g}" if len(gap) > 1 else ""
        told = f"{float(gap.mean()):.3g}{noise}"
        raise InputError(f"{judge} does not differ between clean and corrupt prompts ({told}), so there is nothing to attribute")
