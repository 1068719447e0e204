"""Many interventions on the same prompts: the engine under every patching analysis.

The plain way, one forward of the model per patch. Every patch is then computed in the same shape as
the run it is compared with, so that a patch that changes nothing gives exactly the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.metrics import Reader
from interp.progress import progress
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

Patch = tuple[Site, ...]
"""Sites that are set together in one run."""


def run(model: HookedModel, batch: Batch, reader: Reader) -> Float[Tensor, " prompt"]:
    """The metric of a run without a patch."""
    return reader(model.logits(batch, at=reader.position)).cpu()


def sweep(
    model: HookedModel,
    batch: Batch,
    patches: Sequence[Patch | Site],
    source: tuple[HookedModel, Batch],
    reader: Reader,
    *,
    desc: str = "patches",
) -> Float[Tensor, "patch prompt"]:
    """The metric of one run per patch, with the sites of the patch set to their values in a source run.

    Row ``i`` of ``source`` is the partner of row ``i`` of ``batch``. A named position is looked up in each
    of the two batches, so the prompts of a pair may differ in length; a site without a position sets all
    positions and needs partners of one length.

    Args:
        model: the model that is run and patched.
        batch: its prompts.
        patches: what to set, per run. A single site is a patch of one.
        source: the model and the prompts the values come from: other prompts in the same model, the
            same prompts in another model, or both.
        reader: the metric, bound to the prompts.
        desc: of the progress bar.

    Returns:
        The metric of every run, in the order of ``patches``.

    Raises:
        InputError: the batches do not pair up, a position is unknown or not one token, or a site cannot be patched.
    """
    donor, donor_batch = source
    todo = [(p,) if isinstance(p, Site) else tuple(p) for p in patches]
    check([s for p in todo for s in p], batch, donor_batch)
    out = torch.empty(len(todo), len(batch))
    held: dict[Site, Tensor] = {}
    for i, patch in enumerate(progress(todo, desc)):
        wanted = {Site(s.component, s.layer) for s in patch}
        if not wanted <= held.keys():  # neighbours in the list mostly share a layer: hold that layer only
            held = donor.capture(donor_batch, sorted(wanted, key=str))
        with model.patched({s: cut(held[Site(s.component, s.layer)], s, donor_batch) for s in patch}):
            out[i] = run(model, batch, reader)
    return out


def cut(values: Tensor, site: Site, batch: Batch) -> Tensor:
    """What a site with a head or a position is of its layer's activations, [prompt pos ...]."""
    if site.head is not None:
        values = values[:, :, site.head]
    if site.position is not None:
        values = values[torch.arange(len(values), device=values.device), batch.index(site.position).to(values.device)]
    return values


def check(sites: Iterable[Site], batch: Batch, donor: Batch) -> None:
    """Check that sites can be patched from one batch into another, before anything is run.

    Raises:
        InputError: the batches do not pair up, a position is unknown or not one token, or a site has no token axis.
    """
    if len(batch) != len(donor):
        raise InputError(f"a patch needs a source prompt for every prompt; there are {len(batch)} prompts and {len(donor)} sources")
    uneven = (batch.lengths.cpu() != donor.lengths.cpu()).nonzero().flatten().tolist()
    for site in dict.fromkeys(sites):
        if site.is_weight or site.component in ("pattern", "svd"):
            raise InputError(f"{site} cannot be patched from another run: only activations with a token axis can, such as L3.resid_pre@END")
        if site.position is not None:
            batch.index(site.position)
            donor.index(site.position)
        elif uneven:
            lengths = f"{int(batch.lengths[uneven[0]])} and {int(donor.lengths[uneven[0]])}"
            raise InputError(
                f"{site} sets every position, so both prompts of a pair need one length; in pair {uneven[0]} they have {lengths} tokens; "
                f"name a position, as in {site}@END"
            )


def floor(model: HookedModel, batch: Batch, reader: Reader) -> float:
    """Largest change of the metric when the same prompts run in batches of another size: what rounding alone does."""
    whole, worst = run(model, batch, reader), 0.0
    rows = range(len(batch))
    for part in [rows[::2], rows[1::2]] if len(rows) > 1 else [[0, 0]]:
        part = list(part)
        worst = max(worst, float((run(model, batch.select(part), reader[part]) - whole[part]).abs().max()))
    return worst
