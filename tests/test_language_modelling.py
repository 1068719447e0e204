"""Perplexity by both rules and the agreement of rankings, beside plain loops over single texts."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_checkpoints import FOUR, tiny
from tiny_pairs import save_pair

import interp
from interp.errors import InputError
from interp.models import HookedModel, ModelPair
from interp.models.batch import Batch
from interp.sweeps import language


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> ModelPair:
    return ModelPair.load(*save_pair(tmp_path_factory.mktemp("pair")))


def plain_losses(hf, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logp = hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1)]


def plain_ndcg(reference: list[int], ranked: list[int]) -> float:
    gain = {token: len(reference) - r for r, token in enumerate(reference)}
    got = sum(gain.get(token, 0) / math.log2(r + 2) for r, token in enumerate(ranked))
    return got / sum(g / math.log2(r + 2) for r, g in enumerate(gain.values()))


@pytest.mark.parametrize("kind", FOUR)
def test_losses_are_those_of_every_text_alone(kind: str) -> None:
    hf = tiny(kind)
    model = HookedModel.load(hf)
    rows = [torch.randint(31, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 2, 9, 13, 3)]
    found = language.block_losses(model, Batch.of(rows))
    plain = [plain_losses(hf, row) for row in rows]
    assert found.tolist() == pytest.approx([sum(x) / len(x) for x in plain], abs=1e-5)
    tokens = torch.tensor([len(x) for x in plain])
    each = [x for row in plain for x in row]
    assert float(language.perplexity(found, tokens)) == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-5)
    means = [sum(x) / len(x) for x in plain]
    assert float(language.mean_block_perplexity(found)) == pytest.approx(sum(map(math.exp, means)) / 5, rel=1e-5)


def test_the_two_perplexities_of_two_blocks() -> None:
    loss, tokens = torch.tensor([math.log(2.0), math.log(8.0)], dtype=torch.float64), torch.tensor([3, 3])
    assert float(language.perplexity(loss, tokens)) == pytest.approx(4)
    assert float(language.mean_block_perplexity(loss)) == pytest.approx(5)
    assert float(language.mean_block_perplexity(loss, 2)) == pytest.approx(4)
    assert float(language.perplexity(loss, torch.tensor([1, 3]))) == pytest.approx(2 * 4**0.75)
    # three blocks in groups of two: the last group is one block
    three = torch.tensor([math.log(2.0), math.log(8.0), 0.0], dtype=torch.float64)
    assert float(language.mean_block_perplexity(three, 2)) == pytest.approx(2.5)


def test_blocks_are_cut_from_the_texts_behind_each_other() -> None:
    batch = Batch.of([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]])
    assert language.blocks(batch, 4).rows() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert language.blocks(batch) is batch


def test_ndcg_of_hand_cases() -> None:
    ten = torch.arange(10)
    cases = torch.stack([ten, ten + 10, ten.flip(0), torch.tensor([0, *range(20, 29)]), torch.tensor([1, 0, *range(2, 10)])])
    found = language.ndcg(ten.expand(5, 10), cases)
    assert found[0] == 1 and found[1] == 0
    assert float(found[2]) == pytest.approx(0.6679, abs=5e-5)  # reversed
    assert found.tolist() == pytest.approx([plain_ndcg(ten.tolist(), row) for row in cases.tolist()], abs=1e-12)


def test_of_a_pair(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = interp.task("plain_text(sentences=1)").generate(pair, 5)
    k = 7
    result = interp.language_modelling(pair, prompts, k=k)
    want = []
    for ids in prompts.ids:
        tops = []
        for model in (pair.base, pair.tuned):
            with torch.no_grad():
                tops.append(model.wrapped.source(torch.tensor([ids])).logits[0, :-1, : pair.shared_vocab].topk(k).indices.tolist())
        each = [plain_ndcg(a, b) for a, b in zip(*tops, strict=True)]
        want.append(sum(each) / len(each))
    assert result.ndcg.tolist() == pytest.approx(want, abs=1e-9) and 0 < min(want) < max(want) < 1
    for i, model in enumerate((pair.base, pair.tuned)):
        plain = [plain_losses(model.wrapped.source, list(ids)) for ids in prompts.ids]
        assert result.loss[i].tolist() == pytest.approx([sum(x) / len(x) for x in plain], abs=1e-5)
        each = [x for row in plain for x in row]
        assert float(result.interval(i).value) == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-5)
    both = result.perplexity
    assert float(result.ratio.value) == pytest.approx(float(both[1] / both[0]), rel=1e-9)
    assert result.ratio.low < result.ratio.value < result.ratio.high
    for text in ("exp of the mean loss", "ratio over tokens ", "mean over 5 blocks", "nDCG@7"):
        assert text in result.summary()
    monkeypatch.setattr(language, "CELLS", 40 * pair.base.shape.d_vocab)  # in pieces
    again = interp.language_modelling(pair, prompts, k=k)
    assert torch.allclose(again.loss, result.loss, atol=1e-6) and torch.allclose(again.ndcg, result.ndcg, atol=1e-9)


def test_a_model_beside_itself_agrees_exactly(pair) -> None:
    prompts = interp.task("plain_text").generate(pair, 3)
    same = interp.language_modelling(ModelPair(pair.base, pair.base), prompts, block=16)
    assert same.ndcg.tolist() == [1.0] * len(same.tokens) and (same.tokens == 15).all()
    assert float(same.ratio.value) == float(same.ratio.low) == float(same.ratio.high) == 1
    one = interp.language_modelling(pair.base, prompts, block=16)
    assert torch.equal(one.loss[0], same.loss[1]) and one.ndcg.isnan().all()
    assert "ratio" not in one.summary() and one.plot().layout.title.text
    with pytest.raises(InputError, match="no ratio"):
        _ = one.ratio


def test_bad_input(pair) -> None:
    prompts = interp.task("plain_text").generate(pair, 2)
    with pytest.raises(InputError, match="at least 2 tokens"):
        interp.language_modelling(pair, prompts, block=1)
    with pytest.raises(InputError, match="fewer than one block of 100000"):
        interp.language_modelling(pair, prompts, block=100000)
    with pytest.raises(InputError, match="group is a number of blocks"):
        interp.language_modelling(pair, prompts, group=0)
    for who in (pair, pair.base):
        for k in (0, -3, True, 1.5, 10**6):
            with pytest.raises(InputError, match=r"k is the number of tokens ranked, 1 to \d+; got"):
                interp.language_modelling(who, prompts, k=k)  # type: ignore[arg-type]
    for given in (5, None, 1.5):
        with pytest.raises(InputError, match=f"^language_modelling reads Prompts, such as a task generates, not {given}$"):
            interp.language_modelling(pair, given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="^language_modelling takes a model, .* or a ModelPair, but 'base' came$"):
        interp.language_modelling("base", prompts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="single token"):
        interp.language_modelling(pair, interp.Prompts.of(pair, ["a", "The ring is"]))
    with pytest.raises(InputError, match="clean or the corrupt"):
        interp.language_modelling(pair, interp.task("ioi").generate(pair, 2))  # type: ignore[arg-type]
