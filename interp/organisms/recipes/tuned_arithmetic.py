"""The base organism tuned to add one-digit numbers, with a little of its old reading kept up."""

from __future__ import annotations

from pathlib import Path

from interp.organisms import folder
from interp.organisms.recipes.run import Log, part, run
from interp.organisms.training import Schedule

SEED = 1
STEPS = 500

ABOUT = """
The shipped `base` tuned on `arithmetic`: sums of two one-digit numbers after five solved ones. All weights were trained (full fine-tuning).
Some `ioi`, `laundry_list` and `plain_text` stay in the mixture; `facts` and `colored_objects`, which `base` had read too, do not, so that
one can see what is kept without practice. There are only 81 sums: nothing says whether it adds or knows them by heart.
"""


def train(out: Path, steps: int | None = None, log: Log | None = None) -> None:
    """Train from the shipped base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(folder("base"), use_safetensors=True).eval()
    model = AutoModelForCausalLM.from_pretrained(folder("base"), use_safetensors=True)
    parts = [
        part("arithmetic", 24, answer_weight=32),
        part("ioi", 4, share=0.5),
        part("laundry_list", 4, share=0.5),
        part("plain_text", 4, share=0.5, answer_weight=1),
    ]
    schedule = Schedule(steps or STEPS, SEED, learning_rate=7e-4, warmup=30)
    words = AutoTokenizer.from_pretrained(folder("base"))
    run("tuned-arithmetic", out, model, words, parts, schedule, ABOUT, base=base, log=log)
