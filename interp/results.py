"""What an analysis returns: a frozen value with its provenance.

A result is a frozen dataclass whose tensor fields carry jaxtyping annotations. The annotations are the
documentation, the check of what is stored, and the columns of :meth:`Result.to_frame`::

    @dataclass(frozen=True, eq=False)
    class HeadNormResult(Result):
        norm: Float[Tensor, "layer head"]
        labels: dict[str, tuple[str, ...]]

    @analysis(version=1)
    def head_norm(model: HookedModel, *, squared: bool = False) -> HeadNormResult: ...
"""

from __future__ import annotations

import html
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from interp import result_files
from interp.errors import InputError
from interp.fields import check, tensors_of
from interp.provenance import Analysis, Meta, analysis, sha256

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.stats import Estimate

__all__ = ["Analysis", "Meta", "Result", "analysis"]

R = TypeVar("R", bound="Result")
_CONFIG = {"responsive": True, "displaylogo": False}


class Result:
    """What an analysis returns; a frozen dataclass that holds numbers and no model.

    Subclasses are ``@dataclass(frozen=True, eq=False)`` with fields of these kinds: tensors annotated with
    jaxtyping (CPU; NaN allowed), ``dict[str, Tensor]`` for ragged ones, and JSON values (finite numbers).
    A field ``labels: dict[str, tuple[str, ...]]`` names the entries of an axis that is not simply 0..n-1.
    """

    # None only while the analysis is computing, or for a result built by hand.
    meta: Meta = cast("Meta", None)

    def summary(self) -> str:
        """One sentence: the main number first, its noise beside it."""
        raise NotImplementedError(f"{type(self).__name__} has no summary")

    def plot(self) -> go.Figure:
        """The figure of this result."""
        raise NotImplementedError(f"{type(self).__name__} has no figure")

    def figures(self) -> dict[str, go.Figure]:
        """All figures of this result under their headings, in the order of the report."""
        return {"": self.plot()}

    def html(self) -> str | None:
        """Extra HTML for reports and notebooks, already escaped, or None."""
        return None

    def strongest(self, n: int = 10) -> pd.DataFrame | None:
        """The cells that a reader should look at first, strongest first; None where a result has no such order.

        Reports and notebooks show this table open, under the figures.
        """
        return None

    def main_numbers(self) -> dict[str, dict[str, Estimate]]:
        """What is compared between several tuned checkpoints: name with its unit -> side -> one number with its interval.

        A change has the side ``tuned`` alone; in base it is 0 by definition. Ends that are not known are NaN.
        """
        return {}

    def to_frame(self, per: str | None = None) -> pd.DataFrame:
        """A long table: one row per index of the main axes, one column per tensor on those axes.

        The main axes are those of the first tensor field. Tensors on fewer of these axes are repeated along
        the others; tensors with further axes are left out. Values are means over the prompt axis (NaN
        skipped); ``per="prompt"`` gives every prompt. A labelled axis has its labels as index values; where
        labels repeat (tokens), the index stays an integer and ``<axis>_label`` is added.

        Raises:
            InputError: ``per`` is something else, or this result stores nothing per prompt.
        """
        return _frame(self, per)

    @property
    def identity(self) -> str:
        """Digest (sha256, hex) of what determines this result; see :class:`Meta`.

        Two results with different functions of the user's look alike to their provenance, so their numbers
        go into the digest.

        Raises:
            InputError: the result was built by hand.
        """
        if self.meta is None:
            raise InputError(f"this {type(self).__name__} has no identity: it was built by hand, not returned by an analysis")
        known = self.meta.identity
        return sha256([known, result_files.content_digest(self)]) if self.meta.user_functions else known

    @property
    def key(self) -> str:
        """The first 8 digits of the identity: the name of the folder in a store."""
        return self.identity[:8]

    @property
    def digest(self) -> str:
        """The identity; so a result can be the input of an analysis."""
        return self.identity

    def check(self) -> None:
        """Check the fields against their annotations: kinds, number of axes, one size per axis, labels.

        Raises:
            ValueError: names the field, what was expected and what it holds.
        """
        check(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``result.json`` and ``tensors.safetensors`` into a folder, which appears whole or not at all.

        An earlier result in that folder is replaced.

        Raises:
            InputError: the folder holds something else, or cannot be written.
        """
        return result_files.write(self, Path(folder))

    @classmethod
    def load(cls: type[R], folder: str | os.PathLike[str]) -> R:
        """Read a saved result of this class; ``interp.store.load`` finds the class by itself.

        Raises:
            InputError: no result folder, a damaged one, or one of another kind.
        """
        if cls is Result:
            raise InputError("Result.load needs to know the kind of result; interp.store.load finds it")
        return result_files.restore(cls, result_files.read(folder), Path(folder))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep ``repr`` short: a dataclass would print every tensor."""
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Result.__repr__

    def __repr__(self) -> str:
        """The class and the summary."""
        return f"<{type(self).__name__}: {self.summary()}>"

    def _repr_html_(self) -> str:
        """Summary and figures for any front end; the figures fetch plotly, a copy per output would be 5 MB."""
        drawn = [figure.to_html(full_html=False, include_plotlyjs="cdn", config=_CONFIG) for figure in self.figures().values()]
        return "".join([f"<p>{html.escape(self.summary())}</p>", *drawn, self.html() or ""])

    def _ipython_display_(self) -> None:
        """Summary and figures in Jupyter, which draws figures with its own plotly and fetches nothing."""
        from IPython.display import HTML, display

        display(HTML(f"<p>{html.escape(self.summary())}</p>"))
        for heading, figure in self.figures().items():
            if heading:
                display(HTML(f"<h4>{html.escape(heading)}</h4>"))
            display(figure)
        if (strongest := self.strongest()) is not None:
            display(strongest)
        if extra := self.html():
            display(HTML(extra))


def _frame(result: Result, per: str | None) -> pd.DataFrame:
    import pandas as pd

    if per not in (None, "prompt"):
        raise InputError(f"per must be 'prompt' or nothing, but it is {per!r}")
    columns: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name, (axes, value) in tensors_of(result).items():
        array = value.numpy()
        if per is None and "prompt" in axes:
            array, axes = _mean(array, axes.index("prompt")), tuple(a for a in axes if a != "prompt")
        columns[name] = (axes, array)
    if per == "prompt" and not any("prompt" in axes for axes, _ in columns.values()):
        raise InputError(f"{type(result).__name__} stores nothing per prompt")
    if not columns:
        row = {f.name: getattr(result, f.name) for f in fields(cast("Any", result))}
        return pd.DataFrame([{k: v for k, v in row.items() if v is None or isinstance(v, str | int | float)}])
    wanted = [axes for axes, _ in columns.values() if axes and (per is None or "prompt" in axes)]
    main = wanted[0] if wanted else ()
    shape = next(array.shape for axes, array in columns.values() if axes == main)
    table = _index(main, shape, getattr(result, "labels", None) or {})
    for name, (axes, array) in columns.items():
        if set(axes) <= set(main):
            table[name] = np.broadcast_to(_aligned(array, axes, main), shape).reshape(-1)
    return pd.DataFrame(table)


def _index(axes: tuple[str, ...], shape: tuple[int, ...], labels: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Index columns of a long table; a column of labels beside it where they repeat."""
    table: dict[str, Any] = {}
    for axis, index in zip(axes, np.indices(shape).reshape(len(shape), -1) if shape else (), strict=True):
        names = labels.get(axis)
        unique = names is not None and len(set(names)) == len(names)
        table[axis] = [names[i] for i in index] if names is not None and unique else index
        if names is not None and not unique:
            table[f"{axis}_label"] = [names[i] for i in index]
    return table


def _mean(array: np.ndarray, axis: int) -> np.ndarray:
    """Mean that skips NaN; NaN where everything is, without numpy's warning."""
    array = array.astype(np.float64)
    there = ~np.isnan(array)
    count = there.sum(axis)
    return np.where(count > 0, np.where(there, array, 0.0).sum(axis) / np.maximum(count, 1), np.nan)


def _aligned(array: np.ndarray, axes: tuple[str, ...], target: tuple[str, ...]) -> np.ndarray:
    """View of an array with its axes in the order of ``target``, size 1 where it has none of them."""
    order = [axes.index(a) for a in target if a in axes]
    sizes = [array.shape[axes.index(a)] if a in axes else 1 for a in target]
    return array.transpose(order).reshape(sizes)
