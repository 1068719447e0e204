"""What a comparison says in sentences: made from the numbers of its results, each with its noise.

Per pair: who is compared, how large the change is in weights and in behaviour, what was gained and
forgotten, and where in the weights it sits. And what a reader must know before believing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.analyses.activation_difference import ActivationDifferenceResult
    from interp.analyses.activation_patching import ActivationPatchingResult
    from interp.analyses.circuit_discovery import CircuitDiscoveryResult
    from interp.analyses.circuit_evaluation import CircuitEvaluationResult
    from interp.analyses.circuit_overlap import CircuitOverlapResult
    from interp.analyses.cmap import CmapResult
    from interp.analyses.completions import CompletionsResult
    from interp.analyses.cross_patching import CrossPatchingResult
    from interp.analyses.delta_curvature import DeltaCurvatureResult
    from interp.analyses.logit_lens import LogitLensResult
    from interp.analyses.pair_check import PairCheckResult
    from interp.analyses.path_patching import PathPatchingResult
    from interp.analyses.recitation import RecitationResult
    from interp.analyses.task_accuracy import TaskAccuracyResult
    from interp.analyses.token_divergence import TokenDivergenceResult
    from interp.analyses.token_shift import TokenShiftResult
    from interp.analyses.tuco import TucoResult
    from interp.analyses.tuco_detection import TucoDetectionResult
    from interp.analyses.weight_delta import WeightDeltaResult
    from interp.analyses.weight_path import WeightPathResult
    from interp.results import Result

FEW_TEXTS = 30
"""Fewer texts than this give a standard error that is itself uncertain by more than an eighth."""

FEW_PAIRS = 10
"""Fewer pairs of prompts than this leave the interval of what a patch recovers to chance."""

FEW_QUESTIONS = 100
"""Fewer questions than this leave an accuracy uncertain by up to ten points either way."""

CLOSED = 0.01
"""More than this share of the stream unaccounted for, and its parts are not what they are said to be."""

SIGNIFICANT = 0.05

_PATCHING = ("activation_patching", "cross_patching", "path_patching", "edge_attribution")


def verdict(results: Sequence[Result]) -> list[str]:
    """Sentences that answer the question, pair by pair."""
    pairs = by_pair(results)
    told = []
    for name, found in pairs.items():
        sentences = [sentence for part in _PARTS for sentence in part(found)]
        told += [f"{name}: {sentences[0]}", *sentences[1:]] if len(pairs) > 1 and sentences else sentences
    return told


def cautions(results: Sequence[Result]) -> list[str]:
    """What a reader must know before believing the numbers, pair by pair."""
    told = {name: [*_pair_cautions(found), *_rounding(found), *_small(found), *_silent(found)] for name, found in by_pair(results).items()}
    of: dict[str, list[str]] = {}
    for name, line in ((name, line) for name, lines in told.items() for line in lines):
        of.setdefault(line, []).append(name)
    return [line if len(names) == len(told) else f"{', '.join(dict.fromkeys(names))}: {line}" for line, names in of.items()]


def by_pair(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each pair, by the names of its models; with a fingerprint where two pairs have the same names.

    What compares circuits alone has no models, and belongs to the pair before it.
    """
    weights: dict[tuple[str, ...], list[Result]] = {}
    pair: tuple[str, ...] = ()
    for result in results:
        own = tuple(m["fingerprint"] for m in result.meta.models)
        pair = pair if own[1:] == () and set(own) <= set(pair) else own or pair  # what was asked of one model of the pair belongs to it
        weights.setdefault(pair, []).append(result)
    names = {key: " -> ".join(m["name"] for m in found[0].meta.models) for key, found in weights.items()}
    alike = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {names[key] + (f" ({key[-1][:8]})" if names[key] in alike else ""): found for key, found in weights.items()}


def _of(found: Sequence[Any], analysis: str) -> list[Any]:
    return [r for r in found if r.meta.analysis == analysis]


def _identity(found: Sequence[Any]) -> Iterator[str]:
    for check in _of(found, "pair_check"):
        r: PairCheckResult = check
        base, tuned = (r.card["name"][side] for side in ("base", "tuned"))
        yield (
            f"{base} and {tuned} are {r.card['architecture']['base']} models with {r.card['parameters']['base']} weights in "
            f"{r.card['dtype']['base']}; {r.guess}."
        )


