"""A small probabilistic grammar of English whose entropy and text probabilities are known exactly.

Texts are short scenes about one named person. Every random choice can be read off the text, so the
probability of a text is the product of the probabilities of the choices that wrote it, and the entropy
of a text is the expected sum of its surprises: the loss per text that no model can beat on average.

The scenes contain what small language models learn early and interpretability likes to look at: number
agreement across a phrase of the other number, gendered pronouns, and a name that returns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from math import log

from interp.tasks.base import Stream


def _lexicon(text: str) -> dict[str, float]:
    """Words with weights that fall with their rank, as word frequencies do."""
    return {word.replace("_", " "): 1 / (rank + 2) for rank, word in enumerate(text.split())}


GIRLS = _lexicon("Lily Mia Nora Ella Rosa Clara Vera Iris Tessa Wilma")
BOYS = _lexicon("Ben Max Theo Finn Otto Hugo Emil Noah Karl Boris")

RULES: dict[str, dict[str, float]] = {
    "Opening": {
        "There is a {kind} named {name} who lives near the Place.": 2,
        "In the Size house near the Place lives a {kind} named {name}.": 1,
    },
    "Sentence": {
        "{He} DoesOne.": 5,
        "{name} DoesOne.": 3,
        "One DoesOne.": 5,
        "Many DoMany.": 4,
        "Time {he} DoesOne.": 3,
        "Time One DoesOne.": 2,
        "Because One BeOne Mood, {name} DoesOne.": 2,
        "When Many DoMany, {he} DoesOne.": 2,
    },
    "One": {
        "the Person": 5,
        "the Size Person": 2,
        "the Animal": 4,
        "the Size Animal": 2,
        "the Person with the Animals": 1,
        "the Animal near the Persons": 1,
    },
    "Many": {
        "the Persons": 4,
        "the Size Animals": 2,
        "the Animals": 4,
        "the Persons from the Place": 1,
        "the Animals near the Person": 1,
    },
    "DoesOne": {
        "GoesOne to the Place": 4,
        "GoesOne How": 2,
        "LikesOne the Thing": 4,
        "LikesOne {his} Thing": 3,
        "LikesOne the Size Thing": 2,
        "SeesOne One": 2,
        "SeesOne Many": 1,
        "BeOne Mood": 3,
        "GivesOne the Thing to Receiver": 2,
    },
    "DoMany": {
        "GoMany to the Place": 4,
        "GoMany How": 2,
        "LikeMany the Thing": 4,
        "SeeMany {him}": 2,
        "SeeMany the Person": 2,
        "are Mood": 3,
        "GiveMany the Thing to Receiver": 2,
    },
    "Receiver": {"{him}": 3, "the Person": 3, "the Animals": 1},
    "GoesOne": _lexicon("walks runs comes returns hurries wanders"),
    "GoMany": _lexicon("walk run come return hurry wander"),
    "LikesOne": _lexicon("likes finds takes wants carries cleans hides"),
    "LikeMany": _lexicon("like find take want carry clean hide"),
    "SeesOne": _lexicon("sees helps follows greets calls"),
    "SeeMany": _lexicon("see help follow greet call"),
    "GivesOne": _lexicon("gives brings shows sells"),
    "GiveMany": _lexicon("give bring show sell"),
    "BeOne": {"is": 1},
    "Mood": _lexicon("happy tired hungry angry proud quiet afraid"),
    "How": _lexicon("slowly quickly away home alone together"),
    "Time": _lexicon("Today, Later, Now_and_then, In_the_evening, At_night, After_the_rain, Every_morning,"),
    "Size": _lexicon("small big old little young red strange"),
    "Person": _lexicon("farmer baker teacher sailor painter doctor miller king"),
    "Persons": _lexicon("farmers bakers teachers sailors painters doctors millers kings"),
    "Animal": _lexicon("dog cat horse bird fox goat duck mouse"),
    "Animals": _lexicon("dogs cats horses birds foxes goats ducks mice"),
    "Thing": _lexicon("bread ball cake apple lamp boat book key stone hat cup basket"),
    "Place": _lexicon("forest river market village hill garden harbor bridge mill school"),
}
"""Symbol -> right-hand side -> weight. A capitalised word that is a key is a symbol, all else is text."""

CAST: dict[tuple[str, str], float] = {("girl", n): w for n, w in GIRLS.items()} | {("boy", n): w for n, w in BOYS.items()}
PRONOUNS = {"girl": {"he": "she", "He": "She", "him": "her", "his": "her"}, "boy": {"he": "he", "He": "He", "him": "him", "his": "his"}}


SYMBOL = re.compile(r"([A-Z]\w+)")


@cache
def _parts(right: str) -> tuple[str, ...]:
    """A right-hand side cut into symbols and text."""
    pieces: list[str] = []
    for part in SYMBOL.split(right):
        if part in RULES or not pieces or pieces[-1] in RULES:
            pieces.append(part)
        else:
            pieces[-1] += part
    return tuple(p for p in pieces if p)


@cache
def _surprises(symbol: str) -> tuple[tuple[str, float, float], ...]:
    """The right-hand sides of a symbol with probability and surprise."""
    total = sum(RULES[symbol].values())
    return tuple((right, weight / total, -log(weight / total)) for right, weight in RULES[symbol].items())


@cache
def _entropy(symbol: str) -> float:
    return sum(p * (surprise + sum(_entropy(part) for part in _parts(right) if part in RULES)) for right, p, surprise in _surprises(symbol))


def entropy(sentences: int) -> float:
    """Entropy of a scene of so many sentences, in nats: no model has a lower expected loss per text."""
    total = sum(CAST.values())
    cast = -sum(w / total * log(w / total) for w in CAST.values())
    return cast + _entropy("Opening") + (sentences - 1) * _entropy("Sentence")


def first_surprise(text: str) -> float:
    """Surprise of the first word of a scene, in nats, which a model that reads from its first token cannot be asked for."""
    word = text.split()[0]
    return -log(sum(p for right, p, _ in _surprises("Opening") if right.split()[0] == word))


def _pick(stream: Stream, weights: Iterable[float]) -> int:
    """An index drawn with probability proportional to its weight."""
    weights = list(weights)
    left = stream.uniform() * sum(weights)
    for i, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return i
    return len(weights) - 1


def _write(symbol: str, stream: Stream) -> tuple[str, float]:
    """What a symbol becomes, and the surprise of it."""
    options = _surprises(symbol)
    right, _, nats = options[_pick(stream, (p for _, p, _ in options))]
    text = ""
    for part in _parts(right):
        written, surprise = _write(part, stream) if part in RULES else (part, 0.0)
        text, nats = text + written, nats + surprise
    return text, nats


def scene(stream: Stream, sentences: int) -> tuple[str, float]:
    """A text of so many sentences, and its surprise -log p(text) in nats."""
    cast = list(CAST)
    kind, name = cast[_pick(stream, CAST.values())]
    nats = -log(CAST[kind, name] / sum(CAST.values()))
    lines = []
    for number in range(sentences):
        text, surprise = _write("Sentence" if number else "Opening", stream)
        text = text.format(kind=kind, name=name, **PRONOUNS[kind])
        lines.append(text[0].upper() + text[1:])
        nats += surprise
    return " ".join(lines), nats
