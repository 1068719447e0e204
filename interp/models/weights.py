"""The one table that knows how architectures name and lay out their tensors.

Everything else speaks of sites (``L3.W_Q``) whose weights are matrices on row vectors, ``x @ W``:

========  =====================================  ================================================
site      shape                                  stored by Hugging Face as
========  =====================================  ================================================
W_Q       [d_model, n_heads * d_head]            ``nn.Linear`` [out, in]; GPT-2: a third of
W_K W_V   [d_model, n_kv_heads * d_head]         ``c_attn`` [in, out]; GPT-NeoX and BLOOM: every
                                                 head's q, k, v rows next to each other
W_O       [n_heads * d_head, d_model]
W_in      [d_model, d_mlp]                       the "up" projection of gated MLPs
W_gate    [d_model, d_mlp]
W_out     [d_mlp, d_model]
W_E       [d_vocab, d_model]                     as stored
W_U       [d_model, d_vocab]                     ``lm_head`` transposed, or W_E transposed when tied
========  =====================================  ================================================

Vectors (biases ``b_*``, norm gains ``ln1``, ``ln2``, ``ln_final``) are as stored; Gemma stores a gain minus one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from interp.errors import InputError
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.checkpoint import Shape

MODULES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
"""The matrices of a block, in the order in which heatmaps show them."""

_QKV = ("W_Q", "W_K", "W_V")
_PREFIX = re.compile(r"^(?:(?:base_model|model|transformer|gpt_neox|decoder|_orig_mod|module)\.)+")

# How a module's tensors are laid out.
_LINEAR = "linear"  # weight [out, in]
_CONV1D = "conv1d"  # weight [in, out], GPT-2
_INTERLEAVED = "interleaved"  # weight [heads * (q, k, v) * d_head, in], GPT-NeoX and BLOOM
_ROWS = "rows"  # an embedding, [entries, d_model]
_NORM = "norm"


@dataclass(frozen=True)
class _Family:
    """Names of one architecture: module name -> (components along its output axis, layout)."""

    blocks: str
    layer: Mapping[str, tuple[tuple[str, ...], str]]
    top: Mapping[str, tuple[tuple[str, ...], str]]
    parallel: bool | str = False  # or the config's field that says so
    centred: bool = True  # norms subtract the mean (LayerNorm)
    gain_offset: float = 0.0  # what is added to stored gains
    where: dict[str, tuple[str, int]] = field(default_factory=dict)  # component -> (module, index)

    def __post_init__(self) -> None:
        """Index the components."""
        for table in (self.layer, self.top):
            for module, (components, _) in table.items():
                self.where.update({component: (module, i) for i, component in enumerate(components)})

    @property
    def gated(self) -> bool:
        """The MLP multiplies two projections of its input."""
        return "W_gate" in self.where


def _linear(**modules: str) -> dict[str, tuple[tuple[str, ...], str]]:
    return {name: ((component,), _LINEAR) for component, name in modules.items()}


def _norms(**modules: str) -> dict[str, tuple[tuple[str, ...], str]]:
    return {name: ((component,), _NORM) for component, name in modules.items()}


_SEPARATE = _linear(W_Q="self_attn.q_proj", W_K="self_attn.k_proj", W_V="self_attn.v_proj", W_O="self_attn.o_proj")
_GATED = _linear(W_in="mlp.up_proj", W_gate="mlp.gate_proj", W_out="mlp.down_proj")
_PRE_NORMS = _norms(ln1="input_layernorm", ln2="post_attention_layernorm")
_LLAMA_TOP = {"embed_tokens": (("W_E",), _ROWS), **_norms(ln_final="norm"), **_linear(W_U="lm_head")}
_GPT_TOP = {"wte": (("W_E",), _ROWS), "wpe": (("W_pos",), _ROWS), **_norms(ln_final="ln_f"), **_linear(W_U="lm_head")}
_GPT_NORMS = _norms(ln1="ln_1", ln2="ln_2")

_LLAMA = _Family("layers", {**_SEPARATE, **_GATED, **_PRE_NORMS}, _LLAMA_TOP, centred=False)
_GEMMA = replace(_LLAMA, gain_offset=1.0)
_LIKE_LLAMA = ("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "Granite", "SmolLM3")
_GEMMA2 = _Family(
    "layers",
    {**_SEPARATE, **_GATED, **_norms(ln1="input_layernorm", ln2="pre_feedforward_layernorm")},
    _LLAMA_TOP,
    centred=False,
    gain_offset=1.0,
)
_OLMO = replace(_LLAMA, centred=True)  # a LayerNorm without gain and bias
_OLMO2 = _Family("layers", {**_SEPARATE, **_GATED}, _LLAMA_TOP, centred=False)  # norms after the sublayers: no ln1, no ln2

FAMILIES: dict[str, _Family] = {
    "GPT2LMHeadModel": _Family(
        "h",
        {
            "attn.c_attn": (_QKV, _CONV1D),
            "attn.c_proj": (("W_O",), _CONV1D),
            "mlp.c_fc": (("W_in",), _CONV1D),
            "mlp.c_proj": (("W_out",), _CONV1D),
            **_GPT_NORMS,
        },
        _GPT_TOP,
    ),
    "GPTNeoXForCausalLM": _Family(
        "layers",
        {
            "attention.query_key_value": (_QKV, _INTERLEAVED),
            **_linear(W_O="attention.dense", W_in="mlp.dense_h_to_4h", W_out="mlp.dense_4h_to_h"),
            **_PRE_NORMS,
        },
        {"embed_in": (("W_E",), _ROWS), **_norms(ln_final="final_layer_norm"), **_linear(W_U="lm_head")},
        parallel="use_parallel_residual",
    ),
    "BloomForCausalLM": _Family(
        "h",
        {
            "self_attention.query_key_value": (_QKV, _INTERLEAVED),
            **_linear(W_O="self_attention.dense", W_in="mlp.dense_h_to_4h", W_out="mlp.dense_4h_to_h"),
            **_PRE_NORMS,
        },
        {"word_embeddings": (("W_E",), _ROWS), **_norms(ln_final="ln_f"), **_linear(W_U="lm_head")},
    ),
    "GPTJForCausalLM": _Family(
        "h",
        {
            **_linear(W_Q="attn.q_proj", W_K="attn.k_proj", W_V="attn.v_proj", W_O="attn.out_proj"),
            **_linear(W_in="mlp.fc_in", W_out="mlp.fc_out"),
            **_norms(ln1="ln_1"),
        },
        _GPT_TOP,
        parallel=True,
    ),
    "GPTNeoForCausalLM": _Family(
        "h",
        {
            **_linear(W_Q="attn.attention.q_proj", W_K="attn.attention.k_proj", W_V="attn.attention.v_proj"),
            **_linear(W_O="attn.attention.out_proj", W_in="mlp.c_fc", W_out="mlp.c_proj"),
            **_GPT_NORMS,
        },
        _GPT_TOP,
    ),
    "OPTForCausalLM": _Family(
        "layers",
        {
            **_linear(W_Q="self_attn.q_proj", W_K="self_attn.k_proj", W_V="self_attn.v_proj", W_O="self_attn.out_proj"),
            **_linear(W_in="fc1", W_out="fc2"),
            **_norms(ln1="self_attn_layer_norm", ln2="final_layer_norm"),
        },
        {"embed_tokens": (("W_E",), _ROWS), **_norms(ln_final="final_layer_norm"), **_linear(W_U="lm_head")},
    ),
    "PhiForCausalLM": _Family(
        "layers",
        {
            **_linear(W_Q="self_attn.q_proj", W_K="self_attn.k_proj", W_V="self_attn.v_proj", W_O="self_attn.dense"),
            **_linear(W_in="mlp.fc1", W_out="mlp.fc2"),
            **_norms(ln1="input_layernorm"),
        },
        {"embed_tokens": (("W_E",), _ROWS), **_norms(ln_final="final_layernorm"), **_linear(W_U="lm_head")},
        parallel=True,
    ),
    "Phi3ForCausalLM": _Family(
        "layers",
        {
            "self_attn.qkv_proj": (_QKV, _LINEAR),
            "mlp.gate_up_proj": (("W_gate", "W_in"), _LINEAR),
            **_linear(W_O="self_attn.o_proj", W_out="mlp.down_proj"),
            **_PRE_NORMS,
        },
        _LLAMA_TOP,
        centred=False,
    ),
    "Starcoder2ForCausalLM": _Family("layers", {**_SEPARATE, **_linear(W_in="mlp.c_fc", W_out="mlp.c_proj"), **_PRE_NORMS}, _LLAMA_TOP),
    "StableLmForCausalLM": _Family("layers", _LLAMA.layer, _LLAMA_TOP, parallel="use_parallel_residual"),
    **dict.fromkeys((f"{name}ForCausalLM" for name in _LIKE_LLAMA), _LLAMA),
    "GemmaForCausalLM": _GEMMA,
    "OlmoForCausalLM": _OLMO,
    **dict.fromkeys(("Gemma2ForCausalLM", "Gemma3ForCausalLM"), _GEMMA2),
    **dict.fromkeys(("Olmo2ForCausalLM", "Olmo3ForCausalLM"), _OLMO2),
}
"""Architectures whose tensors have sites; of others only raw tensor names are known."""


@cache
def bare(name: str) -> str:
    """A tensor's name without the wrappers that come and go (``model.``, ``transformer.``, ``gpt_neox.``, ...).

    GPT-NeoX's unembedding is ``embed_out`` in files and ``lm_head`` in memory; here it is ``lm_head``.
    """
    name = _PREFIX.sub("", name)
    return "lm_head" + name.removeprefix("embed_out") if name.startswith("embed_out.") else name


def centred(shape: Shape) -> bool:
    """Whether the norms subtract the mean (LayerNorm), so that nothing reads the stream's mean."""
    return FAMILIES[shape.architecture].centred if known(shape) else False


