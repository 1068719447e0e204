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
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from interp.errors import InputError
from interp.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATE = "training.safetensors"
"""File of an unfinished run: weights, what the optimizers remember, and step, settings and levels in its header."""

SAVE_EVERY = 200
"""Steps between checkpoints of an unfinished run."""

Draw = Callable[[int, int], "Sequence[Document]"]
"""(n, seed) -> n documents."""

LEARNT = 0.85
"""Running share of right answers at which a part moves on to its next level."""

MEMORY = 0.95
"""Weight of the past in the running share of right answers: about the last 20 steps count."""


@dataclass(frozen=True)
class Document:
    """A text to learn and the character ranges of it that are answers (none: plain text)."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, *pieces: str) -> Document:
        """A document from pieces of text and answers in turn: text, answer, text, answer, ..."""
        spans, end = [], 0
        for i, piece in enumerate(pieces):
            if i % 2 and piece:
                spans.append((end, end + len(piece)))
            end += len(piece)
        return cls("".join(pieces), tuple(spans))


@dataclass(frozen=True)
class Part:
    """A kind of document that is in every training step.

    Attributes:
        name: what losses are reported under.
        draw: (n, seed) -> n documents.
        rows: documents per step.
        share: weight of this part's mean loss in the sum over parts.
        answer_weight: weight of an answer's tokens in the part's mean.
        text_weight: weight of every other token; 0 to learn the answers only, which is faster too.
        harder: what is drawn instead of ``draw``, one after the other, each once the one before is learnt (a curriculum).
        ceiling: running share of right answers in the last level above which the part is read but not learnt from,
            so that a skill stays as half learnt as is wanted; None: always learnt from.
    """

    name: str
    draw: Draw
    rows: int
    share: float = 1.0
    answer_weight: float = 8.0
    text_weight: float = 1.0
    harder: tuple[Draw, ...] = ()
    ceiling: float | None = None

    @property
    def settings(self) -> list[object]:
        """What an unfinished run must have in common with the one that goes on from it."""
        return [self.name, self.rows, self.share, self.answer_weight, self.text_weight, len(self.harder), self.ceiling]


@dataclass
class Standing:
    """How far a part has got: its level, and the running share of right answers at that level."""

    level: int = 0
    right: float = 0.0

    @classmethod
    def at_first(cls, part: Part) -> Standing:
        """Before the first step: a curriculum has nothing right yet; a part of one level counts as known until it is seen not to be."""
        return cls(0, 0.0 if part.harder else 1.0)

    def learning(self, part: Part) -> bool:
        """Whether the part's loss counts in the next step."""
        return part.ceiling is None or self.level < len(part.harder) or self.right < part.ceiling

    def saw(self, right: float, part: Part) -> None:
        """Take in the share of right answers of a step, and move on where a level is learnt."""
        self.right = MEMORY * self.right + (1 - MEMORY) * right
        if self.right >= LEARNT and self.level < len(part.harder):
            self.level, self.right = self.level + 1, 0.0


Log = Callable[[int, dict[str, float], dict[str, Standing]], None]


@dataclass(frozen=True, eq=False)
class Rows:
    """Documents as right-padded token ids, with the weight of predicting each token (0 for padding) and which are answers."""

    ids: Int[Tensor, "row pos"]
    weights: Float[Tensor, "row pos"]
    answers: Bool[Tensor, "row pos"]


