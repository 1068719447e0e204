"""Norms of what base's blocks and tuning add to the stream, and how exact they are."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.contribution import Step, contributions, share
from interp.models.hooked import HookedModel
from interp.models.interventions import Part
from interp.models.loading import HALF, stored_dtype
from interp.models.pair import ModelPair
from interp.progress import progress
from interp.sites import Site

Norm = Literal["l1", "l2"]
_ORDER = {"l1": 1, "l2": 2}
_ROUNDED_PROMPTS = 8
_REPEATED = 4  # prompts that are run again for the numerical floor


def norm_of(x: Tensor, norm: Norm) -> Tensor:
    """Over the last axis."""
    return torch.linalg.vector_norm(x, _ORDER[norm], dim=-1, dtype=torch.float64)


def contribution_norms(
    pair: ModelPair, batch: Batch, scored: Int[Tensor, " prompt"], norm: Norm = "l1", *, stream: bool = False
) -> dict[str, Tensor]:
    """Norms of PTC (``pre_*``) and FTC (``tuning_*``), see ``contributions``; on the CPU.

    Args:
        pair: the models.
        batch: prompts.
        scored: one position per prompt.
        norm: which one.
        stream: read base's blocks from disk one at a time.

    Returns:
        ``pre_sum``, ``tuning_sum`` of the sums up to each layer at the scored position, [prompt layer]; ``*_layer`` of single layers
        there; ``*_whole`` of the sums at all positions up to it together; ``*_token`` of the sums over all layers at every position,
        [prompt pos], NaN at padding; ``closure``, the relative error of x_L = x_0 + PTC + FTC, [prompt]; ``final``, the stream
        leaving the last block at the scored position, [prompt d_model].

    Raises:
        InputError: no such norm, or as for ``contributions``.
    """
    if norm not in _ORDER:
        raise InputError(f"norm is {norm!r}, expected l1 or l2")
    out: dict[str, Tensor] = {}
    for part, tally in progress(contributions(pair, batch, lambda part: _Tally(part, scored, norm), stream=stream), "contributions"):
        for name, x in tally.found().items():
            if name not in out:
                shape = (len(batch), batch.ids.shape[1]) if name.endswith("_token") else (len(batch), *x.shape[1:])
                out[name] = torch.full(shape, torch.nan, dtype=x.dtype)
            out[name][(part.rows, *(slice(0, n) for n in x.shape[1:]))] = x
    return out


class _Tally:
    """Sums of PTC and FTC for the prompts of a pass, and the norms that are kept of them."""

    def __init__(self, part: Part, scored: Tensor, norm: Norm) -> None:
        self.mask: Tensor = part.batch.mask
        self.norm: Norm = norm
        self.at = scored[part.rows.to(scored.device)].to(self.mask.device)
        self.norms: dict[str, list[Tensor]] = {f"{a}_{b}": [] for a in ("pre", "tuning") for b in ("sum", "layer", "whole")}

    def add(self, step: Step) -> None:
        """Take one block."""
        if step.layer == 0:
            self.first, self.pre, self.tuning = step.entering, step.pre.clone(), step.tuning.clone()
            self.mask, self.at = self.mask.to(step.pre.device), self.at.to(step.pre.device)
            self.rows = torch.arange(len(self.at), device=step.pre.device)
            self.inside = torch.arange(self.mask.shape[1], device=step.pre.device) <= self.at[:, None]
        else:
            self.pre += step.pre
            self.tuning += step.tuning
        self.token = {"pre": self._norm(self.pre), "tuning": self._norm(self.tuning)}
        self.last = step.leaving
        for name, part in (("pre", step.pre), ("tuning", step.tuning)):
            token = self.token[name]
            self.norms[f"{name}_sum"].append(token[self.rows, self.at])
            self.norms[f"{name}_layer"].append(self._norm(part[self.rows, self.at]))
            self.norms[f"{name}_whole"].append(self._norm(torch.where(self.inside, token, 0.0)))

    def _norm(self, x: Tensor) -> Tensor:
        """Over the last axis; the norm of a matrix is the norm of its rows' norms."""
        return norm_of(x, self.norm)

    def found(self) -> dict[str, Tensor]:
        """Norms [prompt layer], [prompt pos] and [prompt], and the final stream at the position that is scored."""
        off = self._norm(self.last - (self.first + self.pre + self.tuning))
        closure = self._norm(off * self.mask) / self._norm(self._norm(self.last) * self.mask)
        per_token = {f"{k}_token": torch.where(self.mask, v, torch.nan) for k, v in self.token.items()}
        stacked = {k: torch.stack(v, 1) for k, v in self.norms.items()}
        kept = stacked | per_token | {"closure": closure, "final": self.last[self.rows, self.at]}
        return {k: v.cpu() for k, v in kept.items()}


