"""Distributions the effects and flags need, with closed-form KL divergences where they exist.

Pyro's mean-field ELBO finds the divergences through torch's ``register_kl``; for the scale mixture,
which has none, it falls back to the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Bernoulli, Normal, register_kl
from torch.distributions.utils import lazy_property
from torch.nn import functional

from .blocks import cache_blocks

_TWO_PI = 2 * math.pi

__all__ = [
    "PresenceBernoulli",
    "ScaleMixtureNormal",
    "StraightThroughBernoulli",
    "TiltedScaleMixture",
    "normal_expectation",
]


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

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real}
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

    def expand(  # type: ignore[override]  # torch calls its own argument something else
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> PresenceBernoulli:
        """Return the distribution with a larger batch shape."""
        return PresenceBernoulli(logits=self.logits.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability that presence is as in `value`."""
        return super().log_prob((value > 0).to(value.dtype))


class ScaleMixtureNormal(TorchDistribution):
    """Spike-and-slab scale mixture: sum over k of weight_k N(0, scale_k²), smallest scale first.

    Source: George and McCulloch 1993, Variable Selection via Gibbs Sampling; several slabs as in
    Stephens 2017, False Discovery Rates: A New Deal.

    Parameters
    ----------
    log_weights
        Log-probabilities of the components, shape (..., components); they sum to one.
    scales
        Standard deviations, the spike first, shape (components,).

    Notes
    -----
    An expanded distribution keeps its weights as they are: genes share those of a perturbation.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = False

    def __init__(
        self, log_weights: Tensor, scales: Tensor, *, validate_args: bool | None = None
    ) -> None:
        self.log_weights = log_weights
        self.scales = scales
        super().__init__(log_weights.shape[:-1], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return self.log_weights.new_zeros(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Weighted mean of the components' variances."""
        return (self.log_weights.exp() @ self.scales**2).expand(self.batch_shape)

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> ScaleMixtureNormal:
        """Return the distribution with a larger batch shape."""
        new = ScaleMixtureNormal(self.log_weights, self.scales, validate_args=False)
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        return new

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws: a component, then its Normal."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            component = _components(self.log_weights.softmax(-1).movedim(-1, 0), shape)
            return torch.randn(shape, device=self.scales.device) * self.scales[component]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density."""
        return self.component_log_probs(value).logsumexp(-1)

    def component_log_probs(self, value: Tensor, extra_variance: Tensor | float = 0.0) -> Tensor:
        """Return log weight_k + log N(value; 0, scale_k² + extra variance), components last."""
        shape = torch.broadcast_shapes(self.batch_shape, value.shape)
        log_weights = _with_room(self.log_weights.movedim(-1, 0), len(shape))
        variance = _with_room(self.scales**2, len(shape)) + extra_variance
        fit = value**2 / variance + (_TWO_PI * variance).log()
        return (log_weights - 0.5 * fit).movedim(0, -1)

    def responsibility(self, value: Tensor) -> Tensor:
        """Return the probability that `value` came from a slab, not from the spike."""
        return 1 - _softmax(self.component_log_probs(value))[..., 0]


class TiltedScaleMixture(TorchDistribution):
    """The exact posterior under a scale mixture, given a Normal observation: q(b) ∝ p(b) N(loc; b).

    A variational family for sparse effects: were the likelihood Normal in the effect, it would
    contain the exact posterior, with probabilities of inclusion rather than a choice of mode. The
    KL divergence to its own prior is in closed form.

    Parameters
    ----------
    prior
        The scale mixture p.
    loc, scale
        The observation that stands for the likelihood, any shape that the prior broadcasts to.

    Notes
    -----
    Samples and divergence are exact; gradients are those of conjugate-computation variational
    inference (Khan and Lin 2017, Conjugate-Computation Variational Inference), a natural gradient:
    the ordinary one vanishes wherever the spike holds an effect at zero. The observation's loc is
    pulled by the likelihood's slope at the sample and towards the posterior mean, in units of the
    observation's precision; it rests where loc = E_q[b] + scale² E_q[slope], as exact inference
    would have it. The prior's weights receive the EM gradient, the probabilities of inclusion.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        prior: ScaleMixtureNormal,
        loc: Tensor,
        scale: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.prior = prior
        self.loc = loc
        self.scale = scale
        batch_shape = torch.broadcast_shapes(prior.batch_shape, loc.shape, scale.shape)
        super().__init__(batch_shape, validate_args=validate_args)

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> TiltedScaleMixture:
        """Return the distribution with a larger batch shape."""
        return TiltedScaleMixture(
            self.prior.expand(batch_shape),
            self.loc.expand(batch_shape),
            self.scale.expand(batch_shape),
            validate_args=False,
        )

    @lazy_property
    def _posterior(self) -> _Posterior:
        with torch.no_grad():
            return _posterior(self.prior, self.loc, self.scale)

    @property
    def inclusion(self) -> Tensor:
        """Posterior probabilities of the components, the spike first, shape (..., components)."""
        return self._posterior.inclusion.movedim(0, -1)

    @property
    def mean(self) -> Tensor:
        """Posterior mean; like all that follows from the posterior, without a gradient."""
        return self._posterior.mean

    @property
    def variance(self) -> Tensor:
        """Posterior variance."""
        return self._posterior.variance

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return exact draws; a slope at the draw is passed on to `loc` as it is."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            component = _components(self._posterior.inclusion, shape)
            variance = self.prior.scales.square()[component]
            shrinkage = variance / (variance + self.scale**2)
            noise = torch.randn(shape, device=shrinkage.device, dtype=shrinkage.dtype)
            draw = noise.mul_(shrinkage.sqrt()).mul_(self.scale).add_(shrinkage.mul_(self.loc))
        return draw + (self.loc - self.loc.detach())

    def given_slab(self) -> TiltedScaleMixture:
        """Return the posterior given that no value is from the spike."""
        log_weights = self.prior.log_weights.clone()
        log_weights[..., 0] = -torch.inf
        slabs = ScaleMixtureNormal(log_weights.log_softmax(-1), self.prior.scales)
        return TiltedScaleMixture(slabs, self.loc, self.scale, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density."""
        fit = Normal(self.loc, self.scale).log_prob(value)
        evidence = self.prior.component_log_probs(self.loc, self.scale**2).logsumexp(-1)
        return fit + self.prior.log_prob(value) - evidence


@register_kl(TiltedScaleMixture, ScaleMixtureNormal)
def _kl_tilted_scale_mixture(q: TiltedScaleMixture, p: ScaleMixtureNormal) -> Tensor:
    """Return E_q[log N(b; loc, scale)] - log evidence; only for the prior that q tilts."""
    same = torch.equal(q.prior.log_weights, p.log_weights) and torch.equal(q.prior.scales, p.scales)
    if not same:
        raise NotImplementedError  # the ELBO falls back to the sample
    with torch.no_grad():
        found = q._posterior
        square = found.variance + (found.mean - q.loc) ** 2
        fit = -0.5 * (square / q.scale**2 + (_TWO_PI * q.scale**2).log())
        divergence = fit - found.log_evidence
        pull = (q.loc - found.mean) / q.scale**2
    return _NaturalGradient.apply(q.loc, p.log_weights, divergence, pull, found.inclusion)


class _NaturalGradient(torch.autograd.Function):
    """The divergence, with the natural gradient of loc and the EM gradient of the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        loc: Tensor,
        log_weights: Tensor,
        divergence: Tensor,
        pull: Tensor,
        inclusion: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(pull, inclusion)
        ctx.shapes = loc.shape, log_weights.shape
        return divergence.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pull, inclusion = ctx.saved_tensors
        of_loc, of_weights = ctx.shapes
        (slope,) = gradients
        move_weights = (inclusion * slope).neg_().movedim(0, -1)
        return (slope * pull).sum_to_size(of_loc), move_weights.sum_to_size(of_weights), *[None] * 3


class _Posterior(NamedTuple):
    """Of values under a scale mixture, given one Normal observation each; components come first."""

    inclusion: Tensor
    mean: Tensor
    variance: Tensor
    log_evidence: Tensor


def _posterior(prior: ScaleMixtureNormal, loc: Tensor, scale: Tensor) -> _Posterior:
    """Return the posterior given observations at `loc`, worked out a block at a time."""
    shape = torch.broadcast_shapes(prior.batch_shape, loc.shape, scale.shape)
    loc, scale = loc.expand(shape), scale.expand(shape)
    log_weights = _with_room(prior.log_weights.movedim(-1, 0), len(shape)).expand(-1, *shape)
    found = _Posterior(loc.new_empty(log_weights.shape), *(torch.empty_like(loc) for _ in range(3)))
    variances = prior.scales.square().unbind()
    for block in cache_blocks(loc):
        error, square = scale[block].square(), loc[block].square()
        totals = [error + variance for variance in variances]
        joint = found.inclusion[:, *block]
        for part, total, log_weight in zip(joint, totals, log_weights[:, *block], strict=True):
            torch.div(square, total, out=part).mul_(-0.5).add_(log_weight)
        largest = joint.amax(0)
        joint.sub_(largest).exp_()
        evidence, first, second = (torch.zeros_like(error) for _ in range(3))
        for part, total, variance in zip(joint, totals, variances, strict=True):
            shrinkage = variance / total
            evidence += part.mul_(total.rsqrt_())
            first.addcmul_(part, shrinkage)
            second.addcmul_(part, shrinkage.square_())
        joint.div_(evidence)
        first.div_(evidence)
        beyond = second.div_(evidence).sub_(first.square()).clamp_(min=0).mul_(square)
        found.mean[block] = first * loc[block]
        found.variance[block] = first.mul_(error).add_(beyond)
        found.log_evidence[block] = evidence.log_().add_(largest).sub_(0.5 * math.log(_TWO_PI))
    return found


def normal_expectation(
    loc: Tensor, scale: Tensor, function: Callable[[Tensor], Tensor], nodes: int = 61
) -> Tensor:
    """Return E[function(x)] for x ~ Normal(loc, scale), by Gauss-Hermite quadrature.

    Parameters
    ----------
    loc, scale
        Moments, any shape.
    function
        Elementwise and smooth.
    nodes
        Points of the quadrature.
    """
    points, weights = _gauss_hermite(nodes)
    at = torch.as_tensor(points, dtype=loc.dtype, device=loc.device)
    shares = torch.as_tensor(weights, dtype=loc.dtype, device=loc.device)
    return function(loc.unsqueeze(-1) + scale.unsqueeze(-1) * at) @ shares


@cache
def _gauss_hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points and weights for the expectation over a standard Normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return points, weights / weights.sum()


def _components(probabilities: Tensor, shape: torch.Size) -> Tensor:
    """Return draws of a component, by one uniform number each; faster than torch's Categorical.

    Probabilities have the components first, and draws the given shape.
    """
    upper = _with_room(probabilities.cumsum(0)[:-1], len(shape))
    uniform = torch.rand(shape, device=upper.device, dtype=upper.dtype)
    return (uniform >= upper).sum(0)


def _with_room(values: Tensor, n_dims: int) -> Tensor:
    """Return values with components first and `n_dims` other dimensions, new ones of size one."""
    return values.reshape(len(values), *[1] * (n_dims + 1 - values.dim()), *values.shape[1:])


def _softmax(logits: Tensor) -> Tensor:
    """Return the softmax over the last dimension; torch is slow at that one where it is short."""
    return logits.movedim(-1, 0).softmax(0).movedim(0, -1)
