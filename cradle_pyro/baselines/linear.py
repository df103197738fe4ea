"""The linear baseline: effects from embeddings of genes and of perturbations, by ridge regression.

    Y_lg = b_g + sum_kj (p_lj - mean p_j) W_jk G_gk + noise

Y are the effects of training labels l on genes g, G the principal axes of the training cells'
expression (genes x components), and p_l the embedding of a label: the sum over its perturbations
of their target genes' rows of G. b is the mean effect.

References
----------
Ahlmann-Eltze, Huber and Anders, "Deep-learning-based gene perturbation effect prediction does not
yet outperform simple linear baselines", Nature Methods 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

from cradle_pyro.baselines.predictor import Depth
from cradle_pyro.baselines.simple import (
    FUNCTIONALS,
    Cells,
    ControlCells,
    control_cells,
    counts_around,
    raw_effects,
    training_cells,
    training_moments,
)
from cradle_pyro.data.groups import SCALE, Functional, Grouping
from cradle_pyro.errors import DataError
from cradle_pyro.queries.interventions import label_design

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.types import Schema

__all__ = ["FittedLinear", "LinearRegression", "gene_embedding", "perturbation_embedding"]

_FEWEST_LABELS = 3  # with fewer, leaving one out says nothing about the penalty


class _Map(NamedTuple):
    """Effects of a label: ``loc + (embedding - centre) @ weights``."""

    loc: np.ndarray
    centre: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class FittedLinear:
    """A linear map from perturbations to effects.

    Parameters
    ----------
    name
        Name in tables.
    schema
        Names of the screen.
    embedding
        Embedding of each perturbation, shape (perturbations, inputs).
    maps
        The map for each functional.
    control
        Control cells, around whose profile cells are generated.
    """

    name: str
    schema: Schema
    embedding: np.ndarray
    maps: Mapping[Functional, _Map]
    control: ControlCells

    def predict(self, labels: Sequence[str], depth: Depth | None = None) -> np.ndarray:
        """Return the effect of each label against control, shape (labels, genes), log2 units.

        With `depth` effects are those seen in the training cells, at the training cells' own depth.

        Raises
        ------
        QueryError
            When a label names a perturbation that the screen does not know.
        """
        found = self.maps["log_mean" if depth is None else "mean_log"]
        rows = [label_design(self.schema, label).numpy() for label in labels]
        design = np.reshape(rows, (len(rows), self.schema.n_perturbations)).astype(np.float64)
        effects = found.loc + (design @ self.embedding - found.centre) @ found.weights
        return np.where(design.any(axis=1, keepdims=True), effects, 0.0)

    def generate(self, labels: Sequence[str], library: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Return negative binomial counts around each label's profile, shape (cells, genes)."""
        return counts_around(self.control, self.predict, labels, library, seed=seed)


@dataclass(frozen=True)
class LinearRegression:
    """Predicts effects from embeddings of genes and perturbations, by ridge regression.

    Parameters
    ----------
    cells
        ``"all"`` cells or only those ``"passing"`` QC.
    grouping
        ``"label"``: cells with exactly this combination; ``"marginal"``: all cells that carry a
        perturbation, for screens of high multiplicity.
    min_cells
        Labels with fewer training cells are not learned from.
    n_components
        Numbers of principal components to choose from.
    penalties
        Ridge penalties to choose from.
    most_cells
        Cells that the principal components are computed from, at most.
    name
        Name in tables.

    Notes
    -----
    Penalty and number of components have the lowest squared error of effects of training labels
    that are left out one at a time. With fewer than three labels the mean effect is predicted. A
    perturbation whose name is that of no gene has an input of its own in place of an embedding.
    """

    cells: Cells = "passing"
    grouping: Grouping = "label"
    min_cells: int = 1
    n_components: tuple[int, ...] = (5, 10, 20, 40)
    penalties: tuple[float, ...] = tuple(float(x) for x in np.logspace(-3, 3, 19))
    most_cells: int = 20_000
    name: str = "linear"

    def fit(self, data: CellData) -> FittedLinear:
        """Return the linear map learned from training cells.

        Raises
        ------
        DataError
            When there is no control cell, or no perturbed one.
        """
        moments = training_moments(data, self.cells, self.grouping, self.min_cells)
        train, schema = training_cells(data), data.schema
        effects = {f: raw_effects(moments, schema.control, f) for f in FUNCTIONALS}
        labels = [label for label in moments.labels if label != schema.control]
        if not labels:
            raise DataError("A linear map needs training cells of perturbations, found none.")
        design = np.stack([label_design(schema, label).numpy() for label in labels])
        axes = gene_embedding(
            train.subset(train.passing) if self.cells == "passing" else train,
            max(self.n_components),
            most_cells=self.most_cells,
        )
        sizes = sorted({min(size, axes.shape[1]) for size in self.n_components})
        # Both functionals share the inputs, so that one embedding serves both.
        inputs = {size: perturbation_embedding(schema, axes[:, :size]) for size in sizes}
        found = {
            size: {
                f: _ridge(
                    design @ inputs[size],
                    np.stack(list(table.values())),
                    axes[:, :size],
                    self.penalties,
                )
                for f, table in effects.items()
            }
            for size in sizes
        }
        best = min(sizes, key=lambda size: sum(error for _, error in found[size].values()))
        return FittedLinear(
            self.name,
            schema,
            embedding=inputs[best],
            maps={f: fitted for f, (fitted, _) in found[best].items()},
            control=control_cells(moments, schema.control),
        )


