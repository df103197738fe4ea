"""Tails and quantiles of counts: against forty digits, against scipy, and the laws of noise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf
from scipy import special, stats
from torch import Tensor

from cradle_pyro.model.quantiles import (
    CountNoise,
    Counts,
    LogTails,
    NegativeBinomialCounts,
    PoissonCounts,
    ZeroInflatedCounts,
    count_at,
    count_noise,
)

MEANS = (1e-8, 1e-4, 0.05, 1.0, 7.3, 100.0, 1e4, 1e6)
DISPERSIONS = (1e-3, 0.05, 0.7, 1.0, 30.0, 1e3, 1e6)
DROPOUT = (-20.0, -2.0, 0.5, 6.0)
FAMILIES = ("poisson", "nb", "zinb")


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------- the helpers


@dataclass(frozen=True)
class Genes:
    """Parameters of as many distributions as genes."""

    mean: Tensor
    theta: Tensor
    logits: Tensor

    def counts(self, family: str) -> Counts:
        """Return the distributions under test."""
        counts: Counts = PoissonCounts(self.mean)
        if "nb" in family:
            counts = NegativeBinomialCounts(self.mean, self.theta)
        return ZeroInflatedCounts(counts, self.logits) if family.startswith("z") else counts

    def scipy(self, family: str) -> Any:
        """Return scipy's distributions, without dropout."""
        if "nb" in family:
            return stats.nbinom(self.theta.numpy(), (self.theta / (self.theta + self.mean)).numpy())
        return stats.poisson(self.mean.numpy())

    def dropout(self, family: str) -> np.ndarray:
        """Return the probabilities of dropout."""
        return special.expit(self.logits.numpy()) * family.startswith("z")

    def with_mean(self, mean: Tensor) -> Genes:
        return dataclasses.replace(self, mean=mean)

    def take(self, index: Tensor) -> Genes:
        return Genes(self.mean[index], self.theta[index], self.logits[index])

    def repeat(self, times: int) -> Genes:
        return Genes(*(value.repeat(times) for value in (self.mean, self.theta, self.logits)))

    def __len__(self) -> int:
        return len(self.mean)


def make_genes(
    n: int = 300,
    *,
    seed: int = 0,
    log_mean: tuple[float, float] = (-8, 2.5),
    log_theta: tuple[float, float] = (-3, 6),
) -> Genes:
    """Return random parameters, means and inverse dispersions uniform in the logarithm."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def log_uniform(low: float, high: float) -> Tensor:
        share = torch.rand(n, generator=generator, dtype=torch.float64)
        return 10 ** (low + (high - low) * share)

    logits = 3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return Genes(log_uniform(*log_mean), log_uniform(*log_theta), logits)


def make_counts(genes: Genes, *, seed: int = 0, low: bool = True) -> Tensor:
    """Return counts of all sizes: zeros, near the mean, and 100 times or 100,000 more than it.

    Without `low`, none but zeros are below the mean.
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    times = double(0, 0.01, 0.3, 0.9, 1, 1.5, 10, 30, 100) if low else double(1, 1.5, 10, 100)
    more = double(0, 0, 0, 1, 2, 5, 50, 1e3, 1e5)
    times, more = (
        part[torch.randint(len(part), (len(genes),), generator=generator)] for part in (times, more)
    )
    counts = torch.ceil(times * genes.mean + more)
    return counts if low else torch.where(more == 2, torch.zeros_like(counts), counts)


