"""Whole jobs on files, as the command line offers them: train, evaluate, ask, report, the demo."""

from __future__ import annotations

import dataclasses
import json
import shlex
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from cradle_pyro.config import Config
from cradle_pyro.data.confounding import confounding_report, warn_confounding
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.fields import check_directory, check_target, read_screen, write_h5ad_atomic
from cradle_pyro.data.groups import log2_fraction
from cradle_pyro.data.prepare import Prepared, prepare, prepare_query
from cradle_pyro.data.qc import QCThresholds, qc_metrics
from cradle_pyro.errors import CheckpointError, DataError, DataWarning, shown
from cradle_pyro.evaluation.calibration import coverage_curve
from cradle_pyro.evaluation.criticism import (
    basal_ranks,
    count_calibration,
    latent_diagnostics,
    predictive_check,
)
from cradle_pyro.evaluation.evaluate import Evaluation
from cradle_pyro.evaluation.evaluate import evaluate as evaluate_posterior
from cradle_pyro.evaluation.truth import Truth, truth_of
from cradle_pyro.inference.checkpoint import load
from cradle_pyro.inference.loop import is_first_process
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.inference.train import fit
from cradle_pyro.queries.calls import CALL_RATE
from cradle_pyro.queries.counterfactual import counterfactual, write_counterfactual
from cradle_pyro.queries.effects import Kind, effect_draws, effects, interactions
from cradle_pyro.queries.interventions import Intervention, check, do
from cradle_pyro.queries.progress import progress_bar
from cradle_pyro.queries.scale import is_log_normalised, log2_expression
from cradle_pyro.reporting.report import (
    SIZEABLE,
    Calibration,
    Embedding,
    Example,
    ReportContent,
    Screen,
    strongest_first,
    write_report,
)
from cradle_pyro.reporting.table import strongest_effects, write_text_report
from cradle_pyro.simulate.perturbseq import DEMO_SETTINGS, simulate_perturbseq

__all__ = [
    "Demo",
    "effects_run",
    "evaluate_run",
    "query_run",
    "report_run",
    "run_demo",
    "train_run",
]

_SPLIT = "cradle_split"
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

# Sizes of what a report looks at, for about two minutes on one core.
_REPORT_PARTS = 9
_CRITICISM_CELLS = 500
_RANK_CELLS = 256
_RANK_DRAWS = 99
_CLEANED_CELLS = 500
_CLEAN_DRAWS = 20
_EXAMPLES = 3
_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_LEAST_DRAWS_FOR_LEVELS = 39


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

    Of several processes (``train.devices``, ``train.nodes``) the first one writes.

    Raises
    ------
    CradleError
        For a mistake in the data, the configuration or the directory, before long work.
    """
    path, out = Path(path), Path(out)
    check_directory(out)
    adata = _read(path, config)
    return _train(adata, path, out, config, resume=resume, progress=progress)


def _read(path: Path, config: Config) -> AnnData:
    return read_screen(path, backed=config.data.backed, layer=config.data.layer)


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
    if not is_first_process():
        return posterior
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
    check_directory(out.parent)
    path = Path(data) if data is not None else _recorded_path(posterior, run)
    return _evaluate(posterior, _read(path, posterior.config), path, out)


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

    It is written a chunk of cells at a time, and its matrices are left on disk.

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
    screen = _read(Path(cells), posterior.config)
    adata = prepare_query(screen, posterior.config, posterior.facts.get("qc"))
    answer = write_counterfactual(
        posterior, adata, intervention, out, draws=draws, count_draws=count_draws, seed=seed,
        progress=progress,
    )  # fmt: skip
    _warn_support(answer)
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


def report_run(
    run: str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    draws: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write one self-contained HTML page about a run, and return its path.

    Parameters
    ----------
    run
        A run directory. Its ``metrics.json`` is used if it is not older than the run; else the run
        is evaluated, and the file is written.
    data
        The screen it was trained on; the recorded path if omitted.
    out
        HTML file; ``report.html`` in the run directory if omitted.
    draws
        Posterior draws of effects and interactions.
    seed
        Seed of all draws.
    progress
        Show a progress bar.

    Raises
    ------
    CradleError
        If the run is damaged, the screen is not the one that it was trained on, or the page cannot
        be written.
    """
    run = Path(run)
    posterior = load(run)
    out = Path(out) if out is not None else run / "report.html"
    check_target(out)
    path = Path(data) if data is not None else _recorded_path(posterior, run)
    prepared = _prepared(posterior, _read(path, posterior.config), path)
    with progress_bar("Report", _REPORT_PARTS, show=progress) as advance:
        content = _report_content(
            posterior, prepared, run, path, draws=draws, seed=seed, advance=advance
        )
        write_report(content, out)
        advance()
    return out


