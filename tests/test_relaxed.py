"""Distributions of masks, flags and gene effects, against exact sums and integrals."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions import TorchDistribution
from scipy import integrate, special, stats
from torch import Tensor
from torch.distributions import kl_divergence

from cradle_pyro.model.relaxed import (
    PresenceBernoulli,
    ScaleMixtureNormal,
    StraightThroughBernoulli,
    TiltedScaleMixture,
    normal_expectation,
)

LOGITS = torch.linspace(-6, 6, 9, dtype=torch.float64)


def exact_kl(q: float, p: float) -> float:
    """Return KL(Bernoulli(q) || Bernoulli(p)) summed over zero and one."""
    return sum(a * np.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)))


@pytest.mark.parametrize("prior", [0.001, 0.1, 0.5, 0.9])
def test_mistake_06_mask_kl_and_its_gradient_are_exact(prior) -> None:
    logits = LOGITS.clone().requires_grad_()
    found = kl_divergence(
        StraightThroughBernoulli(logits), dist.Bernoulli(torch.tensor(prior, dtype=torch.float64))
    )
    probability = torch.sigmoid(LOGITS).numpy()
    np.testing.assert_allclose(found.detach(), [exact_kl(q, prior) for q in probability], rtol=1e-9)
    found.sum().backward()
    # d KL / d logit = q (1 - q) (logit q - logit p)
    log_odds = LOGITS.numpy() - np.log(prior / (1 - prior))
    np.testing.assert_allclose(logits.grad, probability * (1 - probability) * log_odds, atol=1e-12)


def test_scoring_the_sample_agrees_with_the_closed_form_on_average() -> None:
    """As ``Trace_ELBO`` does; the stock relaxed version scores a density and does not agree."""
    n = 100_000
    prior = dist.Bernoulli(torch.tensor(0.1, dtype=torch.float64), validate_args=False)
    logits = torch.full((n,), -1.0, dtype=torch.float64, requires_grad=True)
    q = StraightThroughBernoulli(logits)
    mask = q.rsample()
    scored = q.log_prob(mask) - prior.log_prob(mask)
    scored.sum().backward()
    closed = torch.full((1,), -1.0, dtype=torch.float64, requires_grad=True)
    exact = kl_divergence(StraightThroughBernoulli(closed), prior)
    exact.sum().backward()
    assert abs(scored.mean().item() - exact.item()) < 4.5 * scored.std().item() / n**0.5
    error = 4.5 * logits.grad.std().item() / n**0.5
    assert abs(logits.grad.mean().item() - closed.grad.item()) < error


def test_kl_survives_independent_and_extreme_logits() -> None:
    logits = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    q = StraightThroughBernoulli(logits).to_event(1)
    p = PresenceBernoulli(logits=torch.tensor([[1.0, 1.0, 1.0]])).to_event(1)
    found = kl_divergence(q, p)
    presence = 1 / (1 + np.exp(-1.0))
    expected = -np.log(1 - presence) - np.log(presence) + exact_kl(0.5, presence)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_kl_to_itself_is_zero() -> None:
    q, p = StraightThroughBernoulli(LOGITS), dist.Bernoulli(logits=LOGITS)
    torch.testing.assert_close(kl_divergence(q, p), torch.zeros_like(LOGITS))


def test_log_prob_is_a_probability() -> None:
    q = StraightThroughBernoulli(LOGITS[:3]).to_event(1)
    total = sum(
        q.log_prob(torch.tensor(mask, dtype=torch.float64)).exp().item()
        for mask in itertools.product((0.0, 1.0), repeat=3)
    )
    assert total == pytest.approx(1)
    stock = dist.Bernoulli(logits=LOGITS)
    for value in (torch.zeros_like(LOGITS), torch.ones_like(LOGITS)):
        torch.testing.assert_close(
            StraightThroughBernoulli(LOGITS).log_prob(value), stock.log_prob(value)
        )


def test_draws_are_zeros_and_ones_with_the_gradient_of_the_probability() -> None:
    logits = LOGITS.float().clone().requires_grad_()
    n = 20_000
    draws = StraightThroughBernoulli(logits).rsample(torch.Size([n]))
    assert set(draws.detach().unique().tolist()) == {0.0, 1.0}
    probability = torch.sigmoid(logits).detach()
    error = (draws.detach().mean(0) - probability).abs()
    assert (error < 4.5 * (probability * (1 - probability) / n).sqrt() + 1e-6).all()
    draws.mean(0).sum().backward()
    torch.testing.assert_close(logits.grad, probability * (1 - probability))


def test_expanded_straight_through_keeps_its_log_odds() -> None:
    q = StraightThroughBernoulli(LOGITS).expand(torch.Size([4, 9]))
    assert q.batch_shape == (4, 9)
    assert q.rsample(torch.Size([2])).shape == (2, 4, 9)
    torch.testing.assert_close(q.mean, torch.sigmoid(LOGITS).expand(4, 9))
    torch.testing.assert_close(q.variance, dist.Bernoulli(logits=LOGITS).variance.expand(4, 9))


# ------------------------------------------------------------------------------------ presence


def test_severities_count_as_presence_and_pass_validation() -> None:
    flags = PresenceBernoulli(logits=torch.tensor(0.4), validate_args=True)
    one, zero = flags.log_prob(torch.tensor(1.0)), flags.log_prob(torch.tensor(0.0))
    for severity in (1e-3, 0.5, 0.99):
        assert torch.equal(flags.log_prob(torch.tensor(severity)), one)
    assert (one.exp() + zero.exp()).item() == pytest.approx(1)
    torch.testing.assert_close(one.exp(), torch.sigmoid(torch.tensor(0.4)))


def test_presence_draws_zeros_and_ones_and_expands() -> None:
    flags = PresenceBernoulli(logits=torch.tensor([-1.0, 2.0])).expand(torch.Size([3, 2]))
    assert isinstance(flags, PresenceBernoulli)
    draws = flags.sample(torch.Size([50]))
    assert draws.shape == (50, 3, 2)
    assert set(draws.unique().tolist()) == {0.0, 1.0}


# ------------------------------------------------------------------------------- spike and slab

SCALES = (0.03, 0.2, 0.8)
WEIGHTS = (0.8, 0.15, 0.05)
PIECES = (-8.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 8.0)


def double(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_prior(
    weights: tuple[float, ...] = WEIGHTS, scales: tuple[float, ...] = SCALES
) -> ScaleMixtureNormal:
    return ScaleMixtureNormal(double(weights).log(), double(scales))


def make_tilted(loc: float, scale: float) -> TiltedScaleMixture:
    return TiltedScaleMixture(
        make_prior(), *(torch.tensor(v, dtype=torch.float64) for v in (loc, scale))
    )


def density(distribution: TorchDistribution, x: float) -> float:
    return distribution.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item()


def expectation(distribution: TorchDistribution, function: Callable[[float], float]) -> float:
    """Return E[function] by quadrature."""
    return sum(
        integrate.quad(lambda x: function(x) * density(distribution, x), low, high, limit=200)[0]
        for low, high in itertools.pairwise(PIECES)
    )


def test_mixture_density_integrates_to_one_with_the_stated_variance() -> None:
    prior = make_prior()
    assert expectation(prior, lambda x: 1.0) == pytest.approx(1, abs=1e-7)
    assert expectation(prior, lambda x: x) == pytest.approx(prior.mean.item(), abs=1e-9)
    assert expectation(prior, lambda x: x * x) == pytest.approx(prior.variance.item(), rel=1e-6)


def test_mixture_density_and_responsibility_are_bayes_rule() -> None:
    values = torch.linspace(-2, 2, 41, dtype=torch.float64)
    parts = [w * stats.norm(0, s).pdf(values) for w, s in zip(WEIGHTS, SCALES, strict=True)]
    prior = make_prior()
    np.testing.assert_allclose(prior.log_prob(values).exp(), sum(parts), rtol=1e-10)
    expected = 1 - parts[0] / sum(parts)
    np.testing.assert_allclose(prior.responsibility(values), expected, rtol=1e-8, atol=1e-12)


def test_mixture_draws_follow_its_cumulative_distribution() -> None:
    draws = make_prior().expand(torch.Size([5000])).sample()

    def cumulative(x: np.ndarray) -> np.ndarray:
        return sum(w * stats.norm.cdf(x / s) for w, s in zip(WEIGHTS, SCALES, strict=True))

    assert stats.kstest(draws.numpy(), cumulative).pvalue > 1e-3
    assert make_prior().expand(torch.Size([4, 2])).sample(torch.Size([3])).shape == (3, 4, 2)


def test_mixture_far_out_has_finite_density_and_gradient() -> None:
    value = torch.tensor([0.0, 50.0, -1e3], requires_grad=True)
    log_prob = make_prior().log_prob(value.double())
    assert torch.isfinite(log_prob).all()
    log_prob.sum().backward()
    assert torch.isfinite(value.grad).all()


# ------------------------------------------------------------------- posterior under that prior

OBSERVATIONS = [(0.0, 0.1), (0.05, 0.1), (0.4, 0.2), (-1.5, 0.3), (0.3, 5.0), (0.02, 0.01)]


@pytest.mark.parametrize(("loc", "scale"), OBSERVATIONS)
def test_tilted_prior_is_the_exact_posterior_of_a_normal_observation(loc, scale) -> None:
    prior, q = make_prior(), make_tilted(loc, scale)
    evidence = expectation(prior, lambda b: stats.norm(b, scale).pdf(loc))
    for b in (-1.0, -0.1, 0.0, 0.04, 0.3, loc):
        expected = density(prior, b) * stats.norm(b, scale).pdf(loc) / evidence
        assert density(q, b) == pytest.approx(expected, rel=1e-6)
    mean = expectation(q, lambda b: b)
    variance = expectation(q, lambda b: (b - mean) ** 2)
    assert q.mean.item() == pytest.approx(mean, rel=1e-6, abs=1e-9)
    assert q.variance.item() == pytest.approx(variance, rel=1e-5)
    parts = [
        w * stats.norm(0, np.hypot(s, scale)).pdf(loc) for w, s in zip(WEIGHTS, SCALES, strict=True)
    ]
    np.testing.assert_allclose(q.inclusion, np.array(parts) / sum(parts), rtol=1e-8)


@pytest.mark.parametrize(("loc", "scale"), OBSERVATIONS)
def test_kl_of_the_tilted_prior_is_the_integral(loc, scale) -> None:
    prior, q = make_prior(), make_tilted(loc, scale)

    def log_ratio(b: float) -> float:
        value = torch.tensor(b, dtype=torch.float64)
        return (q.log_prob(value) - prior.log_prob(value)).item()

    found = kl_divergence(q, prior)
    assert found.item() == pytest.approx(expectation(q, log_ratio), rel=1e-6, abs=1e-8)
    batch = q.expand(torch.Size([2, 3])).to_event(1)
    together = kl_divergence(batch, prior.expand(torch.Size([2, 3])).to_event(1))
    torch.testing.assert_close(together, (3 * found).expand(2))


def test_weights_of_the_prior_receive_the_probabilities_of_inclusion() -> None:
    """The EM gradient: that of E_q[log prior], with q held."""
    log_odds = double((1.0, -0.5, -1.0)).requires_grad_()
    log_weights = log_odds.log_softmax(-1)
    prior = ScaleMixtureNormal(log_weights[None].expand(6, 3), double(SCALES))
    loc, scale = (double(values) for values in zip(*OBSERVATIONS, strict=True))
    q = TiltedScaleMixture(prior, loc, scale)
    (found,) = torch.autograd.grad(kl_divergence(q, prior).sum(), log_odds)
    expected = 6 * log_weights.exp() - q.inclusion.sum(0)
    torch.testing.assert_close(found, expected.detach())


def test_kl_to_another_prior_is_left_to_the_sample() -> None:
    q = make_tilted(0.4, 0.2)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, make_prior(weights=(0.5, 0.3, 0.2)))


@pytest.mark.parametrize(("loc", "scale"), OBSERVATIONS)
def test_tilted_draws_follow_their_distribution(loc, scale) -> None:
    q = make_tilted(loc, scale)
    draws = q.expand(torch.Size([4000])).rsample().numpy()
    shrinkage = np.array(SCALES) ** 2 / (np.array(SCALES) ** 2 + scale**2)
    spread = np.sqrt(shrinkage) * scale

    def cumulative(x: np.ndarray) -> np.ndarray:
        parts = zip(q.inclusion.tolist(), shrinkage, spread, strict=True)
        return sum(w * stats.norm.cdf((x - k * loc) / sd) for w, k, sd in parts)

    assert stats.kstest(draws, cumulative).pvalue > 1e-3


@pytest.mark.parametrize("observed", [0.0, 0.03, 0.25, -1.2])
def test_loc_rests_where_the_posterior_is_exact(observed) -> None:
    """With a Normal log-likelihood of the family's own scale: at its observation, not elsewhere."""
    n, scale = 100_000, 0.2

    def slope(at: float) -> tuple[float, float]:
        loc = torch.full((n,), at, dtype=torch.float64, requires_grad=True)
        q = TiltedScaleMixture(make_prior().expand(torch.Size([n])), loc, loc.detach() * 0 + scale)
        fit = -0.5 * ((q.rsample() - observed) / scale) ** 2
        loss = kl_divergence(q, make_prior().expand(torch.Size([n]))) - fit
        (gradient,) = torch.autograd.grad(loss.sum(), loc)
        return gradient.mean().item(), gradient.std().item() / n**0.5

    mean, error = slope(observed)
    assert abs(mean) < 4.5 * error + 1e-9
    for away in (-0.1, 0.1):
        mean, error = slope(observed + away)
        assert mean == pytest.approx(away / scale**2, abs=4.5 * error)


