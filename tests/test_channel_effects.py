"""Effects of deleting components: one edited run per component as twin, a planted channel, and nothing where nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, sharp
from torch import Tensor

from interp import organisms
from interp.analyses.channel_effects import ChannelEffectsResult, channel_effects
from interp.edits import Edit, WeightChange
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models.channels import channel_edit, coefficients, named
from interp.models.composition import component_scores, readers
from interp.models.heads import folded_heads
from interp.prompts import Prompts
from interp.sites import Site

N = 10


def prompts(n: int = N, io: int = 5, s: int = 6) -> Prompts:
    """Unequal lengths; the same two tokens at two named places of every prompt."""
    draw = torch.Generator().manual_seed(4)
    rows, places = [], []
    for i in range(n):
        row = torch.randint(7, 31, (6 + i % 4,), generator=draw).tolist()
        at = (1, 3) if i % 2 else (3, 1)
        row[at[0]], row[at[1]], row[-1] = io, s, 3
        rows.append(tuple(row))
        places.append(at)
    positions = {"IO": tuple((a,) for a, _ in places), "S1": tuple((b,) for _, b in places), "MID": tuple((2,) for _ in rows)}
    return Prompts(tuple(f"prompt {i}" for i in range(n)), tuple(rows), positions=positions)


def margin(model: HookedModel, asked: Prompts, movers: list[tuple[int, int]]) -> Tensor:
    batch = asked.batch()
    found = model.capture(batch, [Site("pattern", layer, head, "END") for layer, head in movers])
    rows = torch.arange(len(batch))
    return torch.stack([x[rows, batch.index("IO")] - x[rows, batch.index("S1")] for x in found.values()])


@pytest.fixture(scope="module", params=FOUR)
def model(request: Any) -> HookedModel:
    return HookedModel.load(sharp(request.param))


@pytest.mark.parametrize("position", ["END", "MID"])
def test_every_number_is_that_of_an_edited_run(model: HookedModel, position: str) -> None:
    asked, movers = prompts(), [(2, 1), (1, 3)]
    got = channel_effects(model, asked, senders="L0H1,L0H3", movers="L2H1,L1H3", position=position, draws=2, top=99, share=0.1, seed=1)
    eps = 64 * torch.finfo(torch.float32).eps
    assert (got.intact - margin(model, asked, movers)).abs().max() < eps
    n = model.shape.d_head
    for through, receivers in (("all", None), ("query", "L2H1.q, L1H3.q")):
        t = got.labels["through"].index(through)
        for s, head in enumerate(got.labels["sender"]):
            for r in range(0, n, 2):
                with model.edited(channel_edit(model, f"{head}.{r}", delete=True, at=position, receivers=receivers)):
                    assert (got.component[t, s, r] - margin(model, asked, movers)).abs().max() < eps
            every = ", ".join(f"{head}.{r}" for r in range(n))
            with model.edited(channel_edit(model, every, delete=True, at=position, receivers=receivers)):
                assert (got.whole[t, s] - margin(model, asked, movers)).abs().max() < eps
        if got.names():
            with model.edited(channel_edit(model, ", ".join(got.names()), delete=True, at=position, receivers=receivers)):
                assert (got.joint[t] - margin(model, asked, movers)).abs().max() < eps
    assert (got.deviation <= 1e-5).all() and got.checked > 0 and not model._active
    # Scores are those from weights.
    for m, (layer, head) in enumerate(movers):
        read = readers(folded_heads(model, layer), "q")[head : head + 1]
        write = folded_heads(model, 0).components("ov").Vh[[1, 3]]
        assert (got.score[..., m] - component_scores(write, read)[..., 0]).abs().max() < 1e-6


def planted(model: HookedModel, asked: Prompts, v: Tensor, c: Tensor) -> Edit:
    """L2H1's queries read nothing but what L0H1 writes along v, its keys what IO has more of than S1; both in one dimension."""
    batch, rows = asked.batch(), torch.arange(len(asked))
    x = model.capture(batch, Site("resid_pre", 2))[Site("resid_pre", 2)].double()
    toward = (x[rows, batch.index("IO")] - x[rows, batch.index("S1")]).mean(0)
    toward -= toward.mean()
    gain, scale = model.weight("L2.ln1").double(), x[rows, batch.index("END")].std(-1).mean()
    only = torch.zeros(1, model.shape.d_head, dtype=torch.float64)
    only[0, -1] = 1.0  # no rotary embedding reaches it
    old = [WeightChange(Site(name, 2, 1), -model.weight(Site(name, 2, 1)).double()) for name in ("W_Q", "b_Q", "W_K", "b_K")]
    strength, end = 3 * scale / c.mean(), x[rows, batch.index("END")]
    rest = strength * ((end - end.mean(-1, keepdim=True)) @ v - c).mean() / scale  # what else is written along v; taken off, or it drowns c
    query, key = strength * v / gain, toward / toward.norm() / gain
    bias = WeightChange(Site("b_Q", 2, 1), -rest * only[0] - (model.weight("L2.b_ln1").double() @ query) * only[0])
    return Edit((*old, bias, WeightChange(Site("W_Q", 2, 1), query[:, None], only), WeightChange(Site("W_K", 2, 1), key[:, None], only)))


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_a_planted_channel_is_found_by_score_and_by_effect(kind: str) -> None:
    model, asked = HookedModel.load(sharp(kind)), prompts(24)
    sites = named(model, ", ".join(f"L0H1.{i}@END" for i in range(model.shape.d_head)))
    c = coefficients(model, asked, sites, folded_heads(model, 0).components("ov").Vh[1])
    rank = int((c.mean(0) / c.std(0)).abs().argmax())  # what the head writes alike in all prompts
    v = folded_heads(model, 0).components("ov").Vh[1, rank]
    with model.edited(planted(model, asked, v, c[:, rank])):
        got = channel_effects(model, asked, senders="L0H1,L0H3,L1H2", movers="L2H1", draws=4)
        alone = channel_effects(model, asked, senders="L0H1", movers="L2H1", draws=4)
        with model.edited(got.edit()):
            after = margin(model, asked, [(2, 1)])
    effects = got.effect().mean(-1).abs()
    assert divmod(int(effects.argmax()), effects.shape[1]) == (0, rank)
    assert int(got.score.mean(-1).flatten().argmax()) == rank  # of all components of all senders
    assert f"L0H1.{rank}" in got.names() and got.strongest(1)["channel"][0] == f"L0H1.{rank}" and got.strongest(1)["place"][0] == 1
    share, random = alone.removed()
    assert alone.names() == [f"L0H1.{rank}"] and float(share.low) > 0.4 > 2 * float(random.abs().mean())
    assert (got.joint[0] - after).abs().max() < 1e-5
    for through in ("all", "query"):
        assert got.effect(through)[0, rank].mean() > 3 * got.random_effect(through)[0].mean(-1).abs().mean()
    assert f"L0H1.{rank}" in got.summary() and "place 1 by score" in got.summary()


