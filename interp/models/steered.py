"""Runs in which heads write other coefficients along some directions: every row of a pass has coefficients of its own.

Rows go on from a kept run of the prompts at the first block and token that is steered (``restart``), and what heads attend to is
read on the way. ``Steered.plain`` is the same by whole runs of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.interventions import Hooks, Part, Points
from interp.models.kept import keep
from interp.models.received import Reader, unreadable
from interp.models.restart import Means, Restart, Stretch, Wave, means, prompts_at_once, wave_bytes
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.hooked import HookedModel
    from interp.models.restart import Past

Judge = Callable[[Tensor, Tensor], Tensor]
"""Logits [row vocab] and the prompt of each row -> numbers [row n]."""


@dataclass(frozen=True, eq=False)
class Channels:
    """Directions that heads write along at one token of each prompt.

    Attributes:
        heads: layer and head of each.
        directions: unit vectors; of one head and token they are orthogonal.
        where: the token.
    """

    heads: tuple[tuple[int, int], ...]
    directions: Float[Tensor, "channel d_model"]
    where: Int[Tensor, "channel prompt"]

    @property
    def layers(self) -> Int[Tensor, " channel"]:
        """The layer of each."""
        return torch.tensor([layer for layer, _ in self.heads])


@dataclass(frozen=True, eq=False)
class Ways:
    """What becomes of the coefficients: ``gain * c + to``, with c as it is in the very run."""

    gain: Float[Tensor, "way channel"]
    to: Float[Tensor, "way channel"]

    @classmethod
    def without(cls, gone: Bool[Tensor, "way channel"]) -> Ways:
        """Some channels are deleted."""
        return cls(1 - gone.double(), torch.zeros(gone.shape, dtype=torch.float64))

    @property
    def active(self) -> Bool[Tensor, "way channel"]:
        """What is changed at all."""
        return (self.gain != 1) | (self.to != 0)

    def __len__(self) -> int:
        """How many."""
        return len(self.gain)


@dataclass(frozen=True, eq=False)
class Look:
    """What is read of attention: what heads pay from the query to several sets of tokens.

    Attributes:
        heads: who attends.
        keys: the tokens of each set.
    """

    heads: tuple[tuple[int, int], ...]
    keys: Bool[Tensor, "target prompt pos"]


@dataclass(eq=False)
class _Rows:
    """Rows of a pass, and what is found for them; slices share it."""

    prompts: Tensor
    gain: Tensor
    to: Tensor
    added: Tensor
    paid: Tensor

    def __getitem__(self, some: slice) -> _Rows:
        return _Rows(self.prompts[some], self.gain[some], self.to[some], self.added[some], self.paid[some])


@dataclass(eq=False)
class Steered:
    """A model with channels steered.

    Attributes:
        model: the model, with the edits now in force.
        batch: prompts.
        channels: what is steered.
        look: what is read of attention.
        receivers: ``q``, ``k`` and ``v`` of single heads that alone read the change; none is everybody.
        query: the position whose attention and logits are read.
        allowed: what the model allows; where it cannot go on from kept runs, every run is one of the whole model.
    """

    model: HookedModel
    batch: Batch
    channels: Channels
    look: Look
    receivers: Sequence[Site] = ()
    query: str | int = "END"
    allowed: Means = field(init=False)

    def __post_init__(self) -> None:
        """Check what is asked for, and look up what heads write.

        Raises:
            InputError: a token behind the query, heads that a model has not, or whose writing or reading is not known.
        """
        model, layers = self.model, sorted({layer for layer, _ in self.channels.heads})
        model.sites([Site("result", layer, head) for layer, head in self.channels.heads] + list(self.receivers))
        model.sites([Site("pattern", layer, head) for layer, head in self.look.heads])
        for layer in sorted({r.layer or 0 for r in self.receivers}):
            if why := unreadable(model, layer):
                raise InputError(f"{self.receivers[0]}: {why}, so it cannot be handed a stream of its own")
            if layer <= layers[-1]:
                raise InputError(f"receivers in layer {layer} are not later than a channel of layer {layers[-1]}")
        self._end = self.batch.index(self.query).cpu()
        if late := (self.channels.where.cpu() > self._end).any(0).nonzero().flatten().tolist():
            raise InputError(f"in prompt {late[0]} a channel is steered behind {self.query}, which cannot see it")
        self.allowed = means(model)
        self._groups = [self._of_layer(layer) for layer in range(model.shape.n_layers)]

    def _of_layer(self, layer: int) -> list[tuple[int, list[int], Tensor, Tensor]]:
        """Heads with their channels, what makes the coefficients of z, and the directions."""
        found = []
        for head in dict.fromkeys(h for at, h in self.channels.heads if at == layer):
            some = [i for i, at in enumerate(self.channels.heads) if at == (layer, head)]
            out = _wide(self.model.weight(Site("W_O", layer, head)).detach())
            directions = self.channels.directions[some].to(out)
            found.append((head, some, out @ directions.mT, directions))
        return found

    @torch.no_grad()
    def __call__(self, ways: Ways, judge: Judge | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Runs of every prompt in every way.

        Yields:
            Ways [row], prompts [row], attention paid [row head target], and what the judge gives of the logits [row n].
        """
        if self.allowed.obstacle:
            yield from self._plainly(ways, judge)
            return
        begins = self.channels.where.cpu().amin(0)
        groups: dict[tuple[int, int], list[int]] = {}
        for prompt, (start, end) in enumerate(zip(begins.tolist(), self._end.tolist(), strict=True)):
            groups.setdefault((start, end), []).append(prompt)
        layers = torch.where(ways.active, self.channels.layers, int(self.channels.layers.max())).amin(1)
        self.model.wrapped.refresh()
        for (start, end), prompts in groups.items():
            step = prompts_at_once(self.model, self.batch.select(prompts), [])
            for low in range(0, len(prompts), step):
                yield from self._from(prompts[low : low + step], start, end, ways, layers, judge)

    def _from(
        self, prompts: list[int], start: int, end: int, ways: Ways, layers: Tensor, judge: Judge | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """The runs of some prompts, which are kept for the time."""
        model, device = self.model, self.model.wrapped.device
        going = _Steering(model.wrapped, keep(model, self.batch.select(prompts)), steered=self)
        which = torch.tensor(prompts)
        for first in layers.unique().tolist():
            way, own = torch.cartesian_prod((layers == first).nonzero().flatten(), torch.arange(len(prompts))).T
            row = wave_bytes(model, start, end, model.shape.d_vocab if judge else 0)
            row += 8 * (end + 1 - start) * (4 * len(self.channels.heads) + model.shape.d_model)
            at = 0
            while at < len(way):
                n = model._budget.rows(row)
                some = slice(at, at + n)
                rows, mine = self._rows(ways, way[some], which[own[some]], end + 1 - start, device), own[some].to(device)
                run = partial(going.run, rows, mine, first, start, end, judge is not None)
                done, stream = model._budget.attempt(run, len(mine))
                if done:
                    told = None if judge is None or stream is None else judge(model.wrapped.finish(stream), rows.prompts).cpu()
                    yield way[some], which[own[some]], rows.paid.cpu(), told
                    at += len(rows.prompts)

    def _rows(self, ways: Ways, way: Tensor, prompts: Tensor, length: int, device: torch.device) -> _Rows:
        wide = torch.promote_types(self.model.dtype, torch.float32)
        n, like = len(way), {"dtype": wide, "device": device}
        added = torch.zeros(n, length if self.receivers else 0, self.model.shape.d_model, **like)
        paid = torch.zeros(n, len(self.look.heads), len(self.look.keys), **like)
        return _Rows(prompts.to(device), ways.gain[way].to(**like), ways.to[way].to(**like), added, paid)

    @torch.no_grad()
    def plain(self, ways: Ways, way: Tensor, prompts: Tensor, judge: Judge | None = None) -> tuple[Tensor, Tensor | None]:
        """Attention paid and what the judge gives, for some rows, by whole runs of the model."""
        model, batch = self.model, self.batch.select(prompts.tolist())
        paid, told = torch.zeros(len(way), len(self.look.heads), len(self.look.keys)), None

        def run(part: Part) -> tuple[Tensor, Tensor | None]:
            rows = self._rows(ways, way[part.rows], prompts[part.rows], part.batch.ids.shape[1], model.wrapped.device)

            def prepare(hooks: Hooks) -> None:
                for layer in range(model.shape.n_layers):
                    self.install(hooks, layer, rows, 0)

            columns, inverse = part.batch.index(self.query).unique(return_inverse=True)
            out = model.forward(part, prepare, keep=columns, trunk=judge is None)
            told = None if judge is None else judge(out.logits[torch.arange(len(inverse)), inverse], rows.prompts).cpu()
            return rows.paid.cpu(), told

        for part, (got, judged) in model.each(batch, 2 * model._bytes_per_token(), run):
            paid[part.rows] = got.float()
            if judged is not None:
                told = judged.new_zeros(len(way), *judged.shape[1:]) if told is None else told
                told[part.rows] = judged
        return paid, told

    def _plainly(self, ways: Ways, judge: Judge | None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        every = torch.arange(len(self.batch))
        for way in range(len(ways)):
            which = torch.full_like(every, way)
            yield which, every, *self.plain(ways, which, every, judge)

    def install(self, points: Points, layer: int, rows: _Rows, start: int) -> None:
        """Steer and read in one layer, of rows whose first column is token ``start``."""
        if self._groups[layer]:
            self._send(points, layer, rows, start)
        for receiver in (r for r in self.receivers if r.layer == layer):
            self._receive(points, receiver, rows)
        heads = [(i, head) for i, (of, head) in enumerate(self.look.heads) if of == layer]
        if not heads:
            return

        def read(x: Tensor) -> None:
            query = self._end.to(x.device)[rows.prompts] - start
            if not bool((query < x.shape[2]).all()):
                return  # a stretch that ends before it
            keys = self.look.keys.to(x.device)[:, rows.prompts, : x.shape[3]].to(rows.paid)
            every = torch.arange(len(query), device=x.device)
            for i, head in heads:
                rows.paid[:, i] = torch.einsum("rk,trk->rt", x[every, head, query].to(rows.paid), keys)

        points.on("pattern", layer, read)

    def _send(self, points: Points, layer: int, rows: _Rows, start: int) -> None:
        taken: list[Tensor] = []
        module, shape = self.model.wrapped.output_projection(layer), self.model.shape
        points._readers.append(module.register_forward_pre_hook(lambda _, args: taken.append(args[0])))

        def send(x: Tensor) -> Tensor | None:
            z = taken.pop().unflatten(-1, (shape.n_heads, shape.d_head))
            columns, step = torch.arange(start, start + x.shape[1], device=x.device), 0
            for head, some, makes, directions in self._groups[layer]:
                here = self.channels.where.to(x.device)[some][:, rows.prompts].T[:, None] == columns[:, None]  # [row pos channel]
                change = (rows.gain[:, None, some] - 1) * (z[:, :, head].to(makes) @ makes) + rows.to[:, None, some]
                step = step + torch.where(here, change, 0.0) @ directions
            if self.receivers:
                rows.added.add_(step)
                return None
            return (_wide(x) + step).to(x)

        points.on("attn_out", layer, send)

    def _receive(self, points: Points, receiver: Site, rows: _Rows) -> None:
        reader, stream = Reader(self.model, receiver.layer or 0), list[Tensor]()
        reader.entering(points, stream.append)

        def read(value: Tensor) -> Tensor:
            moved = reader.moved(receiver.component, receiver.head, stream[-1], rows.added)
            out = value.clone()
            out[:, :, receiver.head] = (_wide(value[:, :, receiver.head]) + moved).to(value)
            return out

        points.on(receiver.component, receiver.layer, read)


@dataclass(eq=False)
class _Steering(Restart):
    """Goes on from kept prompts of one length with channels steered."""

    steered: Steered = None  # type: ignore[assignment]
    rows: _Rows = None  # type: ignore[assignment]
    start: int = 0

    def run(self, rows: _Rows, own: Tensor, first: int, start: int, end: int, logits: bool) -> Tensor | None:
        """The stream leaving the last block at ``end``; None where only attention is wanted, which ``rows`` hold then."""
        last = self.wrapped.shape.n_layers - 1
        top = last if logits else max(layer for layer, _ in self.steered.look.heads)
        self.rows, self.start = rows, start
        wave = Wave(own, torch.full_like(own, first), torch.zeros_like(own, dtype=torch.bool), start, end, [])
        stream, every, none = self.kept.stream[first][:, start : end + 1].index_select(0, own), range(len(own)), range(0)
        for layer in range(first, min(last, top + 1)):
            # What enters the first block is as kept, and so are q, k and v there.
            stream = self._block(Stretch(wave, layer, start, end + 1, every if layer == first else none), stream, every)
        if top < last:
            return None
        return self._last(stream, every, wave, every if first == last else none)[:, -1]

    def _few(self, at: Stretch, stream: Tensor, rows: range, past: Past) -> Tensor:
        with self._hooked(at, self.rows[rows.start : rows.stop]):
            return super()._few(at, stream, rows, past)

    @contextmanager
    def _hooked(self, at: Stretch, rows: _Rows) -> Iterator[None]:
        """Steer while a block runs over a stretch; what is added for receivers is cut to it."""
        if self.steered.receivers:
            rows = _Rows(rows.prompts, rows.gain, rows.to, rows.added[:, at.start - self.start : at.stop - self.start], rows.paid)
        points = Points(self.wrapped)
        try:
            self.steered.install(points, at.layer, rows, at.start)
            yield
        finally:
            points.remove()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
