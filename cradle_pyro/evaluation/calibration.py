"""Whether stated uncertainty is right: ranks, coverage, transforms and signs; arrays only.

If a parameter is drawn from a prior, data from the parameter, and draws from the exact posterior
given the data, then parameter and draws are exchangeable: the parameter's rank among the draws is
uniform, and intervals cover at their level. A posterior that is too narrow puts the truth outside
of its draws too often (ranks pile up at both ends), one that is too wide inside.

References
----------
Talts, Betancourt, Simpson, Vehtari and Gelman, "Validating Bayesian inference algorithms with
simulation-based calibration", 2018. Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman and
Vehtari, "Simulation-based calibration checking for Bayesian computation: the choice of test
quantities shapes sensitivity", Bayesian Analysis 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import signal, stats

from cradle_pyro.errors import DataError, shown

__all__ = [
    "Coverage",
    "Uniformity",
    "coverage_curve",
    "ecdf_band",
    "ecdf_difference",
    "false_sign_rate",
    "interval_coverage",
    "randomised_pit",
    "rank_spread",
    "rank_statistics",
    "simulation_based_calibration",
    "uniformity",
]

# Below it, a probability of leaving the band is bounded by its union bound, which costs no digits.
_SMALL = 1e-9
_ROUNDING = 1e-9

Draws = Mapping[str, np.ndarray]
Simulate = Callable[[np.random.Generator], tuple[Draws, Any]]
Infer = Callable[[Any, int, np.random.Generator], Draws]


class Coverage(NamedTuple):
    """How often intervals hold the truth.

    Parameters
    ----------
    share
        Share of the entries whose interval holds the truth, in [0, 1]; nan without entries.
    n
        Number of entries.
    """

    share: float
    n: int


class Uniformity(NamedTuple):
    """Whether ranks are uniform.

    Parameters
    ----------
    p_value
        Probability, under uniform ranks, of a statistic as small as this; nan without ranks.
    statistic
        Smallest two-sided binomial probability of the ranks' distribution function over all its
        points, in (0, 1]: small where the function strays furthest.
    n
        Number of ranks.
    """

    p_value: float
    statistic: float
    n: int


def interval_coverage(
    low: np.ndarray, high: np.ndarray, truth: np.ndarray, *, least_effect: float = 0.0
) -> Coverage:
    """Return how many intervals hold the truth, among entries with a true effect.

    Parameters
    ----------
    low, high
        Ends of the intervals, both included; any shape, for example (labels, genes).
    truth
        True values, same shape and unit.
    least_effect
        Only entries whose absolute truth is above this count, in the unit of the truth. At 0,
        entries without any effect are left out.

    Returns
    -------
    Coverage
        Share and number of entries.

    Raises
    ------
    DataError
        When shapes differ, a value is missing, or an interval ends before it starts.

    Notes
    -----
    An exact posterior covers at its nominal rate on average over its prior. Chosen by the size of
    the truth, as here, entries are covered less or more often than that: large true effects are
    shrunken, so their intervals miss more.
    """
    low, high, truth = _aligned(low=low, high=high, truth=truth)
    reversed_ends = low > high
    if reversed_ends.any():
        raise DataError(
            f"{reversed_ends.sum()} of {low.size} intervals have low above high; swap the ends."
        )
    counted = np.abs(truth) > least_effect
    held = (low <= truth) & (truth <= high)
    return Coverage(_share(held[counted]), int(counted.sum()))


def false_sign_rate(estimate: np.ndarray, truth: np.ndarray, called: np.ndarray) -> float:
    """Return the realised share of wrong signs among the called entries.

    Parameters
    ----------
    estimate
        Estimated effects, any shape.
    truth
        True effects, same shape. A truth of exactly zero has no sign: calling it is wrong.
    called
        Which entries are called, bool, same shape; see
        :func:`~cradle_pyro.queries.calls.sign_calls`.

    Returns
    -------
    float
        In [0, 1]; nan when nothing is called.

    Raises
    ------
    DataError
        When shapes differ or a value is missing.
    """
    estimate, truth, called = _aligned(estimate=estimate, truth=truth, called=called)
    wrong = (np.sign(estimate) != np.sign(truth)) | (truth == 0)
    return _share(wrong[called.astype(bool)])


def coverage_curve(
    draws: np.ndarray, truth: np.ndarray, levels: Sequence[float] = (0.5, 0.8, 0.95)
) -> pd.DataFrame:
    """Return how often central intervals of posterior draws hold the truth, level by level.

    Parameters
    ----------
    draws
        Posterior draws, shape (draws, ...).
    truth
        True values, shape (...).
    levels
        Nominal probabilities of the intervals, in (0, 1).

    Returns
    -------
    pandas.DataFrame
        Columns level, coverage (share of the entries, nan without any) and n (entries).

    Raises
    ------
    DataError
        When shapes do not fit, a value is missing, or a level is not inside (0, 1).

    Notes
    -----
    The ends are quantiles of Weibull's kind, at the positions p (draws + 1) among the sorted draws:
    intervals of draws from the exact posterior then cover at their level on average, however few
    the draws are (at least 2 / (1 - level) - 1 of them; fewer have no quantile so far out).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> curve = coverage_curve(rng.normal(size=(99, 5000)), rng.normal(size=5000))
    >>> bool((abs(curve["coverage"] - curve["level"]) < 0.02).all())
    True
    """
    truth, draws = _with_draws(truth, draws)
    wrong = [level for level in levels if not 0 < level < 1]
    if wrong:
        raise DataError(f"Levels of intervals lie between 0 and 1, found {shown(wrong)}.")
    rows = []
    for level in levels:
        tail = (1 - level) / 2
        low, high = np.quantile(draws, (tail, 1 - tail), axis=0, method="weibull")
        rows.append((float(level), _share((low <= truth) & (truth <= high)), truth.size))
    return pd.DataFrame(rows, columns=["level", "coverage", "n"])


def rank_statistics(truth: np.ndarray, draws: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return the rank of each true value among its posterior draws.

    Parameters
    ----------
    truth
        True values, shape (n,) or any other.
    draws
        Posterior draws, shape (n_draws, n).
    seed
        Seed that breaks ties.

    Returns
    -------
    numpy.ndarray
        Number of draws below the truth, from 0 to n_draws, shape (n,), int64. A truth equal to m
        draws is put at one of the m + 1 places among them, at random: exchangeable values with ties
        have uniform ranks only so.

    Raises
    ------
    DataError
        When shapes do not fit or a value is missing.

    Examples
    --------
    >>> rank_statistics(np.array([0.5, 9.0]), np.array([[0.0, 1.0], [1.0, 2.0]])).tolist()
    [1, 2]
    """
    truth, draws = _with_draws(truth, draws)
    below, equal = (draws < truth).sum(axis=0), (draws == truth).sum(axis=0)
    return np.asarray(below + np.random.default_rng(seed).integers(0, equal, endpoint=True))


