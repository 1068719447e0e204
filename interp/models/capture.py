"""Activations on disk: a folder of safetensors shards with an index, written resumably and opened lazily."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.errors import InputError
from interp.models.batch import Batch
from interp.models.interventions import Part
from interp.progress import progress
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.running import Running

SHARD_BYTES = 2**26
"""A shard is closed when it reaches this size."""


def capture_bytes(model: Running, batch: Batch, sites: Sequence[Site], dtype: torch.dtype | None = None) -> int:
    """Bytes a capture takes, known beforehand: real tokens only, or one entry per prompt for sites with a position."""
    s = model.shape
    width = {
        "q": s.n_heads * s.d_head,
        "z": s.n_heads * s.d_head,
        "k": s.n_kv_heads * s.d_head,
        "v": s.n_kv_heads * s.d_head,
        "mlp_post": s.d_mlp,
        "result": s.n_heads * s.d_model,
    }
    tokens = int(batch.lengths.sum())
    total = 0
    for site in sites:
        if site.component == "pattern":
            per = batch.ids.shape[1] * (1 if site.head is not None else s.n_heads)
        else:
            head = s.d_model if site.component == "result" else s.d_head
            per = head if site.head is not None else width.get(site.component, s.d_model)
        total += per * (tokens if site.position is None else sum(len(p) for p in batch.at(site.position)))
    return total * (dtype or model.dtype).itemsize


@dataclass(frozen=True, eq=False)
class Capture:
    """A folder of captured activations.

    Attributes:
        path: the folder.
        sites: what it holds.
        lengths: tokens per prompt; a site without a position has one row per real token, prompt after prompt.
        shards: (file, first prompt, one past its last prompt).
        identity: digest of model, edits, prompts, sites and dtype.
    """

    path: Path
    sites: tuple[Site, ...]
    lengths: tuple[int, ...]
    shards: tuple[tuple[str, int, int], ...]
    identity: str

    @classmethod
    def open(cls, path: str | Path) -> Capture:
        """Open a folder; nothing is read yet.

        Raises:
            InputError: no capture there, or one that was interrupted.
        """
        path = Path(path)
        body = _read_index(path)
        if body is None:
            raise InputError(f"{path} holds no capture: index.json is expected")
        found = cls(
            path,
            tuple(map(Site.parse, body["sites"])),
            tuple(body["lengths"]),
            tuple((f, a, b) for f, a, b in body["shards"]),
            body["identity"],
        )
        if lost := [name for name, _, _ in found.shards if not (path / name).is_file()]:
            raise InputError(f"the capture {path} lacks {lost[0]} and {len(lost) - 1} more of the files its index names")
        if not found.complete:
            done = f"prompt {found.shards[-1][2] if found.shards else 0} of {len(found.lengths)}"
            raise InputError(f"the capture {path} was interrupted at {done}; capture again to the same folder to go on")
        return found

    @property
    def complete(self) -> bool:
        """True when every prompt is there."""
        return bool(self.shards) and self.shards[-1][2] == len(self.lengths)

    @property
    def digest(self) -> str:
        """Identity of the captured numbers."""
        return self.identity

    def pieces(self, site: Site | str) -> Iterator[Tensor]:
        """The tensors of a site shard by shard, memory-mapped."""
        site = Site.parse(site)
        if site not in self.sites:
            raise InputError(f"{site} was not captured; {self.path} holds {', '.join(map(str, self.sites))}")
        for name, _, _ in self.shards:
            with safe_open(self.path / name, framework="pt") as shard:
                yield shard.get_tensor(str(site))

    def __getitem__(self, site: Site | str) -> Tensor:
        """All of a site: [token, ...] without a position, else [prompt, ...]."""
        return torch.cat(list(self.pieces(site)))

    def prompt(self, site: Site | str, index: int) -> Tensor:
        """One prompt's rows [pos, ...] of a site without a position; only its shard is opened, and only those rows are read."""
        site = Site.parse(site)
        if site.position is not None:
            raise InputError(f"{site} has one entry per prompt; index capture[site] instead")
        index = range(len(self.lengths))[index]
        for name, first, end in self.shards:
            if first <= index < end:
                start = sum(self.lengths[first:index])
                with safe_open(self.path / name, framework="pt") as shard:
                    return shard.get_slice(str(site))[start : start + self.lengths[index]]
        raise InputError(f"prompt {index} is in no shard of {self.path}")


def _read_index(path: Path) -> dict[str, Any] | None:
    if not (path / "index.json").is_file():
        return None
    try:
        body = json.loads((path / "index.json").read_text())
        if body["format"] != 1 or not {"identity", "sites", "lengths", "shards"} <= body.keys():
            raise ValueError
        return body
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path / 'index.json'} is not the index of a capture") from e


