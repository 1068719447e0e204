"""Which parts of a model write its answer, and did fine-tuning change them?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.edits import ActivationChange, Edit
from interp.errors import InputError
from interp.models.attribution import LogitParts, logit_parts
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.sites import Site
from interp.stats import Estimate, Permutation, bootstrap, permutation, plus_minus, standard_error
from interp.sweeps.asked import Measure, given, known_vocabulary, own_top, position, rounding, units, with_ends
from interp.sweeps.staged import by_context, grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel, ModelPair

MetricName = Literal["auto", "logit_diff", "answer_logit"]
METRICS = ("auto", "logit_diff", "answer_logit")
_CHANGE = "tuned - base"
_LEVEL = 0.05
_WORDS = {"logit_diff": "logit(answer) - logit(distractor)", "answer_logit": "logit(answer) - mean logit"}
_SHORT = {"logit_diff": "logit difference", "answer_logit": "logit above the mean"}
_ENDS = ("embed", "W_pos", "b_ln_final", "b_U")
_CHANGED = re.compile(r"L(\d+)(?:H(\d+)|\.mlp_out)")


@dataclass(frozen=True, eq=False)
class LogitAttributionResult(Result):
    """What every part of the model adds to the answer's logit, per prompt.

    Attributes:
        added: by each part. Parts are ``embed`` (the token's embedding), ``W_pos`` (what else enters the first block), ``L0H0`` (a
            head), ``L0.mlp_out`` (an MLP without its output bias), ``L0.b_O`` and ``L0.b_out`` (output biases of attention and
            MLP), ``b_ln_final`` and ``b_U`` (biases of the final norm and the unembedding); parts that no model has are left out.
        whole: what the parts add up to, of the model's own logits.
        rest: ``whole`` less all parts: rounding.
        size: the largest of the logits and parts of a prompt, by which ``rest`` is to be measured.
        floor: what rounding does to a part: the largest ``rest``, or change of a part when some of the prompts run in another batch,
            and in half precision also against the same weights computed in float32.
        half: a model computes in half precision and no float32 copy could be had, so the floor lacks that part.
        group: context of each prompt, as they first come.
        metric: ``logit_diff`` or ``answer_logit``.
        stand_in: the prompts have no answers, and the token that base (or the only model) holds most likely takes their place.
        at: the position whose logits are taken apart.
        layers: of the model.
        heads: of a layer.
        draw_seed: of bootstrap and permutations.
        labels: of ``side`` and ``part``.
    """

    added: Float[Tensor, "side part prompt"]
    whole: Float[Tensor, "side prompt"]
    rest: Float[Tensor, "side prompt"]
    size: Float[Tensor, "side prompt"]
    floor: Float[Tensor, " side"]
    half: bool
    group: Int[Tensor, " prompt"]
    metric: str
    stand_in: bool
    at: str
    layers: int
    heads: int
    draw_seed: int
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts."""
        return self.labels["part"]

    @property
    def views(self) -> tuple[str, ...]:
        """The models, and of a pair first what changed."""
        return self.sides if len(self.sides) == 1 else (_CHANGE, *self.sides)

    @property
    def n(self) -> str:
        """How many prompts, or contexts where several prompts share one, the statistics are of."""
        return units(self.group)

    @property
    def closure(self) -> float:
        """How far the parts are from adding up to the logits, at most, in units of the largest logit or part of the prompt."""
        return float((self.rest.abs() / self.size).nan_to_num(0.0).max())

    @property
    def alike(self) -> bool:
        """Of a pair: no part of any prompt differs by more than rounding."""
        return len(self.sides) == 2 and bool(((self.added[1] - self.added[0]).abs() <= self.floor.sum()).all())

    def values(self, view: str | None = None) -> Float[Tensor, "context part"]:
        """What every part adds in a model, or how much more in tuned than in base: means per context, of which statistics are.

        Args:
            view: a model, or ``tuned - base``; by default that of a pair, or the only model.

        Raises:
            InputError: no such view.
        """
        return by_context(self._of(self.added, view).T, self.group)

    def _of(self, x: Tensor, view: str | None) -> Tensor:
        view = self.views[0] if view is None else view
        if view not in self.views:
            raise unknown("view", view, self.views)
        return x[1] - x[0] if view == _CHANGE else x[self.sides.index(view)]

    def total(self, view: str | None = None) -> Float[Tensor, " context"]:
        """What the parts add up to, as ``values``."""
        return by_context(self._of(self.whole, view), self.group)

    def estimate(self, view: str | None = None) -> Estimate:
        """Mean of every part, [part], with its 95 % interval."""
        return bootstrap(self.values(view), seed=self.draw_seed)

    def test(self, view: str | None = None) -> Permutation:
        """Is the mean of a part 0, [part]? ``adjusted`` is corrected for all parts."""
        return permutation(self.values(view), seed=self.draw_seed)

    def _floor(self, view: str) -> float:
        return float(self.floor.sum() if view == _CHANGE else self.floor[self.sides.index(view)])

    def summary(self) -> str:
        """The part that adds, or changed, the most; the whole; what rounding does."""
        wholes = " and ".join(plus_minus(self.total(s)) + ("" if len(self.sides) == 1 else f" in {s}") for s in self.sides)
        told = f"n = {self.n}; {_WORDS[self.metric]} is {wholes}; {self.exactness}"
        view = self.views[0]
        found, test = self.estimate(view), self.test(view)
        clear = (test.adjusted <= _LEVEL) & (found.value.abs() > self._floor(view))
        i = int((found.value.abs() * (clear if view == _CHANGE and clear.any() else 1)).argmax())
        if self.alike:
            off = float((self.added[1] - self.added[0]).abs().max())
            return f"0 of {len(self.parts)} parts write another amount in tuned: no difference beyond rounding (at most {off:.1g}; {told})"
        amount, alone = with_ends(found, i, form=".2f"), not int(self.group.max())  # of one prompt nothing is known of the noise
        p = "" if alone else f"p = {float(test.adjusted[i]):.2g} corrected for {len(self.parts)} parts; "
        if view != _CHANGE:
            return f"{self.parts[i]} adds {amount} to the answer, the most of all parts ({p}{told})"
        both = " and ".join(f"{float(self.values(s)[:, i].mean()):.2f} in {s}" for s in reversed(self.sides))
        if alone:
            return f"{self.parts[i]} adds {amount} more to the answer in tuned, the largest change of all parts ({both}; {told})"
        if not clear.any():
            largest = f"the largest change is that of {self.parts[i]}, {amount} ({both}; {p}{told})"
            return f"no part writes more or less for the answer in tuned beyond the noise between prompts: {largest}"
        return f"{self.parts[i]} adds {amount} more to the answer in tuned, the largest clear change of all parts ({both}; {p}{told})"

    @property
    def exactness(self) -> str:
        """In words: the stand-in answer, how well the parts add up, the numerical floor."""
        words = [f"the parts add up to the logits within {self.closure:.1g} of their size"]
        words[0] += f", rounding moves a part by up to {float(self.floor.max()):.1g}"
        if self.half:
            words[0] += " or more (half precision, whose own rounding could not be measured)"
        if self.stand_in:
            words.append(f"these prompts have no answers, so it is the most likely token of {self.sides[0]} that is written")
        return "; ".join(words)

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per part and model, and of a pair the change; ``per="prompt"`` what a part adds on every prompt.

        ``effect`` is the mean with its standard error and the ends of its 95 % interval, in logits; ``share`` what of the whole it
        is. Where prompts share a context, these are of means per context.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            return pd.DataFrame(
                [
                    {"side": side, "site": part, "prompt": prompt, "added": value}
                    for i, side in enumerate(self.sides)
                    for k, part in enumerate(self.parts)
                    for prompt, value in enumerate(self.added[i, k].tolist())
                ]
            )
        return pd.DataFrame([row for view in self.views for row in self._rows(view)])

    def _rows(self, view: str) -> Iterator[dict[str, Any]]:
        found, test, error = self.estimate(view), self.test(view), standard_error(self.values(view))
        whole = float(self.total(view).mean())
        side = {} if len(self.sides) == 1 else {"side": view}
        for i, part in enumerate(self.parts):
            row = {"effect": found.value[i], "effect_se": error[i], "low": found.low[i], "high": found.high[i]}
            row |= {"share": found.value[i] / whole if whole else torch.nan, "p": test.p[i], "p_adjusted": test.adjusted[i]}
            yield {"site": part, **side, **{k: float(v) + 0.0 for k, v in row.items()}}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The parts that add the most, of a pair those that changed the most."""
        import pandas as pd

        frame = pd.DataFrame(self._rows(self.views[0]))
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True).head(n)

    def edit(self, *parts: str, gain: float = 0.0) -> Edit:
        """What heads and MLPs write at this position, multiplied: with 0 it is taken out of the stream.

        An attribution is the direct way to the logits only; the edit also changes what later parts read.

        Args:
            parts: such as ``L3H2`` and ``L1.mlp_out`` (with its bias); by default the one that adds, or changed, the most.
            gain: what it is multiplied by.

        Raises:
            InputError: another part, which is no activation.
        """
        movable = [p for p in self.parts if _CHANGED.fullmatch(p)]
        if not parts and self.alike:
            raise InputError("no part changed, so name those to edit, such as edit('L0H0')")
        chosen = parts or (max(movable, key=lambda p: abs(float(self.values()[:, self.parts.index(p)].mean()))),)
        changes = []
        for part in chosen:
            if part not in movable:
                raise unknown("head or MLP", part, movable)
            layer, head = _CHANGED.fullmatch(part).groups()  # type: ignore[union-attr]
            where = position(self.at)
            site = Site("mlp_out", int(layer), position=where) if head is None else Site("z", int(layer), int(head), where)
            changes.append(ActivationChange(site, "scale", torch.tensor(float(gain)), "prompt"))
        return Edit(tuple(changes), f"{', '.join(chosen)} times {gain:g}")

    def _grid(self, values: Float[Tensor, " part"]) -> tuple[Float[Tensor, "layer column"], tuple[str, ...]]:
        """Values by layer, columns being the heads, the MLP and, where there are any, the biases; and the names of the columns."""
        number = {part: i for i, part in enumerate(self.parts)}
        biased = any(p.endswith((".b_O", ".b_out")) for p in self.parts)
        rows = []
        for layer in range(self.layers):
            row = [values[number[f"L{layer}H{head}"]] for head in range(self.heads)] + [values[number[f"L{layer}.mlp_out"]]]
            biases = [values[number[name]] for name in (f"L{layer}.b_O", f"L{layer}.b_out") if name in number]
            rows.append(torch.stack(row + ([sum(biases, torch.zeros_like(row[0]))] if biased else [])))
        return torch.stack(rows), (*(f"H{head}" for head in range(self.heads)), "MLP", *(["biases"] if biased else []))

    def plot(self) -> go.Figure:
        """The first of the figures."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """Heads and MLPs of every layer, of a pair the change first; all parts added up from the embedding on; kinds of parts."""
        grids = {view: self._grid(self.estimate(view).value) for view in self.views}
        top = max(float(grid.abs().max()) for view, (grid, _) in grids.items() if view != _CHANGE)
        maps = {view: self._map(view, *grids[view], top) for view in self.views}
        return {**maps, "Added up by layer": self._added_up(), "By kind of part": self._kinds()}

    def _map(self, view: str, grid: Tensor, columns: tuple[str, ...], top: float) -> go.Figure:
        title = f"What heads and MLPs write towards the answer at {self.at}" if len(self.sides) == 1 else f"{view}: {self._titled(view)}"
        return plots.heatmap(
            grid,
            x=columns,
            title=f"{title} (n = {self.n})",
            xlabel="heads, MLP" + (", biases of both" if len(columns) > self.heads + 1 else ""),
            ylabel="layer",
            unit=f"part of {_WORDS[self.metric]}, in logits",
            floor=grid.abs() <= self._floor(view),
            difference=True,
            limits=(-top, top) if view != _CHANGE and top > 0 else None,
        )

    def _titled(self, view: str) -> str:
        if view == _CHANGE:
            return f"how much more heads and MLPs write towards the answer at {self.at}"
        return f"what heads and MLPs write towards the answer at {self.at}"

    def _added_up(self) -> go.Figure:
        """What is known of the answer after each block: running sums over layers, constants from the start."""
        series, bands = {}, {}
        for side in self.sides:
            values = self.values(side)
            start = sum((values[:, self.parts.index(p)] for p in _ENDS if p in self.parts), torch.zeros(len(values)).double())
            blocks = torch.stack([self._grid(row)[0].sum(1) for row in values])
            found = bootstrap(torch.cat([start[:, None], start[:, None] + blocks.cumsum(1)], 1), seed=self.draw_seed)
            series[side], bands[side] = found.value, (found.low, found.high)
        return plots.lines(
            series,
            bands=bands,
            title=f"{_WORDS[self.metric]}, added up block by block: the last point is the model's own (n = {self.n})",
            xlabel="added up to and with (the constant biases behind the blocks are in from the start)",
            tokens=("embeddings", *(f"L{layer}" for layer in range(self.layers))),
            ylabel=f"{_SHORT[self.metric]}, 95 % interval",
        )

    def _kinds(self) -> go.Figure:
        """Embeddings, heads, MLPs and biases, each together."""
        kinds: Mapping[str, list[int]] = {
            "embeddings": [i for i, p in enumerate(self.parts) if p in ("embed", "W_pos")],
            "all heads": [i for i, p in enumerate(self.parts) if re.fullmatch(r"L\d+H\d+", p)],
            "all MLPs": [i for i, p in enumerate(self.parts) if p.endswith(".mlp_out")],
            "biases of blocks": [i for i, p in enumerate(self.parts) if p.endswith((".b_O", ".b_out"))],
            "final norm's bias": [i for i, p in enumerate(self.parts) if p == "b_ln_final"],
            "unembedding bias": [i for i, p in enumerate(self.parts) if p == "b_U"],
        }
        there = {name: which for name, which in kinds.items() if which}
        found = {
            side: bootstrap(torch.stack([self.values(side)[:, which].sum(1) for which in there.values()], 1), seed=self.draw_seed)
            for side in self.sides
        }
        return plots.bars(
            list(there),
            {side: e.value for side, e in found.items()},
            intervals={side: (e.low, e.high) for side, e in found.items()},
            title=f"What kinds of parts add to {_WORDS[self.metric]} (n = {self.n})",
            ylabel=f"{_SHORT[self.metric]}, 95 % interval",
        )


@analysis(version=1)
def logit_attribution(
    model: HookedModel | ModelPair,
    prompts: Prompts | PromptPairs,
    *,
    metric: MetricName = "auto",
    at: str = "END",
    seed: int = 0,
) -> LogitAttributionResult:
    """Which parts of a model write its answer, and did fine-tuning change them?

    The last stream is the sum of what the embeddings, every head, every MLP and their biases wrote into it. With the scale of the final
    norm held at that of the run, logits are linear in it, so that each part has its own share and all of them add up to the logits
    (direct logit attribution: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2023, arXiv
    2211.00593). That sum is checked on every prompt. It is the direct way only: what a part does by way of later ones is counted
    there, as ``activation_patching`` and ``path_patching`` show. Where prompts share a context, statistics are of means per context.

    ``logit_diff`` takes the distractor's logit off. Without distractors ``answer_logit`` takes the mean logit of the vocabulary
    off, because a number added to all logits changes no prediction, and a part that adds one would seem to write the answer.

    Args:
        model: one model, or a pair to compare.
        prompts: prompts with answers, of pairs the clean ones. Without answers, the token that base (or the only model) holds most
            likely takes their place, in both models.
        metric: ``logit_diff``, ``answer_logit``, or ``auto``: the first where there are distractors.
        at: the position whose logits are taken apart, one token per prompt.
        seed: of bootstrap and permutations.

    Raises:
        InputError: an unknown metric or position; answers outside the vocabulary; a model whose logits are no sum over parts, because
            something scales or bends them behind the unembedding, or norms what heads add to the stream.
    """
    if metric not in METRICS:
        raise unknown("metric", str(metric), METRICS)
    asked, where, vocab = clean_prompts(prompts), position(at), known_vocabulary(model)
    batch = model.batch(asked)
    batch.index(where)
    tokens, against = given(asked, vocab, "answers"), given(asked, vocab, "distractors")
    if metric == "logit_diff" and (tokens is None or against is None):
        raise InputError("logit_diff needs an answer and a distractor for every prompt, and these prompts come without; use answer_logit")
    against = None if metric == "answer_logit" or tokens is None else against
    stand_in, sides, found, floors = tokens is None, [], list[LogitParts](), list[tuple[Tensor, bool]]()
    for side, m in model.sides():
        tokens = own_top(m, batch, where, vocab) if tokens is None else tokens
        sides.append(side)
        found.append(logit_parts(m, batch, tokens, against, at=where, vocab=vocab))
        floors.append(rounding(m, _stacked(found[-1])[0].T, _measure(batch, tokens, against, where, vocab)))
    values, names = zip(*map(_stacked, found), strict=True)
    added = torch.stack(values)
    kept = [i for i, name in enumerate(names[0]) if name == "embed" or "H" in name or name.endswith("mlp_out") or bool(added[:, i].any())]
    return LogitAttributionResult(
        added=added[:, kept],
        whole=torch.stack([f.whole for f in found]),
        rest=torch.stack([f.rest for f in found]),
        size=torch.stack([f.size for f in found]),
        floor=torch.stack([torch.maximum(worst.max(), f.rest.abs().max()) for (worst, _), f in zip(floors, found, strict=True)]),
        half=any(lacking for _, lacking in floors),
        group=grouped(asked.contexts),
        metric="answer_logit" if against is None else "logit_diff",
        stand_in=stand_in,
        at=str(at),
        layers=model.shape.n_layers,
        heads=model.shape.n_heads,
        draw_seed=seed,
        labels={"side": tuple(sides), "part": tuple(names[0][i] for i in kept)},
    )


def _stacked(parts: LogitParts) -> tuple[Float[Tensor, "part prompt"], tuple[str, ...]]:
    """All parts one after another as they are written, and their names."""
    named = {"embed": parts.embed, "W_pos": parts.position}
    for layer in range(parts.mlp.shape[1]):
        named |= {f"L{layer}H{head}": parts.heads[:, layer, head] for head in range(parts.heads.shape[2])}
        named |= {f"L{layer}.b_O": parts.b_O[:, layer], f"L{layer}.mlp_out": parts.mlp[:, layer], f"L{layer}.b_out": parts.b_out[:, layer]}
    named |= {"b_ln_final": parts.norm, "b_U": parts.unembedding}
    return torch.stack(list(named.values())), tuple(named)


def _measure(batch: Batch, tokens: Tensor, against: Tensor | None, at: str | int, vocab: int) -> Measure:
    """The parts of some prompts, for the numerical floor."""

    def measure(m: HookedModel, rows: list[int]) -> Float[Tensor, "prompt part"]:
        less = None if against is None else against[rows]
        return _stacked(logit_parts(m, batch.select(rows), tokens[rows], less, at=at, vocab=vocab))[0].T

    return measure
