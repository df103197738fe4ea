"""Measure the queries: exactness, cleaning of known artifacts, time, and what can be known at all.

    python docs/results/make_queries.py exact corrupted speed floor

Prints one line per figure and seed, and writes them to ``queries.csv`` beside this file. The
screen is read from ``../shared/data`` (or ``$CRADLE_SCREENS``). Figures on the simulated screen
are part of the benchmark (``main``).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

import cradle_pyro as cp
from cradle_pyro.evaluation.soundness import composition, effectiveness, minimality, reversibility
from cradle_pyro.evaluation.truth import mean_passing_profiles
from cradle_pyro.types import SCALE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCREENS = Path(os.environ.get("CRADLE_SCREENS", ROOT.parent / "shared" / "data"))
PAPALEXI = SCREENS / "papalexi2021_eccite.h5ad"
CONFIG = ROOT / "configs" / "papalexi.toml"
HOME = cp.do(perturbation="factual", artifact="factual")
Figures = Iterator[tuple[str, float]]


def exact(seed: int) -> Figures:
    """Yield how exactly do(factual) and going there and back return Papalexi's cells."""
    with tempfile.TemporaryDirectory() as folder:
        run, answer = Path(folder) / "run", Path(folder) / "same.h5ad"
        command = [sys.executable, "-c", "from cradle_pyro.cli import main; main()"]
        seeds = ["--set", f"split.seed={seed}", "--set", f"train.seed={seed}"]
        train = ["train", PAPALEXI, "--out", run, "--config", CONFIG, *seeds, "--quiet"]
        query = ["query", run, "--cells", PAPALEXI, "--out", answer, "--draws", "2", "--quiet"]
        factual = ["--do", "perturbation=factual", "--do", "artifact=factual"]
        for arguments in (train, [*query, *factual]):
            subprocess.run([*command, *map(str, arguments)], check=True)
        posterior, same = cp.load(run), anndata.read_h5ad(answer)
        split = pd.read_csv(run / "split.csv")["split"].to_numpy()
    observed = anndata.read_h5ad(PAPALEXI)
    different = (sp.csr_array(same.layers["counts"]) != sp.csr_array(observed.X)).nnz
    yield "do(factual), CLI: cells", observed.n_obs
    yield "do(factual), CLI: different entries", different
    data = cp.prepare(observed, posterior.config).data
    rng = np.random.default_rng(seed)
    chosen = data.subset(np.sort(rng.permutation(data.n_cells)[:1000]))
    there = cp.do(perturbation="STAT1", artifact="typical")
    moved, back = noise_kept(posterior, chosen, there, seed)
    own = chosen.rows(slice(None)).toarray()
    yield "there, noise kept: different entries of 1,000 cells", (moved != own).sum()
    yield "there and back, noise kept: different entries of 1,000 cells", (back != own).sum()
    yield from soundness(posterior, data.with_split(split), seed)


