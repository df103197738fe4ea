"""Labels, design tables, covariates and artifact flags as arrays, aligned with a schema."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cradle_pyro.errors import DataError, DataWarning, near, shown

if TYPE_CHECKING:
    from anndata import AnnData

    from cradle_pyro.types import Schema

__all__ = [
    "Artifacts",
    "Covariates",
    "Design",
    "canonical_label",
    "control_names",
    "design_labels",
    "encode_artifacts",
    "encode_covariates",
    "encode_design_table",
    "encode_labels",
    "encode_perturbations",
    "obs_column",
    "split_label",
    "warn_single_cells",
]

FLAG_PREFIX = "cradle_qc_"
METRIC_PREFIX = "cradle_qc_metric_"
ANY_COLUMN = "cradle_artifact"


class Design(NamedTuple):
    """Perturbations of cells as a matrix.

    Parameters
    ----------
    names
        Elementary perturbations, in column order.
    matrix
        Multi-hot or dosage, all-zero rows for controls; shape (cells, perturbations), float32.
    is_known
        False for cells with a perturbation the schema lacks; shape (cells,).
    unknown
        Perturbations of cells that the schema lacks, sorted.
    """

    names: tuple[str, ...]
    matrix: sp.csr_array
    is_known: np.ndarray
    unknown: tuple[str, ...] = ()


class Covariates(NamedTuple):
    """Categorical covariates: names with their levels, and codes of shape (cells, covariates)."""

    levels: tuple[tuple[str, tuple[str, ...]], ...]
    codes: np.ndarray


class Artifacts(NamedTuple):
    """Artifact flags or severities.

    Parameters
    ----------
    names
        Flags, in column order.
    values
        Flags in {0, 1} or severities in [0, 1]; shape (cells, artifacts), float32.
    is_observed
        False for cells with a missing flag, whose row of `values` is zero; shape (cells,).
    """

    names: tuple[str, ...]
    values: np.ndarray
    is_observed: np.ndarray


# ---------------------------------------------------------------------------------------- labels


def control_names(control: str | Sequence[str]) -> tuple[str, ...]:
    """Return the control labels, stripped; the first is the canonical one.

    Raises
    ------
    DataError
        No control label is given, or one is empty.
    """
    names = tuple(
        str(name).strip() for name in ((control,) if isinstance(control, str) else control)
    )
    if not names or "" in names:
        raise DataError(f"control={control!r} must name at least one control label, none empty.")
    return names


def split_label(
    label: str, delimiter: str = "+", control: str | Sequence[str] = "control"
) -> tuple[str, ...]:
    """Return the elementary perturbations of a label: sorted, unique, without controls.

    Raises
    ------
    DataError
        A name between two delimiters is empty.

    Examples
    --------
    >>> split_label("B + A+control")
    ('A', 'B')
    """
    parts = [part.strip() for part in str(label).split(delimiter)] if delimiter else [label.strip()]
    if "" in parts:
        raise DataError(
            f"The perturbation label {label!r} has an empty name; names joined by {delimiter!r} "
            "are required. Correct the label, or choose another delimiter."
        )
    return tuple(sorted(set(parts).difference(control_names(control))))


def canonical_label(
    names: str | Iterable[str],
    delimiter: str = "+",
    control: str | Sequence[str] = "control",
) -> str:
    """Return the one spelling of a label, or of a collection of elementary perturbations.

    Examples
    --------
    >>> canonical_label("B+A+B+control")
    'A+B'
    >>> canonical_label([])
    'control'
    """
    if not isinstance(names, str):
        names = delimiter.join(names)
    parts = split_label(names, delimiter, control) if names else ()
    return delimiter.join(parts) if parts else control_names(control)[0]


def encode_labels(
    labels: Sequence[str] | pd.Series | np.ndarray,
    *,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
    known: Sequence[str] | None = None,
) -> Design:
    """Return the multi-hot design of a column of labels.

    Parameters
    ----------
    labels
        One label per cell; combinations are joined by `delimiter`, in any order.
    control
        Control label or labels.
    delimiter
        Joins elementary perturbations.
    known
        Columns of the design; None for the sorted names that occur. Labels with another name
        leave ``is_known`` False.

    Raises
    ------
    DataError
        Labels are missing (NaN) or have an empty name.
    """
    column = pd.Series(np.asarray(labels, dtype=object))
    missing = column.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"Every cell needs a perturbation label; {missing.sum()} of {len(column)} have none "
            f"(NaN), the first at position {int(np.flatnonzero(missing)[0])}. Drop these cells, or "
            "label them as controls if they are."
        )
    codes, unique = pd.factorize(column.astype(str))
    parts = [split_label(label, delimiter, control) for label in unique]
    names = sorted({name for label in parts for name in label}) if known is None else list(known)
    position = {name: j for j, name in enumerate(names)}
    pairs = [(i, position[n]) for i, label in enumerate(parts) for n in label if n in position]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    table = sp.csr_array(
        (np.ones(len(rows), np.float32), (rows, columns)), shape=(len(unique), len(names))
    )
    label_is_known = np.array([all(n in position for n in label) for label in parts], dtype=bool)
    unknown = sorted({name for label in parts for name in label}.difference(position))
    return Design(tuple(names), sp.csr_array(table[codes]), label_is_known[codes], tuple(unknown))


def combination_labels(members: np.ndarray, schema: Schema) -> np.ndarray:
    """Return the canonical labels of combinations, from their members (0 or 1), one row each."""
    return design_labels(sp.csr_array(members), schema.perturbations, schema.delimiter)


def design_labels(
    matrix: sp.csr_array, names: Sequence[str], delimiter: str = "+", control: str = "control"
) -> np.ndarray:
    """Return the canonical label of each row of a design.

    Parameters
    ----------
    matrix
        Shape (cells, perturbations); dosages count as present when positive.
    names
        Elementary perturbations, in column order.

    Returns
    -------
    np.ndarray
        Labels, shape (cells,), of a string dtype.
    """
    present = sp.csr_array(matrix > 0)
    present.sort_indices()
    array = np.array([control, *names], dtype=str)
    count = np.diff(present.indptr)
    first = np.zeros(len(count), dtype=np.int64)
    first[count > 0] = present.indices[present.indptr[:-1][count > 0]] + 1
    labels = array[first].astype(object)
    spelling: dict[bytes, str] = {}
    for i in np.flatnonzero(count > 1):
        columns = present.indices[present.indptr[i] : present.indptr[i + 1]]
        key = columns.tobytes()
        if key not in spelling:
            spelling[key] = delimiter.join(sorted(names[j] for j in columns))
        labels[i] = spelling[key]
    return labels.astype(str) if len(labels) else np.empty(0, dtype=str)


# ----------------------------------------------------------------------------------------- design


def encode_perturbations(
    adata: AnnData,
    *,
    perturbation_key: str = "perturbation",
    design_key: str | Sequence[str] | None = None,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
    schema: Schema | None = None,
    unseen: Literal["error", "drop"] = "error",
) -> Design:
    """Return the design of a screen's cells.

    Parameters
    ----------
    adata
        The screen.
    perturbation_key
        Column of ``obs`` with labels; ignored when `design_key` is given.
    design_key
        A table instead of labels: a key of ``obsm`` (a DataFrame, or an array whose column names
        are in ``uns[f"{design_key}_names"]``); a prefix of ``obs`` columns, one per guide
        (``"guide_"`` takes ``guide_A`` as "A"); or a sequence of ``obs`` columns. Values are
        multi-hot or dosages >= 0; columns named as controls are dropped.
    control
        Control label or labels.
    delimiter
        Joins elementary perturbations in a label.
    schema
        Names of a fitted model, to which the design is aligned.
    unseen
        What to do with cells that carry a perturbation the schema lacks: raise, or mark them in
        ``is_known``.

    Raises
    ------
    DataError
        The column or table does not exist; values are missing or negative; no control cells or no
        perturbed cells (without a schema); unknown perturbations (with one).
    """
    known = None if schema is None else schema.perturbations
    if design_key is None:
        labels = obs_column(adata, perturbation_key, "perturbation_key")
        design = encode_labels(labels, control=control, delimiter=delimiter, known=known)
    else:
        names, table = _design_table(adata, design_key)
        design = encode_design_table(
            table, names, control=control, delimiter=delimiter, known=known
        )
    if schema is None:
        _check_has_both(design, control, perturbation_key if design_key is None else design_key)
    elif unseen == "error" and not design.is_known.all():
        raise DataError(
            f"{int((~design.is_known).sum())} of {len(design.is_known)} cells carry perturbations "
            f"absent from training: {shown(design.unknown)}"
            f"{near(design.unknown[0], schema.perturbations)}. Add them to the training split, "
            "drop them with data.subset(...), or set unseen='drop'."
        )
    return design


def _check_has_both(design: Design, control: str | Sequence[str], key: object) -> None:
    """Raise unless there are control and perturbed cells."""
    is_control = np.diff(design.matrix.indptr) == 0
    if not is_control.any():
        hint = near(control_names(control)[0], design.names)
        raise DataError(
            f"Control cells are required; no cell is labelled {shown(control_names(control))} in "
            f"{key!r}, which has {shown(design.names)}{hint}. Name the control labels with "
            "control=..."
        )
    if is_control.all():
        raise DataError(
            f"Perturbed cells are required; all {len(is_control)} cells are controls "
            f"({shown(control_names(control))}) in {key!r}."
        )


def encode_design_table(
    table: Any,
    names: Sequence[str],
    *,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
    known: Sequence[str] | None = None,
) -> Design:
    """Return the design held by a table of cells by perturbations.

    Parameters
    ----------
    table
        Dense or sparse, multi-hot or dosage; shape (cells, columns).
    names
        Perturbation of each column.
    control
        Columns of these names are dropped.
    delimiter
        Must not occur in a name, since labels join names with it.
    known
        Columns of the result; None for those of `names` that at least one cell carries.

    Raises
    ------
    DataError
        Values are NaN, infinite or negative; names repeat, are empty or contain the delimiter.
    """
    names = [str(name).strip() for name in names]
    _check_design_names(names, delimiter)
    matrix = sp.csr_array(table, dtype=np.float32, copy=True)
    bad = ~np.isfinite(matrix.data) | (matrix.data < 0)
    if bad.any():
        cells = np.searchsorted(matrix.indptr, np.flatnonzero(bad), side="right") - 1
        columns = [names[j] for j in np.unique(matrix.indices[bad])]
        raise DataError(
            f"A design table holds 0/1 or dosages >= 0; {bad.sum()} values in "
            f"{len(np.unique(cells))} cells are NaN, infinite or negative, in columns "
            f"{shown(columns)}. Put 0 where a perturbation is absent."
        )
    matrix.eliminate_zeros()
    is_control = np.isin(names, control_names(control))
    carried = np.bincount(matrix.indices, minlength=len(names)) > 0
    if known is None:
        known = [n for n, c, used in zip(names, is_control, carried, strict=True) if used and not c]
    position = {name: j for j, name in enumerate(known)}
    target = np.array([position.get(name, -1) for name in names], dtype=np.int64)
    foreign = (target < 0) & ~is_control
    is_known = (matrix @ foreign.astype(np.float32)) == 0
    taken = np.flatnonzero(target >= 0)
    move = sp.csr_array(
        (np.ones(len(taken), np.float32), (taken, target[taken])), shape=(len(names), len(known))
    )
    aligned = sp.csr_array(matrix @ move)
    aligned.sort_indices()
    unknown = sorted(np.asarray(names, dtype=str)[foreign & carried].tolist())
    return Design(tuple(known), aligned, np.asarray(is_known, dtype=bool), tuple(unknown))


def _check_design_names(names: list[str], delimiter: str) -> None:
    """Raise unless names are unique, not empty, and free of the delimiter."""
    twice = sorted({name for name in names if names.count(name) > 1})
    joined = [name for name in names if not name or (delimiter and delimiter in name)]
    if twice:
        raise DataError(f"Design columns must have unique names; repeated: {shown(twice)}.")
    if joined:
        raise DataError(
            f"Design columns must name single perturbations; empty or with the delimiter "
            f"{delimiter!r}: {shown(joined)}. Rename them or set another delimiter."
        )


def _design_table(adata: AnnData, design_key: str | Sequence[str]) -> tuple[list[str], Any]:
    """Return the column names and values of a design table in obsm or obs."""
    if isinstance(design_key, str) and design_key in adata.obsm:
        table = adata.obsm[design_key]
        if isinstance(table, pd.DataFrame):
            return [str(name) for name in table.columns], _numbers(table, design_key)
        names = adata.uns.get(f"{design_key}_names")
        if names is None or len(names) != table.shape[1]:
            found = "no such entry" if names is None else f"{len(names)} names"
            raise DataError(
                f"obsm[{design_key!r}] has {table.shape[1]} columns without names; a DataFrame, or "
                f"as many names in uns['{design_key}_names'] ({found} there), is required."
            )
        return [str(name) for name in names], table
    if isinstance(design_key, str):
        columns = [str(c) for c in adata.obs.columns if str(c).startswith(design_key)]
        names = [column.removeprefix(design_key) for column in columns]
        if not columns or "" in names:
            have = [*adata.obsm.keys(), *adata.obs.columns]
            raise DataError(
                f"design_key={design_key!r} is neither a table in obsm (which has "
                f"{shown(adata.obsm.keys()) or 'none'}) nor a prefix of one-hot obs columns"
                f"{near(design_key, have)}."
            )
    else:
        columns = names = [str(column) for column in design_key]
        for column in columns:
            obs_column(adata, column, "design_key")
    return names, _numbers(adata.obs[columns], str(design_key))


def _numbers(frame: pd.DataFrame, key: str) -> np.ndarray:
    """Return a frame as float32, or name the columns that are not numbers."""
    bad = [str(c) for c in frame.columns if not pd.api.types.is_numeric_dtype(frame[c])]
    if bad:
        raise DataError(f"Columns of {key!r} must be numbers or booleans; not so: {shown(bad)}.")
    return frame.to_numpy(dtype=np.float32, na_value=np.nan)


def warn_single_cells(labels: np.ndarray) -> None:
    """Warn of perturbation groups with one cell, whose effects rest on that cell."""
    names, count = np.unique(labels, return_counts=True)
    single = names[count == 1]
    if len(single):
        warnings.warn(
            f"{len(single)} of {len(names)} perturbation groups have a single cell: "
            f"{shown(single)}. They cannot be split or matched.",
            DataWarning,
            stacklevel=3,
        )


def obs_column(adata: AnnData, key: str, option: str) -> pd.Series:
    """Return a column of ``obs``.

    Raises
    ------
    DataError
        There is no such column; `option` names the setting that asked for it.
    """
    if key not in adata.obs.columns:
        have = [str(name) for name in adata.obs.columns]
        raise DataError(
            f"{option}={key!r} is not a column of obs{near(key, have)}. obs has "
            f"{shown(have, 12) or 'no columns'}."
        )
    return adata.obs[key]


# -------------------------------------------------------------------------- covariates, artifacts


def encode_covariates(
    adata: AnnData, keys: Sequence[str] = (), *, schema: Schema | None = None
) -> Covariates:
    """Return categorical covariates as codes into their levels.

    Parameters
    ----------
    adata
        The screen.
    keys
        Columns of ``obs``; with a schema, its covariates are used instead.
    schema
        Names of a fitted model, whose levels and order are used.

    Raises
    ------
    DataError
        A column does not exist, is not categorical (has fractions) or has missing values; a level
        is unknown to the schema.
    """
    if isinstance(keys, str):
        keys = (keys,)
    wanted = [(key, None) for key in keys] if schema is None else list(schema.covariates)
    levels: list[tuple[str, tuple[str, ...]]] = []
    codes = np.zeros((adata.n_obs, len(wanted)), dtype=np.int64)
    for j, (key, known) in enumerate(wanted):
        text = _level_names(obs_column(adata, key, "covariate_keys"), key)
        names = tuple(sorted(text.unique())) if known is None else known
        code = pd.Categorical(text, categories=list(names)).codes
        if (code < 0).any():
            unknown = sorted(text[code < 0].unique())
            raise DataError(
                f"{int((code < 0).sum())} of {len(code)} cells have levels of covariate {key!r} "
                f"absent from training: {shown(unknown)}{near(unknown[0], names)}. The levels are "
                f"{shown(names)}; relabel or drop these cells."
            )
        codes[:, j] = code
        levels.append((key, names))
    return Covariates(tuple(levels), codes)


def _level_names(column: pd.Series, key: str) -> pd.Series:
    """Return a covariate's levels as text."""
    missing = column.isna()
    if missing.any():
        raise DataError(
            f"Covariate {key!r} must be known for every cell; {int(missing.sum())} of "
            f"{len(column)} are missing (NaN). Fill or drop them."
        )
    if pd.api.types.is_float_dtype(column.dtype):
        if (column != column.round()).any():
            raise DataError(
                f"Covariate {key!r} must be categorical; it holds fractions such as "
                f"{column[column != column.round()].iloc[0]:g}. Bin it into categories first."
            )
        column = column.astype(np.int64)
    return column.astype(str)


