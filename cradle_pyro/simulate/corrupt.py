"""Real cells with known artifacts added.

The counts of chosen cells are thinned, mixed or summed as whole molecules, so that an integer
screen stays one, and the counts of before are kept beside those of after. What a model recovers
from the corrupted cells can then be compared with what was really measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from cradle_pyro.errors import DataError, near, shown
from cradle_pyro.simulate.perturbseq import ARTIFACT_KINDS

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike, NDArray

__all__ = ["corrupt"]

_ORIGINAL = "uncorrupted"
_CHUNK = 512


@dataclass(frozen=True)
class _Molecules:
    """Whole molecules of some cells: those of the genes kept, and of the rest in two pools."""

    counts: sparse.csr_array  # (cells, genes) int64
    rest: NDArray[np.int64]  # (cells, 2) molecules of genes not kept: cytoplasmic, mitochondrial

    def rows(self, rows: NDArray[np.int64]) -> _Molecules:
        return _Molecules(self.counts[rows], self.rest[rows])

    def thinned(
        self, rng: np.random.Generator, keep: NDArray[np.float64], gene_pool: NDArray[np.int64]
    ) -> _Molecules:
        """Keep each molecule with its cell's and pool's probability ``keep`` (cells, 2)."""
        counts = self.counts.copy()
        row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        counts.data = rng.binomial(counts.data, keep[row, gene_pool[counts.indices]])
        counts.eliminate_zeros()
        return _Molecules(counts, rng.binomial(self.rest, keep))

    def plus(self, other: _Molecules) -> _Molecules:
        return _Molecules(sparse.csr_array(self.counts + other.counts), self.rest + other.rest)


def corrupt(
    adata: AnnData,
    kinds: Sequence[str] = ARTIFACT_KINDS,
    *,
    share: float = 0.2,
    seed: int = 0,
    layer: str | None = None,
    degree: tuple[float, float] = (0.5, 0.95),
    eligible: ArrayLike | None = None,
    total_key: str | None = None,
    mito_key: str | None = None,
    mito_prefix: str = "MT-",
) -> AnnData:
    """Return a copy of a screen in which a known share of the cells carries an artifact.

    Parameters
    ----------
    adata : AnnData
        A screen with raw counts; it is not changed.
    kinds : sequence of str
        Which of ``"low_capture"``, ``"leaking"``, ``"ambient"``, ``"doublet"``, equally often.
    share : float
        Share of the eligible cells that get one, in [0, 1].
    seed : int
        The same seed gives the same cells and counts.
    layer : str, optional
        Layer with the raw counts; by default ``X``. Other matrices stay as they are.
    degree : tuple of float
        Range, within (0, 1), from which a cell's degree is drawn uniformly (see Notes).
    eligible : array of bool, shape (cells,), optional
        The clean cells: only they are changed, serve as a doublet's second cell and make the soup.
    total_key, mito_key : str, optional
        Columns of ``obs`` with whole-transcriptome totals (UMIs) and mitochondrial percentages
        (0 to 100), for screens that keep some genes only. They follow the molecules that are lost
        or gained outside the kept genes. `mito_key` needs `total_key`; with `total_key` alone all
        other molecules count as cytoplasmic.
    mito_prefix : str
        How the names of mitochondrial genes begin (case is ignored).

    Returns
    -------
    AnnData
        With the new counts in place of the old ones, ``layers["uncorrupted"]`` (the old ones),
        ``obs["corruption"]`` (``"none"`` or the kind) and ``obs["corruption_degree"]`` (0 where
        none). Columns such as the number of detected genes are left alone: recompute them.

    Raises
    ------
    DataError
        A kind, layer or column is unknown, a number is out of range, counts are not whole numbers,
        a total is below the cell's counts, or ``"leaking"`` is asked for where mitochondrial RNA
        is neither among the genes nor in `mito_key` (it would only be low capture).

    Notes
    -----
    With degree d, molecule by molecule:

    - low_capture: each molecule is kept with probability 1 - d;
    - leaking: each molecule that is not mitochondrial is kept with probability 1 - d;
    - ambient: each molecule is kept with probability 1 - d, and Poisson(d · total) molecules of
      the soup (the mean profile of the eligible cells) are added;
    - doublet: each molecule of another cell is added with probability d.

    A cell that would lose its last count keeps one, since an empty droplet is not a cell.

    Examples
    --------
    >>> from cradle_pyro.simulate import simulate_perturbseq
    >>> screen = simulate_perturbseq(
    ...     n_cells=300, n_genes=60, n_perturbations=4, n_pairs=2, artifact_share=0.0
    ... )
    >>> bad = corrupt(screen, ["low_capture"], share=0.1)
    >>> int((bad.obs["corruption"] == "low_capture").sum())
    30
    """
    _check(adata, kinds, share, degree, layer)
    counts = _whole_counts(adata, layer)
    is_mito = adata.var_names.str.upper().str.startswith(mito_prefix.upper())
    if "leaking" in kinds and not is_mito.any() and mito_key is None:
        raise DataError(
            f"'leaking' needs mitochondrial RNA: no gene name begins with {mito_prefix!r}. "
            "Give mito_key (with total_key), another mito_prefix, or leave 'leaking' out of kinds."
        )
    gene_pool = np.asarray(is_mito, dtype=np.int64)
    clean = _eligible(adata, eligible)
    cells = _Molecules(counts, _rest(adata, counts, gene_pool, total_key, mito_key))

    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(clean, size=round(share * len(clean)), replace=False))
    kind = np.asarray(kinds, dtype=object)[rng.permutation(np.arange(len(chosen)) % len(kinds))]
    much = rng.uniform(*degree, size=len(chosen))
    changed = [
        (rows, _apply(rng, name, cells, rows, much[kind == name], clean, gene_pool))
        for name in dict.fromkeys(kinds)
        if len(rows := chosen[kind == name])
    ]

    result = adata.to_memory() if adata.isbacked else adata.copy()
    old = result.X if layer is None else result.layers[layer]
    result.layers[_ORIGINAL] = old.copy()
    new = _with_rows(old, cells, changed)
    if layer is None:
        result.X = new
    else:
        result.layers[layer] = new
    names, degrees = np.full(len(counts.indptr) - 1, "none", dtype=object), np.zeros(adata.n_obs)
    names[chosen], degrees[chosen] = kind, much
    result.obs["corruption"] = pd.Categorical(names, categories=["none", *dict.fromkeys(kinds)])
    result.obs["corruption_degree"] = degrees
    _update_totals(result, changed, gene_pool, total_key, mito_key)
    return result


def _check(
    adata: AnnData,
    kinds: Sequence[str],
    share: float,
    degree: tuple[float, float],
    layer: str | None,
) -> None:
    """Raise a DataError for settings that cannot be, before any work."""
    unknown = [kind for kind in kinds if kind not in ARTIFACT_KINDS]
    if isinstance(kinds, str) or unknown or not len(kinds):
        hint = near(str(unknown[0]), ARTIFACT_KINDS) if unknown else ""
        raise DataError(
            f"kinds must be a list of some of {shown(ARTIFACT_KINDS)}, found {kinds!r}{hint}."
        )
    if not 0 <= share <= 1:
        raise DataError(f"share must lie in [0, 1], found {share}.")
    if len(degree) != 2 or not 0 < degree[0] <= degree[1] < 1:
        raise DataError(f"degree must be a range (low, high) within (0, 1), found {degree}.")
    if layer is not None and layer not in adata.layers:
        raise DataError(
            f"layer {layer!r} is not in the screen, which has {shown(adata.layers)}"
            f"{near(layer, list(adata.layers))}. Leave layer out to use X."
        )
    if _ORIGINAL in adata.layers:
        raise DataError(
            f"the screen has a layer {_ORIGINAL!r}: it was corrupted before. Corrupt the original."
        )


def _whole_counts(adata: AnnData, layer: str | None) -> sparse.csr_array:
    """Return the counts as int64 CSR, or raise a DataError if they are not counts."""
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise DataError("the screen has no X. Name the layer with the counts: layer='counts'.")
    matrix = matrix.to_memory() if hasattr(matrix, "to_memory") else matrix[:]
    counts = sparse.csr_array(matrix)
    whole = np.isfinite(counts.data) & (counts.data >= 0) & (counts.data % 1 == 0)
    if not whole.all():
        raise DataError(
            f"raw counts (whole numbers, 0 or more) are required in {layer or 'X'}, found "
            f"{int((~whole).sum())} other values such as {shown(counts.data[~whole], 3)}. "
            "Name the layer with raw counts."
        )
    return sparse.csr_array(
        (counts.data.astype(np.int64), counts.indices, counts.indptr), shape=counts.shape
    )


def _eligible(adata: AnnData, eligible: ArrayLike | None) -> NDArray[np.int64]:
    """Return the positions of the cells that may be changed."""
    mask = np.ones(adata.n_obs, dtype=bool) if eligible is None else np.asarray(eligible)
    if mask.dtype != bool or mask.shape != (adata.n_obs,) or mask.sum() < 2:
        raise DataError(
            f"eligible must be {adata.n_obs} booleans, at least two of them true, found "
            f"{mask.dtype} of shape {mask.shape} with {int(np.count_nonzero(mask))} true."
        )
    return np.flatnonzero(mask)


def _column(adata: AnnData, key: str) -> NDArray[np.float64]:
    """Return a numeric column of obs."""
    if key not in adata.obs:
        raise DataError(f"obs has no column {key!r}{near(key, list(adata.obs.columns))}.")
    values = pd.to_numeric(adata.obs[key], errors="coerce").to_numpy(dtype=np.float64)
    if not (np.isfinite(values) & (values >= 0)).all():
        bad = adata.obs[key][~(np.isfinite(values) & (values >= 0))]
        raise DataError(f"obs[{key!r}] must hold numbers, 0 or more, found {shown(bad)}.")
    return values


def _rest(
    adata: AnnData,
    counts: sparse.csr_array,
    gene_pool: NDArray[np.int64],
    total_key: str | None,
    mito_key: str | None,
) -> NDArray[np.int64]:
    """Return the molecules outside the kept genes, (cells, 2): cytoplasmic, mitochondrial."""
    if total_key is None:
        if mito_key is not None:
            raise DataError(f"mito_key={mito_key!r} needs total_key: percentages of which total?")
        return np.zeros((adata.n_obs, 2), dtype=np.int64)
    kept = _by_pool(counts, gene_pool)
    total = np.rint(_column(adata, total_key)).astype(np.int64)
    low = total < kept.sum(axis=1)
    if low.any():
        raise DataError(
            f"obs[{total_key!r}] must be at least each cell's counts; it is lower in "
            f"{int(low.sum())} cells: {shown(adata.obs_names[low])}. Name the column with totals."
        )
    rest = total - kept.sum(axis=1)
    if mito_key is None:
        return np.stack([rest, np.zeros_like(rest)], axis=1)
    percent = _column(adata, mito_key)
    if percent.max() > 100:
        raise DataError(f"obs[{mito_key!r}] must hold percentages, found {percent.max()}.")
    mito = np.rint(percent / 100 * total).astype(np.int64) - kept[:, 1]
    mito = np.clip(mito, 0, rest)
    return np.stack([rest - mito, mito], axis=1)


def _by_pool(counts: sparse.csr_array, gene_pool: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the kept genes' molecules, (cells, 2): cytoplasmic, mitochondrial."""
    pools = np.stack([1 - gene_pool, gene_pool], axis=1)
    return np.asarray(counts @ pools, dtype=np.int64)


