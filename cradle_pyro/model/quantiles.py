"""Tails and quantiles of count distributions, elementwise, in double precision, on any device.

A count's noise is where it lies in its distribution: a uniform number in [F(x - 1), F(x)]. Near one
such numbers run out of digits, so that both tails are kept, in logarithms: log F and log(1 - F).
torch.special has the incomplete gamma functions, but not their logarithms, and no incomplete beta.

References
----------
Tails: Press, Teukolsky, Vetterling and Flannery, "Numerical Recipes", 3rd edition 2007, sections
6.2 and 6.4 (incomplete gamma and beta functions). Probabilities: Loader, "Fast and accurate
computation of binomial probabilities", 2000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

__all__ = [
    "CountNoise",
    "Counts",
    "LogTails",
    "NegativeBinomialCounts",
    "PoissonCounts",
    "ZeroInflatedCounts",
    "count_at",
    "count_noise",
    "dropout_noise",
]

_EPSILON = 1e-15
_TINY = 1e-300
_SMALLEST_MEAN = 1e-30
_ROUNDING = 1e-11
_MOST_ITERATIONS = 200_000
_LOOK_EVERY = 4
_LOG_HALF = math.log(0.5)
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_LARGEST_COUNT = 2.0**52


class LogTails(NamedTuple):
    """Both tails of a distribution at some counts, in natural logarithms.

    Parameters
    ----------
    lower
        log P(X <= count), same shape as the counts.
    upper
        log P(X > count), same shape.
    """

    lower: Tensor
    upper: Tensor


class CountNoise(NamedTuple):
    """Where counts lie in their distributions: one number u in (0, 1) for each.

    Parameters
    ----------
    log_tail
        log(1 - u) where `is_upper`, else log u; double, any shape.
    is_upper
        Which of the two, bool, same shape: the smaller one.
    """

    log_tail: Tensor
    is_upper: Tensor


class Counts(Protocol):
    """What quantiles need of a family of count distributions, one for each element."""

    @property
    def mean(self) -> Tensor:
        """Means, shape (elements,)."""

    @property
    def variance(self) -> Tensor:
        """Variances, shape (elements,)."""

    def take(self, index: Tensor) -> Self:
        """Return the distributions at positions or under a mask."""

    def log_tails(self, count: Tensor) -> LogTails:
        """Return both tails at whole numbers >= -1, shape (elements,)."""


@dataclass(frozen=True)
class PoissonCounts:
    """Poisson counts.

    Parameters
    ----------
    mean
        Shape (elements,), double.
    """

    mean: Tensor

    @property
    def variance(self) -> Tensor:
        """Equal to the mean."""
        return self.mean

    def take(self, index: Tensor) -> PoissonCounts:
        """Return the distributions at positions or under a mask."""
        return PoissonCounts(self.mean[index])

    def log_tails(self, count: Tensor) -> LogTails:
        """Return both tails at whole numbers >= -1: incomplete gamma functions."""
        mean = self.mean.clamp(min=_SMALLEST_MEAN)
        lower, upper, rest = _tails_up_to_zero(count, -mean)
        shape, mean = count[rest] + 1, mean[rest]
        front = _poisson_log_prob(shape, mean)
        above = mean < shape + 1
        log_tail = torch.empty_like(front)
        log_tail[above] = front[above] + _gamma_series(shape[above], mean[above]).log()
        below = ~above
        fraction = _gamma_fraction(shape[below], mean[below])
        log_tail[below] = front[below] + shape[below].log() + fraction.log()
        return _with_rest(lower, upper, rest, log_tail, above)


@dataclass(frozen=True)
class NegativeBinomialCounts:
    """Negative binomial counts, variance = mean + mean² / inverse dispersion.

    Parameters
    ----------
    mean, inverse_dispersion
        Shape (elements,), double.
    """

    mean: Tensor
    inverse_dispersion: Tensor

    @property
    def variance(self) -> Tensor:
        """Shape (elements,)."""
        return self.mean + self.mean**2 / self.inverse_dispersion

    def take(self, index: Tensor) -> NegativeBinomialCounts:
        """Return the distributions at positions or under a mask."""
        return NegativeBinomialCounts(self.mean[index], self.inverse_dispersion[index])

    def log_tails(self, count: Tensor) -> LogTails:
        """Return both tails at whole numbers >= -1: incomplete beta functions."""
        mean, theta = self.mean.clamp(min=_SMALLEST_MEAN), self.inverse_dispersion
        lower, upper, rest = _tails_up_to_zero(count, -theta * torch.log1p(mean / theta))
        above_count, mean, theta = count[rest] + 1, mean[rest], theta[rest]
        hit, miss = mean / (mean + theta), theta / (mean + theta)
        front = _negative_binomial_log_prob(above_count, mean, theta)
        # I_hit(count + 1, theta) = P(X > count), I_miss(theta, count + 1) = P(X <= count):
        # the continued fraction converges fast for the one whose argument is small.
        above = hit * (above_count + theta + 2) < above_count + 1
        first = torch.where(above, above_count, theta)
        second = torch.where(above, theta, above_count)
        fraction = _beta_fraction(first, second, torch.where(above, hit, miss))
        front = torch.where(above, front, front + above_count.log() - theta.log())
        return _with_rest(lower, upper, rest, front + fraction.log(), above)


@dataclass(frozen=True)
class ZeroInflatedCounts:
    """Counts of which some are dropped to zero; dropped counts are the lowest quantiles.

    Parameters
    ----------
    counts
        The counts before dropout.
    dropout_logits
        Log-odds of dropout, shape (elements,), double.
    """

    counts: Counts
    dropout_logits: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean after dropout, shape (elements,)."""
        return self.counts.mean * torch.sigmoid(-self.dropout_logits)

    @property
    def variance(self) -> Tensor:
        """Variance after dropout, shape (elements,)."""
        kept = torch.sigmoid(-self.dropout_logits)
        return kept * (self.counts.variance + (1 - kept) * self.counts.mean**2)

    def take(self, index: Tensor) -> ZeroInflatedCounts:
        """Return the distributions at positions or under a mask."""
        return ZeroInflatedCounts(self.counts.take(index), self.dropout_logits[index])

    def log_tails(self, count: Tensor) -> LogTails:
        """Return both tails at whole numbers >= -1."""
        tails = self.counts.log_tails(count)
        dropped = torch.nn.functional.logsigmoid(self.dropout_logits)
        kept = torch.nn.functional.logsigmoid(-self.dropout_logits)
        lower = torch.logaddexp(dropped, kept + tails.lower)
        below = count < 0
        lower = torch.where(below, tails.lower, lower)
        return LogTails(lower, torch.where(below, tails.upper, kept + tails.upper))


