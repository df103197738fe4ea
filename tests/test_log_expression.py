"""Expected log expression of noisy counts, against sums over the probability of every count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Poisson

from cradle_pyro.model.likelihoods import (
    GeneNegativeBinomial,
    GeneNormal,
    GenePoisson,
    GeneZeroInflatedNegativeBinomial,
)
from cradle_pyro.model.log_expression import expected_log2_expression, mean_log2_expression

MEANS = torch.tensor([1e-8, 1e-3, 0.2, 3.0, 40.0, 900.0])
LIBRARIES = torch.tensor([37.0, 800.0, 12_345.0, 3e5])


def by_sum(distribution, library):
    """Return E log2(1 + 1e4 x / l) of one count."""
    x = np.arange(int(distribution.isf(1e-12)) + 10)
    return float(distribution.pmf(x) @ np.log2(1 + 1e4 * x / library))


def cells(fn):
    return expected_log2_expression(fn, LIBRARIES).numpy()


def loc():
    return MEANS.expand(len(LIBRARIES), -1)


def negative_binomial(mean, theta):
    return stats.nbinom(theta, theta / (theta + mean))


@pytest.mark.parametrize("theta", [0.01, 0.3, 1.7, 25.0, 3000.0])
def test_a_negative_binomial_has_the_sum_over_its_probabilities(theta):
    found = cells(GeneNegativeBinomial(loc(), torch.tensor(theta).expand(len(MEANS))))
    expected = [
        [by_sum(negative_binomial(mean, theta), library) for mean in MEANS.tolist()]
        for library in LIBRARIES.tolist()
    ]
    np.testing.assert_allclose(found, expected, rtol=4e-3)


def test_a_poisson_has_the_sum_over_its_probabilities():
    expected = [
        [by_sum(stats.poisson(mean), library) for mean in MEANS.tolist()]
        for library in LIBRARIES.tolist()
    ]
    np.testing.assert_allclose(cells(GenePoisson(loc())), expected, rtol=4e-3)


def test_dropout_scales_what_is_left():
    theta, logits = torch.ones(len(MEANS)), torch.linspace(-3, 3, len(MEANS))
    dropped = cells(GeneZeroInflatedNegativeBinomial(loc(), theta, logits))
    plain = cells(GeneNegativeBinomial(loc(), theta))
    np.testing.assert_allclose(dropped, plain * torch.sigmoid(-logits).numpy(), rtol=1e-6)


def test_a_log_normalised_value_is_its_own_expectation():
    found = cells(GeneNormal(loc(), torch.ones(len(MEANS))))
    np.testing.assert_allclose(found, loc().numpy() / math.log(2))


def test_differences_are_closer_than_values():
    """Effects are differences at one dispersion and nearly one library."""
    theta = torch.tensor(0.6).expand(len(MEANS))
    up = cells(GeneNegativeBinomial(1.1 * loc(), theta)) - cells(GeneNegativeBinomial(loc(), theta))
    expected = [
        [
            by_sum(negative_binomial(1.1 * mean, 0.6), library)
            - by_sum(negative_binomial(mean, 0.6), library)
            for mean in MEANS.tolist()
        ]
        for library in LIBRARIES.tolist()
    ]
    np.testing.assert_allclose(up, expected, rtol=0.02)


def test_cells_deeper_than_any_are_without_noise():
    rate = torch.tensor([1e-4, 1e-2, 0.3])
    library = torch.tensor([1e9])
    found = expected_log2_expression(GenePoisson(library.unsqueeze(-1) * rate), library)
    np.testing.assert_allclose(found, torch.log2(1 + 1e4 * rate).unsqueeze(0), rtol=2e-3)


def test_an_unknown_distribution_is_named():
    with pytest.raises(TypeError, match="Poisson"):
        expected_log2_expression(Poisson(loc()), LIBRARIES)


@pytest.mark.parametrize("theta", [0.05, 0.5, 3.0, 100.0, 5000.0])
def test_expected_log_expression_is_that_of_the_pmf(theta):
    mean = np.array([1e-3, 0.1, 1.0, 20.0, 150.0, 800.0, 5000.0])
    library = np.array([1000.0])
    found = mean_log2_expression(mean / library, np.full(len(mean), theta), library)
    for value, one in zip(found, mean, strict=True):
        expected = by_sum(negative_binomial(one, theta), library[0])
        assert value == pytest.approx(expected, rel=2e-5)


def test_many_libraries_are_stood_in_for_by_few():
    rng = np.random.default_rng(0)
    library = rng.lognormal(8, 0.6, 300)
    rate, theta = np.array([1e-5, 1e-4, 1e-3, 1e-2]), np.full(4, 2.0)
    exact = np.mean([mean_log2_expression(rate, theta, np.array([one])) for one in library], axis=0)
    np.testing.assert_allclose(mean_log2_expression(rate, theta, library), exact, atol=5e-3)
