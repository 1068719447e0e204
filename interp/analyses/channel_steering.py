"""Where in a list do heads look when a few coefficients are set, and is there a point at which the answer is right?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.models.channels import coefficients, doubts, named
from interp.models.heads import check_component, folded_heads
from interp.models.steered import Channels, Look, Steered, Ways
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.roles import named as tokens_of
from interp.sites import Heads, Site
from interp.stats import bootstrap, mcnemar, paired_change, wilson
from interp.sweeps.answers import margin
from interp.sweeps.channels import Found, generator, half, later, movers_of, place, random_directions, single, sweep

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel

_ITEM = re.compile(r"item(\d+)")
Choice = tuple[Tensor, Tensor]
"""Of prompts that were not chosen on: right as it is, and right when steered."""


@dataclass(frozen=True, eq=False)
class ChannelSteeringResult(Result):
    """What the movers attend to and what the model answers in every way of steering, for the channels and for random directions.

    Attributes:
        attention: of the movers to each slot, mean over them, when coefficients are set to a point of the grid.
        margin: logit(answer) less the largest other option there.
        top: whether the answer is the most likely of all tokens there, 0 or 1.
        scaled_margin: the margin when coefficients are multiplied by factors.
        scaled_top: likewise.
        plain_attention: of the model as it is.
        plain_margin: likewise.
        plain_top: likewise.
        grid: the coefficients set at each point; of random directions about their own means, in the same steps.
        factors: what coefficients are multiplied by in each way.
        observed: coefficients of the model as it is.
        slot: which slot holds the answer, from 0; -1 where none does.
        dev: prompts that points are chosen on; all others judge them.
        floor: largest difference of attention by rounding.
        deviation: largest difference to whole runs where both were computed.
        checked: in how many runs.
        movers: whose attention.
        query: from where.
        receivers: who reads the change; "" is everybody.
        draw_seed: of the bootstrap and of everything random.
        notes: what a reader should know.
        labels: of the axes; ``direction``: the ``channels``, then random ones.
    """

    attention: Float[Tensor, "direction point slot prompt"]
    margin: Float[Tensor, "direction point prompt"]
    top: Float[Tensor, "direction point prompt"]
    scaled_margin: Float[Tensor, "direction way prompt"]
    scaled_top: Float[Tensor, "direction way prompt"]
    plain_attention: Float[Tensor, "slot prompt"]
    plain_margin: Float[Tensor, " prompt"]
    plain_top: Float[Tensor, " prompt"]
    grid: Float[Tensor, "direction point channel"]
    factors: Float[Tensor, "way channel"]
    observed: Float[Tensor, "direction prompt channel"]
    slot: Int[Tensor, " prompt"]
    dev: Bool[Tensor, " prompt"]
    floor: float
    deviation: float
    checked: int
    movers: str
    query: str
    receivers: str
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    def right(self, direction: int = 0) -> Bool[Tensor, "point prompt"]:
        """Whether the answer beats all other options at each point."""
        return self.margin[direction] > 0

    def slot_map(self, direction: int = 0) -> Int[Tensor, " point"]:
        """The slot that gets the most attention at each point, mean over prompts."""
        return self.attention[direction].double().mean(-1).argmax(-1)

    def reachable(self, direction: int = 0) -> int:
        """How many slots get the most attention at some point, mean over prompts."""
        return len(self.slot_map(direction).unique())

    def reachable_by_prompt(self, direction: int = 0) -> Float[Tensor, " prompt"]:
        """The same prompt by prompt."""
        best = self.attention[direction].argmax(1)  # [point prompt]
        return torch.stack([(best == s).any(0) for s in range(self.attention.shape[2])]).double().sum(0)

    def best_point(self, direction: int = 0, slot: int | None = None) -> int:
        """The point at which most answers are right on the prompts of ``dev``, or those of them with a slot; then the largest margin."""
        some = self.dev if slot is None else self.dev & (self.slot == slot)
        return _best(self.margin[direction][:, some])

    def targeted(self, direction: int = 0) -> Choice:
        """At the point chosen for the slot of each prompt's answer, which says where the answer is: an upper bound."""
        chosen = torch.full((len(self.slot),), -1)
        for s in range(len(self.labels["slot"])):
            if bool((self.dev & (self.slot == s)).any()):
                chosen[self.slot == s] = self.best_point(direction, s)
        test = ~self.dev & (chosen >= 0)
        return self.plain_margin[test] > 0, self.margin[direction][chosen[test], test.nonzero().flatten()] > 0

    def overall(self, direction: int = 0) -> Choice:
        """At the one point chosen for all prompts."""
        test = ~self.dev
        return self.plain_margin[test] > 0, self.margin[direction][self.best_point(direction)][test] > 0

    def best_factors(self, direction: int = 0) -> int:
        """The factors with which most answers are right on the prompts of ``dev``."""
        return _best(self.scaled_margin[direction][:, self.dev])

    def scaling(self, direction: int = 0) -> Choice:
        """With the factors chosen for all prompts."""
        test = ~self.dev
        return self.plain_margin[test] > 0, self.scaled_margin[direction][self.best_factors(direction)][test] > 0

    def _choices(self) -> dict[str, list[Choice]]:
        every = range(len(self.labels["direction"]))
        kinds = {"targeted": self.targeted, "overall": self.overall, "scaled": self.scaling}
        return {name: [find(d) for d in every] for name, find in kinds.items()}

    def summary(self) -> str:
        """How many slots can be reached, and what steering does to the accuracy on prompts that nothing was chosen on."""
        slots, told = len(self.labels["slot"]), []
        random = [self.reachable(d) for d in range(1, len(self.labels["direction"]))]
        beside = f", random directions {min(random)} to {max(random)}" if random else ""
        each = bootstrap(self.reachable_by_prompt(), seed=self.draw_seed).at()
        for name, found in self._choices().items():
            told.append(_told(name, found))
        n, tested = len(self.dev), int((~self.dev).sum())
        noise = f"n = {n} prompts, {tested} of them judged on; rounding moves attention by up to {self.floor:.1g}"
        who = f" for {self.receivers}" if self.receivers else ""
        start = f"{self.reachable()} of {slots} slots get the most attention of {self.movers} at some of {self.grid.shape[1]} points of"
        names = ", ".join(self.labels["channel"])
        return f"{start} {names}{who}{beside} ({each} in each prompt): {'; '.join(told)} ({'; '.join([noise, *self.notes])})"

    def accuracies(self) -> pd.DataFrame:
        """What every choice does on the prompts that it was not made on, for the channels and for random directions.

        ``change`` has the interval of Agresti and Min, ``p`` is McNemar's exact test.
        """
        import pandas as pd

        rows = []
        for name, found in self._choices().items():
            for direction, (plain, steered) in zip(self.labels["direction"], found, strict=True):
                n = len(plain)
                if not n:
                    continue
                up, down = int((steered & ~plain).sum()), int((plain & ~steered).sum())
                ends = paired_change(up, down, n)
                spread = wilson(int(steered.sum()), n)
                row: dict[str, Any] = {"choice": name, "direction": direction, "n": n, "plain": float(plain.double().mean())}
                row |= {"accuracy": float(steered.double().mean()), "low": spread[0], "high": spread[1], "change": (up - down) / n}
                rows.append(row | {"change_low": ends[0], "change_high": ends[1], "p": mcnemar(up, down)})
        return pd.DataFrame(rows)

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The accuracies of ``accuracies``."""
        return self.accuracies().head(n)

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per direction and point: coefficients, the slot that is looked at most, accuracies; ``per="prompt"`` every run.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        return pd.DataFrame(self._per_prompt() if per else self._rows())

    def _start(self, d: int, point: int) -> dict[str, Any]:
        coordinates = zip(self.labels["channel"], self.grid[d, point].tolist(), strict=True)
        return {"direction": self.labels["direction"][d], "point": point, **dict(coordinates)}

    def _rows(self) -> Iterator[dict[str, Any]]:
        for d in range(len(self.labels["direction"])):
            slots, right = self.slot_map(d).tolist(), self.right(d)
            for point, slot in enumerate(slots):
                hits = right[point]
                ends = wilson(int(hits.sum()), len(hits))
                paid = dict(zip(self.labels["slot"], self.attention[d, point].double().mean(-1).tolist(), strict=True))
                row = {**self._start(d, point), "slot": self.labels["slot"][slot], "accuracy": float(hits.double().mean())}
                yield row | {"low": ends[0], "high": ends[1], "top": float(self.top[d, point].double().mean()), **paid}

    def _per_prompt(self) -> Iterator[dict[str, Any]]:
        for d in range(len(self.labels["direction"])):
            for point in range(self.grid.shape[1]):
                best = self.attention[d, point].argmax(0).tolist()
                for prompt, slot in enumerate(best):
                    values = {"margin": float(self.margin[d, point, prompt]), "top": float(self.top[d, point, prompt])}
                    yield {**self._start(d, point), "prompt": prompt, "slot": self.labels["slot"][slot], **values}

    def plot(self) -> go.Figure:
        """The slot that gets the most attention over the grid; of three channels with the third at its middle.

        Of an even number of points that is the upper one of the two.
        """
        return self._map(0, self.slot_map().double() + 1, "slot with most attention", len(self.labels["slot"]))

    def figures(self) -> dict[str, go.Figure]:
        """Slot map, accuracy over the grid, and what the choices do."""
        found = {"slots": self.plot(), "accuracy": self._map(0, self.right().double().mean(-1), "accuracy among options", 1)}
        return found | {"choices": self._bars()}

    def _map(self, d: int, values: Tensor, what: str, top: int) -> go.Figure:
        channels, points = len(self.labels["channel"]), self.grid[d]
        axes = [points[:, k].unique() for k in range(channels)]
        title = f"Steering: {what} (n = {len(self.dev)})"
        if channels == 1:
            return plots.lines({what: values}, axes[0], title=title, xlabel=f"coefficient of {self.labels['channel'][0]}", ylabel=what)
        shaped = values.reshape([len(a) for a in axes])
        middle = "" if channels == 2 else f", {self.labels['channel'][2]} at {float(axes[2][len(axes[2]) // 2]):.2f}"
        shaped = shaped if channels == 2 else shaped[:, :, len(axes[2]) // 2]
        named = [[f"{float(x):.2f}" for x in a] for a in axes[:2]]
        return plots.heatmap(
            shaped,
            x=named[1],
            y=named[0],
            title=title + middle,
            xlabel=f"coefficient of {self.labels['channel'][1]}",
            ylabel=f"coefficient of {self.labels['channel'][0]}",
            unit=what,
            limits=(float(top > 1), float(top)),
            difference=False,
            height=440,
        )

    def _bars(self) -> go.Figure:
        frame = self.accuracies()
        kinds = list(dict.fromkeys(frame["choice"]))
        series, ends = {}, {}
        for direction in self.labels["direction"][:2]:
            some = frame[frame["direction"] == direction]
            series[direction] = some["accuracy"].tolist()
            ends[direction] = (some["low"].tolist(), some["high"].tolist())
        return plots.bars(
            kinds,
            series,
            intervals=ends,
            title=f"Accuracy on prompts that nothing was chosen on (n = {int((~self.dev).sum())})",
            ylabel="accuracy among the options",
            reference=float((self.plain_margin[~self.dev] > 0).double().mean()),
            reference_label="as it is",
        )


@analysis(version=1)
def channel_steering(
    model: HookedModel,
    prompts: Prompts | PromptPairs,
    *,
    channels: str,
    mover: Heads | str,
    grid: int = 7,
    span: float = 3.0,
    position: str = "END",
    query: str = "END",
    receivers: str = "",
    slots: tuple[str, ...] = (),
    factors: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0),
    draws: int = 2,
    dev: float = 0.5,
    seed: int = 0,
) -> ChannelSteeringResult:
    """Where in a list do heads look when a few coefficients are set, and is there a point at which the answer is right?

    Talking Heads (Merullo et al. 2024, arXiv 2406.09519): the coefficients of one to three components are set at one token to every point
    of a grid around what they are in the prompts, and it is read which slot of the list the movers look at and whether the answer beats
    the other options. How many slots can be reached at all says how crowded the subspace is. On the prompts of some contexts the best
    point is chosen for each slot of the answer (which needs to know the answer's place: an upper bound) and one for all, and one factor
    per coefficient instead of a value; the other prompts judge them. The control sets as many random directions, which the same heads can
    write along, to coefficients in the same steps about their own means.

    Args:
        model: the model.
        prompts: lists of one length with options; of pairs the clean ones.
        channels: one to three components, ``L8H10.1, L7H3.0``, at positions of their own or at ``position``.
        mover: heads whose attention is read, of layers later than some channel's.
        grid: points per channel.
        span: how far the grid reaches, in standard deviations of the observed coefficient.
        position: the token at which channels are set.
        query: the token whose attention and logits are read.
        receivers: ``L9H6.q``: who alone reads the change; "" is everybody.
        slots: positions of the list's items; by default ``item1``, ``item2``, ...
        factors: what coefficients are multiplied by, in all combinations.
        draws: sets of random directions.
        dev: share of the contexts to choose on.
        seed: of everything random.

    Raises:
        InputError: no component or head of that name, more than three channels, prompts without options or without one slot per item,
            a mover that is not later than a channel.
    """
    asked, at = _checked(prompts, grid, span, draws, factors), place(query)
    batch, sites = model.batch(asked), named(model, channels, place(position))
    if len(sites) > 3:
        raise InputError(f"one to three channels are steered at a time, but {len(sites)} are named")
    movers = movers_of(mover, model, at, "mover")
    _reached(sites, movers)
    read = model.sites([r.strip() for r in receivers.split(",")]) if receivers else []
    if receivers:
        later(sites, [(r.layer or 0, r.head or 0) for r in read])
    names = slots or _slots(batch)
    look = Look(tuple(movers), torch.stack([_slot(batch, name, at) for name in names]))
    sets = _directions(model, sites, draws, seed)
    where = torch.stack([single(batch, s.position if s.position is not None else "END", str(s)) for s in sites])
    _refuse_twice(sites, where)
    judge, heads = _judge(asked), tuple((s.layer or 0, s.head or 0) for s in sites)
    steps = torch.tensor(list(itertools.product(*[torch.linspace(-span, span, grid).tolist()] * len(sites))), dtype=torch.float64)
    times = torch.tensor(list(itertools.product(*[factors] * len(sites))), dtype=torch.float64)
    found, points, seen = list[Found](), list[Tensor](), list[Tensor]()
    for d, directions in enumerate(sets):
        seen.append(coefficients(model, batch, sites, directions))
        points.append(seen[-1].mean(0) + steps * seen[0].std(0))  # of random directions in steps as long as the channels' own
        steered = Steered(model, batch, Channels(heads, directions, where), look, read, at)
        found.append(sweep(steered, _ways(points[-1], times), judge, seed=seed, desc=f"steering, {_named(d)}"))
    flat = [str(s) for s, wide in zip(sites, seen[0].std(0).tolist(), strict=True) if wide == 0]
    n = len(steps)
    paid, told = torch.stack([f.paid.mean(2).movedim(1, -1) for f in found]), torch.stack([f.told for f in found if f.told is not None])
    return ChannelSteeringResult(
        attention=paid[:, 1 : 1 + n],
        margin=told[:, 1 : 1 + n, :, 0],
        top=told[:, 1 : 1 + n, :, 1],
        scaled_margin=told[:, 1 + n :, :, 0],
        scaled_top=told[:, 1 + n :, :, 1],
        plain_attention=paid[0, 0],
        plain_margin=told[0, 0, :, 0],
        plain_top=told[0, 0, :, 1],
        grid=torch.stack(points),
        factors=times,
        observed=torch.stack(seen),
        slot=_answers(asked, batch, names),
        dev=half(asked.contexts, dev, seed),
        floor=max(f.floor for f in found),
        deviation=max(f.deviation for f in found),
        checked=sum(f.checked for f in found),
        movers=", ".join(f"L{layer}H{head}" for layer, head in movers),
        query=str(query),
        receivers=receivers,
        draw_seed=seed,
        notes=(
            *doubts(model, sites),
            *dict.fromkeys(f.note for f in found if f.note),
            *([f"the coefficient of {', '.join(flat)} is the same in all prompts"] if flat else []),
        ),
        labels={
            "direction": tuple(map(_named, range(len(sets)))),
            "slot": tuple(names),
            "channel": tuple(map(str, sites)),
        },
    )


def _checked(prompts: object, grid: int, span: float, draws: int, factors: Sequence[float]) -> Prompts:
    if not isinstance(prompts, Prompts | PromptPairs):
        raise InputError(f"channel_steering needs Prompts or PromptPairs, not {type(prompts).__name__}")
    for name, value, least in (("grid", grid, 2), ("draws", draws, 0)):
        if type(value) is not int or value < least:
            raise InputError(f"{name} is a whole number from {least} up, but it is {value!r}")
    if not span > 0:
        raise InputError(f"span is a number of standard deviations above 0, but it is {span!r}")
    if not factors:
        raise InputError("factors needs at least one number, such as 0, 1, 4")
    if len(prompts) < 4:
        raise InputError(f"channel_steering needs at least four prompts, two to choose and two to judge, got {len(prompts)}")
    return clean_prompts(prompts)


def _reached(sites: Sequence[Site], movers: Sequence[tuple[int, int]]) -> None:
    """Refuse movers that no channel can reach."""
    first = min(s.layer or 0 for s in sites)
    for layer, head in movers:
        if layer <= first:
            raise InputError(f"L{layer}H{head} is not later than {sites[0]}: a head reads what heads of earlier layers have written")


def _refuse_twice(sites: Sequence[Site], where: Int[Tensor, "channel prompt"]) -> None:
    """Refuse one component at two positions that are one token."""
    for i, site in enumerate(sites):
        for j, other in enumerate(sites[:i]):
            if site.at(None) == other.at(None) and bool((same := where[i] == where[j]).any()):
                raise InputError(f"{other} and {site} are the same token in prompt {int(same.nonzero()[0])}; a channel is set once")


def _slots(batch: Batch) -> tuple[str, ...]:
    """The items of the list, in order."""
    found = sorted((int(m[1]), name) for name in batch.positions if (m := _ITEM.fullmatch(name)))
    if len(found) < 2:
        raise InputError(f"these prompts name no item1, item2, ...; say slots=... which of {', '.join(batch.positions)} the list is")
    return tuple(name for _, name in found)


def _slot(batch: Batch, name: str, query: str | int) -> Bool[Tensor, "prompt pos"]:
    tokens = tokens_of(batch, place(name))
    if not bool(tokens.any(1).all()):
        row = int((~tokens.any(1)).nonzero()[0])
        raise InputError(f"prompt {row} has no {name}: lists of one length are steered at a time")
    end = batch.index(query)
    if bool((tokens.long() * torch.arange(tokens.shape[1])).amax(1).gt(end).any()):
        raise InputError(f"{name} comes after {query} in some prompt, which cannot attend to it")
    return tokens


def _answers(prompts: Prompts, batch: Batch, names: Sequence[str]) -> Int[Tensor, " prompt"]:
    """The slot whose token is the answer."""
    assert prompts.answers is not None
    found = torch.full((len(prompts),), -1)
    for s, name in enumerate(names):
        for row, tokens in enumerate(batch.at(place(name))):
            if prompts.answers[row] in [int(batch.ids[row, t]) for t in tokens]:
                found[row] = s
    return found


def _directions(model: HookedModel, sites: Sequence[Site], draws: int, seed: int) -> list[Float[Tensor, "channel d_model"]]:
    """The channels', then random ones that the same heads can write along, orthonormal within a head."""
    bases = {s.layer: folded_heads(model, s.layer or 0).components("ov") for s in sites}
    found = []
    for site in sites:
        check_component(model, site, bases[site.layer].S[site.head or 0])
    found.append(torch.stack([bases[s.layer].Vh[s.head or 0, s.rank or 0] for s in sites]))
    for d in range(draws):
        mine: dict[tuple[int | None, int | None], list[Tensor]] = {}
        for s in sites:
            key = (s.layer, s.head)
            if key not in mine:
                many = sum((o.layer, o.head) == key for o in sites)
                mine[key] = list(random_directions(bases[s.layer].Vh[s.head or 0], many, generator("channel_steering", seed, *key, d)))
        found.append(torch.stack([mine[s.layer, s.head].pop() for s in sites]))
    return found


def _named(direction: int) -> str:
    return f"random {direction}" if direction else "channels"


def _ways(points: Tensor, times: Tensor) -> Ways:
    """Nothing; the coefficients set to each point; multiplied by each combination of factors."""
    nothing, k = torch.ones(1, points.shape[1], dtype=torch.float64), torch.zeros_like(points)
    gain = torch.cat([nothing, k, times])
    return Ways(gain, torch.cat([torch.zeros_like(nothing), points, torch.zeros_like(times)]))


def _judge(prompts: Prompts) -> Any:
    """The margin of the answer among the options, and whether it is the most likely of all tokens."""
    among, every = margin(prompts, "options"), margin(prompts, "vocabulary")

    def told(logits: Tensor, rows: Tensor) -> Tensor:
        which = rows.cpu()
        values = [reader[which](logits).cpu() for reader in (among, every)]
        return torch.stack([values[0], (values[1] > 0).to(values[0])], dim=1)

    return told


def _best(margins: Float[Tensor, "way prompt"]) -> int:
    """Most answers right; then the largest mean margin, then the first."""
    right, size = (margins > 0).double().mean(-1), margins.double().mean(-1)
    return max(range(len(margins)), key=lambda i: (float(right[i]), float(size[i]), -i))


def _told(name: str, found: Sequence[Choice]) -> str:
    """One choice beside the same with random directions."""
    plain, steered = found[0]
    if not len(plain):
        return f"nothing to judge {name} steering on"
    up, down, n = int((steered & ~plain).sum()), int((plain & ~steered).sum()), len(plain)
    low, high = paired_change(up, down, n)
    random = [float(s.double().mean()) for _, s in found[1:] if len(s)]
    beside = f", random {min(random):.2f} to {max(random):.2f}" if random else ""
    main = f"{name} {float(plain.double().mean()):.2f} to {float(steered.double().mean()):.2f}"
    return f"{main} ({(up - down) / n:+.2f} [{low:.2f}, {high:.2f}]{beside})"
