"""How much of what a model is about to say did tuning write?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.contribution import scored_position, share
from interp.models.norms import Norm, base_outputs, contribution_norms, repeated, rounding
from interp.prompts import PromptPairs, Prompts
from interp.prompts.asked import Form, as_chats
from interp.prompts.mixed import SET
from interp.results import Result, analysis
from interp.spelling import spelled
from interp.stats import Estimate, bootstrap, standard_error

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

_SHOWN_PROMPTS = 3
_SHOWN_TEXT = 160


@dataclass(frozen=True, eq=False)
class TucoResult(Result):
    """Norms of what base's blocks and tuning add to the stream, per prompt; ``tuco`` and the other shares are made of them.

    PTC_l is what base's block l adds on the tuned model's stream, FTC_l what the tuned block adds beyond it. Fields ``pre_*``
    are norms of PTC, ``tuning_*`` of FTC.

    Attributes:
        pre_sum: of the sums over the layers up to this one, at the position that is scored; the last is TuCo's.
        tuning_sum: alike.
        pre_layer: of single layers, at the position that is scored.
        tuning_layer: alike.
        pre_whole: of the sums up to this layer, at all positions up to the one that is scored together.
        tuning_whole: alike.
        pre_token: of the sums over all layers, at every position; NaN behind the end of a prompt.
        tuning_token: alike.
        base_output: norm of the stream leaving the last block of base in a run of its own, at the position that is scored; NaN where base
            does not know a token. None where it was not asked for.
        output_change: norm of the difference of the tuned model's from it, or None.
        closure: error of x_L = x_0 + PTC + FTC, relative to x_L, at all positions together.
        floor: change of TuCo when a prompt runs in a batch of another size, of the prompts that were tried.
        rounding: TuCo that rounding to half precision alone gives, of the prompts that were tried.
        ids: the tokens of the prompts and answers, -1 behind their end.
        scored: index of the position that is scored.
        answer: index of the first token of the answer, -1 without one.
        vocabulary: id -> text of the tokens that occur.
        sets: name of the set that each prompt is of; empty where there is only one.
        norm: ``l1`` or ``l2``.
        position: what is scored.
        draw_seed: of the bootstrap.
        notes: what to know about this pair.
    """

    pre_sum: Float[Tensor, "prompt layer"]
    tuning_sum: Float[Tensor, "prompt layer"]
    pre_layer: Float[Tensor, "prompt layer"]
    tuning_layer: Float[Tensor, "prompt layer"]
    pre_whole: Float[Tensor, "prompt layer"]
    tuning_whole: Float[Tensor, "prompt layer"]
    pre_token: Float[Tensor, "prompt pos"]
    tuning_token: Float[Tensor, "prompt pos"]
    base_output: Float[Tensor, " prompt"] | None
    output_change: Float[Tensor, " prompt"] | None
    closure: Float[Tensor, " prompt"]
    floor: Float[Tensor, " tried"]
    rounding: Float[Tensor, " rounded"]
    ids: Int[Tensor, "prompt pos"]
    scored: Int[Tensor, " prompt"]
    answer: Int[Tensor, " prompt"]
    vocabulary: dict[int, str]
    sets: tuple[str, ...]
    norm: Norm
    position: str
    draw_seed: int
    notes: tuple[str, ...]

    @property
    def tuco(self) -> Float[Tensor, " prompt"]:
        """|FTC| / (|PTC| + |FTC|) of the sums over layers, at the position that is scored; 0 where both vanish."""
        return share(self.tuning_sum[:, -1], self.pre_sum[:, -1])

    @property
    def preco(self) -> Float[Tensor, " prompt"]:
        """What base's blocks contribute, 1 - TuCo."""
        return 1 - self.tuco

    @property
    def cumulative(self) -> Float[Tensor, "prompt layer"]:
        """TuCo of the sums up to each layer."""
        return share(self.tuning_sum, self.pre_sum)

    @property
    def beta(self) -> Float[Tensor, " prompt"]:
        """The largest share over prefixes of layers, of all positions together; it bounds how far the two models' outputs are apart."""
        return share(self.tuning_whole, self.pre_whole).amax(1)

    @property
    def output_co(self) -> Float[Tensor, " prompt"] | None:
        """|x_L - base's x_L| / (|base's x_L| + |x_L - base's x_L|) of two independent runs, before the final norm, or None."""
        return None if self.output_change is None or self.base_output is None else share(self.output_change, self.base_output)

    @property
    def by_token(self) -> Float[Tensor, "prompt pos"]:
        """TuCo at every position: of the stream from which the next token is predicted."""
        return share(self.tuning_token, self.pre_token)

    @property
    def answer_tuco(self) -> Float[Tensor, " prompt"]:
        """Mean of ``by_token`` over the positions that predict tokens of the answer: another quantity than TuCo. NaN without an answer."""
        return torch.where(self._predicts_answer, self.by_token, torch.nan).nanmean(1)

    @property
    def _predicts_answer(self) -> Tensor:
        pos, length = torch.arange(self.ids.shape[1]), (self.ids >= 0).sum(1, keepdim=True)
        return (self.answer[:, None] > 0) & (pos >= self.answer[:, None] - 1) & (pos < length - 1)

    @property
    def numerical_floor(self) -> float:
        """TuCo below this is rounding: the larger of ``floor`` and the mean of ``rounding``."""
        return max([0.0, *self.floor.tolist(), *([float(self.rounding.mean())] if len(self.rounding) else [])])

    @property
    def texts(self) -> list[str]:
        """The prompts up to the position that is scored."""
        return ["".join(self.vocabulary[int(i)] for i in row[: int(end) + 1]) for row, end in zip(self.ids, self.scored, strict=True)]

    @property
    def by_set(self) -> dict[str, list[int]]:
        """Name -> its prompts, the set with the highest mean TuCo first; empty where there is only one set."""
        rows = {name: [i for i, other in enumerate(self.sets) if other == name] for name in dict.fromkeys(self.sets)}
        return dict(sorted(rows.items(), key=lambda entry: -float(self.tuco[entry[1]].mean())))

    def mean_of(self, rows: list[int]) -> Estimate:
        """Mean TuCo of some prompts, with its interval."""
        return bootstrap(self.tuco[rows], seed=self.draw_seed)

    def summary(self) -> str:
        """Mean TuCo with its interval, of every set where there are several; the range over prompts, and how exact it is."""
        x, n = self.tuco, len(self.tuco)
        spread = f"{float(x.min()):.3g} to {float(x.max()):.3g} over n = {n} prompts" if n > 1 else "one prompt, so no interval"
        also = [f"beta {float(self.beta.mean()):.3g}"]
        if self.output_co is None:
            also += ["OutputCo with output_co=True"]
        elif not self.output_co.isnan().all():
            known = int((~self.output_co.isnan()).sum())
            also += [f"OutputCo {float(self.output_co.nanmean()):.3g}" + f" of the {known} prompts whose tokens base knows" * (known < n)]
        if not self.answer_tuco.isnan().all():
            also += [f"mean over the tokens of the answers {float(self.answer_tuco.nanmean()):.3g}"]
        return (
            f"{self._means()} ({self.norm.upper()} norm, position {self.position}; {spread}; {', '.join(also)}; "
            f"closure error at most {float(self.closure.max()):.1g}, {'; '.join([self._exactness(), *self.notes])})"
        )

    def _means(self) -> str:
        if not self.sets:
            return f"TuCo is {_told(self.mean_of(list(range(len(self.tuco)))))} on average"
        told = [f"{_told(self.mean_of(rows))} on {name} (n = {len(rows)})" for name, rows in self.by_set.items()]
        return f"Mean TuCo is {', '.join(told[:-1]) + ' and ' if told[:-1] else ''}{told[-1]}"

    def _exactness(self) -> str:
        if len(self.rounding):
            return f"rounding to half precision alone gives {float(self.rounding.mean()):.2g}"
        if not len(self.floor):
            return "no numerical floor measured"
        return f"in a batch of another size {len(self.floor)} of the prompts move by at most {self.numerical_floor:.1g}"

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """The mean of every set."""
        sets = self.by_set or {"all prompts": list(range(len(self.tuco)))}
        return {f"TuCo on {name}": {"tuned": self.mean_of(rows)} for name, rows in sorted(sets.items())}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per layer, of every set, with means over prompts (``tuco`` is cumulative); ``per="prompt"``: one row per prompt.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            columns: dict[str, Any] = {"prompt": range(len(self.ids)), "text": self.texts} | ({"set": list(self.sets)} if self.sets else {})
            numbers = {"tuco": self.tuco, "preco": self.preco, "beta": self.beta, "output_co": self.output_co}
            numbers |= {"answer_tuco": self.answer_tuco, "closure": self.closure}
            return pd.DataFrame(columns | {k: v.tolist() for k, v in numbers.items() if v is not None})
        if not self.sets:
            return self._layers(list(range(len(self.ids))))
        tables = [self._layers(rows) for rows in self.by_set.values()]
        for table, name in zip(tables, self.by_set, strict=True):
            table.insert(0, "set", name)
        return pd.concat(tables, ignore_index=True)

    def _layers(self, rows: list[int]) -> pd.DataFrame:
        import pandas as pd

        curve = bootstrap(self.cumulative[rows], seed=self.draw_seed)
        columns = {"layer": range(self.pre_sum.shape[1]), "tuco": curve.value, "low": curve.low, "high": curve.high}
        columns |= {"tuco_se": standard_error(self.cumulative[rows]), "beta": share(self.tuning_whole, self.pre_whole)[rows].mean(0)}
        columns |= {"pre": self.pre_layer[rows].mean(0), "tuning": self.tuning_layer[rows].mean(0)}
        return pd.DataFrame({k: v.tolist() if isinstance(v, Tensor) else v for k, v in columns.items()})

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The most and the least tuned prompts, half each."""
        import pandas as pd

        rows = self._ends(n)
        found: dict[str, Any] = {"prompt": rows} | ({"set": [self.sets[i] for i in rows]} if self.sets else {})
        found |= {"text": [_cut(self.texts[i]) for i in rows], "tuco": self.tuco[rows].tolist()}
        found |= {"beta": self.beta[rows].tolist()} | ({} if self.output_co is None else {"output_co": self.output_co[rows].tolist()})
        return pd.DataFrame(found)

    def _ends(self, n: int) -> list[int]:
        """The most and the least tuned prompts, half each, most first."""
        order = self.tuco.argsort(descending=True, stable=True).tolist()
        return order if len(order) <= n else [*order[: n - n // 2], *order[len(order) - n // 2 :]]

    def plot(self) -> go.Figure:
        """TuCo of the sums up to each layer: mean over prompts with its interval, of every set."""
        title, xlabel = "TuCo of what the layers up to this one have added", "layer"
        ylabel = f"|FTC| / (|PTC| + |FTC|), {self.norm.upper()}"
        if self.sets:
            curves = {name: bootstrap(self.cumulative[rows], seed=self.draw_seed) for name, rows in self.by_set.items()}
            means, bands = ({k: v.value for k, v in curves.items()}, {k: (v.low, v.high) for k, v in curves.items()})
            title += "; means with 95 % intervals"
            return _counted(plots.lines(means, bands=bands, title=title, xlabel=xlabel, ylabel=ylabel, floor=self.numerical_floor))
        curve = bootstrap(self.cumulative, seed=self.draw_seed)
        low, high = self.cumulative.quantile(torch.tensor([0.1, 0.9], dtype=self.cumulative.dtype), dim=0)
        series = {"mean over prompts, 95 % interval": curve.value, "middle 80 % of the prompts": self.cumulative.median(0).values}
        made = plots.lines(
            series,
            bands=dict(zip(series, ((curve.low, curve.high), (low, high)), strict=True)),
            title=title,
            xlabel=xlabel,
            ylabel=ylabel,
            floor=self.numerical_floor,
        )
        return _counted(made)

    def figures(self) -> dict[str, go.Figure]:
        """By set or by prompt, by layer, and along the answers where there are any."""
        by_layer = {"By layer": self.plot(), "Layers alone": self._norms()}
        found = {"By prompt set": self._by_set(), **by_layer} if self.sets else {**by_layer, "By prompt": self._by_prompt()}
        return found | ({} if self.answer_tuco.isnan().all() else {"Along the answer": self._along()})

    def _norms(self) -> go.Figure:
        series = {"base's blocks, |PTC|": self.pre_layer, "tuning, |FTC|": self.tuning_layer}
        means = {k: bootstrap(v, seed=self.draw_seed) for k, v in series.items()}
        made = plots.lines(
            {k: m.value for k, m in means.items()},
            bands={k: (m.low, m.high) for k, m in means.items()},
            title="What each layer adds at the position that is scored",
            xlabel="layer",
            ylabel=f"{self.norm.upper()} norm, mean over prompts",
        )
        return _counted(made)

    def _by_set(self) -> go.Figure:
        estimates = {name: self.mean_of(rows) for name, rows in self.by_set.items()}
        return plots.boxes(
            {name: self.tuco[rows] for name, rows in self.by_set.items()},
            means={name: (float(e.value), float(e.low), float(e.high)) for name, e in estimates.items()},
            labels={name: [self.texts[i][-80:] for i in rows] for name, rows in self.by_set.items()},
            title="TuCo of every prompt, set by set; in ink: the mean with its 95 % interval",
            xlabel=f"TuCo, {self.norm.upper()}",
            floor=self.numerical_floor,
        )

    def _by_prompt(self) -> go.Figure:
        order = self.tuco.argsort(stable=True)
        return plots.scatter(
            self.tuco[order],
            torch.arange(1, len(order) + 1) / len(order),
            labels=[self.texts[i][-80:] for i in order.tolist()],
            title="TuCo of every prompt",
            xlabel="TuCo",
            ylabel="share of prompts with at most this",
        )

    def _along(self) -> go.Figure:
        pos = torch.arange(self.ids.shape[1]) + 1 - self.answer[:, None]
        width = int(pos[self._predicts_answer].max()) + 1
        steps = [self.by_token[self._predicts_answer & (pos == i)] for i in range(width)]
        means = [bootstrap(x, seed=self.draw_seed) for x in steps]
        value, low, high = (torch.stack([getattr(m, end) for m in means]) for end in ("value", "low", "high"))
        return plots.lines(
            {"mean over prompts": value},
            bands={"mean over prompts": (low, high)},
            title="TuCo along the answer",
            xlabel="index of the predicted token of the answer",
            ylabel=f"TuCo at its prediction, {self.norm.upper()}",
            floor=self.numerical_floor,
        )

    def html(self) -> str:
        """The most and the least tuned prompts, each token coloured by TuCo at its prediction; the mark at the end is the next one's."""
        rows = self._ends(2 * _SHOWN_PROMPTS)
        top = float(self.by_token[rows].nan_to_num(0.0).max())
        pieces = []
        for row in rows:
            n = int((self.ids[row] >= 0).sum())
            words = [*(self.vocabulary[int(i)] for i in self.ids[row, :n]), "▸"]
            values = torch.cat([torch.full((1,), torch.nan), self.by_token[row, :n]])
            title = f"Prompt {row}{f', {self.sets[row]}' if self.sets else ''}: TuCo {float(self.tuco[row]):.3g}"
            if self.answer[row] > 0:
                title += f"; the answer begins at token {int(self.answer[row])}"
            unit = "TuCo at the prediction of this token"
            limits, floor = (0.0, top or 1.0), self.numerical_floor
            pieces.append(plots.coloured_tokens(words, values, difference=False, limits=limits, floor=floor, unit=unit, title=title))
        return f"<h3>The most and the least tuned prompts, token by token</h3>{''.join(pieces)}"


