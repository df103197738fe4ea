"""CellData and the reading, checking and writing below it: laws of the arrays, and every error."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import pickle
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from cradle_pyro.data import fields
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.fields import BackedCounts, read_counts, read_screen, write_h5ad_atomic
from cradle_pyro.errors import DataError, DataWarning
from cradle_pyro.types import Batch

N_CELLS, N_GENES = 40, 7
KINDS = ("csr", "csc", "dense", "csr_array", "integers", "layer", "backed_csr", "backed_dense")
KINDS += ("anndata_backed", "zarr", "zarr_dense", "backed_layer", "view")


def make_counts(seed=0, n_cells=N_CELLS):
    counts = np.random.default_rng(seed).poisson(0.7, size=(n_cells, N_GENES)).astype(np.float32)
    counts[:, 0] += 1
    return counts


def make_screen(counts=None, seed=0):
    """Return cells of a screen with labels, a batch, two flags and a library column."""
    counts = make_counts(seed) if counts is None else counts
    n_cells = counts.shape[0]
    obs = pd.DataFrame(
        {
            "perturbation": np.resize(["control", "A", "B", "B+A"], n_cells),
            "batch": np.resize(["b2", "b1", "b3"], n_cells),
            "split": np.resize(["train", "train", "val", "train", "test"], n_cells),
            "total": np.asarray(counts.sum(axis=1)).ravel() + 5.0,
            "cradle_artifact": np.arange(n_cells) % 5 < 2,
            "cradle_qc_low_counts": np.arange(n_cells) % 5 == 0,
            "cradle_qc_doublet": np.arange(n_cells) % 5 == 1,
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"g{j}" for j in range(counts.shape[1])])
    uns = {"cradle_qc": {"flags": ["low_counts", "doublet"]}}
    return anndata.AnnData(X=sp.csr_matrix(counts), obs=obs, var=var, uns=uns)


def make_data(screen=None, **options):
    screen = make_screen() if screen is None else screen
    options = {"covariate_keys": ["batch"], "split_key": "split", **options}
    return CellData.from_anndata(screen, **options)


def stored(kind, folder):
    """Return the same screen in another container, and options to read it."""
    screen, options = make_screen(), {}
    counts = screen.X.toarray()
    if kind == "csc":
        screen.X = sp.csc_matrix(screen.X)
    elif kind in ("dense", "backed_dense", "zarr_dense"):
        screen.X = counts
    elif kind == "csr_array":
        screen.X = sp.csr_array(screen.X)
    elif kind == "integers":
        screen.X = sp.csr_matrix(screen.X, dtype=np.int64)
    elif kind in ("layer", "backed_layer"):
        screen.layers["counts"] = screen.X.copy()
        screen.X = np.log1p(counts)
        options = {"layer": "counts"}
    elif kind == "view":
        wide = anndata.concat([screen, screen], index_unique="-", uns_merge="same")
        screen = wide[:N_CELLS]
        screen.obs_names = [name.removesuffix("-0") for name in screen.obs_names]
    if kind.startswith("zarr"):
        write_zarr(screen, folder / "a.zarr")
        return read_screen(folder / "a.zarr", backed=True), options
    if "backed" in kind:
        write_h5ad_atomic(screen, folder / "a.h5ad")
        if kind == "anndata_backed":
            return anndata.read_h5ad(folder / "a.h5ad", backed="r"), options
        return read_screen(folder / "a.h5ad", backed=True), options
    return screen, options


def write_zarr(screen, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Writing zarr v2 data")
        screen.write_zarr(path)


def equal(one: Batch, other: Batch):
    pairs = [
        (getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)
    ]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------- what it holds


def test_fields_of_a_small_screen():
    screen = make_screen()
    data = make_data(screen)
    assert data.schema.genes == tuple(screen.var_names)
    assert data.schema.perturbations == ("A", "B")
    assert data.schema.artifacts == ("low_counts", "doublet")
    assert data.schema.covariates == (("batch", ("b1", "b2", "b3")),)
    assert not data.schema.has_rest
    assert data.n_cells == len(data) == N_CELLS
    assert data.labels[:4].tolist() == ["control", "A", "B", "A+B"]
    assert data.perturbation[:4].toarray().tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    np.testing.assert_array_equal(data.failing, screen.obs["cradle_artifact"])
    np.testing.assert_array_equal(data.library, screen.X.toarray().sum(axis=1))
    np.testing.assert_array_equal(data.rows([5, 0, 5]).toarray(), screen.X.toarray()[[5, 0, 5]])
    np.testing.assert_array_equal(data.split, screen.obs["split"])


def test_batch_holds_dense_float32_rows():
    data = make_data()
    batch = data.batch([3, 0])
    assert all(t.dtype == torch.float32 for t in (batch.counts, batch.perturbation, batch.library))
    assert batch.counts.shape == (2, N_GENES)
    assert batch.counts.is_contiguous()
    assert batch.artifact.tolist() == [[0, 0], [1, 0]]
    assert batch.covariates.tolist() == [[0, 1, 0], [0, 1, 0]]
    assert batch.artifact_observed is None
    assert batch.partner is None
    assert len(data.batch()) == N_CELLS


def test_covariates_lie_side_by_side_in_the_batch():
    screen = make_screen()
    screen.obs["lane"] = np.resize(["l1", "l2"], N_CELLS)
    batch = make_data(screen, covariate_keys=["batch", "lane"]).batch([0, 1, 2])
    assert batch.covariates.tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 1, 0]]


def test_unobserved_flags_are_marked_in_the_batch():
    screen = make_screen()
    flag = screen.obs["cradle_qc_doublet"].astype(object)
    flag.iloc[2] = np.nan
    screen.obs["cradle_qc_doublet"] = flag
    data = make_data(screen)
    assert data.batch([1, 2]).artifact_observed.tolist() == [True, False]
    assert data.batch([0, 1]).artifact_observed is None
    assert not data.passing[2]  # not known to pass
    np.testing.assert_array_equal(np.delete(data.passing, 2), np.delete(~data.failing, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_container_does_not_matter(kind, tmp_path):
    wanted = make_data()
    screen, options = stored(kind, tmp_path)
    data = make_data(screen, **options)
    is_backed = "backed" in kind or "zarr" in kind
    assert isinstance(data.counts, BackedCounts if is_backed else sp.csr_array)
    rows = np.array([7, 3, 3, 39, 0, 12, -1])
    assert equal(data.batch(rows), wanted.batch(rows))
    assert equal(data.batch(slice(4, 9)), wanted.batch(np.arange(4, 9)))
    assert data.fingerprint == wanted.fingerprint
    part = data.subset(rows).subset([4, 0, 2])
    assert isinstance(part.counts, type(data.counts))
    assert equal(part.batch(), wanted.batch(rows[[4, 0, 2]]))
    assert part.rows([]).shape == (0, N_GENES)


@given(seed=st.integers(0, 1000))
def test_permuting_cells_permutes_everything(seed):
    screen = make_screen()
    order = np.random.default_rng(seed).permutation(N_CELLS)
    data, permuted = make_data(screen), make_data(screen[order].copy())
    assert permuted.schema == data.schema
    assert equal(permuted.batch(), data.batch(order))
    assert equal(permuted.batch(), data.subset(order).batch())
    assert permuted.fingerprint == data.subset(order).fingerprint
    for name in ("labels", "obs_names", "split", "failing"):
        assert (getattr(permuted, name) == getattr(data, name)[order]).all()


@given(chunk=st.integers(1, 50))
def test_chunk_size_does_not_matter(chunk):
    data = make_data()
    slices, blocks = zip(*data.iter_rows(chunk), strict=True)
    assert (sp.vstack(blocks) != data.counts).nnz == 0
    assert slices[-1].stop == N_CELLS
    assert max(block.shape[0] for block in blocks) <= chunk
    scan = fields.scan_counts(
        data.counts,
        values="counts",
        cell_names=data.obs_names,
        gene_names=data.schema.genes,
        chunk=chunk,
    )
    np.testing.assert_array_equal(scan.row_sums, data.library)


def test_dense_matrices_are_converted_by_chunks(monkeypatch):
    monkeypatch.setattr(fields, "_DENSE_CHUNK_VALUES", 3 * N_GENES)
    counts = make_counts()
    converted = fields.as_counts(counts)
    np.testing.assert_array_equal(converted.toarray(), counts)
    assert converted.dtype == np.float32


def test_csr_in_memory_is_not_copied_and_the_screen_is_left_alone():
    screen = make_screen()
    before = screen.copy()
    data = make_data(screen)
    data.batch()
    assert np.shares_memory(data.counts.data, screen.X.data)
    assert (screen.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(screen.obs, before.obs)


def test_normalised_values_skip_the_integer_check():
    screen = make_screen()
    screen.X = screen.X.log1p()
    with pytest.raises(DataError, match=r"not integers.*values='lognorm'"):
        make_data(screen)
    data = make_data(screen, values="lognorm")
    assert data.values == "lognorm"
    np.testing.assert_array_equal(data.rows([0]).toarray(), screen.X[[0]].toarray())
    screen.X.data[0] = -1.0
    with pytest.raises(DataError, match="negative"):
        make_data(screen, values="lognorm")


def test_dosage_design_keeps_doses_and_names_labels():
    screen = make_screen()
    dose = np.zeros((N_CELLS, 3), np.float32)
    dose[0, 0], dose[1, :2], dose[2, 2] = 0.5, (1, 2), 1
    screen.obsm["guides"] = pd.DataFrame(dose, columns=["B", "A", "NT"], index=screen.obs_names)
    with pytest.warns(DataWarning, match="single cell"):
        data = make_data(screen, design_key="guides", control=["control", "NT"])
    assert data.schema.perturbations == ("B", "A")
    assert data.perturbation[:3].toarray().tolist() == [[0.5, 0], [1, 2], [0, 0]]
    assert data.labels[:3].tolist() == ["B", "A+B", "control"]


# --------------------------------------------------------------------------------------- libraries


def test_library_column_counts_the_rest():
    screen = make_screen()
    data = make_data(screen, library_key="total")
    assert data.schema.has_rest
    np.testing.assert_array_equal(data.library, screen.obs["total"].astype(np.float32))
    screen.obs["total"] = np.asarray(screen.X.sum(axis=1)).ravel() - 0.25
    rounded = make_data(screen, library_key="total")
    assert not rounded.schema.has_rest
    np.testing.assert_array_equal(rounded.library, np.asarray(screen.X.sum(axis=1)).ravel())


def test_library_column_lets_cells_without_kept_counts_pass():
    counts = make_counts()
    counts[3] = 0
    screen = make_screen(counts)
    with pytest.raises(DataError, match=r"1 of 40 cells are empty: 'c3'\. Drop them.*library_key"):
        make_data(screen)
    assert make_data(screen, library_key="total").library[3] == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "positive and finite; 1 of 40 cells do not: 'c3'"),
        (np.nan, "positive and finite; 1 of 40 cells do not: 'c3'"),
        (np.inf, "positive and finite; 1 of 40 cells do not: 'c3'"),
        (0.1, r"at least the sum.*less in 1 of 40 cells: 'c3'"),
    ],
)
def test_bad_library_is_an_error(value, message):
    screen = make_screen()
    screen.obs.loc["c3", "total"] = value
    with pytest.raises(DataError, match=message):
        make_data(screen, library_key="total")


def test_query_libraries_must_match_the_model():
    with_rest = make_data(library_key="total")
    without = make_data()
    with pytest.raises(DataError, match=r"fitted with full library sizes.*library_key"):
        make_data(schema=with_rest.schema)
    with pytest.raises(DataError, match=r"sum of its genes.*40 of 40 cells exceed"):
        make_data(schema=without.schema, library_key="total")
    assert make_data(schema=with_rest.schema, library_key="total").schema == with_rest.schema


# ----------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize("kind", ["csr", "backed_csr", "backed_dense", "zarr"])
@pytest.mark.parametrize("seed", range(3))
def test_reordered_and_extra_genes_are_aligned(tmp_path, kind, seed):
    data = make_data()
    screen, _ = stored(kind, tmp_path)
    order = np.random.default_rng(seed).permutation(N_GENES)
    wanted = dataclasses.replace(
        data.schema, genes=tuple(f"g{j}" for j in order if j != 1), has_rest=False
    )
    query = make_data(screen, schema=wanted)
    assert query.schema is wanted
    columns = order[order != 1]
    np.testing.assert_array_equal(query.rows([5, 2]).toarray(), make_counts()[[5, 2]][:, columns])
    np.testing.assert_array_equal(query.library, make_counts()[:, columns].sum(axis=1))


@pytest.mark.parametrize("kind", ["csr", "backed_csr"])
def test_missing_genes_are_an_error_or_zeros(kind, tmp_path):
    screen, _ = stored(kind, tmp_path)
    data = make_data()
    schema = dataclasses.replace(data.schema, genes=("g3", "new", *data.schema.genes[:3]))
    with pytest.raises(DataError, match=r"1 of the 5 genes of the model are missing: 'new'.*pad"):
        make_data(screen, schema=schema)
    query = make_data(screen, schema=schema, missing_genes="pad")
    wanted = np.insert(make_counts()[:, [3, 0, 1, 2]], 1, 0, axis=1)
    np.testing.assert_array_equal(query.batch().counts, wanted)


@pytest.mark.parametrize("kind", ["csr", "backed_csr"])
def test_unseen_perturbations_are_an_error_or_dropped(kind, tmp_path):
    screen, _ = stored(kind, tmp_path)
    data = make_data()
    schema = dataclasses.replace(data.schema, perturbations=("A",))
    with pytest.raises(DataError, match=r"20 of 40 cells.*absent from training: 'B'.*'drop'"):
        make_data(screen, schema=schema)
    query = make_data(screen, schema=schema, unseen="drop")
    kept = np.isin(data.labels, ["control", "A"])
    assert query.obs_names.tolist() == data.obs_names[kept].tolist()
    np.testing.assert_array_equal(query.batch().counts, data.batch(np.flatnonzero(kept)).counts)
    np.testing.assert_array_equal(query.library, data.library[kept])
    screen.obs["perturbation"] = "Z"
    with pytest.raises(DataError, match="None of the 40 cells"):
        make_data(screen, schema=schema, unseen="drop")


def test_query_uses_the_control_and_delimiter_of_the_model():
    screen = make_screen()
    screen.obs["perturbation"] = np.resize(["NT", "A", "B", "B|A", "safe"], N_CELLS)
    data = make_data(screen, control=["NT", "safe"], delimiter="|")
    assert data.labels[:5].tolist() == ["NT", "A", "B", "A|B", "NT"]
    query = make_data(screen[:4].copy(), schema=data.schema)
    assert query.labels.tolist() == ["NT", "A", "B", "A|B"]
    assert make_data(screen, schema=data.schema, control="safe").labels[4] == "NT"


def test_query_without_controls_or_warnings():
    data = make_data()
    query = make_data(make_screen()[1:3].copy(), schema=data.schema)
    assert query.labels.tolist() == ["A", "B"]


# ------------------------------------------------------------------------------- subsets, splits


def test_split_selects_rows():
    data = make_data()
    parts = [data.where(split=name) for name in ("train", "val", "test")]
    assert sum(part.n_cells for part in parts) == N_CELLS
    assert [set(part.split) for part in parts] == [{"train"}, {"val"}, {"test"}]
    moved = data.with_split(["val"] * N_CELLS)
    assert moved.where(split="val").n_cells == N_CELLS
    assert moved.where(split="train").n_cells == 0
    mask = np.arange(N_CELLS) % 3 == 0
    assert equal(data.subset(mask).batch(), data.batch(np.flatnonzero(mask)))


def test_a_random_subset_keeps_the_order_and_depends_on_the_seed():
    data = make_data()
    names = [data.random_subset(5, seed=seed).obs_names.tolist() for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    order = {name: row for row, name in enumerate(data.obs_names)}
    rows = [order[name] for name in names[0]]
    assert len(rows) == 5
    assert rows == sorted(set(rows))
    assert data.random_subset(data.n_cells, seed=0) is data


def test_bad_subsets_and_splits_are_errors():
    data = make_data()
    with pytest.raises(DataError, match="mask over 40 cells"):
        data.subset(np.ones(3, bool))
    with pytest.raises(DataError, match=r"0\.\.39; found '40'"):
        data.batch([0, 40])
    with pytest.raises(DataError, match="did you mean 'train'"):
        data.where(split="trian")
    with pytest.raises(DataError, match=r"no split.*split_key"):
        make_data(split_key=None).where(split="train")
    with pytest.raises(DataError, match="found 'valid'"):
        data.with_split(["train"] * 39 + ["valid"])
    with pytest.raises(DataError, match="one value for each of 40 cells"):
        data.with_split(["train"])
    screen = make_screen()
    screen.obs.loc["c0", "split"] = None
    with pytest.raises(DataError, match=r"1 of 40 are missing"):
        make_data(screen)


# -------------------------------------------------------------------------------------- fingerprint


def change_counts(screen):
    screen.X.data[0] += 1


def move_count(screen):
    """Move one count to another gene, which keeps the cell's sum and its number of non-zeros."""
    counts = screen.X.toarray()
    counts[2] = np.roll(counts[2], 1)
    screen.X = sp.csr_matrix(counts)


