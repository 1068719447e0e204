"""Runs in which heads are mixed with other activations: a weight per head says how much of its own it keeps.

Only what a weight can change is computed: a prompt goes on from its kept run at the first block and the first position of
the group, as in ``restart``, and gradients by the weights flow through the blocks that follow. Of the last block it is
the position that is read, and of the logits that of one token unless all are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.interventions import Hooks, Part, Points
from interp.models.kept import Kept, keep
from interp.models.loading import free_bytes
from interp.models.restart import Means, Restart, Stretch, Wave, means, prompts_at_once, wave_bytes
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.hooked import HookedModel
    from interp.models.restart import Past
    from interp.models.wrap import Call, Wrapped

Component = Literal["z", "result"]


@dataclass(frozen=True, eq=False)
class Mix:
    """What heads are mixed with: ``weight * own + (1 - weight) * value``, where own already answers to what is mixed before it.

    Attributes:
        component: ``z``, or ``result`` for what a head adds to the stream.
        heads: (layer, head) of every entry of the group.
        where: the token of each prompt at which an entry is mixed.
        values: of every entry and prompt.
    """

    component: Component
    heads: tuple[tuple[int, int], ...]
    where: Int[Tensor, "entry prompt"]
    values: Float[Tensor, "entry prompt d"]

    @classmethod
    def of(
        cls, model: HookedModel, batch: Batch, donor: HookedModel, source: Batch, group: Sequence[Site], component: Component = "z"
    ) -> Mix:
        """Heads of a model at positions of its prompts, and what a donor has at the source's own positions of that name.

        Raises:
            InputError: a head that a model lacks, a position that is not one token of every prompt, prompts that do not pair
                up, or two entries that are the same head at the same token.
        """
        if len(batch) != len(source):
            raise InputError(f"there are {len(batch)} prompts and {len(source)} to take activations from; expected as many")
        sites = [Site(component, s.layer, s.head, s.position) for s in group]
        for which in (model, donor):
            which.sites(sites)
        layers = list(dict.fromkeys(Site(component, s.layer, None, s.position) for s in sites))
        places = {p: (batch.index(p), source.index(p)) for s in sites if (p := s.position) is not None}
        if loose := [str(s) for s in sites if s.position is None]:
            raise InputError(f"{loose[0]} names no position; heads are mixed at one token, as in {loose[0]}@END")
        got = donor.capture(source, layers)
        values = [got[Site(component, s.layer, None, s.position)][:, s.head or 0] for s in sites]
        heads = tuple((s.layer or 0, s.head or 0) for s in sites)
        where = torch.stack([places[s.position][0].cpu() for s in sites if s.position is not None])
        for i, head in enumerate(heads):
            for j in (j for j in range(i) if heads[j] == head):
                if bool((where[i] == where[j]).any()):
                    raise InputError(f"{sites[j]} and {sites[i]} are the same head at the same token of some prompts; leave one out")
        return cls(component, heads, where, torch.stack(values).to(model.device, model.dtype))

    def layer(self, layer: int) -> list[int]:
        """Entries of a layer."""
        return [i for i, (of, _) in enumerate(self.heads) if of == layer]

    def mixed(self, x: Tensor, weight: Tensor, layer: int, prompts: Tensor, start: int | Tensor) -> Tensor:
        """The activation [row pos head d] of a layer, whose first column is token ``start`` of each row's prompt, mixed."""
        entries = torch.tensor(self.layer(layer), device=x.device)
        pos = self.where.to(x.device)[entries][:, prompts] - start  # [entry row]
        which, row = ((pos >= 0) & (pos < x.shape[1])).nonzero(as_tuple=True)
        if not len(which):
            return x
        at = row, pos[which, row], torch.tensor([head for _, head in self.heads], device=x.device)[entries[which]]
        keeps = weight[entries[which]][:, None]
        values = self.values[entries[which], prompts[row]].to(x)
        return x.index_put(at, keeps * x[at] + (1 - keeps) * values)


