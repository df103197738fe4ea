"""The oracle itself, against brute force: scipy, joint Gaussians, numerical gradients, sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from cradle_pyro.errors import DataError
from cradle_pyro.simulate.linear_gaussian import (
    LinearGaussianCells,
    LinearGaussianCradle,
    gaussian_kl,
    simulate_linear_gaussian,
)

K, A = 2, 2


def make_oracle(
    n_cells: int = 12, seed: int = 0
) -> tuple[LinearGaussianCradle, LinearGaussianCells]:
    """Return a small oracle whose cells include passing and failing ones."""
    oracle, cells = simulate_linear_gaussian(
        n_cells=n_cells, n_genes=5, n_latents=K, n_perturbations=3, n_artifacts=2, seed=seed
    )
    gate = oracle.gate(cells.a)
    assert 0 < gate.sum() < n_cells
    return oracle, cells


def make_guide(n_cells: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return means and full covariances of an arbitrary Gaussian guide."""
    rng = np.random.default_rng(seed)
    root = 0.5 * rng.standard_normal((n_cells, K + A, K + A))
    return rng.standard_normal((n_cells, K + A)), root @ root.transpose(0, 2, 1) + 0.2 * np.eye(4)


def joint_by_propagation(
    oracle: LinearGaussianCradle, d: np.ndarray, a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of (z, w, x) of one cell, by pushing unit vectors through it."""
    zero = np.zeros((1, K)), np.zeros((1, A))
    mean_x = oracle.mean(d[None], a[None], *zero)[0]
    columns = []
    for i in range(K + A):
        unit = np.eye(K + A)[None, i]
        columns.append(oracle.mean(d[None], a[None], unit[:, :K], unit[:, K:])[0] - mean_x)
    to_x = np.concatenate([np.eye(K + A), np.stack(columns, axis=1)])
    noise = np.diag(np.concatenate([np.zeros(K + A), oracle.noise_sd**2]))
    return np.concatenate([np.zeros(K + A), mean_x]), to_x @ to_x.T + noise


def condition(
    mean: np.ndarray, covariance: np.ndarray, known: slice, value: np.ndarray, wanted: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Return the moments of `wanted` given `known` = `value` in a joint Gaussian."""
    gain = covariance[wanted, known] @ np.linalg.inv(covariance[known, known])
    return (
        mean[wanted] + gain @ (value - mean[known]),
        covariance[wanted, wanted] - gain @ covariance[known, wanted],
    )


def numerical_gradient(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Return the central-difference gradient of `function`."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-5
        gradient[index] = (function(at + step) - function(at - step)) / 2e-5
    return gradient


def test_mean_follows_the_structural_equations_by_hand() -> None:
    oracle = LinearGaussianCradle(
        loading=[[1.0, 2.0]],
        intercept=[10.0, 20.0],
        noise_sd=[1.0, 1.0],
        effect=[[3.0]],
        artifact_effect=[[5.0], [7.0]],
        artifact_loading=[[11.0]],
    )
    z, w, d = np.array([[1.0]]), np.array([[2.0]]), np.array([[1.0]])
    passing = oracle.mean(d, np.array([[0.0, 0.0]]), z, w)
    failing = oracle.mean(d, np.array([[0.0, 0.5]]), z, w)
    assert passing.tolist() == [[14.0, 28.0]]
    assert failing.tolist() == [[14.0 + 3.5 + 22.0, 28.0 + 7.0 + 44.0]]


def test_evidence_and_marginal_match_scipy_on_an_independent_joint() -> None:
    oracle, cells = make_oracle()
    evidence = oracle.log_evidence(cells.x, cells.d, cells.a)
    marginal = oracle.marginal(cells.d, cells.a)
    for n in range(len(cells.x)):
        mean, covariance = joint_by_propagation(oracle, cells.d[n], cells.a[n])
        mean, covariance = mean[K + A :], covariance[K + A :, K + A :]
        expected = multivariate_normal(mean, covariance).logpdf(cells.x[n])
        assert evidence[n] == pytest.approx(expected)
        np.testing.assert_allclose(marginal.mean[n], mean)
        np.testing.assert_allclose(marginal.covariance[n], covariance)


def test_posteriors_match_conditioning_of_the_joint() -> None:
    oracle, cells = make_oracle()
    args = cells.x, cells.d, cells.a
    whole, z, w = oracle.posterior(*args), oracle.posterior_z(*args), oracle.posterior_w(*args)
    given = oracle.posterior_z_given_w(*args, cells.w)
    for n in range(len(cells.x)):
        joint = joint_by_propagation(oracle, cells.d[n], cells.a[n])
        seen = slice(K + A, None)
        for found, wanted in ((whole, slice(K + A)), (z, slice(K)), (w, slice(K, K + A))):
            mean, covariance = condition(*joint, seen, cells.x[n], wanted)
            np.testing.assert_allclose(found.mean[n], mean, atol=1e-10)
            np.testing.assert_allclose(found.covariance[n], covariance, atol=1e-10)
        value = np.concatenate([cells.w[n], cells.x[n]])
        mean, covariance = condition(*joint, slice(K, None), value, slice(K))
        np.testing.assert_allclose(given.mean[n], mean, atol=1e-10)
        np.testing.assert_allclose(given.covariance[n], covariance, atol=1e-10)


def test_w_keeps_its_prior_exactly_without_an_artifact() -> None:
    oracle, cells = make_oracle()
    exact = oracle.posterior(cells.x, cells.d, cells.a)
    passing = oracle.gate(cells.a) == 0
    assert (exact.mean[passing, K:] == 0).all()
    assert (exact.covariance[passing][:, K:, K:] == np.eye(A)).all()
    assert (exact.covariance[passing][:, :K, K:] == 0).all()
    assert (np.abs(exact.mean[~passing, K:]) > 1e-3).all()


def test_elbo_is_the_evidence_at_the_posterior_and_below_it_elsewhere() -> None:
    oracle, cells = make_oracle()
    args = cells.x, cells.d, cells.a
    exact, evidence = oracle.posterior(*args), oracle.log_evidence(*args)
    np.testing.assert_allclose(oracle.elbo(*args, *exact), evidence)
    q_mean, q_cov = make_guide(len(cells.x))
    gap = evidence - oracle.elbo(*args, q_mean, q_cov)
    assert (gap > 0.1).all()
    np.testing.assert_allclose(gap, gaussian_kl(q_mean, q_cov, *exact))


def test_elbo_matches_sampling_from_the_guide() -> None:
    oracle, cells = make_oracle(n_cells=5, seed=2)
    q_mean, q_cov = make_guide(5)
    rng = np.random.default_rng(3)
    for n in range(5):
        q = multivariate_normal(q_mean[n], q_cov[n])
        draws = q.rvs(40_000, random_state=rng)
        one = (np.repeat(value[n : n + 1], len(draws), axis=0) for value in cells[:3])
        terms = oracle.log_likelihood(*one, draws[:, :K], draws[:, K:]) - q.logpdf(draws)
        terms += multivariate_normal(np.zeros(K + A)).logpdf(draws)
        expected = oracle.elbo(
            *(value[n : n + 1] for value in cells[:3]), q_mean[n : n + 1], q_cov[n : n + 1]
        )[0]
        assert abs(terms.mean() - expected) < 5 * terms.std() / np.sqrt(len(terms))


def test_diagonal_form_is_the_full_form_with_zero_correlations() -> None:
    oracle, cells = make_oracle()
    q_mean, q_cov = make_guide(len(cells.x))
    variance = np.einsum("nii->ni", q_cov)
    args = cells.x, cells.d, cells.a, q_mean
    as_full = variance[..., None] * np.eye(K + A)
    np.testing.assert_allclose(oracle.elbo(*args, variance), oracle.elbo(*args, as_full))


@pytest.mark.parametrize("diagonal", [True, False])
def test_elbo_gradients_match_numerical_ones(diagonal: bool) -> None:
    oracle, cells = make_oracle(n_cells=6)
    q_mean, q_cov = make_guide(6)
    q_cov = np.einsum("nii->ni", q_cov) if diagonal else q_cov
    args = cells.x, cells.d, cells.a
    found = oracle.elbo_gradient(*args, q_mean, q_cov)
    by_mean = numerical_gradient(lambda m: oracle.elbo(*args, m, q_cov).sum(), q_mean)
    by_cov = numerical_gradient(lambda c: oracle.elbo(*args, q_mean, c).sum(), q_cov)
    np.testing.assert_allclose(found.mean, by_mean, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(found.covariance, by_cov, atol=1e-6, rtol=1e-6)


def test_best_diagonal_is_stationary_and_over_confident() -> None:
    oracle, cells = make_oracle()
    args = cells.x, cells.d, cells.a
    best = oracle.best_diagonal(*args)
    gradient = oracle.elbo_gradient(*args, *best)
    np.testing.assert_allclose(gradient.mean, 0, atol=1e-10)
    np.testing.assert_allclose(gradient.covariance, 0, atol=1e-10)
    exact = np.einsum("nii->ni", oracle.posterior(*args).covariance)
    assert (best.covariance <= exact + 1e-12).all()


def test_sleep_term_is_stationary_at_the_exact_posterior_only() -> None:
    oracle, cells = make_oracle()
    gain = oracle.exact_gain()
    exact = oracle.posterior_z_given_w(cells.x, cells.d, cells.a, cells.w)
    covariance = exact.covariance[0]
    state = oracle.perturbation_shift(cells.d) + oracle.artifact_shift(cells.a, cells.w)
    residual = cells.x - oracle.intercept - state @ oracle.loading
    np.testing.assert_allclose(residual @ gain, exact.mean)
    for part in oracle.sleep_gradient(gain, covariance):
        np.testing.assert_allclose(part, 0, atol=1e-10)
    other = 0.5 * gain, covariance + 0.1 * np.eye(K)
    by_gain, by_covariance = oracle.sleep_gradient(*other)
    np.testing.assert_allclose(
        by_gain, numerical_gradient(lambda k: oracle.sleep_loss(k, other[1]), other[0]), atol=1e-7
    )
    np.testing.assert_allclose(
        by_covariance,
        numerical_gradient(lambda s: oracle.sleep_loss(other[0], s), other[1]),
        atol=1e-7,
    )
    assert oracle.sleep_loss(*other) > oracle.sleep_loss(gain, covariance) + 0.01


def test_sleep_term_matches_generated_cells_under_an_intervention() -> None:
    oracle, _ = make_oracle()
    rng = np.random.default_rng(4)
    n = 40_000
    d, a = np.tile([1.0, 0.0, 1.0], (n, 1)), np.tile([0.0, 1.0], (n, 1))
    cells = oracle.sample((d, a), rng=rng)
    gain, covariance = 0.7 * oracle.exact_gain(), np.array([[0.5, 0.1], [0.1, 0.8]])
    state = oracle.perturbation_shift(d) + oracle.artifact_shift(a, cells.w)
    predicted = (cells.x - oracle.intercept - state @ oracle.loading) @ gain
    terms = -multivariate_normal(np.zeros(K), covariance).logpdf(cells.z - predicted)
    error = terms.std() / np.sqrt(n)
    assert abs(terms.mean() - oracle.sleep_loss(gain, covariance)) < 5 * error


def test_counterfactual_that_changes_nothing_is_the_identity() -> None:
    oracle, cells = make_oracle()
    null = oracle.counterfactual(cells.x, cells.d, cells.a, cells.d, cells.a)
    assert (null.mean == cells.x).all()
    assert (null.covariance == 0).all()


@pytest.mark.parametrize("factual", [[0.0, 0.0], [1.0, 0.0]])
@pytest.mark.parametrize("new", [[0.0, 0.0], [0.0, 1.0]])
def test_counterfactual_matches_abduction_by_sampling(
    factual: list[float], new: list[float]
) -> None:
    oracle, _ = make_oracle()
    rng = np.random.default_rng(5)
    d, d_new = np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 1.0, 1.0]])
    a, a_new = np.array([factual]), np.array([new])
    cell = oracle.sample((d, a), rng=rng)
    exact = oracle.counterfactual(cell.x, d, a, d_new, a_new)
    posterior = oracle.posterior(cell.x, d, a)
    n = 40_000
    latents = rng.multivariate_normal(posterior.mean[0], posterior.covariance[0], size=n)
    z, w = latents[:, :K], latents[:, K:]

    def repeat(row: np.ndarray) -> np.ndarray:
        return np.repeat(row, n, axis=0)

    noise = cell.x - oracle.mean(repeat(d), repeat(a), z, w)
    worlds = oracle.mean(repeat(d_new), repeat(a_new), z, w) + noise
    sd = np.sqrt(np.diag(exact.covariance[0]))
    assert (np.abs(worlds.mean(axis=0) - exact.mean[0]) < 5 * sd / np.sqrt(n) + 1e-10).all()
    np.testing.assert_allclose(np.cov(worlds.T), exact.covariance[0], atol=0.05)
    assert (sd > 0.01).all() == (any(factual) != any(new))


