"""Where in a model: the names of activations, weights and heads, and their text forms.

Pure values without torch. Every text form round-trips: ``Site.parse(str(site)) == site`` and
``Heads.parse(str(heads)) == heads``; the command line and the provenance of results use the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from interp.errors import InputError

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
"""The residual stream entering a block, between attention and MLP, and leaving a block."""

PER_HEAD = ("q", "k", "v", "z", "pattern", "result")
"""Activations with a head axis. ``k`` and ``v`` have one entry per key/value head under GQA; ``result`` is what a head adds to the
stream, ``z @ W_O`` of that head, without ``b_O``."""

ACTIVATIONS = (*RESIDUAL, "attn_out", "mlp_out", *PER_HEAD, "mlp_post", "embed")
"""Components of an activation site; ``embed`` is the only one without a layer."""

HEAD_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
LAYER_WEIGHTS = (*HEAD_WEIGHTS, "b_O", "W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out", "ln1", "b_ln1", "ln2", "b_ln2")
GLOBAL_WEIGHTS = ("W_E", "W_pos", "W_U", "b_U", "ln_final", "b_ln_final")
WEIGHTS = (*LAYER_WEIGHTS, *GLOBAL_WEIGHTS)
"""Weights as matrices acting on row vectors, ``x @ W``: W_Q is [d_model, heads * d_head]."""

COMPONENTS = (*ACTIVATIONS, *WEIGHTS)
_GLOBAL = ("embed", *GLOBAL_WEIGHTS)

_SITE = re.compile(r"(?:L(?P<layer>\d+)(?:H(?P<head>\d+))?(?:\.(?P<rank>\d+))?)?\.?(?P<component>[A-Za-z]\w*)?(?:@(?P<position>\S+))?")
_POSITION = re.compile(r"-?\d+|[A-Za-z_][\w+\-]*")
_GROUP_NAME = re.compile(r"[A-Za-z_]\w*")


def _position(text: str) -> str | int:
    if not _POSITION.fullmatch(text):
        raise InputError(f"position {text!r} is neither a name such as END nor an integer")
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _checked_position(position: str | int | None) -> str | int | None:
    """A position as its text form reads back: "4" is 4."""
    return _position(str(position)) if position is not None else None


@dataclass(frozen=True)
class Site:
    """One place in a model: an activation, a weight, or one SVD component of a head.

    Text forms: ``L3.resid_post``, ``L9H6.z@END``, ``L9H6.z@4``, ``L2.W_in``, ``L2H1.W_O``, ``W_U``,
    ``L8H10.1`` (component 1 of the SVD of head 8.10).

    Attributes:
        component: one of ``COMPONENTS``; ``svd`` when ``rank`` is given.
        layer: layer index from 0, None for ``embed`` and the global weights.
        head: head index from 0; a query head, also for ``W_K``/``W_V`` under GQA. For the
            activations ``k`` and ``v`` it indexes key/value heads.
        position: a named position ("END"), an integer (from the prompt's first token; negative
            counts from the prompt's own end), or None for all positions.
        rank: index of a component of the head's SVD, strongest first.
    """

    component: str
    layer: int | None = None
    head: int | None = None
    position: str | int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse combinations that name nothing."""
        if (self.rank is not None) != (self.component == "svd"):
            raise InputError("a site with a rank has the component 'svd', and only such a site")
        if self.rank is not None and (self.layer is None or self.head is None):
            raise InputError("an SVD component needs a layer and a head, as in L8H10.1")
        if self.component != "svd" and self.component not in COMPONENTS:
            raise InputError(f"unknown component {self.component!r}; known: {', '.join(COMPONENTS)}")
        if (self.layer is None) != (self.component in _GLOBAL):
            which = "takes no layer" if self.component in _GLOBAL else "needs a layer, as in L0." + self.component
            raise InputError(f"{self.component} {which}")
        if self.head is not None and self.component not in (*PER_HEAD, *HEAD_WEIGHTS, "svd"):
            raise InputError(f"{self.component} has no heads; a head fits {', '.join((*PER_HEAD, *HEAD_WEIGHTS))}")
        for what in ("layer", "head", "rank"):
            if (n := getattr(self, what)) is not None and n < 0:
                raise InputError(f"{what} {n} of a site is negative; {what}s count from 0")
        object.__setattr__(self, "position", _checked_position(self.position))
        if self.position is not None and self.is_weight:
            raise InputError(f"{self.component} is a weight and has no position")

    @property
    def is_weight(self) -> bool:
        """True for weights, False for activations."""
        return self.component in WEIGHTS

    @property
    def per_head(self) -> bool:
        """True when the component has a head axis."""
        return self.component in PER_HEAD

    def at(self, position: str | int | None) -> Site:
        """The same site at a position."""
        return replace(self, position=position)

    def __repr__(self) -> str:
        """What Python reads it back from."""
        return f"Site.parse({str(self)!r})"

    def __str__(self) -> str:
        """The text form."""
        place = "" if self.layer is None else f"L{self.layer}" + ("" if self.head is None else f"H{self.head}")
        what = str(self.rank) if self.rank is not None else self.component
        where = "" if self.position is None else f"@{self.position}"
        return f"{place}.{what}{where}" if place else what + where

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read a text form.

        Raises:
            InputError: the text names no site; the message shows the forms.
        """
        if isinstance(text, Site):
            return text
        match = _SITE.fullmatch(text.strip())
        if not match or not (match["component"] or match["rank"]) or (match["component"] and match["rank"]):
            raise InputError(f"{text!r} is not a site; write L3.resid_post, L9H6.z@END, L2H1.W_O, W_U or L8H10.1")
        number = {k: int(match[k]) if match[k] else None for k in ("layer", "head", "rank")}
        position = _position(match["position"]) if match["position"] else None
        return cls(match["component"] or "svd", number["layer"], number["head"], position, number["rank"])


@dataclass(frozen=True)
class HeadGroup:
    """Heads that act together at one position. ``name`` and ``position`` are optional."""

    heads: tuple[tuple[int, int], ...]
    position: str | int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Refuse an empty group and a repeated head."""
        if not self.heads:
            raise InputError("a group of heads needs at least one head, as in L9H6")
        if any(n < 0 for head in self.heads for n in head):
            raise InputError(f"a negative layer or head in {self.heads}; they count from 0")
        object.__setattr__(self, "position", _checked_position(self.position))
        if len(set(self.heads)) != len(self.heads):
            raise InputError(f"a head appears twice in {self}")
        if self.name is not None and not _GROUP_NAME.fullmatch(self.name):
            raise InputError(f"{self.name!r} is not a name for a group of heads; use letters, digits and _")

    def __str__(self) -> str:
        """The text form: ``movers=L9H6,L9H9@END``."""
        heads = ",".join(f"L{layer}H{head}" for layer, head in self.heads)
        where = "" if self.position is None else f"@{self.position}"
        return ("" if self.name is None else f"{self.name}=") + heads + where


@dataclass(frozen=True)
class Heads:
    """Groups of attention heads, each at a position: ``movers=L9H6,L9H9@END; L7H3@S2``."""

    groups: tuple[HeadGroup, ...]

    def __post_init__(self) -> None:
        """Refuse no groups at all."""
        if not self.groups:
            raise InputError("no heads were given; write L9H6,L9H9@END; L7H3@S2")

    @classmethod
    def of(cls, heads: Iterable[tuple[int, int]], position: str | int | None = None, name: str | None = None) -> Heads:
        """One group from (layer, head) pairs."""
        return cls((HeadGroup(tuple(heads), position, name),))

    def __iter__(self) -> Iterator[HeadGroup]:
        """Go through the groups."""
        return iter(self.groups)

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.groups)

    def sites(self, component: str = "z") -> list[Site]:
        """One site per head, in order."""
        return [Site(component, layer, head, g.position) for g in self.groups for layer, head in g.heads]

    def __repr__(self) -> str:
        """What Python reads it back from."""
        return f"Heads.parse({str(self)!r})"

    def __str__(self) -> str:
        """The text form."""
        return "; ".join(str(group) for group in self.groups)

    @classmethod
    def parse(cls, text: str | Heads) -> Heads:
        """Read a text form.

        Raises:
            InputError: the text names no heads; the message shows the forms.
        """
        if isinstance(text, Heads):
            return text
        groups = []
        for part in (p.strip() for p in text.split(";")):
            match = re.fullmatch(r"(?:(?P<name>\w+)=)?(?P<heads>L\d+H\d+(?:\s*,\s*L\d+H\d+)*)(?:@(?P<position>\S+))?", part)
            if not match:
                raise InputError(f"{part!r} names no heads; write L9H6,L9H9@END; L7H3@S2 or movers=L9H6@END")
            heads = tuple((int(a), int(b)) for a, b in re.findall(r"L(\d+)H(\d+)", match["heads"]))
            groups.append(HeadGroup(heads, _position(match["position"]) if match["position"] else None, match["name"]))
        return cls(tuple(groups))


def parse_sites(texts: str | Site | Sequence[str | Site]) -> list[Site]:
    """Read one site or several."""
    return [Site.parse(t) for t in ([texts] if isinstance(texts, str | Site) else texts)]
