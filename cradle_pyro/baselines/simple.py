"""Baselines without a network: no change, means of training cells, their shrinkage, sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from cradle_pyro.baselines.predictor import Predictor
from cradle_pyro.baselines.shrinkage import Shrunken, shrink
from cradle_pyro.data.groups import (
    SCALE,
    Functional,
    Grouping,
    GroupMoments,
    cell_groups,
    group_moments,
)
from cradle_pyro.errors import DataError, QueryError, near, shown

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.types import Schema

__all__ = [
    "Additive",
    "EffectNoise",
    "EmpiricalBayes",
    "FittedEffects",
    "GlobalMean",
    "NoChange",
    "TrainingMean",
    "default_baselines",
    "effect_standard_errors",
]

Cells = Literal["all", "passing"]


@dataclass(frozen=True)
class FittedEffects:
    """A table of effects, and sums of its single effects for combinations it lacks.

    Parameters
    ----------
    name
        Name in tables.
    schema
        Names of the screen.
    effects
        Effect of each label with an entry of its own, each of shape (genes,), log2 units.
    fallback
        Effect of labels of which nothing is known, shape (genes,).
    combine_seen
        True to predict a combination by the sum of its singles even if it has its own entry.
    """

    name: str
    schema: Schema
    effects: Mapping[str, np.ndarray]
    fallback: np.ndarray
    combine_seen: bool = False

    def predict(self, labels: Sequence[str]) -> np.ndarray:
        """Return the effect of each label against control, shape (labels, genes), log2 units.

        A label's own entry; else the sum of the entries of the perturbations it names, leaving
        out those without one; `fallback` when there is none.

        Raises
        ------
        QueryError
            When a label names a perturbation that the screen does not know.
        """
        known = set(self.schema.perturbations)
        unknown = sorted({name for label in labels for name in self._parts(label)} - known)
        if unknown:
            hint = near(unknown[0], self.schema.perturbations)
            raise QueryError(
                f"labels must be combinations of the {len(known)} known perturbations joined by "
                f"{self.schema.delimiter!r}; found {shown(unknown)}{hint}."
            )
        if not len(labels):
            return np.zeros((0, len(self.fallback)))
        return np.stack([self._effect(label) for label in labels])

    def _parts(self, label: str) -> list[str]:
        if label == self.schema.control:
            return []
        return [name for name in str(label).split(self.schema.delimiter) if name]

    def _effect(self, label: str) -> np.ndarray:
        parts = sorted(set(self._parts(label)))
        if not parts:
            return np.zeros_like(self.fallback)
        own = self.schema.delimiter.join(parts)
        if own in self.effects and not (self.combine_seen and len(parts) > 1):
            return self.effects[own]
        found = [self.effects[name] for name in parts if name in self.effects]
        return np.sum(found, axis=0) if found else self.fallback


@dataclass(frozen=True)
class NoChange:
    """Predicts that nothing changes."""

    name: str = "no_change"

    def fit(self, data: CellData) -> FittedEffects:
        """Return zeros for every label."""
        return FittedEffects(self.name, data.schema, {}, np.zeros(data.schema.n_genes))


@dataclass(frozen=True)
class GlobalMean:
    """Predicts the same effect for every label: the mean over training labels.

    Parameters
    ----------
    cells, functional, grouping, min_cells
        As in `TrainingMean`.
    """

    cells: Cells = "passing"
    functional: Functional = "log_mean"
    grouping: Grouping = "label"
    min_cells: int = 1
    name: str = "global_mean"

    def fit(self, data: CellData) -> FittedEffects:
        """Return the mean over labels of the raw effects."""
        raw = _raw_effects(_moments(data, self), data.schema.control, self.functional)
        mean = np.mean(list(raw.values()), axis=0) if raw else np.zeros(data.schema.n_genes)
        return FittedEffects(self.name, data.schema, {}, mean)


@dataclass(frozen=True)
class TrainingMean:
    """Predicts what the training cells of the label show on average.

    Combinations without training cells get the sum of their singles, as far as these exist.

    Parameters
    ----------
    cells
        ``"all"`` cells or only those ``"passing"`` QC.
    functional
        ``"log_mean"``: log2(1 + 1e4 mean fraction), or ``"mean_log"``: the mean of the logarithm.
    grouping
        ``"label"``: cells with exactly this combination; ``"marginal"``: all cells that carry a
        perturbation, for screens of high multiplicity.
    min_cells
        Labels with fewer training cells have no mean of their own.
    """

    cells: Cells = "passing"
    functional: Functional = "log_mean"
    grouping: Grouping = "label"
    min_cells: int = 1
    name: str = "training_mean"

    def fit(self, data: CellData) -> FittedEffects:
        """Return the raw effect of every training label."""
        raw = _raw_effects(_moments(data, self), data.schema.control, self.functional)
        return FittedEffects(self.name, data.schema, raw, np.zeros(data.schema.n_genes))


@dataclass(frozen=True)
class Additive:
    """Predicts every combination by the sum of the raw effects of its singles, seen or not.

    Parameters as in `TrainingMean`.

    References
    ----------
    Ahlmann-Eltze, Huber and Anders, "Deep-learning-based gene perturbation effect prediction does
    not yet outperform simple linear baselines", Nature Methods 2025.
    """

    cells: Cells = "passing"
    functional: Functional = "log_mean"
    grouping: Grouping = "label"
    min_cells: int = 1
    name: str = "additive"

    def fit(self, data: CellData) -> FittedEffects:
        """Return the raw effects, to be summed over the singles of a combination."""
        raw = _raw_effects(_moments(data, self), data.schema.control, self.functional)
        zeros = np.zeros(data.schema.n_genes)
        return FittedEffects(self.name, data.schema, raw, zeros, combine_seen=True)


@dataclass(frozen=True)
class EffectNoise:
    """Sampling noise of raw effects.

    Parameters
    ----------
    own
        Standard error of each label's own functional, shape (labels, genes), log2 units.
    control
        Standard error of the control's functional, which all labels share, shape (genes,).
    scale
        How much a change of a gene's expression moves its value on this scale, which is flat
        where a gene is hardly expressed; in (0, 1], shape (genes,).
    """

    own: np.ndarray
    control: np.ndarray
    scale: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Standard error of each effect, both arms together, shape (labels, genes)."""
        return np.sqrt(self.own**2 + self.control**2)


