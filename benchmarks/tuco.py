"""What do TuCo and its streamed mode cost over plain Hugging Face eager, in time and memory? On two random Llamas.

Targets at 32 x 64 tokens, d 512, 8 layers, vocabulary 2 048: at most 1.35x the CPU time of two plain eager forwards; peak memory
at most both models' weights and three times the stream, (layers + 1) x tokens x d; streamed, at most one model's weights, one block
of the other, and as much stream. OutputCo, which is off by default, is a third forward and has no target.

    python benchmarks/tuco.py [--rounds 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import interleaved, machine, ratio, table
from transformers import LlamaConfig, LlamaForCausalLM

from interp.analyses.tuco import tuco
from interp.models import HookedModel, ModelPair
from interp.prompts import Prompts

TIME_LIMIT, STREAMS = 1.35, 3
PROMPTS, LENGTH, WIDTH, LAYERS, VOCABULARY = 32, 64, 512, 8, 2048
STREAM = (LAYERS + 1) * PROMPTS * LENGTH * WIDTH * 4


def random_llama(seed: int) -> LlamaForCausalLM:
    """8 layers of width 512, 28 million random parameters, no download."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def random_prompts(n: int) -> Prompts:
    """Prompts of equal length."""
    ids = torch.randint(5, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return Prompts(tuple(map(str, range(n))), tuple(map(tuple, ids)))


def measure_time(rounds: int) -> float:
    """Print the table; return the ratio of TuCo to two plain forwards."""
    models = [random_llama(seed) for seed in (0, 1)]
    pair, prompts = ModelPair(*map(HookedModel.load, models)), random_prompts(PROMPTS)
    ids = torch.tensor(prompts.ids)

    def plain() -> None:
        with torch.no_grad():
            for model in models:
                model(ids, attention_mask=torch.ones_like(ids), use_cache=False)

    base = "two plain Hugging Face forwards, eager"
    variants = {base: plain, "tuco": lambda: tuco(pair, prompts), "tuco with OutputCo": lambda: tuco(pair, prompts, output_co=True)}
    variants |= {"two HookedModel.logits": lambda: (pair.base.logits(prompts), pair.tuned.logits(prompts))}
    times = interleaved(variants, rounds, warmups=2)
    print(f"\n{PROMPTS} x {LENGTH} tokens, {rounds} interleaved rounds")
    print(table(times, base))
    return ratio(times["tuco"], times[base])


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak since the last reset."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def measure_here(base: Path, tuned: Path, stream: bool) -> int:
    """Bytes that loading a pair and TuCo add at their peak; in a process of its own.

    A pair of two prompts goes first, so that what libraries import and set up once is there already.
    """
    small = [folder.with_name(folder.name + "-small") for folder in (base, tuned)]
    tuco(ModelPair.load(*small), random_prompts(2), stream=stream)
    prompts = random_prompts(PROMPTS)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    tuco(ModelPair.load(base, tuned), prompts, stream=stream)
    return resident("VmHWM") - before


def measure_memory(scratch: Path) -> dict[str, tuple[int, int]]:
    """Peak and limit in bytes: both models in memory, and streamed."""
    for seed, name in enumerate(("base", "tuned")):
        model = random_llama(seed)
        model.save_pretrained(scratch / name)
        config = LlamaConfig(**{**model.config.to_dict(), "hidden_size": 64, "intermediate_size": 64, "head_dim": 8})
        LlamaForCausalLM(config).save_pretrained(scratch / f"{name}-small")
    weights = sum(p.numel() * 4 for p in model.parameters())
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    found = {}
    for name, limit in (("together", 2 * weights + STREAMS * STREAM), ("streamed", weights + block + STREAMS * STREAM)):
        words = [sys.executable, __file__, "--peak", name, "--scratch", str(scratch)]
        # The C library would keep freed blocks for later; told not to, the process holds what its tensors hold.
        settings = {"XDG_CACHE_HOME": str(scratch / "cache"), "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | settings)
        found[name] = int(done.stdout.split()[-1]), limit
    mib = {k: f"{v / 2**20:.0f} MiB" for k, v in (("one model", weights), ("a block", block), ("the stream", STREAM))}
    print("\nmemory: " + ", ".join(f"{k} {v}" for k, v in mib.items()))
    for name, (peak, limit) in found.items():
        print(f"  {name:<10} {peak / 2**20:7.0f} MiB at the peak, target at most {limit / 2**20:.0f} MiB")
    return found


def main() -> int:
    """Print the tables; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", choices=("together", "streamed"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(measure_here(options.scratch / "base", options.scratch / "tuned", options.peak == "streamed"))
        return 0
    print(machine(options.threads))
    time = measure_time(options.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        memory = measure_memory(Path(scratch))
    print(f"\nat {PROMPTS} x {LENGTH}: {time:.2f}x of two plain forwards (target <= {TIME_LIMIT}x)")
    return int(time > TIME_LIMIT or any(peak > limit for peak, limit in memory.values()))


if __name__ == "__main__":
    sys.exit(main())
