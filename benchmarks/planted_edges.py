"""Do edge scores find the edges that were written into a model? AUROC of every method on the hand-built models, beside random scores.

python benchmarks/planted_edges.py
"""

from __future__ import annotations

import os
import sys

os.environ["TQDM_DISABLE"] = "1"  # read when a bar is imported

import torch  # noqa: E402

from interp import organisms  # noqa: E402
from interp.analyses.edge_attribution import edge_attribution  # noqa: E402
from interp.stats import auc  # noqa: E402

AIM = 0.95
DRAWS = 100


def main() -> int:
    """Print one line per model; 1 if exact scores or EAP-IG miss the aim."""
    print(f"{'model':<14}{'edges':>6}{'planted':>9}{'exact':>8}{'eap_ig':>8}{'eap':>8}   random, {DRAWS} draws")
    missed = []
    for name in organisms.HAND_BUILT:
        built = organisms.hand_built(name)
        pairs, found = built.task.generate(built.model, n=8, seed=5), {}
        for method in ("exact", "eap_ig", "eap"):
            table = edge_attribution(built.model, pairs, method=method, per_position=True).to_frame()
            planted = torch.tensor(table.edge.isin([str(edge) for edge in built.circuit.edges]).to_numpy())
            score = torch.tensor(table.effect.abs().to_numpy())
            found[method] = float(auc(score[planted], score[~planted]).value)
        draws = torch.Generator().manual_seed(0)
        random = torch.stack([auc(x[planted], x[~planted]).value for x in torch.rand(DRAWS, len(planted), generator=draws).double()])
        cells = "".join(f"{found[method]:>8.3f}" for method in ("exact", "eap_ig", "eap"))
        print(
            f"{name:<14}{len(planted):>6}{int(planted.sum()):>9}{cells}   {float(random.mean()):.2f} +- {float(random.std()):.2f}",
            flush=True,
        )
        missed += [f"{name}, {method}: {found[method]:.3f}" for method in ("exact", "eap_ig") if found[method] < AIM]
    print("\n".join(["missed:", *missed] if missed else [f"exact and eap_ig are at least {AIM} everywhere"]))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