def rank_spread(ranks: np.ndarray, n_draws: int) -> float:
    """Return the variance of ranks over that of uniform ranks: which way a posterior is wrong.

    Above one, posteriors are too narrow (ranks pile up at both ends); below one, too wide. Ranks
    that lean to one side (a biased posterior) have less than one too: look at their mean first.

    Parameters
    ----------
    ranks
        Ranks in 0..n_draws, any shape.
    n_draws
        Number of draws that they are ranks among.

    Raises
    ------
    DataError
        When a rank lies outside.
    """
    ranks = _checked_ranks(ranks, n_draws)
    return float(ranks.var() / (((n_draws + 1) ** 2 - 1) / 12)) if ranks.size else float("nan")


def uniformity(ranks: np.ndarray, n_draws: int) -> Uniformity:
    """Return a test of whether ranks are uniform on 0..n_draws.

    Parameters
    ----------
    ranks
        Independent ranks, any shape. (Ranks of several parameters of one simulation are not
        independent: test them one by one.)
    n_draws
        Number of draws that they are ranks among.

    Raises
    ------
    DataError
        When a rank lies outside.

    Notes
    -----
    At each of the points z = 1 / (n_draws + 1), ..., 1 the number of ranks below is binomial. The
    statistic is the smallest two-sided probability of these numbers, and its p-value is exact: the
    probability that uniform ranks leave the band where all numbers are more probable. Given their
    total the numbers are a Poisson walk, whose way through the band is followed step by step.
    p-values under 1e-9 are union bounds, too large by a factor of n_draws + 1 at most.

    References
    ----------
    Säilynoja, Bürkner and Vehtari, "Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison", Statistics and Computing 2022.
    Moscovich and Nadler, "Fast calculation of boundary crossing probabilities for Poisson
    processes", Statistics and Probability Letters 2017.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> uniformity(rng.integers(0, 100, size=500), n_draws=99).p_value > 0.05
    True
    >>> uniformity(rng.integers(20, 80, size=500), n_draws=99).p_value < 1e-4
    True
    """
    ranks = _checked_ranks(ranks, n_draws)
    if not ranks.size:
        return Uniformity(float("nan"), float("nan"), 0)
    n, points = ranks.size, _points(n_draws)
    number = _number_below(ranks, n_draws)
    lower, upper = stats.binom.cdf(number, n, points), stats.binom.sf(number - 1, n, points)
    least = 2 * float(np.minimum(lower, upper).min())
    statistic, union_bound = min(1.0, least), least * (n_draws + 1)
    if union_bound < _SMALL:
        return Uniformity(union_bound, statistic, n)
    # Strictly inside: numbers that are more probable than the least probable one observed.
    inside = _stays_inside(n, *_band_numbers(n, points, least * (1 + _ROUNDING)))
    return Uniformity(float(np.clip(1 - inside, 0, 1)), statistic, n)


