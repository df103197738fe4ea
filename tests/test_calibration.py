"""Coverage, ranks, transforms and sign calls on right, too narrow and too wide posteriors."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import pytest
from scipy import integrate, stats

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.calibration import (
    coverage_curve,
    ecdf_band,
    ecdf_difference,
    false_sign_rate,
    interval_coverage,
    randomised_pit,
    rank_spread,
    rank_statistics,
    simulation_based_calibration,
    uniformity,
)
from cradle_pyro.queries.calls import sign_calls
from cradle_pyro.simulate.linear_gaussian import simulate_linear_gaussian

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


# --- coverage curves ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_draws", [39, 400])
@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_coverage_curve_is_that_of_the_normal(
    rng: np.random.Generator, width: float, n_draws: int
) -> None:
    posterior = make_posterior(rng, width=width)
    draws = rng.normal(posterior.mean, posterior.sd, size=(n_draws, N))
    curve = coverage_curve(draws, posterior.truth, levels=(0.5, 0.95))
    assert curve["n"].tolist() == [N, N]
    for level, coverage in zip(curve["level"], curve["coverage"], strict=True):
        expected = 1 - 2 * stats.norm.cdf(stats.norm.ppf((1 - level) / 2) * width)
        # Of few draws only those of the right posterior cover as infinitely many would.
        loose = 0.0 if width == 1 else 1.5 / n_draws
        assert coverage == pytest.approx(expected, abs=tolerance(level, N) + loose)
        assert (abs(coverage - level) < tolerance(level, N)) == (width == 1)


def test_coverage_curve_of_a_hand_made_example() -> None:
    draws = np.arange(1.0, 4.0)[:, None] * np.ones(5)
    truth = np.array([0.9, 1.0, 2.0, 3.0, 3.1])
    # The quartiles of 1, 2, 3 at positions 1 and 3 of 4; ends count as inside.
    assert coverage_curve(draws, truth, levels=[0.5])["coverage"].tolist() == [0.6]
    empty = coverage_curve(np.ones((3, 0)), np.ones(0))
    assert empty["coverage"].isna().all()


# --- ranks and their uniformity -------------------------------------------------------------------


def test_ranks_of_a_hand_made_example() -> None:
    draws = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    assert rank_statistics(np.array([0.0, 2.5, 9.0]), draws).tolist() == [0, 2, 3]


def test_ties_are_broken_at_random(rng: np.random.Generator) -> None:
    # Truth and draws are exchangeable coins: ranks are uniform, whatever the ties.
    coins = rng.integers(0, 2, size=(10, N))
    ranks = rank_statistics(coins[0], coins[1:], seed=3)
    assert uniformity(ranks, 9).p_value > 0.01
    below = (coins[1:] < coins[0]).sum(0)
    assert uniformity(below, 9).p_value < 1e-6
    assert np.array_equal(ranks, rank_statistics(coins[0], coins[1:], seed=3))
    assert not np.array_equal(ranks, rank_statistics(coins[0], coins[1:], seed=4))
    # A truth equal to m draws is at one of m + 1 places.
    tied = rank_statistics(np.zeros(N), np.zeros((2, N)))
    assert np.bincount(tied) / N == pytest.approx(1 / 3, abs=tolerance(1 / 3, N))


@pytest.mark.parametrize(("n", "n_draws"), [(3, 2), (4, 3), (1, 5)])
def test_p_values_are_those_of_all_ranks_counted(n: int, n_draws: int) -> None:
    tables = np.array(list(itertools.product(range(n_draws + 1), repeat=n)))
    found = [uniformity(ranks, n_draws) for ranks in tables]
    statistic = np.array([one.statistic for one in found])
    exact = [(statistic <= own * (1 + 1e-9)).mean() for own in statistic]
    assert [one.p_value for one in found] == pytest.approx(exact, abs=1e-12)
    numbers = (tables[0][:, None] <= np.arange(n_draws + 1)).sum(0)
    share = np.arange(1, n_draws + 2) / (n_draws + 1)
    tails = stats.binom.cdf(numbers, n, share), stats.binom.sf(numbers - 1, n, share)
    assert found[0].statistic == pytest.approx(min(1, 2 * np.min(tails)))


def test_uniformity_holds_its_level(rng: np.random.Generator) -> None:
    p_values = np.array([uniformity(rng.integers(0, 50, 80), 49).p_value for _ in range(600)])
    for level in (0.01, 0.1, 0.5):
        share = (p_values <= level).mean()
        assert share <= level + tolerance(level, 600)
    # It is not valid for being blind: at 0.5 it rejects about as often as it may.
    assert (p_values <= 0.5).mean() > 0.4


def test_far_p_values_go_on_as_bounds() -> None:
    narrow = np.repeat(np.arange(40, 60), 50)
    found = uniformity(narrow, 99)
    assert 0 < found.p_value < 1e-30
    assert found.p_value == pytest.approx(100 * found.statistic)
    assert found.n == 1000
    assert np.isnan(uniformity(np.zeros(0), 9).p_value)


@pytest.mark.parametrize(("n", "n_draws", "level"), [(60, 19, 0.95), (400, 99, 0.8), (5, 9, 0.95)])
def test_band_holds_uniform_ranks_at_its_level(
    rng: np.random.Generator, n: int, n_draws: int, level: float
) -> None:
    grid, low, high = ecdf_band(n, n_draws, level)
    assert grid.shape == low.shape == high.shape == (n_draws + 2,)
    assert grid[[0, -1]].tolist() == [0, 1]
    assert low[[0, -1]].tolist() == high[[0, -1]].tolist() == [0, 0]
    inside = 0
    for _ in range(800):
        points, difference = ecdf_difference(rng.integers(0, n_draws + 1, size=n), n_draws)
        assert np.array_equal(points, grid)
        inside += ((low - 1e-12 <= difference) & (difference <= high + 1e-12)).all()
    assert inside / 800 >= level - tolerance(level, 800)
    if n > 5:  # few ranks come in steps
        assert inside / 800 <= level + 0.03 + tolerance(level, 800)


def test_band_and_test_agree(rng: np.random.Generator) -> None:
    _, low, high = ecdf_band(100, 19, 0.9)
    for share in np.linspace(0, 0.4, 60):
        ranks = np.where(rng.random(100) < share, 10, rng.integers(0, 20, size=100))
        _, difference = ecdf_difference(ranks, 19)
        inside = ((low - 1e-12 <= difference) & (difference <= high + 1e-12)).all()
        assert inside == (uniformity(ranks, 19).p_value > 1 - 0.9) or inside


def test_difference_and_spread_of_hand_made_examples() -> None:
    grid, difference = ecdf_difference(np.array([0, 0, 3]), 3)
    assert grid.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert difference == pytest.approx([0, 2 / 3 - 0.25, 2 / 3 - 0.5, 2 / 3 - 0.75, 0])
    assert rank_spread(np.arange(10), 9) == pytest.approx(1)
    assert rank_spread(np.array([0, 9]), 9) > 1 > rank_spread(np.array([4, 5]), 9)
    assert np.isnan(rank_spread(np.zeros(0), 9))


# --- simulation-based calibration on the linear-Gaussian oracle -----------------------------------

N_DRAWS = 39
PRIOR_SD = 0.8


def linear_gaussian_ranks(*, width: float = 1.0, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Return ranks of z, w and the global effects, with posteriors spoilt by `width` and `shift`.

    Cells' latents are inferred with the effects known, effects with the latents integrated out.
    """
    oracle, cells = simulate_linear_gaussian(
        n_cells=12, n_genes=5, n_latents=2, n_perturbations=2, n_artifacts=1, seed=1
    )
    d, a = cells.d, np.ones_like(cells.a)

    def simulate(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], object]:
        effect = rng.normal(scale=PRIOR_SD, size=oracle.effect.shape)
        model = dataclasses.replace(oracle, effect=effect)
        made = model.sample((d, a), rng=rng)
        return {"z": made.z, "w": made.w, "effect": effect}, (model, made.x)

    def draw(
        mean: np.ndarray, covariance: np.ndarray, n_draws: int, rng: np.random.Generator
    ) -> np.ndarray:
        root = width * np.linalg.cholesky(covariance)
        noise = rng.normal(size=(n_draws, *mean.shape))
        return mean + shift * np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1)) + (
            noise[..., None, :] @ np.swapaxes(root, -1, -2)
        )[..., 0, :]  # fmt: skip

    def infer(data: object, n_draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        model, x = data
        exact = model.posterior(x, d, a)
        latents = draw(exact.mean, exact.covariance, n_draws, rng)
        mean, covariance = oracle.effect_posterior(x, d, a, prior_sd=PRIOR_SD)
        effects = draw(mean.ravel(), covariance, n_draws, rng)
        return {
            "z": latents[..., :2],
            "w": latents[..., 2:],
            "effect": effects.reshape(n_draws, *mean.shape),
        }

    return simulation_based_calibration(simulate, infer, n_simulations=400, n_draws=N_DRAWS, seed=0)


@pytest.mark.parametrize("error", [{}, {"width": 0.7}, {"width": 1.5}, {"shift": 0.4}], ids=str)
def test_sbc_passes_the_exact_posterior_and_no_other(error: dict[str, float]) -> None:
    ranks = linear_gaussian_ranks(**error)
    assert {name: own.shape for name, own in ranks.items()} == {
        "z": (400, 12, 2),
        "w": (400, 12, 2),
        "effect": (400, 2, 2),
    }
    # Cells are independent given the effects; latents, and effects, of one simulation are not.
    columns = [*ranks["z"].reshape(-1, 2).T, *ranks["w"].reshape(-1, 2).T]
    columns += [*ranks["effect"].reshape(400, 4).T]
    for column in columns:
        p_value = uniformity(column, N_DRAWS).p_value
        assert p_value > 0.01 / len(columns) if not error else p_value < 1e-4
        if "width" in error:
            assert (rank_spread(column, N_DRAWS) > 1) == (error["width"] < 1)


def test_each_simulation_has_its_own_random_numbers() -> None:
    def simulate(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], float]:
        mean = rng.normal()
        return {"mean": np.array(mean)}, mean + rng.normal()

    def infer(data: float, n_draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"mean": rng.normal(data / 2, np.sqrt(0.5), size=n_draws)}

    def run(n_simulations: int, seed: int = 0) -> list[int]:
        found = simulation_based_calibration(
            simulate, infer, n_simulations=n_simulations, n_draws=9, seed=seed
        )
        return found["mean"].tolist()

    assert run(20)[:5] == run(5)
    assert run(20) != run(20, seed=1)
    with pytest.raises(DataError, match="must return draws of 'mean'"):
        simulation_based_calibration(simulate, lambda *_: {}, n_simulations=1, n_draws=9, seed=0)
    with pytest.raises(DataError, match="9 draws of 'mean' are required, found 8"):
        simulation_based_calibration(
            simulate, lambda x, n, rng: infer(x, n - 1, rng), n_simulations=1, n_draws=9, seed=0
        )
    with pytest.raises(DataError, match="At least one simulation"):
        run(0)


