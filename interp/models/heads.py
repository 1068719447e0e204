"""What attention heads read and write as matrices: norms folded into them, factored, and taken apart by SVD.

Row vectors: a head adds ``attention @ x @ OV`` with ``OV = W_V @ W_O``, and scores ``(x @ W_Q + b_Q) @ (y @ W_K + b_K)^T``,
``QK = W_Q @ W_K^T``, where x and y are the stream behind the norm's division by its scale. The d_model x d_model products are never formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.linalg import SVD, signed, svd_of_products
from interp.models import weights
from interp.models.hooked import HookedModel
from interp.sites import Site

HeadCircuit = Literal["ov", "qk"]


@dataclass(frozen=True, eq=False)
class FoldedHeads:
    """The matrices of one layer's heads in the coordinates of the stream behind the norm's scale.

    The gain of the norm in front of attention is multiplied into ``W_Q``, ``W_K`` and ``W_V``, its bias into their biases. Where norms
    subtract the mean, what no reader can see is taken away: the readers' component along the all-ones direction, and ``W_O``'s.
    Everything else is as the model computes it. Under grouped-query attention heads share ``W_K`` and ``W_V``. ``gain`` is what was
    multiplied in, 1 everywhere where there is none.
    """

    layer: int
    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "kv_head d_head"]
    b_V: Float[Tensor, "kv_head d_head"]
    gain: Float[Tensor, " d_model"]

    def kv(self, head: int) -> int:
        """The key/value head that a query head reads."""
        return head // (self.W_Q.shape[0] // self.W_K.shape[0])

    def ov(self, head: int) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]]:
        """``OV = a @ b`` of a query head, in factors."""
        return self.W_V[self.kv(head)], self.W_O[head]

    def qk(self, head: int) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]]:
        """``QK = a @ b`` of a query head, in factors; without rotary embeddings, as at distance 0."""
        return self.W_Q[head], self.W_K[self.kv(head)].mT

    def factors(self, circuit: HeadCircuit) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head d_model"]]:
        """Both factors of every query head."""
        left, right = self._shared(circuit)
        heads = (*self.W_K.shape[:1], self.W_Q.shape[0] // self.W_K.shape[0], -1, -1)
        return left.expand(heads).flatten(0, 1), right.expand(heads).flatten(0, 1)

    def _shared(self, circuit: HeadCircuit) -> tuple[Tensor, Tensor]:
        """Both factors as [kv_head, head of its group, ..]; one entry in a group where its heads share the factor."""
        mine = self.W_O if circuit == "ov" else self.W_Q
        mine = mine.unflatten(0, (self.W_K.shape[0], -1))
        return (self.W_V[:, None], mine) if circuit == "ov" else (mine, self.W_K[:, None].mT)

    def components(self, circuit: HeadCircuit) -> SVD:
        """SVD of every query head: U [head d_model rank], S [head rank], Vh [head rank d_model], strongest first.

        Rows of ``Vh`` are what a component writes (OV) or looks for in keys (QK), columns of ``U`` what it reads (in queries). Signs, which
        an SVD leaves open in pairs, are such that the largest entry of each row of ``Vh`` is positive.
        """
        return signed(SVD(*(x.flatten(0, 1) for x in svd_of_products(*self._shared(circuit)))))


def folded_heads(model: HookedModel, layer: int, dtype: torch.dtype = torch.float64) -> FoldedHeads:
    """One layer's heads as ``FoldedHeads``, on the CPU, from the files where the model need not be loaded; edits in force count.

    Raises:
        InputError: no such layer, or an architecture whose weights are not known by site.
    """
    shape, source = model.shape, model.weights()
    if not 0 <= layer < shape.n_layers:
        raise InputError(f"layer {layer} does not exist; the model has layers 0 to {shape.n_layers - 1}")

    def read(component: str) -> Tensor | None:
        found = weights.read(Site(component, layer), source, shape)
        return None if found is None else found.detach().cpu().to(dtype)

    gain, shift, centred = read("ln1"), read("b_ln1"), weights.centred(shape)
    if gain is not None:
        gain = gain + weights.gain_offset(shape)
    folded: dict[str, Tensor] = {}
    for name in ("Q", "K", "V"):
        site, matrix, bias = Site(f"W_{name}", layer), read(f"W_{name}"), read(f"b_{name}")
        assert matrix is not None
        bias = torch.zeros(matrix.shape[1], dtype=dtype) if bias is None else bias
        if shift is not None:
            bias = bias + shift @ matrix
        if gain is not None:
            matrix = gain[:, None] * matrix
        if centred:
            matrix = matrix - matrix.mean(0, keepdim=True)
        folded[f"W_{name}"] = weights.heads(site, matrix, shape)
        folded[f"b_{name}"] = weights.heads(Site(f"b_{name}", layer), bias, shape)
    out = read("W_O")
    assert out is not None
    if centred:
        out = out - out.mean(1, keepdim=True)
    gain = torch.ones(shape.d_model, dtype=dtype) if gain is None else gain
    return FoldedHeads(layer, W_O=weights.heads(Site("W_O", layer), out, shape), **folded, gain=gain)


def folded_vocabulary(model: HookedModel, dtype: torch.dtype = torch.float32) -> tuple[Float[Tensor, "vocab d_model"], Tensor]:
    """What tokens put into the stream and read from it: ``W_E`` [vocab d_model] and ``W_U`` [d_model vocab] with the final norm's gain.

    Both without what norms that subtract the mean take away, as in ``FoldedHeads``.
    """
    shape, source = model.shape, model.weights()
    entering, leaving, gain = (weights.read(Site(c), source, shape) for c in ("W_E", "W_U", "ln_final"))
    assert entering is not None and leaving is not None
    entering, leaving = entering.detach().cpu().to(dtype), leaving.detach().cpu().to(dtype)
    if gain is not None:
        leaving = (gain.detach().cpu().to(dtype) + weights.gain_offset(shape))[:, None] * leaving
    if weights.centred(shape):
        entering, leaving = entering - entering.mean(1, keepdim=True), leaving - leaving.mean(0, keepdim=True)
    return entering, leaving


def outside(model: HookedModel, circuit: HeadCircuit = "ov") -> tuple[str, ...]:
    """What of this model's heads no product of two matrices holds, as sentences for the reader."""
    names = [weights.bare(name) for name in model.weights().names()]
    notes = []
    if circuit == "qk" and any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in names):
        notes.append("queries and keys are normed, so QK is what they are before it")
    if circuit == "qk" and weights.key_of("W_pos", model.shape) is None:
        notes.append("positions enter between queries and keys, and QK is that of distance 0")
    if any("post_feedforward_layernorm" in name for name in names):
        notes.append("a norm behind attention scales what heads write; its gain is not in OV")
    return (*notes, *upcast(model))


