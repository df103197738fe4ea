"""Latent states and cleaned counts of cells, where scanpy looks for them."""

from __future__ import annotations

import warnings

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData
from tiny import make_config, make_fit, make_screen, shared_fit

from cradle_pyro.data.prepare import prepare
from cradle_pyro.errors import DataError, QueryError
from cradle_pyro.queries.counterfactual import counterfactual
from cradle_pyro.queries.effects import effects
from cradle_pyro.queries.interventions import do
from cradle_pyro.queries.latent import latent
from cradle_pyro.reporting.to_anndata import to_anndata

N_CELLS = 90


@pytest.fixture(scope="module")
def screen() -> AnnData:
    return prepare(make_screen(), make_config()).adata[:N_CELLS].copy()


@pytest.fixture(scope="module")
def cells(screen) -> AnnData:
    """The result that most tests read."""
    return to_anndata(shared_fit(), screen, draws=3)


@pytest.fixture(autouse=True)
def _figures_closed():
    yield
    plt.close("all")


def dense(values):
    return values.toarray() if sp.issparse(values) else np.asarray(values)


def test_the_input_is_kept_and_not_changed(screen):
    screen = screen.copy()
    screen.uns["numbers"] = np.zeros(3)
    before = screen.copy()
    found = to_anndata(shared_fit(), screen, draws=1)
    found.obs.iloc[0, 0] = found.obs.iloc[1, 0]
    found.layers["counts"].data[:] = 7
    found.uns["cradle_qc"].clear()
    found.uns["numbers"][:] = 7
    assert (screen.obs == before.obs).all(axis=None)
    assert set(screen.layers) == set(before.layers)
    assert not screen.obsm
    assert screen.uns.keys() == before.uns.keys()
    assert not screen.uns["numbers"].any()
    assert screen.uns["cradle_qc"].keys() == before.uns["cradle_qc"].keys()
    np.testing.assert_array_equal(dense(screen.layers["counts"]), dense(before.layers["counts"]))
    assert list(found.obs_names) == list(before.obs_names)
    assert set(before.obs) < set(found.obs)
    assert list(found.var_names) == list(before.var_names)


def test_latent_states_are_those_of_latent(cells, screen):
    for key, site in {"X_cradle_basal": "z_basal", "X_cradle_artifact": "z_artifact"}.items():
        expected = latent(shared_fit(), screen, site=site, global_draws=3)
        np.testing.assert_array_equal(cells.obsm[key], expected)


def test_cleaned_counts_are_the_counterfactual_ones(cells, screen):
    expected = counterfactual(shared_fit(), screen, do(artifact=0), draws=3)
    assert sp.issparse(cells.layers["cradle_clean"])
    np.testing.assert_array_equal(
        dense(cells.layers["cradle_clean"]), dense(expected.layers["counts"])
    )
    for name, source in {
        "cradle_library_clean": "cradle_library",
        "cradle_out_of_support": "cradle_out_of_support",
    }.items():
        assert cells.obs[name].tolist() == expected.obs[source].tolist()
    assert cells.uns["cradle_query"]["intervention"] == "do(artifact=0)"
    assert cells.uns["cradle_query"]["draws"] == 3


def test_failing_cells_alone_are_cleaned(cells, screen):
    changed = dense(cells.layers["cradle_clean"] != screen.layers["counts"]).any(1)
    failing = screen.obs["cradle_artifact"].to_numpy(bool)
    assert not changed[~failing].any()
    assert changed[failing].any()


def test_genes_keep_the_order_given_and_those_not_scored_are_left_out(cells, screen):
    order = np.random.default_rng(0).permutation(screen.n_vars)
    other = AnnData(
        np.ones((N_CELLS, 2), np.float32),
        obs=screen.obs[[]],
        layers={"counts": sp.csr_matrix(np.ones((N_CELLS, 2), np.float32))},
    )
    other.var_names = ["not scored", "nor this"]
    shuffled = anndata.concat([screen[:, order], other], axis=1, merge="first", uns_merge="first")
    found = to_anndata(shared_fit(), shuffled, draws=3)
    assert list(found.var_names) == list(screen.var_names[order])
    for layer in ("counts", "cradle_clean"):
        np.testing.assert_array_equal(
            dense(found.layers[layer]), dense(cells.layers[layer])[:, order]
        )


def test_without_cleaning_there_are_latents_alone(screen):
    found = to_anndata(shared_fit(), screen, draws=1, clean=False)
    assert "cradle_clean" not in found.layers
    assert not {"cradle_library_clean", "cradle_out_of_support"} & set(found.obs)
    assert found.obsm["X_cradle_basal"].shape == (N_CELLS, 3)
    assert found.uns["cradle_query"]["intervention"] == "do()"


