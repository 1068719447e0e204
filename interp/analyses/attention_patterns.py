"""Where does each head look, and what did fine-tuning change there?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.names import unknown
from interp.plots.attention import AttentionPanel, attention_grid, attention_view
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.result_files import content_digest
from interp.results import Result, analysis
from interp.sites import Heads
from interp.spelling import spelled
from interp.stats import bootstrap, permutation, standard_error
from interp.sweeps.attention import ELSEWHERE, MEASURES, attended, even, kept_tokens, places, rounding, whole
from interp.sweeps.staged import by_context, grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

_FROM_END = "from END to "
_VIEW_HEADS, _VIEW_PROMPTS = 3, 2
_ROWS = 24  # heads in a figure that has a row for each


@dataclass(frozen=True, eq=False)
class AttentionPatternsResult(Result):
    """What every head attends to, per prompt.

    Means are over the tokens that look, from the second on: the first has only itself. So NaN for prompts of one token. Prompts of one
    context are no independent draws, so statistics are of means per context.

    Attributes:
        attention: mean attention to the first token, to itself and to the token before, and mean entropy in nats.
        distance: total variation between the rows of attention in base and in tuned, mean over rows: 0 the same, 1 nothing in common.
            None for one model.
        looks: attention from END to the tokens of each named position; NaN where a prompt has none. None where nothing but END is named.
        even: what attention that is the same to all tokens seen would give.
        looks_even: likewise from END.
        floor: largest change of ``attention`` by rounding: prompts alone and in a batch, and half precision against float32.
        distance_floor: likewise, the total variation of a model against itself.
        looks_floor: likewise, of ``looks``.
        cell_floor: likewise, the largest change of any one number in a pattern.
        half: a model computes in half precision and no float32 copy of it could be compared, so the floors lack that part.
        lengths: tokens of each prompt.
        group: context of each prompt, as they first come.
        patterns: number of a shown prompt -> whole patterns, [side head query key], among its kept tokens.
        kept: number of a shown prompt -> which of its tokens: all, or the first and the last ones.
        words: number of a shown prompt -> the kept tokens.
        draw_seed: of bootstrap and permutations.
        labels: of ``side``, ``measure``, ``head`` and ``place``.
    """

    attention: Float[Tensor, "side measure head prompt"]
    distance: Float[Tensor, "head prompt"] | None
    looks: Float[Tensor, "side place head prompt"] | None
    even: Float[Tensor, "measure prompt"]
    looks_even: Float[Tensor, "place prompt"] | None
    floor: Float[Tensor, "side measure head"]
    distance_floor: Float[Tensor, "side head"]
    looks_floor: Float[Tensor, "side place head"] | None
    cell_floor: Float[Tensor, "side head"]
    half: bool
    lengths: Int[Tensor, " prompt"]
    group: Int[Tensor, " prompt"]
    patterns: dict[str, Tensor]
    kept: dict[str, tuple[int, ...]]
    words: dict[str, tuple[str, ...]]
    draw_seed: int
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads, such as ``L2H3``."""
        return self.labels["head"]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is measured of a head: ``MEASURES``, and attention from END to every named position."""
        return (*MEASURES, *(_FROM_END + place for place in self.labels.get("place", ())))

    @property
    def numerical_floor(self) -> float:
        """Mean total variation of a row that rounding alone produces, in the head where it is largest."""
        return float(self.distance_floor.max())

    def values(self, kind: str, side: str | None = None) -> Float[Tensor, "head prompt"]:
        """One kind of measurement in one model.

        Args:
            kind: one of ``kinds``.
            side: which model; by default the tuned or only one.

        Raises:
            InputError: no such kind or model.
        """
        if kind not in self.kinds:
            raise unknown("kind of attention", kind, self.kinds)
        if side is not None and side not in self.sides:
            raise InputError(f"there is no model {side!r} in this result; it has {', '.join(self.sides)}")
        i = self.sides.index(side) if side else len(self.sides) - 1
        if kind in MEASURES:
            return self.attention[i, MEASURES.index(kind)]
        assert self.looks is not None
        return self.looks[i, self.labels["place"].index(kind.removeprefix(_FROM_END))]

    def change(self, kind: str) -> Float[Tensor, "head prompt"]:
        """Tuned minus base.

        Raises:
            InputError: no such kind, or only one model.
        """
        self._pair()
        return self.values(kind, "tuned") - self.values(kind, "base")

    def _pair(self) -> Float[Tensor, "head prompt"]:
        if self.distance is None:
            raise InputError("one model has no change of attention; give a pair")
        return self.distance

    def independent(self, values: Float[Tensor, "... prompt"]) -> Float[Tensor, "context ..."]:
        """Means per context over the prompts that have a value: what statistics are of."""
        there = ~values.isnan().reshape(-1, values.shape[-1]).any(0)
        group = self.group[there].unique(return_inverse=True)[1]
        return by_context(values[..., there].movedim(-1, 0).double(), group)

    def _floor(self, kind: str) -> Float[Tensor, " head"]:
        if kind in MEASURES:
            return self.floor[:, MEASURES.index(kind)].amax(0)
        assert self.looks_floor is not None
        return self.looks_floor[:, self.labels["place"].index(kind.removeprefix(_FROM_END))].amax(0)

    def _even(self, kind: str) -> float:
        if kind in MEASURES:
            return float(self.independent(self.even[MEASURES.index(kind)]).mean())
        assert self.looks_even is not None
        return float(self.independent(self.looks_even[self.labels["place"].index(kind.removeprefix(_FROM_END))]).mean())

    @property
    def moved(self) -> Float[Tensor, " head"]:
        """Mean total variation of every head.

        Raises:
            InputError: there is only one model.
        """
        return self.independent(self._pair()).mean(0)

    @property
    def differs(self) -> bool:
        """Whether any head looks elsewhere than before by more than rounding."""
        return bool((self.moved > self.numerical_floor).any())

    @property
    def order(self) -> list[int]:
        """Heads, first those whose attention moved most; of one model those that look most at one kind of token."""
        if self.distance is not None:
            return self.moved.argsort(descending=True, stable=True).tolist()
        return [head for head, *_ in sorted(self._told(), key=lambda row: -row[2])]

    def _told(self) -> list[tuple[int, str, float]]:
        """Head, the kind of attention that says most about it (not entropy), and how much: its change, or what is above even."""
        kinds = [kind for kind in self.kinds if kind not in ("entropy", _FROM_END + ELSEWHERE)]
        if self.distance is None:
            size = torch.stack([self.independent(self.values(kind)).mean(0) - self._even(kind) for kind in kinds])
        else:
            size = torch.stack([self.independent(self.change(kind)).mean(0) for kind in kinds])
        best = (size.abs() if self.distance is not None else size).argmax(0)
        return [(head, kinds[k], float(size[k, head])) for head, k in enumerate(best.tolist())]

    def summary(self) -> str:
        """The head whose attention moved most, by how much and towards what; the mean over heads, the floor, n."""
        n = self._n
        head = self.order[0]
        kind = self._told()[head][1]
        if self.distance is None:
            where = _pm(self.independent(self.values(kind))[:, head])
            means = ", ".join(f"{m} {_pm(self.independent(self.values(m)).mean(1))}" for m in MEASURES[:3])
            end = f"mean over {len(self.heads)} heads: {means}; {n}; rounding moves it by up to {float(self.floor[:, :3].max()):.1g}"
            return f"{self.heads[head]} looks most one way: attention {_to(kind)} is {where} (even attention {self._even(kind):.2g}); {end}"
        floor = f"a model against itself up to {self.numerical_floor:.1g}" + self._lacking()
        every = self.independent(self._pair())
        if not self.differs:
            return (
                f"Attention shows no difference beyond rounding: the rows of {len(self.heads)} heads differ by at most "
                f"{float(self.moved.max()):.1g} in total variation ({floor}; {n})"
            )
        sides = [float(self.independent(self.values(kind, side))[:, head].mean()) for side in self.sides]
        by = _pm(self.independent(self.change(kind))[:, head])
        return (
            f"Attention moved most in {self.heads[head]}: its rows differ by {_pm(every[:, head])} in total variation (0 to 1), and "
            f"attention {_to(kind)} goes from {sides[0]:.2g} to {sides[1]:.2g} "
            f"(change {by}); mean over {len(self.heads)} heads {_pm(every.mean(1))} "
            f"({n}; {floor})"
        )

    @property
    def _n(self) -> str:
        """How many prompts of two or more tokens, of how many contexts if these are fewer, and what the errors are over."""
        prompts, contexts = int((self.lengths > 1).sum()), len(self.independent(self.attention))
        if contexts == 1:
            return "1 prompt, so no s.e." if prompts == 1 else f"{prompts} prompts in 1 context, so no s.e."
        return (
            f"{prompts} prompts in {contexts} contexts, s.e. over contexts"
            if contexts < prompts
            else f"{prompts} prompts, s.e. over prompts"
        )

    def _lacking(self) -> str:
        return ", without the rounding of half precision" if self.half else ""

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per kind of attention and head, for a pair first the ``distance``; ``per="prompt"``: one per prompt.

        ``even`` is what even attention would give, ``low`` and ``high`` the ends of the 95 % interval (bootstrap), of a pair that of the
        change; ``p`` is that of a sign-flip test of the change, ``p_adjusted`` corrected for all heads and kinds.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            return pd.DataFrame(list(self._per_prompt()))
        return pd.DataFrame([*self._distances(), *(row for kind in self.kinds for row in self._rows(kind))])

    def _per_prompt(self) -> Iterator[dict[str, Any]]:
        columns = {} if self.distance is None else {"distance": {"change": self.distance}}
        for kind in self.kinds:
            columns[kind] = {"attention" if len(self.sides) == 1 else side: self.values(kind, side) for side in self.sides}
            columns[kind] |= {} if self.distance is None else {"change": self.change(kind)}
        for kind, found in columns.items():
            for i, head in enumerate(self.heads):
                for prompt in range(len(self.lengths)):
                    yield {"kind": kind, "head": head, "prompt": prompt} | {name: float(x[i, prompt]) for name, x in found.items()}

    def _distances(self) -> Iterator[dict[str, Any]]:
        if self.distance is None:
            return
        found = self.independent(self.distance)
        share, error, floor = bootstrap(found, seed=self.draw_seed), standard_error(found), self.distance_floor.amax(0)
        for i, head in enumerate(self.heads):
            numbers = {"change": share.value, "change_se": error, "low": share.low, "high": share.high, "floor": floor}
            yield {"kind": "distance", "head": head, **{name: float(x[i]) for name, x in numbers.items()}, "n": len(found)}

    def _rows(self, kind: str) -> Iterator[dict[str, Any]]:
        pair, even = self.distance is not None, self._even(kind)
        found = self.independent(self.change(kind) if pair else self.values(kind))
        share, error = bootstrap(found, seed=self.draw_seed), standard_error(found)
        means = {side: self.independent(self.values(kind, side)).mean(0) for side in self.sides} if pair else {}
        test = permutation(found, seed=self.draw_seed) if pair else None
        floor = self._floor(kind)
        what = "change" if pair else "attention"
        for i, head in enumerate(self.heads):
            row = {"kind": kind, "head": head} | {side: float(x[i]) for side, x in means.items()}
            row |= {what: float(share.value[i]), f"{what}_se": float(error[i]), "low": float(share.low[i]), "high": float(share.high[i])}
            if test is not None:  # corrected for the heads by their largest, for the kinds by their number
                row |= {"p": float(test.p[i]), "p_adjusted": min(1.0, len(self.kinds) * float(test.adjusted[i]))}
            yield row | {"even": even, "floor": float(floor[i]), "n": len(found)}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The heads whose attention moved most, each with the kind that changed most; of one model those that look most one way."""
        import pandas as pd

        if self.distance is not None and not self.differs:
            return pd.DataFrame()
        told = {head: kind for head, kind, _ in self._told()}
        rows = {kind: list(self._rows(kind)) for kind in {told[head] for head in self.order[:n]}}
        distances = list(self._distances())
        found = []
        for head in self.order[:n]:
            row = {"head": self.heads[head]}
            if self.distance is not None:
                d = distances[head]
                row |= {"distance": d["change"], "distance_se": d["change_se"], "most_changed": told[head]}
            else:
                row |= {"looks_at": told[head]}
            found.append(row | {k: v for k, v in rows[told[head]][head].items() if k not in ("kind", "head", "floor")})
        return pd.DataFrame(found)

    def plot(self) -> go.Figure:
        """The first of the figures."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """How far attention moved, head by head; attention from END to named positions; all heads on the first shown prompt."""
        found = {} if self.distance is None else {"How far attention moved": self._moved()}
        if self.distance is None:
            title = f"Attention to the first token, where many heads rest: mean over the later tokens, n = {self._n}"
            found["Attention to the first token"] = self._map(self.independent(self.values(MEASURES[0])).mean(0), "attention", title)
        found |= self._from_end() if self.looks is not None else {}
        return found | (self._thumbnails(next(iter(self.patterns))) if self.patterns else {})

    def _moved(self) -> go.Figure:
        title = f"Total variation between the rows of base and of tuned: 0 the same, 1 nothing in common; mean over tokens, n = {self._n}"
        return self._map(self.moved, "total variation, 0 to 1", title, self.numerical_floor)

    def _map(self, values: Float[Tensor, " head"], unit: str, title: str, floor: float | None = None) -> go.Figure:
        """Layer by head; heads that were not asked for stay empty."""
        cells = [_cell(head) for head in self.heads]
        rows, columns = (sorted({cell[i] for cell in cells}) for i in (0, 1))
        grid = torch.full((len(rows), len(columns)), torch.nan, dtype=torch.float64)
        for (layer, head), value in zip(cells, values.tolist(), strict=True):
            grid[rows.index(layer), columns.index(head)] = value
        return plots.heatmap(
            grid,
            columns,
            rows,
            title=title,
            xlabel="head",
            ylabel="layer",
            unit=unit,
            difference=False,
            floor=floor,
            limits=(0.0, max(float(values.max()), 1e-12)),
        )

    def _from_end(self) -> dict[str, go.Figure]:
        """Heads by named positions; of a pair the change, and both models side by side."""
        places = self.labels["place"]
        mean = {s: torch.stack([self.independent(self.values(_FROM_END + p, s)).mean(0) for p in places], 1) for s in self.sides}
        size = mean[self.sides[-1]] if self.distance is None else (mean["tuned"] - mean["base"]).abs()
        chosen = sorted(size.amax(1).argsort(descending=True, stable=True)[:_ROWS].tolist())
        names = [self.heads[i] for i in chosen]
        few = len(chosen) < len(self.heads)
        which = (
            f"the {len(chosen)} of {len(self.heads)} heads that {'look' if self.distance is None else 'changed'} most"
            if few
            else "all heads"
        )
        look: dict[str, Any] = dict(xlabel="the token looked at", ylabel="head")
        found = {}
        if self.distance is not None:
            change = (mean["tuned"] - mean["base"])[chosen]
            title = f"Attention from the last token (END) to named positions: tuned - base, mean over prompts; {which}"
            assert self.looks_floor is not None
            floor = float(self.looks_floor.max())
            found["From END, tuned - base"] = plots.heatmap(
                change, places, names, title=title, unit="change of attention", difference=True, floor=floor, **look
            )
        columns = [f"{place}, {side}" if self.distance is not None else place for place in places for side in self.sides]
        both = torch.stack([mean[side][chosen] for side in self.sides], dim=-1).flatten(1)
        title = f"Attention from the last token (END) to named positions, mean over prompts; {which}"
        found["From END"] = plots.heatmap(both, columns, names, title=title, unit="attention", difference=False, limits=(0.0, 1.0), **look)
        return found

    def _thumbnails(self, prompt: str) -> dict[str, go.Figure]:
        patterns, cells = self.patterns[prompt], [_cell(head) for head in self.heads]
        some = "" if len(self.kept[prompt]) == self.lengths[int(prompt)] else f" (its first and last {len(self.kept[prompt]) - 1} tokens)"
        hover = {cell: said.replace("; ", "\n") for cell, said in zip(cells, self._said(), strict=True)}
        what = f"{len(cells)} heads on prompt {prompt}{some}"
        found = {}
        if self.distance is not None:
            change = patterns[1] - patterns[0]
            found[f"{what}: tuned - base"] = attention_grid(
                dict(zip(cells, change.numpy(), strict=True)),
                title="Change of attention: every square is a head, its rows the tokens that look, its columns the tokens looked at",
                hover=hover,
                difference=True,
                top=float(change.abs().max()),
                floor=float(self.cell_floor.max()),
            )
        for i, side in reversed(list(enumerate(self.sides))):
            title = "Attention: every square is a head, its rows the tokens that look, its columns the tokens looked at"
            found[what + (f": {side}" if len(self.sides) > 1 else "")] = attention_grid(
                dict(zip(cells, patterns[i].numpy(), strict=True)), title=title, hover=hover
            )
        return found

    def _said(self) -> list[str]:
        """What is known of every head over all prompts, in a few words."""
        parts = []
        if self.distance is not None:
            found = self.independent(self.distance)
            parts.append([f"total variation {_pm(one)}" for one in found.unbind(1)])
        for kind in MEASURES[:3]:
            sides = [self.independent(self.values(kind, side)).mean(0).tolist() for side in self.sides]
            parts.append([f"attention {_to(kind)} " + " → ".join(f"{100 * x:.0f} %" for x in one) for one in zip(*sides, strict=True)])
        return ["; ".join(one) for one in zip(*parts, strict=True)]

    def html(self) -> str | None:
        """The text of some prompts, whose tokens show where they look when they are pointed at."""
        return self.view() if self.patterns else None

    def view(self, heads: Heads | str | None = None, prompts: Sequence[int] | None = None) -> str:
        """The view of tokens for chosen heads and prompts, as HTML without a script.

        Args:
            heads: text form, ``L1H2,L2H0``; by default the three that come first in ``order``.
            prompts: numbers of shown prompts; by default the first two.

        Raises:
            InputError: a head or a prompt whose patterns were not kept.
        """
        chosen = self.order[:_VIEW_HEADS] if heads is None else [self._head(f"L{a}H{b}") for g in Heads.parse(heads) for a, b in g.heads]
        rows = list(self.patterns)[:_VIEW_PROMPTS] if prompts is None else [str(p) for p in prompts]
        if lost := [row for row in rows if row not in self.patterns]:
            raise InputError(
                f"the patterns of prompt {lost[0]} were not kept; those of {', '.join(self.patterns) or 'none'} were (setting shown)"
            )
        if not rows or not chosen:
            raise InputError("there is nothing to show without a head and a prompt")
        panels = [self._panel(head, row) for head in chosen for row in rows]
        of = f"{len(chosen)} of {len(self.heads)} heads" + (
            " (those that moved most)" if heads is None and self.distance is not None else ""
        )
        kept = f"{len(rows)} of {len(self.lengths)} prompts"
        all_kept = f"{len(self.patterns)} prompt{'s' * (len(self.patterns) != 1)}"
        more = f"the result keeps {all_kept}, and result.view(heads=..., prompts=...) shows any head on them"
        key = (self.key if self.meta is not None else content_digest(self)[:8]) + f"-{'-'.join(map(str, chosen))}-{'-'.join(rows)}"
        return attention_view(
            panels, sides=self.sides, name=f"attention-{key}", title="Where tokens look", note=f"Shown: {of}, {kept}; {more}."
        )

    def _head(self, name: str) -> int:
        if name not in self.heads:
            raise unknown("head", name, self.heads)
        return self.heads.index(name)

    def _panel(self, head: int, prompt: str) -> AttentionPanel:
        words, pattern = self.words[prompt], self.patterns[prompt][:, head]
        start = len(words) - 1 if len(pattern) == 1 else int((pattern[1] - pattern[0]).abs().sum(-1).argmax())  # the row that moved most
        return AttentionPanel(
            self.heads[head],
            f"prompt {prompt}",
            words,
            pattern.numpy(),
            start,
            left_out=int(self.lengths[int(prompt)]) - len(words),
            said=f"Mean over all prompts: {self._said()[head]}.",
            floor=float(self.cell_floor.max()),
        )


@analysis(version=1)
def attention_patterns(
    model: HookedModel | ModelPair,
    prompts: Prompts | PromptPairs,
    *,
    heads: Heads | str | None = None,
    shown: int = 4,
    tokens: int = 48,
    seed: int = 0,
) -> AttentionPatternsResult:
    """Where does each head look, and what did fine-tuning change there?

    Both models read the same tokens, and every row of attention (what one token pays to itself and those before it) is compared: total
    variation, half the sum of absolute differences, 0 for the same row and 1 for rows that have nothing in common. Of each model the mean
    attention to the first token, where many heads rest (Xiao et al. 2023, arXiv 2309.17453), to the token itself and to the one before,
    the entropy in nats, and attention from END to the named positions of the prompts, each beside what even attention would give. The
    first token sees only itself and is left out of all means. Patterns are read a few prompts and layers at a time; whole ones are kept of
    the first prompts. The floor is each model against itself: prompts alone and in a batch, and half precision against the
    same weights in float32. That a head looks elsewhere does not say that it matters: for that patch it, or block it.

    Args:
        model: one model, or a pair to compare.
        prompts: texts; of pairs the clean ones.
        heads: query heads, as L1H2,L2H0; by default all.
        shown: of how many prompts, the first ones of two or more tokens, whole patterns are kept.
        tokens: of longer prompts the first token and the last ones are kept, this many in all.
        seed: of the bootstrap and the permutations.

    Raises:
        InputError: no prompt has two tokens, a head the model does not have, or a pair that is loaded one at a time.
    """
    if getattr(model, "one_at_a_time", False):
        raise InputError("attention_patterns compares both models row by row, but the pair is loaded one at a time")
    for name, value, least in (("shown", shown, 0), ("tokens", tokens, 2)):
        if type(value) is not int or value < least:
            raise InputError(f"{name} is a number of {'prompts' if name == 'shown' else 'tokens'}, from {least}; got {value!r}")
    asked = clean_prompts(prompts)
    batch = model.batch(asked).to("cpu")
    if int(batch.lengths.max()) < 2:
        raise InputError("every prompt is a single token, which has nothing to look at but itself; give longer ones")
    sides = dict(model.sides())
    layers = _layers(heads, model.shape.n_layers, model.shape.n_heads)
    at, names = places(batch)
    found, flat = attended(list(sides.values()), batch, layers, at), even(batch, at)
    floors = [rounding(m, batch, layers, at) for m in sides.values()]
    long = (batch.lengths > 1).nonzero().flatten().tolist()
    kept = {str(row): kept_tokens(int(batch.lengths[row]), tokens) for row in long[:shown]}
    labels = {"side": tuple(sides), "measure": MEASURES, "head": tuple(f"L{layer}H{head}" for layer in layers for head in layers[layer])}
    return AttentionPatternsResult(
        attention=found.measures,
        distance=found.distance if len(sides) == 2 else None,
        looks=found.looks if names else None,
        even=flat[0],
        looks_even=flat[1] if names else None,
        floor=torch.stack([f.measures for f in floors]),
        distance_floor=torch.stack([f.distance for f in floors]),
        looks_floor=torch.stack([f.looks for f in floors]) if names else None,
        cell_floor=torch.stack([f.cell for f in floors]),
        half=any(f.lacking for f in floors),
        lengths=batch.lengths,
        group=grouped(asked.contexts),
        patterns={row: whole(list(sides.values()), batch.select([int(row)]), layers, some) for row, some in kept.items()},
        kept=kept,
        words={row: tuple(spelled(model, [int(batch.ids[int(row), i]) for i in some])) for row, some in kept.items()},
        draw_seed=seed,
        labels=labels | ({"place": names} if names else {}),
    )


def _layers(heads: Heads | str | None, n_layers: int, n_heads: int) -> dict[int, tuple[int, ...]]:
    """Layer -> its heads that are read."""
    if heads is None:
        return {layer: tuple(range(n_heads)) for layer in range(n_layers)}
    groups = Heads.parse(heads)
    if at := [str(group) for group in groups if group.position is not None]:
        raise InputError(f"{at[0]} names a position, but heads are read at every token; write heads=L1H2,L2H0")
    wanted = sorted({head for group in groups for head in group.heads})
    for layer, head in wanted:
        if layer >= n_layers or head >= n_heads:
            raise InputError(f"L{layer}H{head} is not in a model of {n_layers} layers with {n_heads} heads each")
    return {layer: tuple(head for one, head in wanted if one == layer) for layer in dict.fromkeys(layer for layer, _ in wanted)}


def _cell(head: str) -> tuple[int, int]:
    """Layer and head of a name."""
    return Heads.parse(head).groups[0].heads[0]


def _pm(values: Float[Tensor, " context"]) -> str:
    """``0.32 +- 0.01``."""
    error = f" +- {float(standard_error(values)):.2g}" if len(values) > 1 else ""
    return f"{float(values.mean()):.2g}{error}"


def _to(kind: str) -> str:
    """A kind of attention in a sentence."""
    words = {"first token": "to the first token", "itself": "to itself", "previous token": "to the previous token"}
    return words.get(kind, kind)
