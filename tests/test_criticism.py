"""Checks of the fit on models whose fit is known: themselves, and spoilt on purpose."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from factories import make_batch, make_pair, make_schema
from linear_gaussian_pair import make_linear_pair, set_linear_encoder
from pyro import distributions as dist
from pyro import poutine, sample
from scipy import stats
from tiny import make_data, make_screen, shared_fit

from cradle_pyro import sites
from cradle_pyro.data.dataset import CellData
from cradle_pyro.errors import DataError, QueryError
from cradle_pyro.evaluation.calibration import rank_spread, uniformity
from cradle_pyro.evaluation.criticism import (
    basal_ranks,
    count_calibration,
    effect_ranks,
    latent_diagnostics,
    predictive_check,
)
from cradle_pyro.evaluation.truth import truth_of
from cradle_pyro.model.cradle import cells_plate
from cradle_pyro.model.intervene import run_world, sample_nodes
from cradle_pyro.queries.effects import effect_draws
from cradle_pyro.simulate.linear_gaussian import simulate_linear_gaussian

N_CELLS = 300
MOMENTS = ["observed", "low", "median", "high", "tail"]


# --- pairs that fit, and cells of their own ----------------------------------------------------


def as_cells(schema, batch, *, values="counts") -> CellData:
    """Return a batch without covariates as CellData."""
    observed = batch.artifact_observed
    n_cells = len(batch)
    return CellData(
        schema=schema,
        counts=sp.csr_array(batch.counts.float().numpy()),
        perturbation=sp.csr_array(batch.perturbation.float().numpy()),
        artifact=batch.artifact.float().numpy(),
        artifact_observed=np.ones(n_cells, bool) if observed is None else observed.numpy(),
        library=batch.library.float().numpy(),
        covariates=np.zeros((n_cells, 0), dtype=np.int64),
        obs_names=np.arange(n_cells).astype(str),
        values=values,
    )


class PlainGuide:
    """Globals at known values; z_basal from the prior or, if given, from `basal(batch)`."""

    def __init__(self, model, globals_, basal=None):
        self.model, self.globals, self.basal = model, globals_, basal

    def __call__(self, batch):
        for name, value in self.globals.items():
            sample(name, dist.Delta(value).to_event(value.dim()))
        with cells_plate(self.model.n_cells, batch):
            if self.model.n_artifact_latents:
                sample(sites.Z_ARTIFACT, normal(batch, self.model.n_artifact_latents))
            z_dist = normal(batch, self.model.config.n_latents)
            sample(sites.Z_BASAL, z_dist if self.basal is None else self.basal(batch))


def normal(batch, size):
    return dist.Normal(torch.zeros(len(batch), size), 1.0).to_event(1)


def make_self(*, n_cells=N_CELLS, seed=0, basal=None, **model):
    """Return a posterior that knows a model's globals, and cells that this model generated."""
    schema = make_schema()
    pair, _ = make_pair(schema, model=model, seed=seed)
    batch = make_batch(schema, n_cells=n_cells, seed=seed)
    batch = batch.replace(library=torch.full((n_cells,), 150.0))
    nodes = sample_nodes(poutine.trace(pair).get_trace(batch))
    globals_ = {
        name: node["value"].detach()
        for name, node in nodes.items()
        if not node["is_observed"] and name not in (sites.Z_BASAL, sites.Z_ARTIFACT)
        and not node["infer"].get("_deterministic")
    }  # fmt: skip
    acts = {sites.ARTIFACT: batch.artifact}
    world = run_world(pair, batch, globals_, acts)
    batch = batch.replace(counts=world[sites.COUNTS], library=world[sites.LIBRARY])
    guide = PlainGuide(pair, globals_, basal)
    posterior = SimpleNamespace(model=pair, guide=guide, schema=schema, device=torch.device("cpu"))
    values = "lognorm" if model.get("likelihood") == "normal" else "counts"
    return posterior, as_cells(schema, batch, values=values)


