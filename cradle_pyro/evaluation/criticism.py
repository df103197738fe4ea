"""Does the model fit: predictive checks, calibration of counts and latents, diagnostics of z_basal.

Everything is read from traces of the pair, so that edited models are checked as they are. A batch
holds flags and libraries; a model run on it draws the latents that it is not given and keeps what
it observes, so that its site of counts is the predictive distribution of the cell's own counts.

References
----------
Gelman, Meng and Stern, "Posterior predictive assessment of model fitness via realized
discrepancies", Statistica Sinica 1996. Blei, "Build, compute, critique, repeat: data analysis with
latent variable models", Annual Review of Statistics and Its Application 2014.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.qc import qc_metrics
from cradle_pyro.errors import DataError, QueryError
from cradle_pyro.evaluation.calibration import randomised_pit, rank_statistics
from cradle_pyro.evaluation.soundness import FOLDS, out_of_fold, reader_of
from cradle_pyro.inference.objectives import with_imputed_flags
from cradle_pyro.inference.posterior import Posterior, draw_latents
from cradle_pyro.model.intervene import run_world, sample_nodes
from cradle_pyro.model.likelihoods import GeneNormal
from cradle_pyro.model.noise import count_elements, innermost
from cradle_pyro.queries.draws import draw_globals, seed_of
from cradle_pyro.queries.effects import effect_draws
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch, Schema

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

__all__ = [
    "LatentDiagnostics",
    "PredictiveCheck",
    "basal_ranks",
    "count_calibration",
    "effect_ranks",
    "latent_diagnostics",
    "predictive_check",
]

PyroCallable = Callable[[Batch], object]
Nodes = dict[str, dict[str, Any]]

_INTERVAL: Final = (0.025, 0.5, 0.975)
_ENTRIES_AT_A_TIME: Final = 1_000_000
_CELLS_PER_GLOBALS: Final = 128
_GLOBAL_DRAWS: Final = 8
_DRAWS_OF_UNKNOWN: Final = 256
_ACTIVE_VARIANCE: Final = 0.01
_NEIGHBOURS: Final = 30
_ROUNDING: Final = 1e-9


class PredictiveCheck(NamedTuple):
    """Statistics of observed cells beside those of cells that the model generates in their place.

    Parameters
    ----------
    genes
        One row per statistic (mean, variance, zeros: the share of zeros over cells) and gene.
        Columns statistic, gene, observed, low, median, high (95 % interval over draws), tail.
    perturbations
        The same of means over the cells of each label: columns perturbation, statistic (the names
        of `metrics`), observed, low, median, high, tail, n_cells.
    metrics
        Metric to its observed values, shape (cells,), and its replicated ones, shape (draws,
        cells): library, n_genes (detected), zeros (share of the kept genes), and pct_mito,
        pct_ribo, pct_hb, in percent, where counts have such genes.
    library
        "modelled": libraries are drawn from the model. "held": they are those of the cells.

    Notes
    -----
    `tail` is twice the smaller share of draws on one side of the observed value (ties count on
    both sides), at most 1. It comes in steps of 2 / draws and is 0 outside all draws. Fewer than
    39 draws have no quantile as far out as 2.5 %: their interval is their range, and holds
    1 - 2 / (draws + 1).
    """

    genes: pd.DataFrame
    perturbations: pd.DataFrame
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    library: Literal["modelled", "held"]


class LatentDiagnostics(NamedTuple):
    """What each dimension of z_basal is used for, and what it knows that it should not.

    Parameters
    ----------
    units
        One row per latent. Columns latent, kl (mean over cells of the divergence of the posterior
        from the prior, nats), mean_variance (variance over cells of the posterior mean), mean_sd
        (mean over cells of the posterior standard deviation) and active (mean_variance > 0.01).
    leakage
        How well classifiers read from z_basal what it should not hold. Columns target ("artifact":
        any flag against none; a flag against none; "perturbation": one label against all others,
        mean over labels), source ("draws" of z_basal or posterior "means"), method ("knn",
        "logistic"), auroc (0.5: nothing to be read), se and n (cells). nan where a side has too
        few cells.
    """

    units: pd.DataFrame
    leakage: pd.DataFrame


def predictive_check(
    posterior: Posterior,
    data: CellData,
    *,
    source: Literal["posterior", "prior"] = "posterior",
    draws: int = 20,
    n_cells: int = 500,
    seed: int = 0,
) -> PredictiveCheck:
    """Return statistics of cells beside those of replicated cells, gene by gene and in QC's words.

    Parameters
    ----------
    posterior
        A fitted pair.
    data
        Cells, aligned to the posterior's schema.
    source
        Where the latents of replicated cells come from. "posterior": globals from the guide, cells'
        own latents abducted. "prior": all from the model's priors (its parameters are learned).
    draws
        Replications of all cells.
    n_cells
        Cells to replicate, chosen at random if there are more.
    seed
        Seed of the choice and of the draws.

    Returns
    -------
    PredictiveCheck
        Designs, flags and covariates are held, and libraries where the model has no model of them.

    Raises
    ------
    QueryError
        If `source` is unknown or there are no draws.
    DataError
        If there are no cells.

    Notes
    -----
    The posterior check uses each cell twice, to abduct it and to judge its replication: it finds
    what no state of the cell can explain (noise, dispersion, zeros) and is lenient about the rest.
    :func:`count_calibration` judges predictions of new cells. The prior's replications need not
    look like the data, but should not be absurd.
    """
    if source not in ("posterior", "prior") or draws < 1:
        raise QueryError(
            f"source is 'posterior' or 'prior' and draws at least 1; found {source!r} and {draws}."
        )
    cells = _some_cells(data, n_cells, seed)
    batch = cells.batch(device=posterior.device)
    with seeded(seed):
        nodes = _given_nodes(posterior.model, batch, {})
    _site(nodes, sites.COUNTS)
    observed = _statistics(cells, cells.rows(slice(None)).toarray(), cells.library)
    replicated = []
    for draw in range(draws):
        with seeded(seed_of(seed, draw)):
            world = _replicated(posterior, batch, source)
        counts, library = (world[name].cpu().numpy() for name in (sites.COUNTS, sites.LIBRARY))
        replicated.append(_statistics(cells, counts, library))
    genes, metrics = (
        {name: (values, np.stack([other[part][name] for other in replicated]))
         for name, values in observed[part].items()}
        for part in (0, 1)
    )  # fmt: skip
    return PredictiveCheck(
        genes=_gene_table(genes, posterior.schema),
        perturbations=_perturbation_table(metrics, cells.labels),
        metrics=metrics,
        library="modelled" if _is_sampled(nodes, sites.LIBRARY) else "held",
    )


def count_calibration(
    posterior: Posterior, data: CellData, *, draws: int = 50, n_cells: int = 500, seed: int = 0
) -> np.ndarray:
    """Return randomised probability integral transforms of counts, predicted as those of new cells.

    Parameters
    ----------
    posterior
        A fitted pair.
    data
        Cells that the model was not trained on, aligned to its schema.
    draws
        Draws of globals (from the guide) and of the cells' latents (from their priors).
    n_cells
        Cells to judge, chosen at random if there are more.
    seed
        Seed of the choice, the draws and the place within each count's step.

    Returns
    -------
    numpy.ndarray
        Numbers in [0, 1], shape (cells, genes); uniform for each gene if predictions are right.
        Genes of one cell are not independent.

    Raises
    ------
    QueryError
        If the distribution of counts has no known distribution function, or there are no draws.
    DataError
        If there are no cells.

    Notes
    -----
    u ~ Uniform(F(x - 1), F(x)) with F the mean over draws of the distribution function given the
    cell's design, flags, covariates and library. With few draws F is that of few latent states
    rather than of all, and the transforms are a little more extreme than uniform.
    """
    if draws < 1:
        raise QueryError(f"At least one draw is required, found {draws}.")
    cells = _some_cells(data, n_cells, seed)
    below, at = np.zeros((2, cells.n_cells, posterior.schema.n_genes))
    chunk = max(_ENTRIES_AT_A_TIME // posterior.schema.n_genes, 1)
    for rows, batch in _chunks(cells, chunk, posterior.device):
        for draw in range(draws):
            with seeded(seed_of(seed, draw)):
                globals_ = draw_globals(posterior.guide, batch)
            with seeded(seed_of(seed, draw, rows.start)), torch.no_grad():
                node = _site(_given_nodes(posterior.model, batch, globals_), sites.COUNTS)
                functions = _distribution_function(node)
            for total, part in zip((below, at), functions, strict=True):
                total[rows] += part.cpu().numpy() / draws
    return randomised_pit(below, at, seed=seed)


def basal_ranks(
    posterior: Posterior, data: CellData, *, n_draws: int = 99, seed: int = 0
) -> np.ndarray:
    """Return ranks of true basal states among the guide's draws, of cells the model generates.

    Simulation-based calibration of the amortised posterior q(z_basal | x, ...) under the model: one
    draw of the globals is given to the model, which generates a cell in place of each given one
    (z_basal and z_artifact from the prior; design, flags, covariates and library as they are), and
    to the guide, which abducts it.

    Parameters
    ----------
    posterior
        A fitted pair.
    data
        Cells that lend designs, flags and libraries, aligned to the posterior's schema.
    n_draws
        Draws of the guide.
    seed
        Seed of everything.

    Returns
    -------
    numpy.ndarray
        Ranks in 0..n_draws, shape (cells, latents): uniform over cells for each latent if the guide
        is the exact posterior. Latents of one cell are not independent.

    Raises
    ------
    QueryError
        If the pair has no site z_basal, or there are no draws.

    Notes
    -----
    Globals are drawn anew for every 128 cells. This judges inference, not the model: it can be
    perfect for a model that fits badly.

    References
    ----------
    Talts et al. 2018, see :mod:`cradle_pyro.evaluation.calibration`.
    """
    if n_draws < 1:
        raise QueryError(f"At least one draw is required, found {n_draws}.")
    ranks = []
    for rows, batch in _chunks(data, _CELLS_PER_GLOBALS, posterior.device):
        with seeded(seed_of(seed, rows.start)):
            globals_ = draw_globals(posterior.guide, batch)
            nodes = _given_nodes(posterior.model, batch, globals_)
            generated = _generated(batch, nodes)
            guide = poutine.condition(posterior.guide, data=globals_)
            draws = torch.stack(
                [_site(_nodes(guide, generated), sites.Z_BASAL)["value"] for _ in range(n_draws)]
            )
        truth = _site(nodes, sites.Z_BASAL)["value"]
        ties = seed_of(seed, rows.start, 1)
        ranks.append(rank_statistics(truth.cpu().numpy(), draws.cpu().numpy(), seed=ties))
    return np.concatenate(ranks)


def effect_ranks(
    posterior: Posterior,
    truth_labels: Sequence[str],
    truth_effects: np.ndarray,
    *,
    n_draws: int = 99,
    n_cells: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Return ranks of true average effects among posterior draws, for a screen with known truth.

    Parameters
    ----------
    posterior
        A fitted pair.
    truth_labels
        Labels with a true average effect, see :func:`~cradle_pyro.evaluation.truth.truth_of`.
    truth_effects
        True average effects, shape (labels, genes), log2 of 1 + 1e4 rate.
    n_draws
        Posterior draws.
    n_cells
        Reference cells per draw.
    seed
        Seed of the draws, and of ties.

    Returns
    -------
    numpy.ndarray
        Ranks in 0..n_draws, shape (labels, genes).

    Raises
    ------
    QueryError
        If the model does not know one of the perturbations.
    DataError
        If the effects are not of shape (labels, genes), or a value is missing.

    Notes
    -----
    The rank of an effect that is exactly zero, among draws of which some are exactly zero, is drawn
    from the places among these (as :func:`~cradle_pyro.evaluation.calibration.rank_statistics`
    does): where all draws are zero it is uniform and says nothing. Where the posterior's spike is
    narrow instead of zero, the sign of a draw of a null effect is noise, and so is its rank. Only
    entries with a sizeable truth are of use. Two cautions: one screen is one draw of the truth, so
    that its entries share luck, and are not independent; and ranks are uniform on average over the
    prior, whereas entries chosen for their size are shrunken ones, whose truths lie outwards of
    their posteriors even if these are exact.
    """
    truth = np.asarray(truth_effects, dtype=np.float64)
    expected = (len(truth_labels), posterior.schema.n_genes)
    if truth.shape != expected:
        raise DataError(
            f"True effects of shape (labels, genes), here {expected}, are required; found "
            f"{truth.shape}."
        )
    draws = effect_draws(posterior, truth_labels, draws=n_draws, n_cells=n_cells, seed=seed)
    return rank_statistics(truth, draws, seed=seed)


