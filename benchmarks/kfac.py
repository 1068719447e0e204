"""What do Kronecker factors cost beside curvlinops and kronfluence, in time and memory? On one random Llama and the same tokens.

All three sample one label per position and collect A and G of every matrix of every block; ours writes them to a folder as well. One
that is not installed is left out (``pip install --no-deps kronfluence curvlinops-for-pytorch backpack-for-pytorch einconv
linear_operator opt-einsum``). Their passes hold 16 prompts; ours chooses its own. Targets: at most 1.15x the CPU time of the faster one
of them, and at most the peak memory of the smaller one, each measured in a process of its own above what is there before.
With gold labels, which need no draws, the numbers of all three must agree to 1e-5.

    python benchmarks/kfac.py [--rounds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, machine, ratio, table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from interp.models import HookedModel
from interp.models.kfac import kfac_factors
from interp.sites import Site

TIME_LIMIT, TOLERANCE = 1.15, 1e-5
PROMPTS, LENGTH, ROWS, LAYERS, VOCABULARY = 32, 128, 16, 4, 2048
NAMES = {f"self_attn.{x}_proj": f"W_{x.upper()}" for x in "qkvo"}
NAMES |= {"mlp.gate_proj": "W_gate", "mlp.up_proj": "W_in", "mlp.down_proj": "W_out"}

Found = dict[str, tuple[Tensor, Tensor]]
"""Site -> (A, G), means over positions."""


def random_llama() -> Any:
    """4 layers of width 512, 14 million random parameters, no download."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def random_ids() -> Tensor:
    """Prompts of equal length; the last token is only ever a label."""
    return torch.randint(5, VOCABULARY, (PROMPTS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def maps(hf: Any) -> dict[str, str]:
    """Module name -> site."""
    return {f"model.layers.{i}.{name}": f"L{i}.{site}" for i in range(hf.config.num_hidden_layers) for name, site in NAMES.items()}


def ours(hf: Any, ids: Tensor, labels: str) -> Callable[[], Found]:
    """Our factors; read back only when they are compared."""
    model = HookedModel.load(hf)
    rows = ids.tolist()
    _ = model.wrapped  # wrapping is no part of collecting

    def run() -> Found:
        folder = Path(tempfile.mkdtemp())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # few positions
                factors = kfac_factors(model, rows, folder / "factors", labels=labels)  # type: ignore[arg-type]
            return {str(s): (factors.A(s), factors.G(s)) for s in factors.sites} if labels == "gold" else {}
        finally:
            shutil.rmtree(folder)

    return run


class Logits(nn.Module):
    """The model as curvlinops takes it: logits [prompt, vocab, pos]."""

    def __init__(self, hf: Any) -> None:
        """Of a plain model."""
        super().__init__()
        self.hf = hf

    def forward(self, ids: Tensor) -> Tensor:
        """Of token ids [prompt, pos]."""
        return self.hf(input_ids=ids, use_cache=False).logits.mT


def by_curvlinops(hf: Any, ids: Tensor, labels: str) -> Callable[[], Found]:
    """K-FAC (expand) of the summed cross-entropy."""
    from curvlinops import FisherType, KFACLinearOperator

    names = maps(hf)
    for name, p in hf.named_parameters():
        p.requires_grad_(name.removesuffix(".weight") in names)
    data = [(some[:, :-1], some[:, 1:]) for some in ids.split(ROWS)]

    def run() -> Found:
        operator = KFACLinearOperator(
            Logits(hf),
            nn.CrossEntropyLoss(reduction="sum"),
            [p for p in hf.parameters() if p.requires_grad],
            data,
            check_deterministic=False,
            fisher_type=FisherType.EMPIRICAL if labels == "gold" else FisherType.MC,
            num_per_example_loss_terms=ids.shape[1] - 1,
            num_data=len(ids),
        )
        operator.compute_kronecker_factors()
        inputs, gradients = operator._input_covariances, operator._gradient_covariances
        n = len(ids) * (ids.shape[1] - 1)
        return {site: (inputs[f"hf.{name}"], gradients[f"hf.{name}"] / n) for name, site in names.items()}

    return run


def by_kronfluence(hf: Any, ids: Tensor, labels: str) -> Callable[[], Found]:
    """Its covariance matrices; they belong to a wrapped model, so it has one of its own."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State
    from torch.utils.data import DataLoader

    names = maps(hf)

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["ids"][:, :-1], use_cache=False).logits.flatten(0, 1)
            if sample:
                with torch.no_grad():
                    wanted = torch.multinomial(logits.softmax(-1), 1).flatten()
            else:
                wanted = batch["ids"][:, 1:].flatten()
            return nn.functional.cross_entropy(logits, wanted, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(names)

    task = Language()
    prepared = prepare_model(hf, task)
    loader: Any = DataLoader([{"ids": row} for row in ids], batch_size=ROWS)  # type: ignore[arg-type]
    settings = FactorArguments(use_empirical_fisher=labels == "gold")

    def run() -> Found:
        _, found = fit_covariance_matrices_with_loader(prepared, State(cpu=True), task, loader, settings, disable_tqdm=True)
        n = len(ids) * (ids.shape[1] - 1)
        a, g = found["activation_covariance"], found["gradient_covariance"]
        return {site: (a[name] / n, g[name] / n) for name, site in names.items()}

    return run


VARIANTS: dict[str, Callable[[Any, Tensor, str], Callable[[], Found]]] = {
    "interp": ours,
    "curvlinops": by_curvlinops,
    "kronfluence": by_kronfluence,
}


def installed(name: str) -> bool:
    """Whether a variant can run; says so where it cannot."""
    if name == "interp" or find_spec(name) is not None:
        return True
    print(f"  {name} is not installed: left out")
    return False


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak since the last reset."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def peak_here(name: str) -> int:
    """Bytes that collecting adds at its peak; two prompts go first, so that what is imported and set up once is there."""
    hf = random_llama()
    small = LlamaForCausalLM(LlamaConfig(**{**hf.config.to_dict(), "hidden_size": 64, "intermediate_size": 64, "head_dim": 8})).eval()
    VARIANTS[name](small, random_ids()[:2], "sampled")()
    run = VARIANTS[name](hf, random_ids(), "sampled")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    run()
    return resident("VmHWM") - before


def peaks(names: list[str]) -> dict[str, int]:
    """Peak of each in a process of its own."""
    found = {}
    for name in names:
        words = [sys.executable, __file__, "--peak", name]
        # The C library would keep freed blocks for later; told not to, the process holds what its tensors hold.
        settings = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | settings)
        found[name] = int(done.stdout.split()[-1])
    return found


def difference(found: Found, known: Found) -> float:
    """Largest relative difference of a factor, in the Frobenius norm."""
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for s in known for x, y in zip(found[s], known[s], strict=True))


def main() -> int:
    """Print times, memory and agreement; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_here(options.peak))
        return 0
    print(machine(options.threads))
    names = [name for name in VARIANTS if installed(name)]
    others = [name for name in names if name != "interp"]
    times = interleaved({name: VARIANTS[name](random_llama(), random_ids(), "sampled") for name in names}, options.rounds, warmups=1)
    print(f"\n{PROMPTS} x {LENGTH} scored positions, {options.rounds} interleaved rounds")
    print(table(times, "interp", PROMPTS * LENGTH))
    memory = peaks(names)
    print("\npeak above the model: " + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items()))
    gold = {name: VARIANTS[name](random_llama(), random_ids(), "gold")() for name in names}
    assert set(map(Site.parse, gold["interp"])) == {Site.parse(s) for s in maps(random_llama()).values()}
    far = {name: difference(gold["interp"], gold[name]) for name in others}
    print("largest relative difference of a factor, gold labels: " + ", ".join(f"{name} {x:.1e}" for name, x in far.items()))
    slower = {name: ratio(times["interp"], times[name]) for name in others}
    print("\nCPU time of ours: " + ", ".join(f"{x:.2f}x of {name}" for name, x in slower.items()) + f" (target <= {TIME_LIMIT}x of each)")
    small = not others or memory["interp"] <= min(memory[name] for name in others)
    print(f"peak memory: {'at most' if small else 'MORE than'} that of the smallest of the others")
    return int(any(x > TIME_LIMIT for x in slower.values()) or not small or any(not x < TOLERANCE for x in far.values()))


if __name__ == "__main__":
    sys.exit(main())