def test_tilted_prior_is_finite_at_the_edges() -> None:
    loc = torch.tensor([0.0, 30.0, -30.0, 1e-4], requires_grad=True)
    scale = torch.tensor([1e-4, 1e-4, 50.0, 1e-4])
    prior = ScaleMixtureNormal(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.01, 1.0]))
    q = TiltedScaleMixture(prior.expand(torch.Size([4])), loc, scale)
    total = q.rsample().sum() + kl_divergence(q, prior.expand(torch.Size([4]))).sum()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(loc.grad).all()


# --------------------------------------------------------------------------- normal expectation


@pytest.mark.parametrize("loc", [-2.0, 0.0, 0.7, 3.0])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 2.0])
def test_normal_expectation_of_a_logistic_is_the_integral(loc, scale) -> None:
    found = normal_expectation(*double((loc, scale)), torch.sigmoid).item()
    expected = special.expit(loc)
    if scale:
        expected, _ = integrate.quad(
            lambda x: special.expit(loc + scale * x) * stats.norm.pdf(x), -12, 12, limit=200
        )
    assert found == pytest.approx(expected, abs=1e-4 if scale > 1 else 1e-6)


def test_normal_expectation_has_the_moments_of_the_normal() -> None:
    loc, scale = double((-1.0, 0.5, 2.0)), double((0.2, 1.0, 2.0))
    torch.testing.assert_close(normal_expectation(loc, scale, lambda x: x), loc)
    torch.testing.assert_close(
        normal_expectation(loc, scale, lambda x: (x - loc[:, None]) ** 4), 3 * scale**4
    )
    moments = loc.repeat(2, 1), scale.repeat(2, 1)
    torch.testing.assert_close(
        normal_expectation(*moments, torch.exp), (loc + scale**2 / 2).exp().repeat(2, 1)
    )


def test_normal_expectation_has_the_gradient_of_its_moments() -> None:
    loc, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.8))
    assert torch.autograd.gradcheck(
        lambda a, b: normal_expectation(a, b, torch.sigmoid), (loc, scale)
    )
