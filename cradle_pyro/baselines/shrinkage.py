"""Empirical-Bayes shrinkage of many noisy effects towards a sparse prior.

Effects x_pg = theta_pg + noise, noise ~ Normal(0, se_pg^2), and

    theta_pg ~ sum_k w_pk Normal(0, (tau_k c_g)^2),     tau_0 = 0 (the spike) < tau_1 < ...

with known scales c_g. The weights maximise the marginal likelihood; the estimate is the posterior
mean. With several slab components this is adaptive shrinkage.

References
----------
Johnstone and Silverman, "Needles and straw in haystacks", Annals of Statistics 2004.
Stephens, "False discovery rates: a new deal", Biostatistics 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cradle_pyro.errors import DataError

__all__ = ["Shrunken", "fit_weights", "posterior_moments", "shrink"]


@dataclass(frozen=True)
class Shrunken:
    """Posterior of many effects under a fitted spike-and-slab prior.

    Parameters
    ----------
    mean, sd
        Posterior mean and standard deviation, shape (labels, genes).
    null_probability
        Posterior probability of the spike, shape (labels, genes).
    weights
        Prior weight of each component, spike first, shape (labels, components).
    log_likelihood
        Marginal log-likelihood of all effects, nats.
    """

    mean: np.ndarray
    sd: np.ndarray
    null_probability: np.ndarray
    weights: np.ndarray
    log_likelihood: float


def shrink(
    effects: np.ndarray,
    standard_errors: np.ndarray,
    *,
    slab_sds: np.ndarray | None = None,
    scale: np.ndarray | float = 1.0,
    pseudo_entries: float = 50.0,
    n_iterations: int = 200,
) -> Shrunken:
    """Return the empirical-Bayes posterior of effects given their standard errors.

    Parameters
    ----------
    effects, standard_errors
        Observed effects and the standard deviation of their noise, shape (labels, genes).
    slab_sds
        Standard deviations tau of the slab components, ascending, unit of `effects` over that of
        `scale`. Default: a geometric grid over the range that the effects allow.
    scale
        Factor c of the slab standard deviations, broadcast to (labels, genes).
    pseudo_entries
        How many entries the weights pooled over labels count for in each label's own weights.
        Infinite: one set of weights for all labels.
    n_iterations
        Most EM steps of each of the two fits of weights.

    Raises
    ------
    DataError
        When shapes differ or a standard error is not positive.
    """
    effects = np.asarray(effects, dtype=np.float64)
    errors = np.broadcast_to(np.asarray(standard_errors, dtype=np.float64), effects.shape)
    if effects.ndim != 2 or not (np.isfinite(errors).all() and (errors > 0).all()):
        raise DataError(
            "shrinkage needs effects of shape (labels, genes) with positive, finite standard "
            f"errors, found shape {effects.shape} and {int((~(errors > 0)).sum())} entries that "
            "are not positive."
        )
    scale = np.broadcast_to(np.asarray(scale, dtype=np.float64), effects.shape)
    sds = np.asarray(default_slab_sds(effects, errors, scale) if slab_sds is None else slab_sds)
    log_density = _log_densities(effects, errors, scale, sds)
    weights = fit_weights(log_density, pseudo_entries=pseudo_entries, n_iterations=n_iterations)
    return posterior_moments(effects, errors, sds, weights, scale=scale)


def default_slab_sds(
    effects: np.ndarray, errors: np.ndarray, scale: np.ndarray, *, ratio: float = 2.0
) -> np.ndarray:
    """Return a geometric grid of slab standard deviations that covers the effects.

    From a quarter of the median standard error to twice the largest excess of an effect over its
    noise, as in adaptive shrinkage.
    """
    unit = np.where(scale > 0, scale, np.inf)
    lowest = max(float(np.median(errors / np.maximum(scale, 1e-3))) / 4.0, 1e-3)
    excess = np.sqrt(np.maximum(effects**2 - errors**2, 0.0)) / unit
    highest = 2.0 * float(np.quantile(excess, 0.9999)) if excess.size else lowest
    n_steps = max(int(np.ceil(np.log(max(highest / lowest, 1.0)) / np.log(ratio))), 1)
    return lowest * ratio ** np.arange(n_steps + 1)


def fit_weights(
    log_density: np.ndarray, *, pseudo_entries: float = 50.0, n_iterations: int = 200
) -> np.ndarray:
    """Return mixture weights of each label by EM, shape (labels, components).

    First one set of weights for all entries by maximum marginal likelihood; then, unless
    `pseudo_entries` is infinite, each label's own, with a Dirichlet prior whose mean are the
    pooled weights and whose strength is `pseudo_entries`.

    Parameters
    ----------
    log_density
        Log density of each entry under each component, shape (components, labels, genes).
    pseudo_entries, n_iterations
        As in `shrink`.
    """
    n_components, n_labels, n_genes = log_density.shape
    density = np.exp(log_density - log_density.max(axis=0, keepdims=True))
    pooled = np.full(n_components, 1.0 / n_components)
    for _ in range(n_iterations):
        joint = pooled[:, None, None] * density
        updated = (joint / joint.sum(axis=0)).mean(axis=(1, 2))
        done = np.abs(updated - pooled).max() < 1e-6
        pooled = updated
        if done:
            break
    weights = np.repeat(pooled[None, :], n_labels, axis=0)
    if not np.isfinite(pseudo_entries):
        return weights
    for _ in range(n_iterations):
        joint = weights.T[:, :, None] * density
        own = (joint / joint.sum(axis=0)).sum(axis=2).T
        updated = (own + pseudo_entries * pooled) / (n_genes + pseudo_entries)
        done = np.abs(updated - weights).max() < 1e-6
        weights = updated
        if done:
            break
    return weights


def posterior_moments(
    effects: np.ndarray,
    standard_errors: np.ndarray,
    slab_sds: np.ndarray,
    weights: np.ndarray,
    *,
    scale: np.ndarray | float = 1.0,
) -> Shrunken:
    """Return the posterior under a given prior.

    Parameters
    ----------
    effects, standard_errors, slab_sds, scale
        As in `shrink`.
    weights
        Prior weights, spike first, shape (components,) or (labels, components).
    """
    errors = np.broadcast_to(np.asarray(standard_errors, dtype=np.float64), effects.shape)
    scale = np.broadcast_to(np.asarray(scale, dtype=np.float64), effects.shape)
    weights = np.broadcast_to(weights, (effects.shape[0], len(slab_sds) + 1))
    log_density = _log_densities(effects, errors, scale, np.asarray(slab_sds))
    top = log_density.max(axis=0)
    joint = weights.T[:, :, None] * np.exp(log_density - top)
    evidence = joint.sum(axis=0)
    probability = joint / evidence
    mean, square = np.zeros(effects.shape), np.zeros(effects.shape)
    for position, sd in enumerate(slab_sds, start=1):
        prior = (sd * scale) ** 2
        gain = prior / (prior + errors**2)
        mean += probability[position] * gain * effects
        square += probability[position] * ((gain * effects) ** 2 + gain * errors**2)
    spread = np.sqrt(np.maximum(square - mean**2, 0.0))
    total = float((np.log(evidence) + top).sum())
    return Shrunken(mean, spread, probability[0], np.array(weights), total)


def _log_densities(
    effects: np.ndarray, errors: np.ndarray, scale: np.ndarray, slab_sds: np.ndarray
) -> np.ndarray:
    """Log density of each entry under the spike and each slab, (components, labels, genes)."""
    sds = np.concatenate([[0.0], slab_sds])
    result = np.empty((len(sds), *effects.shape))
    for position, sd in enumerate(sds):
        variance = errors**2 + (sd * scale) ** 2
        result[position] = -0.5 * (np.log(2.0 * np.pi * variance) + effects**2 / variance)
    return result
