"""What do two models write behind the same prompts, and where do they part?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.models.contrast import Writer, Written, first_difference, partings, write
from interp.plots import texts as shown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.spelling import spelled
from interp.stats import Estimate, plus_minus, ratio_of_means, wilson
from interp.sweeps.staged import by_context, grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import ModelPair

SIDES = ("base", "tuned")
GREEDY, SAMPLED = ("base greedy", "tuned greedy"), ("base sampled", "tuned sampled")
_GATED = "tuned gated"
_SHOWN_PROMPTS = 5
_NEXT_SEED = 2**32  # between the seeds of the samples of a prompt


@dataclass(frozen=True, eq=False)
class CompletionsResult(Result):
    """Texts that two models write behind the same prompts, every token scored by both.

    Log-probabilities are in nats over the token ids that both models know, renormalised to them.

    Attributes:
        ids: the tokens, -1 behind the end.
        logp: of every token; NaN behind the end, and where a token stands that one of the models does not know.
        end: the end token that ended a text, which is not part of it; -1 where it ran to its full length.
        end_logp: of the end token.
        parted: of the greedy texts, the index of the first token that differs; -1 where none does. An end counts as a token.
        parting: log-probabilities there of base's token and of tuned's; NaN where they do not part.
        rereading: the index of the first token of its own greedy text at which a model that reads it in another way would go on
            otherwise; -1 where it never would.
        floor: the most by which the log-probability of a token of the greedy texts changes when they are read in another way: at once
            and in another batch, and in half precision also with the weights computed in float32.
        half: a model computes in half precision and its float32 copy did not fit the memory (or edits were in force), so rounding is
            known in part only.
        kinds: how each text was written.
        said: name of a text -> what was written behind each prompt.
        prompts: the prompts.
        unit: number of each prompt's context; statistics are of contexts where several prompts share one.
        vocabulary: id -> text of the tokens that occur.
        shared: number of token ids that both models know.
        amplification: of the amplified texts.
        gate: of the gated and the amplified texts.
        temperature: of all that is sampled.
        seed: of samples and of the intervals.
        labels: of the axes side, choice (whose token) and text.
    """

    ids: Int[Tensor, "text prompt new"]
    logp: Float[Tensor, "side text prompt new"]
    end: Int[Tensor, "text prompt"]
    end_logp: Float[Tensor, "side text prompt"]
    parted: Int[Tensor, " prompt"]
    parting: Float[Tensor, "side choice prompt"]
    rereading: Int[Tensor, "side prompt"]
    floor: Float[Tensor, "side prompt"]
    half: bool
    kinds: tuple[str, ...]
    said: dict[str, tuple[str, ...]]
    prompts: tuple[str, ...]
    unit: Int[Tensor, " prompt"]
    vocabulary: dict[int, str]
    shared: int
    amplification: tuple[float, ...]
    gate: float
    temperature: float
    seed: int
    labels: dict[str, tuple[str, ...]]

    @property
    def s(self) -> Float[Tensor, "text prompt new"]:
        """Difference log p_tuned - log p_base of every token: positive where tuned finds it likelier."""
        return self.logp[1] - self.logp[0]

    @property
    def numerical_floor(self) -> float:
        """How much of ``s`` rounding alone can make."""
        return float(self.floor.amax(1).sum())

    @property
    def same(self) -> Tensor:
        """Prompts behind which both write the same greedy text, boolean [prompt]."""
        return self.parted < 0

    @property
    def ties(self) -> Tensor:
        """Prompts where the greedy texts part at two tokens that are equally likely to both models, within rounding, [prompt]."""
        return ((self.parting[:, 0] - self.parting[:, 1]).abs() <= self.numerical_floor).all(0)

    @property
    def differs(self) -> bool:
        """Whether anything that was written tells the models apart, beyond rounding."""
        scored = torch.cat([self.s.flatten(), (self.end_logp[1] - self.end_logp[0]).flatten()]).nan_to_num(0.0)
        unknown = (self.logp.isnan() & (self.ids >= 0)).any()
        return bool((scored.abs() > self.numerical_floor).any() | unknown)

    def interval(self, kind: str) -> Estimate:
        """Mean ``s`` per token of the texts of a kind, with its 95 % interval over prompts."""
        return self._mean(self.s, kind)

    def base_perplexity(self, kind: str) -> Estimate:
        """The exponential of base's mean negative log-likelihood per token of the texts of a kind, with its 95 % interval over prompts."""
        e = self._mean(-self.logp[0], kind)
        return e if e.refused else Estimate(e.value.exp(), e.low.exp(), e.high.exp())

    def distinct_2(self, kind: str) -> Estimate:
        """Share of the pairs of neighbouring tokens of a text that are new in it, mean over texts of a kind; loops bring it down."""
        return self._mean(_new_bigrams(self.ids)[..., None], kind)

    def first_difference(self, text: int, other: int) -> Int[Tensor, " prompt"]:
        """Index of the first token at which two texts differ; -1 where none does."""
        return first_difference(self.ids[text], self.ids[other])

    def _texts(self, kind: str) -> list[int]:
        if kind not in self.kinds:
            raise InputError(f"there are no texts of the kind {kind!r}; there are {', '.join(dict.fromkeys(self.kinds))}")
        return [i for i, k in enumerate(self.kinds) if k == kind]

    def _mean(self, values: Float[Tensor, "text prompt item"], kind: str) -> Estimate:
        """Mean over the items of a kind that are there; the interval is over prompts, or contexts where these are shared."""
        some = values[self._texts(kind)].double()
        there = ~some.isnan()
        top, count = (self._per_unit(x.sum((0, 2))) for x in (some.nan_to_num(0.0), there.double()))
        if not count.any():
            nothing = torch.tensor(math.nan, dtype=torch.float64)
            return Estimate(nothing, nothing, nothing, "no tokens to score")
        return ratio_of_means(top, count, seed=self.seed)

    def _per_unit(self, values: Float[Tensor, " prompt"]) -> Float[Tensor, " context"]:
        return torch.zeros(int(self.unit.max()) + 1, dtype=torch.float64).index_add(0, self.unit, values.double())

    def _share(self, hits: Tensor) -> tuple[float, float, float]:
        """Share of prompts with Wilson's 95 % interval."""
        units = by_context(hits.double(), self.unit)
        return (float(units.mean()), *wilson(float(units.sum()), len(units)))

    def summary(self) -> str:
        """Share of equal greedy texts with its noise, where they part, and how much likelier tuned finds what is written."""
        n = len(self.prompts)
        share, low, high = self._share(self.same)
        prompts = f"{n} prompt{'' if n == 1 else 's'}"
        departs = int((self.rereading >= 0).any(0).sum())
        told = f"Both models write the same greedy text behind {share:.0%} [{low:.0%}, {high:.0%}] of {prompts}"
        told += f" (up to {self.ids.shape[2]} tokens; rounding alone makes a model depart from its own text behind {departs})"
        if not bool(self.same.all()):
            parted = ~self.same
            after = plus_minus(by_context(self.parted[parted].double(), _renumbered(self.unit[parted])))
            ties = int(self.ties.sum())
            told += f"; the others part after {after} tokens" + (f", {ties} of them at ties within rounding" if ties else "")
        drawn = [kind for kind in dict.fromkeys(self.kinds) if kind not in GREEDY]
        scores = [f"{_told(self.interval(kind))} ({kind})" for kind in drawn or GREEDY]
        told += f"; log p_tuned - log p_base in nats per token: {', '.join(scores)} (numerical floor {self.numerical_floor:.1g})"
        told += "; the floor lacks what half precision rounds" if self.half else ""
        return told if self.differs else f"No difference beyond rounding: {told[0].lower()}{told[1:]}"

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """How many greedy texts stay the same, and how far tuned's samples are its own."""
        share, low, high = (torch.tensor(x, dtype=torch.float64) for x in self._share(self.same))
        found = {"greedy texts that are the same, share": {"tuned": Estimate(share, low, high)}}
        kind = SAMPLED[1] if SAMPLED[1] in self.kinds else GREEDY[1]
        e = self.interval(kind)
        return found if e.refused else found | {f"log p_tuned - log p_base of {kind} text, nats per token": {"tuned": e}}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per kind of text, intervals at 95 % over prompts; ``per="prompt"``: one row per text.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            return pd.DataFrame([self._row(prompt, text) for prompt in range(len(self.prompts)) for text in range(len(self.kinds))])
        rows = []
        for kind in dict.fromkeys(self.kinds):
            some = self._texts(kind)
            row = {"kind": kind, "texts": len(some) * len(self.prompts), "tokens": int((self.ids[some] >= 0).sum())}
            row |= {"ended": float((self.end[some] >= 0).double().mean())}
            for name, measured in (("s", self.interval), ("base_perplexity", self.base_perplexity), ("distinct_2", self.distinct_2)):
                e = measured(kind)
                row |= {name: float(e.value), f"{name}_low": float(e.low), f"{name}_high": float(e.high)}
            others = [(i, j) for i in some if (j := self._counterpart(i)) is not None]
            same = [(self.first_difference(i, j) < 0).double().mean() for i, j in others]
            rows.append(row | {"same_as_base": float(torch.stack(same).mean()) if same else math.nan})
        return pd.DataFrame(rows)

    def _counterpart(self, text: int) -> int | None:
        """Base's text by the same draws; None for base's own."""
        kind = self.kinds[text]
        if kind in (GREEDY[0], SAMPLED[0]):
            return None
        if kind == GREEDY[1]:
            return self.kinds.index(GREEDY[0])
        return self._texts(SAMPLED[0])[self._texts(kind).index(text)]

    def _row(self, prompt: int, text: int) -> dict[str, object]:
        kind, other = self.kinds[text], self._counterpart(text)
        logp = self.logp[:, text, prompt]
        row: dict[str, object] = {"prompt": prompt, "kind": kind, "sample": 0 if kind in GREEDY else self._texts(kind).index(text) + 1}
        row |= {"asked": self.prompts[prompt], "written": self.said[self.labels["text"][text]][prompt]}
        row |= {"tokens": int((self.ids[text, prompt] >= 0).sum()), "ended": bool(self.end[text, prompt] >= 0)}
        row |= {f"nll_{side}": float(-logp[i].nanmean()) for i, side in enumerate(SIDES)} | {"s": float((logp[1] - logp[0]).nanmean())}
        return row | {"parts_from_base": -1 if other is None else int(self.first_difference(text, other)[prompt])}

    def plot(self) -> go.Figure:
        """Share of prompts behind which both models still say the same, by token."""
        steps = torch.arange(self.ids.shape[2] + 1)

        def surviving(parted: Int[Tensor, "*text prompt"]) -> Float[Tensor, " step"]:
            """Share of texts that agree on so many tokens."""
            return ((parted[..., None] < 0) | (parted[..., None] >= steps)).double().flatten(0, -2).mean(0)

        greedy = surviving(self.parted)
        n = int(self.unit.max()) + 1
        ends = torch.tensor([wilson(float(share) * n, n) for share in greedy])
        series = {"greedy": greedy}
        if SAMPLED[1] in self.kinds:
            drawn = [self.first_difference(i, j) for i, j in zip(*map(self._texts, SAMPLED), strict=True)]
            series["sampled, by the same draws"] = surviving(torch.stack(drawn))
        series["a model against itself, another batching"] = surviving(self.rereading)
        made = plots.lines(
            series,
            steps,
            bands={"greedy": (ends[:, 0], ends[:, 1])},
            title=f"How long base and tuned say the same (n = {len(self.prompts)} prompts; band: 95 % interval)",
            xlabel="new tokens written",
            ylabel="share of prompts still the same",
        )
        made.update_yaxes(range=[-0.03, 1.03])
        return made

    def figures(self) -> dict[str, go.Figure]:
        """How long they agree, and which model finds the texts likelier."""
        return {"How long they say the same": self.plot()} | ({"Whose text is it": self._scores()} if not self.s.isnan().all() else {})

    def _scores(self) -> go.Figure:
        """Mean ``s`` of every text, by kind."""
        groups, means, labels = {}, {}, {}
        for kind in dict.fromkeys(self.kinds):
            some = self._texts(kind)
            values = self.s[some].nanmean(2)
            there = (~values.isnan()).nonzero().tolist()
            if not there:
                continue
            groups[kind] = [float(values[i, j]) for i, j in there]
            labels[kind] = [f"prompt {j}: {self.said[self.labels['text'][some[i]]][j]}" for i, j in there]
            e = self.interval(kind)
            means[kind] = (float(e.value), *(float(e.value if x.isnan() else x) for x in (e.low, e.high)))
        return plots.boxes(
            groups,
            means=means,
            labels=labels,
            title="Which model finds the texts likelier: below 0 base, above 0 tuned (point: a text; bar: mean per token, 95 % interval)",
            xlabel="log p_tuned - log p_base, nats per token of the text",
            floor=self.numerical_floor,
        )

    def html(self) -> str:
        """The first prompts, with what both models write side by side."""
        n = min(_SHOWN_PROMPTS, len(self.prompts))
        coloured = [i for i, kind in enumerate(self.kinds) if kind.startswith("amplified")]
        few = f"The first {n} of {len(self.prompts)} prompts, not picked; the others are in the table of to_frame(per='prompt')."
        notes = [
            "All prompts." if n == len(self.prompts) else few,
            "Faint: both models write the same. In a box: the first token that differs.",
        ]
        top = 1.0
        if coloured:
            sizes = self.s[coloured].abs().flatten()
            sizes = sizes[~sizes.isnan()].sort().values
            top = max(float(sizes[int(0.98 * (len(sizes) - 1))]) if len(sizes) else 1.0, self.numerical_floor, 1e-3)
            notes += [
                "Amplified: tuned's log-probabilities with what tuning added to them added again, as many times as it says. It overstates "
                "what tuning did. Colour of a token, log p_tuned - log p_base in nats: "
                f"{shown.shades_key(top, 'likelier to base', 'to tuned')}; grey is under the numerical floor."
            ]
        intro = f"<ul>{''.join(f'<li>{note}</li>' for note in notes)}</ul>"
        blocks = "".join(self._block(prompt, top) for prompt in range(n))
        return f'<h3>Side by side</h3><div class="completions">{intro}{blocks}</div>'

    def _block(self, prompt: int, top: float) -> str:
        """One prompt: greedy texts, then the first sample of everything; further samples in a fold."""
        pieces = [f"<h4>Prompt {prompt}</h4>", shown.asked_text(self.prompts[prompt]), self._said_of(prompt)]
        pieces.append(self._beside(prompt, *(self.kinds.index(kind) for kind in GREEDY)))
        samples = [
            self._beside(prompt, i, j) + self._amplified(prompt, k, top)
            for k, (i, j) in enumerate(zip(*(([t for t, x in enumerate(self.kinds) if x == kind]) for kind in SAMPLED), strict=True))
        ]
        more = len(samples) - 1
        fold = f"<details><summary>{more} more sample{'s' * (more > 1)}</summary>{''.join(samples[1:])}</details>" if more > 0 else ""
        return "".join([*pieces, *samples[:1], fold])

    def _said_of(self, prompt: int) -> str:
        """A sentence about where the greedy texts part."""
        at = int(self.parted[prompt])
        if at < 0:
            return "<p>Both write the same.</p>"
        ways = []
        for i, side in enumerate(SIDES):
            word = self._token(self.kinds.index(GREEDY[i]), prompt, at)
            own, other = (float(self.parting[j, i, prompt].exp()) for j in (i, 1 - i))
            elsewhere = "" if math.isnan(other) else f"; {SIDES[1 - i]} gives it {_percent(other)}"
            chances = "" if math.isnan(own) else f" ({_percent(own)}{elsewhere})"
            ways.append(f"{side} {'writes ' + word if word else 'ends'}{chances}")
        tie = " A tie within rounding." if bool(self.ties[prompt]) else ""
        after = "at the first token" if at == 0 else f"after {at} token{'s' * (at > 1)}"
        return f"<p>They part {after}: {', '.join(ways)}.{tie}</p>"

    def _token(self, text: int, prompt: int, at: int) -> str:
        token = int(self.ids[text, prompt, at])
        return "" if token < 0 else f"<code>{plots.visible(self.vocabulary[token], 40)}</code>"

    def _words(self, text: int, prompt: int) -> list[str]:
        return [self.vocabulary[i] for i in self.ids[text, prompt].tolist() if i >= 0]

    def _beside(self, prompt: int, base: int, tuned: int) -> str:
        at = int(self.first_difference(base, tuned)[prompt])
        cells = []
        for text, paint in ((base, plots.BASE), (tuned, plots.TUNED)):
            words, ended = self._words(text, prompt), bool(self.end[text, prompt] >= 0)
            same, mark = (len(words) + 1, None) if at < 0 else (at, at)
            drawn = shown.marked_text(words, ended=ended, same=same, mark=mark, paint=paint)
            cells.append((self.labels["text"][text], paint, drawn))
        return shown.side_by_side(cells)

    def _amplified(self, prompt: int, sample: int, top: float) -> str:
        cells = []
        for kind in dict.fromkeys(k for k in self.kinds if k.startswith("amplified")):
            text = self._texts(kind)[sample]
            words = self._words(text, prompt)
            look = {"top": top, "floor": self.numerical_floor, "unit": "nats, log p_tuned - log p_base"}
            drawn = shown.shaded_text(words, self.s[text, prompt, : len(words)], ended=bool(self.end[text, prompt] >= 0), **look)
            cells.append((self.labels["text"][text], plots.OTHERS[0], drawn))
        return shown.side_by_side(cells) if cells else ""


