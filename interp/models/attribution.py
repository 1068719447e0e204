"""What parts of the residual stream add to the logits directly: through the final norm as it scales in that run, and the unembedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.hooked import HookedModel
from interp.models.restart import logits_of
from interp.models.weights import locate
from interp.sites import Site

_ROWS = 2**12
_CELLS = 2**24  # numbers of activations and logits held at a time: 64 MB in fp32


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """A final norm as a linear map over a scale, N(x) = A x / s(x) + b: with s held, what parts of a stream give adds up.

    A, s and b are read off what the model's own norm does, whichever it is.

    Attributes:
        norm: the model's own, [row d_model].
        linear: A.
        bias: b, [1 d_model].
    """

    norm: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]
    bias: Float[Tensor, "1 d_model"]

    @classmethod
    def of(cls, model: HookedModel) -> FinalNorm:
        """That of a model, with the weights that were in force when it ran last.

        Raises:
            InputError: the final norm is no linear map over a scale.
        """
        wide = torch.promote_types(model.dtype, torch.float32)

        def norm(x: Tensor) -> Tensor:
            with torch.no_grad():
                some = [model.wrapped.finish(rows.to(model.device, model.dtype), trunk=True) for rows in x.split(_ROWS)]
            return torch.cat(some).to(wide)

        linear, bias = _linear(model, norm)
        return cls(norm, linear, bias)

    def per_scale(self, stream: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
        """1 / s of a stream."""
        x = stream.to(self.bias)
        whole, scaled = self.linear(x), self.norm(x) - self.bias
        return (scaled * whole).sum(-1) / whole.square().sum(-1).clamp_min(torch.finfo(x.dtype).tiny)

    def before(self, direction: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt d_model"]:
        """The directions in front of the norm that give directions behind it: A^T u."""
        u = direction.to(self.bias)
        found = []
        for start in range(0, u.shape[1], _ROWS):
            basis = torch.zeros(min(_ROWS, u.shape[1] - start), u.shape[1]).to(u)
            basis[range(len(basis)), range(start, start + len(basis))] = 1
            found.append(u @ self.linear(basis).T)
        return torch.cat(found, 1)


def logit_attribution(
    model: HookedModel,
    stream: Float[Tensor, "prompt d_model"],
    parts: Float[Tensor, "prompt part d_model"],
    direction: Float[Tensor, "prompt d_model"],
) -> Float[Tensor, "prompt part"]:
    """Logits that parts of the stream add along a direction behind the final norm, whose scale is held at that of the whole stream.

    The parts of a stream add up to what the stream gives, less what the norm's bias does.

    Args:
        model: whose final norm it is, with the weights now in force.
        stream: leaving the last block, all of it.
        parts: what is added up in it.
        direction: such as a column of W_U less another.

    Raises:
        InputError: the final norm is no linear map over a scale.
    """
    norm = FinalNorm.of(model)
    u = direction.to(norm.bias)
    along = (norm.linear(parts.to(norm.bias).flatten(0, 1)).unflatten(0, parts.shape[:2]) * u[:, None]).sum(-1)
    return along * norm.per_scale(stream)[:, None]


def _linear(model: HookedModel, norm: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The linear map of the final norm, and what it adds; tried on random vectors."""
    wide = torch.promote_types(model.dtype, torch.float32)
    bias = norm(torch.zeros(1, model.shape.d_model, device=model.device, dtype=wide))
    # So long a vector that what the norm adds to its variance is lost in rounding, and short enough for the dtype.
    far = 2.0**20 if torch.finfo(model.dtype).max > 1e30 else 2.0**10
    draws = torch.Generator().manual_seed(0)
    probe = torch.randn(2, model.shape.d_model, generator=draws, dtype=torch.float64).to(bias)
    moved = norm(far * (probe + 1)) - norm(far * probe)
    close = max(1e-3, 16 * torch.finfo(model.dtype).eps)
    centred = bool(moved.norm() <= close * (norm(far * probe) - bias).norm())

    def size(x: Tensor) -> Tensor:
        return ((x - x.mean(-1, keepdim=True)) if centred else x).square().mean(-1, keepdim=True).sqrt()

    def linear(x: Tensor) -> Tensor:
        length = x.abs().amax(-1, keepdim=True)
        enlarged = x * (far / torch.where(length > 0, length, 1.0))
        return (norm(enlarged) - bias) * size(x)

    apart, together = linear(probe), linear(probe.sum(0, keepdim=True))
    if not bool((apart.sum(0) - together).norm() <= close * together.norm()):
        raise InputError(f"the final norm of {model.shape.architecture} is no linear map over a scale, so logits are not a sum over parts")
    return linear, bias


