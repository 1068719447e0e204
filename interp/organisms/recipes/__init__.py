"""One file per organism: what it reads, for how long, from which seed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from interp.errors import InputError
from interp.names import unknown

if TYPE_CHECKING:
    from interp.organisms.training import Log

RECIPES = ("base", "boxes-tuned-step20", "boxes-tuned-step100", "boxes-tuned", "boxes-lora", "assistant")
"""Organisms that can be trained, those that others start from first; the recipe of ``boxes-tuned`` is the module ``boxes_tuned``."""


def train(name: str, out: str | Path, steps: int | None = None, log: Log | None = None) -> Path:
    """Train an organism as its recipe says and write it, with its model card, into a folder.

    A run that was stopped goes on from its last checkpoint when called again with the same folder.
    The result is the same to the bit on one machine with one number of threads.

    Args:
        name: one of ``RECIPES``.
        out: folder for the finished organism.
        steps: optimizer steps, if not those of the recipe (the card says how many).
        log: called after each step with the step, each part's loss in nats, and how far parts with levels have got.

    Raises:
        InputError: unknown name, no positive number of steps, or a folder that holds a finished organism.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}, expected at least 1")
    out = Path(out)
    if any((out / name).exists() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{out} holds a finished model already; give another folder")
    import_module(f"interp.organisms.recipes.{name.replace('-', '_')}").train(out, steps, log)
    return out