@analysis(version=1)
def completions(
    pair: ModelPair,
    prompts: Prompts | PromptPairs,
    *,
    new_tokens: int = 32,
    samples: int = 2,
    temperature: float = 1.0,
    amplification: tuple[float, ...] = (1.0,),
    gate: float = 0.1,
    seed: int = 0,
) -> CompletionsResult:
    """What do the two models write behind the same prompts, and where do they part?

    Every prompt is continued greedily by both models, sampled from both by the same random draws (so equal models say the same), and
    sampled from the amplified difference: softmax((log p_tuned + a (log p_tuned - log p_base)) / temperature) among the tokens that pass
    the gate, p_tuned >= gate * max p_tuned; without it the contrast rewards tokens that both find absurd. Amplification 0 is plain
    sampling, without a gate; negative values go towards base, and base's probabilities gate. Beside the amplified texts stand samples of
    tuned, plain and through the same gate, so that what the gate does is not taken for what amplification does.

    Every token is scored by both models while it is written: s = log p_tuned - log p_base, over the token ids that both know. Tokens
    that only tuned knows cannot be amplified: of those, amplified texts hold tuned's end tokens alone. Texts end at the end tokens of the
    side that writes them. The floor is the models reading the greedy texts at once, in another batch, and in half precision also with
    their weights computed in float32.

    Sample k (from 0) is that of ``generate(..., temperature=temperature, seed=seed + k * 2**32)``. Prompts are read as they are, so chats
    in a template should be given in it. Amplified texts can bring out training data word for word: look before you publish them.

    Contrastive decoding and its gate: Li et al. 2023 (arXiv 2210.15097); contrasting a tuned model with its base: Isonuma and Titov 2024
    (arXiv 2410.14765).

    Args:
        pair: the two models.
        prompts: what is continued; of pairs the clean ones.
        new_tokens: at most so many per text.
        samples: per prompt, of each kind that is drawn; 0: greedy texts only.
        temperature: of everything that is drawn.
        amplification: values of a, any number of them.
        gate: share of the highest probability that a token of amplified text needs; 0: no gate.
        seed: of the draws, and of the resampling of prompts.

    Raises:
        InputError: a setting out of its range, prompts that do not fit, a pair loaded one at a time, or a model that computes NaN.
    """
    _check(new_tokens, samples, temperature, amplification, gate)
    if pair.one_at_a_time:
        raise InputError("completions needs both models at once, but the pair is loaded one at a time")
    asked = clean_prompts(prompts)
    batch = pair.batch(asked)
    ways = _ways(samples, amplification, gate, seed)
    kinds = tuple(kind for kind, _ in ways)
    names = tuple(f"{kind} #{kinds[:i].count(kind) + 1}" if kind not in GREEDY else kind for i, kind in enumerate(kinds))
    out = write(pair, batch, [writer for _, writer in ways], new_tokens, temperature)
    vocabulary = _vocabulary(pair, out)
    return CompletionsResult(
        ids=out.ids,
        logp=out.logp,
        end=out.end,
        end_logp=out.end_logp,
        **vars(partings(pair, batch, out.ids[:2], out.end[:2], out.logp[:, :2])),
        kinds=kinds,
        said={name: _decoded(pair, out.ids[i].tolist(), vocabulary) for i, name in enumerate(names)},
        prompts=asked.texts,
        unit=grouped(asked.contexts),
        vocabulary=vocabulary,
        shared=pair.shared_vocab,
        amplification=tuple(float(a) for a in amplification),
        gate=float(gate),
        temperature=float(temperature),
        seed=seed,
        labels={"side": SIDES, "choice": SIDES, "text": names},
    )


