"""Kronecker factors of the curvature on disk: a folder of safetensors with an index, opened lazily.

For a matrix that acts as ``y = x @ W``, A is the mean of the outer products of its inputs x over positions, G that of the
gradients of the loss by its outputs y; A kron G stands for the curvature of the loss in W. ``interp.models.kfac`` collects them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.errors import InputError
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.running import Running

FORMAT = 1
_KEYS = ("fingerprint", "n", "divisor", "digest", "meta", "sites", "complete")


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors of a model's matrices; a matrix is read when it is asked for.

    Attributes:
        path: the folder.
        sites: the weights that it holds factors of, in the order of the model.
        n: positions over which the means go.
        fingerprint: of the model they belong to.
        meta: how they were made: ``model`` (its name), ``edits`` (digests of those in force), ``labels``, ``seed``, ``prompts`` (how
            many), ``prompts_digest``, ``dtype``, ...
        digest: identity of the numbers.
    """

    path: Path
    sites: tuple[Site, ...]
    n: int
    fingerprint: str
    meta: dict[str, Any]
    digest: str
    _divisor: int
    _places: Mapping[Site, Mapping[str, str]]

    @classmethod
    def open(cls, folder: str | Path) -> Factors:
        """Open a folder; no matrix is read yet.

        Raises:
            InputError: no factors there, or unfinished ones; no path.
        """
        path = folder_path(folder)
        body = read_index(path)
        if body is None:
            what = "is a file" if path.is_file() else "holds no factors: index.json is expected" if path.exists() else "is not there"
            raise InputError(f"factors are a folder that kfac_factors (`interp factors`) wrote, but {path} {what}")
        if not body["complete"]:
            raise InputError(f"collecting the factors in {path} was interrupted; collect them again to the same folder to go on")
        places = {Site.parse(site): place for site, place in body["sites"].items()}
        if lost := sorted({p["file"] for p in places.values() if not (path / p["file"]).is_file()}):
            raise InputError(f"the factors {path} lack {lost[0]}, which their index names")
        return cls(path, tuple(places), body["n"], body["fingerprint"], body["meta"], body["digest"], body["divisor"], places)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        factors: Mapping[Site | str, tuple[Tensor, Tensor]],
        *,
        n: int,
        fingerprint: str,
        meta: Mapping[str, Any] | None = None,
    ) -> Factors:
        """Write factors that were made elsewhere; one and the same tensor given as A of several sites is stored once.

        Args:
            folder: a new or empty one.
            factors: site -> (A [in, in], G [out, out]), means over positions.
            n: positions over which they are means.
            fingerprint: of the model they belong to.
            meta: how they were made.

        Raises:
            InputError: the folder is not empty, or a factor is no symmetric matrix of finite numbers.
        """
        path = folder_path(folder)
        if not factors:
            raise InputError("there are no factors to write")
        if n < 1:
            raise InputError(f"factors are means over positions, at least one; n is {n}")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} is not empty; write factors to a new folder")
        tensors: dict[str, Tensor] = {}
        sites: dict[str, dict[str, str]] = {}
        shared: dict[int, str] = {}
        for site, (a, g) in factors.items():
            name = str(Site.parse(site))
            key = shared.setdefault(id(a), name)
            sites[name] = {"A": key, "file": "factors.safetensors"}
            for kind, of, matrix in (("A", key, a), ("G", name, g)):
                tensors |= named_strips(kind, of, cut(_checked(f"{kind} of {name}", matrix)))
        content = hashlib.sha256(json.dumps([fingerprint, n, dict(meta or {}), sites], sort_keys=True).encode())
        for name in sorted(tensors):
            content.update(name.encode() + tensors[name].numpy().tobytes())
        path.mkdir(parents=True, exist_ok=True)
        save(path / "factors.safetensors", tensors)
        body = {"fingerprint": fingerprint, "n": n, "divisor": 1, "digest": content.hexdigest(), "meta": dict(meta or {}), "sites": sites}
        write_index(path, body | {"complete": True})
        return cls.open(path)

    def __repr__(self) -> str:
        """Where, whose, of how many."""
        return f"Factors({self.path}: {len(self.sites)} matrices of {self.meta.get('model', 'a model')}, {self.n} positions)"

    @property
    def source(self) -> str:
        """What the command line takes for them."""
        return str(self.path)

    def A(self, site: Site | str) -> Float[Tensor, "d_in d_in"]:  # noqa: N802  (the name in the literature)
        """The mean of x x^T over positions for the inputs x of a matrix, in float64 on the CPU."""
        found = self._site(site)
        return self._read("A", self._places[found]["A"], found)

    def G(self, site: Site | str) -> Float[Tensor, "d_out d_out"]:  # noqa: N802  (the name in the literature)
        """The mean of g g^T over positions for the gradients g by the outputs of a matrix, in float64 on the CPU."""
        found = self._site(site)
        return self._read("G", str(found), found)

    def shares(self, site: Site | str) -> Site:
        """The site under which A is stored: the same for all that read one input (q, k and v; gate and up)."""
        return Site.parse(self._places[self._site(site)]["A"])

    def _site(self, site: Site | str) -> Site:
        found = Site.parse(site)
        if found not in self._places:
            raise InputError(f"there are no factors of {found} in {self.path}; it has {', '.join(map(str, self.sites))}")
        return found

    def _read(self, kind: str, name: str, site: Site) -> Tensor:
        file = self.path / self._places[site]["file"]
        try:
            with safe_open(file, framework="pt") as held:
                keys, parts = set(held.keys()), []
                while (key := f"{kind} {name}/{len(parts)}") in keys:
                    parts.append(held.get_tensor(key))
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file} cannot be read: {e}") from e
        if not parts:
            raise InputError(f"{file} lacks {kind} of {name}")
        return whole(parts).div_(self._divisor)

    def check(self, model: Running) -> None:
        """Refuse another model than the one they were collected from.

        Raises:
            InputError: other weights, or other edits in force.
        """
        told = self.meta.get("model", "another model")
        if model.fingerprint != self.fingerprint:
            name = getattr(model, "name", "this model")
            raise InputError(f"the factors {self.path} belong to {told}, whose weights are not those of {name}; collect those of {name}")
        if list(model.active_edits) != (then := list(self.meta.get("edits", []))):
            now = f"{len(model.active_edits)} edits are in force now"
            raise InputError(f"the factors {self.path} were collected with {len(then)} edits in force, and {now} (or others)")


