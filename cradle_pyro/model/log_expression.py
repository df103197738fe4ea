"""Expected log expression: the mean of log2(1 + 1e4 x / l) over the noise of counts x.

A mean over cells of the logarithm of noisy counts is not the logarithm of the mean; predictions
for observed cells need the former. Drawing counts would add noise of its own, as large as many
effects; here it is integrated out.
"""

from __future__ import annotations

import math
from functools import cache, singledispatch
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor
from torch.nn import functional

from cradle_pyro.types import SCALE

from .likelihoods import (
    GeneNegativeBinomial,
    GeneNormal,
    GenePoisson,
    GeneZeroInflatedNegativeBinomial,
)

__all__ = ["expected_log2_expression", "mean_log2_expression"]

_MOST_SUMMED: Final = 1000
_MOST_NATS: Final = 600.0
_MIDPOINTS: Final = 256
_LIBRARIES: Final = 32


class _Axis(NamedTuple):
    """Logarithms of the nodes of a table, evenly spaced."""

    low: float
    high: float
    nodes: int

    @property
    def values(self) -> np.ndarray:
        """The nodes, not in logarithms."""
        return np.exp(np.linspace(self.low, self.high, self.nodes))

    def place(self, value: Tensor) -> Tensor:
        """Return where positive values lie, from -1 (first node) to 1 (last), ends included."""
        at = (value.log() - self.low) * (2 / (self.high - self.low)) - 1
        return at.clamp(-1, 1)


_MEANS: Final = _Axis(math.log(1e-6), math.log(1e7), 201)
_DISPERSIONS: Final = _Axis(-6.0, 9.0, 91)
_DEPTHS: Final = _Axis(math.log(10), math.log(1e7), 41)


@singledispatch
def expected_log2_expression(fn: Any, library: Tensor) -> Tensor:
    """Return E log2(1 + 1e4 x / l) of the counts of cells, shape (cells, genes).

    Another likelihood is registered with ``@expected_log2_expression.register``.

    Parameters
    ----------
    fn
        Distribution of the counts x, batch shape (cells,), event shape (genes,).
    library
        Libraries l, shape (cells,), in counts.

    Raises
    ------
    TypeError
        If the expectation is not known for such a distribution.

    Notes
    -----
    Of a negative binomial: interpolated, linearly in logarithms, between exact values. At random
    means, dispersions and libraries from 200 to 1e6 this was within 0.011, and differences between
    means 10 % and 100 % apart within 0.005. Of log-normalised values: the value itself, in log2.
    """
    raise TypeError(f"no expected log expression: {type(fn).__name__}")


@expected_log2_expression.register
def _(fn: GeneNegativeBinomial, library: Tensor) -> Tensor:
    return _interpolated(fn.loc, fn.inverse_dispersion, library)


@expected_log2_expression.register
def _(fn: GenePoisson, library: Tensor) -> Tensor:
    return _interpolated(fn.loc, fn.loc.new_tensor(math.inf), library)


@expected_log2_expression.register
def _(fn: GeneZeroInflatedNegativeBinomial, library: Tensor) -> Tensor:
    kept = torch.sigmoid(-fn.dropout_logits)
    return kept * _interpolated(fn.loc, fn.inverse_dispersion, library)


@expected_log2_expression.register
def _(fn: GeneNormal, library: Tensor) -> Tensor:
    return fn.loc / math.log(2)


def _interpolated(mean: Tensor, inverse_dispersion: Tensor, library: Tensor) -> Tensor:
    deepest = math.exp(_DEPTHS.high)
    depth = library.unsqueeze(-1)
    # Beyond the deepest node, a cell is as one that is less deep: both hardly have noise.
    mean = mean * (deepest / depth).clamp(max=1.0)
    least = math.exp(_MEANS.low)
    places = torch.broadcast_tensors(
        _MEANS.place(mean.clamp(min=least)),
        _DISPERSIONS.place(inverse_dispersion),
        _DEPTHS.place(depth),
    )
    table = _table().to(mean)
    grid = torch.stack(places, -1).reshape(1, 1, 1, -1, 3)
    found = functional.grid_sample(table, grid, align_corners=True).reshape(places[0].shape)
    # Proportional to the mean where that is next to nothing.
    return found.exp() * (mean / least).clamp(max=1.0)


@cache
def _table() -> Tensor:
    """Return log E log2(1 + 1e4 x / l) at all nodes: (1, 1, libraries, dispersions, means)."""
    theta, mean = np.meshgrid(_DISPERSIONS.values, _MEANS.values, indexing="ij")
    value = _expected(mean.ravel(), theta.ravel(), SCALE / _DEPTHS.values[None, :])
    table = np.log(value).T.reshape(1, 1, -1, *mean.shape)
    return torch.as_tensor(table, dtype=torch.float32)


