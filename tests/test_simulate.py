"""The simulated screen keeps its laws, and corruption changes only what it says it changes."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from cradle_pyro.errors import DataError
from cradle_pyro.simulate import ARTIFACT_KINDS, corrupt, simulate_perturbseq


def make_screen(**changes: float) -> AnnData:
    settings = {"n_cells": 300, "n_genes": 60, "n_perturbations": 4, "n_pairs": 2} | changes
    return simulate_perturbseq(**settings)


@pytest.fixture(scope="module")
def screen() -> AnnData:
    """A screen large enough for statistical statements; tests do not change it."""
    return simulate_perturbseq(n_cells=3000, n_genes=400, n_perturbations=12, n_pairs=6, seed=3)


def make_real(*, n_cells: int = 60, n_genes: int = 40, n_mito: int = 5, seed: int = 0) -> AnnData:
    rng = np.random.default_rng(seed)
    counts = sparse.csr_matrix(rng.poisson(6.0, size=(n_cells, n_genes)).astype(np.float32))
    adata = AnnData(counts)
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.var_names = [f"MT-{i}" if i < n_mito else f"G{i}" for i in range(n_genes)]
    return adata


def total(matrix: object) -> np.ndarray:
    return np.asarray(matrix.sum(axis=1)).ravel()


def log2_rate(rate: np.ndarray) -> np.ndarray:
    return np.log2(1 + 1e4 * rate)


def mad_flags(adata: AnnData) -> dict[str, np.ndarray]:
    """Median ± 3 unscaled MAD, written here independently of the package's own QC."""
    counts = adata.layers["counts"]
    umis = total(counts)
    percent = {k: 100 * total(counts[:, adata.var[k].to_numpy()]) / umis for k in ("mt", "ribo")}
    metrics = {"counts": -np.log1p(umis), "genes": -np.log1p(np.diff(counts.indptr)), **percent}
    flags = {}
    for name, values in metrics.items():
        centre = np.median(values)
        flags[name] = values > centre + 3 * np.median(np.abs(values - centre))
    return flags


def failing(adata: AnnData) -> np.ndarray:
    return np.any(list(mad_flags(adata).values()), axis=0)


# The screen and its truth


def test_counts_are_whole_and_sparse_and_labels_are_canonical(screen):
    for counts in (screen.X, screen.layers["counts"]):
        assert sparse.issparse(counts)
        assert counts.format == "csr"
        assert counts.dtype == np.float32
        assert (counts.data > 0).all()
        assert (counts.data % 1 == 0).all()
    assert (total(screen.X) > 0).all()
    labels = set(screen.obs["perturbation"])
    assert labels == {"control", *screen.uns["cradle_truth"]["ate_labels"]}
    for label in labels - {"control"}:
        names = label.split("+")
        assert names == sorted(names)
        assert set(names) <= set(screen.var_names[screen.var["target"]])
    assert 0.09 < (screen.obs["perturbation"] == "control").mean() < 0.15


def test_rows_of_true_rates_sum_to_one(screen):
    for name in ("true_rate", "true_rate_control"):
        rate = screen.layers[name]
        assert rate.dtype == np.float32
        assert rate.min() > 0
        np.testing.assert_allclose(rate.sum(axis=1, dtype=np.float64), 1, atol=1e-5)


def test_control_cells_are_their_own_control(screen):
    control = (screen.obs["perturbation"] == "control").to_numpy()
    rate, other = screen.layers["true_rate"], screen.layers["true_rate_control"]
    np.testing.assert_array_equal(rate[control], other[control])
    assert (rate[~control] != other[~control]).any(axis=1).all()


def test_same_seed_same_screen_and_other_seed_another():
    first, again, other = make_screen(seed=1), make_screen(seed=1), make_screen(seed=2)
    assert (first.X != again.X).nnz == 0
    np.testing.assert_array_equal(first.layers["true_rate"], again.layers["true_rate"])
    assert first.obs.equals(again.obs)
    np.testing.assert_array_equal(
        first.uns["cradle_truth"]["ate"], again.uns["cradle_truth"]["ate"]
    )
    assert (first.X != other.X).nnz > first.n_obs


