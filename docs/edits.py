"""Edits of the model: each changes one part, in a few lines, without a fork.

A pair is built by a function of schema, configuration and training statistics that returns a model
and a guide::

    posterior = cp.fit(data, config, pair=laplace_effects)
    posterior.save("runs/laplace")
    posterior = cp.load("runs/laplace", pair=laplace_effects)

Everything else works as with the standard pair: queries, effects, export to ArviZ.
"""

import torch
from pyro import distributions as dist
from pyro import plate, poutine, sample
from pyro.distributions.transforms import affine_coupling
from pyro.infer.autoguide import AutoNormal
from torch import nn

import cradle_pyro as cp


# [laplace] Another prior on the gene effects: any module that returns a distribution.
class LaplaceEffects(nn.Module):
    """B_tg ~ Laplace(0, scale): many small effects instead of spike and slab."""

    def __init__(self, schema, scale=0.1):
        super().__init__()
        self.shape = (schema.n_perturbations, schema.n_genes)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())  # learned (empirical Bayes)

    def forward(self):
        return dist.Laplace(0.0, self.log_scale.exp()).expand(self.shape)


def laplace_effects(schema, config, statistics):
    model = cp.Cradle(schema, config.model, statistics)
    model.gene_effect_prior = LaplaceEffects(schema)
    return model, cp.CradleGuide(model, config.guide, statistics)


# [horseshoe] A prior with latents of its own: the guide gets a site for each of them.
class HorseshoeEffects(nn.Module):
    """B_tg ~ Normal(0, τ λ_tg), λ_tg ~ HalfCauchy(1); Carvalho, Polson and Scott 2010."""

    def __init__(self, schema, scale=0.03):
        super().__init__()
        self.n_genes, self.scale = schema.n_genes, scale

    def forward(self):
        one = torch.ones(self.n_genes)
        local = sample("gene_effect_scale", dist.HalfCauchy(one).to_event(1))
        return dist.Normal(0.0, self.scale * local)


class HorseshoePosterior(nn.Module):
    def __init__(self, schema):
        super().__init__()
        shape = (schema.n_perturbations, schema.n_genes)
        self.loc = nn.ParameterDict({k: torch.zeros(shape) for k in ("effect", "scale")})
        self.log_sd = nn.ParameterDict({k: torch.full(shape, -2.0) for k in ("effect", "scale")})

    def forward(self):
        scale = dist.LogNormal(self.loc["scale"], self.log_sd["scale"].exp())
        sample("gene_effect_scale", scale.to_event(1))
        return dist.Normal(self.loc["effect"], self.log_sd["effect"].exp())


def horseshoe_effects(schema, config, statistics):
    model = cp.Cradle(schema, config.model, statistics)
    model.gene_effect_prior = HorseshoeEffects(schema)
    guide = cp.CradleGuide(model, config.guide, statistics)
    guide.gene_effect = HorseshoePosterior(schema)
    return model, guide


# [likelihood] Another likelihood: a module of rate and library; rates and scales are inherited.
class SharedDispersion(cp.AbstractLikelihood):
    """Negative binomial with one dispersion for all genes, by Pyro's own distribution."""

    def __init__(self):
        super().__init__()
        self.log_theta = nn.Parameter(torch.tensor(1.0))

    def forward(self, rate, library):
        theta = self.log_theta.exp()
        mean = library.unsqueeze(-1) * rate + 1e-8
        return dist.GammaPoisson(theta, theta / mean).to_event(1)


def shared_dispersion(schema, config, statistics):
    model = cp.Cradle(schema, config.model, statistics)
    model.likelihood = SharedDispersion()
    return model, cp.CradleGuide(model, config.guide, statistics)


# [hierarchy] A hierarchical artifact effect: each batch has its own, around the common one.
class ArtifactsByBatch(cp.Cradle):
    def artifact_effects(self):
        common, risk, depth = super().artifact_effects()
        shape = [self.schema.n_artifacts, self.config.n_latents]
        with plate("levels", self.schema.n_covariate_levels, dim=-1):
            around = dist.Normal(torch.zeros(shape), 0.3).to_event(2)
            own = sample("artifact_effect_by_batch", around)
        return common.unsqueeze(-3) + own, risk, depth  # (..., levels, artifacts, latents)

    def artifact_shift(self, batch, artifact, effect, z_artifact):
        # A cell's flags, set out by its batch: the flags of all other batches are zero.
        flags = batch.covariates.unsqueeze(-1) * artifact.unsqueeze(-2)
        return super().artifact_shift(batch, flags.flatten(-2), effect.flatten(-3, -2), z_artifact)


class ArtifactsByBatchGuide(cp.CradleGuide):
    def __init__(self, model, config, statistics):
        super().__init__(model, config, statistics)
        shape = (self.schema.n_covariate_levels, self.schema.n_artifacts, self.n_latents)
        self.own_loc = nn.Parameter(torch.zeros(shape))
        self.own_log_sd = nn.Parameter(torch.full(shape, -2.0))

    def global_latents(self, batch):
        with plate("levels", self.schema.n_covariate_levels, dim=-1):
            own = dist.Normal(self.own_loc, self.own_log_sd.exp())
            sample("artifact_effect_by_batch", own.to_event(2))
        return super().global_latents(batch)