def make_oracle(*, width=1.0, shift=0.0):
    """Return the linear-Gaussian pair and its cells; q(z_basal) is exact, its sd times `width`."""
    oracle, cells = simulate_linear_gaussian(
        n_cells=800, n_genes=6, n_latents=2, n_perturbations=3, n_artifacts=2, seed=4
    )
    model, guide, globals_ = make_linear_pair(oracle, n_cells=800)
    precision = np.eye(oracle.n_latents) + (oracle.loading / oracle.noise_sd**2) @ oracle.loading.T
    variance = width**2 * np.diag(np.linalg.inv(precision))
    set_linear_encoder(guide, oracle, oracle.exact_gain(), variance)
    with torch.no_grad():
        guide.z_basal.head.loc.bias += shift
        # Draws of the effects differ: what the guide makes of others than the model's is wrong.
        guide.mask_logits.fill_(20.0)
        guide.effect.head.raw_scale.bias += 3.0
    posterior = SimpleNamespace(
        model=model.float(), guide=guide.float(), schema=model.schema, device=torch.device("cpu")
    )
    batch = SimpleNamespace(
        counts=torch.as_tensor(cells.x),
        perturbation=torch.as_tensor(cells.d),
        artifact=torch.as_tensor(cells.a),
        library=torch.ones(len(cells.x)),
        artifact_observed=None,
    )
    Batch = type("Cells", (SimpleNamespace,), {"__len__": lambda self: len(cells.x)})
    data = as_cells(model.schema, Batch(**vars(batch)), values="lognorm")
    return oracle, cells, posterior, globals_, data


# --- predictive checks ----------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["nb", "normal"])
def test_cells_of_the_model_itself_pass_the_predictive_check(likelihood):
    # Statistics of one set of cells share its luck: several sets. Of 40 draws, at most one lies
    # beyond the observed value with probability 4 / 41.
    checks = [
        predictive_check(*make_self(likelihood=likelihood, depth_shift=False, seed=seed), draws=40)
        for seed in range(4)
    ]
    for table in ("genes", "perturbations"):
        tail = np.concatenate([getattr(check, table)["tail"] for check in checks])
        assert (tail > 0.05).mean() > 0.8
        assert (tail[tail < 1] < 0.5).mean() > 0.3  # they are not all in the middle


def test_cells_with_zeros_added_fail_the_predictive_check(rng):
    posterior, data = make_self()
    counts = data.rows(slice(None)).toarray() * (rng.random((data.n_cells, 13)) < 0.5)
    spoilt = as_cells(data.schema, data.batch().replace(counts=torch.as_tensor(counts)))
    check = predictive_check(posterior, spoilt, draws=41)
    assert check.genes.query("statistic in ('zeros', 'mean')")["tail"].max() < 0.05
    assert check.perturbations.query("statistic == 'n_genes'")["tail"].median() < 0.05


def test_tables_hold_the_statistics_of_the_cells():
    posterior, data = shared_fit(), make_data()
    check = predictive_check(posterior, data, draws=3)
    counts = data.rows(slice(None)).toarray().astype(float)
    wide = check.genes.pivot(index="gene", columns="statistic", values="observed")
    wide = wide.loc[list(data.schema.genes)]
    assert np.allclose(wide["mean"], counts.mean(0))
    assert np.allclose(wide["variance"], counts.var(0))
    assert np.allclose(wide["zeros"], (counts == 0).mean(0))
    assert list(check.genes.columns) == ["statistic", "gene", *MOMENTS]
    assert list(check.perturbations.columns) == ["perturbation", "statistic", *MOMENTS, "n_cells"]
    mito = [name.startswith("MT-") for name in data.schema.genes]
    expected = {
        "library": counts.sum(1),
        "n_genes": (counts > 0).sum(1),
        "zeros": (counts == 0).mean(1),
        "pct_mito": 100 * counts[:, mito].sum(1) / counts.sum(1),
    }
    for name, values in expected.items():
        observed, replicated = check.metrics[name]
        assert np.allclose(observed, values)
        assert replicated.shape == (3, data.n_cells)
    assert {"pct_ribo", "pct_hb"} < set(check.metrics)


def test_perturbation_table_is_that_of_the_metrics():
    posterior, data = shared_fit(), make_data()
    check = predictive_check(posterior, data, draws=7)
    table = check.perturbations.set_index(["statistic", "perturbation"])
    assert len(table) == len(check.metrics) * len(np.unique(data.labels))
    for (metric, label), row in table.iterrows():
        rows = data.labels == label
        observed, replicated = (part[..., rows].mean(-1) for part in check.metrics[metric])
        assert row["observed"] == pytest.approx(observed)
        assert row[["low", "median", "high"]].tolist() == pytest.approx(
            [replicated.min(), np.median(replicated), replicated.max()]  # of seven draws
        )
        tie = np.isclose(replicated, observed, rtol=1e-6)
        one_sided = min(
            ((replicated < observed) | tie).mean(), ((replicated > observed) | tie).mean()
        )
        assert row["tail"] == pytest.approx(min(1, 2 * one_sided))
        assert row["n_cells"] == rows.sum()


