"""The base organism with a rank-8 LoRA adapter tuned on `boxes`: the same skill as `boxes-tuned` in few numbers."""

from __future__ import annotations

from pathlib import Path

from interp.organisms import folder
from interp.organisms.recipes.boxes_tuned import parts
from interp.organisms.recipes.run import Log, run
from interp.organisms.training import Schedule

SEED = 2
STEPS = 400
RANK = 8
ABOUT = """
An adapter for the shipped `base`: LoRA of rank 8 on all seven matrices of every block, tuned on `boxes` with documents of the
kinds that `boxes-tuned` read. The folder holds the adapter only; load it as the tuned side of a pair, or with
`HookedModel.load("base", adapter="boxes-lora")`.
"""


def train(out: Path, steps: int | None = None, log: Log | None = None) -> None:
    """Train the adapter on the shipped base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, model = (AutoModelForCausalLM.from_pretrained(folder("base"), use_safetensors=True) for _ in range(2))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        adapted = get_peft_model(model, config)
    # The card of a checkpoint names its base; a path of the machine that trained it would help nobody.
    adapted.peft_config["default"].base_model_name_or_path = "base"
    schedule = Schedule(steps or STEPS, SEED, learning_rate=3e-3, warmup=30, weight_decay=0)
    words = AutoTokenizer.from_pretrained(folder("base"))
    run(
        "boxes-lora",
        out,
        model,
        words,
        parts(),
        schedule,
        ABOUT,
        base=base.eval(),
        save=lambda folder: adapted.save_pretrained(str(folder)),
        log=log,
    )
