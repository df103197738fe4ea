"""The negative binomial's log-probability in two parts, each far cheaper than with plain autograd.

What depends on the mean is scored a block of cells at a time, so that nothing but the gradient is
ever as large as the mean. What does not is computed once for all particles, and only of counts
above zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import cache_blocks

__all__ = ["fractions", "log_choose", "mean_terms"]

_SHIFT, _DOUBLE_SHIFT = 4, 8
# Of Stirling's series of log gamma, and of the digamma function, in odd and even powers of 1/z.
_LOG_GAMMA = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680)
_DIGAMMA = (-1 / 12, 1 / 120, -1 / 252, 1 / 240)
_SMALLEST_RATIO = 1e-12


def mean_terms(
    rate: Tensor,
    inverse_dispersion: Tensor,
    counts: Tensor,
    library: Tensor | None = None,
    short_cut: Tensor | None = None,
) -> Tensor:
    """Return the sum over genes of x log(μ/θ) - (x+θ) log(1+μ/θ), where μ = library * rate.

    Parameters
    ----------
    rate
        Not negative, shape (..., cells, genes).
    inverse_dispersion
        θ > 0, shape (genes,).
    counts
        x >= 0, any shape that broadcasts with the rate's; receives no gradient.
    library
        Positive, any shape that broadcasts with (..., cells); by default one.
    short_cut
        The rate's, where it is of :func:`fractions`: the gradient of the rate goes that way (where
        it broadcasts with nothing).

    Returns
    -------
    Tensor
        Shape (..., cells). A ratio μ/θ below 1e-12 counts as that, in the gradient too.
    """
    library = rate.new_ones(()) if library is None else library
    rate, counts, library = torch.broadcast_tensors(rate, counts, library.unsqueeze(-1))
    if short_cut is not None and short_cut.shape[:-1] == rate.shape[:-1]:
        rate = rate.detach()
    else:
        short_cut = None
    return _MeanTerms.apply(rate, counts, inverse_dispersion, library[..., 0], short_cut)


def fractions(logits: Tensor, *, drop_last: bool = False) -> tuple[Tensor, Tensor]:
    """Return softmax(logits, -1), and a short cut for gradients past the softmax.

    Parameters
    ----------
    logits
        Shape (..., cells, categories).
    drop_last
        Leave out the fraction of the last category.

    Returns
    -------
    tuple
        The fractions, and a tensor of the logits' shape without values. What is passed to the
        latter as its gradient is that of the logits. Who can tell it from the fractions' gradient
        while that is in the cache, as :func:`mean_terms` can, need not keep both in memory.
    """
    every, short_cut = _Fractions.apply(logits)
    return every[..., :-1] if drop_last else every, short_cut


def log_choose(counts: Tensor, start: Tensor) -> Tensor:
    """Return the sum over genes of log C(x+θ-1, x) = lgamma(x+θ) - lgamma(θ) - lgamma(x+1).

    Parameters
    ----------
    counts
        x >= 0, shape (..., cells, genes); receives no gradient.
    start
        θ > 0, shape (genes,).

    Returns
    -------
    Tensor
        Shape (..., cells). Errors are those of the precision; where θ is large nothing is lost, as
        it is in a difference of log gammas.

    Notes
    -----
    lgamma(z) = lgamma(z+n) - log(z (z+1) ... (z+n-1)), and from n on Stirling's series is short.

    References
    ----------
    Abramowitz and Stegun 1964, 6.1.40 and 6.3.18.
    """
    return _LogChoose.apply(counts, start)


class _Fractions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        every = torch.softmax(logits, -1)
        ctx.save_for_backward(every)
        return every, logits.new_zeros(()).expand(logits.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        of_fractions, of_logits = gradients
        if of_fractions is None:
            return of_logits
        (every,) = ctx.saved_tensors
        through = every * (of_fractions - (of_fractions * every).sum(-1, keepdim=True))
        return through if of_logits is None else of_logits + through


class _MeanTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rate: Tensor,
        counts: Tensor,
        theta: Tensor,
        library: Tensor,
        short_cut: Tensor | None,
    ) -> Tensor:
        ctx.n_logits = None if short_cut is None else short_cut.shape[-1]
        ctx.save_for_backward(rate, counts, theta, library)
        total = rate.new_empty(rate.shape[:-1])
        for block in cache_blocks(rate):
            ratio = rate[block] * library[block].unsqueeze(-1)
            ratio.div_(theta).clamp_(min=_SMALLEST_RATIO)
            of_zeros = ratio.log1p().mul_(counts[block] + theta)
            total[block] = ratio.log_().mul_(counts[block]).sub_(of_zeros).sum(-1)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rate, counts, theta, library = ctx.saved_tensors
        *cells, n_genes = rate.shape
        found = rate.new_empty(*cells, ctx.n_logits or n_genes)  # of the rate, or of the logits
        of_rate = found[..., :n_genes]
        _, _, theta_learns, library_learns, _ = ctx.needs_input_grad
        of_theta = torch.zeros_like(theta) if theta_learns else None
        of_library = rate.new_empty(rate.shape[:-1]) if library_learns else None
        for block in cache_blocks(rate):
            weight, x, size = gradients[0][block], counts[block], library[block].unsqueeze(-1)
            mean = torch.maximum(rate[block] * size, _SMALLEST_RATIO * theta)
            share = (x + theta) / (mean + theta)
            slope = torch.div(x, mean, out=of_rate[block]).sub_(share)  # of a mean
            slope.mul_(weight.unsqueeze(-1))
            if of_library is not None:
                of_library[block] = (slope * rate[block]).sum(-1)
            slope.mul_(size)
            if of_theta is not None:
                ratio = mean.div_(theta)
                each = share.mul_(ratio).sub_(x / theta).sub_(ratio.log1p_())
                of_theta.addmv_(each.reshape(-1, len(theta)).t(), weight.reshape(-1))
            if ctx.n_logits is not None:  # what a softmax does to its gradient
                mean_slope = slope.mul_(rate[block]).sum(-1, keepdim=True)
                slope.addcmul_(rate[block], mean_slope, value=-1)
                if ctx.n_logits > n_genes:
                    dropped = 1 - rate[block].sum(-1, keepdim=True)
                    found[block][..., n_genes:] = -mean_slope * dropped
        if ctx.n_logits is None:
            return of_rate, None, of_theta, of_library, None
        return None, None, of_theta, of_library, found


class _LogChoose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counts: Tensor, start: Tensor) -> Tensor:
        rows = counts.reshape(-1, counts.shape[-1])
        needs_slope = ctx.needs_input_grad[1]
        if not _leaves_zeros_out(counts):
            each, slope = _choose(rows, start, needs_slope=needs_slope)
            ctx.save_for_backward(start, slope)
            return each.sum(-1).reshape(counts.shape[:-1])
        cells, genes = rows.nonzero(as_tuple=True)
        each, slope = _choose(rows[cells, genes], start[genes], needs_slope=needs_slope)
        ctx.save_for_backward(start, slope, cells, genes)
        return rows.new_zeros(len(rows)).index_add_(0, cells, each).reshape(counts.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        start, slope, *place = ctx.saved_tensors
        gradient = gradients[0].reshape(-1)
        if not place:
            return None, gradient @ slope
        cells, genes = place
        return None, torch.zeros_like(start).index_add_(0, genes, slope * gradient[cells])


def _leaves_zeros_out(counts: Tensor) -> bool:
    """Return whether counts of zero, which add nothing, are left out; a GPU would wait for them."""
    return not counts.is_cuda


def _choose(x: Tensor, theta: Tensor, *, needs_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return log C(x+θ-1, x) and its slope in θ, elementwise."""
    shift = _DOUBLE_SHIFT if x.dtype == torch.float64 else _SHIFT
    low = theta + shift
    high = x + low
    log_ratio = torch.log1p(x / low)
    inverse, inverse_low = high.reciprocal(), low.reciprocal()
    square, square_low = inverse.square(), inverse_low.square()
    # lgamma(high) - lgamma(low), by Stirling, less the factors between.
    value = (low - 0.5) * log_ratio + x * (high.log() - 1)
    value += inverse * _series(square, _LOG_GAMMA) - inverse_low * _series(square_low, _LOG_GAMMA)
    for first in range(0, shift, 4):  # the product of all may overflow
        factors = 1 + x / (theta + first)
        for k in range(first + 1, first + 4):
            factors *= 1 + x / (theta + k)
        value -= factors.log_()
    value -= torch.lgamma(x + 1)
    if not needs_slope:
        return value, None
    slope = log_ratio - 0.5 * (inverse - inverse_low)
    slope += square * _series(square, _DIGAMMA) - square_low * _series(square_low, _DIGAMMA)
    for k in range(shift):
        slope += (theta + k).reciprocal() - (x + (theta + k)).reciprocal_()
    return value, slope


def _series(value: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return the polynomial with these coefficients, the constant one first."""
    *rest, last = coefficients
    total = torch.full_like(value, last)
    for coefficient in reversed(rest):
        total = total * value + coefficient
    return total