# --- probability integral transforms --------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.5, 2.0, 50.0, np.inf])
def test_transforms_are_uniform_under_the_right_distribution_alone(
    rng: np.random.Generator, theta: float
) -> None:
    mean = rng.gamma(1.0, 2.0, size=N)

    def tails(x: np.ndarray, dispersion: float) -> tuple[np.ndarray, np.ndarray]:
        if np.isinf(dispersion):
            law = stats.poisson(mean)
        else:
            law = stats.nbinom(dispersion, dispersion / (dispersion + mean))
        return law.cdf(x - 1), law.cdf(x)

    rate = mean if np.isinf(theta) else mean * rng.gamma(theta, 1 / theta, size=N)
    counts = rng.poisson(rate)
    right = randomised_pit(*tails(counts, theta), seed=1)
    assert stats.kstest(right, "uniform").pvalue > 0.01
    wrong = randomised_pit(*tails(counts, 1.0), seed=1)
    assert stats.kstest(wrong, "uniform").pvalue < 1e-4
    assert np.sign(wrong.var() - 1 / 12) == np.sign(1.0 - theta)


def test_transforms_lie_in_their_steps() -> None:
    below, at = np.array([[0.0, 0.2], [0.5, 0.3]]), np.array([[0.2, 0.2], [1.0, 0.9]])
    values = randomised_pit(below, at)
    assert ((below <= values) & (values <= at)).all()
    assert values[0, 1] == 0.2
    assert np.array_equal(values, randomised_pit(below, at, seed=0))
    assert not np.array_equal(values, randomised_pit(below, at, seed=1))


def test_wrong_ranks_draws_and_transforms_are_errors() -> None:
    with pytest.raises(DataError, match="1 of 2 entries are not"):
        randomised_pit(np.array([0.0, 0.5]), np.array([0.1, 0.4]))
    for function in (uniformity, rank_spread, ecdf_difference):
        with pytest.raises(DataError, match="whole numbers from 0 to 9"):
            function(np.array([0, 10]), 9)
        with pytest.raises(DataError, match="whole numbers"):
            function(np.array([0.5]), 9)
    with pytest.raises(DataError, match="at least one rank"):
        ecdf_difference(np.zeros(0), 9)
    with pytest.raises(DataError, match="level=1"):
        ecdf_band(10, 9, 1)
    with pytest.raises(DataError, match=r"shape \(2,\).*found \(3, 1\)"):
        rank_statistics(np.ones(2), np.ones((3, 1)))
    with pytest.raises(DataError, match="1 of 3 values of 'draws' are nan"):
        coverage_curve(np.array([1.0, np.nan, 2.0]), np.array(1.0))
    with pytest.raises(DataError, match=r"Levels of intervals .* '1\.5'"):
        coverage_curve(np.ones((2, 1)), np.ones(1), levels=[0.5, 1.5])