def gain_offset(shape: Shape) -> float:
    """What the norms add to their stored gains; 1 in Gemma."""
    return FAMILIES[shape.architecture].gain_offset if known(shape) else 0.0


def known(shape: Shape) -> bool:
    """Whether tensors of this architecture have sites."""
    return shape.architecture in FAMILIES


def modules(shape: Shape) -> tuple[str, ...]:
    """The matrices of a block in heatmap order; W_gate only where the MLP is gated."""
    return tuple(m for m in MODULES if m != "W_gate" or shape.gated)


def weight_shape(component: str, shape: Shape) -> tuple[int, ...]:
    """Shape of a weight site's canonical matrix or vector, without a head."""
    q, kv, d, mlp, vocab = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head, shape.d_model, shape.d_mlp, shape.d_vocab
    return {
        "W_Q": (d, q),
        "W_K": (d, kv),
        "W_V": (d, kv),
        "W_O": (q, d),
        "W_in": (d, mlp),
        "W_gate": (d, mlp),
        "W_out": (mlp, d),
        "W_E": (vocab, d),
        "W_U": (d, vocab),
        "W_pos": (shape.n_ctx, d),
        "b_Q": (q,),
        "b_K": (kv,),
        "b_V": (kv,),
        "b_in": (mlp,),
        "b_gate": (mlp,),
        "b_U": (vocab,),
    }.get(component, (d,))