def test_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    make_screen(seed=1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_clean_counts_have_the_true_rate_as_their_mean():
    adata = make_screen(n_cells=4000, artifact_share=0.0, median_library=20000.0)
    library = adata.obs["true_library"].to_numpy()[:, None]
    expected = (library * adata.layers["true_rate"]).sum(axis=0)
    observed = np.asarray(adata.X.sum(axis=0)).ravel()
    # Gamma noise of shape about 6 leaves a standard error near 0.7 % over 4,000 cells.
    np.testing.assert_allclose(observed / expected, 1, atol=0.06)
    assert abs(np.mean(observed / expected) - 1) < 0.01


def test_counts_are_overdispersed_with_the_stated_dispersion():
    adata = make_screen(n_cells=4000, artifact_share=0.0, median_library=20000.0)
    mean = adata.obs["true_library"].to_numpy()[:, None] * adata.layers["true_rate"]
    residual = adata.X.toarray() - mean
    excess = (residual**2 - mean).sum(axis=0) / (mean**2).sum(axis=0)
    theta = adata.var["true_dispersion"].to_numpy()
    plain = ~adata.var[["mt", "ribo", "hb"]].any(axis=1).to_numpy()
    ratio = np.median((excess * theta)[plain])
    assert 0.85 < ratio < 1.15


def test_target_is_knocked_down_in_truth_and_counts(screen):
    truth = screen.uns["cradle_truth"]
    label = screen.obs["perturbation"].to_numpy().astype(str)
    counts = screen.layers["counts"]
    clean = (screen.obs["true_artifact"] == "none").to_numpy()
    observed = []
    for i, target in enumerate(truth["mask_labels"]):
        gene = screen.var_names.get_loc(target)
        assert truth["mask"][i, gene]
        assert truth["ate"][i, gene] < -0.7
        fraction = counts[:, gene].toarray().ravel() / total(counts)
        mine, control = (fraction[clean & (label == x)].mean() for x in (target, "control"))
        observed.append(np.log2((mine + 1e-5) / (control + 1e-5)))
    assert np.mean(observed) < -1.0


def test_ate_is_what_the_stored_rates_say(screen):
    truth = screen.uns["cradle_truth"]
    effect = log2_rate(screen.layers["true_rate"]) - log2_rate(screen.layers["true_rate_control"])
    label = screen.obs["perturbation"].to_numpy().astype(str)
    for i, name in enumerate(truth["ate_labels"]):
        mine = effect[label == name]
        error = mine.std(axis=0, ddof=1) / np.sqrt(len(mine))
        # The population's own Monte-Carlo error is small beside that of one label's cells.
        z = (mine.mean(axis=0) - truth["ate"][i]) / (error + 1e-3)
        assert np.abs(z).max() < 6
        assert np.sqrt(np.mean(z**2)) < 1.6


def test_ate_lies_where_the_mask_says(screen):
    truth = screen.uns["cradle_truth"]
    mask, ate = truth["mask"], truth["ate"][: len(truth["mask"])]
    assert mask.mean() < 0.15
    inside, outside = (ate[mask] ** 2).mean(), (ate[~mask] ** 2).mean()
    assert inside > 20 * outside


def test_individual_effects_depend_on_the_cell(screen):
    truth = screen.uns["cradle_truth"]
    strongest = np.argmax(truth["strength"])
    label = truth["mask_labels"][strongest]
    cells = (screen.obs["perturbation"] == label).to_numpy()
    effect = log2_rate(screen.layers["true_rate"]) - log2_rate(screen.layers["true_rate_control"])
    moved = np.abs(truth["ate"][strongest]) > 0.5
    size = np.abs(effect[cells][:, moved]).mean(axis=1)
    assert size.std() / size.mean() > 0.25
    penetrance = screen.obs["true_penetrance"].to_numpy()[cells]
    assert np.corrcoef(size, penetrance)[0, 1] > 0.3
    escaped = penetrance < 0.2
    assert size[escaped].mean() < 0.5 * size[~escaped].mean()


def test_pairs_interact_as_their_kind_says():
    adata = simulate_perturbseq(n_cells=800, n_genes=500, n_perturbations=12, n_pairs=18, seed=0)
    truth = adata.uns["cradle_truth"]
    effect = dict(zip(truth["ate_labels"], truth["ate"][:, ~adata.var["target"]], strict=True))
    mask = dict(zip(truth["mask_labels"], truth["mask"][:, ~adata.var["target"]], strict=True))
    kinds = truth["interactions"]["kind"]
    assert (kinds == "additive").sum() == 12
    assert {"synergy", "buffering", "masking"} < set(kinds)
    for pair, kind in zip(truth["interactions"]["pair"], kinds, strict=True):
        singles = np.stack([effect[name] for name in pair.split("+")], axis=1)
        (low, high), *_ = np.linalg.lstsq(singles, effect[pair])
        low, high = sorted((low, high))
        # Renormalisation moves all other genes together, but only new targets stand out.
        others = effect[pair][~np.logical_or(*(mask[name] for name in pair.split("+")))]
        assert (np.abs(others - np.median(others)).max() > 0.4) == (kind == "synergy")
        if kind == "additive":
            assert 0.8 < low <= high < 1.15
        elif kind == "synergy":
            assert 1.05 < low <= high < 1.5
        elif kind == "buffering":
            assert 0.4 < low <= high < 0.8
        else:
            assert abs(low) < 0.1
            assert 0.9 < high < 1.1


def test_no_effect_size_leaves_only_the_knock_down():
    truth = make_screen(effect_size=0.0).uns["cradle_truth"]
    singles = truth["ate"][: len(truth["mask"])]
    hit = truth["mask"]
    assert hit.sum() == len(hit)
    assert np.abs(singles[hit]).min() > 0.7
    # Others rise a little when the target's share is given to them.
    assert np.abs(singles[~hit]).max() < 0.2


# Artifacts


def test_artifacts_have_their_share_and_are_more_frequent_where_perturbations_are_strong(screen):
    bad = (screen.obs["true_artifact"] != "none").to_numpy()
    assert 0.15 < bad.mean() < 0.25
    assert set(screen.obs["true_artifact"]) == {"none", *ARTIFACT_KINDS}
    degree = screen.obs["true_artifact_degree"].to_numpy()
    np.testing.assert_array_equal(degree > 0, bad)
    assert degree[bad].std() > 0.1
    truth = screen.uns["cradle_truth"]
    risk = dict(
        zip(truth["artifact_probability_labels"], truth["artifact_probability"], strict=True)
    )
    expected = screen.obs["perturbation"].astype(str).map(risk).to_numpy()
    np.testing.assert_allclose(expected.mean(), 0.2, atol=1e-3)
    high = expected > np.median(expected)
    assert bad[high].mean() > 1.3 * bad[~high].mean()
    assert max(risk, key=risk.get) != "control"
    assert risk["control"] == min(risk.values())


def test_no_confounding_gives_every_label_the_same_risk():
    risk = make_screen(confounding=0.0).uns["cradle_truth"]["artifact_probability"]
    np.testing.assert_allclose(risk, 0.2, atol=1e-4)


def test_most_artifacts_fail_the_mad_rule_and_few_clean_cells_do(screen):
    fail = failing(screen)
    kind = screen.obs["true_artifact"].to_numpy().astype(str)
    assert fail[kind == "leaking"].mean() > 0.8
    assert fail[kind == "low_capture"].mean() > 0.65
    assert fail[kind == "none"].mean() < 0.12
    assert 0.14 < fail.mean() < 0.3


def test_each_artifact_has_its_mark(screen):
    counts = screen.layers["counts"]
    umis = total(counts)
    kind = screen.obs["true_artifact"].to_numpy().astype(str)
    relative = umis / screen.obs["true_library"].to_numpy()
    share = {k: total(counts[:, screen.var[k].to_numpy()]) / umis for k in ("mt", "ribo", "hb")}
    clean = kind == "none"

    def ratio(values: np.ndarray, name: str) -> float:
        return np.median(values[kind == name]) / np.median(values[clean])

    assert ratio(relative, "low_capture") < 0.6
    assert ratio(relative, "leaking") < 0.7
    assert ratio(relative, "doublet") > 1.4
    assert ratio(share["mt"], "leaking") > 1.5
    assert ratio(share["hb"], "ambient") > 2
    assert 0.8 < ratio(share["mt"], "low_capture") < 1.2


def test_raw_failing_profiles_lie_far_from_the_clean_truth(screen):
    counts = screen.layers["counts"]
    raw = np.log1p(1e4 * counts.toarray() / total(counts)[:, None])
    error = np.square(raw - np.log1p(1e4 * screen.layers["true_rate"])).mean(axis=1)
    fail = failing(screen)
    assert 0.8 < np.sqrt(error[fail].mean()) < 1.6
    assert error[fail].mean() > 1.5 * error[~fail].mean()


def test_genes_are_recognised_by_their_names():
    adata = simulate_perturbseq(n_cells=300, seed=1)
    assert adata.var_names.is_unique
    assert (adata.var_names.str.startswith("MT-") == adata.var["mt"]).all()
    assert (adata.var_names.str.match(r"RP[SL]\d") == adata.var["ribo"]).all()
    assert adata.var["mt"].sum() == 13
    assert adata.var["ribo"].sum() >= 20
    assert adata.var["hb"].sum() >= 2


def test_screen_survives_writing_and_reading(tmp_path):
    adata = make_screen(n_pairs=0)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert (back.X != adata.X).nnz == 0
    for key in ("ate", "mask", "strength", "artifact_probability"):
        np.testing.assert_array_equal(back.uns["cradle_truth"][key], adata.uns["cradle_truth"][key])
    assert list(back.uns["cradle_truth"]["ate_labels"]) == list(
        adata.uns["cradle_truth"]["ate_labels"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_genes": 20}, "n_genes=20"),
        ({"n_pairs": 7}, "0 to 6 pairs"),
        ({"n_cells": 20}, "n_cells=20"),
        ({"artifact_share": 1.0}, "artifact_share"),
        ({"control_share": 0.0}, "control_share"),
        ({"effect_size": float("nan")}, "effect_size"),
        ({"median_library": 10.0}, "median_library"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        make_screen(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_passing_training_mean_correlates_as_stated_with_the_truth(seed):
    adata = simulate_perturbseq(seed=seed)
    truth = adata.uns["cradle_truth"]
    counts = adata.layers["counts"]
    fraction = sparse.diags_array(1 / total(counts)) @ counts
    train = np.random.default_rng(seed).random(adata.n_obs) < 0.64
    use = train & ~failing(adata)
    label = adata.obs["perturbation"].to_numpy().astype(str)

    def log_mean(name: str) -> np.ndarray:
        return log2_rate(np.asarray(fraction[use & (label == name)].mean(axis=0)).ravel())

    seen = truth["mask_labels"]
    estimate = np.array([log_mean(name) - log_mean("control") for name in seen])
    pearson = np.corrcoef(estimate.ravel(), truth["ate"][: len(seen)].ravel())[0, 1]
    assert 0.70 < pearson < 0.80


# Corruption


@pytest.mark.parametrize(
    "convert",
    [
        sparse.csr_matrix,
        sparse.csc_matrix,
        sparse.csr_array,
        lambda m: m.toarray(),
        lambda m: m.toarray().astype(np.int64),
    ],
)
def test_only_chosen_cells_change_and_counts_stay_whole(convert):
    real = make_real()
    real.X = convert(real.X)
    before = real.X.copy()
    bad = corrupt(real, share=0.4, seed=1)
    assert type(bad.X) is type(before)
    assert bad.X.dtype == before.dtype
    old, new = (np.asarray(sparse.csr_array(m).toarray()) for m in (before, bad.X))
    chosen = (bad.obs["corruption"] != "none").to_numpy()
    assert chosen.sum() == 24
    np.testing.assert_array_equal(old[~chosen], new[~chosen])
    assert (old[chosen] != new[chosen]).any(axis=1).all()
    assert (new >= 0).all()
    assert (new % 1 == 0).all()
    kept = np.asarray(sparse.csr_array(bad.layers["uncorrupted"]).toarray())
    np.testing.assert_array_equal(kept, old)
    np.testing.assert_array_equal(sparse.csr_array(real.X).toarray(), old)
    assert list(real.obs.columns) == []
    np.testing.assert_array_equal(bad.obs["corruption_degree"] > 0, chosen)
    assert set(bad.obs["corruption"]) == {"none", *ARTIFACT_KINDS}


def test_same_seed_same_corruption():
    first, again, other = (corrupt(make_real(), seed=seed) for seed in (1, 1, 2))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert (first.X != other.X).nnz > 0


def test_each_kind_does_what_it_says():
    real = make_real(n_cells=400, n_genes=200, n_mito=20)
    mito = real.var_names.str.startswith("MT-")
    old = real.X.toarray()

    def share_kept(kind: str, genes: np.ndarray) -> np.ndarray:
        bad = corrupt(real, [kind], share=1.0, degree=(0.6, 0.6), seed=2)
        return bad.X.toarray()[:, genes].sum(axis=1) / old[:, genes].sum(axis=1)

    every = np.ones(real.n_vars, dtype=bool)
    np.testing.assert_allclose(share_kept("low_capture", mito).mean(), 0.4, atol=0.02)
    np.testing.assert_allclose(share_kept("low_capture", ~mito).mean(), 0.4, atol=0.02)
    np.testing.assert_array_equal(share_kept("leaking", mito), 1)
    np.testing.assert_allclose(share_kept("leaking", ~mito).mean(), 0.4, atol=0.02)
    np.testing.assert_allclose(share_kept("ambient", every).mean(), 1.0, atol=0.02)
    np.testing.assert_allclose(share_kept("doublet", every).mean(), 1.6, atol=0.02)
    assert (corrupt(real, ["doublet"], share=1.0).X.toarray() >= old).all()
    assert (corrupt(real, ["low_capture"], share=1.0).X.toarray() <= old).all()


def test_ambient_moves_a_cell_towards_the_mean_profile():
    real = make_real(n_cells=100, n_genes=50)
    counts = real.X.toarray()
    counts[:50, :25], counts[50:, 25:] = 0, 0  # two types without a gene in common
    real.X = sparse.csr_matrix(counts)
    bad = corrupt(real, ["ambient"], share=1.0, degree=(0.5, 0.5)).X.toarray()
    foreign = np.where(counts == 0, bad, 0).sum(axis=1) / bad.sum(axis=1)
    np.testing.assert_allclose(foreign.mean(), 0.25, atol=0.03)


def test_doublet_is_another_eligible_cell():
    real = make_real(n_cells=40, n_genes=40)
    real.X = sparse.csr_matrix(np.diag(np.full(40, 1000.0)))  # a cell is known by its only gene
    eligible = np.arange(40) < 10
    for seed in range(5):
        added = corrupt(real, ["doublet"], share=1.0, eligible=eligible, seed=seed).X - real.X
        rows, genes = added.nonzero()
        np.testing.assert_array_equal(rows, np.arange(10))
        assert (rows != genes).all()
        assert (genes < 10).all()
        assert len(set(genes)) > 2


def test_eligible_cells_only_are_changed():
    real = make_real()
    eligible = np.arange(real.n_obs) % 2 == 0
    bad = corrupt(real, share=1.0, eligible=eligible)
    np.testing.assert_array_equal(bad.obs["corruption"] != "none", eligible)


def test_no_cell_is_emptied():
    real = make_real(n_cells=200)
    real.X = sparse.csr_matrix((np.ones(200), (np.arange(200), np.arange(200) % 40)), (200, 40))
    bad = corrupt(real, ["low_capture", "leaking", "ambient"], share=1.0)
    assert (total(bad.X) >= 1).all()
    assert (bad.layers["uncorrupted"] != real.X).nnz == 0


def test_whole_transcriptome_columns_follow_the_molecules():
    real = make_real(n_cells=300)
    real.obs["full"] = 10_000.0
    real.obs["pct"] = 5.0
    degree = (0.6, 0.6)
    expected = {
        "low_capture": (4000, 5.0),
        "leaking": (500 + 0.4 * 9500, 100 * 500 / (500 + 0.4 * 9500)),
        "ambient": (10_000, 5.0),
        "doublet": (16_000, 5.0),
    }
    for kind, (umis, percent) in expected.items():
        bad = corrupt(real, [kind], share=0.5, degree=degree, total_key="full", mito_key="pct")
        chosen = (bad.obs["corruption"] == kind).to_numpy()
        assert (bad.obs.loc[~chosen, ["full", "pct"]] == [10_000, 5]).all(axis=None)
        np.testing.assert_allclose(bad.obs.loc[chosen, "full"].mean(), umis, rtol=0.01)
        np.testing.assert_allclose(bad.obs.loc[chosen, "pct"].mean(), percent, rtol=0.02)
        assert (bad.obs["full"].to_numpy() >= total(bad.X)).all()


def test_leaking_without_mitochondrial_genes_needs_their_share():
    real = make_real(n_mito=0)
    with pytest.raises(DataError, match="mito_key"):
        corrupt(real)
    real.obs["full"], real.obs["pct"] = 10_000, 5.0
    bad = corrupt(real, ["leaking"], share=1.0, total_key="full", mito_key="pct")
    assert (bad.obs["pct"] > 6).all()
    assert bad.obs["full"].dtype == real.obs["full"].dtype


def test_layer_is_corrupted_in_place_of_x():
    screen = make_screen(artifact_share=0.0)
    bad = corrupt(screen, layer="counts", share=0.5)
    assert (bad.X != screen.X).nnz == 0
    assert (bad.layers["counts"] != screen.layers["counts"]).nnz > 0
    assert (bad.layers["uncorrupted"] != screen.layers["counts"]).nnz == 0


def test_backed_screen_gives_the_same_as_one_in_memory(tmp_path):
    real = make_real()
    real.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert (corrupt(backed).X != corrupt(real).X).nnz == 0
    backed.file.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ["leakign"]}, "did you mean 'leaking'"),
        ({"kinds": "leaking"}, "kinds must be a list"),
        ({"kinds": []}, "kinds must be a list"),
        ({"share": 1.5}, "share"),
        ({"degree": (0.9, 0.5)}, "degree"),
        ({"layer": "raw"}, "layer 'raw'"),
        ({"eligible": [True]}, "eligible"),
        ({"total_key": "depth"}, "'depth'"),
        ({"mito_key": "pct"}, "total_key"),
    ],
)
def test_impossible_corruption_is_named(settings, message):
    with pytest.raises(DataError, match=message):
        corrupt(make_real(), **settings)


def test_other_values_than_counts_are_refused():
    real = make_real()
    real.X = real.X * 0.5
    with pytest.raises(DataError, match="whole numbers"):
        corrupt(real)
    low = make_real()
    low.obs["full"] = 3
    with pytest.raises(DataError, match="lower in 60 cells"):
        corrupt(low, total_key="full")
    with pytest.raises(DataError, match="corrupted before"):
        corrupt(corrupt(make_real()))


@pytest.mark.parametrize("name", ["papalexi2021_eccite", "norman2019_crispra_combos"])
def test_real_screens_can_be_corrupted(screens, name):
    adata = anndata.read_h5ad(screens / f"{name}.h5ad")
    mito = "pct_mito_full" if "pct_mito_full" in adata.obs else None
    kinds = ARTIFACT_KINDS if mito else [k for k in ARTIFACT_KINDS if k != "leaking"]
    bad = corrupt(adata, kinds, total_key="n_counts_full", mito_key=mito)
    chosen = (bad.obs["corruption"] != "none").to_numpy()
    assert (bad.X[~chosen] != adata.X[~chosen]).nnz == 0
    assert (total(bad.X)[total(adata.X) > 0] > 0).all()
    assert (bad.obs["n_counts_full"].to_numpy() >= total(bad.X)).all()
