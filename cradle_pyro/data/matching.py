"""Partner cells: training cells with the same perturbation and the opposite artifact state."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cradle_pyro.errors import DataError

__all__ = ["match_partners"]


def match_partners(
    perturbation_ids: ArrayLike,
    artifact_state: ArrayLike,
    *,
    rng: np.random.Generator,
    covariate_ids: ArrayLike | None = None,
    eligible: ArrayLike | None = None,
    observed: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """Return for each cell the position of a random partner, or -1 where there is none.

    A partner is an eligible (training) cell with the same perturbation and covariates and the
    opposite artifact state: failing cells get passing partners and passing cells failing ones.

    Parameters
    ----------
    perturbation_ids
        Label or code of each cell's perturbation, shape (cells,).
    artifact_state
        True for failing cells, shape (cells,).
    rng
        Generator of the draws; one uniform draw per cell, with replacement.
    covariate_ids
        Codes of one or several covariates, shape (cells,) or (cells, covariates).
    eligible
        True for the cells that may be partners, shape (cells,); default all. Cells that are not
        eligible (validation, test) get partners but are nobody's.
    observed
        False for cells whose artifact state is not known, shape (cells,); they have no partner
        and are nobody's. Default all known.

    Returns
    -------
    ndarray of int64
        Positions in the full table (the one these arrays describe), shape (cells,).

    Raises
    ------
    DataError
        If the arrays do not have one row per cell.

    Notes
    -----
    Partners are uniform among a cell's candidates. Sorting the eligible cells by group makes this
    one sort and one draw, O(cells log cells).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> match_partners(["A", "A", "B"], [True, False, True], rng=rng).tolist()
    [1, 0, -1]
    """
    labels = np.asarray(perturbation_ids)
    n_cells = len(labels)
    failing = _mask(artifact_state, n_cells, "artifact_state")
    may_be = np.ones(n_cells, bool) if eligible is None else _mask(eligible, n_cells, "eligible")
    known = np.ones(n_cells, bool) if observed is None else _mask(observed, n_cells, "observed")

    group = _groups(labels, covariate_ids)
    n_keys = 2 * (int(group.max()) + 1) if n_cells else 0
    key = 2 * group + failing
    candidates = np.flatnonzero(may_be & known)
    candidates = candidates[np.argsort(key[candidates], kind="stable")]
    size = np.bincount(key[candidates], minlength=n_keys)
    start = np.cumsum(size) - size

    wanted = 2 * group + ~failing
    n_choices = size[wanted]
    pick = start[wanted] + rng.integers(0, np.maximum(n_choices, 1), size=n_cells)
    partner = np.full(n_cells, -1, dtype=np.int64)
    has = known & (n_choices > 0)
    partner[has] = candidates[pick[has]]
    return partner


def _mask(values: ArrayLike, n_cells: int, name: str) -> NDArray[np.bool_]:
    mask = np.asarray(values)
    if mask.shape != (n_cells,) or not np.isin(mask, (0, 1)).all():
        raise DataError(
            f"{name} must be true or false for each of the {n_cells} cells, found "
            f"{mask.dtype} of shape {mask.shape}. Give a boolean array with one entry per cell."
        )
    return mask.astype(bool)


def _groups(labels: NDArray[np.generic], covariate_ids: ArrayLike | None) -> NDArray[np.int64]:
    """Return one code per distinct row of (perturbation, covariates)."""
    if labels.ndim != 1:
        raise DataError(
            f"perturbation_ids must have one entry per cell, found shape {labels.shape}. "
            "Give one label or code per cell, not a design matrix."
        )
    group = pd.factorize(labels)[0].astype(np.int64)
    if covariate_ids is None:
        return group
    covariates = np.asarray(covariate_ids)
    covariates = covariates[:, None] if covariates.ndim == 1 else covariates
    if covariates.ndim != 2 or len(covariates) != len(labels):
        raise DataError(
            f"covariate_ids must have one row per cell ({len(labels)}), found shape "
            f"{covariates.shape}."
        )
    for column in covariates.T:
        code, levels = pd.factorize(column)
        # Compressed after each column, so that many covariates cannot overflow the product.
        group = pd.factorize(group * max(len(levels), 1) + code)[0].astype(np.int64)
    return group
