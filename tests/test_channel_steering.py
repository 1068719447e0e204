"""Steering over a grid: one edited run per point as twin, a planted pointer, halves that do not mix, bad input."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, sharp

from interp.analyses.channel_steering import ChannelSteeringResult, channel_steering
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models.channels import channel_edit
from interp.prompts import Prompts
from interp.sites import Site

N, SLOTS = 12, 3
EPS = 64 * torch.finfo(torch.float32).eps


def prompts(n: int = N, slots: int = SLOTS) -> Prompts:
    """Lists of different items behind openings of different lengths; two prompts of one context each."""
    draw = torch.Generator().manual_seed(7)
    rows, places, answers, options = [], [], [], []
    for i in range(n):
        opening = torch.randint(20, 31, (1 + i % 3,), generator=draw).tolist()
        items = (torch.randperm(14, generator=draw)[:slots] + 4).tolist()
        rows.append((*opening, *items, 19, 3))
        places.append(range(len(opening), len(opening) + slots))
        answers.append(items[i % slots])
        options.append(tuple(items))
    positions = {f"item{s + 1}": tuple((p[s],) for p in places) for s in range(slots)} | {"MID": tuple((p[-1] + 1,) for p in places)}
    contexts = tuple(f"list {i // 2}" for i in range(n))
    texts = tuple(f"prompt {i}" for i in range(n))
    return Prompts(texts, tuple(rows), positions=positions, answers=tuple(answers), options=tuple(options), contexts=contexts)


def sum_of(edits: list[Edit]) -> Edit:
    return reduce(Edit.__add__, edits)


@pytest.fixture(scope="module", params=FOUR)
def model(request: Any) -> HookedModel:
    return HookedModel.load(sharp(request.param))


@pytest.mark.parametrize(
    ("channels", "receivers"), [("L0H1.1", ""), ("L0H1.2@MID, L1H3.0", ""), ("L0H1.1, L0H2.0, L0H1.3", "L2H2.q, L2H0.k")]
)
def test_every_point_is_an_edited_run(model: HookedModel, channels: str, receivers: str) -> None:
    asked, movers = prompts(), [(2, 0), (2, 2)]
    names = [c.strip() for c in channels.split(",")]
    got = channel_steering(
        model, asked, channels=channels, mover="L2H0,L2H2", grid=3, span=2.0, receivers=receivers, factors=(0.0, 1.0, 3.0), draws=1, seed=2
    )
    batch, rows = asked.batch(), torch.arange(N)

    def measured() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        patterns = model.capture(batch, [Site("pattern", layer, head, "END") for layer, head in movers])
        paid = torch.stack([sum(x[rows, batch.index(f"item{s + 1}")] for x in patterns.values()) / 2 for s in range(SLOTS)])  # type: ignore[misc]
        logits = model.logits(batch, at="END")
        answers, options = torch.tensor(asked.answers), torch.tensor(asked.options)
        own = logits[rows, answers]
        others = logits.gather(1, options).masked_fill(options == answers[:, None], -torch.inf).amax(1)
        return paid, own - others, (logits.argmax(-1) == answers).float()

    plain = measured()
    for a, b in zip(plain, (got.plain_attention, got.plain_margin, got.plain_top), strict=True):
        assert (a - b).abs().max() < EPS * max(1, float(a.abs().max()))
    for point in range(0, got.grid.shape[1], 1 if len(names) == 1 else 4):
        edits = [
            channel_edit(model, n, to=float(c), at=None if "@" in n else "END", receivers=receivers or None)
            for n, c in zip(names, got.grid[0, point], strict=True)
        ]
        with model.edited(sum_of(edits)):
            for a, b in zip(measured(), (got.attention[0, point], got.margin[0, point], got.top[0, point]), strict=True):
                assert (a - b).abs().max() < EPS * max(1, float(a.abs().max()))
    for way in range(0, len(got.factors), 2):
        edits = [
            channel_edit(model, n, scale=float(g), at=None if "@" in n else "END", receivers=receivers or None)
            for n, g in zip(names, got.factors[way], strict=True)
        ]
        with model.edited(sum_of(edits)):
            _, margin, top = measured()
        assert (got.scaled_margin[0, way] - margin).abs().max() < EPS * max(1, float(margin.abs().max()))
        assert torch.equal(got.scaled_top[0, way], top)
    unscaled = (got.factors == 1).all(-1).nonzero().item()
    assert (got.scaled_margin[:, unscaled] - got.plain_margin).abs().max() < EPS * max(1, float(got.plain_margin.abs().max()))
    # The grid is about the coefficients of the run as it is; that of random directions in steps as long.
    assert (got.grid.mean(1) - got.observed.mean(1)).abs().max() < 1e-5
    width = got.grid.amax(1) - got.grid.amin(1)
    assert (width[0] - 4 * got.observed[0].std(0)).abs().max() < 1e-5 and (width[1] - width[0]).abs().max() < 1e-5
    assert got.deviation < 1e-5 and not model._active
    assert got.slot.tolist() == [i % SLOTS for i in range(N)]


def test_points_are_chosen_on_some_contexts_and_judged_on_others() -> None:
    got = channel_steering(HookedModel.load(sharp("llama")), prompts(24), channels="L0H1.0, L1H3.0", mover="L2H0", grid=3)
    # Both prompts of a context are on one side.
    pairs = got.dev.unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0], pairs[:, 1]) and 0 < int(got.dev.sum()) < 24
    right = got.right()
    best = got.best_point()
    assert right[best][got.dev].float().mean() == right[:, got.dev].float().mean(1).max()
    plain, steered = got.overall()
    assert len(plain) == int((~got.dev).sum()) and torch.equal(steered, right[best][~got.dev])
    plain, steered = got.targeted()
    test = (~got.dev).nonzero().flatten().tolist()
    points = {s: got.best_point(slot=s) for s in range(SLOTS)}
    assert steered.tolist() == [bool(right[points[int(got.slot[i])], i]) for i in test]
    assert plain.tolist() == (got.plain_margin[test] > 0).tolist()
    assert got.reachable() == len(set(got.slot_map().tolist()))
    each = [len({int(got.attention[0, p, :, i].argmax()) for p in range(9)}) for i in range(24)]
    assert got.reachable_by_prompt().tolist() == each
    frame = got.accuracies()
    assert list(frame["choice"].unique()) == ["targeted", "overall", "scaled"] and len(frame) == 9


def test_a_strong_channel_moves_attention_and_a_mute_one_does_not() -> None:
    """Far out along what a mover reads most, its attention goes elsewhere; where nobody reads, it stays."""
    model, asked = HookedModel.load(sharp("gpt2")), prompts()
    wide = channel_steering(model, asked, channels="L0H1.0, L0H2.0, L1H0.0", mover="L2H0", grid=3, span=60.0, draws=0)
    still = channel_steering(model, asked, channels="L0H1.0@MID", mover="L2H0", grid=3, span=60.0, draws=0, receivers="L2H3.q")
    assert wide.reachable() >= still.reachable() == 1
    assert (wide.attention[0] - wide.plain_attention).abs().max() > 0.05
    assert (still.attention[0] - still.plain_attention).abs().max() < EPS  # L2H3 alone reads it, and not from END


def test_tables_figures_and_files(tmp_path: Any) -> None:
    model = HookedModel.load(sharp("qwen2"))
    for channels in ("L0H1.1", "L0H1.1, L0H1.2", "L0H1.1, L0H1.2, L1H0.0"):
        got = channel_steering(model, prompts(), channels=channels, mover="L2H0", grid=3, draws=1)
        assert set(got.figures()) == {"slots", "accuracy", "choices"}
        assert len(got.to_frame()) == 2 * 3 ** (channels.count(",") + 1)
        assert len(got.to_frame(per="prompt")) == len(got.to_frame()) * N
        assert "of 3 slots" in got.summary() and "random" in got.summary()
    again = ChannelSteeringResult.load(got.save(tmp_path))
    assert torch.equal(again.attention, got.attention) and again.summary() == got.summary()


def test_what_is_said_of_channels() -> None:
    """Nearly equal strengths with their span, and weights of low precision."""
    hf = sharp("llama").bfloat16()
    with torch.no_grad():
        hf.model.layers[0].input_layernorm.weight.fill_(1)
        hf.model.layers[0].self_attn.v_proj.weight[:8] = torch.eye(8, 24)  # of heads 0 and 1
        hf.model.layers[0].self_attn.o_proj.weight[:, 8:16] = torch.eye(24, 8)
    got = channel_steering(HookedModel.load(hf), prompts(), channels="L0H1.2", mover="L2H0", grid=2, factors=(1.0,), draws=0)
    span = "components 0 to 7 of L0H1 have nearly equal singular values: their span is identified, the direction of L0H1.2 in it is not"
    assert span in got.summary() and "weights are bfloat16; they are taken apart in float64" in got.summary()


def test_what_cannot_be_steered() -> None:
    model, asked = HookedModel.load(sharp("gpt2")), prompts()
    end = len(asked.ids[0]) - 1
    with pytest.raises(InputError, match=f"L0H1.0@END and L0H1.0@{end} are the same token in prompt 0; a channel is set once"):
        channel_steering(model, asked, channels=f"L0H1.0@END, L0H1.0@{end}", mover="L2H0")
    with pytest.raises(InputError, match="channel_steering takes one model: model is a HookedModel, but a pair came"):
        channel_steering(ModelPair(model, model), asked, channels="L0H1.0", mover="L2H0")  # type: ignore[arg-type]
    zero = Edit((WeightChange(Site("W_O", 0, 1), -model.weight("L0H1.W_O")),))
    with model.edited(zero), pytest.raises(InputError, match="L0H1.0@END has no strength"):
        channel_steering(model, asked, channels="L0H1.0", mover="L2H0")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"channels": "L0H1.6"}, "0 to 5"),
        ({"channels": "L0H1.1, L0H1.2, L0H1.3, L0H1.4"}, "one to three"),
        ({"channels": "L2H1.1"}, "not later than"),
        ({"receivers": "L0H1.q"}, "not later than"),
        ({"mover": "L2H9"}, "head 9"),
        ({"grid": 1}, "grid"),
        ({"span": 0.0}, "span"),
        ({"slots": ("item1", "item9")}, "item9"),
        ({"factors": ()}, "factors"),
        ({"dev": 0.0}, "dev"),
    ],
)
def test_bad_input_is_one_sentence(settings: dict[str, Any], said: str) -> None:
    model = HookedModel.load(sharp("gpt2"))
    with pytest.raises(InputError, match=said) as error:
        channel_steering(model, prompts(), **{"channels": "L0H1.1", "mover": "L2H0", **settings})
    assert "\n" not in str(error.value)
