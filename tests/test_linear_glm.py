"""The linear map and the regression: oracles for the arithmetic, recovery on simulated counts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from anndata import AnnData
from scipy import optimize, sparse, stats

from cradle_pyro.baselines.glm import NegativeBinomialGLM
from cradle_pyro.baselines.linear import LinearRegression, gene_embedding, perturbation_embedding
from cradle_pyro.baselines.predictor import Depth
from cradle_pyro.baselines.shrinkage import posterior_moments
from cradle_pyro.baselines.simple import TrainingMean
from cradle_pyro.data import regression
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.groups import SCALE, label_groups
from cradle_pyro.data.regression import Quadratic, fit_negative_binomial, sparse_effects
from cradle_pyro.errors import DataError, QueryError
from cradle_pyro.evaluation.reference import group_effects
from cradle_pyro.types import Schema

CONTROL = "control"


def draw_counts(rng: np.random.Generator, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return rng.poisson(mean * rng.gamma(theta, 1 / theta, mean.shape)).astype(np.float32)


def make_screen(
    *,
    labels: tuple[str, ...] = (CONTROL, CONTROL, CONTROL, "A", "B", "C", "A+B"),
    n_cells: int = 60,
    n_genes: int = 120,
    interaction: float = 0.0,
    flag_effect: float = 0.0,
    batch_effect: float = 0.0,
    seed: int = 0,
) -> tuple[CellData, dict[str, np.ndarray]]:
    """Return negative-binomial cells of a sparse log-linear truth, and log-fold changes by label.

    `n_cells` of each entry of `labels`; a tenth of the genes of each perturbation changes.
    """
    rng = np.random.default_rng(seed)
    names = sorted({part for label in labels for part in label.split("+")} - {CONTROL})
    effects = {
        name: np.where(rng.random(n_genes) < 0.1, rng.normal(0, 1.2, n_genes), 0) for name in names
    }
    beyond = np.where(rng.random(n_genes) < 0.1, interaction, 0.0)
    truth = {CONTROL: np.zeros(n_genes)}
    for label in labels:
        parts = [part for part in label.split("+") if part != CONTROL]
        own = beyond if len(parts) > 1 else 0.0
        truth[label] = sum((effects[part] for part in parts), np.zeros(n_genes)) + own
    base = np.log(0.15 * rng.dirichlet(np.full(n_genes, 0.7)) + 2e-5)  # most counts are elsewhere
    of_cell = np.repeat(labels, n_cells)
    total = len(of_cell)
    batch, flag = rng.integers(0, 2, total), rng.random(total) < 0.3
    change = np.stack([truth[label] for label in of_cell])
    change += batch_effect * batch[:, None] * rng.normal(size=n_genes)
    change += flag_effect * flag[:, None] * rng.normal(size=n_genes)
    library = rng.lognormal(np.log(8000), 0.3, total)
    counts = draw_counts(rng, library[:, None] * np.exp(base + change), np.full(n_genes, 3.0))
    obs = {"perturbation": of_cell, "batch": batch.astype(str), "total": library, "low": flag}
    adata = AnnData(sparse.csr_matrix(counts), obs=obs)
    adata.var_names = [*names, *(f"G{i}" for i in range(n_genes - len(names)))]
    adata.obs_names = [f"cell{i}" for i in range(total)]
    data = CellData.from_anndata(
        adata, control=CONTROL, library_key="total", covariate_keys=["batch"],
        artifact_keys=["low"] if flag_effect else None,
        artifact="each" if flag_effect else "none",
    )  # fmt: skip
    truth["baseline"] = base
    return data, truth


def log_posterior(
    at: np.ndarray, theta: float, counts: np.ndarray, design: np.ndarray,
    library: np.ndarray, loc: np.ndarray, sd: np.ndarray,
) -> float:  # fmt: skip
    """Return the log-likelihood by scipy's pmf plus the log-prior."""
    mean = library * np.exp(design @ at)
    value = stats.nbinom.logpmf(counts, theta, theta / (theta + mean)).sum()
    return float(value - 0.5 * (((at - loc) / sd) ** 2).sum())


# ------------------------------------------------------------------------------- the regression


