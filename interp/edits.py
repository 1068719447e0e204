"""Changes to a model as values: an ``Edit`` describes what to change and holds no model.

Weight changes add a (low-rank or dense) delta to a weight; activation changes set, add to, scale,
project or overwrite attention rows at a site; ``attention_edit`` sets or blocks what heads attend to at named positions,
which may differ from prompt to prompt; ``ChannelChange`` moves what heads send to some receivers only. ``with model.edited(edit)``
applies one and leaves the model as it was; ``edit.scaled(g)`` and ``a + b`` make new edits; ``save`` and ``load`` use JSON and
safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import InputError
from interp.sites import Heads, Site

ActivationKind = Literal["set", "add", "scale", "project", "pattern"]
When = Literal["prompt", "new", "all"]
_KINDS = ("set", "add", "scale", "project", "pattern")
_WHEN = ("prompt", "new", "all")
Attention = Literal["set", "block"]
_HEAD = re.compile(r"L(\d+)(?:H(\d+)|(\+))?")


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


@dataclass(frozen=True)
class AttentionChange:
    """A change of what heads attend to from one position, looked up in every prompt.

    Attributes:
        heads: ``L9H6,L9H9``; ``L9`` is every head of a layer, ``L9+`` every head from that layer on.
        query: position whose attention rows change; for generated tokens, every one of them.
        keys: positions in the prompt that are attended to, or not.
        kind: ``set`` the row to the keys alone, behind the softmax; ``block`` the keys, before it, so that the others share what they had.
        weights: attention of each of ``keys`` when set, shared equally by the tokens that it names; None shares 1 among all tokens.
        at: during generation: the prompt's positions, the new tokens, or both.
        strength: 1 is the full change, 0 none; a block has nothing in between.
    """

    heads: str
    query: str | int
    keys: tuple[str | int, ...]
    kind: Attention
    weights: tuple[float, ...] | None = None
    at: When = "prompt"
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Bring heads and positions into one form, and refuse what is no row of attention."""
        entries = [entry.strip() for entry in self.heads.split(",")]
        for entry in entries:
            if not _HEAD.fullmatch(entry):
                raise InputError(f"{entry!r} names no heads; write L9H6,L9H9 or L9 (a layer) or L9+ (all layers from there)")
        if len(set(entries)) < len(entries):
            raise InputError(f"heads appear twice in {self.heads}")
        if not self.keys:
            raise InputError("an attention edit needs at least one key, such as keys='S2'")
        if self.kind not in ("set", "block"):
            raise InputError(f"unknown kind {self.kind!r} of attention edit; known: set, block")
        if self.at not in _WHEN:
            raise InputError(f"at={self.at!r} is not one of {', '.join(_WHEN)}")
        if self.weights is not None and (self.kind == "block" or len(self.weights) != len(self.keys)):
            raise InputError(f"weights are those of the {len(self.keys)} keys of rows that are set, not {self.weights} for {self.kind}")
        if self.weights is not None and not (min(self.weights) >= 0 and abs(math.fsum(self.weights) - 1) < 1e-6):
            raise InputError(f"weights of attention are at least 0 and add up to 1, but they are {self.weights}")
        if self.kind == "block" and self.strength not in (0, 1):
            raise InputError(f"a key is blocked or not: such an edit can be scaled by 0 or 1, not to {self.strength:g}")
        places = [Site("pattern", 0, None, place).position for place in (self.query, *self.keys)]
        for name, value in {"heads": ",".join(entries), "query": places[0], "keys": tuple(places[1:])}.items():
            object.__setattr__(self, name, value)

    def scaled(self, g: float) -> AttentionChange:
        """Rows ``g`` times as far on their way, x + g (changed - x); a block as it is, or none.

        Raises:
            InputError: a part of a block.
        """
        return replace(self, strength=self.strength * g)

    def within(self, n_layers: int, n_heads: int) -> dict[int, tuple[int, ...]]:
        """Layer -> heads, in a model of these sizes.

        Raises:
            InputError: a layer or head that the model does not have.
        """
        found: dict[int, set[int]] = {}
        for entry in self.heads.split(","):
            layer, head, onward = _HEAD.fullmatch(entry).groups()  # type: ignore[union-attr]
            if int(layer) >= n_layers:
                raise InputError(f"{entry}: layer {layer} is out of range; the model has layers 0 to {n_layers - 1}")
            if head is not None and int(head) >= n_heads:
                raise InputError(f"{entry}: head {head} is out of range; the model has heads 0 to {n_heads - 1}")
            for i in range(int(layer), n_layers if onward else int(layer) + 1):
                found.setdefault(i, set()).update(range(n_heads) if head is None else [int(head)])
        return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}

    def __str__(self) -> str:
        """As a person would write it."""
        to = ",".join(map(str, self.keys))
        return f"{self.heads}@{self.query} {'only attends to' if self.kind == 'set' else 'cannot attend to'} {to}"


