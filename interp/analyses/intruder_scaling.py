"""What do intruder dimensions do: for the task that was tuned on, and for other text?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp import plots
from interp.edits import Edit
from interp.errors import InputError
from interp.models.intruders import Compared, Settings, Side, block_changes, check, compared, intruders, narrow, normal, scaled_components
from interp.progress import progress
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.sites import Site
from interp.stats import Estimate, bootstrap, paired_change, permutation, standard_error, wilson
from interp.sweeps.answers import Among, margin
from interp.sweeps.plain import run

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

KINDS = ("intruders", "others", "random")
_CELLS = 2**24  # tokens x vocabulary held at a time

Part = tuple[Site, Tensor, Tensor, Tensor]  # site, what is read [rows n], singular values [n], what is written [n cols]


@dataclass(frozen=True, eq=False)
class IntruderScalingResult(Result):
    """Answers and text at every strength of components of tuned's weights.

    Attributes:
        margin: logit of the answer less the largest other, at END; right where above 0.
        loss: mean negative log-probability of a text's tokens, nats.
        tuned_margin: of tuned as it is, which is strength 1.
        tuned_loss: the same.
        base_margin: of base.
        base_loss: the same.
        factors: of the components' singular values.
        counts: components that are scaled, by condition.
        where: the intruders, ``L1.W_in 3``.
        task: name of the prompts.
        among: candidates for the answer.
        draw_seed: of the controls and of resampling.
        notes: what a reader should know.
        labels: of the axis ``condition``: the intruders, as many ``others`` among the k strongest, and as many ``random`` directions of the
            same singular values, which are added to the weights instead.
    """

    margin: Float[Tensor, "condition factor prompt"]
    loss: Float[Tensor, "condition factor text"]
    tuned_margin: Float[Tensor, " prompt"]
    tuned_loss: Float[Tensor, " text"]
    base_margin: Float[Tensor, " prompt"]
    base_loss: Float[Tensor, " text"]
    factors: tuple[float, ...]
    counts: tuple[int, ...]
    where: tuple[str, ...]
    task: str
    among: str
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def right(self) -> Bool[Tensor, "condition factor prompt"]:
        """The answer is above all others."""
        return self.margin > 0

    @property
    def conditions(self) -> tuple[str, ...]:
        """``intruders``, ``others 1``, ..., ``random 1``, ..."""
        return self.labels["condition"]

    def of_kind(self, kind: str) -> list[int]:
        """Conditions of one of ``KINDS``."""
        return [i for i, name in enumerate(self.conditions) if name.split()[0] == kind]

    def change(self, what: str, condition: int, factor: int) -> Estimate:
        """Difference from tuned as it is, paired over prompts or texts: of ``right``, ``margin`` or ``loss``."""
        if what == "right":
            new, old = self.right[condition, factor], self.tuned_margin > 0
            gained, lost = int((new & ~old).sum()), int((old & ~new).sum())
            low, high = paired_change(gained, lost, len(new)) if self.factors[factor] != 1 else (0.0, 0.0)
            value, low, high = (torch.tensor(x, dtype=torch.float64) for x in ((gained - lost) / len(new), low, high))
            return Estimate(value, low, high)
        new, old = (self.margin, self.tuned_margin) if what == "margin" else (self.loss, self.tuned_loss)
        return bootstrap(new[condition, factor] - old, seed=self.draw_seed)

    def summary(self) -> str:
        """What the smallest factor does to answers and to text, beside the controls."""
        at = self.factors.index(min(self.factors))
        n, texts = self.margin.shape[2], self.loss.shape[2]
        told = []
        for kind in KINDS:
            rows = self.of_kind(kind)
            if not rows:
                continue
            if kind == "intruders":
                told.append(f"{_points(self.change('right', 0, at))} and {_nats(self.change('loss', 0, at))}")
                continue
            right, loss = ([float(self.change(what, i, at).value) for i in rows] for what in ("right", "loss"))
            name = "as many others of the strongest" if kind == "others" else "as much random change"
            ends = "" if len(rows) == 1 else f" ({_span([100 * x for x in right], 1)} points, {_span(loss, 3)} nats in {len(rows)} draws)"
            told.append(f"with {name} {100 * sum(right) / len(rows):+.1f} points and {sum(loss) / len(rows):+.3f} nats{ends}")
        count = self.counts[0]
        return (
            f"{told[0]} when the {count} intruder dimension{'s' * (count != 1)} of tuned {'are' if count != 1 else 'is'} made "
            f"{self.factors[at]:g} times as strong (answers of {self.task}, n = {n}: {_share(self.tuned_margin)} in tuned, "
            f"{_share(self.base_margin)} in base; loss on {texts} texts: {float(self.tuned_loss.mean()):.3f} in tuned, "
            f"{float(self.base_loss.mean()):.3f} in base){''.join(f'; {x}' for x in (*told[1:], *self.notes))}"
        )

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per condition and factor, against tuned as it is; ``per="prompt"``: one per prompt too, without the texts.

        ``p`` and ``p_adjusted`` are of sign-flip tests of the margin and of the loss; adjusted for all rows.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        cells = [(c, f) for c in range(len(self.conditions)) for f in range(len(self.factors))]
        if per:
            parts = []
            for c, f in cells:
                values = self.margin[c, f].tolist()
                head = {"condition": self.conditions[c], "factor": self.factors[f], "prompt": range(len(values))}
                parts.append(pd.DataFrame({**head, "margin": values, "right": [x > 0 for x in values]}))
            return pd.concat(parts, ignore_index=True)
        tests = {
            what: permutation((new - old).movedim(-1, 0), seed=self.draw_seed)
            for what, new, old in (("margin", self.margin, self.tuned_margin), ("loss", self.loss, self.tuned_loss))
        }
        rows: list[dict[str, Any]] = []
        for c, f in cells:
            row: dict[str, Any] = {"condition": self.conditions[c], "factor": self.factors[f], "components": self.counts[c]}
            row |= {"rate": float(self.right[c, f].double().mean())}
            row |= dict(zip(("rate_low", "rate_high"), wilson(int(self.right[c, f].sum()), self.right.shape[2]), strict=True))
            for what, values in (("right", None), ("margin", self.margin[c, f]), ("loss", self.loss[c, f])):
                found = self.change(what, c, f)
                if values is not None:
                    row |= {what: float(values.double().mean()), f"{what}_se": float(standard_error(values))}
                row |= {
                    f"{what}_change": float(found.value),
                    f"{what}_change_low": float(found.low),
                    f"{what}_change_high": float(found.high),
                }
                if what in tests:
                    row |= {f"{what}_p": float(tests[what].p[c, f]), f"{what}_p_adjusted": float(tests[what].adjusted[c, f])}
            rows.append(row)
        return pd.DataFrame(rows)

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The factors of the intruders, and the controls at the smallest factor."""
        table = self.to_frame()
        kept = table[(table.condition == "intruders") | (table.factor == min(self.factors))]
        columns = ["condition", "factor", "components", "rate", "right_change", "right_change_low", "right_change_high", "margin_change"]
        columns += [
            "margin_p",
            "margin_p_adjusted",
            "loss",
            "loss_change",
            "loss_change_low",
            "loss_change_high",
            "loss_p",
            "loss_p_adjusted",
        ]
        return kept.loc[:, columns].head(max(n, len(self.factors) + len(self.conditions))).reset_index(drop=True)

    def plot(self) -> go.Figure:
        """Answers against strength."""
        return self._curves(
            "right", "change of the share of right answers, points", f"{self.task}: share of right answers less that of tuned", 100
        )

    def figures(self) -> dict[str, go.Figure]:
        """Answers, their margins, and the loss on text, all against strength."""
        return {
            "Answers": self.plot(),
            "Margins": self._curves("margin", "change of the margin, nats", f"{self.task}: margin of the answer less that in tuned"),
            "Other text": self._curves("loss", "change of the loss, nats per token", "Loss on text less that of tuned"),
        }

    def _curves(self, what: str, ylabel: str, title: str, unit: float = 1.0) -> go.Figure:
        """The intruders with their interval; of a control with several draws their mean and extent."""
        order = sorted(range(len(self.factors)), key=self.factors.__getitem__)
        series, bands = {}, {}
        for kind in KINDS:
            found = [[self.change(what, i, f) for f in order] for i in self.of_kind(kind)]
            if not found:
                continue
            values = torch.stack([torch.stack([e.value for e in row]) for row in found]) * unit
            name = {"intruders": "intruders", "others": "as many others", "random": "as much random change"}[kind]
            name += ", mean and extent" * (len(found) > 1)
            series[name] = values.mean(0)
            one = found[0]
            ends = [torch.stack([getattr(e, end) for e in one]) * unit for end in ("low", "high")]
            if kind == "intruders":
                bands[name] = (ends[0], ends[1])
            elif len(found) > 1:
                bands[name] = (values.amin(0), values.amax(0))
        xlabel = "strength of the components; 1 is tuned as it is, 0 without them"
        x = [self.factors[i] for i in order]
        return plots.lines(series, x, bands=bands, title=title, xlabel=xlabel, ylabel=f"{ylabel}, 95 % interval")


