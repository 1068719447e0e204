"""The stages of a staged search for a circuit, as values and as JSON.

A stage asks which heads tell the receivers of an earlier stage something. The file is small::

    {"stages": [{"role": "mover", "receivers": "logits"},
                {"role": "inhibition", "receivers": "mover.q"},
                {"role": "duplicate", "receivers": "inhibition.v", "at": "S2"}]}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from interp.data_files import data_path
from interp.errors import InputError
from interp.names import unknown
from interp.sites import HeadGroup, Site

Sign = Literal["supports", "opposes", "both"]
READY = ("ioi", "colored_objects", "boxes", "general")
"""Stages that ship; ``general`` is for prompts of any other task."""


@dataclass(frozen=True)
class Stage:
    """Which heads send something to these receivers?

    Attributes:
        role: name of the heads that are found.
        receivers: ``logits``, or roles found earlier with what they receive by: ``mover.q``, ``duplicate.k, induction.k``.
        at: the position at which the heads write, and the receivers read: only attention, which is held, moves between positions.
        sign: heads that support the answer, oppose it, or both.
        top: at most this share of all heads, rounded up; None is all that are beyond noise.
        least: a head carries at least this share of the difference between clean and corrupt.
        attends: where heads of this role are expected to look from ``at``: a position or an attention pattern. It chooses nothing.
    """

    role: str
    receivers: str
    at: str | int = "END"
    sign: Sign = "supports"
    top: float | None = None
    least: float = 0.01
    attends: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no stage can be."""
        for name, kinds in (("role", str), ("receivers", str), ("at", str | int), ("attends", str | None)):
            if not isinstance(value := getattr(self, name), kinds) or isinstance(value, bool):
                raise InputError(f"{name} of a stage is {value!r}, expected text")
        HeadGroup(((0, 0),), name=self.role)  # a role is the name of a group of heads
        object.__setattr__(self, "at", Site("z", 0, 0, self.at).position)
        if self.sign not in get_args(Sign):
            raise InputError(f"sign of the stage {self.role} is {self.sign!r}, expected supports, opposes or both")
        if self.top is not None and not _share(self.top, above=0):
            raise InputError(f"top of the stage {self.role} is {self.top!r}, expected a share of heads above 0 and up to 1")
        if not _share(self.least):
            raise InputError(f"least of the stage {self.role} is {self.least!r}, expected a share from 0 to 1")
        if not self.sources and self.receivers.strip() != "logits":
            raise InputError(f"the stage {self.role} has no receivers; write logits, mover.q or duplicate.k, induction.k")

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """(role, q or k or v) of the receivers; nothing for the logits."""
        if self.receivers.strip() == "logits":
            return ()
        found = []
        for part in self.receivers.split(","):
            match = re.fullmatch(r"\s*([A-Za-z_]\w*)\.([qkv])\s*", part)
            if not match:
                raise InputError(
                    f"the stage {self.role} cannot send to {part.strip()!r}; write logits, or a role and its input as in mover.q"
                )
            found.append((match[1], match[2]))
        return tuple(dict.fromkeys(found))


def _share(x: Any, above: float | None = None) -> bool:
    number = isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
    return number and 0 <= x <= 1 and (above is None or x > above)


