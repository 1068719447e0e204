"""Which heads of `base` answer two of its tasks, do the tasks share them, and does the repair of one task's circuit help the other?

Finds the circuits of IOI and Colored Objects on one half of the prompts, evaluates them on the other, compares them with chance, and makes
the strongest head of the IOI circuit look at the wrong colors (Merullo et al. 2024, arXiv 2310.08744). Prints the section `Circuits` of the
model card; `--write` puts it there (then `make docs`), `--out` also makes a page. A few minutes on one core.

    python studies/circuits.py [--n 400] [--write] [--out DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import interp
from interp.organisms import card, folder

MODEL, TASKS, HEADING = "base", ("ioi", "colored_objects"), "## Circuits"


def measured(n: int, draws: int = 10) -> dict[str, Any]:
    """The results, by what they are."""
    model: Any = interp.HookedModel.load(MODEL)
    halves: Any = {name: interp.task(name).generate(model, n=n, seed=0).split() for name in TASKS}
    found: dict[str, Any] = {name: interp.circuit_discovery(model, halves[name][0]) for name in TASKS}
    circuits = {name: found[name].circuit() for name in TASKS}
    settings: Any = {"completeness_random": 0, "greedy": 0, "random_circuits": draws}
    for name in TASKS:
        found[f"{name}, evaluated"] = interp.circuit_evaluation(model, halves[name][1], circuits[name], **settings)
    found["overlap"] = interp.circuit_overlap(*circuits.values())
    scores = circuits["ioi"].scores
    head = max(circuits["ioi"].nodes, key=lambda node: abs(scores[node]))
    edited = f"L{head.layer}H{head.head}"
    held_out, circuit = halves["colored_objects"][1], circuits["colored_objects"]
    return found | {"repair": interp.circuit_repair(model, held_out, circuit, heads=edited, draws=draws)}


def section(found: dict[str, Any], n: int) -> str:
    """The section of the card."""
    lines = [f"- {name}, found: {found[name].summary()}." for name in TASKS]
    lines += [f"- {name}, on prompts that the search did not see: {found[f'{name}, evaluated'].summary()}." for name in TASKS]
    lines += [f"- overlap of the two (a is {TASKS[0]}, b is {TASKS[1]}): {found['overlap'].summary()}."]
    lines += [f"- the repair, on {TASKS[1]}: {found['repair'].summary()}."]
    about = (
        f"Measured by `python studies/circuits.py --n {n}`, prompts of seed 0 halved by context; `[low, high]` are 95 % intervals over "
        "prompts. What was not found is said too."
    )
    return "\n".join([HEADING, about, "", *lines]) + "\n"


def written(text: str) -> Path:
    """The card with this section in place of an older one."""
    path = folder(MODEL) / "README.md"
    path.write_text(card(MODEL).partition(f"\n{HEADING}\n")[0].rstrip() + f"\n\n{text}")
    return path


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=400, help="prompts of each task, for both halves")
    options.add_argument("--draws", type=int, default=10, help="random circuits, and draws of the repair's controls")
    options.add_argument("--write", action="store_true", help="put the section into the model card")
    options.add_argument("--out", type=Path, help="folder for a page with all figures")
    given = options.parse_args(words)
    found = measured(given.n, given.draws)
    print(text := section(found, given.n))
    if given.write:
        print(f"written to {written(text)}; now: make docs")
    if given.out is not None:
        print(interp.write_report(list(found.values()), given.out / "circuits.html", title=f"Two circuits of {MODEL}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