def change_label(screen):
    screen.obs.loc["c1", "perturbation"] = "B"


def rename_gene(screen):
    screen.var_names = ["other", *screen.var_names[1:]]


def rename_cell(screen):
    screen.obs_names = ["other", *screen.obs_names[1:]]


def change_flag(screen):
    screen.obs.loc["c2", "cradle_qc_doublet"] = True


def change_batch(screen):
    screen.obs.loc["c0", "batch"] = "b1"


@pytest.mark.parametrize(
    "change",
    [change_counts, move_count, change_label, rename_gene, rename_cell, change_flag, change_batch],
)
def test_fingerprint_changes_with(change):
    screen = make_screen()
    change(screen)
    assert make_data(screen).fingerprint != make_data().fingerprint


def test_fingerprint_is_stable():
    assert make_data().fingerprint == make_data().fingerprint
    assert len(make_data().fingerprint) == 64
    library = make_data(library_key="total").fingerprint
    assert library != make_data().fingerprint


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"integers >= 0.*1 values in 1 of 40 cells are not integers.*0.5 in cell 'c6', gene"),
        (-2, "1 values in 1 of 40 cells are negative, for example -2 in cell 'c6', gene 'g0'"),
        (np.nan, r"1 values in 1 of 40 cells are NaN or infinite.*cell 'c6', gene 'g0'"),
        (np.inf, r"NaN or infinite.*cell 'c6', gene 'g0'"),
        (2.0**25, "too large"),
    ],
)
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_bad_counts_are_an_error(kind, value, message):
    counts = make_counts()
    counts[6, 0] = value
    screen = make_screen()
    screen.X = kind(counts)
    with pytest.raises(DataError, match=message):
        make_data(screen)


