"""Sums and differences after solved examples (after SimpleMath in Merullo et al. 2025, arXiv 2510.24256)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from interp.tasks.base import Example, Rules, Stream, Task, Words, fill

if TYPE_CHECKING:
    from interp.models import HookedModel
    from interp.prompts import PromptPairs, Prompts
    from interp.prompts.encoding import Tokenizing

Problem = tuple[int, str, int]


def _result(problem: Problem) -> int:
    a, sign, b = problem
    return a + b if sign == "+" else a - b


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Task):
    """Solved problems ``a + b = c``, one per line, then an open one: what is the result?

    No problem occurs twice in a prompt, and differences are never negative. The counterfactual has
    another second number and another result, the distractor. Chance: a guess among all results that
    the problems can have.

    Positions: ``a``, ``b``, ``sign`` of the open problem (sets where a number is several tokens), ``END``.

    Attributes:
        digits: of the two numbers: 1 (1 to 9) or 2 (10 to 99).
        operation: ``add``, ``subtract`` or ``both``.
        shots: solved problems before the open one.
    """

    digits: int = 1
    operation: Literal["add", "subtract", "both"] = "add"
    shots: int = 5

    name: ClassVar[str] = "arithmetic"
    summary: ClassVar[str] = "Sums (or differences) of one- or two-digit numbers after solved examples."
    paper: ClassVar[str] = "after SimpleMath in Merullo et al. 2025, arXiv 2510.24256"
    rules: ClassVar[Rules] = Rules(several=("a", "b"), aligned=False)
    ranges: ClassVar[dict[str, tuple[int, int]]] = {"digits": (1, 2), "shots": (0, 20)}

    @property
    def _numbers(self) -> range:
        return range(1, 10) if self.digits == 1 else range(10, 100)

    @property
    def results(self) -> tuple[int, ...]:
        """Every result the problems can have."""
        low, high = self._numbers[0], self._numbers[-1]
        sums = set(range(2 * low, 2 * high + 1)) if self.operation != "subtract" else set()
        return tuple(sorted(sums | (set(range(high - low + 1)) if self.operation != "add" else set())))

    @property
    def chance(self) -> float:
        """A guess among all results that the problems can have."""
        return 1 / len(self.results)

    def words(self) -> tuple[str, ...]:
        """The results; the task works with tokenizers that split them too, but scores by generation then."""
        return tuple(f" {c}" for c in self.results)

    def _problem(self, stream: Stream) -> Problem:
        a, b = stream.choice(self._numbers), stream.choice(self._numbers)
        sign = "+" if self.operation == "add" or (self.operation == "both" and stream.uniform() < 0.5) else "-"
        return (a, sign, b) if sign == "+" else (max(a, b), sign, min(a, b))

    def example(self, seed: int, index: int, words: Words) -> Example:
        """One prompt and its counterfactual."""
        stream = Stream("arithmetic", seed, index)
        shown: list[Problem] = []
        others: list[int] = []
        a, sign, b = 0, "", 0
        while len(shown) < self.shots:
            problem = self._problem(stream)
            shown += [problem] if problem not in shown else []
        while not others or (a, sign, b) in shown:  # a difference from the least number has no other second number
            a, sign, b = self._problem(stream)
            others = [x for x in self._numbers if x != b and (sign == "+" or x <= a) and (a, sign, x) not in shown]
        other = stream.choice(others)
        lines = "".join(f"{p[0]} {p[1]} {p[2]} = {_result(p)}\n" for p in shown)
        options = tuple(f" {c}" for c in self.results)

        context, tags = f"{a} {sign} {b}", {"operation": "add" if sign == "+" else "subtract"}

        def side(second: int, wrong: int, corrupt: Example | None) -> Example:
            text, at = fill(lines + "{a} {sign} {b} =", {"a": str(a), "sign": sign, "b": str(second)})
            answer, distractor = f" {_result((a, sign, second))}", f" {_result((a, sign, wrong))}"
            spans = {name: (span,) for name, span in at.items()}
            return Example(text, answer, distractor, options, spans, corrupt, context, tags, answer)

        return side(b, other, side(other, b, None))

    def generate(self, model: Tokenizing, n: int, seed: int = 0, **options: object) -> Prompts | PromptPairs:
        """Pairs whose answers are tokens where the tokenizer has all results as one token, and texts (``targets``) otherwise."""
        from interp.tasks.tokens import one_token, prompts_of

        task = self.having(**options)
        whole = all(one_token(model, task.words()))
        return prompts_of(model, task.draw(n, seed, {}), replace(task.rules, one_token=whole), str(task), seed)

    def score(self, model: HookedModel, prompts: Prompts | PromptPairs, among: Literal["vocabulary", "options"] = "vocabulary"):
        """Which results are right, Bool [prompt].

        With one-token results, the most likely token; otherwise the integer at the beginning of the
        first line that greedy decoding writes.
        """
        from interp.prompts import clean_prompts
        from interp.tasks.scoring import greedy_integer, most_likely

        return most_likely(model, prompts, among) if clean_prompts(prompts).answers is not None else greedy_integer(model, prompts)


TASK = Arithmetic
