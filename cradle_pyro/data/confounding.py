"""Report where QC failure and perturbation, or perturbation and batch, are confounded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cradle_pyro.data.encode import control_names
from cradle_pyro.errors import DataError, DataWarning, shown

__all__ = ["confounding_report", "warn_confounding"]

_FDR: Final = 0.05


def confounding_report(
    labels: ArrayLike,
    failing: ArrayLike,
    *,
    control: str | Sequence[str] = "control",
    covariates: pd.DataFrame | Mapping[str, ArrayLike] | None = None,
    min_cells: int = 5,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return, per perturbation label, how often cells fail QC against control.

    Parameters
    ----------
    labels
        Perturbation label of each cell, shape (cells,).
    failing
        True for cells that fail QC, shape (cells,).
    control
        Label or labels of unperturbed cells.
    covariates
        Categorical covariates such as the batch: one column of shape (cells,) per name.
    min_cells
        Passing and failing cells that a label needs for the two to overlap.
    level
        Level of the intervals.

    Returns
    -------
    DataFrame
        One row per label, control first, then from the largest difference to the smallest:

        - ``n_cells, n_failing, failing_share, share_low, share_high`` (Wilson interval);
        - ``difference, difference_low, difference_high``: share minus the control's (Newcombe's
          hybrid score interval);
        - ``odds_ratio, odds_low, odds_high`` against control (Haldane's half added to each count);
        - ``p_value`` (Fisher's exact test, doubled smaller tail) and ``p_adjusted``
          (Benjamini-Hochberg over labels);
        - ``differs``: p_adjusted below 5 %; ``few_passing, few_failing``: fewer than `min_cells`;
        - ``share_without_control``: cells in a combination of covariate levels without a control.

        ``attrs["control_levels"]`` maps each covariate to (levels with a control cell, levels).

    Raises
    ------
    DataError
        If no cell is a control, or arrays do not have one entry per cell.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    Newcombe, "Interval estimation for the difference between independent proportions", 1998.

    Examples
    --------
    >>> labels = ["control"] * 50 + ["A"] * 50
    >>> failing = [False] * 45 + [True] * 5 + [False] * 20 + [True] * 30
    >>> row = confounding_report(labels, failing).loc["A"]
    >>> float(row["failing_share"]), bool(row["differs"])
    (0.6, True)
    """
    names = np.asarray(labels).astype(str)
    fails = _failing(failing, len(names))
    is_control = np.isin(names, control_names(control))
    if not is_control.any():
        raise DataError(
            f"A confounding report needs control cells ({shown(control_names(control))}), found "
            f"labels {shown(sorted(set(names)))}. Name the control label."
        )
    names = np.where(is_control, control_names(control)[0], names)
    codes, index = pd.factorize(names, sort=True)
    n_cells = np.bincount(codes)
    n_failing = np.bincount(codes, weights=fails).astype(np.int64)
    reference = int(np.flatnonzero(index == control_names(control)[0])[0])

    table = _rates(n_failing, n_cells, reference, level)
    table.index = pd.Index(index, name="perturbation")
    table["few_passing"] = n_cells - n_failing < min_cells
    table["few_failing"] = n_failing < min_cells
    if covariates is not None:
        columns = _columns(covariates, len(names))
        without = ~_joint(columns).isin(_joint(columns)[is_control].unique()).to_numpy()
        table["share_without_control"] = np.bincount(codes, weights=without) / n_cells
        table.attrs["control_levels"] = {
            str(name): (int(column[is_control].nunique()), int(column.nunique()))
            for name, column in columns.items()
        }
    table.attrs["min_cells"] = min_cells
    others = np.delete(np.arange(len(table)), reference)
    others = others[np.argsort(-np.abs(table["difference"].to_numpy()[others]), kind="stable")]
    return table.iloc[np.concatenate([[reference], others])]


def warn_confounding(report: pd.DataFrame) -> None:
    """Warn, in one line, of what a confounding report finds; say nothing when it finds nothing.

    Parameters
    ----------
    report
        From `confounding_report`.

    Warns
    -----
    DataWarning
        If failing shares differ from control, passing and failing cells do not overlap, or
        controls are confined to some levels of a covariate.
    """
    control, others = report.iloc[0], report.iloc[1:]
    found = []
    differing = others[others["differs"]]
    if len(differing):
        shares = differing["failing_share"].map("{:.0%}".format)
        worst = "; ".join(f"{label!r} {share}" for label, share in shares.head(3).items())
        found.append(
            f"QC failure differs from control ({control['failing_share']:.0%}) under "
            f"{len(differing)} of {len(others)} perturbations ({worst})"
        )
    least = report.attrs.get("min_cells", 0)
    for state in ("passing", "failing"):
        few = others.index[others[f"few_{state}"]]
        if len(few):
            found.append(f"{len(few)} have fewer than {least} {state} cells ({shown(few, 3)})")
    for name, (n_with, n_levels) in report.attrs.get("control_levels", {}).items():
        if n_with < n_levels:
            found.append(f"controls are found in {n_with} of {n_levels} levels of {name!r}")
    if found:
        warnings.warn(
            f"Confounding: {'; '.join(found)}. Compare effects with do(artifact=0), and see "
            "confounding_report for each perturbation.",
            DataWarning,
            stacklevel=2,
        )


