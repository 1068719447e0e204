"""Files that ship with the package: in the wheel under ``interp/data``, in a clone under ``data``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def data_path(*parts: str) -> Path:
    """Path of a shipped file or folder; it need not exist."""
    packaged = Path(str(files("interp"))) / "data"
    root = packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "data"
    return root.joinpath(*parts)