def make_uniform(n: int, *, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def make_noise(u: Tensor) -> CountNoise:
    """Return uniform numbers as noise."""
    upper = u > 0.5
    return CountNoise(torch.where(upper, torch.log1p(-u), u.log()), upper)


def uniform_of(noise: CountNoise) -> np.ndarray:
    """Return noise as uniform numbers; those near one lose digits."""
    tail = noise.log_tail
    return torch.where(noise.is_upper, -torch.expm1(tail), tail.exp()).numpy()


def cdf(family: str, genes: Genes, count: np.ndarray) -> np.ndarray:
    """Return P(X <= count) by scipy."""
    dropped = genes.dropout(family)
    return (count >= 0) * (dropped + (1 - dropped) * genes.scipy(family).cdf(count))


def ppf(family: str, genes: Genes, u: np.ndarray) -> np.ndarray:
    """Return the smallest count with P(X <= count) >= u, by scipy."""
    dropped = genes.dropout(family)
    inside = (u - dropped) / (1 - dropped)
    return np.where(inside > 0, genes.scipy(family).ppf(inside.clip(1e-300, 1)), 0.0)


# ------------------------------------------------------------------------------ against mpmath
#
# All sums are of positive terms. Digits are chosen so that a complement keeps forty of them.


def total_of(ratio: Callable[[int], Any]) -> Any:
    """Return 1 + ratio(0) (1 + ratio(1) (1 + ...)), to working precision."""
    total = term = mpf(1)
    n = 0
    while True:
        factor = ratio(n)
        term *= factor
        total += term
        n += 1
        if factor < 1 and term < total * mpmath.eps:
            return total


def log_complement(log_value: Any) -> Any:
    return mpmath.log1p(-mpmath.exp(log_value))


def exact_poisson(mean: float, count: int) -> tuple[Any, Any]:
    """Return both log tails of a Poisson, summed away from the mean."""
    m, x = mpf(mean), count

    def log_probability(k: int) -> Any:
        return k * mpmath.log(m) - m - mpmath.loggamma(k + 1)

    if x < m:
        lower = log_probability(x) + mpmath.log(total_of(lambda n: max(x - n, 0) / m))
        return lower, log_complement(lower)
    upper = log_probability(x + 1) + mpmath.log(total_of(lambda n: m / (x + 2 + n)))
    return log_complement(upper), upper


def exact_negative_binomial(mean: float, theta: float, count: int) -> tuple[Any, Any]:
    """Return both log tails of a negative binomial, by the sum that is short for them."""
    m, r, x = mpf(mean), mpf(theta), count
    hit, miss = m / (m + r), r / (m + r)

    def log_probability(k: int) -> Any:
        binomial = mpmath.loggamma(k + r) - mpmath.loggamma(r) - mpmath.loggamma(k + 1)
        return binomial + k * mpmath.log(hit) + r * mpmath.log(miss)

    if x < m and r >= m:  # from the count down to zero
        terms = total_of(lambda n: max(x - n, 0) / (hit * (abs(x - n - 1) + r)))
        lower = log_probability(x) + mpmath.log(terms)
        return lower, log_complement(lower)
    if r >= m:  # from the next count up
        upper = log_probability(x + 1) + mpmath.log(
            total_of(lambda n: (x + 1 + r + n) / (x + 2 + n) * hit)
        )
        return log_complement(upper), upper
    if x >= m and theta == int(theta):  # fewer than theta misses in count + theta trials
        n_trials, k = x + int(theta), int(theta) - 1
        terms = total_of(lambda n: max(k - n, 0) / (n_trials - mpf(k) + 1 + n) * hit / miss)
        ways = mpmath.loggamma(n_trials + 1) - mpmath.loggamma(k + 1)
        ways -= mpmath.loggamma(n_trials - k + 1)
        upper = ways + k * mpmath.log(miss) + (n_trials - k) * mpmath.log(hit) + mpmath.log(terms)
        return log_complement(upper), upper
    # The hypergeometric series of the incomplete beta function at `miss` < 1/2.
    series = total_of(lambda n: (r + x + 1 + n) / (r + 1 + n) * miss)
    lower = log_probability(x + 1) + mpmath.log((x + 1) / r) + mpmath.log(series)
    return lower, log_complement(lower)


@functools.cache
def exact_inner(is_nb: bool, mean: float, theta: float, count: int) -> tuple[Any, Any]:
    """Return both log tails of a count that is not dropped."""
    lost = min(theta, 1.0) * count / mean if theta < mean else 0  # to log_complement, in nats
    with mpmath.workdps(60 + int(lost / 2)):
        if is_nb:
            return exact_negative_binomial(mean, theta, count)
        return exact_poisson(mean, count)


def exact_tails(family: str, mean: float, theta: float, logits: float, count: int) -> list[float]:
    """Return both log tails of one count."""
    lower, upper = exact_inner("nb" in family, mean, theta, count)
    with mpmath.workdps(60):
        if family.startswith("z"):
            dropped = 1 / (1 + mpmath.exp(-mpf(logits)))
            lower = mpmath.log(dropped + (1 - dropped) * mpmath.exp(lower))
            upper = upper + mpmath.log(1 - dropped)
        return [float(lower), float(upper)]


def counts_around(mean: float) -> list[int]:
    """Return counts from zero to a hundred times the mean, and a thousand."""
    times = (0.01, 0.3, 0.9, 1, 1.1, 2, 10, 20, 100)
    return sorted({0, 1, 2, 7, 20, 1000} | {math.floor(mean * k) for k in times})


def make_grid(family: str, mean: float) -> tuple[Genes, list[int]]:
    """Return distributions of one mean and the counts to read their tails at."""
    thetas = DISPERSIONS if "nb" in family else (1.0,)
    logits = DROPOUT if family.startswith("z") else (0.0,)
    rows = [(t, s, x) for t in thetas for s in logits for x in counts_around(mean)]
    if len(rows) > 100:  # a third of the combinations: more would be slow
        rows = rows[::3]
    theta, share, count = zip(*rows, strict=True)
    return Genes(double(*[mean] * len(rows)), double(*theta), double(*share)), count


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("family", [*FAMILIES, "zip"])
def test_log_tails_are_those_of_sixty_digits(family, mean) -> None:
    """Both logarithms, thousands of nats below underflow too; and log F near one, relatively."""
    genes, count = make_grid(family, mean)
    found = genes.counts(family).log_tails(double(*count))
    rows = zip(genes.mean.tolist(), genes.theta.tolist(), genes.logits.tolist(), count, strict=True)
    exact = double(*(v for row in rows for v in exact_tails(family, *row))).reshape(-1, 2)
    for side, log_tail in enumerate(found):
        assert log_tail.shape == (len(genes),)
        torch.testing.assert_close(log_tail, exact[:, side], rtol=1e-12, atol=1e-9)
        # Where the other tail is small, this logarithm is minus that tail: as many digits.
        one, other = exact[:, side] > -0.01, exact[:, 1 - side]
        one &= other > -700  # below, minus the other tail underflows
        if not family.startswith("z"):  # dropout puts the mass elsewhere
            close = (log_tail / exact[:, side])[one].log().abs()
            assert (close < 1e-9 + 1e-12 * other[one].abs()).all()


def test_grid_reaches_far_below_underflow() -> None:
    """What the test above covers: tails of exp(-1000) and less on either side."""
    for family in ("poisson", "nb"):
        grids = [make_grid(family, mean) for mean in (1e-8, 7.3, 1e6)]
        tails = [genes.counts(family).log_tails(double(*count)) for genes, count in grids]
        for side in range(2):
            assert min(tail[side].min().item() for tail in tails) < -1e5


@pytest.mark.parametrize("family", ["poisson", "nb"])
def test_counts_that_dwarf_their_mean_have_exact_tails(family) -> None:
    """Genes that are off, with counts: from some mean down, count - mean is the count."""
    thetas = (1e-3, 2.0, 1e6) if family == "nb" else (1.0,)
    means, counts = (1e-30, 1e-20, 1e-12, 1e-8, 1e-3), (1, 3, 1000, 1_000_000)
    rows = [(mean, theta, 0.0, x) for mean in means for theta in thetas for x in counts]
    *parameters, count = (double(*column) for column in zip(*rows, strict=True))
    found = Genes(*parameters).counts(family).log_tails(count).upper
    exact = double(*(exact_tails(family, *row)[1] for row in rows))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------- against scipy


@pytest.mark.parametrize("family", [*FAMILIES, "zip"])
def test_log_tails_are_scipys_where_scipy_has_them(family) -> None:
    genes = make_genes(2000, log_mean=(-6, 5))
    count = make_counts(genes)
    found = genes.counts(family).log_tails(count)
    # By the incomplete gamma and beta functions: scipy's nbinom takes 1 - p from a p near one.
    a, mean, theta = count.numpy() + 1, genes.mean.numpy(), genes.theta.numpy()
    if "nb" in family:
        hit = mean / (mean + theta)
        lower, upper = special.betaincc(a, theta, hit), special.betainc(a, theta, hit)
    else:
        lower, upper = special.gammaincc(a, mean), special.gammainc(a, mean)
    dropped = genes.dropout(family)
    lower, upper = dropped + (1 - dropped) * lower, (1 - dropped) * upper
    for log_tail, expected in ((found.lower, lower), (found.upper, upper)):
        known = expected > 1e-250
        assert known.mean() > 0.4
        np.testing.assert_allclose(log_tail.numpy()[known], np.log(expected[known]), 1e-9, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_tails_at_zero_are_the_mass_at_zero(family) -> None:
    genes = make_genes()
    found = genes.counts(family).log_tails(torch.zeros(len(genes), dtype=torch.float64))
    mean, theta, kept = genes.mean.numpy(), genes.theta.numpy(), 1 - genes.dropout(family)
    log_zero = -theta * np.log1p(mean / theta) if "nb" in family else -mean
    log_lower = np.log1p(kept * np.expm1(log_zero)) if family.startswith("z") else log_zero
    np.testing.assert_allclose(found.lower, log_lower, 1e-12, 1e-15)
    np.testing.assert_allclose(found.upper, np.log(kept * -np.expm1(log_zero)), 1e-12, 1e-15)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_lies_below_zero(family) -> None:
    genes = make_genes()
    found = genes.counts(family).log_tails(torch.full((len(genes),), -1.0, dtype=torch.float64))
    assert (found.lower == -torch.inf).all()
    assert (found.upper == 0).all()


@pytest.mark.parametrize("family", [*FAMILIES, "zip"])
def test_moments_are_those_summed_over_the_support(family) -> None:
    genes = Genes(double(0.3, 2.0, 6.0), double(0.8, 3.0, 500.0), double(-3.0, 0.0, 1.0))
    counts = genes.counts(family)
    support = torch.arange(-1.0, 3000.0, dtype=torch.float64)
    for gene in range(len(genes)):
        own = counts.take(torch.full((len(support),), gene))
        mass = own.log_tails(support).lower.exp().diff()
        mean = (support[1:] * mass).sum()
        variance = (support[1:] ** 2 * mass).sum() - mean**2
        torch.testing.assert_close(counts.mean[gene], mean, rtol=1e-9, atol=0)
        torch.testing.assert_close(counts.variance[gene], variance, rtol=1e-9, atol=0)


# --------------------------------------------------------------------------- laws of the tails


@pytest.mark.parametrize("family", FAMILIES)
def test_tails_sum_to_one(family) -> None:
    genes = make_genes()
    lower, upper = genes.counts(family).log_tails(make_counts(genes))
    assert (torch.maximum(lower, upper) <= 1e-15).all()
    torch.testing.assert_close(
        torch.logaddexp(lower, upper), torch.zeros_like(lower), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_tails_are_monotone_in_the_count(family) -> None:
    """On which bisection depends."""
    genes, support = make_genes(60), torch.arange(-1.0, 120.0, dtype=torch.float64)
    counts = genes.take(torch.arange(60).repeat_interleave(len(support))).counts(family)
    lower, upper = (v.reshape(60, -1) for v in counts.log_tails(support.repeat(60)))
    assert (lower.diff() >= -1e-15).all()
    assert (upper.diff() <= 1e-15).all()
    assert (upper.diff() < -1e-15).float().mean() > 0.6  # and do move


@pytest.mark.parametrize("family", FAMILIES)
def test_tails_are_monotone_in_the_mean(family) -> None:
    genes = make_genes()
    larger = genes.with_mean(genes.mean * 1.01)
    count = make_counts(genes)
    few, many = (g.counts(family).log_tails(count) for g in (genes, larger))
    slack = 1e-9 + 1e-12 * many.upper.abs()
    assert (many.upper >= few.upper - slack).all()
    assert (many.lower <= few.lower + 1e-9 + 1e-12 * few.lower.abs()).all()


def test_negative_binomial_of_no_dispersion_is_a_poisson() -> None:
    genes = make_genes(log_mean=(-4, 2))
    count = torch.ceil(3 * genes.mean)
    narrow = NegativeBinomialCounts(genes.mean, torch.full_like(genes.mean, 1e12))
    for found, expected in zip(
        narrow.log_tails(count), PoissonCounts(genes.mean).log_tails(count), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_negative_binomial_of_theta_one_is_geometric() -> None:
    """P(X > x) = (mean / (mean + 1)) ** (x + 1), far below underflow too."""
    genes = make_genes(log_mean=(-8, 5))
    count = make_counts(genes)
    found = NegativeBinomialCounts(genes.mean, torch.ones_like(genes.mean)).log_tails(count)
    expected = -(count + 1) * torch.log1p(1 / genes.mean)
    torch.testing.assert_close(found.upper, expected, rtol=1e-11, atol=1e-13)


# ------------------------------------------------------------------- the noise of observed counts


@pytest.mark.parametrize("family", ["poisson", "nb"])
def test_noise_gives_back_the_counts_exactly(family) -> None:
    """For outliers of 100 times the mean and 100,000 counts of genes that are off, too."""
    genes = make_genes(1000, log_mean=(-8, 3))
    count, counts = make_counts(genes), genes.counts(family)
    z = (count - counts.mean) / counts.variance.sqrt()
    assert (z.abs() < 3).sum() > 50
    assert (z > 300).sum() > 50
    noise = count_noise(counts, count, make_uniform(len(genes)))
    assert torch.equal(count_at(counts, noise), count)


def test_noise_gives_back_low_outliers_exactly() -> None:
    """Also thousands of standard deviations below the mean, where F is exp(-10,000)."""
    mean, count = double(50, 200, 500, 500, 5000, 1e4), double(1, 0, 1, 300, 4000, 0)
    for theta in (None, 20.0, 1000.0):
        counts: Counts = PoissonCounts(mean)
        if theta:
            counts = NegativeBinomialCounts(mean, torch.full_like(mean, theta))
        noise = count_noise(counts, count, torch.full_like(mean, 0.5))
        assert not noise.is_upper.any()
        assert count_at(counts, noise).tolist() == count.tolist()


@pytest.mark.parametrize("family", ["zip", "zinb"])
def test_noise_gives_back_zero_inflated_counts_exactly(family) -> None:
    """Zeros, usual counts and large ones; test_noise.py has the counts far below their mean."""
    genes = make_genes(1000)
    count, counts = make_counts(genes, low=False), genes.counts(family)
    assert (count == 0).sum() > 50
    noise = count_noise(counts, count, make_uniform(len(genes)))
    assert torch.equal(count_at(counts, noise), count)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_of_counts_that_a_gene_cannot_have_is_finite_and_exact(family) -> None:
    count, means = double(0, 1, 2, 3, 50, 100_000), (1e-30, 1e-20, 1e-16, 1e-12)
    theta = double(1e-3, 0.1, 1, 10, 1e3, 1e6).repeat(len(means))
    genes = Genes(double(*means).repeat_interleave(len(count)), theta, torch.zeros_like(theta))
    count, counts = count.repeat(len(means)), genes.counts(family)
    noise = count_noise(counts, count, torch.full_like(count, 0.5))
    assert noise.log_tail.isfinite().all()
    assert torch.equal(count_at(counts, noise), count)


@pytest.mark.parametrize("family", ["poisson", "nb"])
def test_shares_at_the_ends_are_moved_inside(family) -> None:
    genes = make_genes(200)
    share = double(0.0, 1e-12, 1 - 1e-12, 1.0).repeat_interleave(len(genes))
    count, counts = make_counts(genes).repeat(4), genes.repeat(4).counts(family)
    noise = count_noise(counts, count, share)
    assert noise.log_tail.isfinite().all()
    assert (noise.log_tail < 0).all()
    assert torch.equal(count_at(counts, noise), count)
    inside = count_noise(counts, count, share.clamp(2.0**-25, 1 - 2.0**-25))
    assert torch.equal(noise.log_tail, inside.log_tail)


def test_shares_at_the_ends_hold_where_one_count_hardly_matters() -> None:
    """Heavy tails at large counts: a count holds less than 2⁻²⁸ of the tail that it begins."""
    share = double(0.0, 1e-6, 0.5, 1.0).repeat(3)
    genes = Genes(
        double(1e6, 1e6, 1e5).repeat_interleave(4),
        double(1e-3, 0.05, 1e-3).repeat_interleave(4),
        torch.zeros_like(share),
    )
    counts, count = genes.counts("nb"), torch.full_like(share, 1e8)
    assert count_at(counts, count_noise(counts, count, share)).tolist() == count.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_lies_between_the_tails_of_the_count_below_and_of_the_count(family) -> None:
    genes = make_genes(log_mean=(-3, 3))
    count, counts = make_counts(genes), genes.counts(family)
    at, below = counts.log_tails(count), counts.log_tails(count - 1)
    for share in (0.0, 0.3, 1.0):
        tail, upper = count_noise(counts, count, torch.full_like(count, share))
        assert 0.02 < upper.float().mean() < 0.98
        assert (tail <= math.log(0.5) + 1e-12).all()  # the smaller of both
        assert torch.where(upper, tail >= at.upper, tail >= below.lower).all()
        assert torch.where(upper, tail <= below.upper, tail <= at.lower).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_at_its_share_of_the_interval(family) -> None:
    """u = F(x - 1) + share (F(x) - F(x - 1)), F by scipy."""
    genes = make_genes(log_mean=(-1, 2), log_theta=(-1, 3))
    count, share = torch.round(0.8 * genes.mean), make_uniform(len(genes))
    found = uniform_of(count_noise(genes.counts(family), count, share))
    low, high = (cdf(family, genes, count.numpy() - k) for k in (1, 0))
    assert (high - low > 1e-6).mean() > 0.9
    np.testing.assert_allclose(found, low + share.double().numpy() * (high - low), 0, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_of_drawn_counts_is_uniform(family, rng) -> None:
    genes = make_genes(20_000, log_mean=(-2, 3), log_theta=(-1, 2))
    kept = rng.random(len(genes)) >= genes.dropout(family)
    count = torch.from_numpy(genes.scipy(family).rvs(random_state=rng) * kept).double()
    share = torch.from_numpy(rng.random(len(genes)))
    found = uniform_of(count_noise(genes.counts(family), count, share))
    assert stats.kstest(found, "uniform").pvalue > 1e-2
    # And is not, where the counts are those of a tenth more.
    other = genes.with_mean(1.1 * genes.mean)
    wrong = uniform_of(count_noise(other.counts(family), count, share))
    assert stats.kstest(wrong, "uniform").pvalue < 1e-2


# -------------------------------------------------------------------------- counts at their noise


@pytest.mark.parametrize("family", [*FAMILIES, "zip"])
def test_counts_at_noise_are_scipys_quantiles(family) -> None:
    genes = make_genes(2000, log_mean=(-3, 3), log_theta=(-2, 4))
    u = 1e-6 + (1 - 2e-6) * make_uniform(len(genes)).double()
    found = count_at(genes.counts(family), make_noise(u)).numpy()
    expected = ppf(family, genes, u.numpy())
    assert (expected > 0).mean() > 0.2
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_at_extreme_noise_are_the_smallest_that_reach_it(family) -> None:
    genes = make_genes(40, log_mean=(-8, 4)).repeat(8)
    counts = genes.counts(family)
    tail = double(-30, -700, -20_000, -1e6).repeat_interleave(80)
    upper = torch.arange(320) % 80 < 40
    found = count_at(counts, CountNoise(tail, upper))
    at, below = counts.log_tails(found), counts.log_tails(found - 1)
    assert (found > genes.mean)[upper].all()
    assert (at.upper <= tail)[upper].all()
    assert (below.upper > tail)[upper].all()
    assert (found <= genes.mean)[~upper].all()
    assert (at.lower >= tail)[~upper].all()
    assert (below.lower < tail)[~upper].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_do_not_fall_when_the_mean_grows(family) -> None:
    genes = make_genes(150, log_mean=(-6, 2))
    count = make_counts(genes, low=not family.startswith("z"))
    tail, upper = count_noise(genes.counts(family), count, make_uniform(len(genes)))
    factor = double(0.02, 0.8, 0.9999, 1.0001, 1.2, 50.0).unsqueeze(1)
    other = genes.repeat(len(factor)).with_mean((factor * genes.mean).ravel())
    noise = CountNoise(tail.repeat(len(factor)), upper.repeat(len(factor)))
    found = count_at(other.counts(family), noise).reshape(len(factor), -1)
    assert (found[:3] <= count).all()
    assert (found[3:] >= count).all()
    assert (found.diff(dim=0) >= 0).all()
    assert (found[0] < count).float().mean() > 0.3
    assert (found[-1] > count).float().mean() > 0.3


@pytest.mark.parametrize("family", ["zip", "zinb"])
def test_counts_do_not_grow_with_dropout(family) -> None:
    genes = make_genes(100, log_mean=(-1, 2))
    count = make_counts(genes, low=False)
    noise = count_noise(genes.counts(family), count, make_uniform(len(genes)))
    more = dataclasses.replace(genes, logits=genes.logits + 1)
    found = count_at(more.counts(family), noise)
    assert (found <= count).all()
    assert ((found == 0) & (count > 0)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_genes_that_do_not_change_keep_their_counts(family) -> None:
    genes = make_genes()
    count = make_counts(genes, low=not family.startswith("z"))
    noise = count_noise(genes.counts(family), count, make_uniform(len(genes)))
    changed = torch.arange(len(genes)) % 3 == 0
    other = genes.with_mean(torch.where(changed, 20 * genes.mean, genes.mean))
    found = count_at(other.counts(family), noise)
    assert torch.equal(found[~changed], count[~changed])
    assert (found[changed] > count[changed]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_elements_do_not_know_of_each_other(family) -> None:
    """Order and company change no count; tails neither, but for the last bit of vector units."""
    genes = make_genes(101, log_mean=(-8, 2))
    count, share = make_counts(genes), make_uniform(len(genes))
    target = genes.with_mean(genes.mean.flip(0))

    def results(index: Tensor) -> tuple[Tensor, ...]:
        counts = genes.take(index).counts(family)
        noise = count_noise(counts, count[index], share[index])
        moved = count_at(target.take(index).counts(family), noise)
        return (*counts.log_tails(count[index]), *noise, moved)

    everyone = results(torch.arange(len(genes)))
    order = torch.randperm(len(genes), generator=torch.Generator().manual_seed(3))
    for index in (order, order[:17], order[5:6]):
        some = results(index)
        for whole, part in zip(everyone, some, strict=True):
            torch.testing.assert_close(whole[index], part, rtol=1e-13, atol=1e-15)
        assert torch.equal(everyone[-1][index], some[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_taking_elements_takes_all_their_parameters(family) -> None:
    genes = make_genes(40)
    count = make_counts(genes)
    mask = torch.arange(40) % 3 == 1
    counts, chosen = genes.counts(family), genes.take(mask).counts(family)
    for index in (mask, mask.nonzero().ravel()):
        taken = counts.take(index)
        assert type(taken) is type(counts)
        assert torch.equal(taken.mean, chosen.mean)
        assert torch.equal(taken.variance, chosen.variance)
        assert torch.equal(taken.log_tails(count[mask]).upper, chosen.log_tails(count[mask]).upper)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_elements_are_no_counts(family) -> None:
    counts, nothing = make_genes(0).counts(family), double()
    assert [tail.shape for tail in counts.log_tails(nothing)] == [(0,), (0,)]
    noise = count_noise(counts, nothing, nothing)
    assert noise.log_tail.dtype == torch.float64
    assert noise.is_upper.dtype == torch.bool
    found = count_at(counts, noise)
    assert found.shape == (0,)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_are_left_as_they_were(family) -> None:
    genes = make_genes(50)
    count, share = make_counts(genes), make_uniform(50)
    given = (genes.mean, genes.theta, genes.logits, count, share)
    before = [value.clone() for value in given]
    counts = genes.counts(family)
    noise = count_noise(counts, count, share)
    tail = noise.log_tail.clone()
    count_at(counts, noise)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert torch.equal(noise.log_tail, tail)


class Watched:
    """Counts that note how many tails are asked of them."""

    def __init__(self, counts: Counts, asked: list[int] | None = None) -> None:
        self.counts = counts
        self.asked = [] if asked is None else asked

    @property
    def mean(self) -> Tensor:
        return self.counts.mean

    @property
    def variance(self) -> Tensor:
        return self.counts.variance

    def take(self, index: Tensor) -> Watched:
        return Watched(self.counts.take(index), self.asked)

    def log_tails(self, count: Tensor) -> LogTails:
        self.asked.append(len(count))
        return self.counts.log_tails(count)


def test_most_elements_are_settled_at_once_and_all_in_few_steps() -> None:
    """Zeros cost one look; the search ends in a number of steps that is logarithmic in counts."""
    genes = make_genes(2000, log_mean=(-3, 4))
    u = 1e-9 + (1 - 2e-9) * make_uniform(len(genes)).double()
    watched = Watched(genes.counts("nb"))
    found = count_at(watched, make_noise(u))
    assert watched.asked[0] == len(genes)
    assert watched.asked[1] == (found > 0).sum()
    assert len(watched.asked) < 70
    assert sum(watched.asked) < 15 * len(genes)
