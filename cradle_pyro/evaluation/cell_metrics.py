"""Distances between samples of cells, and the genes that differ between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse, stats
from scipy.spatial.distance import cdist

from cradle_pyro.data.groups import log2_fraction
from cradle_pyro.errors import DataError

__all__ = [
    "DifferentialGenes",
    "de_direction",
    "de_overlap",
    "differential_genes",
    "energy_distance",
    "log_pca",
    "mmd",
]

_SIGNIFICANT = 0.05
_LEAST_CELLS = 2


class DifferentialGenes(NamedTuple):
    """Which genes differ between the cells of a label and the controls.

    Parameters
    ----------
    p_adjusted
        p-values of Wilcoxon's rank-sum test, Benjamini-Hochberg adjusted over the genes of each
        label, shape (labels, genes).
    change
        Difference of mean log2(1 + 1e4 count / library), shape (labels, genes).
    """

    p_adjusted: np.ndarray
    change: np.ndarray

    @property
    def significant(self) -> np.ndarray:
        """Where the adjusted p-value is below 0.05, bool, shape (labels, genes)."""
        return self.p_adjusted < _SIGNIFICANT


def energy_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the E-distance between two samples of cells.

    2 E|x - y| - E|x - x'| - E|y - y'| with Euclidean distances, unbiased: a cell is not compared
    with itself. About zero for samples of one distribution, and then as often below as above.

    Parameters
    ----------
    first, second
        Cells x features, at least two cells each.

    References
    ----------
    Székely and Rizzo, "Energy statistics", Journal of Statistical Planning and Inference 2013.
    Peidli et al., "scPerturb", Nature Methods 2024 (there with squared distances).
    """
    first, second = _samples(first, second)
    within = sum(_off_diagonal_mean(cdist(cells, cells)) for cells in (first, second))
    return float(2 * cdist(first, second).mean() - within)


def mmd(first: np.ndarray, second: np.ndarray, *, bandwidth: float | None = None) -> float:
    """Return the squared maximum mean discrepancy of two samples, with a Gaussian kernel.

    Unbiased, so that it may be below zero.

    Parameters
    ----------
    first, second
        Cells x features, at least two cells each.
    bandwidth
        Standard deviation of the kernel; the median distance between pooled cells if omitted.

    References
    ----------
    Gretton et al., "A kernel two-sample test", JMLR 2012, equation 3.
    """
    first, second = _samples(first, second)
    across = cdist(first, second, "sqeuclidean")
    inside = [cdist(cells, cells, "sqeuclidean") for cells in (first, second)]
    if bandwidth is None:
        apart = [part[np.triu_indices(len(part), 1)] for part in inside]
        bandwidth = float(np.sqrt(np.median(np.concatenate([across.ravel(), *apart]))))
    if not bandwidth > 0:
        return 0.0  # all cells are alike

    def kernel(square: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * square / bandwidth**2)

    within = sum(_off_diagonal_mean(kernel(part)) for part in inside)
    return float(within - 2 * kernel(across).mean())


def log_pca(
    counts: Any, library: np.ndarray, *, n_components: int = 20, seed: int = 0
) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Return a map of cells to principal components of log2(1 + 1e4 count / library).

    Parameters
    ----------
    counts, library
        Training cells, shapes (cells, genes) and (cells,); the components are learned from them.
    n_components
        At most one less than there are genes and cells.
    seed
        Of the randomised decomposition.

    Returns
    -------
    Callable
        Takes counts and libraries, returns cells x components.
    """
    from sklearn.decomposition import PCA

    values = _log_expression(counts, library)
    size = min(n_components, min(values.shape) - 1)
    if size < 1:
        raise DataError(f"Components need two cells and two genes, found shape {values.shape}.")
    fitted = PCA(size, random_state=seed).fit(values)

    def project(counts: Any, library: np.ndarray) -> np.ndarray:
        return np.asarray(fitted.transform(_log_expression(counts, library)))

    return project


def differential_genes(
    counts: Any, library: np.ndarray, groups: Mapping[str, np.ndarray], control_rows: np.ndarray
) -> DifferentialGenes:
    """Return which genes differ between each label's cells and the controls.

    Parameters
    ----------
    counts, library
        Cells, shapes (cells, genes) and (cells,).
    groups
        Row positions of each label, in the order of the returned rows.
    control_rows
        Row positions of the controls.

    Raises
    ------
    DataError
        When a group or the controls have fewer than two cells.
    """
    sizes = {name: len(rows) for name, rows in (*groups.items(), ("control", control_rows))}
    small = [name for name, size in sizes.items() if size < _LEAST_CELLS]
    if small:
        raise DataError(f"A test needs two cells on either side; fewer are there of {small}.")
    values = _log_expression(counts, library)
    control = values[control_rows]
    p_values, change = [], []
    for rows in groups.values():
        cells = values[rows]
        found = stats.mannwhitneyu(cells, control, axis=0, method="asymptotic").pvalue
        # A gene with one value in all cells has no ranks to compare.
        p_values.append(stats.false_discovery_control(np.nan_to_num(found, nan=1.0)))
        change.append(cells.mean(0) - control.mean(0))
    return DifferentialGenes(np.array(p_values), np.array(change))


def de_overlap(predicted: DifferentialGenes, reference: DifferentialGenes) -> np.ndarray:
    """Return how many of each label's differential genes are found, in [0, 1]; shape (labels,).

    With n genes significant in the reference, the share of them among the n predicted significant
    genes of largest change. nan for a label without a differential gene.
    """
    scores = np.full(len(reference.change), np.nan)
    for row, true in enumerate(reference.significant):
        n = int(true.sum())
        if n:
            size = np.where(predicted.significant[row], np.abs(predicted.change[row]), -1.0)
            top = np.argsort(-size, kind="stable")[:n]
            scores[row] = (true[top] & (size[top] >= 0)).sum() / n
    return scores


def de_direction(predicted: DifferentialGenes, reference: DifferentialGenes) -> np.ndarray:
    """Return the share of each label's differential genes that change as predicted; (labels,).

    No predicted change counts as half. nan for a label without a differential gene.
    """
    agreement = 0.5 + 0.5 * np.sign(predicted.change) * np.sign(reference.change)
    count = reference.significant.sum(1)
    total = (agreement * reference.significant).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _log_expression(counts: Any, library: np.ndarray) -> np.ndarray:
    dense = counts.toarray() if sparse.issparse(counts) else np.asarray(counts)
    return log2_fraction(dense / np.asarray(library, dtype=np.float64)[:, None])


def _samples(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(cells, dtype=np.float64) for cells in (first, second))
    shapes = first.shape, second.shape
    if any(len(shape) != 2 or shape[0] < _LEAST_CELLS for shape in shapes) or (
        first.shape[1] != second.shape[1]
    ):
        raise DataError(
            "A distance needs two samples (cells, features) of at least two cells and the same "
            f"features, found {first.shape} and {second.shape}."
        )
    return first, second


def _off_diagonal_mean(values: np.ndarray) -> float:
    n = len(values)
    return float((values.sum() - np.trace(values)) / (n * (n - 1)))
