"""Held-out density against the exact evidence of the linear-Gaussian oracle."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from linear_gaussian_pair import as_batch, make_linear_pair, set_linear_encoder
from pyro import poutine
from scipy.special import logsumexp

from cradle_pyro import sites
from cradle_pyro.evaluation.predictive import held_out_density
from cradle_pyro.simulate.linear_gaussian import simulate_linear_gaussian

N_CELLS = 40
LOG_ODDS = np.array([-0.4, -1.0])


class Cells:
    """A batch in the words of CellData."""

    def __init__(self, batch):
        self.whole = batch
        self.n_cells = len(batch)

    def batch(self, rows, *, device):
        return self.whole.take(torch.as_tensor(rows))


def make_oracle():
    return simulate_linear_gaussian(
        n_cells=N_CELLS, n_genes=6, n_latents=2, n_perturbations=3, n_artifacts=2, seed=4
    )


def make_posterior(oracle, *, error=0.0):
    """Return the oracle's pair, globals at the truth, with nearly exact encoders.

    `error` is added to the loc of q(z_basal), in every latent.
    """
    model, guide, globals_ = make_linear_pair(oracle, n_cells=N_CELLS, artifact_risk=True)
    precision = np.eye(oracle.n_latents) + (oracle.loading / oracle.noise_sd**2) @ oracle.loading.T
    set_linear_encoder(guide, oracle, oracle.exact_gain(), np.diag(np.linalg.inv(precision)))
    with torch.no_grad():
        guide.z_basal.head.loc.bias += error
        model.artifact_log_odds.copy_(torch.as_tensor(LOG_ODDS))
    globals_[sites.ARTIFACT_RISK] = torch.zeros(oracle.n_artifacts, oracle.n_perturbations).double()
    fixed = poutine.condition(guide, data=globals_)
    return SimpleNamespace(model=model, guide=fixed, device=torch.device("cpu"))


def exact_density(oracle, cells, observed):
    """Return log p(x | d, observed flags), missing flags summed over, in nats."""
    states = np.array(list(itertools.product((0.0, 1.0), repeat=oracle.n_artifacts)))
    prior = (states * LOG_ODDS - np.logaddexp(0, LOG_ODDS)).sum(1)
    given = [oracle.log_evidence(cells.x, cells.d, np.tile(a, (N_CELLS, 1))) for a in states]
    summed = logsumexp(np.stack(given) + prior[:, None], axis=0)
    return np.where(observed, oracle.log_evidence(cells.x, cells.d, cells.a), summed)


def make_cells(cells, observed):
    batch = as_batch(cells)
    if observed.all():
        return Cells(batch)
    known = torch.as_tensor(observed)
    return Cells(batch.replace(artifact=batch.artifact * known[:, None], artifact_observed=known))


@pytest.fixture(params=[False, True], ids=["all flags observed", "flags missing"])
def observed(request):
    return np.arange(N_CELLS) % 2 == 0 if request.param else np.ones(N_CELLS, bool)


def test_density_is_below_the_evidence_and_comes_close_with_many_particles(observed):
    oracle, cells = make_oracle()
    exact = exact_density(oracle, cells, observed)
    posterior, data = make_posterior(oracle), make_cells(cells, observed)

    def gap(particles, repeats=1):
        found = [
            held_out_density(posterior, data, global_draws=1, particles=particles, seed=seed)
            for seed in range(repeats)
        ]
        assert np.isfinite(found).all()
        return exact.mean() - np.mean(found)

    few, some, many = gap(1, repeats=20), gap(8, repeats=5), gap(1500)
    assert few > some > many
    assert few > 0.05
    assert abs(many) < 0.02


def test_density_of_a_poor_guide_is_lower_with_few_particles_and_the_same_with_many(observed):
    oracle, cells = make_oracle()
    data = make_cells(cells, observed)
    good, poor = make_posterior(oracle), make_posterior(oracle, error=0.3)

    def mean(posterior, particles):
        return held_out_density(posterior, data, global_draws=1, particles=particles).mean()

    assert mean(poor, 2) < mean(good, 2) - 0.05
    assert mean(poor, 1500) == pytest.approx(mean(good, 1500), abs=0.05)


def test_draws_of_the_globals_and_particles_share_one_mean():
    oracle, cells = make_oracle()
    posterior, data = make_posterior(oracle), make_cells(cells, np.ones(N_CELLS, bool))
    exact = oracle.log_evidence(cells.x, cells.d, cells.a)
    found = held_out_density(posterior, data, global_draws=30, particles=20)
    np.testing.assert_allclose(found, exact, atol=0.25)


def test_density_leaves_the_callers_random_state_and_does_not_depend_on_it(observed):
    oracle, cells = make_oracle()
    posterior, data = make_posterior(oracle), make_cells(cells, observed)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        results.append(held_out_density(posterior, data, global_draws=2, particles=2))
        assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(*results)


def test_values_of_missing_flags_do_not_move_the_density():
    oracle, cells = make_oracle()
    observed = np.arange(N_CELLS) % 2 == 0
    posterior, data = make_posterior(oracle), make_cells(cells, observed)
    garbage = torch.where(torch.as_tensor(observed)[:, None], data.whole.artifact, 1.0)
    other = Cells(data.whole.replace(artifact=garbage))
    np.testing.assert_array_equal(*(
        held_out_density(posterior, d, global_draws=2, particles=3) for d in (data, other)
    ))  # fmt: skip