def mean_log2_expression(
    rate: np.ndarray, inverse_dispersion: np.ndarray, library: np.ndarray
) -> np.ndarray:
    """Return the mean over cells of E log2(1 + 1e4 x / l) for negative-binomial x, (genes,).

    Parameters
    ----------
    rate
        Expected fraction of each gene, shape (genes,).
    inverse_dispersion
        theta, shape (genes,).
    library
        Libraries l of the cells, in counts, shape (cells,). More than 32 are stood in for by as
        many quantiles.

    Notes
    -----
    A sum over the probability of each count up to 1,000, and beyond by the trapezoid rule for
    counts of a geometric progression. Where the probability of no count is too small to start from,
    an average over quantiles of the gamma part, with a second-order correction for the Poisson
    part.
    """
    depth = np.asarray(library, dtype=np.float64)
    if len(depth) > _LIBRARIES:
        depth = np.quantile(depth, (np.arange(_LIBRARIES) + 0.5) / _LIBRARIES)
    mean = depth[:, None] * rate
    scale = np.broadcast_to(SCALE / depth[:, None], mean.shape).reshape(-1, 1)
    theta = np.broadcast_to(inverse_dispersion, mean.shape)
    return _expected(mean.ravel(), theta.ravel(), scale).reshape(mean.shape).mean(axis=0)


def _expected(mean: np.ndarray, theta: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return E log2(1 + scale x), shape (entries, scales).

    `mean` and `theta` have shape (entries,); `scale` is one for each entry, shape (entries, 1), or
    the same for all, shape (1, scales).
    """
    result = np.empty((len(mean), scale.shape[1]))
    large = theta * np.log1p(mean / theta) > _MOST_NATS
    for chosen, expected in ((~large, _summed), (large, _by_quantiles)):
        result[chosen] = expected(mean[chosen], theta[chosen], _rows(scale, chosen))
    return result


def _rows(scale: np.ndarray, rows: Any) -> np.ndarray:
    return scale if len(scale) == 1 else scale[rows]


def _summed(mean: np.ndarray, theta: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return E log2(1 + scale x) by the sum over counts."""
    end = _last_count(mean, theta)
    order = np.argsort(-end)
    mean, theta, scale, end = mean[order], theta[order], _rows(scale, order), end[order]
    last = np.minimum(end, _MOST_SUMMED)
    odds = mean / (mean + theta)
    probability = np.exp(-theta * np.log1p(mean / theta))
    total = np.zeros((len(mean), scale.shape[1]))
    x, active = 0, len(mean)
    while active:
        x += 1
        active = int(np.searchsorted(-last[:active], -x, side="right"))
        part = slice(0, active)
        probability = probability[part] * odds[part] * ((x - 1 + theta[part]) / x)
        total[part] += probability[:, None] * np.log2(1.0 + _rows(scale, part) * x)
    tail = end > _MOST_SUMMED
    total[tail] += _beyond(odds[tail], theta[tail], _rows(scale, tail), end[tail])
    result = np.empty_like(total)
    result[order] = total
    return result


def _beyond(
    odds: np.ndarray, theta: np.ndarray, scale: np.ndarray, end: np.ndarray, *, n_steps: int = 64
) -> np.ndarray:
    """Return E of log2(1 + scale x) where x is above `_MOST_SUMMED`, zero elsewhere."""
    at = _MOST_SUMMED * (end / _MOST_SUMMED) ** (np.arange(n_steps + 1)[:, None] / n_steps)
    survival = special.betainc(at + 1.0, theta, odds)
    value = np.log2(1.0 + scale * at[..., None])
    between = (survival[1:] + survival[:-1]) / 2.0
    rest = (np.diff(value, axis=0) * between[..., None]).sum(axis=0)
    return value[0] * survival[0][:, None] + rest


def _last_count(mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Return a count that is exceeded with a probability below about 1e-8 (sub-gamma tail)."""
    spread = np.sqrt(mean + mean**2 / theta)
    return np.ceil(mean + 6.0 * spread + 18.0 * (1.0 + mean / theta))


def _by_quantiles(mean: np.ndarray, theta: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return E log2(1 + scale x) over midpoints of the gamma part."""
    at = (np.arange(_MIDPOINTS) + 0.5) / _MIDPOINTS
    names, inverse = np.unique(theta, return_inverse=True)
    gamma = (stats.gamma.ppf(at, names[:, None]) / names[:, None])[inverse]
    result = np.zeros((len(mean), scale.shape[1]))
    for column in gamma.T:
        level = (mean * column)[:, None]
        bent = 1.0 + scale * level
        correction = 0.5 * scale**2 * level / bent**2
        result += np.log2(bent) - correction / np.log(2.0)
    return result / _MIDPOINTS