@dataclass(frozen=True)
class _Place:
    """Where a component sits: its tensor's bare name, the components that share the tensor, the layout."""

    name: str
    index: int
    components: tuple[str, ...]
    layout: str


def _bias_of(component: str) -> str:
    return "b" + component[1:] if component.startswith("W_") else f"b_{component}"


def _place(component: str, layer: int | None, architecture: str) -> _Place | None:
    family = FAMILIES.get(architecture)
    if family is None:
        return None
    is_bias = component.startswith("b_")
    home = component
    if is_bias:
        home = component[2:] if component[2:].startswith("ln") else "W" + component[1:]
    if home not in family.where:
        return None
    module, index = family.where[home]
    components, layout = (family.top if layer is None else family.layer)[module]
    stem = module if layer is None else f"{family.blocks}.{layer}.{module}"
    shared = tuple(_bias_of(c) for c in components) if is_bias else components
    return _Place(f"{stem}.{'bias' if is_bias else 'weight'}", index, shared, layout)


@cache
def _parse(name: str, architecture: str) -> tuple[int | None, tuple[str, ...], str] | None:
    """Read a bare tensor name: (layer, components along the output axis, layout); None when it has no site."""
    family = FAMILIES.get(architecture)
    stem, _, last = name.rpartition(".")
    if family is None or last not in ("weight", "bias"):
        return None
    layer, table = None, family.top
    if match := re.fullmatch(rf"{family.blocks}\.(\d+)\.(.+)", stem):
        layer, stem, table = int(match[1]), match[2], family.layer
    if stem not in table:
        return None
    components, layout = table[stem]
    return layer, tuple(_bias_of(c) for c in components) if last == "bias" else components, layout


