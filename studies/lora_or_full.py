"""Does an adapter leave intruder dimensions where full tuning does not (after Shuttleworth et al. 2024, arXiv 2410.21228)?

`boxes-lora` (an adapter of rank 8) and `boxes-tuned` (all weights) were tuned from `base` on the same task. Singular vectors of their
weights that base does not have are counted, matrix by matrix, beside random changes of the same norm, at several thresholds; directions
of known size are planted in base to see from where on one would be found; and what counts as an intruder is made weaker and stronger.

    python studies/lora_or_full.py [--out results/lora_or_full] [--n 96] [--quick]

Writes ``lora_or_full.html`` and prints the tables. About four minutes on one core, one with ``--quick``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import interp
from interp.analyses.intruder_scaling import KINDS
from interp.models import HookedModel, ModelPair
from interp.models.intruders import intruders
from interp.organisms import planted
from interp.sites import Site

BASE, LORA, FULL = "base", "boxes-lora", "boxes-tuned"
K, THRESHOLD = 10, 0.5
LOOSER = (0.5, 0.6, 0.7, 0.8)
WIDER = 20
"""As many components are looked at in the table of thresholds; the definition has K."""
LOOSE = 0.7
"""Threshold of the second sweep, for which there are enough components to scale."""
SIZES = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Of planted directions, in units of base's singular value number K."""
PLANTS = (("W_Q", 1), ("W_O", 2), ("W_in", 0), ("W_out", 3))


@dataclass
class Found:
    """What is measured.

    Attributes:
        dims: model -> its intruder dimensions by the definition.
        wider: model -> the same, the WIDER strongest compared.
        sweeps: (model, threshold) -> what scaling them does.
        plants: size -> of the planted matrices the share with exactly the planted intruder.
        accuracy: model -> its answers.
    """

    dims: dict[str, Any] = field(default_factory=dict)
    wider: dict[str, Any] = field(default_factory=dict)
    sweeps: dict[tuple[str, float], Any] = field(default_factory=dict)
    plants: dict[float, float] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)


