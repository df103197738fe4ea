"""The posterior in ArviZ: draws, predictions, densities and data, with names on every axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.encode import combination_labels
from cradle_pyro.errors import QueryError, near, shown
from cradle_pyro.evaluation.metrics import log_mean_exp
from cradle_pyro.evaluation.predictive import log_weight
from cradle_pyro.inference.objectives import is_local, with_imputed_flags
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.model.intervene import sample_nodes
from cradle_pyro.model.noise import innermost
from cradle_pyro.queries.counterfactual import query_cells
from cradle_pyro.queries.draws import seed_of
from cradle_pyro.queries.interventions import empty_batch
from cradle_pyro.queries.progress import progress_bar
from cradle_pyro.reporting.inference_data import inference_data
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["to_arviz"]

PyroCallable = Callable[[Batch], object]
Density = Literal["marginal", "conditional"]
Score = Callable[[Mapping[str, Tensor], slice, Batch, Mapping[str, Any]], np.ndarray]

_MOST_BYTES: Final = 2 * 1024**3
_ENTRIES_AT_A_TIME: Final = 1_000_000
_LEAST_DRAWS_PER_CHAIN: Final = 4  # ArviZ's R-hat and effective sample sizes need as many
_PRIOR, _DENSITY = (1,), (2,)  # random streams beside that of the posterior

_GENES, _LATENTS, _ARTIFACT_LATENTS = "genes", "latents", "artifact_latents"
_DISPERSION: Final = "dispersion"
_UNOBSERVED: Final = f"{sites.ARTIFACT}_unobserved"
_AXES: Final = {
    sites.EFFECT_MASK: (sites.PERTURBATIONS, _LATENTS),
    sites.EFFECT: (sites.PERTURBATIONS, _LATENTS),
    sites.GENE_EFFECT: (sites.PERTURBATIONS, _GENES),
    sites.INTERACTION: (sites.COMBINATIONS, _GENES),
    sites.ARTIFACT_EFFECT: (sites.ARTIFACTS, _LATENTS),
    sites.ARTIFACT_RISK: (sites.ARTIFACTS, sites.PERTURBATIONS),
    sites.DEPTH_SHIFT: (sites.ARTIFACTS,),
    sites.Z_BASAL: (sites.CELLS, _LATENTS),
    sites.Z_ARTIFACT: (sites.CELLS, _ARTIFACT_LATENTS),
    _UNOBSERVED: (sites.CELLS, sites.ARTIFACTS),
    sites.COUNTS: (sites.CELLS, _GENES),
    sites.PERTURBATION: (sites.CELLS, sites.PERTURBATIONS),
    sites.ARTIFACT: (sites.CELLS, sites.ARTIFACTS),
    sites.LIBRARY: (sites.CELLS,),
    _DISPERSION: (_GENES,),
}
_PLATES: Final = (sites.CELLS, sites.PERTURBATIONS, sites.COMBINATIONS, sites.ARTIFACTS)

_NOTES: Final = {
    "posterior": "Independent draws of the fitted guide, dealt out to chains. R-hat near one and "
    "full effective sample sizes follow from that and say nothing about the fit.",
    "prior": "The model's own priors at its trained parameters (empirical Bayes): not what was "
    "believed before the data.",
    "posterior_predictive": "Counts of the same cells anew: their labels, flags and libraries, "
    "latents from the posterior.",
    "prior_predictive": "Counts of cells with the labels, flags and libraries of these, all "
    "latents from the prior.",
    "constant_data": "What densities and predictions are conditional on, and point estimates. "
    "dispersion: inverse dispersion θ, variance = mean + mean²/θ. *_inclusion: posterior "
    "probability that the value is not from the spike.",
}
_DENSITIES: Final = {
    "marginal": "log p(counts of a cell | globals; library, artifact, perturbation), the cell's "
    "own latents integrated out by importance sampling.",
    "conditional": "log p(counts of a cell | its latents, globals; library, artifact, "
    "perturbation). For checking fits; PSIS-LOO with it is unreliable.",
}


def to_arviz(
    posterior: Posterior,
    cells: AnnData | CellData | None = None,
    *,
    draws: int = 500,
    chains: int = 4,
    prior: bool = True,
    log_likelihood: Density | None = "marginal",
    particles: int = 16,
    genes: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Any:
    """Return the posterior for ArviZ: an InferenceData on ArviZ 0.2x, a DataTree on 1.x.

    Parameters
    ----------
    posterior
        A fitted pair, edited or not: variables are the sites that guide and model have.
    cells
        Cells with the columns the model was trained with, annotated; or CellData aligned to the
        model. Without, the result has global latents only.
    draws
        Independent draws of the guide, with hard masks; a multiple of `chains`.
    chains
        Number of chains that the draws are dealt out to, since ArviZ's diagnostics compare chains.
    prior
        Add the groups ``prior`` and, with cells, ``prior_predictive``.
    log_likelihood
        Which density of the cells to add: "marginal", what PSIS-LOO needs; "conditional" on the
        cell's latents; None for no density.
    particles
        Draws of a cell's latents that the marginal density is made from.
    genes
        Genes to keep in the result, all by default; densities are those of all genes.
    seed
        Seed of the draws. Globals are those of a query with the same seed.
    progress
        Show a progress bar.

    Returns
    -------
    InferenceData or DataTree
        Axes are named chain, draw, cells, genes, perturbations, artifacts, latents and
        artifact_latents; those of sites that CRADLE does not know ``<site>_dim_0`` and so on.
        ``posterior``: global latents, and the local ones of the cells. ``prior``: the same.
        ``posterior_predictive``, ``prior_predictive``, ``observed_data``: ``counts``.
        ``log_likelihood``: ``counts``, one number per draw and cell, in nats.
        ``constant_data``: ``dispersion``, the likelihood's inverse dispersion, a point estimate;
        ``effect_mask_inclusion``, ``gene_effect_inclusion``, ``interaction_inclusion``: exact
        rather than a share of draws; ``library``, ``artifact`` and ``perturbation`` of the cells.

    Raises
    ------
    QueryError
        If draws and chains do not go together, a gene is unknown, or the result would take more
        than 2 GiB.
    DataError
        If the cells do not fit the model.

    Notes
    -----
    *Diagnostics.* Draws come from the fitted guide and not from a Markov chain: R-hat near one
    says nothing about the fit. It does compare fits whose draws stand side by side:
    ``az.concat(a, b, dim="chain")`` on ArviZ 0.2x, ``xarray.concat`` of the posterior groups on
    1.x. Indicators such as ``effect_mask`` whose draws all agree have no R-hat, and NumPy warns of
    0 / 0; leave them out, ``az.summary(result, var_names="~effect_mask", filter_vars="like")``, and
    read their exact probabilities in ``constant_data``.

    *Densities* are conditional on flags and library, which are functions of the counts. The
    marginal one is, for draw s of the globals, log mean_k p(x, z_k, w_k | globals_s) /
    q(z_k, w_k | x, globals_s), which
    :func:`~cradle_pyro.evaluation.predictive.held_out_density` averages over s. It estimates from
    below, the closer the more particles. All s share the random numbers of z and w, so that what
    varies over s is due to the globals; noise of the estimate would pass for posterior uncertainty
    in PSIS-LOO. With the density that is conditional on z, leaving out a cell would have to undo
    its whole influence on its own z: PSIS-LOO fails, and Pareto k says so (Merkle et al. 2019).

    *PSIS-LOO* (Vehtari et al. 2017) asks how cells that the model was trained on would be predicted
    without them. Give it training cells; the density of test cells is the log of the mean over
    draws as it is. It takes the guide for the posterior, and the networks and the dispersion, which
    are point estimates, for known: only test cells judge these. Draws are independent, so
    ``az.loo(result, reff=1.0)`` is right, and spares the effective sample sizes of all variables.

    References
    ----------
    Vehtari, Gelman and Gabry, "Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC", 2017.
    Merkle, Furr and Rabe-Hesketh, "Bayesian Comparison of Latent Variable Models: Conditional
    Versus Marginal Likelihoods", 2019.
    Kumar, Carroll, Hartikainen and Martin, "ArviZ a unified library for exploratory analysis of
    Bayesian models in Python", 2019.

    Examples
    --------
    >>> import cradle_pyro as cp
    >>> adata = cp.simulate_perturbseq(n_cells=200, n_genes=40, n_perturbations=3, n_pairs=1)
    >>> settings = ["train.max_epochs=1", "qc.doublets=false", "qc.flags=['low_counts']"]
    >>> config = cp.Config().with_settings(settings)
    >>> prepared = cp.prepare(adata, config)
    >>> posterior = cp.fit(prepared.data, config, progress=False)
    >>> idata = to_arviz(posterior, prepared.adata[:5], draws=16)
    >>> idata["posterior"]["gene_effect"].dims
    ('chain', 'draw', 'perturbations', 'genes')
    >>> idata["log_likelihood"]["counts"].sizes["cells"]
    5
    """
    _check_settings(draws, chains, particles, log_likelihood)
    posterior = _without_held_sites(posterior)
    data = None if cells is None else query_cells(posterior, cells)
    plan = _Plan(posterior, data, _gene_rows(posterior.schema.genes, genes), draws, seed)
    programs = {"posterior": posterior.guide} | ({"prior": posterior.model} if prior else {})
    found = {group: _find_sites(program, plan) for group, program in programs.items()}
    _check_size(plan, found)
    score = None if log_likelihood is None else _score(plan, log_likelihood, particles)
    groups: dict[str, dict[str, np.ndarray]] = {}
    with progress_bar("ArviZ", draws * len(programs), show=progress) as advance, torch.no_grad():
        drawn = _draw(posterior.guide, plan, found["posterior"], advance, score=score)
        groups |= drawn.groups("posterior", chains)
        if prior:
            own = _draw(posterior.model, plan, found["prior"], advance, stream=_PRIOR)
            groups |= own.groups("prior", chains)
    groups["constant_data"] = _constants(plan) | drawn.inclusion
    if data is not None:
        counts = plan.kept(data.rows(slice(None)).toarray(), _AXES[sites.COUNTS])
        groups["observed_data"] = {sites.COUNTS: counts.astype(plan.counts_type)}
    axes = {name: site.axes for group in found.values() for name, site in group.items()}
    axes |= {f"{name}_inclusion": names for name, names in axes.items()}
    notes = _notes(groups, log_likelihood, particles, seed)
    return inference_data(groups, coords=plan.coords, dims=_AXES | axes, attrs=notes)


class _Plan:
    """What is drawn for whom: cells, genes to keep, draws and seed; and the labels of axes.

    Parameters
    ----------
    posterior, data
        The pair, and cells or none.
    gene_rows
        Positions of the genes to keep; None for all.
    draws, seed
        Number of draws and their seed.
    """

    def __init__(
        self,
        posterior: Posterior,
        data: CellData | None,
        gene_rows: np.ndarray | None,
        draws: int,
        seed: int,
    ) -> None:
        self.posterior, self.data, self.gene_rows = posterior, data, gene_rows
        self.draws, self.seed = draws, seed
        schema, config = posterior.schema, posterior.config.model
        labels = {
            sites.PERTURBATIONS: schema.perturbations,
            sites.COMBINATIONS: combination_labels(
                posterior.statistics.combinations.numpy(), schema
            ),
            sites.ARTIFACTS: schema.artifacts,
            _GENES: schema.genes,
            _LATENTS: range(config.n_latents),
            _ARTIFACT_LATENTS: range(config.n_artifact_latents),
            sites.CELLS: () if data is None else data.obs_names,
        }
        self.sizes = {name: len(values) for name, values in labels.items()}
        self.coords = {name: np.array(values) for name, values in labels.items()}
        self.coords[_GENES] = self.kept(self.coords[_GENES], (_GENES,))

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.sizes[sites.CELLS]

    @property
    def counts_shape(self) -> tuple[int, int]:
        """Cells and kept genes."""
        return self.n_cells, len(self.coords[_GENES])

    @property
    def counts_type(self) -> type:
        """Type of counts: integers, which ArviZ plots as such; other values stay as they are."""
        is_count = self.data is not None and self.data.values == "counts"
        return np.int32 if is_count else np.float32

    def first_cell(self) -> Batch:
        """Return one cell, to learn from which sites there are; an empty one if there is none."""
        if self.data is not None:
            return self._batch(slice(0, 1))
        return empty_batch(self.posterior, 1)

    def batches(self) -> list[tuple[slice, Batch]]:
        """Return the cells, about a million entries at a time."""
        size = max(_ENTRIES_AT_A_TIME // self.sizes[_GENES], 1)
        rows = [slice(i, min(i + size, self.n_cells)) for i in range(0, self.n_cells, size)]
        return [(part, self._batch(part)) for part in rows]

    def kept(self, value: np.ndarray, axes: Sequence[str]) -> np.ndarray:
        """Return `value` at the genes that the result keeps."""
        if self.gene_rows is None or _GENES not in axes:
            return value
        return value.take(self.gene_rows, axis=axes.index(_GENES))

    def _batch(self, rows: slice) -> Batch:
        assert self.data is not None
        batch = self.data.batch(rows, device=self.posterior.device)
        observed = self.data.artifact_observed
        # All chunks have the same sites, whether or not flags are missing in each of them.
        if not observed.all():
            known = torch.from_numpy(observed[rows]).to(self.posterior.device)
            batch = batch.replace(artifact_observed=known)
        return batch


class _Site(NamedTuple):
    """A latent site in the result; `is_local` where each cell has values of its own."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    is_local: bool

    @property
    def n_bytes(self) -> int:
        """Size of one draw."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class _Drawn:
    """Arrays that are filled draw by draw; draws are their first axis.

    Parameters
    ----------
    plan
        What is drawn.
    found
        The latent sites.
    has_density
        Whether each draw comes with the log density of the cells.
    """

    def __init__(self, plan: _Plan, found: Mapping[str, _Site], *, has_density: bool) -> None:
        self._plan, self._found = plan, found
        self.latents = {
            name: np.empty((plan.draws, *site.shape), site.dtype) for name, site in found.items()
        }
        self.counts: np.ndarray = np.empty((plan.draws, *plan.counts_shape), plan.counts_type)
        self.density = np.empty((plan.draws, plan.n_cells)) if has_density else None
        self.inclusion: dict[str, np.ndarray] = {}

    def add_globals(self, draw: int, nodes: Mapping[str, Any]) -> None:
        """Keep the global latents of one draw, and what their sites say of inclusion."""
        for name, node in nodes.items():
            axes, share = self._found[name].axes, _inclusion(node)
            self.latents[name][draw] = self._kept(node["value"], axes)
            if share is not None:
                sums = self.inclusion.setdefault(f"{name}_inclusion", np.zeros(1))
                part = self._kept(share, axes) / self._plan.draws
                self.inclusion[f"{name}_inclusion"] = sums + part

    def add_cells(
        self, draw: int, rows: slice, latents: Mapping[str, Tensor], counts: Tensor
    ) -> None:
        """Keep the local latents and the counts of some cells in one draw."""
        for name, value in latents.items():
            axes = self._found[name].axes
            place: Any = (rows if axis == sites.CELLS else slice(None) for axis in axes)
            self.latents[name][draw, *place] = self._kept(value, axes)
        self.counts[draw, rows] = self._kept(counts, _AXES[sites.COUNTS])

    def groups(self, name: str, chains: int) -> dict[str, dict[str, np.ndarray]]:
        """Return the groups of an export, draws dealt out to chains."""
        found = {name: self.latents}
        if self._plan.data is not None:
            found[f"{name}_predictive"] = {sites.COUNTS: self.counts}
        if self.density is not None:
            found["log_likelihood"] = {sites.COUNTS: self.density}
        return {
            group: {key: value.reshape(chains, -1, *value.shape[1:]) for key, value in of.items()}
            for group, of in found.items()
        }

    def _kept(self, value: Tensor, axes: tuple[str, ...]) -> np.ndarray:
        return self._plan.kept(value.cpu().numpy(), axes)


def _draw(
    program: PyroCallable,
    plan: _Plan,
    found: Mapping[str, _Site],
    advance: Callable[[], object],
    *,
    score: Score | None = None,
    stream: tuple[int, ...] = (),
) -> _Drawn:
    """Return draws of a guide's or a model's latents, and counts that the model makes of them."""
    first, batches = plan.first_cell(), plan.batches()
    local = [name for name, site in found.items() if site.is_local]
    shared = [name for name in found if name not in local]
    drawn = _Drawn(plan, found, has_density=score is not None and bool(batches))
    for draw in range(plan.draws):
        with seeded(seed_of(plan.seed, draw, *stream)):
            nodes = _latent_nodes(program, first, shared)
        drawn.add_globals(draw, nodes)
        globals_ = _values(nodes)
        given = poutine.condition(program, data=globals_)
        for rows, batch in batches:
            with seeded(seed_of(plan.seed, draw, rows.start, *stream)):
                latents = _values(_latent_nodes(given, batch, local))
                world = poutine.condition(plan.posterior.model, data=globals_ | latents)
                counts = poutine.trace(world).get_trace(batch).nodes[sites.COUNTS]
                made = counts["fn"].sample()
            drawn.add_cells(draw, rows, _with_observed_flags(batch, latents), made)
            if score is not None and drawn.density is not None:
                drawn.density[draw, rows] = score(globals_, rows, batch, counts)
        advance()
    return drawn


def _score(plan: _Plan, log_likelihood: Density, particles: int) -> Score:
    """Return the function from globals and cells to the cells' log densities."""

    def conditional(
        globals_: Mapping[str, Tensor], rows: slice, batch: Batch, counts: Mapping[str, Any]
    ) -> np.ndarray:
        return counts["fn"].log_prob(counts["value"]).cpu().numpy()

    def marginal(
        globals_: Mapping[str, Tensor], rows: slice, batch: Batch, counts: Mapping[str, Any]
    ) -> np.ndarray:
        # The same for all draws, so that they differ by their globals alone.
        with seeded(seed_of(plan.seed, rows.start, *_DENSITY)):
            return _marginal_density(plan.posterior, globals_, batch, particles)

    return marginal if log_likelihood == "marginal" else conditional


