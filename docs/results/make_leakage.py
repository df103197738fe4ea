"""Print how well the flag is read from basal states: the benchmark's models', and the true ones.

    CRADLE_SCREENS=../shared/data python docs/results/make_leakage.py

Flags are thresholds on a cell's own counts, so that the true basal states of failing cells differ
too (much, where a flag is biology), and what flags do on average is known only as well as the
failing training cells tell. Both are floors for a model. AUROC of 30 nearest neighbours, as in the
benchmark; a mean over seeds.

- *model*: draws of z_basal of a thousand test cells, from ``main/scores.csv``.
- *true states*: 16 principal components of the true log control profile, scaled to unit variance.
- *and sampling error*: the same; those of failing cells shifted by one Normal error of variance
  1 / (failing training cells) per component, mean of eight such errors.
- *draws*, *means*, *sd*: of a model trained anew with seed 0, from draws and from posterior means,
  and the mean posterior standard deviation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from cradle_pyro.evaluation.criticism import latent_diagnostics
from cradle_pyro.evaluation.grid_file import read_benchmark
from cradle_pyro.evaluation.screens import build_screen
from cradle_pyro.evaluation.soundness import out_of_fold
from cradle_pyro.inference.train import fit

HERE = Path(__file__).parent
GRID = HERE.parent.parent / "configs" / "benchmarks" / "main.toml"
METRIC = "leakage_artifact_knn"
SIMULATED = {"default", "confounded", "10_cells"}
N_NEIGHBOURS, N_COMPONENTS, N_ERRORS = 30, 16, 8


def auroc(states: np.ndarray, failing: np.ndarray, seed: int) -> float:
    """Return how well nearest neighbours tell failing cells from passing ones."""
    reader = make_pipeline(KNeighborsClassifier(N_NEIGHBOURS))
    scores = out_of_fold(reader, states, failing.astype(int), seed)[:, 1]
    return float(roc_auc_score(failing, scores))


def floors(name: str, seed: int) -> tuple[float, float]:
    """Return the AUROC from true basal states of test cells, without and with sampling error."""
    benchmark = read_benchmark(GRID)
    screen = next(screen for screen in benchmark.screens if screen.name == name)
    built = build_screen(benchmark, screen, screen.splits[0], seed)
    logs = np.log(np.asarray(built.adata.layers["true_rate_control"]) + 1e-10)
    states = PCA(N_COMPONENTS, random_state=0).fit_transform(logs)
    states /= states.std(axis=0)
    is_test = np.asarray(built.data.split) == "test"
    states, failing = states[is_test], np.asarray(built.data.failing)[is_test]
    n_train = int(built.data.where(split="train").failing.sum())
    rng = np.random.default_rng(seed)
    with_error = []
    for _ in range(N_ERRORS):
        error = rng.normal(size=N_COMPONENTS) / np.sqrt(n_train)
        with_error.append(auroc(states + np.outer(failing, error), failing, seed))
    return auroc(states, failing, seed), float(np.mean(with_error))


def of_means(name: str) -> tuple[float, float, float]:
    """Return the AUROC from draws and from means, and the mean posterior sd, of one model."""
    benchmark = read_benchmark(GRID)
    screen = next(screen for screen in benchmark.screens if screen.name == name)
    data = build_screen(benchmark, screen, screen.splits[0], 0).data
    posterior = fit(data, benchmark.screen_config(screen, screen.splits[0], 0), progress=False)
    units, table = latent_diagnostics(posterior, data.where(split="test"), seed=0)
    chosen = table[(table["target"] == "artifact") & (table["method"] == "knn")]
    by_source = chosen.set_index("source")["auroc"]
    return by_source["draws"], by_source["means"], float(units["mean_sd"].mean())


def main() -> None:
    """Print one line for each screen."""
    scores = pd.read_csv(HERE / "main" / "scores.csv")
    found = scores[(scores["predictor"] == "cradle") & (scores["metric"] == METRIC)]
    out = sys.stdout.write
    head = "screen", "model, mean (range)", "true states", "and sampling error"
    out(f"| {' | '.join([*head, 'draws', 'means', 'sd'])} |\n|---|---:|---:|---:|---:|---:|---:|\n")
    for name, rows in found.groupby("screen", sort=False):
        by_seed = rows.groupby("seed")["value"].mean()
        out(f"| {name} | {by_seed.mean():.3f} ({by_seed.min():.3f} to {by_seed.max():.3f}) ")
        if name in SIMULATED:
            true, error = np.mean([floors(str(name), int(seed)) for seed in by_seed.index], axis=0)
            out(f"| {true:.3f} | {error:.3f} ")
        else:
            out("| | ")
        drawn, mean, sd = of_means(str(name))
        out(f"| {drawn:.3f} | {mean:.3f} | {sd:.2f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