def module_sites(module: str, shape: Shape) -> tuple[Site, ...]:
    """Sites of a module's weight along its output axis: ``h.0.attn.c_attn`` -> L0.W_Q, L0.W_K, L0.W_V; empty when unknown."""
    found = _parse(bare(f"{module}.weight"), shape.architecture)
    return tuple(Site(c, found[0]) for c in found[1]) if found else ()


def sites_of(key: str, shape: Shape) -> tuple[Site, ...]:
    """Sites whose weights a tensor holds, without heads; empty for a tensor the table does not know."""
    found = _parse(bare(key), shape.architecture)
    if not found or (found[0] is not None and found[0] >= shape.n_layers):
        return ()
    return tuple(Site(c, found[0]) for c in found[1])


def key_of(component: str, shape: Shape, layer: int | None = None) -> str | None:
    """Bare name of the tensor that holds a component; None when the architecture has none."""
    place = _place(component, layer, shape.architecture)
    return place.name if place else None


def check_shape(key: str, size: tuple[int, ...], shape: Shape) -> None:
    """Refuse a tensor of another size than the config says; rows of the vocabulary and of positions may be padded.

    Raises:
        InputError: names the tensor and both sizes.
    """
    found = _parse(bare(key), shape.architecture)
    if found and (found[0] is None or found[0] < shape.n_layers):
        _check(key, tuple(size), found[1], found[2], shape)


def _check(key: str, size: tuple[int, ...], components: tuple[str, ...], layout: str, shape: Shape) -> None:
    if components[0] == "b_U":
        return
    if components[0] in ("W_E", "W_U", "W_pos"):
        expected = (*size[:1], shape.d_model)
    else:
        each = [weight_shape(c, shape) for c in components]
        expected = (*each[0][:-1], sum(s[-1] for s in each))
        expected = expected[::-1] if layout in (_LINEAR, _INTERLEAVED) else expected
    if size != expected:
        raise InputError(f"tensor {key} has shape {list(size)}, but the config makes it {list(expected)}")


def _columns(matrix: Tensor, index: int, components: tuple[str, ...], layout: str, shape: Shape) -> Tensor:
    """One component's columns of a module's ``x @ W`` matrix (or of its bias), as a view.

    The view is [..., columns], except for interleaved heads, where it is [..., head, d_head].
    """
    if layout == _INTERLEAVED:
        return matrix.unflatten(-1, (shape.n_heads, len(components), shape.d_head))[..., index, :]
    if len(components) == 1:
        return matrix
    sizes = [weight_shape(c, shape)[-1] for c in components]
    return matrix.narrow(-1, sum(sizes[:index]), sizes[index])


def split_columns(module: str, matrix: Tensor, shape: Shape) -> dict[Site, Tensor]:
    """Split a matrix whose columns are a module's outputs by site; [rows, outputs] -> [rows, outputs of the site] each.

    Serves LoRA: the right factor of a fused ``c_attn`` has one block of columns per site.

    Raises:
        InputError: the number of columns is not what the config says.
    """
    found = _parse(bare(f"{module}.weight"), shape.architecture)
    if not found:
        return {}
    layer, components, layout = found
    expected = sum(weight_shape(c, shape)[-1] for c in components)
    if matrix.shape[-1] != expected:
        raise InputError(f"module {module} has {matrix.shape[-1]} outputs, but the config makes it {expected}")
    return {Site(c, layer): _columns(matrix, i, components, layout, shape).flatten(1) for i, c in enumerate(components)}


