"""The fitted pair and what belongs to it: all that queries need, and nothing of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor, nn

from cradle_pyro import sites
from cradle_pyro.config import Config
from cradle_pyro.data.dataset import CellData
from cradle_pyro.inference.pair import PairBuilder
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.guides import CradleGuide
from cradle_pyro.model.intervene import sample_nodes
from cradle_pyro.model.noise import innermost
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch, Schema, Statistics

__all__ = [
    "Posterior",
    "ReferenceCells",
    "draw_latents",
    "failing_artifacts",
    "flag_column",
    "reference_cells",
]

_MOST_REFERENCE_CELLS = 5000


class ReferenceCells(NamedTuple):
    """q(z_basal) of control training cells: the population that average effects refer to.

    Parameters
    ----------
    loc, scale
        Moments of q(z_basal), shape (cells, latents). Where it is no product of Normals (an edited
        guide), one draw of each cell, with scale zero.
    library
        Library sizes, shape (cells,).
    covariates
        One-hot levels, shape (cells, covariate_levels).
    """

    loc: Tensor
    scale: Tensor
    library: Tensor
    covariates: Tensor


@dataclass(frozen=True, eq=False)
class Posterior:
    """A trained (model, guide) pair.

    Parameters
    ----------
    model, guide
        Plain Pyro callables on a :class:`~cradle_pyro.types.Batch`; Predictive, condition, block
        and trace work on them.
    schema
        Names of genes, perturbations, artifacts and covariates.
    config
        The resolved configuration.
    statistics
        Training statistics the pair was built with.
    reference
        Abducted control cells.
    history
        One row per epoch, every term of the loss in nats per cell.
    labels
        Label to the number of cells in each split, held-out labels included: columns label, train,
        val, test; and, for every artifact flag, the number of training cells that carry it
        (see :func:`flag_column`).
    failing_artifacts
        Flags of up to 5,000 failing training cells, shape (cells, artifacts): what "typical"
        artifacts are.
    facts
        Fingerprint and path of the data, seed, QC thresholds, dosages, package versions.
    pair
        What built an edited pair (see :func:`~cradle_pyro.fit`); None for the pair of `config`.
    """

    model: Cradle
    guide: CradleGuide
    schema: Schema
    config: Config
    statistics: Statistics
    reference: ReferenceCells
    history: pd.DataFrame
    labels: pd.DataFrame
    failing_artifacts: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)
    pair: PairBuilder | None = None

    @property
    def device(self) -> torch.device:
        """Where the pair lives; the CPU, if an edited one has no parameters of its own."""
        modules = (part for part in (self.model, self.guide) if isinstance(part, nn.Module))
        parameters = (parameter for module in modules for parameter in module.parameters())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def save(self, path: str | Path) -> Path:
        """Write a run directory atomically and return its path; ``cradle_pyro.load`` reads it.

        Raises
        ------
        CheckpointError
            If the directory cannot be written, or the pair was changed after `pair` built it.
        """
        from cradle_pyro.inference.checkpoint import save

        return save(self, path)


def flag_column(flag: str) -> str:
    """Return the column of `Posterior.labels` that counts training cells with an artifact flag.

    Examples
    --------
    >>> flag_column("high_mito")
    'train with high_mito'
    """
    return f"train with {flag}"


def draw_latents(guide: Callable[[Batch], object], batch: Batch) -> dict[str, Tensor]:
    """Return one draw of every latent site from the guide, given the cells of `batch`."""
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(batch)
    return {name: node["value"] for name, node in sample_nodes(trace).items()}


def failing_artifacts(train: CellData, *, seed: int) -> Tensor:
    """Return the flags of up to 5,000 failing training cells, shape (cells, artifacts)."""
    rows = np.flatnonzero(train.failing & train.artifact_observed)
    rows = np.random.default_rng(seed).permutation(rows)[:_MOST_REFERENCE_CELLS]
    return torch.as_tensor(train.artifact[np.sort(rows)])


def reference_cells(
    guide: nn.Module, train: CellData, *, seed: int, chunk: int = 1024
) -> ReferenceCells:
    """Return q(z_basal) of up to 5,000 control training cells (all cells, if there is no control).

    Moments are those of the guide given one draw of the globals.
    """
    generator = torch.Generator().manual_seed(seed)
    is_control = torch.as_tensor(train.labels == train.schema.control)
    rows = is_control.nonzero().ravel() if is_control.any() else torch.arange(train.n_cells)
    order = torch.randperm(len(rows), generator=generator)[:_MOST_REFERENCE_CELLS]
    rows = rows[order].sort().values
    device = next(guide.parameters()).device
    parts = []
    with seeded(seed), torch.no_grad():
        for piece in rows.split(chunk):
            batch = train.batch(piece.numpy(), device=device)
            node = poutine.trace(guide).get_trace(batch).nodes[sites.Z_BASAL]
            parts.append((*_moments(node), batch.library, batch.covariates))
    return ReferenceCells(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def _moments(node: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    normal = innermost(node["fn"])
    if isinstance(normal, torch.distributions.Normal):
        return normal.loc, normal.scale
    return node["value"], torch.zeros_like(node["value"])
