"""Boxes told in other ways: what does a model that follows positions count (Prakash et al. 2024, arXiv 2402.14811)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from interp.tasks.base import Example, Rules, Spans, Stream, Task, Words, balanced, fill
from interp.tasks.words import LABELS, OBJECTS, WordList

Kind = Literal[
    "plain",
    "text_before",
    "text_after",
    "words_between",
    "no_commas",
    "comma_after_object",
    "segment_before",
    "segment_after",
    "boxes_before_target",
    "not_in_target",
    "reordered_target",
]

BEFORE = "There are people near the table. "
AFTER = " There are people near the table."
_PLAIN = "the {object} is in Box {label}"
_SEGMENTS = {
    "words_between": "the {object} is still there in the big Box {label}",
    "no_commas": _PLAIN,
    "comma_after_object": "the {object}, is in Box {label}",
}
_TARGETS = {
    "boxes_before_target": "Box {x1}, Box {x2}, Box {x3}, " + _PLAIN,
    "not_in_target": "the {object} is not in Box {label}",
    "reordered_target": "Box {label} contains the {object}",
}
_LETTERS, _FRESH = {"boxes_before_target": 3, "segment_before": 1, "segment_after": 1}, {"segment_before": 1, "segment_after": 1}
"""Labels and objects that a way of telling needs besides those of the boxes."""


@dataclass(frozen=True, kw_only=True)
class BoxesVariants(Task):
    """The boxes, with the counterfactual prompt told in another way.

    Clean prompts are those of ``boxes(corrupt=position)``; so are the counterfactuals, other objects in other boxes that ask for another
    segment, but for how they are told. The distractor is the clean object in the segment that the counterfactual asks for (with
    ``follows=next``, in the one behind it), what a model would say that was given the counterfactual's position. If heads
    patched from a counterfactual still bring it, the way of telling does not matter to what they carry.

    Answer, options, positions and chance as in ``boxes``; objects, boxes and words that were added have no name.

    Attributes:
        kind: ``plain``; ``text_before`` the list or ``text_after`` it; ``words_between`` object and box; ``no_commas``;
            ``comma_after_object``; one more segment, ``segment_before`` or ``segment_after`` the others; and in the segment asked for
            ``boxes_before_target`` (three more boxes named before it), ``not_in_target`` ("is not in"), ``reordered_target``
            ("Box F contains the apple").
        told: which prompts are told so: the counterfactual (``corrupt``), the ``clean`` one, or ``both``.
        follows: the distractor is the clean object in the ``same`` segment or in the ``next`` one, which is a control.
        n_boxes: how many boxes.
    """

    kind: Kind = "plain"
    told: Literal["corrupt", "clean", "both"] = "corrupt"
    follows: Literal["same", "next"] = "same"
    n_boxes: int = 7

    name: ClassVar[str] = "boxes_variants"
    summary: ClassVar[str] = "Which object is in the box asked for, told in other ways: what a position is made of."
    paper: ClassVar[str] = "Prakash et al. 2024, arXiv 2402.14811"
    ranges: ClassVar[dict[str, tuple[int, int]]] = {"n_boxes": (3, 10)}
    rules: ClassVar[Rules] = Rules(aligned=False)

    @property
    def chance(self) -> float:
        """A guess among the objects of the prompt."""
        return 1 / self.n_boxes

    def word_lists(self) -> dict[str, WordList]:
        """Objects and labels: of two prompts, and what a way of telling adds to each."""
        n = 2 * self.n_boxes
        return {
            "objects": WordList(OBJECTS, n + 2 * _FRESH.get(self.kind, 0)),
            "labels": WordList(LABELS, n + _LETTERS.get(self.kind, 0)),
        }

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        n, asked = self.n_boxes, balanced(self.n_boxes, index, "boxes", seed)
        stream = Stream("boxes", seed, index)  # as in boxes, so that the clean prompts are the same
        objects, labels = stream.sample(words["objects"], n), stream.sample(words["labels"], n)
        stream = Stream("boxes", seed, index, "counterfactual", asked)
        other = stream.choice([i for i in range(n) if i != asked])
        fresh = stream.sample([o for o in words["objects"] if o not in objects], n)
        letters = stream.sample([x for x in words["labels"] if x not in labels], n)
        stream, taken = Stream("boxes_variants", seed, index), {*objects, *fresh, *labels, *letters}
        left = {name: [word for word in some if word not in taken] for name, some in words.items()}
        context, answers, choices = " ".join((*objects, *labels)), _answers(objects), _answers(fresh)
        wrong = (other + (self.follows == "next")) % n
        if wrong == asked:  # the next one of a segment before the clean one is the clean one: then the one behind that
            wrong = (wrong + 1) % n
        clean, corrupt = (self.kind if self.told in (side, "both") else "plain" for side in ("clean", "corrupt"))
        text, spans = _told(corrupt, fresh, letters, other, _more(corrupt, stream, left))
        tags = {"segment": str(other + 1), "kind": corrupt}
        counter = Example(text, choices[other], choices[asked], choices, spans, context=context, tags=tags)
        text, spans = _told(clean, objects, labels, asked, _more(clean, stream, left))
        return Example(text, answers[asked], answers[wrong], answers, spans, counter, context, {"segment": str(asked + 1), "kind": clean})


def _more(kind: str, stream: Stream, left: Words) -> dict[str, str]:
    """Objects and labels of neither prompt."""
    new, boxes = stream.sample(left["objects"], _FRESH.get(kind, 0)), stream.sample(left["labels"], _LETTERS.get(kind, 0))
    return {f"o{i}": o for i, o in enumerate(new, 1)} | {f"x{i}": x for i, x in enumerate(boxes, 1)}


def _answers(objects: Sequence[str]) -> tuple[str, ...]:
    return tuple(f" {o}" for o in objects)


def _told(kind: str, objects: Sequence[str], labels: Sequence[str], asked: int, more: dict[str, str]) -> tuple[str, Spans]:
    """The prompt of one kind, and where everything stands in it."""
    numbers = range(1, len(objects) + 1)
    segments = []
    for i in numbers:
        form = _TARGETS[kind] if kind in _TARGETS and i == asked + 1 else _SEGMENTS.get(kind, _PLAIN)
        segments.append(form.replace("{object}", f"{{object{i}}}").replace("{label}", f"{{label{i}}}"))
    extra = "the {o1} is in Box {x1}"
    segments = [extra] * (kind == "segment_before") + segments + [extra] * (kind == "segment_after")
    listed = (" " if kind == "no_commas" else ", ").join(segments)
    start = BEFORE if kind == "text_before" else ""
    end = AFTER if kind == "text_after" else ""
    values = {f"object{i}": o for i, o in enumerate(objects, 1)} | {f"label{i}": x for i, x in enumerate(labels, 1)}
    values |= {"query_label": labels[asked], **more}
    text, at = fill(f"{start}{listed[0].upper()}{listed[1:]}.{end} Box {{query_label}} contains the", values)
    spans: dict[str, tuple[tuple[int, int], ...]] = {name: (span,) for name, span in at.items() if name not in more}
    for one in ("object", "label"):
        spans[f"{one}s"] = tuple(at[f"{one}{i}"] for i in numbers)
    return text, spans | {"target": spans[f"object{asked + 1}"], "previous_query_label": spans[f"label{asked + 1}"]}


TASK = BoxesVariants
