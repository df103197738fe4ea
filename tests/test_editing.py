"""Edited pairs: those of ``docs/edits.py`` train to their own bound, save, load and answer."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pyro
import pytest
import scipy.sparse as sp
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule
from scipy.stats import ttest_ind
from tiny import make_data, make_fit, parameters, shared_fit

import cradle_pyro as cp
from cradle_pyro import sites
from cradle_pyro.config import ObjectiveConfig
from cradle_pyro.errors import CheckpointError, ConfigError, DataWarning
from cradle_pyro.inference.objectives import CradleELBO
from cradle_pyro.inference.posterior import Posterior

SOURCE = Path(__file__).parents[1] / "docs" / "edits.py"
_spec = importlib.util.spec_from_file_location("edits", SOURCE)
edits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(edits)

SETTINGS = {
    "laplace_effects": (),
    "horseshoe_effects": (),
    "shared_dispersion": (),
    "artifacts_by_batch": ("data.covariate_keys=['batch']",),
    "phased": (),
    "flow_guide": (),
    "low_rank_guide": (),
    "auto_globals": ("model.latent_effect=false",),
    "no_depth_shift": (),
}
NEW_SITES = {
    "horseshoe_effects": "gene_effect_scale",
    "artifacts_by_batch": "artifact_effect_by_batch",
    "phased": "phase",
}


def data_of(name: str) -> cp.CellData:
    return make_data(*SETTINGS[name])


@cache
def edited(name: str) -> Posterior:
    settings = (*SETTINGS[name], "train.max_epochs=6")
    return make_fit(*settings, data=data_of(name), pair=getattr(edits, name))


def some_batch(name: str) -> cp.Batch:
    return data_of(name).batch(slice(0, 30))


def nodes(callable_, batch: cp.Batch, **latents: torch.Tensor) -> dict:
    world = poutine.condition(callable_, data=latents)
    with torch.no_grad():
        return poutine.trace(world).get_trace(batch).nodes


# ----------------------------------------------------------------------- every edit


def test_every_edit_of_the_document_is_tested() -> None:
    builders = {
        name
        for name, value in vars(edits).items()
        if callable(value) and getattr(value, "__module__", "") == "edits" and name.islower()
    }
    assert builders == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_edited_pair_trains(name) -> None:
    loss = edited(name).history["val_loss"]
    assert loss.iloc[-1] < loss.iloc[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_its_loss_is_its_own_bound(name) -> None:
    """Pyro's Trace_ELBO, which knows no closed form, has the same expectation."""
    posterior, batch = edited(name), some_batch(name)
    ours = CradleELBO(ObjectiveConfig(counterfactual=None))
    theirs = Trace_ELBO()
    pair = (posterior.model, posterior.guide, batch)
    samples = [[elbo.loss(*pair) for _ in range(150)] for elbo in (ours, theirs)]
    assert ttest_ind(*samples, equal_var=False).pvalue > 1e-3
    # Sharp enough to see a term of half a nat per cell go missing.
    error = np.hypot(*(np.std(values) / np.sqrt(len(values)) for values in samples))
    assert error / posterior.statistics.n_cells < 0.25


@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter_of_the_pair_gets_a_gradient(name) -> None:
    posterior, batch = edited(name), some_batch(name)
    for part in (posterior.model, posterior.guide):
        part.zero_grad()
    CradleELBO(ObjectiveConfig(counterfactual=None)).loss_and_grads(
        posterior.model, posterior.guide, batch
    )
    fresh = {
        parameter_name
        for part in (posterior.model, posterior.guide)
        for parameter_name, parameter in part.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    }
    # Flags are all known here, so their encoder has nothing to do.
    assert {parameter_name.split(".")[0] for parameter_name in fresh} <= {"artifact_logits"}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_loads_as_it_was_saved(name, tmp_path) -> None:
    posterior, pair = edited(name), getattr(edits, name)
    loaded = cp.load(posterior.save(tmp_path), pair=pair)
    assert parameters(loaded) == parameters(posterior)
    first, second = (cp.average_effect(one, "KLF1", draws=4) for one in (posterior, loaded))
    assert first.equals(second)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_answers_queries(name) -> None:
    posterior, data = edited(name), data_of(name)
    cells = data.subset(slice(0, 40))
    same = cp.counterfactual(
        posterior, cells, cp.do(perturbation="factual", artifact="factual"), draws=2
    )
    observed = cells.rows(slice(None)).toarray()
    np.testing.assert_array_equal(sp.csr_matrix(same.layers["counts"]).toarray(), observed)
    changed = cp.counterfactual(posterior, cells, cp.do(artifact=0, library=900), draws=2)
    assert np.isfinite(changed.layers["rate"]).all()
    effect = cp.average_effect(posterior, "KLF1+CEBPA", draws=4)
    assert np.isfinite(effect["mean"]).all()
    assert effect["sd"].gt(0).any()
    worlds = cp.intervene(posterior, cp.do(perturbation="KLF1"), 12, draws=3)
    assert sp.csr_matrix(worlds.X).sum() > 0
    assert cp.latent(posterior, cells).shape == (40, 3)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_exports_to_arviz(name) -> None:
    cells = data_of(name).subset(slice(0, 5))
    exported = cp.to_arviz(edited(name), cells, draws=8, chains=2).posterior
    assert exported["z_basal"].sizes["cells"] == 5
    assert NEW_SITES.get(name, "gene_effect") in exported
    assert not [site for site in exported if site.endswith("_unconstrained")]


