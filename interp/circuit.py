"""A circuit as a value: which parts of a model carry a behaviour, through which edges, in which roles.

Pure values and JSON, without torch. A circuit found on one model is refused for a model of another shape.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

from interp.errors import InputError
from interp.names import unknown
from interp.sites import HeadGroup, Heads, Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMAT = 1
SENDERS = ("embed", "z", "mlp_out")
"""What adds to the residual stream: the embedding, a head (its ``z``, before W_O), an MLP."""
RECEIVERS = ("q", "k", "v", "resid_mid", "resid_post")
"""What reads it: a head's query, key or value; a layer's MLP (``resid_mid``); the logits (``resid_post`` of the last layer)."""
_ORDER = {c: i for i, c in enumerate(("embed", "q", "k", "v", "z", "resid_mid", "mlp_out", "resid_post"))}


class Sized(Protocol):
    """What a circuit asks of a model's shape."""

    @property
    def n_layers(self) -> int: ...  # noqa: D102

    @property
    def n_heads(self) -> int: ...  # noqa: D102

    @property
    def n_kv_heads(self) -> int: ...  # noqa: D102


def _depth(site: Site) -> tuple[int, int]:
    """Where in the forward pass: layer, and attention before MLP before the block's end."""
    return (-1 if site.layer is None else site.layer), _ORDER[site.component]


def _key(site: Site) -> tuple[tuple[int, int], int, str]:
    return _depth(site), -1 if site.head is None else site.head, str(site.position)


@dataclass(frozen=True)
class Edge:
    """One direct path through the residual stream, at one position: ``L0H1.z@S2 -> L2H0.v@S2``.

    Attributes:
        sender: ``embed``, ``z`` of a head, or ``mlp_out`` of a layer.
        receiver: ``q``, ``k`` or ``v`` of a head (``k`` and ``v`` index key/value heads, as in every ``Site``),
            ``resid_mid`` of a layer for what its MLP reads, or ``resid_post`` of the last layer at END for the logits.
    """

    sender: Site
    receiver: Site

    def __post_init__(self) -> None:
        """Refuse what no direct path joins."""
        if self.receiver.component not in RECEIVERS or (self.receiver.component in "qkv") != (self.receiver.head is not None):
            raise InputError(f"{self.receiver} is no receiver; write L2H0.q@END, L2H0.k@S2, L2.resid_mid@END or L3.resid_post@END")
        _node(self.sender)
        if self.sender.position != self.receiver.position:
            raise InputError(f"{self}: the residual stream joins sender and receiver at one position, these are at two")
        same = self.sender.layer == self.receiver.layer and self.receiver.component in "qkv"
        if same or _depth(self.sender) > _depth(self.receiver):
            raise InputError(f"{self}: the receiver has read the stream before the sender writes to it")

    def __str__(self) -> str:
        """The text form."""
        return f"{self.sender} -> {self.receiver}"

    @classmethod
    def parse(cls, text: str | Edge) -> Edge:
        """Read a text form.

        Raises:
            InputError: the text names no edge.
        """
        if isinstance(text, Edge):
            return text
        ends = text.split("->")
        if len(ends) != 2:
            raise InputError(f"{text!r} is not an edge; write L0H1.z@S2 -> L2H0.v@S2")
        return cls(Site.parse(ends[0]), Site.parse(ends[1]))


