"""Run a benchmark: every cell of a grid in a process of its own, kept on disk, then compared.

A cell is a screen, a split, a seed and a predictor. Its tidy rows are written to
``cells/SCREEN/SPLIT/SEED/PREDICTOR.csv`` with a digest of all that determines them, so that a
benchmark that was stopped goes on where it was, and a changed one computes only what changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cradle_pyro.data.fields import write_text_atomic
from cradle_pyro.errors import CradleError, DataError, shown
from cradle_pyro.evaluation.comparisons import compare, normalise
from cradle_pyro.evaluation.grid import (
    BASELINE_KINDS,
    CEILING_KIND,
    Benchmark,
    Cell,
    GridPredictor,
    GridScreen,
    GridSplit,
    candidates_of,
)
from cradle_pyro.evaluation.jobs import (
    CandidateTask,
    Place,
    ScoreTask,
    cell_digest,
    read_json,
    stored_digest,
)
from cradle_pyro.evaluation.paired import LabelParts
from cradle_pyro.evaluation.processes import run_tasks
from cradle_pyro.evaluation.scoring import reference_blocks
from cradle_pyro.evaluation.screens import build_screen, check_screen, check_split
from cradle_pyro.queries.progress import progress_bar

__all__ = ["BenchmarkResult", "gather_benchmark", "read_parts", "run_benchmark"]

_CHOICE_COLUMNS = ["screen", "predictor", "settings", "density", "n_candidates", "n_failed"]

KEYS = ("screen", "split", "seed", "predictor")


class BenchmarkResult(NamedTuple):
    """What a benchmark found.

    Parameters
    ----------
    scores
        Tidy: screen, split, seed, predictor, reference, labels, label, metric, value, n_labels.
    normalised
        The same with ``normalised``, see :func:`~cradle_pyro.evaluation.comparisons.normalise`.
    comparisons
        See :func:`~cradle_pyro.evaluation.comparisons.compare`.
    choices
        What tuning chose: screen, predictor, settings, density, n_candidates.
    failures
        Name of each cell that failed, to its reason.
    n_sources
        Versions of the code that the cells were made by.
    """

    scores: pd.DataFrame
    normalised: pd.DataFrame
    comparisons: pd.DataFrame
    choices: pd.DataFrame
    failures: dict[str, str]
    n_sources: int


def run_benchmark(
    benchmark: Benchmark,
    out: str | Path,
    *,
    workers: int = 1,
    progress: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> BenchmarkResult:
    """Check, tune, fit and score every cell of a grid; write and return the tables.

    Parameters
    ----------
    benchmark
        From :func:`~cradle_pyro.evaluation.grid_file.read_benchmark`.
    out
        Directory for ``cells``, ``tuning``, ``scores.csv`` (all labels together), ``labels.csv``
        (each by itself), ``normalised.csv`` and ``comparisons.csv``. Cells that it holds already
        are kept if they still fit.
    workers
        Processes at a time, each on one thread. 0: everything in this process. Results do not
        depend on it.
    progress
        Show a progress bar.
    say
        Called with a line on each step.

    Returns
    -------
    BenchmarkResult
        A cell that fails leaves its reason in `failures`, and the others go on.

    Raises
    ------
    CradleError
        For a mistake in the grid or its screens, before anything is trained.
    """
    out = Path(out)
    _prepare_folder(out)
    benchmark_text = json.dumps(benchmark.model_dump(mode="json"), indent=1)
    choices, failed = _tuned(benchmark, out, workers, progress=progress, say=say)
    cells = list(benchmark.cells())
    to_run, stale = [], []
    for cell in cells:
        digest = cell_digest(benchmark, cell, _chosen(choices, cell))
        stored = stored_digest(Place(out, cell).table)
        if stored != digest:
            to_run.append(cell)
            stale += [cell] if stored is not None else []
    if stale:
        say(
            f"{len(stale)} cells on disk were made with other settings or data and are computed "
            f"again: {shown(stale, 3)}."
        )
    if len(to_run) < len(cells):
        say(f"{len(cells) - len(to_run)} of {len(cells)} cells are there already.")
    failures: dict[str, str] = {}
    runnable = []
    for cell in to_run:
        reason = failed.get((cell.screen.tuning, cell.predictor.name))
        if reason is None:
            runnable.append(cell)
        else:
            failures[str(cell)] = reason
    # Seed by seed, so that a grid that is stopped has something of every screen.
    runnable.sort(key=lambda cell: benchmark.seeds.index(cell.seed))
    tasks = [
        ScoreTask(benchmark, out, tuple(some), tuple(_chosen(choices, cell) for cell in some))
        for some in _together(runnable)
    ]
    with progress_bar("Benchmark", len(runnable), show=progress) as advance:
        for failure in run_tasks(tasks, workers, advance):
            failures[failure.name] = failure.reason
    write_text_atomic(out / "benchmark.json", benchmark_text)
    return _collect(benchmark, out, choices, failures)


def gather_benchmark(benchmark: Benchmark, out: str | Path) -> BenchmarkResult:
    """Write and return the tables of the cells that are there and still fit; compute none.

    Raises
    ------
    DataError
        If there is no such cell, or the tables cannot be written.
    """
    out = Path(out)
    _prepare_folder(out)
    stored = [read_json(_choice_path(out, *one)) for one in _tuned_predictors(benchmark)]
    choices = pd.DataFrame([one for one in stored if one], columns=_CHOICE_COLUMNS)
    missing = {
        str(cell): "not computed yet"
        for cell in benchmark.cells()
        if stored_digest(Place(out, cell).table)
        != cell_digest(benchmark, cell, _chosen(choices, cell))
    }
    return _collect(benchmark, out, choices, missing)._replace(failures={})


def read_parts(benchmark: Benchmark, out: str | Path) -> dict[tuple[object, ...], LabelParts]:
    """Return what the scores of effects are made of, for all cells that are done.

    By (screen, split, seed, predictor, reference, labels), as `compare` takes them.
    """
    found: dict[tuple[object, ...], LabelParts] = {}
    for cell in benchmark.cells():
        place = Place(Path(out), cell)
        if not place.parts.is_file() or not place.table.is_file():
            continue
        with np.load(place.parts) as stored:
            blocks = [key.removesuffix("/labels") for key in stored if key.endswith("/labels")]
            for block in blocks:
                reference, labels = block.split("/")
                key = (cell.screen.name, cell.split.name, cell.seed, cell.predictor.name)
                found[(*key, reference, labels)] = LabelParts(
                    stored[f"{block}/labels"].tolist(),
                    stored[f"{block}/moments"],
                    stored[f"{block}/means"],
                )
    return found


def check_screens(
    benchmark: Benchmark, places: Sequence[tuple[GridScreen, GridSplit]], *, progress: bool
) -> None:
    """Build each screen once, under each split and the first seed; raise if one is not possible.

    Under the other seeds real screens are divided, and simulated ones if the split names labels,
    which another simulation may not have.
    """
    with progress_bar("Checking", len(places), show=progress) as advance:
        for screen, split in places:
            where = f"Screen '{screen.name}', split '{split.name}'"
            try:
                config = benchmark.screen_config(screen, split, benchmark.seeds[0])
                built = build_screen(benchmark, screen, split, benchmark.seeds[0])
                check_screen(built, where=where)
                reference_blocks(built.data, built.truth, config.evaluation)
                if screen.simulate is None or config.split.held_out:
                    for seed in benchmark.seeds[1:]:
                        check_split(benchmark, screen, split, seed)
            except CradleError as error:
                text = str(error)
                raise type(error)(text if text.startswith(where) else f"{where}: {text}") from None
            advance()


# ----------------------------------------------------------------------------------------- tuning


def _tuned(
    benchmark: Benchmark,
    out: Path,
    workers: int,
    *,
    progress: bool,
    say: Callable[[str], object],
) -> tuple[pd.DataFrame, dict[tuple[str, str], str]]:
    """Check the screens that have work to do, then choose settings; return choices and failures."""
    tuned = _tuned_predictors(benchmark)
    tasks = []
    for screen, predictor in tuned:
        for number, settings in enumerate(candidates_of(predictor)):
            task = CandidateTask(benchmark, out, screen, predictor, number, settings)
            if not task.is_done():
                tasks.append(task)
    check_screens(benchmark, _places_with_work(benchmark, out, tasks), progress=progress)
    if tasks:
        say(f"Trying {len(tasks)} candidate settings on validation cells ...")
    with progress_bar("Tuning", len(tasks), show=progress and bool(tasks)) as advance:
        reasons = {failure.name: failure.reason for failure in run_tasks(tasks, workers, advance)}
    rows, failed = [], {}
    for screen, predictor in tuned:
        try:
            rows.append(_choice(benchmark, out, screen, predictor, reasons))
        except DataError as error:
            failed[screen.name, predictor.name] = str(error)
    return pd.DataFrame(rows, columns=_CHOICE_COLUMNS), failed


def _tuned_predictors(benchmark: Benchmark) -> list[tuple[GridScreen, GridPredictor]]:
    return [
        (screen, predictor)
        for screen in benchmark.screens
        for predictor in benchmark.predictors_of(screen)
        if predictor.candidates and screen.tuned_on is None
    ]


def _choice_path(out: Path, screen: GridScreen, predictor: GridPredictor) -> Path:
    return out / "tuning" / screen.name / f"{predictor.name}.json"


def _choice(
    benchmark: Benchmark,
    out: Path,
    screen: GridScreen,
    predictor: GridPredictor,
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Return the candidate of highest density of validation cells, and write it down."""
    tried = [
        CandidateTask(benchmark, out, screen, predictor, number, settings)
        for number, settings in enumerate(candidates_of(predictor))
    ]
    found = [(task.density(), task) for task in tried if task.is_done()]
    usable = [(density, -task.number, task) for density, task in found if np.isfinite(density)]
    if not usable:
        why = next((reasons[str(task)] for task in tried if str(task) in reasons), "no density")
        raise DataError(f"none of {len(tried)} candidates could be judged: {why}")
    density, _, best = max(usable, key=lambda one: one[:2])
    choice = {
        "screen": screen.name,
        "predictor": predictor.name,
        "settings": list(best.settings),
        "density": density,
        "n_candidates": len(tried),
        "n_failed": len(tried) - len(usable),
    }
    write_text_atomic(_choice_path(out, screen, predictor), json.dumps(choice, indent=1))
    return choice


