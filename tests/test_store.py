"""The folder of saved results: where they lie, when they are computed again, what is taken from strangers."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_results
from test_results import doctored
from toy_results import EchoResult, ToyModel, ToyPrompts, cells, echo

from interp import analyses, store
from interp.errors import InputError
from interp.results import Result, analysis


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy analyses are among ours."""
    monkeypatch.setattr(analyses, "ANALYSES", ("echo", "cells"))
    for name in analyses.ANALYSES:
        monkeypatch.setitem(sys.modules, f"interp.analyses.{name}", toy_results)


def run(seed: int = 0, **settings: Any) -> EchoResult:
    return echo(ToyModel(), ToyPrompts(task="ioi", seed=0), seed=seed, **settings)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return store.save(run(), tmp_path / "results")


def test_where_a_result_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run()
    assert store.save(result, tmp_path) == tmp_path / "echo" / result.identity[:8]
    assert store.find("echo", result.identity, tmp_path) == tmp_path / "echo" / result.identity[:8]
    assert store.find("echo", result.identity[:8] + "0" * 56, tmp_path) is None
    assert store.find("echo", result.identity, tmp_path / "nowhere") is None
    monkeypatch.chdir(tmp_path)
    assert store.save(result) == Path("results") / "echo" / result.key


def test_two_identities_that_begin_alike_live_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run(seed=1), run(seed=2)
    monkeypatch.setattr(Result, "identity", property(lambda self: "a" * 8 + self.meta.identity[8:]))
    folders = [store.save(r, tmp_path) for r in (first, second, first, second)]
    assert [f.name for f in folders[:2]] == ["aaaaaaaa", second.identity] and folders[2:] == folders[:2]
    for result, folder in zip((first, second), folders, strict=False):
        assert store.find("echo", result.identity, tmp_path) == folder
        assert store.load(folder).meta.seed == result.meta.seed  # type: ignore[union-attr]


def test_load_finds_the_class(saved: Path) -> None:
    again = store.load(saved)
    assert isinstance(again, EchoResult) and again.identity == run().identity
    assert torch.equal(again.answer, run().answer)  # type: ignore[arg-type]


def test_only_our_analyses_are_imported(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("trap", "os", "../trap", "echo.trap"):
        folder = doctored(saved, tmp_path, analysis=name, meta__analysis=name)
        for verb in (store.load, store.replay):
            with pytest.raises(InputError, match="is not an analysis of this version of interp"):
                verb(folder)
        shutil.rmtree(folder)
    for kind in ("Result", "ToyModel", "os", "Tensor", "plots", ["x"]):
        folder = doctored(saved, tmp_path, kind=kind)
        with pytest.raises(InputError, match="which echo does not return"):
            store.load(folder)
        shutil.rmtree(folder)


def test_other_versions(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo, "version", 1)
    with pytest.raises(InputError, match="was made by version 2 of echo, but this interp has version 1"):
        store.load(saved)
    monkeypatch.setattr(echo, "version", 3)
    with pytest.warns(UserWarning, match="was made by version 2 of echo, now it is 3"):
        assert store.load(saved)


def test_cached_computes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(model: ToyModel, *, scale: float = 1.0, metric: Any = "kl") -> EchoResult:
        calls.append(1)
        return EchoResult(**toy_results.echo_fields())

    counted.__module__, counted.__name__ = "toy_results", "echo"
    function = analysis(version=2)(counted)
    monkeypatch.setattr(toy_results, "echo", function)
    remembered = store.cached(function, tmp_path)
    first = remembered(ToyModel())
    again = remembered(ToyModel(), scale=1)
    assert len(calls) == 1 and again.identity == first.identity and torch.equal(again.floor, first.floor)
    remembered(ToyModel(), scale=2.0)
    remembered(ToyModel(fingerprint="other"))
    assert len(calls) == 3 and len(store.saved(tmp_path)) == 3
    for _ in range(2):
        remembered(ToyModel(), metric=lambda x: x)
    assert len(calls) == 5


def test_cached_does_not_pass_over_damage(tmp_path: Path) -> None:
    remembered = store.cached(echo, tmp_path)
    remembered(ToyModel(), ToyPrompts())
    (folder,) = store.saved(tmp_path)
    (folder / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        remembered(ToyModel(), ToyPrompts())


def test_saved_lists_results(tmp_path: Path) -> None:
    made = [store.save(r, tmp_path / "results") for r in (run(1), run(2), cells(toy_results.ToyPair(), ToyPrompts()))]
    shutil.copytree(made[0], tmp_path / "results" / "echo" / ".1234.abcd")  # left behind by a killed save
    assert store.saved(tmp_path) == sorted(made) and store.saved(made[0]) == [made[0]]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, sentence in (("empty", "holds no saved results"), ("file", "it is a file"), ("nowhere", "does not exist")):
        with pytest.raises(InputError, match=sentence):
            store.saved(tmp_path / name)


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot save a result in .*: (Not a directory|File exists)"):
        store.save(run(), tmp_path / "file")


def test_replay_is_the_command(saved: Path) -> None:
    words = store.replay(saved)
    assert words == run().meta.command() and words[:3] == ["interp", "run", "echo"]
    assert "--task=ioi" in words and shlex.split(shlex.join(words)) == words


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"meta__settings": {"trust_remote_code": True}}, "echo has no parameter 'trust_remote_code'"),
        ({"meta__settings": {"scale=1 --trust-remote-code": 1}}, "has no parameter"),
        ({"meta__models": [{"side": "trust-remote-code", "name": "", "fingerprint": "", "dtype": "", "edits": []}]}, "a model is called"),
        ({"meta__inputs": [{"parameter": "debug", "kind": "", "digest": "", "text": "x"}]}, "has no parameter 'debug'"),
        ({"meta__settings": {"metric": "user function f"}}, "the setting metric is a function of the user's"),
        ({"meta__inputs": [{"parameter": "prompts", "kind": "", "digest": "", "text": ""}]}, "the input prompts was made in Python"),
    ],
)
def test_replay_takes_no_flags_from_a_folder(saved: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=f"cannot be replayed: .*{sentence}"):
        store.replay(doctored(saved, tmp_path, **changes))


def test_values_of_a_strangers_folder_stay_values(saved: Path, tmp_path: Path) -> None:
    page = json.loads((saved / "result.json").read_text())
    models = [dict(page["meta"]["models"][0], text="x --trust-remote-code; rm -rf ~")]
    words = store.replay(doctored(saved, tmp_path, meta__models=models))
    assert "--model=x --trust-remote-code; rm -rf ~" in words
    assert "'--model=x --trust-remote-code; rm -rf ~'" in shlex.join(words)
