"""What tuning writes into the residual stream, block by block.

Along the tuned model's own stream x_l every block of base runs beside the tuned one: what base's block adds there is the
pre-training component, PTC_l = base_l(x_l) - x_l, and what the tuned block adds beyond it the fine-tuning component,
FTC_l = tuned_l(x_l) - base_l(x_l) (arXiv 2506.23423). Blocks are run whole and every model says itself how it calls them, so
norms behind sublayers, parallel blocks and rotary tables of its own need no care. Batches are padded on the right
and attention is causal, so padding reaches no token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.hooked import HookedModel
from interp.models.interventions import Part, StopForward
from interp.models.loading import free_bytes
from interp.models.pair import ModelPair
from interp.models.validate import probe_batch
from interp.models.weights import bare
from interp.models.wrap import Call, Wrapped

Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Step:
    """One block on the tuned model's stream; all [prompt pos d_model], in float32 or wider.

    Attributes:
        layer: of the block.
        entering: x_l.
        leaving: x_{l+1}.
        pre: PTC_l.
        tuning: FTC_l.
    """

    layer: int
    entering: Tensor
    leaving: Tensor
    pre: Tensor
    tuning: Tensor

    @classmethod
    def of(cls, layer: int, entering: Tensor, leaving: Tensor, beside: Tensor) -> Step:
        """From the stream on both sides of the tuned block, and what base's block makes of the same stream."""
        x, o, y = (wide(t) for t in (entering, leaving, beside))
        return cls(layer, x, o, y - x, o - y)


class Tally(Protocol):
    """Takes the blocks of some prompts, first to last."""

    def add(self, step: Step) -> None:
        """Take one block."""
        ...


T = TypeVar("T", bound=Tally)


def wide(x: Tensor) -> Tensor:
    """In float32 or wider: differences and sums of half-precision streams lose nothing more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def stream_of(out: Any) -> Tensor:
    """What a block hands on, of all that it returns."""
    return out[0] if isinstance(out, tuple) else out


def share(tuning: Tensor, pre: Tensor) -> Tensor:
    """|FTC| / (|PTC| + |FTC|) of norms; 0 where both vanish."""
    whole = tuning + pre
    return torch.where(whole == 0, 0.0, tuning / torch.where(whole == 0, 1.0, whole))


def scored_position(batch: Batch, position: str) -> tuple[Int[Tensor, " prompt"], Int[Tensor, " prompt"]]:
    """The token of each prompt from which the answer's first token is predicted, and that token's index, -1 without an answer.

    Args:
        batch: prompts; a position ``response`` says where an answer begins.
        position: ``last_prompt``, or a named position to score in its place.

    Raises:
        InputError: no such position, not one token, or an empty answer.
    """
    answer = torch.full((len(batch),), -1, device=batch.ids.device)
    if "response" in batch.positions:
        for row, where in enumerate(batch.at("response")):
            if not where or min(where) < 1:
                why = "is empty" if not where else "begins with its first token, so that no prompt is left"
                raise InputError(f"the response of prompt {row} {why}")
            answer[row] = min(where)
    if position != "last_prompt" or position in batch.positions:
        if position not in batch.positions:
            known = ", ".join(["last_prompt", *batch.positions])
            raise InputError(f"there is no position {position!r} in these prompts; they name {known}")
        return batch.index(position), answer
    return torch.where(answer > 0, answer, batch.lengths) - 1, answer


class _Handed(Tensor):
    """A stream for models that take it as it is returned, and for those that take the first of what is returned."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


