"""How fast is a step of training a mask over heads, beside runs of the whole plain Hugging Face model with hooks? GPT-2 and Llama.

One step: 32 prompts of 54 tokens, the loss, and its gradient by a mask over all heads of the upper half of 6 layers (d 256, 8
heads, vocabulary 2 048) at the last token. The plain side is as quick as whole runs go: its weights are frozen, it unembeds the
last token only, and the activations to mix in are there already. Target: at least 5x. Told beside it, without a target: a whole
search of 64 steps with what has to be prepared and 16 checks on 500 prompts, counted from the parts.

    python benchmarks/dcm.py [--rounds 9] [--archs gpt2,llama]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timing import interleaved, machine, ratio, table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from interp.models import Batch, HookedModel
from interp.models.masked import Masked, Mix
from interp.sweeps.mask_search import group_of

TARGET = 5.0
PROMPTS, LENGTH, LAYERS, WIDTH, HEADS, VOCABULARY = 32, 54, 6, 256, 8, 2048
TRAINED, CHECKED, STEPS, CHECKS = 1000, 500, 64, 16


def plain_model(kind: str) -> Any:
    """Random, eager attention, weights frozen."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, attn_implementation="eager"
        )
        return GPT2LMHeadModel(config).eval().requires_grad_(False)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = LlamaConfig(
        vocab_size=VOCABULARY, **sizes, num_key_value_heads=HEADS // 2, max_position_embeddings=64, attn_implementation="eager"
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@contextmanager
def mixing(hf: Any, values: Tensor, weight: Tensor) -> Iterator[None]:
    """Hooks before W_O that mix the last token of the upper half's heads; values are [layer prompt d_model], weights [layer head]."""
    blocks = hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers
    handles = []
    for i, block in enumerate(blocks[LAYERS // 2 :]):
        out = block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj

        def hook(module: Any, args: tuple[Tensor, ...], i: int = i) -> tuple[Tensor]:
            keeps, x = weight[i].repeat_interleave(WIDTH // HEADS), args[0].clone()
            x[:, -1] = keeps * args[0][:, -1] + (1 - keeps) * values[i]
            return (x,)

        handles.append(out.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(kind: str, rounds: int) -> float:
    """Print times; the ratio of a step."""
    hf = plain_model(kind)
    model, draws = HookedModel.load(hf), torch.Generator().manual_seed(1)
    ids, other = (torch.randint(5, VOCABULARY, (CHECKED, LENGTH), generator=draws) for _ in range(2))
    batch, source = Batch.of(ids.tolist()), Batch.of(other.tolist())
    target, group = torch.randint(5, VOCABULARY, (CHECKED,), generator=draws), group_of(None, model.shape)
    mix = Mix.of(model, batch, model, source, group)
    runs, rows = Masked(model, batch, mix), list(range(PROMPTS))
    values = mix.values.reshape(LAYERS // 2, HEADS, CHECKED, -1).permute(0, 2, 1, 3).flatten(2)
    start = torch.rand(len(group), generator=draws)

    def ours() -> tuple[Tensor, Tensor]:
        weight = start.clone().requires_grad_(True)
        loss = -runs.logit(weight, rows, target).mean() + 0.01 * (1 - weight).sum()
        return loss.detach(), *torch.autograd.grad(loss, [weight])

    def plain() -> tuple[Tensor, Tensor]:
        weight = start.clone().requires_grad_(True)
        with mixing(hf, values[:, :PROMPTS], weight.reshape(-1, HEADS)):
            logits = hf(ids[:PROMPTS], use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = -logits[torch.arange(PROMPTS), target[:PROMPTS]].mean() + 0.01 * (1 - weight).sum()
        return loss.detach(), *torch.autograd.grad(loss, [weight])

    def check() -> Tensor:
        return runs.top(start)

    def plain_check() -> Tensor:
        found = []
        for at in range(0, CHECKED, PROMPTS):
            with torch.no_grad(), mixing(hf, values[:, at : at + PROMPTS], start.reshape(-1, HEADS)):
                found.append(hf(ids[at : at + PROMPTS], use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1))
        return torch.cat(found)

    for got, want in zip(ours(), plain(), strict=True):
        off = float((got - want).abs().max() / want.abs().max())
        assert off < 1e-4, f"{kind}: ours and plain hooks differ by {off}"
    assert torch.equal(check(), plain_check()), f"{kind}: ours and plain hooks check differently"
    step, step_plain, prepare = "a step", "a step, plain hooks", f"keep {CHECKED} prompts"
    variants = {step: ours, step_plain: plain, prepare: lambda: Masked(model, batch, mix)}
    variants |= (checks := {f"check {CHECKED} prompts": check, f"check {CHECKED} prompts, plain hooks": plain_check})
    times = interleaved(variants, rounds, warmups=2)
    print(f"\n{kind}: {PROMPTS} x {LENGTH} tokens, {LAYERS} layers, d {WIDTH}, {len(group)} weights, {rounds} interleaved rounds")
    print(table(times, step))
    cost = {name: min(t.cpu) for name, t in times.items()}
    quick, slow = checks
    whole = STEPS * cost[step] + cost[prepare] * (TRAINED + CHECKED) / CHECKED + CHECKS * cost[quick]
    whole_plain = STEPS * cost[step_plain] + CHECKS * cost[slow]
    print(f"  {1 / cost[step]:.0f} steps per second, plain hooks {1 / cost[step_plain]:.1f}; a search of {STEPS} steps and {CHECKS} checks")
    print(f"  takes {whole:.1f} s with what is kept for it, plain hooks {whole_plain:.1f} s: {whole_plain / whole:.1f}x")
    return ratio(times[step_plain], times[step])


def main() -> int:
    """Run; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--archs", default="gpt2,llama")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(machine(1))
    missed = []
    for kind in args.archs.split(","):
        faster = measure(kind, args.rounds)
        print(f"  a step is {faster:.1f}x as fast as plain hooks (target {TARGET:.0f}x)", flush=True)
        missed += [f"{kind}: {faster:.1f}x, the target is {TARGET:.0f}x"] * (faster < TARGET)
    print("\n".join(["missed:", *missed] if missed else ["the target is met"]))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
