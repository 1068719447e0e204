"""What a model is, in a few words: for the identity card of a pair, from configs and headers, without loading weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError

if TYPE_CHECKING:
    from interp.models.hooked import HookedModel

_NOTES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "vocab_size")
_NOTES += ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "max_position_embeddings", "n_positions", "n_ctx")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
_LENIENT = ("dropout", "pdrop", "initializer", "init_std", "output_", "return_dict", "id2label", "label2id", "problem_type", "summary_")


def config_of(model: HookedModel) -> Any:
    """The Hugging Face config of a model."""
    return model.checkpoint.config if model.checkpoint is not None else model.wrapped.source.config


def tokenizer_of(model: HookedModel) -> Any | None:
    """The tokenizer, None for a model without one."""
    try:
        return model.tokenizer
    except InputError:
        return None


def stored_dtype(model: HookedModel) -> torch.dtype:
    """The dtype the weights are kept in: in the files, or in memory."""
    return model.checkpoint.dtype if model.checkpoint is not None and model.adapter is None else model.dtype


def rope_of(model: HookedModel) -> str:
    """Settings of the rotary position embedding, as text; "none" for a model without."""
    config = config_of(model).get_text_config()
    found = {k: v for k in _ROPE if (v := getattr(config, k, None)) is not None}
    if isinstance(rope := found.get("rope_parameters"), dict):
        found = rope
    return ", ".join(f"{k} {v}" for k, v in sorted(found.items())) or "none"


def settings_of(model: HookedModel) -> dict[str, str]:
    """Config settings that change what the weights compute and are on no other line of the card."""
    settings = config_of(model).get_text_config().to_dict()
    skipped = (*_NOTES, *_ROPE)
    return {k: str(v) for k, v in settings.items() if k not in skipped and not any(part in k for part in _LENIENT)}


def template_of(model: HookedModel) -> str:
    """First digits of the sha256 of the chat template, or "none"."""
    template = getattr(tokenizer_of(model), "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest()[:8] if template else "none"


def parameters_of(model: HookedModel) -> int:
    """Number of weights; those of an adapter are not counted, it changes the base's."""
    source = model.checkpoint if model.checkpoint is not None else model.weights()
    return sum(torch.Size(source.info(name).shape).numel() for name in source.names())


def card(model: HookedModel) -> dict[str, str]:
    """Line -> text, for both models of a pair in the same order."""
    shape, tokenizer = model.shape, tokenizer_of(model)
    grouped = f", {shape.n_kv_heads} key/value" if shape.n_kv_heads != shape.n_heads else ""
    special = {k: getattr(tokenizer, f"{k}_token", None) for k in ("bos", "eos", "pad")}
    return {
        "name": model.name,
        "fingerprint": model.fingerprint[:12],
        "architecture": shape.architecture,
        "parameters": f"{parameters_of(model):,}",
        "dtype": str(stored_dtype(model)).removeprefix("torch."),
        "layers": str(shape.n_layers),
        "width": f"d_model {shape.d_model}, d_mlp {shape.d_mlp}",
        "heads": f"{shape.n_heads} of width {shape.d_head}{grouped}",
        "context": str(shape.n_ctx),
        "embedding rows": str(shape.d_vocab),
        "tokenizer entries": "none" if tokenizer is None else str(len(tokenizer)),
        "special tokens": ", ".join(f"{k} {v!r}" for k, v in special.items() if v is not None) or "none",
        "chat template": template_of(model),
        "unembedding": "tied to the embedding" if shape.tied else "its own",
        "rotary settings": rope_of(model),
    }