def test_bad_counts_of_a_backed_screen_are_an_error(tmp_path):
    screen = make_screen()
    screen.X.data[:3] = 0.5
    write_h5ad_atomic(screen, tmp_path / "a.h5ad")
    with pytest.raises(DataError, match=r"3 values in \d of 40 cells are not integers"):
        make_data(read_screen(tmp_path / "a.h5ad", backed=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation_key": "condition"}, "perturbation_key='condition' is not a column of obs"),
        ({"control": "ctrl"}, "no cell is labelled 'ctrl'"),
        ({"layer": "count"}, r"layer='count' is not in the AnnData; did you mean 'counts'"),
        ({"covariate_keys": ["lane"]}, "covariate_keys='lane' is not a column"),
        ({"library_key": "totals"}, r"library_key='totals'.*did you mean 'total'"),
        ({"split_key": "fold"}, "split_key='fold' is not a column"),
        ({"split_key": "batch"}, "found 'b1', 'b2', 'b3'"),
        ({"values": "logs"}, r"values='logs' must be one of 'counts', 'lognorm'"),
        ({"unseen": "skip"}, "unseen='skip' must be one of"),
        ({"missing_genes": "zero"}, "missing_genes='zero' must be one of"),
        ({"artifact": "severity"}, r"cradle_qc_low_counts_severity.*annotate_artifacts"),
        ({"artifact_keys": ["debris"]}, "needs the obs column 'debris'"),
    ],
)
def test_bad_options_are_errors(options, message):
    screen = make_screen()
    screen.layers["counts"] = screen.X
    with pytest.raises(DataError, match=message):
        make_data(screen, **options)


