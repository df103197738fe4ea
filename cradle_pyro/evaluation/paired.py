"""Paired comparisons of two predictors over seeds, splits and perturbations, with intervals.

The difference of two predictors is taken within each seed and split, where both were judged by the
same reference, and averaged over splits, then seeds. Its uncertainty has two sources: another seed
would simulate, split and train anew, and another set of perturbations might have been screened.
`paired_difference` resamples both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.metrics import jaccard_top_k, top_k_mask

__all__ = [
    "EFFECT_METRICS",
    "Difference",
    "Judged",
    "LabelParts",
    "Unit",
    "effect_scores",
    "label_parts",
    "paired_difference",
    "weighted_mean",
    "weighted_scores",
]

EFFECT_METRICS = (
    "ate_rho",
    "ate_r2",
    "rmse",
    "mae",
    "ate_rho_per_perturbation",
    "ate_r2_per_perturbation",
    "ate_rho_top20",
    "ate_rho_top50",
    "jaccard_top20",
    "jaccard_top50",
)
"""Metrics of effects that `effect_scores` computes for any weights of the labels."""

_LEVEL = 0.95
_TOP = (20, 50)
_MEANS = ("ate_rho_per_perturbation", "ate_r2_per_perturbation", "jaccard_top20", "jaccard_top50")


class Judged(NamedTuple):
    """A prediction and its reference, both of shape (labels, genes)."""

    labels: Sequence[str]
    predicted: np.ndarray
    effects: np.ndarray


class Unit(NamedTuple):
    """The differences of two predictors in one seed and split.

    Parameters
    ----------
    seed, split
        Which.
    labels
        The perturbations that were judged; empty if the difference is not made of them.
    difference
        Takes weights of shape (draws, labels) and returns differences of shape (draws, metrics).
    """

    seed: int
    split: str
    labels: Sequence[str]
    difference: Callable[[np.ndarray], np.ndarray]


class Difference(NamedTuple):
    """A mean difference of several metrics; all arrays have shape (metrics,).

    Parameters
    ----------
    mean, sd
        Over seeds (of the mean over splits); sd is nan for a single seed.
    ci_low, ci_high
        95 % interval of the two-level bootstrap (percentiles).
    t_low, t_high
        95 % interval of Student's t over seeds; nan for a single seed.
    n_seeds, n_splits, n_labels
        How many there are; labels counted once.
    """

    mean: np.ndarray
    sd: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    t_low: np.ndarray
    t_high: np.ndarray
    n_seeds: int
    n_splits: int
    n_labels: int


def paired_difference(
    units: Sequence[Unit], *, crossed: bool = False, draws: int = 2000, seed: int = 0
) -> Difference:
    """Return the mean difference of two predictors and its intervals.

    Parameters
    ----------
    units
        One for each seed and split.
    crossed
        False: each seed has perturbations of its own (another simulated screen), resampled within
        each drawn seed. True: the seeds share perturbations (a real screen, divided and trained
        on again), and one resampled set of them serves all seeds of a draw.
    draws
        Bootstrap draws.
    seed
        Seed of the draws.

    Raises
    ------
    DataError
        Without units.

    Notes
    -----
    A draw takes as many seeds as there are, with replacement; within each, as many splits and, in
    each, as many perturbations; the metric is computed again from the perturbations drawn, for both
    predictors alike. With crossed seeds this is the pigeonhole bootstrap. Percentile intervals
    from few seeds are too narrow (five seeds: about 88 % where 95 % is meant, if seeds are all
    that varies): read them beside those of Student's t, which know the seeds only.

    References
    ----------
    Davison and Hinkley, "Bootstrap methods and their application", 1997, section 3.8.
    Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007.
    """
    if not units:
        raise DataError("A paired comparison needs at least one seed that both finished.")
    by_seed: dict[int, list[Unit]] = {}
    for unit in units:
        by_seed.setdefault(unit.seed, []).append(unit)
    groups = list(by_seed.values())
    plain = np.stack([_mean([u.difference(_ones(u))[0] for u in group]) for group in groups])
    drawn = _bootstrap(groups, np.random.default_rng(seed), draws, crossed=crossed)
    n_seeds = len(groups)
    mean = _mean(plain)
    tail = 100 * (1 - _LEVEL) / 2
    low, high = _percentiles(drawn, (tail, 100 - tail))
    sd = np.full_like(mean, np.nan)
    reach = sd
    if n_seeds > 1:
        sd = plain.std(axis=0, ddof=1)
        reach = stats.t.ppf(0.5 + _LEVEL / 2, n_seeds - 1) * sd / np.sqrt(n_seeds)
    labels = {label for unit in units for label in unit.labels}
    n_splits = len({unit.split for unit in units})
    return Difference(
        mean, sd, low, high, mean - reach, mean + reach, n_seeds, n_splits, len(labels)
    )


def effect_scores(judged: Judged, weights: np.ndarray) -> np.ndarray:
    """Return every one of `EFFECT_METRICS` with labels weighted; shape (draws, metrics).

    With weights of one these are the metrics themselves; with whole numbers, those of a sample in
    which each label stands as often. nan where a metric is not defined.

    Parameters
    ----------
    judged
        A prediction and its reference.
    weights
        Not negative, shape (draws, labels).
    """
    return weighted_scores(label_parts(judged), weights)


def weighted_mean(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return means over labels where the value is defined; weights (draws, labels), (draws,)."""
    defined = np.isfinite(values)
    total = weights[:, defined].sum(1)
    summed = weights[:, defined] @ values[defined]
    return np.where(total > 0, summed / np.where(total > 0, total, 1), np.nan)


