"""The full comparison: its plan, what it keeps, what it says, and that nothing is lost when it is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_checkpoints import tiny
from tiny_pairs import copied, pair_of_prompts, save_pair, written

import interp
from interp.analyses import ANALYSES
from interp.cli import main
from interp.cli.parsers import parse
from interp.compare import PLAN, SHIPPED_TASKS, duration, size
from interp.errors import InputError
from interp.plan import Gap, Row, Sizes, Speed, Step, Work
from interp.request import Request

ROOT = Path(__file__).resolve().parent.parent
COMPARE = sys.modules["interp.compare"]  # `interp.compare` itself is the function
FEW = {
    "token_divergence": 4,
    "task_accuracy": 20,
    **dict.fromkeys(("activation_patching", "cross_patching", "path_patching", "edge_attribution"), 2),
    **dict.fromkeys(("tuco", "tuco_detection"), 3),
    **dict.fromkeys(("circuit_discovery", "circuit_overlap"), 8),
    **dict.fromkeys(("circuit_evaluation", "circuit_transfer", "cmap", "attention_knockout"), 4),
    **dict.fromkeys(("dcm", "cross_dcm"), 12),
    **dict.fromkeys(("delta_curvature", "recitation", "language_modelling"), 12),
    **dict.fromkeys(("completions", "token_shift", "activation_difference"), 2),
    **dict.fromkeys(("logit_lens", "logit_attribution", "attention_patterns", "weight_path"), 3),
}

EASY = ("attention_knockout", "delta_curvature")
"""What may be left out elsewhere, and has all it needs here."""


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def small(monkeypatch):
    """The plan with a handful of prompts at every effort."""
    rows = tuple(dataclasses.replace(row, prompts={k: FEW[row.analysis] for k in row.prompts}) for row in PLAN)
    monkeypatch.setattr(COMPARE, "PLAN", rows)


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["compare", *(str(w) for w in words)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def pairs_file(tmp_path):
    return written(tmp_path / "pairs.jsonl", *[pair_of_prompts()] * 3)


def names_of(results) -> list[str]:
    return [r.meta.analysis for r in results]


# --------------------------------------------------------------------------------------------- plan


def test_the_plan_names_analyses_and_every_effort() -> None:
    rows = [row.analysis for row in PLAN]
    assert rows == [name for name in ANALYSES if name in rows]  # in one order; not every analysis belongs to the comparison
    for row in PLAN:
        assert (row.source is None) == (not row.prompts) and set(row.prompts) <= {"quick", "normal", "full"}
        if row.prompts:
            assert row.prompts.get("quick", 0) < row.prompts["normal"] < row.prompts["full"]
        more, less = (row.work(Sizes(prompts=n, length=9, places=2, layers=3, heads=4, factors=5)) for n in (20, 10))
        assert more.tokens >= less.tokens and more.saved > 0


def test_patches_are_counted_as_they_are_run() -> None:
    # 3 layers x (3 parts of the stream x 2 places + 4 heads) = 30 runs of 5 prompts of 7 tokens in 2 models
    assert Sizes(prompts=5, length=7, places=2, layers=3, heads=4).patches == 30
    work = next(row.work for row in PLAN if row.analysis == "activation_patching")  # a tenth of whole runs in each of two models
    assert work(Sizes(5, 7, 2, 3, 4)).tokens == pytest.approx(2 * 30 * 5 * 7 / 10)


def test_shipped_tasks_exist_and_have_scores() -> None:
    assert Request(base="b", tuned=("t",), tasks=SHIPPED_TASKS).checked(ANALYSES).tasks == SHIPPED_TASKS


def test_speed_adds_up() -> None:
    assert Speed(token=0.5, weights=10.0).seconds(Work(tokens=4, passes=3)) == 32.0
    assert [duration(s) for s in (0.04, 12.3, 600, 9000)] == ["0.04 s", "12 s", "10 min", "2.5 h"]
    assert [size(b) for b in (12, 65536, 2.5e6, 3e10)] == ["12 B", "66 kB", "2.5 MB", "30 GB"]


# -------------------------------------------------------------------------------------- whole runs


def test_everything_runs_once_and_is_found_again(cli, pair, small, pairs_file, monkeypatch) -> None:
    words = (*pair, "--task=ioi", "--prompts", pairs_file, "--out=o")
    code, out, err = cli(*words)
    assert code == 0 and [line for line in err.splitlines() if "positions give factors of at most that rank" not in line] == []
    certain = [row.analysis for row in PLAN if row.source != "canaries" and (not row.demanding or row.analysis in EASY)]
    assert "left out: circuit_discovery" in out and "at least 6" in out
    assert [line for line in out.splitlines() if "left out" in line and "circuit_discovery" not in line] == []
    folders = sorted(p.parent for p in Path("o/results").rglob("result.json"))
    assert sorted(f.parent.name for f in folders) == sorted(certain)
    page = Path("o/report.html").read_text()
    for part in ("The weights moved by", "L1.W_out", "Neither model is above chance on ioi", "Small samples", 'class="verdict"'):
        assert part in page, part
    told = json.loads(Path("o/report.json").read_text())
    assert [r["analysis"] for r in told["results"]] == certain and told["verdict"] and told["warnings"]
    for result in told["results"]:  # every command of the page can be read back
        assert parse(result["command"][1:]).analysis == result["analysis"]
        assert f"--base={pair[0]}" in result["command"]
    assert "the plan" in out and "about" in out and "n = 20" in out and "activation_patching on the task learned best" in out

    stamps = {f: (f / "result.json").stat().st_mtime_ns for f in folders}
    monkeypatch.setattr(Speed, "of", lambda pair: pytest.fail("no weights are loaded when everything is there"))
    code, out, _ = cli(*words, "--only=" + ",".join(certain))
    assert code == 0 and out.count("(already there)") == len(certain) == out.count("already there\n")
    assert {f: (f / "result.json").stat().st_mtime_ns for f in folders} == stamps


def test_python_returns_results_and_writes_nothing(pair, small, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = interp.compare(str(pair[0]), str(pair[1]), only=("pair_check", "token_divergence"))
    assert names_of(results) == ["pair_check", "token_divergence"]
    assert list(tmp_path.iterdir()) == []


def test_models_in_memory_are_compared_and_have_no_command(pair, small, tmp_path) -> None:
    base, tuned = (interp.HookedModel.load(str(p)) for p in pair)
    from small_tokenizers import tokenizer
    from transformers import AutoModelForCausalLM

    plain = interp.HookedModel.load(AutoModelForCausalLM.from_pretrained(pair[1]), tokenizer=tokenizer("byte_level"))
    results = interp.compare(base, [tuned, plain], only="token_divergence", out=tmp_path)
    assert len(results) == 2 and results[0].kl.nanmean() == results[1].kl.nanmean()
    assert not results[1].meta.replayable


def test_several_tuned_models_are_all_on_the_page(cli, pair, small, tmp_path) -> None:
    other = copied(pair[0], tmp_path / "same")
    code, out, _ = cli(pair[0], pair[1], other, "--only=pair_check,weight_delta", "--out=o")
    assert code == 0
    told = json.loads(Path("o/report.json").read_text())
    assert [r["meta"]["models"][1]["name"] for r in told["results"]] == ["tuned", "same", "tuned", "same"]
    assert any(s.startswith("base -> tuned: ") for s in told["verdict"]) and any(s.startswith("base -> same: ") for s in told["verdict"])
    assert "identical" in " ".join(told["verdict"]) and "tuned and same" in told["title"]


def test_two_tuned_models_of_one_name_are_told_apart(cli, pair, small, tmp_path) -> None:
    twin = copied(pair[0], tmp_path / "tuned")
    code, _, _ = cli(pair[0], pair[1], twin, "--only=pair_check", "--out=o")
    starts = [s.split(": ")[0] for s in json.loads(Path("o/report.json").read_text())["verdict"]]
    assert code == 0 and len(set(starts)) == 2 and all(s.startswith("base -> tuned (") for s in starts)


def test_the_shipped_pair_learned_where_things_are(cli, small) -> None:
    code, out, err = cli("base", "boxes-tuned", "--task=ioi", "--task=boxes", "--only=task_accuracy,activation_patching", "--out=o")
    assert (code, err) == (0, "")
    told = json.loads(Path("o/report.json").read_text())
    learned, kept, patching = told["verdict"]
    assert learned.startswith("Tuning raised boxes (")
    assert kept.startswith("No change beyond noise on ioi (100% to 100%")
    assert patching.startswith("Patching on boxes: L")  # the task with the largest gain
    assert [r["analysis"] for r in told["results"]] == ["task_accuracy", "task_accuracy", "activation_patching"]


# -------------------------------------------------------------------------------------------- TuCo


def test_tuco_stands_set_by_set_with_the_numbers_of_each_set(cli, pair, small, monkeypatch) -> None:
    from interp import store
    from interp.analyses.tuco import tuco
    from interp.inputs import Session

    code, out, err = cli(*pair, "--task=ioi", "--task=arithmetic", "--only=tuco,tuco_detection", "--out=o")
    assert (code, err) == (0, "") and "tuco on 3 sets of prompts" in out and "the task changed most, against plain_text" in out
    found = {r["analysis"]: r for r in json.loads(Path("o/report.json").read_text())["results"]}
    assert list(found) == ["tuco", "tuco_detection"]
    whole = store.load(store.saved("o/results/tuco")[0])
    assert sorted(whole.by_set) == ["arithmetic", "ioi", "plain_text"] and whole.output_co is not None
    session, folders = Session(), [str(p) for p in pair]
    loaded = session.pair(*folders)
    for name, rows in whole.by_set.items():
        alone = tuco(loaded, getattr(p := session.prompts(name, loaded, 3), "clean", p))
        assert whole.tuco[rows].tolist() == pytest.approx(alone.tuco.tolist(), rel=1e-4) and len(rows) == 3
    both = store.load(store.saved("o/results/tuco_detection")[0])
    assert both.tuco[both.is_positive].tolist() == pytest.approx(whole.tuco[whole.by_set["ioi"]].tolist(), rel=1e-4)
    run = COMPARE._Run(Request(base=folders[0], tuned=(folders[1],), tasks=("ioi", "arithmetic")), print, print)
    for row in (
        r for r in COMPARE.PLAN if r.analysis in ("tuco", "tuco_detection")
    ):  # the command of the page, that of the step, and the plan make the same result
        step = run.steps(row, folders[1])[0]
        for i, words in enumerate((found[row.analysis]["command"], step.command(session).replace("'", "").split(" --"))):
            words = words if i == 0 else ["interp", *words[0].split()[1:], *(f"--{word}" for word in words[1:])]
            assert main([*words[1:], f"--out={row.analysis}{i}"]) == 0
            (again,) = store.saved(f"{row.analysis}{i}/results")
            assert again.name == store.saved(f"o/results/{row.analysis}")[0].name


@pytest.mark.full  # `make report` does the same on more prompts
def test_circuits_are_searched_and_evaluated_on_fresh_prompts(cli, monkeypatch) -> None:
    from interp import store

    sizes = {"circuit_discovery": 16, "circuit_evaluation": 3, "circuit_overlap": 16, "circuit_transfer": 12, "cmap": 24}
    sizes |= {"dcm": 24, "cross_dcm": 24}
    rows = [dataclasses.replace(row, prompts=dict.fromkeys(row.prompts, sizes[row.analysis])) for row in PLAN if row.analysis in sizes]
    monkeypatch.setattr(COMPARE, "PLAN", tuple(rows))
    code, out, err = cli("--task=boxes", "--out=o")
    assert (code, err) == (0, "")
    search, evaluation, overlap, transfer, crossed, *_ = (store.load(store.saved(Path("o/results") / name)[0]) for name in sizes)
    assert evaluation.labels["node"] == tuple(map(str, search.circuit("base").nodes)) and evaluation.sides == ("base", "tuned")
    asked = {entry["parameter"]: entry for entry in evaluation.meta.inputs}
    assert (asked["prompts"]["task"], asked["prompts"]["n"], asked["prompts"]["seed"]) == ("boxes", 3, 1)
    base, tuned = ({(s.layer, s.head, role) for s, role in search.circuit(side).roles.items()} for side in ("base", "tuned"))
    assert float(overlap.shared[overlap.main]) == len(base & tuned) and int(overlap.size_b[overlap.main]) == len(tuned)
    assert crossed.directions == ("tuned_to_base",) and crossed.heads[0] == len(search.circuit("tuned").nodes)
    fed = {entry["parameter"]: entry for entry in crossed.meta.inputs}
    assert (fed["circuit"]["digest"], fed["prompts"]["seed"]) == (search.circuit("tuned").digest, 1)
    assert [int(x[-1]) for x in (transfer.size_base, transfer.size_tuned)] == [len(search.circuit(s).nodes) for s in ("base", "tuned")]
    variables = [f"boxes(corrupt={what})" for what in ("object", "label", "position")]
    for name in ("dcm", "cross_dcm"):
        masks = [store.load(folder) for folder in store.saved(Path("o/results") / name)]
        where = [{entry["parameter"]: entry for entry in mask.meta.inputs} for mask in masks]
        assert sorted(entry["prompts"]["task"] for entry in where) == sorted(variables)
        assert {entry["circuit"]["digest"] for entry in where} == {search.circuit("tuned").digest}
        assert [m["side"] for m in masks[0].meta.models] == (["model"] if name == "dcm" else ["base", "tuned"])
        assert not set(masks[0].contexts) & set(search.contexts)
    told = json.loads(Path("o/report.json").read_text())
    assert any(line.startswith(f"The {crossed.heads[0]} heads of tuned's circuit, set in base, ") for line in told["verdict"])
    for start in ("Searched stage by stage on boxes: base: ", "The circuit of base does alone ", f"Base's circuit has {len(base)} heads"):
        assert any(line.startswith(start) for line in told["verdict"]), start
    for result in told["results"]:  # every command of the page gives what is on it
        assert main([*result["command"][1:], "--out=alone"]) == 0
        names = [{folder.name for folder in store.saved(Path(o) / "results" / result["analysis"])} for o in ("o", "alone")]
        assert names[1] <= names[0]
    assert main(["compare", "--task=boxes", "--out=o", "--only=circuit_overlap"]) == 2, "there is nothing to compare"


def test_a_row_that_an_effort_has_not_is_left_out(cli) -> None:
    code, out, err = cli("--task=boxes", "--only=pair_check,dcm", "--effort=quick", "--out=o")
    assert (code, err) == (0, "") and "left out: dcm: it is part of effort normal and full, not of quick" in out
    code, out, _ = cli("--task=ioi", "--only=pair_check,circuit_transfer,cross_dcm", "--out=o2")
    assert code == 0 and "circuit_transfer: it takes what circuit_discovery finds" in out and "left out: cross_dcm" not in out


def test_chats_are_asked_where_the_tuned_model_has_a_template(capsys) -> None:
    def steps(tuned: str, analysis: str, *tasks: str) -> list[Step]:
        run = COMPARE._Run(Request(base="base", tuned=(tuned,), tasks=tasks, effort="quick"), print, print)
        return run.steps(next(row for row in PLAN if row.analysis == analysis), tuned)

    (chatting,), (plain,) = (steps(tuned, "tuco", "ioi") for tuned in ("assistant", "boxes-tuned"))
    assert (chatting.on, chatting.n) == ("plain_text + ioi + instructions + refusals", 64)
    assert (plain.on, plain.n) == ("plain_text + ioi", 32)
    from interp.inputs import Session

    (asked,) = steps("assistant", "tuco_detection")
    assert (asked.on, asked.against) == ("instructions", "plain_text(sentences=1)")
    assert asked.arguments(Session())[1] == {"output_co": True, "chat": "template"}
    assert [(s.on, s.against) for s in steps("assistant", "tuco_detection", "ioi", "boxes")] == [
        ("ioi", "plain_text"), ("boxes", "plain_text"),
    ]  # fmt: skip
    assert "ioi" in [s.on for s in steps("boxes-tuned", "tuco_detection")]


def test_a_task_that_cannot_be_made_is_left_out_of_the_sets_and_said_once(cli, pair, small) -> None:
    code, _, err = cli(*pair, "--task=ioi", "--task=arithmetic(digits=2, shots=20)", "--only=tuco,tuco_detection", "--out=o")
    assert code == 1 and err.count("\n") == 1 and err.startswith("interp: the prompts of arithmetic(") and "could not be done: " in err
    assert [r["analysis"] for r in json.loads(Path("o/report.json").read_text())["results"]] == ["tuco", "tuco_detection"]


@pytest.mark.parametrize(
    ("found", "chosen"),
    [([], "a"), ([("a", 0.5, 0.6), ("b", 0.9, 0.2)], "b"), ([("a", 0.5, 0.6), ("b", 0.9, 0.85)], "a"), ([("b", 0.5, 0.5)], "a")],
)
def test_the_task_changed_most_counts_losses_too(found, chosen) -> None:
    run = COMPARE._Run(Request(base=object(), tuned=(object(),)), print, print)
    row = next(r for r in PLAN if r.analysis == "tuco_detection")
    steps = [Step(row, run.request.base, run.request.tuned[0], on, 3, "text") for on in "ab"]
    assert [s.on for s in run.choice(row, steps, [scored(*f) for f in found])] == [chosen]
    assert run.choice(row, [], []) == []


# ---------------------------------------------------------------------------- what cannot be done


def test_one_step_that_fails_leaves_the_others(cli, pair, small) -> None:
    code, out, err = cli(*pair, "--task=arithmetic(digits=2, shots=20)", "--only=weight_delta,task_accuracy", "--out=o")
    assert code == 1
    assert err.count("\n") == 1 and err.startswith("interp: task_accuracy on arithmetic(") and "could not be done: " in err
    told = json.loads(Path("o/report.json").read_text())
    assert [r["analysis"] for r in told["results"]] == ["weight_delta"]
    assert any("task_accuracy" in w and "could not be done" in w for w in told["warnings"])
    assert "could not be done" in Path("o/report.html").read_text()


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [("long.txt", "The ring " * 200, "context holds 128"), ("empty.txt", "\n", "is empty"), ("broken.jsonl", "{", "is not JSON")],
)
def test_prompts_that_cannot_be_used_are_refused_before_anything_is_computed(cli, pair, small, name, text, why) -> None:
    Path(name).write_text(text)
    code, out, err = cli(*pair, f"--prompts={name}", "--out=o")
    assert code == 2 and err.count("\n") == 1 and name in err and why in err, err
    assert not Path("o").exists()


def test_one_pair_that_is_refused_leaves_the_others(cli, pair, small, tmp_path) -> None:
    other, _ = save_pair(tmp_path / "deep", num_hidden_layers=2)
    code, _, err = cli(pair[0], other, pair[1], "--only=pair_check", "--out=o")
    assert code == 1 and err.count("\n") == 1 and "number of layers" in err
    assert len(json.loads(Path("o/report.json").read_text())["results"]) == 1


def test_nothing_at_all_is_one_line_and_two(cli, pair, small) -> None:
    code, _, err = cli(*pair, "--task=arithmetic(digits=2, shots=20)", "--only=task_accuracy", "--out=o")
    assert code == 2 and "nothing could be computed" in err.splitlines()[-1] and not Path("o/report.html").exists()


def test_a_bug_is_not_taken_for_bad_input(pair, small, monkeypatch) -> None:
    def broken(name: str):
        raise ValueError("a bug")

    monkeypatch.setattr(interp.analyses, "find", broken)
    with pytest.raises(ValueError, match="a bug"):
        interp.compare(str(pair[0]), str(pair[1]), only="pair_check")


def test_steps_that_take_too_long_are_left_out_with_their_command(cli, pair, small, pairs_file, monkeypatch) -> None:
    monkeypatch.setattr(Speed, "of", lambda pair: Speed(token=1.0, weights=0.0))
    only = "--only=pair_check,weight_delta,token_divergence,task_accuracy,activation_patching"
    code, out, err = cli(*pair, "--task=ioi", "--prompts", pairs_file, "--time=3", only, "--out=o", "--dtype=float32")
    assert (code, err) == (0, "")
    told = json.loads(Path("o/report.json").read_text())
    assert {r["analysis"] for r in told["results"]} == {"pair_check", "weight_delta", "token_divergence"}
    assert len(told["plan"]) == 2 and "of the 3 min given" in out
    for entry in told["plan"]:
        sentence, command = entry.split("\n")
        assert "it would take about" in sentence and command in out
        args = parse([w.strip("'") for w in command.split()[1:]])
        assert args.analysis in sentence and args.base == str(pair[0]) and args.dtype == "float32"
    assert not any("could not be done" in w for w in told["warnings"])


def test_the_command_of_a_step_gives_the_result_the_plan_would(cli, pair, small, pairs_file) -> None:
    from interp import store
    from interp.inputs import Session

    assert cli(*pair, "--prompts", pairs_file, "--only=activation_patching,token_divergence", "--out=o")[0] == 0
    rows = {row.analysis: row for row in PLAN}
    for row, n in ((rows["token_divergence"], 4), (rows["activation_patching"], 2)):
        step = Step(row, str(pair[0]), str(pair[1]), str(pairs_file), n)
        words = step.command(Session()).split()[1:]
        assert main([*words, "--out=alone"]) == 0
        (one,), (other,) = (store.saved(Path(o) / "results" / row.analysis) for o in ("o", "alone"))
        assert one.name == other.name


# ------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ("wieght_delta",)}, "weight_delta"),
        ({"effort": "ful"}, "full"),
        ({"minutes": 0.0}, "more than 0"),
        ({"tasks": ("iou",)}, "ioi"),
        ({"tasks": ("plain_text",)}, "no right answers"),
        ({"prompts": "nothing.jsonl"}, "no file nothing.jsonl"),
        ({"prompts": "iou"}, "ioi"),
        ({"tuned": ()}, "at least one tuned"),
    ],
)
def test_requests_that_make_no_sense(change: dict, message: str) -> None:
    request = dataclasses.replace(Request(base="a", tuned=("b",)), **change)
    with pytest.raises(InputError, match=message):
        request.checked(ANALYSES)


def test_tasks_are_read_into_their_text_form_once() -> None:
    request = Request(base="a", tuned=("b",), tasks=("boxes(n_boxes = 3)", "boxes(n_boxes=3)"))
    assert request.checked(ANALYSES).tasks == ("boxes(n_boxes=3)",)


def test_without_models_it_is_the_shipped_pair() -> None:
    from interp.organisms import shipped_pair

    request = Request().checked(ANALYSES)
    assert (request.base, *request.tuned) == shipped_pair()


# -------------------------------------------------------------------------------------- best task


def scored(task: str, before: float, after: float, chance: float = 0.5, above: bool = True):
    import torch

    accuracy, known = torch.tensor([before, after]), torch.tensor([False, above])
    return SimpleNamespace(meta=SimpleNamespace(analysis="task_accuracy"), task=task, accuracy=accuracy, above_chance=known, chance=chance)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([], ["a"]),  # nothing scored: the first that was named
        ([scored("a", 0.5, 0.6), scored("b", 0.2, 0.9)], ["b"]),
        ([scored("a", 0.5, 0.9), scored("b", 0.1, 0.6, above=False)], ["a"]),  # a gain below chance teaches nothing
        ([scored("a", 0.9, 0.8), scored("b", 0.9, 0.4)], ["a"]),  # nothing gained: what was lost least
        ([scored("a", 0.5, 0.5, above=False), scored("b", 0.5, 0.5, above=False)], []),
    ],
)
def test_the_best_task_is_the_largest_gain_above_chance(found, chosen) -> None:
    run = COMPARE._Run(Request(base=object(), tuned=(object(),)), print, print)
    row = next(r for r in PLAN if r.analysis == "tuco_detection")
    steps = [Step(row, run.request.base, run.request.tuned[0], on, 3) for on in "ab"]
    assert [s.on for s in run.best(steps, found)] == chosen
    assert len(run.gaps) == (not chosen) and all(not g.failed for g in run.gaps)


def test_a_gap_shows_its_command_on_a_line_of_its_own() -> None:
    assert str(Gap("x", "y", failed=False, command="interp run x")) == "x: y\ninterp run x"
    assert str(Gap("x", "y")) == "x: y"
    assert Row("x", None, {}, lambda s: Work()).settings(None) == {}


# --------------------------------------------------------------------------------------------- kill


SLOW = """
import dataclasses, sys
import interp.compare
module = sys.modules["interp.compare"]
few = {"token_divergence": 4, "tuco": 4, "tuco_detection": 4}
module.PLAN = tuple(dataclasses.replace(r, prompts={k: few.get(r.analysis, 2000) for k in r.prompts}) for r in module.PLAN)
from interp.cli import main
sys.exit(main(["compare", *sys.argv[1:]]))
"""


def test_a_killed_run_leaves_whole_results_and_the_next_goes_on(pair, tmp_path, cli, monkeypatch) -> None:
    from interp import store

    kept = ("pair_check", "weight_delta", "token_divergence", "task_accuracy", "tuco", "tuco_detection")
    plan = [r for r in PLAN if r.analysis in kept]
    rows = [dataclasses.replace(r, prompts={k: 4 if r.analysis == "token_divergence" else 8 for k in r.prompts}) for r in plan]
    words = [str(pair[0]), str(pair[1]), "--task=ioi", "--out", str(tmp_path / "o")]
    child = subprocess.Popen([sys.executable, "-c", SLOW, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    results, end = tmp_path / "o/results", time.monotonic() + 120
    while not list(results.glob("token_divergence/[0-9a-f]*/result.json")):  # 2000 questions come next
        assert child.poll() is None and time.monotonic() < end, child.stderr.read().decode()
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    whole = store.saved(results)
    first = {"pair_check", "weight_delta", "token_divergence"}
    assert {p.parent.name for p in whole} == first
    stamps = {p: (p / "result.json").stat().st_mtime_ns for p in whole}
    for folder in whole:
        assert store.load(folder).summary()
    assert not (tmp_path / "o/report.html").exists()

    monkeypatch.setattr(COMPARE, "PLAN", tuple(rows))
    code, out, _ = cli(*words)
    assert code == 0 and out.count("(already there)") == len(first) and (tmp_path / "o/report.html").exists()
    assert {p: (p / "result.json").stat().st_mtime_ns for p in whole} == stamps
    more = {"task_accuracy", "tuco", "tuco_detection"}
    assert {p.parent.name for p in store.saved(results)} == {*first, *more}


# ---- factors of base, and what it knows by heart


def test_factors_are_collected_once(cli, small, monkeypatch, tmp_path) -> None:
    words = ("base", "boxes-tuned", "boxes-tuned-step20", "--only=delta_curvature,recitation", "--out=o")
    code, out, err = cli(*words)
    assert (code, err) == (0, "")
    told = json.loads(Path("o/report.json").read_text())
    assert [r["analysis"] for r in told["results"]] == ["delta_curvature"] * 2 + ["recitation"] * 2
    (folder,) = Path("o/factors").iterdir()  # one base, one text
    command = told["results"][0]["command"]
    assert f"--factors={folder}" in [word.replace(f"{tmp_path}/", "") for word in command] and "--prompts-n=12" in command
    assert any("times what a random change with the same singular values gives" in s for s in told["verdict"])
    assert any("by heart base recites 100%" in s for s in told["verdict"]) and told["columns"]
    before = (folder / "index.json").stat().st_mtime_ns
    monkeypatch.setattr(interp.HookedModel, "wrapped", property(lambda self: pytest.fail("everything is there, so nothing is loaded")))
    code, out, _ = cli(*words)
    assert code == 0 and out.count("already there)") == 4 and (folder / "index.json").stat().st_mtime_ns == before


def test_factors_that_nobody_keeps_are_gone(small, monkeypatch) -> None:
    import tempfile

    made: list[str] = []
    own = tempfile.TemporaryDirectory
    monkeypatch.setattr(COMPARE.tempfile, "TemporaryDirectory", lambda **how: made.append((t := own(**how)).name) or t)
    (result,) = interp.compare("base", "boxes-tuned", only="delta_curvature")
    assert result.meta.analysis == "delta_curvature" and len(made) == 1 and not Path(made[0]).exists()


def test_large_factors_are_left_out(cli, small, monkeypatch) -> None:
    monkeypatch.setattr(COMPARE, "MUCH", 1e3)
    code, out, _ = cli("base", "boxes-tuned", "--only=pair_check,delta_curvature", "--out=o")
    assert code == 0 and "left out: delta_curvature on plain_text: the factors would take" in out and "--effort full" in out
    told = json.loads(Path("o/report.json").read_text())["plan"][0].splitlines()[1:]
    assert len(told) == 2 and told[0].startswith("interp factors base --task=plain_text --n=12 --out=")
    for line in told:
        assert main(shlex.split(line)[1:]) == 0, line
    code, out, _ = cli("base", "boxes-tuned", "--only=delta_curvature", "--effort=full", "--out=o")
    assert code == 0 and "left out" not in out


def test_numbers_in_the_factors_of_a_model(tmp_path) -> None:
    from interp.models import ModelPair
    from interp.models.kfac import kfac_factors
    from interp.plan import _factors

    for kind in ("gpt2", "llama", "neox"):
        pair = ModelPair.load(tiny(kind), tiny(kind))
        factors = kfac_factors(pair.base, [[1, 2, 3]], tmp_path / kind)
        seen = {tuple(map(str, (s.layer, s.component))): factors.G(s).numel() for s in factors.sites}
        reads = {}
        for site in factors.sites:
            place = {"W_Q": "attention", "W_K": "attention", "W_V": "attention", "W_in": "mlp", "W_gate": "mlp"}
            reads[site.layer, place.get(site.component, site.component)] = factors.A(site).numel()
        assert _factors(pair.shape) == sum(seen.values()) + sum(reads.values()), kind


def test_a_path_between_weights_needs_answers_and_says_so(cli, pair, small, pairs_file) -> None:
    Path("texts.txt").write_text("The ring is in the box\nThe key is in the box\n")
    code, out, _ = cli(*pair, "--prompts=texts.txt", "--only=weight_delta,weight_path", "--out=o")
    assert code == 0 and "left out: weight_path: it needs answers: name a task with --task" in out
    code, out, _ = cli(*pair, "--prompts", pairs_file, "--only=weight_path", "--out=o2")
    assert code == 0 and "left out" not in out and "weight_path" in Path("o2/report.json").read_text()
