"""Figures of a benchmark: paired differences with intervals, and scores of each seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.grid import CEILING_KIND
from cradle_pyro.reporting.layout import (
    BLUE,
    GREY,
    SMALL,
    VERMILION,
    check_table,
    draw_on,
    range_of,
    set_range,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_differences", "plot_dots"]

_HEIGHT = 0.28  # inches of a row
_FURTHEST = 2.0  # a t interval of few seeds is shown as far as this many widths of the others


def plot_differences(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the difference to each other predictor with its two intervals.

    Parameters
    ----------
    table
        Rows of `compare` for one screen, reference, set of labels and metric: columns other, mean,
        ci_low, ci_high, t_low, t_high. Thick: bootstrap; thin: Student's t, cut off where it is
        much wider. Coloured where both leave out zero.
    ax
        Where to draw; a new figure if omitted.

    Raises
    ------
    DataError
        If a column is missing or there are no rows.
    """
    needed = ["other", "mean", "ci_low", "ci_high", "t_low", "t_high"]
    check_table(table, needed, "paired differences")
    ax = draw_on(ax, (4.8, 1.2 + _HEIGHT * len(table)))
    places = np.arange(len(table))[::-1]
    low, high = range_of(table["mean"], table["ci_low"], table["ci_high"], [0.0])
    reach = _FURTHEST * max(high - low, 1e-3)
    ends = [table[name].clip(low - reach, high + reach).to_numpy() for name in needed[4:]]
    # Grey unless both intervals leave out zero; a single seed has no t interval.
    above = (table[["ci_low", "t_low"]].min(axis=1) > 0).to_numpy()
    below = (table[["ci_high", "t_high"]].max(axis=1) < 0).to_numpy()
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    for k, (_, row) in enumerate(table.iterrows()):
        colour = BLUE if above[k] else VERMILION if below[k] else GREY
        ax.plot([ends[0][k], ends[1][k]], [places[k]] * 2, color=colour, linewidth=0.8)
        ax.plot([row["ci_low"], row["ci_high"]], [places[k]] * 2, color=colour, linewidth=3.2)
        ax.plot(row["mean"], places[k], "o", color=colour, markersize=5)
    shown = range_of(*(end for end in ends if np.isfinite(end).any()), [low, high])
    set_range(ax.set_xlim, *shown)
    ax.set_yticks(places, table["other"].astype(str), fontsize=SMALL)
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.set_xlabel("difference", fontsize=SMALL)
    return ax


def plot_dots(
    values: pd.DataFrame, metric: str, *, strong: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the scores of each seed and their mean, one row per predictor.

    Parameters
    ----------
    values
        Seeds x predictors. The predictor "ceiling" is drawn as a line.
    metric
        Name of the axis.
    strong
        The predictor in another colour.
    ax
        Where to draw; a new figure if omitted.

    Raises
    ------
    DataError
        If there is nothing to draw.
    """
    names = [str(name) for name in values.columns if name != CEILING_KIND]
    if not names:
        raise DataError("A plot of scores needs predictors; found none.")
    ax = draw_on(ax, (4.8, 1.2 + _HEIGHT * len(names)))
    if CEILING_KIND in values:
        ax.axvline(float(values[CEILING_KIND].mean()), color=GREY, linewidth=1.2, linestyle="--")
    for place, name in zip(range(len(names))[::-1], names, strict=True):
        known = values[name].dropna().to_numpy()
        colour = VERMILION if name == strong else BLUE
        ax.plot(known, np.full(len(known), place), "o", color=colour, markersize=3, alpha=0.45)
        if len(known):
            ax.plot(known.mean(), place, "o", color=colour, markersize=7)
    ax.set_yticks(range(len(names))[::-1], names, fontsize=SMALL)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlabel(metric, fontsize=SMALL)
    return ax
