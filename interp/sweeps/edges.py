"""What all edges of a model carry from a corrupt prompt into a clean one: to first order, or by one run per edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.metrics import Reader
from interp.models.edges import Edges, Judge, Trace, reach, receivers, senders
from interp.models.loading import free_bytes
from interp.progress import progress
from interp.sites import Site
from interp.stats import RESAMPLES, permutation, standard_error

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel, Shape

Method = Literal["eap", "eap_ig", "exact"]
Place = str | int
_ALL = 2**22  # scores that are kept for every prompt
_STRONGEST = 1000  # edges, of each model and of the change, that are kept where there are more
_COLUMNS = 2**16  # edges whose statistics are taken at once
_FLIPS = 2**23  # means under flipped signs


@dataclass(frozen=True, eq=False)
class Meeting:
    """Which token of a corrupt prompt stands against each token of the clean one.

    Attributes:
        columns: its index, for every clean token; None where prompts are compared token by token.
        mask: clean tokens that are compared; no padding.
        names: the named positions that are compared.
        notes: what is left out, in words.
    """

    columns: Int[Tensor, "prompt pos"] | None
    mask: Bool[Tensor, "prompt pos"]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, clean: Batch, corrupt: Batch) -> Meeting:
        """Token by token where each pair has one length, otherwise at named positions, the tokens of a name in order.

        Raises:
            InputError: two names put different corrupt tokens against one clean token.
        """
        unequal = int((clean.lengths != corrupt.lengths).sum())
        if not unequal:
            return cls(None, clean.mask, tuple(clean.positions))
        places = {name: list(zip(clean.at(name), corrupt.at(name), strict=True)) for name in clean.positions if name in corrupt.positions}
        names = tuple(name for name, pairs in places.items() if all(len(a) == len(b) for a, b in pairs))
        columns, mask = torch.zeros_like(clean.ids), torch.zeros_like(clean.mask)
        for name in names:
            for row, (here, there) in enumerate(places[name]):
                for i, j in zip(here, there, strict=True):
                    if mask[row, i] and columns[row, i] != j:
                        raise InputError(
                            f"token {i} of clean prompt {row} stands against two tokens of the corrupt one, {int(columns[row, i])} and "
                            f"{j} (named {name}); prompts of different lengths need names that pair up"
                        )
                    columns[row, i], mask[row, i] = j, True
        told = (
            f"{unequal} of {len(clean)} pairs differ in length, so prompts are compared at the tokens that {', '.join(names)} name, "
            f"{int(mask.sum())} of {int(clean.mask.sum())}; what other tokens carry has no part"
        )
        left = [name for name in clean.positions if name not in names]
        odd = (f"{', '.join(left)} left out: other numbers of tokens in a clean and its corrupt prompt",) if left else ()
        return cls(columns, mask, names, (told, *odd))

    def aligned(self, corrupt: Trace, clean: Batch, rows: Tensor) -> Trace:
        """The corrupt run of some pairs, with its tokens where they stand against clean ones."""
        return corrupt if self.columns is None else corrupt.along(self.columns[rows, : clean.ids.shape[1]], clean)

    def places(self, clean: Batch, rows: Tensor, names: tuple[Place, ...]) -> Float[Tensor, "prompt pos position"]:
        """Which tokens of some pairs each position stands for; ``all`` is whatever is compared."""
        mask = self.mask[rows, : clean.ids.shape[1]].float()
        if names == ("all",):
            return mask[..., None]
        out = torch.zeros(*clean.ids.shape, len(names))
        for k, name in enumerate(names):
            for row, tokens in enumerate(clean.at(name)):
                out[row, list(tokens), k] = 1
        return out


def place_names(clean: Batch, met: Meeting) -> tuple[Place, ...]:
    """The named positions from left to right; every token where only END is named and all prompts have one length."""
    if met.columns is None and set(met.names) == {"END"} and not clean.padded:
        return (*range(clean.ids.shape[1] - 1), "END")
    mean = {name: sum(sum(p) / max(len(p), 1) for p in clean.at(name)) / len(clean) for name in met.names}
    return tuple(name for _, name in sorted((m, name) for name, m in mean.items()))


def edges_there(shape: Shape, names: tuple[Place, ...]) -> Bool[Tensor, "sender receiver position"]:
    """Which edges there are: a sender has written when the receiver reads, and the logits are read at END only."""
    order = torch.arange(len(senders(shape)))[:, None, None]
    readers = receivers(shape)
    ends = torch.tensor(
        [[reach(shape, r) if r.component != "resid_post" or name in ("all", "END") else 0 for name in names] for r in readers]
    )
    return order < ends


def edge_scores(
    model: HookedModel,
    clean: Batch,
    corrupt: Batch,
    met: Meeting,
    reader: Reader,
    *,
    method: Method,
    steps: int,
    names: tuple[Place, ...],
    desc: str = "edges, batches",
) -> tuple[Float[Tensor, "2 prompt"], Float[Tensor, "prompt edge"]]:
    """How far the metric of the clean run falls when one edge carries what it carries in the corrupt run.

    Args:
        model: the model.
        clean: the prompts whose runs are changed.
        corrupt: what they are changed to.
        met: which of their tokens are compared.
        reader: the metric.
        method: ``eap``, ``eap_ig`` or ``exact``.
        steps: gradients per prompt of ``eap_ig``.
        names: positions to score; ``("all",)`` adds up over all that are compared.
        desc: of the progress bar.

    Returns:
        The metric of the clean and of the corrupt run; and the fall, for the edges of ``edges_there`` in their order.

    Raises:
        InputError: the parts of this architecture do not add up, the metric has no gradient, or scores do not fit or are not finite.
    """
    graph, there = Edges(model), edges_there(model.shape, names)
    _fits(len(clean), int(there.sum()))
    _check(graph, clean, corrupt, met, reader)
    ends = torch.empty(2, len(clean))
    found = torch.empty(len(clean), int(there.sum()), dtype=torch.float64 if model.dtype == torch.float64 else torch.float32)
    score = _scorer(graph, corrupt, met, reader, method, steps, names)
    for part, (values, scores) in progress(model.each(clean, _bytes(model, clean, names), score), desc):
        ends[:, part.rows] = values
        found[part.rows] = scores.flatten(1)[:, there.flatten().to(scores.device)].cpu().to(found)
    if not bool(found.isfinite().all()):
        raise InputError(f"edges of {model.name} have scores that are not finite numbers; its activations or the metric overflow")
    return ends, found


@dataclass(frozen=True, eq=False)
class EdgeStats:
    """What is told of the scores of one model, or of two and their difference: views are the models, then second - first.

    Attributes:
        mean: over prompts.
        error: standard error of the mean; NaN for a single prompt.
        kept: edges whose scores are kept for every prompt: all, or the strongest of every view.
        values: these scores.
        adjusted: p values of the kept edges, corrected for all edges; None where all are kept.
    """

    mean: Float[Tensor, "view edge"]
    error: Float[Tensor, "view edge"]
    kept: Int[Tensor, " kept"]
    values: Float[Tensor, "side prompt kept"]
    adjusted: Float[Tensor, "view kept"] | None

    @classmethod
    def of(cls, found: Sequence[Float[Tensor, "prompt edge"]]) -> EdgeStats:
        """Of the scores of one model, or of two on the same prompts."""
        n, edges = found[0].shape

        def views(some: slice) -> list[Tensor]:
            each = [x[:, some].double() for x in found]
            return each if len(each) == 1 else [*each, each[1] - each[0]]

        parts = [views(slice(i, i + _COLUMNS)) for i in range(0, edges, _COLUMNS)]
        mean = torch.cat([torch.stack([x.mean(0) for x in part]) for part in parts], dim=1)
        error = torch.cat([torch.stack([standard_error(x) for x in part]) for part in parts], dim=1)
        if n * edges * len(found) <= _ALL:
            return cls(mean, error, torch.arange(edges), torch.stack(list(found)), None)
        kept = mean.abs().topk(min(_STRONGEST, edges), dim=1).indices.unique()
        tests = [permutation(x, resamples=flips(edges)).adjusted[kept] for x in views(slice(None))]
        return cls(mean, error, kept, torch.stack([x[:, kept] for x in found]), torch.stack(tests))


def flips(edges: int) -> int:
    """Patterns of signs for a permutation test of so many edges, which would otherwise take longer than their scores."""
    return max(200, min(RESAMPLES, _FLIPS // edges))


def _fits(prompts: int, edges: int) -> None:
    """Refuse scores per prompt that do not fit into memory, with what their statistics take."""
    need, free = prompts * edges * 32, free_bytes(torch.device("cpu"))
    if need > free:
        gib = f"{need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
        raise InputError(f"scores of {edges} edges for {prompts} prompts take {gib}; take fewer prompts, or no scores per position")


def _scorer(
    graph: Edges, corrupt: Batch, met: Meeting, reader: Reader, method: Method, steps: int, names: tuple[Place, ...]
) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """A function that gives, for some of the prompts, the metric of both runs [2 prompt] and [prompt sender receiver position]."""

    def score(part: Any) -> tuple[Tensor, Tensor]:
        judge = _judge(reader[part.rows])
        here = graph.trace(part.batch, judge, slopes=method == "eap")
        there = met.aligned(graph.trace(corrupt.select(part.rows.tolist()), judge, slopes=False), part.batch, part.rows)
        change = graph.changes(here, there, met.mask[part.rows, : part.batch.ids.shape[1]])
        places = met.places(part.batch, part.rows, names).to(change)
        ends = torch.stack([here.value, there.value]).cpu()
        if method == "exact":
            return ends, _exact(graph, here, change, places, judge)
        change = change.movedim(1, 0).contiguous()
        if method == "eap":
            return ends, _first_order(graph, here, change, places)
        runs = _between(graph, here, change[:, 0], judge, steps)
        return ends, sum((_first_order(graph, each, change, places) for each in runs), torch.zeros(())) / steps

    return score


def _check(graph: Edges, clean: Batch, corrupt: Batch, met: Meeting, reader: Reader) -> None:
    """Check on the first pair that differs that this architecture has the edges that are meant."""
    i = next(i for i, (a, b) in enumerate(zip(clean.rows(), corrupt.rows(), strict=True)) if a != b)
    judge, rows, first = _judge(reader[i : i + 1]), torch.tensor([i]), clean[i]
    here, there = (graph.trace(batch, judge, slopes=False) for batch in (first, corrupt[i]))
    graph.check_reading(here, met.aligned(there, first, rows), met.mask[rows, : first.ids.shape[1]])


def _judge(reader: Reader) -> Judge:
    return Judge(lambda logits, rows: reader[rows](logits), reader.position)


def _between(graph: Edges, here: Trace, way: Tensor, judge: Judge, steps: int) -> Iterator[Trace]:
    """Runs whose embeddings lie in the middle of equal parts of the way from clean to corrupt; tokens not compared stay clean."""
    for k in range(steps):
        yield graph.trace(here.batch, judge, start=here.sent[Site("embed")] + way * ((k + 0.5) / steps))


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


def _bytes(model: HookedModel, batch: Batch, names: tuple[Place, ...]) -> int:
    """Memory per token of a pass: activations with their graph, what senders write, gradients of a layer, and scores.

    A quarter of it: a pass of few tokens spends its time on reading the weights, and where memory does run out parts are halved.
    """
    s = model.shape
    n_senders, n_readers, longest = len(senders(s)), len(receivers(s)), int(batch.lengths.max())
    graph = s.n_layers * (16 * s.d_model + 4 * s.d_mlp + 4 * s.n_heads * longest)
    edges = (2 * n_senders + 6 * (s.n_heads + 2 * s.n_kv_heads)) * s.d_model
    scores = 4 * n_senders * n_readers * len(names) // longest
    return (graph + edges + scores) * max(model.dtype.itemsize, 4) // 4
