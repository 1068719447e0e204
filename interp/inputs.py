"""From what a user wrote to what an analysis takes: models, prompts, tasks and saved results.

Everything is made once per session, so that the analyses of a comparison share the loaded models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from interp.errors import InputError
from interp.names import AND

if TYPE_CHECKING:
    from interp.models import HookedModel, ModelPair
    from interp.prompts import PromptPairs, Prompts
    from interp.results import Result

T = TypeVar("T")


@dataclass(frozen=True)
class Loading:
    """How checkpoints are loaded; the flags of the command line."""

    dtype: str = "auto"
    device: str = "auto"
    bos: str = "auto"
    trust_remote_code: bool = False

    @property
    def places(self) -> str | tuple[str, ...]:
        """The device, or those of base and tuned: ``cuda:0,cuda:1``."""
        found = tuple(d.strip() for d in self.device.split(","))
        return found[0] if len(found) == 1 else found

    def flags(self) -> list[str]:
        """What to write for the settings that are not the default. Trust is not among them: it is given anew each time."""
        shown = {"dtype": self.dtype, "device": self.device, "bos": self.bos}
        return [f"--{k}={v}" for k, v in shown.items() if v != "auto"]


@dataclass
class Session:
    """Models and prompts by what was written for them, each made once."""

    loading: Loading = field(default_factory=Loading)
    _made: dict[object, Any] = field(default_factory=dict)

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def model(self, what: Any, adapter: str | None = None) -> HookedModel:
        """One model."""
        from interp.models import HookedModel

        how = self.loading
        if isinstance(how.places, tuple):
            raise InputError(f"one model takes one device, not {how.device!r}")

        def load() -> HookedModel:
            return HookedModel.load(
                what,
                adapter=adapter,
                dtype=how.dtype,
                device=how.device,
                bos=how.bos,  # type: ignore[arg-type]
                trust_remote_code=how.trust_remote_code,
            )

        return self._once(("model", _key(what), adapter), load)

    def pair(self, base: Any, tuned: Any) -> ModelPair:
        """Two models; pairs with the same base share it."""
        from interp.models import ModelPair

        def load() -> ModelPair:
            # An adapter's pair may load its base in another dtype, so it does not share.
            first = base if not isinstance(base, str) or _is_adapter(tuned) or len(_listed(self.loading.places)) > 1 else self.model(base)
            return ModelPair.load(
                first,
                tuned,
                dtype=self.loading.dtype,
                device=self.loading.places,  # type: ignore[arg-type]
                bos=self.loading.bos,  # type: ignore[arg-type]
                trust_remote_code=self.loading.trust_remote_code,
            )

        return self._once(("pair", _key(base), _key(tuned)), load)

    def prompts(self, written: str, model: HookedModel | ModelPair, n: int | None = None, seed: int = 0) -> Prompts | PromptPairs:
        """Prompts from a file, or from a task's name: the first ``n``. ``A + B`` mixes several such sets, ``n`` in all.

        Raises:
            InputError: it is neither, or the file cannot be used.
        """
        return self._once(("prompts", written, id(model), n, seed), lambda: _prompts(written, model, n, seed))


def stamp(
    result: Result,
    loading: Loading,
    models: Mapping[str, str],
    *,
    adapter: str | None = None,
    prompts: str | Mapping[str, str] = "",
    n: int | None | Mapping[str, int | None] = None,
) -> Result:
    """Note in a result what was written for its models and prompts, so that its command can be run as it stands.

    Args:
        result: fresh from its analysis; nothing that makes up its identity changes.
        loading: how the models were loaded.
        models: side -> folder, Hub id or organism.
        adapter: what was applied to a single model.
        prompts: file of the prompts, or one for each parameter; a task's prompts know where they come from.
        n: how many of that file's prompts were taken, if not all; or such a number for each parameter.
    """
    for entry in result.meta.models:
        if entry["side"] in models:
            entry["text"] = models[entry["side"]]
        if adapter is not None:
            entry["adapter"] = adapter
    for entry in result.meta.inputs:
        file, count = (x.get(entry["parameter"]) if isinstance(x, Mapping) else x for x in (prompts, n))
        if file and not entry["text"] and not entry.get("task"):
            entry |= {"text": file} | ({} if count is None else {"n": count})
            if (place := resolved(str(file))) != file:
                entry["path"] = place  # so that it is found again from anywhere
    if loading.bos != "auto":
        result.meta.notes["bos"] = loading.bos
    return result


def resolved(written: str) -> str:
    """What was written for prompts, a circuit or factors, with the full paths of the files and results that it names."""

    def full(part: str) -> str:
        name, colon, side = part.rpartition(":")
        for path, rest in ((part, ""), (name, colon + side)):  # DIR:base is the circuit of one model
            place = Path(path).expanduser()
            if path and (place.is_file() or any((place / page).is_file() for page in ("result.json", "index.json"))):
                return f"{place.resolve()}{rest}"
        return part

    return full(written) if AND not in written or Path(written).exists() else AND.join(map(full, written.split(AND)))


def _prompts(written: str, model: Any, n: int | None, seed: int) -> Any:
    from interp.prompts import read_prompts
    from interp.tasks import task

    path = Path(written).expanduser()
    if path.is_file():
        found = read_prompts(path, model)
        return found if n is None else found[:n]
    if len(names := _sets(written)) > 1:
        return _mixed(checked_prompts(written), names, model, n, seed)
    return task(checked_prompts(written)).generate(model, 50 if n is None else n, seed)


def _sets(written: str) -> list[str]:
    """The sets that were written for a mixture; one alone for anything else."""
    return [written] if Path(written).expanduser().is_file() else [part.strip() for part in written.split(AND)]


def _mixed(written: str, names: Sequence[str], model: Any, n: int | None, seed: int) -> Any:
    """Sets of prompts in turn, ``n`` in all, so that the first ones take one more where it does not come out even."""
    from interp.prompts.mixed import mixed

    filed = [name for name in names if Path(name).expanduser().is_file()]
    if filed and seed:
        raise InputError(f"the file {filed[0]} in {written} takes no seed, so the seed of the mixture must stay 0, but it is {seed}")
    shares = [None if n is None else n // len(names) + (i < n % len(names)) for i in range(len(names))]
    taken = [(name, share) for name, share in zip(names, shares, strict=True) if share != 0]
    return mixed({name: _prompts(name, model, share, seed) for name, share in taken}, None if filed else seed)


def checked_prompts(written: str) -> str:
    """What was written for prompts, if it is a file, the text form of a task, or several of these with `` + `` between them.

    Raises:
        InputError: it is neither, or the same twice; nothing has been loaded to find that out.
    """
    from interp.tasks import TASKS, task

    if len(names := _sets(written)) > 1:
        if len(set(names)) < len(names):
            raise InputError(f"{written} names the same set twice")
        for name in names:
            checked_prompts(name)
        return written
    path = Path(written).expanduser()
    if path.is_file():
        return written
    if path.is_dir():
        raise InputError(f"{written} is a folder; prompts come from a file or a task")
    if written.split("(")[0].strip().replace("-", "_") not in TASKS and (path.suffix or "/" in written):
        raise InputError(f"there is no file {written}")
    task(written)
    return written


def _is_adapter(what: object) -> bool:
    from interp.models.adapters import is_adapter

    return isinstance(what, str) and is_adapter(what)


def _key(what: Any) -> object:
    return what if isinstance(what, str) else id(what)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)
