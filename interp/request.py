"""What a user asks of a comparison, checked before any model is opened."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from interp.analyses import GROUPS
from interp.errors import InputError
from interp.inputs import Loading, checked_prompts
from interp.names import unknown

Effort = Literal["quick", "normal", "full"]

GROUP_WORDS = {heading.lower().replace(" ", "_"): names for heading, names in GROUPS.items()}
"""``first_look`` and the like -> the analyses under that heading."""


@dataclass(frozen=True)
class Request:
    """What to compare, and how much of it.

    Attributes:
        base: the model before tuning; None for the shipped pair.
        tuned: the models after it.
        tasks: text forms of tasks.
        prompts: file of the user's own texts, or None.
        effort: how much data.
        minutes: skip what would take longer in all; None is no limit.
        only: names of analyses, or of groups of them as ``first_look``; empty is all.
        out: folder for results and page; None keeps nothing.
        report: the page, or None for ``report.html`` in ``out``.
        loading: how checkpoints are loaded.
    """

    base: Any = None
    tuned: tuple[Any, ...] = ()
    tasks: tuple[str, ...] = ()
    prompts: str | None = None
    effort: str = "normal"
    minutes: float | None = None
    only: tuple[str, ...] = ()
    out: Path | None = None
    report: Path | None = None
    loading: Loading = field(default_factory=Loading)

    @property
    def store(self) -> Path | None:
        """Where results are kept."""
        return None if self.out is None else self.out / "results"

    @property
    def page(self) -> Path | None:
        """Where the report goes."""
        return self.report or (None if self.out is None else self.out / "report.html")

    @property
    def shipped(self) -> bool:
        """All models are organisms that ship with the package."""
        from interp.organisms import names

        return all(isinstance(m, str) and m in names() for m in (self.base, *self.tuned))

    def checked(self, analyses: tuple[str, ...]) -> Request:
        """The request with the shipped pair filled in, after every check that needs no model.

        Args:
            analyses: the names that ``only`` may hold.

        Raises:
            InputError: an unknown name, a missing file, or a place that cannot be written.
        """
        only = tuple(name for given in self.only for name in _members(given, analyses))
        for name in only:
            if name not in analyses:
                raise unknown("analysis in the comparison", name, (*analyses, *GROUP_WORDS))
        if self.effort not in get_args(Effort):
            raise unknown("effort", self.effort, get_args(Effort))
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"the time is {self.minutes:g} minutes, but it must be more than 0")
        tasks = tuple(dict.fromkeys(map(_scored, self.tasks)))
        if self.prompts is not None:
            checked_prompts(self.prompts)
        self._check_places()
        if self.base is not None and self.tuned:
            return replace(self, tasks=tasks, only=only)
        if self.base is not None or self.tuned:
            raise InputError(f"a comparison needs a base and at least one tuned model, but only {self.base or self.tuned[0]} came")
        from interp.organisms import shipped_pair

        base, tuned = shipped_pair()
        return replace(self, base=base, tuned=(tuned,), tasks=tasks, only=only)

    def _check_places(self) -> None:
        if self.store is not None:
            check_writable(self.store)
        if self.page is not None:
            check_writable(self.page.parent)
            if self.page.is_dir():
                raise InputError(f"{self.page} is a folder, but the page should go there")


def _members(given: str, analyses: tuple[str, ...]) -> tuple[str, ...]:
    """The analyses of a group that can be asked for; anything else as it is."""
    names = GROUP_WORDS.get(given.strip().lower().replace(" ", "_").replace("-", "_"))
    return (given,) if names is None else tuple(name for name in names if name in analyses)


def _scored(written: str) -> str:
    """The text form of a task; one that nobody knows or that has no score is refused."""
    from interp.tasks import task

    found = task(written)
    if found.chance is None:
        raise InputError(f"{written} has no right answers to count; give it as prompts, not as a task")
    return str(found)


def check_writable(folder: Path) -> None:
    """See whether a folder can be made and written, without making it.

    Raises:
        InputError: it cannot; the message says why.
    """
    place = folder
    try:
        while not place.exists():
            place = place.parent
        probe = place / f".probe-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror or error}") from None
