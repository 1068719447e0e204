"""Batched steering against one edited run per way and prompt, and against plain Hugging Face models with hooks written by hand."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from plain_hooks import _parts, hooked, seen
from tiny_checkpoints import FOUR, tiny
from torch import Tensor

from interp.edits import ActivationChange, ChannelChange, Edit
from interp.errors import InputError
from interp.models import Batch, HookedModel
from interp.models.heads import component
from interp.models.steered import Channels, Look, Steered, Ways
from interp.sites import Site

ROWS = [[3, 9, 4, 1, 5], [2, 7, 8], [6, 5, 3, 5, 8, 9, 7], [4, 4, 1, 2], [7, 7, 2, 9, 1]]
ONE = ((2,), (1,), (4,), (1,), (3,))
KEYS = ((1,), (0,), (2,), (0,), (1,))
BATCH = Batch.of(ROWS, {"ONE": ONE, "KEY": KEYS})
CHANNELS = ("L0H1.1@ONE", "L0H1.3@ONE", "L0H3.0@END", "L1H2.2@END", "L1H2.4@END", "L1H0.1@ONE")
HEADS = ((1, 3), (2, 0), (2, 2))


def near(got: Tensor, want: Tensor, times: float = 16) -> None:
    assert (got - want).abs().max() <= times * torch.finfo(torch.float32).eps * max(1.0, float(want.abs().max()))


@pytest.fixture(scope="module", params=FOUR)
def both(request: Any) -> tuple[Any, HookedModel]:
    plain = cast("Any", tiny(request.param, seed=2))
    plain.set_attn_implementation("eager")
    return plain, HookedModel.load(plain)


def channels(model: HookedModel, texts: tuple[str, ...] = CHANNELS) -> tuple[list[Site], Channels]:
    sites = [Site.parse(t) for t in texts]
    directions = torch.stack([component(model, s.at(None))[2] for s in sites])
    where = torch.stack([BATCH.index(s.position) for s in sites])  # type: ignore[arg-type]
    return sites, Channels(tuple((s.layer or 0, s.head or 0) for s in sites), directions, where)


def look() -> Look:
    first = torch.zeros_like(BATCH.mask)
    first[:, 0] = True
    named = torch.zeros_like(BATCH.mask)
    for row, (key,) in enumerate(KEYS):
        named[row, key] = True
    return Look(HEADS, torch.stack([named, BATCH.mask & ~first]))


def ways(n: int = 7) -> Ways:
    draws = torch.Generator().manual_seed(3)
    gain = torch.randint(0, 3, (n, len(CHANNELS)), generator=draws).double()
    to = torch.randn(n, len(CHANNELS), generator=draws).double() * 2
    to[torch.rand(to.shape, generator=draws) < 0.3] = 0.0
    gain[0], to[0] = 1.0, 0.0  # nothing at all
    gain[1, :3], to[1, :3] = 1.0, 0.0  # the first layer is left alone
    return Ways(gain, to)


def judge(logits: Tensor, prompts: Tensor) -> Tensor:
    return logits[:, 3:9] + prompts[:, None]


def found(steered: Steered, of: Ways) -> tuple[Tensor, Tensor]:
    n = len(BATCH)
    paid, told = torch.full((len(of), n, len(HEADS), 2), torch.nan), torch.full((len(of), n, 6), torch.nan)
    for way, prompt, attention, judged in steered(of, judge):
        assert judged is not None
        paid[way, prompt], told[way, prompt] = attention, judged
    return paid, told


def edits(sites: list[Site], directions: Tensor, of: Ways, way: int, receivers: tuple[Site, ...]) -> Edit:
    gain, to = of.gain[way], of.to[way]
    heads = [Site("result", s.layer, s.head, s.position) for s in sites]
    if receivers:
        return Edit((ChannelChange(tuple(heads), directions, tuple(gain.tolist()), tuple(to.tolist()), receivers),))
    changes = []
    for head, v, g, t in zip(heads, directions, gain.tolist(), to.tolist(), strict=True):
        changes += [ActivationChange(head, "project", v, strength=1 - g), ActivationChange(head, "add", t * v)]
    return Edit(tuple(changes))


@pytest.mark.parametrize("receivers", [(), (Site("q", 2, 0), Site("k", 2, 1), Site("v", 2, 0), Site("q", 2, 2))])
def test_every_row_is_an_edited_run(both: tuple[Any, HookedModel], receivers: tuple[Site, ...]) -> None:
    _, model = both
    sites, some = channels(model)
    steered, of = Steered(model, BATCH, some, look(), receivers), ways()
    assert not steered.allowed.obstacle
    paid, told = found(steered, of)
    keys = look().keys.float()
    for way in range(len(of)):
        with model.edited(edits(sites, some.directions, of, way, receivers)):
            patterns = model.capture(BATCH, [Site("pattern", layer, head, "END") for layer, head in HEADS])
            near(told[way], judge(model.logits(BATCH, at="END"), torch.arange(len(BATCH))))
        near(paid[way], torch.stack([torch.einsum("pk,tpk->pt", x, keys) for x in patterns.values()], 1))
    way, prompt = torch.cartesian_prod(torch.arange(len(of)), torch.arange(len(BATCH))).T
    again, judged = steered.plain(of, way, prompt, judge)
    near(again.unflatten(0, (len(of), -1)), paid)
    assert judged is not None
    near(judged.unflatten(0, (len(of), -1)), told)
    assert (paid[0] - paid[2]).abs().max() > (1e-3 if receivers else 1e-2) and not model._active
    # Attention alone needs no logits, and no layer behind the last mover.
    for way, prompt, attention, judged in steered(of):
        near(attention, paid[way, prompt])
        assert judged is None


def test_a_row_is_a_plain_run_with_hooks_by_hand(both: tuple[Any, HookedModel]) -> None:
    hf, model = both
    _, some = channels(model, ("L0H1.1@ONE", "L1H2.2@END"))
    of = Ways(torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[4.0, -3.0]]).double())
    (got,) = [told for _, _, _, told in _ordered(Steered(model, BATCH, some, look()), of)]
    for row, ids in enumerate(ROWS):
        writes: dict[int, Any] = {}
        for layer, head, where, v, gain, to in (
            (0, 1, ONE[row][0], some.directions[0].float(), 0.0, 4.0),
            (1, 2, len(ids) - 1, some.directions[1].float(), 2.0, -3.0),
        ):
            out = _parts(hf, layer)[2]
            matrix = (out.weight if hasattr(hf, "transformer") else out.weight.T).detach().unflatten(0, (4, -1))[head]

            def add(x: Tensor, at: Any) -> None:
                x[at[0]] += at[1]

            with torch.no_grad(), hooked(hf, "attn_out", 0, lambda x: add(x, writes[0]) if 0 in writes else None):  # noqa: B023
                z = seen(hf, ids, [("z", layer)])["z", layer][where, head]
            c = z @ matrix @ v
            writes[layer] = (where, ((gain - 1) * c + to) * v)
        with torch.no_grad(), ExitStack() as stack:
            for layer in writes:
                stack.enter_context(hooked(hf, "attn_out", layer, lambda x, at=writes[layer]: add(x, at)))
            want = hf(torch.tensor([ids]), use_cache=False).logits[0, -1, 3:9] + row
        near(got[row], want)


def _ordered(steered: Steered, of: Ways) -> list[tuple[None, None, None, Tensor]]:
    return [(None, None, None, found(steered, of)[1][0])]


def test_without_going_on_every_run_is_whole(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    _, some = channels(model)
    fast, slow = Steered(model, BATCH, some, look()), Steered(model, BATCH, some, look())
    slow.allowed = type(slow.allowed)("a test says so")
    for a, b in zip(found(fast, ways()), found(slow, ways()), strict=True):
        near(a, b)
    with model.patched({"L0H2.z@END": torch.ones(())}):  # activations that are changed meanwhile count
        other = Steered(model, BATCH, some, look())
        assert other.allowed.obstacle
        assert (found(other, ways())[1] - found(fast, ways())[1]).abs().max() > 1e-3


def test_little_memory_changes_nothing(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    _, some = channels(model)
    steered = Steered(model, BATCH, some, look())
    whole, size = found(steered, ways()), model._budget.size
    try:
        model._budget.size = 1
        for a, b in zip(found(steered, ways()), whole, strict=True):
            near(a, b)
    finally:
        model._budget.size = size


def test_what_cannot_be_steered_is_refused(both: tuple[Any, HookedModel]) -> None:
    _, model = both
    _, some = channels(model)
    with pytest.raises(InputError, match="behind ONE"):
        Steered(model, BATCH, some, look(), query="ONE")
    with pytest.raises(InputError, match="not later"):
        Steered(model, BATCH, some, look(), (Site("q", 1, 0),))
