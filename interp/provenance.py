"""Where a result comes from: read off the arguments of a call, stamped on what the call returns."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

import torch

from interp.circuit import circuit_of
from interp.data_files import data_path
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.results import Result

P = ParamSpec("P")
R = TypeVar("R", bound="Result")
R_co = TypeVar("R_co", bound="Result", covariant=True)

USER_FUNCTION = "user function"
"""How the text of a setting begins that is a function of the user's; nothing can be replayed from that."""

_LIBRARIES = ("interp", "torch", "transformers", "transformer-lens", "safetensors", "numpy")


@dataclass(frozen=True, eq=False, kw_only=True)
class Meta:
    """Where a result comes from.

    Everything but ``notes`` and the names of the models makes up the identity: the same analysis of the
    same weights, data, settings and seed has the same identity on every machine.

    Attributes:
        analysis: name of the function.
        version: its version number.
        models: one entry per model: ``side`` (base, tuned or model), ``name``, ``fingerprint``, ``dtype``,
            ``edits`` (digests of the active edits), ``text`` (what to load it from; empty for a model given as
            an object), and ``adapter`` (a folder) where one was applied to a single model.
        inputs: one entry per further positional argument: ``parameter``, ``kind`` (its class), ``digest``,
            ``text`` (what the command line takes for it; empty when it was made in Python), for prompts
            of a task ``task``, ``n`` and ``seed``, for a selection of such prompts ``some_of``, and for a file or folder that
            is not written in full ``path``, where it is.
        settings: the keyword-only arguments, defaults included, as JSON values and text forms.
        seed: the setting ``seed``, or None.
        notes: what does not change the numbers: time (UTC), argv, git, versions, device, seconds, peak_mb (peak memory
            of the process so far: allocated on the GPU if the models are there, resident otherwise),
            models (what is noteworthy about the pair), bos (if the command line said so).
    """

    analysis: str
    version: int
    models: tuple[dict[str, Any], ...] = ()
    inputs: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Digest (sha256, hex) of everything that determines the numbers."""
        return sha256(
            {
                "analysis": self.analysis,
                "version": self.version,
                "models": [{k: m[k] for k in ("side", "fingerprint", "dtype", "edits")} for m in self.models],
                "inputs": [{k: i[k] for k in ("parameter", "digest")} for i in self.inputs],
                "settings": self.settings,
                "seed": self.seed,
            }
        )

    @property
    def user_functions(self) -> tuple[str, ...]:
        """The settings that hold a function of the user's: two of them may look alike here."""
        own = {k: [v for v in _leaves(value) if isinstance(v, str) and v.startswith(USER_FUNCTION)] for k, value in self.settings.items()}
        return tuple(k for k, found in own.items() if found)

    @property
    def obstacles(self) -> tuple[str, ...]:
        """Why the command line cannot repeat this result; empty when it can."""
        found = [f"the setting {name} is a function of the user's" for name in self.user_functions]
        found += [f"the input {i['parameter']} {_made(i)}" for i in self.inputs if not (i["text"] or i.get("task"))]
        found += [f"the {m['side']} model was given as an object" for m in self.models if not m.get("text")]
        found += [f"the {m['side']} model had edits in force" for m in self.models if m["edits"]]
        return tuple(found)

    @property
    def replayable(self) -> bool:
        """Whether ``command`` repeats this result."""
        return not self.obstacles

    def command(self) -> list[str]:
        """The command that repeats the analysis, as words: ``interp run NAME --base=.. --rank=4 --seed=0``.

        Every value is attached with ``=``, so that no value can be read as a flag. Where there are
        ``obstacles`` the words say as much as is known.
        """
        words = ["interp", "run", self.analysis]
        words += [f"--{m['side']}={m.get('text') or m['name']}" for m in self.models]
        words += [f"--adapter={m['adapter']}" for m in self.models if m.get("adapter")]
        dtypes = {m["dtype"] for m in self.models}
        words += [f"--dtype={dtypes.pop()}"] if len(dtypes) == 1 else []
        for given in self.inputs:
            flag = _flag(given["parameter"])
            if given["text"]:
                words.append(f"--{flag}={given['text']}")
                words += [f"--{flag}-n={given['n']}"] if given.get("n") else []
            elif given.get("task"):
                task = "task" if flag == "prompts" else flag  # sets with other names have no flag for tasks of their own
                words += [f"--{task}={given['task']}", f"--{flag}-n={given['n']}", f"--{flag}-seed={given['seed']}"]
        words += [f"--bos={self.notes['bos']}"] if self.notes.get("bos") in ("always", "never") else []
        for name, value in self.settings.items():
            flag = _flag(name)
            words.append((f"--{flag}" if value else f"--no-{flag}") if isinstance(value, bool) else f"--{flag}={setting_text(value)}")
        return words + ([] if self.seed is None else [f"--seed={self.seed}"])


