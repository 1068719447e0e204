"""Did tuning add directions to the weights that base does not have?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import linalg, plots
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import weights
from interp.models.changes import Change
from interp.models.intruders import (
    CIRCUITS,
    FACTORS,
    OWN,
    SIDES,
    Compared,
    Settings,
    Side,
    block_changes,
    check,
    compared,
    compared_heads,
    head_factors,
    intruders,
    narrow,
    scaled_components,
)
from interp.results import Result, analysis
from interp.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import ModelPair


@dataclass(frozen=True, eq=False)
class IntruderDimensionsResult(Result):
    """The ``k`` strongest singular vectors of every matrix of tuned, compared with all of base's.

    Matrices act as x @ W: singular vectors ``read`` (rows of W, left) and ``write`` (columns, right).

    Attributes:
        cosine: largest |cos| with a singular vector of base; exactly 1 in matrices that tuning left alone.
        inside: norm of the part within base's singular vectors of nearly the same place in the order, ``window`` to either side.
        match: the singular vector of base that ``cosine`` is about.
        sigma: singular values of tuned.
        base_sigma: singular values of base.
        change: ||tuned - base|| / ||base||, Frobenius norms.
        delta_sigma: largest singular value of tuned - base; of an adapter from its factors.
        norm: ||tuned||.
        exact: whole SVDs of tuned, in float64; else subspace iteration in float32.
        chance: ``cosine`` in base with a random change of the same norm, matrix by matrix.
        head_cosine: ``cosine`` for OV = W_V W_O and QK = W_Q W_K^T of every query head, norms not folded in, rotary embeddings left out.
        head_inside: ``inside`` of them.
        head_sigma: their singular values in tuned.
        head_base_sigma: and in base.
        head_delta_sigma: largest singular value of what tuning added to them.
        head_chance: ``cosine`` with random changes of both factors, each of the same norm.
        left: of changed matrices, what the components read, [rows component]; of heads with intruders (``L1H2.W_O`` for OV, ``L1H2.W_Q``
            for QK) the left factor of the change that makes them twice as strong.
        right: what they write, [component columns]; of heads the other factor.
        similar: of changed matrices, |cos| of every component with the first ones of base.
        k: how many components were compared.
        threshold: on ``cosine``.
        side: which side has to be under it.
        window: as it was set.
        notes: what a reader should know.
        labels: of the axes ``module``, ``side``, ``circuit``.
    """

    cosine: Float[Tensor, "layer module component side"]
    inside: Float[Tensor, "layer module component side"]
    match: Int[Tensor, "layer module component side"]
    sigma: Float[Tensor, "layer module component"]
    base_sigma: Float[Tensor, "layer module component"]
    change: Float[Tensor, "layer module"]
    delta_sigma: Float[Tensor, "layer module"]
    norm: Float[Tensor, "layer module"]
    exact: Bool[Tensor, "layer module"]
    chance: Float[Tensor, "draw layer module component side"]
    head_cosine: Float[Tensor, "circuit layer head head_component side"]
    head_inside: Float[Tensor, "circuit layer head head_component side"]
    head_sigma: Float[Tensor, "circuit layer head head_component"]
    head_base_sigma: Float[Tensor, "circuit layer head head_component"]
    head_delta_sigma: Float[Tensor, "circuit layer head"]
    head_chance: Float[Tensor, "draw circuit layer head head_component side"]
    left: dict[str, Tensor]
    right: dict[str, Tensor]
    similar: dict[str, Tensor]
    k: int
    threshold: float
    side: str
    window: int | None
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    # ---- what is an intruder

    def _intruders(self, values: Tensor) -> Tensor:
        return intruders(values, self.threshold, self.side)  # type: ignore[arg-type]

    @property
    def intruder(self) -> Bool[Tensor, "layer module component"]:
        """Components of matrices that are no singular vector of base."""
        return self._intruders(self.cosine)

    @property
    def head_intruder(self) -> Bool[Tensor, "circuit layer head head_component"]:
        """Components of heads that are none of base's."""
        return self._intruders(self.head_cosine)

    @property
    def windowed(self) -> Bool[Tensor, "layer module component"]:
        """Intruders by the second criterion too: they are not a mixture of base's neighbours, as nearly equal singular values give."""
        return self.intruder & self._intruders(self.inside)

    @property
    def count(self) -> Int[Tensor, "layer module"]:
        """Intruders of every matrix."""
        return self.intruder.sum(-1)

    @property
    def chance_count(self) -> Int[Tensor, "draw layer module"]:
        """Intruders that a random change of the same norm makes."""
        return self._intruders(self.chance).sum(-1)

    @property
    def ratio(self) -> Float[Tensor, "layer module"]:
        """Largest singular value of the change over the k-th of base: well under 1 there can be no intruder among the first k."""
        return self.delta_sigma / self.base_sigma[..., -1]

    @property
    def energy(self) -> Float[Tensor, "layer module"]:
        """Sum of squared singular values of the intruders, as share of ||tuned||^2."""
        return torch.where(self.intruder, self.sigma.square(), 0.0).sum(-1) / self.norm.square()

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Names of the matrices, [layer][module]."""
        return tuple(tuple(f"L{layer}.{m}" for m in self.labels["module"]) for layer in range(len(self.cosine)))

    # ---- as an edit

    def edit(self, strength: float, of: Literal["matrices", "ov", "qk"] = "matrices") -> Edit:
        """The change to tuned that makes its intruders ``strength`` times as strong: 0 removes them, 1 changes nothing.

        Args:
            strength: factor on the intruders' singular values.
            of: intruders of whole matrices, W + (strength - 1) sum_j s_j u_j v_j^T; or of the OV or QK of heads, where ``W_O`` or ``W_Q``
                changes.

        Raises:
            InputError: the strength is no finite number, or ``of`` something else.
        """
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
            raise InputError(f"strength is {strength!r}, expected a finite number, such as 0.5")
        if of not in ("matrices", *CIRCUITS):
            raise InputError(f"of is {of!r}, expected matrices, ov or qk")
        changes: list[WeightChange] = []
        if of == "matrices":
            for layer, module in self.count.nonzero().tolist():
                site, chosen = Site.parse(self.names[layer][module]), self.intruder[layer, module]
                left, right = self.left[str(site)][:, chosen], self.right[str(site)][chosen]
                changes.append(scaled_components(site, left, self.sigma[layer, module][chosen], right, strength))
        else:
            for site in map(Site.parse, self.left):
                if site.head is not None and site.component == OWN[of]:
                    changes.append(WeightChange(site, (strength - 1) * self.left[str(site)], self.right[str(site)]))
        return Edit(tuple(changes), f"intruders of {of} times {strength:g}")

    # ---- what is said

    def summary(self) -> str:
        """The count beside that of random changes, where they are, what they hold, and the same per head."""
        n, heads = int(self.count.sum()), []
        for i, circuit in enumerate(CIRCUITS):
            flags = self.head_intruder[i]
            heads.append(f"{circuit.upper()} of heads: {int(flags.sum())} of {flags.numel()}{_drawn(self._head_chance_counts(i))}")
        on = "both sides" if self.side == "both" else f"the side that {self.side}s"
        drawn = _drawn(self.chance_count.flatten(1).sum(1))
        return (
            f"{n} intruder dimension{'s' * (n != 1)}{drawn} among the {self.k} strongest singular vectors of each of {self.count.numel()} "
            f"matrices (|cos| < {self.threshold:g} with all of base's on {on}){self._where()}; the largest singular value of what tuning "
            f"added is {float(self.ratio.median()):.2g} of base's number {self.k} in the median matrix, at most "
            f"{float(self.ratio.max()):.2g}; {'; '.join([*heads, *self.notes])}"
        )

    def _where(self) -> str:
        if not bool(self.count.any()):
            return ""
        layer, module = divmod(int(self.count.argmax()), self.count.shape[1])
        share = linalg.ratio(float((self.energy * self.norm.square()).sum()), float(self.norm.square().sum()))
        return (
            f", in {int((self.count > 0).sum())} of the matrices, most in {self.names[layer][module]} ({int(self.count.max())}), with "
            f"{share:.2%} of the squared norm of all; {int(self.windowed.sum())} of them no mixture of base's neighbours either"
        )

    def _head_chance_counts(self, circuit: int) -> Tensor:
        return self._intruders(self.head_chance)[:, circuit].flatten(1).sum(1)

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per matrix and per circuit of a head; ``per="component"`` one per component.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "component"):
            raise InputError(f"per must be 'component' or nothing, but it is {per!r}; nothing here is per prompt")
        rows: list[dict[str, Any]] = []
        for name, values in self._cells():
            flagged = self._intruders(values["cosine"])
            if per:
                table = {f"cosine_{s}": values["cosine"][:, i] for i, s in enumerate(SIDES)}
                table |= {f"inside_{s}": values["inside"][:, i] for i, s in enumerate(SIDES)}
                columns = {"sigma": values["sigma"], "base_sigma": values["base_sigma"], **table}
                rows += [
                    {"weight": name, "component": j, "intruder": bool(flagged[j])} | {k: float(v[j]) for k, v in columns.items()}
                    for j in range(len(flagged))
                ]
                continue
            null = self._intruders(values["chance"]).sum(-1).double()
            rows.append(
                {
                    "weight": name,
                    "intruders": int(flagged.sum()),
                    "chance": float(null.mean()) if len(null) else math.nan,
                    "chance_most": float(null.max()) if len(null) else math.nan,
                    "windowed": int((flagged & self._intruders(values["inside"])).sum()),
                    "of": len(flagged),
                    "sigma_intruders": float(values["sigma"][flagged].square().sum()),
                    "lowest_cosine": float(self._judged(values["cosine"]).min()),
                    "delta_sigma": float(values["delta_sigma"]),
                    "ratio": linalg.ratio(float(values["delta_sigma"]), float(values["base_sigma"][-1])),
                }
            )
        return pd.DataFrame(rows)

    def _judged(self, cosine: Tensor) -> Tensor:
        """What the threshold is compared with."""
        return cosine.amax(-1) if self.side == "both" else cosine[..., SIDES.index(self.side)]

    def _cells(self) -> list[tuple[str, dict[str, Tensor]]]:
        """Every matrix, then every circuit of every head, with its numbers."""
        whole = ("cosine", "inside", "sigma", "base_sigma", "delta_sigma")
        cells = []
        for layer, names in enumerate(self.names):
            for m, name in enumerate(names):
                cells.append((name, {k: getattr(self, k)[layer, m] for k in whole} | {"chance": self.chance[:, layer, m]}))
        for c, circuit in enumerate(CIRCUITS):
            for layer, head in [(a, b) for a in range(self.head_sigma.shape[1]) for b in range(self.head_sigma.shape[2])]:
                values = {k: getattr(self, f"head_{k}")[c, layer, head] for k in whole}
                cells.append((f"L{layer}H{head}.{circuit}", values | {"chance": self.head_chance[:, c, layer, head]}))
        return cells

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """Components of whole matrices: intruders first, by singular value against base's largest; then the lowest cosines."""
        table = self.to_frame("component")
        table = table[~table.weight.str.contains("H")]
        tops = {name: float(values["base_sigma"][0]) for name, values in self._cells()}
        null = self.to_frame().set_index("weight").chance
        table = table.assign(
            against_base=[linalg.ratio(s, tops[w]) for s, w in zip(table.sigma, table.weight, strict=True)],
            chance_in_weight=[null[w] for w in table.weight],
        )
        judged = table[["cosine_read", "cosine_write"]].max(axis=1) if self.side == "both" else table[f"cosine_{self.side}"]
        order = table.assign(key=-table.against_base.where(table.intruder, 0.0), then=judged).sort_values(["key", "then"], kind="stable")
        return order.drop(columns=["key", "then"]).head(n).reset_index(drop=True)

    # ---- figures

    def plot(self) -> go.Figure:
        """Intruders by layer and module."""
        return self._heatmap(self.count, f"Intruder dimensions among the {self.k} strongest singular vectors", "intruders", self.count == 0)

    def figures(self) -> dict[str, go.Figure]:
        """Counts by module and head, cosines by place in the order, size of the change, and one matrix's vectors beside base's."""
        made = {
            "Intruders by layer and module": self.plot(),
            "How far the strongest vectors are base's": self._curve(),
            "Could there be any?": self._heatmap(
                self.ratio, f"Largest singular value of the change over base's number {self.k}", "ratio", self.ratio == 0
            ),
        }
        for c, circuit in enumerate(CIRCUITS):
            counts = self.head_intruder[c].sum(-1)
            made[f"Intruders of heads, {circuit.upper()}"] = plots.heatmap(
                counts,
                title=f"Intruder dimensions of heads among the {self.head_sigma.shape[-1]} strongest of {circuit.upper()}",
                xlabel="head",
                ylabel="layer",
                unit="intruders",
                floor=counts == 0,
                difference=False,
            )
        if self.similar:
            made["The vectors beside base's"] = self._similarity()
        return made

    def _heatmap(self, values: Tensor, title: str, unit: str, floor: Tensor) -> go.Figure:
        labels = self.labels["module"]
        return plots.heatmap(values, labels, title=title, xlabel="module", ylabel="layer", unit=unit, floor=floor, difference=False)

    def _curve(self) -> go.Figure:
        """m_j by j: median and lowest over the matrices that changed, beside random changes."""
        moved = self.change > 0
        found = self._judged(self.cosine)[moved] if bool(moved.any()) else self._judged(self.cosine).flatten(0, 1)
        series = {"median of the changed matrices": found.median(0).values, "lowest of them": found.min(0).values}
        if len(self.chance) and bool(moved.any()):
            series["lowest after random changes"] = self._judged(self.chance)[:, moved].flatten(0, 1).min(0).values
        series["threshold"] = torch.full((self.k,), self.threshold)
        side = "higher of both sides" if self.side == "both" else f"side that {self.side}s"
        return plots.lines(
            series,
            title="Largest |cos| of tuned's singular vectors with any of base's",
            xlabel="singular vector of tuned, from 0",
            ylabel=f"largest |cos|, {side}",
        )

    def _similarity(self) -> go.Figure:
        """The matrix with the most intruders, or else with the lowest cosine."""
        names = [name for row in self.names for name in row]
        lowest, counts = self._judged(self.cosine).amin(-1).flatten(), self.count.flatten()
        order = sorted(self.similar, key=lambda name: (-int(counts[names.index(name)]), float(lowest[names.index(name)])))
        name, side = order[0], "write" if self.side == "both" else self.side
        return plots.heatmap(
            self.similar[name][..., SIDES.index(side)],
            title=f"{name}: |cos| of singular vectors of tuned with base's, side that {side}s",
            xlabel="singular vector of base, from 0",
            ylabel="of tuned",
            unit="|cos|",
            difference=False,
            limits=(0.0, 1.0),
        )


