"""Empirical-Bayes shrinkage of many noisy effects towards a sparse prior.

Effects of labels p on genes g, all measured against the same control cells:

    x_pg = theta_pg - c_g + noise_pg,    noise_pg ~ Normal(0, se_pg^2),    c_g ~ Normal(0, s_g^2)
    theta_pg ~ sum_k w_pk Normal(0, (tau_k a_g)^2),    tau_0 = 0 (the spike) < tau_1 < ...

c_g is the error of the control's profile, one for all labels; a_g are known scales. The weights
maximise the marginal likelihood of the entries; the estimate is the posterior mean, with c_g
integrated out numerically. With several slab components this is adaptive shrinkage.

References
----------
Johnstone and Silverman, "Needles and straw in haystacks", Annals of Statistics 2004.
Stephens, "False discovery rates: a new deal", Biostatistics 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cradle_pyro.data.regression import default_slab_sds
from cradle_pyro.errors import DataError

__all__ = ["Shrunken", "fit_weights", "posterior_moments", "shrink"]

_BLOCK_VALUES = 2_000_000
_MOST_NODES = 257


@dataclass(frozen=True)
class Shrunken:
    """Posterior of many effects under a spike-and-slab prior.

    Parameters
    ----------
    mean, sd
        Posterior mean and standard deviation, shape (labels, genes).
    null_probability
        Posterior probability of the spike, shape (labels, genes).
    weights
        Prior weight of each component, spike first, shape (labels, components).
    slab_sds
        Standard deviations tau of the slab components.
    log_likelihood
        Marginal log-likelihood of all effects, nats.
    """

    mean: np.ndarray
    sd: np.ndarray
    null_probability: np.ndarray
    weights: np.ndarray
    slab_sds: np.ndarray
    log_likelihood: float


def shrink(
    effects: np.ndarray,
    standard_errors: np.ndarray,
    *,
    control_errors: np.ndarray | None = None,
    slab_sds: np.ndarray | None = None,
    scale: np.ndarray | float = 1.0,
    pseudo_entries: float = 10.0,
    n_iterations: int = 200,
) -> Shrunken:
    """Return the empirical-Bayes posterior of effects given their standard errors.

    Parameters
    ----------
    effects, standard_errors
        Observed effects and the standard deviation of their own noise, shape (labels, genes).
    control_errors
        Standard deviation of the noise that all labels share through the control cells, shape
        (genes,). Default: none; then `standard_errors` are those of the differences.
    slab_sds
        Standard deviations tau of the slab components, ascending, unit of `effects` over that of
        `scale`. Default: `default_slab_sds`.
    scale
        Factor a of the slab standard deviations, broadcast to (labels, genes).
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
    effects, errors, control = _checked(effects, standard_errors, control_errors)
    factor = np.broadcast_to(np.asarray(scale, dtype=np.float64), effects.shape)
    total = np.sqrt(errors**2 + control**2)
    sds = np.asarray(default_slab_sds(effects, total, factor) if slab_sds is None else slab_sds)
    weights = fit_weights(
        _log_densities(effects, total, factor, sds),
        pseudo_entries=pseudo_entries,
        n_iterations=n_iterations,
    )
    return posterior_moments(
        effects, errors, sds, weights, scale=factor, control_errors=control_errors
    )


