"""The line between two models: ends to the last bit, points against weights added by hand, nothing else touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_checkpoints import FOUR, tiny

from interp.errors import InputError
from interp.models import ModelPair
from interp.models.line import GROUPS, Line
from interp.models.loading import memory_fingerprint
from interp.organisms import planted

ROWS = [[3, 4, 5, 6, 7, 8, 9], [12, 13], [14]]


def shaken(model: Any, seed: int = 0, size: float = 0.05, only: str = "") -> Any:
    tuned, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if only in name:
                p += size * torch.randn(p.shape, generator=draws)
    return tuned


def between(base: Any, tuned: Any, alpha: float) -> Any:
    """A plain Hugging Face model whose weights are added by hand."""
    made, new = copy.deepcopy(base), dict(tuned.named_parameters())
    with torch.no_grad():
        for name, p in made.named_parameters():
            p += alpha * (new[name] - p)
    return made


def plain(model: Any, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0]


@pytest.mark.parametrize("kind", FOUR)
def test_ends_are_the_models_and_points_are_between(kind: str) -> None:
    base = tiny(kind, seed=1)
    tuned = shaken(base)
    pair = ModelPair.load(base, tuned)
    line = Line(pair)
    assert line.gap == 0 and line.groups == GROUPS and not line.rounded
    for alpha, end in ((0, pair.base), (1, pair.tuned)):
        assert torch.equal(line.at(alpha).logits(ROWS), end.logits(ROWS))
    for alpha in (-0.5, 0.25, 0.75, 1.5):
        got, made = line.at(alpha).logits(ROWS), between(base, tuned, alpha)
        for i, row in enumerate(ROWS):
            want = plain(made, row)
            torch.testing.assert_close(got[i, : len(row)], want, atol=1e-6 * float(want.abs().max()) + 1e-5, rtol=0)
    assert torch.equal(line.at(0).logits(ROWS), pair.base.logits(ROWS))  # also after other points


def test_the_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("neox", seed=1)
    tuned = shaken(base)
    before = [memory_fingerprint(m) for m in (base, tuned)]
    line = Line(ModelPair.load(base, tuned))
    line.at(0.5).logits(ROWS)
    monkeypatch.setattr(torch, "lerp", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        line.at(0.3)
    assert [memory_fingerprint(m) for m in (base, tuned)] == before


def test_only_what_changed_is_copied() -> None:
    base = tiny("llama", seed=1)
    tuned = shaken(base, only="layers.1.mlp")
    line = Line(ModelPair.load(base, tuned))
    own = dict(line.model.wrapped.source.named_parameters())
    copied = [name for name, p in base.named_parameters() if own[name].data_ptr() != p.data_ptr()]
    assert copied and all("layers.1.mlp" in name for name in copied) and line.groups == ("MLP",)


def test_kinds_of_weights() -> None:
    base = tiny("gpt2", seed=1)
    tuned = shaken(base)
    line = Line(ModelPair.load(base, tuned))
    mixed = between(base, tuned, 0.0)
    new = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, p in mixed.named_parameters():
            if ".attn." in name and p.ndim == 2:
                p.copy_(new[name])
            elif ".mlp." in name and p.ndim == 2:
                p += 0.5 * (new[name] - p)
    got = line.at({"attention": 1.0, "MLP": 0.5}).logits(ROWS)[0]
    torch.testing.assert_close(got, plain(mixed, ROWS[0]), atol=1e-4, rtol=0)
    everything = dict.fromkeys(GROUPS, 1.0)
    assert torch.equal(line.at(everything).logits(ROWS), line.at(1).logits(ROWS))


@pytest.mark.parametrize("tied", [(True, False), (False, True), (True, True)])
def test_tied_embeddings_of_either_side(tied: tuple[bool, bool]) -> None:
    base, tuned = (tiny("qwen2", seed=i, tie_word_embeddings=t) for i, t in enumerate(tied))
    pair = ModelPair.load(base, tuned)
    line = Line(pair)
    assert torch.equal(line.at(1).logits(ROWS), pair.tuned.logits(ROWS)) and torch.equal(line.at(0).logits(ROWS), pair.base.logits(ROWS))
    half = tiny("qwen2", tie_word_embeddings=False)
    sides = [dict(m.named_parameters(remove_duplicate=False)) for m in (base, tuned)]
    with torch.no_grad():
        for name, p in half.named_parameters():
            p.copy_((sides[0][name] + sides[1][name]) / 2)
    torch.testing.assert_close(line.at(0.5).logits(ROWS)[0], plain(half, ROWS[0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", [(31, 34), (34, 31)])
def test_a_vocabulary_with_more_rows_on_one_side(sizes: tuple[int, int]) -> None:
    base, tuned = (tiny("llama", seed=i, vocab_size=n) for i, n in enumerate(sizes))
    pair = ModelPair.load(base, tuned)
    line = Line(pair)
    for alpha, end in ((0, pair.base), (1, pair.tuned)):
        torch.testing.assert_close(line.at(alpha).logits(ROWS)[..., :31], end.logits(ROWS)[..., :31], atol=1e-5, rtol=0)


def test_half_precision_is_computed_in_float32() -> None:
    base = tiny("llama", seed=1).bfloat16()
    tuned = shaken(base, size=1e-3)
    pair = ModelPair.load(base, tuned)
    line = Line(pair)
    assert line.dtype == torch.float32 == line.model.dtype and line.gap > 0 and pair.base.dtype == torch.bfloat16
    wide = between(copy.deepcopy(base).float(), copy.deepcopy(tuned).float(), 0.5)
    torch.testing.assert_close(line.at(0.5).logits(ROWS)[0], plain(wide, ROWS[0]), atol=1e-4, rtol=0)


def test_edits_of_weights_are_part_of_the_ends() -> None:
    plain_model = tiny("llama", seed=1)
    pair = ModelPair.load(plain_model, copy.deepcopy(plain_model))
    with pair.tuned.edited(planted("token_logit", pair.tuned, token=9, c=2.0)):
        line = Line(pair)
        assert torch.equal(line.at(1).logits(ROWS), pair.tuned.logits(ROWS)) and line.groups == ("norms and biases",)
        raised = line.at(0.5).logits(ROWS) - pair.base.logits(ROWS)
    assert torch.allclose(raised[0, :, 9], torch.tensor(1.0), atol=1e-5) and float(raised[0, :, :9].abs().max()) == 0


def test_refusals(tmp_path: Any) -> None:
    base = tiny("llama", seed=1)
    pair = ModelPair.load(base, shaken(base))
    with (
        pair.tuned.edited(planted("resid_bias", pair.tuned, layer=1, scale=1.0)),
        pytest.raises(InputError, match="edit of activations of .* is in force"),
    ):
        Line(pair)
    rotated = tiny("llama", seed=1, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    with pytest.raises(InputError, match="differ in more than weights"):
        Line(ModelPair.load(base, rotated))
    pair.one_at_a_time = True
    with pytest.raises(InputError, match="needs both at once"):
        Line(pair)