def test_a_model_without_artifact_latents_has_no_artifact_space(screen):
    posterior = make_fit("model.n_artifact_latents=0")
    assert list(to_anndata(posterior, screen, draws=1, clean=False).obsm) == ["X_cradle_basal"]


def test_backed_cells_are_read_and_stay_open(cells, screen, tmp_path):
    screen.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    found = to_anndata(shared_fit(), backed, draws=3)
    assert not found.isbacked
    np.testing.assert_array_equal(
        dense(found.layers["cradle_clean"]), dense(cells.layers["cradle_clean"])
    )
    assert dense(backed.X[:1]).shape == (1, screen.n_vars)
    backed.file.close()


def test_the_result_survives_a_file(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(read.obsm["X_cradle_basal"], cells.obsm["X_cradle_basal"])
    assert read.uns["cradle_query"]["intervention"] == "do(artifact=0)"


def test_impossible_requests_are_refused(screen):
    with pytest.raises(QueryError, match="at least one draw, found draws=0"):
        to_anndata(shared_fit(), screen, draws=0)
    with pytest.raises(DataError, match=screen.var_names[0]):
        to_anndata(shared_fit(), screen[:, 1:], draws=1)


# ------------------------------------------------------------------------------ scanpy, as it is


@pytest.fixture
def sc():
    """Return scanpy; what its own imports and numba announce is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scanpy

        yield scanpy


@pytest.mark.slow  # numba compiles UMAP for half a minute
def test_scanpy_embeds_cells_by_their_basal_state(cells, sc):
    cells = cells.copy()
    sc.pp.neighbors(cells, n_neighbors=5, use_rep="X_cradle_basal")
    sc.tl.umap(cells, maxiter=5)
    assert cells.obsm["X_umap"].shape == (N_CELLS, 2)
    assert len(sc.pl.umap(cells, color=["perturbation", "cradle_artifact"], show=False)) == 2


def test_neighbours_of_scanpy_are_those_in_the_basal_space(cells, sc):
    cells = cells.copy()
    options = {"method": "gauss", "transformer": "sklearn"}  # nothing to compile
    sc.pp.neighbors(cells, n_neighbors=5, use_rep="X_cradle_basal", **options)
    basal = cells.obsm["X_cradle_basal"]
    distances = np.linalg.norm(basal - basal[0], axis=1)
    found = cells.obsp["distances"][0]
    np.testing.assert_allclose(np.sort(found.data), np.sort(distances)[1:5], rtol=1e-4)


def test_scanpy_shows_the_artifact_space(cells, sc):
    colours = "cradle_artifact"
    ax = sc.pl.embedding(cells, "X_cradle_artifact", color=colours, show=False)
    np.testing.assert_allclose(
        np.sort(ax.collections[0].get_offsets(), axis=0),
        np.sort(cells.obsm["X_cradle_artifact"][:, :2], axis=0),
        rtol=1e-6,
    )


def test_scanpy_embeds_cells_before_and_after_cleaning(cells, sc):
    worlds = {"observed": cells.layers["counts"], "cleaned": cells.layers["cradle_clean"]}
    both = anndata.concat(
        {name: AnnData(counts, obs=cells.obs) for name, counts in worlds.items()},
        label="world",
        index_unique="-",
    )
    sc.pp.normalize_total(both)
    sc.pp.log1p(both)
    sc.pp.pca(both, n_comps=5)
    assert both.obsm["X_pca"].shape == (2 * N_CELLS, 5)
    assert sc.pl.pca(both, color="world", show=False) is not None


@pytest.mark.parametrize("plot", ["heatmap", "matrixplot", "dotplot"])
def test_scanpy_plots_effects(plot, sc):
    table = effects(shared_fit(), draws=2, n_cells=3)
    genes = list(table.var_names[:5])
    colours = {"groupby": "perturbation", "vcenter": 0, "cmap": "RdBu_r"}
    axes = getattr(sc.pl, plot)(table, genes, **colours, show=False)
    names = {label.get_text() for ax in axes.values() for label in ax.get_yticklabels()} | {
        text.get_text() for ax in axes.values() for text in ax.texts
    }
    assert set(table.obs_names) <= names


def test_scanpy_shows_the_number_of_each_effect(sc):
    table = effects(shared_fit(), draws=4, n_cells=3)
    genes = list(table.var_names[3:8])
    plot = sc.pl.matrixplot(table, genes, groupby="perturbation", layer="lfsr", return_fig=True)
    np.testing.assert_allclose(
        plot.values_df.loc[list(table.obs_names), genes], table[:, genes].layers["lfsr"]
    )
