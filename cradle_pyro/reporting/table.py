"""Tables of an evaluation, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cradle_pyro.evaluation.evaluate import CEILING, MODEL, Evaluation

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "METRIC_NAMES",
    "PART_TITLES",
    "facts_of",
    "markdown",
    "predictor_name",
    "render",
    "render_frame",
    "strongest_effects",
    "write_text_report",
]

METRIC_NAMES = {
    "ate_rho": "ATE-ρ",
    "ate_r2": "ATE-R²",
    "ate_rho_top20": "ρ top 20",
    "ate_rho_top50": "ρ top 50",
    "jaccard_top20": "Jaccard 20",
    "jaccard_top50": "Jaccard 50",
}
_PREDICTORS = {
    MODEL: "this model",
    "no_change": "no change",
    "global_mean": "mean effect of all",
    "training_mean_all": "mean, all cells",
    "training_mean_passing": "mean, passing cells",
    "additive": "additive",
    "empirical_bayes": "empirical Bayes",
    CEILING: "ceiling (split-half)",
}
PART_TITLES = {
    ("cells", "seen"): "Held-out cells, seen perturbations",
    ("cells", "held_out"): "Held-out cells, held-out perturbations",
    ("truth", "seen"): "Known truth, seen perturbations",
    ("truth", "held_out"): "Known truth, held-out perturbations",
}


def render(evaluation: Evaluation) -> Iterator[Table]:
    """Yield one terminal table per reference and set of labels, then the facts (80 columns)."""
    for title, rows in _blocks(evaluation):
        table = _table(title, show_header=True)
        table.add_column("predictor", no_wrap=True)
        for heading in METRIC_NAMES.values():
            # The last word on a line of its own: "Jaccard" over "20".
            table.add_column("\n".join(heading.split(" ", 1)), justify="right", no_wrap=True)
        for predictor, values in rows.iterrows():
            style = "bold" if predictor == MODEL else "dim" if predictor == CEILING else None
            table.add_row(
                predictor_name(predictor), *(_number(value) for value in values), style=style
            )
        yield table
    facts = _table("Cells", show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(justify="right", no_wrap=True)
    for name, value in facts_of(evaluation):
        facts.add_row(name, value)
    yield facts


def _table(title: str, *, show_header: bool) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=SIMPLE_HEAD,
        show_header=show_header,
        pad_edge=False,
    )


def strongest_effects(effects: AnnData, label: str, most: int = 10) -> pd.DataFrame:
    """Return the genes on which a perturbation's effect is largest, for a table.

    Parameters
    ----------
    effects
        From :func:`~cradle_pyro.effects`; a layer ``truth`` is shown too.
    label
        Which perturbation.
    most
        Number of genes.
    """
    row = effects[label]
    order = np.argsort(-np.abs(np.asarray(row.X).ravel()))[:most]
    values = {
        "effect": np.asarray(row.X).ravel(),
        "from": np.asarray(row.layers["ci_low"]).ravel(),
        "to": np.asarray(row.layers["ci_high"]).ravel(),
        "lfsr": np.asarray(row.layers["lfsr"]).ravel(),
    }
    if "truth" in row.layers:
        values["true effect"] = np.asarray(row.layers["truth"]).ravel()
    return pd.DataFrame(values, index=effects.var_names.rename("gene")).iloc[order]


def render_frame(title: str, frame: pd.DataFrame) -> Table:
    """Return a terminal table of numbers with a column of names."""
    table = _table(title, show_header=True)
    table.add_column(str(frame.index.name or ""), no_wrap=True)
    for heading in frame.columns:
        table.add_column(str(heading), justify="right", no_wrap=True)
    for name, values in frame.iterrows():
        table.add_row(str(name), *(_number(value) for value in values))
    return table


def _markdown_frame(title: str, frame: pd.DataFrame) -> list[str]:
    head = [str(frame.index.name or ""), *map(str, frame.columns)]
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * len(frame.columns))
    for name, values in frame.iterrows():
        lines.append(f"| {name} | " + " | ".join(_number(v) for v in values) + " |")
    return [*lines, ""]


def markdown(evaluation: Evaluation, answers: Mapping[str, pd.DataFrame] | None = None) -> str:
    """Return the same tables as Markdown, after the answers to questions (title to table)."""
    lines = []
    if answers:
        lines += ["# Answers", ""]
        for title, frame in answers.items():
            lines += _markdown_frame(title, frame)
    lines += ["# Evaluation", ""]
    for title, rows in _blocks(evaluation):
        names = [
            f"**{predictor_name(p)}**" if p == MODEL else predictor_name(p) for p in rows.index
        ]
        frame = rows.set_axis(pd.Index(names, name="predictor"))
        lines += _markdown_frame(title, frame.set_axis(list(METRIC_NAMES.values()), axis=1))
    lines += ["## Cells", "", "| | |", "|---|---:|"]
    lines += [f"| {name} | {value} |" for name, value in facts_of(evaluation)]
    return "\n".join(lines) + "\n"


def write_text_report(
    evaluation: Evaluation, path: str | Path, answers: Mapping[str, pd.DataFrame] | None = None
) -> Path:
    """Write the Markdown tables and return their path."""
    path = Path(path)
    path.write_text(markdown(evaluation, answers), encoding="utf-8")
    return path


def _blocks(evaluation: Evaluation) -> Iterator[tuple[str, pd.DataFrame]]:
    table = evaluation.table(list(METRIC_NAMES))
    for key in dict.fromkeys(index[:2] for index in table.index):
        rows = table.loc[key]
        n_labels = evaluation.scores.query("reference == @key[0] and labels == @key[1]")["n_labels"]
        size = int(n_labels.iloc[0])
        yield f"{PART_TITLES[key]} ({size} label{'' if size == 1 else 's'})", rows


def predictor_name(predictor: object) -> str:
    """Return how a predictor is called in tables."""
    return _PREDICTORS.get(str(predictor), str(predictor).replace("_", " "))


def facts_of(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """Yield name and value, as text, of what an evaluation says beside its scores."""
    facts: dict[str, Any] = evaluation.facts
    yield "training / test cells", f"{facts['n_train']:,} / {facts['n_test']:,}"
    yield "cells with an artifact flag", f"{facts['failing_share']:.1%}"
    if "density" in facts:
        density = facts["density"]
        yield (
            "held-out density (IWELBO, nats per cell)",
            f"{density['iwelbo_nats_per_cell']:.1f} ± {density['standard_error'] or 0:.1f}",
        )
    if "generated_qc" in facts:
        for n_mads, rate in facts["generated_qc"]["pass_rate"].items():
            real = facts["generated_qc"]["real_pass_rate"][n_mads]
            yield f"generated cells passing QC, {n_mads} MAD (real)", f"{rate:.1%} ({real:.1%})"
    if "cleaned" in facts.get("profiles", {}):
        profiles = facts["profiles"]
        yield "failing cells, RMSE of the raw profile", f"{profiles['raw']:.3f}"
        yield "failing cells, RMSE of mean passing cell", f"{profiles['mean_passing']:.3f}"
        yield "failing cells, RMSE under artifact = 0", f"{profiles['cleaned']:.3f}"
        yield "  relative to mean passing cell", f"{profiles['cleaned_over_mean_passing']:.2f}"
        yield "  relative to raw", f"{profiles['cleaned_over_raw']:.2f}"
    if "as_control" in facts.get("controls", {}):
        controls = facts["controls"]
        yield "perturbed cells as control, RMSE of mean control", f"{controls['mean_control']:.3f}"
        yield "perturbed cells as control, RMSE", f"{controls['as_control']:.3f}"
        yield "  relative to mean control", f"{controls['as_control_over_mean_control']:.2f}"
        yield "correlation of single cells' own effects", f"{controls['individual']:.2f}"
    if "intervals" in facts:
        intervals = facts["intervals"]
        yield "95 % intervals holding true effects > 0.1", f"{intervals['coverage']:.1%}"
        yield "95 % intervals holding the truth, all genes", f"{intervals['coverage_all']:.1%}"
        yield "wrong signs among calls at 10 %", f"{intervals['false_sign_rate']:.1%}"


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"
