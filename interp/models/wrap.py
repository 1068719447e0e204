"""A Hugging Face model seen through TransformerLens: hook points by site, the user's object untouched.

The model is wrapped as a structure copy that shares its tensors: modules are copied, parameters and
buffers are the same objects, so the user's model keeps its keys, hooks and ``save_pretrained``, and updates
of its weights are seen. TransformerLens then rewrites the copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError
from interp.models.checkpoint import Shape, read_shape
from interp.sites import ACTIVATIONS, Site

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)

_NAMES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
    "mlp_post": "mlp.hook_post",
    "result": "hook_attn_out",  # made of z; a change goes into what attention adds
    "mlp_in": "mlp.hook_in",  # the last two are no sites: what an MLP takes from its norm, and attention before the softmax
    "scores": "attn.hook_attn_scores",
}


def structure_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer, without the hooks of the original.

    A hook the user registered belongs to the user's object: it stays there and does not run in the copy.
    """
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        for name in _HOOKS:
            if (hooks := getattr(module, name, None)) is not None:
                memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(model, memo)


@dataclass(frozen=True, eq=False)
class Call:
    """What a model hands to one of its blocks beside the stream.

    Attributes:
        args: positional arguments after the stream.
        kwargs: the named ones.
        past: the cache among them, for which another may stand in.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    past: object


class Wrapped:
    """The TransformerLens view of one Hugging Face model.

    Attributes:
        source: the model as it was given; never changed.
        runner: the structure copy that TransformerLens rewrote; calling it runs the hooks.
        shape: sizes read from the config.
    """

    def __init__(self, source: nn.Module) -> None:
        """Copy the structure and wrap it."""
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        if any("_original_component" in name for name, _ in source.named_modules()):
            raise InputError("this model is already wrapped by TransformerLens; give the plain Hugging Face model")
        self.source: Any = source
        self.shape: Shape = read_shape(self.source.config)
        self.runner: Any = structure_copy(source).eval()
        self.runner.set_attn_implementation("eager")
        self._modules = [(a, dict(a._modules)) for a in source.modules()]
        self._links = list(zip(source.modules(), self.runner.modules(), strict=True))
        self._overrides: dict[tuple[int, str], nn.Parameter] = {}
        try:
            self.bridge: Any = build_bridge_from_module(self.runner, type(source).__name__, hf_config=self.runner.config)
        except (ValueError, KeyError, AttributeError) as e:
            raise InputError(f"TransformerLens cannot wrap {type(source).__name__}: {e}") from e
        self._fused = [b.attn for b in self.bridge.blocks if hasattr(getattr(b, "attn", None), "split_qkv_matrix")]
        self._points: dict[tuple[str, int | None], Any] = {}
        self._no_results: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the embedding lives."""
        return self.source.get_input_embeddings().weight.device

    @property
    def stale(self) -> bool:
        """True when modules of the source were replaced since wrapping (an adapter was put in, say)."""
        return any(dict(module._modules) != children for module, children in self._modules)

    def refresh(self) -> None:
        """Take over tensors that the source replaced, then split fused QKV weights anew.

        TransformerLens keeps copies of the split weights of some architectures; unrefreshed they would
        silently lag behind an optimiser step or an edit.
        """
        for src, dst in self._links:
            for name, p in src._parameters.items():
                override = self._overrides.get((id(dst), name))
                wanted = p if override is None else override
                if dst._parameters.get(name) is not wanted:
                    dst._parameters[name] = wanted
            for name, b in src._buffers.items():
                if dst._buffers.get(name) is not b:
                    dst._buffers[name] = b
        for attn in self._fused:
            fused = _storages(attn.original_component)
            if all(_storages(own.original_component) <= fused for own in (attn.q, attn.k, attn.v)):
                continue  # slices of the very tensors: nothing to take over
            # On the meta device the fresh nn.Linear of the split cost nothing; their weights are then the real slices.
            with torch.no_grad(), torch.device("meta"):
                parts = attn.split_qkv_matrix(attn.original_component)
            for own, new in zip((attn.q, attn.k, attn.v), parts, strict=True):
                linear = own.original_component
                linear.weight = nn.Parameter(new.weight.detach(), requires_grad=False)
                if new.bias is not None:
                    linear.bias = nn.Parameter(new.bias.detach(), requires_grad=False)

    def parameter(self, key: str) -> nn.Parameter:
        """A parameter by its Hugging Face name, as the runner sees it."""
        module, name = self._owner(key)
        p = module._parameters[name]
        if p is None:
            raise InputError(f"the model has no parameter {key}")
        return p

    def _owner(self, key: str) -> tuple[nn.Module, str]:
        path, _, name = key.rpartition(".")
        source = self.source.get_submodule(path)
        return next(dst for src, dst in self._links if src is source), name

    def override(self, key: str, value: Tensor | None) -> None:
        """Let the runner use another tensor for a parameter (everywhere it is tied), or the source's again.

        An unembedding bias that the source lacks can be put in as well.
        """
        wanted = self.given(key)
        replacement = None if value is None else nn.Parameter(value, requires_grad=False)
        owner, last = self._owner(key)
        for src, dst in self._links:
            for name, p in src._parameters.items():
                if (p is wanted and p is not None) or (dst is owner and name == last):
                    if replacement is None:
                        self._overrides.pop((id(dst), name), None)
                    else:
                        self._overrides[id(dst), name] = replacement

    def given(self, key: str) -> nn.Parameter | None:
        """A parameter by its Hugging Face name, as the source has it; None for one it could have and has not."""
        path, _, name = key.rpartition(".")
        return self.source.get_submodule(path)._parameters[name]

    @property
    def unembedding_bias(self) -> str:
        """Hugging Face name that the bias of the unembedding has or would have."""
        head = self.source.get_output_embeddings()
        return next(name for name, module in self.source.named_modules() if module is head) + ".bias"

    @property
    def unembedding(self) -> Any:
        """The module that makes logits, with the tensors that the runner uses now."""
        head = self.source.get_output_embeddings()
        return next(dst for src, dst in self._links if src is head)

    @contextmanager
    def skipping(self, layers: int) -> Iterator[None]:
        """Let the first blocks pass the stream through uncomputed."""
        with self._standing_in([_pass_through] * layers):
            yield

    @contextmanager
    def _standing_in(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Call functions in place of the first blocks."""
        blocks = list(self.bridge.blocks)[: len(forwards)]
        try:
            for block, forward in zip(blocks, forwards, strict=True):
                # An instance attribute shadows the method; hooks of the module do not run then either.
                block.__dict__["forward"] = forward
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def calls(self, start: int, stop: int) -> list[Call]:
        """How the model calls each of its blocks for positions ``start`` up to ``stop`` of a prompt, when the earlier ones are cached.

        Masks, rotary tables and whatever else an architecture hands to its blocks are made by its own code for one prompt
        and fit any number of them.
        """
        from transformers import DynamicCache

        found: dict[int, Call] = {}
        n = self.shape.n_layers
        past = DynamicCache()
        if start:
            for layer in range(n):
                past.update(torch.zeros(1, 1, start, 1, device=self.device), torch.zeros(1, 1, start, 1, device=self.device), layer)

        def record(layer: int) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                found[layer] = Call(args, kwargs, past)
                return hidden_states

            return forward

        positions = torch.arange(start, stop, device=self.device)[None]
        with self._standing_in([record(layer) for layer in range(n)]), torch.no_grad():
            self.runner.base_model(
                input_ids=torch.zeros_like(positions), position_ids=positions, past_key_values=past, use_cache=True, return_dict=True
            )
        return [found[layer] for layer in range(n)]

    def block(self, layer: int, stream: Tensor, call: Call, past: object) -> Tensor:
        """The stream that one block makes of the stream entering it; ``past`` stands in for the cache."""
        args = [past if a is call.past else a for a in call.args]
        kwargs = {name: past if a is call.past else a for name, a in call.kwargs.items()}
        out = self.bridge.blocks[layer](stream, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def finish(self, stream: Float[Tensor, "row d_model"], *, trunk: bool = False) -> Tensor:
        """The logits of a stream that has left the last block, [row vocab]; or what enters the unembedding, [row d_model]."""
        n, ids = self.shape.n_layers, torch.zeros(len(stream), 1, dtype=torch.long, device=self.device)
        with self._standing_in([_pass_through] * (n - 1) + [lambda hidden_states, *args, **kwargs: stream[:, None]]):
            if trunk:
                return self.runner.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, 0]
            return self.runner(input_ids=ids, use_cache=False).logits[:, 0]

    def hook_point(self, component: str, layer: int | None) -> Any:
        """The TransformerLens hook point of an activation.

        Raises:
            InputError: this architecture has no such activation, or none that TransformerLens can name.
        """
        key = (component, layer)
        if component != "embed" and component not in _NAMES:
            raise InputError(f"{component} is not an activation; activations are {', '.join(ACTIVATIONS)}")
        if key not in self._points:
            name = "hook_embed" if component == "embed" else f"blocks.{layer}.{_NAMES[component]}"
            point = self.bridge.hook_dict.get(name)
            if point is None:
                why = "its blocks are parallel" if component == "resid_mid" and self.shape.parallel else "TransformerLens gives none"
                raise InputError(f"{self.shape.architecture} has no {component} ({why})")
            self._points[key] = point
        return self._points[key]

    def output_projection(self, layer: int | None) -> Any:
        """The module that takes z, all heads side by side, and gives what they add together."""
        return self.bridge.blocks[layer].attn.o.original_component

    def output_weights(self, layer: int | None) -> Float[Tensor, "head d_head d_model"]:
        """W_O in force."""
        return self.bridge.blocks[layer].attn.W_O.detach()

    def _why_no_results(self) -> str:
        """Why what attention adds is not what its heads add, and the bias; "" where it is. Tried once, on a short prompt."""
        added: dict[int, Tensor] = {}
        taken: dict[int, Tensor] = {}
        points, readers = [], []
        self.refresh()
        try:
            for layer in range(self.shape.n_layers):
                point, module = self.hook_point("attn_out", layer), self.output_projection(layer)
                points.append((point, point.add_hook(lambda x, hook, layer=layer: added.update({layer: x}))))
                readers.append(module.register_forward_pre_hook(lambda _, args, layer=layer: taken.update({layer: args[0]})))
            n = min(5, self.shape.n_ctx)
            ids = torch.tensor([[(7 * i + 3) % self.shape.d_vocab for i in range(n)]], device=self.device)
            with torch.no_grad():
                self.runner.base_model(input_ids=ids, use_cache=False)
                for layer in range(self.shape.n_layers):
                    z = taken[layer]
                    bias = self.output_projection(layer)(torch.zeros_like(z)).float()
                    weights = self.output_weights(layer).float()
                    heads = torch.einsum("pthc,hcd->ptd", z.float().unflatten(-1, weights.shape[:2]), weights)
                    allowed = max(1e-4, 16 * torch.finfo(z.dtype).eps) * float(added[layer].float().norm())
                    if not float((heads + bias - added[layer].float()).norm()) <= allowed:
                        return "what attention adds is not the sum of z @ W_O and b_O, but normed, gated or scaled behind W_O"
        except (AttributeError, LookupError, TypeError, RuntimeError, InputError) as error:
            return f"TransformerLens gives no W_O that z goes through ({type(error).__name__})"
        finally:
            for reader in [*readers, *(handle.hook for _, handle in points)]:
                reader.remove()
            for point, handle in points:
                point.fwd_hooks = [h for h in point.fwd_hooks if h is not handle]
        return ""

    def check(self, site: Site) -> Site:
        """The site, if this model has it.

        Raises:
            InputError: layer or head out of range (the range is named), or single heads have no result.
        """
        if site.component == "result":
            if self._no_results is None:
                self._no_results = self._why_no_results()
            if self._no_results:
                raise InputError(f"{site}: heads of {self.shape.architecture} have no result of their own: {self._no_results}")
        s = self.shape
        if site.layer is not None and not site.layer < s.n_layers:
            raise InputError(f"{site}: layer {site.layer} is out of range; the model has layers 0 to {s.n_layers - 1}")
        heads = s.n_kv_heads if site.component in ("k", "v") else s.n_heads
        if site.head is not None and not site.head < heads:
            kind = "key/value heads" if site.component in ("k", "v") else "heads"
            raise InputError(f"{site}: head {site.head} is out of range; the model has {kind} 0 to {heads - 1}")
        return site


def _storages(module: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def _pass_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
