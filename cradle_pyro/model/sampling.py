"""Draws of negative binomial counts, at a cost that grows with the counts above zero."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import cache_blocks

__all__ = ["draw_counts"]

_MOST_CLUSTERS = 0.5  # per count; with more of them a gamma and a Poisson number cost less


def draw_counts(mean: Tensor, inverse_dispersion: Tensor) -> Tensor:
    """Return independent negative binomial counts, variance = mean + mean² / inverse_dispersion.

    Parameters
    ----------
    mean
        Not negative, shape (..., cells, genes).
    inverse_dispersion
        Positive, shape (genes,).

    Notes
    -----
    A negative binomial count is the sum of Poisson many clusters of logarithmic sizes (Quenouille
    1949). Where most counts are zero there are few clusters, and they are drawn as the points of a
    Poisson process that runs through all counts; their sizes follow Kemp 1981, algorithm LK.
    Elsewhere, and on a GPU, counts are Poisson around gamma means. Both are exact.

    References
    ----------
    Quenouille, "A relation between the logarithmic, Poisson, and negative binomial series",
    Biometrics 1949. Kemp, "Efficient generation of logarithmically distributed pseudo-random
    variables", Applied Statistics 1981.
    """
    if mean.is_cuda:
        return _gamma_poisson(mean, inverse_dispersion)
    counts = torch.empty_like(mean, memory_format=torch.contiguous_format)
    for block in cache_blocks(mean):
        counts[block] = _draw(mean[block], inverse_dispersion)
    return counts


def _draw(mean: Tensor, theta: Tensor) -> Tensor:
    log_ratio = torch.log1p(mean / theta)
    ends = (theta * log_ratio).flatten().cumsum(0, dtype=torch.float64)
    expected = ends[-1]
    if expected > _MOST_CLUSTERS * mean.numel():
        return _gamma_poisson(mean, theta)
    n_clusters = int(torch.poisson(expected))
    of, degree, quantile = torch.rand(3, n_clusters, dtype=torch.float64, device=mean.device)
    at = torch.searchsorted(ends, of.mul_(expected), right=True).clamp_(max=mean.numel() - 1)
    # Given its degree a cluster is geometric: it grows again with this probability.
    grows = -torch.expm1(-degree * log_ratio.flatten()[at])
    size = 1 + torch.floor(torch.log1p(-quantile) / grows.log())
    counts = mean.new_zeros(mean.numel()).index_add_(0, at, size.to(mean.dtype))
    return counts.reshape(mean.shape)


def _gamma_poisson(mean: Tensor, theta: Tensor) -> Tensor:
    gamma = torch._standard_gamma(theta.expand(mean.shape))
    return torch.poisson(gamma.mul_(mean / theta))
