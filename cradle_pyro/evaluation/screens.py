"""The cells of a benchmark's screen: simulated or read, corrupted, thinned, annotated and split."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cradle_pyro.config import Config
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.fields import read_screen
from cradle_pyro.data.prepare import cell_data, prepare
from cradle_pyro.errors import DataError, shown
from cradle_pyro.evaluation.grid import Benchmark, Corruption, GridScreen, GridSplit, Kept
from cradle_pyro.evaluation.truth import Truth, truth_of
from cradle_pyro.simulate.corrupt import corrupt
from cradle_pyro.simulate.perturbseq import simulate_perturbseq

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "BuiltScreen",
    "build_screen",
    "check_screen",
    "check_split",
    "file_digest",
    "learned_cells",
    "view_of",
]

_SPLIT = "benchmark_split"
_ANNOTATION = ("cradle_qc", "cradle_artifact")
_LEARNED_FROM = ("train", "val")


class BuiltScreen(NamedTuple):
    """A screen under a split and a seed.

    Parameters
    ----------
    adata
        With its annotation.
    data
        The same cells with their split.
    truth
        Of the labels in `data`; None for a real screen.
    artifact
        How flags were read, as in the configuration.
    """

    adata: AnnData
    data: CellData
    truth: Truth | None
    artifact: str


def build_screen(
    benchmark: Benchmark,
    screen: GridScreen,
    split: GridSplit,
    seed: int,
    *,
    learned_only: bool = False,
) -> BuiltScreen:
    """Return a screen as its predictors see it.

    Parameters
    ----------
    benchmark, screen, split, seed
        A place in the grid. The seed makes the simulation, the corruption, the choice of the kept
        cells and the split.
    learned_only
        Without test cells: they are dropped before anything is computed from the screen.

    Raises
    ------
    CradleError
        If the file, the simulation or the split is not possible.
    """
    config = benchmark.screen_config(screen, split, seed)
    adata = _read(benchmark, screen, seed)
    on_validation = screen.judged_on == "validation"
    if screen.corrupt is not None or screen.keep != Kept() or learned_only or on_validation:
        adata = _divided(adata, config)
        if on_validation:
            adata = _with_validation_as_test(_learned(adata), seed)
        if learned_only:
            adata = _learned(adata)
        if screen.corrupt is not None:
            adata = _corrupted(adata, screen.corrupt, config, seed)
        adata = _kept(adata, screen.keep, config, seed)
        config = _by_column(config)
    prepared = prepare(adata, config)
    truth = truth_of(prepared.adata)
    if truth is not None:
        present = set(prepared.data.labels.tolist())
        rows = [i for i, label in enumerate(truth.labels) if label in present]
        labels = [truth.labels[i] for i in rows]
        truth = truth._replace(labels=labels, effects=truth.effects[rows])
    return BuiltScreen(prepared.adata, prepared.data, truth, config.data.artifact)


def check_split(benchmark: Benchmark, screen: GridScreen, split: GridSplit, seed: int) -> None:
    """Raise a DataError unless a screen can be divided under a seed; nothing is annotated."""
    config = benchmark.screen_config(screen, split, seed)
    adata = _divided(_read(benchmark, screen, seed), config)
    found = adata.obs[_SPLIT].astype(str).tolist()
    missing = [name for name in (*_LEARNED_FROM, "test") if name not in found]
    if missing:
        raise DataError(f"the split of seed {seed} leaves no cells for {shown(missing)}.")


def check_screen(built: BuiltScreen, *, where: str) -> None:
    """Raise a DataError unless there are controls and cells in every split."""
    split, labels = np.asarray(built.data.split), built.data.labels
    for name in (*_LEARNED_FROM, "test"):
        if not (split == name).any():
            raise DataError(f"{where}: the split leaves no cells for '{name}'.")
    control = built.data.schema.control
    for name in ("train", "test"):
        if not ((split == name) & (labels == control) & built.data.passing).any():
            raise DataError(
                f"{where}: no passing control cell ('{control}') among the cells of '{name}'."
            )


def view_of(built: BuiltScreen, config: Config) -> CellData:
    """Return the cells with the artifact flags of a predictor's configuration; cells as they were.

    Parameters
    ----------
    built
        A screen.
    config
        Its data section may differ from the screen's in the artifact flags only.
    """
    if config.data.artifact == built.artifact:
        return built.data
    return cell_data(built.adata, config.data).with_split(np.asarray(built.data.split))


@cache
def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, once for each path."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(benchmark: Benchmark, screen: GridScreen, seed: int) -> AnnData:
    if screen.simulate is not None:
        return simulate_perturbseq(**screen.simulate, seed=seed)  # type: ignore[arg-type]
    return read_screen(benchmark.screen_path(screen))


def _by_column(config: Config) -> Config:
    return config.with_settings(["split.method=column", f"split.key={_SPLIT}"])


def _divided(adata: AnnData, config: Config) -> AnnData:
    """Return a screen with its split as a column; no annotation is made or used."""
    bare = config.with_settings(["data.artifact=none", "data.n_top_genes=none"])
    data = prepare(adata, bare).data
    adata.obs[_SPLIT] = np.asarray(data.split)
    return adata


def _learned(adata: AnnData) -> AnnData:
    return adata[adata.obs[_SPLIT].isin(_LEARNED_FROM).to_numpy()].copy()


def _with_validation_as_test(adata: AnnData, seed: int) -> AnnData:
    """Return cells with the validation cells as test cells and as many training cells for them."""
    split = adata.obs[_SPLIT].to_numpy().astype("U5")
    validation, training = np.flatnonzero(split == "val"), np.flatnonzero(split == "train")
    split[validation] = "test"
    split[np.random.default_rng([seed, 2]).permutation(training)[: len(validation)]] = "val"
    adata.obs[_SPLIT] = split
    return adata


def _labels(adata: AnnData, config: Config) -> np.ndarray:
    options = config.data.model_copy(update={"artifact": "none"})
    return cell_data(adata, options).labels


def _corrupted(adata: AnnData, options: Corruption, config: Config, seed: int) -> AnnData:
    """Return a screen in which some passing cells that are learned from carry known artifacts.

    They are found with thresholds of the screen as it was; the new annotation is left to others.
    """
    passing = prepare(adata.copy(), _by_column(config)).data.passing
    learned = adata.obs[_SPLIT].isin(_LEARNED_FROM).to_numpy()
    result = corrupt(
        adata,
        options.kinds,
        share=options.share,
        degree=options.degree,
        seed=seed,
        layer=config.data.layer,
        eligible=passing & learned,
        total_key=config.data.library_key,
        mito_key=config.qc.pct_mito_key,
    )
    for table in (result.uns, result.obs):
        for key in [key for key in table if str(key).startswith(_ANNOTATION)]:
            del table[key]
    return result


def _kept(adata: AnnData, keep: Kept, config: Config, seed: int) -> AnnData:
    """Return the cells that are left to learn from, and the test cells."""
    labels = _labels(adata, config)
    split = adata.obs[_SPLIT].to_numpy().astype(str)
    rng = np.random.default_rng([seed, 1])
    kept = np.ones(len(labels), dtype=bool)
    if keep.train_pairs is not None:
        kept &= ~np.isin(labels, _dropped_pairs(labels, split, keep.train_pairs, config, rng))
    if keep.cells_per_perturbation is not None:
        share = config.split.validation / config.split.train
        most = {
            "train": keep.cells_per_perturbation,
            "val": max(round(share * keep.cells_per_perturbation), 1),
        }
        for label in np.unique(labels[labels != config.data.control]):
            for name, number in most.items():
                rows = np.flatnonzero((labels == label) & (split == name))
                kept[rng.permutation(rows)[number:]] = False
    return adata[kept].copy()


def _dropped_pairs(
    labels: np.ndarray, split: np.ndarray, share: float, config: Config, rng: np.random.Generator
) -> list[str]:
    """Return the combinations that are neither kept in training nor held out."""
    delimiter = config.data.delimiter
    pairs = sorted({label for label in labels.tolist() if delimiter in label})
    trained = [pair for pair in pairs if (split[labels == pair] == "train").any()]
    n_kept = round(share * len(pairs))
    if n_kept > len(trained):
        raise DataError(
            f"train_pairs = {share:g} asks for {n_kept} of {len(pairs)} combinations in training; "
            f"the split leaves {len(trained)}: {shown(trained)}. Lower it or hold out fewer."
        )
    # One order for all shares, so that those kept at a small share are kept at a larger one too.
    return rng.permutation(np.array(trained, dtype=object))[n_kept:].tolist()


def learned_cells(data: CellData) -> CellData:
    """Return the training and validation cells, all that a predictor may see."""
    return data.subset(np.isin(np.asarray(data.split), _LEARNED_FROM))
