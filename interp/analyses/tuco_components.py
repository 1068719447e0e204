"""Which heads and MLPs make the contribution of tuning?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp import plots
from interp.errors import InputError
from interp.models.contribution import scored_position, share
from interp.models.norms import Norm, norm_of
from interp.models.parts import BlockParts, block_parts, obstacle_to_heads
from interp.progress import progress
from interp.prompts import PromptPairs, Prompts
from interp.prompts.asked import Form, as_chats
from interp.results import Result, analysis
from interp.stats import bootstrap, permutation, ratio_of_means, standard_error

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.models import ModelPair

KINDS = {
    "head": "heads",
    "attention": "attention",
    "attention bias": "biases of attention",
    "MLP": "MLPs' own weights",
    "MLP through attention": "MLPs, through what attention changed",
}

_ROUNDING = 1e-6  # a contribution below it is the rounding of a sum


@dataclass(frozen=True, eq=False)
class TucoComponentsResult(Result):
    """What each part of each block contributes to |FTC|, in its units, with a sign: all parts together make |FTC|.

    A part's contribution is its projection on the direction in which |FTC| grows: for l1 the signs of the summed FTC, for l2
    its unit vector. Negative: the part takes away what others add.

    Attributes:
        pre: |PTC| of the sum over layers at the position that is scored.
        tuning: |FTC| of the sum.
        head: what single heads add, tuned minus base on the same stream; None where heads have no result of their own.
        attention: all that attention adds: heads and biases.
        mlp: the MLP's own weights: both MLPs on what the tuned one reads.
        mlp_through: base's MLP on what attention's change makes of the stream; 0 where attention and MLP are parallel.
        closure: error of the sum over all parts, relative to |FTC|; 0 where FTC is 0.
        norm: ``l1`` or ``l2``.
        position: what is scored.
        draw_seed: of bootstrap and permutation test.
        notes: why heads are not told apart, if they are not.
    """

    pre: Float[Tensor, " prompt"]
    tuning: Float[Tensor, " prompt"]
    head: Float[Tensor, "prompt layer head"] | None
    attention: Float[Tensor, "prompt layer"]
    mlp: Float[Tensor, "prompt layer"]
    mlp_through: Float[Tensor, "prompt layer"]
    closure: Float[Tensor, " prompt"]
    norm: Norm
    position: str
    draw_seed: int
    notes: tuple[str, ...]

    @property
    def tuco(self) -> Float[Tensor, " prompt"]:
        """|FTC| / (|PTC| + |FTC|); 0 where both vanish."""
        return share(self.tuning, self.pre)

    @property
    def parts(self) -> list[tuple[str, str, int, int | None]]:
        """Name, kind, layer and head of every part, in the order of ``shares``."""
        layers = range(self.attention.shape[1])
        found: list[tuple[str, str, int, int | None]] = []
        if self.head is not None:
            found += [(f"L{i}H{h}", "head", i, h) for i in layers for h in range(self.head.shape[2])]
        rest = "attention" if self.head is None else "attention bias"
        return found + [(f"L{i} {kind}", kind, i, None) for kind in (rest, "MLP", "MLP through attention") for i in layers]

    @property
    def shares(self) -> Float[Tensor, "prompt part"]:
        """Each part's contribution to TuCo: |FTC| is split, |PTC| + |FTC| is what it is a share of; they sum to TuCo."""
        heads = [] if self.head is None else [self.head.flatten(1)]
        rest = self.attention if self.head is None else self.attention - self.head.sum(2)
        whole = (self.pre + self.tuning)[:, None]
        each = torch.cat([*heads, rest, self.mlp, self.mlp_through], 1)
        return torch.where(whole == 0, 0.0, each / torch.where(whole == 0, 1.0, whole))

    def by_kind(self) -> dict[str, Float[Tensor, " prompt"]]:
        """Contribution to TuCo of all heads, all MLPs and so on."""
        kinds = [kind for _, kind, _, _ in self.parts]
        return {k: self.shares[:, [i for i, kind in enumerate(kinds) if kind == k]].sum(1) for k in dict.fromkeys(kinds)}

    def summary(self) -> str:
        """The strongest part, and how TuCo divides among the kinds."""
        n, means = len(self.tuco), self.shares.mean(0)
        best = int(means.abs().argmax())
        found = bootstrap(self.shares[:, best], seed=self.draw_seed)
        interval = f" [{float(found.low):.3g}, {float(found.high):.3g}]" if n > 1 else ""
        parts = {KINDS[k]: float(v.mean()) for k, v in self.by_kind().items()}
        kinds = ", ".join(f"{k} {v if abs(v) > _ROUNDING else 0:.3g}" for k, v in parts.items())
        return (
            f"{self.parts[best][0]} contributes {float(means[best]):.3g}{interval} of a TuCo of {float(self.tuco.mean()):.3g}, "
            f"the most of all parts ({self.norm.upper()} norm, position {self.position}; {kinds}; n = {n} prompts; "
            f"{'; '.join([f'the parts miss the whole by at most {float(self.closure.max()):.1g} of it', *self.notes])})"
        )

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """One row per part with its mean contribution to TuCo; ``per="prompt"``: one row per prompt and part.

        ``p`` is that of a sign-flip test, ``p_adjusted`` corrected for all parts.

        Raises:
            InputError: ``per`` is something else.
        """
        import pandas as pd

        if per not in (None, "prompt"):
            raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
        index = [dict(zip(("part", "kind", "layer", "head"), p, strict=True)) for p in self.parts]
        if per:
            values = self.shares.tolist()
            return pd.DataFrame([{"prompt": i, **p, "effect": x} for i, row in enumerate(values) for p, x in zip(index, row, strict=True)])
        test = permutation(self.shares, seed=self.draw_seed)
        of_tuco = self._of_tuco()
        columns: dict[str, Any] = {"effect": self.shares.mean(0), "effect_se": standard_error(self.shares)}
        columns |= dict(zip(("of_tuco", "low", "high"), of_tuco, strict=True)) | {"p": test.p, "p_adjusted": test.adjusted}
        return pd.DataFrame([place | {k: float(v[i]) for k, v in columns.items()} for i, place in enumerate(index)])

    def _of_tuco(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each part's share of mean TuCo, with its interval; NaN where TuCo is 0."""
        if not bool(self.tuco.any()):
            nothing = torch.full_like(self.shares[0], torch.nan)
            return nothing, nothing, nothing
        found = ratio_of_means(self.shares, self.tuco, seed=self.draw_seed)
        return found.value, found.low, found.high

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """The parts that contribute most, of either sign."""
        table = self.to_frame()
        order = table.effect.abs().sort_values(ascending=False, kind="stable").index[:n]
        return table.loc[order].drop(columns=["kind", "layer", "head"]).reset_index(drop=True)

    def plot(self) -> go.Figure:
        """Contribution to TuCo of every part, by layer."""
        means = self.shares.mean(0)
        columns = list(dict.fromkeys(kind if head is None else f"H{head}" for _, kind, _, head in self.parts))
        cells = torch.full((self.attention.shape[1], len(columns)), torch.nan)
        for value, (_, kind, layer, head) in zip(means, self.parts, strict=True):
            cells[layer, columns.index(kind if head is None else f"H{head}")] = value
        return plots.heatmap(
            cells,
            columns,
            [f"L{i}" for i in range(len(cells))],
            title=f"What each part contributes to TuCo, mean over {len(self.tuco)} prompts",
            xlabel="part of the block",
            ylabel="layer",
            unit="TuCo",
            difference=True,
        )

    def figures(self) -> dict[str, go.Figure]:
        """By part, and by kind of part."""
        kinds = self.by_kind()
        found = {k: bootstrap(v, seed=self.draw_seed) for k, v in kinds.items()}
        bars = plots.bars(
            [KINDS[k] for k in kinds],
            {"contribution": [float(f.value) for f in found.values()]},
            intervals={"contribution": ([float(f.low) for f in found.values()], [float(f.high) for f in found.values()])},
            title="Which kinds of parts make TuCo",
            ylabel="contribution to TuCo, mean over prompts with 95 % interval",
            reference=float(self.tuco.mean()),
            reference_label="TuCo",
        )
        return {"By part": self.plot(), "By kind": bars}


@analysis(version=1)
def tuco_components(
    pair: ModelPair, prompts: Prompts, *, position: str = "last_prompt", norm: Norm = "l1", chat: Form = "given", seed: int = 0
) -> TucoComponentsResult:
    """Which heads and MLPs make the contribution of tuning?

    Our extension of TuCo (Nuti et al., ICML 2025, arXiv 2506.23423), which keeps blocks whole. On the tuned model's stream x both
    models' blocks run, A and M what attention and MLP add; a block's FTC is the sum of: per head, z @ W_O of the tuned model minus base's;
    the same for attention's biases; the MLP's own weights, M_tuned(x + A_tuned) - M_base(x + A_tuned); and base's
    MLP through attention, M_base(x + A_tuned) - M_base(x + A_base). Each part is projected on the direction of the summed FTC, so the
    parts of all layers sum to |FTC|, and over |PTC| + |FTC| to TuCo. Heads differ by their own weights only: they read
    the same stream in both models, so what an earlier layer changed counts there. Four block runs per layer where TuCo takes two.

    Args:
        pair: the two models; the tuned model's tokens are read.
        prompts: of any lengths. A position ``response`` in them says where an answer begins.
        position: what is scored: the last token before the answer, or a named position of one token.
        norm: ``l1`` as TuCo, or ``l2``.
        chat: prompts as ``given``, or each as a user's message in the tuned model's ``template`` or in ``plain`` lines.
        seed: of bootstrap and permutation test.

    Raises:
        InputError: a position that is unknown or several tokens, a pair that is loaded one at a time, prompts that do not fit the
            models, or blocks that are not the stream, attention and MLP added together.
    """
    if norm not in ("l1", "l2"):
        raise InputError(f"norm is {norm!r}, expected l1 or l2")
    if isinstance(prompts, PromptPairs):
        raise InputError("tuco_components reads one text at a time; give the clean or the corrupt prompts of the pairs")
    batch = pair.tuned.batch(as_chats(pair.tuned, prompts, chat))
    scored, _ = scored_position(batch, position)
    out: dict[str, Tensor] = {}
    for part, layers in progress(block_parts(pair, batch, scored), "tuco components"):
        for name, x in _projected(layers, norm).items():
            if name not in out:
                out[name] = torch.zeros(len(batch), *x.shape[1:], dtype=x.dtype)
            out[name][part.rows] = x.cpu()
    obstacle = obstacle_to_heads(pair)
    return TucoComponentsResult(
        pre=out["pre"],
        tuning=out["tuning"],
        head=out.get("head"),
        attention=out["attention"],
        mlp=out["mlp"],
        mlp_through=out["mlp_through"],
        closure=out["closure"],
        norm=norm,
        position=position,
        draw_seed=seed,
        notes=(f"heads are not told apart: {obstacle}",) if obstacle else (),
    )


def _projected(layers: list[BlockParts], norm: Norm) -> dict[str, Tensor]:
    """Contributions [prompt layer] of the parts to the norm of the summed FTC, and the two norms [prompt]."""
    pre, tuning = (torch.stack([getattr(x, name).double() for x in layers]).sum(0) for name in ("pre", "tuning"))
    whole = norm_of(tuning, norm)
    direction = tuning.sign() if norm == "l1" else tuning / whole.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    named = ("attention", "mlp", "mlp_through")
    found = {k: torch.stack([(getattr(x, k).double() * direction).sum(-1) for x in layers], 1) for k in named}
    heads = [x.heads for x in layers if x.heads is not None]
    if heads:
        found["head"] = torch.stack([torch.einsum("phd,pd->ph", x.double(), direction) for x in heads], 1)
    off = (found["attention"] + found["mlp"] + found["mlp_through"]).sum(1) - whole
    closure = torch.where(whole == 0, off.abs(), off.abs() / torch.where(whole == 0, 1.0, whole))
    return found | {"pre": norm_of(pre, norm), "tuning": whole, "closure": closure}
