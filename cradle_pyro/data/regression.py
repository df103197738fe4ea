"""Negative-binomial regression of all genes on one design, with sparse effects.

For cell n and gene g, with library l, nuisance columns c and columns of effects d:

    x_ng ~ NegativeBinomial(mean = l_n exp(c_n A_g + d_n B_g), inverse dispersion theta_g)
    B_jg ~ sum_k w_jk Normal(0, tau_k^2),    tau_0 = 0 (the spike) < tau_1 < ...

Every gene's log-likelihood is expanded to second order where it is greatest under a weak Normal
prior. Given that, each B_jg has its posterior mean under the sparse prior, column after column
until nothing moves, with the nuisance coefficients integrated out; the weights w maximise the
evidence (variational empirical Bayes).

References
----------
Kim, Wang, Carbonetto and Stephens, "A flexible empirical Bayes approach to multiple linear
regression and connections with penalized regression", JMLR 2024.
Stephens, "False discovery rates: a new deal", Biostatistics 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse, special

from cradle_pyro.data.encode import combination_labels

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData

__all__ = [
    "INTERCEPT_SD",
    "Quadratic",
    "SparseEffects",
    "combinations_of",
    "default_slab_sds",
    "fit_negative_binomial",
    "nuisance_columns",
    "regress",
    "sparse_effects",
]

INTERCEPT_SD = 3.0
"""Standard deviation of a gene's intercept around the log of its overall fraction, nats."""

_ENTRIES_AT_A_TIME = 4_000_000
_LARGEST_STEP = 2.0
_QUADRATIC_STEP = 1.0
_INVERSE_DISPERSION_RANGE = (1e-2, 1e4)
_TOLERANCE = 1e-6
_MOST_ITERATIONS = 200
_TINY = 1e-300


class SparseEffects(NamedTuple):
    """Posterior of the effects under a sparse prior.

    Parameters
    ----------
    nuisance
        Coefficients of the nuisance columns given the effects, shape (columns, genes), nats.
    mean
        Posterior means of the effects, shape (effects, genes), nats.
    observed
        What is left for each effect to explain, given the posterior means of all others: the
        effect would be this without its prior; same shape.
    error
        Standard error of `observed`, same shape.
    """

    nuisance: np.ndarray
    mean: np.ndarray
    observed: np.ndarray
    error: np.ndarray


def default_slab_sds(
    effects: np.ndarray, errors: np.ndarray, scale: np.ndarray, *, ratio: float = 2.0
) -> np.ndarray:
    """Return a geometric grid of slab standard deviations that covers the effects.

    From a quarter of the median standard error to twice the largest excess of an effect over its
    noise, as in adaptive shrinkage. Arguments as in `shrink`, `ratio` between neighbours.
    """
    unit = np.maximum(scale, 1e-2)
    lowest = max(float(np.median(errors / unit)) / 4.0, 1e-3)
    excess = np.sqrt(np.maximum(effects**2 - errors**2, 0.0)) / unit
    highest = 2.0 * float(np.quantile(excess, 0.9999))
    n_steps = max(int(np.ceil(np.log(max(highest / lowest, 1.0)) / np.log(ratio))), 1)
    return lowest * ratio ** np.arange(n_steps + 1)


class Quadratic(NamedTuple):
    """Second-order expansion of each gene's log-likelihood at its penalised maximum.

    Parameters
    ----------
    coefficients
        Where it is expanded, nuisance columns first, shape (columns, genes), nats.
    score
        Gradient there, without the prior's part, same shape.
    pairs
        Pairs of columns (smaller first) that any cell has in common, shape (pairs, 2).
    information
        Expected information of each pair, shape (pairs, genes).
    inverse_dispersion
        theta, shape (genes,).
    """

    coefficients: np.ndarray
    score: np.ndarray
    pairs: np.ndarray
    information: np.ndarray
    inverse_dispersion: np.ndarray


