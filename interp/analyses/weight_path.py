"""What happens on the straight line between the weights of base and those of tuned?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.models.line import GROUPS, Line
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.stats import Estimate, paired_change, ratio_of_means, resample_counts, wilson
from interp.sweeps.answers import Among
from interp.sweeps.asked import units, with_ends
from interp.sweeps.line import Point, answers, running_text
from interp.sweeps.predictions import rounding
from interp.sweeps.staged import grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import ModelPair

What = Literal["right", "answer", "text"]
ENDS = ("base", "tuned")
ALL = "all"


@dataclass(frozen=True)
class Best:
    """The alpha with the lowest loss of the answers.

    Attributes:
        alpha: it; of equal ones that nearest to 1.
        change: its loss less that of tuned, paired; flattered by the choice.
        share: of resamples of the prompts in which it is the best, too.
    """

    alpha: float
    change: Estimate
    share: float


@dataclass(frozen=True, eq=False)
class WeightPathResult(Result):
    """Answers and text at every point of the paths.

    Attributes:
        right: the answer is above all other candidates, at the last token of the prompt.
        logprob: of the answer, nats, over the ids that both models share.
        diff: logit of the answer less that of the distractor; None without distractors.
        loss: mean negative log-probability of the tokens of a text but the first, nats.
        kl: KL(end || point), nats per token, mean over the same tokens.
        tokens: of a text that have a loss.
        prompt_group: number of a prompt's context; intervals are over contexts.
        text_group: the same of the texts.
        alphas: ascending; 0 and 1 are among them.
        changed: kinds of weights that tuning changed.
        chance: share that a guess among the options gets right, or None.
        among: candidates: ``options`` of the prompt, or the whole ``vocabulary``.
        task: name of the prompts.
        floor: what rounding alone does to the loss of a text, and to its KL.
        gap: largest difference of logits between the ends of the path and the two models run by themselves.
        dtype: in which points are computed.
        rounded: half precision stayed because float32 did not fit the memory, so points between the ends are rounded.
        draw_seed: of the resampling.
        labels: of the axes: ``all`` weights move together, or one kind, with the others at base or at tuned.
    """

    right: Bool[Tensor, "path alpha prompt"]
    logprob: Float[Tensor, "path alpha prompt"]
    diff: Float[Tensor, "path alpha prompt"] | None
    loss: Float[Tensor, "path alpha text"]
    kl: Float[Tensor, "end path alpha text"]
    tokens: Int[Tensor, " text"]
    prompt_group: Int[Tensor, " prompt"]
    text_group: Int[Tensor, " text"]
    alphas: tuple[float, ...]
    changed: tuple[str, ...]
    chance: float | None
    among: str
    task: str
    floor: tuple[float, float]
    gap: float
    dtype: str
    rounded: bool
    draw_seed: int
    labels: dict[str, tuple[str, ...]]

    @property
    def paths(self) -> tuple[str, ...]:
        """``all``, then ``attention, others at base`` and so on."""
        return self.labels["path"]

    @property
    def nothing(self) -> bool:
        """No point of the line is further from base than rounding."""
        return float(self.kl[0].max()) <= self.floor[1]

    def _values(self, what: str, path: int) -> tuple[Float[Tensor, "unit alpha"], Float[Tensor, " unit"]]:
        """Sums of a measure over what belongs to a context, and how many there are, tokens in texts."""
        if what in ("right", "answer", "diff"):
            assert what != "diff" or self.diff is not None
            values = {"right": self.right, "answer": -self.logprob, "diff": self.diff}[what]
            weight, group = torch.ones(len(self.prompt_group), dtype=torch.float64), self.prompt_group
        else:
            values = self.loss if what == "text" else self.kl[ENDS.index(what)]
            weight, group = self.tokens.double(), self.text_group
        each = cast("Tensor", values)[path].double().T * weight[:, None]
        sums = torch.zeros(int(group.max()) + 1, each.shape[1], dtype=torch.float64).index_add_(0, group, each)
        return sums, torch.zeros(len(sums), dtype=torch.float64).index_add_(0, group, weight)

    def curve(self, what: str, path: int = 0) -> Estimate:
        """Means at every alpha with 95 % intervals over contexts.

        Args:
            what: ``right``, ``answer`` (loss of the answers), ``diff``, ``text`` (loss on text), ``base`` or ``tuned`` (KL from that end).
            path: index into ``paths``.
        """
        sums, counts = self._values(what, path)
        if what == "right" and len(counts) == len(self.prompt_group):
            ends = torch.tensor([wilson(int(k), len(counts)) for k in sums.sum(0)], dtype=torch.float64)
            return Estimate(sums.mean(0), ends[:, 0], ends[:, 1])
        return ratio_of_means(sums, counts, seed=self.draw_seed)

    def change(self, what: str, alpha: float, against: float, path: int = 0) -> Estimate:
        """Difference of a measure between two alphas on the same prompts or texts.

        Raises:
            InputError: an alpha that was not measured.
        """
        i, j = self._at(alpha), self._at(against)
        sums, counts = self._values(what, path)
        if what == "right" and len(counts) == len(self.prompt_group) and i != j:
            gained, lost = int((sums[:, i] > sums[:, j]).sum()), int((sums[:, i] < sums[:, j]).sum())
            ends = ((gained - lost) / len(counts), *paired_change(gained, lost, len(counts)))
            value, low, high = (torch.tensor(v, dtype=torch.float64) for v in ends)
            return Estimate(value, low, high)
        return ratio_of_means(sums[:, i] - sums[:, j], counts, seed=self.draw_seed)

    def _at(self, alpha: float) -> int:
        if alpha not in self.alphas:
            raise InputError(f"alpha {alpha:g} was not measured; there are {', '.join(f'{a:g}' for a in self.alphas)}")
        return self.alphas.index(alpha)

    def excess(self, what: What = "text", path: int = 0) -> tuple[tuple[float, ...], Float[Tensor, "unit inside"], Float[Tensor, " unit"]]:
        """Alphas between 0 and 1, how much the loss there is above the straight line between the ends, by context, and tokens there."""
        sums, counts = self._values(what, path)
        inside = tuple(a for a in self.alphas if 0 < a < 1)
        ends = sums[:, [self._at(0.0), self._at(1.0)]]
        a = torch.tensor(inside, dtype=torch.float64)
        return inside, sums[:, [self._at(x) for x in inside]] - ends[:, :1] * (1 - a) - ends[:, 1:] * a, counts

    def barrier(self, what: What = "text", path: int = 0) -> tuple[float, Estimate] | None:
        """Where between 0 and 1 the loss is highest above the straight line between the ends, and by how much; None with no alpha there.

        The interval resamples contexts and takes the highest point anew each time. Below 0 the line sags everywhere.
        """
        inside, excess, counts = self.excess(what, path)
        if not inside:
            return None
        mean = excess.sum(0) / counts.sum()
        best = int(mean.argmax())
        low = high = torch.tensor(math.nan, dtype=torch.float64)
        if len(counts) > 1:
            draws = resample_counts(len(counts), self.draw_seed)
            highest = (draws @ excess / (draws @ counts)[:, None]).amax(1)
            low, high = highest.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return inside[best], Estimate(mean[best], low, high)

    @property
    def best(self) -> Best:
        """Where on the whole line the answers cost least."""
        sums, counts = self._values("answer", 0)
        near = sorted(range(len(self.alphas)), key=lambda i: abs(self.alphas[i] - 1))
        ordered = sums[:, near]
        at = near[int(ordered.sum(0).argmin())]  # the first of equals
        share = 1.0
        if len(counts) > 1:
            draws = resample_counts(len(counts), self.draw_seed)
            share = float(((draws @ ordered).argmin(1) == near.index(at)).double().mean())
        return Best(self.alphas[at], self.change("answer", self.alphas[at], 1.0), share)

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """The barrier on text."""
        found = self.barrier()
        return {} if found is None else {"barrier of the loss of text, nats per token": {"tuned": found[1]}}

    def summary(self) -> str:
        """The barrier, right answers along the line, the best alpha and what negation does."""
        n, texts = units(self.prompt_group), units(self.text_group, "text")
        floor = f"numerical floor {self.floor[0]:.1g} nats"
        if self.nothing:
            why = (
                "tuning changed no weight" if not self.changed else f"KL from base is at most {float(self.kl[0].max()):.1g} nats per token"
            )
            return f"The barrier is 0: no difference beyond rounding anywhere on the line, as {why} ({texts}, {n}; {floor})"
        found = self.barrier()
        told = ["No alpha between 0 and 1 was asked for, so the barrier is not known"]
        if found is not None:
            rises = "stays below the straight line between their losses" if float(found[1].value) < 0 else "rises above the straight line"
            told = [f"The barrier is {with_ends(found[1])} nats per token: between base and tuned the loss on text {rises} "]
            told[0] += f"(at alpha {found[0]:g}; {texts}; {floor})"
        shown = [a for a in (min(self.alphas), 0.0, self._middle(), 1.0, max(self.alphas)) if a is not None]
        rates = [f"{float(self.curve('right').value[self._at(a)]):.1%} at {a:g}" for a in sorted(set(shown))]
        told.append(
            f"right answers on {self.task}: {', '.join(rates)} (n = {n}{'' if self.chance is None else f', a guess {self.chance:.0%}'})"
        )
        best = self.best
        than = "" if best.alpha == 1 else f", against tuned {with_ends(best.change)} nats"
        share = f" ({best.share:.0%} of resamples)" if int(self.prompt_group.max()) else ""
        told.append(f"the answer's loss is lowest at alpha {best.alpha:g}{share}{than}")
        if self.alphas[0] < 0:
            answer, text = (with_ends(self.change(what, self.alphas[0], 0.0)) for what in ("answer", "text"))
            told.append(
                f"at {self.alphas[0]:g}, against base, the answer's loss changes by {answer} nats and the loss on text by {text} nats "
                "per token"
            )
        if self.rounded:
            told.append("points between the ends are rounded to half precision, since float32 did not fit the memory")
        elif self.gap > 0:
            told.append(f"points are computed in {self.dtype}, where logits of the ends are up to {self.gap:.2g} from the models' own")
        return "; ".join(told)

    def _middle(self) -> float | None:
        """The alpha between 0 and 1 that is nearest to one half."""
        inside = [a for a in self.alphas if 0 < a < 1]
        return min(inside, key=lambda a: abs(a - 0.5)) if inside else None

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per path and alpha; ``per="prompt"``: one row per prompt there, without the texts.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        rows: list[dict[str, Any]] = []
        measures = ["right", "answer", *(["diff"] if self.diff is not None else []), "text", *ENDS]
        names = {"answer": "answer_loss", "diff": "logit_diff", "text": "text_loss", "base": "kl_from_base", "tuned": "kl_from_tuned"}
        for p, path in enumerate(self.paths):
            curves = {} if per else {what: self.curve(what, p) for what in measures}
            for i, alpha in enumerate(self.alphas):
                head: dict[str, Any] = {"path": path, "alpha": alpha}
                if per:
                    some = {"right": self.right[p, i].tolist(), "answer_loss": (-self.logprob[p, i]).tolist()}
                    some |= {} if self.diff is None else {"logit_diff": self.diff[p, i].tolist()}
                    rows += [head | {"prompt": k} | {name: v[k] for name, v in some.items()} for k in range(len(self.prompt_group))]
                    continue
                for what, curve in curves.items():
                    name = names.get(what, what)
                    head |= {name: float(curve.value[i]), f"{name}_low": float(curve.low[i]), f"{name}_high": float(curve.high[i])}
                rows.append(head)
        return pd.DataFrame(rows)

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """Every path: its barriers on text and in the answers, and what moving it all the way changes."""
        import pandas as pd

        rows = []
        for p, path in enumerate(self.paths):
            row: dict[str, Any] = {"path": path}
            for what, name in (("text", "text_barrier"), ("answer", "answer_barrier")):
                if (found := self.barrier(cast("What", what), p)) is not None:
                    row |= {name: float(found[1].value), f"{name}_low": float(found[1].low), f"{name}_high": float(found[1].high)}
            for what, name in (("right", "right_change"), ("answer", "answer_loss_change"), ("text", "text_loss_change")):
                found = self.change(what, 1.0, 0.0, p)
                row |= {name: float(found.value), f"{name}_low": float(found.low), f"{name}_high": float(found.high)}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Share of right answers along the line."""
        curve, name = self.curve("right"), "right answers"
        chance = {} if self.chance is None else {"a guess": torch.full_like(curve.value, self.chance)}
        title = f"{self.task}: right answers on the line from base to tuned (n = {len(self.prompt_group)})"
        return self._drawn({name: curve.value} | chance, {name: (curve.low, curve.high)}, title, "share of right answers, 95 % interval")

    def figures(self) -> dict[str, go.Figure]:
        """Answers, their loss, loss on text, KL to both ends; then each kind of weights."""
        answer, kl = self.curve("answer"), {end: self.curve(end) for end in ENDS}
        drawn = {
            "Answers": self.plot(),
            "Loss of the answers": self._drawn(
                {"loss of the answers": answer.value},
                {"loss of the answers": (answer.low, answer.high)},
                f"{self.task}: loss of the answers on the line from base to tuned",
                "-log p(answer), nats, 95 % interval",
            ),
            "Loss on text": self._text(),
            "Distance from the ends": self._drawn(
                {k: v.value for k, v in kl.items()},
                {k: (v.low, v.high) for k, v in kl.items()},
                "How far predictions on text are from those of base, and from those of tuned",
                "KL(end || point), nats per token, 95 % interval",
                self.floor[1],
            ),
        }
        for end in ENDS:
            chosen = {p.partition(",")[0]: i for i, p in enumerate(self.paths) if p.endswith(f"others at {end}")}
            if chosen:
                drawn |= self._kinds(end, chosen)
        return drawn

    def _text(self) -> go.Figure:
        """Loss less that of base, so that the interval is that of a difference; and the straight line that a barrier rises above."""
        found, name = self._less("text", 0.0), "loss on text"
        end = float(found.value[self._at(1.0)])
        return self._drawn(
            {name: found.value, "straight line between the ends": [end * a if 0 <= a <= 1 else math.nan for a in self.alphas]},
            {name: (found.low, found.high)},
            f"Loss on text less that of base ({len(self.tokens)} texts)",
            "nats per token, paired 95 % interval",
            self.floor[0],
        )

    def _less(self, what: What, against: float, path: int = 0) -> Estimate:
        """A loss at every alpha less that at one, paired."""
        sums, counts = self._values(what, path)
        return ratio_of_means(sums - sums[:, [self._at(against)]], counts, seed=self.draw_seed)

    def _kinds(self, end: str, chosen: dict[str, int]) -> dict[str, go.Figure]:
        """Loss of answers and of text when one kind of weights moves alone, less that of the end at which the others stay."""
        made: dict[str, go.Figure] = {}
        shown: tuple[tuple[What, str, str], ...] = (
            ("answer", "Loss of the answers", "-log p(answer), nats"),
            ("text", "Loss on text", "nats per token"),
        )
        for what, heading, unit in shown:
            curves = {kind: self._less(what, float(ENDS.index(end)), i) for kind, i in chosen.items()}
            curves["all weights"] = self._less(what, float(ENDS.index(end)))
            made[f"{heading} by kind of weights, others at {end}"] = self._drawn(
                {k: v.value for k, v in curves.items()},
                {k: (v.low, v.high) for k, v in curves.items()},
                f"{heading} less that of {end} when one kind of weights moves from base to tuned and all others stay at {end}",
                f"{unit}, paired 95 % interval",
                self.floor[0],
            )
        return made

    def _drawn(self, series: dict[str, Any], bands: dict[str, Any], title: str, ylabel: str, floor: float | None = None) -> go.Figure:
        made = plots.lines(
            series,
            self.alphas,
            bands=bands,
            title=title,
            xlabel="alpha: weights are base + alpha (tuned - base)",
            ylabel=ylabel,
            floor=floor,
        )
        for x, name, paint in ((0.0, "base", plots.BASE), (1.0, "tuned", plots.TUNED)):
            made.add_vline(x=x, line_color=paint, line_width=1, line_dash="dot", annotation_text=name, annotation_font_color=paint)
        return made


