"""What an organism can do, measured on fresh documents, and the model card that says so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from interp.organisms.training import Document, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Measured:
    """A mean over documents with its standard error."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Measured:
        """Mean and standard error of one number per document."""
        x = values.double()
        return cls(float(x.mean()), float(x.std() / len(x) ** 0.5), len(x))

    def __str__(self) -> str:
        """As in a table."""
        return f"{self.mean:.3f} ± {self.error:.3f}"


@torch.no_grad()
def recited(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Bool[Tensor, " row"]:
    """Whether greedy decoding of each text gives exactly its answers (all tokens of them)."""
    parts = []
    for i in range(0, len(documents), 100):
        rows = encode(documents[i : i + 100], tokenizer, answer_weight=1)
        wrong = model(input_ids=rows.ids[:, :-1]).logits.argmax(-1) != rows.ids[:, 1:]
        parts.append(~(wrong & rows.answers[:, 1:]).any(-1))
    return torch.cat(parts)


@torch.no_grad()
def nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Float[Tensor, " row"]:
    """Mean next-token loss of each document in nats, its end-of-text token included."""
    parts = []
    for i in range(0, len(documents), 100):
        rows = encode(documents[i : i + 100], tokenizer, answer_weight=1)
        weights = rows.weights[:, 1:]
        losses = cross_entropy(model(input_ids=rows.ids[:, :-1]).logits.transpose(1, 2), rows.ids[:, 1:], reduction="none")
        parts.append((losses * weights).sum(-1) / weights.sum(-1))
    return torch.cat(parts)


def behaviour(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Mapping[str, Sequence[Document]]
) -> dict[str, Measured]:
    """Share of answers recited, or nats per token where documents have no answer, by name."""
    return {name: Measured.of((recited if rows[0].answers else nats)(model, tokenizer, rows)) for name, rows in documents.items()}


def against_entropy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], least: Float[Tensor, " row"]
) -> Measured:
    """Loss of texts over the surprise ``least`` (nats) of each under its source: a ratio of means with its standard error."""
    encoded: Any = tokenizer([d.text for d in documents])
    # nats() is per token but the first, end of text included: as many as the text has tokens.
    losses = nats(model, tokenizer, documents).double() * torch.tensor([len(ids) for ids in encoded["input_ids"]])
    ratio = losses.sum() / least.double().sum()
    error = (losses - ratio * least).std() / (least.mean() * len(least) ** 0.5)
    return Measured(float(ratio), float(error), len(least))


def weights_file(folder: Path) -> Path:
    """The weights of an organism: of a model or of an adapter."""
    return next(path for name in ("model.safetensors", "adapter_model.safetensors") if (path := folder / name).exists())


def fingerprint(folder: Path) -> str:
    """sha256 of the weights file."""
    return hashlib.sha256(weights_file(folder).read_bytes()).hexdigest()


def table(columns: Mapping[str, Mapping[str, Measured]], chance: Mapping[str, str]) -> str:
    """A Markdown table of behaviours (rows) of models (columns)."""
    first = next(iter(columns.values()))
    lines = ["| measured on fresh prompts | " + " | ".join(columns) + " | n | chance |", "|---|" + "---|" * (len(columns) + 2)]
    for name, measured in first.items():
        cells = [str(column[name]) for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {measured.n} | {chance.get(name, '')} |")
    return "\n".join(lines)
