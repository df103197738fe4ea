"""Latent states of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pyro import poutine

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.prepare import cell_data
from cradle_pyro.errors import QueryError
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.seeding import seeded

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["latent"]


def latent(
    posterior: Posterior,
    cells: AnnData | CellData,
    *,
    site: Literal["z_basal", "z_artifact"] = "z_basal",
    draws: int | None = None,
    global_draws: int = 8,
    seed: int = 0,
    chunk: int = 1024,
) -> np.ndarray:
    """Return latent states of cells: means, shape (cells, latents), or draws.

    Parameters
    ----------
    posterior
        A fitted pair.
    cells
        An AnnData with the columns the model was trained with, or CellData aligned to it.
    site
        Which latent: the basal state, or kind and degree of the artifact.
    draws
        Return this many draws, shape (draws, cells, latents), instead of means.
    global_draws
        Draws of the global latents that means are averaged over.
    seed
        Seed of the draws.
    chunk
        Cells at a time.

    Raises
    ------
    QueryError
        If the model has no such latent.
    DataError
        If the cells do not fit the model.
    """
    data = cells
    if not isinstance(data, CellData):
        data = cell_data(data, posterior.config.data, schema=posterior.schema)
    if site == sites.Z_ARTIFACT and not posterior.model.n_artifact_latents:
        raise QueryError("The model has no z_artifact: it was trained with n_artifact_latents = 0.")
    n_draws = global_draws if draws is None else draws
    pieces = []
    with seeded(seed), torch.no_grad():
        for start in range(0, data.n_cells, chunk):
            batch = data.batch(
                np.arange(start, min(start + chunk, data.n_cells)), device=posterior.device
            )
            values = []
            for _ in range(n_draws):
                node = poutine.trace(posterior.guide).get_trace(batch).nodes[site]
                values.append(node["fn"].mean if draws is None else node["value"])
            stacked = torch.stack(values)
            pieces.append((stacked.mean(0) if draws is None else stacked).cpu().numpy())
    return np.concatenate(pieces, axis=-2)
