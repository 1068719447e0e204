"""Texts, tokens and back, as the checkpoint's own tokenizer sees them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from interp.errors import InputError
from interp.models.checkpoint import Checkpoint, read_tokenizer

Bos = Literal["auto", "always", "never"]


class Text:
    """The tokenizer side of a model."""

    name: str
    checkpoint: Checkpoint | None
    _tokenizer: Any
    _bos: Bos

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer.

        Raises:
            InputError: the model was given as an object without one.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        if self.checkpoint is None:
            raise InputError(
                f"{self.name} was given as an object without a tokenizer; pass tokenizer=... to HookedModel.load, or token ids"
            )
        return read_tokenizer(self.checkpoint.path)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, special tokens included once as ``bos`` says, also where the text spells out the first of them.

        Raises:
            InputError: the text gives no tokens.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        first = self.tokenizer.bos_token_id
        if self._bos != "auto" and first is not None:
            while ids and ids[0] == first:
                ids = ids[1:]
            ids = [first, *ids] if self._bos == "always" else ids
        elif first is not None and ids[:2] == [first, first]:
            ids = ids[1:]  # the tokenizer put one before that of a chat template
        if not ids:
            raise InputError("a prompt is empty: it has no tokens")
        return ids

    def token(self, word: str) -> int:
        """The id of a word that is exactly one token, without special tokens.

        Raises:
            InputError: it is several tokens; they are named.
        """
        ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(self.token_text(i)) for i in ids) or "nothing"
            raise InputError(f"{word!r} is {len(ids)} tokens ({pieces}) for the tokenizer of {self.name}; one token is needed")
        return int(ids[0])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def token_text(self, token: int) -> str:
        """The text of one token, for display."""
        return self.token_strings([token])[0]

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The text of every token, for display: with its leading space; bytes that are no text alone as ``<0xF0><0x9F>``."""
        shown = []
        for i in ids:
            raw = self.tokenizer.convert_ids_to_tokens(int(i))
            text = self.decode([int(i)])
            if raw is None:
                shown.append(f"<{int(i)}>")
            elif "\ufffd" in text or not text:
                shown.append(_as_bytes(str(raw)))
            else:
                # A Metaspace tokenizer drops the space of a lone token.
                shown.append(" " + text if str(raw).startswith("\u2581") and not text.startswith(" ") else text)
        return shown


def _byte_level() -> dict[str, int]:
    """The letters by which byte-level BPE spells bytes: printable ones as themselves, the others from code point 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_level()


def _as_bytes(raw: str) -> str:
    """A vocabulary entry that is no text alone: its bytes where it spells bytes, else the entry as it is (``<s>``, ``<0xF0>``)."""
    if set(raw) == {"\u2581"}:  # Metaspace's space, which a lone token drops
        return " " * len(raw)
    if raw.isascii() or not all(c in _BYTES for c in raw):
        return raw
    return "".join(f"<0x{_BYTES[c]:02X}>" for c in raw)