def attention_edit(
    heads: Heads | str,
    *,
    keys: str | int | Sequence[str | int],
    query: str | int = "END",
    kind: Attention = "set",
    weights: Sequence[float] | None = None,
    at: When = "prompt",
    name: str = "",
) -> Edit:
    """Force heads to attend to tokens, or keep them from it; values, other rows and all that follows stay as the model has them.

    ``set`` makes the whole attention row of the query 0 except at the keys, which get 1 in all (Merullo et al. 2024, arXiv
    2310.08744). ``block`` takes the keys out before the softmax, so that the rest of the row shares what they had (attention knockout,
    Geva et al. 2023, arXiv 2304.14767). Positions are looked up in each prompt when the model runs: a name may stand for several tokens,
    other ones in every prompt.

    Args:
        heads: ``L9H6,L9H9@END; L7H3@S2`` (a position is the query of those heads), ``L9`` for every head of a layer, ``L9+`` for every
            head from that layer on.
        keys: positions attended to, or blocked.
        query: position of the rows, for heads that name none.
        kind: ``set`` or ``block``.
        weights: attention of each key when set, shared by the tokens that it names; by default all tokens have the same.
        at: ``prompt`` changes rows of the prompt, ``new`` those of every generated token, ``all`` both.
        name: of the edit.

    Raises:
        InputError: a text that names no heads, weights that are none, an unknown word.
    """
    changes = []
    wanted = (keys,) if isinstance(keys, str | int) else tuple(keys)
    shares = None if weights is None else tuple(float(w) for w in weights)
    for group in str(heads).split(";"):
        match = re.fullmatch(r"\s*(?:[A-Za-z_]\w*\s*=)?\s*([^=@]+?)\s*(?:@(\S+))?\s*", group)
        if match is None:
            raise InputError(
                f"{group.strip()!r} names no heads; write L9H6,L9H9@END; L7H3@S2 or L9 (a layer) or L9+ (all layers from there)"
            )
        changes.append(AttentionChange(match[1], match[2] or query, wanted, kind, shares, at))
    return Edit(tuple(changes), name)


