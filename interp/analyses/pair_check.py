"""Is this pair a base and what it was tuned into, and what kind of tuning was it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp import linalg, plots
from interp.errors import InputError
from interp.models import weights
from interp.models.card import card, settings_of
from interp.models.changes import AT_FLOOR, Change, adapter_of, changes, unmatched
from interp.results import Result, analysis
from interp.sites import Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.models import ModelPair
    from interp.models.adapters import Adapter

RELATED = 0.99
"""Cosine that the matrices of a descendant stay above almost everywhere."""

UNRELATED = 0.2
"""Median cosine below which two checkpoints have nothing to do with each other."""

_EXACT = 1024  # smaller side up to which all singular values are computed
_LEADING = 160  # singular values computed beyond it: more than the ranks that adapters have
_STATUS = {"ok": 0, "note": 1, "warning": 2}


@dataclass(frozen=True, eq=False)
class PairCheckResult(Result):
    """The identity card of a pair, item by item, and the cosine of every matched weight.

    Attributes:
        cosine: of base and tuned as vectors.
        relative: ||tuned - base|| / ||base||, Frobenius norms.
        floor: relative change that rounding to the coarser stored dtype makes by itself; 0 for an adapter.
        rank: numerical rank of the change, above rounding; for an adapter of every matrix it trains, otherwise of the
            most changed matrix of each kind; NaN elsewhere, and where further components hide below rounding.
        full_rank: smaller side of the matrix, the largest rank there is; NaN for vectors.
        card: line -> {"base": text, "tuned": text}.
        items: what was compared: item, status (ok, note, warning), says.
        kind: "identical", "at the floor", "low rank", "full", "adapter" or "unrelated".
        guess: a sentence about it.
        guaranteed: False for an architecture whose tensor names are not known; rows are raw tensors then.
        layers: number of layers.
        labels: of the axis weight.
    """

    cosine: Float[Tensor, " weight"]
    relative: Float[Tensor, " weight"]
    floor: Float[Tensor, " weight"]
    rank: Float[Tensor, " weight"]
    full_rank: Float[Tensor, " weight"]
    card: dict[str, dict[str, str]]
    items: tuple[dict[str, str], ...]
    kind: str
    guess: str
    guaranteed: bool
    layers: int
    labels: dict[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights, in order."""
        return self.labels["weight"]

    @property
    def status(self) -> str:
        """The worst status of any item."""
        return max((item["status"] for item in self.items), key=_STATUS.__getitem__)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the items of status warning say."""
        return tuple(item["says"] for item in self.items if item["status"] == "warning")

    def summary(self) -> str:
        """One sentence: the median cosine, what kind of tuning, how many warnings."""
        lowest = int(torch.where(self.full_rank.isnan(), math.inf, self.cosine).argmin())
        counts = {s: sum(item["status"] == s for item in self.items) for s in _STATUS}
        matrices = self.cosine[~self.full_rank.isnan()]
        floor = 100 * float(self.floor.median())
        return (
            f"{float(matrices.median()):.4f} median cosine of {len(matrices)} matched matrices "
            f"(lowest {self.names[lowest]} {float(self.cosine[lowest]):.4f}): {self.guess}; "
            f"{_count(counts['warning'], 'warning')}, {_count(counts['note'], 'note')}; rounding floor {floor:.2g} %."
        )

    def plot(self) -> go.Figure:
        """1 - cosine by layer and module; for an unknown architecture the tensors that differ most."""
        title, unit = "How far apart are matched matrices?", "1 - cosine of base and tuned"
        if not self.guaranteed:
            order = (1 - self.cosine).argsort(descending=True)[:40].tolist()
            distance = {"distance": 1 - self.cosine[order]}
            return plots.bars([self.names[i] for i in order], distance, title=title, xlabel="tensor", ylabel=unit, horizontal=True)
        at = {name: i for i, name in enumerate(self.names)}
        modules = [m for m in weights.MODULES if any(f"L{layer}.{m}" in at for layer in range(self.layers))]
        rows = [[at.get(f"L{layer}.{m}") for m in modules] for layer in range(self.layers)]
        cells = [[math.nan if i is None else float(1 - self.cosine[i]) for i in row] for row in rows]
        under = [[i is not None and bool(self.relative[i] <= AT_FLOOR * self.floor[i]) for i in row] for row in rows]
        grey = torch.tensor(under, dtype=torch.bool)
        return plots.heatmap(cells, modules, title=title, xlabel="module", ylabel="layer", unit=unit, floor=grey, difference=False)

    def html(self) -> str:
        """The card and the items as two tables."""
        e = plots.escape
        paint = {"ok": "", "note": "background:#f5f0dc", "warning": "background:#f6d5c8"}
        card = "".join(f"<tr><th>{e(k)}</th><td>{e(v['base'])}</td><td>{e(v['tuned'])}</td></tr>" for k, v in self.card.items())
        items = "".join(
            f'<tr style="{paint[i["status"]]}"><th>{e(i["item"])}</th><td>{e(i["status"])}</td><td>{e(i["says"])}</td></tr>'
            for i in self.items
        )
        return (
            f"<table><thead><tr><th></th><th>base</th><th>tuned</th></tr></thead><tbody>{card}</tbody></table>"
            f"<table><thead><tr><th>item</th><th>status</th><th></th></tr></thead><tbody>{items}</tbody></table>"
        )


@analysis(version=1)
def pair_check(pair: ModelPair, *, seed: int = 0) -> PairCheckResult:
    """Do these two checkpoints belong together, and was it full tuning or a low-rank update?

    Compares configs, tokenizers and tensor names, and streams every matched weight once for its cosine: a descendant stays
    above 0.99 almost everywhere, an unrelated checkpoint is near 0. The numerical rank of the change, above what rounding
    does, then tells low-rank tuning from full tuning. No model is built.

    Args:
        pair: base and tuned.
        seed: of the randomised singular values of large matrices.

    Raises:
        InputError: the checkpoints are quantised, or a tensor has another shape in tuned.
    """
    adapter = adapter_of(pair)
    rows: dict[str, tuple[float, float, float, float]] = {}
    ranks: dict[str, int | None] = {}
    for change in changes(pair, desc="cosine of base and tuned"):
        other = change.base + change.delta if change.tuned is None else change.tuned
        whole = linalg.norm(change.base)
        small = float(min(change.base.shape)) if change.base.ndim == 2 else math.nan
        difference, floor = linalg.relative_norm(change.delta, change.base), linalg.ratio(change.rounding, whole)
        rows[change.name] = (linalg.cosine(change.base, other), difference, floor, small)
        if change.factors is not None:
            ranks[change.name] = _rank(change, seed)
    if not rows:
        raise InputError(f"{pair.base.name} and {pair.tuned.name} have no tensor in common")
    names = tuple(rows)
    cosine, relative, floor, full = torch.tensor(list(rows.values()), dtype=torch.float64).T.contiguous().unbind()
    if adapter is None:
        chosen = _most_changed(names, relative, floor, full)
        for change in changes(pair, desc="rank of the change", only=frozenset(chosen)) if chosen else ():
            if change.name in chosen:
                ranks[change.name] = _rank(change, seed)
    kind, guess = _guess(names, cosine, relative, floor, full, ranks, adapter)
    cards = {"base": card(pair.base), "tuned": card(pair.tuned)}
    return PairCheckResult(
        cosine=cosine,
        relative=relative,
        floor=floor,
        rank=torch.tensor([math.nan if (r := ranks.get(n)) is None else float(r) for n in names], dtype=torch.float64),
        full_rank=full,
        card={line: {side: texts[line] for side, texts in cards.items()} for line in cards["base"]},
        items=(*_from_cards(pair, cards), *_from_weights(pair, names, cosine, relative, floor, full, kind)),
        kind=kind,
        guess=guess,
        guaranteed=weights.known(pair.shape),
        layers=pair.shape.n_layers,
        labels={"weight": names},
    )


def _rank(change: Change, seed: int) -> int | None:
    """Components of a change above rounding; None when what is left below them is more than rounding, so that more are hidden."""
    rows, cols = change.base.shape
    if change.factors is not None:
        return linalg.numerical_rank(linalg.svd_of_product(*change.factors).S, (rows, cols))
    whole = min(rows, cols) <= _EXACT
    s = linalg.singular_values(change.delta) if whole else linalg.svd_top(change.delta, _LEADING, seed=seed).S
    rank = linalg.numerical_rank(s, (rows, cols), noise=change.noise)
    # Full tuning in half precision also has few components above the noise, but what it leaves below them is more than noise,
    # which loses its share of the energy with the components that are taken out.
    energy = linalg.norm(change.delta) ** 2
    left = energy - float(s[:rank].double().square().sum())
    expected = change.rounding**2 * (1 - rank / rows) * (1 - rank / cols)
    return rank if left <= 1.2**2 * expected + 1e-5 * energy else None  # singular values are float32


def _most_changed(names: tuple[str, ...], relative: Tensor, floor: Tensor, full: Tensor) -> set[str]:
    """The most changed matrix of each kind, those at the floor left out; for raw tensors the eight most changed."""
    best: dict[str, int] = {}
    for i in relative.nan_to_num(0).argsort(descending=True).tolist():
        if not math.isnan(float(full[i])) and float(relative[i]) > AT_FLOOR * float(floor[i]):
            kind = Site.parse(names[i]).component if names[i].startswith(("L", "W_")) else names[i]
            best.setdefault(kind, i)
    return {names[i] for i in list(best.values())[:8]}


def _guess(
    names: tuple[str, ...],
    cosine: Tensor,
    relative: Tensor,
    floor: Tensor,
    full: Tensor,
    ranks: dict[str, int | None],
    adapter: Adapter | None,
) -> tuple[str, str]:
    """What kind of tuning it was, and a sentence."""
    at = {name: i for i, name in enumerate(names)}
    found = {name: rank for name, rank in ranks.items() if rank != 0}
    if adapter is not None:
        span = _span([r for r in found.values() if r is not None])
        whole = f" and {len(adapter.replaced)} tensors trained whole" if adapter.replaced else ""
        unused = sum(1 for r in ranks.values() if r is not None and r < adapter.rank)
        less = f", {unused} of them below the rank {adapter.rank} of its config" if unused else ""
        return "adapter", f"tuned is an adapter of rank {span} on {len(ranks)} matrices{less}{whole}"
    if not bool((relative > 0).any()):
        return "identical", "tuned is identical to base"
    if float(cosine[~full.isnan()].median()) < UNRELATED:
        return "unrelated", "tuned does not look like a descendant of base at all"
    moved = [n for n in names if relative[at[n]] > AT_FLOOR * floor[at[n]] and not math.isnan(float(full[at[n]]))]
    if not moved and bool((relative[~full.isnan()] > 0).any()):
        return "at the floor", "no matrix differs by more than rounding"
    if not moved:
        return "full", "only vectors (biases, norm gains) changed"
    some = f"{len(moved)} of {int((~full.isnan()).sum())} matrices changed"
    low = {n: r for n, r in found.items() if r is not None and r < float(full[at[n]]) / 2}
    if 2 * len(low) > len(found):
        span = _span(list(low.values()))
        return "low rank", f"tuned looks like a merged low-rank update (rank {span} in the most changed matrices; {some})"
    return "full", f"tuned looks like full tuning ({len(found) - len(low)} of {len(found)} examined changes have a high rank; {some})"


def _span(ranks: list[int]) -> str:
    if not ranks:
        return "unknown"
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _item(item: str, status: str, says: str) -> dict[str, str]:
    return {"item": item, "status": status, "says": says}


_MEANING = {
    "dtype": "differences below the rounding of the coarser one are noise",
    "context": "prompts must fit the shorter one",
    "embedding rows": "logits are compared on the shared ids",
    "tokenizer entries": "ids beyond the shared ones mean something to one model only",
    "special tokens": "check that prompts begin the same way",
    "chat template": "both models read the same text; formatting is up to you",
    "unembedding": "a change of the embedding moves the output of the tied model too",
    "rotary settings": "each model uses its own",
}


def _from_cards(pair: ModelPair, cards: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """Items that configs and tokenizers decide."""
    base, tuned = cards["base"], cards["tuned"]
    items = [_item("sizes", "ok", f"both are a {base['architecture']} of the same depth, width and heads")]
    for line, meaning in _MEANING.items():
        if base[line] == tuned[line]:
            items.append(_item(line, "ok", f"{base[line]} in both"))
        else:
            items.append(_item(line, "note", f"{base[line]} in base, {tuned[line]} in tuned: {meaning}"))
    left, right = settings_of(pair.base), settings_of(pair.tuned)
    differ = [f"{k}: {left.get(k)} in base, {right.get(k)} in tuned" for k in dict.fromkeys((*left, *right)) if left.get(k) != right.get(k)]
    says = f"the configs differ in {'; '.join(differ)}" if differ else "all other settings of the configs are equal"
    return [*items, _item("other settings", "warning" if differ else "ok", says)]


def _from_weights(
    pair: ModelPair, names: tuple[str, ...], cosine: Tensor, relative: Tensor, floor: Tensor, full: Tensor, kind: str
) -> list[dict[str, str]]:
    """Items that the tensors decide."""
    alone = unmatched(pair)
    lonely = [f"{len(found)} only in {side}, such as {found[0]}" for side, found in zip(("base", "tuned"), alone, strict=True) if found]
    says = f"tensors without a match: {'; '.join(lonely)}" if lonely else f"all {len(names)} weights have a match"
    items = [_item("tensor names", "warning" if lonely else "ok", says)]
    if not weights.known(pair.shape):
        says = f"not guaranteed: the tensor names of {pair.shape.architecture} are not known, so rows are raw tensors without heads"
        items.append(_item("architecture", "warning", says))
    matrix = ~full.isnan()
    low = torch.nonzero(matrix & (cosine < RELATED)).flatten().tolist()
    if kind == "unrelated":
        median = float(cosine[matrix].median())
        items.append(_item("cosine", "warning", f"the median cosine is {median:.3f}: this is no base and what it was tuned into"))
    elif low:
        worst = min(low, key=lambda i: float(cosine[i]))
        says = f"{len(low)} matrices have a cosine below {RELATED}, lowest {names[worst]} ({float(cosine[worst]):.3f}): a long tuning"
        items.append(_item("cosine", "warning", says))
    else:
        items.append(_item("cosine", "ok", f"every matrix has a cosine of at least {RELATED}"))
    moved = relative > 0
    hidden = int((moved & (relative <= AT_FLOOR * floor)).sum())
    says = f"{hidden} of {int(moved.sum())} changed weights moved no more than rounding explains"
    return [*items, _item("rounding", "warning" if 2 * hidden > int(moved.sum()) else "ok", says)]