def latent_diagnostics(
    posterior: Posterior, data: CellData, *, n_cells: int = 1000, seed: int = 0
) -> LatentDiagnostics:
    """Return which dimensions of z_basal are used, and whether flags or labels leak into it.

    Parameters
    ----------
    posterior
        A fitted pair.
    data
        Cells, aligned to the posterior's schema.
    n_cells
        Cells to look at, chosen at random if there are more.
    seed
        Seed of the choice, the draws and the folds.

    Returns
    -------
    LatentDiagnostics
        Units and leakage.

    Raises
    ------
    QueryError
        If the pair has no site z_basal.
    DataError
        If there are no cells.

    Notes
    -----
    Moments are those of the guide with eight draws of globals and z_artifact; the variance of means
    is freed from what these draws add. Where the guide's z_basal has no mean in closed form, from
    draws. kl is in closed form where latents are independent in guide and prior and torch knows
    it; else of each latent's marginal, its entropy from draws; nan where the prior's latents
    depend on each other.

    Classifiers are 30 nearest neighbours and logistic regression with classes weighted alike, each
    judging cells that it has not seen (five folds). `se` is Hanley's and McNeil's, for labels as
    if they were independent. z_basal is no descendant of flags and perturbation, so that nothing
    should be read from draws of an exact posterior; but means of an exact posterior may show that
    failing cells are less certain (their means are shrunken more), so judge by draws. Classes of a
    screen may differ in their true basal states too: selection is not leakage.

    References
    ----------
    Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016 (active units).
    Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic
    (ROC) curve", Radiology 1982.
    """
    cells = _some_cells(data, n_cells, seed)
    chunk = max(_ENTRIES_AT_A_TIME // posterior.schema.n_genes, 1)
    parts = []
    for rows, batch in _chunks(cells, chunk, posterior.device):
        with seeded(seed_of(seed, rows.start)), torch.no_grad():
            parts.append(_latent_moments(posterior, batch))
    moments = _Moments(*(np.concatenate(values, axis=-2) for values in zip(*parts, strict=True)))
    values = {"draws": moments.draws, "means": moments.mean.mean(0)}
    return LatentDiagnostics(_units(moments), _leakage(values, cells, seed))


# --- traces ---------------------------------------------------------------------------------------


def _nodes(model: PyroCallable, batch: Batch) -> Nodes:
    with torch.no_grad():
        return sample_nodes(poutine.trace(model).get_trace(batch))


def _given_nodes(model: PyroCallable, batch: Batch, latents: Mapping[str, Tensor]) -> Nodes:
    """Return the model's sites with `latents` fixed, what it observes kept, all else drawn."""
    return _nodes(poutine.condition(model, data=dict(latents)), batch)


def _site(nodes: Nodes, name: str) -> dict[str, Any]:
    if name not in nodes:
        raise QueryError(f"A site '{name}' is required, found {sorted(nodes)}.")
    return nodes[name]


def _is_sampled(nodes: Nodes, name: str) -> bool:
    """Return whether the model has a distribution for a site (it may observe its value)."""
    return name in nodes and not nodes[name]["infer"].get("_deterministic")


def _replicated(
    posterior: Posterior, batch: Batch, source: Literal["posterior", "prior"]
) -> dict[str, Tensor]:
    """Return the sites' values of cells generated in place of those of `batch`."""
    drawn: dict[str, Tensor] = {}
    if source == "posterior" or batch.artifact_observed is not None:
        drawn = draw_latents(posterior.guide, batch)
    batch = with_imputed_flags(batch, drawn)
    drawn.pop(f"{sites.ARTIFACT}_unobserved", None)
    latents = drawn if source == "posterior" else {}
    nodes = _given_nodes(posterior.model, batch, latents)
    acts = {sites.ARTIFACT: batch.artifact} if _is_sampled(nodes, sites.ARTIFACT) else {}
    world = run_world(posterior.model, batch, latents, acts)
    return {sites.LIBRARY: batch.library} | world


def _generated(batch: Batch, nodes: Nodes) -> Batch:
    """Return the cells of `batch` with counts drawn from the site of counts, all else observed."""
    generated = batch.replace(counts=_site(nodes, sites.COUNTS)["fn"].sample())
    if batch.artifact_observed is None:
        return generated
    return generated.replace(artifact=nodes[sites.ARTIFACT]["value"], artifact_observed=None)


def _distribution_function(node: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return F(x - 1) and F(x) of observed values, shape (cells, genes); equal if continuous."""
    base, value = innermost(node["fn"]), node["value"]
    if isinstance(base, GeneNormal | torch.distributions.Normal):
        at = torch.special.ndtr((value.double() - base.loc) / base.scale)
        return at, at
    try:
        elements = count_elements(base, value.shape)
    except TypeError:
        raise QueryError(
            f"Calibration needs the distribution function of counts, which is not known for a "
            f"{type(base).__name__}; register it with cradle_pyro.model.noise.count_elements."
        ) from None
    count = value.double().ravel()
    below, at = (elements.log_tails(x).lower.exp().reshape(value.shape) for x in (count - 1, count))
    return below, at


# --- cells and their statistics -------------------------------------------------------------------


def _some_cells(data: CellData, n_cells: int, seed: int) -> CellData:
    """Return at most `n_cells` of the cells, chosen at random."""
    if min(data.n_cells, n_cells) < 1:
        raise DataError(
            f"At least one cell is required, found {data.n_cells} and n_cells={n_cells}."
        )
    return data.random_subset(n_cells, seed=seed)


def _chunks(data: CellData, size: int, device: torch.device) -> Iterator[tuple[slice, Batch]]:
    for start in range(0, data.n_cells, size):
        rows = slice(start, min(start + size, data.n_cells))
        yield rows, data.batch(rows, device=device)


def _statistics(
    cells: CellData, counts: np.ndarray, library: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return statistics of genes, each of shape (genes,), and metrics of cells, each (cells,)."""
    zero, counts = counts == 0, counts.astype(np.float64)
    genes = {"mean": counts.mean(0), "variance": counts.var(0), "zeros": zero.mean(0)}
    # Where libraries are the sums of rows, so are those of replicated cells.
    total = library if cells.schema.has_rest else counts.sum(1)
    metrics = {"library": total, "n_genes": (~zero).sum(1), "zeros": zero.mean(1)}
    if cells.values == "counts":
        found = qc_metrics(counts, cells.schema.genes, library=total)
        metrics |= {name: value for name, value in found.items() if name.startswith("pct_")}
    return genes, {name: np.asarray(value, dtype=np.float64) for name, value in metrics.items()}


def _gene_table(found: Mapping[str, tuple[np.ndarray, np.ndarray]], schema: Schema) -> pd.DataFrame:
    return pd.concat(
        [
            pd.DataFrame({"statistic": name, "gene": schema.genes} | _compared(*values))
            for name, values in found.items()
        ],
        ignore_index=True,
    )


def _perturbation_table(
    found: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: np.ndarray
) -> pd.DataFrame:
    names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    member = (codes[:, None] == np.arange(len(names))).astype(np.float64)
    tables = [
        pd.DataFrame(
            {"perturbation": names, "statistic": metric}
            | _compared(observed @ member / sizes, replicated @ member / sizes)
            | {"n_cells": sizes}
        )
        for metric, (observed, replicated) in found.items()
    ]
    return pd.concat(tables, ignore_index=True)


def _compared(observed: np.ndarray, replicated: np.ndarray) -> dict[str, np.ndarray]:
    """Return columns: observed values, interval of the replicated ones (draws, n), and tail."""
    # At the positions p (draws + 1): right on average, as in calibration.coverage_curve.
    low, median, high = np.quantile(replicated, _INTERVAL, axis=0, method="weibull")
    tied = np.isclose(replicated, observed, rtol=_ROUNDING, atol=0)
    below, above = (((replicated - observed) * sign < 0) | tied for sign in (1, -1))
    tail = np.minimum(2 * np.minimum(below.mean(0), above.mean(0)), 1)
    return {"observed": observed, "low": low, "median": median, "high": high, "tail": tail}


# --- latents --------------------------------------------------------------------------------------


class _Moments(NamedTuple):
    """Moments of q(z_basal) for some draws of globals and z_artifact, and one draw of z_basal."""

    mean: np.ndarray  # (global draws, cells, latents)
    variance: np.ndarray  # the same
    kl: np.ndarray  # the same, nats
    draws: np.ndarray  # (cells, latents)


def _latent_moments(posterior: Posterior, batch: Batch) -> _Moments:
    found, value = [], torch.empty(0)
    for _ in range(_GLOBAL_DRAWS):
        latents = _nodes(posterior.guide, batch)
        node = _site(latents, sites.Z_BASAL)
        value = node["value"]
        given = {name: other["value"] for name, other in latents.items()}
        prior = _site(_given_nodes(posterior.model, batch, given), sites.Z_BASAL)["fn"]
        found.append((*_mean_and_variance(node["fn"]), _divergence(node["fn"], prior, value)))
    mean, variance, kl = (
        torch.stack(part).double().cpu().numpy() for part in zip(*found, strict=True)
    )
    return _Moments(mean, variance, kl, value.double().cpu().numpy())


def _mean_and_variance(fn: Any) -> tuple[Tensor, Tensor]:
    """Return moments of each latent, from draws where the distribution does not know them."""
    with contextlib.suppress(NotImplementedError):
        return fn.mean, fn.variance
    draws = fn.sample((_DRAWS_OF_UNKNOWN,))
    return draws.mean(0), draws.var(0)


def _divergence(q: Any, p: Any, value: Tensor) -> Tensor:
    """Return KL(q ‖ p) of each latent, in nats; shape of `value`."""
    q_each, p_each = innermost(q), innermost(p)
    if p_each.event_shape:
        return torch.full_like(value, torch.nan)
    if not q_each.event_shape:
        with contextlib.suppress(NotImplementedError):
            return torch.distributions.kl_divergence(q_each, p_each).expand_as(value)
    draws = q.sample((_DRAWS_OF_UNKNOWN,))
    entropy = stats.differential_entropy(draws.double().cpu().numpy(), axis=0)
    return -torch.as_tensor(entropy).to(value) - p_each.log_prob(draws).mean(0)


def _units(moments: _Moments) -> pd.DataFrame:
    between = moments.mean.var(0, ddof=1)
    # The mean over draws carries their variance, which is not a difference between cells.
    spread = moments.mean.mean(0).var(0) - between.mean(0) / len(moments.mean)
    variance = np.maximum(spread, 0.0)
    sd = np.sqrt(moments.variance.mean(0) + between)
    return pd.DataFrame(
        {
            "latent": np.arange(len(variance)),
            "kl": moments.kl.mean((0, 1)),
            "mean_variance": variance,
            "mean_sd": sd.mean(0),
            "active": variance > _ACTIVE_VARIANCE,
        }
    )


def _leakage(values: Mapping[str, np.ndarray], cells: CellData, seed: int) -> pd.DataFrame:
    rows = []
    for target, (labels, positives) in _targets(cells).items():
        used = labels >= 0
        for source, latents in values.items():
            for method in ("knn", "logistic"):
                found = _macro_auroc(method, latents[used], labels[used], positives, seed)
                rows.append((target, source, method, *found, int(used.sum())))
    return pd.DataFrame(rows, columns=["target", "source", "method", "auroc", "se", "n"])


def _targets(cells: CellData) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Return class of each cell (-1: left out) and the classes to tell from all others."""
    targets: dict[str, tuple[np.ndarray, list[int]]] = {}
    flags = cells.artifact > 0
    passing = np.where(cells.passing, 0, -1)
    known = cells.artifact_observed
    if flags.shape[1]:
        targets["artifact"] = np.where(known & cells.failing, 1, passing), [1]
    for column, flag in enumerate(cells.schema.artifacts):
        targets[flag] = np.where(known & flags[:, column], 1, passing), [1]
    _, codes, sizes = np.unique(cells.labels, return_inverse=True, return_counts=True)
    large = sizes >= 2 * FOLDS
    targets["perturbation"] = np.where(large[codes], codes, -1), np.flatnonzero(large).tolist()
    return targets


def _macro_auroc(
    method: str, values: np.ndarray, labels: np.ndarray, positives: list[int], seed: int
) -> tuple[float, float]:
    """Return the mean AUROC of each positive class against all others, and its standard error."""
    from sklearn.metrics import roc_auc_score

    classes, sizes = np.unique(labels, return_counts=True)
    if len(classes) < 2 or sizes.min() < 2 * FOLDS:
        return float("nan"), float("nan")
    scores = out_of_fold(_classifier(method, values.shape, seed), values, labels, seed)
    found = []
    for label in positives:
        is_positive = labels == label
        auroc = roc_auc_score(is_positive, scores[:, np.searchsorted(classes, label)])
        found.append((auroc, _auroc_error(auroc, is_positive.sum(), (~is_positive).sum())))
    aurocs, errors = np.array(found).T
    return float(aurocs.mean()), float(np.sqrt((errors**2).sum()) / len(errors))


def _classifier(method: str, shape: tuple[int, ...], seed: int) -> Pipeline:
    if method == "logistic":
        return reader_of(shape, shape[1], seed)
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline

    return make_pipeline(KNeighborsClassifier(min(_NEIGHBOURS, shape[0] // 2)))


def _auroc_error(auroc: float, n_positive: int, n_negative: int) -> float:
    """Return Hanley's and McNeil's standard error of an AUROC."""
    first, second = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc)
    variance += (n_positive - 1) * (first - auroc**2) + (n_negative - 1) * (second - auroc**2)
    return float(np.sqrt(max(variance, 0.0) / (n_positive * n_negative)))
