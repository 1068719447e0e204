"""One model that can be read, written and differentiated: the verbs every analysis is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import loading, weights
from interp.models.batch import Batch
from interp.models.capture import Capture, capture_to
from interp.models.checkpoint import Checkpoint, Shape, read_shape, read_tokenizer, resolve
from interp.models.generate import generate
from interp.models.interventions import Action, Entry, Hooks, Ledger, Part, StopForward, installed, locate, mask_padding, position_axes, setter
from interp.models.memory import Budget
from interp.models.validate import assert_faithful
from interp.models.weights import StateTensors, TensorSource
from interp.models.wrap import Wrapped
from interp.sites import Site, parse_sites

Bos = Literal["auto", "always", "never"]


class HookedModel:
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

    # ---- making one

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
            adapter: a PEFT adapter folder to merge (in fp32) into it.
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
        folder = None if adapter is None else Path(adapter)
        if isinstance(what, HookedModel):
            return what if folder is None else cls._adapted(what, folder, wanted, bos)
        if isinstance(what, nn.Module):
            plain: Any = what
            name = getattr(plain.config, "_name_or_path", "") or type(plain).__name__
            model = cls(lambda: plain, read_shape(plain.config), name=name, tokenizer=tokenizer, dtype=_dtype_of(plain), bos=bos, given=True)
            return model if folder is None else cls._adapted(model, folder, wanted, bos)
        place = loading.read_device(device)
        checkpoint = resolve(what, revision)
        stored = loading.stored_dtype(checkpoint)
        notes: tuple[str, ...] = ()
        if folder is not None and wanted is None and stored in loading.HALF:
            wanted = torch.float32
            notes = (f"{checkpoint.name} is stored as {str(stored).removeprefix('torch.')} and loaded as float32, because merging an adapter into half precision destroys small deltas",)

        def source() -> nn.Module:
            loading.announce([(checkpoint.name, loading.needed_bytes(checkpoint, wanted))], place)
            return loading.load_hf(checkpoint, dtype=wanted, device=place, device_map=device_map, trust_remote_code=trust_remote_code)

        model = cls(source, checkpoint.shape, name=checkpoint.name, tokenizer=tokenizer, checkpoint=checkpoint, dtype=wanted or stored, bos=bos, notes=notes)
        return model if folder is None else cls._adapted(model, folder, wanted, bos)

    @classmethod
    def _adapted(cls, base: HookedModel, folder: Path, dtype: torch.dtype | None, bos: Bos) -> HookedModel:
        """``base`` with an adapter; shares with it every tensor the adapter leaves alone."""
        from interp.models.adapters import read_adapter

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
            bos=bos,
            notes=base.notes,
        )

    @property
    def wrapped(self) -> Wrapped:
        """The model in memory; loads it on first use."""
        if self._wrapped is None:
            self._wrapped = Wrapped(self._source())
            assert_faithful(self)
        elif self._wrapped.stale:
            if self._edits:
                raise InputError(f"modules of {self.name} were replaced while it was edited; leave model.edited(...) first")
            self._wrapped = Wrapped(self._wrapped.source)
            assert_faithful(self)
        return self._wrapped

    @property
    def loaded(self) -> bool:
        """True once the weights are in memory."""
        return self._wrapped is not None

    def release(self) -> None:
        """Let go of the weights of a model that came from files; the next use loads them again."""
        if not self._given and not self._active and not self._edits:
            self._wrapped = None

    # ---- what it is

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
        from interp.models.adapters import read_adapter

        return hashlib.sha256(f"{self.checkpoint.fingerprint}+{read_adapter(self.adapter).fingerprint}".encode()).hexdigest()

    @property
    def active_edits(self) -> tuple[str, ...]:
        """Digests of the edits now in force."""
        return tuple(e.digest for e in self._edits)

    def __repr__(self) -> str:
        """Name and sizes."""
        s = self.shape
        return f"HookedModel({self.name}: {s.architecture}, {s.n_layers} layers, {s.n_heads} heads, d_model {s.d_model})"

    # ---- text

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer.

        Raises:
            InputError: the model was given as an object without one.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        if self.checkpoint is None:
            raise InputError(f"{self.name} was given as an object without a tokenizer; pass tokenizer=... to HookedModel.load, or token ids")
        return read_tokenizer(self.checkpoint.path)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, special tokens included once as ``bos`` says.

        Raises:
            InputError: the text gives no tokens.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        first = self.tokenizer.bos_token_id
        if self._bos != "auto" and first is not None:
            while ids and ids[0] == first:
                ids = ids[1:]
            ids = [first, *ids] if self._bos == "always" else ids
        if not ids:
            raise InputError("a prompt is empty: it has no tokens")
        return ids

    def token(self, word: str) -> int:
        """The id of a word that is exactly one token, without special tokens.

        Raises:
            InputError: it is several tokens; they are named.
        """
        ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(self.token_text(i)) for i in ids) or "nothing"
            raise InputError(f"{word!r} is {len(ids)} tokens ({pieces}) for the tokenizer of {self.name}; one token is needed")
        return int(ids[0])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def token_text(self, token: int) -> str:
        """The text of one token, for display."""
        return self.token_strings([token])[0]

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The text of every token, for display: with its leading space, bytes that are no text shown as the vocabulary spells them."""
        shown = []
        for i in ids:
            raw = self.tokenizer.convert_ids_to_tokens(int(i))
            text = self.decode([int(i)])
            if raw is None:
                shown.append(f"<{int(i)}>")
            elif "\ufffd" in text or not text:
                shown.append(str(raw))
            else:
                # A Metaspace tokenizer drops the space of a lone token.
                shown.append(" " + text if str(raw).startswith("\u2581") and not text.startswith(" ") else text)
        return shown

    def batch(self, prompts: Any) -> Batch:
        """A batch from a text, texts, lists of token ids, ``Prompts``, or a batch.

        Raises:
            InputError: an empty prompt, one longer than the context, an id outside the vocabulary, or a bare tensor.
        """
        if isinstance(prompts, Tensor):
            raise InputError("a bare tensor does not say which tokens are padding; use Batch.of_tensor(ids, mask) or unpadded=True there")
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, Batch):
            found = prompts
        elif hasattr(prompts, "batch"):
            found = prompts.batch()
        else:
            found = Batch.of([self.tokens(p) if isinstance(p, str) else list(p) for p in prompts])
        longest = int(found.lengths.max())
        if longest > self.shape.n_ctx:
            row = int(found.lengths.argmax())
            raise InputError(f"prompt {row} has {longest} tokens; {self.name} takes at most {self.shape.n_ctx}")
        if int(found.ids.max()) >= self.shape.d_vocab or int(found.ids.min()) < 0:
            raise InputError(f"token id {int(found.ids.max())} is outside the vocabulary of {self.name} (0 to {self.shape.d_vocab - 1})")
        return found

    # ---- running

    def each(self, batch: Batch, bytes_per_token: int, run: Callable[[Part], Any]) -> Iterator[tuple[Part, Any]]:
        """Run a function on every part, with smaller parts when memory runs out."""
        order = torch.argsort(batch.lengths, descending=True, stable=True).tolist()
        at = 0
        while at < len(order):
            n = self._budget.rows(int(batch.lengths[order[at]]) * bytes_per_token)
            rows = order[at : at + n]
            part = Part(batch.select(rows), torch.tensor(rows), len(batch))
            done, out = self._budget.attempt(lambda part=part: run(part), len(rows))
            if done:
                yield part, out
                at += len(rows)

    def forward(
        self,
        part: Part,
        prepare: Callable[[Hooks], None] | None = None,
        *,
        keep: Tensor | None = None,
        trunk: bool = False,
        cache: Any = None,
    ) -> Any:
        """One pass with every active intervention; the Hugging Face output, or None when a hook ended the pass early.

        Args:
            part: prompts of the pass.
            prepare: installs readers.
            keep: columns whose logits are wanted; None is all.
            trunk: stop before the unembedding.
            cache: keys and values to go on from, filled in place.
        """
        wrapped = self.wrapped
        batch = part.batch.to(wrapped.device)
        inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": cache is not None}
        if batch.padded:
            inputs["attention_mask"] = batch.mask.long()
        if cache is not None:
            inputs["past_key_values"] = cache
        if keep is not None and not trunk:
            inputs["logits_to_keep"] = keep.to(wrapped.device)
        actions = [a for _, group in self._active for a in group]
        with installed(wrapped, Part(batch, part.rows, part.total, part.phase), actions) as hooks:
            if prepare:
                prepare(hooks)
            wrapped.refresh()
            try:
                return (wrapped.runner.base_model if trunk else wrapped.runner)(**inputs)
            except StopForward:
                return None

    @overload
    def logits(self, prompts: Any, *, at: None = None) -> Float[Tensor, "prompt pos vocab"]: ...
    @overload
    def logits(self, prompts: Any, *, at: str | int) -> Float[Tensor, "prompt vocab"]: ...
    def logits(self, prompts: Any, *, at: str | int | None = None) -> Tensor:
        """Logits of every position, or of one named position per prompt.

        Args:
            prompts: whatever ``batch`` takes.
            at: a position that names one token per prompt ("END"); only those rows are unembedded.

        Returns:
            [prompt, pos, vocab], zero at padding; or [prompt, vocab].
        """
        batch = self.batch(prompts)
        width, vocab = batch.ids.shape[1], self.shape.d_vocab
        index = None if at is None else batch.index(at)
        out: Tensor | None = None

        def run(part: Part) -> Tensor:
            with torch.no_grad():
                if at is None:
                    return self.forward(part).logits
                where = part.batch.index(at)
                columns, inverse = where.unique(return_inverse=True)
                rows = torch.arange(len(where))
                return self.forward(part, keep=columns).logits[rows, inverse]

        per_token = self._bytes_per_token(vocab if at is None else 0)
        for part, got in self.each(batch, per_token, run):
            if out is None:
                out = got.new_zeros((len(batch), vocab) if index is not None else (len(batch), width, vocab))
            rows = part.rows.to(got.device)
            if index is not None:
                out[rows] = got
            else:
                out[rows, : got.shape[1]] = got * part.batch.mask.to(got.device)[..., None]
        assert out is not None
        return out

    def _bytes_per_token(self, extra: int = 0) -> int:
        s = self.shape
        return (4 * s.d_model + 2 * s.d_mlp + 2 * s.n_heads * s.d_head + extra) * max(self.dtype.itemsize, 4)

    def sites(self, sites: str | Site | Sequence[str | Site]) -> list[Site]:
        """Sites from texts, checked against this model.

        Raises:
            InputError: no such site, layer or head here.
        """
        try:
            return [self.wrapped.check(s) for s in parse_sites(sites)]
        except InputError:
            raise
        except ValueError as e:
            raise InputError(str(e)) from e

    @overload
    def capture(self, prompts: Any, sites: str | Site | Sequence[str | Site]) -> dict[Site, Tensor]: ...
    @overload
    def capture(self, prompts: Any, sites: str | Site | Sequence[str | Site], *, to: str | Path, dtype: torch.dtype | None = None) -> Capture: ...
    def capture(
        self, prompts: Any, sites: str | Site | Sequence[str | Site], *, to: str | Path | None = None, dtype: torch.dtype | None = None
    ) -> dict[Site, Tensor] | Capture:
        """Activations at sites; nothing is computed after the last of them.

        Args:
            prompts: whatever ``batch`` takes.
            sites: texts or sites; a head or position in a site selects it.
            to: a folder to stream to, for what does not fit in memory; an interrupted capture goes on where it was.
            dtype: stored dtype, e.g. ``torch.float16``; None is the model's.

        Returns:
            Per site [prompt, pos, d_model], [prompt, pos, head, d_head], or [prompt, head, query, key] for patterns, less the
            axes that the site selects, and zero at padding; or a ``Capture`` of the folder.
        """
        batch, wanted = self.batch(prompts), self.sites(sites)
        if not wanted:
            raise InputError("no sites to capture were given")
        if to is not None:
            return capture_to(self, batch, wanted, Path(to), dtype)
        out: dict[Site, Tensor] = {}
        for part, got in self.each(batch, self._bytes_per_token(), lambda part: self.read(part, wanted)):
            for site, x in got.items():
                x = x if dtype is None else x.to(dtype)
                if site not in out:
                    full = list(x.shape)
                    full[0] = len(batch)
                    for axis in position_axes(site, x.ndim):
                        full[axis] = batch.ids.shape[1]
                    out[site] = x.new_zeros(full)
                out[site][(part.rows.to(x.device), *(slice(0, n) for n in x.shape[1:]))] = x
        return {site: out[site] for site in wanted}

    def read(self, part: Part, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Activations of one pass, zero at padding."""
        got: dict[Site, Tensor] = {}

        def prepare(hooks: Hooks) -> None:
            for site in sites:
                hooks.read(site, got)
            hooks.stop_after(sites, got)

        with torch.no_grad():
            self.forward(part, prepare, trunk=True)
        return {site: mask_padding(x, site, part) for site, x in got.items()}

    def gradients(self, prompts: Any, loss: Callable[[Tensor], Tensor], sites: str | Site | Sequence[str | Site]) -> dict[Site, Tensor]:
        """The gradient of a loss by activations.

        Args:
            prompts: whatever ``batch`` takes; one pass, so that the loss may mix prompts.
            loss: maps logits [prompt, pos, vocab] to a scalar.
            sites: activation sites; for ``resid_mid`` it is the gradient through both the MLP and the skip connection.

        Returns:
            Per site a tensor of the shape that ``capture`` gives.
        """
        batch, wanted = self.batch(prompts), self.sites(sites)
        part = Part(batch, torch.arange(len(batch)), len(batch))
        whole = {s: Site(s.component, s.layer) for s in wanted}
        leaves: dict[Site, Tensor] = {}

        def prepare(hooks: Hooks) -> None:
            for site in dict.fromkeys(whole.values()):
                hooks.leaf(site, leaves)

        with torch.enable_grad():
            value = loss(self.forward(part, prepare).logits)
            keys = list(leaves)
            grads = dict(zip(keys, torch.autograd.grad(value, [leaves[k] for k in keys], allow_unused=True), strict=True))
        found = {}
        for site in wanted:
            g = grads[whole[site]]
            g = torch.zeros_like(leaves[whole[site]]) if g is None else g
            found[site] = g[locate(site, part, g)].detach()
        return found

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

    # ---- changing

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
        actions = []
        for key, value in values.items():
            (site,) = self.sites(key)
            if site.is_weight or site.component == "svd":
                raise InputError(f"{site} is not an activation; patched takes sites such as L3.resid_post or L9H6.z@END")
            self.wrapped.hook_point(site.component, site.layer)
            entry = Entry(site)
            ledger.entries.append(entry)
            actions.append(Action(site, setter(site, value), "prompt", entry))
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
        ledger = Ledger([Entry(self.sites(c.site)[0]) for c in edit.activations])
        actions = [Action(c.site, _applier(c), c.at, e) for c, e in zip(edit.activations, ledger.entries, strict=True)]
        self._set_edits([*self._edits, edit])
        try:
            with self._with(ledger, actions):
                yield ledger
        finally:
            self._set_edits([e for e in self._edits if e is not edit])
        if any(e.fired for e in ledger.entries):
            ledger.check()

    def _set_edits(self, edits: list[Edit]) -> None:
        """Make exactly these edits' weight changes the ones in force."""
        wrapped = self.wrapped
        touched: dict[str, Tensor] = {}
        for edit in edits:
            for change in edit.weights:
                key, view = self._accessor(change.site)
                if key not in touched:
                    touched[key] = wrapped.source.get_parameter(key).detach().clone()
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

    def weights(self) -> TensorSource:
        """The raw tensors by Hugging Face name, one at a time: from the files where nothing needs to be in memory."""
        if self.checkpoint is not None and self.adapter is None and not self._edits:
            return self.checkpoint
        wrapped = self.wrapped
        named = {name: wrapped.parameter(name).detach() for name, _ in wrapped.source.named_parameters()}
        return StateTensors(named, self.name)

    def generate(
        self, prompts: Any, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0, stop: Sequence[int] | None = None
    ) -> list[list[int]]:
        """New tokens for every prompt, greedily or by seeded sampling.

        Args:
            prompts: whatever ``batch`` takes.
            max_new_tokens: at most so many per prompt.
            temperature: 0 is greedy.
            seed: of streams keyed by (seed, prompt, step), so that batching changes nothing.
            stop: ids that end a prompt's answer (kept out of it); None is the checkpoint's end-of-sequence tokens.

        Returns:
            The new ids per prompt.
        """
        return generate(self, self.batch(prompts), max_new_tokens, temperature, seed, stop)

    def save(self, folder: str | Path, *, edit: Edit | None = None) -> Path:
        """Write a Hugging Face folder (safetensors, config, tokenizer), with the edits in force and ``edit`` applied to the weights.

        Raises:
            InputError: an edit that changes activations, which no checkpoint can hold.
        """
        folder = Path(folder)
        if any(e.activations for e in [*self._edits, *([edit] if edit else [])]):
            raise InputError("an edit of activations cannot be saved in a checkpoint; save it with edit.save(folder)")
        held: AbstractContextManager[Any] = self.edited(edit) if edit is not None else _nothing()
        with held:
            wrapped: Any = self.wrapped
            source = wrapped.source
            state = {name: wrapped.parameter(name).detach() for name, _ in source.named_parameters(remove_duplicate=False)}
            state |= {name: b for name, b in source.state_dict().items() if name not in state}
            source.save_pretrained(folder, state_dict=state, safe_serialization=True)
        if self._tokenizer is not None or self.checkpoint is not None:
            self.tokenizer.save_pretrained(folder)
        return folder


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _applier(change: Any) -> Callable[[Tensor, Part], Tensor]:
    return lambda x, part: change.apply(x)


def _add(view: Tensor, change: WeightChange) -> None:
    """Add a delta in fp32 or better, then round once to the weight's dtype."""
    wide = torch.float64 if view.dtype == torch.float64 else torch.float32
    delta = WeightChange(change.site, change.left.to(view.device, wide), None if change.right is None else change.right.to(view.device, wide)).delta
    if delta.numel() != view.numel():
        raise InputError(f"a delta of shape {tuple(delta.shape)} does not fit {change.site}, which is {tuple(view.shape)}")
    view.copy_(view.to(wide) + delta.reshape(view.shape))
