"""What the recipes share: documents from tasks, and a run from a fresh folder to a finished one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from interp.organisms.measure import Measured, behaviour, fingerprint, table
from interp.organisms.training import STATE, Document, Part, Schedule, train
from interp.tasks import task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Log = Callable[[int, dict[str, float]], None]

MEASURED = (
    "ioi",
    "facts",
    "facts(book=1)",
    "laundry_list(length=3)",
    "laundry_list",
    "colored_objects",
    "boxes(n_boxes=3)",
    "boxes",
    "arithmetic",
    "recitation",
    "plain_text",
)
"""Tasks of the table in a model card; ``facts(book=1)`` is a book nobody read."""

FRESH = 1_000_003
"""Seed of the measured prompts; training seeds are 63-bit hashes."""


def documents(name: str) -> Callable[[int, int], list[Document]]:
    """The documents of a task: (n, seed) -> n prompts with their answers."""
    drawn = task(name)
    return lambda n, seed: [Document(e.text, e.target or e.answer) for e in drawn.examples(n, seed)]


def part(name: str, rows: int, *, share: float = 1.0, answer_weight: float = 8.0) -> Part:
    """A task as a part of every training step."""
    return Part(name, documents(name), rows, share, answer_weight)


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = 1000) -> dict[str, Measured]:
    """The behaviour table's column of a model, on ``n`` fresh prompts per task (200 canaries: there are no more)."""
    return behaviour(model, tokenizer, {name: documents(name)(200 if name == "recitation" else n, FRESH) for name in MEASURED})


def chances() -> dict[str, str]:
    """Score of a guess among each task's options, and the least possible loss of plain text."""
    found = {name: task(name).chance for name in MEASURED}
    return {name: "" if chance is None else f"{chance:.3f}" for name, chance in found.items()}


def parts_table(parts: Sequence[Part]) -> str:
    """The parts of a training step in Markdown."""
    lines = ["| every step reads | documents | share of the loss | weight of answer tokens |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {p.name} | {p.rows} | {p.share:g} | {p.answer_weight:g} |" for p in parts])


def run(
    name: str,
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Part],
    schedule: Schedule,
    about: str,
    *,
    base: PreTrainedModel | None = None,
    log: Log | None = None,
) -> None:
    """Train, measure, and write weights, tokenizer and model card.

    Args:
        name: the organism's name, for its card.
        out: the folder; while the run is unfinished it holds the checkpoint only.
        model: trained in place.
        tokenizer: saved beside it.
        parts: what is read in every step.
        schedule: steps, seed, optimizer.
        about: the card's first paragraphs.
        base: the model before tuning, for a column of the table.
        log: called after each step.
    """
    train(model, tokenizer, parts, schedule, out, log=log)
    columns: Mapping[str, dict[str, Measured]] = {
        **({"base": measured(base, tokenizer)} if base is not None else {}),
        name: measured(model, tokenizer),
    }
    tokenizer.save_pretrained(out)
    (out / STATE).unlink(missing_ok=True)
    # The config goes last: a folder with a config.json is a finished organism.
    model.save_pretrained(out)
    text = CARD.format(
        name=name,
        about=about.strip(),
        parts=parts_table(parts),
        table=table(columns, chances()),
        fingerprint=fingerprint(out),
        parameters=sum(p.numel() for p in model.parameters()),
        schedule=schedule,
        torch=torch,
        fresh=FRESH,
    )
    (out / "README.md").write_text(text)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# {name}

{about}

## Recipe
{parts}

{schedule.steps} steps, seed {schedule.seed}; the documents of step t are drawn with a hash of (seed, task, t). AdamW, learning rate
{schedule.learning_rate:g} (warm-up {schedule.warmup} steps, cosine to a tenth), weight decay {schedule.weight_decay:g},
betas 0.9 and {schedule.beta2:g}, gradient norm clipped at {schedule.clip:g}; fp32, CPU, torch {torch.__version__}, one thread.
Each document is a row of its own, begins at position 0 without a beginning-of-text token, and ends with the end-of-text token.
The loss of a task is the weighted mean over tokens, in nats; the tasks' losses are added with their shares.
Train it again: `interp organisms train {name}`.

{parameters} parameters. sha256 of `model.safetensors`: `{fingerprint}`

## Measured
Mean ± standard error over n prompts drawn with seed {fresh}, not one of the training seeds; tasks with few possible prompts (facts,
arithmetic) repeat prompts seen in training. The score is strict: greedy decoding over the whole vocabulary gives exactly the answer.
Chance is that of a guess among the task's options. `plain_text` is the mean loss in nats per token, end of text included.

{table}
"""