def _report_content(
    posterior: Posterior,
    prepared: Prepared,
    run: Path,
    path: Path,
    *,
    draws: int,
    seed: int,
    advance: Callable[[], object],
) -> ReportContent:
    """Compute all that a report shows; `advance` is called after each part but the last."""
    adata, data = prepared
    truth = truth_of(adata)
    evaluation = _stored_evaluation(run)
    if evaluation is None:
        evaluation = evaluate_posterior(posterior, data, truth=truth)
        evaluation.write(run / "metrics.json")
    advance()
    marginal = posterior.config.evaluation.grouping == "marginal"
    table = effects(
        posterior, data.schema.perturbations if marginal else None, draws=draws, seed=seed
    )
    members = [len(label.split(data.schema.delimiter)) for label in table.obs_names]
    table.obs["n_members"] = members
    advance()
    pairs = [label for label, n in zip(table.obs_names, members, strict=True) if n == 2]
    found = interactions(posterior, pairs, draws=draws, seed=seed) if pairs else None
    advance()
    test = data.where(split="test")
    some = test.random_subset(_CLEANED_CELLS, seed=seed)
    quality, embedding = _report_cells(posterior, some, seed=seed)
    examples = _examples(posterior, test, table, seed=seed)
    advance()
    criticism = predictive_check(posterior, test, n_cells=_CRITICISM_CELLS, seed=seed)
    advance()
    calibration = _report_calibration(
        posterior, test, truth, draws=draws, seed=seed, advance=advance
    )
    return ReportContent(
        name=run.resolve().name,
        screen=_report_screen(posterior, prepared, path),
        confounding=confounding_report(
            data.labels,
            data.failing,
            control=data.schema.control,
            covariates=_covariate_table(adata, posterior.config),
        ),
        history=posterior.history,
        criticism=criticism,
        effects=table,
        examples=examples,
        quality=quality,
        embedding=embedding,
        interactions=found,
        evaluation=evaluation,
        calibration=calibration,
        config=posterior.config.to_toml(),
        maker=f"cradle-pyro {metadata.version('cradle-pyro')}",
        facts=_report_facts(posterior, run, path, seed),
        commands=_report_commands(run, path, draws, seed),
        draws=draws,
    )


