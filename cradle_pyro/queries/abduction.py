"""Abduction, action, prediction: the three steps of every counterfactual, on batches.

References
----------
Pearl, "Causality", 2nd edition 2009, section 7.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.inference.objectives import is_local, with_imputed_flags
from cradle_pyro.inference.posterior import draw_latents
from cradle_pyro.model.intervene import run_world, sample_nodes
from cradle_pyro.model.noise import AbstractNoise, abduct_noise
from cradle_pyro.types import Batch

__all__ = ["Abduction", "abduct", "hold_noise", "predict", "predict_each"]

PyroCallable = Callable[[Batch], object]


class Abduction(NamedTuple):
    """One posterior draw of everything that makes cells what they are.

    Parameters
    ----------
    batch
        The factual cells, with missing flags drawn.
    latents
        Site to value: global and local latents, and observed sites that are held.
    noise
        Observed site to its noise.
    values
        Site to its factual value, deterministic sites included.
    local
        The sites that have a value for every cell.
    """

    batch: Batch
    latents: dict[str, Tensor]
    noise: dict[str, AbstractNoise]
    values: dict[str, Tensor]
    local: frozenset[str]

    def take(self, rows: Tensor) -> Abduction:
        """Return the abduction of the cells at `rows` (integer positions, any of them often)."""
        batch = self.batch.take(rows)

        def one_taken(value: Tensor) -> Tensor:
            # Counts that are held are those of the batch.
            return batch.counts if value is self.batch.counts else value[rows]

        def taken(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: one_taken(v) if n in self.local else v for n, v in values.items()}

        noise = {name: one.take(rows) for name, one in self.noise.items()}
        return Abduction(batch, taken(self.latents), noise, taken(self.values), self.local)


def abduct(
    model: PyroCallable,
    guide: PyroCallable,
    batch: Batch,
    *,
    counts: bool = True,
    fresh_artifact: Tensor | None = None,
) -> Abduction:
    """Return one draw of latents and noise of the cells of `batch`, given what was observed.

    Parameters
    ----------
    model, guide
        The pair, edited or not, on the batch's device; run under the caller's random state.
    batch
        Observed cells.
    counts
        Abduct the noise of counts too; without, counts are held as observed, which is all that
        queries of rates need.
    fresh_artifact
        Value of each flag where it is absent and may appear in another world, shape (cells,
        artifacts); ones if omitted.

    Raises
    ------
    QueryError
        If the noise of an observed site cannot be abducted (see
        :func:`~cradle_pyro.model.noise.abduct_noise`).

    Notes
    -----
    Latents come from the guide. Latents of an edited model that its guide lacks come from their
    priors, once, and are the same in every world. Noise that the observation leaves open (a count's
    place in its quantile interval, a flag's uniform number) is drawn within its bounds.
    """
    latents = draw_latents(guide, batch)
    batch = with_imputed_flags(batch, latents)
    latents.pop(f"{sites.ARTIFACT}_unobserved", None)
    return hold_noise(model, batch, latents, counts=counts, fresh_artifact=fresh_artifact)


def hold_noise(
    model: PyroCallable,
    batch: Batch,
    latents: Mapping[str, Tensor],
    *,
    counts: bool,
    fresh_artifact: Tensor | None = None,
) -> Abduction:
    """Return the abduction of cells whose latents are known; arguments as in :func:`abduct`."""
    with torch.no_grad():
        factual = poutine.trace(_WithLatents(latents)(model)).get_trace(batch)
    latents, known = dict(latents), set(latents)
    noise, values = {}, {}
    nodes = sample_nodes(factual)
    for name, node in nodes.items():
        values[name] = value = node["value"]
        if node["infer"].get("_deterministic"):
            continue
        # A latent that an edited model observes is held at the model's value, not the guide's.
        is_latent = name in known or not node["is_observed"]
        if is_latent or (name == sites.COUNTS and not counts):
            latents[name] = value
        else:
            fresh = fresh_artifact if name == sites.ARTIFACT else None
            noise[name] = abduct_noise(name, node["fn"], value, fresh=fresh)
    local = frozenset(name for name, node in nodes.items() if is_local(node))
    return Abduction(batch, latents, noise, values, local)


class _WithLatents(Messenger):
    """Gives latent sites their values; what the model observes itself stays as it is."""

    def __init__(self, latents: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.latents = latents

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self.latents and not msg["is_observed"]:
            msg["value"] = self.latents[name]
            msg["is_observed"] = True


def predict(
    model: PyroCallable, abduction: Abduction, acts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the values of all sites in the world where `acts` are done, with the same noise.

    Parameters
    ----------
    model
        The model that the noise was abducted under.
    abduction
        Latents and noise of the factual cells.
    acts
        Site to its full-shape value. Without any, the world is the factual one, bit for bit.
    """
    return run_world(model, abduction.batch, abduction.latents, acts, abduction.noise)


def predict_each(
    model: PyroCallable, abduction: Abduction, worlds: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the values of the cells' sites in several worlds, shape (worlds, cells, ...).

    The same as :func:`predict` in one world after the other, in one run of the model.

    Parameters
    ----------
    model, abduction
        As in :func:`predict`.
    worlds
        Of each world the acts. Several worlds must act on the same sites, all of them of cells.
    """
    n_cells = len(abduction.batch)
    rows = torch.arange(n_cells, device=abduction.batch.library.device).repeat(len(worlds))
    acts = {name: torch.cat([world[name] for world in worlds]) for name in worlds[0]}
    # The factual values are not looked at any more.
    values = predict(model, abduction._replace(values={}).take(rows), acts)
    return {name: values[name].unflatten(0, (-1, n_cells)) for name in abduction.local}