def _write_index(path: Path, body: dict[str, Any]) -> None:
    draft = path / "index.json.part"
    draft.write_text(json.dumps(body))
    os.replace(draft, path / "index.json")


def capture_to(model: Running, batch: Batch, sites: list[Site], folder: Path, dtype: torch.dtype | None) -> Capture:
    """Stream activations to a folder; goes on after the whole shards of an interrupted run.

    Raises:
        InputError: the folder holds another capture, the disk is too small, or a site cannot be stored by token.
    """
    sites = list(dict.fromkeys(sites))
    for site in sites:
        if site.component == "pattern":
            raise InputError(f"{site} has a row of its own length per prompt and is not streamed to disk; capture patterns in memory")
    bytes_per_token = capture_bytes(model, batch, sites, dtype) / int(batch.lengths.sum())
    # What a patch sets is not known here, so that a capture under one is equal to no other and is never gone on with.
    patches = sum(len(actions) for _, actions in model._active) - sum(len(edit.activations) for edit in model._edits)
    identity = hashlib.sha256(
        json.dumps(
            [
                model.fingerprint,
                model.active_edits,
                batch.rows(),
                {k: batch.positions[k] for k in sorted(batch.positions)},
                list(map(str, sites)),
                [str(model.dtype), str(dtype or model.dtype)],
                secrets.token_hex(16) if patches else "",
            ]
        ).encode()
    ).hexdigest()
    body = _read_index(folder)
    if body is not None and body["identity"] != identity:
        other = "other model, edits, patches, prompts, sites or dtype"
        raise InputError(f"{folder} holds a capture of something else ({other}); choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if body is None:
            body = {"format": 1, "identity": identity, "sites": list(map(str, sites)), "lengths": batch.lengths.tolist(), "shards": []}
            _write_index(folder, body)
    except OSError as e:
        raise InputError(f"{folder} cannot be written: {e.strerror}") from e
    start = body["shards"][-1][2] if body["shards"] else 0
    need = int(bytes_per_token * int(batch.lengths[start:].sum()))
    if need > (free := shutil.disk_usage(folder).free):
        sizes = f"takes another {need / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free"
        raise InputError(f"the capture {sizes}; capture fewer sites, or as dtype=torch.float16")
    chunks = _chunks(batch, start, bytes_per_token)
    for first, end in progress(chunks, f"capture {need / 2**20:.0f} MiB", total=len(chunks), unit="shard"):
        shard = _shard(model, batch, first, end, sites, dtype)
        name = f"shard-{len(body['shards']):05d}.safetensors"
        save_file(shard, folder / (name + ".part"))
        os.replace(folder / (name + ".part"), folder / name)
        body["shards"].append([name, first, end])
        _write_index(folder, body)
    return Capture.open(folder)


def _chunks(batch: Batch, start: int, bytes_per_token: float) -> list[tuple[int, int]]:
    """Prompts per shard."""
    found, first, size = [], start, 0.0
    lengths = batch.lengths.tolist()
    for i in range(start, len(lengths)):
        size += lengths[i] * bytes_per_token
        if size >= SHARD_BYTES or i == len(lengths) - 1:
            found.append((first, i + 1))
            first, size = i + 1, 0.0
    return found


def narrowed(x: Tensor, dtype: torch.dtype | None, site: Site) -> Tensor:
    """The activations at a site in the dtype they are kept in.

    Raises:
        InputError: some are too large for it and would become infinite.
    """
    kept = x if dtype is None else x.to(dtype)
    if kept.dtype != x.dtype and bool((kept.isinf() & x.isfinite()).any()):
        largest = float(x[x.isfinite()].abs().max())
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"{site} has activations up to {largest:.4g}, too large for {name}; keep them as bfloat16 or float32")
    return kept


def _shard(model: Running, batch: Batch, first: int, end: int, sites: list[Site], dtype: torch.dtype | None) -> dict[str, Tensor]:
    some = batch.select(range(first, end))
    lengths = some.lengths.tolist()
    starts = [0, *accumulate(lengths)]
    out: dict[str, Tensor] = {}

    def run(part: Part) -> dict[Site, Tensor]:
        # Interventions see the rows of the whole batch.
        return model.read(replace(part, rows=part.rows + first, total=len(batch), width=batch.ids.shape[1]), sites)

    for part, got in model.each(some, model._bytes_per_token(), run):
        for site, x in got.items():
            kept = narrowed(x, dtype, site).cpu()
            if site.position is not None:
                target = out.setdefault(str(site), kept.new_zeros((len(lengths), *kept.shape[1:])))
                target[part.rows] = kept
                continue
            target = out.setdefault(str(site), kept.new_zeros((sum(lengths), *kept.shape[2:])))
            for row, local in zip(part.rows.tolist(), kept, strict=True):
                target[starts[row] : starts[row] + lengths[row]] = local[: lengths[row]]
    return {name: t.contiguous() for name, t in out.items()}
