"""Whether stated uncertainty is right: coverage of intervals, signs of calls; arrays only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cradle_pyro.errors import DataError

__all__ = ["Coverage", "false_sign_rate", "interval_coverage"]


class Coverage(NamedTuple):
    """How often intervals hold the truth.

    Parameters
    ----------
    share
        Share of the entries whose interval holds the truth, in [0, 1]; nan without entries.
    n
        Number of entries.
    """

    share: float
    n: int


def interval_coverage(
    low: np.ndarray, high: np.ndarray, truth: np.ndarray, *, least_effect: float = 0.0
) -> Coverage:
    """Return how many intervals hold the truth, among entries with a true effect.

    Parameters
    ----------
    low, high
        Ends of the intervals, both included; any shape, for example (labels, genes).
    truth
        True values, same shape and unit.
    least_effect
        Only entries with |truth| above this count, in the unit of the truth. At 0, entries
        without any effect are left out.

    Returns
    -------
    Coverage
        Share and number of entries.

    Raises
    ------
    DataError
        When shapes differ, a value is missing, or an interval ends before it starts.

    Notes
    -----
    An exact posterior covers at its nominal rate on average over its prior. Chosen by the size of
    the truth, as here, entries are covered less or more often than that: large true effects are
    shrunken, so their intervals miss more.
    """
    low, high, truth = _aligned(low=low, high=high, truth=truth)
    reversed_ends = low > high
    if reversed_ends.any():
        raise DataError(
            f"{reversed_ends.sum()} of {low.size} intervals have low above high; swap the ends."
        )
    counted = np.abs(truth) > least_effect
    held = (low <= truth) & (truth <= high)
    return Coverage(_share(held[counted]), int(counted.sum()))


def false_sign_rate(estimate: np.ndarray, truth: np.ndarray, called: np.ndarray) -> float:
    """Return the realised share of wrong signs among the called entries.

    Parameters
    ----------
    estimate
        Estimated effects, any shape.
    truth
        True effects, same shape. A truth of exactly zero has no sign: calling it is wrong.
    called
        Which entries are called, bool, same shape; see
        :func:`~cradle_pyro.queries.calls.sign_calls`.

    Returns
    -------
    float
        In [0, 1]; nan when nothing is called.

    Raises
    ------
    DataError
        When shapes differ or a value is missing.
    """
    estimate, truth, called = _aligned(estimate=estimate, truth=truth, called=called)
    wrong = (np.sign(estimate) != np.sign(truth)) | (truth == 0)
    return _share(wrong[called.astype(bool)])


def _aligned(**arrays: np.ndarray) -> list[np.ndarray]:
    """Return the arrays as float64 after a check that their shapes agree and nothing is nan."""
    values = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in values.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"Arrays of one shape are required, found {shapes}; align their entries.")
    for name, array in values.items():
        if np.isnan(array).any():
            raise DataError(f"{np.isnan(array).sum()} of {array.size} values of '{name}' are nan.")
    return list(values.values())


def _share(events: np.ndarray) -> float:
    return float(events.mean()) if events.size else float("nan")
