"""The ArviZ export: names, draws, densities against the oracle, and what ArviZ makes of it."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from functools import cache
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import scipy.sparse as sp
import torch
from factories import make_statistics
from linear_gaussian_pair import make_linear_pair, set_linear_encoder
from pyro import distributions as dist
from pyro import poutine
from scipy import stats
from tiny import make_data, make_fit, shared_fit

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.errors import QueryError
from cradle_pyro.evaluation.metrics import log_mean_exp
from cradle_pyro.evaluation.predictive import held_out_density, log_weight
from cradle_pyro.inference.objectives import local_sites
from cradle_pyro.model.cradle import cells_plate
from cradle_pyro.queries.draws import draw_globals, seed_of
from cradle_pyro.reporting.to_arviz import to_arviz
from cradle_pyro.seeding import seeded
from cradle_pyro.simulate.linear_gaussian import simulate_linear_gaussian

N_CELLS, DRAWS, CHAINS = 5, 16, 2
QUICK = {"draws": DRAWS, "chains": CHAINS, "particles": 2}
PARETO = "ignore:Estimated shape parameter of Pareto:UserWarning"
# ArviZ 0.23 on matplotlib 3.11.
OLD_ARVIZ = "ignore:Passing a dict or None as alias_mapping"


def make_cells(n_cells: int = N_CELLS) -> CellData:
    """Return cells of the tiny screen, failing ones and passing ones."""
    data = make_data()
    failing = np.flatnonzero(data.failing)[: n_cells // 2]
    passing = np.flatnonzero(data.passing)[: n_cells - n_cells // 2]
    return data.subset(np.concatenate([failing, passing]))


@cache
def export(**settings):
    return to_arviz(shared_fit(), make_cells(), **QUICK, **settings)


def sizes(group) -> dict[str, tuple[str, ...]]:
    return {str(name): variable.dims for name, variable in group.data_vars.items()}


# --- names ---------------------------------------------------------------------------------------


def test_axes_have_the_names_of_the_screen() -> None:
    cells, schema, found = make_cells(), shared_fit().schema, export()
    draw = ("chain", "draw")
    latents = {
        "effect_mask": (*draw, "perturbations", "latents"),
        "effect": (*draw, "perturbations", "latents"),
        "gene_effect": (*draw, "perturbations", "genes"),
        "interaction": (*draw, "combinations", "genes"),
        "artifact_effect": (*draw, "artifacts", "latents"),
        "artifact_risk": (*draw, "artifacts", "perturbations"),
        "depth_shift": (*draw, "artifacts"),
        "z_artifact": (*draw, "cells", "artifact_latents"),
        "z_basal": (*draw, "cells", "latents"),
    }
    counts = {"counts": (*draw, "cells", "genes")}
    assert {group: sizes(found[group]) for group in found.groups()} == {
        "posterior": latents,
        "prior": latents,
        "posterior_predictive": counts,
        "prior_predictive": counts,
        "log_likelihood": {"counts": (*draw, "cells")},
        "observed_data": {"counts": ("cells", "genes")},
        "constant_data": {
            "dispersion": ("genes",),
            "library": ("cells",),
            "perturbation": ("cells", "perturbations"),
            "artifact": ("cells", "artifacts"),
            "effect_mask_inclusion": ("perturbations", "latents"),
            "gene_effect_inclusion": ("perturbations", "genes"),
            "interaction_inclusion": ("combinations", "genes"),
        },
    }
    labels = {
        "genes": schema.genes,
        "perturbations": schema.perturbations,
        "artifacts": schema.artifacts,
        "cells": cells.obs_names,
        "latents": range(3),
        "artifact_latents": range(2),
    }
    for group in found.groups():
        for name in labels.keys() & found[group].coords.keys():
            assert list(found[group].coords[name].values) == list(labels[name])


def test_data_are_the_cells_own() -> None:
    cells, found = make_cells(), export()
    counts = found["observed_data"]["counts"].values
    np.testing.assert_array_equal(counts, cells.rows(slice(None)).toarray())
    assert counts.dtype.kind == "i"
    assert found["posterior_predictive"]["counts"].dtype.kind == "i"
    constant = found["constant_data"]
    np.testing.assert_array_equal(constant["library"], cells.library)
    np.testing.assert_array_equal(constant["artifact"], cells.artifact)
    np.testing.assert_array_equal(constant["perturbation"], cells.perturbation.toarray())
    dispersion = shared_fit().model.likelihood.inverse_dispersion.detach()
    np.testing.assert_array_equal(constant["dispersion"], dispersion)


def test_posterior_says_that_its_draws_are_those_of_a_guide() -> None:
    attrs = export()["posterior"].attrs
    assert "guide" in attrs["note"]
    assert "R-hat" in attrs["note"]
    assert export()["log_likelihood"].attrs["density"] == "marginal"


def test_without_cells_there_are_globals_alone() -> None:
    found = to_arviz(shared_fit(), **QUICK)
    assert set(found.groups()) == {"posterior", "prior", "constant_data"}
    assert {sites.EFFECT, sites.DEPTH_SHIFT} <= set(found["posterior"].data_vars)
    assert not {sites.Z_BASAL, sites.Z_ARTIFACT} & set(found["posterior"].data_vars)
    whole = export()
    for name in found["posterior"].data_vars:
        np.testing.assert_array_equal(found["posterior"][name], whole["posterior"][name])


# --- draws ---------------------------------------------------------------------------------------


def test_globals_are_those_of_queries_dealt_out_to_chains() -> None:
    posterior, found = shared_fit(), export()["posterior"]
    batch = make_cells().batch()
    for draw in range(DRAWS):
        with seeded(seed_of(0, draw)):
            expected = draw_globals(posterior.guide, batch)
        chain, place = divmod(draw, DRAWS // CHAINS)
        for name in (sites.EFFECT_MASK, sites.GENE_EFFECT, sites.ARTIFACT_RISK):
            np.testing.assert_array_equal(found[name][chain, place], expected[name])
    assert set(np.unique(found[sites.EFFECT_MASK])) <= {0.0, 1.0}


def test_probabilities_of_inclusion_are_exact() -> None:
    guide, constant = shared_fit().guide, export()["constant_data"]
    with torch.no_grad():
        mask = torch.sigmoid(guide.mask_logits).numpy()
        spike = guide.gene_effect().inclusion[..., 0].numpy()
    np.testing.assert_allclose(constant["effect_mask_inclusion"], mask, rtol=1e-6)
    np.testing.assert_allclose(constant["gene_effect_inclusion"], 1 - spike, atol=1e-6)


def test_options_do_not_move_the_draws() -> None:
    whole = export()
    less = export(prior=False, log_likelihood=None)
    assert set(whole.groups()) - set(less.groups()) == {
        "prior", "prior_predictive", "log_likelihood",
    }  # fmt: skip
    for group in ("posterior", "posterior_predictive"):
        for name in whole[group].data_vars:
            np.testing.assert_array_equal(less[group][name], whole[group][name])
    other = to_arviz(shared_fit(), make_cells(), **QUICK, seed=1)
    assert (other["posterior"]["effect"] != whole["posterior"]["effect"]).all()


def test_chosen_genes_are_cut_out_of_the_whole_result() -> None:
    genes = [shared_fit().schema.genes[i] for i in (7, 2)]
    part, whole = export_genes(tuple(genes)), export()
    for group in whole.groups():
        for name, expected in whole[group].data_vars.items():
            if "genes" in expected.dims:
                expected = expected.sel(genes=genes)
            np.testing.assert_array_equal(part[group][name], expected)
            assert part[group][name].dims == expected.dims


@cache
def export_genes(genes: tuple[str, ...]):
    return to_arviz(shared_fit(), make_cells(), **QUICK, genes=genes)


def test_prior_is_the_models_own() -> None:
    posterior = shared_fit()
    drawn = to_arviz(posterior, draws=100)["prior"]
    found = {name: drawn[name].values for name in drawn.data_vars}
    found[sites.Z_BASAL] = export()["prior"][sites.Z_BASAL].values
    scales = {
        sites.EFFECT: posterior.config.model.effect_scale,
        sites.ARTIFACT_EFFECT: posterior.config.model.artifact_effect_scale,
        sites.DEPTH_SHIFT: posterior.config.model.depth_shift_scale,
        sites.Z_BASAL: 1.0,
    }
    for name, scale in scales.items():
        values = found[name].ravel() / scale
        assert stats.kstest(values, "norm").pvalue > 1e-4
        # Every draw and every entry is a draw of its own.
        assert len(np.unique(values)) > 0.99 * values.size


def test_prior_and_posterior_share_no_random_numbers() -> None:
    found = to_arviz(shared_fit(), draws=100)
    pair = [found[group][sites.EFFECT].values.reshape(100, -1) for group in ("prior", "posterior")]
    noise = [((values - values.mean(0)) / values.std(0)).ravel() for values in pair]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.2


def test_caller_keeps_the_random_state() -> None:
    before = torch.random.get_rng_state()
    to_arviz(shared_fit(), **QUICK)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- densities -----------------------------------------------------------------------------------


@cache
def oracle_export(log_likelihood: str, particles: int = 2, draws: int = 8):
    """Return the oracle, its cells, and the export of its pair with globals at the truth."""
    oracle, cells = simulate_linear_gaussian(
        n_cells=6, n_genes=6, n_latents=2, n_perturbations=3, n_artifacts=2, seed=4
    )
    model, guide, globals_ = make_linear_pair(oracle, n_cells=6)
    precision = np.eye(oracle.n_latents) + (oracle.loading / oracle.noise_sd**2) @ oracle.loading.T
    set_linear_encoder(guide, oracle, oracle.exact_gain(), np.diag(np.linalg.inv(precision)))
    model, guide = model.float(), guide.float()
    globals_ = {name: value.float() for name, value in globals_.items()}
    schema = model.schema
    data = CellData(
        schema=schema,
        counts=sp.csr_array(cells.x.astype(np.float32)),
        perturbation=sp.csr_array(cells.d.astype(np.float32)),
        artifact=cells.a.astype(np.float32),
        artifact_observed=np.ones(6, dtype=bool),
        library=np.ones(6, dtype=np.float32),
        covariates=np.zeros((6, 0), dtype=np.int64),
        obs_names=np.array([f"cell{i}" for i in range(6)]),
        values="lognorm",
    )
    posterior = SimpleNamespace(
        model=model,
        guide=poutine.condition(guide, data=globals_),
        schema=schema,
        config=SimpleNamespace(model=model.config),
        statistics=make_statistics(schema),
        device=torch.device("cpu"),
    )
    found = to_arviz(
        posterior, data, draws=draws, chains=2, prior=False,
        log_likelihood=log_likelihood, particles=particles,
    )  # fmt: skip
    return oracle, cells, found


def test_marginal_density_is_the_exact_evidence_given_many_particles() -> None:
    oracle, cells, found = oracle_export("marginal", particles=2000, draws=8)
    density = found["log_likelihood"]["counts"].values
    exact = oracle.log_evidence(cells.x, cells.d, cells.a)
    np.testing.assert_allclose(density[0, 0], exact, atol=0.15)
    # The globals are the same in all draws here, and so is the noise of the estimate.
    np.testing.assert_array_equal(density, np.broadcast_to(density[0, 0], density.shape))


def oracle_means(oracle, cells, found) -> np.ndarray:
    """Return the expected values given the exported latents, one for each exported count."""
    z, w = (found["posterior"][name].values for name in (sites.Z_BASAL, sites.Z_ARTIFACT))
    gate = (cells.a > 0).any(1)[:, None]
    shift = cells.d @ oracle.effect + cells.a @ oracle.artifact_effect
    return oracle.intercept + (z + shift + gate * (w @ oracle.artifact_loading)) @ oracle.loading


def test_conditional_density_is_that_of_the_drawn_latents() -> None:
    oracle, cells, found = oracle_export("conditional")
    means = oracle_means(oracle, cells, found)
    expected = stats.norm(means, oracle.noise_sd).logpdf(cells.x).sum(-1)
    np.testing.assert_allclose(found["log_likelihood"]["counts"], expected, rtol=1e-4)
    assert found["log_likelihood"].attrs["density"] == "conditional"


def test_predictions_are_made_of_the_drawn_latents() -> None:
    oracle, cells, found = oracle_export("conditional", draws=40)
    made = found["posterior_predictive"]["counts"].values
    noise = (made - oracle_means(oracle, cells, found)) / oracle.noise_sd
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-4
    assert made.dtype.kind == "f"  # no counts: values of a Normal


def test_fixed_globals_of_a_guide_are_exported_at_their_values() -> None:
    oracle, _, found = oracle_export("conditional")
    effect = found["posterior"]["effect"].values
    np.testing.assert_allclose(effect, np.broadcast_to(oracle.effect, effect.shape), rtol=1e-6)


def old_held_out_density(posterior, data, *, global_draws, particles, seed):
    """Return the held-out density as it was computed before the export shared its weights."""
    values = np.empty(data.n_cells)
    with seeded(seed), torch.no_grad():
        batch = data.batch(np.arange(data.n_cells))
        weights = []
        for _ in range(global_draws):
            trace = poutine.trace(posterior.guide).get_trace(batch)
            local = local_sites(trace)
            fixed = {
                name: site["value"]
                for name, site in trace.nodes.items()
                if site["type"] == "sample" and name not in local
            }
            guide = poutine.condition(posterior.guide, data=fixed)
            weights += [old_log_weight(posterior, guide, batch) for _ in range(particles)]
        values[:] = log_mean_exp(torch.stack(weights).numpy())
    return values


def old_log_weight(posterior, guide, batch):
    guide_trace = poutine.trace(guide).get_trace(batch)
    values = {n: s["value"] for n, s in guide_trace.nodes.items() if s["type"] == "sample"}
    model_trace = poutine.trace(poutine.condition(posterior.model, data=values)).get_trace(batch)
    counts = model_trace.nodes[sites.COUNTS]
    weight = counts["fn"].log_prob(counts["value"])
    for name in local_sites(guide_trace):
        value, proposal = values[name], guide_trace.nodes[name]
        ratio = model_trace.nodes[name]["fn"].log_prob(value) - proposal["fn"].log_prob(value)
        weight = weight + (ratio if proposal["mask"] is None else ratio * proposal["mask"])
    return weight


def test_held_out_density_is_bit_for_bit_what_it_was() -> None:
    settings = {"global_draws": 2, "particles": 3, "seed": 5}
    expected = old_held_out_density(shared_fit(), make_cells(), **settings)
    found = held_out_density(shared_fit(), make_cells(), **settings)
    np.testing.assert_array_equal(found, expected)


def test_marginal_density_of_a_draw_averages_the_weights_of_its_particles() -> None:
    posterior, batch = shared_fit(), make_cells().batch()
    found = export()["log_likelihood"]["counts"].values.reshape(DRAWS, N_CELLS)
    for draw in (0, 9):
        with seeded(seed_of(0, draw)):
            globals_ = draw_globals(posterior.guide, batch)
        with seeded(seed_of(0, 0, 2)), torch.no_grad():
            guide = poutine.condition(posterior.guide, data=globals_)
            rows = torch.arange(N_CELLS).repeat(QUICK["particles"])
            weights = log_weight(posterior, guide, batch.take(rows)).reshape(-1, N_CELLS)
        np.testing.assert_allclose(found[draw], log_mean_exp(weights.numpy()), rtol=1e-6)


def test_every_chunk_of_particles_gets_its_cells(monkeypatch) -> None:
    whole = oracle_export("marginal", particles=2000, draws=8)[2]["log_likelihood"]["counts"]
    monkeypatch.setattr("cradle_pyro.reporting.to_arviz._ENTRIES_AT_A_TIME", 6 * 2000 * 2)
    oracle_export.cache_clear()
    parts = oracle_export("marginal", particles=2000, draws=8)[2]["log_likelihood"]["counts"]
    oracle_export.cache_clear()
    assert (parts.values != whole.values).any()
    np.testing.assert_allclose(parts, whole, atol=0.2)


# --- pairs other than the usual one --------------------------------------------------------------


def test_missing_flags_are_drawn_and_known_ones_kept() -> None:
    cells = make_cells()
    observed = np.array([True, False, True, True, False])
    cells = dataclasses.replace(cells, artifact_observed=observed)
    found = to_arviz(shared_fit(), cells, **QUICK)
    for group in ("posterior", "prior"):
        flags = found[group]["artifact_unobserved"]
        assert flags.dims == ("chain", "draw", "cells", "artifacts")
        known = flags.values[:, :, observed]
        np.testing.assert_array_equal(known, np.broadcast_to(cells.artifact[observed], known.shape))
        assert set(np.unique(flags)) <= {0.0, 1.0}
    given = found["constant_data"]["artifact"].values
    assert np.isnan(given[~observed]).all()
    np.testing.assert_array_equal(given[observed], cells.artifact[observed])


def edited(posterior):
    """Return a pair with a global and a local site more, as plain functions."""

    def extra(batch):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        with pyro.plate(sites.ARTIFACTS, posterior.schema.n_artifacts, dim=-1):
            pyro.sample("severity", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with cells_plate(posterior.model.n_cells, batch):
            pyro.sample("cycle", dist.Normal(torch.zeros(len(batch), 4), 1.0).to_event(1))
        return weights

    # Pyro wants each plate's own record once in a trace.
    plates = [sites.CELLS, sites.ARTIFACTS]
    inner_model = poutine.block(posterior.model, hide=plates)
    inner_guide = poutine.block(posterior.guide, hide=plates)

    def model(batch):
        pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 1.0))
        extra(batch)
        return inner_model(batch)

    def guide(batch):
        extra(batch)
        return inner_guide(batch)

    return dataclasses.replace(posterior, model=model, guide=guide)


def test_sites_of_an_edited_pair_are_exported() -> None:
    found = to_arviz(edited(shared_fit()), make_cells(), **QUICK)
    names = {
        "weights": ("chain", "draw", "weights_dim_0", "weights_dim_1"),
        "severity": ("chain", "draw", "artifacts", "severity_dim_1"),
        "cycle": ("chain", "draw", "cells", "cycle_dim_1"),
    }
    for group in ("posterior", "prior"):
        for name, dims in names.items():
            assert found[group][name].dims == dims
    assert "scale" in found["prior"]
    assert "scale" not in found["posterior"]  # the guide lacks it
    assert "dispersion" not in found["constant_data"]  # a function has no likelihood
    for values in found["posterior"]["cycle"].values.reshape(DRAWS, N_CELLS, 4):
        assert len(np.unique(values)) == values.size


def test_what_an_edited_model_observes_is_no_latent() -> None:
    posterior = shared_fit()
    depth = torch.full((posterior.schema.n_artifacts,), -1.0)
    model = poutine.condition(posterior.model, data={sites.DEPTH_SHIFT: depth})
    found = to_arviz(dataclasses.replace(posterior, model=model), make_cells(), **QUICK)
    for group in ("posterior", "prior"):
        assert sites.DEPTH_SHIFT not in found[group]
        assert sites.EFFECT in found[group]


def test_a_pair_with_fewer_mechanisms_has_fewer_variables() -> None:
    posterior = make_fit(
        "data.artifact=none", "guide.family=mean_field", "model.likelihood=poisson"
    )
    found = to_arviz(posterior, make_data("data.artifact=none").subset(np.arange(3)), **QUICK)
    assert set(found["posterior"].data_vars) == {
        "effect_mask", "effect", "gene_effect", "interaction", "z_basal",
    }  # fmt: skip
    # A mean-field Normal has no spike, and a Poisson no dispersion.
    assert set(found["constant_data"].data_vars) == {
        "effect_mask_inclusion", "library", "perturbation",
    }  # fmt: skip


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 10, "chains": 4}, "10 draws were asked for and 4 chains"),
        ({"draws": 0}, "multiple"),
        ({"draws": 8, "chains": 4}, "at least 4 draws in each of 4 chains"),
        ({"draws": 50, "chains": 10}, "at least 10 draws in each of 10 chains"),
        ({"particles": 0}, "particles=0"),
        ({"log_likelihood": "joint"}, "'marginal', 'conditional' or None, found 'joint'"),
        ({"genes": ["nothing"]}, "the model has no gene 'nothing'"),
        ({"genes": []}, "each once"),
        ({"draws": 40_000_000}, "gene_effect.*Give fewer cells, draws or genes"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(settings, message) -> None:
    with pytest.raises(QueryError, match=message):
        to_arviz(shared_fit(), **settings)


def test_too_many_cells_are_refused_with_the_size(monkeypatch) -> None:
    monkeypatch.setattr("cradle_pyro.reporting.to_arviz._MOST_BYTES", 2 * 10**5)
    with pytest.raises(QueryError, match=r"180 cells, 60 genes and 16 draws"):
        to_arviz(shared_fit(), make_data(), **QUICK)


# --- ArviZ ---------------------------------------------------------------------------------------


@pytest.fixture
def quiet(caplog):
    """Fail if ArviZ says anything through its logger."""
    with caplog.at_level(logging.WARNING, logger="arviz"):
        yield
    assert [record for record in caplog.records if record.name.startswith("arviz")] == []


@pytest.mark.usefixtures("quiet")
def test_arviz_summarises_without_a_warning() -> None:
    import arviz as az

    table = az.summary(export(), var_names="~effect_mask", filter_vars="like")
    assert not table["r_hat"].isna().any()
    assert "depth_shift[low_counts]" in table.index


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings(OLD_ARVIZ)
@pytest.mark.filterwarnings(PARETO)
def test_arviz_plots_without_a_warning() -> None:
    import arviz as az
    import matplotlib.pyplot as plt

    found = export()
    az.plot_forest(found, var_names=["depth_shift", "artifact_risk"])
    az.plot_rank(found, var_names=["depth_shift"])
    gene = {"genes": shared_fit().schema.genes[:1]}
    for group in ("posterior", "prior"):
        az.plot_ppc(found, group=group, coords=gene, num_pp_samples=5)
    az.plot_khat(az.loo(found, pointwise=True))
    assert plt.get_fignums()
    plt.close("all")


@pytest.mark.usefixtures("quiet")
def test_loo_warns_of_pareto_k_where_it_is_high_and_only_there() -> None:
    import arviz as az

    for found in (export(), export(log_likelihood="conditional")):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            loo = az.loo(found, pointwise=True)
        high = bool((loo.pareto_k > loo.good_k).any())
        assert ["Pareto" in str(warning.message) for warning in heard] == [True] * high
        assert np.isfinite(loo.elpd_loo)


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings(PARETO)
def test_cradle_is_compared_with_its_ablation() -> None:
    import arviz as az

    ablation = make_fit("data.artifact=none")
    cells = make_data("data.artifact=none")
    rows = np.flatnonzero(np.isin(cells.obs_names, make_cells().obs_names))
    other = to_arviz(ablation, cells.subset(rows), **QUICK)
    loos = {
        "CRADLE": az.loo(export(), pointwise=True, reff=1.0),
        "no artifact latent": az.loo(other, pointwise=True, reff=1.0),
    }
    table = az.compare(loos)
    assert set(table.index) == set(loos)
    assert np.isfinite(table["elpd_loo"]).all()
    assert set(az.compare({"CRADLE": export(), "no artifact latent": other}).index) == set(loos)


def test_fits_side_by_side_are_told_apart_by_r_hat() -> None:
    import arviz as az

    other = make_fit("train.seed=3", "train.max_epochs=2")
    settings = {"draws": 40, "chains": 2, "prior": False}
    first, second = (to_arviz(fit, **settings) for fit in (shared_fit(), other))
    again = to_arviz(shared_fit(), **settings, seed=1)

    def r_hat(*fits) -> float:
        both = az.concat(*fits, dim="chain")
        assert both["posterior"].sizes["chain"] == 4
        return float(az.rhat(both, var_names=["effect"])["effect"].max())

    assert r_hat(first, again) < r_hat(first, second)


def test_export_can_be_written(tmp_path) -> None:
    import arviz as az

    path = tmp_path / "export.nc"
    export().to_netcdf(str(path))
    back = az.from_netcdf(str(path))
    np.testing.assert_array_equal(back["posterior"]["effect"], export()["posterior"]["effect"])
    assert back["posterior"].attrs["note"] == export()["posterior"].attrs["note"]
