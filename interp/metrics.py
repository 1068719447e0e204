"""What a run of a model is judged by: one number per prompt, read off the logits.

A ``Metric`` says what it reads (a position, and which tokens of the vocabulary there) and how one
number per prompt follows. Sweeps need to know what is read, so that they unembed nothing else. Text
forms: ``logit_diff``, ``answer_prob@S2`` (the same metric at another position).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.names import unknown

TOKENS = ("answer", "distractor")
"""The tokens of a prompt that a metric may ask for by name."""


class HasAnswers(Protocol):
    """What a metric wants to know about prompts; ``Prompts`` and ``PromptPairs`` say it."""

    @property
    def answers(self) -> Sequence[int] | None:
        """Token id of the right continuation of each prompt."""
        ...

    @property
    def distractors(self) -> Sequence[int] | None:
        """Token id of the wrong continuation of each prompt."""
        ...


@dataclass(frozen=True, eq=False)
class Targets:
    """What is known about the continuation of each prompt.

    Attributes:
        answers: token id of the answer, [prompt], or None.
        distractors: token id of the distractor, [prompt], or None.
        reference: logits of a reference run at the position that is read, [prompt vocab], or None.
    """

    answers: Int[Tensor, " prompt"] | None = None
    distractors: Int[Tensor, " prompt"] | None = None
    reference: Float[Tensor, "prompt vocab"] | None = None


MetricFunction = Callable[[Tensor, Targets], Tensor]


@dataclass(frozen=True, eq=False)
class Metric:
    """One number per prompt from the logits at one position.

    Attributes:
        name: its word; ``Metric.parse`` reads it.
        function: ``function(read, targets) -> [prompt]``; ``read`` is [prompt vocab], or [prompt token]
            with the columns of ``tokens`` in that order.
        unit: of the values, for axes.
        position: where the logits are read: a named position with one token per prompt, or an integer.
        tokens: names out of ``TOKENS``, or None for the whole vocabulary.
        needs: parts of ``Targets`` that must be there.
        own: written by the user: no text form brings it back.
    """

    name: str
    function: MetricFunction
    unit: str = ""
    position: str | int = "END"
    tokens: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()
    own: bool = False

    def __str__(self) -> str:
        """The text form; a user's own function has none that could be read back."""
        name = "user function" if self.own else self.name
        return name if self.own or self.position == "END" else f"{name}@{self.position}"

    def at(self, position: str | int) -> Metric:
        """The same metric at another position."""
        return replace(self, position=position)

    @property
    def needs_reference(self) -> bool:
        """True when the values are relative to the logits of another run."""
        return "reference" in self.needs

    @classmethod
    def parse(cls, metric: str | Metric | MetricFunction) -> Metric:
        """Read a metric: a name, a name with a position, a ``Metric``, or a function ``(logits, targets) -> [prompt]``.

        Raises:
            InputError: no metric has this name; the message lists the nearest ones.
        """
        if isinstance(metric, Metric):
            return metric
        if callable(metric):
            return cls(getattr(metric, "__name__", type(metric).__name__), metric, own=True)
        name, _, place = str(metric).strip().partition("@")
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if not place:
            return METRICS[name]
        return METRICS[name].at(int(place) if place.lstrip("-").isdigit() else place)

    def reader(self, prompts: HasAnswers, reference: Float[Tensor, "prompt vocab"] | None = None) -> Reader:
        """Bind the metric to prompts: their answers and, where it needs one, a reference run.

        Raises:
            InputError: the prompts lack an answer or a distractor that the metric needs.
        """
        targets = Targets(_ids(prompts, "answers"), _ids(prompts, "distractors"), reference)
        for need in self.needs:
            if getattr(targets, need) is None:
                what = "the logits of a reference run" if need == "reference" else f"one {need[:-1]} token per prompt"
                raise InputError(f"the metric {self.name} needs {what}, and these prompts come without")
        columns = None if self.tokens is None else torch.stack([getattr(targets, f"{t}s") for t in self.tokens], dim=1)
        return Reader(self, targets, columns)


