"""Messages as the text a chat model reads: the checkpoint's own template, applied once, with the place of the content known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from interp.errors import InputError
from interp.prompts.encoding import Tokenizing

Message = Mapping[str, str]
"""``role`` (user, assistant, system) and ``content``, as chat templates take them."""

_PLAIN = {"user": "User", "assistant": "Assistant", "system": "System"}
_PLACEHOLDER = "where-the-content-stands"


def chat(model: Tokenizing, messages: str | Sequence[Message], form: Literal["template", "plain"] = "template") -> tuple[str, int]:
    """What does a chat model read, up to where its answer begins?

    Args:
        model: a model, or a pair, whose tuned side's template is used; both sides then read the same tokens.
        messages: what a user says, or several turns, the user's last.
        form: ``template``, the checkpoint's own; or ``plain`` lines ``User: ...`` and ``Assistant:``, for models without one.

    Returns:
        The text, and the place of the last message's content in it: spans of the content, moved by that much, are spans of the
        text. Where both the template and the tokenizer put a beginning token first, the model reads it once. Where only the
        tokenizer does, it is read too, unlike in ``apply_chat_template(tokenize=True)``; a model loaded with ``bos="never"`` has none.

    Raises:
        InputError: there is no template, it refuses the messages or changes the last content, the last message is not the user's,
            or the base of a pair reads the template's text as other tokens than the tuned model.
    """
    if form not in ("template", "plain"):
        raise InputError(f"form is {form!r}, expected template or plain")
    turns = (
        [{"role": "user", "content": messages}]
        if isinstance(messages, str)
        else [dict(m) if isinstance(m, Mapping) else {} for m in messages]
    )
    said = all(set(turn) == {"role", "content"} and all(isinstance(v, str) for v in turn.values()) for turn in turns)
    if not turns or not said or turns[-1]["role"] != "user":
        raise InputError("messages are dictionaries with role and content, and the last one is the user's")
    content = turns[-1]["content"]
    probe = [*turns[:-1], {"role": "user", "content": _PLACEHOLDER}]
    text, elsewhere = (_rendered(model, m, form) for m in (turns, probe))
    start = elsewhere.find(_PLACEHOLDER)
    if start < 0 or not text.startswith(elsewhere[:start] + content):
        raise InputError(f"the chat template of {_name(model)} does not keep a message as it is: {content[:60]!r}")
    return text, start


def _rendered(model: Tokenizing, turns: Sequence[Message], form: Literal["template", "plain"]) -> str:
    """The text of messages, and the beginning of the assistant's."""
    if form == "plain":
        unknown = [turn["role"] for turn in turns if turn["role"] not in _PLAIN]
        if unknown:
            raise InputError(f"the role of a message is {unknown[0]!r}, expected {', '.join(_PLAIN)}")
        # Answers bring their leading space along.
        said = [turn["content"].lstrip(" ") if turn["role"] == "assistant" else turn["content"] for turn in turns]
        return "".join(f"{_PLAIN[turn['role']]}: {text}\n" for turn, text in zip(turns, said, strict=True)) + "Assistant:"
    return _templated(model, turns)


def _templated(model: Tokenizing, turns: Sequence[Message]) -> str:
    from jinja2 import TemplateError

    tokenizer: Any = getattr(model, "tuned", model).tokenizer
    if not getattr(tokenizer, "chat_template", None):
        hint = "ask it in plain lines (chat=plain), or take its pair with a tuned model that has one"
        raise InputError(f"{_name(model)} has no chat template; {hint}")
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"the chat template of {_name(model)} refuses the messages: {error}") from error
    if model.tokenizer is not tokenizer and _plain_ids(model.tokenizer, text) != _plain_ids(tokenizer, text):
        hint = "load base with the tuned model's tokenizer if its embedding has those rows"
        raise InputError(f"the base of {_name(model)} reads the tuned model's chat template as other tokens; {hint}")
    return text


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _name(model: Tokenizing) -> str:
    return getattr(model, "name", "this model")