def test_library_is_modelled_or_held_and_flags_are_held():
    posterior, data = make_self(depth_shift=True)
    posterior.guide.globals[sites.DEPTH_SHIFT] = torch.tensor([4.0, 0.0])
    check = predictive_check(posterior, data, draws=5)
    replicated = np.log1p(check.metrics["library"][1]).mean(0)
    flagged = data.artifact[:, 0] > 0
    # A library under the first flag is e⁴ times as large, of the cells that carry it and no others.
    assert replicated[flagged].mean() - replicated[~flagged].mean() == pytest.approx(4, abs=0.4)
    assert check.library == "modelled"
    held = predictive_check(*make_self(depth_shift=False), draws=2)
    assert held.library == "held"
    assert np.allclose(held.metrics["library"][1].mean(), 150, rtol=0.05)


def test_a_given_library_is_compared_as_it_is():
    posterior, data = make_self(depth_shift=False)
    schema = make_schema(has_rest=True)
    larger = as_cells(schema, data.batch().replace(library=torch.full((N_CELLS,), 1000.0)))
    posterior.model, _ = make_pair(schema, model={"depth_shift": False})
    check = predictive_check(posterior, larger, draws=2)
    observed, replicated = check.metrics["library"]
    assert (observed == 1000).all()
    assert (replicated == 1000).all()


def test_prior_check_draws_globals_and_states_from_the_prior():
    def far(batch):
        return dist.Normal(torch.full((len(batch), 5), 30.0), 1e-3).to_event(1)

    posterior, data = make_self(basal=far)
    prior = predictive_check(posterior, data, source="prior", draws=20)
    abducted = predictive_check(posterior, data, draws=20)
    mean = "statistic == 'mean'"
    width = [(c.genes.query(mean)["high"] - c.genes.query(mean)["low"]).mean()
             for c in (prior, abducted)]  # fmt: skip
    assert width[0] > 2 * width[1]
    # The guide is not asked for anything.
    posterior.guide = None
    again = predictive_check(posterior, data, source="prior", draws=20)
    assert again.genes.equals(prior.genes)


# --- calibration of counts ------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "zinb", "normal"])
def test_counts_of_the_model_itself_are_calibrated(likelihood):
    posterior, data = make_self(likelihood=likelihood, depth_shift=False)
    values = count_calibration(posterior, data, draws=100)
    assert values.shape == (N_CELLS, 13)
    p_values = stats.kstest(values, "uniform", axis=0).pvalue
    assert p_values.min() > 0.01 / 13


@pytest.mark.parametrize(("factor", "spread"), [(0.1, -1), (10.0, 1)])
def test_wrong_dispersion_is_seen_and_in_which_direction(factor, spread):
    posterior, data = make_self(depth_shift=False)
    with torch.no_grad():
        posterior.model.likelihood.log_inverse_dispersion += float(np.log(factor))
    values = count_calibration(posterior, data, draws=50)
    # Too dispersed a prediction has transforms near one half; too narrow a one near the ends.
    assert np.sign(values.var() - 1 / 12) == spread
    assert stats.kstest(values, "uniform", axis=0).pvalue.min() < 1e-6


def test_transforms_are_those_of_the_exact_marginal():
    oracle, cells, posterior, globals_, data = make_oracle()
    globals_ = {name: value.float() for name, value in globals_.items()}
    posterior.guide = PlainGuide(posterior.model, globals_)
    values = count_calibration(posterior, data, draws=500, n_cells=10**6)
    exact = oracle.marginal(cells.d, cells.a)
    sd = np.sqrt(np.einsum("nii->ni", exact.covariance))
    expected = stats.norm.cdf((cells.x - exact.mean) / sd)
    assert np.abs(values - expected).max() < 5 * 0.5 / np.sqrt(500)
    assert np.abs(values - expected).mean() < 0.015


