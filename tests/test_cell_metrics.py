"""Distances between cells and differential genes, against independent implementations."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse
from sklearn.metrics.pairwise import rbf_kernel

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.cell_metrics import (
    DifferentialGenes,
    de_direction,
    de_overlap,
    differential_genes,
    energy_distance,
    log_pca,
    mmd,
)


def samples(rng, *, shift=0.0, n=(30, 40), size=5):
    return rng.normal(size=(n[0], size)), rng.normal(shift, 1, (n[1], size))


def test_energy_distance_by_hand(rng):
    first, second = samples(rng, shift=0.7)
    across = np.mean([np.linalg.norm(x - y) for x in first for y in second])
    inside = [
        np.mean(
            [np.linalg.norm(a[i] - a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
        )
        for a in (first, second)
    ]
    assert energy_distance(first, second) == pytest.approx(2 * across - sum(inside))
    assert energy_distance(second, first) == pytest.approx(energy_distance(first, second))


def test_energy_distance_in_one_dimension_is_the_area_between_distributions():
    """2 * integral (F - G)^2, Székely and Rizzo: of Normal(0, 1) and Normal(1, 1)."""
    from scipy import integrate, stats

    def gap(x):
        return (stats.norm.cdf(x) - stats.norm.cdf(x, 1)) ** 2

    expected = 2 * integrate.quad(gap, -10, 10)[0]
    first = stats.norm.ppf((np.arange(3000) + 0.5) / 3000)[:, None]
    assert energy_distance(first, first + 1) == pytest.approx(expected, rel=0.01)


def test_mmd_with_the_kernel_of_scikit_learn(rng):
    first, second = samples(rng, shift=0.7)
    bandwidth = 1.3
    gamma = 0.5 / bandwidth**2
    inside = [
        (rbf_kernel(a, gamma=gamma).sum() - len(a)) / (len(a) * (len(a) - 1))
        for a in (first, second)
    ]
    expected = sum(inside) - 2 * rbf_kernel(first, second, gamma=gamma).mean()
    assert mmd(first, second, bandwidth=bandwidth) == pytest.approx(expected)


@pytest.mark.parametrize("distance", [energy_distance, mmd])
def test_distances_are_unbiased_and_grow_with_the_shift(rng, distance):
    null = [distance(*samples(rng, n=(10, 12))) for _ in range(300)]
    assert abs(np.mean(null)) < 4 * np.std(null) / 300**0.5
    near, far = (np.mean([distance(*samples(rng, shift=s)) for _ in range(20)]) for s in (0.3, 1))
    assert 0 < near < far


def test_a_sample_of_equal_cells_has_no_discrepancy():
    assert mmd(np.ones((3, 2)), np.ones((4, 2))) == 0


@pytest.mark.parametrize("distance", [energy_distance, mmd])
def test_samples_must_fit(rng, distance):
    for pair in ((np.ones((1, 2)), np.ones((3, 2))), (np.ones((3, 2)), np.ones((3, 4)))):
        with pytest.raises(DataError, match="two samples"):
            distance(*pair)


def test_components_are_those_of_the_training_cells(rng):
    counts = rng.poisson(3.0, (50, 8)).astype(float)
    library = counts.sum(1) + 100
    project = log_pca(sparse.csr_array(counts), library, n_components=3)
    found = project(counts, library)
    values = np.log2(1 + 1e4 * counts / library[:, None])
    centred = values - values.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(left[:, :3] * size[:3]), atol=1e-6)
    other = project(counts[:5] * 2, library[:5] * 2)
    np.testing.assert_allclose(other, found[:5], atol=1e-8)
    assert log_pca(counts[:3], library[:3])(counts, library).shape == (50, 2)


def make_counts(rng):
    counts = rng.poisson(4.0, (90, 20))
    counts[30:60, :3] = rng.poisson(12.0, (30, 3))
    counts[60:, 5] = rng.poisson(1.0, 30)
    counts[:, 7] = 0
    library = np.full(90, 200.0)
    groups = {"up": np.arange(30, 60), "down": np.arange(60, 90)}
    return counts, library, groups, np.arange(30)


def test_differential_genes_as_scanpy_finds_them(rng):
    counts, library, groups, control = make_counts(rng)
    found = differential_genes(sparse.csr_array(counts), library, groups, control)
    labels = np.repeat(["control", "up", "down"], 30)
    adata = anndata.AnnData(
        np.log2(1 + 1e4 * counts / library[:, None]),
        obs=pd.DataFrame({"label": labels}, index=[f"c{i}" for i in range(90)]),
    )
    adata.obs["label"] = adata.obs["label"].astype("category")
    with np.errstate(invalid="ignore"):  # the gene without counts
        sc.tl.rank_genes_groups(
            adata, "label", reference="control", method="wilcoxon", tie_correct=True
        )
    for row, label in enumerate(groups):
        table = sc.get.rank_genes_groups_df(adata, label).set_index("names")
        p_adjusted = table["pvals_adj"].reindex(adata.var_names).fillna(1).to_numpy()
        # scanpy does without a correction for continuity.
        ours = found.p_adjusted[row]
        np.testing.assert_allclose(np.log(ours), np.log(p_adjusted), atol=0.35)
        assert ((ours < 0.05) == (p_adjusted < 0.05)).all()
    assert found.significant[0].nonzero()[0].tolist() == [0, 1, 2]
    assert found.significant[1].nonzero()[0].tolist() == [5]
    assert found.change[0, 0] > 0 > found.change[1, 5]
    assert (found.p_adjusted[:, 7] == 1).all()


def test_overlap_and_direction_by_hand():
    reference = DifferentialGenes(
        np.array([[0.01, 0.01, 0.01, 0.5], [0.5, 0.5, 0.5, 0.5]]), np.ones((2, 4))
    )
    predicted = DifferentialGenes(
        np.array([[0.01, 0.01, 0.9, 0.01], [0.01] * 4]),
        np.array([[0.5, -0.1, 0.0, 2.0], [1.0] * 4]),
    )
    # Three are predicted, of which two are right; one has the wrong sign, one none.
    np.testing.assert_allclose(de_overlap(predicted, reference), [2 / 3, np.nan])
    np.testing.assert_allclose(de_direction(predicted, reference), [(1 + 0 + 0.5) / 3, np.nan])
    np.testing.assert_allclose(de_overlap(reference, reference), [1, np.nan])
    np.testing.assert_allclose(de_direction(reference, reference), [1, np.nan])


def test_only_the_largest_predicted_changes_count():
    reference = DifferentialGenes(np.array([[0.01, 0.5, 0.5]]), np.ones((1, 3)))
    predicted = DifferentialGenes(np.full((1, 3), 0.01), np.array([[0.1, 0.9, 0.5]]))
    assert de_overlap(predicted, reference)[0] == 0


def test_a_test_needs_two_cells(rng):
    counts, library, _, control = make_counts(rng)
    with pytest.raises(DataError, match="one"):
        differential_genes(counts, library, {"one": np.array([40])}, control)
