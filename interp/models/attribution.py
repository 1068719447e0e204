"""What a part of the residual stream adds to the logits directly: through the final norm as it scales in that run, and the unembedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.models.hooked import HookedModel

_FAR = 1e3  # so long a vector that what the norm adds to its variance is lost in rounding
_ROWS = 2**12


def logit_attribution(
    model: HookedModel,
    stream: Float[Tensor, "prompt d_model"],
    parts: Float[Tensor, "prompt part d_model"],
    direction: Float[Tensor, "prompt d_model"],
) -> Float[Tensor, "prompt part"]:
    """Logits that parts of the stream add along a direction behind the final norm, whose scale is held at that of the whole stream.

    A final norm is a linear map over a scale, N(x) = A x / s(x) + b, so with s held the parts of a stream add up to what the stream
    gives, less what b does. A, s and b are read off what the model's own norm does, whichever it is.

    Args:
        model: whose final norm it is, with the weights now in force.
        stream: leaving the last block, all of it.
        parts: what is added up in it.
        direction: such as a column of W_U less another.

    Raises:
        InputError: the final norm is no linear map over a scale.
    """
    wide = torch.promote_types(stream.dtype, torch.float32)

    def norm(x: Tensor) -> Tensor:
        with torch.no_grad():
            some = [model.wrapped.finish(rows.to(model.device, model.dtype), trunk=True) for rows in x.split(_ROWS)]
        return torch.cat(some).to(wide)

    x, u = stream.to(model.device, wide), direction.to(model.device, wide)
    linear, bias = _linear(model, norm, x)
    whole, scaled = linear(x), norm(x) - bias
    per_scale = (scaled * whole).sum(-1) / whole.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
    flat = parts.to(model.device, wide).flatten(0, 1)
    along = (linear(flat).unflatten(0, parts.shape[:2]) * u[:, None]).sum(-1)
    return along * per_scale[:, None]


def _linear(model: HookedModel, norm: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The linear map of the final norm, and what it adds; tried on random vectors."""
    bias = norm(torch.zeros_like(like[:1]))
    draws = torch.Generator().manual_seed(0)
    probe = torch.randn(2, like.shape[1], generator=draws, dtype=torch.float64).to(like)
    moved = norm(_FAR * (probe + 1)) - norm(_FAR * probe)
    close = max(1e-3, 16 * torch.finfo(model.dtype).eps)
    centred = bool(moved.norm() <= close * (norm(_FAR * probe) - bias).norm())

    def size(x: Tensor) -> Tensor:
        return ((x - x.mean(-1, keepdim=True)) if centred else x).square().mean(-1, keepdim=True).sqrt()

    def linear(x: Tensor) -> Tensor:
        length = x.square().mean(-1, keepdim=True).sqrt()
        far = x * (_FAR / torch.where(length > 0, length, 1.0))
        return (norm(far) - bias) * size(x)

    apart, together = linear(probe), linear(probe.sum(0, keepdim=True))
    if not bool((apart.sum(0) - together).norm() <= close * together.norm()):
        raise InputError(f"the final norm of {model.shape.architecture} is no linear map over a scale, so logits are not a sum over parts")
    return linear, bias
