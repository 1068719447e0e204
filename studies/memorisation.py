"""Does memory lie in the flat directions of the weights, and skill in the sharp ones (after Merullo et al. 2025, arXiv 2510.24256)?

`base` recites 200 texts of random words. Curvature factors come from fresh texts of its training, without these and without the prose it
knows by heart. Cutting its MLPs down to the sharp directions is tried at many masses, layers and modules. The canaries are halved: the
setting is chosen on 60 of one half (half of --n), and tested on all 100 of the other, on prose, and on tasks:

    memorised      canaries (`recitation`), the ends of `plain_text(source=prose)`
    arithmetic     `arithmetic`
    closed book    `facts`: who lives where stands nowhere but in the weights
    open book      `boxes`, `colored_objects`: the answer stands in the prompt
    logic          `laundry_list` (what is left over), `ioi` (who is not meant)
    text           `plain_text`: perplexity (exp of the mean loss of all tokens), and how far the ten likeliest next words stay the same

Beside it, chosen by the same rules: the sharp end removed, as many random pairs (chosen by one draw, tested with that and four more),
singular values, the rectangular variant, and a baseline that learns what to zero from the very canaries (studies/balanced_subnet.py).

    python studies/memorisation.py [--out results/memorisation] [--n 120] [--quick]

Writes ``memorisation.html`` and prints the tables. About nine minutes on one core, one with ``--quick``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import memorisation_tables as tables
import torch
from balanced_subnet import balanced_subnet
from memorisation_tables import DRAW, EDIT_DISTANCE, RANKS, TEXT, TOKENS, UNCUT, MemorisationResult

import interp
from interp.edits import Edit, WeightChange
from interp.models import HookedModel, ModelPair
from interp.models.batch import Batch
from interp.models.curvature_edits import Control, Cut, curvature_cuts
from interp.models.factors import Factors
from interp.models.kfac import kfac_factors, prompts_digest
from interp.organisms.recipes.base import PROSE, parts
from interp.prompts import Prompts
from interp.sweeps.language import block_losses, rankings_agree
from interp.tasks import reciting
from interp.tasks.reciting import Passages

BASE = "base"
FACTOR_SEED, TEXT_SEED, TASK_SEED, DEV_TEXT_SEED = 700_001, 700_002, 700_003, 700_004
"""Apart from the seeds of base's training and from each other."""

LIMIT = 1.25
"""Most that perplexity may grow, as a ratio."""

QUIET = 0.1
"""Suppressed: at most this share of what base recites, strictly, and of the tokens right before the first wrong one."""

