"""A large sparse screen on disk, to measure what size costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cradle_pyro.data.fields import write_rows_atomic

__all__ = ["simulate_large"]


def simulate_large(
    path: str | Path,
    n_cells: int,
    *,
    n_genes: int = 5000,
    n_perturbations: int = 100,
    seed: int = 0,
    chunk: int = 4096,
) -> None:
    """Write a sparse screen that is never in memory as a whole.

    Parameters
    ----------
    path
        h5ad file to write.
    n_cells, n_genes, n_perturbations
        Sizes. A tenth of the cells are controls, the others carry one perturbation each, which
        changes a fiftieth of the genes.
    seed
        Of the simulation.
    chunk
        Cells at a time.

    Notes
    -----
    Counts are multinomial given a log-normal library (median 350), so that about 5 % of the entries
    of 5,000 genes are above zero. A tenth of the cells fail QC: their library is a third as large,
    and a fifth of it is mitochondrial.
    """
    rng = np.random.default_rng(seed)
    fraction = rng.gamma(0.3, size=n_genes)
    mito = np.arange(n_genes) < 13
    fraction[mito] = 2 * fraction.mean()
    labels = rng.integers(0, n_perturbations, n_cells)
    labels[rng.random(n_cells) < 0.1] = n_perturbations
    failing = rng.random(n_cells) < 0.1
    library = rng.lognormal(np.log(350), 0.4, n_cells) * np.where(failing, 1 / 3, 1.0)
    names = [*(f"T{i:04d}" for i in range(n_perturbations)), "control"]
    effects = {
        label: (rng.choice(n_genes, max(n_genes // 50, 1), replace=False), rng.normal(size=1))
        for label in range(n_perturbations)
    }
    with write_rows_atomic(path, (n_cells, n_genes)) as writer:
        for start in range(0, n_cells, chunk):
            some = slice(start, min(start + chunk, n_cells))
            rows, columns = [], []
            for label in np.unique(labels[some]):
                cells = np.flatnonzero(labels[some] == label)
                rate = fraction.copy()
                if label in effects:
                    changed, size = effects[label]
                    rate[changed] *= np.exp(size)
                cumulative = np.cumsum(rate / rate.sum())
                sizes = rng.poisson(library[some][cells]) + 1
                drawn = np.searchsorted(cumulative, rng.random(sizes.sum()) * cumulative[-1])
                rows.append(np.repeat(cells, sizes))
                is_mito = np.repeat(failing[some][cells], sizes) & (rng.random(len(drawn)) < 0.2)
                drawn[is_mito] = rng.integers(0, mito.sum(), is_mito.sum())
                columns.append(drawn)
            at = np.concatenate(rows), np.concatenate(columns).clip(max=n_genes - 1)
            shape = (some.stop - some.start, n_genes)
            block = sp.csr_matrix((np.ones(len(at[0]), np.float32), at), shape=shape)
            writer.add("counts", block)
        perturbation = pd.Categorical(np.array(names)[labels], categories=names)
        obs = pd.DataFrame({"perturbation": perturbation})
        obs.index = [f"cell{i}" for i in range(n_cells)]
        genes = pd.Index([f"MT-{i}" if mito[i] else f"G{i}" for i in range(n_genes)])
        writer.finish(obs, pd.DataFrame(index=genes), {}, x="counts")
