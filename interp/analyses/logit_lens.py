"""After which layer does a model know its answer, and did fine-tuning move that?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.metrics import kl_divergence
from interp.models.restart import logits_of
from interp.names import unknown
from interp.plots.colours import is_dark
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.sites import Site
from interp.spelling import spelled
from interp.stats import Estimate, bootstrap, permutation, standard_error
from interp.sweeps.answers import means
from interp.sweeps.asked import Measure, given, known_vocabulary, own_top, position, rounding, units, with_ends
from interp.sweeps.staged import by_context, grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel, ModelPair

_CHANGE = "tuned - base"
_LEVEL = 0.05
_CELLS = 2**24  # numbers of streams and logits held at a time: 64 MB in fp32
_NEAR = 24  # tokens of a prompt that are shown
_MOST = 50
_SHOWN_PROMPTS, _SHOWN_TOKENS = 4, 3


@dataclass(frozen=True, eq=False)
class LogitLensResult(Result):
    """What the stream after each block would answer, per prompt.

    The axis ``layer`` begins with the embedding: its entry l is the stream after l blocks, the last one the model's own prediction.
    Log-probabilities are over the token ids that both models know, in nats.

    Attributes:
        logprob: of the answer.
        distractor_logprob: of the distractor; None where the prompts have none.
        rank: of the answer; 1 is the most likely.
        kl: KL(final || this layer), 0 at the last.
        top: ids of the most likely tokens.
        top_prob: their probabilities.
        decided: after how many blocks the answer is on top and stays there; NaN where it never is.
        floor: the largest change of ``logprob`` by rounding: a model against itself in another batch, and in half precision also
            against the same weights computed in float32.
        half: a model computes in half precision and no float32 copy could be had, so the floor lacks that part.
        answers: the token that is asked for.
        stand_in: the prompts have no answers, and the token that base (or the only model) holds most likely takes their place.
        near: the tokens up to the position that is read, the last ones of a prompt; -1 before its first.
        group: context of each prompt, as they first come.
        vocabulary: id -> text of the tokens that occur.
        at: the position that is read.
        draw_seed: of bootstrap and permutations.
        labels: of ``side`` and ``layer``.
    """

    logprob: Float[Tensor, "side layer prompt"]
    distractor_logprob: Float[Tensor, "side layer prompt"] | None
    rank: Int[Tensor, "side layer prompt"]
    kl: Float[Tensor, "side layer prompt"]
    top: Int[Tensor, "side layer prompt place"]
    top_prob: Float[Tensor, "side layer prompt place"]
    decided: Float[Tensor, "side prompt"]
    floor: Float[Tensor, "side layer"]
    half: bool
    answers: Int[Tensor, " prompt"]
    stand_in: bool
    near: Int[Tensor, "prompt near"]
    group: Int[Tensor, " prompt"]
    vocabulary: dict[int, str]
    at: str
    draw_seed: int
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def layers(self) -> tuple[str, ...]:
        """``embedding``, ``L0``, ...: what was last added to the stream."""
        return self.labels["layer"]

    @property
    def n(self) -> str:
        """How many prompts, or contexts where several prompts share one, the statistics are of."""
        return units(self.group)

    @property
    def alike(self) -> bool:
        """Of a pair: no log-probability of an answer differs by more than rounding, at no layer."""
        return len(self.sides) == 2 and bool(((self.logprob[1] - self.logprob[0]).abs() <= self.floor.sum(0)[:, None]).all())

    @property
    def stays(self) -> Bool[Tensor, "side layer prompt"]:
        """The answer is on top here and at every later layer."""
        return self.decided[:, None] <= torch.arange(len(self.layers))[:, None]

    def _of(self, x: Float[Tensor, "side layer prompt"], view: str) -> Float[Tensor, "context layer"]:
        """A model, or the difference of both; means per context."""
        picked = x[1] - x[0] if view == _CHANGE else x[self._side(view)]
        return by_context(picked.double().T, self.group)

    def _side(self, side: str | None) -> int:
        if side is not None and side not in self.sides:
            raise unknown("model", side, self.sides)
        return len(self.sides) - 1 if side is None else self.sides.index(side)

    def answer(self, side: str | None = None) -> Estimate:
        """Mean log-probability of the answer by layer, [layer], with its 95 % interval.

        Args:
            side: a model, by default the tuned or only one; ``tuned - base`` is the paired difference.
        """
        return bootstrap(self._of(self.logprob, side or self.sides[-1]), seed=self.draw_seed)

    def share(self, side: str | None = None) -> Estimate:
        """Share of prompts whose answer is decided, by layer, [layer], with its 95 % interval (Wilson)."""
        return means(by_context(self.stays[self._side(side)].double().T, self.group), of_answers=True, seed=self.draw_seed)

    def decision(self, side: str | None = None) -> tuple[str, str, str]:
        """The first layer at which half of the prompts are decided, and the ends of its 95 % interval; ``never`` where it is none."""
        found = self.share(side)
        first = [(x >= 0.5).nonzero() for x in (found.value, found.high, found.low)]
        middle, low, high = (self.layers[int(i[0])] if len(i) else "never" for i in first)
        return middle, low, high

    def moved(self) -> tuple[Estimate, int]:
        """How many blocks later tuned decides, on the prompts that both decide; and how many these are.

        Raises:
            InputError: there is only one model.
        """
        if len(self.sides) < 2:
            raise InputError("one model decides neither earlier nor later; give a pair")
        later = self.decided[1] - self.decided[0]
        both = ~later.isnan()
        nothing = torch.tensor(torch.nan, dtype=torch.float64)
        if not bool(both.any()):
            return Estimate(nothing, nothing, nothing, "no prompt is decided in both"), 0
        kept = by_context(later[both], self.group[both].unique(return_inverse=True)[1])
        return bootstrap(kept, seed=self.draw_seed), int(both.sum())

    def summary(self) -> str:
        """Where half of the prompts are decided, the layer that changed the most, what rounding does."""
        told = [self._decided(side) for side in reversed(self.sides)]
        tail = f"n = {self.n}; rounding moves a log-probability by up to {float(self.floor.max()):.1g}"
        tail += " or more (half precision, whose own rounding could not be measured)" if self.half else ""
        if self.stand_in:
            tail += f"; these prompts have no answers, so the most likely token of {self.sides[0]} takes their place"
        if len(self.sides) == 1:
            return f"The answer is {told[0]}; its log-probability at the end is {self._at_end(self.sides[0])} nats ({tail})"
        decided = f"The answer is {told[0]} in tuned and {told[1]} in base"
        if self.alike:
            off = float((self.logprob[1] - self.logprob[0]).abs().max())
            return f"{decided}: no difference beyond rounding (log-probabilities differ by at most {off:.1g} nats; {tail})"
        later, n = self.moved()
        shift = f"tuned takes {_later(later)} on the {n} prompt{'s' * (n > 1)} that both decide" if n else "no prompt is decided in both"
        return f"{decided}; {shift}; {self._changed()} ({tail})"

    def _decided(self, side: str) -> str:
        middle, low, high = self.decision(side)
        right, n = int(self.stays[self._side(side), -1].sum()), len(self.group)
        ends = f"95 % interval {low} to {high}, " if int(self.group.max()) else ""
        where = "not decided on half of the prompts" if middle == "never" else f"decided after {middle}"
        return f"{where} ({ends}on top at the end for {right} of {n})"

    def _at_end(self, side: str) -> str:
        return with_ends(self.answer(side), -1, form=".2f")

    def _changed(self) -> str:
        """The layer at which the two models differ most, among those where that is clear."""
        change, test = self.answer(_CHANGE), permutation(self._of(self.logprob, _CHANGE), seed=self.draw_seed)
        sure = (test.adjusted <= _LEVEL) & (change.value.abs() > self.floor.sum(0))
        i = int((change.value.abs() * (sure if sure.any() else 1)).argmax())
        clear = "" if sure.any() else ", which the noise between prompts may explain"
        told = f"its log-probability changed the most after {self.layers[i]}, by {with_ends(change, i, form='.2f')} nats"
        if not int(self.group.max()):
            return told  # of one prompt nothing is known of the noise
        return f"{told}{clear} (p = {float(test.adjusted[i]):.2g} corrected for {len(self.layers)} layers)"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per model and layer with means over prompts; ``per="prompt"`` one row per model, prompt and layer.

        ``rank`` is a geometric mean, ``decided`` the share of prompts whose answer is on top and stays there.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        return pd.DataFrame(
            [row for i, side in enumerate(self.sides) for row in (self._per_prompt(i) if per else self._per_layer(i, side))]
        )

    def _per_layer(self, i: int, side: str) -> Iterator[dict[str, Any]]:
        answer, share = self.answer(side), self.share(side)
        rank, kl = self._of(self.rank.double().log(), side).mean(0).exp(), self._of(self.kl, side).mean(0)
        for layer, name in enumerate(self.layers):
            row = {"logprob": answer.value, "low": answer.low, "high": answer.high, "rank": rank, "kl_to_final": kl, "decided": share.value}
            if self.distractor_logprob is not None:
                row["distractor_logprob"] = self._of(self.distractor_logprob, side).mean(0)
            yield {"side": side, "layer": name, **{k: float(v[layer]) for k, v in row.items()}, "floor": float(self.floor[i, layer])}

    def _per_prompt(self, i: int) -> Iterator[dict[str, Any]]:
        for prompt in range(len(self.group)):
            for layer, name in enumerate(self.layers):
                row: dict[str, Any] = {"side": self.sides[i], "prompt": prompt, "layer": name}
                row |= {"logprob": float(self.logprob[i, layer, prompt]), "rank": int(self.rank[i, layer, prompt])}
                row |= {"kl_to_final": float(self.kl[i, layer, prompt]), "decided": bool(self.stays[i, layer, prompt])}
                row |= {"top": self.vocabulary[int(self.top[i, layer, prompt, 0])], "top_prob": float(self.top_prob[i, layer, prompt, 0])}
                yield row

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """Of a pair the layers at which the answer's log-probability changed most; of one model the blocks that change it most."""
        import pandas as pd

        pair = len(self.sides) == 2
        values = self._of(self.logprob, _CHANGE) if pair else self._of(self.logprob, self.sides[0]).diff(dim=1)
        found, error, test = bootstrap(values, seed=self.draw_seed), standard_error(values), permutation(values, seed=self.draw_seed)
        rows = []
        for i in range(values.shape[1]):
            numbers = {
                "effect": found.value,
                "effect_se": error,
                "low": found.low,
                "high": found.high,
                "p": test.p,
                "p_adjusted": test.adjusted,
            }
            where = {"site": f"after {self.layers[i]}", "side": _CHANGE} if pair else {"site": f"block {i}"}
            rows.append({**where, **{k: float(v[i]) + 0.0 for k, v in numbers.items()}})
        return pd.DataFrame(rows).sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True).head(n)

    def plot(self) -> go.Figure:
        """The first of the figures."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """By layer: the answer's log-probability, of a pair its change, prompts that are decided, rank, distance from the end."""
        found = {"Answer": self._answers()}
        if len(self.sides) == 2:
            found["Change of the answer"] = self._change()
        share = {side: self.share(side) for side in self.sides}
        rank = {side: bootstrap(self._of(self.rank.double().log(), side), seed=self.draw_seed) for side in self.sides}
        rank = {side: Estimate(e.value.exp(), e.low.exp(), e.high.exp()) for side, e in rank.items()}
        kl = {side: bootstrap(self._of(self.kl, side), seed=self.draw_seed) for side in self.sides}
        found["Decided"] = self._lines(share, "Prompts whose answer is on top and stays there", "share of prompts, 95 % interval")
        found["Rank"] = self._lines(rank, "Rank of the answer among all tokens (1 is the most likely)", "geometric mean, 95 % interval")
        found["Rank"].update_yaxes(type="log", autorange="reversed")
        found["Distance from the end"] = self._lines(
            kl, "How far each layer's prediction is from the final one", "KL(final || layer), nats"
        )
        return found

    def _lines(self, series: dict[str, Estimate], title: str, ylabel: str, floor: float | None = None) -> go.Figure:
        return plots.lines(
            {name: e.value for name, e in series.items()},
            bands={name: (e.low, e.high) for name, e in series.items()},
            title=f"{title} (n = {self.n})",
            xlabel="stream after",
            tokens=self.layers,
            ylabel=ylabel,
            floor=floor,
        )

    def _answers(self) -> go.Figure:
        series = {side: self.answer(side) for side in self.sides}
        if self.distractor_logprob is not None:
            for side in self.sides:
                name = "distractor" if len(self.sides) == 1 else f"distractor in {side}"
                series[name] = bootstrap(self._of(self.distractor_logprob, side), seed=self.draw_seed)
        what = "stand-in answer (the model's own top token)" if self.stand_in else "answer"
        return self._lines(series, f"What each layer knows of the {what} at {self.at}", "log-probability, nats, 95 % interval")

    def _change(self) -> go.Figure:
        title = f"{_CHANGE}: log-probability of the answer at {self.at}; grey: numerical floor"
        return self._lines({_CHANGE: self.answer(_CHANGE)}, title, "difference in nats, 95 % interval", float(self.floor.sum(0).max()))

    def html(self) -> str:
        """The most likely tokens by layer of a few prompts, both models side by side; of a pair the prompts that changed most."""
        change = (self.logprob[-1] - self.logprob[0]).abs().mean(0) if len(self.sides) == 2 else torch.zeros(len(self.group))
        rows = change.argsort(descending=True, stable=True)[:_SHOWN_PROMPTS].tolist()
        which = "the prompts that changed most" if len(self.sides) == 2 and not self.alike else "the first prompts"
        key = "darker is more likely, the answer is framed; rank: of the answer"
        return f"<h4>The most likely tokens after each block: {which} ({key})</h4>" + "".join(map(self._table, rows))

    def _table(self, prompt: int) -> str:
        near = self.near[prompt].tolist()
        cut = len(near) == _NEAR and near[0] >= 0
        text = "…" * cut + "".join(plots.visible(self.vocabulary[i]) for i in near[cut:] if i >= 0)
        answer = plots.visible(self.vocabulary[int(self.answers[prompt])])
        shown = min(_SHOWN_TOKENS, self.top.shape[-1])
        names = [""] if len(self.sides) == 1 else [f" in {side}" for side in self.sides]
        head = "".join(f'<th colspan="{shown}">most likely{name}</th><th>rank{name}</th>' for name in names)
        rows = []
        for layer, name in enumerate(self.layers):
            cells = [f"<th>{'embedding' if layer == 0 else f'after {name}'}</th>"]
            for i in range(len(self.sides)):
                cells += [self._token(i, layer, prompt, k) for k in range(shown)]
                cells.append(f"<td>{int(self.rank[i, layer, prompt])}</td>")
            rows.append(f"<tr>{''.join(cells)}</tr>")
        said = f"<p>Prompt {prompt}: <code>{text}</code> &rarr; answer <code>{answer}</code></p>"
        return f'{said}<div style="overflow-x:auto"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'

    def _token(self, side: int, layer: int, prompt: int, place: int) -> str:
        token, p = int(self.top[side, layer, prompt, place]), float(self.top_prob[side, layer, prompt, place])
        paint = plots.shade(p, 0.0, 1.0, False)
        frame = f"outline:2px solid {plots.INK};outline-offset:-2px;" if token == int(self.answers[prompt]) else ""
        look = f"background:{paint};color:{'#fff' if is_dark(paint) else '#111'};print-color-adjust:exact;{frame}"
        return f'<td style="{look}" title="probability {p:.3g}"><code style="background:none;color:inherit">' + (
            f"{plots.visible(self.vocabulary[token], 14)}</code></td>"
        )


