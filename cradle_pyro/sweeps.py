"""Many runs on one screen: settings and seeds side by side, each in a run directory of its own."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from cradle_pyro.config import Config
from cradle_pyro.data.fields import check_directory, read_screen, write_text_atomic
from cradle_pyro.errors import ConfigError, CradleError, DataError
from cradle_pyro.inference.objectives import COUNTERFACTUAL
from cradle_pyro.queries.progress import progress_bar
from cradle_pyro.workflow import train_run

__all__ = ["Trial", "run_trial", "summary", "sweep", "trials_of", "varied_from"]

TABLE = "sweep.csv"
_RECORD = "trial.json"


class Trial(NamedTuple):
    """One run of a sweep.

    Attributes
    ----------
    settings
        Name to value, both as text, of the settings that vary.
    seed
        Of the training.
    """

    settings: tuple[tuple[str, str], ...]
    seed: int

    @property
    def name(self) -> str:
        """Name of the run directory."""
        parts = [f"{key.rpartition('.')[2]}={value}" for key, value in self.settings]
        text = ",".join([*parts, f"seed={self.seed}"])
        return "".join(c if c.isalnum() or c in "=,._-" else "_" for c in text)

    def configure(self, config: Config) -> Config:
        """Return `config` with this trial's settings."""
        settings = [f"{key}={value}" for key, value in self.settings]
        return config.with_settings([*settings, f"train.seed={self.seed}"])


def trials_of(varied: Mapping[str, Sequence[str]], seeds: Iterable[int]) -> list[Trial]:
    """Return all combinations of the values of all settings, each with every seed.

    Examples
    --------
    >>> [trial.name for trial in trials_of({"model.n_latents": ["8", "16"]}, [0])]
    ['n_latents=8,seed=0', 'n_latents=16,seed=0']
    """
    names, values = list(varied), list(varied.values())
    chosen = [tuple(zip(names, combination, strict=True)) for combination in product(*values)]
    return [Trial(settings, seed) for settings in chosen for seed in seeds]