def count_noise(counts: Counts, observed: Tensor, uniform: Tensor) -> CountNoise:
    """Return the noise of observed counts: u in [F(x - 1), F(x)], at the share `uniform` of it.

    Parameters
    ----------
    counts
        Distributions of the counts.
    observed
        Whole numbers >= 0, shape (elements,), double.
    uniform
        In (0, 1), same shape, independent of everything. Shares nearer to the ends than 2⁻²⁵ (more
        where a count holds next to nothing of its tail) are moved there, so that rounding never
        takes u over them: :func:`count_at` returns the observed counts exactly.
    """
    at, below = counts.log_tails(observed), counts.log_tails(observed - 1)
    # How much of the smaller tail, the one that is used, the count holds.
    width = -torch.expm1(torch.minimum(below.lower - at.lower, at.upper - below.upper))
    least = (_ROUNDING / width.clamp(min=_TINY)).clamp(2.0**-25, 0.5)
    share = torch.minimum(torch.maximum(uniform.to(observed.dtype), least), 1 - least)
    log_u = at.lower + torch.log((1 - share) * torch.exp(below.lower - at.lower) + share)
    log_rest = below.upper + torch.log(share * torch.exp(at.upper - below.upper) + (1 - share))
    is_upper = log_u > _LOG_HALF
    return CountNoise(torch.where(is_upper, log_rest, log_u), is_upper)


def dropout_noise(
    counts: ZeroInflatedCounts, observed: Tensor, uniforms: Tensor
) -> tuple[CountNoise, Tensor]:
    """Return the noise of counts before dropout, and the uniform numbers that drop them.

    A count is dropped where its number lies below the probability of dropout, as the lowest
    quantiles are. Kept apart, neither loses digits beside the other.

    Parameters
    ----------
    counts
        Distributions of the counts.
    observed
        Whole numbers >= 0, shape (elements,), double.
    uniforms
        In (0, 1), shape (3, elements), independent of everything.
    """
    first, second, third = uniforms.to(observed.dtype)
    probability = torch.sigmoid(counts.dropout_logits)
    at_zero = counts.counts.log_tails(torch.zeros_like(observed)).lower.exp()
    share = probability / (probability + (1 - probability) * at_zero)
    dropped = (observed == 0) & (second < share)
    kept = count_noise(counts.counts, observed, first)
    is_upper = torch.where(dropped, first > 0.5, kept.is_upper)
    free = torch.where(first > 0.5, torch.log1p(-first), first.log())
    noise = CountNoise(torch.where(dropped, free, kept.log_tail), is_upper)
    at_least = probability + third * (1 - probability)
    return noise, torch.where(dropped, third * probability, at_least)


