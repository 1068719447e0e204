"""What every analysis promises, checked for each name in ANALYSES: nothing here is about one of them."""

from __future__ import annotations

import ast
import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest
from tiny_pairs import pair_of_prompts, save_pair, written

from interp.analyses import ANALYSES, find
from interp.circuit import Circuit
from interp.cli import main
from interp.cli.parsers import run_parser
from interp.cli.signatures import MODELS, PROMPTS, signature
from interp.cli.values import convert, text_of

ARTEFACTS = ("Circuit", "Factors", "Capture", "Result")
HEAVY = {"n": 6, "resamples": 20, "draws": 2, "sites": ("resid_pre", "z")}
"""Settings that are turned down where an analysis has them."""

ASKED = {"circuit_repair": "ioi", "channel_effects": "ioi", "channel_steering": "laundry_list", "recitation": "recitation"}
"""Analyses whose prompts must be of a task: they need options, and where these stand, or texts that should follow."""

REQUIRED = {
    "channel_effects": {"senders": "L0H0", "movers": "L1H0", "rank": 2},
    "channel_steering": {"channels": "L0H0.0", "mover": "L1H0", "grid": 2},
}
"""Settings without a default."""

CIRCUITS = {"circuit.json": {"inhibition": "L1H0.z@END", "mover": "L2H3.z@END"}, "other.json": {"mover": ("L2H1.z@END", "L2H3.z@END")}}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    import torch

    from interp.models import HookedModel
    from interp.models.kfac import kfac_factors

    place = tmp_path_factory.mktemp("contract")
    save_pair(place)
    things = ("ring", "cup", "ball", "book", "hat", "box")  # as many contexts as a search for a circuit asks for
    written(place / "pairs.jsonl", *[pair_of_prompts(f"The {thing} is red", f"The {thing} is blue") for thing in things])
    for name, roles in CIRCUITS.items():
        Circuit.of((3, 4, 2), roles).save(place / name)
    model, draws = HookedModel.load(place / "base"), torch.Generator().manual_seed(0)
    kfac_factors(model, torch.randint(9, 31, (12, 9), generator=draws).tolist(), place / "factors")
    return place


@pytest.fixture(scope="session")
def inputs(folder):
    """What is handed over for a parameter, by the class names in its annotation."""
    from interp.models import ModelPair
    from interp.models.factors import Factors
    from interp.prompts import read_prompts
    from interp.tasks import task

    pair = ModelPair.load(folder / "base", folder / "tuned")
    pairs = read_prompts(folder / "pairs.jsonl", pair)
    by_class = {
        "HookedModel": pair.base,
        "ModelPair": pair,
        "Prompts": task("plain_text").generate(pair, 4),
        "PromptPairs": pairs,
        "Task": task("ioi"),
        "Circuit": Circuit.load(folder / "circuit.json"),
        "Factors": Factors.open(folder / "factors"),
    }

    def given(name: str) -> list[object]:
        made = []
        for parameter in signature(name).inputs:
            known = [value for kind, value in by_class.items() if kind in parameter.names]
            assert known, f"say in this fixture what to hand to {name} as {parameter.name}"
            if name in ASKED and parameter.names & set(PROMPTS):
                known = [task(ASKED[name]).generate(pair, 6)]
            second = Circuit.load(folder / "other.json") if "Circuit" in parameter.names else task("plain_text").generate(pair, 5, seed=1)
            made.append(known[-1] if known[-1] not in made else second)
        return made

    return given


@pytest.fixture(scope="session")
def results(inputs):
    """One small result of every analysis."""
    return {name: find(name)(*inputs(name), **_light(name)) for name in ANALYSES}


def _light(name: str) -> dict[str, object]:
    down = {p.name: HEAVY[p.name] for p in signature(name).settings if p.name in HEAVY and (p.name != "sites" or "tuple" in p.names)}
    return REQUIRED.get(name, {}) | down


@pytest.mark.parametrize("name", ANALYSES)
def test_one_name_in_five_places(name: str) -> None:
    module = import_module(f"interp.analyses.{name}")
    function = find(name)
    assert Path(module.__file__).stem == name == function.__name__
    assert isinstance(function.version, int) and function.version >= 1 and callable(function.describe)
    returns = getattr(module, signature(name).returns)
    assert returns.__name__.lower() == name.replace("_", "") + "result"
    assert dataclasses.is_dataclass(returns) and returns.__dataclass_params__.frozen and not returns.__dataclass_params__.eq


@pytest.mark.parametrize("name", ANALYSES)
def test_inputs_are_positional_and_settings_are_keywords(name: str) -> None:
    of = signature(name)
    tree = ast.parse(Path(import_module(f"interp.analyses.{name}").__file__).read_text())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    assert function.args.vararg is None and function.args.kwarg is None
    for argument in (*function.args.args, *function.args.kwonlyargs):
        assert argument.annotation is not None, f"{argument.arg} has no annotation"
    ranks = []
    needed = [p.default is None for p in of.inputs]
    assert needed == sorted(needed, reverse=True), "inputs that may be left out come last"
    for p in of.inputs:
        kinds = [
            i
            for i, group in enumerate((MODELS, (*PROMPTS, "Task"), ARTEFACTS))
            if any(c in group or c.endswith("Result") and i == 2 for c in p.names)
        ]
        assert len(kinds) == 1, f"{p.name} is neither a model, nor prompts or a task, nor an artefact"
        ranks.append((p.default is not None, kinds[0]))
    in_order = ranks == sorted(ranks) and [kind for _, kind in ranks].count(0) <= 1
    assert in_order, "inputs come in the order model, prompts and tasks, artefacts; then those that may be left out"
    for p in of.inputs:
        if p.names & set(PROMPTS) and len(of.of_kind(*PROMPTS)) == 1:
            assert p.name == "prompts"
        if p.names & set(MODELS):
            assert p.name in ("model", "pair")


