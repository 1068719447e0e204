"""Imports point down the layers, and what knows an architecture stays in one place."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "interp"

# The layer of a module is that of the longest prefix found here.
LAYERS = {
    **dict.fromkeys(
        [
            "errors",
            "names",
            "progress",
            "data_files",
            "sites",
            "circuit",
            "stages",
            "edits",
            "plots",
            "results",
            "linalg",
            "directions",
            "stats",
            "provenance",
            "fields",
            "result_files",
        ],
        0,
    ),
    **dict.fromkeys(["models", "organisms"], 1),
    **dict.fromkeys(["prompts", "tasks"], 2),
    **dict.fromkeys(["metrics", "sweeps", "spelling", "roles"], 3),
    # What trains and measures the organisms asks them the tasks; the organisms themselves are files.
    **dict.fromkeys(["organisms.recipes", "organisms.measure", "organisms.handmade"], 3),
    "analyses": 5,
    **dict.fromkeys(["store", "report"], 6),
    **dict.fromkeys(["cli", "compare", "plan", "request", "inputs", "verdict", "columns", "__main__", "__init__"], 7),
}
ARCHITECTURE_HOMES = ("models", "organisms")
FILES = sorted(p for p in ROOT.rglob("*.py") if "data" not in p.relative_to(ROOT).parts[:1])


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def layer(module: str) -> int:
    """Of a module path without the leading ``interp.``."""
    if module.startswith("analyses."):
        return 4
    parts = module.split(".")
    return next(LAYERS[home] for n in range(len(parts), 0, -1) if (home := ".".join(parts[:n])) in LAYERS)


def imported(source: str, module: str, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("interp.") for a in node.names if a.name.split(".")[0] == "interp"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import; write it in full"
            if node.module and node.module.split(".")[0] == "interp":
                home = node.module.removeprefix("interp").removeprefix(".")
                for a in node.names:
                    full = f"{home}.{a.name}".strip(".")
                    found.add(full if full in modules else home or "__init__")
    return found


def violations(files: dict[str, str]) -> list[str]:
    """Sentences about imports that point up or across, for module name -> source."""
    bad = []
    for module, source in files.items():
        for target in sorted(imported(source, module, set(files))):
            across = module.startswith("analyses.") and target.startswith("analyses.") and module != target
            if across:
                bad.append(f"{module} imports the analysis {target}")
            elif layer(target) > layer(module):
                bad.append(f"{module} (layer {layer(module)}) imports {target} (layer {layer(target)})")
    return bad


@cache
def sources() -> dict[str, str]:
    return {name_of(p): p.read_text(encoding="utf-8") for p in FILES}


def test_every_module_has_a_layer() -> None:
    missing = [m for m in sources() if not m.startswith("analyses") and m.split(".")[0] not in LAYERS]
    assert not missing, f"say in LAYERS where these belong: {missing}"


def test_imports_point_down() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg", "from interp.models import HookedModel"),
        ("analyses.a", "from interp.analyses.b import b"),
        ("analyses.a", "from interp.analyses import b"),
        ("analyses.a", "def f():\n    from interp.store import load"),
        ("prompts", "import interp.metrics"),
        ("results", "from interp import compare"),
        ("report", "from interp.cli import main"),
    ],
)
def test_the_check_sees_a_wrong_import(module: str, source: str) -> None:
    world = {"analyses.a": "", "analyses.b": "", "linalg": "", "models": "", "results": "", "prompts": "", "metrics": "", "cli": ""}
    assert violations(world | {"compare": "", "store": "", "report": "", module: source})


def code_strings(tree: ast.Module) -> list[str]:
    """The string constants that are not docstrings, and the attribute and variable names."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]
    return strings + [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]


HOOKS = re.compile(r"(^|\.)hook_|register_\w*hook|^run_with_(hooks|cache)|^blocks\.|transformer_lens")
ARCHITECTURES = re.compile(r"ForCausalLM|LMHeadModel|c_attn|q_proj|query_key_value|gpt_neox")


def knowledge(source: str) -> list[str]:
    tree = ast.parse(source)
    modules = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    lens = [m for m in modules if m.split(".")[0] in ("transformer_lens", "transformers", "peft")]
    return lens + [s for s in code_strings(tree) if HOOKS.search(s) or ARCHITECTURES.search(s)]


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] not in ARCHITECTURE_HOMES], ids=name_of)
def test_hook_names_and_architectures_only_in_models(path: Path) -> None:
    assert knowledge(path.read_text(encoding="utf-8")) == []


def test_the_check_sees_a_hook_name() -> None:
    assert knowledge('x = "blocks.3.hook_z"') and knowledge("m.register_forward_hook(f)") and knowledge("import transformer_lens")
    assert knowledge('k = "h.0.attn.c_attn.weight"') and not knowledge('def f():\n    """About hook_z."""')


def test_no_pickle_and_no_torch_load() -> None:
    for name, source in sources().items():
        tree = ast.parse(source)
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}, name
        loads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "load" and ast.unparse(n.value) == "torch"]
        assert not loads, f"{name} calls torch.load"


def test_no_import_cycle_at_the_top_level() -> None:
    """Imports inside functions may close a circle; those at the top of files may not."""
    world = sources()
    edges = {
        name: imported("\n".join(ast.unparse(n) for n in ast.parse(s).body if isinstance(n, ast.Import | ast.ImportFrom)), name, set(world))
        for name, s in world.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in edges.get(name, ()):
            visit(target, (*trail, name))
        done.add(name)

    for name in edges:
        visit(name, ())
