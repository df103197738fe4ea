"""Statistics of the training cells and raw effects: dense arithmetic, counts drawn many times."""

from __future__ import annotations

import dataclasses

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.statistics import raw_effects, training_statistics
from cradle_pyro.errors import DataError, DataWarning

LABELS = ("control", "A", "B", "A+B")


def make_cells(counts, labels, *, failing=None, values="counts", library=None):
    """Return cells with one flag; libraries are the rows' sums unless given."""
    counts = np.asarray(counts, dtype=np.float32)
    obs = pd.DataFrame(
        {
            "perturbation": labels,
            "bad": np.zeros(len(counts)) if failing is None else np.asarray(failing, float),
            "library": counts.sum(1) if library is None else library,
        },
        index=[f"c{i}" for i in range(len(counts))],
    )
    adata = anndata.AnnData(sparse.csr_matrix(counts), obs=obs)
    return CellData.from_anndata(
        adata, artifact_keys=["bad"], library_key="library", values=values, delimiter="+"
    )


def make_counts(rng, n_cells=60, n_genes=7):
    """Return counts with no empty cell and no empty gene."""
    counts = rng.negative_binomial(2, 0.2, (n_cells, n_genes))
    counts[:, 0] += 1
    return counts


def make_screen(rng, n_cells=60, **options):
    labels = np.resize(LABELS, n_cells)
    failing = np.arange(n_cells) % 5 == 0
    return make_cells(make_counts(rng, n_cells), labels, failing=failing, **options)


def dense(data):
    return data.rows(slice(None)).toarray().astype(np.float64)


def effects_of(data):
    return raw_effects(data, training_statistics(data))


# ------------------------------------------------------------------------------------ statistics


def test_statistics_are_those_of_dense_arrays(rng):
    data = make_screen(rng, library=rng.uniform(80, 200, 60))
    x, library = dense(data), data.library.astype(np.float64)
    found = training_statistics(data)
    logs, fraction = np.log1p(x), (x / library[:, None]).mean(0)
    expected = fraction * library[:, None]
    excess = ((x - expected) ** 2 - expected).sum(0)
    theta = (expected**2).sum(0) / excess
    assert ((theta > 0.3) & (theta < 100)).all()
    assert found.n_cells == 60
    np.testing.assert_allclose(found.log_mean, logs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.log_sd, logs.std(0), rtol=1e-5)
    np.testing.assert_allclose(found.fraction, fraction, rtol=1e-5)
    np.testing.assert_allclose(found.inverse_dispersion, theta, rtol=1e-4)
    np.testing.assert_allclose(found.log_library_mean, np.log(library).mean(), rtol=1e-6)
    np.testing.assert_allclose(found.log_library_sd, np.log(library).std(), rtol=1e-4)
    np.testing.assert_allclose(found.artifact_share, [0.2], rtol=1e-6)
    np.testing.assert_allclose(found.failing_share, 0.2, rtol=1e-6)


def test_statistics_do_not_depend_on_the_pieces_the_cells_are_read_in(rng, monkeypatch):
    data = make_screen(rng)
    whole = training_statistics(data), effects_of(data)
    read = CellData.iter_rows
    monkeypatch.setattr(CellData, "iter_rows", lambda self: read(self, 7))
    pieces = training_statistics(data), effects_of(data)
    for first, second in zip(whole, pieces, strict=True):
        for before, after in zip(first, second, strict=True):
            np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)


def test_inverse_dispersion_recovers_that_of_negative_binomial_counts(rng):
    theta, library = np.array([0.5, 2.0, 10.0]), rng.lognormal(5, 0.4, 20_000)
    mean = library[:, None] * np.array([0.01, 0.02, 0.05])
    counts = rng.poisson(rng.gamma(theta, mean / theta))
    data = make_cells(counts, np.resize(LABELS, 20_000), library=library)
    np.testing.assert_allclose(training_statistics(data).inverse_dispersion, theta, rtol=0.1)


