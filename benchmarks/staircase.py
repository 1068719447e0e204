"""Which pairs of directions hold a share of the curvature, for a matrix of 4096 x 11008: threshold search beside a heap.

The heap is the way that is easy to see: from the sharpest pair on, the next one is always a neighbour of those taken. Both find the same
pairs. Target: the search takes at most a tenth of the heap's time. The heap is asked for a small share, which is to its advantage: its
time grows with the pairs that it takes, up to all 45 million, that of the search does not.

    python benchmarks/staircase.py [--rows 4096] [--columns 11008] [--mass 0.6] [--threads 1]
"""

from __future__ import annotations

import argparse
import heapq
import sys
import time

import torch
from timing import interleaved, machine, ratio

from interp.models.curvature import mask, staircase

TARGET = 10
ROUNDS = 3


def heap(lam: list[float], mu: list[float], mass: float) -> list[int]:
    """Pairs taken one by one, sharpest first, until they hold the share; of each ``lam`` how many ``mu``."""
    wanted = mass * sum(lam) * sum(mu)
    counts, held = [0] * len(lam), 0.0
    ahead = [(-lam[0] * mu[0], 0)]  # of every row that was begun, its next pair; a row begins when the one above it has its first
    while held < wanted:
        product, row = heapq.heappop(ahead)
        held -= product
        counts[row] += 1
        if counts[row] < len(mu):
            heapq.heappush(ahead, (-lam[row] * mu[counts[row]], row))
        if counts[row] == 1 and row + 1 < len(lam):
            heapq.heappush(ahead, (-lam[row + 1] * mu[0], row + 1))
    return counts


def spectrum(n: int, seed: int) -> torch.Tensor:
    """Eigenvalues that fall off as a power of their rank, as those of trained models do, with noise."""
    draws = torch.Generator().manual_seed(seed)
    values = torch.arange(1, n + 1, dtype=torch.float64).pow(-0.8) * torch.rand(n, generator=draws, dtype=torch.float64).add(0.5)
    return values.sort(descending=True).values


def main() -> int:
    """Print both times and their ratio; 1 when the target is missed or the pairs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--mass", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    lam, mu = spectrum(options.rows, 0), spectrum(options.columns, 1)
    as_lists = lam.tolist(), mu.tolist()
    found, slow = staircase(lam, mu, options.mass), heap(*as_lists, options.mass)
    same = found.tolist() == slow
    times = interleaved({"heap": lambda: heap(*as_lists, options.mass), "search": lambda: staircase(lam, mu, options.mass)}, ROUNDS)
    start = time.perf_counter()
    mask(found, options.columns)
    made = time.perf_counter() - start
    faster = ratio(times["heap"], times["search"])
    pairs = int(found.sum())
    print(f"  {options.rows} x {options.columns}, {options.mass:.0%} of the curvature: {pairs:,} pairs ({pairs / len(lam) / len(mu):.2%})")
    print(f"  heap {min(times['heap'].cpu):.2f} s, search {1e3 * min(times['search'].cpu):.1f} ms, and {1e3 * made:.0f} ms for the mask")
    print(f"  {faster:.0f}x as fast (target >= {TARGET}x); the pairs are {'the same' if same else 'NOT THE SAME'}")
    return int(faster < TARGET or not same)


if __name__ == "__main__":
    sys.exit(main())
