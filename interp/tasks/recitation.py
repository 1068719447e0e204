"""Verbatim recitation of random-word canaries (measured as in Merullo et al. 2025, arXiv 2510.24256)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

from interp.errors import InputError
from interp.tasks.base import Example, Rules, Stream, Task, Words
from interp.tasks.words import CANARY

if TYPE_CHECKING:
    from interp.models import HookedModel
    from interp.prompts import PromptPairs, Prompts

CANARIES = 200
WORDS_PER_CANARY = 64


@lru_cache(maxsize=8)
def canaries(number: int) -> tuple[tuple[str, ...], ...]:
    """The canaries of a book: 64 words each, drawn uniformly and independently."""
    return tuple(
        tuple(stream.choice(CANARY) for _ in range(WORDS_PER_CANARY))
        for stream in (Stream("recitation", "book", number, i) for i in range(CANARIES))
    )


@dataclass(frozen=True, kw_only=True)
class Recitation(Task):
    """The beginning of a text of random words: does the model go on word for word?

    There are 200 canaries of 64 words per book, fixed by the book's number; the seed only orders them.
    Nothing but memory can continue them: chance is 0. A second book that was never trained on is the
    control. ``split`` keeps a canary on one side, so that what is chosen on some is tested on others.

    Attributes:
        prefix: words of the prompt; the other ``64 - prefix`` are to be recited.
        book: which canaries.
        judged: ``strict``: greedy decoding gives exactly the tokens of the rest; ``loose``: at most a quarter
            of them have to be changed, taken out or put in.
    """

    prefix: int = 40
    book: int = 0
    judged: Literal["strict", "loose"] = "strict"

    name: ClassVar[str] = "recitation"
    summary: ClassVar[str] = "Word-for-word continuation of random texts: known only to a model that memorised them."
    paper: ClassVar[str] = "made up; measured as in Merullo et al. 2025, arXiv 2510.24256"
    rules: ClassVar[Rules] = Rules(one_token=False)
    ranges: ClassVar[dict[str, tuple[int, int]]] = {"prefix": (1, WORDS_PER_CANARY - 1)}

    @property
    def chance(self) -> float:
        """Nobody guesses a random text."""
        return 0.0

    def words(self) -> tuple[str, ...]:
        """The words of the canaries; the task works with tokenizers that split them too."""
        return tuple(f" {w}" for w in CANARY)

    def draw(self, n: int, seed: int, words: Words) -> list[Example]:
        """``n`` different canaries.

        Raises:
            InputError: a book has fewer canaries than that.
        """
        if n > CANARIES:
            raise InputError(f"recitation: n is {n}, but a book has {CANARIES} canaries")
        return super().draw(n, seed, words)

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One canary, cut in two."""
        number = Stream("recitation", "order", seed).shuffled(range(CANARIES))[index]
        canary = canaries(self.book)[number]
        rest = " " + " ".join(canary[self.prefix :])
        text = " ".join(canary[: self.prefix])
        return Example(text, rest, context=f"canary {self.book}.{number}", tags={"canary": str(number)}, target=rest)

    def score(self, model: HookedModel, prompts: Prompts | PromptPairs, among: Literal["vocabulary", "options"] = "vocabulary"):
        """Which canaries are recited, Bool [prompt]: what greedy decoding gives, held against the tokens of the rest."""
        from interp.prompts import clean_prompts
        from interp.tasks.reciting import distances, loose, passages, recitations

        if among == "options":
            raise InputError("recitation has no options to choose among; score it among the vocabulary")
        texts = passages(model, clean_prompts(prompts))
        distance = distances(recitations(model, texts), texts.rests)
        return loose(distance, texts.lengths) if self.judged == "loose" else distance == 0


TASK = Recitation