def _size(found: Sequence[Any]) -> Iterator[str]:
    """Two axes: how far the weights moved, and how far the predictions."""
    for delta in _of(found, "weight_delta"):
        w: WeightDeltaResult = delta
        share = f"The weights moved by {_percent(w.total)} of their norm (rounding to {w.dtype} alone: {_percent(w.total_floor)})"
        yield share + (": no weight moved more than rounding explains." if bool(w.under_floor.all()) else ".")
    for divergence in _of(found, "token_divergence"):
        yield _behaviour(divergence)


def _behaviour(t: TokenDivergenceResult) -> str:
    """The change of predictions on running text, and what was forgotten there."""
    from interp.analyses.token_divergence import mean_and_error

    kl, error = mean_and_error(t.kl)
    n = len(t.kl)
    texts = f"{n} plain text{'s' if n > 1 else ''}"
    size = f"On {texts} the predictions moved by {kl:.3g}{_pm(error)} nats per token (KL; numerical floor {t.numerical_floor:.1g})"
    if kl <= t.numerical_floor:
        return f"{size}: no more than rounding."
    if t.kl.shape[1] < 2 or bool(t.nll_change.isnan().all()):
        return f"{size}."
    change, noise = mean_and_error(t.nll_change)
    if noise is None:
        return f"{size}, and the tuned model's loss there changed by {change:+.3g} nats per token (one text: no error bar)."
    if abs(change) <= 2 * noise:
        return f"{size}, without forgetting that shows: its loss there changed by {change:+.3g}{_pm(noise)} nats per token."
    what = "the tuned model forgot some of that" if change > 0 else "the tuned model became better at that"
    return f"{size}, and {what}: its loss there changed by {change:+.3g}{_pm(noise)} nats per token."


def _ledger(found: Sequence[Any]) -> Iterator[str]:
    """What was gained, lost and left as it was, task by task."""
    tasks: list[TaskAccuracyResult] = _of(found, "task_accuracy")
    known = [t for t in tasks if t.task not in at_chance(found)]
    for word, wanted in (("raised", 1), ("lowered", -1)):
        moved = [t for t in known if _direction(t) == wanted]
        if moved:
            moved.sort(key=lambda t: -abs(float(t.accuracy[1] - t.accuracy[0])))
            yield f"Tuning {word} {_join([_accuracies(t) for t in moved])}."
    if same := [t for t in known if _direction(t) == 0]:
        yield f"No change beyond noise on {_join([_accuracies(t) for t in same])}."
    if lost := at_chance(found):
        yield f"Neither model is above chance on {_join(lost)}: these tasks say nothing about the tuning."


def at_chance(found: Sequence[Any]) -> list[str]:
    """The tasks on which neither model is above chance, and which tuning did not move either."""
    return [t.task for t in _of(found, "task_accuracy") if not bool(t.above_chance.any()) and _direction(t) == 0]


def _direction(t: TaskAccuracyResult) -> int:
    """1 where accuracy rose, -1 where it fell, 0 where the exact test cannot tell."""
    if t.p_value >= SIGNIFICANT:
        return 0
    return 1 if t.pfr > t.nfr else -1


def _accuracies(t: TaskAccuracyResult) -> str:
    from interp.stats import paired_change

    before, after = t.accuracy.tolist()
    low, high = paired_change(int(t.gained.sum()), int(t.lost.sum()), t.right.shape[1])
    chance = "" if t.chance is None else f", chance {t.chance:.0%}"
    return (
        f"{t.task} ({before:.0%} to {after:.0%}, change {100 * (t.pfr - t.nfr):+.0f} [{100 * low:+.0f}, "
        f"{100 * high:+.0f}] points; {int(t.gained.sum())} gained, {int(t.lost.sum())} lost, n = {t.right.shape[1]}{chance})"
    )


