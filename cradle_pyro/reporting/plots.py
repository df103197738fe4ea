"""Plots of results: each takes data and axes, and returns the axes.

Nothing is computed here beyond layout: what is drawn are the numbers of the tables given. Without
axes, a function makes a figure of its own. Colours are told apart by colour-blind readers; they and
the sizes of text are those of :mod:`cradle_pyro.reporting.layout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cradle_pyro.errors import DataError, near, shown
from cradle_pyro.evaluation.calibration import ecdf_difference
from cradle_pyro.evaluation.evaluate import CEILING, MODEL
from cradle_pyro.reporting.layout import (
    ABOVE,
    BESIDE,
    BLACK,
    BLUE,
    CATEGORIES,
    DIVERGING,
    GREY,
    MARKERS,
    ORANGE,
    PALE,
    ROW,
    SEQUENTIAL,
    SKY,
    SMALL,
    TALLEST,
    VERMILION,
    check_table,
    check_unique,
    colour_bar,
    dodged,
    draw_on,
    draw_side_by_side,
    line_styles,
    log_axes,
    name_above,
    name_ticks,
    range_of,
    room,
    rows_of,
    set_range,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = [
    "before_after",
    "confounding",
    "counterfactual_cell",
    "coverage",
    "effect_heatmap",
    "interaction_matrix",
    "latent_units",
    "leakage",
    "loss_terms",
    "mean_variance",
    "pit_histogram",
    "predictive_genes",
    "predictive_metric",
    "rank_ecdf",
    "rank_histogram",
    "scores",
    "training_history",
    "volcano",
]

_BAND = 0.99  # what "expected" bands hold
_ROUNDING = 1e-12  # of a mean of rates
_SURE = 0.1  # local false sign rate up to which single genes stand out


# --------------------------------------------------------------------------------------- training


def training_history(history: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Return axes with training and validation loss by epoch, and the best epoch.

    Parameters
    ----------
    history
        ``Posterior.history``: columns epoch, train_loss and, if there was validation, val_loss
        (nats per cell).
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.

    Notes
    -----
    The best epoch has the lowest validation loss (training loss without validation). The vertical
    range leaves out the first tenth of the epochs, in which the loss falls the most, and the
    highest 2 % of later values.
    """
    check_table(history, ["epoch", "train_loss"], "Posterior.history")
    ax = draw_on(ax, (6.0, 3.6))
    losses = {"training": "train_loss", "validation": "val_loss"}
    known = {k: c for k, c in losses.items() if c in history and history[c].notna().any()}
    if not known:
        raise DataError("The training history holds no loss: all values are missing.")
    epochs = history["epoch"].to_numpy()
    marker = "o" if len(history) < 3 else None
    for (name, key), colour in zip(known.items(), (SKY, BLUE), strict=False):
        ax.plot(epochs, history[key], color=colour, marker=marker, label=name)
    judged = history[list(known.values())[-1]].to_numpy(dtype=float)
    best = int(np.nanargmin(judged))
    ax.axvline(epochs[best], color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    label = f"best: epoch {epochs[best]:g}, {judged[best]:,.1f}"
    ax.scatter([epochs[best]], [judged[best]], color=VERMILION, zorder=3, label=label)
    late = history[list(known.values())].to_numpy(dtype=float)[len(history) // 10 :]
    high = max(float(np.nanquantile(late, 0.98)), float(judged[best]))
    set_range(ax.set_ylim, float(np.nanmin(late)), high)
    ax.set(xlabel="epoch", ylabel="loss (nats per cell)")
    ax.legend(loc="upper right", fontsize=SMALL, frameon=False)
    return ax


def loss_terms(history: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Return axes with every term of the loss by epoch, the largest last value first in the legend.

    Parameters
    ----------
    history
        ``Posterior.history``: columns epoch and val_<term>, or train_<term> without validation
        (nats per cell).
    ax
        Axes to draw on; a new figure's if omitted. The legend stands to their right.

    Raises
    ------
    DataError
        If the table is empty or has no terms.
    """
    check_table(history, ["epoch"], "Posterior.history")
    split, terms = _terms(history)
    ax = draw_on(ax, (7.0, 4.0))
    last = terms.ffill().iloc[-1].sort_values(ascending=False)
    for (name, value), (colour, dash) in zip(last.items(), line_styles(), strict=False):
        label = f"{str(name).replace('_', ' ')}  {value:,.3g}"
        marker = "." if len(terms) < 3 else None
        ax.plot(
            history["epoch"], terms[name], color=colour, linestyle=dash, marker=marker, label=label
        )
    values = terms.to_numpy(dtype=float)
    most = np.nanmax(np.abs(values))
    if np.nanmin(values) > 0:
        ax.set_yscale("log")
        # A term of 1e-8 nats matters to nobody, and would squeeze the others.
        ax.set_ylim(bottom=max(np.nanmin(values) / 2, most * 1e-7))
    elif most > 0:
        ax.set_yscale("symlog", linthresh=most * 1e-5)
    ax.set(xlabel="epoch", ylabel=f"{split} terms (nats per cell)")
    ax.legend(title="last value", title_fontsize=SMALL, alignment="left", **BESIDE)
    return ax


# ---------------------------------------------------------------------------------------- effects


def effect_heatmap(
    effects: AnnData,
    *,
    labels: Sequence[str] | None = None,
    n_genes: int = 30,
    called: float = 0.10,
    least_effect: float = 0.10,
    ax: Axes | None = None,
) -> Axes:
    """Return axes with the effects of perturbations on the genes that they change the most.

    Parameters
    ----------
    effects
        From :func:`~cradle_pyro.effects`: perturbations x genes, layer ``s_value``; and, if there
        is a layer ``inclusion`` (posterior probability of an effect), marks are full from 0.5 on.
    labels
        Perturbations to show, in this order; by default all, similar ones side by side.
    n_genes
        Genes to show: those most often called, of these the strongest.
    called
        Expected false sign rate at which an entry is called and gets a mark, where there is room
        for marks.
    least_effect
        Smaller effects (log2) are not counted and get no mark, however sure their sign is: rates
        sum to one, so that a strong effect on some genes moves all others a little.
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If there is nothing to draw, a label is unknown, or the layer is missing.
    """
    table = _effect_table(effects, labels, n_genes, called, least_effect)
    n_rows, n_columns = table.mean.shape
    size = (2.6 + 0.2 * n_columns, min(1.6 + ROW * n_rows, TALLEST))
    ax = draw_on(ax, size)
    bound = _robust_bound(table.mean)
    image = ax.imshow(
        table.mean, aspect="auto", interpolation="nearest", cmap=DIVERGING, vmin=-bound, vmax=bound
    )
    extend = "both" if np.abs(table.mean).max() > bound else "neither"
    colour_bar(ax, image, "mean effect (log2)", extend=extend)
    width, height = room(ax)
    note = f"{n_rows:,} perturbations, {n_columns:,} of {effects.n_vars:,} genes"
    if min(width / n_columns, height / n_rows) >= 5:
        note += _mark_called(ax, table, called, least_effect)
    ax.set_title(note, fontsize=SMALL + 1, loc="left")
    name_ticks(ax.xaxis, table.genes)
    name_ticks(ax.yaxis, table.labels)
    return ax


def volcano(table: pd.DataFrame, *, n_labels: int = 10, ax: Axes | None = None) -> Axes:
    """Return axes with the effect on every gene against how sure its sign is.

    Parameters
    ----------
    table
        From :func:`~cradle_pyro.average_effect`: columns gene, mean, ci_low, ci_high (log2) and
        lfsr, one row for each gene.
    n_labels
        Genes to name and to draw 95 % intervals of: those of the surest sign, of these the
        strongest. Fewer, if there is no room or fewer have a rate of at most 0.1 (in colour).
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If the table is empty, lacks a column or names a gene twice.

    Notes
    -----
    A local false sign rate of zero (no draw of the other sign) is drawn at half the smallest rate
    that the number of draws can tell from zero.
    """
    check_table(table, ["gene", "mean", "ci_low", "ci_high", "lfsr"], "average_effect")
    check_unique(table["gene"], "gene", "Choose one group of cells.")
    ax = draw_on(ax, (6.0, 4.6))
    mean, lfsr = (table[name].to_numpy(dtype=float) for name in ("mean", "lfsr"))
    floor = _least_rate(table)
    height = -np.log10(np.maximum(lfsr, floor))
    is_sure = lfsr <= _SURE
    colours = np.where(is_sure, np.where(mean > 0, VERMILION, BLUE), GREY)
    ax.scatter(mean, height, s=12, c=colours, linewidths=0, alpha=0.7, rasterized=len(table) > 5000)
    first = np.lexsort((-np.abs(mean), lfsr))[: min(max(n_labels, 0), is_sure.sum())]
    named = table.iloc[first]
    ax.hlines(
        height[first], named["ci_low"], named["ci_high"], colors=colours[first].tolist(),
        linewidth=0.9, alpha=0.6,
    )  # fmt: skip
    ends = [*mean, *named["ci_low"], *named["ci_high"], 0.0]
    set_range(ax.set_xlim, min(ends), max(ends))
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.axhline(-np.log10(_SURE), color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    name_above(ax, mean[first], height[first], named["gene"].tolist(), float(height.max()))
    note = "; top row: no draw of the other sign" if (lfsr < floor).any() else ""
    ax.set_title(f"dotted: rate {_SURE:g}{note}", fontsize=SMALL + 1, loc="left")
    ax.set(xlabel="mean effect (log2), 95 % interval", ylabel="−log10 local false sign rate")
    return ax


def interaction_matrix(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Return axes with the strength of the interaction of every pair of perturbations.

    Parameters
    ----------
    table
        From :func:`~cradle_pyro.queries.effects.interactions`: columns first, second, strength
        (log2), n_called (genes) and out_of_support, one row for each pair.
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If the table is empty, lacks a column or holds a pair twice.

    Notes
    -----
    Only perturbations with a pair are shown, those of the strongest interactions first. Grey
    entries were not asked about. Where there is room, numbers are called genes, and an orange
    corner stands for a pair of which no training cells show the pair itself, or a member alone.
    """
    needed = ["first", "second", "strength", "n_called", "out_of_support"]
    check_table(table, needed, "interactions")
    names, places, matrix = _pair_matrix(table)
    side = min(2.4 + 0.28 * len(names), 9.0)
    ax = draw_on(ax, (side + 0.9, side))
    ax.set_facecolor(PALE)
    top = float(np.nanmax(matrix)) or 1.0
    image = ax.imshow(matrix, cmap=SEQUENTIAL, vmin=0, vmax=top, interpolation="nearest")
    colour_bar(ax, image, "interaction, RMS over genes (log2)")
    entry = min(room(ax)) / len(names)
    if entry < 4:  # a point is easier to see than an entry, the strongest ones on top
        rising = places[np.argsort(table["strength"].to_numpy(), kind="stable")]
        both = np.concatenate([rising, rising[:, ::-1]])
        ax.scatter(
            both[:, 1], both[:, 0], s=16, marker="s", linewidths=0, c=matrix[tuple(both.T)],
            cmap=SEQUENTIAL, vmin=0, vmax=top,
        )  # fmt: skip
    note = f"{len(table):,} pairs of {len(names):,} perturbations"
    if entry >= 14:
        note += "; numbers: called genes"
        for (row, column), n_called in zip(places, table["n_called"], strict=True):
            colour = "black" if matrix[row, column] > 0.55 * top else "white"
            for x, y in ((column, row), (row, column)):
                ax.text(x, y, f"{n_called:d}", color=colour, fontsize=7, ha="center", va="center")
    outside = places[table["out_of_support"].to_numpy(dtype=bool)]
    if entry >= 5 and len(outside):
        note += "\norange corner: pair, or a member alone, not trained"
        corners = np.concatenate([outside, outside[:, ::-1]]) - 0.36
        ax.scatter(corners[:, 1], corners[:, 0], s=10, marker="s", color=ORANGE, linewidths=0)
    ax.set_title(note, fontsize=SMALL + 1, loc="left")
    name_ticks(ax.xaxis, names)
    name_ticks(ax.yaxis, names)
    return ax


# ------------------------------------------------------------------------------------------ cells


def before_after(
    before: ArrayLike,
    after: ArrayLike,
    flags: ArrayLike,
    *,
    axes: Sequence[Axes] | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return two axes: the same cells before and after cleaning, by whether they fail QC.

    Parameters
    ----------
    before, after
        Coordinates of the cells in one embedding of both, such as a UMAP; shape (cells, 2). Both
        axes show the same range.
    flags
        True for cells that fail QC, shape (cells,).
    axes
        Two axes to draw on; a new figure's if omitted.

    Returns
    -------
    numpy.ndarray
        The two axes.

    Raises
    ------
    DataError
        If shapes differ or there are no cells.
    """
    points = [np.asarray(values, dtype=float) for values in (before, after)]
    failing = np.asarray(flags, dtype=bool)
    if len(failing) == 0 or any(part.shape != (len(failing), 2) for part in points):
        raise DataError(
            "Two embeddings of the same cells are needed, shape (cells, 2), and one flag for each "
            f"cell; found {points[0].shape}, {points[1].shape} and {failing.shape}."
        )
    drawn = draw_side_by_side(axes, 2, (8.4, 4.2))
    # Mixed, so that neither kind of cells hides the other; the same order every time.
    order = np.random.default_rng(0).permutation(len(failing))
    colours = np.where(failing, ORANGE, BLUE)
    size = float(np.clip(20_000 / len(failing), 1.5, 25))
    for ax, part, title in zip(drawn, points, ("before", "after"), strict=True):
        ax.scatter(
            part[order, 0], part[order, 1], s=size, c=colours[order], linewidths=0, alpha=0.6,
            rasterized=True,
        )  # fmt: skip
        set_range(ax.set_xlim, *range_of(*(p[:, 0] for p in points)))
        set_range(ax.set_ylim, *range_of(*(p[:, 1] for p in points)))
        ax.set_title(title)
        ax.set(xticks=[], yticks=[])
    counts = {f"passing ({(~failing).sum():,})": BLUE, f"failing ({failing.sum():,})": ORANGE}
    for label, colour in counts.items():
        drawn[0].scatter([], [], color=colour, label=label)
    drawn[0].legend(
        loc="upper left", bbox_to_anchor=(0.0, 0.0), ncols=2, fontsize=SMALL, frameon=False
    )
    return drawn


def counterfactual_cell(
    worlds: Mapping[str, pd.Series],
    *,
    n_genes: int = 20,
    axes: Sequence[Axes] | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return two axes about one cell: the genes that differ most between worlds, and how much.

    Parameters
    ----------
    worlds
        Name to expression of the cell by gene, log2(1 + 1e4 fraction); the first world, usually
        the observed one, is what others are compared with. For example ``{"observed": ...,
        "artifact = 0": ..., "KLF1": ...}``.
    n_genes
        Genes to show.
    axes
        Two axes to draw on; a new figure's if omitted.

    Returns
    -------
    numpy.ndarray
        The axes: expression by gene and world, genes of the largest difference first; mean
        absolute difference from the first world over all genes, with the number of genes that
        differ by more than 1.

    Raises
    ------
    DataError
        If there are fewer than two worlds, or they hold different genes.
    """
    table = _world_table(worlds)
    spread = table.max(axis=1) - table.min(axis=1)
    top = table.loc[spread.sort_values(ascending=False, kind="stable").index[: max(n_genes, 1)]]
    height = min(1.6 + ROW * max(len(top), 2 * len(worlds)), TALLEST)
    drawn = draw_side_by_side(axes, 2, (9.0, height), width_ratios=[1.6, 1.0])
    rows = np.arange(len(top))
    drawn[0].hlines(rows, top.min(axis=1), top.max(axis=1), color=PALE, linewidth=2, zorder=1)
    looks = list(zip(table.columns, cycle(CATEGORIES), cycle(MARKERS), strict=False))
    for name, colour, marker in looks:
        drawn[0].scatter(top[name], rows, s=26, color=colour, marker=marker, label=str(name))
    name_ticks(drawn[0].yaxis, [str(gene) for gene in top.index])
    drawn[0].invert_yaxis()
    drawn[0].set(xlabel="expression, log2(1 + 1e4 fraction)")
    drawn[0].set(ylabel=f"{len(top)} genes that differ most")
    drawn[0].legend(ncols=3, **ABOVE)
    _draw_differences(drawn[1], table, [colour for _, colour, _ in looks[1:]])
    return drawn


def confounding(report: pd.DataFrame, *, ax: Axes | None = None, n_most: int = 30) -> Axes:
    """Return axes with the share of failing cells of each perturbation, against control's.

    Parameters
    ----------
    report
        From :func:`~cradle_pyro.confounding_report`: control first, columns failing_share,
        share_low, share_high, difference and differs.
    ax
        Axes to draw on; a new figure's if omitted.
    n_most
        Of more perturbations than this, only so many are shown, those that deviate most.

    Raises
    ------
    DataError
        If the report is empty or lacks a column.
    """
    needed = ["failing_share", "share_low", "share_high", "difference", "differs"]
    check_table(report, needed, "confounding_report")
    control, others = report.iloc[0], report.iloc[1:]
    farthest = others["difference"].abs().sort_values(ascending=False, kind="stable").index
    shown_rows = others.loc[farthest[: max(n_most, 1)]].sort_values("failing_share")
    rows = pd.concat([report.iloc[:1], shown_rows])
    ax = draw_on(ax, (6.0, 1.4 + ROW * len(rows)))
    colours = [BLACK, *np.where(shown_rows["differs"].astype(bool), VERMILION, BLUE)]
    place = np.arange(len(rows))
    share, low, high = (100 * rows[key] for key in ("failing_share", "share_low", "share_high"))
    ax.axvspan(low.iloc[0], high.iloc[0], color=PALE, linewidth=0, zorder=0)
    ax.axvline(100 * control["failing_share"], color=GREY, linewidth=0.8, zorder=1)
    ax.hlines(place, low, high, colors=colours, linewidth=1.2)
    ax.scatter(share, place, s=22, c=colours, zorder=3)
    name_ticks(ax.yaxis, [str(name) for name in rows.index])
    ax.set(xlabel="cells that fail QC (%), 95 % interval", ylim=(-0.7, len(rows) - 0.3))
    n_all, n_differing = len(others), int(others["differs"].sum())
    few = f"{len(shown_rows)} of {n_all:,} perturbations, those that deviate most"
    note = few if len(shown_rows) < n_all else f"{n_all} perturbations"
    found = f"{n_differing:,} differ from {report.index[0]} (vermilion)"
    ax.set_title(f"{note}\n{found}", fontsize=SMALL + 1, loc="left")
    return ax


# ------------------------------------------------------------------------------------ calibration


def rank_histogram(
    ranks: ArrayLike, n_draws: int, *, ax: Axes | None = None, bins: int = 20
) -> Axes:
    """Return axes with a histogram of the ranks of true values among posterior draws.

    Parameters
    ----------
    ranks
        Number of draws below each truth, integers from 0 to `n_draws`; any shape.
    n_draws
        Posterior draws behind each rank.
    ax
        Axes to draw on; a new figure's if omitted.
    bins
        At most so many bins; fewer, if that makes them equally wide.

    Raises
    ------
    DataError
        If there are no ranks, or one is outside [0, n_draws].

    Notes
    -----
    The band holds the count of a bin with 99 % probability, if the posterior is calibrated and
    ranks are independent (binomial). A cup means intervals too narrow, a hill too wide, a slope
    bias.

    References
    ----------
    Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration",
    2018.
    """
    values = _checked_ranks(ranks, n_draws)
    edges = _rank_edges(n_draws + 1, bins)
    ax = draw_on(ax, (5.2, 3.4))
    shares = np.diff(edges) / (n_draws + 1)
    _banded_histogram(ax, values, edges - 0.5, shares)
    ax.set(xlabel=f"rank of the truth among {n_draws:,} draws")
    return ax


def rank_ecdf(
    ranks: ArrayLike,
    n_draws: int,
    band: tuple[ArrayLike, ArrayLike, ArrayLike],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Return axes with the ECDF of ranks minus that of uniform ones, and a band around zero.

    Parameters
    ----------
    ranks
        Number of draws below each truth, integers from 0 to `n_draws`; any shape.
    n_draws
        Posterior draws behind each rank.
    band
        From :func:`~cradle_pyro.evaluation.calibration.ecdf_band`: points in [0, 1], and there
        lower and upper end of a simultaneous band of the difference.
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If there are no ranks, one is outside [0, n_draws], or the band's parts differ in length.

    Notes
    -----
    The difference is that of :func:`~cradle_pyro.evaluation.calibration.ecdf_difference`.

    References
    ----------
    Säilynoja, Bürkner and Vehtari, "Graphical test for discrete uniformity and its applications
    in goodness-of-fit evaluation and multiple sample comparison", 2022.
    """
    values = _checked_ranks(ranks, n_draws)
    grid, low, high = (np.asarray(part, dtype=float) for part in band)
    if not (grid.ndim == 1 and len(grid) and grid.shape == low.shape == high.shape):
        raise DataError(
            f"A band needs a grid and two ends of the same length, found shapes {grid.shape}, "
            f"{low.shape} and {high.shape}."
        )
    ax = draw_on(ax, (5.2, 3.4))
    levels, difference = ecdf_difference(values, n_draws)
    ax.fill_between(grid, low, high, color=PALE, linewidth=0, label="expected if calibrated")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.plot(levels, difference, color=BLUE, label=f"{len(values):,} ranks")
    set_range(ax.set_ylim, *range_of(difference, low, high))
    ax.set(xlabel="fractional rank", ylabel="ECDF − uniform", xlim=(0, 1))
    ax.legend(ncols=2, **ABOVE)
    return ax


def pit_histogram(values: ArrayLike, *, ax: Axes | None = None, bins: int = 20) -> Axes:
    """Return axes with a histogram of probability integral transforms, uniform if calibrated.

    Parameters
    ----------
    values
        Randomised PIT of observed values, in [0, 1]; any shape.
    ax
        Axes to draw on; a new figure's if omitted.
    bins
        Bins of equal width.

    Raises
    ------
    DataError
        If there are no values, or one is outside [0, 1].

    Notes
    -----
    The band is that of :func:`rank_histogram`.

    References
    ----------
    Czado, Gneiting and Held, "Predictive model assessment for count data", 2009.
    """
    flat = np.asarray(values, dtype=float).ravel()
    if not len(flat) or not ((flat >= 0) & (flat <= 1)).all():
        raise DataError(f"PIT values must be numbers in [0, 1], at least one; {_found(flat)}.")
    ax = draw_on(ax, (5.2, 3.4))
    _banded_histogram(ax, flat, np.linspace(0, 1, bins + 1), np.full(bins, 1 / bins))
    ax.set(xlabel="probability integral transform")
    return ax


def coverage(curve: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Return axes with how often intervals hold the truth, against how often they should.

    Parameters
    ----------
    curve
        Columns level (nominal), coverage (shares in [0, 1]) and n (intervals).
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.

    Notes
    -----
    The band holds the coverage with 99 % probability, if intervals are calibrated and independent
    (binomial).
    """
    check_table(curve, ["level", "coverage", "n"], "a coverage curve")
    from scipy.stats import binom

    ax = draw_on(ax, (4.2, 4.0))
    curve = curve.sort_values("level")
    level, found, n = (curve[key].to_numpy(dtype=float) for key in ("level", "coverage", "n"))
    ends = [binom.ppf(tail, n, level) / np.maximum(n, 1) for tail in _tails()]
    ax.fill_between(level, *ends, color=PALE, linewidth=0, label="expected if calibrated")
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    ax.plot(level, found, color=BLUE, marker="o", markersize=4, label="intervals")
    ax.set(xlabel="level", ylabel="coverage", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.legend(fontsize=SMALL, frameon=False, loc="upper left")
    return ax


# ------------------------------------------------------------------------------------- predictive


def predictive_genes(table: pd.DataFrame, statistic: str, *, ax: Axes | None = None) -> Axes:
    """Return axes with a statistic of every gene, observed against replicated.

    Parameters
    ----------
    table
        Columns statistic, gene, observed, and low, median, high of replicated cells.
    statistic
        Which of the table's statistics; "mean" and "variance" are drawn on logarithmic axes.
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If the table is empty, lacks a column, or does not hold the statistic.
    """
    rows = _statistic(table, statistic)
    ax = draw_on(ax, (4.6, 4.4))
    observed, low, median, high = (
        rows[key].to_numpy(dtype=float) for key in ("observed", "low", "median", "high")
    )
    inside = (low <= observed) & (observed <= high)
    colours = np.where(inside, BLUE, VERMILION)
    ax.vlines(observed, low, high, colors=GREY, linewidth=0.6, alpha=0.5)
    ax.scatter(observed, median, s=8, c=colours, linewidths=0, alpha=0.8)
    start, end = range_of(observed, low, high)
    ax.axline((start, start), slope=None, xy2=(end or 1.0, end or 1.0), color=BLACK, linewidth=0.7)
    if statistic in ("mean", "variance"):
        together = np.concatenate([observed, low, median, high])
        log_axes(ax, together, together)
    ax.set(xlabel=f"observed {statistic}", ylabel=f"replicated {statistic} (median, interval)")
    outside = f"{(~inside).sum():,} of {len(rows):,} genes outside (vermilion)"
    ax.set_title(outside, fontsize=SMALL + 1, loc="left")
    return ax


def mean_variance(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Return axes with the variance of each gene's counts against their mean, in both worlds.

    Parameters
    ----------
    table
        As for :func:`predictive_genes`, with statistics "mean" and "variance".
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If the table is empty, lacks a column, or does not hold both statistics.
    """
    mean, variance = (_statistic(table, name).set_index("gene") for name in ("mean", "variance"))
    genes = mean.index.intersection(variance.index)
    mean, variance = mean.loc[genes], variance.loc[genes]
    ax = draw_on(ax, (4.8, 4.2))
    columns = ["observed", "median"]
    x, y = (part[columns].to_numpy(dtype=float) for part in (mean, variance))
    for column, (name, colour) in enumerate((("observed", BLACK), ("replicated", ORANGE))):
        ax.scatter(
            x[:, column], y[:, column], s=9, color=colour, linewidths=0, alpha=0.6, label=name
        )
    log_axes(ax, x.ravel(), y.ravel())
    ends = np.array(range_of(x))
    ax.plot(ends, ends, color=BLUE, linewidth=0.8, linestyle="--", label="Poisson")
    ax.set(xlabel="mean", ylabel="variance")
    ax.legend(fontsize=SMALL, frameon=False, loc="upper left")
    return ax


def predictive_metric(
    observed: ArrayLike,
    replicated: ArrayLike,
    *,
    name: str,
    ax: Axes | None = None,
    bins: int = 30,
) -> Axes:
    """Return axes with the distribution of a metric over cells, observed and replicated.

    Parameters
    ----------
    observed
        The metric of observed cells, shape (cells,).
    replicated
        That of replicated cells, shape (draws, cells).
    name
        What it is, for the axis.
    ax
        Axes to draw on; a new figure's if omitted.
    bins
        Bins of equal width.

    Raises
    ------
    DataError
        If there are no cells, shapes do not fit, or a value is not finite.

    Notes
    -----
    The band holds 95 % of the draws' densities in each bin.
    """
    seen = np.asarray(observed, dtype=float)
    drawn = np.asarray(replicated, dtype=float)
    if seen.ndim != 1 or drawn.ndim != 2 or not (seen.size and drawn.size):
        raise DataError(
            f"'{name}' needs observed cells, shape (cells,), and replicated ones, shape (draws, "
            f"cells); found {seen.shape} and {drawn.shape}."
        )
    if not (np.isfinite(seen).all() and np.isfinite(drawn).all()):
        raise DataError(f"'{name}' has values that are not finite; leave these cells out.")
    ax = draw_on(ax, (5.2, 3.4))
    edges = np.histogram_bin_edges(np.concatenate([seen, drawn.ravel()]), bins=bins)
    densities = np.stack([np.histogram(draw, edges, density=True)[0] for draw in drawn])
    low, middle, high = np.quantile(densities, [0.025, 0.5, 0.975], axis=0)
    ax.stairs(high, edges, baseline=low, fill=True, color=ORANGE, alpha=0.4, label="replicated")
    ax.stairs(middle, edges, color=ORANGE, linewidth=1)
    ax.stairs(
        np.histogram(seen, edges, density=True)[0], edges, color=BLACK, linewidth=1.2,
        label="observed",
    )  # fmt: skip
    ax.set(xlabel=name, ylabel="density of cells")
    ax.set_ylim(bottom=0)
    ax.legend(ncols=2, **ABOVE)
    return ax


# ------------------------------------------------------------------------------------- the model


def latent_units(units: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Return axes with how much each latent unit says of a cell, the most first.

    Parameters
    ----------
    units
        Columns latent, kl (nats per cell) and active.
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    check_table(units, ["latent", "kl", "active"], "latent units")
    units = units.sort_values("kl", ascending=False, kind="stable")
    active = units["active"].to_numpy(dtype=bool)
    ax = draw_on(ax, (float(np.clip(1.6 + 0.18 * len(units), 4.0, 12.0)), 3.2))
    ax.bar(np.arange(len(units)), units["kl"], color=np.where(active, BLUE, GREY).tolist())
    name_ticks(ax.xaxis, [str(name) for name in units["latent"]])
    ax.set(xlabel="latent unit", ylabel="KL (nats per cell)", xlim=(-0.8, len(units) - 0.2))
    ax.set_title(
        f"{active.sum()} of {len(units)} units active (blue)", fontsize=SMALL + 1, loc="left"
    )
    return ax


def leakage(table: pd.DataFrame, *, ax: Axes | None = None, n_most: int = 30) -> Axes:
    """Return axes with how well a latent gives away what it should not know.

    Parameters
    ----------
    table
        Columns target, source (what is read), method, auroc and se (standard error).
    ax
        Axes to draw on; a new figure's if omitted.
    n_most
        Of more targets than this, only so many are shown, those of the highest AUROC.

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    check_table(table, ["target", "source", "method", "auroc", "se"], "leakage")
    table = table.astype({"target": str, "source": str, "method": str})
    targets = table["target"].unique().tolist()
    n_targets = len(targets)
    if n_targets > n_most:
        targets = table.groupby("target")["auroc"].max().nlargest(max(n_most, 1)).index.tolist()
        table = table[table["target"].isin(targets)]
    place = dodged(table["target"], targets)
    sources, methods = table["source"].unique(), table["method"].unique()
    colours = table["source"].map(dict(zip(sources, cycle(CATEGORIES), strict=False)))
    ax = draw_on(ax, (6.2, min(1.6 + ROW * max(len(table), len(targets)), TALLEST)))
    low, high = (table["auroc"] + sign * 1.96 * table["se"].fillna(0) for sign in (-1, 1))
    ax.hlines(place, low, high, colors=colours.tolist(), linewidth=1.2)
    for method, marker in zip(methods, cycle(MARKERS), strict=False):
        rows = (table["method"] == method).to_numpy()
        ax.scatter(
            table["auroc"][rows], place[rows], s=24, marker=marker, zorder=3,
            c=colours[rows].tolist(),
        )  # fmt: skip
        ax.scatter([], [], s=24, color=GREY, marker=marker, label=method)
    for source in sources:
        colour = colours[table["source"] == source].iloc[0]
        ax.plot([], [], color=colour, label=source)
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    name_ticks(ax.yaxis, targets)
    ax.set(xlabel="AUROC ± 1.96 standard errors (0.5: nothing leaks)")
    ax.set_ylim(len(targets) - 0.4, -0.6)
    if len(targets) < n_targets:
        note = f"{len(targets)} of {n_targets:,} targets, those that leak most"
        ax.set_title(note, fontsize=SMALL + 1, loc="left")
    ax.legend(**BESIDE)
    return ax


def scores(table: pd.DataFrame, metric: str, *, ax: Axes | None = None) -> Axes:
    """Return axes with a metric of all predictors, beside the ceiling, best on top.

    Parameters
    ----------
    table
        ``Evaluation.scores``: columns reference, labels, predictor, metric and value. Several rows
        of the same (seeds) are drawn as several points.
    metric
        For example "ate_rho".
    ax
        Axes to draw on; a new figure's if omitted.

    Raises
    ------
    DataError
        If the table is empty, lacks a column, or does not hold the metric.
    """
    check_table(table, ["reference", "labels", "predictor", "metric", "value"], "scores")
    rows = rows_of(table, "metric", metric).dropna(subset="value")
    if rows.empty:
        raise DataError(f"All values of '{metric}' are missing.")
    order = rows.groupby("predictor", sort=False)["value"].mean().sort_values(kind="stable")
    names = [name for name in order.index if name != CEILING]
    names += [CEILING] * (CEILING in order.index)
    place = {name: number for number, name in enumerate(names)}
    ax = draw_on(ax, (7.2, min(1.6 + 0.28 * len(names), TALLEST)))
    ax.hlines(range(len(names)), *range_of(rows["value"], 0.0), color=PALE, linewidth=0.8, zorder=0)
    blocks = rows.groupby(["reference", "labels"], sort=False)
    looks = zip(blocks, cycle(CATEGORIES), cycle(MARKERS), strict=False)
    for ((reference, labels), block), colour, marker in looks:
        name = f"{reference}, {str(labels).replace('_', ' ')}"
        ax.scatter(
            block["value"], block["predictor"].map(place), s=30, color=colour, marker=marker,
            alpha=0.85, label=name,
        )  # fmt: skip
    name_ticks(ax.yaxis, [str(name).replace("_", " ") for name in names])
    for label, name in zip(ax.get_yticklabels(), names, strict=False):
        label.set_fontweight("bold" if name == MODEL else "normal")
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.set(xlabel=metric, ylim=(-0.7, len(names) - 0.3))
    ax.legend(**BESIDE)
    return ax


# ---------------------------------------------------------------------------------------- helpers


class _EffectTable(NamedTuple):
    """What a heat map shows, rows and columns in order; arrays (perturbations, genes)."""

    labels: list[str]
    genes: list[str]
    mean: NDArray[Any]
    is_called: NDArray[np.bool_]
    is_included: NDArray[np.bool_]


def _terms(history: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Return the terms of the loss without their prefix, and what they were measured on."""
    for prefix, split in (("val_", "validation"), ("train_", "training")):
        columns = [c for c in map(str, history.columns) if c.startswith(prefix)]
        terms = history[[c for c in columns if c != f"{prefix}loss"]].dropna(axis=1, how="all")
        if terms.shape[1]:
            return split, terms.set_axis(terms.columns.str.removeprefix(prefix), axis=1)
    raise DataError(
        "The training history has no terms: expected columns such as 'train_counts' or "
        f"'val_counts', found {shown(history.columns, 10)}."
    )


def _effect_table(
    effects: AnnData,
    labels: Sequence[str] | None,
    n_genes: int,
    called: float,
    least_effect: float,
) -> _EffectTable:
    if "s_value" not in effects.layers:
        raise DataError(
            f"A heat map of effects needs the layer 's_value', found "
            f"{shown(effects.layers, 10) or 'none'}. Give the AnnData of cradle_pyro.effects."
        )
    known = [str(name) for name in effects.obs_names]
    chosen = known if labels is None else [str(label) for label in labels]
    unknown = [label for label in chosen if label not in set(known)]
    if unknown:
        hint = near(unknown[0], known)
        raise DataError(f"No effects of {shown(unknown)}{hint}; found {shown(known, 8)}.")
    if not chosen or not effects.n_vars or n_genes < 1:
        raise DataError(
            f"A heat map needs perturbations and genes; found {len(chosen)} and "
            f"{min(effects.n_vars, n_genes)}."
        )
    table = effects[chosen]
    mean, s_value = (np.asarray(part) for part in (table.X, table.layers["s_value"]))
    is_called = (s_value <= called + _ROUNDING) & (np.abs(mean) >= least_effect)
    strength = np.where(is_called, np.abs(mean), 0).sum(0)
    genes = np.lexsort((-np.abs(mean).max(0), -strength, -is_called.sum(0)))[:n_genes]
    genes = genes[_cluster(mean[:, genes].T)]
    rows = _cluster(mean[:, genes]) if labels is None else np.arange(len(chosen))
    inclusion = table.layers["inclusion"] if "inclusion" in table.layers else np.ones(mean.shape)
    both = np.ix_(rows, genes)
    return _EffectTable(
        labels=[chosen[row] for row in rows],
        genes=[str(name) for name in effects.var_names[genes]],
        mean=mean[both],
        is_called=is_called[both],
        is_included=np.asarray(inclusion)[both] >= 0.5,
    )


def _cluster(values: NDArray[Any]) -> NDArray[np.intp]:
    """Return an order of rows in which similar ones stand together."""
    if len(values) < 3:
        return np.arange(len(values))
    from scipy.cluster.hierarchy import leaves_list, linkage

    tree = linkage(values, "average", optimal_ordering=len(values) <= 200)
    return np.asarray(leaves_list(tree), dtype=np.intp)


def _robust_bound(values: NDArray[Any]) -> float:
    """Return a symmetric end of the colours that single large entries do not stretch."""
    size = np.abs(values)
    return float(np.quantile(size, 0.99) or size.max() or 1.0)


def _mark_called(ax: Axes, table: _EffectTable, called: float, least_effect: float) -> str:
    """Mark called entries and return what the marks mean."""
    full = table.is_called & table.is_included
    open_ = table.is_called & ~table.is_included
    look: dict[str, Any] = {"s": 9, "linewidths": 0.6}
    rows, columns = np.nonzero(full)
    ax.scatter(columns, rows, facecolors=BLACK, edgecolors="white", **look)
    note = f"\ndot: sign called at {called:.0%}, size at least {least_effect:g}"
    if open_.any():
        rows, columns = np.nonzero(open_)
        ax.scatter(columns, rows, facecolors="white", edgecolors=BLACK, **look)
        note += "; open: inclusion below 0.5"
    return note


def _least_rate(table: pd.DataFrame) -> float:
    """Return what a false sign rate of zero is drawn as."""
    lfsr = table["lfsr"].to_numpy(dtype=float)
    draws = table.attrs.get("cradle_query", {}).get("draws")
    known = [*lfsr[lfsr > 0].tolist(), *([1 / draws] if draws else [])]
    return min(known, default=0.01) / 2


def _pair_matrix(table: pd.DataFrame) -> tuple[list[str], NDArray[np.intp], NDArray[Any]]:
    """Return members, row and column of each pair among them, and the matrix of strengths."""
    pairs = table[["first", "second"]].astype(str)
    check_unique(pairs.apply(lambda row: " and ".join(sorted(row)), axis=1), "pair")
    strength = table["strength"].to_numpy(dtype=float)
    members = pairs.to_numpy().T.ravel()
    total = pd.Series(np.tile(strength, 2)).groupby(members).sum()
    names = total.sort_values(ascending=False, kind="stable").index.tolist()
    places = np.stack([pd.Index(names).get_indexer(pairs[key]) for key in pairs], axis=1)
    matrix = np.full((len(names), len(names)), np.nan)
    for rows, columns in (places.T, places.T[::-1]):
        matrix[rows, columns] = strength
    return names, places, matrix


def _world_table(worlds: Mapping[str, pd.Series]) -> pd.DataFrame:
    """Return expression of a cell, genes x worlds."""
    if len(worlds) < 2:
        raise DataError(f"Two worlds are needed to compare, found {shown(worlds) or 'none'}.")
    first, *others = worlds.items()
    for name, values in others:
        differing = first[1].index.symmetric_difference(values.index)
        if len(differing) or len(values) != len(first[1]):
            raise DataError(
                f"Worlds need the same genes; '{first[0]}' and '{name}' differ in "
                f"{shown(differing) or 'how often they name a gene'}."
            )
    if first[1].empty:
        raise DataError("The worlds hold no genes: there is nothing to draw.")
    return pd.DataFrame({name: values.reindex(first[1].index) for name, values in worlds.items()})


def _draw_differences(ax: Axes, table: pd.DataFrame, colours: Sequence[str]) -> None:
    """Draw the mean absolute difference of every world from the first."""
    first = table.columns[0]
    change = table.iloc[:, 1:].sub(table[first], axis=0).abs()
    size, n_large = change.mean(), (change > 1).sum()
    place = np.arange(change.shape[1])
    ax.barh(place, size, color=colours, height=0.6)
    for row, (value, count) in enumerate(zip(size, n_large, strict=True)):
        ax.annotate(
            f"{value:.3g}\n{count:,} genes > 1", (value, row), (4, 0), textcoords="offset points",
            va="center", fontsize=SMALL,
        )  # fmt: skip
    name_ticks(ax.yaxis, [str(name) for name in change.columns])
    ax.invert_yaxis()
    ax.set(xlabel=f"mean |difference| from {first} (log2)", xlim=(0, 1.5 * size.max() or 1.0))


def _checked_ranks(ranks: ArrayLike, n_draws: int) -> NDArray[np.int64]:
    values = np.asarray(ranks).ravel()
    whole = values.astype(np.int64) if np.isfinite(values).all() else np.full(len(values), -1)
    if not len(values) or (whole != values).any() or whole.min() < 0 or whole.max() > n_draws:
        raise DataError(
            f"Ranks must be whole numbers from 0 to n_draws = {n_draws}, at least one; "
            f"{_found(values)}."
        )
    return whole


def _rank_edges(n_ranks: int, bins: int) -> NDArray[np.int64]:
    """Return edges of bins of whole ranks, equally wide if a number of bins not much lower fits."""
    most = max(min(bins, n_ranks), 1)
    fitting = [n for n in range(most, most // 2, -1) if n_ranks % n == 0]
    n_bins = fitting[0] if fitting else most
    return np.linspace(0, n_ranks, n_bins + 1).round().astype(np.int64)


def _found(values: NDArray[Any]) -> str:
    return f"found {values.min():g} to {values.max():g}" if len(values) else "found none"


def _tails() -> tuple[float, float]:
    return (1 - _BAND) / 2, (1 + _BAND) / 2


def _banded_histogram(
    ax: Axes, values: NDArray[Any], edges: NDArray[Any], shares: NDArray[Any]
) -> None:
    """Draw counts of bins and the band that holds them if they are drawn with these shares."""
    from scipy.stats import binom

    low, high = (binom.ppf(tail, len(values), shares) for tail in _tails())
    counts = np.histogram(values, edges)[0]
    outside = (counts < low) | (counts > high)
    colours = np.where(outside, VERMILION, SKY).tolist()
    ax.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, edgecolor="white")
    ax.stairs(
        high, edges, baseline=low, fill=True, color=BLACK, alpha=0.2, label="expected if calibrated"
    )
    ax.stairs(len(values) * shares, edges, baseline=None, color=BLACK, linewidth=0.8)
    ax.set(ylabel="count", xlim=(edges[0], edges[-1]))
    ax.legend(**ABOVE)
    ax.set_title(f"{outside.sum()} of {len(counts)} outside", fontsize=SMALL + 1, loc="right")


def _statistic(table: pd.DataFrame, name: str) -> pd.DataFrame:
    columns = ["statistic", "gene", "observed", "low", "median", "high"]
    check_table(table, columns, "predictive checks")
    return rows_of(table, "statistic", name)
