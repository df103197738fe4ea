"""The report of a benchmark: one page and the same as text; tables, dots and paired differences.

Everything shown was computed before, see :mod:`cradle_pyro.evaluation.benchmark`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cradle_pyro.data.fields import write_text_atomic
from cradle_pyro.evaluation.benchmark import BenchmarkResult
from cradle_pyro.evaluation.comparisons import ERRORS, rank_agreement
from cradle_pyro.evaluation.grid import CEILING_KIND, Benchmark, GridScreen
from cradle_pyro.reporting.benchmark_plots import plot_differences, plot_dots
from cradle_pyro.reporting.blocks import (
    Block,
    Figures,
    Findings,
    Section,
    Table,
    Text,
    Tiles,
    Warned,
    as_markdown,
    render_page,
)
from cradle_pyro.reporting.figures import page_figure
from cradle_pyro.reporting.table import METRIC_NAMES, PART_TITLES

__all__ = ["render_benchmark", "render_benchmark_text", "write_benchmark_report"]

MAIN_METRIC = "ate_rho"
_EFFECT_METRICS = {
    **METRIC_NAMES,
    "ate_rho_per_perturbation": "ρ per perturbation",
    "rmse": "RMSE",
    "mae": "MAE",
    "sign_top20": "signs, top 20",
    "discrimination": "discrimination",
}
_LESS_IS_BETTER = ("rmse", "mae")
_NAMES = {**_EFFECT_METRICS, "de_overlap": "DE overlap", "de_direction": "DE direction"}
_CHECKS: dict[str, dict[str, str]] = {
    "Held-out density and use of the latents": {
        "iwelbo_test": "IWELBO, test (nats/cell)",
        "iwelbo_val": "IWELBO, validation",
        "basal_kl": "KL of z_basal (nats)",
        "basal_active": "active units",
        "basal_sd": "mean posterior sd",
    },
    "Leakage into draws of z_basal (AUROC; 0.5 is none)": {
        "leakage_artifact_knn": "flag, neighbours",
        "leakage_artifact_logistic": "flag, logistic",
        "leakage_perturbation_knn": "perturbation, neighbours",
        "leakage_perturbation_logistic": "perturbation, logistic",
        "leakage_artifact_knn_se": "se of the first",
        "leakage_artifact_knn_means": "the first from means",
    },
    "Cells generated without artifact (ceiling: real training cells that pass): share that passes "
    "QC, and distance to passing test cells": {
        "qc_pass_3mad": "3 MAD",
        "qc_pass_4mad": "4 MAD",
        "qc_pass_5mad": "5 MAD",
        "qc_ks_counts": "KS counts",
        "qc_ks_genes": "KS genes",
        "qc_ks_pct_mito": "KS mito",
    },
    "Soundness of counterfactuals": {
        "composition_entries": "do() returns the cell",
        "reversibility_difference": "there and back, |Δ|",
        "effectiveness_typical_read": "made failing, read so",
        "effectiveness_typical_real": "real failing",
        "effectiveness_removed_read": "cleaned, read as passing",
        "effectiveness_removed_before": "before",
    },
    "Known truth: cleaned cells, single cells, intervals": {
        "profile_cleaned": "RMSE cleaned",
        "profile_mean_passing": "mean passing",
        "profile_raw": "raw",
        "control_as_control": "RMSE as control",
        "control_individual": "own effects ρ",
        "interval_coverage": "95 % coverage",
        "interval_false_sign_rate": "false signs at 10 %",
    },
}
_COSTS = {
    "seconds_to_fit": "seconds to fit",
    "seconds_to_score": "seconds to score",
    "peak_memory_mb": "peak memory (MB)",
    "epochs": "epochs",
}
_METHOD = (
    "Each difference is taken within a seed and a split, by the same reference, and averaged over "
    "splits, then seeds. Thick bars are 95 % percentile intervals of a two-level bootstrap: seeds "
    "are drawn with replacement and, within each, splits and perturbations, for both predictors "
    "alike; the metric is computed again from what was drawn. Simulated screens have perturbations "
    "of their own under each seed (nested); the seeds of a real screen share them, and so do the "
    "draws (crossed). Percentile intervals of few seeds are somewhat too narrow; thin bars are "
    "95 % intervals of Student's t over seeds, which know nothing of perturbations. Intervals are "
    "for each comparison by itself: among many, some miss."
)


def write_benchmark_report(benchmark: Benchmark, result: BenchmarkResult, out: str | Path) -> Path:
    """Write ``report.md`` and ``report.html`` to the directory `out`; return the page's path.

    Raises
    ------
    DataError
        If they cannot be written.
    """
    sections = list(_sections(benchmark, result))
    page = Path(out) / "report.html"
    write_text_atomic(page, render_benchmark(benchmark, result, sections))
    write_text_atomic(Path(out) / "report.md", render_benchmark_text(benchmark, result, sections))
    return page


def render_benchmark(
    benchmark: Benchmark, result: BenchmarkResult, sections: Sequence[Section] | None = None
) -> str:
    """Return the page as HTML. All names are escaped, and nothing is loaded from elsewhere."""
    return render_page(
        title=_title(benchmark),
        lead=_lead(benchmark, result),
        sections=list(_sections(benchmark, result)) if sections is None else sections,
        footer=f"Made by cradle-pyro {metadata.version('cradle-pyro')}. The page loads nothing "
        "from elsewhere and can be sent as it is.",
    )


def render_benchmark_text(
    benchmark: Benchmark, result: BenchmarkResult, sections: Sequence[Section] | None = None
) -> str:
    """Return the same as Markdown, without figures."""
    lines = [f"# {_title(benchmark)}", "", _lead(benchmark, result), ""]
    for section in _sections(benchmark, result) if sections is None else sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += as_markdown(block)
    return "\n".join(lines).rstrip() + "\n"


def _title(benchmark: Benchmark) -> str:
    return f"Benchmark: {benchmark.name}"


def _lead(benchmark: Benchmark, result: BenchmarkResult) -> str:
    return (
        f"{_count(len(benchmark.screens), 'screen')}, "
        f"{_count(len(benchmark.all_predictors) - 1, 'predictor')} and ceilings, "
        f"{_count(len(benchmark.seeds), 'seed')}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# ----------------------------------------------------------------------------------- the sections


def _sections(benchmark: Benchmark, result: BenchmarkResult) -> Iterator[Section]:
    yield _summary(benchmark, result)
    yield _differences(benchmark, result)
    for screen in benchmark.screens:
        scores = result.scores[result.scores["screen"] == screen.name]
        if len(scores):
            yield _screen(benchmark, screen, scores, result.normalised)
    agreement = _agreement(result)
    if agreement is not None:
        yield agreement
    yield _costs(benchmark, result)


def _summary(benchmark: Benchmark, result: BenchmarkResult) -> Section:
    n_cells = sum(1 for _ in benchmark.cells())
    n_done = len(result.scores[["screen", "split", "seed", "predictor"]].drop_duplicates())
    tiles = [
        ("Screens", str(len(benchmark.screens)), f"{_n_splits(benchmark)} with their splits"),
        ("Predictors", str(len(benchmark.all_predictors) - 1), "beside ceilings"),
        ("Seeds", str(len(benchmark.seeds)), ", ".join(map(str, benchmark.seeds))),
        ("Cells of the grid", f"{n_done} of {n_cells}", "fitted and scored"),
    ]
    blocks: list[Block] = [Tiles(tiles)]
    findings = list(_findings(benchmark, result))
    if findings:
        blocks.append(Findings(findings))
    if len(benchmark.seeds) < 5:
        blocks.append(Warned(f"Claims need five seeds or more; these are {len(benchmark.seeds)}."))
    if result.n_sources > 1:
        blocks.append(
            Warned(
                f"The cells were made by {result.n_sources} versions of the code. Delete the "
                "directory cells and run the benchmark again for one."
            )
        )
    if result.failures:
        rows = list(result.failures.items())
        blocks.append(Table("Cells that failed", ["cell", "reason"], rows, words=["reason"]))
    return Section("summary", "Summary", blocks)


def _n_splits(benchmark: Benchmark) -> int:
    return sum(len(screen.splits) for screen in benchmark.screens)


def _findings(benchmark: Benchmark, result: BenchmarkResult) -> Iterator[str]:
    """Yield how ours stands beside the best of the others, for each block of tables."""
    chosen = result.comparisons[result.comparisons["metric"] == MAIN_METRIC]
    for (screen, reference, labels), rows in chosen.groupby(
        ["screen", "reference", "labels"], sort=False
    ):
        closest = rows.sort_values("mean").iloc[0]
        part = PART_TITLES[str(reference), str(labels)].lower()
        yield (
            f"{screen}, {part}: {METRIC_NAMES[MAIN_METRIC]} of {benchmark.ours} minus that of "
            f"{closest['other']}, the best other, {_signed(closest['mean'])} "
            f"({_signed(closest['ci_low'])} to {_signed(closest['ci_high'])}, 95 %)."
        )


def _differences(benchmark: Benchmark, result: BenchmarkResult) -> Section:
    chosen = result.comparisons[result.comparisons["metric"] == MAIN_METRIC]
    blocks: list[Block] = [Text(_METHOD)]
    figures, tables = [], []
    for (screen, reference, labels), rows in chosen.groupby(
        ["screen", "reference", "labels"], sort=False
    ):
        part = PART_TITLES[str(reference), str(labels)]
        title = f"{screen}: {part.lower()}"
        caption = (
            f"{benchmark.ours} minus each other predictor, {METRIC_NAMES[MAIN_METRIC]}; right of "
            f"zero {benchmark.ours} is better. {_sizes(rows)}."
        )
        size = (4.8, 1.2 + 0.28 * len(rows))
        figures.append(page_figure(title, partial(plot_differences, rows), caption, size=size))
        tables.append(_difference_table(f"{title}, {METRIC_NAMES[MAIN_METRIC]}", rows))
    if figures:
        blocks.append(Figures(figures))
    return Section("differences", "Paired differences", [*blocks, *tables])


def _sizes(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    counts = (
        (first["n_seeds"], "seed"),
        (first["n_splits"], "split"),
        (first["n_labels"], "label"),
    )
    return ", ".join(_count(int(number), noun) for number, noun in counts) + (
        f"; resampled: {first['resampled']}"
    )


def _difference_table(title: str, rows: pd.DataFrame) -> Table:
    body = [
        [
            str(row["other"]),
            _signed(row["mean"]),
            _number(row["sd"]),
            _range(row["ci_low"], row["ci_high"]),
            _range(row["t_low"], row["t_high"]),
        ]
        for _, row in rows.iterrows()
    ]
    head = ["minus", "difference", "sd over seeds", "95 %, bootstrap", "95 %, Student's t"]
    return Table(title, head, body)


def _screen(
    benchmark: Benchmark, screen: GridScreen, scores: pd.DataFrame, normalised: pd.DataFrame
) -> Section:
    order = [one.name for one in benchmark.predictors_of(screen)]
    order = [*order[1:], order[0]]  # the ceiling last
    blocks: list[Block] = [Text(_about(screen))]
    figures, tables = [], []
    for (reference, labels), title in PART_TITLES.items():
        some = scores[(scores["reference"] == reference) & (scores["labels"] == labels)]
        some = some[some["label"] == ""]
        if some.empty:
            continue
        main = _by_seed(some[some["metric"] == MAIN_METRIC])
        names = [name for name in order if name in main.columns]
        size = (4.8, 1.2 + 0.28 * len(names))
        draw = partial(plot_dots, main[names], METRIC_NAMES[MAIN_METRIC], strong=benchmark.ours)
        caption = "Each seed (small) and their mean (large); the line is the ceiling."
        if set(names) - {CEILING_KIND}:
            figures.append(page_figure(title, draw, caption, size=size))
        shares = normalised[
            (normalised["screen"] == screen.name)
            & (normalised["reference"] == reference)
            & (normalised["labels"] == labels)
            & (normalised["metric"] == MAIN_METRIC)
        ]
        tables.append(_score_table(title, some, shares, order, benchmark.ours))
    generated = scores[(scores["reference"] == "generated") & (scores["label"] == "")]
    for key in dict.fromkeys(generated["labels"].astype(str)):
        some = generated[generated["labels"] == key]
        shown_as = {
            str(m): _NAMES.get(m, str(m).replace("_", " ")) for m in some["metric"].unique()
        }
        title = f"Generated cells, {key.replace('_', '-')} perturbations"
        tables.append(_metric_table(title, some, shown_as, order, benchmark.ours))
    checks = scores[scores["reference"] == "model"]
    for title, shown_as in _CHECKS.items():
        some = checks[checks["metric"].isin(list(shown_as))]
        if len(some):
            tables.append(_metric_table(title, some, shown_as, order, benchmark.ours))
    return Section(f"screen-{screen.name}", screen.name, [*blocks, Figures(figures), *tables])


def _about(screen: GridScreen) -> str:
    if screen.simulate is not None:
        given = ", ".join(f"{name} = {value:g}" for name, value in screen.simulate.items())
        parts = [f"Simulated with {given or 'the default settings'}; the seed makes the screen."]
    else:
        parts = [f"Read from {screen.path}."]
    if screen.config is not None or screen.settings:
        where = f"{screen.config or 'the default configuration'}"
        parts.append(f"Configuration: {' '.join([where, *screen.settings])}.")
    if len(screen.splits) > 1:
        names = ", ".join(split.name for split in screen.splits)
        parts.append(f"Means over {len(screen.splits)} splits: {names}.")
    if screen.corrupt is not None:
        parts.append(
            f"{screen.corrupt.share:.0%} of the passing cells that are learned from carry a known "
            "artifact."
        )
    if screen.judged_on == "validation":
        parts.append("Judged on validation cells; test cells are left out.")
    if screen.keep.cells_per_perturbation is not None:
        parts.append(
            f"At most {screen.keep.cells_per_perturbation} training cells of each perturbation."
        )
    if screen.keep.train_pairs is not None:
        parts.append(f"{screen.keep.train_pairs:.0%} of the combinations are in training.")
    return " ".join(parts)


def _by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return means over splits (and labels), seeds x predictors."""
    return rows.pivot_table(
        index="seed", columns="predictor", values="value", aggfunc="mean", sort=False
    )