@analysis(version=2)
def tuco(
    pair: ModelPair,
    prompts: Prompts,
    *,
    position: str = "last_prompt",
    norm: Norm = "l1",
    chat: Form = "given",
    respond: int = 0,
    by: str = SET,
    stream: bool = False,
    output_co: bool = False,
    seed: int = 0,
) -> TucoResult:
    """How much of what the model is about to say did tuning write?

    On the tuned model's stream every block of base runs beside the tuned one: PTC_l = base_l(x_l) - x_l is what base would add,
    FTC_l = tuned_l(x_l) - base_l(x_l) what tuning adds beyond it, and x_L = x_0 + sum PTC + sum FTC exactly. TuCo is |FTC| /
    (|PTC| + |FTC|) of the sums over layers at the last prompt token (Nuti et al., ICML 2025, arXiv 2506.23423). 0: the blocks are
    those of base; 1: base's blocks add nothing. Layers may cancel within a sum, which is meant. The embedding x_0 and the final norm
    and unembedding are the tuned model's and in neither part. TuCo at the other tokens, and along an answer, comes with it;
    its mean over an answer is another quantity. Two forward passes per prompt. Padding changes nothing.

    Args:
        pair: the two models; an adapter's pair shares its weights. The tuned model's tokens are read.
        prompts: of any lengths. A position ``response`` in them says where an answer begins.
        position: what is scored: the last token before the answer, or a named position of one token.
        norm: ``l1`` as published, or ``l2``.
        chat: prompts as ``given``, or each as a user's message in the tuned model's ``template`` or in ``plain`` lines. Prompts of chat
            tasks have it already.
        by: name of a tag that tells sets of prompts apart, such as ``kind``; ``set`` is that of a mixture of sets, ``ioi + boxes``.
        respond: let the tuned model answer greedily with so many tokens, and score these too.
        stream: keep the tuned model's stream and read base's blocks from disk one at a time, so that memory holds one model.
        output_co: also run base on its own and compare the final streams; a third forward pass.
        seed: of the bootstrap.

    Raises:
        InputError: a position that is unknown or several tokens, no tag ``by``, an empty answer, a pair that is loaded one at a time
            without ``stream``, a base that cannot be streamed, or prompts that do not fit the models.
    """
    if norm not in ("l1", "l2"):
        raise InputError(f"norm is {norm!r}, expected l1 or l2")
    if isinstance(prompts, PromptPairs):
        raise InputError("tuco reads one text at a time; give the clean or the corrupt prompts of the pairs")
    if by != SET and by not in prompts.tags:
        raise InputError(f"prompts cannot be told apart by {by!r}; their tags: {', '.join(prompts.tags) or 'none'}")
    batch = pair.tuned.batch(as_chats(pair.tuned, prompts, chat))
    scored, answer = scored_position(batch, position)
    if respond:
        batch, answer = _answered(pair.tuned, batch, answer, respond)
    if stream and output_co:
        raise InputError("OutputCo runs base as a whole, which stream=True avoids; ask for one of them")
    found = contribution_norms(pair, batch, scored, norm, stream=stream)
    final = found.pop("final")
    exact = repeated(pair, batch, scored, norm, found) if not stream else torch.zeros(0, dtype=torch.float64)
    outputs = base_outputs(pair.base, batch, scored, final, norm) if output_co else {}
    ids = torch.where(batch.mask, batch.ids, -1).cpu()
    known = [i for i in ids.flatten().unique().tolist() if i >= 0]
    return TucoResult(
        **found,
        base_output=outputs.get("base_output"),
        output_change=outputs.get("output_change"),
        floor=exact,
        rounding=rounding(pair, batch, scored, norm, measure=not stream),
        ids=ids,
        scored=scored.cpu(),
        answer=answer,
        vocabulary=dict(zip(known, spelled(pair.tuned, known), strict=True)),
        sets=tuple(value or "none" for value in prompts.tags.get(by, ())),
        norm=norm,
        position=position,
        draw_seed=seed,
        notes=(*_notes(pair), *_silent(answer, respond)),
    )