@analysis(version=1)
def logit_lens(
    model: HookedModel | ModelPair,
    prompts: Prompts | PromptPairs,
    *,
    at: str = "END",
    top: int = 5,
    seed: int = 0,
) -> LogitLensResult:
    """After which layer does a model know its answer, and did fine-tuning move that?

    The stream before the first block and after each one is read as if it were the last: through the model's own final norm and
    unembedding (nostalgebraist 2020, interpreting GPT: the logit lens). The answer is decided at the first layer from which on it stays
    the most likely token. The last row is the model's own prediction. Early rows say what the final layers would read there, not what
    the model could know: a stream that is written in another basis looks undecided (Belrose et al. 2023, arXiv 2303.08112), and a model
    whose unembedding was tuned reads every layer anew. Where prompts share a context, statistics are of means per context.

    Args:
        model: one model, or a pair to compare.
        prompts: prompts, of pairs the clean ones. Without answers, the token that base (or the only model) holds most likely at the
            end takes their place, in both models.
        at: the position that is read, one token per prompt.
        top: how many of the most likely tokens are kept.
        seed: of bootstrap and permutations.

    Raises:
        InputError: an unknown position, answers outside the vocabulary, or ``top`` is no number from 1 to 50.
    """
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= _MOST:
        raise InputError(f"top is a number of tokens from 1 to {_MOST}, but it is {top!r}")
    asked, where, vocab = clean_prompts(prompts), position(at), known_vocabulary(model)
    batch = model.batch(asked)
    ends = batch.index(where).cpu()
    tokens, against = given(asked, vocab, "answers"), given(asked, vocab, "distractors")
    stand_in, sides, found, floors = tokens is None, [], list[dict[str, Tensor]](), list[tuple[Tensor, bool]]()
    against = None if stand_in else against
    for side, m in model.sides():
        tokens = own_top(m, batch, where, vocab) if tokens is None else tokens
        sides.append(side)
        found.append(_lens(m, batch, tokens, against, where, vocab, top))
        floors.append(rounding(m, found[-1]["logprob"], _measure(batch, tokens, where, vocab)))
    assert tokens is not None
    both = {k: torch.stack([f[k] for f in found]).transpose(1, 2) for k in found[0] if k not in ("decided", "ulp")}
    near = _near(batch, ends)
    known = [i for i in torch.cat([both["top"].flatten(), near.flatten(), tokens]).unique().tolist() if i >= 0]
    return LogitLensResult(
        logprob=both["logprob"],
        distractor_logprob=both.get("distractor_logprob"),
        rank=both["rank"],
        kl=both["kl"],
        top=both["top"],
        top_prob=both["top_prob"],
        decided=torch.stack([f["decided"] for f in found]),
        floor=torch.stack([torch.maximum(worst, f["ulp"].amax(0)) for (worst, _), f in zip(floors, found, strict=True)]),
        half=any(lacking for _, lacking in floors),
        answers=tokens,
        stand_in=stand_in,
        near=near,
        group=grouped(asked.contexts),
        vocabulary=dict(zip(known, spelled(model, known), strict=True)),
        at=str(at),
        draw_seed=seed,
        labels={"side": tuple(sides), "layer": ("embedding", *(f"L{i}" for i in range(model.shape.n_layers)))},
    )


