"""Posterior draws of cells: of those that are given, or of the reference population.

Random numbers are those of the query's seed: one draw of the globals is the same for all cells and
for all interventions that are asked about, so that differences are not those of the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.errors import QueryError
from cradle_pyro.inference.allocation import freed_memory_kept
from cradle_pyro.inference.objectives import is_local
from cradle_pyro.inference.posterior import Posterior, draw_latents
from cradle_pyro.model.intervene import Do, given_values, may_be_given, sample_nodes
from cradle_pyro.model.noise import innermost
from cradle_pyro.queries.abduction import Abduction, abduct, hold_noise
from cradle_pyro.queries.interventions import empty_batch, to_pair
from cradle_pyro.queries.progress import progress_bar
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch

__all__ = [
    "Part",
    "check_whole",
    "completed",
    "draw_globals",
    "has_slab",
    "over_draws",
    "reference_draw",
    "seed_of",
]

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


def check_whole(name: str, value: object, least: int) -> None:
    """Raise QueryError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise QueryError(f"{name} is a whole number of at least {least}, found {value!r}.")


def seed_of(*key: int) -> int:
    """Return a seed that depends on the whole key, such as query seed, draw, first cell."""
    # With its length: NumPy takes (0, 1) and (0, 1, 0) for the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


def completed(posterior: Posterior) -> Posterior:
    """Return the posterior with what an edited model says of its latents, and the guide does not.

    Returns
    -------
    Posterior
        Of a guide in which a latent that the model is conditioned on has the model's value (and
        all that the guide draws is drawn given this value), and a global latent that the guide
        lacks is drawn from the model's prior. The posterior itself, where the model has neither.
    """
    model, guide = posterior.model, posterior.guide
    batch = empty_batch(posterior, 2)
    given = given_values(model, batch)
    with torch.no_grad(), seeded(0):
        drawn = sample_nodes(poutine.trace(guide).get_trace(batch))
        nodes = sample_nodes(poutine.trace(model).get_trace(batch))
    globals_ = {n for n, node in nodes.items() if not (node["is_observed"] or is_local(node))}
    lacking = (globals_ | given.keys()) - drawn.keys()
    held = {n: node["value"] for n, node in drawn.items() if node["is_observed"]}
    if not lacking and _are_held(given, held):
        return posterior

    def complete(cells: Batch) -> None:
        conditioned = poutine.condition(guide, data=given_values(model, cells))
        known = draw_latents(conditioned, cells)
        if lacking:
            rest = poutine.condition(model, data=known)
            poutine.block(rest, expose=sorted(lacking))(cells)

    return replace(posterior, guide=complete)  # type: ignore[arg-type]


def _are_held(given: dict[str, Tensor], held: dict[str, Tensor]) -> bool:
    return all(name in held and torch.equal(held[name], given[name]) for name in given)


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
    nodes = {name: node for name, node in sample_nodes(trace).items() if not is_local(node)}
    values = {name: node["value"] for name, node in nodes.items()}
    if given_slab:
        for name, node in nodes.items():
            if _is_mixed(node):
                values[name] = innermost(node["fn"]).given_slab().sample()
    return values


def has_slab(guide: PyroCallable, batch: Batch) -> bool:
    """Return whether any global site of the guide has a spike-and-slab posterior."""
    with torch.no_grad(), seeded(0):
        trace = poutine.trace(guide).get_trace(batch)
    return any(_is_mixed(node) for node in sample_nodes(trace).values())


def _is_mixed(node: dict[str, Any]) -> bool:
    """Return whether a site is drawn from spike and slab."""
    return not node["is_observed"] and hasattr(innermost(node["fn"]), "given_slab")


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
    posterior = completed(posterior)
    n_genes = posterior.schema.n_genes
    size = chunk or min(_MOST_CELLS_AT_A_TIME, max(_ENTRIES_AT_A_TIME // n_genes, 1))
    starts = range(0, data.n_cells, size)
    with (
        progress_bar(what, len(starts) * draws, show=progress) as advance,
        torch.no_grad(),
        freed_memory_kept(),
    ):
        for start in starts:
            rows = slice(start, min(start + size, data.n_cells))
            batch = to_pair(posterior, data.batch(rows))
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
    libraries: bool = False,
    from_prior: bool = False,
    counts: bool = False,
    given_slab: bool = False,
) -> Abduction:
    """Return one draw of control cells and of the globals, under the caller's random state.

    Parameters
    ----------
    posterior
        A fitted pair, :func:`completed`.
    n_cells
        Cells, drawn from the abducted training controls.
    artifacts
        Draw the cells' flags from the model; otherwise they have none.
    libraries
        Draw the cells' libraries from the model, given their flags, where it models libraries;
        otherwise they are those of the controls as observed, whose own flags are not kept.
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
    reference = posterior.reference
    with torch.no_grad():
        rows = _choose_rows(len(reference.library), n_cells)
        batch = empty_batch(posterior, n_cells).replace(
            library=reference.library[rows], covariates=reference.covariates[rows]
        )
        batch = to_pair(posterior, batch)
        latents = draw_globals(posterior.guide, batch, given_slab=given_slab)
        if not from_prior:
            z_basal = torch.normal(reference.loc[rows], reference.scale[rows])
            latents[sites.Z_BASAL] = z_basal.to(batch.library)
        acts = {}
        if not libraries:
            acts[sites.LIBRARY] = batch.library
        if not artifacts:
            acts[sites.ARTIFACT] = batch.artifact
        if not counts:
            acts[sites.COUNTS] = batch.counts  # they take long to draw
        world, latents = _sampled(posterior.model, batch, latents, acts)
        drawn = world | acts
        batch = batch.replace(artifact=drawn[sites.ARTIFACT], library=drawn[sites.LIBRARY])
        if counts:
            batch = batch.replace(counts=world[sites.COUNTS])
        fresh = _fresh_artifact(posterior, batch)
        return hold_noise(posterior.model, batch, latents, counts=counts, fresh_artifact=fresh)


def _sampled(
    model: PyroCallable, batch: Batch, latents: dict[str, Tensor], acts: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sites' values of cells generated under `acts`, and all latents of these cells.

    A latent that the model is conditioned on keeps the model's value, and a site that the model
    intervenes on itself is left to it.
    """
    nodes = _generated(model, batch, latents, acts)
    if any(_was_observed(node) and may_be_given(node) for node in nodes.values()):
        given = given_values(model, batch)
        if not _are_held(given, latents):
            latents = latents | given
            nodes = _generated(model, batch, latents, acts)
    values = {name: node["value"] for name, node in nodes.items()}
    # What the model observes or computes is no latent, unless it has a value of the model's own.
    is_latent = {name: name in latents or not _was_observed(nodes[name]) for name in nodes}
    return values, {name: value for name, value in values.items() if is_latent[name]}


def _generated(
    model: PyroCallable, batch: Batch, latents: dict[str, Tensor], acts: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    world = poutine.condition(poutine.uncondition(model), data=latents)
    return sample_nodes(poutine.trace(Do(acts, yields=True)(world)).get_trace(batch))


def _was_observed(node: dict[str, Any]) -> bool:
    return bool(node["infer"].get("was_observed"))


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
