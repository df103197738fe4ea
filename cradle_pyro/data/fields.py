"""Reading screens and counts: files, layers, row access, validation, and writing whole or not."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cradle_pyro.errors import DataError, DataWarning, near, shown

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

__all__ = [
    "BackedCounts",
    "CountScan",
    "Counts",
    "RowWriter",
    "StoredMatrix",
    "as_counts",
    "check_directory",
    "check_names",
    "iter_count_rows",
    "read_counts",
    "read_screen",
    "scan_counts",
    "take_columns",
    "take_rows",
    "warn_silent_genes",
    "write_annotated_copy",
    "write_h5ad_atomic",
    "write_rows_atomic",
    "write_text_atomic",
]

MOST_EXACT_COUNT = 2**24
"""Largest integer up to which every integer is a float32."""

_DENSE_CHUNK_VALUES = 2**23
_MOST_BYTES_IN_MEMORY = 1_500_000_000
_ENCODED_AS_MAPPING = {"encoding-type": "dict", "encoding-version": "0.1.0"}


# ---------------------------------------------------------------------------------------- files


def read_screen(
    path: str | os.PathLike[str],
    *,
    backed: bool | Literal["auto"] = False,
    layer: str | None = None,
) -> AnnData:
    """Return the AnnData in an ``.h5ad`` file or a zarr store.

    Parameters
    ----------
    path
        An HDF5 file or a zarr directory, both as written by AnnData.
    backed
        Leave ``X`` and ``layers`` on disk; everything else is read. The file stays open for as
        long as the result is used. "auto": if the counts would take more than 1.5 GB.
    layer
        Layer with the counts, for "auto"; None for ``X``.

    Raises
    ------
    DataError
        The path does not exist, is neither of the two formats, is truncated, or holds no AnnData.
    """
    path = Path(path)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file at {str(path)!r}{near(path.name, siblings)}.")
    is_zarr = path.is_dir()
    if is_zarr and not any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs")):
        raise DataError(
            f"{str(path)!r} is a directory without zarr metadata; give an .h5ad file or a zarr "
            "store written by AnnData."
        )
    if not is_zarr:
        _check_hdf5(path)
    try:
        if backed:
            screen = _open_lazily(path, is_zarr=is_zarr)
            if backed is True or _stored_bytes(screen, layer) > _MOST_BYTES_IN_MEMORY:
                return screen
        import anndata

        with warnings.catch_warnings():
            # Duplicate names are an error later, with a clearer text.
            warnings.filterwarnings("ignore", message=".*names are not unique")
            return anndata.read_zarr(path) if is_zarr else anndata.read_h5ad(path)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{str(path)!r} could not be read as AnnData ({_reason(error)}). It is truncated, "
            "damaged or from another program; copy or write it again with AnnData.write_h5ad."
        ) from error


def _check_hdf5(path: Path) -> None:
    """Raise unless `path` is a whole HDF5 file with AnnData's groups."""
    import h5py

    if not path.is_file() or path.stat().st_size == 0 or not h5py.is_hdf5(path):
        raise DataError(
            f"{str(path)!r} ({path.stat().st_size} bytes) is not an HDF5 file; an .h5ad file or a "
            "zarr store written by AnnData is required."
        )
    try:
        with h5py.File(path, "r") as file:
            groups = sorted(file)
    except OSError as error:
        raise DataError(
            f"{str(path)!r} ({path.stat().st_size} bytes) is truncated or damaged "
            f"({_reason(error)}); copy or write it again."
        ) from error
    missing = [name for name in ("obs", "var") if name not in groups]
    if missing:
        raise DataError(
            f"{str(path)!r} is HDF5 but not AnnData: it lacks {shown(missing)} and has "
            f"{shown(groups)}. Convert it first (10x files: scanpy.read_10x_h5)."
        )


