"""Groups of sites that are set in one run, as text; random heads to compare them with; and how a group is written."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from interp.errors import InputError
from interp.sites import Heads, Site
from interp.sweeps.draws import distinct

if TYPE_CHECKING:
    from interp.models.checkpoint import Shape

HEADS = ("z", "q", "k", "v", "pattern")
"""Activations of single heads; ``k`` and ``v`` have key/value heads, ``pattern`` is rows of attention weights."""

STREAM = ("attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "mlp_post")
"""Activations of a whole layer."""

_ORDER = ("resid_pre", "q", "k", "v", "pattern", "z", "result", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")
_WORDS = ("everything", "heads", "mlps", "embed")


def head_sites(component: str, shape: Shape, position: str | int | None = None) -> list[Site]:
    """Every head of every layer."""
    return [Site(component, layer, head, position) for layer in range(shape.n_layers) for head in range(_heads(component, shape))]


def _heads(component: str, shape: Shape) -> int:
    return shape.n_kv_heads if component in ("k", "v") else shape.n_heads


def groups_of(text: Heads | str, component: str, shape: Shape) -> dict[str, tuple[Site, ...]]:
    """The groups of a text like ``movers=L9H6,L9H9@END; all=embed,L0.mlp_out,L0H1``: name -> sites, heads one by one.

    An entry is a head of the component, a site (one without a head means all heads), ``embed`` (the stream entering the first block),
    ``heads``, ``mlps``, or ``everything``, which is these three. A position holds for the entries before it that have none.

    Args:
        text: groups apart by semicolons; a group without a name is called what it lists.
        component: what heads without a component are.
        shape: of the model.

    Raises:
        InputError: a text that names no group, or two groups of one name.
    """
    if not isinstance(text, Heads | str):
        raise InputError(f"sites is one text, as in movers=L9H6,L9H9@END; mlps, not {type(text).__name__}")
    found: dict[str, tuple[Site, ...]] = {}
    for part in str(text).split(";"):
        match = re.fullmatch(r"\s*(?:([A-Za-z_]\w*)\s*=)?\s*([^=]*[^=\s])\s*", part)
        if match is None:
            raise InputError(f"{part.strip()!r} is not a group; write movers=L9H6,L9H9@END, embed,L0.mlp_out or everything@END")
        name = match[1] or re.sub(r"\s+", "", match[2])
        if name in found:
            raise InputError(f"there are two groups {name}; give each a name of its own, as in early=L0H1")
        found[name] = _members(match[2], component, shape)
    return found


def _members(text: str, component: str, shape: Shape) -> tuple[Site, ...]:
    sites: list[Site] = []
    position: str | None = None
    for entry in reversed([e.strip() for e in text.split(",")]):
        what, at, own = entry.partition("@")
        position = own if at else position
        found = _named(what, component, shape)
        sites = [site if position is None else Site.parse(f"{site}@{position}") for site in found] + sites
    return tuple(dict.fromkeys(sites))


def _named(what: str, component: str, shape: Shape) -> list[Site]:
    """The sites of one entry, without a position."""
    if what == "everything":
        return [s for word in ("embed", "heads", "mlps") for s in _named(word, component, shape)]
    if what == "embed":
        return [Site("resid_pre", 0)]
    if what == "mlps":
        return [Site("mlp_out", layer) for layer in range(shape.n_layers)]
    head = re.fullmatch(r"L(\d+)H(\d+)", what)
    if (what == "heads" or head) and component not in HEADS:
        raise InputError(f"{what} in a group means heads of the component, and {component} has none; choose one of {', '.join(HEADS)}")
    if what == "heads":
        return head_sites(component, shape)
    if head:
        return [Site(component, int(head[1]), int(head[2]))]
    try:
        site = Site.parse(what)
    except InputError as e:
        raise InputError(f"{what!r} in a group is neither a head (L9H6), a site (L0.mlp_out), nor one of {', '.join(_WORDS)}") from e
    if site.component not in HEADS + STREAM:
        raise InputError(f"{site} in a group cannot be set; what can is {', '.join(HEADS + STREAM)}")
    every = range(_heads(site.component, shape)) if site.component in HEADS and site.head is None else [site.head]
    return [Site(site.component, site.layer, head) for head in every]


def random_heads(
    group: Sequence[Site], shape: Shape, draws: int, seed: int, name: str, unread: Collection[str | int | None] = ()
) -> list[tuple[Site, ...]]:
    """The group with other heads in place of its own, at each position drawn from the layers that its own span there.

    What else is in the group stays.

    Args:
        group: sites, heads one by one.
        shape: of the model.
        draws: how many groups, no two alike.
        seed: of the draws.
        name: of the group, part of the seed.
        unread: positions at which nobody reads what heads of the last layer do.

    Returns:
        As many groups, or all there are if these are fewer. None where the group has no heads, heads of several components, or
        more than there are others.
    """
    own, rest = [s for s in group if s.head is not None], [s for s in group if s.head is None]
    components = {s.component for s in own}
    if len(components) != 1:
        return []
    (component,) = components
    taken, pools = {(s.layer, s.head) for s in own}, []
    silent = set(unread) if component not in ("k", "v") else set()  # the last layer's keys and values are read from elsewhere
    for at in dict.fromkeys(s.position for s in own):
        layers = [s.layer or 0 for s in own if s.position == at]
        last = min(max(layers), shape.n_layers - 1 - (at in silent))
        there = [(layer, head) for layer in range(min(layers), last + 1) for head in range(_heads(component, shape))]
        pools.append(([Site(component, *head, at) for head in there if head not in taken], len(layers)))
    return [(*rest, *some) for some in distinct(pools, draws, f"{seed} {name}").sets]


def written(group: Iterable[Site], shape: Shape, *, added: bool) -> tuple[Site, ...]:
    """The sites to set, in the order in which a pass meets them, all heads of a layer at once.

    Args:
        group: heads one by one.
        shape: of the model.
        added: set what z adds to the stream instead of z; where all heads of a layer are in the group that is ``attn_out``, with b_O.
    """
    heads: dict[Site, list[Site]] = {}
    for site in group:
        heads.setdefault(Site(site.component, site.layer, None, site.position), []).append(site)
    found: list[Site] = []
    for whole, sites in heads.items():
        changed = added and whole.component == "z"
        if sites[0].head is not None and len(sites) == _heads(whole.component, shape):
            found.append(Site("attn_out", whole.layer, None, whole.position) if changed else whole)
        else:
            found += [Site("result", s.layer, s.head, s.position) if changed else s for s in sites]
    # All heads come after single ones, so that they are what is set where two names mean one token.
    return tuple(sorted(dict.fromkeys(found), key=lambda s: (s.layer or 0, _ORDER.index(s.component), s.head is None)))
