"""Where heads look, against the attentions that plain Hugging Face models give, prompt by prompt and token by token."""

from __future__ import annotations

import base64
import copy
import math
import re
import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from test_report_browser import Page, browser  # noqa: F401
from tiny_checkpoints import FOUR, randomised, sharp, tiny

from interp import plots
from interp.analyses.attention_patterns import AttentionPatternsResult, attention_patterns
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.organisms import hand_built, planted
from interp.plots.attention import AttentionPanel, attention_grid, attention_view
from interp.plots.colours import MISSING, rgb, shade
from interp.prompts import PromptPairs, Prompts
from interp.report import write_report
from interp.sweeps import attention as home

# 5 prompts, up to 9 tokens, 31 token ids, 3 layers, 4 heads
ROWS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18, 19, 20], [21, 22, 23, 24]]
PLACES = {"S": ((1, 2), (0,), (), (3,), (1,)), "IO": ((4,), (), (0,), (0,), (3,))}


def prompts(rows: list[list[int]] = ROWS, **more: Any) -> Prompts:
    return Prompts(tuple(str(r) for r in rows), tuple(tuple(r) for r in rows), **more)


def shaken(model: Any, size: float = 0.2) -> Any:
    tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn(p.shape, generator=draws)
    return tuned


def plain(model: Any, ids: list[int]) -> torch.Tensor:
    """Attention [layer head query key] of one prompt alone, from the plain model."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions).double()


@pytest.fixture(scope="module")
def llama() -> Any:
    return sharp("llama")


@pytest.fixture(scope="module")
def pair(llama: Any) -> ModelPair:
    return ModelPair.load(llama, shaken(llama))


@pytest.fixture(scope="module")
def result(pair: ModelPair) -> Any:
    return attention_patterns(pair, prompts(positions=PLACES))


def close(got: Any, wanted: float) -> None:
    assert float(got) == pytest.approx(wanted, abs=3e-6, nan_ok=True)


@pytest.mark.parametrize("kind", FOUR)
def test_agrees_with_plain_attentions(kind: str) -> None:
    models = sharp(kind), shaken(sharp(kind))
    got: Any = attention_patterns(ModelPair.load(*models), prompts(positions=PLACES))
    assert got.heads == tuple(f"L{layer}H{head}" for layer in range(3) for head in range(4))
    for row, ids in enumerate(ROWS):
        both, n = [plain(m, ids) for m in models], len(ids)
        for i, head in enumerate(got.heads):
            p, q = (x[i // 4, i % 4] for x in both)
            for side, a in zip(("base", "tuned"), (p, q), strict=True):
                later = range(1, n)
                mean = (lambda xs: sum(xs) / len(xs)) if n > 1 else (lambda xs: math.nan)
                close(got.values("first token", side)[i, row], mean([float(a[t, 0]) for t in later]))
                close(got.values("itself", side)[i, row], mean([float(a[t, t]) for t in later]))
                close(got.values("previous token", side)[i, row], mean([float(a[t, t - 1]) for t in later]))
                close(got.values("entropy", side)[i, row], mean([-sum(float(x) * math.log(float(x)) for x in a[t, : t + 1] if x > 0) for t in later]))  # fmt: skip  # noqa: E501
                named = {name: set(where[row]) for name, where in PLACES.items()} | {"END": {n - 1}}
                named["no named token"] = set(range(n)) - set().union(*named.values())
                for name, tokens in named.items():
                    paid = sum(float(a[n - 1, t]) for t in tokens) if tokens and n > 1 else math.nan
                    close(got.values(f"from END to {name}", side)[i, row], paid)
                close((got.patterns[str(row)][int(side == "tuned"), i] - a).abs().max() if n > 1 else 0, 0)
            close(got.distance[i, row], mean([sum(abs(float(x)) for x in p[t] - q[t]) / 2 for t in range(1, n)]))
            assert head == f"L{i // 4}H{i % 4}"
    assert got.moved.max() > 0.02 and got.differs and 0 < got.numerical_floor < 1e-5


def test_rows_of_a_sliding_window() -> None:
    config = transformers.MistralConfig(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=19, sliding_window=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = randomised(transformers.MistralForCausalLM(config), 1)
    got = attention_patterns(HookedModel.load(model), prompts(), shown=1)
    wanted = plain(model, ROWS[0])
    assert float(wanted[:, :, 8, :5].abs().max()) == 0
    torch.testing.assert_close(got.patterns["0"][0].double().reshape(wanted.shape), wanted, atol=1e-6, rtol=0)
    close(got.values("first token")[5, 0], float(wanted[1, 1, 1:, 0].mean()))


def test_a_model_against_itself(llama: Any, pair: ModelPair) -> None:
    same = attention_patterns(ModelPair.load(llama, HookedModel.load(copy.deepcopy(llama))), prompts(positions=PLACES))
    assert same.distance is not None and same.distance.nan_to_num(0.0).max() == 0 and not same.differs
    assert same.summary().startswith("Attention shows no difference beyond rounding: the rows of 12 heads differ by at most 0 ")
    assert all(same.change(kind).nan_to_num(0.0).abs().max() == 0 for kind in same.kinds)
    assert not len(same.strongest()) and (same.patterns["0"][0] == same.patterns["0"][1]).all()
    assert same.figures() and same.html()
    flat: Any = next(iter(same.figures().values()))
    assert sum(t.type == "heatmap" for t in flat.data) == 2  # all cells are in the grey layer
    again = attention_patterns(ModelPair.load(pair.base, pair.tuned), prompts(positions=PLACES))
    assert again.differs


def test_a_planted_change_of_queries_shows_in_its_head_and_above(llama: Any) -> None:
    base, other = HookedModel.load(llama), HookedModel.load(copy.deepcopy(llama))
    with other.edited(planted("module_only", other, layer=1, module="W_Q", head=2, rel=0.8)):
        got = attention_patterns(ModelPair.load(base, other), prompts())
    moved = got.moved.reshape(3, 4)
    assert moved[0].max() == 0 and moved[1, [0, 1, 3]].max() == 0
    assert moved[1, 2] > 0.02 and (moved[2] > 0).all()
    assert got.strongest(12)["head"].tolist()[-7:] == [
        f"L{layer}H{head}" for layer, head in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3)]
    ]


def test_heads_written_by_hand() -> None:
    """L0H1 looks at the token before; L1H0, at END, behind the earlier mention of the last word."""
    built = hand_built("induction")
    found = built.task.generate(built.model, 12)
    assert isinstance(found, PromptPairs)
    got = attention_patterns(built.model, found)
    head = {name: i for i, name in enumerate(got.heads)}
    assert got.values("previous token")[head["L0H1"]].min() > 0.9 and got.values("previous token")[head["L0H2"]].max() < 0.3
    assert got.values("from END to NEXT")[head["L1H0"]].tolist() == pytest.approx([0.9] * 12, abs=1e-3)  # as it is written
    table = got.strongest(12).set_index("head")
    assert table.looks_at["L1H0"] == "from END to NEXT" and table.looks_at["L0H1"] == "previous token"
    with pytest.raises(InputError, match="one model has no change"):
        got.change("itself")


def test_even_attention() -> None:
    """A model that reads nothing from its tokens pays the same to all: what is reported beside each number."""
    model = tiny("llama", seed=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name:
                p.zero_()
    got = attention_patterns(HookedModel.load(model), prompts(positions=PLACES))
    frame = got.to_frame()
    torch.testing.assert_close(torch.tensor(frame.attention.to_numpy()), torch.tensor(frame.even.to_numpy()), atol=1e-6, rtol=0)
    close(got.even[0, 1], 1 / 2)
    close(got.even[3, 4], (math.log(2) + math.log(3) + math.log(4)) / 3)


def test_small_pieces_and_named_heads_change_nothing(pair: ModelPair, result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_HELD", 100)  # a layer and a prompt at a time
    calls, read = [], home._read
    monkeypatch.setattr(home, "_read", lambda m, b, layers: calls.append((len(b), len(layers))) or read(m, b, layers))
    some = attention_patterns(pair, prompts(positions=PLACES), heads="L2H3,L0H1,L2H0")
    assert (1, 1) in calls
    assert some.heads == ("L0H1", "L2H0", "L2H3")
    which = [result.heads.index(head) for head in some.heads]
    torch.testing.assert_close(some.distance, result.distance[which], equal_nan=True, atol=1e-6, rtol=0)
    torch.testing.assert_close(some.attention, result.attention[:, :, which], equal_nan=True, atol=1e-6, rtol=0)
    torch.testing.assert_close(some.looks, result.looks[:, :, which], equal_nan=True, atol=1e-6, rtol=0)
    torch.testing.assert_close(some.patterns["0"], result.patterns["0"][:, which], atol=1e-6, rtol=0)
    for name, figure in some.figures().items():
        assert figure.to_dict()["layout"]["title"]["text"], name
    assert set(some.strongest()["head"]) == set(some.heads)


def test_prompts_of_one_context_count_once(pair: ModelPair) -> None:
    rows = [ROWS[0], ROWS[3], ROWS[4]]
    once: Any = attention_patterns(pair, prompts(rows))
    thrice = attention_patterns(pair, prompts(rows * 3, contexts=("a", "b", "c") * 3))
    for name in ("change", "change_se", "low", "high", "n"):
        assert thrice.to_frame()[name].tolist() == pytest.approx(once.to_frame()[name].tolist(), abs=1e-6)
    assert "9 prompts in 3 contexts, s.e. over contexts" in thrice.summary()
    values = once.distance[3].double()
    assert once.to_frame().set_index(["kind", "head"]).change_se["distance", "L0H3"] == pytest.approx(float(values.std()) / math.sqrt(3))


def test_one_prompt_has_no_error(pair: ModelPair) -> None:
    for model in (pair, pair.base):
        one = attention_patterns(model, prompts(ROWS[:1])).summary()
        same = attention_patterns(model, prompts([ROWS[0], ROWS[3]], contexts=("a", "a"))).summary()
        assert "1 prompt, so no s.e." in one and "2 prompts in 1 context, so no s.e." in same
        for told in (one, same):
            assert "s.e. over" not in told and "+-" not in told and "nan" not in told


def test_positions_that_no_prompt_has(pair: ModelPair) -> None:
    """Named by a file of prompts, but nowhere there, or in prompts of one token only."""
    got = attention_patterns(pair, prompts(positions={"S": ((),) * 5, "T": ((), (), (0,), (), ()), "IO": PLACES["IO"]}))
    assert got.labels["place"] == ("IO", "END", "no named token") and not any(map(math.isnan, got.to_frame().change))
    every = attention_patterns(pair, prompts([[3, 4]], positions={"S": ((0,),)}))
    assert every.labels["place"] == ("S", "END") and set(every.strongest()["most_changed"]) <= set(every.kinds)


def test_prompts_of_one_token_are_left_out(pair: ModelPair, result: Any) -> None:
    assert result.distance[:, 2].isnan().all() and not result.distance[:, [0, 1, 3, 4]].isnan().any()
    without = attention_patterns(pair, prompts([row for row in ROWS if len(row) > 1]))
    torch.testing.assert_close(result.moved, without.moved, atol=1e-7, rtol=0)
    assert "(4 prompts, s.e. over prompts;" in result.summary()
    alone = attention_patterns(pair, prompts([[3, 4, 5]]))
    assert "+-" not in alone.summary() and alone.figures() and alone.html() and 0 < alone.numerical_floor < 1e-5
    with pytest.raises(InputError, match="every prompt is a single token"):
        attention_patterns(pair, prompts([[3], [4]]))


def test_other_vocabulary_and_half_precision(llama: Any) -> None:
    larger = tiny("llama", seed=9, vocab_size=34)
    tuned = shaken(llama)
    with torch.no_grad():
        for (name, to), source in zip(larger.named_parameters(), tuned.parameters(), strict=True):
            (to[:31] if "embed" in name or "lm_head" in name else to).copy_(source)
    wide, narrow = (attention_patterns(ModelPair.load(llama, other), prompts()) for other in (larger, tuned))
    torch.testing.assert_close(wide.distance, narrow.distance, equal_nan=True)
    half = copy.deepcopy(llama).bfloat16()
    got = attention_patterns(ModelPair.load(half, copy.deepcopy(llama)), prompts())
    assert not got.half and 1e-4 < got.numerical_floor < 0.05  # of bfloat16 against the same weights in float32
    assert got.attention.dtype == torch.float32 and not got.differs and "no difference beyond rounding" in got.summary()
    model = HookedModel.load(half)
    with model.edited(planted("resid_bias", model, layer=0, scale=1.0)):
        edited = attention_patterns(ModelPair.load(model, HookedModel.load(copy.deepcopy(half))), prompts())
    assert edited.half and "without the rounding of half precision" in edited.summary()


def test_the_floor_sees_what_depends_on_the_batch(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    read = home._read
    monkeypatch.setattr(home, "_read", lambda m, b, layers: read(m, b, layers) * (1 + 0.5 * (len(b) > 1)))
    shaky = attention_patterns(pair, prompts(positions=PLACES))
    assert shaky.numerical_floor == pytest.approx(0.25, abs=1e-5)  # half of all differences of a row
    assert float(shaky.floor[:, :3].max()) > 0.1 and shaky.looks_floor is not None and shaky.looks_floor.max() > 0.1


def test_tables_sentence_and_round_trip(tmp_path: Any, result: Any) -> None:
    frame = result.to_frame()
    assert len(frame) == 12 * (1 + len(result.kinds)) and len(result.to_frame(per="prompt")) == 5 * len(frame)
    row = frame[(frame.kind == "itself") & (frame["head"] == "L2H1")].iloc[0]
    assert row.change == pytest.approx(row.tuned - row.base, abs=1e-7) and row.low < row.change < row.high and row.floor > 0
    first = result.strongest().iloc[0]
    assert first["head"] == result.heads[int(result.moved.argmax())] and first.distance == pytest.approx(float(result.moved.max()))
    kinds = frame[(frame["head"] == first["head"]) & ~frame.kind.isin(["distance", "entropy", "from END to no named token"])]
    assert kinds.loc[kinds.change.abs().idxmax()].kind == first.most_changed
    text = result.summary()
    assert text.startswith(f"Attention moved most in {first['head']}: its rows differ by {first.distance:.2g} +- ") and "\n" not in text
    again = AttentionPatternsResult.load(result.save(tmp_path / "r"))
    assert again.summary() == text and torch.equal(again.patterns["0"], result.patterns["0"]) and again.html() == result.html()
    assert list(result.figures())[:3] == ["How far attention moved", "From END, tuned - base", "From END"]


def test_refusals(pair: ModelPair, result: Any, llama: Any) -> None:
    with pytest.raises(InputError, match="L3H0 is not in a model of 3 layers with 4 heads each"):
        attention_patterns(pair, prompts(), heads="L1H1,L3H0")
    with pytest.raises(InputError, match="L1H1@END names a position"):
        attention_patterns(pair, prompts(), heads="L1H1@END")
    with pytest.raises(InputError, match="shown is a number of prompts, from 0; got -1"):
        attention_patterns(pair, prompts(), shown=-1)
    with pytest.raises(InputError, match="tokens is a number of tokens, from 2; got 1"):
        attention_patterns(pair, prompts(), tokens=1)
    with pytest.raises(InputError, match="prompt 0 has 20 tokens"):
        attention_patterns(pair, prompts([[3] * 20]))
    split = ModelPair.load(llama, shaken(llama))
    split.one_at_a_time = True
    with pytest.raises(InputError, match="loaded one at a time"):
        attention_patterns(split, prompts())
    with pytest.raises(InputError, match="per must be 'prompt'"):
        result.to_frame(per="head")
    with pytest.raises(InputError, match="there is no model 'other'"):
        result.values("itself", "other")
    with pytest.raises(InputError, match="itsel"):
        result.values("itsel")
    with pytest.raises(InputError, match="the patterns of prompt 2 were not kept; those of 0, 1, 3, 4 were"):
        result.view(prompts=(2,))
    with pytest.raises(InputError, match="L2H4"):
        result.view(heads="L2H4")
    none = attention_patterns(pair, prompts(), shown=0)
    assert none.html() is None and none.figures() and not none.patterns


# ------------------------------------------------------------------------------------------------ pictures


def pixels(figure: Any) -> torch.Tensor:
    """Colours [row column rgb] of the picture in a figure."""
    (image,) = (t for t in figure.data if t.type == "image")
    raw = base64.b64decode(image.source.partition(",")[2])
    at, parts = 8, {}
    while at < len(raw):
        (size,), kind = struct.unpack(">I", raw[at : at + 4]), raw[at + 4 : at + 8]
        parts[kind] = raw[at + 8 : at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + parts[kind])
        at += 12 + size
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    index = torch.frombuffer(bytearray(zlib.decompress(parts[b"IDAT"])), dtype=torch.uint8).reshape(height, width + 1)[:, 1:]
    return torch.frombuffer(bytearray(parts[b"PLTE"]), dtype=torch.uint8).reshape(-1, 3)[index.long()]


def test_thumbnails_show_the_patterns_where_they_belong() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.25, 0.75]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    made: Any = attention_grid({(0, 1): a.numpy(), (2, 5): b.numpy()}, title="t", hover={(2, 5): "<b>x</b>\ny"})
    seen, size = pixels(made), 8
    gap, pitch = 2, 2 * 8 + 2
    assert seen.shape == (2 * pitch + gap, 2 * pitch + gap, 3)

    def cell(row: int, column: int, query: int, key: int) -> list[int]:
        return seen[gap + row * pitch + query * size + 3, gap + column * pitch + key * size + 3].tolist()

    def near(got: list[int], wanted: str) -> bool:
        return max(abs(x - y) for x, y in zip(got, rgb(wanted), strict=True)) <= 2

    for (row, column), pattern in {(0, 0): a, (1, 1): b}.items():
        for query, key in ((0, 0), (1, 0), (1, 1)):
            assert near(cell(row, column, query, key), shade(float(pattern[query, key]), 0, 1, False))
        assert cell(row, column, 0, 1) == list(rgb(MISSING))
    assert cell(0, 1, 1, 0) == cell(1, 0, 0, 0) == list(rgb(MISSING))  # heads that were not asked for
    (cover,) = (t for t in made.data if t.type == "heatmap")
    assert cover.customdata[1][1] == "L2H5<br>&lt;b&gt;x&lt;/b&gt;<br>y" and cover.customdata[0][1] == ""
    assert made.layout.xaxis.ticktext == ("1", "5") and made.layout.yaxis.ticktext == ("0", "2")
    (image,) = (t for t in made.data if t.type == "image")
    assert (image.x0, image.dx) == (image.y0, image.dy)
    # the middle of the first thumbnail is at 0 and that of the second at 1
    assert image.x0 + image.dx * (gap + 7.5) == pytest.approx(0) and image.x0 + image.dx * (gap + pitch + 7.5) == pytest.approx(1)
    changed = pixels(attention_grid({(0, 0): (b - a).numpy()}, title="t", difference=True, top=0.25, floor=1e-6))
    assert changed[gap + 3, gap + 3].tolist() == list(rgb(plots.FLOOR))
    assert near(changed[gap + 11, gap + 3].tolist(), shade(1, -1, 1, True)) and near(
        changed[gap + 11, gap + 11].tolist(), shade(-1, -1, 1, True)
    )


def test_every_head_is_drawn_in_its_place(result: Any) -> None:
    a = result.patterns["0"].numpy()
    change, figures = a[1] - a[0], result.figures()
    more = {"difference": True, "top": float(abs(change).max()), "floor": float(result.cell_floor.max())}
    for name, wanted, how in (("tuned - base", change, more), ("tuned", a[1], {}), ("base", a[0], {})):
        expected = attention_grid({(i // 4, i % 4): wanted[i] for i in range(12)}, title="t", **how)
        assert torch.equal(pixels(figures[f"12 heads on prompt 0: {name}"]), pixels(expected))


@pytest.mark.full
def test_many_heads_make_no_heavy_page() -> None:
    patterns = torch.rand(1024, 48, 48, generator=torch.Generator().manual_seed(0)).tril()
    made: Any = attention_grid({(i // 32, i % 32): p.numpy() for i, p in enumerate(patterns)}, title="t")
    assert len(made.to_json()) < 3_000_000


# ------------------------------------------------------------------------------------------------ the view of tokens


def rule(page: str, query: int, head: int = 0, prompt: int = 0) -> dict[str, int]:
    """What the style says that a token pays while it is asked: variable -> per mille."""
    (body,) = re.findall(rf"\.h{head}\.p{prompt}:is\(:has\(\.q{query}:hover\)[^{{]*{{([^}}]*)}}", page)
    return {k: int(v) for k, v in (part.split(":") for part in body.split(";"))} if body else {}


def test_the_view_says_what_every_token_pays(result: Any) -> None:
    page = result.view(heads="L1H2", prompts=(0, 3))
    pattern = result.patterns["3"][:, result.heads.index("L1H2")]
    for query in range(6):
        said = rule(page, query, prompt=1)
        for key in range(6):
            for letter, side in zip("bu", pattern, strict=True):
                assert said.get(f"--{letter}{key}", 0) == round(1000 * float(side[query, key]))
    assert "Shown: 1 of 12 heads, 2 of 5 prompts" in page and "<script" not in page and "http" not in page and "prompt 3" in page
    start = int((pattern[1] - pattern[0]).abs().sum(-1).argmax())
    assert re.search(rf'class="t q{start}" [^>]*><input type="radio" name="h0p1" checked>', page)


def test_of_long_prompts_the_ends_are_kept(pair: ModelPair) -> None:
    long = attention_patterns(pair, prompts(), tokens=4, shown=2)
    assert long.kept == {"0": (0, 6, 7, 8), "1": (0, 1)} and long.words["0"] == ("<3>", "<9>", "<10>", "<11>")
    whole = attention_patterns(pair, prompts()).patterns["0"]
    some = torch.tensor([0, 6, 7, 8])
    torch.testing.assert_close(long.patterns["0"], whole[:, :, some][..., some])
    page = long.view(heads="L0H0", prompts=(0,))
    assert "… 5 more tokens …" in page
    assert rule(page, 3)["--b4"] == round(1000 * float(whole[0, 0, 8, 1:6].sum()))
    assert any("its first and last 3 tokens" in name for name in long.figures())


def test_tokens_are_escaped_and_two_views_do_not_collide(pair: ModelPair, result: Any) -> None:
    evil = replace(result, words={k: tuple(f"</style><script>{w}" for w in v) for k, v in result.words.items()})
    page = evil.html()
    assert page is not None and "<script>" not in page and "&lt;script&gt;" in page and page.count("</style>") == 1
    other = attention_patterns(pair, prompts(), seed=1)
    names = [re.findall(r'id="([^"]*)"', r.html() or "")[0] for r in (result, other)]
    assert names[0] != names[1] and all(re.fullmatch(r"[\w-]+", name) for name in names)
    by_hand = replace(result)
    assert by_hand.html()


def test_the_view_is_small() -> None:
    """The worst case: 3 heads on 2 prompts of 48 tokens, where every token looks everywhere."""
    draws = torch.rand(2, 48, 48, generator=torch.Generator().manual_seed(0)).tril()
    even = draws / draws.sum(-1, keepdim=True)
    panels = [AttentionPanel(f"L0H{h}", f"prompt {p}", [" a word"] * 48, even, 0, left_out=100) for h in range(3) for p in range(2)]
    assert 100_000 < len(attention_view(panels, sides=("base", "tuned"), name="x")) < 300_000


def test_pointing_at_a_token_colours_the_others(request: Any, tmp_path: Any, result: Any) -> None:
    """In a browser, on the page of a report, whose policy lets no script of ours run."""
    page: Page = request.getfixturevalue("browser")
    page.open(write_report([result], tmp_path / "report.html", title="t", verdict=[], warnings=[], plan=[]), 1200)
    head, view = result.order[0], "document.querySelector('.attention')"
    pattern = result.patterns["0"][:, head]
    limit = float((pattern[1] - pattern[0]).abs().max())
    panel = f"[...{view}.querySelectorAll('.panel')].filter(e => e.offsetParent)[0]"
    places = f"[...{panel}.querySelectorAll('.t i')].map(e => (getComputedStyle(e).backgroundPosition.split(', ')[1] || '').split(' ')[0])"

    def check(query: int, side: int | None) -> None:
        """Every token that is seen has its place on the map of colours."""
        shift = parse(page.ask(places))
        for key in range(query + 1):
            paid = pattern[side, query, key] if side is not None else (pattern[1] - pattern[0])[query, key]
            wanted = 100 * float(paid) if side is not None else 50 + 50 * float(paid) / limit
            assert shift[key] == pytest.approx(wanted, abs=0.06 if side is not None else 0.06 / limit)

    def parse(texts: list[str]) -> list[float]:
        return [float(text.rstrip("%")) if text.endswith("%") else 0.0 for text in texts]

    check(int((pattern[1] - pattern[0]).abs().sum(-1).argmax()), None)  # before anything is done
    page.ask(f"{view}.scrollIntoView()")
    for query in (8, 3):
        x, y = page.ask(f"(r => [r.x + r.width / 2, r.y + 8])({panel}.querySelector('.q{query}').getBoundingClientRect())")
        for side, button in ((None, "s2"), (0, "s0"), (1, "s1")):
            page.ask(f"{view}.querySelector('.{button}').click()")
            page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            check(query, side)
    page.ask(f"{panel}.querySelector('.q5').click()")  # chosen, and kept when the pointer is elsewhere
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    check(5, 1)
    page.ask(f"{view}.querySelector('.p1').click()")
    assert page.ask(f"{panel}.querySelector('.said').textContent").startswith(f"{result.heads[head]}, prompt 1.")
    assert page.ask(f"[...{view}.querySelectorAll('.panel')].filter(e => e.offsetParent).length") == 1
    assert page.complaints() == [] and page.ask("document.documentElement.scrollWidth") <= 1200
