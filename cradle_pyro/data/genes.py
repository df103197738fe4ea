"""Choosing genes for training, and lining up the genes of a query with those of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp

from cradle_pyro.data import fields
from cradle_pyro.data.encode import obs_column, split_label
from cradle_pyro.errors import DataError, near, shown
from cradle_pyro.threads import torch_threads_kept

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["TOTAL_COUNTS", "align_genes", "is_qc_gene", "note_total_counts", "select_genes"]

TOTAL_COUNTS = "cradle_total_counts"
"""Column of ``obs`` in which :func:`select_genes` keeps the full library size."""

_MOST_CELLS = 50_000
QC_GENE_PATTERN = r"MT-|RP[SL]|HB[ABDEGMQZ]\d?$"
"""Mitochondrial, ribosomal and haemoglobin genes, matched at the start in any case."""


def align_genes(
    genes: Sequence[str], wanted: Sequence[str], *, missing: Literal["error", "pad"] = "error"
) -> np.ndarray:
    """Return the position in `genes` of each wanted gene.

    Parameters
    ----------
    genes
        Names of the columns there are.
    wanted
        Names of the columns a model expects.
    missing
        "error", or "pad" to give -1 (a column of zeros) for a gene that is absent.

    Returns
    -------
    np.ndarray
        Positions, shape (wanted,), int64.

    Raises
    ------
    DataError
        Genes are missing; or all are, even when padding was asked for.

    Examples
    --------
    >>> align_genes(["B", "A"], ["A", "B", "C"], missing="pad")
    array([ 1,  0, -1])
    """
    position = {str(name): i for i, name in enumerate(genes)}
    columns = np.array([position.get(str(name), -1) for name in wanted], dtype=np.int64)
    absent = [str(name) for name, i in zip(wanted, columns, strict=True) if i < 0]
    if absent and (missing == "error" or len(absent) == len(wanted)):
        fix = (
            "Check that both use the same kind of gene names."
            if len(absent) == len(wanted)
            else "Add them, or set missing_genes='pad' to take them as zero counts."
        )
        raise DataError(
            f"{len(absent)} of the {len(wanted)} genes of the model are missing: {shown(absent)}"
            f"{near(absent[0], list(position))}. {fix}"
        )
    return columns


def is_qc_gene(names: Sequence[str] | np.ndarray, pattern: str = QC_GENE_PATTERN) -> np.ndarray:
    """Return a mask of mitochondrial, ribosomal and haemoglobin genes.

    Examples
    --------
    >>> is_qc_gene(["MT-CO1", "RPS6", "HBB", "HBEGF", "KLF1"]).tolist()
    [True, True, True, False, False]
    """
    matcher = re.compile(pattern, re.IGNORECASE)
    return np.array([matcher.match(str(name)) is not None for name in names], dtype=bool)


def select_genes(
    adata: AnnData,
    n_top: int,
    *,
    train_rows: np.ndarray | None = None,
    keep: Sequence[str] = (),
    layer: str | None = None,
    perturbation_key: str | None = None,
    delimiter: str = "+",
    qc_pattern: str = QC_GENE_PATTERN,
) -> AnnData:
    """Return a copy with the highly variable genes, perturbation targets and QC genes.

    Variability is fitted on training cells only. The full library size goes to
    ``obs["cradle_total_counts"]``, to be named as ``library_key``; a column already there is kept.

    Parameters
    ----------
    adata
        The screen with raw counts.
    n_top
        Number of highly variable genes; targets, QC genes and `keep` come on top.
    train_rows
        Mask or positions of the training cells; None for all cells, which is right only when no
        cells are held out.
    keep
        Genes to keep besides.
    layer
        Layer with raw counts; None for ``X``.
    perturbation_key
        Column of ``obs`` whose elementary names, where they are genes, are kept; None for
        "perturbation" where there is such a column.
    delimiter
        Joins perturbations in a label.
    qc_pattern
        Regular expression of QC genes, matched at the start, in any case; "$^" for none.

    Returns
    -------
    AnnData
        In memory, genes in their original order; ``var["cradle_highly_variable"]`` marks the
        variable ones.

    Raises
    ------
    DataError
        `n_top` is not positive, counts are invalid, a gene of `keep` is absent, or `train_rows`
        is empty.

    Notes
    -----
    Counts are normalised to 10 000 per cell and log1p-transformed; genes are ranked by normalised
    dispersion within bins of mean expression (scanpy's flavour "seurat"), of at most 50,000 random
    training cells. Of matrices on disk, the kept genes are read into memory.

    References
    ----------
    Satija et al., "Spatial reconstruction of single-cell gene expression data", 2015.
    """
    names = np.asarray(adata.var_names, dtype=str)
    fields.check_names(names, "gene")
    if n_top < 1:
        raise DataError(f"n_top={n_top} must be at least 1.")
    absent = sorted(set(keep).difference(names))
    if absent:
        raise DataError(
            f"keep names {len(absent)} genes that the screen lacks: {shown(absent)}"
            f"{near(absent[0], names.tolist())}. Remove or correct them."
        )
    counts = fields.read_counts(adata, layer)
    scan = fields.scan_counts(
        counts, values="counts", cell_names=np.asarray(adata.obs_names), gene_names=names
    )
    rows = _train_positions(train_rows, adata.n_obs)
    if len(rows) > _MOST_CELLS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:_MOST_CELLS])
    is_variable = _highly_variable(fields.take_rows(counts, rows), n_top)
    targets = _targets(adata, perturbation_key, delimiter)
    kept = is_variable | is_qc_gene(names, qc_pattern) | np.isin(names, [*targets, *keep])
    chosen = _with_genes(adata, kept, counts)
    chosen.var["cradle_highly_variable"] = is_variable[kept]
    if TOTAL_COUNTS not in chosen.obs:
        chosen.obs[TOTAL_COUNTS] = scan.row_sums
    return chosen


def _with_genes(adata: AnnData, kept: np.ndarray, counts: fields.Counts) -> AnnData:
    """Return the screen with some of its genes, in memory; of a file, each matrix by chunks."""
    import anndata

    if not isinstance(counts, fields.BackedCounts) and not adata.isbacked:
        return adata[:, kept].copy()

    def selected(matrix: Any) -> sp.csr_matrix:
        chosen = fields.take_columns(fields.as_counts(matrix), np.flatnonzero(kept))
        blocks = [sp.csr_matrix(block) for _, block in fields.iter_count_rows(chosen)]
        return sp.vstack(blocks, format="csr")

    return anndata.AnnData(
        X=None if adata.X is None else selected(adata.X),
        layers={name: selected(matrix) for name, matrix in adata.layers.items()},
        obs=adata.obs.copy(),
        var=adata.var[kept].copy(),
        uns=dict(adata.uns),
        obsm=dict(adata.obsm),
    )


def note_total_counts(adata: AnnData, layer: str | None = None) -> None:
    """Write each cell's total over all genes to ``obs``, as `select_genes` does; once.

    Parameters
    ----------
    adata
        Cells with all their genes; changed in place.
    layer
        Layer with raw counts; None for ``X``.
    """
    if TOTAL_COUNTS not in adata.obs:
        adata.obs[TOTAL_COUNTS] = fields.scan_counts(
            fields.read_counts(adata, layer),
            values="counts",
            cell_names=np.asarray(adata.obs_names),
            gene_names=np.asarray(adata.var_names, dtype=str),
        ).row_sums


def _train_positions(train_rows: np.ndarray | None, n_cells: int) -> np.ndarray:
    """Return positions of the training cells."""
    if train_rows is None:
        return np.arange(n_cells)
    rows = np.asarray(train_rows)
    if rows.dtype == bool:
        if rows.shape != (n_cells,):
            raise DataError(f"train_rows must mask {n_cells} cells; it has shape {rows.shape}.")
        rows = np.flatnonzero(rows)
    if len(rows) == 0:
        raise DataError("train_rows names no cell; highly variable genes need training cells.")
    return rows.astype(np.int64)


def _targets(adata: AnnData, perturbation_key: str | None, delimiter: str) -> set[str]:
    """Return the elementary names in the labels."""
    if perturbation_key is None:
        if "perturbation" not in adata.obs:
            return set()
        perturbation_key = "perturbation"
    labels = obs_column(adata, perturbation_key, "perturbation_key").dropna().astype(str).unique()
    return {name for label in labels for name in split_label(label, delimiter)}


@torch_threads_kept()
def _highly_variable(counts: fields.Counts, n_top: int) -> np.ndarray:
    """Return a mask of the most variable genes among the cells given."""
    import scanpy as sc
    from anndata import AnnData

    matrix = counts[np.arange(counts.shape[0])]
    found = np.zeros(counts.shape[1], dtype=bool)
    # Cells and genes without counts have no dispersion.
    cells = np.asarray(matrix.sum(axis=1)) > 0
    expressed = np.flatnonzero(np.asarray(matrix.sum(axis=0)) > 0)
    if len(expressed) <= n_top:
        found[expressed] = True
        return found
    train = AnnData(X=sp.csr_matrix(matrix[cells][:, expressed]))
    sc.pp.normalize_total(train, target_sum=1e4)
    sc.pp.log1p(train)
    sc.pp.highly_variable_genes(train, n_top_genes=n_top, flavor="seurat")
    found[expressed] = train.var["highly_variable"].to_numpy()
    return found
