"""Baselines without a network: no change, means of training cells, their shrinkage, sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np

from cradle_pyro.baselines.predictor import Depth, Predictor
from cradle_pyro.baselines.shrinkage import Shrunken, shrink
from cradle_pyro.data.groups import (
    SCALE,
    Functional,
    Grouping,
    GroupMoments,
    cell_groups,
    group_moments,
    log2_fraction,
)
from cradle_pyro.errors import DataError, QueryError, near, shown

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.types import Schema

__all__ = [
    "FUNCTIONALS",
    "Additive",
    "ControlCells",
    "EffectNoise",
    "EmpiricalBayes",
    "FittedEffects",
    "GlobalMean",
    "NoChange",
    "TrainingMean",
    "control_cells",
    "counts_around",
    "default_baselines",
    "effect_standard_errors",
    "raw_effects",
    "training_cells",
    "training_moments",
]

Cells = Literal["all", "passing"]
_Table: TypeAlias = tuple[dict[str, np.ndarray], np.ndarray]
FUNCTIONALS: tuple[Functional, ...] = ("log_mean", "mean_log")


@dataclass(frozen=True)
class ControlCells:
    """What single control cells look like, as far as moments tell.

    Parameters
    ----------
    rate
        Expected fraction of each gene, shape (genes,).
    dispersion
        Squared coefficient of variation beyond Poisson noise, shape (genes,).
    """

    rate: np.ndarray
    dispersion: np.ndarray


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
        For each functional ("log_mean" of expected profiles, "mean_log" of observed cells), the
        effect of each label with an entry of its own, each of shape (genes,), log2 units.
    fallback
        For each functional, the effect of labels of which nothing is known, shape (genes,).
    control
        Control cells, around whose profile cells are generated.
    combine_seen
        True to predict a combination by the sum of its singles even if it has its own entry.
    """

    name: str
    schema: Schema
    effects: Mapping[Functional, Mapping[str, np.ndarray]]
    fallback: Mapping[Functional, np.ndarray]
    control: ControlCells
    combine_seen: bool = False

    def predict(self, labels: Sequence[str], depth: Depth | None = None) -> np.ndarray:
        """Return the effect of each label against control, shape (labels, genes), log2 units.

        A label's own entry; else the sum of the entries of the perturbations it names, leaving
        out those without one; `fallback` when there is none. With `depth` the entries are those
        seen in the training cells, at the training cells' own depth.

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
        functional: Functional = "log_mean" if depth is None else "mean_log"
        if not len(labels):
            return np.zeros((0, len(self.fallback[functional])))
        return np.stack([self._effect(label, functional) for label in labels])

    def generate(self, labels: Sequence[str], library: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Return negative binomial counts around each label's profile, shape (cells, genes)."""
        return counts_around(self.control, self.predict, labels, library, seed=seed)

    def _parts(self, label: str) -> list[str]:
        if label == self.schema.control:
            return []
        return [name for name in str(label).split(self.schema.delimiter) if name]

    def _effect(self, label: str, functional: Functional) -> np.ndarray:
        table, fallback = self.effects[functional], self.fallback[functional]
        parts = sorted(set(self._parts(label)))
        if not parts:
            return np.zeros_like(fallback)
        own = self.schema.delimiter.join(parts)
        if own in table and not (self.combine_seen and len(parts) > 1):
            return table[own]
        found = [table[name] for name in parts if name in table]
        return np.sum(found, axis=0) if found else fallback


@dataclass(frozen=True)
class _Means:
    """Predictors made of means of training cells.

    Parameters
    ----------
    cells
        ``"all"`` cells or only those ``"passing"`` QC.
    grouping
        ``"label"``: cells with exactly this combination; ``"marginal"``: all cells that carry a
        perturbation, for screens of high multiplicity.
    min_cells
        Labels with fewer training cells have no mean of their own.
    name
        Name in tables.
    """

    cells: Cells = "passing"
    grouping: Grouping = "label"
    min_cells: int = 1
    name: str = ""

    def fit(self, data: CellData) -> FittedEffects:
        """Return the effects of every training label."""
        schema = data.schema
        moments = training_moments(data, self.cells, self.grouping, self.min_cells)
        found = {f: self._effects(moments, schema.control, f) for f in FUNCTIONALS}
        return FittedEffects(
            self.name,
            schema,
            effects={f: table for f, (table, _) in found.items()},
            fallback={f: fallback for f, (_, fallback) in found.items()},
            control=control_cells(moments, schema.control),
            combine_seen=self._combine_seen,
        )

    _combine_seen: ClassVar[bool] = False

    def _effects(self, moments: GroupMoments, control: str, functional: Functional) -> _Table:
        """Return effects by label, and that of a label of which nothing is known."""
        return raw_effects(moments, control, functional), np.zeros(moments.fraction.shape[1])


@dataclass(frozen=True)
class NoChange(_Means):
    """Predicts that nothing changes. Parameters as in `TrainingMean`."""

    name: str = "no_change"

    def _effects(self, moments: GroupMoments, control: str, functional: Functional) -> _Table:
        return {}, np.zeros(moments.fraction.shape[1])


@dataclass(frozen=True)
class GlobalMean(_Means):
    """Predicts the same effect for every label: the mean of all labels' raw effects.

    Parameters as in `TrainingMean`.
    """

    name: str = "global_mean"

    def _effects(self, moments: GroupMoments, control: str, functional: Functional) -> _Table:
        raw, zeros = super()._effects(moments, control, functional)
        return {}, np.mean(list(raw.values()), axis=0) if raw else zeros


