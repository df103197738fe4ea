"""Gene selection and alignment."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.fields import read_screen, write_h5ad_atomic
from cradle_pyro.data.genes import TOTAL_COUNTS, align_genes, is_qc_gene, select_genes
from cradle_pyro.errors import DataError

N_CELLS = 120
VARIABLE = [f"v{i}" for i in range(6)]
GENES = [*(f"g{i}" for i in range(200)), *VARIABLE, "MT-CO1", "RPL3", "HBB", "KLF1", "TP53"]


def make_screen(seed=0, kind=sp.csr_matrix):
    """Return flat genes, and six of middling means which only half of the cells express."""
    rng = np.random.default_rng(seed)
    rate = np.full((N_CELLS, len(GENES)), 3.0)
    rate[:, :200] = np.linspace(1.5, 4.5, 200)
    rate[:, 200:206] = np.linspace(4.0, 8.0, 6) * (np.arange(N_CELLS) % 2 == 0)[:, None]
    obs = pd.DataFrame(
        {"perturbation": np.resize(["control", "KLF1", "KLF1+X"], N_CELLS)},
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    counts = kind(rng.poisson(rate).astype(np.float32))
    return anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_variable_genes_targets_and_qc_genes_are_kept_in_order(kind):
    screen = make_screen(kind=kind)
    chosen = select_genes(screen, 20, keep=["g3"])
    always = ["g3", "MT-CO1", "RPL3", "HBB", "KLF1"]
    assert {*VARIABLE, *always} <= set(chosen.var_names)
    is_variable = chosen.var["cradle_highly_variable"]
    assert is_variable.sum() == 20
    assert is_variable[VARIABLE].all()
    assert set(chosen.var_names[~is_variable]) <= set(always)
    assert chosen.var_names.tolist() == [name for name in GENES if name in chosen.var_names]
    total = np.asarray(screen.X.sum(axis=1)).ravel()
    np.testing.assert_array_equal(chosen.obs[TOTAL_COUNTS], total)
    assert TOTAL_COUNTS not in screen.obs
    assert type(chosen.X) is type(screen.X)


def test_selection_sees_training_cells_only():
    screen = make_screen()
    train = np.arange(N_CELLS) < 80
    other = make_screen(kind=np.asarray)
    other.X[80::2, 90:120] = 12.0
    wanted = select_genes(screen, 20, train_rows=train).var_names
    assert (select_genes(other, 20, train_rows=train).var_names == wanted).all()
    assert (select_genes(other, 20, train_rows=np.arange(80)).var_names == wanted).all()
    assert set(select_genes(other, 20).var_names) != set(wanted)


def test_selected_screen_keeps_its_library():
    screen = make_screen()
    data = CellData.from_anndata(select_genes(screen, 6), artifact="none", library_key=TOTAL_COUNTS)
    np.testing.assert_array_equal(data.library, np.asarray(screen.X.sum(axis=1)).ravel())
    assert data.schema.has_rest
    twice = select_genes(select_genes(screen, 8), 2)
    np.testing.assert_array_equal(twice.obs[TOTAL_COUNTS], data.library)


def test_backed_screen_and_layer_give_the_same(tmp_path):
    screen = make_screen()
    screen.layers["counts"] = screen.X
    screen.X = sp.csr_matrix(np.log1p(screen.X.toarray()))
    write_h5ad_atomic(screen, tmp_path / "a.h5ad")
    wanted = select_genes(screen, 6, layer="counts")
    for backed in (
        read_screen(tmp_path / "a.h5ad", backed=True),
        anndata.read_h5ad(tmp_path / "a.h5ad", backed="r"),
    ):
        chosen = select_genes(backed, 6, layer="counts")
        assert chosen.var_names.tolist() == wanted.var_names.tolist()
        assert (chosen.layers["counts"] != wanted.layers["counts"]).nnz == 0
        assert isinstance(chosen.X, sp.csr_matrix)


def test_large_n_top_keeps_all_expressed_genes():
    screen = make_screen(kind=np.asarray)
    screen.X[:, 0] = 0
    assert select_genes(screen, 1000).var_names.tolist() == GENES[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_top": 0}, "n_top=0 must be at least 1"),
        ({"keep": ["KLF2"]}, "'KLF2'; did you mean 'KLF1'"),
        ({"train_rows": np.zeros(N_CELLS, bool)}, "names no cell"),
        ({"train_rows": np.ones(3, bool)}, "must mask 120 cells"),
        ({"layer": "counts"}, "layer='counts' is not in the AnnData"),
        ({"perturbation_key": "condition"}, "perturbation_key='condition'"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(DataError, match=message):
        select_genes(make_screen(), **{"n_top": 5, **options})


def test_normalised_values_are_an_error():
    screen = make_screen()
    screen.X = screen.X / 2
    with pytest.raises(DataError, match="not integers"):
        select_genes(screen, 5)


def test_qc_genes_by_name():
    names = ["mt-Co1", "Rps6", "HBG2", "HBA1", "HBEGF", "HBS1L", "HBP1", "MTOR", "RPA1"]
    assert is_qc_gene(names).tolist() == [True, True, True, True, *[False] * 5]
    assert not is_qc_gene(names, "$^").any()


@given(
    have=st.permutations(list("ABCDEF")),
    wanted=st.lists(st.sampled_from("ABCDEFXY"), unique=True, min_size=1).filter(
        lambda names: set(names) - set("XY")
    ),
)
def test_aligned_positions_name_the_wanted_genes(have, wanted):
    columns = align_genes(have, wanted, missing="pad")
    found = [have[i] if i >= 0 else None for i in columns]
    assert found == [name if name in have else None for name in wanted]


def test_missing_genes_are_named():
    with pytest.raises(DataError, match=r"1 of the 2 genes of the model are missing: 'KLF1'.*pad"):
        align_genes(["A", "B"], ["A", "KLF1"])
    with pytest.raises(DataError, match="same kind of gene names"):
        align_genes(["ENSG1", "ENSG2"], ["KLF1", "TP53"], missing="pad")


def test_real_screen_keeps_its_targets(screens):
    screen = read_screen(screens / "papalexi2021_eccite.h5ad")
    chosen = select_genes(screen, 50)
    targets = set(screen.obs["perturbation"]) & set(screen.var_names)
    assert len(targets) > 5
    assert targets <= set(chosen.var_names)
    assert chosen.var["cradle_highly_variable"].sum() == 50