def _score_table(
    title: str, rows: pd.DataFrame, shares: pd.DataFrame, order: Sequence[str], ours: str
) -> Table:
    names = {key: name for key, name in _EFFECT_METRICS.items() if (rows["metric"] == key).any()}
    table = _metric_table(title, rows, names, order, ours)
    mean = shares.groupby("predictor")["normalised"].mean()
    body = [[*row, _number(mean.get(row[0], np.nan), 2)] for row in table.rows]
    n_labels = rows.groupby(["seed", "split"])["n_labels"].max()
    caption = (
        f"Mean ± standard deviation over seeds; {n_labels.min()} to {n_labels.max()} labels in a "
        f"seed. Way to ceiling: ({METRIC_NAMES[MAIN_METRIC]} − that of the global mean) / (ceiling "
        "− that of the global mean)."
    )
    exact = rows.loc[rows["metric"] == f"{MAIN_METRIC}_noise_free", "value"]
    if exact.notna().any():
        caption += (
            f" The ceiling is what another sample of as many cells would reach; the exact expected "
            f"effects would reach {METRIC_NAMES[MAIN_METRIC]} {exact.mean():.3f}."
        )
    return table._replace(rows=body, head=[*table.head, "way to ceiling"], caption=caption)


def _metric_table(
    title: str, rows: pd.DataFrame, names: Mapping[str, str], order: Sequence[str], ours: str
) -> Table:
    found = {metric: _by_seed(rows[rows["metric"] == metric]) for metric in names}
    present = [metric for metric in names if len(found[metric])]
    predictors = [p for p in order if any(p in found[metric].columns for metric in present)]
    body = [[p, *(_spread(found[m].get(p)) for m in present)] for p in predictors]
    less = [names[m] for m in present if m in _LESS_IS_BETTER or m in ERRORS]
    caption = "Mean ± standard deviation over seeds."
    if less:
        caption += f" Less is better: {', '.join(less)}."
    return Table(title, ["predictor", *(names[m] for m in present)], body, caption, strong=[ours])