def test_an_unknown_distribution_of_counts_is_an_error():
    posterior, data = make_self()
    model = posterior.model

    def edited(batch):
        with cells_plate(N_CELLS, batch):
            gamma = dist.Gamma(torch.ones_like(batch.counts), 1.0).to_event(1)
            sample(sites.COUNTS, gamma, obs=batch.counts + 0.5)

    posterior.model = edited
    posterior.guide = PlainGuide(model, {})
    with pytest.raises(QueryError, match="not known for a Gamma"):
        count_calibration(posterior, data, draws=1)


# --- calibration of latents and effects -----------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "direction"),
    [({}, 0), ({"width": 0.6}, 1), ({"width": 1.6}, -1), ({"shift": 0.3}, None)],
)
def test_ranks_of_basal_states_are_uniform_under_the_exact_guide_alone(error, direction):
    # Globals are drawn: the guide is exact given them, and wrong if it gets others.
    _, _, posterior, _, data = make_oracle(**error)
    ranks = basal_ranks(posterior, data, n_draws=39)
    assert ranks.shape == (800, 2)
    p_values = [uniformity(column, 39).p_value for column in ranks.T]
    if direction == 0:
        assert min(p_values) > 0.01
    else:
        assert max(p_values) < 1e-4
    if direction:
        assert all(np.sign(rank_spread(column, 39) - 1) == direction for column in ranks.T)


def test_effect_ranks_are_those_among_the_posterior_draws():
    posterior = shared_fit()
    truth = truth_of(make_screen())
    draws = effect_draws(posterior, truth.labels, draws=19, n_cells=5, seed=3)
    own = {"n_draws": 19, "n_cells": 5, "seed": 3}
    ranks = effect_ranks(posterior, truth.labels, np.median(draws, axis=0) + 1e-6, **own)
    assert (ranks == 10).mean() > 0.95
    assert (effect_ranks(posterior, truth.labels, draws.max(0) + 1, **own) == 19).all()
    assert (effect_ranks(posterior, truth.labels, draws.min(0) - 1, **own) == 0).all()
    with pytest.raises(DataError, match=r"\(labels, genes\)"):
        effect_ranks(posterior, truth.labels[:1], truth.effects)


# --- diagnostics of the latents -------------------------------------------------------------------

LOC, SCALE = 0.7, 0.4


def leaky(batch):
    loc = torch.zeros(len(batch), 5)
    loc[:, 0] = 4 * (batch.artifact[:, 1] > 0)
    loc[:, 1] = 4 * batch.perturbation[:, 0]
    return dist.Normal(loc, 1.0).to_event(1)


def aurocs(found, target):
    return found.leakage.query("target == @target")["auroc"].to_numpy()


def test_what_is_in_z_basal_is_read_from_it():
    posterior, data = make_self(basal=leaky)
    found = latent_diagnostics(posterior, data)
    assert list(found.leakage.columns) == ["target", "source", "method", "auroc", "se", "n"]
    assert len(found.leakage) == 4 * (2 + data.schema.n_artifacts)
    # Of two normals four standard deviations apart.
    expected = stats.norm.cdf(4 / np.sqrt(2))
    draws = found.leakage.query("source == 'draws'").set_index(["target", "method"])["auroc"]
    assert draws["low_1"].to_numpy() == pytest.approx(expected, abs=0.03)
    assert aurocs(found, "low_1").min() > 0.95
    assert found.leakage.query("target == 'low_1'")["se"].max() < 0.01
    assert found.units["active"].tolist() == [True, True, False, False, False]


def test_nothing_is_read_from_z_basal_that_holds_nothing():
    posterior, data = make_self()
    found = latent_diagnostics(posterior, data)
    draws = found.leakage.query("source == 'draws'")
    assert (np.abs(draws["auroc"] - 0.5) < 4 * draws["se"]).all()
    # The standard error is that of the Mann-Whitney statistic under no difference.
    n_failing, n_passing = data.failing.sum(), data.passing.sum()
    known = np.sqrt((data.n_cells + 1) / (12 * n_failing * n_passing))
    assert draws.query("target == 'artifact'")["se"].to_numpy() == pytest.approx(known, rel=0.05)
    assert not found.units["active"].any()
    counts = found.leakage.groupby("target")["n"].first()
    assert counts["artifact"] == data.n_cells
    assert counts["low_1"] == (data.passing | (data.artifact[:, 1] > 0)).sum() < data.n_cells


