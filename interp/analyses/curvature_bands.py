"""Do memorised texts lie along flatter directions of the weights than other texts?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.models.curvature import Eigenbases, check_mass, grid, wanted_sites
from interp.models.curvature_bands import READINGS, Reader, Rows, bands, continued, per_prompt, strengths, thinned
from interp.progress import progress
from interp.prompts import PromptPairs, Prompts
from interp.prompts.encoding import continuations, encode
from interp.results import Result, analysis
from interp.stats import Estimate, resample_counts

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel
    from interp.models.factors import Factors

SETS = ("clean", "memorised")
NORMS = ("raw", "unit")
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class CurvatureBandsResult(Result):
    """How strongly the inputs of every matrix lie in bands of its pairs of directions, for two sets of texts.

    Bands are shares of the list of all pairs, sharpest first. Readings: ``read`` is the mean of |x . v| over the band's pairs, v being the
    pair's eigenvector of A, so that one that is in many pairs counts many times; ``through`` is |x C_b|, what the part of the matrix within
    the band makes of x. ``unit`` divides both by |x|. NaN for a band without pairs.

    Attributes:
        clean: sums over the positions of each clean prompt.
        memorised: sums over the positions of each memorised prompt.
        clean_tokens: number of positions that were read in each prompt.
        memorised_tokens: the same.
        norm: mean |x| of both sets.
        place: mean index of the positions read in both sets.
        above_rounding: share of the pairs whose curvature is above rounding; bands beyond it are noise.
        ends: where the bands end, as shares of the list.
        positions: over which the factors are means.
        seed: of the resampling, and of the clean positions.
        labels: of the axes reading, norm_of, weight, band and set.
    """

    clean: Float[Tensor, "reading norm_of weight band clean_prompt"]
    memorised: Float[Tensor, "reading norm_of weight band memorised_prompt"]
    clean_tokens: Int[Tensor, " clean_prompt"]
    memorised_tokens: Int[Tensor, " memorised_prompt"]
    norm: Float[Tensor, "weight set"]
    place: Float[Tensor, " set"]
    above_rounding: Float[Tensor, " weight"]
    ends: tuple[float, ...]
    positions: int
    seed: int
    labels: dict[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights."""
        return self.labels["weight"]

    @property
    def strength(self) -> Float[Tensor, "set reading norm_of weight band"]:
        """Mean over positions."""
        return torch.stack([self.clean.sum(-1) / self.clean_tokens.sum(), self.memorised.sum(-1) / self.memorised_tokens.sum()])

    def ratio(self, reading: str = "read", norm: str = "raw") -> Estimate:
        """Strength in memorised over clean texts, [weight band]; the interval resamples the prompts of each set."""
        at = self._at(reading, norm)
        return _ratio(self.memorised[at], self.memorised_tokens, self.clean[at], self.clean_tokens, self.seed)

    def overall(self, reading: str = "read", norm: str = "raw") -> Estimate:
        """Geometric mean of ``ratio`` over the matrices, [band]; the interval resamples prompts, the same for all matrices."""
        at = self._at(reading, norm)
        return _ratio(self.memorised[at], self.memorised_tokens, self.clean[at], self.clean_tokens, self.seed, together=True)

    def _at(self, reading: str, norm: str) -> tuple[int, int]:
        for what, value, known in (("reading", reading, READINGS), ("norm", norm, NORMS)):
            if value not in known:
                raise InputError(f"{what} is {value!r}, expected {' or '.join(known)}")
        return READINGS.index(reading), NORMS.index(norm)

    def summary(self) -> str:
        """Ratio in the flattest band beside that in the sharpest, by the first reading and with |x| = 1."""
        raw, unit, through = self.overall(), self.overall(norm="unit"), self.overall("through")
        last = len(self.labels["band"]) - 1

        sharp, flat = self.labels["band"][0], self.labels["band"][-1]
        begins = self.ends[-2] if len(self.ends) > 1 else 0.0
        noise = int((self.above_rounding <= begins).sum())
        warned = f"; in {noise} of the matrices factors of {self.positions} positions have no curvature in the {flat} but rounding"
        read = f"{int(self.memorised_tokens.sum())} and {int(self.clean_tokens.sum())} positions"
        return (
            f"{raw.at(last)} times as strong on memorised as on clean texts in the {flat} of the pairs, {raw.at(0)} in the {sharp} "
            f"(geometric mean of {len(self.names)} matrices, 95 % interval over {len(self.memorised_tokens)} and {len(self.clean_tokens)} "
            f"prompts, {read}); with |x| = 1 {unit.at(last)} and {unit.at(0)}; of what the weights' part in the band makes of x "
            f"{through.at(last)} and {through.at(0)}{warned if noise else ''}"
        )

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per matrix, band, reading and norm; ``per="prompt"``: means of every prompt of both sets.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        rows: list[dict[str, object]] = []
        for r, reading in enumerate(READINGS):
            for k, norm in enumerate(NORMS):
                found = self.ratio(reading, norm)
                for i, weight in enumerate(self.names):
                    for b, band in enumerate(self.labels["band"]):
                        row: dict[str, object] = {"weight": weight, "band": band, "reading": reading, "norm": norm}
                        if per is None:
                            values = {name: float(self.strength[s, r, k, i, b]) for s, name in enumerate(SETS)}
                            ends = {"ratio": found.value[i, b], "low": found.low[i, b], "high": found.high[i, b]}
                            rows.append(row | values | {name: float(v) for name, v in ends.items()})
                            continue
                        for name, sums, tokens in zip(
                            SETS, (self.clean, self.memorised), (self.clean_tokens, self.memorised_tokens), strict=True
                        ):
                            means = (sums[r, k, i, b] / tokens).tolist()
                            rows += [row | {"set": name, "prompt": p, "strength": value} for p, value in enumerate(means)]
        return pd.DataFrame(rows)

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """Matrices whose flattest band is most above the sharpest in memorised against clean texts, with |x| = 1."""
        import pandas as pd

        found = self.ratio(norm="unit")
        tilt = found.value[:, -1] / found.value[:, 0]
        order = tilt.nan_to_num(-1).argsort(descending=True)[:n].tolist()
        rows = []
        for i in order:
            row: dict[str, object] = {"weight": self.names[i], "flat_over_sharp": float(tilt[i])}
            for b, band in enumerate(self.labels["band"]):
                row |= {band: float(found.value[i, b]), f"{band}, low": float(found.low[i, b]), f"{band}, high": float(found.high[i, b])}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Memorised over clean by band, both readings, raw and with |x| = 1."""
        kinds = [(r, k) for r in READINGS for k in NORMS]
        found = {f"{r}, {'|x| = 1' if k == 'unit' else 'raw'}": self.overall(r, k) for r, k in kinds}
        return plots.bars(
            self.labels["band"],
            {name: e.value for name, e in found.items()},
            intervals={name: (e.low, e.high) for name, e in found.items()},
            title="Strength on memorised over clean texts by band of the curvature",
            xlabel="pairs of directions, sharpest first",
            ylabel="ratio, geometric mean of the matrices, 95 % interval",
            reference=1.0,
            reference_label="as strong",
        )

    def figures(self) -> dict[str, go.Figure]:
        """By band, and the flattest and sharpest bands by layer and module."""
        made = {"By band": self.plot()}
        for b, which in ((-1, "flattest"), (0, "sharpest")):
            found = self.ratio(norm="unit")
            cells, layers, modules = grid(self.names, found.value[:, b].log2())
            unsure, _, _ = grid(self.names, ((found.low[:, b] <= 1) & (found.high[:, b] >= 1)).double())
            made[f"In the {which} band"] = plots.heatmap(
                cells,
                modules,
                layers,
                title=f"Memorised over clean in the {which} band ({self.labels['band'][b]}), |x| = 1",
                xlabel="module",
                ylabel="layer",
                unit="log2 of the ratio; grey: the interval has 1",
                floor=unsure > 0,
                difference=True,
            )
        return made


def _ratio(top: Tensor, top_n: Tensor, below: Tensor, below_n: Tensor, seed: int, *, together: bool = False) -> Estimate:
    """Mean over the positions of one set over that of the other, [weight band]; ``together``: the geometric mean over weights, [band]."""

    def over(x: Tensor) -> Tensor:
        return x.log().nanmean(-2).exp() if together else x

    value = over((top.sum(-1) / top_n.sum()) / (below.sum(-1) / below_n.sum()))
    if min(len(top_n), len(below_n)) < 2:
        return Estimate(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
    means = []
    for i, (sums, n) in enumerate(((top, top_n), (below, below_n))):
        counts = resample_counts(len(n), seed + i, _RESAMPLES)
        means.append((counts @ sums.flatten(0, -2).T / (counts @ n.double())[:, None]).reshape(_RESAMPLES, *sums.shape[:-1]))
    low, high = over(means[0] / means[1]).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return Estimate(value, low, high)


@analysis(version=1)
def curvature_bands(
    model: HookedModel,
    clean: Prompts,
    memorised: Prompts,
    factors: Factors,
    *,
    layers: tuple[int, ...] | None = None,
    modules: tuple[str, ...] | None = None,
    ends: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0),
    tokens: Literal["targets", "all"] = "targets",
    skip: int = 1,
    seed: int = 0,
) -> CurvatureBandsResult:
    """Do memorised texts lie along flatter directions of the weights than other texts?

    All pairs of a direction read and one written are sorted by curvature and cut into bands by their share of the list. Strength is the
    mean over positions of how much of a matrix's input x lies in a band: by the eigenvectors of A in its pairs alone (the paper's
    figure; how one counts that is in many pairs is our choice), or through the weights. Merullo et al. 2025 (arXiv 2510.24256, figure 2)
    find the flattest half stronger on memorised, the sharpest tenth stronger on clean text. Norms of x differ too, so all of it
    also stands with |x| = 1.

    Args:
        model: the model that the factors are of.
        clean: texts that were not memorised.
        memorised: texts that were; with targets (what the task ``recitation`` makes) the prompts go on with these.
        factors: of the model's matrices.
        layers: which layers; None is all with factors.
        modules: which matrices; None is all with factors.
        ends: where bands end, as shares of the list of pairs, ascending to 1.
        tokens: ``targets`` reads the positions that predict the tokens of a target, of sets that have targets, ``all`` all that have a
            next token. Of the clean positions as many are drawn as there are memorised ones.
        skip: positions at the start that are left out of sets without targets: the first token's norm is mostly an outlier.
        seed: of the clean positions and the resampling.

    Raises:
        InputError: factors of another model, layers or modules without factors, ends that do not ascend to 1, or texts too short to read.
    """
    _check(ends, tokens, skip, clean, memorised)
    sites = wanted_sites(factors, layers, modules)
    factors.check(model)
    read = {name: _rows(model, prompts, tokens, skip) for name, prompts in zip(SETS, (clean, memorised), strict=True)}
    read["clean"] = thinned(read["clean"], int(read["memorised"].read.sum()), seed)
    reader, bases = Reader(model, sites), Eigenbases(factors)
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in SETS}
    norms: dict[str, list[float]] = {}
    rank: dict[str, float] = {}
    shares = reader.shares()
    for share, matrices in progress(shares.items(), "curvature bands", total=len(shares), unit="input"):
        x = {name: reader.inputs(share, rows) for name, rows in read.items()}
        for site in matrices:
            e, w = bases[site], model.weight(site).detach().cpu()
            cuts = bands(e, ends)
            norms[str(site)] = [float(x[name].double().norm(dim=1).mean()) for name in SETS]
            rank[str(site)] = float((e.mu > _tiny(e.mu)).double().mean() * (e.lam > _tiny(e.lam)).double().mean())
            for name in SETS:
                values = strengths(x[name], w, e, cuts)
                size = x[name].double().norm(dim=1)
                both = torch.stack([values, torch.where(size > 0, values / size, 0.0)], 1)
                sums[name][str(site)] = per_prompt(both, read[name])
    names = [str(site) for site in sites]
    percent = ["0", *(f"{100 * end:g}" for end in ends)]
    return CurvatureBandsResult(
        clean=torch.stack([sums["clean"][n] for n in names], 2),
        memorised=torch.stack([sums["memorised"][n] for n in names], 2),
        clean_tokens=read["clean"].read.sum(1).cpu(),
        memorised_tokens=read["memorised"].read.sum(1).cpu(),
        norm=torch.tensor([norms[n] for n in names], dtype=torch.float64),
        place=torch.stack([r.read.nonzero()[:, 1].double().mean().cpu() for r in read.values()]),
        above_rounding=torch.tensor([rank[n] for n in names], dtype=torch.float64),
        ends=tuple(map(float, ends)),
        positions=factors.n,
        seed=seed,
        labels={
            "reading": READINGS,
            "norm_of": NORMS,
            "weight": tuple(names),
            "band": tuple(f"{a} to {b} %" for a, b in zip(percent, percent[1:], strict=False)),
            "set": SETS,
        },
    )


def _check(ends: Sequence[float], tokens: str, skip: int, clean: object, memorised: object) -> None:
    for end in ends:
        check_mass(end, "end of a band")
    if not ends or list(ends) != sorted(set(ends)) or ends[-1] != 1:
        raise InputError(f"ends is {ends!r}, expected shares in ascending order up to 1, such as 0.1,0.5,1")
    if tokens not in ("targets", "all"):
        raise InputError(f"tokens is {tokens!r}, expected targets or all")
    if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
        raise InputError(f"skip is {skip!r}, expected a whole number from 0")
    if isinstance(clean, PromptPairs) or isinstance(memorised, PromptPairs):
        raise InputError("curvature_bands reads one text at a time; give the clean or the corrupt prompts of the pairs")
    for name, given in zip(SETS, (clean, memorised), strict=True):
        if not isinstance(given, Prompts):
            raise InputError(f"{name} of curvature_bands are Prompts, such as a task generates, but a {type(given).__name__} came")


def _rows(model: HookedModel, prompts: Prompts, tokens: str, skip: int) -> Rows:
    """The texts of a set and the positions that are read."""
    batch = model.batch(prompts)
    if tokens == "all" or prompts.targets is None:
        return continued(batch, None, skip)
    rows = continued(batch, continuations(model, encode(model, prompts.texts), prompts.targets))
    model.batch(rows.batch)  # still within the context
    return rows


def _tiny(values: Tensor) -> float:
    """Under it an eigenvalue is rounding."""
    return len(values) * torch.finfo(values.dtype).eps * float(values[0])
