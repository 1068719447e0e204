"""Tokens that say what a component of a head reads and writes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from interp.linalg import SVD
from interp.models.heads import HeadCircuit, folded_vocabulary
from interp.models.hooked import HookedModel
from interp.models.turned import live

ENDS = ("+", "-")
"""A direction has two ends; tokens are named at both."""


def component_tokens(model: HookedModel, layers: Sequence[SVD], circuit: HeadCircuit, n: int, vocabulary: int) -> dict[str, Tensor]:
    """Tokens at both ends of what components of heads read and write, directly through embedding and unembedding.

    Args:
        model: whose vocabulary is read.
        layers: of each layer U [head d_model component], Vh [head component d_model], and the strengths.
        circuit: what writes into logits is OV; QK looks for a key's embedding.
        n: tokens at each end.
        vocabulary: tokens below this id.

    Returns:
        ``read_tokens`` and ``write_tokens``, ids [layer head component end token]; -1 for a component of strength 0. ``read_scores`` are
        cosines of the embedding, which is what a norm leaves of a stream that holds this token alone. ``write_scores`` are what a unit
        adds to the logit, before the final norm's division; for QK cosines.
    """
    entering, leaving = folded_vocabulary(model)
    entering = torch.nn.functional.normalize(entering[:vocabulary], dim=-1)
    leaving = entering if circuit == "qk" else leaving[:, :vocabulary].mT
    found: dict[str, list[Tensor]] = {f"{way}_{what}": [] for what in ("tokens", "scores") for way in ("read", "write")}
    for components in layers:
        absent = (torch.arange(components.Vh.shape[1]) >= live(components.S)[:, None])[..., None, None]
        for way, rows, vectors in (("read", entering, components.U.mT), ("write", leaving, components.Vh)):
            along = vectors @ rows.mT
            ends = [along.topk(n), along.topk(n, largest=False)]
            found[f"{way}_tokens"].append(torch.stack([end.indices for end in ends], 2).masked_fill(absent, -1))
            found[f"{way}_scores"].append(torch.stack([end.values for end in ends], 2).masked_fill(absent, math.nan))
    return {key: torch.stack(values) for key, values in found.items()}
