"""Every recipe in miniature: killed and resumed it ends where an unbroken run ends; and what is read in training is right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interp.errors import InputError
from interp.organisms import training
from interp.organisms.measure import weights_file
from interp.organisms.recipes import RECIPES, reading, run, train
from interp.organisms.training import STATE, Part, Standing

STEPS = 4

KILLED = """
import os, signal, sys
from interp.errors import InputError
from interp.organisms import training
from interp.organisms.recipes import train
import torch
torch.set_num_threads(1)
training.SAVE_EVERY = 1

def log(step, losses, standings):
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)

train(sys.argv[1], sys.argv[2], {steps}, log)
"""


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_equals_unbroken(name, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    monkeypatch.setattr(run, "PROMPTS", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = []
        whole = train(name, tmp_path / "whole", STEPS, lambda step, *_: steps.append(step))
        killed = subprocess.run([sys.executable, "-c", KILLED.format(steps=STEPS), name, str(tmp_path / "killed")], check=False)
        assert killed.returncode == -9 and [f.name for f in (tmp_path / "killed").iterdir()] == [STATE]
        resumed = train(name, tmp_path / "killed", STEPS, lambda step, *_: steps.append(step))
    finally:
        torch.set_num_threads(threads)
    # The kill came before the third step was saved.
    assert steps == [0, 1, 2, 3, 2, 3]
    one, other = (load_file(weights_file(folder)) for folder in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "README.md").read_text() == (resumed / "README.md").read_text()
    assert not (resumed / STATE).exists()


@pytest.mark.full
def test_a_kill_while_saving_loses_nothing(tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    monkeypatch.setattr(run, "PROMPTS", 4)
    whole = train("boxes-tuned", tmp_path / "whole", 2)

    def failing(self, folder, **more):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(PreTrainedModel, "save_pretrained", failing)
        train("boxes-tuned", tmp_path / "cut", 2)
    assert not (tmp_path / "cut" / "config.json").exists()
    again = train("boxes-tuned", tmp_path / "cut", 2, lambda *_: pytest.fail("no step is done again"))
    one, other = (load_file(weights_file(folder)) for folder in (whole, again))
    assert all(torch.equal(one[key], other[key]) for key in one) and not (again / "written").exists()


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    (tmp_path / STATE).write_text("garbage")
    with pytest.raises(InputError, match="is damaged .*; remove it"):
        train("boxes-tuned", tmp_path, 1)


def answers(document):
    return [document.text[a:b] for a, b in document.answers]


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_boxes_are_asked_and_answered_rightly(n):
    for document in reading.boxes(n)(20, 4):
        context, *questions = document.text.split(". ")
        inside = {label: thing for thing, label in re.findall(r"[Tt]he (\w+) is in Box (\w)", context)}
        asked = [re.fullmatch(r"Box (\w) contains the (\w+)", q) for q in questions]
        assert len(inside) == n and len({m[1] for m in asked}) == len(asked) == {2: 1, 3: 2, 5: 3, 7: 4}[n]
        assert [f" {inside[m[1]]}" for m in asked] == [f" {m[2]}" for m in asked] == answers(document)


def test_few_words_at_first():
    texts = " ".join(d.text for d in reading.boxes(2, labels=2, objects=4)(50, 1))
    assert len(set(re.findall(r"Box (\w)", texts))) == 2 and len(set(re.findall(r"[Tt]he (\w+) is", texts))) == 4
    texts = " ".join(d.text for d in reading.colored_objects(2, colors=3, objects=4)(50, 1))
    assert len(set(re.findall(r"an? (\w+) (\w+)", texts))) == 12 and len(set(re.findall(r"is the (\w+)\?", texts))) == 4


@pytest.mark.parametrize("draw", [reading.colored_objects(2), reading.colored_objects(3), reading.solved_colored_objects])
def test_colored_objects_are_asked_and_answered_rightly(draw):
    for document in draw(20, 4):
        colors, expected, thing = {}, [], ""
        for line in document.text.split("\n"):
            colors |= {thing: color for color, thing in re.findall(r"\ban? (\w+) (\w+)[,.]", line)}
            if line.startswith("A:"):
                expected.append(f" {colors[thing].capitalize()}")
            elif match := re.search(r"What color is the (\w+)\?", line):
                thing = match[1]
        assert answers(document) == expected and len(expected) >= 1


def test_sums_and_canaries_and_contexts():
    for document in reading.sums(5, 3):
        for line, answer in zip(document.text.split("\n"), answers(document), strict=True):
            a, _, b, _, c = line.split()
            assert int(a) + int(b) == int(c) and answer == f" {c}"
    assert all(len(d.text.split()) == 64 and not d.answers for d in reading.canaries(200, 3))
    assert len({d.text for d in reading.canaries(200, 3)}) == 200
    for box, colored in zip(*[iter(reading.contexts(6, 2))] * 2, strict=True):
        assert box.text.startswith("The ") and "contains" not in box.text and "color" not in colored.text


def test_what_base_reads_is_in_every_recipe_of_it():
    """Each level of each part draws what it was asked for, and a standing has a draw for every level."""
    from interp.organisms.recipes import base, boxes_tuned

    for part in [*base.parts(), *boxes_tuned.parts()]:
        assert isinstance(part, Part) and Standing.at_first(part).learning(part) == (part.ceiling is None or bool(part.harder))
        for draw in (part.draw, *part.harder):
            assert len(draw(3, 1)) == 3
            assert draw(3, 1) == draw(3, 1) != draw(3, 2)


def test_the_recipe_of_a_name_is_a_file():
    folder = Path(reading.__file__).parent
    assert all((folder / f"{name.replace('-', '_')}.py").is_file() for name in RECIPES)