# ----------------------------------------------------------------------- each edit by itself


def test_laplace_effects_are_laplace() -> None:
    posterior = edited("laplace_effects")
    found = nodes(posterior.model, some_batch("laplace_effects"))["gene_effect"]
    scale = posterior.model.gene_effect_prior.log_scale.exp()
    expected = torch.distributions.Laplace(0.0, scale).log_prob(found["value"]).sum(-1)
    torch.testing.assert_close(found["fn"].log_prob(found["value"]), expected)


def test_horseshoe_effects_have_their_scales() -> None:
    posterior, batch = edited("horseshoe_effects"), some_batch("horseshoe_effects")
    scale = torch.full((3, 60), 2.0)
    prior = nodes(posterior.model, batch, gene_effect_scale=scale)["gene_effect"]["fn"].base_dist
    torch.testing.assert_close(prior.scale, 0.03 * scale)


def test_one_dispersion_serves_all_genes() -> None:
    posterior, batch = edited("shared_dispersion"), some_batch("shared_dispersion")
    counts = nodes(posterior.model, batch)["counts"]["fn"].base_dist
    mean, theta = counts.mean, posterior.model.likelihood.log_theta.exp()
    torch.testing.assert_close(counts.variance, mean + mean**2 / theta)


def test_a_cells_artifact_is_that_of_its_batch() -> None:
    posterior, batch = edited("artifacts_by_batch"), some_batch("artifacts_by_batch")
    found = nodes(posterior.model, batch)
    own = found["artifact_effect_by_batch"]["value"]
    loading = posterior.model.artifact_loading
    expected = torch.stack(
        [
            flags @ (found["artifact_effect"]["value"] + own[level])
            for flags, level in zip(batch.artifact, batch.covariates.argmax(-1), strict=True)
        ]
    )
    failing = (batch.artifact > 0).any(-1, keepdim=True)
    expected = expected + failing * (found["z_artifact"]["value"] @ loading)
    torch.testing.assert_close(found["artifact_shift"]["value"], expected)
    assert len(set(batch.covariates.argmax(-1).tolist())) > 1


def test_a_phase_moves_the_genes() -> None:
    posterior, batch = edited("phased"), some_batch("phased")
    torch.manual_seed(0)
    drawn = {
        name: node["value"]
        for name, node in nodes(posterior.model, batch).items()
        if node["type"] == "sample" and not node["is_observed"]
    }
    world = {
        phase: nodes(posterior.model, batch, **drawn | {"phase": torch.full((30,), phase)})
        for phase in (0.0, 1.0)
    }
    change = (world[1.0]["rate"]["value"] / world[0.0]["rate"]["value"]).log()
    loading = posterior.model.phase_loading
    # The same change for every cell but for its normalisation and its dilution.
    passing = (batch.artifact == 0).all(-1)
    centred = change - change.mean(-1, keepdim=True)
    expected = (loading - loading.mean()).expand_as(centred)
    torch.testing.assert_close(centred[passing], expected[passing], atol=1e-4, rtol=1e-3)


def test_the_flow_bends_the_posterior_and_keeps_its_density() -> None:
    posterior, batch = edited("flow_guide"), some_batch("flow_guide")
    fn = nodes(posterior.guide, batch)["z_basal"]["fn"]
    assert isinstance(fn, dist.TransformedDistribution)
    draw = fn.rsample()
    coupling = posterior.guide.z_basal.coupling
    before = coupling.inv(draw)
    jacobian = coupling.log_abs_det_jacobian(before, draw)
    torch.testing.assert_close(
        fn.log_prob(draw), fn.base_dist.log_prob(before) - jacobian, atol=1e-4, rtol=1e-4
    )
    assert (draw - before).abs().max() > 1e-3