def count_at(counts: Counts, noise: CountNoise) -> Tensor:
    """Return the counts at which distributions reach `noise`: the smallest x with F(x) >= u.

    Parameters
    ----------
    counts
        Distributions, of any means; where they are those that the noise was abducted under, the
        observed counts come back exactly. Larger distributions (in stochastic order) give larger
        counts or the same.
    noise
        Shape (elements,).

    Notes
    -----
    A Cornish-Fisher guess, steps of doubling length to a bracket, then bisection; all of it on the
    elements that are not settled yet, which are few where most counts are zero.
    """
    result = torch.zeros_like(noise.log_tail)
    active = (~_reached(counts, noise, result)).nonzero().ravel()
    counts, noise = counts.take(active), CountNoise(*(value[active] for value in noise))
    low = torch.zeros_like(noise.log_tail)  # not reached there
    high = torch.full_like(low, torch.inf)  # reached there
    step = torch.ones_like(low)
    probe = _guess(counts, noise)
    while len(active):
        reached = _reached(counts, noise, probe)
        high = torch.where(reached, probe, high)
        low = torch.where(reached, low, probe)
        settled = high - low <= 1
        result[active[settled]] = high[settled]
        keep = (~settled).nonzero().ravel()
        counts, noise = counts.take(keep), CountNoise(*(value[keep] for value in noise))
        active, low, high, step, reached = (v[keep] for v in (active, low, high, step, reached))
        middle = torch.floor((low + high) / 2)
        down, up = torch.maximum(high - step, middle), torch.minimum(low + step, middle)
        probe = torch.where(reached, down, up).clamp(max=_LARGEST_COUNT)
        step = 2 * step
    return result


def _reached(counts: Counts, noise: CountNoise, count: Tensor) -> Tensor:
    """Return where F(count) >= u."""
    tails = counts.log_tails(count)
    return torch.where(
        noise.is_upper, tails.upper <= noise.log_tail, tails.lower >= noise.log_tail
    ) | (count >= _LARGEST_COUNT)


def _guess(counts: Counts, noise: CountNoise) -> Tensor:
    """Return counts >= 1 near the quantile, by the Cornish-Fisher expansion to the third cumulant.

    The skewness is that of a negative binomial with these moments.
    """
    mean, variance = counts.mean.clamp(min=_SMALLEST_MEAN), counts.variance
    sd = variance.clamp(min=_SMALLEST_MEAN).sqrt()
    # An approximation of the normal quantile, Abramowitz and Stegun 1964, 26.2.22.
    t = (-2 * noise.log_tail.clamp(max=_LOG_HALF)).sqrt()
    size = t - (2.30753 + 0.27061 * t) / (1 + 0.99229 * t + 0.04481 * t**2)
    z = torch.where(noise.is_upper, size, -size)
    skewness = (2 * variance / mean - 1) / sd
    guess = torch.round(mean + sd * (z + skewness * (z**2 - 1) / 6))
    return guess.nan_to_num(nan=1.0).clamp(1, _LARGEST_COUNT)


def _tails_up_to_zero(count: Tensor, log_zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both tails at counts -1 and 0, and where counts are larger."""
    below = count < 0
    lower = torch.where(below, -torch.inf, log_zero)
    upper = torch.where(below, 0.0, _log_complement(log_zero))
    return lower, upper, (count > 0).nonzero().ravel()


def _with_rest(
    lower: Tensor, upper: Tensor, rest: Tensor, log_tail: Tensor, is_upper: Tensor
) -> LogTails:
    """Return the tails with those at `rest` filled in from the one that was computed."""
    log_tail = log_tail.clamp(max=0)
    other = _log_complement(log_tail)
    lower[rest] = torch.where(is_upper, other, log_tail)
    upper[rest] = torch.where(is_upper, log_tail, other)
    return LogTails(lower, upper)


def _log_complement(log_value: Tensor) -> Tensor:
    """Return log(1 - exp(log_value)) for log_value <= 0."""
    return torch.where(
        log_value > _LOG_HALF,
        torch.log(-torch.expm1(log_value)),
        torch.log1p(-torch.exp(log_value)),
    )


def _poisson_log_prob(count: Tensor, mean: Tensor) -> Tensor:
    """Return the log-probability of counts >= 1, without the cancellation of log gammas."""
    return -_stirling_error(count) - _deviance(count, mean) - 0.5 * count.log() - _HALF_LOG_TWO_PI


def _negative_binomial_log_prob(count: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """Return the log-probability of counts >= 1, without the cancellation of log gammas."""
    total = count + theta
    expected = total / (mean + theta)
    errors = _stirling_error(total) - _stirling_error(theta) - _stirling_error(count)
    deviances = _deviance(theta, expected * theta) + _deviance(count, expected * mean)
    scale = 0.5 * (theta.log() - count.log() - total.log())
    return errors - deviances + scale - _HALF_LOG_TWO_PI


def _stirling_error(value: Tensor) -> Tensor:
    """Return log Γ(value + 1) minus Stirling's approximation of it."""
    small = value < 16
    near = torch.where(small, value, torch.ones_like(value))
    exact = torch.lgamma(near + 1) - (near + 0.5) * near.log() + near - _HALF_LOG_TWO_PI
    inverse = 1 / torch.where(small, torch.full_like(value, 16.0), value)
    square = inverse**2
    series = inverse * (
        1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188)))
    )
    return torch.where(small, exact, series)


