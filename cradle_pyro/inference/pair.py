"""Building a (model, guide) pair: the standard one, or one that a modeller has edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

from cradle_pyro.config import Config
from cradle_pyro.errors import ConfigError, near, shown
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.guides import CradleGuide
from cradle_pyro.model.intervene import sample_nodes
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch, Schema, Statistics

__all__ = ["PairBuilder", "build_pair", "empty_cells", "pair_name", "standard_pair"]

PairBuilder: TypeAlias = Callable[[Schema, Config, Statistics], tuple[nn.Module, nn.Module]]
"""Returns a model and a guide for a screen; both are modules that are called with a Batch."""


def standard_pair(
    schema: Schema, config: Config, statistics: Statistics
) -> tuple[Cradle, CradleGuide]:
    """Return the model and the guide that `config` describes."""
    model = Cradle(schema, config.model, statistics)
    return model, CradleGuide(model, config.guide, statistics)


def build_pair(
    schema: Schema,
    config: Config,
    statistics: Statistics,
    *,
    seed: int,
    pair: PairBuilder | None = None,
) -> tuple[Any, Any]:
    """Return a fresh model and guide with parameters drawn from `seed`.

    Parameters
    ----------
    schema, config, statistics
        What the pair is built from.
    seed
        Seed of the parameters.
    pair
        Builds an edited pair; :func:`standard_pair` if omitted.

    Raises
    ------
    ConfigError
        If an edited pair is not made of modules, or its sites do not fit each other.

    Notes
    -----
    Both are run once on a made-up cell, so that a misspelt site is found before training (Pyro
    would ignore it) and parameters that are made on first use exist (those of AutoGuides). Those of
    Pyro modules stay in the pair, out of the global parameter store: two fits do not meet.
    """
    with seeded(seed), pyro.settings.context(module_local_params=True):
        model, guide = (pair or standard_pair)(schema, config, statistics)
        for part, module in (("model", model), ("guide", guide)):
            if not isinstance(module, nn.Module) or isinstance(module, PyroModule):
                raise ConfigError(
                    f"An edited pair needs a {part} that is a torch.nn.Module (Pyro modules inside "
                    f"of it), found a {type(module).__name__}. Subclass cradle_pyro.Cradle or "
                    "CradleGuide, or call the handler in the forward method of a module."
                )
            _keep_parameters_local(module)
        _check_sites(model, guide, empty_cells(schema, statistics, 1))
    return model, guide


def pair_name(pair: PairBuilder | None) -> str | None:
    """Return where a builder is defined, as module:name."""
    return None if pair is None else f"{pair.__module__}:{getattr(pair, '__qualname__', pair)}"


def _keep_parameters_local(module: nn.Module) -> None:
    """Run `module` with Pyro's ``module_local_params``, whoever calls it.

    Otherwise parameters of Pyro modules in it would go by name to the global parameter store, and
    those of another pair could come back.
    """
    if not any(isinstance(part, PyroModule) for part in module.modules()):
        return
    contexts: list[Any] = []

    def enter(*_: object) -> None:
        contexts.append(pyro.settings.context(module_local_params=True))
        contexts[-1].__enter__()

    def leave(*_: object) -> None:
        contexts.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def empty_cells(schema: Schema, statistics: Statistics, n_cells: int) -> Batch:
    """Return control cells without counts or artifact, at the mean library of the training set."""
    like = statistics.log_library_mean.cpu()
    levels = [torch.eye(len(levels))[:1].expand(n_cells, -1) for _, levels in schema.covariates]
    return Batch(
        counts=like.new_zeros(n_cells, schema.n_genes),
        perturbation=like.new_zeros(n_cells, schema.n_perturbations),
        artifact=like.new_zeros(n_cells, schema.n_artifacts),
        library=like.exp().expand(n_cells),
        covariates=torch.cat([torch.zeros(n_cells, 0), *levels], -1).to(like),
    )


def _check_sites(model: nn.Module, guide: nn.Module, batch: Batch) -> None:
    """Raise unless the guide has every latent of the model, and nothing that the model lacks."""
    with torch.no_grad():
        drawn = sample_nodes(poutine.trace(guide).get_trace(batch))
        known = sample_nodes(poutine.trace(model).get_trace(batch))
    latents = {name for name, node in known.items() if not node["is_observed"]}
    unknown = sorted(set(drawn) - set(known))
    if unknown:
        hints = "".join(near(name, sorted(latents - set(drawn))) for name in unknown)
        raise ConfigError(
            f"The guide has sites that the model lacks: {shown(unknown)}{hints or '.'} Pyro would "
            "ignore them; name them as in the model."
        )
    missing = sorted(latents - set(drawn))
    if missing:
        raise ConfigError(
            f"The guide has no site for {shown(missing)}, latent in the model. Give it one, or "
            "condition the model on a value."
        )
