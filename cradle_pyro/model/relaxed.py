"""Distributions the effects and flags need, with closed-form KL divergences where they exist.

Pyro's mean-field ELBO finds the divergences through torch's ``register_kl``; for the scale mixture,
which has none, it falls back to the sample.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Bernoulli, register_kl
from torch.distributions.utils import broadcast_all
from torch.nn import functional

__all__ = ["PresenceBernoulli", "ScaleMixtureNormal", "StraightThroughBernoulli"]

class StraightThroughBernoulli(TorchDistribution):
    """Bernoulli with a straight-through sample: exact zeros and ones forward, identity backward.

    ``log_prob`` is the Bernoulli probability (Pyro's stock relaxed version scores a density), and
    the KL divergence to a Bernoulli is in closed form, so that the biased straight-through
    gradient (Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons)
    serves only the reconstruction.

    Parameters
    ----------
    logits
        Log-odds, any shape.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012 (torch's interface)
    support = constraints.boolean
    has_rsample = True

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    @property
    def probs(self) -> Tensor:
        """Probability of a one."""
        return torch.sigmoid(self.logits)

    @property
    def mean(self) -> Tensor:
        """Probability of a one."""
        return self.probs

    @property
    def variance(self) -> Tensor:
        """Variance, p (1 - p)."""
        return self.probs * (1 - self.probs)

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> StraightThroughBernoulli:
        """Return the distribution with a larger batch shape."""
        return StraightThroughBernoulli(self.logits.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return zeros and ones whose gradient is that of the probabilities."""
        probs = self.probs.expand(self._extended_shape(sample_shape))
        draw = torch.bernoulli(probs.detach())
        return draw + (probs - probs.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the Bernoulli log-probability of zeros and ones."""
        logits, value = torch.broadcast_tensors(self.logits, value)
        return -functional.binary_cross_entropy_with_logits(logits, value, reduction="none")


@register_kl(StraightThroughBernoulli, Bernoulli)
def _kl_straight_through_bernoulli(q: StraightThroughBernoulli, p: Bernoulli) -> Tensor:
    probs = q.probs
    return (
        probs * (functional.logsigmoid(q.logits) - functional.logsigmoid(p.logits))
        + (1 - probs) * (functional.logsigmoid(-q.logits) - functional.logsigmoid(-p.logits))
    )  # fmt: skip


class PresenceBernoulli(Bernoulli, TorchDistribution):
    """Bernoulli over *presence* of an artifact, 1[value > 0]; severities in (0, 1] count as one.

    Samples are zeros and ones. A severity is exogenous given presence, so it adds no term.
    """

    support = constraints.unit_interval

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> PresenceBernoulli:
        """Return the distribution with a larger batch shape."""
        return PresenceBernoulli(logits=self.logits.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability that presence is as in `value`."""
        return super().log_prob((value > 0).to(value.dtype))


class ScaleMixtureNormal(TorchDistribution):
    """Spike-and-slab scale mixture: pi N(0, slab²) + (1 - pi) N(0, spike²).

    Source: George and McCulloch 1993, Variable Selection via Gibbs Sampling.

    Parameters
    ----------
    probability
        Weight of the slab, in (0, 1).
    slab, spike
        Standard deviations.
    """

    arg_constraints = {  # noqa: RUF012 (torch's interface)
        "probability": constraints.unit_interval,
        "slab": constraints.positive,
        "spike": constraints.positive,
    }
    support = constraints.real
    has_rsample = False

    def __init__(
        self, probability: Tensor, slab: Tensor, spike: Tensor, *, validate_args: bool | None = None
    ) -> None:
        self.probability, self.slab, self.spike = broadcast_all(probability, slab, spike)
        super().__init__(self.probability.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.slab)

    @property
    def variance(self) -> Tensor:
        """Weighted mean of the two variances."""
        return self.probability * self.slab**2 + (1 - self.probability) * self.spike**2

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> ScaleMixtureNormal:
        """Return the distribution with a larger batch shape."""
        return ScaleMixtureNormal(
            self.probability.expand(batch_shape),
            self.slab.expand(batch_shape),
            self.spike.expand(batch_shape),
            validate_args=False,
        )

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws: a component, then its Normal."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            slab = torch.bernoulli(self.probability.expand(shape)).bool()
            return torch.randn(shape, device=self.slab.device) * torch.where(
                slab, self.slab.expand(shape), self.spike.expand(shape)
            )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density."""
        return torch.logaddexp(*self._component_log_probs(value))

    def responsibility(self, value: Tensor) -> Tensor:
        """Return the probability that `value` came from the slab."""
        slab, spike = self._component_log_probs(value)
        return torch.sigmoid(slab - spike)

    def _component_log_probs(self, value: Tensor) -> tuple[Tensor, Tensor]:
        square = value**2
        constant = 0.5 * math.log(2 * math.pi)
        slab = -0.5 * square / self.slab**2 - self.slab.log() + self.probability.log() - constant
        spike = (
            -0.5 * square / self.spike**2 - self.spike.log() + torch.log1p(-self.probability)
        ) - constant
        return slab, spike
