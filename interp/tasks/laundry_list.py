"""Recall of the one item of a list that was not mentioned again, after the Laundry List task of Merullo et al. 2024 (arXiv 2406.09519)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from interp.tasks.base import Example, Stream, Task, Words, balanced, fill
from interp.tasks.words import CHORES, NAMES, WordList

TEMPLATES = {
    "T1": ("Today {name1} is packing and needs ", ". Now {name2} already has ", ". So {name3} still needs the"),
    "T2": ("On the list of {name1} are ", ". So far {name2} found ", ", so the only thing left is the"),
    "T3": ("Today {name1} has to clean ", ". After cleaning ", ", {name2} will clean the"),
}


def _join(fields: Sequence[str]) -> str:
    """A list in words: the a, the b and the c."""
    items = [f"the {{{name}}}" for name in fields]
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


@dataclass(frozen=True, kw_only=True)
class LaundryList(Task):
    """A list of things, all but one of them mentioned again: which one is left?

    Answer: the item that is not mentioned again; distractor: one that is; options: the listed items;
    chance 1 / length. In the counterfactual the answer takes the distractor's place among the mentioned
    again, so the distractor is left: one token differs and the answer flips. The templates, lists and
    lengths are ours: those of the paper are not published.

    Positions: ``item1..N`` (first mentions, in order), ``again1..N-1`` (second mentions, in order), the
    sets ``items`` and ``again``, ``target`` and ``distractor`` (first mention of the clean prompt's
    answer and distractor, on both sides), ``END``.

    Attributes:
        length: items in the list.
        slot: place of the answer in the list, from 1; None: all places equally often.
        template: T1 packing, T2 finding, T3 cleaning, or ``mixed``.
        order: second mentions ``shuffled``, or in the ``same`` order as the list.
    """

    length: int = 5
    slot: int | None = None
    template: Literal["mixed", "T1", "T2", "T3"] = "mixed"
    order: Literal["shuffled", "same"] = "shuffled"

    name: ClassVar[str] = "laundry_list"
    summary: ClassVar[str] = "Which item of a list is left when all others were mentioned again."
    paper: ClassVar[str] = "after Merullo et al. 2024, arXiv 2406.09519"
    ranges: ClassVar[dict[str, tuple[int, int]]] = {"length": (2, 10), "slot": (1, 10)}

    def __post_init__(self) -> None:
        """Refuse a slot behind the end of the list."""
        super().__post_init__()
        if self.slot is not None and self.slot > self.length:
            self._refuse("slot", self.slot, f"1 to length={self.length}")

    @property
    def chance(self) -> float:
        """A guess among the listed items."""
        return 1 / self.length

    def word_lists(self) -> dict[str, WordList]:
        """Items and names."""
        return {"items": WordList(CHORES, self.length), "names": WordList(NAMES, 1)}

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        n, stream = self.length, Stream("laundry_list", seed, index)
        items, name = stream.sample(words["items"], n), stream.choice(words["names"])
        target = balanced(n, index, "laundry_list", seed) if self.slot is None else self.slot - 1
        rest = [i for i in range(n) if i != target]
        mentioned = rest if self.order == "same" else stream.shuffled(rest)
        distractor = stream.choice(rest)
        which = stream.choice(sorted(TEMPLATES)) if self.template == "mixed" else self.template
        opening, middle, ending = TEMPLATES[which]
        listed, again = [f"item{i + 1}" for i in range(n)], [f"again{i + 1}" for i in range(n - 1)]
        template = opening + _join(listed) + middle + _join(again) + ending
        options = tuple(f" {o}" for o in items)
        context = " ".join(sorted(items))
        tags = {"template": which, "slot": str(target + 1)}

        def side(left: int, wrong: int, second: Sequence[int], corrupt: Example | None) -> Example:
            values = {f"item{i + 1}": o for i, o in enumerate(items)} | {f"again{i + 1}": items[o] for i, o in enumerate(second)}
            text, at = fill(template, values | {f"name{i}": name for i in (1, 2, 3)})
            spans = {f: (at[f],) for f in (*listed, *again)}
            spans |= {"items": tuple(at[f] for f in listed), "again": tuple(at[f] for f in again)}
            spans |= {"target": (at[f"item{target + 1}"],), "distractor": (at[f"item{distractor + 1}"],)}
            return Example(text, options[left], options[wrong], options, spans, corrupt, context, tags)

        swapped = [target if i == distractor else i for i in mentioned]
        return side(target, distractor, mentioned, side(distractor, target, swapped, None))


TASK = LaundryList
