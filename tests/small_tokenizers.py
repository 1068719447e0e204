"""Three small tokenizers that differ in what matters to prompts, and a light stand-in for a model around them.

``byte_level``: every word of the tasks is one token, nothing is put before a text. ``metaspace``: spaces are
part of the next token as in Llama, with BOS in front. ``splitting``: byte-level, but some words are in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from interp.models.batch import Batch
from interp.tasks import TASKS, task

NAMES = ("byte_level", "metaspace", "splitting", "closing", "letters")
"""``closing`` is ``byte_level`` with an end token that is put behind every text; ``letters`` has no words at all."""

FITTING = ("byte_level", "metaspace", "splitting")
"""Those that all tasks work with."""

SPLIT = (" Alice", " Mary", " apple", " purple", " Purple", " ring", " pencil", " museum", " Q")
"""Words that ``splitting`` cuts in two."""


@cache
def pieces() -> tuple[str, ...]:
    """Every piece of text in the tasks' examples that has to be a token, spaces included, in a fixed order."""
    cut = pre_tokenizers.Split(pattern=Regex(r" ?[^\s\p{P}]+| ?\p{P}|\s"), behavior="isolated")
    texts = [e.text + e.answer for name in TASKS for e in task(name).examples(40, 1)]
    found = {word for name in TASKS for word in task(name).words()}
    return tuple(sorted(found | {p for text in texts for p, _ in cut.pre_tokenize_str(text)}))


def _trained(raw: Tokenizer, words: Sequence[str], special: Sequence[str], letters: Sequence[str]) -> Tokenizer:
    """Byte-pair encoding learnt from words until each of them is one token."""
    trainer = trainers.BpeTrainer(vocab_size=20_000, special_tokens=list(special), initial_alphabet=list(letters), show_progress=False)
    raw.train_from_iterator((w for w in words for _ in range(2)), trainer)
    return raw


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a name."""
    if name == "metaspace":
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation(), pre_tokenizers.Split("\n", "isolated")]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        _trained(raw, [w for w in pieces() if "\n" not in w], special, ["\u2581", *(chr(c) for c in range(33, 127)), "\n"])
        raw.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    words = [w for w in pieces() if name != "letters" and (name != "splitting" or w not in SPLIT)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _trained(raw, words, ["<|end|>"], sorted(pre_tokenizers.ByteLevel.alphabet()))
    raw.decoder = decoders.ByteLevel()
    if name == "closing":
        raw.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", raw.token_to_id("<|end|>"))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


class Reader:
    """What prompts use of a model, with a model that answers as it is told.

    Args:
        tokenizer: the tokenizer.
        says: the ids that the model writes behind a prompt, given its ids.
        n_ctx: tokens that fit.
        slow: hide that the tokenizer knows offsets.
    """

    def __init__(
        self, tokenizer: Any, says: Callable[[tuple[int, ...]], Sequence[int]] | None = None, n_ctx: int = 512, slow: bool = False
    ) -> None:
        self.tokenizer = _Slow(tokenizer) if slow else tokenizer
        self.says = says
        self.shape = SimpleNamespace(n_ctx=n_ctx, d_vocab=len(tokenizer))

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def logits(self, batch: Batch, at: str) -> torch.Tensor:
        assert at == "END" and self.says is not None
        out = torch.zeros(len(batch), self.shape.d_vocab)
        for row, ids in enumerate(batch.rows()):
            out[row, self.says(tuple(ids))[0]] = 1.0
        return out

    def generate(self, batch: Batch, max_new_tokens: int, stop: Sequence[int] | None = None) -> list[list[int]]:
        assert self.says is not None
        return [list(self.says(tuple(ids)))[:max_new_tokens] for ids in batch.rows()]


class _Slow:
    """A tokenizer that refuses to say where its tokens are, as those written in Python do."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: Any, add_special_tokens: bool = True) -> Any:
        return self._tokenizer(text, add_special_tokens=add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
