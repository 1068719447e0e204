"""The command line: what it prints, what it refuses, and that it starts without torch."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_pairs import CONTEXT, copied, pair_of_prompts, save_pair, written

import interp.analyses
from interp import store
from interp.analyses import ANALYSES
from interp.circuit import Circuit
from interp.cli import commands, main, parsers, signatures, values
from interp.cli import run as run_module
from interp.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def refused(answer: tuple[int, str, str], *fragments: str, results: int = 0) -> str:
    """One line on stderr, exit code 2, the fragments in it, and nothing written or lost."""
    assert len(list(Path().rglob("result.json"))) == results
    code, _, err = answer
    assert code == 2, answer
    lines = [line for line in err.splitlines() if not line.startswith("interp: note:")]
    assert len(lines) == 1 and lines[0].startswith("interp: "), err
    for fragment in fragments:
        assert fragment in lines[0], lines[0]
    return lines[0]


def save_adapter(folder: Path, layer: int) -> Path:
    """A LoRA of rank 2 on one matrix."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "x"}))
    key = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
    save_file({f"{key}A.weight": torch.ones(2, 24), f"{key}B.weight": torch.ones(40, 2)}, folder / "adapter_model.safetensors")
    return folder


# ------------------------------------------------------------------------------------ without torch


def test_help_and_lists_import_no_torch() -> None:
    words = [["list"], ["--help"], ["models"], ["tasks"], ["tasks", "ioi"], ["--version"]]
    words += [[command, "--help"] for command in parsers._COMMANDS] + [["run", name, "--help"] for name in ANALYSES]
    script = f"""
        import sys, contextlib
        import interp
        assert not {{"torch", "numpy", "transformers", "plotly"}} & set(sys.modules), "import interp is heavy"
        from interp.cli import main
        for words in {words!r}:
            with contextlib.suppress(SystemExit):
                assert main(words) == 0, words
            assert "torch" not in sys.modules, words
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ANALYSES:
        assert signatures.signature(name).summary in done.stdout


def test_the_module_and_the_entry_point_run() -> None:
    done = subprocess.run([sys.executable, "-m", "interp", "comapre"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "interp: there is no command named 'comapre'; nearest: compare\n"


def test_public_names_resolve() -> None:
    import interp

    for name in interp.__all__:
        assert getattr(interp, name) is not None
        assert name in dir(interp)
    assert callable(interp.compare) and callable(interp.weight_delta) and interp.weight_delta.__name__ == "weight_delta"
    with pytest.raises(AttributeError, match="no attribute 'wieght_delta'"):
        interp.wieght_delta  # noqa: B018


def test_a_missing_pipe_reader_is_no_error() -> None:
    done = subprocess.run(f"{sys.executable} -m interp tasks | head -1", shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "" and done.stdout.count("\n") == 1


# --------------------------------------------------------------------------------------- signatures


FAKE = '''
"""A made-up analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.results import Result, analysis

Side = Literal["read", "write"]
Number = int | Literal["all"]


@dataclass(frozen=True, eq=False)
class FakeResult(Result):
    seen: dict[str, str]
    kinds: dict[str, str]
    noise: Float[Tensor, " prompt"]

    def summary(self):
        return f"saw {self.seen}"


@analysis(version=3)
def fake(model: HookedModel | ModelPair, prompts: Prompts, *, side: Side = "read", n: Number = 4, share: float = 0.5,
         name: str | None = None, layers: tuple[int, ...] = (), sites: tuple[Site | str, ...] = ("L0.z",), plain: bool = False,
         must: int, heads: "Heads | str" = "L0H1", seed: int = 0) -> FakeResult:
    """What does the command line pass on?

    Text with 100 %.

    Args:
        model: the model.
        side: which side,
            on two lines.
        must: has no default.
    """
    given = dict(side=side, n=n, share=share, name=name, layers=layers, sites=sites, plain=plain, must=must, heads=heads, seed=seed)
    return FakeResult(
        seen={k: repr(v) for k, v in given.items()}, kinds={"model": type(model).__name__, "prompts": type(prompts).__name__},
        noise=torch.randn(len(prompts), generator=torch.Generator().manual_seed(seed)),
    )
