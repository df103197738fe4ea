"""Print the README's table of results from ``main/scores.csv``: mean ATE-rho over seeds and splits.

python docs/results/make_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

SCORES = Path(__file__).parent / "main" / "scores.csv"
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


def main() -> None:
    """Print the table; the best predictor of a row in bold, the truth has no ceiling."""
    scores = pd.read_csv(SCORES, dtype={"seed": str})
    scores = scores[scores["metric"] == "ate_rho"]
    means = scores.pivot_table(
        index=["screen", "reference", "labels"], columns="predictor", values="value"
    )
    seeds = ", ".join(sorted(scores["seed"].unique()))
    lines = [f"| ATE-ρ, mean of seeds {seeds} | {' | '.join(COLUMNS.values())} |"]
    lines.append("|---|" + "---:|" * len(COLUMNS))
    for name, place in ROWS.items():
        row = means.loc[place].reindex(list(COLUMNS))
        if place[1] == "truth":
            row["ceiling"] = float("nan")
        best = row.drop("ceiling").max()
        cells = ["" if pd.isna(v) else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
