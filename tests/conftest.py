"""Shared by every test: no network, the user's cache left alone, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

# Under test, annotated shapes and types of the inner layers are checked at every call (of results always; where users give wrong
# input on purpose, not); installed before anything of interp is imported.
MODELS = ("running", "editing", "interventions", "generate", "contrast", "changes", "restart", "attribution")
CHECKED = [f"interp.{m}" for m in ("linalg", "stats", "sweeps", *(f"models.{n}" for n in MODELS))]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Fingerprints and checks are remembered in a folder of this run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """No check of annotations, for tests of what is said to a user who gives something else."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