MASSES = (0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
LAYERS = ((0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3))
MODULES = (("W_gate", "W_in"), ("W_out",), ("W_gate", "W_in", "W_out"))
"""The first is the paper's choice."""

METHODS: dict[str, Control | None] = {
    "curvature": None,
    "sharp end removed": "top_removed",
    "random pairs": "random",
    "singular values": "svd",
    "rectangular": "rectangular",
}
BESIDE = ("sharp end removed", "random pairs")
"""Controls that also stand at the very setting of the edit."""

TIMES = 5
"""So often random pairs are drawn where they are tested; settings are chosen by the first draw."""

RULES = ("strongest", "mildest")
RATIOS, EPOCHS = (0.005, 0.02, 0.05), 5
SUBNET = "balanced subnet"
TASKS = {
    "arithmetic: arithmetic": "arithmetic",
    "closed book: facts": "facts",
    "open book: boxes(n_boxes=3)": "boxes(n_boxes=3)",
    "open book: boxes": "boxes",
    "open book: colored_objects": "colored_objects",
    "logic: laundry_list": "laundry_list",
    "logic: ioi": "ioi",
}
HELD, HELD_LOOSE, HEARD, DEV = (
    "memorised: held-out canaries",
    "memorised: held out, loosely",
    "memorised: prose, last 16 tokens",
    "memorised: canaries chosen on",
)
TAIL = 16


@dataclass(frozen=True)
class Setting:
    """What is cut, and by which method."""

    method: str
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    mass: float

    def __str__(self) -> str:
        """In words."""
        return f"mass {self.mass:g} of {', '.join(self.modules)} in layer{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))}"


@dataclass(frozen=True)
class Tried:
    """What a setting does to the canaries and texts that are chosen on.

    Attributes:
        setting: the setting.
        strict: share of canaries recited.
        matched: mean share of a canary's tokens that are right before the first wrong one.
        ratio: of perplexities.
    """

    setting: Setting
    strict: float
    matched: float
    ratio: float

    @property
    def quiet(self) -> bool:
        """Recitation is suppressed."""
        return max(self.strict, self.matched) <= QUIET


@dataclass
class Measures:
    """Prompts, drawn once; base itself; the model that is cut."""

    base: HookedModel
    model: HookedModel
    dev: Passages
    dev_text: Batch
    held: Prompts
    heard: Passages
    text: Batch
    tasks: dict[str, tuple[Any, Any]]
    dev_loss: float = field(init=False)

    def __post_init__(self) -> None:
        """Base on the texts that are chosen on."""
        self.dev_loss = self._loss()

    def _loss(self) -> float:
        counts = self.dev_text.lengths - 1
        return float((block_losses(self.model, self.dev_text) * counts).sum() / counts.sum())

    def tried(self, setting: Setting, edit: Edit) -> Tried:
        """What a setting does where it may be chosen."""
        with self.model.edited(edit):
            found = reciting.forced(self.model, self.dev)
            ratio = float(torch.tensor(self._loss() - self.dev_loss).exp())
        lengths = self.dev.lengths
        return Tried(setting, float((found == lengths).double().mean()), float((found / lengths.double()).mean()), ratio)

    def scores(self, edit: Edit) -> dict[str, list[float]]:
        """Everything, per prompt."""
        model, held = self.model, reciting.passages(self.base, self.held)
        with model.edited(edit):
            distance = reciting.distances(reciting.recitations(model, held), held.rests)
            heard = reciting.forced(model, self.heard) == self.heard.lengths
            dev = reciting.forced(model, self.dev) == self.dev.lengths
            found = {HELD: distance == 0, HELD_LOOSE: reciting.loose(distance, held.lengths), HEARD: heard, DEV: dev}
            found |= {row: task.score(model, prompts).bool() for row, (task, prompts) in self.tasks.items()}
            found |= {TEXT: block_losses(model, self.text), TOKENS: self.text.lengths - 1, EDIT_DISTANCE: distance / held.lengths.double()}
            found[RANKS] = rankings_agree(self.base.logits, [model.logits], self.text, model.shape.d_vocab)[0]
        return {row: column.double().tolist() for row, column in found.items()}


def measures(n: int, *, seed: int = 0) -> Measures:
    """The prompts; a canary is either chosen on or held out."""
    base, model = HookedModel.load(BASE), HookedModel.load(BASE)
    everything: Any = interp.task("recitation").generate(base, 200, seed)
    dev, held = everything.split(seed=seed)
    some = max(8, n // 2)
    tasks = {row: (task := interp.task(name), task.generate(base, n, TASK_SEED)) for row, name in TASKS.items()}
    plain, prose = interp.task("plain_text"), interp.task(PROSE)
    return Measures(
        base,
        model,
        reciting.passages(base, dev[:some]),
        base.batch(plain.generate(base, some, DEV_TEXT_SEED)),
        held[:n] if n < len(held) else held,
        reciting.passages(base, prose.generate(base, min(68, n), seed), TAIL),  # type: ignore[arg-type]
        base.batch(plain.generate(base, n, TEXT_SEED)),
        tasks,
    )


def mixture(times: int) -> list[str]:
    """Fresh texts of base's training in its own proportions, without canaries and without prose."""
    found = []
    for part in parts():
        if part.name not in ("recitation", PROSE):
            draw = part.harder[-1] if part.harder else part.draw
            found += [document.text for document in draw(part.rows * times, FACTOR_SEED)]
    return found


def collected(model: HookedModel, texts: Sequence[str], folder: Path) -> Factors:
    """The factors of the MLPs; those in the folder if they are there."""
    try:
        held = Factors.open(folder)
    except interp.InputError:  # not there, or unfinished
        pass
    else:
        held.check(model)
        if held.meta.get("prompts_digest") != prompts_digest(model.batch(texts)):  # or these would be added
            n = held.meta.get("prompts")
            raise interp.InputError(f"{folder} holds factors of other texts ({n} of them) than these {len(texts)}; give another --out")
    return kfac_factors(model, texts, folder, modules=sorted({m for some in MODULES for m in some}))


# ------------------------------------------------------------------------------------------------ choosing


def edit_of(cuts: Iterable[Cut], setting: Setting) -> Edit:
    """The edit of the cuts of a setting."""
    return Edit(tuple(WeightChange(c.site, c.delta) for c in cuts), f"{setting.method}: {setting}")


class Cutter:
    """Edits of settings; every matrix is decomposed once per method."""

    def __init__(self, model: HookedModel, factors: Factors, masses: Sequence[float], seed: int) -> None:
        self.model, self.factors, self.masses, self.seed = model, factors, tuple(masses), seed
        self.cuts: dict[str, list[list[Cut]]] = {}

    def __call__(self, setting: Setting) -> Edit:
        """The edit of a setting."""
        return edit_of(self._wanted(setting), setting)

    def draws(self, setting: Setting) -> list[Edit]:
        """The edit; of random pairs that of several draws, the first one being the same."""
        found = [self(setting)]
        for more in range(1, TIMES if METHODS[setting.method] == "random" else 1):
            where: dict[str, Any] = {"layers": setting.layers, "modules": setting.modules, "masses": (setting.mass,)}
            cuts = curvature_cuts(self.model, self.factors, **where, control="random", seed=self.seed + more)[0]
            found.append(edit_of(cuts, setting))
        return found

    def removed(self, setting: Setting) -> str:
        """How much is cut off, in words."""
        cuts, svd = self._wanted(setting), METHODS[setting.method] == "svd"
        sizes = [min(c.delta.shape) if svd else c.delta.numel() for c in cuts]
        gone = sum(round((1 - c.pairs) * size) for c, size in zip(cuts, sizes, strict=True))
        return f"{gone:,} of {sum(sizes):,} {'singular components' if svd else 'pairs'} removed"

    def _wanted(self, setting: Setting) -> list[Cut]:
        """Each matrix is cut for itself."""
        if setting.method not in self.cuts:
            layers = sorted({layer for some in LAYERS for layer in some})
            modules = sorted({m for some in MODULES for m in some})
            settings: dict[str, Any] = {"layers": layers, "modules": modules, "masses": self.masses, "seed": self.seed}
            self.cuts[setting.method] = curvature_cuts(self.model, self.factors, **settings, control=METHODS[setting.method])
        cuts = self.cuts[setting.method][self.masses.index(setting.mass)]
        return [c for c in cuts if c.site.layer in setting.layers and c.site.component in setting.modules]


def strongest(tried: Iterable[Tried]) -> Tried | None:
    """The least recitation that perplexity within the limit buys: the paper's rule."""
    allowed = [t for t in tried if t.ratio <= LIMIT]
    return min(allowed, key=lambda t: (t.matched, t.strict, t.ratio), default=None)


def mildest(tried: Iterable[Tried]) -> Tried | None:
    """The least perplexity at which recitation is suppressed; None if none suppresses it within the limit."""
    return min((t for t in tried if t.quiet and t.ratio <= LIMIT), key=lambda t: (t.ratio, t.matched), default=None)


@dataclass
class Found:
    """What is measured.

    Attributes:
        tried: method -> every setting that was tried.
        chosen: cut -> the edit's setting in words.
        removed: cut -> how much it cuts off, in words.
        sizes: how many prompts it is chosen and tested on, in words.
        values: ``cut | row`` -> per prompt.
        table: all of it as a result.
        sections: further results for the page.
        stress: cut -> recitation of held-out canaries with other beginnings.
        bands: how strongly these lie in sharp and flat bands, beside plain text.
    """

    tried: dict[str, list[Tried]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    sizes: str = ""
    values: dict[str, list[float]] = field(default_factory=dict)
    table: MemorisationResult | None = None
    sections: list[Any] = field(default_factory=list)
    stress: dict[str, Any] = field(default_factory=dict)
    bands: Any = None


def measured(out: Path, n: int, *, quick: bool, seed: int = 0) -> Found:
    """Everything, in the order of the page."""
    at, found = measures(n, seed=seed), Found()
    texts = mixture(1 if quick else 6)
    factors = collected(at.base, texts, out / f"factors-{len(texts)}")
    masses = (0.9, 0.98, 0.995) if quick else MASSES
    grid = list(product(LAYERS[::2] if quick else LAYERS, MODULES[:1] if quick else MODULES, masses))
    cutter = Cutter(at.model, factors, masses, seed)
    edits: dict[str, Edit] = {}

    def add(name: str, setting: Setting) -> None:
        made = cutter.draws(setting)
        for i, edit in enumerate(made):
            cut = f"{name}{DRAW}{i + 1}" if len(made) > 1 else name
            edits[cut], found.removed[cut] = edit, cutter.removed(setting)
            found.chosen[cut] = f"{setting}; {found.removed[cut]}"

    for method in METHODS:
        settings = [Setting(method, *some) for some in grid]
        found.tried[method] = [at.tried(s, cutter(s)) for s in settings]
        for rule, pick in zip(RULES, (strongest, mildest), strict=True):
            if best := pick(found.tried[method]):
                add(f"{method}, {rule}", best.setting)
                for other in BESIDE if method == "curvature" else ():
                    add(f"{other}, where the {rule} is", replace(best.setting, method=other))
    forget = [(*p, *r) for p, r in zip(at.dev.prompts, at.dev.rests, strict=True)]
    keep = at.base.batch(texts[:: max(1, len(texts) // len(forget))]).rows()[: len(forget)]
    learnt = {}
    for ratio in RATIOS[1:2] if quick else RATIOS:
        edit = balanced_subnet(at.base, forget, keep, ratio=ratio, epochs=EPOCHS, seed=seed)
        learnt[at.tried(Setting(SUBNET, (0, 1, 2, 3), MODULES[-1], 1 - ratio), edit)] = edit
    found.tried[SUBNET] = list(learnt)
    if best := strongest(learnt):
        found.chosen[SUBNET] = f"{1 - best.setting.mass:.1%} of all MLP weights zeroed, learnt from the {len(forget)} canaries chosen on"
        edits[SUBNET] = learnt[best]
    for cut, edit in {UNCUT: Edit(()), **edits}.items():
        found.values |= {f"{cut} | {row}": column for row, column in at.scores(edit).items()}
    found.sizes = (
        f"Chosen on {len(at.dev)} canaries and {len(at.dev_text)} texts; tested on {len(at.held)} other canaries, {len(at.heard)} pieces "
        f"of prose, {len(at.text)} other texts and {n} prompts of each task."
    )
    found.table = tables.memorisation(at.base, at.held, found.values, found.chosen, seed=seed)
    _sections(found, at, factors, edits, quick=quick, seed=seed)
    return found


def _sections(found: Found, at: Measures, factors: Factors, edits: dict[str, Edit], *, quick: bool, seed: int) -> None:
    """The spectra, what memorised texts read, and the cut model's own recitation and text."""
    few = at.held[: 12 if quick else 40]
    clean: Any = interp.task("plain_text").generate(at.base, 24 if quick else 100, TEXT_SEED)
    for cut in (c for c in edits if c.startswith("curvature, ") or c == SUBNET):
        with _called(at.model, f"{BASE} with {cut}"), at.model.edited(edits[cut]):
            found.stress[cut] = interp.recitation(ModelPair(at.base, at.model), few, stress=8)
    found.bands = interp.curvature_bands(at.base, clean, at.held, factors, seed=seed)
    found.sections = [interp.curvature(at.base, factors), found.bands, *found.stress.values()]
    if first := next((c for c in edits if c.startswith("curvature, ")), None):
        with _called(at.model, f"{BASE} with {first}"), at.model.edited(edits[first]):
            found.sections.append(interp.language_modelling(ModelPair(at.base, at.model), clean, seed=seed))


@contextmanager
def _called(model: HookedModel, name: str) -> Iterator[None]:
    """Give the model another name for a while, by which results tell what was cut."""
    before, model.name = model.name, name
    try:
        yield
    finally:
        model.name = before


# ----------------------------------------------------------------------------------------------- in words


def grids(found: Found) -> str:
    """What every setting of every method does to the canaries chosen on: share of tokens recited, and the perplexity ratio."""
    lines = [f"Chosen on: share of a canary right before the first wrong token / perplexity ratio (limit {LIMIT:g})"]
    for method, tried in found.tried.items():
        masses = sorted({t.setting.mass for t in tried})
        lines += ["", f"{method:34}" + "".join(f"{mass:>14g}" for mass in masses)]
        where = dict.fromkeys((t.setting.layers, t.setting.modules) for t in tried)
        for layers, modules in where:
            here = {t.setting.mass: t for t in tried if (t.setting.layers, t.setting.modules) == (layers, modules)}
            name = f"  {'+'.join(m.removeprefix('W_') for m in modules)} of {','.join(map(str, layers))}"
            lines.append(f"{name:34}" + "".join(f"{f'{here[m].matched:.2f} / {here[m].ratio:.2f}':>14}" for m in masses if m in here))
    return "\n".join(lines)


def verdict(found: Found) -> list[str]:
    """The answer, whatever it is."""
    table = found.table
    assert table is not None
    lines = []
    for rule in RULES:
        if (cut := f"curvature, {rule}") not in found.chosen:
            lines.append(f"No setting suppresses recitation within the limit ({rule}).")
            continue
        left, ratio, prose = table.retention(cut, HELD), table.ratio(cut), table.retention(cut, HEARD)
        lines.append(
            f"{_reached(table, cut, rule)}, {rule} setting ({found.chosen[cut]}): {left} of the strict recitation of held-out canaries "
            f"is left ({table.retention(cut, HELD_LOOSE)} loosely) at {ratio} times the perplexity; of prose known by heart {prose}."
        )
        lines.append(_others(found, rule))
        lines.append(f"{rule.capitalize()} setting: {_gap(table, cut)}")
    if SUBNET in found.chosen:
        dev, held, prose = (table.retention(SUBNET, row) for row in (DEV, HELD, HEARD))
        lines.append(
            f"The learnt baseline ({found.chosen[SUBNET]}) leaves {dev} of the canaries it was shown, {held} of the held-out ones and "
            f"{prose} of the prose, at {table.ratio(SUBNET)} times the perplexity{TOO if _does(table, SUBNET) else ''}."
        )
    if found.bands is not None:
        lines.append(f"Where the inputs of held-out canaries lie: {found.bands.summary()}.")
    return [
        *lines,
        *([found.sizes] if found.sizes else []),
        *(f"Asked with other beginnings ({cut}; tuned is the cut base): {r.summary()}." for cut, r in found.stress.items()),
    ]


TOO = " (does it too)"


def _does(table: MemorisationResult, cut: str) -> bool:
    """Held-out recitation is suppressed within the limit."""
    return float(table.retention(cut, HELD).value) < QUIET and float(table.ratio(cut).value) <= LIMIT


def _reached(table: MemorisationResult, cut: str, rule: str) -> str:
    """Whether the edit does it, and which controls do."""
    hits = {name: [_does(table, c) for c in cuts] for name, cuts in table.families().items()}
    names = {f"{m}, {rule}": m for m in METHODS if m != "curvature"} | {SUBNET: SUBNET}
    names |= {f"{m}, where the {rule} is": f"{m} in the same place" for m in BESIDE}
    draws = {name: f" ({sum(h)} of {len(h)} draws)" if len(h) > 1 else "" for name, h in hits.items()}
    those = ", ".join(f"{told}{draws[name]}" for name, told in names.items() if any(hits.get(name, [])))
    if _does(table, cut):
        return f"Reached, and by controls too ({those})" if those else "Reached, and by no control"
    return f"Not reached, but by controls ({those})" if those else "Not reached, nor by any control"


def _others(found: Found, rule: str) -> str:
    """What the controls do: at the same place, and where each does best."""
    table = found.table
    assert table is not None
    families = table.families()

    def told(name: str) -> str:
        cuts = families[name]
        left, ratio = tables.over_draws(cuts, lambda cut: table.retention(cut, HELD)), tables.over_draws(cuts, table.ratio)
        words = f"{float(left.value):.2f} at {float(ratio.value):.3f}"
        if len(cuts) == 1:
            gone = f" ({found.removed[name]})" if name.startswith("sharp end") and name in found.removed else ""
            return words + gone + (TOO if _does(table, name) else "")
        spread = f"{float(left.low):.2f} to {float(left.high):.2f} at {float(ratio.low):.3f} to {float(ratio.high):.3f}"
        return f"{words} (mean of {len(cuts)} draws, {spread}; {sum(_does(table, cut) for cut in cuts)} of them do it too)"

    here = ", ".join(f"{m} {told(name)}" for m in BESIDE if (name := f"{m}, where the {rule} is") in families)
    own = [m for m in METHODS if m != "curvature"]
    best = ", ".join(f"{m} {told(name)}" for m in own if (name := f"{m}, {rule}") in families)
    none = [m for m in own if f"{m}, {rule}" not in families]
    missing = f"; no setting within the limit suppresses: {', '.join(none)}" if none else ""
    return (
        f"Controls, share of held-out recitation left at a perplexity ratio: in the same matrices, with the same mass or as many pairs, "
        f"{here}; each at the setting chosen for it by the same rule, {best or 'none'}{missing}."
    )


def _gap(table: MemorisationResult, cut: str) -> str:
    """What the paper says of skills, as found."""
    gap = table.gap(cut)
    each = ", ".join(f"{row.partition(': ')[2]} {table.retention(cut, row)}" for row in table.rows(*tables.CLOSED, *tables.OPEN))
    low, high = float(gap.low), float(gap.high)
    said = (
        "arithmetic and closed-book facts fall more than what is looked up in the prompt"
        if low > 0
        else "arithmetic and closed-book facts fall less than what is looked up in the prompt"
        if high < 0
        else "no difference between closed book and open book beyond noise"
    )
    return f"{said} (mean retention of the latter minus the former {gap}; {each})."


def limits(table: MemorisationResult) -> tuple[str, ...]:
    """What the numbers do not say."""
    boxes, colored = (float(table.of(UNCUT, f"open book: {task}").mean()) for task in ("boxes", "colored_objects"))
    known = f"boxes and colored_objects are known in part only ({boxes:.2f} and {colored:.2f})"
    return (f"{known}, so that their retention is that of guesses among the options as well.", *WARNINGS)


WARNINGS = (
    "A canary counts as recited only when some 25 tokens in a row are right, so that any small damage ends it: what matters is the price "
    "in perplexity and skills beside that of the controls, not that it ends.",
    "base is small, was trained to know each of these texts, and adds one-digit numbers, of which there are 81 sums; plain_text is a "
    "small grammar that it predicts nearly as well as can be. One model, one seed of training.",
    "base knows a canary from its first word on: with words left out at the beginning it recites nothing uncut either, so that of the "
    "other beginnings only the longer ones test anything.",
    "How BalancedSubnet weights its two losses, and its search, are not known to us; ours are in studies/balanced_subnet.py.",
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/memorisation"), help="folder of the page and of the factors")
    parser.add_argument("--n", type=int, help="prompts per task (120; 24 with --quick); half as many canaries to choose on")
    parser.add_argument("--quick", action="store_true", help="fewer settings, and factors of fewer texts")
    parser.add_argument("--seed", type=int, default=0, help="of the halves, the random pairs and the resampling")
    given = parser.parse_args(words)
    start = time.monotonic()
    try:
        if (n := given.n if given.n is not None else (24 if given.quick else 120)) < 16:
            raise interp.InputError(f"--n is {n}, expected 16 or more")
        found = measured(given.out, n, quick=given.quick, seed=given.seed)
        lines, table = verdict(found), found.table
        assert table is not None
        sections = [table, *found.sections]
        page = interp.write_report(
            sections, given.out / "memorisation.html", title="Memory in flat directions?", verdict=lines, warnings=limits(table)
        )
    except interp.InputError as error:
        parser.error(str(error))
    print(grids(found), tables.printed(table), *lines, f"{page} ({time.monotonic() - start:.0f} s)", sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