@dataclass(eq=False)
class _Mixing(Restart):
    """Goes on from kept prompts of one length, whose group begins at one position, with the group mixed."""

    mix: Mix = None  # type: ignore[assignment]
    weight: Tensor = None  # type: ignore[assignment]
    prompts: Tensor = None  # type: ignore[assignment]

    def run(self, rows: Tensor, start: int, end: int) -> Float[Tensor, "row d_model"]:
        """The stream leaving the last block at ``end``; ``rows`` are places among the kept prompts."""
        first, last = min(layer for layer, _ in self.mix.heads), self.wrapped.shape.n_layers - 1
        wave = Wave(rows, torch.full_like(rows, first), torch.zeros_like(rows, dtype=torch.bool), start, end, [])
        stream, every, none = self.kept.stream[first][:, start : end + 1].index_select(0, rows), range(len(rows)), range(0)
        for layer in range(first, last):
            # What enters the first block is as kept, and so are q, k and v there.
            stream = self._block(Stretch(wave, layer, start, end + 1, every if layer == first else none), stream, every)
        return self._last(stream, every, wave, every if first == last else none)[:, -1]

    def _few(self, at: Stretch, stream: Tensor, rows: range, past: Past) -> Tensor:
        here = self.prompts[rows.start : rows.stop]
        with _hooked(self.wrapped, self.mix, self.weight, here, at.start, [at.layer]):
            return super()._few(at, stream, rows, past)


@contextmanager
def _hooked(wrapped: Wrapped, mix: Mix, weight: Tensor, prompts: Tensor, start: int, layers: Sequence[int]) -> Iterator[None]:
    """Mix while blocks run."""
    hooks = Points(wrapped)
    try:
        _install(hooks, mix, weight, prompts, start, layers)
        yield
    finally:
        hooks.remove()


def _install(hooks: Points, mix: Mix, weight: Tensor, prompts: Tensor, start: int, layers: Sequence[int]) -> None:
    for layer in layers:
        if mix.layer(layer):
            hooks.on(mix.component, layer, lambda x, layer=layer: mix.mixed(x, weight, layer, prompts, start))


