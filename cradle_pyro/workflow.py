"""Whole jobs on files, as the command line offers them: train, evaluate, ask, the demo."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from cradle_pyro.config import Config
from cradle_pyro.data.confounding import confounding_report, warn_confounding
from cradle_pyro.data.fields import check_target, read_screen, write_h5ad_atomic
from cradle_pyro.data.prepare import Prepared, prepare, prepare_query
from cradle_pyro.data.qc import QCThresholds, qc_metrics
from cradle_pyro.errors import DataError, DataWarning, shown
from cradle_pyro.evaluation.evaluate import Evaluation
from cradle_pyro.evaluation.evaluate import evaluate as evaluate_posterior
from cradle_pyro.evaluation.truth import truth_of
from cradle_pyro.inference.checkpoint import load
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.inference.train import fit
from cradle_pyro.queries.calls import CALL_RATE
from cradle_pyro.queries.counterfactual import counterfactual
from cradle_pyro.queries.effects import Kind, effects
from cradle_pyro.queries.interventions import Intervention, check, do
from cradle_pyro.reporting.table import strongest_effects, write_text_report
from cradle_pyro.simulate.perturbseq import simulate_perturbseq

__all__ = [
    "DEMO_SETTINGS",
    "Demo",
    "effects_run",
    "evaluate_run",
    "query_run",
    "run_demo",
    "train_run",
]

_SPLIT = "cradle_split"
DEMO_SETTINGS = (
    "data.layer='counts'",
    "data.covariate_keys=['batch']",
    "split.method=combinations",
)
"""What the demo changes in the default configuration."""

_SMOKE_SETTINGS = (
    "train.max_epochs=2",
    "model.n_latents=4",
    "model.decoder.hidden=32",
    "guide.encoder.hidden=32",
    "evaluation.draws=3",
    "evaluation.n_controls=20",
    "evaluation.n_density_cells=20",
    "evaluation.min_cells=2",
    "evaluation.split_half_repeats=3",
)
_SMOKE_SIZE = {"n_cells": 400, "n_genes": 80, "n_perturbations": 5, "n_pairs": 3}


class Demo(NamedTuple):
    """What the demo found.

    Parameters
    ----------
    evaluation
        On held-out cells and against the truth.
    answers
        Title to table.
    report
        Path of the report.
    """

    evaluation: Evaluation
    answers: dict[str, pd.DataFrame]
    report: Path


def train_run(
    path: str | Path,
    out: str | Path,
    config: Config,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Posterior:
    """Train on the screen at `path`, write the run directory `out`, and return the posterior.

    Raises
    ------
    CradleError
        For a mistake in the data, the configuration or the directory, before long work.
    """
    path, out = Path(path), Path(out)
    _check_writable(out)
    adata = read_screen(path)
    return _train(adata, path, out, config, resume=resume, progress=progress)


def _train(
    adata: AnnData, path: Path, out: Path, config: Config, *, resume: bool, progress: bool
) -> Posterior:
    prepared = prepare(adata, config)
    data = prepared.data
    covariates = _covariate_table(prepared.adata, config)
    warn_confounding(
        confounding_report(
            data.labels, data.failing, control=data.schema.control, covariates=covariates
        )
    )
    posterior = fit(
        data, config, progress=progress, checkpoint_dir=out / "checkpoints", resume=resume
    )
    facts = dict(posterior.facts) | {"data": str(path.resolve())}
    if "cradle_qc" in prepared.adata.uns:
        facts["qc"] = QCThresholds.from_dict(prepared.adata.uns["cradle_qc"]).to_dict()
    posterior = dataclasses.replace(posterior, facts=facts)
    posterior.save(out)
    pd.DataFrame({"cell": data.obs_names, "split": data.split}).to_csv(
        out / "split.csv", index=False
    )
    return posterior


def evaluate_run(
    run: str | Path, *, data: str | Path | None = None, out: str | Path | None = None
) -> tuple[Evaluation, Path]:
    """Evaluate the run directory `run`; return the evaluation and the path of its metrics.

    Parameters
    ----------
    run
        A run directory.
    data
        The screen it was trained on; the recorded path if omitted.
    out
        JSON file; ``metrics.json`` in the run directory if omitted.

    Raises
    ------
    DataError
        If the screen is not the one that the run was trained on.
    """
    run = Path(run)
    posterior = load(run)
    out = Path(out) if out else run / "metrics.json"
    _check_writable(out.parent)
    path = Path(data) if data is not None else _recorded_path(posterior, run)
    return _evaluate(posterior, read_screen(path), path, out)


def query_run(
    run: str | Path,
    cells: str | Path,
    intervention: Intervention,
    out: str | Path,
    *,
    draws: int = 20,
    count_draws: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> AnnData:
    """Ask a run what cells would have been under an intervention; write and return the answer.

    Parameters
    ----------
    run
        A run directory.
    cells
        Cells with the columns the run was trained with. Without artifact flags, they are annotated
        with the thresholds of the run.
    intervention
        See :func:`~cradle_pyro.do`.
    out
        h5ad file to write; see :func:`~cradle_pyro.counterfactual` for what it holds.
    draws, count_draws, seed, progress
        As in :func:`~cradle_pyro.counterfactual`.

    Raises
    ------
    CradleError
        For a mistake in the query, the cells or the run, before long work.
    """
    check_target(out)
    posterior = load(run)
    check(posterior, intervention)
    adata = prepare_query(read_screen(cells), posterior.config, posterior.facts.get("qc"))
    answer = counterfactual(
        posterior, adata, intervention, draws=draws, count_draws=count_draws, seed=seed,
        progress=progress,
    )  # fmt: skip
    _warn_support(answer)
    write_h5ad_atomic(answer, out)
    return answer


def effects_run(
    run: str | Path,
    out: str | Path,
    labels: Sequence[str] | None = None,
    *,
    kind: Kind = "direct",
    draws: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> AnnData:
    """Write and return the average effects of a run's perturbations; no training data are needed.

    Parameters
    ----------
    run
        A run directory.
    out
        h5ad file to write.
    labels, kind, draws, seed, progress
        As in :func:`~cradle_pyro.effects`.

    Raises
    ------
    CradleError
        For a mistake in the labels or the run, before long work.
    """
    check_target(out)
    table = effects(load(run), labels, kind=kind, draws=draws, seed=seed, progress=progress)
    _warn_support(table)
    write_h5ad_atomic(table, out)
    return table


def _warn_support(answer: AnnData) -> None:
    notes = list(answer.uns["cradle_query"]["out_of_support"])
    if notes:
        warnings.warn(
            f"The training cells do not show what was asked: {shown(notes, 3)}. The answer rests "
            "on the model and is marked out_of_support.",
            DataWarning,
            stacklevel=3,
        )


def _recorded_path(posterior: Posterior, run: Path) -> Path:
    path = posterior.facts.get("data")
    if path is None or not Path(path).exists():
        raise DataError(
            f"The screen that '{run}' was trained on is not at its recorded path"
            f"{f', {path!r}' if path else ''}. Give it with --data."
        )
    return Path(path)


def _evaluate(
    posterior: Posterior, adata: AnnData, path: Path, out: Path
) -> tuple[Evaluation, Path]:
    prepared = prepare(adata, posterior.config)
    if prepared.data.fingerprint != posterior.facts["fingerprint"]:
        raise DataError(
            f"'{path}' is not the screen this run was trained on: its fingerprint differs. "
            "Give the same file with --data."
        )
    evaluation = evaluate_posterior(posterior, prepared.data, truth=truth_of(prepared.adata))
    return evaluation, evaluation.write(out)


def run_demo(
    out: str | Path,
    config: Config | None = None,
    *,
    seed: int = 0,
    smoke: bool = False,
    progress: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> Demo:
    """Simulate, annotate, train, evaluate and ask; return what was found.

    Parameters
    ----------
    out
        Directory for screen.h5ad, the run, clean.h5ad, effects.h5ad and report.md.
    config
        Settings; by default those of the demo: counts layer, a quarter of the pairs held out.
    seed
        Seed of the screen, the split and the training.
    smoke
        A small screen and a short training.
    progress
        Show a progress bar.
    say
        Called with a line on each step.
    """
    out = Path(out)
    _check_writable(out)
    if config is None:
        config = Config().with_settings([*DEMO_SETTINGS, *(_SMOKE_SETTINGS if smoke else ())])
    config = config.with_settings([f"split.seed={seed}", f"train.seed={seed}"])
    adata = simulate_perturbseq(seed=seed, **(_SMOKE_SIZE if smoke else {}))
    say(f"Simulated {adata.n_obs:,} cells x {adata.n_vars:,} genes with known truth.")
    prepared = prepare(adata, config)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "screen.h5ad"
    prepared.adata.obs[_SPLIT] = prepared.data.split
    write_h5ad_atomic(prepared.adata, path)
    share = float(np.mean(prepared.data.failing))
    say(f"Annotated artifacts with thresholds from training cells: {share:.1%} of cells flagged.")
    config = config.with_settings(["split.method=column", f"split.key={_SPLIT}"])
    say(f"Training for up to {config.train.max_epochs} epochs ...")
    posterior = _train(prepared.adata, path, out / "run", config, resume=False, progress=progress)
    say("Evaluating on held-out cells and against the truth ...")
    evaluation, _ = _evaluate(posterior, prepared.adata, path, out / "run" / "metrics.json")
    say("Asking which genes each perturbation moves, and what failing cells would be without ...")
    answers = _ask(posterior, prepared, out, progress=progress)
    return Demo(evaluation, answers, write_text_report(evaluation, out / "report.md", answers))


def _ask(
    posterior: Posterior, prepared: Prepared, out: Path, *, progress: bool
) -> dict[str, pd.DataFrame]:
    """Write effects.h5ad and clean.h5ad; return what a biologist would read off them first."""
    adata, data = prepared
    truth = truth_of(adata)
    assert truth is not None  # the demo's screen is simulated
    table = effects(posterior, truth.labels, progress=progress)
    table.layers["truth"] = truth.effects
    write_h5ad_atomic(table, out / "effects.h5ad")
    called = (table.layers["s_value"] <= CALL_RATE).sum(1)
    label = str(table.obs_names[int(np.argmax(called))])
    failing = np.flatnonzero(data.failing & (np.asarray(data.split) == "test"))
    clean = counterfactual(posterior, adata[failing], do(artifact=0), draws=50, progress=progress)
    write_h5ad_atomic(clean, out / "clean.h5ad")
    return {
        f"What does {label} do? Genes it changes most (log2, artifact = 0)": strongest_effects(
            table, label
        ),
        "What would failing cells be without their artifact? Medians": _before_and_after(
            adata[failing], clean, posterior.config
        ),
    }


def _before_and_after(before: AnnData, after: AnnData, config: Config) -> pd.DataFrame:
    """Return medians of QC metrics of cells as observed and as they would have been."""
    counts = before.layers[config.data.layer] if config.data.layer else before.X
    metrics = {
        "observed": qc_metrics(counts, before.var_names),
        "artifact = 0": qc_metrics(after.layers["counts"], after.var_names),
    }
    return pd.DataFrame(
        {name: {key: np.median(v) for key, v in one.items()} for name, one in metrics.items()}
    ).rename_axis("of each cell")


def _covariate_table(adata: AnnData, config: Config) -> pd.DataFrame | None:
    keys = list(config.data.covariate_keys)
    return adata.obs[keys].astype(str) if keys else None


def _check_writable(path: Path) -> None:
    """Raise unless the directory `path` can be made and written to; nothing is made yet."""
    nearest = next(place for place in (path, *path.resolve().parents) if place.exists())
    if not nearest.is_dir():
        raise DataError(f"Cannot write to '{path}': '{nearest}' is a file. Choose another --out.")
    if not os.access(nearest, os.W_OK):
        raise DataError(f"Cannot write to '{path}': permission denied. Choose another --out.")
