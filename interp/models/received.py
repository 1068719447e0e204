"""What some heads alone read: copies of the stream with something added, each through the reader's own norm and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import ChannelChange
from interp.errors import InputError
from interp.models import weights
from interp.models.interventions import Custom, Entry, Hooks, Ledger, Points, locate, mask_padding
from interp.models.wrap import Wrapped
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.editing import Editing

READS = {"q": "W_Q", "k": "W_K", "v": "W_V"}


class Reader:
    """How one layer's heads read the stream: their norm and their weights in force."""

    def __init__(self, model: Editing, layer: int) -> None:
        """Nothing is looked up yet."""
        self.model, self.layer = model, layer
        self._weights: dict[str, Tensor] = {}

    @property
    def block(self) -> Any:
        """The block as TransformerLens wraps it."""
        return self.model.wrapped.bridge.blocks[self.layer]

    def weight(self, component: str) -> Float[Tensor, "head d_model d_head"]:
        """W_Q, W_K or W_V as in force when it is first asked for."""
        if component not in self._weights:
            site = Site(READS[component], self.layer)
            self._weights[component] = _wide(weights.heads(site, self.model.weight(site), self.model.shape))
        return self._weights[component]

    def moved(self, component: str, head: int | None, x: Tensor, change: Tensor) -> Tensor:
        """How q, k or v moves when the stream x [.. d_model] is read with a change added: [.. d_head], or of all heads [.. head d_head]."""
        norm = self.block.ln1.original_component
        y = (_wide(x) + _wide(change)).to(x)
        moved = _wide(norm(y)) - _wide(norm(x))
        matrix = self.weight(component)
        return torch.einsum("ptd,hdc->pthc", moved, matrix) if head is None else moved @ matrix[head]

    def entering(self, points: Points, fn: Callable[[Tensor], None]) -> None:
        """Call a function with the stream in front of the norm, after whatever else changes it."""
        points._readers.append(self.block.ln1.register_forward_pre_hook(lambda _, args, kwargs: fn(_first(args, kwargs)), with_kwargs=True))


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(eq=False)
class _Copies:
    """What receivers of one layer read in one pass: changes of the stream, by receiver, for all edits together.

    ``added`` holds the sum for receivers that have been named; the difference goes into q, k or v once.
    """

    reader: Reader
    added: dict[Site, Tensor] = field(default_factory=dict)
    told: dict[Site, list[Entry]] = field(default_factory=dict)
    stream: list[Tensor] = field(default_factory=list)


_COPIES: WeakKeyDictionary[Hooks, dict[int, _Copies]] = WeakKeyDictionary()
"""The copies of passes that are running."""


def channel(change: ChannelChange, model: Editing, ledger: Ledger) -> Custom:
    """What carries a change of channels out for some receivers, with a row for each in the ledger.

    Raises:
        InputError: a head that the model lacks, or an architecture whose heads do not write or read as a channel needs.
    """
    model.sites(list(change.senders))
    entries: dict[Site, Entry] = {}
    for receiver in model.sites(list(change.receivers)):
        ledger.entries.append(Entry(receiver))
        heads = range(model.shape.n_heads if receiver.component == "q" else model.shape.n_kv_heads)
        for head in heads if receiver.head is None else [receiver.head]:
            entries.setdefault(replace(receiver, head=head), ledger.entries[-1])
    for layer in sorted({receiver.layer or 0 for receiver in entries}):
        if why := unreadable(model, layer):
            raise InputError(f"{next(iter(entries))}: {why}, so it cannot be handed a stream of its own")
    directions = change.directions

    def install(hooks: Hooks) -> None:
        part = hooks.part
        live = [i for i, s in enumerate(change.senders) if part.phase != "new" or s.position is None]
        twins = {i: [j for j in live if j < i and _same(change, i, j)] for i in live}
        for receiver, entry in entries.items():
            _receive(hooks, model, receiver, entry)

        def send(x: Tensor, i: int) -> None:
            where = locate(change.senders[i], part, x)
            v = directions[i].to(x.device, torch.promote_types(x.dtype, torch.float32))
            step = (change.gain[i] - 1) * (x[where].to(v) @ v) + change.to[i]
            added = v.new_zeros(*x.shape[:2], len(v))
            added[where[:2]] = change.strength * step[..., None] * v
            for j in twins[i]:  # two positions may be one token, where the change is made once
                added[locate(change.senders[j], part, x)[:2]] = 0
            for receiver in entries:
                copies = _COPIES[hooks][receiver.layer or 0]
                copies.added[receiver] = copies.added[receiver] + added if receiver in copies.added else added

        for i in live:
            hooks.on("result", change.senders[i].layer, lambda x, i=i: send(x, i))

    return Custom(change.at, install)