class Blocks:
    """The blocks of a model, run one at a time on any stream.

    Attributes:
        modules: the blocks.
        forwards: what runs them, also while something stands in for them.
    """

    def __init__(self, trunk: Any, modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
        """Blocks, and the module that calls them."""
        self.modules = list(modules)
        self.forwards: list[Forward] = [m.forward for m in self.modules]
        self._trunk, self._dtype, self._device = trunk, dtype, device

    @classmethod
    def of(cls, model: HookedModel) -> Blocks:
        """Those of a loaded model, with the weights as they are now."""
        wrapped = model.wrapped
        wrapped.refresh()
        return cls(wrapped.runner.base_model, wrapped.bridge.blocks, model.dtype, wrapped.device)

    def calls(self, mask: Bool[Tensor, "prompt pos"], cache: Any = None) -> list[Call]:
        """What the model hands to each of its blocks beside the stream: masks, rotary tables and so on, made by its own code.

        Args:
            mask: True on real tokens.
            cache: keys and values to go on from; running a block fills it.
        """
        found: dict[int, Call] = {}

        def record(layer: int) -> Forward:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                found[layer] = Call(args, kwargs, cache)
                if layer == len(self.modules) - 1:
                    raise StopForward
                return hidden_states.as_subclass(_Handed)

            return forward

        inputs: dict[str, Any] = {"input_ids": torch.zeros(mask.shape, dtype=torch.long, device=self._device)}
        if not bool(mask.all()):
            inputs["attention_mask"] = mask.long().to(self._device)
        if cache is not None:
            inputs["past_key_values"] = cache
        records = [record(layer) for layer in range(len(self.modules))]
        with self.standing_in(records), torch.no_grad(), suppress(StopForward):
            self._trunk(**inputs, use_cache=cache is not None)
        return [found[layer] for layer in range(len(self.modules))]

    @contextmanager
    def standing_in(self, forwards: Sequence[Forward]) -> Iterator[None]:
        """Call functions in place of the blocks."""
        try:
            for module, forward in zip(self.modules, forwards, strict=True):
                module.__dict__["forward"] = forward  # an instance attribute shadows the method
            yield
        finally:
            for module in self.modules:
                module.__dict__.pop("forward", None)

    def run(self, layer: int, stream: Tensor, call: Call) -> Tensor:
        """What one block makes of a stream, wherever and however precise that is."""
        out = stream_of(self.forwards[layer](stream.to(self._device, self._dtype), *call.args, **call.kwargs))
        return out.to(stream.device)

    @contextmanager
    def holding(self, layer: int) -> Iterator[None]:
        """The block's weights are in memory inside."""
        yield


class StoredBlocks(Blocks):
    """The blocks of a checkpoint, of which one at a time has its weights in memory.

    Everything else of the model is a structure without numbers: its weights are views of a single zero.
    """

    def __init__(self, model: HookedModel, like: Wrapped) -> None:
        """Build the structure.

        Args:
            model: the model of the checkpoint, whose weights need not be loaded.
            like: a loaded model of the same architecture, which says where its blocks are.

        Raises:
            InputError: the model has no files of its own, or they do not hold the weights as its architecture names them.
        """
        if model.checkpoint is None or model.adapter is not None or model.active_edits:
            raise InputError(f"{model.name} cannot be streamed: only a checkpoint on disk without adapter or edits has blocks to read")
        self._checkpoint, self._name = model.checkpoint, model.name
        self._zero = torch.zeros((), dtype=model.dtype)
        structure: Any = _structure(model, type(like.source))
        self._path = _path_of_blocks(like)
        self._stored = {bare(name): name for name in self._checkpoint.names()}
        for module in structure.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = self._empty(p)
        super().__init__(structure.base_model, structure.get_submodule(self._path), model.dtype, torch.device("cpu"))

    @contextmanager
    def holding(self, layer: int) -> Iterator[None]:
        """Read the block's weights, and let go of them."""
        module = self.modules[layer]
        own = dict(module.named_parameters())
        try:
            for name in module.state_dict():
                self._read(layer, name, own)
            yield
        finally:
            for name, p in own.items():
                place, _, last = name.rpartition(".")
                module.get_submodule(place)._parameters[last] = self._empty(p)

    def _read(self, layer: int, name: str, own: dict[str, nn.Parameter]) -> None:
        key = f"{self._path}.{layer}.{name}"
        stored = self._stored.get(bare(key))
        if stored is None and name not in own:
            return  # a constant that the structure has made itself
        value = None if stored is None else self._checkpoint.get(stored)
        if value is None or (name in own and value.shape != own[name].shape):
            came = "is not there" if value is None else f"is {list(value.shape)}"
            raise InputError(f"{self._name} cannot be streamed: {key} {came} in its files; use stream=False")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{self._name}: {key} has entries that are NaN or infinite")
        place, _, last = name.rpartition(".")
        module = self.modules[layer].get_submodule(place)
        if name in own:
            module._parameters[last] = nn.Parameter(value.to(self._zero.dtype), requires_grad=False)
        else:
            module._buffers[last] = value

    def _empty(self, p: Tensor) -> nn.Parameter:
        return nn.Parameter(self._zero.expand(p.shape), requires_grad=False)


def _structure(model: HookedModel, kind: type) -> nn.Module:
    """The Hugging Face model of a config, with real constants and weights that take no memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    assert model.checkpoint is not None
    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(model.checkpoint.config, attn_implementation="eager")
    if type(made) is not kind:
        raise InputError(f"{model.name} cannot be streamed: its config makes a {type(made).__name__}, not a {kind.__name__}")
    return made.eval()


def _path_of_blocks(wrapped: Wrapped) -> str:
    """Name of the list of blocks, such as ``model.layers``."""
    first = wrapped.bridge.blocks[0].original_component
    source = next((src for src, dst in wrapped._links if dst is first), None)
    name = next((name for name, module in wrapped.source.named_modules() if module is source), "")
    if not name.endswith(".0"):
        raise InputError(f"the blocks of {wrapped.shape.architecture} are no list that can be read one by one; use stream=False")
    return name.removesuffix(".0")


def contributions(pair: ModelPair, batch: Batch, begin: Callable[[Part], T], *, stream: bool = False) -> Iterator[tuple[Part, T]]:
    """Run every block of base beside the tuned one, on the tuned model's stream.

    Args:
        pair: the models.
        batch: prompts.
        begin: makes what takes the blocks of some prompts.
        stream: keep the tuned model's stream and read base's blocks from disk one at a time.

    Yields:
        The prompts of each pass and what took their blocks.

    Raises:
        InputError: both models are needed but loaded one at a time, base cannot be streamed, activations are being changed, or
            the blocks of this architecture cannot be run on their own.
    """
    check(pair, batch, together=not stream)
    per_token = 3 * pair.tuned._bytes_per_token()  # of a block of each model, and of what is summed in float32
    if not stream:
        yield from pair.tuned.each(batch, per_token, lambda part: _beside(pair, part, begin(part)))
        return
    blocks = StoredBlocks(pair.base, pair.tuned.wrapped)
    for rows in _groups(pair.tuned, batch):
        places = torch.tensor(rows)
        kept = []
        for part, x in pair.tuned.each(batch.select(rows), per_token, lambda part: _stream(pair.tuned, part)):
            part = replace(part, rows=places[part.rows])
            kept.append((part, x, blocks.calls(part.batch.mask), begin(part)))
        for layer in range(pair.shape.n_layers):
            with blocks.holding(layer), torch.no_grad():
                for _, x, calls, tally in kept:
                    tally.add(Step.of(layer, x[layer], x[layer + 1], blocks.run(layer, x[layer], calls[layer])))
        yield from ((part, tally) for part, _, _, tally in kept)


def check(pair: ModelPair, batch: Batch, *, together: bool = True) -> None:
    """Refuse a pair whose blocks cannot be run beside each other.

    Raises:
        InputError: as ``contributions``.
    """
    if together and pair.one_at_a_time:
        raise InputError("both models are needed at once, but the pair is loaded one at a time; stream=True reads base block by block")
    for side, model in (("base", pair.base), ("tuned", pair.tuned)):
        if any(actions for _, actions in model._active):
            raise InputError(f"activations of {side} are being changed; leave model.patched(...) or the edit of activations first")
    if int(batch.lengths.max()) > min(pair.base.shape.n_ctx, pair.tuned.shape.n_ctx):
        n = min(pair.base.shape.n_ctx, pair.tuned.shape.n_ctx)
        raise InputError(f"prompt {int(batch.lengths.argmax())} has {int(batch.lengths.max())} tokens; the models take at most {n}")
    _assert_separable(pair.tuned)


def _beside(pair: ModelPair, part: Part, tally: T) -> T:
    """One pass of the tuned model in which every block is followed by base's."""
    base, tuned = Blocks.of(pair.base), Blocks.of(pair.tuned)
    calls = base.calls(part.batch.mask)

    def forward(layer: int) -> Forward:
        def both(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = tuned.forwards[layer](hidden_states, *args, **kwargs)
            tally.add(Step.of(layer, hidden_states, stream_of(out), base.run(layer, hidden_states, calls[layer])))
            return out

        return both

    with tuned.standing_in([forward(layer) for layer in range(len(calls))]), torch.no_grad():
        pair.tuned.forward(part, trunk=True)
    return tally


def _stream(model: HookedModel, part: Part) -> list[Tensor]:
    """The stream entering every block, and last leaving the last one."""
    blocks, found = Blocks.of(model), []

    def forward(layer: int) -> Forward:
        def kept(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = blocks.forwards[layer](hidden_states, *args, **kwargs)
            found.extend([hidden_states] if layer < len(blocks.modules) - 1 else [hidden_states, stream_of(out)])
            return out

        return kept

    with blocks.standing_in([forward(layer) for layer in range(len(blocks.modules))]), torch.no_grad():
        model.forward(part, trunk=True)
    return found


def _groups(model: HookedModel, batch: Batch) -> Iterator[list[int]]:
    """Prompts whose streams are kept at once: they and what is made of them take at most a quarter of the free memory."""
    s = model.shape
    each = (s.n_layers + 6) * s.d_model * batch.ids.shape[1] * max(model.dtype.itemsize, 4)
    n = max(1, int(free_bytes(model.wrapped.device) / 4 / each))
    order = torch.argsort(batch.lengths, descending=True, stable=True).tolist()
    yield from (order[at : at + n] for at in range(0, len(order), n))


_SEPARABLE: WeakKeyDictionary[Wrapped, bool] = WeakKeyDictionary()


def _assert_separable(model: HookedModel) -> None:
    """Refuse a model whose blocks, run one by one on the stream alone, do not make what the model makes; tried once.

    Blocks of some architectures hand on more than the stream (keys and values of an earlier layer, a second stream).
    """
    wrapped = model.wrapped
    if wrapped not in _SEPARABLE:
        part = Part.of(probe_batch(model).to(wrapped.device))
        want = _stream(model, part)
        blocks = Blocks.of(model)
        x: Float[Tensor, "prompt pos d_model"] = want[0]
        with torch.no_grad():
            for layer, call in enumerate(blocks.calls(part.batch.mask)):
                x = blocks.run(layer, x, call)
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
        real = part.batch.mask
        _SEPARABLE[wrapped] = bool((x - want[-1])[real].abs().max() <= 64 * eps * want[-1][real].abs().max())
    if not _SEPARABLE[wrapped]:
        raise InputError(f"blocks of {model.shape.architecture} hand on more than the stream, so they cannot be run beside another model's")