def test_coefficients_are_where_scipy_finds_the_greatest_posterior() -> None:
    data, _ = make_screen(n_cells=20, n_genes=8)
    dense = np.hstack([np.ones((data.n_cells, 1)), data.perturbation.toarray()])
    sd = np.array([3.0, 1.0, 1.0, 1.0])
    found = fit_negative_binomial(data, sparse.csr_array(dense), sd)
    library = data.library.astype(float)
    counts = data.rows(slice(None)).toarray()
    for gene in range(4):
        loc = np.zeros(4)
        loc[0] = np.log((counts[:, gene].sum() + 0.5) / (library.sum() + 0.5e6))
        args = (found.inverse_dispersion[gene], counts[:, gene], dense, library, loc, sd)
        best = optimize.minimize(lambda at, a=args: -log_posterior(at, *a), loc, method="BFGS")
        np.testing.assert_allclose(found.coefficients[:, gene], best.x, atol=2e-3)
        # The score at the maximum is what the prior pulls with.
        np.testing.assert_allclose(
            found.score[:, gene], (found.coefficients[:, gene] - loc) / sd**2, atol=0.05
        )


def test_information_is_that_of_every_pair_of_columns() -> None:
    data, _ = make_screen(n_cells=15, n_genes=6)
    dense = np.hstack([np.ones((data.n_cells, 1)), data.perturbation.toarray()])
    found = fit_negative_binomial(data, sparse.csr_array(dense), np.ones(4))
    mean = data.library[:, None] * np.exp(dense @ found.coefficients)
    weight = mean * found.inverse_dispersion / (found.inverse_dispersion + mean)
    expected = np.einsum("ni,ng,nj->ijg", dense, weight, dense)
    for (i, j), values in zip(found.pairs, found.information, strict=True):
        np.testing.assert_allclose(values, expected[i, j], rtol=1e-5)
    absent = {(i, j) for i in range(4) for j in range(i, 4)} - set(map(tuple, found.pairs.tolist()))
    assert all(np.allclose(expected[i, j], 0) for i, j in absent)


@pytest.mark.parametrize("true", [0.5, 3.0, 20.0])
def test_dispersion_has_the_greatest_likelihood(true: float) -> None:
    rng = np.random.default_rng(3)
    mean = np.exp(rng.normal(1, 1, (400, 1)))
    counts = draw_counts(rng, mean, np.array([true]))

    def minus(log_theta: float) -> float:
        theta = np.exp(log_theta)
        prior = 0.5 * (log_theta - np.log(4)) ** 2
        return prior - stats.nbinom.logpmf(counts, theta, theta / (theta + mean)).sum()

    best = optimize.minimize_scalar(minus, bounds=(-4, 9), method="bounded")
    found = regression._inverse_dispersion(counts, mean, np.array([1.0]), np.log(4.0), n_steps=20)
    assert np.log(found[0]) == pytest.approx(best.x, abs=1e-3)
    assert found[0] == pytest.approx(true, rel=0.5)


def quadratic_of(observed: np.ndarray, errors: np.ndarray, base_error: float) -> Quadratic:
    """Return what controls and one group of cells for each effect say of Normal observations."""
    n_effects, n_genes = observed.shape
    own = errors**-2
    first = own.sum(0) + base_error**-2
    pairs = [(0, 0), *((0, j) for j in range(1, n_effects + 1))]
    pairs += [(j, j) for j in range(1, n_effects + 1)]
    at = np.vstack([np.zeros((1, n_genes)), observed])
    information = np.vstack([first[None], own, own])
    return Quadratic(at, np.zeros_like(at), np.array(pairs), information, np.ones(n_genes))


def test_sparse_means_are_the_posterior_where_columns_are_independent() -> None:
    """With a control known exactly, each entry has its closed-form posterior mean."""
    rng = np.random.default_rng(0)
    effects = np.where(rng.random((3, 400)) < 0.1, rng.normal(0, 1, (3, 400)), 0)
    errors = rng.uniform(0.1, 0.4, (3, 400))
    observed = effects + errors * rng.normal(size=(3, 400))
    expansion = quadratic_of(observed, errors, 1e-4)
    slabs, weights = np.array([0.5, 1.0]), np.array([0.8, 0.1, 0.1])
    exact = posterior_moments(observed, errors, slabs, weights).mean
    mean, responsibility = regression._posterior_mean(
        observed[0], errors[0], np.concatenate([[0.0], slabs]), weights
    )
    np.testing.assert_allclose(mean, exact[0], atol=1e-10)
    assert responsibility.sum() == pytest.approx(1)
    found = sparse_effects(
        expansion, np.array([3.0, 1, 1, 1]), np.zeros(3, int), n_nuisance=1,
        pseudo_entries=10.0, n_sweeps=50,
    )  # fmt: skip
    np.testing.assert_allclose(found.nuisance, 0, atol=1e-3)
    error = np.sqrt(((found.mean - effects) ** 2).mean())
    assert error < 0.6 * np.sqrt(((observed - effects) ** 2).mean())
    null = effects == 0
    assert np.median(np.abs(found.mean[null])) < 0.1 * np.median(np.abs(observed[null]))


