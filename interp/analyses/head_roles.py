"""Which heads do something that heads are known for, and did fine-tuning change it?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.metrics import Metric
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.roles import CLEAR, PATTERNS, attention_from, direct_effect, even, even_from, named, paid, repeats, scores, targets
from interp.sites import Site
from interp.stats import bootstrap, permutation, standard_error
from interp.sweeps import run
from interp.sweeps.staged import by_context, grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import Batch, HookedModel, ModelPair

_CHANGE = "tuned - base"
LOOKS = ("answer", "distractor", "repeat")
"""What a head may look at from END: the answer, the distractor, and the last mention of a distractor that comes twice (S2)."""
_ASKED = {"mover": "answer", "negative_mover": "answer", "inhibition": "repeat"}
"""Role -> what its heads look at from END."""
ROLES = (*PATTERNS, *_ASKED)
"""Roles that heads can have."""
LEVEL, LEAST = 0.05, 0.01
"""Level of the tests that go into a name, and the share of the metric that a mover writes at least."""


@dataclass(frozen=True, eq=False)
class HeadRolesResult(Result):
    """How much attention every head pays to what heads of a role attend to.

    Prompts of one context are no independent draws, so means, intervals and tests on prompts are of means per context.

    Attributes:
        attention: mean attention to the targets of a role on random tokens that come twice.
        control: the same where no such target is: other random tokens in place of the repetition; for ``previous_token`` attention
            to the token two before.
        chance: what even attention would pay.
        looks: attention from END on the prompts; NaN for prompts without such a token. None without prompts.
        looks_even: what even attention would pay, mean over the contexts.
        direct: how far the metric falls when what a head writes at END is taken out of the last stream.
        clean: the metric itself.
        group: context of each prompt, as they first come. None without prompts.
        metric: text form.
        draw_seed: of bootstrap and permutations.
        labels: of ``side``, ``role`` and ``look``.
    """

    attention: Float[Tensor, "side role layer head sequence"]
    control: Float[Tensor, "side role layer head sequence"]
    chance: Float[Tensor, " role"]
    looks: Float[Tensor, "side look layer head prompt"] | None
    looks_even: Float[Tensor, " look"] | None
    direct: Float[Tensor, "side layer head prompt"] | None
    clean: Float[Tensor, "side prompt"] | None
    group: Int[Tensor, " prompt"] | None
    metric: str
    draw_seed: int
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the models."""
        return self.labels["side"]

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles there are scores of."""
        return ROLES if self.looks is not None else PATTERNS

    def _side(self, side: str | None) -> int:
        if side is not None and side not in self.sides:
            raise InputError(f"there is no model {side!r} in this result; it has {', '.join(self.sides)}")
        return len(self.sides) - 1 if side is None else self.sides.index(side)

    def score(self, role: str, side: str | None = None) -> Float[Tensor, "layer head prompt"]:
        """Attention to what heads of a role attend to, of every sequence, or every prompt that has it.

        Args:
            role: one of ``roles``.
            side: which model; by default the tuned or only one.

        Raises:
            InputError: no such role or model.
        """
        i = self._side(side)
        if role not in self.roles:
            raise unknown("role", role, self.roles)
        if role in PATTERNS:
            return self.attention[i, PATTERNS.index(role)].double()
        assert self.looks is not None
        seen = self.looks[i, LOOKS.index(_ASKED[role])].double()
        return seen[..., _there(seen)]

    def independent(self, role: str, side: str | None = None) -> Float[Tensor, "layer head context"]:
        """The same of every sequence, or the mean over the prompts of every context that have it: what statistics are of.

        Args:
            role: one of ``roles``.
            side: which model; by default the tuned or only one.

        Raises:
            InputError: no such role or model.
        """
        value = self.score(role, side)
        if role in PATTERNS or not value.shape[-1]:
            return value
        assert self.looks is not None
        return self._mean(self.looks[self._side(side), LOOKS.index(_ASKED[role])])

    def _mean(self, values: Float[Tensor, "... prompt"]) -> Float[Tensor, "... context"]:
        """Means per context over the prompts that have a value."""
        assert self.group is not None
        return _means(values.double(), self.group)

    def beside(self, role: str, side: str | None = None) -> Float[Tensor, "layer head"]:
        """What a score must be above: the larger of chance and, on random tokens, the mean of the control."""
        i = self._side(side)
        if role in PATTERNS:
            k = PATTERNS.index(role)
            return self.control[i, k].double().mean(-1).clamp_min(float(self.chance[k]))
        assert self.looks_even is not None
        shape = self.attention.shape[2:4]
        return self.looks_even[LOOKS.index(_ASKED[role])].double().expand(shape)

    def named(self, side: str | None = None) -> dict[str, list[tuple[int, int]]]:
        """Role -> the heads that have it, strongest first.

        The score is at least 0.2 above chance and control, with p <= 0.05 in a sign-flip test corrected for all heads. A mover
        besides writes the answer, a negative mover against it, both beyond noise and with at least 1 % of the metric; an inhibition head
        looks at the repeated token more than at the answer.

        Args:
            side: which model; by default the tuned or only one.
        """
        found: dict[str, list[tuple[int, int]]] = {}
        for role in self.roles:
            value, beside = self.independent(role, side), self.beside(role, side)
            if not value.shape[-1]:
                found[role] = []
                continue
            above = value.mean(-1) - beside
            holds = (above >= CLEAR) & (permutation((value - beside[..., None]).movedim(-1, 0), seed=self.draw_seed).adjusted <= LEVEL)
            if role in _ASKED:
                holds &= self._writes(role, self._side(side))
            order = sorted(holds.nonzero().tolist(), key=lambda cell, above=above: -float(above[tuple(cell)]))
            found[role] = [(layer, head) for layer, head in order]
        return found

    def _writes(self, role: str, i: int) -> Tensor:
        """Heads that write as a role does, [layer head]."""
        assert self.direct is not None and self.looks is not None and self.clean is not None
        direct = self._mean(self.direct[i])
        mean, least = direct.mean(-1), LEAST * abs(float(self._mean(self.clean[i]).mean()))
        beyond = permutation(direct.movedim(-1, 0), seed=self.draw_seed).adjusted <= LEVEL
        if role != "inhibition":
            return beyond & (mean.abs() >= least) & (mean > 0 if role == "mover" else mean < 0)
        answer, repeat = (self._mean(self.looks[i, LOOKS.index(look)]).mean(-1) for look in ("answer", "repeat"))
        return repeat > answer.nan_to_num(0.0)

    def summary(self) -> str:
        """The heads of every role with the score of the first, beside chance; how many sequences and prompts."""
        parts = []
        for side in self.sides:
            told = [self._told(role, heads, side) for role, heads in self.named(side).items()]
            parts.append(f"{side}: {'; '.join(told)}" if len(self.sides) > 1 else "; ".join(told))
        n = [f"n = {self.attention.shape[-1]} sequences of random tokens"]
        n += [] if self.group is None else [self.n]
        return "; ".join([*parts, " and ".join(n)])

    @property
    def n(self) -> str:
        """How many prompts, or contexts where several prompts share one, statistics on prompts are of; nothing without prompts."""
        if self.group is None:
            return ""
        prompts, contexts = len(self.group), int(self.group.max()) + 1
        return f"{prompts} prompts" if prompts == contexts else f"{contexts} contexts of {prompts} prompts"

    def _told(self, role: str, heads: list[tuple[int, int]], side: str) -> str:
        value = self.independent(role, side)
        if not heads:
            return f"no {role}" + ("" if value.shape[-1] else " (no prompt has what it looks at)")
        more = f" and {len(heads) - 3} more" if len(heads) > 3 else ""
        share = bootstrap(value[heads[0]], seed=self.draw_seed)
        names = ", ".join(f"L{layer}H{head}" for layer, head in heads[:3])
        return f"{role} {names}{more} (attention {share}, by chance {float(self.beside(role, side)[heads[0]]):.2g})"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per role, head and model; ``per="prompt"`` one per sequence or prompt.

        ``effect`` is attention above chance and control with its standard error, ``score`` the attention itself with the ends of
        its bootstrap interval; ``direct`` what a head writes towards the answer, where prompts were given. Where prompts share a
        context these are of means per context.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        cells = self._per_prompt if per else self._rows
        return pd.DataFrame([row for i, side in enumerate(self.sides) for role in self.roles for row in cells(i, side, role)])

    def _heads(self) -> Iterator[tuple[int, int]]:
        layers, heads = self.attention.shape[2:4]
        return ((layer, head) for layer in range(layers) for head in range(heads))

    def _per_prompt(self, i: int, side: str, role: str) -> Iterator[dict[str, Any]]:
        value = self.score(role, side)
        for cell in self._heads():
            for prompt, x in enumerate(value[cell].tolist()):
                yield {"side": side, "role": role, "site": str(Site("z", *cell)), "prompt": prompt, "score": x}

    def _rows(self, i: int, side: str, role: str) -> Iterator[dict[str, Any]]:
        value, beside, holders = self.independent(role, side), self.beside(role, side), self.named(side)[role]
        if not value.shape[-1]:
            return
        above = (value - beside[..., None]).movedim(-1, 0)
        share, test = bootstrap(value.movedim(-1, 0), seed=self.draw_seed), permutation(above, seed=self.draw_seed)
        error = standard_error(above)
        for cell in self._heads():
            row: dict[str, Any] = {"side": side, "role": role, "site": str(Site("z", *cell)), "named": cell in holders}
            numbers = {"effect": above.mean(0), "effect_se": error, "score": share.value, "low": share.low, "high": share.high}
            numbers |= {"beside": beside, "p": test.p, "p_adjusted": test.adjusted}
            direct = {} if self.direct is None else {"direct": float(self._mean(self.direct[i]).mean(-1)[cell])}
            yield {**row, **{name: float(x[cell]) + 0.0 for name, x in numbers.items()}, **direct}

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The heads that have a role, those furthest above chance first."""
        import pandas as pd

        rows = [row for i, side in enumerate(self.sides) for role in self.roles for row in self._rows(i, side, role) if row["named"]]
        columns = ["site", *(["side"] if len(self.sides) > 1 else []), "role", "effect", "effect_se", "score", "low", "high", "beside"]
        columns += ["p", "p_adjusted", *([] if self.direct is None else ["direct"])]
        return pd.DataFrame(sorted(rows, key=lambda row: -row["effect"])[:n], columns=columns)

    def plot(self) -> go.Figure:
        """The first of the figures."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """Attention above chance of every head for every role; for a pair also the change."""
        found = {}
        for role in self.roles:
            if not self.independent(role).shape[-1]:
                continue
            above = {side: self.independent(role, side).mean(-1) - self.beside(role, side) for side in self.sides}
            if len(self.sides) == 2:
                above = {_CHANGE: above["tuned"] - above["base"], **{side: above[side] for side in reversed(self.sides)}}
            top = max(float(x.abs().max()) for x in above.values())
            n = self.independent(role).shape[-1]
            for view, x in above.items():
                of = "" if len(self.sides) == 1 else f", {view}"
                found[f"{role}{of}"] = plots.heatmap(
                    x,
                    title=f"{role}{of}: attention to what such heads attend to, above chance and control (n = {n})",
                    xlabel="head",
                    ylabel="layer",
                    unit="attention above chance",
                    difference=True,
                    limits=(-top, top) if top > 0 else None,
                )
        return found


@analysis(version=2)
def head_roles(
    model: HookedModel | ModelPair,
    prompts: Prompts | PromptPairs | None = None,
    *,
    n: int = 32,
    answer: str | None = None,
    metric: Metric | str = "logit_diff",
    seed: int = 0,
) -> HeadRolesResult:
    """Which heads do something that heads are known for, and did fine-tuning change it?

    Without prompts, on random tokens that come twice: attention to the token before, to the earlier mention of the present token, and to
    the token behind that mention (induction; Olsson et al. 2022, arXiv 2209.11895). Beside each stand even attention and a control:
    the same places where the tokens do not repeat, which a head that only counts tokens fails; for the token before, the one two
    before. A token that the tokenizer puts first is kept, and the first token is never a target, since many heads rest there.

    With prompts also, from END (Wang et al. 2023, arXiv 2211.00593): movers look at the answer and write it, negative movers look at it and
    write against it, inhibition heads look at the last mention of a distractor that was mentioned before. What is written is how
    far the metric falls when a head's output is taken out of the last stream, its final norm taken anew. That an inhibition head
    turns movers away is not measured here but by ``circuit_discovery``. Where prompts share a context, statistics are of means per
    context.

    Args:
        model: one model, or a pair to compare.
        prompts: prompts with answers; of pairs the clean ones.
        n: sequences of random tokens.
        answer: the position where the answer stands in the prompts; by default where its token does.
        metric: what counts as the answer, read at END.
        seed: of the sequences, the bootstrap and the permutations.

    Raises:
        InputError: prompts without answers; an unknown position or metric; a vocabulary that is too small.
    """
    sides = tuple(model.sides())
    drawn = repeats(sides[0][1], n, seed)
    wanted = [targets(pattern, drawn.twice) for pattern in PATTERNS]
    aside = [targets("previous_token", drawn.once, back=2), *wanted[1:]]
    uniform = even(drawn.twice)[:, None]
    chance = [float(paid(uniform, target).mean()) for target in wanted]
    asked = None if prompts is None else clean_prompts(prompts)
    looks, direct, clean, expected, group = [], [], [], None, None
    if asked is not None:
        judge = Metric.parse(metric)
        if judge.position != "END" or judge.needs_reference:
            raise InputError(f"head_roles judges what is written for the answer at END, which {judge} does not")
        batch = model.batch(asked)
        keys = _looked_at(asked, batch, answer)
        reader = judge.reader(asked)
        last = even_from(batch, batch.index("END"))
        group = grouped(asked.contexts)
        expected = torch.stack([_means(_to(last, key), group).mean() for key in keys])
        for _, m in sides:
            attention = attention_from(m, batch, "END").double()
            looks.append(torch.stack([_to(attention, key[:, None, None]).movedim(0, -1) for key in keys]).float())
            direct.append(direct_effect(m, batch, reader))
            clean.append(run(m, batch, reader))
    return HeadRolesResult(
        attention=torch.stack([scores(m, drawn.twice, wanted).float() for _, m in sides]),
        control=torch.stack([scores(m, drawn.once, aside).float() for _, m in sides]),
        chance=torch.tensor(chance),
        looks=torch.stack(looks) if looks else None,
        looks_even=None if expected is None else expected.float(),
        direct=torch.stack(direct) if direct else None,
        clean=torch.stack(clean) if clean else None,
        group=group,
        metric=str(metric),
        draw_seed=seed,
        labels={"side": tuple(side for side, _ in sides), "role": PATTERNS, "look": LOOKS},
    )


def _there(values: Float[Tensor, "... prompt"]) -> Tensor:
    """Prompts that have a value."""
    return ~values.isnan().reshape(-1, values.shape[-1]).any(0)


def _means(values: Float[Tensor, "... prompt"], group: Tensor) -> Float[Tensor, "... context"]:
    """Means per context over the prompts that have a value; contexts without any are left out."""
    there = _there(values)
    kept = values[..., there]
    if not kept.shape[-1]:
        return kept
    return by_context(kept.movedim(-1, 0), group[there].unique(return_inverse=True)[1]).movedim(0, -1)


def _to(attention: Tensor, key: Tensor) -> Tensor:
    """Attention to some keys, NaN for prompts that have none."""
    there = key.any(-1)
    return torch.where(there, (attention * key).sum(-1), torch.nan)


def _looked_at(prompts: Prompts, batch: Batch, answer: str | None) -> list[Tensor]:
    """The tokens that are the answer, the distractor, and the last mention of a distractor that comes twice, [prompt key] each."""
    if prompts.answers is None:
        raise InputError("head_roles asks which heads write the answer, and these prompts have none")
    right = batch.ids == torch.tensor(prompts.answers)[:, None]
    if answer is not None:
        if answer not in batch.positions:
            raise unknown("position", answer, batch.positions)
        right = named(batch, answer)
    wrong = torch.zeros_like(right) if prompts.distractors is None else batch.ids == torch.tensor(prompts.distractors)[:, None]
    right, wrong = right & batch.mask, wrong & batch.mask
    count = wrong.cumsum(1)
    repeat = wrong & (count == count[:, -1:]) & (count >= 2)
    return [right, wrong, repeat]
