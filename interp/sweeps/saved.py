"""What long work has finished on disk, from which an interrupted run goes on: cells of sweeps, or tensors by name."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import InputError
from interp.metrics import Reader
from interp.progress import unfinished, unfinished_file
from interp.sweeps.patches import Patch, Source

if TYPE_CHECKING:
    from interp.models import Batch, HookedModel

EVERY = 20.0
"""Seconds between two saves."""

_LEAST = 2.0  # seconds that a sweep takes for its cells to be kept until the work around it is done


@dataclass(eq=False)
class Progress:
    """What a sweep has found so far.

    Attributes:
        values: the metric, [patch prompt]; the baseline where nothing was computed, once a prompt was begun with.
        done: which cells are final, [patch prompt].
        file: where it is saved, or None.
        identity: digest of everything the values depend on.
        why: why the plain way is taken, or "".
    """

    values: Tensor
    done: Tensor
    file: Path | None = None
    identity: str = ""
    why: str = ""
    _begun: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    def begin(self, prompts: Sequence[int], base: Tensor) -> None:
        """The values of some prompts without a patch, for all cells of theirs that nothing was found for yet."""
        some = list(prompts)
        self.values[:, some] = torch.where(self.done[:, some], self.values[:, some], base.to(self.values))

    def put(self, patch: Tensor | int, prompt: Tensor | slice, values: Tensor) -> None:
        """Add finished cells; saves when it is time."""
        self.values[patch, prompt] = values.to(self.values)
        self.done[patch, prompt] = True
        if self.file is not None and time.monotonic() - self._saved >= EVERY:
            self._write()

    def _write(self) -> None:
        assert self.file is not None
        tensors = {"values": self.values.contiguous(), "done": self.done.contiguous()}
        _write(self.file, tensors, {"identity": self.identity, "why": self.why})
        self._saved = time.monotonic()

    def give_up(self, why: str, prompts: Sequence[int]) -> None:
        """From now on the plain way, also for what these prompts have already."""
        self.why = why
        self.done[:, list(prompts)] = False

    def finish(self) -> None:
        """All cells are there. Where all unfinished work is kept, so are they, until the work around is done."""
        if self.file is not None and self.file.parent != unfinished():
            self.file.unlink(missing_ok=True)
        elif self.file is not None and time.monotonic() - self._begun >= min(EVERY, _LEAST):
            self._write()  # other sweeps may follow, and be interrupted


class Remembered:
    """Tensors that long work has found, by name; those of an interrupted run of the same work are there from the start.

    Attributes:
        found: the tensors; add with ``put``.
    """

    def __init__(self, kind: str, identity: Callable[[], Sequence[Any]]) -> None:
        """Looks where unfinished work is kept, if anywhere.

        Args:
            kind: of the work, a word for the file's name.
            identity: everything that the tensors depend on, as JSON; asked for only where work is kept.
        """
        self.found: dict[str, Tensor] = {}
        self.file: Path | None = None
        self._saved = time.monotonic()
        if unfinished() is None:
            return
        self.file = unfinished_file(f"{kind}-{hashlib.sha256(json.dumps(list(identity())).encode()).hexdigest()[:32]}.safetensors")
        if self.file is not None and self.file.exists():
            try:
                self.found = load_file(self.file)
            except (SafetensorError, OSError) as e:
                raise InputError(f"{self.file} is no unfinished work: {e}; remove it to begin anew") from e

    def put(self, found: Mapping[str, Tensor]) -> None:
        """Add some; saves when it is time."""
        if self.file is None:
            return
        self.found |= {name: x.detach().cpu().contiguous() for name, x in found.items()}
        if time.monotonic() - self._saved >= EVERY:
            _write(self.file, self.found, None)
            self._saved = time.monotonic()


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    """Whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    save_file(tensors, draft, metadata=metadata)
    os.replace(draft, file)


def progress_of(size: tuple[int, int], folder: str | Path | None, identity: Sequence[Any]) -> Progress:
    """An empty one, or what an interrupted sweep left in a folder; by default in the one where unfinished work is kept.

    Raises:
        InputError: the folder holds another sweep, or cannot be written.
    """
    values, done = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
    if folder is None and unfinished() is None:
        return Progress(values, done)
    digest = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()
    if folder is not None:
        file = Path(folder) / "sweep.safetensors"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"{folder} cannot be written: {e.strerror}") from e
    else:
        found = unfinished_file(f"sweep-{digest[:32]}.safetensors")
        assert found is not None
        file = found
    if not file.exists():
        return Progress(values, done, file, digest)
    try:
        with safe_open(str(file), framework="pt") as held:
            told = held.metadata() or {}
            kept = held.get_tensor("values"), held.get_tensor("done")
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file} is no unfinished sweep: {e}") from e
    if told.get("identity") != digest:
        raise InputError(
            f"{file.parent} holds an unfinished sweep of something else (other model, prompts, patches or metric); choose another"
        )
    return Progress(*kept, file, digest, told.get("why", ""))


def identity_of(model: HookedModel, batch: Batch, patches: Sequence[Patch], source: Source, reader: Reader) -> list[Any]:
    """Everything the values of a sweep depend on, as JSON."""

    def of_values(values: Mapping[Any, Tensor]) -> list[list[str]]:
        return [[str(site), digest(value)] for site, value in values.items()]

    return [
        identity_of_run(model, batch),
        identity_of_run(*source) if isinstance(source, tuple) else of_values(source),
        [of_values(p) if isinstance(p, Mapping) else [str(s) for s in p] for p in patches],
        identity_of_metric(reader),
    ]


def identity_of_run(model: HookedModel, batch: Batch) -> list[Any]:
    """Everything that the logits of prompts depend on, as JSON."""
    # What a patch in force sets is not known here: such a run is equal to no other.
    unknown = sum(len(actions) for _, actions in model._active) - sum(len(edit.activations) for edit in model._edits)
    positions = {name: batch.positions[name] for name in sorted(batch.positions)}
    token = secrets.token_hex(16) if unknown else ""
    return [model.fingerprint, model.active_edits, str(model.dtype), batch.rows(), positions, token]


def identity_of_metric(reader: Reader) -> list[str]:
    """Everything that a metric of logits depends on."""
    return [str(reader.metric), reader.metric.name, *(digest(t) for t in (*vars(reader.targets).values(), reader.columns))]


def digest(t: Tensor | None) -> str:
    """Of a tensor's numbers, shape and dtype; "" of none."""
    if t is None:
        return ""
    flat = t.detach().cpu().flatten().contiguous()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() + str((t.shape, t.dtype)).encode()).hexdigest()
