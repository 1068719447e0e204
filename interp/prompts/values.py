"""Prompts and pairs of prompts as values: tokens, named positions, answers; slices, splits, digests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from interp.errors import InputError
from interp.prompts.encoding import Tokenizing, answer_tokens, encode
from interp.prompts.files import columns, numbered_lines, write

if TYPE_CHECKING:
    from interp.models.batch import Batch

Positions = Mapping[str, tuple[tuple[int, ...], ...]]

_NAME = re.compile(r"[A-Za-z_][\w+\-]*")


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts as texts and tokens; every field has one entry per prompt.

    ``Prompts(texts, model)`` reads texts with the tokenizer of a model or of a pair; ``answers`` and ``distractors`` are
    then words of one token each, with their leading space, as in ``Prompts(["2 + 2 ="], model, answers=[" 4"])``.

    Attributes:
        texts: the texts.
        ids: token ids, with the special tokens that come first; or the model whose tokenizer reads the texts.
        positions: name -> token indices of each prompt, from its first token; several for a set. ``END``,
            the last token, is always there.
        answers: the token that should follow, or None where answers are not one token.
        distractors: a wrong token to compare with, or None.
        options: the tokens a guess would choose from, or None.
        targets: the text that should follow where it may be several tokens, or None.
        contexts: prompts with the same context are kept together by ``split``.
        tags: what to group by: name -> value per prompt.
        task: text form of the task they come from, or "".
        seed: of the task, or None where the task does not make exactly these: of a selection, or of what was changed since.
        drawn: digest of what the task made with that seed.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...] = ()
    positions: Positions = field(default_factory=dict)
    answers: tuple[int, ...] | None = None
    distractors: tuple[int, ...] | None = None
    options: tuple[tuple[int, ...], ...] | None = None
    targets: tuple[str, ...] | None = None
    contexts: tuple[str, ...] = ()
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    task: str = ""
    seed: int | None = None
    drawn: str = ""

    if TYPE_CHECKING:  # at run time it is that of the dataclass

        def __init__(
            self, texts: str | Iterable[str], ids: Tokenizing | tuple[tuple[int, ...], ...] = (), positions: Positions = ..., **more: Any
        ) -> None: ...

    def __post_init__(self) -> None:
        """Read texts with a model; add END and contexts, check that everything has an entry per prompt, drop a seed of other prompts."""
        if not isinstance(self.ids, tuple):
            self._read(self.ids)
        n = len(self.texts)
        if not n:
            raise InputError("there are no prompts")
        if not self.ids:
            raise InputError("these texts have no tokens; write Prompts(texts, model), with the model whose tokenizer reads them")
        end = tuple((len(row) - 1,) for row in self.ids)
        if self.positions.get("END", end) != end:
            raise InputError("END is the last token of a prompt and cannot name another one")
        object.__setattr__(self, "positions", {**{k: v for k, v in self.positions.items() if k != "END"}, "END": end})
        object.__setattr__(self, "contexts", self.contexts or self.texts)
        filled = {f: getattr(self, f) for f in ("ids", "answers", "distractors", "options", "targets", "contexts")}
        filled |= {f"position {k}": v for k, v in self.positions.items()} | {f"tag {k}": v for k, v in self.tags.items()}
        for name, column in filled.items():
            if column is not None and len(column) != n:
                raise InputError(f"{name} has {len(column)} entries for {n} prompts")
        for name, rows in self.positions.items():
            if not _NAME.fullmatch(name):
                raise InputError(f"{name!r} cannot name a position; use letters, digits, _ and +")
            for number, (row, ids) in enumerate(zip(rows, self.ids, strict=True)):
                if any(not 0 <= i < len(ids) for i in row):
                    raise InputError(f"position {name} of prompt {number} is {list(row)}, but the prompt has {len(ids)} tokens")
        if self.seed is not None:
            now = self.digest
            if self.drawn in ("", now):
                object.__setattr__(self, "drawn", now)
            else:
                object.__setattr__(self, "seed", None)

    def _read(self, model: Any) -> None:
        """Take the place of a model by what its tokenizer makes of the texts."""
        if not hasattr(model, "tokens") or not hasattr(model, "tokenizer"):
            raise InputError(f"Prompts(texts, model) reads texts with the tokenizer of a model, and a {type(model).__name__} has none")
        read = type(self).of(model, self.texts, self.answers, self.distractors)  # type: ignore[arg-type]
        for name in ("texts", "ids", "answers", "distractors"):
            object.__setattr__(self, name, getattr(read, name))

    def __repr__(self) -> str:
        """How many, of what, how long."""
        return f"<{self._told()}: {self.texts[0]!r}{', ...' if len(self) > 1 else ''}>"

    def _told(self) -> str:
        lengths = sorted(map(len, self.ids))
        tokens = f"{lengths[0]}" if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"
        source = f" of {self.task}" if self.task else ""
        return f"{len(self)} prompt{'' if len(self) == 1 else 's'}{source}, {tokens} token{'' if tokens == '1' else 's'}"

    def _repr_html_(self) -> str:
        """The first texts, with what should follow, and the named positions."""
        from interp.plots.cell import SHOWN, table

        named = f"; positions {', '.join(self.positions)}" if len(self.positions) > 1 else ""
        columns: dict[str, Any] = {"text": self.texts, "tokens": [len(row) for row in self.ids]}
        columns |= {"target": self.targets} if self.targets is not None else {}
        columns |= {"answer (token id)": self.answers} if self.answers is not None else {}
        columns |= {"distractor (token id)": self.distractors} if self.distractors is not None else {}
        return table(self._told() + named, tuple(columns), list(zip(*(c[:SHOWN] for c in columns.values()), strict=True)), of=len(self))

    @classmethod
    def of(
        cls,
        model: Tokenizing,
        texts: str | Iterable[str],
        answers: Sequence[str] | None = None,
        distractors: Sequence[str] | None = None,
    ) -> Self:
        """Prompts from texts, and their answers, each one token (mind the leading space).

        Raises:
            InputError: no texts, an empty one, one longer than the context, not as many answers as texts,
                or an answer that is not one token behind its prompt.
        """
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        if not texts:
            raise InputError("there are no prompts")
        encoded = encode(model, texts)
        found: dict[str, tuple[int, ...] | None] = {}
        for what, words in (("answer", answers), ("distractor", distractors)):
            if words is not None and len(words) != len(texts):
                raise InputError(f"there are {len(words)} {what}s for {len(texts)} prompts")
            found[what] = None if words is None else answer_tokens(model, encoded, words, what)
        return cls(texts, tuple(e.ids for e in encoded), answers=found["answer"], distractors=found["distractor"])

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.texts)

    def __iter__(self) -> Iterator[Self]:
        """Prompts of one, in order."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, which: int | slice | Sequence[int]) -> Self:
        """Some of the prompts; the first ones are what their task makes when it is asked for fewer."""
        rows = _rows(which, len(self))

        def take(column: Any) -> Any:
            return None if column is None else tuple(column[i] for i in rows)

        taken = {f: take(getattr(self, f)) for f in ("texts", "ids", "answers", "distractors", "options", "targets", "contexts")}
        places = {name: take(column) for name, column in self.positions.items()}
        taken |= {"positions": places, "tags": {name: take(column) for name, column in self.tags.items()}}
        first = rows == list(range(len(rows)))
        return replace(self, **taken, seed=self.seed if first else None, drawn="" if first else self.drawn)

    def batch(self) -> Batch:
        """The prompts as a right-padded batch."""
        from interp.models.batch import Batch

        return Batch.of([list(row) for row in self.ids], positions=self.positions)

    def split(self, by: str = "context", seed: int = 0, fraction: float = 0.5) -> tuple[Self, Self]:
        """Two disjoint parts; prompts with the same context, or the same value of a tag, stay together.

        Args:
            by: ``context``, or the name of a tag.
            seed: decides which groups go where. A group's rank depends on the seed and its own name only.
            fraction: of the groups that go into the first part, rounded, at least one.

        Raises:
            InputError: no such tag, a fraction outside (0, 1), or fewer than two groups.
        """
        first, second = _split(self, by, seed, fraction)
        return self[first], self[second]

    @property
    def digest(self) -> str:
        """sha256 of everything but where it comes from: the same for the same content."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("task", "seed", "drawn")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per prompt, as ``to_jsonl`` writes them."""
        optional = {"answer": self.answers, "distractor": self.distractors, "options": self.options, "target": self.targets}
        rows = []
        for i, text in enumerate(self.texts):
            row: dict[str, Any] = {"text": text, "ids": self.ids[i], "positions": {k: v[i] for k, v in self.positions.items()}}
            row |= {name: column[i] for name, column in optional.items() if column is not None}
            row |= {"context": self.contexts[i], "tags": {k: v[i] for k, v in self.tags.items()}}
            row |= {"task": self.task, "seed": self.seed} | ({"drawn": self.drawn} if self.drawn else {})
            rows.append(row)
        return rows

    def to_jsonl(self, path: str | Path) -> Path:
        """Write one JSON object per line; ``Prompts.read`` gives the same prompts back."""
        return write(path, self.records())

    @classmethod
    def read(cls, path: str | Path, model: Tokenizing) -> Self:
        """Prompts from a file: JSONL (objects with at least ``text``, or strings), or ``.txt`` with one prompt per line.

        ``answer``, ``distractor`` and ``options`` are texts with their leading space, each one token
        behind the prompt. ``spans`` names positions by characters, ``{"S1": [4, 8]}``, ``positions`` by
        token indices. Files written by ``to_jsonl`` also hold token ids, and are refused where the
        model's tokenizer gives other ones.

        Raises:
            InputError: no such file, an empty one, or a line that cannot be used (it is numbered).
        """
        return cls(**columns(model, numbered_lines(path), Path(path).name))


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Clean prompts and their corrupt counterparts, one for one, with the same named positions.

    Attributes:
        clean: the prompts whose answer is asked for.
        corrupt: the counterfactuals; token counts may differ, named positions correspond.
    """

    clean: Prompts
    corrupt: Prompts

    def __post_init__(self) -> None:
        """Refuse what does not correspond."""
        if len(self.clean) != len(self.corrupt):
            raise InputError(f"there are {len(self.clean)} clean prompts and {len(self.corrupt)} corrupt ones; expected as many")
        if set(self.clean.positions) != set(self.corrupt.positions):
            only = sorted(set(self.clean.positions) ^ set(self.corrupt.positions))
            raise InputError(f"clean and corrupt prompts name different positions: {', '.join(only)} on one side only")

    def __repr__(self) -> str:
        """How many, of what, how long."""
        return f"<{len(self)} clean and corrupt: {self.clean!r}, {self.corrupt!r}>"

    def _repr_html_(self) -> str:
        """The first pairs."""
        from interp.plots.cell import SHOWN, table

        columns: dict[str, Any] = {"clean": self.clean.texts, "corrupt": self.corrupt.texts}
        columns |= {"answer (token id)": self.answers} if self.answers is not None else {}
        title = f"clean and corrupt: {self.clean._told()}"
        return table(title, tuple(columns), list(zip(*(c[:SHOWN] for c in columns.values()), strict=True)), of=len(self))

    @classmethod
    def of_task(cls, clean: Prompts, corrupt: Prompts) -> Self:
        """Pairs as their task makes them; the counterfactuals alone are nothing that a command of the task makes."""
        bare = replace(corrupt, seed=None)
        return cls(clean, replace(bare, drawn=cls(clean, bare).digest))

    @property
    def answers(self) -> tuple[int, ...] | None:
        """Answers of the clean prompts."""
        return self.clean.answers

    @property
    def distractors(self) -> tuple[int, ...] | None:
        """Distractors of the clean prompts."""
        return self.clean.distractors

    @property
    def contexts(self) -> tuple[str, ...]:
        """Contexts of the clean prompts."""
        return self.clean.contexts

    @property
    def tags(self) -> Mapping[str, tuple[str, ...]]:
        """Tags of the clean prompts."""
        return self.clean.tags

    @property
    def task(self) -> str:
        """Text form of the task they come from, or ""."""
        return self.clean.task

    @property
    def seed(self) -> int | None:
        """Seed of the task, or None where the task does not make exactly these pairs."""
        return self.clean.seed if self.corrupt.drawn == self.digest else None

    @property
    def aligned(self) -> bool:
        """True where every pair has equally many tokens, so that what happens at an index can be exchanged."""
        return all(len(a) == len(b) for a, b in zip(self.clean.ids, self.corrupt.ids, strict=True))

    def require_difference(self) -> None:
        """Refuse pairs that no difference can be told by.

        Raises:
            InputError: every corrupt prompt is its clean one.
        """
        if self.clean.ids == self.corrupt.ids:
            raise InputError("clean and corrupt prompts are the same, token for token, so there is no difference to explain")

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.clean)

    def __iter__(self) -> Iterator[Self]:
        """Pairs one by one, in order."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, which: int | slice | Sequence[int]) -> Self:
        """Some of the pairs."""
        clean, corrupt = self.clean[which], self.corrupt[which]
        first = self.seed is not None and clean.seed is not None
        return type(self).of_task(clean, corrupt) if first else replace(self, clean=clean, corrupt=corrupt)

    def split(self, by: str = "context", seed: int = 0, fraction: float = 0.5) -> tuple[Self, Self]:
        """Two disjoint parts, as ``Prompts.split`` of the clean prompts."""
        first, second = _split(self.clean, by, seed, fraction)
        return self[first], self[second]

    @property
    def digest(self) -> str:
        """sha256 of the content of both sides."""
        return hashlib.sha256(f"{self.clean.digest} {self.corrupt.digest}".encode()).hexdigest()

    def to_jsonl(self, path: str | Path) -> Path:
        """Write one object with ``clean`` and ``corrupt`` per line; ``PromptPairs.read`` gives the same pairs back."""
        pairs = zip(self.clean.records(), self.corrupt.records(), strict=True)
        return write(path, [{"clean": clean, "corrupt": corrupt} for clean, corrupt in pairs])

    @classmethod
    def read(cls, path: str | Path, model: Tokenizing) -> Self:
        """Pairs from a JSONL file of objects with ``clean`` and ``corrupt``, each as in ``Prompts.read``.

        Raises:
            InputError: no such file, an empty one, or a line that cannot be used (it is numbered).
        """
        lines, sides = numbered_lines(path), []
        for side in ("clean", "corrupt"):
            for number, row in lines:
                if not isinstance(row, dict) or set(row) != {"clean", "corrupt"}:
                    form = "an object with clean and corrupt alone, each with its own text and answer"
                    raise InputError(f"line {number} of {Path(path).name} is not a pair; expected {form}")
            sides.append(Prompts(**columns(model, [(number, row[side]) for number, row in lines], f"{Path(path).name}, {side}")))
        return cls(*sides)


