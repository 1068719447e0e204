"""What a part of a model sends to another directly: attention is held still, so nothing moves between positions.

Path patching runs a prompt with every head held at what it gave, but one sender at what it gave elsewhere, and records what the
receivers then read (Goldowsky-Dill et al. 2023, arXiv 2304.05969). That run is a chain of MLPs at the receiver's position
alone, so all senders go through it together as rows of one batch. The MLPs and norms are the model's own. ``Frozen.literal`` is
the same by whole runs with hooks, which ``obstacle`` says when to fall back to and the chain is checked against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from interp.models.batch import Batch
from interp.models.edges import QKV, Edges, Judge, _at_reader, _wide
from interp.models.interventions import Hooks, Part
from interp.models.wrap import Wrapped
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.checkpoint import Shape
    from interp.models.hooked import HookedModel

ENTRY = Site("resid_pre", 0)
"""Where the sender ``embed`` is set: the whole stream entering the first block."""


def sends_at(sender: Site) -> int:
    """When a sender writes: layers count by two, heads before MLPs, the embedding first."""
    return -1 if sender.layer is None else 2 * sender.layer + (sender.component == "mlp_out")


def reads_at(receiver: Site, shape: Shape) -> int:
    """Up to when a receiver sees what is sent; in parallel blocks an MLP reads what attention reads."""
    assert receiver.layer is not None
    if receiver.component == "resid_post":
        return 2 * receiver.layer + 2
    return 2 * receiver.layer + (receiver.component == "resid_mid" and not shape.parallel)


@dataclass(frozen=True, eq=False)
class Sent:
    """What one part sends, for every prompt.

    Attributes:
        site: ``embed``, ``z`` of a head or ``mlp_out``, at a position.
        where: the tokens of that position in the prompts, [prompt n].
        was: what it sends there itself, [prompt n d].
        value: what it is made to send, alike.
    """

    site: Site
    where: Tensor
    was: Tensor
    value: Tensor

    @property
    def differs(self) -> Tensor:
        """Where that is not the same to the bit, [prompt n]."""
        return (self.was != self.value).any(-1)


def beside(first: Batch, second: Batch) -> Batch:
    """The prompts of two batches with the same named positions, one behind the other."""
    names = [name for name in first.positions if name in second.positions]
    return Batch.of([*first.rows(), *second.rows()], {name: first.positions[name] + second.positions[name] for name in names})


@dataclass(frozen=True, eq=False)
class Rows:
    """(Sender, prompt, token) triples that something is sent through, those reached first in front.

    Attributes:
        sender: index of the sender, [row].
        prompt: of the prompt, [row].
        place: which of the tokens of the receiver's position, [row].
        depth: when the first part of the sender writes, [row], ascending.
        heads: layer -> rows, heads and what is added to their z.
        set: (``embed`` or ``mlp_out``, layer) -> rows and what is written.
    """

    sender: Tensor
    prompt: Tensor
    place: Tensor
    depth: Tensor
    heads: Mapping[int, tuple[Tensor, Tensor, Tensor]]
    set: Mapping[tuple[str, int], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, senders: Sequence[Sequence[Sent]], where: Tensor, before: int) -> Rows:
        """What reaches receivers at some tokens, ``where`` [prompt n], that read before a given depth."""
        never = torch.full((len(senders), *where.shape), before, device=where.device)
        found: list[tuple[int, Sent, Tensor, Tensor]] = []
        for i, group in enumerate(senders):
            for sent in group:
                hit = (where[:, :, None] == sent.where[:, None, :].to(where.device)) & sent.differs[:, None, :].to(where.device)
                live = hit.any(-1)
                if sends_at(sent.site) < before:
                    never[i] = torch.where(live, never[i].clamp(max=sends_at(sent.site)), never[i])
                    found.append((i, sent, live, hit.int().argmax(-1)))
        sender, prompt, place = (never < before).nonzero(as_tuple=True)
        order = never[sender, prompt, place].argsort(stable=True)
        sender, prompt, place = sender[order], prompt[order], place[order]
        number = torch.full_like(never, -1)
        number[sender, prompt, place] = torch.arange(len(order), device=order.device)
        heads: dict[int, list[tuple[Tensor, ...]]] = {}
        whole: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}
        for i, sent, live, index in found:
            p, at = live.nonzero(as_tuple=True)
            token, rows, layer = index[p, at], number[i, p, at], sent.site.layer or 0
            value = sent.value[p, token]
            if sent.site.component == "z":
                change = _wide(value) - _wide(sent.was[p, token])
                heads.setdefault(layer, []).append((rows, torch.full_like(rows, sent.site.head or 0), change))
            else:
                whole.setdefault((sent.site.component, layer), []).append((rows, value))
        joined: Any = [{key: tuple(map(torch.cat, zip(*parts, strict=True))) for key, parts in x.items()} for x in (heads, whole)]
        return cls(sender, prompt, place, never[sender, prompt, place], *joined)

    def __len__(self) -> int:
        """How many."""
        return len(self.sender)

    def __getitem__(self, which: slice) -> Rows:
        """Neighbouring rows."""
        start, stop, _ = which.indices(len(self))

        def inside(parts: tuple[Tensor, ...]) -> Any:
            keep = (parts[0] >= start) & (parts[0] < stop)
            return (parts[0][keep] - start, *(x[keep] for x in parts[1:]))

        writes: Any = [{key: inside(parts) for key, parts in x.items()} for x in (self.heads, self.set)]
        return Rows(self.sender[which], self.prompt[which], self.place[which], self.depth[which], *writes)


_TRIED: WeakKeyDictionary[Wrapped, str] = WeakKeyDictionary()


class Frozen:
    """A model whose attention is held at what it gave."""

    def __init__(self, model: HookedModel, freeze_mlps: bool = False) -> None:
        """Nothing is computed yet.

        Args:
            model: the model, with the edits now in force.
            freeze_mlps: hold MLPs too.
        """
        self.model, self.shape, self.freeze_mlps = model, model.shape, freeze_mlps
        self.edges, self.wrapped, self.device = Edges(model), model.wrapped, model.device  # looking them up takes a while

    def needs(self, receivers: Iterable[Site]) -> set[Site]:
        """What ``streams`` and ``received`` take from the run of the prompts."""
        sites: set[Site] = set()
        for r in receivers:
            assert r.layer is not None
            components = ("resid_pre", "attn_out", *(["mlp_out"] if self.freeze_mlps else []))
            sites |= {Site(c, layer, position=r.position) for c in components for layer in range(r.layer + 1)}
            if r.component != "resid_post":
                sites.add(_holder(r))
        return sites

    @torch.no_grad()
    def streams(self, kept: Mapping[Site, Tensor], rows: Rows, wanted: Sequence[Site]) -> Iterator[tuple[Site, int, Tensor]]:
        """What receivers at one position read: the receiver's stream, how many rows are changed there, and these rows.

        Args:
            kept: what ``needs`` names, [prompt n d].
            rows: what is sent.
            wanted: components and layers of the receivers, all at one position; q, k and v as ``resid_pre``.
        """
        if not wanted or not len(rows):
            return
        position, asked = wanted[0].position, {(s.component, s.layer or 0) for s in wanted}
        top = max(layer for _, layer in asked)
        ends = rows.depth.new_tensor([[2 * layer, 2 * layer + 1, 2 * layer + 2] for layer in range(top + 1)])
        counts = torch.searchsorted(rows.depth, ends).tolist()

        def of(component: str, layer: int, some: slice) -> Tensor:
            return kept[Site(component, layer, position=position)][rows.prompt[some], rows.place[some]]

        x = of("resid_pre", 0, slice(0, 0))
        for layer in range(max(0, int(rows.depth[0])) // 2, top + 1):
            before_heads, before_mlp, stop = counts[layer]
            x = torch.cat([x, of("resid_pre", layer, slice(len(x), stop))])
            if layer == 0 and ("embed", 0) in rows.set:
                x = _put(x, *rows.set["embed", 0])
            if ("resid_pre", layer) in asked:
                yield Site("resid_pre", layer), before_heads, x[:before_heads]
            if layer == top and not {("resid_mid", top), ("resid_post", top)} & asked:
                return
            everyone = slice(0, len(x))
            mid = x + self._plus_heads(rows, layer, of("attn_out", layer, everyone))
            own, changed = (x, before_heads) if self.shape.parallel else (mid, before_mlp)
            if ("resid_mid", layer) in asked:
                yield Site("resid_mid", layer), changed, own[:changed]
            out = of("mlp_out", layer, everyone) if self.freeze_mlps else self.mlp(layer, own)
            if ("mlp_out", layer) in rows.set:
                out = _put(out, *rows.set["mlp_out", layer])
            x = mid + out
        yield Site("resid_post", top), len(x), x

    def _plus_heads(self, rows: Rows, layer: int, attention: Tensor) -> Tensor:
        """What attention gives with the changes of some heads."""
        if layer not in rows.heads or not len(rows.heads[layer][0]):
            return attention
        which, head, change = rows.heads[layer]
        some, index = which.unique(return_inverse=True)
        z = change.new_zeros(len(some), self.shape.n_heads, self.shape.d_head)
        z[index, head] = change
        added = z.flatten(1) @ _wide(self.wrapped.output_weights(layer)).flatten(0, 1)
        return _put(attention, some, (_wide(attention[some]) + added).to(attention))

    def ends(self, position: str | int) -> tuple[Site, Site]:
        """What ``last`` takes from a run."""
        layer = self.shape.n_layers - 1
        return Site("resid_pre", layer, position=position), Site("attn_out", layer, position=position)

    @torch.no_grad()
    def last(self, entering: Tensor, attention: Tensor) -> Tensor:
        """The stream leaving the last block, [row d_model], from what enters it and what its attention adds."""
        mid = entering + attention
        return mid + self.mlp(self.shape.n_layers - 1, entering if self.shape.parallel else mid)

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        """What an MLP adds when it reads a stream, [row d_model]."""
        block = self.wrapped.bridge.blocks[layer]
        out = block.mlp(self.edges._norm(Site("resid_mid", layer))(stream[None]))
        return (out[0] if isinstance(out, tuple) else out)[0]

    @torch.no_grad()
    def received(self, receivers: Sequence[Site], kept: Mapping[Site, Tensor], rows: Rows, stream: Tensor) -> dict[Site, Tensor]:
        """What receivers of one layer and position take from a changed stream, that of the first rows.

        Returns:
            Receiver -> [row d]: its q, k or v; for an MLP what it then gives.
        """
        first, n = receivers[0], len(stream)
        prompt, place = rows.prompt[:n], rows.place[:n]
        if first.component == "resid_mid":
            return {first: self.mlp(first.layer or 0, stream)}
        norm = self.edges._norm(first)
        was = kept[Site("resid_pre", first.layer, position=first.position)][prompt, place]
        change = _wide(norm(stream[None])[0]) - _wide(norm(was[None])[0])
        out: dict[Site, Tensor] = {}
        for component in dict.fromkeys(r.component for r in receivers):
            some = [r for r in receivers if r.component == component]
            heads = [r.head or 0 for r in some]
            weight = _wide(self.edges._weight(QKV[component], first.layer))[heads]  # without the bias, which a difference does not see
            moved = (change @ weight.movedim(1, 0).flatten(1)).unflatten(1, (len(heads), -1))
            old = kept[_holder(some[0])][prompt, place][:, heads]
            new = (_wide(old) + moved).to(old)
            out |= {r: new[:, i] for i, r in enumerate(some)}
        return out

    def obstacle(self) -> str:
        """Why the chain cannot stand for a run of this model, or "": tried once, on a short prompt in which nothing is changed.

        Whatever an exotic architecture trips over while it is tried only means that it takes the plain way.
        """
        wrapped, name = self.model.wrapped, self.shape.architecture
        if wrapped not in _TRIED:
            try:
                _TRIED[wrapped] = self._tried()
            except (TypeError, AttributeError, LookupError, RuntimeError, ValueError) as error:
                _TRIED[wrapped] = f"the parts of {name} cannot be called alone ({type(error).__name__})"
        return _TRIED[wrapped]

    @torch.no_grad()
    def _tried(self) -> str:
        s, layers = self.shape, range(self.shape.n_layers)
        batch = Batch.of([[(7 * i + 3) % s.d_vocab for i in range(min(5, s.n_ctx))]])
        last = Site("resid_post", s.n_layers - 1)
        names = ("resid_pre", "attn_out", "mlp_out", "z", *QKV)
        seen = {site: x[0] for site, x in self.model.capture(batch, [Site(c, i) for c in names for i in layers] + [last]).items()}

        def alike(got: Tensor, want: Tensor, scale: Tensor) -> bool:
            return float((_wide(got) - _wide(want)).norm()) <= max(1e-4, 16 * torch.finfo(self.model.dtype).eps) * float(scale.norm())

        def moves(x: Tensor) -> Tensor:  # from the first token on: biases cancel
            return _wide(x) - _wide(x[:1])

        for i in layers:
            pre, attention, mlp, z = (seen[Site(c, i)] for c in ("resid_pre", "attn_out", "mlp_out", "z"))
            after = seen[Site("resid_pre", i + 1)] if i + 1 < s.n_layers else seen[last]
            own = pre if s.parallel else pre + attention
            if not alike(pre + attention + mlp, after, after):
                return f"the blocks of {s.architecture} are not a sum of attention and MLP"
            if not alike(self.mlp(i, own), mlp, mlp):
                return f"the MLPs of {s.architecture} give something else when they are called alone"
            if not alike(moves(z).flatten(1) @ _wide(self.wrapped.output_weights(i)).flatten(0, 1), moves(attention), attention):
                return f"what heads of {s.architecture} write is scaled or normed before it is added"
            read = moves(self.edges._norm(Site("q", i))(pre))
            for c, name in QKV.items():
                found = torch.einsum("td,hdc->thc", read, _wide(self.edges._weight(name, i)))
                if not alike(found, moves(seen[Site(c, i)]), seen[Site(c, i)]):
                    return f"{c} of {s.architecture} is not norm(stream) @ {name}"
        return ""

    def literal(
        self, batch: Batch, sent: Sequence[tuple[Sent, Tensor]], receivers: Sequence[tuple[Site, Tensor]], judge: Judge
    ) -> tuple[Tensor, Tensor]:
        """The metric of rows by whole runs, and that of the rows as they are.

        A run has every row twice: as it is, and with heads held at what they give there while senders are set. It is recorded what
        the receivers read in the second. In another run only the receivers read that, and all else runs free.

        Args:
            batch: the prompt of every row.
            sent: what is sent, and in which rows; ``where`` and ``value`` count these rows.
            receivers: who receives, and in which rows; the logits are ``resid_post``.
            judge: the metric of rows.
        """
        out, plain = torch.empty(len(batch)), torch.empty(len(batch))
        held = [Site(c, i) for c in ("z", *(["mlp_out"] if self.freeze_mlps else [])) for i in range(self.shape.n_layers)]
        inner = [(site, rows) for site, rows in receivers if site.component != "resid_post"]

        def run(part: Part) -> tuple[Tensor, Tensor]:
            n, here, read = len(part.batch), _Here(part, self.model.device), dict[Site, Tensor]()
            twice = replace(part, batch=part.batch.select([*range(n)] * 2), rows=part.rows.repeat(2))

            def hold(hooks: Hooks) -> None:
                for site, _ in inner:  # before anything is held over it
                    _at_reader(hooks, site, lambda x, site=site: read.update({site: x[n:].clone()}))  # type: ignore[arg-type]
                for site in held:
                    hooks.on(site.component, site.layer, lambda x: torch.cat([x[:n], x[:n]]))
                for one, rows in sent:
                    site = ENTRY if one.site.component == "embed" else one.site
                    hooks.on(site.component, site.layer, lambda x, one=one, rows=rows: torch.cat([x[:n], here.put(x[n:], rows, one)]))

            def receive(hooks: Hooks) -> None:
                for site, rows in inner:
                    _at_reader(hooks, site, lambda x, site=site, rows=rows: here.take(x, rows, site, read[site]))

            with torch.no_grad():
                before, third = self.edges._judged(twice, hold, judge).split(n)
                fourth = self.edges._judged(part, receive, judge) if inner else third
            at_logits = torch.zeros(len(batch), dtype=torch.bool)
            for site, rows in receivers:
                at_logits[rows.cpu()] |= site.component == "resid_post"
            return before, torch.where(at_logits[part.rows].to(third.device), third, fourth)

        for part, (before, after) in self.model.each(batch, 2 * self.model._bytes_per_token(), run):
            plain[part.rows], out[part.rows] = before.cpu(), after.cpu()
        return out, plain


@dataclass(eq=False)
class _Here:
    """Rows of a whole batch in one of its parts."""

    part: Part
    device: torch.device

    def _some(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some rows are here, and where."""
        number = torch.full((self.part.total,), -1)
        number[self.part.rows] = torch.arange(len(self.part.rows))
        here = number[rows.cpu()]
        return (here >= 0).nonzero().flatten(), here[here >= 0].to(self.device)

    def put(self, x: Tensor, rows: Tensor, sent: Sent) -> Tensor:
        """An activation with what is sent in some rows; tokens that are padding here are left out."""
        which, here = self._some(rows)
        where, value = sent.where[which.to(sent.where.device)].to(x.device), sent.value[which.to(sent.value.device)]
        i, j = (where < x.shape[1]).nonzero(as_tuple=True)
        x, head = x.clone(), sent.site.head
        if head is None:
            x[here[i], where[i, j]] = value[i, j].to(x)
        else:
            x[here[i], where[i, j], head] = value[i, j].to(x)
        return x

    def take(self, x: Tensor, rows: Tensor, receiver: Site, recorded: Tensor) -> Tensor:
        """An activation with what was recorded at a receiver in some rows."""
        batch = self.part.batch
        where = (batch.position_ids if receiver.position is None else batch.columns(receiver.position)).to(x.device)
        _, here = self._some(rows)
        x, row = x.clone(), here[:, None]
        if receiver.head is None:
            x[row, where[here]] = recorded[row, where[here]]
        else:
            x[row, where[here], receiver.head] = recorded[row, where[here], receiver.head]
        return x


def _holder(receiver: Site) -> Site:
    """What is patched so that a receiver reads something else: all heads of q, k or v; what an MLP gives."""
    component = "mlp_out" if receiver.component == "resid_mid" else receiver.component
    return Site(component, receiver.layer, position=receiver.position)


def _put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy with some rows replaced."""
    x = x.clone()
    x[rows] = values.to(x)
    return x
