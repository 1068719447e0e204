"""What each command does. Torch is imported by those that need it, when they need it."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.analyses import ANALYSES, GROUPS
from interp.cli.run import loading
from interp.cli.signatures import signature
from interp.errors import InputError
from interp.inputs import Session
from interp.names import unknown
from interp.request import Request, check_writable

if TYPE_CHECKING:
    from interp.organisms.training import Standing

SHOWN = 40
"""Rows of a table that `interp show` prints."""


def compare(args: argparse.Namespace) -> int:
    """`interp compare`."""
    from interp.compare import run

    if args.base is not None and not args.tuned:
        raise InputError(
            f"compare takes a base and at least one tuned model, but only {args.base} came; without arguments it runs on the shipped pair"
        )
    request = Request(
        base=args.base,
        tuned=tuple(args.tuned),
        tasks=tuple(args.task),
        prompts=args.prompts,
        effort=args.effort,
        minutes=args.time,
        only=tuple(name.strip() for names in args.only for name in names.split(",") if name.strip()),
        out=Path(args.out),
        report=None if args.report is None else Path(args.report),
        loading=loading(args),
    )
    done = run(request, say, lambda line: print(f"interp: {' '.join(line.split())}", file=sys.stderr, flush=True))
    say(f"page: {done.page}")
    return 1 if any(gap.failed for gap in done.gaps) else 0


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def analyses_table() -> str:
    """Every analysis with the question it answers, under the headings of the page."""
    width = max(map(len, ANALYSES)) + 2
    groups = ([heading, *(f"  {name:{width}}{signature(name).summary}" for name in names)] for heading, names in GROUPS.items())
    return "\n".join("\n".join(lines) for lines in groups)


def version(args: argparse.Namespace) -> int:
    """`interp --version`."""
    from interp import __version__

    print(__version__)
    return 0


def show_analyses(args: argparse.Namespace) -> int:
    """`interp list`."""
    print(analyses_table())
    return 0


def show(args: argparse.Namespace) -> int:
    """`interp show`."""
    from interp import store

    folders = store.saved(args.folder)
    for folder in folders:
        result = store.load(folder)
        say(f"{folder}\n{result.summary()}")
        if len(folders) == 1:
            frame = result.to_frame(args.per)
            say("\n" + frame.head(SHOWN).to_string(index=False))
            if len(frame) > SHOWN:
                say(f"... {len(frame) - SHOWN} more rows; --csv FILE writes all of them")
            if args.csv is not None:
                check_writable(Path(args.csv).parent)
                frame.to_csv(args.csv, index=False)
        say(f"\n{shlex.join(result.meta.command())}\n")
    if args.csv is not None and len(folders) > 1:
        raise InputError(f"--csv writes one table, but {args.folder} holds {len(folders)} results; name one of them")
    return 0


def report(args: argparse.Namespace) -> int:
    """`interp report`."""
    from interp import store
    from interp.report import write_report

    check_writable(Path(args.out).parent)
    folders = list(dict.fromkeys(folder for given in args.folders for folder in store.saved(given)))
    say(f"{write_report([store.load(folder) for folder in folders], args.out)}: {len(folders)} results")
    return 0


def models(args: argparse.Namespace) -> int:
    """`interp models`."""
    from interp import organisms

    if args.name is not None:
        say(organisms.card(args.name))
        return 0
    base, tuned = organisms.shipped_pair()
    names = organisms.names()
    for name in names:
        mark = " (the base that `interp compare` takes)" if name == base else " (the tuned one it takes)" if name == tuned else ""
        say(f"{name}{mark}\n  {_first_sentence(organisms.card(name))}")
    say("\nMeasured on fresh prompts, mean ± standard error (`interp models NAME` prints a model's card):")
    found = {name: organisms.behaviour(name) for name in names}
    rows = [("", *names), *((task, *(found[n].get(task, "") for n in names)) for task in dict.fromkeys(t for n in names for t in found[n]))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    say("\nWritten by hand, with a known circuit (`interp.organisms.hand_built(name)`): " + ", ".join(organisms.HAND_BUILT))
    return 0


def _first_sentence(card: str) -> str:
    """The first sentence of a model card, behind its header and headings."""
    body = card.split("---", 2)[2] if card.startswith("---") and card.count("---") > 1 else card
    paragraph = next((p for p in body.split("\n\n") if p.strip() and not p.strip().startswith("#")), "")
    return " ".join(paragraph.split()).split(". ")[0].removesuffix(".") + "."


def tasks(args: argparse.Namespace) -> int:
    """`interp tasks`."""
    from interp.tasks import TASKS, task

    if args.name is None:
        if args.model is not None:
            raise InputError("--model shows the examples of a task; name the task first")
        for name in TASKS:
            say(f"  {name:{max(map(len, TASKS)) + 2}}{task(name).summary}")
        return 0
    asked = task(args.name)
    chance = "" if asked.chance is None else f"; chance {asked.chance:.3g}"
    say(f"{asked}: {asked.summary}\n{asked.paper}{chance}\n")
    if args.model is None:
        for example in asked.examples(args.n, args.seed):
            say(
                repr(example.text)
                + (f" -> {example.answer!r}" if example.answer else "")
                + (f" not {example.distractor!r}" if example.distractor else "")
            )
        return 0
    model = Session(loading(args)).model(args.model)
    prompts = asked.generate(model, args.n, args.seed)
    right = asked.score(model, prompts) if asked.chance is not None else None
    asked_of: Any = getattr(prompts, "clean", prompts)
    for i, (text, ids) in enumerate(zip(asked_of.texts, asked_of.ids, strict=True)):
        wanted = (
            model.token_text(asked_of.answers[i])
            if asked_of.answers is not None
            else asked_of.targets[i]
            if asked_of.targets is not None
            else ""
        )
        verdict = "" if right is None else (" [right]" if bool(right[i]) else " [wrong]")
        say(f"{text!r}" + (f" -> {wanted!r}{verdict}" if wanted else ""))
        say("  " + "|".join(model.token_strings(ids)))
    if right is not None:
        say(f"\n{model.name}: {int(right.sum())} of {len(right)} right")
    return 0


def organisms(args: argparse.Namespace) -> int:
    """`interp organisms train`."""
    from interp.organisms import recipes

    if args.name not in recipes.RECIPES:
        raise unknown("recipe", args.name, recipes.RECIPES)
    out = Path(args.out or Path("organisms") / args.name)
    check_writable(out)

    def log(step: int, losses: dict[str, float], standings: dict[str, Standing]) -> None:
        if step % 100 == 0:
            right = {name: f" ({s.right:.0%} right at level {s.level + 1})" for name, s in standings.items()}
            say(f"step {step}: " + ", ".join(f"{name} {loss:.3f}{right.get(name, '')}" for name, loss in losses.items()))

    say(f"saved: {recipes.train(args.name, out, args.steps, log)}")
    return 0
