"""Results: provenance, checks, tables, and files that a stranger may have written."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from toy_results import EchoResult, ToyCheckpoint, ToyModel, ToyPair, ToyPrompts, cells, echo, echo_fields

from interp.data_files import data_path
from interp.errors import InputError
from interp.fields import axes_of, typed
from interp.provenance import sha256
from interp.results import Meta, Result, analysis
from interp.sites import Site


def made(seed: int = 0, **settings: Any) -> EchoResult:
    return echo(ToyModel(), ToyPrompts(), seed=seed, **settings)


# ---- identity


def test_the_identity_is_that_of_what_determines_the_numbers() -> None:
    first = made()
    assert first.identity == made().identity == echo(ToyModel(), ToyPrompts(), scale=1).identity
    assert len(first.identity) == 64 and first.key == first.identity[:8] and first.digest == first.identity
    assert first.identity == echo(ToyModel("another name", device="cuda"), prompts=ToyPrompts(task="ioi", seed=0)).identity
    others = [
        made(seed=1),
        made(scale=1.5),
        made(names=("a", "b")),
        echo(ToyModel(fingerprint="f9"), ToyPrompts()),
        echo(ToyModel(dtype=torch.bfloat16), ToyPrompts()),
        echo(ToyModel(active_edits=("e1",)), ToyPrompts()),
        echo(ToyModel(), ToyPrompts("d9")),
        cells(ToyPair(), ToyPrompts()),
        cells(ToyPair(tuned=ToyModel("t", "f0")), ToyPrompts()),
    ]
    assert len({first.identity, *(o.identity for o in others)}) == len(others) + 1


def test_the_version_is_in_the_identity() -> None:
    meta = echo.describe(ToyModel(), ToyPrompts())
    assert dataclasses.replace(meta, version=3).identity != meta.identity
    assert dataclasses.replace(meta, notes={"seconds": 3}).identity == meta.identity == made().identity


def test_what_the_provenance_says() -> None:
    result = echo(ToyModel(active_edits=("e1",)), ToyPrompts(task="boxes(n_boxes=3)", seed=4, n=7), scale=2.0, names=("a", "b"), seed=5)
    meta = result.meta
    assert (meta.analysis, meta.version, meta.seed) == ("echo", 2, 5) == ("echo", echo.version, 5)
    assert meta.models == (
        {"side": "model", "name": "toy", "fingerprint": "f0", "dtype": "float32", "edits": ["e1"], "text": "models/toy"},
    )
    assert meta.inputs == (
        {"parameter": "prompts", "kind": "ToyPrompts", "digest": "d1", "text": "", "task": "boxes(n_boxes=3)", "n": 7, "seed": 4},
    )
    assert meta.settings == {"scale": 2, "names": ["a", "b"], "metric": "kl", "deep": False}
    assert meta.command() == [
        "interp", "run", "echo", "--model=models/toy", "--dtype=float32", "--task=boxes(n_boxes=3)", "--prompts-n=7", "--prompts-seed=4",
        "--scale=2", "--names=a,b", "--metric=kl", "--no-deep", "--seed=5",
    ]  # fmt: skip
    assert meta.notes["seconds"] >= 0 and meta.notes["device"] == "cpu" and meta.notes["peak_mb"] > 1
    assert meta.notes["versions"]["torch"] == torch.__version__
    pair = cells(ToyPair(), ToyPrompts()).meta
    assert [m["side"] for m in pair.models] == ["base", "tuned"] and pair.notes["models"] == ["the tuned model has 2 more tokens"]


def test_a_function_of_the_users_cannot_be_replayed_and_does_not_collide() -> None:
    plain = made(metric=Site("z", 9, 6, "END"))
    assert plain.meta.settings["metric"] == "L9H6.z@END" and plain.meta.user_functions == ()
    mine, other = made(metric=lambda x: x), made(metric=functools.partial(max, 1))
    assert mine.meta.settings["metric"].startswith("user function") and mine.meta.user_functions == ("metric",)
    assert not mine.meta.replayable and "the setting metric is a function of the user's" in mine.meta.obstacles
    assert made(metric=lambda x: x).identity == mine.identity  # the same numbers
    assert made(seed=1, metric=lambda x: x).identity != mine.identity
    changed = echo.__wrapped__(ToyModel(), ToyPrompts(), metric=lambda x: x, seed=3)
    object.__setattr__(changed, "meta", mine.meta)
    assert changed.meta.identity == mine.meta.identity and changed.identity != mine.identity
    assert other.meta.settings["metric"] == "user function"
    ours = made(metric=sha256)
    assert ours.meta.settings["metric"] == "sha256" and ours.meta.user_functions == ()


def test_obstacles_name_what_is_in_the_way() -> None:
    result = echo(ToyModel(checkpoint=None, active_edits=("e",)), ToyPrompts())
    assert result.meta.obstacles == (
        "the input prompts was made in Python",
        "the model model was given as an object",
        "the model model had edits in force",
    )
    assert echo(ToyModel(), ToyPrompts(task="ioi", seed=0)).meta.replayable


def test_a_command_names_a_model_as_it_was_written() -> None:
    def written(**model: Any) -> list[str]:
        return echo(ToyModel(**model), ToyPrompts()).meta.command()[3:5]

    assert written(checkpoint=ToyCheckpoint(Path("cache/snapshots/1f0c"), "org/toy@main"))[0] == "--model=org/toy@main"
    assert written(checkpoint=ToyCheckpoint(data_path("organisms", "toy"), "toy"))[0] == "--model=toy"
    assert written(checkpoint=None)[0] == "--model=toy"
    assert written(adapter=Path("lora/a b")) == ["--model=models/toy", "--adapter=lora/a b"]
    pair = ToyPair(tuned=ToyModel("toy + a b", "f2", adapter=Path("lora/a b")))
    assert cells(pair, ToyPrompts()).meta.command()[3:6] == ["--base=models/base", "--tuned=lora/a b", "--dtype=float32"]


def test_calls_that_cannot_be_recorded_are_refused() -> None:
    with pytest.raises(InputError, match="the setting metric of echo must be a plain value.*Tensor"):
        made(metric=torch.ones(2))
    with pytest.raises(InputError, match="echo cannot use a object as prompts"):
        echo(ToyModel(), object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"echo\(\): missing a required argument: 'prompts'"):
        echo(ToyModel())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="must name each of its parameters"):
        analysis()(lambda *models: None)  # type: ignore[arg-type, return-value]


def test_a_result_built_by_hand_has_no_identity(tmp_path: Path) -> None:
    by_hand = EchoResult(**echo_fields())
    with pytest.raises(InputError, match="built by hand"):
        by_hand.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    assert dataclasses.replace(made(), scale=2.0).meta is None


def test_results_are_frozen_and_short_to_print() -> None:
    result = made()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.scale = 2.0  # type: ignore[misc]
    assert repr(result) == f"<EchoResult: {result.summary()}>"
    assert result != made() and result == result
    assert "plotly" in result._repr_html_() and result.summary() in result._repr_html_()


# ---- checks


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"value": torch.ones(4, 3)}, r"EchoResult.value must be .*prompt layer head.*, but it is torch.float32 \[4, 3\]"),
        ({"value": torch.ones(4, 3, 2, dtype=torch.long)}, "value must be .*int64"),
        ({"value": torch.ones(4, 3, 2, dtype=torch.float16)}, "value must be a CPU tensor .*float16"),
        ({"value": torch.ones(4, 3, 2, requires_grad=True)}, "with gradient"),
        ({"value": None}, "value must be .*NoneType"),
        ({"floor": torch.ones(5)}, "the axis 'layer' of EchoResult has 3 entries in value and 5 in floor"),
        ({"labels": {"layer": ("a", "b")}}, "the axis 'layer' of EchoResult has 3 entries in value but 2 labels"),
        ({"scale": float("nan")}, "scale is nan; a number outside a tensor must be finite"),
        ({"counts": {1: float("inf")}}, r"counts\[1\] is inf"),
        ({"words": (object(),)}, r"words\[0\] must be a tensor or a JSON value, but it is a object"),
        ({"counts": {"$tensor": 1.0}}, r"has the key '\$tensor'"),
    ],
)
def test_fields_that_do_not_fit_are_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EchoResult(**echo_fields(**change)).check()


def test_an_analysis_checks_what_it_returns() -> None:
    @analysis()
    def bad(model: ToyModel) -> EchoResult:
        return EchoResult(**echo_fields(scale=float("nan")))

    with pytest.raises(ValueError, match="scale is nan"):
        bad(ToyModel())


def test_axes() -> None:
    assert axes_of(Float[Tensor, "layer layer head=4"]) == ("layer", "layer_2", "head")
    assert axes_of(Float[Tensor, "3"] | None) == ("axis_0",)
    assert axes_of(Float[Tensor, ""]) == () and axes_of(dict[str, Tensor]) is None


# ---- tables


def test_the_table_is_the_mean_over_prompts() -> None:
    result = made()
    table = result.to_frame()
    assert list(table.columns) == ["layer", "head", "value", "floor", "bias", "right", "answer"]
    assert len(table) == 6 and list(table.layer[:3]) == ["low", "low", "mid"]
    for row in table.itertuples():
        layer = ("low", "mid", "top").index(row.layer)
        kept = [float(result.value[p, layer, row.head]) for p in range(4)]
        kept = [v for v in kept if v == v]  # one cell is NaN
        assert row.value == pytest.approx(sum(kept) / len(kept))
        assert row.floor == pytest.approx(0.1 * (layer + 1)) and row.bias == 5
        assert row.right == 0.75 and row.answer == 2.25


def test_the_table_per_prompt_has_every_number() -> None:
    result = made()
    table = result.to_frame(per="prompt")
    assert list(table.columns[:3]) == ["prompt", "layer", "head"] and len(table) == 24
    for row in table.itertuples():
        layer = ("low", "mid", "top").index(row.layer)
        expected = float(result.value[row.prompt, layer, row.head])
        assert row.value == expected or (expected != expected and row.value != row.value)
        assert row.answer == [3, 1, 4, 1][row.prompt] and row.right == [True, False, True, True][row.prompt]
    with pytest.raises(InputError, match="per must be 'prompt' or nothing, but it is 'layer'"):
        result.to_frame(per="layer")
    with pytest.raises(InputError, match="CellsResult stores nothing per prompt"):
        cells(ToyPair(), ToyPrompts()).to_frame(per="prompt")


def test_repeated_labels_keep_their_rows_apart() -> None:
    table = cells(ToyPair(), ToyPrompts(), words=("the", "the", "cat")).to_frame()
    assert list(table.columns) == ["row", "row_label", "token", "token_label", "cells"]
    assert list(table.token[:3]) == [0, 1, 2] and list(table.token_label[:3]) == ["the", "the", "cat"]


def test_tables_without_axes() -> None:
    @dataclass(frozen=True, eq=False)
    class PlainResult(Result):
        share: float
        name: str
        parts: tuple[int, ...] = (1, 2)

    @dataclass(frozen=True, eq=False)
    class MeanResult(Result):
        loss: Float[Tensor, " prompt"]
        other: Float[Tensor, ""]

    assert PlainResult(0.5, "x").to_frame().to_dict("records") == [{"share": 0.5, "name": "x"}]
    means = MeanResult(torch.tensor([1.0, 2.0]), torch.tensor(3.0))
    assert means.to_frame().to_dict("records") == [{"loss": 1.5, "other": 3.0}]
    assert list(means.to_frame(per="prompt").loss) == [1, 2]
    empty = MeanResult(torch.tensor([torch.nan]), torch.tensor(3.0)).to_frame()
    assert empty.loss.isna().all()


# ---- files


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    for answer in (torch.tensor([3, 1, 4, 1]), None):
        result = EchoResult(**echo_fields(answer=answer, remark=None if answer is None else "\ud83d é\n🙂"))
        object.__setattr__(result, "meta", made().meta)
        folder = result.save(tmp_path / "deep" / "er")
        assert sorted(p.name for p in folder.iterdir()) == ["result.json", "tensors.safetensors"]
        again = EchoResult.load(folder)
        for field in dataclasses.fields(result):
            assert same(getattr(result, field.name), getattr(again, field.name)), field.name
        assert again.identity == result.identity and dataclasses.asdict(again.meta) == dataclasses.asdict(result.meta)
        assert again.to_frame().equals(result.to_frame())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["er"]


def test_a_killed_save_leaves_the_old_result_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.replace
    for failing in (1, 2):
        calls = []

        def killed(source: Any, target: Any, calls: list[Any] = calls, failing: int = failing) -> None:
            calls.append(target)
            if len(calls) == failing:
                raise KeyboardInterrupt
            real(source, target)

        folder = tmp_path / f"r{failing}"
        if failing == 2:
            made(seed=1).save(folder)
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            made(seed=2).save(folder)
        monkeypatch.setattr(os, "replace", real)
        if failing == 1:
            assert not list(tmp_path.iterdir())
        else:
            assert EchoResult.load(folder).meta.seed == 1
            assert [p.name for p in tmp_path.iterdir()] == ["r2"]


def test_a_result_may_replace_a_result_but_nothing_else(tmp_path: Path) -> None:
    made(seed=1).save(tmp_path / "a")
    made(seed=2).save(tmp_path / "a")
    assert EchoResult.load(tmp_path / "a").meta.seed == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for taken in ("mine", "file"):
        with pytest.raises(InputError, match=f"cannot save a result in .*{taken}: it exists and holds something else"):
            made().save(tmp_path / taken)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="cannot save a result in .*file/x: "):
        made().save(tmp_path / "file" / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "mine"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made().save(tmp_path_factory.mktemp("saved") / "r")


def doctored(saved: Path, tmp_path: Path, honest: bool = True, **changes: Any) -> Path:
    """A copy whose JSON is changed; an honest one also carries the digests of what it now holds."""
    import hashlib

    folder = tmp_path / "doctored"
    shutil.copytree(saved, folder)
    page = json.loads((folder / "result.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = page
        for key in parents:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    if honest:
        page["contents"] = sha256([page["fields"], hashlib.sha256((folder / "tensors.safetensors").read_bytes()).hexdigest()])
    (folder / "result.json").write_text(json.dumps(page))
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fields__scale": "<img src=x>"}, "scale should be float, but it is '<img src=x>'"),
        ({"fields__flag": 1}, "flag should be bool"),
        ({"fields__mode": "c"}, "mode should be .*Literal"),
        ({"fields__words": "ab"}, "words should be tuple"),
        ({"fields__pairs": [[1, "one", 2]]}, "pairs should have 2 entries, but it has 3"),
        ({"fields__counts": {"x": 1.0}}, "counts has the key 'x' where an integer belongs"),
        ({"fields__remark": 3}, "remark should be str or NoneType"),
        ({"fields__value": {"$tensor": "nothing"}}, "value should be"),
        ({"fields__value": {"$tensor": "floor"}}, r"value must be .*, but it is torch.float32 \[3\]"),
        ({"fields__value": [1, 2]}, "value should be"),
        ({"fields__labels": {"layer": ["a"]}}, "3 entries in value but 1 labels"),
        ({"fields__extra": 1}, "the fields extra differ"),
        ({"fields__scale": ...}, "the fields scale differ"),
        ({"kind": "OtherResult"}, "is a OtherResult, not a EchoResult"),
        ({"format": 99}, "is a result of format 99; this version of interp reads format 1"),
        ({"identity": "0" * 64}, "its provenance does not fit its identity"),
        ({"meta__seed": 3}, "its provenance does not fit its identity"),
        ({"meta__seed": "0; rm -rf"}, "meta.seed should be int or NoneType"),
        ({"meta__models": [{"side": "base"}]}, "an entry of meta.models has no text 'name'"),
        ({"meta__inputs": [3]}, "meta.inputs should be dict"),
        ({"meta__notes": ...}, "lacks parts of a result"),
        ({"meta": []}, "lacks parts of a result"),
        ({"analysis": "other"}, "it names two analyses"),
    ],
)
def test_what_does_not_fit_is_refused(saved: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    assert EchoResult.load(saved)
    with pytest.raises(InputError, match=sentence) as caught:
        EchoResult.load(doctored(saved, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_damage_is_noticed(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="damaged: its contents do not fit their digest"):
        EchoResult.load(doctored(saved, tmp_path, honest=False, fields__scale=2.0))
    folder = tmp_path / "flipped"
    shutil.copytree(saved, folder)
    blob = bytearray((folder / "tensors.safetensors").read_bytes())
    blob[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(bytes(blob))
    with pytest.raises(InputError, match="damaged: its contents do not fit their digest"):
        EchoResult.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format": 1, "fields": {"x": NaN}}', '{"format": 1e999}', "[" * 100_000])
def test_what_is_not_json_of_a_result_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "r"
    shutil.copytree(saved, folder)
    (folder / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not valid JSON|is not the JSON of a result"):
        EchoResult.load(folder)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, sentence in (("nowhere", "does not exist"), (".", "lacks result.json and tensors.safetensors"), ("file", "is not a folder")):
        with pytest.raises(InputError, match=f"is not a saved result: it {sentence}"):
            EchoResult.load(tmp_path / path)
    with pytest.raises(InputError, match="interp.store.load finds it"):
        Result.load(tmp_path)


def test_values_come_back_as_their_annotations_say() -> None:
    assert typed(tuple[float, ...], [1, 2.5], "x") == (1.0, 2.5)
    assert typed(int | float | None, 1, "x") == 1 and isinstance(typed(int | float, 1, "x"), int)
    assert typed(dict[str, Any], {"a": [1, {"b": None}]}, "x") == {"a": [1, {"b": None}]}
    for hint, value in ((int, True), (float, False), (int, 1.5), (str, None), (list[int], {"a": 1}), (tuple[int, int], [1])):
        with pytest.raises(InputError, match="x should"):
            typed(hint, value, "x")


def test_meta_is_exported() -> None:
    assert Meta(analysis="a", version=1).command() == ["interp", "run", "a"]