def noise_kept(
    posterior: cp.Posterior, cells: cp.CellData, there: object, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return counts after an intervention, and after its reversal with the same noise."""
    from cradle_pyro import sites
    from cradle_pyro.queries.abduction import predict
    from cradle_pyro.queries.draws import Part, over_draws
    from cradle_pyro.queries.interventions import check

    away, home = check(posterior, there), check(posterior, HOME)
    moved, returned = [], []

    def use(part: Part) -> None:
        for world, pieces in ((away, moved), (home, returned)):
            acts = world.acts(part.abduction.batch, part.abduction.values)
            counts = predict(posterior.model, part.abduction, acts)[sites.COUNTS]
            pieces.append(counts.numpy())

    over_draws(posterior, cells, use, draws=1, counts=1, seed=seed)
    return np.concatenate(moved), np.concatenate(returned)


def soundness(posterior: cp.Posterior, data: cp.CellData, seed: int) -> Figures:
    """Yield composition, reversibility, effectiveness and minimality on test cells."""
    test = data.where(split="test")
    observed = test.rows(slice(None)).toarray()
    options = {"draws": 2, "seed": seed}
    null = cp.counterfactual(posterior, test, cp.do(), **options).layers["counts"].toarray()
    yield "composition: equal entries", composition(observed, null).entries
    # There: typical artifacts. Back: the factual state again, from a fresh abduction.
    passing = test.subset(test.passing)
    own = passing.rows(slice(None)).toarray()
    away = cp.counterfactual(posterior, passing, cp.do(artifact="typical"), **options)
    yield from read_flags(posterior, data, passing, own, away.layers["counts"].toarray())
    perturbed = passing.subset(passing.labels != data.schema.control)
    own = perturbed.rows(slice(None)).toarray()
    control = cp.counterfactual(
        posterior, perturbed, cp.do(perturbation="control", library="factual"), **options
    )
    made = control.layers["counts"].toarray()
    again = as_controls(perturbed, made)
    for label in ("STAT1", "IRF1", "BRD4"):
        rows = np.flatnonzero(perturbed.labels == label)
        home = cp.do(perturbation=label, library="factual")
        back = cp.counterfactual(posterior, again.subset(rows), home, **options)
        change = reversibility(own[rows], back.layers["counts"].toarray())
        yield f"reversibility, fresh abduction, {label}: equal entries", change.entries
        yield f"reversibility, fresh abduction, {label}: mean |difference|", change.difference
    table = cp.effects(posterior, draws=50)
    strong = np.abs(np.asarray(table.X))
    for label in ("STAT1", "IRF1"):
        rows = np.flatnonzero(perturbed.labels == label)
        touched = strong[table.obs_names.get_loc(label)] > 0.3
        scaled = [np.log2(1 + SCALE * x[rows] / perturbed.library[rows, None]) for x in (own, made)]
        found = minimality(*scaled, touched)
        yield (
            f"minimality, {label} to control: untouched genes, mean |log2 change|",
            found.untouched,
        )
        yield f"minimality, {label} to control: touched genes, mean |log2 change|", found.touched


def read_flags(
    posterior: cp.Posterior,
    data: cp.CellData,
    passing: cp.CellData,
    own: np.ndarray,
    made: np.ndarray,
) -> Figures:
    """Yield how often a reader of validation cells sees the artifact that cells were given."""
    real = data.where(split="val")
    intended = np.ones(len(made), dtype=bool)
    result = effectiveness(
        real.rows(slice(None)).toarray(), real.failing, made, intended, factual=own
    )
    yield "effectiveness, typical artifact: read as failing", result.read
    yield "effectiveness, typical artifact: before", result.before
    yield "effectiveness, typical artifact: real failing cells", result.real


def as_controls(cells: cp.CellData, counts: np.ndarray) -> cp.CellData:
    """Return the cells with other counts, as controls."""
    return dataclasses.replace(
        cells,
        counts=sp.csr_array(counts.astype(np.float32)),
        perturbation=sp.csr_array(cells.perturbation.shape, dtype=np.float32),
    )


def corrupted(seed: int) -> Figures:
    """Yield correlations of cleaned cells with a held-back half of the uncorrupted counts.

    A quarter of the passing cells get a known artifact, in all splits. Half the molecules of each
    test cell are held back before. The models are trained on the corrupted screen.
    """
    rng = np.random.default_rng(seed)
    adata = anndata.read_h5ad(PAPALEXI)
    config = cp.Config.from_toml(CONFIG).with_settings(
        [f"split.seed={seed}", f"train.seed={seed}", "qc.genes_key=none"]
    )
    prepared = cp.prepare(adata.copy(), config)
    split, passing = np.asarray(prepared.data.split), prepared.data.passing
    held_back = halve(adata, np.flatnonzero(split == "test"), rng)
    adata.obs["split"] = split
    bad = cp.corrupt(
        adata, share=0.25, seed=seed, eligible=passing, total_key="n_counts_full",
        mito_key="pct_mito_full",
    )  # fmt: skip
    config = config.with_settings(["split.method=column", "split.key=split"])
    chosen = np.flatnonzero((split == "test") & (bad.obs["corruption"] != "none").to_numpy())
    half = log_profile(*(part[chosen] for part in held_back))
    ready = cp.prepare(bad, config)
    flagged = ready.data.failing[chosen]
    yield "corrupted test cells", len(chosen)
    yield "of which flagged", flagged.mean()
    posterior = cp.fit(ready.data, config, progress=False)
    cells = ready.data.subset(chosen)
    clean = cp.counterfactual(posterior, cells, cp.do(artifact=0), draws=50, count_draws=0)
    plain_config = config.with_settings(["data.artifact=none", "objective.counterfactual=none"])
    plain = cp.prepare(bad, plain_config).data
    without = cp.fit(plain, plain_config, progress=False)
    rebuilt = cp.counterfactual(without, plain.subset(chosen), cp.do(), draws=50, count_draws=0)
    mean = mean_passing_profiles(ready.data.where(split="train"), cells.labels)
    profiles = {
        "cleaned, do(artifact=0)": np.log1p(SCALE * clean.layers["rate"]),
        "corrupted cell": log_profile(cells.rows(slice(None)).toarray(), cells.library),
        "mean passing cell of the perturbation": np.log1p(SCALE * mean),
        "rebuilt without artifact latent": np.log1p(SCALE * rebuilt.layers["rate"]),
    }
    kinds = bad.obs["corruption"].to_numpy()[chosen]
    for name, profile in profiles.items():
        each = correlations(profile, half)
        yield f"correlation with held-back half: {name}", each.mean()
        for kind in np.unique(kinds):
            yield f"  {kind}: {name}", each[kinds == kind].mean()
    difference = correlations(profiles["cleaned, do(artifact=0)"], half)
    for name in list(profiles)[1:]:
        paired = difference - correlations(profiles[name], half)
        yield (
            f"cleaned minus {name}: standard errors",
            (paired.mean() / (paired.std(ddof=1) / np.sqrt(len(paired)))),
        )


def halve(
    adata: anndata.AnnData, rows: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Move half of the molecules of `rows` out of `adata`; return what was held back and totals."""
    counts = sp.csr_array(adata.X).toarray().astype(np.int64)
    total = adata.obs["n_counts_full"].to_numpy().astype(np.int64)
    held = np.zeros_like(counts)
    held[rows] = rng.binomial(counts[rows], 0.5)
    rest = np.zeros_like(total)
    rest[rows] = rng.binomial(total[rows] - counts[rows].sum(1), 0.5)
    held_total = held.sum(1) + rest
    adata.X = sp.csr_matrix((counts - held).astype(np.float32))
    adata.obs["n_counts_full"] = total - held_total
    return held, held_total


def log_profile(counts: np.ndarray, library: np.ndarray) -> np.ndarray:
    """Return log(1 + 1e4 fraction)."""
    return np.log1p(SCALE * counts / np.asarray(library)[:, None])


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return each cell's correlation over genes."""
    first = first - first.mean(1, keepdims=True)
    second = second - second.mean(1, keepdims=True)
    norm = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return (first * second).sum(1) / norm


def speed(seed: int) -> Figures:
    """Yield the seconds that 10,000 cells x 2,000 genes take with 20 draws, on this machine."""
    adata = cp.simulate_perturbseq(n_cells=10_000, n_genes=2_000, seed=seed)
    settings = [
        "data.layer=counts",
        "train.max_epochs=1",
        f"train.seed={seed}",
        "qc.doublets=false",
    ]
    config = cp.Config().with_settings(settings)
    ready = cp.prepare(adata, config)
    posterior = cp.fit(ready.data, config, progress=False)
    for name, act in (
        ("do(artifact=0)", cp.do(artifact=0)),
        ("do(perturbation=control)", cp.do(perturbation="control")),
    ):
        start = time.perf_counter()
        cp.counterfactual(posterior, ready.data, act, draws=20, seed=seed)
        yield f"{name}: seconds", time.perf_counter() - start


def floor(seed: int) -> Figures:
    """Yield how well perturbed cells' control profiles can be known at all, on the demo's screen.

    RMSE of log(1 + 1e4 fraction) over that of the mean control cell, as the demo reports it for the
    model, of estimates that are given the truth of everything but the cell's basal state: the
    loadings of all basal states (16 principal components of the true log control rates), the
    dispersions, and what the perturbation does, on average or to this very cell. The basal state
    is inferred from the counts by variational inference for each cell.
    """
    from cradle_pyro.evaluation.metrics import rmse
    from cradle_pyro.simulate.perturbseq import DEMO_SETTINGS

    settings = [*DEMO_SETTINGS, f"split.seed={seed}", f"train.seed={seed}"]
    adata, data = cp.prepare(cp.simulate_perturbseq(seed=seed), cp.Config().with_settings(settings))
    split, control = np.asarray(data.split), data.schema.control
    rows = np.flatnonzero((split == "test") & data.passing & (data.labels != control))
    true = {name: np.asarray(adata.layers[name]) for name in ("true_rate", "true_rate_control")}
    target = np.log1p(SCALE * true["true_rate_control"][rows])
    log_control = np.log(true["true_rate_control"] + 1e-9)
    change = np.log(true["true_rate"] + 1e-9) - log_control
    labels = data.labels[rows]
    average = {label: change[data.labels == label].mean(0) for label in np.unique(labels)}
    mean = mean_passing_profiles(data.where(split="train"), np.array([control]))
    baseline = rmse(np.broadcast_to(np.log1p(SCALE * mean), target.shape), target)
    dispersion = adata.var["true_dispersion"].to_numpy()
    for name, effect in (
        ("average effect known", np.stack([average[label] for label in labels])),
        ("each cell's own effect known", change[rows]),
    ):
        found = known_loadings(data.subset(rows), log_control, effect, dispersion, seed)
        yield f"as control, relative to mean control: {name}", rmse(found, target) / baseline


def known_loadings(
    cells: cp.CellData,
    log_rates: np.ndarray,
    effect: np.ndarray,
    dispersion: np.ndarray,
    seed: int,
    n_latents: int = 16,
) -> np.ndarray:
    """Return expected log profiles under control of cells whose basal states are inferred."""
    import torch

    from cradle_pyro.model.likelihoods import GeneNegativeBinomial
    from cradle_pyro.seeding import seeded

    mean = log_rates.mean(0)
    _, size, directions = np.linalg.svd(log_rates - mean, full_matrices=False)
    loading = directions[:n_latents] * size[:n_latents, None] / np.sqrt(len(log_rates))
    loading, mean, effect, dispersion = (
        torch.as_tensor(part, dtype=torch.float32) for part in (loading, mean, effect, dispersion)
    )
    batch = cells.batch()
    with seeded(seed):
        loc = torch.zeros(len(batch), n_latents, requires_grad=True)
        log_scale = torch.full((len(batch), n_latents), -1.0, requires_grad=True)
        optimizer = torch.optim.Adam([loc, log_scale], lr=0.05)

        def states() -> torch.Tensor:
            return loc + log_scale.exp() * torch.randn_like(loc)

        for _ in range(300):
            rate = torch.softmax(mean + states() @ loading + effect, -1)
            fit = GeneNegativeBinomial(batch.library[:, None] * rate, dispersion)
            divergence = 0.5 * (loc**2 + (2 * log_scale).exp() - 1) - log_scale
            loss = (divergence.sum(-1) - fit.log_prob(batch.counts)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            profiles = [
                torch.log1p(SCALE * torch.softmax(mean + states() @ loading, -1)) for _ in range(50)
            ]
    return torch.stack(profiles).mean(0).numpy()


PARTS = {"exact": exact, "corrupted": corrupted, "speed": speed, "floor": floor}


def main() -> None:
    """Measure what was asked for, print it, and add it to the table."""
    import warnings

    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    path = HERE / "queries.csv"
    for part in options.parts:
        for seed in range(options.seeds):
            rows = []
            for name, value in PARTS[part](seed):
                sys.stdout.write(f"{part}, seed {seed}: {name}: {value:.6g}\n")
                sys.stdout.flush()
                rows.append({"part": part, "seed": seed, "figure": name, "value": float(value)})
            old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(rows[0]))
            old = old[(old["part"] != part) | (old["seed"] != seed)]
            new = pd.DataFrame(rows)
            table = new if old.empty else pd.concat([old, new], ignore_index=True)
            table.to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
