"""The plain way: one forward of the whole model per patch. Slow, obviously right, and what every short cut is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.metrics import Reader
from interp.models.interventions import Part
from interp.progress import progress
from interp.sites import Site
from interp.sweeps.patches import Patch, Setting, Source, as_captured, check, of_prompts, settings, sites_of

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel


_HELD = 64  # patches whose values are in memory at once


def run(model: HookedModel, batch: Batch, reader: Reader) -> Float[Tensor, " prompt"]:
    """The metric of a run without a patch."""
    return reader(model.logits(batch, at=reader.position)).cpu()


def patched(model: HookedModel, batch: Batch, patch: Sequence[Setting], reader: Reader) -> Float[Tensor, " prompt"]:
    """The metric of one patched run."""
    with model.patched({s.site: as_captured(s.values, s.site) for s in patch}):
        return run(model, batch, reader)


def cell(model: HookedModel, batch: Batch, patch: Sequence[Setting], reader: Reader, rows: Sequence[int]) -> tuple[float, float]:
    """The metric of one patched run of the first of some prompts, run by themselves; and how the last place of its logits moves it."""
    rows = list(rows)
    some = batch.select(rows)
    settings = [of_prompts(s, rows, some.ids.shape[1]) for s in patch]
    with model.patched({s.site: as_captured(s.values, s.site) for s in settings}):
        logits = model.logits(some, at=reader.position)[:1]
    first = reader[rows[:1]]
    value = first(logits)
    return float(value[0]), float((first(last_place(logits)) - value).abs()[0])


def last_place(logits: Tensor) -> Tensor:
    """Logits that moved at random by up to one unit in the last place of the largest."""
    # Hugging Face takes some softmaxes and norms in fp32 even in an fp64 model.
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
    draws = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device) * 2 - 1
    return logits.float() + eps * float(logits.abs().max()) * draws


def plain(
    model: HookedModel, batch: Batch, patches: Sequence[Site | Patch], source: Source, reader: Reader, *, desc: str = "patches"
) -> Float[Tensor, "patch prompt"]:
    """The metric of one run per patch, each of them a run of the whole model; arguments as for ``sweep``.

    Every patch is computed in the shape of the run without one, so that a patch that changes nothing gives the same numbers.
    """
    todo = sites_of(patches)
    check([s for p in todo for s in p], batch, source[1] if isinstance(source, tuple) else None)
    out = torch.empty(len(todo), len(batch))
    found: list[list[Setting]] = []
    for i in progress(range(len(todo)), desc):
        if i % _HELD == 0:
            found = settings(model, Part.of(batch), todo[i : i + _HELD], source)
        out[i] = patched(model, batch, found[i % _HELD], reader)
    return out


def floor(model: HookedModel, batch: Batch, reader: Reader) -> float:
    """What rounding alone does to the metric.

    Its largest change when the same prompts run in batches of another size, or when every logit moves at random by up to one
    unit in the last place of the largest.
    """
    logits = model.logits(batch, at=reader.position)
    whole = reader(logits).cpu()
    worst = float((reader(last_place(logits)).cpu() - whole).abs().max())
    rows = range(len(batch))
    for part in [rows[::2], rows[1::2]] if len(rows) > 1 else [[0, 0]]:
        part = list(part)
        worst = max(worst, float((run(model, batch.select(part), reader[part]) - whole[part]).abs().max()))
    return worst
