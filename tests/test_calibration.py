"""Coverage and sign calls on right, too narrow and too wide posteriors with known answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from scipy import integrate, stats

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.calibration import false_sign_rate, interval_coverage
from cradle_pyro.queries.calls import sign_calls

N = 20_000
NOISE = 0.7
# Monte-Carlo standard errors that a share may be off.
ERRORS = 4.0
Z95 = stats.norm.ppf(0.975)


class Posterior(NamedTuple):
    truth: np.ndarray
    mean: np.ndarray
    sd: float

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        return self.mean - Z95 * self.sd, self.mean + Z95 * self.sd

    @property
    def lfsr(self) -> np.ndarray:
        return stats.norm.cdf(-np.abs(self.mean) / self.sd)


def make_posterior(rng: np.random.Generator, *, width: float = 1.0) -> Posterior:
    """Truth ~ N(0, 1) seen with noise; the exact posterior, its sd times `width`."""
    truth = rng.normal(size=N)
    shrinkage = 1 / (1 + NOISE**2)
    mean = shrinkage * (truth + NOISE * rng.normal(size=N))
    return Posterior(truth, mean, width * NOISE * np.sqrt(shrinkage))


def tolerance(share: float, n: int) -> float:
    return ERRORS * np.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_coverage_is_that_of_the_normal_interval(rng: np.random.Generator, width: float) -> None:
    posterior = make_posterior(rng, width=width)
    coverage = interval_coverage(*posterior.interval, posterior.truth)
    expected = 1 - 2 * stats.norm.cdf(-Z95 * width)
    assert coverage.n == N
    assert coverage.share == pytest.approx(expected, abs=tolerance(expected, N))
    right = abs(coverage.share - 0.95) < tolerance(0.95, N)
    assert right == (width == 1.0)


def test_coverage_of_large_effects_is_lower_as_integration_says(rng: np.random.Generator) -> None:
    posterior = make_posterior(rng)
    shrinkage = 1 / (1 + NOISE**2)

    def covered(truth: float) -> float:
        """Return the density of a truth times the chance that its interval holds it."""
        mean = stats.norm(shrinkage * truth, shrinkage * NOISE)
        reach = Z95 * posterior.sd
        return (mean.cdf(truth + reach) - mean.cdf(truth - reach)) * stats.norm.pdf(truth)

    expected = integrate.quad(covered, 1.0, 10)[0] / stats.norm.sf(1.0)
    coverage = interval_coverage(*posterior.interval, posterior.truth, least_effect=1.0)
    assert coverage.n == (np.abs(posterior.truth) > 1.0).sum()
    assert coverage.share == pytest.approx(expected, abs=tolerance(expected, coverage.n))
    assert coverage.share < 0.95 - tolerance(0.95, coverage.n)


@pytest.mark.parametrize(("width", "side"), [(0.5, 1), (1.0, 0), (2.0, -1)])
def test_calls_keep_their_rate_only_under_the_right_posterior(
    rng: np.random.Generator, width: float, side: int
) -> None:
    posterior = make_posterior(rng, width=width)
    called = sign_calls(posterior.lfsr, rate=0.10)
    realised = false_sign_rate(posterior.mean, posterior.truth, called)
    error = tolerance(0.10, called.sum())
    # The calls stop where the mean lfsr reaches the rate.
    assert posterior.lfsr[called].mean() == pytest.approx(0.10, abs=1e-3)
    assert 0.1 * N < called.sum() < N
    assert int(realised > 0.10 + error) - int(realised < 0.10 - error) == side


def test_coverage_of_a_hand_made_example() -> None:
    low, high = np.array([[0.0, 0.2], [-1.0, 0.0]]), np.array([[1.0, 0.4], [-0.5, 2.0]])
    truth = np.array([[1.0, 0.1], [-0.2, 0.0]])
    # Ends count as inside; the entry without effect is not counted.
    assert interval_coverage(low, high, truth) == (pytest.approx(1 / 3), 3)
    assert interval_coverage(low, high, truth, least_effect=0.2) == (1.0, 1)
    assert interval_coverage(low, high, truth, least_effect=-1.0) == (0.5, 4)
    empty = interval_coverage(low, high, truth, least_effect=5.0)
    assert np.isnan(empty.share)
    assert empty.n == 0


def test_false_signs_of_a_hand_made_example() -> None:
    estimate = np.array([1.0, -1.0, 2.0, 0.0, 3.0])
    truth = np.array([0.5, 0.5, 0.0, 0.0, -1.0])
    assert false_sign_rate(estimate, truth, np.array([1, 1, 0, 0, 0], dtype=bool)) == 0.5
    assert false_sign_rate(estimate, truth, np.array([1, 0, 1, 1, 0], dtype=bool)) == 2 / 3
    assert false_sign_rate(estimate, truth, np.ones(5, dtype=bool)) == 4 / 5
    assert np.isnan(false_sign_rate(estimate, truth, np.zeros(5, dtype=bool)))


def test_wrong_arrays_are_errors() -> None:
    one, two = np.ones(1), np.ones(2)
    with pytest.raises(DataError, match=r"'truth': \(1,\)"):
        interval_coverage(two, two, one)
    with pytest.raises(DataError, match="1 of 2 intervals have low above high"):
        interval_coverage(two, np.array([0.0, 2.0]), two)
    with pytest.raises(DataError, match="1 of 2 values of 'truth' are nan"):
        false_sign_rate(two, np.array([0.0, np.nan]), two)
