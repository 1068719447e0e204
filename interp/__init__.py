"""What did fine-tuning change inside this model?

A workbench that compares a base and a tuned checkpoint, in measurements, figures and
interventions. Everything here loads on first use: ``import interp`` itself imports no torch.

>>> import interp
>>> pair = interp.ModelPair.load("my-base", "my-tuned")     # doctest: +SKIP
>>> interp.weight_delta(pair).plot()                        # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interp.analyses import ANALYSES

# Not lazy, as the function shares its name with its file: it must be bound after the file is.
from interp.compare import compare

if TYPE_CHECKING:
    from interp.circuit import Circuit as Circuit
    from interp.edits import Edit as Edit
    from interp.edits import attention_edit as attention_edit
    from interp.errors import InputError as InputError
    from interp.models import HookedModel as HookedModel
    from interp.models import ModelPair as ModelPair
    from interp.models.channels import channel_edit as channel_edit
    from interp.models.curvature_edits import curvature_edit as curvature_edit
    from interp.models.factors import Factors as Factors
    from interp.models.kfac import kfac_factors as kfac_factors
    from interp.organisms import planted as planted
    from interp.prompts import PromptPairs as PromptPairs
    from interp.prompts import Prompts as Prompts
    from interp.report import write_report as write_report
    from interp.sites import Heads as Heads
    from interp.sites import Site as Site
    from interp.store import load as load
    from interp.tasks import task as task

__version__ = "0.1.0"

_HOMES = {
    "HookedModel": "interp.models",
    "ModelPair": "interp.models",
    "Prompts": "interp.prompts",
    "PromptPairs": "interp.prompts",
    "Site": "interp.sites",
    "Heads": "interp.sites",
    "Edit": "interp.edits",
    "attention_edit": "interp.edits",
    "channel_edit": "interp.models.channels",
    "curvature_edit": "interp.models.curvature_edits",
    "Circuit": "interp.circuit",
    "Factors": "interp.models.factors",
    "kfac_factors": "interp.models.kfac",
    "InputError": "interp.errors",
    "task": "interp.tasks",
    "load": "interp.store",
    "write_report": "interp.report",
    "planted": "interp.organisms",
    **{name: f"interp.analyses.{name}" for name in ANALYSES},
}

__all__ = ["ANALYSES", "__version__", "compare", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'interp' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted({*globals(), *__all__})