def test_the_low_rank_posterior_correlates_latents() -> None:
    posterior, batch = edited("low_rank_guide"), some_batch("low_rank_guide")
    covariance = nodes(posterior.guide, batch)["z_basal"]["fn"].covariance_matrix
    off_diagonal = covariance - torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    factor = posterior.guide.z_basal.factor
    expected = factor @ factor.T
    expected = expected - expected.diag().diag()
    torch.testing.assert_close(off_diagonal, expected.expand_as(off_diagonal))
    assert factor.abs().max() > 0


def test_the_reference_cells_of_other_posteriors_are_draws() -> None:
    reference = edited("flow_guide").reference
    assert not reference.scale.any()
    assert reference.loc.std(0).gt(0).all()
    assert edited("laplace_effects").reference.scale.gt(0).all()


def test_a_conditioned_site_stays_at_its_value() -> None:
    posterior, batch = edited("no_depth_shift"), some_batch("no_depth_shift")
    assert not nodes(posterior.model, batch)["depth_shift"]["value"].any()
    draws = Predictive(posterior.model, guide=posterior.guide, num_samples=3)(batch)
    assert draws["rate"].shape[-2:] == (30, 60)


# ----------------------------------------------------------------------- parameters of AutoGuides


def test_two_fits_with_an_autoguide_do_not_meet() -> None:
    pyro.clear_param_store()
    settings = (*SETTINGS["auto_globals"], "train.max_epochs=2")
    first = make_fit(*settings, pair=edits.auto_globals)
    before = parameters(first)
    second = make_fit(*settings, "train.seed=1", pair=edits.auto_globals)
    batch = some_batch("auto_globals")
    with pyro.settings.context(module_local_params=False):
        for posterior in (first, second, first):
            posterior.guide(batch)
    assert parameters(first) == before
    assert parameters(second) != before
    assert not list(pyro.get_param_store())
    assert not pyro.settings.get("module_local_params")


def test_a_failing_call_leaves_pyros_setting_as_it_was() -> None:
    guide = edited("auto_globals").guide
    with pytest.raises(AttributeError):
        guide("no batch")
    assert not pyro.settings.get("module_local_params")


# ----------------------------------------------------------------------- mistakes


def misspelt(schema, config, statistics):
    class Guide(cp.CradleGuide):
        def basal_state(self, batch, expression, context):
            super().basal_state(batch, expression, context)
            return pyro.sample("phse", dist.Normal(0.0, 1.0))

    model = edits.Phased(schema, config.model, statistics)
    return model, Guide(model, config.guide, statistics)


def without_a_guide(schema, config, statistics):
    model = edits.Phased(schema, config.model, statistics)
    return model, cp.CradleGuide(model, config.guide, statistics)


def no_module(schema, config, statistics):
    model, guide = edits.phased(schema, config, statistics)
    return poutine.scale(model, 0.5), guide


def pyro_module(schema, config, statistics):
    model, _ = edits.phased(schema, config, statistics)
    return model, PyroModule[torch.nn.Linear](2, 2)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (misspelt, "lacks: 'phse'; did you mean 'phase'"),
        (without_a_guide, "no site for 'phase'"),
        (no_module, "needs a model that is a torch.nn.Module"),
        (pyro_module, "needs a guide that is a torch.nn.Module"),
    ],
)
def test_pairs_that_do_not_fit_are_errors_before_training(pair, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_fit(pair=pair)


def test_a_run_names_what_built_its_pair(tmp_path) -> None:
    posterior = edited("phased")
    posterior.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"built by edits:phased.*load\(path, pair=...\)"):
        cp.load(tmp_path)
    with (
        pytest.warns(DataWarning, match="built by edits:phased and is loaded with edits:flow"),
        pytest.raises(CheckpointError, match="do not fit together"),
    ):
        cp.load(tmp_path, pair=edits.flow_guide)


def test_a_standard_run_takes_no_pair(tmp_path) -> None:
    shared_fit().save(tmp_path)
    with pytest.raises(CheckpointError, match="standard pair, not with edits:phased"):
        cp.load(tmp_path, pair=edits.phased)


