"""Prompts as what a user says to a chat model."""

from __future__ import annotations

from typing import Any, Literal

from interp.errors import InputError
from interp.prompts.chat import chat
from interp.prompts.values import Prompts

Form = Literal["given", "template", "plain"]


def as_chats(model: Any, prompts: Prompts, form: Form) -> Prompts:
    """Each prompt as a user's message, up to where the model's answer begins.

    Args:
        model: whose template and tokens are used.
        prompts: their texts are the messages; positions, answers and tags do not carry over.
        form: ``given`` leaves them as they are; otherwise as for ``chat``.

    Raises:
        InputError: a prompt is a chat already or holds a response, or as for ``chat``.
    """
    if form == "given":
        return prompts
    if not isinstance(prompts, Prompts):
        raise InputError(f"chat={form!r} needs prompts with texts; these are {type(prompts).__name__}")
    if "response" in prompts.positions:
        raise InputError(
            f"these prompts hold a response, which chat={form!r} would make part of the question; write whole chats, chat='given'"
        )
    texts = []
    for number, text in enumerate(prompts.texts):
        said, start = chat(model, text, form)
        head = said[:start].strip()
        if head and text.lstrip().startswith(head):
            raise InputError(f"prompt {number} begins with {head[:40]!r} already, and a chat template is applied once; use chat='given'")
        texts.append(said)
    return Prompts.of(model, texts)
