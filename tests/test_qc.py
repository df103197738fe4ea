"""QC flags against their definition, thresholds on training cells only, and confounding."""

from __future__ import annotations

import json
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, fisher_exact

from cradle_pyro.data.confounding import confounding_report, warn_confounding
from cradle_pyro.data.qc import (
    QCCut,
    QCPrefixes,
    QCThresholds,
    annotate_artifacts,
    fit_thresholds,
    qc_flags,
    qc_metrics,
    qc_severities,
)
from cradle_pyro.errors import DataError, DataWarning

GENES = (
    *(f"MT-{i}" for i in range(5)),
    *(f"RPS{i}" for i in range(5)),
    *(f"RPL{i}" for i in range(5)),
    "HBA1",
    "HBB",
    "HBEGF",
    *(f"G{i}" for i in range(42)),
)
FLAG_METRICS = {
    "low_counts": ("counts", -1, np.log1p),
    "low_genes": ("genes", -1, np.log1p),
    "high_mito": ("pct_mito", 1, np.asarray),
    "high_ribo": ("pct_ribo", 1, np.asarray),
    "high_hb": ("pct_hb", 1, np.asarray),
}


def make_screen(n_cells: int = 300, seed: int = 0, bad: float = 0.15) -> anndata.AnnData:
    """Two kinds of cells; some lose depth and gain mitochondrial counts."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(1.0, 4.0, size=(2, len(GENES)))
    mean = rates[rng.integers(0, 2, n_cells)] * rng.lognormal(0, 0.2, size=(n_cells, 1))
    is_bad = rng.random(n_cells) < bad
    mean[is_bad] *= 0.15
    mean[np.ix_(is_bad, range(5))] *= 30
    adata = anndata.AnnData(
        sp.csr_matrix(rng.poisson(mean).astype(np.float32)),
        obs=pd.DataFrame(
            {
                "split": rng.choice(["train", "test"], n_cells),
                "condition": rng.choice(["control", "A"], n_cells),
            },
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=list(GENES)),
    )
    adata.obs["is_bad"] = is_bad
    return adata


def annotate(adata: anndata.AnnData, n_mads: float = 3.0, **options: object) -> QCThresholds:
    return annotate_artifacts(adata, n_mads, **{"doublets": False, **options})


def expected_flags(metrics: dict, n_mads: float, fit: np.ndarray) -> dict[str, np.ndarray]:
    """The definition: beyond the median by more than n unscaled MADs."""
    flags = {}
    for flag, (metric, sign, scale) in FLAG_METRICS.items():
        values = scale(metrics[metric])
        median = np.median(values[fit])
        mad = np.median(np.abs(values[fit] - median))
        flags[flag] = sign * (values - median) > n_mads * mad
    return flags


# ---------------------------------------------------------------------------------------- metrics


def test_metrics_are_sums_and_percentages(rng):
    dense = rng.poisson(1.0, size=(20, len(GENES)))
    found = qc_metrics(sp.csr_array(dense), GENES)
    total = dense.sum(axis=1)
    np.testing.assert_allclose(found["counts"], total)
    np.testing.assert_allclose(found["genes"], (dense > 0).sum(axis=1))
    np.testing.assert_allclose(found["pct_mito"], 100 * dense[:, :5].sum(axis=1) / total)
    np.testing.assert_allclose(found["pct_ribo"], 100 * dense[:, 5:15].sum(axis=1) / total)
    # HBEGF is no haemoglobin.
    np.testing.assert_allclose(found["pct_hb"], 100 * dense[:, 15:17].sum(axis=1) / total)


def test_a_given_library_is_the_total_and_the_denominator():
    found = qc_metrics([[2, 2]], ["MT-1", "G"], library=[100.0])
    assert found["counts"].tolist() == [100.0]
    assert found["pct_mito"].tolist() == [2.0]


def test_empty_cells_have_percentages_of_zero():
    assert qc_metrics([[0, 0]], ["MT-1", "G"])["pct_mito"].tolist() == [0.0]


def test_mouse_prefixes():
    names = ["mt-Co1", "Rpl3", "Hbb-bs", "MT-CO1"]
    found = QCPrefixes.mouse().masks(names)
    assert {part: mask.argmax() for part, mask in found.items()} == {"mito": 0, "ribo": 1, "hb": 2}
    assert sum(mask.sum() for mask in found.values()) == 3


# ------------------------------------------------------------------------------- flags, severity


@pytest.mark.parametrize("n_mads", [3, 4, 5])
@pytest.mark.parametrize("fit_on", [None, "split=train"])
def test_flags_follow_the_definition(n_mads, fit_on):
    adata = make_screen()
    annotate(adata, n_mads, fit_on=fit_on)
    fit = np.ones(adata.n_obs, bool) if fit_on is None else (adata.obs["split"] == "train").values
    expected = expected_flags(qc_metrics(adata.X, GENES), n_mads, fit)
    assert list(adata.uns["cradle_qc"]["flags"]) == list(expected)
    for flag, failing in expected.items():
        np.testing.assert_array_equal(adata.obs[f"cradle_qc_{flag}"], failing)
    union = np.logical_or.reduce(list(expected.values()))
    np.testing.assert_array_equal(adata.obs["cradle_artifact"], union)
    assert adata.obs["cradle_artifact"].dtype == bool
    assert adata.n_obs == 300


def test_damaged_cells_are_found():
    adata = make_screen()
    annotate(adata, 5)
    assert adata.obs["cradle_artifact"][adata.obs["is_bad"]].mean() > 0.95
    assert adata.obs["cradle_artifact"][~adata.obs["is_bad"]].mean() < 0.05


@given(
    values=st.lists(st.floats(0, 100), min_size=5, max_size=40),
    n_mads=st.floats(0.1, 6),
    name=st.sampled_from(["counts", "genes", "pct_mito"]),
)
def test_severity_is_zero_where_passing_and_grows_with_distance(values, n_mads, name):
    metrics = {name: np.array(values)}
    thresholds = fit_thresholds(metrics, n_mads)
    for flag, severity in qc_severities(metrics, thresholds).items():
        failing = qc_flags(metrics, thresholds)[flag]
        np.testing.assert_array_equal(severity > 0, failing)
        assert severity.max() <= 1
        order = np.argsort(np.abs(metrics[name] - np.median(metrics[name]))[failing])
        on_one_side = severity[failing][order]
        assert (np.diff(on_one_side) >= -1e-12).all()


def test_severity_is_one_half_at_twice_the_threshold():
    thresholds = fit_thresholds({"pct_mito": np.array([9.0, 10.0, 11.0])}, 3)
    severity = qc_severities({"pct_mito": np.array([13.0, 13.01, 16.0, 1e9])}, thresholds)
    np.testing.assert_allclose(severity["high_mito"], [0, 0.01, 0.5, 1], atol=1e-6)


def test_a_value_at_the_threshold_passes():
    cuts = {"low_counts": QCCut(float(np.log1p(7.0)), 3.0, 0.5), "high_mito": QCCut(9.0, 3.0, 2.0)}
    metrics = {"counts": np.array([6.0, 7.0, 8.0]), "pct_mito": np.array([8.0, 9.0, 10.0])}
    flags = qc_flags(metrics, QCThresholds(3.0, cuts))
    assert flags["low_counts"].tolist() == [True, False, False]
    assert flags["high_mito"].tolist() == [False, False, True]


def test_doublet_severity_runs_from_the_cut_to_one():
    thresholds = fit_thresholds({"doublet_score": np.array([0.1])}, doublet_cut=0.5)
    metrics = {"doublet_score": np.array([0.5, 0.75, 1.0, np.nan])}
    assert qc_flags(metrics, thresholds)["doublet"].tolist() == [False, True, True, False]
    assert qc_severities(metrics, thresholds)["doublet"].tolist() == [0, 0.5, 1, 0]


@pytest.mark.parametrize("n_mads", [4, 5])
def test_thresholds_at_another_number_of_mads_are_those_fitted_there(n_mads):
    metrics = qc_metrics(make_screen().X, GENES)
    assert fit_thresholds(metrics, 3).at(n_mads) == fit_thresholds(metrics, n_mads)


def test_a_metric_that_does_not_vary_gives_no_flag_and_a_warning():
    adata = make_screen()
    adata.obs["total"] = 1000.0
    with pytest.warns(DataWarning, match="low_counts .*share one value of counts"):
        thresholds = annotate(adata, metrics={"counts": "total"})
    assert "low_counts" not in thresholds.flags
    assert "cradle_qc_low_counts" not in adata.obs
    assert "low_counts" in adata.uns["cradle_qc"]["left_out"]


def test_flags_without_such_genes_are_left_out_silently():
    adata = make_screen()[:, 18:].copy()
    assert annotate(adata).flags == ("low_counts", "low_genes")
    assert "high_mito" in adata.uns["cradle_qc"]["left_out"]


def test_a_flag_that_is_biology_can_be_left_out():
    adata = make_screen()
    thresholds = annotate(adata, flags=["low_counts", "high_mito"])
    assert thresholds.flags == ("low_counts", "high_mito")
    union = adata.obs["cradle_qc_low_counts"] | adata.obs["cradle_qc_high_mito"]
    np.testing.assert_array_equal(adata.obs["cradle_artifact"], union)


# ---------------------------------------------------------------------------- containers, records


def test_every_container_gives_the_same_annotation(tmp_path):
    adata = make_screen()
    annotate(adata)
    expected = adata.obs.filter(like="cradle_")
    adata.layers["counts"] = adata.X.copy()
    variants = [
        anndata.AnnData(adata.X.toarray(), obs=adata.obs[["split"]], var=adata.var),
        anndata.AnnData(sp.csc_matrix(adata.X), obs=adata.obs[["split"]], var=adata.var),
        anndata.AnnData(sp.csr_array(adata.X), obs=adata.obs[["split"]], var=adata.var),
    ]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    variants.append(anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r"))
    for variant in variants:
        annotate(variant)
        pd.testing.assert_frame_equal(variant.obs.filter(like="cradle_"), expected)
    variants[-1].file.close()
    adata.X = None
    annotate(adata, layer="counts")
    pd.testing.assert_frame_equal(adata.obs.filter(like="cradle_"), expected)


def test_a_view_is_annotated_without_touching_its_parent():
    adata = make_screen()
    part = adata[:100]
    annotate(part)
    assert "cradle_artifact" in part.obs
    assert "cradle_artifact" not in adata.obs


def test_annotating_again_replaces_the_columns():
    adata = make_screen()
    annotate(adata)
    fresh = make_screen()
    annotate(adata, 5, flags=["high_mito"])
    annotate(fresh, 5, flags=["high_mito"])
    pd.testing.assert_frame_equal(adata.obs, fresh.obs)


def test_thresholds_survive_h5ad_and_json(tmp_path):
    adata = make_screen()
    thresholds = annotate(adata)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    record = anndata.read_h5ad(tmp_path / "screen.h5ad").uns["cradle_qc"]
    assert QCThresholds.from_dict(record) == thresholds
    text = json.dumps(thresholds.to_dict(), allow_nan=False)
    assert QCThresholds.from_dict(json.loads(text)) == thresholds


def test_reused_thresholds_give_the_same_flags_on_the_same_cells():
    first, second = make_screen(), make_screen()
    annotate(first, 4)
    used = annotate(second, thresholds=first.uns["cradle_qc"])
    assert used.n_mads == 4
    pd.testing.assert_frame_equal(first.obs, second.obs)


def test_existing_columns_are_used_and_their_counts_are_the_denominator():
    adata = make_screen()
    adata.obs["total"] = 2.0 * np.asarray(adata.X.sum(axis=1)).ravel()
    adata.obs["mito"] = np.linspace(0, 10, adata.n_obs)
    annotate(adata, metrics={"counts": "total", "pct_mito": "mito"})
    own = qc_metrics(adata.X, GENES)
    np.testing.assert_allclose(adata.obs["cradle_qc_metric_pct_mito"], adata.obs["mito"])
    np.testing.assert_allclose(adata.obs["cradle_qc_metric_counts"], adata.obs["total"])
    np.testing.assert_allclose(adata.obs["cradle_qc_metric_pct_ribo"], own["pct_ribo"] / 2)


# --------------------------------------------------------------------------------------- doublets


def make_doublets(n_cells: int = 400, n_doublets: int = 30, seed: int = 0) -> anndata.AnnData:
    """Three distinct kinds of cells, and sums of two of different kinds as the last cells."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.4, 3.0, size=(3, 150))
    counts = rng.poisson(rates[rng.integers(0, 3, n_cells)])
    one, other = (
        rng.poisson(rates[[0, 1, 2] * (n_doublets // 3)]),
        rates[[1, 2, 0] * (n_doublets // 3)],
    )
    doublets = one + rng.poisson(other)
    return anndata.AnnData(sp.csr_array(np.vstack([counts, doublets]).astype(np.float32)))


def test_doublets_score_higher_and_numpy_state_is_kept():
    adata = make_doublets()
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is the subject
    annotate(adata, doublets=True, seed=1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    flagged = adata.obs["cradle_qc_doublet"].to_numpy()
    assert flagged[400:].mean() > 0.8
    assert flagged[:400].mean() < 0.1
    again = make_doublets()
    annotate(again, doublets=True, seed=1)
    pd.testing.assert_frame_equal(adata.obs, again.obs)


def test_the_score_threshold_is_reused():
    first, second = make_doublets(), make_doublets(seed=5)
    thresholds = annotate(first, doublets=True)
    annotate(second, doublets="auto", thresholds=thresholds)
    cut = thresholds.cuts["doublet"].cut
    scores = second.obs["cradle_qc_metric_doublet_score"]
    np.testing.assert_array_equal(second.obs["cradle_qc_doublet"], scores > cut)


def test_too_few_cells_for_doublets_is_a_warning():
    adata = make_doublets(n_cells=3, n_doublets=3)
    with pytest.warns(DataWarning, match="doublets could not be scored"):
        thresholds = annotate(adata, doublets=True)
    assert "doublet" not in thresholds.flags
    assert "cradle_qc_doublet" not in adata.obs


def test_doublet_calls_of_the_user_are_used():
    adata = make_screen()
    adata.obs["called"] = np.arange(adata.n_obs) < 7
    annotate(adata, metrics={"doublet_score": "called"})
    np.testing.assert_array_equal(adata.obs["cradle_qc_doublet"], adata.obs["called"])


# ------------------------------------------------------------------------------------- mistake 09


@pytest.mark.parametrize("doublets", [False, True])
def test_mistake_09_thresholds_see_training_cells_only(doublets):
    adata = make_doublets() if doublets else make_screen()
    is_train = np.random.default_rng(0).random(adata.n_obs) < 0.6
    changed = adata.copy()
    counts = changed.X.toarray()
    counts[~is_train] = np.random.default_rng(1).poisson(20.0, size=counts[~is_train].shape)
    changed.X = sp.csr_array(counts)
    found = [annotate(a, fit_on=is_train, doublets=doublets) for a in (adata, changed)]
    assert found[0] == found[1]
    pd.testing.assert_frame_equal(
        adata.obs[is_train].filter(like="cradle_"), changed.obs[is_train].filter(like="cradle_")
    )
    # The same change does move thresholds fitted on all cells: the test can fail.
    on_all = [annotate(a, doublets=doublets) for a in (adata, changed)]
    assert on_all[0] != on_all[1]


def test_mistake_09_confounding_of_failure_and_perturbation_is_said():
    labels = np.repeat(["control", "harmless", "toxic"], 200)
    failing = np.random.default_rng(0).random(600) < np.repeat([0.1, 0.1, 0.5], 200)
    report = confounding_report(labels, failing)
    assert report.index.tolist()[:2] == ["control", "toxic"]
    assert report["differs"].to_dict() == {"control": False, "toxic": True, "harmless": False}
    with pytest.warns(DataWarning, match="1 of 2 perturbations .'toxic'"):
        warn_confounding(report)


# ------------------------------------------------------------------------------------ confounding


def make_report(**options: object) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    labels = rng.choice(["control", "A", "B", "C"], 400, p=[0.5, 0.3, 0.15, 0.05])
    failing = rng.random(400) < np.where(labels == "B", 0.6, 0.2)
    return confounding_report(labels, failing, **options)


def test_intervals_and_tests_agree_with_scipy():
    report = make_report()
    base = report.loc["control", ["n_failing", "n_cells"]].astype(int).tolist()
    for label, row in report.iterrows():
        n_failing, n_cells = int(row["n_failing"]), int(row["n_cells"])
        wilson = binomtest(n_failing, n_cells).proportion_ci(method="wilson")
        np.testing.assert_allclose([row["share_low"], row["share_high"]], wilson, atol=1e-12)
        if label == "control":
            continue
        table = [[n_failing, n_cells - n_failing], [base[0], base[1] - base[0]]]
        tails = [fisher_exact(table, alternative=side).pvalue for side in ("less", "greater")]
        np.testing.assert_allclose(row["p_value"], min(1, 2 * min(tails)), rtol=1e-9)
        assert row["difference_low"] < row["difference"] < row["difference_high"]
        assert row["odds_low"] < row["odds_ratio"] < row["odds_high"]


def test_newcombe_interval_of_his_example():
    # Newcombe 1998, table II, method 10: 56/70 against 48/80 gives 0.0524 to 0.3339.
    labels = ["A"] * 70 + ["control"] * 80
    failing = np.r_[np.arange(70) < 56, np.arange(80) < 48]
    row = confounding_report(labels, failing).loc["A"]
    found = row[["difference", "difference_low", "difference_high"]].astype(float)
    np.testing.assert_allclose(found, [0.2, 0.0524, 0.3339], atol=5e-5)


def test_no_overlap_is_said():
    labels = np.repeat(["control", "A", "B"], 40)
    failing = np.r_[np.arange(40) < 20, np.ones(40, bool), np.arange(40) < 20]
    report = confounding_report(labels, failing)
    assert report["few_passing"].to_dict() == {"control": False, "A": True, "B": False}
    with pytest.warns(DataWarning, match="1 have fewer than 5 passing cells .'A'"):
        warn_confounding(report)


def test_controls_confined_to_a_batch_are_said():
    labels = np.repeat(["NT1", "NT2", "A"], 30)
    batch = np.r_[np.zeros(60), np.arange(30) % 3].astype(int)
    failing = np.arange(90) % 2 == 0
    report = confounding_report(
        labels, failing, control=["NT1", "NT2"], covariates={"batch": batch}
    )
    assert report.attrs["control_levels"] == {"batch": (1, 3)}
    np.testing.assert_allclose(report["share_without_control"], [0, 2 / 3])
    with pytest.warns(DataWarning, match="controls are found in 1 of 3 levels of 'batch'"):
        warn_confounding(report)


def test_nothing_found_nothing_said():
    labels = np.repeat(["control", "A"], 100)
    report = confounding_report(
        labels, np.arange(200) % 4 == 0, covariates={"batch": np.arange(200) % 2}
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_confounding(report)
    assert not said


# ----------------------------------------------------------------------------------------- errors


def scaled(adata: anndata.AnnData) -> anndata.AnnData:
    adata.X = adata.X * 0.5
    return adata


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_mads": 0}, "positive number"),
        ({"layer": "counts"}, "counts"),
        ({"fit_on": "splitt=train"}, "did you mean 'split'"),
        ({"fit_on": "split=val"}, "found none"),
        ({"fit_on": [True, False]}, "one entry per cell"),
        ({"fit_on": [0, 300]}, "outside 0 to 299"),
        ({"fit_on": [0.5]}, "boolean mask, integer positions"),
        ({"flags": ["high_mitto"]}, "did you mean 'high_mito'"),
        ({"metrics": {"count": "x"}}, "did you mean 'counts'"),
        ({"metrics": {"counts": "x"}}, "no 'x'"),
        ({"metrics": {"counts": "condition"}}, "numbers >= 0"),
        ({"gene_symbols": "symbol"}, "no 'symbol'"),
        ({"doublets": "yes"}, "True, False or 'auto'"),
        ({"thresholds": {"n_mads": 3}}, "Run annotate_artifacts first"),
    ],
)
def test_impossible_requests_are_refused_with_a_reason(options, words):
    with pytest.raises(DataError, match=words):
        annotate(make_screen(), **options)


def test_counts_that_are_not_raw_are_refused():
    with pytest.raises(DataError, match="raw counts"):
        annotate(scaled(make_screen()))


def test_reuse_needs_the_same_metrics():
    thresholds = annotate(make_screen())
    without_mito = make_screen()[:, 5:].copy()
    with pytest.raises(DataError, match="'pct_mito'"):
        annotate(without_mito, thresholds=thresholds)


def test_a_report_needs_controls():
    with pytest.raises(DataError, match="needs control cells"):
        confounding_report(["A", "B"], [True, False])


# ----------------------------------------------------------------------------------- real screens


@pytest.mark.slow
def test_papalexi_with_its_whole_transcriptome_columns(screens):
    adata = anndata.read_h5ad(screens / "papalexi2021_eccite.h5ad")
    full = {"counts": "n_counts_full", "genes": "n_genes_full", "pct_mito": "pct_mito_full"}
    thresholds = annotate_artifacts(adata, metrics=full)
    assert {"low_counts", "low_genes", "high_mito", "doublet"} <= set(thresholds.flags)
    # Already filtered by its authors: few cells are far out, but some are.
    assert 0.02 < adata.obs["cradle_artifact"].mean() < 0.15
    values = adata.obs["pct_mito_full"].to_numpy()
    median = np.median(values)
    cut = median + 3 * np.median(np.abs(values - median))
    np.testing.assert_array_equal(adata.obs["cradle_qc_high_mito"], values > cut)


@pytest.mark.slow
def test_norman_haemoglobin_is_biology_and_the_report_says_so(screens):
    # Some pairs turn K562 cells erythroid: their haemoglobin is the effect, not damage.
    adata = anndata.read_h5ad(screens / "norman2019_crispra_combos.h5ad")
    annotate(adata)
    report = confounding_report(adata.obs["perturbation"], adata.obs["cradle_qc_high_hb"])
    assert report["differs"]["CBL+CNN1"]
    assert report["failing_share"]["CBL+CNN1"] > 0.5
