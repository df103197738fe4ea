"""A negative-binomial generalised linear model with sparse effects.

For cell n and gene g, with library l, nuisance columns c (intercept, covariates, artifact flags)
and design columns d (perturbations, then combinations):

    x_ng ~ NegativeBinomial(mean = l_n exp(c_n A_g + d_n B_g), inverse dispersion theta_g)
    B_jg ~ sum_k w_jk Normal(0, tau_k^2),    tau_0 = 0 (the spike) < tau_1 < ...

How it is fitted: :mod:`cradle_pyro.data.regression`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cradle_pyro.baselines.predictor import Depth
from cradle_pyro.baselines.simple import Cells, training_cells
from cradle_pyro.data.encode import combination_labels
from cradle_pyro.data.groups import log2_fraction
from cradle_pyro.data.regression import combinations_of, nuisance_columns, regress
from cradle_pyro.errors import DataError
from cradle_pyro.model.log_expression import mean_log2_expression
from cradle_pyro.queries.interventions import label_design

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.types import Schema

__all__ = [
    "FittedGLM",
    "NegativeBinomialGLM",
]


@dataclass(frozen=True)
class FittedGLM:
    """Log-linear expected profiles and the dispersion around them.

    Parameters
    ----------
    name
        Name in tables.
    schema
        Names of the screen.
    baseline
        Log rate of control cells without artifact at each of their covariates, shape (covariates,
        genes), nats.
    share
        Share of each of these among the control cells, shape (covariates,).
    effects
        Log-fold changes of the perturbations, shape (perturbations, genes), nats.
    interactions
        What a combination adds to the sum of its perturbations, by label, shape (genes,) each.
    inverse_dispersion
        theta, shape (genes,).
    """

    name: str
    schema: Schema
    baseline: np.ndarray
    share: np.ndarray
    effects: np.ndarray
    interactions: dict[str, np.ndarray]
    inverse_dispersion: np.ndarray

    def predict(self, labels: Sequence[str], depth: Depth | None = None) -> np.ndarray:
        """Return the effect of each label against control, shape (labels, genes), log2 units.

        Without `depth`, averaged over the covariates of the control cells. With `depth`, the mean
        over libraries of the expectation of log2(1 + 1e4 count / library), at the rates averaged
        over covariates; many libraries are stood in for by 32 quantiles.

        Raises
        ------
        QueryError
            When a label names a perturbation that the screen does not know.
        """
        changes = [self._log_fold_change(label) for label in labels]
        if not changes:
            return np.zeros((0, self.schema.n_genes))
        if depth is None:
            at_rest = self.share @ log2_fraction(np.exp(self.baseline))
            return np.stack(
                [self.share @ log2_fraction(np.exp(self.baseline + c)) - at_rest for c in changes]
            )
        at_rest = self._observed(np.zeros(self.schema.n_genes), depth.control)
        rows = [
            self._observed(change, library) - at_rest if change.any() else np.zeros_like(at_rest)
            for change, library in zip(changes, depth.labels, strict=True)
        ]
        return np.stack(rows)

    def generate(self, labels: Sequence[str], library: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Return negative-binomial counts of new cells, shape (cells, genes)."""
        names, inverse = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
        profiles = [self._rate(self._log_fold_change(name)) for name in names.tolist()]
        rate = np.reshape(profiles, (len(names), self.schema.n_genes))
        rng = np.random.default_rng(seed)
        theta = self.inverse_dispersion
        mean = rate[inverse] * np.asarray(library, dtype=np.float64)[:, None]
        return rng.poisson(mean * rng.gamma(theta, 1.0 / theta, mean.shape)).astype(np.float32)

    def _rate(self, change: np.ndarray) -> np.ndarray:
        return self.share @ np.exp(self.baseline + change)

    def _observed(self, change: np.ndarray, library: np.ndarray) -> np.ndarray:
        return mean_log2_expression(self._rate(change), self.inverse_dispersion, library)

    def _log_fold_change(self, label: str) -> np.ndarray:
        design = label_design(self.schema, label).numpy().astype(np.float64)
        members = [self.schema.perturbations[i] for i in np.flatnonzero(design)]
        own = self.interactions.get(self.schema.delimiter.join(sorted(members)))
        change = design @ self.effects
        return change if own is None else change + own


@dataclass(frozen=True)
class NegativeBinomialGLM:
    """Predicts effects by a negative-binomial regression with a sparse prior.

    Parameters
    ----------
    cells
        ``"passing"`` cells only, or ``"all"``, with an effect of each artifact flag.
    interaction_cells
        Combinations with at least so many cells have a coefficient beyond the sum of their
        members; None: none has.
    pseudo_entries
        Strength of the pooled mixture weights in each column's own weights, in genes.
    effect_sd
        Standard deviation of the weak Normal prior under which the likelihood is expanded, nats.
    n_sweeps
        Most rounds over the columns.
    name
        Name in tables.
    """

    cells: Cells = "passing"
    interaction_cells: int | None = 10
    pseudo_entries: float = 10.0
    effect_sd: float = 1.0
    n_sweeps: int = 50
    name: str = "glm"

    def fit(self, data: CellData) -> FittedGLM:
        """Return the model fitted to training cells.

        Raises
        ------
        DataError
            When values are no counts, or there are no control cells among those used.
        """
        if self.cells not in ("all", "passing"):
            raise DataError(f"cells must be 'all' or 'passing', found {self.cells!r}.")
        if data.values != "counts":
            raise DataError(f"A negative-binomial model needs raw counts, found '{data.values}'.")
        train = training_cells(data)
        train = train.subset(train.passing if self.cells == "passing" else train.artifact_observed)
        schema = train.schema
        is_control = np.asarray((train.perturbation > 0).sum(axis=1)).ravel() == 0
        if not is_control.any():
            raise DataError(
                f"effects need control cells ({schema.control!r}), found none among "
                f"{train.n_cells} training cells."
            )
        members = combinations_of(train, self.interaction_cells)
        found, expansion = regress(
            train, members,
            flags=self.cells == "all",
            effect_sd=self.effect_sd,
            pseudo_entries=self.pseudo_entries,
            n_sweeps=self.n_sweeps,
        )  # fmt: skip
        # Control cells are taken without flags, whose columns come last.
        levels = nuisance_columns(train.subset(is_control), flags=False)
        kinds_of_control, counts = np.unique(levels, axis=0, return_counts=True)
        names = combination_labels(members, schema).tolist()
        return FittedGLM(
            self.name,
            schema,
            baseline=kinds_of_control @ found.nuisance[: levels.shape[1]],
            share=counts / counts.sum(),
            effects=found.mean[: schema.n_perturbations],
            interactions=dict(zip(names, found.mean[schema.n_perturbations :], strict=True)),
            inverse_dispersion=expansion.inverse_dispersion,
        )
