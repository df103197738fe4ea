"""Measure the tools of model criticism on trained runs: comparison by PSIS-LOO.

    python docs/results/make_criticism.py loo --run RUN --ablation RUN --data SCREEN.h5ad

Prints one line per figure, and writes them to ``criticism.csv`` beside this file. Runs are trained
with ``cradle-pyro train``, the ablation with ``--set data.artifact=none`` and the same split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

import cradle_pyro as cp
from cradle_pyro.evaluation.metrics import log_mean_exp

HERE = Path(__file__).parent
LARGEST_K = 0.7
Figures = Iterator[tuple[str, float]]


def loo(options: argparse.Namespace) -> Figures:
    """Yield how well the model predicts cells with and without the artifact latents.

    PSIS-LOO asks how training cells would be predicted by a posterior without them; the test cells
    are predicted by one without them as it is, so that the mean over draws of the globals is their
    density and needs no importance weights. Networks and dispersions are point estimates, which
    only test cells judge. Densities are those of whole cells given the globals
    (:func:`cradle_pyro.to_arviz`). A run without artifacts conditions on no flags: the same cells
    are compared, given their libraries and, for one of the two, their flags.
    """
    import arviz as az

    by_run, test = {}, {}
    for name, run in (("CRADLE", options.run), ("no artifact latent", options.ablation)):
        posterior = cp.load(run)
        screen = cp.prepare(anndata.read_h5ad(options.data), posterior.config).data
        # Independent draws: their effective number is their number.
        export = densities(posterior, screen.where(split="train"), options)
        found = by_run[name] = az.loo(export, pointwise=True, reff=1.0)
        n_cells = export["log_likelihood"].sizes["cells"]
        yield f"{name}: training cells", n_cells
        yield f"{name}: elpd_loo per training cell", found.elpd_loo / n_cells
        yield f"{name}: p_loo per training cell", found.p_loo / n_cells
        for k in (found.good_k, LARGEST_K):
            yield f"{name}: share of Pareto k > {k:.2f}", (found.pareto_k.values > k).mean()
        export = densities(posterior, screen.where(split="test"), options)
        draws = export["log_likelihood"]["counts"].stack(sample=("chain", "draw")).values
        test[name] = log_mean_exp(draws, axis=1)
        yield f"{name}: log density per test cell", test[name].mean()
    yield from difference(
        "training cells, elpd_loo", *(one.loo_i.values for one in by_run.values())
    )
    yield from difference("test cells, log density", *test.values())
    sys.stdout.write(f"{az.compare(by_run).to_string()}\n")


def densities(posterior: cp.Posterior, data: cp.CellData, options: argparse.Namespace) -> Any:
    """Return log densities of cells of one split, the same cells for all runs with this split."""
    return cp.to_arviz(
        posterior, data.random_subset(options.cells, seed=0), draws=options.draws, prior=False,
        genes=posterior.schema.genes[:1], particles=options.particles, seed=options.seed,
    )  # fmt: skip


def difference(what: str, first: np.ndarray, second: np.ndarray) -> Figures:
    """Yield the mean difference per cell and its standard error."""
    yield f"{what}: difference per cell", (first - second).mean()
    yield f"{what}: its standard error", (first - second).std(ddof=1) / len(first) ** 0.5


SECTIONS: dict[str, Callable[[argparse.Namespace], Figures]] = {"loo": loo}


def main() -> None:
    """Measure what was asked for, print it, and add it to the table."""
    import warnings

    # What ArviZ says of Pareto k is among the figures.
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--run", type=Path, help="directory of a trained run")
    parser.add_argument("--ablation", type=Path, help="a run without artifact latents")
    parser.add_argument("--data", type=Path, help="the screen both were trained on")
    parser.add_argument("--cells", type=int, default=300, help="cells of each split")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = HERE / "criticism.csv"
    for section in options.sections:
        rows = []
        for name, value in SECTIONS[section](options):
            sys.stdout.write(f"{section}: {name}: {value:.6g}\n")
            sys.stdout.flush()
            rows.append({"section": section, "figure": name, "value": float(value)})
        old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(rows[0]))
        old = old[old["section"] != section]
        table = pd.DataFrame(rows) if old.empty else pd.concat([old, pd.DataFrame(rows)])
        table.to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