def _deviance(value: Tensor, expected: Tensor) -> Tensor:
    """Return value log(value / expected) + expected - value, accurate near and far."""
    ratio = (expected - value) / value
    near = ratio.abs() < 0.5
    close = value * (ratio - torch.log1p(torch.where(near, ratio, torch.zeros_like(ratio))))
    return torch.where(near, close, value * (value.log() - expected.log()) + (expected - value))


class _Refined:
    """Values that are refined step by step; those that have converged are set aside."""

    def __init__(self, *arguments: Tensor) -> None:
        self.value = torch.empty_like(arguments[0])
        self.active = torch.arange(len(self.value), device=self.value.device)

    def set_aside(
        self, value: Tensor, converged: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Return the state of those that go on, or None when there are none."""
        self.value[self.active[converged]] = value[converged]
        going_on = (~converged).nonzero().ravel()
        if not len(going_on):
            return None
        self.active = self.active[going_on]
        return tuple(part[going_on] for part in state)


def _gamma_series(shape: Tensor, mean: Tensor) -> Tensor:
    """Return the sum over n >= 0 of meanⁿ / ((shape + 1) ... (shape + n))."""
    refined = _Refined(shape)
    total, term = torch.ones_like(shape), torch.ones_like(shape)
    for n in range(1, _MOST_ITERATIONS):
        term = term * mean / (shape + n)
        total = total + term
        if n % _LOOK_EVERY == 0 or not len(shape):
            state = refined.set_aside(total, term < _EPSILON * total, shape, mean, total, term)
            if state is None:
                return refined.value
            shape, mean, total, term = state
    raise ArithmeticError(f"The gamma series did not converge at {shape[:3]}, {mean[:3]}.")


def _gamma_fraction(shape: Tensor, mean: Tensor) -> Tensor:
    """Return the continued fraction of Γ(shape, mean) eᵐ / meanˢ, by Lentz's method."""
    refined = _Refined(shape)
    b = mean + 1 - shape
    c = torch.full_like(b, 1 / _TINY)
    d = 1 / b
    value = d
    for n in range(1, _MOST_ITERATIONS):
        a = n * (shape - n)
        b = b + 2
        d = 1 / _not_zero(a * d + b)
        c = _not_zero(b + a / c)
        change = c * d
        value = value * change
        if n % _LOOK_EVERY == 0 or not len(shape):
            converged = (change - 1).abs() < _EPSILON
            state = refined.set_aside(value, converged, shape, b, c, d, value)
            if state is None:
                return refined.value
            shape, b, c, d, value = state
    raise ArithmeticError(f"The gamma fraction did not converge at {shape[:3]}.")


def _beta_fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Return the continued fraction of the incomplete beta function, by Lentz's method."""
    refined = _Refined(a)
    c = torch.ones_like(a)
    d = 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MOST_ITERATIONS):
        even = m * (b - m) * x / ((a + (2 * m - 1)) * (a + 2 * m))
        d = 1 / _not_zero(1 + even * d)
        c = _not_zero(1 + even / c)
        value = value * (c * d)
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + (2 * m + 1)))
        d = 1 / _not_zero(1 + odd * d)
        c = _not_zero(1 + odd / c)
        change = c * d
        value = value * change
        if m % _LOOK_EVERY == 0 or not len(a):
            converged = (change - 1).abs() < _EPSILON
            state = refined.set_aside(value, converged, a, b, x, c, d, value)
            if state is None:
                return refined.value
            a, b, x, c, d, value = state
    raise ArithmeticError(f"The beta fraction did not converge at {a[:3]}, {b[:3]}, {x[:3]}.")


def _not_zero(value: Tensor) -> Tensor:
    return torch.where(value.abs() < _TINY, _TINY, value)
