"""Cells generated under an intervention: samples of other worlds."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cradle_pyro import sites
from cradle_pyro.data.encode import ANY_COLUMN, FLAG_PREFIX, design_labels
from cradle_pyro.errors import QueryError
from cradle_pyro.inference.allocation import freed_memory_kept
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.model.intervene import run_world
from cradle_pyro.queries.abduction import Abduction, abduct
from cradle_pyro.queries.counterfactual import query_cells, query_record
from cradle_pyro.queries.draws import check_whole, completed, reference_draw, seed_of
from cradle_pyro.queries.interventions import (
    FACTUAL,
    CheckedIntervention,
    Intervention,
    check,
    to_pair,
)
from cradle_pyro.queries.progress import progress_bar
from cradle_pyro.queries.scale import is_log_normalised
from cradle_pyro.queries.support import support_notes
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Schema

if TYPE_CHECKING:
    from anndata import AnnData

    from cradle_pyro.data.dataset import CellData

__all__ = ["intervene"]

_MOST_DRAWS = 50


def intervene(
    posterior: Posterior,
    intervention: Intervention,
    n_cells: int = 1000,
    *,
    population: Literal["controls", "prior"] | AnnData | CellData = "controls",
    library: Literal["model", "cells"] | np.ndarray | float | None = None,
    draws: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AnnData:
    """Return cells generated under an intervention, with count noise of their own.

    Parameters
    ----------
    posterior
        A fitted pair.
    intervention
        From :func:`~cradle_pyro.do`. Flags that it does not name follow the perturbation.
        A further site of cells may be given a value for each of the `n_cells`.
    n_cells
        Number of cells to generate.
    population
        Where basal states come from: "controls", the abducted training controls (the g-formula:
        what would these cells show?); "prior", the model's prior; or cells, abducted first.
    library
        "model": from the model, given the flags (where it models libraries); "cells": those of the
        population; numbers to draw from, or one number for all. By default the model's, where it
        has one, else the cells'. A library in the intervention comes before.
    draws
        Posterior draws of the globals that the cells are spread over; by default up to 50.
    seed
        Seed of the draws.
    progress
        Show a progress bar.

    Returns
    -------
    AnnData
        Cells x genes. ``X`` and ``layers["counts"]``: generated counts; ``layers["rate"]``:
        expected fractions of the library. ``obs``: ``perturbation``, ``cradle_library``,
        ``cradle_draw``, a column ``cradle_qc_<flag>`` for each flag, and ``cradle_artifact``.
        ``uns["cradle_query"]`` records the query, and as ``library`` where libraries come from
        unless the intervention names one: "model", "cells", or the numbers given.

    Raises
    ------
    QueryError
        If the intervention names something that the model does not have or intervenes on itself,
        or a setting cannot be.
    DataError
        If the cells of the population do not fit the model, or there are none.

    References
    ----------
    Robins, "A new approach to causal inference in mortality studies", Mathematical Modelling 1986
    (the g-formula).
    """
    from anndata import AnnData

    check_whole("seed", seed, 0)
    checked = check(posterior, intervention, n_cells)
    draws = min(n_cells, _MOST_DRAWS) if draws is None else draws
    if n_cells < 1 or not 1 <= draws <= n_cells:
        raise QueryError(
            f"Expected n_cells >= 1 and 1 <= draws <= n_cells, found {n_cells} and {draws}."
        )
    check_whole("n_cells", n_cells, 1)
    check_whole("draws", draws, 1)
    depth = _given_library(library)
    data, from_prior = None, False
    if not isinstance(population, str):
        data = query_cells(posterior, population)
    elif population not in ("controls", "prior"):
        raise QueryError(f"population is 'controls', 'prior' or cells, found {population!r}.")
    else:
        from_prior = population == "prior"
    if data is None and FACTUAL in (checked.flags, intervention.library):
        raise QueryError(
            f"{intervention} holds what cells had, but the kept controls have neither counts nor "
            "flags. Give cells, population=adata, or name a value."
        )
    posterior = completed(posterior)
    ends = np.linspace(0, n_cells, draws + 1).round().astype(int)
    pieces = []
    with progress_bar("Worlds", draws, show=progress) as advance, freed_memory_kept():
        for draw, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
            with seeded(seed_of(seed, draw)):
                cells = _population(posterior, data, end - start, from_prior=from_prior)
            with seeded(seed_of(seed, draw, 1)):
                pieces.append(_generate(posterior, cells, checked, depth, slice(start, end)))
            advance()
    if depth is None or (isinstance(depth, str) and sites.LIBRARY not in cells.noise):
        depth = "model" if sites.LIBRARY in cells.noise else "cells"
    values = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    obs = _described(posterior.schema, values)
    obs["cradle_draw"] = np.repeat(np.arange(draws), np.diff(ends))
    support = [support_notes(posterior, checked, obs["perturbation"])]
    record = query_record(
        posterior, checked, support, population=population if data is None else "cells",
        library=depth if isinstance(depth, str) else depth.tolist(), draws=draws, seed=seed,
    )  # fmt: skip
    counts = values[sites.COUNTS]
    if not is_log_normalised(posterior):
        counts = sp.csr_matrix(counts)
    var = pd.DataFrame(index=pd.Index(posterior.schema.genes))
    layers = {"counts": counts, "rate": values[sites.RATE]}
    return AnnData(counts, obs=obs, var=var, layers=layers, uns={"cradle_query": record})


def _described(schema: Schema, values: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return label, library and flags of generated cells, as ``obs``."""
    design, flags = sp.csr_array(values[sites.PERTURBATION]), values[sites.ARTIFACT]
    columns = {
        "perturbation": design_labels(
            design, schema.perturbations, schema.delimiter, schema.control
        ),
        "cradle_library": values[sites.LIBRARY],
    }
    columns |= {f"{FLAG_PREFIX}{name}": flags[:, k] for k, name in enumerate(schema.artifacts)}
    columns[ANY_COLUMN] = np.asarray((flags > 0).any(axis=1))
    return pd.DataFrame(columns, index=[f"world_{k}" for k in range(len(flags))])


