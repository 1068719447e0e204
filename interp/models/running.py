"""Reading a model: logits, captures, gradients, generation, with every intervention in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit
from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.capture import Capture, capture_bytes, capture_to, narrowed
from interp.models.checkpoint import Shape
from interp.models.generate import generate
from interp.models.interventions import Action, Hooks, Ledger, Part, StopForward, installed, locate, mask_padding, position_axes
from interp.models.loading import free_bytes
from interp.models.memory import Budget
from interp.models.text import Text
from interp.models.wrap import Wrapped
from interp.sites import Site, parse_sites


class Running(Text):
    """The verbs that read."""

    shape: Shape
    _active: list[tuple[Ledger, list[Action]]]
    _edits: list[Edit]
    _budget: Budget

    @property
    def wrapped(self) -> Wrapped:
        """The model in memory; loads it on first use."""
        raise AttributeError("a model is made with HookedModel.load")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        raise AttributeError("a model is made with HookedModel.load")

    @property
    def active_edits(self) -> tuple[str, ...]:
        """Digests of the edits now in force."""
        return tuple(e.digest for e in self._edits)

    @property
    def fingerprint(self) -> str:
        """Identity of the weights."""
        raise AttributeError("a model is made with HookedModel.load")

    def batch(self, prompts: Any) -> Batch:
        """A batch from a text, texts, lists of token ids, ``Prompts``, or a batch.

        Raises:
            InputError: an empty prompt, one longer than the context, an id outside the vocabulary, or a bare tensor.
        """
        if isinstance(prompts, Tensor):
            raise InputError("a bare tensor does not say which tokens are padding; use Batch.of_tensor(ids, mask) or unpadded=True there")
        if isinstance(prompts, Mapping):
            raise InputError("a tokenizer's output is no prompts yet; use Batch.of_tensor(out['input_ids'], out['attention_mask'])")
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, Batch):
            found = prompts
        elif hasattr(prompts, "batch"):
            found = prompts.batch()
        else:
            found = Batch.of([self.tokens(p) if isinstance(p, str) else p for p in prompts])
        longest = int(found.lengths.max())
        if longest > self.shape.n_ctx:
            row = int(found.lengths.argmax())
            raise InputError(f"prompt {row} has {longest} tokens; {self.name} takes at most {self.shape.n_ctx}")
        low, high = int(found.ids.min()), int(found.ids.max())
        if low < 0 or high >= self.shape.d_vocab:
            wrong = low if low < 0 else high
            raise InputError(f"token id {wrong} is outside the vocabulary of {self.name} (0 to {self.shape.d_vocab - 1})")
        return found

    def each(self, batch: Batch, bytes_per_token: int, run: Callable[[Part], Any]) -> Iterator[tuple[Part, Any]]:
        """Run a function on every part, with smaller parts when memory runs out.

        Args:
            batch: the prompts.
            bytes_per_token: what a pass takes beside attention, which grows with the square of the length and is added here.
            run: of a part.
        """
        order = torch.argsort(batch.lengths, descending=True, stable=True).tolist()
        at = 0
        while at < len(order):
            width = int(batch.lengths[order[at]])
            n = self._budget.rows(width * bytes_per_token + self._attention_bytes(width))
            rows = order[at : at + n]
            part = Part.of(batch, rows)
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
        with installed(wrapped, replace(part, batch=batch), actions) as hooks:
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
        out: Any = None

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
        return out

    def _bytes_per_token(self, extra: int = 0) -> int:
        s = self.shape
        return (4 * s.d_model + 2 * s.d_mlp + 2 * s.n_heads * s.d_head + extra) * max(self.dtype.itemsize, 4)

    def _attention_bytes(self, width: int) -> int:
        """What one layer's attention of a prompt takes: scores, those with the mask, their softmax, and a copy that a hook makes."""
        return 4 * self.shape.n_heads * width * width * max(self.dtype.itemsize, 4)

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
    def capture(
        self, prompts: Any, sites: str | Site | Sequence[str | Site], *, to: str | Path, dtype: torch.dtype | None = None
    ) -> Capture: ...
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
        for site in wanted:
            self.wrapped.hook_point(site.component, site.layer)
            if site.position is not None:
                batch.columns(site.position)  # parts of a batch could agree among themselves only
        if to is not None:
            return capture_to(self, batch, wanted, Path(to), dtype)
        need = capture_bytes(self, batch, wanted, dtype)
        if need > 2**28 and need > (free := free_bytes(self.wrapped.device)):
            gib = f"{need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
            raise InputError(f"this capture takes {gib}; stream it to disk with to=folder, or name positions in the sites")
        out: dict[Site, Tensor] = {}
        for part, got in self.each(batch, self._bytes_per_token(), lambda part: self.read(part, wanted)):
            for site, x in got.items():
                x = narrowed(x, dtype, site)
                if site not in out:
                    full = list(x.shape)
                    full[0] = len(batch)
                    for axis in position_axes(site, x.ndim):
                        full[axis] = batch.ids.shape[1]
                    out[site] = x.new_zeros(full)
                out[site][(part.rows.to(x.device), *(slice(0, n) for n in x.shape[1:]))] = x
        return {site: out[site] for site in wanted}

    def capture_bytes(self, prompts: Any, sites: str | Site | Sequence[str | Site], dtype: torch.dtype | None = None) -> int:
        """Bytes that ``capture`` of these sites would take, known without running the model."""
        return capture_bytes(self, self.batch(prompts), self.sites(sites), dtype)

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
        part = Part.of(batch)
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
