"""Guides: the structured family (default) and mean-field, made of the same parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro import distributions as dist
from pyro import plate, poutine, sample
from torch import Tensor, nn

from cradle_pyro import sites
from cradle_pyro.config import GuideConfig, NetworkConfig
from cradle_pyro.types import Batch, EffectStart, Statistics

from .cradle import (
    Cradle,
    GeneEffectPrior,
    carried_design,
    cells_plate,
    effects_plate,
    gate,
    of_rows,
    sum_of_effects,
)
from .networks import CellEncoder, GaussianHead, MeanFieldNormal, ResidualMLP, rows_of
from .relaxed import StraightThroughBernoulli, TiltedScaleMixture
from .reuse import done_once

__all__ = ["CradleGuide"]

_INITIAL_EFFECT_ERROR = 0.3
_N_SUMMARIES = 3
_SMALLEST_SQUARE = 1e-6
_LARGEST_SUMMARY = 10.0


class FreeEffect(nn.Module):
    """q(effect): a free Normal, whatever the mask (mean-field)."""

    def __init__(self, n_perturbations: int, n_latents: int, config: GuideConfig) -> None:
        super().__init__()
        scale = config.initial_scale
        self.normal = MeanFieldNormal(n_perturbations, n_latents, initial_scale=scale)

    def forward(self, mask: Tensor, rows: Tensor | None = None) -> dist.Normal:
        """Return the Normal, shape (perturbations, latents), of those at `rows` only if given."""
        return self.normal(rows)


class MaskedEffect(nn.Module):
    """q(effect | mask): a Normal from the mask and a learned embedding of the perturbation."""

    def __init__(self, n_perturbations: int, n_latents: int, config: GuideConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n_perturbations, n_latents))
        self.network = ResidualMLP([n_latents, n_latents], config.effect_encoder)
        self.head = GaussianHead(
            config.effect_encoder.hidden, n_latents, initial_scale=config.initial_scale
        )
        # A free offset lets each perturbation move at once; the network adds the dependence.
        self.offset = nn.Parameter(0.01 * torch.randn(n_perturbations, n_latents))

    def forward(self, mask: Tensor, rows: Tensor | None = None) -> dist.Normal:
        """Return the Normal, shape (..., perturbations, latents), of those at `rows` if given."""
        embedding, offset = (_taken(value, rows) for value in (self.embedding, self.offset))
        normal = self.head(self.network(embedding, mask))
        return dist.Normal(normal.loc + offset, normal.scale)


class TiltedPrior(nn.Module):
    """q(gene_effect), q(interaction): the prior given one Normal observation of every entry.

    The observation stands for the likelihood: its loc is learned in units of its error, which is
    set from the training cells (see :meth:`CradleGuide.start_effects`).
    """

    error: Tensor

    def __init__(self, prior: GeneEffectPrior, n_effects: int, n_genes: int) -> None:
        super().__init__()
        self.prior = prior  # the model's: its learned weights are shared
        self.standard_loc = nn.Parameter(torch.zeros(n_effects, n_genes))
        error = torch.full((n_effects, n_genes), _INITIAL_EFFECT_ERROR)
        self.register_buffer("error", error)

    def forward(self, rows: Tensor | None = None) -> TiltedScaleMixture:
        """Return the posterior, of the effects at `rows` if given; batch shape (effects, genes)."""
        loc, error = rows_of(self.standard_loc, rows), _taken(self.error, rows)
        return TiltedScaleMixture(of_rows(self.prior, rows), loc * error, error)


class ExpressionInput(nn.Module):
    """The encoders' input: log1p counts standardised with training statistics, and log library.

    The same constants serve query data.
    """

    log_mean: Tensor
    log_sd: Tensor
    log_library_mean: Tensor
    log_library_sd: Tensor

    def __init__(self, statistics: Statistics, *, take_log: bool) -> None:
        super().__init__()
        self.take_log = take_log
        self.register_buffer("log_mean", statistics.log_mean.clone())
        self.register_buffer("log_sd", statistics.log_sd.clamp(min=1e-2).clone())
        self.register_buffer("log_library_mean", statistics.log_library_mean.clone())
        self.register_buffer("log_library_sd", statistics.log_library_sd.clone())

    def forward(self, batch: Batch) -> Tensor:
        """Return the input, shape (cells, genes + 1)."""
        return done_once(self._of, batch.counts, batch.library)

    def _of(self, counts: Tensor, library: Tensor) -> Tensor:
        n_cells, n_genes = counts.shape
        found = counts.new_empty(n_cells, n_genes + 1)
        values = found[:, :-1].copy_(counts)
        if self.take_log:
            values.log1p_()
        values.sub_(self.log_mean).div_(self.log_sd).clamp_(-10, 10)
        found[:, -1] = (library.log() - self.log_library_mean) / self.log_library_sd
        return found


def response_summary(expression: Tensor, log_fold_change: Tensor) -> Tensor:
    """Return how far a cell's expression lies along its perturbation's direct effects.

    Parameters
    ----------
    expression
        Standardised input, genes first; shape (cells, genes + 1).
    log_fold_change
        Direct effects of the cell's perturbation, shape (..., cells, genes).

    Returns
    -------
    Tensor
        Projection, length of the effects, and their ratio; shape (..., cells, 3). With them the
        posterior of z_basal can tell a cell that responds from one that escaped.
    """
    square = (log_fold_change**2).sum(-1)
    length = (square + _SMALLEST_SQUARE).sqrt()
    along = (expression[..., :-1] * log_fold_change).sum(-1)
    summaries = torch.stack([along / length, length, along / (square + 1)], -1)
    return summaries.clamp(-_LARGEST_SUMMARY, _LARGEST_SUMMARY)


class CradleGuide(nn.Module):
    """q(globals) q(z_artifact | x, p, a) q(z_basal | x, p, r, s), same sites as the model.

    Parameters
    ----------
    model
        Tells which mechanisms there are; only the learned prior of the gene effects is shared.
    config
        Family and sizes.
    statistics
        Training statistics, for the encoders' input.

    Notes
    -----
    The encoder of z_basal is given the flags' shift and the gated z_artifact rather than their
    sum through the model's loading: the same information, without sharing the loading. Of the gene
    effects it sees a summary (:func:`response_summary`).
    """

    mask_logits: nn.Parameter | None
    effect: MaskedEffect | FreeEffect | None
    gene_effect: TiltedPrior | MeanFieldNormal | None
    interaction: TiltedPrior | MeanFieldNormal | None
    combinations: Tensor
    artifact_effect: MeanFieldNormal | None
    artifact_risk: MeanFieldNormal | None
    depth_shift: MeanFieldNormal | None
    artifact_logits: nn.Linear | None
    z_artifact: CellEncoder | None
    z_basal: nn.Module

    def __init__(self, model: Cradle, config: GuideConfig, statistics: Statistics) -> None:
        super().__init__()
        schema, n_latents = model.schema, model.config.n_latents
        structured = config.family == "structured"
        self.schema = schema
        self.n_cells = model.n_cells
        self.n_latents = n_latents
        self.structured = structured
        self.is_centred = structured and model.config.combine != "concat"
        self.register_buffer("combinations", statistics.combinations.clone())
        self.expression = ExpressionInput(statistics, take_log=model.config.likelihood != "normal")
        self._add_perturbation_parts(model, config)
        self._add_artifact_parts(model, config)
        context = [n_latents, n_latents] if structured else []
        if structured and model.n_artifact_latents:
            context.append(model.n_artifact_latents)
        if structured and self.gene_effect is not None:
            context.append(_N_SUMMARIES)
        self.z_basal = self._encoder(context, n_latents, config.encoder)

    def forward(self, batch: Batch) -> None:
        """Sample the latents of `batch`."""
        effect, gene_effect, artifact_effect = self.global_latents(batch)
        expression = self.expression(batch)
        with cells_plate(self.n_cells, batch):
            artifact = self.artifact(batch, expression)
            design = carried_design(batch.perturbation, self.combinations, batch.carried)
            shift = sum_of_effects(design[..., : effect.shape[-2]], effect)
            z_artifact = self.artifact_state(batch, expression, shift, artifact)
            context: list[Tensor] = []
            if self.structured:
                context = [shift, artifact @ artifact_effect]
                context += [] if z_artifact is None else [z_artifact]
                if gene_effect is not None:
                    change = sum_of_effects(design, gene_effect)
                    context.append(response_summary(expression, change))
            self.basal_state(batch, expression, context)

    def global_parameters(self) -> list[nn.Parameter]:
        """Return the free parameters of the global latents, which learn at their own rate."""
        parts = (self.effect, self.gene_effect, self.interaction, self.artifact_effect,
                 self.artifact_risk, self.depth_shift)  # fmt: skip
        parameters = [p for part in parts if part is not None for p in part.parameters()]
        return parameters if self.mask_logits is None else [self.mask_logits, *parameters]

    def row_parameters(self) -> list[nn.Parameter]:
        """Return the parameters with a row for each effect, of which a batch may carry few."""
        parts = [self.gene_effect, self.interaction]
        if isinstance(self.effect, FreeEffect):
            parts.append(self.effect.normal)
        return [p for part in parts if part is not None for p in part.parameters(recurse=False)]

    def start_effects(self, effects: EffectStart) -> None:
        """Set the direct effects' observations to estimates from the training cells."""
        start = 0
        for part in (self.gene_effect, self.interaction):
            if isinstance(part, TiltedPrior):
                rows = slice(start, start + len(part.error))
                with torch.no_grad():
                    part.standard_loc.copy_(effects.loc[rows] / effects.error[rows])
                    part.error.copy_(effects.error[rows])
            start = self.schema.n_perturbations

    def global_latents(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Sample the global latents; return masked effects, direct effects and artifact effects.

        Direct effects are gene effects, followed by interactions, as in
        :meth:`Cradle.perturbation_effects`.
        Of `batch` only what its cells carry matters (``batch.carried``); and it is there for guides
        that run the model to learn its sites (AutoGuides).
        """
        rows, weights, combinations, of_combinations = batch.carried or (None,) * 4
        n_perturbations, gene_effect = self.schema.n_perturbations, None
        with effects_plate(sites.PERTURBATIONS, n_perturbations, rows, weights):
            shape = [n_perturbations if rows is None else len(rows), self.n_latents]
            effect = self.expression.log_mean.new_zeros(shape)
            if self.mask_logits is not None and self.effect is not None:
                mask_dist = StraightThroughBernoulli(_taken(self.mask_logits, rows))
                mask = sample(sites.EFFECT_MASK, mask_dist.to_event(1))
                effect = mask * sample(sites.EFFECT, of_rows(self.effect, rows, mask).to_event(1))
            if self.gene_effect is not None:
                gene_effect = sample(sites.GENE_EFFECT, of_rows(self.gene_effect, rows).to_event(1))
        if gene_effect is not None and self.interaction is not None:
            n_combinations = len(self.combinations)
            with effects_plate(sites.COMBINATIONS, n_combinations, combinations, of_combinations):
                found = of_rows(self.interaction, combinations)
                beyond = sample(sites.INTERACTION, found.to_event(1))
            gene_effect = torch.cat([gene_effect, beyond], -2)
        if self.artifact_effect is None:
            return effect, gene_effect, effect.new_zeros(0, effect.shape[-1])
        with plate(sites.ARTIFACTS, self.schema.n_artifacts, dim=-1):
            artifact_effect = sample(sites.ARTIFACT_EFFECT, self.artifact_effect().to_event(1))
            if self.artifact_risk is not None:
                sample(sites.ARTIFACT_RISK, self.artifact_risk().to_event(1))
            if self.depth_shift is not None:
                sample(sites.DEPTH_SHIFT, self.depth_shift())
        return effect, gene_effect, artifact_effect

    def artifact(self, batch: Batch, expression: Tensor) -> Tensor:
        """Return the flags, filling in missing ones by a straight-through draw of q(a | x)."""
        if batch.artifact_observed is None or self.artifact_logits is None:
            return batch.artifact
        flags = StraightThroughBernoulli(self.artifact_logits(expression)).to_event(1)
        observed = batch.artifact_observed
        with poutine.mask(mask=~observed):
            drawn = sample(f"{sites.ARTIFACT}_unobserved", flags)
        return torch.where(observed.unsqueeze(-1), batch.artifact, drawn)

    def artifact_state(
        self, batch: Batch, expression: Tensor, shift: Tensor, artifact: Tensor
    ) -> Tensor | None:
        """Sample z_artifact; its guide is the prior, exactly, where there is no artifact."""
        if self.z_artifact is None:
            return None
        context = [shift, artifact] if self.structured else []
        normal = self._encode(self.z_artifact, batch, expression, context).base_dist
        failing = gate(artifact)
        scale = torch.where(failing > 0, normal.scale, torch.ones_like(normal.scale))
        gated = dist.Normal(failing * normal.loc, scale)
        return failing * sample(sites.Z_ARTIFACT, gated.to_event(1))

    def basal_state(self, batch: Batch, expression: Tensor, context: list[Tensor]) -> Tensor:
        """Sample z_basal given the expression and what acts on the cell.

        Where the decoder sees the sum of z_basal and the perturbation's shift, the encoder tells
        that sum, and the shift is taken off its location. So, but for what the encoder reads of
        it, moving a shift changes no cell's reconstruction, and its gradient is that of the
        divergence: how far its cells lie from where basal states are. An encoder of another
        family than the Normal tells the basal state itself.
        """
        found = self._encode(self.z_basal, batch, expression, context)
        if self.is_centred and isinstance(found, dist.Independent):
            normal = found.base_dist
            if isinstance(normal, dist.Normal):
                found = dist.Normal(normal.loc - context[0], normal.scale).to_event(1)
        return sample(sites.Z_BASAL, found)

    def _add_perturbation_parts(self, model: Cradle, config: GuideConfig) -> None:
        schema, n_latents = model.schema, model.config.n_latents
        self.mask_logits = self.effect = None
        if model.config.latent_effect:
            # Undecided: a mask that starts closed hides its effect from the gradient, and stays so.
            share = max(model.config.mask_probability, 0.5)
            start = torch.full((schema.n_perturbations, n_latents), math.log(share / (1 - share)))
            self.mask_logits = nn.Parameter(start)
            effect = MaskedEffect if self.structured else FreeEffect
            self.effect = effect(schema.n_perturbations, n_latents, config)
        self.gene_effect = self._direct_effect(
            model.gene_effect_prior, schema.n_perturbations, config
        )
        self.interaction = self._direct_effect(
            model.interaction_prior, len(self.combinations), config
        )

    def _direct_effect(
        self, prior: nn.Module | None, n_effects: int, config: GuideConfig
    ) -> TiltedPrior | MeanFieldNormal | None:
        if prior is None:
            return None
        shape = (n_effects, self.schema.n_genes)
        # The exact posterior's family is known for a scale mixture only.
        if not isinstance(prior, GeneEffectPrior):
            return MeanFieldNormal(*shape, initial_scale=config.initial_scale)
        if self.structured:
            return TiltedPrior(prior, *shape)
        return MeanFieldNormal(*shape, initial_scale=float(prior.scales[0]))

    def _add_artifact_parts(self, model: Cradle, config: GuideConfig) -> None:
        schema, n_latents = model.schema, model.config.n_latents
        self.artifact_effect = self.artifact_risk = self.depth_shift = None
        self.artifact_logits = self.z_artifact = None
        if not schema.n_artifacts:
            return
        scale = config.initial_scale
        self.artifact_effect = MeanFieldNormal(schema.n_artifacts, n_latents, initial_scale=scale)
        if model.has_artifact_risk:
            self.artifact_risk = MeanFieldNormal(
                schema.n_artifacts, schema.n_perturbations, initial_scale=scale
            )
            self.artifact_logits = nn.Linear(schema.n_genes + 1, schema.n_artifacts)
        if model.has_depth_shift:
            self.depth_shift = MeanFieldNormal(schema.n_artifacts, initial_scale=scale)
        if model.n_artifact_latents:
            context = [n_latents, schema.n_artifacts] if self.structured else []
            self.z_artifact = self._encoder(context, model.n_artifact_latents, config.encoder)

    def _encoder(
        self, context: Sequence[int], n_latents: int, config: NetworkConfig
    ) -> CellEncoder:
        levels = [self.schema.n_covariate_levels] if self.schema.n_covariate_levels else []
        return CellEncoder(self.schema.n_genes + 1, [*context, *levels], n_latents, config)

    def _encode(
        self, encoder: nn.Module, batch: Batch, expression: Tensor, context: list[Tensor]
    ) -> dist.TorchDistribution:
        levels = [batch.covariates] if self.schema.n_covariate_levels else []
        return encoder(expression, *context, *levels)


def _taken(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return small values at `rows`; unlike :func:`rows_of` with a dense gradient."""
    return values if rows is None else values[rows]
