"""From an AnnData and a configuration to training-ready cells, in the order that leaks nothing.

Split first; then QC thresholds, gene selection and everything else that is learned from data see
training cells only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cradle_pyro.config import Config, DataConfig, QCConfig, SplitConfig
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.encode import ANY_COLUMN, design_labels, encode_perturbations
from cradle_pyro.data.genes import TOTAL_COUNTS, note_total_counts, select_genes
from cradle_pyro.data.qc import annotate_artifacts
from cradle_pyro.data.split import (
    split_cells,
    split_column,
    split_combinations,
    split_perturbations,
)
from cradle_pyro.errors import DataError, DataWarning

if TYPE_CHECKING:
    from anndata import AnnData

    from cradle_pyro.types import Schema

__all__ = [
    "Prepared",
    "annotate",
    "assign_split",
    "cell_data",
    "make_split",
    "prepare",
    "prepare_query",
]


class Prepared(NamedTuple):
    """A screen ready to train on.

    Parameters
    ----------
    adata
        The screen with its artifact annotation (and the selected genes).
    data
        The same cells as :class:`~cradle_pyro.data.CellData`, with a split.
    """

    adata: AnnData
    data: CellData


def prepare(adata: AnnData, config: Config) -> Prepared:
    """Return `adata` annotated, restricted to the chosen genes, split, and as CellData.

    Parameters
    ----------
    adata
        The screen; changed in place only by the annotation, and only if it has none yet.
    config
        Sections data, qc and split.

    Raises
    ------
    DataError
        For anything missing or malformed, before long work.
    """
    options = config.data
    split = _split_of(adata, config)
    if options.artifact != "none" and not options.artifact_keys:
        if "cradle_qc" not in adata.uns:
            annotate(adata, options, config.qc, fit_on=split == "train")
        else:
            _warn_fitted_on_test(adata, split)
    if options.n_top_genes is not None:
        adata = select_genes(
            adata,
            options.n_top_genes,
            train_rows=np.flatnonzero(split == "train"),
            layer=options.layer,
            perturbation_key=None if options.design_key else options.perturbation_key,
            delimiter=options.delimiter,
        )
    data = cell_data(adata, options)
    return Prepared(adata, data.with_split(split))


def annotate(
    adata: AnnData,
    options: DataConfig,
    qc: QCConfig,
    *,
    fit_on: np.ndarray | str | None = None,
    thresholds: Mapping[str, Any] | None = None,
) -> None:
    """Annotate artifacts as configured, with thresholds from the cells `fit_on`.

    Parameters
    ----------
    adata
        The screen; changed in place.
    options, qc
        Where counts are, and which metrics and thresholds to use.
    fit_on
        Cells to fit thresholds on: a mask, or "column=value"; all cells if omitted.
    thresholds
        Thresholds fitted before, used instead.

    Raises
    ------
    DataError
        If a column or layer is missing, counts are not raw, or `fit_on` names no cells.
    """
    keys = {"counts": qc.counts_key, "genes": qc.genes_key, "pct_mito": qc.pct_mito_key}
    annotate_artifacts(
        adata,
        qc.n_mads,
        layer=options.layer,
        fit_on=fit_on,
        flags=None if thresholds is not None else qc.flags or None,
        thresholds=thresholds,
        metrics={name: key for name, key in keys.items() if key is not None} or None,
        doublets="auto" if qc.doublets else False,
    )


def prepare_query(adata: AnnData, config: Config, thresholds: Mapping[str, Any] | None) -> AnnData:
    """Return cells to ask a fitted model about, with what it was given beside their counts.

    Parameters
    ----------
    adata
        Cells with the columns the model was trained with; changed in place by an annotation, if
        they have none.
    config
        Sections data and qc of the run.
    thresholds
        QC thresholds of the run, for cells that are not annotated yet.

    Raises
    ------
    DataError
        If the cells need an annotation and the run has no thresholds, or a column is missing.
    """
    options = config.data
    wants_flags = options.artifact != "none" and not options.artifact_keys
    if wants_flags and "cradle_qc" not in adata.uns and ANY_COLUMN not in adata.obs:
        if not thresholds:
            raise DataError(
                "The cells carry no artifact flags, and the run kept no thresholds to find them "
                "with. Annotate the cells first, as the training cells were."
            )
        annotate(adata, options, config.qc, thresholds=thresholds)
    if options.n_top_genes is not None and options.library_key is None:
        note_total_counts(adata, options.layer)
    return adata


def cell_data(
    adata: AnnData,
    options: DataConfig,
    *,
    schema: Schema | None = None,
) -> CellData:
    """Return `adata` as CellData, read as the configuration says; with `schema`, aligned to it.

    Where genes were selected and no library is named, it is the total that `select_genes` noted.
    """
    selected = TOTAL_COUNTS if options.n_top_genes is not None else None
    return CellData.from_anndata(
        adata,
        perturbation_key=options.perturbation_key,
        control=options.control,
        layer=options.layer,
        delimiter=options.delimiter,
        design_key=options.design_key,
        covariate_keys=options.covariate_keys,
        library_key=options.library_key or selected,
        artifact=options.artifact,
        artifact_keys=options.artifact_keys or None,
        values=options.values,
        schema=schema,
    )


def assign_split(data: CellData, config: SplitConfig) -> CellData:
    """Return `data` with the configured split, made from its labels.

    Raises
    ------
    DataError
        If the method is "column", which needs the AnnData (see :func:`prepare`).
    """
    return data.with_split(
        make_split(
            data.labels, config, control=data.schema.control, delimiter=data.schema.delimiter
        )
    )


def make_split(
    labels: np.ndarray, config: SplitConfig, *, control: str, delimiter: str
) -> np.ndarray:
    """Return "train", "val" or "test" for each label, as configured.

    Parameters
    ----------
    labels
        Canonical perturbation labels, shape (cells,).
    config
        Method, fractions, held-out labels and seed.
    control, delimiter
        As in the schema.
    """
    fractions = (config.train, config.validation, 1.0 - config.train - config.validation)
    if config.method == "column":
        raise DataError(
            "A split by column is read from the AnnData: set split.key and use prepare."
        )
    if config.method == "cells":
        return split_cells(len(labels), seed=config.seed, fractions=fractions, stratify=labels)
    by_label = split_combinations if config.method == "combinations" else split_perturbations
    return by_label(
        labels,
        seed=config.seed,
        held_out=config.held_out or config.held_out_fraction,
        fractions=fractions,
        control=control,
        delimiter=delimiter,
    )


def _warn_fitted_on_test(adata: AnnData, split: np.ndarray) -> None:
    n_fit = adata.uns["cradle_qc"].get("n_cells_fitted")
    if n_fit is not None and int(n_fit) > int((split == "train").sum()):
        warnings.warn(
            f"QC thresholds were fitted on {int(n_fit)} cells, more than the "
            f"{int((split == 'train').sum())} training cells: test cells may have moved them. "
            "Annotate with fit_on the training cells, or leave the annotation to training.",
            DataWarning,
            stacklevel=3,
        )


def _split_of(adata: AnnData, config: Config) -> np.ndarray:
    options, split = config.data, config.split
    if split.method == "column":
        if split.key is None or split.key not in adata.obs:
            raise DataError(
                f"split.method is 'column' but obs has no column '{split.key}'; found "
                f"{', '.join(map(str, adata.obs.columns))}. Set split.key."
            )
        return split_column(adata.obs[split.key])
    design = encode_perturbations(
        adata,
        perturbation_key=options.perturbation_key,
        design_key=options.design_key,
        control=options.control,
        delimiter=options.delimiter,
    )
    labels = design_labels(
        design.matrix, design.names, control=options.control, delimiter=options.delimiter
    )
    return make_split(labels, split, control=options.control, delimiter=options.delimiter)
