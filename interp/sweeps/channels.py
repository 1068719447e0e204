"""Many ways to steer channels in few runs: what heads then attend to, checked against whole runs; halves of prompts, random directions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError
from interp.models.steered import Judge, Steered, Ways
from interp.progress import progress
from interp.sites import Heads, Site

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

_Run = tuple[Tensor, Tensor, Tensor, Tensor | None]
_CHECKED = 6  # rows that are computed by whole runs too


@dataclass(frozen=True, eq=False)
class Found:
    """What was read in every way.

    Attributes:
        paid: attention to the sets of tokens.
        told: what the judge gave; None without one.
        checked: rows that were computed by whole runs too.
        deviation: largest difference of attention there.
        floor: how much whole runs of these rows differ by rounding.
        note: why everything was computed by whole runs, or "".
    """

    paid: Float[Tensor, "way prompt head target"]
    told: Float[Tensor, "way prompt n"] | None
    checked: int
    deviation: float
    floor: float
    note: str


def sweep(steered: Steered, ways: Ways, judge: Judge | None = None, *, seed: int = 0, desc: str = "ways") -> Found:
    """Every prompt in every way; some rows also by whole runs of the model, and all of them where these disagree.

    Args:
        steered: the model and what is steered.
        ways: to what.
        judge: what is read of the logits.
        seed: of the rows that are checked.
        desc: of the progress bar.
    """
    n = len(steered.batch)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(ways) * n, generator=draw)[:_CHECKED]
    way, prompt = rows // n, rows % n
    together, told = steered.plain(ways, way, prompt, judge)
    alone = torch.cat([steered.plain(ways, way[i : i + 1], prompt[i : i + 1])[0] for i in range(len(rows))])
    floor = float((together - alone).abs().max())
    paid, judged = _all(steered, ways, judge, desc)
    deviation = float((paid[way, prompt] - together).abs().max())
    note = steered.allowed.obstacle
    allowed = 4 * max(floor, 8 * torch.finfo(steered.model.dtype).eps)
    if not note and not deviation <= allowed:
        note = f"going on from kept runs gave other attention ({deviation:.2g}) than whole runs do"
        plain = replace(steered)
        plain.allowed = replace(steered.allowed, obstacle=note)
        paid, judged = _all(plain, ways, judge, desc)
    return Found(paid, judged, len(rows), deviation, floor, note)


def _all(steered: Steered, ways: Ways, judge: Judge | None, desc: str) -> tuple[Tensor, Tensor | None]:
    n = len(steered.batch)
    paid = torch.zeros(len(ways), n, len(steered.look.heads), len(steered.look.keys))
    judged = None
    for way, prompt, attention, told in _told(steered(ways, judge), len(ways) * n, desc):
        paid[way, prompt] = attention.float()
        if told is not None:
            judged = torch.zeros(len(ways), n, *told.shape[1:]) if judged is None else judged
            judged[way, prompt] = told.float()
    return paid, judged


def _told(runs: Iterator[_Run], total: int, desc: str) -> Iterator[_Run]:
    bar = iter(progress(range(total), desc, total=total, unit="run"))
    for found in runs:
        yield found
        for _ in range(len(found[0])):
            next(bar, None)
    next(bar, None)


def heads_at(text: Heads | str, model: HookedModel, position: str | int) -> list[Site]:
    """Heads from their text, at their positions or at one.

    Raises:
        InputError: a head that the model lacks, or one that is named twice.
    """
    found = [site.at(position) if site.position is None else site for site in model.sites(list(Heads.parse(text).sites("z")))]
    if twice := [str(site) for i, site in enumerate(found) if site.at(None) in [s.at(None) for s in found[:i]]]:
        raise InputError(f"{twice[0]} is named twice")
    return found


def movers_of(text: Heads | str, model: HookedModel, query: str | int, name: str) -> list[tuple[int, int]]:
    """Layer and head of those whose attention is read.

    Raises:
        InputError: as ``heads_at``; or a position that is not the query.
    """
    found = heads_at(text, model, query)
    if other := [site for site in found if site.position != place(query)]:
        where = other[0].position
        raise InputError(f"{other[0]}: the attention of {name} is read from {query}; leave the position out or choose query={where}")
    return [(site.layer or 0, site.head or 0) for site in found]


def later(senders: Sequence[Site], movers: Sequence[tuple[int, int]]) -> None:
    """Refuse senders that no receiver can read.

    Raises:
        InputError: a receiver that is not in a later layer than a sender.
    """
    for layer, head in movers:
        for sender in senders:
            if not (sender.layer or 0) < layer:
                raise InputError(f"L{layer}H{head} is not later than {sender}: a head reads what heads of earlier layers have written")


def half(contexts: Sequence[str], fraction: float, seed: int) -> Bool[Tensor, " prompt"]:
    """Prompts of some of the contexts: what something is chosen on; all others are what it is judged on.

    Raises:
        InputError: a fraction outside (0, 1), or fewer than two contexts.
    """
    if not 0 < fraction < 1:
        raise InputError(f"dev is the share of contexts to choose on, more than 0 and less than 1, but it is {fraction!r}")
    known = sorted(set(contexts), key=lambda c: hashlib.sha256(f"{seed}/{c}".encode()).digest())
    if len(known) < 2:
        raise InputError("prompts of a single context cannot be divided into some to choose on and some to judge on")
    chosen = set(known[: min(max(round(fraction * len(known)), 1), len(known) - 1)])
    return torch.tensor([c in chosen for c in contexts])


def random_directions(basis: Float[Tensor, "rank d_model"], many: int, draws: torch.Generator) -> Float[Tensor, "many d_model"]:
    """Orthonormal directions drawn evenly from the span of others: what a head can write along."""
    drawn = torch.randn(len(basis), many, generator=draws, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.mT @ basis


def place(position: str | int) -> str | int:
    """A position as prompts take it: "-2" is -2."""
    found = Site("z", 0, None, position).position
    assert found is not None
    return found


def generator(*key: object) -> torch.Generator:
    """Random numbers that depend on a key alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


def single(batch: Batch, position: str | int, what: str) -> Tensor:
    """The one token of a position in every prompt.

    Raises:
        InputError: it names none or several in some prompt.
    """
    try:
        return batch.index(position).cpu()
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
