"""What each command does. Torch is imported by those that need it, when they need it."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.analyses import ANALYSES, find
from interp.cli.signatures import MODELS, PROMPTS, Parameter, Signature, signature
from interp.cli.values import convert
from interp.errors import InputError
from interp.inputs import Loading, Session, checked_prompts, stamp
from interp.names import unknown
from interp.request import Request, check_writable

if TYPE_CHECKING:
    from interp.results import Result

SIDES = ("model", "base", "tuned")

SHOWN = 40
"""Rows of a table that `interp show` prints."""


def loading(args: argparse.Namespace) -> Loading:
    """How the flags say that checkpoints are loaded."""
    return Loading(args.dtype, args.device, args.bos, args.trust_remote_code)


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
    """Every analysis with the question it answers."""
    width = max(map(len, ANALYSES)) + 2
    return "\n".join(f"  {name:{width}}{signature(name).summary}" for name in ANALYSES)


def version(args: argparse.Namespace) -> int:
    """`interp --version`."""
    from interp import __version__

    print(__version__)
    return 0


def show_analyses(args: argparse.Namespace) -> int:
    """`interp list`."""
    print(analyses_table())
    return 0


def run(args: argparse.Namespace) -> int:
    """`interp run ANALYSIS`."""
    from interp import store

    of = signature(args.analysis)
    settings = _settings(of, args)
    _check_inputs(of, args)
    root = Path(args.out) / "results"
    check_writable(root)
    inputs = _inputs(of, args)
    function = find(of.name)
    meta = function.describe(*inputs, **settings)
    folder = None if args.fresh else store.find(meta.analysis, meta.identity, root)
    if folder is not None:
        say(f"{store.load(folder).summary()}\nalready there: {folder}")
        return 0
    result = _stamped(function(*inputs, **settings), of, args)
    say(f"{result.summary()}\nsaved: {store.save(result, root)}")
    return 0


def _stamped(result: Result, of: Signature, args: argparse.Namespace) -> Result:
    """The result with what was written for its inputs."""
    models = {side: text for side in SIDES if (text := getattr(args, side, None)) is not None}
    files = [text for p in of.of_kind(*PROMPTS) if (text := getattr(args, f"input_{p.name}")) is not None]
    n, adapter = getattr(args, "prompts_n", None), getattr(args, "adapter", None)
    return stamp(result, loading(args), models, adapter=adapter, prompts=files[0] if files else "", n=n)


def _settings(of: Signature, args: argparse.Namespace) -> dict[str, object]:
    """The settings that were written; the others keep the defaults of the analysis."""
    found: dict[str, object] = {}
    for p in of.settings:
        given = getattr(args, f"set_{p.name}")
        if given is not None:
            found[p.name] = given if isinstance(given, bool) else convert(p.name, p.annotation, given)
        elif p.default is None:
            raise InputError(f"{of.name} needs --{p.name.replace('_', '-')}")
    return found


def _check_inputs(of: Signature, args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is opened."""
    for parameter in of.inputs:
        if parameter.names & set(MODELS):
            _written_models(parameter, args)
        elif parameter.names & set(PROMPTS):
            checked_prompts(_written_prompts(parameter, args))
        elif (written := getattr(args, f"input_{parameter.name}")) is None:
            if parameter.default is None:
                raise InputError(f"{of.name} needs --{parameter.name.replace('_', '-')}")
        elif "Task" in parameter.names:
            from interp.tasks import task

            task(written)


def _inputs(of: Signature, args: argparse.Namespace) -> list[Any]:
    """The inputs of an analysis, in order."""
    from interp import store
    from interp.tasks import task

    session, made = Session(loading(args)), []
    for parameter in of.inputs:
        written = getattr(args, f"input_{parameter.name}", None)
        if parameter.names & set(MODELS):
            models = _written_models(parameter, args)
            made.append(session.pair(*models) if len(models) == 2 else session.model(models[0], getattr(args, "adapter", None)))
        elif parameter.names & set(PROMPTS):
            made.append(_prompts(parameter, args, session, made[0]))
        elif written is None:
            made.append(None)
        else:
            made.append(task(written) if "Task" in parameter.names else store.load(written))
    return made


