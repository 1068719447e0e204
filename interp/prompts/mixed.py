"""Several sets of prompts as one, in which every prompt knows its set."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from interp.errors import InputError
from interp.names import AND
from interp.prompts.values import PromptPairs, Prompts, clean_prompts

SET = "set"
"""The tag that tells the sets of a mixture apart."""


def mixed(sets: Mapping[str, Prompts | PromptPairs], seed: int | None = None) -> Prompts:
    """The prompts of several sets in turn: one of the first, one of the second and so on, the longer sets alone at the end.

    In this order the first ones of a mixture are what is made of fewer prompts of each set.

    Args:
        sets: name of a set -> its prompts; of pairs the clean ones. The names are the tag ``set``.
        seed: of the tasks that the sets are named by; dropped where a set is not just what its task makes with it.

    Returns:
        Texts, tokens, contexts, and the positions that all sets name. Answers and other tags do not carry over.

    Raises:
        InputError: there are no sets, or a text without a name.
    """
    if not sets or not all(sets):
        raise InputError("a mixture takes sets of prompts, each with a name")
    single = {name: clean_prompts(found) for name, found in sets.items()}
    seed = seed if all(found.seed == seed and found.task == name for name, found in sets.items()) else None
    turns = zip_longest(*([(name, one, row) for row in range(len(one))] for name, one in single.items()))
    order = [entry for turn in turns for entry in turn if entry is not None]
    shared = set.intersection(*(set(one.positions) for one in single.values())) - {"END"}
    return Prompts(
        texts=tuple(one.texts[row] for _, one, row in order),
        ids=tuple(one.ids[row] for _, one, row in order),
        positions={place: tuple(one.positions[place][row] for _, one, row in order) for place in sorted(shared)},
        contexts=tuple(one.contexts[row] for _, one, row in order),
        tags={SET: tuple(name for name, _, _ in order)},
        task=AND.join(single) if seed is not None else "",
        seed=seed,
    )
