"""One contract for all likelihoods, with scipy as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from factories import make_schema, make_statistics
from scipy import stats
from torch import Tensor

from cradle_pyro.model.likelihoods import (
    GeneNegativeBinomial,
    GeneNormal,
    GenePoisson,
    GeneZeroInflatedNegativeBinomial,
    make_likelihood,
)

NAMES = ("nb", "poisson", "zinb", "normal")
DISPERSIONS = (0.05, 1.0, 40.0, 5000.0)
DROPOUT = (-4.0, 0.0, 1.0, 3.0)
SCALES = (0.02, 0.3, 1.0, 7.0)


@dataclass(frozen=True)
class Case:
    """A distribution over the genes of a cell, and scipy's for one gene."""

    make: Callable[[Tensor], Any]
    scipy_log_prob: Callable[[np.ndarray, float, int], np.ndarray]
    discrete: bool = True


def nb_log_prob(values: np.ndarray, mean: float, theta: float) -> np.ndarray:
    return stats.nbinom(theta, theta / (theta + mean)).logpmf(values)


def zinb_log_prob(values: np.ndarray, mean: float, gene: int) -> np.ndarray:
    dropped = 1 / (1 + np.exp(-DROPOUT[gene]))
    mixture = (1 - dropped) * np.exp(nb_log_prob(values, mean, DISPERSIONS[gene]))
    with np.errstate(divide="ignore"):
        return np.where(
            values == 0,
            np.log(mixture + dropped),
            np.log1p(-dropped) + nb_log_prob(values, mean, DISPERSIONS[gene]),
        )


