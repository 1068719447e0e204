"""The analyses: one file, one function and one kind of result per question.

``ANALYSES`` is the only list of them. The name of an analysis is the name of its file, of its
function, of its word on the command line and of its folder among saved results.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from interp.names import unknown

ANALYSES = (
    "pair_check",
    "weight_delta",
    "head_svd",
    "composition",
    "channel_effects",
    "channel_steering",
    "intruder_dimensions",
    "intruder_scaling",
    "token_divergence",
    "task_accuracy",
    "activation_patching",
    "cross_patching",
    "path_patching",
    "edge_attribution",
    "head_roles",
    "circuit_discovery",
    "circuit_evaluation",
    "circuit_overlap",
    "circuit_repair",
    "circuit_transfer",
    "cmap",
    "attention_knockout",
    "dcm",
    "cross_dcm",
    "tuco",
    "tuco_components",
    "tuco_detection",
    "tuco_scaling",
    "curvature",
    "curvature_bands",
    "delta_curvature",
    "recitation",
    "language_modelling",
)


def find(name: str) -> Callable[..., Any]:
    """The function of an analysis; this imports its file, and torch with it.

    Raises:
        InputError: there is no analysis of that name; the message has the nearest names.
    """
    if name not in ANALYSES:
        raise unknown("analysis", name, ANALYSES)
    return getattr(import_module(f"{__name__}.{name}"), name)
