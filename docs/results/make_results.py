"""Run the acceptance screens and write the table of results; resumes where it stopped.

    python docs/results/make_results.py demo papalexi norman gasperini

Every run appends its scores to ``scores.csv`` beside this file; the tables in ``README.md`` are
made from it. Real screens are read from ``../shared/data`` (or ``$CRADLE_SCREENS``).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import cradle_pyro as cp
from cradle_pyro.evaluation.evaluate import CEILING, MODEL
from cradle_pyro.evaluation.truth import truth_of
from cradle_pyro.workflow import DEMO_SETTINGS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCREENS = Path(os.environ.get("CRADLE_SCREENS", ROOT.parent / "shared" / "data"))
SCORES = Path(os.environ.get("CRADLE_SCORES", HERE / "scores.csv"))
NORMAN_PAIRS = (
    "MAP2K3+MAP2K6",
    "MAP2K3+SLC38A2",
    "KLF1+MAP2K6",
    "KLF1+TGFBR2",
    "MAPK1+TGFBR2",
)


class Run(NamedTuple):
    """One training: a screen, a seed, the configuration, and the pair that is left out."""

    screen: str
    seed: int
    config: cp.Config
    path: Path | None
    left_out: str = ""


def runs(screen: str, n_seeds: int) -> Iterator[Run]:
    """Yield the runs of a screen."""
    for seed in range(n_seeds):
        seeds = [f"split.seed={seed}", f"train.seed={seed}"]
        if screen == "demo":
            yield Run(screen, seed, cp.Config().with_settings([*DEMO_SETTINGS, *seeds]), None)
        elif screen == "norman":
            config = cp.Config.from_toml(ROOT / "configs" / "norman_panel.toml")
            for pair in NORMAN_PAIRS:
                settings = [*seeds, "split.method=combinations", f"split.held_out=['{pair}']"]
                path = SCREENS / "norman2019_crispra_combos.h5ad"
                yield Run(screen, seed, config.with_settings(settings), path, pair)
        else:
            files = {
                "papalexi": "papalexi2021_eccite.h5ad",
                "gasperini": "gasperini2019_highmoi.h5ad",
            }
            config = cp.Config.from_toml(ROOT / "configs" / f"{screen}.toml")
            yield Run(screen, seed, config.with_settings(seeds), SCREENS / files[screen])


def execute(run: Run) -> pd.DataFrame:
    """Train and evaluate; return tidy scores."""
    import anndata

    start = time.perf_counter()
    adata = (
        cp.simulate_perturbseq(seed=run.seed) if run.path is None else anndata.read_h5ad(run.path)
    )
    prepared = cp.prepare(adata, run.config)
    posterior = cp.fit(prepared.data, run.config, progress=False)
    trained = time.perf_counter() - start
    evaluation = cp.evaluate(posterior, prepared.data, truth=truth_of(prepared.adata))
    extra = {f"profile_{k}": v for k, v in evaluation.facts.get("profiles", {}).items()}
    for part in ("controls", "intervals"):
        extra |= {f"{part}_{k}": v for k, v in evaluation.facts.get(part, {}).items()}
    extra |= {
        "iwelbo": evaluation.facts["density"]["iwelbo_nats_per_cell"],
        "epochs": len(posterior.history),
        "seconds_to_train": trained,
        "failing_share": evaluation.facts["failing_share"],
    }
    qc = evaluation.facts["generated_qc"]
    extra |= {f"qc_pass_{mads}": value for mads, value in qc["pass_rate"].items()}
    facts = pd.DataFrame(
        [
            {
                "reference": "run",
                "labels": "",
                "predictor": MODEL,
                "metric": k,
                "value": v,
                "n_labels": 0,
            }
            for k, v in extra.items()
        ]
    )
    table = pd.concat([evaluation.scores, facts], ignore_index=True)
    return table.assign(screen=run.screen, seed=run.seed, left_out=run.left_out)


def summary(scores: pd.DataFrame) -> str:
    """Return Markdown tables: mean and standard deviation over runs."""
    lines = ["# Results", "", (HERE / "preface.md").read_text(encoding="utf-8"), ""]
    metrics = ["ate_rho", "ate_r2", "ate_rho_per_perturbation", "ate_rho_top20", "ate_rho_top50",
               "jaccard_top20", "jaccard_top50"]  # fmt: skip
    scored = scores[scores["metric"].isin(metrics)]
    for (screen, reference, labels), block in scored.groupby(
        ["screen", "reference", "labels"], sort=False
    ):
        n_runs = len(block[["seed", "left_out"]].drop_duplicates())
        n_seeds = block["seed"].nunique()
        lines += [f"## {screen}: {reference}, {labels} ({n_runs} runs, {n_seeds} seeds)", ""]
        lines += ["| predictor | " + " | ".join(metrics) + " |", "|---|" + "---:|" * len(metrics)]
        for predictor, rows in block.groupby("predictor", sort=False):
            cells = []
            for metric in metrics:
                values = rows.loc[rows["metric"] == metric, "value"].dropna()
                text = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else "–"
                cells.append(text)
            name = f"**{predictor}**" if predictor == MODEL else predictor
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
        lines += _gaps(block)
    lines += _facts(scores)
    return "\n".join(lines) + "\n"


def _gaps(block: pd.DataFrame) -> list[str]:
    """Return the model's paired differences in ATE-rho."""
    wide = block[block["metric"] == "ate_rho"].pivot_table(
        index=["seed", "left_out"], columns="predictor", values="value"
    )
    lines = []
    for other in wide.columns:
        if other in (MODEL, CEILING):
            continue
        gap = wide[MODEL] - wide[other]
        by_seed = gap.groupby("seed").mean()
        spread = f" ± {by_seed.std(ddof=1):.3f}" if len(by_seed) > 1 else ""
        lines.append(f"- {MODEL} minus {other}: {gap.mean():+.3f}{spread} (sd over seeds)")
    return [*lines, ""]


