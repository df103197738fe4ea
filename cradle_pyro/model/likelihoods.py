"""Likelihoods: modules that turn logits into a rate, and a rate and a library into a distribution.

Every distribution here has the genes as its event dimension, so that ``log_prob`` returns one
number per cell and the terms that do not depend on the mean are computed once for all particles.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn import functional

from cradle_pyro.types import Statistics

from .sampling import draw_counts
from .special import fractions, log_choose, mean_terms

__all__ = [
    "AbstractLikelihood",
    "GeneNegativeBinomial",
    "GeneNormal",
    "GenePoisson",
    "GeneZeroInflatedNegativeBinomial",
    "NegativeBinomialLikelihood",
    "NormalLikelihood",
    "PoissonLikelihood",
    "ZeroInflatedLikelihood",
    "make_likelihood",
]

_SMALLEST_MEAN = 1e-12
_LOG_DISPERSION_RANGE = (-6.0, 9.0)
_SHORT_CUT = "_short_cut"  # of a rate as the likelihood made it; what is made of a rate has none


class _GeneDistribution(TorchDistribution):
    """Independent genes of a cell: batch shape (..., cells), event shape (genes,)."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.nonnegative, 1)
    has_rsample = False

    def __init__(self, rate: Tensor, *, validate_args: bool | None = None) -> None:
        self.rate = rate
        super().__init__(rate.shape[:-1], rate.shape[-1:], validate_args=validate_args)

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> _GeneDistribution:
        """Return the distribution with a larger batch shape."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        shape = torch.Size(batch_shape)
        new.rate = self.rate.expand(shape + self.event_shape)
        TorchDistribution.__init__(new, shape, self.event_shape, validate_args=False)
        return new

    @property
    def loc(self) -> Tensor:
        """Mean of the counts or values, shape (..., cells, genes)."""
        return self.rate

    @property
    def mean(self) -> Tensor:
        """Mean, shape (..., cells, genes)."""
        return self.loc


class GenePoisson(_GeneDistribution):
    """Poisson counts of a cell.

    Parameters
    ----------
    loc
        Mean, shape (..., cells, genes).
    """

    @property
    def variance(self) -> Tensor:
        """Variance, equal to the mean."""
        return self.loc

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return counts, shape sample_shape + (..., cells, genes)."""
        with torch.no_grad():
            return torch.poisson(self.loc.expand(self._extended_shape(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each cell, shape (..., cells)."""
        mean = self.loc.clamp(min=_SMALLEST_MEAN)
        terms = torch.xlogy(value, mean) - mean
        return terms.sum(-1) - torch.lgamma(value + 1).sum(-1)


class GeneNegativeBinomial(_GeneDistribution):
    """Negative binomial counts of a cell, NB2: variance = mean + mean² / inverse_dispersion.

    Parameters
    ----------
    rate
        Mean, shape (..., cells, genes); with a library, the mean of each of its counts.
    inverse_dispersion
        Positive, shape (genes,).
    library
        Total of each cell, shape (..., cells); by default one.

    Notes
    -----
    log p(x) = lgamma(x+θ) - lgamma(θ) - lgamma(x+1) + x log(μ/θ) - (x+θ) log(1+μ/θ). The lgamma
    terms do not depend on the mean and are computed once for all particles, and of x > 0 only.
    """

    def __init__(
        self,
        rate: Tensor,
        inverse_dispersion: Tensor,
        library: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.inverse_dispersion = inverse_dispersion
        self.library = library
        self.short_cut = getattr(rate, _SHORT_CUT, None)
        if library is not None:
            shape = torch.broadcast_shapes(rate.shape[:-1], library.shape)
            rate, self.library = rate.expand(*shape, -1), library.expand(shape)
        super().__init__(rate, validate_args=validate_args)

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> GeneNegativeBinomial:
        """Return the distribution with a larger batch shape."""
        new = super().expand(batch_shape, _instance)
        assert isinstance(new, GeneNegativeBinomial)
        if self.library is not None:
            new.library = self.library.expand(batch_shape)
        return new

    @property
    def loc(self) -> Tensor:
        """Mean of the counts, shape (..., cells, genes)."""
        return self.rate if self.library is None else self.library.unsqueeze(-1) * self.rate

    @property
    def variance(self) -> Tensor:
        """Variance, shape (..., cells, genes)."""
        return self.loc + self.loc**2 / self.inverse_dispersion

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return counts, shape sample_shape + (..., cells, genes)."""
        with torch.no_grad():
            mean = self.loc.expand(self._extended_shape(sample_shape))
            return draw_counts(mean, self.inverse_dispersion)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each cell, shape (..., cells)."""
        theta = self.inverse_dispersion
        of_mean = mean_terms(self.rate, theta, value, self.library, self.short_cut)
        return of_mean + log_choose(value, theta)

    def log_prob_per_gene(self, value: Tensor) -> Tensor:
        """Return the log-probability of each count, shape (..., cells, genes)."""
        theta = self.inverse_dispersion
        ratio = (self.loc / theta).clamp(min=_SMALLEST_MEAN)
        lgammas = torch.lgamma(value + theta) - torch.lgamma(theta) - torch.lgamma(value + 1)
        return torch.xlogy(value, ratio) - (value + theta) * torch.log1p(ratio) + lgammas


class GeneZeroInflatedNegativeBinomial(_GeneDistribution):
    """Negative binomial with a dropout probability per gene.

    Parameters
    ----------
    loc
        Mean of the negative binomial part, shape (..., cells, genes).
    inverse_dispersion
        Positive, shape (genes,).
    dropout_logits
        Log-odds that a count is dropped to zero, shape (genes,).
    """

    def __init__(
        self,
        loc: Tensor,
        inverse_dispersion: Tensor,
        dropout_logits: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.inverse_dispersion = inverse_dispersion
        self.dropout_logits = dropout_logits
        super().__init__(loc, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean after dropout, shape (..., cells, genes)."""
        return self.loc * torch.sigmoid(-self.dropout_logits)

    @property
    def variance(self) -> Tensor:
        """Variance after dropout, shape (..., cells, genes)."""
        kept = torch.sigmoid(-self.dropout_logits)
        second = self.loc + self.loc**2 * (1 + 1 / self.inverse_dispersion)
        return kept * second - (kept * self.loc) ** 2

    def _counts(self) -> GeneNegativeBinomial:
        return GeneNegativeBinomial(self.loc, self.inverse_dispersion, validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return counts, shape sample_shape + (..., cells, genes)."""
        with torch.no_grad():
            counts = self._counts().sample(sample_shape)
            kept = torch.sigmoid(-self.dropout_logits).expand(counts.shape)
            return counts * torch.bernoulli(kept)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each cell, shape (..., cells)."""
        counts = self._counts().log_prob_per_gene(value)
        observed = functional.logsigmoid(-self.dropout_logits) + counts
        dropped = functional.logsigmoid(self.dropout_logits)
        zero = torch.logaddexp(dropped.expand(observed.shape), observed)
        return torch.where(value == 0, zero, observed).sum(-1)


class GeneNormal(_GeneDistribution):
    """Normal values of a cell, for log-normalised input.

    Parameters
    ----------
    loc
        Mean, shape (..., cells, genes).
    scale
        Standard deviation, shape (genes,).
    """

    support = constraints.independent(constraints.real, 1)

    def __init__(self, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        self.scale = scale
        super().__init__(loc, validate_args=validate_args)

    @property
    def variance(self) -> Tensor:
        """Variance, shape (..., cells, genes)."""
        return (self.scale**2).expand(self.loc.shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return values, shape sample_shape + (..., cells, genes)."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            noise = torch.randn(shape, device=self.loc.device, dtype=self.loc.dtype)
            return self.loc + self.scale * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of each cell, shape (..., cells)."""
        standard = (value - self.loc) / self.scale
        constant = self.scale.log().sum() + 0.5 * math.log(2 * math.pi) * self.loc.shape[-1]
        return -0.5 * (standard**2).sum(-1) - constant


class AbstractLikelihood(nn.Module):
    """What every likelihood offers: a rate, and a distribution given rate and library."""

    def rate(self, logits: Tensor, *, has_rest: bool) -> Tensor:
        """Return the expected fraction of the library per kept gene.

        Parameters
        ----------
        logits
            Shape (..., cells, genes), or genes + 1 with the "rest" category last.
        has_rest
            Whether the last category stands for genes that were not kept; it is dropped, so that
            rows sum to the kept genes' share.
        """
        fractions = torch.softmax(logits, -1)
        return fractions[..., :-1] if has_rest else fractions

    def initial_logits(self, statistics: Statistics) -> Tensor:
        """Return the decoder's first bias, shape (genes,): the log mean fraction."""
        return statistics.fraction.clamp(min=1e-7).log()


class _WithDispersion(AbstractLikelihood):
    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.log_inverse_dispersion = nn.Parameter(statistics.inverse_dispersion.log())

    @property
    def inverse_dispersion(self) -> Tensor:
        """Inverse dispersion per gene, shape (genes,)."""
        return self.log_inverse_dispersion.clamp(*_LOG_DISPERSION_RANGE).exp()


class NegativeBinomialLikelihood(_WithDispersion):
    """Counts with NB noise around library * rate (the default)."""

    def rate(self, logits: Tensor, *, has_rest: bool) -> Tensor:
        """Return the expected fraction of the library per kept gene, see `AbstractLikelihood`."""
        rate, short_cut = fractions(logits, drop_last=has_rest)
        setattr(rate, _SHORT_CUT, short_cut)
        return rate

    def forward(self, rate: Tensor, library: Tensor) -> GeneNegativeBinomial:
        """Return the distribution of counts, batch shape (..., cells), event shape (genes,)."""
        return GeneNegativeBinomial(rate, self.inverse_dispersion, library)


class PoissonLikelihood(AbstractLikelihood):
    """Counts with Poisson noise around library * rate."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()

    def forward(self, rate: Tensor, library: Tensor) -> GenePoisson:
        """Return the distribution of counts, batch shape (..., cells), event shape (genes,)."""
        return GenePoisson(library.unsqueeze(-1) * rate)


class ZeroInflatedLikelihood(_WithDispersion):
    """Counts with NB noise around library * rate, and dropout with a probability per gene."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__(statistics)
        self.dropout_logits = nn.Parameter(torch.full_like(statistics.fraction, -3.0))

    def forward(self, rate: Tensor, library: Tensor) -> GeneZeroInflatedNegativeBinomial:
        """Return the distribution of counts, batch shape (..., cells), event shape (genes,)."""
        return GeneZeroInflatedNegativeBinomial(
            library.unsqueeze(-1) * rate, self.inverse_dispersion, self.dropout_logits
        )


class NormalLikelihood(AbstractLikelihood):
    """Log-normalised values with Normal noise around the decoder's output, without a library."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(statistics.log_sd.clamp(min=1e-3).log())

    def rate(self, logits: Tensor, *, has_rest: bool) -> Tensor:
        """Return the expected value of the kept genes, in the units of the input."""
        return logits[..., :-1] if has_rest else logits

    def initial_logits(self, statistics: Statistics) -> Tensor:
        """Return the decoder's first bias, shape (genes,): the mean value."""
        return statistics.fraction

    def forward(self, rate: Tensor, library: Tensor) -> GeneNormal:
        """Return the distribution of values, batch shape (..., cells), event shape (genes,)."""
        return GeneNormal(rate, self.log_scale.exp())


def make_likelihood(
    name: Literal["nb", "poisson", "zinb", "normal"], statistics: Statistics
) -> AbstractLikelihood:
    """Return the likelihood called `name`, with parameters initialised from `statistics`."""
    kinds: dict[str, type[AbstractLikelihood]] = {
        "nb": NegativeBinomialLikelihood,
        "poisson": PoissonLikelihood,
        "zinb": ZeroInflatedLikelihood,
        "normal": NormalLikelihood,
    }
    return kinds[name](statistics)
