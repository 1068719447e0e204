"""A staged search for a circuit: which heads send to the logits, which to those, and so on backwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.circuit import Edge
from interp.metrics import Reader
from interp.sites import Site
from interp.stages import Stage
from interp.stats import permutation, recovered
from interp.sweeps.paths import path_sweep
from interp.sweeps.plain import floor

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel


@dataclass(frozen=True, eq=False)
class Search:
    """One model with its prompts, and how it is searched.

    Attributes:
        model: the model.
        clean: the prompts.
        corrupt: their partners, which heads send from.
        reader: the metric, bound to the prompts.
        start: metric of the clean run.
        goal: metric of the corrupt run.
        freeze_mlps: hold MLPs while it is recorded what is sent.
        level: of the tests.
        seed: of permutations, and of the paths that are checked.
        name: of the progress bar.
        group: context of every prompt, as ``grouped`` counts them. Prompts of one context are no independent draws, so tests
            and shares are of means per context.
    """

    model: HookedModel
    clean: Batch
    corrupt: Batch
    reader: Reader
    start: Float[Tensor, " prompt"]
    goal: Float[Tensor, " prompt"]
    freeze_mlps: bool
    level: float
    seed: int
    name: str
    group: Int[Tensor, " prompt"]

    def mean(self, values: Float[Tensor, "prompt ..."]) -> Float[Tensor, "context ..."]:
        """Means per context."""
        return by_context(values, self.group)


def grouped(contexts: Sequence[str]) -> Int[Tensor, " prompt"]:
    """The number of every prompt's context, counted as they first come."""
    number = {context: i for i, context in enumerate(dict.fromkeys(contexts))}
    return torch.tensor([number[context] for context in contexts])


def by_context(values: Float[Tensor, "prompt ..."], group: Int[Tensor, " prompt"]) -> Float[Tensor, "context ..."]:
    """Means over the prompts of every context; the values themselves where no context comes twice."""
    count = group.bincount()
    if len(count) == len(values):
        return values
    sums = torch.zeros(len(count), *values.shape[1:], dtype=torch.float64).index_add(0, group, values.double())
    return sums / count.reshape(-1, *[1] * (values.ndim - 1))


def receivers(sizes: tuple[int, int, int], stage: Stage, earlier: Sequence[Stage], chosen: Bool[Tensor, "stage layer head"]) -> list[Site]:
    """What the senders of a stage send to; nothing where it was not found.

    Args:
        sizes: layers, heads and key/value heads of the model.
        stage: the stage.
        earlier: those before it.
        chosen: the heads that these found.
    """
    n_layers, n_heads, n_kv_heads = sizes
    if not stage.sources:
        return [Site("resid_post", n_layers - 1, position="END")]
    found: dict[Site, None] = {}
    for role, component in stage.sources:
        for k in (k for k, before in enumerate(earlier) if before.role == role):
            for layer, head in chosen[k].nonzero().tolist():
                index = head if component == "q" else head * n_kv_heads // n_heads
                found[Site(component, layer, index, stage.at)] = None
    return list(found)


@dataclass(eq=False)
class Findings:
    """What the stages found so far.

    Attributes:
        patched: the metric where the receivers of a stage read what a head sends; NaN for stages not searched.
        reaches: whether a head can reach a receiver of the stage.
        chosen: the heads that were found.
        floor: largest change of the metric by rounding.
        edges: the metric where one receiver alone reads what a chosen head sends, [prompt].
        notes: what was not searched or not found, and why.
    """

    patched: Float[Tensor, "stage layer head prompt"]
    reaches: Bool[Tensor, "stage layer head"]
    chosen: Bool[Tensor, "stage layer head"]
    floor: float
    edges: dict[Edge, Tensor]
    notes: list[str]