def _place(found: Sequence[Any]) -> Iterator[str]:
    """Where the change sits: in the weights, then in the activations."""
    for delta in _of(found, "weight_delta"):
        w: WeightDeltaResult = delta
        order = w.change.nan_to_num(0).argsort(descending=True).tolist()
        whole = float(w.change.square().nansum())
        if whole == 0 or bool(w.under_floor.all()):
            continue
        half, kept = 0.0, []
        for i in order:
            kept.append(w.names[i])
            half += float(w.change[i]) ** 2 / whole
            if half >= 0.5:
                break
        shown = ", ".join(kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
        matrices = (~w.stable_rank.isnan() & ~w.under_floor & w.relative.isfinite()).nonzero().flatten().tolist()
        top = max(matrices, key=lambda i: float(w.relative[i]), default=None)
        most = "" if top is None else f"; relative to its size {w.names[top]} changed most ({_percent(float(w.relative[top]))})"
        yield f"Half of the squared change is in {len(kept)} of {len(w.names)} weights: {shown}{most}."
    for patching in _of(found, "activation_patching"):
        p: ActivationPatchingResult = patching
        on = "".join(f" on {i.get('task') or i['text']}" for i in p.meta.inputs if i.get("task") or i["text"])
        yield f"Patching{on}: {p.summary().split(' (')[0]} (n = {p.clean.shape[1]} pairs)."
    for crossing in _of(found, "cross_patching"):
        c: CrossPatchingResult = crossing
        yield f"Of {c.sender} inside {c.receiver}, {c.summary().split(' (')[0]} (n = {len(c.start)} prompts)."
    for paths in _of(found, "path_patching"):
        d: PathPatchingResult = paths
        yield f"Straight paths: {d.summary().split(';')[0]} (n = {d.clean.shape[1]} pairs)."


def _said(found: Sequence[Any]) -> Iterator[str]:
    """What the models write, and which tokens tuning prefers."""
    for completions in _of(found, "completions"):
        c: CompletionsResult = completions
        yield f"{_clause(c)}."
    for shift in _of(found, "token_shift"):
        t: TokenShiftResult = shift
        n = int(t.positions.sum())
        sure = t.preferred("tuned")[:4]
        if t.nothing:
            yield f"Over {n} positions of text no token is preferred by either model: no difference beyond rounding."
        elif sure:
            names = _join([repr(t.vocabulary[int(t.tokens[i])]) for i in sure])
            yield f"Over {n} positions of text the tokens that tuning raised most often are {names}, beyond the noise between texts."
        else:
            yield f"Over {n} positions of text tuning raised no token beyond the noise between texts."


def _inside(found: Sequence[Any]) -> Iterator[str]:
    """How far the streams moved, and which layer, part and head made the answer another one."""
    for difference in _of(found, "activation_difference"):
        d: ActivationDifferenceResult = difference
        where = f" ({d.summary().split(' (')[1].split(';')[0]})" if d.beyond else ""  # site, place and number of texts
        undone = d.undone()
        alone = "" if undone is None else f"; its mean, added to base at {undone[0]}, undoes {_share(undone[1])} of KL(tuned || base)"
        yield f"{_clause(d)}{where}{alone}."
    for lens in _of(found, "logit_lens"):
        s: LogitLensResult = lens
        if len(s.sides) == 2:
            base, tuned = (_first_layer(s.decision(side)) for side in ("base", "tuned"))
            same = ": no difference beyond rounding" if s.alike else ""
            what = "the tokens that base holds most likely" if s.stand_in else "the answers"
            told = f"half of {what} on {_about(s)} are on top to stay from {tuned} on in tuned and {base} on in base"
            yield f"Read layer by layer, {told}{same} (n = {s.n})."
    for attribution in _of(found, "logit_attribution"):
        if len(attribution.sides) == 2:
            what = "the token that base holds most likely" if attribution.stand_in else "the answer"
            yield f"Of what writes {what}, {_clause(attribution)} (n = {attribution.n})."
    for attention in _of(found, "attention_patterns"):
        if len(attention.sides) == 2:
            yield f"{_clause(attention)}."


def _line(found: Sequence[Any]) -> Iterator[str]:
    """Whether base and tuned are joined by a straight line on which nothing breaks."""
    from interp.stats import single

    for path in _of(found, "weight_path"):
        w: WeightPathResult = path
        if w.nothing:
            yield "On the straight line from base to tuned nothing changes beyond rounding."
            continue
        right = w.curve("right")
        inside = [i for i, alpha in enumerate(w.alphas) if 0 <= alpha <= 1]
        shown = [(w.alphas[i], single(*(float(x[i]) for x in (right.value, right.low, right.high)))) for i in inside]
        rates = ", ".join(f"{_share(rate)} at {alpha:g}" for alpha, rate in shown)
        barrier = w.barrier()
        loss = "" if barrier is None else f"; the loss on text rises above that line by at most {_interval(barrier[1])} nats per token"
        if barrier is not None and float(barrier[1].value) <= 0:
            loss = "; the loss on text has no barrier on the way"
        n = int(w.prompt_group.max()) + 1
        yield f"On the straight line from base to tuned right answers on {w.task} go {rates} (n = {n}){loss}."


def _clause(result: Any) -> str:
    """The main clause of a summary, up to the first bracket of details."""
    return result.summary().split(" (")[0].split("; ")[0]


def _first_layer(decision: tuple[str, str, str]) -> str:
    """A layer with the ends of its interval."""
    name, low, high = decision
    return ("no layer" if name == "never" else name) + ("" if low == high else f" [{low} to {high}]")


def _share(estimate: Any) -> str:
    """In percent, with its interval where it has one."""
    value, low, high = (float(x) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.0%}" + ("" if low != low else f" [{low:.0%}, {high:.0%}]")


def _circuits(found: Sequence[Any]) -> Iterator[str]:
    """The heads that were found in each model, what base's do in both, and how many the two share."""
    for search in _of(found, "circuit_discovery"):
        s: CircuitDiscoveryResult = search
        n = s.n if "contexts" in s.n else f"{s.n} pairs"
        yield f"Searched stage by stage on {_about(s)}: {s.summary().split('; n = ')[0]} (n = {n})."
    for evaluation in _of(found, "circuit_evaluation"):
        e: CircuitEvaluationResult = evaluation
        told = [_kept(e, side) for side in e.sides]
        yield f"The circuit of base does alone {_join(told)} of what the whole model does on fresh prompts (n = {e.n})."
    for overlap in _of(found, "circuit_overlap"):
        o: CircuitOverlapResult = overlap
        i = o.distinct
        a, b, shared, chance = (float(x[i]) for x in (o.size_a, o.size_b, o.shared, o.chance))
        mine = f"Base's circuit has {a:.0f} head{'' if a == 1 else 's'} and tuned's {b:.0f}"
        both = f"{shared:.0f} {'is' if shared == 1 else 'are'} in both, where chance gives {chance:.2g}"
        yield f"{mine}; {both} (p = {float(o.p[i]):.2g})."
    for crossing in _of(found, "cmap"):
        yield _crossed(crossing)


def _crossed(c: CmapResult) -> str:
    """What the circuit's heads of one model do in the other."""
    from interp.stats import plus_minus

    way = c.directions[0]
    sender, receiver = way.split("_to_")
    start, goal = c.start(direction=way), c.goal(direction=way)
    before, now, there = (f"{float(x.double().mean()):.0%}" for x in (start, c.patched[0, 0, 0], goal))
    main = (
        f"The {c.heads[0]} heads of {sender}'s circuit, set in {receiver}, bring its accuracy from {before} to {now} ({sender} has {there})"
    )
    share, n = c.recovered(direction=way), f"n = {len(start)}"
    if share.refused:
        return f"{main}, too close to say which share of the change that is ({sender} - {receiver} {plus_minus(goal - start)}, {n})."
    draws = c.random_heads(direction=way)[0]
    draws = draws[~draws.isnan()]
    random = f", random heads {float(draws.mean()):.2g}" if len(draws) and not bool(draws.isnan().any()) else ""
    low, high = float(share.low[0]), float(share.high[0])
    ends = "" if low != low else f" [{low:.3g}, {high:.3g}]"
    return f"{main}: {float(share.value[0]):.3g}{ends} of what tuning changed{random} ({n})."


def _kept(e: CircuitEvaluationResult, side: str) -> str:
    share = e.faithfulness(side)
    if share.refused:
        return f"a share without meaning in {side} (all heads knocked out, it does as well)"
    draws = e.random_faithfulness(side)
    beside = f", random circuits {float(draws[:, -1].mean()):.2g}" if len(draws) else ""
    return f"{_interval(share)} in {side}{beside}"


def _written(found: Sequence[Any]) -> Iterator[str]:
    """How much of what the tuned model is about to say was written by tuning."""
    for contribution in _of(found, "tuco"):
        t: TucoResult = contribution
        if float(t.tuco.max()) <= t.numerical_floor:
            yield f"At the end of no prompt did tuning write more of the stream than rounding (TuCo at most {t.numerical_floor:.2g})."
            continue
        told = [f"{name} ({_mean(t.mean_of(rows), len(rows))})" for name, rows in t.by_set.items()]
        if len(told) > 1:
            ends = f"highest on {told[0]} and lowest on {told[-1]} (mean TuCo)"
            yield f"Of {len(told)} sets of prompts, tuning's share of what was written into the stream was {ends}."
        else:
            on = told[0] if told else f"{_about(t)} ({_mean(t.mean_of(list(range(len(t.tuco)))), len(t.tuco))})"
            yield f"The mean TuCo, tuning's share of what was written into the stream, on {on}."
    for detection in _of(found, "tuco_detection"):
        d: TucoDetectionResult = detection
        a, b = d.told_apart
        n = int(d.is_positive.sum())
        less = ", the first having less of it" if d.auc.value < 0.5 else ""
        yield f"TuCo tells {a} from {b} with AUC {_interval(d.auc)}{less} (n = {n} and {len(d.is_positive) - n})."


def _learned(found: Sequence[Any]) -> Iterator[str]:
    """Whether tuning moved the weights along sharp directions or flat ones, and what it did to texts known by heart."""
    for curvature in _of(found, "delta_curvature"):
        c: DeltaCurvatureResult = curvature
        if not bool((c.change > 0).any()):
            continue
        times, spread = c.whole
        way = "sharp directions" if times > 1 + 2 * spread else "flat directions" if times < 1 - 2 * spread else ""
        told = f"tuning moved the weights along {way}" if way else "tuning's change is no sharper and no flatter than chance"
        if c.positions < c.needed:
            told = "too few positions tell sharp directions from flat ones"
        yield (
            f"In the curvature of base's loss (K-FAC) {told}: {times:.3g} times what a random change with the same singular values gives "
            f"(1 +- {spread:.1g}; {c.positions} positions)."
        )
    for reciting in _of(found, "recitation"):
        r: RecitationResult = reciting
        if len(r.sides) == 2:
            before, after = (float(x.double().mean()) for x in r.strict)
            lost, gained = (int((r.strict[a] & ~r.strict[b]).sum()) for a, b in ((0, 1), (1, 0)))
            n = r.strict.shape[1]
            yield f"Of {n} texts to be known by heart base recites {before:.0%} and tuned {after:.0%} ({lost} lost, {gained} gained)."


def _about(result: Any) -> str:
    """What a result's first prompts are."""
    return next((str(i.get("task") or i["text"]) for i in result.meta.inputs if i.get("task") or i["text"]), "its prompts")


def _mean(estimate: Any, n: int) -> str:
    return f"{_interval(estimate)}, n = {n}"


def _interval(estimate: Any) -> str:
    """A value with its interval, where it has one."""
    low, high = float(estimate.low), float(estimate.high)
    return f"{float(estimate.value):.3g}" + ("" if low != low else f" [{low:.3g}, {high:.3g}]")


def _pair_cautions(found: Sequence[Any]) -> Iterator[str]:
    for check in _of(found, "pair_check"):
        r: PairCheckResult = check
        yield from r.warnings
        yield from (item["says"] for item in r.items if item["item"] in ("chat template", "special tokens") and item["status"] == "note")


def _rounding(found: Sequence[Any]) -> Iterator[str]:
    """Where the dtype's rounding is as large as what is measured."""
    for delta in _of(found, "weight_delta"):
        w: WeightDeltaResult = delta
        under = int((w.under_floor & (w.change > 0)).sum())
        moved = int((w.change > 0).sum())
        if moved and 2 * under > moved:
            yield f"Rounding to {w.dtype} explains the change of {under} of the {moved} weights that differ; they are grey in the figures."
    for divergence in _of(found, "token_divergence"):
        t: TokenDivergenceResult = divergence
        if t.half:
            yield "Half precision moves predictions too; a float32 copy did not fit the memory, so the numerical floor does not show it."
        share = float((t.kl <= t.numerical_floor)[~t.kl.isnan()].double().mean())
        if share > 0.5:
            yield f"The predictions of {share:.0%} of the tokens differ by less than the numerical floor."
    for accuracy in _of(found, "task_accuracy"):
        a: TaskAccuracyResult = accuracy
        flips, noise = int(a.gained.sum() + a.lost.sum()), int(a.jitter.max())
        if noise and noise * 2 > flips:
            yield f"On {a.task} rounding alone flips {noise} answers, and tuning flips {flips}."
    for contribution in (*_of(found, "tuco"), *_of(found, "tuco_detection")):
        c: TucoResult | TucoDetectionResult = contribution
        if len(c.rounding) and float(c.rounding.mean()) * 10 > float(c.tuco.median()):
            alone, typical = float(c.rounding.mean()), float(c.tuco.median())
            yield f"{_name(c)}: rounding to half precision alone gives TuCo {alone:.2g}, and the median prompt has {typical:.2g}."
        if float(c.closure.max()) > CLOSED:
            yield f"{_name(c)}: what the blocks were seen to write misses the stream by up to {float(c.closure.max()):.1g} of it."
    for name in _PATCHING:
        yield from (f"{name.replace('_', ' ').capitalize()}: {note}." for patching in _of(found, name) for note in patching.notes)


def _small(found: Sequence[Any]) -> Iterator[str]:
    """Numbers that rest on few prompts."""
    few = [f"{r.meta.analysis} has {len(r.kl)} texts" for r in _of(found, "token_divergence") if len(r.kl) < FEW_TEXTS]
    few += [f"{r.task} has {r.right.shape[1]} questions" for r in _of(found, "task_accuracy") if r.right.shape[1] < FEW_QUESTIONS]
    few += [f"cmap has {r.base.shape[1]} prompts" for r in _of(found, "cmap") if r.base.shape[1] < FEW_QUESTIONS]
    pairs = [(name, (r.goal if name == "cross_patching" else r.clean).shape[-1]) for name in _PATCHING for r in _of(found, name)]
    few += [f"{name.replace('_', ' ')} has {n} pairs" for name, n in pairs if n < FEW_PAIRS]
    for t in _of(found, "tuco"):
        least = min([len(rows) for rows in t.by_set.values()] or [len(t.tuco)])
        few += [f"tuco has {least} prompts in its smallest set"] if least < FEW_PAIRS else []
    for d in _of(found, "tuco_detection"):
        least = min(int(d.is_positive.sum()), int((~d.is_positive).sum()))
        few += [f"tuco_detection has {least} prompts in its smaller set"] if least < FEW_PAIRS else []
    few += [
        f"delta_curvature has factors over {c.positions} positions, and {c.needed} are needed for their full rank"
        for c in _of(found, "delta_curvature")
        if c.positions < c.needed
    ]
    if few:
        yield f"Small samples: {_join(few)}; --effort full takes more, where they come from tasks and not from a file."


def _silent(found: Sequence[Any]) -> Iterator[str]:
    """What could not be seen at all."""
    ran = {r.meta.analysis for r in found}
    if "token_divergence" in ran and "task_accuracy" not in ran:
        yield "No task was scored, so nothing here says what the tuned model can do now that it could not before; name tasks with --task."
    for patching in _of(found, "activation_patching"):
        p: ActivationPatchingResult = patching
        for side, resolved in zip(p.sides, p.resolved.tolist(), strict=True):
            if not resolved:
                yield f"Clean and corrupt prompts are too close in {side} to say what share of their difference a patch recovers."
    for detection in _of(found, "tuco_detection"):
        d: TucoDetectionResult = detection
        if d.confounded:
            a, b = d.told_apart
            yield f"The length of the prompts alone tells {a} from {b} with AUC {_interval(d.by_length)}, so TuCo may go by length."


def _name(result: Any) -> str:
    return result.meta.analysis.replace("_", " ").capitalize()


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _pm(error: float | None) -> str:
    return "" if error is None else f" +- {error:.1g}"


def _join(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


_PARTS = (_identity, _size, _ledger, _said, _line, _inside, _place, _circuits, _written, _learned)
"""What the sentences are about, in their order."""