def test_without_shrinkage_the_sweeps_solve_the_normal_equations() -> None:
    """One wide slab and no spike is ridge without a penalty: the maximum of the quadratic."""
    rng = np.random.default_rng(1)
    n_columns, n_genes = 5, 7
    root = rng.normal(size=(n_genes, 12, n_columns))
    full = np.einsum("gni,gnj->gij", root, root)
    at = rng.normal(size=(n_columns, n_genes))
    pairs = np.array([(i, j) for i in range(n_columns) for j in range(i, n_columns)])
    information = np.stack([full[:, i, j] for i, j in pairs])
    expansion = Quadratic(at, np.zeros_like(at), pairs, information, np.ones(n_genes))
    reduced = regression._Reduced.of(expansion, np.full(n_columns, 1e4), 2)
    mean = np.zeros((3, n_genes))
    for _ in range(500):
        for column, residual in reduced.residuals(mean):
            mean[column] = residual / reduced.own[column]
    np.testing.assert_allclose(mean, at[2:], atol=1e-5)
    np.testing.assert_allclose(reduced.nuisance(mean), at[:2], atol=1e-4)


@cache
def large_screen(seed: int = 0) -> tuple[CellData, dict[str, np.ndarray]]:
    return make_screen(interaction=1.0, batch_effect=0.2, seed=seed)


def true_effects(truth: dict[str, np.ndarray], labels: list[str]) -> np.ndarray:
    base = np.exp(truth["baseline"])
    return np.stack(
        [
            np.log2(1 + SCALE * base * np.exp(truth[label])) - np.log2(1 + SCALE * base)
            for label in labels
        ]
    )


def rmse(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(((first - second) ** 2).mean()))


def test_effects_are_recovered_better_than_by_the_mean() -> None:
    data, truth = large_screen()
    labels = ["A", "B", "C", "A+B"]
    fitted = NegativeBinomialGLM().fit(data)
    true = true_effects(truth, labels)
    error = rmse(fitted.predict(labels), true)
    raw = rmse(TrainingMean().fit(data).predict(labels), true)
    assert error < 0.7 * raw
    assert np.corrcoef(fitted.predict(labels).ravel(), true.ravel())[0, 1] > 0.9
    assert np.median(fitted.inverse_dispersion) == pytest.approx(3, rel=0.3)


def test_interactions_are_found_where_there_are_some() -> None:
    data, truth = large_screen()
    true = true_effects(truth, ["A+B"])
    with_, without = (
        rmse(NegativeBinomialGLM(interaction_cells=n).fit(data).predict(["A+B"]), true)
        for n in (10, None)
    )
    assert with_ < 0.8 * without


def test_a_combination_never_seen_adds_up_in_logs() -> None:
    data, _ = large_screen()
    fitted = NegativeBinomialGLM().fit(data)
    assert set(fitted.interactions) == {"A+B"}
    change = fitted.effects[0] + fitted.effects[2]
    low, high = (np.log2(1 + SCALE * np.exp(fitted.baseline + c)) for c in (0, change))
    np.testing.assert_allclose(fitted.predict(["C+A"])[0], fitted.share @ (high - low), atol=1e-9)


def test_flags_have_effects_of_their_own_if_all_cells_are_used() -> None:
    data, truth = make_screen(flag_effect=1.0)
    labels = ["A", "B", "C"]
    all_cells = NegativeBinomialGLM(cells="all").fit(data)
    true = true_effects(truth, labels)
    error = rmse(all_cells.predict(labels), true)
    assert error < 0.7 * rmse(TrainingMean(cells="all").fit(data).predict(labels), true)
    assert error < 1.05 * rmse(NegativeBinomialGLM().fit(data).predict(labels), true)
    np.testing.assert_allclose(
        all_cells.share @ np.exp(all_cells.baseline), np.exp(truth["baseline"]), rtol=1, atol=2e-4
    )


def test_predictions_at_a_depth_are_means_of_generated_cells() -> None:
    data, _ = large_screen()
    fitted = NegativeBinomialGLM().fit(data)
    rng = np.random.default_rng(1)
    libraries = [rng.lognormal(7, 0.4, 40), rng.lognormal(6, 0.2, 30)]
    found = fitted.predict(["A"], Depth([libraries[0]], libraries[1]))
    means = []
    for label, library in zip(("A", CONTROL), libraries, strict=True):
        depth = np.tile(library, 800)
        counts = fitted.generate([label] * len(depth), depth, seed=2)
        means.append(np.log2(1 + SCALE * counts / depth[:, None]).mean(0))
    np.testing.assert_allclose(found[0], means[0] - means[1], atol=0.12)
    assert rmse(found[0], means[0] - means[1]) < 0.03


