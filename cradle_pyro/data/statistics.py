"""Statistics of the training cells, in one streaming pass."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.encode import combination_labels
from cradle_pyro.data.regression import combinations_of, regress
from cradle_pyro.errors import DataError
from cradle_pyro.types import EffectStart, Statistics

__all__ = ["raw_effects", "regression_effects", "training_statistics"]

_INVERSE_DISPERSION_RANGE = (0.3, 100.0)
_LARGEST_ERROR = 3.0
_MOST_ENTRIES = 500_000_000
_MOST_INFORMATION = 100_000_000


def training_statistics(train: CellData, *, interaction_cells: int | None = None) -> Statistics:
    """Return what the model's starting values and the encoders' input need.

    Parameters
    ----------
    train
        Training cells only: validation, test and query cells are read with the same constants.
    interaction_cells
        Least number of cells of the combinations that are named. None: none is.

    Returns
    -------
    Statistics
        Moments per gene; the inverse dispersion is the method-of-moments estimate around
        library * mean fraction, so it includes variation between cells.

    Raises
    ------
    DataError
        If there are no cells.
    """
    n_cells, n_genes = train.n_cells, train.schema.n_genes
    if not n_cells:
        raise DataError("Expected training cells, found none: check the split.")
    library = train.library.astype(np.float64)
    sums = {name: np.zeros(n_genes) for name in ("log", "log2", "x2", "xl", "fraction")}
    is_log = train.values == "lognorm"
    for rows, counts in train.iter_rows():
        depth = library[rows]
        counts = counts.astype(np.float64)
        logs = counts.copy()
        if not is_log:
            logs.data = np.log1p(logs.data)
        sums["log"] += np.asarray(logs.sum(0)).ravel()
        sums["log2"] += np.asarray(logs.multiply(logs).sum(0)).ravel()
        sums["x2"] += np.asarray(counts.multiply(counts).sum(0)).ravel()
        sums["xl"] += counts.T @ depth
        sums["fraction"] += counts.T @ (np.ones_like(depth) if is_log else 1 / depth)
    fraction = sums["fraction"] / n_cells
    log_mean = sums["log"] / n_cells
    log_variance = np.maximum(sums["log2"] / n_cells - log_mean**2, 0)
    expected_square = fraction**2 * (library**2).sum()
    excess = sums["x2"] - 2 * fraction * sums["xl"] + expected_square - fraction * library.sum()
    inverse_dispersion = expected_square / np.maximum(excess, 1e-8 * expected_square + 1e-12)
    log_library = np.log(library)
    return Statistics(
        n_cells=n_cells,
        log_mean=_tensor(log_mean),
        log_sd=_tensor(np.sqrt(log_variance)),
        fraction=_tensor(fraction),
        inverse_dispersion=_tensor(inverse_dispersion.clip(*_INVERSE_DISPERSION_RANGE)),
        log_library_mean=_tensor(log_library.mean()),
        log_library_sd=_tensor(max(log_library.std(), 1e-2)),
        artifact_share=_tensor((train.artifact > 0).mean(0)),
        failing_share=_tensor(train.failing.mean()),
        combinations=_tensor(combinations_of(train, interaction_cells)),
    )


def raw_effects(train: CellData, statistics: Statistics) -> EffectStart:
    """Return raw log-fold changes of perturbations and combinations, with standard errors.

    Parameters
    ----------
    train
        Training cells. A perturbation is estimated from its passing cells that carry nothing
        else, or, where there are none, from all cells that carry it; a combination from the
        passing cells that carry just that.
    statistics
        Of the same cells.

    Returns
    -------
    EffectStart
        log of pooled counts over pooled library against control, half a count added; errors from
        the negative-binomial Fisher information, n l f θ / (θ + l f) for n cells of mean library l.
        For log-normalised values: differences of means, errors from the gene's variance.
    """
    members, reference = _groups(train, statistics.combinations.numpy())
    groups = [reference, *members]
    weights = sp.csr_array(
        (
            np.ones(sum(map(len, groups))),
            (np.repeat(np.arange(len(groups)), [len(g) for g in groups]), np.concatenate(groups)),
        ),
        shape=(len(groups), train.n_cells),
    )
    totals = np.zeros((len(groups), train.schema.n_genes))
    for rows, counts in train.iter_rows():
        totals += (weights[:, rows] @ counts.astype(np.float64)).toarray()
    n_cells = weights.sum(1)[:, None]
    if train.values == "lognorm":
        means = totals / n_cells
        errors = statistics.log_sd.numpy() / np.sqrt(n_cells)
    else:
        fraction = np.maximum(statistics.fraction.numpy().astype(np.float64), 1e-9)
        library = (weights @ train.library.astype(np.float64))[:, None]
        means = np.log((totals + 0.5) / (library + 0.5 / fraction))
        theta = statistics.inverse_dispersion.numpy()
        expected = library / n_cells * fraction
        errors = 1 / np.sqrt(n_cells * expected * theta / (theta + expected) + 0.25)
    loc, own = means[1:] - means[0], errors[1:]
    combinations = statistics.combinations.numpy().astype(np.float64)
    split = len(loc) - len(combinations)
    loc[split:] -= combinations @ loc[:split]
    # The error of the control stands once in the combination, and once in each of its members.
    shared = np.concatenate([np.ones(split), combinations.sum(1) - 1])[:, None] * errors[0]
    own[split:] = np.sqrt(own[split:] ** 2 + combinations @ own[:split] ** 2)
    return EffectStart(_tensor(loc), _tensor(np.hypot(own, shared)))


def regression_effects(train: CellData, statistics: Statistics) -> EffectStart:
    """Return log-fold changes of perturbations and combinations, estimated together.

    Parameters
    ----------
    train
        Training cells; those whose flags are known are used.
    statistics
        Of the same cells.

    Returns
    -------
    EffectStart
        From a negative-binomial regression on perturbations, combinations, covariates and flags
        (:mod:`cradle_pyro.data.regression`): what is left for each effect to explain, given the
        posterior means of all others under a sparse prior, and its error. An effect of which the
        cells say next to nothing is zero, with an error of three. `raw_effects` in its place for
        log-normalised values, without controls whose flags are known, and for screens on which a
        regression would take longer or more memory than it is worth (over 5e8 counts, or over 1e8
        terms of information: genes times pairs of columns that meet in a cell).
    """
    known = train.subset(train.artifact_observed)
    schema, members = train.schema, statistics.combinations.numpy()
    n_nuisance = schema.n_covariate_levels + schema.n_artifacts + 1
    n_columns = schema.n_perturbations + len(members) + n_nuisance
    n_pairs = n_columns * (n_nuisance + 1) + (known.perturbation.T @ known.perturbation).nnz
    has_controls = bool((known.labels == schema.control).any())
    too_large = (
        known.n_cells * schema.n_genes > _MOST_ENTRIES
        or n_pairs * schema.n_genes > _MOST_INFORMATION
    )
    if train.values == "lognorm" or not has_controls or too_large:
        return raw_effects(train, statistics)
    found, _ = regress(known, members, flags=True)
    told = found.error < _LARGEST_ERROR
    return EffectStart(
        _tensor(np.where(told, found.observed, 0.0)),
        _tensor(np.where(told, found.error, _LARGEST_ERROR)),
    )


def _groups(train: CellData, combinations: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the cells each effect is estimated from, and the controls (else all cells)."""
    design = sp.csc_array(train.perturbation)
    carried = np.asarray((train.perturbation > 0).sum(1)).ravel()
    passing = train.passing
    members = []
    for column in range(design.shape[1]):
        rows = design.indices[design.indptr[column] : design.indptr[column + 1]]
        alone = rows[(carried[rows] == 1) & passing[rows]]
        members.append(alone if len(alone) else rows)
    for label in combination_labels(combinations, train.schema):
        exact = np.flatnonzero(train.labels == label)
        members.append(exact[passing[exact]] if passing[exact].any() else exact)
    controls = np.flatnonzero(carried == 0)
    clean = controls[passing[controls]]
    choices = (clean, controls, np.arange(train.n_cells))
    return members, next(rows for rows in choices if len(rows))


def _tensor(values: np.ndarray | float) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)
