"""The words of the command line: commands, flags and their help."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from interp.analyses import ANALYSES
from interp.cli import commands, factors, run
from interp.cli.signatures import MODELS, PROMPTS, Parameter, Signature, signature
from interp.cli.values import describe, is_switch, text_of
from interp.errors import InputError
from interp.names import unknown

EPILOG = "Errors are one line on stderr and exit code 2; --debug shows the traceback, too."


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        raise InputError(f"{message}; see {self.prog} --help")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the words of a command line into a namespace with ``action``, the function to call with it.

    Raises:
        InputError: a command, an analysis or a flag is unknown, or a flag lacks its value.
    """
    plain = [w for w in words if w != "--debug"]
    if not plain or plain[0] in ("-h", "--help"):
        return argparse.Namespace(action=lambda _: print(_overview()) or 0)
    if plain[0] == "--version":
        return argparse.Namespace(action=commands.version)
    if plain[0] not in _COMMANDS:
        raise unknown("command", plain[0], _COMMANDS)
    if plain[0] == "run" and len(plain) > 1 and not plain[1].startswith("-"):
        return _known(run_parser(signature(plain[1])), plain[2:])
    if plain == ["run"]:
        raise InputError(f"run needs the name of an analysis: {', '.join(ANALYSES)}")
    summary, fill = _COMMANDS[plain[0]]
    parser = Parser(prog=f"interp {plain[0]}", description=summary, formatter_class=_Formatter, allow_abbrev=False, epilog=EPILOG)
    fill(parser)
    return _known(parser, plain[1:])


def _overview() -> str:
    rows = "\n".join(f"  {name:11}{summary}" for name, (summary, _) in _COMMANDS.items())
    return f"interp: what did fine-tuning change inside this model?\n\n{rows}\n\n`interp COMMAND --help` lists its flags. {EPILOG}"


