"""Small models made to be studied: the ones that ship with the package, and how they were trained.

The light part: names and folders without torch. ``training`` and ``recipes`` make organisms, ``planted``
makes changes with a known answer on any model, ``handmade`` writes models with a known circuit.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from interp.data_files import data_path
from interp.names import unknown

# Bound to the function, not to the file of the same name, because the file has been imported once it runs.
from interp.organisms.planted import planted

__all__ = ["HAND_BUILT", "behaviour", "card", "folder", "hand_built", "names", "planted", "shipped_pair"]

HAND_BUILT = ("ioi", "induction", "offset_copy", "majority", "shared_head", "backup_head")
"""Models whose circuit is written into the weights; ``hand_built(name)`` makes one."""


def hand_built(name: str) -> Any:
    """A model with a known circuit, its task and its ``Circuit``, as a ``interp.organisms.handmade.HandBuilt``.

    Raises:
        InputError: no hand-built model has this name; the nearest names are given.
    """
    return import_module("interp.organisms.handmade").hand_built(name)


def names() -> list[str]:
    """Names of the organisms that ship with the package: models for ``HookedModel.load(name)``, and adapters for its ``adapter=``."""
    root = data_path("organisms")
    return sorted({path.parent.name for kind in ("config", "adapter_config") for path in root.glob(f"*/{kind}.json")})


def folder(name: str) -> Path:
    """Folder of a shipped organism, readable by ``AutoModelForCausalLM.from_pretrained`` (an adapter: by ``PeftModel``).

    Raises:
        InputError: no organism has this name; the nearest names are given.
    """
    if name not in names():
        raise unknown("organism", name, names())
    return data_path("organisms", name)


def shipped_pair() -> tuple[str, str]:
    """Names of a base and its tuned version, for trying things on."""
    return "base", "boxes-tuned"


def card(name: str) -> str:
    """The model card of an organism, in Markdown: what it was trained on, how, and what it can do."""
    return (folder(name) / "README.md").read_text()


def behaviour(name: str) -> dict[str, str]:
    """What an organism can do: measured task -> mean ± standard error, from the table of its card."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in card(name).splitlines() if line.startswith("|")]
    head = next(i for i, row in enumerate(rows) if row[0] == "measured on fresh prompts")
    column = rows[head].index(name)
    return {row[0]: row[column] for row in rows[head + 2 :]}