@dataclass(frozen=True, eq=False)
class ChannelChange:
    """A change of what heads send along directions, for some receivers only: all else reads what the heads write.

    A head writes ``c v`` along a unit vector v, with c = (z @ W_O) . v of the very run. Each receiver reads, through its own norm, a
    copy of the stream to which ``(gain - 1) c + to`` times v is added, for all senders together.

    Attributes:
        senders: ``result`` of one head each, at a position or all.
        directions: the unit vectors, [sender d_model].
        gain: what each coefficient is multiplied by.
        to: what is then added to it.
        receivers: ``q``, ``k`` or ``v`` of heads in later layers; without a head all of the layer; k and v count key/value heads.
        at: during generation: the prompt's positions, the new tokens, or both.
        strength: 1 is the full change, 0 none; what ``scaled`` multiplies.
    """

    senders: tuple[Site, ...]
    directions: Tensor
    gain: tuple[float, ...]
    to: tuple[float, ...]
    receivers: tuple[Site, ...]
    at: When = "all"
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no way from a head to a later one."""
        n = len(self.senders)
        if not n or not self.receivers:
            raise InputError("a change of channels needs at least one sender and one receiver, such as L8H10.result and L9H6.q")
        if self.directions.ndim != 2 or len(self.directions) != n or (len(self.gain), len(self.to)) != (n, n):
            came = f"directions {tuple(self.directions.shape)}, {len(self.gain)} gains and {len(self.to)} values"
            raise InputError(f"{n} senders need a direction, a gain and a value each, but there are {came}")
        if bool(((self.directions.double().norm(dim=1) - 1).abs() > 1e-4).any()):
            raise InputError(f"directions of channels are unit vectors, but their norms are {self.directions.norm(dim=1).tolist()}")
        if self.at not in _WHEN:
            raise InputError(f"at={self.at!r} is not one of {', '.join(_WHEN)}")
        for sender in self.senders:
            if sender.component != "result" or sender.head is None:
                raise InputError(f"{sender} does not send along a channel; senders are heads such as L8H10.result@END")
        for receiver in self.receivers:
            if receiver.component not in ("q", "k", "v") or receiver.position is not None:
                raise InputError(f"{receiver} does not receive a channel; receivers are q, k or v of heads, without a position: L9H6.q")
            for sender in self.senders:
                if not _layer(sender) < _layer(receiver):
                    raise InputError(f"{receiver} is not later than {sender}: a head reads what heads of earlier layers have written")
        for i, one in enumerate(self.receivers):
            alike = (r for r in self.receivers[:i] if replace(r, head=None) == replace(one, head=None))
            if any(r.head == one.head or None in (r.head, one.head) for r in alike):
                raise InputError(f"{one} is named twice among the receivers {', '.join(map(str, self.receivers))}")

    def scaled(self, g: float) -> ChannelChange:
        """The change applied ``g`` times as strongly: coefficients go ``g`` times as far."""
        return replace(self, strength=self.strength * g)


def _layer(site: Site) -> int:
    return site.layer or 0


Change = WeightChange | ActivationChange | AttentionChange | ChannelChange


@dataclass(frozen=True, eq=False)
class Edit:
    """Changes to a model, applied in order; see the module's first lines."""

    changes: tuple[Change, ...]
    name: str = ""

    @property
    def weights(self) -> tuple[WeightChange, ...]:
        """The weight changes."""
        return tuple(c for c in self.changes if isinstance(c, WeightChange))

    @property
    def activations(self) -> tuple[ActivationChange | AttentionChange | ChannelChange, ...]:
        """The changes of activations, attention among them."""
        return tuple(c for c in self.changes if not isinstance(c, WeightChange))

    def __repr__(self) -> str:
        """Its name, and what it changes."""
        shown = [_told(change) for change in self.changes[:4]] + [f"{len(self.changes) - 4} more"] * (len(self.changes) > 4)
        return f"<Edit{f' {self.name!r}' if self.name else ''} of {', '.join(shown) or 'nothing'}>"

    def _repr_html_(self) -> str:
        """One line per change."""
        from interp.plots.cell import table

        title = f"Edit{f' {self.name}' if self.name else ''}: {len(self.changes)} change{'' if len(self.changes) == 1 else 's'}"
        rows = [(_told(change), _size_of(change), f"{getattr(change, 'strength', 1):g}") for change in self.changes]
        return table(title, ("what", "how much", "strength"), rows)

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
            elif isinstance(change, AttentionChange):
                rows.append({"type": "attention", **asdict(change), "strength": float(change.strength)})
            elif isinstance(change, ChannelChange):
                names = {"senders": list(map(str, change.senders)), "receivers": list(map(str, change.receivers))}
                numbers = {"gain": list(map(float, change.gain)), "to": list(map(float, change.to)), "strength": float(change.strength)}
                rows.append({"type": "channel", **names, **numbers, "at": change.at})
                tensors[f"{i}.directions"] = change.directions
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
        changes: list[Change] = []
        try:
            body = json.loads((folder / "edit.json").read_text())
            tensors = load_file(folder / "edit.safetensors")
            for i, row in enumerate(body["changes"]):
                if row["type"] == "attention":
                    changes.append(_attention(row))
                    continue
                if row["type"] == "channel":
                    changes.append(_channel(row, tensors[f"{i}.directions"]))
                    continue
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


def _told(change: Change) -> str:
    """What a change does, in words."""
    if isinstance(change, WeightChange):
        return f"add to {change.site}"
    if isinstance(change, ActivationChange):
        return f"{change.kind} {change.site}"
    if isinstance(change, ChannelChange):
        return f"channels of {', '.join(map(str, change.senders))} to {', '.join(map(str, change.receivers))}"
    return str(change)


def _size_of(change: Change) -> str:
    """Norm of what is added or set; rank of a change in factors."""
    if isinstance(change, WeightChange):
        rank = "" if change.right is None else f"rank {change.left.shape[1]}, "
        return f"{rank}norm {float(change.delta.double().norm()):.3g}"
    if isinstance(change, ActivationChange) and change.kind in ("add", "set"):
        return f"norm {float(change.value.double().norm()):.3g}"
    return ""


def _attention(row: dict[str, Any]) -> AttentionChange:
    """What ``save`` wrote of it."""
    weights = None if row["weights"] is None else tuple(map(float, row["weights"]))
    return AttentionChange(row["heads"], row["query"], tuple(row["keys"]), row["kind"], weights, row["at"], float(row["strength"]))


def _channel(row: dict[str, Any], directions: Tensor) -> ChannelChange:
    """What ``save`` wrote of it."""
    senders, receivers = (tuple(map(Site.parse, row[name])) for name in ("senders", "receivers"))
    gain, to = (tuple(map(float, row[name])) for name in ("gain", "to"))
    return ChannelChange(senders, directions, gain, to, receivers, row["at"], float(row["strength"]))
