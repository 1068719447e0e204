"""The edges of a model: what its parts write into the residual stream, and what each part reads from it.

A part reads the sum of all that was written before it, through a norm of its own. An edge is the share of one writer in what
one reader reads, so the gradient of a metric by an edge is that by the reader's input; writers do not come into it. The gradient
is taken behind the norm and the projections, and pulled back through them, so no input is ever copied per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.interventions import Hooks, Part
from interp.models.weights import heads
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.checkpoint import Shape
    from interp.models.hooked import HookedModel

QKV = {"q": "W_Q", "k": "W_K", "v": "W_V"}


def senders(shape: Shape) -> tuple[Site, ...]:
    """What writes into the stream, in order: the embedding, then of every layer its heads and its MLP."""
    layers = [[*(Site("z", i, h) for h in range(shape.n_heads)), Site("mlp_out", i)] for i in range(shape.n_layers)]
    return (Site("embed"), *(site for layer in layers for site in layer))


def receivers(shape: Shape) -> tuple[Site, ...]:
    """What reads it, in order: of every layer q, k and v of its heads and its MLP (``resid_mid``), then the logits (``resid_post``).

    ``k`` and ``v`` count key/value heads.
    """
    found = []
    for i in range(shape.n_layers):
        found += [Site(c, i, h) for c in QKV for h in range(shape.n_heads if c == "q" else shape.n_kv_heads)]
        found.append(Site("resid_mid", i))
    return (*found, Site("resid_post", shape.n_layers - 1))


def reach(shape: Shape, receiver: Site) -> int:
    """How many of the senders, in their order, have written when a receiver reads."""
    layer = receiver.layer or 0
    if receiver.component == "resid_post":
        return 1 + (layer + 1) * (shape.n_heads + 1)
    attended = receiver.component == "resid_mid" and not shape.parallel
    return 1 + layer * (shape.n_heads + 1) + (shape.n_heads if attended else 0)


@dataclass(frozen=True, eq=False)
class Judge:
    """A metric as a function of logits.

    Attributes:
        of: logits [row vocab], and which prompt each row is -> one number per row.
        at: the position whose logits it takes.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    at: str | int


