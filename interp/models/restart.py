"""Going on from a run: only the blocks and positions behind a change are computed again.

A run of the prompts is kept: the stream entering every block, and every block's keys and values. A row then
goes on from it with something changed: it enters at the first block that the change concerns and at the first
position of it, and sees the kept keys and values of the positions before. Causal attention is all this rests
on, and every block is the model's own: the model itself says how it calls its blocks (``Wrapped.calls``), and a
stand-in for its cache hands out what was kept. Where the stream entering a block is still the kept one behind its
first position, q, k and v there are the kept ones too, and the modules that make them are stood in for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.capture import capture_bytes
from interp.models.interventions import Points, StopForward
from interp.models.kept import Kept, keep, projections
from interp.models.loading import free_bytes
from interp.models.wrap import Call, Wrapped
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.running import Running

OWN_POSITION = ("q", "z", "pattern", "result", "attn_out", "mlp_out", "mlp_post", "resid_mid", "resid_post")
"""Activations that change the stream leaving their block at their own position only; later ones see ``resid_pre``, ``k`` and ``v``."""

BEFORE = ("resid_pre", "k", "v")
"""Activations that other positions see within the same block."""

_CACHE = 2**23  # bytes; a half or twice as much costs a few percent
_LEARNED = 2**25 - 2**16  # bytes; of larger ones glibc learns nothing


@dataclass(frozen=True, eq=False)
class Write:
    """Activations to set in some rows.

    Attributes:
        component: which activation.
        layer: of which block.
        rows: index of each row, [write].
        where: positions in the prompt, [write n].
        heads: the head of each, [write], or None for all heads or a component without.
        values: [write n d], [write n head d_head] for all heads; the last axis of patterns counts keys.
    """

    component: str
    layer: int
    rows: Tensor
    where: Tensor
    heads: Tensor | None
    values: Tensor


@dataclass(frozen=True, eq=False)
class Wave:
    """Rows that go on together over the same positions, each from its own block.

    Attributes:
        prompt: which kept prompt each row goes on from, [row].
        layer: the first block of each row, [row], ascending.
        alone: True where that block is needed at ``start`` only, because the change stays at its position there; these come
            last among the rows of a block.
        start: the first position that changes.
        end: the position that is read.
        writes: what is set.
    """

    prompt: Tensor
    layer: Tensor
    alone: Tensor
    start: int
    end: int
    writes: Sequence[Write]

    @property
    def order(self) -> Tensor:
        """What the rows are sorted by, [row]."""
        return 2 * self.layer + self.alone

    def sets(self, components: Sequence[str], layer: int, rows: range) -> bool:
        """Whether any of some activations of a block is set in some rows."""
        found = [w.rows for w in self.writes if w.layer == layer and w.component in components]
        return any(bool(((x >= rows.start) & (x < rows.stop)).any()) for x in found if rows)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Positions of a block that rows of a wave go through.

    Attributes:
        wave: the wave.
        layer: which block.
        start: the first position.
        stop: where it ends.
        as_kept: rows whose stream enters as kept.
        moved: how many of them, the first ones, have another one at the first position.
    """

    wave: Wave
    layer: int
    start: int
    stop: int
    as_kept: range = range(0)
    moved: int = 0


@dataclass(eq=False)
class Past:
    """What a block takes for its cache: the kept keys and values, over which it writes the new ones.

    Attributes:
        keys: of positions from the first on, [row head pos d_head]; a copy of one's own.
        values: alike.
        start: the position of the next ones.
        stop: end the pass when they are known.
    """

    keys: Tensor
    values: Tensor
    start: int
    stop: bool = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The kept ones with the new ones in their places, up to the last of these."""
        end = self.start + key_states.shape[-2]
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        keys[:, :, self.start :], values[:, :, self.start :] = key_states, value_states
        if self.stop:
            raise StopForward
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the next ones."""
        return self.start

    def __getitem__(self, rows: slice) -> Past:
        """That of some rows, which shares what is written."""
        return Past(self.keys[rows], self.values[rows], self.start, self.stop)


