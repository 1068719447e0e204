"""Texts that are written under the eyes of two models: both read every token, so both score it while it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.generate import check_room, choose, end_tokens
from interp.models.interventions import Part
from interp.progress import progress

if TYPE_CHECKING:
    from interp.models.hooked import HookedModel
    from interp.models.pair import ModelPair
    from interp.models.running import Running

SIDES: tuple[Literal["base", "tuned"], ...] = ("base", "tuned")
_UNLIKELY = -1e4  # log-probabilities below it, among them -inf, are as unlikely as can be: a difference of two stays finite


@dataclass(frozen=True)
class Writer:
    """How a text is written.

    Attributes:
        side: whose predictions it follows, and whose end tokens end it.
        seed: of the streams its tokens are drawn from; None is greedy.
        amplification: how often what tuning added to the log-probabilities is added once more (side ``tuned`` only).
        gate: only tokens that the side gives at least this share of its highest probability; 0 is no gate.
    """

    side: Literal["base", "tuned"]
    seed: int | None = None
    amplification: float = 0.0
    gate: float = 0.0


@dataclass(frozen=True, eq=False)
class Written:
    """Texts and what both models think of them; log-probabilities over the shared token ids, renormalised to them.

    Attributes:
        ids: new tokens, -1 behind the end.
        logp: of each of them, nats; NaN behind the end, for a token that is not shared, and for the model that could not read on
            behind one that it does not know.
        end: the end token that ended a text, which is not part of it; -1 where the text ran to its full length.
        end_logp: of the end token.
    """

    ids: Int[Tensor, "text prompt new"]
    logp: Float[Tensor, "side text prompt new"]
    end: Int[Tensor, "text prompt"]
    end_logp: Float[Tensor, "side text prompt"]


def write(pair: ModelPair, batch: Batch, writers: Sequence[Writer], new_tokens: int, temperature: float) -> Written:
    """Continue every prompt in several ways.

    A plain writer (no amplification, no gate) writes what ``model.generate`` of its side writes with its seed.

    Args:
        pair: the models.
        batch: the prompts.
        writers: the ways.
        new_tokens: at most so many per text.
        temperature: of all that is drawn.

    Raises:
        InputError: a prompt is too long for a model, or a model computes NaN.
    """
    models = (pair.base, pair.tuned)
    for model in models:
        check_room(model, batch, new_tokens)
    shape = (len(writers), len(batch), new_tokens)
    out = Written(
        ids=torch.full(shape, -1),
        logp=torch.full((2, *shape), torch.nan),
        end=torch.full(shape[:2], -1),
        end_logp=torch.full((2, *shape[:2]), torch.nan),
    )
    for n, rows in _by_length(batch):
        units = [(row, w) for row in rows for w in range(len(writers))]  # the ways of a prompt share one pass over it
        # The logits of both, their log-probabilities, and what is drawn from, in float64.
        each = (n + new_tokens) * models[1]._bytes_per_token() * 2 + models[1].shape.d_vocab * 40
        at = 0
        while at < len(units):
            some = units[at : at + models[1]._budget.rows(each)]
            done, _ = models[1]._budget.attempt(lambda some=some: _write(pair, batch, some, writers, temperature, out), len(some))
            at += len(some) if done else 0
    return out


@dataclass(frozen=True, eq=False)
class Reread:
    """What both models think of texts that they read at once.

    Attributes:
        logp: of tokens that were asked for, over the shared ids; NaN as in ``Written``, and where none was asked for.
        top: the most likely token; -1 for a model that cannot read on.
    """

    logp: Float[Tensor, "side choice prompt new"]
    top: Int[Tensor, "side prompt new"]


def reread(
    models: tuple[Running, Running],
    shared: int,
    batch: Batch,
    ids: Int[Tensor, "prompt new"],
    asked: Int[Tensor, "choice prompt new"],
    author: Literal["base", "tuned"],
) -> Reread:
    """What do both models predict along texts that are there already?

    Each text is read in one pass behind its prompt, not token by token, and among others than it was written among: rounding differs.

    Args:
        models: base and tuned.
        shared: the ids below it are known to both.
        batch: the prompts.
        ids: what stands behind them, -1 behind the end.
        asked: tokens whose log-probabilities are wanted at each place, -1 for none.
        author: the model that knows every token of the texts.
    """
    found = Reread(logp=torch.full((2, *asked.shape), torch.nan), top=torch.full((2, *ids.shape), -1))
    unknown = ids >= shared
    for side, (name, model) in enumerate(zip(SIDES, models, strict=True)):
        lost = (unknown.cumsum(1) - unknown.long() > 0) & (name != author)  # behind a token that this model does not know
        read = torch.where((ids < 0) | (unknown & (name != author)), 0, ids)
        known = (asked >= 0) & (asked < shared) & ~lost
        for row, logits in _along(model, batch, read):
            found.top[side, row] = torch.where(lost[row], -1, logits.argmax(-1).cpu())
            logp = _log_probs(logits, shared)
            at = torch.where(known[:, row], asked[:, row], 0).T.to(logp.device)
            found.logp[side, :, row] = torch.where(known[:, row], logp.gather(-1, at).T.float().cpu(), torch.nan)
    return found


def _along(model: Running, batch: Batch, ids: Int[Tensor, "prompt new"]) -> Iterator[tuple[int, Float[Tensor, "new vocab"]]]:
    """Every prompt and the logits at each place of the text behind it.

    Prompts that were written beside others of their length are read alone, the others beside themselves.
    """
    for _, rows in _by_length(batch):
        for row in rows:
            some = [row] if len(rows) > 1 else [row, row]
            reader = _Reader(model, batch, some, once=False)
            first = reader.logits[:1]
            yield row, first if ids.shape[1] == 1 else torch.cat([first, reader.read(ids[some, :-1])[0]])


@dataclass(frozen=True, eq=False)
class Partings:
    """Where the greedy texts of two models part, and what rounding does to them.

    Attributes:
        parted: index of the first token that differs, -1 where none does; an end counts as a token.
        parting: log-probabilities there of base's token and of tuned's, NaN where they do not part.
        rereading: index of the first token of its own text at which a model that reads it in another way would go on otherwise, or -1.
        floor: the most by which a log-probability changes when the texts are read in another way.
        half: rounding of half precision is not part of it: there is no room for float32 copies, or edits are in force.
    """

    parted: Int[Tensor, " prompt"]
    parting: Float[Tensor, "side choice prompt"]
    rereading: Int[Tensor, "side prompt"]
    floor: Float[Tensor, "side prompt"]
    half: bool


def partings(
    pair: ModelPair,
    batch: Batch,
    ids: Int[Tensor, "side prompt new"],
    end: Int[Tensor, "side prompt"],
    logp: Float[Tensor, "reader side prompt new"],
) -> Partings:
    """Read the greedy texts of both models in other ways: at once, in another batch, and half precision also in float32.

    Args:
        pair: the models.
        batch: the prompts.
        ids: what base and tuned wrote, as in ``Written``.
        end: what ended it.
        logp: what both thought of every token while it was written.
    """
    whole = [_with_end(ids[i], end[i]) for i in range(2)]
    others, half = _wide(pair)
    floor, rereading = torch.zeros(2, len(batch)), torch.full((2, len(batch)), -1)
    parted, parting = first_difference(ids[0], ids[1]), None
    for models in ((pair.base, pair.tuned), *others):
        for i, side in enumerate(SIDES):
            again = reread(models, pair.shared_vocab, batch, ids[i], torch.stack([whole[i], whole[1 - i]]), side)
            floor = torch.maximum(floor, (again.logp[:, 0] - logp[:, i]).abs().nan_to_num(0.0).amax(-1))
            departs = first_difference(torch.where(whole[i] >= 0, again.top[i], -1), whole[i])
            rereading[i] = torch.where((departs >= 0) & ((rereading[i] < 0) | (departs < rereading[i])), departs, rereading[i])
            if parting is None:  # base's text, which is tuned's up to there
                where = parted.clamp_min(0)[None, None, :, None].expand(2, 2, -1, 1)
                parting = again.logp.gather(-1, where)[..., 0].masked_fill(parted < 0, torch.nan)
    assert parting is not None
    return Partings(parted, parting, rereading, floor, half)


def first_difference(one: Int[Tensor, "prompt new"], other: Int[Tensor, "prompt new"]) -> Int[Tensor, " prompt"]:
    """Index of the first token that differs, an end counting as one; -1 where none does."""
    differs = one != other
    return torch.where(differs.any(1), differs.int().argmax(1), -1)


def _with_end(ids: Int[Tensor, "prompt new"], end: Int[Tensor, " prompt"]) -> Int[Tensor, "prompt new"]:
    """Texts with the end token that ended them."""
    whole, length = ids.clone(), (ids >= 0).sum(1)
    ended = (end >= 0).nonzero()[:, 0]
    whole[ended, length[ended]] = end[ended]
    return whole


def _wide(pair: ModelPair) -> tuple[list[tuple[HookedModel, HookedModel]], bool]:
    """Models in half precision with their weights computed in float32, and whether there is no room for that, or an edit in force."""
    if all(model.dtype.itemsize >= 4 for _, model in pair.sides()):
        return [], False
    found = []
    for _, model in pair.sides():
        if model.dtype.itemsize < 4:
            model = None if model.active_edits else model.in_dtype(torch.float32)
        if model is None:
            return [], True
        found.append(model)
    return [(found[0], found[1])], False


def amplified(
    logits: Float[Tensor, "row vocab"],
    base: Float[Tensor, "row shared"],
    tuned: Float[Tensor, "row shared"],
    amplification: float,
    gate: float = 0.0,
    own: Sequence[int] = (),
) -> Float[Tensor, "row vocab"]:
    """Scores from which amplified text is drawn: tuned + amplification (tuned - base), for the tokens that pass the gate.

    Tokens that only the tuned model knows cannot be amplified. Those of ``own`` keep the probability that tuned gives them, the others
    are never drawn, and the shared ones have what remains.

    Args:
        logits: of the tuned model.
        base: log-probabilities of base over the shared ids.
        tuned: those of the tuned model.
        amplification: 0 is the tuned model, -1 base.
        gate: tokens pass that are given at least this share of the highest probability by the model that the scores lean to: tuned, or
            base where ``amplification`` is negative.
        own: ids beyond the shared ones, the tuned model's end tokens.
    """
    shared, lowest = tuned.shape[-1], math.log(gate) if gate > 0 else -torch.inf
    full = logits.to(tuned).log_softmax(-1)
    allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=full.device)
    allowed[:shared] = True
    allowed[list(own)] = True
    rest = full[:, :shared].logsumexp(-1, keepdim=True)
    full = full.masked_fill(~allowed, -torch.inf)
    closed = full < full.amax(-1, keepdim=True) + lowest
    if amplification < 0:
        closed[:, :shared] = base < base.amax(-1, keepdim=True) + lowest
    closed |= full == -torch.inf
    scores = tuned + amplification * (tuned.clamp_min(_UNLIKELY) - base.clamp_min(_UNLIKELY))
    if own:
        scores = scores - scores.masked_fill(closed[:, :shared], -torch.inf).logsumexp(-1, keepdim=True) + rest
    return torch.cat([scores, full[:, shared:]], -1).masked_fill(closed, -torch.inf)


def _by_length(batch: Batch) -> Iterator[tuple[int, list[int]]]:
    """Prompts of equal length, which need no padding, so that every prompt is computed exactly as alone."""
    lengths = batch.lengths.tolist()
    for n in sorted(set(lengths)):
        yield n, [i for i, m in enumerate(lengths) if m == n]


def _log_probs(logits: Tensor, shared: int) -> Tensor:
    return logits[..., :shared].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class _Reader:
    """A model on its way through texts; with ``once``, rows that go on from the same prompt share the pass over it.

    Attributes:
        logits: of the next token, [row, vocab].
    """

    def __init__(self, model: Running, batch: Batch, rows: Sequence[int], once: bool = True) -> None:
        from transformers import DynamicCache

        self.model, self.rows, self.part = model, rows, Part.of(batch, rows)
        self.cache = DynamicCache(config=model.wrapped.runner.config)
        prompts = list(dict.fromkeys(rows)) if once else list(rows)
        with torch.no_grad():
            last = torch.tensor([self.part.batch.ids.shape[1] - 1])
            logits = model.forward(Part.of(batch, prompts), keep=last, cache=self.cache).logits[:, -1]
        if len(prompts) < len(rows):
            which = torch.tensor([prompts.index(row) for row in rows])
            self.cache.batch_select_indices(which)
            logits = logits[which]
        self.logits = self._checked(logits)

    def read(self, ids: Int[Tensor, "row new"]) -> Float[Tensor, "row new vocab"]:
        """Logits behind each of the next tokens."""
        now = replace(self.part, batch=Batch(ids, torch.ones_like(ids, dtype=torch.bool)), phase="new")
        with torch.no_grad():
            out = self.model.forward(now, keep=torch.arange(ids.shape[1]), cache=self.cache).logits
        self.logits = self._checked(out[:, -1])
        return out

    def _checked(self, logits: Tensor) -> Tensor:
        bad = logits.isnan().any(-1)
        if bool(bad.any()):
            row = self.rows[int(bad.int().argmax())]
            raise InputError(f"{self.model.name} computes NaN behind prompt {row}; in half precision, load it with dtype='float32'")
        return logits


def _write(
    pair: ModelPair, batch: Batch, units: list[tuple[int, int]], writers: Sequence[Writer], temperature: float, out: Written
) -> None:
    """The texts of some prompts and writers, step by step."""
    rows, ways = torch.tensor([u[0] for u in units]), torch.tensor([u[1] for u in units])
    out.ids[ways, rows], out.end[ways, rows] = -1, -1  # nothing is left of a try that ran out of memory
    out.logp[:, ways, rows], out.end_logp[:, ways, rows] = torch.nan, torch.nan
    readers = [_Reader(model, batch, rows.tolist()) for model in (pair.base, pair.tuned)]
    ends = {name: set(end_tokens(model)) for name, model in pair.sides()}
    going = list(range(len(units)))
    lost = torch.zeros(2, len(units), dtype=torch.bool)  # who cannot read on
    steps = out.ids.shape[-1]
    for step in progress(range(steps), f"writing {len(units)} texts"):
        logp = [_log_probs(reader.logits, pair.shared_vocab) for reader in readers]
        new = _next(pair, readers, logp, units, going, writers, ends, step, temperature)
        known = torch.where(new < pair.shared_vocab, new, 0)
        scores = torch.stack([x.gather(-1, known[:, None].to(x.device))[:, 0].float().cpu() for x in logp])
        scores = scores.masked_fill(lost | (new >= pair.shared_vocab), torch.nan)
        over = [i for i in going if int(new[i]) in ends[writers[units[i][1]].side]]
        out.end[ways[over], rows[over]] = new[over]
        out.end_logp[:, ways[over], rows[over]] = scores[:, over]
        going = [i for i in going if i not in over]
        out.ids[ways[going], rows[going], step] = new[going]
        out.logp[:, ways[going], rows[going], step] = scores[:, going]
        if not going or step == steps - 1:
            return
        for i in going:
            lost[int(writers[units[i][1]].side == "base"), i] |= bool(new[i] >= pair.shared_vocab)
        ended = torch.ones(len(units), dtype=torch.bool)
        ended[going] = False
        for side, reader in enumerate(readers):
            reader.read(torch.where(lost[side] | ended, 0, new)[:, None])


def _next(
    pair: ModelPair,
    readers: list[_Reader],
    logp: list[Tensor],
    units: list[tuple[int, int]],
    going: list[int],
    writers: Sequence[Writer],
    ends: dict[str, set[int]],
    step: int,
    temperature: float,
) -> Int[Tensor, " unit"]:
    """The next token of every text that goes on; 0 for the others."""
    new = torch.zeros(len(units), dtype=torch.long)
    for number, writer in enumerate(writers):
        some = [i for i in going if units[i][1] == number]
        if not some:
            continue
        logits = readers[writer.side == "tuned"].logits[some]
        if writer.amplification or writer.gate:
            base, tuned = logp[0][some].to(logits.device), logp[1][some]
            own = [e for e in ends[writer.side] if pair.shared_vocab <= e < logits.shape[-1]]
            logits = amplified(logits, base, tuned, writer.amplification, writer.gate, own)
        streams = [(writer.seed or 0, units[i][0]) for i in some]
        new[some] = torch.tensor(choose(logits, streams, step, 0.0 if writer.seed is None else temperature))
    return new