@dataclass(frozen=True, eq=False)
class Reader:
    """A metric bound to prompts: logits in, one number per prompt out.

    Attributes:
        metric: the metric.
        targets: answers, distractors and reference of the prompts.
        columns: token ids that are read, [prompt token], or None for the whole vocabulary.
    """

    metric: Metric
    targets: Targets
    columns: Int[Tensor, "prompt token"] | None

    @property
    def position(self) -> str | int:
        """Where the logits are read."""
        return self.metric.position

    def __getitem__(self, rows: slice | list[int] | Tensor) -> Reader:
        """The reader of some of the prompts."""
        part = {k: None if v is None else v[rows] for k, v in vars(self.targets).items()}
        return Reader(self.metric, Targets(**part), None if self.columns is None else self.columns[rows])

    def __call__(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        """The values of a run, from its logits at ``position``."""
        if logits.ndim != 2:
            raise ValueError(f"the metric {self.metric.name} reads logits of shape [prompt vocab], not {list(logits.shape)}")
        if self.columns is None:
            return self.values(logits)
        columns = self.columns.to(logits.device)
        if columns.numel() and int(columns.max()) >= logits.shape[1]:
            raise InputError(f"token {int(columns.max())} is outside the vocabulary of {logits.shape[1]} tokens that the logits cover")
        return self.values(logits.gather(1, columns))

    def values(self, read: Tensor) -> Float[Tensor, " prompt"]:
        """The values from what was read: [prompt token] with the columns of ``columns``, or [prompt vocab].

        Raises:
            InputError: the logits are not finite (fp16 overflow, say), or a user's function gave another shape.
        """
        targets = Targets(**{k: None if v is None else v.to(read.device) for k, v in vars(self.targets).items()})
        out = self.metric.function(read.float(), targets)
        if not isinstance(out, Tensor) or out.shape != read.shape[:1]:
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"the metric {self.metric.name} has to give one value per prompt, shape [{read.shape[0]}], and gave {shape}")
        if out.isnan().any():
            row = int(out.isnan().nonzero()[0])
            raise InputError(f"the metric {self.metric.name} is NaN on prompt {row}: the logits are not finite; try dtype=float32")
        return out.float()


def _ids(prompts: HasAnswers, field: str) -> Int[Tensor, " prompt"] | None:
    ids = getattr(prompts, field, None)
    return None if ids is None else torch.as_tensor(ids, dtype=torch.long)


def _logit_diff(read: Tensor, targets: Targets) -> Tensor:
    return read[:, 0] - read[:, 1]


def _answer_logprob(logits: Tensor, targets: Targets) -> Tensor:
    return logits.log_softmax(-1).gather(1, _answers(logits, targets)[:, None])[:, 0]


def _answer_prob(logits: Tensor, targets: Targets) -> Tensor:
    return _answer_logprob(logits, targets).exp()


def _accuracy(logits: Tensor, targets: Targets) -> Tensor:
    # NaN compares false with everything, so argmax would call a broken run merely wrong
    right = (logits.argmax(-1) == _answers(logits, targets)).float()
    return torch.where(logits.isnan().any(-1), torch.nan, right)


def _kl(logits: Tensor, targets: Targets) -> Tensor:
    assert targets.reference is not None
    if targets.reference.shape != logits.shape:
        raise ValueError(f"the reference has logits of shape {list(targets.reference.shape)}, the run {list(logits.shape)}")
    return kl_divergence(targets.reference.float().log_softmax(-1), logits.log_softmax(-1))


def _answers(logits: Tensor, targets: Targets) -> Tensor:
    assert targets.answers is not None
    if targets.answers.numel() and int(targets.answers.max()) >= logits.shape[1]:
        raise InputError(f"answer token {int(targets.answers.max())} is outside the vocabulary of {logits.shape[1]} tokens")
    return targets.answers


def kl_divergence(logp: Float[Tensor, "... vocab"], logq: Float[Tensor, "... vocab"]) -> Float[Tensor, " ..."]:
    """KL(p || q) in nats from log-probabilities.

    Summed as p log(p/q) - p + q: every term is >= 0, and the first-order rounding errors of p, q and the two
    normalisations cancel, so that a small divergence is not drowned (a floor of about 1e-12 instead of 1e-7 in
    float32). A token that both exclude (-inf) adds nothing; one that only q excludes makes it infinite.
    """
    p, q = logp.exp(), logq.exp()
    x = torch.where(p == 0, 0.0, logp - logq)
    # near p = q the three terms are far larger than their sum: write -p + q as p (e^-x - 1)
    return torch.where((x.abs() < 1) & (p > 0), p * (x + torch.expm1(-x.clamp(-1, 1))), p * x - p + q).sum(-1)


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("logit_diff", _logit_diff, "logit(answer) - logit(distractor)", tokens=TOKENS, needs=("answers", "distractors")),
        Metric("answer_logprob", _answer_logprob, "log p(answer), nats", needs=("answers",)),
        Metric("answer_prob", _answer_prob, "p(answer)", needs=("answers",)),
        Metric("kl", _kl, "KL(clean || run), nats", needs=("reference",)),
        Metric("accuracy", _accuracy, "share of prompts with the answer on top", needs=("answers",)),
    )
}
"""The metrics with a name. ``accuracy`` is 1 where the answer is the most likely token of the whole
vocabulary; ``kl`` is measured from the reference run to the run."""
