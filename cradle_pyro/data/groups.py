"""Groups of cells and their moments, streamed over a screen that is never densified.

Effects of perturbations are differences between functionals of groups of cells. Both functionals
in use are means over cells of something that is zero where a count is zero, so that one pass over
the stored entries, a few thousand cells at a time, gives them for all groups at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from cradle_pyro.errors import DataError, shown
from cradle_pyro.types import SCALE

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData

__all__ = [
    "SCALE",
    "Functional",
    "GroupMoments",
    "Grouping",
    "cell_groups",
    "group_moments",
    "label_groups",
    "log2_fraction",
    "marginal_groups",
]

Functional = Literal["log_mean", "mean_log"]
Grouping = Literal["label", "marginal"]


def log2_fraction(fraction: np.ndarray) -> np.ndarray:
    """Return log2(1 + 1e4 * fraction), the scale on which effects are stated."""
    return np.log2(1.0 + SCALE * np.asarray(fraction, dtype=np.float64))


@dataclass(frozen=True)
class GroupMoments:
    """First and second moments of the cells of each group, per gene.

    With f = count / library and y = log2(1 + 1e4 f), per cell and gene.

    Parameters
    ----------
    labels
        Names of the groups.
    n_cells
        Cells in each group, shape (groups,).
    fraction, fraction_sq
        Means over the group's cells of f and of f squared, shape (groups, genes).
    log, log_sq
        Means over the group's cells of y and of y squared, shape (groups, genes).
    inverse_library
        Mean over the group's cells of 1 / library, shape (groups,): times the mean of f it is the
        Poisson part of the variance of f.
    """

    labels: tuple[str, ...]
    n_cells: np.ndarray
    fraction: np.ndarray
    fraction_sq: np.ndarray
    log: np.ndarray
    log_sq: np.ndarray
    inverse_library: np.ndarray

    def value(self, functional: Functional) -> np.ndarray:
        """Return the functional of each group, shape (groups, genes), log2 scale.

        ``"log_mean"`` is log2(1 + 1e4 mean f), ``"mean_log"`` the mean of log2(1 + 1e4 f).
        """
        if functional not in ("log_mean", "mean_log"):
            raise DataError(
                f"functional must be 'log_mean' or 'mean_log', found {functional!r}; "
                "choose 'log_mean' for expected profiles and 'mean_log' for observed cells."
            )
        return log2_fraction(self.fraction) if functional == "log_mean" else self.log

    def row(self, label: str) -> int:
        """Return the position of `label` among the groups."""
        return self.labels.index(label)


def group_moments(
    counts: Any,
    library: np.ndarray,
    groups: Mapping[str, np.ndarray],
    *,
    values: Literal["counts", "lognorm"] = "counts",
    chunk: int = 4096,
) -> GroupMoments:
    """Return the moments of groups of cells, streaming over the rows of `counts`.

    Parameters
    ----------
    counts
        Anything that gives rows (cells, genes) by slice: a scipy sparse matrix, a dense array, a
        backed AnnData matrix. Only `chunk` rows are held at a time.
    library
        Library size of every cell, in counts, shape (cells,).
    groups
        Row positions of each group; groups may share cells.
    values
        ``"lognorm"`` when `counts` holds log(1 + 1e4 f) (natural logarithm) instead of counts.
    chunk
        Rows read at a time.

    Raises
    ------
    DataError
        When a group is empty or names rows that do not exist.
    """
    n_cells, n_genes = counts.shape
    rows = {str(label): np.asarray(member, dtype=np.int64) for label, member in groups.items()}
    _check_groups(rows, n_cells)
    member = _membership(rows, n_cells)
    inverse = 1.0 / np.asarray(library, dtype=np.float64)
    totals = np.zeros((4, len(rows), n_genes))
    used = np.flatnonzero(member.sum(axis=0))
    for start in range(0, n_cells, chunk):
        stop = min(start + chunk, n_cells)
        here = used[np.searchsorted(used, start) : np.searchsorted(used, stop)]
        if len(here) == 0:
            continue
        block = sparse.csr_array(counts[start:stop])[here - start]
        weights = member[:, here]
        for position, term in enumerate(_terms(block, inverse[here], values)):
            totals[position] += (weights @ term).toarray()
    sizes = np.array([len(value) for value in rows.values()], dtype=np.float64)
    means = totals / sizes[:, None]
    return GroupMoments(
        labels=tuple(rows),
        n_cells=sizes.astype(np.int64),
        fraction=means[0],
        fraction_sq=means[1],
        log=means[2],
        log_sq=means[3],
        inverse_library=(member @ inverse) / sizes,
    )


def label_groups(
    data: CellData, *, min_cells: int = 1, passing: bool = False
) -> dict[str, np.ndarray]:
    """Return the rows of each canonical label, control included, labels sorted.

    Parameters
    ----------
    data
        Cells.
    min_cells
        Labels with fewer cells are left out (the control never is).
    passing
        Use only cells without an artifact.
    """
    kept = np.asarray(data.passing) if passing else np.ones(data.n_cells, dtype=bool)
    positions = np.flatnonzero(kept)
    labels = np.asarray(data.labels).astype(str)[positions]
    names, inverse = np.unique(labels, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    bounds = np.searchsorted(inverse[order], np.arange(len(names) + 1))
    groups = {
        str(name): positions[order[bounds[i] : bounds[i + 1]]] for i, name in enumerate(names)
    }
    control = data.schema.control
    return {
        name: rows for name, rows in groups.items() if name == control or len(rows) >= min_cells
    }


def marginal_groups(
    data: CellData, *, min_cells: int = 1, passing: bool = False
) -> dict[str, np.ndarray]:
    """Return, for each elementary perturbation, the cells that carry it in any combination.

    For screens of high multiplicity, where most combinations occur once. The control group holds
    the cells that carry none. Parameters as in `label_groups`.
    """
    kept = np.asarray(data.passing) if passing else np.ones(data.n_cells, dtype=bool)
    design = sparse.csc_array(data.perturbation, copy=True)
    design.eliminate_zeros()  # a dosage stored as zero is no dosage
    carries_none = np.bincount(design.indices, minlength=data.n_cells) == 0
    groups: dict[str, np.ndarray] = {}
    for column, name in enumerate(data.schema.perturbations):
        rows = np.sort(design.indices[design.indptr[column] : design.indptr[column + 1]])
        rows = rows[kept[rows]].astype(np.int64)
        if len(rows) >= max(min_cells, 1):
            groups[name] = rows
    control = np.flatnonzero(carries_none & kept)
    return {data.schema.control: control, **groups} if len(control) else groups


def cell_groups(
    data: CellData, grouping: Grouping, *, min_cells: int = 1, passing: bool = False
) -> dict[str, np.ndarray]:
    """Return `label_groups` or `marginal_groups`, by name, and insist on a control group.

    Raises
    ------
    DataError
        When `grouping` is unknown or no control cell is left.
    """
    if grouping not in ("label", "marginal"):
        raise DataError(f"grouping must be 'label' or 'marginal', found {grouping!r}.")
    chosen = label_groups if grouping == "label" else marginal_groups
    groups = chosen(data, min_cells=min_cells, passing=passing)
    if data.schema.control not in groups:
        kind = "passing " if passing else ""
        raise DataError(
            f"effects need {kind}control cells ({data.schema.control!r}), found none among "
            f"{data.n_cells} cells with labels {shown(sorted(groups))}. "
            "Keep controls in this split, or name the control label when reading the screen."
        )
    return groups


def _check_groups(groups: Mapping[str, np.ndarray], n_cells: int) -> None:
    empty = [label for label, rows in groups.items() if len(rows) == 0]
    if empty or not groups:
        raise DataError(
            f"every group needs at least one cell; found none for {shown(empty) or 'any label'}. "
            "Leave such labels out of the groups."
        )
    outside = [label for label, rows in groups.items() if rows.min() < 0 or rows.max() >= n_cells]
    if outside:
        raise DataError(
            f"row positions must lie in 0..{n_cells - 1}; groups {shown(outside)} go beyond. "
            "Take them from the same cells as the counts."
        )


def _membership(groups: Mapping[str, np.ndarray], n_cells: int) -> sparse.csc_array:
    sizes = [len(rows) for rows in groups.values()]
    index = np.repeat(np.arange(len(sizes)), sizes)
    cells = np.concatenate(list(groups.values()))
    return sparse.csc_array((np.ones(len(cells)), (index, cells)), shape=(len(sizes), n_cells))


def _terms(
    block: sparse.csr_array, inverse_library: np.ndarray, values: str
) -> Sequence[sparse.csr_array]:
    """Return f, f squared, y and y squared of a block of cells, sparse like the block."""
    stored = np.asarray(block.data, dtype=np.float64)
    per_entry = np.repeat(inverse_library, np.diff(block.indptr))
    fraction = np.expm1(stored) / SCALE if values == "lognorm" else stored * per_entry
    log = log2_fraction(fraction)
    return [
        sparse.csr_array((entry, block.indices, block.indptr), shape=block.shape)
        for entry in (fraction, fraction**2, log, log**2)
    ]
