"""What does a HookedModel cost over plain Hugging Face eager? Logits and the capture of one site, on a random Llama.

Targets at 32 x 64 tokens: logits at most 1.2x, capture of the last layer's output at most 1.25x of the plain forward (CPU time).
A capture computes nothing after its last site, so one further down costs less than a forward.

    python benchmarks/overhead.py [--rounds 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import sys

import torch
from timing import interleaved, machine, ratio, table
from transformers import LlamaConfig, LlamaForCausalLM

from interp.models import Batch, HookedModel

LOGITS_LIMIT, CAPTURE_LIMIT = 1.2, 1.25


def random_llama() -> LlamaForCausalLM:
    """8 layers of width 512, 30 million random parameters, no download."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def measure(hf: LlamaForCausalLM, model: HookedModel, prompts: int, length: int, rounds: int) -> tuple[float, float]:
    """Print one table; return the ratios of logits and of capturing the last layer's output."""
    ids = torch.randint(5, hf.config.vocab_size, (prompts, length), generator=torch.Generator().manual_seed(1))
    batch = Batch.of(ids.tolist())
    mask = torch.ones_like(ids)

    def plain() -> torch.Tensor:
        with torch.no_grad():
            return hf(ids, attention_mask=mask, use_cache=False).logits

    torch.testing.assert_close(model.logits(batch), plain(), rtol=1e-4, atol=1e-4)
    last, head = f"L{model.shape.n_layers - 1}.resid_post", "L4H3.z"
    times = interleaved(
        {
            "plain Hugging Face, eager": plain,
            "HookedModel.logits": lambda: model.logits(batch),
            f"HookedModel.capture {last}": lambda: model.capture(batch, [last]),
            f"HookedModel.capture {head}": lambda: model.capture(batch, [head]),
        },
        rounds,
        warmups=2,
    )
    print(f"\n{prompts} x {length} tokens, {rounds} interleaved rounds")
    print(table(times, "plain Hugging Face, eager"))
    return tuple(ratio(times[name], times["plain Hugging Face, eager"]) for name in list(times)[1:3])


def main() -> int:
    """Print the tables; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    hf = random_llama()
    model = HookedModel.load(hf)
    logits, capture = measure(hf, model, 32, 64, options.rounds)
    measure(hf, model, 1, 16, 10 * options.rounds)
    print(f"\nat 32 x 64: logits {logits:.2f}x (target <= {LOGITS_LIMIT}x), one site {capture:.2f}x (target <= {CAPTURE_LIMIT}x)")
    return int(logits > LOGITS_LIMIT or capture > CAPTURE_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