def _facts(scores: pd.DataFrame) -> list[str]:
    facts = scores[scores["reference"] == "run"]
    lines = ["## Runs", "", "| screen | quantity | mean | sd | runs |", "|---|---|---:|---:|---:|"]
    for (screen, metric), rows in facts.groupby(["screen", "metric"], sort=False):
        values = rows["value"]
        lines.append(
            f"| {screen} | {metric} | {values.mean():.4g} "
            f"| {values.std(ddof=1):.2g} | {len(rows)} |"
        )
    return lines


def main() -> None:
    """Run what is missing and rewrite the tables."""
    import warnings

    from cradle_pyro.errors import DataWarning

    warnings.simplefilter("ignore", DataWarning)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("screens", nargs="*", default=["demo", "papalexi", "norman", "gasperini"])
    parser.add_argument("--seeds", type=int, default=0, help="0: five for the demo, else three")
    options = parser.parse_args()
    for screen in options.screens:
        for run in runs(screen, options.seeds or (5 if screen == "demo" else 3)):
            done = pd.read_csv(SCORES, keep_default_na=False) if SCORES.exists() else None
            if (
                done is not None
                and (
                    (done["screen"] == run.screen)
                    & (done["seed"] == run.seed)
                    & (done["left_out"] == run.left_out)
                ).any()
            ):
                continue
            table = execute(run)
            table.to_csv(SCORES, mode="a", header=done is None, index=False, float_format="%.6g")
            rho = table[(table["metric"] == "ate_rho") & (table["predictor"] == MODEL)]
            shown = ", ".join(f"{r.reference} {r.labels} {r.value:.3f}" for r in rho.itertuples())
            sys.stdout.write(f"{run.screen} seed {run.seed} {run.left_out}: ATE-rho {shown}\n")
            sys.stdout.flush()
    scores = pd.read_csv(SCORES, na_values=[""], keep_default_na=True)
    scores["left_out"] = scores["left_out"].fillna("")
    (HERE / "README.md").write_text(summary(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
