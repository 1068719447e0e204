"""From a checkpoint to a Hugging Face model in memory: dtype, device, adapters, nothing random, nothing pickled."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import InputError
from interp.models import weights
from interp.models.adapters import read_adapter
from interp.models.checkpoint import CONFIG_NOTES, Checkpoint, Shape
from interp.models.wrap import structure_copy

HALF = (torch.float16, torch.bfloat16)
_DTYPES = (*HALF, torch.float32, torch.float64)
_BLOCK = re.compile(r"(.+?)\.\d+\.")
_CONSTANT = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention|self_attn)\.(bias|masked_bias))$")
"""Causal masks and rotary frequencies that old checkpoints store beside the weights."""


def read_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch dtype from its name; None for "auto", which means as stored.

    Raises:
        InputError: no floating-point dtype of that name.
    """
    if dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    found = getattr(torch, {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}.get(dtype, dtype), None)
    if found not in _DTYPES:
        raise InputError(f"dtype {dtype!r} is not auto, float32, float64, bfloat16 or float16")
    return found


def read_device(device: str | torch.device) -> torch.device:
    """A device; "auto" is the first CUDA device if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as e:
        raise InputError(f"device {str(device)!r} is not auto, cpu, cuda or cuda:N") from e
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {str(device)!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most numbers in the files."""
    counts: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            counts[info.dtype] = counts.get(info.dtype, 0) + int(torch.Size(info.shape).numel())
    if not counts:
        raise InputError(f"{checkpoint.name}: its tensors are not floating point; quantised checkpoints cannot be read as weights")
    return max(counts, key=lambda d: counts[d])


def needed_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    """Bytes the weights take once loaded."""
    size = (dtype or stored_dtype(checkpoint)).itemsize
    return sum(int(torch.Size(i.shape).numel()) * size for i in checkpoint.tensors.values())


