"""Errors against the known truth of a simulated screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cradle_pyro.data.dataset import CellData
from cradle_pyro.evaluation.calibration import false_sign_rate, interval_coverage
from cradle_pyro.evaluation.metrics import rmse
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.queries.calls import sign_calls
from cradle_pyro.queries.counterfactual import cell_effect, counterfactual
from cradle_pyro.queries.effects import effects
from cradle_pyro.queries.interventions import do
from cradle_pyro.types import SCALE

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Truth", "control_errors", "effect_calibration", "profile_errors", "truth_of"]

_RESPONDS = 0.1
_MOST_RESPONDING = 50
_LEAST_FOR_CORRELATION = 5


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
    rate_control
        The same of the same cells under control; None if the simulator does not know.
    """

    labels: list[str]
    effects: np.ndarray
    rate: np.ndarray
    rate_control: np.ndarray | None = None


def truth_of(adata: AnnData) -> Truth | None:
    """Return the truth that `simulate_perturbseq` stored, or None for a real screen."""
    stored = adata.uns.get("cradle_truth")
    if stored is None or "true_rate" not in adata.layers:
        return None
    labels = [str(label) for label in stored["ate_labels"]]
    control = adata.layers.get("true_rate_control")
    return Truth(labels, np.asarray(stored["ate"]), adata.layers["true_rate"], control)


def profile_errors(
    posterior: Posterior, data: CellData, truth: Truth, *, draws: int = 100, seed: int = 0
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


def control_errors(
    posterior: Posterior, data: CellData, truth: Truth, *, draws: int = 100, seed: int = 0
) -> dict[str, float]:
    """Return errors of passing, perturbed test cells' counterfactuals under control.

    RMSE of log(1 + 1e4 fraction) against what the same cell would have been: of the model
    (``as_control``) and of the mean passing control cell of the training set (``mean_control``).
    ``individual``: correlation across the cells of a label, with their label's mean taken off, of
    each cell's own effect (control minus factual) with the true one; mean over the label's
    responding genes (at most 50, |true average effect| > 0.1), then over labels with five cells
    and five such genes. A table of means has none.
    """
    test = (np.asarray(data.split) == "test") & data.passing
    rows = np.flatnonzero(test & (data.labels != data.schema.control))
    if truth.rate_control is None or not len(rows):
        return {"n_cells": 0}
    cells = data.subset(rows)
    # The truth is that of the cell without an artifact, whatever its risk under control.
    control = do(perturbation=data.schema.control, artifact=0)
    answer = counterfactual(posterior, cells, control, draws=draws, count_draws=0, seed=seed)
    own = cell_effect(posterior, cells, control, draws=draws, seed=seed).X
    target = _log_profile(truth.rate_control[rows])
    train = data.where(split="train")
    mean = mean_passing_profiles(train, np.array([data.schema.control]))
    errors = {
        "as_control": rmse(_log_profile(answer.layers["rate"]), target),
        "mean_control": rmse(np.broadcast_to(_log_profile(mean), target.shape), target),
    }
    true_own = target - _log_profile(truth.rate[rows])
    return errors | {
        "as_control_over_mean_control": errors["as_control"] / errors["mean_control"],
        "individual": _individual(np.asarray(own), true_own, cells.labels, truth),
        "n_cells": len(rows),
    }


def _individual(own: np.ndarray, true_own: np.ndarray, labels: np.ndarray, truth: Truth) -> float:
    """Return the mean correlation of cells' own effects within labels; nan without any."""
    found = []
    for label, effect in zip(truth.labels, truth.effects, strict=True):
        cells = np.flatnonzero(labels == label)
        genes = np.argsort(-np.abs(effect))[:_MOST_RESPONDING]
        genes = genes[np.abs(effect[genes]) > _RESPONDS]
        if min(len(cells), len(genes)) < _LEAST_FOR_CORRELATION:
            continue
        pair = [part[np.ix_(cells, genes)] for part in (own, true_own)]
        first, second = (part - part.mean(0) for part in pair)
        norm = np.sqrt((first**2).sum(0) * (second**2).sum(0))
        moves = norm > 0
        found.append(np.mean((first * second).sum(0)[moves] / norm[moves]))
    return float(np.mean(found)) if found else float("nan")


def effect_calibration(
    posterior: Posterior, truth: Truth, *, draws: int = 100, n_cells: int = 100, seed: int = 0
) -> dict[str, float]:
    """Return how often 95 % intervals of average effects hold the truth, and calls the sign.

    ``coverage``: of the entries with |true effect| > 0.1; ``coverage_all``: of all entries;
    ``false_sign_rate``: realised, among calls at an expected rate of 10 %; ``n_effects`` and
    ``n_calls``: how many entries these are.
    """
    table = effects(posterior, truth.labels, draws=draws, n_cells=n_cells, seed=seed)
    low, high = table.layers["ci_low"], table.layers["ci_high"]
    large = interval_coverage(low, high, truth.effects, least_effect=_RESPONDS)
    called = sign_calls(table.layers["lfsr"])
    inside = (low <= truth.effects) & (truth.effects <= high)
    return {
        "coverage": large.share,
        "coverage_all": float(inside.mean()),
        "false_sign_rate": false_sign_rate(np.asarray(table.X), truth.effects, called),
        "n_effects": large.n,
        "n_calls": int(called.sum()),
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