def _same(change: ChannelChange, i: int, j: int) -> bool:
    """Two senders that are one direction of one head, perhaps at one token."""
    return change.senders[i].at(None) == change.senders[j].at(None) and torch.equal(change.directions[i], change.directions[j])


def _receive(hooks: Hooks, model: Editing, receiver: Site, entry: Entry) -> None:
    """Let a receiver read what is added for it, once per pass however many edits there are."""
    layer = receiver.layer or 0
    of_pass = _COPIES.setdefault(hooks, {})
    if layer not in of_pass:
        of_pass[layer] = _Copies(Reader(model, layer))
        of_pass[layer].reader.entering(hooks, of_pass[layer].stream.append)
    copies = of_pass[layer]
    copies.told.setdefault(receiver, []).append(entry)
    if len(copies.told[receiver]) > 1:
        return

    def read(value: Tensor) -> Tensor:
        for one in copies.told[receiver]:
            one.fired += 1
        if receiver not in copies.added:
            return value
        moved = copies.reader.moved(receiver.component, receiver.head, copies.stream[-1], copies.added[receiver])
        square = mask_padding(moved.double(), Site(receiver.component, layer), hooks.part).square().sum()
        for one in copies.told[receiver]:
            one.square = one.square + square
        out = value.clone()
        out[:, :, receiver.head] = (_wide(value[:, :, receiver.head]) + moved).to(value)
        return out

    hooks.on(receiver.component, layer, read)


_READABLE: WeakKeyDictionary[Wrapped, dict[int, str]] = WeakKeyDictionary()


def unreadable(model: Editing, layer: int) -> str:
    """Why q, k and v of a layer are not what its norm and weights make of the stream entering it, or "": tried once, on a short prompt.

    Whatever an exotic architecture trips over while it is tried only means that it is one of those.
    """
    known = _READABLE.setdefault(model.wrapped, {})
    if layer not in known:
        try:
            same = _reads(model, layer)
            known[layer] = "" if same else f"q, k and v of {model.shape.architecture} are not norm(stream) @ W"
        except (AttributeError, LookupError, TypeError, RuntimeError, ValueError) as error:
            known[layer] = f"TransformerLens does not name how heads of {model.shape.architecture} read the stream ({type(error).__name__})"
    return known[layer]


@torch.no_grad()
def _reads(model: Editing, layer: int) -> bool:
    wrapped, shape = model.wrapped, model.shape
    points, seen, reader = Points(wrapped), dict[str, Tensor](), Reader(model, layer)
    wrapped.refresh()
    try:
        reader.entering(points, lambda x: seen.update(stream=x))
        for name in READS:
            points.on(name, layer, lambda x, name=name: seen.update({name: x}))
        ids = torch.tensor([[(7 * i + 3) % shape.d_vocab for i in range(min(5, shape.n_ctx))]], device=wrapped.device)
        wrapped.runner.base_model(input_ids=ids, use_cache=False)
    finally:
        points.remove()
    x = seen["stream"]
    for name in READS:
        # Between two tokens, so that biases cancel.
        want = _wide(seen[name][:, 1:]) - _wide(seen[name][:, :-1])
        got = reader.moved(name, None, x[:, :-1], x[:, 1:] - x[:, :-1])
        if not float((got - want).norm()) <= max(1e-4, 32 * torch.finfo(model.dtype).eps) * float(_wide(seen[name]).norm()):
            return False
    return True
