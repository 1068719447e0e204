"""Texts of two models against a plain loop on Hugging Face models, amplification against its formula, and what may go wrong."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from tiny_pairs import save_pair

from interp.analyses import completions as home
from interp.analyses.completions import CompletionsResult, completions
from interp.edits import ActivationChange, Edit
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models.contrast import amplified, first_difference, partings, reread
from interp.organisms import planted
from interp.prompts import PromptPairs, Prompts
from interp.sites import Site

# 5 prompts of up to 9 tokens, two of a length; 6 new tokens, 31 token ids, 3 layers, 4 heads
ROWS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18, 19, 20], [21, 22]]
NEW = 6
TUNED_ENDS = (5, 7, 13, 19, 25)
LIGHT: dict[str, Any] = {"new_tokens": NEW, "amplification": (1.5, -0.5), "samples": 2, "seed": 3}
LEAST = LIGHT | {"samples": 1, "amplification": (1.5,)}


def prompts(rows: list[list[int]] = ROWS, **more: Any) -> Prompts:
    return Prompts(tuple(str(r) for r in rows), tuple(tuple(r) for r in rows), **more)


def shaken(model: Any, seed: int = 0, size: float = 0.1) -> Any:
    tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p += size * torch.randn(p.shape, generator=draws, dtype=torch.float64).to(p.dtype)
    return tuned


def two(kind: str, **changes: Any) -> tuple[Any, Any]:
    """Plain models in float64 that end at different tokens, some of which come up."""
    base: Any = tiny(kind, seed=1, **changes).double()
    tuned = shaken(base)
    base.generation_config.eos_token_id, tuned.generation_config.eos_token_id = 2, list(TUNED_ENDS)
    return base, tuned


def slow(sides: tuple[Any, Any], prompt: list[int], row: int, *, side: int, seed: int | None = None, a: float = 0.0, gate: float = 0.0):
    """One text, a whole forward of both models per token; returns ids, log-probabilities of both, and the end token."""
    ids, scores, ends = list(prompt), [], ({2}, TUNED_ENDS)[side]
    for step in range(NEW):
        with torch.no_grad():
            logits = [m(torch.tensor([ids])).logits[0, -1].double() for m in sides]
        base, tuned = (x.log_softmax(-1) for x in logits)
        wanted = (base, tuned)[side]
        if a or gate:
            leaning = (base if a < 0 else tuned).exp()
            wanted = tuned + a * (tuned - base)
            wanted[leaning < gate * leaning.max()] = -math.inf
        if seed is None:
            new = int(wanted.argmax())
        else:
            stream = torch.Generator().manual_seed(hash((seed, row, step)) & (2**63 - 1))
            new = int(torch.multinomial((wanted / 0.8).softmax(-1), 1, generator=stream))
        if new in ends:
            return ids[len(prompt) :], scores, new
        ids.append(new)
        scores.append((float(base[new]), float(tuned[new])))
    return ids[len(prompt) :], scores, -1


@pytest.mark.parametrize("kind", FOUR)
def test_every_text_is_that_of_a_plain_loop(kind: str) -> None:
    plain = two(kind)
    rows = [ROWS[1], ROWS[4]] if kind == "gpt2" else ROWS[2:4]  # of equal length, and not
    got = completions(ModelPair.load(*plain), prompts(rows), temperature=0.8, **LIGHT)
    ways: dict[str, dict[str, Any]] = {"base greedy": {"side": 0}, "tuned greedy": {"side": 1}}
    for k, seed in enumerate((3, 3 + 2**32), 1):
        ways |= {f"{s} sampled #{k}": {"side": i, "seed": seed} for i, s in enumerate(("base", "tuned"))}
        ways[f"tuned gated #{k}"] = {"side": 1, "seed": seed, "gate": 0.1}
        ways |= {f"amplified by {a:g} #{k}": {"side": 1, "seed": seed, "a": a, "gate": 0.1} for a in (1.5, -0.5)}
    assert set(ways) == set(got.labels["text"])
    ended = 0
    for text, name in enumerate(got.labels["text"]):
        for row, ids in enumerate(rows):
            want, scores, end = slow(plain, ids, row, **ways[name])
            assert got.ids[text, row].tolist() == want + [-1] * (NEW - len(want)), (name, row)
            assert int(got.end[text, row]) == end
            logp = got.logp[:, text, row, : len(want)].T.double()
            torch.testing.assert_close(logp, torch.tensor(scores, dtype=torch.float64).reshape(-1, 2), atol=2e-6, rtol=1e-6)
            assert got.logp[:, text, row, len(want) :].isnan().all()
            ended += end >= 0
    assert 0 < ended < got.end.numel() and len({tuple(t.flatten().tolist()) for t in got.ids}) > 6


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    base = tiny("llama", seed=3)
    return base, shaken(base)


@pytest.fixture(scope="module")
def pair(plain: tuple[Any, Any]) -> ModelPair:
    return ModelPair.load(*plain)


@pytest.fixture(scope="module")
def result(pair: ModelPair) -> CompletionsResult:
    return completions(pair, prompts(), **LIGHT)


def test_plain_samples_and_amplification_0_are_generates(pair: ModelPair) -> None:
    got = completions(pair, prompts(), new_tokens=NEW, amplification=(0.0,), gate=0.9, seed=5)
    written = {name: [[i for i in row if i >= 0] for row in got.ids[t].tolist()] for t, name in enumerate(got.labels["text"])}
    assert "tuned gated" not in got.kinds  # nothing is gated here
    for side, model in pair.sides():
        assert written[f"{side} greedy"] == model.generate(prompts(), NEW)
        for k in range(2):
            assert written[f"{side} sampled #{k + 1}"] == model.generate(prompts(), NEW, temperature=1.0, seed=5 + k * 2**32)
    assert written["amplified by 0 #1"] == written["tuned sampled #1"] and written["amplified by 0 #2"] == written["tuned sampled #2"]
    assert written["tuned sampled #1"] != written["tuned sampled #2"] and written["base greedy"] != written["tuned greedy"]


def test_s_sums_to_the_difference_of_losses(plain: tuple[Any, Any], result: CompletionsResult) -> None:
    """Teacher-forced by Hugging Face on the whole text at once."""
    for text in range(len(result.kinds)):
        for row, prompt in enumerate(ROWS):
            new = [i for i in result.ids[text, row].tolist() if i >= 0]
            if new:
                ids = torch.tensor([prompt + new])
                labels = torch.tensor([[-100] * len(prompt) + new])
                with torch.no_grad():
                    base, tuned = (float(m(ids, labels=labels).loss) * len(new) for m in plain)
                assert float(result.s[text, row].nansum()) == pytest.approx(base - tuned, abs=1e-4)
    frame = result.to_frame().set_index("kind")
    tokens = result.s[[t for t, k in enumerate(result.kinds) if k == "tuned sampled"]]
    assert frame.s["tuned sampled"] == pytest.approx(float(tokens.nanmean()), abs=1e-6)
    nll = -result.logp[0, 0]
    assert frame.base_perplexity["base greedy"] == pytest.approx(float(nll.nanmean().exp()), rel=1e-5)
    assert (frame.s_low <= frame.s).all() and (frame.s <= frame.s_high).all() and frame.s["amplified by 1.5"] > frame.s["tuned gated"]


def test_base_against_base_is_no_difference(plain: tuple[Any, Any]) -> None:
    same = completions(ModelPair.load(plain[0], copy.deepcopy(plain[0])), prompts(), **LIGHT)
    assert same.s.nan_to_num(0.0).abs().max() == 0 and same.same.all() and not same.differs
    assert same.summary().startswith("No difference beyond rounding: both models write the same greedy text behind 100%")
    for k in range(2):
        base, tuned = (same.labels["text"].index(f"{s} sampled #{k + 1}") for s in ("base", "tuned"))
        assert torch.equal(same.ids[base], same.ids[tuned])
    assert 0 <= same.numerical_floor < 1e-4 and (same.rereading == -1).all() and same.parting.isnan().all()
    assert same.to_frame().same_as_base.dropna().iloc[:2].tolist() == [1, 1] and "Both write the same" in same.html()


@pytest.mark.parametrize("through", ["b_U", pytest.param("W_U", marks=pytest.mark.full)])
def test_a_planted_logit_dominates_what_is_amplified(through: Any) -> None:
    """The logit of token 9 rises by 2: s is 2 - log Z at it and - log Z elsewhere, and amplified by 4 it has 10 more than base gives."""
    source = tiny("gpt2", seed=5, tie_word_embeddings=False)
    model, other = HookedModel.load(source), HookedModel.load(source)
    with other.edited(planted("token_logit", other, token=9, c=2.0, through=through)):
        got = completions(ModelPair.load(model, other), prompts(), new_tokens=NEW, samples=4, amplification=(4.0,), gate=0.0)
    share = {k: float((got.ids[[i for i, x in enumerate(got.kinds) if x == k]] == 9).double().mean()) for k in got.kinds}
    assert share["amplified by 4"] > 0.9 > 0.6 > share["tuned sampled"] > share["base sampled"]
    where, scored = got.ids == 9, ~got.s.isnan()
    # s = c [token is 9] - log Z, Z = 1 + p_base(9) (e^c - 1): what is written at 9 tells Z, and the rest is below 0
    z = 1 + got.logp[0].exp() * (math.exp(2.0) - 1)
    torch.testing.assert_close(got.s[where], (2.0 - z.log())[where], atol=1e-5, rtol=1e-5)
    assert bool((got.s[scored & ~where] < 0).all()) and "tuned gated" not in got.kinds


def test_the_formula_of_amplification() -> None:
    base, tuned = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([[0.4, 0.2, 0.38, 0.02]]).log()
    plain = amplified(tuned + 3, base, tuned, 2.0).softmax(-1)  # logits are known up to a constant
    want = tuned.exp() * (tuned - base).mul(2).exp()
    torch.testing.assert_close(plain, want / want.sum())
    gated = amplified(tuned, base, tuned, 2.0, gate=0.25).softmax(-1)  # 0.25 * 0.4: the last does not pass
    want[0, 3] = 0
    torch.testing.assert_close(gated, want / want.sum())
    towards = amplified(tuned, base, tuned, -1.0, gate=0.25).softmax(-1)  # base's gate: 0.25 * 0.5
    torch.testing.assert_close(towards, torch.tensor([[0.5, 0.3, 0.15, 0.0]]) / 0.95)
    never = amplified(tuned, torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log(), tuned, 1.0)
    assert never.isfinite().all()


def test_tokens_that_only_tuned_knows_keep_their_probability() -> None:
    """Ids 2 and 3 are tuned's own; 3 ends texts and keeps its 0.3, the shared ones share the 0.6 that they have, 2 is never drawn."""
    full = torch.tensor([[0.45, 0.15, 0.1, 0.3]]).log()
    tuned, base = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    got = amplified(full, base, tuned, 1.0, own=[3]).exp()
    shared = torch.tensor([0.75 * 1.5, 0.25 * 0.5]) / (0.75 * 1.5 + 0.25 * 0.5) * 0.6
    torch.testing.assert_close(got, torch.tensor([[*shared.tolist(), 0.0, 0.3]]))
    lost = torch.tensor([[0.05, 0.05, 0.8, 0.1]]).log()  # the most likely token cannot be drawn, and opens no gate
    assert amplified(lost, base, base, 1.0, gate=0.9, own=[3]).isfinite().tolist() == [[False, False, False, True]]


