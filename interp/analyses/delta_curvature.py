"""Did tuning move the weights along directions that the loss of base is sharp in, or along flat ones?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import linalg, plots, stats
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models.changes import AT_FLOOR, Change, changes
from interp.models.curvature import (
    Eigen,
    Eigenbases,
    along,
    band,
    check_mass,
    grid,
    products,
    random_shares,
    random_sharpness,
    rotated,
    staircase,
    wanted_sites,
)
from interp.models.linear_maps import check_apart
from interp.prompts import PromptPairs, Prompts
from interp.results import Result, analysis
from interp.stats import Estimate
from interp.sweeps.likelihood import loss_and_kl

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import ModelPair
    from interp.models.batch import Batch
    from interp.models.factors import Factors


@dataclass(frozen=True, eq=False)
class DeltaCurvatureResult(Result):
    """The change delta = tuned - base of every matrix with factors, in the eigenbasis of base's curvature.

    Bands are shares of the curvature: band 0 is the fewest pairs of directions, sharpest first, that hold the first of ``masses``, and the
    last band the flattest ones. NaN where a number makes no sense: shares of a change that is 0, or factors that are zero.

    Attributes:
        energy: share of ||delta||^2 in each band.
        base_energy: share of ||W_base||^2 there.
        chance: expected share of a random change, which is the band's share of the pairs.
        chance_sd: standard deviation of a random change's share, exact. A random change has the singular values of delta and is turned
            at random on both sides: chance takes one of low rank further.
        change: ||delta||.
        base_norm: ||W_base||.
        rounding: what rounding to the stored dtype alone gives ||delta||.
        curvature: delta^T (G kron A) delta.
        base_curvature: the same of W_base.
        mean_curvature: expectation for a random change of norm 1.
        curvature_sd: standard deviation for a random change of norm 1 with delta's singular values, exact.
        loss: mean negative log-likelihood of next tokens, of base with a share of all these changes, and of tuned; None without prompts.
        kl: KL(base || changed), mean over the same positions.
        weight_kl: KL(base || base with the change of one matrix); None unless asked for.
        tokens: positions of each prompt.
        step: the small share of the change.
        positions: over which the factors are means.
        needed: positions below which a factor lacks rank: the longest side of a matrix.
        targets: the labels that G's gradients are for.
        labels: of the axes weight, band and changed.
    """

    energy: Float[Tensor, "weight band"]
    base_energy: Float[Tensor, "weight band"]
    chance: Float[Tensor, "weight band"]
    chance_sd: Float[Tensor, "weight band"]
    change: Float[Tensor, " weight"]
    base_norm: Float[Tensor, " weight"]
    rounding: Float[Tensor, " weight"]
    curvature: Float[Tensor, " weight"]
    base_curvature: Float[Tensor, " weight"]
    mean_curvature: Float[Tensor, " weight"]
    curvature_sd: Float[Tensor, " weight"]
    loss: Float[Tensor, "changed prompt"] | None
    kl: Float[Tensor, "changed prompt"] | None
    weight_kl: Float[Tensor, "weight prompt"] | None
    tokens: Int[Tensor, " prompt"] | None
    step: float
    positions: int
    needed: int
    targets: str
    labels: dict[str, tuple[str, ...]]

    # ---- numbers

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights."""
        return self.labels["weight"]

    @property
    def predicted(self) -> Float[Tensor, " weight"]:
        """Second order of the change of the mean loss per predicted position, nats: half of ``curvature``."""
        return self.curvature / 2

    @property
    def predicted_random(self) -> Float[Tensor, " weight"]:
        """The same expected of a random change of the same norm."""
        return self.change.square() * self.mean_curvature / 2

    @property
    def predicted_floor(self) -> Float[Tensor, " weight"]:
        """What rounding of the stored weights is expected to give."""
        return self.rounding.square() * self.mean_curvature / 2

    @property
    def sharpness(self) -> Float[Tensor, " weight"]:
        """``curvature`` over that expected of a random change of the same norm: 1 is chance, less is flat, more is sharp."""
        return self.curvature / (self.change.square() * self.mean_curvature)

    @property
    def sharpness_sd(self) -> Float[Tensor, " weight"]:
        """Standard deviation of ``sharpness`` of random changes."""
        return self.curvature_sd / self.mean_curvature

    @property
    def base_sharpness(self) -> Float[Tensor, " weight"]:
        """``sharpness`` of the base's own weights."""
        return self.base_curvature / (self.base_norm.square() * self.mean_curvature)

    @property
    def under_floor(self) -> Tensor:
        """Matrices whose change rounding explains."""
        return self.change <= AT_FLOOR * self.rounding

    def total(self, values: Float[Tensor, "weight band"], sizes: Float[Tensor, " weight"]) -> Float[Tensor, " band"]:
        """Shares of the summed squares of all matrices, from those of each."""
        squares = sizes.square()
        live = (squares > 0) & ~values.isnan().any(1)
        return (values[live] * squares[live, None]).sum(0) / squares[live].sum()

    def _mean(self, values: Tensor) -> Estimate:
        """Mean over positions, with an interval from resampling prompts."""
        assert self.tokens is not None
        tokens = self.tokens.double()
        return stats.ratio_of_means((values * tokens).movedim(-1, 0), tokens)

    def _at(self, changed: str) -> int:
        return self.labels["changed"].index(changed)

    @property
    def measured_kl(self) -> Estimate:
        """Mean KL(base || base with all these changes), nats per position: what ``predicted`` is the second order of."""
        return self._mean(self._measured("kl")[self._at("all")])

    @property
    def measured_loss(self) -> Estimate:
        """Change of the mean loss on the prompts by all these changes, gradient included."""
        loss = self._measured("loss")
        return self._mean(loss[self._at("all")] - loss[self._at("none")])

    @property
    def small_kl(self) -> Estimate:
        """KL of small steps along the change, both ways, divided by the step squared: the second order alone, between matrices too."""
        kl = self._measured("kl")
        return self._mean((kl[self._at("step")] + kl[self._at("back")]) / (2 * self.step**2))

    @property
    def gradient(self) -> Estimate:
        """First order of the change of the loss on the prompts, from small steps both ways; the quadratic form does not have it."""
        loss = self._measured("loss")
        return self._mean((loss[self._at("step")] - loss[self._at("back")]) / (2 * self.step))

    def _measured(self, name: str) -> Tensor:
        values = getattr(self, name)
        if values is None:
            raise InputError("nothing was measured: delta_curvature takes prompts as its third input")
        return values

    @property
    def whole(self) -> tuple[float, float]:
        """``sharpness`` of all matrices together, and its standard deviation for random changes with these singular values."""
        told, random = float(self.predicted.nansum()), float(self.predicted_random.nansum())
        spread = float((self.change.square() * self.curvature_sd / 2).square().nansum().sqrt())
        return linalg.ratio(told, random), linalg.ratio(spread, random)

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """How sharp the change is."""
        if not bool((self.change > 0).any()):
            return {}
        return {"curvature along the change, times that of a random change": {"tuned": stats.single(self.whole[0])}}

    # ---- words and tables

    def summary(self) -> str:
        """Sharpness of the whole change beside chance and base's weights, and the predicted change of the loss beside the measured one."""
        noise = f"{len(self.names)} matrices, {self.positions} positions, labels {self.targets}"
        noise += f"; too few positions: {self.needed} are needed for factors of full rank" if self.positions < self.needed else ""
        if not bool((self.change > 0).any()):
            return f"0 nats per position are predicted: tuning changed none of the matrices with factors ({noise})"
        band, base, chance = (
            float(self.total(*x)[0]) for x in ((self.energy, self.change), (self.base_energy, self.base_norm), (self.chance, self.change))
        )
        random = float(self.predicted_random.nansum())
        spread = self.whole[1] * random
        told = float(self.predicted.nansum())
        measured = ""
        if self.kl is not None:
            measured = (
                f"; measured KL(base || changed) {self.measured_kl}, from small steps {self.small_kl}, and the loss of the text changes by "
                f"{self.measured_loss}, of which the gradient predicts {self.gradient}"
            )
            if self.weight_kl is not None:
                measured += f"; changes of one matrix at a time give {float(self._mean(self.weight_kl).value.sum()):.3g} in all"
        floor = float(self.predicted_floor.nansum())
        return (
            f"{linalg.ratio(told, random):.3g} times the curvature of a random change with the same singular values: "
            f"tuning's change is predicted to "
            f"cost {told:.3g} nats per position in second order (random: {random:.3g} +- {spread:.2g}; rounding {floor:.1g}){measured}; "
            f"{band:.1%} of its squared norm is in the {self.labels['band'][0]} of the curvature, where {base:.1%} of base's and "
            f"{chance:.1%} of a random change's is ({noise})"
        )

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The matrices whose change is predicted to cost most."""
        table = self.to_frame()
        return table.sort_values("predicted", ascending=False, na_position="last").head(n).reset_index(drop=True)

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per matrix; ``per="prompt"``: what was measured on every prompt.

        Raises:
            InputError: ``per`` is something else, or there were no prompts.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per == "prompt":
            loss, kl = self._measured("loss"), self._measured("kl")
            rows = [
                {"changed": name, "prompt": i, "loss": float(loss[c, i]), "kl": float(kl[c, i])}
                for c, name in enumerate(self.labels["changed"])
                for i in range(loss.shape[1])
            ]
            return pd.DataFrame(rows)
        columns = {
            "relative_change": torch.where(self.base_norm > 0, self.change / self.base_norm, torch.nan),
            "sharpness": self.sharpness,
            "sharpness_random_sd": self.sharpness_sd,
            "base_sharpness": self.base_sharpness,
            "predicted": self.predicted,
            "predicted_random": self.predicted_random,
            "predicted_floor": self.predicted_floor,
        }
        if self.weight_kl is not None:
            found = self._mean(self.weight_kl)
            columns |= {"measured_kl": found.value, "low": found.low, "high": found.high}
        for b, name in enumerate(self.labels["band"]):
            columns |= {f"{name}": self.energy[:, b], f"{name}, base": self.base_energy[:, b], f"{name}, chance": self.chance[:, b]}
        return pd.DataFrame({"weight": list(self.names), **{k: v.numpy() for k, v in columns.items()}})

    # ---- figures

    def plot(self) -> go.Figure:
        """Sharpness of the change by layer and module."""
        values = torch.where(self.sharpness > 0, self.sharpness, torch.nan).log2()
        return self._heatmap(values, "Sharpness of tuning's change", "log2 of curvature over that of a random change; 0 is chance", True)

    def figures(self) -> dict[str, go.Figure]:
        """Sharpness, energy by band, predicted loss; and what was measured."""
        made = {"Sharp or flat": self.plot()}
        if not bool((self.change > 0).any()):
            return made
        made["Where the change is"] = plots.bars(
            self.labels["band"],
            {
                "tuning's change": self.total(self.energy, self.change),
                "base's weights": self.total(self.base_energy, self.base_norm),
                "random change": self.total(self.chance, self.change),
            },
            title="Squared norm by share of the curvature, all matrices",
            xlabel="pairs of directions, by the share of the curvature that they hold",
            ylabel="share of the squared norm",
        )
        made["Predicted loss"] = self._heatmap(
            1000 * self.predicted,
            "Predicted change of the mean loss, second order",
            "thousandths of nats per position",
            False,
        )
        if self.kl is not None:
            made["Predicted and measured"] = self._compared()
        if self.weight_kl is not None:
            found = self._mean(self.weight_kl).value
            made["Predicted and measured by matrix"] = plots.scatter(
                self.predicted.clamp(min=1e-12).log10(),
                found.clamp(min=1e-12).log10(),
                labels=self.names,
                title="Change of one matrix: predicted and measured",
                xlabel="log10 of predicted, nats per position",
                ylabel="log10 of measured KL",
                diagonal=True,
            )
        return made

    def _compared(self) -> go.Figure:
        told = torch.full((), float(self.predicted.nansum()), dtype=torch.float64)
        rows = {
            "predicted, second order": Estimate(told, told, told),
            "KL, small steps": self.small_kl,
            "KL, whole change": self.measured_kl,
            "loss, whole change": self.measured_loss,
            "loss, gradient alone": self.gradient,
        }
        return plots.bars(
            list(rows),
            {"nats": torch.stack([e.value for e in rows.values()])},
            intervals={"nats": tuple(torch.stack([getattr(e, end) for e in rows.values()]) for end in ("low", "high"))},  # type: ignore[arg-type]
            title="Change of the mean loss by tuning's change of these matrices",
            xlabel="",
            ylabel="nats per position, 95 % interval over prompts",
        )

    def _heatmap(self, values: Tensor, title: str, unit: str, difference: bool) -> go.Figure:
        cells, layers, modules = grid(self.names, values)
        under, _, _ = grid(self.names, self.under_floor.double())
        return plots.heatmap(
            cells, modules, layers, title=title, xlabel="module", ylabel="layer", unit=unit, floor=under > 0, difference=difference
        )


@analysis(version=2)
def delta_curvature(
    pair: ModelPair,
    factors: Factors,
    prompts: Prompts | None = None,
    *,
    masses: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999),
    step: float = 0.1,
    per_weight: bool = False,
) -> DeltaCurvatureResult:
    """Did tuning move the weights along directions that the loss of base is sharp in, or along flat ones?

    In the eigenbasis of base's K-FAC factors every pair of a direction read and one written has a curvature (Merullo et al. 2025, arXiv
    2510.24256). Of the change of every matrix this says which share of its squared norm lies in which share of the curvature, beside
    base's own weights and a random change with the same singular values, whose expectation and spread are exact. Half of the
    quadratic form is the second order of the mean loss per predicted position, in nats, for a matrix that changes alone.

    With prompts the prediction stands beside what is measured: with labels drawn from base itself it predicts the mean
    KL(base || changed), which has no first order; the loss of given text has one, the gradient, which the prediction leaves out. Also
    left out are products of changes of different matrices, higher orders, what K-FAC takes as independent, and tensors without factors
    (``tuned`` in the measurements has them). Small steps both ways along the change tell the orders apart.

    Args:
        pair: base and tuned.
        factors: of base.
        prompts: to measure loss and KL on, at all positions with a next token.
        masses: shares of the curvature that end the bands, ascending.
        step: share of the change for small steps.
        per_weight: measure the change of every matrix alone too.

    Raises:
        InputError: factors of another model than base, masses outside of (0, 1], a step outside of (0, 1], or measuring without prompts
            or with a pair that is loaded one at a time.
    """
    _check(pair, prompts, masses, step, per_weight)
    sites = wanted_sites(factors)
    factors.check(pair.base)
    if prompts is not None:
        check_apart(pair.base, sites)  # what is measured changes one matrix at a time
    found: dict[str, dict[str, Tensor | float]] = {}
    deltas: dict[str, WeightChange] = {}
    bases, needed = Eigenbases(factors), 0
    for change in changes(pair, desc="curvature of the change", only=frozenset(map(str, sites))):
        if change.site not in sites:  # beside a wanted one in a fused tensor
            continue
        needed = max(needed, *change.base.shape)
        found[change.name] = _numbers(change, bases[change.site], masses)
        if prompts is not None and found[change.name]["change"]:
            deltas[change.name] = _as_edit(change)
    if lost := [str(site) for site in sites if str(site) not in found]:
        check_apart(pair.base, sites)
        raise InputError(f"{pair.name} has no {lost[0]}, which the factors {factors.path} have")
    names = tuple(map(str, sites))
    ends = ("0", *(f"{100 * m:g}" for m in masses))
    bands = [f"sharpest {ends[1]} %", *(f"{a} to {b} %" for a, b in zip(ends[1:], ends[2:], strict=False))]
    bands += [] if masses[-1] == 1 else [f"flattest {_rest(masses[-1])} %"]
    measured = {} if prompts is None else _measured(pair, pair.batch(prompts), [deltas.get(n) for n in names], step, per_weight)
    return DeltaCurvatureResult(
        **{k: torch.stack([torch.as_tensor(found[n][k], dtype=torch.float64) for n in names]) for k in found[names[0]]},
        loss=measured.get("loss"),
        kl=measured.get("kl"),
        weight_kl=measured.get("weight_kl"),
        tokens=measured.get("tokens"),
        step=float(step),
        positions=factors.n,
        needed=needed,
        targets=str(factors.meta.get("labels", "not known")),
        labels={"weight": names, "band": tuple(bands), "changed": CHANGED},
    )


CHANGED = ("none", "back", "step", "all", "tuned")
"""Base as it is; less and with ``step`` of the changes; with all of them; and tuned, which may differ in more."""


def _rest(mass: float) -> str:
    return f"{100 * (1 - mass):.3g}"


def _check(pair: ModelPair, prompts: Prompts | None, masses: tuple[float, ...], step: float, per_weight: bool) -> None:
    for mass in masses:
        check_mass(mass)
    if not masses or list(masses) != sorted(set(masses)):
        raise InputError(f"masses is {masses!r}, expected shares in ascending order, such as 0.5,0.9")
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step <= 1:
        raise InputError(f"step is {step!r}, expected a share of the change above 0 and at most 1")
    if per_weight and prompts is None:
        raise InputError("per_weight measures on prompts, but none were given")
    if isinstance(prompts, PromptPairs):
        raise InputError("delta_curvature reads one text at a time; give the clean or the corrupt prompts of the pairs")
    if prompts is not None and pair.one_at_a_time:
        raise InputError("delta_curvature measures both models together, but the pair is loaded one at a time; leave the prompts out")


def _numbers(change: Change, e: Eigen, masses: tuple[float, ...]) -> dict[str, Tensor | float]:
    """Of one matrix."""
    if tuple(change.base.shape) != (len(e.mu), len(e.lam)):
        raise InputError(f"the factors of {change.name} are for {len(e.mu)} x {len(e.lam)}, but it is {list(change.base.shape)}")
    size, norm = _size(change), linalg.norm(change.base)
    narrow = _concentration(change) if size else 0.0
    random = rotated(products(e), narrow) if size else random_sharpness(e)
    alive = float(random.mean) > 0
    full = torch.full((len(e.lam),), len(e.mu))
    cuts = ([staircase(e.lam, e.mu, m) for m in masses] if alive else [full] * len(masses)) + [full] * (masses[-1] < 1)
    nan = torch.full((len(cuts),), math.nan, dtype=torch.float64)
    base = along(change.base, e, cuts)
    moved = along(change.factors or change.delta, e, cuts) if size else None
    counts = torch.tensor([int(c.sum()) for c in cuts])
    chance = random_shares(counts.diff(prepend=counts.new_zeros(1)).tolist())
    ends = [torch.zeros_like(full), *cuts]
    spread = [rotated(band(a, b, len(e.mu)), narrow).sd for a, b in zip(ends, cuts, strict=False)] if size else chance.sd
    return {
        "energy": _shares(moved.energy) if moved is not None and alive else nan,
        "base_energy": _shares(base.energy) if norm and alive else nan,
        "chance": chance.mean if alive else nan,
        "chance_sd": torch.as_tensor(spread, dtype=torch.float64) if alive else nan,
        "change": size,
        "base_norm": norm,
        "rounding": change.rounding,
        "curvature": moved.curvature if moved is not None else 0.0,
        "base_curvature": base.curvature,
        "mean_curvature": float(random.mean),
        "curvature_sd": float(random.sd),
    }


def _size(change: Change) -> float:
    """||delta||; of an adapter's factors without their product."""
    if change.factors is None:
        return linalg.norm(change.delta)
    left, right = (x.double() for x in change.factors)
    return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))


