"""The generative model: basal state, artifact and perturbation of every cell, as Pyro sites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro import deterministic, plate, poutine, sample
from pyro import distributions as dist
from torch import Tensor, nn

from cradle_pyro import sites
from cradle_pyro.config import GeneEffectConfig, ModelConfig
from cradle_pyro.types import Batch, Carried, Schema, Statistics

from .likelihoods import make_likelihood
from .networks import Decoder
from .relaxed import PresenceBernoulli, ScaleMixtureNormal, normal_expectation

__all__ = [
    "Cradle",
    "carried_design",
    "cells_plate",
    "effects_plate",
    "gate",
    "of_rows",
    "sum_of_effects",
    "with_combinations",
]

_FIRST_RESPONSE_LOADING = 3.0  # steep enough to part cells that respond from cells that escape


def cells_plate(n_cells: int, batch: Batch) -> plate:
    """Return the plate of the cells in `batch`, scaled to the `n_cells` of the training set."""
    rows = torch.arange(len(batch), device=batch.library.device)
    return plate(sites.CELLS, n_cells, subsample=rows, dim=-1)


@contextmanager
def effects_plate(
    name: str, size: int, rows: Tensor | None, weights: Tensor | None
) -> Iterator[None]:
    """Open the plate of all effects, or of those at `rows`, whose terms count `weights` times."""
    with ExitStack() as stack:
        stack.enter_context(plate(name, size, subsample=rows, dim=-1))
        if rows is not None and weights is not None:
            # The plate counts each of them size / len(rows) times.
            stack.enter_context(poutine.scale(scale=weights * (len(rows) / size)))
        yield


def gate(artifact: Tensor) -> Tensor:
    """Return 1 for cells that carry any artifact, else 0; shape (..., cells, 1)."""
    return (artifact > 0).any(-1, keepdim=True).to(artifact.dtype)


def with_combinations(perturbation: Tensor, combinations: Tensor) -> Tensor:
    """Return the design of perturbations, followed by that of combinations.

    Parameters
    ----------
    perturbation
        Multi-hot or dosage, shape (..., cells, perturbations).
    combinations
        Members of each combination, 0 or 1, shape (combinations, perturbations).

    Returns
    -------
    Tensor
        Shape (..., cells, perturbations + combinations). A combination has the product of its
        members' dosages: zero where one is absent.
    """
    if not len(combinations):
        return perturbation
    members = combinations.transpose(-1, -2)
    present = (perturbation <= 0).to(members) @ members == 0
    dosage = perturbation.clamp(min=torch.finfo(perturbation.dtype).tiny).log() @ members
    return torch.cat([perturbation, present * dosage.exp()], -1)


def of_rows(module: nn.Module, rows: Tensor | None, *inputs: Tensor) -> Any:
    """Return a module's distribution of all effects, or of those at `rows`.

    A module of an edited pair need not know of rows.
    """
    return module(*inputs) if rows is None else module(*inputs, rows)


def carried_design(perturbation: Tensor, combinations: Tensor, carried: Carried | None) -> Tensor:
    """Return :func:`with_combinations`, only the columns that cells of the batch carry if given."""
    if carried is not None:
        perturbation = perturbation[..., carried.perturbations]
        combinations = combinations[carried.combinations][:, carried.perturbations]
    return with_combinations(perturbation, combinations)


def sum_of_effects(design: Tensor, effects: Tensor) -> Tensor:
    """Return ``design @ effects``, in queries only over the columns that some cell carries.

    Cells that are asked about at a time carry few of many perturbations. In training it is the
    batch that says which, without waiting for the values (``Batch.carried``).

    Parameters
    ----------
    design
        Shape (..., cells, effects).
    effects
        Shape (..., effects, size).
    """
    if torch.is_grad_enabled():
        return design @ effects
    columns = (design != 0).flatten(0, -2).any(0).nonzero().squeeze(-1)
    return design[..., columns] @ effects[..., columns, :]


class GeneEffectPrior(nn.Module):
    """Prior of the direct effects: one scale mixture per perturbation, or per combination.

    Parameters
    ----------
    n_effects, n_genes
        Sizes.
    config
        Scales, starting weights, and whether the weights of each perturbation are learned.
    """

    scales: Tensor

    def __init__(self, n_effects: int, n_genes: int, config: GeneEffectConfig) -> None:
        super().__init__()
        self.n_genes = n_genes
        slabs = torch.tensor(config.slab_scales)
        self.register_buffer("scales", torch.cat([torch.tensor([config.spike_scale]), slabs]))
        slab = config.slab_probability / len(slabs)
        weights = torch.tensor([1 - config.slab_probability] + [slab] * len(slabs))
        self.logits = nn.Parameter(
            weights.log().repeat(n_effects, 1), requires_grad=config.learn_weights
        )

    def forward(self, rows: Tensor | None = None) -> ScaleMixtureNormal:
        """Return the prior, of the effects at `rows` if given; batch shape (effects, genes)."""
        logits = self.logits if rows is None else self.logits[rows]
        log_weights = logits.log_softmax(-1).unsqueeze(-2)
        prior = ScaleMixtureNormal(log_weights, self.scales)
        return prior.expand(torch.Size([len(logits), self.n_genes]))


class Cradle(nn.Module):
    """CRADLE: counts of a cell from its basal state, artifact and perturbation.

    A plain Pyro callable on a :class:`~cradle_pyro.types.Batch`. All structural variables are
    sites that can be intervened upon; see ``DESIGN.md`` section 2 for the equations, which stand
    in the same order here. Extends CRADLE-VAE (Baek et al. 2025, Counterfactual Reasoning-Based
    Artifact Disentanglement for Perturbation Effects) and SAMS-VAE (Bereket and Karaletsos 2023,
    Modelling Cellular Perturbations with the Sparse Additive Mechanism Shift VAE).

    Parameters
    ----------
    schema
        Names and sizes of the screen.
    config
        Which mechanisms there are.
    statistics
        Training statistics: size of the cells plate and starting values.
    """

    combinations: Tensor

    def __init__(self, schema: Schema, config: ModelConfig, statistics: Statistics) -> None:
        super().__init__()
        self.schema = schema
        self.config = config
        self.register_buffer("combinations", statistics.combinations.clone())
        self.n_cells = statistics.n_cells
        self.likelihood = make_likelihood(config.likelihood, statistics)
        self.decoder = self._make_decoder(statistics)
        self.gene_effect_prior: nn.Module | None = None
        self.interaction_prior: nn.Module | None = None
        if config.gene_effect is not None:
            sizes = schema.n_perturbations, len(self.combinations)
            self.gene_effect_prior, self.interaction_prior = (
                GeneEffectPrior(size, schema.n_genes, config.gene_effect) if size else None
                for size in sizes
            )
        if self.has_response:
            # One latent starts out as what tells cells that respond from cells that escape.
            loading = 0.1 * torch.randn(config.n_latents)
            loading[0] = _FIRST_RESPONSE_LOADING
            self.response_loading = nn.Parameter(loading)
            self.response_bias = nn.Parameter(torch.tensor(1.0))
            # What a perturbation's own response adds to both, bias last.
            n_effects = schema.n_perturbations + len(self.combinations)
            own = torch.zeros(n_effects, config.n_latents + 1)
            self.response_deviation = nn.Parameter(own)
        self.n_artifact_latents = config.n_artifact_latents if schema.n_artifacts else 0
        self.artifact_loading = nn.Parameter(
            0.3 * torch.randn(self.n_artifact_latents, config.n_latents)
        )
        if self.n_artifact_latents and config.dilution:
            self.dilution_loading = nn.Parameter(0.3 * torch.randn(self.n_artifact_latents))
            self.dilution_bias = nn.Parameter(torch.tensor(-2.0))
        if self.has_artifact_risk:
            share = statistics.artifact_share.clamp(1e-3, 1 - 1e-3)
            self.artifact_log_odds = nn.Parameter(torch.logit(share))
        if self.has_depth_shift:
            levels = max(schema.n_covariate_levels, 1)
            self.log_library_loc = nn.Parameter(statistics.log_library_mean.expand(levels).clone())
            self.log_library_log_scale = nn.Parameter(statistics.log_library_sd.log())

    @property
    def has_response(self) -> bool:
        """Whether a cell's basal state scales its gene effects."""
        return self.config.gene_effect is not None and self.config.gene_effect.response

    @property
    def has_artifact_risk(self) -> bool:
        """Whether flags are modelled as depending on the perturbation."""
        return self.config.artifact_risk and self.schema.n_artifacts > 0

    @property
    def has_depth_shift(self) -> bool:
        """Whether the library is modelled, with a shift under each artifact."""
        return self.config.depth_shift and self.schema.n_artifacts > 0

    def forward(self, batch: Batch) -> Tensor:
        """Sample (or score) the cells of `batch`; return counts, shape (cells, genes).

        In single precision, or better, even where the guide runs in half: rounded logits of genes
        with many counts cost the loss 0.4 of 164 nats per cell on a screen of the tests.
        """
        with torch.autocast(batch.counts.device.type, enabled=False):
            return self._cells(batch)

    def _cells(self, batch: Batch) -> Tensor:
        # Equations of edited models need not know of it: their batches carry everything.
        carried = () if batch.carried is None else (batch.carried,)
        effect, gene_effect = self.perturbation_effects(*carried)
        artifact_effect, risk, depth = self.artifact_effects()
        with cells_plate(self.n_cells, batch):
            perturbation = deterministic(sites.PERTURBATION, batch.perturbation, event_dim=1)
            artifact = self.artifact(batch, perturbation, risk)
            design = carried_design(perturbation, self.combinations, batch.carried)
            shift = sum_of_effects(design[..., : effect.shape[-2]], effect)
            perturbation_shift = deterministic(sites.PERTURBATION_SHIFT, shift, event_dim=1)
            z_artifact = self.artifact_state(batch, artifact)
            artifact_shift = self.artifact_shift(batch, artifact, artifact_effect, z_artifact)
            library = self.library(batch, artifact, depth)
            z_basal = sample(sites.Z_BASAL, self._standard_normal(batch, self.config.n_latents))
            own = self.own_share(artifact, z_artifact)
            change = self.log_fold_change(z_basal, design, gene_effect, *carried)
            rate = self.rate(
                own * z_basal, own * perturbation_shift, artifact_shift, batch.covariates,
                None if change is None else own * change,
            )  # fmt: skip
            return sample(sites.COUNTS, self.likelihood(rate, library), obs=batch.counts)

    def perturbation_effects(self, carried: Carried | None = None) -> tuple[Tensor, Tensor | None]:
        """Sample the masked latent shifts (perturbations, latents) and the direct effects.

        The direct effects are the gene effects of the perturbations, followed by the interactions
        of the combinations, shape (perturbations + combinations, genes). With `carried`, of these
        only.
        """
        config, n_perturbations = self.config, self.schema.n_perturbations
        one = self.artifact_loading.new_ones(())
        rows, weights, combinations, of_combinations = carried or (None,) * 4
        gene_effect = None
        with effects_plate(sites.PERTURBATIONS, n_perturbations, rows, weights):
            effect = one.new_zeros(n_perturbations if rows is None else len(rows), config.n_latents)
            if config.latent_effect:
                shape = [config.n_latents]
                probability = one * config.mask_probability
                present = dist.Bernoulli(probability).expand(shape).to_event(1)
                mask = sample(sites.EFFECT_MASK, present)
                scale = one * config.effect_scale
                size = sample(sites.EFFECT, dist.Normal(0 * one, scale).expand(shape).to_event(1))
                effect = mask * size
            if self.gene_effect_prior is not None:
                prior = of_rows(self.gene_effect_prior, rows)
                gene_effect = sample(sites.GENE_EFFECT, prior.to_event(1))
        if gene_effect is not None and self.interaction_prior is not None:
            n_combinations = len(self.combinations)
            with effects_plate(sites.COMBINATIONS, n_combinations, combinations, of_combinations):
                prior = of_rows(self.interaction_prior, combinations)
                beyond = sample(sites.INTERACTION, prior.to_event(1))
            gene_effect = torch.cat([gene_effect, beyond], -2)
        return effect, gene_effect

    def artifact_effects(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Sample what each flag does: latent shift, log-odds by perturbation, change of depth."""
        if not self.schema.n_artifacts:
            return None, None, None
        config, one, risk, depth = self.config, self.artifact_loading.new_ones(()), None, None
        with plate(sites.ARTIFACTS, self.schema.n_artifacts, dim=-1):
            prior = dist.Normal(0 * one, one * config.artifact_effect_scale)
            effect = sample(sites.ARTIFACT_EFFECT, prior.expand([config.n_latents]).to_event(1))
            if self.has_artifact_risk:
                prior = dist.Normal(0 * one, one * config.artifact_risk_scale)
                shape = [self.schema.n_perturbations]
                risk = sample(sites.ARTIFACT_RISK, prior.expand(shape).to_event(1))
            if self.has_depth_shift:
                prior = dist.Normal(0 * one, one * config.depth_shift_scale)
                depth = sample(sites.DEPTH_SHIFT, prior)
        return effect, risk, depth

    def artifact(self, batch: Batch, perturbation: Tensor, risk: Tensor | None) -> Tensor:
        """Return the flags, shape (cells, artifacts), a descendant of the perturbation.

        Raises
        ------
        ValueError
            If flags are missing but `artifact_risk` is off, so that nothing can fill them in.
        """
        if risk is None:
            if batch.artifact_observed is not None:
                raise ValueError("Missing artifact flags need model.artifact_risk = true.")
            return deterministic(sites.ARTIFACT, batch.artifact, event_dim=1)
        logits = self.artifact_log_odds + perturbation @ risk.transpose(-1, -2)
        flags = PresenceBernoulli(logits=logits).to_event(1)
        if batch.artifact_observed is None:
            return sample(sites.ARTIFACT, flags, obs=batch.artifact)
        return sample(sites.ARTIFACT, flags, obs=batch.artifact, obs_mask=batch.artifact_observed)

    def artifact_state(self, batch: Batch, artifact: Tensor) -> Tensor | None:
        """Sample kind and degree of each cell's artifact; zero without one."""
        if not self.n_artifact_latents:
            return None
        prior = self._standard_normal(batch, self.n_artifact_latents)
        return gate(artifact) * sample(sites.Z_ARTIFACT, prior)

    def artifact_shift(
        self, batch: Batch, artifact: Tensor, effect: Tensor | None, z_artifact: Tensor | None
    ) -> Tensor:
        """Return the shift by flags and by kind of artifact; exactly zero without an artifact."""
        shift = artifact.new_zeros(len(artifact), self.config.n_latents)
        if effect is not None:
            shift = artifact @ effect
        if z_artifact is not None:
            shift = shift + z_artifact @ self.artifact_loading
        return deterministic(sites.ARTIFACT_SHIFT, shift, event_dim=1)

    def own_share(self, artifact: Tensor, z_artifact: Tensor | None) -> Tensor | float:
        """Return how much of what is special to a cell is left, in (0, 1); shape (..., cells, 1).

        Foreign RNA dilutes it: log((1 - c) exp(h) + c) = (1 - c) h to first order in the cell's
        own deviation h. Exactly one without an artifact.
        """
        if z_artifact is None or not self.config.dilution:
            return 1.0
        foreign = torch.sigmoid(z_artifact @ self.dilution_loading + self.dilution_bias)
        return 1 - gate(artifact) * foreign.unsqueeze(-1)

    def library(self, batch: Batch, artifact: Tensor, depth: Tensor | None) -> Tensor:
        """Return the library size, shape (cells,): modelled, or given by the data."""
        if depth is None:
            return deterministic(sites.LIBRARY, batch.library, event_dim=0)
        levels = self.log_library_loc
        has_levels = self.schema.n_covariate_levels > 0
        loc = batch.covariates @ levels if has_levels else levels.expand(len(batch))
        loc = loc + (artifact @ depth.unsqueeze(-1)).squeeze(-1)
        library = dist.LogNormal(loc, self.log_library_log_scale.exp())
        return sample(sites.LIBRARY, library, obs=batch.library)

    def log_fold_change(
        self,
        z_basal: Tensor,
        design: Tensor,
        gene_effect: Tensor | None,
        carried: Carried | None = None,
    ) -> Tensor | None:
        """Return the direct change of the logits, shape (..., cells, genes).

        `design` and `gene_effect` are those of the perturbations, followed by the combinations'.
        The cell's basal state scales each perturbation's effects, from cells that escape to cells
        that respond in full: a logistic function of z_basal with mean one over the prior, so that
        the gene effects stay averages over cells.
        """
        if gene_effect is None:
            return None
        if self.has_response:
            design = design * self.response(z_basal, *(() if carried is None else (carried,)))
        return sum_of_effects(design, gene_effect)

    def response(self, z_basal: Tensor, carried: Carried | None = None) -> Tensor:
        """Return how strongly cells respond, shape (..., cells, perturbations + combinations)."""
        deviation: Tensor = self.response_deviation
        if carried is not None:
            combinations = self.schema.n_perturbations + carried.combinations
            deviation = deviation[torch.cat([carried.perturbations, combinations])]
        loading = self.response_loading + deviation[:, :-1]
        bias = self.response_bias + deviation[:, -1]
        mean = normal_expectation(bias, loading.norm(dim=-1), torch.sigmoid)
        return torch.sigmoid(z_basal @ loading.transpose(-1, -2) + bias) / mean

    def log_prior(self) -> Tensor:
        """Return the log-density of the parameters that have a prior, in nats per training cell.

        The loadings of the basal state are Laplace: most genes follow few of its directions. What
        is special to the response to one perturbation is standard Normal. Constants are left out.
        """
        total = self.artifact_loading.new_zeros(())
        for loading in self._sparse_loadings():
            total = total - loading.abs().sum() / (self.config.loading_scale or 1.0)
        if self.has_response:
            total = total - 0.5 * self.response_deviation.square().sum()
        return total / self.n_cells

    def parameters_with_prior(self) -> list[nn.Parameter]:
        """Return the parameters that `log_prior` scores, which decay no further."""
        own = [self.response_deviation] if self.has_response else []
        return [*self._sparse_loadings(), *own]

    def _sparse_loadings(self) -> list[nn.Parameter]:
        if self.config.loading_scale is None or not len(self.decoder.linear):
            return []
        return list(self.decoder.linear[0].parameters())

    def rate(
        self,
        z_basal: Tensor,
        perturbation_shift: Tensor,
        artifact_shift: Tensor,
        covariates: Tensor,
        log_fold_change: Tensor | None,
    ) -> Tensor:
        """Return the expected fractions of the kept genes, shape (..., cells, genes)."""
        states = [z_basal, perturbation_shift, artifact_shift]
        if self.config.combine == "sum":
            states = [z_basal + perturbation_shift + artifact_shift]
        elif self.config.combine == "shift":
            states = [z_basal + perturbation_shift, artifact_shift]
        if self.schema.n_covariate_levels:
            states.append(covariates)
        logits = self.decoder(*states)
        if log_fold_change is not None:
            if self.schema.has_rest:
                log_fold_change = nn.functional.pad(log_fold_change, (0, 1))
            logits = logits + log_fold_change
        rate = self.likelihood.rate(logits, has_rest=self.schema.has_rest)
        return deterministic(sites.RATE, rate, event_dim=1)

    def _make_decoder(self, statistics: Statistics) -> Decoder:
        config, schema = self.config, self.schema
        states = [config.n_latents] * {"sum": 1, "shift": 2, "concat": 3}[config.combine]
        if schema.n_covariate_levels:
            states.append(schema.n_covariate_levels)
        n_outputs = schema.n_genes + schema.has_rest
        decoder = Decoder(states, n_outputs, config.decoder, linear_path=config.linear_path)
        with torch.no_grad():
            decoder.bias[: schema.n_genes] = self.likelihood.initial_logits(statistics)
            if schema.has_rest:
                rest = (1 - statistics.fraction.sum()).clamp(min=1e-3)
                decoder.bias[schema.n_genes] = rest.log()
        return decoder

    def _standard_normal(self, batch: Batch, size: int) -> dist.TorchDistribution:
        zero = batch.library.new_zeros(())
        return dist.Normal(zero, zero + 1).expand([len(batch), size]).to_event(1)