@dataclass(eq=False)
class Masked:
    """Runs of prompts with a group of heads mixed, read at END.

    Attributes:
        model: the model.
        batch: prompts.
        mix: the group, and what it is mixed with.
        allowed: what the model allows; without going on from kept runs, every run is one of the whole model.
    """

    model: HookedModel
    batch: Batch
    mix: Mix
    allowed: Means = field(init=False)
    _held: dict[tuple[int, int], tuple[Kept, Tensor]] | None = field(init=False, default=None)
    _calls: dict[tuple[int, int], list[Call]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Keep the runs of all prompts where there is memory for that; else they are kept for every call anew."""
        self.allowed = means(self.model)
        ends = self.batch.lengths.cpu() - 1
        self._starts = [(int(a), int(b)) for a, b in zip(self.mix.where.amin(0), ends, strict=True)]
        if not self.allowed.obstacle and self._bytes() <= free_bytes(self.model.device) / 4:
            self._held = {}
            for key, rows in self._groups(range(len(self.batch))).items():
                place = torch.full((len(self.batch),), -1, device=self.model.device)
                place[rows] = torch.arange(len(rows), device=place.device)
                self._held[key] = self._kept(rows, key), place

    @property
    def weights(self) -> int:
        """How many there are."""
        return len(self.mix.heads)

    def logit(self, weight: Float[Tensor, " entry"], rows: Sequence[int], tokens: Int[Tensor, " prompt"]) -> Float[Tensor, " row"]:
        """The logit of one token of every prompt, for some of the prompts; it can be differentiated by the weights."""
        if self.allowed.obstacle:
            return self.plain(weight, rows)[torch.arange(len(rows)), tokens[list(rows)].to(self.model.device)]
        found: list[Tensor] = []
        order: list[int] = []
        for some, stream in self._streams(weight, rows, 0):
            order += some
            found.append(self._logit(stream, tokens[[rows[i] for i in some]].to(stream.device)))
        return torch.cat(found)[torch.tensor(order, device=found[0].device).argsort()]

    @torch.no_grad()
    def top(self, weight: Float[Tensor, " entry"], rows: Sequence[int] | None = None) -> Int[Tensor, " row"]:
        """The most likely token of every prompt, or of some."""
        rows = list(range(len(self.batch))) if rows is None else list(rows)
        found = torch.zeros(len(rows), dtype=torch.long)
        if self.allowed.obstacle:
            for at in range(0, len(rows), step := self.model._budget.rows(self._plain_bytes())):
                found[at : at + step] = self.plain(weight, rows[at : at + step]).argmax(-1).cpu()
            return found
        for some, stream in self._streams(weight, rows, self.model.shape.d_vocab):
            found[some] = self.model.wrapped.finish(stream).argmax(-1).cpu()
        return found

    def plain(self, weight: Float[Tensor, " entry"], rows: Sequence[int]) -> Float[Tensor, "row vocab"]:
        """Logits of one run of the whole model: what every short cut is checked against."""
        part, prompts = Part.of(self.batch, rows), torch.tensor(list(rows), device=self.model.device)
        columns, where = part.batch.index("END").unique(return_inverse=True)

        def prepare(hooks: Hooks) -> None:
            _install(hooks, self.mix, weight, prompts, 0, range(self.model.shape.n_layers))

        with torch.set_grad_enabled(weight.requires_grad):
            return self.model.forward(part, prepare, keep=columns).logits[torch.arange(len(where)), where]

    def _streams(self, weight: Tensor, rows: Sequence[int], vocabulary: int) -> Iterator[tuple[list[int], Tensor]]:
        """Places in ``rows``, and the streams that leave the last block for them; as many at a time as there is memory for."""
        self.model.wrapped.refresh()
        weight = weight.to(self.model.device, self.model.dtype)
        with torch.set_grad_enabled(weight.requires_grad):
            for (start, end), all_places in self._groups(rows).items():
                step = self.model._budget.rows(wave_bytes(self.model, start, end, vocabulary))
                step = len(all_places) if weight.requires_grad else step
                for low in range(0, len(all_places), step):
                    places = all_places[low : low + step]
                    here = torch.tensor([rows[i] for i in places], device=self.model.device)
                    if self._held is None:
                        kept, own = self._kept(here.tolist(), (start, end)), torch.arange(len(here), device=here.device)
                    else:
                        kept, place = self._held[start, end]
                        own = place[here]
                    going = _Mixing(self.model.wrapped, kept, self._calls, mix=self.mix, weight=weight, prompts=here)
                    yield places, going.run(own, start, end)

    def _groups(self, rows: Sequence[int]) -> dict[tuple[int, int], list[int]]:
        """Places in ``rows`` by the first position of the group and the last of the prompt."""
        found: dict[tuple[int, int], list[int]] = {}
        for place, row in enumerate(rows):
            found.setdefault(self._starts[row], []).append(place)
        return found

    @torch.no_grad()
    def _kept(self, rows: Sequence[int], key: tuple[int, int]) -> Kept:
        """The kept runs of prompts of one length, without what no row goes on from."""
        some = self.batch.select(list(rows))
        step = prompts_at_once(self.model, some, [])
        parts = [self._slim(keep(self.model, some.select(list(range(len(some)))[low : low + step]))) for low in range(0, len(some), step)]
        if len(parts) == 1:
            return parts[0]
        n = self.model.shape.n_layers
        stream, keys, values = (
            [torch.cat([getattr(p, what)[i] for p in parts]) for i in range(n)] for what in ("stream", "keys", "values")
        )
        projected = [{name: torch.cat([p.projected[i][name] for p in parts]) for name in parts[0].projected[i]} for i in range(n)]
        return Kept(stream, keys, values, projected, {}, None)

    def _slim(self, kept: Kept) -> Kept:
        """Of the blocks before the group nothing, and of the streams the one entering its first block."""
        first, nothing = min(layer for layer, _ in self.mix.heads), kept.stream[0][:0]
        n = self.model.shape.n_layers
        stream = [kept.stream[i].clone() if i == first else nothing.clone() for i in range(n)]
        keys, values = ([x if i >= first else nothing.clone() for i, x in enumerate(xs)] for xs in (kept.keys, kept.values))
        return Kept(stream, keys, values, [kept.projected[i] if i == first else {} for i in range(n)], {}, None)

    def _logit(self, stream: Tensor, tokens: Tensor) -> Tensor:
        """Logits of one token per row."""
        wrapped = self.model.wrapped
        if not self.allowed.columns:
            return wrapped.finish(stream)[torch.arange(len(tokens)), tokens]
        head = wrapped.unembedding
        found = (wrapped.finish(stream, trunk=True) * head.weight[tokens]).sum(-1)
        return found if head.bias is None else found + head.bias[tokens]

    def _bytes(self) -> int:
        """Bytes that the kept runs of all prompts take."""
        s, first = self.model.shape, min(layer for layer, _ in self.mix.heads)
        per_token = 2 * (s.n_layers - first) * s.n_kv_heads * s.d_head + s.d_model + (s.n_heads + 2 * s.n_kv_heads) * s.d_head
        return per_token * self.batch.ids.numel() * self.model.dtype.itemsize

    def _plain_bytes(self) -> int:
        return (self.model._bytes_per_token() + self.model.shape.d_vocab) * self.batch.ids.shape[1]