def _measure(batch: Batch, tokens: Tensor, at: str | int, vocab: int) -> Measure:
    """Log-probabilities of some prompts, for the numerical floor."""
    return lambda m, rows: _lens(m, batch.select(rows), tokens[rows], None, at, vocab, 1)["logprob"]


def _near(batch: Batch, ends: Tensor) -> Int[Tensor, "prompt near"]:
    """The last tokens up to the position that is read, -1 before the first."""
    back = torch.arange(1 - min(_NEAR, int(ends.max()) + 1), 1)
    where = ends[:, None] + back
    return torch.where(where >= 0, batch.ids.cpu().gather(1, where.clamp_min(0)), -1)


def _lens(m: HookedModel, batch: Batch, tokens: Tensor, against: Tensor | None, at: str | int, vocab: int, top: int) -> dict[str, Tensor]:
    """What each layer's stream predicts, [prompt layer]; ``decided`` [prompt]; ``ulp``, what the last place of the logits does."""
    s = m.shape
    sites = [Site("resid_pre", 0, position=at), *(Site("resid_post", layer, position=at) for layer in range(s.n_layers))]
    step = max(1, _CELLS // (len(sites) * s.d_model + 4 * s.d_vocab))
    chunks = []
    for start in range(0, len(batch), step):
        rows = list(range(start, min(start + step, len(batch))))
        seen = m.capture(batch.select(rows), sites)
        own, other = tokens[rows], None if against is None else against[rows]
        final, read = None, []
        for site in reversed(sites):  # the end first: every layer is compared with it
            logits = logits_of(m, seen[site])[:, :vocab]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logp = logits.log_softmax(-1)
            final = logp if final is None else final
            read.append(_read(logits, logp, final, own, other, min(top, vocab)))
        chunks.append({k: torch.stack([layer[k] for layer in reversed(read)], 1).cpu() for k in read[0]})
    found = {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]}
    return found | {"decided": decision(found.pop("on_top"))}


