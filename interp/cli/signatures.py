"""What an analysis takes, read from its source: no analysis and no torch is imported for ``--help``."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from interp.analyses import ANALYSES
from interp.names import unknown

MODELS = ("HookedModel", "ModelPair")
PROMPTS = ("Prompts", "PromptPairs")
_ROOT = Path(__file__).parents[1]
_CLASSES = (*MODELS, *PROMPTS, "Task", "Factors", "Site", "Heads")  # never aliases: their large files need no look


@dataclass(frozen=True)
class Parameter:
    """One parameter of an analysis.

    Attributes:
        name: its name, which is its flag.
        annotation: its annotation, with names that stand for a type replaced by that type.
        default: the source text of its default, None where a value must be given.
        help: what the docstring says about it.
    """

    name: str
    annotation: ast.expr
    default: str | None
    help: str

    @property
    def names(self) -> frozenset[str]:
        """The class names in the annotation."""
        return frozenset(n.id for n in ast.walk(self.annotation) if isinstance(n, ast.Name))


@dataclass(frozen=True)
class Signature:
    """What one analysis takes: positional inputs, then keyword-only settings."""

    name: str
    doc: str
    returns: str
    inputs: tuple[Parameter, ...]
    settings: tuple[Parameter, ...]

    @property
    def summary(self) -> str:
        """The first line of the docstring: the question the analysis answers."""
        return self.doc.strip().split("\n", 1)[0]

    @property
    def text(self) -> str:
        """The docstring without its sections of arguments and errors, which ``--help`` lists by flag."""
        return re.split(r"\n+(?:Args|Raises|Returns):\n", self.doc)[0]

    def of_kind(self, *kinds: str) -> tuple[Parameter, ...]:
        """The inputs whose annotation names one of these classes."""
        return tuple(p for p in self.inputs if p.names & set(kinds))


@cache
def signature(name: str) -> Signature:
    """Read the signature of an analysis from its file.

    Raises:
        InputError: there is no analysis of that name; the message has the nearest names.
    """
    if name not in ANALYSES:
        raise unknown("analysis", name, ANALYSES)
    module = f"interp.analyses.{name}"
    function = next(n for n in _parsed(module).body if isinstance(n, ast.FunctionDef) and n.name == name)
    doc = ast.get_docstring(function) or ""
    told = _described(doc)
    arguments = function.args

    def parameter(arg: ast.arg, default: ast.expr | None) -> Parameter:
        annotation = _resolved(arg.annotation or ast.Name("str"), module)
        return Parameter(arg.arg, annotation, None if default is None else ast.unparse(default), told.get(arg.arg, ""))

    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    inputs = tuple(parameter(a, d) for a, d in zip(positional, defaults, strict=True))
    settings = tuple(parameter(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    return Signature(name, doc, ast.unparse(function.returns) if function.returns else "", inputs, settings)


@cache
def _parsed(module: str) -> ast.Module:
    package, _, name = module.rpartition(".")
    # Asking Python where a module is would import the packages around it, so one that is not imported is looked up on the disk.
    folders = sys.modules[package].__path__ if package in sys.modules else [str(_ROOT.joinpath(*package.split(".")[1:]))]
    places = [Path(folder) / name for folder in folders]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    if not files:
        raise ModuleNotFoundError(f"no module {module}", name=module)
    return ast.parse(files[0].read_text(encoding="utf-8"))


def _resolved(annotation: ast.expr, module: str) -> ast.expr:
    """The annotation with the aliases of its module (``Circuit = Literal["ov", "qk"]``) written out."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body

    class Written(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.expr:  # noqa: N802  (the name ast asks for)
            literal = isinstance(node.value, ast.Name) and node.value.id == "Literal"
            return node if literal else self.generic_visit(node)  # type: ignore[return-value]

        def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802
            found = _alias(node.id, module)
            return node if found is None else _resolved(*found)

    return Written().visit(ast.parse(ast.unparse(annotation), mode="eval").body)


def _alias(name: str, module: str) -> tuple[ast.expr, str] | None:
    """What a module says a name stands for, and the module that says so; None for classes and built-ins."""
    if name in _CLASSES:
        return None
    for node in _top_level(_parsed(module).body):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                return value, module
            case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) if found == name:
                return value, module
            case ast.ImportFrom(module=str() as source, names=names) if source.startswith("interp."):
                for imported in names:
                    if (imported.asname or imported.name) == name:
                        return _alias(imported.name, source)
    return None


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, with those under ``if TYPE_CHECKING:``."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _top_level(node.body)


def _described(doc: str) -> dict[str, str]:
    """The ``Args:`` section of a docstring, name by name, each on one line."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in _entries(section[1])} if section else {}


def _entries(section: str) -> Iterator[tuple[str, str]]:
    indent = re.match(r"[ \t]*", section)[0]  # type: ignore[index]
    for entry in re.split(rf"^{indent}(?=\S)", section, flags=re.MULTILINE)[1:]:
        names, _, text = entry.partition(":")
        for name in names.split(","):
            yield name.split("(")[0].strip(" *"), text