@dataclass(frozen=True, eq=False)
class LogitParts:
    """A difference of logits, and what every part of the model adds to it; float64, on the CPU.

    Attributes:
        whole: of the model's own logits.
        size: the largest of the logits and parts that it is made of: what rounding is to be measured by.
        embed: of the token's embedding.
        position: of whatever else enters the first block, such as a position embedding; 0 in rotary models.
        heads: of z @ W_O of single heads, their value biases among it.
        mlp: of MLPs, without their output biases.
        b_O: of the bias of what attention adds.
        b_out: of the MLP's output bias.
        norm: of the bias of the final norm.
        unembedding: of the bias of the unembedding.
    """

    whole: Float[Tensor, " prompt"]
    size: Float[Tensor, " prompt"]
    embed: Float[Tensor, " prompt"]
    position: Float[Tensor, " prompt"]
    heads: Float[Tensor, "prompt layer head"]
    mlp: Float[Tensor, "prompt layer"]
    b_O: Float[Tensor, "prompt layer"]  # noqa: N815
    b_out: Float[Tensor, "prompt layer"]
    norm: Float[Tensor, " prompt"]
    unembedding: Float[Tensor, " prompt"]

    @property
    def rest(self) -> Float[Tensor, " prompt"]:
        """What no part accounts for: rounding."""
        added = [getattr(self, f.name).flatten(1) if f.name in _BY_LAYER else getattr(self, f.name)[:, None] for f in fields(self)[2:]]
        return self.whole - torch.cat(added, 1).sum(1)


_BY_LAYER = ("heads", "mlp", "b_O", "b_out")


def logit_parts(
    model: HookedModel,
    batch: Batch,
    tokens: Int[Tensor, " prompt"],
    against: Int[Tensor, " prompt"] | None = None,
    *,
    at: str | int = "END",
    vocab: int | None = None,
) -> LogitParts:
    """What every part of a model adds to logits, the final norm's scale held at that of the run.

    Args:
        model: the model, with the weights now in force.
        batch: prompts.
        tokens: whose logit it is.
        against: tokens whose logits are taken off; None takes off the mean over the vocabulary.
        at: where the logits are read.
        vocab: the mean is over the ids below it; None is all.

    Raises:
        InputError: the stream, or its logits, are no sum over parts in this architecture; or a position that is not one token.
    """
    s = model.shape
    known = s.d_vocab if vocab is None else vocab
    for layer in range(s.n_layers):
        model.sites(Site("result", layer))
    batch.index(at)
    model.wrapped.refresh()
    norm = FinalNorm.of(model)
    direction, constant = _direction(model, tokens, against, known)
    along = norm.before(direction)
    added = _biases(model)
    sites = [Site("embed", position=at), Site("resid_pre", 0, position=at), Site("resid_post", s.n_layers - 1, position=at)]
    sites += [Site(c, layer, position=at) for c in ("z", "mlp_out") for layer in range(s.n_layers)]
    step = max(1, _CELLS // (s.n_layers * (s.n_heads * s.d_head + s.d_model) + 3 * s.d_model + 2 * s.d_vocab))
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(batch), step):
        rows = list(range(start, min(start + step, len(batch))))
        seen = model.capture(batch.select(rows), sites)
        one, other, last, *rest = (seen[site] for site in sites)
        w = along[rows] * norm.per_scale(last)[:, None]
        own = {"embed": _dot(one, w), "position": _dot(other.to(w) - one.to(w), w)}
        own |= {"norm": (norm.bias.to(direction) * direction[rows]).sum(-1), "unembedding": constant[rows]}
        own |= {name: torch.stack([_dot(b, w) for b in biases], 1) for name, biases in added.items()}
        own["heads"] = torch.stack([_heads(model, layer, z, w) for layer, z in enumerate(rest[: s.n_layers])], 1)
        own["mlp"] = torch.stack([_dot(x, w) for x in rest[s.n_layers :]], 1) - own["b_out"]
        logits = logits_of(model, last)
        found.append({k: v.double().cpu() for k, v in (own | _whole(logits, tokens[rows], _of(against, rows), known)).items()})
    joined = {k: torch.cat([f[k] for f in found]) for k in found[0]}
    size = torch.stack([v.abs().flatten(1).amax(1) if v.ndim > 1 else v.abs() for v in joined.values()]).amax(0)
    parts = LogitParts(size=size, **{k: v for k, v in joined.items() if k not in ("logit", "other")})
    off = float((parts.rest.abs() / parts.size).nan_to_num(torch.inf).max())
    if off > max(1e-3, 32 * torch.finfo(model.dtype).eps):
        raise InputError(
            f"the parts of {model.name} ({s.architecture}) miss its logits by {off:.2g} of their size: something scales or bends them "
            "behind the unembedding (a soft-cap), or adds to the stream beside heads and MLPs (an edit), so they are no sum over parts"
        )
    return parts


