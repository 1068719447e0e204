"""What every task is: examples as plain strings, drawn from streams keyed by (seed, prompt index)."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, TypeVar, get_args, get_origin, get_type_hints

from interp.errors import InputError
from interp.tasks.words import WordList

if TYPE_CHECKING:
    from interp.models import HookedModel
    from interp.prompts import PromptPairs, Prompts
    from interp.prompts.encoding import Tokenizing

T = TypeVar("T")
Words = Mapping[str, Sequence[str]]
Spans = Mapping[str, tuple[tuple[int, int], ...]]


class Stream:
    """Random draws that depend on a key and on nothing else.

    Built on ``Random.random`` alone, whose sequence Python promises to keep: the shipped models know
    facts and canaries drawn from such streams.
    """

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(str(k) for k in key)).random

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return self._random()

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        return int(self._random() * n)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Iterable[T], k: int) -> list[T]:
        """``k`` different items in random order."""
        pool = list(items)
        if k > len(pool):
            raise ValueError(f"cannot draw {k} different items from {len(pool)}")
        for i in range(k):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """All items in random order."""
        pool = list(items)
        return self.sample(pool, len(pool))


def balanced(n: int, index: int, *key: object) -> int:
    """The entry of prompt ``index`` in a sequence that goes through 0..n-1 in random order, again and again."""
    block, place = divmod(index, n)
    return Stream(*key, "block", block).shuffled(range(n))[place]


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """Write the values into a template and say where they came to stand: the text and field -> (start, end)."""
    text, places = "", {}
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is not None:
            places[name] = (len(text), len(text) + len(values[name]))
            text += values[name]
    return text, places


@dataclass(frozen=True)
class Example:
    """One prompt as plain strings.

    ``text + answer`` is ordinary running text: the answer brings its leading space along.

    Attributes:
        text: the prompt.
        answer: what should follow; empty where nothing is asked.
        distractor: a plausible continuation that is wrong here.
        options: the continuations among which a guess would choose, the answer included.
        spans: name of a position -> the character ranges (start, end) of ``text`` it stands for.
        corrupt: the counterfactual prompt with the same named positions.
        context: examples with the same context must not be on both sides of a split.
        tags: what one may want to group by.
        target: the continuation where it is usually longer than a token.
    """

    text: str
    answer: str
    distractor: str | None = None
    options: tuple[str, ...] = ()
    spans: Spans = field(default_factory=dict)
    corrupt: Example | None = None
    context: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None


@dataclass(frozen=True)
class Rules:
    """How examples of a task become tokens.

    Attributes:
        one_token: every answer, distractor and option must be one token.
        several: positions that may be several tokens; all others must be one.
        following: positions for which NAME+1, the token behind, is named too.
        last: positions for which NAME_last, the last of its tokens, is named too.
        aligned: clean and corrupt prompt must have equally many tokens.
    """

    one_token: bool = True
    several: tuple[str, ...] = ()
    following: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    aligned: bool = True


@cache
def _option_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _allowed(hint: Any) -> tuple[tuple[type, ...], tuple[object, ...]]:
    """The types and the fixed values an annotation admits."""
    if get_origin(hint) is Literal:
        return (), get_args(hint)
    if get_args(hint):
        parts = [_allowed(a) for a in get_args(hint)]
        return tuple(t for p in parts for t in p[0]), tuple(v for p in parts for v in p[1])
    return (hint,), ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A generator of prompts with known answers, and the judge of a model's answers.

    The options of a task are the fields of its class. The text form shows those that differ from
    their defaults, ``boxes(n_boxes=3)``, and reads back as the same task.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    ranges: ClassVar[Mapping[str, tuple[int, int]]] = {}
    rules: ClassVar[Rules] = Rules()

    def __post_init__(self) -> None:
        """Refuse option values of a wrong kind or out of range."""
        for option, hint in _option_types(type(self)).items():
            value = getattr(self, option)
            types, values = _allowed(hint)
            if type(value) not in types and not any(value is v or (value == v and type(value) is type(v)) for v in values):
                names = [t.__name__ for t in types if t is not type(None)] + [str(v) for v in values]
                if type(None) in types:
                    names.append("None")
                self._refuse(option, value, " or ".join(names))
            low, high = self.ranges.get(option, (None, None))
            if low is not None and high is not None and isinstance(value, int) and not low <= value <= high:
                self._refuse(option, value, f"{low} to {high}")

    def _refuse(self, option: str, value: object, expected: str) -> NoReturn:
        raise InputError(f"{self.name}: {option} is {value!r}, expected {expected}")

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The options, in the order of the class."""
        return tuple(f.name for f in fields(cls))

    def having(self, **options: object) -> Self:
        """The same task with other options.

        Raises:
            InputError: an option the task does not have, or a value it cannot take.
        """
        for option in options:
            if option not in self.option_names():
                known = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self)) or "none"
                raise InputError(f"{self.name} has no option {option!r}; its options: {known}")
        return replace(self, **options)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The text form."""
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    @property
    @abstractmethod
    def chance(self) -> float | None:
        """Expected score of a uniform choice among an example's options; None where there is no score."""

    def word_lists(self) -> dict[str, WordList]:
        """The lists of words that must be one token each."""
        return {}

    def words(self) -> tuple[str, ...]:
        """Every string that must be one token, with its leading space: a tokenizer trained on these fits the task."""
        return tuple(dict.fromkeys(form for words in self.word_lists().values() for word in words.words for form in words.forms(word)))

    @abstractmethod
    def example(self, seed: int, index: int, words: Words) -> Example:
        """Example ``index`` of a seed, with words from the given lists."""

    def examples(self, n: int, seed: int = 0, **options: object) -> list[Example]:
        """``n`` examples as plain strings, from the full word lists.

        Examples depend on the seed and their index only, so more of them never change the first ones.

        Raises:
            InputError: ``n`` is not positive, or an option does not exist.
        """
        task = self.having(**options)
        words = {name: w.words for name, w in task.word_lists().items()}
        return task.draw(n, seed, words)

    def draw(self, n: int, seed: int, words: Words) -> list[Example]:
        """``n`` examples with words from the given lists."""
        if n < 1:
            raise InputError(f"{self.name}: n is {n}, expected at least 1 prompt")
        return [self.example(seed, index, words) for index in range(n)]

    def usable(self, model: Tokenizing) -> Words:
        """The words of every list that are one token for the model's tokenizer.

        Raises:
            InputError: a list has too few; the words that fail are named.
        """
        from interp.tasks.tokens import usable_words

        return usable_words(model, self.name, self.word_lists())

    def generate(self, model: Tokenizing, n: int, seed: int = 0, **options: object) -> Prompts | PromptPairs:
        """``n`` prompts for the model's tokenizer, with answers and named positions; pairs where the task has counterfactuals.

        Args:
            model: a model or a pair; only its tokenizer is used.
            n: how many; asking for more does not change the first ones.
            seed: of the random draws.
            **options: fields of the task's class.

        Raises:
            InputError: an unknown option, too few words that are one token, or a context that is too short.
        """
        from interp.tasks.tokens import prompts_of

        task = self.having(**options)
        return prompts_of(model, task.draw(n, seed, task.usable(model)), task.rules, str(task), seed)

    def score(self, model: HookedModel, prompts: Prompts | PromptPairs, among: Literal["vocabulary", "options"] = "vocabulary"):
        """Which prompts the model answers rightly, Bool [prompt]; of pairs, the clean ones.

        Args:
            model: the model.
            prompts: of this task.
            among: the answer must be the most likely token of the whole ``vocabulary``, or only of the
                prompt's ``options``; ``chance`` is that of the latter.

        Raises:
            InputError: the prompts have no one-token answers, or no options.
        """
        from interp.tasks.scoring import most_likely

        return most_likely(model, prompts, among)
