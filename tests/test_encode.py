"""Labels, design tables, covariates and artifact flags: laws of the encoding and its errors."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from cradle_pyro.data.encode import (
    canonical_label,
    design_labels,
    encode_artifacts,
    encode_covariates,
    encode_design_table,
    encode_labels,
    encode_perturbations,
    split_label,
    warn_single_cells,
)
from cradle_pyro.errors import DataError, DataWarning
from cradle_pyro.types import Schema

NAMES = st.sampled_from(["A", "B", "C", "KLF1", "chr1.2_top", "B2"])
CONTROLS = ("control", "NT")


def make_cells(obs=None, n_cells=4, **parts):
    frame = pd.DataFrame(obs or {}, index=[f"c{i}" for i in range(n_cells)])
    return anndata.AnnData(X=np.ones((n_cells, 2), np.float32), obs=frame, **parts)


def make_flags(flags, severities=None, *, record=True):
    columns = {f"cradle_qc_{name}": np.asarray(flag) for name, flag in flags.items()}
    columns |= {f"cradle_qc_{n}_severity": np.asarray(s) for n, s in (severities or {}).items()}
    columns["cradle_qc_metric_total"] = np.arange(4.0)
    columns["cradle_artifact"] = np.any([np.asarray(f) == 1 for f in flags.values()], axis=0)
    uns = {"cradle_qc": {"flags": [*flags, "any"]}} if record else {}
    return make_cells(columns, uns=uns)


# ------------------------------------------------------------------------------------------ labels


@given(names=st.lists(NAMES, max_size=5), seed=st.integers(0, 9), data=st.data())
def test_spelling_of_a_label_does_not_matter(names, seed, data):
    order = np.random.default_rng(seed).permutation(len(names))
    noise = data.draw(st.lists(st.sampled_from(CONTROLS), min_size=not names, max_size=2))
    pad = data.draw(st.sampled_from(["", " "]))
    label = f"{pad}+{pad}".join([*(names[i] for i in order), *noise])
    wanted = "+".join(sorted(set(names))) or "control"
    assert canonical_label(label, "+", CONTROLS) == wanted
    assert canonical_label(wanted, "+", CONTROLS) == wanted
    assert canonical_label(names, "+", CONTROLS) == wanted


@given(labels=st.lists(st.lists(NAMES, max_size=4), min_size=1, max_size=30))
def test_labels_survive_the_round_trip_through_the_design(labels):
    written = ["+".join(names) or "control" for names in labels]
    design = encode_labels(written)
    assert design.names == tuple(sorted({name for names in labels for name in names}))
    assert design.is_known.all()
    assert set(design.matrix.data.tolist()) <= {1.0}
    spelled = design_labels(design.matrix, design.names)
    assert spelled.tolist() == [canonical_label(label) for label in written]
    again = encode_labels(spelled)
    assert (again.matrix != design.matrix).nnz == 0


@given(
    labels=st.lists(st.lists(NAMES, max_size=3), min_size=1, max_size=20), seed=st.integers(0, 9)
)
def test_permuting_labels_permutes_the_design(labels, seed):
    written = np.array(["+".join(names) or "control" for names in labels], dtype=object)
    order = np.random.default_rng(seed).permutation(len(written))
    design, permuted = encode_labels(written), encode_labels(written[order])
    assert permuted.names == design.names
    assert (permuted.matrix != design.matrix[order]).nnz == 0


@pytest.mark.parametrize(
    ("label", "delimiter", "control", "parts"),
    [
        ("A+control", "+", "control", ("A",)),
        ("A+A", "+", "control", ("A",)),
        ("NT-1", "+", ["control", "NT-1"], ()),
        ("B|A", "|", "control", ("A", "B")),
        ("A+B", "|", "control", ("A+B",)),
        (" A + B ", "+", "control", ("A", "B")),
    ],
)
def test_split_label(label, delimiter, control, parts):
    assert split_label(label, delimiter, control) == parts


@pytest.mark.parametrize("label", ["", "A+", "+", "A++B", " "])
def test_empty_name_in_a_label_is_an_error(label):
    with pytest.raises(DataError, match="empty name"):
        encode_labels(["A", label])


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA])
def test_missing_label_is_an_error(missing):
    with pytest.raises(DataError, match=r"1 of 3 have none \(NaN\), the first at position 1"):
        encode_labels(["A", missing, "control"])


def test_categorical_labels_are_read_like_text():
    labels = ["B+A", "control", "A", "A"]
    text, categories = encode_labels(labels), encode_labels(pd.Series(labels, dtype="category"))
    assert categories.names == text.names
    assert (categories.matrix != text.matrix).nnz == 0


def test_unknown_control_and_absent_control_are_named():
    cells = make_cells({"perturbation": ["A", "B", "ctrl", "A"]})
    with pytest.raises(DataError, match=r"no cell is labelled 'contrl'.*did you mean 'ctrl'"):
        encode_perturbations(cells, control="contrl")
    with pytest.raises(DataError, match="control="):
        encode_perturbations(cells)
    assert encode_perturbations(cells, control=["control", "ctrl"]).names == ("A", "B")
    with pytest.raises(DataError, match="all 4 cells are controls"):
        encode_perturbations(cells, control=["A", "B", "ctrl"])
    with pytest.raises(DataError, match="at least one control label"):
        encode_perturbations(cells, control=[])


def test_absent_column_names_the_near_one():
    cells = make_cells({"perturbations": ["A", "B", "control", "A"]})
    with pytest.raises(DataError, match=r"perturbation_key='perturbation'.*'perturbations'"):
        encode_perturbations(cells)


def test_known_perturbations_in_a_new_combination_are_fine():
    schema = Schema(genes=("g",), perturbations=("B", "A"))
    cells = make_cells({"perturbation": ["A+B", "control", "B", "A"]})
    design = encode_perturbations(cells, schema=schema)
    assert design.names == ("B", "A")
    assert design.matrix.toarray().tolist() == [[1, 1], [0, 0], [1, 0], [0, 1]]


def test_unknown_perturbation_is_an_error_or_marked():
    schema = Schema(genes=("g",), perturbations=("KLF1", "CEBPA"))
    cells = make_cells({"perturbation": ["KLF1", "KLF2+CEBPA", "KLF2", "control"]})
    with pytest.raises(
        DataError, match=r"2 of 4 cells.*'KLF2'; did you mean 'KLF1'.*unseen='drop'"
    ):
        encode_perturbations(cells, schema=schema)
    design = encode_perturbations(cells, schema=schema, unseen="drop")
    assert design.is_known.tolist() == [True, False, False, True]
    assert design.unknown == ("KLF2",)


def test_single_cell_groups_warn():
    with pytest.warns(DataWarning, match="2 of 3 perturbation groups have a single cell: 'A', 'B'"):
        warn_single_cells(np.array(["control", "A", "control", "B"]))
    warn_single_cells(np.array(["A", "A"]))


# ------------------------------------------------------------------------------------------ tables


def make_table():
    return np.array([[1, 0, 0], [0, 2.5, 0], [0, 0, 1], [1, 1, 0]], dtype=np.float32)


@pytest.mark.parametrize("kind", ["frame", "array", "sparse", "prefix", "columns"])
def test_all_forms_of_a_design_table_agree(kind):
    names, table = ["A", "B", "control"], make_table()
    cells, key = make_cells({"perturbation": ["x"] * 4}), "guides"
    if kind == "frame":
        cells.obsm["guides"] = pd.DataFrame(table, columns=names, index=cells.obs_names)
    elif kind in ("array", "sparse"):
        cells.obsm["guides"] = table if kind == "array" else sp.csr_matrix(table)
        cells.uns["guides_names"] = names
    else:
        cells.obs[[f"guide_{name}" for name in names]] = table
        key = "guide_"
    if kind == "columns":
        cells.obs[names] = table
        key = names
    design = encode_perturbations(cells, design_key=key)
    assert design.names == ("A", "B")
    assert design.matrix.toarray().tolist() == make_table()[:, :2].tolist()
    assert design_labels(design.matrix, design.names).tolist() == ["A", "B", "control", "A+B"]


def test_design_table_of_the_caller_is_left_alone():
    table = sp.csr_matrix((np.array([1.0, 0.0], np.float32), ([0, 1], [0, 1])), shape=(4, 3))
    cells = make_cells(obsm={"guides": table}, uns={"guides_names": ["A", "B", "C"]})
    encode_perturbations(cells, design_key="guides")
    assert cells.obsm["guides"].nnz == 2


def test_columns_no_cell_carries_are_dropped_or_ignored():
    table = np.array([[1, 0, 0], [0, 0, 0]])
    assert encode_design_table(table, ["A", "B", "C"]).names == ("A",)
    aligned = encode_design_table(table, ["A", "B", "C"], known=["Z", "A"])
    assert aligned.matrix.toarray().tolist() == [[0, 1], [0, 0]]
    assert aligned.is_known.all()
    assert aligned.unknown == ()


def test_unknown_column_of_a_table_is_named():
    cells = make_cells()
    cells.obsm["guides"] = pd.DataFrame(
        make_table(), columns=["A", "B", "C"], index=cells.obs_names
    )
    schema = Schema(genes=("g",), perturbations=("C", "A"))
    with pytest.raises(DataError, match=r"2 of 4 cells .*absent from training: 'B'\."):
        encode_perturbations(cells, design_key="guides", schema=schema)
    design = encode_perturbations(cells, design_key="guides", schema=schema, unseen="drop")
    assert design.is_known.tolist() == [True, False, True, False]


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf])
def test_bad_dosage_is_an_error(value):
    table = make_table()
    table[1, 1] = value
    with pytest.raises(DataError, match=r"1 values in 1 cells are NaN.*columns 'B'"):
        encode_design_table(table, ["A", "B", "C"])


def test_design_columns_need_single_unique_names():
    with pytest.raises(DataError, match="repeated: 'A'"):
        encode_design_table(make_table(), ["A", "A", "C"])
    with pytest.raises(DataError, match=r"delimiter '\+'.*'A\+B'"):
        encode_design_table(make_table(), ["A+B", "A", "C"])


def test_absent_design_table_and_names_are_errors():
    cells = make_cells({"note": list("abcd")}, obsm={"guide_umi": make_table()})
    with pytest.raises(DataError, match="did you mean 'guide_umi'"):
        encode_perturbations(cells, design_key="guide_umis")
    with pytest.raises(DataError, match="guide_umi_names"):
        encode_perturbations(cells, design_key="guide_umi")
    with pytest.raises(DataError, match="numbers or booleans; not so: 'note'"):
        encode_perturbations(cells, design_key=["note"])
    with pytest.raises(DataError, match="design_key='nothing'"):
        encode_perturbations(cells, design_key=["nothing"])


# -------------------------------------------------------------------------------------- covariates


def test_covariates_are_codes_into_sorted_levels():
    cells = make_cells({"batch": ["b", "a", "c", "a"], "lane": [2.0, 1.0, 1.0, 2.0]})
    covariates = encode_covariates(cells, ["batch", "lane"])
    assert covariates.levels == (("batch", ("a", "b", "c")), ("lane", ("1", "2")))
    assert covariates.codes.tolist() == [[1, 1], [0, 0], [2, 0], [0, 1]]
    assert encode_covariates(cells).codes.shape == (4, 0)


def test_covariates_take_the_levels_of_a_schema():
    schema = Schema(genes=("g",), perturbations=("A",), covariates=(("batch", ("c", "a", "b")),))
    covariates = encode_covariates(make_cells({"batch": ["b", "a", "c", "a"]}), schema=schema)
    assert covariates.codes[:, 0].tolist() == [2, 1, 0, 1]
    with pytest.raises(DataError, match=r"1 of 4 cells.*'batch'.*absent from training: 'd'"):
        encode_covariates(make_cells({"batch": ["b", "d", "c", "a"]}), schema=schema)
    with pytest.raises(DataError, match="covariate_keys='batch' is not a column"):
        encode_covariates(make_cells({"lane": [1, 2, 3, 4]}), schema=schema)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None, "b", "a"], r"1 of 4 are missing"),
        ([1.5, 2.0, 3.0, 1.0], "fractions such as 1.5"),
    ],
)
def test_bad_covariate_is_an_error(values, message):
    with pytest.raises(DataError, match=message):
        encode_covariates(make_cells({"batch": values}), ["batch"])


# --------------------------------------------------------------------------------------- artifacts


FLAGS = {"low_counts": [1, 0, 0, 0], "high_hb": [0, 0, 0, 0], "doublet": [1, 0, 1, 0]}
SEVERITIES = {"low_counts": [0.5, 0, 0, 0], "high_hb": [0.0] * 4, "doublet": [1.0, 0, 0.25, 0]}


@pytest.mark.parametrize("record", [True, False])
def test_each_takes_the_flags_that_cells_carry_but_never_any(record):
    cells = make_flags(
        {name: np.array(flag, dtype=bool) for name, flag in FLAGS.items()}, record=record
    )
    artifacts = encode_artifacts(cells, "each")
    assert artifacts.names == ("low_counts", "doublet")
    assert artifacts.values.tolist() == [[1, 1], [0, 0], [0, 1], [0, 0]]
    assert artifacts.values.dtype == np.float32
    assert artifacts.is_observed.all()


def test_any_severity_and_none():
    cells = make_flags(FLAGS, SEVERITIES)
    assert encode_artifacts(cells, "any").names == ("any",)
    assert encode_artifacts(cells, "any").values[:, 0].tolist() == [1, 0, 1, 0]
    severity = encode_artifacts(cells, "severity")
    assert severity.names == ("low_counts", "doublet")
    assert severity.values.tolist() == [[0.5, 1], [0, 0], [0, 0.25], [0, 0]]
    none = encode_artifacts(cells, "none")
    assert none.names == ()
    assert none.values.shape == (4, 0)
    assert none.is_observed.all()


def test_own_columns_replace_the_annotation():
    cells = make_cells({"debris": [True, False, False, True], "stress": [0.5, 0, 1, 0]})
    artifacts = encode_artifacts(cells, artifact_keys=["stress", "debris"])
    assert artifacts.names == ("stress", "debris")
    assert artifacts.values.tolist() == [[0.5, 1], [0, 0], [1, 0], [0, 1]]
    schema = Schema(genes=("g",), perturbations=("A",), artifacts=("debris", "stress"))
    aligned = encode_artifacts(cells, schema=schema)
    assert aligned.values.tolist() == artifacts.values[:, ::-1].tolist()


@pytest.mark.parametrize("dtype", ["object", "boolean", "Float64", "category"])
def test_missing_flags_leave_the_cell_unobserved(dtype):
    flag = pd.Series([True, None, False, True], dtype="boolean").astype(dtype).to_numpy()
    cells = make_cells({"debris": pd.array(flag), "other": [1, 1, 0, 0]})
    artifacts = encode_artifacts(cells, artifact_keys=["debris", "other"])
    assert artifacts.is_observed.tolist() == [True, False, True, True]
    assert artifacts.values.tolist() == [[1, 1], [0, 0], [0, 0], [1, 0]]


def test_artifacts_follow_the_schema():
    schema = Schema(genes=("g",), perturbations=("A",), artifacts=("doublet", "high_hb"))
    artifacts = encode_artifacts(make_flags(FLAGS), schema=schema)
    assert artifacts.names == ("doublet", "high_hb")
    assert artifacts.values.tolist() == [[1, 0], [0, 0], [1, 0], [0, 0]]
    unknown = encode_artifacts(make_cells(), "none", schema=schema)
    assert unknown.values.shape == (4, 2)
    assert not unknown.is_observed.any()


@pytest.mark.parametrize("artifact", ["each", "any", "severity"])
def test_absent_annotation_tells_what_to_run(artifact):
    with pytest.raises(DataError, match=r"annotate_artifacts.*artifact_keys.*artifact='none'"):
        encode_artifacts(make_cells(), artifact)


def test_bad_flags_are_errors():
    with pytest.raises(DataError, match=r"artifact='eech'.*did you mean 'each'"):
        encode_artifacts(make_cells(), "eech")
    with pytest.raises(DataError, match=r"must hold 0/1.*1 cells hold others.*'0.5'"):
        encode_artifacts(make_flags(FLAGS | {"doublet": [0.5, 0, 0, 0]}), "each")
    with pytest.raises(DataError, match=r"in \[0, 1\]; 1 cells hold others, for example '2.0'"):
        encode_artifacts(make_cells({"stress": [0.0, 2.0, 0.0, 0.0]}), artifact_keys="stress")
    with pytest.raises(DataError, match="'bad'"):
        encode_artifacts(make_cells({"s": ["bad", "ok", "ok", "ok"]}), artifact_keys=["s"])
