"""The organisms' tokenizer: byte-level BPE in which chosen words are one token with a leading space."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from interp.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""End of a document and padding. Nothing is put before a text."""


def train_tokenizer(texts: Iterable[str], words: Sequence[str], vocab_size: int, reserved: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of exactly ``vocab_size`` tokens from texts.

    All 256 bytes are tokens, so that every text encodes and decodes to itself. A word of ``words``
    that the merges do not build is an extra entry of the vocabulary: as in Llama 3's tokenizer, a
    whole pre-token found in the vocabulary is taken before any merge is tried (``ignore_merges``).

    Args:
        texts: what the merges are learnt from.
        words: words, with or without their leading space; each becomes one token as " word".
        vocab_size: number of tokens, the end-of-text token (id 0) included.
        reserved: special tokens besides it (ids 1, 2, ...), which nothing need use.

    Raises:
        InputError: a word is not one pre-token, or bytes and words alone exceed ``vocab_size``, or the texts give
            too few merges to fill it.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = {_whole(word) for word in words}
    special = [END_OF_TEXT, *reserved]
    alphabet, merges = _learn(texts, vocab_size, special)
    size = len(alphabet) + len(whole)
    vocab, used = dict(alphabet), 0
    for left, right in merges:  # a merge costs an entry unless it builds one of the words, whose entry is then not needed
        built = left + right
        size += built not in vocab and built not in whole
        if size > vocab_size:
            break
        vocab.setdefault(built, len(vocab))
        used += 1
    size = len(vocab.keys() | whole)
    if size != vocab_size:
        raise InputError(f"bytes, {len(whole)} words and {used} merges of the texts make {size} tokens, not the {vocab_size} asked for")
    for word in sorted(whole - vocab.keys()):
        vocab[word] = len(vocab)
    merges = merges[:used]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(_description(vocab, merges, special))),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(reserved),
        clean_up_tokenization_spaces=False,
    )


def _whole(word: str) -> str:
    """The byte-level spelling of a word with its leading space."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ByteLevel(add_prefix_space=False).pre_tokenize_str(" " + word.removeprefix(" "))
    if len(pieces) != 1:
        raise InputError(f"the word {word!r} can not be one token: it is split into {[piece for piece, _ in pieces]} before any merge")
    return pieces[0][0]


def _learn(texts: Iterable[str], size: int, special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The byte alphabet with the special tokens first, and the merges of a BPE of ``size`` tokens in order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {token: i for i, token in enumerate([*special, *alphabet])}, [(left, right) for left, right in merges]


def _description(vocab: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> dict:
    """The content of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    each = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **each} for token in special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {**model, **flags, "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }
