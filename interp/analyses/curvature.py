"""How is the loss's curvature spread over the directions of every matrix?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import linalg, plots
from interp.errors import InputError
from interp.models.curvature import (
    Eigen,
    Eigenbases,
    along,
    check_mass,
    grid,
    random_sharpness,
    staircase,
    threshold,
    wanted_sites,
)
from interp.progress import progress
from interp.results import Result, analysis

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel
    from interp.models.factors import Factors

QUANTILES = (0.0001, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75)
"""Shares of the list of pairs, sharpest first, whose curvature is kept."""

_SHOWN = 6


@dataclass(frozen=True, eq=False)
class CurvatureResult(Result):
    """Spectra of the K-FAC factors of every matrix W [in, out]: of A (what it reads), of G (gradients), and of their products.

    NaN where the factors are zero and there is no curvature.

    Attributes:
        pairs: share of the pairs of directions, sharpest first, that hold a share of the curvature.
        energy: share of ||W||^2 along these pairs.
        quantile: curvature of the pair at a share of the list, over the mean of all pairs.
        mean: curvature along a random direction, tr(A) tr(G) / (in out): twice the change of the mean loss by a random unit change.
        largest: curvature of the sharpest pair, over the mean.
        read_effective: effective number of directions read, exp of the entropy of A's eigenvalues as shares.
        write_effective: the same of directions written, from G.
        read_size: number of directions read, which is the number of A's eigenvalues.
        write_size: of directions written.
        read_rank: eigenvalues of A above rounding; it cannot exceed the number of positions.
        write_rank: of G.
        mu: name of the weight -> eigenvalues of A.
        lam: name of the weight -> eigenvalues of G.
        positions: over which the factors are means.
        targets: the labels that G's gradients are for, as the factors say.
        labels: of the axes weight, mass and quantile.
    """

    pairs: Float[Tensor, "weight mass"]
    energy: Float[Tensor, "weight mass"]
    quantile: Float[Tensor, "weight quantile"]
    mean: Float[Tensor, " weight"]
    largest: Float[Tensor, " weight"]
    read_effective: Float[Tensor, " weight"]
    write_effective: Float[Tensor, " weight"]
    read_size: Int[Tensor, " weight"]
    write_size: Int[Tensor, " weight"]
    read_rank: Int[Tensor, " weight"]
    write_rank: Int[Tensor, " weight"]
    mu: dict[str, Tensor]
    lam: dict[str, Tensor]
    positions: int
    targets: str
    labels: dict[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights."""
        return self.labels["weight"]

    @property
    def masses(self) -> tuple[float, ...]:
        """Shares of the curvature asked for."""
        return tuple(map(float, self.labels["mass"]))

    @property
    def effective(self) -> Float[Tensor, " weight"]:
        """Effective number of pairs as a share of all: entropies of A and G add up."""
        return self.read_effective * self.write_effective / (self.read_size * self.write_size)

    @property
    def positions_per_dimension(self) -> Float[Tensor, " weight"]:
        """Positions over the larger number of directions. Well under 10, the small eigenvalues are noise; under 1, some are 0."""
        return self.positions / torch.maximum(self.read_size, self.write_size).double()

    def summary(self) -> str:
        """The share of pairs that holds the middle mass, energy of the weights there, and positions per dimension."""
        middle = len(self.masses) // 2
        shares, energy = self.pairs[:, middle], self.energy[:, middle]
        known = shares[~shares.isnan()]
        thin = int(self.positions_per_dimension.argmin())
        noise = (
            f"{self.positions} positions, {float(self.positions_per_dimension[thin]):.3g} per dimension of {self.names[thin]}, "
            f"labels {self.targets}"
        )
        if not len(known):
            return f"0 of {len(self.names)} matrices have any curvature ({noise})"
        top = int(self.mean.nan_to_num(-1).argmax())
        deficient = int((self.positions_per_dimension < 1).sum())
        warned = f"; {deficient} matrices have fewer positions than dimensions, so their flat directions are not known" if deficient else ""
        return (
            f"{float(known.median()):.2%} of the pairs of directions hold {self.masses[middle]:.0%} of the curvature in the median of "
            f"{len(known)} matrices ({float(known.min()):.2%} to {float(known.max()):.2%}; {noise}), with "
            f"{float(energy[~energy.isnan()].median()):.2%} of the weights' squared norm; curvature along a random direction is largest in "
            f"{self.names[top]}, {linalg.ratio(float(self.mean[top]), float(self.mean.nanmedian())):.3g} times the median{warned}"
        )

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The matrices with the highest mean curvature."""
        import pandas as pd

        order = self.mean.nan_to_num(-1).argsort(descending=True)[:n]
        columns = {
            "mean_curvature": self.mean,
            "largest_over_mean": self.largest,
            **{f"pairs_for_{m:g}": self.pairs[:, i] for i, m in enumerate(self.masses)},
            "effective_pairs": self.effective,
            "read_effective": self.read_effective,
            "write_effective": self.write_effective,
            "positions_per_dimension": self.positions_per_dimension,
        }
        return pd.DataFrame({"weight": [self.names[i] for i in order], **{k: v[order].numpy() for k, v in columns.items()}})

    def plot(self) -> go.Figure:
        """Share of the pairs that holds the middle mass, by layer and module."""
        middle = len(self.masses) // 2
        title = f"Pairs of directions that hold {self.masses[middle]:.0%} of the curvature"
        return self._heatmap(100 * self.pairs[:, middle], title, "% of the pairs")

    def figures(self) -> dict[str, go.Figure]:
        """Concentration and size of the curvature by layer and module, mass curves, spectra."""
        return {
            "How concentrated": self.plot(),
            "How sharp": self._sharp(),
            "Mass curves": self._mass_curves(),
            "Product spectra": self._quantiles(),
            "Spectra of A and G": self._spectra(),
        }

    def _sharp(self) -> go.Figure:
        live = torch.where(self.mean > 0, self.mean, torch.nan)
        unit = "log2 of the curvature along a random direction, over the median matrix's"
        return self._heatmap((live / live.nanmedian()).log2(), "Mean curvature", unit, True)

    def _heatmap(self, values: Tensor, title: str, unit: str, difference: bool = False) -> go.Figure:
        cells, layers, modules = grid(self.names, values)
        return plots.heatmap(cells, modules, layers, title=title, xlabel="module", ylabel="layer", unit=unit, difference=difference)

    def _by_module(self, values: Float[Tensor, "weight x"]) -> dict[str, Tensor]:
        """Median over layers."""
        modules = [name.rpartition(".")[2] for name in self.names]
        return {m: values[[i for i, of in enumerate(modules) if of == m]].nanmedian(0).values for m in dict.fromkeys(modules)}

    def _mass_curves(self) -> go.Figure:
        return plots.lines(
            self._by_module(self.pairs.log10()),
            torch.tensor(self.masses),
            title="Share of the pairs that holds a share of the curvature, median over layers",
            xlabel="share of the curvature",
            ylabel="log10 of the share of the pairs",
        )

    def _quantiles(self) -> go.Figure:
        values = torch.where(self.quantile > 0, self.quantile, torch.nan).log10()
        return plots.lines(
            self._by_module(values),
            torch.tensor(QUANTILES).log10(),
            title="Curvature of the pair at a share of the list, median over layers",
            xlabel="log10 of the share of the list, sharpest first",
            ylabel="log10 of curvature over the mean",
        )

    def _spectra(self) -> go.Figure:
        order = self.mean.nan_to_num(-1).argsort(descending=True)[:_SHOWN].tolist()
        series = {}
        for name in (self.names[i] for i in order):
            for what, values in (("A", self.mu[name]), ("G", self.lam[name])):
                top = float(values[0])
                series[f"{name} {what}"] = torch.where(values > 0, values / top, torch.nan) if top else torch.full_like(values, torch.nan)
        longest = max(map(len, series.values()))
        made = plots.lines(
            {k: torch.nn.functional.pad(v, (0, longest - len(v)), value=torch.nan) for k, v in series.items()},
            title="Eigenvalues of A and G, matrices with the highest mean curvature",
            xlabel="eigenvalue, from 0",
            ylabel="over the largest",
        )
        return made.update_yaxes(type="log")


@analysis(version=1)
def curvature(
    model: HookedModel, factors: Factors, *, masses: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
) -> CurvatureResult:
    """How is the curvature of the loss spread over the directions of every matrix?

    The curvature in a matrix W [in, out] is taken as A kron G: A is the second moment of what it reads, G that of the gradient by what it
    writes. A pair of an eigenvector of each has the product of their eigenvalues. Says for every matrix which share of the pairs holds
    which share of the curvature, how much of W lies there, and quantiles of the products, without making a table of them. Small
    eigenvalues need many positions: their number per dimension stands beside the result (Merullo et al. 2025, arXiv 2510.24256).

    Args:
        model: the model that the factors are of.
        factors: of its matrices.
        masses: shares of the curvature, ascending; the one in the middle is in the summary.

    Raises:
        InputError: factors of another model, or a mass outside of (0, 1].
    """
    for mass in masses:
        check_mass(mass)
    if not masses or list(masses) != sorted(set(masses)):
        raise InputError(f"masses is {masses!r}, expected shares in ascending order, such as 0.5,0.9")
    sites = wanted_sites(factors)
    factors.check(model)
    bases, rows = Eigenbases(factors), []
    mu: dict[str, Tensor] = {}
    lam: dict[str, Tensor] = {}
    for site in progress(sites, "curvature", total=len(sites), unit="matrix"):
        e = bases[site]
        mu[str(site)], lam[str(site)] = e.mu, e.lam
        rows.append(_numbers(e, model.weight(site).detach().cpu(), masses))
    floats = ("mean", "largest", "read_effective", "write_effective")
    whole = ("read_size", "write_size", "read_rank", "write_rank")
    return CurvatureResult(
        **{k: torch.stack([row[k] for row in rows]) for k in ("pairs", "energy", "quantile")},
        **{k: torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in floats},
        **{k: torch.tensor([row[k] for row in rows]) for k in whole},
        mu=mu,
        lam=lam,
        positions=factors.n,
        targets=str(factors.meta.get("labels", "not known")),
        labels={
            "weight": tuple(map(str, sites)),
            "mass": tuple(f"{m:g}" for m in masses),
            "quantile": tuple(f"{q:g}" for q in QUANTILES),
        },
    )


def _numbers(e: Eigen, w: Tensor, masses: tuple[float, ...]) -> dict:
    """Of one matrix."""
    size = len(e.mu) * len(e.lam)
    mean = float(random_sharpness(e).mean)
    found = {
        "mean": mean,
        "read_effective": linalg.effective_rank(e.mu),
        "write_effective": linalg.effective_rank(e.lam),
        "read_size": len(e.mu),
        "write_size": len(e.lam),
        "read_rank": _rank(e.mu),
        "write_rank": _rank(e.lam),
    }
    if not mean:
        nothing = torch.full((len(masses),), torch.nan, dtype=torch.float64)
        none = torch.full((len(QUANTILES),), torch.nan, dtype=torch.float64)
        return {**found, "largest": torch.nan, "pairs": nothing, "energy": nothing, "quantile": none}
    cuts = [staircase(e.lam, e.mu, mass) for mass in masses]
    norm = linalg.norm(w) ** 2
    inside = along(w, e, cuts).energy.cumsum(0)
    return {
        **found,
        "largest": float(e.mu[0] * e.lam[0]) / mean,
        "pairs": torch.tensor([int(c.sum()) / size for c in cuts], dtype=torch.float64),
        "energy": inside / norm if norm else torch.full_like(inside, torch.nan),
        "quantile": torch.tensor([threshold(e.lam, e.mu, q) / mean for q in QUANTILES], dtype=torch.float64),
    }


def _rank(values: Tensor) -> int:
    """Eigenvalues above rounding."""
    return int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())