def encode_artifacts(
    adata: AnnData,
    artifact: Literal["each", "any", "severity", "none"] = "each",
    *,
    artifact_keys: Sequence[str] | None = None,
    schema: Schema | None = None,
) -> Artifacts:
    """Return artifact flags or severities.

    Parameters
    ----------
    adata
        A screen with the columns of ``annotate_artifacts``, or with those of `artifact_keys`.
    artifact
        "each": the flags that at least one cell carries; "any": one flag; "severity": the
        severities of those flags, in [0, 1]; "none": no columns (with a schema that has flags:
        all cells unobserved).
    artifact_keys
        Columns of ``obs`` to use instead, holding flags or severities; not used with "none".
    schema
        Names of a fitted model, whose flags and order are used.

    Raises
    ------
    DataError
        Columns do not exist, or hold values outside [0, 1].
    """
    if artifact not in ("each", "any", "severity", "none"):
        raise DataError(
            f"artifact={artifact!r} must be 'each', 'any', 'severity' or 'none'"
            f"{near(str(artifact), ['each', 'any', 'severity', 'none'])}."
        )
    n_cells = adata.n_obs
    if artifact == "none":
        names = () if schema is None else schema.artifacts
        observed = np.full(n_cells, len(names) == 0)
        return Artifacts(names, np.zeros((n_cells, len(names)), np.float32), observed)
    artifact_keys = (artifact_keys,) if isinstance(artifact_keys, str) else artifact_keys or None
    columns = _artifact_columns(adata, artifact, artifact_keys, schema)
    values = np.zeros((n_cells, len(columns)), dtype=np.float32)
    for j, (name, column) in enumerate(columns):
        # Columns that the user names may hold severities; those of the annotation do not.
        is_flag = artifact != "severity" and column != name
        values[:, j] = _flag_values(adata, column, name, is_flag=is_flag)
    observed = np.asarray(~np.isnan(values).any(axis=1))
    values[~observed] = 0.0
    if artifact_keys is None and schema is None and artifact != "any":
        kept = [j for j in range(len(columns)) if (values[:, j] > 0).any()]
        columns, values = [columns[j] for j in kept], values[:, kept]
    return Artifacts(tuple(name for name, _ in columns), values, observed)