def _concentration(change: Change) -> float:
    """Sum of the fourth powers of the singular values over the square of the sum of their squares."""
    if change.factors is None:
        delta = change.delta.double()
        gram = delta @ delta.T if delta.shape[0] < delta.shape[1] else delta.T @ delta
        return float(gram.square().sum() / gram.trace().square())
    left, right = (x.double() for x in change.factors)
    inner = (left.T @ left) @ (right @ right.T)  # its eigenvalues are the squared singular values
    return float((inner @ inner).trace() / inner.trace().square())


def _shares(energy: Tensor) -> Tensor:
    return energy / energy.sum()


def _as_edit(change: Change) -> WeightChange:
    assert change.site is not None
    return WeightChange(change.site, *change.factors) if change.factors is not None else WeightChange(change.site, change.delta)


def _measured(pair: ModelPair, batch: Batch, deltas: list[WeightChange | None], step: float, per_weight: bool) -> dict[str, Tensor]:
    """Loss and KL of base with shares of the change, of tuned, and of base with the change of one matrix."""
    whole = Edit(tuple(d for d in deltas if d is not None), "what tuning changed")
    single = [None if d is None else Edit((d,), str(d.site)) for d in deltas] if per_weight else []
    others = [None, whole.scaled(-step), whole.scaled(step), whole, pair.tuned, *single]
    loss, kl = loss_and_kl(pair.base, batch, others, vocab=pair.shared_vocab)
    n = len(CHANGED)
    found = {"loss": loss[:n], "kl": kl[:n], "tokens": batch.lengths.cpu() - 1}
    return found | ({"weight_kl": kl[n:]} if per_weight else {})
