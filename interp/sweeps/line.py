"""Answers and text at points of the line between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.metrics import METRICS, Reader, kl_divergence
from interp.models.batch import Batch
from interp.models.line import Line
from interp.progress import progress
from interp.prompts import Prompts
from interp.sweeps.answers import Among, margin
from interp.sweeps.predictions import CELLS, final, following, pieces, stretches

if TYPE_CHECKING:
    from interp.models.pair import ModelPair

Point = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Answers:
    """What the prompts' answers get at every point.

    Attributes:
        margin: logit of the answer less the largest other among the candidates; right where above 0.
        logprob: of the answer, over the shared vocabulary.
        diff: logit of the answer less that of the distractor, or None.
    """

    margin: Float[Tensor, "point prompt"]
    logprob: Float[Tensor, "point prompt"]
    diff: Float[Tensor, "point prompt"] | None


def answers(line: Line, points: Sequence[Point], prompts: Prompts, batch: Batch, among: Among, vocab: int) -> Answers:
    """Ask at every point.

    Args:
        line: the line.
        points: share of tuning for each kind of weights.
        prompts: with answers.
        batch: the same.
        among: candidates for being right.
        vocab: ids below it are compared.
    """
    read: dict[str, Reader] = {"margin": margin(prompts, among), "logprob": METRICS["answer_logprob"].reader(prompts)}
    if prompts.distractors is not None:
        read["diff"] = METRICS["logit_diff"].reader(prompts)
    step = max(1, CELLS // vocab)
    found = {name: torch.zeros(len(points), len(batch)) for name in read}
    for i, point in enumerate(progress(points, "answers on the line", total=len(points))):
        model = line.at(point)
        for start in range(0, len(batch), step):
            rows = list(range(start, min(start + step, len(batch))))
            logits = model.logits(batch.select(rows), at="END")[:, :vocab]
            for name, reader in read.items():
                found[name][i, rows] = reader[rows](logits).cpu()
    return Answers(found["margin"], found["logprob"], found.get("diff"))


def running_text(line: Line, points: Sequence[Point], pair: ModelPair, batch: Batch, vocab: int) -> Float[Tensor, "what point text"]:
    """Loss, KL(base || point) and KL(tuned || point), means over the tokens that follow another one, in nats; float64.

    Texts go in stretches whose final streams of base and tuned are kept, so that these run once however many points there are.

    Args:
        line: the line.
        points: as for ``answers``.
        pair: whose line it is.
        batch: texts of at least two tokens.
        vocab: ids below it are compared; next tokens beyond it are left out of the loss.
    """
    sums = torch.zeros(3, len(points), len(batch), dtype=torch.float64)
    counts = torch.zeros(2, len(batch), dtype=torch.float64)  # tokens that follow, and those of them that are compared
    groups = list(stretches(batch))
    for rows in progress(groups, "text on the line", total=len(groups)):
        part = batch.select(rows)
        ends = [final(model, part) for model in (pair.base, pair.tuned)]
        for i, point in enumerate(points):
            model = line.at(point)
            for piece in pieces([pair.base, pair.tuned, model], [*ends, final(model, part)], rows, batch, vocab):
                base, tuned, own = piece.logp
                after = following(batch, piece, vocab)
                follows = (piece.pos + 1 < batch.lengths.cpu()[piece.prompt]).double()
                nll = -own.gather(1, after.clamp(min=0).to(own.device)[:, None])[:, 0].double().cpu() * (after >= 0)
                kl = [kl_divergence(end, own).double().cpu() * follows for end in (base, tuned)]
                sums[:, i].index_add_(1, piece.prompt, torch.stack([nll, *kl]))
                if i == 0:
                    counts.index_add_(1, piece.prompt, torch.stack([follows, (after >= 0).double()]))
    return sums / torch.stack([counts[1], counts[0], counts[0]])[:, None].clamp_min(1)
