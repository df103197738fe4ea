"""The tasks of a benchmark: what each does, what it leaves on disk, and digests of both."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cradle_pyro.config import Config
from cradle_pyro.data.fields import write_text_atomic
from cradle_pyro.errors import CradleError, DataError
from cradle_pyro.evaluation.grid import (
    CEILING_KIND,
    Benchmark,
    Cell,
    GridPredictor,
    GridScreen,
)
from cradle_pyro.evaluation.paired import Judged, label_parts
from cradle_pyro.evaluation.processes import NO_REASON, Failure
from cradle_pyro.evaluation.scoring import Score, density_of, score, score_ceiling, seen_by
from cradle_pyro.evaluation.screens import (
    BuiltScreen,
    build_screen,
    file_digest,
    learned_cells,
    view_of,
)

__all__ = [
    "CandidateTask",
    "Place",
    "ScoreTask",
    "candidate_digest",
    "cell_digest",
    "read_json",
    "stored_digest",
]

_FORMAT = 1
_RUNNERS = (
    "cli.py",
    "workflow.py",
    *(f"evaluation/{name}.py" for name in ("benchmark", "comparisons", "grid_file", "processes")),
)
_DISTRIBUTIONS = ("cradle-pyro", "numpy", "torch")
# Settings that came after results were kept; their defaults are what was done before.
_LATER = (
    ("data", "backed"),
    *(("train", name) for name in ("devices", "nodes", "shuffle_block", "loader_workers")),
)


class Place(NamedTuple):
    """Where a cell of the grid is kept."""

    out: Path
    cell: Cell

    @property
    def folder(self) -> Path:
        """Folder of the screen, the split and the seed."""
        cell = self.cell
        return self.out / "cells" / cell.screen.name / cell.split.name / str(cell.seed)

    @property
    def table(self) -> Path:
        """Tidy rows."""
        return self.folder / f"{self.cell.predictor.name}.csv"

    @property
    def parts(self) -> Path:
        """What the scores of effects are made of, label by label."""
        return self.folder / f"{self.cell.predictor.name}.npz"

    @property
    def effects(self) -> Path:
        """Predicted and reference effects, if the grid keeps them."""
        return self.folder / f"{self.cell.predictor.name}.effects.npz"

    @property
    def failure(self) -> Path:
        """Why it failed, if it did."""
        return self.folder / f"{self.cell.predictor.name}.failed.json"


# ---------------------------------------------------------------------------------------- digests


def cell_digest(benchmark: Benchmark, cell: Cell, chosen: Sequence[str]) -> str:
    """Return a digest of everything that determines a cell.

    The screen (its file's content, or the arguments of the simulation), the configuration, the
    predictor, the seed, and the versions of this package, numpy and torch.
    """
    base = benchmark.screen_config(cell.screen, cell.split, cell.seed)
    predictor = cell.predictor
    is_ceiling = predictor.kind == CEILING_KIND
    config = base if is_ceiling else benchmark.predictor(cell, chosen)[1]
    return _digest(
        {
            "screen": _screen_content(benchmark, cell.screen),
            "base": _settings(base),
            "config": _settings(config),
            "predictor": [predictor.name, predictor.kind, predictor.cells, predictor.assisted],
            "seed": cell.seed,
            "diagnostics": benchmark.is_diagnosed(predictor),
            "cell_eval": cell.seed in benchmark.cell_eval,
        }
    )


def candidate_digest(task: CandidateTask) -> str:
    """Return a digest of everything that determines the density of a candidate."""
    cell = task.cell
    return _digest(
        {
            "screen": _screen_content(task.benchmark, task.screen),
            "config": _settings(task.benchmark.predictor(cell, task.settings)[1]),
            "predictor": [task.predictor.kind, task.predictor.cells],
            "seed": cell.seed,
        }
    )


def stored_digest(path: Path) -> str | None:
    """Return the digest of a cell's table; None without one, "" for one that cannot be read."""
    if not path.is_file():
        return None
    try:
        return str(pd.read_csv(path, nrows=1, dtype=str)["digest"].iloc[0])
    except (OSError, ValueError, KeyError, IndexError):
        return ""


@cache
def source_digest() -> str:
    """Return a digest of the source that results come from; kept beside them, not part of theirs.

    What runs the tasks and makes tables and pages is left out: it changes no score of a cell.
    """
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith("reporting/") and name not in _RUNNERS:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _screen_content(benchmark: Benchmark, screen: GridScreen) -> dict[str, Any]:
    content = screen.model_dump(mode="json", include={"simulate", "corrupt", "keep"})
    if screen.judged_on != "test":
        content["judged_on"] = screen.judged_on
    if screen.path is not None:
        content["file"] = file_digest(benchmark.screen_path(screen).resolve())
    return content


def _settings(config: Config) -> dict[str, Any]:
    """Return all settings; those that came after results were kept, where they say otherwise."""
    settings = config.model_dump(mode="json")
    defaults = Config().model_dump(mode="json")
    for section, name in _LATER:
        if settings[section][name] == defaults[section][name]:
            del settings[section][name]
    return settings


def _digest(content: dict[str, Any]) -> str:
    versions = {name: metadata.version(name) for name in _DISTRIBUTIONS}
    text = json.dumps(content | {"format": _FORMAT, "versions": versions}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ tasks


class ScoreTask(NamedTuple):
    """Cells of one screen, split and seed, and the settings that tuning chose for each."""

    benchmark: Benchmark
    out: Path
    cells: tuple[Cell, ...]
    chosen: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        """Name of each part."""
        return [str(cell) for cell in self.cells]

    def run(self) -> None:
        """Fit and score each cell, and write it or the reason why that failed."""
        first = self.cells[0]
        try:
            built = build_screen(self.benchmark, first.screen, first.split, first.seed)
        except Exception as error:
            for cell in self.cells:
                _write_failure(Place(self.out, cell).failure, error)
            return
        for cell, chosen in zip(self.cells, self.chosen, strict=True):
            place = Place(self.out, cell)
            try:
                _write_cell(self.benchmark, place, chosen, *_scored(self, built, cell, chosen))
            except Exception as error:
                _write_failure(place.failure, error)

    def forget(self) -> None:
        """Forget why it failed before."""
        for cell in self.cells:
            Place(self.out, cell).failure.unlink(missing_ok=True)

    def failures(self) -> Iterator[Failure]:
        """Yield what failed: cells without a table of their digest."""
        for cell, chosen in zip(self.cells, self.chosen, strict=True):
            place = Place(self.out, cell)
            if stored_digest(place.table) != cell_digest(self.benchmark, cell, chosen):
                yield Failure(str(cell), _stored_reason(place.failure))


class CandidateTask(NamedTuple):
    """One list of settings of a tuned predictor on a screen."""

    benchmark: Benchmark
    out: Path
    screen: GridScreen
    predictor: GridPredictor
    number: int
    settings: tuple[str, ...]

    def __str__(self) -> str:
        return f"tuning/{self.screen.name}/{self.predictor.name}/{self.number}"

    @property
    def names(self) -> list[str]:
        """Name of each part."""
        return [str(self)]

    @property
    def cell(self) -> Cell:
        """The place in the grid that it is tried at."""
        return Cell(self.screen, self.screen.splits[0], self.benchmark.tuning_seed, self.predictor)

    @property
    def path(self) -> Path:
        """Where its density is kept."""
        folder = self.out / "tuning" / self.screen.name / self.predictor.name
        return folder / f"{self.number}.json"

    @property
    def failure(self) -> Path:
        """Why it failed, if it did."""
        return self.path.with_suffix(".failed.json")

    def is_done(self) -> bool:
        """Return whether a density of the same digest is there."""
        return read_json(self.path).get("digest") == candidate_digest(self)

    def density(self) -> float:
        """Return the mean density of validation cells, nats per cell."""
        return float(read_json(self.path)["density"])

    def run(self) -> None:
        """Train on training cells and judge by validation cells; test cells are not there."""
        try:
            cell = self.cell
            start = time.perf_counter()
            built = build_screen(
                self.benchmark, cell.screen, cell.split, cell.seed, learned_only=True
            )
            predictor, config = self.benchmark.predictor(cell, self.settings)
            data = learned_cells(view_of(built, config))
            fitted = predictor.fit(data)
            posterior = getattr(fitted, "posterior", None)
            if posterior is None:
                raise DataError(
                    f"kind '{self.predictor.kind}' has no posterior, so that its candidates have "
                    "no density to be judged by. Leave candidates out."
                )
            cells = seen_by(fitted, data.where(split="val"))
            if self.predictor.cells == "passing":
                cells = cells.subset(data.where(split="val").passing)
            options = config.evaluation
            density = density_of(
                posterior, cells.random_subset(options.n_density_cells, seed=options.seed), options
            )
            content = {
                "digest": candidate_digest(self),
                "settings": list(self.settings),
                "density": float(density.mean()),
                "standard_error": float(density.std() / np.sqrt(len(density))),
                "n_cells": len(density),
                "seconds": time.perf_counter() - start,
            }
            write_text_atomic(self.path, json.dumps(content, indent=1))
            self.failure.unlink(missing_ok=True)
        except Exception as error:
            _write_failure(self.failure, error)

    def forget(self) -> None:
        """Forget why it failed before."""
        self.failure.unlink(missing_ok=True)

    def failures(self) -> Iterator[Failure]:
        """Yield why it failed, if it did."""
        if not self.is_done():
            yield Failure(str(self), _stored_reason(self.failure))


def _scored(
    task: ScoreTask, built: BuiltScreen, cell: Cell, chosen: Sequence[str]
) -> tuple[Score, dict[str, float]]:
    """Return the scores of a cell and what it cost."""
    benchmark = task.benchmark
    base = benchmark.screen_config(cell.screen, cell.split, cell.seed)
    options = base.evaluation
    start = time.perf_counter()
    if cell.predictor.kind == CEILING_KIND:
        found = score_ceiling(built.data, built.truth, options, flags=base.qc.flags)
        return found, {"seconds_to_score": time.perf_counter() - start}
    predictor, config = benchmark.predictor(cell, chosen)
    view = view_of(built, config)
    fitted = predictor.fit(learned_cells(view))
    fit_end = time.perf_counter()
    found = score(
        fitted, built.data, built.truth, options,
        view=view, diagnostics=benchmark.is_diagnosed(cell.predictor),
        outside=cell.seed in benchmark.cell_eval,
    )  # fmt: skip
    costs = {
        "seconds_to_fit": fit_end - start,
        "seconds_to_score": time.perf_counter() - fit_end,
        "peak_memory_mb": _peak_memory(),
    }
    history = getattr(getattr(fitted, "posterior", None), "history", None)
    if history is not None:
        costs["epochs"] = float(len(history))
    return found, costs


def _peak_memory() -> float:
    """Return the most memory that this process has held, in MB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# ---------------------------------------------------------------------------------------- writing


def _write_cell(
    benchmark: Benchmark, place: Place, chosen: Sequence[str], found: Score, costs: dict[str, float]
) -> None:
    """Write arrays, then the table that says that the cell is done."""
    cost_rows = [("run", "all", "", name, value, 0) for name, value in costs.items()]
    rows = pd.concat(
        [found.rows, pd.DataFrame(cost_rows, columns=found.rows.columns)], ignore_index=True
    )
    digest = cell_digest(benchmark, place.cell, chosen)
    rows = rows.assign(digest=digest, source=source_digest())
    place.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, np.ndarray] = {}
    effects: dict[str, np.ndarray] = {}
    for one in found.predictions:
        block = f"{one.reference}/{one.labels}"
        names = np.asarray(one.names, dtype=str)
        own = label_parts(Judged(one.names, one.predicted, one.effects))
        parts[f"{block}/labels"] = names
        parts[f"{block}/moments"], parts[f"{block}/means"] = own.moments, own.means
        if benchmark.effects:
            effects["genes"] = np.asarray(found.genes, dtype=str)
            effects[f"{block}/labels"] = names
            effects[f"{block}/predicted"] = one.predicted.astype(np.float32)
            effects[f"{block}/reference"] = one.effects.astype(np.float32)
    for path, arrays in ((place.parts, parts), (place.effects, effects)):
        if arrays:
            _write_arrays(path, arrays)
    write_text_atomic(place.table, rows.to_csv(index=False, float_format="%.7g"))
    place.failure.unlink(missing_ok=True)


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    staging = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez_compressed(staging, allow_pickle=False, **arrays)
    os.replace(staging, path)


def _write_failure(path: Path, error: Exception) -> None:
    text = " ".join(str(error).split())
    reason = text if isinstance(error, CradleError) else f"{type(error).__name__}: {text}"
    trace = "".join(traceback.format_exception(error))
    write_text_atomic(path, json.dumps({"reason": reason, "traceback": trace}, indent=1))


def _stored_reason(path: Path) -> str:
    return str(read_json(path).get("reason", NO_REASON))


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
