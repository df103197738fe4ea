"""Annotate cells that fail quality control, without dropping any.

A flag is raised where a metric lies more than `n_mads` unscaled median absolute deviations from
the median of the cells used for fitting: total counts and detected genes on a log1p scale (lower
tail), percentages of mitochondrial, ribosomal and haemoglobin counts as they are (upper tail).
Doublets are scored with scrublet and compared with its own threshold.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from cradle_pyro.data.fields import Counts, iter_count_rows, read_counts
from cradle_pyro.errors import DataError, DataWarning, near, shown
from cradle_pyro.threads import torch_threads_kept

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "FLAGS",
    "Metrics",
    "QCCut",
    "QCPrefixes",
    "QCThresholds",
    "annotate_artifacts",
    "fit_thresholds",
    "qc_flags",
    "qc_metrics",
    "qc_severities",
]

Metrics = Mapping[str, NDArray[np.floating]]
"""Name of a QC metric to its value per cell, shape (cells,)."""


class _Rule(NamedTuple):
    metric: str
    side: Literal["lower", "upper"]
    log1p: bool


_RULES: Final = {
    "low_counts": _Rule("counts", "lower", log1p=True),
    "low_genes": _Rule("genes", "lower", log1p=True),
    "high_mito": _Rule("pct_mito", "upper", log1p=False),
    "high_ribo": _Rule("pct_ribo", "upper", log1p=False),
    "high_hb": _Rule("pct_hb", "upper", log1p=False),
    "doublet": _Rule("doublet_score", "upper", log1p=False),
}
FLAGS: Final = tuple(_RULES)
"""All flags, in the order in which they are written."""

_METRICS: Final = tuple(rule.metric for rule in _RULES.values())
_SCORE: Final = "doublet_score"
_LEAST_SEVERITY: Final = 0.01
_MOST_CELLS_FOR_DOUBLETS: Final = 20_000
# Beginnings of the reasons for leaving out a flag that deserve a warning.
_CONSTANT: Final = "more than half of the cells share one value of"
_UNSCORED: Final = "doublets could not be scored"


@dataclass(frozen=True)
class QCPrefixes:
    """How the names of mitochondrial, ribosomal and haemoglobin genes begin.

    Parameters
    ----------
    mito, ribo, hb
        Prefixes, upper and lower case distinguished. The defaults are human; the haemoglobin ones
        leave out genes that only begin with HB (HBEGF, HBP1, HBS1L).

    Examples
    --------
    >>> QCPrefixes().masks(["MT-CO1", "HBEGF", "HBA1"])["hb"].tolist()
    [False, False, True]
    """

    mito: tuple[str, ...] = ("MT-",)
    ribo: tuple[str, ...] = ("RPS", "RPL")
    hb: tuple[str, ...] = ("HBA", "HBB", "HBD", "HBE1", "HBG1", "HBG2", "HBM", "HBQ1", "HBZ")

    @classmethod
    def mouse(cls) -> QCPrefixes:
        """Return the prefixes of mouse gene symbols."""
        return cls(("mt-",), ("Rps", "Rpl"), ("Hba-", "Hbb-", "Hbq1", "Hbz"))

    def masks(self, gene_names: ArrayLike) -> dict[str, NDArray[np.bool_]]:
        """Return which genes belong to each of ``mito``, ``ribo`` and ``hb``, shape (genes,)."""
        names = [str(name) for name in np.asarray(gene_names)]
        return {
            part: np.array([name.startswith(getattr(self, part)) for name in names], dtype=bool)
            for part in ("mito", "ribo", "hb")
        }


@dataclass(frozen=True)
class QCCut:
    """Where one flag begins.

    Parameters
    ----------
    cut
        Values beyond it (below for counts and genes, above for the others) raise the flag; on the
        flag's scale (log1p for counts and genes).
    median, mad
        Centre and unscaled median absolute deviation of the fitted cells, same scale. None for
        doublets, whose cut is scrublet's.
    """

    cut: float
    median: float | None = None
    mad: float | None = None


@dataclass(frozen=True)
class QCThresholds:
    """Fitted thresholds, to be used again on other cells.

    Parameters
    ----------
    n_mads
        Distance from the median, in unscaled MADs.
    cuts
        Flag to where it begins; only the flags that could be computed.
    left_out
        Flag to the reason why it could not be.
    """

    n_mads: float
    cuts: Mapping[str, QCCut]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the flags with a threshold."""
        return tuple(self.cuts)

    def at(self, n_mads: float) -> QCThresholds:
        """Return the thresholds of the same cells at another number of MADs.

        Doublets have no MAD: their cut stays.
        """
        n_mads = _positive(n_mads)
        cuts = {
            flag: old if old.mad is None else _cut(flag, old.median or 0.0, old.mad, n_mads)
            for flag, old in self.cuts.items()
        }
        return dataclasses.replace(self, n_mads=n_mads, cuts=cuts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and dictionaries, for JSON or ``adata.uns``."""
        return {
            "n_mads": float(self.n_mads),
            "flags": list(self.cuts),
            "thresholds": {
                flag: {
                    name: value
                    for name, value in dataclasses.asdict(cut).items()
                    if value is not None
                }
                for flag, cut in self.cuts.items()
            },
            "left_out": dict(self.left_out),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> QCThresholds:
        """Return the thresholds that `to_dict` wrote, for example ``adata.uns["cradle_qc"]``.

        Raises
        ------
        DataError
            If entries are missing.
        """
        try:
            cuts = {
                str(flag): QCCut(**{name: float(value) for name, value in cut.items()})
                for flag, cut in record["thresholds"].items()
            }
            ordered = {flag: cuts[flag] for flag in FLAGS if flag in cuts}
            left_out = {str(key): str(value) for key, value in record["left_out"].items()}
            return cls(float(record["n_mads"]), ordered, left_out)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                "QC thresholds are a QCThresholds or the uns['cradle_qc'] of an annotated AnnData; "
                f"found entries {shown(record)} ({error!r}). Run annotate_artifacts first."
            ) from error


def annotate_artifacts(
    adata: AnnData,
    n_mads: float = 3.0,
    *,
    layer: str | None = None,
    fit_on: ArrayLike | str | None = None,
    flags: Sequence[str] | None = None,
    thresholds: QCThresholds | Mapping[str, Any] | None = None,
    prefixes: QCPrefixes | None = None,
    gene_symbols: str | None = None,
    doublets: bool | Literal["auto"] = "auto",
    metrics: Mapping[str, str] | None = None,
    seed: int = 0,
) -> QCThresholds:
    """Write QC flags, severities and metrics to `adata`, and return the thresholds used.

    Parameters
    ----------
    adata
        Cells with raw counts, in memory or backed. Changed in place: ``obs["cradle_artifact"]``
        (any flag), ``obs["cradle_qc_<flag>"]``, ``obs["cradle_qc_<flag>_severity"]``,
        ``obs["cradle_qc_metric_<metric>"]`` and ``uns["cradle_qc"]``. No cell is dropped, and
        columns of an earlier annotation are replaced.
    n_mads
        Distance from the median at which a flag begins, in unscaled MADs; usually 3, 4 or 5.
        Ignored when `thresholds` are given.
    layer
        Layer with the raw counts; default ``X``.
    fit_on
        Cells on which thresholds are fitted, normally the training cells: a boolean mask, integer
        positions, or ``"column=value"`` such as ``"split=train"``. Default all cells.
    flags
        Flags to raise, of `FLAGS`; default all that can be computed. Leave out a flag that is
        biology in the screen at hand, such as ``"high_hb"`` where cells turn erythroid.
    thresholds
        Thresholds fitted before (or a ``uns["cradle_qc"]``), used instead of fitting.
    prefixes
        How mitochondrial, ribosomal and haemoglobin gene names begin; default human.
    gene_symbols
        Column of ``var`` with gene symbols, when ``var_names`` are other identifiers.
    doublets
        Score doublets with scrublet. ``"auto"``: where it can be done in seconds (in memory, at
        most 20,000 cells).
    metrics
        QC columns of ``obs`` to use instead of computing, for example of the whole transcriptome:
        ``{"counts": "n_counts_full", "genes": "n_genes_full", "pct_mito": "pct_mito_full"}``.
        Given counts are also the denominator of computed percentages. A ``doublet_score`` column
        is a score (with its threshold in ``uns["scrublet"]``) or boolean calls.
    seed
        Seed of scrublet's simulated doublets.

    Returns
    -------
    QCThresholds
        Fitted on `fit_on`, or those given.

    Raises
    ------
    DataError
        If a column or layer is missing, counts are not raw, `fit_on` names no cells, or
        thresholds need a metric that the data do not have.

    Warns
    -----
    DataWarning
        If a metric does not vary (MAD zero) or doublets cannot be scored; the flag is left out.

    Notes
    -----
    With the distance d from the median in MADs, the severity is 0 for d <= n_mads and 1 - n_mads/d
    beyond (at least 0.01): 0.5 at twice the threshold. For doublets it is
    (score - cut) / (1 - cut). Percentages of genes that are absent, or not seen in most cells,
    give no flag; the reasons are in ``uns["cradle_qc"]["left_out"]``.

    With `fit_on`, doublets among the fitted cells are scored without the other cells, so that
    nothing about the fitted cells depends on them; the others are scored beside all cells.

    Examples
    --------
    >>> import anndata
    >>> rng = np.random.default_rng(0)
    >>> adata = anndata.AnnData(rng.poisson(1.0, size=(50, 100)).astype(np.float32))
    >>> found = annotate_artifacts(adata, n_mads=4, doublets=False)
    >>> found.flags, "cradle_artifact" in adata.obs
    (('low_counts', 'low_genes'), True)
    """
    if thresholds is not None and not isinstance(thresholds, QCThresholds):
        thresholds = QCThresholds.from_dict(thresholds)
    prefixes = prefixes or QCPrefixes()
    n_mads = _positive(n_mads if thresholds is None else thresholds.n_mads)
    unwanted = _unwanted(flags, thresholds)
    fit_rows = _fit_rows(adata, fit_on)
    given = _given_metrics(adata, metrics or {})
    counts = read_counts(adata, layer)
    genes = _gene_names(adata, gene_symbols)

    values = {**_all_metrics(counts, genes, prefixes, given.get("counts")), **given}
    score_cut = _given_score_cut(adata, given) if thresholds is None else None
    left_out = dict(unwanted)
    if _SCORE not in values and _wants_doublets(adata, doublets, thresholds, left_out):
        found = _score_doublets(counts, None if fit_on is None else fit_rows, seed)
        if isinstance(found, str):
            left_out["doublet"] = found
        else:
            values[_SCORE], score_cut = found
    if thresholds is None:
        at_fit = {name: value[fit_rows] for name, value in values.items()}
        thresholds = fit_thresholds(at_fit, n_mads, doublet_cut=score_cut)
        left_out = {**thresholds.left_out, **left_out}
    thresholds = _without(thresholds, left_out)
    _warn_left_out(left_out)
    _write(adata, values, thresholds, n_fit=len(fit_rows))
    return thresholds


def qc_metrics(
    counts: ArrayLike | sp.sparray | sp.spmatrix,
    gene_names: ArrayLike,
    *,
    prefixes: QCPrefixes | None = None,
    library: ArrayLike | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the QC metrics of raw counts, real or generated.

    Parameters
    ----------
    counts
        Raw counts, sparse or dense, shape (cells, genes).
    gene_names
        Names of the genes, shape (genes,).
    prefixes
        How mitochondrial, ribosomal and haemoglobin gene names begin; default human.
    library
        Total counts of each cell where only some genes are kept, shape (cells,); then ``counts``
        are these and percentages refer to them.

    Returns
    -------
    dict
        ``counts``, ``genes`` (detected), and ``pct_mito``, ``pct_ribo``, ``pct_hb`` in percent for
        the parts that have genes; each of shape (cells,). An empty cell has percentages of zero.

    Raises
    ------
    DataError
        If counts are negative, not integer or not finite, or shapes disagree.

    Examples
    --------
    >>> qc_metrics([[1, 3]], ["MT-CO1", "ACTB"])["pct_mito"].tolist()
    [25.0]
    """
    import scanpy as sc
    from anndata import AnnData

    matrix = sp.csr_matrix(counts)
    names = np.asarray(gene_names)
    if matrix.shape[1] != len(names):
        raise DataError(
            f"Counts need one name per gene: found {matrix.shape[1]} genes and {len(names)} names."
        )
    _check_raw(matrix)
    masks = {k: v for k, v in (prefixes or QCPrefixes()).masks(names).items() if v.any()}
    cells = AnnData(
        matrix,
        obs=pd.DataFrame(index=pd.RangeIndex(matrix.shape[0]).astype(str)),
        var=pd.DataFrame(masks, index=pd.RangeIndex(matrix.shape[1]).astype(str)),
    )
    with warnings.catch_warnings(), torch_threads_kept():
        warnings.simplefilter("ignore")  # scanpy divides by zero in empty cells
        found, _ = sc.pp.calculate_qc_metrics(
            cells, qc_vars=list(masks), percent_top=None, log1p=False
        )
    total = found["total_counts"].to_numpy(np.float64)
    if library is not None:
        total = np.asarray(library, dtype=np.float64)
        if total.shape != (matrix.shape[0],):
            raise DataError(
                f"library needs one total per cell ({matrix.shape[0]}), found {total.shape}."
            )
    result = {"counts": total, "genes": found["n_genes_by_counts"].to_numpy(np.float64)}
    for part in masks:
        share = found[f"total_counts_{part}"].to_numpy(np.float64)
        result[f"pct_{part}"] = 100 * np.divide(
            share, total, out=np.zeros_like(share), where=total > 0
        )
    return result


def fit_thresholds(
    metrics: Metrics, n_mads: float = 3.0, *, doublet_cut: float | None = None
) -> QCThresholds:
    """Return thresholds at median ± n_mads · MAD of each metric.

    Parameters
    ----------
    metrics
        Any of ``counts, genes, pct_mito, pct_ribo, pct_hb``, each of shape (cells,); a
        ``doublet_score`` is used with `doublet_cut`.
    n_mads
        Distance from the median in unscaled MADs, positive.
    doublet_cut
        Score above which a cell is a doublet.

    Returns
    -------
    QCThresholds
        Without the flags whose metric is absent or does not vary (MAD zero: the median would be
        the threshold, and every cell beyond it a failure).

    Raises
    ------
    DataError
        If `n_mads` is not positive, a metric is unknown, or there are no cells.

    Examples
    --------
    >>> fit_thresholds({"pct_mito": np.array([1.0, 2.0, 3.0])}, 3).cuts["high_mito"].cut
    5.0
    """
    n_mads = _positive(n_mads)
    _check_metric_names(metrics)
    cuts: dict[str, QCCut] = {}
    left_out: dict[str, str] = {}
    for flag, rule in _RULES.items():
        if flag == "doublet":
            if doublet_cut is not None:
                cuts[flag] = QCCut(float(doublet_cut))
            else:
                left_out[flag] = "doublets were not scored"
            continue
        if rule.metric not in metrics:
            left_out[flag] = f"no metric {rule.metric} (the data have no such genes)"
            continue
        values = _on_scale(flag, metrics)
        if not len(values):
            raise DataError("Thresholds need at least one cell to be fitted on, found none.")
        median = float(np.median(values))
        mad = float(np.median(np.abs(values - median)))
        if mad > 0:
            cuts[flag] = _cut(flag, median, mad, n_mads)
        elif median == 0:
            left_out[flag] = f"{rule.metric} is 0 in most cells"
        else:
            left_out[flag] = f"{_CONSTANT} {rule.metric}"
    return QCThresholds(n_mads, cuts, left_out)


def qc_flags(metrics: Metrics, thresholds: QCThresholds) -> dict[str, NDArray[np.bool_]]:
    """Return which cells fail each flag of `thresholds`.

    Parameters
    ----------
    metrics
        Metrics of the cells, each of shape (cells,).
    thresholds
        From `fit_thresholds` or `annotate_artifacts`.

    Returns
    -------
    dict
        Flag to a boolean array, shape (cells,). A missing doublet score (NaN) does not fail.

    Raises
    ------
    DataError
        If a metric that the thresholds need is missing.

    Examples
    --------
    >>> fitted = fit_thresholds({"pct_mito": np.array([1.0, 2.0, 3.0])}, 3)
    >>> qc_flags({"pct_mito": np.array([5.0, 5.1])}, fitted)["high_mito"].tolist()
    [False, True]
    """
    _check_available(metrics, thresholds)
    return {
        flag: (
            _on_scale(flag, metrics) < cut.cut
            if _RULES[flag].side == "lower"
            else _on_scale(flag, metrics) > cut.cut
        )
        for flag, cut in thresholds.cuts.items()
    }


def qc_severities(metrics: Metrics, thresholds: QCThresholds) -> dict[str, NDArray[np.float64]]:
    """Return how badly cells fail each flag: 0 where passing, in [0.01, 1] where failing.

    Parameters
    ----------
    metrics
        Metrics of the cells, each of shape (cells,).
    thresholds
        From `fit_thresholds` or `annotate_artifacts`.

    Returns
    -------
    dict
        Flag to severities, shape (cells,): 1 - n_mads/d at d MADs from the median; for doublets
        (score - cut) / (1 - cut).

    Raises
    ------
    DataError
        If a metric that the thresholds need is missing.
    """
    severities = {}
    for flag, failing in qc_flags(metrics, thresholds).items():
        cut, values = thresholds.cuts[flag], _on_scale(flag, metrics)[failing]
        if cut.mad is None or cut.median is None:
            degree = (values - cut.cut) / max(1.0 - cut.cut, 1e-6)
        else:
            degree = 1.0 - thresholds.n_mads * cut.mad / np.abs(values - cut.median)
        severity = np.zeros(len(failing))
        severity[failing] = np.clip(degree, _LEAST_SEVERITY, 1.0)
        severities[flag] = severity
    return severities


def _positive(n_mads: float) -> float:
    if not (np.isfinite(n_mads) and n_mads > 0):
        raise DataError(f"n_mads must be a positive number, usually 3, 4 or 5; found {n_mads}.")
    return float(n_mads)


def _cut(flag: str, median: float, mad: float, n_mads: float) -> QCCut:
    sign = -1 if _RULES[flag].side == "lower" else 1
    return QCCut(median + sign * n_mads * mad, median, mad)


def _on_scale(flag: str, metrics: Metrics) -> NDArray[np.float64]:
    rule = _RULES[flag]
    values = np.asarray(metrics[rule.metric], dtype=np.float64)
    return np.log1p(values) if rule.log1p else values


def _check_metric_names(names: Mapping[str, object]) -> None:
    unknown = [name for name in names if name not in _METRICS]
    if unknown:
        raise DataError(
            f"QC metrics are {shown(_METRICS, most=6)}; found {shown(unknown)}"
            f"{near(unknown[0], _METRICS)}."
        )


def _check_available(metrics: Metrics, thresholds: QCThresholds) -> None:
    missing = [flag for flag in thresholds.cuts if _RULES[flag].metric not in metrics]
    if missing:
        raise DataError(
            f"The thresholds for {shown(missing)} need the metrics "
            f"{shown(_RULES[flag].metric for flag in missing)}, which these cells do not have. "
            "Keep the genes they are computed from, or give them as obs columns "
            "(metrics={'pct_mito': 'my_column'})."
        )


def _check_raw(matrix: sp.csr_matrix) -> None:
    data = matrix.data
    finite = bool(np.isfinite(data).all())
    if not finite or (len(data) and data.min() < 0) or not (data == np.rint(data)).all():
        bad = data[~np.isfinite(data) | (data < 0) | (data != np.rint(data))]
        raise DataError(
            f"QC needs raw counts (non-negative integers); {len(bad)} of {len(data)} stored values "
            f"are not, such as {shown(bad, most=3)}. Name the layer with raw counts (layer=...)."
        )


def _unwanted(flags: Sequence[str] | None, thresholds: QCThresholds | None) -> dict[str, str]:
    """Return the flags that were not asked for, with that reason."""
    if flags is None:
        return {}
    wanted = [flags] if isinstance(flags, str) else list(flags)
    known = FLAGS if thresholds is None else thresholds.flags
    unknown = [flag for flag in wanted if flag not in known]
    if unknown:
        raise DataError(
            f"QC flags are {shown(known, most=len(FLAGS))}; found {shown(unknown)}"
            f"{near(unknown[0], known)}."
        )
    return {flag: "not asked for" for flag in FLAGS if flag not in wanted}


def _fit_rows(adata: AnnData, fit_on: ArrayLike | str | None) -> NDArray[np.intp]:
    """Return the positions of the cells on which thresholds are fitted."""
    if fit_on is None:
        return np.arange(adata.n_obs)
    if isinstance(fit_on, str):
        column, _, value = fit_on.partition("=")
        if column not in adata.obs:
            raise DataError(
                f"fit_on='column=value' needs a column of obs, found no {column!r}"
                f"{near(column, list(adata.obs))}. Columns: {shown(adata.obs)}."
            )
        values = adata.obs[column].astype(str).to_numpy()
        rows = np.flatnonzero(values == value)
        hint = f"{column} holds {shown(sorted(set(values)))}."
    else:
        chosen = np.asarray(fit_on)
        if chosen.dtype == bool and chosen.shape != (adata.n_obs,):
            raise DataError(
                f"fit_on as a mask needs one entry per cell ({adata.n_obs}), found {chosen.shape}."
            )
        if chosen.dtype != bool and (chosen.ndim != 1 or chosen.dtype.kind not in "iu"):
            raise DataError(
                "fit_on is a boolean mask, integer positions or 'column=value'; found "
                f"{chosen.dtype} of shape {chosen.shape}."
            )
        if chosen.dtype != bool and len(chosen) and not _within(chosen, adata.n_obs):
            raise DataError(f"fit_on holds positions outside 0 to {adata.n_obs - 1}.")
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else np.unique(chosen)
        hint = "The mask is false everywhere."
    if not len(rows):
        raise DataError(f"fit_on must choose cells to fit thresholds on, found none. {hint}")
    return rows


def _within(positions: NDArray[np.integer], n_cells: int) -> bool:
    return bool(positions.min() >= 0 and positions.max() < n_cells)


def _given_metrics(adata: AnnData, columns: Mapping[str, str]) -> dict[str, NDArray[np.float64]]:
    _check_metric_names(columns)
    missing = [column for column in columns.values() if column not in adata.obs]
    if missing:
        raise DataError(
            f"metrics names columns of obs, found no {shown(missing)}"
            f"{near(missing[0], list(adata.obs))}. Columns: {shown(adata.obs)}."
        )
    given = {}
    for name, column in columns.items():
        values = pd.to_numeric(adata.obs[column], errors="coerce").to_numpy(np.float64)
        n_bad = int((~np.isfinite(values) | (values < 0)).sum())
        if n_bad:
            raise DataError(
                f"The QC column {column!r} must hold numbers >= 0; {n_bad} of {len(values)} cells "
                "have none. Correct them, or leave the column out of metrics."
            )
        given[name] = values
    return given


def _given_score_cut(adata: AnnData, given: Metrics) -> float | None:
    """Return the cut for a doublet column of the user: its own, or 0.5 for boolean calls."""
    if _SCORE not in given:
        return None
    if np.isin(given[_SCORE], (0.0, 1.0)).all():
        return 0.5
    cut = adata.uns.get("scrublet", {}).get("threshold")
    if cut is None:
        raise DataError(
            "A doublet_score column needs a threshold in uns['scrublet']['threshold'], found none. "
            "Give a boolean column of calls instead, or leave it out to run scrublet."
        )
    return float(cut)


def _gene_names(adata: AnnData, gene_symbols: str | None) -> NDArray[np.object_]:
    if gene_symbols is None:
        return adata.var_names.to_numpy(dtype=object)
    if gene_symbols not in adata.var:
        raise DataError(
            f"gene_symbols names a column of var, found no {gene_symbols!r}"
            f"{near(gene_symbols, list(adata.var))}. Columns: {shown(adata.var)}."
        )
    return adata.var[gene_symbols].astype(str).to_numpy(dtype=object)


def _all_metrics(
    counts: Counts,
    genes: NDArray[np.object_],
    prefixes: QCPrefixes,
    library: NDArray[np.float64] | None,
) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of all cells, one chunk of rows in memory at a time."""
    parts = [
        qc_metrics(
            chunk, genes, prefixes=prefixes, library=None if library is None else library[rows]
        )
        for rows, chunk in iter_count_rows(counts)
    ]
    if not parts:
        raise DataError("QC needs at least one cell, found none.")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _wants_doublets(
    adata: AnnData,
    doublets: bool | Literal["auto"],  # noqa: FBT001 - the user's setting, passed on
    thresholds: QCThresholds | None,
    left_out: dict[str, str],
) -> bool:
    """Return whether to run scrublet; with reused thresholds, only where they have a cut."""
    if doublets not in (True, False, "auto"):
        raise DataError(f"doublets is True, False or 'auto'; found {doublets!r}.")
    if "doublet" in left_out or (thresholds is not None and "doublet" not in thresholds.cuts):
        return False
    if doublets == "auto":
        wanted = not adata.isbacked and adata.n_obs <= _MOST_CELLS_FOR_DOUBLETS
        if not wanted:
            left_out["doublet"] = (
                f"{_UNSCORED}: the data are backed or have more than "
                f"{_MOST_CELLS_FOR_DOUBLETS:,} cells; doublets=True scores them all the same"
            )
        return wanted
    if not doublets:
        left_out["doublet"] = "doublets were not scored"
    return bool(doublets)


def _score_doublets(
    stored: Counts, fit_rows: NDArray[np.intp] | None, seed: int
) -> tuple[NDArray[np.float64], float] | str:
    """Return scores of all cells and scrublet's cut on the fitted cells, or why there are none."""
    # A matrix, not an array: scrublet multiplies with *, which is elementwise for arrays.
    counts = sp.csr_matrix(sp.vstack([chunk for _, chunk in iter_count_rows(stored)]))
    found = _scrublet(counts if fit_rows is None else counts[fit_rows], seed)
    if isinstance(found, str) or fit_rows is None or len(fit_rows) == counts.shape[0]:
        return found
    beside_all = _scrublet(counts, seed)
    if isinstance(beside_all, str):
        return beside_all
    scores = beside_all[0]
    scores[fit_rows] = found[0]
    return scores, found[1]


@torch_threads_kept()
def _scrublet(counts: sp.csr_matrix, seed: int) -> tuple[NDArray[np.float64], float] | str:
    import scanpy as sc
    from anndata import AnnData

    reason = ""
    # Panels have few variable genes; scrublet's 30 components may be more than there are.
    for n_components in (30, 10):
        cells = AnnData(
            counts.astype(np.float32),
            obs=pd.DataFrame(index=pd.RangeIndex(counts.shape[0]).astype(str)),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # The approximate search fails with current scipy sparse arrays.
                sc.pp.scrublet(
                    cells,
                    n_prin_comps=n_components,
                    use_approx_neighbors=False,
                    random_state=seed,
                    verbose=False,
                )
        except (ValueError, IndexError, ZeroDivisionError, ImportError) as error:
            reason = f"{_UNSCORED}: scrublet stopped with {str(error).splitlines()[0]!r}"
            continue
        cut = cells.uns["scrublet"].get("threshold")
        if cut is None:
            return f"{_UNSCORED}: scrublet found no threshold"
        return cells.obs["doublet_score"].to_numpy(np.float64).copy(), float(cut)
    return reason


def _without(thresholds: QCThresholds, left_out: Mapping[str, str]) -> QCThresholds:
    cuts = {flag: cut for flag, cut in thresholds.cuts.items() if flag not in left_out}
    return dataclasses.replace(thresholds, cuts=cuts, left_out={**thresholds.left_out, **left_out})


def _warn_left_out(left_out: Mapping[str, str]) -> None:
    reasons = [
        f"{flag} ({reason})"
        for flag, reason in left_out.items()
        if reason.startswith((_CONSTANT, _UNSCORED))
    ]
    if reasons:
        warnings.warn(
            f"QC flags left out: {'; '.join(reasons)}. The other flags are not affected.",
            DataWarning,
            stacklevel=3,
        )


def _write(
    adata: AnnData,
    values: Mapping[str, NDArray[np.float64]],
    thresholds: QCThresholds,
    *,
    n_fit: int,
) -> None:
    """Write the columns and the record, replacing those of an earlier annotation."""
    flags = qc_flags(values, thresholds)
    severities = qc_severities(values, thresholds)
    columns: dict[str, NDArray[np.generic]] = {
        "cradle_artifact": np.logical_or.reduce([np.zeros(adata.n_obs, bool), *flags.values()])
    }
    for flag in flags:
        columns[f"cradle_qc_{flag}"] = flags[flag]
        columns[f"cradle_qc_{flag}_severity"] = severities[flag]
    for name in _METRICS:
        if name in values:
            columns[f"cradle_qc_metric_{name}"] = values[name]
    old = [name for name in adata.obs if name in _our_columns()]
    new = pd.DataFrame(columns, index=adata.obs.index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a view becomes an AnnData of its own, as scanpy does
        adata.obs = pd.concat([adata.obs.drop(columns=old), new], axis=1)
        adata.uns["cradle_qc"] = {**thresholds.to_dict(), "n_cells_fitted": n_fit}


def _our_columns() -> Sequence[str]:
    flags = [f"cradle_qc_{flag}{end}" for flag in FLAGS for end in ("", "_severity")]
    return ["cradle_artifact", *flags, *(f"cradle_qc_metric_{name}" for name in _METRICS)]
