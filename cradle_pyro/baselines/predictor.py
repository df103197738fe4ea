"""What a predictor of perturbation effects is, for tables in which models and baselines meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData

__all__ = ["Depth", "FittedPredictor", "GenerativePredictor", "Predictor"]


class Depth(NamedTuple):
    """Library sizes of the observed cells with which a prediction is compared, in counts.

    The mean of log2(1 + 1e4 * noisy fraction) depends on them, so that both sides of a comparison
    must carry the same noise.

    Parameters
    ----------
    labels
        Libraries of each label's cells, in the order of the labels asked for.
    control
        Libraries of the control cells.
    """

    labels: Sequence[np.ndarray]
    control: np.ndarray


@runtime_checkable
class FittedPredictor(Protocol):
    """Effects of perturbations, learned from cells.

    Only `Predictor.fit` makes one, so there is no predictor that must be fitted before use.
    """

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    def predict(self, labels: Sequence[str], depth: Depth | None = None) -> np.ndarray:
        """Return the effect of each label against control, shape (labels, genes), log2 units.

        Parameters
        ----------
        labels
            Canonical: names of elementary perturbations joined by the schema's delimiter.
            Combinations need not have been seen. The control label has no effect.
        depth
            None: differences of log2(1 + 1e4 * expected fraction), for truth and biology. Else
            differences of the mean over cells of log2(1 + 1e4 * count / library), as cells with
            these libraries would show it.
        """
        ...


@runtime_checkable
class GenerativePredictor(FittedPredictor, Protocol):
    """A fitted predictor that also says what single cells look like."""

    def generate(self, labels: Sequence[str], library: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Return counts of new cells without artifact, shape (cells, genes).

        Parameters
        ----------
        labels
            Label of each cell.
        library
            Library size of each cell, in counts, shape (cells,).
        seed
            Seed of the draws.
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
        """Return what was learned from `data`.

        `data` holds cells of the splits "train" and, for predictors that stop early or choose
        settings, "val"; never test cells. Without a split all cells are training cells.
        """
        ...