def gene_embedding(cells: CellData, n_components: int, *, most_cells: int = 20_000) -> np.ndarray:
    """Return principal axes of log1p(1e4 counts / library), shape (genes, components).

    Axes are orthonormal. There are fewer than `n_components` where cells or genes are few.

    Parameters
    ----------
    cells
        Cells to learn from.
    n_components
        Axes wanted.
    most_cells
        Cells used, chosen at random.
    """
    from sklearn.decomposition import PCA

    some = cells.random_subset(most_cells, seed=0)
    blocks = []
    for rows, counts in some.iter_rows():
        block = sparse.csr_array(counts, dtype=np.float64, copy=True)
        if cells.values == "counts":
            depth = np.repeat(some.library[rows].astype(np.float64), np.diff(block.indptr))
            block.data = np.log1p(SCALE * block.data / depth)
        blocks.append(block)
    expression = sparse.csr_array(sparse.vstack(blocks))
    size = min(n_components, min(expression.shape) - 1)
    if size < 1:
        raise DataError(f"Principal components need two cells or more, found {some.n_cells}.")
    pca = PCA(size, svd_solver="arpack", random_state=0).fit(expression)
    return np.asarray(pca.components_.T)


def perturbation_embedding(schema: Schema, axes: np.ndarray) -> np.ndarray:
    """Return the embedding of each perturbation, shape (perturbations, components + others).

    Parameters
    ----------
    schema
        Names of genes and perturbations.
    axes
        Embedding of the genes, shape (genes, components).

    Returns
    -------
    numpy.ndarray
        The row of the gene of the same name, scaled so that rows have mean square one; followed by
        a column of its own for each perturbation that has no such gene.
    """
    position = {gene: row for row, gene in enumerate(schema.genes)}
    rows = np.array([position.get(name, -1) for name in schema.perturbations])
    known = rows >= 0
    targets = np.zeros((len(rows), axes.shape[1]))
    targets[known] = axes[rows[known]]
    size = np.sqrt((targets[known] ** 2).sum(axis=1).mean()) if known.any() else 0.0
    own = np.eye(len(rows))[:, ~known]
    return np.hstack([targets / max(size, 1e-12), own])


def _ridge(
    inputs: np.ndarray, effects: np.ndarray, axes: np.ndarray, penalties: Sequence[float]
) -> tuple[_Map, float]:
    """Return the map of lowest leave-one-label-out error, and that error summed over entries."""
    from sklearn.linear_model import RidgeCV

    mean = effects.mean(axis=0)
    n_labels = len(effects)
    if n_labels < _FEWEST_LABELS:
        zeros = np.zeros((inputs.shape[1], effects.shape[1]))
        return _Map(mean, inputs.mean(axis=0), zeros), float(((effects - mean) ** 2).sum())
    scores = (effects - mean) @ axes
    model = RidgeCV(alphas=list(penalties), store_cv_results=True).fit(inputs, scores)
    # What the axes do not span is predicted by the mean of the other labels.
    rest = (effects - mean - scores @ axes.T) * n_labels / (n_labels - 1)
    errors = np.asarray(model.cv_results_).sum(axis=tuple(range(np.ndim(model.cv_results_) - 1)))
    weights = np.atleast_2d(model.coef_).T @ axes.T
    return _Map(mean, inputs.mean(axis=0), weights), float(errors.min() + (rest**2).sum())