def fit_negative_binomial(
    cells: CellData, design: sparse.csr_array, sd: np.ndarray, *, n_nuisance: int = 1
) -> Quadratic:
    """Return each gene's regression, fitted by Fisher scoring under a Normal prior.

    Parameters
    ----------
    cells
        Cells with raw counts.
    design
        Columns of the regression, the intercept first, shape (cells, columns).
    sd
        Standard deviation of each coefficient's prior, nats, shape (columns,). That of the
        intercept is around the log of the overall fraction of the gene, others around zero.
    n_nuisance
        Columns, the first ones, that share cells with most others.

    Notes
    -----
    Coefficients and inverse dispersion are fitted in turn; the latter by maximum likelihood, with
    a log-normal prior of standard deviation one around the median of the genes. Genes are
    independent given that, and are worked on in blocks.
    """
    library = cells.library.astype(np.float64)
    counts = sparse.csc_array(cells.rows(slice(None)), dtype=np.float64)
    rows, member = _distinct_rows(design)
    pairs, products = _column_pairs(rows)
    width = max(_ENTRIES_AT_A_TIME // max(len(library), len(pairs)), 1)
    blocks = [slice(start, start + width) for start in range(0, counts.shape[1], width)]
    solver = _Solver(rows, member, pairs, products, library, 1.0 / sd**2, n_nuisance)
    typical = np.nan
    # A first pass over a few genes says what dispersions are like.
    some = np.linspace(0, counts.shape[1] - 1, min(counts.shape[1], 100)).astype(int)
    _, theta, *_ = solver.fit(counts[:, some].toarray(), typical)
    typical = float(np.median(np.log(theta)))
    found = [solver.fit(counts[:, block].toarray(), typical) for block in blocks]
    coefficients, theta, score, information = (
        np.concatenate([block[i] for block in found], axis=-1) for i in range(4)
    )
    return Quadratic(coefficients, score, pairs, information, theta)


class _Solver(NamedTuple):
    """Fisher scoring of many genes with one design."""

    rows: sparse.csr_array  # distinct rows of the design
    member: sparse.csr_array  # which cells have them, (rows, cells)
    pairs: np.ndarray
    products: sparse.csr_array  # (pairs, rows)
    library: np.ndarray
    precision: np.ndarray
    n_nuisance: int

    def fit(
        self, counts: np.ndarray, typical: float, *, n_rounds: int = 3, n_steps: int = 8
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return coefficients, inverse dispersion, score and information of a block of genes."""
        fraction = (counts.sum(axis=0) + 0.5) / (self.library.sum() + 0.5 / 1e-6)
        start = np.zeros((self.rows.shape[1], counts.shape[1]))
        start[0] = np.log(fraction)
        coefficients = start.copy()
        theta = np.full(counts.shape[1], 2.0 if np.isnan(typical) else np.exp(typical))
        for _ in range(n_rounds):
            for _ in range(n_steps):
                mean = self._mean(coefficients)
                score, information = self._derivatives(counts, mean, theta)
                gradient = score - self.precision[:, None] * (coefficients - start)
                step = self._solve(information, gradient)
                largest = np.abs(step).max(axis=0)
                coefficients += step * np.minimum(1.0, _LARGEST_STEP / np.maximum(largest, 1e-12))
                if largest.max() < 1e-3:
                    break
            theta = _inverse_dispersion(counts, self._mean(coefficients), theta, typical)
        score, information = self._derivatives(counts, self._mean(coefficients), theta)
        return coefficients, theta, score, information

    def _mean(self, coefficients: np.ndarray) -> np.ndarray:
        log_rate = self.rows @ coefficients
        np.clip(log_rate, -40.0, 2.0, out=log_rate)
        return np.asarray(self.member.T @ np.exp(log_rate)) * self.library[:, None]

    def _derivatives(
        self, counts: np.ndarray, mean: np.ndarray, theta: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        shrink = theta / (theta + mean)
        score = self.rows.T @ (self.member @ ((counts - mean) * shrink))
        return score, self.products @ (self.member @ (mean * shrink))

    def _solve(self, information: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Return the step of every gene, (columns, genes), by preconditioned conjugate gradients.

        Effects of different perturbations meet in cells that carry both, and through the nuisance
        coefficients, the first columns. The preconditioner has the latter exactly and the former
        by a bound, so that screens of single perturbations need no iteration. Nothing is ever
        (columns, columns).
        """
        arrow = _Arrow.of(self.pairs, information, self.precision, self.n_nuisance)
        step = arrow.solve(gradient)
        if not len(arrow.beyond):
            return step
        residual = gradient - arrow.times(step)
        direction = preconditioned = arrow.solve(residual)
        product = (residual * preconditioned).sum(axis=0)
        least = _TOLERANCE**2 * (gradient * step).sum(axis=0)
        for _ in range(_MOST_ITERATIONS):
            if (product <= least).all():
                break
            curved = arrow.times(direction)
            length = product / np.maximum((direction * curved).sum(axis=0), _TINY)
            step = step + length * direction
            residual = residual - length * curved
            preconditioned = arrow.solve(residual)
            before, product = product, (residual * preconditioned).sum(axis=0)
            direction = preconditioned + product / np.maximum(before, _TINY) * direction
        return step


class _Arrow(NamedTuple):
    """Information and prior precision of every gene, by blocks; symmetric, positive definite."""

    nuisance: np.ndarray  # (genes, nuisance, nuisance)
    cross: np.ndarray  # (nuisance, effects, genes)
    diagonal: np.ndarray  # (effects, genes)
    bound: np.ndarray  # the diagonal and what is beyond it, (effects, genes)
    beyond: np.ndarray  # information of pairs of different effects, (pairs, genes)
    first: sparse.csr_array  # (effects, pairs)
    second: sparse.csr_array
    schur: np.ndarray  # inverse of what effects leave of `nuisance`, (genes, nuisance, nuisance)

    @classmethod
    def of(
        cls, pairs: np.ndarray, information: np.ndarray, precision: np.ndarray, n_nuisance: int
    ) -> _Arrow:
        n_columns, n_genes = len(precision), information.shape[1]
        n_effects = n_columns - n_nuisance
        first, second = pairs.T
        within = second < n_nuisance
        nuisance = np.zeros((n_genes, n_nuisance, n_nuisance))
        nuisance[:, first[within], second[within]] = information[within].T
        nuisance[:, second[within], first[within]] = information[within].T
        nuisance[:, np.arange(n_nuisance), np.arange(n_nuisance)] += precision[:n_nuisance]
        across = (first < n_nuisance) & ~within
        cross = np.zeros((n_nuisance, n_effects, n_genes))
        cross[first[across], second[across] - n_nuisance] = information[across]
        own = (first == second) & ~within
        diagonal = np.zeros((n_effects, n_genes))
        diagonal[second[own] - n_nuisance] = information[own]
        diagonal += precision[n_nuisance:, None]
        rest = (first != second) & (first >= n_nuisance)
        at = [
            sparse.csr_array(
                (np.ones(rest.sum()), (which[rest] - n_nuisance, np.arange(rest.sum()))),
                shape=(n_effects, rest.sum()),
            )
            for which in (first, second)
        ]
        beyond = information[rest]
        # With this in place of `beyond` the matrix is no smaller (the difference is diagonally
        # dominant), and so positive definite.
        bound = diagonal + at[0] @ np.abs(beyond) + at[1] @ np.abs(beyond)
        schur = np.linalg.inv(nuisance - np.einsum("ieg,jeg->gij", cross / bound, cross))
        return cls(nuisance, cross, diagonal, bound, beyond, at[0], at[1], schur)

    def times(self, values: np.ndarray) -> np.ndarray:
        """Return the matrix times values, both (columns, genes)."""
        n_nuisance = len(self.cross)
        nuisance, effects = values[:n_nuisance], values[n_nuisance:]
        top = np.einsum("gij,jg->ig", self.nuisance, nuisance)
        top += np.einsum("ieg,eg->ig", self.cross, effects)
        bottom = self.diagonal * effects + np.einsum("ieg,ig->eg", self.cross, nuisance)
        bottom += self.first @ (self.beyond * (self.second.T @ effects))
        bottom += self.second @ (self.beyond * (self.first.T @ effects))
        return np.concatenate([top, bottom])

    def solve(self, values: np.ndarray) -> np.ndarray:
        """Return the preconditioner times values: the inverse with `bound` in place of `beyond`."""
        n_nuisance = len(self.cross)
        nuisance, effects = values[:n_nuisance], values[n_nuisance:] / self.bound
        top = np.einsum(
            "gij,jg->ig", self.schur, nuisance - np.einsum("ieg,eg->ig", self.cross, effects)
        )
        bottom = effects - np.einsum("ieg,ig->eg", self.cross, top) / self.bound
        return np.concatenate([top, bottom])


def _distinct_rows(design: sparse.csr_array) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Return the distinct rows of a design, and which cells have them, shape (rows, cells)."""
    n_cells = design.shape[0]
    design.sort_indices()
    keys = [
        (design.indices[a:b].tobytes(), design.data[a:b].tobytes())
        for a, b in zip(design.indptr[:-1], design.indptr[1:], strict=True)
    ]
    position: dict[tuple[bytes, bytes], int] = {}
    inverse = np.array([position.setdefault(key, len(position)) for key in keys])
    first = np.full(len(position), n_cells)
    np.minimum.at(first, inverse, np.arange(n_cells))
    ones = np.ones(n_cells)
    member = sparse.csr_array((ones, (inverse, np.arange(n_cells))), (len(position), n_cells))
    return design[first], member


def _column_pairs(rows: sparse.csr_array) -> tuple[np.ndarray, sparse.csr_array]:
    """Return pairs of columns that stand in one row, and their products, (pairs, rows)."""
    n_rows, n_columns = rows.shape
    sizes = np.diff(rows.indptr)
    of_row = np.repeat(np.arange(n_rows), sizes)
    left = np.repeat(np.arange(rows.nnz), sizes[of_row])
    within = np.arange(len(left)) - np.repeat(
        np.cumsum(sizes[of_row]) - sizes[of_row], sizes[of_row]
    )
    right = rows.indptr[of_row[left]] + within
    kept = rows.indices[left] <= rows.indices[right]
    left, right = left[kept], right[kept]
    codes = rows.indices[left].astype(np.int64) * n_columns + rows.indices[right]
    codes = np.concatenate([codes, np.arange(n_columns, dtype=np.int64) * (n_columns + 1)])
    values = np.concatenate([rows.data[left] * rows.data[right], np.zeros(n_columns)])
    at = np.concatenate([of_row[left], np.zeros(n_columns, dtype=np.int64)])
    names, inverse = np.unique(codes, return_inverse=True)
    products = sparse.csr_array((values, (inverse, at)), (len(names), n_rows))
    return np.stack(np.divmod(names, n_columns), axis=1), products


def _inverse_dispersion(
    counts: np.ndarray, mean: np.ndarray, start: np.ndarray, typical: float, *, n_steps: int = 6
) -> np.ndarray:
    """Return the inverse dispersion of greatest likelihood under a log-normal prior, (genes,)."""
    cell, gene = np.nonzero(counts)
    positive, at = counts[cell, gene], mean[cell, gene]
    n_genes = counts.shape[1]
    # Polygamma functions are slow: once for each different count of a gene.
    most = int(positive.max(initial=0.0)) + 1
    codes, times = np.unique(gene * most + positive.astype(np.int64), return_counts=True)
    of_gene, value = np.divmod(codes, most)

    def total(order: int, theta: np.ndarray) -> np.ndarray:
        own = theta[of_gene]
        change = special.polygamma(order, value + own) - special.polygamma(order, own)
        return np.bincount(of_gene, times * change, minlength=n_genes)

    low, high = np.log(_INVERSE_DISPERSION_RANGE)
    log_theta = np.log(start)
    weight = 0.0 if np.isnan(typical) else 1.0
    for _ in range(n_steps):
        theta = np.exp(log_theta)
        ratio = mean / theta
        share = ratio / (1 + ratio)
        left = theta[gene] + at
        first = total(0, theta) + (share - np.log1p(ratio)).sum(axis=0)
        first -= np.bincount(gene, positive / left, minlength=n_genes)
        second = total(1, theta) + (share**2).sum(axis=0) / theta
        second += np.bincount(gene, positive / left**2, minlength=n_genes)
        gradient = theta * first - weight * (log_theta - np.nan_to_num(typical))
        curvature = theta * first + theta**2 * second - weight
        # Where it is not concave, a step along the gradient.
        step = np.where(curvature < -1e-8, -gradient / np.minimum(curvature, -1e-8), gradient)
        log_theta = np.clip(log_theta + np.clip(step, -1.0, 1.0), low, high)
    return np.exp(log_theta)


def sparse_effects(
    expansion: Quadratic,
    sd: np.ndarray,
    kinds: np.ndarray,
    *,
    n_nuisance: int,
    pseudo_entries: float,
    n_sweeps: int,
) -> SparseEffects:
    """Return the effects' posterior under a spike-and-slab prior with weights of each column.

    Parameters
    ----------
    expansion
        Of the log-likelihoods.
    sd
        Standard deviations of the weak prior; of the nuisance columns it stays in force.
    kinds
        Which columns share pooled weights, shape (columns - n_nuisance,).
    n_nuisance
        Columns without a sparse prior, which come first.
    pseudo_entries, n_sweeps
        Strength of the pooled mixture weights in each column's own weights, in genes; most rounds
        over the columns.
    """
    quadratic = _Reduced.of(expansion, sd, n_nuisance)
    if not len(kinds):
        none = quadratic.target
        return SparseEffects(quadratic.nuisance(none), none, none, none)
    mean = np.zeros_like(quadratic.target)
    errors = quadratic.own**-0.5
    slabs = default_slab_sds(quadratic.observed(), errors, np.ones_like(errors))
    sds = np.concatenate([[0.0], slabs])
    pooled = np.full((kinds.max() + 1, len(sds)), 1.0 / len(sds))
    weights = pooled[kinds]
    responsibility = np.empty_like(weights)
    for sweep in range(n_sweeps):
        before = mean.copy()
        for column, residual in quadratic.residuals(mean):
            mean[column], responsibility[column] = _posterior_mean(
                quadratic.observed(column, residual), errors[column], sds, weights[column]
            )
        n_genes = mean.shape[1]
        pooled = np.stack([responsibility[kinds == kind].mean(axis=0) for kind in np.unique(kinds)])
        pooled /= pooled.sum(axis=1, keepdims=True)
        total = (
            responsibility * n_genes
            + pseudo_entries * pooled[np.unique(kinds, return_inverse=True)[1]]
        )
        weights = total / total.sum(axis=1, keepdims=True)
        if sweep > 2 and np.abs(mean - before).max() < 1e-3:
            break
    observed = np.empty_like(mean)
    for column, residual in quadratic.residuals(mean):
        observed[column] = quadratic.observed(column, residual)
    return SparseEffects(quadratic.nuisance(mean), mean, observed, errors)


def _posterior_mean(
    observed: np.ndarray, error: np.ndarray, sds: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return posterior means of one column's effects, and the mean responsibilities."""
    variance = error**2 + sds[:, None] ** 2
    density = -0.5 * (np.log(variance) + observed**2 / variance)
    joint = weights[:, None] * np.exp(density - density.max(axis=0))
    joint /= joint.sum(axis=0)
    gain = sds[:, None] ** 2 / variance
    return (joint * gain).sum(axis=0) * observed, joint.mean(axis=1)


class _Reduced(NamedTuple):
    """The expansion as a quadratic in the effects, nuisance coefficients integrated out."""

    target: np.ndarray  # (effects, genes)
    own: np.ndarray  # information on each effect given the others, (effects, genes)
    others: list[list[tuple[int, np.ndarray]]]  # off-diagonal information before reduction
    cross: np.ndarray  # (genes, nuisance, effects)
    inverse: np.ndarray  # of the nuisance information, (genes, nuisance, nuisance)
    potential: np.ndarray  # (genes, nuisance)
    expanded: np.ndarray  # where the effects are expanded, (effects, genes)

    @classmethod
    def of(cls, expansion: Quadratic, sd: np.ndarray, n_nuisance: int) -> _Reduced:
        n_columns, n_genes = expansion.coefficients.shape
        potential = expansion.score.copy()
        full = np.zeros((n_genes, n_nuisance, n_columns))
        others: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(n_columns - n_nuisance)]
        diagonal = np.zeros((n_columns - n_nuisance, n_genes))
        for (i, j), values in zip(expansion.pairs.tolist(), expansion.information, strict=True):
            potential[i] += values * expansion.coefficients[j]
            if i != j:
                potential[j] += values * expansion.coefficients[i]
            if i < n_nuisance:
                full[:, i, j] = values
                if j < n_nuisance:
                    full[:, j, i] = values
            elif i == j:
                diagonal[i - n_nuisance] = values
            else:
                others[i - n_nuisance].append((j - n_nuisance, values))
                others[j - n_nuisance].append((i - n_nuisance, values))
        precision = 1.0 / sd[:n_nuisance] ** 2
        start = np.zeros((n_nuisance, n_genes))
        start[0] = expansion.coefficients[0]
        nuisance = full[:, :, :n_nuisance] + np.diag(precision)
        inverse = np.linalg.inv(nuisance)
        cross = np.ascontiguousarray(full[:, :, n_nuisance:])
        own_potential = (potential[:n_nuisance] + precision[:, None] * start).T
        explained = np.einsum("gij,gje->gie", inverse, cross)
        own = diagonal - np.einsum("gie,gie->eg", cross, explained)
        own = np.maximum(own, 1e-8 * diagonal + 1e-10)
        target = potential[n_nuisance:] - np.einsum("gi,gie->eg", own_potential, explained)
        expanded = expansion.coefficients[n_nuisance:]
        return cls(target, own, others, cross, inverse, own_potential, expanded)

    def observed(
        self, column: int | slice = slice(None), residual: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the effect that would explain a residual (the whole target if omitted) by itself.

        Upwards the information grows with the mean, so that a quadratic goes much too far where
        few counts are known: from one nat on, steps are as those of a Poisson likelihood.
        """
        left = self.target[column] if residual is None else residual
        step = left / self.own[column] - self.expanded[column]
        steps = np.maximum(step / _QUADRATIC_STEP, 1.0)
        upwards = _QUADRATIC_STEP * (1.0 + np.log(steps))
        return self.expanded[column] + np.where(step > _QUADRATIC_STEP, upwards, step)

    def residuals(self, mean: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each column with what is left for it to explain; `mean` may change in between."""
        carried = np.einsum("gie,eg->gi", self.cross, mean)
        for column in range(len(mean)):
            here = self.cross[:, :, column]
            away = carried - here * mean[column][:, None]
            residual = self.target[column] + np.einsum("gi,gij,gj->g", here, self.inverse, away)
            for other, values in self.others[column]:
                residual -= values * mean[other]
            yield column, residual
            carried = away + here * mean[column][:, None]

    def nuisance(self, mean: np.ndarray) -> np.ndarray:
        """Return the nuisance coefficients given the effects, shape (nuisance, genes)."""
        left = self.potential - np.einsum("gie,eg->gi", self.cross, mean)
        return np.einsum("gij,gj->ig", self.inverse, left)


def nuisance_columns(cells: CellData, *, flags: bool) -> np.ndarray:
    """Return intercept, levels of covariates, and flags; shape (cells, columns)."""
    parts = [np.ones((cells.n_cells, 1))]
    for column, (_, levels) in enumerate(cells.schema.covariates):
        parts.append(np.eye(len(levels))[cells.covariates[:, column]])
    if flags:
        parts.append(cells.artifact.astype(np.float64))
    return np.hstack(parts)


def combinations_of(cells: CellData, least: int | None) -> np.ndarray:
    """Return the members of each label of several perturbations that has enough cells.

    Parameters
    ----------
    cells
        Cells.
    least
        Fewest cells of a label; None: no combination is named.

    Returns
    -------
    numpy.ndarray
        0 or 1, shape (combinations, perturbations), sorted by label.
    """
    design = sparse.csr_array(cells.perturbation) > 0
    carried = np.asarray(design.sum(1)).ravel()
    _, first, counts = np.unique(cells.labels, return_index=True, return_counts=True)
    kept = (carried[first] > 1) & (counts >= (least or np.inf))
    return design[first[kept]].toarray()


def regress(
    cells: CellData,
    members: np.ndarray,
    *,
    flags: bool = False,
    effect_sd: float = 1.0,
    pseudo_entries: float = 10.0,
    n_sweeps: int = 50,
) -> tuple[SparseEffects, Quadratic]:
    """Return the effects of perturbations, then of combinations, and the expansion behind them.

    Parameters
    ----------
    cells
        Cells with raw counts, controls among them.
    members
        Members of the combinations that have an effect of their own, see `combinations_of`. They
        share pooled weights among themselves.
    flags
        Have an effect of each artifact flag, too.
    effect_sd
        Standard deviation of the weak Normal prior under which the likelihood is expanded, nats.
    pseudo_entries, n_sweeps
        As in `sparse_effects`.
    """
    nuisance = nuisance_columns(cells, flags=flags)
    exact = cells.labels[:, None] == combination_labels(members, cells.schema)
    parts = (nuisance, cells.perturbation, exact)
    design = sparse.csr_array(
        sparse.hstack([sparse.csr_array(part, dtype=np.float64) for part in parts])
    )
    sd = np.full(design.shape[1], effect_sd)
    sd[0] = INTERCEPT_SD
    expansion = fit_negative_binomial(cells, design, sd, n_nuisance=nuisance.shape[1])
    found = sparse_effects(
        expansion,
        sd,
        np.repeat([0, 1], [cells.schema.n_perturbations, len(members)]),
        n_nuisance=nuisance.shape[1],
        pseudo_entries=pseudo_entries,
        n_sweeps=n_sweeps,
    )
    return found, expansion