def artifacts_by_batch(schema, config, statistics):
    model = ArtifactsByBatch(schema, config.model, statistics)
    return model, ArtifactsByBatchGuide(model, config.guide, statistics)


# [latent] An extra latent: a phase of every cell that moves its genes, with an encoder of its own.
class Phased(cp.Cradle):
    def __init__(self, schema, config, statistics):
        super().__init__(schema, config, statistics)
        self.phase_loading = nn.Parameter(0.1 * torch.randn(schema.n_genes))

    def log_fold_change(self, z_basal, design, gene_effect):
        phase = sample("phase", dist.Normal(0.0, 1.0))  # in the plate of the cells
        change = super().log_fold_change(z_basal, design, gene_effect)
        return change + phase.unsqueeze(-1) * self.phase_loading


class PhasedGuide(cp.CradleGuide):
    def __init__(self, model, config, statistics):
        super().__init__(model, config, statistics)
        self.phase = nn.Linear(self.schema.n_genes + 1, 2)

    def basal_state(self, batch, expression, context):
        super().basal_state(batch, expression, context)
        loc, log_sd = self.phase(expression).unbind(-1)
        sample("phase", dist.Normal(loc, log_sd.exp()))


def phased(schema, config, statistics):
    model = Phased(schema, config.model, statistics)
    return model, PhasedGuide(model, config.guide, statistics)


# [flow] A guide with a normalising flow for the basal state: replace the encoder's distribution.
class Flow(nn.Module):
    """q(z_basal | x): the encoder's Normal, bent by a coupling layer (Dinh et al. 2017)."""

    def __init__(self, encoder, n_latents):
        super().__init__()
        self.encoder = encoder
        self.coupling = affine_coupling(n_latents, hidden_dims=[16])

    def forward(self, expression, *context):
        normal = self.encoder(expression, *context)
        return dist.TransformedDistribution(normal, [self.coupling])


def flow_guide(schema, config, statistics):
    model = cp.Cradle(schema, config.model, statistics)
    guide = cp.CradleGuide(model, config.guide, statistics)
    guide.z_basal = Flow(guide.z_basal, config.model.n_latents)
    return model, guide


# [low-rank] Or with correlations between the basal state's dimensions.
class LowRank(nn.Module):
    """q(z_basal | x) = Normal(loc, diag(scale²) + F Fᵀ), the factor F shared by all cells."""

    def __init__(self, encoder, n_latents, rank=1):
        super().__init__()
        self.encoder = encoder
        self.factor = nn.Parameter(0.01 * torch.randn(n_latents, rank))

    def forward(self, expression, *context):
        normal = self.encoder(expression, *context).base_dist
        factor = self.factor.expand(*normal.loc.shape, -1)
        return dist.LowRankMultivariateNormal(normal.loc, factor, normal.scale**2)


def low_rank_guide(schema, config, statistics):
    model = cp.Cradle(schema, config.model, statistics)
    guide = cp.CradleGuide(model, config.guide, statistics)
    guide.z_basal = LowRank(guide.z_basal, config.model.n_latents)
    return model, guide


# [auto] An AutoGuide for the globals. It draws no discrete site: the masks are switched off.
class AutoGlobals(cp.CradleGuide):
    """Encoders of the standard guide; every global latent by AutoNormal."""

    def __init__(self, model, config, statistics):
        super().__init__(model, config, statistics)
        self.gene_effect = self.interaction = None
        self.artifact_effect = self.artifact_risk = self.depth_shift = None
        names = ["gene_effect", "interaction", "artifact_effect", "artifact_risk", "depth_shift"]
        self.globals = AutoNormal(poutine.block(model, expose=names))

    def global_parameters(self):
        return list(self.globals.parameters())  # they learn at train.effect_learning_rate

    def global_latents(self, batch):
        drawn = self.globals(batch)
        no_shift = drawn["gene_effect"].new_zeros(self.schema.n_perturbations, self.n_latents)
        direct = [drawn[name] for name in ("gene_effect", "interaction") if name in drawn]
        return no_shift, torch.cat(direct), drawn["artifact_effect"]


def auto_globals(schema, config, statistics):
    """For configurations with ``model.latent_effect = false``."""
    model = cp.Cradle(schema, config.model, statistics)
    return model, AutoGlobals(model, config.guide, statistics)


# [conditioned] A handler in the model: a latent fixed at a value, and no longer learned.
class NoDepthShift(cp.Cradle):
    """No flag changes the library: the site stays, at zero."""

    def forward(self, batch):
        none = {"depth_shift": torch.zeros(self.schema.n_artifacts)}
        return poutine.condition(super().forward, data=none)(batch)


def no_depth_shift(schema, config, statistics):
    model = NoDepthShift(schema, config.model, statistics)
    guide = cp.CradleGuide(model, config.guide, statistics)
    guide.depth_shift = None
    return model, guide