def setting_text(value: Any) -> str:
    """Text of a stored setting for the command line: ``none``, ``4``, ``a,b``."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(setting_text(v) for v in value)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


def sha256(value: Any) -> str:
    """Digest of a JSON value, the same on every machine.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _made(given: Mapping[str, Any]) -> str:
    return f"is a selection from {given['some_of']}, or was changed" if given.get("some_of") else "was made in Python"


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, list | tuple) else [value]


# ------------------------------------------------------------------------------ reading the arguments


def _setting(value: Any, where: str) -> Any:
    """A setting as a JSON value. 1 and 1.0 are the same setting, so whole floats become integers."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return (int(value) if value.is_integer() else value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): _setting(v, where) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [_setting(v, where) for v in value]
    if isinstance(value, AbstractSet):
        return sorted((_setting(v, where) for v in value), key=str)
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if inspect.isroutine(value) or isinstance(value, functools.partial | type):
        return _function_name(value)
    if isinstance(digest := getattr(value, "digest", None), str):
        return f"{type(value).__name__} {digest}"
    if not isinstance(value, torch.Tensor) and type(value).__str__ is not object.__str__:
        return str(value)
    if callable(value):
        return USER_FUNCTION
    what = f"it is a {type(value).__name__}"
    raise InputError(f"the setting {where} must be a plain value, a tuple of them or something with a text form, but {what}")


def _file(value: Any) -> Path | None:
    """The JSON file that a setting names: it is an input, known by what is in it."""
    named = isinstance(value, str | Path) and str(value).endswith(".json")
    return Path(value) if named and Path(value).is_file() else None


def _named(path: Path) -> dict[str, str]:
    """A file as it was written, and where it is."""
    return {"text": str(path)} | ({} if path.is_absolute() else {"path": str(path.resolve())})


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _function_name(function: Any) -> str:
    """Our own functions are known by name, everybody else's are not."""
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
    ours = module.split(".")[0] == "interp" and "<" not in name
    return name if ours and name else f"{USER_FUNCTION} {name}".rstrip()


def _models(value: Any) -> list[tuple[str, Any]] | None:
    """The (side, model) pairs in an argument, None when it holds no model. Looks without loading weights."""
    if callable(getattr(value, "sides", None)):
        return list(value.sides())
    known = all(inspect.getattr_static(value, name, None) is not None for name in ("fingerprint", "active_edits"))
    return [("model", value)] if known else None


def _described_model(side: str, model: Any) -> dict[str, Any]:
    described = {
        "side": side,
        "name": str(model.name),
        "fingerprint": str(model.fingerprint),
        "dtype": str(model.dtype).removeprefix("torch."),
        "edits": [str(digest) for digest in model.active_edits],
        "text": _source(model),
    }
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        return described
    return described | ({"text": str(adapter)} if side == "tuned" else {"adapter": str(adapter)})


def _source(model: Any) -> str:
    """A folder as it was written, else the name: of the Hub, or of a model that ships with the package."""
    checkpoint = getattr(model, "checkpoint", None)
    if checkpoint is None:
        return ""
    path = Path(checkpoint.path)
    shipped = data_path("organisms").resolve() in path.resolve().parents
    return str(path) if path.resolve().name == checkpoint.name and not shipped else str(checkpoint.name)


def _described_input(analysis: str, parameter: str, value: Any) -> dict[str, Any]:
    """Digest and text of a data argument: prompts, a task, a circuit, factors, an earlier result, plain values."""
    digest, source = getattr(value, "digest", None), getattr(value, "source", None)
    worded = isinstance(value, str | int | float | Path) or type(value).__str__ is not object.__str__
    text = source if isinstance(source, str) else str(value) if worded and not isinstance(digest, str) else ""
    described: dict[str, Any] = {"parameter": parameter, "kind": type(value).__name__, "digest": digest, "text": text}
    if text and isinstance(folder := getattr(value, "path", None), Path):
        described |= _named(folder)
    if not isinstance(digest, str):
        if not worded and not isinstance(value, list | tuple | dict):
            raise InputError(f"{analysis} cannot use a {described['kind']} as {parameter}: an input needs a digest, or a text form")
        described["digest"] = sha256([described["kind"], _setting(value, parameter)])
    task, seed = getattr(value, "task", None), getattr(value, "seed", None)
    if isinstance(task, str) and task and isinstance(seed, int):
        described |= {"task": task, "n": len(cast("Any", value)), "seed": seed}
    elif isinstance(task, str) and task and hasattr(value, "seed"):
        described["some_of"] = task
    return described


def _describe(function: Callable[..., Any], version: int, arguments: Mapping[str, Any], settings: frozenset[str]) -> Meta:
    name = function.__name__
    models: list[dict[str, Any]] = []
    inputs: list[dict[str, Any]] = []
    for parameter, value in arguments.items():
        if parameter in settings or value is None:
            continue
        if (found := _models(value)) is not None:
            models += [_described_model(side, model) for side, model in found]
        else:
            inputs.append(_described_input(name, parameter, value))
    files = {k: path for k in settings & arguments.keys() if (path := _file(arguments[k]))}
    inputs += [{"parameter": k, "kind": "file", "digest": _content(path), **_named(path)} for k, path in sorted(files.items())]
    plain = {k: _setting(arguments[k], f"{k} of {name}") for k in arguments if k in settings and k not in files}
    seed = plain.pop("seed", None)
    return Meta(analysis=name, version=version, models=tuple(models), inputs=tuple(inputs), settings=plain, seed=seed)