def staged(search: Search, stages: Sequence[Stage]) -> Findings:
    """Go through the stages: each sends to what the ones before it found."""
    s, n = search.model.shape, len(search.clean)
    shape = (len(stages), s.n_layers, s.n_heads)
    none = torch.zeros(shape, dtype=torch.bool)
    found = Findings(torch.full((*shape, n), torch.nan), none, none.clone(), floor(search.model, search.clean, search.reader), {}, [])
    start, goal = search.mean(search.start), search.mean(search.goal)
    if why := recovered(goal, start, goal).refused:
        found.notes.append(f"nothing searched, since clean and corrupt do not differ: {why}")
        return found
    known: dict[tuple[Any, ...], int] = {}
    for k, stage in enumerate(stages):
        read = receivers((s.n_layers, s.n_heads, s.n_kv_heads), stage, stages[:k], found.chosen)
        if not read:
            missing = ", ".join(dict.fromkeys(role for role, _ in stage.sources))
            found.notes.append(f"{stage.role} not searched, because no {missing} was found")
            continue
        key = (tuple(read), stage.at)
        if key in known:  # supporters and opponents of the same receivers
            found.patched[k], found.reaches[k] = found.patched[known[key]], found.reaches[known[key]]
        else:
            _sweep(search, k, stage, read, found)
            known[key] = k
        found.chosen[k] = _choice(search, stage, found.patched[k], found.reaches[k], found.floor)
        if not found.chosen[k].any():
            found.notes.append(f"no {stage.role} found: {_why(search, stage, found.patched[k], found.reaches[k])}")
        _edges(search, stage, read, found, k)
    return found


def _why(search: Search, stage: Stage, patched: Tensor, reaches: Tensor) -> str:
    """Why a stage found nobody."""
    if not reaches.any():
        return f"no head comes before {stage.receivers}"
    if bool((patched == search.start).all()):
        return f"what {stage.receivers} can read of heads at {stage.at} is the same in clean and corrupt prompts"
    return f"none {'carries' if stage.sign == 'both' else stage.sign} the answer beyond noise"


def _sweep(search: Search, k: int, stage: Stage, read: list[Site], found: Findings) -> None:
    """Every head by turns, into all receivers together."""
    layers, heads = found.chosen.shape[1:]
    senders = [(Site("z", layer, head, stage.at),) for layer in range(layers) for head in range(heads)]
    settings: dict[str, Any] = {"freeze_mlps": search.freeze_mlps, "seed": search.seed, "desc": f"{stage.role}, {search.name}"}
    paths = path_sweep(search.model, search.clean, search.corrupt, senders, [tuple(read)], search.reader, **settings)
    # Against the sweep's own run, so that what does nothing is exactly the clean run.
    found.patched[k] = (search.start + (paths.values[:, 0] - paths.start)).reshape(layers, heads, -1)
    found.reaches[k] = (paths.blocked[:, 0] == 0).reshape(layers, heads)
    found.floor = max(found.floor, paths.floor)
    found.notes += [note for note in paths.notes if note not in found.notes]


def _choice(search: Search, stage: Stage, patched: Tensor, reaches: Tensor, noise: float) -> Tensor:
    """The heads of a stage, [layer head]."""
    start, goal, under = (search.mean(x) for x in (search.start, search.goal, patched.movedim(-1, 0)))
    moved = (under - start.reshape(-1, 1, 1)).double()
    share = recovered(under, start, goal, resamples=1).value
    wanted = {"supports": share > 0, "opposes": share < 0, "both": share != 0}[stage.sign]
    beyond = permutation(moved, seed=search.seed).adjusted <= search.level
    chosen = reaches & wanted & beyond & (moved.mean(0).abs() > noise) & (share.abs() >= stage.least)
    if stage.top is not None:
        most = math.ceil(stage.top * chosen.numel() - 1e-9)
        order = torch.where(chosen, share.abs(), -1.0).flatten().argsort(descending=True, stable=True)
        keep = torch.zeros(chosen.numel(), dtype=torch.bool)
        keep[order[:most]] = True
        chosen &= keep.reshape(chosen.shape)
    return chosen


def _edges(search: Search, stage: Stage, read: list[Site], found: Findings, k: int) -> None:
    """Every chosen head into every receiver alone."""
    heads = [Site("z", layer, head, stage.at) for layer, head in found.chosen[k].nonzero().tolist()]
    if not heads:
        return
    if len(read) == 1:  # it was alone already
        found.edges.update({Edge(site, read[0]): found.patched[k, site.layer, site.head] for site in heads})
        return
    settings: dict[str, Any] = {"freeze_mlps": search.freeze_mlps, "seed": search.seed, "desc": f"edges of {stage.role}, {search.name}"}
    singles = [(site,) for site in heads], [(site,) for site in read]
    paths = path_sweep(search.model, search.clean, search.corrupt, *singles, search.reader, **settings)
    for i, j in (paths.blocked == 0).nonzero().tolist():
        found.edges[Edge(heads[i], read[j])] = search.start + (paths.values[i, j] - paths.start)
