"""One self-contained HTML page about a run: what was asked, what was found, how far to trust it.

Everything on the page was computed before; here it is only put into words, tables and figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pandas as pd

from cradle_pyro.data.fields import write_text_atomic
from cradle_pyro.errors import shown
from cradle_pyro.evaluation.evaluate import CEILING, MODEL, Evaluation
from cradle_pyro.queries.calls import CALL_RATE
from cradle_pyro.reporting import plots
from cradle_pyro.reporting.blocks import (
    Block,
    Browser,
    Code,
    Figures,
    Findings,
    Section,
    Table,
    Text,
    Tiles,
    Warned,
    render_page,
)
from cradle_pyro.reporting.figures import PageFigure, page_figure, page_figures
from cradle_pyro.reporting.table import METRIC_NAMES, PART_TITLES, facts_of, predictor_name

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from cradle_pyro.data.qc import QCThresholds
    from cradle_pyro.evaluation.criticism import PredictiveCheck

__all__ = [
    "MOST_GENES",
    "SIZEABLE",
    "Calibration",
    "Embedding",
    "Example",
    "ReportContent",
    "Screen",
    "render_report",
    "strongest_first",
    "write_report",
]

MOST_GENES = 20
"""Rows of the table of effects for each perturbation."""

SIZEABLE = 0.1
"""Effects smaller than this (log2) are not counted in headlines, however sure their sign is."""

_MOST_LISTED = 15
_WIDE = 9.4  # inches


class Screen(NamedTuple):
    """What was measured.

    Parameters
    ----------
    path
        The file.
    n_cells, n_genes
        Sizes.
    n_controls
        Cells without a perturbation.
    control
        Their label.
    splits
        Name of each split to its number of cells.
    covariates
        Name of each covariate to its number of levels.
    median_library
        Median counts per cell; None for log-normalised values.
    flags
        One row per artifact flag: n_cells, share.
    failing_share
        Share of the cells with any flag, in [0, 1].
    thresholds
        Where flags begin; None for flags that were given.
    is_simulated
        Whether the truth is known.
    """

    path: str
    n_cells: int
    n_genes: int
    n_controls: int
    control: str
    splits: Mapping[str, int]
    covariates: Mapping[str, int]
    median_library: float | None
    flags: pd.DataFrame
    failing_share: float
    thresholds: QCThresholds | None
    is_simulated: bool


class Example(NamedTuple):
    """A cell and what it would have been.

    Parameters
    ----------
    cell, label
        Its name and its perturbation.
    flags
        Artifact flags that it carries.
    worlds
        Name of each world to the expected log2(1 + 1e4 fraction) by gene, the factual one first.
    """

    cell: str
    label: str
    flags: Sequence[str]
    worlds: Mapping[str, pd.Series]


class Embedding(NamedTuple):
    """A map of cells, as observed and without artifact.

    Parameters
    ----------
    before, after
        First two principal components of log2(1 + 1e4 fraction), of both worlds together; shape
        (cells, 2).
    failing
        Which cells fail QC, shape (cells,).
    """

    before: np.ndarray
    after: np.ndarray
    failing: np.ndarray


class Calibration(NamedTuple):
    """Whether stated uncertainty is right.

    Parameters
    ----------
    pit
        Randomised probability integral transforms of held-out counts, shape (cells, genes).
    ranks
        Ranks of basal states, shape (cells, latents), among `n_draws` draws.
    n_draws
        Number of draws that ranks are among.
    units, leakage
        From :func:`~cradle_pyro.evaluation.criticism.latent_diagnostics`.
    coverage
        From :func:`~cradle_pyro.evaluation.calibration.coverage_curve`; None without a truth.
    """

    pit: np.ndarray
    ranks: np.ndarray
    n_draws: int
    units: pd.DataFrame
    leakage: pd.DataFrame
    coverage: pd.DataFrame | None


@dataclass(frozen=True)
class ReportContent:
    """All that a report shows.

    Parameters
    ----------
    name
        Of the run.
    screen
        What was measured.
    confounding
        From :func:`~cradle_pyro.confounding_report`.
    history
        One row per epoch, as in :class:`~cradle_pyro.inference.posterior.Posterior`.
    criticism
        Predictive checks of held-out cells.
    effects
        From :func:`~cradle_pyro.effects`; with a layer ``truth`` where that is known.
    examples
        A few cells and what they would have been.
    quality
        Medians of QC metrics of test cells (rows) in three columns: failing cells as observed and
        without artifact, passing ones as observed. None without failing cells or counts.
    embedding
        The same cells on a map; None where `quality` is.
    interactions
        From :func:`~cradle_pyro.queries.effects.interactions`; None without combinations.
    evaluation
        Scores beside ceilings and baselines.
    calibration
        Whether stated uncertainty is right.
    config
        The resolved configuration, as TOML.
    maker
        Name and version of the software that made this page.
    facts
        Name to value: seed, fingerprint, versions.
    commands
        Commands that make the run, its evaluation and this page again.
    draws
        Posterior draws behind the effects.
    """

    name: str
    screen: Screen
    confounding: pd.DataFrame
    history: pd.DataFrame
    criticism: PredictiveCheck
    effects: AnnData
    examples: Sequence[Example]
    quality: pd.DataFrame | None
    embedding: Embedding | None
    interactions: pd.DataFrame | None
    evaluation: Evaluation
    calibration: Calibration
    config: str
    maker: str
    facts: Mapping[str, str]
    commands: Sequence[str]
    draws: int


def write_report(content: ReportContent, out: str | Path) -> Path:
    """Write the page atomically and return its path.

    Raises
    ------
    DataError
        If it cannot be written, for example because the disk is full.
    """
    out = Path(out)
    write_text_atomic(out, render_report(content))
    return out


def render_report(content: ReportContent) -> str:
    """Return the page as HTML. All names are escaped, and nothing is loaded from elsewhere."""
    sections = [
        _summary(content),
        _data(content),
        _confounding(content),
        _fit(content),
        _effects(content),
        _cells(content),
        _pairs(content),
        _evaluation(content),
        _calibration(content),
        _settings(content),
    ]
    screen = content.screen
    return render_page(
        title=f"Perturbation screen report: {content.name}",
        lead=f"{Path(screen.path).name}: {screen.n_cells:,} cells, {screen.n_genes:,} genes, "
        f"{_perturbation_count(content)}.",
        sections=sections,
        footer=f"Made from the run {content.name} by {content.maker}. The page loads nothing from "
        "elsewhere and can be sent as it is.",
    )


# ----------------------------------------------------------------------------------- the sections


def _summary(content: ReportContent) -> Section:
    screen, called = content.screen, _called_and_sizeable(content.effects)
    splits = screen.splits
    tiles = [
        ("Cells", f"{screen.n_cells:,}", f"{screen.n_controls:,} of them controls"),
        ("Genes", f"{screen.n_genes:,}", "scored by the model"),
        ("Perturbations", f"{_n_singles(content):,}", _combination_note(content)),
        _failing_tile(screen),
        ("Effects called", f"{int(called.sum()):,}", f"and at least {SIZEABLE} log2"),
    ]
    tiles += [_score_tile(verdict) for verdict in _verdicts(content.evaluation)][:1]
    found = [
        f"{screen.n_cells:,} cells were measured in {screen.n_genes:,} genes under "
        f"{_perturbation_count(content)}; {screen.n_controls:,} cells are controls "
        f"('{screen.control}'). {splits.get('train', 0):,} cells trained the model, "
        f"{splits.get('val', 0):,} told it when to stop, and {splits.get('test', 0):,} that it "
        "never saw judge it.",
        _failing_sentence(screen),
        _strongest_sentence(content),
    ]
    found.append(_confounding_finding(content))
    found += [verdict.sentence for verdict in _verdicts(content.evaluation)]
    return Section(
        "summary", "Summary", [Tiles(tiles), Findings(found), *map(Warned, _warnings(content))]
    )


def _data(content: ReportContent) -> Section:
    screen = content.screen
    rows = [
        ("cells", f"{screen.n_cells:,}"),
        *((f"{words} cells", f"{screen.splits.get(name, 0):,}") for name, words in _SPLITS.items()),
        (f"control cells ('{screen.control}')", f"{screen.n_controls:,}"),
        ("genes", f"{screen.n_genes:,}"),
        ("single perturbations", f"{_n_singles(content):,}"),
        ("combinations", f"{_n_combinations(content):,}"),
        *((f"levels of {name}", f"{number:,}") for name, number in screen.covariates.items()),
    ]
    if len(screen.flags):
        rows.append(("cells with an artifact flag", _percent(screen.failing_share)))
    if screen.median_library is not None:
        rows.append(("median counts per cell", f"{screen.median_library:,.0f}"))
    blocks: list[Block] = [
        Text(f"The screen was read from {screen.path}."),
        Table("The screen in numbers", ("", "number"), rows),
    ]
    if not len(screen.flags):
        blocks.append(
            Text("The model was trained without artifact flags, so that no cell counts as failing.")
        )
        return Section("data", "Data and quality control", blocks)
    flags = [
        (
            str(name).replace("_", " "),
            f"{int(row['n_cells']):,}",
            _percent(row["share"]),
            _threshold(screen.thresholds, str(name)),
        )
        for name, row in screen.flags.iterrows()
    ]
    caption = "A cell may carry several flags. No cell is dropped."
    if screen.thresholds is not None:
        caption += (
            f" Flags begin {screen.thresholds.n_mads:g} median absolute deviations from the median."
        )
    blocks.append(
        Table(
            "Artifact flags",
            ("flag", "cells", "share", "given to cells with"),
            flags,
            caption,
            words=("given to cells with",),
        )
    )
    if screen.thresholds is not None and screen.thresholds.left_out:
        reasons = "; ".join(
            f"{flag.replace('_', ' ')} ({why})" for flag, why in screen.thresholds.left_out.items()
        )
        blocks.append(Text(f"Not used as flags: {reasons}."))
    return Section("data", "Data and quality control", blocks)


def _confounding(content: ReportContent) -> Section:
    report, name = content.confounding, "Confounding"
    if not content.screen.failing_share:
        text = (
            "No cell carries an artifact flag, so that failure cannot be confounded with anything."
        )
        return Section("confounding", name, [Text(text)])
    control, others = report.iloc[0], report.iloc[1:]
    differing = others[others["differs"]]
    blocks: list[Block] = [
        Text(
            f"Of the control cells {_percent(control['failing_share'])} fail QC. "
            + _confounding_sentence(differing, len(others))
            + " Where failure follows the perturbation, comparing only the cells that pass means "
            "comparing survivors; the model asks what all cells would be without the artifact."
        )
    ]
    blocks += [Warned(text) for text in _overlap_warnings(report)]
    figure = page_figure(
        "Failing share of each perturbation",
        partial(plots.confounding, report, n_most=_MOST_ROWS),
        "Share of cells that fail QC under each perturbation, with its 95 % interval; the band is "
        "control's. Vermilion: more or less often than control, at a false discovery rate of 5 %."
        + _shown_of(min(len(others), _MOST_ROWS), len(others), "perturbations"),
        size=(_WIDE, _height(1 + min(len(others), _MOST_ROWS))),
        is_wide=True,
    )
    blocks.append(Figures([figure]))
    if len(differing):
        blocks.append(_confounding_table(differing))
    return Section("confounding", name, blocks)


def _confounding_table(differing: pd.DataFrame) -> Table:
    rows = [
        (
            str(label),
            f"{row['n_cells']:,}",
            _percent(row["failing_share"]),
            f"{100 * row['difference']:+.1f} points".replace("-", "−"),
            f"{100 * row['difference_low']:+.1f} to {100 * row['difference_high']:+.1f}".replace(
                "-", "−"
            ),
            _rate(row["p_adjusted"]),
        )
        for label, row in differing.head(_MOST_LISTED).iterrows()
    ]
    return Table(
        "Perturbations that fail more or less often than control",
        ("perturbation", "cells", "failing", "difference", "95 % interval", "adjusted p"),
        rows,
        "Largest difference first; Fisher's exact test, Benjamini-Hochberg over perturbations."
        + _shown_of(len(rows), len(differing), "perturbations"),
    )


def _fit(content: ReportContent) -> Section:
    history = content.history
    blocks: list[Block] = []
    if "val_loss" in history:
        best = int(np.argmin(history["val_loss"]))
        epoch = int(history["epoch"].iloc[best])
        text = (
            f"Training ran for {len(history)} epochs. The validation loss was lowest in epoch "
            f"{epoch} (counted from 0), at {history['val_loss'].iloc[best]:.2f} nats per cell; "
            "the parameters of that epoch are used here."
        )
        if best == len(history) - 1:
            text += " It was the last one: longer training might still improve the fit."
    else:
        text = f"Training ran for {len(history)} epochs without validation cells."
    blocks.append(Text(text))
    blocks.append(Figures([
        page_figure(
            "Loss by epoch",
            partial(plots.training_history, history),
            "The loss in nats per cell on training and on validation cells; lower is better. "
            "Curves that flatten have converged; a validation curve that turns up "
            "shows overfitting.",
        ),
        page_figure(
            "Terms of the loss",
            partial(plots.loss_terms, history),
            "What the loss is made of. A term at zero throughout is a part of the model that is "
            "not used.",
        ),
    ]))  # fmt: skip
    blocks.append(
        Text(
            "Does the model generate cells like those it has never seen? Held-out cells are "
            "compared with cells that the fitted model generates in their place."
        )
    )
    blocks.append(Figures(_predictive_figures(content.criticism)))
    return Section("fit", "Fit", blocks)


def _predictive_figures(check: PredictiveCheck) -> list[PageFigure]:
    """Return checks gene by gene, then of whole cells."""
    figures = [
        page_figure(
            "Variance and mean of counts",
            partial(plots.mean_variance, check.genes),
            "Each point is a gene. Generated cells (orange) should lie on observed ones: counts "
            "vary more than Poisson (dashed) and the model should know by how much.",
            size=(4.8, 4.2),
        ),
        page_figure(
            "Share of zeros",
            partial(plots.predictive_genes, check.genes, "zeros"),
            "Each point is a gene; on the line, generated cells have as many zeros as observed "
            "ones.",
            size=(4.8, 4.2),
        ),
    ]
    for name, (observed, replicated) in check.metrics.items():
        is_held = name == "library" and check.library == "held"
        if name not in _METRIC_WORDS or is_held or not np.median(observed):
            continue
        words = _METRIC_WORDS[name]
        figures.append(
            page_figure(
                words.capitalize(),
                partial(plots.predictive_metric, observed, replicated, name=words),
                "Distribution over held-out cells: the observed line should run inside the band of "
                "generated cells.",
            )
        )
    return figures


def _effects(content: ReportContent) -> Section:
    effects = content.effects
    unsupported = effects.obs_names[effects.obs["out_of_support"].to_numpy(bool)]
    blocks: list[Block] = [
        Text(
            "An effect is the average change of a gene's expression, on the scale log2(1 + 10,000 "
            "× fraction of the cell's counts), if control cells had been given the perturbation "
            "and no cell had an artifact. Intervals hold 95 % of the posterior probability, from "
            f"{content.draws} draws. The lfsr (local false sign rate) is the probability that the "
            "sign is wrong; effects are called so that of the calls' signs "
            f"{_percent(CALL_RATE, 0)} are expected to be wrong."
        ),
        Text(_strongest_sentence(content)),
    ]
    if len(unsupported):
        blocks.append(
            Warned(f"{_unsupported_sentence(unsupported, 10)} They are marked † in the table.")
        )
    blocks.append(Figures(_effect_figures(effects)))
    blocks.append(_effect_browser(content))
    return Section("effects", "Effects", blocks)


def _effect_figures(effects: AnnData) -> list[PageFigure]:
    called = _called_and_sizeable(effects)
    strongest = strongest_first(effects)
    labels = strongest[:_MOST_ROWS]
    figures = [
        page_figure(
            "Effects on the genes that respond most",
            partial(plots.effect_heatmap, effects, labels=labels, n_genes=_MOST_COLUMNS),
            "One row per perturbation, most called effects first; one column per gene, those most "
            "often called. Colour is the posterior mean effect (log2): red up, blue down, pale "
            "unchanged. Dots are called effects of some size."
            + _shown_of(len(labels), effects.n_obs, "perturbations"),
            size=(_WIDE, _height(len(labels)) + 0.8),
            is_wide=True,
        )
    ]
    for label in strongest[:2]:
        table = _effect_table(effects, label)
        number = int(called[effects.obs_names.get_loc(label)].sum())
        figures.append(
            page_figure(
                f"All genes under {label}",
                partial(plots.volcano, table),
                "Each point is a gene: how much it changes across, how sure the sign is upwards "
                f"(above the dotted line, one sign in ten is wrong or fewer). {number:,} genes are "
                f"called and change by {SIZEABLE} or more.",
                size=(4.8, 4.2),
            )
        )
    return figures


def _effect_browser(content: ReportContent) -> Browser:
    """Return the searchable table: for each perturbation its largest effects, in all by size."""
    effects = content.effects
    mean, called = np.asarray(effects.X), _called(effects)
    low, high, lfsr = (np.asarray(effects.layers[k]) for k in ("ci_low", "ci_high", "lfsr"))
    top = np.argsort(-np.abs(mean), axis=1, kind="stable")[:, :MOST_GENES]
    row = np.repeat(np.arange(effects.n_obs), top.shape[1])
    column = top.ravel()
    order = np.argsort(-np.abs(mean[row, column]), kind="stable")
    row, column = row[order], column[order]
    used, gene = np.unique(column, return_inverse=True)
    values = (mean, low, high, lfsr)
    rows = [
        [int(i), int(g), *(round(float(part[i, j]), 4) for part in values), int(called[i, j])]
        for i, j, g in zip(row, column, gene, strict=True)
    ]
    data = {
        "perturbations": [str(label) for label in effects.obs_names],
        "support": [str(text) for text in effects.obs["support"]],
        "genes": [str(name) for name in effects.var_names[used]],
        "rows": rows,
    }
    columns = [
        ("perturbation", "perturbation", False),
        ("gene", "gene", False),
        ("mean", "effect (log2)", True),
        ("width", "95 % interval", True),
        ("", "", False),
        ("lfsr", "lfsr", True),
        ("", "called", False),
    ]
    caption = (
        f"The {top.shape[1]} largest effects of each perturbation, {len(rows):,} in all, largest "
        "first. Search for genes or perturbations, or click a heading to sort (the interval sorts "
        "by its width). Effects in grey are not called; † marks perturbations that were not in the "
        f"training cells. All {effects.n_vars:,} genes: {content.commands[-2]}"
    )
    return Browser("Largest effects of each perturbation", caption, columns, data)


def _cells(content: ReportContent) -> Section:
    title, examples = "Single cells", content.examples
    if not examples:
        text = "No test cell is a control or carries a perturbation with an effect to show."
        return Section("cells", title, [Text(text)])
    has_flags = bool(examples[0].flags)
    blocks: list[Block] = [
        Text(
            "What would this very cell have been? Its basal state is inferred from its counts and "
            "kept; then "
            + (
                "its artifact is taken away and its perturbation changed. "
                if has_flags
                else "its perturbation is changed. "
            )
            + "All values, those of the factual cell too, are what the model expects the cell to "
            "express, without the noise of counting."
        ),
        Figures([figure for example in examples for figure in _example_figures(example)]),
    ]
    if content.quality is None or content.embedding is None:
        why = (
            "No test cell carries an artifact flag, so that there are no cleaned cells to compare."
        )
        return Section("cells", title, [*blocks, Text(why)])
    rows = [
        (str(name).replace("pct_", "% "), *(f"{v:,.0f}" if v >= 20 else f"{v:.2f}" for v in values))
        for name, values in content.quality.iterrows()
        if values.any()
    ]
    blocks.append(
        Table(
            "Failing test cells without their artifact",
            ("median of", *map(str, content.quality.columns)),
            rows,
            "Without their artifact, failing cells should resemble passing ones: the second column "
            "should be near the third.",
        )
    )
    blocks.append(Figures(_embedding_figures(content.embedding)))
    return Section("cells", title, blocks)


def _example_figures(example: Example) -> list[PageFigure]:
    flags = " and ".join(flag.replace("_", " ") for flag in example.flags)
    state = f"The cell fails by {flags}. " if flags else ""
    name = f"{example.cell} ({example.label})"
    return page_figures(
        [
            (
                f"Genes of {name}",
                f"{state}The genes that differ most between the worlds, one row each.",
            ),
            (
                f"Change of {name}",
                "How far the other worlds are from the factual one, over all genes.",
            ),
        ],
        partial(plots.counterfactual_cell, dict(example.worlds)),
        size=(4.8, 5.0),
    )


def _embedding_figures(embedding: Embedding) -> list[PageFigure]:
    return page_figures(
        [
            (
                "Test cells as observed",
                "First two principal components. Failing cells (orange) that lie apart from "
                "passing ones (blue) show what the artifact does.",
            ),
            (
                "The same cells without artifact",
                "On the same axes: failing cells should now lie among passing ones.",
            ),
        ],
        partial(plots.before_after, *embedding),
        size=(4.8, 4.4),
    )


def _pairs(content: ReportContent) -> Section:
    table = content.interactions
    if table is None or not len(table):
        text = (
            "The screen has no pairs of perturbations, so that there are no interactions to show."
        )
        return Section("pairs", "Pairs and interactions", [Text(text)])
    table = table.sort_values("strength", ascending=False, kind="stable")
    rows = [
        (
            f"{row['label']}{' †' if row['out_of_support'] else ''}",
            f"{row['strength']:.3f}",
            f"{row['n_called']:,}",
            str(row["largest_gene"]),
            f"{row['largest_mean']:+.3f}".replace("-", "−"),
        )
        for row in table.head(_MOST_LISTED).to_dict("records")
    ]
    top = table.iloc[0]
    side = float(np.clip(2.4 + 0.3 * len({*table["first"], *table["second"]}), 4.0, 8.0))
    blocks: list[Block] = [
        Text(
            "An interaction is what a pair does beyond the sum of its members' effects (log2). "
            f"The strongest of {len(table)} pairs is {top['label']} ({top['strength']:.3f} root "
            f"mean square over genes, {int(top['n_called'])} genes called). The model adds "
            "perturbations in its latent state, so that interactions come from its decoder and "
            "from the bounded scale: read them as what the fitted shapes imply, not as a term of "
            "the pair's own."
        ),
        Figures([
            page_figure(
                "Strength of interactions",
                partial(plots.interaction_matrix, table),
                "Colour is the root mean square over genes of the interaction of each pair (log2); "
                "empty squares are pairs that were not screened.",
                size=(side + 1.4, side),
                is_wide=True,
            )
        ]),
        Table(
            "Pairs, strongest first",
            ("pair", "strength", "genes called", "largest on", "by"),
            rows,
            "† marks pairs that were not in the training cells: their effects are predicted from "
            "the members." + _shown_of(len(rows), len(table), "pairs"),
            words=("largest on",),
        ),
    ]  # fmt: skip
    return Section("pairs", "Pairs and interactions", blocks)


def _evaluation(content: ReportContent) -> Section:
    evaluation = content.evaluation
    table = evaluation.table(list(METRIC_NAMES))
    blocks: list[Block] = [
        Text(
            "How near do effects come to those of cells that the model never saw? ATE-ρ correlates "
            "predicted with reference effects over all genes and perturbations; Jaccard is the "
            "overlap of the genes that respond most. Beside the model stand simple baselines and "
            "the ceiling, what the means of a second sample of as many cells would reach; what "
            "borrows strength between genes and perturbations can pass it. A dash: no such score."
        )
    ]
    for verdict in _verdicts(evaluation):
        blocks.append((Warned if verdict.is_beaten else Text)(verdict.sentence))
        rows = cast(pd.DataFrame, table.loc[verdict.key])
        blocks.append(
            Table(
                verdict.title,
                ("predictor", *METRIC_NAMES.values()),
                [(predictor_name(name), *map(_score, values)) for name, values in rows.iterrows()],
                strong=(predictor_name(MODEL),),
            )
        )
    scores = evaluation.scores
    figure = page_figure(
        "ATE-ρ of all predictors",
        partial(_draw_scores, scores),
        "Correlation of predicted with reference effects, one colour for each reference: further "
        "right is better. The ceiling is what the means of a second sample of cells reach.",
        size=(_WIDE, 1.6 + 0.28 * scores["predictor"].nunique()),
        is_wide=True,
    )
    blocks.append(Figures([figure]))
    blocks.append(Table("Other measures", ("", ""), list(facts_of(evaluation))))
    return Section("evaluation", "Evaluation", blocks)


def _draw_scores(scores: pd.DataFrame, *, ax: Axes) -> None:
    plots.scores(scores, "ate_rho", ax=ax)
    spelled = {str(name).replace("_", " "): predictor_name(name) for name in scores["predictor"]}
    labels = ax.get_yticklabels()
    ax.set_yticks(ax.get_yticks(), [spelled.get(one.get_text(), one.get_text()) for one in labels])
    ax.set_xlabel("ATE-ρ")


def _calibration(content: ReportContent) -> Section:
    figures = _calibration_figures(content.calibration)
    coverage, intervals = content.calibration.coverage, content.evaluation.facts.get("intervals")
    if coverage is None or intervals is None:
        text = (
            "The truth of this screen is not known, so that intervals of effects cannot be held "
            "against it. What can be checked is whether held-out counts and inferred states fall "
            "where the model says."
        )
    else:
        text = (
            "The screen is simulated and its truth is known: of all 95 % intervals "
            f"{_percent(intervals['coverage_all'])} hold it, and of those of true effects above "
            f"0.1 {_percent(intervals['coverage'])}. Of the {intervals['n_calls']:,} called "
            f"effects {_percent(intervals['false_sign_rate'])} have the wrong sign, where "
            f"{_percent(CALL_RATE, 0)} were expected."
        )
        figures.append(
            page_figure(
                "Intervals of effects against the truth",
                partial(plots.coverage, coverage),
                "Share of true effects above 0.1 (log2) inside central intervals of the posterior "
                "draws, level by level. On the diagonal, intervals are right; below, too narrow. "
                "The 95 % intervals of this report also span the effect that a gene has if it has "
                "one, and hold more.",
            )
        )
    return Section("calibration", "Calibration", [Text(text), Figures(figures)])


def _calibration_figures(calibration: Calibration) -> list[PageFigure]:
    return [
        page_figure(
            "Held-out counts",
            partial(plots.pit_histogram, calibration.pit.ravel()),
            "Where each held-out count falls in its predictive distribution (randomised PIT). Flat "
            "is right; a hump says the model expects too much spread, a U too little.",
        ),
        page_figure(
            "Basal states",
            partial(plots.rank_histogram, calibration.ranks.ravel(), calibration.n_draws),
            "Ranks of the basal states of generated cells among posterior draws. Flat is right; a "
            "hump says posteriors are too wide, a U too narrow.",
        ),
        page_figure(
            "Use of the latent units",
            partial(plots.latent_units, calibration.units),
            "How much each unit of the basal state tells about a cell (divergence of its posterior "
            "from its prior): a unit at zero carries nothing.",
        ),
        page_figure(
            "What the basal state gives away",
            partial(plots.leakage, calibration.leakage),
            "How well flags and perturbations can be read from the basal state (AUROC). It should "
            "know neither: 0.5 is chance. Judge by draws; means of uncertain cells are shrunken.",
        ),
    ]


def _settings(content: ReportContent) -> Section:
    return Section(
        "settings",
        "Settings and versions",
        [
            Table("The run", ("", ""), list(content.facts.items()), words=("",)),
            Code("Make it again", "\n".join(content.commands), is_open=True),
            Code("Resolved configuration (config.toml of the run)", content.config.strip()),
        ],
    )


# ---------------------------------------------------------------------------- words and numbers

_SPLITS = {"train": "training", "val": "validation", "test": "test"}
_METRIC_WORDS = {
    "library": "counts per cell",
    "n_genes": "detected genes per cell",
    "pct_mito": "mitochondrial counts (%)",
    "pct_ribo": "ribosomal counts (%)",
}
_MOST_ROWS = 40
_MOST_COLUMNS = 40


def _n_singles(content: ReportContent) -> int:
    return content.effects.n_obs - _n_combinations(content)


def _n_combinations(content: ReportContent) -> int:
    return int((content.effects.obs["n_members"] > 1).sum())


def _perturbation_count(content: ReportContent) -> str:
    singles, combinations = _n_singles(content), _n_combinations(content)
    text = f"{singles:,} single perturbation{_plural(singles)}"
    return text + (
        f" and {combinations:,} combination{_plural(combinations)}" if combinations else ""
    )


def _combination_note(content: ReportContent) -> str:
    combinations = _n_combinations(content)
    return (
        f"and {combinations:,} combination{_plural(combinations)}"
        if combinations
        else "no combinations"
    )


def _plural(number: int) -> str:
    return "" if number == 1 else "s"


def _failing_tile(screen: Screen) -> tuple[str, str, str]:
    if not len(screen.flags):
        return ("Cells that fail QC", "–", "no artifact flags")
    return ("Cells that fail QC", _percent(screen.failing_share), "kept, and corrected for")


def _failing_sentence(screen: Screen) -> str:
    if not len(screen.flags):
        return "The model was trained without artifact flags: no cell counts as failing QC."
    largest = screen.flags.sort_values("share", ascending=False).head(3)
    shares = largest["share"].items()
    parts = ", ".join(f"{str(name).replace('_', ' ')} {_percent(share)}" for name, share in shares)
    return (
        f"{_percent(screen.failing_share)} of the cells fail QC ({parts}). None was dropped: the "
        "model learned what the artifact does, and takes it away."
    )


def _strongest_sentence(content: ReportContent) -> str:
    effects = content.effects
    called = _called_and_sizeable(effects)
    if not called.any():
        return f"No effect of at least {SIZEABLE} (log2) is called: no change is sure enough."
    numbers = pd.Series(called.sum(1), index=effects.obs_names)
    parts = "; ".join(f"{label} ({numbers[label]:,})" for label in strongest_first(effects)[:3])
    mean = np.where(called, np.asarray(effects.X), 0.0)
    row, column = np.unravel_index(np.abs(mean).argmax(), mean.shape)
    low, high = (effects.layers[name][row, column] for name in ("ci_low", "ci_high"))
    return (
        f"{int(called.sum()):,} effects of a perturbation on a gene are called and at least "
        f"{SIZEABLE} in size (log2), most of them under {parts}. The largest is on "
        f"{effects.var_names[column]} under {effects.obs_names[row]}: "
        f"{_signed(mean[row, column])} (95 % interval {_signed(low)} to {_signed(high)}). "
        f"{int((numbers == 0).sum()):,} of {len(numbers):,} perturbations have none."
    )


def _confounding_sentence(differing: pd.DataFrame, n_others: int) -> str:
    if not len(differing):
        return f"None of the {n_others} perturbations differs from that."
    more = int((differing["difference"] > 0).sum())
    worst = differing["failing_share"].head(3)
    shares = "; ".join(f"{label} {_percent(share, 0)}" for label, share in worst.items())
    return (
        f"Of {n_others} perturbations {more} fail more often and {len(differing) - more} less "
        f"often (false discovery rate 5 %), the most different being {shares}."
    )


def _unsupported_sentence(labels: Sequence[str], most: int) -> str:
    return (
        f"{len(labels)} perturbation{_plural(len(labels))} without training cells "
        f"({shown(labels, most)}): effects there are predictions."
    )


def _confounding_finding(content: ReportContent) -> str:
    number, total = int(content.confounding["differs"].sum()), len(content.confounding) - 1
    if not content.screen.failing_share:
        return "Effects cannot be confounded with failing cells, as none are known to fail."
    if not number:
        return f"None of the {total} perturbations fails QC more or less often than control."
    return (
        f"{number} of {total} perturbations fail QC more or less often than control, so that "
        "dropping failing cells would distort their effects. Effects below are those without "
        "artifact in both groups."
    )


def _overlap_warnings(report: pd.DataFrame) -> list[str]:
    found = []
    others = report.iloc[1:]
    for state in ("passing", "failing"):
        few = others.index[others[f"few_{state}"]]
        if len(few):
            found.append(
                f"{len(few)} perturbation{_plural(len(few))} with fewer than "
                f"{report.attrs['min_cells']} {state} "
                f"cells ({shown(few, 3)}): hardly any to tell its artifact from its effect by."
            )
    for name, (n_with, n_levels) in report.attrs.get("control_levels", {}).items():
        if n_with < n_levels:
            found.append(
                f"Control cells are found in {n_with} of {n_levels} levels of {name}: elsewhere, "
                "perturbations are compared with controls of other levels."
            )
    return found


def _warnings(content: ReportContent) -> Iterator[str]:
    if content.screen.failing_share:
        yield from _overlap_warnings(content.confounding)
    unsupported = content.effects.obs_names[content.effects.obs["out_of_support"].to_numpy(bool)]
    if len(unsupported):
        yield _unsupported_sentence(unsupported, 3)
    verdicts = _verdicts(content.evaluation)
    beaten = [verdict.title for verdict in verdicts if verdict.is_beaten]
    if beaten:
        yield (
            f"A simple baseline predicts average effects better than the model in {len(beaten)} of "
            f"{len(verdicts)} comparisons: {'; '.join(beaten)}."
        )


class _Verdict(NamedTuple):
    """How the model stands beside the best baseline, for one reference and set of labels."""

    key: tuple[str, str]
    title: str
    sentence: str
    model: float
    ceiling: float
    is_beaten: bool


def _verdicts(evaluation: Evaluation) -> list[_Verdict]:
    table = evaluation.table(["ate_rho"])["ate_rho"]
    return [_verdict(key, table.loc[key]) for key in dict.fromkeys(i[:2] for i in table.index)]


def _verdict(key: tuple[str, str], scores: pd.Series) -> _Verdict:
    model = float(scores[MODEL])
    ceiling = float(scores.get(CEILING, np.nan))
    baselines = scores.drop([MODEL, CEILING], errors="ignore").dropna()
    title = PART_TITLES[key]
    text = f"{title}: effects of the model correlate with the reference at {_score(model)}"
    if len(baselines):
        best = str(baselines.idxmax())
        score = _score(baselines[best])
        text += f", those of the best simple baseline ({predictor_name(best)}) at {score}"
    if np.isfinite(ceiling):
        text += f", and a second sample of as many cells (the ceiling) at {_score(ceiling)}"
    is_beaten = len(baselines) > 0 and not model >= baselines.max()
    text += ". The simple baseline is better here." if is_beaten else "."
    return _Verdict(key, title, text, model, ceiling, is_beaten)


def _score_tile(verdict: _Verdict) -> tuple[str, str, str]:
    ceiling = f", ceiling {_score(verdict.ceiling)}" if np.isfinite(verdict.ceiling) else ""
    return ("ATE-ρ on held-out cells", _score(verdict.model), f"seen perturbations{ceiling}")


def _block_scores(evaluation: Evaluation, key: tuple[str, str]) -> pd.DataFrame:
    scores = evaluation.scores
    return scores[(scores["reference"] == key[0]) & (scores["labels"] == key[1])]


def _threshold(thresholds: QCThresholds | None, flag: str) -> str:
    """Return where a flag begins in words; counts and genes are cut on the scale log(1 + x)."""
    if thresholds is None or flag not in thresholds.cuts:
        return "as given with the screen"
    cut = thresholds.cuts[flag].cut
    return {
        "low_counts": f"fewer than {np.expm1(cut):,.0f} counts",
        "low_genes": f"fewer than {np.expm1(cut):,.0f} genes",
        "high_mito": f"more than {cut:.1f} % mitochondrial counts",
        "high_ribo": f"more than {cut:.1f} % ribosomal counts",
        "high_hb": f"more than {cut:.1f} % haemoglobin counts",
        "doublet": f"a doublet score above {cut:.2f}",
    }[flag]


def _called(effects: AnnData) -> np.ndarray:
    return np.asarray(effects.layers["s_value"]) <= CALL_RATE


def _called_and_sizeable(effects: AnnData) -> np.ndarray:
    return _called(effects) & (np.abs(np.asarray(effects.X)) >= SIZEABLE)


def strongest_first(effects: AnnData) -> list[str]:
    """Return labels by their number of called effects of some size, then by size.

    Parameters
    ----------
    effects
        From :func:`~cradle_pyro.effects`.
    """
    number = _called_and_sizeable(effects).sum(1)
    size = np.abs(np.asarray(effects.X)).mean(1)
    return [str(label) for label in effects.obs_names[np.lexsort((-size, -number))]]


def _effect_table(effects: AnnData, label: str) -> pd.DataFrame:
    row = effects[label]
    layers = {name: np.asarray(values).ravel() for name, values in row.layers.items()}
    return pd.DataFrame({"gene": effects.var_names, "mean": np.asarray(row.X).ravel(), **layers})


def _height(n_rows: int) -> float:
    """Return the height in inches of a figure with labelled rows."""
    return 1.4 + 0.2 * n_rows


def _shown_of(number: int, total: int, what: str) -> str:
    return f" Shown: {number:,} of {total:,} {what}." if number < total else ""


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _score(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}".replace("-", "−")


def _percent(value: float | None, digits: int = 1) -> str:
    """Return a share as a percentage; no line breaks before the sign."""
    if value is None or pd.isna(value):
        return "–"
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _rate(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