def test_counts_without_overdispersion_have_the_largest_inverse_dispersion(rng):
    counts = np.full((60, 3), 5)
    found = training_statistics(make_cells(counts, np.resize(LABELS, 60)))
    np.testing.assert_array_equal(found.inverse_dispersion, np.full(3, 100, np.float32))
    assert found.log_library_sd == pytest.approx(1e-2)  # never zero: it divides


def test_log_normalised_values_are_taken_as_they_are(rng):
    values = rng.gamma(2.0, 1.0, (60, 5))
    data = make_cells(values, np.resize(LABELS, 60), values="lognorm")
    found = training_statistics(data)
    np.testing.assert_allclose(found.log_mean, dense(data).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.log_sd, dense(data).std(0), rtol=1e-4)
    np.testing.assert_allclose(found.fraction, dense(data).mean(0), rtol=1e-5)


def test_no_cells_have_no_statistics(rng):
    data = make_screen(rng)
    with pytest.raises(DataError, match="found none"):
        training_statistics(data.subset(np.zeros(60, bool)))


# ----------------------------------------------------------------------------------- raw effects


def by_hand(data, members, controls):
    """Return loc and error from the cells named, in the words of the docstring."""
    x, library = dense(data), data.library.astype(np.float64)
    statistics = training_statistics(data)
    fraction = statistics.fraction.numpy().astype(np.float64)
    theta = statistics.inverse_dispersion.numpy().astype(np.float64)

    def estimate(rows):
        pooled = (x[rows].sum(0) + 0.5) / (library[rows].sum() + 0.5 / fraction)
        expected = library[rows].mean() * fraction
        information = len(rows) * expected * theta / (theta + expected)
        return np.log(pooled), 1 / (information + 0.25)

    base, base_variance = estimate(controls)
    estimates = [estimate(rows) for rows in members]
    loc = np.stack([value - base for value, _ in estimates])
    return loc, np.sqrt(np.stack([variance + base_variance for _, variance in estimates]))


def test_raw_effects_by_hand_come_from_passing_cells_that_carry_nothing_else(rng):
    data = make_screen(rng)
    passing = ~data.failing
    members = [np.flatnonzero((data.labels == label) & passing) for label in ("A", "B")]
    controls = np.flatnonzero((data.labels == "control") & passing)
    loc, error = by_hand(data, members, controls)
    found = effects_of(data)
    np.testing.assert_allclose(found.loc, loc, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.error, error, rtol=1e-4)


def test_a_combinations_raw_effect_is_what_it_adds_to_the_sum_of_its_members(rng):
    data = make_screen(rng)
    passing = ~data.failing
    statistics = training_statistics(data, interaction_cells=15)
    np.testing.assert_array_equal(statistics.combinations, [[1, 1]])
    members = [np.flatnonzero((data.labels == k) & passing) for k in ("A", "B", "A+B")]
    controls = np.flatnonzero((data.labels == "control") & passing)
    loc, error = by_hand(data, members, controls)
    found = raw_effects(data, statistics)
    np.testing.assert_allclose(found.loc[:2], loc[:2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.loc[2], loc[2] - loc[0] - loc[1], rtol=1e-4, atol=1e-6)
    # A+B - A - B + control: the errors of four groups of cells.
    _, alone = by_hand(data, [controls], controls)
    variance = (error**2).sum(0) - alone[0] ** 2
    np.testing.assert_allclose(found.error[2], np.sqrt(variance), rtol=1e-4)


def test_combinations_are_labels_of_several_perturbations_with_enough_cells(rng):
    labels = np.array(["control"] * 20 + ["A"] * 20 + ["B"] * 20 + ["A+B"] * 9 + ["A+C"] * 11)
    data = make_cells(make_counts(rng, 80), labels)
    for least, expected in ((None, []), (9, [[1, 1, 0], [1, 0, 1]]), (10, [[1, 0, 1]]), (12, [])):
        found = training_statistics(data, interaction_cells=least).combinations
        assert found.shape == (len(expected), 3)
        assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in expected}


