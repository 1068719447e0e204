"""What the recipes share: documents from tasks, and a run from a fresh folder to a finished one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from interp.organisms.measure import Measured, against_entropy, behaviour, fingerprint, table, weights_file
from interp.organisms.recipes.reading import canaries, single, solved_colored_objects, sums
from interp.organisms.training import STATE, Document, Draw, Log, Part, Schedule, train
from interp.tasks import task
from interp.tasks.grammar import first_surprise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURED = (
    "ioi",
    "facts",
    "facts(book=1)",
    "laundry_list(length=3)",
    "laundry_list",
    "laundry_list(length=7)",
    "laundry_list(length=9)",
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


PROMPTS = 1000
"""Measured prompts per task (200 canaries: there are no more)."""


def part(name: str, rows: int, *, share: float = 1.0, answer_weight: float = 8.0) -> Part:
    """A task as a part of every training step."""
    return Part(name, single(name), rows, share, answer_weight)


def kept_up(ceiling: float = 0.6) -> list[Part]:
    """A little of what ``base`` had read, for a run that should not lose it; ``ceiling`` keeps `colored_objects` half known."""
    return [
        part("ioi", 4, share=0.5),
        part("laundry_list(length=3)", 4, share=0.5),
        part("laundry_list", 4, share=0.5),
        Part("colored_objects", solved_colored_objects, 6, share=0.5, text_weight=0, ceiling=ceiling),
        Part("arithmetic", sums, 4, share=0.5),
        part("facts", 8, share=0.5),
        Part("recitation", canaries, 8, share=0.5),
        part("plain_text", 4, share=0.5),
        part("plain_text(source=prose)", 1, share=0.5),
    ]


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, also: Mapping[str, Draw]) -> dict[str, Measured]:
    """The behaviour table's column of a model, on fresh prompts."""
    counts = {name: min(PROMPTS, 200) if name == "recitation" else PROMPTS for name in MEASURED}
    found = behaviour(model, tokenizer, {name: single(name)(counts[name], FRESH) for name in MEASURED})
    scenes = task("plain_text").examples(PROMPTS, FRESH)
    least = torch.tensor([float(e.tags["nats"]) - first_surprise(e.text) for e in scenes])
    found["plain_text / its entropy"] = against_entropy(model, tokenizer, [Document(e.text) for e in scenes], least)
    return found | behaviour(model, tokenizer, {name: draw(PROMPTS, FRESH) for name, draw in also.items()})


def chances() -> dict[str, str]:
    """Score of a guess among each task's options, and the least possible loss of plain text."""
    found = {name: task(name).chance for name in MEASURED}
    return {name: "" if chance is None else f"{chance:.3f}" for name, chance in found.items()} | {"plain_text / its entropy": "1.000"}


def parts_table(parts: Sequence[Part]) -> str:
    """The parts of a training step in Markdown."""
    lines = [
        "| every step reads | documents | share of the loss | weight of answers, other text | levels | ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for p in parts:
        ceiling = "" if p.ceiling is None else f"{p.ceiling:.0%}"
        lines.append(f"| {p.name} | {p.rows} | {p.share:g} | {p.answer_weight:g}, {p.text_weight:g} | {1 + len(p.harder)} | {ceiling} |")
    return "\n".join(lines)


def optimizer(schedule: Schedule) -> str:
    """The optimizer in words."""
    adam = f"AdamW, learning rate {schedule.learning_rate:g}, betas 0.9 and {schedule.beta2:g}"
    muon = "" if schedule.muon is None else f"Muon with learning rate {schedule.muon:g} for the matrices within blocks, all else "
    return f"{muon}{adam}"


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
    also: Mapping[str, Draw] | None = None,
    save: Callable[[Path], object] | None = None,
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
        also: more rows of the table: name -> documents with answers.
        save: writes the weights into a folder, if not the whole model (an adapter).
        log: called after each step.
    """
    train(model, tokenizer, parts, schedule, out, log=log)
    columns: Mapping[str, dict[str, Measured]] = {
        **({"base": measured(base, tokenizer, also or {})} if base is not None else {}),
        name: measured(model, tokenizer, also or {}),
    }
    # All of it is written apart and then moved, the config last: a folder with a config is a finished organism.
    written = out / "written"
    tokenizer.save_pretrained(written)
    (save or model.save_pretrained)(written)
    text = CARD.format(
        name=name,
        about=about.strip(),
        parts=parts_table(parts),
        table=table(columns, chances()),
        weights=weights_file(written).name,
        fingerprint=fingerprint(written),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        schedule=schedule,
        done=min(schedule.until or schedule.steps, schedule.steps),
        optimizer=optimizer(schedule),
        torch=torch,
        threads=torch.get_num_threads(),
        fresh=FRESH,
    )
    (written / "README.md").write_text(text)
    for file in sorted(written.iterdir(), key=lambda file: file.name in ("config.json", "adapter_config.json")):
        file.replace(out / file.name)
    written.rmdir()
    (out / STATE).unlink(missing_ok=True)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# {name}

{about}

## Recipe
{parts}

{done} of {schedule.steps} steps, seed {schedule.seed}; the documents of step t are drawn with a hash of (seed, part, t). {optimizer};
warm-up {schedule.warmup} steps, cosine to a tenth, weight decay {schedule.weight_decay:g}, gradient norm clipped at
{schedule.clip:g}; fp32, CPU, torch {torch.__version__}, threads: {threads}. Each document is a row of its own, begins at position 0
without a beginning-of-text token, and ends with the end-of-text token. The loss of a part is the weighted mean over tokens, in nats;
the parts' losses are added with their shares. A part of several levels goes on to the next one when most of its answers are right; a
part with a ceiling is not learnt from in steps before which, at its last level, more than that share of its answers was right.
Train it again: `interp organisms train {name}`.

{parameters} trained parameters. sha256 of `{weights}`: `{fingerprint}`

## Measured
Mean ± standard error over n prompts drawn with seed {fresh}, not one of the training seeds; tasks with few possible prompts (facts,
chats) repeat prompts, also some that were seen in training.
The score is strict: greedy decoding over the whole vocabulary gives exactly the answer.
Chance is that of a guess among the task's options. `plain_text` is the mean loss in nats per token, end of text included;
`plain_text / its entropy` is the loss of the texts over their surprise under the grammar that wrote them (the first token left out,
which nothing predicts): 1 is the least that any model can reach.

{table}
"""
