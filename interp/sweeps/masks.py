"""Training a mask over a group of heads: which of them, mixed with other activations, make a model say a given token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.masked import Component, Masked, Mix
from interp.progress import progress
from interp.prompts import PromptPairs
from interp.sites import Site
from interp.sweeps.draws import distinct

if TYPE_CHECKING:
    from interp.models import HookedModel

Ties = Literal["more", "fewer"]
FEWEST = 6
"""Contexts that a search takes: three to train on, and of the others at least one each to choose and to judge by."""

_CHECKED = 8  # runs that are computed again the plain way
_FAR = 64.0  # times the rounding of the largest logit: how far they may be off


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a mask is trained.

    Attributes:
        penalty: what a wholly mixed head costs, in units of the logit.
        rate: of Adam.
        batch: prompts per step.
        epochs: how often every prompt is seen.
        least: steps, for which few prompts are seen more often: in a handful of them no weight gets from 1 to below one half.
        every: steps between two checks on the validation prompts.
        ties: of masks that are right equally often, the one that mixes more heads is kept, or fewer.
        seed: of the order of the prompts.
    """

    penalty: float = 0.01
    rate: float = 0.1
    batch: int = 32
    epochs: int = 2
    least: int = 16
    every: int = 4
    ties: Ties = "more"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """A mask, and how it came about.

    Attributes:
        mask: what every head keeps of its own, of the check that was best.
        loss: of every step, before it.
        steps: after how many steps the mask was checked.
        accuracy: at the checks, on the validation prompts.
        size: how many heads were mixed, at the checks.
        floor: accuracy on the validation prompts of a run in which nothing is mixed.
    """

    mask: Float[Tensor, " head"]
    loss: Float[Tensor, " step"]
    steps: Int[Tensor, " check"]
    accuracy: Float[Tensor, " check"]
    size: Int[Tensor, " check"]
    floor: float

    @property
    def selected(self) -> Bool[Tensor, " head"]:
        """Heads that are mixed when the mask is rounded; none where that was no better than nothing on the validation prompts."""
        if float(self.accuracy.max()) <= self.floor:
            return torch.zeros_like(self.mask, dtype=torch.bool)
        return self.mask < 0.5


@dataclass(frozen=True, eq=False)
class Side:
    """Prompts with the group mixed, and what they are to say."""

    runs: Masked
    target: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, model: HookedModel, prompts: PromptPairs, donor: HookedModel, group: Sequence[Site], component: Component, source: str):
        """Clean prompts of some pairs; activations are the donor's on the ``source`` prompts of the pairs."""
        batch, other = model.batch(prompts.clean), donor.batch(prompts.corrupt if source == "corrupt" else prompts.clean)
        target = prompts.distractors if source == "corrupt" else prompts.answers
        return cls(Masked(model, batch, Mix.of(model, batch, donor, other, group, component)), torch.tensor(target))

    def hits(self, weight: Float[Tensor, " head"]) -> Bool[Tensor, " prompt"]:
        """Where the target is the most likely token of the whole vocabulary."""
        return self.runs.top(weight) == self.target

    def logits(self, weight: Float[Tensor, " head"]) -> Float[Tensor, " prompt"]:
        """The logit of the target."""
        rows = list(range(len(self.target)))
        with torch.no_grad():
            found = [self.runs.logit(weight, rows[at : at + 256], self.target).cpu() for at in range(0, len(rows), 256)]
        return torch.cat(found).float()

    def rounded(self, selected: Bool[Tensor, " head"]) -> Float[Tensor, " head"]:
        """The weights that mix some heads wholly and leave the others alone."""
        return 1.0 - selected.float()

    def checked(self, weight: Float[Tensor, " head"]) -> tuple[int, float]:
        """Some logits again by runs of the whole model: how many, and the largest difference.

        Raises:
            RuntimeError: they are further apart than rounding explains.
        """
        rows = list(range(min(_CHECKED, len(self.target))))
        with torch.no_grad():
            plain = self.runs.plain(weight, rows)
            got = self.runs.logit(weight, rows, self.target)
        want = plain[torch.arange(len(rows)), self.target[rows].to(plain.device)]
        off, eps = float((got - want).abs().max()), max(torch.finfo(plain.dtype).eps, torch.finfo(torch.float32).eps)
        if off > _FAR * eps * float(plain.abs().max()):
            raise RuntimeError(f"a masked run that goes on from a kept one is off by {off:.2g} from a run of the whole model")
        return len(rows), off


