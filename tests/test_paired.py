"""Paired comparisons: scores under weights, closed forms, and coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.comparisons import (
    COMPARISON_COLUMNS,
    compare,
    normalise,
    rank_agreement,
)
from cradle_pyro.evaluation.metrics import score_effects
from cradle_pyro.evaluation.paired import (
    EFFECT_METRICS,
    Judged,
    Unit,
    effect_scores,
    label_parts,
    paired_difference,
)


def make_judged(rng, *, n_labels=6, n_genes=120, noise=0.5):
    effects = rng.normal(size=(n_labels, n_genes)) * rng.uniform(0.2, 2.0, size=(n_labels, 1))
    predicted = effects + rng.normal(size=effects.shape) * noise
    return Judged([f"P{i}" for i in range(n_labels)], predicted, effects)


def mean_unit(seed, values, *, split="all", labels=None):
    """A unit whose difference is the weighted mean of one value per label."""
    values = np.asarray(values, dtype=float)
    names = [f"P{i}" for i in range(len(values))] if labels is None else labels

    def difference(weights):
        return (weights @ values / weights.sum(1))[:, None]

    return Unit(seed, split, names, difference)


def scalar_unit(seed, value, *, split="all"):
    return Unit(seed, split, [], lambda weights: np.full((len(weights), 1), value))


# ---------------------------------------------------------------------------------------- weights


def test_with_weights_of_one_scores_are_those_of_the_tables(rng):
    judged = make_judged(rng)
    found = dict(zip(EFFECT_METRICS, effect_scores(judged, np.ones((1, 6)))[0], strict=True))
    expected = score_effects(judged.predicted, judged.effects)
    shared = [name for name in EFFECT_METRICS if name in expected]
    assert len(shared) >= 8
    for name in shared:
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name
    error = judged.effects - judged.predicted
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()))
    assert found["mae"] == pytest.approx(np.abs(error).mean())


def test_whole_weights_are_labels_that_stand_there_as_often(rng):
    judged = make_judged(rng)
    weights = np.array([[2, 0, 1, 3, 0, 0]])
    rows = np.repeat(np.arange(6), weights[0])
    repeated = score_effects(judged.predicted[rows], judged.effects[rows])
    found = dict(zip(EFFECT_METRICS, effect_scores(judged, weights)[0], strict=True))
    for name, value in repeated.items():
        if name in found:
            assert found[name] == pytest.approx(value, abs=1e-12), name


def test_a_constant_prediction_has_no_correlation(rng):
    judged = make_judged(rng)
    constant = judged._replace(predicted=np.full_like(judged.effects, 0.3))
    found = dict(zip(EFFECT_METRICS, effect_scores(constant, np.ones((1, 6)))[0], strict=True))
    assert np.isnan(found["ate_rho"])
    assert np.isnan(found["ate_rho_per_perturbation"])
    assert np.isfinite(found["ate_r2"])


# ----------------------------------------------------------------------------------- closed forms


def test_the_mean_and_students_interval_are_those_of_a_paired_t_test(rng):
    ours, other = rng.normal(0.3, 1, size=(2, 7))
    units = [scalar_unit(seed, gap) for seed, gap in enumerate(ours - other)]
    found = paired_difference(units)
    test = stats.ttest_rel(ours, other)
    low, high = test.confidence_interval(0.95)
    assert found.mean[0] == pytest.approx((ours - other).mean())
    assert (found.t_low[0], found.t_high[0]) == (pytest.approx(low), pytest.approx(high))
    assert found.n_seeds == 7


@pytest.mark.parametrize("crossed", [False, True])
def test_over_many_perturbations_of_one_seed_the_bootstrap_is_the_normal_interval(rng, crossed):
    values = rng.normal(0.2, 1.0, size=400)
    found = paired_difference([mean_unit(0, values)], crossed=crossed, draws=8000)
    reach = 1.96 * values.std() / np.sqrt(400)
    assert found.ci_low[0] == pytest.approx(values.mean() - reach, abs=0.06 * reach)
    assert found.ci_high[0] == pytest.approx(values.mean() + reach, abs=0.06 * reach)
    assert np.isnan(found.sd[0])
    assert np.isnan(found.t_low[0])


def test_the_bootstrap_variance_adds_that_of_seeds_and_of_perturbations(rng):
    n_seeds, n_labels = 40, 10
    gaps = rng.normal(0, 1, (n_seeds, 1)) + rng.normal(0, 2, (n_seeds, n_labels))
    found = paired_difference([mean_unit(s, gap) for s, gap in enumerate(gaps)], draws=8000)
    within = gaps.var(axis=1).mean() / n_labels
    expected = 1.96 * np.sqrt((gaps.mean(1).var() + within) / n_seeds)
    assert (found.ci_high[0] - found.ci_low[0]) / 2 == pytest.approx(expected, rel=0.06)


def test_what_both_predictors_share_cancels(rng):
    shared = rng.normal(0, 10, size=30)
    ours, other = shared + 0.5 + rng.normal(0, 0.1, 30), shared + rng.normal(0, 0.1, 30)
    found = paired_difference([mean_unit(0, ours - other)])
    assert 0 < found.ci_low[0] < 0.5 < found.ci_high[0]
    assert found.ci_high[0] - found.ci_low[0] < 0.2


def test_left_out_pairs_are_drawn_as_splits():
    """One label to a split: without drawing splits, the interval would be a point."""
    gaps = [0.0, 0.2, 0.4, 0.6, 0.8]
    units = [mean_unit(0, [gap], split=f"pair{i}", labels=[f"P{i}"]) for i, gap in enumerate(gaps)]
    found = paired_difference(units, draws=4000)
    assert found.mean[0] == pytest.approx(0.4)
    assert found.n_splits == 5
    assert found.ci_low[0] < 0.25
    assert found.ci_high[0] > 0.55


def test_the_same_seed_gives_the_same_interval_and_no_units_are_an_error(rng):
    units = [mean_unit(s, rng.normal(size=5)) for s in range(3)]
    first, second = (paired_difference(units, seed=3) for _ in range(2))
    assert np.array_equal(first.ci_low, second.ci_low)
    with pytest.raises(DataError, match="at least one seed"):
        paired_difference([])


# --------------------------------------------------------------------------------------- coverage


def coverage(make, *, crossed, n_repeats=150, draws=300):
    """Return how often the bootstrap interval holds the true difference of zero."""
    hits = 0
    for repeat in range(n_repeats):
        units = make(np.random.default_rng(repeat))
        found = paired_difference(units, crossed=crossed, draws=draws, seed=repeat)
        hits += found.ci_low[0] <= 0 <= found.ci_high[0]
    return hits / n_repeats


def own_perturbations(rng, n_seeds=12, n_labels=12):
    gaps = rng.normal(0, 0.5, (n_seeds, 1)) + rng.normal(0, 1, (n_seeds, n_labels))
    return [mean_unit(s, gap) for s, gap in enumerate(gaps)]


def shared_perturbations(rng, n_seeds=12, n_labels=12):
    gaps = rng.normal(0, 1, (1, n_labels)) + rng.normal(0, 0.3, (n_seeds, n_labels))
    return [mean_unit(s, gap) for s, gap in enumerate(gaps)]


def test_nested_intervals_cover_where_each_seed_has_its_own_perturbations():
    # 150 repeats: 0.95 has a standard error of 0.018; two levels of resampling are a bit wide.
    assert 0.88 <= coverage(own_perturbations, crossed=False) <= 1.0


def test_shared_perturbations_need_the_crossed_bootstrap():
    """Resampled within seeds, what perturbations have in common would average out."""
    assert coverage(shared_perturbations, crossed=True) >= 0.86
    assert coverage(shared_perturbations, crossed=False) <= 0.75


# ----------------------------------------------------------------------------------------- tables


def make_scores(rows):
    columns = ["screen", "split", "seed", "predictor", "reference", "labels", "label", "metric"]
    return pd.DataFrame(rows, columns=[*columns, "value"]).assign(n_labels=1)


def place(seed, predictor, *rest):
    return ("s", "all", seed, predictor, *rest)


def test_predictors_are_compared_on_the_seeds_that_both_finished(rng):
    rows, parts = [], {}
    for seed in range(4):
        judged = make_judged(rng)
        for name, noise in (("ours", 0.1), ("other", 1.0)):
            if (seed, name) == (3, "other"):
                continue
            predicted = judged.effects + noise * rng.normal(size=judged.effects.shape)
            own = label_parts(judged._replace(predicted=predicted))
            parts[place(seed, name, "cells", "seen")] = own
            rows.append((*place(seed, name, "cells", "seen", "", "ate_rho"), 0.0))
            rows.append((*place(seed, name, "model", "all", "", "iwelbo_test"), seed + noise))
    found = compare(make_scores(rows), parts, "ours", draws=100)
    assert tuple(found.columns) == COMPARISON_COLUMNS
    assert set(found["n_seeds"]) == {3}
    rho = found[found["metric"] == "ate_rho"].iloc[0]
    assert rho["mean"] > 0
    assert rho["ci_low"] > 0
    assert rho["n_labels"] == 6
    density = found[found["metric"] == "iwelbo_test"].iloc[0]
    assert density["mean"] == pytest.approx(-0.9)
    assert density["resampled"] == "seeds"


def test_metrics_of_single_labels_are_resampled_over_labels():
    rows = []
    for seed in range(3):
        for i, label in enumerate(["A", "B", "C"]):
            rows.append((*place(seed, "ours", "generated", "seen", label, "mmd"), 0.1 * i))
            rows.append((*place(seed, "other", "generated", "seen", label, "mmd"), 0.3))
        rows.append((*place(seed, "ours", "generated", "seen", "", "mmd"), 9.0))
    found = compare(make_scores(rows), {}, "ours", draws=200)
    assert len(found) == 1
    row = found.iloc[0]
    assert row["mean"] == pytest.approx(-0.2)
    assert row["n_labels"] == 3
    assert row["ci_low"] < -0.2 < row["ci_high"]
    assert row["resampled"] == "seeds and perturbations, nested"


def test_predictions_for_other_labels_are_an_error(rng):
    first, second = make_judged(rng), make_judged(rng)
    rows = [(*place(0, n, "cells", "seen", "", "ate_rho"), 0.0) for n in ("ours", "other")]
    parts = {
        place(0, "ours", "cells", "seen"): label_parts(first),
        place(0, "other", "cells", "seen"): label_parts(second._replace(labels=list("ABCDEF"))),
    }
    with pytest.raises(DataError, match="different labels"):
        compare(make_scores(rows), parts, "ours")


def test_shares_of_the_way_to_the_ceiling():
    rows = [
        (*place(0, name, "cells", "seen", "", metric), value)
        for metric, values in {
            "ate_rho": {"global_mean": 0.2, "ceiling": 0.8, "ours": 0.5},
            "rmse": {"global_mean": 0.4, "ceiling": 0.0, "ours": 0.1},
            "ate_r2": {"global_mean": 0.5, "ceiling": 0.3, "ours": 0.9},
            "jaccard_top20": {"global_mean": 0.5, "ours": 0.9},
        }.items()
        for name, value in values.items()
    ]
    found = normalise(make_scores(rows)).set_index(["metric", "predictor"])["normalised"]
    assert found["ate_rho", "ours"] == pytest.approx(0.5)
    assert found["rmse", "ours"] == pytest.approx(0.75)
    assert found["ate_rho", "ceiling"] == pytest.approx(1)
    # No ceiling, or one that is no better than the floor: no share.
    assert not {"ate_r2", "jaccard_top20"} & set(found.index.get_level_values("metric"))


def test_another_programs_ranks_are_compared_where_it_was_asked():
    rows = []
    for i, name in enumerate(["a", "b", "c", "d"]):
        rows.append((*place(0, name, "cells", "seen", "", "ate_rho_per_perturbation"), i))
        rows.append((*place(0, name, "cells", "seen", "", "mae"), -i))
        # Under a seed that the other program has not seen, ranks are upside down.
        rows.append((*place(1, name, "cells", "seen", "", "ate_rho_per_perturbation"), -100 * i))
        rows.append((*place(0, name, "cell-eval", "seen", "", "pearson_delta"), 10 + i**3))
        rows.append((*place(0, name, "cell-eval", "seen", "", "mae_delta"), [0, 1, 2, 9][i]))
    found = rank_agreement(make_scores(rows)).set_index("metric")
    assert set(found.index) == {"ate_rho_per_perturbation", "mae"}
    assert found.loc["ate_rho_per_perturbation", "spearman"] == pytest.approx(1)
    assert found.loc["mae", "spearman"] == pytest.approx(-1)
    assert found.loc["mae", ["best_here", "best_there"]].tolist() == ["d", "a"]
    assert set(found["n_predictors"]) == {4}
    fewer = rank_agreement(make_scores(rows), without=["d"]).set_index("metric")
    assert fewer.loc["mae", "best_here"] == "c"