def _checked(name: str, matrix: Tensor) -> Tensor:
    m = matrix.detach().double().cpu()
    if m.ndim != 2 or m.shape[0] != m.shape[1]:
        raise InputError(f"{name} must be a square matrix, but its shape is {list(m.shape)}")
    if not bool(m.isfinite().all()):
        raise InputError(f"{name} has entries that are not finite")
    if float((m - m.T).abs().max()) > 1e-5 * float(m.abs().max()):
        raise InputError(f"{name} is not symmetric")
    return m


# ------------------------------------------------------------------------------------- layout
#
# A symmetric matrix is kept as strips of its lower triangle: rows first to last of columns 0 to last. That is little more than
# half of it, in memory, on disk, and of the work of adding to it.

_STRIPS, _LEAST = 8, 128


def strip_rows(size: int) -> list[tuple[int, int]]:
    """First row, and one past the last, of every strip of a symmetric matrix."""
    height = max(_LEAST, -(-size // _STRIPS))
    return [(at, min(at + height, size)) for at in range(0, size, height)]


def cut(matrix: Tensor) -> list[Tensor]:
    """The strips of a symmetric matrix."""
    return [matrix[first:last, :last].contiguous() for first, last in strip_rows(len(matrix))]


def whole(strips: Sequence[Tensor]) -> Tensor:
    """The symmetric matrix of strips; where both sides of the diagonal were summed, the mean of the two."""
    size = strips[-1].shape[1]
    out = strips[0].new_empty(size, size)
    for strip in strips:
        last = strip.shape[1]
        first = last - strip.shape[0]
        out[first:last, :last] = strip
        out[:last, first:last] = strip.T
        out[first:last, first:last] = (strip[:, first:] + strip[:, first:].T) / 2
    return out


def named_strips(kind: str, name: str, strips: Iterable[Tensor]) -> dict[str, Tensor]:
    """Strips as they are called in files."""
    return {f"{kind} {name}/{i}": strip for i, strip in enumerate(strips)}


def save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Whole, or not at all."""
    draft = file.with_suffix(".part")
    save_file(dict(tensors), draft)
    os.replace(draft, file)


def folder_path(folder: str | Path) -> Path:
    """Where factors are.

    Raises:
        InputError: that is no path.
    """
    if not isinstance(folder, str | os.PathLike):
        raise InputError(f"a folder of factors is given by its path, such as 'results/factors', but {folder!r} came")
    return Path(folder)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder; None where there is none.

    Raises:
        InputError: it is the index of something else.
    """
    file = folder / "index.json"
    if not file.is_file():
        return None
    try:
        body = json.loads(file.read_text())
        if body["format"] != FORMAT or body["kind"] != "factors" or any(key not in body for key in _KEYS):
            raise ValueError
        return body
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{file} is not the index of factors") from e


def write_index(folder: Path, body: Mapping[str, Any]) -> None:
    """Put an index in place."""
    draft = folder / "index.json.part"
    draft.write_text(json.dumps({"format": FORMAT, "kind": "factors", **body}))
    os.replace(draft, folder / "index.json")