def clean_prompts(prompts: Prompts | PromptPairs) -> Prompts:
    """The prompts that are asked: of pairs the clean ones."""
    return prompts.clean if isinstance(prompts, PromptPairs) else prompts


def _rows(which: int | slice | Sequence[int], n: int) -> list[int]:
    """The chosen indices, from 0."""
    if isinstance(which, slice):
        rows = list(range(n)[which])
    else:
        wanted = [which] if isinstance(which, int) else [int(i) for i in which]
        if any(isinstance(i, bool) for i in ([which] if isinstance(which, int) else which)):
            raise InputError("prompts are chosen by their indices, not by true and false")
        outside = [i for i in wanted if not -n <= i < n]
        if outside:
            # IndexError for a single index, as sequences promise.
            raise (IndexError if isinstance(which, int) else InputError)(f"there is no prompt {outside[0]}; there are {n}")
        rows = [i % n for i in wanted]
    if not rows:
        raise InputError(f"no prompts are left of {n}")
    return rows


def _split(prompts: Prompts, by: str, seed: int, fraction: float) -> tuple[list[int], list[int]]:
    """The rows of the two parts."""
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction}, expected more than 0 and less than 1")
    if by != "context" and by not in prompts.tags:
        raise InputError(f"prompts cannot be split by {by!r}; known: {', '.join(('context', *prompts.tags))}")
    keys = prompts.contexts if by == "context" else prompts.tags[by]
    groups = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    if len(groups) < 2:
        raise InputError(f"prompts with a single {by} cannot be split by it: {groups[0][:60]!r}")
    size = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
    first = set(groups[:size])
    return [i for i, key in enumerate(keys) if key in first], [i for i, key in enumerate(keys) if key not in first]
