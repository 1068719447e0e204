"""How large is the difference of two models' residual streams, where is it, and which way does it point?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.edits import ActivationChange, Edit, When
from interp.errors import InputError
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts
from interp.results import Result, analysis
from interp.sites import Site
from interp.spelling import spelled
from interp.stats import Estimate, permutation, ratio_of_means, standard_error
from interp.sweeps.asked import units
from interp.sweeps.mean_vectors import MeanVectors, prompt_weights, readouts
from interp.sweeps.projections import LEVEL, MEAN, RANDOM, TAKEN, TEXTS, effects
from interp.sweeps.residuals import MEASURES, Places, Totals, floor, stream_sites, totals
from interp.sweeps.similarity import similarity
from interp.sweeps.staged import grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import ModelPair

SIDES = ("base", "tuned")
VARIANTS = ("all dimensions", "without outliers")
VECTORS = ("difference", "mean of base", "mean of tuned")
OUTLIER = 100.0
"""Variance, in units of the median dimension's, above which a dimension is an outlier."""

_FLIPS = 19  # random signs of the texts: what the mean difference would be if it were noise
_CAUSAL = 8
_LEVEL = 0.05
_SHOWN = 5
_AXIS = "blocks passed (0 is what enters the first)"


@dataclass(frozen=True, eq=False)
class ActivationDifferenceResult(Result):
    """Differences by place in the stream (``site``) and in the text (``place``).

    Prompts that share a context count as one in every error. Causal numbers come from directions of one half of the texts, judged on
    the other half, both ways round.

    Attributes:
        relative: |tuned - base| / |base|, mean over a prompt's tokens at the place; NaN without such tokens.
        cosine: of base and tuned, likewise.
        centred_cosine: after each model's mean at the place was taken away; NaN where tokens do not differ from each other.
        tokens: how many.
        group: index of each prompt's context.
        cka: unbiased linear CKA, 1 for a rotated copy and 0 for unrelated streams.
        cka_se: its standard error, to first order.
        spread: variance of each dimension in units of the median dimension's, the larger of both models.
        difference: mean of tuned - base.
        base_mean: mean of base.
        half_cosine: of the mean differences of two halves of the texts; near 0 where the mean is noise.
        constant: share of the mean squared difference that is the mean difference, from both halves, so that noise adds nothing.
        flipped: length of the mean difference when every text's sign is drawn at random.
        readout: tokens that a vector reads out through ``W_U (gamma * vector)``, largest first, at both ends; -1 for a zero vector.
        score: what the vector adds to their logits, before the final norm's division.
        concentration: |logit - mean| / s.d. over the vocabulary of the strongest token.
        varied_concentration: the same of directions in which texts deviate from the mean difference: their deviations with random signs.
        random_concentration: the same of random directions.
        loss: tuned's, nats per token, with a direction projected out at one site.
        kl: KL(tuned || tuned without it).
        own_loss: of base and tuned as they are.
        own_kl: KL(tuned || base).
        added_kl: KL(tuned || base with a vector added).
        floor: a model against itself: the relative norm, and 1 less the centred cosine and CKA, on some of the prompts.
        lacking: a half-precision model's float32 copy did not fit the memory, so the floor lacks its rounding.
        place: whose mean difference the causal numbers and the readout shown are about.
        vocabulary: id -> text of the tokens read out.
        shared: number of token ids compared.
        first: tokens that count as the first.
        labels: of the axes.
    """

    relative: Float[Tensor, "site place prompt"]
    cosine: Float[Tensor, "site place prompt"]
    centred_cosine: Float[Tensor, "site place prompt"]
    tokens: Int[Tensor, "place prompt"]
    group: Int[Tensor, " prompt"]
    cka: Float[Tensor, "variant site place"]
    cka_se: Float[Tensor, "variant site place"]
    spread: Float[Tensor, "site d_model"]
    difference: Float[Tensor, "site place d_model"]
    base_mean: Float[Tensor, "site place d_model"]
    half_cosine: Float[Tensor, "site place"]
    constant: Float[Tensor, "site place"]
    flipped: Float[Tensor, "flip site place"]
    readout: Int[Tensor, "vector end site place rank"]
    score: Float[Tensor, "vector end site place rank"]
    concentration: Float[Tensor, "vector site place"]
    varied_concentration: Float[Tensor, "flip site place"]
    random_concentration: Float[Tensor, " flip"]
    loss: Float[Tensor, "way causal prompt"]
    kl: Float[Tensor, "way causal prompt"]
    own_loss: Float[Tensor, "side prompt"]
    own_kl: Float[Tensor, " prompt"]
    added_kl: Float[Tensor, "added causal prompt"]
    floor: Float[Tensor, "measure side site"]
    lacking: bool
    place: str
    vocabulary: dict[int, str]
    shared: int
    first: int
    labels: dict[str, tuple[str, ...]]

    @property
    def outliers(self) -> dict[str, list[int]]:
        """Dimensions left out in the second variant of CKA, by site, those of the largest variance first."""
        order = self.spread.argsort(dim=1, descending=True).tolist()
        return {
            site: [d for d in row if float(self.spread[i, d]) > OUTLIER]
            for i, (site, row) in enumerate(zip(self.labels["site"], order, strict=True))
        }

    @property
    def beyond(self) -> bool:
        """Whether the streams differ by more than rounding anywhere."""
        limit = self.floor[0].amax(0)
        size = torch.stack([torch.stack([self._mean(self.relative, i, k)[0] for k in self._all_places]) for i in self._sites])
        return bool((size > limit[:, None]).any())

    @property
    def _sites(self) -> range:
        return range(len(self.labels["site"]))

    @property
    def _all_places(self) -> range:
        return range(len(self.labels["place"]))

    def _place(self, name: str | None) -> int:
        name = self.place if name is None else name
        if name not in self.labels["place"]:
            raise unknown("place", name, self.labels["place"])
        return self.labels["place"].index(name)

    def _mean(self, values: Tensor, site: int, place: int) -> tuple[Tensor, Tensor]:
        """Mean over tokens and its standard error, contexts being the independent units."""
        return _mean_of_tokens(values[site, place], self.tokens[place], self.group)

    def _curve(self, values: Tensor, place: int) -> tuple[Tensor, Tensor]:
        both = [self._mean(values, i, place) for i in self._sites]
        return torch.stack([m for m, _ in both]), torch.stack([e for _, e in both])

    def _per_context(self, values: Tensor) -> Tensor:
        """Means over the prompts of each context, of prompts that have a value."""
        return _context_means(values, self.group)

    @property
    def changes(self) -> Float[Tensor, "context way causal"]:
        """Change of tuned's loss, by context."""
        return self._per_context(self.loss - self.own_loss[1])

    def moved(self, way: int = 0) -> Estimate:
        """Share of KL(tuned || base) that is gone when a vector is added to base: of the mean difference, or of a control."""
        left = self.added_kl[way]
        tried = ~left.isnan().all(0)
        if not bool(tried.any()):
            nothing = torch.full(left.shape[:1], torch.nan, dtype=torch.float64)
            return Estimate(nothing, nothing, nothing, "no vector was added")
        start, left = (self._per_context(torch.where(tried, x, torch.nan)) for x in (self.own_kl, left))
        return ratio_of_means(start[:, None] - left, start)

    def undone(self) -> tuple[str, Estimate] | None:
        """The site at which adding the mean difference to base undoes most of KL(tuned || base), and which share.

        None where at no site the interval of that share lies above 0 and above what vectors between texts, as long, undo. The interval
        is that of one site, as it would be had that site been chosen beforehand.
        """
        if not self.beyond or not self.measured:
            return None
        shift = self.moved()
        controls = torch.stack([torch.zeros_like(shift.value), *(self.moved(w).value for w in range(1, len(self.labels["added"])))])
        clear = shift.low > controls.nan_to_num(0.0).amax(0)  # not where an end is NaN
        if not bool(clear.any()):
            return None
        best = int(shift.value.masked_fill(~clear, -math.inf).argmax())
        return self.labels["causal"][best], Estimate(shift.value[best], shift.low[best], shift.high[best])

    @property
    def measured(self) -> bool:
        """What directions do was measured somewhere: it needs two contexts, sites, and a difference there."""
        return bool(self.labels["causal"]) and not bool(self.loss[0].isnan().all())

    def _ways(self, kind: str) -> list[int]:
        return [
            i
            for i, name in enumerate(self.labels["way"])
            if name == kind or name in (f"{kind} {n}" for n in range(len(self.labels["way"])))
        ]

    # ---- words and tables

    def summary(self) -> str:
        """The largest relative norm, what of it is one direction, and what that direction does."""
        k = self._place(None)
        mean, error = self._curve(self.relative, k)
        n = units(self.group, "text")
        limit = float(self.floor[0].max())
        if not self.beyond:
            return (
                f"No difference beyond rounding: the residual streams differ by at most {float(mean.max()):.2g} of base's norm "
                f"({self.place}, {n}), a model from itself by {limit:.2g}"
            )
        at = int(mean.argmax())
        told = (
            f"The residual streams differ by up to {float(mean[at]):.3g}{_error(error[at])} of base's norm ({self.labels['site'][at]}, "
            f"{self.place}, {n}; numerical floor {limit:.1g}), unbiased CKA there is {_number(self.cka[0, at, k])}"
            f"{_error(self.cka_se[0, at, k])}; a constant shift is {_percent(self.constant[at, k])} of the squared difference (cosine of "
            f"two halves of the texts {_number(self.half_cosine[at, k])})"
        )
        return f"{told}; {self._causal_words()}"

    def _causal_words(self) -> str:
        if not self.measured:
            return "what the shift does was not measured"
        change = self.changes
        mean, error = change.nanmean(0), standard_error(change)
        at = int(mean[0].abs().nan_to_num(0.0).argmax())
        low, high = (float(end) for end in _ends(mean[self._controls, at]))
        told = (
            f"projecting it out of tuned changes the loss most at {self.labels['causal'][at]}, by {float(mean[0, at]):+.2g}"
            f"{_error(error[0, at])} nats per token, {self._more(at)} control directions ({low:+.2g} to {high:+.2g})"
        )
        if bool(self.moved().value.isnan().all()):
            return told
        if (found := self.undone()) is None:
            return f"{told}, and adding it to base undoes no clear share of KL(tuned || base) at any site"
        return f"{told}, and adding it to base at {found[0]} leaves {_left(found[1])} of KL(tuned || base)"

    @property
    def _controls(self) -> list[int]:
        return self._ways(RANDOM) + self._ways(TEXTS)

    def _whole(self) -> list[int]:
        """Sites at which the mean difference could be projected out on every context."""
        change = self.changes[:, 0]
        return [c for c in range(change.shape[1]) if not bool(change[:, c].isnan().any())]

    def _more(self, at: int) -> str:
        """Whether the loss changes by more than without any control direction, beyond the noise between contexts.

        Held against the control that changes it most. Both the change and what it has over that control are tested at every site.
        """
        sites, change = self._whole(), self.changes
        size = change * change.nanmean(0).sign()  # so that the larger one is above
        control = size[:, self._controls].nan_to_num(0.0)
        strongest = control.mean(0).argmax(0)
        over = size[:, 0] - control.gather(1, strongest.expand(len(control), 1, -1))[:, 0]
        if not bool(over[:, at].nanmean() > 0):
            return "no more than"
        if at not in sites:
            return "beside"
        here, tests = sites.index(at), [permutation(x[:, sites]) for x in (change[:, 0], over)]
        clear = all(float(test.adjusted[here]) <= _LEVEL for test in tests)
        return "more than" if clear else "within the noise between texts no more than"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per site and place; ``per="prompt"``: also per prompt, where it has tokens there.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        rows = []
        outliers = list(self.outliers.values())
        for i, site in enumerate(self.labels["site"]):
            for k, place in enumerate(self.labels["place"]):
                where = {"site": site, "place": place}
                if per:
                    columns = {name: getattr(self, name)[i, k] for name in ("relative", "cosine", "centred_cosine")}
                    there = self.tokens[k].nonzero()[:, 0].tolist()
                    rows += [
                        where | {"prompt": p, "tokens": int(self.tokens[k, p])} | {c: float(v[p]) for c, v in columns.items()}
                        for p in there
                    ]
                    continue
                row: dict[str, object] = {**where, "tokens": int(self.tokens[k].sum()), "prompts": int((self.tokens[k] > 0).sum())}
                for name in ("relative", "cosine", "centred_cosine"):
                    mean, error = self._mean(getattr(self, name), i, k)
                    row |= {name: float(mean), f"{name}_se": float(error)}
                row |= {"floor": float(self.floor[0, :, i].max())}
                for v, suffix in enumerate(("", "_without_outliers")):
                    row |= {f"cka{suffix}": float(self.cka[v, i, k]), f"cka{suffix}_se": float(self.cka_se[v, i, k])}
                row |= {"outliers": len(outliers[i]), "norm": float(self.difference[i, k].norm())}
                row |= {"norm_flipped": float(self.flipped[:, i, k].mean()), "half_cosine": float(self.half_cosine[i, k])}
                row |= {"constant": float(self.constant[i, k]), "concentration": float(self.concentration[0, i, k])}
                rows.append(row | {"concentration_varied": float(self.varied_concentration[:, i, k].nanmean())})
        return pd.DataFrame(rows)

    def effects(self) -> pd.DataFrame:
        """What directions do, one row per site and way: change of tuned's loss, and KL, without them; errors over contexts.

        No rows where that was not measured.
        """
        import pandas as pd

        columns = ["site", "way", "loss_change", "loss_change_se", "kl"]
        if not self.measured:
            return pd.DataFrame(columns=columns)
        change, kl = self.changes, self._per_context(self.kl)
        errors = standard_error(change)
        rows = [
            {
                "site": site,
                "way": way,
                "loss_change": float(change[:, w, c].nanmean()),
                "loss_change_se": float(errors[w, c]),
                "kl": float(kl[:, w, c].nanmean()),
            }
            for c, site in enumerate(self.labels["causal"])
            for w, way in enumerate(self.labels["way"])
        ]
        return pd.DataFrame(rows, columns=columns)

    def strongest(self, n: int = 10) -> pd.DataFrame | None:
        """Sites where projecting the mean difference out changes tuned's loss most, beside control directions."""
        import pandas as pd

        if not self.measured:
            return None
        change, controls, alive = self.changes, self._controls, self._whole()
        errors, moved = standard_error(change), self.moved()
        tested = permutation(change[:, 0, alive])
        rows = []
        for j, c in enumerate(alive):
            low, high = _ends(change[:, controls, c].nanmean(0))
            row = {"site": self.labels["causal"][c], "effect": float(change[:, 0, c].mean()), "effect_se": float(errors[0, c])}
            row |= {"control_low": float(low), "control_high": float(high)}
            row |= {"p": float(tested.p[j]), "p_adjusted": float(tested.adjusted[j])}
            rows.append(row | {"moved": float(moved.value[c]), "low": float(moved.low[c]), "high": float(moved.high[c])})
        return pd.DataFrame(rows).sort_values("effect", key=lambda e: -e.abs(), ignore_index=True).head(n)

    # ---- what to change

    def edit(
        self,
        layer: int | str | Site,
        *,
        place: str | None = None,
        sign: Literal[1, -1] = 1,
        scale: float = 1.0,
        position: str | int | None = None,
        at: When = "all",
    ) -> Edit:
        """Steering: the mean difference added to the stream, for base; with ``sign=-1`` taken away again, for tuned.

        Args:
            layer: the stream that leaves this block, or a site of ``labels["site"]``.
            place: whose mean difference; by default that of ``place``.
            sign: 1 or -1.
            scale: how many times.
            position: one position of the prompts; None is all.
            at: during generation: the prompt's positions, the new tokens, or both.

        Raises:
            InputError: no such site, place or sign, or the models do not differ there.
        """
        site = Site("resid_post", layer) if isinstance(layer, int) and layer >= 0 else Site.parse(str(layer))
        if str(site) not in self.labels["site"]:
            raise unknown("site", str(site), self.labels["site"])
        if sign not in (1, -1):
            raise InputError(f"sign is 1 (add the difference) or -1 (take it away), but it is {sign!r}")
        value = self.difference[self.labels["site"].index(str(site)), self._place(place)]
        if not bool(value.norm() > 0):
            raise InputError(f"the models do not differ at {site} ({place or self.place}), so there is nothing to add")
        name = f"{'+' if sign > 0 else '-'}{scale:g} mean difference at {site}"
        return Edit((ActivationChange(site.at(position), "add", (sign * scale * value).float(), at),), name)

    # ---- figures

    def plot(self) -> go.Figure:
        """Relative size of the difference by layer and place in the text."""
        means, bands = self._curves(self.relative)
        return plots.lines(
            means,
            bands=bands,
            title="How large is the difference of the residual streams?",
            xlabel=_AXIS,
            ylabel="|tuned - base| / |base| ± 2 s.e.",
            floor=float(self.floor[0].max()),
        )

    def figures(self) -> dict[str, go.Figure]:
        """Size, direction, geometry, how constant it is, and what it does."""
        means, bands = self._curves(1 - self.centred_cosine)
        drawn = {
            "Size": self.plot(),
            "Direction": plots.lines(
                means,
                bands=bands,
                title="Does what differs between tokens point elsewhere?",
                xlabel=_AXIS,
                ylabel="1 - centred cosine ± 2 s.e.",
                floor=float(self.floor[1].max()),
            ),
            "Geometry": self._geometry(),
            "A constant shift": self._shift(),
        }
        if self.measured:
            drawn |= {
                "Without the shift": self._loss_figure((TAKEN, LEVEL, RANDOM), "Loss of tuned without the shift's direction"),
                "Without other directions": self._loss_figure((TAKEN, MEAN, TEXTS), "Loss of tuned without directions that carry much"),
                "Base with the shift": self._moved_figure(),
            }
        return drawn

    def _curves(self, values: Tensor) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Means by site with bands, of the places that no two share."""
        parts = [k for k, name in enumerate(self.labels["place"]) if name not in ("all", "after token 0")]
        found = {f"{self.labels['place'][k]} (n={int(self.tokens[k].sum())})": self._curve(values, k) for k in parts}
        found = {name: both for name, both in found.items() if not bool(both[0].isnan().all())} or found
        return {name: m for name, (m, _) in found.items()}, {name: (m - 2 * e, m + 2 * e) for name, (m, e) in found.items()}

    def _geometry(self) -> go.Figure:
        dropped = bool((self.spread > OUTLIER).any())
        places = [name for name in ("all", self.place) if name in self.labels["place"]]
        cells = {
            (f"{place}, {variant}" if dropped else place): (v, self._place(place))
            for place in dict.fromkeys(places)
            for v, variant in enumerate(VARIANTS[: 1 + dropped])
        }
        apart = {name: 1 - self.cka[v, :, k] for name, (v, k) in cells.items()}
        errors = {name: self.cka_se[v, :, k] for name, (v, k) in cells.items()}
        return plots.lines(
            apart,
            bands={name: (apart[name] - 2 * e, apart[name] + 2 * e) for name, e in errors.items()},
            title="Do tokens lie differently to each other?",
            xlabel=_AXIS,
            ylabel="1 - unbiased CKA ± 2 s.e.",
            floor=float(self.floor[2].max()),
        )

    def _shift(self) -> go.Figure:
        k = self._place(None)
        return plots.lines(
            {
                "share of the squared difference": self.constant[:, k],
                "cosine of the shifts of two halves of the texts": self.half_cosine[:, k],
            },
            title=f"Is the difference the same at every token? ({self.place})",
            xlabel=_AXIS,
            ylabel="share, cosine",
        )

    def _at(self) -> list[int]:
        return [self.labels["site"].index(site) for site in self.labels["causal"]]

    def _loss_figure(self, shown: Sequence[str], title: str) -> go.Figure:
        change = self.changes
        mean, error = change.nanmean(0), standard_error(change)
        series, bands = {}, {}
        for kind in shown:
            ways = self._ways(kind)
            if kind in (RANDOM, TEXTS):
                name = f"{'random directions' if kind == RANDOM else 'directions between texts'} (mean; band: all {len(ways)})"
                series[name], bands[name] = mean[ways].nanmean(0), _ends(mean[ways])
            else:
                name = {TAKEN: "mean difference", LEVEL: "mean difference, its component set to base's mean"}.get(kind, kind)
                series[name], bands[name] = mean[ways[0]], (mean[ways[0]] - 2 * error[ways[0]], mean[ways[0]] + 2 * error[ways[0]])
        return plots.lines(series, self._at(), bands=bands, title=title, xlabel=_AXIS, ylabel="change of tuned's loss, nats per token")

    def _moved_figure(self) -> go.Figure:
        shift, controls = self.moved(), [self.moved(w).value for w in range(1, len(self.labels["added"]))]
        draws = torch.stack(controls)
        name = f"as long, between texts (mean; band: all {len(draws)})"
        return plots.lines(
            {"mean difference": shift.value, name: draws.nanmean(0)},
            self._at(),
            bands={"mean difference": (shift.low, shift.high), name: _ends(draws)},
            title="Does the shift alone move base to tuned?",
            xlabel=_AXIS,
            ylabel="share of KL(tuned || base) gone",
        )

    def html(self) -> str | None:
        """What the mean difference reads out as, at some sites, beside the means of both models."""
        if not self.beyond:
            return None
        k, last = self._place(None), len(self.labels["site"]) - 1
        shown = sorted({round(i * last / (_SHOWN - 1)) for i in range(_SHOWN)})
        head = ("site", "vector", "raises the logits of", "lowers the logits of", "concentration")
        rows = []
        for i in shown:
            for v, vector in enumerate(VECTORS[:2]):
                ends = [
                    " ".join(f"<code>{plots.visible(self.vocabulary[int(t)], 24)}</code>" for t in self.readout[v, e, i, k] if t >= 0)
                    for e in (0, 1)
                ]
                told = _number(self.concentration[v, i, k])
                rows.append((self.labels["site"][i], vector, *(end or "nothing: it is 0" for end in ends), told))
        limit = torch.maximum(self.varied_concentration[..., k].nan_to_num(0.0).amax(0), self.random_concentration.max())
        beyond = (self.concentration[0, :, k] > limit).nonzero()[:, 0].tolist()
        verdict = f"It stands out of all of these at {', '.join(self.labels['site'][i] for i in beyond) or 'no site'}."
        named = [f"{site}: {', '.join(map(str, dims))}" for site, dims in self.outliers.items() if dims]
        varying = (
            f"Left out of the second CKA are dimensions that vary more than {OUTLIER:g} times as the median one: {'; '.join(named)}."
            if named
            else f"No dimension varies more than {OUTLIER:g} times as the median one (at most {_number(self.spread.max())} times)."
        )
        control = (
            f"{_number(self.varied_concentration[:, shown, k].nanmean())} for directions in which single texts deviate from it, "
            f"{_number(self.random_concentration.mean())} for random directions"
        )
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        return (
            f"<h4>What the mean difference ({plots.escape(self.place)}) says through the unembedding</h4>"
            f"<p>Tokens whose logits the vector raises and lowers most, read with tuned's W_U (final norm's gain, no bias). "
            f"Concentration: how many standard deviations the strongest token stands out of the vocabulary; {control}. "
            f"{verdict} Early layers rarely read out as words.</p>"
            f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{body}</table><p>{varying}</p>"
        )


@analysis(version=1)
def activation_difference(
    pair: ModelPair,
    prompts: Prompts,
    *,
    first: int = 10,
    top: int = 10,
    causal: tuple[int, ...] | None = None,
    draws: int = 4,
    seed: int = 0,
) -> ActivationDifferenceResult:
    """How large is the difference of the two models' residual streams, where is it, and which way does it point?

    Both models read the same tokens. What enters the first block and leaves each of them is compared by place in the text: the very
    first token (where attention often parks massive activations), the others of the ``first``, the later ones. Relative norm and
    cosines are means over tokens; CKA is linear with the unbiased HSIC (Kornblith et al. 2019, arXiv 1905.00414; Song et al. 2012),
    exact over all tokens, and again without dimensions whose variance exceeds 100 times the median one's, since a single such
    dimension makes any two models look alike.

    The mean difference is read out through ``W_U (gamma * vector)`` of tuned, without the norm's bias (as in Minder et al. 2025, arXiv
    2510.13900). Its controls: the models' mean activations, random directions, and the mean difference with every text's sign drawn
    at random, which is what noise alone would leave. What it does: the loss of tuned when its component is projected out of the
    stream at every position (or set to base's mean), beside projections of base's mean, of random directions, and of random combinations
    of the texts' mean activations; and how much of KL(tuned || base) goes when it is added to base. Directions come from one half of
    the texts (by context) and are judged on the other.

    Args:
        pair: the two models.
        prompts: texts. A position ``response`` says where the response starts, ``template`` which tokens are template.
        first: how many tokens, from the response or the text on, count as the first.
        top: tokens read out at each end.
        causal: layers whose output the directions are projected out of; by default all, of more than 8 eight spread evenly; an empty
            tuple leaves this part out. It is the part that takes most of the time.
        draws: random directions of each kind.
        seed: of the halves, signs and directions.

    Raises:
        InputError: a setting out of range, pairs of prompts, prompts that do not fit the models, or models loaded one at a time.
    """
    if pair.one_at_a_time:
        raise InputError("activation_difference needs both models at once, but the pair is loaded one at a time")
    if isinstance(prompts, PromptPairs):
        raise InputError("activation_difference reads one text at a time; give the clean or the corrupt prompts of the pairs")
    for name, value in (("first", first), ("top", top), ("draws", draws)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, but it is {value!r}")
    layers = _layers(causal, pair.shape.n_layers)
    batch = pair.batch(prompts)
    sites, places = stream_sites(pair.shape.n_layers), Places.of(batch, first)
    contexts = tuple(getattr(prompts, "contexts", ())) or tuple(map(str, range(len(batch))))
    group = grouped(contexts)
    weights = prompt_weights(contexts, group, max(draws, _FLIPS), seed)
    found = totals(pair, batch, sites, places, weights)
    spread = _spread(found)
    alike = similarity(pair, batch, sites, places, found, spread <= OUTLIER, group)
    vectors = MeanVectors.of(found, weights)
    read = readouts(pair, vectors, top, seed)
    does = effects(pair, batch, weights[1] > 0, vectors, layers, places.names.index(places.behind), draws, seed)
    limits, lacking = floor(pair, batch, sites)
    known = sorted({int(i) for i in read["readout"].unique() if i >= 0})
    count = found.tokens.double()
    tensors = {
        "relative": found.relative / count,
        "cosine": found.cosine / count,
        "centred_cosine": alike.centred_cosine / count,
        "tokens": found.tokens,
        "group": group,
        "cka": alike.cka,
        "cka_se": alike.cka_se,
        "spread": spread,
        "difference": vectors.difference.float(),
        "base_mean": vectors.base.float(),
        "half_cosine": vectors.half_cosine,
        "constant": vectors.constant(found),
        "flipped": vectors.flipped.norm(dim=-1),
        "floor": limits,
        **read,
        **does,
    }
    return ActivationDifferenceResult(
        **{name: x.contiguous() for name, x in tensors.items()},  # as when loaded again, so that means round alike
        lacking=lacking,
        place=places.behind,
        vocabulary=dict(zip(known, spelled(pair.base, known), strict=True)),
        shared=pair.shared_vocab,
        first=first,
        labels={
            "site": tuple(map(str, sites)),
            "place": places.names,
            "side": SIDES,
            "variant": VARIANTS,
            "vector": VECTORS,
            "end": ("+", "-"),
            "measure": MEASURES,
            "causal": tuple(str(Site("resid_post", layer)) for layer in layers),
            "way": (TAKEN, LEVEL, MEAN, *(f"{kind} {i}" for kind in (RANDOM, TEXTS) for i in range(draws))),
            "added": (TAKEN, *(f"{TEXTS} {i}" for i in range(draws))),
        },
    )


def _layers(causal: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if causal is None:
        return tuple(range(n)) if n <= _CAUSAL else tuple(round(i * (n - 1) / (_CAUSAL - 1)) for i in range(_CAUSAL))
    for layer in causal:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n:
            raise InputError(f"causal names layers, 0 to {n - 1}, but it has {layer!r}")
    return tuple(sorted(set(causal)))


def _spread(found: Totals) -> Float[Tensor, "site d_model"]:
    """Variance of every dimension over all tokens in units of the median one's; the larger of both models."""
    n = found.tokens[0].sum()  # the first place is all of them
    means = torch.stack([found.base[0, :, 0], found.base[0, :, 0] + found.difference[0, :, 0]]) / n
    variance = (found.squares[:, :, 0] / n - means.square()).clamp_min(0)
    median = variance.median(-1, keepdim=True).values
    return torch.where(median > 0, variance / median, torch.where(variance > 0, 0.0, 0.0)).amax(0)


def _mean_of_tokens(mean: Tensor, count: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tokens, and its standard error as of a ratio of sums over contexts; NaN for a single one."""
    there = (count > 0) & ~mean.isnan()
    number = torch.where(there, count, 0).double()
    by = torch.zeros(2, int(group.max()) + 1, dtype=torch.float64)
    by.index_add_(1, group, torch.stack([number, torch.where(there, mean * count, 0.0).double()]))
    number, total = by[:, by[0] > 0]
    value = total.sum() / number.sum()
    m = len(number)
    if m < 2:
        return value, torch.full_like(value, torch.nan)
    return value, ((total - value * number).square().sum() * m / (m - 1)).sqrt() / number.sum()


def _context_means(values: Tensor, group: Tensor) -> Tensor:
    """[.. prompt] to [context ..]."""
    there = ~values.isnan()
    live = there.reshape(-1, values.shape[-1]).any(0)
    size = int(group.max()) + 1
    sums, counts = (torch.zeros(*values.shape[:-1], size, dtype=torch.float64) for _ in range(2))
    sums.index_add_(-1, group, values.nan_to_num(0.0).double())
    counts.index_add_(-1, group, there.double())
    return (sums / counts).movedim(-1, 0)[group[live].unique()]


def _ends(draws: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of some draws; those without a number do not count."""
    low, high = draws.nan_to_num(math.inf).amin(0), draws.nan_to_num(-math.inf).amax(0)
    return low.masked_fill(low.isinf(), math.nan), high.masked_fill(high.isinf(), math.nan)


def _number(x: Tensor) -> str:
    return "undefined" if bool(x.isnan()) else f"{float(x):.3g}"


def _error(x: Tensor) -> str:
    return "" if bool(x.isnan()) else f" +- {float(x):.2g}"


def _percent(x: Tensor) -> str:
    return "an unknown share" if bool(x.isnan()) else f"{100 * float(x):.0f} %"


def _left(moved: Estimate) -> str:
    value, low, high = (100 * (1 - float(x)) for x in (moved.value, moved.high, moved.low))
    return f"{value:.0f} [{low:.0f}, {high:.0f}] %"