def test_a_head_that_nobody_hears_has_no_effect() -> None:
    built = organisms.hand_built("ioi")
    model = built.model if isinstance(built.model, HookedModel) else HookedModel.load(built.model)
    asked = built.task.generate(model, 12, 0)
    got = channel_effects(model, asked, senders="L2H0,L2H3", movers="L3H2", draws=2)  # L2H3 writes where nobody reads
    effects = got.head_effect().mean(-1)
    assert effects[0] > 0.1 and abs(float(effects[1])) < 1e-6
    assert not bool(got.selected[1].any())
    # What a head writes at all is what its components write: here they are all alike, and add up.
    assert "nearly equal singular values in L2H0" in got.summary()
    alive = ~got.score[0].isnan().any(-1)
    assert got.effect()[0][~alive].abs().max() < 1e-6


def test_controls_are_as_many_others_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from all that was not selected of the heads in question; with nothing or too little left there is no control."""
    import sys

    model, asked = HookedModel.load(sharp("gpt2")), prompts()
    module, n = sys.modules[channel_effects.__module__], model.shape.d_head

    def chosen(*which: tuple[int, int]) -> ChannelEffectsResult:
        flags = torch.zeros(2, n, dtype=torch.bool)
        for cell in which:
            flags[cell] = True
        monkeypatch.setattr(module, "_selected", lambda *_: flags)
        return channel_effects(model, asked, senders="L0H1,L0H3", movers="L2H1", draws=3)

    # All but one of the first head, one of the second: n in all, and as many others in the two together.
    got = chosen(*((0, r) for r in range(n - 1)), (1, 0))
    with model.edited(channel_edit(model, f"L0H1.{n - 1}, " + ", ".join(f"L0H3.{r}" for r in range(1, n)), delete=True, at="END")):
        others = margin(model, asked, [(2, 1)])
    for draw in got.joint_random[0]:
        assert (draw - others).abs().max() < 1e-5
    assert f"as many random others of these heads {float(got.removed()[1].mean()):.2f}" in got.summary()
    none = chosen(*((0, r) for r in range(n)))  # nothing else of that head; the other has none selected
    assert none.joint_random.isnan().all() and not none.joint.isnan().any()
    assert (
        "without a control: these heads have not as many other components" in none.summary()
        and "others of these heads" not in none.summary()
    )
    none.figures()


def test_what_is_written_elsewhere_passes_no_query() -> None:
    model = HookedModel.load(sharp("gpt2"))
    got = channel_effects(model, prompts(), senders="L0H1@MID; L1H0", movers="L2H1", draws=0)
    why = "L0H1 writes at other tokens than END, where queries are read, so that nothing passes through these"
    assert why in got.notes and not got.effect("query")[0].any() and got.effect("query")[1].any()
    assert not any("other tokens" in note for note in channel_effects(model, prompts(), senders="L0H1", movers="L2H1", draws=0).notes)


def test_weights_of_low_precision_and_heads_without_any() -> None:
    half = HookedModel.load(sharp("llama").bfloat16())
    got = channel_effects(half, prompts(), senders="L0H1", movers="L2H1", rank=1, draws=0)
    assert "weights are bfloat16; they are taken apart in float64" in got.summary()
    model = HookedModel.load(sharp("gpt2"))
    zero = Edit((WeightChange(Site("W_O", 0, 1), -model.weight("L0H1.W_O")),))
    with model.edited(zero), pytest.raises(InputError, match="L0H1 has no strength"):
        channel_effects(model, prompts(), senders="L0H1", movers="L2H1", draws=0)


def test_a_pair_is_refused_in_one_sentence() -> None:
    model = HookedModel.load(sharp("gpt2"))
    with pytest.raises(InputError, match="channel_effects takes one model: model is a HookedModel, but a pair came; give its .base"):
        channel_effects(ModelPair(model, model), prompts(), senders="L0H1", movers="L2H1")  # type: ignore[arg-type]


def test_left_out_components_tables_figures_and_files(tmp_path: Any) -> None:
    model = HookedModel.load(sharp("gpt2"))
    got = channel_effects(model, prompts(), senders="L0H1@MID; L1H0", movers="L2H1", rank=2, draws=0)
    assert got.component[:, :, 2:].isnan().all() and not got.component[:, :, :2].isnan().any()
    frame, every = got.to_frame(), got.to_frame(per="prompt")
    assert list(frame["channel"]) == ["L0H1.0", "L0H1.1", "L1H0.0", "L1H0.1"]
    assert len(every) == 2 * 2 * model.shape.d_head * N
    assert set(got.figures()) <= {"components", "together"} and got.summary()
    again = ChannelEffectsResult.load(got.save(tmp_path))
    assert torch.equal(again.whole, got.whole) and again.summary() == got.summary()
    assert not bool((got.dev).all()) and bool(got.dev.any())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"senders": "L1H0"}, "not later than"),
        ({"movers": "L0H0"}, "not later than"),
        ({"senders": "L0H9"}, "head 9 is out of range"),
        ({"senders": "L0H1,L0H2; L0H1@MID"}, "named twice"),
        ({"movers": "L1H3@MID"}, "query=MID"),
        ({"query": "MID"}, "behind MID"),
        ({"to": "NOWHERE"}, "NOWHERE"),
        ({"rank": 7}, "have 6 components"),
        ({"draws": -1}, "draws"),
        ({"dev": 1.0}, "dev"),
        ({"top": 0}, "top"),
    ],
)
def test_bad_input_is_one_sentence(settings: dict[str, Any], said: str) -> None:
    model = HookedModel.load(sharp("gpt2"))
    with pytest.raises(InputError, match=said) as error:
        channel_effects(model, prompts(), **{"senders": "L0H1", "movers": "L1H3", **settings})
    assert "\n" not in str(error.value)