'''


@pytest.fixture
def fake(monkeypatch, tmp_path):
    folder = tmp_path / "analyses"
    folder.mkdir()
    (folder / "fake.py").write_text(FAKE)
    monkeypatch.setattr(interp.analyses, "__path__", [*interp.analyses.__path__, str(folder)])
    for module in (interp.analyses, signatures):
        monkeypatch.setattr(module, "ANALYSES", (*ANALYSES, "fake"))
    signatures.signature.cache_clear()
    signatures._parsed.cache_clear()
    yield "fake"
    sys.modules.pop("interp.analyses.fake", None)
    vars(interp.analyses).pop("fake", None)
    signatures.signature.cache_clear()
    signatures._parsed.cache_clear()


def test_a_signature_is_read_without_import(fake) -> None:
    found = signatures.signature("fake")
    assert "interp.analyses.fake" not in sys.modules
    assert found.summary == "What does the command line pass on?" and found.returns == "FakeResult"
    assert [p.name for p in found.inputs] == ["model", "prompts"]
    assert [p.name for p in found.settings] == ["side", "n", "share", "name", "layers", "sites", "plain", "must", "heads", "seed"]
    by_name = {p.name: p for p in found.settings}
    assert by_name["side"].help == "which side, on two lines." and by_name["must"].default is None
    assert ast.unparse(by_name["side"].annotation) == "Literal['read', 'write']"
    assert "Args:" not in found.text and "100 %" in found.text


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("int", "7", 7),
        ("float", "1e-3", 1e-3),
        ("str", "a,b", "a,b"),
        ("bool", "true", True),
        ("bool", "off", False),
        ("int | None", "none", None),
        ("int | None", "3", 3),
        ("Optional[float]", "none", None),
        ("Literal['ov', 'qk']", "qk", "qk"),
        ("Literal[1, 2]", "2", 2),
        ("int | Literal['all']", "all", "all"),
        ("int | Literal['all']", "12", 12),
        ("tuple[int, ...]", "1,2,3", (1, 2, 3)),
        ("tuple[int, ...]", "", ()),
        ("tuple[int, int]", "1,2", (1, 2)),
        ("list[float]", "0.5", (0.5,)),
        ("Sequence[str] | str", "L0.z, L1.z", ("L0.z", "L1.z")),
        ("Sequence[str] | str", "L0.z", "L0.z"),
        ("tuple[str, ...]", "boxes(n=3,k=2),ioi", ("boxes(n=3,k=2)", "ioi")),
        ("tuple[Site | str, ...]", "L0.z@END", ("L0.z@END",)),
        ("Heads | str", "a=L9H6,L9H9@END; L7H3@S2", "a=L9H6,L9H9@END; L7H3@S2"),
        ("Metric | Callable[[Tensor, Tensor], Tensor] | str", "logit_diff@END", "logit_diff@END"),
    ],
)
def test_texts_become_settings_and_back(annotation: str, text: str, value: object) -> None:
    tree = ast.parse(annotation, mode="eval").body
    found = values.convert("x", tree, text)
    assert found == value and type(found) is type(value)
    assert values.convert("x", tree, values.text_of(value)) == value


@pytest.mark.parametrize(
    ("annotation", "text", "message"),
    [
        ("int", "1.5", "--a-b takes INT, not '1.5'"),
        ("Literal['read', 'write']", "wrte", "--a-b takes {read,write}, not 'wrte'; nearest: write"),
        ("tuple[int, ...]", "1,x", "--a-b takes INT,..., not '1,x'"),
        ("int | None", "x", "--a-b takes INT|none, not 'x'"),
        ("bool", "maybe", "--a-b takes true|false, not 'maybe'"),
    ],
)
def test_texts_that_do_not_fit_are_refused(annotation: str, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        values.convert("a_b", ast.parse(annotation, mode="eval").body, text)
    assert str(error.value) == message


def test_flags_follow_the_signature_and_reach_the_function(fake, cli, pair) -> None:
    given = ["--side=write", "--n=all", "--share=2", "--name=none", "--layers=3,1", "--sites=L0.z,L1.z", "--plain", "--must=5", "--seed=9"]
    code, out, _ = cli("run", "fake", "--model", pair[0], "--task", "ioi", "--prompts-n", 3, *given, "--out", "o")
    assert code == 0
    folder = next(Path("o/results/fake").iterdir())
    page = json.loads((folder / "result.json").read_text())
    assert page["fields"]["seen"] == {
        "side": "'write'", "n": "'all'", "share": "2.0", "name": "None", "layers": "(3, 1)", "sites": "('L0.z', 'L1.z')",
        "plain": "True", "must": "5", "heads": "'L0H1'", "seed": "9",
    }  # fmt: skip
    assert page["fields"]["kinds"] == {"model": "HookedModel", "prompts": "Prompts"}  # the clean side of ioi's pairs
    assert str(folder) in out
    assert "already there" in cli("run", "fake", "--model", pair[0], "--task", "ioi", "--prompts-n", 3, *given, "--out", "o")[1]
    code, out, _ = cli("replay", folder)
    assert code == 0 and "the same numbers, to the last bit" in out
    code, out, _ = cli("run", "fake", "--base", pair[0], "--tuned", pair[1], "--prompts=plain_text", "--must=1", "--no-plain")
    assert code == 0 and "ModelPair" in next(Path("results/fake").glob("*/result.json")).read_text()
    _, out, _ = cli("run", "fake", "--model", pair[0], "--task", "ioi", "--prompts-n", 3, *given, "--out", "o", "--fresh")
    assert "saved: o/results/fake" in out


def test_help_of_an_analysis_shows_defaults_and_choices(fake, capsys) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["run", "fake", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert leave.value.code == 0
    for part in ("--side {read,write}", "(default read)", "has no default. (required)", "--layers INT,...", "(default L0.z)", "--no-plain"):
        assert part in text


def test_what_run_needs_is_said(fake, cli) -> None:
    refused(cli("run"), "name of an analysis")
    refused(cli("run", "fake", "--model=x", "--prompts=ioi"), "fake needs --must")
    refused(cli("run", "fake", "--must=1", "--prompts=ioi"), "--model, or --base and --tuned")
    refused(cli("run", "fake", "--must=1", "--model=x", "--base=y", "--prompts=ioi"), "--model, or --base and --tuned")
    refused(cli("run", "fake", "--must=1", "--model=x"), "needs --prompts FILE or --task TASK")
    refused(cli("run", "fake", "--must=1", "--model=x", "--prompts=ioi", "--task=ioi"), "give one of them")
    refused(cli("run", "fake", "--must=1", "--model=x", "--side=raed"), "nearest: read")
    refused(cli("run", "fake", "--must"), "expected one argument")
    refused(cli("run", "fake", "--prompts-n=0"), "from 1")
    assert not Path("results").exists()


# -------------------------------------------------------------------------------------- refusals


def test_unknown_words_come_with_the_nearest(cli) -> None:
    refused(cli("run", "wieght_delta"), "nearest: weight_delta")
    refused(cli("run", "weight_delta", "--rnak=3"), "nearest: --rank")
    refused(cli("run", "intruder_dimensions", "--model=base"), "compares two models: it takes --base and --tuned, not --model")
    refused(cli("run", "channel_effects", "--base=base", "--tuned=boxes-tuned"), "takes one model: give --model, not --base")
    refused(cli("compare", "--efort=full"), "nearest: --effort")
    refused(cli("compare", "--only", "wieght_delta"), "nearest: weight_delta")
    refused(cli("compare", "--task", "iou"), "ioi")
    refused(cli("compare", "--effort=ful"), "quick")
    refused(cli("tasks", "iio"), "ioi")
    refused(cli("tasks", "boxes(n_boxs=3)"), "n_boxes")
    refused(cli("organisms", "train", "bsae"), "nearest: base")


def test_models_that_cannot_be_read(cli, pair, tmp_path) -> None:
    base, tuned = pair
    refused(cli("compare", tmp_path / "bsae", tuned), "bsae")
    refused(cli("run", "weight_delta", "--base", base.parent / "bse", "--tuned", tuned), "near: base")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(cli("compare", base, empty), "config.json")
    bare = copied(base, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    refused(cli("compare", base, bare), "no weights")
    (bare / "pytorch_model.bin").write_bytes(b"junk")
    refused(cli("compare", base, bare), "pickle", "save_pretrained")
    short = copied(base, tmp_path / "short")
    whole = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(cli("compare", base, short), "cut short")
    refused(cli("compare", base), "at least one tuned")


def test_pairs_that_do_not_fit(cli, pair, tmp_path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base, tuned = pair
    other, _ = save_pair(tmp_path / "deep", num_hidden_layers=2)
    refused(cli("compare", base, other), "number of layers is 3 in base and 2 in tuned")
    broken = copied(tuned, tmp_path / "nan")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    refused(cli("compare", base, broken, "--out", "o"), "mlp.up_proj.weight", "NaN")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["up_proj"],
        "base_model_name_or_path": "x",
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.model.layers.9.mlp.up_proj.lora_{}.weight"
    save_file({key.format("A"): torch.ones(2, 24), key.format("B"): torch.ones(40, 2)}, adapter / "adapter_model.safetensors")
    refused(cli("compare", base, adapter), "adapter", "layers.9")


def test_prompts_that_do_not_fit(cli, pair, tmp_path) -> None:
    base, tuned = pair
    models = ("--base", base, "--tuned", tuned)
    patching = ("run", "activation_patching", *models, "--prompts")
    refused(cli("run", "token_divergence", *models, "--prompts", written(tmp_path / "empty.jsonl")), "empty")
    refused(cli("run", "token_divergence", *models, "--prompts", written(tmp_path / "blank.jsonl", "The ring", "")), "empty")
    long = written(tmp_path / "long.jsonl", "The ring " * CONTEXT)
    refused(cli("run", "token_divergence", *models, "--prompts", long), f"context holds {CONTEXT}")
    refused(cli("run", "token_divergence", *models, "--prompts", tmp_path / "none.jsonl"), "no file")
    refused(cli("run", "token_divergence", *models, "--prompts", tmp_path), "folder")
    refused(cli(*patching, written(tmp_path / "many.jsonl", pair_of_prompts(answer=" red hello"))), "tokens", "expected one")
    refused(cli(*patching, written(tmp_path / "single.jsonl", {"text": "The ring", "answer": " red"})), "clean/corrupt pairs")
    one = pair_of_prompts()
    one["clean"]["spans"] = {"S": [4, 8]}
    refused(cli(*patching, written(tmp_path / "apart.jsonl", one)), "S")
    good = written(tmp_path / "good.jsonl", pair_of_prompts())
    refused(cli(*patching, good, "--metric=logit_dif"), "nearest: logit_diff")
    refused(cli(*patching, good, "--sites=resid_pr"), "nearest: resid_pre")
    refused(cli(*patching, good, "--positions=S1"), "S1")
    refused(cli(*patching, good, "--heads-at=9"), "9")


def test_places_that_cannot_be_written_are_refused_before_anything_loads(cli, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    refused(cli("compare", "no-model", "no-model", "--out", file), "cannot write", "file")
    refused(cli("compare", "no-model", "no-model", "--report", file / "page.html"), "cannot write")
    refused(cli("run", "weight_delta", "--base=no-model", "--tuned=no-model", "--out", file), "cannot write")
    refused(cli("report", tmp_path, "--out", file / "page.html"), "cannot write")
    assert file.read_text() == "here"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_refused(cli, tmp_path) -> None:
    (tmp_path / "ro").mkdir(mode=0o500)
    refused(cli("compare", "a", "b", "--out", tmp_path / "ro"), "cannot write")


def test_folders_that_hold_no_result(cli, tmp_path) -> None:
    for command in ("show", "replay"):
        refused(cli(command, tmp_path / "nothing"), "nothing")
    refused(cli("show", tmp_path), "no saved results")
    refused(cli("report", tmp_path, "--out", "page.html"), "no saved results")
    assert not Path("page.html").exists()


def test_debug_shows_the_traceback_and_the_line(cli) -> None:
    code, _, err = cli("run", "wieght_delta", "--debug")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("interp: there is no analysis")


def test_an_interrupt_and_a_bug_look_different(cli, monkeypatch) -> None:
    def stop(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "show_analyses", stop)
    code, _, err = cli("list")
    assert code == 130 and err.count("\n") == 1 and err.startswith("interp: stopped")

    def bug(args: object) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(commands, "show_analyses", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli("list")


def test_a_missing_file_is_one_line(cli, monkeypatch) -> None:
    monkeypatch.setattr(commands, "show_analyses", lambda args: Path("/no/such/file").read_text())
    refused(cli("list"), "/no/such/file: No such file or directory")


# ------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="session")
def kept(pair, tmp_path_factory):
    """A folder with the results of two analyses."""
    out = tmp_path_factory.mktemp("kept")
    models = ["--base", str(pair[0]), "--tuned", str(pair[1]), "--out", str(out)]
    assert main(["run", "weight_delta", *models]) == 0
    assert main(["run", "token_divergence", *models, "--task=plain_text", "--prompts-n=3"]) == 0
    return out


def test_show_prints_the_sentence_the_table_and_the_command(cli, kept, tmp_path) -> None:
    code, out, _ = cli("show", next((kept / "results/weight_delta").iterdir()), "--csv", tmp_path / "t.csv")
    assert code == 0 and "relative weight change" in out and "L1.W_out" in out and "interp run weight_delta" in out
    assert (tmp_path / "t.csv").read_text().startswith("weight,")
    code, out, _ = cli("show", kept)
    assert code == 0 and "interp run weight_delta" in out and "interp run token_divergence" in out
    code, out, _ = cli("show", next((kept / "results/token_divergence").iterdir()), "--per=prompt")
    assert code == 0 and "more rows" in out
    refused(cli("show", next((kept / "results/weight_delta").iterdir()), "--per=prompt"), "per prompt")


def test_replay_computes_the_same_numbers(cli, kept) -> None:
    code, out, _ = cli("replay", next((kept / "results/token_divergence").iterdir()), "--out", "again")
    assert code == 0 and "the same numbers, to the last bit" in out
    assert len(list(Path("again/results/token_divergence").iterdir())) == 1


def test_replay_sees_other_weights(cli, pair, tmp_path) -> None:
    base, tuned = copied(pair[0], tmp_path / "base"), copied(pair[1], tmp_path / "tuned")
    assert cli("run", "weight_delta", "--base", base, "--tuned", tuned)[0] == 0
    shutil.copy(base / "model.safetensors", tuned / "model.safetensors")
    code, out, _ = cli("replay", next(Path("results/weight_delta").iterdir()))
    assert code == 1 and "not the same computation" in out


def test_replay_finds_models_that_moved(cli, pair, tmp_path) -> None:
    base, tuned = copied(pair[0], tmp_path / "base"), copied(pair[1], tmp_path / "tuned")
    assert cli("run", "weight_delta", "--base", "base", "--tuned", "tuned")[0] == 0
    tuned.rename(tmp_path / "elsewhere")
    folder = next(Path("results/weight_delta").iterdir())
    refused(cli("replay", folder), "tuned", results=1)
    code, out, _ = cli("replay", folder, "--tuned=elsewhere")
    assert code == 0 and "the same numbers" in out and "--base=base --dtype=float32" in out and str(base) not in out


def test_adapters_are_part_of_the_command(fake, cli, pair, tmp_path) -> None:
    adapter = save_adapter(tmp_path / "lora", layer=1)
    assert cli("run", "weight_delta", "--base", pair[0], "--tuned", adapter)[0] == 0
    code, out, _ = cli("replay", next(Path("results/weight_delta").iterdir()))
    assert code == 0 and f"--tuned={adapter}" in out and "to the last bit" in out
    assert cli("run", "fake", "--model", pair[0], "--adapter", adapter, "--prompts=ioi", "--must=1")[0] == 0
    assert cli("run", "fake", "--model", pair[0], "--prompts=ioi", "--must=1")[0] == 0
    folders = list(Path("results/fake").iterdir())
    assert len(folders) == 2  # with and without the adapter are two results
    commands_ = [cli("replay", folder)[1].splitlines()[0] for folder in folders]
    assert sorted(f"--adapter={adapter}" in line for line in commands_) == [False, True]


def test_notes_are_for_users_not_for_developers(cli, monkeypatch) -> None:
    import warnings

    def warn(args: object) -> int:
        warnings.warn("old name", FutureWarning, stacklevel=1)
        warnings.warn("a folder\nwins", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(commands, "show_analyses", warn)
    assert cli("list")[2] == "interp: note: a folder wins\n"


def test_a_circuit_comes_from_a_file_or_from_a_result(cli, monkeypatch, tmp_path) -> None:
    """And a result that was made of it is computed again from elsewhere: what it names is looked for beside its results."""
    pairs = ("--prompts=ioi", "--prompts-n=8")
    assert cli("run", "circuit_discovery", "--model=base", *pairs, "--level=0.9", "--stages=general")[0] == 0
    found = next(Path("results/circuit_discovery").iterdir())
    circuit = store.load(found).circuit()
    circuit.save("mine.json")
    assert run_module.circuit("mine.json") == run_module.circuit(str(found)) == circuit and len(circuit.nodes) > 1
    refused(cli("run", "circuit_overlap", f"--a={found}:tuned", "--b=mine.json"), "there is no model 'tuned'", results=1)
    assert cli("run", "circuit_overlap", f"--a={found}", "--b=mine.json")[0] == 0
    other = next(Path("results/circuit_overlap").iterdir())
    refused(cli("run", "circuit_overlap", f"--a={other}", "--b=mine.json"), "circuit_overlap, which has no circuit to take", results=2)
    refused(cli("run", "circuit_overlap", "--a=nowhere", "--b=mine.json"), "there is no circuit at nowhere", results=2)
    assert f"--a={found} --b=mine.json" in cli("replay", other)[1]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, _ = cli("replay", tmp_path / other)
    assert code == 0 and "to the last bit" in out and f"--b={tmp_path / 'mine.json'}" in out and f"--a={tmp_path / found}" in out


def test_a_file_of_prompts_is_part_of_the_command(cli, pair) -> None:
    written(Path("texts.jsonl"), "The ring is red", "The ring is blue", "Alice went to the museum")
    models = ("--base", pair[0], "--tuned", pair[1], "--bos=never")
    assert cli("run", "token_divergence", *models, "--prompts=texts.jsonl", "--prompts-n=2")[0] == 0
    code, out, _ = cli("replay", next(Path("results/token_divergence").iterdir()))
    assert code == 0 and "--prompts=texts.jsonl --prompts-n=2 --bos=never" in out and "to the last bit" in out


@pytest.fixture
def made_elsewhere(cli, pair, tmp_path, monkeypatch):
    """Results in a folder of their own, of files that lie where the commands were given; then we are somewhere else."""
    names = {"token_divergence": "texts.jsonl", "circuit_overlap": "mine.json", "circuit_discovery": "stages.json"}
    written(Path("texts.jsonl"), "The ring is red", "The ring is blue", "Alice went to the museum")
    made = Circuit.of((4, 6, 2), {"mover": ["L2H0.z@END", "L2H1.z@END"], "previous": "L0H3.z@S1+1"})
    made.save("mine.json")
    Path("stages.json").write_text('{"stages": [{"role": "writer", "receivers": "logits"}]}')
    models = ("--base", pair[0], "--tuned", pair[1])
    assert cli("run", "token_divergence", *models, "--prompts=texts.jsonl", "--out=kept")[0] == 0
    assert cli("run", "circuit_overlap", "--a=mine.json", "--b=mine.json", "--out=kept")[0] == 0
    discovery = ("run", "circuit_discovery", "--model=base", "--prompts=ioi", "--prompts-n=8", "--level=0.9")
    assert cli(*discovery, "--stages=stages.json", "--out=kept")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return {name: (next((tmp_path / "kept/results" / name).iterdir()), tmp_path / file) for name, file in names.items()}


def test_replay_finds_files_where_they_were(cli, made_elsewhere) -> None:
    for folder, file in made_elsewhere.values():
        code, out, _ = cli("replay", folder)
        assert code == 0 and "to the last bit" in out and f"={file}" in out
    for folder, file in made_elsewhere.values():
        file.rename(folder.parents[2] / file.name)  # beside the results they are found, too
        code, out, _ = cli("replay", folder)
        assert code == 0 and f"={folder.parents[2] / file.name}" in out


def test_replay_says_that_a_file_holds_something_else(cli, made_elsewhere) -> None:
    changed = {"token_divergence": "other prompts", "circuit_overlap": "another circuit", "circuit_discovery": "something else"}
    for name, (folder, file) in made_elsewhere.items():
        text = file.read_text()
        file.write_text(text.replace("red", "new").replace("L2H1", "L2H2").replace("writer", "author"))
        assert file.read_text() != text
        refused(cli("replay", folder), f"{file} holds {changed[name]} now than the result {folder} was made from", results=0)
        file.write_text(text)
        assert cli("replay", folder)[0] == 0


def test_a_flag_of_several_inputs_is_named_in_full(cli) -> None:
    refused(cli("run", "circuit_discovery", "--model=base", "--task=ioi", "--n=60"), "does not take '--n=60'; nearest: --prompts-n")
    refused(cli("run", "tuco_detection", "--n=60"), "nearest: --positive-n, --negative-n")


def test_replay_takes_no_trust_from_a_folder(cli, kept, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(run_module, "_inputs", lambda of, args: seen.append(args.trust_remote_code) or [])
    folder = next((kept / "results/weight_delta").iterdir())
    for flags in ([], ["--trust-remote-code"]):
        with pytest.raises(TypeError):
            cli("replay", folder, *flags)
    assert seen == [False, True]


def test_report_writes_one_page(cli, kept) -> None:
    code, out, _ = cli("report", kept, kept / "results", "--out", "page.html")
    assert code == 0 and "2 results" in out
    page = Path("page.html").read_text()
    assert "Weight delta" in page and "Token divergence" in page and page.count('class="result"') == 2


def test_tasks_shows_examples_and_answers(cli, pair) -> None:
    code, out, _ = cli("tasks", "ioi", "--n=2", "--model", pair[0])
    assert code == 0 and out.count("|") > 10 and "of 2 right" in out
    code, out, _ = cli("tasks", "boxes(n_boxes=3)", "--n=2")
    assert code == 0 and out.startswith("boxes(n_boxes=3):") and out.count(" -> ") == 2
    refused(cli("tasks", "--model", pair[0]), "name the task first")


def test_models_lists_the_cards(cli) -> None:
    from interp import organisms

    code, out, _ = cli("models")
    assert code == 0 and all(name in out for name in (*organisms.names(), *organisms.HAND_BUILT))
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == organisms.names())
    cells = {line.split("  ")[1].strip(): [c for c in line.split("  ") if "±" in c] for line in lines[head + 1 :] if "±" in line}
    for column, name in enumerate(organisms.names()):
        assert cells["boxes"][column].strip() == organisms.behaviour(name)["boxes"]
    refused(cli("models", "nobody"), "nobody")


def test_organisms_trains_into_a_new_folder(cli, monkeypatch) -> None:
    from interp.organisms import recipes
    from interp.organisms.training import Standing

    def train(name: str, out: Path, steps: int | None, log) -> Path:
        log(100, {"ioi": 0.5, "boxes": 0.25}, {"boxes": Standing(2, 0.75)})
        return out

    monkeypatch.setattr(recipes, "train", train)
    code, out, _ = cli("organisms", "train", "base", "--steps=7")
    assert code == 0 and "step 100: ioi 0.500, boxes 0.250 (75% right at level 3)\n" in out and "saved: organisms/base" in out
