"""Which activations carry the answer from one prompt to the other, and did fine-tuning move them?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.metrics import Metric
from interp.names import unknown
from interp.prompts import PromptPairs
from interp.results import Result, analysis
from interp.sites import RESIDUAL, Site
from interp.spelling import spelled
from interp.stats import Estimate, Permutation, changed, permutation, plus_minus, recovered, standard_error
from interp.sweeps import Swept, check, run, sweep

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel, ModelPair

STREAM = (*RESIDUAL, "attn_out", "mlp_out", "mlp_post")
"""Activations that are patched one layer and position at a time."""

HEADS = ("z", "q", "k", "v", "pattern")
"""Activations that are patched one head at a time; ``k`` and ``v`` have key/value heads, ``pattern`` is rows of attention weights."""

Direction = Literal["denoise", "noise"]
_CHANGE = "tuned - base"
_WHAT = {"denoise": "clean activations into the corrupt run", "noise": "corrupt activations into the clean run"}


@dataclass(frozen=True, eq=False)
class ActivationPatchingResult(Result):
    """The metric of every patched run, per prompt.

    Attributes:
        clean: metric of the clean run.
        corrupt: metric of the corrupt run.
        floor: largest change of the metric by rounding alone (the plain way in batches of another size).
        deviation: largest difference of patched runs that were computed both ways: going on from a cached run, and plainly.
        checked: how many were computed both ways.
        patched: component -> metric of the patched runs, [side layer place prompt]; a place is one of
            ``positions``, or a head for the components in ``HEADS``.
        positions: names of the places in the prompt; tokens when ``by_token``.
        by_token: every token position was patched, not named ones.
        left_out: named positions that are not one token in every prompt.
        heads_at: where heads were patched: ``all`` positions or a named one.
        direction: ``denoise`` or ``noise``.
        metric: text form.
        unit: of the metric.
        draw_seed: of the bootstrap.
        notes: what was not accelerated, and why; with the model's name where there are two.
        labels: of the axis ``side``: base and tuned, or model.
    """

    clean: Float[Tensor, "side prompt"]
    corrupt: Float[Tensor, "side prompt"]
    floor: Float[Tensor, " side"]
    deviation: Float[Tensor, " side"]
    checked: Int[Tensor, " side"]
    patched: dict[str, Tensor]
    positions: tuple[str, ...]
    by_token: bool
    left_out: tuple[str, ...]
    heads_at: str
    direction: Direction
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
        return self.corrupt if self.direction == "denoise" else self.clean

    @property
    def goal(self) -> Float[Tensor, "side prompt"]:
        """Metric of the runs the activations come from."""
        return self.clean if self.direction == "denoise" else self.corrupt

    @property
    def resolved(self) -> Bool[Tensor, " side"]:
        """Models in which clean and corrupt differ by more than two standard errors."""
        return torch.tensor([recovered(s, s, g).refused is None for s, g in zip(self.start, self.goal, strict=True)])

    def recovered(self, component: str, side: str | None = None) -> Estimate:
        """Share of the difference between the two runs that each patch carries over, [layer place]; 95 % interval.

        Args:
            component: one of those that were patched.
            side: which model; by default the tuned one, or the only one.

        Raises:
            InputError: no such component or model.
        """
        return recovered(*self._runs(component, side), seed=self.draw_seed)

    def change(self, component: str) -> Estimate:
        """Recovered in the tuned model minus recovered in the base, [layer place]; 95 % interval.

        Raises:
            InputError: no such component, or only one model.
        """
        return changed(self._runs(component, "base"), self._runs(component, "tuned"), self.draw_seed)

    def _runs(self, component: str, side: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Patched [prompt layer place], start and goal [prompt] of one model."""
        i = self._side(side)
        return self._values(component)[i].movedim(-1, 0), self.start[i], self.goal[i]

    def effect(self, component: str, side: str | None = None) -> Float[Tensor, "layer place prompt"]:
        """What each patch changes, in units of the metric: patched - start."""
        i = self._side(side)
        return self._values(component)[i] - self.start[i]

    def _side(self, side: str | None) -> int:
        if side is not None and side not in self.sides:
            raise InputError(f"there is no model {side!r} in this result; it has {', '.join(self.sides)}")
        return len(self.sides) - 1 if side is None else self.sides.index(side)

    def _values(self, component: str) -> Tensor:
        if component not in self.patched:
            raise unknown("patched component", component, self.patched)
        return self.patched[component]

    def sites(self, component: str) -> list[list[Site]]:
        """The site of every cell, [layer place]."""
        _, layers, places, _ = self._values(component).shape
        if component in HEADS:
            at = None if self.heads_at == "all" else self.heads_at
            return [[Site(component, layer, head, at) for head in range(places)] for layer in range(layers)]
        names: Sequence[str | int] = range(places) if self.by_token else self.positions
        return [[Site(component, layer, position=p) for p in names] for layer in range(layers)]

    def summary(self) -> str:
        """The cell with the largest (change of) recovered, and how far clean and corrupt are apart."""
        apart = "; ".join(
            f"{self.metric} {float(self.clean[i].mean()):.3g} clean and {float(self.corrupt[i].mean()):.3g} corrupt in {side}, difference "
            + plus_minus(self.clean[i] - self.corrupt[i])
            + ("" if self.resolved[i] else ", too close to normalise")
            for i, side in enumerate(self.sides)
        )
        n = self.clean.shape[1]
        tail = f"({self.direction}: {_WHAT[self.direction]}; n = {n} prompt pairs; {apart}; {self.exactness})"
        component = next(c for c in (*HEADS, "attn_out", "mlp_out", "mlp_post", *RESIDUAL) if c in self.patched)
        told = [s for i, s in enumerate(self.sides) if self.resolved[i]]
        if not told:
            effect = self.effect(component).mean(-1)
            cell = _largest(effect)
            return (
                f"{_at(self.sites(component), cell)} changes {self.metric} by {float(effect[cell]):.3g}, the most of all {component} {tail}"
            )
        if len(told) == 2:
            change = self.change(component)
            cell = _largest(change.value)
            both = " and ".join(f"{self.recovered(component, s).at(*cell)} in {s}" for s in reversed(self.sides))
            return f"{_at(self.sites(component), cell)} changed the most: {change.at(*cell)}; it recovers {both} {tail}"
        share = self.recovered(component, told[0])
        where = f" in {told[0]}" if len(self.sides) > 1 else ""
        if component in RESIDUAL:  # the last cell of the stream always recovers everything: say where it gets there
            half = (share.value[:, -1] >= 0.5).nonzero()
            if len(half):
                cell = (int(half[0]), share.value.shape[1] - 1)
                return f"{_at(self.sites(component), cell)} recovers {share.at(*cell)}{where}, the first layer there with half {tail}"
        cell = _largest(share.value)
        return f"{_at(self.sites(component), cell)} recovers {share.at(*cell)}{where}, the most of all {component} {tail}"

    @property
    def exactness(self) -> str:
        """How exact the values are, in words: against the plain way, and beside the rounding error."""
        rounding = f"rounding moves {self.metric} by up to {float(self.floor.max()):.1g}"
        if int(self.checked.sum()):
            rounding = (
                f"{int(self.checked.sum())} runs checked the plain way are off by at most {float(self.deviation.max()):.1g}, {rounding}"
            )
        return "; ".join([rounding, *self.notes])

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per patch and model with means over prompts; ``per="prompt"`` the metric of every run.

        For a pair, rows of ``tuned - base`` have the difference of ``recovered`` with its interval. ``p`` is that of a sign-flip
        test, ``p_adjusted`` corrected for all cells of the model.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            return pd.DataFrame([row for c in self.patched for row in self._per_prompt(c)])
        return pd.DataFrame([row for view in self._views() for row in self._rows(view, self.patched)])

    def _cells(self, component: str) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        for layer, row in enumerate(self.sites(component)):
            for place, site in enumerate(row):
                name = place if component in HEADS else self.positions[place]
                yield (layer, place), {"component": component, "layer": layer, "place": name, "site": str(site)}

    def _per_prompt(self, component: str) -> Iterator[dict[str, Any]]:
        for i, side in enumerate(self.sides):
            for (layer, place), row in self._cells(component):
                for prompt, value in enumerate(self.patched[component][i, layer, place].tolist()):
                    ends = {"clean": float(self.clean[i, prompt]), "corrupt": float(self.corrupt[i, prompt])}
                    yield {"side": side, **row, "prompt": prompt, **ends, "patched": value}

    def _rows(self, view: str, components: Iterable[str]) -> Iterator[dict[str, Any]]:
        tests = self.tests(view)
        for component in components:
            share, effect, test = self._share(component, view), self._effect(component, view), tests[component]
            columns = {"effect": effect.mean(-1), "effect_se": standard_error(effect.movedim(-1, 0))}
            columns |= {"recovered": share.value, "low": share.low, "high": share.high, "p": test.p, "p_adjusted": test.adjusted}
            for cell, row in self._cells(component):
                yield {"side": view, **row, **{k: float(v[cell]) for k, v in columns.items()}}

    def tests(self, side: str) -> dict[str, Permutation]:
        """Component -> is the mean effect of each patch 0 [layer place]? ``adjusted`` looks at all cells of all components.

        Args:
            side: a model, or ``tuned - base``: then it is the recovered share of the two models that is compared, or, where one
                cannot be normalised, the effect.
        """
        if side == _CHANGE and bool(self.resolved.all()):
            gaps = (self.goal - self.start).mean(-1)
            found = {c: self.effect(c, "tuned") / gaps[1] - self.effect(c, "base") / gaps[0] for c in self.patched}
        else:
            found = {c: self._effect(c, side) for c in self.patched}
        test = permutation(torch.cat([x.flatten(0, 1) for x in found.values()]).T, seed=self.draw_seed)
        shapes = [x.shape[:2] for x in found.values()]
        pieces = [t.split([a * b for a, b in shapes]) for t in (test.p, test.adjusted)]
        return {c: Permutation(p.reshape(s), a.reshape(s)) for c, s, p, a in zip(found, shapes, *pieces, strict=True)}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The cells with the largest effect, for a pair those that changed the most, as ``to_frame`` lists them.

        The stream is left out where parts of it were patched too: near its ends it carries everything.
        """
        import pandas as pd

        parts = [c for c in self.patched if c not in RESIDUAL] or list(self.patched)
        frame = pd.DataFrame(self._rows(self._views()[0], parts)).drop(columns=["component", "layer", "place"])
        by = "effect" if all(frame["recovered"].isna()) else "recovered"
        return frame.sort_values(by, key=abs, ascending=False, kind="stable", ignore_index=True).head(n)

    def _views(self) -> tuple[str, ...]:
        """What is drawn and listed: the models, and for a pair what changed."""
        return self.sides if len(self.sides) == 1 else (_CHANGE, *self.sides)

    def _share(self, component: str, view: str) -> Estimate:
        return self.change(component) if view == _CHANGE else self.recovered(component, view)

    def _effect(self, component: str, view: str) -> Tensor:
        if view == _CHANGE:
            return self.effect(component, "tuned") - self.effect(component, "base")
        return self.effect(component, view)

    def plot(self) -> go.Figure:
        """The first of the figures: for a pair the change."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """Per component a map by layer and position, or layer and head, of every model; for a pair the change first."""
        return {f"{component}, {view}": self._map(component, view) for component in self.patched for view in self._views()}

    def _map(self, component: str, view: str) -> go.Figure:
        """A heatmap of one model, or of the change; in units of the metric where it cannot be normalised."""
        sides = [self._side(s) for s in (self.sides if view == _CHANGE else (view,))]
        whole = bool(self.resolved[sides].all())
        gaps = (self.goal - self.start).mean(-1) if whole else torch.ones(len(self.sides))
        effects = self.patched[component].mean(-1) - self.start.mean(-1)[:, None, None]
        shares = effects / gaps[:, None, None]
        values = shares[1] - shares[0] if view == _CHANGE else shares[sides[0]]
        rounding = float((self.floor / gaps.abs())[sides].sum())
        top = float(shares.abs().max())
        limits = (-top, top) if view != _CHANGE and top > 0 and bool(self.resolved.all()) else None  # one scale for both models
        heads = component in HEADS
        return plots.heatmap(
            values,
            x=None if heads else self.positions,
            title=f"{view}: {component} patched, {_WHAT[self.direction]} (n = {self.clean.shape[1]})",
            xlabel=("head" if self.heads_at != "all" else "head, at all positions") if heads else "position",
            ylabel="layer",
            unit=f"share of {self.metric} recovered" if whole else f"change of {self.unit} (not normalised)",
            floor=values.abs() <= rounding,  # also the exact 0 of a patch that cannot reach what is read
            difference=True,
            tokens="x" if self.by_token and not heads else "",
            limits=limits,
        )


@analysis(version=2)
def activation_patching(
    model: HookedModel | ModelPair,
    prompts: PromptPairs,
    *,
    sites: tuple[str, ...] = ("resid_pre", "attn_out", "mlp_out", "z"),
    direction: Direction = "denoise",
    metric: Metric | str = "logit_diff",
    positions: tuple[str, ...] = (),
    heads_at: str = "auto",
    seed: int = 0,
) -> ActivationPatchingResult:
    """Which activations carry the answer from one prompt to the other, and did fine-tuning move them?

    One activation at a time is copied from the run on one prompt of a pair into the run on the other (Meng et al.
    2022, arXiv 2202.05262; practice: Heimersheim & Nanda 2024, arXiv 2404.15255). ``denoise`` copies clean into
    corrupt and finds what suffices to restore the answer, ``noise`` copies corrupt into clean and finds what is
    needed for it; they differ where parts back each other up. ``recovered`` = (patched - start) / (goal - start), a
    ratio of means over prompts with a bootstrap interval, refused where clean and corrupt are within two standard
    errors. A position is looked up in each prompt, so the two may differ in length. For a pair of models each is
    patched with its own activations.

    Patched runs go on from one cached run of the prompts, and compute again only what a patch can change. Some are also
    computed plainly; the largest difference is kept in the result beside the rounding error, and where it is more than four
    times that, everything is computed plainly and the result says so.

    Args:
        model: one model, or a pair to compare.
        prompts: clean and corrupt prompts.
        sites: what to patch: ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``, ``mlp_out``, ``mlp_post`` by layer
            and position, ``z``, ``q``, ``k``, ``v``, ``pattern`` (rows of attention weights) by layer and head.
        direction: ``denoise`` or ``noise``.
        metric: what counts as the answer; ``kl`` is measured from the clean run.
        positions: named positions, or ``all`` for every token position, which needs prompts of one length. By default the
            names that are one token in every prompt; every token position if the prompts name only END and have one length.
        heads_at: ``all`` to patch heads at all positions at once, which needs clean and corrupt of one length; or a named position;
            ``auto`` is ``all`` where the lengths allow it and END otherwise.
        seed: of the bootstrap, and of the runs that are checked.

    Raises:
        InputError: an unknown site, position or metric; lengths that do not fit ``all``; clean and corrupt do not differ.
    """
    for component in sites:
        if component not in STREAM + HEADS:
            raise unknown("site to patch", component, STREAM + HEADS)
    if not sites or len(set(sites)) < len(sites):
        raise InputError(f"sites needs one name or several different ones, but it is {', '.join(sites) or 'empty'}")
    if direction not in _WHAT:
        raise InputError(f"direction must be denoise or noise, but it is {direction!r}")
    judge = Metric.parse(metric)
    clean, corrupt = _batches(model, prompts)
    prompts.require_difference()
    names, left_out = _positions(clean, corrupt, positions)
    if heads_at == "auto":
        heads_at = "all" if torch.equal(clean.lengths, corrupt.lengths) else "END"
    into, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    check(
        [Site(c, 0, position=p) for c in sites for p in ([heads_at if heads_at != "all" else None] if c in HEADS else names)], into, source
    )
    ends = [_ends(m, prompts, clean, corrupt, judge, sites) for _, m in model.sides()]
    _refuse_if_alike(ends, judge, [side for side, _ in model.sides()])
    patched: dict[str, list[Tensor]] = {c: [] for c in sites}
    swept: list[Swept] = []
    for side, m in model.sides():
        reference = m.logits(clean, at=judge.position).cpu() if judge.needs_reference else None
        cells = {c: _patches(m, c, names, heads_at) for c in sites}
        flat = [site for rows in cells.values() for row in rows for site in row]
        swept.append(sweep(m, into, flat, (m, source), judge.reader(prompts, reference), seed=seed, desc=f"patches, {side}"))
        sizes = [sum(map(len, rows)) for rows in cells.values()]
        for (component, rows), values in zip(cells.items(), swept[-1].values.split(sizes), strict=True):
            patched[component].append(values.reshape(len(rows), -1, len(into)))
    alone = len(swept) == 1
    return ActivationPatchingResult(
        clean=torch.stack([e[0] for e in ends]),
        corrupt=torch.stack([e[1] for e in ends]),
        floor=torch.tensor([s.floor for s in swept]),
        deviation=torch.tensor([s.deviation for s in swept]),
        checked=torch.tensor([s.checked for s in swept]),
        patched={c: torch.stack(v) for c, v in patched.items()},
        positions=_labels(model, clean, names),
        by_token=any(isinstance(p, int) for p in names),
        left_out=left_out,
        heads_at=heads_at,
        direction=direction,
        metric=str(judge),
        unit=judge.unit or str(judge),
        draw_seed=seed,
        notes=tuple(note if alone else f"{side}: {note}" for (side, _), s in zip(model.sides(), swept, strict=True) for note in s.notes),
        labels={"side": tuple(side for side, _ in model.sides())},
    )


def _batches(model: HookedModel | ModelPair, prompts: PromptPairs) -> tuple[Batch, Batch]:
    if not isinstance(prompts, PromptPairs):
        raise InputError(f"activation_patching needs clean and corrupt prompts (PromptPairs), not {type(prompts).__name__}")
    return model.batch(prompts.clean), model.batch(prompts.corrupt)


def _positions(clean: Batch, corrupt: Batch, wanted: Sequence[str]) -> tuple[list[str | int], tuple[str, ...]]:
    """The positions to patch from left to right, and the named ones that cannot be."""
    lengths = torch.cat([clean.lengths, corrupt.lengths]).unique().tolist()
    single = {n for n in clean.positions if n in corrupt.positions and all(len(p) == 1 for b in (clean, corrupt) for p in b.at(n))}
    if tuple(wanted) == ("all",) or (not wanted and single == {"END"} and len(lengths) == 1):
        if len(lengths) > 1:
            raise InputError(
                f"positions=all needs prompts of one length, but these have {lengths[0]} to {lengths[-1]} tokens; use named positions"
            )
        return list(range(lengths[0])), ()
    names = list(dict.fromkeys(wanted)) or list(single)
    for name in names:
        clean.index(name)
        corrupt.index(name)
    left_out = () if wanted else tuple(n for n in clean.positions if n not in single)
    return sorted(names, key=lambda n: (float(clean.index(n).double().mean()), n)), left_out


def _labels(model: HookedModel | ModelPair, clean: Batch, names: Sequence[str | int]) -> tuple[str, ...]:
    """The names, or for token positions the token where all prompts agree."""
    labels = []
    for name in names:
        ids = clean.ids[:, name].unique().tolist() if isinstance(name, int) else []
        labels.append(str(name) if not isinstance(name, int) else spelled(model, ids)[0] if len(ids) == 1 else f"({name})")
    return tuple(labels)


def _ends(
    m: HookedModel, prompts: PromptPairs, clean: Batch, corrupt: Batch, judge: Metric, components: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """The metric of the clean and of the corrupt run, once the model was seen to have the activations."""
    m.capture(clean[:1], [Site(c, 0) for c in components])
    reference = m.logits(clean, at=judge.position).cpu() if judge.needs_reference else None
    reader = judge.reader(prompts, reference)
    return run(m, clean, reader), run(m, corrupt, reader)


def _refuse_if_alike(ends: Sequence[tuple[Tensor, Tensor]], judge: Metric, sides: Sequence[str]) -> None:
    """Refuse when in no model clean and corrupt differ: no patch could then be judged. A single pair has no error to judge by."""
    if not any(recovered(c, c, k).refused is None or (len(c) == 1 and bool(c != k)) for c, k in ends):
        gaps = ", ".join(f"{plus_minus(clean - corrupt)} in {side}" for (clean, corrupt), side in zip(ends, sides, strict=True))
        raise InputError(f"{judge} does not differ between clean and corrupt prompts ({gaps}), so there is nothing to recover")


def _patches(m: HookedModel, component: str, names: Sequence[str | int], heads_at: str) -> list[list[Site]]:
    """The site of every cell, [layer place]."""
    layers = range(m.shape.n_layers)
    if component in HEADS:
        heads = m.shape.n_kv_heads if component in ("k", "v") else m.shape.n_heads
        at = None if heads_at == "all" else heads_at
        return [[Site(component, layer, head, at) for head in range(heads)] for layer in layers]
    return [[Site(component, layer, position=p) for p in names] for layer in layers]


def _largest(values: Tensor) -> tuple[int, int]:
    layer, place = divmod(int(values.abs().nan_to_num(-1.0).argmax()), values.shape[1])
    return layer, place


def _at(sites: list[list[Site]], cell: tuple[int, int]) -> str:
    return str(sites[cell[0]][cell[1]])
