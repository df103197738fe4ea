"""Running a model in another world: given latents and noise, under interventions on named sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from cradle_pyro.types import Batch

from .noise import AbstractNoise, WithNoise

__all__ = ["run_world", "sample_nodes"]


def sample_nodes(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """Return the nodes of a trace's sites, deterministic ones included, plates left out."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


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
    """
    world = poutine.condition(poutine.uncondition(model), data=dict(latents))
    world = WithNoise(noise or {})(world)
    with torch.no_grad():
        trace = poutine.trace(poutine.do(world, data=dict(interventions))).get_trace(batch)
    values = {name: node["value"] for name, node in sample_nodes(trace).items()}
    unknown = set(interventions) - set(values)
    if unknown:
        raise KeyError(f"No such site to intervene on: {sorted(unknown)}; found {sorted(values)}.")
    return values | dict(interventions)