def _known(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    args, extra = parser.parse_known_args(words)
    if extra:
        given, flags = extra[0].split("=")[0], list(dict.fromkeys(re.findall(r"--[\w-]+", parser.format_help())))
        if given == "--model" and "--base" in flags:
            raise InputError(f"{parser.prog} compares two models: it takes --base and --tuned, not --model")
        if given in ("--base", "--tuned") and "--model" in flags:
            raise InputError(f"{parser.prog} takes one model: give --model, not {given}")
        near = [flag for flag in flags if len(given) > 2 and flag.endswith(given[1:])] or get_close_matches(given, flags, n=1)
        raise InputError(f"{parser.prog} does not take {extra[0]!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    return args


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description as they are written."""


def _compare(p: Parser) -> None:
    p.add_argument("base", nargs="?", metavar="BASE", help="folder, Hub id (org/model@revision) or shipped organism")
    p.add_argument("tuned", nargs="*", metavar="TUNED", help="one tuned model or several; an adapter folder is applied to BASE")
    task = "a task to score, as ioi or 'boxes(n_boxes=3)'; may be repeated"
    p.add_argument("--task", action="append", default=[], metavar="TASK", help=task)
    p.add_argument("--prompts", metavar="FILE", help="your own texts (JSONL or one per line), instead of the shipped plain text")
    p.add_argument("--effort", default="normal", choices=("quick", "normal", "full"), help="how much data (default %(default)s)")
    p.add_argument("--time", type=_number, metavar="MIN", help="skip what would take longer in all, and say how to run it")
    p.add_argument("--only", action="append", default=[], metavar="NAMES", help="only these analyses or groups, as first_look,tuco")
    p.add_argument("--out", default=".", metavar="DIR", help="results go to DIR/results, the page to DIR/report.html (default: here)")
    p.add_argument("--report", metavar="FILE", help="another name for the page")
    _loading(p)
    p.set_defaults(action=commands.compare)


def _list(p: Parser) -> None:
    p.set_defaults(action=commands.show_analyses)


def _run(p: Parser) -> None:
    p.description = "Run one analysis. `interp run ANALYSIS --help` lists its flags.\n\n" + commands.analyses_table()
    p.add_argument("analysis", metavar="ANALYSIS", help="its name")
    p.set_defaults(action=commands.show_analyses)


def _show(p: Parser) -> None:
    p.add_argument("folder", metavar="DIR", help="a saved result, or a folder of them")
    p.add_argument("--per", choices=("prompt",), help="one row per prompt instead of means")
    p.add_argument("--csv", metavar="FILE", help="write the whole table there")
    p.set_defaults(action=commands.show)


def _replay(p: Parser) -> None:
    p.add_argument(
        "folder", metavar="DIR", help="a saved result; files it names are looked for where they were, here, and beside its results folder"
    )
    p.add_argument("--out", metavar="DIR", help="save the new result under DIR as well")
    for side in run.SIDES:
        p.add_argument(f"--{side}", metavar="MODEL", help="where that model is now, if it has moved")
    p.add_argument("--trust-remote-code", action="store_true", help="let the models bring code; never taken from DIR")
    p.set_defaults(action=run.replay)


def _report(p: Parser) -> None:
    p.add_argument("folders", nargs="+", metavar="DIR", help="saved results, or folders of them, in the order of the page")
    p.add_argument("--out", default="report.html", metavar="FILE", help="the page (default %(default)s)")
    p.set_defaults(action=commands.report)


def _models(p: Parser) -> None:
    p.add_argument("name", nargs="?", metavar="NAME", help="show the card of this one")
    p.set_defaults(action=commands.models)


def _tasks(p: Parser) -> None:
    p.add_argument("name", nargs="?", metavar="TASK", help="show examples of this one")
    p.add_argument("--model", metavar="MODEL", help="show the examples as this model's tokens, with its answers")
    p.add_argument("--n", type=_count, default=5, help="how many examples (default %(default)s)")
    p.add_argument("--seed", type=_whole, default=0, help="of the generator (default %(default)s)")
    _loading(p)
    p.set_defaults(action=commands.tasks)


def _factors(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", help="folder, Hub id (org/model@revision) or shipped organism")
    p.add_argument("--adapter", metavar="DIR", help="an adapter to apply to it")
    p.add_argument("--prompts", metavar="FILE", help="texts (JSONL or one per line)")
    p.add_argument("--task", metavar="TASK", help="prompts of a task, as 'plain_text(source=prose)'")
    p.add_argument("--text", metavar="FILE", help=f"running text, cut into rows of {factors.ROW} tokens without special ones")
    p.add_argument("--n", type=_count, metavar="N", help="how many prompts or rows (default: 50 of a task, all of a file)")
    p.add_argument("--prompts-seed", type=_whole, default=0, metavar="SEED", help="seed of a task's prompts (default 0)")
    p.add_argument("--modules", metavar="W_..,..", help="among W_Q,W_K,W_V,W_O,W_in,W_gate,W_out (default: all)")
    p.add_argument("--layers", metavar="INT,...", help="their layers (default: all)")
    told = "drawn from the model's own predictions (the Fisher matrix), or the tokens of the text (default %(default)s)"
    p.add_argument("--labels", choices=("sampled", "gold"), default="sampled", help=told)
    p.add_argument("--seed", type=_whole, default=0, help="of the drawn labels (default %(default)s)")
    p.add_argument("--groups", type=_count, metavar="N", help="collect in N parts, to save memory (default: as few as fit)")
    kept = "the folder; an interrupted collection goes on there, and more prompts add to a finished one"
    p.add_argument("--out", required=True, metavar="DIR", help=kept)
    _loading(p)
    p.set_defaults(action=factors.factors)


def _organisms(p: Parser) -> None:
    p.add_argument("verb", choices=("train",), metavar="train", help="train a shipped organism again from its recipe")
    p.add_argument("name", metavar="NAME", help="its name, see `interp models`")
    p.add_argument("--out", metavar="DIR", help="where to write it (default: organisms/NAME)")
    p.add_argument("--steps", type=_count, metavar="N", help="optimizer steps (default: those of the recipe)")
    p.set_defaults(action=commands.organisms)


_COMMANDS = {
    "compare": ("Compare a base and one or several tuned models, on one page; the shipped pair without arguments.", _compare),
    "list": ("List the analyses.", _list),
    "run": ("Run one analysis; `interp run ANALYSIS --help` lists its flags.", _run),
    "factors": ("Collect the Kronecker factors of a model's curvature, which some analyses take.", _factors),
    "show": ("Print a saved result.", _show),
    "replay": ("Compute a saved result again and say whether the numbers are the same.", _replay),
    "report": ("Write saved results as one page.", _report),
    "models": ("List the shipped models.", _models),
    "tasks": ("List the tasks, or show examples of one.", _tasks),
    "organisms": ("Train a shipped model again.", _organisms),
}


def run_parser(of: Signature) -> Parser:
    """The parser of ``interp run ANALYSIS``: one flag per input and per setting of its signature."""
    p = Parser(prog=f"interp run {of.name}", description=of.text, formatter_class=_Formatter, allow_abbrev=False, epilog=EPILOG)
    inputs = p.add_argument_group("inputs")
    for parameter in of.of_kind(*MODELS):
        kinds = parameter.names & set(MODELS)
        if "HookedModel" in kinds:
            inputs.add_argument("--model", metavar="MODEL", help="one model: folder, Hub id or shipped organism")
            inputs.add_argument("--adapter", metavar="DIR", help="an adapter to apply to --model")
        if "ModelPair" in kinds:
            inputs.add_argument("--base", metavar="MODEL", help="the model before fine-tuning")
            inputs.add_argument("--tuned", metavar="MODEL", help="the model after it, or an adapter folder for --base")
    for parameter in of.inputs:
        _add_input(inputs, parameter, of)
    settings = p.add_argument_group("settings")
    for parameter in of.settings:
        _add_setting(settings, parameter)
    other = p.add_argument_group("other")
    kept = "the result goes to DIR/results (default: here); one that is there is not computed again"
    other.add_argument("--out", default=".", metavar="DIR", help=kept)
    other.add_argument("--fresh", action="store_true", help="compute again even if the result is there")
    _loading(other)
    p.set_defaults(action=run.run, analysis=of.name)
    return p


def _add_input(group: argparse._ArgumentGroup, parameter: Parameter, of: Signature) -> None:
    flag = "--" + parameter.name.replace("_", "-")
    if parameter.names & set(MODELS):
        return
    if parameter.names & set(PROMPTS):
        kinds = "clean/corrupt pairs" if "Prompts" not in parameter.names else "prompts"
        group.add_argument(flag, metavar="FILE", dest=f"input_{parameter.name}", help=f"{kinds} as JSONL, or a task")
        if of.of_kind("Task"):
            return
        if parameter.name == "prompts":
            group.add_argument(
                "--task", metavar="TASK", dest="prompts_task", help=f"instead of {flag}: prompts of this task, as ioi or 'boxes(n_boxes=3)'"
            )
        group.add_argument(f"{flag}-n", type=_count, metavar="N", dest=f"n_{parameter.name}", help="how many prompts")
        seed = "seed of the task's prompts (default 0)"
        group.add_argument(f"{flag}-seed", type=_whole, default=0, metavar="SEED", dest=f"seed_{parameter.name}", help=seed)
    elif "Task" in parameter.names:
        group.add_argument(flag, metavar="TASK", dest=f"input_{parameter.name}", help="a task, as ioi or 'boxes(n_boxes=3)'")
    elif "Circuit" in parameter.names:
        told = f"{parameter.help.rstrip('.')} (a file that circuit.save wrote, or a saved result that found it; DIR:base of a pair's)"
        group.add_argument(flag, metavar="FILE|DIR", dest=f"input_{parameter.name}", help=told.replace("%", "%%"))
    elif "Factors" in parameter.names:
        told = f"{parameter.help.rstrip('.')} (a folder that `interp factors` or kfac_factors wrote)"
        group.add_argument(flag, metavar="FOLDER", dest=f"input_{parameter.name}", help=told.replace("%", "%%"))
    else:
        group.add_argument(flag, metavar="DIR", dest=f"input_{parameter.name}", help=parameter.help or "a saved result")


def _add_setting(group: argparse._ArgumentGroup, parameter: Parameter) -> None:
    flag = "--" + parameter.name.replace("_", "-")
    told = "required" if parameter.default is None else f"default {_shown(parameter.default)}"
    text = f"{parameter.help} ({told})".strip().replace("%", "%%")
    if is_switch(parameter.annotation):
        group.add_argument(flag, dest=f"set_{parameter.name}", action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        group.add_argument(flag, dest=f"set_{parameter.name}", metavar=describe(parameter.annotation).replace("%", "%%"), help=text)


def _shown(default: str) -> str:
    """The source text of a default as one would write it behind the flag."""
    try:
        return text_of(ast.literal_eval(default)) or "nothing"
    except ValueError:  # a name or an expression: shown as it stands in the source
        return default


def _loading(p: argparse._ActionsContainer) -> None:
    p.add_argument("--dtype", default="auto", metavar="DTYPE", help="float32, bfloat16, ...; the checkpoint's own by default")
    p.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda:0, ...; base and tuned apart as cuda:0,cuda:1")
    bos = "begin texts with the BOS token (default: as the tokenizer does)"
    p.add_argument("--bos", default="auto", choices=("auto", "always", "never"), help=bos)
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes a number, not {text!r}") from error


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes a whole number, not {text!r}") from error


def _count(text: str) -> int:
    if (value := _whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"takes a number from 1, not {value}")
    return value
