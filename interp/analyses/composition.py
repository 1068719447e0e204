"""Which heads can talk to which: how well later heads read what earlier heads and their components write, from weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.circuit import Circuit, Edge
from interp.directions import concentration, critical, shares, spread, tail
from interp.errors import InputError
from interp.models.composition import Composed, Head, composed, directions, ends, matched, merged
from interp.models.heads import outside
from interp.names import unknown
from interp.results import Result, analysis
from interp.sites import Heads, Site

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

LEVEL = 0.05
_CHANGE = "tuned - base"
_DRAWN = 16  # channels in the network
_WIDE = 12  # characters on an edge of it
_SAID = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True, eq=False)
class CompositionResult(Result):
    """Composition scores of senders in receivers; NaN where a receiver is not in a later layer, or one of the two is zero.

    A random direction, or a random matrix of whatever spectrum, has the score ``expected`` in the mean square.

    Attributes:
        score: of whole matrices, ``|X Y|_F / (|X|_F |Y|_F)``.
        p: share of draws in which the sender's directions, turned at random, score as high.
        component: of the sender's components, ``|v_i Y| / |Y|_F``; NaN too for those whose strength is rounding. None at the level
            of heads.
        place: 1 for the strongest of the components of all earlier heads in this receiver, asked for or not; 0 where there is no score.
        rivals: how many components that is.
        critical: the component score that chance exceeds in none of all these with probability 95 % (Bonferroni).
        strength: singular values of the senders' OV.
        reads: squared singular values of what the receivers read with, as shares of their sum; chance depends on the receiver by these.
        match: for a component of base, the one of tuned that writes most alike. None for one model.
        match_cosine: of the two, signs aside.
        kind: ``q``, ``k`` or ``v``.
        dims: dimensions of the stream that heads can tell apart.
        model: (n_layers, n_heads, n_kv_heads) of the model.
        draw_seed: of the random turns.
        notes: what the scores leave out.
        labels: of ``side``, ``sender`` and ``receiver``: heads, as those that write and attend (query heads).
    """

    score: Float[Tensor, "side sender receiver"]
    p: Float[Tensor, "side sender receiver"]
    component: Float[Tensor, "side sender rank receiver"] | None
    place: Int[Tensor, "side sender rank receiver"] | None
    rivals: Int[Tensor, "side receiver"]
    critical: Float[Tensor, "side receiver"] | None
    strength: Float[Tensor, "side sender rank"]
    reads: Float[Tensor, "side receiver rank"]
    match: Int[Tensor, "sender rank"] | None
    match_cosine: Float[Tensor, "sender rank"] | None
    kind: str
    dims: int
    model: tuple[int, int, int]
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def expected(self) -> float:
        """Root mean square of the score of a random direction."""
        return 1 / math.sqrt(self.dims)

    @property
    def z(self) -> Float[Tensor, "side sender receiver"]:
        """Whole matrices: how far CS^2 lies above its mean for directions turned at random, in standard deviations of it; exact moments."""
        taken = concentration(shares(self.strength))
        return torch.stack([self._z(i, self.score[i], taken[i]) for i in range(len(self.sides))])

    @property
    def component_z(self) -> Float[Tensor, "side sender rank receiver"]:
        """The same of single components, for a random direction.

        Raises:
            InputError: the scores are of whole heads only.
        """
        one = torch.ones((), dtype=torch.float64)
        return torch.stack([self._z(i, score, one) for i, score in enumerate(self._components())])

    def _z(self, i: int, score: Tensor, taken: Tensor) -> Tensor:
        """Of scores [.. receiver], from the concentration of what a sender consists of."""
        return (score.double().square() - 1 / self.dims) / spread(taken, concentration(self.reads[i]), self.dims)

    def _components(self) -> Float[Tensor, "side sender rank receiver"]:
        if self.component is None:
            raise InputError("these are scores of whole heads; ask for level='component'")
        return self.component

    def _side(self, side: str | None) -> int:
        if side is not None and side not in self.sides:
            raise unknown("model", side, self.sides)
        return len(self.sides) - 1 if side is None else self.sides.index(side)

    def _index(self, axis: str, name: str | None) -> list[int]:
        names = self.labels[axis]
        if name is not None and name not in names:
            raise unknown(axis, name, names)
        return [i for i, n in enumerate(names) if name in (None, n)]

    @property
    def change(self) -> Float[Tensor, "sender receiver"]:
        """Tuned - base of whole matrices.

        Raises:
            InputError: there is one model.
        """
        self._pair()
        return self.score[1] - self.score[0]

    @property
    def component_change(self) -> Float[Tensor, "sender rank receiver"]:
        """Tuned - base of base's components, each against the one of tuned that writes most alike.

        Raises:
            InputError: there is one model, or the scores are of whole heads only.
        """
        base, tuned = self._components()[self._pair()]
        assert self.match is not None
        return tuned.gather(1, self.match[..., None].expand(tuned.shape)) - base

    def _pair(self) -> list[int]:
        if len(self.sides) != 2:
            raise InputError("a change needs a base and a tuned model; these are the scores of one model")
        return [0, 1]

    def top(self, n: int = 10, *, side: str | None = None, sender: str | None = None, receiver: str | None = None) -> pd.DataFrame:
        """The channels that stand out most from chance, by z; at the level of heads, whole matrices.

        Components whose singular values are nearly equal share a row: single directions of their span mean nothing, so that the score is
        the root mean square over it, and p is left open. ``energy`` is the share of the sender's squared norm.

        Args:
            n: rows.
            side: which model; by default the tuned or only one.
            sender: only this head, such as L2H1.
            receiver: only this head.

        Raises:
            InputError: no such model or head.
        """
        import pandas as pd

        i = self._side(side)
        asked = (self._index("sender", sender), self._index("receiver", receiver))
        rows = list(self._whole_rows(i, n, *asked) if self.component is None else self._component_rows(i, n, *asked))
        columns = ["channel", "score", "expected", "z", "p", *([] if self.component is None else _FURTHER)]
        return pd.DataFrame(rows, columns=columns)

    def _whole_rows(self, i: int, n: int, senders: list[int], receivers: list[int]) -> Iterator[dict[str, Any]]:
        z = _kept(self.z[i], senders, receivers)
        for a, b in _largest(z, n):
            numbers = {"score": self.score[i, a, b], "z": z[a, b], "p": self.p[i, a, b]}
            yield {"channel": self._channel(self._names(a), b), "expected": self.expected, **{k: float(x) for k, x in numbers.items()}}

    def _component_rows(self, i: int, n: int, senders: list[int], receivers: list[int]) -> Iterator[dict[str, Any]]:
        assert self.place is not None
        score, place, count = merged(self._components()[i], self.place[i], self.strength[i])
        sizes = torch.arange(1, count.shape[1] + 1, dtype=torch.float64)
        sd = spread(1 / sizes, concentration(self.reads[i]), self.dims)[count.clamp_min(1) - 1, torch.arange(count.shape[2])]
        z, tests = (score.square() - 1 / self.dims) / sd, int((~score.isnan()).sum())
        energy = shares(self.strength[i])
        for a, r, b in _largest(_kept(z, senders, receivers), n):
            size = int(count[a, r, b])
            p = float(tail(score[a, r, b].square()[None], self.reads[i, b][None], self.dims)) if size == 1 else math.nan
            yield {
                "channel": self._channel(self._names(a, r, size), b),
                "score": float(score[a, r, b]),
                "expected": self.expected,
                "z": float(z[a, r, b]),
                "p": p,
                "p_adjusted": min(1.0, p * tests) if size == 1 else math.nan,
                "place": int(place[a, r, b]),
                "of": int(self.rivals[i, b]),
                "energy": float(energy[a, r : r + size].sum()),
            }

    def _names(self, sender: int, rank: int | None = None, size: int = 1) -> str:
        head = self.labels["sender"][sender]
        return head if rank is None else f"{head}.{rank}" + (f"-{rank + size - 1}" if size > 1 else "")

    def _channel(self, sender: str, receiver: int) -> str:
        head, site = self.labels["receiver"][receiver], self._reader(receiver)
        return f"{sender} -> {site}" + (f" for {head}" if self._shared else "")

    @property
    def _shared(self) -> bool:
        """Several heads have the keys and values of one."""
        return self.kind != "q" and self.model[1] != self.model[2]

    def _reader(self, receiver: int) -> Site:
        """What reads the stream: queries of the head, or keys or values of the key/value head that it shares, which are numbered apart."""
        head = Site.parse(f"{self.labels['receiver'][receiver]}.z")
        number = (head.head or 0) // (self.model[1] // self.model[2]) if self._shared else head.head
        return Site(self.kind, head.layer, number)

    def changes(self, n: int = 10) -> pd.DataFrame:
        """The channels whose score changed most from base to tuned, with z on both sides and the cosine of what both write.

        Raises:
            InputError: there is one model.
        """
        import pandas as pd

        moved, z = (self.change, self.z) if self.component is None else (self.component_change, self.component_z)
        rows = []
        for cell in _largest(moved.abs(), n):
            a, *r, b = cell
            row: dict[str, Any] = {"channel": self._channel(self._names(a, *r), b), "effect": float(moved[cell])}
            twin: tuple[int, ...] = cell
            if r:
                assert self.match is not None and self.match_cosine is not None
                twin = (a, int(self.match[a, r[0]]), b)
                row |= {"tuned_component": self._names(a, twin[1]), "cosine": float(self.match_cosine[a, r[0]])}
            values = self.score if self.component is None else self._components()
            row |= {"base": float(values[(0, *cell)]), "tuned": float(values[(1, *twin)]), "expected": self.expected}
            rows.append({**row, "base_z": float(z[(0, *cell)]), "tuned_z": float(z[(1, *twin)])})
        columns = ["channel", "effect", "base", "tuned", "expected", "base_z", "tuned_z"]
        return pd.DataFrame(rows, columns=columns + (["tuned_component", "cosine"] if self.component is not None else []))

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The strongest channels; of a pair those that changed most."""
        return self.top(n) if len(self.sides) == 1 else self.changes(n)

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per model, sender and later receiver: scores of whole matrices, and the sender's strongest component there.

        Raises:
            InputError: ``per`` is given; nothing here is per prompt.
        """
        import pandas as pd

        if per is not None:
            raise InputError(f"composition scores are of weights, so that there is nothing per {per}")
        z = self.z
        columns: dict[str, list[Any]] = {"side": [], "sender": [], "receiver": []}
        cells = [(i, a, b) for i, a, b in (~self.score.isnan()).nonzero().tolist()]
        for i, a, b in cells:
            for axis, at in (("side", i), ("sender", a), ("receiver", b)):
                columns[axis].append(self.labels[axis][at])
        at = tuple(torch.tensor(cells).reshape(-1, 3).T)
        numbers = {"score": self.score, "z": z, "p": self.p}
        if self.component is not None:
            best, which = self._best()
            numbers |= {"component": which, "component_score": best}
            numbers["component_z"] = self.component_z.gather(2, which[:, :, None])[:, :, 0]
        if len(self.sides) == 2:
            numbers["change"] = self.change.expand(self.score.shape)
        return pd.DataFrame(columns | {name: values[at].numpy() for name, values in numbers.items()})

    def _best(self) -> tuple[Float[Tensor, "side sender receiver"], Int[Tensor, "side sender receiver"]]:
        """Score and index of the strongest component of every sender in every receiver."""
        best, which = self._components().nan_to_num(-1.0).max(2)
        return torch.where(best < 0, torch.nan, best), which

    def summary(self) -> str:
        """The strongest channel beside chance, and how many stand out; of a pair the largest change, and how many stood and stand out."""
        text = self._told_change() if len(self.sides) == 2 else self._told(self.sides[0])
        return f"{text}. {_first(' and '.join(self.notes))}." if self.notes else f"{text}."

    def _told(self, side: str) -> str:
        rows = self.top(1, side=side)
        what = f"{_SAID[self.kind]} composition"
        if rows.empty:
            return f"0 channels by {what}: no head writes what a later one could read"
        row, i = rows.iloc[0], self._side(side)
        told = f"{what} is strongest in {row.channel}, score {row.score:.3g}, {row.z:.3g} standard deviations above random directions"
        told += f" ({self.expected:.3g} expected"
        several = math.isnan(row.p)
        if self.component is None:
            return f"{told}, p = {row.p:.2g}, {int((~self.score[i].isnan()).sum())} pairs of heads)"
        p = "components of one strength together, which have no p" if several else f"p = {row.p_adjusted:.2g} corrected for all channels"
        told += f", {p}; number {row.place} of {row.of} components of earlier heads)"
        return f"{told}; {self._clear(i)} channels are above chance, corrected for all of them"

    def _clear(self, i: int) -> str:
        """Of how many single components the score is above chance."""
        assert self.critical is not None
        return f"{int((self._components()[i] > self.critical[i]).sum())} of {int((~self._components()[i].isnan()).sum())}"

    def _told_change(self) -> str:
        rows = self.changes(1)
        if rows.empty or not rows.effect[0]:
            return "no score changed from base to tuned"
        row = rows.iloc[0]
        told = f"{row.effect:+.3g} is the largest change of a score, {row.channel} from {row.base:.3g} to {row.tuned:.3g}"
        if self.component is None:
            return f"{told} ({self.expected:.3g} expected of random directions)"
        told += f" (what is written has the cosine {row.cosine:.2g}; {self.expected:.3g} expected of random directions)"
        counts = " and ".join(f"{self._clear(i)} channels in {side}" for i, side in enumerate(self.sides))
        return f"{told}; above chance are {counts}"

    def plot(self) -> go.Figure:
        """The network of the strongest channels."""
        return self.network()

    def network(self, n: int = _DRAWN, *, side: str | None = None) -> go.Figure:
        """The ``n`` strongest channels as a graph: layers from bottom to top, edges as wide as their score, with the components' numbers.

        Args:
            n: channels.
            side: which model; by default the tuned or only one.

        Raises:
            InputError: no such model.
        """
        scores: dict[Site | Edge, float] = {}
        parts: dict[Edge, list[str]] = {}
        ends: dict[Site, None] = {}
        for row in self.top(n, side=side).to_dict("records"):
            sender, _, receiver = row["channel"].partition(" -> ")
            head, _, component = sender.partition(".")
            reader, _, reading = receiver.partition(" for ")
            edge = Edge.parse(f"{head}.z -> {reader}")
            scores[edge] = max(scores.get(edge, 0.0), row["score"])
            parts.setdefault(edge, []).append(component)
            ends |= dict.fromkeys(Site.parse(f"{name}.z") for name in (head, reading or reader.partition(".")[0]))
        edges = [part for part in scores if isinstance(part, Edge)]
        # A few characters stand on an edge; there may be more components than that.
        told = {edge: ", ".join(dict.fromkeys(p for p in some if p)) for edge, some in parts.items()}
        labels = {edge: text if len(text) <= _WIDE else f"{text[:_WIDE].rpartition(',')[0]}, ..." for edge, text in told.items() if text}
        numbers = "" if self.component is None else " (numbers: components of the sender)"
        of = f", {self.sides[self._side(side)]}" if len(self.sides) > 1 else ""
        title = f"Strongest channels by {_SAID[self.kind]} composition{of}{numbers}"
        return plots.layered_graph(Circuit(self.model, tuple(ends), tuple(edges), scores=scores), title, labels)

    def figures(self) -> dict[str, go.Figure]:
        """Networks of the strongest channels, and scores of every sender in every receiver; of a pair also the change."""
        made = {_with("Strongest channels", side, self.sides): self.network(side=side) for side in reversed(self.sides)}
        maps = {"whole matrices": (self.score, None)}
        if self.component is not None and self.critical is not None:
            best, _ = self._best()
            maps = {"strongest component": (best, best <= self.critical[:, None].to(best))} | maps
        for what, (values, grey) in maps.items():
            if len(self.sides) == 2:
                made[f"{what}, {_CHANGE}"] = self._map(values[1] - values[0], what, _CHANGE)
            for i, side in reversed(list(enumerate(self.sides))):
                made[_with(what.capitalize(), side, self.sides)] = self._map(values[i], what, side, None if grey is None else grey[i])
        return made

    def _map(self, values: Tensor, what: str, side: str, grey: Tensor | None = None) -> go.Figure:
        of = f", {side}" if len(self.sides) > 1 else ""
        floor = "; grey: not above chance, corrected for all" if grey is not None else ""
        return plots.heatmap(
            values,
            self.labels["receiver"],
            self.labels["sender"],
            title=f"{_SAID[self.kind].capitalize()} composition, {what}{of} (random: {self.expected:.2g}{floor})",
            xlabel="receiver",
            ylabel="sender",
            unit="composition score",
            floor=grey,
            difference=side == _CHANGE,
        )


_FURTHER = ["p_adjusted", "place", "of", "energy"]


def _with(what: str, side: str, sides: Sequence[str]) -> str:
    return what if len(sides) == 1 else f"{what}, {side}"


def _first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _kept(values: Tensor, senders: list[int], receivers: list[int]) -> Tensor:
    """NaN for senders (first axis) and receivers (last axis) that were not asked for."""
    kept = torch.full_like(values, torch.nan)
    kept[senders] = values[senders]
    out = torch.full_like(values, torch.nan)
    out[..., receivers] = kept[..., receivers]
    return out


def _largest(values: Tensor, n: int) -> list[tuple[int, ...]]:
    """Cells with the largest values, largest first; without NaN."""
    flat = values.flatten()
    count = min(n, int((~flat.isnan()).sum()))
    order = flat.nan_to_num(-math.inf).topk(count).indices
    return [tuple(int(i) for i in cell) for cell in zip(*torch.unravel_index(order, values.shape), strict=True)]


@analysis(version=2)
def composition(
    model: HookedModel | ModelPair,
    *,
    kind: Literal["q", "k", "v"] = "q",
    level: Literal["head", "component"] = "component",
    senders: str | Heads | None = None,
    receivers: str | Heads | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> CompositionResult:
    """Which heads can talk to which, and did fine-tuning change it, by their weights alone?

    The score of a sender X = OV and a receiver Y in a later layer is ``|X Y|_F / (|X|_F |Y|_F)``: Y is QK for what becomes its queries,
    QK^T for its keys, OV for its values (Elhage et al. 2021). Component i of the sender, which writes along the unit vector v_i, has
    ``|v_i Y| / |Y|_F``: one narrow channel among many components is diluted in the score of the whole (Merullo, Eickhoff & Pavlick 2024,
    arXiv 2406.09519, "Talking Heads"). Norm gains are folded in, and what norms that subtract the mean take away is left out. Biases and
    what MLPs do in between are outside.

    Heads are query heads, as everywhere: each has a score of its own, from its own QK or OV. Where several share keys and values, the
    channel is named by what reads the stream, ``L1H5.0 -> L3H0.v for L3H2``: the values of key/value head 0 of layer 3, as the receivers
    of ``channel_edit`` count them, judged by what query head 2 makes of them. A change for that receiver is read by all of its group.

    Chance is that of directions turned at random against the same receiver: z from exact moments, p of components computed, p of whole
    matrices from draws. Trained heads share directions for many reasons, so the place among all components of earlier heads says
    more than a small p.

    A pair is compared head by head; components of base with those of tuned that write most alike.

    Args:
        model: one model, or a pair to compare.
        kind: what the receiver makes of what it reads: ``q`` queries, ``k`` keys, ``v`` values.
        level: ``component`` for whole matrices and every component of the senders, ``head`` for whole matrices only.
        senders: only these heads, ``L1H2,L2H0``; by default all that have a later layer.
        receivers: only these heads (query heads, for keys and values too); by default all that have an earlier layer.
        draws: random turns for p of whole matrices.
        seed: of the turns.

    Raises:
        InputError: a head that the model does not have; a receiver that is in no later layer than any sender, or the other way round; a
            model of one layer.
    """
    if kind not in _SAID:
        raise unknown("kind of composition", kind, _SAID)
    if level not in ("head", "component"):
        raise InputError(f"level is 'head' or 'component', not {level!r}")
    if type(draws) is not int or draws < 1:
        raise InputError(f"draws is a whole number, at least 1, but it is {draws!r}")
    sides = tuple(model.sides())
    sending, reading = ends(model.shape, senders, receivers)
    found = [composed(m, kind, sending, reading, draws=draws, seed=seed) for _, m in sides]
    dims = directions(sides[0][1])
    match = matched(*found) if len(found) == 2 and level == "component" else (None, None)
    single = level == "component"
    told = [outside(m, "ov" if kind == "v" else "qk") for _, m in sides]
    return CompositionResult(
        score=torch.stack([f.score for f in found]),
        p=torch.stack([f.p for f in found]),
        component=torch.stack([f.component for f in found]).float() if single else None,
        place=torch.stack([f.place for f in found]) if single else None,
        rivals=torch.stack([f.rivals for f in found]),
        critical=torch.stack([_critical(f, dims) for f in found]) if single else None,
        strength=torch.stack([f.strength for f in found]),
        reads=torch.stack([f.reads for f in found]),
        match=match[0],
        match_cosine=match[1],
        kind=kind,
        dims=dims,
        model=(model.shape.n_layers, model.shape.n_heads, model.shape.n_kv_heads),
        draw_seed=seed,
        notes=tuple(dict.fromkeys(note for notes in told for note in notes)),
        labels={"side": tuple(side for side, _ in sides), "sender": _labels(sending), "receiver": _labels(reading)},
    )


def _critical(found: Composed, dims: int) -> Float[Tensor, " receiver"]:
    """The component score of each receiver that chance exceeds nowhere in the whole table with probability 95 %."""
    return critical(LEVEL / max(1, int((~found.component.isnan()).sum())), found.reads, dims).sqrt()


def _labels(heads: Sequence[Head]) -> tuple[str, ...]:
    return tuple(f"L{layer}H{head}" for layer, head in heads)
