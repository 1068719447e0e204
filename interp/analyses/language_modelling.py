"""How well does a model predict running text, and does tuning keep the order of its predictions?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.models.batch import Batch
from interp.prompts import PromptPairs, Prompts
from interp.results import Result, analysis
from interp.stats import Estimate, bootstrap, ratio_of_means
from interp.sweeps import language

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import HookedModel, ModelPair


@dataclass(frozen=True, eq=False)
class LanguageModellingResult(Result):
    """Loss on blocks of text, and of a pair the agreement of the rankings of next tokens.

    Attributes:
        loss: mean negative log-likelihood of the predicted tokens of a block, nats.
        tokens: predicted tokens of each block: all but its first.
        ndcg: agreement of tuned's most likely tokens with base's, mean over the positions of a block; NaN for one model.
        k: how many tokens are ranked.
        group: blocks whose losses are averaged before the exponential, in ``mean_block_perplexity``.
        seed: of the resampling of blocks.
        labels: of the axis side.
    """

    loss: Float[Tensor, "side block"]
    tokens: Int[Tensor, " block"]
    ndcg: Float[Tensor, " block"]
    k: int
    group: int
    seed: int
    labels: dict[str, tuple[str, ...]]

    @property
    def sides(self) -> tuple[str, ...]:
        """``model``, or ``base`` and ``tuned``."""
        return self.labels["side"]

    @property
    def perplexity(self) -> Float[Tensor, " side"]:
        """The exponential of the mean loss of all predicted tokens."""
        return language.perplexity(self.loss, self.tokens)

    @property
    def mean_block_perplexity(self) -> Float[Tensor, " side"]:
        """Mean over blocks (groups of them) of exp of their loss: another number, which some papers call perplexity too."""
        return language.mean_block_perplexity(self.loss, self.group)

    def interval(self, side: int) -> Estimate:
        """``perplexity`` of a side with its 95 % interval over blocks."""
        return _exp(ratio_of_means(self.loss[side] * self.tokens, self.tokens, seed=self.seed))

    @property
    def ratio(self) -> Estimate:
        """``perplexity`` of tuned over that of base, over all tokens of the same blocks.

        Raises:
            InputError: there is only one model.
        """
        if len(self.sides) == 1:
            raise InputError("one model has no ratio of perplexities; give a pair")
        return _exp(ratio_of_means((self.loss[1] - self.loss[0]) * self.tokens, self.tokens, seed=self.seed))

    @property
    def agreement(self) -> Estimate:
        """``ndcg``, mean over blocks."""
        return bootstrap(self.ndcg, seed=self.seed)

    def summary(self) -> str:
        """Perplexities by both rules, their ratio, the agreement of the rankings."""
        n, ends = len(self.tokens), " -> ".join(str(self.interval(i)) for i in range(len(self.sides)))
        other = " -> ".join(f"{float(p):.3g}" for p in self.mean_block_perplexity)
        per = "block" if self.group == 1 else f"group of {self.group} blocks"
        told = (
            f"Perplexity {ends} (exp of the mean loss over {int(self.tokens.sum())} tokens; mean over {n} blocks of exp per {per}: {other})"
        )
        if len(self.sides) == 1:
            return told
        return f"{told}, ratio over tokens {self.ratio}; nDCG@{self.k} of tuned's predictions against base's {self.agreement}"

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """Perplexities of both models."""
        sides = ("base", "tuned") if len(self.sides) == 2 else ("tuned",)
        return {"perplexity over all tokens": {side: self.interval(i) for i, side in enumerate(sides)}}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per side; ``per="prompt"``: one per block.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        if per:
            columns = {f"loss_{side}": self.loss[i].tolist() for i, side in enumerate(self.sides)}
            return pd.DataFrame({"block": range(len(self.tokens)), "tokens": self.tokens.tolist(), **columns, "ndcg": self.ndcg.tolist()})
        rows = []
        for i, side in enumerate(self.sides):
            e = self.interval(i)
            row = {"side": side, "blocks": len(self.tokens), "tokens": int(self.tokens.sum())}
            row |= {"perplexity": float(e.value), "low": float(e.low), "high": float(e.high)}
            row |= {"mean_block_perplexity": float(self.mean_block_perplexity[i])}
            rows.append(row | {"ndcg": float(self.agreement.value) if side == "tuned" else torch.nan})
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Of a pair the loss of every block in both models; of one model its distribution."""
        if len(self.sides) == 2:
            return plots.scatter(
                self.loss[0],
                self.loss[1],
                labels=[f"block {i}" for i in range(len(self.tokens))],
                title="Loss of every block of text",
                xlabel="base, nats per token",
                ylabel="tuned, nats per token",
                diagonal=True,
            )
        ranked = self.loss.sort(dim=1).values
        return plots.lines(
            {side: ranked[i] for i, side in enumerate(self.sides)},
            title="Loss of the blocks of text, in order",
            xlabel="block",
            ylabel="nats per token",
        )


