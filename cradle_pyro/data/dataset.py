"""A screen as arrays: the boundary at which AnnData becomes batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cradle_pyro.data import encode, fields
from cradle_pyro.data.genes import align_genes
from cradle_pyro.errors import DataError, near, shown
from cradle_pyro.types import Batch, Schema

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CellData"]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class CellData:
    """Cells of a screen, ready for batches; made by :meth:`from_anndata`.

    Parameters
    ----------
    schema
        Names of genes, perturbations, artifacts and covariates.
    counts
        Raw counts, or log-normalised values; shape (cells, genes). CSR in memory or rows of a file.
    perturbation
        Multi-hot or dosage, all zero for a control; shape (cells, perturbations), float32.
    artifact
        Flags in {0, 1} or severities in [0, 1]; shape (cells, artifacts), float32.
    artifact_observed
        False for cells whose flags are missing; shape (cells,).
    library
        Library size, in counts; shape (cells,), float32.
    covariates
        Codes into the levels of ``schema.covariates``; shape (cells, covariates), int64.
    obs_names
        Cell names; shape (cells,).
    split
        "train", "val" or "test" for each cell, shape (cells,); None when there is no split.
    values
        What `counts` holds.
    """

    schema: Schema
    counts: fields.Counts
    perturbation: sp.csr_array
    artifact: np.ndarray
    artifact_observed: np.ndarray
    library: np.ndarray
    covariates: np.ndarray
    obs_names: np.ndarray
    split: np.ndarray | None = None
    values: Literal["counts", "lognorm"] = "counts"

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        *,
        perturbation_key: str = "perturbation",
        control: str | Sequence[str] | None = None,
        layer: str | None = None,
        delimiter: str | None = None,
        design_key: str | Sequence[str] | None = None,
        covariate_keys: Sequence[str] = (),
        library_key: str | None = None,
        artifact: Literal["each", "any", "severity", "none"] = "each",
        artifact_keys: Sequence[str] | None = None,
        split_key: str | None = None,
        values: Literal["counts", "lognorm"] = "counts",
        schema: Schema | None = None,
        unseen: Literal["error", "drop"] = "error",
        missing_genes: Literal["error", "pad"] = "error",
    ) -> CellData:
        """Return a validated screen.

        Parameters
        ----------
        adata
            The screen, in memory or backed; never changed.
        perturbation_key
            Column of ``obs`` with perturbation labels.
        control
            Control label or labels, the first being canonical; None for "control", or the
            schema's. With a schema, its control always counts too.
        layer
            Layer with raw counts; None for ``X``.
        delimiter
            Joins perturbations in a label; None for "+", or the schema's.
        design_key
            Design table instead of labels, see
            :func:`~cradle_pyro.data.encode.encode_perturbations`.
        covariate_keys
            Categorical columns of ``obs``; with a schema, its covariates are used.
        library_key
            Column of ``obs`` with the full library size (counts); needed when the matrix holds
            only some of the genes. None for the sum of the row.
        artifact, artifact_keys
            Which flags to use, see :func:`~cradle_pyro.data.encode.encode_artifacts`.
        split_key
            Column of ``obs`` with "train", "val" or "test".
        values
            "counts", or "lognorm" for log-normalised values and a Normal likelihood.
        schema
            Names of a fitted model to align with, for queries; None to take names from `adata`.
        unseen
            With a schema: what to do with cells of unknown perturbations.
        missing_genes
            With a schema: what to do about genes `adata` lacks; "pad" puts zeros.

        Raises
        ------
        DataError
            Anything that is missing, malformed or unknown; the message says what and what to do.

        Warns
        -----
        DataWarning
            Without a schema: genes without counts, and perturbations with a single cell.
        """
        _check_choices(values=values, unseen=unseen, missing_genes=missing_genes)
        if adata.n_obs == 0 or adata.n_vars == 0:
            raise DataError(f"The screen is empty: {adata.n_obs} cells and {adata.n_vars} genes.")
        fields.check_names(adata.obs_names, "cell")
        fields.check_names(adata.var_names, "gene")
        controls = _controls(control, schema)
        delimiter = delimiter or ("+" if schema is None else schema.delimiter)
        design = encode.encode_perturbations(
            adata,
            perturbation_key=perturbation_key,
            design_key=design_key,
            control=controls,
            delimiter=delimiter,
            schema=schema,
            unseen=unseen,
        )
        counts, genes = _aligned_counts(adata, layer, schema, missing_genes)
        cells, counts, matrix = _known_cells(adata, counts, design)
        covariates = encode.encode_covariates(cells, covariate_keys, schema=schema)
        artifacts = encode.encode_artifacts(
            cells, artifact, artifact_keys=artifact_keys, schema=schema
        )
        split = None if split_key is None else _split_column(cells, split_key)
        obs_names = np.asarray(cells.obs_names, dtype=str)
        given = None if library_key is None else _library_column(cells, library_key)
        scan = fields.scan_counts(counts, values=values, cell_names=obs_names, gene_names=genes)
        library = _libraries(
            scan.row_sums, given, obs_names, library_key=library_key, values=values
        )
        has_rest = _has_rest(library, scan.row_sums, given, schema, values=values)
        if schema is None:
            fields.warn_silent_genes(scan.gene_is_silent, genes)
            schema = Schema(
                genes=genes,
                perturbations=design.names,
                artifacts=artifacts.names,
                covariates=covariates.levels,
                control=controls[0],
                delimiter=delimiter,
                has_rest=has_rest,
            )
            encode.warn_single_cells(
                encode.design_labels(matrix, design.names, delimiter, controls[0])
            )
        return cls(
            schema=schema,
            counts=counts,
            perturbation=matrix,
            artifact=artifacts.values,
            artifact_observed=artifacts.is_observed,
            library=library,
            covariates=covariates.codes,
            obs_names=obs_names,
            split=split,
            values=values,
        )

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.obs_names)

    def __len__(self) -> int:
        return self.n_cells

    @cached_property
    def labels(self) -> np.ndarray:
        """Canonical label of each cell: sorted names joined by the delimiter; shape (cells,)."""
        schema = self.schema
        return encode.design_labels(
            self.perturbation, schema.perturbations, schema.delimiter, schema.control
        )

    @property
    def failing(self) -> np.ndarray:
        """True for cells with any artifact, bool; shape (cells,)."""
        return np.asarray((self.artifact > 0).any(axis=1))

    @property
    def passing(self) -> np.ndarray:
        """Cells known to carry no artifact; missing flags do not count, shape (cells,)."""
        return ~self.failing & self.artifact_observed

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, design, libraries, artifacts and counts, as 64 hexadecimal digits.

        Independent of how the counts are stored. Each cell's counts enter through their sum, their
        number and a weighted sum, in one streaming pass.
        """
        digest = hashlib.sha256(repr((self.schema, self.values, self.n_cells)).encode())
        for names in (self.obs_names, self.labels):
            digest.update("\x00".join(names.tolist()).encode())
        weight = 1.0 + np.arange(self.schema.n_genes, dtype=np.float64) * 7919 % 104729
        for _, block in self.iter_rows():
            nonzero = sp.csr_array((block.data != 0, block.indices, block.indptr), block.shape)
            sums = [
                block.sum(axis=1, dtype=np.float64),
                nonzero.sum(axis=1, dtype=np.int64),
                block.astype(np.float64) @ weight,
            ]
            for values in sums:
                digest.update(np.asarray(values, dtype=np.float64).round(3).tobytes())
        design = self.perturbation @ (1.0 + np.arange(self.schema.n_perturbations))
        for values in (design, self.library, self.artifact, self.artifact_observed):
            digest.update(np.ascontiguousarray(values, dtype=np.float32).tobytes())
        digest.update(np.ascontiguousarray(self.covariates, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def subset(self, rows: np.ndarray | Sequence[int] | slice) -> CellData:
        """Return the cells at a boolean mask or at integer positions, in that order.

        Backed counts stay on disk. The schema is kept as it is.

        Raises
        ------
        DataError
            A mask has another length than there are cells, or a position is out of range.
        """
        index = self._positions(rows)
        return replace(
            self,
            counts=fields.take_rows(self.counts, index),
            perturbation=self.perturbation[index],
            artifact=self.artifact[index],
            artifact_observed=self.artifact_observed[index],
            library=self.library[index],
            covariates=self.covariates[index],
            obs_names=self.obs_names[index],
            split=None if self.split is None else self.split[index],
        )

    def random_subset(self, n_cells: int, *, seed: int) -> CellData:
        """Return at most `n_cells` of the cells, chosen at random, in their order."""
        if self.n_cells <= n_cells:
            return self
        rows = np.random.default_rng(seed).permutation(self.n_cells)[:n_cells]
        return self.subset(np.sort(rows))

    def where(self, *, split: str) -> CellData:
        """Return the cells of a split.

        Raises
        ------
        DataError
            The data have no split, or `split` is not "train", "val" or "test".
        """
        if split not in SPLITS:
            raise DataError(
                f"split={split!r} must be 'train', 'val' or 'test'{near(split, SPLITS)}."
            )
        if self.split is None:
            raise DataError(
                f"Cells of split {split!r} were asked for, but the data have no split. Give "
                "split_key=... to CellData.from_anndata, or call data.with_split(...)."
            )
        return self.subset(self.split == split)

    def with_split(self, split: np.ndarray | Sequence[str]) -> CellData:
        """Return the data with another split: "train", "val" or "test" for each cell.

        Raises
        ------
        DataError
            There is not one value per cell, or a value is unknown.
        """
        return replace(self, split=_checked_split(split, self.n_cells))

    def rows(self, indices: np.ndarray | Sequence[int] | slice) -> sp.csr_array:
        """Return counts of the cells at integer positions, in that order, as float32 CSR."""
        return self.counts[self._positions(indices)]

    def iter_rows(self, chunk: int = 4096) -> Iterator[tuple[slice, sp.csr_array]]:
        """Yield ``(cells, counts)`` over consecutive slices of at most `chunk` cells."""
        return fields.iter_count_rows(self.counts, chunk)

    def batch(
        self,
        indices: np.ndarray | Sequence[int] | slice | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Return cells as dense float32 tensors.

        Parameters
        ----------
        indices
            Positions of the cells, in any order; None for all.
        device
            Where the tensors live.

        Returns
        -------
        Batch
            ``artifact_observed`` is None when all flags of these cells are observed.
        """
        index = np.arange(self.n_cells) if indices is None else self._positions(indices)
        one_hot = np.zeros((len(index), self.schema.n_covariate_levels), dtype=np.float32)
        start = 0
        for j, (_, levels) in enumerate(self.schema.covariates):
            one_hot[np.arange(len(index)), start + self.covariates[index, j]] = 1.0
            start += len(levels)
        observed = self.artifact_observed[index]
        batch = Batch(
            counts=torch.from_numpy(self.counts[index].toarray()),
            perturbation=torch.from_numpy(self.perturbation[index].toarray()),
            artifact=torch.from_numpy(self.artifact[index]),
            library=torch.from_numpy(self.library[index]),
            covariates=torch.from_numpy(one_hot),
            artifact_observed=None if observed.all() else torch.from_numpy(observed),
        )
        return batch if torch.device(device).type == "cpu" else batch.to(device)

    def _positions(self, rows: np.ndarray | Sequence[int] | slice) -> np.ndarray:
        """Return integer positions >= 0 for a mask, positions or a slice."""
        if isinstance(rows, slice):
            return np.arange(*rows.indices(self.n_cells))
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (self.n_cells,):
                raise DataError(
                    f"A mask over {self.n_cells} cells is required; it has shape {index.shape}."
                )
            return np.flatnonzero(index)
        index = index.astype(np.int64).reshape(-1)
        outside = (index < -self.n_cells) | (index >= self.n_cells)
        if outside.any():
            raise DataError(
                f"Positions must lie in 0..{self.n_cells - 1}; found {shown(index[outside])}."
            )
        return np.where(index < 0, index + self.n_cells, index)


def _check_choices(**given: str) -> None:
    """Raise for an option with an unknown value."""
    allowed = {
        "values": ("counts", "lognorm"),
        "unseen": ("error", "drop"),
        "missing_genes": ("error", "pad"),
    }
    for option, value in given.items():
        if value not in allowed[option]:
            raise DataError(
                f"{option}={value!r} must be one of {shown(allowed[option])}"
                f"{near(str(value), allowed[option])}."
            )


def _controls(control: str | Sequence[str] | None, schema: Schema | None) -> tuple[str, ...]:
    """Return all control labels, the canonical one first."""
    if schema is None:
        return encode.control_names("control" if control is None else control)
    given = () if control is None else encode.control_names(control)
    return (schema.control, *(n for n in given if n not in (schema.control, *schema.perturbations)))


def _aligned_counts(
    adata: AnnData, layer: str | None, schema: Schema | None, missing_genes: Literal["error", "pad"]
) -> tuple[fields.Counts, tuple[str, ...]]:
    """Return counts with the schema's genes as columns, and the genes."""
    counts = fields.read_counts(adata, layer)
    genes = tuple(str(name) for name in adata.var_names)
    if schema is None:
        return counts, genes
    columns = align_genes(genes, schema.genes, missing=missing_genes)
    return fields.take_columns(counts, columns), schema.genes


def _known_cells(
    adata: AnnData, counts: fields.Counts, design: encode.Design
) -> tuple[AnnData, fields.Counts, sp.csr_array]:
    """Return the cells whose perturbations are known; others were asked to be dropped."""
    if design.is_known.all():
        return adata, counts, design.matrix
    rows = np.flatnonzero(design.is_known)
    if len(rows) == 0:
        raise DataError(
            f"None of the {adata.n_obs} cells has a perturbation known from training, so "
            "unseen='drop' leaves no cell."
        )
    return adata[rows], fields.take_rows(counts, rows), design.matrix[rows]


def _split_column(adata: AnnData, key: str) -> np.ndarray:
    """Return a split column of ``obs``."""
    column = encode.obs_column(adata, key, "split_key")
    if column.isna().any():
        raise DataError(
            f"obs[{key!r}] must be 'train', 'val' or 'test' for every cell; "
            f"{int(column.isna().sum())} of {len(column)} are missing (NaN)."
        )
    return _checked_split(column.astype(str).to_numpy(), adata.n_obs)


def _checked_split(split: np.ndarray | Sequence[str], n_cells: int) -> np.ndarray:
    """Return a split as strings, or raise."""
    array = np.asarray(split, dtype=str)
    if array.shape != (n_cells,):
        raise DataError(
            f"A split needs one value for each of {n_cells} cells; its shape is {array.shape}."
        )
    unknown = np.setdiff1d(array, SPLITS)
    if len(unknown):
        raise DataError(
            f"A split consists of 'train', 'val' and 'test'; found {shown(unknown)}. Rename these."
        )
    return array


def _library_column(adata: AnnData, key: str) -> np.ndarray:
    """Return a column of library sizes, in counts, as float64."""
    column = encode.obs_column(adata, key, "library_key")
    numbers = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(np.float64)
    bad = ~(np.isfinite(numbers) & (numbers > 0))
    if bad.any():
        raise DataError(
            f"obs[{key!r}] must hold library sizes, positive and finite; {int(bad.sum())} of "
            f"{len(bad)} cells do not: {shown(np.asarray(adata.obs_names)[bad])}. Drop these cells "
            "or correct the column."
        )
    return numbers


def _libraries(
    row_sums: np.ndarray,
    given: np.ndarray | None,
    obs_names: np.ndarray,
    *,
    library_key: str | None,
    values: str,
) -> np.ndarray:
    """Return library sizes as float32: the given ones, or the sums of the rows."""
    if given is None:
        is_empty = row_sums <= 0
        if is_empty.any():
            raise DataError(
                f"Every cell needs counts; {int(is_empty.sum())} of {len(is_empty)} cells are "
                f"empty: {shown(obs_names[is_empty])}. Drop them (scanpy.pp.filter_cells), or give "
                "the full library size with library_key=..."
            )
        return row_sums.astype(np.float32)
    # Half a count of room: columns of totals are often float32 or averages rounded to integers.
    is_short = (given < row_sums * (1 - 1e-6) - 0.5) & (values == "counts")
    if is_short.any():
        worst = int(np.argmax(row_sums - given))
        raise DataError(
            f"obs[{library_key!r}] must be at least the sum of the cell's kept genes; it is less "
            f"in {int(is_short.sum())} of {len(is_short)} cells: {shown(obs_names[is_short])} "
            f"(worst: {given[worst]:g} against {row_sums[worst]:g} in '{obs_names[worst]}'). Name "
            "the column with the full count, or use library_key=None."
        )
    return (np.maximum(given, row_sums) if values == "counts" else given).astype(np.float32)


def _has_rest(
    library: np.ndarray,
    row_sums: np.ndarray,
    given: np.ndarray | None,
    schema: Schema | None,
    *,
    values: str,
) -> bool:
    """Return whether libraries count genes that were not kept, and check this with the schema's."""
    has_rest = values == "counts" and given is not None and bool((library > row_sums + 0.5).any())
    if schema is not None and schema.has_rest and given is None:
        raise DataError(
            "The model was fitted with full library sizes (library_key), which count genes beyond "
            f"its {schema.n_genes}; name the column with them, library_key=..."
        )
    if schema is not None and has_rest and not schema.has_rest:
        raise DataError(
            "The model was fitted with the sum of its genes as library size, but libraries of "
            f"{int((library > row_sums + 0.5).sum())} of {len(library)} cells exceed it; use "
            "library_key=None."
        )
    return has_rest
