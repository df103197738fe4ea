"""Average effects: intervened against control, over abducted control cells, with common draws."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.errors import QueryError, near, shown
from cradle_pyro.inference.posterior import Posterior, draw_latents
from cradle_pyro.model.intervene import run_world
from cradle_pyro.model.likelihoods import NormalLikelihood
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch, Schema

__all__ = ["average_effect", "effect_draws", "generated_effects", "label_designs"]

_INTERVAL = (0.025, 0.975)
_MOST_DRAWS = 1_000_003


def average_effect(
    posterior: Posterior,
    perturbation: str,
    *,
    draws: int = 100,
    n_cells: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the average effect of a perturbation on every gene, with uncertainty.

    Parameters
    ----------
    posterior
        A fitted pair.
    perturbation
        A label, for example "KLF1" or "KLF1+CEBPA"; the combination need not have been trained.
    draws
        Posterior draws of the global latents.
    n_cells
        Abducted control cells per draw.
    seed
        Seed of the draws.

    Returns
    -------
    pandas.DataFrame
        Columns gene, mean, sd, ci_low, ci_high (95 %), lfsr (local false sign rate). Effects are
        E[log2(1 + 1e4 rate)] under do(perturbation, artifact=0) minus that under
        do(control, artifact=0): a direct effect, since the artifact descends from the perturbation.

    Raises
    ------
    QueryError
        If the model does not know one of the perturbations.
    """
    values = effect_draws(posterior, [perturbation], draws=draws, n_cells=n_cells, seed=seed)[:, 0]
    low, high = np.quantile(values, _INTERVAL, axis=0)
    sign_rate = np.minimum((values <= 0).mean(0), (values >= 0).mean(0))
    return pd.DataFrame(
        {
            "gene": posterior.schema.genes,
            "mean": values.mean(0),
            "sd": values.std(0, ddof=1) if draws > 1 else 0.0,
            "ci_low": low,
            "ci_high": high,
            "lfsr": sign_rate,
        }
    )


def effect_draws(
    posterior: Posterior,
    labels: Sequence[str],
    *,
    draws: int = 50,
    n_cells: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Return posterior draws of average effects, shape (draws, labels, genes), log2 scale.

    Every draw takes its globals from the guide and `n_cells` control cells with their basal states
    from q(z_basal); all labels share both (common random numbers), so that labels asked about
    together or one by one are answered with the same numbers.

    Raises
    ------
    QueryError
        If the model does not know one of the perturbations.
    """
    designs = label_designs(posterior.schema, labels)
    means = np.empty((draws, len(labels), posterior.schema.n_genes), dtype=np.float32)
    expression = posterior.model.likelihood.log2_expression
    for draw in range(draws):
        with _seeded_draw(seed, draw):
            batch, latents = _reference_draw(posterior, n_cells)
            base = expression(_rate(posterior, batch, latents)).mean(0)
            for column, design in enumerate(designs):
                world = batch.replace(perturbation=design.expand_as(batch.perturbation))
                effect = expression(_rate(posterior, world, latents)).mean(0) - base
                means[draw, column] = effect.cpu()
    return means


def generated_effects(
    posterior: Posterior,
    labels: Sequence[str],
    libraries: Sequence[np.ndarray],
    control_library: np.ndarray,
    *,
    functional: Literal["log_mean", "mean_log"] = "mean_log",
    draws: int = 50,
    n_cells: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Return average effects on generated counts, shape (labels, genes), log2 scale.

    For comparison with observed cells: both sides carry the same count noise, since libraries are
    drawn from the cells compared with.

    Parameters
    ----------
    posterior
        A fitted pair.
    labels
        Perturbation labels.
    libraries
        For each label, libraries of the observed cells it is compared with.
    control_library
        Libraries of the observed control cells.
    functional
        "mean_log": mean over cells of log2(1 + 1e4 counts / library); "log_mean": log2 of the mean.
    draws, n_cells, seed
        As in :func:`effect_draws`.
    """
    designs = label_designs(posterior.schema, labels)
    rng = np.random.default_rng(seed)
    totals = np.zeros((len(labels) + 1, posterior.schema.n_genes))
    worlds = [(torch.zeros_like(designs[:1]), control_library)]
    worlds += [(design, library) for design, library in zip(designs, libraries, strict=True)]
    likelihood = posterior.model.likelihood
    expression = likelihood.log2_expression
    for draw in range(draws):
        with _seeded_draw(seed, draw), torch.no_grad():
            batch, latents = _reference_draw(posterior, n_cells)
            for row, (design, library) in enumerate(worlds):
                depth = torch.as_tensor(rng.choice(library, len(batch)), dtype=torch.float32)
                depth = depth.to(posterior.device)
                design = design.expand_as(batch.perturbation)
                world = batch.replace(perturbation=design, library=depth)
                fraction = likelihood(_rate(posterior, world, latents), depth).sample()
                if not isinstance(likelihood, NormalLikelihood):
                    fraction = fraction / depth.unsqueeze(-1)
                values = expression(fraction) if functional == "mean_log" else fraction
                totals[row] += values.mean(0).cpu().numpy() / draws
    if functional == "log_mean":
        totals = expression(torch.as_tensor(totals)).numpy()
    return totals[1:] - totals[:1]


def label_designs(schema: Schema, labels: Sequence[str]) -> Tensor:
    """Return the design row of each label, shape (labels, perturbations).

    Raises
    ------
    QueryError
        If a label names a perturbation the schema lacks.
    """
    position = {name: index for index, name in enumerate(schema.perturbations)}
    designs = torch.zeros(len(labels), schema.n_perturbations)
    for row, label in enumerate(labels):
        for name in (part.strip() for part in label.split(schema.delimiter)):
            if name == schema.control:
                continue
            if name not in position:
                raise QueryError(
                    f"The model knows no perturbation '{name}' (in '{label}')"
                    f"{near(name, schema.perturbations)}. Known: {shown(schema.perturbations)}."
                )
            designs[row, position[name]] = 1.0
    return designs


def _seeded_draw(seed: int, draw: int) -> AbstractContextManager[None]:
    """Return a context whose random numbers depend on `seed` and `draw` alone."""
    return seeded(seed * _MOST_DRAWS + draw)


def _reference_draw(posterior: Posterior, n_cells: int) -> tuple[Batch, dict[str, Tensor]]:
    """Return control cells without artifact, with draws of their basal states and the globals."""
    reference, schema, device = posterior.reference, posterior.schema, posterior.device
    n_reference = len(reference.library)
    size = min(n_cells, n_reference)
    rows = torch.randperm(n_reference)[:size]
    batch = Batch(
        counts=torch.zeros(size, schema.n_genes),
        perturbation=torch.zeros(size, schema.n_perturbations),
        artifact=torch.zeros(size, schema.n_artifacts),
        library=reference.library[rows],
        covariates=reference.covariates[rows],
    ).to(device)
    latents = draw_latents(posterior.guide, batch)
    z_basal = torch.normal(reference.loc[rows], reference.scale[rows])
    return batch, latents | {sites.Z_BASAL: z_basal.to(device)}


def _rate(posterior: Posterior, batch: Batch, latents: dict[str, Tensor]) -> Tensor:
    world = run_world(
        posterior.model,
        batch,
        latents | {sites.COUNTS: batch.counts},
        {
            sites.PERTURBATION: batch.perturbation,
            sites.ARTIFACT: batch.artifact,
            sites.LIBRARY: batch.library,
        },
    )
    return world[sites.RATE]
