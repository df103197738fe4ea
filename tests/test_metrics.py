"""Scores and ceilings: independent implementations, laws, and the published mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, special, stats
from sklearn.metrics import jaccard_score, r2_score

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation import metrics
from cradle_pyro.evaluation.reference import group_effects, split_half_ceiling


def make_effects(seed: int = 0, n_labels: int = 6, n_genes: int = 80) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(n_labels, n_genes)) * rng.gamma(1.0, size=n_genes)
    return 0.5 * reference + rng.normal(scale=0.7, size=reference.shape), reference


def make_counts(seed: int = 0, n_cells: int = 90, n_genes: int = 30) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 3.0, size=n_genes), size=(n_cells, n_genes))
    return counts.astype(np.float32), counts.sum(axis=1) + 5.0


def make_groups(n_cells: int = 90) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rows = np.random.default_rng(1).permutation(n_cells)
    return {"A": rows[:20], "B": rows[20:45], "A+B": rows[45:47]}, rows[47:]


def make_screen(seed: int, *, cells_per_label: int = 60, size: float = 1.0) -> tuple:
    """Poisson counts with known log-normal effects: counts, library, groups, control, truth."""
    rng = np.random.default_rng(seed)
    base = np.exp(rng.normal(size=60))
    fold = np.exp(size * rng.normal(size=(8, 60)))
    profile = np.vstack([base, base * fold])
    profile /= profile.sum(axis=1, keepdims=True)
    label = np.repeat(np.arange(9), cells_per_label)
    library = np.full(len(label), 300.0)
    counts = rng.poisson(library[:, None] * profile[label])
    groups = {f"P{i}": np.flatnonzero(label == i) for i in range(1, 9)}
    truth = np.log2(1 + 1e4 * profile)
    return (
        sparse.csr_array(counts), library, groups, np.flatnonzero(label == 0), truth[1:] - truth[0],
    )  # fmt: skip


# --- scores against independent implementations -------------------------------------------------


def test_pooled_scores_equal_scipy_and_sklearn() -> None:
    predicted, reference = make_effects()
    flat = predicted.ravel(), reference.ravel()
    assert metrics.ate_correlation(predicted, reference) == pytest.approx(stats.pearsonr(*flat)[0])
    assert metrics.ate_r2(predicted, reference) == pytest.approx(r2_score(flat[1], flat[0]))
    assert metrics.rmse(predicted, reference) == pytest.approx(
        np.linalg.norm(flat[0] - flat[1]) / np.sqrt(flat[0].size)
    )


def test_scores_per_perturbation_equal_scipy_and_sklearn() -> None:
    predicted, reference = make_effects(1)
    rho = [stats.pearsonr(p, r)[0] for p, r in zip(predicted, reference, strict=True)]
    r2 = [r2_score(r, p) for p, r in zip(predicted, reference, strict=True)]
    np.testing.assert_allclose(metrics.ate_correlation_per_perturbation(predicted, reference), rho)
    np.testing.assert_allclose(metrics.ate_r2_per_perturbation(predicted, reference), r2)


@pytest.mark.parametrize("k", [5, 20])
def test_top_k_scores_equal_a_loop(k: int) -> None:
    predicted, reference = make_effects(2)
    ours, theirs, jaccard = [], [], []
    for p, r in zip(predicted, reference, strict=True):
        top_r = sorted(range(len(r)), key=lambda gene: -abs(r[gene]))[:k]
        top_p = sorted(range(len(p)), key=lambda gene: -abs(p[gene]))[:k]
        ours += [p[gene] for gene in top_r]
        theirs += [r[gene] for gene in top_r]
        jaccard.append(
            jaccard_score(np.isin(np.arange(len(r)), top_r), np.isin(np.arange(len(r)), top_p))
        )
    assert metrics.top_k_correlation(predicted, reference, k=k) == pytest.approx(
        stats.pearsonr(ours, theirs)[0]
    )
    assert metrics.jaccard_top_k(predicted, reference, k=k) == pytest.approx(np.mean(jaccard))


def test_ks_distance_equals_scipy_with_and_without_ties() -> None:
    rng = np.random.default_rng(3)
    for first, second in (
        (rng.normal(size=40), rng.normal(0.5, size=70)),
        (rng.integers(0, 4, 50), rng.integers(1, 5, 30)),
    ):
        assert metrics.ks_distance(first, second) == pytest.approx(
            stats.ks_2samp(first, second).statistic
        )


def test_log_mean_exp_equals_scipy_and_does_not_overflow() -> None:
    values = np.random.default_rng(4).normal(scale=50.0, size=(7, 5)) + 2000.0
    np.testing.assert_allclose(
        metrics.log_mean_exp(values, axis=0), special.logsumexp(values, axis=0) - np.log(7)
    )
    assert metrics.log_mean_exp(np.array([-np.inf, -np.inf])) == -np.inf
    assert metrics.log_mean_exp(np.array([0.0, -np.inf])) == pytest.approx(-np.log(2))


def test_spearman_brown_predicts_the_correlation_of_doubled_measurements() -> None:
    rng = np.random.default_rng(5)
    truth = rng.normal(size=200_000)
    halves = truth + rng.normal(scale=1.5, size=(4, truth.size))
    half = np.corrcoef(halves[0], halves[1])[0, 1]
    whole = np.corrcoef(halves[0] + halves[1], halves[2] + halves[3])[0, 1]
    assert metrics.spearman_brown(half) == pytest.approx(whole, abs=0.01)
    assert metrics.spearman_brown(1.0) == 1.0
    assert metrics.spearman_brown(-0.2) == -0.2


ERRORS = ("rmse", "mae")


# --- laws ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_permuting_labels_and_genes_leaves_every_score(seed: int) -> None:
    predicted, reference = make_effects(seed)
    rng = np.random.default_rng(seed)
    labels, genes = rng.permutation(len(predicted)), rng.permutation(predicted.shape[1])
    permuted = metrics.score_effects(predicted[labels][:, genes], reference[labels][:, genes])
    assert permuted == pytest.approx(metrics.score_effects(predicted, reference))


def test_perfect_prediction_scores_one_and_opposite_minus_one() -> None:
    _, reference = make_effects()
    found = metrics.score_effects(reference, reference)
    assert found == pytest.approx({name: float(name not in ERRORS) for name in found})
    assert metrics.ate_correlation(-2 * reference, reference) == pytest.approx(-1.0)
    assert metrics.ate_r2(np.full_like(reference, reference.mean()), reference) == pytest.approx(0)


def test_names_in_tables_are_the_functions_they_say() -> None:
    predicted, reference = make_effects()
    scores = metrics.score_effects(predicted, reference)
    assert scores == {
        "ate_rho": metrics.ate_correlation(predicted, reference),
        "ate_r2": metrics.ate_r2(predicted, reference),
        "ate_rho_per_perturbation": pytest.approx(
            metrics.ate_correlation_per_perturbation(predicted, reference).mean()
        ),
        "ate_r2_per_perturbation": pytest.approx(
            metrics.ate_r2_per_perturbation(predicted, reference).mean()
        ),
        "ate_rho_top20": metrics.top_k_correlation(predicted, reference, k=20),
        "ate_rho_top50": metrics.top_k_correlation(predicted, reference, k=50),
        "jaccard_top20": metrics.jaccard_top_k(predicted, reference, k=20),
        "jaccard_top50": metrics.jaccard_top_k(predicted, reference, k=50),
        "sign_top20": metrics.sign_agreement(predicted, reference, k=20),
        "rmse": metrics.rmse(predicted, reference),
        "mae": metrics.mae(predicted, reference),
        "discrimination": metrics.perturbation_discrimination(predicted, reference).mean(),
    }


def test_labels_that_do_not_vary_are_nan_and_left_out_of_means() -> None:
    predicted, reference = make_effects()
    predicted[2] = 0.0
    per = metrics.ate_correlation_per_perturbation(predicted, reference)
    assert np.isnan(per[2])
    assert np.isfinite(np.delete(per, 2)).all()
    rest = [0, 1, 3, 4, 5]
    scores = metrics.score_effects(predicted, reference)
    alone = metrics.score_effects(predicted[rest], reference[rest])
    for name in ("ate_rho_per_perturbation", "jaccard_top20"):
        assert scores[name] == pytest.approx(alone[name])
    nothing = metrics.score_effects(np.zeros_like(reference), reference)
    assert np.isnan(nothing["ate_rho"])
    assert np.isnan(nothing["jaccard_top20"])
    assert nothing["ate_r2"] <= 0


def test_shapes_and_values_are_checked() -> None:
    predicted, reference = make_effects()
    with pytest.raises(DataError, match="one shape"):
        metrics.score_effects(predicted[:, 1:], reference)
    predicted[0, 0] = np.nan
    with pytest.raises(DataError, match="1 of 480 predicted"):
        metrics.score_effects(predicted, reference)


# --- QC pass rate -------------------------------------------------------------------------------


def test_mistake_07_pass_rate_is_right_at_every_share() -> None:
    """The published rate came from the head of a table of counts: never below one half."""
    for n_failing in range(11):
        flag = np.arange(10) < n_failing
        rate = metrics.qc_pass_rate({"low_counts": flag, "doublet": np.zeros(10, dtype=bool)})
        assert rate == pytest.approx(1 - n_failing / 10)


def test_a_cell_fails_once_however_many_flags_it_has() -> None:
    flags = {"a": np.array([1, 1, 0, 0]), "b": np.array([1, 0, 0, 0]), "c": np.zeros(4)}
    assert metrics.qc_pass_rate(flags) == 0.5


@pytest.mark.parametrize(
    "flags",
    [{}, {"a": np.zeros(0)}, {"a": np.zeros(3), "b": np.zeros(4)}, {"a": np.array([0.0, np.nan])}],
)
def test_pass_rate_refuses_what_is_not_flags(flags: dict[str, np.ndarray]) -> None:
    with pytest.raises(DataError):
        metrics.qc_pass_rate(flags)


# --- reference effects --------------------------------------------------------------------------


@pytest.mark.parametrize("functional", ["log_mean", "mean_log"])
def test_group_effects_equal_a_dense_loop(functional: str) -> None:
    counts, library = make_counts()
    groups, control = make_groups()
    fraction = counts / library[:, None]

    def value(rows: np.ndarray) -> np.ndarray:
        if functional == "log_mean":
            return np.log2(1 + 1e4 * fraction[rows].mean(axis=0))
        return np.log2(1 + 1e4 * fraction[rows]).mean(axis=0)

    expected = [value(rows) - value(control) for rows in groups.values()]
    for container in (counts, sparse.csr_array(counts), sparse.csr_matrix(counts)):
        ours = group_effects(container, library, groups, control, functional=functional)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 90, 1000])
def test_chunk_size_changes_nothing(chunk: int) -> None:
    counts, library = make_counts()
    groups, control = make_groups()
    counts = sparse.csr_array(counts)
    whole = group_effects(counts, library, groups, control)
    parts = group_effects(counts, library, groups, control, chunk=chunk)
    np.testing.assert_allclose(parts, whole, rtol=1e-10, atol=1e-12)


def test_only_the_named_rows_are_used() -> None:
    counts, library = make_counts()
    groups, control = make_groups()
    used = np.concatenate([*groups.values(), control[:10]])
    expected = group_effects(counts, library, groups, control[:10])
    changed = counts.copy()
    changed[np.setdiff1d(np.arange(len(counts)), used)] = 999.0
    np.testing.assert_array_equal(group_effects(changed, library, groups, control[:10]), expected)


def test_log_normalised_values_give_the_effects_of_the_counts() -> None:
    counts, library = make_counts()
    groups, control = make_groups()
    values = np.log1p(1e4 * counts / library[:, None])
    for functional in ("log_mean", "mean_log"):
        np.testing.assert_allclose(
            group_effects(
                values, library, groups, control, functional=functional, values="lognorm"
            ),
            group_effects(counts, library, groups, control, functional=functional),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("rows", [[], [90], [-1]])
def test_impossible_groups_are_errors(rows: list[int]) -> None:
    counts, library = make_counts()
    with pytest.raises(DataError):
        group_effects(counts, library, {"A": np.array(rows, dtype=int)}, np.arange(5))


# --- ceilings -----------------------------------------------------------------------------------


def test_ceilings_are_ordered_reproducible_and_at_most_one() -> None:
    counts, library, groups, control, _ = make_screen(0)
    first = split_half_ceiling(counts, library, groups, control, n_repeats=4, seed=1)
    again = split_half_ceiling(counts, library, groups, control, n_repeats=4, seed=1)
    other = split_half_ceiling(counts, library, groups, control, n_repeats=4, seed=2)
    assert first == again
    assert first != other
    rho = first.halves["ate_rho"], first.replicate["ate_rho"], first.noise_free["ate_rho"]
    assert 0 < rho[0] < rho[1] < rho[2] <= 1


def test_ceiling_is_what_the_truth_reaches() -> None:
    counts, library, groups, control, truth = make_screen(0, size=0.4)
    reference = group_effects(counts, library, groups, control)
    ceiling = split_half_ceiling(counts, library, groups, control, n_repeats=10)
    reached = metrics.ate_correlation(truth, reference)
    assert reached == pytest.approx(ceiling.noise_free["ate_rho"], abs=0.03)


def test_ceiling_of_shuffled_cells_is_nothing() -> None:
    counts, library, groups, control, _ = make_screen(0)
    shuffled = counts[np.random.default_rng(9).permutation(counts.shape[0])]
    ceiling = split_half_ceiling(shuffled, library, groups, control, n_repeats=10)
    assert abs(ceiling.replicate["ate_rho"]) < 0.15


def test_ceiling_of_noiseless_cells_is_one() -> None:
    counts, library, groups, control, _ = make_screen(0)
    dense = counts.toarray()
    for rows in (*groups.values(), control):
        dense[rows] = dense[rows[0]]
    ceiling = split_half_ceiling(sparse.csr_array(dense), library, groups, control, n_repeats=2)
    for scores in (ceiling.halves, ceiling.replicate, ceiling.noise_free):
        assert scores == pytest.approx({name: float(name not in ERRORS) for name in scores})


def test_a_ceiling_needs_cells_to_halve() -> None:
    counts, library = make_counts()
    with pytest.raises(DataError, match="two control cells"):
        split_half_ceiling(counts, library, {"A": np.array([0])}, np.arange(5, 20))


# --- discrimination, signs, absolute errors ------------------------------------------------------


def test_mean_absolute_error_is_that_of_scikit_learn(rng):
    from sklearn.metrics import mean_absolute_error

    first, second = rng.normal(size=(4, 7)), rng.normal(size=(4, 7))
    assert metrics.mae(first, second) == pytest.approx(
        mean_absolute_error(first.ravel(), second.ravel())
    )


def test_discrimination_is_the_rank_of_the_own_label(rng):
    reference = rng.normal(size=(6, 20))
    np.testing.assert_array_equal(metrics.perturbation_discrimination(reference, reference), 1)
    noisy = reference + rng.normal(0, 2, reference.shape)
    expected = []
    for row in range(6):
        order = np.argsort([np.abs(noisy[row] - other).sum() for other in reference])
        expected.append(1 - order.tolist().index(row) / 5)
    np.testing.assert_allclose(metrics.perturbation_discrimination(noisy, reference), expected)
    # The prediction of the label farthest away is worst.
    assert metrics.perturbation_discrimination(-3 * reference, reference).mean() < 0.2


def test_one_prediction_for_all_labels_discriminates_nothing(rng):
    reference = rng.normal(size=(40, 10))
    for constant in (np.zeros(10), rng.normal(size=10)):
        found = metrics.perturbation_discrimination(np.tile(constant, (40, 1)), reference)
        assert found.mean() == pytest.approx(0.5)
    twins = np.repeat(rng.normal(size=(3, 10)), 2, axis=0)
    np.testing.assert_allclose(metrics.perturbation_discrimination(twins, twins), 0.9)
    assert np.isnan(metrics.perturbation_discrimination(np.ones((1, 3)), np.ones((1, 3)))).all()


def test_signs_of_the_largest_effects():
    reference = np.array([[3.0, -2.0, 0.1, 0.1], [1.0, 5.0, -4.0, 0.1]])
    predicted = np.array([[1.0, 1.0, -1.0, -1.0], [-9.0, 0.0, -1.0, -1.0]])
    assert metrics.sign_agreement(predicted, reference, k=2) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
