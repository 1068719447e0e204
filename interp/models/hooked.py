"""One model that can be read, written and differentiated: the verbs every analysis is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.edits import Edit
from interp.errors import InputError
from interp.models import loading
from interp.models.adapters import adapter_folder, read_adapter
from interp.models.checkpoint import Checkpoint, Shape, resolve, shape_of
from interp.models.editing import Editing
from interp.models.interventions import Action, Ledger
from interp.models.memory import Budget
from interp.models.text import Bos
from interp.models.validate import assert_faithful
from interp.models.weights import StateTensors, TensorSource
from interp.models.wrap import Wrapped, structure_copy


class HookedModel(Editing):
    """A causal language model whose activations and weights can be read, changed and differentiated.

    Weights load on first use. Every call leaves the model as it was. Texts are tokenised with the special tokens
    the checkpoint's own tokenizer adds, once; ``bos="always" | "never"`` overrides.

    Attributes:
        name: what a person calls it.
        shape: its sizes.
        checkpoint: the files it comes from; None for a model given as an object.
        notes: what loading had to say (dtype of a merged adapter, ...).
    """

    def __init__(
        self,
        source: Callable[[], nn.Module],
        shape: Shape,
        *,
        name: str,
        tokenizer: Any = None,
        checkpoint: Checkpoint | None = None,
        adapter: Path | None = None,
        dtype: torch.dtype,
        bos: Bos = "auto",
        given: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Use ``HookedModel.load``."""
        if bos not in ("auto", "always", "never"):
            raise InputError(f"bos={bos!r} is not auto, always or never")
        self.name, self.shape, self.checkpoint, self.notes = name, shape, checkpoint, notes
        self.adapter = adapter
        self._source, self._dtype, self._bos, self._given = source, dtype, bos, given
        self._tokenizer: Any = tokenizer
        self._wrapped: Wrapped | None = None
        self._active: list[tuple[Ledger, list[Action]]] = []
        self._edits: list[Edit] = []
        self._budget = Budget()

    @classmethod
    def load(
        cls,
        what: str | Path | nn.Module | HookedModel,
        *,
        revision: str | None = None,
        adapter: str | Path | None = None,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        device_map: Any = None,
        bos: Bos = "auto",
        trust_remote_code: bool = False,
    ) -> HookedModel:
        """A model from a folder, a Hub id (``org/model`` or ``org/model@revision``), an organism's name, or a Hugging Face model.

        Args:
            what: the checkpoint; an existing folder wins over an organism of the same name.
            revision: branch, tag or commit of a Hub id.
            adapter: a PEFT adapter folder, or an organism that is one, to merge (in fp32) into it.
            tokenizer: for a model given as an object; a folder's own is read otherwise.
            dtype: "auto" (as stored; fp32 when an adapter is merged into half precision), or a name.
            device: "auto", "cpu", "cuda", "cuda:1".
            device_map: given to accelerate, for models larger than one device.
            bos: "auto", "always" or "never" put the beginning-of-sequence token before texts.
            trust_remote_code: run Python code from the checkpoint; only for those you trust.

        Raises:
            InputError: nothing there, or it cannot be read; the message says what to do.
        """
        wanted = loading.read_dtype(dtype)
        folder = None if adapter is None else adapter_folder(adapter)
        if isinstance(what, HookedModel):
            _taken_as_it_is(what.name, revision=(revision, None), bos=(bos, what._bos))
            if folder is not None:
                return cls._adapted(what, folder, wanted)
            _taken_as_it_is(what.name, dtype=(wanted, what.dtype))
            return what
        if isinstance(what, nn.Module):
            plain: Any = what
            _taken_as_it_is(type(plain).__name__, revision=(revision, None), dtype=(None if folder else wanted, _dtype_of(plain)))
            name = getattr(plain.config, "_name_or_path", "") or type(plain).__name__
            model = cls(lambda: plain, shape_of(plain), name=name, tokenizer=tokenizer, dtype=_dtype_of(plain), bos=bos, given=True)
            return model if folder is None else cls._adapted(model, folder, wanted)
        place = loading.read_device(device)
        checkpoint = resolve(what, revision, trust_remote_code=trust_remote_code)
        stored = loading.stored_dtype(checkpoint)
        notes: tuple[str, ...] = ()
        if folder is not None and wanted is None and stored in loading.HALF:
            wanted = torch.float32
            notes = (
                f"{checkpoint.name} is stored as {str(stored).removeprefix('torch.')} and loaded as float32, "
                "because merging an adapter into half precision destroys small deltas",
            )

        def source() -> nn.Module:
            loading.announce([(checkpoint.name, loading.needed_bytes(checkpoint, wanted))], place)
            return loading.load_hf(checkpoint, dtype=wanted, device=place, device_map=device_map, trust_remote_code=trust_remote_code)

        model = cls(
            source,
            checkpoint.shape,
            name=checkpoint.name,
            tokenizer=tokenizer,
            checkpoint=checkpoint,
            dtype=wanted or stored,
            bos=bos,
            notes=notes,
        )
        return model if folder is None else cls._adapted(model, folder, wanted)

    @classmethod
    def _adapted(cls, base: HookedModel, folder: Path, dtype: torch.dtype | None) -> HookedModel:
        """``base`` with an adapter; shares with it every tensor the adapter leaves alone."""
        if base.adapter is not None:
            raise InputError(f"{base.name} has an adapter already; save it with model.save(folder) and put {folder.name} on that")
        adapter = read_adapter(folder)
        adapter.check(base.shape)
        target = dtype or (torch.float32 if base.dtype in loading.HALF else base.dtype)
        return cls(
            lambda: loading.merge_adapter(base.wrapped.source, folder, dtype),
            base.shape,
            name=f"{base.name} + {folder.name}",
            tokenizer=base._tokenizer if base._tokenizer is not None else None,
            checkpoint=base.checkpoint,
            adapter=folder,
            dtype=target,
            bos=base._bos,
            notes=base.notes,
        )

    @property
    def wrapped(self) -> Wrapped:
        """The model in memory; loads it on first use."""
        if self._wrapped is None or self._wrapped.stale:
            if self._wrapped is not None and self._edits:
                raise InputError(f"modules of {self.name} were replaced while it was edited; leave model.edited(...) first")
            before = self._wrapped
            self._wrapped = Wrapped(self._source() if before is None else before.source)
            try:
                assert_faithful(self)
            except InputError:  # refused now and the next time
                self._wrapped = before
                raise
        return self._wrapped

    def sides(self) -> Iterator[tuple[str, HookedModel]]:
        """The model alone; of a pair, both."""
        yield "model", self

    @property
    def loaded(self) -> bool:
        """True once the weights are in memory."""
        return self._wrapped is not None

    def release(self) -> None:
        """Let go of the weights of a model that came from files; the next use loads them again."""
        if not self._given and not self._active and not self._edits:
            self._wrapped = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return _dtype_of(self._wrapped.source) if self._wrapped else self._dtype

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.wrapped.device

    @property
    def fingerprint(self) -> str:
        """Identity of the weights: sha256 of the files, or a checksum of a model given as an object, taken anew."""
        if self.checkpoint is None:
            return loading.memory_fingerprint(self.wrapped.source)
        if self.adapter is None:
            return self.checkpoint.fingerprint
        return hashlib.sha256(f"{self.checkpoint.fingerprint}+{read_adapter(self.adapter).fingerprint}".encode()).hexdigest()

    def __repr__(self) -> str:
        """Name and sizes."""
        s = self.shape
        return f"HookedModel({self.name}: {s.architecture}, {s.n_layers} layers, {s.n_heads} heads, d_model {s.d_model})"

    def _repr_html_(self) -> str:
        """Name, sizes, dtype and what is in force; loads nothing."""
        from interp.plots.cell import facts

        s = self.shape
        heads = f"{s.n_heads} of width {s.d_head}" + (f", {s.n_kv_heads} for keys and values" if s.n_kv_heads != s.n_heads else "")
        kind = [word for word, there in (("gated MLP", s.gated), ("parallel blocks", s.parallel), ("tied embeddings", s.tied)) if there]
        rows = {
            "architecture": ", ".join([s.architecture, *kind]),
            "layers": s.n_layers,
            "heads per layer": heads,
            "d_model, d_mlp": f"{s.d_model}, {s.d_mlp}",
            "vocabulary, context": f"{s.d_vocab}, {s.n_ctx} tokens",
            "weights": f"{str(self.dtype).removeprefix('torch.')}, {f'on {self.device}' if self.loaded else 'not loaded yet'}",
            "from": str(self.checkpoint.path) if self.checkpoint is not None else "a model in memory",
            "adapter": self.adapter,
            "edits in force": ", ".join(edit.name or "unnamed" for edit in self._edits),
            "noted": "; ".join(self.notes),
        }
        return facts(f"HookedModel {self.name}", rows)

    def in_dtype(self, dtype: torch.dtype) -> HookedModel | None:
        """The same weights computed in another precision, as a model of its own; None where its copy would not fit the memory.

        Raises:
            InputError: edits are in force.
        """
        if self._edits:
            raise InputError(f"{self.name} is edited; leave model.edited(...) before asking for a copy")
        source = self.wrapped.source
        if sum(p.numel() for p in source.parameters()) * dtype.itemsize > 0.8 * loading.free_bytes(self.device):
            return None
        return HookedModel.load(loading.cast(structure_copy(source), dtype), tokenizer=self._tokenizer)

    def weights(self) -> TensorSource:
        """The raw tensors by Hugging Face name, one at a time: from the files where nothing needs to be in memory."""
        if self.checkpoint is not None and self.adapter is None and not self._edits:
            return self.checkpoint
        wrapped = self.wrapped
        named = {name: wrapped.parameter(name).detach() for name, _ in wrapped.source.named_parameters()}
        return StateTensors(named, self.name)


def _taken_as_it_is(name: str, **settings: tuple[Any, Any]) -> None:
    """A model that exists already is not loaded anew; a setting that asks for something else would go unheard."""
    for setting, (asked, given) in settings.items():
        if asked not in (None, "auto", given):
            raise InputError(f"{name} is taken as it is, with {setting} {given}; {setting}={asked} is for loading checkpoints")


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
