"""Loss and KL of a model with edits on the same texts, a few prompts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit
from interp.errors import InputError
from interp.metrics import kl_divergence
from interp.models.batch import Batch
from interp.progress import progress

if TYPE_CHECKING:
    from interp.models.hooked import HookedModel

_CELLS = 2**23  # tokens x vocabulary held at a time


def loss_and_kl(
    model: HookedModel, batch: Batch, others: Sequence[Edit | HookedModel | None], *, vocab: int | None = None
) -> Float[Tensor, "what other prompt"]:
    """Mean negative log-likelihood of the next tokens, and mean KL(model || other), over the positions 0 to S - 2 of every prompt.

    Args:
        model: what the others are compared with.
        batch: texts of at least two tokens.
        others: edits of the model, other models, or None for the model as it is.
        vocab: only the token ids below it are compared, renormalised to them; next tokens beyond it are left out of the loss.

    Returns:
        Loss and KL in nats, float64.

    Raises:
        InputError: a prompt of one token.
    """
    if int(batch.lengths.min()) < 2:
        raise InputError(f"prompt {int(batch.lengths.argmin())} is a single token, which has no next token to predict")
    size = model.shape.d_vocab if vocab is None else vocab
    found = torch.zeros(2, len(others), len(batch), dtype=torch.float64)
    groups = list(_groups(batch, size))
    for rows in progress(groups, "loss", total=len(groups)):
        part = batch.select(rows)
        own = log_probs(model.logits(part), size)
        for i, other in enumerate(others):
            if other is None or (isinstance(other, Edit) and not other.changes):
                changed = own
            elif isinstance(other, Edit):
                with model.edited(other):
                    changed = log_probs(model.logits(part), size)
            else:
                changed = log_probs(other.logits(part), size).to(own.device)
            found[:, i, rows] = means(own, changed, part)
    return found


def _groups(batch: Batch, vocab: int) -> Iterator[list[int]]:
    """Prompts of like length whose logits fit the memory that is meant for them."""
    group: list[int] = []
    lengths = batch.lengths.tolist()
    for row in sorted(range(len(batch)), key=lambda r: -lengths[r]):
        if group and (len(group) + 1) * lengths[group[0]] * vocab > _CELLS:
            yield group
            group = []
        group.append(row)
    yield group


def log_probs(logits: Float[Tensor, "prompt pos vocab"], vocab: int) -> Float[Tensor, "prompt next shared"]:
    """Of the first ids of the vocabulary, for all positions but the last; in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[:, :-1, :vocab].to(wide).log_softmax(-1)


def means(own: Tensor, changed: Tensor, part: Batch) -> Float[Tensor, "what prompt"]:
    """Loss of ``changed`` and KL(own || changed), both ``log_probs``, over the positions that have a next token."""
    after, there = (x[:, 1:].to(own.device) for x in (part.ids, part.mask))
    known = after.clamp(max=own.shape[-1] - 1)
    counted = there & (after == known)
    nll = -changed.gather(-1, known[..., None])[..., 0].double()
    kl = torch.zeros_like(nll) if changed is own else kl_divergence(own, changed).double()
    loss = torch.where(counted, nll, 0.0).sum(1) / counted.sum(1).clamp(min=1)
    return torch.stack([loss, torch.where(there, kl, 0.0).sum(1) / there.sum(1)]).cpu()
