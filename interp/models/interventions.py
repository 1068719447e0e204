"""Hooks for one forward pass: which tensor a site is, how it is read and written, and the ledger.

Hooks exist only while a forward pass runs: contexts such as ``model.patched`` merely keep a list of what
to do, so an exception or an abandoned generator cannot leave a hook behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.wrap import Wrapped
from interp.sites import Site


class StopForward(Exception):  # noqa: N818 - not an error: the last activation anybody wants has been read
    """Ends a forward pass early."""


@dataclass
class Entry:
    """What one intervention did.

    Attributes:
        site: where.
        fired: forward passes in which its hook ran.
        change: root of the summed squared differences it made; 0 means it wrote what was there.
    """

    site: Site
    fired: int = 0
    square: Tensor | float = 0.0

    @property
    def change(self) -> float:
        """Norm of everything it changed."""
        return float(self.square) ** 0.5


@dataclass
class Ledger:
    """How often every intervention fired and how much it changed."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def change(self) -> float:
        """Norm of all changes."""
        return sum(float(e.square) for e in self.entries) ** 0.5

    def check(self) -> None:
        """Refuse interventions that never ran.

        Raises:
            InputError: one that never fired; a result computed with it would be the unpatched one.
        """
        if silent := [str(e.site) for e in self.entries if not e.fired]:
            raise InputError(f"the intervention at {', '.join(silent)} never fired: no forward pass went through it")

    def __str__(self) -> str:
        """One line per intervention."""
        return "\n".join(f"{e.site}: fired {e.fired} times, changed by {e.change:.4g}" for e in self.entries)


@dataclass(frozen=True)
class Part:
    """The prompts of one forward pass.

    Attributes:
        batch: these prompts, padded to their own longest.
        rows: their places in the whole batch.
        total: prompts of the whole batch.
        width: columns of the whole batch.
        phase: "prompt", or "new" for generated tokens.
        prompts: the prompts, also while ``batch`` is generated tokens.
    """

    batch: Batch
    rows: Tensor
    total: int
    width: int
    phase: str = "prompt"
    prompts: Batch | None = None

    @classmethod
    def of(cls, batch: Batch, rows: Sequence[int] | None = None) -> Part:
        """Some prompts of a batch, or all."""
        chosen = list(range(len(batch))) if rows is None else list(rows)
        some = batch if rows is None else batch.select(chosen)
        return cls(some, torch.tensor(chosen), len(batch), batch.ids.shape[1], prompts=some)


Change = Callable[[Tensor, Part], Tensor]
"""Maps the activation at a site (already cut to head and positions) to the new one."""


@dataclass(frozen=True, eq=False)
class Write:
    """An intervention at one site: where, what, when, and its row in the ledger."""

    site: Site
    change: Change
    at: str
    entry: Entry


@dataclass(frozen=True, eq=False)
class Custom:
    """An intervention that puts its own hooks in place.

    Attributes:
        at: when.
        install: is given the hooks of a pass.
    """

    at: str
    install: Callable[[Hooks], None]


Action = Write | Custom


def locate(site: Site, part: Part, x: Tensor) -> tuple[Any, ...]:
    """The index into a full activation that gives the site's head and positions.

    Full activations are [prompt, pos, d], [prompt, pos, head, d_head], of ``result`` [prompt, pos, head, d_model], and
    [prompt, head, query, key] for ``pattern``, whose position is the query's. The indexed part is [prompt, ...], or [prompt, n, ...] for a
    position that names n tokens of every prompt.

    Raises:
        InputError: a position that names different numbers of tokens in different prompts.
    """
    head: Any = slice(None) if site.head is None else site.head
    if site.position is None or part.phase == "new":
        rows: Any = slice(None)
        where: Any = slice(None)
    else:
        places = part.batch.at(site.position)
        if len({len(p) for p in places}) != 1:
            raise InputError(
                f"position {site.position!r} names different numbers of tokens in different prompts; patch them one number at a time"
            )
        where = torch.tensor(places, dtype=torch.long, device=x.device)
        rows = torch.arange(len(places), device=x.device)[:, None]
        if where.shape[1] == 1:
            rows, where = rows[:, 0], where[:, 0]
    if site.component == "pattern":
        return (rows, head, where)
    return (rows, where, head) if site.per_head else (rows, where)


def position_axes(site: Site, ndim: int) -> list[int]:
    """The axes of a captured tensor that count positions."""
    if site.component == "pattern":
        return [ndim - 1] if site.position is not None else [ndim - 2, ndim - 1]
    return [1] if site.position is None else []


def mask_padding(x: Tensor, site: Site, part: Part) -> Tensor:
    """The activation at a site with zeros at padding."""
    if part.batch.padded:
        mask = part.batch.mask.to(x.device)
        for axis in position_axes(site, x.ndim):
            x = x * mask.reshape([len(mask) if a == 0 else mask.shape[1] if a == axis else 1 for a in range(x.ndim)])
    return x


def fit(value: Tensor, like: Tensor, part: Part, site: Site) -> Tensor:
    """The value for the prompts of this pass, broadcast against the activation.

    A value whose first axis counts all prompts of the batch is cut to this pass's prompts, and position axes as
    wide as the batch to this pass's longest prompt.

    Raises:
        InputError: the shapes do not fit.
    """
    v = value.to(like)
    wrong = InputError(f"a value of shape {tuple(value.shape)} does not fit {site}, which is {tuple(like.shape)} here")
    if v.ndim == like.ndim:
        if v.shape[0] not in (1, part.total):
            raise wrong
        if v.shape[0] == part.total and part.total > 1:
            v = v[part.rows.to(v.device)]
        for axis in position_axes(site, v.ndim):
            if v.shape[axis] == part.width:
                v = v.narrow(axis, 0, like.shape[axis])
    try:
        return v.expand_as(like)
    except RuntimeError as e:
        raise wrong from e