def test_duplicate_names_and_empty_screens_are_errors():
    screen = make_screen()
    screen.var_names = ["g1", *screen.var_names[1:]]
    with pytest.raises(DataError, match=r"Gene names must be unique.*'g1'"):
        make_data(screen)
    screen = make_screen()
    screen.obs_names = ["c1", *screen.obs_names[1:]]
    with pytest.raises(DataError, match=r"Cell names must be unique.*'c1'.*obs_names_make_unique"):
        make_data(screen)
    with pytest.raises(DataError, match="0 cells and 7 genes"):
        make_data(make_screen()[:0].copy())


def test_matrix_of_no_known_kind_is_an_error():
    screen = make_screen()
    with pytest.raises(DataError, match=r"has no X; name the layer"):
        read_counts(anndata.AnnData(obs=screen.obs, var=screen.var))
    with pytest.raises(DataError, match="It has no layers"):
        read_counts(screen, "counts")
    with pytest.raises(DataError, match="list; a SciPy sparse"):
        fields.as_counts([[1]])
    with pytest.raises(DataError, match="dtype complex64"):
        fields.as_counts(np.ones((2, 2), np.complex64))


def test_stored_zeros_are_no_counts():
    screen = make_screen()
    screen.X.data[screen.X.indices == 3] = 0
    with pytest.warns(DataWarning, match="1 of 7 genes have no counts in any cell: 'g3'"):
        data = make_data(screen)
    screen.X.eliminate_zeros()
    with pytest.warns(DataWarning, match="'g3'"):
        assert make_data(screen).fingerprint == data.fingerprint