def wider(source: Any, rows: int) -> Any:
    """The same model with more token ids."""
    larger = tiny("llama", seed=9, vocab_size=rows)
    with torch.no_grad():
        for (name, to), value in zip(larger.named_parameters(), source.parameters(), strict=True):
            (to[: len(value)] if "embed" in name or "lm_head" in name else to).copy_(value)
    return larger


def test_more_token_ids_in_the_tuned_model(plain: tuple[Any, Any]) -> None:
    """Tuned has 3 ids more: 31 and 33 come up in its texts, 32 ends them."""
    larger = wider(plain[1], 34)
    larger.generation_config.eos_token_id = 32
    pair = ModelPair.load(plain[0], larger)
    got = completions(pair, prompts(), new_tokens=8, samples=6, amplification=(1.0,), gate=0.0)
    assert got.shared == 31 and got.vocabulary[32] == "<32>"
    found = {kind: got.ids[[i for i, k in enumerate(got.kinds) if k == kind]] for kind in got.kinds}
    assert (found["tuned sampled"] > 30).any() and (found["base sampled"] < 31).all() and (found["amplified by 1"] < 31).all()
    own = got._texts("amplified by 1")
    assert (got.end[own] == 32).any() and (got.end[: 2 + 6] != 32)[[0, 2, 3]].all()
    assert [[i for i in row if i >= 0] for row in got.ids[got._texts("tuned sampled")[0]].tolist()] == pair.tuned.generate(
        prompts(), 8, temperature=1.0
    )
    unknown = (got.ids > 30).int().cumsum(2) > 0
    there = got.ids >= 0
    assert got.logp[0][unknown & there].isnan().all() and not got.logp[0][~unknown & there].isnan().any()
    assert not got.logp[1][there & (got.ids < 31)].isnan().any() and got.end_logp[:, own].isnan().sum() >= (got.end[own] == 32).sum()
    with torch.no_grad():  # what tuned thinks behind a token that base does not know
        text, row = next((t, r) for t, r in unknown.any(2).nonzero().tolist() if bool(there[t, r, 1:][unknown[t, r, :-1]].any()))
        ids = [i for i in got.ids[text, row].tolist() if i >= 0]
        logp = larger(torch.tensor([ROWS[row] + ids])).logits[0, len(ROWS[row]) - 1 : -1, :31].log_softmax(-1)
    for i, token in enumerate(ids):
        if token < 31:
            assert float(got.logp[1, text, row, i]) == pytest.approx(float(logp[i, token]), abs=1e-5)
    assert got.differs and got.html() and "\n" not in got.summary()


