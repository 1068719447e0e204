"""The docs page 'Laboratory animals', made from the organisms' cards: ``python -m interp.organisms.page > docs/laboratory-animals.md``."""

from __future__ import annotations

from interp import organisms

INTRODUCTION = """# Laboratory animals

Made by `make docs` from the cards in `data/organisms`; edit those, not this page.

No method can be trusted on models whose answer nobody knows. These are the models that `interp` ships: small ones trained to behave in
ways the methods study, tuned versions of them, and models whose circuits are written into the weights. `HookedModel.load("base")` loads
one by its name, `ModelPair.load("base", "boxes-lora")` a pair, `interp organisms train NAME` trains one again. Planted changes of any
model, with a known answer, are made by `interp.organisms.planted`.
"""


def page() -> str:
    """The whole page in Markdown."""
    names = organisms.names()
    measured = {name: organisms.behaviour(name) for name in names}
    tasks = dict.fromkeys(task for name in names for task in measured[name])
    lines = ["| mean ± standard error | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {task} | " + " | ".join(measured[name].get(task, "") for name in names) + " |" for task in tasks]
    parts = [INTRODUCTION, "## What they can do\n\n" + "\n".join(lines) + "\n"]
    parts += [_lowered(organisms.card(name)) for name in names]
    parts.append("# Written by hand\n\nTheir circuits come with them: `organisms.hand_built(name).circuit`.\n")
    parts += [f"## {name}\n\n{organisms.hand_built(name).about.strip()}\n" for name in organisms.HAND_BUILT]
    return "\n".join(parts)


def _lowered(card: str) -> str:
    """A card without its header, its headings one level down."""
    body = card.split("---", 2)[2].strip()
    return "\n".join("#" + line if line.startswith("#") else line for line in body.splitlines()) + "\n"


if __name__ == "__main__":
    print(page(), end="")
