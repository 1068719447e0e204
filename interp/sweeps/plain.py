"""The plain way: one forward of the whole model per patch. Slow, obviously right, and what every short cut is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.metrics import Reader
from interp.models.interventions import Change, Entry, Hooks, Ledger, Part, Write
from interp.progress import progress
from interp.sites import Site
from interp.sweeps.patches import Patch, Setting, Source, as_captured, check, of_prompts, settings, sites_of

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel


_HELD = 64  # patches whose values are in memory at once
_APART = 8  # prompts that are run again in a batch of their own


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
        return _judged(model.logits(some, at=reader.position)[:1], reader[rows[:1]])


def last_place(logits: Tensor) -> Tensor:
    """Logits that moved at random by up to one unit in the last place of the largest."""
    # Hugging Face takes some softmaxes and norms in fp32 even in an fp64 model.
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
    draws = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device) * 2 - 1
    return logits.float() + eps * float(logits.abs().max()) * draws


def shaken(reader: Reader, logits: Float[Tensor, "prompt vocab"]) -> float:
    """The largest change of the metric when every logit moves so."""
    return float((reader(last_place(logits)) - reader(logits)).abs().max())


def cells(model: HookedModel, batch: Batch, chosen: Sequence[tuple[Sequence[Setting], int]], reader: Reader) -> list[tuple[float, float]]:
    """What ``cell`` gives for some patches of single prompts, as rows of one run: every row has a patch of its own.

    Args:
        model: the model.
        batch: prompts.
        chosen: a patch, and the prompt it is for.
        reader: the metric.
    """
    rows = [row for _, row in chosen]
    some, ledger, found = batch.select(rows), Ledger(), dict[int, tuple[float, float]]()

    def run(part: Part) -> Tensor:
        def prepare(hooks: Hooks) -> None:
            for at, i in enumerate(part.rows.tolist()):
                for setting in (of_prompts(s, [rows[i]], part.batch.ids.shape[1]) for s in chosen[i][0]):
                    ledger.entries.append(Entry(setting.site))
                    change = _in_row(at, as_captured(setting.values, setting.site))
                    hooks.act(Write(setting.site, change, "all", ledger.entries[-1]))

        where, inverse = part.batch.index(reader.position).unique(return_inverse=True)
        with torch.no_grad():
            return model.forward(part, prepare, keep=where).logits[torch.arange(len(inverse)), inverse]

    for part, logits in model.each(some, model._bytes_per_token(), run):
        found |= {i: _judged(own, reader[[rows[i]]]) for i, own in zip(part.rows.tolist(), logits.split(1), strict=True)}
    ledger.check()
    return [found[i] for i in range(len(rows))]


def _judged(logits: Tensor, reader: Reader) -> tuple[float, float]:
    """The metric of one prompt, and how the last place of its logits moves it."""
    value = reader(logits)
    return float(value[0]), float((reader(last_place(logits)) - value).abs()[0])


def _in_row(row: int, value: Tensor) -> Change:
    """Sets an activation in one row."""

    def change(x: Tensor, part: Part) -> Tensor:
        x = x.clone()
        x[row] = value[0].to(x)
        return x

    return change


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
    """What rounding alone does to the metric; see ``rounding``."""
    return baseline(model, batch, reader)[1]


def baseline(model: HookedModel, batch: Batch, reader: Reader) -> tuple[Float[Tensor, " prompt"], float]:
    """The metric of a run without a patch, and what rounding alone does to it; see ``rounding``."""
    logits = model.logits(batch, at=reader.position)
    return reader(logits).cpu(), rounding(model, batch, reader, logits)


def rounding(model: HookedModel, batch: Batch, reader: Reader, logits: Float[Tensor, "prompt vocab"]) -> float:
    """What rounding alone does to the metric.

    That is its largest change when some of the prompts run in a batch of another size, or when every logit of all of them moves at
    random by up to one unit in the last place of the largest.

    Args:
        model: the model.
        batch: the prompts.
        reader: the metric.
        logits: of a run of all prompts.
    """
    whole, rows, worst = reader(logits).cpu(), list(range(len(batch))), shaken(reader, logits)
    for part in [rows[:_APART]] if len(rows) > _APART else [rows[::2], rows[1::2]] if len(rows) > 1 else [[0, 0]]:
        worst = max(worst, float((run(model, batch.select(part), reader[part]) - whole[part]).abs().max()))
    return worst