def _population(
    posterior: Posterior, data: CellData | None, size: int, *, from_prior: bool
) -> Abduction:
    """Return one draw of cells whose basal states the generated ones have."""
    if data is None:
        return reference_draw(posterior, size, from_prior=from_prior)
    rows = torch.randint(data.n_cells, (size,)).numpy()
    batch = to_pair(posterior, data.batch(rows))
    return abduct(posterior.model, posterior.guide, batch, counts=False)


def _generate(
    posterior: Posterior,
    cells: Abduction,
    checked: CheckedIntervention,
    library: Literal["model", "cells"] | np.ndarray | None,
    rows: slice,
) -> dict[str, np.ndarray]:
    """Return the sites of generated cells: their latents held, all that is observed drawn anew."""
    batch = cells.batch
    acts = checked.acts(batch, cells.values, rows)
    if sites.ARTIFACT not in acts and sites.ARTIFACT not in cells.noise and batch.artifact.shape[1]:
        raise QueryError(
            "The model does not model flags (artifact_risk is off): name them in the intervention, "
            "for example do(..., artifact=0)."
        )
    if isinstance(library, np.ndarray):
        depth = torch.as_tensor(library, dtype=torch.float32)
        depth = depth[torch.randint(len(depth), (len(batch),))].to(batch.library)
        acts.setdefault(sites.LIBRARY, depth)
    elif library == "cells":
        acts.setdefault(sites.LIBRARY, batch.library)
    latents = {name: value for name, value in cells.latents.items() if name != sites.COUNTS}
    world = run_world(posterior.model, batch, latents, acts)
    names = (sites.PERTURBATION, sites.ARTIFACT, sites.LIBRARY, sites.RATE, sites.COUNTS)
    return {name: world[name].float().cpu().numpy() for name in names}


def _given_library(library: object) -> Literal["model", "cells"] | np.ndarray | None:
    """Return the setting with numbers as an array, checked."""
    if library is None or (isinstance(library, str) and library in ("model", "cells")):
        return library  # type: ignore[return-value]
    try:
        values = np.atleast_1d(np.asarray(library, dtype=np.float32))
    except (TypeError, ValueError):
        values = np.zeros(0, dtype=np.float32)
    if not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise QueryError(
            f"library is 'model', 'cells', or positive numbers of counts, found {library!r}."
        )
    return values.ravel()
