"""The parts of a plan: rows, the steps they become, what a step takes and how fast the machine is."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from interp.errors import InputError
from interp.inputs import Session, stamp
from interp.names import AND

if TYPE_CHECKING:
    from interp.models import HookedModel, ModelPair
    from interp.results import Result

Source = Literal[
    "text",
    "task",
    "best task",
    "task or text",
    "task and text",
    "sets",
    "against text",
    "circuit",
    "tuned circuit",
    "two circuits",
    "both circuits",
    "variables",
    "factors",
    "canaries",
]
OF_BEST = ("best task", "task or text", "task and text")
"""Sources that take the task which tuning taught best."""

OF_CIRCUITS = ("circuit", "tuned circuit", "two circuits", "both circuits", "variables")
"""Sources that take what circuit_discovery found."""

_SECONDS_PER_WEIGHT = 2e-8  # read, subtracted and factorised on one core


@dataclass(frozen=True)
class Sizes:
    """What the work of a step depends on.

    Attributes:
        prompts: how many.
        length: of a prompt in tokens, on average.
        places: named positions of a prompt.
        layers: of the model.
        heads: of a layer.
        factors: numbers in the Kronecker factors of all matrices of the blocks.
    """

    prompts: int = 0
    length: float = 0
    places: int = 1
    layers: int = 1
    heads: int = 1
    factors: float = 0

    @property
    def patches(self) -> int:
        """Runs of activation patching: three parts of the stream at every place, and every head."""
        return self.layers * (3 * self.places + self.heads)


@dataclass(frozen=True)
class Work:
    """What a step takes, roughly: enough to tell minutes from hours.

    Attributes:
        tokens: how many tokens go through a model, all runs together.
        passes: how many times all weights of a model are read and factorised.
        saved: bytes of the result on disk.
    """

    tokens: float = 0
    passes: float = 0
    saved: float = 0


@dataclass(frozen=True)
class Row:
    """One line of the plan.

    Attributes:
        analysis: its name; its first input is the pair.
        source: where its second input comes from: ``text`` (the user's prompts or shipped plain text),
            ``task`` (one step per task), ``best task`` (the one that tuning taught best), ``task or text`` (the same, and text where no
            task was named), ``task and text`` (the same, and text as the third input), ``sets`` (text and all tasks, mixed),
            ``against text`` (the task that tuning changed most, and text as the third input), ``circuit`` (fresh prompts of the
            best task, and the circuit of base that was found on it), ``tuned circuit`` (the same with that of tuned),
            ``two circuits`` (those of base and tuned, and no pair), ``both circuits`` (fresh prompts of the best task, and both),
            ``variables`` (fresh prompts of the best task for each of its variables, and the circuit of tuned), ``factors`` (the
            Kronecker factors of base over text, and that text), ``canaries`` (what the shipped base was made to recite), or none.
        prompts: number of prompts at each effort; at an effort that is not there the row is left out.
        work: what a step takes.
        draws: it takes the task itself and draws as many prompts as its setting ``n`` says.
        settings: those that differ from the analysis's own defaults, by the prompts at hand.
        demanding: it asks more of prompts than others do; where they do not have it, it is left out and nothing has failed.
        alone: its first input is the tuned model alone.
    """

    analysis: str
    source: Source | None
    prompts: Mapping[str, int]
    work: Callable[[Sizes], Work]
    draws: bool = False
    settings: Callable[[Any], dict[str, Any]] = lambda prompts: {}
    demanding: bool = False
    alone: bool = False

    def at(self, effort: str) -> bool:
        """Whether it is part of the comparison at an effort."""
        return not self.prompts or effort in self.prompts

    @property
    def chosen(self) -> bool:
        """Of its steps only one is taken, by what was found before."""
        return self.source in (*OF_BEST, "against text", *OF_CIRCUITS)


@dataclass(frozen=True)
class Gap:
    """A step without a result, and why.

    Attributes:
        what: analysis and inputs, for a person.
        why: one sentence.
        failed: it could not be done; False where it was only left out.
        command: how to run it alone.
    """

    what: str
    why: str
    failed: bool = True
    command: str = ""

    def __str__(self) -> str:
        """For the page: a sentence, and the command on a line of its own."""
        return f"{self.what}: {self.why}" + (f"\n{self.command}" if self.command else "")


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave: results in the order of the plan, pair by pair, and the steps without one."""

    results: tuple[Result, ...]
    gaps: tuple[Gap, ...]
    page: Path | None = None


@dataclass(frozen=True)
class Step:
    """One analysis of one pair.

    Attributes:
        row: its line of the plan.
        base: what was written for the base.
        tuned: what was written for the tuned model.
        on: what was written for its prompts or its task; empty for weights.
        n: number of prompts; of each set where there are two.
        against: what was written for the prompts it is told from; empty where there are none.
        seed: of its prompts.
        given: circuits that a step before found, or factors that were collected, by the name of the input; the files, if there are any.
    """

    row: Row
    base: Any
    tuned: Any
    on: str = ""
    n: int = 0
    against: str = ""
    seed: int = 0
    given: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Analysis and input, for a person."""
        if self.row.source == "two circuits":
            return f"{self.row.analysis} of base and tuned"
        return self.row.analysis + (f" on {self.on}" if self.on else "") + (f" against {self.against}" if self.against else "")

    @property
    def announced(self) -> str:
        """The same, before anybody knows which task it will be."""
        if self.row.source == "sets":
            return f"{self.row.analysis} on {self.on.count(AND) + 1} sets of prompts"
        which: dict[str | None, str] = dict.fromkeys((*OF_BEST, *OF_CIRCUITS), "the task learned best")
        del which["two circuits"]
        which["variables"] = "each variable of the task learned best"
        which["against text"] = f"the task changed most, against {self.against}"
        return f"{self.row.analysis} on {which[self.row.source]}" if self.row.source in which else str(self)

    def arguments(self, session: Session) -> tuple[list[Any], dict[str, Any]]:
        """Inputs and settings of the call.

        Raises:
            InputError: the models do not pair, or the prompts do not fit their tokenizer.
        """
        from interp.tasks import task

        pair, given = session.pair(self.base, self.tuned), [value for value, _ in self.given.values()]
        if self.row.source is None:
            return [pair], {}
        if self.row.source in (*OF_CIRCUITS, "factors") and not given:
            raise InputError("no circuit was found, or no factors collected, before")
        if self.row.source == "two circuits":
            return given, {}
        if self.row.draws:
            return [pair, task(self.on)], {"n": self.n}
        prompts = session.prompts(self.on, pair, self.n, self.seed)
        if self.row.source in ("best task", "task or text", *OF_CIRCUITS):
            return [pair.tuned if self.row.alone else pair, prompts, *given], self.row.settings(prompts)
        if self.row.source == "factors":
            return [pair, *given, *self.singles(session)], self.row.settings(prompts)
        return [pair, *self.singles(session)], self.row.settings(prompts)

    @property
    def named(self) -> dict[str, str]:
        """Parameter -> what was written for it."""
        if not self.against:
            return {"prompts": self.on}
        names = ("prompts", "text") if self.row.source == "task and text" else ("positive", "negative")
        return dict(zip(names, (self.on, self.against), strict=True))

    def singles(self, session: Session) -> list[Any]:
        """Its sets of prompts, of pairs the clean ones."""
        pair = session.pair(self.base, self.tuned)
        made: list[Any] = [session.prompts(on, pair, self.n) for on in (self.on, self.against) if on]
        return [getattr(prompts, "clean", prompts) for prompts in made]

    def stamped(self, result: Result, session: Session) -> Result:
        """The result with what was written for its inputs."""
        sides = (("model", self.tuned),) if self.row.alone else (("base", self.base), ("tuned", self.tuned))
        models = {side: what for side, what in sides if isinstance(what, str)}
        n: Any = self.n or None
        written: Any = self.named if self.against else self.on if self.row.source else ""
        if self.given:
            written, n = {"prompts": self.on} | {name: file for name, (_, file) in self.given.items()}, {"prompts": n}
        return stamp(result, session.loading, models, prompts=written, n=n)

    def work(self, session: Session) -> Work:
        """What it takes, from the lengths of its prompts."""
        shape = session.pair(self.base, self.tuned).shape
        if not self.on:
            return self.row.work(Sizes(layers=shape.n_layers, heads=shape.n_heads, factors=_factors(shape)))
        some = self.singles(session)
        rows = [ids for prompts in some for ids in prompts.ids]
        places = sum(all(len(p) == 1 for p in where) for where in some[0].positions.values())
        return self.row.work(Sizes(len(rows), sum(map(len, rows)) / len(rows), places, shape.n_layers, shape.n_heads, _factors(shape)))

    def command(self, session: Session) -> str:
        """The line that runs this step alone; empty for models that are objects."""
        if not (isinstance(self.base, str) and isinstance(self.tuned, str)):
            return ""
        files = [f"--{name}={file}" for name, (_, file) in self.given.items()]
        if self.row.source == "two circuits":
            return shlex.join(["interp", "run", self.row.analysis, *files])
        models = [f"--model={self.tuned}"] if self.row.alone else [f"--base={self.base}", f"--tuned={self.tuned}"]
        words = ["interp", "run", self.row.analysis, *models, *session.loading.flags()]
        if self.row.draws:
            words += [f"--task={self.on}", f"--n={self.n}"]
        elif self.on:
            words += [word for side, written in self.named.items() for word in (f"--{side}={written}", f"--{side}-n={self.n}")]
            words += [f"--prompts-seed={self.seed}"] if self.seed else []
            words += [_flag(name.replace("_", "-"), value) for name, value in self.arguments(session)[1].items()]
        return shlex.join([*words, *files])


def _factors(shape: Any) -> float:
    """How many numbers the Kronecker factors have: a square of what each matrix reads, and one of what it writes."""
    z, wide = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    maps = {"q": z, "k": wide, "v": wide, "up": shape.d_mlp} | ({"gate": shape.d_mlp} if shape.gated else {})
    read = 2 * shape.d_model**2 + z**2 + shape.d_mlp**2  # before attention, before the MLP, before W_O and before W_out
    return shape.n_layers * (read + sum(width**2 for width in maps.values()) + 2 * shape.d_model**2)


def _flag(name: str, value: Any) -> str:
    return (f"--{name}" if value else f"--no-{name}") if isinstance(value, bool) else f"--{name}={value}"


@dataclass(frozen=True)
class Speed:
    """How fast a model is here, from a timed forward pass.

    Attributes:
        token: seconds per token.
        weights: seconds per pass over all weights.
    """

    token: float
    weights: float

    @classmethod
    def of(cls, pair: ModelPair) -> Speed:
        """Time the base on a few prompts of made-up tokens; both models are in memory afterwards.

        Raises:
            InputError: a model cannot be loaded.
        """
        for _, model in pair.sides():
            _timed(model, 1, 8, 1)  # loads and warms up
        rows, length = 1, min(32, pair.shape.n_ctx)
        seconds = _timed(pair.base, rows, length)
        if seconds < 0.5:  # a small model is as fast on more, which tells its speed from its overhead
            rows, length = 8, min(128, pair.shape.n_ctx)
            seconds = _timed(pair.base, rows, length)
        token = seconds / (rows * length)
        return cls(token, cls.pass_over(pair))

    @staticmethod
    def pass_over(pair: ModelPair) -> float:
        """Seconds per pass over all weights, from their number."""
        shape = pair.shape
        attention = shape.d_head * 2 * (shape.n_heads + shape.n_kv_heads)
        rows = shape.n_layers * (attention + shape.d_mlp * (3 if shape.gated else 2)) + shape.d_vocab * (1 if shape.tied else 2)
        return _SECONDS_PER_WEIGHT * shape.d_model * rows

    def seconds(self, work: Work) -> float:
        """How long a step will take, roughly."""
        return work.tokens * self.token + work.passes * self.weights


def _timed(model: HookedModel, rows: int, length: int, times: int = 3) -> float:
    """Seconds of a forward pass on made-up tokens: the fastest of a few; of two where one takes long, as it may on a busy machine."""
    from interp.models import Batch

    length = min(length, model.shape.n_ctx)
    batch = Batch.of([[(7 * i + j) % model.shape.d_vocab for j in range(length)] for i in range(rows)])
    best = float("inf")
    for done in range(1, times + 1):
        start = time.perf_counter()
        model.logits(batch, at="END")
        best = min(best, time.perf_counter() - start)
        if best > 2 and done > 1:
            break
    return best