def varied_from(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings to vary and their values, of texts such as ``section.key=8,16``.

    A value that is a list or a table is left whole; more of them are given one by one.

    Raises
    ------
    ConfigError
        If there is no text, or one without ``=`` or without a value.

    Examples
    --------
    >>> varied_from(["model.n_latents=8,16", "guide.encoder={hidden=64, layers=1}"])
    {'model.n_latents': ['8', '16'], 'guide.encoder': ['{hidden=64, layers=1}']}
    """
    varied: dict[str, list[str]] = {}
    for text in texts:
        key, equals, rest = (part.strip() for part in text.partition("="))
        values = [rest] if any(c in rest for c in "[{") else [v.strip() for v in rest.split(",")]
        if not equals or not key or not all(values):
            raise ConfigError(f"Expected section.key=value,value, found '{text}'.")
        varied.setdefault(key, []).extend(values)
    if not varied:
        raise ConfigError("Nothing varies. Example: --vary model.n_latents=8,16")
    return varied


def summary(table: pd.DataFrame, varied: Sequence[str]) -> pd.DataFrame:
    """Return mean and standard deviation over seeds of the bound of each setting, best first."""
    if "bound" not in table:
        return pd.DataFrame(columns=["bound", "sd", "seconds", "runs"])
    found = table.dropna(subset="bound").groupby(list(varied), sort=False)
    columns = {
        "bound": found["bound"].mean(),
        "sd": found["bound"].std(),
        "seconds": found["seconds"].mean(),
        "runs": found.size(),
    }
    return pd.DataFrame(columns).sort_values("bound")


def run_trial(path: str | Path, out: str | Path, config: Config) -> dict[str, float]:
    """Train on a screen, or go on where that stopped, and return how well it went.

    Parameters
    ----------
    path
        The screen.
    out
        Run directory. What is there of a run of this screen with these settings is kept; what is
        there of a run with others is replaced.
    config
        Settings.

    Returns
    -------
    dict
        Of the epoch with the lowest validation loss: ``bound``, the validation loss without the
        counterfactual term, that is -ELBO in nats per cell; ``loss``; ``epoch``. And ``epochs`` and
        ``seconds``, of all of them since the run was last started. Without validation cells the
        first two are those of training, after the last epoch.

    Raises
    ------
    CradleError
        For a mistake in the data or the configuration, or if `out` holds anything but such a run.
    """
    path, out = Path(path), Path(out)
    asked = {"config": config.to_toml(), "screen": _state_of(path)}
    known = _read(out / _RECORD)
    if known | asked != known:
        _clear(out)
    elif "figures" in known:
        return dict(known["figures"])
    write_text_atomic(out / _RECORD, json.dumps(asked))
    start = time.perf_counter()
    resume = (out / "checkpoints" / "last.ckpt").is_file()
    history = train_run(path, out, config, resume=resume, progress=False).history
    stage = "val" if "val_loss" in history else "train"
    best = int(history["val_loss"].argmin()) if stage == "val" else len(history) - 1
    row = history.iloc[best]
    figures = {
        "bound": float(row[f"{stage}_loss"] - row.get(f"{stage}_{COUNTERFACTUAL}", 0.0)),
        "loss": float(row[f"{stage}_loss"]),
        "epoch": float(row["epoch"]),
        "epochs": float(len(history)),
        "seconds": time.perf_counter() - start,
    }
    write_text_atomic(out / _RECORD, json.dumps(asked | {"figures": figures}))
    return figures


def sweep(
    path: str | Path,
    out: str | Path,
    varied: Mapping[str, Sequence[str]],
    config: Config | None = None,
    *,
    seeds: Sequence[int] = (0,),
    jobs: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Train all combinations of settings and seeds, `jobs` at a time; what is done is kept.

    Parameters
    ----------
    path
        The screen.
    out
        Directory for the table ``sweep.csv`` and for the run directories, in ``runs``.
    varied
        Setting (``section.key``) to the values to try, as text.
    config
        All other settings.
    seeds
        Seeds of training; the split is that of `config`.
    jobs
        Runs at a time, each in a process that has its share of the cores.
    progress
        Show a progress bar.

    Returns
    -------
    DataFrame
        A row for every run: its settings, ``seed``, the figures of :func:`run_trial`, and
        ``failed``, why a run has none.

    Raises
    ------
    CradleError
        For a screen that cannot be read or a setting that cannot be, before any training.
    """
    from joblib import Parallel, delayed

    path, out = Path(path), Path(out)
    config = config or Config()
    trials = trials_of(varied, seeds)
    if len({trial.name for trial in trials}) < len(trials):
        raise ConfigError("Two runs of the sweep would be the same: a value or a seed is repeated.")
    configs = [trial.configure(config) for trial in trials]
    check_directory(out)
    read_screen(path, backed=True)
    rows: dict[int, dict[str, Any]] = {}
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered")
    work = (
        delayed(_tried)(number, path, out / "runs" / trial.name, one)
        for number, (trial, one) in enumerate(zip(trials, configs, strict=True))
    )
    with progress_bar("Training", len(trials), show=progress) as advance:
        for number, found in parallel(work):
            trial = trials[number]
            rows[number] = dict(trial.settings) | {"seed": trial.seed} | found
            table = pd.DataFrame([rows[place] for place in sorted(rows)])
            write_text_atomic(out / TABLE, table.to_csv(index=False))
            advance()
    return table


def _tried(number: int, path: Path, out: Path, config: Config) -> tuple[int, dict[str, Any]]:
    """Return a trial's figures, or why it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return number, {**run_trial(path, out, config), "failed": ""}
        except CradleError as error:
            return number, {"failed": " ".join(str(error).split())}


def _state_of(path: Path) -> list[Any]:
    """Return what tells a screen from another one, or from itself once it is written again."""
    if not path.is_file():
        return [str(path.resolve())]
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


def _clear(out: Path) -> None:
    """Remove a run of other settings; anything else is left alone."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / _RECORD).is_file():
        raise DataError(
            f"'{out}' is in the way: it holds no run of a sweep. Move it, or write elsewhere."
        )
    shutil.rmtree(out)


def _read(record: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
