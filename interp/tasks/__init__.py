"""Tasks: prompts with known answers, generated for the tokenizer at hand."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from typing import TYPE_CHECKING

from interp.errors import InputError
from interp.names import unknown

if TYPE_CHECKING:
    from interp.tasks.base import Task

TASKS = (
    "ioi",
    "colored_objects",
    "boxes",
    "boxes_variants",
    "laundry_list",
    "arithmetic",
    "facts",
    "recitation",
    "plain_text",
    "instructions",
    "refusals",
)
"""Names of the tasks; each is the module of that name with its class as ``TASK``. Neither imports torch."""


def _value(text: str) -> object:
    """An option's value: None, True, False or an integer where it reads as one, else the text itself."""
    return ast.literal_eval(text) if re.fullmatch(r"None|True|False|-?\d+", text) else text.strip("'\"")


def task(name: str | Task, **options: object) -> Task:
    """The task of a name, or of a text form with options such as ``boxes(n_boxes=3)``.

    Raises:
        InputError: no task has that name (the message gives the nearest), the text cannot be read, or
            the task has no such option.
    """
    if not isinstance(name, str):
        return name.having(**options)
    match = re.fullmatch(r"\s*([\w\-]+)\s*(?:\((.*)\))?\s*", name)
    if not match:
        raise InputError(f"{name!r} is not a task; write boxes or boxes(n_boxes=3)")
    word = match[1].replace("-", "_")
    if word not in TASKS:
        raise unknown("task", match[1], TASKS)
    written: dict[str, object] = {}
    for part in (match[2] or "").split(",") if (match[2] or "").strip() else []:
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not key or not value:
            raise InputError(f"{part.strip()!r} in {name!r} is not an option; write {word}(option=value)")
        if key in written:
            raise InputError(f"{name!r} gives the option {key} twice")
        written[key] = _value(value)
    return import_module(f"interp.tasks.{word}").TASK().having(**(written | options))