def _apply(
    rng: np.random.Generator,
    kind: str,
    cells: _Molecules,
    rows: NDArray[np.int64],
    degree: NDArray[np.float64],
    clean: NDArray[np.int64],
    gene_pool: NDArray[np.int64],
) -> _Molecules:
    """Return the molecules of `rows` with an artifact of one kind."""
    own = cells.rows(rows)
    both = np.repeat(degree[:, None], 2, axis=1)
    if kind == "doublet":
        # A shift by 1 to n - 1 places among the clean cells never meets the cell itself.
        place = np.searchsorted(clean, rows) + rng.integers(1, len(clean), size=len(rows))
        other = cells.rows(clean[place % len(clean)])
        return own.plus(other.thinned(rng, both, gene_pool))
    keep = 1 - both
    if kind == "leaking":
        keep[:, 1] = 1.0
    left = own.thinned(rng, keep, gene_pool)
    if kind == "ambient":
        left = left.plus(_ambient(rng, cells.rows(clean), own, degree))
    return _with_one_count(rng, left, own)


def _ambient(
    rng: np.random.Generator, clean: _Molecules, own: _Molecules, degree: NDArray[np.float64]
) -> _Molecules:
    """Return Poisson molecules of the clean cells' mean profile, `degree` of each cell's total."""
    n_genes = own.counts.shape[1]
    profile = np.concatenate([clean.counts.sum(axis=0), clean.rest.sum(axis=0)])
    total = own.counts.sum(axis=1) + own.rest.sum(axis=1)
    n_molecules = rng.poisson(degree * total)
    drawn = [  # in parts, since a draw is dense in the genes
        sparse.csr_array(rng.multinomial(part, profile / profile.sum()))
        for part in np.array_split(n_molecules, max(1, len(n_molecules) // _CHUNK))
    ]
    joined = sparse.csr_array(sparse.vstack(drawn, format="csr"))
    return _Molecules(joined[:, :n_genes], joined[:, n_genes:].toarray())


def _with_one_count(rng: np.random.Generator, left: _Molecules, own: _Molecules) -> _Molecules:
    """Give cells that lost their last count one of their own back."""
    lost = np.flatnonzero((np.diff(left.counts.indptr) == 0) & (np.diff(own.counts.indptr) > 0))
    if not len(lost):
        return left
    genes = [
        rng.choice(own.counts.indices[part], p=own.counts.data[part] / own.counts.data[part].sum())
        for part in (slice(*own.counts.indptr[[row, row + 1]]) for row in lost)
    ]
    back = (np.ones(len(lost), dtype=np.int64), (lost, genes))
    counts = left.counts + sparse.csr_array(back, shape=left.counts.shape)
    return _Molecules(sparse.csr_array(counts), left.rest)


def _with_rows(
    old: Any, cells: _Molecules, changed: Sequence[tuple[NDArray[np.int64], _Molecules]]
) -> Any:
    """Return `old` with the changed rows in place, in its own container and number type."""
    if not changed:
        return old
    rows = np.concatenate([part for part, _ in changed])
    new = sparse.vstack([molecules.counts for _, molecules in changed], format="csr")
    if not sparse.issparse(old):
        result = np.array(old)
        result[rows] = new.toarray()
        return result
    order = np.arange(cells.counts.shape[0])
    order[rows] = len(order) + np.arange(len(rows))
    joined = sparse.vstack([cells.counts, new], format="csr")[order]
    return type(old)(joined.astype(old.dtype))


def _update_totals(
    adata: AnnData,
    changed: Sequence[tuple[NDArray[np.int64], _Molecules]],
    gene_pool: NDArray[np.int64],
    total_key: str | None,
    mito_key: str | None,
) -> None:
    """Recompute the whole-transcriptome columns of the changed cells, in place."""
    if total_key is None or not changed:
        return
    rows = np.concatenate([part for part, _ in changed])
    pools = np.concatenate([_by_pool(part.counts, gene_pool) + part.rest for _, part in changed])
    values = {total_key: pools.sum(axis=1)}
    if mito_key is not None:
        values[mito_key] = 100 * pools[:, 1] / np.maximum(pools.sum(axis=1), 1)
    for key, new in values.items():
        column = adata.obs[key].to_numpy(copy=True)
        column = column if key == total_key else column.astype(np.float64)
        column[rows] = new
        adata.obs[key] = column
