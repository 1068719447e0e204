"""Train a small causal language model on drawn documents: seeded, resumable to the bit, without pickle.

The documents of a step depend on (seed, step) only, so an unfinished run goes on from its last
checkpoint exactly as if it had never stopped (same machine, same number of threads).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from interp.errors import InputError
from interp.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATE = "training.safetensors"
"""File of an unfinished run: weights, both Adam moments, and step and settings in its header."""


@dataclass(frozen=True)
class Document:
    """A text to learn, split where the answer begins (``answer`` may be empty: plain text)."""

    text: str
    answer: str = ""


@dataclass(frozen=True)
class Part:
    """A kind of document that is in every training step.

    Attributes:
        name: what losses are reported under.
        draw: (n, seed) -> n documents.
        rows: documents per step.
        share: weight of this part's mean loss in the sum over parts.
        answer_weight: weight of an answer's tokens in the part's mean; every other token weighs 1.
    """

    name: str
    draw: Callable[[int, int], Sequence[Document]]
    rows: int
    share: float = 1.0
    answer_weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Rows:
    """Documents as right-padded token ids, with the weight of predicting each token (0 for padding)."""

    ids: Int[Tensor, "row pos"]
    weights: Float[Tensor, "row pos"]


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and a cosine to a tenth of the learning rate."""

    steps: int
    seed: int
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.01
    beta2: float = 0.98
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def stream(*key: object) -> int:
    """A seed of 63 bits for a key such as (seed, part, step); equal keys give equal seeds everywhere."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, answer_weight: float) -> Rows:
    """Token ids and loss weights of documents; each ends with the end-of-text token.

    Raises:
        InputError: the tokens of a text change when its answer follows, so that the answer has no first token.
    """
    end: Any = tokenizer.eos_token_id
    texts = tokenizer([d.text for d in documents])["input_ids"]
    wholes = tokenizer([d.text + d.answer for d in documents])["input_ids"]
    width = max(len(ids) for ids in wholes) + 1
    ids = torch.full((len(documents), width), end)
    weights = torch.zeros(len(documents), width)
    for row, (document, text, whole) in enumerate(zip(documents, texts, wholes, strict=True)):
        if whole[: len(text)] != text:
            raise InputError(f"the tokens of {document.text!r} change when {document.answer!r} follows; begin the answer with a space")
        ids[row, : len(whole)] = torch.tensor(whole)
        weights[row, 1 : len(whole) + 1] = 1
        weights[row, max(1, len(text)) : len(whole)] = answer_weight
    return Rows(ids, weights)


def loss(model: PreTrainedModel, rows: Rows) -> Float[Tensor, ""]:
    """Weighted mean of the next-token losses of documents, in nats."""
    logits = model(input_ids=rows.ids[:, :-1]).logits
    each = cross_entropy(logits.flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="none")
    weights = rows.weights[:, 1:].flatten()
    return (each * weights).sum() / weights.sum()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Part],
    schedule: Schedule,
    folder: Path,
    *,
    save_every: int = 200,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train a model in place; a run that was stopped goes on from its checkpoint in ``folder``.

    Args:
        model: a Hugging Face causal language model; all its parameters are trained.
        tokenizer: its tokenizer.
        parts: the kinds of documents of every step.
        schedule: steps, seed and optimizer settings.
        folder: where ``training.safetensors`` is kept while the run is unfinished; removed at the end by the caller.
        save_every: steps between checkpoints.
        log: called after each step with the step and each part's loss in nats.

    Raises:
        InputError: the checkpoint in ``folder`` belongs to other settings.
        FloatingPointError: a loss is not finite.
    """
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        named.values(), lr=schedule.learning_rate, betas=(0.9, schedule.beta2), weight_decay=schedule.weight_decay, foreach=True
    )
    about = [asdict(schedule), [[p.name, p.rows, p.share, p.answer_weight] for p in parts]]
    settings = json.dumps(about)
    start = _resume(folder / STATE, named, optimizer, settings)
    model.train()
    for step in progress(range(start, schedule.steps), desc=folder.name, total=schedule.steps - start, unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        losses: dict[str, float] = {}
        for part in parts:
            documents = part.draw(part.rows, stream(schedule.seed, part.name, step))
            value = loss(model, encode(documents, tokenizer, part.answer_weight))
            (value * part.share).backward()
            losses[part.name] = float(value.detach())
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"a loss at step {step} is not finite: {losses}")
        torch.nn.utils.clip_grad_norm_(named.values(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if log:
            log(step, losses)
        if (step + 1) % save_every == 0 and step + 1 < schedule.steps:
            _save(folder / STATE, named, optimizer, settings, step + 1)
    model.eval()


def _save(path: Path, named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, settings: str, step: int) -> None:
    """Write the state of a run under a temporary name, then rename: a kill leaves the old file or the new one."""
    tensors = {f"weight/{name}": p.detach() for name, p in named.items()}
    for name, p in named.items():
        tensors |= {f"{moment}/{name}": optimizer.state[p][moment] for moment in ("exp_avg", "exp_avg_sq")}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    save_file(tensors, unfinished, metadata={"step": str(step), "settings": settings})
    os.replace(unfinished, path)


def _resume(path: Path, named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, settings: str) -> int:
    """Read a state back into the model and the optimizer; the number of steps already done."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("settings") != settings:
            raise InputError(f"{path} is of a run with other settings; give another folder or remove it")
        step = int(header["step"])
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(file.get_tensor(f"weight/{name}"))
                moments = {moment: file.get_tensor(f"{moment}/{name}").to(p.device) for moment in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step
