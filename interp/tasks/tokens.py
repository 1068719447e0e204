"""Examples as prompts of a model: words that are one token, named positions, answers, alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from interp.errors import InputError
from interp.prompts import PromptPairs, Prompts
from interp.prompts.encoding import Encoded, Tokenizing, answer_tokens, continuations, encode
from interp.tasks.base import Example, Rules, Words
from interp.tasks.words import WordList

ANCHOR = "the"
"""A word to stand before others when their tokens are asked for: some tokenizers treat the beginning of a text specially."""


def _behind_anchor(model: Tokenizing, texts: Sequence[str]) -> list[tuple[int, ...]]:
    anchor = encode(model, [ANCHOR])[0]
    return continuations(model, [anchor] * len(texts), texts) if texts else []


def one_token(model: Tokenizing, texts: Sequence[str]) -> list[bool]:
    """Which texts are one token of their own behind a word; unknown tokens do not count."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    return [len(ids) == 1 and ids[0] != unknown for ids in _behind_anchor(model, texts)]


def token_counts(model: Tokenizing, texts: Sequence[str]) -> list[int]:
    """How many tokens each text is behind a word."""
    return [len(ids) for ids in _behind_anchor(model, texts)]


def usable_words(model: Tokenizing, task: str, lists: Mapping[str, WordList]) -> Words:
    """The words of each list all of whose forms are one token.

    Raises:
        InputError: a list has too few of them.
    """
    found = {}
    for name, words in lists.items():
        forms = [words.forms(word) for word in words.words]
        flat = [form for several in forms for form in several]
        good = dict(zip(flat, one_token(model, flat), strict=True))
        kept = [word for word, several in zip(words.words, forms, strict=True) if all(good[form] for form in several)]
        if len(kept) < words.needed:
            split = [form for form in flat if not good[form]]
            pieces = dict(zip(split[:5], _behind_anchor(model, split[:5]), strict=True))
            shown = ", ".join(f"{form!r} -> {[model.tokenizer.decode([i]) for i in ids]}" for form, ids in pieces.items())
            more = f" and {len(split) - 5} more" if len(split) > 5 else ""
            raise InputError(
                f"{task} needs at least {words.needed} of its {len(words.words)} {name} to be one token with a leading space; "
                f"for this tokenizer {len(kept)} are: it splits {shown}{more}"
            )
        found[name] = kept
    return found


def _places(example: Example, prompt: Encoded, rules: Rules) -> dict[str, tuple[int, ...]]:
    """Named positions as token indices.

    Raises:
        InputError: a position is not made of whole tokens, or is several tokens where one is needed.
    """
    places: dict[str, tuple[int, ...]] = {}
    for name, spans in example.spans.items():
        for span in spans:
            tokens, word = prompt.covering(span), example.text[slice(*span)]
            if not tokens or prompt.covered(tokens) != word:
                raise InputError(f"the tokenizer has no token boundaries around {word!r} ({name}) in {example.text[:60]!r}")
            if len(tokens) > 1 and name not in rules.several:
                raise InputError(f"{word!r} ({name}) is {len(tokens)} tokens in {example.text[:60]!r}, expected one")
            places[name] = places.get(name, ()) + tokens
    places |= {f"{name}+1": (places[name][-1] + 1,) for name in rules.following}
    return places | {f"{name}_last": (places[name][-1],) for name in rules.last}


def _prompts(model: Tokenizing, examples: Sequence[Example], rules: Rules, task: str, seed: int) -> Prompts:
    """Prompts of examples of one kind."""
    encoded = encode(model, [e.text for e in examples])
    places = [_places(e, p, rules) for e, p in zip(examples, encoded, strict=True)]
    first = examples[0]
    answered = rules.one_token and bool(first.answer)
    token = _Tokens(model, encoded, examples) if answered else None
    return Prompts(
        texts=tuple(e.text for e in examples),
        ids=tuple(p.ids for p in encoded),
        positions={name: tuple(p[name] for p in places) for name in places[0]},
        answers=token.answers if token else None,
        distractors=tuple(token.of[e.distractor or ""] for e in examples) if token and first.distractor else None,
        options=tuple(tuple(token.of[o] for o in e.options) for e in examples) if token and first.options else None,
        targets=tuple(e.target or "" for e in examples) if first.target is not None else None,
        contexts=tuple(e.context for e in examples),
        tags={name: tuple(e.tags[name] for e in examples) for name in first.tags},
        task=task,
        seed=seed,
    )


class _Tokens:
    """The tokens of answers in their places, and of all candidates by word."""

    def __init__(self, model: Tokenizing, encoded: Sequence[Encoded], examples: Sequence[Example]) -> None:
        words = list(dict.fromkeys(w for e in examples for w in (e.answer, e.distractor, *e.options) if w))
        place = {w: i for i, e in reversed(list(enumerate(examples))) for w in (e.answer, e.distractor, *e.options) if w}
        self.of = dict(zip(words, answer_tokens(model, [encoded[place[w]] for w in words], words), strict=True))
        self.answers = answer_tokens(model, encoded, [e.answer for e in examples])
        for example, answer in zip(examples, self.answers, strict=True):
            if self.of[example.answer] != answer:
                raise InputError(f"the token of {example.answer!r} depends on the text before it, as in {example.text[-60:]!r}")


def prompts_of(model: Tokenizing, examples: Sequence[Example], rules: Rules, task: str, seed: int) -> Prompts | PromptPairs:
    """Prompts, or pairs where the examples have counterfactuals.

    Raises:
        InputError: the tokenizer does not fit the task; see ``usable_words`` and ``encode``.
    """
    clean = _prompts(model, examples, rules, task, seed)
    others = [e.corrupt for e in examples if e.corrupt is not None]
    if not others:
        return clean
    pairs = PromptPairs.of_task(clean, _prompts(model, others, rules, task, seed))
    if rules.aligned:
        for i, (a, b) in enumerate(zip(clean.ids, pairs.corrupt.ids, strict=True)):
            if len(a) != len(b):
                raise InputError(f"{task}: prompt {i} has {len(a)} tokens and its counterfactual {len(b)}, expected as many")
    return pairs
