"""Do heads of a circuit give the right answer once they look where they should?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.circuit import Circuit
from interp.errors import InputError
from interp.progress import progress
from interp.prompts import PromptPairs, Prompts, clean_prompts
from interp.results import Result, analysis
from interp.sites import Heads, Site
from interp.stats import Estimate, bootstrap, mcnemar, paired_change, permutation, standard_error, wilson
from interp.sweeps.repairs import (
    DRAWN,
    Answers,
    Condition,
    answers,
    check_heads,
    chosen,
    conditions,
    direction,
    downstream,
    editing,
    importance,
    options_of,
    strangers,
    with_random_tokens,
    with_rows,
)
from interp.sweeps.staged import by_context, grouped

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel

Among = Literal["vocabulary", "options"]
_USUAL = ("colors", "IO,S1", "objects")  # positions of the options in the tasks that come with the package
_EDITED, _STATES = "all heads", ("no edit", "all heads")
_LEAST = 4  # heads that a rank correlation needs
_FEWEST = 2  # contexts that a standard error needs


@dataclass(frozen=True, eq=False)
class CircuitRepairResult(Result):
    """What a model answers with the rows of some heads set by hand, beside controls; and what changes behind these heads.

    Prompts of one context are no independent draws, so shares, means, intervals and tests are of means per context.

    Attributes:
        right: the answer is right.
        margin: logit of the answer less that of the best wrong option.
        attention: from the query to the tokens of the right and of all wrong options, without the edit and with that of all heads.
        attribution: logits of the answer less the mean wrong option that a head adds directly, the final norm's scale held at that run's.
        importance: score of a head in the circuit; NaN for those without.
        jitter: answers without an edit that change when the prompts run in other batches.
        kinds: of every condition.
        heads: text form of the heads that each condition changes.
        edited: heads that are edited together, as (layer, head).
        movers: heads whose attention and logits are told, those that are not edited.
        among: what the answer must beat: the whole ``vocabulary`` or the ``options``.
        chance: accuracy of a guess among the options.
        query: position of the rows.
        draw_seed: of the controls, bootstrap and permutations.
        group: context of each prompt, as they first come.
        notes: controls that could not be run.
        labels: of ``condition``, ``state`` and ``option``.
    """

    right: Bool[Tensor, "condition prompt"]
    margin: Float[Tensor, "condition prompt"]
    attention: Float[Tensor, "state prompt layer head option"]
    attribution: Float[Tensor, "state prompt layer head"]
    importance: Float[Tensor, "layer head"]
    jitter: int
    kinds: tuple[str, ...]
    heads: tuple[str, ...]
    edited: tuple[tuple[int, int], ...]
    movers: tuple[tuple[int, int], ...]
    among: Among
    chance: float
    query: str
    draw_seed: int
    group: Int[Tensor, " prompt"]
    notes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def accuracy(self) -> Float[Tensor, " condition"]:
        """Share of right answers, mean of those of the contexts."""
        return self._of(self.right.T).mean(0)

    @property
    def n(self) -> str:
        """How many prompts, or contexts where several prompts share one, the statistics are of."""
        prompts, contexts = len(self.group), self._contexts
        return f"{prompts} prompts" if prompts == contexts else f"{contexts} contexts of {prompts} prompts"

    @property
    def _contexts(self) -> int:
        return int(self.group.max()) + 1

    def _of(self, values: Float[Tensor, "prompt ..."]) -> Float[Tensor, "context ..."]:
        """Means per context."""
        return by_context(values.double(), self.group)

    def newly(self, condition: str = _EDITED) -> tuple[list[int], list[int]]:
        """Prompts that a condition puts right, and prompts that it spoils.

        Raises:
            InputError: no such condition.
        """
        if condition not in self.labels["condition"]:
            raise InputError(f"there is no condition {condition!r}; there are {', '.join(self.labels['condition'])}")
        now, before = self.right[self.labels["condition"].index(condition)], self.right[0]
        return (now & ~before).nonzero().flatten().tolist(), (before & ~now).nonzero().flatten().tolist()

    def correlation(self) -> tuple[Estimate, int]:
        """Spearman's rank correlation of a head's change in attribution with its importance, and over how many heads.

        Over heads with a score that the edit can reach and that are not edited: from the layer behind the first edited one. The interval
        resamples heads.
        """
        first = min(layer for layer, _ in self.edited)
        there = ~self.importance.isnan()
        there[: first + 1] = False
        for layer, head in self.edited:
            there[layer, head] = False
        change = self._of(self.attribution[1] - self.attribution[0]).mean(0)
        return _spearman(change[there], self.importance[there], self.draw_seed), int(there.sum())

    @property
    def _followers(self) -> tuple[tuple[int, int], ...]:
        """Movers that are not edited: where those look is the edit itself."""
        return tuple(head for head in self.movers if head not in self.edited)

    def _means(self, values: Tensor) -> Float[Tensor, "context ..."]:
        """Mean over these movers of values [prompt layer head ...]."""
        return self._of(torch.stack([values[:, layer, head] for layer, head in self._followers]).mean(0))

    def summary(self) -> str:
        """Accuracy before and after, flips, the controls, and what changes behind the heads."""
        before, after = (_share(self._row(i)) for i in (0, 1))
        row, one = self._row(1), self._contexts == len(self.group)
        test = "exact McNemar" if one else "sign-flip test of contexts,"
        parts = [
            f"{row['newly_right']}{'' if one else ' prompts'} newly right, {row['newly_wrong']} newly wrong, {test} p = {row['p']:.2g}"
        ]
        parts += [
            f"{row['condition']} {_told(row)}" for row in self._aggregated() if row["kind"] not in ("no edit", "all heads", "single head")
        ]
        parts += [f"{self.jitter} answers change by rounding alone", *self._behind(), *self.notes]
        heads = _count(len(self.edited), "head")
        among = "the whole vocabulary" if self.among == "vocabulary" else f"the options, chance {self.chance:.1%}"
        return (
            f"Accuracy goes from {before} to {after} with {heads} set to look from {self.query} at the wrong options only "
            f"({self.heads[1]}; n = {self.n} among {among}; {'; '.join(parts)})"
        )

    def _behind(self) -> Iterator[str]:
        """What is told of movers, and of all heads with a score."""
        if both := len(self.movers) - len(self._followers):
            yield f"{both} of {_count(len(self.movers), 'mover')} {'is' if both == 1 else 'are'} edited and not told of here"
        if self._followers:
            right, wrong = (
                bootstrap(100 * self._means(x), seed=self.draw_seed).at() for x in (self.attention[1] - self.attention[0]).unbind(-1)
            )
            old, new = (float(self._means(x).mean()) for x in self.attribution)
            movers = _count(len(self._followers), "mover")
            yield f"attention of {movers} moves by {right} points to the right option and {wrong} to the wrong ones"
            yield f"what they add to the logits goes from {old:.2f} to {new:.2f}"
        rho, n = self.correlation()
        if rho.refused is None:
            yield f"change of logits and importance of {n} heads correlate by {rho.at()}, Spearman"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per condition; ``per="prompt"``: one row per condition and prompt.

        ``effect`` is the change of accuracy, its interval that of paired shares; ``p`` is McNemar's, ``p_adjusted`` that of a sign-flip
        test, corrected for all conditions. Where prompts share a context, all of these are of means per context and ``p`` is that of
        the sign-flip test; ``newly_right`` and ``newly_wrong`` count prompts.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        names = self.labels["condition"]
        if per:
            cells = [(i, j) for i in range(len(names)) for j in range(self.right.shape[1])]
            rows = [
                {"condition": names[i], "prompt": j, "right": bool(self.right[i, j]), "margin": float(self.margin[i, j])} for i, j in cells
            ]
            return pd.DataFrame(rows)
        return pd.DataFrame([self._row(i) for i in range(len(names))])

    def _row(self, i: int) -> dict[str, Any]:
        name, n = self.labels["condition"][i], self._contexts
        gained, lost = (len(rows) for rows in self.newly(name))
        # A context counts as one draw that is right in part. Its share varies no more than a coin's of the same chance, so that the
        # intervals for whole draws, which these are where every context has one prompt, are rather too wide than too narrow.
        up, down = (float(self._of(x).sum()) for x in (self.right[i] & ~self.right[0], self.right[0] & ~self.right[i]))
        low, high = wilson(min(float(self._of(self.right[i]).sum()), n), n)
        ends = paired_change(up, min(down, n - up), n)
        change = self._of(self.right[i].double() - self.right[0].double())
        p = mcnemar(lost, gained) if n == len(self.group) else float(permutation(change, seed=self.draw_seed).p)
        row: dict[str, Any] = {"condition": name, "kind": self.kinds[i], "heads": self.heads[i], "accuracy": float(self.accuracy[i])}
        row |= {"accuracy_low": low, "accuracy_high": high, "effect": float(change.mean()), "effect_se": float(standard_error(change))}
        row |= {"low": ends[0], "high": ends[1], "newly_right": gained, "newly_wrong": lost, "p": p}
        now, before = (float(self._of(self.margin[j]).mean()) for j in (i, 0))
        return row | {"p_adjusted": self._adjusted[i], "margin": now, "margin_change": now - before}

    @property
    def _adjusted(self) -> list[float]:
        return permutation(self._of((self.right.double() - self.right[0].double()).T), seed=self.draw_seed).adjusted.tolist()

    def _aggregated(self) -> list[dict[str, Any]]:
        """One row per condition, and one per kind of control that was drawn several times: the mean and the extremes of its draws."""
        rows = [self._row(i) for i in range(len(self.kinds))]
        found: list[dict[str, Any]] = []
        for kind in dict.fromkeys(self.kinds):
            some = [row for row in rows if row["kind"] == kind]
            if kind not in DRAWN:
                found += [row | {"draws": 1} for row in some]
                continue
            table = {k: [row[k] for row in some] for k in ("accuracy", "effect", "newly_right", "newly_wrong", "margin", "margin_change")}
            row = {k: sum(v) / len(v) for k, v in table.items()}
            row |= {"accuracy_low": min(table["accuracy"]), "accuracy_high": max(table["accuracy"])}
            row |= {"low": min(table["effect"]), "high": max(table["effect"]), "effect_se": math.nan, "p": math.nan, "p_adjusted": math.nan}
            found.append({"condition": some[0]["condition"].rsplit(" ", 1)[0], "kind": kind, "heads": "drawn", **row, "draws": len(some)})
        return found

    def strongest(self, n: int = 20) -> pd.DataFrame:
        """The conditions, draws of a control together with their extremes in place of an interval, by their effect."""
        import pandas as pd

        columns = ["condition", "accuracy", "effect", "effect_se", "low", "high", "newly_right", "newly_wrong", "p", "p_adjusted", "draws"]
        rows = [row for row in self._aggregated() if row["kind"] != "no edit"]
        return pd.DataFrame(sorted(rows, key=lambda row: -abs(row["effect"]))[:n], columns=columns)

    def plot(self) -> go.Figure:
        """Accuracy under every condition."""
        rows = self._aggregated()
        return plots.bars(
            [row["condition"] + (f" ({row['draws']} draws)" if row["draws"] > 1 else "") for row in rows],
            {"accuracy": [row["accuracy"] for row in rows]},
            intervals={"accuracy": ([row["accuracy_low"] for row in rows], [row["accuracy_high"] for row in rows])},
            title=f"Right answers with heads set to look at the wrong options from {self.query} (n = {self.n})",
            ylabel="share of right answers; 95 % interval, or the extremes of draws",
            reference=float(self.accuracy[0]),
            reference_label="no edit",
            horizontal=True,
        )

    def figures(self) -> dict[str, go.Figure]:
        """Accuracy; change of what every head adds to the logits; the same by importance."""
        change = self._of(self.attribution[1] - self.attribution[0]).mean(0)
        drawn = {"Accuracy": self.plot()}
        drawn["Change of logits"] = plots.heatmap(
            change,
            title=f"Change of what each head adds to the answer when {_all(len(self.edited))} edited",
            xlabel="head",
            ylabel="layer",
            unit="logits of the answer less the mean wrong option",
            difference=True,
        )
        there = (~self.importance.isnan()).nonzero().tolist()
        if there:
            groups = [
                "edited" if (i, h) in self.edited else "mover" if (i, h) in self.movers else "other" for i, h in (tuple(x) for x in there)
            ]
            drawn["By importance"] = plots.scatter(
                [float(self.importance[i, h]) for i, h in there],
                [float(change[i, h]) for i, h in there],
                labels=[f"L{i}H{h}" for i, h in there],
                groups=groups,
                title="Change of logits by importance in the circuit",
                xlabel="score in the circuit",
                ylabel="change of logits",
            )
        return drawn


def _share(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.1%} [{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}]"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


def _all(n: int) -> str:
    return "1 head is" if n == 1 else f"all {n} heads are"


def _told(row: dict[str, Any]) -> str:
    extremes = f" [{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}] in {row['draws']} draws" if row["draws"] > 1 else ""
    return f"{row['accuracy']:.1%}{extremes}"


def _ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis, ties sharing their mean."""
    return (x[..., None] > x[..., None, :]).double().sum(-1) + (x[..., None] == x[..., None, :]).double().sum(-1) / 2