def test_log_normalised_values_are_no_counts() -> None:
    data, _ = make_screen(n_cells=5, n_genes=10)
    with pytest.raises(DataError, match="raw counts"):
        NegativeBinomialGLM().fit(replace(data, values="lognorm"))


# ------------------------------------------------------------------------------- the linear map


def test_gene_axes_are_those_of_the_dense_svd() -> None:
    data, _ = make_screen(n_cells=10, n_genes=30)
    values = np.log1p(SCALE * data.rows(slice(None)).toarray() / data.library[:, None])
    values = values - values.mean(0)
    _, _, right = np.linalg.svd(values, full_matrices=False)
    found = gene_embedding(data, 3)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(np.abs(found.T @ right[:3].T), np.eye(3), atol=1e-3)


def test_a_perturbation_without_gene_has_a_column_of_its_own() -> None:
    schema = Schema(genes=("G0", "A", "G1"), perturbations=("A", "X", "Y"))
    axes = np.array([[1.0, 0], [0.3, 0.4], [0, 1.0]])
    found = perturbation_embedding(schema, axes)
    np.testing.assert_allclose(found, [[0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    none = perturbation_embedding(Schema(genes=("G",), perturbations=("X", "Y")), axes[:1])
    np.testing.assert_allclose(none[:, 2:], np.eye(2))


def test_predictions_are_those_of_ridge_by_hand() -> None:
    data, _ = make_screen(n_cells=20, n_genes=40)
    penalty = 0.7
    fitted = LinearRegression(n_components=(4,), penalties=(penalty,)).fit(data)
    groups = label_groups(data)
    control = groups.pop(CONTROL)
    y = group_effects(data.counts, data.library, groups, control, functional="log_mean")
    g = gene_embedding(data, 4)
    p = perturbation_embedding(data.schema, g)
    names = data.schema.perturbations
    x = np.stack([sum(p[names.index(part)] for part in label.split("+")) for label in groups])
    centred, b = x - x.mean(0), y.mean(0)
    w = np.linalg.solve(
        centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ ((y - b) @ g)
    )
    for label in ("A", "B+C", "A+B+C"):
        own = sum(p[names.index(part)] for part in label.split("+"))
        expected = b + (own - x.mean(0)) @ w @ g.T
        np.testing.assert_allclose(fitted.predict([label])[0], expected, atol=1e-8)


def test_the_linear_map_keeps_both_functionals_apart() -> None:
    data, _ = make_screen(n_cells=20, n_genes=40)
    fitted = LinearRegression(penalties=(1e-6,)).fit(data)
    library = np.array([1000.0])
    for functional, depth in (("log_mean", None), ("mean_log", Depth([library] * 4, library))):
        groups = label_groups(data)
        control = groups.pop(CONTROL)
        y = group_effects(data.counts, data.library, groups, control, functional=functional)
        found = fitted.predict(list(groups), depth)
        np.testing.assert_allclose(found.mean(0), y.mean(0), atol=1e-6)


def test_too_few_labels_get_the_mean_effect() -> None:
    data, _ = make_screen(labels=(CONTROL, "A", "B"), n_cells=10, n_genes=20)
    found = LinearRegression().fit(data).predict(["A", "B", "A+B"])
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape))
    np.testing.assert_allclose(
        found[0], TrainingMean().fit(data).predict(["A", "B"]).mean(0), atol=1e-10
    )


@pytest.mark.parametrize("predictor", [LinearRegression(), NegativeBinomialGLM()])
def test_names_are_checked_and_order_does_not_matter(predictor) -> None:
    data, _ = make_screen(n_cells=15, n_genes=30)
    fitted = predictor.fit(data)
    np.testing.assert_array_equal(fitted.predict(["A+B"]), fitted.predict(["B+A"]))
    assert not fitted.predict([CONTROL]).any()
    assert fitted.predict([]).shape == (0, 30)
    with pytest.raises(QueryError, match="'X'"):
        fitted.predict(["A+X"])
    counts = fitted.generate(["B+A", CONTROL], np.array([1000.0, 2000.0]))
    assert counts.shape == (2, 30)
    with pytest.raises(DataError, match="'all' or 'passing'"):
        type(predictor)(cells="some").fit(data)
