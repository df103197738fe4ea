"""The look of the plots, and what they share: colours, checks of tables, axes, names of ticks.

References
----------
Okabe and Ito, "Color universal design", 2008 (categories). Brewer, "ColorBrewer", 2003 (red to
blue). Nunez et al., "Optimizing colormaps with consideration for color vision deficiency", 2018
(cividis).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cradle_pyro.errors import DataError, near, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = [
    "ABOVE",
    "BESIDE",
    "BLACK",
    "BLUE",
    "CATEGORIES",
    "DIVERGING",
    "GREEN",
    "GREY",
    "LINE",
    "MARKERS",
    "ORANGE",
    "PALE",
    "PURPLE",
    "ROW",
    "SEQUENTIAL",
    "SKY",
    "SMALL",
    "TALLEST",
    "VERMILION",
    "check_table",
    "check_unique",
    "colour_bar",
    "dodged",
    "draw_on",
    "draw_side_by_side",
    "line_styles",
    "log_axes",
    "name_above",
    "name_ticks",
    "range_of",
    "room",
    "rows_of",
    "set_range",
]

BLUE: Final = "#0072B2"
ORANGE: Final = "#E69F00"
GREEN: Final = "#009E73"
VERMILION: Final = "#D55E00"
PURPLE: Final = "#CC79A7"
SKY: Final = "#56B4E9"
BLACK: Final = "#000000"
CATEGORIES: Final = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, BLACK)
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
DIVERGING: Final = "RdBu_r"
SEQUENTIAL: Final = "cividis"

GREY: Final = "0.6"
PALE: Final = "0.85"
SMALL: Final = 8  # points: labels of ticks, legends and notes
LINE: Final = 10  # points: height of a line of labels
ROW: Final = 0.19  # inches: height of a labelled row in a figure of our own
TALLEST: Final = 11.0  # inches

# Where legends stand.
BESIDE: Final[dict[str, Any]] = {
    "loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0,
    "fontsize": SMALL, "frameon": False,
}  # fmt: skip
ABOVE: Final[dict[str, Any]] = {
    "loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2,
    "fontsize": SMALL, "frameon": False,
}  # fmt: skip


def check_table(table: pd.DataFrame, needed: Sequence[str], what: str) -> None:
    """Raise unless `table` has rows and the columns needed."""
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(
            f"A plot of {what} needs columns {shown(needed, 10)}; {shown(missing, 10)} "
            f"missing, found {shown(table.columns, 12) or 'none'}."
        )
    if table.empty:
        raise DataError(f"The table of {what} is empty: there is nothing to draw.")


def check_unique(names: pd.Series, what: str, advice: str = "Keep one of them.") -> None:
    """Raise if a name stands there twice."""
    twice = names[names.duplicated()].unique()
    if len(twice):
        raise DataError(f"Expected one row for each {what}; several have {shown(twice)}. {advice}")


def rows_of(table: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    """Return the rows whose `column` is `name`."""
    known = [str(value) for value in dict.fromkeys(table[column])]
    if name not in known:
        raise DataError(f"No {column} '{name}'{near(name, known)}; found {shown(known, 10)}.")
    return table[table[column].astype(str) == name]


def draw_on(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return `ax`, or that of a new figure of `size` in inches, without a right and upper edge."""
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=size, layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=SMALL)
    return ax


def draw_side_by_side(
    axes: Sequence[Axes] | NDArray[Any] | None,
    n: int,
    size: tuple[float, float],
    *,
    width_ratios: Sequence[float] | None = None,
) -> NDArray[Any]:
    """Return `axes`, or those of a new figure, side by side."""
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(
            1, n, figsize=size, layout="constrained", width_ratios=width_ratios, squeeze=False
        )[1].ravel()
    drawn = np.empty(n, dtype=object)
    given = np.asarray(axes, dtype=object).ravel()
    if len(given) != n:
        raise DataError(f"Expected {n} axes to draw on, found {len(given)}.")
    drawn[:] = [draw_on(one, size) for one in given]
    return drawn


