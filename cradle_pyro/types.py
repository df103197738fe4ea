"""Words every layer shares: the screen's names and the batch that crosses from data to model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["SCALE", "Batch", "Carried", "EffectStart", "Schema", "Statistics"]

SCALE: Final = 1e4
"""Counts per cell to which fractions are scaled before a logarithm."""


@dataclass(frozen=True)
class Schema:
    """Names and sizes of a screen: everything a model needs to know about the data in words.

    Parameters
    ----------
    genes
        Names of the scored genes, in the order of ``counts`` columns.
    perturbations
        Names of the elementary perturbations (no combinations, no control), in design order.
    artifacts
        Names of the artifact flags, in order; never contains "any" beside other flags.
    covariates
        Categorical covariates and their levels. Columns of ``Batch.covariates`` are the levels,
        one-hot, concatenated in this order.
    control
        Canonical label of an unperturbed cell.
    delimiter
        Joins elementary perturbations in a label.
    has_rest
        True when libraries count genes that were not kept, so that rates sum to less than one.

    Examples
    --------
    >>> batches = (("batch", ("1", "2")),)
    >>> schema = Schema(genes=("G1",), perturbations=("A", "B"), covariates=batches)
    >>> schema.n_perturbations, schema.n_covariate_levels
    (2, 2)
    """

    genes: tuple[str, ...]
    perturbations: tuple[str, ...]
    artifacts: tuple[str, ...] = ()
    covariates: tuple[tuple[str, tuple[str, ...]], ...] = ()
    control: str = "control"
    delimiter: str = "+"
    has_rest: bool = False

    @property
    def n_genes(self) -> int:
        """Number of scored genes."""
        return len(self.genes)

    @property
    def n_perturbations(self) -> int:
        """Number of elementary perturbations."""
        return len(self.perturbations)

    @property
    def n_artifacts(self) -> int:
        """Number of artifact flags."""
        return len(self.artifacts)

    @property
    def n_covariate_levels(self) -> int:
        """Number of one-hot columns over all covariates."""
        return sum(len(levels) for _, levels in self.covariates)


class Statistics(NamedTuple):
    """What the model learns from the training cells before it sees a batch.

    Parameters
    ----------
    n_cells
        Number of training cells, the size of the cells plate.
    log_mean, log_sd
        Mean and standard deviation of log1p counts (or of the values), shape (genes,).
    fraction
        Mean over cells of counts over library, shape (genes,); of the values if log-normalised.
    inverse_dispersion
        Method-of-moments negative-binomial inverse dispersion, shape (genes,).
    log_library_mean, log_library_sd
        Mean and standard deviation of log library, scalars.
    artifact_share
        Share of training cells that carry each flag, shape (artifacts,).
    failing_share
        Share of training cells that carry any flag, scalar.
    combinations
        Members of the combinations that have effects beyond those of their members, 0 or 1, shape
        (combinations, perturbations).
    """

    n_cells: int
    log_mean: Tensor
    log_sd: Tensor
    fraction: Tensor
    inverse_dispersion: Tensor
    log_library_mean: Tensor
    log_library_sd: Tensor
    artifact_share: Tensor
    failing_share: Tensor
    combinations: Tensor


class EffectStart(NamedTuple):
    """Estimates of the direct effects, from which training starts.

    Parameters
    ----------
    loc
        Log-fold changes against control, natural logarithm, shape (perturbations + combinations,
        genes); of a combination, what it adds to the sum of its members.
    error
        Their standard errors, same shape.
    """

    loc: Tensor
    error: Tensor


class Carried(NamedTuple):
    """The perturbations and combinations that cells of a batch carry, of all that there are.

    Parameters
    ----------
    perturbations, combinations
        Their positions, shape (carried,) each.
    perturbation_weights, combination_weights
        How much of each one's own terms of the bound the batch stands for: its share of the
        training cells that carry it, times the number of batches. One in expectation.
    """

    perturbations: Tensor
    perturbation_weights: Tensor
    combinations: Tensor
    combination_weights: Tensor


@dataclass(frozen=True)
class Batch:
    """Cells as the model sees them: tensors only, one row per cell.

    Parameters
    ----------
    counts
        Raw counts (or log-normalised values for a Normal likelihood), shape (cells, genes).
    perturbation
        Design, multi-hot or dosage >= 0, all zero for a control; shape (cells, perturbations).
    artifact
        Flags in {0, 1} or severities in [0, 1]; shape (cells, artifacts).
    library
        Library size, in counts; shape (cells,).
    covariates
        One-hot levels, concatenated; shape (cells, covariate_levels).
    artifact_observed
        False for cells whose flags are missing (their ``artifact`` row is ignored); shape (cells,).
        None means that all are observed.
    partner
        Observed training cells with the same perturbation and covariates and the opposite artifact
        state, for the partner form of the counterfactual term.
    partner_rows
        Row of this batch to which each row of `partner` belongs; shape (partners,).
    carried
        In training with many perturbations: those whose effects are drawn, so that a step costs as
        much as its cells carry. None: all. Columns of `perturbation` are always all of them.
    """

    counts: Tensor
    perturbation: Tensor
    artifact: Tensor
    library: Tensor
    covariates: Tensor
    artifact_observed: Tensor | None = None
    partner: Batch | None = None
    partner_rows: Tensor | None = None
    carried: Carried | None = None

    def __len__(self) -> int:
        return self.library.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=non_blocking)

        carried = None if self.carried is None else Carried(*map(moved, self.carried))
        return self._map(moved).replace(carried=carried)

    def take(self, rows: Tensor) -> Batch:
        """Return the cells at `rows` (integer positions), without partners."""
        alone = dataclasses.replace(self, partner=None, partner_rows=None)
        return alone._map(lambda value: value[rows])

    def replace(self, **fields: Tensor | Batch | Carried | None) -> Batch:
        """Return a copy with some fields replaced."""
        return dataclasses.replace(self, **fields)  # type: ignore[arg-type]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `function` applied to its cells' tensors, and the partner's."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Batch):
                changed[field.name] = value._map(function)
            elif isinstance(value, Tensor):
                changed[field.name] = function(value)
        return dataclasses.replace(self, **changed)