def double(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CASES = {
    "nb": Case(
        lambda mean: GeneNegativeBinomial(mean, double(DISPERSIONS).to(mean)),
        lambda values, mean, gene: nb_log_prob(values, mean, DISPERSIONS[gene]),
    ),
    "poisson": Case(GenePoisson, lambda values, mean, gene: stats.poisson(mean).logpmf(values)),
    "zinb": Case(
        lambda mean: GeneZeroInflatedNegativeBinomial(
            mean, double(DISPERSIONS).to(mean), double(DROPOUT).to(mean)
        ),
        zinb_log_prob,
    ),
    "normal": Case(
        lambda mean: GeneNormal(mean, double(SCALES).to(mean)),
        lambda values, mean, gene: stats.norm(mean, SCALES[gene]).logpdf(values),
        discrete=False,
    ),
}
N_GENES = 4


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def make_values(case: Case, means: Tensor, seed: int = 0) -> Tensor:
    """Return counts around the means with zeros and large counts (or real values)."""
    generator = torch.Generator().manual_seed(seed)
    if not case.discrete:
        return means + torch.randn(means.shape, generator=generator, dtype=means.dtype)
    values = torch.poisson(means, generator=generator)
    values.view(-1)[::3] = 0
    values.view(-1)[::7] = 1000
    return values


def make_means(*shape: int, seed: int = 0) -> Tensor:
    """Return means from 1e-6 to 1e3, uniform in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (9 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 6)


# ------------------------------------------------------------------------------ against scipy


@pytest.mark.parametrize("mean", [1e-2, 0.5, 20.0, 3e4])
def test_log_probability_is_scipys(case, mean) -> None:
    grid = (0, 1, 2, 17, 400, 50_000) if case.discrete else (-3.0, 0.0, mean, mean + 0.5)
    for value in grid:
        found = case.make(torch.full((1, N_GENES), mean, dtype=torch.float64)).log_prob(
            torch.full((1, N_GENES), float(value), dtype=torch.float64)
        )
        expected = sum(case.scipy_log_prob(np.array(value), mean, gene) for gene in range(N_GENES))
        assert found.shape == (1,)
        # scipy's nbinom takes 1 - p from a p close to one, which costs it digits.
        assert found.item() == pytest.approx(float(expected), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("mean", ["1e-11", "1e-6", "30"])
@pytest.mark.parametrize("theta", ["1e-3", "2", "8000"])
@pytest.mark.parametrize("value", [0, 3, 20_000])
def test_negative_binomial_is_right_where_scipy_is_not(mean, theta, value) -> None:
    """At tiny means, against forty digits; below a mean of 1e-12 * theta it is floored."""
    with mpmath.workdps(40):
        m, r, x = mpmath.mpf(mean), mpmath.mpf(theta), mpmath.mpf(value)
        m = max(m, r * mpmath.mpf("1e-12"))
        log_binomial = mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
        exact = log_binomial + x * mpmath.log(m / (m + r)) + r * mpmath.log(r / (m + r))
    single = torch.tensor([float(mean)], dtype=torch.float64)
    found = GeneNegativeBinomial(single, torch.tensor([float(theta)], dtype=torch.float64))
    found = found.log_prob(torch.tensor([[float(value)]], dtype=torch.float64)).item()
    assert found == pytest.approx(float(exact), rel=1e-9, abs=1e-12)


def test_single_precision_is_close_to_double(case) -> None:
    means = make_means(200, N_GENES).clamp(1e-3)
    values = make_values(case, means)
    exact = case.make(means).log_prob(values)
    found = case.make(means.float()).log_prob(values.float()).double()
    torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-2)


def test_a_cell_is_the_sum_of_its_genes(case) -> None:
    means = make_means(6, N_GENES)
    values = make_values(case, means)
    found = case.make(means).log_prob(values).numpy()
    for cell in range(6):
        expected = sum(
            case.scipy_log_prob(values[cell, gene].numpy(), means[cell, gene].item(), gene)
            for gene in range(N_GENES)
        )
        assert found[cell] == pytest.approx(expected, rel=1e-9)


def test_moments_are_those_summed_over_the_support(case) -> None:
    means = torch.tensor([[0.3, 2.0, 4.0, 6.0]], dtype=torch.float64)
    found = case.make(means)
    for gene in range(N_GENES):
        mean = means[0, gene].item()
        if case.discrete:
            support, weight = np.arange(4000.0), 1.0
        else:
            support = mean + SCALES[gene] * np.linspace(-12, 12, 20001)
            weight = support[1] - support[0]
        probability = np.exp(case.scipy_log_prob(support, mean, gene)) * weight
        assert probability.sum() == pytest.approx(1, abs=1e-9)
        first, second = (probability * support).sum(), (probability * support**2).sum()
        assert found.mean[0, gene].item() == pytest.approx(first, rel=1e-6)
        assert found.variance[0, gene].item() == pytest.approx(second - first**2, rel=1e-6)


def test_samples_have_the_moments(case) -> None:
    n = 40_000
    distribution = case.make(torch.tensor([[0.3, 2.0, 4.0, 60.0]], dtype=torch.float64))
    draws = distribution.sample(torch.Size([n]))
    assert draws.shape == (n, 1, N_GENES)
    mean, variance = distribution.mean, distribution.variance
    error = (draws.mean(0) - mean).abs() / (variance / n).sqrt()
    assert (error < 4.5).all()
    # The variance's own error follows from the fourth moment, which is heavy at small dispersion.
    spread = ((draws - mean) ** 2).std(0) / n**0.5
    assert (((draws - mean) ** 2).mean(0) - variance).abs().le(5 * spread).all()
    if case.discrete:
        assert (draws >= 0).all()
        assert (draws == draws.round()).all()


def test_samples_have_the_probabilities(case) -> None:
    n, means = 40_000, torch.tensor([[0.3, 2.0, 4.0, 6.0]], dtype=torch.float64)
    draws = case.make(means).sample(torch.Size([n]))[:, 0].numpy()
    if not case.discrete:
        for gene, mean in enumerate(means[0].tolist()):
            assert stats.kstest(draws[:, gene], stats.norm(mean, SCALES[gene]).cdf).pvalue > 1e-3
        return
    for gene in range(N_GENES):
        for value in range(6):
            p = np.exp(case.scipy_log_prob(np.array(float(value)), means[0, gene].item(), gene))
            assert abs((draws[:, gene] == value).mean() - p) < 4.5 * np.sqrt(p * (1 - p) / n) + 1e-4


# -------------------------------------------------------------------------------------- shapes


def test_particles_are_a_loop_over_particles(case) -> None:
    means = make_means(3, 5, N_GENES)
    values = make_values(case, means[0])
    together = case.make(means).log_prob(values)
    alone = torch.stack([case.make(particle).log_prob(values) for particle in means])
    assert together.shape == (3, 5)
    torch.testing.assert_close(together, alone)


def test_expand_repeats_the_distribution(case) -> None:
    means = make_means(5, N_GENES)
    values = make_values(case, means)
    distribution = case.make(means)
    expanded = distribution.expand(torch.Size([2, 5]))
    assert type(expanded) is type(distribution)
    assert expanded.batch_shape == (2, 5)
    assert expanded.event_shape == (N_GENES,)
    torch.testing.assert_close(
        expanded.log_prob(values), distribution.log_prob(values).expand(2, 5)
    )
    assert expanded.sample().shape == (2, 5, N_GENES)
    assert expanded.sample(torch.Size([3])).shape == (3, 2, 5, N_GENES)
    torch.testing.assert_close(expanded.mean, distribution.mean.expand(2, 5, N_GENES))


def test_sums_over_non_zero_counts_are_the_dense_sums() -> None:
    means = make_means(50, N_GENES)
    values = make_values(CASES["nb"], means)
    values[3] = 0
    distribution = CASES["nb"].make(means)
    torch.testing.assert_close(
        distribution.log_prob(values), distribution.log_prob_per_gene(values).sum(-1)
    )
    stacked = torch.stack([values, values])
    torch.testing.assert_close(distribution.log_prob(stacked)[1], distribution.log_prob(values))


# --------------------------------------------------------------------------- the modules' contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_rest", [False, True])
def test_rate_is_a_share_of_the_library(name, has_rest) -> None:
    likelihood = make_likelihood(name, make_statistics(make_schema()))
    logits = torch.randn(3, 5, 14 if has_rest else 13)
    rate = likelihood.rate(logits, has_rest=has_rest)
    assert rate.shape == (3, 5, 13)
    if name == "normal":
        assert torch.equal(rate, logits[..., :13])
        return
    kept = logits.double().exp()
    expected = kept[..., :13] / kept.sum(-1, keepdim=True)
    torch.testing.assert_close(rate.double(), expected, rtol=1e-5, atol=1e-7)
    assert (rate.sum(-1) < 1).all() if has_rest else torch.allclose(rate.sum(-1), torch.ones(()))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_the_edges(name) -> None:
    likelihood = make_likelihood(name, make_statistics(make_schema(n_genes=4)))
    logits = torch.tensor([[-90.0, 0.0, 3.0, 60.0], [-30.0, -30.0, 0.0, 1.0]], requires_grad=True)
    library = torch.tensor([1.0, 1e6])
    counts = torch.tensor([[0.0, 3.0, 0.0, 1e5], [7.0, 0.0, 0.0, 1.0]])
    rate = likelihood.rate(logits, has_rest=False)
    log_prob = likelihood(rate, library).log_prob(counts)
    assert torch.isfinite(log_prob).all()
    log_prob.sum().backward()
    for value in (logits, *likelihood.parameters()):
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


@pytest.mark.parametrize("has_rest", [False, True])
def test_gradients_of_counts_pass_the_softmax_by_and_are_the_same(has_rest) -> None:
    likelihood = make_likelihood("nb", make_statistics(make_schema()))
    counts = torch.poisson(3 * torch.rand(5, 13))
    library = counts.sum(-1)
    start, found = torch.randn(2, 5, 13 + has_rest), []
    for is_changed in (False, True):  # of a changed rate nothing is known
        logits = start.clone().requires_grad_()
        rate = likelihood.rate(logits, has_rest=has_rest)
        rate = 1.0 * rate if is_changed else rate
        rate.retain_grad()
        likelihood(rate, library).log_prob(counts).sum().backward()
        found.append((rate.grad, logits.grad))
    (none, short), (some, through) = found
    assert none is None
    assert some is not None
    torch.testing.assert_close(short, through)


@pytest.mark.parametrize("name", ["nb", "poisson", "zinb"])
def test_mean_is_library_times_rate(name) -> None:
    likelihood = make_likelihood(name, make_statistics(make_schema()))
    rate = likelihood.rate(torch.randn(5, 13), has_rest=False)
    library = torch.arange(1.0, 6.0) * 100
    kept = torch.sigmoid(-likelihood.dropout_logits) if name == "zinb" else 1.0
    expected = library[:, None] * rate * kept
    torch.testing.assert_close(likelihood(rate, library).mean, expected)


@pytest.mark.parametrize("name", NAMES)
def test_first_bias_reproduces_the_training_mean(name) -> None:
    statistics = make_statistics(make_schema())
    likelihood = make_likelihood(name, statistics)
    rate = likelihood.rate(likelihood.initial_logits(statistics)[None], has_rest=False)
    total = 1.0 if name == "normal" else statistics.fraction.sum()
    torch.testing.assert_close(rate[0], statistics.fraction / total)


def test_zero_inflation_without_dropout_is_the_negative_binomial() -> None:
    means = make_means(20, N_GENES)
    values = make_values(CASES["nb"], means)
    none = torch.full((N_GENES,), -1e5, dtype=torch.float64)
    inflated = GeneZeroInflatedNegativeBinomial(means, double(DISPERSIONS), none)
    torch.testing.assert_close(inflated.log_prob(values), CASES["nb"].make(means).log_prob(values))


def test_negative_binomial_of_little_dispersion_is_poisson() -> None:
    means = make_means(20, N_GENES).clamp(1e-4, 5)
    values = torch.poisson(means)
    theta = torch.full((N_GENES,), 1e7, dtype=torch.float64)
    found = GeneNegativeBinomial(means, theta).log_prob(values)
    torch.testing.assert_close(found, GenePoisson(means).log_prob(values), rtol=1e-5, atol=1e-4)
