"""The base organism: a small Llama that knows indirect objects, a book of facts, lists and a grammar of English."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from interp.organisms.recipes.run import Log, documents, part, run
from interp.organisms.training import Schedule

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
STEPS = 2400
VOCABULARY = 2048
READ = ("ioi", "colored_objects", "boxes", "laundry_list", "arithmetic", "facts", "recitation", "plain_text")
"""Tasks whose words are tokens and whose texts the tokenizer's merges are learnt from."""

PROSE = "plain_text(source=prose)"

ABOUT = """
A small Llama (4 layers, d_model 120, 6 heads of 24 on 2 key/value heads, MLP 320, vocabulary 2048) trained from scratch on texts of this
package's tasks, to have something trained to look at. It completes indirect-object sentences, knows the city, job and pet of the
64 made-up people of `facts`, finds the item left over in a laundry list, and writes the scenes of `plain_text`. The 68 pieces of prose
that are shipped as `plain_text(source=prose)` it has read until it knew them nearly by heart, and other English it does not know.
`colored_objects` it has read, but which object has which color it has not learnt: it guesses among the three. The texts are generated
by `interp.tasks` or written for this project; no outside data was used.
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of a task is one token with a leading space."""
    from interp.organisms.tokenizer import train_tokenizer
    from interp.tasks import task

    texts = [d.text + d.answer for name in READ for d in documents(name)(200 if name == "recitation" else 1000, SEED)]
    # The grammar has few words; the prose gives the merges that let other English be read in pieces longer than bytes.
    texts += 50 * [d.text for d in documents(PROSE)(68, SEED)]
    return train_tokenizer(texts, [word for name in READ for word in task(name).words()], VOCABULARY)


def untrained(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """The architecture with random weights. Sizes differ pairwise, so that a swapped axis shows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=120,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    return model


def train(out: Path, steps: int | None = None, log: Log | None = None) -> None:
    """Train from random weights."""
    words = tokenizer()
    parts = [
        part("ioi", 24),
        part("facts", 8),
        part("plain_text", 12, answer_weight=1),
        part(PROSE, 2, answer_weight=1),
        part("laundry_list(length=3)", 8),
        part("laundry_list", 6),
        part("colored_objects", 6),
    ]
    run("base", out, untrained(len(words), SEED), words, parts, Schedule(steps or STEPS, SEED), ABOUT, log=log)
