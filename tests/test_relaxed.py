"""Distributions of masks, flags and gene effects, against exact sums and integrals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pyro import distributions as dist
from scipy import integrate, stats
from torch.distributions import kl_divergence

from cradle_pyro.model.relaxed import (
    PresenceBernoulli,
    ScaleMixtureNormal,
    StraightThroughBernoulli,
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


def mixture(
    probability: float = 0.05, slab: float = 0.6, spike: float = 0.03
) -> ScaleMixtureNormal:
    return ScaleMixtureNormal(
        *(torch.tensor(value, dtype=torch.float64) for value in (probability, slab, spike))
    )


def test_mixture_density_integrates_to_one_with_the_stated_variance() -> None:
    prior = mixture()

    def density(x: float) -> float:
        return prior.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item()

    def moment(power: int) -> float:
        pieces = [(-6.0, -0.3), (-0.3, 0.0), (0.0, 0.3), (0.3, 6.0)]
        return sum(integrate.quad(lambda x: x**power * density(x), *piece)[0] for piece in pieces)

    assert moment(0) == pytest.approx(1, abs=1e-7)
    assert moment(1) == pytest.approx(prior.mean.item(), abs=1e-9)
    assert moment(2) == pytest.approx(prior.variance.item(), rel=1e-6)


def test_mixture_density_and_responsibility_are_bayes_rule() -> None:
    values = torch.linspace(-2, 2, 41, dtype=torch.float64)
    slab = 0.05 * stats.norm(0, 0.6).pdf(values)
    spike = 0.95 * stats.norm(0, 0.03).pdf(values)
    prior = mixture()
    np.testing.assert_allclose(prior.log_prob(values).exp(), slab + spike, rtol=1e-10)
    np.testing.assert_allclose(prior.responsibility(values), slab / (slab + spike), rtol=1e-10)


def test_mixture_draws_follow_its_cumulative_distribution() -> None:
    draws = mixture(0.3, 1.0, 0.1).expand(torch.Size([5000])).sample()

    def cumulative(x: np.ndarray) -> np.ndarray:
        return 0.3 * stats.norm.cdf(x) + 0.7 * stats.norm.cdf(x / 0.1)

    assert stats.kstest(draws.numpy(), cumulative).pvalue > 1e-3


def test_mixture_far_out_has_finite_density_and_gradient() -> None:
    value = torch.tensor([0.0, 50.0, -1e3], requires_grad=True)
    log_prob = mixture().log_prob(value.double())
    assert torch.isfinite(log_prob).all()
    log_prob.sum().backward()
    assert torch.isfinite(value.grad).all()
