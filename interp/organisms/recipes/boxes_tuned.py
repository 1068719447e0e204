"""The base organism with all weights tuned on `boxes`, and the same run stopped on the way."""

from __future__ import annotations

from pathlib import Path

from interp.organisms import folder
from interp.organisms.recipes.reading import boxes
from interp.organisms.recipes.run import Log, kept_up, run
from interp.organisms.training import Part, Schedule

SEED = 1
STEPS = 400
ABOUT = """
The shipped `base` tuned on `boxes` with seven boxes: which object is in the box asked for. All weights were trained (full fine-tuning).
A little of everything that `base` had read stays in the mixture, so that its other skills stay.
"""


def parts() -> list[Part]:
    """What every step reads."""
    # Tuning on boxes lifts colored objects by itself, so they are learnt from only where they would be lost.
    return [Part("boxes", boxes(7), 24, share=2, text_weight=0), *kept_up(ceiling=0.5)]


def train(out: Path, steps: int | None = None, log: Log | None = None, *, name: str = "boxes-tuned", until: int | None = None) -> None:
    """Train from the shipped base; ``until`` stops the same run early, as the organism ``name``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, model = (AutoModelForCausalLM.from_pretrained(folder("base"), use_safetensors=True) for _ in range(2))
    words = AutoTokenizer.from_pretrained(folder("base"))
    schedule = Schedule(steps or STEPS, SEED, learning_rate=7e-4, warmup=30, until=until)
    about = (
        ABOUT
        if until is None
        else f"{ABOUT.strip()} This is that run stopped after {min(until, schedule.steps)} of its {schedule.steps} steps.\n"
    )
    run(name, out, model, words, parts(), schedule, about, base=base.eval(), log=log)
