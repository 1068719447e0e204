"""What does taking every head's OV apart cost, beside TransformerLens and beside the dense matrix? On random weights of GPT-2 small's size.

12 layers of 12 heads, d 768, d_head 64, no model and no download. Aims, in float32, in which the peer computes: at least 2.5x
as fast as TransformerLens' ``FactoredMatrix.svd`` of every head, and 50x as fast as the SVD of the dense product (timed on a few heads and
scaled to all). The analysis itself computes in float64; that has no aim. Well- and ill-conditioned factors have to come out alike:
errors of singular values, against the dense product in float64, of at most 10 eps times the product of the factors' norms.

    python benchmarks/head_svd.py [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import sys

import torch
from timing import interleaved, machine, ratio, table
from torch import Tensor
from transformer_lens import FactoredMatrix

from interp.linalg import svd_of_products

LAYERS, HEADS, WIDTH, SIZE = 12, 12, 768, 64
PEER_AIM, DENSE_AIM, ERROR_AIM = 2.5, 50.0, 10.0
SAMPLED = 3
CONDITIONS = (1e0, 1e4, 1e8)


def factors(condition: float, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W_V [head d_model d_head] and W_O [head d_head d_model], each of about this condition, in float64."""
    draws = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, WIDTH, SIZE, generator=draws, dtype=torch.float64) * 0.02 for _ in range(2))
    scale = torch.logspace(0, -torch.tensor(condition).log10().item(), SIZE, dtype=torch.float64)
    return left * scale, scale[:, None] * right.mT


def measure_time(rounds: int, dtype: torch.dtype) -> tuple[float, float]:
    """Print the table; how many times faster than the peer and than the dense product."""
    left, right = (x.to(dtype) for x in factors(1, LAYERS * HEADS))
    layers = list(zip(left.split(HEADS), right.split(HEADS), strict=True))
    heads = list(zip(left, right, strict=True))
    ours, peer, whole = "svd_of_products, a layer at a time", "FactoredMatrix.svd, head by head", f"dense SVD, {SAMPLED} heads"
    variants = {
        peer: lambda: [FactoredMatrix(a, b).svd() for a, b in heads],
        "FactoredMatrix.svd, a layer at a time": lambda: [FactoredMatrix(a, b).svd() for a, b in layers],
        ours: lambda: [svd_of_products(a, b) for a, b in layers],
        whole: lambda: [torch.linalg.svd(a @ b) for a, b in heads[:SAMPLED]],
    }
    times = interleaved(variants, rounds)
    print(f"\nOV of {LAYERS} x {HEADS} heads, d {WIDTH}, d_head {SIZE}, {str(dtype).removeprefix('torch.')}, {rounds} interleaved rounds")
    print(table(times, ours))
    return ratio(times[peer], times[ours]), ratio(times[whole], times[ours]) * len(heads) / SAMPLED


def measure_error(dtype: torch.dtype) -> float:
    """Print errors of singular values in units of eps * ||left|| * ||right||; return the largest of ours."""
    worst = 0.0
    for condition in CONDITIONS:
        left, right = (x.to(dtype) for x in factors(condition, SAMPLED, seed=1))
        exact = torch.linalg.svdvals(left.double() @ right.double())[:, :SIZE]
        unit = torch.finfo(dtype).eps * left.double().norm(dim=(1, 2)) * right.double().norm(dim=(1, 2))
        found = {"ours": svd_of_products(left, right).S, "the peer's": FactoredMatrix(left, right).svd()[1]}
        errors = {name: float(((s.double() - exact).abs().amax(1) / unit).max()) for name, s in found.items()}
        told = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
        print(f"  condition {condition:.0e}, {str(dtype).removeprefix('torch.')}: largest error / (eps ||W_V|| ||W_O||): {told}")
        worst = max(worst, errors["ours"])
    return worst


def main() -> int:
    """Print the tables; 1 when an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    peer, dense = measure_time(options.rounds, torch.float32)
    doubles = measure_time(options.rounds, torch.float64)
    print()
    error = max(measure_error(dtype) for dtype in (torch.float32, torch.float64))
    print(f"\nfloat32: {peer:.2f}x the peer (aim {PEER_AIM:g}x), {dense:.0f}x the dense product (aim {DENSE_AIM:g}x)")
    print(f"float64: {doubles[0]:.2f}x the peer, {doubles[1]:.0f}x the dense product; largest error {error:.2g} (aim {ERROR_AIM:g})")
    return int(peer < PEER_AIM or dense < DENSE_AIM or error > ERROR_AIM)


if __name__ == "__main__":
    sys.exit(main())
