"""Is the wrapped model the Hugging Face model, and do its sites do what their names say?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.interventions import Part
from interp.models.wrap import structure_copy
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.hooked import HookedModel

COMPONENTS = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "mlp_post")

_MOVED = 4  # times that the last place of the embeddings is moved, to see what a model makes of rounding


@dataclass(frozen=True)
class Validation:
    """What was checked on a model.

    Attributes:
        difference: largest difference of logits from plain Hugging Face on a few tokens.
        tolerance: what was allowed, as ``logit_difference`` says.
        guaranteed: components that exist, have the right shape, and change the output when they are modified.
        not_guaranteed: component and reason.
    """

    difference: float
    tolerance: float
    guaranteed: tuple[str, ...]
    not_guaranteed: tuple[str, ...]


def probe_batch(model: HookedModel) -> Batch:
    """Two prompts of unequal length, of ids that any vocabulary has."""
    n = min(9, model.shape.n_ctx)
    ids = [(7 * i + 3) % model.shape.d_vocab for i in range(2 * n)]
    return Batch.of([ids[:n], ids[n : n + max(1, n - 3)]])


def logit_difference(model: HookedModel) -> tuple[float, float]:
    """Largest difference of logits from plain Hugging Face, and the tolerance.

    The tolerance is 8 eps times the largest logit (in models of more than 8 layers one eps per layer); where plain Hugging Face is further
    from itself when the last place of its embeddings moves, four times that: some models make a lot of their rounding.
    """
    batch = probe_batch(model)
    plain: Any = structure_copy(model.wrapped.source).eval()
    plain.set_attn_implementation("eager")
    device = model.wrapped.device
    with torch.no_grad():

        def run(**given: Tensor) -> Tensor:
            return plain(**given, attention_mask=batch.mask.long().to(device), use_cache=False).logits

        want, got = run(input_ids=batch.ids.to(device)), model.forward(Part.of(batch)).logits
        embedded, draws = plain.get_input_embeddings()(batch.ids.to(device)), torch.Generator().manual_seed(0)
        signs = (torch.randn(embedded.shape, generator=draws).sign().to(embedded) for _ in range(_MOVED))
        moved = [run(inputs_embeds=embedded * (1 + torch.finfo(embedded.dtype).eps * sign)) for sign in signs]
    real = batch.mask.to(want.device)
    rounding = max(float((x - want)[real].abs().max()) for x in moved)
    # Hugging Face takes some softmaxes in fp32 even in an fp64 model, TransformerLens not always the same ones.
    eps = max(torch.finfo(want.dtype).eps, torch.finfo(torch.float32).eps)
    deep = max(1.0, model.shape.n_layers / 8)  # every block rounds once more
    return float((got - want)[real].abs().max()), max(8 * deep * eps * float(want[real].abs().max()), 4 * rounding)


def validate(model: HookedModel) -> Validation:
    """Check logits, names, shapes, attention rows, and that modifying each kind of site changes the output."""
    difference, tolerance = logit_difference(model)
    good, bad = [], []
    for component in COMPONENTS:
        why = _check(model, component)
        good.append(component) if why is None else bad.append(f"{component}: {why}")
    return Validation(difference, tolerance, tuple(good), tuple(bad))


def _check(model: HookedModel, component: str) -> str | None:
    """Why a component cannot be relied on, or None."""
    s = model.shape
    # Not the last layer: there only the last position matters to anything.
    site = Site(component, None if component == "embed" else max(0, s.n_layers // 2 - 1))
    batch = probe_batch(model)
    n, p = batch.ids.shape
    heads = s.n_kv_heads if component in ("k", "v") else s.n_heads
    want = {"pattern": (n, heads, p, p), "mlp_post": (n, p, s.d_mlp)}.get(
        component, (n, p, heads, s.d_head) if site.per_head else (n, p, s.d_model)
    )
    try:
        x = model.capture(batch, site)[site]
    except (InputError, KeyError) as e:
        return str(e) if isinstance(e, InputError) else "its hook did not fire"
    if tuple(x.shape) != want:
        return f"shape {tuple(x.shape)} instead of {want}"
    if component == "pattern":
        sums = x.float().sum(-1)[batch.mask[:, None].expand(n, heads, p).to(x.device)]
        if float((sums - 1).abs().max()) > 0.02:
            return "attention rows do not sum to 1"
        if float(x.float().triu(1).abs().max()) > 0:
            return "attention looks ahead"
    plain = model.logits(batch)
    change = x.flip(-1) if component == "pattern" else x + torch.linspace(0.5, 1.5, x.shape[-1], device=x.device, dtype=x.dtype)
    with model.patched({site: change}):
        patched = model.logits(batch)
    with model.patched({site: x}):
        same = model.logits(batch)
    if torch.equal(patched, plain):
        return "modifying it changes nothing"
    real = batch.mask.to(plain.device)
    if float((same - plain)[real].abs().max()) > 32 * torch.finfo(plain.dtype).eps * float(plain[real].abs().max()):
        return "writing back what was read changes the output"
    return None


def _memory(model: HookedModel) -> Path | None:
    """Where the outcome for these files and versions is remembered; None for models in memory."""
    if model.checkpoint is None:
        return None
    versions = [version(p) for p in ("torch", "transformers", "transformer_lens")]
    key = hashlib.sha256(json.dumps([model.fingerprint, str(model.dtype), *versions]).encode()).hexdigest()[:32]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interp" / "validated" / key


def assert_faithful(model: HookedModel) -> None:
    """Refuse a model whose wrapped logits are not plain Hugging Face's; remembered for files.

    Raises:
        InputError: they differ by more than ``logit_difference`` allows.
    """
    memory = _memory(model)
    if memory is not None and memory.is_file():
        return
    difference, tolerance = logit_difference(model)
    if not difference <= tolerance:
        raise InputError(
            f"{model.name}: logits through TransformerLens differ from plain Hugging Face by {difference:.3g} "
            f"(at most {tolerance:.3g} is rounding); "
            f"this {model.shape.architecture} cannot be analysed faithfully"
        )
    if memory is not None:
        with contextlib.suppress(OSError):  # a read-only home only means that the check runs again next time
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(json.dumps({"difference": difference}))
