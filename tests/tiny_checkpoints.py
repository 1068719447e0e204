"""Random checkpoints small enough to build in a test, each with pairwise different sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SIZES = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 19}

CONFIGS = {
    "gpt2": (transformers.GPT2Config, {"vocab_size": 31, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 19}),
    "llama": (transformers.LlamaConfig, {**GQA, "head_dim": 8}),
    "qwen2": (transformers.Qwen2Config, {**GQA, "tie_word_embeddings": True}),
    "neox": (transformers.GPTNeoXConfig, {**SIZES, "max_position_embeddings": 19}),
}
FOUR = tuple(CONFIGS)


def tiny(kind: str, seed: int = 0, **changes: object) -> nn.Module:
    """A model with every parameter random, so that a forgotten bias or gain shows."""
    cls, settings = CONFIGS[kind]
    config = cls(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings, **changes})
    return randomised(transformers.AutoModelForCausalLM.from_config(config), seed)


def sharp(kind: str, **changes: Any) -> Any:
    """A tiny model whose attention is not nearly uniform, or queries and keys would hardly matter."""
    model: Any = tiny(kind, seed=1, **changes)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("c_attn.weight", "query_key_value.weight", "q_proj.weight", "k_proj.weight")):
                p.mul_(1.5)
    return model


def randomised(model: nn.Module, seed: int) -> nn.Module:
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.3)
    return model.eval()


def saved(model: nn.Module, folder: Path, **settings: object) -> Path:
    model.save_pretrained(folder, **settings)
    return folder
