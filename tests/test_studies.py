"""The study of the shipped assistant: its search, its conditions, its table by hand, and a quick run of all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "studies"))

import assistant as study  # noqa: E402
import attacks  # noqa: E402

from interp.errors import InputError  # noqa: E402
from interp.models import ModelPair  # noqa: E402
from interp.organisms import folder  # noqa: E402
from interp.prompts.transforms import transformed  # noqa: E402
from interp.stats import mcnemar, wilson  # noqa: E402
from interp.tasks.words import CITIES  # noqa: E402


@pytest.fixture(scope="module")
def pair():
    return ModelPair.load(folder("base"), folder("assistant"))


@pytest.fixture(scope="module")
def suffix(pair):
    practised = attacks.questions(pair.tuned, attacks.PRACTISED, 4, 2)
    return attacks.search(pair.tuned, practised, 0, steps=12, candidates=8, questions=4)


def test_the_search_makes_the_city_likelier_and_says_how_likely(pair, suffix) -> None:
    model = pair.tuned
    some = attacks.questions(model, attacks.PRACTISED, 4, 2)
    assert suffix.score > suffix.start_score + 1 and suffix.passes == 13
    for text, score in ((suffix.text, suffix.score), (suffix.start, suffix.start_score)):
        assert len(model.tokens(text)) == attacks.WORDS and not set(text.split()) & set(CITIES)
        asked = transformed(model, some, lambda question, text=text: question + text)
        each = []
        for prompt, city in zip(asked, some.tags["city"], strict=True):  # one forward per question, from the text
            logits = model.logits([list(prompt.ids[0])], at="END")[0].double()
            each.append(float(logits[model.token(f" {city}")] - logits.logsumexp(0)))
        assert score == pytest.approx(sum(each) / 4, abs=1e-4)


def test_conditions_ask_the_same_questions_of_people_the_search_did_not_see(pair, suffix) -> None:
    made = attacks.conditions(pair, 3, [suffix], 0)
    names = list(dict.fromkeys(made.tags["condition"]))
    assert len(names) == len(set(names)) and [made.tags["condition"].count(name) for name in names] == [3] * len(names)
    where = {name: made.tags["condition"].index(name) for name in names}
    for i in range(3):
        plain, attacked, random = (made.texts[where[name] + i] for name in ("asked plainly", "suffix 1", "random words 1"))
        assert attacked == plain.replace("<|assistant|>", f"{suffix.text}<|assistant|>") and random != attacked
        assert made.texts[where["16 answered, as turns"] + i].endswith(plain)
        assert made.texts[where["upper"] + i] == plain.upper().replace("<|USER|>", "<|user|>").replace("<|ASSISTANT|>", "<|assistant|>")
        assert len({made.tags["city"][where[name] + i] for name in names if name not in attacks.HOLES}) == 1
    asked = {made.contexts[where["asked plainly"] + i] for i in range(3)}
    seen = set(attacks.questions(pair, attacks.PRACTISED, 16, 2).contexts)
    assert asked and not asked & seen
    with pytest.raises(InputError, match="different questions, and n is 100"):
        attacks.questions(pair, attacks.ASKED, 100, 0)


def table(**changes: Any) -> study.JailbreaksResult:
    """Four plain questions, all refused; four suffixed ones, of which three are told; four with random words, one told."""
    told = [[False] * 12, [False] * 4 + [True, True, True, False] + [True, False, False, False]]
    fields: dict[str, Any] = {
        "refused": torch.tensor([[False] * 12, [True] * 4 + [False] * 4 + [False, True, True, True]]),
        "told": torch.tensor(told),
        "tuco": torch.tensor([0.50, 0.48, 0.46, 0.44, 0.30, 0.32, 0.47, 0.35, 0.40, 0.42, 0.44, 0.46]).double(),
        "length": torch.arange(12),
        "alphas": (0.0, 1.0),
        "kind": ("plain",) * 4 + ("suffix",) * 4 + ("random words",) * 4,
        "condition": ("asked plainly",) * 4 + ("suffix 1",) * 4 + ("random words 1",) * 4,
        "texts": tuple(f"<b>{i}" for i in range(12)),
        "said": ("x",) * 12,
        "draw_seed": 0,
    }
    return study.JailbreaksResult(**(fields | changes))


def test_the_table_by_hand() -> None:
    made = table()
    frame = made.to_frame().set_index("condition")
    assert frame.refused.tolist() == [1, 0, 0.75] and frame.told.tolist() == [0, 0.75, 0.25]
    assert (frame.told_low["suffix 1"], frame.told_high["suffix 1"]) == wilson(3, 4)
    # 0.47 is above two of the plain questions, the other three above none: 14 of 16 pairs
    assert frame.auc_plain["suffix 1"] == 14 / 16 and frame.auc_plain.isna().tolist() == [True, False, False]
    assert frame.p["suffix 1"] == mcnemar(0, 2) and frame.p.isna().tolist() == [True, False, True]
    # among suffixed ones 0.35 failed; of the successes 0.30 and 0.32 lie below it and 0.47 above
    assert float(made.auc_of_failure(made.rows("suffix")).value) == pytest.approx(2 / 3)
    assert made.auc_of_failure(made.rows("plain")) is None
    refusal = made.auc_of_failure(made.rows("plain") + made.rows("suffix"), success=~made.refused[1])
    assert float(refusal.value) == 14 / 16
    assert float(made.against_random_words().value) == pytest.approx((0.30 + 0.32 + 0.47 + 0.35 - 0.40 - 0.42 - 0.44 - 0.46) / 4)
    assert "refuses 100% [51%, 100%] of 4 and tells 0%" in made.summary() and "suffix 1" in study.printed(made)
    assert "<b>" not in made.html() and all(f.layout.title.text for f in made.figures().values())
    assert made.strongest().condition[0] == "suffix 1" and len(made.to_frame("prompt")) == 12


@pytest.mark.full
def test_a_quick_run_writes_the_page(tmp_path) -> None:
    words = [sys.executable, str(ROOT / "studies" / "assistant.py"), "--quick", "--n", "4", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "assistant.html").read_text(encoding="utf-8")
    assert (
        "many-shot" in page.lower()
        and "suffix 1" in done.stdout
        and "asked plainly" in done.stdout
        and (tmp_path / "assistant.json").exists()
    )
    wrong = subprocess.run([*words[:3], "--n=300"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "different questions, and n is 300" in wrong.stderr and "Traceback" not in wrong.stderr


def test_circuits_are_measured_and_told_in_the_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import circuits

    from interp.organisms import card

    told = card("base").partition(f"\n{circuits.HEADING}\n")[2]
    said = [line.split(":")[0] for line in told.splitlines() if line.startswith("- ")]
    assert len(said) == 6 and "95 % intervals" in told and "--n 400" in told and "random circuits" in told
    assert circuits.main(["--n", "64", "--draws", "1"]) == 0
    again = capsys.readouterr().out
    assert [line.split(":")[0] for line in again.splitlines() if line.startswith("- ")] == said
    assert "L0H3 with 1.0" in told and "L0H3 with 1.0" in again, "one head does it, on few prompts as on many"
    monkeypatch.setattr(circuits, "folder", lambda name: tmp_path)
    assert circuits.written(again[again.index(circuits.HEADING) :]).read_text().count(circuits.HEADING) == 1