def base_outputs(base: HookedModel, batch: Batch, scored: Tensor, final: Tensor, norm: Norm) -> dict[str, Tensor]:
    """Norms of base's own final stream, and of the tuned model's difference from it; NaN where base does not know a token."""
    found = {k: torch.full((len(batch),), torch.nan, dtype=torch.float64) for k in ("base_output", "output_change")}
    ids = torch.where(batch.mask, batch.ids, 0).amax(1)
    rows = [i for i, top in enumerate(ids.tolist()) if top < base.shape.d_vocab]
    if rows:
        at = {"scored": tuple((i,) for i in scored.tolist())}
        site = Site("resid_post", base.shape.n_layers - 1, position="scored")
        own = base.capture(Batch(batch.ids, batch.mask, at).select(rows), [site])[site].cpu().to(final.dtype)
        found["base_output"][rows] = norm_of(own, norm)
        found["output_change"][rows] = norm_of(final[rows] - own, norm)
    return found


def repeated(pair: ModelPair, batch: Batch, scored: Tensor, norm: Norm, found: dict[str, Tensor]) -> Float[Tensor, " tried"]:
    """How far TuCo of a few prompts moves when they run in a batch of another size; a single prompt stands twice in it."""
    n = _REPEATED if len(batch) > _REPEATED else 1
    rows = list(range(n)) if len(batch) > 1 else [0, 0]
    again = contribution_norms(pair, batch.select(rows), scored[rows], norm)
    both = [share(x["tuning_sum"][:n, -1], x["pre_sum"][:n, -1]) for x in (found, again)]
    return (both[0] - both[1]).abs()


def rounding(pair: ModelPair, batch: Batch, scored: Tensor, norm: Norm, *, measure: bool = True) -> Float[Tensor, " rounded"]:
    """TuCo that rounding alone gives in half precision: a model's blocks in it against the same weights in float32, on the same stream.

    Where the files hold more digits than were loaded, these are compared, so that the rounding of the weights counts.
    """
    half = next((m for m in (pair.base, pair.tuned) if m.dtype in HALF), None)
    if half is None:
        return torch.zeros(0, dtype=torch.float64)
    name, finer = str(half.dtype).removeprefix("torch."), None
    if measure and not half.active_edits:
        files = half.checkpoint if half.adapter is None else None
        if files is not None and stored_dtype(files).itemsize > half.dtype.itemsize:
            finer = HookedModel.load(files.path, dtype="float32", device=half.device)
        else:
            finer = half.in_dtype(torch.float32)
    if finer is None:
        warnings.warn(f"TuCo of models in {name} contains their rounding, which could not be measured here", stacklevel=3)
        return torch.zeros(0, dtype=torch.float64)
    rows = list(range(min(len(batch), _ROUNDED_PROMPTS)))
    alone = contribution_norms(ModelPair(finer, half), batch.select(rows), scored[rows], norm)
    found = share(alone["tuning_sum"][:, -1], alone["pre_sum"][:, -1])
    warnings.warn(
        f"TuCo of models in {name} contains their rounding, which alone gives {float(found.mean()):.2g}; float32 is finer", stacklevel=3
    )
    return found
