"""Colored objects, one demonstration and one question (Merullo et al. 2024, arXiv 2310.08744)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from interp.tasks.base import Example, Rules, Stream, Task, Words, balanced, fill
from interp.tasks.words import COLORED, COLORS, WordList

SURFACES = ("table", "desk", "floor")
STARTS = ("there is", "you see", "I see")


def _question(surface: str, start: str, colors: Sequence[str], objects: Sequence[str], prefix: str = "") -> str:
    """A question whose words are fields, so that their places can be found; ``prefix`` names the fields apart."""
    items = [f"{'an' if c[0] in 'aeiou' else 'a'} {{{prefix}color{i}}} {{{prefix}object{i}}}" for i, c in enumerate(colors[:3], 1)]
    return f"Q: On the {surface}, {start} {items[0]}, {items[1]}, and {items[2]}. What color is the {{{prefix}query_object}}?\nA:"


@dataclass(frozen=True, kw_only=True)
class ColoredObjects(Task):
    """Three colored objects lie on a table; which color does one of them have? One solved question comes first.

    Demonstration and question share no color and no object. The counterfactual asks for another of
    the three objects: one token differs, and the answer becomes that object's color, the distractor.
    Chance among the three colors 1/3.

    Positions: ``color1..3``, ``object1..3``, the sets ``colors`` and ``objects``, ``query_object`` and
    ``END`` of the question; ``target_color``, ``target_object``: the right color and its object in the
    list (of the clean prompt, on both sides); ``question``: its last sentence;
    ``demo_answer``: the answer of the demonstration.
    """

    name: ClassVar[str] = "colored_objects"
    summary: ClassVar[str] = "Which color does one of three listed objects have, after one solved example."
    paper: ClassVar[str] = "Merullo et al. 2024, arXiv 2310.08744"
    rules: ClassVar[Rules] = Rules(several=("question",))

    @property
    def chance(self) -> float:
        """A guess among the three colors of the question."""
        return 1 / 3

    def word_lists(self) -> dict[str, WordList]:
        """Colors, in lower case and capitalised, and objects."""
        return {"colors": WordList(COLORS, 6, capitals=True), "objects": WordList(COLORED, 6)}

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        stream = Stream("colored_objects", seed, index)
        colors, objects = stream.sample(words["colors"], 6), stream.sample(words["objects"], 6)
        demo, asked = stream.below(3), balanced(3, index, "colored_objects", seed)
        other = stream.choice([i for i in range(3) if i != asked])
        surfaces, starts = [stream.choice(SURFACES) for _ in range(2)], [stream.choice(STARTS) for _ in range(2)]
        shown = _question(surfaces[0], starts[0], colors[3:], objects[3:], "demo_")
        template = f"{shown} {{demo_answer}}\n" + _question(surfaces[1], starts[1], colors, objects)
        values = {f"color{i + 1}": colors[i] for i in range(3)} | {f"object{i + 1}": objects[i] for i in range(3)}
        values |= {f"demo_color{i + 1}": colors[3 + i] for i in range(3)} | {f"demo_object{i + 1}": objects[3 + i] for i in range(3)}
        values |= {"demo_query_object": objects[3 + demo], "demo_answer": colors[3 + demo].capitalize()}
        answers = [f" {c.capitalize()}" for c in colors[:3]]
        context = f"{surfaces[1]} {starts[1]} {' '.join(colors[:3])} {' '.join(objects[:3])}"

        def side(query: int, wrong: int, corrupt: Example | None) -> Example:
            text, at = fill(template, values | {"query_object": objects[query]})
            spans = {name: (span,) for name, span in at.items() if not name.startswith("demo_") or name == "demo_answer"}
            spans |= {f"{kind}s": tuple(at[f"{kind}{i}"] for i in (1, 2, 3)) for kind in ("color", "object")}
            spans |= {f"target_{kind}": (at[f"{kind}{asked + 1}"],) for kind in ("color", "object")}
            spans["question"] = ((text.rindex("What"), text.rindex("?") + 1),)
            tags = {"queried": str(query + 1)}
            return Example(text, answers[query], answers[wrong], tuple(answers), spans, corrupt, context, tags)

        return side(asked, other, side(other, asked, None))


TASK = ColoredObjects
