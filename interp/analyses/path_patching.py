"""What does one part of a model tell another directly, and did fine-tuning change it?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.metrics import Metric
from interp.prompts import PromptPairs
from interp.results import Result, analysis
from interp.sites import Heads, Site
from interp.stats import Estimate, Permutation, changed, permutation, plus_minus, recovered, standard_error
from interp.sweeps import check, run
from interp.sweeps.ends import End, receivers, senders
from interp.sweeps.paths import WAYS, Paths, path_sweep

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

Direction = Literal["noise", "denoise"]
_CHANGE = "tuned - base"
_WHAT = {"noise": "what is sent in the corrupt run, into the clean run", "denoise": "what is sent in the clean run, into the corrupt run"}
_DRAWN = 20  # senders with a bar
_MAPS = 4  # receivers with a map of heads each; more are drawn in one map


@dataclass(frozen=True, eq=False)
class PathPatchingResult(Result):
    """The metric of every path, per prompt.

    Attributes:
        clean: metric of the clean run.
        corrupt: metric of the corrupt run.
        patched: metric where receivers read what a sender sends in the other run.
        reaches: whether a sender can reach a receiver at all; where not, nothing was changed, exactly.
        floor: largest change of the metric by rounding alone.
        deviation: largest difference of cells that were computed both ways: by a chain of MLPs, and by four whole runs.
        checked: how many were computed both ways.
        direction: ``noise`` or ``denoise``.
        freeze_mlps: MLPs were held too, so that nothing goes through them.
        metric: text form.
        unit: of the metric.
        draw_seed: of bootstrap and permutations.
        notes: which senders reach nobody and why; what was not accelerated; with the model's name where there are two.
        labels: of the axes ``side``, ``sender`` and ``receiver``.
    """

    clean: Float[Tensor, "side prompt"]
    corrupt: Float[Tensor, "side prompt"]
    patched: Float[Tensor, "side sender receiver prompt"]
    reaches: Bool[Tensor, "sender receiver"]
    floor: Float[Tensor, " side"]
    deviation: Float[Tensor, " side"]
    checked: Int[Tensor, " side"]
    direction: Direction
    freeze_mlps: bool
    metric: str
    unit: str
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def start(self) -> Float[Tensor, "side prompt"]:
        """Metric of the runs that are patched."""
        return self.clean if self.direction == "noise" else self.corrupt

    @property
    def goal(self) -> Float[Tensor, "side prompt"]:
        """Metric of the runs that senders send from."""
        return self.corrupt if self.direction == "noise" else self.clean

    @property
    def resolved(self) -> Bool[Tensor, " side"]:
        """Models in which clean and corrupt differ by more than two standard errors."""
        return torch.tensor([recovered(s, s, g).refused is None for s, g in zip(self.start, self.goal, strict=True)])

    def recovered(self, side: str | None = None) -> Estimate:
        """Share of the difference between the two runs that each path carries, [sender receiver]; 95 % interval.

        Args:
            side: which model, or ``tuned - base``; by default the tuned one, or the only one.

        Raises:
            InputError: no such model.
        """
        if side != _CHANGE or len(self.sides) == 1:
            i = self._side(side)
            return recovered(self.patched[i].movedim(-1, 0), self.start[i], self.goal[i], seed=self.draw_seed)
        return self._change()

    def _change(self) -> Estimate:
        """Recovered in the tuned model minus recovered in the base."""
        base, tuned = ((self.patched[i].movedim(-1, 0), self.start[i], self.goal[i]) for i in range(2))
        return changed(base, tuned, self.draw_seed)

    def effect(self, side: str | None = None) -> Float[Tensor, "sender receiver prompt"]:
        """What each path changes, in units of the metric: patched - start; of ``tuned - base`` the difference of that."""
        if side == _CHANGE and len(self.sides) == 2:
            return self.effect("tuned") - self.effect("base")
        i = self._side(side)
        return self.patched[i] - self.start[i]

    def test(self, side: str | None = None) -> Permutation:
        """Is the mean effect of each path 0, [sender receiver]? ``adjusted`` looks at all cells.

        For ``tuned - base`` it is the recovered share of the two models that is compared, or, where one cannot be normalised, the effect.
        """
        found = self.effect(side)
        if side == _CHANGE and bool(self.resolved.all()):
            gaps = (self.goal - self.start).mean(-1)
            found = self.effect("tuned") / gaps[1] - self.effect("base") / gaps[0]
        return permutation(found.movedim(-1, 0), seed=self.draw_seed)

    def _side(self, side: str | None) -> int:
        if side is not None and side not in self.sides:
            raise InputError(f"there is no model {side!r} in this result; it has {', '.join(self.sides)}")
        return len(self.sides) - 1 if side is None else self.sides.index(side)

    @property
    def _views(self) -> tuple[str, ...]:
        """What is drawn and listed: for a pair what changed, and the models."""
        return self.sides if len(self.sides) == 1 else (_CHANGE, *self.sides)

    def _path(self, cell: tuple[int, int]) -> str:
        return f"{self.labels['sender'][cell[0]]} -> {self.labels['receiver'][cell[1]]}"

    def summary(self) -> str:
        """The path with the largest (change of) recovered, and how far clean and corrupt are apart."""
        apart = "; ".join(
            f"{self.metric} {float(self.clean[i].mean()):.3g} clean and {float(self.corrupt[i].mean()):.3g} corrupt in {side}, difference "
            + plus_minus(self.clean[i] - self.corrupt[i])
            + ("" if self.resolved[i] else ", too close to normalise")
            for i, side in enumerate(self.sides)
        )
        held = f"{_WHAT[self.direction]}, {'attention and MLPs' if self.freeze_mlps else 'attention'} held"
        told = f"{self.direction}: {held}; n = {self.clean.shape[1]} prompt pairs; {apart}; {self.exactness}"
        tail = f"{int(self.reaches.sum())} paths that reach a receiver, of {self.reaches.numel()} ({told})"
        if not bool(self.reaches.any()):
            return f"No sender reaches a receiver, so nothing changes at all: no path of {self.reaches.numel()} ({told})"
        told = [side for i, side in enumerate(self.sides) if self.resolved[i]]
        if not told:
            effect = self.effect()
            cell = _largest(effect.mean(-1))
            noise = f" +- {float(standard_error(effect[cell])):.2g}" if effect.shape[-1] > 1 else ""
            return f"{self._path(cell)} changes {self.metric} by {float(effect[cell].mean()):.3g}{noise}, the most of {tail}"
        if len(told) == 2:
            change = self._change()
            cell = _largest(change.value)
            both = " and ".join(f"{self.recovered(s).at(*cell)} in {s}" for s in reversed(self.sides))
            return f"{self._path(cell)} changed the most: {change.at(*cell)}; it carries {both}; {tail}"
        share = self.recovered(told[0])
        cell = _largest(share.value)
        where = f" in {told[0]}" if len(self.sides) > 1 else ""
        return f"{self._path(cell)} carries {share.at(*cell)} of the difference{where}, the most of {tail}"

    @property
    def exactness(self) -> str:
        """How exact the values are, in words: against four whole runs, and beside the rounding error."""
        rounding = f"rounding moves {self.metric} by up to {float(self.floor.max()):.1g}"
        if count := int(self.checked.sum()):
            rounding = f"{count} paths checked by four whole runs are off by at most {float(self.deviation.max()):.1g}, {rounding}"
        return "; ".join([rounding, *self.notes])

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per path and model with means over prompts; ``per="prompt"`` the metric of every run.

        For a pair, rows of ``tuned - base`` have the difference of ``recovered`` with its interval. ``p`` is that of a sign-flip
        test, ``p_adjusted`` corrected for all paths of the model.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            return pd.DataFrame([row for i, side in enumerate(self.sides) for row in self._per_prompt(i, side)])
        return pd.DataFrame([row for view in self._views for row in self._rows(view)])

    def _ends(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        for i, sender in enumerate(self.labels["sender"]):
            for j, receiver in enumerate(self.labels["receiver"]):
                ends = {"sender": sender, "receiver": receiver, "reaches": bool(self.reaches[i, j])}
                yield (i, j), {"path": self._path((i, j)), **ends}

    def _per_prompt(self, i: int, side: str) -> Iterator[dict[str, Any]]:
        for cell, row in self._ends():
            for prompt, value in enumerate(self.patched[i][cell].tolist()):
                both = {"clean": float(self.clean[i, prompt]), "corrupt": float(self.corrupt[i, prompt])}
                yield {"side": side, **row, "prompt": prompt, **both, "patched": value}

    def _rows(self, view: str) -> Iterator[dict[str, Any]]:
        share, effect, test = self.recovered(view), self.effect(view), self.test(view)
        columns = {"effect": effect.mean(-1), "effect_se": standard_error(effect.movedim(-1, 0))}
        columns |= {"recovered": share.value, "low": share.low, "high": share.high, "p": test.p, "p_adjusted": test.adjusted}
        for cell, row in self._ends():
            yield {"side": view, **row, **{name: float(x[cell]) + 0.0 for name, x in columns.items()}}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The paths with the largest effect, for a pair those that changed the most, as ``to_frame`` lists them; none under the floor."""
        import pandas as pd

        by = "recovered" if self.recovered(self._views[0]).refused is None else "effect"
        rows = [row for row in self._rows(self._views[0]) if abs(row["effect"]) > float(self.floor.sum())]
        columns = ["side", "path", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted"]
        return pd.DataFrame(sorted(rows, key=lambda row: -abs(row[by]))[:n], columns=columns)

    def plot(self) -> go.Figure:
        """The first of the figures: for a pair the change."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """Of every model, for a pair the change first: heads by layer for few receivers; bars of the strongest; or senders by receivers."""
        grid, names = self._grid(), self.labels["receiver"]
        if grid is not None and len(names) <= _MAPS:
            return {f"{name}, {view}": self._heads(view, j, grid) for j, name in enumerate(names) for view in self._views}
        if len(names) == 1:
            return {view: self._bars(view) for view in self._views}
        return {view: self._map(view) for view in self._views}

    def _grid(self) -> tuple[int, int] | None:
        """Layers and heads per layer, where the senders are every head once, in order."""
        if any(name.count("H") != 1 or ".z" not in name or "," in name for name in self.labels["sender"]):
            return None
        sites = [Site.parse(name) for name in self.labels["sender"]]
        layers, heads = 1 + max(s.layer or 0 for s in sites), 1 + max(s.head or 0 for s in sites)
        whole = [Site("z", layer, head, sites[0].position) for layer in range(layers) for head in range(heads)]
        return (layers, heads) if sites == whole else None

    def _shares(self, view: str) -> tuple[Tensor, Tensor, str, tuple[float, float] | None]:
        """Values of all paths, in units of the metric where they cannot be normalised; what is under the floor; unit, and limits."""
        sides = list(range(len(self.sides))) if view == _CHANGE else [self._side(view)]
        whole = bool(self.resolved[sides].all())
        gaps = (self.goal - self.start).mean(-1) if whole else torch.ones(len(self.sides))
        shares = (self.patched - self.start[:, None, None]).mean(-1) / gaps[:, None, None]
        values = shares[1] - shares[0] if view == _CHANGE else shares[sides[0]]
        top = float(shares.abs().max())
        limits = (-top, top) if view != _CHANGE and top > 0 and bool(self.resolved.all()) else None  # one scale for both models
        unit = f"share of {self.metric} carried" if whole else f"change of {self.unit} (not normalised)"
        return values, values.abs() <= float((self.floor / gaps.abs())[sides].sum()), unit, limits

    def _title(self, view: str, what: str) -> str:
        return f"{view}: {what}, {_WHAT[self.direction]} (n = {self.clean.shape[1]})"

    def _heads(self, view: str, receiver: int, grid: tuple[int, int]) -> go.Figure:
        values, grey, unit, limits = self._shares(view)
        where = Site.parse(self.labels["sender"][0]).position
        return plots.heatmap(
            values[:, receiver].reshape(grid),
            title=self._title(view, f"every head -> {self.labels['receiver'][receiver]}"),
            xlabel="head, at all positions" if where is None else f"head, at {where}",
            ylabel="layer",
            unit=unit,
            floor=grey[:, receiver].reshape(grid),  # also the exact 0 of what does not reach the receiver
            difference=True,
            limits=limits,
        )

    def _map(self, view: str) -> go.Figure:
        values, grey, unit, limits = self._shares(view)
        return plots.heatmap(
            values,
            x=self.labels["receiver"],
            y=self.labels["sender"],
            title=self._title(view, "senders by receivers"),
            xlabel="receiver",
            ylabel="sender",
            unit=unit,
            floor=grey,
            difference=True,
            limits=limits,
        )

    def _bars(self, view: str) -> go.Figure:
        values, _, unit, _ = self._shares(view)
        order = values[:, 0].abs().argsort(descending=True, stable=True)[:_DRAWN]
        share = self.recovered(view)
        normalised = share.refused is None
        name = view if len(self.sides) > 1 else self.metric
        return plots.bars(
            [self.labels["sender"][i] for i in order.tolist()],
            {name: values[order, 0]},
            intervals={name: (share.low[order, 0], share.high[order, 0])} if normalised and self.clean.shape[1] > 1 else None,
            title=self._title(view, f"senders -> {self.labels['receiver'][0]}"),
            xlabel="sender",
            ylabel=unit,
            horizontal=True,
        )


@analysis(version=1)
def path_patching(
    model: HookedModel | ModelPair,
    prompts: PromptPairs,
    *,
    sender: str | Heads = "heads@END",
    receiver: str | Heads = "logits",
    freeze_mlps: bool = False,
    separately: bool = False,
    direction: Direction = "noise",
    metric: Metric | str = "logit_diff",
    seed: int = 0,
) -> PathPatchingResult:
    """What does one part of a model tell another directly, and did fine-tuning change it?

    Path patching changes what a sender sends to receivers through the residual stream and MLPs alone, with no detour through other
    heads (Wang et al. 2023, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969). Four runs define it: the prompt as
    it is; its partner, for what the sender sends there; the prompt with the sender so changed and every other head held at what it
    gave, in which it is recorded what the receivers read; and the prompt with the receivers reading that, all else free. ``noise``
    sends from the corrupt into the clean run and finds what the answer needs, ``denoise`` from clean into corrupt. ``recovered`` =
    (patched - start) / (goal - start), a ratio of means over prompts with a bootstrap interval, refused where clean and corrupt are
    within two standard errors. For a pair of models each is patched with its own activations.

    Norms are never held, MLPs only if asked for; then senders add up up to the receiver's norm, and otherwise groups are not the sum
    of their members. q, k and v are those before rotary embedding; k and v belong to key/value heads, which groups of heads share
    (``L2H1.v`` is key/value head 1). A group of receivers reads what was recorded in all its members, also in those to which nothing
    came. What a sender writes after a receiver has read, or at a position where no receiver reads, cannot reach it: exactly 0.

    With attention held nothing moves between positions, so all senders ride one chain of MLPs at the receiver's position. Some
    paths are also computed by four whole runs; the largest difference is kept beside the rounding error, and where it is more
    than four times that, all are computed so and the result says so.

    Args:
        model: one model, or a pair to compare.
        prompts: clean and corrupt prompts.
        sender: who sends, by turns, separated by ``;``: ``L9H6@S2``, ``L2.mlp_out@END``, ``embed@IO`` (the whole stream entering the
            first block), ``heads@END``, ``mlps@END`` or ``all@END`` for every one by turns; members of a group that sends together
            are separated by commas, ``movers=L9H6,L9H9@END``. A position is looked up in each prompt; without one all positions
            are meant, which needs clean and corrupt of one length.
        receiver: who receives, alike: ``logits``, ``L9H6.q@END``, ``L8H1.v@S2``, ``L5.resid_mid@END`` for the MLP of a layer, ``q@END``
            for every head.
        freeze_mlps: hold MLPs at what they gave, so that only the residual stream carries.
        separately: every receiver by itself instead of all together.
        direction: ``noise`` or ``denoise``.
        metric: what counts as the answer; ``kl`` is measured from the clean run.
        seed: of the bootstrap, the permutations, and the paths that are checked.

    Raises:
        InputError: a sender or receiver that is none, or not in the model; an unknown position or metric; lengths that do not fit;
            clean and corrupt do not differ.
    """
    if not isinstance(prompts, PromptPairs):
        raise InputError(f"path_patching needs clean and corrupt prompts (PromptPairs), not {type(prompts).__name__}")
    if direction not in _WHAT:
        raise InputError(f"direction must be noise or denoise, but it is {direction!r}")
    prompts.require_difference()
    judge = Metric.parse(metric)
    clean, corrupt = model.batch(prompts.clean), model.batch(prompts.corrupt)
    into, source = (clean, corrupt) if direction == "noise" else (corrupt, clean)
    found: list[Paths] = []
    sent, read = list[End](), list[End]()
    for side, m in model.sides():
        sent, read = senders(sender, m), receivers(receiver, m, judge.position, separately)
        check([s for end in sent for s in end.sites], into, source)
        check([s for end in read for s in end.sites], into)
        reader = judge.reader(prompts, m.logits(clean, at=judge.position).cpu() if judge.needs_reference else None)
        if side == "model" and any(end.name != "logits" for end in read):  # it takes long
            _refuse_if_alike([(run(m, into, reader), run(m, source, reader))], judge)
        ends = [end.sites for end in sent], [end.sites for end in read]
        found.append(path_sweep(m, into, source, *ends, reader, freeze_mlps=freeze_mlps, seed=seed, desc=f"paths, {side}"))
    _refuse_if_alike([(paths.start, paths.goal) for paths in found], judge)
    names = tuple(side for side, _ in model.sides())
    starts, goals = torch.stack([p.start for p in found]), torch.stack([p.goal for p in found])
    notes = [note if len(found) == 1 else f"{side}: {note}" for side, p in zip(names, found, strict=True) for note in p.notes]
    unreached = _unreached(found[0].blocked, sent)
    if bool((found[0].blocked != 0).all()):
        warnings.warn(f"no sender reaches a receiver: {'; '.join(unreached)}", stacklevel=2)
    return PathPatchingResult(
        clean=starts if direction == "noise" else goals,
        corrupt=goals if direction == "noise" else starts,
        patched=torch.stack([p.values for p in found]),
        reaches=found[0].blocked == 0,
        floor=torch.tensor([p.floor for p in found]),
        deviation=torch.tensor([p.deviation for p in found]),
        checked=torch.tensor([p.checked for p in found]),
        direction=direction,
        freeze_mlps=freeze_mlps,
        metric=str(judge),
        unit=judge.unit or str(judge),
        draw_seed=seed,
        notes=(*unreached, *notes),
        labels={"side": names, "sender": tuple(end.name for end in sent), "receiver": tuple(end.name for end in read)},
    )


def _refuse_if_alike(ends: Sequence[tuple[Tensor, Tensor]], judge: Metric) -> None:
    """Refuse when in no model the two runs differ: no path could then be judged. A single pair has no error to judge by."""
    if not any(recovered(a, a, b).refused is None or (len(a) == 1 and bool(a != b)) for a, b in ends):
        gaps = ", ".join(plus_minus(a - b) for a, b in ends)
        raise InputError(f"{judge} does not differ between clean and corrupt prompts ({gaps}), so there is nothing to recover")


def _unreached(blocked: Tensor, sent: Sequence[End]) -> list[str]:
    """Sentences about the paths that there are not."""
    notes = []
    for k, way in enumerate(WAYS):
        if k and (names := [end.name for end, row in zip(sent, blocked, strict=True) if bool((row == k).all())]):
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            notes.append(f"sender {way}, so exactly 0: {', '.join(names[:4])}{more}")
    if cells := int((blocked != 0).sum() - (blocked != 0).all(1).sum() * blocked.shape[1]):
        notes.append(f"{cells} other paths that are not there (too late, or at another position) are exactly 0")
    return notes


def _largest(values: Tensor) -> tuple[int, int]:
    i, j = divmod(int(values.abs().nan_to_num(-1.0).argmax()), values.shape[1])
    return i, j
