"""Path patching of many senders and receivers: what is sent by one chain of MLPs, what comes of it by a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import Reader
from interp.models.edges import Judge
from interp.models.kept import Kept, keep
from interp.models.paths import ENTRY, Frozen, Rows, Sent, beside, reads_at, sends_at
from interp.models.restart import logits_of, means, prompts_at_once
from interp.progress import progress
from interp.sites import Site
from interp.sweeps.engine import TOLERANCE, sweep
from interp.sweeps.patches import check, columns, whole
from interp.sweeps.plain import floor, last_place, run

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

Group = tuple[Site, ...]
"""Parts that send, or receive, together."""

WAYS = ("", "not before any receiver", "not at the position of a receiver")
"""Where a sender writes: where it can be read; too late; elsewhere, from where only attention could carry it on."""

_CHECKED = 2  # cells that are computed again by whole runs
_HELD = 2**27  # bytes of what receivers take, at once


@dataclass(frozen=True, eq=False)
class Paths:
    """What a sweep over paths found.

    Attributes:
        values: the metric of every cell.
        start: of the run that is patched.
        goal: of the run the senders' values come from.
        blocked: why nothing a sender sends gets to a receiver, one of ``WAYS``; values are then ``start`` to the bit.
        floor: what rounding alone does to the metric.
        deviation: largest difference of the checked cells from four whole runs.
        checked: how many were computed both ways.
        notes: sentences about what was not accelerated, and why.
    """

    values: Float[Tensor, "sender receiver prompt"]
    start: Float[Tensor, " prompt"]
    goal: Float[Tensor, " prompt"]
    blocked: Int[Tensor, "sender receiver"]
    floor: float
    deviation: float
    checked: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Run:
    """Some of the prompts, with what senders send and what receivers would read.

    Attributes:
        sent: what senders send.
        kept: what receivers would read.
        by_column: single logits can be computed alone.
        start: the metric of these prompts.
        goal: that of their partners.
        whole: their run from which a sweep goes on, if one is needed.
    """

    model: HookedModel
    batch: Batch
    reader: Reader
    receivers: Sequence[Group]
    sent: list[list[Sent]]
    kept: dict[Site, Tensor]
    by_column: bool = True
    start: Tensor = torch.empty(0)
    goal: Tensor = torch.empty(0)
    whole: Kept | None = None

    @property
    def judge(self) -> Judge:
        """The metric of these prompts."""
        return _judge(self.reader)


def path_sweep(
    model: HookedModel,
    into: Batch,
    source: Batch,
    senders: Sequence[Group],
    receivers: Sequence[Group],
    reader: Reader,
    *,
    freeze_mlps: bool = False,
    seed: int = 0,
    desc: str = "paths",
) -> Paths:
    """The metric when receivers read what senders would send them directly in another run, and all else runs free.

    What is sent is recorded in a run with all heads held at what they gave, so that it takes no detour through them. Row ``i``
    of ``source`` is the partner of row ``i`` of ``into``; named positions are looked up in each.

    Args:
        model: the model.
        into: the prompts that are run.
        source: the prompts that senders send from.
        senders: ``embed``, ``z`` of heads, ``mlp_out``; those of a group together.
        receivers: ``q``, ``k``, ``v`` of heads, ``resid_mid`` for MLPs, those of a group together; or ``resid_post`` of the last layer,
            at the position of the metric, for the logits.
        reader: the metric, bound to the prompts.
        freeze_mlps: hold MLPs too while it is recorded what is sent.
        seed: of the cells that are checked.
        desc: of the progress bar.

    Raises:
        InputError: a position is unknown, or does not pair up.
    """
    check([s for group in senders for s in group], into, source)
    check([r for group in receivers for r in group], into)
    frozen = Frozen(model, freeze_mlps)
    why = means(model).obstacle or frozen.obstacle()
    values = torch.empty(len(senders), len(receivers), len(into))
    start, goal = torch.empty(len(into)), torch.empty(len(into))
    noise, deviations, checked, notes = 0.0, [0.0], 0, list[str]()
    for rows in _portions(model, into, frozen, senders, receivers):
        batches = into.select(rows), source.select(rows)
        part = _observe(frozen, *batches, senders, receivers, reader[rows], why)
        live = _live(part)
        found = torch.empty(live.shape)
        if not why:
            found[:] = part.start
            rounding, deviation, said = _ride(frozen, part, live, found, seed, desc)
            cells = _draws(live, seed)
            off, own, apart = _checked(frozen, part, found, cells)
            noise, checked = max(noise, rounding, own), checked + len(cells)
            if max(off, default=0.0) > TOLERANCE * noise:
                why = f"the chain of MLPs was off by {max(off):.3g} where rounding is {noise:.3g}"
            noise = max(noise, apart)
            deviations += [deviation, *off]
            notes += [n for n in said if n not in notes]
        if why:
            part = replace(part, start=run(model, batches[0], part.reader), goal=run(model, batches[1], part.reader))
            found = _literally(frozen, part, live, desc)
            noise = max(noise, _rounding(part))
        values[:, :, rows], start[rows], goal[rows] = found, part.start, part.goal
    if why:
        notes.insert(0, f"the plain way, four runs per path: {why}")
    return Paths(values, start, goal, blocked(model, into, senders, receivers), noise, max(deviations), checked, tuple(notes))


def blocked(model: HookedModel, into: Batch, senders: Sequence[Group], receivers: Sequence[Group]) -> Int[Tensor, "sender receiver"]:
    """Which of ``WAYS`` there is from every sender to every receiver."""
    places = {s.position: columns(s.position, into) for group in (*senders, *receivers) for s in group}
    meet = {(p, q): bool((a[:, :, None] == b[:, None]).any()) for p, a in places.items() for q, b in places.items()}
    found = torch.empty(len(senders), len(receivers), dtype=torch.long)
    for i, sent in enumerate(senders):
        for j, read in enumerate(receivers):
            pairs = [meet[s.position, r.position] for s in sent for r in read if sends_at(s) < reads_at(r, model.shape)]
            found[i, j] = 0 if any(pairs) else 2 if pairs else 1
    return found


def _judge(reader: Reader) -> Judge:
    return Judge(lambda logits, rows: reader[rows](logits), reader.position)


def _portions(model: HookedModel, batch: Batch, frozen: Frozen, senders: Sequence[Group], receivers: Sequence[Group]) -> list[list[int]]:
    """As many prompts at once as there is memory to keep what is sent and read in them."""
    behind = _behind(receivers)
    sites = {*frozen.needs(r for group in receivers for r in group), *(_held_in(s) for group in senders for s in group), *behind}
    if behind:  # the run of their partners is kept beside theirs
        sites |= {Site(c, layer) for c in ("resid_pre", "q", "k", "v") for layer in range(model.shape.n_layers)}
    n = prompts_at_once(model, batch, list(sites))
    return [list(range(i, min(i + n, len(batch)))) for i in range(0, len(batch), n)]


def _behind(receivers: Sequence[Group]) -> set[Site]:
    """The activations that the sweep behind receivers sets; none where all of them are the logits."""
    return {whole(_patched(r)) for group in receivers for r in group if r.component != "resid_post"}


def _held_in(sender: Site) -> Site:
    """The activation that holds what is sent: all heads of a layer."""
    return replace(ENTRY, position=sender.position) if sender.component == "embed" else replace(sender, head=None)


def _observe(
    frozen: Frozen, into: Batch, source: Batch, senders: Sequence[Group], receivers: Sequence[Group], reader: Reader, why: str
) -> _Run:
    """Run the prompts and their partners in one pass, to the last attention if that will do; each alone where the chain cannot be used."""
    model, n, ends, behind, kept = frozen.model, len(into), frozen.ends(reader.position), _behind(receivers), None
    wanted = {_held_in(s) for group in senders for s in group} | frozen.needs(r for group in receivers for r in group) | {*ends}
    if why:
        here, there = (model.capture(batch, list(wanted)) for batch in (into, source))
    else:
        if behind:
            kept = keep(model, beside(into, source), [*(wanted | behind)], reader.position)
            both = {site: kept.seen[site] for site in wanted}
        else:
            both = model.capture(beside(into, source), list(wanted))
        here, there = (
            {site: x[rows, : batch.ids.shape[1]] if site.position is None else x[rows] for site, x in both.items()}
            for rows, batch in ((slice(n), into), (slice(n, None), source))
        )
    alone = {site for site in wanted if site.position is not None and columns(site.position, into).shape[1] == 1}
    here, there = ({site: x.unsqueeze(1) if site in alone else x for site, x in run.items()} for run in (here, there))

    places = {p: columns(p, into).to(frozen.device) for p in {s.position for group in senders for s in group}}

    def sent(sender: Site) -> Sent:
        held = _held_in(sender)
        was, value = here[held], there[held]
        if sender.head is not None:
            was, value = was[:, :, sender.head], value[:, :, sender.head]
        return Sent(sender, places[sender.position], was, value)

    found = _Run(model, into, reader, receivers, [[sent(s) for s in group] for group in senders], here, means(model).columns)
    if why:
        return found
    last = frozen.last(*(torch.cat([here[end][:, 0], there[end][:, 0]]) for end in ends))
    values = _metric(found, last, torch.arange(n, device=frozen.device).repeat(2))
    return replace(found, start=values[:n], goal=values[n:], whole=kept and kept.of(slice(n), into.ids.shape[1]))


def _live(run: _Run) -> Tensor:
    """Where anything sent gets to a receiver, [sender receiver prompt]."""
    found = torch.zeros(len(run.sent), len(run.receivers), len(run.batch), dtype=torch.bool)
    places = {p: columns(p, run.batch).to(run.model.device) for p in {r.position for group in run.receivers for r in group}}
    for i, group in enumerate(run.sent):
        for one in group:
            met = {p: _met(one, where) for p, where in places.items()}
            for j, receivers in enumerate(run.receivers):
                for r in receivers:
                    if sends_at(one.site) < reads_at(r, run.model.shape):
                        found[i, j] |= met[r.position]
    return found


def _met(one: Sent, where: Tensor) -> Tensor:
    """The prompts in which what is sent is at any of some tokens, [prompt]."""
    return ((where[:, :, None] == one.where[:, None]) & one.differs[:, None]).flatten(1).any(1).cpu()


def _ride(frozen: Frozen, run: _Run, live: Tensor, found: Tensor, seed: int, desc: str) -> tuple[float, float, tuple[str, ...]]:
    """Fill in all cells: floor, deviation and notes of the sweeps they took."""
    noise, deviation, notes = 0.0, 0.0, ()
    inner = [j for j, group in enumerate(run.receivers) if group[0].component != "resid_post"]
    sites = list(dict.fromkeys(r for j in inner for r in run.receivers[j]))
    step = max(1, _HELD // max(1, sum(_bytes(run, r) for r in sites)))
    for first in range(0, len(run.sent), step):
        some = slice(first, first + step)
        taken = _taken(frozen, run, some, found)
        cells = [(i, j) for i in range(len(run.sent))[some] for j in inner if bool(live[i, j].any())]
        if not cells:
            continue
        patches = [{_patched(r): taken[r][i - first] for r in run.receivers[j]} for i, j in cells]
        swept = sweep(run.model, run.batch, patches, {}, run.reader, seed=seed, observed=run.whole, desc=desc)
        for (i, j), values in zip(cells, swept.values, strict=True):
            found[i, j] = torch.where(live[i, j], values, run.start)  # where nothing arrives it is exactly the run itself
        noise, deviation, notes = max(noise, swept.floor), max(deviation, swept.deviation), tuple(dict.fromkeys((*notes, *swept.notes)))
    return noise, deviation, notes


def _bytes(run: _Run, receiver: Site) -> int:
    """What a receiver takes from one sender, in bytes."""
    width = run.model.shape.d_model if receiver.head is None else run.model.shape.d_head
    return columns(receiver.position, run.batch).numel() * width * run.model.dtype.itemsize


def _patched(receiver: Site) -> Site:
    """An MLP that reads something else gives something else, and that is all."""
    return replace(receiver, component="mlp_out") if receiver.component == "resid_mid" else receiver


def _taken(frozen: Frozen, run: _Run, some: slice, found: Tensor) -> dict[Site, Tensor]:
    """What receivers take from some of the senders, [sender prompt n d]; the metric of changed logits goes to ``found``."""
    sent, shape = run.sent[some], run.model.shape
    out: dict[Site, Tensor] = {}
    everyone = list(dict.fromkeys(r for group in run.receivers for r in group))
    for position in dict.fromkeys(r.position for r in everyone):
        here = [r for r in everyone if r.position == position]
        for r in (r for r in here if r.component != "resid_post"):
            whole = run.kept[replace(_patched(r), head=None)]
            own = whole if r.head is None else whole[:, :, r.head]
            out[r] = own.expand(len(sent), *own.shape).clone()
        where = columns(position, run.batch).to(frozen.device)
        rows = Rows.of(sent, where, max(reads_at(r, shape) for r in here))
        streams = {r: replace(r, component="resid_pre" if r.head is not None else r.component, head=None) for r in here}
        at, budget = 0, run.model._budget
        while at < len(rows):
            step = budget.rows(run.model._bytes_per_token())
            chunk = rows[at : at + step]
            done, _ = budget.attempt(lambda chunk=chunk, s=streams: _send(frozen, run, chunk, s, out, found[some]), len(chunk))
            at += step if done else 0
    return {r: values if r.position is None or values.shape[2] > 1 else values[:, :, 0] for r, values in out.items()}


def _send(
    frozen: Frozen,
    run: _Run,
    rows: Rows,
    streams: dict[Site, Site],
    out: dict[Site, Tensor],
    found: Tensor,
) -> None:
    """One chain: what arrives goes into ``out``, the metric of changed logits into ``found``."""
    wanted = list(dict.fromkeys(streams.values()))
    for stream, changed, x in frozen.streams(run.kept, rows, wanted):
        readers = [r for r, s in streams.items() if (s.component, s.layer) == (stream.component, stream.layer)]
        if not readers or not changed:
            continue
        sender, prompt = rows.sender[:changed], rows.prompt[:changed]
        if stream.component == "resid_post":
            found[sender.cpu(), _column(run, readers[0]), prompt.cpu()] = _metric(run, x, prompt)
            continue
        for r, values in frozen.received(readers, run.kept, rows, x).items():
            out[r][sender, prompt, rows.place[:changed]] = values


def _column(run: _Run, receiver: Site) -> int:
    """The column of a receiver that stands alone."""
    return next(j for j, group in enumerate(run.receivers) if group == (receiver,))


def _metric(run: _Run, stream: Tensor, prompt: Tensor) -> Tensor:
    """The metric of last streams, [row]."""
    some, tokens = run.reader[prompt.cpu()], run.reader.columns
    if tokens is None or not run.by_column:
        return some(logits_of(run.model, stream)).cpu()
    return some.values(logits_of(run.model, stream, tokens.to(stream.device)[prompt])).cpu()


def _draws(live: Tensor, seed: int) -> list[tuple[int, int, int]]:
    """Some cells in which something arrives."""
    cells = live.nonzero()
    picked = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[:_CHECKED]
    return [tuple(c) for c in cells[picked].tolist()]


def _cells(frozen: Frozen, run: _Run, cells: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor, float]:
    """Cells by whole runs side by side; their prompts without a patch; and how the last place of logits moves the metric."""
    prompts = [p for *_, p in cells]
    reader, moved = run.reader[prompts], [0.0]

    def judged(logits: Tensor, rows: Tensor) -> Tensor:
        values = reader[rows](logits)
        moved.append(float((reader[rows](last_place(logits)) - values).abs().max()))
        return values

    sent, receivers = [], []
    for row, (i, j, p) in enumerate(cells):
        one = torch.tensor([row])
        sent += [(Sent(s.site, s.where[p : p + 1], s.was[p : p + 1], s.value[p : p + 1]), one) for s in run.sent[i]]
        receivers += [(r, one) for r in run.receivers[j]]
    values, before = frozen.literal(run.batch.select(prompts), sent, receivers, Judge(judged, reader.position))
    return values, before, max(moved)


def _checked(frozen: Frozen, run: _Run, found: Tensor, cells: Sequence[tuple[int, int, int]]) -> tuple[list[float], float, float]:
    """How far cells, and prompts without a patch, are from whole runs; what rounding does there, and a batch of another size."""
    if not cells:
        return [], _rounding(run), 0.0
    want, before, noise = _cells(frozen, run, cells)
    off = [_apart(float(found[c]), w) for c, w in zip(cells, want.tolist(), strict=True)]
    off += [_apart(float(run.start[c[2]]), w) for c, w in zip(cells, before.tolist(), strict=True)]
    if max(off) > TOLERANCE * noise:  # a path may make a run more sensitive: how far are whole runs from themselves in these cells?
        noise = max(
            noise, _rounding(run), *(_apart(float(_cells(frozen, run, [c])[0]), float(w)) for c, w in zip(cells, want, strict=True))
        )
    if run.whole is None or run.whole.logits is None:
        return off, noise, 0.0
    prompts = [p for *_, p in cells]
    return off, noise, float((run.reader[prompts](run.whole.logits[prompts]).cpu() - before).abs().max())


def _rounding(run: _Run) -> float:
    some = list(range(min(_CHECKED, len(run.batch))))
    return floor(run.model, run.batch.select(some), run.reader[some])


def _literally(frozen: Frozen, run: _Run, live: Tensor, desc: str) -> Tensor:
    """All cells by whole runs."""
    found, everyone = run.start.expand(*live.shape).clone(), torch.arange(len(run.batch))
    for i, group in enumerate(progress(run.sent, desc)):
        for j, receivers in enumerate(run.receivers):
            if bool(live[i, j].any()):
                values, _ = frozen.literal(
                    run.batch, [(s, everyone) for s in group], [(r, everyone) for r in receivers], _judge(run.reader)
                )
                found[i, j] = torch.where(live[i, j], values, run.start)
    return found


def _apart(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b)  # infinities may be equal
