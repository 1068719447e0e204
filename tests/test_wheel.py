"""The built wheel is whole: code, shipped data, licence, and the command, usable far from the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build once; pip fetches the build backend from the package index."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True)
    (built,) = folder.glob("interp-*.whl")
    return built


def shipped(folder: str) -> set[str]:
    """Every file below a folder of the clone that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", folder]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    return {name for name in listed if name and (ROOT / name).is_file()}


def test_holds_all_code_and_data_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    meta = {name for name in inside if ".dist-info/" in name}
    data = {f"interp/{name}" for name in shipped("data")}
    assert data, "the clone has no data to ship"
    assert inside - meta == shipped("interp") | data
    assert any(name.endswith("licenses/LICENSE") for name in meta)
    assert any(name.endswith("entry_points.txt") for name in meta)


def test_data_is_found_outside_the_clone(wheel: Path, tmp_path: Path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    code = "import interp; from interp.data_files import data_path; print(interp.__file__); print(data_path('organisms'))"
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=environment, check=True, capture_output=True, text=True)
    package, organisms = done.stdout.split()
    assert Path(package).is_relative_to(site)
    assert Path(organisms).is_relative_to(site)
    assert any(Path(organisms).rglob("*.safetensors"))

    models = [sys.executable, "-m", "interp", "models"]
    listed = subprocess.run(models, cwd=elsewhere, env=environment, check=True, capture_output=True, text=True).stdout
    assert all(folder.name in listed for folder in Path(organisms).iterdir() if folder.is_dir())