def _stored_evaluation(run: Path) -> Evaluation | None:
    """Return the evaluation in the run directory, or None if there is none since its training."""
    path = run / "metrics.json"
    if not path.is_file() or path.stat().st_mtime < (run / "manifest.json").stat().st_mtime:
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        scores = pd.DataFrame(stored["scores"]).astype({"value": float})
        return Evaluation(scores, stored["facts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is damaged: {error}. Delete it, and the run is evaluated again."
        ) from error


def _report_screen(posterior: Posterior, prepared: Prepared, path: Path) -> Screen:
    adata, data = prepared
    schema = data.schema
    carried = (data.artifact > 0).sum(0)
    thresholds = posterior.facts.get("qc") or adata.uns.get("cradle_qc")
    return Screen(
        path=str(path),
        n_cells=data.n_cells,
        n_genes=schema.n_genes,
        n_controls=int((data.labels == schema.control).sum()),
        control=schema.control,
        splits=dict(pd.Series(data.split).value_counts()),
        covariates={name: len(levels) for name, levels in schema.covariates},
        median_library=None if is_log_normalised(posterior) else float(np.median(data.library)),
        flags=pd.DataFrame(
            {"n_cells": carried, "share": carried / data.n_cells},
            index=pd.Index(schema.artifacts, name="flag"),
        ),
        failing_share=float(data.failing.mean()),
        thresholds=QCThresholds.from_dict(thresholds) if thresholds and schema.artifacts else None,
        is_simulated=truth_of(adata) is not None,
    )


def _report_cells(
    posterior: Posterior, cells: CellData, *, seed: int
) -> tuple[pd.DataFrame | None, Embedding | None]:
    """Return QC metrics of failing cells before and after cleaning, and a map of all cells."""
    from sklearn.decomposition import PCA

    if is_log_normalised(posterior) or not cells.failing.any():
        return None, None
    clean = counterfactual(posterior, cells, do(artifact=0), draws=1, seed=seed)
    worlds = [
        (cells.rows(slice(None)), cells.library),
        (clean.layers["counts"], clean.obs["cradle_library"].to_numpy()),
    ]
    genes = np.asarray(cells.schema.genes)
    before, after = (pd.DataFrame(qc_metrics(x, genes, library=size)) for x, size in worlds)
    medians = {
        "failing, as observed": before[cells.failing].median(),
        "failing, without artifact": after[cells.failing].median(),
        "passing, as observed": before[cells.passing].median(),
    }
    logs = [log2_fraction(x.toarray() / size[:, None]) for x, size in worlds]
    points = PCA(2, random_state=seed).fit_transform(np.concatenate(logs))
    first, second = np.split(points, 2)
    return pd.DataFrame(medians), Embedding(first, second, cells.failing)


def _examples(posterior: Posterior, test: CellData, table: AnnData, *, seed: int) -> list[Example]:
    """Return failing cells of the perturbations that do most, and a control given the first."""
    cells = test.subset(test.failing) if test.failing.any() else test
    strongest = strongest_first(table)
    control = cells.schema.control
    labels = [label for label in strongest if label in set(cells.labels)][: _EXAMPLES - 1]
    if control in cells.labels:
        labels.append(control)
    rows = [int(np.flatnonzero(cells.labels == label)[0]) for label in labels]
    found = []
    for label, row in zip(labels, rows, strict=True):
        one = cells.subset([row])
        other = strongest[0] if label == control else control
        flags = np.asarray(cells.schema.artifacts)[one.artifact[0] > 0]
        worlds = {"factual": do()}
        if len(flags):
            worlds["cleaned"] = do(artifact=0)
        worlds[f"as {other}"] = do(artifact=0, perturbation=other)
        values = {name: _expression(posterior, one, act, seed) for name, act in worlds.items()}
        found.append(Example(str(one.obs_names[0]), label, flags.tolist(), values))
    return found


def _expression(posterior: Posterior, cell: CellData, act: Intervention, seed: int) -> pd.Series:
    """Return the expected log2(1 + 1e4 fraction) of one cell under `act`, by gene."""
    answer = counterfactual(posterior, cell, act, draws=_CLEAN_DRAWS, count_draws=0, seed=seed)
    values = log2_expression(posterior, torch.as_tensor(answer.layers["rate"])).numpy()[0]
    return pd.Series(values, index=pd.Index(cell.schema.genes, name="gene"))


def _report_calibration(
    posterior: Posterior,
    test: CellData,
    truth: Truth | None,
    *,
    draws: int,
    seed: int,
    advance: Callable[[], object],
) -> Calibration:
    pit = count_calibration(posterior, test, n_cells=_CRITICISM_CELLS, seed=seed)
    advance()
    some = test.random_subset(_RANK_CELLS, seed=seed)
    ranks = basal_ranks(posterior, some, n_draws=_RANK_DRAWS, seed=seed)
    advance()
    units, leakage = latent_diagnostics(posterior, test, seed=seed)
    coverage = None
    if truth is not None:
        drawn = effect_draws(
            posterior, truth.labels, draws=max(draws, _LEAST_DRAWS_FOR_LEVELS), seed=seed
        )
        sizeable = np.abs(truth.effects) > SIZEABLE
        coverage = coverage_curve(drawn[:, sizeable], truth.effects[sizeable], _LEVELS)
    advance()
    return Calibration(pit, ranks, _RANK_DRAWS, units, leakage, coverage)


def _report_facts(posterior: Posterior, run: Path, path: Path, seed: int) -> dict[str, str]:
    """Return what identifies a run and this report of it, name to value."""
    versions = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["versions"]
    return {
        "run": str(run.resolve()),
        "screen": str(path.resolve()),
        "fingerprint of the screen": str(posterior.facts["fingerprint"]),
        "seed of the training": str(posterior.facts["seed"]),
        "seed of this report": str(seed),
        **{f"trained with {name}": version for name, version in versions.items()},
    }


def _report_commands(run: Path, path: Path, draws: int, seed: int) -> list[str]:
    here, screen = shlex.quote(str(run)), shlex.quote(str(path))
    again, config = shlex.quote(f"{run}-again"), shlex.quote(str(run / "config.toml"))
    return [
        f"cradle-pyro train {screen} --out {again} --config {config}",
        f"cradle-pyro evaluate {here} --data {screen}",
        f"cradle-pyro effects {here} --draws {draws} --seed {seed} --out effects.h5ad",
        f"cradle-pyro report {here} --data {screen} --draws {draws} --seed {seed}",
    ]


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
    prepared = _prepared(posterior, adata, path)
    evaluation = evaluate_posterior(posterior, prepared.data, truth=truth_of(prepared.adata))
    return evaluation, evaluation.write(out)


def _prepared(posterior: Posterior, adata: AnnData, path: Path) -> Prepared:
    """Return the screen as the run was trained on it, or raise if it is another one."""
    prepared = prepare(adata, posterior.config)
    if prepared.data.fingerprint != posterior.facts["fingerprint"]:
        raise DataError(
            f"'{path}' is not the screen this run was trained on: its fingerprint differs. "
            "Give the same file with --data."
        )
    return prepared


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
    check_directory(out)
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