def test_other_cells_do_not_move_raw_effects(rng):
    data = make_screen(rng)
    statistics = training_statistics(data)
    unused = data.failing | (data.labels == "A+B")
    counts = dense(data)
    counts[unused] *= 3
    other = dataclasses.replace(data, counts=sparse.csr_array(counts.astype(np.float32)))
    before, after = raw_effects(data, statistics), raw_effects(other, statistics)
    np.testing.assert_array_equal(before.loc, after.loc)
    counts[~unused] *= 3
    other = dataclasses.replace(data, counts=sparse.csr_array(counts.astype(np.float32)))
    assert (raw_effects(other, statistics).loc != before.loc).any()


@pytest.mark.parametrize("reason", ["failing", "combined"])
def test_without_passing_singles_all_cells_that_carry_it_count(rng, reason):
    labels = np.resize(LABELS, 60)
    failing = np.arange(60) % 5 == 0
    if reason == "failing":
        failing |= labels == "B"
    else:
        labels = np.where(labels == "B", "A+B", labels)
    data = make_cells(make_counts(rng), labels, failing=failing)
    carried = np.flatnonzero(np.isin(labels, ["B", "A+B"]))
    alone = np.flatnonzero((labels == "A") & ~failing)
    controls = np.flatnonzero((labels == "control") & ~failing)
    loc, error = by_hand(data, [alone, carried], controls)
    found = effects_of(data)
    np.testing.assert_allclose(found.loc, loc, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.error, error, rtol=1e-4)


def test_without_controls_effects_are_against_all_cells(rng):
    data = make_screen(rng)
    data = data.subset(data.labels != "control")
    passing = ~data.failing
    members = [np.flatnonzero((data.labels == label) & passing) for label in ("A", "B")]
    loc, _ = by_hand(data, members, np.arange(data.n_cells))
    np.testing.assert_allclose(effects_of(data).loc, loc, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("theta", [1.0, 1e6], ids=["negative binomial", "poisson"])
def test_errors_are_the_spread_of_the_effects_over_screens(theta):
    rng = np.random.default_rng(1)
    labels = np.repeat(LABELS[:3], [120, 60, 30])
    library = rng.lognormal(6, 0.3, len(labels))
    mean = library[:, None] * np.array([0.002, 0.005, 0.02])
    found = []
    for _ in range(300):
        counts = rng.poisson(rng.gamma(theta, mean / theta))
        found.append(effects_of(make_cells(counts, labels, library=library)))
    spread = np.std([effect.loc.numpy() for effect in found], axis=0, ddof=1)
    error = np.mean([effect.error.numpy() for effect in found], axis=0)
    np.testing.assert_allclose(error, spread, rtol=0.2)
    bias = np.mean([effect.loc.numpy() for effect in found], axis=0)
    assert (np.abs(bias) < 0.1 * spread + 4.5 * spread / 300**0.5).all()


def test_a_gene_that_is_never_seen_has_a_small_effect_and_a_large_error():
    counts = np.full((60, 3), 5)
    counts[:, 1] = 0
    with pytest.warns(DataWarning, match="no counts in any cell"):
        data = make_cells(counts, np.resize(LABELS, 60))
    found = effects_of(data)
    np.testing.assert_allclose(found.loc[:, 1], 0, atol=1e-3)
    np.testing.assert_allclose(found.error[:, 1], np.sqrt(2 / 0.25), rtol=1e-3)
    assert (found.error[:, 0] < 0.3).all()


def test_effects_of_log_normalised_values_are_differences_of_means(rng):
    values = rng.gamma(2.0, 1.0, (60, 5))
    labels = np.resize(LABELS, 60)
    data = make_cells(values, labels, values="lognorm")
    x, found = dense(data), effects_of(data)
    means = {label: x[labels == label].mean(0) for label in LABELS}
    expected = np.stack([means[label] - means["control"] for label in ("A", "B")])
    np.testing.assert_allclose(found.loc, expected, rtol=1e-4, atol=1e-6)
    error = np.tile(x.std(0) * np.sqrt(2 / 15), (2, 1))
    np.testing.assert_allclose(found.error, error, rtol=1e-4)