def _marginal_density(
    posterior: Posterior, globals_: Mapping[str, Tensor], batch: Batch, particles: int
) -> np.ndarray:
    """Return log mean_k p(x, z_k, w_k | globals) / q(z_k, w_k | x, globals), shape (cells,)."""
    guide = poutine.condition(posterior.guide, data=dict(globals_))
    size = max(_ENTRIES_AT_A_TIME // (batch.counts.shape[1] * particles), 1)
    found = []
    for rows in torch.arange(len(batch), device=batch.library.device).split(size):
        weights = log_weight(posterior, guide, batch.take(rows.repeat(particles)))
        found.append(log_mean_exp(weights.reshape(particles, len(rows)).cpu().numpy()))
    return np.concatenate(found)


def _latent_nodes(program: PyroCallable, batch: Batch, names: Iterable[str]) -> dict[str, Any]:
    """Return the nodes of some sites, as a guide or a model draws them for the cells of `batch`."""
    nodes = poutine.trace(program).get_trace(batch).nodes
    return {name: nodes[name] for name in names}


def _values(nodes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: node["value"] for name, node in nodes.items()}


def _with_observed_flags(batch: Batch, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `latents` with the drawn flags of cells whose flags are known replaced by these."""
    if _UNOBSERVED not in latents:
        return latents
    return latents | {_UNOBSERVED: with_imputed_flags(batch, latents).artifact}


def _inclusion(node: Mapping[str, Any]) -> Tensor | None:
    """Return the probability that a site's values are not from a spike; None without a spike."""
    fn = innermost(node["fn"])
    if getattr(fn, "support", None) is constraints.boolean:
        share = fn.mean
    elif hasattr(fn, "inclusion"):
        share = 1 - fn.inclusion[..., 0]
    else:
        return None
    return share.expand(node["value"].shape)


def _without_held_sites(posterior: Posterior) -> Posterior:
    """Return the pair with those sites of the guide hidden that an edited model observes."""
    cell = _Plan(posterior, None, None, 0, 0).first_cell()
    with torch.no_grad(), seeded(0):
        model = sample_nodes(poutine.trace(posterior.model).get_trace(cell))
        guide = sample_nodes(poutine.trace(posterior.guide).get_trace(cell))
    held = [name for name in guide if name in model and model[name]["is_observed"]]
    if not held:
        return posterior
    return dataclasses.replace(posterior, guide=poutine.block(posterior.guide, hide=held))


def _find_sites(program: PyroCallable, plan: _Plan) -> dict[str, _Site]:
    """Return the latent sites of a guide or a model; local ones only where there are cells.

    Whatever a guide samples is latent, at a fixed value too; a model observes some of its sites.
    """
    with torch.no_grad(), seeded(0):
        nodes = sample_nodes(poutine.trace(program).get_trace(plan.first_cell()))
    is_guide = program is plan.posterior.guide
    return {
        name: _site(name, node, plan)
        for name, node in nodes.items()
        if not (node["infer"].get("_deterministic") if is_guide else node["is_observed"])
        and (plan.data is not None or not is_local(node))
    }


def _site(name: str, node: Mapping[str, Any], plan: _Plan) -> _Site:
    value = node["value"].cpu().numpy()
    axes = _axes(name, node, plan.sizes | {sites.CELLS: 1})
    lengths = {sites.CELLS: plan.n_cells, _GENES: plan.counts_shape[1]}
    shape = tuple(lengths.get(axis, size) for axis, size in zip(axes, value.shape, strict=True))
    return _Site(axes, shape, value.dtype, is_local(node))


def _axes(name: str, node: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return names of a site's axes: known ones, those of its plates, else numbered ones."""
    shape = node["value"].shape
    known = _AXES.get(name, ())
    if tuple(shape) == tuple(sizes[axis] for axis in known):
        return known
    n_batch = len(shape) - len(node["fn"].event_shape)
    plates = {
        n_batch + frame.dim: frame.name
        for frame in node["cond_indep_stack"]
        if frame.vectorized and frame.name in _PLATES
    }
    return tuple(
        plates[i] if i in plates and sizes[plates[i]] == size else f"{name}_dim_{i}"
        for i, size in enumerate(shape)
    )


def _constants(plan: _Plan) -> dict[str, np.ndarray]:
    """Return the point-estimated dispersion, and what is given of the cells."""
    found = {}
    likelihood = getattr(plan.posterior.model, "likelihood", None)
    dispersion = getattr(likelihood, "inverse_dispersion", None)
    if dispersion is not None:
        found[_DISPERSION] = plan.kept(dispersion.detach().cpu().numpy(), _AXES[_DISPERSION])
    if plan.data is not None:
        data = plan.data
        missing = ~data.artifact_observed[:, None]
        found[sites.LIBRARY] = data.library
        found[sites.PERTURBATION] = data.perturbation.toarray()
        if plan.sizes[sites.ARTIFACTS]:
            found[sites.ARTIFACT] = np.where(missing, np.nan, data.artifact)
    return found


def _notes(
    groups: Mapping[str, object], log_likelihood: Density | None, particles: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return notes about each group, as its attributes."""
    common = {
        "inference_library": "cradle_pyro",
        "inference_library_version": metadata.version("cradle-pyro"),
        "seed": seed,
    }
    notes = {group: common | {"note": _NOTES[group]} for group in groups if group in _NOTES}
    if log_likelihood is not None and "log_likelihood" in groups:
        density: dict[str, Any] = {"density": log_likelihood, "note": _DENSITIES[log_likelihood]}
        if log_likelihood == "marginal":
            density["particles"] = particles
        notes["log_likelihood"] = common | density
    return notes


def _gene_rows(known: Sequence[str], genes: Sequence[str] | None) -> np.ndarray | None:
    if genes is None:
        return None
    unknown = [gene for gene in genes if gene not in set(known)]
    if unknown or len(set(genes)) < len(genes) or not len(genes):
        wrong = (
            f"the model has no gene {shown(unknown)}{near(unknown[0], known)}"
            if unknown
            else (f"found {len(genes)} of which {len(set(genes))} differ")
        )
        raise QueryError(f"Expected genes of the model, each once; {wrong}")
    rows = {gene: row for row, gene in enumerate(known)}
    return np.array([rows[gene] for gene in genes])


def _check_settings(
    draws: int, chains: int, particles: int, log_likelihood: Density | None
) -> None:
    if draws < 1 or chains < 1 or draws % chains:
        raise QueryError(
            f"Draws are dealt out evenly to chains, but {draws} draws were asked for and "
            f"{chains} chains. Give a multiple of the chains, such as "
            f"draws={_LEAST_DRAWS_PER_CHAIN * max(chains, 1) * 25}."
        )
    least = max(_LEAST_DRAWS_PER_CHAIN, chains)
    if draws // chains < least:
        raise QueryError(
            f"ArviZ's diagnostics need at least {least} draws in each of {chains} chains, found "
            f"{draws // chains}. Set draws={least * chains} or more, or fewer chains."
        )
    if particles < 1:
        raise QueryError(f"At least one particle is needed, found particles={particles}.")
    if log_likelihood not in (None, *get_args(Density)):
        raise QueryError(
            f"log_likelihood is {shown(get_args(Density))} or None, found {log_likelihood!r}."
        )


def _check_size(plan: _Plan, found: Mapping[str, Mapping[str, _Site]]) -> None:
    """Refuse what would not fit in memory, before any work."""
    predicted = int(np.prod(plan.counts_shape)) * np.dtype(plan.counts_type).itemsize
    sizes = {"cells": 4 * plan.n_cells * plan.sizes[_GENES]}
    for group, of in found.items():
        sizes |= {f"{group} {name}": plan.draws * site.n_bytes for name, site in of.items()}
        sizes[f"{group}_predictive {sites.COUNTS}"] = plan.draws * predicted
    total = sum(sizes.values())
    if total > _MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise QueryError(
            f"The export would take {total / 1024**3:.1f} GiB, more than the "
            f"{_MOST_BYTES / 1024**3:.0f} GiB allowed; the largest part is {largest}, "
            f"{sizes[largest] / 1024**3:.1f} GiB, for {plan.n_cells} cells, "
            f"{plan.counts_shape[1]} genes and {plan.draws} draws. Give fewer cells, draws or "
            "genes, or prior=False."
        )
