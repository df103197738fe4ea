"""The page of `cradle-pyro benchmark speed`: tables and scaling plots of what was measured."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cradle_pyro.data.fields import write_text_atomic
from cradle_pyro.evaluation.timings import NAIVE
from cradle_pyro.reporting.blocks import (
    Block,
    Figures,
    Findings,
    Section,
    Table,
    Text,
    as_markdown,
    render_page,
)
from cradle_pyro.reporting.figures import FIGURE_SIZE, PageFigure, page_figure
from cradle_pyro.reporting.layout import BLUE, GREY, draw_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_roofline", "plot_scaling", "render_speed", "write_speed_report"]

_METHOD = (
    "Every case has a process of its own. Seconds of wall time, medians of several rounds; peak "
    "memory is that of the process, with and without what the imports take."
)
_PUBLISHED = (
    "One optimiser step of the published size: 512 cells, 5,000 genes, 105 perturbations, 200 "
    "latents, 5 particles. naive: the published step written from its description, both branches "
    "decoded and sampled. The others are this package's step of the published settings, with the "
    "partner term (at once, and in two parts whose gradients add up: train.accumulate), without a "
    "counterfactual term, and with generated cells in its place. Times are of steps that take "
    "turns in one process, ratios are medians over the rounds; memory is that of a process of each."
)
_DEFAULT = (
    "One step of the default settings with 128 cells; default / no term is what generation costs."
)
_TIME_TO_LOSS = (
    "Seconds of training on the demo screen until the best validation loss of the naive run (the "
    "published sizes and learning rate, at most 100 epochs), and until this package's default "
    "settings come to that loss: -ELBO of the counts, nats per cell. The naive time is that of its "
    "steps; ours has validation, without which nothing is known before the end of the first epoch, "
    "and the regression that effects start from."
)
_SCREEN = (
    "A simulated sparse screen is annotated, trained for one epoch and asked about (10,000 cells "
    "without their artifact, 5 draws, written to a file)."
)
_ANNOTATION = (
    "QC flags and partners of all cells, beside the published way of finding partners (gene-wise "
    "medians of up to 50 failing cells, made dense, cell by cell), timed on some cells."
)
_ROOFLINE = (
    "Line: the lesser of copies of memory and of one large product. A step may lie above what "
    "memory allows, as caches serve much of what it reads."
)
_EFFECTS = (
    "Average effects of all perturbations of a simulated screen (50,000 cells, 5,000 genes) on all "
    "genes, with 10 draws of 100 cells each (by default 100 draws), after one epoch of training."
)
_EVALUATION = (
    "Scores of the model and of the default baselines on the test cells of the smallest of these "
    "screens, in memory, after one epoch of training; density and QC of generated cells included."
)


def write_speed_report(figures: pd.DataFrame, out: str | Path) -> Path:
    """Write ``speed.html`` and ``speed.md`` to the directory `out`; return the page's path.

    Parameters
    ----------
    figures
        Columns part, case, figure and value, from :func:`~cradle_pyro.evaluation.speed.run_speed`.
    out
        The directory.

    Raises
    ------
    DataError
        If they cannot be written.
    """
    page = Path(out) / "speed.html"
    sections = list(_sections(figures))
    write_text_atomic(page, render_speed(figures, sections))
    lines = ["# Speed", "", _METHOD, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += as_markdown(block)
    write_text_atomic(Path(out) / "speed.md", "\n".join(lines).rstrip() + "\n")
    return page


def render_speed(figures: pd.DataFrame, sections: Sequence[Section] | None = None) -> str:
    """Return the page as HTML; nothing is loaded from elsewhere."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("cradle-pyro", "torch"))
    return render_page(
        title="Speed",
        lead=_METHOD,
        sections=list(_sections(figures)) if sections is None else sections,
        footer=f"Measured with {versions}, Python {platform.python_version()}.",
    )


def plot_scaling(
    sizes: pd.Series, values: pd.Series, x: str, y: str, *, ax: Axes | None = None
) -> Axes:
    """Draw a figure against a size, both logarithmic.

    Parameters
    ----------
    sizes, values
        One point each.
    x, y
        Names of the axes.
    ax
        Where to draw; a new figure if omitted.
    """
    ax = draw_on(ax, FIGURE_SIZE)
    ax.plot(sizes.to_numpy(), values.to_numpy(), "o-", color=BLUE)
    ax.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    ax.set_ylim(min(values.min() / 2, values.max() / 10), 2 * values.max())
    _plain_ticks(ax)
    return ax


def plot_roofline(found: Mapping[str, float], *, ax: Axes | None = None) -> Axes:
    """Draw the rate of a step under the ceilings of memory and of arithmetic, both logarithmic.

    Parameters
    ----------
    found
        Figures of :func:`~cradle_pyro.evaluation.timings.roofline`.
    ax
        Where to draw; a new figure if omitted.
    """
    ax = draw_on(ax, FIGURE_SIZE)
    products, most = found["products of a step, GFLOP"], found["machine, GFLOP/s"]
    intensity = products / found["read and written by a step, GB"]
    ridge = most / found["machine, GB/s"]
    ends = [min(intensity, ridge) / 10, max(intensity, ridge) * 10]
    ax.plot([ends[0], ridge, ends[1]], [most * ends[0] / ridge, most, most], "-", color=GREY)
    ax.plot([intensity], [products / found["step, s"]], "o", color=BLUE)
    ax.annotate(
        "a step", (intensity, products / found["step, s"]), (8, -12), textcoords="offset points"
    )
    ax.set(
        xscale="log", yscale="log", xlabel="FLOP of products for a byte read or written",
        ylabel="GFLOP/s", ylim=(most * ends[0] / ridge, 2 * most),
    )  # fmt: skip
    _plain_ticks(ax)
    return ax