@analysis(version=2)
def intruder_scaling(
    pair: ModelPair,
    prompts: Prompts | PromptPairs,
    text: Prompts,
    *,
    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    k: int = 10,
    threshold: float = 0.5,
    side: Side = "write",
    draws: int = 3,
    among: Among = "vocabulary",
    exact: int = 1024,
    seed: int = 0,
) -> IntruderScalingResult:
    """What do intruder dimensions do: for the task that was tuned on, and for other text?

    All intruders of tuned (as ``intruder_dimensions`` defines them) are made weaker or stronger together, W + (factor - 1) sum_j s_j u_j
    v_j^T: 0 removes them, 1 is tuned as it is. Shuttleworth et al. (2024, arXiv 2410.21228) found that they carry forgetting: loss on other
    text falls when they are scaled down, at little cost for the task. Two controls get the same: as many other singular vectors among
    the k strongest, of the same matrices as far as there are enough, and random directions with the intruders' singular values.

    Args:
        pair: base and tuned.
        prompts: with answers of one token; of pairs the clean ones.
        text: other text, of at least two tokens each.
        factors: strengths.
        k: how many of the strongest singular vectors can be intruders.
        threshold: |cos| under which a vector is an intruder.
        side: side that has to be under it: ``write``, ``read`` or ``both``.
        draws: of each control.
        among: candidates for the answer: ``vocabulary``, or the prompt's ``options``.
        exact: as for ``intruder_dimensions``.
        seed: of the controls.

    Raises:
        InputError: a single model, factors that are not finite or not different, prompts without answers, a text of one token, or no
            intruders.
    """
    strengths = _checked(factors, threshold, side, draws)
    asked = clean_prompts(prompts)
    if min(map(len, text.ids)) < 2:
        raise InputError(f"text {list(map(len, text.ids)).index(1)} has one token only, which has no loss; give longer text")
    reader = margin(asked, among)
    found: dict[Site, Compared] = {}
    settings = Settings(k, exact=exact, seed=seed)
    for change in block_changes(pair, settings):
        assert change.site is not None
        if (one := compared(change, settings)) and float(one.change) > 0:
            found[change.site] = one
    conditions = _conditions(found, threshold, side, draws, seed)
    if not conditions:
        raise InputError(
            f"{pair.tuned.name} has no intruder dimension (k = {k}, |cos| < {threshold:g}, side {side}), so there is nothing to scale"
        )

    def measured(model: HookedModel) -> tuple[Tensor, Tensor]:
        return run(model, model.batch(asked), reader).double().cpu(), losses(model, text)

    (base, tuned) = (measured(model) for _, model in pair.sides())
    margins, lost = [], []
    cells = [(parts, g) for parts in conditions.values() for g in strengths]
    for parts, g in progress(cells, "strengths", total=len(cells)):
        if g == 1:
            got = tuned
        else:
            with pair.tuned.edited(scaled(parts, g)):
                got = measured(pair.tuned)
        margins.append(got[0])
        lost.append(got[1])
    size = (len(conditions), len(strengths))
    chosen = {site: intruders(c.overlap.cosine, threshold, side) for site, c in found.items()}
    return IntruderScalingResult(
        margin=torch.stack(margins).unflatten(0, size),
        loss=torch.stack(lost).unflatten(0, size),
        tuned_margin=tuned[0],
        tuned_loss=tuned[1],
        base_margin=base[0],
        base_loss=base[1],
        factors=strengths,
        counts=tuple(sum(len(part[2]) for part in parts) for parts in conditions.values()),
        where=tuple(f"{site} {j}" for site, flags in chosen.items() for j in flags.nonzero().flatten().tolist()),
        task=asked.task or "the prompts",
        among=among,
        draw_seed=seed,
        notes=narrow(pair),
        labels={"condition": tuple(conditions)},
    )


