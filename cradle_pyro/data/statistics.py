"""Statistics of the training cells, in one streaming pass."""

from __future__ import annotations

import numpy as np
import torch

from cradle_pyro.data.dataset import CellData
from cradle_pyro.errors import DataError
from cradle_pyro.types import Statistics

__all__ = ["training_statistics"]

_INVERSE_DISPERSION_RANGE = (0.3, 100.0)


def training_statistics(train: CellData) -> Statistics:
    """Return what the model's starting values and the encoders' input need.

    Parameters
    ----------
    train
        Training cells only: validation, test and query cells are read with the same constants.

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
    )


def _tensor(values: np.ndarray | float) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)