@dataclass(frozen=True)
class EmpiricalBayes:
    """Predicts the training mean shrunken by a sparse prior fitted to all labels.

    Combinations without training cells get the sum of the shrunken singles.

    Parameters
    ----------
    cells, functional, grouping, min_cells
        As in `TrainingMean`.
    pseudo_entries
        Strength of the pooled mixture weights in each label's own weights (`shrink`).
    n_refinements
        How often the standard errors are computed again from the shrunken profiles.
    """

    cells: Cells = "passing"
    functional: Functional = "log_mean"
    grouping: Grouping = "label"
    min_cells: int = 1
    pseudo_entries: float = 10.0
    n_refinements: int = 1
    name: str = "empirical_bayes"

    def fit(self, data: CellData) -> FittedEffects:
        """Return the shrunken effect of every training label."""
        moments = _moments(data, self)
        labels = [label for label in moments.labels if label != data.schema.control]
        if not labels:
            return FittedEffects(self.name, data.schema, {}, np.zeros(data.schema.n_genes))
        posterior = self.posterior(moments, data.schema.control)
        table = dict(zip(labels, posterior.mean, strict=True))
        return FittedEffects(self.name, data.schema, table, np.zeros(data.schema.n_genes))

    def posterior(self, moments: GroupMoments, control: str) -> Shrunken:
        """Return the posterior of all labels' effects, in the order of the groups less control."""
        effects = np.stack(list(_raw_effects(moments, control, self.functional).values()))
        estimate = np.zeros_like(effects)
        for _ in range(self.n_refinements + 1):
            noise = effect_standard_errors(
                moments, control, functional=self.functional, effects=estimate
            )
            result = shrink(
                effects,
                noise.own,
                control_errors=noise.control,
                scale=noise.scale,
                pseudo_entries=self.pseudo_entries,
            )
            estimate = result.mean
        return result


