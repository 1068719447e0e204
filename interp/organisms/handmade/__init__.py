"""Models whose circuit is written into the weights by hand: the truth that circuit methods are checked against.

In the spirit of compiled transformers (Lindner et al. 2023, Tracr, arXiv 2301.05062), but made for patching:
attention is soft, logits are moderate, and the heads that are not part of the circuit are of three kinds.

- *Zero* heads write nothing: W_O is zero.
- *Bystanders* are live and the logits depend on what they write, but it is the same in a clean prompt and its
  counterfactual, to the bit. Patching one between the two changes nothing at all; its gradient is not zero.
- *Decoys* write what differs, much like a head of the circuit, into a direction that nobody reads. All that is left of
  patching one is its share in the scale of the norm, less than 1e-3 of the weakest effect in the circuit.

``blueprint`` says how attention and MLPs are written down, ``weights`` writes them into a Llama, ``lists`` is what tasks on
lists of nouns share, and each other file is one model with its task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from interp.circuit import Circuit
from interp.names import unknown
from interp.organisms import HAND_BUILT
from interp.organisms.handmade.blueprint import Blueprint
from interp.sites import Heads
from interp.tasks.base import Task

if TYPE_CHECKING:
    from interp.models import HookedModel

__all__ = ["HandBuilt", "hand_built"]


@dataclass(frozen=True, eq=False, kw_only=True)
class HandBuilt:
    """A model with a circuit known in advance.

    Nodes and edges of the circuit are those that carry the difference between the clean and the corrupt prompts of the
    task; all else is either the same in both or is read by nobody. Their positions are positions of the task's prompts.

    Attributes:
        name: one of ``organisms.HAND_BUILT``.
        about: what the circuit is, in a few sentences.
        blueprint: what is written into the weights.
        circuit: the planted circuit.
        task: what the model solves, with at least 99.9 % of the prompts right.
        bystanders: live heads outside the circuit whose output is the same in a clean prompt and its counterfactual.
        decoys: heads outside the circuit whose output differs and is read by nobody. All other heads are zero.
        parts: (task, circuit) for parts of the task, where the model has a circuit for each.
    """

    name: str
    about: str
    blueprint: Blueprint
    circuit: Circuit
    task: Task
    bystanders: Heads
    decoys: Heads
    parts: tuple[tuple[Task, Circuit], ...] = ()

    @cached_property
    def model(self) -> HookedModel:
        """The model, like any other, with a tokenizer of its own words; written on first use."""
        from interp.organisms.handmade.weights import written

        return written(self.blueprint, f"hand_built({self.name})")


def hand_built(name: str) -> HandBuilt:
    """What must a circuit method find? A small Llama whose circuit is known, because it was written into the weights.

    Args:
        name: one of ``organisms.HAND_BUILT``.

    Raises:
        InputError: no hand-built model has this name; the nearest names are given.
    """
    if name not in HAND_BUILT:
        raise unknown("hand-built model", name, HAND_BUILT)
    # A copy, so that nobody shares a model with another caller.
    return replace(import_module(f"interp.organisms.handmade.{name}").HAND_BUILT)