@pytest.mark.parametrize("name", ANALYSES)
def test_the_docstring_opens_with_one_sentence(name: str) -> None:
    of = signature(name)
    assert re.fullmatch(r"[A-Z][^\n]*[.?]", of.summary) and len(of.summary) <= 120
    assert of.doc.split("\n")[1:2] in ([""], []), "a blank line follows the first line"
    for p in (*of.inputs, *of.settings):
        assert p.help, f"{name}: the docstring says nothing about {p.name}"


@pytest.mark.parametrize("name", ANALYSES)
def test_every_setting_can_be_written_on_the_command_line(name: str) -> None:
    of = signature(name)
    parser = run_parser(of)  # a flag that is there twice raises here
    assert len(parser.format_help()) > 200
    defaults = find(name).__wrapped__.__kwdefaults__ or {}
    for p in of.settings:
        if p.name in defaults:
            assert convert(p.name, p.annotation, text_of(defaults[p.name])) == defaults[p.name], p.name
    source = Path(import_module(f"interp.analyses.{name}").__file__).read_text()
    if "torch.Generator" in source or "bootstrap(" in source:
        assert "seed" in [p.name for p in of.settings], "what is random takes a seed"


@pytest.mark.parametrize("name", ANALYSES)
def test_a_result_round_trips(name: str, results, tmp_path) -> None:
    import torch

    from interp import store
    from interp.result_files import encode

    result = results[name]
    again = store.load(store.save(result, tmp_path))
    assert type(again) is type(result) and again.identity == result.identity and again.meta.analysis == name
    (values, tensors), (others, more) = encode(result), encode(again)
    assert values == others and tensors.keys() == more.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == more[key].dtype and torch.equal(tensor.nan_to_num(7.0), more[key].nan_to_num(7.0)), key
    assert again.summary() == result.summary()
    assert again.to_frame().equals(result.to_frame())


@pytest.mark.parametrize("name", ANALYSES)
def test_a_result_speaks_draws_and_tabulates(name: str, results) -> None:
    result = results[name]
    sentence = result.summary()
    assert "\n" not in sentence and re.search(r"\d", sentence), "the main number is in the sentence"
    frame = result.to_frame()
    assert len(frame) and len(set(frame.columns)) == len(frame.columns)
    figures = result.figures()
    assert figures and all(hasattr(f, "to_json") for f in figures.values())
    for heading, figure in figures.items():
        layout = figure.to_dict()["layout"]
        assert layout.get("title", {}).get("text"), f"{heading!r} has no title"
    assert result.html() is None or isinstance(result.html(), str)


@pytest.mark.parametrize("name", ANALYSES)
def test_the_same_call_gives_the_same_numbers_and_leaves_the_models_alone(name: str, results, inputs) -> None:
    import torch

    from interp.models.loading import memory_fingerprint
    from interp.result_files import encode

    given = inputs(name)
    models = [m.wrapped.source for _, m in given[0].sides()] if hasattr(given[0], "sides") else []

    def state() -> list[object]:
        parts = [part for model in models for part in model.modules()]
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks) for part in parts]
        return [*map(memory_fingerprint, models), hooks, [part.training for part in parts]]

    before = state()
    again = find(name)(*given, **_light(name))
    assert state() == before and again.identity == results[name].identity
    for key, tensor in encode(results[name])[1].items():
        assert torch.equal(tensor.nan_to_num(7.0), encode(again)[1][key].nan_to_num(7.0)), key


@pytest.mark.parametrize("name", ANALYSES)
def test_the_command_of_a_result_runs_and_repeats_it(name: str, folder, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(folder)
    of = signature(name)
    words = ["run", name, "--out", str(tmp_path)]
    words += ["--base=base", "--tuned=tuned"] if of.of_kind("ModelPair") else ["--model=base"] if of.of_kind("HookedModel") else []
    words += [f"--{p.name.replace('_', '-')}={file}" for p, file in zip(of.of_kind("Circuit"), CIRCUITS, strict=False)]
    words += [f"--{p.name}=factors" for p in of.of_kind("Factors")]
    if name in ASKED:
        words += [f"--task={ASKED[name]}", "--prompts-n=6"]
    elif of.of_kind(*PROMPTS):
        words += [f"--{p.name}={file}" for p, file in zip(of.of_kind(*PROMPTS), ("pairs.jsonl", "plain_text"), strict=False)]
    elif of.of_kind("Task"):
        words.append("--task=ioi")
    words += [f"--{k.replace('_', '-')}={text_of(v)}" for k, v in _light(name).items()]
    assert main(words) == 0
    place = next((tmp_path / "results" / name).iterdir())
    assert main(["replay", str(place)]) == 0, capsys.readouterr()
    assert "the same numbers, to the last bit" in capsys.readouterr().out