def _open_lazily(path: Path, *, is_zarr: bool) -> AnnData:
    """Return AnnData whose X and layers are read from `path` when asked for."""
    import anndata
    import h5py
    from anndata.io import read_elem, sparse_dataset

    if is_zarr:
        import zarr

        store: Any = zarr.open_group(path, mode="r")
    else:
        store = h5py.File(path, "r")

    def lazy(element: Any) -> Any:
        return sparse_dataset(element) if "indptr" in _keys(element) else element

    rest = {
        name: read_elem(store[name])
        for name in ("obs", "var", "uns", "obsm", "varm", "obsp", "varp")
        if name in store
    }
    layers = {name: lazy(store["layers"][name]) for name in _keys(store.get("layers"))}
    x = lazy(store["X"]) if "X" in store else None
    return anndata.AnnData(X=x, layers=layers, **rest)


def _stored_bytes(screen: AnnData, layer: str | None) -> int:
    """Return what the counts take in memory, as float32 and sparse if they are stored so."""
    matrix: Any = screen.X if layer is None or layer not in screen.layers else screen.layers[layer]
    if matrix is None:
        return 0
    group = getattr(matrix, "group", None)
    n_values = matrix.shape[0] * matrix.shape[1] if group is None else group["data"].shape[0]
    return int(n_values) * (4 if group is None else 8)


def _keys(element: Any) -> list[str]:
    """Return the members of a stored group; a stored array or nothing has none."""
    return list(element.keys()) if hasattr(element, "keys") else []


def _reason(error: BaseException) -> str:
    """Return an exception's first line, shortened."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:197] + "..."


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be written at `path`; for a look before long work.

    Raises
    ------
    DataError
        The directory does not exist or is not writable, or `path` is a directory.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise DataError(f"The directory {str(path.parent)!r} does not exist; create it first.")
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a directory; give the name of a file.")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{str(path)!r} cannot be written: permission denied.")


def check_directory(path: Path) -> None:
    """Raise unless the directory `path` can be made and written to; nothing is made yet.

    Raises
    ------
    DataError
        A part of the path is a file, or permission is denied.
    """
    nearest = next(place for place in (path, *path.resolve().parents) if place.exists())
    if not nearest.is_dir():
        raise DataError(f"Cannot write to '{path}': '{nearest}' is a file. Choose another --out.")
    if not os.access(nearest, os.W_OK):
        raise DataError(f"Cannot write to '{path}': permission denied. Choose another --out.")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file so that it is either there as a whole or as it was before.

    Raises
    ------
    DataError
        If it cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    except OSError as error:
        raise DataError(f"Could not write '{path}': {error}.") from error
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


def write_h5ad_atomic(
    adata: AnnData,
    path: str | os.PathLike[str],
    *,
    compression: Literal["gzip", "lzf"] | None = None,
) -> None:
    """Write `adata` so that `path` holds all of it or what was there before.

    The data go to a temporary file beside `path`, are flushed to the disk, and are moved into
    place in one step. On any failure, an interrupt included, the temporary file is removed.

    Raises
    ------
    DataError
        The directory does not exist, the disk is full, or AnnData cannot write a value.
    """
    path = Path(path)
    options = {} if compression is None else {"compression": compression}
    with _written_whole(path) as temporary, _writing(path):
        _write_elements(adata, temporary, options)


def write_annotated_copy(
    adata: AnnData, source: str | os.PathLike[str], path: str | os.PathLike[str]
) -> None:
    """Write the h5ad file `source` to `path`, with ``obs`` and ``uns`` of `adata`.

    Everything else is copied as it lies on the disk, so that counts are never in memory.

    Raises
    ------
    DataError
        As :func:`write_h5ad_atomic`.
    """
    import h5py
    from anndata.io import write_elem

    path = Path(path)
    with _written_whole(path) as temporary, _writing(path):
        shutil.copyfile(source, temporary)
        with h5py.File(temporary, "r+") as file:
            for name, part in (("obs", _with_categories(adata.obs)), ("uns", dict(adata.uns))):
                if name in file:
                    del file[name]
                write_elem(file, name, part)


class RowWriter:
    """Layers of cells x genes that go to a new file some rows at a time.

    Parameters
    ----------
    file
        Open for writing.
    path
        For messages.
    shape
        Numbers of cells and genes.
    """

    def __init__(self, file: h5py.File, path: Path, shape: tuple[int, int]) -> None:
        self._file = file
        self._path = path
        self._shape = shape
        self._n_rows: dict[str, int] = {}

    def add(self, name: str, values: np.ndarray | sp.csr_matrix) -> None:
        """Append rows to the layer `name`, which is stored as they are: dense or sparse.

        Raises
        ------
        DataError
            If they cannot be written, for example because the disk is full.
        """
        from anndata.io import sparse_dataset, write_elem

        key, start = f"layers/{name}", self._n_rows.get(name, 0)
        with _writing(self._path):
            if isinstance(values, np.ndarray):
                layer = self._file[key] if start else self._dense(key)
                layer[start : start + len(values)] = values
            elif start:
                sparse_dataset(self._file[key]).append(values)
            else:
                write_elem(self._file, key, values)
        self._n_rows[name] = start + values.shape[0]

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any], x: str) -> None:
        """Write all else; ``X`` is the layer `x` too, if there is one of that name."""
        from anndata.io import write_elem

        parts: dict[str, Any] = {name: {} for name in ("obsm", "varm", "obsp", "varp")}
        parts |= {"obs": _with_categories(obs), "var": _with_categories(var), "uns": uns}
        with _writing(self._path):
            for name, part in parts.items():
                write_elem(self._file, name, part)
            self._file.require_group("layers").attrs.update(_ENCODED_AS_MAPPING)
            if x in self._n_rows:
                self._file["X"] = self._file[f"layers/{x}"]

    def _dense(self, key: str) -> Any:
        n_cells, n_genes = self._shape
        rows = min(max(_DENSE_CHUNK_VALUES // (32 * n_genes), 1), n_cells)
        layer = self._file.create_dataset(key, self._shape, np.float32, chunks=(rows, n_genes))
        layer.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        return layer


@contextmanager
def write_rows_atomic(path: str | os.PathLike[str], shape: tuple[int, int]) -> Iterator[RowWriter]:
    """Yield a writer of `shape`; `path` holds all that it wrote, or what was there before.

    Raises
    ------
    DataError
        As :func:`write_h5ad_atomic`.
    """
    import h5py

    path = Path(path)
    with _written_whole(path) as temporary:
        with _writing(path):
            file = h5py.File(temporary, "w")
        with file:
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            yield RowWriter(file, path, shape)


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file, which is moved to `path` if all goes well, or removed."""
    check_target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with _writing(path):
            _flush_to_disk(temporary)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        _flush_to_disk(path.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing into a DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"Writing {str(path)!r} failed ({_reason(error)}). Nothing was left behind; free disk "
            "space, or change the value AnnData cannot write, and try again."
        ) from error


