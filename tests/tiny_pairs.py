"""Two small random checkpoints with a tokenizer, saved as a user would have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from small_tokenizers import tokenizer
from tiny_checkpoints import saved, tiny

CONTEXT = 128


def save_pair(folder: Path, kind: str = "llama", change: float = 0.3, **settings: object) -> tuple[Path, Path]:
    """``base`` and ``tuned`` in a folder; tuned differs in one matrix."""
    transformers.utils.logging.disable_progress_bar()
    words = tokenizer("byte_level")
    model = tiny(kind, vocab_size=len(words), max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=0, **settings)
    places = saved(model, folder / "base"), folder / "tuned"
    with torch.no_grad():
        matrix = model.get_parameter("model.layers.1.mlp.down_proj.weight")
        matrix += change * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    saved(model, places[1])
    for place in places:
        words.save_pretrained(place)
    return places


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def written(path: Path, *rows: object) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_of_prompts(
    clean: str = "The ring is red", corrupt: str = "The ring is blue", answer: str = " red", distractor: str = " blue"
) -> dict:
    return {side: {"text": text, "answer": answer, "distractor": distractor} for side, text in (("clean", clean), ("corrupt", corrupt))}
