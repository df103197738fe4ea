"""What a predictor of perturbation effects is, for tables in which models and baselines meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData

__all__ = ["FittedPredictor", "Predictor"]


@runtime_checkable
class FittedPredictor(Protocol):
    """Effects of perturbations, learned from cells.

    Only `Predictor.fit` makes one, so there is no predictor that must be fitted before use.
    """

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    def predict(self, labels: Sequence[str]) -> np.ndarray:
        """Return the effect of each label against control, shape (labels, genes), log2 units.

        Labels are canonical: names of elementary perturbations joined by the schema's delimiter.
        Combinations need not have been seen. The control label has no effect.
        """
        ...


@runtime_checkable
class Predictor(Protocol):
    """A way to learn effects: settings only, no data."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    def fit(self, data: CellData) -> FittedPredictor:
        """Return what was learned from `data`, which must hold training cells only."""
        ...
