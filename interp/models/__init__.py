"""Checkpoints that can be read, written and differentiated, alone and in pairs.

The only place where TransformerLens, hook names or anything that knows an architecture appears.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interp.models.batch import Batch
    from interp.models.capture import Capture
    from interp.models.checkpoint import Shape
    from interp.models.factors import Factors
    from interp.models.hooked import HookedModel
    from interp.models.interventions import Ledger
    from interp.models.kfac import kfac_factors
    from interp.models.pair import ModelPair

__all__ = ["Batch", "Capture", "Factors", "HookedModel", "Ledger", "ModelPair", "Shape", "kfac_factors"]

_HOME = {
    "Batch": "batch",
    "Capture": "capture",
    "Factors": "factors",
    "HookedModel": "hooked",
    "Ledger": "interventions",
    "ModelPair": "pair",
    "Shape": "checkpoint",
    "kfac_factors": "kfac",
}


def __getattr__(name: str) -> object:
    """Import a name on first use: torch and TransformerLens take seconds."""
    if name in _HOME:
        return getattr(import_module(f"interp.models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'interp.models' has no attribute {name!r}")