def test_columns_of_backed_counts_can_be_taken_again(tmp_path):
    screen, _ = stored("backed_csr", tmp_path)
    taken = fields.take_columns(read_counts(screen), np.array([3, -1, 0]))
    taken = fields.take_columns(fields.take_rows(taken, np.array([9, 1])), np.array([2, 1, -1, 0]))
    wanted = make_counts()[[9, 1]][:, [0, 0, 0, 3]] * [1, 0, 0, 1]
    np.testing.assert_array_equal(taken[np.arange(2)].toarray(), wanted)
    np.testing.assert_array_equal(taken[1:].toarray(), wanted[1:])


def test_silent_genes_and_single_cells_warn():
    counts = make_counts()
    counts[:, [2, 4]] = 0
    with pytest.warns(DataWarning, match="2 of 7 genes have no counts in any cell: 'g2', 'g4'"):
        data = make_data(make_screen(counts))
    assert data.schema.n_genes == N_GENES
    screen = make_screen()
    screen.obs.loc["c0", "perturbation"] = "C"
    with pytest.warns(DataWarning, match="1 of 5 perturbation groups have a single cell: 'C'"):
        make_data(screen)


# ------------------------------------------------------------------------------------------ files


def test_reading_back_what_was_written(tmp_path):
    screen = make_screen()
    screen.obs["note"] = np.resize(["x", None], N_CELLS)
    screen.obsm["X_umap"] = np.zeros((N_CELLS, 2))
    screen.raw = screen
    before = screen.obs.dtypes
    write_h5ad_atomic(screen, tmp_path / "a.h5ad", compression="gzip")
    assert (screen.obs.dtypes == before).all()
    assert os.listdir(tmp_path) == ["a.h5ad"]
    again = read_screen(tmp_path / "a.h5ad")
    assert (again.X != screen.X).nnz == 0
    assert again.obs["note"].isna().tolist() == screen.obs["note"].isna().tolist()
    assert again.obs["perturbation"].tolist() == screen.obs["perturbation"].tolist()
    assert (again.raw.X != screen.X).nnz == 0
    assert make_data(again).fingerprint == make_data(screen).fingerprint
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    write_h5ad_atomic(backed[5:10], tmp_path / "b.h5ad")
    write_h5ad_atomic(read_screen(tmp_path / "a.h5ad", backed=True), tmp_path / "c.h5ad")
    assert str(backed.filename) == str(tmp_path / "a.h5ad")
    assert (screen.X[5:10] != read_screen(tmp_path / "b.h5ad").X).nnz == 0
    assert (read_screen(tmp_path / "c.h5ad").X != screen.X).nnz == 0


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), DataError), (KeyboardInterrupt(), None)],
)
@pytest.mark.parametrize("step", ["write_elem", "fsync", "replace"])
def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch, step, error, raised):
    path = tmp_path / "a.h5ad"
    path.write_bytes(b"before")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("anndata.io.write_elem" if step == "write_elem" else f"os.{step}", fail)
    with pytest.raises(raised or type(error), match="No space left" if raised else None):
        write_h5ad_atomic(make_screen(), path)
    assert os.listdir(tmp_path) == ["a.h5ad"]
    assert path.read_bytes() == b"before"


