"""What single cells would have been: abduction, action and prediction for any number of cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.fields import read_screen, write_rows_atomic
from cradle_pyro.data.prepare import cell_data
from cradle_pyro.errors import DataError, QueryError
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.queries.abduction import predict
from cradle_pyro.queries.draws import Part, check_whole, over_draws
from cradle_pyro.queries.interventions import CheckedIntervention, Intervention, check, do
from cradle_pyro.queries.scale import SCALES, log2_expression
from cradle_pyro.queries.support import support_notes

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "cell_effect",
    "counterfactual",
    "query_cells",
    "query_record",
    "write_counterfactual",
]


def counterfactual(
    posterior: Posterior,
    cells: AnnData | CellData,
    intervention: Intervention,
    *,
    draws: int = 100,
    count_draws: int = 1,
    seed: int = 0,
    progress: bool = False,
    chunk: int | None = None,
) -> AnnData:
    """Return the same cells as they would have been under an intervention.

    Parameters
    ----------
    posterior
        A fitted pair.
    cells
        Cells with the columns the model was trained with, annotated; genes in any order. Or
        CellData aligned to the model.
    intervention
        From :func:`~cradle_pyro.do`.
    draws
        Posterior draws that ``rate`` and ``rate_sd`` are made from.
    count_draws
        Of these draws, how many counterfactual counts are kept: layers ``counts``, ``counts_1``,
        ``counts_2``, ...
    seed
        Seed of the draws. The same cells in the same order meet the same worlds and the same noise
        in every query with this seed.
    progress
        Show a progress bar.
    chunk
        Cells at a time; by default about a million entries.

    Returns
    -------
    AnnData
        Cells x genes, cells in the order given. ``layers["counts"]`` (also ``X``): one coupled
        draw, the counts that the cell's own noise gives under the intervention;
        ``layers["rate"]``: posterior mean of the expected fraction of the library (rows sum to the
        kept genes' share), or of the expected value where the input is log-normalised;
        ``layers["rate_sd"]``: its posterior standard deviation. ``obs``: the columns of `cells`,
        and ``cradle_library`` (that of ``counts``), ``cradle_out_of_support``.
        ``uns["cradle_query"]``: what was asked, and in what the training cells do not support it.

    Raises
    ------
    QueryError
        If the intervention names something that the model does not have or intervenes on itself,
        or a setting cannot be.
    DataError
        If there are no cells, or they do not fit the model.

    Notes
    -----
    Per draw: globals, basal state and kind of artifact are drawn from the guide given the factual
    cell, with the residual of its library, the noise of its flags, and for every count x a uniform
    number from [F(x - 1), F(x)]. The intervened model is then run with all of these (Pearl 2009,
    Causality, section 7.1). Under ``do()`` and ``do(perturbation="factual", artifact="factual")``
    the counts are the observed ones, exactly. What cannot be known from data is assumed: that the
    noise of one gene is its own, and that a count keeps its rank among the counts such a cell
    could have shown.

    Examples
    --------
    >>> import cradle_pyro as cp
    >>> adata = cp.simulate_perturbseq(n_cells=200, n_genes=40, n_perturbations=3, n_pairs=1)
    >>> settings = ["train.max_epochs=1", "qc.doublets=false", "qc.flags=['low_counts']"]
    >>> config = cp.Config().with_settings(settings)
    >>> prepared = cp.prepare(adata, config)
    >>> posterior = cp.fit(prepared.data, config, progress=False)
    >>> same = cp.counterfactual(posterior, prepared.adata[:5], cp.do(), draws=2)
    >>> bool((same.layers["counts"].toarray() == adata.X[:5].toarray()).all())
    True
    """
    _check_draws(draws, count_draws, seed=seed, chunk=chunk)
    data = query_cells(posterior, cells)
    checked = check(posterior, intervention, data.n_cells)
    found = _Rows((data.n_cells, posterior.schema.n_genes))
    library = _counterfactuals(
        posterior, data, checked, found.add, draws=draws, count_draws=count_draws, seed=seed,
        progress=progress, chunk=chunk,
    )  # fmt: skip
    about = _about(posterior, cells, data, [checked], library, draws=draws, seed=seed)
    return _as_anndata(about, found, x="counts")


def write_counterfactual(
    posterior: Posterior,
    cells: AnnData | CellData,
    intervention: Intervention,
    path: str | Path,
    *,
    draws: int = 100,
    count_draws: int = 1,
    seed: int = 0,
    progress: bool = False,
    chunk: int | None = None,
) -> AnnData:
    """Write the answer of :func:`counterfactual` to an h5ad file, a chunk of cells at a time.

    Parameters
    ----------
    posterior, cells, intervention, draws, count_draws, seed, progress, chunk
        As in :func:`counterfactual`.
    path
        The file; it holds the whole answer, or what was there before.

    Returns
    -------
    AnnData
        The answer, its matrices on disk.

    Raises
    ------
    QueryError, DataError
        As in :func:`counterfactual`; if the file cannot be written.
    """
    _check_draws(draws, count_draws, seed=seed, chunk=chunk)
    data = query_cells(posterior, cells)
    checked = check(posterior, intervention, data.n_cells)
    with write_rows_atomic(path, (data.n_cells, posterior.schema.n_genes)) as writer:
        library = _counterfactuals(
            posterior, data, checked, writer.add, draws=draws, count_draws=count_draws, seed=seed,
            progress=progress, chunk=chunk,
        )  # fmt: skip
        about = _about(posterior, cells, data, [checked], library, draws=draws, seed=seed)
        writer.finish(*about, x="counts")
    return read_screen(path, backed=True)


def _counterfactuals(
    posterior: Posterior,
    data: CellData,
    checked: CheckedIntervention,
    add: Callable[[str, Any], object],
    *,
    draws: int,
    count_draws: int,
    **how: Any,
) -> np.ndarray:
    """Hand the rows of each layer to `add`, cells in order; return the library of each cell."""
    library = np.empty(data.n_cells, dtype=np.float32)
    is_dense = data.values == "lognorm"
    moments = _Moments(draws)

    def use(part: Part) -> None:
        acts = checked.acts(part.abduction.batch, part.abduction.values, part.rows)
        world = predict(posterior.model, part.abduction, acts)
        if part.draw == 0:
            library[part.rows] = world[sites.LIBRARY].cpu().numpy()
        if part.draw < count_draws:
            values = world[sites.COUNTS].float().cpu().numpy()
            name = "counts" if part.draw == 0 else f"counts_{part.draw}"
            add(name, values if is_dense else sp.csr_matrix(values))
        moments.add(part.draw, world[sites.RATE].cpu().numpy())
        if part.draw == draws - 1:
            add("rate", moments.mean)
            add("rate_sd", moments.sd)

    over_draws(posterior, data, use, draws=draws, counts=count_draws, what="Counterfactuals", **how)
    return library


def cell_effect(
    posterior: Posterior,
    cells: AnnData | CellData,
    intervention: Intervention,
    reference: Intervention | None = None,
    *,
    draws: int = 100,
    seed: int = 0,
    progress: bool = False,
    chunk: int | None = None,
) -> AnnData:
    """Return each cell's own effect on every gene: intervention minus reference, same noise.

    Parameters
    ----------
    posterior, cells, draws, seed, progress, chunk
        As in :func:`counterfactual`.
    intervention, reference
        The two worlds; by default the reference is the factual one.

    Returns
    -------
    AnnData
        Cells x genes: ``X`` is the posterior mean of the difference of log2(1 + 1e4 rate),
        ``layers["sd"]`` its posterior standard deviation; ``obs`` and ``uns`` as in
        :func:`counterfactual`.

    Raises
    ------
    QueryError, DataError
        As in :func:`counterfactual`.
    """
    _check_draws(draws, seed=seed, chunk=chunk)
    data = query_cells(posterior, cells)
    checked = check(posterior, intervention, data.n_cells)
    base = check(posterior, do() if reference is None else reference, data.n_cells)
    found = _Rows((data.n_cells, posterior.schema.n_genes))
    moments = _Moments(draws)

    def expression(part: Part, one: CheckedIntervention) -> Tensor:
        acts = one.acts(part.abduction.batch, part.abduction.values, part.rows)
        return log2_expression(
            posterior, predict(posterior.model, part.abduction, acts)[sites.RATE]
        )

    def use(part: Part) -> None:
        first, second = expression(part, checked), expression(part, base)
        moments.add(part.draw, (first - second).cpu().numpy())
        if part.draw == draws - 1:
            found.add("mean", moments.mean)
            found.add("sd", moments.sd)

    over_draws(
        posterior, data, use, draws=draws, counts=0, seed=seed, chunk=chunk,
        progress=progress, what="Effects",
    )  # fmt: skip
    about = _about(
        posterior, cells, data, [checked, base], None, reference=str(base.intervention),
        scale=SCALES["rate"], draws=draws, seed=seed,
    )  # fmt: skip
    answer = _as_anndata(about, found, x="mean")
    del answer.layers["mean"]
    return answer


def query_cells(posterior: Posterior, cells: AnnData | CellData) -> CellData:
    """Return cells as CellData of the model's schema.

    Raises
    ------
    DataError
        If there are no cells, or they do not fit the model.
    QueryError
        If CellData have another schema.
    """
    if not (cells.n_cells if isinstance(cells, CellData) else cells.n_obs):
        raise DataError("Expected at least one cell, found none. Check how the cells were chosen.")
    if not isinstance(cells, CellData):
        return cell_data(cells, posterior.config.data, schema=posterior.schema)
    if cells.schema != posterior.schema:
        raise QueryError(
            "The cells were read with another schema than the model's: genes, perturbations, flags "
            "or covariates differ. Read them with CellData.from_anndata(..., schema=posterior."
            "schema), or give the AnnData."
        )
    return cells


def query_record(
    posterior: Posterior,
    checked: CheckedIntervention,
    support: Iterable[dict[str, list[str]]],
    **settings: Any,
) -> dict[str, Any]:
    """Return what was asked, for ``uns["cradle_query"]``: numbers, strings and lists of them.

    `support` holds the notes of every world that was asked about, as
    :func:`~cradle_pyro.queries.support.support_notes` returns them.
    """
    sentences = {note for notes in support for one in notes.values() for note in one}
    return {
        "intervention": str(checked.intervention),
        "out_of_support": sorted(sentences),
        "fingerprint": str(posterior.facts.get("fingerprint", "")),
        "version": metadata.version("cradle-pyro"),
    } | settings


def _check_draws(draws: int, count_draws: int = 0, *, seed: int, chunk: int | None) -> None:
    if draws < 1 or not 0 <= count_draws <= draws:
        raise QueryError(
            f"At least one draw is needed and counts of at most as many, found draws={draws} and "
            f"count_draws={count_draws}."
        )
    check_whole("draws", draws, 1)
    check_whole("count_draws", count_draws, 0)
    check_whole("seed", seed, 0)
    if chunk is not None:
        check_whole("chunk", chunk, 1)


class _Moments:
    """Running mean and variance over the draws of one chunk of cells (Welford)."""

    def __init__(self, draws: int) -> None:
        self._draws = draws
        self.mean = self._square = np.empty(0, dtype=np.float32)

    def add(self, draw: int, value: np.ndarray) -> None:
        """Add a draw, shape (cells, genes); the first one starts a new chunk."""
        if draw == 0:
            self.mean, self._square = np.zeros_like(value), np.zeros_like(value)
        change = value - self.mean
        self.mean += change / (draw + 1)
        self._square += change * (value - self.mean)

    @property
    def sd(self) -> np.ndarray:
        """Standard deviation over the draws, shape (cells, genes)."""
        return np.sqrt(np.maximum(self._square, 0) / max(self._draws - 1, 1))


class _Rows:
    """Layers of cells x genes in memory, filled some rows at a time, as a file by a RowWriter."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._dense: dict[str, np.ndarray] = {}
        self._sparse: dict[str, list[sp.csr_matrix]] = {}
        self._n_rows: dict[str, int] = {}

    def add(self, name: str, values: np.ndarray | sp.csr_matrix) -> None:
        """Append rows to the layer `name`."""
        if not isinstance(values, np.ndarray):
            self._sparse.setdefault(name, []).append(values)
            return
        start = self._n_rows.get(name, 0)
        if not start:
            self._dense[name] = np.empty(self._shape, dtype=np.float32)
        self._dense[name][start : start + len(values)] = values
        self._n_rows[name] = start + len(values)

    @property
    def layers(self) -> dict[str, Any]:
        """All layers, whole."""
        sparse = {name: sp.vstack(rows, format="csr") for name, rows in self._sparse.items()}
        return self._dense | sparse


def _as_anndata(
    about: tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]], found: _Rows, *, x: str
) -> AnnData:
    from anndata import AnnData

    (obs, var, uns), layers = about, found.layers
    return AnnData(layers.get(x), obs=obs, var=var, layers=layers, uns=uns)


def _about(
    posterior: Posterior,
    cells: AnnData | CellData,
    data: CellData,
    worlds: Sequence[CheckedIntervention],
    library: np.ndarray | None,
    **settings: Any,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Return obs, var and uns of an answer."""
    schema = posterior.schema
    names = pd.Index(schema.genes)
    if isinstance(cells, CellData):
        obs = pd.DataFrame({"perturbation": data.labels}, index=data.obs_names)
        var = pd.DataFrame(index=names)
    else:
        obs, var = cells.obs.copy(), cells.var.reindex(names)
    flagged = np.zeros(data.n_cells, dtype=bool)
    support = [support_notes(posterior, one, data.labels) for one in worlds]
    for one, notes in zip(worlds, support, strict=True):
        unsupported = sorted(label for label, sentences in notes.items() if sentences)
        # With a perturbation named, all cells end up with the same label.
        flagged |= (
            bool(unsupported) if one.design is not None else np.isin(data.labels, unsupported)
        )
    obs["cradle_out_of_support"] = flagged
    if library is not None:
        obs["cradle_library"] = library
    record = query_record(posterior, worlds[0], support, **settings)
    return obs, var, {"cradle_query": record}
