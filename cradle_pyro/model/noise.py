"""The noise of observed values: abducted under one distribution, kept, and read under another.

Everything an observed value owes to chance is kept in a form that belongs to the cell, not to the
world it was seen in. Under the distribution it was abducted from it gives back the value, exactly;
under another, the value that the same cell would have had there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from pyro import distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as torch_dist

from cradle_pyro.errors import QueryError

from .likelihoods import (
    GeneNegativeBinomial,
    GeneNormal,
    GenePoisson,
    GeneZeroInflatedNegativeBinomial,
)
from .quantiles import (
    CountNoise,
    Counts,
    NegativeBinomialCounts,
    PoissonCounts,
    ZeroInflatedCounts,
    count_at,
    count_noise,
    dropout_noise,
)

__all__ = [
    "AbstractNoise",
    "CountSiteNoise",
    "DropoutSiteNoise",
    "PresenceNoise",
    "ResidualNoise",
    "WithNoise",
    "abduct_noise",
    "count_elements",
    "innermost",
]

_Distribution = torch_dist.Distribution


class AbstractNoise(ABC):
    """The noise of one site."""

    @abstractmethod
    def value_under(self, fn: _Distribution) -> Tensor:
        """Return the site's value where it is distributed as `fn`, in the shape it had."""

    @abstractmethod
    def take(self, rows: Tensor) -> AbstractNoise:
        """Return the noise of the cells at `rows`, the first dimension of the value."""


@dataclass(frozen=True)
class CountSiteNoise(AbstractNoise):
    """Quantiles of counts, gene by gene.

    Parameters
    ----------
    quantile
        A uniform number for every element, from [F(x - 1), F(x)].
    shape, dtype
        Of the counts.
    """

    quantile: CountNoise
    shape: torch.Size
    dtype: torch.dtype

    def value_under(self, fn: _Distribution) -> Tensor:
        """Return the counts at these quantiles of `fn`."""
        elements = count_elements(innermost(fn), self.shape)
        return count_at(elements, self.quantile).reshape(self.shape).to(self.dtype)

    def take(self, rows: Tensor) -> CountSiteNoise:
        """Return the noise of the cells at `rows`."""
        quantile = CountNoise(*(_taken(part, self.shape, rows) for part in self.quantile))
        return CountSiteNoise(quantile, _shape_of(rows, self.shape), self.dtype)


@dataclass(frozen=True)
class DropoutSiteNoise(AbstractNoise):
    """Quantiles of counts before dropout, and what drops them, gene by gene.

    Parameters
    ----------
    quantile
        A uniform number for every element before dropout.
    dropout
        Uniform numbers; an element is dropped where they lie below the probability of dropout.
    shape, dtype
        Of the counts.
    """

    quantile: CountNoise
    dropout: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def value_under(self, fn: _Distribution) -> Tensor:
        """Return the counts at these quantiles of `fn`, dropped as there."""
        elements = count_elements(innermost(fn), self.shape)
        assert isinstance(elements, ZeroInflatedCounts)  # a site keeps its family in all worlds
        counts = count_at(elements.counts, self.quantile)
        dropped = self.dropout < torch.sigmoid(elements.dropout_logits)
        counts = torch.where(dropped, torch.zeros_like(counts), counts)
        return counts.reshape(self.shape).to(self.dtype)

    def take(self, rows: Tensor) -> DropoutSiteNoise:
        """Return the noise of the cells at `rows`."""
        quantile = CountNoise(*(_taken(part, self.shape, rows) for part in self.quantile))
        dropout = _taken(self.dropout, self.shape, rows)
        return DropoutSiteNoise(quantile, dropout, _shape_of(rows, self.shape), self.dtype)


@dataclass(frozen=True)
class ResidualNoise(AbstractNoise):
    """Standardised residual of a Normal value, or of the logarithm of a LogNormal one.

    Parameters
    ----------
    value
        The observed value.
    loc, scale
        Of the (logarithm of the) value when it was abducted.
    is_log
        Whether the value is LogNormal.
    """

    value: Tensor
    loc: Tensor
    scale: Tensor
    is_log: bool

    def value_under(self, fn: _Distribution) -> Tensor:
        """Return the value with this residual under `fn`.

        Written as a change of the value, so that where nothing changes the value is the same bits.
        """
        base = innermost(fn)
        residual = ((self.value.log() if self.is_log else self.value) - self.loc) / self.scale
        change = (base.loc - self.loc) + (base.scale - self.scale) * residual
        return self.value * change.exp() if self.is_log else self.value + change

    def take(self, rows: Tensor) -> ResidualNoise:
        """Return the noise of the cells at `rows`."""
        loc, scale = (part.expand(self.value.shape)[rows] for part in (self.loc, self.scale))
        return ResidualNoise(self.value[rows], loc, scale, self.is_log)


@dataclass(frozen=True)
class PresenceNoise(AbstractNoise):
    """Uniform numbers of Bernoulli values: present where the number is below the probability.

    Parameters
    ----------
    uniform
        Below the probability where the value was present, else not; double.
    value
        The observed value: flags, or severities in [0, 1].
    fresh
        The value that a flag gets where it was absent and appears.
    """

    uniform: Tensor
    value: Tensor
    fresh: Tensor

    def value_under(self, fn: _Distribution) -> Tensor:
        """Return the values with this noise under `fn`; those still present keep their severity."""
        present = self.uniform < _probability(fn)
        own = torch.where(self.value > 0, self.value, self.fresh)
        return torch.where(present, own, torch.zeros_like(own))

    def take(self, rows: Tensor) -> PresenceNoise:
        """Return the noise of the cells at `rows`."""
        return PresenceNoise(self.uniform[rows], self.value[rows], self.fresh[rows])


