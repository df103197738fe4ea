"""Tables of an evaluation, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from cradle_pyro.evaluation.evaluate import CEILING, MODEL, Evaluation

__all__ = ["markdown", "render", "write_text_report"]

_METRICS = {
    "ate_rho": "ATE-ρ",
    "ate_r2": "ATE-R²",
    "ate_rho_top20": "ρ top 20",
    "ate_rho_top50": "ρ top 50",
    "jaccard_top20": "Jaccard 20",
    "jaccard_top50": "Jaccard 50",
}
_TITLES = {
    ("cells", "seen"): "Held-out cells, seen perturbations",
    ("cells", "held_out"): "Held-out cells, held-out perturbations",
    ("truth", "seen"): "Known truth, seen perturbations",
    ("truth", "held_out"): "Known truth, held-out perturbations",
}


def render(evaluation: Evaluation) -> Iterator[Table]:
    """Yield one terminal table per reference and set of labels, then the facts."""
    for title, rows in _blocks(evaluation):
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("predictor")
        for heading in _METRICS.values():
            table.add_column(heading, justify="right")
        for predictor, values in rows.iterrows():
            style = "bold" if predictor == MODEL else "dim" if predictor == CEILING else None
            table.add_row(str(predictor), *(_number(value) for value in values), style=style)
        yield table
    facts = Table(title="Cells", title_justify="left", show_header=False)
    for name, value in _facts(evaluation):
        facts.add_row(name, value)
    yield facts


def markdown(evaluation: Evaluation) -> str:
    """Return the same tables as Markdown."""
    lines = ["# Evaluation", ""]
    for title, rows in _blocks(evaluation):
        lines += [f"## {title}", "", "| predictor | " + " | ".join(_METRICS.values()) + " |"]
        lines.append("|---|" + "---:|" * len(_METRICS))
        for predictor, values in rows.iterrows():
            name = f"**{predictor}**" if predictor == MODEL else str(predictor)
            lines.append(f"| {name} | " + " | ".join(_number(v) for v in values) + " |")
        lines.append("")
    lines += ["## Cells", "", "| | |", "|---|---:|"]
    lines += [f"| {name} | {value} |" for name, value in _facts(evaluation)]
    return "\n".join(lines) + "\n"


def write_text_report(evaluation: Evaluation, path: str | Path) -> Path:
    """Write the Markdown tables and return their path."""
    path = Path(path)
    path.write_text(markdown(evaluation), encoding="utf-8")
    return path


def _blocks(evaluation: Evaluation) -> Iterator[tuple[str, pd.DataFrame]]:
    table = evaluation.table(list(_METRICS))
    for key in dict.fromkeys(index[:2] for index in table.index):
        rows = table.loc[key]
        n_labels = evaluation.scores.query("reference == @key[0] and labels == @key[1]")["n_labels"]
        yield f"{_TITLES[key]} ({int(n_labels.iloc[0])} labels)", rows


def _facts(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
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
            yield f"generated cells that pass QC at {n_mads} MAD (real cells)", f"{rate:.1%} ({real:.1%})"
    if "cleaned" in facts.get("profiles", {}):
        profiles = facts["profiles"]
        yield "RMSE of failing cells' profiles: raw", f"{profiles['raw']:.3f}"
        yield "RMSE: mean passing cell of the perturbation", f"{profiles['mean_passing']:.3f}"
        yield (
            "RMSE: this model under artifact = 0",
            f"{profiles['cleaned']:.3f} ({profiles['cleaned_over_mean_passing']:.2f} x mean, "
            f"{profiles['cleaned_over_raw']:.2f} x raw)",
        )


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"
