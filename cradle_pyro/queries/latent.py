"""Latent states of cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine

from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.prepare import cell_data
from cradle_pyro.errors import QueryError, near, shown
from cradle_pyro.inference.objectives import local_sites
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.queries.draws import check_whole, completed
from cradle_pyro.queries.interventions import to_pair
from cradle_pyro.seeding import seeded

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["latent"]


def latent(
    posterior: Posterior,
    cells: AnnData | CellData,
    *,
    site: str = "z_basal",
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
        Which latent: "z_basal", the basal state; "z_artifact", kind and degree of the artifact; or
        another local site of an edited guide.
    draws
        Return this many draws, shape (draws, cells, latents), instead of means.
    global_draws
        Draws of the global latents that means are averaged over. A posterior without a known mean
        (a flow, in an edited guide) is averaged over as many draws.
    seed
        Seed of the draws.
    chunk
        Cells at a time.

    Raises
    ------
    QueryError
        If cells have no such latent, or a setting cannot be.
    DataError
        If the cells do not fit the model.
    """
    guide = completed(posterior).guide
    data = cells
    if not isinstance(data, CellData):
        data = cell_data(data, posterior.config.data, schema=posterior.schema)
    for name, value, least in (
        ("draws", 1 if draws is None else draws, 1),
        ("global_draws", global_draws, 1),
        ("seed", seed, 0),
        ("chunk", chunk, 1),
    ):
        check_whole(name, value, least)
    n_draws = global_draws if draws is None else draws
    pieces = []
    with seeded(seed), torch.no_grad():
        for start in range(0, data.n_cells, chunk):
            batch = to_pair(posterior, data.batch(slice(start, start + chunk)))
            values = []
            for _ in range(n_draws):
                trace = poutine.trace(guide).get_trace(batch)
                node = trace.nodes[_known_site(site, local_sites(trace))]
                values.append(_mean(node) if draws is None else node["value"])
            stacked = torch.stack(values)
            pieces.append((stacked.mean(0) if draws is None else stacked).cpu().numpy())
    return np.concatenate(pieces, axis=-2)


def _known_site(site: str, local: set[str]) -> str:
    if site not in local:
        raise QueryError(
            f"Expected a latent of cells, found '{site}'; the guide has {shown(sorted(local))}"
            f"{near(site, sorted(local)) or '.'}"
        )
    return site


def _mean(node: Mapping[str, Any]) -> torch.Tensor:
    try:
        return node["fn"].mean
    except NotImplementedError:
        return node["value"]