def measured(n: int, *, quick: bool, seed: int = 0) -> Found:
    """Everything, in the order of the page."""
    found = Found()
    draws = 2 if quick else 10
    for name in (LORA, FULL):
        pair = ModelPair.load(BASE, name)
        found.accuracy[name] = interp.task_accuracy(pair, interp.task("boxes"), n=n, seed=seed)
        for k, into in ((K, found.dims), (WIDER, found.wider)):
            into[name] = interp.intruder_dimensions(pair, k=k, threshold=THRESHOLD, draws=draws, seed=seed)
        prompts = interp.task("boxes").generate(pair, n=n, seed=seed + 1)
        text: Any = interp.task("plain_text").generate(pair, n=max(8, n // 2), seed=seed)
        settings: dict[str, Any] = {"seed": seed, "draws": 1 if quick else 5}
        if quick:
            settings["factors"] = (0.0, 0.5, 1.0, 1.5)
        for threshold in (THRESHOLD, LOOSE):
            if int(counted(found.dims[name], K, threshold)[0].sum()):
                found.sweeps[name, threshold] = interp.intruder_scaling(pair, prompts, text, k=K, threshold=threshold, **settings)
    found.plants = {size: share_found(size, seed) for size in SIZES}
    return found


def counted(dims: Any, k: int, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Intruders of every matrix [layer module], and after each random change [draw layer module]."""
    return tuple(intruders(x[..., :k, :], threshold, dims.side).sum(-1) for x in (dims.cosine, dims.chance))  # type: ignore[return-value]


def share_found(size: float, seed: int) -> float:
    """Of some matrices with one planted direction each, the share in which exactly one intruder is found, and none in others."""
    first, second = HookedModel.load(BASE), HookedModel.load(BASE)
    hits = 0
    for module, layer in PLANTS:
        sigma = size * float(torch.linalg.svdvals(first.weight(Site(module, layer)))[K - 1])
        with second.edited(planted("rank1", second, layer=layer, module=module, sigma=sigma, seed=seed)):
            dims = interp.intruder_dimensions(ModelPair(first, second), k=K, threshold=THRESHOLD, draws=0)
        where = dims.count.nonzero().tolist()
        hits += where == [[layer, dims.labels["module"].index(module)]] and int(dims.count.max()) == 1
    return hits / len(PLANTS)


# ----------------------------------------------------------------------------------------------- tables


def matrices(found: Found) -> str:
    """Every matrix: intruders, what random changes give, the lowest cosine, the size of the change."""
    lines = [
        f"{'intruders of ' + str(K) + ', |cos| < ' + format(THRESHOLD, 'g'):34} {LORA:>34} {FULL:>34}",
        f"{'':34}" + 2 * f"{'n':>7}{'random':>9}{'lowest':>9}{'ratio':>10}",
    ]
    sides = [((d.count, d.chance_count), d.cosine[..., 1].amin(-1), d.ratio) for d in found.dims.values()]
    first = next(iter(found.dims.values()))
    for layer, names in enumerate(first.names):
        for m, name in enumerate(names):
            cells = ""
            for (n, null), lowest, ratio in sides:
                cells += f"{int(n[layer, m]):>7}{float(null[:, layer, m].double().mean()):>9.1f}"
                cells += f"{float(lowest[layer, m]):>9.2f}{float(ratio[layer, m]):>10.2f}"
            lines.append(f"  {name:32}{cells}")
    cells = ""
    for (n, null), lowest, ratio in sides:
        cells += (
            f"{int(n.sum()):>7}{float(null.flatten(1).sum(1).double().mean()):>9.1f}{float(lowest.min()):>9.2f}{float(ratio.max()):>10.2f}"
        )
    lines.append(f"  {'all (lowest; largest ratio)':32}{cells}")
    return "\n".join([*lines, "ratio: largest singular value of what tuning added over base's number 10; lowest: smallest of the m_j."])


def thresholds(found: Found) -> str:
    """Counts at looser thresholds and further down the spectrum, beside random changes."""
    lines = [f"{'intruders of all matrices':34} {LORA:>34} {FULL:>34}"]
    for k in (K, WIDER):
        for threshold in LOOSER:
            cells = ""
            for dims in found.wider.values():
                n, null = counted(dims, k, threshold)
                drawn = null.flatten(1).sum(1)
                told = f"{int(n.sum())} (random {float(drawn.double().mean()):.1f}, {int(drawn.min())} to {int(drawn.max())})"
                cells += f" {told:>34}"
            lines.append(f"  {f'first {k}, |cos| < {threshold:g}':32}{cells}")
    return "\n".join(lines)


def sweeps(found: Found) -> str:
    """One row per strength: answers, margin and text, of the intruders with 95 % intervals, of the controls from lowest to highest draw.

    A control of one draw has no such ends.
    """
    lines = []
    for (name, threshold), result in found.sweeps.items():
        lines.append(f"{name}, the {result.counts[0]} with |cos| < {threshold:g} made so many times as strong; change from {name}")
        lines.append(f"  {'':26}{'answers, points':>26}{'margin':>28}{'text, nats per token':>32}")
        for kind in KINDS:
            rows = result.of_kind(kind)
            for f, factor in enumerate(result.factors):
                if not rows or (factor == 1 and kind != "intruders"):
                    continue
                cells = ""
                for what, unit, places, width in (("right", 100, 1, 26), ("margin", 1, 2, 28), ("loss", 1, 4, 32)):
                    each = [result.change(what, i, f) for i in rows]
                    values = [unit * float(e.value) for e in each]
                    one = kind == "intruders"
                    ends = (unit * float(each[0].low), unit * float(each[0].high)) if one else (min(values), max(values))
                    told = f"{sum(values) / len(values):+.{places}f}"
                    told += f" [{ends[0]:+.{places}f}, {ends[1]:+.{places}f}]" if one or len(values) > 1 else ""
                    cells += f"{told:>{width}}"
                lines.append(f"  {f'{kind} x {factor:g}':26}{cells}")
        tuned, base = (f"{float((m > 0).double().mean()):.1%}" for m in (result.tuned_margin, result.base_margin))
        lines.append(f"  {f'{name} itself':26}{tuned:>26}{'':28}{float(result.tuned_loss.mean()):>32.4f}")
        lines += [f"  {'base':26}{base:>26}{'':28}{float(result.base_loss.mean()):>32.4f}", ""]
    return "\n".join(lines).rstrip() or "there is nothing to scale"


# ---------------------------------------------------------------------------------------------- in words


def verdict(found: Found) -> list[str]:
    """The answer, whatever it is."""
    lines = [decision(*(numbers(found.dims[name]) for name in (LORA, FULL)))]
    seen = [size for size, share in found.plants.items() if share == 1]
    smallest = min((s for s in seen if all(found.plants[t] == 1 for t in found.plants if t >= s)), default=None)
    where = f"from {smallest:g} times that value on" if smallest is not None else "at none of the sizes"
    shares = ", ".join(f"{share:.0%} at {size:g}" for size, share in found.plants.items())
    ratios = {name: found.dims[name].ratio for name in (LORA, FULL)}
    sizes = " and ".join(f"{float(r.max()):.2f} in {name} (median {float(r.median()):.2f})" for name, r in ratios.items())
    lines.append(
        f"Could there be any? The largest singular value of what tuning added is at most {sizes} times base's number {K}; a random "
        f"direction planted in a matrix of base is found, and nothing else, {where} ({shares} of {len(PLANTS)} matrices)."
    )
    return [*lines, *(f"{name}, |cos| < {threshold:g}: {sweep.summary()}." for (name, threshold), sweep in found.sweeps.items())]


def numbers(dims: Any) -> tuple[int, int, int]:
    """Intruders by the definition, those of them that are no mixture of base's neighbours, and the most that a random change made."""
    null = dims.chance_count.flatten(1).sum(1)
    return int(dims.count.sum()), int(dims.windowed.sum()), int(null.max()) if len(null) else 0


def decision(lora: tuple[int, int, int], full: tuple[int, int, int]) -> str:
    """What the counts say about the paper's claim: those of the adapter, then those of full tuning."""
    told = [
        f"{name} has {n} ({alone} of them no mixture of base's neighbours; random changes made at most {null})"
        for name, (n, alone, null) in ((LORA, lora), (FULL, full))
    ]
    if lora[0] > max(lora[2], full[0]) and lora[1] > full[1]:
        said = "The adapter left more intruder dimensions than full tuning"
    elif full[0] > max(full[2], lora[0]) and full[1] > lora[1]:
        said = "Full tuning left more intruder dimensions than the adapter"
    else:
        said = "Not found here: the adapter left no intruder dimensions that stand the second criterion and full tuning lacks"
    return f"{said}: {'; '.join(told)}."


WARNINGS = (
    "The models are small (28 matrices, 64 to 120 singular vectors each), and both learn the task nearly completely; the paper tuned "
    "RoBERTa-base. Each of the shipped models was tuned once, with one learning rate, so nothing is known about others.",
    "What counts as an intruder under a looser threshold is a turned singular vector of base, not a new one: removing it also removes what "
    "base did with it. The controls say how much that alone costs.",
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/lora_or_full"), help="folder of the page")
    parser.add_argument("--n", type=int, help="prompts (96; 24 with --quick); half as many texts")
    parser.add_argument("--quick", action="store_true", help="fewer strengths and draws")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, random changes and controls")
    given = parser.parse_args(words)
    start = time.monotonic()
    try:
        if (n := given.n if given.n is not None else (24 if given.quick else 96)) < 8:
            raise interp.InputError(f"--n is {n}, expected 8 or more")
        found = measured(n, quick=given.quick, seed=given.seed)
        lines = verdict(found)
        results = [*found.accuracy.values(), *found.dims.values(), *found.sweeps.values()]
        page = interp.write_report(
            results, given.out / "lora_or_full.html", title="LoRA or full fine-tuning?", verdict=lines, warnings=WARNINGS
        )
    except interp.InputError as error:
        parser.error(str(error))
    tables = [matrices(found), thresholds(found), sweeps(found)]
    print(*tables, *lines, f"{page} ({time.monotonic() - start:.0f} s)", sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
