"""The regression of counts on the design: against an optimiser, and over many screens."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, sparse, stats
from test_statistics import LABELS, make_cells, make_screen

from cradle_pyro.data import regression, statistics
from cradle_pyro.data.regression import (
    INTERCEPT_SD,
    fit_negative_binomial,
    regress,
    sparse_effects,
)
from cradle_pyro.data.statistics import raw_effects, regression_effects, training_statistics


def design_of(labels, *, combinations=True):
    columns = [np.ones(len(labels)), *(np.isin(labels, [k, "A+B"]) for k in ("A", "B"))]
    columns += [labels == "A+B"] if combinations else []
    return sparse.csr_array(np.stack(columns, axis=1), dtype=np.float64)


def draw_cells(rng, effects, *, n=80, theta=3.0):
    """Counts of four labels; `effects` of A, B and A+B beyond their sum, (3, genes), nats."""
    labels = np.repeat(LABELS, n)
    library = rng.lognormal(7, 0.3, len(labels))
    base = np.linspace(0.1, 0.3, effects.shape[1]) / effects.shape[1]
    design = design_of(labels).toarray()[:, 1:]
    mean = library[:, None] * base * np.exp(design @ effects)
    counts = rng.poisson(rng.gamma(theta, mean / theta))
    counts[:, 0] += counts.sum(1) == 0
    return make_cells(counts, labels, library=library), labels


def test_coefficients_are_those_of_an_optimiser():
    rng = np.random.default_rng(0)
    cells, labels = draw_cells(rng, np.array([[0.5, 0, -1], [0, 1, 0.3], [0, 0, 0.4]]))
    design, sd = design_of(labels), np.array([INTERCEPT_SD, 1, 1, 1])
    found = fit_negative_binomial(cells, design, sd)
    counts, library = cells.rows(slice(None)).toarray(), cells.library.astype(np.float64)
    for gene in range(3):
        theta = found.inverse_dispersion[gene]
        start = np.zeros(4)
        start[0] = np.log((counts[:, gene].sum() + 0.5) / (library.sum() + 0.5 / 1e-6))

        def loss(beta, gene=gene, theta=theta, start=start):
            mean = library * np.exp(design @ beta)
            log_prob = stats.nbinom.logpmf(counts[:, gene], theta, theta / (theta + mean))
            return -log_prob.sum() + 0.5 * (((beta - start) / sd) ** 2).sum()

        best = optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-6}).x
        np.testing.assert_allclose(found.coefficients[:, gene], best, atol=2e-3)
        assert 1.5 < theta < 6  # three is right


@pytest.mark.parametrize("carried", [1, 2, 6])
def test_steps_solve_the_system_whatever_cells_carry(carried):
    """Against the matrix written out, for cells of one to six of eight perturbations."""
    rng = np.random.default_rng(carried)
    n_cells, n_effects, n_genes = 200, 8, 3
    design = np.zeros((n_cells, 3 + n_effects))
    design[:, 0], design[:, 1], design[:, 2] = 1, np.arange(n_cells) % 2, rng.random(n_cells)
    for cell in range(20, n_cells):
        chosen = rng.choice(n_effects, carried, replace=False)
        design[cell, 3 + chosen] = rng.choice([0.5, 1.0], carried)
    rows, member = regression._distinct_rows(sparse.csr_array(design))
    pairs, products = regression._column_pairs(rows)
    precision = rng.gamma(2.0, size=design.shape[1])
    solver = regression._Solver(rows, member, pairs, products, np.ones(n_cells), precision, 3)
    weight = rng.gamma(2.0, size=(n_cells, n_genes))
    gradient = rng.normal(size=(design.shape[1], n_genes))
    found = solver._solve(products @ (member @ weight), gradient)
    for gene in range(n_genes):
        matrix = design.T @ (weight[:, gene, None] * design) + np.diag(precision)
        expected = np.linalg.solve(matrix, gradient[:, gene])
        np.testing.assert_allclose(found[:, gene], expected, rtol=1e-4, atol=1e-6)


def test_a_sparse_prior_shrinks_what_is_noise_and_leaves_what_is_clear():
    rng = np.random.default_rng(1)
    truth = np.zeros((3, 300))
    truth[0, :10], truth[1, 5:15] = rng.choice([-1.2, 1.2], (2, 10))
    cells, labels = draw_cells(rng, truth)
    sd = np.array([INTERCEPT_SD, 1, 1, 1])
    expansion = fit_negative_binomial(cells, design_of(labels), sd)
    found = sparse_effects(
        expansion, sd, np.array([0, 0, 1]), n_nuisance=1, pseudo_entries=10.0, n_sweeps=50
    )
    plain = expansion.coefficients[1:]
    assert np.sqrt(((found.mean - truth) ** 2).mean()) < 0.5 * np.sqrt(
        ((plain - truth) ** 2).mean()
    )
    acted = truth != 0
    assert np.abs(found.mean - found.observed)[acted].mean() < 0.2
    assert np.abs(found.mean[~acted]).mean() < 0.3 * np.abs(found.observed[~acted]).mean()


def test_observations_and_errors_are_right_over_screens():
    truth = np.array([[0.6, 0.0, 0.0, -0.8], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.7, 0.0]])
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        data, _ = draw_cells(rng, np.pad(truth, ((0, 0), (0, 36))), n=40)
        found.append(regression_effects(data, training_statistics(data, interaction_cells=10)))
    loc = np.stack([effect.loc.numpy() for effect in found])
    error = np.stack([effect.error.numpy() for effect in found])
    # Given the posterior means of the others, an observation is as good as if they were known.
    spread = np.sqrt(((loc[:, :, 4:] - 0) ** 2).mean((0, 2)))
    np.testing.assert_allclose(error[:, :, 4:].mean((0, 2)), spread, rtol=0.2)
    at = np.abs(truth) > 0
    np.testing.assert_allclose(loc[:, :, :4].mean(0)[at], truth[at], atol=0.1)


def test_effects_estimated_together_are_nearer_to_the_truth_than_raw_ones():
    errors = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth = rng.normal(0, 1, (3, 100)) * (rng.random((3, 100)) < 0.1)
        data, _ = draw_cells(rng, truth, n=25)
        of_data = training_statistics(data, interaction_cells=10)
        both = regression_effects(data, of_data).loc.numpy(), raw_effects(data, of_data).loc.numpy()
        errors.append([((loc - truth) ** 2).mean() for loc in both])
    together, raw = np.mean(errors, axis=0)
    assert together < 0.8 * raw


def test_failing_cells_are_used_with_an_effect_of_their_flags():
    truth = np.zeros((3, 60))
    truth[0, :6], truth[1, 3:9] = 1.0, -1.0
    with_flags, without = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        data, labels = draw_cells(rng, truth, n=40)
        # Half of the cells of A fail, and failing triples the last ten genes.
        failing = (labels == "A") & (np.arange(len(labels)) % 2 == 0)
        counts = data.rows(slice(None)).toarray()
        counts[np.ix_(failing, np.arange(50, 60))] *= 3
        for flags, found in ((failing, with_flags), (np.zeros_like(failing), without)):
            cells = make_cells(counts, labels, failing=flags, library=data.library)
            loc = regression_effects(cells, training_statistics(cells, interaction_cells=10)).loc
            found.append(loc[0, 50:].mean())
    # What the flag explains is not put down to the perturbation.
    assert abs(np.mean(with_flags)) < 0.15 < 0.5 < np.mean(without)


@pytest.mark.parametrize(("n_carriers", "count"), [(1, 1), (1, 3), (2, 5)])
def test_a_few_counts_of_a_gene_nobody_else_has_are_no_huge_effect(n_carriers, count) -> None:
    sizes = {"control": 2000, "A": 12, "B": 100}
    labels = np.repeat(list(sizes), list(sizes.values()))
    counts = np.random.default_rng(0).poisson(2.0, (len(labels), 40)).astype(float)
    counts[:, 0] = 0
    counts[2000 : 2000 + n_carriers, 0] = count
    cells = make_cells(counts, labels, library=np.full(len(labels), 5000.0))
    found, _ = regress(cells, np.zeros((0, 2)))
    # The log ratio of fractions, half a count taken for none.
    ratio = np.log(n_carriers * count / sizes["A"]) - np.log(0.5 / sizes["control"])
    assert abs(found.observed[0, 0] - ratio) < 1.5
    assert np.abs(found.mean[0]).max() < ratio + 0.5


def test_an_effect_of_which_nothing_is_known_is_zero(rng):
    labels = np.resize(LABELS[:3], 90)
    data = make_cells(rng.poisson(5, (90, 4)) + 1, labels).subset(labels != "B")
    found = regression_effects(data, training_statistics(data))
    np.testing.assert_array_equal(found.loc[1], 0)
    np.testing.assert_array_equal(found.error[1], 3)
    assert (found.error[0] < 1).all()


@pytest.mark.parametrize("reason", ["lognorm", "no controls", "too many pairs", "too large"])
def test_raw_effects_stand_in(rng, monkeypatch, reason):
    if reason == "lognorm":
        values = rng.gamma(2.0, 1.0, (60, 5))
        data = make_cells(values, np.resize(LABELS, 60), values="lognorm")
    else:
        data = make_screen(rng)
    if reason == "no controls":
        data = data.subset(data.labels != "control")
    if reason == "too many pairs":
        monkeypatch.setattr(statistics, "_MOST_INFORMATION", 100)
    if reason == "too large":
        monkeypatch.setattr(statistics, "_MOST_ENTRIES", 100)
    of_data = training_statistics(data, interaction_cells=5)
    found, expected = regression_effects(data, of_data), raw_effects(data, of_data)
    np.testing.assert_array_equal(found.loc, expected.loc)
    np.testing.assert_array_equal(found.error, expected.error)
