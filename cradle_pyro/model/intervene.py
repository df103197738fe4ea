"""Running a model in another world: given latents and noise, under interventions on named sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from pyro import poutine
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.errors import QueryError
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch

from .noise import AbstractNoise, WithNoise

__all__ = ["Do", "given_values", "may_be_given", "run_world", "sample_nodes"]

_OF_THE_CELLS: Final = (sites.ARTIFACT, sites.LIBRARY, sites.COUNTS)


def sample_nodes(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """Return the nodes of a trace's sites, deterministic ones included.

    Plates are left out, and so are auxiliary sites, from which an AutoGuide computes its latents.
    """
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not site_is_subsample(node)
        and not node["infer"].get("is_auxiliary")
    }


def given_values(model: Callable[[Batch], object], batch: Batch) -> dict[str, Tensor]:
    """Return the values that a model itself gives to latents, for the cells of `batch`.

    Parameters
    ----------
    model
        Any Pyro callable on a batch, for example ``pyro.poutine.condition(model, data=...)``.
    batch
        Cells without missing flags.

    Returns
    -------
    dict
        Site name to value, of the observed sites whose value is not read from the cells: it is the
        same for cells with other counts, libraries, flags and perturbations. Empty for a model
        that is not edited.
    """
    own = _observed(model, batch)
    if not own:
        return {}
    others = _observed(
        model,
        batch.replace(
            counts=batch.counts + 1,
            perturbation=batch.perturbation + 1,
            artifact=1 - batch.artifact,
            library=2 * batch.library,
        ),
    )
    return {
        name: value
        for name, value in own.items()
        if name in others and torch.equal(value, others[name])
    }


def may_be_given(node: Mapping[str, Any]) -> bool:
    """Return whether the node of an observed site is none that shows the cells in every model."""
    return not node["infer"].get("_deterministic") and node["name"] not in _OF_THE_CELLS


def _observed(model: Callable[[Batch], object], batch: Batch) -> dict[str, Tensor]:
    # Handlers around a guide that asks for these values do not see the model run.
    with torch.no_grad(), seeded(0), poutine.block():
        nodes = sample_nodes(poutine.trace(model).get_trace(batch))
    return {
        name: node["value"]
        for name, node in nodes.items()
        if node["is_observed"] and may_be_given(node)
    }


class Do(DoMessenger):
    """Pyro's ``do``, for a model that may intervene on a site itself.

    Two of Pyro's ``do`` on one site call each other without end.

    Parameters
    ----------
    data
        Site to its value.
    yields
        Leave a site to the model that intervenes on it; otherwise this is an error.

    Raises
    ------
    QueryError
        While the model runs, if it intervenes on one of the sites itself, unless `yields`.
    """

    def __init__(self, data: Mapping[str, Tensor], *, yields: bool = False) -> None:
        super().__init__(dict(data))
        self.yields = yields

    def _pyro_sample(self, msg: Any) -> None:
        already = msg.get("_intervener_id") not in (None, self._intervener_id)
        if not already or msg["name"] not in self.data:
            super()._pyro_sample(msg)
        elif not self.yields:
            raise QueryError(
                f"The model itself intervenes on '{msg['name']}' (pyro.poutine.do), so that it "
                "cannot be intervened on again. Leave this site out of the query, or query the "
                "model without its own intervention."
            )


def run_world(
    model: Callable[[Batch], object],
    batch: Batch,
    latents: Mapping[str, Tensor],
    interventions: Mapping[str, Tensor],
    noise: Mapping[str, AbstractNoise] | None = None,
) -> dict[str, Tensor]:
    """Return the values of all sites of `model` with `latents` fixed and `interventions` done.

    Parameters
    ----------
    model
        Any Pyro callable on a batch, edited or not; it is transformed, never changed.
    batch
        Gives shapes and covariates. Sites that the model observes are sampled anew unless they
        are among `latents`, `interventions` or `noise`.
    latents
        Values of latent sites, for example draws from the guide.
    interventions
        Values of intervened sites, of full shape (cells, ...): one mapping, since nested ``do``
        on one site recurses without end in Pyro.
    noise
        Noise of observed sites, abducted in the factual world: such a site has the value that
        this noise gives it under the distribution it meets in this one.

    Returns
    -------
    dict
        Site name to value; an intervened site holds its intervened value.

    Raises
    ------
    KeyError
        If an intervened name is no site of the model, which Pyro would ignore.
    QueryError
        If the model itself intervenes on one of them.
    """
    world = poutine.condition(poutine.uncondition(model), data=dict(latents))
    world = WithNoise(noise or {})(world)
    with torch.no_grad():
        trace = poutine.trace(Do(interventions)(world)).get_trace(batch)
    values = {name: node["value"] for name, node in sample_nodes(trace).items()}
    unknown = set(interventions) - set(values)
    if unknown:
        raise KeyError(f"No such site to intervene on: {sorted(unknown)}; found {sorted(values)}.")
    return values | dict(interventions)