def scaled(parts: Sequence[Part], strength: float) -> Edit:
    """The edit that makes components ``strength`` times as strong."""
    return Edit(tuple(scaled_components(*part, strength) for part in parts), f"components times {strength:g}")


def losses(model: HookedModel, text: Prompts) -> Float[Tensor, " text"]:
    """Mean negative log-probability of every text's tokens but the first, nats, in float64."""
    found = torch.empty(len(text.ids), dtype=torch.float64)
    longest = max(map(len, text.ids))
    step = max(1, _CELLS // (longest * model.shape.d_vocab))
    for start in range(0, len(text.ids), step):
        rows = list(range(start, min(start + step, len(text.ids))))
        logits = model.logits(model.batch(text[rows])).float().cpu()
        for row, line in zip(rows, logits, strict=True):
            ids = torch.tensor(text.ids[row])
            found[row] = -line[: len(ids) - 1].log_softmax(-1).gather(1, ids[1:, None]).double().mean()
    return found


def _conditions(found: dict[Site, Compared], threshold: float, side: Side, draws: int, seed: int) -> dict[str, list[Part]]:
    """Name -> components; empty without intruders."""
    flags = {site: intruders(c.overlap.cosine, threshold, side) for site, c in found.items()}
    if not any(bool(f.any()) for f in flags.values()):
        return {}
    conditions = {"intruders": _parts(found, flags)}
    if not all(bool(f.all()) for f in flags.values()):
        conditions |= {f"others {d + 1}": _parts(found, _others(flags, seed, d)) for d in range(draws)}
    for d in range(draws):
        conditions[f"random {d + 1}"] = [
            (site, _unit(left, (seed, site, "left", d), 0), sigma, _unit(right, (seed, site, "right", d), 1))
            for site, left, sigma, right in conditions["intruders"]
        ]
    return conditions


def _parts(found: dict[Site, Compared], flags: dict[Site, Tensor]) -> list[Part]:
    return [(site, c.left[:, f], c.sigma[f], c.right[f]) for site, c in found.items() if bool((f := flags[site]).any())]


def _others(flags: dict[Site, Bool[Tensor, " component"]], seed: int, draw: int) -> dict[Site, Bool[Tensor, " component"]]:
    """As many components that are no intruders: of every matrix as many as it has intruders, and what it lacks from the other matrices."""
    chosen = {site: torch.zeros_like(f) for site, f in flags.items()}
    order = torch.argsort(normal((sum(map(len, flags.values())),), seed, "others", draw)).tolist()
    cells = [(site, j) for site, f in flags.items() for j in range(len(f))]
    free = [cells[i] for i in order if not flags[cells[i][0]][cells[i][1]]]
    wanted = {site: int(f.sum()) for site, f in flags.items()}
    for here in (True, False):  # first in its own matrix
        for site, j in free:
            if not chosen[site][j] and (wanted[site] if here else sum(wanted.values())) > 0:
                chosen[site][j] = True
                wanted[site if here else max(wanted, key=wanted.__getitem__)] -= 1
    return chosen


def _unit(like: Tensor, key: tuple[object, ...], axis: int) -> Tensor:
    """Random unit vectors along an axis."""
    draw = normal(tuple(like.shape), *key)
    return (draw / draw.norm(dim=axis, keepdim=True)).to(like)


def _checked(factors: Any, threshold: float, side: str, draws: int) -> tuple[float, ...]:
    check(threshold, side)
    given = tuple(factors) if isinstance(factors, list | tuple) else (factors,)
    wrong = [a for a in given if not isinstance(a, int | float) or isinstance(a, bool) or not math.isfinite(a)]
    if wrong or not given or len(set(given)) < len(given):
        raise InputError(f"factors are different finite numbers, one or more, such as (0, 0.5, 1), not {str(factors)[:60]}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
        raise InputError(f"draws is {draws!r}, expected a whole number from 0")
    return tuple(float(a) for a in given)


def _share(values: Float[Tensor, " prompt"]) -> str:
    low, high = wilson(int((values > 0).sum()), len(values))
    return f"{float((values > 0).double().mean()):.1%} [{low:.1%}, {high:.1%}]"


def _points(x: Estimate) -> str:
    return f"{100 * float(x.value):+.1f} [{100 * float(x.low):+.1f}, {100 * float(x.high):+.1f}] points"


def _nats(x: Estimate) -> str:
    return f"{float(x.value):+.3f} [{float(x.low):+.3f}, {float(x.high):+.3f}] nats per token"


def _span(values: Sequence[float], places: int) -> str:
    return f"{min(values):+.{places}f} to {max(values):+.{places}f}"