def _chosen(choices: pd.DataFrame, cell: Cell) -> tuple[str, ...]:
    if not cell.predictor.candidates:
        return ()
    mine = (choices["screen"] == cell.screen.tuning) & (choices["predictor"] == cell.predictor.name)
    return tuple(choices.loc[mine, "settings"].iloc[0]) if mine.any() else ()


# ------------------------------------------------------------------------------------------- work


def _places_with_work(
    benchmark: Benchmark, out: Path, tasks: Sequence[CandidateTask]
) -> list[tuple[GridScreen, GridSplit]]:
    """Return screens and splits with a cell that is not there or, without tuning, not as it was."""
    tuned = {task.screen.name for task in tasks}
    found: dict[tuple[str, str], tuple[GridScreen, GridSplit]] = {}
    for cell in benchmark.cells():
        key = cell.screen.name, cell.split.name
        if key in found:
            continue
        stored = stored_digest(Place(out, cell).table)
        is_old = not cell.predictor.candidates and stored != cell_digest(benchmark, cell, ())
        if stored is None or is_old or cell.screen.tuning in tuned:
            found[key] = (cell.screen, cell.split)
    return list(found.values())


def _together(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return cells in tasks: predictors that fit in a moment share a process and its screen."""
    tasks: dict[tuple[object, ...], list[Cell]] = {}
    for number, cell in enumerate(cells):
        is_simple = cell.predictor.kind in (*BASELINE_KINDS, CEILING_KIND)
        own = "simple" if is_simple else number
        key = (cell.screen.name, cell.split.name, cell.seed, own)
        tasks.setdefault(key, []).append(cell)
    return list(tasks.values())


def _prepare_folder(out: Path) -> None:
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise DataError(f"Cannot write to '{out}': {error}. Choose another --out.") from None


def _collect(
    benchmark: Benchmark, out: Path, choices: pd.DataFrame, failures: dict[str, str]
) -> BenchmarkResult:
    """Gather all cells that fit the grid, and write the tables."""
    found = []
    for cell in benchmark.cells():
        place = Place(out, cell)
        if str(cell) in failures or not place.table.is_file():
            continue
        # A digest is no number: pandas crashes on 0e45861206506f62, whose exponent is absurd.
        words = dict.fromkeys(("label", "digest", "source"), str)
        table = pd.read_csv(
            place.table, dtype=words, keep_default_na=False, na_values={"value": ["", "nan"]}
        )
        own = dict(zip(KEYS, str(cell).split("/"), strict=True)) | {"seed": cell.seed}
        found.append(table.assign(**own))
    if not found:
        first = next(iter(failures.values()), "nothing was computed")
        raise DataError(f"No cell of the benchmark could be computed: {first}")
    scores = pd.concat(found, ignore_index=True)
    n_sources = scores["source"].nunique()
    columns = [*KEYS, *(c for c in scores.columns if c not in (*KEYS, "digest", "source"))]
    scores = scores[columns]
    real = [screen.name for screen in benchmark.screens if screen.simulate is None]
    normalised = normalise(scores)
    comparisons = compare(
        scores,
        read_parts(benchmark, out),
        benchmark.ours,
        crossed=real,
        without=[CEILING_KIND],
    )
    result = BenchmarkResult(scores, normalised, comparisons, choices, failures, n_sources)
    is_pooled = scores["label"] == ""
    tables = {
        "scores": scores[is_pooled].drop(columns="label"),
        "labels": scores[~is_pooled],
        "normalised": normalised,
        "comparisons": comparisons,
    }
    for name, table in tables.items():
        text = table.to_csv(index=False, float_format="%.7g")
        write_text_atomic(out / f"{name}.csv", text)
    return result