def _plain_ticks(ax: Axes) -> None:
    """Write 0.5 and 200 rather than powers of ten, at the places that logarithmic axes choose."""
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.set_minor_formatter(lambda *_: "")


def _sections(figures: pd.DataFrame) -> Iterator[Section]:
    parts = {str(part): _wide(rows) for part, rows in figures.groupby("part", sort=False)}
    if "published step" in parts and "published memory" in parts:
        table = _published(parts["published step"].iloc[0], parts["published memory"])
        yield Section("published", "The published step", [Text(_PUBLISHED), table])
    if "default step" in parts:
        steps = parts["default step"]
        plots = [
            _scaling(steps, what, "default, s", "seconds a step")
            for what in ("genes", "perturbations")
        ]
        blocks: list[Block] = [Text(_DEFAULT), Figures(plots), _table("Steps", steps)]
        yield Section("default", "The default step", blocks)
    if "time to loss" in parts:
        table = _table("Time to a loss", parts["time to loss"])
        yield Section("loss", "Time to the same loss", [Text(_TIME_TO_LOSS), table])
    if "screen" in parts:
        yield Section("screens", "Larger screens", list(_screens(parts["screen"])))
    if "annotation" in parts:
        table = _table("Annotation", parts["annotation"])
        yield Section("annotation", "QC and partners", [Text(_ANNOTATION), table])
    if "evaluation" in parts:
        table = _table("Evaluation", parts["evaluation"])
        yield Section("evaluation", "Evaluation", [Text(_EVALUATION), table])
    if "effects" in parts:
        table = _table("Effects", parts["effects"])
        yield Section("effects", "Effects of many perturbations", [Text(_EFFECTS), table])
    if "roofline" in parts:
        yield Section("roofline", "Roofline", list(_roofline(parts["roofline"])))


def _wide(rows: pd.DataFrame) -> pd.DataFrame:
    """Return cases x figures, in the order in which they were measured."""
    table = rows.pivot_table(index="case", columns="figure", values="value", sort=False)
    return table.loc[rows["case"].unique(), rows["figure"].unique()]


def _published(side_by_side: pd.Series, memory: pd.DataFrame) -> Table:
    above = "above the imports, GB"
    if (of_gpu := "GPU memory, GB") in memory:
        above = of_gpu
    rows = [
        [
            str(name),
            _number(side_by_side[f"{name}, s"]),
            _number(side_by_side.get(f"{NAIVE} / {name}", 1.0)),
            _number(of_step["peak memory, GB"]),
            _number(of_step[above]),
            _number(of_step[above] / memory.loc[NAIVE, above]) if memory.loc[NAIVE, above] else "",
        ]
        for name, of_step in memory.iterrows()
    ]
    head = ["step", "seconds", "naive / this", "peak memory, GB", above, "of naive"]
    return Table("Step of the published size", head, rows)


def _screens(screens: pd.DataFrame) -> Iterator[Block]:
    on_disk = screens[screens.index.str.endswith("on disk")]
    plots = []
    for figure, axis in (("epoch, ms per cell", "ms a cell"), ("peak memory, GB", "GB")):
        draw = partial(plot_scaling, on_disk["cells"], on_disk[figure], "cells on disk", axis)
        plots.append(page_figure(figure, draw, "Counts are left on disk."))
    yield Text(_SCREEN)
    yield Figures(plots)
    yield _table("Screens", screens.drop(columns="cells"))


def _scaling(steps: pd.DataFrame, what: str, figure: str, axis: str) -> PageFigure:
    chosen = steps[steps.index.str.endswith(what)]
    sizes = pd.Series([float(name.split()[0]) for name in chosen.index], index=chosen.index)
    draw = partial(plot_scaling, sizes, chosen[figure], what, axis)
    return page_figure(f"{axis.capitalize()} and {what}", draw, "Default settings, 128 cells.")


def _roofline(roofline: pd.DataFrame) -> Iterator[Block]:
    found = dict(zip(map(str, roofline.columns), roofline.to_numpy()[0].tolist(), strict=True))
    arithmetic = (
        f"A step of the published size without generation does "
        f"{_number(found['products of a step, GFLOP'])} GFLOP of matrix products; one large "
        f"product reaches {_number(found['machine, GFLOP/s'])} GFLOP/s here, so that they alone "
        f"would take {_number(found['products alone at that rate, s'])} s."
    )
    reached = (
        f"The step takes {_number(found['step, s'])} s: "
        f"{100 * found['fraction of the ceiling']:.0f} % of that ceiling."
    )
    traffic = (
        f"Its operations read and write {_number(found['read and written by a step, GB'])} GB, "
        f"much of it in blocks that a cache holds. Copies of memory reach "
        f"{_number(found['machine, GB/s'])} GB/s."
    )
    yield Findings([arithmetic, reached, traffic])
    yield Figures([page_figure("Roofline", partial(plot_roofline, found), _ROOFLINE)])


def _table(title: str, table: pd.DataFrame) -> Table:
    rows = [
        [str(case), *("" if pd.isna(value) else _number(value) for value in row)]
        for case, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return Table(title, ["case", *map(str, table.columns)], rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
