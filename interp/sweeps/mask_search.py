"""A search for the heads of a group that carry a variable: masks for several penalties, judged on held-out prompts beside controls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import plots
from interp.circuit import Circuit, Edge
from interp.errors import InputError
from interp.names import unknown
from interp.prompts import PromptPairs, Prompts
from interp.results import Result
from interp.sites import Heads, Site
from interp.stats import Estimate, mcnemar, paired_change, permutation, recovered, standard_error, wilson
from interp.sweeps.answers import head_groups, heads_of, unseen
from interp.sweeps.draws import checked_draws, how_many
from interp.sweeps.groups import groups_of, head_sites
from interp.sweeps.masks import Schedule, Side, Trained, parts, random_subsets, trained

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, Shape
    from interp.models.masked import Component

TIES = ("more", "fewer")
_CHUNK = 128


@dataclass(frozen=True, eq=False)
class MaskSearchResult(Result):
    """Heads whose activations of another run make the model say the target, judged on held-out prompts.

    Where nothing else is said, the heads are those of the first penalty.

    Attributes:
        mask: what every head keeps of its own; below one half it is selected.
        selected: the heads, none where a mask was no better than nothing on the validation prompts.
        hit: the target is the most likely token with the selected heads mixed in.
        nothing: it is with none of them.
        everything: it is with the whole group.
        control: it is with random heads of the group, as many as are selected, no two draws alike and none the selection.
        choices: how many such sets there are.
        start: logit of the target with nothing mixed in.
        goal: with the selected heads mixed in.
        alone: with one of them.
        loss: before every step.
        validation: accuracy on the validation prompts at the checks.
        unmixed: of doing nothing on the validation prompts, which a mask has to beat.
        size: how many heads were selected then.
        steps: after how many steps.
        labels: the group, and the penalties.
        chosen: the selected heads, in the order of ``alone``.
        sizes: layers, heads and key/value heads of the model.
        split: pairs to train on, to choose by and to judge by.
        contexts: contexts of the first two: what the heads were found on.
        digest_of: digest of all pairs.
        solved: who answers which prompts rightly how often, in words.
        deviation: largest difference of a target's logit from a run of the whole model.
        checked: how many were computed both ways.
        seed_used: of the split, the order of training and the random heads.
        notes: what to be careful about.
    """

    mask: Float[Tensor, "penalty head"]
    selected: Bool[Tensor, "penalty head"]
    hit: Bool[Tensor, "penalty prompt"]
    nothing: Bool[Tensor, " prompt"]
    everything: Bool[Tensor, " prompt"]
    control: Bool[Tensor, "draw prompt"]
    choices: int
    start: Float[Tensor, " prompt"]
    goal: Float[Tensor, " prompt"]
    alone: Float[Tensor, "chosen prompt"]
    loss: Float[Tensor, "penalty step"]
    validation: Float[Tensor, "penalty check"]
    unmixed: float
    size: Int[Tensor, "penalty check"]
    steps: Int[Tensor, " check"]
    labels: dict[str, tuple[str, ...]]
    chosen: tuple[str, ...]
    sizes: tuple[int, int, int]
    split: tuple[int, int, int]
    contexts: tuple[str, ...]
    digest_of: str
    solved: str
    deviation: float
    checked: int
    seed_used: int
    notes: tuple[str, ...]

    @property
    def heads(self) -> Heads | None:
        """The selected heads, or None."""
        return self.circuit.heads() if self.chosen else None

    @property
    def circuit(self) -> Circuit:
        """The selected heads as nodes, scored by 1 - mask, with the contexts they were found on."""
        nodes = tuple(Site.parse(text) for text in self.chosen)
        kept = self.mask[0, self.selected[0]].double().tolist()
        scores: dict[Site | Edge, float] = {node: 1 - value for node, value in zip(nodes, kept, strict=True)}
        return Circuit(self.sizes, nodes, scores=scores, prompts=self.digest_of, contexts=self.contexts)

    @property
    def accuracy(self) -> float:
        """Share of held-out prompts that get the target with the selected heads mixed in."""
        return float(self.hit[0].double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return _interval(self.hit[0])

    @property
    def floor(self) -> float:
        """The accuracy of doing nothing."""
        return float(self.nothing.double().mean())

    @property
    def ceiling(self) -> float:
        """The accuracy with the whole group mixed in."""
        return float(self.everything.double().mean())

    @property
    def random_heads(self) -> Float[Tensor, " draw"]:
        """The accuracy of every draw of random heads."""
        return self.control.double().mean(-1)

    @property
    def change(self) -> tuple[float, float]:
        """95 % interval of accuracy - floor, on the same prompts."""
        gained, lost = int((self.hit[0] & ~self.nothing).sum()), int((~self.hit[0] & self.nothing).sum())
        return paired_change(gained, lost, len(self.nothing))

    @property
    def p_value(self) -> float:
        """Exact McNemar test that the selected heads do as well as nothing."""
        return mcnemar(int((self.hit[0] & ~self.nothing).sum()), int((~self.hit[0] & self.nothing).sum()))

    @property
    def recovered(self) -> Estimate:
        """Share of what all selected heads do to the logit of the target that each does alone, [chosen]; 95 % interval."""
        return recovered(self.alone.T, self.start, self.goal, seed=self.seed_used)

    @property
    def resolved(self) -> bool:
        """Whether the selected heads move the logit by more than two standard errors."""
        return bool(self.chosen) and recovered(self.start, self.start, self.goal, resamples=2).refused is None

    def told(self) -> str:
        """What is mixed in, in words."""
        return "activations of the counterfactual"

    def summary(self) -> str:
        """The heads, the accuracy with its interval, and what nothing, everything and random heads give."""
        n, group = len(self.nothing), len(self.labels["head"])
        nothing = f"{self.floor:.1%} with nothing mixed in"
        everything = f"{self.ceiling:.1%} with all {group}"
        if not self.chosen:
            main = f"0 of {group} heads are selected: {self.why_none(0)}; the target comes on {nothing} and {everything}"
        else:
            low, high = self.interval
            many = how_many(len(self.control), self.choices)
            random = f" and {_spread(self.random_heads)} with as many random ones ({many})" if len(self.control) else ""
            main = (
                f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}] of held-out prompts get the target with {len(self.chosen)} of {group} heads"
            )
            verdict = f"p = {self.p_value:.1g} against nothing" + (", no better than it" if self.change[0] <= 0 else "")
            main += f" ({_shortened(self.chosen)}) mixed in, {nothing} ({verdict}), {everything}{random}"
        exact = f"{self.checked} runs checked the plain way are off by at most {self.deviation:.1g}"
        return "; ".join([f"{main} ({self.told()}; n = {n} prompts; {self.solved}; {exact})", *self.notes])

    def why_none(self, penalty: int) -> str:
        """Why no head is selected at a penalty, whatever its mask is; empty where some are."""
        if bool(self.selected[penalty].any()):
            return ""
        best, least = float(self.validation[penalty].max()), self.unmixed
        if best <= least:
            return f"no mask beat doing nothing on the {self.split[1]} validation prompts ({best:.1%}, {least:.1%} with nothing mixed in)"
        return f"the mask that was best on the {self.split[1]} validation prompts mixes no head by more than one half"

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per penalty and head, with the accuracy of the penalty's heads; ``per="prompt"`` one row per held-out prompt.

        ``selected`` are heads whose ``mask`` is below one half, if the mask was better than doing nothing on the validation prompts
        (``validation`` and ``validation_nothing``); ``why_none`` says why there are none.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            names = {"nothing": self.nothing, "hit": self.hit[0], "everything": self.everything, "start": self.start, "goal": self.goal}
            alone = {f"alone {name}": x for name, x in zip(self.chosen, self.alone, strict=True)}
            table = {name: x.numpy() for name, x in {**names, **alone}.items()}
            return pd.DataFrame({"prompt": range(len(self.nothing)), **table})
        rows = []
        for i, penalty in enumerate(self.labels["penalty"]):
            low, high = _interval(self.hit[i])
            of = {"accuracy": float(self.hit[i].double().mean()), "low": low, "high": high, "heads": int(self.selected[i].sum())}
            of |= {"validation": float(self.validation[i].max()), "validation_nothing": self.unmixed, "why_none": self.why_none(i)}
            for name, mask, chosen in zip(self.labels["head"], self.mask[i].tolist(), self.selected[i].tolist(), strict=True):
                rows.append({"penalty": float(penalty), "site": name, "mask": mask, "selected": chosen, **of})
        return pd.DataFrame(rows)

    def strongest(self, n: int = 10) -> pd.DataFrame | None:
        """The selected heads by what each does to the logit of the target alone; None where none is selected."""
        import pandas as pd

        if not self.chosen:
            return None
        effect, share = self.alone - self.start, self.recovered
        test = permutation(effect.T, seed=self.seed_used)
        columns = {"effect": effect.double().mean(-1), "effect_se": standard_error(effect.T)}
        columns |= {"recovered": share.value, "low": share.low, "high": share.high, "p": test.p, "p_adjusted": test.adjusted}
        frame = pd.DataFrame({"site": self.chosen, **{name: x.double().numpy() for name, x in columns.items()}})
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True).head(n)

    def plot(self) -> go.Figure:
        """Accuracy of nothing, of random heads, of the selected heads for every penalty, and of the whole group."""
        n = len(self.nothing)
        chosen = [f"{int(s.sum())} heads, penalty {p}" for s, p in zip(self.selected, self.labels["penalty"], strict=True)]
        names, hits = ["nothing", *chosen, f"all {self.mask.shape[1]} heads"], [self.nothing, *self.hit, self.everything]
        values, ends = [float(x.double().mean()) for x in hits], [_interval(x) for x in hits]
        if len(self.control):
            names.insert(1, f"{len(self.chosen)} random head{'s' * (len(self.chosen) != 1)}")
            values.insert(1, float(self.random_heads.mean()))
            ends.insert(1, (float(self.random_heads.min()), float(self.random_heads.max())))
        drawn = f"; of random heads the range of {how_many(len(self.control), self.choices)}" if len(self.control) else ""
        return plots.bars(
            names,
            {"accuracy": values},
            intervals={"accuracy": ([low for low, _ in ends], [high for _, high in ends])},
            title=f"Target with {self.told()} (n = {n}, 95 % intervals{drawn})",
            xlabel="mixed in",
            ylabel="share of prompts with the target",
        )

    def figures(self) -> dict[str, go.Figure]:
        """Accuracy, the mask by layer and head, and the validation accuracy during training."""
        found = {"": self.plot()}
        sites = [Site.parse(text) for text in self.labels["head"]]
        which = self.why_none(0)
        which = f"none is selected: {which}" if which else "selected above one half"
        for place in dict.fromkeys(site.position for site in sites):
            mixed = torch.full(self.sizes[:2], torch.nan)
            for site, value in zip(sites, self.mask[0].tolist(), strict=True):
                if site.position == place:
                    mixed[site.layer or 0, site.head or 0] = 1 - value
            found[f"Mask at {place}"] = plots.heatmap(
                mixed,
                title=f"How far each head of the group is mixed at {place} ({which})",
                xlabel="head",
                ylabel="layer",
                unit="1 - mask",
                limits=(0.0, 1.0),
                difference=False,
            )
        series = {f"penalty {p}": v for p, v in zip(self.labels["penalty"], self.validation, strict=True)}
        series["nothing mixed in"] = torch.full_like(self.validation[0], self.unmixed)
        title = f"Training: accuracy on {self.split[1]} validation prompts"
        found["Training"] = plots.lines(series, self.steps, title=title, xlabel="step", ylabel="share of prompts with the target")
        return found


def group_of(text: Heads | str | None, shape: Shape, circuit: Circuit | None = None) -> list[Site]:
    """The heads of a group, at END where no position is named; every head of the upper half of the layers where nothing is.

    Of a circuit a group is a role, or all its heads.

    Raises:
        InputError: a text that names something else than heads.
    """
    if circuit is not None and (text is None or str(text) in circuit.roles.values()):
        found = heads_of(circuit) if text is None else head_groups(circuit).get(str(text), ())
        if not found:
            raise InputError(f"the role {text} of the circuit has no attention heads")
        return [s if s.position is not None else s.at("END") for s in found]
    if text is None:
        return [s for s in head_sites("z", shape, "END") if (s.layer or 0) >= shape.n_layers // 2]
    sites = [s for group in groups_of(text, "z", shape).values() for s in group]
    if wrong := [s for s in sites if s.component != "z"]:
        raise InputError(f"{wrong[0]} in the group is no head; a mask is over heads, as in L2H0,L2H3@END or heads@END")
    return list(dict.fromkeys(s if s.position is not None else s.at("END") for s in sites))


def check_circuit(circuit: Circuit | None, prompts: Prompts | PromptPairs, shape: Shape) -> None:
    """Refuse a circuit of another model, or one that was found on contexts of these prompts.

    Raises:
        InputError: as said.
    """
    if circuit is not None:
        unseen(prompts, circuit.check(shape))


def check_targets(prompts: object) -> None:
    """Refuse pairs without a target, and those whose target is what doing nothing gives.

    Raises:
        InputError: as said.
    """
    if not isinstance(prompts, PromptPairs):
        raise InputError(
            f"a variable moves from a counterfactual into a clean prompt, which takes PromptPairs, not {type(prompts).__name__}"
        )
    if prompts.distractors is None:
        raise InputError("the target is the distractor of a clean prompt, the answer if the variable moved over, and these pairs have none")
    if prompts.answers is not None and prompts.corrupt.answers is None:
        of = prompts.task
        way = "; take corrupt=object, label or position" if of.startswith("boxes") else "; take counterfactuals that have one"
        raise InputError(f"the counterfactuals{f' of {of}' if of else ''} have no answer, so there is no variable whose value moves{way}")
    if prompts.answers is not None:
        same = sum(a == b for a, b in zip(prompts.answers, prompts.distractors, strict=True))
        if same:
            raise InputError(
                f"in {same} of {len(prompts)} pairs the target is the clean answer, which doing nothing gives; leave these out"
            )


def schedule_of(penalty: Any, **settings: Any) -> Schedule:
    """How to train.

    Raises:
        InputError: a setting out of range.
    """
    numbers = {"penalty": (penalty, 0.0), "rate": (settings["rate"], 0.0)}
    for name, (value, least) in numbers.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not least <= value < float("inf")
            or (name == "rate" and not value)
        ):
            raise InputError(f"{name} is {value!r}, expected a number {'above' if name == 'rate' else 'from'} 0")
    for name in ("batch", "epochs"):
        if type(settings[name]) is not int or settings[name] < 1:
            raise InputError(f"{name} is {settings[name]!r}, expected at least 1")
    if settings["ties"] not in TIES:
        raise unknown("ties", str(settings["ties"]), TIES)
    return Schedule(penalty=float(penalty), **settings)


def search(
    model: HookedModel,
    prompts: PromptPairs,
    donor: HookedModel,
    group: Sequence[Site],
    schedules: Sequence[Schedule],
    *,
    component: Component = "z",
    source: str = "corrupt",
    control: int = 10,
    names: tuple[str, str] = ("the model", "the model"),
) -> dict[str, Any]:
    """The fields of a ``MaskSearchResult``.

    Args:
        model: the model that heads are mixed in.
        prompts: pairs; what is judged are the clean ones.
        donor: the model activations are taken from.
        group: heads, each at a position.
        schedules: one per penalty, the main one first; all have one seed.
        component: what is mixed.
        source: ``corrupt``: activations of the counterfactual, and the target is the clean distractor; ``clean``: of the same
            prompts, and the target is their answer.
        control: draws of random heads.
        names: of model and donor.

    Raises:
        InputError: heads or positions that are not there, or too few contexts.
    """
    checked_draws(control)
    seed = schedules[0].seed
    split = parts(prompts, seed)
    solved, notes = _solved(model, donor, split[0], source, names)
    train, validation, test = (Side.of(model, some, donor, group, component, source) for some in split)
    found = [trained(train, validation, s, f"mask, penalty {s.penalty:g}") for s in schedules]
    selected = torch.stack([t.selected for t in found])
    draws, there = random_subsets(selected[0], control, seed)
    lone = [torch.arange(len(group)) == i for i in selected[0].nonzero().flatten().tolist()]
    checked, deviation = test.checked(0.25 + 0.5 * found[0].mask)  # no weight at its end, so that every head is seen
    if int(selected[0].sum()) and not draws and control:
        notes.append("no random heads: the whole group is selected, and there is no other set of as many")
    if draws and len(draws) == there:
        notes.append(f"of as many random heads there {'is one other set' if there == 1 else f'are {there} other sets'} in the group")
    return {
        "mask": torch.stack([t.mask for t in found]),
        "selected": selected,
        "hit": torch.stack([test.hits(test.rounded(s)) for s in selected]),
        "nothing": test.hits(torch.ones(len(group))),
        "everything": test.hits(torch.zeros(len(group))),
        "control": _stacked([test.hits(test.rounded(s)) for s in draws], len(test.target), torch.bool),
        "choices": there,
        "unmixed": found[0].floor,
        "start": test.logits(torch.ones(len(group))),
        "goal": test.logits(test.rounded(selected[0])),
        "alone": _stacked([test.logits(test.rounded(s)) for s in lone], len(test.target), torch.float32),
        **_training(found),
        "labels": {"head": tuple(map(str, group)), "penalty": tuple(f"{s.penalty:g}" for s in schedules)},
        "chosen": tuple(str(s) for s, there in zip(group, selected[0].tolist(), strict=True) if there),
        "sizes": (model.shape.n_layers, model.shape.n_heads, model.shape.n_kv_heads),
        "split": tuple(len(s) for s in split),
        "contexts": tuple(sorted({c for some in split[:2] for c in some.contexts})),
        "digest_of": prompts.digest,
        "solved": solved,
        "deviation": deviation,
        "checked": checked,
        "seed_used": seed,
        "notes": (*notes, *([f"every run is one of the whole model: {why}"] if (why := test.runs.allowed.obstacle) else [])),
    }


def _training(found: Sequence[Trained]) -> dict[str, Tensor]:
    every = {"loss": "loss", "validation": "accuracy", "size": "size"}
    return {name: torch.stack([getattr(t, of) for t in found]) for name, of in every.items()} | {"steps": found[0].steps}


def _solved(model: HookedModel, donor: HookedModel, prompts: PromptPairs, source: str, names: tuple[str, str]) -> tuple[str, list[str]]:
    """How often the models answer the prompts rightly, in words; told at once where it is no better than a guess."""
    # What the sender knows about the same prompts is what can move: there a receiver that knows nothing has the most to gain.
    asked = [(names[0], model, "clean", prompts.clean)] if source == "corrupt" else []
    asked += [(names[1], donor, source, prompts.corrupt if source == "corrupt" else prompts.clean)]
    said, notes = [], []
    for name, who, which, some in asked:
        if some.answers is None:
            continue
        right = _right(who, some)
        guess = sum(1 / len(o) for o in some.options) / len(some) if some.options else 1 / who.shape.d_vocab
        said.append(f"{name} answers {float(right.double().mean()):.0%} of {len(some)} {which} prompts rightly")
        if _interval(right)[0] <= guess:
            notes.append(f"{name} answers the {which} prompts no better than a guess, so there may be no variable to find")
            warnings.warn(f"{said[-1]}, no better than a guess: there may be no variable to find", stacklevel=4)
    return ", ".join(said) or "no answers to judge the models by", notes


def _right(model: HookedModel, prompts: Prompts) -> Bool[Tensor, " prompt"]:
    batch, found = model.batch(prompts), []
    for at in range(0, len(prompts), _CHUNK):
        found.append(model.logits(batch[at : at + _CHUNK], at="END").argmax(-1).cpu())
    return torch.cat(found) == torch.tensor(prompts.answers)


def _interval(hits: Tensor) -> tuple[float, float]:
    return wilson(int(hits.sum()), len(hits))


def _stacked(rows: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    return torch.stack(list(rows)) if rows else torch.zeros(0, width, dtype=dtype)


def _spread(values: Tensor) -> str:
    """Mean and range."""
    return f"{float(values.mean()):.1%} [{float(values.min()):.1%}, {float(values.max()):.1%}]"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(name.replace(".z", "") for name in names[:8]) + more
