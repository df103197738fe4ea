"""Small screens, batches and (model, guide) pairs; defaults so that a test shows what matters.

All sizes differ, so that a dimension can be told by its length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.config import Config
from cradle_pyro.inference.objectives import FlipPool
from cradle_pyro.inference.pair import build_pair
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.guides import CradleGuide
from cradle_pyro.types import Batch, Schema, Statistics

N_CELLS, N_GENES, N_PERTURBATIONS, N_ARTIFACTS = 10, 13, 3, 2
N_LATENTS, N_ARTIFACT_LATENTS, HIDDEN = 5, 4, 16
COVARIATES = (("batch", ("1", "2", "3")), ("type", ("a", "b", "c", "d")))

SMALL: dict[str, Any] = {
    "model": {
        "n_latents": N_LATENTS,
        "n_artifact_latents": N_ARTIFACT_LATENTS,
        "decoder": {"hidden": HIDDEN, "layers": 2},
        "mask_probability": 0.3,  # a draw of the small masks has ones
    },
    "guide": {
        "encoder": {"hidden": HIDDEN, "layers": 1},
        "effect_encoder": {"hidden": HIDDEN, "layers": 2},
    },
    "objective": {},
}


def make_schema(
    *,
    n_genes: int = N_GENES,
    n_perturbations: int = N_PERTURBATIONS,
    n_artifacts: int = N_ARTIFACTS,
    covariates: tuple[tuple[str, tuple[str, ...]], ...] = (),
    has_rest: bool = False,
) -> Schema:
    """Return a schema with made-up names."""
    return Schema(
        genes=tuple(f"G{i}" for i in range(n_genes)),
        perturbations=tuple(f"P{i}" for i in range(n_perturbations)),
        artifacts=tuple(f"low_{i}" for i in range(n_artifacts)),
        covariates=covariates,
        has_rest=has_rest,
    )


def make_batch(
    schema: Schema,
    *,
    n_cells: int = N_CELLS,
    seed: int = 0,
    severity: bool = False,
    missing: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Return random cells: controls, singles and pairs, passing (even) and failing (odd) ones."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    means = 8 * uniform(n_cells, 1) * uniform(schema.n_genes) + 0.5
    counts = torch.poisson(means, generator=generator)
    perturbation = (uniform(n_cells, schema.n_perturbations) < 0.4).float()
    artifact = (uniform(n_cells, schema.n_artifacts) < 0.5).float()
    artifact[:, :1] = 1.0
    artifact[::2] = 0.0
    if severity:
        artifact = artifact * (0.1 + 0.8 * uniform(*artifact.shape))
    columns = [
        torch.eye(len(levels))[torch.randint(len(levels), (n_cells,), generator=generator)]
        for _, levels in schema.covariates
    ]
    batch = Batch(
        counts=counts,
        perturbation=perturbation,
        artifact=artifact,
        library=counts.sum(-1).clamp(min=1) * (2 if schema.has_rest else 1),
        covariates=torch.cat([torch.zeros(n_cells, 0), *columns], -1),
    )
    batch = Batch(**{k: v if v is None else v.to(dtype) for k, v in vars(batch).items()})
    if missing:
        batch = batch.replace(artifact_observed=torch.arange(n_cells) % 3 > 0)
    return batch


def make_statistics(schema: Schema, *, n_cells: int = 40, seed: int = 1) -> Statistics:
    """Return statistics of `n_cells` random training cells."""
    cells = make_batch(schema, n_cells=n_cells, seed=seed)
    logs, failing = torch.log1p(cells.counts), (cells.artifact > 0).any(-1).float()
    return Statistics(
        n_cells=n_cells,
        log_mean=logs.mean(0),
        log_sd=logs.std(0),
        fraction=(cells.counts / cells.library.unsqueeze(-1)).mean(0),
        inverse_dispersion=torch.linspace(0.5, 5, schema.n_genes),
        log_library_mean=cells.library.log().mean(),
        log_library_sd=cells.library.log().std(),
        artifact_share=(cells.artifact > 0).float().mean(0),
        failing_share=failing.mean(),
        combinations=torch.zeros(0, schema.n_perturbations),
    )


def make_config(**sections: dict[str, Any]) -> Config:
    """Return a configuration with small networks; keywords name sections."""
    values = {key: SMALL.get(key, {}) | sections.get(key, {}) for key in SMALL.keys() | sections}
    return Config.from_mapping(values)


def make_pair(
    schema: Schema | None = None,
    *,
    seed: int = 0,
    n_cells: int = 40,
    dtype: torch.dtype = torch.float32,
    shaken: bool = True,
    **sections: dict[str, Any],
) -> tuple[Cradle, CradleGuide]:
    """Return a model and a guide; `shaken` moves every parameter away from its start."""
    schema = make_schema() if schema is None else schema
    statistics = make_statistics(schema, n_cells=n_cells)
    model, guide = build_pair(schema, make_config(**sections), statistics, seed=seed)
    if shaken:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in [*model.parameters(), *guide.parameters()]:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype), guide.to(dtype)


def make_pool(batch: Batch) -> FlipPool:
    """Return the states of the cells of `batch`, for the consistency terms."""
    failing = (batch.artifact > 0).any(-1)
    flags = batch.artifact[failing]
    return FlipPool(
        designs=batch.perturbation,
        design_weights=torch.ones(len(batch)),
        flags=flags,
        flag_weights=torch.ones(len(flags)),
        passing_library=batch.library[~failing],
        failing_library=batch.library[failing],
    )


def with_partners(batch: Batch, *, seed: int = 5) -> Batch:
    """Return `batch` with made-up partners of the opposite artifact state for half its cells."""
    rows = torch.arange(len(batch))
    rows = rows[rows % 4 < 2]  # passing ones and failing ones
    own = batch.take(rows)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson(own.counts + 1, generator=generator).to(own.counts)
    failing = (own.artifact > 0).any(-1, keepdim=True)
    flags = torch.zeros_like(own.artifact)
    flags[:, 1:] = 1.0
    artifact = torch.where(failing, torch.zeros_like(flags), flags)
    partner = own.replace(counts=counts, artifact=artifact, artifact_observed=None)
    return batch.replace(partner=partner, partner_rows=rows)


GLOBAL_SITES = (
    sites.EFFECT_MASK,
    sites.EFFECT,
    sites.GENE_EFFECT,
    sites.ARTIFACT_EFFECT,
    sites.ARTIFACT_RISK,
    sites.DEPTH_SHIFT,
)
