"""A baseline that learns which weights to zero to forget given texts (BalancedSubnet, Sakarvadia et al. 2024, arXiv 2410.02159).

Every weight of the MLPs gets a score; the weights with the lowest scores of each matrix, a fixed share, are zeroed. Weights are frozen and
scores learnt: the loss of texts to forget is ascended, that of texts to keep descended, with a gradient straight through the mask. Unlike
an edit by curvature it sees what it is to forget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from interp.edits import Edit, WeightChange
from interp.models import HookedModel
from interp.models.batch import Batch
from interp.sites import Site

PARAMETERS = {"W_gate": "gate_proj", "W_in": "up_proj", "W_out": "down_proj"}
"""Of a Llama; torch keeps them as [out, in]."""

ROWS = 16
MOMENTUM, DECAY = 0.9, 5e-4


def mask(score: Tensor, ratio: float) -> Tensor:
    """1 but for the share of weights with the lowest |score|, which get 0; its gradient is that of |score|."""
    size = score.abs()
    gone = round(ratio * score.numel())
    kept = torch.ones_like(size)
    if gone:
        kept = (size > size.detach().flatten().kthvalue(gone).values).to(size.dtype)
    return kept + (size - size.detach())  # the bracket is exactly 0


def balanced_subnet(
    model: HookedModel,
    forget: Sequence[Sequence[int]],
    keep: Sequence[Sequence[int]],
    *,
    ratio: float,
    rate: float = 0.3,
    epochs: int = 5,
    weight: float = 0.7,
    seed: int = 0,
) -> Edit:
    """The edit that zeroes what was learnt to be zeroed, in all MLPs.

    Args:
        model: a Llama, such as ``base``.
        forget: token ids of the texts to forget.
        keep: token ids of the texts to keep.
        ratio: share of every matrix that is zeroed.
        rate: learning rate of plain gradient descent with momentum.
        epochs: how often all texts are read, shuffled and mixed.
        weight: share of the forgetting in the loss ``(1 - weight) keep - weight forget``; how the paper weights is not known.
        seed: of scores and shuffles.
    """
    source: Any = model.wrapped.source
    draw = torch.Generator().manual_seed(seed)
    scores: dict[Site, Tensor] = {}
    for layer in range(model.shape.n_layers):
        for module, name in PARAMETERS.items():
            shape = source.get_parameter(f"model.layers.{layer}.mlp.{name}.weight").shape
            edge = 1 / math.sqrt(shape[1])  # Kaiming's uniform law with a = sqrt 5
            scores[Site(module, layer)] = ((2 * torch.rand(shape, generator=draw) - 1) * edge).requires_grad_()
    names = {site: f"model.layers.{site.layer}.mlp.{PARAMETERS[site.component]}.weight" for site in scores}
    frozen = {name: source.get_parameter(name).detach() for name in names.values()}
    texts = [(row, -weight) for row in forget] + [(row, 1 - weight) for row in keep]
    optimizer = torch.optim.SGD(scores.values(), rate, momentum=MOMENTUM, weight_decay=DECAY)
    for _ in range(epochs):
        order = torch.randperm(len(texts), generator=draw).tolist()
        for start in range(0, len(order), ROWS):
            part = [texts[i] for i in order[start : start + ROWS]]
            batch, signs = Batch.of([list(row) for row, _ in part]), torch.tensor([sign for _, sign in part])
            masked = {names[site]: frozen[names[site]] * mask(score, ratio) for site, score in scores.items()}
            logits = functional_call(source, masked, kwargs={"input_ids": batch.ids, "attention_mask": batch.mask.long()}).logits
            after = torch.where(batch.mask, batch.ids, -100)[:, 1:]
            each = cross_entropy(logits[:, :-1].transpose(1, 2), after, reduction="none").sum(1) / (batch.lengths - 1)
            grads = torch.autograd.grad((signs * each).mean(), list(scores.values()))
            for score, grad in zip(scores.values(), grads, strict=True):
                score.grad = grad
            optimizer.step()
    changes = []
    for site, score in scores.items():
        delta = frozen[names[site]] * (mask(score.detach(), ratio) - 1)
        changes.append(WeightChange(site, delta.T.contiguous()))
    return Edit(tuple(changes), f"balanced subnet, {ratio:.1%} of the MLP weights zeroed")
