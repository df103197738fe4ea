"""Print the README's tables of results, from what the benchmarks left beside this file.

python docs/results/make_table.py [main | scenarios | ablations]
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
ROWS = {
    "simulated, true effects, seen": ("default", "truth", "seen"),
    "simulated, true effects, held-out pairs": ("default", "truth", "held_out"),
    "confounded, true effects, seen": ("confounded", "truth", "seen"),
    "confounded, true effects, held-out pairs": ("confounded", "truth", "held_out"),
    "ten cells each, true effects, seen": ("10_cells", "truth", "seen"),
    "ten cells each, true effects, held-out pairs": ("10_cells", "truth", "held_out"),
    "Papalexi 2021, held-out cells": ("papalexi", "cells", "seen"),
    "Norman 2019 panel, held-out cells, seen": ("norman_panel", "cells", "seen"),
    "Norman 2019 panel, pair left out": ("norman_panel", "cells", "held_out"),
    "Gasperini 2019 panel, held-out cells": ("gasperini", "cells", "seen"),
}
COLUMNS = {
    "cradle": "this model",
    "cradle_passing": "failing cells discarded",
    "training_mean_passing": "mean of passing cells",
    "additive": "additive",
    "empirical_bayes": "empirical Bayes",
    "glm": "regression",
    "glm_all": "regression, all cells",
    "linear": "linear",
    "published_cradle": "published CRADLE",
    "sams_vae": "SAMS-VAE",
    "ceiling": "ceiling",
}
# What changes, and the screens with less and more of it; "default" and others are in main.
SCENARIOS = {
    "5 % of cells with an artifact": "artifacts_0.05",
    "20 % (default)": "default",
    "35 %": "artifacts_0.35",
    "50 %": "artifacts_0.5",
    "failing independent of the perturbation": "confounding_0.0",
    "strong perturbations fail most": "confounded",
    "10 training cells each": "10_cells",
    "30": "30_cells",
    "100": "100_cells",
    "no pair in training": "pairs_0.0",
    "a quarter of the pairs": "pairs_0.25",
    "half": "pairs_0.5",
    "effects half as large": "small_effects",
}
ABLATIONS = {
    "nothing": "cradle",
    "no direct effects on genes": "no_gene_effect",
    "no effects on latents": "no_latent_effect",
    "mean-field guide": "mean_field",
    "decoder sees all three states apart (concat)": "combine_concat",
    "decoder sees their sum": "combine_sum",
    "hidden layers in the decoder": "hidden_layers",
    "the same, no linear path": "no_linear_path",
    "flags not used": "flags_none",
    "one flag for all artifacts": "flags_any",
    "no artifact latents": "no_artifact_latent",
    "no artifact risk": "no_artifact_risk",
    "no shift of depth": "no_depth_shift",
    "no counterfactual term": "counterfactual_none",
    "KL term": "counterfactual_kl",
    "partner term": "counterfactual_partner",
    "β = 0.3": "beta_0.3",
    "β = 3": "beta_3",
    "mask prior 0.1 for 0.01": "mask_0.1",
    "8 latents for 16": "latents_8",
    "32 latents": "latents_32",
    "5 particles for 1": "particles_5",
}
SHOWN = ("cradle", "cradle_passing", "glm_all")
CORRUPTED = "papalexi_corrupted"
_RULE = "---:|"


def read(name: str, table: str = "scores") -> pd.DataFrame:
    """Return a table of a benchmark; empty if it did not run."""
    path = HERE / name / f"{table}.csv"
    return pd.read_csv(path, dtype={"seed": str}) if path.is_file() else pd.DataFrame()


def main_table() -> list[str]:
    """Return the main table; the best predictor of a row in bold, the truth has no ceiling."""
    scores = read("main")
    scores = scores[scores["metric"] == "ate_rho"]
    means = _means(scores)
    seeds = ", ".join(sorted(scores["seed"].unique()))
    lines = [f"| ATE-ρ, mean of seeds {seeds} | {' | '.join(COLUMNS.values())} |"]
    lines.append("|---|" + _RULE * len(COLUMNS))
    for name, place in ROWS.items():
        row = means.loc[place].reindex(list(COLUMNS))
        if place[1] == "truth":
            row["ceiling"] = float("nan")
        lines.append(f"| {name} | {' | '.join(_marked(row, row.drop('ceiling').max()))} |")
    return lines


def scenario_table() -> list[str]:
    """Return this model, and it without failing cells, in every scenario, against the truth."""
    scores = pd.concat([read("main"), read("scenarios")])
    comparisons = pd.concat([read("main", "comparisons"), read("scenarios", "comparisons")])
    means = _means(scores[scores["metric"] == "ate_rho"])
    part = ["this model", "without failing cells", "regression, all cells", "difference"]
    lines = [f"| | seen: {' | '.join(part)} | pairs: {' | '.join(part)} |", "|---|" + _RULE * 8]
    for name, screen in SCENARIOS.items():
        cells = []
        for labels in ("seen", "held_out"):
            place = (screen, "truth", labels)
            row = means.loc[place, list(SHOWN)]
            cells += [*map("{:.3f}".format, row), _difference(comparisons, place)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    place = (CORRUPTED, "cells", "seen")
    row = means.loc[place, list(SHOWN)]
    cells = [*map("{:.3f}".format, row), _difference(comparisons, place), *[""] * 4]
    return [*lines, f"| Papalexi, a quarter of the passing cells corrupted | {' | '.join(cells)} |"]


def ablation_table() -> list[str]:
    """Return every variant's truth, density and leakage on the simulated screen, and Papalexi's."""
    places = ["screen", "reference", "labels", "metric", "predictor"]
    values = read("ablations").set_index(places)["value"].sort_index()
    columns = {
        "seen": ("default", "truth", "seen", "ate_rho"),
        "held-out pairs": ("default", "truth", "held_out", "ate_rho"),
        "density": ("default", "model", "all", "iwelbo_val"),
        "leakage": ("default", "model", "all", "leakage_artifact_knn"),
        "Papalexi": ("papalexi", "cells", "seen", "ate_rho"),
        "density, Papalexi": ("papalexi", "model", "all", "iwelbo_val"),
    }
    table = pd.DataFrame({name: values.loc[place] for name, place in columns.items()})
    lines = [f"| changed | {' | '.join(columns)} |", "|---|" + _RULE * len(columns)]
    for change, variant in ABLATIONS.items():
        row = table.loc[variant]
        cells = [f"{v:.1f}" if "density" in name else f"{v:.3f}" for name, v in row.items()]
        lines.append(f"| {change} | {' | '.join(cells).replace('-', '−')} |")
    return lines


def _means(scores: pd.DataFrame) -> pd.DataFrame:
    return scores.pivot_table(
        index=["screen", "reference", "labels"], columns="predictor", values="value"
    )


def _marked(row: pd.Series, best: float) -> list[str]:
    return ["" if pd.isna(v) else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in row]


def _difference(comparisons: pd.DataFrame, place: tuple[str, str, str]) -> str:
    rows = comparisons[
        (comparisons["metric"] == "ate_rho")
        & (comparisons["ours"] == "cradle")
        & (comparisons["other"] == "cradle_passing")
    ].set_index(["screen", "reference", "labels"])
    row = rows.loc[place]
    ends = (f"{row[end]:+.3f}".replace("-", "−") for end in ("mean", "ci_low", "ci_high"))
    return "{} ({} to {})".format(*ends)


TABLES = {"main": main_table, "scenarios": scenario_table, "ablations": ablation_table}


def main() -> None:
    """Print one table, or the main one."""
    lines = TABLES[sys.argv[1] if len(sys.argv) > 1 else "main"]()
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