def _answered(model: HookedModel, batch: Batch, answer: Tensor, respond: int) -> tuple[Batch, Tensor]:
    """The prompts with what the model answers, and where that begins."""
    if respond < 0 or bool((answer > 0).any()):
        raise InputError(f"respond={respond} lets the model answer; give a number of tokens, and prompts that have no response yet")
    new = model.generate(batch, respond)
    begins = torch.where(torch.tensor([len(ids) for ids in new]) > 0, batch.lengths.cpu(), -1)
    return Batch.of([[*row, *ids] for row, ids in zip(batch.rows(), new, strict=True)]), begins


def _notes(pair: ModelPair) -> tuple[str, ...]:
    """What a reader should know about x_0 and the head, which are in neither part."""
    a, b = pair.base.shape.d_vocab, pair.tuned.shape.d_vocab
    if a == b:
        return ()
    return (f"the embedding has {a} rows in base and {b} in tuned; x_0 and the unembedding are the tuned model's",)


def _silent(answer: Tensor, respond: int) -> tuple[str, ...]:
    """That some prompts were not answered, though an answer was asked for."""
    n = int((answer < 0).sum()) if respond else 0
    return (f"the tuned model ended {n} of {len(answer)} answers before their first token, so these have none",) if n else ()


def _counted(made: go.Figure) -> go.Figure:
    """Layers are whole numbers, few of which need a tick."""
    return made.update_xaxes(tickformat="d", nticks=12) if len(list(made.data[-1]["x"])) > 12 else made.update_xaxes(dtick=1)


def _told(found: Estimate) -> str:
    """An estimate, without an interval where a single prompt gives none."""
    return (
        f"{float(found.value):.3g}" if found.low.isnan() else f"{float(found.value):.3g} [{float(found.low):.3g}, {float(found.high):.3g}]"
    )


def _cut(text: str) -> str:
    """A long text without its middle."""
    half = _SHOWN_TEXT // 2
    return text if len(text) <= _SHOWN_TEXT else f"{text[:half]} ... {text[-half:]}"
