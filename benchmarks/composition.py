"""What do all composition scores of a model of GPT-2 small's size cost, in time and memory? On random weights, no download.

12 layers of 12 heads, d_model 768: 144 SVDs, 9 216 components in 144 receivers, as queries, keys and values, with chance beside them.
Targets: a minute for the three together, 2 GB at the peak above the model's own weights. The whole matrices agree with
TransformerLens' ``composition_scores`` to 1e-6; beside it stands what that takes for the whole matrices alone.

    python benchmarks/composition.py [--threads 1] [--draws 1000]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from timing import machine
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores
from transformers import GPT2Config, GPT2LMHeadModel

from interp.analyses.composition import CompositionResult, composition
from interp.models import HookedModel
from interp.models.heads import folded_heads

SECONDS, BYTES = 60, 2 * 2**30
KINDS = ("q", "k", "v")


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak since the last reset."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def random_gpt2() -> HookedModel:
    """GPT-2 small's blocks with a small vocabulary, which no score looks at."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_1.weight" in name:
                p.copy_(0.5 + torch.rand_like(p))
    return HookedModel.load(model)


def theirs(model: HookedModel) -> dict[str, torch.Tensor]:
    """TransformerLens' scores of whole matrices, every layer in every later one, [kind][sender receiver] with NaN as in ours."""
    layers, heads = model.shape.n_layers, model.shape.n_heads
    made = [folded_heads(model, at) for at in range(layers)]
    found = {kind: torch.full((layers * heads, layers * heads), torch.nan, dtype=torch.float64) for kind in KINDS}
    for later in range(1, layers):
        qk, ov = made[later].factors("qk"), made[later].factors("ov")
        reads = {"q": FactoredMatrix(*qk), "k": FactoredMatrix(qk[1].mT, qk[0].mT), "v": FactoredMatrix(*ov)}
        for earlier in range(later):
            sends = FactoredMatrix(*made[earlier].factors("ov"))
            for kind, read in reads.items():
                rows, columns = (slice(at * heads, (at + 1) * heads) for at in (earlier, later))
                found[kind][rows, columns] = composition_scores(sends, read)
    return {kind: x[: (layers - 1) * heads, heads:] for kind, x in found.items()}


def main() -> int:
    """Print times and memory; 1 when a target is missed or the numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    model = random_gpt2()
    composition(model, senders="L0H0", receivers="L1H0", draws=2)  # what is imported and set up once
    before, cpu, wall = resident("VmRSS"), 0.0, 0.0
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    results: dict[str, CompositionResult] = {}
    for kind in KINDS:
        start = time.process_time(), time.perf_counter()
        results[kind] = composition(model, kind=kind, draws=options.draws)
        spent = time.process_time() - start[0], time.perf_counter() - start[1]
        cpu, wall = cpu + spent[0], wall + spent[1]
        cells = int((~results[kind].component.isnan()).sum())  # pyright: ignore[reportOptionalMemberAccess]
        row = results[kind].top(1).iloc[0]
        print(f"  {kind}: {spent[0]:6.1f} s of CPU, {spent[1]:6.1f} s; {cells:,} scores of components, the largest z {row.z:.1f}")
    peak = resident("VmHWM") - before
    start = time.process_time()
    known = theirs(model)
    other = time.process_time() - start
    error = max(float((known[kind] - results[kind].score[0]).abs().nan_to_num(0).max()) for kind in KINDS)
    print(f"\nall three: {cpu:.1f} s of CPU, {wall:.1f} s (target <= {SECONDS} s)")
    print(f"peak: {peak / 2**20:.0f} MiB above the model (target <= {BYTES / 2**20:.0f} MiB)")
    print(f"TransformerLens, whole matrices only: {other:.1f} s of CPU; largest difference {error:.1e} (limit 1e-6)")
    return int(cpu > SECONDS or peak > BYTES or not error < 1e-6)


if __name__ == "__main__":
    sys.exit(main())
