"""Measure calibration: of the method on a model with an exact posterior, then of a trained run.

    python docs/results/make_sbc.py --run runs/demo --data runs/demo.h5ad

Prints one line per figure and writes them to ``calibration.csv`` beside this file. The screen is a
simulated one, with its truth; what is not about effects is measured on its test cells.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import stats

import cradle_pyro as cp
from cradle_pyro.evaluation.calibration import (
    coverage_curve,
    interval_coverage,
    rank_spread,
    rank_statistics,
    simulation_based_calibration,
    uniformity,
)
from cradle_pyro.evaluation.criticism import (
    basal_ranks,
    count_calibration,
    latent_diagnostics,
    predictive_check,
)
from cradle_pyro.evaluation.truth import truth_of
from cradle_pyro.queries.effects import effect_draws, effects
from cradle_pyro.simulate.linear_gaussian import simulate_linear_gaussian

TABLE = Path(__file__).parent / "calibration.csv"
N_DRAWS = 99
PRIOR_SD = 0.8
LEVELS = (0.5, 0.8, 0.95)
RESPONDS = 0.1
N_EXPRESSED = 100
Figures = Iterator[tuple[str, float]]


def linear_gaussian(width: float, seed: int, n_simulations: int = 400) -> Figures:
    """Yield p-values of the linear-Gaussian model's ranks, its posterior sd times `width`."""
    oracle, cells = simulate_linear_gaussian(
        n_cells=12, n_genes=5, n_latents=2, n_perturbations=2, n_artifacts=1, seed=1
    )
    d, a = cells.d, np.ones_like(cells.a)

    def simulate(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], Any]:
        effect = rng.normal(scale=PRIOR_SD, size=oracle.effect.shape)
        model = dataclasses.replace(oracle, effect=effect)
        made = model.sample((d, a), rng=rng)
        return {"latents": np.concatenate([made.z, made.w], 1), "effects": effect}, (model, made.x)

    def infer(data: Any, n_draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        model, x = data
        exact = model.posterior(x, d, a)
        mean, covariance = oracle.effect_posterior(x, d, a, prior_sd=PRIOR_SD)
        effects = draw(mean.reshape(1, -1), covariance[None], width, n_draws, rng)
        return {
            "latents": draw(exact.mean, exact.covariance, width, n_draws, rng),
            "effects": effects.reshape(n_draws, *mean.shape),
        }

    ranks = simulation_based_calibration(
        simulate, infer, n_simulations=n_simulations, n_draws=N_DRAWS, seed=seed
    )
    ranks["latents"] = ranks["latents"].reshape(-1, ranks["latents"].shape[-1])
    for name, own in ranks.items():
        columns = own.reshape(len(own), -1).T
        p_values = [uniformity(column, N_DRAWS).p_value for column in columns]
        yield f"{name}: ranks each", len(own)
        yield f"{name}: smallest p of {len(columns)}", min(p_values)
        yield f"{name}: largest p of {len(columns)}", max(p_values)


def draw(
    mean: np.ndarray, covariance: np.ndarray, width: float, n_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Return draws of Gaussians (rows, k) with their standard deviations times `width`."""
    root = width * np.linalg.cholesky(covariance)
    noise = rng.normal(size=(n_draws, *mean.shape))
    return mean + np.einsum("nij,snj->sni", root, noise)


def basal(posterior: cp.Posterior, test: cp.CellData, seed: int) -> Figures:
    """Yield how uniform the ranks of basal states are, of cells that the model generates."""
    ranks = basal_ranks(posterior, test, n_draws=N_DRAWS, seed=seed)
    p_values = np.array([uniformity(column, N_DRAWS).p_value for column in ranks.T])
    spread = np.array([rank_spread(column, N_DRAWS) for column in ranks.T])
    wrong = p_values < 0.01
    yield "cells", len(ranks)
    yield "latents", len(p_values)
    yield "latents with p < 0.01", wrong.sum()
    yield "of which too narrow (rank variance above uniform)", (wrong & (spread > 1)).sum()
    yield "of which too wide (rank variance below uniform)", (wrong & (spread < 1)).sum()
    yield "rank variance over uniform, mean", spread.mean()
    yield "rank variance over uniform, smallest", spread.min()
    yield "rank variance over uniform, largest", spread.max()
    yield "mean rank / n_draws, furthest from 0.5", furthest(ranks.mean(0) / N_DRAWS)


def furthest(shares: np.ndarray) -> float:
    """Return the share that is furthest from one half."""
    return float(shares[np.abs(shares - 0.5).argmax()])


def effect(posterior: cp.Posterior, adata: anndata.AnnData, seed: int) -> Figures:
    """Yield coverage and rank uniformity of average effects against the truth.

    Intervals of `effects` are wider than those of the draws: they also hold what an effect would
    be, if there were one.
    """
    truth = truth_of(adata)
    if truth is None:
        raise SystemExit("The screen has no truth: give one made by simulate_perturbseq.")
    draws = effect_draws(posterior, truth.labels, draws=N_DRAWS, seed=seed)
    large = np.abs(truth.effects) > RESPONDS
    for name, chosen in (
        ("|true effect| > 0.1", large),
        ("all entries", large | ~large),
    ):
        curve = coverage_curve(draws[:, chosen], truth.effects[chosen], LEVELS)
        yield f"{name}: entries", curve["n"].iloc[0]
        for level, coverage in zip(curve["level"], curve["coverage"], strict=True):
            yield f"{name}: coverage at {level:.0%}", coverage
    table = effects(posterior, truth.labels, draws=N_DRAWS, seed=seed)
    ends = table.layers["ci_low"], table.layers["ci_high"]
    reported = interval_coverage(*ends, truth.effects, least_effect=RESPONDS)
    yield "|true effect| > 0.1: coverage of the 95% intervals of `effects`", reported.share
    ranks = rank_statistics(truth.effects[large], draws[:, large], seed=seed)
    # Towards larger effects, whatever their sign.
    outwards = np.where(truth.effects[large] > 0, ranks, N_DRAWS - ranks)
    yield "|true effect| > 0.1: p of uniform ranks", uniformity(ranks, N_DRAWS).p_value
    yield "|true effect| > 0.1: rank variance over uniform", rank_spread(ranks, N_DRAWS)
    yield "|true effect| > 0.1: mean outward rank / n_draws", outwards.mean() / N_DRAWS


def counts(posterior: cp.Posterior, test: cp.CellData, seed: int) -> Figures:
    """Yield how uniform the randomised transforms of new cells' counts are."""
    values = count_calibration(posterior, test, draws=50, n_cells=300, seed=seed)
    expressed = np.argsort(-test.rows(slice(None)).sum(axis=0))[:N_EXPRESSED]
    for name, part in (("all genes", values), ("100 most expressed", values[:, expressed])):
        yield f"{name}: entries", part.size
        yield f"{name}: KS distance to uniform", stats.kstest(part.ravel(), "uniform").statistic
        yield f"{name}: variance over uniform", 12 * part.var()
        yield f"{name}: below 0.025 or above 0.975", (np.abs(part - 0.5) > 0.475).mean()


def latents(posterior: cp.Posterior, test: cp.CellData, seed: int) -> Figures:
    """Yield what latents are used for, and what can be read from them."""
    found = latent_diagnostics(posterior, test, seed=seed)
    yield "latents", len(found.units)
    yield "active latents", found.units["active"].sum()
    yield "divergence from the prior, nats per cell", found.units["kl"].sum()
    yield "posterior sd, mean over latents", found.units["mean_sd"].mean()
    for row in found.leakage.itertuples():
        name = f"AUROC of {row.target} from {row.source}, {row.method}"
        yield name, row.auroc
        yield f"{name}: standard error", row.se


def predictive(posterior: cp.Posterior, test: cp.CellData, seed: int) -> Figures:
    """Yield the shares of statistics that lie outside of what the model generates."""
    for source in ("posterior", "prior"):
        check = predictive_check(posterior, test, source=source, draws=79, n_cells=300, seed=seed)
        for table, of in ((check.genes, "genes"), (check.perturbations, "perturbations")):
            outside = (table["observed"] < table["low"]) | (table["observed"] > table["high"])
            for statistic, share in outside.groupby(table["statistic"], sort=False).mean().items():
                yield f"{source}, {statistic}: share of {of} outside the 95 % interval", share


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory of the posterior")
    parser.add_argument("--data", type=Path, required=True, help="simulated screen, h5ad")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for path in (options.run, options.data):
        if not path.exists():
            parser.error(f"'{path}' does not exist; make both with `cradle-pyro demo`.")
    posterior, adata = cp.load(options.run), anndata.read_h5ad(options.data)
    test = cp.prepare(adata, posterior.config).data.where(split="test")
    rows = []

    def record(check: str, figures: Figures) -> None:
        for quantity, value in figures:
            print(f"{check}: {quantity}: {value:.4g}", flush=True)  # noqa: T201
            rows.append({"check": check, "quantity": quantity, "value": float(value)})

    for name, width in (("exact", 1.0), ("too narrow", 0.7), ("too wide", 1.5)):
        record(f"linear-Gaussian, {name}", linear_gaussian(width, options.seed))
    for name, figures in (
        ("basal states", basal(posterior, test, options.seed)),
        ("average effects", effect(posterior, adata, options.seed)),
        ("counts of new cells", counts(posterior, test, options.seed)),
        ("latents", latents(posterior, test, options.seed)),
        ("predictive checks", predictive(posterior, test, options.seed)),
    ):
        record(name, figures)
    pd.DataFrame(rows).to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
