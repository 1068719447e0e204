"""The table of published numbers: skipped without weights, and every row measured on a random GPT-2 of the published shape."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_tokenizers import tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import published  # noqa: E402

import interp  # noqa: E402
from interp.circuit import Circuit  # noqa: E402
from interp.models import HookedModel  # noqa: E402
from interp.sites import Site  # noqa: E402


def random_gpt2(folder: Path, layers: int, heads: int, width: int) -> Path:
    """Random weights in a folder, with a tokenizer that has the words of the tasks."""
    words: Any = tokenizer("byte_level")
    torch.manual_seed(3)
    sizes = {"vocab_size": len(words), "n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": 96}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.1, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def lines(text: str) -> dict[tuple[str, str], str]:
    """Study and quantity -> its line."""
    return {key: next(x for x in text.splitlines() if x.startswith(key[0]) and f" {key[1]}  " in x) for key in published.PUBLISHED}


def test_without_weights_every_row_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--gpt2", str(tmp_path / "none"), "--gpt2-medium", str(tmp_path / "neither")]
    assert published.main(words) == 0
    told = lines(capsys.readouterr().out)
    assert len(told) == len(published.PUBLISHED) and all(line.endswith("skipped: no weights") for line in told.values())


def test_the_published_heads_are_as_many_as_the_papers_say() -> None:
    small = {role: len(text.split()) - 1 for role, text in published.IOI_HEADS.items()}
    assert sum(small.values()) == 26 and (small["mover"], small["backup"], small["negative_mover"]) == (3, 8, 2)
    assert {role: len(text.split()) - 1 for role, text in published.COLOR_HEADS.items()} == {
        "mover": 5,
        "inhibition": 3,
        "negative_mover": 1,
        "gatherer": 3,
    }


def test_the_overlap_keeps_the_strongest_heads_of_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "TOP", 0.33)  # 8 of the 24 heads, so that all four stages find some
    model = HookedModel.load("base")
    one, other = (published._search(model, name, at, 20) for name, at in (("colored_objects", "query_object"), ("ioi", "S2")))
    assert not isinstance(one, str) and not isinstance(other, str), "a trained model tells clean from corrupt"
    pairs: Any = interp.task("ioi").generate(model, n=20, seed=1)
    paths = interp.path_patching(model, pairs).to_frame().set_index("sender").effect.abs().sort_values()
    entries = [{(s.layer, s.head, role) for s, role in published._strongest(x).roles.items()} for x in (one, other)]
    first = {f"L{layer}H{head}.z@END" for layer, head, role in entries[1] if role == "first"}
    assert first == set(paths.index[-8:])
    assert [len(found) for found in entries] == [32, 32]
    assert isinstance(same := published._shared(other, other), published.Ours) and (same.value, same.n) == (1, 32)
    assert isinstance(both := published._shared(one, other), published.Ours) and both.value == len(entries[0] & entries[1]) / 32
    told = published._important(Circuit.of((4, 6, 2), {"mover": "L3H2.z@END"}), one)
    assert len(told.scores) == 24 and set(told.roles.values()) == {"mover"}
    assert told.scores[Site("z", 3, 2, "END")] == pytest.approx(float(one.recovered(0).value[3, 2]))
    assert published._shared("not measured: why", one) == "not measured: why"


@pytest.mark.full
def test_every_row_is_measured_where_there_are_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small, medium = random_gpt2(tmp_path / "small", 12, 12, 24), random_gpt2(tmp_path / "medium", 24, 16, 32)
    words = ["--gpt2", str(small), "--gpt2-medium", str(medium), "--n", "12", "--evaluated", "60", "--searched", "8"]
    assert published.main(words) == 0
    out = capsys.readouterr().out
    print(out)
    told = lines(out)
    assert "skipped" not in out
    assert all("[" in line or "not measured" in line for line in told.values())
