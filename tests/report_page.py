"""A report of a tiny run, made once for the tests of the page and of the page in a browser."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from anndata import AnnData
from tiny import make_config, make_screen

from cradle_pyro import workflow
from cradle_pyro.data.fields import write_h5ad_atomic
from cradle_pyro.errors import DataWarning
from cradle_pyro.reporting.report import ReportContent

NASTY = "<b>x</b></script>"
"""A perturbation whose name must not become part of the page."""

FEW = {"draws": 8, "seed": 1, "progress": False}


def make_run(folder: Path) -> Path:
    """Train on the tiny screen and return the run directory; the screen lies beside it."""
    screen = folder / "screen.h5ad"
    write_h5ad_atomic(make_screen(), screen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the screen is confounded on purpose
        workflow.train_run(screen, folder / "run", make_config(), progress=False)
    return folder / "run"


@cache
def made_run() -> Path:
    """Return a run directory with its metrics, which no test may change."""
    run = make_run(Path(tempfile.mkdtemp(prefix="cradle-report-")))
    workflow.evaluate_run(run)
    return run


@cache
def made_content() -> ReportContent:
    """Return what the report of the run shows."""
    with mock.patch.object(workflow, "write_report") as write:
        workflow.report_run(made_run(), out=made_run() / "unwritten.html", **FEW)
    (content, _), _ = write.call_args
    return content


def with_labels(content: ReportContent, labels: list[str]) -> ReportContent:
    """Return the content with other names of the perturbations."""
    effects = content.effects.copy()
    effects.obs_names = labels
    return dataclasses.replace(content, effects=effects)


def many_effects(n_perturbations: int, n_genes: int, *, seed: int = 0) -> AnnData:
    """Return effects of made-up perturbations, a twentieth of them large and called."""
    rng = np.random.default_rng(seed)
    shape = (n_perturbations, n_genes)
    large = rng.random(shape) < 0.05
    mean = np.where(large, rng.normal(0, 1.5, shape), rng.normal(0, 0.02, shape))
    sd = rng.uniform(0.02, 0.3, shape)
    lfsr = np.where(large, 0.001, 0.4)
    layers = {"sd": sd, "ci_low": mean - 2 * sd, "ci_high": mean + 2 * sd, "lfsr": lfsr}
    names = [f"P{i}" for i in range(n_perturbations)]
    obs = pd.DataFrame(
        {
            "n_train": 50,
            "out_of_support": np.arange(n_perturbations) % 10 == 0,
            "support": ["was held out" if i % 10 == 0 else "" for i in range(n_perturbations)],
            "n_members": 1,
        },
        index=names,
    )
    return AnnData(
        mean.astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=[f"GENE{j}" for j in range(n_genes)]),
        layers={k: v.astype(np.float32) for k, v in layers.items()}
        | {"s_value": np.where(large, 0.001, 0.3).astype(np.float32)},
    )


def chromium() -> tuple[str, str] | None:
    """Return the paths of Chromium and its driver, or None where they are not installed."""
    paths = ("/usr/bin/chromium", "/usr/bin/chromedriver")
    return paths if all(os.access(path, os.X_OK) for path in paths) else None
