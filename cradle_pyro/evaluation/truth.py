"""Errors against the known truth of a simulated screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cradle_pyro.data.dataset import CellData
from cradle_pyro.evaluation.metrics import rmse
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.queries.counterfactual import counterfactual
from cradle_pyro.queries.interventions import do
from cradle_pyro.types import SCALE

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Truth", "profile_errors", "truth_of"]


class Truth(NamedTuple):
    """What a simulator knows.

    Parameters
    ----------
    labels
        Labels with a true average effect.
    effects
        True average effects, shape (labels, genes), log2 of 1 + 1e4 rate.
    rate
        Clean expected profile of every cell, shape (cells, genes), in the order of the data.
    """

    labels: list[str]
    effects: np.ndarray
    rate: np.ndarray


def truth_of(adata: AnnData) -> Truth | None:
    """Return the truth that `simulate_perturbseq` stored, or None for a real screen."""
    stored = adata.uns.get("cradle_truth")
    if stored is None or "true_rate" not in adata.layers:
        return None
    labels = [str(label) for label in stored["ate_labels"]]
    return Truth(labels, np.asarray(stored["ate"]), adata.layers["true_rate"])


def profile_errors(
    posterior: Posterior, data: CellData, truth: Truth, *, draws: int = 20, seed: int = 0
) -> dict[str, float]:
    """Return errors of failing test cells' expected profiles under artifact = 0.

    RMSE of log(1 + 1e4 fraction) against the clean profile: of the model (``cleaned``), of the
    mean passing training cell of the same perturbation (``mean_passing``: log of the mean
    fraction; the additive prediction for held-out pairs), and of the raw cell (``raw``).
    """
    failing = np.flatnonzero((np.asarray(data.split) == "test") & data.failing)
    if not len(failing):
        return {"n_cells": 0}
    cells = data.subset(failing)
    target = _log_profile(truth.rate[failing])
    clean = counterfactual(posterior, cells, do(artifact=0), draws=draws, count_draws=0, seed=seed)
    cleaned = clean.layers["rate"]
    raw = cells.rows(slice(None)).toarray() / cells.library[:, None]
    train = data.where(split="train")
    errors = {
        "cleaned": rmse(_log_profile(cleaned), target),
        "mean_passing": rmse(_log_profile(mean_passing_profiles(train, cells.labels)), target),
        "raw": rmse(_log_profile(raw), target),
    }
    return errors | {
        "cleaned_over_mean_passing": errors["cleaned"] / errors["mean_passing"],
        "cleaned_over_raw": errors["cleaned"] / errors["raw"],
        "n_cells": len(failing),
    }


def mean_passing_profiles(train: CellData, labels: np.ndarray) -> np.ndarray:
    """Return the mean fraction of passing training cells with each label, shape (labels, genes).

    For a label never trained, control times the product of its perturbations' fold changes.
    """
    passing = train.subset(train.passing)
    control = passing.schema.control
    means: dict[str, np.ndarray] = {}

    def mean(label: str) -> np.ndarray | None:
        if label not in means:
            rows = np.flatnonzero(passing.labels == label)
            if not len(rows):
                return None
            weights = 1 / passing.library[rows]
            means[label] = np.asarray(passing.rows(rows).T @ weights).ravel() / len(rows)
        return means[label]

    def profile(label: str) -> np.ndarray:
        own = mean(label)
        if own is not None:
            return own
        base = mean(control)
        if base is None:
            raise ValueError("No passing control cell is left among the training cells.")
        combined = base.copy()
        for part in label.split(passing.schema.delimiter):
            single = mean(part)
            if single is not None:
                combined *= np.maximum(single, 1e-9) / np.maximum(base, 1e-9)
        return combined

    table = {label: profile(str(label)) for label in np.unique(labels)}
    return np.stack([table[label] for label in labels])


def _log_profile(fraction: np.ndarray) -> np.ndarray:
    return np.log1p(SCALE * fraction)
