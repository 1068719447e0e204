"""Through which components of their output do heads turn the attention of later heads?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp import plots
from interp.edits import ActivationChange, Edit
from interp.errors import InputError
from interp.models.composition import alive, component_scores, readers, spans
from interp.models.heads import folded_heads, upcast
from interp.models.steered import Channels, Look, Steered, Ways
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.roles import named
from interp.sites import Heads, Site
from interp.stats import Estimate, bootstrap, permutation, plus_minus, recovered, resample_counts, standard_error
from interp.sweeps.channels import Found, generator, half, heads_at, later, movers_of, place, random_directions, single, sweep

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel
    from interp.models.batch import Batch

_WAYS = ("all", "query")


@dataclass(frozen=True, eq=False)
class ChannelEffectsResult(Result):
    """The margin of attention of the movers, to ``to`` less to ``away``, in every run, and how well they read each component.

    Attributes:
        intact: the margin as it is.
        component: with one component of one sender deleted; NaN for those that were left out.
        whole: with everything that a sender writes there deleted.
        random: with a random direction of what a sender can write along deleted.
        joint: with the selected components deleted together; NaN where none was selected.
        joint_random: with as many random others of the same heads; NaN where they do not have as many.
        score: query composition of the component with the mover, from weights alone; NaN for components without strength.
        strength: singular values of the senders' OV.
        write: what components write along, unit vectors.
        selected: the components that were selected, on the prompts of ``dev``.
        dev: prompts that components were selected on; the others judge them.
        floor: largest difference of a margin by rounding.
        deviation: largest difference to whole runs where both were computed.
        checked: in how many runs.
        position: where senders write.
        query: where movers attend from.
        to: what they attend to.
        away: less what.
        draw_seed: of the bootstrap and of everything random.
        notes: what a reader should know.
        labels: of the axes; ``through``: ``all`` readers of what is deleted, or the movers' ``query`` alone.
    """

    intact: Float[Tensor, "mover prompt"]
    component: Float[Tensor, "through sender rank mover prompt"]
    whole: Float[Tensor, "through sender mover prompt"]
    random: Float[Tensor, "through sender draw mover prompt"]
    joint: Float[Tensor, "through mover prompt"]
    joint_random: Float[Tensor, "through draw mover prompt"]
    score: Float[Tensor, "sender rank mover"]
    strength: Float[Tensor, "sender rank"]
    write: Float[Tensor, "sender rank d_model"]
    selected: Bool[Tensor, "sender rank"]
    dev: Bool[Tensor, " prompt"]
    floor: Float[Tensor, " through"]
    deviation: Float[Tensor, " through"]
    checked: int
    position: str
    query: str
    to: str
    away: str
    draw_seed: int
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    def _through(self, name: str) -> int:
        if name not in self.labels["through"]:
            raise unknown("way", name, self.labels["through"])
        return self.labels["through"].index(name)

    def margin(self) -> Float[Tensor, " prompt"]:
        """The margin as it is, mean over the movers."""
        return self.intact.double().mean(0)

    def effect(self, through: str = "all") -> Float[Tensor, "sender rank prompt"]:
        """What deleting a component takes from the margin, intact - deleted, mean over the movers."""
        return (self.intact - self.component[self._through(through)]).double().mean(-2)

    def head_effect(self, through: str = "all") -> Float[Tensor, "sender prompt"]:
        """The same for all that a sender writes."""
        return (self.intact - self.whole[self._through(through)]).double().mean(-2)

    def random_effect(self, through: str = "all") -> Float[Tensor, "sender draw prompt"]:
        """The same for random directions that a sender can write along."""
        return (self.intact - self.random[self._through(through)]).double().mean(-2)

    def share(self, sender: int, through: str = "all") -> Estimate:
        """Effects of a sender's components as shares of that of all it writes, [rank]; refused where that is within two errors of 0."""
        whole = self.head_effect(through)[sender]
        return recovered(self.effect(through)[sender].T, torch.zeros_like(whole), whole, seed=self.draw_seed)

    def removed(self, through: str = "all") -> tuple[Estimate, Float[Tensor, " draw"]]:
        """Share of the margin that the selected components hold together on prompts they were not selected on; and random ones."""
        i, test = self._through(through), ~self.dev
        whole = self.margin()[test]
        joint = (self.intact - self.joint[i]).double().mean(0)[test]
        drawn = (self.intact - self.joint_random[i]).double().mean(1)[:, test]
        found = recovered(joint, torch.zeros_like(whole), whole, seed=self.draw_seed)
        return found, drawn.mean(-1) / whole.mean()

    def agreement(self, sender: int, through: str = "all") -> Estimate:
        """Spearman correlation of composition scores, mean over the movers, and sizes of mean effects over a sender's components.

        The interval resamples prompts.
        """
        score, effect = self.score[sender].double().mean(-1), self.effect(through)[sender]
        there = ~(score.isnan() | effect.isnan().any(-1))
        if int(there.sum()) < 3:
            nothing = torch.tensor(torch.nan, dtype=torch.float64)
            return Estimate(nothing, nothing, nothing, "fewer than three components have a score and an effect")
        mine, values = _ranks(score[there]), effect[there].T  # [prompt rank]
        value = _correlation(mine, _ranks(values.mean(0).abs()))
        if len(values) < 2:
            return Estimate(value, value * torch.nan, value * torch.nan)
        drawn = _correlation(mine, _ranks((resample_counts(len(values), self.draw_seed) @ values / len(values)).abs()))
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return Estimate(value, low, high)

    def names(self) -> list[str]:
        """The selected components."""
        return [self._name(s, r) for s, r in self.selected.nonzero().tolist()]

    def _name(self, sender: int, rank: int) -> str:
        return f"{self.labels['sender'][sender]}.{rank}"

    def edit(self, scale: float = 0.0) -> Edit:
        """The selected components multiplied by a factor, for all readers, where the senders were steered."""
        if not bool(self.selected.any()):
            raise InputError("no component was selected, so there is nothing to edit")
        changes = []
        for s, r in self.selected.nonzero().tolist():
            head = Site.parse(f"{self.labels['sender'][s]}.result@{self._positions()[s]}")
            changes.append(ActivationChange(head, "project", self.write[s, r], strength=1 - scale))
        return Edit(tuple(changes), f"{', '.join(self.names())} times {scale:g}")

    def _positions(self) -> list[str]:
        return self.position.split(",")

    def summary(self) -> str:
        """What the selected components hold of the margin, beside random ones, and whether the scores from weights foretell it."""
        margin, n = self.margin(), len(self.dev)
        tested, movers = int((~self.dev).sum()), self.labels["mover"]
        noise = f"n = {n} prompts, {tested} of them not selected on; rounding moves the margin by up to {float(self.floor.max()):.1g}"
        end = "; ".join([noise, *self.notes])
        attend = f"{', '.join(movers)} attend{'s' if len(movers) == 1 else ''}"
        start = f"{attend} to {self.to} more than to {self.away} by {plus_minus(margin)}"
        if not bool(self.selected.any()):
            return f"No component was selected as a channel: {start}; {self._told()} ({end})"
        found, drawn = self.removed()
        share = found.refused or f"{found.at()} of that margin"
        spread = f", as many random others of these heads {float(drawn.mean()):.2f}" if len(drawn) else ""
        if bool(drawn.isnan().any()):
            spread = ", without a control: these heads have not as many other components"
        query = self.removed("query")[0]
        where = " and ".join(dict.fromkeys(self._positions()))
        alone = "" if query.refused or not bool((self.joint[1] != self.intact).any()) else f" ({query.at()} through the query alone)"
        return f"Deleting {', '.join(self.names())} at {where} takes {share}{alone}{spread}: {start}; {self._told()} ({end})"

    def _told(self) -> str:
        """Of the senders that matter most their strongest components."""
        told = []
        effects, heads = self.effect(), self.head_effect()
        order = heads.mean(-1).abs().argsort(descending=True, stable=True).tolist()
        for s in order[:3]:
            best = int(effects[s].mean(-1).abs().nan_to_num(-1.0).argmax())
            place = int((self.score[s].mean(-1) > self.score[s, best].mean()).sum()) + 1
            about = f"{self._name(s, best)} {plus_minus(effects[s, best])} of {plus_minus(heads[s])}"
            told.append(f"{about} (place {place} by score; Spearman of all {self.agreement(s)})")
        return "; ".join(told)

    def _rows(self) -> Iterator[dict[str, Any]]:
        values = {name: self.effect(name) for name in self.labels["through"]}
        test = permutation(values["all"].flatten(0, 1).T.nan_to_num(0.0), seed=self.draw_seed)
        n = self.score.shape[1]
        for s, sender in enumerate(self.labels["sender"]):
            share, score = self.share(s), self.score[s].double().mean(-1)
            drawn = self.random_effect()[s].mean(-1)
            for r in range(n):
                one = values["all"][s, r]
                if bool(one.isnan().any()):
                    continue
                ends = bootstrap(one, seed=self.draw_seed)
                row: dict[str, Any] = {"channel": self._name(s, r), "sender": sender, "rank": r, "strength": float(self.strength[s, r])}
                row |= {"score": float(score[r]), "place": int((score > score[r]).sum()) + 1, "effect": float(one.mean())}
                row |= {"effect_se": float(standard_error(one)), "effect_low": float(ends.low), "effect_high": float(ends.high)}
                row |= {"recovered": float(share.value[r]), "low": float(share.low[r]), "high": float(share.high[r])}
                row |= {"p": float(test.p[s * n + r]), "p_adjusted": float(test.adjusted[s * n + r])}
                row |= {"through_query": float(values["query"][s, r].mean()), "head": float(self.head_effect()[s].mean())}
                yield row | {"random": float(drawn.abs().mean()) if len(drawn) else torch.nan, "selected": bool(self.selected[s, r])}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per component; ``per="prompt"`` every run.

        ``effect`` is what deleting it takes from the margin, ``recovered`` the share of what deleting all that its head writes takes,
        ``through_query`` the effect if the movers' queries alone read the change, ``random`` the mean size for random directions, ``place``
        that of the score among the head's components.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        return pd.DataFrame(self._per_prompt() if per else self._rows())

    def _per_prompt(self) -> Iterator[dict[str, Any]]:
        margin, effects = self.margin().tolist(), {t: self.effect(t) for t in self.labels["through"]}
        for through, values in effects.items():
            for s in range(len(values)):
                for r, row in enumerate(values[s].tolist()):
                    for prompt, value in enumerate(row):
                        yield {"through": through, "channel": self._name(s, r), "prompt": prompt, "intact": margin[prompt], "effect": value}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The components whose deletion changes the margin most."""
        columns = ["channel", "score", "place", "effect", "effect_se", "recovered", "low", "high", "p", "p_adjusted"]
        frame = self.to_frame().reindex(columns=[*columns, "through_query", "random", "selected"])
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True).head(n)

    def plot(self) -> go.Figure:
        """Effects of components beside their scores."""
        frame = self.to_frame()
        return plots.scatter(
            frame["score"].to_numpy(),
            frame["effect"].to_numpy(),
            labels=frame["channel"].tolist(),
            groups=frame["sender"].tolist(),
            title=f"Components of heads: score from weights and effect of deletion (n = {len(self.dev)})",
            xlabel=f"query composition with {', '.join(self.labels['mover'])}",
            ylabel=f"margin of attention lost ({self.to} - {self.away})",
        )

    def figures(self) -> dict[str, go.Figure]:
        """That figure, and what the selected components hold together."""
        found = {"components": self.plot()}
        if bool(self.selected.any()):
            found["together"] = self._together()
        return found

    def _together(self) -> go.Figure:
        test = ~self.dev
        names = ["intact", *(f"selected deleted, {t}" for t in self.labels["through"]), "random ones deleted"]
        rows = [self.intact.mean(0), *(x.mean(0) for x in self.joint), self.joint_random[0].mean((0, 1))]
        rows = [row for name, row in zip(names, rows, strict=True) if not bool(row.isnan().any())]
        found = [bootstrap(row[test], seed=self.draw_seed) for row in rows]
        values, ends = torch.stack([f.value for f in found]), (torch.stack([f.low for f in found]), torch.stack([f.high for f in found]))
        return plots.bars(
            names[: len(rows)],
            {"margin": values},
            intervals={"margin": ends},
            title=f"{', '.join(self.names())} deleted together (n = {int(test.sum())})",
            ylabel=f"attention to {self.to} - to {self.away}",
        )


@analysis(version=2)
def channel_effects(
    model: HookedModel,
    prompts: Prompts | PromptPairs,
    *,
    senders: Heads | str,
    movers: Heads | str,
    position: str = "END",
    query: str = "END",
    to: str = "IO",
    away: str = "S1",
    rank: int = 0,
    top: int = 4,
    share: float = 0.25,
    draws: int = 8,
    dev: float = 0.5,
    seed: int = 0,
) -> ChannelEffectsResult:
    """Through which components of their output do heads turn the attention of later heads?

    Talking Heads (Merullo et al. 2024, arXiv 2406.09519): what a head writes is taken apart by the SVD of its OV, and one component at a
    time is deleted at one token, ``z @ W_O`` losing its part along the component's direction. What that takes from the movers' margin of
    attention, ``to`` less ``away``, is set beside the composition score of the component with the movers' queries, which weights alone
    give. Deleted for all readers, and for the movers' queries alone: these are read at ``query``, so that of what is written at other
    tokens nothing passes through them. Controls are random directions of what the heads can write along, and for the selected
    components together as many random others of the same heads. Selected are components whose score is among the ``top`` of their head
    for some mover and whose effect is more than ``share`` of what deleting all that the head writes takes, on the prompts of some
    contexts; the others judge them. A head whose whole effect is within two standard errors of 0 has none.

    Args:
        model: the model.
        prompts: prompts; of pairs the clean ones.
        senders: heads that write, at ``position``: ``L8H10,L7H3``; or at positions of their own, with ``;`` between the groups:
            ``L8H10,L7H3@END; L6H2@S2``.
        movers: heads of later layers, whose attention is read.
        position: the token at which senders write.
        query: the token whose attention is read.
        to: tokens that are attended to; a position.
        away: tokens whose attention is taken off.
        rank: how many components of each head are deleted, strongest first; 0 is all.
        top: how many of a head's best scores count when components are selected.
        share: of the whole head's effect, likewise.
        draws: random directions of each head, and random sets of components.
        dev: share of the contexts that components are selected on.
        seed: of everything random.

    Raises:
        InputError: heads or positions that are not there, a mover that is not later than a sender, a rank beyond the heads'.
    """
    asked = _checked(prompts, rank, top, draws, share)
    query_ = place(query)
    batch, heads = model.batch(asked), heads_at(senders, model, position)
    readers_ = movers_of(movers, model, query_, "movers")
    later(heads, readers_)
    parts = _Parts(model, heads, readers_, batch, rank, draws, seed)
    keys = torch.stack([named(batch, place(name)) for name in (to, away)])
    for name, tokens in zip((to, away), keys, strict=True):
        if not bool(tokens.any(1).all()):
            raise InputError(f"prompt {int((~tokens.any(1)).nonzero()[0])} has no token {name}")
    everywhere = Steered(model, batch, parts.channels, Look(tuple(readers_), keys), query=query_)
    alone = Steered(model, batch, parts.channels, Look(tuple(readers_), keys), [Site("q", *head) for head in readers_], query_)
    both = (everywhere, alone)
    first = [sweep(s, parts.single(), seed=seed, desc=f"components, {name}") for s, name in zip(both, _WAYS, strict=True)]
    margins = [_margin(f) for f in first]
    chosen = half(asked.contexts, dev, seed)
    pieces = [parts.split(m) for m in margins]
    intact = pieces[0][0]
    selected = _selected(parts.score, (intact - pieces[0][2]).mean(2)[..., chosen], (intact - pieces[0][1]).mean(1)[:, chosen], top, share)
    joint = [_margin(sweep(s, parts.together(selected, draws, seed), seed=seed, desc="together")) for s in both]
    for m in joint if int(selected.sum()) > int(parts.others(selected).sum()) else ():
        m[1:] = torch.nan
    if not bool(selected.any()):
        joint = [torch.full_like(m, torch.nan) for m in joint]
    return ChannelEffectsResult(
        intact=intact,
        component=torch.stack([p[2] for p in pieces]),
        whole=torch.stack([p[1] for p in pieces]),
        random=torch.stack([p[3] for p in pieces]),
        joint=torch.stack([m[0] for m in joint]),
        joint_random=torch.stack([m[1:] for m in joint]),
        score=parts.score.float(),
        strength=parts.strength.float(),
        write=parts.write.float(),
        selected=selected,
        dev=chosen,
        floor=torch.tensor([2 * f.floor for f in first]),
        deviation=torch.tensor([2 * f.deviation for f in first]),
        checked=first[0].checked,
        position=",".join(str(h.position) for h in heads),
        query=str(query),
        to=to,
        away=away,
        draw_seed=seed,
        notes=(*parts.notes(), *parts.elsewhere(batch, query_), *upcast(model), *dict.fromkeys(f.note for f in first if f.note)),
        labels={
            "through": _WAYS,
            "sender": tuple(f"L{h.layer}H{h.head}" for h in heads),
            "mover": tuple(f"L{layer}H{head}" for layer, head in readers_),
        },
    )


def _checked(prompts: object, rank: int, top: int, draws: int, share: float) -> Prompts:
    if not isinstance(prompts, Prompts | PromptPairs):
        raise InputError(f"channel_effects needs Prompts or PromptPairs, not {type(prompts).__name__}")
    for name, value, least in (("rank", rank, 0), ("top", top, 1), ("draws", draws, 0)):
        if type(value) is not int or value < least:
            raise InputError(f"{name} is a whole number from {least} up, but it is {value!r}")
    if not share >= 0:
        raise InputError(f"share is a share of the whole head's effect, at least 0, but it is {share!r}")
    if len(prompts) < 4:
        raise InputError(f"channel_effects needs at least four prompts, two to choose and two to judge, got {len(prompts)}")
    return clean_prompts(prompts)


class _Parts:
    """The components of all senders and random directions beside them, as channels: sender by sender, components first."""

    def __init__(
        self, model: HookedModel, heads: Sequence[Site], movers: Sequence[tuple[int, int]], batch: Batch, rank: int, draws: int, seed: int
    ) -> None:
        found = {layer: folded_heads(model, layer).components("ov") for layer in {h.layer or 0 for h in heads}}
        self.write = torch.stack([found[h.layer or 0].Vh[h.head or 0] for h in heads])
        self.strength = torch.stack([found[h.layer or 0].S[h.head or 0] for h in heads])
        self.heads, self.all, self.draws = heads, self.write.shape[1], draws
        if rank > self.all:
            raise InputError(f"heads of {model.name} have {self.all} components, and rank={rank} are asked for")
        self.many = rank or self.all
        read = torch.cat([readers(folded_heads(model, layer), "q")[head : head + 1] for layer, head in movers])
        self.score = component_scores(self.write, read)
        self.alive = alive(self.strength, model.shape.d_model)
        self.score[~self.alive] = torch.nan
        if not bool(self.alive.any(1).all()):
            head = heads[int((~self.alive.any(1)).nonzero()[0])]
            raise InputError(f"L{head.layer}H{head.head} has no strength: all weights of its OV are zero, so that it sends nothing")
        directions = torch.cat([torch.cat([basis, *self._drawn(s, seed)]) for s, basis in enumerate(self.write)])
        each = self.all + draws
        self.places = torch.stack([single(batch, h.position if h.position is not None else "END", str(h)) for h in heads])
        where = self.places.repeat_interleave(each, 0)
        self.channels = Channels(tuple((h.layer or 0, h.head or 0) for h in heads for _ in range(each)), directions, where)

    def _drawn(self, sender: int, seed: int) -> list[Tensor]:
        """Random directions that a sender can write along."""
        draws = [generator("channel_effects", seed, str(self.heads[sender]), d) for d in range(self.draws)]
        return [random_directions(self.write[sender], 1, draw) for draw in draws]

    def single(self) -> Ways:
        """Nothing is deleted; of each sender everything; then one component after the other; then random directions."""
        s, n = len(self.heads), self.all
        blocks = torch.eye(s, dtype=torch.bool)
        gone = torch.zeros(1 + s + s * (self.many + self.draws), s, n + self.draws, dtype=torch.bool)
        gone[1 : 1 + s, :, :n] = blocks[:, :, None]
        columns = [*range(self.many), *range(n, n + self.draws)]
        order = [(i, c) for i in range(s) for c in columns]
        for row, (i, c) in enumerate(order, start=1 + s):
            gone[row, i, c] = True
        return Ways.without(gone.flatten(1))

    def split(self, margins: Float[Tensor, "way mover prompt"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What ``single`` asked for: intact, whole heads, components (NaN for those left out), random directions."""
        s = len(self.heads)
        rest = margins[1 + s :].unflatten(0, (s, self.many + self.draws))
        components = rest.new_full((s, self.all, *rest.shape[2:]), torch.nan)
        components[:, : self.many] = rest[:, : self.many]
        return margins[0], margins[1 : 1 + s], components, rest[:, self.many :]

    def together(self, selected: Bool[Tensor, "sender rank"], draws: int, seed: int) -> Ways:
        """The selected components, then as many others of their heads at random; as many as there are."""
        gone = torch.zeros(1 + draws, len(self.heads), self.all + self.draws, dtype=torch.bool)
        gone[0, :, : self.all] = selected
        others = self.others(selected).nonzero()
        for d in range(draws):
            order = torch.randperm(len(others), generator=generator("together", seed, *map(str, self.heads), d))
            drawn = others[order[: int(selected.sum())]]
            gone[1 + d, drawn[:, 0], drawn[:, 1]] = True
        return Ways.without(gone.flatten(1))

    def others(self, selected: Bool[Tensor, "sender rank"]) -> Bool[Tensor, "sender rank"]:
        """What random components are drawn from: those with strength of heads with selected ones."""
        return ~selected & selected.any(1, keepdim=True) & self.alive

    def elsewhere(self, batch: Batch, query: str | int) -> tuple[str, ...]:
        """Senders that no query can read."""
        away = (self.places != batch.index(query).cpu()).all(1).tolist()
        names = [f"L{h.layer}H{h.head}" for h, far in zip(self.heads, away, strict=True) if far]
        why = f"write{'s' * (len(names) == 1)} at other tokens than {query}, where queries are read, so that nothing passes through these"
        return (f"{', '.join(names)} {why}",) if names else ()

    def notes(self) -> tuple[str, ...]:
        """Components that are not single directions."""
        first = spans(self.strength)
        shared = [f"{h.at(None)}".removesuffix(".z") for h, row in zip(self.heads, first, strict=True) if len(row.unique()) < len(row)]
        dead = int((~self.alive).sum())
        return (
            *([f"nearly equal singular values in {', '.join(shared)}: single directions among those are not identified"] if shared else []),
            *([f"{dead} components have no strength and no score"] if dead else []),
        )


def _margin(found: Found) -> Float[Tensor, "way mover prompt"]:
    return (found.paid[..., 0] - found.paid[..., 1]).movedim(1, -1)


def _selected(
    score: Float[Tensor, "sender rank mover"],
    effect: Float[Tensor, "sender rank prompt"],
    whole: Float[Tensor, "sender prompt"],
    top: int,
    share: float,
) -> Bool[Tensor, "sender rank"]:
    """Good scores and large effects; none of heads without an effect that can be told."""
    place = score.nan_to_num(-1.0).argsort(1, descending=True).argsort(1)
    good = ((place < top) & ~score.isnan()).any(-1)
    mean = whole.double().mean(-1)
    told = mean.abs() > 2 * standard_error(whole.T)
    size = effect.double().mean(-1).abs().nan_to_num(0.0)
    return good & (size > share * mean.abs()[:, None]) & told[:, None]


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(-1).argsort(-1).double()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
