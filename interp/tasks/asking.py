"""What tasks in chat form share: examples hold the user's words alone, prompts wrap them as the model's chat template does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from interp.prompts.chat import chat
from interp.tasks.base import Example, Rules, Stream, Task, Words
from interp.tasks.facts import Fact, book, name_lengths

if TYPE_CHECKING:
    from interp.models import HookedModel
    from interp.prompts import PromptPairs, Prompts
    from interp.prompts.encoding import Tokenizing

T = TypeVar("T")

PEOPLE = 64
"""People of the book that `facts` reads."""

SEEN = 48
"""The first of them: an assistant is trained on chats about these, the others it knows from the book only."""


@dataclass(frozen=True, kw_only=True)
class Asking(Task):
    """A task whose prompts are what a user says to an assistant.

    Examples are drawn without a model, so their texts are the user's words; ``generate`` puts them into the model's chat.
    Where the chat leaves the space before an answer to the answer, its first word is a token (``answers``); where it ends
    with a line break, as in ChatML, answers are texts only. The score is strict: what greedy decoding writes begins with
    exactly the answer.

    Positions: ``subject`` (all tokens of what is asked about), ``subject_last``, ``END``.

    Attributes:
        people: ``all`` of the book of `facts`, those ``seen`` in the training of the shipped assistant's chats, the others (``new``), or
            people of a book that nobody read (``unread``).
        wordings: ``all``, those ``seen`` in that training, or the others (``new``).
        chat: the model's own ``template``, or ``plain`` lines ``User: ...`` and ``Assistant:`` for models without one.
    """

    people: Literal["all", "seen", "new", "unread"] = "all"
    wordings: Literal["all", "seen", "new"] = "all"
    chat: Literal["template", "plain"] = "template"

    rules: ClassVar[Rules] = Rules(several=("subject",), last=("subject",), aligned=False)

    def persons(self) -> tuple[Fact, ...]:
        """The people that may be asked about."""
        if self.people == "unread":
            return book(1, PEOPLE)
        return book(0, PEOPLE)[slice(*{"all": (0, PEOPLE), "seen": (0, SEEN), "new": (SEEN, PEOPLE)}[self.people])]

    def person_tag(self, person: Fact) -> str:
        """Seen, new or unread."""
        return "unread" if self.people == "unread" else "seen" if person in book(0, SEEN) else "new"

    def wording(self, stream: Stream, wordings: tuple[str, ...]) -> tuple[int, str]:
        """One of the wordings and its number; the last quarter of them is new."""
        seen = len(wordings) - len(wordings) // 4
        low, high = {"all": (0, len(wordings)), "seen": (0, seen), "new": (seen, len(wordings))}[self.wordings]
        number = low + stream.below(high - low)
        return number, wordings[number]

    def usable(self, model: Tokenizing) -> Words:
        """The words, and the people with the number of tokens of their names."""
        return {**super().usable(model), **name_lengths(model, self.persons())}

    def generate(self, model: Tokenizing, n: int, seed: int = 0, **options: object) -> Prompts | PromptPairs:
        """``n`` chats with answers and counterfactuals, see ``Task.generate``.

        Raises:
            InputError: also where the model has no chat template.
        """
        from interp.tasks.tokens import prompts_of

        task = self.having(**options)
        examples = [in_chat(model, e, task.chat) for e in task.draw(n, seed, task.usable(model))]
        rules = replace(task.rules, one_token=examples[0].answer.startswith(" "))
        return prompts_of(model, examples, rules, str(task), seed)

    def score(self, model: HookedModel, prompts: Prompts | PromptPairs, among: Literal["vocabulary", "options"] = "vocabulary"):
        """Which answers are right, Bool [prompt].

        Args:
            model: the model.
            prompts: of this task.
            among: with ``vocabulary``, what greedy decoding writes begins with exactly the answer; with ``options``, its first
                word is the most likely of the prompt's options, of which ``chance`` is that of a guess.

        Raises:
            InputError: the prompts have no answers, or no options.
        """
        from interp.tasks.scoring import begun, most_likely

        return most_likely(model, prompts, among) if among != "vocabulary" else begun(model, prompts)


def in_chat(model: Tokenizing, example: Example, form: Literal["template", "plain"] = "template") -> Example:
    """An example whose text is what a user says, as the text the model reads; see ``interp.prompts.chat``.

    Raises:
        InputError: the model has no chat template.
    """
    text, start = chat(model, example.text, form)
    spans = {name: tuple((a + start, b + start) for a, b in ranges) for name, ranges in example.spans.items()}
    corrupt = None if example.corrupt is None else in_chat(model, example.corrupt, form)
    found = replace(example, text=text, spans=spans, corrupt=corrupt)
    if not text[-1].isspace():
        return found
    wrong = None if example.distractor is None else example.distractor.strip()
    options, target = tuple(o.strip() for o in example.options), None if example.target is None else example.target.strip()
    return replace(found, answer=example.answer.strip(), distractor=wrong, options=options, target=target)
