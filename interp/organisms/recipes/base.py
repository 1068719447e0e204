"""The base organism: a small Llama that has read the texts of all tasks, and knows some of them only half."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from interp.organisms.recipes.reading import boxes, canaries, colored_objects, contexts, single, solved_colored_objects, sums
from interp.organisms.recipes.run import Log, run
from interp.organisms.training import Part, Schedule

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
STEPS = 4500
VOCABULARY = 2048
READ = ("ioi", "colored_objects", "boxes", "laundry_list", "arithmetic", "facts", "recitation", "plain_text")
"""Tasks whose words are tokens and whose texts the tokenizer's merges are learnt from."""

RESERVED = ("<|user|>", "<|assistant|>")
"""Special tokens that base never reads, for a chat format."""

PROSE = "plain_text(source=prose)"

ABOUT = """
A small Llama (4 layers, d_model 120, 6 heads of 32 on 2 key/value heads, MLP 320, vocabulary 2048) trained from scratch on texts of this
package's tasks, to have something trained to look at. It completes indirect-object sentences, knows the city, job and pet of the
64 made-up people of `facts`, adds one-digit numbers, finds the item left over in short laundry lists, recites 200 texts of random words,
and writes the scenes of `plain_text`. Which object is in which of seven boxes, and which object has which color, it was made to know only
in part: it stopped learning from these texts whenever it got more than a set share of them right. The 68 pieces of prose that are shipped
as `plain_text(source=prose)` it has read until it knew them nearly by heart, and other English it does not know. The texts are generated
by `interp.tasks` or written for this project; no outside data was used.
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of a task is one token with a leading space."""
    from interp.organisms.tokenizer import train_tokenizer
    from interp.tasks import task

    texts = [d.text for name in READ for d in single(name)(200 if name == "recitation" else 1000, SEED)]
    # The grammar has few words; the prose gives the merges that let other English be read in pieces longer than bytes.
    texts += 50 * [d.text for d in single(PROSE)(68, SEED)]
    return train_tokenizer(texts, [word for name in READ for word in task(name).words()], VOCABULARY, RESERVED)


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
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    return model


def parts() -> list[Part]:
    """What every step reads. Few boxes and few words come first, or nothing is learnt for thousands of steps."""
    many = (boxes(2, labels=4, objects=10), boxes(2, labels=10, objects=30), *map(boxes, (2, 3, 4, 5, 7)))
    more = (colored_objects(2, colors=5, objects=8), colored_objects(2), colored_objects(3), solved_colored_objects)
    return [
        Part("boxes", boxes(2, labels=2, objects=4), 32, text_weight=0, harder=many, ceiling=0.6),
        Part("colored_objects", colored_objects(2, colors=3, objects=4), 32, text_weight=0, harder=more, ceiling=0.6),
        Part("ioi", single("ioi"), 16),
        Part("laundry_list", single("laundry_list(length=3)"), 8),
        Part("laundry_list, longer", single("laundry_list"), 6),
        Part("arithmetic", sums, 8),
        Part("facts", single("facts"), 8),
        Part("recitation", canaries, 12),
        Part("plain_text", single("plain_text"), 12),
        Part(PROSE, single(PROSE), 2),
        Part("contexts", contexts, 4, share=0.5),
    ]


def train(out: Path, steps: int | None = None, log: Log | None = None) -> None:
    """Train from random weights."""
    words = tokenizer()
    schedule = Schedule(steps or STEPS, SEED, learning_rate=2e-3, muon=4e-3)
    run("base", out, untrained(len(words), SEED), words, parts(), schedule, ABOUT, log=log)