def _rates(
    n_failing: NDArray[np.int64], n_cells: NDArray[np.int64], reference: int, level: float
) -> pd.DataFrame:
    """Return shares, differences and odds ratios with intervals, one row per label."""
    from scipy.stats import false_discovery_control, norm

    z = float(norm.ppf(0.5 + level / 2))
    share = n_failing / n_cells
    low, high = _wilson(n_failing, n_cells, z)
    base = share[reference]
    # Newcombe's method 10: squared distances of the two Wilson limits add up.
    below = np.hypot(share - low, high[reference] - base)
    above = np.hypot(high - share, base - low[reference])

    halves = np.stack([n_failing, n_cells - n_failing]) + 0.5
    log_odds = np.log(halves[0] / halves[1])
    log_ratio = log_odds - log_odds[reference]
    variance = (1 / halves).sum(axis=0)
    spread = z * np.sqrt(variance + variance[reference])

    p_value = _fisher(n_failing, n_cells, int(n_failing[reference]), int(n_cells[reference]))
    adjusted = np.ones(len(share))
    others = np.arange(len(share)) != reference
    if others.any():
        adjusted[others] = false_discovery_control(p_value[others])
    table = pd.DataFrame(
        {
            "n_cells": n_cells,
            "n_failing": n_failing,
            "failing_share": share,
            "share_low": low,
            "share_high": high,
            "difference": share - base,
            "difference_low": share - base - below,
            "difference_high": share - base + above,
            "odds_ratio": np.exp(log_ratio),
            "odds_low": np.exp(log_ratio - spread),
            "odds_high": np.exp(log_ratio + spread),
            "p_value": p_value,
            "p_adjusted": adjusted,
            "differs": others & (adjusted < _FDR),
        }
    )
    against_itself = ["difference_low", "difference_high", "odds_low", "odds_high", "p_value"]
    table.loc[reference, against_itself] = [0.0, 0.0, 1.0, 1.0, 1.0]
    return table


def _wilson(
    n_failing: NDArray[np.int64], n_cells: NDArray[np.int64], z: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    share, denominator = n_failing / n_cells, 1 + z**2 / n_cells
    centre = (share + z**2 / (2 * n_cells)) / denominator
    half = np.sqrt(share * (1 - share) / n_cells + z**2 / (4 * n_cells**2)) * z / denominator
    low = np.where(n_failing == 0, 0.0, centre - half)
    return low, np.where(n_failing == n_cells, 1.0, centre + half)


def _fisher(
    n_failing: NDArray[np.int64], n_cells: NDArray[np.int64], base_failing: int, base_cells: int
) -> NDArray[np.float64]:
    """Return two-sided exact p-values (twice the smaller tail), vectorised over labels."""
    from scipy.stats import hypergeom

    total, failures = n_cells + base_cells, n_failing + base_failing
    lower = hypergeom.cdf(n_failing, total, failures, n_cells)
    upper = hypergeom.sf(n_failing - 1, total, failures, n_cells)
    return np.clip(2 * np.minimum(lower, upper), 0.0, 1.0)


def _failing(failing: ArrayLike, n_cells: int) -> NDArray[np.bool_]:
    mask = np.asarray(failing)
    if mask.shape != (n_cells,):
        raise DataError(f"failing needs one entry per cell ({n_cells}), found shape {mask.shape}.")
    return mask.astype(bool)


def _columns(covariates: pd.DataFrame | Mapping[str, ArrayLike], n_cells: int) -> pd.DataFrame:
    columns = {str(name): np.asarray(column).astype(str) for name, column in covariates.items()}
    wrong = [name for name, column in columns.items() if column.shape != (n_cells,)]
    if wrong:
        raise DataError(
            f"Covariates need one entry per cell ({n_cells}); {shown(wrong)} have another length."
        )
    return pd.DataFrame(columns, index=pd.RangeIndex(n_cells))


def _joint(columns: pd.DataFrame) -> pd.Series:
    """Return a code of each combination of covariate levels."""
    if columns.shape[1] == 0:
        return pd.Series(0, index=columns.index)
    return columns.groupby(list(columns), sort=False).ngroup()