@pytest.mark.parametrize("part", ["model", "guide"])
def test_a_pair_changed_after_training_is_not_saved(part, tmp_path) -> None:
    posterior = shared_fit()
    changed = {part: poutine.scale(getattr(posterior, part), 0.5)}
    with pytest.raises(CheckpointError, match="found another one"):
        dataclasses.replace(posterior, **changed).save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_handler_around_an_edited_model_is_not_saved(tmp_path) -> None:
    posterior = edited("phased")
    held = poutine.condition(posterior.model, data={"phase": torch.tensor(0.0)})
    with pytest.raises(CheckpointError, match="found another one"):
        dataclasses.replace(posterior, model=held).save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------- handlers on a trained pair


def test_condition_fixes_a_latent_of_the_trained_model() -> None:
    posterior, batch = shared_fit(), make_data().batch(slice(0, 30))
    shift = torch.full((len(posterior.schema.artifacts),), -1.0)
    model = poutine.condition(posterior.model, data={sites.DEPTH_SHIFT: shift})
    library = nodes(model, batch)["library"]["fn"]
    without = nodes(posterior.model, batch, depth_shift=0 * shift)["library"]["fn"]
    torch.testing.assert_close(library.loc - without.loc, -batch.artifact.sum(-1))


def test_block_hides_sites_from_an_autoguide() -> None:
    posterior, batch = shared_fit(), make_data().batch(slice(0, 30))
    guide = AutoNormal(poutine.block(posterior.model, expose=[sites.DEPTH_SHIFT]))
    assert set(guide(batch)) == {sites.DEPTH_SHIFT}


def test_scale_tempers_the_log_density() -> None:
    posterior, batch = shared_fit(), make_data().batch(slice(0, 30))

    def log_density(model) -> torch.Tensor:
        torch.manual_seed(0)
        return poutine.trace(model).get_trace(batch).log_prob_sum()

    tempered = log_density(poutine.scale(posterior.model, 0.25))
    torch.testing.assert_close(tempered, 0.25 * log_density(posterior.model))


def test_reparam_recentres_a_latent() -> None:
    posterior, batch = shared_fit(), make_data().batch(slice(0, 30))
    config = {sites.ARTIFACT_EFFECT: LocScaleReparam(0.0)}
    found = nodes(poutine.reparam(posterior.model, config=config), batch)
    scale = posterior.config.model.artifact_effect_scale
    unit = found[f"{sites.ARTIFACT_EFFECT}_decentered"]
    torch.testing.assert_close(found[sites.ARTIFACT_EFFECT]["value"], scale * unit["value"])
    torch.testing.assert_close(unit["fn"].base_dist.scale, torch.ones_like(unit["value"]))


# ----------------------------------------------------------------------- NUTS

NUTS_SETTINGS = (
    "model.latent_effect=false",
    "model.gene_effect.response=false",
    "model.n_artifact_latents=0",
    "model.n_latents=1",
    "model.decoder.layers=0",
    "objective.counterfactual=none",
    "split.validation=0",  # without it, training goes to its end
    "train.max_epochs=600",
    "train.patience=600",
    "train.batch_size=200",
    "train.effect_learning_rate=0.02",
)
GLOBALS = (sites.GENE_EFFECT, sites.ARTIFACT_EFFECT, sites.ARTIFACT_RISK, sites.DEPTH_SHIFT)


@pytest.mark.slow
def test_nuts_and_svi_agree_on_the_globals() -> None:
    """At the trained parameters: means within 0.4 sd in root mean square, sds within a third."""
    posterior = make_fit(*NUTS_SETTINGS, pair=edits.laplace_effects)
    batch = make_data(*NUTS_SETTINGS).where(split="train").batch(slice(None))
    posterior.model.requires_grad_(requires_grad=False)
    torch.manual_seed(0)
    mcmc = MCMC(
        NUTS(posterior.model, max_tree_depth=6),
        num_samples=200,
        warmup_steps=200,
        disable_progbar=True,
    )
    mcmc.run(batch)
    exact = mcmc.get_samples()
    draws = [nodes(posterior.guide, batch) for _ in range(400)]
    for site in GLOBALS:
        approximate = torch.stack([draw[site]["value"] for draw in draws])
        loc, scale = exact[site].mean(0), exact[site].std(0)
        miss = ((approximate.mean(0) - loc) / scale).square().mean().sqrt()
        ratio = (approximate.std(0) / scale).median()
        sys.stdout.write(f"{site}: means {miss:.2f} sd apart (rms), sd {ratio:.2f} of NUTS'\n")
        assert miss < 0.4, site
        assert 0.67 < ratio < 1.33, site