def _write_elements(adata: AnnData, path: Path, options: dict[str, Any]) -> None:
    """Write `adata` to a new file.

    ``adata.write_h5ad`` would turn the caller's strings into categories and point backed data to
    the new file.
    """
    import h5py
    from anndata.io import write_elem

    parts: dict[str, Any] = {
        "obs": _with_categories(adata.obs),
        "var": _with_categories(adata.var),
        "uns": dict(adata.uns),
    }
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        parts[name] = dict(getattr(adata, name))
    parts |= {
        name: getattr(adata, name) for name in ("X", "raw") if getattr(adata, name) is not None
    }
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, part in parts.items():
            write_elem(file, name, part, dataset_kwargs=options)


def _with_categories(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame whose columns of repeated or missing strings are categories."""
    frame = frame.copy(deep=False)
    for name in frame.columns:
        column = frame[name]
        is_text = column.dtype == object and pd.api.types.infer_dtype(column) == "string"
        if is_text and (column.isna().any() or not column.is_unique):
            frame[name] = column.astype("category")
    return frame


def _flush_to_disk(path: Path) -> None:
    """Ask the system to put a file or a directory entry on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------------- counts


class StoredMatrix:
    """A matrix on disk that opens itself again where its file handle cannot follow.

    HDF5 handles neither pickle nor survive a fork; zarr arrays do both.

    Parameters
    ----------
    source
        Open dataset: AnnData's CSR dataset, or a dense ``h5py.Dataset`` or ``zarr.Array``.
    """

    def __init__(self, source: Any) -> None:
        handle = getattr(source, "group", source)
        file = getattr(handle, "file", None)  # h5py only
        self.location = None if file is None else (str(Path(file.filename).resolve()), handle.name)
        self.name = repr(handle.name if file is None else str(file.filename))
        self.shape: tuple[int, int] = (int(source.shape[0]), int(source.shape[1]))
        self._source = source
        self._process = os.getpid()

    def open(self) -> Any:
        """Return the dataset, valid in this process."""
        if self.location is None:
            return self._source
        handle = getattr(self._source, "group", self._source)
        if self._process != os.getpid() or not handle:
            self._source = _open_hdf5(*self.location)
            self._process = os.getpid()
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.location is not None:
            state.update(_source=None, _process=-1)
        return state


def _open_hdf5(path: str, key: str) -> Any:
    """Return the matrix at `key` of the file at `path`."""
    import h5py
    from anndata.io import sparse_dataset

    try:
        element = h5py.File(path, "r")[key]
    except (OSError, KeyError) as error:
        raise DataError(
            f"The counts at {key!r} of {path!r} can no longer be read ({_reason(error)}). Backed "
            "data need their file in place; restore it or read the screen into memory."
        ) from error
    return sparse_dataset(element) if "indptr" in _keys(element) else element


@dataclass(frozen=True)
class BackedCounts:
    """Rows and columns of a matrix on disk, read when indexed; safe to pickle and to fork.

    Parameters
    ----------
    stored
        The matrix on disk.
    row_index
        Stored row of each row; None for all, in order. Shape (cells,).
    column_index
        Stored column of each column, -1 for a column of zeros; None for all, in order.
        Shape (genes,).
    """

    stored: StoredMatrix
    row_index: np.ndarray | None = None
    column_index: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        n_rows, n_columns = self.stored.shape
        return (
            n_rows if self.row_index is None else len(self.row_index),
            n_columns if self.column_index is None else len(self.column_index),
        )

    def __getitem__(self, rows: np.ndarray | slice) -> sp.csr_array:
        """Return the rows at integer positions, in that order, as float32 CSR in memory."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.shape[0]))
        index = rows if self.row_index is None else self.row_index[rows]
        unique, inverse = np.unique(index, return_inverse=True)
        block = _as_csr(self._read(unique))
        if self.column_index is not None:
            block = take_columns(block, self.column_index)
        in_order = len(unique) == len(index) and bool((np.diff(inverse) > 0).all())
        return block if in_order else block[inverse]

    def take_rows(self, rows: np.ndarray) -> BackedCounts:
        """Return these counts limited to the rows at integer positions; nothing is read."""
        index = rows if self.row_index is None else self.row_index[rows]
        return BackedCounts(self.stored, index, self.column_index)

    def take_columns(self, columns: np.ndarray) -> BackedCounts:
        """Return these counts with the columns at `columns` (-1: zeros); nothing is read."""
        index = columns
        if self.column_index is not None:
            index = np.append(self.column_index, -1)[columns]
        return BackedCounts(self.stored, self.row_index, index)

    def _read(self, unique: np.ndarray) -> Any:
        """Return stored rows at increasing positions."""
        if len(unique) == 0:
            return sp.csr_array((0, self.stored.shape[1]), dtype=np.float32)
        source = self.stored.open()
        first, last = int(unique[0]), int(unique[-1]) + 1
        try:
            if last - first == len(unique):
                return source[first:last]
            return source.oindex[unique] if hasattr(source, "oindex") else source[unique]
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Counts could not be read from {self.stored.name} ({_reason(error)}). The file is "
                "truncated or damaged; copy or write it again."
            ) from error


Counts: TypeAlias = sp.csr_array | BackedCounts
"""Counts by rows: float32 CSR in memory, or rows of a file."""


def read_counts(adata: AnnData, layer: str | None = None) -> Counts:
    """Return ``adata.X`` or a layer as row-sliceable float32 counts.

    CSR is used as it is, CSC is converted once, a dense matrix is converted by chunks, and a
    backed CSR or dense matrix stays on disk. (A backed CSC matrix is read whole, as its rows
    cannot be read alone.)

    Raises
    ------
    DataError
        The layer does not exist, X is empty, or the matrix is of an unknown kind.
    """
    if layer is not None and layer not in adata.layers:
        have = list(adata.layers)
        raise DataError(
            f"layer={layer!r} is not in the AnnData{near(layer, have)}. "
            + (f"It has the layers {shown(have)}." if have else "It has no layers; use layer=None.")
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise DataError(
            "The AnnData has no X; name the layer that holds raw counts, layer='counts'."
        )
    return as_counts(matrix)


def as_counts(matrix: Any) -> Counts:
    """Return a matrix of any supported kind as row-sliceable float32 counts.

    Raises
    ------
    DataError
        The matrix is of an unknown kind, or does not hold numbers.
    """
    import h5py
    from anndata.abc import CSCDataset, CSRDataset

    if isinstance(matrix, BackedCounts):
        return matrix
    if isinstance(matrix, CSCDataset):
        matrix = matrix.to_memory()
    is_stored = isinstance(matrix, CSRDataset | h5py.Dataset) or hasattr(matrix, "oindex")
    if is_stored:
        return BackedCounts(StoredMatrix(matrix))
    if not sp.issparse(matrix) and not isinstance(matrix, np.ndarray):
        raise DataError(
            f"Counts are a {type(matrix).__module__}.{type(matrix).__name__}; a SciPy sparse "
            "matrix, a NumPy array, or AnnData's backed CSR or dense matrix is required."
        )
    if matrix.dtype.kind not in "biuf":
        raise DataError(f"Counts have dtype {matrix.dtype}; numbers are required.")
    if sp.issparse(matrix):
        return _as_csr(matrix)
    step = max(1, _DENSE_CHUNK_VALUES // max(1, matrix.shape[1]))
    chunks = [_as_csr(matrix[i : i + step]) for i in range(0, matrix.shape[0], step)]
    return sp.vstack(chunks, format="csr") if chunks else _as_csr(matrix)


def _as_csr(matrix: Any) -> sp.csr_array:
    """Return a matrix in memory as float32 CSR, sharing memory where possible."""
    if isinstance(matrix, np.ndarray):
        matrix = np.asarray(matrix)  # drops AnnData's view class
    csr = sp.csr_array(matrix)
    return csr if csr.dtype == np.float32 else csr.astype(np.float32)


def take_columns(counts: Counts, columns: np.ndarray) -> Counts:
    """Return counts with the columns at `columns`; -1 stands for a column of zeros."""
    if isinstance(counts, BackedCounts):
        return counts.take_columns(columns)
    n_genes = counts.shape[1]
    if len(columns) == n_genes and (columns == np.arange(n_genes)).all():
        return counts
    # A product with a 0/1 matrix moves, drops and adds columns in one pass over the values.
    kept = np.flatnonzero(columns >= 0)
    move = sp.csr_array(
        (np.ones(len(kept), np.float32), (columns[kept], kept)), shape=(n_genes, len(columns))
    )
    moved = sp.csr_array(counts @ move)
    moved.sort_indices()
    return moved


def take_rows(counts: Counts, rows: np.ndarray) -> Counts:
    """Return counts limited to integer positions; backed counts stay on disk."""
    return counts.take_rows(rows) if isinstance(counts, BackedCounts) else counts[rows]


def iter_count_rows(counts: Counts, chunk: int = 4096) -> Iterator[tuple[slice, sp.csr_array]]:
    """Yield ``(rows, counts[rows])`` over consecutive slices of at most `chunk` cells."""
    n_cells = counts.shape[0]
    for start in range(0, n_cells, chunk):
        rows = slice(start, min(start + chunk, n_cells))
        yield rows, counts[rows]


# ----------------------------------------------------------------------------------- validation


def check_names(names: Sequence[str] | np.ndarray, kind: str) -> None:
    """Raise unless names are unique.

    Parameters
    ----------
    names
        Labels of cells or genes.
    kind
        "cell" or "gene", for the message.

    Raises
    ------
    DataError
        Some names occur more than once.
    """
    index = pd.Index(names)
    if not index.is_unique:
        twice = index[index.duplicated()].unique()
        fix = "adata.obs_names_make_unique()" if kind == "cell" else "adata.var_names_make_unique()"
        raise DataError(
            f"{kind.capitalize()} names must be unique; {len(twice)} occur more than once: "
            f"{shown(twice)}. Call {fix} or drop the duplicates."
        )


class CountScan(NamedTuple):
    """What one pass over valid counts finds.

    Parameters
    ----------
    row_sums
        Sum of each cell's values, in counts; shape (cells,), float64.
    gene_is_silent
        True for genes without any count; shape (genes,).
    """

    row_sums: np.ndarray
    gene_is_silent: np.ndarray


def scan_counts(
    counts: Counts,
    *,
    values: Literal["counts", "lognorm"],
    cell_names: np.ndarray,
    gene_names: Sequence[str] | np.ndarray,
    chunk: int = 4096,
) -> CountScan:
    """Validate counts in one streaming pass and return their sums.

    Parameters
    ----------
    counts
        Shape (cells, genes).
    values
        "counts" requires integers; "lognorm" allows any finite values >= 0.
    cell_names, gene_names
        For messages.
    chunk
        Cells read at once; the result does not depend on it.

    Raises
    ------
    DataError
        Values are NaN or infinite, negative, or (for counts) not integers or too large for float32.
    """
    row_sums = np.zeros(counts.shape[0])
    silent = np.ones(counts.shape[1], dtype=bool)
    problems: dict[str, tuple[int, np.ndarray, str]] = {}
    for rows, block in iter_count_rows(counts, chunk):
        for problem, is_bad in _bad_values(block.data, values).items():
            at = np.flatnonzero(is_bad)
            if len(at) == 0:
                continue
            cells = np.unique(np.searchsorted(block.indptr, at, side="right") - 1) + rows.start
            gene = gene_names[block.indices[at[0]]]
            example = f"{block.data[at[0]]:g} in cell {str(cell_names[cells[0]])!r}, gene {gene!r}"
            n_before, cells_before, example_before = problems.get(
                problem, (0, np.empty(0, dtype=int), example)
            )
            problems[problem] = (
                n_before + len(at),
                np.concatenate([cells_before, cells]),
                example_before,
            )
        row_sums[rows] = block.sum(axis=1, dtype=np.float64)
        silent[block.indices[block.data != 0]] = False
    if problems:
        problem, (n_bad, cells, example) = next(iter(problems.items()))
        raise DataError(
            f"{_REQUIRED[values]} {n_bad} values in {len(cells)} of {counts.shape[0]} cells are "
            f"{problem}, for example {example}. {_ADVICE[problem]}"
        )
    return CountScan(row_sums, silent)


_REQUIRED = {
    "counts": "Raw counts (integers >= 0) are required.",
    "lognorm": "Log-normalised values (finite, >= 0) are required.",
}
_ADVICE = {
    "NaN or infinite": "Drop or repair these cells or genes.",
    "negative": "Scaled data cannot be used; name the layer with raw counts, layer='counts'.",
    "not integers": (
        "Normalised data cannot be used as counts; name the layer with raw counts, "
        "layer='counts', or set values='lognorm' for a Normal likelihood."
    ),
    "too large": f"Counts up to {MOST_EXACT_COUNT:,} are supported.",
}


def _bad_values(data: np.ndarray, values: str) -> dict[str, np.ndarray]:
    """Return a mask of bad values per kind of problem, gravest first."""
    finite = np.isfinite(data)
    bad = {"NaN or infinite": ~finite, "negative": data < 0}
    if values == "counts":
        bad["not integers"] = finite & (np.floor(data) != data)
        bad["too large"] = finite & (data > MOST_EXACT_COUNT)
    return bad


def warn_silent_genes(gene_is_silent: np.ndarray, gene_names: Sequence[str] | np.ndarray) -> None:
    """Warn of genes without any count, from which no effect can be learned."""
    silent = np.asarray(gene_names, dtype=str)[gene_is_silent]
    if len(silent):
        warnings.warn(
            f"{len(silent)} of {len(gene_names)} genes have no counts in any cell: {shown(silent)}."
            " Nothing can be learned about them; select_genes(...) or filtering drops them.",
            DataWarning,
            stacklevel=3,
        )