def _of(x: Tensor | None, rows: list[int]) -> Tensor | None:
    return None if x is None else x[rows]


def _dot(x: Tensor, w: Tensor) -> Tensor:
    return (x.to(w) * w).sum(-1)


def _heads(model: HookedModel, layer: int, z: Tensor, w: Tensor) -> Float[Tensor, "prompt head"]:
    """What z @ W_O of every head gives along directions."""
    read = torch.einsum("hcd,pd->phc", model.wrapped.output_weights(layer).to(w), w)
    return (z.to(w) * read).sum(-1)


def _biases(model: HookedModel) -> dict[str, list[Tensor]]:
    """``b_O`` and ``b_out`` of every layer, zeros where there are none."""
    s, found = model.shape, dict[str, list[Tensor]](b_O=[], b_out=[])
    names = [name for name, _ in model.wrapped.source.named_parameters(remove_duplicate=False)]
    none = torch.zeros(1, s.d_model, device=model.device, dtype=model.dtype)
    for layer in range(s.n_layers):
        with torch.no_grad():
            found["b_O"].append(model.wrapped.output_projection(layer)(none.new_zeros(1, s.n_heads * s.d_head)))
        site = Site("b_out", layer)
        found["b_out"].append(model.weight(site)[None].detach() if locate(site, names, s) else none)
    return found


def _direction(model: HookedModel, tokens: Tensor, against: Tensor | None, vocab: int) -> tuple[Float[Tensor, "prompt d_model"], Tensor]:
    """Columns of the unembedding less those that are taken off, and the same of its bias [prompt]."""
    head = model.wrapped.unembedding
    wide = torch.promote_types(model.dtype, torch.float32)
    columns = head.weight.detach()
    bias = torch.zeros(len(columns), device=columns.device, dtype=wide) if head.bias is None else head.bias.detach().to(wide)
    tokens = tokens.to(columns.device)
    if against is not None:
        against = against.to(columns.device)
        return columns[tokens].to(wide) - columns[against].to(wide), bias[tokens] - bias[against]
    total = torch.stack([some.to(wide).sum(0) for some in columns[:vocab].split(_ROWS)]).sum(0)
    return columns[tokens].to(wide) - total / vocab, bias[tokens] - bias[:vocab].mean()


def _whole(logits: Tensor, tokens: Tensor, against: Tensor | None, vocab: int) -> dict[str, Tensor]:
    """The difference of logits, and the largest of those that it is made of."""
    tokens = tokens.to(logits.device)[:, None]
    one = logits.gather(1, tokens)[:, 0].double()
    if against is None:
        other = logits[:, :vocab].mean(1, dtype=torch.promote_types(logits.dtype, torch.float32)).double()
    else:
        other = logits.gather(1, against.to(logits.device)[:, None])[:, 0].double()
    return {"whole": one - other, "logit": one, "other": other}
