"""What does a part of one model do inside the other?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.metrics import Metric
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.sites import RESIDUAL, Heads, Site
from interp.spelling import spelled
from interp.stats import Estimate, permutation, plus_minus, recovered, standard_error
from interp.sweeps import Patch, check, run, sweep
from interp.sweeps.draws import moments, present, unread
from interp.sweeps.groups import HEADS, STREAM, groups_of, head_sites, random_heads, written

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel, ModelPair

Component = Literal["z", "q", "k", "v", "pattern", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "mlp_post"]
Direction = Literal["tuned_to_base", "base_to_tuned"]
Output = Literal["receiver", "sender"]

_SIDES: dict[str, tuple[str, str]] = {"tuned_to_base": ("tuned", "base"), "base_to_tuned": ("base", "tuned")}
_OUTPUTS = ("receiver", "sender")


@dataclass(frozen=True, eq=False)
class CrossPatchingResult(Result):
    """The metric of every patched run, per prompt.

    Attributes:
        patched: metric of the receiving model with each cell set.
        control: the same with random heads in place of those of the cell; NaN where there is no such control.
        start: metric of the receiving model.
        goal: metric of the sending model on the same prompts.
        floor: largest change of the metric of the receiving model by rounding alone.
        deviation: largest difference of patched runs that were computed both ways: going on from a cached run, and plainly.
        checked: how many were computed both ways.
        labels: names of the cells: sites, or groups.
        sites: what each cell sets, in the receiving model.
        layers: rows of the map of single sites; 0 for groups.
        places: its columns, which are heads or positions; tokens when ``by_token``.
        by_token: every token position was patched, not named ones.
        component: which activation.
        heads_at: where heads were patched: ``all`` positions or a named one.
        direction: which model receives.
        output: whose W_O takes a head's z.
        metric: text form.
        unit: of the metric.
        draw_seed: of the bootstrap and of the random heads.
        notes: what was not accelerated and why, and groups without a control.
    """

    patched: Float[Tensor, "cell prompt"]
    control: Float[Tensor, "cell draw prompt"]
    start: Float[Tensor, " prompt"]
    goal: Float[Tensor, " prompt"]
    floor: float
    deviation: float
    checked: int
    labels: dict[str, tuple[str, ...]]
    sites: tuple[str, ...]
    layers: int
    places: tuple[str, ...]
    by_token: bool
    component: str
    heads_at: str
    direction: Direction
    output: Output
    metric: str
    unit: str
    draw_seed: int
    notes: tuple[str, ...]

    @property
    def sender(self) -> str:
        """The model the activations come from."""
        return _SIDES[self.direction][0]

    @property
    def receiver(self) -> str:
        """The model they are set in."""
        return _SIDES[self.direction][1]

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of the cells."""
        return self.labels["cell"]

    @property
    def resolved(self) -> bool:
        """Whether the two models differ by more than two standard errors, so that a share of that can be told."""
        return recovered(self.start, self.start, self.goal, resamples=2).refused is None

    @property
    def recovered(self) -> Estimate:
        """Share of the difference between the two models that each cell carries over, [cell]; 95 % interval."""
        return recovered(self.patched.T, self.start, self.goal, seed=self.draw_seed)

    @property
    def effect(self) -> Float[Tensor, "cell prompt"]:
        """What each cell changes, in units of the metric: patched - start."""
        return self.patched - self.start

    @property
    def random_heads(self) -> Float[Tensor, "cell draw"]:
        """Share that every draw of random heads carries over; NaN where there is none, or nothing can be normalised."""
        found = (self.control - self.start).double().mean(-1) / (self.goal - self.start).double().mean()
        return found if self.resolved else torch.full_like(found, torch.nan)

    @property
    def convention(self) -> str:
        """What is set, in words."""
        if self.output == "sender":
            return f"what heads add in {self.sender}, through its own W_O, set in {self.receiver}"
        if any(".z" in site for site in self.sites):
            return f"z of {self.sender} set in {self.receiver}, through W_O of {self.receiver}"
        return f"{self.component if self.layers else 'parts'} of {self.sender} set in {self.receiver}"

    def summary(self) -> str:
        """The cell that carries most, its control, and how far the two models are apart."""
        share, i = self.recovered, self._first()
        if not self.resolved:
            main, draws = f"changes {self.metric} by {plus_minus(self.effect[i])}", (self.control[i] - self.start).mean(-1)
        else:
            main, draws = (
                f"recovers {float(share.value[i]):.2f} [{float(share.low[i]):.2f}, {float(share.high[i]):.2f}]",
                self.random_heads[i],
            )
        beside = f", random heads {_spread(draws)}" if len(draws := present(draws)) else ""
        which = f"the most of {len(self.cells)} groups" if not self.layers else f"the most of all {self.component}"
        if (
            self.layers and self.component in RESIDUAL and self.resolved and float(share.value[i]) >= 0.5
        ):  # the end of the stream always carries everything
            which = "the first layer there with half"
        told = [main + beside] + [which] * (len(self.cells) > 1)
        return f"{self.cells[i]} {', '.join(told)} ({self.convention}; n = {len(self.start)} prompts; {self._apart()}; {self.exactness})"

    def _apart(self) -> str:
        gap = f"difference {plus_minus(self.goal - self.start)}" + ("" if self.resolved else ", too close to normalise")
        return f"{self.metric} {float(self.start.mean()):.3g} in {self.receiver} and {float(self.goal.mean()):.3g} in {self.sender}, {gap}"

    @property
    def exactness(self) -> str:
        """How exact the values are, in words: against the plain way, and beside the rounding error."""
        rounding = f"rounding moves {self.metric} by up to {self.floor:.1g}"
        if self.checked:
            rounding = f"{self.checked} runs checked the plain way are off by at most {self.deviation:.1g}, {rounding}"
        return "; ".join([rounding, *self.notes])

    def _first(self) -> int:
        """The cell to speak of."""
        if not self.resolved:
            return int(self.effect.double().mean(-1).abs().argmax())
        share = self.recovered
        if self.layers and self.component in RESIDUAL:
            last = share.value.reshape(self.layers, -1)[:, -1]
            half = (last >= 0.5).nonzero()
            if len(half):
                return (int(half[0]) + 1) * len(self.places) - 1
        return int(share.value.abs().argmax())

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per cell with means over prompts; ``per="prompt"`` the metric of every run.

        ``control`` is the mean of what random heads recover and ``control_sd`` its spread over the draws, ``control_effect`` their mean
        in units of the metric. ``p`` is that of a sign-flip test, ``p_adjusted`` corrected for all cells.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        what = "site" if self.layers else "group"
        if per:
            ends = list(zip(self.start.tolist(), self.goal.tolist(), strict=True))
            rows = [
                {what: name, "prompt": i, "start": a, "goal": b, "patched": x}
                for name, values in zip(self.cells, self.patched.tolist(), strict=True)
                for i, ((a, b), x) in enumerate(zip(ends, values, strict=True))
            ]
            return pd.DataFrame(rows)
        share, test = self.recovered, permutation(self.effect.T, seed=self.draw_seed)
        effects = {"effect": self.effect.double().mean(-1), "effect_se": standard_error(self.effect.T)}
        columns = effects | {"recovered": share.value, "low": share.low, "high": share.high, "p": test.p, "p_adjusted": test.adjusted}
        if not self.layers:
            found = [moments(draws) for draws in self.random_heads]
            columns |= {name: torch.tensor([x[i] for x in found], dtype=torch.float64) for i, name in enumerate(("control", "control_sd"))}
            columns |= {"control_effect": (self.control - self.start).double().mean(-1).nanmean(-1)}
        names = {what: self.cells} | ({} if self.layers else {"sites": self.sites})
        return pd.DataFrame({**names, **{name: x.double().numpy() for name, x in columns.items()}})

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The cells with the largest effect, as ``to_frame`` lists them."""
        frame = self.to_frame().drop(columns=["sites"], errors="ignore")
        by = "recovered" if self.resolved else "effect"
        return frame.sort_values(by, key=abs, ascending=False, kind="stable", ignore_index=True).head(n)

    def plot(self) -> go.Figure:
        """A map by layer and head or position; for groups bars beside their random heads."""
        return self._map() if self.layers else self._bars()

    def _scaled(self) -> tuple[float, str]:
        """What effects are divided by in figures, and the name of the axis."""
        if not self.resolved:
            return 1.0, f"change of {self.unit} (not normalised)"
        return float((self.goal - self.start).double().mean()), f"share of {self.metric} recovered"

    def _map(self) -> go.Figure:
        gap, unit = self._scaled()
        values = (self.effect.double().mean(-1) / gap).reshape(self.layers, -1)
        heads = self.component in HEADS
        at = "head" if self.heads_at != "all" else "head, at all positions"
        return plots.heatmap(
            values,
            x=None if heads else self.places,
            title=f"{self.convention} (n = {len(self.start)})",
            xlabel=at if heads else "position",
            ylabel="layer",
            unit=unit,
            floor=values.abs() <= self.floor / abs(gap),  # also the exact 0 of a patch that cannot reach what is read
            difference=True,
            tokens="x" if self.by_token and not heads else "",
        )

    def _bars(self) -> go.Figure:
        gap, unit = self._scaled()
        values, error = self.effect.double().mean(-1) / gap, standard_error(self.effect.T)
        share = self.recovered
        ends = (share.low, share.high) if self.resolved else (values - 2 * error, values + 2 * error)
        draws = (self.control - self.start).double().mean(-1) / gap
        series, intervals = {"group": values}, {"group": ends}
        if draws.shape[1] and not bool(draws.isnan().all()):
            series["random heads"] = draws.nanmean(-1)
            none = draws.isnan().all(-1)
            ends_of = (draws.nan_to_num(torch.inf).amin(-1), draws.nan_to_num(-torch.inf).amax(-1))
            intervals["random heads"] = (ends_of[0].masked_fill(none, torch.nan), ends_of[1].masked_fill(none, torch.nan))
        random = f"; of random heads the range of {draws.shape[1]} draws" if len(series) > 1 else ""
        return plots.bars(
            self.cells,
            series,
            intervals=intervals,
            title=f"{self.convention} (n = {len(self.start)}{random})",
            xlabel="group",
            ylabel=unit,
            reference=1.0 if self.resolved else None,
            reference_label=self.sender,
            floor=self.floor / abs(gap),
        )


@analysis(version=2)
def cross_patching(
    pair: ModelPair,
    prompts: Prompts | PromptPairs,
    *,
    component: Component = "z",
    direction: Direction = "tuned_to_base",
    output: Output = "receiver",
    sites: Heads | str | None = None,
    metric: Metric | str = "logit_diff",
    positions: tuple[str, ...] = (),
    heads_at: str = "all",
    control: int = 10,
    seed: int = 0,
) -> CrossPatchingResult:
    """What does a part of one model do inside the other?

    Both models run on the same prompts, and activations of the one, the sender, are set in the run of the other, the receiver (CMAP:
    Prakash et al. 2024, arXiv 2402.14811). ``recovered`` = (patched - start) / (goal - start) from the metric of the
    receiver to that of the sender, a ratio of means over prompts with a bootstrap interval, refused where the two are within two
    standard errors. Late parts recover much because their activations already hold what earlier parts of the sender computed.

    ``output="receiver"`` sets z, which then goes through the receiver's own W_O; ``output="sender"`` sets what a head adds to the
    stream in the sender, its z times its W_O. The bias b_O belongs to no head: it goes along only where all heads of a layer are
    set together with ``output="sender"``. Whatever is set, the receiver's own final norm and unembedding read the stream.

    Every cell is run, or every group. A group is set in one run, and beside it as many random heads of the same component,
    between the first and the last layer of the group's heads, at the same positions, none of them in the group;
    whatever else is in the group stays. Patched runs go on from one cached run of the receiver, some are also computed plainly, as
    in activation_patching.

    Args:
        pair: the two models.
        prompts: what both read; of clean and corrupt prompts the clean ones.
        component: which activation; cells are layer by head for ``z``, ``q``, ``k``, ``v`` and ``pattern`` (rows of attention
            weights), and layer by position for the others.
        direction: ``tuned_to_base`` sets activations of tuned in base, ``base_to_tuned`` the other way.
        output: whose W_O takes a head's z, ``receiver`` or ``sender``; it concerns z only.
        sites: what to set together instead of single cells, groups apart by semicolons: ``movers=L9H6,L9H9@END; mlps@END``. A
            group lists heads of the component (``L9H6``), sites (``L0.mlp_out``, ``L3.q`` for all heads), ``embed`` (the stream
            entering the first block), ``heads``, ``mlps``, or ``everything``, which is these three. A position holds for
            the entries before it that name none; without one, all positions are set.
        metric: what is judged; ``kl`` is measured from the sender.
        positions: for cells by position: named positions, or ``all`` for every token position. By default the names that are one
            token in every prompt; every token position if the prompts name only END and have one length.
        heads_at: for cells by head: ``all`` positions at once, or a named one.
        control: draws of random heads beside each group.
        seed: of the bootstrap, the random heads, and the runs that are checked.

    Raises:
        InputError: an unknown component, group, position or metric; sites that the models lack; ``output="sender"`` where no z is set.
    """
    _check_settings(pair, component, direction, output, sites, positions, heads_at, control)
    asked = clean_prompts(prompts)
    if not isinstance(asked, Prompts):
        raise InputError(f"cross_patching needs Prompts, not {type(prompts).__name__}")
    judge, batch, shape = Metric.parse(metric), pair.batch(asked), pair.shape
    sender, receiver = (getattr(pair, side) for side in _SIDES[direction])
    places = [] if sites is not None or component in HEADS else _places(batch, positions)
    if sites is not None:
        cells = groups_of(sites, component, shape)
        nobody = unread(batch, [site for group in cells.values() for site in group], [judge])
        drawn = {name: random_heads(group, shape, control, seed, name, nobody) for name, group in cells.items()}
    else:
        single = head_sites(component, shape, None if heads_at == "all" else heads_at) if component in HEADS else []
        single += [Site(component, layer, position=p) for layer in range(shape.n_layers) for p in places]
        cells, drawn = {str(site): (site,) for site in single}, {}
    touched = receiver.sites([site for group in cells.values() for site in group])
    if output == "sender" and not any(site.component == "z" for site in touched):
        raise InputError("output=sender is about z, which goes through W_O, and no z is set here; leave it at output=receiver")
    check(touched, batch, batch)
    runs = [written(group, shape, added=output == "sender") for group in (*cells.values(), *(g for draws in drawn.values() for g in draws))]
    reader = judge.reader(asked, _reference(sender, receiver, batch, judge))
    goal = run(sender, batch, reader)
    todo: list[Site | Patch] = [*runs]
    swept = sweep(receiver, batch, todo, (sender, batch), reader, seed=seed, desc=f"patches, {direction.replace('_', ' ')}")
    lone = [name for name, draws in drawn.items() if control and not draws]
    why = "it names no heads, heads of several kinds, or more than its layers have others"
    notes = [f"no random heads beside {name}: {why}" for name in lone]
    return CrossPatchingResult(
        patched=swept.values[: len(cells)],
        control=_control(swept.values[len(cells) :], [len(drawn.get(name, ())) for name in cells]),
        start=swept.baseline,
        goal=goal,
        floor=swept.floor,
        deviation=swept.deviation,
        checked=swept.checked,
        labels={"cell": tuple(cells)},
        sites=tuple(",".join(map(str, group)) for group in runs[: len(cells)]),
        layers=shape.n_layers if sites is None else 0,
        places=_place_names(pair, batch, places),
        by_token=any(isinstance(p, int) for p in places),
        component=component,
        heads_at=heads_at,
        direction=direction,
        output=output,
        metric=str(judge),
        unit=(judge.unit or str(judge)).replace("KL(clean", f"KL({_SIDES[direction][0]}"),
        draw_seed=seed,
        notes=(*swept.notes, *notes),
    )


def _check_settings(
    pair: ModelPair,
    component: str,
    direction: str,
    output: str,
    sites: object,
    positions: Sequence[str],
    heads_at: str,
    control: int,
) -> None:
    """Refuse settings that are unknown, or that would go unheard."""
    for value, name, known in ((component, "component", HEADS + STREAM), (direction, "direction", _SIDES), (output, "output", _OUTPUTS)):
        if value not in known:
            raise unknown(name, str(value), known)
    if type(control) is not int or control < 0:
        raise InputError(f"control is a number of draws, but it is {control!r}")
    if positions and (sites is not None or component in HEADS):
        way = "groups name their own, as in mlps@END" if sites is not None else f"{component} is set where heads_at says"
        raise InputError(f"positions={','.join(positions)} would not be used: {way}")
    if heads_at != "all" and (sites is not None or component in STREAM):
        way = "groups name their own positions, as in L9H6@END" if sites is not None else f"{component} is set where positions says"
        raise InputError(f"heads_at={heads_at} would not be used: {way}")
    if pair.one_at_a_time:
        raise InputError("cross_patching needs both models in memory; load the pair with load='together'")


def _reference(sender: HookedModel, receiver: HookedModel, batch: Batch, judge: Metric) -> Tensor | None:
    if not judge.needs_reference:
        return None
    if sender.shape.d_vocab != receiver.shape.d_vocab:
        sizes = f"{receiver.shape.d_vocab} and {sender.shape.d_vocab}"
        raise InputError(f"the metric {judge} compares whole vocabularies, and the two models have {sizes} entries; use logit_diff")
    return sender.logits(batch, at=judge.position).cpu()


def _places(batch: Batch, wanted: Sequence[str]) -> list[str | int]:
    """The positions of cells by position, from left to right."""
    lengths = batch.lengths.unique().tolist()
    single = [name for name in batch.positions if all(len(p) == 1 for p in batch.at(name))]
    if tuple(wanted) == ("all",) or (not wanted and single == ["END"] and len(lengths) == 1):
        if len(lengths) > 1:
            raise InputError(
                f"positions=all needs prompts of one length, but these have {lengths[0]} to {lengths[-1]} tokens; use named positions"
            )
        return list(range(lengths[0]))
    return sorted(dict.fromkeys(wanted or single), key=lambda name: (float(batch.index(name).double().mean()), name))


def _place_names(pair: ModelPair, batch: Batch, places: Sequence[str | int]) -> tuple[str, ...]:
    """The names, or for token positions the token where all prompts agree."""
    same = {p: batch.ids[:, p].unique().tolist() for p in places if isinstance(p, int)}
    return tuple(str(p) if p not in same else spelled(pair, same[p])[0] if len(same[p]) == 1 else f"({p})" for p in places)


def _control(values: Tensor, draws: Sequence[int]) -> Tensor:
    """[cell draw prompt], NaN where there are none."""
    n, at = max(draws, default=0), 0
    found = values.new_full((len(draws), n, values.shape[1]), torch.nan)
    for i, many in enumerate(draws):
        found[i, :many] = values[at : at + many]
        at += many
    return found


def _spread(draws: Tensor) -> str:
    """Mean and standard deviation over draws."""
    many = f" +- {float(draws.double().std()):.2g} ({len(draws)} draws)" if len(draws) > 1 else ""
    return f"{float(draws.double().mean()):.2g}{many}"