@dataclass(frozen=True, eq=False)
class Trace:
    """One pass: what was written, what was read, how the metric depends on it. Tensors are [prompt pos ...].

    Attributes:
        batch: the prompts.
        value: the metric, [prompt].
        sent: ``embed`` and every layer's ``z`` and ``mlp_out``; ``embed`` is the whole stream entering the first block.
        streams: every layer's ``resid_pre``, ``resid_mid`` where blocks are sequential, and the last ``resid_post``.
        read: every layer's q, k, v, and under ``resid_mid`` what its MLP takes from its norm; and the last ``resid_post``.
        slopes: gradient of the metric by what is in ``read``, each by its own way only; empty where none was asked for.
    """

    batch: Batch
    value: Float[Tensor, " prompt"]
    sent: Mapping[Site, Tensor]
    streams: Mapping[Site, Tensor]
    read: Mapping[Site, Tensor]
    slopes: Mapping[Site, Tensor]

    def along(self, columns: Int[Tensor, "prompt pos"], batch: Batch) -> Trace:
        """The same run with its tokens in another order, where they stand against those of other prompts."""
        rows = torch.arange(len(columns))[:, None]

        def placed(found: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
            return {site: x[rows.to(x.device), columns.to(x.device)] for site, x in found.items()}

        return replace(self, batch=batch, sent=placed(self.sent), streams=placed(self.streams), read=placed(self.read), slopes={})


class Edges:
    """The edges of one model, with the edits now in force."""

    def __init__(self, model: HookedModel) -> None:
        """Nothing is computed yet."""
        self.model, self.shape = model, model.shape
        self.last = Site("resid_post", model.shape.n_layers - 1)
        self._found: dict[str, Tensor] = {}

    def trace(self, batch: Batch, judge: Judge, *, start: Tensor | None = None, slopes: bool = True) -> Trace:
        """Run prompts in one pass and keep what edges need.

        Args:
            batch: the prompts.
            judge: the metric.
            start: the stream entering the first block, instead of the embedding of the prompts.
            slopes: differentiate the metric.

        Raises:
            InputError: the metric has no gradient.
        """
        layers = range(self.shape.n_layers)
        streams = [Site("resid_pre", i) for i in layers] + ([] if self.shape.parallel else [Site("resid_mid", i) for i in layers])
        wanted = [*streams, self.last, *(Site(c, i) for i in layers for c in ("z", "mlp_out"))]
        seen: dict[Site, Tensor] = {}
        read: dict[Site, Tensor] = {}

        def begin(x: Tensor) -> Tensor:
            return (x if start is None else start.to(x)).detach().clone().requires_grad_(slopes)

        def branch(site: Site, x: Tensor) -> Tensor:
            read[site] = x.clone()  # what a norm gives may go elsewhere too; the gradient wanted is that by this reader
            return read[site]

        def prepare(hooks: Hooks) -> None:
            hooks.on("resid_pre", 0, begin)
            for site in wanted:
                hooks.on(site.component, site.layer, lambda x, site=site: seen.update({site: x.detach().clone()}))
            for site in [*(Site(c, i) for i in layers for c in (*QKV, "resid_mid")), self.last]:
                _at_reader(hooks, site, lambda x, site=site: branch(site, x))

        with torch.set_grad_enabled(slopes):
            value = self._judged(Part.of(batch), prepare, judge)
            if slopes and not value.requires_grad:
                raise InputError("this metric has no gradient, so there is nothing to attribute; take another one, or method=exact")
            found = torch.autograd.grad(value.sum(), list(read.values()), materialize_grads=True) if slopes else ()
        sent = {Site("embed"): seen[Site("resid_pre", 0)], **{Site(c, i): seen[Site(c, i)] for i in layers for c in ("z", "mlp_out")}}
        kept = {site: x.detach() for site, x in read.items()}
        return Trace(batch, value.detach(), sent, seen, kept, dict(zip(read, found, strict=False)))

    def _judged(self, part: Part, prepare: Callable[[Hooks], None], judge: Judge) -> Tensor:
        """The metric of a pass; nothing else is unembedded than what it reads."""
        columns, inverse = part.batch.index(judge.at).unique(return_inverse=True)
        logits = self.model.forward(part, prepare, keep=columns).logits
        return judge.of(logits[torch.arange(len(inverse), device=logits.device), inverse.to(logits.device)], part.rows)

    def changes(self, clean: Trace, corrupt: Trace, mask: Bool[Tensor, "prompt pos"]) -> Float[Tensor, "sender prompt pos d_model"]:
        """What every sender writes in the corrupt run less what it writes in the clean one. Biases cancel.

        Args:
            clean: one run.
            corrupt: the other, its tokens where they stand against the clean ones.
            mask: tokens that are compared; elsewhere the change is 0.

        Raises:
            InputError: the parts of this architecture do not add up to its residual stream.
        """
        found: list[Tensor] = []
        for site, x in clean.sent.items():
            change = _wide(corrupt.sent[site]) - _wide(x)
            if site.component == "z":
                change = torch.einsum("pthc,hcd->hptd", change, _wide(self._weight("W_O", site.layer)))
            found.append(change if site.component == "z" else change[None])
        kept = mask.to(found[0])[..., None]
        whole = torch.cat(found) * kept
        ends = [_wide(t.streams[self.last]) * kept for t in (clean, corrupt)]
        self._same(whole.sum(0), ends[1] - ends[0], ends[0], "what heads and MLPs write is scaled or normed before it is added")
        return whole

    def check_reading(self, clean: Trace, corrupt: Trace, mask: Bool[Tensor, "prompt pos"]) -> None:
        """Check that q, k, v and the MLP of every layer read the stream through its norm and the weights alone.

        Arguments are those of ``changes``.

        Raises:
            InputError: they do not, in this architecture or with the edits in force.
        """
        for site in (s for s in clean.read if s.component != "resid_post"):
            with torch.no_grad():
                outs = [_wide(self._norm(site)(t.streams[self._stream(site)])) for t in (clean, corrupt)]
            if site.component in QKV:  # without the bias, which a difference does not see
                outs = [torch.einsum("ptd,hdc->pthc", x, _wide(self._weight(QKV[site.component], site.layer))) for x in outs]
            kept = mask.to(outs[0])[..., None, None] if site.component in QKV else mask.to(outs[0])[..., None]
            values = [_wide(t.read[site]) * kept for t in (clean, corrupt)]
            self._same((outs[1] - outs[0]) * kept, values[1] - values[0], values[0], f"{site} is not norm(stream) @ W")

    def _same(self, got: Tensor, wanted: Tensor, scale: Tensor, why: str) -> None:
        """Refuse where two ways to one change disagree by more than rounding."""
        if float((got - wanted).norm()) > max(1e-4, 16 * torch.finfo(self.model.dtype).eps) * float(scale.norm()):
            raise InputError(f"the edges of {self.model.name} ({self.shape.architecture}) cannot be told apart: {why}")

    def slopes(self, at: Trace, layer: int) -> Float[Tensor, "receiver prompt pos d_model"]:
        """Gradient of the metric by the input of every receiver of a layer, before its norm, in the order of ``receivers``.

        One layer past the last is the logits.
        """
        if layer == self.shape.n_layers:
            return _wide(at.slopes[self.last])[None]
        qkv = [torch.einsum("pthc,hdc->hptd", _wide(at.slopes[Site(c, layer)]), _wide(self._weight(QKV[c], layer))) for c in QKV]
        mlp = Site("resid_mid", layer)
        return torch.cat(
            [self._through_norm(at, Site("q", layer), torch.cat(qkv)), self._through_norm(at, mlp, _wide(at.slopes[mlp])[None])]
        )

    def _through_norm(self, at: Trace, receiver: Site, slope: Tensor) -> Tensor:
        """A gradient by what a norm gives, [receiver prompt pos d_model], as one by what it takes; the norm is not frozen."""
        with torch.enable_grad():
            x = at.streams[self._stream(receiver)].expand_as(slope).detach().requires_grad_(True)
            y = self._norm(receiver)(x)
            return _wide(torch.autograd.grad(y, x, slope.to(y))[0])

    def carried(
        self, clean: Trace, receiver: Site, change: Float[Tensor, "change prompt pos d_model"], judge: Judge
    ) -> Float[Tensor, "change prompt"]:
        """The metric of the clean run when one receiver alone reads the stream with a change added, and all else runs free.

        Args:
            clean: the clean run.
            receiver: one of ``receivers``.
            change: what is added; one run per change.
            judge: the metric.
        """
        n, s = len(clean.batch), self.shape
        again = clean.batch.select([i % n for i in range(len(change) * n)])
        stream, entering, added = (
            clean.streams[self._stream(receiver)],
            clean.streams[Site("resid_pre", receiver.layer)],
            change.flatten(0, 1),
        )
        out = torch.empty(len(again))

        def run(part: Part) -> Tensor:
            rows, width = part.rows.to(stream.device), part.batch.ids.shape[1]
            x = stream[rows % n, :width]
            y = (_wide(x) + added[rows, :width]).to(x)

            def prepare(hooks: Hooks) -> None:
                hooks.on("resid_pre", receiver.layer, lambda _: entering[rows % n, :width])
                _at_reader(hooks, receiver, lambda value: self._reread(receiver, value, x, y))

            with torch.no_grad(), self.model.wrapped.skipping(receiver.layer or 0):
                return self._judged(part, prepare, Judge(lambda logits, rows: judge.of(logits, rows % n), judge.at))

        for part, got in self.model.each(again, (8 * s.d_model + 3 * s.d_mlp) * max(self.model.dtype.itemsize, 4), run):
            out[part.rows] = got.cpu()
        return out.reshape(len(change), n)

    def _reread(self, receiver: Site, value: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """What is at ``_at_reader`` when a receiver reads the stream y in place of x."""
        if receiver.component == "resid_post":
            return y
        norm = self._norm(receiver)
        if receiver.component == "resid_mid":
            return norm(y)
        head, out = receiver.head or 0, value.clone()
        out[:, :, head] += (norm(y) - norm(x)) @ self._weight(QKV[receiver.component], receiver.layer)[head]
        return out

    def _stream(self, receiver: Site) -> Site:
        """The stream that a receiver reads."""
        own = receiver.component == "resid_post" or (receiver.component == "resid_mid" and not self.shape.parallel)
        return Site(receiver.component if own else "resid_pre", receiver.layer)

    def _weight(self, component: str, layer: int | None) -> Tensor:
        """[head d_model d_head], of W_O [head d_head d_model]; looked up once."""
        site = Site(component, layer)
        if str(site) not in self._found:
            self._found[str(site)] = heads(site, self.model.weight(site), self.shape)
        return self._found[str(site)]

    def _norm(self, receiver: Site) -> Any:
        """The model's own norm in front of a receiver; some parallel blocks have one for both of their parts."""
        block = self.model.wrapped.bridge.blocks[receiver.layer]
        names = ("ln2", "ln1") if receiver.component == "resid_mid" else ("ln1",)
        norm = next((getattr(block, name) for name in names if hasattr(block, name)), None)
        if norm is None:
            raise InputError(f"the blocks of {self.shape.architecture} have no norm in front of attention, so their edges are not known")
        return norm.original_component


def _at_reader(hooks: Hooks, receiver: Site, fn: Callable[[Tensor], Tensor]) -> None:
    """Call a function where a receiver's own way begins: that of an MLP behind its norm, which attention may share."""
    hooks.on("mlp_in" if receiver.component == "resid_mid" else receiver.component, receiver.layer, fn)


def _wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x if x.dtype == torch.float64 else x.float()
