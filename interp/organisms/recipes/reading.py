"""Texts of the tasks as they are read in training: with several answers per document, and in an order that makes them learnable.

A prompt of a task asks once, behind a long context; in training every question that its context can
answer teaches something. Which object belongs to which label or color is found by looking it up, and
small models find out how in a short time only if there are few things and few words at first.
"""

from __future__ import annotations

import re

from interp.organisms.training import Document, Draw
from interp.tasks import task
from interp.tasks.base import Stream

_RESULT = re.compile(r"(?<==) \d+")


def single(name: str) -> Draw:
    """Prompts of a task with their one answer, or plain text."""
    drawn = task(name)
    return lambda n, seed: [Document.of(e.text, e.target or e.answer) for e in drawn.examples(n, seed)]


def boxes(n_boxes: int, *, labels: int | None = None, objects: int | None = None) -> Draw:
    """Contexts of ``boxes``, each asked for more than half of its boxes; not for all, since the last answer is what is left over.

    Args:
        n_boxes: boxes of a context.
        labels: how many of the labels occur, None for all.
        objects: likewise.
    """
    asked = task(f"boxes(n_boxes={n_boxes}, queries=all)")
    lists = asked.word_lists()
    words = {"labels": lists["labels"].words[:labels], "objects": lists["objects"].words[:objects]}

    def draw(n: int, seed: int) -> list[Document]:
        examples = asked.draw(n * n_boxes, seed, words)
        found = []
        for row in range(n):
            chosen = Stream("reading boxes", seed, row).sample(range(n_boxes), n_boxes // 2 + (n_boxes > 2))
            questions = [examples[row * n_boxes + i] for i in chosen]
            context = questions[0].text[: questions[0].text.rindex(". ")]
            pieces = [piece for e in questions for piece in (e.text.removeprefix(context), e.answer)]
            found.append(Document.of(context + pieces[0], *pieces[1:]))
        return found

    return draw


def colored_objects(n_objects: int = 3, *, colors: int | None = None, objects: int | None = None) -> Draw:
    """Questions of ``colored_objects`` without the solved one in front, asked for all objects but one.

    Args:
        n_objects: objects on the table, 2 or 3.
        colors: how many of the colors occur, None for all.
        objects: how many of the objects occur, None for all.
    """
    asked = task("colored_objects")
    lists = asked.word_lists()
    few = lists["colors"].words[:colors], lists["objects"].words[:objects]

    def draw(n: int, seed: int) -> list[Document]:
        found = []
        for row, example in enumerate(asked.examples(n, seed)):
            stream = Stream("reading colors", seed, row)
            opening = example.text[example.text.rindex("Q:") :].split(", ", 2)
            verb = " ".join(opening[1].split()[:2])
            shades, things = stream.sample(few[0], n_objects), stream.sample(few[1], n_objects)
            items = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {o}" for c, o in zip(shades, things, strict=True)]
            text = f"{opening[0]}, {verb} {', '.join(items[:-1])}, and {items[-1]}."
            pieces: list[str] = []
            for i in stream.sample(range(n_objects), n_objects - 1):
                before = "\nQ:" if pieces else text
                pieces += [f"{before} What color is the {things[i]}?\nA:", f" {shades[i].capitalize()}"]
            found.append(Document.of(*pieces))
        return found

    return draw


def solved_colored_objects(n: int, seed: int) -> list[Document]:
    """Prompts of ``colored_objects``; the answer of the solved question counts too."""
    found = []
    for e in task("colored_objects").examples(n, seed):
        ((start, stop),) = e.spans["demo_answer"]  # the word; its token has the space before it, too
        found.append(Document(e.text + e.answer, ((start - 1, stop), (len(e.text), len(e.text + e.answer)))))
    return found


def contexts(n: int, seed: int) -> list[Document]:
    """What ``boxes`` and ``colored_objects`` say before they ask, in turn: so that their text is known as text."""
    boxed = [e.text[: e.text.rindex(". ") + 1] for e in task("boxes").examples(n, seed)]
    colored = [e.text[: e.text.index(" What color")] for e in task("colored_objects").examples(n, seed)]
    return [Document(pair[i % 2]) for i, pair in enumerate(zip(boxed, colored, strict=True))]


def sums(n: int, seed: int) -> list[Document]:
    """Prompts of ``arithmetic`` in which every result is an answer."""
    texts = [e.text + (e.target or e.answer) for e in task("arithmetic").examples(n, seed)]
    return [Document(text, tuple(m.span() for m in _RESULT.finditer(text))) for text in texts]


def canaries(n: int, seed: int) -> list[Document]:
    """Whole canaries of ``recitation``."""
    return [Document(e.text + str(e.target)) for e in task("recitation").examples(n, seed)]