# ---------------------------------------------------------------------------------------------- notes


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@functools.cache
def _git_commit() -> str | None:
    """Commit of the clone this package runs from, with ``+`` when files differ from it; None outside a clone."""
    git, root = shutil.which("git"), Path(__file__).resolve().parent.parent
    if git is None or not (root / ".git").exists():
        return None

    def ask(*words: str) -> str | None:
        done = subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return commit + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "") if commit else None


def _peak_mb(devices: Sequence[str]) -> float | None:
    if any(d.startswith("cuda") for d in devices) and torch.cuda.is_available():
        return round(sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20, 1)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _notes(arguments: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    devices: list[str] = []
    said: list[str] = []
    for value in arguments.values():
        if (found := _models(value)) is not None:
            # A model that was not needed in memory stays out of it: asking for its device would load it.
            devices += [str(getattr(model, "device", "")) for _, model in found if getattr(model, "loaded", True)]
            said += [str(note) for note in getattr(value, "notes", ())]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(sys.argv),
        "git": _git_commit(),
        "versions": dict(_versions()),
        "device": ", ".join(dict.fromkeys(devices)),
        "seconds": round(seconds, 3),
        "peak_mb": _peak_mb(devices),
        "models": said,
    }


# ------------------------------------------------------------------------------------------ decorator


def _argument(function: str, parameter: inspect.Parameter, value: Any) -> Any:
    """An argument as the analysis takes it: a circuit of the result that found it, and one text or number as a list of one.

    Raises:
        InputError: it is no pair of models, a pair where one model is taken, no circuit or no seed, where that is asked for.
    """
    annotation = str(parameter.annotation).strip("'")
    if annotation == "ModelPair" and not hasattr(value, "tuned"):
        raise InputError(f"{function} compares two models: {parameter.name} is a ModelPair, but {type(value).__name__} came")
    if annotation == "HookedModel" and all(hasattr(value, side) for side in ("base", "tuned")):
        raise InputError(f"{function} takes one model: {parameter.name} is a HookedModel, but a pair came; give its .base or its .tuned")
    if annotation in ("Circuit", "Circuit | None") and not (value is None and parameter.default is None):
        return circuit_of(value, f"the circuit {parameter.name} of {function}".replace("circuit circuit", "circuit"))
    if annotation in _LISTS and isinstance(value, _LISTS[annotation]):
        return (value,)
    if parameter.name == "seed" and annotation == "int" and (isinstance(value, bool) or not isinstance(value, int)):
        raise InputError(f"the seed of {function} is a whole number, but {value!r} came")
    return value


_LISTS: dict[str, type | tuple[type, ...]] = {"tuple[str, ...]": str, "tuple[float, ...]": (int, float), "tuple[int, ...]": int}


class Analysis(Protocol[P, R_co]):
    """A function made by :func:`analysis`."""

    __name__: str
    version: int
    __wrapped__: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Compute the result and stamp its provenance."""
        ...

    def describe(self, *args: P.args, **kwargs: P.kwargs) -> Meta:
        """The provenance (without notes) that a call would have, without computing anything."""
        ...


def analysis(version: int = 1) -> Callable[[Callable[P, R]], Analysis[P, R]]:
    """Make a function an analysis: the result it returns carries where it came from.

    Positional parameters are inputs (models, prompts, tasks, circuits, earlier results), keyword-only ones are
    settings. ``version`` goes up when the numbers change their meaning, so that old results are not mixed in.

    Raises:
        InputError: on a call with an input without a digest or a setting without a text form.
    """

    def decorate(function: Callable[P, R]) -> Analysis[P, R]:
        signature = inspect.signature(function)
        stars = [p for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if stars:
            raise TypeError(f"the analysis {function.__name__} must name each of its parameters, but it takes {stars[0]}")
        settings = frozenset(name for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY)

        def bound(args: Any, kwargs: Any) -> inspect.BoundArguments:
            try:
                found = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            found.apply_defaults()
            for name, value in found.arguments.items():
                found.arguments[name] = _argument(function.__name__, signature.parameters[name], value)
            return found

        def describe(*args: P.args, **kwargs: P.kwargs) -> Meta:
            return _describe(function, version, bound(args, kwargs).arguments, settings)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = bound(args, kwargs)
            meta = _describe(function, version, given.arguments, settings)  # before the call: what it was given
            start = time.perf_counter()
            result = function(*given.args, **given.kwargs)
            meta.notes.update(_notes(given.arguments, time.perf_counter() - start))
            result.check()
            object.__setattr__(result, "meta", meta)
            return result

        call.version = version  # type: ignore[attr-defined]
        call.describe = describe  # type: ignore[attr-defined]
        return cast("Analysis[P, R]", call)

    return decorate
