"""Texts as the tokens a model reads, and the place of every token in its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from interp.errors import InputError


class Tokenizing(Protocol):
    """What prompts need of a model: its tokens, its tokenizer and the length of its context."""

    @property
    def tokenizer(self) -> Any: ...  # noqa: D102

    @property
    def shape(self) -> Any: ...  # noqa: D102

    def tokens(self, text: str) -> list[int]: ...  # noqa: D102


@dataclass(frozen=True)
class Encoded:
    """A text as tokens.

    Attributes:
        text: the text.
        ids: token ids with the special tokens that come first; those that would close the text are left
            out, since the model is read, and goes on, at the end of the prompt.
        offsets: the characters (start, end) of the text each token stands for; (0, 0) for special tokens.
        special: how many special tokens come first.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: int

    def covering(self, span: tuple[int, int]) -> tuple[int, ...]:
        """The tokens that hold any character of a span."""
        start, end = span
        return tuple(i for i, (a, b) in enumerate(self.offsets) if a < end and b > start)

    def covered(self, tokens: Sequence[int]) -> str:
        """The text that neighbouring tokens stand for, without spaces around it."""
        return self.text[min(self.offsets[i][0] for i in tokens) : max(self.offsets[i][1] for i in tokens)].strip()


def _walked_offsets(tokenizer: Any, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Offsets for a tokenizer that gives none, from the lengths of the decoded beginnings of the text."""

    def decoded(n: int) -> str:
        return tokenizer.decode(list(ids[:n]), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    whole = decoded(len(ids))
    lead = len(text) - len(text.lstrip(" ")) - (len(whole) - len(whole.lstrip(" ")))
    if whole.lstrip(" ") != text.lstrip(" "):
        raise InputError(f"the tokenizer does not reproduce a text, so places in it cannot be found: {text[:60]!r} became {whole[:60]!r}")
    ends = [0]
    for n in range(1, len(ids) + 1):
        part = decoded(n)
        # A character cut in the middle decodes to replacement characters that the whole text does not have.
        while part and not whole.startswith(part) and part.endswith("\ufffd"):
            part = part[:-1]
        ends.append(max(ends[-1], len(part) + lead))
    # The tokens of one character all begin where it begins and end behind it.
    offsets, start = [], 0
    for n in range(1, len(ends)):
        end = next((e for e in ends[n:] if e > start), len(text))
        offsets.append((start, end))
        start = ends[n]
    return offsets


def encode(model: Tokenizing, texts: Sequence[str]) -> list[Encoded]:
    """The texts as the model reads them, with the place of every token in its text.

    Works with fast tokenizers and with those that give no offsets.

    Raises:
        InputError: a text is empty, is no valid Unicode, or does not fit the model's context.
    """
    tokenizer, limit = model.tokenizer, model.shape.n_ctx
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"prompt {number} is a {type(text).__name__}, expected a text")
        if not text:
            raise InputError(f"prompt {number} is empty")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError(f"prompt {number} holds half of a surrogate pair and is no valid Unicode: {text[:60]!r}")
    given = tokenizer(list(texts), add_special_tokens=False, **({"return_offsets_mapping": True} if tokenizer.is_fast else {}))
    found = []
    for number, (text, plain) in enumerate(zip(texts, given["input_ids"], strict=True)):
        plain, ids = list(plain), list(model.tokens(text))
        places = given["offset_mapping"][number] if tokenizer.is_fast else _walked_offsets(tokenizer, text, plain)
        skip = 0  # a model loaded with bos="never" takes a first token off that the text spells out
        while skip < len(plain) and _start(ids, plain[skip:]) is None and plain[skip] == getattr(tokenizer, "bos_token_id", None):
            skip += 1
        start = _start(ids, plain[skip:])
        if start is None or skip == len(plain):
            raise InputError(f"special tokens change the other tokens of prompt {number}, so places in it cannot be found: {text[:60]!r}")
        kept = ids[: start + len(plain) - skip]
        if len(kept) > limit:
            raise InputError(f"prompt {number} has {len(kept)} tokens, but the model's context holds {limit}: {text[:60]!r}")
        offsets = [(0, 0)] * start + [(int(a), int(b)) for a, b in places[skip:]]
        found.append(Encoded(text, tuple(kept), tuple(offsets), start))
    return found


def _start(ids: list[int], part: list[int]) -> int | None:
    """Where ``part`` begins in ``ids``."""
    return next((i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part), None)


def continuations(model: Tokenizing, prompts: Sequence[Encoded], more: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens that each prompt gains when a text is written behind it.

    Raises:
        InputError: the last token of a prompt changes, so the text is not a continuation in tokens.
    """
    if not more:
        return []
    whole = model.tokenizer([p.text + m for p, m in zip(prompts, more, strict=True)], add_special_tokens=False)["input_ids"]
    found = []
    for prompt, text, ids in zip(prompts, more, whole, strict=True):
        plain = list(prompt.ids[prompt.special :])
        start = _start(list(ids), plain) if plain else None
        if start is None:
            raise InputError(
                f"{text[:40]!r} behind {prompt.text[-40:]!r} changes the tokens before it, so it cannot follow them{_hint(text)}"
            )
        found.append(tuple(ids[start + len(plain) :]))
    return found


def answer_tokens(model: Tokenizing, prompts: Sequence[Encoded], answers: Sequence[str], what: str = "answer") -> tuple[int, ...]:
    """The one token of each answer, as it follows its prompt.

    Raises:
        InputError: an answer is not one token there; its pieces are named.
    """
    found = []
    for number, (answer, ids) in enumerate(zip(answers, continuations(model, prompts, answers), strict=True)):
        if len(ids) != 1:
            pieces = ", ".join(repr(model.tokenizer.decode([i])) for i in ids) or "nothing"
            raise InputError(f"the {what} {answer!r} of prompt {number} is {len(ids)} tokens ({pieces}), expected one{_hint(answer)}")
        found.append(int(ids[0]))
    return tuple(found)


def _hint(text: str) -> str:
    return "" if text[:1].isspace() else "; words usually need their leading space"