def setter(site: Site, value: Tensor) -> Change:
    """A change that sets a site to a value."""
    return lambda x, part: fit(value, x, part, site)


class Points:
    """Functions on the hook points of a wrapped model, taken out together."""

    def __init__(self, wrapped: Wrapped) -> None:
        """Nothing is installed yet."""
        self.wrapped = wrapped
        self._handles: list[tuple[Any, Any]] = []
        self._readers: list[Any] = []
        self._results: dict[int | None, list[Callable[[Tensor], Tensor | None]]] = {}

    def on(self, component: str, layer: int | None, fn: Callable[[Tensor], Tensor | None]) -> None:
        """Call a function with an activation; what it returns, if anything, takes its place."""
        if component == "result":
            self._on_results(layer, fn)
            return
        point = self.wrapped.hook_point(component, layer)
        self._handles.append((point, point.add_hook(lambda t, hook: fn(t))))

    def _on_results(self, layer: int | None, fn: Callable[[Tensor], Tensor | None]) -> None:
        """The same for what single heads add, which is no tensor of the model: a change of it is one of what attention adds.

        All functions of a layer share one tensor, so that later ones see what earlier ones set.
        """
        if layer in self._results:
            self._results[layer].append(fn)
            return
        functions = self._results[layer] = [fn]
        taken: list[Tensor] = []
        # W_O's own input, so that it does not matter when hooks on z were installed.
        module = self.wrapped.output_projection(layer)
        self._readers.append(module.register_forward_pre_hook(lambda _, args: taken.append(args[0])))

        def add(x: Tensor) -> Tensor | None:
            weights = self.wrapped.output_weights(layer)
            before = now = torch.einsum("pthc,hcd->pthd", taken.pop().unflatten(-1, weights.shape[:2]), weights)
            for function in functions:
                new = function(now)
                now = now if new is None else new
            # Summed in at least fp32; a head that stays as it is adds exactly 0.
            wide = torch.promote_types(x.dtype, torch.float32)
            return None if now is before else (x.to(wide) + (now.to(wide) - before.to(wide)).sum(2)).to(x.dtype)

        self.on("attn_out", layer, add)

    def remove(self) -> None:
        """Take every hook out again."""
        for reader in self._readers:
            reader.remove()
        self._readers.clear()
        self._results.clear()
        for point, handle in self._handles:
            handle.hook.remove()
            point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]
        self._handles.clear()


class Hooks(Points):
    """Installs actions and readers on a wrapped model for one forward pass."""

    def __init__(self, wrapped: Wrapped, part: Part) -> None:
        """Nothing is installed yet."""
        super().__init__(wrapped)
        self.part = part

    def act(self, action: Action) -> None:
        """Install one intervention, unless it does not concern this phase."""
        part = self.part
        if action.at != "all" and action.at != part.phase:
            return
        if isinstance(action, Custom):
            action.install(self)
            return
        site, entry = action.site, action.entry
        if part.phase == "new" and site.position is not None:
            return

        def write(x: Tensor) -> Tensor:
            where = locate(site, part, x)
            old = x[where]
            new = action.change(old, part)
            entry.fired += 1
            change = new.detach().double() - old.detach().double()
            entry.square = entry.square + mask_padding(change, site, part).square().sum()
            out = x.clone()
            out[where] = new
            return out

        if site.component != "resid_mid":
            self.on(site.component, site.layer, write)
            return
        # A write at the MLP's input would miss the skip connection, so the stream between attention and MLP is set
        # through what attention adds to it.
        self.wrapped.hook_point("resid_mid", site.layer)
        entering: list[Tensor] = []
        self.on("resid_pre", site.layer, lambda x: entering.append(x))
        self.on("attn_out", site.layer, lambda x: write(entering[-1] + x) - entering[-1])

    def read(self, site: Site, into: dict[Site, Tensor]) -> None:
        """Keep the activation at a site; a position or head is cut out at once."""

        def keep(x: Tensor) -> None:
            into[site] = x[locate(site, self.part, x)].detach().clone()

        self.on(site.component, site.layer, keep)

    def leaf(self, site: Site, into: dict[Site, Tensor]) -> None:
        """Keep the activation in the graph, as something to differentiate by."""
        # The stream between attention and MLP reaches the loss by the skip connection too; the gradient by
        # what attention adds to it is the whole one.
        component = "attn_out" if site.component == "resid_mid" else site.component

        def keep(x: Tensor) -> Tensor:
            y = x.clone() if x.requires_grad else x.detach().clone().requires_grad_(True)
            into[site] = y
            return y

        self.on(component, site.layer, keep)

    def stop_after(self, sites: Sequence[Site], into: dict[Site, Tensor]) -> None:
        """End the pass once every wanted site has been read."""
        last = max(s.layer if s.layer is not None else -1 for s in sites)

        def check(x: Tensor) -> None:
            if all(s in into for s in sites):
                raise StopForward

        for component, layer in {(s.component, s.layer) for s in sites if (s.layer if s.layer is not None else -1) == last}:
            self.on(component, layer, check)


@contextmanager
def installed(wrapped: Wrapped, part: Part, actions: Sequence[Action]) -> Iterator[Hooks]:
    """Hooks with all actions in place, removed however the block ends."""
    hooks = Hooks(wrapped, part)
    try:
        for action in actions:
            hooks.act(action)
        yield hooks
    finally:
        hooks.remove()