# -------------------------------------------------------------------------------------- internals


def _ones(unit: Unit) -> np.ndarray:
    return np.ones((1, len(unit.labels)))


def _mean(values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return the mean over the first axis of what is defined; nan where nothing is."""
    array = np.asarray(values, dtype=float)
    defined = np.isfinite(array)
    number = defined.sum(axis=0)
    total = np.where(defined, array, 0.0).sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _percentiles(values: np.ndarray, at: Sequence[float]) -> np.ndarray:
    found = np.full((len(at), values.shape[1]), np.nan)
    for column in range(values.shape[1]):
        defined = values[np.isfinite(values[:, column]), column]
        if len(defined):
            found[:, column] = np.percentile(defined, at)
    return found


def _bootstrap(
    groups: Sequence[Sequence[Unit]], rng: np.random.Generator, draws: int, *, crossed: bool
) -> np.ndarray:
    """Return mean differences of resampled seeds, splits and labels, shape (draws, metrics)."""
    n_seeds = len(groups)
    chosen = rng.integers(n_seeds, size=(draws, n_seeds))
    names = list(dict.fromkeys(label for group in groups for u in group for label in u.labels))
    splits = list(dict.fromkeys(unit.split for group in groups for unit in group))
    shared_labels = _times(rng, draws, len(names)) if crossed else None
    shared_splits = _times(rng, draws, len(splits)) if crossed else None
    slots = []
    for slot in range(n_seeds):
        found: np.ndarray | None = None
        for number, group in enumerate(groups):
            rows = np.flatnonzero(chosen[:, slot] == number)
            if not len(rows):
                continue
            values = _resampled_seed(group, rng, rows, names, splits, shared_labels, shared_splits)
            if found is None:
                found = np.full((draws, values.shape[1]), np.nan)
            found[rows] = values
        assert found is not None
        slots.append(found)
    return _mean(slots)


def _resampled_seed(
    group: Sequence[Unit],
    rng: np.random.Generator,
    rows: np.ndarray,
    names: Sequence[str],
    splits: Sequence[str],
    shared_labels: np.ndarray | None,
    shared_splits: np.ndarray | None,
) -> np.ndarray:
    """Return one seed's difference with its splits and labels drawn anew, for some draws."""
    if shared_splits is None:
        times = _times(rng, len(rows), len(group))
    else:
        times = shared_splits[rows][:, [splits.index(unit.split) for unit in group]]
    position = {name: i for i, name in enumerate(names)}
    values = []
    for unit in group:
        if shared_labels is None:
            weights = _times(rng, len(rows), len(unit.labels))
        else:
            weights = shared_labels[rows][:, [position[name] for name in unit.labels]]
        if len(group) > 1 and len(unit.labels) == 1:
            weights = np.ones_like(weights)  # a left-out pair: the split is what is drawn
        values.append(unit.difference(weights))
    each = np.stack(values, axis=1)
    weight = times[:, :, None] * np.isfinite(each)
    total = weight.sum(axis=1)
    summed = (weight * np.where(np.isfinite(each), each, 0.0)).sum(axis=1)
    return np.where(total > 0, summed / np.where(total > 0, total, 1.0), np.nan)


def _times(rng: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """Return how often each of `n` things is drawn in samples of `n`, shape (draws, n)."""
    if n == 0:
        return np.zeros((draws, 0))
    return rng.multinomial(n, np.full(n, 1.0 / n), size=draws).astype(float)


class LabelParts(NamedTuple):
    """What scores are made of, label by label: small enough to be kept, enough to be resampled.

    Parameters
    ----------
    labels
        The perturbations.
    moments
        Of the entries of all genes, then of the top 20 and 50: number, sums of prediction,
        reference, their squares and product, squared and absolute error; shape (3, labels, 8).
    means
        Metrics that are means over labels, in the order of `EFFECT_METRICS`, shape (4, labels).
    """

    labels: Sequence[str]
    moments: np.ndarray
    means: np.ndarray


def label_parts(judged: Judged) -> LabelParts:
    """Return what the scores of a prediction are made of."""
    predicted, effects = (np.asarray(x, dtype=np.float64) for x in judged[1:])
    masks = [np.ones(effects.shape, dtype=bool), *(top_k_mask(effects, k) for k in _TOP)]
    moments = np.stack([_moments(predicted, effects, mask) for mask in masks])
    each = _pooled(np.eye(len(effects)), moments[0])
    means = [each["rho"], each["r2"]]
    for k in _TOP:
        pairs = zip(predicted, effects, strict=True)
        means.append(np.array([jaccard_top_k(p, e, k=k) for p, e in pairs]))
    return LabelParts(judged.labels, moments, np.stack(means))


def weighted_scores(parts: LabelParts, weights: np.ndarray) -> np.ndarray:
    """Return `effect_scores` from their parts, which serve many weights."""
    pooled = [_pooled(weights, moments) for moments in parts.moments]
    found = {
        "ate_rho": pooled[0]["rho"],
        "ate_r2": pooled[0]["r2"],
        "rmse": pooled[0]["rmse"],
        "mae": pooled[0]["mae"],
        **{f"ate_rho_top{k}": pooled[1 + i]["rho"] for i, k in enumerate(_TOP)},
        **{
            name: weighted_mean(weights, values)
            for name, values in zip(_MEANS, parts.means, strict=True)
        },
    }
    return np.stack([found[name] for name in EFFECT_METRICS], axis=1)


def _moments(predicted: np.ndarray, effects: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return sums over the entries in the mask of each label, shape (labels, 8)."""
    error = np.where(mask, effects - predicted, 0.0)
    x, y = np.where(mask, predicted, 0.0), np.where(mask, effects, 0.0)
    parts = [mask, x, y, x * x, y * y, x * y, error**2, np.abs(error)]
    return np.stack([part.sum(axis=1) for part in parts], axis=1).astype(float)


def _pooled(weights: np.ndarray, moments: np.ndarray) -> dict[str, np.ndarray]:
    """Return scores over all entries of weighted labels, each of shape (draws,)."""
    n, sx, sy, sxx, syy, sxy, square, absolute = (weights @ moments).T
    with np.errstate(divide="ignore", invalid="ignore"):
        var_x, var_y = sxx - sx**2 / n, syy - sy**2 / n
        # What rounding leaves of a constant is no variance.
        var_x = np.where(var_x > 1e-12 * sxx, var_x, np.nan)
        var_y = np.where(var_y > 1e-12 * syy, var_y, np.nan)
        return {
            "rho": np.clip((sxy - sx * sy / n) / np.sqrt(var_x * var_y), -1.0, 1.0),
            "r2": 1.0 - square / var_y,
            "rmse": np.sqrt(square / n),
            "mae": absolute / n,
        }
