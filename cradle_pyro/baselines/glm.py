"""A negative-binomial generalised linear model with sparse effects.

For cell n and gene g, with library l, nuisance columns c (intercept, covariates, artifact flags)
and design columns d (perturbations, then combinations):

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse, special, stats

from cradle_pyro.baselines.predictor import Depth
from cradle_pyro.baselines.shrinkage import default_slab_sds
from cradle_pyro.baselines.simple import Cells, training_cells
from cradle_pyro.data.groups import SCALE, log2_fraction
from cradle_pyro.errors import DataError
from cradle_pyro.queries.interventions import label_design

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.types import Schema

__all__ = [
    "FittedGLM",
    "NegativeBinomialGLM",
    "fit_negative_binomial",
    "mean_log2_expression",
]

_ENTRIES_AT_A_TIME = 4_000_000
_LARGEST_STEP = 2.0
_INVERSE_DISPERSION_RANGE = (1e-2, 1e4)
_INTERCEPT_SD = 3.0
_MOST_SUMMED = 4000
_MIDPOINTS = 256
_LIBRARIES = 32


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
        nuisance = _nuisance(train, flags=self.cells == "all")
        combinations = _combinations(train, self.interaction_cells)
        kinds = np.repeat([0, 1], [schema.n_perturbations, len(combinations)])
        design = sparse.csr_array(
            sparse.hstack(
                [
                    sparse.csr_array(nuisance),
                    sparse.csr_array(train.perturbation, dtype=np.float64),
                    sparse.csr_array(train.labels[:, None] == np.array(combinations, dtype=str))
                    if combinations
                    else sparse.csr_array((train.n_cells, 0)),
                ]
            )
        )
        sd = np.full(design.shape[1], self.effect_sd)
        sd[0] = _INTERCEPT_SD
        expansion = fit_negative_binomial(train, design, sd)
        at, effects = _sparse_effects(
            expansion, sd, kinds,
            n_nuisance=nuisance.shape[1],
            pseudo_entries=self.pseudo_entries,
            n_sweeps=self.n_sweeps,
        )  # fmt: skip
        # Of the control cells' nuisance columns, flags are set to zero: they come last.
        levels = nuisance[is_control][:, : 1 + schema.n_covariate_levels]
        kinds_of_control, counts = np.unique(levels, axis=0, return_counts=True)
        return FittedGLM(
            self.name,
            schema,
            baseline=kinds_of_control @ at[: levels.shape[1]],
            share=counts / counts.sum(),
            effects=effects[: schema.n_perturbations],
            interactions=dict(zip(combinations, effects[schema.n_perturbations :], strict=True)),
            inverse_dispersion=expansion.inverse_dispersion,
        )


def fit_negative_binomial(cells: CellData, design: sparse.csr_array, sd: np.ndarray) -> Quadratic:
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
    width = max(min(_ENTRIES_AT_A_TIME // len(library), 40_000_000 // design.shape[1] ** 2), 1)
    blocks = [slice(start, start + width) for start in range(0, counts.shape[1], width)]
    solver = _Solver(rows, member, pairs, products, library, 1.0 / sd**2)
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
        n_columns, n_genes = gradient.shape
        matrix = np.zeros((n_genes, n_columns, n_columns))
        first, second = self.pairs.T
        matrix[:, first, second] = information.T
        matrix[:, second, first] = information.T
        matrix[:, np.arange(n_columns), np.arange(n_columns)] += self.precision
        return np.linalg.solve(matrix, gradient.T[..., None])[..., 0].T


def _nuisance(cells: CellData, *, flags: bool) -> np.ndarray:
    """Return intercept, levels of covariates, and flags; shape (cells, columns)."""
    parts = [np.ones((cells.n_cells, 1))]
    for column, (_, levels) in enumerate(cells.schema.covariates):
        parts.append(np.eye(len(levels))[cells.covariates[:, column]])
    if flags:
        parts.append(cells.artifact.astype(np.float64))
    return np.hstack(parts)


def _combinations(cells: CellData, least: int | None) -> list[str]:
    """Return labels of several perturbations that have enough cells."""
    if least is None:
        return []
    several = np.asarray((cells.perturbation > 0).sum(axis=1)).ravel() > 1
    names, counts = np.unique(cells.labels[several].astype(str), return_counts=True)
    return [str(name) for name in names[counts >= least]]


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
    positive = counts[cell, gene]
    low, high = np.log(_INVERSE_DISPERSION_RANGE)
    log_theta = np.log(start)
    n_genes = counts.shape[1]
    weight = 0.0 if np.isnan(typical) else 1.0
    for _ in range(n_steps):
        theta = np.exp(log_theta)
        own = theta[gene]
        ratio = mean / theta
        first = np.bincount(
            gene, special.digamma(positive + own) - special.digamma(own), minlength=n_genes
        )
        first += (ratio / (1 + ratio) - np.log1p(ratio)).sum(axis=0)
        first -= np.bincount(gene, positive / (own + mean[cell, gene]), minlength=n_genes)
        second = np.bincount(
            gene,
            special.polygamma(1, positive + own) - special.polygamma(1, own),
            minlength=n_genes,
        )
        second += (ratio**2 / (theta * (1 + ratio) ** 2)).sum(axis=0)
        second += np.bincount(gene, positive / (own + mean[cell, gene]) ** 2, minlength=n_genes)
        gradient = theta * first - (weight * (log_theta - np.nan_to_num(typical)))
        curvature = theta * first + theta**2 * second - weight
        # Where it is not concave, a step along the gradient.
        step = np.where(curvature < -1e-8, -gradient / np.minimum(curvature, -1e-8), gradient)
        log_theta = np.clip(log_theta + np.clip(step, -1.0, 1.0), low, high)
    return np.exp(log_theta)


def _sparse_effects(
    expansion: Quadratic,
    sd: np.ndarray,
    kinds: np.ndarray,
    *,
    n_nuisance: int,
    pseudo_entries: float,
    n_sweeps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return nuisance coefficients and posterior means of effects, (columns, genes) each.

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
        As in `NegativeBinomialGLM`.
    """
    quadratic = _Reduced.of(expansion, sd, n_nuisance)
    if not len(kinds):
        return quadratic.nuisance(np.zeros((0, sd.size))), np.zeros((0, len(sd)))
    mean = np.zeros_like(quadratic.target)
    errors = quadratic.own**-0.5
    slabs = default_slab_sds(quadratic.target / quadratic.own, errors, np.ones_like(errors))
    sds = np.concatenate([[0.0], slabs])
    pooled = np.full((kinds.max() + 1, len(sds)), 1.0 / len(sds))
    weights = pooled[kinds]
    responsibility = np.empty_like(weights)
    for sweep in range(n_sweeps):
        before = mean.copy()
        for column, residual in quadratic.residuals(mean):
            mean[column], responsibility[column] = _posterior_mean(
                residual / quadratic.own[column], errors[column], sds, weights[column]
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
    return quadratic.nuisance(mean), mean


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
        return cls(target, own, others, cross, inverse, own_potential)

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


def mean_log2_expression(
    rate: np.ndarray, inverse_dispersion: np.ndarray, library: np.ndarray
) -> np.ndarray:
    """Return the mean over cells of E log2(1 + 1e4 x / l) for negative-binomial x, (genes,).

    Parameters
    ----------
    rate
        Expected fraction of each gene, shape (genes,).
    inverse_dispersion
        theta, shape (genes,).
    library
        Libraries l of the cells, in counts, shape (cells,). More than 32 are stood in for by as
        many quantiles.

    Notes
    -----
    A sum over the probability of each count. Where these would be too many (over 4,000), an average
    over quantiles of the gamma part, with a second-order correction for the Poisson part.
    """
    depth = np.asarray(library, dtype=np.float64)
    if len(depth) > _LIBRARIES:
        depth = np.quantile(depth, (np.arange(_LIBRARIES) + 0.5) / _LIBRARIES)
    mean = depth[:, None] * rate
    scale = np.broadcast_to(SCALE / depth[:, None], mean.shape)
    theta = np.broadcast_to(inverse_dispersion, mean.shape)
    result = np.empty(mean.shape)
    large = _last_count(mean, theta) > _MOST_SUMMED
    result[~large] = _summed(mean[~large], theta[~large], scale[~large])
    result[large] = _by_quantiles(mean[large], theta[large], scale[large])
    return result.mean(axis=0)


def _summed(mean: np.ndarray, theta: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return E log2(1 + scale x) by the sum over counts, entry by entry."""
    last = _last_count(mean, theta)
    order = np.argsort(-last)
    mean, theta, scale, last = mean[order], theta[order], scale[order], last[order]
    odds = mean / (mean + theta)
    probability = np.exp(-theta * np.log1p(mean / theta))
    total = np.zeros(len(mean))
    x, active = 0, len(mean)
    while active:
        x += 1
        active = int(np.searchsorted(-last[:active], -x, side="right"))
        part = slice(0, active)
        probability = probability[part] * odds[part] * ((x - 1 + theta[part]) / x)
        total[part] += probability * np.log2(1.0 + scale[part] * x)
    result = np.empty_like(total)
    result[order] = total
    return result


def _last_count(mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Return a count that is exceeded with a probability below about 1e-8 (sub-gamma tail)."""
    spread = np.sqrt(mean + mean**2 / theta)
    return np.ceil(mean + 6.0 * spread + 18.0 * (1.0 + mean / theta))


def _by_quantiles(mean: np.ndarray, theta: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return E log2(1 + scale x) over midpoints of the gamma part, entry by entry."""
    at = (np.arange(_MIDPOINTS) + 0.5) / _MIDPOINTS
    names, inverse = np.unique(theta, return_inverse=True)
    gamma = stats.gamma.ppf(at, names[:, None]) / names[:, None]
    level = mean[:, None] * gamma[inverse]
    bent = 1.0 + scale[:, None] * level
    correction = 0.5 * scale[:, None] ** 2 * level / bent**2
    return (np.log2(bent) - correction / np.log(2.0)).mean(axis=1)