def _written_models(parameter: Parameter, args: argparse.Namespace) -> tuple[str, ...]:
    """What was written for the model or the pair."""
    model, base, tuned = (getattr(args, side, None) for side in SIDES)
    if "HookedModel" not in parameter.names:
        if base is None or tuned is None:
            raise InputError(f"{args.analysis} compares two models: it needs --base and --tuned")
        return base, tuned
    if model is not None and base is None and tuned is None:
        return (model,)
    if "ModelPair" in parameter.names and model is None and base is not None and tuned is not None:
        return base, tuned
    raise InputError(f"{args.analysis} needs --model" + (", or --base and --tuned" if "ModelPair" in parameter.names else ""))


def _written_prompts(parameter: Parameter, args: argparse.Namespace) -> str:
    file: str | None = getattr(args, f"input_{parameter.name}")
    name: str | None = getattr(args, "prompts_task", None)
    flag = f"--{parameter.name.replace('_', '-')}"
    if file is not None and name is not None:
        raise InputError(f"{flag} and --task both say which prompts; give one of them")
    if (written := file or name) is None:
        raise InputError(f"{args.analysis} needs {flag} FILE or --task TASK")
    return written


def _prompts(parameter: Parameter, args: argparse.Namespace, session: Session, model: Any) -> Any:
    """Prompts of the kind the analysis takes."""
    written = _written_prompts(parameter, args)
    found = session.prompts(written, model, args.prompts_n, args.prompts_seed)
    if "PromptPairs" not in parameter.names:
        return getattr(found, "clean", found)
    if "Prompts" not in parameter.names and not hasattr(found, "corrupt"):
        raise InputError(f"{args.analysis} needs prompts in clean/corrupt pairs, and {written} has single ones")
    return found


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


def replay(args: argparse.Namespace) -> int:
    """`interp replay`."""
    from interp import store
    from interp.cli.parsers import parse

    old = store.load(args.folder)
    words = [w for w in store.replay(args.folder) if not any(getattr(args, side) and w.startswith(f"--{side}=") for side in SIDES)]
    words += [f"--{side}={text}" for side in SIDES if (text := getattr(args, side))]
    say(shlex.join(words))
    again = parse(words[1:])
    again.trust_remote_code = args.trust_remote_code
    of = signature(again.analysis)
    _check_inputs(of, again)
    new = _stamped(find(of.name)(*_inputs(of, again), **_settings(of, again)), of, again)
    if args.out is not None:
        say(f"saved: {store.save(new, Path(args.out) / 'results')}")
    say(new.summary())
    return _agreement(old, new)


def _agreement(old: Result, new: Result) -> int:
    """Say whether two results have the same numbers; 1 where they have not."""
    import torch

    from interp.result_files import encode

    if old.identity != new.identity:
        say("not the same computation: the weights, the data or the version are others now")
        return 1
    (values, tensors), (others, again) = encode(old), encode(new)
    worst = 0.0
    for name, tensor in tensors.items():
        if tensor.shape != again[name].shape or not torch.equal(tensor.isnan(), again[name].isnan()):
            say(f"other numbers: {name} has another shape, or NaN in other places")
            return 1
        worst = max(
            [worst, *(tensor.double() - again[name].double()).abs().nan_to_num(0.0).flatten().max()[None].tolist()]
            if tensor.numel()
            else [worst]
        )
    if worst == 0 and values == others:
        say("the same numbers, to the last bit")
        return 0
    say(f"nearly the same numbers: the largest difference is {worst:.3g}" if worst else "the same tensors; other values differ")
    return 0 if worst else 1


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
    for name in organisms.names():
        mark = " (the base that `interp compare` takes)" if name == base else " (the tuned one it takes)" if name == tuned else ""
        say(f"{name}{mark}\n  {_first_sentence(organisms.card(name))}")
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

    def log(step: int, losses: dict[str, float]) -> None:
        if step % 100 == 0:
            say(f"step {step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))

    say(f"saved: {recipes.train(args.name, out, args.steps, log)}")
    return 0
