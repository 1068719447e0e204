"""Two checkpoints that can be compared: a base and what it was tuned into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from interp.errors import InputError
from interp.models import loading
from interp.models.adapters import is_adapter
from interp.models.batch import Batch
from interp.models.checkpoint import Shape, has_tokenizer
from interp.models.hooked import Bos, HookedModel

if TYPE_CHECKING:
    from interp.models.scaled import ScaledModel

_MUST_MATCH = {
    "architecture": "architecture",
    "n_layers": "number of layers",
    "d_model": "width of the residual stream",
    "n_heads": "number of heads",
    "n_kv_heads": "number of key/value heads",
    "d_head": "width of a head",
    "d_mlp": "width of the MLP",
}


class ModelPair:
    """A base model and a tuned one, checked to be comparable.

    Attributes:
        base: the model before tuning.
        tuned: the model after.
        notes: differences that are allowed and worth knowing.
        shared_vocab: logits are compared on ids below it.
    """

    def __init__(self, base: HookedModel, tuned: HookedModel) -> None:
        """Check two models against each other; configs and tokenizers suffice.

        Raises:
            InputError: they cannot be compared; the first difference is named.
        """
        for field, words in _MUST_MATCH.items():
            a, b = getattr(base.shape, field), getattr(tuned.shape, field)
            if a != b:
                raise InputError(f"{base.name} and {tuned.name} cannot be compared: {words} is {a} in base and {b} in tuned")
        self.base, self.tuned = base, tuned
        self.one_at_a_time = False
        self.shared_vocab, token_notes = _shared_vocabulary(base, tuned)
        self.notes: tuple[str, ...] = (*token_notes, *_differences(base, tuned), *dict.fromkeys((*base.notes, *tuned.notes)))

    @classmethod
    def load(
        cls,
        base: Any,
        tuned: Any,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | tuple[str, ...] = "auto",
        device_map: Any = None,
        load: Literal["together", "one at a time"] = "together",
        bos: Bos = "auto",
        trust_remote_code: bool = False,
    ) -> ModelPair:
        """A pair from two checkpoints; weights load on first use.

        Args:
            base: folder, Hub id, organism, Hugging Face model, or ``HookedModel``.
            tuned: the same, or an adapter folder, which is applied to ``base`` and shares its other tensors.
            dtype: for both.
            device: for both, or one for each.
            device_map: given to accelerate.
            load: "one at a time" lets go of one model's weights before the other's load.
            bos: as for ``HookedModel.load``.
            trust_remote_code: run Python code from the checkpoints.

        Raises:
            InputError: nothing there, unreadable, or not comparable.
        """
        if load not in ("together", "one at a time"):
            raise InputError(f"load={load!r} is not 'together' or 'one at a time'")
        places = device if isinstance(device, tuple) else (device, device)
        if len(places) != 2:
            raise InputError(f"device takes one device or two (base, tuned), not {len(places)}")
        more: dict[str, Any] = {"device_map": device_map, "bos": bos, "trust_remote_code": trust_remote_code}
        adapted = isinstance(tuned, str | Path) and is_adapter(tuned)
        if adapted:
            wanted = loading.read_dtype(dtype)
            first = HookedModel.load(base, dtype=dtype, device=places[0], **more)
            if wanted is None and first.dtype in loading.HALF and isinstance(base, str | Path):
                # Both in fp32, or rounding would pass for tuning.
                note = (
                    f"{first.name} is stored as {str(first.dtype).removeprefix('torch.')}; both models are loaded as float32, "
                    "because merging an adapter into half precision destroys small deltas"
                )
                first = HookedModel.load(base, dtype=torch.float32, device=places[0], **more)
                first.notes = (note,)
            second = HookedModel.load(first, adapter=tuned, dtype=dtype, bos=bos)
        else:
            first = HookedModel.load(base, dtype=dtype, device=places[0], **more)
            second = HookedModel.load(tuned, dtype=dtype, device=places[1], **more)
        pair = cls(first, second)
        pair.one_at_a_time = load == "one at a time"
        if pair.one_at_a_time and adapted:
            raise InputError("an adapter shares its base's weights, so there is nothing to load one at a time; use load='together'")
        if not pair.one_at_a_time:
            needs = [
                (m.name, loading.needed_bytes(m.checkpoint, m.dtype))
                for m in (first, second)
                if m.checkpoint is not None and m.adapter is None
            ]
            if needs and places[0] == places[1]:
                loading.announce(needs, loading.read_device(places[0]))
        return pair

    def sides(self) -> Iterator[tuple[Literal["base", "tuned"], HookedModel]]:
        """Both models, base first; loading one at a time, each lets go of its weights before the next loads."""
        if self.one_at_a_time:
            self.tuned.release()
        yield "base", self.base
        if self.one_at_a_time:
            self.base.release()
        yield "tuned", self.tuned

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.base.name} -> {self.tuned.name}"

    @property
    def shape(self) -> Shape:
        """Sizes of the base; the tuned model's may differ in the vocabulary only."""
        return self.base.shape

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.base.tokenizer

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text; both models read the same ids."""
        return self.base.tokens(text)

    def token(self, word: str) -> int:
        """The id of a word that is one token."""
        return self.base.token(word)

    def token_strings(self, ids: Any) -> list[str]:
        """Tokens for display."""
        return self.base.token_strings(ids)

    def token_text(self, token: int) -> str:
        """One token for display."""
        return self.base.token_text(token)

    def decode(self, ids: Any) -> str:
        """The text of token ids."""
        return self.base.decode(ids)

    def batch(self, prompts: Any) -> Batch:
        """A batch both models can read."""
        found = self.base.batch(prompts)
        self.tuned.batch(found)
        return found

    def scaled(self, alpha: float | Sequence[float]) -> ScaledModel:
        """Both models as one in which what tuning adds to the stream is multiplied: x_{l+1} = x_l + PTC_l + alpha FTC_l.

        Each block of both runs on the stream so made (arXiv 2506.23423). 1 is the tuned model, 0 runs base's blocks between the
        tuned model's embedding and unembedding, more than 1 amplifies tuning.

        Args:
            alpha: a number, or one per layer.

        Returns:
            A model that computes logits, generates and is scored by tasks; its ``verbs`` list what it can do.

        Raises:
            InputError: alpha is something else, or the pair is loaded one at a time.
        """
        from interp.models.scaled import ScaledModel

        return ScaledModel(self, alpha)

    def __repr__(self) -> str:
        """Both names, and what they have in common."""
        s = self.shape
        return f"ModelPair({self.name}: {s.architecture}, {s.n_layers} layers, {s.n_heads} heads, d_model {s.d_model})"

    def _repr_html_(self) -> str:
        """Both models, and what is worth knowing of them as a pair; loads nothing."""
        from interp.plots.cell import facts

        s = self.shape
        loaded = [side for side, model in (("base", self.base), ("tuned", self.tuned)) if model.loaded]
        rows = {
            "base": self.base.name,
            "tuned": self.tuned.name,
            "architecture": f"{s.architecture}, {s.n_layers} layers, {s.n_heads} heads, d_model {s.d_model}",
            "compared on": f"{self.shared_vocab} token ids",
            "in memory": ", ".join(loaded) or "neither yet",
            "noted": "; ".join(self.notes) or "no differences beside the weights",
        }
        return facts(f"ModelPair {self.name}", rows)


def _tokenizer_of(model: HookedModel) -> Any:
    """The tokenizer, or None for a model given as an object, or saved, without one."""
    if model._tokenizer is None and (model.checkpoint is None or not has_tokenizer(model.checkpoint.path)):
        return None
    return model.tokenizer


def _shared_vocabulary(base: HookedModel, tuned: HookedModel) -> tuple[int, list[str]]:
    """Ids both models know, and notes.

    Raises:
        InputError: an id that both use decodes differently.
    """
    a, b = base.shape.d_vocab, tuned.shape.d_vocab
    notes = []
    if a != b:
        notes.append(f"the embedding has {a} rows in base and {b} in tuned; logits are compared on the shared ids")
    left, right = _tokenizer_of(base), _tokenizer_of(tuned)
    if left is None or right is None or left is right:
        return min(a, b), notes
    n = min(a, b)
    tops = [max(t.get_vocab().values()) + 1 for t in (left, right)]  # ids may have gaps, so that len() is not the last one
    known = min(n, *tops)
    one, two = left.convert_ids_to_tokens(list(range(known))), right.convert_ids_to_tokens(list(range(known)))
    for i, (x, y) in enumerate(zip(one, two, strict=True)):
        if x != y and x is not None and y is not None:
            raise InputError(f"{base.name} and {tuned.name} cannot be compared: token {i} is {x!r} in base and {y!r} in tuned")
    if tops[0] != tops[1]:
        notes.append(f"the tokenizer has {tops[0]} entries in base and {tops[1]} in tuned; the first {known} are shared")
        n = known  # a row that only one side's tokenizer uses means nothing in the other
    if (getattr(left, "chat_template", None) is None) != (getattr(right, "chat_template", None) is None):
        side = "tuned" if getattr(left, "chat_template", None) is None else "base"
        notes.append(f"only {side} has a chat template; both models read the same raw text here")
    sample = "The quick brown fox, 12 + 3."
    if list(left(sample)["input_ids"]) != list(right(sample)["input_ids"]):
        notes.append("the tokenizers split or mark a sample text differently; both models read the token ids of base's")
    return n, notes


def _differences(base: HookedModel, tuned: HookedModel) -> list[str]:
    """Allowed differences worth knowing."""
    notes = []
    if base.dtype != tuned.dtype:
        names = [str(m.dtype).removeprefix("torch.") for m in (base, tuned)]
        notes.append(f"base is {names[0]} and tuned {names[1]}; differences below rounding of the coarser are noise")
    if base.shape.tied != tuned.shape.tied:
        notes.append(f"the unembedding is tied to the embedding in {'base' if base.shape.tied else 'tuned'} only")
    ropes = [_rope(m) for m in (base, tuned)]
    if ropes[0] != ropes[1]:
        notes.append(f"rotary settings differ: {ropes[0]} in base, {ropes[1]} in tuned; each model uses its own")
    if base.shape.n_ctx != tuned.shape.n_ctx:
        notes.append(f"the longest context is {base.shape.n_ctx} in base and {tuned.shape.n_ctx} in tuned")
    return notes


def _rope(model: HookedModel) -> object:
    config: Any = model.checkpoint.config if model.checkpoint is not None else model.wrapped.source.config
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
