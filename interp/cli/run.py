"""`interp run` and `interp replay`: from the words of a command line to the call of one analysis."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.analyses import find
from interp.circuit import Circuit
from interp.cli.signatures import MODELS, PROMPTS, Parameter, Signature, signature
from interp.cli.values import convert
from interp.errors import InputError
from interp.inputs import Loading, Session, checked_prompts, stamp
from interp.request import check_writable

if TYPE_CHECKING:
    from interp.results import Result

SIDES = ("model", "base", "tuned")


def loading(args: argparse.Namespace) -> Loading:
    """How the flags say that checkpoints are loaded."""
    return Loading(args.dtype, args.device, args.bos, args.trust_remote_code)


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
        print(f"{store.load(folder).summary()}\nalready there: {folder}")
        return 0
    with store.keeping(root):
        result = _stamped(function(*inputs, **settings), of, args)
        saved = store.save(result, root)
    print(f"{result.summary()}\nsaved: {saved}")
    return 0


def _stamped(result: Result, of: Signature, args: argparse.Namespace) -> Result:
    """The result with what was written for its inputs."""
    models = {side: text for side in SIDES if (text := getattr(args, side, None)) is not None}
    files = {p.name: text for p in of.of_kind(*PROMPTS, "Circuit") if (text := getattr(args, f"input_{p.name}")) is not None}
    counts = {p.name: getattr(args, f"n_{p.name}", None) for p in of.of_kind(*PROMPTS)}
    return stamp(result, loading(args), models, adapter=getattr(args, "adapter", None), prompts=files, n=counts)


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
            if (prompts := _written_prompts(parameter, args)) is not None:
                checked_prompts(prompts)
        elif (written := getattr(args, f"input_{parameter.name}")) is None:
            if parameter.default is None:
                raise InputError(f"{of.name} needs --{parameter.name.replace('_', '-')}")
        elif "Task" in parameter.names:
            from interp.tasks import task

            task(written)
        elif "Circuit" in parameter.names:
            circuit(written)


def circuit(written: str) -> Circuit:
    """A circuit from its file, or from a saved result that found one: ``DIR``, or ``DIR:base`` for a model of a pair.

    Raises:
        InputError: neither is there, or the result finds no circuit or has no such model.
    """
    from interp import store

    start, _, end = written.rpartition(":")
    folder, side = (start, end) if start and not Path(written).exists() else (written, None)
    if not Path(folder).is_dir():
        return Circuit.load(written)
    result = store.load(folder)
    found: Any = getattr(result, "circuit", None)
    made: Any = found(side) if callable(found) else found
    if not isinstance(made, Circuit):
        raise InputError(f"{folder} is a result of {result.meta.analysis}, which has no circuit to take; one in Python is kept with save")
    if side is not None and not callable(found):
        raise InputError(f"the circuit in {folder} is that of one model; write {folder} without {side}")
    return made


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
            read = task if "Task" in parameter.names else circuit if "Circuit" in parameter.names else store.load
            made.append(read(written))
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


def _written_prompts(parameter: Parameter, args: argparse.Namespace) -> str | None:
    """What was written for prompts; None where none are needed."""
    file: str | None = getattr(args, f"input_{parameter.name}")
    name: str | None = getattr(args, "prompts_task", None) if parameter.name == "prompts" else None
    flag = f"--{parameter.name.replace('_', '-')}"
    if file is not None and name is not None:
        raise InputError(f"{flag} and --task both say which prompts; give one of them")
    if (written := file or name) is None and parameter.default is None:
        raise InputError(f"{args.analysis} needs {flag} FILE or {'--task' if parameter.name == 'prompts' else flag} TASK")
    return written


def _prompts(parameter: Parameter, args: argparse.Namespace, session: Session, model: Any) -> Any:
    """Prompts of the kind the analysis takes."""
    if (written := _written_prompts(parameter, args)) is None:
        return None
    n, seed = getattr(args, f"n_{parameter.name}", None), getattr(args, f"seed_{parameter.name}", 0)
    found = session.prompts(written, model, n, seed)
    if "PromptPairs" not in parameter.names:
        return getattr(found, "clean", found)
    if "Prompts" not in parameter.names and not hasattr(found, "corrupt"):
        raise InputError(f"{args.analysis} needs prompts in clean/corrupt pairs, and {written} has single ones")
    return found


def replay(args: argparse.Namespace) -> int:
    """`interp replay`."""
    from interp import store
    from interp.cli.parsers import parse

    old = store.load(args.folder)
    words = [w for w in store.replay(args.folder) if not any(getattr(args, side) and w.startswith(f"--{side}=") for side in SIDES)]
    words += [f"--{side}={text}" for side in SIDES if (text := getattr(args, side))]
    words = [_placed(word, [given["text"] for given in old.meta.inputs], Path(args.folder)) for word in words]
    print(shlex.join(words), flush=True)
    again = parse(words[1:])
    again.trust_remote_code = args.trust_remote_code
    of = signature(again.analysis)
    _check_inputs(of, again)
    new = _stamped(find(of.name)(*_inputs(of, again), **_settings(of, again)), of, again)
    if args.out is not None:
        print(f"saved: {store.save(new, Path(args.out) / 'results')}")
    print(new.summary())
    return _agreement(old, new)


def _placed(word: str, texts: Sequence[str], folder: Path) -> str:
    """A word of a command, where a file that it names is not here but beside the results that the folder is in."""
    flag, _, text = word.partition("=")
    if not text or text not in texts or Path(text).is_absolute():
        return word
    top = folder.resolve().parents[2:3]  # DIR of DIR/results/ANALYSIS/IDENTITY: there most commands are given
    name = text if Path(text).suffix or ":" not in text else text.rpartition(":")[0]  # DIR:base
    there = [place for place in top if (place / name).exists()]
    return f"{flag}={there[0] / text}" if there and not Path(name).exists() else word


def _agreement(old: Result, new: Result) -> int:
    """Say whether two results have the same numbers; 1 where they have not."""
    import torch

    from interp.result_files import encode

    if old.identity != new.identity:
        print("not the same computation: the weights, the data or the version are others now")
        return 1
    (values, tensors), (others, again) = encode(old), encode(new)
    worst = 0.0
    for name, tensor in tensors.items():
        if tensor.shape != again[name].shape or not torch.equal(tensor.isnan(), again[name].isnan()):
            print(f"other numbers: {name} has another shape, or NaN in other places")
            return 1
        worst = max(
            [worst, *(tensor.double() - again[name].double()).abs().nan_to_num(0.0).flatten().max()[None].tolist()]
            if tensor.numel()
            else [worst]
        )
    if worst == 0 and values == others:
        print("the same numbers, to the last bit")
        return 0
    print(f"nearly the same numbers: the largest difference is {worst:.3g}" if worst else "the same tensors; other values differ")
    return 0 if worst else 1
