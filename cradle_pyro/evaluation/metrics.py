"""Scores of predicted effects against reference effects, as functions of arrays.

Effect matrices have shape (labels, genes), one row per perturbation label, in log2 units against
control. Every score is a number without a unit unless its docstring names one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.spatial.distance import cdist

from cradle_pyro.errors import DataError

__all__ = [
    "ate_correlation",
    "ate_correlation_per_perturbation",
    "ate_r2",
    "ate_r2_per_perturbation",
    "jaccard_top_k",
    "ks_distance",
    "log_mean_exp",
    "mae",
    "perturbation_discrimination",
    "qc_pass_rate",
    "rmse",
    "score_effects",
    "sign_agreement",
    "spearman_brown",
    "top_k_correlation",
    "top_k_mask",
]


def ate_correlation(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Return the Pearson correlation over all label x gene entries together (ATE-rho).

    Parameters
    ----------
    predicted, reference
        Effects, shape (labels, genes) or (genes,), log2 scale.

    Returns
    -------
    float
        Correlation in [-1, 1]; nan where either side is constant (a prediction of no change has
        no correlation, which is not the same as a correlation of zero).

    References
    ----------
    Bereket and Karaletsos, "Modelling cellular perturbations with the sparse additive mechanism
    shift variational autoencoder", NeurIPS 2023.
    """
    predicted, reference = _effects(predicted, reference)
    return float(_pearson_rows(predicted.reshape(1, -1), reference.reshape(1, -1))[0])