def upcast(model: HookedModel, to: str = "float64") -> tuple[str, ...]:
    """A sentence for the reader where weights are stored in a dtype narrower than float32."""
    narrow = _narrow(model)
    return (f"weights are {narrow}; they are taken apart in {to}",) if narrow else ()


def _narrow(model: HookedModel) -> str:
    """Name of a stored dtype narrower than float32, or ""."""
    source = model.weights()
    found = weights.locate(Site("W_O", 0), source.names(), model.shape)
    dtype = source.info(found[0][0]).dtype if found else torch.float32
    return str(dtype).removeprefix("torch.") if dtype.itemsize < 4 else ""


def component(model: HookedModel, site: Site | str, circuit: HeadCircuit = "ov") -> tuple[Tensor, float, Tensor]:
    """One component of a head, such as ``L8H10.1``: what it reads, its strength, and what it writes; unit vectors [d_model] in float64.

    What a head writes along it at a token is the coefficient ``(z @ W_O) @ write``.

    Raises:
        InputError: no component, one beyond the head's rank, or one without strength.
    """
    (site,) = model.sites(site)
    if site.rank is None or site.layer is None or site.head is None:
        raise InputError(f"{site} is no component of a head; write L8H10.1")
    layer, head, rank = site.layer, site.head, site.rank
    factors = folded_heads(model, layer).components(circuit)
    check_component(model, site, factors.S[head])
    return factors.U[head, :, rank], float(factors.S[head, rank]), factors.Vh[head, rank]


def check_component(model: HookedModel, site: Site, strength: Float[Tensor, " rank"]) -> None:
    """Refuse a component that a head does not have.

    Raises:
        InputError: it is beyond the rank, or its strength is rounding: not even its direction means anything then.
    """
    rank, n = site.rank or 0, len(strength)
    if rank >= n:
        raise InputError(f"{site}: heads of {model.name} have {n} components, 0 to {n - 1}")
    if not float(strength[rank]) > model.shape.d_model * torch.finfo(strength.dtype).eps * float(strength[0]):
        there = int((strength > model.shape.d_model * torch.finfo(strength.dtype).eps * strength[0]).sum())
        what = f"its head writes along {there} component{'s' * (there != 1)} only" if there else "all weights of its head's OV are zero"
        raise InputError(f"{site} has no strength: {what}, so that there is no direction to change")
