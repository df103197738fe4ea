r"""A linear-Gaussian CRADLE: the structural equations of the model with everything in closed form.

The oracle of the test suite. Posterior, evidence, ELBO, counterfactuals and the posterior of the
global effects are exact, so that the Pyro model and guide can be compared with them.

For cell n, with genes as columns,

.. math::

    p_n &= d_n E \\
    r_n &= a_n U + g_n w_n V, \qquad g_n = 1[\text{any } a_{nk} > 0] \\
    x_n &= \mu + (z_n + p_n + r_n) L + \sigma \odot \epsilon_n

and z_n, w_n, ε_n standard normal. Nothing here imports the model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import linalg

from cradle_pyro.errors import DataError

__all__ = [
    "Gaussian",
    "LinearGaussianCells",
    "LinearGaussianCradle",
    "gaussian_kl",
    "simulate_linear_gaussian",
]

LOG_2PI = float(np.log(2 * np.pi))


class Gaussian(NamedTuple):
    """Moments of one Gaussian per cell.

    Attributes
    ----------
    mean
        Shape (cells, k).
    covariance
        Shape (cells, k, k); in the gradients, the form (full or diagonal) that was asked about.
    """

    mean: np.ndarray
    covariance: np.ndarray


class LinearGaussianCells(NamedTuple):
    """Simulated cells with their latent values.

    Attributes
    ----------
    x
        Values, shape (cells, genes).
    d
        Perturbation design, shape (cells, perturbations).
    a
        Artifact flags, shape (cells, artifacts).
    z
        Basal state, shape (cells, latents).
    w
        Artifact state, shape (cells, artifact_latents); without effect where no flag is set.
    """

    x: np.ndarray
    d: np.ndarray
    a: np.ndarray
    z: np.ndarray
    w: np.ndarray


@dataclass(frozen=True)
class LinearGaussianCradle:
    """Return a linear-Gaussian CRADLE with the given parameters.

    Parameters
    ----------
    loading
        L, latent state to genes; shape (latents, genes).
    intercept
        Mean of an unperturbed passing cell; shape (genes,).
    noise_sd
        Standard deviation of the observation noise, positive; shape (genes,).
    effect
        E, latent shift of each perturbation, with the mask already applied;
        shape (perturbations, latents).
    artifact_effect
        U, latent shift of each flag; shape (artifacts, latents).
    artifact_loading
        V, artifact state to latent shift; shape (artifact_latents, latents).

    Raises
    ------
    DataError
        If the shapes do not fit together or a noise standard deviation is not positive.

    Notes
    -----
    Methods take cells as `x` (cells, genes), `d` (cells, perturbations), `a` (cells, artifacts).
    Joint latents are ordered (z, w).

    Examples
    --------
    >>> oracle, cells = simulate_linear_gaussian(n_cells=4, n_genes=6, n_latents=2,
    ...     n_perturbations=3, n_artifacts=1, seed=0)
    >>> exact = oracle.posterior(cells.x, cells.d, cells.a)
    >>> elbo = oracle.elbo(cells.x, cells.d, cells.a, exact.mean, exact.covariance)
    >>> bool(np.allclose(elbo, oracle.log_evidence(cells.x, cells.d, cells.a)))
    True
    """

    loading: np.ndarray
    intercept: np.ndarray
    noise_sd: np.ndarray
    effect: np.ndarray
    artifact_effect: np.ndarray
    artifact_loading: np.ndarray

    def __post_init__(self) -> None:
        """Freeze the arrays and check that they fit together."""
        for field in dataclasses.fields(self):
            array = np.array(getattr(self, field.name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
        expected = {
            "loading": (self.loading.shape[0], self.loading.shape[-1]),
            "intercept": (self.n_genes,),
            "noise_sd": (self.n_genes,),
            "effect": (self.n_perturbations, self.n_latents),
            "artifact_effect": (self.n_artifacts, self.n_latents),
            "artifact_loading": (self.n_artifact_latents, self.n_latents),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise DataError(
                    f"{name} must have shape {shape} to fit loading {self.loading.shape}, "
                    f"found {getattr(self, name).shape}. Give one row per source, one column per "
                    "target."
                )
        if not (self.noise_sd > 0).all():
            raise DataError(
                f"noise_sd must be positive in every gene, found a minimum of "
                f"{self.noise_sd.min():g}. Give standard deviations above zero."
            )

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.loading.shape[-1]

    @property
    def n_latents(self) -> int:
        """Number of basal latents."""
        return self.loading.shape[0]

    @property
    def n_perturbations(self) -> int:
        """Number of elementary perturbations."""
        return self.effect.shape[0]

    @property
    def n_artifacts(self) -> int:
        """Number of artifact flags."""
        return self.artifact_effect.shape[0]

    @property
    def n_artifact_latents(self) -> int:
        """Number of artifact latents."""
        return self.artifact_loading.shape[0]

    # Structural equations

    def gate(self, a: np.ndarray) -> np.ndarray:
        """Return g, one where a cell carries any artifact; shape (cells,)."""
        return np.asarray((np.asarray(a) > 0).any(axis=-1), dtype=np.float64)

    def perturbation_shift(self, d: np.ndarray) -> np.ndarray:
        """Return p = d E; shape (cells, latents)."""
        return np.asarray(d, dtype=np.float64) @ self.effect

    def artifact_shift(self, a: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return r = a U + g w V; shape (cells, latents)."""
        fixed = np.asarray(a, dtype=np.float64) @ self.artifact_effect
        return fixed + self.gate(a)[:, None] * (w @ self.artifact_loading)

    def mean(self, d: np.ndarray, a: np.ndarray, z: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return E[x | z, w, d, a]; shape (cells, genes)."""
        state = z + self.perturbation_shift(d) + self.artifact_shift(a, w)
        return self.intercept + state @ self.loading

    def log_likelihood(
        self, x: np.ndarray, d: np.ndarray, a: np.ndarray, z: np.ndarray, w: np.ndarray
    ) -> np.ndarray:
        """Return log p(x | z, w, d, a) in nats; shape (cells,)."""
        scaled = (x - self.mean(d, a, z, w)) / self.noise_sd
        return self._log_normaliser() - 0.5 * (scaled**2).sum(axis=-1)

    def sample(
        self, designs: int | tuple[np.ndarray, np.ndarray], *, rng: np.random.Generator
    ) -> LinearGaussianCells:
        """Return cells drawn from the model.

        Parameters
        ----------
        designs
            Number of cells, with designs from `random_designs`; or the pair (d, a).
        rng
            Source of randomness.

        Returns
        -------
        LinearGaussianCells
            Values, designs and the latents that generated them.
        """
        d, a = self.random_designs(designs, rng=rng) if isinstance(designs, int) else designs
        d, a = np.asarray(d, dtype=np.float64), np.asarray(a, dtype=np.float64)
        z = rng.standard_normal((len(d), self.n_latents))
        w = rng.standard_normal((len(d), self.n_artifact_latents))
        noise = self.noise_sd * rng.standard_normal((len(d), self.n_genes))
        return LinearGaussianCells(self.mean(d, a, z, w) + noise, d, a, z, w)

    def random_designs(
        self, n_cells: int, *, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return designs with controls, singles and pairs, and flags that depend on them.

        A quarter of the cells are controls and about an eighth carry two perturbations. Each flag
        has its own log-odds per perturbation, so that artifact and perturbation are confounded.

        Returns
        -------
        tuple
            d of shape (cells, perturbations) and a of shape (cells, artifacts), both 0/1.
        """
        d = np.zeros((n_cells, self.n_perturbations))
        a = np.zeros((n_cells, self.n_artifacts))
        kind = rng.choice(3, size=n_cells, p=[0.25, 0.625, 0.125])
        if self.n_perturbations:
            for n_targets in (1, 2):
                rows = np.flatnonzero(kind >= n_targets)
                d[rows, rng.integers(self.n_perturbations, size=len(rows))] = 1
        if self.n_artifacts:
            base = np.log(0.4 / self.n_artifacts / (1 - 0.4 / self.n_artifacts))
            logits = base + d @ rng.standard_normal((self.n_perturbations, self.n_artifacts))
            a[:] = rng.random(a.shape) < 1 / (1 + np.exp(-logits))
        return d, a

    # Exact inference for a cell's own latents

    def marginal(self, d: np.ndarray, a: np.ndarray) -> Gaussian:
        """Return p(x | do(d), do(a)) with z and w from their priors.

        Returns
        -------
        Gaussian
            Mean (cells, genes) and covariance (cells, genes, genes).
        """
        mean = self._fixed_mean(d, a)
        gate = self.gate(a).astype(int)
        covariances = [self._design(g).T @ self._design(g) for g in (0, 1)]
        covariance = np.stack([c + np.diag(self.noise_sd**2) for c in covariances])
        return Gaussian(mean, covariance[gate])

    def log_evidence(self, x: np.ndarray, d: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Return log p(x | d, a) with z and w integrated out, in nats; shape (cells,)."""
        gate = self.gate(a).astype(int)
        residual = x - self._fixed_mean(d, a)
        log_det = np.array([np.linalg.slogdet(self._precision(g))[1] for g in (0, 1)])[gate]
        exact = self.posterior(x, d, a)
        explained = (self._score(residual, gate) * exact.mean).sum(axis=-1)
        quadratic = ((residual / self.noise_sd) ** 2).sum(axis=-1) - explained
        return self._log_normaliser() - 0.5 * (log_det + quadratic)

    def posterior(self, x: np.ndarray, d: np.ndarray, a: np.ndarray) -> Gaussian:
        """Return p(z, w | x, d, a), latents ordered (z, w).

        Where no flag is set, w keeps its prior and is independent of z.

        Returns
        -------
        Gaussian
            Mean (cells, latents + artifact_latents) and its covariance.

        Notes
        -----
        With H = [L; g V L], D = diag(noise_sd²): precision I + H D⁻¹ Hᵀ, and
        mean = covariance · H D⁻¹ (x - μ - (p + a U) L).
        """
        gate = self.gate(a).astype(int)
        covariance = np.stack([linalg.inv(self._precision(g)) for g in (0, 1)])[gate]
        score = self._score(x - self._fixed_mean(d, a), gate)
        return Gaussian(np.einsum("nij,nj->ni", covariance, score), covariance)

    def posterior_z(self, x: np.ndarray, d: np.ndarray, a: np.ndarray) -> Gaussian:
        """Return p(z | x, d, a), w integrated out; mean (cells, latents)."""
        exact, k = self.posterior(x, d, a), self.n_latents
        return Gaussian(exact.mean[:, :k], exact.covariance[:, :k, :k])

    def posterior_w(self, x: np.ndarray, d: np.ndarray, a: np.ndarray) -> Gaussian:
        """Return p(w | x, d, a), z integrated out; the target of the guide's q(w | x, p, a)."""
        exact, k = self.posterior(x, d, a), self.n_latents
        return Gaussian(exact.mean[:, k:], exact.covariance[:, k:, k:])

    def posterior_z_given_w(
        self, x: np.ndarray, d: np.ndarray, a: np.ndarray, w: np.ndarray
    ) -> Gaussian:
        """Return p(z | x, d, a, w); the target of the guide's q(z | x, p, r).

        It depends on (d, a, w) through p and r alone, and its covariance is the same for all cells.
        """
        state = self.perturbation_shift(d) + self.artifact_shift(a, w)
        residual = x - self.intercept - state @ self.loading
        covariance = linalg.inv(self._precision(0))[: self.n_latents, : self.n_latents]
        mean = (residual / self.noise_sd**2) @ self.loading.T @ covariance
        return Gaussian(mean, np.broadcast_to(covariance, (len(mean), *covariance.shape)).copy())

    # The ELBO of any Gaussian guide

    def expected_log_likelihood(
        self, x: np.ndarray, d: np.ndarray, a: np.ndarray, q_mean: np.ndarray, q_cov: np.ndarray
    ) -> np.ndarray:
        """Return E_q log p(x | z, w, d, a) in nats; shape (cells,). Arguments as in `elbo`."""
        k = self.n_latents
        at_mean = self.log_likelihood(x, d, a, q_mean[:, :k], q_mean[:, k:])
        information = self._information(self.gate(a))
        return at_mean - 0.5 * np.einsum("nij,nij->n", information, _full(q_cov))

    def elbo(
        self, x: np.ndarray, d: np.ndarray, a: np.ndarray, q_mean: np.ndarray, q_cov: np.ndarray
    ) -> np.ndarray:
        """Return each cell's ELBO under q(z, w) = Normal(q_mean, q_cov), in nats.

        Parameters
        ----------
        x, d, a
            Cells.
        q_mean
            Mean of (z, w); shape (cells, latents + artifact_latents).
        q_cov
            Covariances, shape (cells, k, k), or variances of a diagonal guide, shape (cells, k).

        Returns
        -------
        numpy.ndarray
            E_q log p(x | z, w) - KL(q ‖ N(0, I)), shape (cells,). Equal to `log_evidence` at the
            exact posterior, below it elsewhere.
        """
        full = _full(q_cov)
        identity = np.broadcast_to(np.eye(full.shape[-1]), full.shape)
        kl = gaussian_kl(q_mean, full, np.zeros_like(q_mean), identity)
        return self.expected_log_likelihood(x, d, a, q_mean, full) - kl

    def elbo_gradient(
        self, x: np.ndarray, d: np.ndarray, a: np.ndarray, q_mean: np.ndarray, q_cov: np.ndarray
    ) -> Gaussian:
        """Return the gradient of each cell's ELBO with respect to `q_mean` and `q_cov`.

        Arguments as in `elbo`. The second part has the form of `q_cov`: with respect to the
        variances of a diagonal guide, or to the covariance with its entries taken as independent.

        Notes
        -----
        With P the exact posterior precision and m its mean:
        ∂/∂mean = P (m - q_mean), ∂/∂covariance = (q_cov⁻¹ - P) / 2.
        """
        exact = self.posterior(x, d, a)
        precision = self._information(self.gate(a)) + np.eye(q_mean.shape[-1])
        mean = np.einsum("nij,nj->ni", precision, exact.mean - q_mean)
        if q_cov.ndim == 2:
            return Gaussian(mean, 0.5 * (1 / q_cov - np.einsum("nii->ni", precision)))
        return Gaussian(mean, 0.5 * (np.linalg.inv(q_cov) - precision))

    def best_diagonal(self, x: np.ndarray, d: np.ndarray, a: np.ndarray) -> Gaussian:
        """Return the mean-field optimum of the ELBO: the exact mean, variances 1 / diag(precision).

        Returns
        -------
        Gaussian
            Mean (cells, k) and *variances* (cells, k), as `elbo` accepts them.
        """
        precision = self._information(self.gate(a)) + np.eye(self._n_joint)
        return Gaussian(self.posterior(x, d, a).mean, 1 / np.einsum("nii->ni", precision))

    # The sleep form of the consistency term

    def sleep_loss(self, gain: np.ndarray, covariance: np.ndarray) -> float:
        """Return the population sleep term of a linear guide for z, in nats per cell.

        The guide is q(z | x, p, r) = Normal((x - μ - (p + r) L) gain, covariance), the term
        -E log q(z | x', p', r') with z from N(0, I) and x' generated from z under *any*
        intervention: since p' and r' are given to the guide, the term does not depend on it.

        Parameters
        ----------
        gain
            Shape (genes, latents).
        covariance
            Shape (latents, latents), positive definite.

        Returns
        -------
        float
            The expectation; smallest at `exact_gain` and the covariance of `posterior_z_given_w`.
        """
        error = self._sleep_error(gain)
        log_det = np.linalg.slogdet(covariance)[1]
        trace = np.trace(linalg.solve(covariance, error, assume_a="general"))
        return float(0.5 * (self.n_latents * LOG_2PI + log_det + trace))

    def sleep_gradient(
        self, gain: np.ndarray, covariance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradient of `sleep_loss` with respect to `gain` and `covariance`.

        Both are zero at the exact posterior, so adding the term to the ELBO moves no optimum.
        """
        inverse = linalg.inv(covariance)
        marginal = self.loading.T @ self.loading + np.diag(self.noise_sd**2)
        by_gain = (marginal @ gain - self.loading.T) @ inverse
        by_covariance = 0.5 * (inverse - inverse @ self._sleep_error(gain) @ inverse)
        return by_gain, by_covariance

    def exact_gain(self) -> np.ndarray:
        """Return the gain of p(z | x, p, r): mean = (x - μ - (p + r) L) gain; (genes, latents)."""
        covariance = linalg.inv(self._precision(0))[: self.n_latents, : self.n_latents]
        return (self.loading / self.noise_sd**2).T @ covariance

    # Counterfactuals

    def counterfactual(
        self,
        x: np.ndarray,
        d: np.ndarray,
        a: np.ndarray,
        d_new: np.ndarray,
        a_new: np.ndarray,
    ) -> Gaussian:
        """Return the distribution of each cell's counterfactual x' under do(d_new), do(a_new).

        Abduction, action, prediction with the cell's own z, w and noise. What is not identified is
        w alone, and only where an artifact is switched on (w from its prior, which is also its
        posterior without an artifact) or off (w from its posterior).

        Parameters
        ----------
        x, d, a
            Factual cells.
        d_new, a_new
            Designs and flags after the intervention, same shapes as `d` and `a`.

        Returns
        -------
        Gaussian
            Mean (cells, genes) and covariance (cells, genes, genes); the covariance is exactly zero
            where the gate does not change, and x' = x exactly where nothing does.

        Notes
        -----
        x' = x + (Δp + Δr) L with Δp = (d' - d) E and Δr = (a' - a) U + (g' - g) w V.
        """
        switch = self.gate(a_new) - self.gate(a)
        abducted = self.posterior_w(x, d, a)
        path = self.artifact_loading @ self.loading
        fixed = (np.asarray(d_new, float) - d) @ self.effect
        fixed = fixed + (np.asarray(a_new, float) - a) @ self.artifact_effect
        mean = x + fixed @ self.loading + switch[:, None] * (abducted.mean @ path)
        spread = path.T @ abducted.covariance @ path
        return Gaussian(mean, (switch**2)[:, None, None] * spread)

    # Global effects with a Gaussian prior

    def effect_posterior(
        self,
        x: np.ndarray,
        d: np.ndarray,
        a: np.ndarray,
        *,
        prior_sd: float,
        mask: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return p(effect | x, d, a), z and w integrated out and all else known.

        Parameters
        ----------
        x, d, a
            All cells of the screen.
        prior_sd
            Standard deviation of the prior: effect_tl ~ Normal(0, prior_sd²).
        mask
            m_tl, so that p = d (m ⊙ effect); all ones if None. Shape (perturbations, latents).

        Returns
        -------
        tuple
            Mean (perturbations, latents) and covariance (perturbations·latents, same), the flat
            order being that of ``mean.ravel()``. Entries masked out keep their prior.
        """
        precision, score = self._effect_information(x, d, a, prior_sd=prior_sd, mask=mask)
        covariance = linalg.inv(precision)
        return (covariance @ score).reshape(self.effect.shape), covariance

    def effect_log_evidence(
        self,
        x: np.ndarray,
        d: np.ndarray,
        a: np.ndarray,
        *,
        prior_sd: float,
        mask: np.ndarray | None = None,
    ) -> float:
        """Return log p(x | d, a) of the whole screen with effect, z and w integrated out, in nats.

        Arguments as in `effect_posterior`. Summed with log p(mask) over all masks of a small
        screen it gives the exact posterior of the mask.

        Notes
        -----
        log p(x) = log p(x, e) - log p(e | x), evaluated at e = 0.
        """
        precision, score = self._effect_information(x, d, a, prior_sd=prior_sd, mask=mask)
        at_zero = dataclasses.replace(self, effect=np.zeros_like(self.effect))
        quadratic = score @ linalg.solve(precision, score, assume_a="pos")
        log_det = np.linalg.slogdet(precision)[1] + 2 * self.effect.size * np.log(prior_sd)
        return float(at_zero.log_evidence(x, d, a).sum() + 0.5 * (quadratic - log_det))

    def effect_elbo(
        self,
        x: np.ndarray,
        d: np.ndarray,
        a: np.ndarray,
        q_mean: np.ndarray,
        q_cov: np.ndarray,
        *,
        effect_mean: np.ndarray,
        effect_sd: np.ndarray,
        prior_sd: float,
        mask: np.ndarray | None = None,
    ) -> float:
        """Return the ELBO of the whole screen with q(effect) beside the cells' q(z, w), in nats.

        Parameters
        ----------
        x, d, a, q_mean, q_cov
            All cells and their guides, as in `elbo`; q(z, w) does not depend on the effect drawn.
        effect_mean, effect_sd
            Independent Normal guide of the effects; shape (perturbations, latents).
        prior_sd, mask
            As in `effect_posterior`.

        Returns
        -------
        float
            Σ_n (E log p(x_n | z, w, effect) - KL_n) - KL(q(effect) ‖ prior); the global term is
            counted once, whatever the number of cells.
        """
        mask = np.ones_like(self.effect) if mask is None else np.asarray(mask, float)
        at_mean = dataclasses.replace(self, effect=mask * effect_mean)
        information = (self.loading**2 / self.noise_sd**2).sum(axis=1)
        spread = (np.asarray(d, float) ** 2) @ (mask * effect_sd) ** 2 @ information
        variance = (effect_sd / prior_sd) ** 2
        kl = 0.5 * (variance + (effect_mean / prior_sd) ** 2 - 1 - np.log(variance)).sum()
        return float((at_mean.elbo(x, d, a, q_mean, q_cov) - 0.5 * spread).sum() - kl)

    # Shared pieces

    @property
    def _n_joint(self) -> int:
        return self.n_latents + self.n_artifact_latents

    def _log_normaliser(self) -> float:
        return -0.5 * self.n_genes * LOG_2PI - float(np.log(self.noise_sd).sum())

    def _fixed_mean(self, d: np.ndarray, a: np.ndarray) -> np.ndarray:
        """E[x | do(d), do(a)]: z and w at their prior mean of zero."""
        state = self.perturbation_shift(d) + np.asarray(a, float) @ self.artifact_effect
        return self.intercept + state @ self.loading

    def _design(self, gate: int) -> np.ndarray:
        """H_g, (z, w) to genes; shape (latents + artifact_latents, genes)."""
        return np.concatenate([self.loading, gate * self.artifact_loading @ self.loading])

    def _precision(self, gate: int) -> np.ndarray:
        scaled = self._design(gate) / self.noise_sd
        return np.eye(self._n_joint) + scaled @ scaled.T

    def _information(self, gate: np.ndarray) -> np.ndarray:
        """Precision that the likelihood adds to the prior's; shape (cells, k, k)."""
        both = np.stack([self._precision(g) - np.eye(self._n_joint) for g in (0, 1)])
        return both[gate.astype(int)]

    def _score(self, residual: np.ndarray, gate: np.ndarray) -> np.ndarray:
        """H_g D⁻¹ residual; shape (cells, k)."""
        score = (residual / self.noise_sd**2) @ self._design(1).T
        score[:, self.n_latents :] *= gate[:, None]
        return score

    def _sleep_error(self, gain: np.ndarray) -> np.ndarray:
        """E[(z - y gain)ᵀ(z - y gain)] for y = z L + noise."""
        miss = np.eye(self.n_latents) - self.loading @ gain
        noise = self.noise_sd[:, None] * gain
        return miss.T @ miss + noise.T @ noise

    def _effect_information(
        self,
        x: np.ndarray,
        d: np.ndarray,
        a: np.ndarray,
        *,
        prior_sd: float,
        mask: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior precision and score (precision · mean) of the flattened effects."""
        mask = np.ones_like(self.effect) if mask is None else np.asarray(mask, float)
        d, gate = np.asarray(d, float), self.gate(a)
        residual = x - self._fixed_mean(np.zeros_like(d), a)
        precision = np.eye(self.effect.size) / prior_sd**2
        score = np.zeros(self.effect.size)
        for g in (0, 1):
            rows = gate == g
            design = self._design(g)
            marginal = design.T @ design + np.diag(self.noise_sd**2)
            weighted = linalg.solve(marginal, self.loading.T, assume_a="pos")
            precision += np.kron(d[rows].T @ d[rows], self.loading @ weighted)
            score += (d[rows].T @ (residual[rows] @ weighted)).ravel()
        flat = mask.ravel()
        prior = np.eye(self.effect.size) / prior_sd**2
        return prior + flat[:, None] * (precision - prior) * flat, flat * score


def gaussian_kl(
    q_mean: np.ndarray, q_cov: np.ndarray, p_mean: np.ndarray, p_cov: np.ndarray
) -> np.ndarray:
    """Return KL(Normal(q_mean, q_cov) ‖ Normal(p_mean, p_cov)) in nats; shape (cells,).

    Parameters
    ----------
    q_mean, p_mean
        Shape (cells, k).
    q_cov, p_cov
        Covariances (cells, k, k), or variances (cells, k).

    Notes
    -----
    ½ [tr(P⁻¹Q) + (p - q)ᵀ P⁻¹ (p - q) - k + log|P| - log|Q|].

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> float(gaussian_kl(one, one, 0 * one, one)[0])
    0.5
    """
    q_cov, p_cov = _full(q_cov), _full(p_cov)
    miss = p_mean - q_mean
    trace = np.trace(np.linalg.solve(p_cov, q_cov), axis1=-2, axis2=-1)
    mahalanobis = (miss * np.linalg.solve(p_cov, miss[..., None])[..., 0]).sum(axis=-1)
    log_ratio = np.linalg.slogdet(p_cov)[1] - np.linalg.slogdet(q_cov)[1]
    return 0.5 * (trace + mahalanobis - q_mean.shape[-1] + log_ratio)


def simulate_linear_gaussian(
    *,
    n_cells: int,
    n_genes: int,
    n_latents: int,
    n_perturbations: int,
    n_artifacts: int,
    seed: int,
    n_artifact_latents: int = 2,
) -> tuple[LinearGaussianCradle, LinearGaussianCells]:
    """Return a random linear-Gaussian CRADLE and cells drawn from it.

    Parameters
    ----------
    n_cells, n_genes, n_latents, n_perturbations, n_artifacts
        Sizes.
    seed
        Seed of parameters, designs, latents and noise.
    n_artifact_latents
        Dimensions of w.

    Returns
    -------
    tuple
        The oracle, and the cells with their designs and latents. Half of the effects are masked.

    Raises
    ------
    DataError
        If a size is negative, or there are no genes or latents.

    Examples
    --------
    >>> oracle, cells = simulate_linear_gaussian(n_cells=5, n_genes=4, n_latents=2,
    ...     n_perturbations=3, n_artifacts=2, seed=0)
    >>> cells.x.shape, cells.w.shape
    ((5, 4), (5, 2))
    """
    sizes = (n_cells, n_genes, n_latents, n_perturbations, n_artifacts, n_artifact_latents)
    if min(sizes) < 0 or min(n_genes, n_latents) == 0:
        raise DataError(
            f"Sizes must not be negative, with at least one gene and one latent; found n_cells, "
            f"n_genes, n_latents, n_perturbations, n_artifacts, n_artifact_latents = {sizes}. "
            "Give larger sizes."
        )
    rng = np.random.default_rng(seed)
    masked = rng.random((n_perturbations, n_latents)) < 0.5
    oracle = LinearGaussianCradle(
        loading=rng.standard_normal((n_latents, n_genes)) / np.sqrt(n_latents),
        intercept=rng.standard_normal(n_genes),
        noise_sd=rng.uniform(0.5, 1.0, n_genes),
        effect=np.where(masked, 0.0, rng.standard_normal((n_perturbations, n_latents))),
        artifact_effect=rng.standard_normal((n_artifacts, n_latents)),
        artifact_loading=0.7 * rng.standard_normal((n_artifact_latents, n_latents)),
    )
    return oracle, oracle.sample(n_cells, rng=rng)


def _full(covariance: np.ndarray) -> np.ndarray:
    """Covariances from covariances or from variances; shape (cells, k, k)."""
    covariance = np.asarray(covariance, dtype=np.float64)
    if covariance.ndim == 3:
        return covariance
    return covariance[..., None] * np.eye(covariance.shape[-1])