@analysis(version=2)
def intruder_dimensions(
    pair: ModelPair,
    *,
    k: int = 10,
    threshold: float = 0.5,
    side: Side = "write",
    window: int | None = None,
    draws: int = 5,
    exact: int = 1024,
    seed: int = 0,
) -> IntruderDimensionsResult:
    """Did tuning add directions to the weights that base does not have?

    A strong singular vector of tuned that is close to no singular vector of base is an intruder dimension; LoRA has been found to
    make them where full fine-tuning does not (Shuttleworth et al. 2024, arXiv 2410.21228, who look at the side that writes, k = 10 and
    0.5). For every matrix of every block, m_j = max_i |cos(u'_j, u_i)| over all singular vectors of base's matrix. Beside every count
    stands that of base with a random dense change of the same norm. Only the strongest can be compared: further down the spectrum
    nearly equal singular values mix, and any change makes "intruders". ``inside`` tells such mixtures: it adds up what lies in base's
    vectors of nearly the same place. The same for OV and QK of every head (an extension of ours), where base has only as many vectors
    as a head is wide. Fused matrices come apart; weights are taken in float32 or better whatever they are stored in, and are read tensor
    by tensor. What an adapter added is measured from its factors.

    Args:
        pair: base and tuned.
        k: how many of the strongest singular vectors are compared; of heads, at most as many as a head is wide.
        threshold: |cos| under which a vector is an intruder.
        side: ``write`` (columns of x @ W; the left vectors of torch's [out, in]), ``read`` (rows), or ``both``: under it on both sides.
        window: for ``inside``, places to either side; None: a 24th of base's singular vectors, at most 32.
        draws: random changes.
        exact: matrices whose smaller side is at most this get whole SVDs in float64; larger ones base's in float32 and tuned's k strongest
            by subspace iteration.
        seed: of the random changes and the iteration.

    Raises:
        InputError: a single model, k beyond the rank of a matrix, a threshold outside of (0, 1], or an architecture that is not known.
    """
    settings = _checked(k, threshold, side, window, draws, exact, seed)
    shape, modules = pair.shape, weights.modules(pair.shape)
    found: dict[tuple[int, str], Compared] = {}
    heads: dict[tuple[str, int], Compared] = {}
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    similar: dict[str, Tensor] = {}
    waiting: dict[int, dict[str, Change]] = {}
    for change in block_changes(pair, settings):
        assert change.site is not None and change.site.layer is not None
        layer, name = change.site.layer, change.site.component
        one = found[layer, name] = compared(change, settings)
        if float(one.change) > 0:
            left[change.name], right[change.name], similar[change.name] = one.left.float(), one.right.float(), one.similar.float()
        parts = waiting.setdefault(layer, {})
        parts[name] = change
        for circuit in CIRCUITS:
            if name in FACTORS[circuit] and set(FACTORS[circuit]) <= set(parts):
                of = heads[circuit, layer] = compared_heads(parts, circuit, settings, shape)
                flagged = intruders(of.overlap.cosine, threshold, side)
                for site, factors in head_factors(of, parts[OWN[circuit]], circuit, flagged, shape).items():
                    left[str(site)], right[str(site)] = factors
        if set().union(*FACTORS.values()) <= set(parts):
            parts.clear()
    layers = range(shape.n_layers)

    def grid(take: Any) -> Tensor:
        return torch.stack([torch.stack([take(found[layer, m]).double() for m in modules]) for layer in layers])

    def by_head(take: Any) -> Tensor:
        return torch.stack([torch.stack([take(heads[c, layer]) for layer in layers]) for c in CIRCUITS])

    return IntruderDimensionsResult(
        cosine=grid(lambda c: c.overlap.cosine),
        inside=grid(lambda c: c.overlap.inside),
        match=grid(lambda c: c.overlap.match).long(),
        sigma=grid(lambda c: c.sigma),
        base_sigma=grid(lambda c: c.base_sigma),
        change=grid(lambda c: c.change),
        delta_sigma=grid(lambda c: c.delta_sigma),
        norm=grid(lambda c: c.norm),
        exact=torch.tensor([[found[layer, m].exact for m in modules] for layer in layers]),
        chance=grid(lambda c: c.chance).movedim(2, 0),
        head_cosine=by_head(lambda c: c.overlap.cosine),
        head_inside=by_head(lambda c: c.overlap.inside),
        head_sigma=by_head(lambda c: c.sigma),
        head_base_sigma=by_head(lambda c: c.base_sigma),
        head_delta_sigma=by_head(lambda c: c.delta_sigma),
        head_chance=by_head(lambda c: c.chance).movedim(2, 0),
        left=left,
        right=right,
        similar=similar,
        k=k,
        threshold=float(threshold),
        side=side,
        window=window,
        notes=narrow(pair),
        labels={"module": modules, "side": SIDES, "circuit": CIRCUITS},
    )


def _checked(k: int, threshold: float, side: Side, window: int | None, draws: int, exact: int, seed: int) -> Settings:
    check(threshold, side)
    for name, value, least in (("draws", draws, 0), ("exact", exact, 1), ("window", 0 if window is None else window, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}, expected a whole number from {least}")
    return Settings(k, draws, window, exact, seed)


def _drawn(counts: Tensor) -> str:
    """Beside a count: what random changes give."""
    if not len(counts):
        return ""
    mean, low, high = float(counts.double().mean()), int(counts.min()), int(counts.max())
    return f" (random changes of the same norm: {mean:.3g}, {low} to {high} in {len(counts)} draws)"
