"""Expected profiles of cells in other worlds: abduct, act, predict the rate."""

from __future__ import annotations

import numpy as np
import torch

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.inference.objectives import with_imputed_flags
from cradle_pyro.inference.posterior import Posterior, draw_latents
from cradle_pyro.model.intervene import run_world
from cradle_pyro.seeding import seeded

__all__ = ["expected_rate"]


def expected_rate(
    posterior: Posterior,
    data: CellData,
    *,
    artifact: float | None = None,
    control: bool = False,
    draws: int = 20,
    seed: int = 0,
    chunk: int = 512,
) -> np.ndarray:
    """Return each cell's posterior mean rate in another world, shape (cells, genes).

    Basal state, kind of artifact and globals are abducted from the factual cell; then the rate is
    predicted under the intervention.

    Parameters
    ----------
    posterior
        A fitted pair.
    data
        Cells, aligned to the posterior's schema.
    artifact
        Value all flags are set to, normally 0; None keeps the cell's own, missing ones drawn.
    control
        Set the perturbation to control.
    draws
        Draws of latents and globals per cell.
    seed
        Seed of the draws.
    chunk
        Cells at a time.
    """
    rates = np.empty((data.n_cells, posterior.schema.n_genes), dtype=np.float32)
    with seeded(seed), torch.no_grad():
        for start in range(0, data.n_cells, chunk):
            rows = np.arange(start, min(start + chunk, data.n_cells))
            batch = data.batch(rows, device=posterior.device)
            acts = {}
            if artifact is not None:
                acts[sites.ARTIFACT] = torch.full_like(batch.artifact, artifact)
            if control:
                acts[sites.PERTURBATION] = torch.zeros_like(batch.perturbation)
            total = torch.zeros_like(batch.counts)
            for _ in range(draws):
                latents = draw_latents(posterior.guide, batch) | {sites.COUNTS: batch.counts}
                if artifact is None:
                    acts[sites.ARTIFACT] = with_imputed_flags(batch, latents).artifact
                latents.pop(f"{sites.ARTIFACT}_unobserved", None)
                total = total + run_world(posterior.model, batch, latents, acts)[sites.RATE]
            rates[rows] = (total / draws).cpu()
    return rates
