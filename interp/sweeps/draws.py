"""Random heads beside chosen ones: every draw another set, and how many sets there are."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

from interp.errors import InputError
from interp.sites import Site

if TYPE_CHECKING:
    from interp.metrics import Metric, Reader
    from interp.models import Batch
    from interp.models.checkpoint import Shape

T = TypeVar("T")
Position = str | int | None


@dataclass(frozen=True)
class Drawn(Generic[T]):
    """Sets that were drawn, no two alike.

    Attributes:
        sets: as many as were asked for, or all there are if these are fewer.
        there: how many there are.
    """

    sets: tuple[tuple[T, ...], ...]
    there: int


def checked_draws(control: object) -> int:
    """The number of draws.

    Raises:
        InputError: it is none.
    """
    if type(control) is not int or control < 0:
        raise InputError(f"control is a number of draws, but it is {control!r}")
    return control


def distinct(pools: Sequence[tuple[Sequence[T], int]], draws: int, seed: str, but: Collection[T] | None = None) -> Drawn[T]:
    """Draws of so many members of each pool, without those that came before.

    Args:
        pools: members, and how many of them a set takes.
        draws: how many sets; where there are no more, all are taken, in order.
        seed: of the draws.
        but: one set that is not to come up.
    """
    taken = None if but is None else frozenset(but)
    there = math.prod(math.comb(len(pool), n) for pool, n in pools) - (taken is not None)
    if there <= draws:
        every = product(*(combinations(pool, n) for pool, n in pools))
        sets = (tuple(member for part in parts for member in part) for parts in every)
        return Drawn(tuple(s for s in sets if frozenset(s) != taken) if draws else (), max(there, 0))
    found: dict[frozenset[T], tuple[T, ...]] = {}
    stream = _sets(pools, seed)
    while len(found) < draws:
        some = next(stream)
        if frozenset(some) != taken:
            found.setdefault(frozenset(some), some)
    return Drawn(tuple(found.values()), there)


def _sets(pools: Sequence[tuple[Sequence[T], int]], seed: str) -> Iterator[tuple[T, ...]]:
    i = 0
    while True:
        draw = random.Random(f"{seed} {i}")
        yield tuple(member for pool, n in pools for member in draw.sample(pool, n))
        i += 1


def unread(batch: Batch, nodes: Iterable[Site], read: Iterable[Reader | Metric]) -> set[Position]:
    """Positions of nodes at which what the last layer writes is read by nobody: they are no prompt's END, and END is all that is read."""
    if any(reader.position != "END" for reader in read):
        return set()
    places, ends = {site.position for site in nodes if site.position is not None}, (batch.lengths.cpu() - 1).tolist()
    return {p for p in places if not any(end in tokens for end, tokens in zip(ends, batch.at(p), strict=True))}


def other_heads(
    group: Sequence[Site], circuit: Collection[Site], shape: Shape, draws: int, seed: str, unread: Collection[Position] = ()
) -> Drawn[Site]:
    """Other heads in place of a group's: at each position as many, from the layers that the group spans there, none of the circuit.

    Args:
        group: heads at positions.
        circuit: the whole circuit, no head of which is drawn, at any position.
        shape: of the model.
        draws: how many sets.
        seed: of the draws.
        unread: positions at which nobody reads what the last layer writes, so that its heads would be no control.
    """
    own: dict[Position, list[int]] = {}
    for site in group:
        own.setdefault(site.position, []).append(site.layer or 0)
    known = {(s.layer, s.head) for s in circuit}
    pools = []
    for position, layers in own.items():
        last = min(max(layers), shape.n_layers - 1 - (position in unread))
        there = [(layer, head) for layer in range(min(layers), last + 1) for head in range(shape.n_heads)]
        pools.append(([Site("z", *head, position) for head in there if head not in known], len(layers)))
    return distinct(pools, draws, seed)


def how_many(drawn: int, there: int) -> str:
    """How many draws these are, in words: ``10 draws``, ``all 3 that there are``, ``the only ones there are``."""
    if there == 1:
        return "the only ones there are"
    return f"all {there} sets there are" if drawn == there else f"{drawn} draw{'s' * (drawn != 1)}"


def present(draws: Tensor) -> Tensor:
    """Those that there are."""
    return draws[~draws.isnan()]


def moments(draws: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of those that there are; NaN without any, or any two."""
    found = present(draws).double()
    return float(found.mean()) if len(found) else math.nan, float(found.std()) if len(found) > 1 else math.nan