def _oriented(tensor: Tensor, layout: str) -> Tensor:
    return tensor.T if tensor.ndim == 2 and layout in (_LINEAR, _INTERLEAVED) else tensor


def _head_view(view: Tensor, component: str, head: int, layout: str, shape: Shape) -> Tensor:
    """A query head's part; under GQA the key/value head it reads, which it shares with its group."""
    if not 0 <= head < shape.n_heads:
        raise InputError(f"head {head} does not exist; the model has heads 0 to {shape.n_heads - 1}")
    if component[2:] in ("K", "V"):
        head //= shape.n_heads // shape.n_kv_heads
    if layout == _INTERLEAVED:
        return view[..., head, :]
    axis = 0 if component == "W_O" else -1
    return view.narrow(axis, head * shape.d_head, shape.d_head)


def matrices(key: str, tensor: Tensor, shape: Shape) -> dict[Site, Tensor]:
    """For reading: every site in a tensor as its canonical ``x @ W`` matrix (or vector); a copy where heads interleave.

    A tied embedding is given once, as W_E. Empty for a tensor the table does not know.

    Raises:
        InputError: the tensor's size is not what the config says.
    """
    sites = sites_of(key, shape)
    if not sites:
        return {}
    _, components, layout = _parse(bare(key), shape.architecture) or (None, (), "")
    _check(key, tuple(tensor.shape), components, layout, shape)
    whole = _oriented(tensor, layout)
    parts = (_columns(whole, i, components, layout, shape) for i in range(len(components)))
    return {site: part.flatten(-2) if layout == _INTERLEAVED else part for site, part in zip(sites, parts, strict=True)}


def views(key: str, tensor: Tensor, shape: Shape) -> dict[Site, Tensor]:
    """For writing: the sites of a tensor as ``x @ W`` matrices that share its memory.

    Where heads interleave (GPT-NeoX, BLOOM) no view of the whole W_Q exists, so one site per head is given.
    A tied embedding is both W_E and W_U.

    Raises:
        InputError: the tensor's size is not what the config says.
    """
    sites = sites_of(key, shape)
    if not sites:
        return {}
    _, components, layout = _parse(bare(key), shape.architecture) or (None, (), "")
    _check(key, tuple(tensor.shape), components, layout, shape)
    whole = _oriented(tensor, layout)
    found: dict[Site, Tensor] = {}
    for i, site in enumerate(sites):
        part = _columns(whole, i, components, layout, shape)
        if layout == _INTERLEAVED:
            found.update({Site(site.component, site.layer, head): part[..., head, :] for head in range(shape.n_heads)})
        else:
            found[site] = part
    if shape.tied and components == ("W_E",):
        found[Site("W_U")] = tensor.T
    return found