@analysis(version=1)
def weight_path(
    pair: ModelPair,
    prompts: Prompts | PromptPairs,
    text: Prompts,
    *,
    alphas: tuple[float, ...] = (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    per_module: bool = False,
    among: Literal["auto", "options", "vocabulary"] = "auto",
    seed: int = 0,
) -> WeightPathResult:
    """What happens on the straight line between the weights of base and those of tuned?

    The weights are base + alpha (tuned - base), in float32 or better: 0 and 1 are the two models to the last bit, between them tuning is
    there in part, above 1 it is exaggerated, below 0 negated. At every alpha the prompts are asked and the loss on other text is
    measured, and how far the predictions are from both ends. The barrier is how far the loss between 0 and 1 rises above the
    straight line between the ends (Frankle et al. 2020, arXiv 1912.05671); without one both models lie in the same basin. If answers get
    better steadily with alpha, and worse than base's below 0, the skill lies along this direction (task arithmetic, Ilharco et al. 2023,
    arXiv 2212.04089). Memory: one model's more, for the tensors that tuning changed.

    Args:
        pair: base and tuned.
        prompts: with answers of one token; of pairs the clean ones.
        text: other text, of at least two tokens each.
        alphas: points; 0 and 1 are always among them.
        per_module: also move each kind of weights (attention, MLP, embeddings, norms and biases) alone, with all others at base, and
            with all others at tuned.
        among: candidates for the answer: the ``options`` of the prompt, or the whole ``vocabulary``; ``auto`` takes the options where there
            are any.
        seed: of the resampling.

    Raises:
        InputError: alphas that are not finite or not different, prompts without answers, a text of one token, or models between which
            there is no line.
    """
    points = _alphas(alphas)
    asked, read = clean_prompts(prompts), clean_prompts(text)
    if among not in ("auto", "options", "vocabulary"):
        raise InputError(f"among must be auto, options or vocabulary, but it is {among!r}")
    options = asked.options is not None and all(len(set(o)) > 1 for o in asked.options)
    candidates = cast("Among", ("options" if options else "vocabulary") if among == "auto" else among)
    if asked.answers is None:
        raise InputError("weight_path needs prompts with one-token answers, and these have none")
    if min(map(len, read.ids)) < 2:
        raise InputError(f"text {list(map(len, read.ids)).index(1)} has one token only, which has no loss; give longer text")
    first, second = pair.batch(asked), pair.batch(read)
    line = Line(pair)
    paths = _paths(line, per_module)
    wanted = [[_point(line, moving, still, a) for a in points] for moving, still in paths.values()]
    distinct = list(dict.fromkeys(p for row in wanted for p in row))
    todo: list[Point] = [dict(zip(line.groups, p, strict=True)) for p in distinct]
    where = torch.tensor([[distinct.index(p) for p in row] for row in wanted])
    got = answers(line, todo, asked, first, candidates, pair.shared_vocab)
    values = running_text(line, todo, pair, second, pair.shared_vocab)
    base, tuned = ((0.0,) * len(line.groups), (1.0,) * len(line.groups))
    shake = max(rounding(line.at(a), second, pair.shared_vocab)[0] for a in (0.0, 1.0))
    apart = max(float(values[1, distinct.index(base)].max()), float(values[2, distinct.index(tuned)].max()))
    return WeightPathResult(
        right=got.margin[where] > 0,
        logprob=got.logprob[where],
        diff=None if got.diff is None else got.diff[where],
        loss=values[0][where],
        kl=values[1:][:, where],
        tokens=torch.tensor([sum(i < pair.shared_vocab for i in row[1:]) for row in read.ids]),
        prompt_group=grouped(asked.contexts),
        text_group=grouped(read.contexts),
        alphas=points,
        changed=line.groups,
        chance=sum(1 / len(set(o)) for o in asked.options) / len(asked) if candidates == "options" and asked.options else None,
        among=candidates,
        task=asked.task or "the prompts",
        floor=(shake, max(shake**2 / 2, apart)),
        gap=line.gap,
        dtype=str(line.dtype).removeprefix("torch."),
        rounded=line.rounded,
        draw_seed=seed,
        labels={"path": tuple(paths), "end": ENDS},
    )


def _alphas(given: Any) -> tuple[float, ...]:
    each = tuple(given) if isinstance(given, list | tuple) else (given,)
    wrong = [a for a in each if not isinstance(a, int | float) or isinstance(a, bool) or not math.isfinite(a)]
    if wrong or not each or len(set(each)) < len(each):
        raise InputError(f"alphas are different finite numbers, one or more, such as (-0.5, 0.5, 1.5), not {str(given)[:60]}")
    return tuple(sorted({float(a) for a in each} | {0.0, 1.0}))


def _paths(line: Line, per_module: bool) -> dict[str, tuple[Sequence[str], float]]:
    """Name -> kinds of weights that move, and where the others stay."""
    kinds = tuple(dict.fromkeys((*GROUPS, *line.groups)))
    found: dict[str, tuple[Sequence[str], float]] = {ALL: (kinds, 0.0)}
    if per_module:
        found |= {f"{kind}, others at {end}": ((kind,), float(i)) for i, end in enumerate(ENDS) for kind in kinds}
    return found


def _point(line: Line, moving: Sequence[str], still: float, alpha: float) -> tuple[float, ...]:
    """Share of tuning of every kind of weights that it changed; points that differ in others are the same."""
    return tuple(alpha if kind in moving else still for kind in line.groups)
