"""A pair as one model in which the contribution of tuning is scaled: x_{l+1} = x_l + PTC_l + alpha FTC_l."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.contribution import Blocks, check, stream_of, wide
from interp.models.interventions import Hooks, Part
from interp.models.running import Running
from interp.models.wrap import Wrapped

if TYPE_CHECKING:
    from interp.models.pair import ModelPair


class ScaledModel(Running):
    """Computes along the alpha-stream: both models' blocks run on it, and what tuning adds is multiplied by alpha.

    alpha = 1 is the tuned model; alpha = 0 runs base's blocks between the tuned model's embedding and unembedding, so it is base
    where they share these. It scores on tasks as a model does; ``verbs`` are what it can do.

    Attributes:
        pair: the models.
        alphas: one factor per layer.
        verbs: its methods; others of a model are refused, since activations and weights would be those of one side only.
    """

    verbs = ("batch", "tokens", "token", "decode", "token_strings", "token_text", "logits", "generate")

    def __init__(self, pair: ModelPair, alpha: float | Sequence[float]) -> None:
        """Use ``pair.scaled(alpha)``.

        Raises:
            InputError: alpha is not a finite number, or one per layer; or the two models cannot run beside each other.
        """
        self.pair, self.alphas = pair, _alphas(alpha, pair.shape.n_layers)
        tuned = pair.tuned
        shown = f"{self.alphas[0]:g}" if len(set(self.alphas)) == 1 else "(" + ", ".join(f"{a:g}" for a in self.alphas) + ")"
        self.name = f"{pair.base.name} + {shown} x (tuned - base)"
        self.shape = replace(tuned.shape, n_ctx=min(pair.base.shape.n_ctx, tuned.shape.n_ctx))
        self.checkpoint = None  # there are no files of it
        self.notes = pair.notes
        self._tokenizer, self._bos, self._budget = tuned._tokenizer, tuned._bos, tuned._budget
        self._active, self._edits = [], []
        self._twins: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # the tuned model's cache -> base's
        check(pair, Batch.of([[0]]))

    @cached_property
    def tokenizer(self) -> Any:
        """The tuned model's tokenizer."""
        return self.pair.tuned.tokenizer

    @property
    def wrapped(self) -> Wrapped:
        """The tuned model in memory, whose embedding, unembedding and generation are used."""
        return self.pair.tuned.wrapped

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tuned model's weights."""
        return self.pair.tuned.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.wrapped.device

    @property
    def active_edits(self) -> tuple[str, ...]:
        """Digests of the edits in force in either model."""
        return (*self.pair.base.active_edits, *self.pair.tuned.active_edits)

    @property
    def fingerprint(self) -> str:
        """Identity of both models and alpha."""
        return hashlib.sha256(f"{self.pair.base.fingerprint} {self.pair.tuned.fingerprint} {self.alphas}".encode()).hexdigest()

    def forward(
        self,
        part: Part,
        prepare: Callable[[Hooks], None] | None = None,
        *,
        keep: Tensor | None = None,
        trunk: bool = False,
        cache: Any = None,
    ) -> Any:
        """One pass along the alpha-stream; as ``HookedModel.forward``, with a second cache for base beside the given one."""
        check(self.pair, part.batch)
        base, tuned = Blocks.of(self.pair.base), Blocks.of(self.pair.tuned)
        calls = base.calls(part.batch.mask, self._twin(cache))

        def scaled(layer: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                out = tuned.forwards[layer](hidden_states, *args, **kwargs)
                with_tuning, without = stream_of(out), base.run(layer, hidden_states, calls[layer])
                change = wide(with_tuning) - wide(without)
                new = (wide(without) + self.alphas[layer] * change).to(hidden_states.dtype)
                return (new, *out[1:]) if isinstance(out, tuple) else new

            return forward

        with tuned.standing_in([scaled(layer) for layer in range(len(calls))]):
            return self.pair.tuned.forward(part, prepare, keep=keep, trunk=trunk, cache=cache)

    def _twin(self, cache: Any) -> Any:
        """Base's cache beside one of the tuned model's: both are filled from the alpha-stream."""
        if cache is None:
            return None
        if cache not in self._twins:
            from transformers import DynamicCache

            self._twins[cache] = DynamicCache(config=self.pair.base.wrapped.runner.config)
        return self._twins[cache]

    def _bytes_per_token(self, extra: int = 0) -> int:
        return 2 * self.pair.tuned._bytes_per_token(extra)

    def __repr__(self) -> str:
        """Name and verbs."""
        return f"ScaledModel({self.name}: {', '.join(self.verbs)})"

    def __getattr__(self, name: str) -> NoReturn:
        """What else a model can do.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(_refusal(name))


def _refusal(verb: str) -> str:
    return f"a scaled pair cannot {verb}; it has {', '.join(ScaledModel.verbs)}"


def _refused(verb: str) -> Callable[..., NoReturn]:
    def refuse(self: ScaledModel, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(_refusal(verb))

    refuse.__doc__ = "Refused: it would be about one side only."
    return refuse


for _verb in (
    *("capture", "capture_bytes", "read", "gradients", "run_on", "patched", "edited"),
    *("weight", "weights", "ov", "qk", "save", "in_dtype", "release", "sites"),
):
    setattr(ScaledModel, _verb, _refused(_verb))


def _alphas(alpha: Any, n_layers: int) -> tuple[float, ...]:
    """One factor per layer."""
    given = alpha.tolist() if hasattr(alpha, "tolist") else alpha  # tensors, numpy's arrays and numbers
    each = list(given) if isinstance(given, list | tuple) else [given] * n_layers
    if len(each) != n_layers or not all(isinstance(a, int | float) and not isinstance(a, bool) and math.isfinite(a) for a in each):
        raise InputError(f"alpha is a finite number or one for each of {n_layers} layers, not {str(alpha)[:60]!r}")
    return tuple(float(a) for a in each)
