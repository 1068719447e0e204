"""What does every attention head read and write, and which heads did tuning turn?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import linalg, plots
from interp.errors import InputError
from interp.linalg import SVD
from interp.models import weights
from interp.models.component_tokens import ENDS, component_tokens
from interp.models.heads import HeadCircuit, folded_heads, outside
from interp.models.turned import comparison, random_components, spectral_change
from interp.names import unknown
from interp.progress import progress
from interp.results import Result, analysis

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

NEAR = 1e-3
"""Neighbouring singular values that differ by less, as a share of the first, leave open which directions belong to them."""
LEVEL = 0.05
_SHOWN_TOKENS, _SHOWN_SPECTRA = 5, 3


@dataclass(frozen=True, eq=False)
class HeadSVDResult(Result):
    """Heads taken apart: component i of a head reads along one unit vector and writes along another, with a strength.

    For QK what is read is the query's side, and what is "written" is what the head looks for in keys.

    Attributes:
        spectrum: strengths (singular values) of all components, strongest first.
        effective_rank: exp of the entropy of the strengths (Roy & Vetterli 2007).
        random_rank: the same for heads of these sizes whose weights are Gaussian noise.
        read_tokens: tokens whose embeddings lie most along what a component reads; a direction has two ends, + and -. -1 for a component
            of strength 0.
        read_scores: their cosines.
        write_tokens: tokens whose logits a unit of what a component writes raises (+) or lowers (-) most; for QK as ``read_tokens``.
        write_scores: by how much, before the final norm's division; for QK cosines.
        change: ||tuned - base|| / ||base|| of every head's matrix; None for one model, as all that follow.
        read_angles: principal angles, in radians, between what the ``rank`` strongest components read in base and in tuned.
            NaN beyond the components that a head has.
        write_angles: the same for what they write.
        read_turn: share of tuned's strength (squared, of its ``rank`` strongest components) that reads outside the subspace that base's
            read: 0 the same, 1 orthogonal.
        write_turn: the same for what they write.
        matched: of tuned's strongest components, the one of base that fits best.
        match_cosine: of the two, |cos of what they read| * |cos of what they write|.
        noise_read_turn: ``read_turn`` after a random change of base, in each head's factors as large as tuning's.
        noise_write_turn: the same of ``write_turn``.
        noise_match_cosine: the same of ``match_cosine``, of a few of them.
        noise_spectral_change: the same of ``spectral_change``.
        circuit: "ov" or "qk".
        token_text: text of the tokens named here.
        notes: what no such matrix holds.
        labels: of ``side`` and ``end``.
    """

    spectrum: Float[Tensor, "side layer head rank"]
    effective_rank: Float[Tensor, "side layer head"]
    random_rank: Float[Tensor, " draw"]
    read_tokens: Int[Tensor, "side layer head component end token"]
    read_scores: Float[Tensor, "side layer head component end token"]
    write_tokens: Int[Tensor, "side layer head component end token"]
    write_scores: Float[Tensor, "side layer head component end token"]
    change: Float[Tensor, "layer head"] | None
    read_angles: Float[Tensor, "layer head component"] | None
    write_angles: Float[Tensor, "layer head component"] | None
    read_turn: Float[Tensor, "layer head"] | None
    write_turn: Float[Tensor, "layer head"] | None
    matched: Int[Tensor, "layer head component"] | None
    match_cosine: Float[Tensor, "layer head component"] | None
    noise_read_turn: Float[Tensor, "draw layer head"] | None
    noise_write_turn: Float[Tensor, "draw layer head"] | None
    noise_match_cosine: Float[Tensor, "few layer head component"] | None
    noise_spectral_change: Float[Tensor, "draw layer head"] | None
    circuit: str
    token_text: dict[int, str]
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def rank(self) -> int:
        """How many components have tokens and make the subspaces."""
        return self.read_tokens.shape[3]

    def _side(self, side: str | None) -> int:
        if side is not None and side not in self.sides:
            raise InputError(f"there is no model {side!r} in this result; it has {', '.join(self.sides)}")
        return len(self.sides) - 1 if side is None else self.sides.index(side)

    # ---- which directions are identified

    @property
    def near(self) -> Tensor:
        """Whether a strength is nearly the next one's, [side layer head rank - 1]: the directions of the two may turn into each other."""
        return self.spectrum[..., :-1] - self.spectrum[..., 1:] <= NEAR * self.spectrum[..., :1]

    @property
    def identified(self) -> Tensor:
        """Whether a component's directions are its own, [side layer head rank]; otherwise only the span of its neighbours is."""
        pad = torch.nn.functional.pad(self.near, (1, 1))
        return ~(pad[..., 1:] | pad[..., :-1])

    def spans(self, layer: int, head: int, side: str | None = None) -> tuple[tuple[int, int], ...]:
        """(first, last) of components with nearly equal strengths: single directions in such a span are not identified.

        Raises:
            InputError: no such model, or head.
        """
        layers, heads = self.spectrum.shape[1:3]
        if not (0 <= layer < layers and 0 <= head < heads):
            raise InputError(f"L{layer}H{head} is none of the {layers} x {heads} heads of this result")
        near, found, i = self.near[self._side(side), layer, head].tolist(), [], 0
        while i < len(near):
            last = next((j for j in range(i, len(near)) if not near[j]), len(near))
            if last > i:
                found.append((i, last))
            i = last + 1
        return tuple(found)

    # ---- what tuning turned

    @property
    def read_overlap(self) -> Float[Tensor, "layer head"] | None:
        """Mean squared cosine of ``read_angles``: 1 where the same is read."""
        return None if self.read_angles is None else linalg.subspace_overlap(self.read_angles)

    @property
    def write_overlap(self) -> Float[Tensor, "layer head"] | None:
        """Mean squared cosine of ``write_angles``: 1 where the same is written."""
        return None if self.write_angles is None else linalg.subspace_overlap(self.write_angles)

    @property
    def turn(self) -> Float[Tensor, "layer head"] | None:
        """Mean of ``read_turn`` and ``write_turn``: 0 where a head reads and writes in the same subspaces, 1 where in orthogonal ones."""
        return None if self.read_turn is None or self.write_turn is None else (self.read_turn + self.write_turn) / 2

    @property
    def noise_turn(self) -> Float[Tensor, "draw layer head"] | None:
        """``turn`` after random changes of the same size."""
        return None if self.noise_read_turn is None or self.noise_write_turn is None else (self.noise_read_turn + self.noise_write_turn) / 2

    @property
    def spectral_change(self) -> Float[Tensor, "layer head"] | None:
        """Length of the change of the strengths, as a share of their length in base."""
        return spectral_change(self.spectrum[0], self.spectrum[1]) if len(self.spectrum) == 2 else None

    @property
    def z(self) -> Float[Tensor, "layer head"] | None:
        """How far ``turn`` is above random changes' in standard deviations, both as logarithms; 0 for a head that did not change.

        A size, not a test: ``p`` counts.
        """
        if self.turn is None or self.noise_turn is None or self.change is None:
            return None
        noise = _log(self.noise_turn)
        above = _log(self.turn) - noise.mean(0)
        same = (self.change == 0) | (above == 0)
        return torch.where(same, 0.0, above / (noise.std(0) * math.sqrt(1 + 1 / len(noise))))

    @property
    def p(self) -> Float[Tensor, "layer head"] | None:
        """Share of random changes that turn a head as far, tuning itself counted in (one-sided); NaN without components."""
        if self.turn is None or self.noise_turn is None:
            return None
        above = (self.noise_turn >= self.turn).sum(0).double()
        return ((1 + above) / (1 + len(self.noise_turn))).masked_fill(self.turn.isnan(), torch.nan)

    @property
    def p_adjusted(self) -> Float[Tensor, "layer head"] | None:
        """Share of random changes in which any head is turned as far beyond its own average, tuning counted in; 1 for heads unchanged.

        Every head is put in standard deviations of its own logarithms, over the draws and tuning together, so that if tuning were one
        more draw no p of all heads would be below 0.05 in more than 5 % of cases.
        """
        if self.turn is None or self.noise_turn is None or self.change is None:
            return None
        every = torch.cat([self.turn[None], self.noise_turn])
        every = torch.where((self.change > 0) & ~self.turn.isnan(), _log(every), 0.0)
        above = every - every.mean(0)
        z = torch.where(above == 0, 0.0, above / every.std(0))
        furthest = z[1:].flatten(1).amax(1)
        found = (1 + (furthest[:, None, None] >= z[0]).sum(0).double()) / (1 + len(furthest))
        return found.masked_fill(self.turn.isnan(), torch.nan).masked_fill(self.change == 0, 1.0)

    @property
    def turned(self) -> list[tuple[int, int]]:
        """(layer, head) of those turned further than random changes turn them (``p_adjusted`` <= 0.05), furthest first."""
        return [] if self.p_adjusted is None else [cell for cell in self._by_turn() if float(self.p_adjusted[cell]) <= LEVEL]

    def _by_turn(self) -> list[tuple[int, int]]:
        """Heads that changed, furthest turned first."""
        if self.turn is None or self.change is None:
            return []
        order = self.turn.nan_to_num(-1.0).flatten().argsort(descending=True, stable=True).tolist()
        return [cell for i in order if float(self.change[cell := divmod(i, self.turn.shape[1])]) > 0]

    # ---- what a reader sees

    def summary(self) -> str:
        """One sentence: how many heads tuning turned beyond noise and which most; of one model the effective ranks."""
        matrix, (layers, heads, size) = self.circuit.upper(), self.spectrum.shape[1:]
        near = int((~self.identified[..., : self.rank]).any(-1).sum())
        words = "heads some of these are nearly as strong as others, so that only their span is identified"
        close = f"; in {near} of {len(self.sides) * layers * heads} {words}" * bool(near)
        end = "".join([close, *(f"; {note}" for note in self.notes)]) + "."
        if self.turn is None:
            return f"{matrix} of {layers * heads} heads: {self._ranks(0)} of {size}, {self._random()}; {self.rank} components of each{end}"
        assert self.change is not None and self.noise_turn is not None
        if not bool((self.change > 0).any()):
            return f"0 of {layers * heads} heads turned: {matrix} of every head is the same in base and tuned; {self._random()}{end}"
        found, turn = self.turned, self.turn.nan_to_num(-1.0)
        top = found[0] if found else divmod(int(turn.argmax()), heads)
        noise = self.noise_turn[(slice(None), *top)]
        beside = f"{float(noise.mean()):.2g} +- {float(noise.std()):.1g} for random changes of that size"
        most = f"{_head(*top)} by {float(turn[top]):.2g} (0 same, 1 orthogonal; {beside}; {matrix} changed by {_percent(self.change[top])})"
        count = f"{len(found)} of {layers * heads} heads turned further than chance"
        rest = f"{self.rank} strongest components, {len(noise)} draws, {int((self.change > 0).sum())} heads changed"
        rest += "; no p can be that small with so few draws" * (1 / (1 + len(noise)) > LEVEL)
        return f"{count} (p <= {LEVEL:g} over all heads), {'most' if found else 'the first being'} {most}; {rest}{end}"

    def _ranks(self, side: int) -> str:
        ranks = self.effective_rank[side]
        cell = divmod(int(ranks.argmin()), ranks.shape[1])
        return f"effective rank {float(ranks.mean()):.3g} on average, lowest in {_head(*cell)} with {float(ranks[cell]):.3g},"

    def _random(self) -> str:
        return f"{float(self.random_rank.mean()):.3g} +- {float(self.random_rank.std()):.1g} for random weights"

    def tokens(self, layer: int, head: int, component: int, *, side: str | None = None, n: int = _SHOWN_TOKENS) -> dict[str, str]:
        """The tokens at both ends of what a component reads and writes: ``reads +``, ``reads -``, ``writes +``, ``writes -``.

        Raises:
            InputError: no such model or component.
        """
        at = (self._side(side), layer, head, component)
        if not all(0 <= i < size for i, size in zip(at, self.read_tokens.shape, strict=False)):
            raise InputError(f"{_head(layer, head)}.{component} is none of the {self.rank} strongest components of a head of this result")
        both = {"reads": self.read_tokens, "writes": self.write_tokens}
        return {f"{way} {end}": self._texts(ids[at][i, :n]) for way, ids in both.items() for i, end in enumerate(ENDS)}

    def _texts(self, ids: Tensor) -> str:
        return " ".join(repr(self.token_text.get(i, str(i))) for i in ids.tolist() if i >= 0)

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per component and model: strength, whether its directions are identified, tokens of the strongest.

        Raises:
            InputError: ``per`` is given; nothing here is per prompt.
        """
        table = super().to_frame(per)
        table["identified"] = self.identified.flatten().numpy()
        cells = list(zip(*(table[axis] for axis in ("layer", "head", "rank", "side")), strict=True))
        table.insert(0, "site", [f"{_head(layer, head)}.{i}" for layer, head, i, _ in cells])
        for name in ("turn", "z", "p_adjusted") if self.turn is not None else ():
            table[name] = getattr(self, name)[None, ..., None].expand(self.spectrum.shape).flatten().numpy()
        told = [self.tokens(layer, head, i, side=side) if i < self.rank else {} for layer, head, i, side in cells]
        for column in told[0]:
            table[column] = [texts.get(column, "") for texts in told]
        return table

    def strongest(self, n: int = 10) -> pd.DataFrame | None:
        """For a pair the heads that tuning turned and towards which tokens; of one model the strongest components.

        Heads turned beyond noise come first, furthest first, then the others. ``towards`` is the one of tuned's strongest components that
        is furthest from its partner in base.
        """
        import pandas as pd

        rows = self._components(n) if self.turn is None else self._turned(n)
        return pd.DataFrame(rows) if rows else None

    def _components(self, n: int) -> list[dict[str, object]]:
        strength, size = self.spectrum[0, ..., : self.rank], self.spectrum.shape
        order = strength.flatten().argsort(descending=True, stable=True)[:n].tolist()
        rows = []
        for i in order:
            cell = (i // (self.rank * size[2]), i // self.rank % size[2], i % self.rank)
            share = float(strength[cell] ** 2 / self.spectrum[0, cell[0], cell[1]].square().sum())
            span = next((f"{a}-{b}" for a, b in self.spans(*cell[:2]) if a <= cell[2] <= b), "")
            numbers = {"strength": float(strength[cell]), "share": share, "span": span}
            rows.append({"site": f"{_head(*cell[:2])}.{cell[2]}", **numbers, **self.tokens(*cell)})
        return rows

    def _turned(self, n: int) -> list[dict[str, object]]:
        assert self.turn is not None and self.noise_turn is not None and self.change is not None
        assert self.match_cosine is not None and self.noise_match_cosine is not None and self.matched is not None
        noise, deviation = self.noise_turn.mean(0), self.noise_turn.std(0)
        order = self.turned + [cell for cell in self._by_turn() if cell not in self.turned]
        numbers = {"turn": self.turn, "by_chance": noise, "deviation": deviation, "z": self.z, "p": self.p, "p_adjusted": self.p_adjusted}
        numbers |= {"change": self.change, "spectral_change": self.spectral_change}
        numbers |= {"read_overlap": self.read_overlap, "write_overlap": self.write_overlap}
        rows = []
        for cell in order[:n]:
            moved = int(self.match_cosine[cell].nan_to_num(2.0).argmin())
            at = (*cell, moved)
            partner = {
                "towards": f"{_head(*cell)}.{moved}",
                "base_component": int(self.matched[at]),
                "cosine": float(self.match_cosine[at]),
            }
            partner |= {"cosine_by_chance": float(self.noise_match_cosine[:, *at].nanmean()), "identified": bool(self.identified[1][at])}
            values = {name: float(x[cell]) for name, x in numbers.items() if x is not None}
            rows.append({"site": _head(*cell), **values, **partner, **self.tokens(*at)})
        return rows

    def plot(self) -> go.Figure:
        """For a pair how far every head turned, grey where noise explains it; else effective ranks."""
        matrix = self.circuit.upper()
        if self.turn is None or self.p_adjusted is None:
            return plots.heatmap(
                self.effective_rank[0],
                title=f"Effective rank of {matrix} (random weights {float(self.random_rank.mean()):.3g})",
                xlabel="head",
                ylabel="layer",
                unit=f"effective rank, of {self.spectrum.shape[-1]}",
                difference=False,
                limits=(float(self.effective_rank.min()), max(float(self.effective_rank.max()), float(self.effective_rank.min()) + 1e-3)),
            )
        return plots.heatmap(
            self.turn,
            title=f"How far tuning turned what {matrix} of each head reads and writes",
            xlabel="head",
            ylabel="layer",
            unit=f"share of the {self.rank} strongest components' strength that left base's subspaces; floor: random changes of that size",
            floor=(~(self.p_adjusted <= LEVEL)).numpy(),
            difference=False,
        )

    def figures(self) -> dict[str, go.Figure]:
        """Turned heads, change of strengths and spectra; of one model effective ranks and spectra."""
        made = {"Heads that tuning turned" if self.turn is not None else "Effective rank of heads": self.plot()}
        if self.spectral_change is not None and self.noise_spectral_change is not None:
            made["Change of strengths"] = plots.heatmap(
                100 * self.spectral_change,
                title=f"Change of the strengths of {self.circuit.upper()}",
                xlabel="head",
                ylabel="layer",
                unit="% of their length; floor: the largest of the random changes",
                floor=(self.spectral_change <= self.noise_spectral_change.amax(0)).numpy(),
                difference=False,
            )
        made["Strengths of components"] = self._spectra()
        return made

    def _spectra(self) -> go.Figure:
        heads = self.spectrum.shape[2]
        if self.turn is None:
            order = self.effective_rank[0].flatten().argsort().tolist()
            cells = [divmod(i, heads) for i in dict.fromkeys((*order[:_SHOWN_SPECTRA], *order[-_SHOWN_SPECTRA:]))]
            title, series = "Heads of lowest and highest effective rank", {_head(*cell): self.spectrum[0][cell] for cell in cells}
        else:
            cell = (self.turned or [divmod(int(self.turn.nan_to_num(-1.0).argmax()), heads)])[0]
            title, series = f"Strengths of {_head(*cell)}", {side: self.spectrum[i][cell] for i, side in enumerate(self.sides)}
        return plots.lines(series, title=title, xlabel="component, from 0", ylabel=f"singular value of {self.circuit.upper()}")


def _log(turn: Tensor) -> Tensor:
    """Logarithms; of 0 that of the smallest number."""
    return turn.clamp_min(torch.finfo(torch.float64).tiny).log()


def _head(layer: int, head: int) -> str:
    return f"L{layer}H{head}"


def _percent(x: Tensor) -> str:
    value = 100 * float(x)
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


@analysis(version=2)
def head_svd(
    model: HookedModel | ModelPair, *, circuit: Literal["ov", "qk"] = "ov", rank: int = 4, tokens: int = 8, draws: int = 99, seed: int = 0
) -> HeadSVDResult:
    """What does every attention head read and write, and which heads did tuning turn?

    Takes OV = W_V W_O (what a head moves) or QK = W_Q W_K^T (what it looks for) of every head apart by SVD, after Merullo, Eickhoff &
    Pavlick 2024, arXiv 2406.09519. The gain of the norm in front is multiplied in; where norms subtract the mean, so do the matrices.
    No d_model x d_model matrix is formed: QR of both factors, SVD of the small core, in float64, layer by layer. Signs: the largest entry
    of what a component writes is positive. Components are named by tokens: those whose embedding it would read alone, and those whose
    logits it would raise or lower directly; what blocks in between make of them is not seen.

    For a pair, the subspaces of the ``rank`` strongest components are compared by principal angles, and components are matched one to
    one. A head has turned by the share of its strength (squared, of tuned's ``rank`` strongest components) that reads and writes outside
    base's subspaces. Beside all this stands what random changes of base do: Gaussian in the weights as they are stored, and as large in
    each head's factors as tuning's. A head counts as turned where tuning turned it further than 95 % of those turn any head, each head
    measured against its own; 19 draws are the fewest that can show that.

    Args:
        model: one model, or a pair.
        circuit: "ov" or "qk".
        rank: how many of the strongest components are named, and span the compared subspaces.
        tokens: how many tokens at each end of a direction.
        draws: random changes of base for a pair; random heads for one model.
        seed: of the random changes and heads.

    Raises:
        InputError: an unknown circuit, a rank beyond the heads', or weights that are not known by site.
    """
    shape = model.shape
    if circuit not in get_args(HeadCircuit):
        raise unknown("circuit", circuit, get_args(HeadCircuit))
    size = min(shape.d_head, shape.d_model)
    for name, value in (("rank", rank), ("tokens", tokens), ("draws", draws)):
        if type(value) is not int:
            raise InputError(f"{name} is a whole number, but it is {value!r}")
    if not 1 <= rank <= size:
        raise InputError(f"rank is {rank}, but heads of {model.name} have {size} components; give 1 to {size}")
    vocabulary = getattr(model, "shared_vocab", shape.d_vocab)
    if not 1 <= tokens <= vocabulary:
        raise InputError(f"tokens is {tokens}, but {model.name} knows {vocabulary}; give 1 to {vocabulary}")
    if draws < 2:
        raise InputError(f"draws is {draws}, but a spread needs at least 2")
    sides, centred = tuple(model.sides()), weights.centred(shape)
    strongest, compared = [], []
    for layer in progress(range(shape.n_layers), "heads", unit="layer"):
        folded = [folded_heads(m, layer) for _, m in sides]
        found = [heads.components(circuit) for heads in folded]
        strongest.append([_strongest(components, rank) for components in found])
        if len(sides) == 2:
            (base, tuned), (old, new) = folded, found
            compared.append(comparison(base, tuned, old, new, circuit, rank, centred=centred, seed=seed, draws=draws))
    spectrum = torch.stack([torch.stack([found.S for found in of]) for of in zip(*strongest, strict=True)])
    named = [component_tokens(m, of, circuit, tokens, vocabulary) for (_, m), of in zip(sides, zip(*strongest, strict=True), strict=True)]
    ids = torch.cat([x[key].flatten() for x in named for key in ("read_tokens", "write_tokens")]).unique().tolist()
    random = [random_components(folded_heads(sides[0][1], 0), circuit, centred=centred, seed=seed, draw=i).S for i in range(draws)]
    tuning = _stacked(compared) if compared else {}
    return HeadSVDResult(
        spectrum=spectrum,
        effective_rank=_ranks(spectrum),
        random_rank=_ranks(torch.cat(random)),
        **{key: torch.stack([x[key] for x in named]) for key in named[0]},  # pyright: ignore[reportArgumentType]
        **{key: tuning.get(key) for key in _TUNING},
        circuit=circuit,
        token_text=_texts(model, [i for i in ids if i >= 0]),
        notes=_notes(sides, circuit),
        labels={"side": tuple(side for side, _ in sides), "end": ENDS},
    )


def _ranks(strengths: Tensor) -> Tensor:
    """Effective rank over the last axis."""
    each = [linalg.effective_rank(s) for s in strengths.flatten(0, -2)]
    return torch.tensor(each, dtype=torch.float64).reshape(strengths.shape[:-1])


_TUNING = ("change", "read_angles", "write_angles", "read_turn", "write_turn", "matched", "match_cosine")
_TUNING += ("noise_read_turn", "noise_write_turn", "noise_match_cosine", "noise_spectral_change")


def _strongest(found: SVD, rank: int) -> SVD:
    """All strengths, and the vectors of the strongest in float32."""
    return SVD(found.U[..., :rank].float(), found.S, found.Vh[:, :rank].float())


def _stacked(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over layers; the axis of draws stays in front."""
    return {key: torch.stack([x[key] for x in layers], dim=int(key.startswith("noise_"))) for key in layers[0]}


def _notes(sides: tuple[tuple[str, HookedModel], ...], circuit: HeadCircuit) -> tuple[str, ...]:
    """What lies outside the matrices; with the model's name where it holds for one of two."""
    told = [(side, note) for side, m in sides for note in outside(m, circuit)]
    notes = [note for _, note in told]
    return tuple(dict.fromkeys(note if notes.count(note) == len(sides) else f"{side}: {note}" for side, note in told))


def _texts(model: HookedModel | ModelPair, ids: list[int]) -> dict[int, str]:
    """Texts of tokens; ids stand alone for a model without a tokenizer."""
    try:
        return dict(zip(ids, model.token_strings(ids), strict=True))
    except InputError:
        return {}