def trained(train: Side, validation: Side, schedule: Schedule, desc: str = "mask") -> Trained:
    """The mask that makes prompts say their target, with as few heads mixed as the penalty asks for.

    The loss is ``-mean(logit of the target) + penalty * sum(1 - mask)``; the mask starts at 1, where nothing is mixed, and is
    clamped to [0, 1] before every step of Adam (Prakash et al. 2024, arXiv 2402.14811, after Davies et al. 2023).
    """
    n, prompts = train.runs.weights, len(train.target)
    mask = torch.ones(n, requires_grad=True)
    adam = torch.optim.Adam([mask], lr=schedule.rate)
    epochs = max(schedule.epochs, -(-schedule.least // -(-prompts // schedule.batch)))
    batches = [b for epoch in range(epochs) for b in _order(prompts, schedule, epoch)]
    losses, checks, best = [], list[tuple[int, float, int]](), mask.detach().clone()
    key: tuple[float, float] = (-1.0, 0.0)
    floor = float(validation.hits(torch.ones(n)).float().mean())
    for step, rows in enumerate(progress(batches, desc), 1):
        with torch.no_grad():
            mask.clamp_(0, 1)
        loss = -train.runs.logit(mask, rows, train.target).mean().float().cpu() + schedule.penalty * (1 - mask).sum()
        (mask.grad,) = torch.autograd.grad(loss, [mask])
        adam.step()
        losses.append(float(loss.detach()))
        if step % schedule.every and step < len(batches):
            continue
        now = mask.detach().clamp(0, 1)
        size, right = int((now < 0.5).sum()), float(validation.hits((now >= 0.5).float()).float().mean())
        checks.append((step, right, size))
        if (rank := (right, size if schedule.ties == "more" else -size)) > key:
            key, best = rank, now.clone()
    steps, rights, sizes = zip(*checks, strict=True)
    return Trained(best, torch.tensor(losses), torch.tensor(steps), torch.tensor(rights), torch.tensor(sizes), floor)


def _order(prompts: int, schedule: Schedule, epoch: int) -> list[list[int]]:
    """The batches of an epoch."""
    rows = list(range(prompts))
    random.Random(f"{schedule.seed} epoch {epoch}").shuffle(rows)
    return [rows[at : at + schedule.batch] for at in range(0, prompts, schedule.batch)]


def parts(prompts: PromptPairs, seed: int) -> tuple[PromptPairs, PromptPairs, PromptPairs]:
    """Half of the pairs to train on, a quarter to choose by and a quarter to judge by; no context, clean or corrupt, is in two of them.

    Raises:
        InputError: too few contexts.
    """
    group: dict[str, str] = {}

    def root(context: str) -> str:
        while group.setdefault(context, context) != context:
            context = group[context]
        return context

    for a, b in zip(prompts.clean.contexts, prompts.corrupt.contexts, strict=True):
        group[root(a)] = root(b)
    roots = [root(context) for context in prompts.clean.contexts]
    names = sorted(set(roots))
    if len(names) < FEWEST:
        tied = f", tied together into {len(names)} by their counterfactuals" if len(set(prompts.contexts)) > len(names) else ""
        count = f"{len(prompts)} pairs of {len(set(prompts.contexts))} contexts{tied}"
        raise InputError(f"these are {count}; a mask takes at least {FEWEST} apart, to train, to choose and to judge it on different ones")
    random.Random(f"{seed} contexts").shuffle(names)
    half, most = round(len(names) / 2), round(len(names) * 0.75)
    found = []
    for some in (names[:half], names[half:most], names[most:]):
        there = set(some)
        found.append(prompts[[i for i, name in enumerate(roots) if name in there]])
    return found[0], found[1], found[2]


def random_subsets(selected: Bool[Tensor, " head"], draws: int, seed: int) -> tuple[list[Bool[Tensor, " head"]], int]:
    """As many heads as are selected, at random, no two draws alike and none the selection; and how many such sets there are."""
    n, chosen = len(selected), selected.nonzero().flatten().tolist()
    if not chosen:
        return [], 0
    found = distinct([(range(n), len(chosen))], draws, f"{seed} subset", but=chosen)
    masks = []
    for some in found.sets:
        masks.append(torch.zeros(n, dtype=torch.bool))
        masks[-1][list(some)] = True
    return masks, found.there
