"""Which part of a block makes what tuning adds there: its heads, the rest of attention, its MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.contribution import Blocks, check, stream_of, wide
from interp.models.interventions import Part, Points
from interp.models.pair import ModelPair
from interp.models.wrap import Call, Wrapped
from interp.sites import Site


@dataclass(frozen=True, eq=False)
class BlockParts:
    """What a block adds at one position of each prompt, in float32 or wider; all but ``pre`` are tuned minus base.

    ``attention + mlp + mlp_through`` is ``tuning``, and the heads and the attention bias are ``attention``.

    Attributes:
        pre: PTC_l, what base's block adds.
        tuning: FTC_l, the whole block.
        attention: what attention adds.
        heads: what single heads add, z @ W_O; None where heads have no result of their own.
        mlp: the two MLPs on what the tuned one reads.
        mlp_through: base's MLP on what the two attentions make of the stream; 0 in parallel blocks.
    """

    pre: Float[Tensor, "prompt d_model"]
    tuning: Float[Tensor, "prompt d_model"]
    attention: Float[Tensor, "prompt d_model"]
    heads: Float[Tensor, "prompt head d_model"] | None
    mlp: Float[Tensor, "prompt d_model"]
    mlp_through: Float[Tensor, "prompt d_model"]


def obstacle_to_heads(pair: ModelPair) -> str:
    """Why heads have no result of their own in one of the models, or ""."""
    for model in (pair.base, pair.tuned):
        try:
            model.wrapped.check(Site("result", 0))
        except InputError as error:
            return str(error)
    return ""


def block_parts(pair: ModelPair, batch: Batch, at: Int[Tensor, " prompt"]) -> Iterator[tuple[Part, list[BlockParts]]]:
    """The parts of every block on the tuned model's stream.

    Base's block runs twice: as it is, and with attention adding what the tuned one adds, to tell apart what changed in the MLP
    and what its input did.

    Args:
        pair: the models.
        batch: prompts.
        at: one position per prompt.

    Yields:
        The prompts of each pass, and their parts by layer.

    Raises:
        InputError: as ``contributions``; or a block is not the stream, attention and MLP added together.
    """
    check(pair, batch)
    s = pair.shape
    # Parts of all layers are held until the pass ends.
    held = s.n_layers * (s.n_heads + 5) * s.d_model * 4
    per_token = 4 * pair.tuned._bytes_per_token() + held // int(batch.lengths.min())
    heads = not obstacle_to_heads(pair)
    yield from pair.tuned.each(batch, per_token, lambda part: _pass(pair, part, at[part.rows.to(at.device)], heads))


def _pass(pair: ModelPair, part: Part, at: Tensor, heads: bool) -> list[BlockParts]:
    base, tuned = Blocks.of(pair.base), Blocks.of(pair.tuned)
    calls = base.calls(part.batch.mask)
    found: list[BlockParts] = []

    def forward(layer: int) -> Callable[..., Any]:
        def both(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            own, old = _Seen(pair.tuned.wrapped, layer, at), _Seen(pair.base.wrapped, layer, at)
            out = own.watch(hidden_states, lambda x: tuned.forwards[layer](x, *args, **kwargs))
            beside = old.watch(hidden_states, lambda x: base.run(layer, x, calls[layer]))
            between = _mlp_after(pair.base.wrapped, base, layer, calls[layer], hidden_states, own.attention, at)
            found.append(_compared(own, old, between, heads, stream_of(out), beside))
            return out

        return both

    with tuned.standing_in([forward(layer) for layer in range(len(calls))]), torch.no_grad():
        pair.tuned.forward(part, trunk=True)
    return found


class _Seen:
    """What one block read and added in one run."""

    def __init__(self, wrapped: Wrapped, layer: int, at: Tensor) -> None:
        """Nothing is seen yet."""
        self.wrapped, self.layer, self.at = wrapped, layer, at
        self._kept: dict[str, Tensor] = {}

    def watch(self, stream: Tensor, run: Callable[[Tensor], Any]) -> Any:
        """Run the block and keep what goes by; its parts must add up.

        Raises:
            InputError: they do not.
        """
        self.stream = stream
        points = Points(self.wrapped)
        with ExitStack() as stack:
            stack.callback(points.remove)
            for component in ("attn_out", "mlp_out"):
                points.on(component, self.layer, lambda x, name=component: self._kept.__setitem__(name, x.detach()))
            if not self.wrapped._no_results:
                module = self.wrapped.output_projection(self.layer)
                stack.callback(module.register_forward_pre_hook(lambda _, args: self._kept.__setitem__("z", args[0])).remove)
            out = run(stream)
        if not {"attn_out", "mlp_out"} <= self._kept.keys():
            raise InputError(f"L{self.layer} of {self.wrapped.shape.architecture} has no attention and MLP that can be told apart")
        whole = self.pick(stream_of(out))
        rest = whole - self.pick(stream) - self.pick(self.attention) - self.pick(self.mlp)
        if not float(rest.norm()) <= max(1e-4, 16 * torch.finfo(stream.dtype).eps) * float(whole.norm()):
            raise InputError(
                f"L{self.layer} of {self.wrapped.shape.architecture} is not the stream, attention and MLP added together, so its "
                "parts cannot be told apart; the contribution of whole blocks can"
            )
        return out

    @property
    def attention(self) -> Tensor:
        """What attention added, everywhere."""
        return self._kept["attn_out"]

    @property
    def mlp(self) -> Tensor:
        """What the MLP added, everywhere."""
        return self._kept["mlp_out"]

    def pick(self, x: Tensor) -> Tensor:
        """An activation at the positions that are asked for."""
        return _pick(x, self.at)

    def heads(self) -> Float[Tensor, "prompt head d_model"]:
        """What single heads added there."""
        weights = wide(self.wrapped.output_weights(self.layer))
        return torch.einsum("phc,hcd->phd", self.pick(self._kept["z"]).unflatten(-1, weights.shape[:2]), weights)


def _pick(x: Tensor, at: Tensor) -> Tensor:
    rows = torch.arange(len(at), device=x.device)
    return wide(x[rows, at.to(x.device)])


def _mlp_after(wrapped: Wrapped, base: Blocks, layer: int, call: Call, stream: Tensor, attention: Tensor, at: Tensor) -> Tensor:
    """What base's MLP adds when attention adds what it does in the tuned model."""
    points, seen = Points(wrapped), []
    try:
        points.on("attn_out", layer, lambda x: attention.to(x))
        points.on("mlp_out", layer, seen.append)
        base.run(layer, stream, call)
    finally:
        points.remove()
    return _pick(seen[-1], at)


def _compared(own: _Seen, old: _Seen, between: Tensor, heads: bool, out: Tensor, beside: Tensor) -> BlockParts:
    def apart(mine: Tensor, other: Tensor) -> Tensor:
        return mine - other.to(mine.device)

    device = out.device
    return BlockParts(
        pre=old.pick(beside).to(device) - own.pick(own.stream),
        tuning=apart(own.pick(out), old.pick(beside)),
        attention=apart(own.pick(own.attention), old.pick(old.attention)),
        heads=apart(own.heads(), old.heads()) if heads else None,
        mlp=apart(own.pick(own.mlp), between),
        mlp_through=apart(between.to(device), old.pick(old.mlp)),
    )