def ecdf_band(
    n: int, n_draws: int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the difference between the ranks' distribution function and uniform stays.

    Parameters
    ----------
    n
        Number of ranks.
    n_draws
        Number of draws that they are ranks among.
    level
        Probability with which uniform ranks stay inside at all points together.

    Returns
    -------
    tuple
        Points from 0 to 1, lower and upper end, each of shape (n_draws + 2,). Values of
        :func:`ecdf_difference` inside the band are compatible with uniform ranks.

    Raises
    ------
    DataError
        When a number is not positive or the level not inside (0, 1).

    References
    ----------
    Säilynoja, Bürkner and Vehtari 2022, see :func:`uniformity`.
    """
    if n < 1 or n_draws < 1 or not 0 < level < 1:
        raise DataError(
            f"A band needs ranks, draws and a level inside (0, 1); found n={n}, n_draws={n_draws}, "
            f"level={level}."
        )
    points = _points(n_draws)
    # The least probable numbers that are let in: each alone, and by the union bound.
    too_few, enough = 1 - level, (1 - level) / (n_draws + 1)
    for _ in range(20):
        middle = np.sqrt(too_few * enough)
        if _stays_inside(n, *_band_numbers(n, points, middle)) >= level:
            enough = middle
        else:
            too_few = middle
    ends = np.stack(_band_numbers(n, points, enough)) / n - points
    low, high = np.pad(ends, ((0, 0), (1, 0)))
    return np.concatenate([[0.0], points]), low, high


def ecdf_difference(ranks: np.ndarray, n_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distribution function of ranks minus the uniform one, for a plot with its band.

    Parameters
    ----------
    ranks
        Ranks in 0..n_draws, any shape, at least one.
    n_draws
        Number of draws that they are ranks among.

    Returns
    -------
    tuple
        Points z from 0 to 1, and the share of ranks below z (n_draws + 1) minus z; each of shape
        (n_draws + 2,), as :func:`ecdf_band`.

    Raises
    ------
    DataError
        When a rank lies outside, or there is none.
    """
    ranks = _checked_ranks(ranks, n_draws)
    if not ranks.size:
        raise DataError("A distribution function needs at least one rank, found none.")
    points = _points(n_draws)
    difference = _number_below(ranks, n_draws) / ranks.size - points
    return np.concatenate([[0.0], points]), np.concatenate([[0.0], difference])


def simulation_based_calibration(
    simulate: Simulate, infer: Infer, *, n_simulations: int, n_draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Return ranks of simulated parameters among the draws that inference makes of them.

    Parameters
    ----------
    simulate
        From a generator to the true values of parameters by name, and data made with them.
    infer
        From data, a number of draws and a generator to posterior draws by name, each of shape
        (n_draws, ...). It must assume the prior that `simulate` draws from.
    n_simulations
        Number of simulated data sets.
    n_draws
        Posterior draws for each; independent ones (thin those of a Markov chain).
    seed
        Seed of everything. Each simulation has its own generator.

    Returns
    -------
    dict
        Parameter to ranks, shape (n_simulations, ...), ready for :func:`uniformity`. Functions of
        parameters and data, such as the log-likelihood, are welcome as further parameters.

    Raises
    ------
    DataError
        When `infer` leaves a parameter out, shapes do not fit, or a number is not positive.

    References
    ----------
    Talts et al. 2018, algorithm 2; Modrák et al. 2023 on test quantities that depend on the data.

    Examples
    --------
    >>> def simulate(rng):
    ...     mean = rng.normal()
    ...     return {"mean": np.array(mean)}, mean + rng.normal()
    >>> def infer(observed, n_draws, rng):
    ...     return {"mean": rng.normal(observed / 2, np.sqrt(0.5), size=n_draws)}
    >>> ranks = simulation_based_calibration(
    ...     simulate, infer, n_simulations=200, n_draws=19, seed=0)
    >>> uniformity(ranks["mean"], n_draws=19).p_value > 0.05
    True
    """
    if n_simulations < 1 or n_draws < 1:
        raise DataError(
            f"At least one simulation and one draw are required, found n_simulations="
            f"{n_simulations}, n_draws={n_draws}."
        )
    found: dict[str, list[np.ndarray]] = {}
    for stream in np.random.SeedSequence(seed).spawn(n_simulations):
        rng = np.random.default_rng(stream)
        truth, data = simulate(rng)
        draws = infer(data, n_draws, rng)
        missing = sorted(set(truth) - set(draws))
        if missing:
            raise DataError(f"'infer' must return draws of {shown(missing)}; found {shown(draws)}.")
        for name, value in truth.items():
            own = np.asarray(draws[name])
            if len(own) != n_draws:
                raise DataError(f"{n_draws} draws of '{name}' are required, found {len(own)}.")
            ties = int(rng.integers(2**32))
            found.setdefault(name, []).append(rank_statistics(value, own, seed=ties))
    return {name: np.stack(ranks) for name, ranks in found.items()}


def randomised_pit(cdf_below: np.ndarray, cdf_at: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return randomised probability integral transforms of observed counts: uniform if predicted.

    Parameters
    ----------
    cdf_below, cdf_at
        Predictive probabilities of less than the observed count, F(x - 1), and of at most it, F(x);
        any shape. Equal for continuous values.
    seed
        Seed of the random place between the two.

    Returns
    -------
    numpy.ndarray
        Numbers in [0, 1] of the same shape. Predictions that are too narrow have too many near the
        ends, those that are too wide too few.

    Raises
    ------
    DataError
        When shapes differ, or the numbers are not 0 <= F(x - 1) <= F(x) <= 1.

    References
    ----------
    Czado, Gneiting and Held, "Predictive model assessment for count data", Biometrics 2009.

    Examples
    --------
    >>> counts = np.random.default_rng(0).poisson(2.0, size=4000)
    >>> values = randomised_pit(*(stats.poisson.cdf(counts - k, 2.0) for k in (1, 0)))
    >>> bool(stats.kstest(values, "uniform").pvalue > 0.05)
    True
    """
    below, at = _aligned(cdf_below=cdf_below, cdf_at=cdf_at)
    wrong = (below < -_ROUNDING) | (at > 1 + _ROUNDING) | (below > at + _ROUNDING)
    if wrong.any():
        raise DataError(
            f"0 <= F(x - 1) <= F(x) <= 1 is required; {wrong.sum()} of {at.size} entries are not."
        )
    share = np.random.default_rng(seed).random(at.shape)
    return np.clip(below + share * (at - below), 0, 1)


def _points(n_draws: int) -> np.ndarray:
    return np.arange(1, n_draws + 2) / (n_draws + 1)


def _number_below(ranks: np.ndarray, n_draws: int) -> np.ndarray:
    """Return how many ranks lie below each point times (n_draws + 1), shape (n_draws + 1,)."""
    return np.cumsum(np.bincount(ranks, minlength=n_draws + 1))


def _band_numbers(n: int, points: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest numbers of two-sided probability >= `least` at each point."""
    low = stats.binom.ppf(least / 2, n, points)
    high = stats.binom.isf(least / 2, n, points)
    # The quantiles are the first numbers whose tails reach least / 2 in the other direction.
    low += stats.binom.cdf(low, n, points) < least / 2
    high -= stats.binom.sf(high - 1, n, points) < least / 2
    return low.astype(np.int64), high.astype(np.int64)


def _stays_inside(n: int, low: np.ndarray, high: np.ndarray) -> float:
    """Return the probability that the numbers of uniform ranks stay within both ends everywhere.

    Increments of a Poisson process, conditioned on their sum n.
    """
    if (low > high).any():
        return 0.0
    starts = np.concatenate([[0], low[:-1]])
    jumps = stats.poisson.pmf(np.arange((high - starts).max() + 1), n / len(low))
    probability = np.ones(1)
    for start, least, most in zip(starts, low, high, strict=True):
        reached = signal.convolve(probability, jumps[: most - start + 1])
        probability = reached[least - start : most - start + 1]
    # Both ends are n at the last point.
    return float(probability[0] / stats.poisson.pmf(n, n))


def _checked_ranks(ranks: np.ndarray, n_draws: int) -> np.ndarray:
    """Return ranks as a flat array of integers."""
    flat = np.asarray(ranks).ravel()
    if n_draws < 1 or (flat != np.floor(flat)).any() or ((flat < 0) | (flat > n_draws)).any():
        raise DataError(
            f"Ranks among {n_draws} draws are whole numbers from 0 to {n_draws}; found some from "
            f"{flat.min(initial=0):g} to {flat.max(initial=0):g}. Give the number of draws."
        )
    return flat.astype(np.int64)


def _with_draws(truth: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 after a check that they fit and nothing is nan."""
    truth, draws = np.asarray(truth, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    if draws.ndim < 1 or not len(draws) or draws.shape[1:] != truth.shape:
        raise DataError(
            f"Draws of the truth's shape {truth.shape} are required, stacked along the first axis; "
            f"found {draws.shape}."
        )
    for name, values in (("truth", truth), ("draws", draws)):
        if np.isnan(values).any():
            raise DataError(
                f"{np.isnan(values).sum()} of {values.size} values of '{name}' are nan."
            )
    return truth, draws


def _aligned(**arrays: np.ndarray) -> list[np.ndarray]:
    """Return the arrays as float64 after a check that their shapes agree and nothing is nan."""
    values = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in values.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"Arrays of one shape are required, found {shapes}; align their entries.")
    for name, array in values.items():
        if np.isnan(array).any():
            raise DataError(f"{np.isnan(array).sum()} of {array.size} values of '{name}' are nan.")
    return list(values.values())


def _share(events: np.ndarray) -> float:
    return float(events.mean()) if events.size else float("nan")
