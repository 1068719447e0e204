"""Sums of outer products of rows, kept as strips of lower triangles: half the memory, half the work."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from interp.errors import InputError
from interp.models.factors import named_strips, strip_rows


def triangle_bytes(size: int) -> int:
    """Bytes of the sums of one symmetric matrix."""
    return 8 * sum((last - first) * last for first, last in strip_rows(size))


class OuterSums:
    """Sums of outer products, as strips of lower triangles, by name (``A L0.W_Q``)."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.strips: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add x^T x of rows x; the product of a pass in the precision of x, its sum with the others in float64."""
        size = x.shape[1]
        if name not in self.strips:
            self.strips[name] = [x.new_zeros(b - a, b, dtype=torch.float64) for a, b in strip_rows(size)]
        strips = self.strips[name] = [s.to(x.device) for s in self.strips[name]]
        for strip, (first, last) in zip(strips, strip_rows(size), strict=True):
            strip += x[:, first:last].T @ x[:, :last]

    def tensors(self) -> dict[str, Tensor]:
        """All strips by the names that they have in files.

        Raises:
            InputError: some are not finite.
        """
        found: dict[str, Tensor] = {}
        for name, strips in self.strips.items():
            if not all(bool(s.isfinite().all()) for s in strips):
                why = "activations or gradients overflow; load the model in a wider dtype"
                raise InputError(f"the factor {name} is not finite, though the loss is: {why}")
            kind, _, of = name.partition(" ")
            found |= named_strips(kind, of, (s.cpu() for s in strips))
        return found

    def load(self, file: Path) -> None:
        """Take over those of a file."""
        self.strips = {}
        with safe_open(file, framework="pt") as held:
            for key in sorted(held.keys(), key=lambda k: (k.rpartition("/")[0], int(k.rpartition("/")[2]))):
                self.strips.setdefault(key.rpartition("/")[0], []).append(held.get_tensor(key))
