"""Fixtures every test file may use, and the isolation of one test from the next."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import HealthCheck, settings

# The same examples on every machine: a property that fails, fails for everyone.
settings.register_profile(
    "cradle",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("cradle")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _isolated():
    """Give each test the same torch seed and an empty global parameter store of Pyro."""
    import pyro
    import torch

    torch.manual_seed(0)
    pyro.clear_param_store()
    return


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts alike in every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def screens() -> Path:
    """Folder with the shared real screens; tests that ask for it are skipped where it is absent."""
    folder = Path(os.environ.get("CRADLE_SCREENS", ROOT.parent / "shared" / "data"))
    if not any(folder.glob("*.h5ad")):
        pytest.skip(f"no real screens in {folder} (set CRADLE_SCREENS)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu on a machine without CUDA."""
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