@dataclass(eq=False)
class Restart:
    """Goes on from kept prompts, with the weights as they were when these were run.

    Attributes:
        wrapped: the model.
        kept: the run that rows go on from.
    """

    wrapped: Wrapped
    kept: Kept
    _calls: dict[tuple[int, int], list[Call]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let the C library's allocator learn.

        It goes by the largest block that was freed: from now on it keeps what a block of the model frees for the next one, where
        it gave it back to the system page by page, which took up to a third of the time.
        """
        torch.empty(_LEARNED, dtype=torch.uint8)

    @torch.no_grad()
    def __call__(self, wave: Wave) -> Tensor:
        """The stream leaving the last block at the position that is read, [row d_model]."""
        kept, last = self.kept, self.wrapped.shape.n_layers - 1
        start, end = wave.start, wave.end
        first = int(wave.layer[0])
        # Rows are sorted, so that those on their way are always the first ones: counted before and after the lone ones of a block.
        joined = torch.searchsorted(wave.order, 2 * torch.arange(first, last + 2, device=wave.order.device)).tolist()
        entered = torch.searchsorted(wave.order, 2 * torch.arange(first, last + 1, device=wave.order.device) + 1).tolist()
        stream = kept.stream[0][:0, start : end + 1]
        lone = range(0)
        for layer, before, here, after in zip(range(first, last + 1), joined, entered, joined[1:], strict=False):
            if here > before:
                stream = torch.cat([stream, kept.stream[layer][:, start : end + 1].index_select(0, wave.prompt[before:here])])
            if here:
                rows = range(here)
                # What was alone in the block before has changed at one position only when it enters this one, what joins here nowhere.
                if layer == last:
                    stream = self._last(stream, rows, wave, range(0) if wave.sets(BEFORE, layer, lone) else lone)
                else:
                    lone = range(before, before) if not lone or wave.sets(["resid_pre"], layer, lone) else lone
                    joining = range(before, before if wave.sets(["resid_pre"], layer, range(before, here)) else here)
                    known = range(lone.start, joining.stop)
                    stream = self._block(Stretch(wave, layer, start, end + 1, known, len(lone)), stream, rows)
            if after > here:
                # The change has not left its position when it leaves this block: everything else there is as it was.
                rows, prompt = range(here, after), wave.prompt[here:after]
                alone = kept.stream[layer][:, start : start + 1].index_select(0, prompt)
                alone = self._block(Stretch(wave, layer, start, start + 1, rows), alone, rows)
                rest = kept.stream[layer + 1][:, start + 1 : end + 1].index_select(0, prompt)
                stream = torch.cat([stream[:, -1:] if layer == last else stream, torch.cat([alone, rest], 1)])
            lone = range(here, after)
        return stream[:, -1]

    def _block(self, at: Stretch, stream: Tensor, rows: range, past: Past | None = None) -> Tensor:
        """One block over a stretch of some rows, a few at a time; ``past`` is their cache, if it is there already."""
        found = []
        step = self._at_once(at.stop - at.start)
        for low in range(0, len(rows), step):
            some = rows[low : low + step]
            mine = past[low : low + step] if past else self._past(at, some)
            found.append(self._few(at, stream[low : low + step], some, mine))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _few(self, at: Stretch, stream: Tensor, rows: range, past: Past) -> Tensor:
        if (at.start, at.stop) not in self._calls:
            self._calls[at.start, at.stop] = self.wrapped.calls(at.start, at.stop)
        writes = [w for w in at.wave.writes if w.layer == at.layer]
        with writing(self.wrapped, writes, rows, at.start, at.stop), self._projecting(at, rows):
            return self.wrapped.block(at.layer, stream, self._calls[at.start, at.stop][at.layer], past)

    def _at_once(self, positions: int) -> int:
        """Rows that go through a block together: on a CPU as many as leave what is inside its MLP in the cache."""
        row = positions * self.wrapped.shape.d_mlp * self.kept.stream[0].itemsize
        return max(1, _CACHE // row) if self.wrapped.device.type == "cpu" else 2**31

    def _past(self, at: Stretch, rows: range) -> Past:
        """The kept keys and values of the positions before, and room for new ones."""
        prompt = at.wave.prompt[rows.start : rows.stop]
        keys, values = (kept[at.layer][:, :, : at.stop].index_select(0, prompt) for kept in (self.kept.keys, self.kept.values))
        return Past(keys, values, at.start)

    def _last(self, stream: Tensor, rows: range, wave: Wave, as_kept: range) -> Tensor:
        """The last block: keys and values wherever they changed, everything else at the position that is read."""
        layer, start, end = self.wrapped.shape.n_layers - 1, wave.start, wave.end
        if start == end:
            return self._block(Stretch(wave, layer, end, end + 1), stream, rows)
        past = self._past(Stretch(wave, layer, start, end + 1), rows)
        for some, stop in ((rows[: as_kept.start], end), (as_kept, start + 1), (rows[as_kept.stop :], end)):
            if some:
                part = slice(some.start, some.stop)
                self._keys(Stretch(wave, layer, start, stop), stream[part, : stop - start], some, past[part])
        return self._block(Stretch(wave, layer, end, end + 1, as_kept), stream[:, -1:], rows, replace(past, start=end))

    def _keys(self, at: Stretch, stream: Tensor, rows: range, past: Past) -> None:
        """Put new keys and values over the kept ones."""
        try:
            self._few(at, stream, rows, replace(past, stop=True))
        except StopForward:
            return
        raise TypeError("the last block took no cache")

    @contextmanager
    def _projecting(self, at: Stretch, rows: range) -> Iterator[None]:
        """Make q, k and v only where rows are not as kept."""
        ends = at.as_kept.start, at.as_kept.start + at.moved, at.as_kept.stop
        low, middle, high = (min(max(i, rows.start), rows.stop) - rows.start for i in ends)
        length = at.stop - at.start
        kept = self.kept.projected[at.layer] if low < high and (length > 1 or middle < high) else {}
        modules = {name: module for name, module in projections(self.wrapped, at.layer).items() if name in kept} if kept else {}
        prompt = at.wave.prompt[rows.start + low : rows.start + high]

        def instead(real: Callable[[Tensor], Tensor], there: Tensor) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                if x.shape[:-1] != (len(rows), length):
                    return real(x)
                known = there[:, at.start : at.stop].index_select(0, prompt)
                if middle > low:
                    known[: middle - low, :1] = real(x[low:middle, :1])
                parts = [known if some is None else real(some) for some in (x[:low], None, x[high:]) if some is None or len(some)]
                return known if len(parts) == 1 else torch.cat(parts)

            return forward

        own = {name: module.__dict__.get("forward") for name, module in modules.items()}
        try:
            for name, module in modules.items():
                module.__dict__["forward"] = instead(module.forward, kept[name])
            yield
        finally:
            for name, module in modules.items():
                module.__dict__.pop("forward", None)
                if own[name] is not None:
                    module.__dict__["forward"] = own[name]


@contextmanager
def writing(wrapped: Wrapped, writes: Sequence[Write], rows: range, start: int, stop: int) -> Iterator[None]:
    """Set activations of one block that runs over positions ``start`` up to ``stop`` of some rows."""
    hooks = Points(wrapped)
    try:
        for write in writes:
            inside = (write.rows >= rows.start) & (write.rows < rows.stop)
            i, j = (inside[:, None] & (write.where >= start) & (write.where < stop)).nonzero(as_tuple=True)
            if len(i):
                head = None if write.heads is None else write.heads[i]
                _set(hooks, write, write.rows[i] - rows.start, write.where[i, j] - start, head, write.values[i, j])
        yield
    finally:
        hooks.remove()


def _set(hooks: Points, write: Write, row: Tensor, pos: Tensor, head: Tensor | None, values: Tensor) -> None:
    every: Any = slice(None) if head is None else head

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        if write.component == "pattern":
            x[row, every, pos] = values[..., : x.shape[-1]].to(x)
        elif head is None:
            x[row, pos] = values.to(x)
        else:
            x[row, pos, head] = values.to(x)
        return x

    if write.component != "resid_mid":
        hooks.on(write.component, write.layer, change)
        return
    # As for every write of this site: through what attention adds to the stream.
    entering: list[Tensor] = []

    def add(x: Tensor) -> Tensor:
        x = x.clone()
        x[row, pos] = values.to(x) - entering[-1][row, pos]
        return x

    hooks.on("resid_pre", write.layer, entering.append)
    hooks.on("attn_out", write.layer, add)


@dataclass(frozen=True)
class Means:
    """What a model allows.

    Attributes:
        obstacle: why it cannot go on from kept prompts, or "".
        columns: single logits can be computed alone.
    """

    obstacle: str = ""
    columns: bool = True


_TRIED: WeakKeyDictionary[Wrapped, Means] = WeakKeyDictionary()


def means(model: Running) -> Means:
    """Whether a model can go on from kept prompts: tried once, on a short prompt in which nothing is changed.

    Whatever an exotic architecture trips over while it is tried only means that it takes the plain way.
    """
    wrapped = model.wrapped
    if any(actions for _, actions in model._active):
        return Means("activations are being changed while it runs")
    if wrapped not in _TRIED:
        try:
            _TRIED[wrapped] = _tried(model, wrapped)
        except (TypeError, AttributeError, LookupError, RuntimeError, ValueError) as error:
            _TRIED[wrapped] = Means(f"{model.shape.architecture} cannot go on from a cached run ({type(error).__name__})")
    return _TRIED[wrapped]


def _tried(model: Running, wrapped: Wrapped) -> Means:
    n, last = min(5, model.shape.n_ctx), wrapped.shape.n_layers - 1
    batch = Batch.of([[(7 * i + 3) % model.shape.d_vocab for i in range(n)]])
    kept = keep(model, batch)
    layers = torch.arange(last + 1, device=wrapped.device).repeat_interleave(2)
    alone = torch.tensor([False, True], device=wrapped.device).repeat(last + 1)
    want = kept.stream[-1][:, -1]
    for start in {0, n // 2, n - 1}:
        sound = ~alone | (layers < last) | (start == n - 1)  # in the last block a change elsewhere reaches nothing
        got = Restart(wrapped, kept)(Wave(torch.zeros_like(layers[sound]), layers[sound], alone[sound], start, n - 1, []))
        if not _alike(got, want):
            return Means(f"{model.shape.architecture} gives other numbers when it goes on from a cached run")
    logits = model.logits(batch, at=-1)
    if not _alike(logits_of(model, want), logits):
        return Means(f"{model.shape.architecture} gives other logits from its last stream")
    tokens = torch.arange(min(64, model.shape.d_vocab), device=wrapped.device)[None]
    return Means(columns=_alike(logits_of(model, want, tokens), logits[:, : tokens.shape[1]]))


def _alike(got: Tensor, want: Tensor) -> bool:
    eps = max(torch.finfo(want.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((got - want).abs().max() <= 32 * eps * want.abs().max())


def logits_of(model: Running, stream: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Logits of a stream that left the last block, [row vocab]; or only those of some tokens of each row, [row token]."""
    wrapped = model.wrapped
    with torch.no_grad():
        if tokens is None:
            return wrapped.finish(stream)
        head = wrapped.unembedding
        if int(tokens.max()) >= len(head.weight):
            raise InputError(f"token {int(tokens.max())} is outside the vocabulary of {len(head.weight)} tokens that the logits cover")
        found = torch.einsum("rd,rtd->rt", wrapped.finish(stream, trunk=True), head.weight[tokens])
        return found if head.bias is None else found + head.bias[tokens]


def wave_bytes(model: Running, start: int, end: int, vocabulary: int) -> int:
    """Bytes that a row of a wave takes; ``vocabulary`` counts the logits that are unembedded."""
    s, n = model.shape, end - start + 1
    cached = 4 * s.n_kv_heads * s.d_head * (end + 1)
    # A wave holds what enters a block and what leaves it.
    return 2 * n * model._bytes_per_token() + (cached + 2 * s.n_heads * n * (end + 1) + vocabulary) * max(model.dtype.itemsize, 4)


def prompts_at_once(model: Running, batch: Batch, sites: Sequence[Site]) -> int:
    """Prompts whose kept runs and activations at sites, here and in the source, take at most a quarter of the free memory."""
    s = model.shape
    kept = (s.n_layers * (s.d_model + (4 * s.n_kv_heads + s.n_heads) * s.d_head) + s.d_model) * batch.ids.numel() * model.dtype.itemsize
    need = (kept + 4 * capture_bytes(model, batch, sites)) / len(batch)
    return max(1, int(free_bytes(model.wrapped.device) / 4 / need))
