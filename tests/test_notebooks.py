"""The notebooks run from top to bottom in a fresh kernel, and no output of them lies in git."""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SECONDS = 60
LONG = (
    "01_ioi_from_scratch",
    "03_one_circuit_two_tasks",
    "04_did_tuning_build_a_new_circuit",
    "05_channels_between_layers",
    "06_lora_or_full_fine_tuning",
    "07_memorisation_in_flat_directions",
)
"""Searches, channels and curvature: 20 seconds to half a minute each."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.full) if path.stem in LONG else path for path in NOTEBOOKS], ids=lambda path: path.stem
)
def test_runs_in_a_fresh_kernel(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tests run beside each other
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    start = time.monotonic()
    client.execute()  # raises on the first cell that fails, with its traceback
    assert time.monotonic() - start < SECONDS
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    silent = [cell.source for cell in code if not cell.outputs]
    assert silent == [], f"cells that show nothing: {silent}"
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr" and "Warning" in o.text]


def test_there_is_a_tour():
    assert [path.name for path in NOTEBOOKS][:1] == ["00_tour.ipynb"]
