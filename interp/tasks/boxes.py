"""Entity tracking with boxes (Prakash et al. 2024, arXiv 2402.14811; format after Kim and Schuster 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from interp.tasks.base import Example, Spans, Stream, Task, Words, balanced, fill
from interp.tasks.words import LABELS, OBJECTS, WordList


@dataclass(frozen=True, kw_only=True)
class Boxes(Task):
    """Objects lie in labelled boxes, one each; which object does a box contain?

    The object comes first ("The apple is in Box F"), so that "Box F contains the" cannot be answered by
    copying what followed the same words. Answer: the object of the queried box; distractor: the object
    of another box of the same prompt; options: all its objects; chance 1 / n_boxes.

    Positions: ``object1..N``, ``label1..N``, the sets ``objects`` and ``labels``, ``query_label``,
    ``previous_query_label`` (where the label stood in the list), ``target`` (the queried object in the
    list), ``END``. In a counterfactual ``query`` or ``absent`` those two stand where they stand in the
    clean prompt, so that places match one for one; in the others they belong to its own question.

    Attributes:
        n_boxes: how many boxes.
        queries: ``one`` question per context, or ``all`` of a context's boxes in consecutive prompts.
        corrupt: ``query`` (default): the same context, asked for the box of the distractor, which
            becomes the answer; only the query label differs. ``absent``: a prompt with other objects and
            other labels that asks for a box that neither prompt has, so there is no answer (the noise
            prompts of Prakash et al., whose letter could coincide with a label). ``position``: a
            prompt with other objects and other labels that asks for a segment other than the clean
            one's; the distractor is the clean object in that segment, what the model would say if it
            followed the position. Segments never coincide. ``object``: the same prompt, and the
            distractor is its own answer, what the model would say if the value moved over. ``label``: a
            prompt with other objects that asks for the label of another of the clean boxes, which
            stands in a segment that is neither the clean one's nor its own there (so it takes three
            boxes; all its other labels are new); the distractor is the clean object of that label.

    The last three are desiderata (Prakash et al.; ``dcm`` searches for heads that meet one): a variable of the
    counterfactual that may be carried over, and as the clean prompt's distractor the answer if it is. That is
    never the clean answer, so doing nothing meets none of them.
    """

    n_boxes: int = 7
    queries: Literal["one", "all"] = "one"
    corrupt: Literal["query", "absent", "object", "label", "position"] = "query"

    name: ClassVar[str] = "boxes"
    summary: ClassVar[str] = "Which object is in the box asked for, among several boxes (entity tracking)."
    paper: ClassVar[str] = "Prakash et al. 2024, arXiv 2402.14811"
    ranges: ClassVar[dict[str, tuple[int, int]]] = {"n_boxes": (2, 11)}
    variables: ClassVar[tuple[str, ...]] = ("object", "label", "position")
    """Values of ``corrupt`` that are desiderata."""

    def __post_init__(self) -> None:
        """Refuse too few boxes for three different segments."""
        super().__post_init__()
        if self.corrupt == "label" and self.n_boxes < 3:
            self._refuse("n_boxes", self.n_boxes, "3 to 11 with corrupt=label, where label, position and question are three segments")

    @property
    def chance(self) -> float:
        """A guess among the objects of the prompt."""
        return 1 / self.n_boxes

    def word_lists(self) -> dict[str, WordList]:
        """Objects and labels."""
        sides = 1 if self.corrupt == "query" else 2
        return {
            "objects": WordList(OBJECTS, sides * self.n_boxes),
            "labels": WordList(LABELS, sides * self.n_boxes + (self.corrupt == "absent")),
        }

    def _prompt(self, objects: Sequence[str], labels: Sequence[str], query: str, segment: int) -> tuple[str, Spans]:
        numbers = range(1, self.n_boxes + 1)
        items = ", ".join(f"{'The' if i == 1 else 'the'} {{object{i}}} is in Box {{label{i}}}" for i in numbers)
        values = {f"object{i}": o for i, o in enumerate(objects, 1)} | {f"label{i}": x for i, x in enumerate(labels, 1)}
        text, at = fill(items + ". Box {query_label} contains the", values | {"query_label": query})
        spans: dict[str, tuple[tuple[int, int], ...]] = {name: (span,) for name, span in at.items()}
        for kind in ("object", "label"):
            spans[f"{kind}s"] = tuple(at[f"{kind}{i}"] for i in numbers)
        return text, spans | {"target": spans[f"object{segment + 1}"], "previous_query_label": spans[f"label{segment + 1}"]}

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        n = self.n_boxes
        number, asked = divmod(index, n) if self.queries == "all" else (index, balanced(n, index, "boxes", seed))
        stream = Stream("boxes", seed, number)
        objects, labels = stream.sample(words["objects"], n), stream.sample(words["labels"], n)
        stream = Stream("boxes", seed, number, "counterfactual", asked)
        other = stream.choice([i for i in range(n) if i != asked])
        context = " ".join((*objects, *labels))
        answers = tuple(f" {o}" for o in objects)
        tags = {"segment": str(asked + 1)}
        if self.corrupt == "query":
            text, spans = self._prompt(objects, labels, labels[other], asked)
            corrupt = Example(text, answers[other], answers[asked], answers, spans, context=context, tags={"segment": str(other + 1)})
        else:
            fresh = stream.sample([o for o in words["objects"] if o not in objects], n)
            letters = stream.sample([x for x in words["labels"] if x not in labels], n + (self.corrupt == "absent"))
            choices = tuple(f" {o}" for o in fresh)
            if self.corrupt == "absent":
                text, spans = self._prompt(fresh, letters[:n], letters[n], asked)
                corrupt = Example(text, "", None, (), spans, context=context, tags={"segment": "absent"})
            else:
                there = other if self.corrupt != "label" else stream.choice([i for i in range(n) if i not in (asked, other)])
                letters[there] = labels[other] if self.corrupt == "label" else letters[there]
                text, spans = self._prompt(fresh, letters, letters[there], there)
                corrupt = Example(text, choices[there], choices[asked], choices, spans, context=context, tags={"segment": str(there + 1)})
        moved = corrupt.answer if self.corrupt == "object" else answers[other]
        text, spans = self._prompt(objects, labels, labels[asked], asked)
        return Example(text, answers[asked], moved, answers, spans, corrupt, context, tags)


TASK = Boxes
