"""Changes to a model as values: an ``Edit`` describes what to change and holds no model.

Weight changes add a (low-rank or dense) delta to a weight; activation changes set, add to, scale,
project or overwrite attention rows at a site. ``with model.edited(edit)`` applies one and leaves
the model as it was; ``edit.scaled(g)`` and ``a + b`` make new edits; ``save`` and ``load`` use JSON and
safetensors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import InputError
from interp.sites import Site

ActivationKind = Literal["set", "add", "scale", "project", "pattern"]
When = Literal["prompt", "new", "all"]
_KINDS = ("set", "add", "scale", "project", "pattern")
_WHEN = ("prompt", "new", "all")


@dataclass(frozen=True, eq=False)
class WeightChange:
    """A delta to add to a weight, in the orientation ``x @ W``.

    Attributes:
        site: a weight site, with a head for that head's slice only.
        left: [rows, rank] with ``right``; alone it is the dense delta (a vector for biases and gains).
        right: [rank, cols] or None.
    """

    site: Site
    left: Tensor
    right: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse an activation site and factors that do not fit each other."""
        if not self.site.is_weight:
            raise InputError(f"{self.site} is an activation; a WeightChange needs a weight site such as L2H1.W_O")
        if self.right is not None and (self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]):
            raise InputError(f"factors of {self.site} do not fit: {tuple(self.left.shape)} @ {tuple(self.right.shape)}")

    @property
    def delta(self) -> Tensor:
        """The dense delta, in the factors' dtype."""
        return self.left if self.right is None else self.left @ self.right

    def scaled(self, g: float) -> WeightChange:
        """The same direction, ``g`` times as long."""
        return replace(self, left=self.left * g)