@analysis(version=1)
def language_modelling(
    model: HookedModel | ModelPair, prompts: Prompts, *, block: int = 0, group: int = 1, k: int = 10, seed: int = 0
) -> LanguageModellingResult:
    """How well does a model predict running text, and how far do two models rank the next tokens alike?

    Perplexity comes in two forms that differ, each under its name: ``perplexity`` is exp of the mean loss of all tokens,
    ``mean_block_perplexity`` the mean over blocks of exp of a block's loss. Of a pair, nDCG@k compares the k most likely next tokens of
    tuned with those of base at every position: 1 is the same order, 0 no token in common, and a token gains the more the higher base
    ranks it (Merullo et al. 2025, arXiv 2510.24256). An edited model is compared with itself by a pair of two copies, the second
    within ``with second.edited(edit)``.

    Args:
        model: a model, or a pair to compare.
        prompts: running text.
        block: the texts are put behind each other and cut every so many tokens; 0: every text is a block.
        group: blocks that go into one exponential of ``mean_block_perplexity``.
        k: how many tokens are ranked.
        seed: of the resampling of blocks.

    Raises:
        InputError: texts without a next token, a block of fewer than 2 tokens, a pair loaded one at a time, pairs of prompts, more
            tokens to rank than there are, or what is neither model nor prompts.
    """
    if not hasattr(model, "sides"):
        came = f"{model!r}" if isinstance(model, str) else f"a {type(model).__name__}"
        raise InputError(f"language_modelling takes a model, which HookedModel.load returns, or a ModelPair, but {came} came")
    if isinstance(prompts, PromptPairs):
        raise InputError("language_modelling reads one text at a time; give the clean or the corrupt prompts of the pairs")
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise InputError(f"group is a number of blocks, from 1; got {group!r}")
    if getattr(model, "one_at_a_time", False):
        raise InputError("language_modelling needs both models at once, but the pair is loaded one at a time")
    if not isinstance(prompts, Iterable | Batch) and not hasattr(prompts, "batch"):
        raise InputError(f"language_modelling reads Prompts, such as a task generates, not {prompts!r}")
    sides = dict(model.sides())
    vocab = getattr(model, "shared_vocab", min(one.shape.d_vocab for one in sides.values()))
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocab:
        raise InputError(f"k is the number of tokens ranked, 1 to {vocab}; got {k!r}")
    batch = model.batch(language.blocks(model.batch(prompts), block))
    loss = torch.stack([language.block_losses(one, batch) for one in sides.values()])
    ndcg = torch.full((len(batch),), torch.nan, dtype=torch.float64)
    if len(sides) == 2:
        base, tuned = (one.logits for one in sides.values())
        ndcg = language.rankings_agree(base, [tuned], batch, vocab, k)[0]
    return LanguageModellingResult(
        loss=loss, tokens=batch.lengths.cpu() - 1, ndcg=ndcg, k=k, group=group, seed=seed, labels={"side": tuple(sides)}
    )


def _exp(e: Estimate) -> Estimate:
    return Estimate(e.value.exp(), e.low.exp(), e.high.exp())
