"""Which effects to call, given how likely each one's sign is wrong."""

from __future__ import annotations

from typing import Final

import numpy as np

from cradle_pyro.errors import QueryError

__all__ = ["CALL_RATE", "s_values", "sign_calls"]

CALL_RATE: Final = 0.10
"""Expected false sign rate at which effects are called unless another is asked for."""

_ROUNDING = 1e-12


def s_values(lfsr: np.ndarray) -> np.ndarray:
    """Return the expected false sign rate when an entry and all surer ones are called.

    Parameters
    ----------
    lfsr
        Local false sign rates in [0, 1], any shape; every entry competes with every other.

    Returns
    -------
    numpy.ndarray
        The s-values, same shape, in [0, 1]: s_i = mean of lfsr_j over all j with
        lfsr_j <= lfsr_i. Entries with equal lfsr have equal s-values, those of all of them called.

    Raises
    ------
    QueryError
        When an lfsr is missing or outside [0, 1].

    References
    ----------
    Stephens, "False discovery rates: a new deal", Biostatistics 2017.
    """
    lfsr = np.asarray(lfsr, dtype=np.float64)
    wrong = ~((lfsr >= 0) & (lfsr <= 1))
    if wrong.any():
        raise QueryError(
            "Local false sign rates must be numbers in [0, 1]; "
            f"{wrong.sum()} of {lfsr.size} are not, the first is {lfsr[wrong][0]}."
        )
    values, place, count = np.unique(lfsr, return_inverse=True, return_counts=True)
    expected = np.cumsum(values * count) / np.cumsum(count)
    return expected[place].reshape(lfsr.shape)


def sign_calls(lfsr: np.ndarray, *, rate: float = CALL_RATE) -> np.ndarray:
    """Return which entries to call so that the expected false sign rate is at most `rate`.

    Parameters
    ----------
    lfsr
        Local false sign rates in [0, 1], any shape.
    rate
        Expected share of wrong signs among the calls, in [0, 1].

    Returns
    -------
    numpy.ndarray
        Bool, same shape: the largest set of smallest lfsr whose mean lfsr is at most `rate`.
        Entries with equal lfsr are called together or not at all.

    Raises
    ------
    QueryError
        When the rate or an lfsr is missing or outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise QueryError(f"The false sign rate to call at must lie in [0, 1], found {rate}.")
    # A mean of n rates equal to `rate` may exceed it by rounding.
    return s_values(lfsr) <= rate + _ROUNDING
