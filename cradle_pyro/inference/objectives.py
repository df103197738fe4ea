"""The objective: -ELBO / N + beta * counterfactual term, as named terms in nats per cell.

The bound is assembled from the (model, guide) traces as Pyro's mean-field ELBO does it, so an
edited pair trains to its own bound; the counterfactual term re-uses the guide's trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from cradle_pyro import sites
from cradle_pyro.config import ObjectiveConfig, PartnerTerm, SleepTerm
from cradle_pyro.model.cradle import gate
from cradle_pyro.model.intervene import run_world
from cradle_pyro.model.reuse import declare_rows, reused
from cradle_pyro.types import Batch

__all__ = ["COUNTERFACTUAL", "CradleELBO", "FlipPool", "elbo_terms", "with_imputed_flags"]

COUNTERFACTUAL = "counterfactual"

PyroCallable = Callable[[Batch], Any]


class FlipPool(NamedTuple):
    """What intervened cells are given: states that occur among the training cells.

    Parameters
    ----------
    designs, design_weights
        Distinct rows of the design, shape (designs, perturbations), and how often they occur.
    flags, flag_weights
        Distinct artifact vectors of failing cells, shape (flags, artifacts), and how often.
    passing_library, failing_library
        Libraries of training cells without and with an artifact.
    """

    designs: Tensor
    design_weights: Tensor
    flags: Tensor
    flag_weights: Tensor
    passing_library: Tensor
    failing_library: Tensor

    def to(self, device: torch.device | str) -> FlipPool:
        """Return the pool on `device`."""
        return FlipPool(*(value.to(device) for value in self))


class CradleELBO(ELBO):
    """Loss of a (model, guide) pair on a batch, for ``pyro.infer.SVI`` and for Lightning.

    Parameters
    ----------
    config
        Counterfactual term, its weight beta, particles and class balance.
    pool
        States given to intervened cells; needed by the consistency terms only.
    failing_share
        Share of failing training cells, for the class weights (mean one over the training set).

    Notes
    -----
    ``terms`` is in nats per cell. ``loss`` and ``differentiable_loss`` return N times their sum,
    where N is the size of the cells plate, as Pyro's ELBOs do.
    """

    def __init__(
        self, config: ObjectiveConfig, pool: FlipPool | None = None, *, failing_share: float = 0.5
    ) -> None:
        super().__init__(
            num_particles=config.particles,
            max_plate_nesting=1,
            vectorize_particles=config.particles > 1,
        )
        self.config = config
        self.pool = pool
        self.failing_share = failing_share

    def terms(self, model: PyroCallable, guide: PyroCallable, batch: Batch) -> dict[str, Tensor]:
        """Return the loss's terms (to be minimised), in nats per cell.

        ``counts``, ``artifact`` and ``library`` are negative log-likelihoods, the names of latent
        sites are KL divergences, ``counterfactual`` is beta times the counterfactual term.
        """
        return self._terms(model, guide, batch)[0]

    @reused()
    def _terms(
        self, model: PyroCallable, guide: PyroCallable, batch: Batch
    ) -> tuple[dict[str, Tensor], int]:
        weights = self._class_weights(batch)
        (model_trace, guide_trace), *_ = self._get_traces(model, guide, (batch,), {})
        n_cells = plate_size(guide_trace, model_trace)
        terms = {
            name: -value / (n_cells * self.num_particles)
            for name, value in elbo_terms(model_trace, guide_trace, weights).items()
        }
        wanted = self.config.counterfactual is not None and self.config.beta > 0
        # Nothing can be generated from a broken model; the caller sees which term is not finite.
        if wanted and torch.isfinite(torch.stack(list(terms.values()))).all():
            term = self._counterfactual(model, guide, guide_trace, batch)
            terms[COUNTERFACTUAL] = self.config.beta * term
        return terms, n_cells

    def differentiable_loss(self, model: PyroCallable, guide: PyroCallable, batch: Batch) -> Tensor:
        """Return the loss of the training set, estimated from `batch`, in nats."""
        terms, n_cells = self._terms(model, guide, batch)
        return n_cells * torch.stack(list(terms.values())).sum()

    def loss(self, model: PyroCallable, guide: PyroCallable, batch: Batch) -> float:
        """Return the loss without gradient."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, batch).item()

    def loss_and_grads(self, model: PyroCallable, guide: PyroCallable, batch: Batch) -> float:
        """Return the loss and add its gradient to the parameters (for ``pyro.infer.SVI``)."""
        loss = self.differentiable_loss(model, guide, batch)
        loss.backward()
        return loss.item()

    def _get_trace(
        self, model: PyroCallable, guide: PyroCallable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        is_messenger = isinstance(poutine.unwrap(guide), Messenger)
        if is_validation_enabled() or is_messenger:
            return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
        # The same, but densities are left to `elbo_terms`: a divergence in closed form needs none.
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        return model_trace, guide_trace

    def _class_weights(self, batch: Batch) -> Tensor | None:
        if not self.config.balance_failing or not 0 < self.failing_share < 1:
            return None
        failing = gate(batch.artifact).squeeze(-1)
        weights = torch.full_like(failing, 0.5 / (1 - self.failing_share))
        weights[failing > 0] = 0.5 / self.failing_share
        if batch.artifact_observed is not None:
            weights[~batch.artifact_observed] = 1.0
        return weights

    def _counterfactual(
        self, model: PyroCallable, guide: PyroCallable, guide_trace: Trace, batch: Batch
    ) -> Tensor:
        term = self.config.counterfactual
        assert term is not None  # `_terms` asks for a term only where there is one
        latents = one_particle(guide_trace)
        if isinstance(term, PartnerTerm):
            return partner_term(guide, latents, batch)
        if self.pool is None:
            raise ValueError("The consistency terms need a pool of training states (FlipPool).")
        rows = torch.arange(len(batch), device=batch.library.device)
        if term.generated_fraction < 1:
            size = max(round(term.generated_fraction * len(batch)), 1)
            rows = torch.randperm(len(batch), device=rows.device)[:size]
        local = local_sites(guide_trace)
        latents = {name: value[rows] if name in local else value for name, value in latents.items()}
        factual = with_imputed_flags(batch.take(rows), latents)
        flipped = _flip(factual, latents, self.pool, term.flip_artifact, term.flip_perturbation)
        world = run_world(
            model,
            flipped,
            latents,
            {
                sites.ARTIFACT: flipped.artifact,
                sites.PERTURBATION: flipped.perturbation,
                sites.LIBRARY: flipped.library,
            },
        )
        flipped = flipped.replace(counts=world[sites.COUNTS])
        if isinstance(term, SleepTerm):
            return sleep_term(guide, latents, flipped)
        return kl_term(guide, latents, factual, flipped)


def elbo_terms(
    model_trace: Trace, guide_trace: Trace, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Return each site's contribution to the ELBO of the training set, summed over particles.

    Parameters
    ----------
    model_trace, guide_trace
        Of the guide, and of the model replayed with it. Densities that Pyro's
        ``get_importance_trace`` has computed are used.
    weights
        Per-cell weights of the local terms, shape (cells,).

    Returns
    -------
    dict
        Observed sites: log-likelihood. Latent sites: minus the KL divergence, in closed form
        where torch has one registered, else by the sample. Auxiliary sites of the guide, from which
        an AutoGuide computes its latents: minus the log-density of the draw.

    Raises
    ------
    ValueError
        If a latent site of the model is absent from the guide, or not reparameterised there.
    """
    terms = {}
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if site["infer"].get("_deterministic"):
            continue
        if site["is_observed"]:
            value = _log_prob(site)
        else:
            if name not in guide_trace.nodes:
                raise ValueError(f"The guide has no site for the model's latent '{name}'.")
            value = -_divergence(site, guide_trace.nodes[name])
        if weights is not None and is_local(site):
            value = value * weights
        terms[name] = value.sum()
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and site["infer"].get("is_auxiliary"):
            value = -_log_prob(site)
            if weights is not None and is_local(site):
                value = value * weights
            terms[name] = value.sum()
    return terms


def _divergence(model_site: Mapping[str, Any], guide_site: Mapping[str, Any]) -> Tensor:
    guide_dist = guide_site["fn"]
    if not guide_dist.has_rsample:
        raise ValueError(
            f"The guide's site '{guide_site['name']}' ({type(guide_dist).__name__}) is not "
            "reparameterised; use a distribution with rsample, or train with Pyro's Trace_ELBO."
        )
    try:
        divergence = kl_divergence(guide_dist, model_site["fn"])
    except NotImplementedError:
        return _log_prob(guide_site) - _log_prob(model_site)
    return scale_and_mask(divergence, guide_site["scale"], guide_site["mask"])


def _log_prob(site: Mapping[str, Any]) -> Tensor:
    """Return the scaled log-density of a trace node's value, computed now if it was not before."""
    if "log_prob" in site:
        return site["log_prob"]
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def is_local(site: Mapping[str, Any]) -> bool:
    """Return whether a trace node lies in the cells plate."""
    return any(frame.name == sites.CELLS for frame in site["cond_indep_stack"])


def local_sites(trace: Trace) -> set[str]:
    """Return the names of the sampled sites in the cells plate."""
    return {
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and is_local(site)
    }


def plate_size(*traces: Trace) -> int:
    """Return the full size of the cells plate."""
    for trace in traces:
        for site in trace.nodes.values():
            for frame in site.get("cond_indep_stack", ()):
                if frame.name == sites.CELLS:
                    return frame.full_size or frame.size
    raise ValueError(f"Neither model nor guide has a plate called '{sites.CELLS}'.")


def one_particle(trace: Trace) -> dict[str, Tensor]:
    """Return the latent values of the first particle, without gradient and particle dimension."""
    values = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        value = site["value"].detach()
        n_dims = len(site["fn"].event_shape) + 1
        values[name] = (
            value.reshape(value.shape[-n_dims - 1 :])[0] if value.dim() > n_dims else value
        )
    return values


def sleep_term(guide: PyroCallable, latents: Mapping[str, Tensor], flipped: Batch) -> Tensor:
    """Return -mean log q(z, w | x') at the values that generated the cells x', nats per cell.

    Only the guide's encoders receive a gradient: globals are fixed at the values that generated
    x'. A cell without artifact in x' contributes nothing for z_artifact. The optimum is the exact
    posterior, as in the sleep phase of Bornschein and Bengio 2015, Reweighted Wake-Sleep.
    """
    trace = _guide_given(guide, latents, flipped)
    total = torch.zeros_like(flipped.library)
    for name in sorted(set(latents) & set(trace.nodes)):
        site = trace.nodes[name]
        if not is_local(site):
            continue
        log_prob = site["fn"].log_prob(site["value"])
        if name == sites.Z_ARTIFACT:
            log_prob = gate(flipped.artifact).squeeze(-1) * log_prob
        total = total + log_prob
    return -total.mean()


def kl_term(
    guide: PyroCallable, latents: Mapping[str, Tensor], factual: Batch, flipped: Batch
) -> Tensor:
    """Return mean KL(q(z | x) || q(z | x')), the first without gradient, nats per cell."""
    with torch.no_grad():
        target = _guide_given(guide, latents, factual).nodes[sites.Z_BASAL]["fn"]
    other = _guide_given(guide, latents, flipped).nodes[sites.Z_BASAL]["fn"]
    return kl_divergence(target, other).mean()


def partner_term(guide: PyroCallable, latents: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Return mean KL(q(z | x_partner, p, r) || q(z | x, p, r)) over cells with a partner.

    Both posteriors are given the shift of the partner's flags and one draw of the globals. Cells
    without a partner contribute nothing and are not counted. Corrects Baek et al. 2025, whose
    divergence omitted a variance.
    """
    if batch.partner is None or batch.partner_rows is None or not len(batch.partner_rows):
        return batch.library.new_zeros(())
    globals_only = {
        name: value
        for name, value in latents.items()
        if name not in {sites.Z_BASAL, f"{sites.ARTIFACT}_unobserved"}
    }
    # z_artifact is the partner's own: it is abducted from the partner, once, for both.
    globals_only.pop(sites.Z_ARTIFACT, None)
    partner_trace = _guide_given(guide, globals_only, batch.partner)
    if sites.Z_ARTIFACT in partner_trace.nodes:
        globals_only[sites.Z_ARTIFACT] = partner_trace.nodes[sites.Z_ARTIFACT]["value"]
    own = batch.take(batch.partner_rows).replace(
        artifact=batch.partner.artifact, artifact_observed=None
    )
    for part, whole in ((own.counts, batch.counts), (own.library, batch.library)):
        declare_rows(part, whole, batch.partner_rows)
    own_trace = _guide_given(guide, globals_only, own)
    target = partner_trace.nodes[sites.Z_BASAL]["fn"]
    return kl_divergence(target, own_trace.nodes[sites.Z_BASAL]["fn"]).mean()


def _guide_given(guide: PyroCallable, latents: Mapping[str, Tensor], batch: Batch) -> Trace:
    return poutine.trace(poutine.condition(guide, data=dict(latents))).get_trace(batch)


def with_imputed_flags(cells: Batch, latents: Mapping[str, Tensor]) -> Batch:
    """Return `cells` with missing flags replaced by the guide's draw among `latents`."""
    drawn = latents.get(f"{sites.ARTIFACT}_unobserved")
    if cells.artifact_observed is None or drawn is None:
        return cells
    artifact = torch.where(cells.artifact_observed.unsqueeze(-1), cells.artifact, drawn)
    return cells.replace(artifact=artifact, artifact_observed=None)


def _flip(
    batch: Batch,
    latents: Mapping[str, Tensor],
    pool: FlipPool,
    flip_artifact: float,
    flip_perturbation: float,
) -> Batch:
    """Return `batch` with artifact and perturbation replaced for random cells, library to match."""
    n_cells, device = len(batch), batch.library.device
    artifact, library = batch.artifact, batch.library
    failing = gate(artifact).squeeze(-1) > 0
    if len(pool.flags):
        changed = torch.rand(n_cells, device=device) < flip_artifact
        flags = pool.flags[torch.multinomial(pool.flag_weights, n_cells, replacement=True)]
        new = torch.where(failing.unsqueeze(-1), torch.zeros_like(flags), flags)
        artifact = torch.where(changed.unsqueeze(-1), new, artifact)
        if sites.DEPTH_SHIFT in latents:
            shift = (artifact - batch.artifact) @ latents[sites.DEPTH_SHIFT]
            library = library * shift.exp()
        else:
            of_state = torch.where(
                failing,
                _choose(pool.passing_library, n_cells),
                _choose(pool.failing_library, n_cells),
            )
            library = torch.where(changed, of_state, library)
    changed = torch.rand(n_cells, device=device) < flip_perturbation
    if batch.carried is None:
        designs = pool.designs[torch.multinomial(pool.design_weights, n_cells, replacement=True)]
    else:  # what other cells of the batch carry: of others there are no effects
        designs = batch.perturbation[torch.randperm(n_cells, device=device)]
    perturbation = torch.where(changed.unsqueeze(-1), designs, batch.perturbation)
    return batch.replace(artifact=artifact, library=library, perturbation=perturbation)


def _choose(values: Tensor, n: int) -> Tensor:
    if not len(values):
        return values.new_zeros(n)
    return values[torch.randint(len(values), (n,), device=values.device)]