def effect_standard_errors(
    moments: GroupMoments,
    control: str,
    *,
    functional: Functional = "log_mean",
    effects: np.ndarray | None = None,
) -> EffectNoise:
    """Return the noise of raw effects, arm by arm, and the scale of true effects per gene.

    Parameters
    ----------
    moments
        Moments of the groups, control among them.
    control
        Name of the control group.
    functional
        Functional of which effects are differences.
    effects
        Current estimate of the effects, shape (labels, genes), at which variances are evaluated.
        Default: no effect. Not the raw effects: a gene without a count in a few cells has a sample
        variance of zero, which is not certainty.

    Notes
    -----
    For ``"log_mean"``, var f = m E[1/library] + phi m^2 with one overdispersion phi per gene,
    pooled over groups, and the delta method for log2(1 + 1e4 m). For ``"mean_log"``, the sample
    variance of y shrunken to the gene's variance pooled within groups.
    """
    at = moments.row(control)
    others = np.array([row for row in range(len(moments.labels)) if row != at])
    estimate = np.zeros((len(others), moments.fraction.shape[1])) if effects is None else effects
    if functional == "log_mean":
        return _errors_log_mean(moments, at, others, estimate)
    return _errors_mean_log(moments, at, others)


def default_baselines(
    functional: Functional = "log_mean", grouping: Grouping = "label"
) -> list[Predictor]:
    """Return the baselines of the standard table, weakest first."""
    options = {"functional": functional, "grouping": grouping}
    return [
        NoChange(),
        GlobalMean(**options),  # type: ignore[arg-type]
        TrainingMean(cells="all", name="training_mean_all", **options),  # type: ignore[arg-type]
        TrainingMean(cells="passing", name="training_mean_passing", **options),  # type: ignore[arg-type]
        Additive(**options),  # type: ignore[arg-type]
        EmpiricalBayes(**options),  # type: ignore[arg-type]
    ]


def _moments(
    data: CellData, settings: GlobalMean | TrainingMean | Additive | EmpiricalBayes
) -> GroupMoments:
    if settings.cells not in ("all", "passing"):
        raise DataError(f"cells must be 'all' or 'passing', found {settings.cells!r}.")
    groups = cell_groups(
        data,
        settings.grouping,
        min_cells=settings.min_cells,
        passing=settings.cells == "passing",
    )
    return group_moments(data.counts, data.library, groups, values=data.values)


def _raw_effects(
    moments: GroupMoments, control: str, functional: Functional
) -> dict[str, np.ndarray]:
    value = moments.value(functional)
    against = value[moments.row(control)]
    return {
        label: value[row] - against for row, label in enumerate(moments.labels) if label != control
    }


def _errors_log_mean(
    moments: GroupMoments, at: int, others: np.ndarray, effects: np.ndarray
) -> EffectNoise:
    sizes = moments.n_cells.astype(np.float64)
    overall = sizes @ moments.fraction / sizes.sum()
    floor = 0.5 / (SCALE * sizes.sum())
    base = np.maximum((sizes[at] * moments.fraction[at] + overall) / (sizes[at] + 1.0), floor)
    mean = np.empty_like(moments.fraction)
    mean[at] = base
    mean[others] = np.maximum(((1.0 + SCALE * base) * 2.0**effects - 1.0) / SCALE, 0.1 * base)
    poisson = moments.inverse_library[:, None]
    excess = moments.fraction_sq - moments.fraction**2 - moments.fraction * poisson
    weight = sizes[:, None]
    dispersion = np.maximum((weight * excess).sum(0), 0.0) / np.maximum(
        (weight * moments.fraction**2).sum(0), 1e-30
    )
    variance = (mean * poisson + dispersion * mean**2) / weight
    error = SCALE / ((1.0 + SCALE * mean) * np.log(2.0)) * np.sqrt(variance)
    scale = SCALE * base / (1.0 + SCALE * base)
    return EffectNoise(error[others], error[at], scale)


def _errors_mean_log(
    moments: GroupMoments, at: int, others: np.ndarray, *, pseudo_cells: float = 100.0
) -> EffectNoise:
    sizes = moments.n_cells.astype(np.float64)[:, None]
    own = np.maximum(moments.log_sq - moments.log**2, 0.0)
    freedom = max(float(sizes.sum() - len(sizes)), 1.0)
    pooled = np.maximum((sizes * own).sum(axis=0) / freedom, 1e-8)
    variance = (sizes * own + pseudo_cells * pooled) / (sizes + pseudo_cells) / sizes
    base = (sizes * moments.log).sum(axis=0) / sizes.sum()
    scale = 1.0 - np.exp(-np.log(2.0) * np.maximum(base, 1e-4))
    return EffectNoise(np.sqrt(variance[others]), np.sqrt(variance[at]), scale)
