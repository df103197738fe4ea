"""From a screen and a configuration to cells: nothing is learned from test cells."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from tiny import N_CELLS, make_config, make_screen

from cradle_pyro.data.prepare import annotate, assign_split, make_split, prepare
from cradle_pyro.errors import DataError, DataWarning

LABELS = np.array(["control", "A", "B", "A+B"] * 25)


def with_other_counts(adata, rows, *, seed=0):
    """Return the screen with other counts in `rows`: more in all, of other genes."""
    counts = adata.layers["counts"].toarray()
    shuffled = np.random.default_rng(seed).permutation(counts.shape[1])
    counts[rows] = 3 * counts[rows][:, shuffled]
    adata = adata.copy()
    adata.layers["counts"] = sparse.csr_matrix(counts)
    return adata


def is_split(prepared, name):
    return np.asarray(prepared.data.split) == name


# ------------------------------------------------------------------------------- no test cell seen


@pytest.mark.parametrize("unseen", ["test", "val"])
def test_thresholds_and_training_flags_do_not_depend_on_other_cells(unseen):
    config = make_config()
    first = prepare(make_screen(), config)
    changed = with_other_counts(make_screen(), is_split(first, unseen))
    second = prepare(changed, config)
    assert second.adata.uns["cradle_qc"]["thresholds"] == first.adata.uns["cradle_qc"]["thresholds"]
    np.testing.assert_array_equal(second.data.split, first.data.split)
    train = is_split(first, "train")
    np.testing.assert_array_equal(second.data.failing[train], first.data.failing[train])
    assert not np.array_equal(second.data.failing, first.data.failing)


def test_thresholds_depend_on_training_cells():
    config = make_config()
    first = prepare(make_screen(), config)
    second = prepare(with_other_counts(make_screen(), is_split(first, "train")), config)
    assert second.adata.uns["cradle_qc"]["thresholds"] != first.adata.uns["cradle_qc"]["thresholds"]


def test_selected_genes_do_not_depend_on_test_cells_but_on_training_cells():
    config = make_config("data.n_top_genes=45", "data.artifact=none")
    first = prepare(make_screen(), config)
    unseen = with_other_counts(make_screen(), ~is_split(first, "train"))
    seen = with_other_counts(make_screen(), is_split(first, "train"))
    assert prepare(unseen, config).data.schema.genes == first.data.schema.genes
    assert prepare(seen, config).data.schema.genes != first.data.schema.genes


def test_selected_genes_keep_the_whole_library():
    whole = prepare(make_screen(), make_config("data.artifact=none"))
    chosen = prepare(make_screen(), make_config("data.n_top_genes=45", "data.artifact=none"))
    assert chosen.data.schema.n_genes < whole.data.schema.n_genes
    assert chosen.data.schema.has_rest
    np.testing.assert_array_equal(chosen.data.library, whole.data.library)
    assert set(chosen.data.schema.perturbations) <= set(chosen.data.schema.genes)


# ------------------------------------------------------------------------------------- annotation


def test_a_screen_is_annotated_as_configured():
    adata = make_screen()
    prepared = prepare(adata, make_config("qc.n_mads=4"))
    assert prepared.adata.uns["cradle_qc"]["n_mads"] == 4
    assert set(prepared.data.schema.artifacts) <= set(prepared.adata.uns["cradle_qc"]["flags"])
    np.testing.assert_array_equal(prepared.data.failing, prepared.adata.obs["cradle_artifact"])


def test_an_annotation_that_is_there_is_kept():
    config = make_config()
    adata = make_screen()
    annotate(adata, config.data, make_config("qc.n_mads=5").qc)
    flags = adata.obs["cradle_artifact"].to_numpy().copy()
    with pytest.warns(DataWarning, match="fitted on 180 cells, more than the 115 training cells"):
        prepared = prepare(adata, config)
    np.testing.assert_array_equal(prepared.data.failing, flags)
    assert prepared.adata.uns["cradle_qc"]["n_mads"] == 5


def test_an_annotation_fitted_on_the_training_cells_is_taken_without_a_warning():
    config = make_config()
    adata = make_screen()
    split = prepare(make_screen(), config).data.split
    annotate(adata, config.data, config.qc, fit_on=np.asarray(split) == "train")
    taken = prepare(adata, config)  # a warning would be an error
    assert taken.adata.uns["cradle_qc"]["n_cells_fitted"] == (np.asarray(split) == "train").sum()


def test_thresholds_fitted_on_test_cells_do_not_matter_where_flags_are_not_used():
    adata = make_screen()
    annotate(adata, make_config().data, make_config().qc)
    without = prepare(adata, make_config("data.artifact=none"))  # a warning would be an error
    assert without.data.schema.artifacts == ()
    own = prepare(adata, make_config('data.artifact_keys=["cradle_artifact"]'))
    assert own.data.schema.artifacts == ("cradle_artifact",)


def test_existing_columns_serve_as_metrics():
    adata = make_screen()
    adata.obs["depth"] = np.where(np.arange(N_CELLS) % 10 == 0, 1.0, 1000.0 + np.arange(N_CELLS))
    prepared = prepare(adata, make_config("qc.counts_key=depth"))
    low = prepared.data.schema.artifacts.index("low_counts")
    np.testing.assert_array_equal(
        np.flatnonzero(prepared.data.artifact[:, low]), np.arange(0, N_CELLS, 10)
    )
    with pytest.raises(DataError, match="dept"):
        prepare(make_screen(), make_config("qc.counts_key=dept"))


def test_own_flags_need_no_annotation():
    adata = make_screen()
    adata.obs["bad"] = np.arange(N_CELLS) % 4 == 0
    prepared = prepare(adata, make_config('data.artifact_keys=["bad"]'))
    assert prepared.data.schema.artifacts == ("bad",)
    np.testing.assert_array_equal(np.flatnonzero(prepared.data.failing), np.arange(0, N_CELLS, 4))
    assert "cradle_qc" not in prepared.adata.uns


def test_a_library_column_is_the_library():
    adata = make_screen()
    adata.obs["total"] = np.asarray(adata.layers["counts"].sum(1)).ravel() * 2.0
    prepared = prepare(adata, make_config("data.library_key=total"))
    np.testing.assert_allclose(prepared.data.library, adata.obs["total"])
    assert prepared.data.schema.has_rest


# ------------------------------------------------------------------------------------------ splits


def test_a_split_is_the_same_however_often_it_is_made():
    config = make_config("split.method=combinations", "split.held_out_fraction=0.9")
    first, second = prepare(make_screen(), config), prepare(make_screen(), config)
    np.testing.assert_array_equal(first.data.split, second.data.split)
    np.testing.assert_array_equal(assign_split(first.data, config.split).split, first.data.split)
    other = prepare(make_screen(), config.with_settings(["split.seed=1"]))
    assert not np.array_equal(first.data.split, other.data.split)


def test_methods_hold_out_what_they_are_asked_to():
    def split(*settings):
        config = make_config(*settings).split
        return make_split(LABELS, config, control="control", delimiter="+")

    pairs = split("split.method=combinations", 'split.held_out=["B+A"]')
    assert set(pairs[LABELS == "A+B"]) == {"test"}
    assert set(pairs[LABELS != "A+B"]) == {"train", "val", "test"}
    singles = split("split.method=perturbations", 'split.held_out=["B"]')
    assert set(singles[np.isin(LABELS, ["B", "A+B"])]) == {"test"}
    cells = split("split.train=0.5", "split.validation=0.25")
    assert [int((cells == name).sum()) for name in ("train", "val", "test")] == [50, 25, 25]


def test_a_column_gives_the_split():
    adata = make_screen()
    adata.obs["fold"] = np.array(["train", "val", "test"])[np.arange(N_CELLS) % 3]
    prepared = prepare(adata, make_config("split.method=column", "split.key=fold"))
    np.testing.assert_array_equal(prepared.data.split, adata.obs["fold"])


@pytest.mark.parametrize("settings", [[], ["split.key=fold"]])
def test_a_split_column_that_is_absent_is_an_error(settings):
    with pytest.raises(DataError, match=r"no column.*Set split\.key"):
        prepare(make_screen(), make_config("split.method=column", *settings))


def test_a_column_cannot_be_read_from_labels_alone():
    prepared = prepare(make_screen(), make_config())
    with pytest.raises(DataError, match="read from the AnnData"):
        assign_split(prepared.data, make_config("split.method=column", "split.key=fold").split)


def test_mistakes_are_found_before_long_work(monkeypatch):
    import cradle_pyro.data.prepare as module

    def never(*args, **kwargs):
        raise AssertionError("annotated although the columns are wrong")

    monkeypatch.setattr(module, "annotate_artifacts", never)
    for settings, message in (
        (["data.perturbation_key=guide"], "guide"),
        (["data.control=ctrl"], "ctrl"),
        (["split.method=column", "split.key=fold"], "fold"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(make_screen(), make_config(*settings))