@dataclass(frozen=True)
class Stages:
    """A staged search: every stage sends to the logits or to what earlier stages found.

    Attributes:
        stages: in the order of the search.
        about: what they are for.
        paper: where they come from.
    """

    stages: tuple[Stage, ...]
    about: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        """Refuse receivers that no earlier stage finds."""
        if not self.stages:
            raise InputError("a search needs at least one stage")
        every, earlier = [stage.role for stage in self.stages], list[str]()
        for stage in self.stages:
            for role, _ in stage.sources:
                if role in every and role not in earlier:
                    where = "itself" if role == stage.role else f"{role}, which comes later"
                    raise InputError(f"the stage {stage.role} sends to {where}; stages send to roles found before them")
                if role not in earlier:
                    if not earlier:
                        raise InputError(
                            f"the first stage, {stage.role}, sends to {role}, which no stage finds; it can send to logits only"
                        )
                    raise unknown("role", role, earlier)
            earlier.append(stage.role)
        searched = [(s.role, s.receivers, s.at) for s in self.stages]
        if twice := [s for s in searched if searched.count(s) > 1]:
            raise InputError(f"the stage {twice[0][0]} with the receivers {twice[0][1]} at {twice[0][2]} is there twice")

    def sends(self, role: str) -> tuple[str, str]:
        """What the heads of a role send to, back from the logits, and with which sign, so that roles of other names can be matched.

        ``("logits", "supports")`` for movers, ``("logits.q", "supports")`` for what sends to their queries. Inputs of heads that oppose
        the answer are others: ``logits-.q``. A role with several stages has what all of them send to.
        """
        marks = {"supports": "", "opposes": "-", "both": "+-"}
        ends: dict[str, str] = {}  # of the roles found so far, what they send to with the mark of their sign
        targets, signs = dict[str, set[str]](), dict[str, set[str]]()
        for stage in self.stages:
            into = {f"{ends[other]}.{by}" for other, by in stage.sources} or {"logits"}
            targets.setdefault(stage.role, set()).update(into)
            signs.setdefault(stage.role, set()).add(stage.sign)
            known = sorted(targets[stage.role])
            sign = stage.sign if len(signs[stage.role]) == 1 else "both"
            ends[stage.role] = (known[0] if len(known) == 1 else f"({', '.join(known)})") + marks[sign]
        return ", ".join(sorted(targets[role])), next(iter(signs[role])) if len(signs[role]) == 1 else "both"

    def __str__(self) -> str:
        """The text form: JSON on one line."""
        plain = {f.name: f.default for f in fields(Stage)}
        rows = [{k: v for k, v in vars(stage).items() if v != plain[k]} for stage in self.stages]
        said = {k: v for k, v in (("about", self.about), ("paper", self.paper)) if v}
        return json.dumps({**said, "stages": rows}, ensure_ascii=False)

    @classmethod
    def parse(cls, text: str | Stages) -> Stages:
        """Read stages: the name of some that ship, the path of a JSON file, or JSON.

        Raises:
            InputError: nothing has this name, or it holds no stages; the message says what is wrong.
        """
        if isinstance(text, Stages):
            return text
        if not isinstance(text, str | Path):
            raise InputError(f"stages are a name, a file or JSON, not {type(text).__name__}")
        if (name := str(text).strip()) in READY:
            return cls.load(data_path("circuits", f"{name}.json"))
        if name.startswith("{"):
            return cls._read(name, "this text")
        if name.endswith(".json") or Path(name).is_file():
            return cls.load(name)
        raise unknown("set of stages", name, READY)

    @classmethod
    def load(cls, path: str | Path) -> Stages:
        """Read a JSON file.

        Raises:
            InputError: there is no such file, or it holds no stages.
        """
        if not (path := Path(path)).is_file():
            raise InputError(f"there are no stages at {path}: expected a JSON file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise InputError(f"{path} is no text: {e.reason}") from e
        return cls._read(text, str(path))

    def save(self, path: str | Path) -> Path:
        """Write a JSON file."""
        path = Path(path)
        path.write_text(f"{self}\n", encoding="utf-8")
        return path

    @classmethod
    def _read(cls, text: str, where: str) -> Stages:
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where} is no JSON: {' '.join(str(e).split())[:120]}") from e
        try:
            rows = _known(body, ("stages", "about", "paper"), ("stages",), "it")["stages"]
            if not isinstance(rows, list) or not all(isinstance(body.get(k, ""), str) for k in ("about", "paper")):
                raise InputError("its stages are a list, about and paper are texts")
            names = tuple(f.name for f in fields(Stage))
            found = tuple(Stage(**_known(row, names, ("role", "receivers"), f"stage {i + 1}")) for i, row in enumerate(rows))
            return cls(found, body.get("about", ""), body.get("paper", ""))
        except InputError as e:
            raise InputError(f"{where} holds no stages: {e}") from e


def _known(row: Any, names: tuple[str, ...], needed: tuple[str, ...], what: str) -> Mapping[str, Any]:
    """A JSON object with these fields and no others."""
    if not isinstance(row, dict):
        raise InputError(f"{what} is {json.dumps(row)[:60]}, expected an object")
    for name in row:
        if name not in names:
            raise unknown("field of stages", name, names)
    if missing := [name for name in needed if name not in row]:
        raise InputError(f"{what} has no {missing[0]}")
    return row