@pytest.mark.full
def test_fewer_token_ids_in_the_tuned_model(plain: tuple[Any, Any]) -> None:
    got = completions(ModelPair.load(wider(plain[0], 34), plain[1]), prompts(ROWS[:2]), new_tokens=8, samples=6)
    kinds = torch.tensor([k.startswith("base") for k in got.kinds])
    assert (got.ids[kinds] > 30).any() and (got.ids[~kinds] < 31).all()
    assert not got.logp[0][(got.ids >= 0) & (got.ids < 31)].isnan().any()


def test_one_text_at_a_time_changes_nothing(plain: tuple[Any, Any], result: CompletionsResult) -> None:
    small = ModelPair.load(*plain)
    small.base._budget.size = small.tuned._budget.size = 1
    again = completions(small, prompts(ROWS[:2]), **LEAST)
    for text, name in enumerate(again.labels["text"]):
        same = result.labels["text"].index(name)
        assert torch.equal(again.ids[text], result.ids[same, :2]) and torch.equal(again.end[text], result.end[same, :2])
        torch.testing.assert_close(again.logp[:, text], result.logp[:, same, :2], atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.full
def test_memory_that_runs_out_is_met_with_fewer_texts(
    plain: tuple[Any, Any], result: CompletionsResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp.models import contrast

    poor, read, sizes = ModelPair.load(*plain), contrast._Reader.read, []

    def greedy_for_memory(self: Any, ids: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 9 and len(sizes) % 3 == 0:  # in the middle of a text
            raise MemoryError
        return read(self, ids)

    monkeypatch.setattr(contrast._Reader, "read", greedy_for_memory)
    again = completions(poor, prompts(ROWS[:2]), **LIGHT)
    assert torch.equal(again.ids, result.ids[:, :2]) and torch.equal(again.end, result.end[:, :2]) and max(sizes) > 9


def test_edits_in_force_hold_while_texts_are_written(plain: tuple[Any, Any]) -> None:
    """Also those that hold on new tokens only, and those at a position of the prompt."""
    base, other = HookedModel.load(plain[0]), HookedModel.load(plain[0])
    vector = torch.linspace(-2, 2, 24)
    for change in (ActivationChange(Site("resid_post", 1), "add", vector, "new"), ActivationChange(Site("resid_post", 1, position="END"), "add", vector, "prompt")):  # fmt: skip  # noqa: E501
        with other.edited(Edit((change,))):
            got = completions(ModelPair.load(base, other), prompts(ROWS[:3]), new_tokens=NEW, samples=1, amplification=())
            want = other.generate(prompts(ROWS[:3]), NEW, temperature=1.0)
        text = got.labels["text"].index("tuned sampled #1")
        assert [[i for i in row if i >= 0] for row in got.ids[text].tolist()] == want
        assert got.differs and got.numerical_floor < 1e-4 and (got.rereading == -1).all()


@pytest.mark.parametrize("ends", [None, [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30]])
def test_where_the_greedy_texts_part(plain: tuple[Any, Any], ends: list[int] | None) -> None:
    """Also where base ends its text and tuned goes on."""
    models = (copy.deepcopy(plain[0]), plain[1])
    models[0].generation_config.eos_token_id = ends
    result = completions(ModelPair.load(*models), prompts(), new_tokens=NEW, samples=0)
    assert bool((result.end[0] >= 0).any()) == bool(ends)
    for row, prompt in enumerate(ROWS):
        texts = [[i for i in result.ids[side, row].tolist() if i >= 0] for side in range(2)]
        at = next((i for i in range(NEW) if texts[0][i : i + 1] != texts[1][i : i + 1]), -1)
        assert int(result.parted[row]) == at
        if at < 0:
            assert result.parting[:, :, row].isnan().all()
            continue
        tokens = [texts[side][at] if at < len(texts[side]) else int(result.end[side, row]) for side in range(2)]
        for side, model in enumerate(models):
            with torch.no_grad():
                logp = model(torch.tensor([prompt + texts[0][:at]])).logits[0, -1].log_softmax(-1)
            assert result.parting[side, :, row].tolist() == pytest.approx(logp[tokens].tolist(), abs=1e-5)
            assert result.parting[side, side, row] >= result.parting[side, 1 - side, row]
    assert not result.same.all() and (result.rereading == -1).all()
    assert ("base ends" in result.html()) == bool(ends)


def test_another_reading_sees_what_a_model_would_not_write(pair: ModelPair, result: CompletionsResult) -> None:
    ids = torch.where(result.ids[0] < 0, 0, result.ids[0])
    wrong = torch.where(torch.arange(NEW) == 2, (ids + 1) % 31, ids)
    again = reread((pair.base, pair.tuned), 31, pair.batch(prompts()), wrong, wrong[None], "base")
    assert (again.top[0][:, 2] != wrong[:, 2]).all()
    found = partings(pair, pair.batch(prompts()), torch.stack([wrong, wrong]), torch.full((2, 5), -1), torch.zeros(2, 2, 5, NEW))
    assert (found.rereading[0] >= 0).all() and (found.rereading[0] <= 2).all() and (found.parted == -1).all() and (found.floor > 0.1).all()


def test_first_differences() -> None:
    one = torch.tensor([[1, 2, 3], [1, -1, -1], [4, 5, -1], [6, 7, 8]])
    other = torch.tensor([[1, 2, 3], [1, 9, -1], [4, 5, -1], [0, 7, 8]])
    assert first_difference(one, other).tolist() == [-1, 1, -1, 0]


def test_repeated_bigrams() -> None:
    """1 2 1 2: pairs 12, 21, 12, of which two differ; a single token has no pair."""
    ids = torch.tensor([[[1, 2, 1, 2], [3, -1, -1, -1], [4, 5, 6, -1]]])
    assert home._new_bigrams(ids)[0].tolist() == pytest.approx([2 / 3, math.nan, 1.0], nan_ok=True)


def test_ties_within_rounding_are_said(result: CompletionsResult) -> None:
    tied = replace(result, parting=torch.zeros_like(result.parting), floor=torch.full_like(result.floor, 1e-3))
    assert tied.ties.all() and "at ties within rounding" in tied.summary() and "A tie within rounding" in tied.html()
    assert not result.ties.any() and "ties" not in result.summary()


def test_prompts_of_a_context_are_one_observation(pair: ModelPair) -> None:
    rows = [ROWS[0], ROWS[1], ROWS[0], ROWS[1]]
    whole = completions(pair, prompts(rows, contexts=("a", "b", "c", "d")), new_tokens=3, samples=0)
    paired = completions(pair, prompts(rows, contexts=("a", "b", "a", "b")), new_tokens=3, samples=0)
    once = completions(pair, prompts(rows[:2]), new_tokens=3, samples=0)
    assert paired._share(paired.same) == once._share(once.same) != whole._share(whole.same)
    for kind in ("base greedy", "tuned greedy"):
        assert str(paired.interval(kind)) == str(once.interval(kind))


def test_tables_sentence_and_figures(result: CompletionsResult) -> None:
    text = result.summary()
    share = float(result.same.double().mean())
    assert text.startswith(f"Both models write the same greedy text behind {share:.0%} [") and "\n" not in text
    per = result.to_frame(per="prompt")
    assert len(per) == 5 * len(result.kinds) and per.written.str.contains("<").any()
    assert set(per.kind) == set(result.to_frame().kind) and (per[per.kind.str.startswith("base")].parts_from_base == -1).all()
    with pytest.raises(InputError, match="per must be 'prompt'"):
        result.to_frame(per="token")
    drawn = result.figures()
    assert list(drawn) == ["How long they say the same", "Whose text is it"]
    lines: Any = drawn["How long they say the same"].data
    curve = next(t for t in lines if t.name == "greedy")
    assert curve.y[0] == 1 and float(curve.y[-1]) == pytest.approx(share)
    assert float(curve.y[1]) == pytest.approx(float((result.parted != 0).double().mean()))
    with pytest.raises(InputError, match="there are no texts of the kind 'tuned'"):
        result.interval("tuned")


def test_the_page_escapes_everything(result: CompletionsResult) -> None:
    nasty = {k: f"<script>{k}</script>&\n" for k in result.vocabulary}
    page = replace(result, vocabulary=nasty, prompts=("<img src=x onerror=1>",) * 5).html()
    assert "<script>" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert page.count("<h4>") == 5 and page.count("<div") == page.count("</div>") and page.count("<span") == page.count("</span>")
    assert not re.search(r"nan%|nan nats", page)


def test_round_trip(tmp_path: Any, result: CompletionsResult) -> None:
    again = CompletionsResult.load(result.save(tmp_path / "r"))
    assert again.summary() == result.summary() and again.html() == result.html() and again.said == result.said
    assert again.meta.settings["amplification"] == [1.5, -0.5] and again.meta.seed == 3


def test_words_of_a_tokenizer(tmp_path: Any) -> None:
    pair = ModelPair.load(*save_pair(tmp_path))
    asked = Prompts.of(pair, ["The ring is", "Bob went to the museum 🙂 <b>"])
    got = completions(pair, PromptPairs(asked, asked), new_tokens=5, samples=1)
    assert got.prompts == asked.texts and got.said["tuned greedy"][0] == pair.decode([i for i in got.ids[1, 0].tolist() if i >= 0])
    assert "&lt;b&gt;" in got.html() and "🙂" in got.html()


def test_one_prompt_of_one_token(pair: ModelPair) -> None:
    tiniest = completions(pair, prompts([[5]]), new_tokens=1, samples=0)
    assert tiniest.kinds == ("base greedy", "tuned greedy") and "1 prompt (" in tiniest.summary() and "nan" not in tiniest.summary()
    assert tiniest.figures() and tiniest.html() and len(tiniest.to_frame(per="prompt")) == 2


def test_models_that_end_at_once(plain: tuple[Any, Any]) -> None:
    base, tuned = (copy.deepcopy(m) for m in plain)
    base.generation_config.eos_token_id = tuned.generation_config.eos_token_id = list(range(31))
    mute = completions(ModelPair.load(base, tuned), prompts(), new_tokens=4)
    assert (mute.ids == -1).all() and (mute.end >= 0).all() and mute.same.all() and "no tokens to score" in mute.summary()
    assert mute.figures() and mute.html() and mute.to_frame().tokens.sum() == 0


def test_half_precision(plain: tuple[Any, Any]) -> None:
    base = copy.deepcopy(plain[0]).bfloat16()
    got = completions(ModelPair.load(base, shaken(base)), prompts(ROWS[:3]), **LEAST)
    assert got.logp.dtype == torch.float32 and 1e-3 < got.numerical_floor < 0.5 and not got.half
    assert not completions(ModelPair.load(base, copy.deepcopy(base)), prompts(ROWS[:2]), new_tokens=2, samples=1).differs
    wide = copy.deepcopy(base).float()  # the floor of bfloat16 is what rounding does to the text of base, by Hugging Face
    for row, prompt in enumerate(ROWS[:3]):
        new = [i for i in got.ids[0, row].tolist() if i >= 0]
        with torch.no_grad():
            logits = wide(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0]
        assert got.floor[0, row] >= (logp - got.logp[0, 0, row, : len(new)]).abs().max() - 1e-5


@pytest.mark.full
def test_a_difference_made_by_rounding_is_none(plain: tuple[Any, Any]) -> None:
    """The same weights in float32 and in bfloat16: what the texts tell apart is rounding."""
    base = copy.deepcopy(plain[0]).bfloat16()
    got = completions(ModelPair.load(base.float(), copy.deepcopy(base).bfloat16()), prompts(ROWS[:3]), new_tokens=NEW, samples=0)
    assert got.s.abs().nan_to_num(0.0).max() > 1e-4 and not got.differs


def test_the_floor_says_what_it_lacks(plain: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base = copy.deepcopy(plain[0]).bfloat16()
    monkeypatch.setattr(HookedModel, "in_dtype", lambda self, dtype: None)
    got = completions(ModelPair.load(base, shaken(base)), prompts(ROWS[:2]), **LEAST)
    assert got.half and "lacks what half precision rounds" in got.summary()


def test_nan_is_said(plain: tuple[Any, Any]) -> None:
    broken = copy.deepcopy(plain[0])
    pair = ModelPair.load(broken, plain[1])
    pair.base.logits([[3]])
    with torch.no_grad():
        broken.lm_head.weight[4] = torch.nan
    with pytest.raises(InputError, match="computes NaN behind prompt 2"):
        completions(pair, prompts(), new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"new_tokens": 0}, "new_tokens is a whole number from 1, but it is 0"),
        ({"samples": -1}, "samples is a whole number from 0, but it is -1"),
        ({"temperature": 0}, "temperature must be above 0, but it is 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"amplification": "x"}, "amplification is a tuple of numbers"),
        ({"amplification": (1, 1.0)}, "amplification names a value twice"),
        ({"amplification": (math.inf,)}, "amplification is a tuple of numbers"),
        ({"gate": 1.5}, "gate is a share of the highest probability, from 0 to 1, but it is 1.5"),
        ({"new_tokens": 11}, "the longest prompt and 11 new tokens make 20"),
    ],
)
def test_refusals(pair: ModelPair, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        completions(pair, prompts(), **settings)


def test_models_loaded_one_at_a_time_are_refused(plain: tuple[Any, Any]) -> None:
    split = ModelPair.load(*plain)
    split.one_at_a_time = True
    with pytest.raises(InputError, match="needs both models at once"):
        completions(split, prompts())