def test_value_that_cannot_be_written_is_an_error(tmp_path):
    screen = make_screen()
    screen.uns["model"] = object()
    with pytest.raises(DataError, match=r"Writing .*a\.h5ad' failed"):
        write_h5ad_atomic(screen, tmp_path / "a.h5ad")
    assert os.listdir(tmp_path) == []
    with pytest.raises(DataError, match="does not exist; create it"):
        write_h5ad_atomic(screen, tmp_path / "no" / "a.h5ad")
    with pytest.raises(DataError, match="is a directory"):
        write_h5ad_atomic(screen, tmp_path)


@pytest.mark.parametrize("backed", [False, True])
def test_wrong_files_are_errors(tmp_path, backed):
    path = tmp_path / "screen.h5ad"
    with pytest.raises(DataError, match=r"no file at .*screen\.h5ad'"):
        read_screen(path, backed=backed)
    write_h5ad_atomic(make_screen(), path)
    with pytest.raises(DataError, match=r"did you mean 'screen\.h5ad'"):
        read_screen(tmp_path / "screens.h5ad", backed=backed)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"truncated|is not an HDF5 file"):
            read_screen(path, backed=backed)
    path.write_text("cell,gene\n1,2\n")
    with pytest.raises(DataError, match="is not an HDF5 file"):
        read_screen(path, backed=backed)
    with h5py.File(path, "w") as file:
        file["matrix"] = [1]
    with pytest.raises(DataError, match=r"not AnnData: it lacks 'obs', 'var' and has 'matrix'"):
        read_screen(path, backed=backed)
    with pytest.raises(DataError, match="directory without zarr metadata"):
        read_screen(tmp_path, backed=backed)


