"""Which tokens does the tuned model prefer, over the user's texts?"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.prompts import PromptPairs, Prompts
from interp.results import Result, analysis
from interp.sites import Site
from interp.spelling import spelled
from interp.stats import permutation
from interp.sweeps.predictions import rounding_sizes
from interp.sweeps.shifts import BLOCKS, MEASURES, Shifts, shifts
from interp.sweeps.staged import grouped
from interp.sweeps.topics import topics as factorised
from interp.sweeps.windows import Window, shuffled_extremes, windows_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import ModelPair

DIRECTIONS = ("tuned", "base")
ORDERINGS = ("count", "share", "shift")
Direction = Literal["tuned", "base"]
Ordering = Literal["count", "share", "shift"]

_COLUMNS = {"tuned": {"count": "up", "share": "more", "shift": "gain"}, "base": {"count": "down", "share": "less", "shift": "loss"}}
_LEVEL = 0.05
_KEPT = 50  # tokens kept of each ordering
_HALVES = 20  # tokens compared between two halves of the texts
_CANDIDATES = 200  # tokens that make up topics
_IN_TOPIC = 12  # tokens shown of a topic
_SHOWN = 20
_CONTEXT = 12  # tokens shown on both sides of a window


@dataclass(frozen=True, eq=False)
class TokenShiftResult(Result):
    """Differences of log-probabilities, summed over the positions of the texts.

    Attributes:
        sums: by group of texts and token: ``up`` and ``down``, positions at which its increase (decrease) from base to tuned is among the
            ``top`` largest; ``more`` and ``less``, positions at which there is one above the floor; ``gain``, the difference times
            tuned's probability, and ``loss``, minus it times base's, which over all tokens add up to the KL; ``change``, the difference.
        positions: in every group.
        tokens: ids; those that are among the first by any ordering.
        p: sign-flip test over groups of texts that a token is as often among the increases as among the decreases.
        p_adjusted: the same, corrected for all shared tokens.
        agreement: of the first tokens of one half of the texts, the share that is among the first of the other half too.
        agreement_chance: of as many tokens drawn at random; NaN where there are none.
        llr: log p_tuned - log p_base of the actual token that follows position ``pos``; NaN where there is none.
        ids: the tokens of the texts; -1 after their end.
        shuffled: largest and smallest log-likelihood ratio of a window when the tokens of each text are shuffled, by draw.
        topic_weight: of the tokens of a topic, adding up to 1.
        topic_tokens: their ids.
        topic_mass: share of a topic in the factorisation.
        topic_stability: cosine with its partner from other starts, 1 is the same topic.
        topic_error: relative error of the factorisation, and of one in which no tokens rise together.
        common: median over all tokens of their mean difference: what normalisation does to every token alike.
        largest: of all differences, in size.
        numerical_floor: the largest difference that rounding alone makes, anywhere.
        counted: differences up to this are not counted: the floor, or, in half precision, where single cells are far worse than most, the
            root mean square of what rounding does; there the sign-flip test tells preference from noise.
        half: a model computes in half precision and its float32 copy did not fit the memory, so the floors lack that part.
        top: as the setting.
        window: likewise.
        step: likewise.
        texts: number of different texts (contexts), which are in ``len(positions)`` groups.
        shared: number of token ids compared.
        sizes: vocabulary of base and tuned.
        draw_seed: as the setting ``seed``.
        vocabulary: id -> text of the tokens that occur.
        labels: of the axes.
    """

    sums: Float[Tensor, "measure block token"]
    positions: Float[Tensor, " block"]
    tokens: Int[Tensor, " token"]
    p: Float[Tensor, " token"]
    p_adjusted: Float[Tensor, " token"]
    agreement: Float[Tensor, "direction ordering"]
    agreement_chance: Float[Tensor, "direction ordering"]
    llr: Float[Tensor, "prompt pos"]
    ids: Int[Tensor, "prompt pos"]
    shuffled: Float[Tensor, "draw 2"]
    topic_weight: Float[Tensor, "topic topic_token"]
    topic_tokens: Int[Tensor, " topic_token"]
    topic_mass: Float[Tensor, " topic"]
    topic_stability: Float[Tensor, " topic"]
    topic_error: Float[Tensor, " matrix"]
    common: float
    largest: float
    numerical_floor: float
    counted: float
    half: bool
    top: int
    window: int
    step: int
    texts: int
    shared: int
    sizes: tuple[int, int]
    draw_seed: int
    vocabulary: dict[int, str]
    labels: dict[str, tuple[str, ...]]

    def mean(self, measure: str) -> Float[Tensor, " token"]:
        """A measure per position."""
        return self.sums[MEASURES.index(measure)].double().sum(0) / self.positions.sum()

    def error(self, measure: str) -> Float[Tensor, " token"]:
        """Its standard error with groups of texts as the independent units; NaN for one group."""
        n, each = len(self.positions), self.sums[MEASURES.index(measure)].double()
        if n < 2:
            return torch.full((each.shape[1],), torch.nan, dtype=torch.float64)
        off = each - self.mean(measure) * self.positions[:, None]
        return (off.square().sum(0) * n / (n - 1)).sqrt() / self.positions.sum()

    def first(self, prefers: Direction = "tuned", by: Ordering = "count", n: int = 20) -> list[int]:
        """Indices into ``tokens`` of those that a model prefers most, first the most; tokens without any preference are left out.

        Args:
            prefers: the model that prefers them.
            by: ``count``, how often the difference is among the largest of a position; ``share``, how often it is there at all; ``shift``,
                its mean weighted by that model's probability, which is what it adds to the KL.
            n: how many.
        """
        return _order(dict(zip(MEASURES, self.sums.double().sum(1), strict=True)), prefers, by, n)

    @property
    def nothing(self) -> bool:
        """No difference is above rounding, and no token is preferred beyond noise all the same."""
        return self.largest <= self.numerical_floor and not len(self.tokens)

    @property
    def windows(self) -> list[Window]:
        """Every window of the texts with its log-likelihood ratio, the largest first."""
        return sorted(windows_of(self.llr, self.window, self.step), key=lambda w: -w.llr)

    def summary(self) -> str:
        """The first tokens with their noise, agreement between halves of the texts, and the largest window."""
        n, half = int(self.positions.sum()), " (without what half precision does)" if self.half else ""
        floor = f"numerical floor {self.numerical_floor:.1g}{half}"
        if self.counted < self.numerical_floor:
            floor += f", the largest rounding of half precision; counted is what is above the typical one, {self.counted:.1g}"
        if self.nothing:
            return (
                f"0 tokens are preferred by either model: no difference beyond rounding, as no log-probability differs by more than "
                f"{self.largest:.1g} at any of {n} positions ({floor})"
            )
        told = [said for prefers in DIRECTIONS if (said := self._said(prefers))]
        if moved := self.first("tuned", "shift", 1):
            size, error = float(self.mean("gain")[moved[0]]), float(self.error("gain")[moved[0]])
            noise = "" if error != error else f" +- {error:.1g}"
            told.append(f"weighted by its probability {self._name(moved[0])} comes first, with {size:.2g}{noise} nats of KL per position")
        agreement, chance = float(self.agreement[0, 0]), float(self.agreement_chance[0, 0])
        if agreement == agreement:
            told.append(f"of the tokens that come first {agreement:.0%} do so in both halves of the texts (by chance {chance:.0%})")
        if found := self.windows:
            told.append(
                f"the window of text that speaks most for tuned does so by {found[0].llr:.3g} nats (where tokens are shuffled within "
                f"texts, {float(self.shuffled[:, 0].mean()):.3g})"
            )
        return f"{'; '.join(told)}; {floor}"

    def _ahead(self, prefers: Direction) -> list[int]:
        """Those of ``first`` that are more often among the largest differences this way than the other way."""
        return [i for i in self.first(prefers) if self.mean(_COLUMNS[prefers]["count"])[i] > self.mean(_other(prefers, "count"))[i]]

    def preferred(self, prefers: Direction = "tuned") -> list[int]:
        """Indices into ``tokens`` of those that a model prefers beyond noise, first the most."""
        return [i for i in self._ahead(prefers) if self.p_adjusted[i] < _LEVEL]

    def _said(self, prefers: Direction) -> str:
        names = _COLUMNS[prefers]
        order, sure = self._ahead(prefers), self.preferred(prefers)
        if not order:
            return f"{prefers} prefers no token"
        i = (sure or order)[0]
        rate, back, error = (
            float(x[i]) for x in (self.mean(names["count"]), self.mean(_other(prefers, "count")), self.error(names["count"]))
        )
        noise = "" if error != error else f" +- {error:.1%}"
        n, alone = f"{self.texts} text{'s' * (self.texts != 1)}", self.texts == 1
        units = n if len(self.positions) == self.texts else f"{len(self.positions)} groups of {n}"
        words = ("increases", "decreases") if prefers == "tuned" else ("decreases", "increases")
        test = f"among the {self.top} largest {words[0]} at {rate:.1%}{noise} of {int(self.positions.sum())} positions, among the largest "
        test += f"{words[1]} at {back:.1%}; "
        test += "1 text, so no test" if alone else f"p = {float(self.p_adjusted[i]):.2g} over {units}, adjusted for {self.shared} tokens"
        if alone:
            return f"{prefers} prefers {self._name(i)} most ({test})"
        if not sure:
            return f"{prefers} prefers no token beyond noise; the first is {self._name(i)} ({test})"
        more = [self._name(j) for j in sure[1:5]]
        return f"{prefers} prefers {self._name(i)} most ({test})" + (f", then {', '.join(more)}" if more else "")

    def _name(self, i: int) -> str:
        return repr(self.vocabulary[int(self.tokens[i])])

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per token that is kept, by ``up``; ``per="prompt"``: one row per token of the texts with its log-likelihood ratio.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            row, pos = (~self.llr.isnan()).nonzero(as_tuple=True)
            after = [self.vocabulary[int(i)] for i in self.ids[row, pos + 1]]
            return pd.DataFrame({"prompt": row.numpy(), "pos": pos.numpy() + 1, "token": after, "llr": self.llr[row, pos].numpy()})
        columns: dict[str, Any] = {"id": self.tokens.tolist(), "token": [self.vocabulary[int(i)] for i in self.tokens]}
        for measure in MEASURES:
            columns |= {measure: self.mean(measure).tolist(), f"{measure}_se": self.error(measure).tolist()}
        columns |= {"p": self.p.tolist(), "p_adjusted": self.p_adjusted.tolist()}
        return pd.DataFrame(columns).sort_values(["up", "change"], ascending=False, kind="stable", ignore_index=True)

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The first tokens that tuned prefers, then those that base does, by how often; ``back`` is the other direction."""
        import pandas as pd

        rows = []
        for prefers in DIRECTIONS:
            names = _COLUMNS[prefers]
            for i in self.first(prefers, n=n):
                row: dict[str, Any] = {"token": self._name(i), "preferred by": prefers}
                row |= {"positions": float(self.mean(names["count"])[i]), "positions_se": float(self.error(names["count"])[i])}
                row |= {
                    "back": float(self.mean(_other(prefers, "count"))[i]),
                    "p": float(self.p[i]),
                    "p_adjusted": float(self.p_adjusted[i]),
                }
                row |= {"share": float(self.mean(names["share"])[i]), "expected_shift": float(self.mean(names["shift"])[i])}
                rows.append(row | {"expected_shift_se": float(self.error(names["shift"])[i])})
        return pd.DataFrame(rows)

    def edit(self, tokens: int = 10, *, side: Direction = "base") -> Edit:
        """What of the preference needs no context: a bias of the unembedding that shifts the first tokens by their mean difference.

        Given to base, it makes these tokens as much more likely as tuned does on average; ``.scaled(-1)`` with ``side="tuned"``
        takes it away there.

        Args:
            tokens: how many, by ``count``.
            side: the model that the edit fits; the vocabularies may differ.

        Raises:
            InputError: tuned prefers no token.
        """
        order = self.first("tuned", "count", tokens)
        if not order:
            raise InputError("tuned prefers no token, so there is nothing to add to base")
        delta = torch.zeros(self.sizes[side == "tuned"])
        delta[self.tokens[order]] = (self.mean("change")[order] - self.common).float()
        return Edit((WeightChange(Site("b_U"), delta),), f"shift of {len(order)} tokens")

    def plot(self) -> go.Figure:
        """How often the first tokens are among the largest increases, beside how often among the largest decreases."""
        return self._bars("tuned")

    def figures(self) -> dict[str, go.Figure]:
        """What either model prefers, what adds to the KL, windows against shuffled text, topics."""
        drawn = {"What tuned prefers": self._bars("tuned"), "What base prefers": self._bars("base"), "Expected shift": self._shift()}
        if found := self.windows:
            ranked = [w.llr for w in found]
            drawn["Windows of text"] = plots.lines(
                {
                    "windows": ranked,
                    "largest where tokens are shuffled": [float(self.shuffled[:, 0].mean())] * len(ranked),
                    "smallest where tokens are shuffled": [float(self.shuffled[:, 1].mean())] * len(ranked),
                },
                title=f"How much windows of {self.window} tokens speak for tuned (above 0) or base (below)",
                xlabel="windows, by log-likelihood ratio",
                ylabel="sum of log p_tuned - log p_base of the actual tokens, nats",
                floor=self.counted * self.window,
            )
        if len(self.topic_mass):
            drawn["Topics"] = self._topics()
        return drawn

    def _bars(self, prefers: Direction) -> go.Figure:
        order, column = self.first(prefers, n=_SHOWN), _COLUMNS[prefers]["count"]
        words = ("increases", "decreases") if prefers == "tuned" else ("decreases", "increases")
        series = {f"among the largest {w}": self.mean(m)[order] for w, m in zip(words, (column, _other(prefers, "count")), strict=True)}
        name, errors = next(iter(series)), self.error(column)[order]
        known = {} if bool(errors.isnan().any()) or not order else {name: (series[name] - 2 * errors, series[name] + 2 * errors)}
        return plots.bars(
            [self.vocabulary[int(self.tokens[i])] for i in order],
            series,
            intervals=known,
            title=f"Tokens that {prefers} prefers: how often their change of log-probability is among the {self.top} largest",
            xlabel="token",
            ylabel="share of positions, +- 2 s.e.",
            horizontal=True,
            tokens=True,
        )

    def _shift(self) -> go.Figure:
        """What the first tokens by shift add to the KL."""
        order = self.first("tuned", "shift", _SHOWN)
        value, error = self.mean("gain")[order], self.error("gain")[order]
        name = "mean of p_tuned (log p_tuned - log p_base)"
        return plots.bars(
            [self.vocabulary[int(self.tokens[i])] for i in order],
            {name: value},
            intervals={} if bool(error.isnan().any()) or not order else {name: (value - 2 * error, value + 2 * error)},
            title="Tokens whose preference matters most: what they add to KL(tuned || base)",
            xlabel="token",
            ylabel="nats per position, +- 2 s.e.",
            horizontal=True,
            tokens=True,
            floor=self.counted,
        )

    def _topics(self) -> go.Figure:
        shown = list(dict.fromkeys(int(i) for w in self.topic_weight for i in w.argsort(descending=True)[:_IN_TOPIC] if w[i] > 0))
        names = [f"topic {t + 1}: {float(m):.0%}" for t, m in enumerate(self.topic_mass)]
        return plots.heatmap(
            self.topic_weight[:, shown],
            [self.vocabulary[int(self.topic_tokens[i])] for i in shown],
            names,
            title="Topics: tokens whose log-probability rises at the same positions",
            xlabel="token",
            ylabel="topic and its share",
            unit="weight within the topic",
            tokens="x",
            difference=False,
        )

    def html(self) -> str:
        """The topics in words, and the windows of text that speak most for either model with their tokens coloured."""
        if self.nothing:
            return "<p>No difference beyond rounding.</p>"
        return "".join([self._topic_table(), *self._windows("tuned", 6), *self._windows("base", 3)])

    def _topic_table(self) -> str:
        if not len(self.topic_mass):
            return ""
        rows = []
        for t, weight in enumerate(self.topic_weight):
            order = [i for i in weight.argsort(descending=True)[:_IN_TOPIC].tolist() if weight[i] > 0]
            words = ", ".join(
                f"<code>{plots.visible(self.vocabulary[int(self.topic_tokens[i])])}</code> {float(weight[i]):.2f}" for i in order
            )
            stable = "" if self.topic_stability[t].isnan() else f"{float(self.topic_stability[t]):.2f}"
            rows.append(f"<tr><td>{t + 1}</td><td>{words}</td><td>{float(self.topic_mass[t]):.0%}</td><td>{stable}</td></tr>")
        error, chance = self.topic_error.tolist()
        said = html.escape(
            f"Tokens that rise together. What the topics leave over is {error:.2f} of the whole; it is {chance:.2f} where every token's "
            "increases are shuffled over the positions, so that none rise together. Stability is the cosine with the same topic found "
            "from other starts."
        )
        head = "".join(f"<th>{h}</th>" for h in ("topic", "tokens and their weight", "share", "stability"))
        return f"<h4>Topics</h4><p>{said}</p><table><tr>{head}</tr>{''.join(rows)}</table>"

    def _windows(self, prefers: Direction, n: int) -> list[str]:
        """The windows that speak most for a model, none over another, tokens around them without colour."""
        sign = 1 if prefers == "tuned" else -1
        chosen: list[Window] = []
        for w in sorted(self.windows, key=lambda w: -sign * w.llr):
            if sign * w.llr > self.counted * self.window and not any(w.overlaps(c) for c in chosen):
                chosen.append(w)
            if len(chosen) == n:
                break
        if not chosen:
            return []
        top = max(float(self.llr[w.prompt, w.start - 1 : w.stop - 1].abs().nan_to_num(0.0).max()) for w in chosen)
        pieces = [f"<h4>Windows of text that speak most for {prefers}</h4>"]
        for w in chosen:
            length = int((self.ids[w.prompt] >= 0).sum())
            low, high = max(0, w.start - _CONTEXT), min(length, w.stop + _CONTEXT)
            values = torch.full((high - low,), torch.nan)
            values[w.start - low : w.stop - low] = self.llr[w.prompt, w.start - 1 : w.stop - 1]
            piece = plots.coloured_tokens(
                [self.vocabulary[int(i)] for i in self.ids[w.prompt, low:high]],
                values,
                difference=True,
                limits=(-top, top),
                floor=self.counted,
                unit="nats: log p_tuned - log p_base of this token",
                title=f"Text {w.prompt}, tokens {w.start} to {w.stop - 1}: {w.llr:+.3g} nats in all",
            )
            pieces.append(piece)
        return pieces


