"""Changing a model while a block runs: patched activations, edited weights; it is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import ActivationChange, AttentionChange, ChannelChange, Edit, WeightChange
from interp.errors import InputError
from interp.models import weights
from interp.models.attention import attention
from interp.models.checkpoint import has_tokenizer
from interp.models.interventions import Action, Entry, Ledger, Part, Write, setter
from interp.models.received import channel
from interp.models.running import Running
from interp.sites import Site


class Editing(Running):
    """The verbs that change."""

    adapter: Path | None

    def run_on(self, layer: int, resid: Float[Tensor, "prompt pos d_model"], prompts: Any, *, at: str | int | None = None) -> Tensor:
        """Logits when the residual stream entering ``layer`` is ``resid``: blocks before it are not computed.

        Args:
            layer: the first block that runs; ``n_layers`` runs only the final norm and unembedding.
            resid: the stream entering it, for every position of the prompts.
            prompts: the prompts, for padding and named positions.
            at: as for ``logits``.
        """
        batch = self.batch(prompts)
        if not 0 <= layer <= self.shape.n_layers:
            raise InputError(f"layer {layer} is out of range; run_on takes 0 to {self.shape.n_layers}")
        if layer < self.shape.n_layers:
            site, skip = Site("resid_pre", layer), layer
        else:
            site, skip = Site("resid_post", layer - 1), layer - 1
        with self.patched({site: resid}), self.wrapped.skipping(skip):
            return self.logits(batch, at=at) if at is not None else self.logits(batch)

    @contextmanager
    def patched(self, values: Mapping[Site | str, Tensor]) -> Iterator[Ledger]:
        """Set activations while the block runs: on the prompt's positions, not on generated tokens.

        Args:
            values: site -> what ``capture`` gives for it on the same prompts, or anything that broadcasts to it.

        Yields:
            The ledger: how often each patch fired and how much it changed.

        Raises:
            InputError: a patch that never fired, or a value that does not fit.
        """
        ledger = Ledger()
        actions: list[Action] = []
        for key, value in values.items():
            (site,) = self.sites(key)
            if site.is_weight or site.component == "svd":
                raise InputError(f"{site} is not an activation; patched takes sites such as L3.resid_post or L9H6.z@END")
            self.wrapped.hook_point(site.component, site.layer)
            entry = Entry(site)
            ledger.entries.append(entry)
            actions.append(Write(site, setter(site, value), "prompt", entry))
        with self._with(ledger, actions):
            yield ledger
        ledger.check()

    @contextmanager
    def _with(self, ledger: Ledger, actions: list[Action]) -> Iterator[None]:
        item = (ledger, actions)
        self._active.append(item)
        try:
            yield
        finally:
            # By identity: contexts of abandoned generators may end out of order.
            self._active = [a for a in self._active if a is not item]

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[Ledger]:
        """Apply an edit while the block runs.

        Weight changes are made on tensors of the model's own view, so a model given as an object keeps its values; leaving
        puts the original tensors back, never subtracts.

        Yields:
            The ledger of its activation changes.
        """
        if any(e is edit for e in self._edits):
            raise InputError(f"the edit {edit.name or edit.digest[:8]} is already in force")
        ledger = Ledger()
        actions = [self._action(change, ledger) for change in edit.activations]
        self._set_edits([*self._edits, edit])
        try:
            with self._with(ledger, actions):
                yield ledger
        finally:
            self._set_edits([e for e in self._edits if e is not edit])
        if any(e.fired for e in ledger.entries):
            ledger.check()

    def _action(self, change: ActivationChange | AttentionChange | ChannelChange, ledger: Ledger) -> Action:
        """What carries a change out, with its rows in the ledger."""
        if isinstance(change, AttentionChange):
            return attention(change, self.wrapped, ledger)
        if isinstance(change, ChannelChange):
            return channel(change, self, ledger)
        entry = Entry(self.sites(change.site)[0])
        ledger.entries.append(entry)
        return Write(change.site, _applier(change), change.at, entry)

    def _set_edits(self, edits: list[Edit]) -> None:
        """Make exactly these edits' weight changes the ones in force."""
        wrapped = self.wrapped
        touched: dict[str, Tensor] = {}
        for edit in edits:
            for change in edit.weights:
                key, view = self._accessor(change.site)
                if key not in touched:
                    own = wrapped.given(key)
                    none = torch.zeros(self.shape.d_vocab, dtype=self.dtype, device=wrapped.device)
                    touched[key] = none if own is None else own.detach().clone()
                _add(view(touched[key]), change)
        before = {key for edit in self._edits for key in self._keys(edit)}
        for key in before - set(touched):
            wrapped.override(key, None)
        for key, value in touched.items():
            wrapped.override(key, value)
        self._edits = edits
        wrapped.refresh()

    def _keys(self, edit: Edit) -> set[str]:
        return {self._accessor(c.site)[0] for c in edit.weights}

    def _accessor(self, site: Site) -> tuple[str, Callable[[Tensor], Tensor]]:
        names = [name for name, _ in self.wrapped.source.named_parameters(remove_duplicate=False)]
        found = weights.locate(site, names, self.shape)
        if not found and site.component == "b_U":
            # An edit may give the unembedding a bias that the model was made without.
            return self.wrapped.unembedding_bias, lambda t: t
        if not found:
            raise InputError(f"{self.name} ({self.shape.architecture}) has no weight {site}")
        return found[0]

    def weight(self, site: Site | str) -> Tensor:
        """A weight as a matrix on row vectors, ``x @ W``, with the edits in force.

        Args:
            site: ``L3.W_Q`` [d_model, n_heads * d_head], ``L3H2.W_Q`` [d_model, d_head] (a query head, also for W_K and W_V), ``W_U``, ...

        Raises:
            InputError: the model has no such weight, layer or head.
        """
        (where,) = self.sites(site)
        key, view = self._accessor(where)
        matrix = view(self.wrapped.parameter(key).detach())
        return matrix.flatten(-2) if where.head is None and matrix.ndim > len(weights.weight_shape(where.component, self.shape)) else matrix

    def ov(self, layer: int, head: int) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]]:
        """The factors of a head's OV circuit, ``OV = W_V @ W_O``."""
        return self.weight(Site("W_V", layer, head)), self.weight(Site("W_O", layer, head))

    def qk(self, layer: int, head: int) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_model d_head"]]:
        """The factors of a head's QK circuit, ``QK = W_Q @ W_K.T``."""
        return self.weight(Site("W_Q", layer, head)), self.weight(Site("W_K", layer, head))

    def save(self, folder: str | Path, *, edit: Edit | None = None) -> Path:
        """Write a Hugging Face folder (safetensors, config, tokenizer), with the edits in force and ``edit`` applied to the weights.

        Raises:
            InputError: an edit that changes activations, which no checkpoint can hold; the folder that the model came from.
        """
        folder = Path(folder)
        if folder.resolve() in self._origins():
            raise InputError(f"{folder} is where {self.name} itself comes from and would be overwritten; save it into another folder")
        if any(e.activations for e in [*self._edits, *([edit] if edit else [])]):
            raise InputError("an edit of activations cannot be saved in a checkpoint; save it with edit.save(folder)")
        with self.edited(edit) if edit is not None else nullcontext():
            wrapped: Any = self.wrapped
            source = wrapped.source
            if added := [key for e in self._edits for key in sorted(self._keys(e)) if wrapped.given(key) is None]:
                raise InputError(
                    f"a {self.shape.architecture} checkpoint has no place for {added[0]}; save the edit with edit.save(folder)"
                )
            state = {name: wrapped.parameter(name).detach() for name, _ in source.named_parameters(remove_duplicate=False)}
            state |= {name: b for name, b in source.state_dict().items() if name not in state}
            source.save_pretrained(folder, state_dict=state, safe_serialization=True)
        if self._tokenizer is not None or (self.checkpoint is not None and has_tokenizer(self.checkpoint.path)):
            self.tokenizer.save_pretrained(folder)
        return folder

    def _origins(self) -> set[Path]:
        """The folders that this model was read from."""
        source = getattr(self.wrapped.source, "name_or_path", "")
        found = [self.checkpoint.path if self.checkpoint is not None else None, self.adapter, Path(source) if source else None]
        return {path.resolve() for path in found if path is not None and path.exists()}


def _applier(change: ActivationChange) -> Callable[[Tensor, Part], Tensor]:
    return lambda x, part: change.apply(x)


def _add(view: Tensor, change: WeightChange) -> None:
    """Add a delta in fp32 or better, then round once to the weight's dtype."""
    wide = torch.float64 if view.dtype == torch.float64 else torch.float32
    delta = WeightChange(
        change.site, change.left.to(view.device, wide), None if change.right is None else change.right.to(view.device, wide)
    ).delta
    # Interleaved heads come with an axis of their own; any other delta of as many numbers would be a transposed one.
    if delta.shape != view.shape and not (delta.ndim == view.ndim - 1 and delta.shape == view.flatten(-2).shape):
        raise InputError(f"a delta of shape {tuple(delta.shape)} does not fit {change.site}, which is {tuple(view.shape)}")
    view.copy_(view.to(wide) + delta.reshape(view.shape))
