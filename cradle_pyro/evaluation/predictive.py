"""How well the model predicts cells it has not seen: held-out density and generated QC metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from pyro import poutine

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.qc import fit_thresholds, qc_flags, qc_metrics
from cradle_pyro.evaluation.metrics import ks_distance, log_mean_exp, qc_pass_rate
from cradle_pyro.inference.objectives import local_sites
from cradle_pyro.inference.posterior import Posterior, draw_latents
from cradle_pyro.model.intervene import run_world
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch

__all__ = ["GeneratedQC", "generated_qc", "held_out_density", "log_weight", "qc_of"]

_QC_MADS = (3.0, 4.0, 5.0)
_LEAST_GENERATED = 4000  # cells: their own noise in a Kolmogorov-Smirnov distance is then 0.015


def held_out_density(
    posterior: Posterior,
    data: CellData,
    *,
    global_draws: int = 8,
    particles: int = 8,
    seed: int = 0,
    chunk: int = 256,
) -> np.ndarray:
    """Return log p(counts | library, artifact, perturbation) of each cell, in nats; shape (cells,).

    Parameters
    ----------
    posterior
        A fitted pair.
    data
        Cells, aligned to the posterior's schema.
    global_draws
        Draws of the global latents, with hard masks.
    particles
        Importance-weighted draws of the local latents for each of them.
    seed
        Seed of the draws.
    chunk
        Cells at a time.

    Notes
    -----
    A lower bound in expectation (IWELBO, Burda et al. 2016, Importance Weighted Autoencoders):
    log mean_s mean_k p(x, z_sk, w_sk | globals_s) / q(z_sk, w_sk | x, globals_s). Flags and library
    are functions of the counts, so the density is conditional on them. Pyro's RenyiELBO would
    weight the globals of all cells together, which is wrong here.
    """
    values = np.empty(data.n_cells)
    with seeded(seed), torch.no_grad():
        for start in range(0, data.n_cells, chunk):
            rows = np.arange(start, min(start + chunk, data.n_cells))
            batch = data.batch(rows, device=posterior.device)
            weights = []
            for _ in range(global_draws):
                guide_trace = poutine.trace(posterior.guide).get_trace(batch)
                local = local_sites(guide_trace)
                fixed = {
                    name: site["value"]
                    for name, site in guide_trace.nodes.items()
                    if site["type"] == "sample" and name not in local
                }
                guide = poutine.condition(posterior.guide, data=fixed)
                weights += [log_weight(posterior, guide, batch) for _ in range(particles)]
            values[rows] = log_mean_exp(torch.stack(weights).cpu().numpy())
    return values


def log_weight(
    posterior: Posterior, guide: Callable[[Batch], object], batch: Batch
) -> torch.Tensor:
    """Return the log importance weight of one draw of each cell's own latents, in nats.

    Parameters
    ----------
    posterior
        A fitted pair; run under the caller's random state.
    guide
        Its guide, with the global latents fixed at one draw (``poutine.condition``).
    batch
        The cells; a cell that stands in several rows is drawn as many times.

    Returns
    -------
    Tensor
        log p(x, z, w | globals, library, artifact, perturbation) - log q(z, w | x, globals), shape
        (cells,). The log of its exponential's mean over draws estimates the density of a cell's
        counts given the globals: from below in expectation, the closer the more draws.
    """
    guide_trace = poutine.trace(guide).get_trace(batch)
    values = {
        name: site["value"] for name, site in guide_trace.nodes.items() if site["type"] == "sample"
    }
    model_trace = poutine.trace(poutine.condition(posterior.model, data=values)).get_trace(batch)
    counts = model_trace.nodes[sites.COUNTS]
    weight = counts["fn"].log_prob(counts["value"])
    for name in local_sites(guide_trace):
        value, proposal = values[name], guide_trace.nodes[name]
        ratio = model_trace.nodes[name]["fn"].log_prob(value) - proposal["fn"].log_prob(value)
        # Of missing flags, only the missing ones were drawn.
        weight = weight + (ratio if proposal["mask"] is None else ratio * proposal["mask"])
    return weight


class GeneratedQC(NamedTuple):
    """QC of cells, such as those generated without artifact.

    Parameters
    ----------
    pass_rate
        Share of these cells without a flag, by number of MADs; of the flags that the screen
        uses (``qc.flags``), as far as counts alone decide on them.
    real_pass_rate
        The same for the real test cells.
    ks
        Kolmogorov-Smirnov distance of each metric to real passing test cells.
    """

    pass_rate: dict[str, float]
    real_pass_rate: dict[str, float]
    ks: dict[str, float]


def generated_qc(
    posterior: Posterior, train: CellData, test: CellData, *, seed: int = 0, chunk: int = 512
) -> GeneratedQC:
    """Return how often cells generated under do(artifact=0) pass QC, and how real they look.

    As many cells are generated for each cell of `test` as make 4,000, with its perturbations, basal
    states and covariates of abducted training controls (as :func:`~cradle_pyro.intervene` does by
    default), and libraries from the model (or, where it does not model them, of passing training
    cells). Thresholds are fitted on real training cells, at 3, 4 and 5 MADs, on the kept genes.
    """
    rows = np.tile(np.arange(test.n_cells), -(-_LEAST_GENERATED // test.n_cells))
    generated = _generate_passing(posterior, train, test, rows, seed=seed, chunk=chunk)
    return qc_of(generated, train, test, flags=posterior.config.qc.flags)


def qc_of(
    counts: sp.csr_array, train: CellData, test: CellData, *, flags: Sequence[str] = ()
) -> GeneratedQC:
    """Return how often cells pass the QC of the training cells, and how real they look.

    Parameters
    ----------
    counts
        Cells to judge: generated ones, or real ones, which tell how far real cells are apart.
    train, test
        Real cells, on which thresholds are fitted, and with which `counts` are compared.
    flags
        Those that the screen uses; empty, or none that counts decide on, for all.
    """
    genes = np.asarray(train.schema.genes)
    fitted, new, real = (
        qc_metrics(cells, genes)
        for cells in (train.rows(slice(None)), counts, test.rows(slice(None)))
    )
    pass_rate: dict[str, float] = {}
    real_pass_rate: dict[str, float] = {}
    for n_mads in _QC_MADS:
        thresholds = fit_thresholds(fitted, n_mads)
        used = set(flags) & set(thresholds.flags) or thresholds.flags
        for metrics, rates in ((new, pass_rate), (real, real_pass_rate)):
            raised = qc_flags(metrics, thresholds)
            rates[f"{n_mads:g}"] = qc_pass_rate({k: v for k, v in raised.items() if k in used})
    passing = test.passing
    ks = {
        name: ks_distance(new[name], values[passing])
        for name, values in real.items()
        if passing.any()
    }
    return GeneratedQC(pass_rate, real_pass_rate, ks)


def _generate_passing(
    posterior: Posterior, train: CellData, test: CellData, cells: np.ndarray, *, seed: int,
    chunk: int,
) -> sp.csr_array:  # fmt: skip
    """Return the counts of a new cell for each of `cells`, rows of `test` that may come often."""
    counts = []
    passing = torch.as_tensor(train.library[train.passing])
    controls = posterior.reference
    with seeded(seed), torch.no_grad():
        for start in range(0, len(cells), chunk):
            rows = cells[start : start + chunk]
            chosen = torch.randint(len(controls.library), (len(rows),))
            batch = test.batch(rows, device=posterior.device).replace(
                artifact_observed=None,
                covariates=controls.covariates[chosen].to(posterior.device),
            )
            acts = {
                sites.ARTIFACT: torch.zeros_like(batch.artifact),
                sites.PERTURBATION: batch.perturbation,
            }
            if not posterior.model.has_depth_shift:
                depth = passing[torch.randint(len(passing), (len(rows),))]
                acts[sites.LIBRARY] = depth.to(posterior.device)
            z_basal = torch.normal(controls.loc[chosen], controls.scale[chosen])
            z_basal = z_basal.to(posterior.device)
            latents = draw_latents(posterior.guide, batch) | {sites.Z_BASAL: z_basal}
            world = run_world(posterior.model, batch, latents, acts)
            counts.append(sp.csr_array(world[sites.COUNTS].cpu().numpy()))
    return sp.vstack(counts, format="csr")
