"""TuCo and its parts as analyses, and a pair with tuning scaled."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_tokenizers import tokenizer
from test_contribution import ROWS, SIZES, pair_of, tuco_of, twin
from tiny_checkpoints import FOUR, saved, tiny
from tiny_pairs import save_pair

from interp.analyses.tuco import _silent, tuco
from interp.analyses.tuco_components import tuco_components
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.organisms.planted import planted
from interp.prompts import PromptPairs, Prompts
from interp.prompts.mixed import mixed
from interp.tasks import task

TEXTS = ["The ring is red", "The blue", "A man went to the market <b>x</b>", "One two three"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tuco")
    save_pair(place)
    return place


@pytest.fixture(scope="module")
def pair(folder):
    return ModelPair.load(folder / "base", folder / "tuned")


@pytest.fixture(scope="module")
def prompts(pair):
    return Prompts.of(pair, TEXTS)


@pytest.fixture(scope="module")
def result(pair, prompts):
    return tuco(pair, prompts, output_co=True)


# ------------------------------------------------------------------------------------------- tuco


def test_the_numbers_are_the_twins(folder, pair, prompts, result) -> None:
    base, tuned = (m.wrapped.source for m in (pair.base, pair.tuned))
    want = twin(base, tuned, prompts.ids)
    torch.testing.assert_close(result.tuco.float(), tuco_of(want), **SIZES)
    torch.testing.assert_close(result.preco + result.tuco, torch.ones(4).double())
    final = [twin(base, copy.deepcopy(base), [ids])["x_L"][0, -1] for ids in prompts.ids]
    apart = torch.stack(
        [(want["x_L"][i, -1] - x).abs().sum() / (x.abs().sum() + (want["x_L"][i, -1] - x).abs().sum()) for i, x in enumerate(final)]
    )
    torch.testing.assert_close(result.output_co.float(), apart, **SIZES)
    sums = {k: torch.stack(want[k]).cumsum(0) for k in ("pre", "tuning")}
    for row, ids in enumerate(prompts.ids):
        a, b = (sums[k][:, row, -len(ids) :].abs().sum((1, 2)) for k in ("pre", "tuning"))
        assert float(result.beta[row]) == pytest.approx(float((b / (a + b)).max()), rel=1e-5)
        assert float(result.by_token[row, len(ids) - 1]) == pytest.approx(float(result.tuco[row]))
    assert float(result.closure.max()) < 1e-6 and result.numerical_floor < 1e-6


def test_the_floor_is_of_the_same_prompts_in_another_batch(pair, prompts) -> None:
    more = tuco(pair, prompts[[0, 1, 2, 3, 1, 0]])
    assert float((more.tuco - more.tuco[0]).abs().max()) > 1e-3  # so that another prompt in a row's place would be seen
    assert len(more.floor) == 4 and more.numerical_floor < 1e-6 and "4 of the prompts move by at most" in more.summary()


def test_what_a_number_does_not_cover_is_told(result) -> None:
    assert _silent(torch.tensor([3, -1, 5]), 4) == ("the tuned model ended 1 of 3 answers before their first token, so these have none",)
    assert _silent(torch.tensor([3, 4]), 4) == () and _silent(torch.tensor([-1, -1]), 0) == ()
    some = replace(result, base_output=result.base_output.index_fill(0, torch.tensor([1]), torch.nan))
    assert "of the 3 prompts whose tokens base knows" in some.summary() and "tokens base knows" not in result.summary()


def test_a_change_of_one_block_begins_there(result) -> None:
    assert not result.cumulative[:, 0].any() and bool((result.cumulative[:, 1] > 0).all())  # L1 down_proj
    assert not result.tuning_layer[:, [0, 2]].any()
    torch.testing.assert_close(result.tuning_sum[:, 1], result.tuning_sum[:, 2])


def test_norm_seed_and_streaming(folder, pair, prompts, result) -> None:
    other = tuco(pair, prompts, norm="l2")
    torch.testing.assert_close(
        other.tuco.float(), tuco_of(twin(pair.base.wrapped.source, pair.tuned.wrapped.source, prompts.ids), 2), **SIZES
    )
    assert float((other.tuco - result.tuco).abs().max()) > 1e-4 and other.output_co is None
    lazy = ModelPair.load(folder / "base", folder / "tuned", load="one at a time")
    streamed = tuco(lazy, prompts, stream=True)
    assert not lazy.base.loaded and not len(streamed.floor)
    torch.testing.assert_close(streamed.tuco, result.tuco, atol=1e-6, rtol=0)
    torch.testing.assert_close(streamed.by_token, result.by_token, atol=1e-6, rtol=0, equal_nan=True)
    with pytest.raises(InputError, match="ask for one of them"):
        tuco(pair, prompts, stream=True, output_co=True)


def test_tables_sentence_and_page(pair, prompts, result) -> None:
    said = result.summary()
    assert f"TuCo is {float(result.tuco.mean()):.3g} [" in said and "over n = 4 prompts" in said and "closure error" in said
    table, rows = result.to_frame(), result.to_frame("prompt")
    assert len(table) == 3 and table.tuco.iloc[-1] == pytest.approx(float(result.tuco.mean()))
    assert (table.low <= table.tuco).all() and (table.tuco <= table.high).all()
    assert rows.text.tolist() == TEXTS and rows.tuco.tolist() == pytest.approx(result.tuco.tolist())
    ends = result.strongest(2)
    assert ends.prompt.tolist() == [int(result.tuco.argmax()), int(result.tuco.argmin())]
    assert len(result.strongest(20)) == 4
    page = result.html()
    assert "<b>x" not in page and "&lt;" in page and page.count('class="tokens"') == 4
    assert [h for h in result.figures()] == ["By layer", "Layers alone", "By prompt"]
    with pytest.raises(InputError, match="per must be"):
        result.to_frame("token")


def test_sets_stand_side_by_side(pair, prompts, result) -> None:
    both = mixed({"<b>few": prompts[:1], "more": prompts[1:], "none": prompts[2:3]})
    found = tuco(pair, both, output_co=True)
    assert found.sets == ("<b>few", "more", "none", "more", "more") and found.texts == [TEXTS[i] for i in (0, 1, 2, 2, 3)]
    torch.testing.assert_close(found.tuco, result.tuco[[0, 1, 2, 2, 3]], **SIZES)
    means = {name: float(found.tuco[rows].mean()) for name, rows in found.by_set.items()}
    assert list(means.values()) == sorted(means.values(), reverse=True) and sorted(map(tuple, found.by_set.values())) == [
        (0,),
        (1, 3, 4),
        (2,),
    ]
    said = found.summary()
    assert said.startswith("Mean TuCo is ") and f"{means['more']:.3g} [" in said and "on more (n = 3)" in said
    assert f"{means['none']:.3g} on none (n = 1)" in said  # one prompt has no interval
    table, rows = found.to_frame(), found.to_frame("prompt")
    assert table.set.tolist() == [name for name in means for _ in range(3)]
    last = table[table.layer == 2].set_index("set").tuco
    assert last.to_dict() == pytest.approx(means) and rows.set.tolist() == list(found.sets)
    more = table[table.set == "more"].tuco.tolist()
    assert more == pytest.approx(result.cumulative[1:].mean(0).tolist(), rel=1e-4)
    assert found.strongest(2).set.tolist() == [found.sets[int(found.tuco.argmax())], found.sets[int(found.tuco.argmin())]]
    figures = found.figures()
    assert list(figures) == ["By prompt set", "By layer", "Layers alone"]
    *drawn, mean = figures["By prompt set"].data
    names = figures["By prompt set"].layout.yaxis.ticktext
    for box, label, members in zip(drawn, names, found.by_set.values(), strict=True):
        assert list(box.x) == found.tuco[members].tolist() and label.endswith(f"(n = {len(members)})")
    assert list(mean.x) == pytest.approx(list(means.values()))
    curves = {t.name: list(t.y) for t in figures["By layer"].data if t.name}
    assert curves["more"] == pytest.approx(more)
    page = found.html()
    assert "<b>few" not in page and "&lt;b&gt;few: TuCo" in page and page.count('class="tokens"') == 5
    assert page.startswith("<h3>The most and the least tuned prompts")


def test_sets_by_a_tag(pair) -> None:
    text = Prompts.of(pair, TEXTS)
    text = replace(text, tags={"kind": ("a", "b", "", "a")})
    found = tuco(pair, text, by="kind")
    assert found.sets == ("a", "b", "none", "a") and found.meta.settings["by"] == "kind" and not tuco(pair, text).sets
    with pytest.raises(InputError, match="told apart by 'king'; their tags: kind"):
        tuco(pair, text, by="king")


def test_positions(pair) -> None:
    ids = tuple(tuple(r) for r in ROWS)
    prompts = Prompts(tuple(map(str, ids)), ids, positions={"second": ((1,),) * 4, "two": ((0, 1),) * 4})
    found = tuco(pair, prompts, position="second")
    short = Prompts(tuple(map(str, ids)), tuple(row[:2] for row in ids))
    want = tuco(pair, short)
    torch.testing.assert_close(found.tuco, want.tuco, **SIZES)
    torch.testing.assert_close(found.beta, want.beta, **SIZES)  # what comes behind the scored position plays no part
    assert [len(t) for t in found.texts] == [len(t) for t in want.texts]
    with pytest.raises(InputError, match="no position 'third' in these prompts; they name last_prompt, second, two, END"):
        tuco(pair, prompts, position="third")
    with pytest.raises(InputError, match="names 2 tokens"):
        tuco(pair, prompts, position="two")
    with pytest.raises(InputError, match="norm is 'l0'"):
        tuco(pair, prompts, norm="l0")
    with pytest.raises(InputError, match="one text at a time"):
        tuco(pair, PromptPairs(prompts, prompts))


def test_along_a_given_answer(pair) -> None:
    ids = tuple(tuple(r) for r in ROWS)
    starts = (2, 1, 4, 1)
    whole = Prompts(
        tuple(map(str, ids)), ids, positions={"response": tuple(tuple(range(s, len(r))) for s, r in zip(starts, ids, strict=True))}
    )
    found = tuco(pair, whole)
    alone = tuco(pair, Prompts(tuple(map(str, ids)), tuple(row[:s] for s, row in zip(starts, ids, strict=True))))
    torch.testing.assert_close(found.tuco, alone.tuco, **SIZES)  # the last prompt token predicts the answer's first
    torch.testing.assert_close(found.beta, alone.beta, **SIZES)
    for row, (s, r) in enumerate(zip(starts, ids, strict=True)):
        each = [float(tuco(pair, Prompts(("x",), (r[:n],))).tuco) for n in range(s, len(r))]
        assert found.by_token[row, s - 1 : len(r) - 1].tolist() == pytest.approx(each, rel=1e-4)
        assert float(found.answer_tuco[row]) == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert "mean over the tokens of the answers" in found.summary() and "Along the answer" in found.figures()
    for where, why in (((), "is empty"), ((0,), "begins with its first token")):
        bad = Prompts(("x",), ((1, 2),), positions={"response": (where,)})
        with pytest.raises(InputError, match=f"the response of prompt 0 {why}"):
            tuco(pair, bad)


def test_along_its_own_answer(pair, prompts, result) -> None:
    found = tuco(pair, prompts, respond=4)
    new = pair.tuned.generate(prompts, 4)
    torch.testing.assert_close(found.tuco, result.tuco, **SIZES)
    for row, ids in enumerate(new):
        n = len(prompts.ids[row])
        assert found.ids[row, : n + len(ids)].tolist() == [*prompts.ids[row], *ids] and int(found.answer[row]) == (n if ids else -1)
    assert found.texts == TEXTS
    with pytest.raises(InputError, match="hold a response, which chat='plain' would make part of the question"):
        tuco(pair, Prompts(("x",), ((1, 2),), positions={"response": ((1,),)}), chat="plain")
    with pytest.raises(InputError, match="no response yet"):
        tuco(pair, Prompts(("x",), ((1, 2),), positions={"response": ((1,),)}), respond=2)


def test_chats(folder, pair) -> None:
    words = tokenizer("byte_level")
    words.chat_template = "{% for m in messages %}User: {{ m['content'] }}\nAssistant:{% endfor %}"
    chatting = ModelPair(pair.base, HookedModel.load(pair.tuned.wrapped.source, tokenizer=words))
    plain = Prompts.of(chatting.tuned, TEXTS[:2])
    wrapped = Prompts.of(chatting.tuned, [f"User: {t}\nAssistant:" for t in TEXTS[:2]])
    for form in ("template", "plain"):
        assert torch.equal(tuco(chatting, plain, chat=form).tuco, tuco(chatting, wrapped).tuco)
    with pytest.raises(InputError, match="already, and a chat template is applied once"):
        tuco(chatting, wrapped, chat="template")
    with pytest.raises(InputError, match="no chat template"):
        tuco(pair, plain, chat="template")


def test_a_resized_vocabulary(tmp_path) -> None:
    base, tuned = tiny("llama", 0), tiny("llama", 1, vocab_size=37)
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    rows = [[3, 36, 4], [2, 7]]
    found = tuco(pair, Prompts(("a", "b"), tuple(map(tuple, rows))), output_co=True)
    torch.testing.assert_close(found.tuco.float(), tuco_of(twin(base, tuned, rows)), **SIZES)
    assert found.output_co.isnan().tolist() == [True, False]  # base knows no token 36
    assert "x_0 and the unembedding are the tuned model's" in found.summary()


def test_half_precision_says_what_rounding_gives(folder, prompts, result) -> None:
    half = ModelPair.load(folder / "base", folder / "tuned", dtype="bfloat16")
    with pytest.warns(UserWarning, match="contains their rounding, which alone gives 0.00"):
        found = tuco(half, prompts)
    alone = float(found.rounding.mean())
    assert 1e-4 < alone < 0.05 and found.numerical_floor >= alone
    assert "rounding to half precision alone gives" in found.summary()
    torch.testing.assert_close(found.tuco, result.tuco, atol=3 * alone, rtol=0)
    same = ModelPair.load(folder / "base", folder / "base", dtype="bfloat16")
    with pytest.warns(UserWarning):
        assert not tuco(same, prompts).tuco.any()
    # Stored in bf16 there is no round trip to make: the same weights are computed in float32.
    stored = saved(tiny("llama").bfloat16(), folder.parent / "stored")
    model = HookedModel.load(stored)
    with pytest.warns(UserWarning):
        narrow = tuco(ModelPair(model, HookedModel.load(stored)), Prompts(("a",), ((3, 4, 5),)))
    assert not narrow.tuco.any() and 1e-4 < float(narrow.rounding) < 0.05


# ---------------------------------------------------------------------------------- its components


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_components_sum_to_tuco(kind, norm) -> None:
    pair, ids = pair_of(kind), tuple(map(tuple, ROWS))
    prompts = Prompts(tuple(map(str, ids)), ids)
    found, whole = tuco_components(pair, prompts, norm=norm), tuco(pair, prompts, norm=norm)
    torch.testing.assert_close(found.tuco, whole.tuco, **SIZES)
    torch.testing.assert_close(found.shares.sum(1), found.tuco, **SIZES)
    torch.testing.assert_close(sum(found.by_kind().values()), found.tuco, **SIZES)
    assert float(found.closure.max()) < 1e-5 and found.shares.shape == (4, 3 * 4 + 9)
    assert bool(found.mlp_through.any()) == (kind != "neox")
    one = tuco_components(pair, prompts[2:3], norm=norm)
    torch.testing.assert_close(one.shares[0], found.shares[2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "head", "want"), [("W_O", 2, "L1H2"), ("W_V", 3, "L1H3"), ("W_out", None, "L1 MLP"), ("W_in", None, "L1 MLP")]
)
def test_components_find_what_was_planted(folder, pair, prompts, tmp_path, module, head, want) -> None:
    edit = planted("module_only", pair.base, layer=1, module=module, rel=0.5, head=head)
    tuned = HookedModel.load(pair.base.save(tmp_path / "planted", edit=edit))
    found = tuco_components(ModelPair(pair.base, tuned), prompts)
    table = found.to_frame().set_index("part")
    changed = set(table.index[table.effect.abs() > 1e-6])
    through = {"L1 MLP through attention"} if head is not None else set()
    group = {"L1H3", "L1H2"} if module == "W_V" else {want}  # a value head is shared by its group
    assert changed == group | through
    assert found.strongest(3).part[0] in group | through and (want in found.summary() or head is not None)
    assert table.of_tuco.sum() == pytest.approx(1, abs=1e-5)


def test_components_of_equal_models_are_zero(pair, prompts) -> None:
    found = tuco_components(ModelPair(pair.base, pair.base), prompts)
    assert not found.shares.any() and not found.closure.any()
    assert found.to_frame().of_tuco.isna().all() and (found.to_frame().p == 1).all()
    assert len(found.to_frame("prompt")) == 4 * found.shares.shape[1]
    with pytest.raises(InputError, match="one at a time"):
        lazy = ModelPair(pair.base, pair.base)
        lazy.one_at_a_time = True
        tuco_components(lazy, prompts)


def test_norms_behind_sublayers() -> None:
    import transformers
    from tiny_checkpoints import GQA, randomised

    config = transformers.Gemma2Config(**GQA, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    base, tuned = (randomised(transformers.Gemma2ForCausalLM(config), seed) for seed in (0, 1))
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    prompts = Prompts(("a", "b"), tuple(map(tuple, ROWS[:2])))
    found = tuco(pair, prompts)
    torch.testing.assert_close(found.tuco.float(), tuco_of(twin(base, tuned, ROWS[:2])), **SIZES)
    parts = tuco_components(pair, prompts)
    assert parts.head is None and "heads are not told apart" in parts.summary()
    torch.testing.assert_close(parts.shares.sum(1), found.tuco, **SIZES)


# ---------------------------------------------------------------------------------- scaled tuning


@pytest.mark.parametrize("kind", FOUR)
def test_scaled_is_the_literal_loop(kind) -> None:
    base, tuned = tiny(kind, 0), tiny(kind, 1)
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    for alpha in (0.0, 0.75, 1.25, (1.5, 0.0, -0.5)):
        want = twin(base, tuned, ROWS, alphas=alpha if isinstance(alpha, tuple) else (alpha,) * 3)["logits"]
        got = pair.scaled(alpha).logits(ROWS)
        for row, ids in enumerate(ROWS):
            torch.testing.assert_close(got[row, : len(ids)], want[row, -len(ids) :], atol=32 * EPS * float(want.abs().max()), rtol=0)
        torch.testing.assert_close(pair.scaled(alpha).logits(ROWS, at="END"), want[:, -1], atol=32 * EPS * float(want.abs().max()), rtol=0)
    one = pair.tuned.logits(ROWS)
    torch.testing.assert_close(pair.scaled(1).logits(ROWS), one, atol=8 * EPS * float(one.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", FOUR)
def test_alpha_0_is_base_where_embedding_and_head_are_shared(kind) -> None:
    base, tuned = tiny(kind, 0), tiny(kind, 1)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if not any(part.isdigit() for part in name.split(".")):
                p.copy_(base.get_parameter(name))
    pair = ModelPair(HookedModel.load(base), HookedModel.load(tuned))
    want = pair.base.logits(ROWS)
    torch.testing.assert_close(pair.scaled(0).logits(ROWS), want, atol=8 * EPS * float(want.abs().max()), rtol=0)
    assert pair.scaled(0).generate(ROWS[:2], 5) == pair.base.generate(ROWS[:2], 5)


@pytest.mark.parametrize("kind", FOUR)
def test_generation_with_two_caches_is_that_without(kind) -> None:
    pair, rows = pair_of(kind), ROWS[:2]
    for alpha in (0.6, (0.0, 2.0, 1.0)):
        scaled = pair.scaled(alpha)
        got = scaled.generate(rows, 6, stop=())
        longer = [[*row, *new] for row, new in zip(rows, got, strict=True)]
        for row, new, logits in zip(rows, got, scaled.logits(longer), strict=True):
            assert logits[len(row) - 1 : len(row) + 5].argmax(-1).tolist() == new
    assert pair.scaled(1).generate(rows, 6) == pair.tuned.generate(rows, 6)
    assert pair.scaled(0.5).generate(rows, 3, temperature=1.0, seed=3) == pair.scaled(0.5).generate(rows, 3, temperature=1.0, seed=3)


def test_both_caches_are_filled_from_the_scaled_stream(monkeypatch) -> None:
    from transformers import DynamicCache

    pair = pair_of("llama")
    scaled = pair.scaled(0.6)
    made = []

    class Watched(DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("transformers.DynamicCache", Watched)
    new = scaled.generate([ROWS[0]], 3, stop=())[0]
    theirs, own = made[-1], made[-2]
    assert own.get_seq_length() == theirs.get_seq_length() == len(ROWS[0]) + 2
    # The keys of a prompt and its continuation in one pass.
    part_cache = DynamicCache()
    from interp.models import Batch
    from interp.models.interventions import Part

    with torch.no_grad():
        scaled.forward(Part.of(Batch.of([[*ROWS[0], *new[:2]]])), cache=part_cache)
    for layer in range(3):
        torch.testing.assert_close(own.layers[layer].keys, part_cache.layers[layer].keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.layers[layer].keys, scaled._twin(part_cache).layers[layer].keys, atol=1e-5, rtol=1e-5)


def test_a_scaled_pair_says_what_it_can_do(folder, pair) -> None:
    scaled = pair.scaled(0.5)
    assert scaled.tokens("The ring") == pair.tuned.tokens("The ring") and scaled.shape.n_ctx == pair.shape.n_ctx
    assert scaled.fingerprint != pair.scaled(0.6).fingerprint and "0.5 x (tuned - base)" in scaled.name
    for verb in ("capture", "gradients", "patched", "edited", "weight", "save", "run_on"):
        with pytest.raises(InputError, match=f"a scaled pair cannot {verb}; it has batch, tokens"):
            getattr(scaled, verb)("The ring", "L0.z")
    with pytest.raises(AttributeError):
        _ = scaled.nothing
    for alpha in ("much", None, True, (1.0,), (1, 2, "x"), float("nan"), {}, [[1, 2, 3]]):
        with pytest.raises(InputError, match="alpha is a finite number or one for each of 3 layers"):
            pair.scaled(alpha)
    lazy = ModelPair.load(folder / "base", folder / "tuned", load="one at a time")
    with pytest.raises(InputError, match="one at a time"):
        lazy.scaled(1)
    assert all(not any("forward" in b.__dict__ for b in m.wrapped.bridge.blocks) for m in (pair.base, pair.tuned))


def test_tasks_score_a_scaled_pair() -> None:
    pair = ModelPair.load("base", "boxes-lora")
    boxes = task("boxes")
    prompts = boxes.generate(pair, 6, seed=1)
    for alpha, model in ((0, pair.base), (1, pair.tuned)):
        assert torch.equal(boxes.score(pair.scaled(alpha), prompts), boxes.score(model, prompts))


def test_an_edit_of_weights_counts_as_tuning(pair, prompts) -> None:
    edit = planted("module_only", pair.tuned, layer=2, module="W_O", rel=0.3)
    before = tuco(pair, prompts).tuning_layer
    with pair.tuned.edited(edit):
        assert bool((tuco(pair, prompts).tuning_layer[:, 2] > 0).all())
    assert torch.equal(tuco(pair, prompts).tuning_layer, before)
