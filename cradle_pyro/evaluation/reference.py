"""Reference effects from held-out cells, and how well such cells can be predicted at all.

Reference effects are computed from the cells handed in: give test cells, never training cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cradle_pyro.data.groups import Functional, group_moments, label_groups, marginal_groups
from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.metrics import score_effects, spearman_brown

__all__ = [
    "Ceiling",
    "group_effects",
    "label_groups",
    "marginal_groups",
    "split_half_ceiling",
]

_CONTROL = "\0control"
# Entries of each accumulator (float64, four of them) that a pass over the cells may hold.
_PASS_VALUES = 4_000_000


@dataclass(frozen=True)
class Ceiling:
    """How well the reference agrees with itself.

    Parameters
    ----------
    halves
        Scores of one half against the other (names as in `score_effects`), mean over repeats.
    halves_sd
        Standard deviation of those scores over repeats.
    replicate
        Score that a second sample of cells of the same size would reach: Spearman-Brown for
        correlations. The ceiling to print beside observed cells.
    noise_free
        Score that the exact expected effects would reach, the most that any predictor can hope
        for: the square root of the replicate correlation, and for R2 that correlation itself.
    n_repeats
        Number of random halvings.
    """

    halves: dict[str, float]
    halves_sd: dict[str, float]
    replicate: dict[str, float]
    noise_free: dict[str, float]
    n_repeats: int


def group_effects(
    counts: Any,
    library: np.ndarray,
    groups: Mapping[str, np.ndarray],
    control_rows: np.ndarray,
    *,
    functional: Functional = "log_mean",
    values: Literal["counts", "lognorm"] = "counts",
    chunk: int = 4096,
) -> np.ndarray:
    """Return the effect of each group of cells against the controls, shape (labels, genes).

    Parameters
    ----------
    counts
        Raw counts, shape (cells, genes); sparse, dense or backed, read `chunk` rows at a time.
    library
        Library size of every cell, in counts, shape (cells,).
    groups
        Row positions of each label, in the order of the returned rows.
    control_rows
        Row positions of the control cells.
    functional
        ``"log_mean"``: log2(1 + 1e4 mean f), f = count / library, for expected profiles;
        ``"mean_log"``: mean of log2(1 + 1e4 f), for observed cells.
    values
        ``"lognorm"`` when `counts` holds log(1 + 1e4 f) instead.
    chunk
        Rows read at a time; changes memory, not the result.

    Returns
    -------
    np.ndarray
        functional(cells of the label) - functional(controls), log2 units.

    Raises
    ------
    DataError
        When a group or the control is empty, or a row does not exist.
    """
    together = {**{str(label): rows for label, rows in groups.items()}, _CONTROL: control_rows}
    moments = group_moments(counts, library, together, values=values, chunk=chunk)
    value = moments.value(functional)
    return value[:-1] - value[-1]


def split_half_ceiling(
    counts: Any,
    library: np.ndarray,
    groups: Mapping[str, np.ndarray],
    control_rows: np.ndarray,
    *,
    functional: Functional = "log_mean",
    values: Literal["counts", "lognorm"] = "counts",
    n_repeats: int = 20,
    seed: int = 0,
    chunk: int = 4096,
) -> Ceiling:
    """Return how well two halves of the same cells agree, and what that says about the whole.

    In every repeat the cells of each group and the controls are halved at random, so that neither
    arm's noise is shared, and the two effect matrices are scored against each other.

    Parameters
    ----------
    counts, library, groups, control_rows, functional, values, chunk
        As in `group_effects`; groups of one cell cannot be halved and are left out.
    n_repeats
        Random halvings.
    seed
        Seed of the halvings.

    Returns
    -------
    Ceiling
        Scores of the halves, and their extrapolation to the whole.

    Raises
    ------
    DataError
        When fewer than two control cells, or no group of two cells, are there, or `n_repeats` is
        not positive.
    """
    halved = {str(label): np.asarray(rows) for label, rows in groups.items() if len(rows) >= 2}
    if n_repeats < 1:
        raise DataError(f"n_repeats must be at least 1, found {n_repeats}.")
    if not halved or len(control_rows) < 2:
        raise DataError(
            "a split-half ceiling needs at least two control cells and one label with two cells, "
            f"found {len(control_rows)} control cells and {len(halved)} such labels. "
            "Use a larger test split."
        )
    arms = {**halved, _CONTROL: np.asarray(control_rows)}
    rng = np.random.default_rng(seed)
    per_pass = max(_PASS_VALUES // (2 * len(arms) * counts.shape[1]), 1)
    scores: list[dict[str, float]] = []
    while len(scores) < n_repeats:
        n_here = min(per_pass, n_repeats - len(scores))
        halves = {k: rows for i in range(n_here) for k, rows in _halve(arms, rng, i).items()}
        moments = group_moments(counts, library, halves, values=values, chunk=chunk)
        value = moments.value(functional).reshape(n_here, 2, len(arms), -1)
        effects = value[:, :, :-1] - value[:, :, -1:]
        scores += [score_effects(first, second) for first, second in effects]
    return _summarise(scores)


def _halve(
    groups: Mapping[str, np.ndarray], rng: np.random.Generator, repeat: int
) -> dict[str, np.ndarray]:
    """Return random halves of each group: all first halves, then all second ones."""
    first, second = {}, {}
    for label, rows in groups.items():
        mixed = rng.permutation(rows)
        half = len(mixed) // 2
        first[f"{repeat}\0first\0{label}"] = mixed[:half]
        second[f"{repeat}\0second\0{label}"] = mixed[half:]
    return {**first, **second}


def _summarise(scores: list[dict[str, float]]) -> Ceiling:
    names = list(scores[0])
    table = np.array([[score[name] for name in names] for score in scores])
    halves = dict(zip(names, table.mean(axis=0).tolist(), strict=True))
    spread = dict(zip(names, table.std(axis=0).tolist(), strict=True))
    replicate = {
        name: spearman_brown(halves[name]) for name in ("ate_rho", "ate_rho_per_perturbation")
    }
    noise_free = {name: float(np.sqrt(max(value, 0.0))) for name, value in replicate.items()}
    for rho, r2 in (
        ("ate_rho", "ate_r2"),
        ("ate_rho_per_perturbation", "ate_r2_per_perturbation"),
    ):
        reliability = max(replicate[rho], 0.0)
        replicate[r2], noise_free[r2] = 2.0 * reliability - 1.0, reliability
    return Ceiling(halves, spread, replicate, noise_free, len(scores))