@pytest.mark.parametrize("backed", [False, True])
def test_damaged_anndata_is_an_error(tmp_path, backed):
    write_h5ad_atomic(make_screen(), tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["obs/_index"]
    with pytest.raises(DataError, match=r"could not be read as AnnData"):
        read_screen(tmp_path / "a.h5ad", backed=backed)


@pytest.mark.parametrize("backed", [False, True])
def test_zarr_stores_are_read(tmp_path, backed):
    write_zarr(make_screen(), tmp_path / "a.zarr")
    assert make_data(read_screen(tmp_path / "a.zarr", backed=backed)).n_cells == N_CELLS


def test_duplicate_names_of_a_file_are_one_error(tmp_path):
    screen = make_screen()
    screen.var_names = ["g1", *screen.var_names[1:]]
    write_h5ad_atomic(screen, tmp_path / "a.h5ad")
    with pytest.raises(DataError, match="Gene names must be unique"):
        make_data(read_screen(tmp_path / "a.h5ad"))


# ------------------------------------------------------------------------------ other processes


@pytest.mark.parametrize("kind", ["csr", "backed_csr", "backed_dense", "backed_layer", "zarr"])
def test_data_survive_pickling(kind, tmp_path):
    screen, options = stored(kind, tmp_path)
    data = make_data(screen, **options).subset(np.arange(30)[::-1])
    again = pickle.loads(pickle.dumps(data))
    assert equal(again.batch([3, 1]), data.batch([3, 1]))
    assert again.schema == data.schema


def test_backed_counts_open_again_after_the_file_was_closed(tmp_path):
    screen, _ = stored("anndata_backed", tmp_path)
    data = make_data(screen)
    screen.file.close()
    np.testing.assert_array_equal(data.rows([2]).toarray(), make_counts()[[2]])


def test_backed_counts_tell_when_their_file_is_gone(tmp_path):
    screen, _ = stored("anndata_backed", tmp_path)
    data = make_data(screen)
    screen.file.close()
    (tmp_path / "a.h5ad").unlink()
    with pytest.raises(DataError, match="can no longer be read"):
        data.batch()


def _sum_in_child(data, queue):
    queue.put((os.getpid(), float(data.batch([1, 30, 4]).counts.sum())))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_backed_data_work_in_other_processes(method, tmp_path):
    screen, _ = stored("backed_csr", tmp_path)
    data = make_data(screen)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_sum_in_child, args=(data, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert {total for _, total in found} == {float(make_counts()[[1, 30, 4]].sum())}
    assert os.getpid() not in {process for process, _ in found}


# ------------------------------------------------------------------------------------ real screens


@pytest.mark.filterwarnings("ignore::cradle_pyro.errors.DataWarning")
@pytest.mark.parametrize(
    ("name", "n_cells", "n_labels", "library_key"),
    [
        ("norman2019_crispra_combos", 3375, 34, "n_counts_full"),
        ("papalexi2021_eccite", 7108, 26, "n_counts_full"),
        ("kang2018_pbmc_ifnb", 2000, 2, None),
        pytest.param("gasperini2019_highmoi", 40002, 307, None, marks=pytest.mark.slow),
    ],
)
def test_real_screens(screens, name, n_cells, n_labels, library_key):
    path = screens / f"{name}.h5ad"
    options = {"artifact": "none", "split_key": None, "library_key": library_key}
    screen = read_screen(path)
    data = make_data(screen, **options)
    assert data.n_cells == n_cells
    assert len(np.unique(data.labels)) == n_labels
    written = screen.obs["perturbation"].astype(str).to_numpy()
    assert (data.labels == written).mean() == 1.0
    assert data.schema.has_rest == (library_key is not None)
    backed = make_data(read_screen(path, backed=True), **options)
    rows = np.random.default_rng(0).integers(0, n_cells, 64)
    assert equal(backed.batch(rows), data.batch(rows))
    assert backed.fingerprint == data.fingerprint