def _agreement(result: BenchmarkResult) -> Section | None:
    """Return how another program ranks the predictors, where it was asked."""
    found = rank_agreement(result.scores, without=[CEILING_KIND])
    if not len(found):
        return None
    head = ["screen", "labels", "scored here", "metric here", "cell-eval's", "Spearman's ρ",
            "best here", "best there", "predictors"]  # fmt: skip
    scored = {"cells": "expected effects", "generated": "the same cells"}
    body = [
        [
            row["screen"],
            row["labels"],
            scored[row["reference"]],
            _NAMES.get(row["metric"], row["metric"]),
            row["cell_eval"],
            _number(row["spearman"], 2),
            row["best_here"],
            row["best_there"],
            f"{row['n_predictors']}",
        ]
        for _, row in found.iterrows()
    ]
    caption = (
        "Rank correlation of the predictors' means over the seeds that it scored. cell-eval scores "
        "cells that predictors generate, at most a hundred of a label: noise ranks predictors that "
        "are close. The tables of this page score expected effects. Where the same cells are "
        "scored here, what is left is a difference of definitions."
    )
    words = ["labels", "scored here", "metric here", "cell-eval's", "best here", "best there"]
    return Section(
        "agreement", "As cell-eval ranks them", [Table("Agreement", head, body, caption, words)]
    )