def locate(site: Site, keys: Iterable[str], shape: Shape) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Where a weight site lives in a state dict: (key, accessor) with ``accessor(tensor)`` a writable ``x @ W`` view.

    The view is [rows, cols] (a vector for biases and gains); only a whole W_Q, W_K or W_V of an architecture that
    interleaves heads comes as [d_model, head, d_head] (its bias as [head, d_head]), so write with
    ``view.copy_(matrix.reshape(view.shape))`` and read with ``view.reshape(rows, cols)``, right for every view.
    Under GQA a head of W_K or W_V is the key/value head that this query head shares with its group.
    A tied W_U is the embedding's transpose.

    Returns:
        One entry, or none when the model has no such weight (a bias it does not use).

    Raises:
        InputError: the site is no weight, or the layer or head does not exist, or the architecture is not known.
    """
    if not site.is_weight:
        raise InputError(f"{site} is an activation, not a weight")
    if not known(shape):
        raise InputError(f"the weights of {shape.architecture} are not known by site; known: {', '.join(sorted(FAMILIES))}")
    if site.layer is not None and site.layer >= shape.n_layers:
        raise InputError(f"{site}: the model has layers 0 to {shape.n_layers - 1}")
    tied = site.component == "W_U" and shape.tied
    place = _place("W_E" if tied else site.component, site.layer, shape.architecture)
    if place is None:
        return []
    key = next((k for k in keys if bare(k) == place.name), None)
    if key is None:
        return []

    def accessor(tensor: Tensor) -> Tensor:
        _check(key, tuple(tensor.shape), place.components, place.layout, shape)
        view = _columns(_oriented(tensor, place.layout), place.index, place.components, place.layout, shape)
        if site.head is not None:
            return _head_view(view, site.component, site.head, place.layout, shape)
        return view.T if tied else view

    return [(key, accessor)]


def heads(site: Site, matrix: Tensor, shape: Shape) -> Tensor:
    """A canonical matrix with its heads apart: W_Q, W_K, W_V [d_model, n * d_head] -> [n, d_model, d_head], W_O -> [n, d_head, d_model].

    n is the number of query heads for W_Q and W_O, of key/value heads for W_K and W_V. Biases [n * d_head] -> [n, d_head]. A view.

    Raises:
        InputError: the site's weights have no heads.
    """
    if site.component in ("W_Q", "W_K", "W_V"):
        return matrix.unflatten(1, (-1, shape.d_head)).movedim(1, 0)
    if site.component in ("W_O", "b_Q", "b_K", "b_V"):
        return matrix.unflatten(0, (-1, shape.d_head))
    raise InputError(f"{site} has no heads; W_Q, W_K, W_V and W_O do")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that has not been read; ``file`` is None for one in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None


@runtime_checkable
class TensorSource(Protocol):
    """Raw tensors by Hugging Face name, read one at a time; names are found with and without wrappers' prefixes."""

    def names(self) -> list[str]:
        """Names, in stored order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the tensor."""
        ...

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        ...


def stored_name(name: str, names: Mapping[str, object], where: str) -> str:
    """The stored name of a tensor asked for with or without a wrapper's prefix."""
    if name in names:
        return name
    for stored in names:
        if bare(stored) == bare(name):
            return stored
    raise InputError(f"{where} has no tensor {name}; it has {len(names)}, such as {next(iter(names), 'none')}")


class StateTensors:
    """A state dict in memory as a ``TensorSource``; tied tensors (one memory, two names) are given once."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "the state dict") -> None:
        """Keep references, no copies."""
        seen: set[tuple[object, ...]] = set()
        self._tensors: dict[str, Tensor] = {}
        self._name = name
        for key in sorted(tensors, key=lambda k: bare(k).startswith("lm_head.")):  # the embedding names a tied pair
            t = tensors[key]
            memory = (t.device, t.data_ptr(), tuple(t.shape), t.stride())
            if t.numel() and t.device.type != "meta" and memory in seen:
                continue
            seen.add(memory)
            self._tensors[key] = t

    def names(self) -> list[str]:
        """Names, tied duplicates left out."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor."""
        t = self._tensors[stored_name(name, self._tensors, self._name)]
        return TensorInfo(tuple(t.shape), t.dtype)

    def get(self, name: str) -> Tensor:
        """A tensor on the CPU, detached; shares memory when it is there already."""
        return self._tensors[stored_name(name, self._tensors, self._name)].detach().cpu()


def matched(base: TensorSource, tuned: TensorSource) -> list[tuple[str, str | None, str | None]]:
    """Pair the tensors of two models by bare name: (bare name, name in base or None, name in tuned or None), base's order first."""
    left = {bare(name): name for name in base.names()}
    right = {bare(name): name for name in tuned.names()}
    return [(name, left.get(name), right.get(name)) for name in dict.fromkeys((*left, *right))]


def read(site: Site, source: TensorSource, shape: Shape) -> Tensor | None:
    """A weight site's canonical matrix (or vector) from a source; None when the model has no such weight.

    Raises:
        InputError: as ``locate``.
    """
    found = locate(site, source.names(), shape)
    if not found:
        return None
    key, accessor = found[0]
    view = accessor(source.get(key))
    if site.head is None and view.ndim > len(weight_shape(site.component, shape)):
        view = view.flatten(-2)
    return view


def check_finite(source: TensorSource, name: str) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        InputError: names the first such tensor and how many of its entries are not finite.
    """
    for key in source.names():
        tensor = source.get(key)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"{name}: {bad} of {tensor.numel()} entries of {key} are NaN or infinite")