def _artifact_columns(
    adata: AnnData, artifact: str, artifact_keys: Sequence[str] | None, schema: Schema | None
) -> list[tuple[str, str]]:
    """Return the name and obs column of each flag."""
    if artifact_keys is not None:
        names = list(artifact_keys) if schema is None else list(schema.artifacts)
        return [(name, name) for name in names]
    if schema is None:
        names = ["any"] if artifact == "any" else _recorded_flags(adata)
    else:
        names = list(schema.artifacts)
    columns = []
    for name in names:
        ending = "_severity" if artifact == "severity" else ""
        column = ANY_COLUMN if name == "any" else f"{FLAG_PREFIX}{name}{ending}"
        # A model fitted with artifact_keys names its flags after plain obs columns.
        has_own = schema is not None and column not in adata.obs and name in adata.obs
        columns.append((name, name if has_own else column))
    return columns


def _recorded_flags(adata: AnnData) -> list[str]:
    """Return the flags that ``annotate_artifacts`` computed, without "any"."""
    record = adata.uns.get("cradle_qc")
    if record is not None and "flags" in record:
        return [str(flag) for flag in record["flags"] if str(flag) != "any"]
    found = [
        str(column).removeprefix(FLAG_PREFIX)
        for column in adata.obs.columns
        if str(column).startswith(FLAG_PREFIX)
        and not str(column).startswith(METRIC_PREFIX)
        and not str(column).endswith("_severity")
    ]
    if not found:
        raise DataError(
            f"Artifact flags are required; obs has no {FLAG_PREFIX}* columns. Run "
            "annotate_artifacts(adata) first, name your own columns with artifact_keys=[...], or "
            "set artifact='none'."
        )
    return [flag for flag in found if flag != "any"]


def _flag_values(adata: AnnData, column: str, name: str, *, is_flag: bool) -> np.ndarray:
    """Return a column of flags or severities as float32, NaN where missing."""
    if column not in adata.obs.columns:
        have = [str(other) for other in adata.obs.columns]
        raise DataError(
            f"Artifact {name!r} needs the obs column {column!r}, which is absent"
            f"{near(column, have)}. Run annotate_artifacts(adata) first, name your own columns "
            "with artifact_keys=[...], or set artifact='none'."
        )
    series = adata.obs[column]
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    numbers = pd.to_numeric(series.astype(object), errors="coerce").to_numpy(np.float32)
    is_text = np.isnan(numbers) & ~series.isna().to_numpy()
    outside = (numbers < 0) | (numbers > 1)
    if is_flag:
        outside |= ~np.isnan(numbers) & (numbers != 0) & (numbers != 1)
    if is_text.any() or outside.any():
        example = series[is_text | outside].iloc[0]
        raise DataError(
            f"obs[{column!r}] must hold {'0/1 or booleans' if is_flag else 'values in [0, 1]'}; "
            f"{int((is_text | outside).sum())} cells hold others, for example {str(example)!r}."
        )
    return numbers