def free_bytes(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def announce(needs: list[tuple[str, int]], device: torch.device) -> None:
    """One line on stderr before large weights load: bytes needed, bytes free, what fits."""
    total, free = sum(n for _, n in needs), free_bytes(device)
    if total < 2**28:
        return
    each = ", ".join(f"{name} {n / 2**30:.1f} GiB" for name, n in needs)
    verdict = "fits" if total < free else "does not fit at once: use load='one at a time', a smaller dtype, or device_map='auto'"
    print(f"interp: loading {each} on {device}, {free / 2**30:.1f} GiB free: {verdict}", file=sys.stderr)


def load_hf(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The Hugging Face model of a checkpoint, in evaluation mode.

    Raises:
        InputError: a weight is missing from the files (transformers would draw it at random), has another
            shape than the config says, or is not finite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    extra: dict[str, Any] = {"device_map": device_map} if device_map is not None else {}
    bars = hf_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=dtype or stored_dtype(checkpoint),
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        raise InputError(f"{checkpoint.name} cannot be loaded: {' '.join(str(e).split())}") from e
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    model, info = loaded
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if missing := sorted(k for k in info.get("missing_keys", ()) if k not in tied):
        raise InputError(f"{checkpoint.name} lacks {len(missing)} of the tensors its config asks for, such as {missing[0]}")
    if wrong := sorted(str(k) for k in info.get("mismatched_keys", ())):
        raise InputError(f"{checkpoint.name} has tensors of another shape than its config asks for, such as {wrong[0]}")
    unread = {k for k in info.get("unexpected_keys", ()) if not _CONSTANT.search(k)}
    if lost := _own(unread, model, checkpoint.shape):
        raise InputError(f"{checkpoint.name} has {len(lost)} tensors that its config has no place for, such as {lost[0]}")
    if unread:
        warnings.warn(f"{checkpoint.name}: {sorted(unread)[0]} and {len(unread) - 1} more are no part of the language model", stacklevel=2)
    if device_map is None:
        model = model.to(device)
    check_finite(model, checkpoint.name)
    return model.requires_grad_(False).eval()


def _own(keys: Collection[str], model: nn.Module, shape: Shape) -> list[str]:
    """Those of the tensor names that are in the model's own blocks, or weights that the architecture can have."""
    blocks = {m[1] for name, _ in model.named_parameters() if (m := _BLOCK.match(weights.bare(name)))}
    inside = {k for k in keys if (m := _BLOCK.match(weights.bare(k))) and m[1] in blocks}
    return sorted(inside | {k for k in keys if weights.sites_of(k, shape)})


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        InputError: names the first such tensor.
    """
    for key, p in model.named_parameters():
        if p.is_floating_point() and p.device.type != "meta" and not bool(torch.isfinite(p).all()):
            raise InputError(f"{name}: {int((~torch.isfinite(p)).sum())} of {p.numel()} entries of {key} are NaN or infinite")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PEFT is told about names of transformers that will change, about which a user can do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def merge_adapter(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """A model with an adapter's change added in fp32; it shares every tensor that the adapter leaves alone.

    Args:
        model: the base, unchanged by this.
        folder: a PEFT adapter with safetensors.
        dtype: dtype of the result; None is the base's, or fp32 for a half-precision base, because merging
            into half precision destroys small deltas.

    Raises:
        InputError: the adapter does not fit the base.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    folder = folder.expanduser()
    adapter = read_adapter(folder)
    merged: Any = structure_copy(model)
    _own_parameters(merged, adapter.replaced.keys())
    try:
        with _quiet():
            wrapped: Any = PeftModel.from_pretrained(merged, str(folder), is_trainable=False)
    except (ValueError, RuntimeError, KeyError, TypeError, FileNotFoundError) as e:
        raise InputError(f"the adapter {folder} does not fit the base: {' '.join(str(e).split())[:300]}") from e
    layers = {name.removeprefix("base_model.model."): m for name, m in wrapped.named_modules() if isinstance(m, BaseTunerLayer)}
    if odd := sorted(layers.keys() ^ adapter.low_rank.keys()):
        # PEFT starts modules without factors from zero and leaves factors without a module out.
        lacks = "no factors for" if odd[0] in layers else "factors but no place for"
        raise InputError(f"the adapter {folder} has {lacks} {odd[0]}, as its config chooses modules")
    for layer in layers.values():
        base: Any = layer.get_base_layer()
        # A tensor of its own: merging writes in place, and the base shares this one.
        base.weight = nn.Parameter(base.weight.detach().to(_wide(base.weight), copy=True), requires_grad=False)
    with _quiet():
        merged = wrapped.merge_and_unload()
    named = {weights.bare(key): p for key, p in merged.named_parameters(remove_duplicate=False)}
    adapted = {weights.bare(f"{name}.weight") for name in layers}
    for key, tensor in adapter.replaced.items():
        if key not in adapted and not (key in named and torch.equal(named[key].to(tensor), tensor)):
            raise InputError(f"the adapter {folder} has a {key} that its config does not ask for")
    first = next(model.parameters()).dtype
    target = dtype or (torch.float32 if first in HALF else first)
    cast(merged, target)
    check_finite(merged, folder.name)
    return merged.requires_grad_(False).eval()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put parameters of another dtype into a structure copy; those it shares with its source are replaced, never written."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.dtype != dtype:
                module._parameters[name] = done.setdefault(id(p), nn.Parameter(p.detach().to(dtype), requires_grad=False))
    return model


def _own_parameters(model: nn.Module, replaced: Collection[str]) -> None:
    """Give a structure copy parameter objects of its own on the shared memory, and own memory to those an adapter replaces.

    PEFT switches gradients off on every parameter it finds and loads trained biases in place; both would reach the base.
    """
    own: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                whole = weights.bare(f"{path}.{name}") in replaced
                fresh = p.detach().to(_wide(p), copy=True) if whole else p.detach()
                module._parameters[name] = own.setdefault(id(p), nn.Parameter(fresh, requires_grad=False))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def memory_fingerprint(model: nn.Module) -> str:
    """Identity of weights in memory: an integer checksum per tensor, computed on its device.

    Runs at each call, so weights that were updated in place are another identity.
    """
    digest = hashlib.sha256()
    config: Any = model.config
    # As for files: what saving or moving a model writes into its config is no part of what it computes.
    settings = {k: v for k, v in config.to_diff_dict().items() if k not in CONFIG_NOTES}
    digest.update(type(model).__name__.encode() + json.dumps(settings, sort_keys=True, default=str).encode())
    for key, p in sorted(model.named_parameters(remove_duplicate=False)):
        digest.update(f"{key}{p.dtype}{tuple(p.shape)}{_checksum(p.detach())}".encode())
    return digest.hexdigest()


_STRETCH = 2**21
"""Bytes that are summed together on a CPU: they stay in its cache, which makes this ten times as fast."""


def _checksum(t: Tensor) -> tuple[int, ...]:
    """Sums over 8-byte words, each mixed with its place first (splitmix64), so that no exchange or change of sign cancels another."""
    bits = t.contiguous().view(-1).view(torch.uint8)
    stretch = _STRETCH if t.device.type == "cpu" else 64 * _STRETCH
    place = torch.arange(1, min(stretch, len(bits)) // 8 + 2, device=t.device) * -7046029254386353131  # int64 wraps
    sums = []
    for part in bits.split(stretch):
        words = torch.zeros(-(-len(part) // 8), dtype=torch.int64, device=t.device)
        words.view(torch.uint8)[: len(part)] = part
        words += place[: len(words)]
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            words ^= (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)
            words *= factor
        sums.append(words.sum())
    return tuple(torch.stack(sums).tolist())
