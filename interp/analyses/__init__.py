"""The analyses: one file, one function and one kind of result per question.

``GROUPS`` is the only list of them. The name of an analysis is the name of its file, of its
function, of its word on the command line and of its folder among saved results.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from interp.names import unknown

GROUPS = {
    "First look": (
        "pair_check",
        "weight_delta",
        "token_divergence",
        "task_accuracy",
        "completions",
        "token_shift",
        "activation_difference",
        "logit_lens",
        "logit_attribution",
        "attention_patterns",
        "weight_path",
    ),
    "Weights": (
        "head_svd",
        "composition",
        "channel_effects",
        "channel_steering",
        "intruder_dimensions",
        "intruder_scaling",
    ),
    "Circuits": (
        "activation_patching",
        "path_patching",
        "edge_attribution",
        "head_roles",
        "circuit_discovery",
        "circuit_evaluation",
        "circuit_repair",
        "attention_knockout",
        "dcm",
    ),
    "From one model into the other": (
        "cross_patching",
        "circuit_overlap",
        "circuit_transfer",
        "cmap",
        "cross_dcm",
    ),
    "Contribution of tuning": (
        "tuco",
        "tuco_components",
        "tuco_detection",
        "tuco_scaling",
    ),
    "Curvature and memorisation": (
        "curvature",
        "curvature_bands",
        "delta_curvature",
        "recitation",
        "language_modelling",
    ),
}
"""Heading -> the analyses under it, in the order of a page."""

ANALYSES = tuple(name for names in GROUPS.values() for name in names)


def find(name: str) -> Callable[..., Any]:
    """The function of an analysis; this imports its file, and torch with it.

    Raises:
        InputError: there is no analysis of that name; the message has the nearest names.
    """
    if name not in ANALYSES:
        raise unknown("analysis", name, ANALYSES)
    return getattr(import_module(f"{__name__}.{name}"), name)
