"""Posterior draws of cells: of those that are given, or of the reference population.

Random numbers are those of the query's seed: one draw of the globals is the same for all cells and
for all interventions that are asked about, so that differences are not those of the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.inference.objectives import local_sites
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.model.intervene import sample_nodes
from cradle_pyro.model.noise import innermost
from cradle_pyro.queries.abduction import Abduction, abduct, hold_noise
from cradle_pyro.queries.progress import progress_bar
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch

__all__ = ["Part", "draw_globals", "has_slab", "over_draws", "reference_draw", "seed_of"]

PyroCallable = Callable[[Batch], object]

_ENTRIES_AT_A_TIME: Final = 1_000_000
_MOST_CELLS_AT_A_TIME: Final = 1024


class Part(NamedTuple):
    """One draw for the cells of one chunk.

    Parameters
    ----------
    rows
        Which cells.
    draw
        Number of the draw.
    abduction
        Their latents and noise.
    """

    rows: slice
    draw: int
    abduction: Abduction


def seed_of(*key: int) -> int:
    """Return a seed that depends on the whole key, such as query seed, draw, first cell."""
    # With its length: NumPy takes (0, 1) and (0, 1, 0) for the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


def draw_globals(
    guide: PyroCallable, batch: Batch, *, given_slab: bool = False
) -> dict[str, Tensor]:
    """Return one draw of the global latents, under the caller's random state.

    Parameters
    ----------
    guide
        The guide of a pair, edited or not.
    batch
        At least one cell; what it holds does not matter.
    given_slab
        Draw sites with a spike-and-slab posterior from the slabs: from what the effects would be,
        if there were any. Sites have such a posterior if their distribution has the method
        ``given_slab``, as :class:`~cradle_pyro.model.relaxed.TiltedScaleMixture` has.
    """
    first = batch.take(torch.zeros(1, dtype=torch.long, device=batch.library.device))
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(first)
    local = local_sites(trace)
    nodes = {name: node for name, node in sample_nodes(trace).items() if name not in local}
    values = {name: node["value"] for name, node in nodes.items()}
    if given_slab:
        for name, node in nodes.items():
            base = innermost(node["fn"])
            if hasattr(base, "given_slab"):
                values[name] = base.given_slab().sample()
    return values


def has_slab(guide: PyroCallable, batch: Batch) -> bool:
    """Return whether any global site of the guide has a spike-and-slab posterior."""
    with torch.no_grad(), seeded(0):
        trace = poutine.trace(guide).get_trace(batch)
    return any(
        hasattr(innermost(node["fn"]), "given_slab") for node in sample_nodes(trace).values()
    )


def over_draws(
    posterior: Posterior,
    data: CellData,
    use: Callable[[Part], object],
    *,
    draws: int,
    counts: int,
    seed: int,
    chunk: int | None = None,
    progress: bool = False,
    what: str = "Query",
    given_slab: bool = False,
) -> None:
    """Call `use` with every draw of every chunk of cells, in bounded memory.

    Parameters
    ----------
    posterior
        A fitted pair.
    data
        Cells, aligned to the posterior's schema.
    use
        Called inside the draw's random state.
    draws
        Number of draws of each cell.
    counts
        How many of them, the first, come with the noise of the counts.
    seed
        Seed of the draws; globals depend on it and the draw alone.
    chunk
        Cells at a time; by default about a million entries.
    progress, what
        Show a progress bar with this name.
    given_slab
        As in :func:`draw_globals`.
    """
    n_genes = posterior.schema.n_genes
    size = chunk or min(_MOST_CELLS_AT_A_TIME, max(_ENTRIES_AT_A_TIME // n_genes, 1))
    starts = range(0, data.n_cells, size)
    with progress_bar(what, len(starts) * draws, show=progress) as advance, torch.no_grad():
        for start in starts:
            rows = slice(start, min(start + size, data.n_cells))
            batch = data.batch(rows, device=posterior.device)
            for draw in range(draws):
                with seeded(seed_of(seed, draw)):
                    globals_ = draw_globals(posterior.guide, batch, given_slab=given_slab)
                with seeded(seed_of(seed, draw, start)):
                    guide = poutine.condition(posterior.guide, data=globals_)
                    abduction = abduct(
                        posterior.model,
                        guide,
                        batch,
                        counts=draw < counts,
                        fresh_artifact=_fresh_artifact(posterior, batch),
                    )
                    use(Part(rows, draw, abduction))
                advance()


def reference_draw(
    posterior: Posterior,
    n_cells: int,
    *,
    artifacts: bool = False,
    from_prior: bool = False,
    counts: bool = False,
    given_slab: bool = False,
) -> Abduction:
    """Return one draw of control cells and of the globals, under the caller's random state.

    Parameters
    ----------
    posterior
        A fitted pair.
    n_cells
        Cells, drawn from the abducted training controls.
    artifacts
        Draw the cells' flags from the model; otherwise they have none.
    from_prior
        Draw basal states from the prior instead.
    counts
        Draw counts from the model, whose noise then is the same in every world.
    given_slab
        As in :func:`draw_globals`.

    Notes
    -----
    Latents other than the globals and z_basal are drawn from the model. The guide never sees a
    reference cell: its counts are not kept.
    """
    reference, schema = posterior.reference, posterior.schema
    with torch.no_grad():
        device = posterior.device
        rows = _choose_rows(len(reference.library), n_cells)
        batch = Batch(
            counts=torch.zeros(n_cells, schema.n_genes),
            perturbation=torch.zeros(n_cells, schema.n_perturbations),
            artifact=torch.zeros(n_cells, schema.n_artifacts),
            library=reference.library[rows],
            covariates=reference.covariates[rows],
        ).to(device)
        latents = draw_globals(posterior.guide, batch, given_slab=given_slab)
        if not from_prior:
            z_basal = torch.normal(reference.loc[rows], reference.scale[rows])
            latents[sites.Z_BASAL] = z_basal.to(device)
        acts = {sites.LIBRARY: batch.library}
        if not artifacts:
            acts[sites.ARTIFACT] = batch.artifact
        world, latents = _sampled(posterior.model, batch, latents, acts)
        batch = batch.replace(artifact=acts.get(sites.ARTIFACT, world[sites.ARTIFACT]))
        if counts:
            batch = batch.replace(counts=world[sites.COUNTS])
        fresh = _fresh_artifact(posterior, batch)
        return hold_noise(posterior.model, batch, latents, counts=counts, fresh_artifact=fresh)


def _sampled(
    model: PyroCallable, batch: Batch, latents: dict[str, Tensor], acts: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sites' values of cells generated under `acts`, and all latents of these cells."""
    world = poutine.condition(poutine.uncondition(model), data=latents)
    trace = poutine.trace(poutine.do(world, data=acts)).get_trace(batch)
    nodes = sample_nodes(trace)
    values = {name: node["value"] for name, node in nodes.items()}
    # What the model observes or computes is no latent.
    drawn = {name for name, node in nodes.items() if not node["infer"].get("was_observed")}
    return values, {name: values[name] for name in drawn}


def _choose_rows(n_available: int, n_cells: int) -> Tensor:
    """Return rows, each at most once while there are enough."""
    rounds = [torch.randperm(n_available) for _ in range(-(-n_cells // n_available))]
    return torch.cat(rounds)[:n_cells]


def _fresh_artifact(posterior: Posterior, batch: Batch) -> Tensor:
    """Return the value of each flag should it appear, as failing training cells have it."""
    pool = posterior.failing_artifacts
    fresh = torch.ones_like(batch.artifact)
    for column in range(pool.shape[1]):
        values = pool[pool[:, column] > 0, column]
        if len(values) and bool((values != 1).any()):
            fresh[:, column] = values[torch.randint(len(values), (len(batch),))].to(fresh)
    return fresh