def abduct_noise(
    name: str, fn: _Distribution, value: Tensor, *, fresh: Tensor | None = None
) -> AbstractNoise:
    """Return the noise that made `value` of `fn`, drawn from its posterior where it is not fixed.

    Parameters
    ----------
    name
        Name of the site, for the message of an error.
    fn
        Distribution of the site: a count distribution that :func:`count_elements` knows, Normal,
        LogNormal or Bernoulli, also wrapped in ``to_event``.
    value
        Observed value.
    fresh
        For a Bernoulli site: the value of a flag that appears, of the value's shape; ones if
        omitted.

    Raises
    ------
    QueryError
        If the noise of such a distribution cannot be abducted.
    """
    base = innermost(fn)
    if isinstance(base, torch_dist.Bernoulli):
        probability = _probability(fn)
        share = torch.rand(value.shape, device=value.device, dtype=probability.dtype)
        at_least = probability + share * (1 - probability)
        uniform = torch.where(value > 0, share * probability, at_least)
        return PresenceNoise(uniform, value, torch.ones_like(value) if fresh is None else fresh)
    if isinstance(base, torch_dist.LogNormal | torch_dist.Normal | GeneNormal):
        return ResidualNoise(value, base.loc, base.scale, isinstance(base, torch_dist.LogNormal))
    try:
        elements = count_elements(base, value.shape)
    except TypeError:
        raise QueryError(
            f"Counterfactuals need the noise of the observed site '{name}', which cannot be "
            f"abducted from a {type(base).__name__}. Known are counts (Poisson, negative binomial, "
            "zero-inflated), Normal, LogNormal and Bernoulli; register others with "
            "cradle_pyro.model.noise.count_elements, or intervene on this site."
        ) from None
    observed = value.double().ravel()
    if isinstance(elements, ZeroInflatedCounts):
        uniforms = _uniforms(3, value)
        return DropoutSiteNoise(
            *dropout_noise(elements, observed, uniforms), value.shape, value.dtype
        )
    quantile = count_noise(elements, observed, _uniforms(1, value)[0])
    return CountSiteNoise(quantile, value.shape, value.dtype)


class WithNoise(Messenger):
    """Gives sites the values that their noise has under the distributions they meet.

    Parameters
    ----------
    noise
        Site to its noise.
    """

    def __init__(self, noise: Mapping[str, AbstractNoise]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        noise = self.noise.get(msg["name"])
        if noise is not None:
            msg["value"] = noise.value_under(msg["fn"])
            msg["is_observed"] = True


@singledispatch
def count_elements(fn: Any, shape: torch.Size) -> Counts:
    """Return a count distribution as one distribution for each element of a value of `shape`.

    Another likelihood takes part in counterfactuals once it is registered here:
    ``@count_elements.register``, a function that returns a
    :class:`~cradle_pyro.model.quantiles.Counts`.

    Raises
    ------
    TypeError
        If the distribution is not known.
    """
    raise TypeError(f"no count distribution: {type(fn).__name__}")


@count_elements.register
def _(fn: GenePoisson, shape: torch.Size) -> Counts:
    return PoissonCounts(_flat(fn.loc, shape))


@count_elements.register
def _(fn: torch_dist.Poisson, shape: torch.Size) -> Counts:
    return PoissonCounts(_flat(fn.rate, shape))


@count_elements.register
def _(fn: GeneNegativeBinomial, shape: torch.Size) -> Counts:
    return NegativeBinomialCounts(_flat(fn.loc, shape), _flat(fn.inverse_dispersion, shape))


@count_elements.register
def _(fn: torch_dist.NegativeBinomial, shape: torch.Size) -> Counts:
    return NegativeBinomialCounts(_flat(fn.mean, shape), _flat(fn.total_count, shape))


@count_elements.register
def _(fn: dist.GammaPoisson, shape: torch.Size) -> Counts:
    mean = fn.concentration / fn.rate
    return NegativeBinomialCounts(_flat(mean, shape), _flat(fn.concentration, shape))


@count_elements.register
def _(fn: GeneZeroInflatedNegativeBinomial, shape: torch.Size) -> Counts:
    counts = NegativeBinomialCounts(_flat(fn.loc, shape), _flat(fn.inverse_dispersion, shape))
    return ZeroInflatedCounts(counts, _flat(fn.dropout_logits, shape))


@count_elements.register
def _(fn: dist.ZeroInflatedDistribution, shape: torch.Size) -> Counts:
    counts = count_elements(fn.base_dist, shape)
    return ZeroInflatedCounts(counts, _flat(fn.gate_logits, shape))


def _uniforms(n: int, value: Tensor) -> Tensor:
    """Return numbers strictly between 0 and 1, shape (n, elements)."""
    draws = torch.rand(n, value.numel(), device=value.device)
    return draws.clamp(2.0**-25, 1 - 2.0**-24)


def _taken(elements: Tensor, shape: torch.Size, rows: Tensor) -> Tensor:
    """Return the elements of the cells at `rows`, of a value of `shape` that was made flat."""
    return elements.reshape(shape)[rows].ravel()


def _shape_of(rows: Tensor, shape: torch.Size) -> torch.Size:
    return torch.Size([len(rows), *shape[1:]])


def _flat(parameter: Tensor, shape: torch.Size) -> Tensor:
    return parameter.double().expand(shape).reshape(-1)


def innermost(fn: Any) -> Any:
    """Return the distribution inside ``to_event``, ``mask`` and ``expand``."""
    wrappers = torch_dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return fn


def _probability(fn: _Distribution) -> Tensor:
    return torch.sigmoid(innermost(fn).logits.double())