def _costs(benchmark: Benchmark, result: BenchmarkResult) -> Section:
    rows = result.scores[result.scores["reference"] == "run"]
    order = [one.name for one in benchmark.all_predictors]
    tables: list[Block] = []
    for screen in benchmark.screens:
        some = rows[rows["screen"] == screen.name]
        if len(some):
            tables.append(_metric_table(screen.name, some, _COSTS, order, benchmark.ours))
    if len(result.choices):
        head = ["predictor", "screen", "chosen", "density (nats/cell)", "candidates"]
        body = [
            [
                row["predictor"],
                row["screen"],
                " ".join(row["settings"]) or "as configured",
                f"{row['density']:.2f}",
                f"{row['n_candidates']}"
                + (f", {row['n_failed']} failed" if row["n_failed"] else ""),
            ]
            for _, row in result.choices.iterrows()
        ]
        caption = (
            f"By the held-out density of validation cells under seed {benchmark.tuning_seed} and "
            "the first split; no test cell was there."
        )
        tables.append(Table("Settings chosen", head, body, caption, words=["screen", "chosen"]))
    return Section("costs", "Settings and costs", tables)


# ----------------------------------------------------------------------------------------- writing


def _spread(values: pd.Series | None) -> str:
    """Return mean and standard deviation as text."""
    if values is None or values.dropna().empty:
        return "–"
    known = values.dropna()
    digits = 1 if known.abs().mean() >= 100 else 3
    text = _number(known.mean(), digits)
    return text if len(known) < 2 else f"{text} ± {known.std(ddof=1):.{digits}f}"


def _number(value: Any, digits: int = 3) -> str:
    return "–" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")


def _signed(value: Any) -> str:
    return "–" if pd.isna(value) else f"{value:+.3f}".replace("-", "−")


def _range(low: Any, high: Any) -> str:
    return "–" if pd.isna(low) else f"{_signed(low)} to {_signed(high)}"
