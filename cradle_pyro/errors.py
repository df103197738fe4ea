"""Errors a user can cause, one class per boundary at which they are raised.

Every message says what was required, what was found (a few labels, then how many more) and what
to do. ``shown`` formats the labels, ``near`` names the closest known ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CradleError",
    "DataError",
    "DataWarning",
    "QueryError",
    "TrainingError",
    "near",
    "shown",
]


class CradleError(Exception):
    """Base of all errors that describe a user's mistake; the CLI prints them and exits with 2."""


class DataError(CradleError):
    """The screen, its labels or its counts are not what was asked for."""


class ConfigError(CradleError):
    """A configuration file or ``--set`` flag has an unknown key or an impossible value."""


class QueryError(CradleError):
    """A query names something the fitted model does not know."""


class CheckpointError(CradleError):
    """A run directory is missing, truncated, or from an incompatible version."""


class TrainingError(CradleError):
    """Training cannot go on, for example because a loss term is not finite."""


class DataWarning(UserWarning):
    """Something about the screen that may surprise, but does not stop the work."""


def shown(labels: Iterable[object], most: int = 5) -> str:
    """Return the first labels in quotes, then how many more there are.

    Examples
    --------
    >>> shown(["A", "B", "C"], most=2)
    "'A', 'B' and 1 more"
    """
    names = [repr(str(label)) for label in labels]
    head = ", ".join(names[:most])
    return head if len(names) <= most else f"{head} and {len(names) - most} more"


def near(name: str, known: Sequence[str], most: int = 3) -> str:
    """Return ``"; did you mean 'X'?"`` for the known names closest to `name`, or an empty string.

    Examples
    --------
    >>> near("KLF2", ["KLF1", "TP53"])
    "; did you mean 'KLF1'?"
    """
    lowered = {str(other).lower(): str(other) for other in known}
    matches = difflib.get_close_matches(str(name).lower(), lowered, n=most, cutoff=0.6)
    return f"; did you mean {shown(lowered[match] for match in matches)}?" if matches else ""