def room(ax: Axes) -> tuple[float, float]:
    """Return width and height of axes in points."""
    ax.apply_aspect()  # a matrix of squares fills only a part of its place
    extent = ax.get_window_extent()
    points = 72 / ax.figure.dpi
    return extent.width * points, extent.height * points


def name_ticks(axis: Axis, names: Sequence[str]) -> None:
    """Name the places 0, 1, 2, ... of an axis; of many, as many as there is room for."""
    is_x = axis is axis.axes.xaxis
    length = room(axis.axes)[0 if is_x else 1]
    step = max(int(np.ceil(len(names) * LINE / length)), 1)
    places = range(0, len(names), step)
    axis.set_ticks(
        places, [str(names[k]) for k in places], fontsize=SMALL, rotation=90 if is_x else 0
    )


def set_range(set_limits: Callable[[float, float], object], low: float, high: float) -> None:
    """Set limits a little outside of a range."""
    pad = 0.05 * (high - low) or 0.5
    set_limits(low - pad, high + pad)


def range_of(*values: ArrayLike) -> tuple[float, float]:
    """Return the least and the greatest finite value."""
    together = np.concatenate([np.asarray(part, dtype=float).ravel() for part in values])
    finite = together[np.isfinite(together)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)


def colour_bar(ax: Axes, image: Any, label: str, **options: Any) -> None:
    """Draw a colour bar beside axes."""
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, aspect=25, pad=0.02, **options)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)


def log_axes(ax: Axes, x: NDArray[Any], y: NDArray[Any]) -> None:
    """Make both axes logarithmic for these values; where there are zeros, linear next to them."""
    for values, set_scale, set_limits in (
        (x, ax.set_xscale, ax.set_xlim),
        (y, ax.set_yscale, ax.set_ylim),
    ):
        positive = values[values > 0]
        if not len(positive):
            continue
        least, most = float(positive.min()), float(positive.max())
        if len(positive) == len(values):
            set_scale("log")
            set_limits(least / 1.5, most * 1.5)
        else:
            set_scale("symlog", linthresh=least, linscale=0.3)
            set_limits(-0.3 * least, most * 1.5)


def line_styles() -> Iterator[tuple[str, str]]:
    """Return endless pairs of a colour and a dash, the first 28 of which differ."""
    return cycle((colour, dash) for dash in ("-", "--", ":", "-.") for colour in CATEGORIES)


def name_above(
    ax: Axes, x: NDArray[Any], y: NDArray[Any], names: Sequence[str], top: float
) -> None:
    """Write names upright and side by side above all points, each tied to its own."""
    from scipy.optimize import isotonic_regression

    width, height = room(ax)
    low, high = ax.get_xlim()
    gap = (high - low) * 1.1 * LINE / width
    n = min(len(names), int((high - low) / gap))
    longest = max((len(name) for name in names[:n]), default=0)
    share = min((0.75 * SMALL * longest + 24) / height, 0.6) if n else 0.05
    ax.set_ylim(0, top / (1 - share))
    order = np.argsort(x[:n], kind="stable")
    steps = gap * np.arange(n)
    # Nearest places to the points that keep the gap: least squares under an order.
    place = isotonic_regression(x[:n][order] - steps).x if n else np.empty(0)
    place = np.clip(place, low + gap / 2, high - gap / 2 - gap * max(n - 1, 0)) + steps
    for k, at in zip(order, place, strict=True):
        ax.annotate(
            names[k], (x[k], y[k]), (at, top + 0.35 * share * top / (1 - share)), rotation=90,
            ha="center", va="bottom", fontsize=SMALL,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 2},
        )  # fmt: skip


def dodged(names: pd.Series, order: Sequence[str]) -> NDArray[Any]:
    """Return places around 0, 1, 2, ... for rows that share a name, each a little beside others."""
    number = names.groupby(names).cumcount().to_numpy()
    size = names.map(names.value_counts()).to_numpy()
    place = pd.Index(order).get_indexer(pd.Index(names))
    return place + 0.7 * ((number + 0.5) / size - 0.5)
