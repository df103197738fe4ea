"""A fitted posterior's view of cells, in AnnData, where scanpy looks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from cradle_pyro import sites
from cradle_pyro.errors import QueryError
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.queries.counterfactual import counterfactual, query_cells, query_record
from cradle_pyro.queries.interventions import check, do
from cradle_pyro.queries.latent import latent

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["to_anndata"]

BASAL_KEY: Final = "X_cradle_basal"
ARTIFACT_KEY: Final = "X_cradle_artifact"
CLEAN_KEY: Final = "cradle_clean"


def to_anndata(
    posterior: Posterior,
    adata: AnnData,
    *,
    clean: bool = True,
    draws: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> AnnData:
    """Return a copy of cells with their latent states and cleaned counts, for scanpy.

    Parameters
    ----------
    posterior
        A fitted pair.
    adata
        Cells with the columns the model was trained with, annotated; in memory or backed. Never
        changed.
    clean
        Also return the counts of each cell under ``do(artifact=0)``.
    draws
        Draws of the globals that latent means are averaged over.
    seed
        Seed of the draws.
    progress
        Show a progress bar.

    Returns
    -------
    AnnData
        The same cells in the same order, with all they had; of the genes those that the model
        scores, in the order given. New are

        - ``obsm["X_cradle_basal"]``: means of z_basal, shape (cells, latents);
        - ``obsm["X_cradle_artifact"]``: means of z_artifact, if the model has it, shape
          (cells, artifact latents);
        - ``layers["cradle_clean"]``: one coupled draw of each cell's counts under
          ``do(artifact=0)``, those of :func:`~cradle_pyro.counterfactual` with the same seed;
          sparse, or dense values where the input is log-normalised;
        - ``obs["cradle_library_clean"]``: the library of these counts, that of genes which were
          not kept included, and ``obs["cradle_out_of_support"]``;
        - ``uns["cradle_query"]``: what was asked.

    Raises
    ------
    DataError
        If the cells do not fit the model, or lack some of its genes.
    QueryError
        If `draws` is below one.

    Notes
    -----
    scanpy works on the result directly. Cells by basal state, free of perturbation and artifact::

        cells = to_anndata(posterior, adata)
        sc.pp.neighbors(cells, use_rep="X_cradle_basal")
        sc.tl.umap(cells)
        sc.pl.umap(cells, color=["perturbation", "cradle_artifact"])
        sc.pl.embedding(cells, "X_cradle_artifact", color="cradle_artifact")

    Cells before and after cleaning, in one embedding, see
    :func:`~cradle_pyro.reporting.plots.before_after`::

        worlds = {"observed": cells.layers["counts"], "cleaned": cells.layers["cradle_clean"]}
        both = anndata.concat(
            {name: AnnData(counts, obs=cells.obs) for name, counts in worlds.items()},
            label="world", index_unique="-",
        )
        sc.pp.normalize_total(both)
        sc.pp.log1p(both)
        sc.pp.pca(both)
        sc.pp.neighbors(both)
        sc.tl.umap(both)
        sc.pl.umap(both, color=["world", "cradle_artifact"])

    Effects, perturbations x genes; the centre of the colours is no effect::

        table = cradle_pyro.effects(posterior)
        colours = {"groupby": "perturbation", "vcenter": 0, "cmap": "RdBu_r"}
        sc.pl.heatmap(table, genes, **colours)
        sc.pl.matrixplot(table, genes, **colours)
        sc.pl.dotplot(table, genes, **colours, size_title="rises in (%)")
        sc.pl.matrixplot(table, genes, groupby="perturbation", layer="lfsr")

    Examples
    --------
    >>> import cradle_pyro as cp
    >>> adata = cp.simulate_perturbseq(n_cells=200, n_genes=40, n_perturbations=3, n_pairs=1)
    >>> settings = ["train.max_epochs=1", "qc.doublets=false", "qc.flags=['low_counts']"]
    >>> config = cp.Config().with_settings(settings)
    >>> prepared = cp.prepare(adata, config)
    >>> posterior = cp.fit(prepared.data, config, progress=False)
    >>> cells = to_anndata(posterior, prepared.adata[:5], draws=2)
    >>> sorted(cells.obsm)
    ['X_cradle_artifact', 'X_cradle_basal']
    >>> cells.layers["cradle_clean"].shape
    (5, 40)
    """
    if draws < 1:
        raise QueryError(f"Latent means need at least one draw, found draws={draws}.")
    data = query_cells(posterior, adata)
    drawn: dict[str, Any] = {"global_draws": draws, "seed": seed}
    basal = latent(posterior, data, site=sites.Z_BASAL, **drawn)
    artifact = None
    if posterior.model.n_artifact_latents:
        artifact = latent(posterior, data, site=sites.Z_ARTIFACT, **drawn)
    cleaned = None
    if clean:
        # Counts are those of the first draw, however many there are.
        options: dict[str, Any] = {"draws": 1, "seed": seed, "progress": progress}
        cleaned = counterfactual(posterior, data, do(artifact=0), **options)
    # Last, since it closes the file of a backed AnnData, which opens again when it is asked.
    result = _with_model_genes(posterior, adata)
    result.obsm[BASAL_KEY] = basal
    if artifact is not None:
        result.obsm[ARTIFACT_KEY] = artifact
    record = query_record(posterior, check(posterior, do()), [], seed=seed)
    if cleaned is not None:
        order = pd.Index(posterior.schema.genes).get_indexer(result.var_names)
        result.layers[CLEAN_KEY] = cleaned.layers["counts"][:, order]
        result.obs["cradle_library_clean"] = cleaned.obs["cradle_library"].to_numpy()
        result.obs["cradle_out_of_support"] = cleaned.obs["cradle_out_of_support"].to_numpy()
        record = cleaned.uns["cradle_query"]
    result.uns["cradle_query"] = record | {"draws": draws}
    return result


def _with_model_genes(posterior: Posterior, adata: AnnData) -> AnnData:
    """Return a copy in memory with the genes that the model scores, in the order given."""
    scored = adata.var_names.isin(posterior.schema.genes)
    return adata[:, scored].to_memory(copy=True)
