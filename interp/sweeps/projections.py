"""What a direction of the residual stream is worth: the loss without it, and the other model with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.edits import ActivationChange, Edit
from interp.progress import progress
from interp.sites import Site
from interp.sweeps.language import pieces
from interp.sweeps.likelihood import log_probs, loss_and_kl, means
from interp.sweeps.mean_vectors import MeanVectors, random_directions

if TYPE_CHECKING:
    from interp.models.batch import Batch
    from interp.models.hooked import HookedModel
    from interp.models.pair import ModelPair

TAKEN, LEVEL, MEAN = "difference", "difference, to base's mean", "mean of base"
RANDOM, TEXTS = "random", "between texts"
Cell = tuple[int, int]


def without(site: Site, direction: Float[Tensor, " d_model"], level: Float[Tensor, " d_model"] | None = None) -> Edit:
    """The stream loses its component along a direction, at every position.

    Args:
        site: of the stream.
        direction: of any length but 0.
        level: a stream whose component along it takes the place of that; None leaves nothing.
    """
    unit = direction.double() / direction.double().norm()
    gone = ActivationChange(site, "project", unit.float())
    if level is None:
        return Edit((gone,))
    return Edit((gone, ActivationChange(site, "add", ((level.double() @ unit) * unit).float())))


def with_added(site: Site, vector: Float[Tensor, " d_model"]) -> Edit:
    """A vector is added to the stream at every position."""
    return Edit((ActivationChange(site, "add", vector.float()),))


def streams_changed(
    model: HookedModel, reference: HookedModel, batch: Batch, edits: Sequence[Edit], *, vocab: int
) -> Float[Tensor, "what edit prompt"]:
    """Mean loss of a model with its stream changed behind one block at a time, and KL(reference || that), as ``loss_and_kl`` has them.

    Blocks up to the change are run once for all edits.

    Args:
        model: whose stream is changed.
        reference: what it is compared with.
        batch: texts of at least two tokens.
        edits: changes of ``resid_post`` of one layer each, at all positions.
        vocab: token ids that are compared.
    """
    found = torch.full((2, len(edits), len(batch)), torch.nan, dtype=torch.float64)
    places = [edit.activations[0].site for edit in edits if isinstance(edit.activations[0], ActivationChange)]
    sites = list(dict.fromkeys(places))
    groups = list(pieces(batch, max(vocab, len(sites) * model.shape.d_model)))
    for rows in progress(groups, "directions", total=len(groups)):
        part = batch.select(rows)
        own = log_probs(reference.logits(part), vocab)
        streams = model.capture(part, sites)
        for i, (site, edit) in enumerate(zip(places, edits, strict=True)):
            stream = streams[site]
            for change in edit.activations:
                assert isinstance(change, ActivationChange)
                stream = change.apply(stream)
            logits = model.run_on((site.layer or 0) + 1, stream, part)
            found[:, i, rows] = means(own, log_probs(logits, vocab).to(own.device), part)
    return found


def judged_on_the_other_half(
    model: HookedModel,
    reference: HookedModel,
    batch: Batch,
    halves: Bool[Tensor, " prompt"],
    edits: Sequence[dict[Cell, Edit]],
    shape: Cell,
    *,
    vocab: int,
) -> Float[Tensor, "what way site prompt"]:
    """``streams_changed`` of edits made from each half of the prompts, on the prompts of the other; NaN where there is no edit.

    Args:
        model: whose stream is changed.
        reference: what it is compared with.
        batch: texts of at least two tokens.
        halves: which prompts the first half is.
        edits: of each half, by way and site.
        shape: how many ways and sites.
        vocab: token ids that are compared.
    """
    found = torch.full((2, *shape, len(batch)), torch.nan, dtype=torch.float64)
    for made, judged in zip(edits, (~halves, halves), strict=True):
        rows = judged.nonzero()[:, 0].tolist()
        if made and rows:
            part = streams_changed(model, reference, batch.select(rows), list(made.values()), vocab=vocab)
            for i, (way, site) in enumerate(made):
                found[:, way, site, rows] = part[:, i]
    return found


def effects(
    pair: ModelPair, batch: Batch, one: Tensor, vectors: MeanVectors, layers: Sequence[int], place: int, draws: int, seed: int
) -> dict[str, Tensor]:
    """Loss and KL without directions and with them; NaN for prompts of one token, which have nothing to predict."""
    n = len(batch)
    found = {
        "loss": torch.full((3 + 2 * draws, len(layers), n), torch.nan, dtype=torch.float64),
        "kl": torch.full((3 + 2 * draws, len(layers), n), torch.nan, dtype=torch.float64),
        "own_loss": torch.full((2, n), torch.nan, dtype=torch.float64),
        "own_kl": torch.full((n,), torch.nan, dtype=torch.float64),
        "added_kl": torch.full((1 + draws, len(layers), n), torch.nan, dtype=torch.float64),
    }
    rows = (batch.lengths.cpu() > 1).nonzero()[:, 0].tolist()
    if not layers or not rows:
        return found
    some, one = batch.select(rows), one[rows]
    own = loss_and_kl(pair.tuned, some, [pair.base, None], vocab=pair.shared_vocab)
    found["own_loss"][:, rows], found["own_kl"][rows] = own[0], own[1, 0]
    if bool(one.all()) or not bool(one.any()):
        return found
    at, sites = [layer + 1 for layer in layers], [Site("resid_post", layer) for layer in layers]
    shifts, means = (x[:, at, place].nan_to_num(0.0) for x in (vectors.halves, vectors.base_halves))
    texts = vectors.between[:draws, at, place]
    size = texts.norm(dim=-1, keepdim=True)  # of few texts all may get the same sign, and nothing but rounding is left
    texts = torch.where(size > 1e-9 * vectors.base[at, place].norm(dim=-1, keepdim=True), texts, 0.0)
    projected: list[dict[tuple[int, int], Edit]] = []
    added: list[dict[tuple[int, int], Edit]] = []
    for shift, mean in zip(shifts, means, strict=True):
        projected.append({})
        added.append({})
        for i, site in enumerate(sites):
            if not bool(shift[i].norm() > 0):
                continue  # where there is no difference, there is nothing to compare with
            random = random_directions(seed, (RANDOM, str(site)), draws, len(shift[i]))
            directions = [shift[i], shift[i], mean[i], *random, *texts[:, i]]
            edits = [without(site, v, mean[i] if w == 1 else None) if bool(v.norm() > 0) else None for w, v in enumerate(directions)]
            projected[-1] |= {(w, i): edit for w, edit in enumerate(edits) if edit is not None}
            same = [shift[i], *(x / x.norm().clamp_min(1e-30) * shift[i].norm() for x in texts[:, i])]
            added[-1] |= {(w, i): with_added(site, v) for w, v in enumerate(same) if bool(v.norm() > 0)}
    more = {"vocab": pair.shared_vocab}
    both = judged_on_the_other_half(pair.tuned, pair.tuned, some, one, projected, (3 + 2 * draws, len(layers)), **more)
    found["loss"][..., rows], found["kl"][..., rows] = both
    found["added_kl"][..., rows] = judged_on_the_other_half(pair.base, pair.tuned, some, one, added, (1 + draws, len(layers)), **more)[1]
    return found
