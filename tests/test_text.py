"""Tokens as people read them: every text can be put together again from what is shown."""

from __future__ import annotations

import pytest
from small_tokenizers import NAMES, tokenizer
from tiny_checkpoints import tiny

from interp.models import HookedModel
from interp.plots import coloured_tokens
from interp.plots.text import whole_characters

TEXT = "to the 😀 café 日本 <b>x</b> & 👩‍👩‍👧 \n end"


def test_bytes_are_put_together_to_the_characters_they_make():
    model = HookedModel.load("base")
    ids = model.tokens(TEXT)
    shown = model.token_strings(ids)
    assert "<0xF0>" in shown and "😀" not in shown
    whole = whole_characters(shown)
    assert len(whole) == len(ids) and "".join(w for w in whole if w != "…") == TEXT
    assert "😀" in coloured_tokens(shown, [0.0] * len(shown))


@pytest.mark.parametrize("name", NAMES)
def test_every_tokenizer(name):
    words = tokenizer(name)
    model = HookedModel.load(tiny("llama", vocab_size=len(words)), tokenizer=words)
    ids = [i for i in model.tokens(TEXT) if i not in words.all_special_ids]
    whole = [w for w in whole_characters(model.token_strings(ids)) if w != "…"]
    assert "".join(whole).strip() == model.decode(ids).strip()


def test_bytes_that_are_no_text_stay():
    assert whole_characters(["<0xF0>", "a", "<0x9F>"]) == ["<0xF0>", "a", "<0x9F>"]
    assert whole_characters(["<0xFF>", "<0xC3>", "<0xA9>"]) == ["<0xFF>", "é", "…"]
    assert whole_characters(["<0xC3><0xA9>", "<0xC3>"]) == ["é", "<0xC3>"]
    assert whole_characters([]) == []