@analysis(version=1)
def token_shift(
    pair: ModelPair, prompts: Prompts, *, top: int = 100, topics: int = 3, window: int = 20, step: int = 5, seed: int = 0
) -> TokenShiftResult:
    """Which tokens does the tuned model prefer, over the user's texts?

    After every token of the texts both models predict the next one, and the log-probability of every token of the vocabulary is
    compared. The ``top`` largest increases of a position are counted; tokens are ordered by that count, by the share of positions with
    an increase, and by the mean increase weighted by tuned's probability, which is what the token adds to KL(tuned || base). The
    same is done for decreases, and one is the control of the other: a token whose log-probability merely varies a lot is as often
    among the decreases. A sign-flip test over texts says so for every token, adjusted for all of them; beyond 64 texts the units are
    groups of them. Differences are of log-probabilities, as logits have a constant of their own at every position. Non-negative matrix
    factorisation of the increases [position token] shows which tokens rise together, and windows of text are ranked by the
    log-likelihood ratio of their actual tokens (after the diffing toolkit of Minder et al.,
    github.com/science-of-finetuning/diffing-toolkit).

    Args:
        pair: the two models.
        prompts: texts.
        top: how many increases of a position are counted.
        topics: how many are looked for; 0 looks for none.
        window: tokens of a window; a shorter text is one window.
        step: tokens from one window to the next.
        seed: of the tests, of the starts of the factorisation and of shuffling.

    Raises:
        InputError: settings out of range, pairs of prompts, or models that are loaded one at a time.
    """
    _check(pair, prompts, {"top": (top, 1), "topics": (topics, 0), "window": (window, 1), "step": (step, 1)})
    batch, vocab = pair.batch(prompts), pair.shared_vocab
    floors = [rounding_sizes(model, batch, vocab) for _, model in pair.sides()]
    floor, coarse = sum(f.largest for f in floors), any(model.dtype.itemsize < 4 for _, model in pair.sides())
    counted = math.hypot(*(f.typical for f in floors)) if coarse else floor
    group = grouped(prompts.contexts)
    found = shifts(pair, batch, group % BLOCKS, top, counted)
    totals = dict(zip(MEASURES, found.sums.double().sum(1), strict=True))
    up, down = (found.sums[MEASURES.index(m)] for m in ("up", "down"))
    test = permutation((up - down).double(), seed=seed)
    if found.largest <= floor and not bool((test.adjusted < _LEVEL).any()):
        totals |= dict.fromkeys(("more", "less"), torch.zeros(vocab))  # rounding may have made all of it: no token is preferred
    ranked = [i for prefers in DIRECTIONS for by in ORDERINGS for i in _order(totals, prefers, by, _KEPT)]
    kept = torch.tensor(sorted(set(ranked)), dtype=torch.long)
    agreement, chance = _agreement(found)
    candidates = torch.tensor(_order(totals, "tuned", "count", _CANDIDATES), dtype=torch.long)
    rising = factorised(_matrix(found, candidates), topics, seed)
    ids = torch.where(batch.mask.cpu(), batch.ids.cpu(), -1)
    known = sorted({i for i in torch.cat([ids.flatten(), kept, candidates]).unique().tolist() if i >= 0})
    return TokenShiftResult(
        sums=found.sums[:, :, kept],
        positions=found.positions,
        tokens=kept,
        p=test.p[kept],
        p_adjusted=test.adjusted[kept],
        agreement=agreement,
        agreement_chance=chance,
        llr=found.llr,
        ids=ids,
        shuffled=shuffled_extremes(found.llr, window, step, seed),
        topic_weight=rising.weight,
        topic_tokens=candidates,
        topic_mass=rising.mass,
        topic_stability=rising.stability,
        topic_error=torch.tensor([rising.error, rising.shuffled]),
        common=float(totals["change"].median() / found.positions.sum()),
        largest=found.largest,
        numerical_floor=floor,
        counted=counted,
        half=any(f.lacking for f in floors),
        top=top,
        window=window,
        step=step,
        texts=int(group.max()) + 1,
        shared=vocab,
        sizes=(pair.base.shape.d_vocab, pair.tuned.shape.d_vocab),
        draw_seed=seed,
        vocabulary=dict(zip(known, spelled(pair.base, known), strict=True)),
        labels={"measure": MEASURES, "direction": DIRECTIONS, "ordering": ORDERINGS, "matrix": ("increases", "shuffled")},
    )


