"""Do prompts of one kind bear more of tuning's contribution than those of another?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.models.contribution import scored_position, share
from interp.models.norms import Norm, base_outputs, contribution_norms, repeated, rounding
from interp.prompts import Prompts
from interp.prompts.asked import Form, as_chats
from interp.prompts.transforms import said
from interp.results import Result, analysis
from interp.stats import Estimate, auc, bootstrap, roc, standard_error, tpr_at

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

_BINS = 20
_SHOWN_TEXT = 160
_RATE = 0.05
_FORMS = {"given": "", "template": " in the chat template", "plain": " in plain lines of a chat"}
_TUCO, _LENGTH, _OUTPUT = "TuCo", "prompt length", "OutputCo"


@dataclass(frozen=True, eq=False)
class TucoDetectionResult(Result):
    """TuCo of every prompt of two sets, the positives first, and what tells the sets apart beside it.

    Attributes:
        tuning: norm of the sum of FTC over layers at the position that is scored.
        pre: norm of the sum of PTC there.
        length: tokens up to that position.
        is_positive: of the first set.
        base_output: norm of base's own final stream there; NaN where base does not know a token. None where it was not asked for.
        output_change: norm of the tuned model's difference from it, or None.
        closure: relative error of x_L = x_0 + PTC + FTC.
        floor: change of TuCo when a prompt runs in a batch of another size, of the prompts that were tried.
        rounding: TuCo that rounding to half precision alone gives, of the prompts that were tried.
        texts: the prompts, as the model reads them.
        sets: what the positives and the negatives are.
        forms: how those that came as bare text were made a chat.
        norm: ``l1`` or ``l2``.
        position: what is scored.
        draw_seed: of the bootstrap.
        repeats: prompts that were left out because their set has them already.
    """

    tuning: Float[Tensor, " prompt"]
    pre: Float[Tensor, " prompt"]
    length: Int[Tensor, " prompt"]
    is_positive: Bool[Tensor, " prompt"]
    base_output: Float[Tensor, " prompt"] | None
    output_change: Float[Tensor, " prompt"] | None
    closure: Float[Tensor, " prompt"]
    floor: Float[Tensor, " tried"]
    rounding: Float[Tensor, " rounded"]
    texts: tuple[str, ...]
    sets: tuple[str, str]
    forms: tuple[str, ...]
    norm: Norm
    position: str
    draw_seed: int
    repeats: int

    @property
    def tuco(self) -> Float[Tensor, " prompt"]:
        """|FTC| / (|PTC| + |FTC|) of the sums over layers."""
        return share(self.tuning, self.pre)

    @property
    def output_co(self) -> Float[Tensor, " prompt"] | None:
        """How far the tuned model's final stream is from base's own, as a share; None where it was not asked for."""
        return None if self.output_change is None or self.base_output is None else share(self.output_change, self.base_output)

    @property
    def scores(self) -> dict[str, Float[Tensor, " prompt"]]:
        """What the sets are told apart by: TuCo; the length of the prompt alone, as a control; OutputCo where it was asked for."""
        found = {_TUCO: self.tuco, _LENGTH: self.length.double()}
        return found | ({} if self.output_co is None else {_OUTPUT: self.output_co})

    @property
    def auc(self) -> Estimate:
        """How often a positive prompt has more TuCo than a negative one, a tie counting one half."""
        return self.auc_of(_TUCO)

    def split(self, score: str) -> tuple[Tensor, Tensor]:
        """A score of the positives and of the negatives, of those prompts that have one."""
        x = self.scores[score]
        there = ~x.isnan()
        return x[self.is_positive & there], x[~self.is_positive & there]

    def auc_of(self, score: str) -> Estimate:
        """AUC of one of ``scores``; refused where base knows no prompt of a set."""
        both = self.split(score)
        if not all(map(len, both)):
            nan = torch.tensor(torch.nan, dtype=torch.float64)
            return Estimate(nan, nan, nan, "base knows the tokens of no prompt of a set")
        return auc(*both, seed=self.draw_seed)

    def summary(self) -> str:
        """The AUC with its interval and orientation, both means, the share found at few false alarms, and the control."""
        names, counts = self.told_apart, [int(self.is_positive.sum()), int((~self.is_positive).sum())]
        means = [bootstrap(x, seed=self.draw_seed) for x in self.split(_TUCO)]
        lengths = [x.mean() for x in self.split(_LENGTH)]
        found, control = self.auc, self.by_length
        turned = "" if found.value >= 0.5 else "; it is below one half, so here the positives have less"
        alike = ", which tells them apart as well: take sets of equal lengths" if self.confounded else ""
        rate = tpr_at(*self.split(_TUCO), _RATE, seed=self.draw_seed)
        parts = [
            f"higher TuCo means positive{turned}",
            f"mean {_told(means[0])} over n = {counts[0]} against {_told(means[1])} over n = {counts[1]}",
            f"true positive rate {_told(rate)} at {_RATE:.0%} false positives",
            f"control, prompt length alone: AUC {_told(control)}, on average {lengths[0]:.3g} against {lengths[1]:.3g} tokens{alike}",
            "OutputCo with output_co=True" if self.output_co is None else f"OutputCo alone: AUC {_told(self.auc_of(_OUTPUT))}",
            *([f"{self.repeats} repeated prompts counted once"] if self.repeats else []),
            f"{self.norm.upper()} norm, position {self.position}",
            f"closure error at most {float(self.closure.max()):.1g}, {self._exactness()}",
        ]
        return f"TuCo tells {names[0]} from {names[1]} with AUC {_told(found)} ({'; '.join(parts)})"

    def _exactness(self) -> str:
        if len(self.rounding):
            return f"rounding to half precision alone gives {float(self.rounding.mean()):.2g}"
        return (
            f"in a batch of another size {len(self.floor)} of the prompts move by at most {float(self.floor.max()):.1g}"
            if len(self.floor)
            else "no numerical floor measured"
        )

    @property
    def by_length(self) -> Estimate:
        """AUC of the length of the prompt alone, the control."""
        return self.auc_of(_LENGTH)

    @property
    def confounded(self) -> bool:
        """The length of the prompt tells the sets apart at least as well as TuCo."""
        control = float(self.by_length.value)
        return control != 0.5 and abs(control - 0.5) >= abs(float(self.auc.value) - 0.5)

    @property
    def told_apart(self) -> tuple[str, str]:
        """The sets in a sentence."""
        first, second = self._names
        return first if self._named[0] else "the positive prompts", second if self._named[1] else "the negative prompts"

    @property
    def _named(self) -> list[str]:
        """What is known of each set: its task and how it was rewritten, or what was written for it on the command line."""
        inputs = () if self.meta is None else self.meta.inputs
        written = {given["parameter"]: str(given["text"]) for given in inputs}
        known = [name or written.get(side, "") for side, name in zip(("positive", "negative"), self.sets, strict=True)]
        return [f"{name}{form}".strip() for name, form in zip(known, self.forms, strict=True)]

    @property
    def _names(self) -> list[str]:
        return [f"{side} ({name})" if name else side for side, name in zip(("positive", "negative"), self._named, strict=True)]

    @property
    def _set(self) -> list[str]:
        return [self._names[0 if positive else 1] for positive in self.is_positive.tolist()]

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per score with its AUC; ``per="prompt"``: one row per prompt, of both sets.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            return self._prompts(list(range(len(self.texts))))
        rows: list[dict[str, Any]] = []
        for score in self.scores:
            both, area = self.split(score), self.auc_of(score)
            row = {"score": score, "auc": area.value, "low": area.low, "high": area.high}
            if area.refused is None:
                rate = tpr_at(*both, _RATE, seed=self.draw_seed)
                row |= {"tpr_at_5_percent": rate.value, "tpr_low": rate.low, "tpr_high": rate.high}
                for side, x in zip(("positive", "negative"), both, strict=True):
                    row |= {f"{side}_mean": x.mean(), f"{side}_se": standard_error(x), f"{side}_n": len(x)}
            rows.append({k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()})
        return pd.DataFrame(rows)

    def _prompts(self, rows: list[int], *, cut: bool = False) -> pd.DataFrame:
        import pandas as pd

        first, sets = int(self.is_positive.sum()), self._set
        found: dict[str, Any] = {"set": [sets[i] for i in rows], "prompt": [i if i < first else i - first for i in rows]}
        found |= {"text": [_cut(self.texts[i]) if cut else self.texts[i] for i in rows], "tuco": self.tuco[rows].tolist()}
        found |= {"length": self.length[rows].tolist()} | ({} if self.output_co is None else {"output_co": self.output_co[rows].tolist()})
        return pd.DataFrame(found if cut else found | {"closure": self.closure[rows].tolist()})

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The most and the least tuned prompts of either set, most first: where the sets overlap, these say why."""
        rows: list[int] = []
        for positive, room in ((True, n - n // 2), (False, n // 2)):
            here = (self.is_positive == positive).nonzero()[:, 0]
            order = here[self.tuco[here].argsort(descending=True, stable=True)].tolist()
            rows += order if len(order) <= room else [*order[: room - room // 2], *order[len(order) - room // 2 :]]
        return self._prompts(rows, cut=True)

    def plot(self) -> go.Figure:
        """TuCo of both sets."""
        both = self.split(_TUCO)
        low, high = float(self.tuco.min()), float(self.tuco.max())
        edges = torch.linspace(low, high if high > low else low + 1e-3, _BINS + 1, dtype=torch.float64)
        inside = {
            name: torch.bucketize(x, edges[1:-1], right=True).bincount(minlength=_BINS) for name, x in zip(self._names, both, strict=True)
        }
        return plots.bars(
            [f"{float(x):.3g}" for x in (edges[1:] + edges[:-1]) / 2],
            {name: count / count.sum() for name, count in inside.items()},
            title=f"TuCo of both sets: AUC {_told(self.auc)}",
            xlabel="TuCo (middle of the bin)",
            ylabel="share of the set's prompts",
            horizontal=False,
        )

    def figures(self) -> dict[str, go.Figure]:
        """Histograms, ROC curves, and TuCo against the length of the prompt."""
        return {"TuCo of both sets": self.plot(), "ROC": self._roc(), "Against length": self._against_length()}

    def _roc(self) -> go.Figure:
        x, y, labels, groups = [], [], [], []
        for score in reversed(self.scores):  # TuCo on top
            if (area := self.auc_of(score)).refused is None:
                curve = roc(*self.split(score))
                x, y = [*x, *curve.false_positive.tolist()], [*y, *curve.true_positive.tolist()]
                labels += [f"{score} from {t:.4g}" for t in curve.threshold.tolist()]
                groups += [f"{score}, AUC {_told(area)}"] * len(curve.threshold)
        made = plots.scatter(
            x,
            y,
            labels=labels,
            groups=groups,
            title="How many positives are found, at how many false alarms",
            xlabel="false positive rate",
            ylabel="true positive rate",
            diagonal=True,
        )
        return made.update_traces(mode="lines+markers", marker_size=4)

    def _against_length(self) -> go.Figure:
        return plots.scatter(
            self.length,
            self.tuco,
            labels=[text[-80:] for text in self.texts],
            groups=self._set,
            title="TuCo and the length of the prompt",
            xlabel="tokens up to the position that is scored",
            ylabel=f"TuCo, {self.norm.upper()}",
        )


@analysis(version=2)
def tuco_detection(
    pair: ModelPair,
    positive: Prompts,
    negative: Prompts,
    *,
    position: str = "last_prompt",
    norm: Norm = "l1",
    chat: Form = "given",
    stream: bool = False,
    output_co: bool = False,
    seed: int = 0,
) -> TucoDetectionResult:
    """Does the contribution of tuning tell one kind of prompts from another?

    TuCo of every prompt of both sets, see `tuco`, as a score: AUC (how often a positive prompt has more of it than a negative one,
    ties one half) with a bootstrap interval over the prompts of each set, the ROC curve, and the share of positives found at 5 %
    false positives. Orientation: higher TuCo means positive, so name as positive what tuning should have touched: chats against web
    text, plain requests against attacked ones, refused against answered (Nuti et al., ICML 2025, arXiv 2506.23423). Sets of
    prompts may differ in more than one wants to know: the AUC of the prompt's length alone stands beside as a control.

    Args:
        pair: the two models; the tuned model's tokens are read.
        positive: prompts that should have more TuCo; one that is there twice counts once, here and in the other set.
        negative: prompts that should have less; none of them is among the positives.
        position: what is scored: the last token before the answer, or a named position of one token.
        norm: ``l1`` as published, or ``l2``.
        chat: prompts as ``given``; or each of both sets as a user's message in the tuned model's ``template`` or in ``plain`` lines. A set
            of such chats, as chat tasks make them, stays as it is, so that only text is put into the template.
        stream: keep the tuned model's stream and read base's blocks from disk one at a time, so that memory holds one model.
        output_co: also run base on its own, and see how far its final stream alone tells the sets apart; a third forward pass.
        seed: of the bootstrap.

    Raises:
        InputError: only one set, pairs of prompts, a prompt in both sets, or as for `tuco`.
    """
    if norm not in ("l1", "l2"):
        raise InputError(f"norm is {norm!r}, expected l1 or l2")
    if stream and output_co:
        raise InputError("OutputCo runs base as a whole, which stream=True avoids; ask for one of them")
    given = [_read(pair.tuned, prompts, side, chat) for prompts, side in ((positive, "positive"), (negative, "negative"))]
    sets = [_different(prompts) for prompts in given]
    _apart(*sets)
    batches = [pair.tuned.batch(prompts) for prompts in sets]
    scored = [scored_position(batch, position)[0] for batch in batches]
    norms = [contribution_norms(pair, *read, norm, stream=stream) for read in zip(batches, scored, strict=True)]
    found = [{"tuning": x["tuning_sum"][:, -1], "pre": x["pre_sum"][:, -1], "closure": x["closure"]} for x in norms]
    if output_co:
        for i, x in enumerate(norms):
            found[i] |= base_outputs(pair.base, batches[i], scored[i], x["final"], norm)
    both = {k: torch.cat([part[k] for part in found]) for k in found[0]}
    first = batches[0], scored[0]
    return TucoDetectionResult(
        tuning=both["tuning"],
        pre=both["pre"],
        length=torch.cat(scored).cpu() + 1,
        is_positive=torch.arange(len(both["pre"])) < len(sets[0]),
        base_output=both.get("base_output"),
        output_change=both.get("output_change"),
        closure=both["closure"],
        floor=repeated(pair, *first, norm, norms[0]) if not stream else torch.zeros(0, dtype=torch.float64),
        rounding=rounding(pair, *first, norm, measure=not stream),
        texts=tuple(text for prompts in sets for text in prompts.texts),
        sets=(_name(positive), _name(negative)),
        forms=tuple("" if read is came else _FORMS[chat] for came, read in zip((positive, negative), given, strict=True)),
        norm=norm,
        position=position,
        draw_seed=seed,
        repeats=sum(map(len, given)) - sum(map(len, sets)),
    )


def _read(model: HookedModel, prompts: Any, side: str, form: Form) -> Prompts:
    """A set of prompts as the model reads them."""
    if not isinstance(prompts, Prompts):
        came = "nothing" if prompts is None else type(prompts).__name__
        raise InputError(f"{side} must be prompts, one text each, since two sets are told apart; but {came} came")
    if form != "given" and all(said(model, text, form) is not None for text in prompts.texts):
        return prompts
    return as_chats(model, prompts, form)


def _different(prompts: Prompts) -> Prompts:
    """Each prompt once: the same one again tells nothing more, though an interval would shrink by it."""
    first = {ids: row for row, ids in reversed(list(enumerate(prompts.ids)))}
    return prompts if len(first) == len(prompts) else prompts[sorted(first.values())]


def _apart(positive: Prompts, negative: Prompts) -> None:
    """Refuse a prompt that stands in both sets: it has two labels."""
    known = set(positive.ids)
    twice = [text for text, ids in zip(negative.texts, negative.ids, strict=True) if ids in known]
    if twice:
        n = f"{len(twice)} of the {len(negative)} negative prompts are" if len(twice) > 1 else "a negative prompt is"
        raise InputError(f"{n} among the positive ones, too, so that there is nothing to tell apart: {twice[0][:60]!r}")


def _name(prompts: Prompts) -> str:
    """The task of prompts and how they were rewritten, as far as that is known."""
    ways = set(prompts.tags.get("transform", ()))
    return ", ".join([*([prompts.task] if prompts.task else []), *(ways if len(ways) == 1 else ())])


def _told(found: Estimate) -> str:
    """An estimate, without an interval where a single prompt gives none."""
    return f"{float(found.value):.3g}" if found.low.isnan() and not found.value.isnan() else str(found)


def _cut(text: str) -> str:
    """A long text without its middle."""
    half = _SHOWN_TEXT // 2
    return text if len(text) <= _SHOWN_TEXT else f"{text[:half]} ... {text[-half:]}"
