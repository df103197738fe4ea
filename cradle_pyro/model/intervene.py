"""Running a model in another world: given latents, under interventions on named sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pyro import poutine
from torch import Tensor

from cradle_pyro.types import Batch

__all__ = ["run_world"]


def run_world(
    model: Callable[[Batch], object],
    batch: Batch,
    latents: Mapping[str, Tensor],
    interventions: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the values of all sites of `model` with `latents` fixed and `interventions` done.

    Parameters
    ----------
    model
        Any Pyro callable on a batch, edited or not; it is transformed, never changed.
    batch
        Gives shapes and covariates. Sites that the model observes are sampled anew unless they
        are among `latents` or `interventions`.
    latents
        Values of latent sites, for example draws from the guide.
    interventions
        Values of intervened sites, of full shape (cells, ...): one mapping, since nested ``do``
        on one site recurses without end in Pyro.

    Returns
    -------
    dict
        Site name to value; an intervened site holds its intervened value.

    Raises
    ------
    KeyError
        If an intervened name is no site of the model, which Pyro would ignore.
    """
    world = poutine.do(
        poutine.condition(poutine.uncondition(model), data=dict(latents)), data=dict(interventions)
    )
    with torch.no_grad():
        trace = poutine.trace(world).get_trace(batch)
    values = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}
    unknown = set(interventions) - set(values)
    if unknown:
        raise KeyError(f"No such site to intervene on: {sorted(unknown)}; found {sorted(values)}.")
    return values | dict(interventions)