@dataclass(frozen=True)
class Schedule:
    """Learning rates with linear warm-up and a cosine to a tenth; AdamW, or Muon for the matrices within blocks.

    Attributes:
        steps: optimizer steps.
        seed: of the documents.
        learning_rate: of AdamW, at its highest.
        muon: learning rate of Muon (Jordan et al. 2024; scaled to AdamW's as in Liu et al. 2025, arXiv 2502.16982), which
            then trains all matrices but the embedding and the unembedding; None: AdamW trains everything. Muon finds
            how to look words up in a context in a fraction of AdamW's steps.
        warmup: steps of rising learning rate.
        weight_decay: of both.
        beta2: of AdamW; its first beta is 0.9.
        clip: largest norm of the gradient.
        until: step to stop at, for a checkpoint on the way; None: after all of them.
    """

    steps: int
    seed: int
    learning_rate: float = 3e-3
    muon: float | None = None
    warmup: int = 100
    weight_decay: float = 0.01
    beta2: float = 0.98
    clip: float = 1.0
    until: int | None = None

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0, as a part of the highest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.55 + 0.45 * math.cos(math.pi * done)

    def optimizers(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        """The optimizers of a model's trained parameters; each group knows its highest learning rate as ``peak``."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        outside = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        inner = [p for p in named.values() if self.muon is not None and p.ndim == 2 and id(p) not in outside]
        rest = [p for p in named.values() if not any(p is q for q in inner)]
        made: list[torch.optim.Optimizer] = []
        if inner and self.muon is not None:
            made.append(torch.optim.Muon(inner, lr=self.muon, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw"))
        if rest:
            made.append(
                torch.optim.AdamW(rest, lr=self.learning_rate, betas=(0.9, self.beta2), weight_decay=self.weight_decay, foreach=True)
            )
        for group in (g for o in made for g in o.param_groups):
            group["peak"] = group["lr"]
        return made


def stream(*key: object) -> int:
    """A seed of 63 bits for a key such as (seed, part, step); equal keys give equal seeds everywhere."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, answer_weight: float, text_weight: float = 1.0) -> Rows:
    """Token ids and loss weights of documents; each ends with the end-of-text token, which weighs as much as the token before it.

    Raises:
        InputError: an answer does not begin and end with a token.
    """
    end: Any = tokenizer.eos_token_id
    read: Any = tokenizer([d.text for d in documents], return_offsets_mapping=True)
    width = max(map(len, read["input_ids"])) + 1
    ids = torch.full((len(documents), width), end)
    weights, answers = torch.zeros(len(documents), width), torch.zeros(len(documents), width, dtype=torch.bool)
    for row, (document, tokens, offsets) in enumerate(zip(documents, read["input_ids"], read["offset_mapping"], strict=True)):
        n = len(tokens)
        ids[row, :n] = torch.tensor(tokens)
        starts = torch.tensor([start for start, _ in offsets])
        edges = {edge for offset in offsets for edge in offset}
        for start, stop in document.answers:
            if not {start, stop} <= edges:
                raise InputError(
                    f"the answer {document.text[start:stop]!r} of {document.text!r} is not made of whole tokens; begin it with a space"
                )
            answers[row, :n] |= (starts >= start) & (starts < stop)
        weights[row, :n] = torch.where(answers[row, :n], answer_weight, text_weight)
        weights[row, n] = weights[row, n - 1]
    weights[:, 0], answers[:, 0] = 0, False  # nothing predicts the first token
    return Rows(ids, weights, answers)


def loss(model: PreTrainedModel, rows: Rows) -> tuple[Float[Tensor, ""], float]:
    """Weighted mean of the next-token losses of documents, in nats, and the share of their answers' tokens that are most likely.

    Only tokens of a weight are unembedded: with ``text_weight=0`` that is a small part of them.
    """
    counted = rows.weights[:, 1:] > 0
    hidden = model.base_model(input_ids=rows.ids[:, :-1]).last_hidden_state[counted]
    logits = cast(torch.nn.Module, model.get_output_embeddings())(hidden)
    wanted, weights, answers = (x[:, 1:][counted] for x in (rows.ids, rows.weights, rows.answers))
    value = (cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
    right = (logits.argmax(-1) == wanted)[answers].float()
    return value, float(right.mean()) if len(right) else 0.0


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Part],
    schedule: Schedule,
    folder: Path,
    *,
    log: Log | None = None,
) -> None:
    """Train a model in place; a run that was stopped goes on from its checkpoint in ``folder``.

    Args:
        model: a Hugging Face causal language model; its parameters that require gradients are trained.
        tokenizer: its tokenizer.
        parts: the kinds of documents of every step.
        schedule: steps, seed and optimizer settings.
        folder: where ``training.safetensors`` is kept while the run is unfinished; removed at the end by the caller.
        log: called after each step with the step, each part's loss in nats, and how far the parts with levels or a ceiling have got.

    Raises:
        InputError: the checkpoint in ``folder`` belongs to other settings.
        FloatingPointError: a loss is not finite.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = schedule.optimizers(model)
    # A run that ends early (``until``) is the beginning of the same run.
    settings = json.dumps([{k: v for k, v in asdict(schedule).items() if k != "until"}, [p.settings for p in parts]])
    start, standings = _resume(folder / STATE, named, optimizers, settings)
    standings = {p.name: standings.get(p.name, Standing.at_first(p)) for p in parts}
    until = min(schedule.steps, schedule.until or schedule.steps)
    if start > until:
        raise InputError(f"{folder / STATE} is {start} steps into the run, later than {until}; give another folder or remove it")
    model.train()
    for step in progress(range(start, until), desc=folder.name, total=until - start, unit="step"):
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * schedule.rate(step)
        losses: dict[str, float] = {}
        for part in parts:
            standing = standings[part.name]
            draw = (part.draw, *part.harder)[standing.level]
            rows = encode(draw(part.rows, stream(schedule.seed, part.name, step)), tokenizer, part.answer_weight, part.text_weight)
            learning = standing.learning(part)
            with torch.set_grad_enabled(learning):
                value, right = loss(model, rows)
            if learning:
                (value * part.share).backward()
            losses[part.name] = float(value.detach())
            standing.saw(right, part)
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"a loss at step {step} is not finite: {losses}")
        torch.nn.utils.clip_grad_norm_(named.values(), schedule.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if log:
            log(step, losses, {p.name: standings[p.name] for p in parts if p.harder or p.ceiling is not None})
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == until:  # the last one too: measuring may be stopped
            _save(folder / STATE, named, optimizers, settings, step + 1, standings)
    model.eval()


def _save(
    path: Path,
    named: dict[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    settings: str,
    step: int,
    standings: dict[str, Standing],
) -> None:
    """Write the state of a run under a temporary name, then rename: a kill leaves the old file or the new one."""
    tensors = {f"weight/{name}": p.detach() for name, p in named.items()}
    for name, p in named.items():
        for state in (o.state[p] for o in optimizers if p in o.state):
            tensors |= {f"{key}/{name}": value for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    levels = json.dumps({name: [s.level, s.right] for name, s in standings.items()})
    save_file(tensors, unfinished, metadata={"step": str(step), "settings": settings, "standings": levels})
    os.replace(unfinished, path)


def _resume(
    path: Path,
    named: dict[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    settings: str,
) -> tuple[int, dict[str, Standing]]:
    """Read a state back into the model and the optimizer; the number of steps already done, and how far each part had got."""
    if not path.is_file():
        return 0, {}
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as e:
        raise InputError(f"{path} is damaged ({e}); remove it to begin again") from e
    with opened as file:
        header = file.metadata() or {}
        if header.get("settings") != settings:
            raise InputError(f"{path} is of a run with other settings; give another folder or remove it")
        step = int(header["step"])
        standings = {name: Standing(*state) for name, state in json.loads(header["standings"]).items()}
        owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
        for key in file.keys():  # noqa: SIM118
            kind, name = key.split("/", 1)
            p, value = named[name], file.get_tensor(key)
            if kind == "weight":
                with torch.no_grad():
                    p.copy_(value)
            else:
                owner[p].state[p][kind] = value if kind == "step" else value.to(p.device)
    return step, standings