@dataclass(frozen=True, eq=False)
class ActivationChange:
    """A change of activations at a site, for every prompt alike.

    Attributes:
        site: an activation site; its position (a name, an integer, or all) says where in the prompt.
        kind: ``set`` x = value; ``add`` x = x + value; ``scale`` x = x * value; ``project`` x loses its
            component along the unit vector ``value`` times ``strength``; ``pattern`` the attention row becomes ``value``.
        value: broadcast against the activation without its prompt axis ([d_model], [d_head], scalar, ...).
        at: during generation: the prompt's positions, the new tokens, or both.
        strength: 1 is the full change, 0 none; what ``scaled`` multiplies.
    """

    site: Site
    kind: ActivationKind
    value: Tensor
    at: When = "all"
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Refuse weight sites and unknown words."""
        if self.site.is_weight or self.site.component == "svd":
            raise InputError(f"{self.site} is not an activation; an ActivationChange needs a site such as L3.resid_post")
        if self.kind not in _KINDS:
            raise InputError(f"unknown kind {self.kind!r} of activation change; known: {', '.join(_KINDS)}")
        if self.at not in _WHEN:
            raise InputError(f"at={self.at!r} is not one of {', '.join(_WHEN)}")
        if (self.kind == "pattern") != (self.site.component == "pattern"):
            raise InputError(f"kind 'pattern' and the site {self.site} do not go together; attention rows are changed at L9H6.pattern@END")
        if self.kind == "project" and abs(float(self.value.double().norm()) - 1) > 1e-4:
            raise InputError(f"project needs a unit vector at {self.site}; its norm is {float(self.value.norm()):.4g}")

    def scaled(self, g: float) -> ActivationChange:
        """The change applied ``g`` times as strongly: x + g (changed - x)."""
        return replace(self, strength=self.strength * g)

    def apply(self, x: Tensor) -> Tensor:
        """The changed activation for ``x`` (already cut to the site's head and positions)."""
        value = self.value.to(x)
        changed = {
            "set": lambda: value.expand_as(x),
            "pattern": lambda: value.expand_as(x),
            "add": lambda: x + value,
            "scale": lambda: x * value,
            "project": lambda: x - (x @ value)[..., None] * value,
        }[self.kind]()
        return changed if self.strength == 1 else x + self.strength * (changed - x)


@dataclass(frozen=True, eq=False)
class Edit:
    """Changes to a model, applied in order; see the module's first lines."""

    changes: tuple[WeightChange | ActivationChange, ...]
    name: str = ""

    @property
    def weights(self) -> tuple[WeightChange, ...]:
        """The weight changes."""
        return tuple(c for c in self.changes if isinstance(c, WeightChange))

    @property
    def activations(self) -> tuple[ActivationChange, ...]:
        """The activation changes."""
        return tuple(c for c in self.changes if isinstance(c, ActivationChange))

    def scaled(self, g: float) -> Edit:
        """Every change ``g`` times as strong; ``scaled(0)`` changes nothing."""
        return replace(self, changes=tuple(c.scaled(g) for c in self.changes))

    def __add__(self, other: Edit) -> Edit:
        """Both edits, this one first."""
        return Edit(self.changes + other.changes, " + ".join(n for n in (self.name, other.name) if n))

    @property
    def digest(self) -> str:
        """sha256 of everything that matters for the effect (not the name)."""
        h = hashlib.sha256()
        rows, tensors = self._rows()
        h.update(json.dumps(rows, sort_keys=True).encode())
        for key in sorted(tensors):
            t = tensors[key]
            h.update(f"{key}{t.dtype}{tuple(t.shape)}".encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    def _rows(self) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
        rows: list[dict[str, object]] = []
        tensors: dict[str, Tensor] = {}
        for i, change in enumerate(self.changes):
            if isinstance(change, WeightChange):
                rows.append({"type": "weight", "site": str(change.site)})
                tensors[f"{i}.left"] = change.left
                if change.right is not None:
                    tensors[f"{i}.right"] = change.right
            else:
                row = {
                    "type": "activation",
                    "site": str(change.site),
                    "kind": change.kind,
                    "at": change.at,
                    "strength": float(change.strength),
                }
                rows.append(row)
                tensors[f"{i}.value"] = change.value
        return rows, {k: t.detach().cpu().reshape(t.shape if t.ndim else (1,)).contiguous() for k, t in tensors.items()}

    def save(self, folder: str | Path) -> Path:
        """Write ``edit.json`` and ``edit.safetensors`` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows, tensors = self._rows()
        # Copies: two changes may share a factor, which safetensors refuses to write twice.
        save_file({k: t.clone() for k, t in tensors.items()}, folder / "edit.safetensors")
        (folder / "edit.json").write_text(json.dumps({"format": 1, "name": self.name, "digest": self.digest, "changes": rows}, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Edit:
        """Read what ``save`` wrote.

        Raises:
            InputError: the folder holds no edit, or one that is not whole.
        """
        folder = Path(folder)
        if not (folder / "edit.json").is_file() or not (folder / "edit.safetensors").is_file():
            raise InputError(f"{folder} holds no edit: edit.json and edit.safetensors are expected")
        changes: list[WeightChange | ActivationChange] = []
        try:
            body = json.loads((folder / "edit.json").read_text())
            tensors = load_file(folder / "edit.safetensors")
            for i, row in enumerate(body["changes"]):
                site = Site.parse(row["site"])
                if row["type"] == "weight":
                    changes.append(WeightChange(site, tensors[f"{i}.left"], tensors.get(f"{i}.right")))
                else:
                    kind, at = cast(ActivationKind, row["kind"]), cast(When, row["at"])
                    changes.append(ActivationChange(site, kind, tensors[f"{i}.value"], at, float(row["strength"])))
            found = cls(tuple(changes), str(body["name"]))
            whole = body["format"] == 1 and body["digest"] == found.digest
        except (KeyError, TypeError, ValueError, SafetensorError) as e:
            raise InputError(f"{folder} holds an edit that is not whole: {e} is missing or odd") from e
        if not whole:
            raise InputError(f"{folder} holds an edit that is not whole: its tensors are not those that edit.json was written for")
        return found
