"""Many interventions on the same prompts: the engine under every patching analysis.

``sweep`` goes on from one run of the prompts and computes again only what a patch can change; ``plain`` runs the
whole model once per patch and is what it is checked against.
"""

from __future__ import annotations

from interp.sweeps.engine import Swept, sweep
from interp.sweeps.patches import Patch, Source, check
from interp.sweeps.plain import floor, plain, run

__all__ = ["Patch", "Source", "Swept", "check", "floor", "plain", "run", "sweep"]
