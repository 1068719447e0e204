"""The study of intruder dimensions: its counts, its planted directions, its tables by hand, and a quick run of all of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "studies"))

import lora_or_full as study  # noqa: E402

import interp  # noqa: E402
from interp.models import ModelPair  # noqa: E402


@pytest.fixture(scope="module")
def found() -> study.Found:
    made = study.Found(plants={0.5: 0.0, 1.0: 1.0, 2.0: 0.75, 3.0: 1.0})
    for name in (study.LORA, study.FULL):
        pair = ModelPair.load(study.BASE, name)
        for k, into in ((study.K, made.dims), (study.WIDER, made.wider)):
            into[name] = interp.intruder_dimensions(pair, k=k, draws=1)
    pair = ModelPair.load(study.BASE, study.LORA)
    prompts, text = interp.task("boxes").generate(pair, n=8, seed=1), interp.task("plain_text").generate(pair, n=3, seed=0)
    made.sweeps[study.LORA, 0.6] = interp.intruder_scaling(pair, prompts, text, threshold=0.6, factors=(0, 1), draws=1)
    return made


def test_counts_of_the_wider_search_are_those_of_the_definition(found) -> None:
    for name, dims in found.dims.items():
        n, null = study.counted(found.wider[name], study.K, study.THRESHOLD)
        assert torch.equal(n, dims.count) and torch.equal(null, dims.chance_count)
        looser = study.counted(found.wider[name], study.K, 0.6)[0]
        assert torch.equal(looser, replace(dims, threshold=0.6).count) and int(looser.sum()) >= int(n.sum())


def test_planted_directions_are_found_when_they_are_large() -> None:
    assert study.share_found(3.0, 0) == 1 and study.share_found(0.2, 0) == 0


def test_the_tables_say_what_was_counted(found) -> None:
    rows = study.matrices(found).splitlines()
    assert len(rows) == 2 + 28 + 1 + 1
    for name, column in ((study.LORA, 1), (study.FULL, 5)):
        dims = found.dims[name]
        cells = [row.split()[column] for row in rows[2:30]]
        assert list(map(int, cells)) == dims.count.flatten().tolist()
    assert rows[2].split()[0] == "L0.W_Q" and rows[30].split()[:4] == ["all", "(lowest;", "largest", "ratio)"]
    looser = study.thresholds(found).splitlines()
    assert len(looser) == 1 + 2 * len(study.LOOSER) and looser[1].split()[:5] == ["first", "10,", "|cos|", "<", "0.5"]
    table = study.sweeps(found)
    assert [row.split()[:3] for row in table.splitlines()[2:6]] == [
        [k, "x", g] for k, g in zip(("intruders", "intruders", "others", "random"), "0100", strict=True)
    ]
    change = found.sweeps[study.LORA, 0.6].change("margin", 0, 0)
    assert f"{float(change.value):+.2f} [{float(change.low):+.2f}, {float(change.high):+.2f}]" in table.splitlines()[2]
    assert all("[" not in row for row in table.splitlines()[4:6])  # controls of one draw have no ends
    assert study.sweeps(study.Found()) == "there is nothing to scale"


def test_the_answer_follows_from_the_numbers(found) -> None:
    # intruders, those that are no mixture, the most of random changes
    assert study.decision((9, 5, 1), (1, 0, 1)).startswith("The adapter left more intruder dimensions than full tuning: boxes-lora has 9")
    assert study.decision((0, 0, 0), (4, 3, 1)).startswith("Full tuning left more intruder dimensions than the adapter")
    assert study.decision((9, 0, 0), (1, 0, 0)).startswith("Not found here")  # mixtures only
    assert study.decision((9, 5, 9), (1, 0, 1)).startswith("Not found here")  # as many as by chance
    assert study.decision((5, 5, 0), (5, 5, 0)).startswith("Not found here")
    lines = study.verdict(found)
    # 2.0 failed in a matrix, so that only 3 is safe although 1 was found everywhere
    assert "from 3 times that value on (0% at 0.5, 100% at 1, 75% at 2, 100% at 3 of 4 matrices)" in lines[1]
    assert study.numbers(SimpleNamespace(**{k: torch.ones(2, 2, dtype=torch.long) for k in ("count", "windowed", "chance_count")})) == (
        4,
        4,
        2,
    )
    assert lines[2].startswith("boxes-lora, |cos| < 0.6: ") and "intruder dimensions of tuned" in lines[2]


@pytest.mark.full
def test_a_quick_run_writes_the_page(tmp_path, capsys) -> None:
    assert study.main(["--quick", "--n", "12", "--out", str(tmp_path)]) == 0
    told, page = capsys.readouterr().out, (tmp_path / "lora_or_full.html").read_text(encoding="utf-8")
    for what in ("Could there be any?", "no mixture of base"):
        assert what in told and what.replace("'", "&#x27;") in page, what
    assert "L3.W_out" in told and "first 20, |cos| < 0.8" in told
    with pytest.raises(SystemExit):
        study.main(["--n", "3"])
    assert "--n is 3, expected 8 or more" in capsys.readouterr().err
