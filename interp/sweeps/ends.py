"""The ends of paths as text: who sends, and who receives."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from interp.errors import InputError
from interp.models import HookedModel
from interp.sites import Heads, Site

SENDERS = "write L9H6@END, L2.mlp_out@END, embed@END, movers=L9H6,L9H9@END, heads@END, mlps@END or all@END"
RECEIVERS = "write logits, L9H6.q@END, L8H1.v@S2, L5.resid_mid@END, movers=L9H6.q,L9H9.q@END, q@END, k@END, v@END or mlps@END"


@dataclass(frozen=True)
class End:
    """Parts that send together, or receive together.

    Attributes:
        name: what it is called in tables and figures.
        sites: its parts.
    """

    name: str
    sites: tuple[Site, ...]


def senders(text: str | Heads, model: HookedModel) -> list[End]:
    """Read who sends: groups separated by ``;``, their members by commas; a position at the end of a group is that of its members.

    Raises:
        InputError: a text names nothing that sends, or nothing in this model.
    """
    s = model.shape
    heads = [Site("z", layer, head) for layer in range(s.n_layers) for head in range(s.n_heads)]
    mlps = [Site("mlp_out", layer) for layer in range(s.n_layers)]
    words = {"heads": heads, "mlps": mlps, "all": [Site("embed"), *heads, *mlps]}

    def one(body: str) -> Site:
        site = Site.parse(f"{body}.z" if re.fullmatch(r"L\d+H\d+", body) else body)
        if site.component not in ("embed", "z", "mlp_out") or (site.component == "z") != (site.head is not None):
            raise InputError(f"{body!r} does not send; {SENDERS}")
        return site

    return _ends(text, words, one, model, "sender", SENDERS)


def receivers(text: str | Heads, model: HookedModel, read: str | int, separately: bool) -> list[End]:
    """Read who receives, as ``senders``; all together, unless separately.

    Args:
        text: groups of receivers.
        model: which model they are in.
        read: the position of the metric, which is that of the logits.
        separately: each group by itself.

    Raises:
        InputError: a text names nothing that receives, or nothing in this model; or logits together with others.
    """
    s, logits = model.shape, Site("resid_post", model.shape.n_layers - 1, position=read)
    counts = {"q": s.n_heads, "k": s.n_kv_heads, "v": s.n_kv_heads}
    words = {c: [Site(c, layer, head) for layer in range(s.n_layers) for head in range(n)] for c, n in counts.items()}
    words |= {"mlps": [Site("resid_mid", layer) for layer in range(s.n_layers)]}

    def one(body: str) -> Site:
        site = logits.at(None) if body == "logits" else Site.parse(body)
        known = site.component in ("resid_mid", *counts) or site == logits.at(None)
        if not known or (site.component in counts) != (site.head is not None):
            raise InputError(f"{body!r} does not receive; {RECEIVERS}")
        return site

    found = []
    for end in _ends(text, words, one, model, "receiver", RECEIVERS):
        last = [site for site in end.sites if site.component == "resid_post"]
        if any(site.position not in (None, read) for site in last):
            raise InputError(f"the logits are read where the metric reads them, at {read}, not at {last[0].position}")
        sites = tuple(logits if site in last else site for site in end.sites)
        found.append(End("logits" if sites == (logits,) else end.name, sites))
    if not separately and len(found) > 1:
        sites = tuple(site for end in found for site in end.sites)
        name = ", ".join(end.name for end in found)
        found = [End(name if len(found) < 4 else f"{found[0].name} and {len(found) - 1} more", sites)]
    for end in found:
        if len(set(end.sites)) < len(end.sites):
            raise InputError(f"a receiver is named twice in {end.name}")
        if logits in end.sites and len(end.sites) > 1:
            raise InputError("logits cannot receive together with others, because nothing is behind them; use separately=True")
    return found


def _ends(
    text: str | Heads, words: dict[str, list[Site]], one: Callable[[str], Site], model: HookedModel, what: str, form: str
) -> list[End]:
    """The groups of a text; a word alone stands for many groups of one."""
    if not isinstance(text, str | Heads):
        raise InputError(f"{what} is one text with ; between groups, not {type(text).__name__}; {form}")
    found: list[End] = []
    for part in str(text).split(";"):
        match = re.fullmatch(r"\s*(?:(?P<name>[A-Za-z_]\w*)\s*=)?(?P<members>[^=;]+)", part)
        if not match or not part.strip():
            raise InputError(f"{part.strip()!r} names no {what}; {form}")
        sites = _members(match["members"], words, one)
        model.sites(sites)
        if not match["name"] and match["members"].split("@")[0].strip() in words:
            found += [End(str(site), (site,)) for site in sites]
        else:
            found.append(End(match["name"] or ", ".join(map(str, sites)), tuple(sites)))
        if len(set(sites)) < len(sites):
            raise InputError(f"a {what} is named twice in {part.strip()}")
    names = [end.name for end in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"the {what} {twice[0]} is named twice")
    return found


def _members(text: str, words: dict[str, list[Site]], one: Callable[[str], Site]) -> list[Site]:
    """The parts of one group; those without a position have that at the end."""
    pieces = [piece.strip() for piece in text.split(",")]
    _, _, last = pieces[-1].partition("@")
    sites: list[Site] = []
    for piece in pieces:
        body, _, position = piece.partition("@")
        several: Sequence[Site] = words[body] if body in words else [one(body)]
        sites += [replace(site, position=position or last or None) for site in several]
    return sites
