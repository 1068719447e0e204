"""How differently do two models predict every token of the same texts?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.metrics import kl_divergence
from interp.models.batch import Batch
from interp.progress import progress
from interp.prompts import PromptPairs, Prompts
from interp.results import Result, analysis
from interp.sites import Site
from interp.spelling import spelled
from interp.stats import Estimate, within

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair

SIDES = ("base", "tuned")
_CELLS = 2**23  # tokens x vocabulary held at a time: 32 MB per fp32 array
_TOKENS = 2**13  # tokens whose final residual stream is held at a time
_FLOOR_PROMPTS = 8
_SHOWN_PROMPTS = 8
_SHOWN_TOKENS = 20


@dataclass(frozen=True, eq=False)
class TokenDivergenceResult(Result):
    """Divergences per token. Cell ``[prompt, pos]`` is about the prediction made after reading token ``pos``.

    NaN (-1 in integers) after the end of a prompt; ``nll`` and ``rank`` also at the last token, whose successor
    is unknown. Everything is in nats over the token ids that both models know, renormalised to them.

    Attributes:
        kl: KL(tuned || base).
        reverse_kl: KL(base || tuned).
        jsd: Jensen-Shannon divergence, between 0 and ln 2.
        nll: negative log-probability of the actual next token.
        rank: rank of the actual next token, 1 is the most likely.
        entropy: of the prediction.
        top: id of the most likely token.
        ids: the tokens of the prompts.
        kind: index into ``kinds`` of the predicted token's place in the text.
        floor: KL of a model against itself, for tokens of some of the prompts: in another batch, and in half precision also
            against its weights computed in float32; the larger of the two.
        half: a model computes in half precision and its float32 copy did not fit the memory, so the floor lacks that part.
        kinds: names of the places: ``first 10``, ``later``, and where the prompts name them ``prompt`` and ``template``.
        vocabulary: id -> text of the tokens that occur.
        shared: number of token ids compared.
        labels: of the axis ``side``.
    """

    kl: Float[Tensor, "prompt pos"]
    reverse_kl: Float[Tensor, "prompt pos"]
    jsd: Float[Tensor, "prompt pos"]
    nll: Float[Tensor, "side prompt pos"]
    rank: Float[Tensor, "side prompt pos"]
    entropy: Float[Tensor, "side prompt pos"]
    top: Int[Tensor, "side prompt pos"]
    ids: Int[Tensor, "prompt pos"]
    kind: Int[Tensor, "prompt pos"]
    floor: Float[Tensor, "side floor_token"]
    half: bool
    kinds: tuple[str, ...]
    vocabulary: dict[int, str]
    shared: int
    labels: dict[str, tuple[str, ...]]

    @property
    def numerical_floor(self) -> float:
        """KL that rounding alone produces: the largest of a model against itself."""
        return float(self.floor.max())

    @property
    def prompt_kl(self) -> Float[Tensor, " prompt"]:
        """Mean KL(tuned || base) of every prompt."""
        return self.kl.nanmean(1)

    @property
    def nll_change(self) -> Float[Tensor, "prompt pos"]:
        """How much worse (positive) the tuned model predicts the actual tokens."""
        return self.nll[1] - self.nll[0]

    @property
    def disagrees(self) -> Float[Tensor, "prompt pos"]:
        """1 where the most likely tokens differ."""
        return torch.where(self.ids < 0, torch.nan, (self.top[0] != self.top[1]).float())

    def summary(self) -> str:
        """Mean KL with its standard error, quantiles, floor and disagreement."""
        tokens = self.kl[~self.kl.isnan()].double().sort().values
        mean, error = mean_and_error(self.kl)
        median, high = (float(tokens[int(q * (len(tokens) - 1))]) for q in (0.5, 0.95))
        said = f"KL(tuned || base) is {mean:.3g}" + ("" if error is None else f" +- {error:.2g}")
        spread = f"s.e. over {len(self.kl)} prompts" if error is not None else "one prompt, so no s.e."
        actual = ""
        if not self.nll_change.isnan().all():
            change = mean_and_error(self.nll_change)[0]
            actual = f"the tuned model is {abs(change):.2g} nats per token {'worse' if change > 0 else 'better'} at the actual text, and "
        return (
            f"{said} nats per token ({spread}; median {median:.2g}, 95th percentile {high:.2g}, {len(tokens)} tokens, numerical floor "
            f"{self.numerical_floor:.1g}); {actual}the most likely token differs at {float(self.disagrees.nanmean()):.1%} of the positions"
        )

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """How far predictions moved, and the loss."""
        found = {"KL(tuned || base), nats per token": {"tuned": within(*mean_and_error(self.kl))}}
        if self.nll_change.isnan().all():
            return found
        return found | {"change of the loss, nats per token": {"tuned": within(*mean_and_error(self.nll_change))}}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per place in the text (and ``all``) with means over tokens; ``per="prompt"``: one row per token.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per == "prompt":
            return self._tokens()
        rows = []
        for name, here in self._places():
            kl = torch.where(here, self.kl, torch.nan)
            mean, error = mean_and_error(kl)
            there = kl[~kl.isnan()]
            row = {"kind": name, "tokens": len(there), "kl": mean, "kl_se": error}
            row |= {"kl_median": float(there.median()), "kl_max": float(there.max())}
            columns = {"reverse_kl": self.reverse_kl, "jsd": self.jsd, "nll_change": self.nll_change, "disagrees": self.disagrees}
            columns |= {f"nll_{s}": self.nll[i] for i, s in enumerate(SIDES)}
            columns |= {"entropy_change": self.entropy[1] - self.entropy[0]}
            rows.append(row | {k: float(v[here].nanmean()) for k, v in columns.items()})
        return pd.DataFrame(rows)

    def _places(self) -> list[tuple[str, Tensor]]:
        """Name and mask of every place that has tokens, and of all of them."""
        found = [(name, self.kind == i) for i, name in enumerate(self.kinds)]
        return [("all", self.kind >= 0), *((n, m) for n, m in found if m.any())]

    def _tokens(self) -> pd.DataFrame:
        import pandas as pd

        prompt, pos = (self.ids >= 0).nonzero(as_tuple=True)
        columns: dict[str, object] = {"prompt": prompt.numpy(), "pos": pos.numpy()}
        columns["token"] = [self.vocabulary[int(i)] for i in self.ids[prompt, pos]]
        columns["kind"] = [self.kinds[int(i)] for i in self.kind[prompt, pos]]
        flat = {"kl": self.kl, "reverse_kl": self.reverse_kl, "jsd": self.jsd}
        for i, side in enumerate(SIDES):
            flat |= {f"nll_{side}": self.nll[i], f"rank_{side}": self.rank[i], f"entropy_{side}": self.entropy[i]}
        columns |= {k: v[prompt, pos].numpy() for k, v in flat.items()}
        columns |= {f"top_{s}": [self.vocabulary[int(t)] for t in self.top[i][prompt, pos]] for i, s in enumerate(SIDES)}
        return pd.DataFrame(columns)

    def plot(self) -> go.Figure:
        """Divergence by position, mean over prompts with an interval of two standard errors."""
        there = (~self.kl.isnan()).sum(0)
        width = max(1, int((there >= min(3, len(self.kl))).sum()))
        series = {"KL(tuned || base)": self.kl, "KL(base || tuned)": self.reverse_kl, "JSD": self.jsd}
        means = {k: v[:, :width].nanmean(0) for k, v in series.items()}
        errors = {k: _spread(v[:, :width]) for k, v in series.items()}
        return plots.lines(
            means,
            bands={k: (means[k] - 2 * errors[k], means[k] + 2 * errors[k]) for k in series},
            title="Divergence of the next-token predictions by position",
            xlabel="index of the token after which is predicted",
            ylabel="nats, mean over prompts +- 2 s.e.",
            floor=self.numerical_floor,
        )

    def figures(self) -> dict[str, go.Figure]:
        """By position, by place in the text, and the distribution over tokens beside that of the floor."""
        return {"By position": self.plot(), "By place in the text": self._by_place(), "Distribution over tokens": self._distribution()}

    def _by_place(self) -> go.Figure:
        table = self.to_frame()
        errors = table.kl_se.astype(float).fillna(0.0)
        return plots.bars(
            [f"{k} (n={n})" for k, n in zip(table.kind, table.tokens, strict=True)],
            {"KL(tuned || base)": table.kl},
            intervals={"KL(tuned || base)": (table.kl - 2 * errors, table.kl + 2 * errors)},
            title="Divergence by the place of the predicted token",
            ylabel="KL(tuned || base), nats, mean +- 2 s.e.",
            floor=self.numerical_floor,
        )

    def _distribution(self) -> go.Figure:
        kl, floor = self.kl[~self.kl.isnan()], self.floor.flatten()
        grid = torch.linspace(-12.0, 1.5, 136, dtype=torch.float64)

        def above(values: Tensor) -> Tensor:
            ranked = values.double().clamp_min(1e-300).log10().sort().values
            return 1 - torch.searchsorted(ranked, grid) / len(ranked)

        return plots.lines(
            {"tuned against base": above(kl), "a model against itself": above(floor)},
            grid,
            title="Share of tokens with at least this divergence",
            xlabel="log10 of KL(tuned || base) in nats",
            ylabel="share of tokens",
        )

    def html(self) -> str:
        """The prompts that differ most with their tokens coloured by the KL of the prediction of that token, and the largest cells."""
        order = self.prompt_kl.nan_to_num(-1.0).argsort(descending=True)[:_SHOWN_PROMPTS].tolist()
        tokens = self.kl[~self.kl.isnan()]
        top = max(float(tokens.sort().values[int(0.99 * (len(tokens) - 1))]), self.numerical_floor)
        pieces = []
        for row in order:
            n = int((self.ids[row] >= 0).sum())
            words = [*(self.vocabulary[int(i)] for i in self.ids[row, :n]), "▸"]
            values = torch.cat([torch.full((1,), torch.nan), self.kl[row, :n]])
            title = f"Prompt {row}: mean KL {float(self.prompt_kl[row]):.3g} nats"
            pieces.append(
                plots.coloured_tokens(
                    words,
                    values,
                    difference=False,
                    limits=(0.0, top),
                    floor=self.numerical_floor,
                    unit="nats: KL(tuned || base) of the prediction of this token",
                    title=title,
                )
            )
        return "".join([*pieces, self._largest()])

    def _largest(self) -> str:
        flat = self.kl.nan_to_num(-1.0).flatten()
        cells = flat.argsort(descending=True)[: min(_SHOWN_TOKENS, int((flat >= 0).sum()))].tolist()
        head = "".join(f"<th>{h}</th>" for h in ("prompt", "context", "actual", "base says", "tuned says", "KL, nats"))
        rows = []
        for cell in cells:
            row, pos = divmod(cell, self.kl.shape[1])
            context = "".join(plots.visible(self.vocabulary[int(i)]) for i in self.ids[row, max(0, pos - 7) : pos + 1])
            after = int(self.ids[row, pos + 1]) if pos + 1 < self.ids.shape[1] else -1
            said = [
                plots.visible(self.vocabulary[i]) if i >= 0 else "" for i in (after, int(self.top[0, row, pos]), int(self.top[1, row, pos]))
            ]
            cells_html = [str(row), f"<code>{context}</code>", *(f"<code>{s}</code>" for s in said), f"{float(self.kl[row, pos]):.3g}"]
            rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells_html) + "</tr>")
        return f"<h4>Where the predictions differ most</h4><table><tr>{head}</tr>{''.join(rows)}</table>"


@analysis(version=1)
def token_divergence(pair: ModelPair, prompts: Prompts, *, first: int = 10) -> TokenDivergenceResult:
    """How differently do the two models predict each token of the same texts?

    Both models read identical token ids (teacher forcing) and their predictions are compared over the whole
    shared vocabulary at temperature 1: KL both ways, Jensen-Shannon divergence, the change of the actual
    token's negative log-likelihood and rank, of the entropy, and whether the most likely token differs.
    Chat tuning differs most on the first tokens of a response, so means are split by place (Minder et al. 2025,
    arXiv 2504.02922). Memory stays bounded: only the final residual stream is kept, and unembedded in chunks of
    tokens in fp32. The floor is each model against itself: prompts
    run alone and in a batch, and half precision against the same weights computed in float32.

    Args:
        pair: the two models.
        prompts: texts. A position ``response`` says where the response starts, ``template`` which tokens are template.
        first: how many predicted tokens, from the response or the text on, count as the first.

    Raises:
        InputError: ``first`` is not positive, the prompts are pairs or do not fit the models, or these are loaded one at a time.
    """
    if pair.one_at_a_time:
        raise InputError("token_divergence needs both models at once, but the pair is loaded one at a time")
    if first < 1:
        raise InputError(f"first must be at least 1, but it is {first}")
    if isinstance(prompts, PromptPairs):
        raise InputError("token_divergence reads one text at a time; give the clean or the corrupt prompts of the pairs")
    batch = pair.batch(prompts)
    shape = tuple(batch.ids.shape)
    mask = batch.mask.cpu()
    ids = torch.where(mask, batch.ids.cpu(), -1)
    single = {k: torch.full(shape, torch.nan) for k in ("kl", "reverse_kl", "jsd")}
    double = {k: torch.full((2, *shape), torch.nan) for k in ("nll", "rank", "entropy")}
    top = torch.full((2, *shape), -1, dtype=torch.long)
    groups = list(_groups(batch))
    for rows in progress(groups, "token divergence"):
        part = batch.select(rows)
        where = part.mask.cpu().nonzero(as_tuple=True)
        at = (torch.tensor(rows)[where[0]], where[1])
        after = torch.cat([ids, torch.full((len(ids), 1), -1)], 1)[at[0], at[1] + 1]
        for piece, found in _compared(pair, part, after):
            to = (at[0][piece], at[1][piece])
            for name, values in found.items():
                if name in single:
                    single[name][to] = values
                else:
                    (top if name == "top" else double[name])[:, to[0], to[1]] = values
    kind, kinds = _kinds(batch, first)
    floors = [_self_divergence(model, batch) for _, model in pair.sides()]
    known = [i for i in torch.cat([ids.flatten(), top.flatten()]).unique().tolist() if i >= 0]
    return TokenDivergenceResult(
        **single,
        **double,
        top=top,
        ids=ids,
        kind=kind,
        floor=torch.stack([values for values, _ in floors]),
        half=any(lacking for _, lacking in floors),
        kinds=kinds,
        vocabulary=dict(zip(known, spelled(pair.base, known), strict=True)),
        shared=pair.shared_vocab,
        labels={"side": SIDES},
    )


def divergences(base: Float[Tensor, "token vocab"], tuned: Float[Tensor, "token vocab"], after: Int[Tensor, " token"]) -> dict[str, Tensor]:
    """All the comparisons of two predictions.

    Args:
        base: logits of the base model.
        tuned: logits of the tuned model.
        after: the actual next token, -1 where there is none or the logits do not cover it.

    Returns:
        ``kl``, ``reverse_kl`` and ``jsd`` [token]; ``nll``, ``rank``, ``entropy`` and ``top`` [side token].
    """
    logits = torch.stack([base, tuned]).float()
    logp = logits.log_softmax(-1)
    middle = torch.logaddexp(logp[0], logp[1]) - torch.log(torch.tensor(2.0))
    known = (after >= 0) & (after < logits.shape[-1])
    actual = torch.where(known, after, 0).expand(2, -1)[..., None]
    rank = 1 + (logits > logits.gather(-1, actual)).sum(-1)
    p = logp.exp()
    return {
        "kl": kl_divergence(logp[1], logp[0]),
        "reverse_kl": kl_divergence(logp[0], logp[1]),
        "jsd": (kl_divergence(logp[0], middle) + kl_divergence(logp[1], middle)) / 2,
        "nll": torch.where(known, -logp.gather(-1, actual)[..., 0], torch.nan),
        "rank": torch.where(known, rank.float(), torch.nan),
        "entropy": -torch.where(p == 0, 0.0, p * logp).sum(-1),
        "top": logits.argmax(-1),
    }


def mean_and_error(values: Float[Tensor, "prompt pos"]) -> tuple[float, float | None]:
    """Mean over all tokens that are not NaN, and its standard error with prompts as the independent units.

    Tokens of a prompt are not independent, so the error is that of a ratio of sums over prompts; None with
    fewer than two prompts.
    """
    there = ~values.isnan()
    count, total = there.sum(1).double(), torch.where(there, values, 0.0).double().sum(1)
    mean = float(total.sum() / count.sum())
    n = int((count > 0).sum())
    if n < 2:
        return mean, None
    return mean, float(((total - mean * count).square().sum() * n / (n - 1)).sqrt() / count.sum())


def _spread(values: Tensor) -> Tensor:
    """Standard error of the mean over prompts, per position; NaN for a single prompt."""
    n = (~values.isnan()).sum(0)
    centred = (values - values.nanmean(0)).nan_to_num(0.0)
    return (centred.square().sum(0) / (n - 1).clamp_min(1) / n).sqrt().masked_fill(n < 2, torch.nan)


def _groups(batch: Batch) -> Iterator[list[int]]:
    """Prompts of like length, together at most ``_TOKENS`` tokens (or one prompt)."""
    group: list[int] = []
    lengths = batch.lengths.tolist()
    for row in sorted(range(len(batch)), key=lambda r: -lengths[r]):
        if group and (len(group) + 1) * lengths[group[0]] > _TOKENS:
            yield group
            group = []
        group.append(row)
    yield group


def _final(model: HookedModel, batch: Batch) -> Float[Tensor, "token d_model"]:
    """The residual stream after the last block, of all real tokens in order."""
    site = Site("resid_post", model.shape.n_layers - 1)
    resid = model.capture(batch, [site])[site]
    return resid[batch.mask.to(resid.device)]


def _unembedded(model: HookedModel, resid: Float[Tensor, "token d_model"]) -> Float[Tensor, "token vocab"]:
    """Logits of final residual streams: every token stands as a prompt of one token whose blocks are skipped."""
    return model.run_on(model.shape.n_layers, resid[:, None], Batch.of([[0]] * len(resid)), at="END")


def _compared(pair: ModelPair, part: Batch, after: Tensor) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Comparisons of the real tokens of some prompts, in chunks that bound the memory."""
    finals = [_final(model, part) for _, model in pair.sides()]
    step = max(1, _CELLS // pair.shared_vocab)
    for start in range(0, len(after), step):
        piece = slice(start, start + step)
        base, tuned = (_unembedded(m, x[piece])[:, : pair.shared_vocab] for m, x in zip((pair.base, pair.tuned), finals, strict=True))
        found = divergences(base, tuned.to(base.device), after[piece].to(base.device))
        yield piece, {k: v.cpu() for k, v in found.items()}


def _self_divergence(model: HookedModel, batch: Batch) -> tuple[Float[Tensor, " floor_token"], bool]:
    """KL of a model against itself for some of the prompts, and whether its rounding in half precision could not be measured."""
    n = min(len(batch), _FLOOR_PROMPTS)
    rows = [i * len(batch) // n for i in range(n)]
    some = batch.select(rows)
    alone = torch.cat([_final(model, batch.select([row])) for row in rows])
    together = _final(model, some if n > 1 else batch.select([0, 0]))[: len(alone)]  # a single prompt stands twice there
    floor = _apart((model, alone), (model, together))
    if model.dtype.itemsize >= 4:
        return floor, False
    wide = model.in_dtype(torch.float32)
    if wide is None:
        return floor, True
    return torch.maximum(floor, _apart((model, alone), (wide, _final(wide, some)))), False


def _apart(one: tuple[HookedModel, Tensor], other: tuple[HookedModel, Tensor]) -> Float[Tensor, " floor_token"]:
    """KL between the predictions of two models from their final residual streams, [token d_model] each."""
    step = max(1, _CELLS // one[0].shape.d_vocab)
    found = []
    for start in range(0, len(one[1]), step):
        sides = (_unembedded(model, x[start : start + step]).float().log_softmax(-1) for model, x in (one, other))
        found.append(kl_divergence(*sides).cpu())
    return torch.cat(found)


def _kinds(batch: Batch, first: int) -> tuple[Int[Tensor, "prompt pos"], tuple[str, ...]]:
    """The place in the text of the token that each cell predicts."""
    names = [f"first {first}", "later"]
    kind = torch.full(tuple(batch.ids.shape), -1, dtype=torch.long)
    start = batch.at("response") if "response" in batch.positions else [(1,)] * len(batch)
    template = batch.at("template") if "template" in batch.positions else [()] * len(batch)
    names += ["prompt"] if "response" in batch.positions else []
    names += ["template"] if "template" in batch.positions else []
    for row, n in enumerate(batch.lengths.tolist()):
        for pos in range(n):
            since = pos + 1 - min(start[row], default=1)
            name = "template" if pos + 1 in template[row] else "prompt" if since < 0 else names[0] if since < first else "later"
            kind[row, pos] = names.index(name)
    return kind, tuple(names)
