"""How fast does the residual stream of all layers get to disk, beside TransformerLens with a names filter?

Both write half precision and sync at the end; TransformerLens is also timed writing what it holds, single precision. It is
given 1024 tokens per forward; 128 to 4096 make no difference to it here.
Target at width 256, 6 layers and 50 257 tokens: at least 2.5 times the tokens per second.

    python benchmarks/capture.py [--rounds 3] [--threads 1] [--skip-small]
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from timing import interleaved, machine, ratio, table
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

from interp.models import Batch, HookedModel

LIMIT = 2.5
TOKENS_PER_FORWARD = 1024


def random_gpt2(width: int, layers: int) -> GPT2LMHeadModel:
    """A random GPT-2 with the full vocabulary."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=50_257, n_positions=256, attn_implementation="eager")
    return GPT2LMHeadModel(config).eval()


def sync(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def measure(width: int, layers: int, prompts: int, length: int, rounds: int, scratch: Path) -> float:
    """Print one table; return how much longer TransformerLens takes at the same precision, by the clock that is kinder to it."""
    hf = random_gpt2(width, layers)
    lens = build_bridge_from_module(copy.deepcopy(hf), type(hf).__name__, hf_config=hf.config)
    model = HookedModel.load(hf)
    ids = torch.randint(5, 50_257, (prompts, length), generator=torch.Generator().manual_seed(1))
    batch = Batch.of(ids.tolist())
    sites = [f"L{layer}.resid_post" for layer in range(layers)]
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
    step = max(1, TOKENS_PER_FORWARD // length)

    def fresh(name: str) -> Path:
        shutil.rmtree(scratch / name, ignore_errors=True)
        return scratch / name

    def transformer_lens(dtype: torch.dtype) -> None:
        folder = fresh(str(dtype))
        folder.mkdir()
        with torch.no_grad():
            for start in range(0, prompts, step):
                part = ids[start : start + step]
                _, cache = lens.run_with_cache(part, attention_mask=torch.ones_like(part), names_filter=names, use_cache=False)
                save_file({name: cache[name].to(dtype).contiguous() for name in names}, folder / f"{start:06}.safetensors")
        sync(folder)

    def interp() -> None:
        folder = fresh("interp")
        model.capture(batch, sites, to=folder, dtype=torch.float16)
        sync(folder)

    ours, theirs = "HookedModel.capture(to=folder), float16", "TransformerLens run_with_cache, float16"
    times = interleaved(
        {ours: interp, theirs: lambda: transformer_lens(torch.float16), "the same, float32": lambda: transformer_lens(torch.float32)},
        rounds,
    )
    print(f"\nwidth {width} x {layers} layers, {prompts} x {length} tokens, {rounds} interleaved rounds")
    print(table(times, ours, tokens=prompts * length))
    return min(ratio(times[theirs], times[ours], clock) for clock in ("cpu", "wall"))


def main() -> int:
    """Print the tables; 1 when the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-small", action="store_true", help="leave out width 768 x 12 layers, the size of GPT-2 small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    with tempfile.TemporaryDirectory() as scratch:
        speedup = measure(256, 6, 96, 128, options.rounds, Path(scratch))
        if not options.skip_small:
            measure(768, 12, 16, 128, options.rounds, Path(scratch))
    print(f"\nwidth 256 x 6 layers: {speedup:.2f}x the tokens per second of TransformerLens (target >= {LIMIT}x)")
    return int(speedup < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
