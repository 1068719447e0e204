"""Planted changes: edits with a known answer, on any model, for checking what an analysis finds.

Nothing here imports torch until an edit is made.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from interp.errors import InputError
from interp.names import unknown
from interp.sites import HEAD_WEIGHTS, Site

if TYPE_CHECKING:
    from torch import Tensor

    from interp.edits import Edit, WeightChange
    from interp.models import HookedModel


def planted(kind: str, model: HookedModel, **settings: object) -> Edit:
    """What would an analysis find if the truth were known? A planted change of one kind.

    The edit is made for ``model``'s sizes and weights and holds no model. Apply it with
    ``model.edited(edit)``, or make a tuned checkpoint with ``model.save(folder, edit=edit)``.

    Args:
        kind: ``rank1``, ``head_offset``, ``resid_bias``, ``token_logit``, ``dense`` or ``module_only``;
            each is a function of this module, whose docstring lists its settings.
        model: gives sizes and, for relative norms, weights.
        settings: the settings of the kind.

    Raises:
        InputError: unknown kind or setting, or a layer, head, module or token the model does not have.
    """
    if kind not in KINDS:
        raise unknown("planted change", kind, KINDS)
    try:
        inspect.signature(KINDS[kind]).bind(model, **settings)
    except TypeError as e:
        raise InputError(f"planted({kind!r}): {e}; its settings are {_settings(kind)}") from e
    return KINDS[kind](model, **settings)


def rank1(model: HookedModel, *, layer: int, module: str, sigma: float, seed: int = 0, head: int | None = None) -> Edit:
    """One matrix gets ``sigma * u v^T`` with random unit vectors u (rows) and v (columns).

    Answer: a weight delta of rank 1 with singular value ``sigma``, in one matrix (with ``head`` in that head's slice of it).
    """
    from interp.edits import Edit, WeightChange

    site = _matrix(model, layer, module, head)
    rows, columns = model.weight(site).shape
    u, v = _unit(rows, seed, site, "u"), _unit(columns, seed, site, "v")
    change = WeightChange(site, (sigma * u)[:, None].float(), v[None, :].float())
    return Edit((change,), f"rank1({site}, sigma={sigma:g}, seed={seed})")


def head_offset(
    model: HookedModel, *, layer: int, head: int, vector: Tensor | None = None, scale: float | None = None, seed: int = 0
) -> Edit:
    """A constant is added to one head's output ``z`` at every position.

    Answer: activations differ from this head's z on; other heads of the layer are as before.

    Args:
        model: gives the sizes.
        layer: layer of the head.
        head: the head, a query head.
        vector: [d_head], the constant; or
        scale: length of a random vector.
        seed: of the random vector.
    """
    site = Site("z", _layer(model, layer), _head(model, head))
    return _added(site, model.shape.d_head, vector, scale, seed)


def resid_bias(model: HookedModel, *, layer: int, vector: Tensor | None = None, scale: float | None = None, seed: int = 0) -> Edit:
    """A constant is added to the residual stream leaving a block, at every position.

    Answer: the mean difference of ``resid_post`` is 0 below the layer and exactly the vector at it.

    Args:
        model: gives the sizes.
        layer: the block.
        vector: [d_model], the constant; or
        scale: length of a random vector.
        seed: of the random vector.
    """
    return _added(Site("resid_post", _layer(model, layer)), model.shape.d_model, vector, scale, seed)


def token_logit(model: HookedModel, *, token: str | int, c: float, through: Literal["b_U", "W_U"] = "b_U") -> Edit:
    """The logit of one token rises by ``c`` at every position of every prompt; no other logit changes.

    With ``through="b_U"`` this is what it says: an unembedding bias of ``c`` at the token, zero elsewhere. No
    checkpoint of an architecture without that bias can hold it.

    With ``through="W_U"`` it is a change of one column of W_U, possible only where the final normalisation
    leaves a constant channel. A LayerNorm's output is ``y = g * x + b`` with ``mean(x) = 0``, so
    ``sum(y / g) = sum(b / g) = s`` whatever the input, and adding ``c / (g s)`` to the column adds exactly ``c``.
    An RMSNorm fixes only the length of ``x``, a quadratic and not a linear quantity: there is no such channel.
    In a model with tied embeddings the column is also the token's embedding, so it is refused there too.

    Raises:
        InputError: ``through="W_U"`` on a model without a constant channel, or an unknown token.
    """
    import torch

    from interp.edits import Edit, WeightChange

    index = model.token(token) if isinstance(token, str) else token
    size = model.shape.d_vocab
    if not 0 <= index < size:
        raise InputError(f"token id {index} is not in the vocabulary of {size} tokens")
    name = f"token_logit({index}, c={c:g}, through={through})"
    if through == "b_U":
        delta = torch.zeros(size)
        delta[index] = c
        return Edit((WeightChange(Site("b_U"), delta),), name)
    if through != "W_U":
        raise InputError(f"through={through!r} is neither 'b_U' nor 'W_U'")
    right = torch.zeros(1, size)
    right[0, index] = c
    return Edit((WeightChange(Site("W_U"), _constant_channel(model)[:, None].float(), right),), name)


def dense(model: HookedModel, *, rel: float, seed: int = 0, embeddings: bool = False) -> Edit:
    """Every matrix of every block gets Gaussian noise of Frobenius norm ``rel`` times its own.

    Answer: the same relative change everywhere and no structure; a control of what training noise looks like.

    Args:
        model: gives sizes and norms.
        rel: relative Frobenius norm of the noise.
        seed: of the noise; a matrix's noise depends on (seed, site) only, as in ``module_only``.
        embeddings: W_E and W_U too (once if they are tied).
    """
    from interp.edits import Edit
    from interp.models.weights import modules

    shape = model.shape
    sites = [Site(module, layer) for layer in range(shape.n_layers) for module in modules(shape)]
    if embeddings:
        sites += [Site("W_E")] if shape.tied else [Site("W_E"), Site("W_U")]
    return Edit(tuple(_noise(model, site, rel, seed) for site in sites), f"dense(rel={rel:g}, seed={seed})")


def module_only(model: HookedModel, *, layer: int, module: str, rel: float, seed: int = 0, head: int | None = None) -> Edit:
    """One matrix gets Gaussian noise of Frobenius norm ``rel`` times its own (with ``head``: that head's slice).

    Answer: whatever changed in behaviour is due to this matrix alone.
    """
    from interp.edits import Edit

    site = _matrix(model, layer, module, head)
    return Edit((_noise(model, site, rel, seed),), f"module_only({site}, rel={rel:g}, seed={seed})")


KINDS: dict[str, Callable[..., Edit]] = {f.__name__: f for f in (rank1, head_offset, resid_bias, token_logit, dense, module_only)}
"""Kinds of planted changes by name."""


def _settings(kind: str) -> str:
    return ", ".join(list(inspect.signature(KINDS[kind]).parameters)[1:])


def _layer(model: HookedModel, layer: int) -> int:
    if not 0 <= layer < model.shape.n_layers:
        raise InputError(f"layer {layer} is not one of the model's {model.shape.n_layers} layers (from 0)")
    return layer


def _head(model: HookedModel, head: int) -> int:
    if not 0 <= head < model.shape.n_heads:
        raise InputError(f"head {head} is not one of the model's {model.shape.n_heads} heads (from 0)")
    return head


def _matrix(model: HookedModel, layer: int, module: str, head: int | None) -> Site:
    from interp.models.weights import modules

    known = modules(model.shape)
    if module not in known:
        raise InputError(f"module {module!r} is not a matrix of this model's blocks; known: {', '.join(known)}")
    if head is not None and module not in HEAD_WEIGHTS:
        raise InputError(f"{module} has no heads; a head fits {', '.join(m for m in known if m in HEAD_WEIGHTS)}")
    return Site(module, _layer(model, layer), None if head is None else _head(model, head))


def _normal(shape: tuple[int, ...], *key: object) -> Tensor:
    """Standard normal float64 numbers from a stream of their own for each key."""
    import torch

    seed = int.from_bytes(hashlib.sha256(repr(tuple(map(str, key))).encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _unit(size: int, *key: object) -> Tensor:
    x = _normal((size,), *key)
    return x / x.norm()


def _noise(model: HookedModel, site: Site, rel: float, seed: int) -> WeightChange:
    from interp.edits import WeightChange

    weight = model.weight(site)
    noise = _normal(tuple(weight.shape), seed, site)
    return WeightChange(site, (noise * (rel * float(weight.detach().double().norm()) / noise.norm())).float())


def _added(site: Site, size: int, vector: Tensor | None, scale: float | None, seed: int) -> Edit:
    from interp.edits import ActivationChange, Edit

    if vector is not None and scale is None:
        value, how = vector.detach().cpu().float(), "vector"
        if value.shape != (size,):
            raise InputError(f"the vector for {site} has shape {tuple(value.shape)}; ({size},) is expected")
    elif scale is not None and vector is None:
        value, how = (scale * _unit(size, seed, site)).float(), f"scale={scale:g}, seed={seed}"
    else:
        raise InputError(f"an offset at {site} needs either a vector of {size} numbers or the scale of a random one")
    return Edit((ActivationChange(site, "add", value),), f"offset({site}, {how})")


def _constant_channel(model: HookedModel) -> Tensor:
    """[d_model] w with y . w = 1 for every output y of the final LayerNorm."""
    if model.shape.tied:
        raise InputError("W_U is tied to W_E in this model: changing a column changes the token's embedding; use through='b_U'")
    try:
        gain, bias = (model.weight(Site(part)).detach().cpu().double() for part in ("ln_final", "b_ln_final"))
    except InputError as e:
        raise InputError(
            "the final normalisation of this model has no bias (as an RMSNorm), so W_U alone can not raise a logit by a constant; "
            "use through='b_U'"
        ) from e
    ratio = bias / gain
    constant = float(ratio.sum())
    if not abs(constant) > 1e-3 * float(ratio.abs().sum()) or not bool((gain != 0).all()):
        raise InputError("the final LayerNorm's bias gives no constant channel (its sum over gains is near 0); use through='b_U'")
    return 1 / (gain * constant)
