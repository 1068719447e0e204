"""`boxes-tuned` after its first 100 steps."""

from __future__ import annotations

from functools import partial

from interp.organisms.recipes import boxes_tuned

train = partial(boxes_tuned.train, name="boxes-tuned-step100", until=100)