def _check(new_tokens: int, samples: int, temperature: float, amplification: Sequence[float], gate: float) -> None:
    for name, value, least in (("new_tokens", new_tokens, 1), ("samples", samples, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is a whole number from {least}, but it is {value!r}")
    if not _number(temperature) or not temperature > 0:
        raise InputError(f"temperature must be above 0, but it is {temperature!r}; greedy texts are written in any case")
    if not isinstance(amplification, list | tuple) or not all(map(_number, amplification)):
        raise InputError(f"amplification is a tuple of numbers, such as (1.0,), but it is {amplification!r}")
    if len({float(a) for a in amplification}) != len(amplification):
        raise InputError(f"amplification names a value twice: {', '.join(map(str, amplification))}")
    if not _number(gate) or not 0 <= gate <= 1:
        raise InputError(f"gate is a share of the highest probability, from 0 to 1, but it is {gate!r}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ways(samples: int, amplification: Sequence[float], gate: float, seed: int) -> list[tuple[str, Writer]]:
    """Kind and writer of every text; samples of all kinds by the same streams."""
    seeds = [seed + k * _NEXT_SEED for k in range(samples)]
    ways = [(GREEDY[0], Writer("base")), (GREEDY[1], Writer("tuned"))]
    ways += [(SAMPLED[0], Writer("base", s)) for s in seeds] + [(SAMPLED[1], Writer("tuned", s)) for s in seeds]
    if gate and any(amplification):
        ways += [(_GATED, Writer("tuned", s, gate=gate)) for s in seeds]
    for a in amplification:
        ways += [(f"amplified by {a:g}", Writer("tuned", s, a, gate if a else 0.0)) for s in seeds]
    return ways


def _new_bigrams(ids: Int[Tensor, "text prompt new"]) -> Float[Tensor, "text prompt"]:
    """Share of the pairs of neighbours that did not come before in the text; NaN without a pair."""
    found = torch.full(ids.shape[:2], torch.nan)
    for text, rows in enumerate(ids.tolist()):
        for prompt, row in enumerate(rows):
            words = [i for i in row if i >= 0]
            if pairs := list(zip(words, words[1:], strict=False)):
                found[text, prompt] = len(set(pairs)) / len(pairs)
    return found


def _renumbered(unit: Int[Tensor, " prompt"]) -> Int[Tensor, " prompt"]:
    return unit.unique(return_inverse=True)[1]


def _percent(share: float) -> str:
    """A probability for people, who read 0 as never."""
    return "&lt;1%" if share < 0.005 else f"{share:.0%}"


def _told(e: Estimate) -> str:
    """A number with its interval, which a single prompt has not."""
    return f"{float(e.value):.3g}" if not e.refused and bool(e.low.isnan()) else str(e)


def _vocabulary(pair: ModelPair, out: Written) -> dict[int, str]:
    """The text of every token that occurs; that of tuned's tokenizer for those that are not shared."""
    known = [i for i in torch.cat([out.ids.flatten(), out.end.flatten()]).unique().tolist() if i >= 0]
    both = spelled(pair.base, [i for i in known if i < pair.shared_vocab])
    return dict(zip(known, [*both, *spelled(pair.tuned, [i for i in known if i >= pair.shared_vocab])], strict=True))


def _decoded(pair: ModelPair, rows: list[list[int]], vocabulary: dict[int, str]) -> tuple[str, ...]:
    """The texts of new tokens; tokens in a row where a model was given without a tokenizer."""
    found = []
    for row in rows:
        ids = [i for i in row if i >= 0]
        model = pair.base if all(i < pair.shared_vocab for i in ids) else pair.tuned
        try:
            found.append(model.decode(ids))
        except InputError:
            found.append("".join(vocabulary[i] for i in ids))
    return tuple(found)