@dataclass(frozen=True)
class TrainingMean(_Means):
    """Predicts what the training cells of the label show on average.

    Combinations without training cells get the sum of their singles, as far as these exist.

    Parameters
    ----------
    cells
        ``"all"`` cells or only those ``"passing"`` QC.
    grouping
        ``"label"``: cells with exactly this combination; ``"marginal"``: all cells that carry a
        perturbation, for screens of high multiplicity.
    min_cells
        Labels with fewer training cells have no mean of their own.
    """

    name: str = "training_mean"


@dataclass(frozen=True)
class Additive(_Means):
    """Predicts every combination by the sum of the raw effects of its singles, seen or not.

    Parameters as in `TrainingMean`.

    References
    ----------
    Ahlmann-Eltze, Huber and Anders, "Deep-learning-based gene perturbation effect prediction does
    not yet outperform simple linear baselines", Nature Methods 2025.
    """

    name: str = "additive"
    _combine_seen: ClassVar[bool] = True


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
class EmpiricalBayes(_Means):
    """Predicts the training mean shrunken by a sparse prior fitted to all labels.

    Combinations without training cells get the sum of the shrunken singles.

    Parameters
    ----------
    cells, grouping, min_cells
        As in `TrainingMean`.
    pseudo_entries
        Strength of the pooled mixture weights in each label's own weights (`shrink`).
    n_refinements
        How often the standard errors are computed again from the shrunken profiles.
    """

    name: str = "empirical_bayes"
    pseudo_entries: float = 10.0
    n_refinements: int = 1

    def posterior(
        self, moments: GroupMoments, control: str, functional: Functional = "log_mean"
    ) -> Shrunken:
        """Return the posterior of all labels' effects, in the order of the groups less control."""
        effects = np.stack(list(raw_effects(moments, control, functional).values()))
        estimate = np.zeros_like(effects)
        for _ in range(self.n_refinements + 1):
            noise = effect_standard_errors(
                moments, control, functional=functional, effects=estimate
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

    def _effects(self, moments: GroupMoments, control: str, functional: Functional) -> _Table:
        raw, zeros = super()._effects(moments, control, functional)
        if not raw:
            return {}, zeros
        mean = self.posterior(moments, control, functional).mean
        return dict(zip(raw, mean, strict=True)), zeros


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


def default_baselines(grouping: Grouping = "label") -> list[Predictor]:
    """Return the baselines of the standard table, weakest first."""
    return [
        NoChange(grouping=grouping),
        GlobalMean(grouping=grouping),
        TrainingMean(cells="all", grouping=grouping, name="training_mean_all"),
        TrainingMean(cells="passing", grouping=grouping, name="training_mean_passing"),
        Additive(grouping=grouping),
        EmpiricalBayes(grouping=grouping),
    ]


def training_cells(data: CellData) -> CellData:
    """Return the training cells: those of the split "train", or all cells without a split."""
    return data if data.split is None else data.where(split="train")


def training_moments(
    data: CellData, cells: Cells, grouping: Grouping, min_cells: int
) -> GroupMoments:
    """Return the moments of the training cells' groups; arguments as in `TrainingMean`.

    Raises
    ------
    DataError
        When an option is unknown, or there is no control cell.
    """
    if cells not in ("all", "passing"):
        raise DataError(f"cells must be 'all' or 'passing', found {cells!r}.")
    train = training_cells(data)
    groups = cell_groups(train, grouping, min_cells=min_cells, passing=cells == "passing")
    return group_moments(train.counts, train.library, groups, values=train.values)


def counts_around(
    control: ControlCells,
    predict: Callable[[Sequence[str]], np.ndarray],
    labels: Sequence[str],
    library: np.ndarray,
    *,
    seed: int,
) -> np.ndarray:
    """Return negative binomial counts around each label's expected profile, (cells, genes).

    Parameters
    ----------
    control
        Profile to which effects are added, and dispersion.
    predict
        Returns the effects of labels on expected profiles, as `FittedPredictor.predict`.
    labels, library, seed
        As in `GenerativePredictor.generate`.
    """
    names, inverse = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    own = log2_fraction(control.rate) + predict(names.tolist())
    mean = np.maximum((2.0**own - 1.0) / SCALE, 0.0)[inverse] * np.asarray(library)[:, None]
    rng = np.random.default_rng(seed)
    shape = 1.0 / np.maximum(control.dispersion, 1e-6)
    return rng.poisson(mean * rng.gamma(shape, 1.0 / shape, mean.shape)).astype(np.float32)


def raw_effects(
    moments: GroupMoments, control: str, functional: Functional
) -> dict[str, np.ndarray]:
    """Return the difference of each group's functional and the control's, by label."""
    value = moments.value(functional)
    against = value[moments.row(control)]
    return {
        label: value[row] - against for row, label in enumerate(moments.labels) if label != control
    }


def control_cells(moments: GroupMoments, control: str) -> ControlCells:
    """Return the controls' profile and each gene's overdispersion, pooled over groups."""
    return ControlCells(moments.fraction[moments.row(control)], _dispersion(moments))


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
    variance = (mean * poisson + _dispersion(moments) * mean**2) / sizes[:, None]
    error = SCALE / ((1.0 + SCALE * mean) * np.log(2.0)) * np.sqrt(variance)
    scale = SCALE * base / (1.0 + SCALE * base)
    return EffectNoise(error[others], error[at], scale)


def _dispersion(moments: GroupMoments) -> np.ndarray:
    """Return phi in var f = m E[1/library] + phi m^2, per gene, pooled over groups."""
    weight = moments.n_cells.astype(np.float64)[:, None]
    poisson = moments.inverse_library[:, None]
    excess = moments.fraction_sq - moments.fraction**2 - moments.fraction * poisson
    square = (weight * moments.fraction**2).sum(0)
    return np.maximum((weight * excess).sum(0), 0.0) / np.maximum(square, 1e-30)


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