@dataclass(frozen=True)
class Ranking:
    """What a search said of the heads of one role.

    Attributes:
        scores: head at a position -> its score, of every head that could have the role, taken or not.
        chosen: the heads that were taken.
        sends: what heads of this role send to, back from the logits, as ``logits.q``: by this, roles of two searches can be
            matched whatever they are called. "" where the search does not say.
        sign: heads that support the answer, oppose it, or both; "" where the search does not say.
    """

    scores: Mapping[Site, float]
    chosen: tuple[Site, ...] = ()
    sends: str = ""
    sign: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no head, and bring all into one order."""
        for site in (*self.scores, *self.chosen):
            if site.component != "z":
                raise InputError(f"a ranking is of heads such as L0H1.z@S2, not of {site}")
        if odd := [site for site, score in self.scores.items() if not abs(score) < math.inf]:
            raise InputError(f"the ranking gives {odd[0]} the score {self.scores[odd[0]]}, which is not a finite number")
        scores = {site: float(self.scores[site]) for site in sorted(self.scores, key=_key)}
        object.__setattr__(self, "scores", MappingProxyType(scores))
        object.__setattr__(self, "chosen", tuple(sorted(set(self.chosen), key=_key)))


def circuit_of(given: object, what: str, side: str | None = None) -> Circuit:
    """A circuit, or that of a result which found one.

    Args:
        given: either; of a result of a pair the circuit of ``side``, by default of the tuned model.
        what: who asks for it, for the message.
        side: which model.

    Raises:
        InputError: it is neither, or the result has no such model.
    """
    found = given if isinstance(given, Circuit) else getattr(given, "circuit", None)
    if callable(found):
        found = found(side) if side is not None else found()
    if isinstance(found, Circuit):
        return found
    hint = "; Circuit.load reads a file" if isinstance(given, str | Path) else ""
    raise InputError(f"{what} is a {type(given).__name__}, expected a Circuit, or a result that found one{hint}")


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges of a model that carry a behaviour.

    Nodes and edges are two sets; set operations act on each of them. An edge into the logits has the receiver
    ``resid_post`` of the last layer at END (``circuit.logits``): what the final norm and the unembedding read there.

    Attributes:
        model: (n_layers, n_heads, n_kv_heads) of the model it belongs to.
        nodes: what sends, each at a position: ``L0H1.z@S2``, ``L2.mlp_out@END``, ``embed@IO``.
        edges: what goes from which node to which input of another.
        roles: node -> what it does; not every node needs one.
        scores: node or edge -> a number of the analysis that found it.
        prompts: digest of the prompts it was found on.
        contexts: their contexts, so that it is not evaluated on what it was found on.
        rankings: role -> what a search said of every head. A node has one of ``roles``, but may be chosen here in several.
            It belongs to the search as a whole: set operations drop it.
    """

    model: tuple[int, int, int]
    nodes: tuple[Site, ...]
    edges: tuple[Edge, ...] = ()
    roles: Mapping[Site, str] = field(default_factory=dict)
    scores: Mapping[Site | Edge, float] = field(default_factory=dict)
    prompts: str | None = None
    contexts: tuple[str, ...] = ()
    rankings: Mapping[str, Ranking] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every part against the sizes, and bring sets into one order, so that equal circuits are equal values."""
        if len(self.model) != 3 or any(type(n) is not int or n < 1 for n in self.model) or self.model[1] % self.model[2]:
            raise InputError(f"the model of a circuit is (n_layers, n_heads, n_kv_heads), not {self.model!r}")
        for what, parts in (("node", self.nodes), ("edge", self.edges)):
            if len(set(parts)) != len(parts):
                raise InputError(f"a circuit has the {what} {next(p for p in parts if parts.count(p) > 1)} twice")
        for site in self.nodes:
            self._within(_node(site))
        for edge in self.edges:
            self._within(edge.sender)
            self._within(edge.receiver)
        there = set(self.nodes)
        for node, role in self.roles.items():
            if node not in there:
                raise InputError(f"{node} has the role {role!r} but is no node of the circuit")
            HeadGroup(((0, 0),), name=role)  # a role is the name of a group of heads
        for role, ranking in self.rankings.items():
            HeadGroup(((0, 0),), name=role)
            for site in ranking.scores:
                self._within(site)
            if strange := [site for site in ranking.chosen if site not in there]:
                raise InputError(f"{strange[0]} is chosen in the ranking of {role!r} but is no node of the circuit")
        known = {*self.nodes, *self.edges}
        for part, score in self.scores.items():
            if part not in known or not abs(score) < math.inf:
                raise InputError(f"the score {score} of {part} is not a finite number for a node or an edge of the circuit")
        nodes = tuple(sorted(self.nodes, key=_key))
        edges = tuple(sorted(self.edges, key=lambda e: (_key(e.sender), _key(e.receiver))))
        roles = MappingProxyType({n: self.roles[n] for n in nodes if n in self.roles})
        scores = MappingProxyType({p: float(self.scores[p]) for p in (*nodes, *edges) if p in self.scores})
        contexts = tuple(sorted(set(self.contexts)))
        made = {"nodes": nodes, "edges": edges, "roles": roles, "scores": scores, "contexts": contexts}
        for name, value in {**made, "rankings": MappingProxyType(dict(self.rankings))}.items():
            object.__setattr__(self, name, value)

    def _within(self, site: Site) -> None:
        """Refuse a site the model does not have."""
        layers, heads, kv_heads = self.model
        allowed = kv_heads if site.component in ("k", "v") else heads
        if (site.layer is not None and site.layer >= layers) or (site.head is not None and site.head >= allowed):
            raise InputError(f"{site} is not in a model of {layers} layers, {heads} heads and {kv_heads} key/value heads")
        if site.component == "resid_post" and (site.layer != layers - 1 or site.position not in ("END", None)):
            raise InputError(f"{site} is no receiver: resid_post stands for the logits, at L{layers - 1}.resid_post@END")

    def __repr__(self) -> str:
        """How much of which model, and the first nodes."""
        first = ", ".join(map(str, self.nodes[:4])) + (", ..." if len(self.nodes) > 4 else "")
        return f"<Circuit of {self._size()}{': ' if first else ''}{first}>"

    def _size(self) -> str:
        layers, heads, _ = self.model
        return f"{len(self.nodes)} nodes and {len(self.edges)} edges in a model of {layers} layers with {heads} heads"

    def _repr_html_(self) -> str:
        """The nodes with their roles and scores, strongest first."""
        from interp.plots.cell import table

        order = sorted(self.nodes, key=lambda node: -abs(self.scores.get(node, 0.0)))
        rows = [(node, self.roles.get(node), f"{self.scores[node]:.3g}" if node in self.scores else None) for node in order]
        return table(f"Circuit of {self._size()}", ("node", "role", "score"), rows)

    @classmethod
    def of(cls, model: tuple[int, int, int], roles: Mapping[str, str | Sequence[str]], edges: Iterable[str | Edge] = ()) -> Circuit:
        """A circuit written by hand: role -> text form of its node or nodes, and text forms of edges."""
        named = {Site.parse(t): role for role, texts in roles.items() for t in ([texts] if isinstance(texts, str) else texts)}
        return cls(model, tuple(named), tuple(Edge.parse(e) for e in edges), named)

    @property
    def logits(self) -> Site:
        """The receiver that stands for the logits."""
        return Site("resid_post", self.model[0] - 1, position="END")

    def heads(self, role: str | None = None) -> Heads:
        """The attention heads, grouped by role and position; of one role only if given.

        Raises:
            InputError: no node has this role, or none is a head.
        """
        if role is not None and role not in self.roles.values():
            raise unknown("role", role, dict.fromkeys(self.roles.values()))
        groups: dict[tuple[str | None, str | int | None], list[tuple[int, int]]] = {}
        for node in self.nodes:
            if node.layer is not None and node.head is not None and role in (None, self.roles.get(node)):
                groups.setdefault((self.roles.get(node), node.position), []).append((node.layer, node.head))
        if not groups:
            raise InputError(f"the circuit has no attention heads{'' if role is None else f' with the role {role!r}'}")
        return Heads(tuple(HeadGroup(tuple(heads), position, name) for (name, position), heads in groups.items()))

    def plot(self, title: str = "") -> go.Figure:
        """A layered graph: layers from bottom to top, positions side by side, colours by role, edges as wide as their score is large.

        Args:
            title: plain text; by default it counts nodes and edges.

        Raises:
            InputError: there is nothing to draw.
        """
        from interp.plots import layered_graph

        if not self.nodes and not self.edges:
            raise InputError("an empty circuit has nothing to draw")
        return layered_graph(self, title)

    def check(self, shape: Sized) -> Self:
        """The circuit, if a model of this shape can have it.

        Raises:
            InputError: the model has other numbers of layers or heads.
        """
        came = (shape.n_layers, shape.n_heads, shape.n_kv_heads)
        if came != self.model:
            raise InputError(f"the circuit is of a model with (layers, heads, key/value heads) {self.model}, this one has {came}")
        return self

    def check_unseen(self, contexts: Iterable[str], digest: str) -> Self:
        """The circuit, if it was not found on these prompts.

        Args:
            contexts: those of the prompts.
            digest: theirs.

        Raises:
            InputError: it was found on some of their contexts, or on all of them.
        """
        shared = set(contexts) & set(self.contexts)
        if shared or digest == self.prompts:
            which = f"{len(shared)} of their contexts, such as {min(shared)[:60]!r}," if shared else "all of them"
            raise InputError(f"the circuit was found on these prompts ({which} were seen there); take others, as prompts.split() gives")
        return self

    def __or__(self, other: Circuit) -> Circuit:
        """What is in either. Scores are dropped: those of two analyses are not comparable.

        Raises:
            InputError: a node has two different roles, or the models differ.
        """
        self._comparable(other)
        for node in self.roles.keys() & other.roles.keys():
            if self.roles[node] != other.roles[node]:
                raise InputError(f"{node} is {self.roles[node]!r} in one circuit and {other.roles[node]!r} in the other")
        nodes, edges = dict.fromkeys((*self.nodes, *other.nodes)), dict.fromkeys((*self.edges, *other.edges))
        return self._with(other, nodes, edges, {**self.roles, **other.roles}, {})

    def __and__(self, other: Circuit) -> Circuit:
        """What is in both, with this circuit's roles and scores."""
        self._comparable(other)
        return self._kept(other, [n for n in self.nodes if n in other.nodes], [e for e in self.edges if e in other.edges])

    def __sub__(self, other: Circuit) -> Circuit:
        """Nodes and edges that the other lacks, with this circuit's roles and scores."""
        self._comparable(other)
        return self._kept(other, [n for n in self.nodes if n not in other.nodes], [e for e in self.edges if e not in other.edges])

    def _comparable(self, other: Circuit) -> None:
        if self.model != other.model:
            raise InputError(f"circuits of models with (layers, heads, key/value heads) {self.model} and {other.model} share no parts")

    def _kept(self, other: Circuit, nodes: Sequence[Site], edges: Sequence[Edge]) -> Circuit:
        roles = {n: self.roles[n] for n in nodes if n in self.roles}
        return self._with(other, nodes, edges, roles, {p: self.scores[p] for p in (*nodes, *edges) if p in self.scores})

    def _with(self, other: Circuit, nodes: Iterable[Site], edges: Iterable[Edge], roles: Any, scores: Any) -> Circuit:
        # Whatever was seen in finding either circuit stays known.
        prompts = self.prompts if self.prompts == other.prompts else None
        contexts = (*self.contexts, *other.contexts)
        kept = {"nodes": tuple(nodes), "edges": tuple(edges), "roles": roles, "scores": scores}
        return replace(self, **kept, prompts=prompts, contexts=contexts, rankings={})

    def _body(self) -> dict[str, Any]:
        def row(part: Site | Edge, **more: Any) -> dict[str, Any]:
            return {**more, **({"score": self.scores[part]} if part in self.scores else {})}

        ranked = {
            role: {
                "scores": {str(s): x for s, x in ranking.scores.items()},
                "chosen": [str(s) for s in ranking.chosen],
                **{name: told for name, told in (("sends", ranking.sends), ("sign", ranking.sign)) if told},
            }
            for role, ranking in self.rankings.items()
        }
        return {
            "format": FORMAT,
            "model": list(self.model),
            "nodes": [row(n, site=str(n), **({"role": self.roles[n]} if n in self.roles else {})) for n in self.nodes],
            "edges": [row(e, edge=str(e)) for e in self.edges],
            "prompts": self.prompts,
            "contexts": list(self.contexts),
            **({"rankings": ranked} if ranked else {}),
        }

    @property
    def digest(self) -> str:
        """sha256 of all of it."""
        return hashlib.sha256(json.dumps(self._body(), sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write a JSON file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._body(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what ``save`` wrote.

        Raises:
            InputError: there is no such file, or it holds no circuit; the message says what is wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no circuit at {path}: expected a JSON file that circuit.save(path) wrote")
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:  # bytes that are no UTF-8, text that is no JSON
            raise InputError(f"{path} is no JSON file: {' '.join(str(e).split())[:120]}") from e
        try:
            return cls._read(body)
        except (ValueError, OverflowError) as e:  # an InputError too; numbers of thousands of digits are neither read nor floats
            raise InputError(f"{path} holds no circuit: {' '.join(str(e).split())}") from e

    @classmethod
    def _read(cls, body: Any) -> Circuit:
        got = _entries(body, "the file", {"format": int, "model": list, "nodes": list, "edges": list, "contexts": list})
        if got["format"] != FORMAT:
            raise InputError(f"its format is {got['format']}, expected {FORMAT}")
        prompts = body.get("prompts")
        if not all(isinstance(c, str) for c in got["contexts"]) or not isinstance(prompts, str | None):
            raise InputError("its prompts are a digest or null, and its contexts texts")
        nodes, edges, roles, scores = [], [], {}, {}
        for kind, parts, found, parse in (("site", got["nodes"], nodes, Site.parse), ("edge", got["edges"], edges, Edge.parse)):
            for row in parts:
                part = parse(_entries(row, "a row", {kind: str})[kind])
                found.append(part)
                if "role" in row and kind == "site":
                    roles[part] = _entries(row, str(part), {"role": str})["role"]
                if "score" in row:
                    scores[part] = _entries(row, str(part), {"score": float})["score"]
        rankings = _rankings(body.get("rankings", {}))
        return cls(tuple(got["model"]), tuple(nodes), tuple(edges), roles, scores, prompts, tuple(got["contexts"]), rankings)


def _node(site: Site) -> Site:
    """The site, if it can send."""
    if site.component not in SENDERS or (site.component == "z") != (site.head is not None):
        raise InputError(f"{site} is no node; nodes send: embed@IO, L0H1.z@S2 or L2.mlp_out@END")
    return site


def _rankings(body: Any) -> dict[str, Ranking]:
    """The rankings of a file."""
    if not isinstance(body, dict):
        raise InputError(f"its rankings are a {type(body).__name__}, expected an object with a role for every entry")
    found = {}
    for role, row in body.items():
        got = _entries(row, f"the ranking {role}", {"scores": dict, "chosen": list})
        if not all(isinstance(text, str) for text in got["chosen"]):
            raise InputError(f"chosen of the ranking {role} are texts such as L0H1.z@S2")
        scores = {Site.parse(text): _entries(got["scores"], f"the ranking {role}", {text: float})[text] for text in got["scores"]}
        told = _entries({"sends": "", "sign": "", **row}, f"the ranking {role}", {"sends": str, "sign": str})
        found[role] = Ranking(scores, tuple(Site.parse(text) for text in got["chosen"]), told["sends"], told["sign"])
    return found


def _entries(row: Any, what: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The entries of a JSON object, each of its kind."""
    if not isinstance(row, dict):
        raise InputError(f"{what} is a {type(row).__name__}, expected an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        value = row.get(name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            came = type(value).__name__ if name in row else "nothing"
            raise InputError(f"{name} of {what} is {came}, expected {kind.__name__}")
    return row
