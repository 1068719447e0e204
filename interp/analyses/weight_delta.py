"""Where in the weights, and how: the size, rank and place of the change that tuning made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp import linalg, plots
from interp.errors import InputError
from interp.models import weights
from interp.models.changes import AT_FLOOR, Change, changes, unmatched
from interp.results import Result, analysis
from interp.sites import Site
from interp.stats import Estimate, single

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.models import ModelPair

PROJECTIONS = ("W_Q", "W_K", "W_V", "W_O")
_SHOWN_TOKENS = 20
_SHOWN_SPECTRA = 6
_EXACT_BASIS = 256  # smaller side up to which the base's leading subspace comes from a whole SVD


@dataclass(frozen=True, eq=False)
class WeightDeltaResult(Result):
    """The change tau = tuned - base of every weight; labels["weight"] are sites ("L3.W_Q"), matrices act as x @ W.

    NaN where a number makes no sense: spectra of vectors, shares of a zero change, ranks that a cut-off spectrum hides.

    Attributes:
        relative: ||tau|| / ||W_base||, Frobenius norms.
        floor: relative change that rounding to the coarser stored dtype makes by itself; 0 for an adapter.
        under_floor: the change is at most 1.5 times the floor, so rounding explains it.
        change: ||tau||.
        base_norm: ||W_base||.
        largest: largest |entry| of tau.
        changed: share of entries that differ.
        cosine: of W_base and W_tuned as vectors.
        spectral_ratio: ||tau||_2 / ||W_base||_2, largest singular values.
        stable_rank: ||tau||_F^2 / ||tau||_2^2.
        effective_rank: exp of the entropy of tau's singular values (Roy & Vetterli 2007).
        rank90: components of tau that hold 90 % of ||tau||^2.
        numerical_rank: components of tau above rounding.
        kurtosis: of tau's entries; 3 for a Gaussian.
        read_share: share of ||tau||^2 that reads from the ``rank`` strongest input directions (left singular vectors) of W_base.
        read_chance: the same for a random tau, rank / rows.
        write_share: share of ||tau||^2 that writes to the ``rank`` strongest output directions of W_base.
        write_chance: the same for a random tau, rank / columns.
        exact: the whole spectrum was computed; else only the leading components, by randomised iteration.
        head_change: ||tau|| of each head's slice; key/value heads for W_K and W_V, NaN beyond their number. None without sites.
        head_base: ||W_base|| of each head's slice.
        head_floor: the rounding floor of each head's ||tau||, absolute.
        neuron_change: ||tau|| of each MLP neuron's weights: its columns of W_in and W_gate and its row of W_out. None without sites.
        neuron_base: ||W_base|| of each neuron's weights.
        embedding_change: ||tau|| of each token's row of W_E.
        embedding_base: ||W_base|| of each token's row of W_E.
        unembedding_change: ||tau|| of each token's column of W_U; None if tied.
        unembedding_base: ||W_base|| of each token's column of W_U.
        spectra: name of the weight -> leading singular values of tau.
        base_top: name of the weight -> largest singular value of W_base.
        token_text: text of the tokens that moved most.
        dtype: the coarser stored dtype.
        only: tensors that only one side has: "base: name", "tuned: name".
        guaranteed: False for an architecture whose tensor names are not known; then rows are raw tensors as stored.
        layers: number of layers.
        labels: of the axes weight and projection.
    """

    relative: Float[Tensor, " weight"]
    floor: Float[Tensor, " weight"]
    under_floor: Bool[Tensor, " weight"]
    change: Float[Tensor, " weight"]
    base_norm: Float[Tensor, " weight"]
    largest: Float[Tensor, " weight"]
    changed: Float[Tensor, " weight"]
    cosine: Float[Tensor, " weight"]
    spectral_ratio: Float[Tensor, " weight"]
    stable_rank: Float[Tensor, " weight"]
    effective_rank: Float[Tensor, " weight"]
    rank90: Float[Tensor, " weight"]
    numerical_rank: Float[Tensor, " weight"]
    kurtosis: Float[Tensor, " weight"]
    read_share: Float[Tensor, " weight"]
    read_chance: Float[Tensor, " weight"]
    write_share: Float[Tensor, " weight"]
    write_chance: Float[Tensor, " weight"]
    exact: Bool[Tensor, " weight"]
    head_change: Float[Tensor, "projection layer head"] | None
    head_base: Float[Tensor, "projection layer head"] | None
    head_floor: Float[Tensor, "projection layer head"] | None
    neuron_change: Float[Tensor, "layer neuron"] | None
    neuron_base: Float[Tensor, "layer neuron"] | None
    embedding_change: Float[Tensor, " token"] | None
    embedding_base: Float[Tensor, " token"] | None
    unembedding_change: Float[Tensor, " token"] | None
    unembedding_base: Float[Tensor, " token"] | None
    spectra: dict[str, Tensor]
    base_top: dict[str, float]
    token_text: dict[int, str]
    dtype: str
    only: tuple[str, ...]
    guaranteed: bool
    layers: int
    labels: dict[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights, in order."""
        return self.labels["weight"]

    @property
    def total(self) -> float:
        """||tau|| / ||W_base|| over all weights together."""
        return linalg.ratio(linalg.norm(self.change), linalg.norm(self.base_norm))

    @property
    def total_floor(self) -> float:
        """The rounding floor of ``total``."""
        rounding = torch.where(self.base_norm > 0, self.floor * self.base_norm, 0.0)
        return linalg.ratio(linalg.norm(rounding), linalg.norm(self.base_norm))

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """How far all weights moved."""
        return {"weight change, share of the norm": {"tuned": single(self.total)}}

    @property
    def head_relative(self) -> Float[Tensor, "projection layer head"] | None:
        """||tau|| / ||W_base|| per head; under GQA per key/value head for W_K and W_V."""
        return None if self.head_change is None or self.head_base is None else self.head_change / self.head_base

    @property
    def head_under_floor(self) -> Bool[Tensor, "projection layer head"] | None:
        """Heads whose change rounding explains."""
        return None if self.head_change is None or self.head_floor is None else self.head_change <= AT_FLOOR * self.head_floor

    def of(self, name: str | Site) -> dict[str, float]:
        """Every number of one weight, by field.

        Raises:
            InputError: there is no such weight.
        """
        if str(name) not in self.names:
            raise InputError(f"there is no weight {name} here; there are {len(self.names)}, such as {self.names[0]}")
        at = self.names.index(str(name))
        fields = {
            k: v for k, v in vars(self).items() if isinstance(v, Tensor) and v.shape == (len(self.names),) and not k.startswith("embed")
        }
        return {k: float(v[at]) for k, v in fields.items()}

    def summary(self) -> str:
        """One sentence: total relative change, its floor, where it is largest."""
        floor = f"rounding floor {_percent(self.total_floor)}, {self.dtype}"
        if not bool((self.change > 0).any()):
            return f"0 % relative weight change: all {len(self.names)} weights are equal in base and tuned ({floor})."
        where = ""
        matrices = ~self.stable_rank.isnan() & ~self.under_floor & self.relative.isfinite()
        if bool(matrices.any()):
            top = int(torch.where(matrices, self.relative, -1.0).argmax())
            size = f"{_percent(float(self.relative[top]))}, stable rank {float(self.stable_rank[top]):.3g}"
            where = f"; largest in {self.names[top]} ({size})"
        above = f"{int((~self.under_floor).sum())} of {len(self.names)} weights changed more than rounding explains"
        return f"{_percent(self.total)} relative weight change overall ({floor}); {above}{where}."

    def grid(self, values: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """One number per weight as [layer, module], with the names of the modules; matrices of the blocks only."""
        sites = {Site.parse(name): i for i, name in enumerate(self.names)} if self.guaranteed else {}
        present = tuple(m for m in weights.MODULES if any(s.component == m for s in sites))
        cells = [[float(values[sites[s]]) if (s := Site(m, layer)) in sites else math.nan for m in present] for layer in range(self.layers)]
        return torch.tensor(cells, dtype=torch.float64).reshape(self.layers, len(present)), present

    def plot(self) -> go.Figure:
        """Relative change by layer and module; what rounding explains is grey."""
        return self._by_layer(100 * self.relative, "Relative weight change", "||tau|| / ||W_base||, %")

    def figures(self) -> dict[str, go.Figure]:
        """Relative change by module and by head, rank and alignment of the change, spectra, tokens."""
        made = {"Relative change by layer and module": self.plot()}
        if self.head_change is not None:
            made["Relative change by head"] = self._heads()
        if not bool((self.change > 0).any()):
            return made
        if self.guaranteed:
            title = "Stable rank of the change"
            made[title] = self._by_layer(self.stable_rank, title, "||tau||_F^2 / ||tau||_2^2, components")
            made["Does the change read and write where the base does?"] = self._alignment()
        if bool((self.spectral_ratio > 0).any()):
            made["Spectra of the largest changes"] = self._spectra()
        if self.neuron_change is not None and bool((self.neuron_change > 0).any()):
            made["Neurons that moved most"] = self._neurons()
        for name, change, base in (
            ("embedding", self.embedding_change, self.embedding_base),
            ("unembedding", self.unembedding_change, self.unembedding_base),
        ):
            if change is not None and base is not None and bool((change > 0).any()):
                made[f"Tokens whose {name} moved most"] = self._tokens(name, change, base)
        return made

    def _by_layer(self, values: Tensor, title: str, unit: str) -> go.Figure:
        if not self.guaranteed:
            order = values.nan_to_num(-1, posinf=-1).argsort(descending=True)[:40].tolist()
            names = [self.names[i] for i in order]
            return plots.bars(names, {"change": values[order]}, title=title, xlabel="tensor", ylabel=unit, horizontal=True)
        cells, modules = self.grid(values)
        under, _ = self.grid(self.under_floor.double())
        return plots.heatmap(cells, modules, title=title, xlabel="module", ylabel="layer", unit=unit, floor=under > 0, difference=False)

    def _heads(self) -> go.Figure:
        relative, under = self.head_relative, self.head_under_floor
        assert relative is not None and under is not None
        there = [int((~relative[p, 0].isnan()).sum()) for p in range(len(PROJECTIONS))]
        labels = [f"{name} {'kv ' if n < max(there) else ''}head {h}" for name, n in zip(PROJECTIONS, there, strict=True) for h in range(n)]
        cells = torch.cat([relative[p, :, :n] for p, n in enumerate(there)], dim=1)
        grey = torch.cat([under[p, :, :n] for p, n in enumerate(there)], dim=1)
        return plots.heatmap(
            100 * cells,
            labels,
            title="Relative weight change of each head",
            xlabel="projection and head",
            ylabel="layer",
            unit="||tau|| / ||W_base||, %",
            floor=grey,
            difference=False,
        )

    def _alignment(self) -> go.Figure:
        read, modules = self.grid(self.read_share / self.read_chance)
        write, _ = self.grid(self.write_share / self.write_chance)
        under, _ = self.grid(self.under_floor.double())
        cells = torch.stack([read, write], dim=2).flatten(1)
        labels = [f"{m} {side}" for m in modules for side in ("reads", "writes")]
        return plots.heatmap(
            cells.log2(),
            labels,
            title="Energy of the change in the base's leading singular subspaces",
            xlabel="module and side",
            ylabel="layer",
            unit="log2(share / chance); 0 is chance",
            floor=under.repeat_interleave(2, dim=1) > 0,
            difference=True,
        )

    def _spectra(self) -> go.Figure:
        order = torch.where(self.relative.isinf(), -1.0, self.relative).argsort(descending=True).tolist()
        shown = [self.names[i] for i in order if self.names[i] in self.spectra and bool(self.change[i] > 0)][:_SHOWN_SPECTRA]
        longest = max((len(self.spectra[n]) for n in shown), default=1)
        series = {}
        for name in shown:
            s = self.spectra[name] / self.base_top[name] if self.base_top[name] else self.spectra[name]
            series[name] = torch.nn.functional.pad(torch.where(s > 0, s, math.nan), (0, longest - len(s)), value=math.nan)
        made = plots.lines(
            series,
            title="Singular values of the largest changes",
            xlabel="component of the change, from 0",
            ylabel="singular value / largest one of the base",
        )
        return made.update_yaxes(type="log")

    def _neurons(self) -> go.Figure:
        assert self.neuron_change is not None and self.neuron_base is not None
        share = torch.where(self.neuron_base > 0, self.neuron_change / self.neuron_base, 0.0)
        top = share.flatten().argsort(descending=True)[:_SHOWN_TOKENS].tolist()
        labels = [f"layer {i // share.shape[1]}, neuron {i % share.shape[1]}" for i in top]
        title = f"MLP neurons that moved most (median neuron {100 * float(share.median()):.3g} %)"
        return plots.bars(
            labels, {"change": 100 * share.flatten()[top]}, title=title, xlabel="neuron", ylabel="||tau|| / ||W_base||, %", horizontal=True
        )

    def _tokens(self, name: str, change: Tensor, base: Tensor) -> go.Figure:
        share = torch.where(base > 0, change / base, 0.0)
        top = share.argsort(descending=True)[:_SHOWN_TOKENS].tolist()
        labels = [f"{i}: {self.token_text.get(i, '')}" for i in top]
        title = f"Tokens whose {name} moved most (median token {100 * float(share.median()):.3g} %)"
        return plots.bars(
            labels, {"change": 100 * share[top]}, title=title, xlabel="token", ylabel="||tau|| / ||W_base||, %", horizontal=True
        )


@analysis(version=1)
def weight_delta(pair: ModelPair, *, rank: int = 16, exact: int = 1024, components: int = 64, seed: int = 0) -> WeightDeltaResult:
    """Which weights did tuning change, by how much, and with what structure?

    Goes through the checkpoints tensor by tensor without building a model: subtracts in float32, takes norms in float64.
    An adapter (LoRA) is analysed from its factors, and its floor is 0. Small changes are compared with what rounding to the
    stored dtype does: storing Gaussian weights in bfloat16 already changes them by 0.17 %.

    Args:
        pair: base and tuned.
        rank: number of leading singular directions of the base that a change's energy is compared with.
        exact: matrices whose smaller side is at most this get their whole spectrum; larger ones their leading
            components by randomised subspace iteration (Halko, Martinsson & Tropp 2011), so effective_rank is NaN there.
        components: how many singular values are kept, and computed for large matrices.
        seed: of the randomised iteration.

    Raises:
        InputError: the checkpoints are quantised, or a tensor has another shape in tuned.
    """
    for name, value in (("rank", rank), ("exact", exact), ("components", components)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, but it is {value}")
    shape, guaranteed = pair.shape, weights.known(pair.shape)
    rows: list[dict[str, float]] = []
    names: list[str] = []
    spectra: dict[str, Tensor] = {}
    base_top: dict[str, float] = {}
    heads = torch.full((3, len(PROJECTIONS), shape.n_layers, shape.n_heads), math.nan, dtype=torch.float64)
    neurons = torch.zeros(2, shape.n_layers, shape.d_mlp, dtype=torch.float64)  # squared norms
    tokens: dict[str, Tensor] = {}
    dtypes: set[torch.dtype] = set()
    for change in changes(pair, desc="weight change"):
        names.append(change.name)
        rows.append(_sizes(change))
        dtypes.add(change.dtype)
        if change.base.ndim == 2:
            found, s, top = _structure(change, rank, exact, components, seed)
            rows[-1] |= found
            spectra[change.name], base_top[change.name] = s, top
        if change.site is not None and change.site.component in PROJECTIONS:
            at = PROJECTIONS.index(change.site.component)
            for i, values in enumerate(_per_head(change, pair)):
                heads[i, at, change.site.layer, : len(values)] = torch.tensor(values, dtype=torch.float64)
        if change.site is not None and change.site.component in _NEURONS:
            across = 0 if change.site.component != "W_out" else 1
            for i, tensor in enumerate((change.delta, change.base)):
                neurons[i, change.site.layer] += torch.linalg.vector_norm(tensor, dim=across, dtype=torch.float64).square()
        if change.site in (Site("W_E"), Site("W_U")):
            axis = 1 if change.site == Site("W_E") else 0
            for what, tensor in (("change", change.delta), ("base", change.base)):
                tokens[f"{change.name} {what}"] = torch.linalg.vector_norm(tensor, dim=axis, dtype=torch.float64)
    if not rows:
        raise InputError(f"{pair.base.name} and {pair.tuned.name} have no tensor in common")
    order = _order(names) if guaranteed else list(range(len(names)))
    columns = {k: torch.tensor([rows[i].get(k, math.nan) for i in order], dtype=torch.float64) for k in (*_SIZES, *_STRUCTURE)}
    for flag in ("under_floor", "exact"):
        columns[flag] = columns[flag] == 1
    only = unmatched(pair)
    return WeightDeltaResult(
        **columns,
        head_change=heads[0] if guaranteed else None,
        head_base=heads[1] if guaranteed else None,
        head_floor=heads[2] if guaranteed else None,
        neuron_change=neurons[0].sqrt() if guaranteed else None,
        neuron_base=neurons[1].sqrt() if guaranteed else None,
        embedding_change=tokens.get("W_E change"),
        embedding_base=tokens.get("W_E base"),
        unembedding_change=tokens.get("W_U change"),
        unembedding_base=tokens.get("W_U base"),
        spectra={names[i]: spectra[names[i]] for i in order if names[i] in spectra},
        base_top={names[i]: base_top[names[i]] for i in order if names[i] in base_top},
        token_text=_token_texts(pair, tokens),
        dtype=", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)),
        only=(*(f"base: {n}" for n in only[0]), *(f"tuned: {n}" for n in only[1])),
        guaranteed=guaranteed,
        layers=shape.n_layers,
        labels={"weight": tuple(names[i] for i in order), "projection": PROJECTIONS},
    )


_NEURONS = ("W_in", "W_gate", "W_out")
_SIZES = ("relative", "floor", "under_floor", "change", "base_norm", "largest", "changed", "cosine", "kurtosis")
_STRUCTURE = (
    *("spectral_ratio", "stable_rank", "effective_rank", "rank90", "numerical_rank"),
    *("read_share", "read_chance", "write_share", "write_chance", "exact"),
)


def _sizes(change: Change) -> dict[str, float]:
    """Numbers that every tensor has."""
    delta, base = change.delta, change.base
    size, whole, rounding = linalg.norm(delta), linalg.norm(base), change.rounding
    return {
        "relative": linalg.ratio(size, whole),
        "floor": linalg.ratio(rounding, whole),
        "under_floor": float(size <= AT_FLOOR * rounding),
        "change": size,
        "base_norm": whole,
        "largest": float(delta.abs().max()) if delta.numel() else 0.0,
        "changed": float(delta.count_nonzero()) / max(1, delta.numel()),
        "cosine": linalg.cosine(base, base + delta if change.tuned is None else change.tuned),
        "kurtosis": linalg.kurtosis(delta),
    }


def _structure(change: Change, rank: int, exact: int, components: int, seed: int) -> tuple[dict[str, float], Tensor, float]:
    """Numbers from the singular values of a matrix and of its change; the leading values; the base's largest."""
    base, delta = change.base, change.delta
    small, energy = min(base.shape), linalg.norm(delta) ** 2
    rank = min(rank, small)
    chance = {"read_chance": rank / base.shape[0], "write_chance": rank / base.shape[1]}
    if not energy:
        zero = dict.fromkeys(("spectral_ratio", "stable_rank", "effective_rank", "rank90", "numerical_rank"), 0.0)
        return {**zero, **chance, "exact": 1.0}, torch.zeros(1, dtype=torch.float64), 0.0
    whole = change.factors is not None or small <= exact
    s = _spectrum(change, whole, components, seed).double()
    if small <= _EXACT_BASIS:
        u, top, vh = linalg.svd(base)
    else:
        u, top, vh = linalg.svd_top(base, rank, seed=seed)
    numerical = linalg.numerical_rank(s, (base.shape[0], base.shape[1]), noise=change.noise)
    ninety = linalg.rank_for_energy(s, 0.9, None if whole else energy)
    found = {
        "spectral_ratio": linalg.ratio(float(s[0]), float(top[0])),
        "stable_rank": linalg.stable_rank(s, None if whole else energy),
        "effective_rank": linalg.effective_rank(s) if whole else math.nan,
        "rank90": math.nan if ninety is None else float(ninety),
        "numerical_rank": float(numerical) if whole or numerical < len(s) else math.nan,
        "read_share": linalg.energy_inside(delta, u[:, :rank]),
        "write_share": linalg.energy_inside(delta.T, vh[:rank].T),
        "exact": float(whole),
    }
    return {**found, **chance}, s[:components].clone(), float(top[0])


def _spectrum(change: Change, whole: bool, components: int, seed: int) -> Tensor:
    if change.factors is not None:
        return linalg.svd_of_product(*change.factors).S
    return linalg.singular_values(change.delta) if whole else linalg.svd_top(change.delta, components, seed=seed).S


def _per_head(change: Change, pair: ModelPair) -> tuple[list[float], list[float], list[float]]:
    """||tau||, ||W_base|| and rounding of each head's slice."""
    assert change.site is not None
    delta, base = (weights.heads(change.site, t, pair.shape) for t in (change.delta, change.base))
    return [linalg.norm(h) for h in delta], [linalg.norm(h) for h in base], change.rounding_per_head(pair.shape)


def _order(names: Sequence[str]) -> list[int]:
    """Embeddings, then layer by layer the matrices and the vectors, then the end of the model."""

    def place(i: int) -> tuple[int, int, int]:
        name = names[i]
        if "." in name and not name.startswith("L"):  # a tensor without a site, as stored
            return 3, 0, i
        site = Site.parse(name)
        if site.layer is None:
            return (0 if site.component in ("W_E", "W_pos") else 2), 0, i
        module = weights.MODULES.index(site.component) if site.component in weights.MODULES else len(weights.MODULES)
        return 1, site.layer, module * len(names) + i

    return sorted(range(len(names)), key=place)


def _token_texts(pair: ModelPair, tokens: dict[str, Tensor]) -> dict[int, str]:
    """Texts of the tokens that moved most; ids stand alone for a model without a tokenizer."""
    ids: set[int] = set()
    for name in ("W_E", "W_U"):
        if f"{name} change" in tokens:
            share = (tokens[f"{name} change"] / tokens[f"{name} base"]).nan_to_num(0, posinf=0)
            ids |= set(share.argsort(descending=True)[:_SHOWN_TOKENS].tolist())
    try:
        return dict(zip(sorted(ids), pair.token_strings(sorted(ids)), strict=True))
    except InputError:
        return {}


def _percent(x: float) -> str:
    return f"{100 * x:.3g} %"