def fit_weights(
    log_density: np.ndarray, *, pseudo_entries: float = 10.0, n_iterations: int = 200
) -> np.ndarray:
    """Return mixture weights of each label by EM, shape (labels, components).

    First one set of weights for all entries by maximum marginal likelihood; then, unless
    `pseudo_entries` is infinite, each label's own, with a Dirichlet prior whose mean are the
    pooled weights and whose strength is `pseudo_entries`. Entries that share the control's noise
    are treated as independent here (a composite likelihood: consistent, though not efficient).

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
    control_errors: np.ndarray | None = None,
) -> Shrunken:
    """Return the posterior under a given prior.

    Parameters
    ----------
    effects, standard_errors, slab_sds, scale, control_errors
        As in `shrink`.
    weights
        Prior weights, spike first, shape (components,) or (labels, components).

    Notes
    -----
    Given the control's error c_g the labels are independent and the posterior is in closed form,
    so that one sum over a grid of c_g per gene gives the exact joint posterior.
    """
    effects, errors, control = _checked(effects, standard_errors, control_errors)
    factor = np.broadcast_to(np.asarray(scale, dtype=np.float64), effects.shape)
    sds = np.asarray(slab_sds, dtype=np.float64)
    table = np.broadcast_to(weights, (effects.shape[0], len(sds) + 1))
    nodes, log_prior = _control_nodes(errors, control)
    width = max(_BLOCK_VALUES // (len(nodes) * effects.shape[0]), 1)
    blocks = []
    for start in range(0, effects.shape[1], width):
        part = np.s_[:, start : start + width]
        shifts = nodes[:, None] * control[0, start : start + width]
        blocks.append(
            _integrate(effects[part], errors[part], factor[part], sds, table, shifts, log_prior)
        )
    mean, square, null = (np.concatenate([b[i] for b in blocks], axis=1) for i in range(3))
    spread = np.sqrt(np.maximum(square - mean**2, 0.0))
    evidence = float(sum(block[3] for block in blocks))
    return Shrunken(mean, spread, null, np.array(table), sds, evidence)


def _checked(
    effects: np.ndarray, standard_errors: np.ndarray, control_errors: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    effects = np.asarray(effects, dtype=np.float64)
    if effects.ndim != 2 or effects.size == 0:
        raise DataError(f"effects must have shape (labels, genes), found {effects.shape}.")
    errors = np.broadcast_to(np.asarray(standard_errors, dtype=np.float64), effects.shape)
    control = np.zeros((1, effects.shape[1]))
    if control_errors is not None:
        control = control + np.asarray(control_errors, dtype=np.float64).reshape(1, -1)
    good = np.isfinite(errors) & (errors > 0) & np.isfinite(control) & (control >= 0)
    if not good.all():
        raise DataError(
            "shrinkage needs positive, finite standard errors, found "
            f"{int((~good).sum())} of {good.size} entries that are not."
        )
    return effects, errors, control


def _control_nodes(errors: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid for c_g / s_g and the log of its normalised prior weights.

    Equally spaced nodes integrate a smooth, peaked function to machine precision once they are as
    close as its standard deviation, which many labels can make small.
    """
    if not (control > 0).any():
        return np.zeros(1), np.zeros(1)
    narrowest = 1.0 / np.sqrt(1.0 + (control**2 / errors**2).sum(axis=0).max())
    n_nodes = int(min(np.ceil(10.0 / (0.8 * narrowest)), _MOST_NODES)) | 1
    nodes = np.linspace(-5.0, 5.0, n_nodes)
    log_prior = -0.5 * nodes**2
    return nodes, log_prior - np.log(np.exp(log_prior).sum())


def _integrate(
    effects: np.ndarray,
    errors: np.ndarray,
    scale: np.ndarray,
    slab_sds: np.ndarray,
    weights: np.ndarray,
    shifts: np.ndarray,
    log_prior: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Posterior mean, mean square and spike probability, and the log evidence of some genes."""
    moments = [
        _given_control(effects + shift, errors, scale, slab_sds, weights) for shift in shifts
    ]
    joint = np.stack([moment[3] for moment in moments]) + log_prior[:, None]
    top = joint.max(axis=0)
    mass = np.exp(joint - top)
    evidence = float((np.log(mass.sum(axis=0)) + top).sum())
    mass /= mass.sum(axis=0)
    mean, square, null = (
        sum(mass[node] * moments[node][i] for node in range(len(moments))) for i in range(3)
    )
    return np.asarray(mean), np.asarray(square), np.asarray(null), evidence


def _given_control(
    effects: np.ndarray,
    errors: np.ndarray,
    scale: np.ndarray,
    slab_sds: np.ndarray,
    weights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Posterior mean, mean square, spike probability, and each gene's log evidence."""
    log_density = _log_densities(effects, errors, scale, slab_sds)
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
    return mean, square, probability[0], (np.log(evidence) + top).sum(axis=0)


def _log_densities(
    effects: np.ndarray, errors: np.ndarray, scale: np.ndarray, slab_sds: np.ndarray
) -> np.ndarray:
    """Log density of each entry under the spike and each slab, (components, labels, genes)."""
    result = np.empty((len(slab_sds) + 1, *effects.shape))
    for position, sd in enumerate((0.0, *slab_sds)):
        variance = errors**2 + (sd * scale) ** 2
        result[position] = -0.5 * (np.log(2.0 * np.pi * variance) + effects**2 / variance)
    return result