@pytest.mark.parametrize("kind", ["normal", "joint"])
def test_units_are_those_of_known_posteriors(kind):
    def basal(batch):
        base = normal(batch, 5)
        loc = torch.linspace(-1, 1, len(batch)).unsqueeze(-1) * LOC
        if kind == "normal":
            return dist.Normal(loc.expand(-1, 5), SCALE).to_event(1)
        move = dist.transforms.AffineTransform(loc, SCALE, event_dim=1)
        return dist.TransformedDistribution(base, [move])

    posterior, data = make_self(basal=basal)
    units = latent_diagnostics(posterior, data).units
    locs = LOC * np.linspace(-1, 1, N_CELLS)
    kl = 0.5 * (SCALE**2 + (locs**2).mean() - 1) - np.log(SCALE)
    exact = kind == "normal"
    assert units["kl"].to_numpy() == pytest.approx(kl, rel=1e-5 if exact else 0.05)
    assert units["mean_variance"].to_numpy() == pytest.approx(
        locs.var(), rel=1e-5 if exact else 0.02
    )
    assert units["mean_sd"].to_numpy() == pytest.approx(SCALE, rel=1e-5 if exact else 0.02)
    assert units["latent"].tolist() == [0, 1, 2, 3, 4]


def test_noise_of_the_guides_other_latents_makes_no_unit_active():
    def noisy(batch):
        other = sample("other", normal(batch, 5))
        return dist.Normal(0.5 * other, 1.0).to_event(1)

    posterior, data = make_self(basal=noisy)
    units = latent_diagnostics(posterior, data).units
    assert units["mean_variance"].max() < 0.01
    assert not units["active"].any()
    assert units["mean_sd"].to_numpy() == pytest.approx(np.sqrt(1.25), rel=0.03)


# --- contracts ------------------------------------------------------------------------------------


def latent_figures(found):
    return np.append(found.units[["kl", "mean_sd"]], found.leakage["auroc"].fillna(-1))


CHECKS = {
    "posterior": lambda p, d: predictive_check(p, d, draws=2, n_cells=50).genes,
    "prior": lambda p, d: predictive_check(p, d, source="prior", draws=2, n_cells=50).genes,
    "counts": lambda p, d: count_calibration(p, d, draws=2, n_cells=50),
    "basal": lambda p, d: basal_ranks(p, d, n_draws=5),
    "latents": lambda p, d: latent_figures(latent_diagnostics(p, d, n_cells=60)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_depend_on_their_seed_alone(name):
    posterior, data = shared_fit(), make_data()
    torch.manual_seed(1)
    first = CHECKS[name](posterior, data)
    state = torch.random.get_rng_state()
    torch.rand(3)
    second = CHECKS[name](posterior, data)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(np.asarray(first), np.asarray(second)) or first.equals(second)


@pytest.mark.parametrize("name", CHECKS)
def test_cells_with_missing_flags_are_checked(name):
    schema = make_schema()
    model, guide = make_pair(schema)
    posterior = SimpleNamespace(model=model, guide=guide, schema=schema, device=torch.device("cpu"))
    data = as_cells(schema, make_batch(schema, n_cells=90, missing=True))
    assert not data.artifact_observed.all()
    found = CHECKS[name](posterior, data)
    with torch.no_grad():
        guide.z_basal.head.loc.bias += 5.0
    moved = CHECKS[name](posterior, data)
    # Of the guide, a prior check takes the missing flags alone, and new cells' counts the globals.
    same = np.array_equal(np.asarray(found), np.asarray(moved))
    assert same == (name in ("prior", "counts"))


def test_wrong_arguments_are_errors():
    posterior, data = shared_fit(), make_data()
    with pytest.raises(QueryError, match="source is 'posterior' or 'prior'"):
        predictive_check(posterior, data, source="guide")
    for check in (count_calibration, predictive_check):
        with pytest.raises(QueryError, match=r"at least 1|At least one draw"):
            check(posterior, data, draws=0)
    with pytest.raises(QueryError, match="At least one draw"):
        basal_ranks(posterior, data, n_draws=0)
    for check in (count_calibration, predictive_check, latent_diagnostics):
        with pytest.raises(DataError, match="At least one cell"):
            check(posterior, data.subset([]))
    schema = posterior.schema
    without = SimpleNamespace(
        model=posterior.model,
        guide=lambda batch: None,
        schema=schema,
        device=torch.device("cpu"),
    )
    with pytest.raises(QueryError, match="'z_basal' is required"):
        latent_diagnostics(without, data)
