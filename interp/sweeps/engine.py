"""The metric of every patch on every prompt, by the shortest way that gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.metrics import Reader
from interp.models.interventions import Part
from interp.models.kept import Kept, keep
from interp.models.restart import Restart, logits_of, means, prompts_at_once, wave_bytes
from interp.progress import progress, unfinished
from interp.sites import Site
from interp.sweeps.patches import Patch, Setting, Source, check, settings, sites_of, wholes
from interp.sweeps.plain import cell, cells, patched, rounding, shaken
from interp.sweeps.saved import Progress, identity_of, progress_of
from interp.sweeps.waves import Cells, tables, wave

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

CHECKED = 8
"""Cells of an accelerated sweep that are computed again the plain way."""

TOLERANCE = 4.0
"""How many times the floor they may deviate."""


@dataclass(frozen=True, eq=False)
class Swept:
    """What a sweep found.

    Attributes:
        values: the metric of every patched run.
        baseline: the metric without a patch.
        way: ``restart`` from a cached run, or ``plain``: one run of the model per patch.
        floor: what rounding alone does to the metric.
        deviation: largest difference of the checked cells from the plain way.
        checked: how many cells were computed both ways.
        notes: sentences about what was not accelerated, and why.
    """

    values: Float[Tensor, "patch prompt"]
    baseline: Float[Tensor, " prompt"]
    way: Literal["restart", "plain"]
    floor: float
    deviation: float
    checked: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """Some of the prompts, with what every patch sets in them, and the run that cells go on from unless all take the plain way."""

    model: HookedModel
    part: Part
    reader: Reader
    patches: list[list[Setting]]
    kept: Kept | None


def sweep(
    model: HookedModel,
    batch: Batch,
    patches: Sequence[Site | Patch],
    source: Source,
    reader: Reader,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    observed: Kept | None = None,
    desc: str = "patches",
) -> Swept:
    """The metric of one run per patch, with the sites of the patch set to their values in a source run.

    Row ``i`` of a source run is the partner of row ``i`` of ``batch``. A named position is looked up in each of the two
    batches, so the prompts of a pair may differ in length; a site without a position sets all positions and needs partners
    of one length. Cells in which a patch changes nothing, or nothing that can reach what is read, are the baseline to the bit.

    Args:
        model: the model that is run and patched.
        batch: its prompts.
        patches: what to set, per run: a site, several that act together, or several with their values.
        source: the model and the prompts the values come from (other prompts in the same model, the same prompts in
            another model, or both), or a value per site.
        reader: the metric, bound to the prompts.
        seed: of the cells that are checked.
        folder: where finished cells are kept while a long sweep runs; given again, an interrupted one goes on. By default
            the folder of unfinished work, where there is one (``interp.progress.keeping``).
        observed: a run of these prompts that is there already, with what ``wholes`` names and the logits that are read. Whoever gives it
            sees to it that the floor knows of batches of another size too.
        desc: of the progress bar.

    Raises:
        InputError: the batches do not pair up, a position is unknown, a site or value cannot be patched, or the folder
            holds another sweep.
    """
    todo = sites_of(patches)
    check([s for p in todo for s in p], batch, source[1] if isinstance(source, tuple) else None)
    can, base, noise = means(model), torch.zeros(len(batch)), 0.0
    identity = [] if folder is None and unfinished() is None else [*identity_of(model, batch, todo, source, reader), seed]
    state = progress_of((len(todo), len(batch)), folder, identity)
    state.why = state.why or can.obstacle
    deviations, checked, behind = [0.0], 0, [True] * len(todo)
    notes = [] if can.columns or state.why else ["the whole vocabulary was unembedded"]
    embeds = [i for i, p in enumerate(todo) if any(s.layer is None for s in p)]
    if embeds and not state.why:
        notes.append(f"{len(embeds)} of {len(todo)} patches took the plain way: they set the embedding")

    def computed() -> Iterator[None]:
        nonlocal noise, checked
        for rows in _portions(model, batch, todo) if observed is None else [list(range(len(batch)))]:
            part = Part.of(batch, rows)
            partners = (source[0], source[1].select(rows)) if isinstance(source, tuple) else source
            some, wanted = reader[rows], wholes(model, todo)
            kept = observed or (None if state.why else keep(model, part.batch, wanted, reader.position))
            logits = model.logits(part.batch, at=reader.position) if kept is None or kept.logits is None else kept.logits
            base[rows] = some(logits).cpu()
            state.begin(rows, base[rows])
            noise = max(noise, rounding(model, part.batch, some, logits) if observed is None else shaken(some, logits))
            job = Job(model, part, some, settings(model, part, todo, partners, kept and kept.seen), kept)
            read = part.batch.index(reader.position).to(model.device)[:, None]
            for i, patch in enumerate(job.patches):
                behind[i] &= not any(bool((s.where <= read).any()) for s in patch)
            if not state.why:
                yield from _restarted(job, state, embeds, can.columns)
                yield from _plainly(job, state, embeds)
                found = _compared(job, state, seed)
                off = max((_apart(got, want) for _, _, got, want, _ in found), default=0.0)
                # A patch may make logits larger, or a run more sensitive: how far is the plain way from itself in these cells?
                noise = max([noise, *(moved for *_, moved in found)])
                if off > TOLERANCE * noise:
                    noise = max(noise, *(_apart(want, _plain_cell(job, i, [row, row - 1])[0]) for i, row, _, want, _ in found))
                if off > TOLERANCE * noise:
                    state.give_up(f"going on from a cached run was off by {off:.3g} where rounding is {noise:.3g}", rows)
                deviations.append(off)
                checked += len(found)
            if state.why:
                yield from _plainly(job, state, range(len(todo)))

    for _ in progress(computed(), desc, total=len(todo) * len(batch), unit="cell"):
        pass
    state.finish()
    if state.why:
        notes.insert(0, f"the plain way, one run per patch: {state.why}")
    if any(behind):
        notes.append(f"{sum(behind)} of {len(todo)} patches are behind the position that the metric reads, so they change exactly nothing")
    way = "plain" if state.why else "restart"
    return Swept(state.values, base, way, noise, max(deviations), checked, tuple(notes))


def _portions(model: HookedModel, batch: Batch, patches: Sequence[Patch]) -> list[list[int]]:
    """As many prompts at once as there is memory to keep their runs."""
    n = prompts_at_once(model, batch, list({Site(s.component, s.layer) for p in patches for s in p}))
    return [list(range(i, min(i + n, len(batch)))) for i in range(0, len(batch), n)]


def _restarted(job: Job, state: Progress, leave: Sequence[int], columns: bool) -> Iterator[None]:
    """Go on from the kept run of the prompts, wave by wave; yields once per cell."""
    model, batch, reader = job.model, job.part.batch, job.reader
    rows = job.part.rows
    patches = [[] if i in leave else p for i, p in enumerate(job.patches)]
    todo = Cells.of(patches, batch.index(reader.position).to(model.device), model.shape.n_layers)
    yield from [None] * (len(rows) * (len(patches) - len(leave)) - len(todo))
    if not len(todo) or job.kept is None:
        return
    held, go = tables(patches, model.shape.n_layers), Restart(model.wrapped, job.kept)
    tokens = reader.columns if columns else None
    vocabulary = model.shape.d_vocab if tokens is None else 0

    def compute(at: int, stop: int) -> None:
        prompt = todo.prompt[at:stop]
        stream = go(wave(todo, at, stop, held))
        some = reader[prompt.cpu()]
        if tokens is None:
            found = some(logits_of(model, stream))
        else:
            found = some.values(logits_of(model, stream, tokens.to(stream.device)[prompt]))
        state.put(todo.patch[at:stop].cpu(), rows[prompt.cpu()], found.cpu())

    def halved(at: int, stop: int) -> None:
        """Compute cells, in two halves when memory runs out."""
        done, _ = model._budget.attempt(lambda: compute(at, stop), stop - at)
        if not done:
            middle = (at + stop) // 2
            halved(at, middle)
            halved(middle, stop)

    for at, stop in todo.waves(lambda start, end: model._budget.rows(wave_bytes(model, start, end, vocabulary))):
        if not bool(state.done[todo.patch[at:stop].cpu(), rows[todo.prompt[at:stop].cpu()]].all()):
            halved(at, stop)
        yield from [None] * (stop - at)


def _plainly(job: Job, state: Progress, which: Iterable[int]) -> Iterator[None]:
    """One run of the model per patch; yields once per cell."""
    rows = job.part.rows
    for i in which:
        changes = any(bool(s.differs.any()) for s in job.patches[i])
        if changes and not bool(state.done[i, rows].all()):
            state.put(i, rows, patched(job.model, job.part.batch, job.patches[i], job.reader))
        yield from [None] * len(rows)


def _compared(job: Job, state: Progress, seed: int) -> list[tuple[int, int, float, float, float]]:
    """Patch and prompt of some cells, drawn from all in which something changes; their values here, the plain way, and its rounding."""
    changes = torch.stack([torch.stack([s.differs.any(1) for s in p]).any(0) for p in job.patches]).nonzero().tolist()
    draws = torch.randperm(len(changes), generator=torch.Generator().manual_seed(seed))[:CHECKED].tolist()
    if not draws:
        return []
    chosen = [changes[i] for i in draws]
    want = cells(job.model, job.part.batch, [(job.patches[patch], prompt) for patch, prompt in chosen], job.reader)
    got = [float(state.values[patch, job.part.rows[prompt]]) for patch, prompt in chosen]
    return [(patch, prompt, value, *plainly) for (patch, prompt), value, plainly in zip(chosen, got, want, strict=True)]


def _plain_cell(job: Job, patch: int, prompts: Sequence[int]) -> tuple[float, float]:
    return cell(job.model, job.part.batch, job.patches[patch], job.reader, prompts)


def _apart(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b)  # infinities may be equal