def _later(found: Estimate) -> str:
    """``0.4 [0.2, 0.6] blocks more``, or fewer."""
    if float(found.value) >= 0:
        return f"{with_ends(found)} blocks more"
    return f"{with_ends(Estimate(-found.value, -found.high, -found.low))} blocks fewer"


def decision(on_top: Bool[Tensor, "prompt layer"]) -> Float[Tensor, " prompt"]:
    """The first layer from which on the answer stays on top; NaN where it is not on top at the end."""
    stays = on_top.long().flip(1).cumprod(1).flip(1)
    return torch.where(on_top[:, -1], stays.argmax(1).double(), torch.nan)


def _read(logits: Tensor, logp: Tensor, final: Tensor, tokens: Tensor, against: Tensor | None, top: int) -> dict[str, Tensor]:
    """What is kept of one layer's predictions."""
    own = tokens.to(logits.device)[:, None]
    best, ids = logp.topk(top, dim=-1)
    found = {
        "logprob": logp.gather(1, own)[:, 0],
        "rank": 1 + (logits > logits.gather(1, own)).sum(-1),
        "kl": kl_divergence(final, logp),
        "top": ids,
        "top_prob": best.exp(),
        "on_top": logits.argmax(-1) == own[:, 0],
        "ulp": 2 * torch.finfo(logits.dtype).eps * logits.abs().amax(-1),
    }
    return found if against is None else found | {"distractor_logprob": logp.gather(1, against.to(own.device)[:, None])[:, 0]}
