"""The rising factorial of counts, two to three times as fast as torch's log gamma and its slope."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["log_rising"]

_SHIFT, _DOUBLE_SHIFT = 4, 8
# Of Stirling's series of log gamma, and of the digamma function, in odd and even powers of 1/z.
_LOG_GAMMA = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680)
_DIGAMMA = (-1 / 12, 1 / 120, -1 / 252, 1 / 240)


def log_rising(counts: Tensor, start: Tensor) -> Tensor:
    """Return the sum over genes of log(θ (θ+1) ... (θ+x-1)) = lgamma(x+θ) - lgamma(θ).

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
    return _LogRising.apply(counts, start)


class _LogRising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counts: Tensor, start: Tensor) -> Tensor:
        shift = _DOUBLE_SHIFT if counts.dtype == torch.float64 else _SHIFT
        low = start + shift
        high = counts + low
        log_ratio = torch.log1p(counts / low)
        inverse, inverse_low = high.reciprocal(), low.reciprocal()
        square, square_low = inverse.square(), inverse_low.square()
        # lgamma(high) - lgamma(low), by Stirling, less the factors between.
        total = (low - 0.5) * log_ratio + counts * (high.log() - 1)
        total += inverse * _series(square, _LOG_GAMMA) - inverse_low * _series(
            square_low, _LOG_GAMMA
        )
        for first in range(0, shift, 4):  # the product of all may overflow
            product = 1 + counts / (start + first)
            for k in range(first + 1, first + 4):
                product *= 1 + counts / (start + k)
            total -= product.log_()
        if ctx.needs_input_grad[1]:
            slope = log_ratio - 0.5 * (inverse - inverse_low)
            slope += square * _series(square, _DIGAMMA) - square_low * _series(square_low, _DIGAMMA)
            for k in range(shift):
                slope += (start + k).reciprocal()
                slope -= (counts + (start + k)).reciprocal_()
            ctx.save_for_backward(slope)
        return total.sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(-1) * slope
        return None, gradient.flatten(0, -2).sum(0)


def _series(value: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return the polynomial with these coefficients, the constant one first."""
    *rest, last = coefficients
    total = torch.full_like(value, last)
    for coefficient in reversed(rest):
        total = total * value + coefficient
    return total
