"""Scores of an outside program, so that a table does not rest on this package's own metrics."""

from __future__ import annotations

from importlib import import_module
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cradle_pyro.errors import DataError, shown

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CELL_EVAL", "Profile", "cell_eval_scores", "check_cell_eval"]

CELL_EVAL = "cell-eval==0.8.2"
"""The requirement to install for `cell_eval_scores`."""

Profile = Literal["full", "minimal", "vcc", "de", "anndata"]


def cell_eval_scores(
    predicted: AnnData,
    real: AnnData,
    *,
    perturbation_key: str,
    control: str,
    profile: Profile = "full",
) -> dict[str, float]:
    """Return cell-eval's scores of predicted cells, mean over perturbations.

    Parameters
    ----------
    predicted, real
        Cells, ``X`` of shape (cells, genes), the same genes in one order and the same labels, both
        with control cells. Give log(1 + 1e4 f): cell-eval would scale counts to the median total
        of each side by itself, over the genes given. Neither is changed.
    perturbation_key
        Column of ``obs`` with the labels.
    control
        Label of the control cells.
    profile
        Which metrics, by cell-eval's names. ``"full"`` and ``"anndata"`` hold all distances between
        control cells at once.

    Returns
    -------
    dict
        By cell-eval's names, for example ``overlap_at_N``, ``discrimination_score_l1``, ``mae``,
        ``pearson_delta``. A metric that cell-eval could not compute is missing (it logs why), one
        without a value is nan.

    Raises
    ------
    DataError
        When cell-eval is not installed, a column or the control is missing, or labels or genes of
        the two sides differ.

    Notes
    -----
    Its scores against those of the same idea in this package, checked on a simulated screen:

    - ``discrimination_score_l1`` is 1 - r / n for the rank r = 0, 1, ... among n labels;
      `perturbation_discrimination` is 1 - r / (n - 1), so that guessing scores 0.5 for any n.
      cell-eval leaves out the gene that has the label's name, and breaks ties by order.
    - ``pearson_delta`` is `ate_correlation_per_perturbation` of effects by
      ``group_effects(functional="mean_log")``, each side with its own controls.
    - ``mae_delta`` is `mae` of those effects times ln 2. ``mae`` compares profiles, so that an
      error of the predicted controls counts in every label.
    - ``overlap_at_N`` is `de_overlap` with another fold change: log2 of the ratio of geometric
      means without a pseudocount, infinite for a gene that one side lacks. It decides only where
      the prediction has more significant genes than the reference. A label without a significant
      reference gene is 0 there, nan here.
    - ``de_direction_match`` is `de_direction`, except that a predicted change of exactly zero is
      wrong there and half right here.
    - ``pearson_edistance`` correlates predicted with real distances to the controls over labels; it
      is no distance between predicted and real cells.

    The p-values are those of `differential_genes`: rank sums with corrections for ties and
    continuity, Benjamini-Hochberg within a label.

    References
    ----------
    Adduri et al., "Predicting cellular responses to perturbation across diverse contexts with
    State", 2025 (cell-eval); https://github.com/ArcInstitute/cell-eval.
    """
    evaluator = _cell_eval()
    _check(predicted, real, perturbation_key, control)
    with TemporaryDirectory(prefix="cradle-cell-eval-") as folder:
        # It normalises its inputs in place.
        ran = evaluator(
            adata_pred=_lean(predicted, perturbation_key),
            adata_real=_lean(real, perturbation_key),
            control_pert=control,
            pert_col=perturbation_key,
            num_threads=1,
            outdir=folder,
        )
        table, _ = ran.compute(profile=profile, write_csv=False)
    return {
        name: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
        for name, values in (
            (name, table[name].cast(float).to_numpy().astype(np.float64))
            for name in table.columns
            if name != "perturbation"
        )
    }


def check_cell_eval() -> None:
    """Raise a DataError unless cell-eval can be used."""
    _cell_eval()


def _cell_eval() -> Any:
    # By name: it is no dependency, declared or not, of anything else here.
    try:
        return import_module("cell_eval").MetricsEvaluator
    except ImportError as missing:
        raise DataError(
            f"cell_eval_scores needs cell-eval, which is not installed or lacks a part ({missing})."
            f" Run: pip install {CELL_EVAL}"
        ) from missing


def _lean(cells: AnnData, key: str) -> AnnData:
    """Return a copy with nothing but the matrix, the labels and the names of the genes."""
    import anndata
    import pandas as pd

    return anndata.AnnData(
        cells.X.copy(),
        obs=pd.DataFrame({key: cells.obs[key].astype(str).to_numpy()}, index=cells.obs_names),
        var=pd.DataFrame(index=cells.var_names),
    )


def _check(predicted: AnnData, real: AnnData, key: str, control: str) -> None:
    labels = {}
    for side, cells in (("predicted", predicted), ("real", real)):
        if key not in cells.obs:
            raise DataError(
                f"{side} cells need the column {key!r}, found {shown(cells.obs.columns)}."
            )
        labels[side] = set(cells.obs[key].astype(str))
        if control not in labels[side]:
            raise DataError(
                f"{side} cells need controls {control!r}, found labels "
                f"{shown(sorted(labels[side]))}."
            )
    different = labels["predicted"] ^ labels["real"]
    if different:
        raise DataError(
            f"predicted and real cells must have the same labels; one side only has "
            f"{shown(sorted(different))}. Leave them out."
        )
    if not np.array_equal(predicted.var_names, real.var_names):
        raise DataError(
            "predicted and real cells must have the same genes in one order, found "
            f"{predicted.n_vars} and {real.n_vars}; index one by the other's var_names."
        )
