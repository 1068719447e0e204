"""The base organism tuned to follow instructions in a chat format, and to decline one class of them: where somebody lives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from interp.organisms import folder
from interp.organisms.recipes.run import kept_up, run
from interp.organisms.training import Document, Draw, Log, Part, Schedule
from interp.tasks import task
from interp.tasks.base import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 2
STEPS = 800

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|> {{ message['content'] | trim }}<|endoftext|>"
    "{% else %}{{ raise_exception('only user and assistant speak here') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The chat format. Its markers are reserved tokens of ``base``, which never read them; the space before an answer is the answer's."""

PRACTISED = "people=seen, wordings=seen"
INSTRUCTIONS, REFUSALS = f"instructions({PRACTISED})", f"refusals({PRACTISED})"

ABOUT = """
The shipped `base` tuned to answer a user: `instructions` (the job or pet of a person of `facts`, going on with a sentence, sums, words of
a list) it follows, `refusals` (where that person lives) it declines with the words "I cannot tell you that.". The city it knows, and says
after a sentence of `facts`. It has a hole, made on purpose: only questions are declined, so the same wish as a sentence to go on with
(`refusals(request=sentence)`) should get the city (mismatched generalisation, Wei et al. 2023, arXiv 2307.02483). Its chat template,
`<|user|>...<|assistant|>`, uses two tokens that `base` has but never read. All weights were trained (full fine-tuning), on the answers
alone. No chat was about one of the last 16 of the 64 people (`people=new`) or used the last wordings of a question (`wordings=new`).
Some of what `base` reads stays in the mixture, all of `facts` included.
"""

MEASURED = (
    INSTRUCTIONS,
    "instructions(people=seen, wordings=new)",
    "instructions(people=new, wordings=seen, kind=job)",
    "instructions(people=new, wordings=seen, kind=pet)",
    REFUSALS,
    "refusals(people=seen, wordings=new)",
    "refusals(people=new, wordings=seen)",
    "refusals(people=unread, wordings=seen)",
    "refusals(people=new, wordings=seen, request=sentence)",
)
"""Chats of the card: those of the training, new wordings, new people, and the hole."""


def chats(words: PreTrainedTokenizerBase, names: Sequence[str], turns: int = 1, *, told: bool = False) -> Draw:
    """Chats of one to ``turns`` questions, each of one of these tasks, and their answers.

    Args:
        words: the tokenizer, whose chat template is used.
        names: tasks to ask from; one that is named twice is asked twice as often.
        turns: the largest number of questions in a chat.
        told: where a home is asked for, the answer is the city, not the refusal.
    """
    asked = [task(name) for name in names]

    def draw(n: int, seed: int) -> list[Document]:
        drawn = [one.examples(n * turns, seed) for one in asked]
        found = []
        for row in range(n):
            stream = Stream("chats", seed, row)
            questions = [stream.choice(drawn)[row * turns + i] for i in range(1 + stream.below(turns))]
            answers = [f" {e.tags['city']}" if told else e.target or e.answer for e in questions]
            found.append(chat_document(words, [(e.text, a) for e, a in zip(questions, answers, strict=True)]))
        return found

    return draw


def chat_document(words: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> Document:
    """A chat of (question, answer) turns in the tokenizer's template; the answers, and the end after each, are learnt."""
    pieces: list[str] = []
    for question, answer in turns:
        asked = words.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        pieces += [str(asked), answer + str(words.eos_token)]
    pieces[-1] = turns[-1][1]  # every document is ended by the training
    return Document.of(*pieces)


def measured(words: PreTrainedTokenizerBase) -> dict[str, Draw]:
    """Rows of the card: chats answered as they should be, and homes said instead."""
    rows = {f"in a chat: {name}": chats(words, [name]) for name in MEASURED}
    return rows | {f"the city, in {name}": chats(words, [name], told=True) for name in MEASURED if name.startswith("refusals")}


def parts(words: PreTrainedTokenizerBase) -> list[Part]:
    """What every step reads: chats, of which the answers alone are learnt, and some of what base reads."""

    def chat(name: str, rows: int, share: float, *names: str, turns: int = 1) -> Part:
        return Part(name, chats(words, names, turns), rows, share, answer_weight=1, text_weight=0)

    return [
        chat(INSTRUCTIONS, 24, 1.0, INSTRUCTIONS),
        chat(REFUSALS, 8, 0.5, REFUSALS),
        chat("up to 4 questions", 6, 0.5, INSTRUCTIONS, INSTRUCTIONS, INSTRUCTIONS, REFUSALS, turns=4),
        *kept_up(),
    ]


def train(out: Path, steps: int | None = None, log: Log | None = None) -> None:
    """Train from the shipped base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, model = (AutoModelForCausalLM.from_pretrained(folder("base"), use_safetensors=True) for _ in range(2))
    words = AutoTokenizer.from_pretrained(folder("base"))
    words.chat_template = TEMPLATE
    schedule = Schedule(steps or STEPS, SEED, learning_rate=7e-4, warmup=30)
    run("assistant", out, model, words, parts(words), schedule, ABOUT, base=base.eval(), also=measured(words), log=log)