def test_counterfactuals_of_perturbation_and_artifact_commute() -> None:
    oracle, cells = make_oracle()
    d_new, a_new = np.roll(cells.d, 1, axis=0), np.roll(cells.a, 1, axis=0)
    args = cells.x, cells.d, cells.a
    both = oracle.counterfactual(*args, d_new, a_new).mean
    one = oracle.counterfactual(*args, d_new, cells.a).mean
    other = oracle.counterfactual(*args, cells.d, a_new).mean
    np.testing.assert_allclose(both - cells.x, (one - cells.x) + (other - cells.x))


def effect_design(oracle: LinearGaussianCradle, d: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the map from flat effects to the flat screen, by pushing unit effects through it."""
    zeros = np.zeros((len(d), 2)), np.zeros((len(d), K)), np.zeros((len(d), A))

    def screen(effect: np.ndarray) -> np.ndarray:
        return dataclasses.replace(oracle, effect=mask * effect).mean(d, *zeros).ravel()

    base = screen(np.zeros_like(mask))
    units = np.eye(mask.size).reshape(-1, *mask.shape)
    return np.stack([screen(unit) - base for unit in units], axis=1)


@pytest.mark.parametrize("masked", [None, [0, 3]])
def test_effect_posterior_and_evidence_match_the_joint_over_the_screen(
    masked: list[int] | None,
) -> None:
    oracle, cells = make_oracle(n_cells=9)
    mask = np.ones((3, K))
    mask.ravel()[[] if masked is None else masked] = 0
    args = cells.x, cells.d, cells.a
    sd, size = 1.3, mask.size
    design = effect_design(oracle, cells.d, mask)
    per_cell = dataclasses.replace(oracle, effect=np.zeros((3, K))).marginal(cells.d, cells.a)
    n_values = cells.x.size
    covariance = np.zeros((size + n_values, size + n_values))
    for n in range(9):
        rows = slice(size + 5 * n, size + 5 * (n + 1))
        covariance[rows, rows] = per_cell.covariance[n]
    to_all = np.concatenate([np.eye(size), design])
    covariance += sd**2 * to_all @ to_all.T
    mean = np.concatenate([np.zeros(size), per_cell.mean.ravel()])
    expected = condition(mean, covariance, slice(size, None), cells.x.ravel(), slice(size))
    given = None if masked is None else mask
    found = oracle.effect_posterior(*args, prior_sd=sd, mask=given)
    np.testing.assert_allclose(found[0].ravel(), expected[0], atol=1e-9)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-9)
    screen = multivariate_normal(mean[size:], covariance[size:, size:])
    evidence = oracle.effect_log_evidence(*args, prior_sd=sd, mask=given)
    assert evidence == pytest.approx(screen.logpdf(cells.x.ravel()))
    if masked is not None:
        np.testing.assert_allclose(np.diag(found[1])[masked], sd**2)


def test_effect_elbo_matches_sampling_and_bounds_the_evidence() -> None:
    oracle, cells = make_oracle(n_cells=9)
    args = cells.x, cells.d, cells.a
    rng = np.random.default_rng(6)
    mask = (rng.random((3, K)) < 0.7).astype(float)
    effect_mean, effect_sd = rng.standard_normal((3, K)), rng.uniform(0.2, 0.6, (3, K))
    q_mean, q_cov = make_guide(9)
    found = oracle.effect_elbo(
        *args, q_mean, q_cov, effect_mean=effect_mean, effect_sd=effect_sd, prior_sd=1.3, mask=mask
    )
    draws = effect_mean + effect_sd * rng.standard_normal((4000, 3, K))
    values = [
        dataclasses.replace(oracle, effect=mask * e).elbo(*args, q_mean, q_cov).sum() for e in draws
    ]
    kl = gaussian_kl(
        effect_mean.reshape(1, -1), effect_sd.reshape(1, -1) ** 2,
        np.zeros((1, 3 * K)), np.full((1, 3 * K), 1.3**2),
    )[0]  # fmt: skip
    assert abs(np.mean(values) - kl - found) < 5 * np.std(values) / np.sqrt(len(values))
    assert found < oracle.effect_log_evidence(*args, prior_sd=1.3, mask=mask)


def test_gaussian_kl_divides_the_mean_difference_by_the_second_variance() -> None:
    one = np.ones((1, 1))
    value = gaussian_kl(3 * one, one, 0 * one, 0.5 * one)
    assert value[0] == pytest.approx(0.5 * (1 / 0.5 + 9 / 0.5 - 1 + np.log(0.5)))


def test_sampled_cells_have_the_marginal_moments() -> None:
    oracle, _ = make_oracle()
    d, a = np.tile([0.0, 1.0, 0.0], (40_000, 1)), np.tile([1.0, 1.0], (40_000, 1))
    cells = oracle.sample((d, a), rng=np.random.default_rng(7))
    exact = oracle.marginal(d[:1], a[:1])
    sd = np.sqrt(np.diag(exact.covariance[0]))
    assert (np.abs(cells.x.mean(axis=0) - exact.mean[0]) < 5 * sd / 200).all()
    np.testing.assert_allclose(np.cov(cells.x.T) / np.outer(sd, sd),
                               exact.covariance[0] / np.outer(sd, sd), atol=0.05)  # fmt: skip


def test_simulation_is_seeded_and_has_every_kind_of_cell() -> None:
    oracle, cells = make_oracle(n_cells=400)
    _, again = make_oracle(n_cells=400)
    _, other = make_oracle(n_cells=400, seed=1)
    assert all((one == two).all() for one, two in zip(cells, again, strict=True))
    assert (cells.x != other.x).all()
    assert set(cells.d.sum(axis=1)) == {0.0, 1.0, 2.0}
    assert 0.2 < oracle.gate(cells.a).mean() < 0.8


def test_simulation_without_perturbations_or_artifacts_works() -> None:
    oracle, cells = simulate_linear_gaussian(
        n_cells=4, n_genes=3, n_latents=1, n_perturbations=0, n_artifacts=0, seed=0,
        n_artifact_latents=0,
    )  # fmt: skip
    assert np.isfinite(oracle.log_evidence(cells.x, cells.d, cells.a)).all()
    assert oracle.posterior(cells.x, cells.d, cells.a).mean.shape == (4, 1)


def test_shapes_and_noise_are_checked() -> None:
    oracle, _ = make_oracle()
    with pytest.raises(DataError, match=r"effect must have shape \(3, 2\).*found \(3, 3\)"):
        dataclasses.replace(oracle, effect=np.zeros((3, 3)))
    with pytest.raises(DataError, match="noise_sd must be positive"):
        dataclasses.replace(oracle, noise_sd=np.zeros(5))
    with pytest.raises(DataError, match="at least one gene"):
        simulate_linear_gaussian(
            n_cells=1, n_genes=0, n_latents=1, n_perturbations=1, n_artifacts=1, seed=0
        )


def test_parameters_cannot_change_under_the_oracle() -> None:
    oracle, _ = make_oracle()
    with pytest.raises(ValueError, match="read-only"):
        oracle.loading[0] = 0
