"""Up to which layer does a token have to attend to another one?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp import plots
from interp.edits import attention_edit
from interp.errors import InputError
from interp.metrics import Metric, Reader
from interp.names import unknown
from interp.progress import progress
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.sites import Heads
from interp.stats import Estimate, bootstrap, mcnemar, paired_change, permutation, plus_minus, standard_error
from interp.sweeps import floor, run
from interp.sweeps.answers import Among, above_chance, means, measures, names, readers
from interp.sweeps.answers import share as share_of
from interp.tasks.base import Stream

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair
    from interp.models.checkpoint import Shape

_RANDOM = "random"


@dataclass(frozen=True, eq=False)
class AttentionKnockoutResult(Result):
    """The measures of every run with blocked attention, per prompt: ``accuracy`` (0 or 1), ``margin`` and the metric.

    Attributes:
        blocked: measures with the key blocked in the layers from each on (or in a window that begins there).
        control: the same with as many random tokens blocked instead; NaN where a prompt has too few.
        intact: measures of the model.
        floor: largest change by rounding alone; for the accuracy the share of answers whose margin is within it.
        query: the tokens that may not attend.
        heads: in which heads.
        width: layers in a window; 0 is all from each on.
        among: which tokens an answer has to beat to be right.
        unit: of the metric.
        draw_seed: of the bootstrap and the random tokens.
        notes: keys without a control.
        labels: of the axes: measures, sides, keys.
    """

    blocked: Float[Tensor, "measure side key layer prompt"]
    control: Float[Tensor, "measure side key layer draw prompt"]
    intact: Float[Tensor, "measure side prompt"]
    floor: Float[Tensor, "measure side"]
    query: str
    heads: str
    width: int
    among: Among
    unit: str
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    def _at(self, measure: str, side: str | None) -> tuple[int, int]:
        for axis, name in (("measure", measure), ("side", side)):
            if name is not None and name not in self.labels[axis]:
                raise unknown(axis, name, self.labels[axis])
        return self.labels["measure"].index(measure), self.sides.index(side) if side else len(self.sides) - 1

    def effect(self, measure: str = "accuracy", side: str | None = None) -> Float[Tensor, "key layer prompt"]:
        """What blocking changes: blocked - intact; by default in the tuned model, or the only one."""
        m, s = self._at(measure, side)
        return self.blocked[m, s] - self.intact[m, s]

    def share(self, measure: str = "accuracy", side: str | None = None) -> Estimate:
        """Share of the measure that blocking takes away, (intact - blocked) / intact, [key layer], with its interval.

        Refused where the intact model's is within two standard errors of 0.
        """
        m, s = self._at(measure, side)
        whole = self.intact[m, s]
        goal = torch.zeros_like(whole)
        found = share_of(self.blocked[m, s].movedim(-1, 0), whole, goal, of_answers=measure == "accuracy", seed=self.draw_seed)
        near = f"the measure of the intact model is {plus_minus(whole)}, within two standard errors of 0"
        return replace(found, refused=near) if found.refused else found

    def needed_until(self, key: str, measure: str = "accuracy", side: str | None = None) -> int | None:
        """The first layer from which on blocking takes nothing that can be told any more; None where it never takes anything.

        Effects are told by a sign-flip test at p < 0.05, corrected for all keys and layers of the model.
        """
        if key not in self.labels["key"]:
            raise unknown("key", key, self.labels["key"])
        m, s = self._at(measure, side)
        effect = self.effect(measure, side)
        test = permutation(effect.movedim(-1, 0), seed=self.draw_seed).adjusted[self.labels["key"].index(key)]
        size = effect[self.labels["key"].index(key)].double().mean(-1).abs()
        told = ((test < 0.05) & (size > (0 if measure == "accuracy" else self.floor[m, s]))).nonzero().flatten()
        return int(told[-1]) + 1 if len(told) else None

    def summary(self) -> str:
        """The key whose blocking costs most, the layer until which it is needed, and its control, in each model."""
        told = [self._told(side) + (f" in {side}" if len(self.sides) > 1 else "") for side in reversed(self.sides)]
        how = f"in {_layers(self.width)} at a time" if self.width else "in that layer and all after it"
        which = "all heads" if self.heads == "all" else self.heads
        noise = f"rounding moves the margin by up to {float(self.floor[1].max()):.1g}"
        end = "; ".join([f"blocked {how}, {which}", f"right among {self.among}", f"n = {self.intact.shape[2]} prompts", noise, *self.notes])
        return f"Attention from {self.query}: {'; '.join(told)} ({end})"

    def _told(self, side: str) -> str:
        m, s = self._at("accuracy", side)
        effect = self.effect("accuracy", side).double().mean(-1)
        key, layer = divmod(int(effect.abs().argmax()), effect.shape[1])
        name, whole = self.labels["key"][key], self.intact[m, s]
        last = min(layer + self.width, effect.shape[1]) - 1
        where = f"from layer {layer} on" if not self.width else f"in layer {layer}" if last == layer else f"in layers {layer} to {last}"
        main = f"without {name} {where} the accuracy is {_mean(self.blocked[m, s, key, layer])} instead of {_mean(whole)}"
        draws = self.control[m, s, key, layer].double().mean(-1)
        random = f", random tokens {float(draws.mean()):.2f}" if len(draws) and not bool(draws.isnan().any()) else ""
        until = self.needed_until(name, side=side)
        if until is None:
            return f"{main}{random}, which is no more than noise (difference {plus_minus(self.effect('accuracy', side)[key, layer])})"
        return main + random + (f", and from layer {until} on it can be spared" if not self.width and until < effect.shape[1] else "")

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per measure, model, key and layer; ``per="prompt"`` every run.

        ``effect`` is blocked - intact with its interval (of Agresti and Min for the accuracy, else bootstrap); ``recovered`` the share of
        the measure that is taken away; ``control`` the mean with random tokens blocked. ``p`` is that of a sign-flip test, ``p_adjusted``
        corrected for all keys and layers of the model, ``p_mcnemar`` the exact test of answers gained and lost.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        make = self._per_prompt if per else self._rows
        return pd.DataFrame([row for m in self.labels["measure"] for side in self.sides for row in make(m, side)])

    def _per_prompt(self, measure: str, side: str) -> Iterator[dict[str, Any]]:
        m, s = self._at(measure, side)
        intact = self.intact[m, s].tolist()
        for k, key in enumerate(self.labels["key"]):
            for layer, values in enumerate(self.blocked[m, s, k].tolist()):
                start = {"measure": measure, "side": side, "key": key, "layer": layer}
                for prompt, (a, b) in enumerate(zip(intact, values, strict=True)):
                    yield {**start, "prompt": prompt, "intact": a, "blocked": b}

    def _rows(self, measure: str, side: str) -> Iterator[dict[str, Any]]:
        m, s = self._at(measure, side)
        effect = self.effect(measure, side).double()
        by_prompt = effect.movedim(-1, 0)
        test, share, ends = (
            permutation(by_prompt, seed=self.draw_seed),
            self.share(measure, side),
            bootstrap(by_prompt, seed=self.draw_seed),
        )
        for k, key in enumerate(self.labels["key"]):
            for layer in range(effect.shape[1]):
                one, at = effect[k, layer], (k, layer)
                low, high, p = float(ends.low[at]), float(ends.high[at]), torch.nan
                if measure == "accuracy":
                    up, down = int((one > 0).sum()), int((one < 0).sum())
                    (low, high), p = paired_change(up, down, len(one)), mcnemar(up, down)
                draws = self.control[m, s, k, layer].double().mean(-1)
                row = {
                    "measure": measure,
                    "side": side,
                    "key": key,
                    "layer": layer,
                    "value": float(self.blocked[m, s, k, layer].double().mean()),
                }
                row |= {"effect": float(one.mean()), "effect_se": float(standard_error(one)), "effect_low": low, "effect_high": high}
                row |= {"recovered": float(share.value[at]), "low": float(share.low[at]), "high": float(share.high[at])}
                row |= {"p": float(test.p[at]), "p_adjusted": float(test.adjusted[at]), "p_mcnemar": p}
                yield row | {"control": float(draws.mean()), "control_sd": float(draws.std()) if len(draws) > 1 else torch.nan}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """Every key in the layer where blocking it changes the accuracy most; ``until`` is where it can be spared."""
        import pandas as pd

        rows = sorted((row for side in self.sides for row in self._rows("accuracy", side)), key=lambda row: -abs(row["effect"]))
        best = {(row["side"], row["key"]): row for row in reversed(rows)}  # the first of each key stays
        top = sorted(best.values(), key=lambda row: -abs(row["effect"]))[:n]
        until = [self.needed_until(row["key"], side=row["side"]) for row in top]
        frame = pd.DataFrame(top).assign(until=[float("nan") if u is None else u for u in until])
        columns = ["key", "layer", "until", "value", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted", "control"]
        return frame.reindex(columns=(["side"] if len(self.sides) > 1 else []) + columns)

    def plot(self) -> go.Figure:
        """The accuracy by the layer from which on each key is blocked."""
        return self._lines("accuracy", self.sides[-1])

    def figures(self) -> dict[str, go.Figure]:
        """Accuracy and the metric, model by model."""
        last = self.labels["measure"][-1]
        return {f"{m}{f', {side}' if len(self.sides) > 1 else ''}": self._lines(m, side) for m in ("accuracy", last) for side in self.sides}

    def _lines(self, measure: str, side: str) -> go.Figure:
        m, s = self._at(measure, side)
        found = means(self.blocked[m, s].movedim(-1, 0), of_answers=measure == "accuracy", seed=self.draw_seed)
        shown = self._shown(m, s)
        series = {self.labels["key"][k]: found.value[k] for k in shown}
        bands = {self.labels["key"][k]: (found.low[k], found.high[k]) for k in shown}
        draws = self.control[m, s].double().mean(-1)  # [key layer draw]
        there = ~draws.isnan().any(-1).any(-1) if draws.shape[-1] else torch.zeros(len(draws), dtype=torch.bool)
        if bool(there.any()):
            each = draws[there].movedim(1, 0).flatten(1)
            series["random tokens"], bands["random tokens"] = each.mean(-1), (each.amin(-1), each.amax(-1))
        whole = means(self.intact[m, s], of_answers=measure == "accuracy", seed=self.draw_seed)
        layers = self.blocked.shape[3]
        name = side if len(self.sides) > 1 else "nothing blocked"
        series[name], bands[name] = whole.value.expand(layers), (whole.low.expand(layers), whole.high.expand(layers))
        window = (
            "from this layer on"
            if not self.width
            else f"in {_layers(self.width)} from this one"
            if self.width > 1
            else "in this layer alone"
        )
        return plots.lines(
            series,
            bands=bands,
            title=f"Attention from {self.query} blocked{f', {side}' if len(self.sides) > 1 else ''} (n = {self.intact.shape[2]})",
            xlabel=f"layer: blocked {window}",
            ylabel=measure if measure == "accuracy" else self.unit,
        )

    def _shown(self, m: int, s: int, many: int = 6) -> list[int]:
        """The keys that matter most, in their order: a figure of all would not be read."""
        size = (self.blocked[m, s] - self.intact[m, s]).double().mean(-1).abs().amax(-1)
        return sorted(size.argsort(descending=True, stable=True)[:many].tolist())


@analysis(version=2)
def attention_knockout(
    model: HookedModel | ModelPair,
    prompts: Prompts | PromptPairs,
    *,
    query: str = "END",
    keys: tuple[str, ...] = (),
    heads: Heads | str = "all",
    width: int = 0,
    metric: Metric | str = "logit_diff",
    among: Among = "vocabulary",
    control: int = 2,
    seed: int = 0,
) -> AttentionKnockoutResult:
    """Up to which layer does a token have to attend to another one?

    Attention knockout (Geva et al. 2023, arXiv 2304.14767; by layers as in Prakash et al. 2024, arXiv 2402.14811): from each layer on, the
    query is kept from attending to a key, before the softmax, so that other keys share what it had. As long as blocking costs
    accuracy, what the key holds has not yet been moved. With a ``width`` only so many layers are blocked, which shows where it is
    moved. The control blocks as many random tokens before the query, none of them the key's and never the first token, where
    many heads rest. An answer is right if its logit is above all others (``margin`` > 0).

    Args:
        model: one model, or a pair: the same in both.
        prompts: what is asked; of pairs the clean ones. They need answers.
        query: the position that may not attend.
        keys: positions that are blocked, one after the other; a name may stand for several tokens. By default every named position that
            lies before the query in all prompts; where none is named, every token before the last, counted from the end.
        heads: ``all``, or some, ``L1H2,L2H0``: those of them in the blocked layers.
        width: how many layers are blocked; 0 blocks all from each on.
        metric: what is measured besides accuracy and margin.
        among: an answer is right among the whole ``vocabulary``, or among the ``options`` of its prompt.
        control: draws of random tokens beside each key.
        seed: of the random tokens and the bootstrap.

    Raises:
        InputError: an unknown position, a key behind the query, heads that the model lacks, fewer than two prompts, no model that answers
            better than a guess among the options.
    """
    asked = _checked(prompts, width, control)
    read, shape = readers(prompts, metric, among), model.shape
    layers = _blocked_heads(heads, width, shape)
    blocked = keys or _keys(asked, query)
    _in_sight(asked, query, blocked)
    asked, drawn, lone = _with_random(asked, query, blocked, control, seed)
    models = dict(model.sides())
    above_chance(asked, models)
    found = {side: _Runs(m, asked, query, read) for side, m in models.items()}
    values = [runs.each(layers, blocked, f"keys, {side}") for side, runs in found.items()]
    random = [
        runs.draws(layers, [drawn.get(key, ()) for key in blocked], control, f"random tokens, {side}") for side, runs in found.items()
    ]
    intact = [runs.intact for runs in found.values()]
    return AttentionKnockoutResult(
        blocked=torch.stack(values, dim=1),
        control=torch.stack(random, dim=1),
        intact=torch.stack(intact, dim=1),
        floor=torch.stack([runs.floor(v) for runs, v in zip(found.values(), values, strict=True)], dim=1),
        query=query,
        heads=str(heads),
        width=width,
        among=among,
        unit=Metric.parse(metric).unit or str(Metric.parse(metric)),
        draw_seed=seed,
        notes=(f"no random tokens beside {', '.join(lone)}: too few others before {query}",) if lone else (),
        labels={"measure": names(read), "side": tuple(found), "key": tuple(blocked)},
    )


def _checked(prompts: object, width: int, control: int) -> Prompts:
    if not isinstance(prompts, Prompts | PromptPairs):
        raise InputError(f"attention_knockout needs Prompts or PromptPairs, not {type(prompts).__name__}")
    for name, value in (("width", width), ("control", control)):
        if type(value) is not int or value < 0:
            raise InputError(f"{name} is a number of {'layers' if name == 'width' else 'draws'}, but it is {value!r}")
    if len(prompts) < 2:
        raise InputError("attention_knockout needs at least two prompts for standard errors, got one")
    return clean_prompts(prompts)


def _blocked_heads(heads: Heads | str, width: int, shape: Shape) -> list[str]:
    """What is blocked from each layer on, as an edit takes it; "" where there is nothing."""
    stop = [min(layer + width, shape.n_layers) if width else shape.n_layers for layer in range(shape.n_layers)]
    if str(heads) == "all":
        return [",".join(f"L{i}" for i in range(layer, end)) for layer, end in enumerate(stop)]
    wanted = [head for group in Heads.parse(heads) for head in group.heads]
    for layer, head in wanted:
        if layer >= shape.n_layers or head >= shape.n_heads:
            raise InputError(f"L{layer}H{head} is not in a model of {shape.n_layers} layers with {shape.n_heads} heads each")
    if at := [str(group) for group in Heads.parse(heads) if group.position is not None]:
        raise InputError(f"{at[0]} names a position, which is what query is for; write heads=L1H2,L2H0")
    return [",".join(f"L{i}H{h}" for i, h in dict.fromkeys(wanted) if layer <= i < end) for layer, end in enumerate(stop)]


def _keys(prompts: Prompts, query: str) -> tuple[str, ...]:
    """The named positions before the query; without any, tokens from the end."""
    batch = prompts.batch()
    asked = [min(tokens) for tokens in batch.at(query)]
    found = tuple(
        name
        for name in prompts.positions
        if name not in ("END", query) and all(some and max(some) < q for some, q in zip(batch.at(name), asked, strict=True))
    )
    if found:
        return found
    if query != "END":
        raise InputError(f"these prompts name no position before {query}; say keys=... which tokens to block")
    return tuple(str(-i) for i in range(2, min(map(len, prompts.ids)) + 1))


def _with_random(
    prompts: Prompts, query: str, keys: Sequence[str], draws: int, seed: int
) -> tuple[Prompts, dict[str, tuple[str, ...]], list[str]]:
    """The prompts with random tokens named beside every key, these names, and the keys that have none.

    Raises:
        InputError: an unknown position, or a prompt without query.
    """
    batch = prompts.batch()
    asked, more, drawn, lone = batch.at(_place(query)), dict[str, Any](), dict[str, tuple[str, ...]](), list[str]()
    if empty := [i for i, tokens in enumerate(asked) if not tokens]:
        raise InputError(f"prompt {empty[0]} has no token {query}")
    for number, key in enumerate(keys):
        tokens = batch.at(_place(key))
        pools = [[t for t in range(1, min(q)) if t not in own] for q, own in zip(asked, tokens, strict=True)]
        if any(len(pool) < len(own) for pool, own in zip(pools, tokens, strict=True)):
            lone += [key] if draws else []
            continue
        drawn[key] = tuple(f"{_RANDOM}-{number}-{i}" for i in range(draws))
        for i, name in enumerate(drawn[key]):
            streams = (Stream("attention_knockout", seed, key, row, i) for row in range(len(prompts)))
            chosen = zip(streams, pools, tokens, strict=True)
            more[name] = tuple(tuple(sorted(stream.sample(pool, len(own)))) for stream, pool, own in chosen)
    return replace(prompts, positions={**prompts.positions, **more}), drawn, lone


def _in_sight(prompts: Prompts, query: str, keys: Sequence[str]) -> None:
    """Refuse keys behind the query.

    Raises:
        InputError: it names both, and a prompt.
    """
    batch = prompts.batch()
    asked = batch.at(_place(query))
    for key in keys:
        for row, (own, query_at) in enumerate(zip(batch.at(_place(key)), asked, strict=True)):
            if own and query_at and max(own) > min(query_at):
                where = f"token {max(own)} against token {min(query_at)} in prompt {row}"
                raise InputError(
                    f"a query sees nothing behind it, and the key {key} comes after the query {query} ({where}); block a key before it"
                )


def _layers(width: int) -> str:
    return f"{width} layer{'s' * (width != 1)}"


def _place(position: str) -> str | int:
    return int(position) if position.lstrip("-").isdigit() else position


class _Runs:
    """One model with attention of a query blocked."""

    def __init__(self, model: HookedModel, prompts: Prompts, query: str, read: Mapping[str, Reader]) -> None:
        self.model, self.query, self.read = model, query, list(read.values())
        self.batch = model.batch(prompts)
        self.intact = measures([run(model, self.batch, reader) for reader in self.read])

    def __call__(self, heads: str, key: str) -> Float[Tensor, "measure prompt"]:
        if not heads:
            return self.intact
        with self.model.edited(attention_edit(heads, keys=key, query=self.query, kind="block")):
            logits = {at: self.model.logits(self.batch, at=at) for at in dict.fromkeys(reader.position for reader in self.read)}
            return measures([reader(logits[reader.position]).cpu() for reader in self.read])

    def each(self, layers: Sequence[str], keys: Sequence[str], desc: str) -> Float[Tensor, "measure key layer prompt"]:
        found = [self(heads, key) for key, heads in progress([(key, heads) for key in keys for heads in layers], desc)]
        return torch.stack(found, dim=1).unflatten(1, (len(keys), len(layers)))

    def draws(
        self, layers: Sequence[str], drawn: Sequence[tuple[str, ...]], many: int, desc: str
    ) -> Float[Tensor, "measure key layer draw prompt"]:
        out = self.intact.new_full((len(self.intact), len(drawn), len(layers), many, self.intact.shape[-1]), torch.nan)
        todo = [(k, i, heads, d, name) for k, draws in enumerate(drawn) for d, name in enumerate(draws) for i, heads in enumerate(layers)]
        for k, i, heads, d, name in progress(todo, desc):
            out[:, k, i, d] = self(heads, name)
        return out

    def floor(self, values: Float[Tensor, "measure key layer prompt"]) -> Float[Tensor, " measure"]:
        """By rounding: the share of answers left open, then the floors."""
        floors = [floor(self.model, self.batch, reader) for reader in self.read]
        return torch.stack([(values[1].abs() <= floors[0]).float().mean(), *map(torch.tensor, floors)])


def _mean(values: Tensor) -> str:
    return f"{float(values.double().mean()):.2f}"