def _check(pair: ModelPair, prompts: object, numbers: dict[str, tuple[object, int]]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is a whole number from {least}, but it is {value!r}")
    if isinstance(prompts, PromptPairs):
        raise InputError("token_shift reads one text at a time; give the clean or the corrupt prompts of the pairs")
    if pair.one_at_a_time:
        raise InputError("token_shift needs both models at once, but the pair is loaded one at a time")


def _other(prefers: str, by: Ordering) -> str:
    """The measure of the other direction."""
    return _COLUMNS["base" if prefers == "tuned" else "tuned"][by]


def _order(totals: dict[str, Tensor], prefers: str, by: str, n: int) -> list[int]:
    """Tokens by a measure; among equal ones, by the size of their mean difference. Those without any are left out."""
    if by not in ORDERINGS or prefers not in DIRECTIONS:
        raise InputError(f"tokens are ordered by {', '.join(ORDERINGS)} of tuned or base, not by {by} of {prefers}")
    values, change = totals[_COLUMNS[prefers][by]], totals["change"] * (1 if prefers == "tuned" else -1)
    there = (totals[_COLUMNS[prefers]["share"]] > 0) & (values > 0)
    second = change.argsort(descending=True, stable=True)
    order = second[values[second].argsort(descending=True, stable=True)]
    return order[there[order]][:n].tolist()


def _agreement(found: Shifts) -> tuple[Float[Tensor, "direction ordering"], Float[Tensor, "direction ordering"]]:
    """Share of the first tokens that are the same in the odd and the even groups of texts, and what chance gives."""
    value = torch.full((len(DIRECTIONS), len(ORDERINGS)), torch.nan, dtype=torch.float64)
    chance = value.clone()
    if len(found.positions) < 2:
        return value, chance
    halves = [dict(zip(MEASURES, found.sums[:, i::2].double().sum(1), strict=True)) for i in (0, 1)]
    for d, prefers in enumerate(DIRECTIONS):
        for o, by in enumerate(ORDERINGS):
            first, second = (_order(half, prefers, by, _HALVES) for half in halves)
            if n := max(len(first), len(second)):
                value[d, o] = len(set(first) & set(second)) / n
                chance[d, o] = min(len(first), len(second)) / found.sums.shape[2]
    return value, chance


def _matrix(found: Shifts, candidates: Int[Tensor, " topic_token"]) -> Float[Tensor, "sample topic_token"]:
    """The increases of some tokens at the sampled positions, 0 where they are not among the largest."""
    vocab = found.sums.shape[2]
    column = torch.full((vocab + 1,), -1)
    column[candidates] = torch.arange(len(candidates))
    where = column[found.sampled_ids]  # an id of -1 reads the last entry, which is no token
    matrix = torch.zeros(len(where), len(candidates))
    rows = torch.arange(len(where))[:, None].expand_as(where)
    matrix[rows[where >= 0], where[where >= 0]] = found.sampled[where >= 0]
    return matrix
