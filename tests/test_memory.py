"""Peak memory of long prompts, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import resource, sys
import torch
from tiny_checkpoints import tiny
from interp.models import Batch, HookedModel

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20

model = HookedModel.load(tiny("gpt2", n_positions=1024))
draws = torch.Generator().manual_seed(0)
rows = [torch.randint(3, 19, (800,), generator=draws).tolist() for _ in range(20)]
model.logits([[5] * 8], at="END")
before = peak()
found = model.logits(rows, at="END")
alone = model.logits(rows[7:8], at="END")
assert (found[7] - alone[0]).abs().max() < 1e-4
print(model._budget.size / 2**20, peak() - before)
"""


def test_attention_of_long_prompts_is_within_the_budget() -> None:
    """All at once, 20 prompts of 800 tokens take 200 MB for one tensor of scores of 4 heads, of which several are there at a time."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    budget, grown = map(float, done.stdout.split())
    assert grown < 2.5 * budget
