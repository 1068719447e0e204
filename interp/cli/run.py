"""`interp run` and `interp replay`: from the words of a command line to the call of one analysis."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.analyses import find
from interp.circuit import Circuit, circuit_of
from interp.cli.signatures import MODELS, PROMPTS, Parameter, Signature, signature
from interp.cli.values import convert
from interp.errors import InputError
from interp.inputs import Loading, Session, checked_prompts, resolved, stamp
from interp.names import AND
from interp.request import check_writable

if TYPE_CHECKING:
    from interp.results import Meta, Result

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
    files = {p.name: text for p in of.of_kind(*PROMPTS, "Circuit", "Factors") if (text := getattr(args, f"input_{p.name}")) is not None}
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
        elif "Factors" in parameter.names:
            factors(written)


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
    if not callable(found) and not isinstance(found, Circuit):
        raise InputError(f"{folder} is a result of {result.meta.analysis}, which has no circuit to take; one in Python is kept with save")
    if side is not None and not callable(found):
        raise InputError(f"the circuit in {folder} is that of one model; write {folder} without {side}")
    return circuit_of(result, folder, side)


def factors(written: str) -> Any:
    """Factors from their folder.

    Raises:
        InputError: there are none.
    """
    from interp.models.factors import Factors

    return Factors.open(written)


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
            readers = {"Task": task, "Circuit": circuit, "Factors": factors}
            read = next((reader for kind, reader in readers.items() if kind in parameter.names), store.load)
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
    places = {_flag(given["parameter"]): given for given in old.meta.inputs if given["text"]}
    words = [_placed(word, places, Path(args.folder)) for word in words]
    print(shlex.join(words), flush=True)
    again = parse(words[1:])
    again.trust_remote_code = args.trust_remote_code
    of = signature(again.analysis)
    _check_inputs(of, again)
    function, inputs, settings = find(of.name), _inputs(of, again), _settings(of, again)
    _check_unchanged(old, function.describe(*inputs, **settings), words, args.folder)
    new = _stamped(function(*inputs, **settings), of, again)
    if args.out is not None:
        print(f"saved: {store.save(new, Path(args.out) / 'results')}")
    print(new.summary())
    return _agreement(old, new)


def _flag(parameter: str) -> str:
    return f"--{parameter.replace('_', '-')}"


def _placed(word: str, named: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """A word of a command; where it names a file that is not here, with the place it was in, or that beside the results of the folder."""
    flag, _, text = word.partition("=")
    if flag not in named or text != named[flag]["text"]:
        return word
    kept = named[flag].get("path")
    if isinstance(kept, str) and resolved(text) != kept and resolved(kept) == kept and _is_there(kept):
        return f"{flag}={kept}"
    top = folder.resolve().parents[2:3]  # DIR of DIR/results/ANALYSIS/IDENTITY: there many commands are given
    there = [place for place in top if _is_there(str(place / text))]
    return f"{flag}={there[0] / text}" if there and not Path(text).is_absolute() and not _is_there(text) else word


def _is_there(text: str) -> bool:
    """Whether the files that a text names, as ``FILE``, ``DIR:base`` or ``FILE + ioi``, are there; true where it names none."""
    parts = [text] if Path(text).exists() else text.split(AND)
    names = [part if Path(part).exists() or ":" not in part else part.rpartition(":")[0] for part in parts]
    return all(Path(name).exists() for name in names if len(parts) == 1 or "/" in name or Path(name).suffix)


_OTHERS = {"Circuit": "another circuit", "Prompts": "other prompts", "PromptPairs": "other prompts", "Factors": "other factors"}


def _check_unchanged(old: Result, now: Meta, words: Sequence[str], folder: str) -> None:
    """Refuse files that have changed since. Other models are no reason: what they read in a file may differ, and that is said later.

    Raises:
        InputError: a file or folder that the result names holds something else now.
    """
    if [m["fingerprint"] for m in old.meta.models] != [m["fingerprint"] for m in now.models]:
        return
    found = {given["parameter"]: given["digest"] for given in now.inputs}
    written = {flag: text for flag, _, text in (word.partition("=") for word in words)}
    for given in old.meta.inputs:
        place = written.get(_flag(given["parameter"]), "")
        file = place and not given.get("task") and (given.get("path") or resolved(place) != place or Path(place).exists())
        if file and found.get(given["parameter"]) != given["digest"]:
            raise InputError(f"{place} holds {_OTHERS.get(given['kind'], 'something else')} now than the result {folder} was made from")


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
