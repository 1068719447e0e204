"""Timing that survives a shared machine: variants take turns, and ratios are of runs that stood side by side."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path


@dataclass
class Times:
    """Seconds of each round of one variant: on the wall, and of all threads of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 1) -> dict[str, Times]:
    """Time every variant once per round; each round starts with another one."""
    names = list(variants)
    times = {name: Times() for name in names}
    for step in range(-warmups, rounds):
        for name in (names[(step + i) % len(names)] for i in range(len(names))):
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            if step >= 0:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def ratio(times: Times, base: Times, clock: str = "cpu") -> float:
    """Median over rounds of this variant's time divided by the base's in the same round."""
    return statistics.median(a / b for a, b in zip(getattr(times, clock), getattr(base, clock), strict=True))


def table(times: Mapping[str, Times], base: str, tokens: int | None = None) -> str:
    """Lines with minimum and median milliseconds and the ratios to ``base``; with ``tokens``, also tokens per second."""
    heads = ["cpu min", "cpu med", "wall min", "wall med", "cpu ratio", "wall ratio"] + (["tokens/s"] if tokens else [])
    lines = [f"  {'milliseconds':<44}" + "".join(f"{h:>11}" for h in heads)]
    for name, t in times.items():
        cells = [f"{1e3 * f(c):.1f}" for c in (t.cpu, t.wall) for f in (min, statistics.median)]
        cells += [f"{ratio(t, times[base], clock):.2f}x" for clock in ("cpu", "wall")]
        cells += [f"{tokens / min(t.wall):,.0f}"] if tokens else []
        lines.append(f"  {name:<44}" + "".join(f"{c:>11}" for c in cells))
    return "\n".join(lines)


def machine(threads: int) -> str:
    """One line for the top of a benchmark: what ran where."""
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown processor")
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "transformer_lens"))
    return f"{model}, {os.cpu_count()} cores, {threads} thread(s), {load}; {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