def _spearman(x: Tensor, y: Tensor, seed: int, resamples: int = 2000) -> Estimate:
    """Rank correlation with a percentile interval over resampled members; refused for fewer than four, or where all are equal."""

    def rho(a: Tensor, b: Tensor) -> Tensor:
        a, b = (r - r.mean(-1, keepdim=True) for r in (_ranks(a.double()), _ranks(b.double())))
        return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()

    nothing = torch.tensor(torch.nan, dtype=torch.float64)
    if len(x) < _LEAST or len(x.unique()) < 2 or len(y.unique()) < 2:
        return Estimate(nothing, nothing, nothing, f"{len(x)} heads, or all alike")
    drawn = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    values = torch.cat([rho(x[rows], y[rows]) for rows in drawn.split(max(1, 2**22 // len(x) ** 2))])
    values = values[~values.isnan()]  # the same head drawn again and again has no correlation
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Estimate(rho(x, y), low, high)


@analysis(version=2)
def circuit_repair(
    model: HookedModel,
    prompts: Prompts | PromptPairs,
    circuit: Circuit | None = None,
    *,
    heads: str | Heads | None = None,
    movers: str | Heads | None = None,
    gatherers: str | Heads | None = None,
    options: str = "auto",
    query: str | int = "END",
    question: str = "question",
    among: Among = "vocabulary",
    draws: int = 10,
    seed: int = 0,
) -> CircuitRepairResult:
    """Do heads of a circuit give the right answer once they look where they should?

    The intervention of Merullo et al. 2024 (arXiv 2310.08744, Colored Objects): heads that should tell the movers which options are
    wrong spread their attention over all of them. Their whole attention row of the query is set to 0, except at the tokens of the
    wrong options, which share 1 evenly; values, other rows, other heads, MLPs and norms stay, and all that follows runs free. Which
    options are wrong is read off the right answer, so this tests a mechanism; it is no method to answer with.

    Conditions: no edit; all heads; each group; each head; and controls: the row at the right option; at the options that are not the
    model's own first guess, which takes no knowledge of the answer; at the wrong option that it ranks highest; at random tokens, as
    many; other heads of the same layers; and heads that gather the question, if given, kept from seeing it (the row is
    renormalised), beside other heads of their layers. Accuracies have Wilson intervals, changes on the same prompts an exact
    McNemar test; where prompts share a context both are of means per context, with a sign-flip test, and n counts contexts. Drawn
    controls show their extremes. ``attention`` and ``attribution`` are measured without an edit and with all
    heads edited, for every head.

    Args:
        model: one model; for a pair, call it for each.
        prompts: with one-token answers and options that occur in the prompt; of pairs, the clean ones.
        circuit: a circuit or a result that found one, for its roles, and for its scores as the importance of heads.
        heads: those that are edited: ``L12H3,L13H4; L19H1``, or roles of the circuit, ``inhibition; negative_mover``, which is the default.
        movers: heads, or roles, whose attention and logits are told, edited ones left out; by default the role ``mover``.
        gatherers: heads, or roles, that are kept from the question; by default the role ``gatherer``.
        options: position that names the options' tokens in their order, or several separated by commas; ``auto`` finds that of
            colored_objects, ioi and boxes.
        query: position whose attention rows are set, for heads that name none.
        question: position that gatherers may not see.
        among: the answer must beat the whole ``vocabulary``, or the ``options``.
        draws: how often random tokens and other heads are drawn.
        seed: of the controls, bootstrap and permutations.

    Raises:
        InputError: no heads to edit, unknown heads, roles or positions, a circuit of another model or found on these prompts,
            prompts without options or of a single context, or options behind the query.
    """
    asked = clean_prompts(prompts)
    if among not in ("vocabulary", "options"):
        raise InputError(f"among must be vocabulary or options, but it is {among!r}")
    if type(draws) is not int or draws < 1:
        raise InputError(f"draws must be a number of draws, at least 1, but it is {draws!r}")
    group = grouped(asked.contexts)
    if (contexts := int(group.max()) + 1) < _FEWEST:
        raise InputError(f"circuit_repair needs prompts of at least {_FEWEST} contexts for its intervals, got {contexts}")
    if circuit is not None:
        circuit.check(model.shape).check_unseen(prompts.contexts, prompts.digest)
    named = options if options != "auto" else _found(asked)
    place = Site("pattern", 0, position=query).position  # "4" is token 4, and 0 a token like any other
    query = "END" if place is None else place
    edited = _group(model, circuit, heads, ("inhibition", "negative_mover"), query)
    if edited is None:
        raise InputError("no heads to edit: write heads=L12H3,L13H4, or give a circuit with the role inhibition or negative_mover")
    told = _group(model, circuit, movers, ("mover",), query)
    gathering = _group(model, circuit, gatherers, ("gatherer",), query)
    notes = []
    if gathering is not None and question not in asked.positions:
        if gatherers is not None:
            raise InputError(f"gatherers are kept from {question}, but these prompts name {', '.join(asked.positions)}")
        gathering = None
        notes.append(f"gatherers were left alone, since these prompts have no position {question}")
    planned = conditions(edited, gathering, question, model, draws, seed)
    lacking = {"other heads"} | ({"other heads blocked"} if gathering is not None else set())
    notes += [f"no control with {kind}: a layer has too few" for kind in sorted(lacking - {c.kind for c in planned})]
    places = options_of(asked, named)
    notes += strangers(model, asked, places, named)
    before = answers(model, asked)
    rows = with_rows(asked, places, before.options, query)
    right, margin = [_judged(asked, before, among)], [_margin(asked, before)]
    for condition in progress(planned[1:], "repairs"):
        found = _under(model, condition, rows, places, query, seed)
        right.append(_judged(asked, found, among))
        margin.append(_margin(asked, found))
    along = direction(model, asked)
    states = []
    for condition in planned[:2]:
        with editing(model, condition, query):
            states.append(downstream(model, rows, along, query))
    again = torch.empty(len(asked), dtype=torch.bool)
    for part in (list(range(len(asked)))[i::2] for i in range(min(2, len(asked)))):
        again[part] = _judged(asked[part], answers(model, asked[part]), among)
    return CircuitRepairResult(
        right=torch.stack(right),
        margin=torch.stack(margin),
        attention=torch.stack([s["attention"] for s in states]),
        attribution=torch.stack([s["attribution"] for s in states]),
        importance=importance(circuit, (model.shape.n_layers, model.shape.n_heads)),
        jitter=int((again != right[0]).sum()),
        kinds=tuple(c.kind for c in planned),
        heads=tuple(c.heads for c in planned),
        edited=_pairs(edited),
        movers=_pairs(told),
        among=among,
        chance=float(by_context(torch.tensor([1 / len(o) for o in asked.options or ()], dtype=torch.float64), group).mean()),
        query=str(query),
        draw_seed=seed,
        group=group,
        notes=tuple(notes),
        labels={"condition": tuple(c.name for c in planned), "state": _STATES, "option": ("right", "wrong")},
    )


def _found(prompts: Prompts) -> str:
    """The usual position of options that these prompts have."""
    for text in _USUAL:
        if all(name in prompts.positions for name in text.split(",")):
            return text
    raise InputError(f"which positions are the options? These prompts name {', '.join(prompts.positions)}; write options=NAME or NAME,NAME")


def _group(model: HookedModel, circuit: Circuit | None, text: str | Heads | None, roles: Sequence[str], query: str | int) -> Heads | None:
    """The heads that were written, else those of the usual roles that the circuit has, else none."""
    if text is None:
        known = (
            []
            if circuit is None
            else [role for role in roles if any(circuit.roles.get(n) == role for n in circuit.nodes if n.head is not None)]
        )
        if not known:
            return None
        text = "; ".join(known)
    return check_heads(chosen(text, circuit, query), model)


def _under(model: HookedModel, condition: Condition, rows: Prompts, places: list[list[int]], query: str | int, seed: int) -> Answers:
    """What the model answers under a condition."""
    some = rows if condition.draw < 0 else with_random_tokens(rows, places, query, condition.draw, seed)
    with editing(model, condition, query):
        return answers(model, some)


def _judged(prompts: Prompts, found: Answers, among: Among) -> Bool[Tensor, " prompt"]:
    """Where the answer is the most likely token, of all or of the options."""
    wanted = torch.tensor(prompts.answers)
    if among == "vocabulary":
        return found.said == wanted
    chosen_ = found.options.argmax(1).tolist()
    return torch.tensor([options[i] for options, i in zip(prompts.options or (), chosen_, strict=True)]) == wanted


def _margin(prompts: Prompts, found: Answers) -> Float[Tensor, " prompt"]:
    """Logit of the answer less that of the best other option."""
    right = torch.tensor([o.index(a) for o, a in zip(prompts.options or (), prompts.answers or (), strict=True)])[:, None]
    mine = found.options.gather(1, right)[:, 0]
    return mine - found.options.scatter(1, right, -torch.inf).max(1).values


def _pairs(heads: Heads | None) -> tuple[tuple[int, int], ...]:
    return () if heads is None else tuple(pair for g in heads for pair in g.heads)