def ate_correlation_per_perturbation(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation over genes of each label, shape (labels,).

    A label whose predicted or reference effects do not vary has no correlation: it is nan here,
    and left out of means over labels (`score_effects`).
    """
    return _pearson_rows(*_effects(predicted, reference))


def ate_r2(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Return the coefficient of determination over all entries together (ATE-R2).

    1 - sum (reference - predicted)^2 / sum (reference - mean reference)^2: unlike a squared
    correlation it counts wrong size and wrong offset. At most 1, not bounded below; nan where the
    reference is constant.
    """
    predicted, reference = _effects(predicted, reference)
    return float(_r2_rows(predicted.reshape(1, -1), reference.reshape(1, -1))[0])


def ate_r2_per_perturbation(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination over genes of each label, shape (labels,)."""
    return _r2_rows(*_effects(predicted, reference))


def top_k_mask(effects: np.ndarray, k: int) -> np.ndarray:
    """Return where each label's `k` largest absolute effects are, bool, shape (labels, genes).

    Ties go to the gene that comes first, so that the choice does not depend on the sort used. With
    fewer than `k` genes all are chosen.

    Raises
    ------
    DataError
        When `k` is not positive.
    """
    if k < 1:
        raise DataError(f"k must be at least 1, found {k}.")
    effects = np.atleast_2d(np.asarray(effects, dtype=np.float64))
    order = np.argsort(-np.abs(effects), axis=1, kind="stable")[:, :k]
    mask = np.zeros(effects.shape, dtype=bool)
    np.put_along_axis(mask, order, values=True, axis=1)
    return mask


def top_k_correlation(predicted: np.ndarray, reference: np.ndarray, *, k: int) -> float:
    """Return the pooled Pearson correlation over the k genes of largest |reference| of each label.

    The published "top-20" and "top-50" differentially expressed genes, chosen by the reference.
    """
    predicted, reference = _effects(predicted, reference)
    mask = top_k_mask(reference, k)
    return ate_correlation(predicted[mask], reference[mask])


def jaccard_top_k(predicted: np.ndarray, reference: np.ndarray, *, k: int) -> float:
    """Return the mean over labels of the Jaccard index between both sides' top-k gene sets.

    The size of the intersection over that of the union, in [0, 1]. A label for which either side
    is zero everywhere has no top genes: it is left out, and nan is returned if none is left.
    """
    predicted, reference = _effects(predicted, reference)
    ours, theirs = top_k_mask(predicted, k), top_k_mask(reference, k)
    score = (ours & theirs).sum(axis=1) / (ours | theirs).sum(axis=1)
    defined = (predicted != 0).any(axis=1) & (reference != 0).any(axis=1)
    return _mean_defined(np.where(defined, score, np.nan))


def rmse(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Return the root mean squared difference over all entries, in the unit of the inputs."""
    predicted, reference = _effects(predicted, reference)
    return float(np.sqrt(np.mean((predicted - reference) ** 2)))


def mae(predicted: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean absolute difference over all entries, in the unit of the inputs."""
    predicted, reference = _effects(predicted, reference)
    return float(np.mean(np.abs(predicted - reference)))


def perturbation_discrimination(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return how well each label is told from all others by its prediction, shape (labels,).

    1 - (number of other labels whose reference effects are nearer to the prediction) / (number of
    other labels), by the sum of absolute differences; a label as near as the own one counts as
    half. One is best; a prediction that is the same for all labels has a mean of about a half. nan
    with a single label.

    References
    ----------
    Roohani et al., "Virtual Cell Challenge", Cell 2025 (the perturbation discrimination score).
    """
    predicted, reference = _effects(predicted, reference)
    n_labels = len(reference)
    if n_labels < 2:
        return np.full(n_labels, np.nan)
    distance = cdist(predicted, reference, "cityblock")
    own = np.diag(distance)[:, None]
    # Rounding must not decide between labels that are alike.
    alike = np.isclose(distance, own, rtol=1e-9, atol=1e-12)
    ahead = ((distance < own) & ~alike).sum(1) + 0.5 * (alike.sum(1) - 1)
    return 1.0 - ahead / (n_labels - 1)


def sign_agreement(predicted: np.ndarray, reference: np.ndarray, *, k: int) -> float:
    """Return the share of each label's k largest reference effects with the right sign.

    Mean over labels; a prediction of exactly zero counts as half.
    """
    predicted, reference = _effects(predicted, reference)
    agreement = 0.5 + 0.5 * np.sign(predicted) * np.sign(reference)
    return float(agreement[top_k_mask(reference, k)].mean())


def qc_pass_rate(flags: Mapping[str, np.ndarray]) -> float:
    """Return the share of cells with no flag, in [0, 1].

    A mean over cells, not the head of a table of counts, so that it is right when all cells fail
    and when all pass.

    Parameters
    ----------
    flags
        For each QC criterion, true where a cell fails it; each of shape (cells,).

    Raises
    ------
    DataError
        When there is no criterion, no cell, a missing value, or the lengths differ.
    """
    if not flags:
        raise DataError("a QC pass rate needs at least one criterion, found none; pass its flags.")
    columns = {name: np.asarray(flag) for name, flag in flags.items()}
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) > 1 or next(iter(shapes.values()))[0:1] in ((), (0,)):
        raise DataError(
            f"QC flags must be columns of one length over at least one cell, found {shapes}."
        )
    wrong = [name for name, column in columns.items() if not np.isin(column, (0, 1)).all()]
    if wrong:
        raise DataError(f"QC flags must be true or false for every cell, found others in {wrong}.")
    failing = np.any([column.astype(bool) for column in columns.values()], axis=0)
    return float(1.0 - failing.mean())


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the two-sample Kolmogorov-Smirnov distance, in [0, 1].

    The largest difference between the empirical distribution functions of two samples of numbers.

    Raises
    ------
    DataError
        When a sample is empty or holds nan.
    """
    first, second = np.sort(np.ravel(first)), np.sort(np.ravel(second))
    if len(first) == 0 or len(second) == 0 or np.isnan(first[-1]) or np.isnan(second[-1]):
        raise DataError(
            "a Kolmogorov-Smirnov distance needs two samples of numbers without nan, found "
            f"{len(first)} and {len(second)} values; drop cells without the metric."
        )
    points = np.concatenate([first, second])
    below_first = np.searchsorted(first, points, side="right") / len(first)
    below_second = np.searchsorted(second, points, side="right") / len(second)
    return float(np.abs(below_first - below_second).max())


def spearman_brown(correlation: float) -> float:
    """Return the correlation expected between two full samples, from that between two halves.

    2 r / (1 + r), for r > 0. Halves that do not agree (r <= 0) say nothing about the full sample
    and are returned unchanged.

    References
    ----------
    Spearman, "Correlation calculated from faulty data", and Brown, "Some experimental results in
    the correlation of mental abilities", British Journal of Psychology 1910.
    """
    return float(2.0 * correlation / (1.0 + correlation)) if correlation > 0 else float(correlation)


def log_mean_exp(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return log(mean(exp(values))) along an axis without overflow, for importance weights."""
    values = np.asarray(values, dtype=np.float64)
    top = values.max(axis=axis, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        result = np.log(np.mean(np.exp(values - safe), axis=axis, keepdims=True)) + safe
    return np.squeeze(result, axis=axis)


def score_effects(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return every score of an effect matrix, under the names used in tables.

    Parameters
    ----------
    predicted, reference
        Effects, shape (labels, genes), log2 scale, same order of labels and genes.

    Returns
    -------
    dict
        ``ate_rho``, ``ate_r2`` over all entries; ``ate_rho_per_perturbation``,
        ``ate_r2_per_perturbation`` averaged over labels where defined; ``ate_rho_top20``,
        ``ate_rho_top50``, ``jaccard_top20``, ``jaccard_top50``, ``sign_top20``; ``rmse``, ``mae``;
        ``discrimination`` (`perturbation_discrimination`), mean over labels. nan where not defined.
        ``ate_rho_per_perturbation`` is what others call delta-Pearson.

    Raises
    ------
    DataError
        When the shapes differ, or there is no label, or a value is not finite.
    """
    predicted, reference = _effects(predicted, reference)
    return {
        "ate_rho": ate_correlation(predicted, reference),
        "ate_r2": ate_r2(predicted, reference),
        "ate_rho_per_perturbation": _mean_defined(
            ate_correlation_per_perturbation(predicted, reference)
        ),
        "ate_r2_per_perturbation": _mean_defined(ate_r2_per_perturbation(predicted, reference)),
        "ate_rho_top20": top_k_correlation(predicted, reference, k=20),
        "ate_rho_top50": top_k_correlation(predicted, reference, k=50),
        "jaccard_top20": jaccard_top_k(predicted, reference, k=20),
        "jaccard_top50": jaccard_top_k(predicted, reference, k=50),
        "sign_top20": sign_agreement(predicted, reference, k=20),
        "rmse": rmse(predicted, reference),
        "mae": mae(predicted, reference),
        "discrimination": _mean_defined(perturbation_discrimination(predicted, reference)),
    }


def _effects(predicted: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted = np.atleast_2d(np.asarray(predicted, dtype=np.float64))
    reference = np.atleast_2d(np.asarray(reference, dtype=np.float64))
    if predicted.shape != reference.shape or predicted.size == 0:
        raise DataError(
            "predicted and reference effects must have one shape (labels, genes) with at least "
            f"one entry, found {predicted.shape} and {reference.shape}; align labels and genes."
        )
    for side, values in (("predicted", predicted), ("reference", reference)):
        if not np.isfinite(values).all():
            n_bad = int((~np.isfinite(values)).sum())
            raise DataError(f"{n_bad} of {values.size} {side} effects are not finite numbers.")
    return predicted, reference


def _pearson_rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    varies = (np.ptp(first, axis=1) > 0) & (np.ptp(second, axis=1) > 0)
    first = first - first.mean(axis=1, keepdims=True)
    second = second - second.mean(axis=1, keepdims=True)
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    varies &= scale > 0
    product = (first * second).sum(axis=1)
    return np.where(varies, np.clip(product / np.where(varies, scale, 1.0), -1.0, 1.0), np.nan)


def _r2_rows(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    residual = ((reference - predicted) ** 2).sum(axis=1)
    total = ((reference - reference.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    varies = np.ptp(reference, axis=1) > 0
    return np.where(varies, 1.0 - residual / np.where(varies, total, 1.0), np.nan)


def _mean_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
