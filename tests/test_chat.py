"""Chats as text: the template once, one beginning token, the place of the content."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from small_tokenizers import FITTING, Reader, tokenizer

from interp.errors import InputError
from interp.models.text import Text
from interp.prompts.chat import chat
from interp.prompts.encoding import encode

MARKED = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
WITH_BOS = "{{ bos_token }}" + MARKED
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + MARKED
SYSTEM = "<|system|>to the store, politely" + MARKED

TURNS = [
    {"role": "user", "content": "to the store"},
    {"role": "assistant", "content": "to the garden"},
    {"role": "user", "content": "to the store"},
]


class Chatting(Reader):
    """A stand-in that reads texts as models do."""

    _bos = "auto"
    tokens = Text.tokens


def reader(name: str, template: str | None, **options: Any) -> Reader:
    """A stand-in whose tokenizer has a chat template."""
    own = deepcopy(tokenizer(name))
    own.chat_template = template
    return Chatting(own, **options)


def message(call, *args) -> str:
    with pytest.raises(InputError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("template", [MARKED, WITH_BOS, CHATML, SYSTEM])
@pytest.mark.parametrize("messages", ["to the store", TURNS])
def test_the_model_reads_what_the_template_says(name, template, messages):
    """Against the token ids that transformers gives for the same messages."""
    if "bos_token" in template and tokenizer(name).bos_token is None:
        pytest.skip("this tokenizer has no beginning token")
    model = reader(name, template)
    text, start = chat(model, messages)
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    given = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
    wanted, bos = list(given["input_ids"] if not isinstance(given, list) else given), model.tokenizer.bos_token_id
    found = list(encode(model, [text])[0].ids)
    assert found == ([bos, *wanted] if bos is not None and wanted[0] != bos else wanted)
    assert bos is None or found.count(bos) == 1
    assert text[start:].startswith("to the store<|") and text.count("<|assistant|>" if template != CHATML else "<|im_start|>assistant") >= 1
    assert start == text.rindex("to the store<|"), "the last content, not one that stands before it"


def test_a_beginning_token_comes_once_whoever_writes_it():
    for bos, count in (("auto", 1), ("always", 1), ("never", 0)):
        model = reader("metaspace", WITH_BOS)
        model._bos = bos
        assert model.tokenizer(chat(model, "to the store")[0])["input_ids"].count(model.tokenizer.bos_token_id) == 2
        text, start = chat(model, "to the store")
        prompt = encode(model, [text])[0]
        assert prompt.ids.count(model.tokenizer.bos_token_id) == count
        tokens = prompt.covering((start, start + len("to the store")))
        assert prompt.covered(tokens) == "to the store" and len(tokens) == 3
    # A tokenizer that adds nothing leaves the beginning token to the template.
    silent = reader("byte_level", "<|end|>" + MARKED)
    silent.tokenizer.bos_token = "<|end|>"
    text, start = chat(silent, "to the store")
    assert text.startswith("<|end|><|user|>") and encode(silent, [text])[0].ids.count(silent.tokenizer.bos_token_id) == 1


def test_plain_lines():
    model = reader("byte_level", None)
    text, start = chat(model, TURNS, "plain")
    assert text == "User: to the store\nAssistant: to the garden\nUser: to the store\nAssistant:" and start == text.rindex("to the")
    assert chat(model, " hello ! ", "plain") == ("User:  hello ! \nAssistant:", 6)
    assert chat(model, [TURNS[0], {"role": "assistant", "content": " to the garden"}, TURNS[2]], "plain") == (text, start)


def test_a_pair_speaks_as_its_tuned_side():
    plain, tuned = reader("byte_level", None), reader("byte_level", MARKED)
    pair = SimpleNamespace(name="a -> b", base=plain, tuned=tuned, tokenizer=plain.tokenizer, shape=plain.shape, tokens=plain.tokens)
    assert chat(pair, TURNS) == chat(tuned, TURNS)
    tuned.tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    said = message(chat, pair, TURNS)
    assert "a -> b" in said and "other tokens" in said and "tokenizer" in said


@pytest.mark.parametrize(
    ("template", "messages", "form", "parts"),
    [
        (None, "hello", "template", ["no chat template", "chat=plain", "pair"]),
        (MARKED.replace("m['content']", "m['content'] | upper"), "hello", "template", ["does not keep", "'hello'"]),
        (CHATML, "hello ", "template", ["does not keep", "'hello '"]),
        ("<|user|>", "hello", "template", ["does not keep"]),
        (ALTERNATING, [{"role": "system", "content": "x"}, *TURNS], "template", ["refuses", "no system here"]),
        (MARKED, TURNS[:2], "template", ["the last one is the user's"]),
        (MARKED, [], "template", ["the last one is the user's"]),
        (MARKED, [{"role": "user"}], "template", ["role and content"]),
        (None, [{"role": "tool", "content": "x"}, *TURNS], "plain", ["'tool'", "user, assistant, system"]),
    ],
)
def test_mistakes(template, messages, form, parts):
    said = message(chat, reader("byte_level", template), messages, form)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("messages", [[{"role": "user", "content": 3}], [{"role": "user", "content": "a"}, "x"], [], [{"role": "user"}]])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(InputError, match="the last one is the user's"):
        chat(None, messages)  # type: ignore[arg-type]


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="form is 'chatml'"):
        chat(None, "hi", form="chatml")  # type: ignore[arg-type]
