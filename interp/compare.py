"""The full comparison of a base and its tuned models: one table, gone through from top to bottom.

``PLAN`` says which analyses run, on what, and how much of it at each effort. Importing this file
imports nothing heavy: ``import interp`` does so.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time as clock
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.inputs import Loading, Session
from interp.names import AND
from interp.plan import OF_BEST, OF_CIRCUITS, Comparison, Gap, Row, Speed, Step, Work
from interp.request import Effort, Request

if TYPE_CHECKING:
    from interp.results import Result


def _reading(_: Any) -> dict[str, Any]:
    """What heads read into what they look for; ``k`` and ``v`` are one command away."""
    return {"kind": "q"}


def _patching(pairs: Any) -> dict[str, Any]:
    """Without a distractor there is no difference of logits to restore."""
    return {} if pairs.distractors is not None else {"metric": "answer_logprob"}


def _detecting(prompts: Any) -> dict[str, Any]:
    """Chats are told from text in the same template, so that it is not the template that tells them apart."""
    return {"output_co": True} | ({"chat": "template"} if _in_chat(prompts.task) else {})


def _in_chat(written: str) -> bool:
    """Whether a task's prompts are in the tuned model's chat template."""
    return written.partition("(")[0] in CHATS and "chat=plain" not in written


def _evaluating(pairs: Any) -> dict[str, Any]:
    """A few controls; a circuit that matters is evaluated on its own."""
    return _patching(pairs) | {"completeness_random": 5, "greedy": 0, "random_circuits": 3}


def _crossing(pairs: Any) -> dict[str, Any]:
    """Tuned into base, with a few random heads."""
    return _patching(pairs) | {"direction": "tuned_to_base", "control": 3}


def _transferring(pairs: Any) -> dict[str, Any]:
    """A few random circuits."""
    return _patching(pairs) | {"random_circuits": 3}


def _blocking(pairs: Any) -> dict[str, Any]:
    """One random token beside each that is blocked."""
    return _patching(pairs) | {"control": 1}


SEARCHED = {"quick": 24, "normal": 64, "full": 200}
"""Prompts on which circuits are searched; fewer leave most heads within noise."""

PLAN = (
    Row("pair_check", None, {}, lambda s: Work(passes=1, saved=2**16)),
    Row("weight_delta", None, {}, lambda s: Work(passes=3, saved=2**18)),
    Row(
        "token_divergence",
        "text",
        {"quick": 16, "normal": 64, "full": 256},
        lambda s: Work(tokens=2 * (s.prompts + 16) * s.length, saved=60 * s.prompts * s.length),
    ),
    Row(
        "task_accuracy",
        "task",
        {"quick": 100, "normal": 200, "full": 1000},
        lambda s: Work(tokens=6 * s.prompts * s.length, saved=200 * s.prompts),
        draws=True,
    ),
    Row(
        "completions",
        "sets",
        {"quick": 2, "normal": 4, "full": 8},
        lambda s: Work(tokens=s.prompts * (1500 + 6 * s.length), saved=4000 * s.prompts),
    ),
    Row(
        "token_shift",
        "text",
        {"quick": 32, "normal": 64, "full": 512},
        lambda s: Work(tokens=15 * s.prompts * s.length, saved=2**20),
    ),
    Row(
        "activation_difference",
        "text",
        {"quick": 16, "normal": 48, "full": 256},
        lambda s: Work(tokens=(15 + 20 * min(s.layers, 8)) * s.prompts * s.length, saved=2**20),
    ),
    Row(
        "logit_lens",
        "task or text",
        {"quick": 32, "normal": 64, "full": 200},
        lambda s: Work(tokens=3 * s.prompts * s.length, saved=2**18),
    ),
    Row(
        "logit_attribution",
        "task or text",
        {"quick": 32, "normal": 64, "full": 200},
        lambda s: Work(tokens=3 * s.prompts * s.length, saved=16 * s.prompts * s.layers * s.heads),
    ),
    Row(
        "attention_patterns",
        "task or text",
        {"quick": 16, "normal": 32, "full": 100},
        lambda s: Work(tokens=8 * s.prompts * s.length, saved=2**20),
    ),
    Row(
        "weight_path",
        "task and text",
        {"quick": 16, "normal": 48, "full": 200},
        lambda s: Work(tokens=25 * s.prompts * s.length, saved=4000 * s.prompts),
    ),
    Row("head_svd", None, {}, lambda s: Work(passes=100, saved=300 * s.layers * s.heads)),
    Row("composition", None, {}, lambda s: Work(passes=15 + s.layers * s.heads / 10, saved=2000 * s.layers * s.heads), settings=_reading),
    Row("intruder_dimensions", None, {}, lambda s: Work(passes=60, saved=2**18)),
    Row(
        "activation_patching",
        "best task",
        {"quick": 8, "normal": 16, "full": 100},
        lambda s: Work(tokens=0.2 * s.prompts * s.length * s.patches, saved=8 * s.prompts * s.patches),
        settings=_patching,
    ),
    Row(
        "path_patching",
        "best task",
        {"quick": 8, "normal": 32, "full": 200},
        lambda s: Work(tokens=2 * s.prompts * (5 * s.length + s.layers * s.heads), saved=16 * s.prompts * s.layers * s.heads),
        settings=_patching,
    ),
    Row(
        "edge_attribution",
        "best task",
        {"quick": 8, "normal": 32, "full": 100},
        lambda s: Work(tokens=20 * s.prompts * s.length, saved=32 * s.prompts * (s.layers * s.heads) ** 2),
        settings=_patching,
    ),
    Row(
        "circuit_discovery",
        "best task",
        SEARCHED,
        lambda s: Work(tokens=3 * s.prompts * s.length * s.layers * s.heads, saved=40 * s.prompts * s.layers * s.heads),
        settings=_patching,
        demanding=True,
    ),
    Row(
        "circuit_evaluation",
        "circuit",
        {"quick": 12, "normal": 32, "full": 100},
        lambda s: Work(tokens=100 * s.prompts * s.length, saved=1000 * s.prompts),
        settings=_evaluating,
        demanding=True,
    ),
    Row(
        "attention_knockout",
        "best task",
        {"normal": 16, "full": 64},
        lambda s: Work(tokens=12 * s.prompts * s.length * s.layers * s.places, saved=24 * s.prompts * s.layers * s.places),
        settings=_blocking,
        demanding=True,
    ),
    Row(
        "dcm",
        "variables",
        {"normal": 96, "full": 400},
        lambda s: Work(tokens=40 * s.prompts * s.length, saved=100 * s.prompts),
        demanding=True,
        alone=True,
    ),
    Row(
        "cross_patching",
        "best task",
        {"quick": 8, "normal": 16, "full": 100},
        lambda s: Work(tokens=0.2 * s.prompts * s.length * s.layers * s.heads, saved=8 * s.prompts * s.layers * s.heads),
        settings=_patching,
    ),
    Row("circuit_overlap", "two circuits", SEARCHED, lambda s: Work(saved=2**14), demanding=True),
    Row(
        "circuit_transfer",
        "both circuits",
        {"quick": 12, "normal": 32, "full": 100},
        lambda s: Work(tokens=50 * s.prompts * s.length, saved=500 * s.prompts),
        settings=_transferring,
        demanding=True,
    ),
    Row(
        "cmap",
        "tuned circuit",
        {"quick": 48, "normal": 128, "full": 400},
        lambda s: Work(tokens=15 * s.prompts * s.length, saved=250 * s.prompts),
        settings=_crossing,
        demanding=True,
    ),
    Row(
        "cross_dcm",
        "variables",
        {"normal": 96, "full": 400},
        lambda s: Work(tokens=40 * s.prompts * s.length, saved=100 * s.prompts),
        demanding=True,
    ),
    Row(
        "tuco",
        "sets",
        {"quick": 16, "normal": 32, "full": 100},
        lambda s: Work(tokens=3.5 * s.prompts * s.length, saved=s.prompts * (48 * s.layers + 24 * s.length)),
        settings=lambda prompts: {"output_co": True},
    ),
    Row(
        "tuco_detection",
        "against text",
        {"quick": 32, "normal": 64, "full": 200},
        lambda s: Work(tokens=3.5 * s.prompts * s.length, saved=500 * s.prompts),
        settings=_detecting,
    ),
    Row(
        "delta_curvature",
        "factors",
        {"normal": 64, "full": 256},
        lambda s: Work(tokens=25 * s.prompts * s.length, passes=30, saved=4 * s.factors),
        demanding=True,
    ),
    Row(
        "recitation",
        "canaries",
        {"normal": 60, "full": 120},
        lambda s: Work(tokens=3 * s.prompts * s.length, saved=500 * s.prompts),
    ),
    Row(
        "language_modelling",
        "text",
        {"normal": 64, "full": 256},
        lambda s: Work(tokens=3 * s.prompts * s.length, saved=2000 * s.prompts),
    ),
)
"""The comparison, in order. The cheap and certain comes first, so that what is there early is worth reading."""

SHIPPED_TASKS = ("boxes", "boxes(n_boxes=3)", "colored_objects", "ioi", "facts", "arithmetic", "laundry_list(length=3)")
"""What shipped models are asked when no task is named."""

CHATS = ("instructions", "refusals")
"""What a tuned model with a chat template is asked beside the tasks, for TuCo alone; accuracy is for tasks that were named."""

GRAMMAR, SENTENCE = "plain_text", "plain_text(sentences=1)"
"""What shipped models read, and what is as long as a short question."""

PROSE = "plain_text(source=prose)"
"""What other models read when no file is given."""

CANARIES = "recitation"
"""What the shipped base was made to know by heart."""

MUCH = 2e9
"""Bytes of factors that are collected only with effort full."""

LONG = 512
"""A context that holds every piece of prose."""


def compare(
    base: Any = None,
    tuned: Any = None,
    *,
    tasks: str | Sequence[str] = (),
    prompts: str | os.PathLike[str] | None = None,
    effort: Effort = "normal",
    time: float | None = None,
    only: str | Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    bos: str = "auto",
    trust_remote_code: bool = False,
) -> list[Result]:
    """What did fine-tuning change? Everything the plan has to say about a base and its tuned models.

    Args:
        base: folder, Hub id, organism, Hugging Face model or ``HookedModel``; the shipped pair by default.
        tuned: one such model, or a sequence of them.
        tasks: tasks to score, as ``ioi`` or ``boxes(n_boxes=3)``.
        prompts: file of your own texts, instead of the shipped plain text.
        effort: ``quick``, ``normal`` or ``full``: how much data.
        time: minutes; what would take longer in all is skipped, with a warning.
        only: names of analyses, or of groups as ``first_look``; all by default.
        out: folder for the results and ``report.html``. Results that are already there are not computed
            again. None keeps nothing on disk and always computes.
        report: another name for the page.
        dtype: of the weights; as stored by default.
        device: for both models, or two with a comma between them.
        bos: ``auto``, ``always`` or ``never`` begin texts with the BOS token.
        trust_remote_code: run code that comes with a checkpoint.

    Returns:
        The results, in the order of the plan. A step that cannot be done is a warning, and the others go on.

    Raises:
        InputError: a name or file is unknown, ``out`` cannot be written, or the models cannot be compared.
    """
    request = Request(
        base=base,
        tuned=() if tuned is None else tuple(tuned) if isinstance(tuned, list | tuple) else (tuned,),
        tasks=(tasks,) if isinstance(tasks, str) else tuple(tasks),
        prompts=None if prompts is None else str(prompts),
        effort=effort,
        minutes=time,
        only=(only,) if isinstance(only, str) else tuple(only),
        out=None if out is None else Path(out),
        report=None if report is None else Path(report),
        loading=Loading(dtype, device, bos, trust_remote_code),
    )
    done = run(request)
    for gap in done.gaps:
        warnings.warn(f"{gap.what}: {gap.why}", stacklevel=2)
    return list(done.results)


def _silence(line: str) -> None:
    """Tell nobody."""


def run(request: Request, say: Callable[[str], None] = _silence, alarm: Callable[[str], None] = _silence) -> Comparison:
    """Go through the plan and write the page.

    Args:
        request: what the user asked for.
        say: takes the lines that tell a person how it goes.
        alarm: takes the sentence about each step that could not be done, at once.

    Raises:
        InputError: as for ``compare``; also when not a single step gave a result.
    """
    return _Run(request.checked(tuple(row.analysis for row in PLAN)), say, alarm).all()


class _Run:
    """One comparison on its way."""

    def __init__(self, request: Request, say: Callable[[str], None], alarm: Callable[[str], None]) -> None:
        self.request, self.say, self.alarm = request, say, alarm
        self.session = Session(request.loading)
        self.results: list[Result] = []
        self.gaps: list[Gap] = []
        self.started = clock.monotonic()
        self.scratch: tempfile.TemporaryDirectory[str] | None = None
        self.speed: Callable[[], Speed] = lambda: Speed(0.0, 0.0)

    def all(self) -> Comparison:
        """Every pair, then the page."""
        for tuned in self.request.tuned:
            try:
                self.pair(tuned)
            except InputError as error:  # the models themselves: there is nothing to go on with
                if len(self.request.tuned) == 1:
                    raise
                self.miss(Gap(str(tuned), str(error)))
        if not self.results:
            raise InputError("nothing could be computed; " + (str(self.gaps[0]) if self.gaps else "the plan is empty"))
        return Comparison(tuple(self.results), tuple(self.gaps), self.page())

    def pair(self, tuned: Any) -> None:
        """All steps of one pair."""
        pair = self.session.pair(self.request.base, tuned)
        if self.request.prompts is not None:  # prompts that cannot be used are said before anything is computed
            self.session.prompts(self.request.prompts, pair)
        wanted = [row for row in PLAN if not self.request.only or row.analysis in self.request.only]
        plan = [(row, self.steps(row, tuned)) for row in wanted if row.at(self.request.effort)]
        for row in wanted if self.request.only else ():
            if not row.at(self.request.effort):
                self.miss(
                    Gap(row.analysis, f"it is part of effort {' and '.join(row.prompts)}, not of {self.request.effort}", failed=False)
                )
        self.speed = cache(lambda: Speed.of(pair) if any(row.source for row, _ in plan) else Speed(0.0, Speed.pass_over(pair)))
        self.announce(pair.name, [step for row, steps in plan for step in (self.likely(steps) if row.chosen else steps)])
        found: list[Result] = []
        for row, steps in plan:
            for step in self.choice(row, steps, found):
                if (result := self.step(step)) is not None:
                    found.append(result)
                    self.results.append(result)
        pair.tuned.release()  # the next pair needs the memory; the base stays

    def steps(self, row: Row, tuned: Any) -> list[Step]:
        """The steps of a row; for the best task one per task that could be it."""
        n = row.prompts.get(self.request.effort, 0)
        if row.source == "sets":
            sets = self.sets(tuned, n)
            return [Step(row, self.request.base, tuned, AND.join(sets), _at_most(n, *sets) * len(sets))]
        if row.source == "against text":
            return self.against_text(row, tuned, n)
        if row.source in OF_CIRCUITS:
            return self.of_circuits(row, tuned, n)
        on = {
            None: lambda: [""],
            "text": lambda: [self.text(tuned)],
            "factors": lambda: [self.text(tuned)],
            "canaries": lambda: [CANARIES] if self.request.shipped else [],
            "task": lambda: self.tasks,
            "best task": self.pairs,
            "task or text": lambda: self.pairs() or [self.text(tuned)],
            "task and text": lambda: self.tasks or self.pairs(),
        }[row.source]()
        against = self.text(tuned) if row.source == "task and text" else ""
        made = [Step(row, self.request.base, tuned, written, _at_most(n, written, against), against) for written in on]
        if row.source not in OF_BEST:
            return made
        if row.source == "task and text":
            asked = [step for step in made if self.answered(step)]
            if not asked:
                self.miss(Gap(row.analysis, "it needs answers: name a task with --task, or give prompts that have answers", failed=False))
            return asked
        asked = [step for step in made if self.paired(step)]
        return asked or (made[:1] if row.source == "task or text" and not self.tasks else [])

    def of_circuits(self, row: Row, tuned: Any, n: int) -> list[Step]:
        """One step per task that may be the best one; which circuits were found is known later."""
        if row.source == "two circuits":
            return [Step(row, self.request.base, tuned)]
        asked = [on for on in self.tasks if row.source != "variables" or _of_variables(on)]
        made = [Step(row, self.request.base, tuned, on, n) for on in asked]  # of a file there are no fresh prompts
        return [s for s in made if self.paired(s)]

    def sets(self, tuned: Any, n: int) -> list[str]:
        """The sets of prompts that stand side by side: text, and what the tuned model is asked."""
        pair = self.session.pair(self.request.base, tuned)
        asked = [on for on in dict.fromkeys((*self.tasks, *self.chats(pair))) if self.can_be_made(on, pair, n)]
        return [self.text(tuned), *asked]

    def against_text(self, row: Row, tuned: Any, n: int) -> list[Step]:
        """One step per set that may have more of tuning than text: the named tasks; chats where there is a template; the shipped tasks."""
        pair, text = self.session.pair(self.request.base, tuned), self.text(tuned)
        asked = [on for on in self.request.tasks or self.chats(pair)[:1] or self.tasks if self.can_be_made(on, pair, n)]
        other = {on: SENTENCE if text == GRAMMAR and _in_chat(on) else text for on in asked}
        return [Step(row, self.request.base, tuned, on, _at_most(n, on, other[on]), other[on]) for on in asked]

    def chats(self, pair: Any) -> tuple[str, ...]:
        """Questions in the tuned model's chat template, where it has one."""
        try:
            return CHATS if getattr(pair.tuned.tokenizer, "chat_template", None) else ()
        except InputError:
            return ()  # a model without a tokenizer

    def can_be_made(self, on: str, pair: Any, n: int) -> bool:
        """Whether the words of a task are tokens of this pair; if not, it is said once."""
        try:
            self.session.prompts(on, pair, _at_most(n, on))
        except InputError as error:
            gap = Gap(f"the prompts of {on}", str(error), failed=on in self.request.tasks)
            if gap not in self.gaps:
                self.miss(gap)
            return False
        return True

    def text(self, tuned: Any) -> str:
        """What the models read: the user's file, prose, or sentences of the grammar.

        The grammar is what shipped models learned, and its sentences fit into any context.
        """
        if self.request.prompts is not None:
            return self.request.prompts
        short = self.session.pair(self.request.base, tuned).shape.n_ctx < LONG
        return GRAMMAR if self.request.shipped or short else PROSE

    def pairs(self) -> list[str]:
        """What may hold clean and corrupt prompts."""
        return [*self.tasks, *([] if self.request.prompts is None else [self.request.prompts])]

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the models are asked."""
        return self.request.tasks or (SHIPPED_TASKS if self.request.shipped else ())

    def paired(self, step: Step) -> bool:
        """Whether prompts come as clean and corrupt with answers of one token."""
        try:
            prompts = self.session.prompts(step.on, self.session.pair(step.base, step.tuned), step.n)
        except InputError:
            return False  # its own step says why
        return hasattr(prompts, "corrupt") and prompts.answers is not None

    def answered(self, step: Step) -> bool:
        """Whether prompts have answers of one token."""
        try:
            return self.session.prompts(step.on, self.session.pair(step.base, step.tuned), step.n).answers is not None
        except InputError:
            return False  # its own step says why

    def choice(self, row: Row, steps: Sequence[Step], found: Sequence[Any]) -> Sequence[Step]:
        """The steps of a row, or the one that what was found so far chooses."""
        if row.source in OF_BEST:
            return self.best(steps, found)
        if row.source in OF_CIRCUITS:
            return self.with_circuits(row, steps, next((r for r in found if r.meta.analysis == "circuit_discovery"), None))
        if row.source == "factors":
            return [made for step in steps if (made := self.with_factors(step)) is not None]
        return self.most_changed(steps, found) if row.chosen else steps

    def with_factors(self, step: Step) -> Step | None:
        """The step with the factors of base, which are collected unless they are there; None where that would be too much."""
        from interp.models.kfac import kfac_factors

        try:
            if (ready := self.collected(step)) is not None:
                return ready
            much = step.work(self.session).saved
            why = f"the factors would take {size(much)}; --effort full collects them" if much > MUCH else None
            if (why := self.too_long(step) or (why if self.request.effort != "full" else None)) is not None:
                self.miss(Gap(str(step), why, failed=False, command=self.by_hand(step)))
                return None
            pair, place = self.session.pair(step.base, step.tuned), self.place_of_factors(step)
            return self.given_factors(step, kfac_factors(pair.base, step.singles(self.session)[0], place))
        except InputError as error:
            self.miss(Gap(str(step), str(error), failed=False))
            return None

    def by_hand(self, step: Step) -> str:
        """The lines that collect factors and take them; empty for models that are objects."""
        if not (isinstance(step.base, str) and isinstance(step.tuned, str)):
            return ""
        source = "--prompts" if Path(step.on).is_file() else "--task"
        collect = ["interp", "factors", step.base, *self.request.loading.flags(), f"{source}={step.on}", f"--n={step.n}", "--out=factors"]
        models = [f"--base={step.base}", f"--tuned={step.tuned}", *self.request.loading.flags(), "--factors=factors"]
        take = ["interp", "run", step.row.analysis, *models, f"--prompts={step.on}", f"--prompts-n={step.n}"]
        return f"{shlex.join(collect)}\n{shlex.join(take)}"

    def collected(self, step: Step) -> Step | None:
        """The step with the factors that an earlier run collected, if it did; no weights are loaded to find out."""
        from interp.models.factors import Factors

        place = self.place_of_factors(step)
        try:
            found = Factors.open(place)
        except InputError:
            return None
        return self.given_factors(step, found)

    def given_factors(self, step: Step, factors: Any) -> Step:
        """The step with its factors, and their folder where it stays."""
        return replace(step, given={"factors": (factors, "" if self.request.out is None else str(factors.path))})

    def place_of_factors(self, step: Step) -> Path:
        """The folder of the factors of a base over a text: among what is kept, or one that goes when all is done."""
        pair = self.session.pair(step.base, step.tuned)
        if self.scratch is None and self.request.out is None:
            self.scratch = tempfile.TemporaryDirectory(prefix="interp-")
        root = Path(self.scratch.name) if self.scratch is not None else Path(self.request.out or ".")
        dtype = str(pair.base.dtype).removeprefix("torch.")
        return root / "factors" / f"{pair.base.fingerprint[:8]}-{step.singles(self.session)[0].digest[:8]}-{dtype}"

    def with_circuits(self, row: Row, steps: Sequence[Step], search: Any) -> list[Step]:
        """The step with the circuits that a search found; none where it found none, or where there are no fresh prompts."""
        if search is None:
            if steps and not any(gap.what.startswith("circuit_discovery") for gap in self.gaps):  # else that one says why
                self.miss(Gap(row.analysis, "it takes what circuit_discovery finds, which was not run", failed=False))
            return []
        found = {side: search.circuit(side) for side in search.sides}
        names = _SIDES.get(row.source or "", {"circuit": "tuned"})
        if empty := [side for side in names.values() if not found[side].nodes]:
            self.miss(Gap(row.analysis, f"no heads were found in {' and '.join(empty)}", failed=False))
            return []
        given = {name: (found[side], self.written(found[side])) for name, side in names.items()}
        if row.source == "two circuits":
            return [replace(step, given=given) for step in steps]
        asked = [replace(step, given=given) for step in steps if step.on == search.meta.inputs[0].get("task")][:1]
        if row.source == "variables":
            asked = [replace(step, on=on) for step in asked for on in _of_variables(step.on)]
        made = [step for step in (self.fresh(step, search.contexts) for step in asked) if step is not None]
        if not made and steps:
            why = "no other prompts than those the circuit was found on; it needs fresh ones"
            self.miss(Gap(row.analysis, why, failed=False))
        return made

    def fresh(self, step: Step, seen: Sequence[str]) -> Step | None:
        """The step with prompts of contexts that were not seen; None where there are none."""
        for seed in range(1, 9):
            fresh: Any = self.session.prompts(step.on, self.session.pair(step.base, step.tuned), step.n, seed)
            if not set(fresh.contexts) & set(seen):
                return replace(step, seed=seed)
        return None

    def written(self, circuit: Any) -> str:
        """The file of a circuit, so that a command can name it; nothing where nothing is kept."""
        if self.request.out is None:
            return ""
        return str(circuit.save(self.request.out / "circuits" / f"{circuit.digest[:8]}.json"))

    def most_changed(self, steps: Sequence[Step], found: Sequence[Any]) -> list[Step]:
        """The step on the task whose answers tuning changed most, for better or worse; the first one where none was scored."""
        changed = {r.task: abs(float(r.accuracy[1] - r.accuracy[0])) for r in found if r.meta.analysis == "task_accuracy"}
        return [max(steps, key=lambda step: changed.get(step.on, 0.0))] if steps else []

    def likely(self, steps: Sequence[Step]) -> list[Step]:
        """The step to show in the plan before anybody knows which task it will be."""
        return [s for s in steps if self.known(s)][:1] or list(steps[:1])

    def best(self, steps: Sequence[Step], found: Sequence[Any]) -> list[Step]:
        """The step on the task that tuning taught best, out of those on which a model is above chance."""
        accuracy = {r.task: r for r in found if r.meta.analysis == "task_accuracy"}
        if not accuracy:  # no task was scored in this run: the first one that was named
            return list(steps[:1])
        able = [s for s in steps if s.on not in accuracy or bool(accuracy[s.on].above_chance.any())]
        if not able and steps and steps[0].row.source == "task and text":
            able = list(steps)  # the text is worth reading all the same
        if not able:
            for step in steps[:1]:
                why = "neither model is above chance on a task with clean and corrupt prompts, so there is nothing to restore"
                self.miss(Gap(step.row.analysis, why, failed=False, command=step.command(self.session)))
            return []

        def gain(step: Step) -> float:
            scored = accuracy.get(step.on)  # a file of the user's own pairs has no accuracy
            return 0.0 if scored is None else float(scored.accuracy[1] - scored.accuracy[0])

        return [max(able, key=gain)]

    def step(self, step: Step) -> Result | None:
        """The result of one step: from the store, or computed and stored; None with a gap where there is none."""
        from interp import analyses, store

        start = clock.monotonic()
        try:
            function = analyses.find(step.row.analysis)
            inputs, settings = step.arguments(self.session)
            folder = self.kept(function, inputs, settings)
            if folder is not None:
                result = store.load(folder)
            elif (why := self.too_long(step)) is not None:
                self.miss(Gap(str(step), why, failed=False, command=step.command(self.session)))
                return None
            else:
                with nullcontext() if self.request.store is None else store.keeping(self.request.store):
                    result = step.stamped(function(*inputs, **settings), self.session)
                    if self.request.store is not None:
                        store.save(result, self.request.store)
        except InputError as error:
            self.miss(Gap(str(step), str(error), failed=not step.row.demanding))
            return None
        took = "already there" if folder is not None else f"{clock.monotonic() - start:.1f} s"
        self.say(f"{step} ({took}): {result.summary()}")
        return result

    def kept(self, function: Any, inputs: Sequence[Any], settings: dict[str, Any]) -> Path | None:
        """The folder of this very result, where an earlier run left it; no weights are loaded to find out."""
        from interp import store

        if self.request.store is None:
            return None
        meta = function.describe(*inputs, **settings)
        return store.find(meta.analysis, meta.identity, self.request.store)

    def known(self, step: Step) -> bool:
        """Whether an earlier run left the result of a step."""
        from interp import analyses

        try:
            if step.row.source == "factors":
                step = self.collected(step) or step
            return self.kept(analyses.find(step.row.analysis), *step.arguments(self.session)) is not None
        except InputError:
            return False  # running the step says why

    def too_long(self, step: Step) -> str | None:
        """Why a step does not fit into the time, None where it does."""
        if self.request.minutes is None:
            return None
        left = self.request.minutes * 60 - (clock.monotonic() - self.started)
        needs = self.speed().seconds(step.work(self.session))
        return None if needs <= left else f"it would take about {duration(needs)}, and {duration(max(left, 0))} of --time are left"

    def miss(self, gap: Gap) -> None:
        """Remember a step without a result, and say so at once."""
        self.gaps.append(gap)
        if gap.failed:
            self.alarm(f"{gap.what} could not be done: {gap.why}")
        else:
            self.say(f"left out: {gap}")

    def announce(self, name: str, steps: Sequence[Step]) -> None:
        """Print the plan with what each step takes."""
        self.say(f"{name}: the plan, with effort {self.request.effort}")
        total, new = 0.0, [step for step in steps if not self.known(step)]
        later = [step for step in new if step.row.source in OF_CIRCUITS]
        for step in steps:
            if step not in new:
                self.say(f"  {step!s:58} already there")
                continue
            if new == later:  # whether they are there is known once the circuits are
                self.say(f"  {step.announced:58} with what circuit_discovery found")
                continue
            try:
                work = step.work(self.session)
            except InputError:
                self.say(f"  {step!s:58} cannot be done")  # running it says why
                continue
            total += (needs := self.speed().seconds(work))
            what = step.announced
            self.say(f"  {what:58} about {duration(needs):>6}, saves {size(work.saved):>7}" + (f", n = {step.n}" if step.n else ""))
        limit = "" if self.request.minutes is None else f" of the {duration(self.request.minutes * 60)} given"
        self.say(f"  in all about {duration(total)}{limit}")

    def page(self) -> Path | None:
        """Write the report."""
        if self.request.page is None:
            return None
        from interp.analyses import GROUPS
        from interp.columns import side_by_side
        from interp.report import write_report
        from interp.verdict import cautions, verdict

        told, known = verdict(self.results), cautions(self.results)
        known += [f"{gap.what} could not be done: {gap.why}" for gap in self.gaps if gap.failed]
        for line in told:
            self.say(line)
        for line in known:
            self.say(f"note: {line}")
        models = [r.meta.models for r in self.results if r.meta.models]  # what compares circuits alone has none
        names = " and ".join(dict.fromkeys(found[-1]["name"] for found in models))
        title = f"What fine-tuning changed: {models[0][0]['name']} → {names}" if models else "What fine-tuning changed"
        return write_report(
            self.results,
            self.request.page,
            title=title,
            verdict=told,
            warnings=known,
            plan=[str(gap) for gap in self.gaps],
            columns=side_by_side(self.results),
            parts=GROUPS,
        )


_SIDES: dict[str, dict[str, str]] = {
    "circuit": {"circuit": "base"},
    "two circuits": {"a": "base", "b": "tuned"},
    "both circuits": {"circuit_base": "base", "circuit_tuned": "tuned"},
}
"""Whose circuit an input takes; that of tuned where nothing is said."""


def _of_variables(on: str) -> list[str]:
    """A task asked for each variable that a counterfactual of it may carry over; none where it has no such."""
    from interp.tasks import task

    try:
        asked: Any = task(on)
    except InputError:
        return []  # its own step says why
    return [str(replace(asked, corrupt=name)) for name in getattr(asked, "variables", ()) if name != "label" or asked.n_boxes > 2]


def _at_most(n: int, *on: str) -> int:
    """Fewer prompts where there are not as many: prose has an end."""
    if PROSE not in on:
        return n
    from interp.tasks.plain_text import prose

    return min(n, len(prose()))


def duration(seconds: float) -> str:
    """``0.4 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.1g} s" if seconds < 1 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """``64 kB``, ``1.2 MB``."""
    power = next((i for i in range(3) if count < 1000 ** (i + 1)), 3)
    value = count / 1000**power
    return f"{value:.2g} {('B', 'kB', 'MB', 'GB')[power]}" if value < 10 else f"{value:.0f} {('B', 'kB', 'MB', 'GB')[power]}"
