"""Counterfactuals against the linear-Gaussian oracle: closed forms, to the error of the draws.

Every cell is repeated many times in one batch, so that one abduction holds all its draws.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from linear_gaussian_pair import (
    as_batch,
    make_linear_pair,
    set_artifact_encoder,
    set_linear_encoder,
    tensor,
)
from pyro import deterministic, poutine, sample
from pyro import distributions as dist
from torch import Tensor, nn

from cradle_pyro import sites
from cradle_pyro.model.cradle import Cradle, cells_plate
from cradle_pyro.queries.abduction import Abduction, PyroCallable, abduct, predict
from cradle_pyro.seeding import seeded
from cradle_pyro.simulate.linear_gaussian import (
    Gaussian,
    LinearGaussianCells,
    LinearGaussianCradle,
    simulate_linear_gaussian,
)
from cradle_pyro.types import Batch

N_CELLS, N_DRAWS = 12, 3000
# 12 cells x 7 genes in each comparison: one of them off by five standard errors is one in 20,000.
N_ERRORS = 5.0
INTERVAL = (0.025, 0.975)
NORMAL_QUANTILE = 1.959963984540054
NORMAL_DENSITY = 0.05844507  # at that quantile


class Oracle(NamedTuple):
    """The oracle, some of its cells of every kind, and the same model in Pyro."""

    exact: LinearGaussianCradle
    cells: LinearGaussianCells
    model: Cradle
    globals_: dict[str, Tensor]

    @property
    def batch(self) -> Batch:
        """The cells, each of them repeated; draws first."""
        return as_batch(self.cells).take(torch.arange(N_CELLS).repeat(N_DRAWS))


class ExactGuide(nn.Module):
    """The posterior of the oracle as a guide, correlations included; `spread` makes it wrong."""

    def __init__(self, oracle: Oracle, *, spread: float = 1.0) -> None:
        super().__init__()
        self.oracle = oracle
        self.spread = spread

    def forward(self, batch: Batch) -> None:
        exact = self.oracle.exact
        x, d, a = (v.numpy() for v in (batch.counts, batch.perturbation, batch.artifact))
        for name, value in self.oracle.globals_.items():
            deterministic(name, value)
        with cells_plate(len(batch), batch):
            w = sample(sites.Z_ARTIFACT, self._normal(exact.posterior_w(x, d, a)))
            sample(sites.Z_BASAL, self._normal(exact.posterior_z_given_w(x, d, a, w.numpy())))

    def _normal(self, gaussian: Gaussian) -> dist.MultivariateNormal:
        factor = torch.linalg.cholesky(tensor(gaussian.covariance))
        return dist.MultivariateNormal(tensor(gaussian.mean), scale_tril=self.spread * factor)


def choose_cells(cells: LinearGaussianCells) -> LinearGaussianCells:
    """Return cells of every kind: control or not, passing or not."""
    kind = 2 * cells.d.any(1) + cells.a.any(1)
    rows = np.concatenate([np.flatnonzero(kind == k)[: N_CELLS // 4] for k in range(4)])
    assert len(rows) == N_CELLS
    return LinearGaussianCells(*(values[rows] for values in cells))


@cache
def make_oracle() -> Oracle:
    exact, cells = simulate_linear_gaussian(
        n_cells=200, n_genes=7, n_latents=3, n_perturbations=3, n_artifacts=2,
        n_artifact_latents=2, seed=0,
    )  # fmt: skip
    model, _, globals_ = make_linear_pair(exact, n_cells=N_CELLS)
    return Oracle(exact, choose_cells(cells), model, globals_)


@cache
def make_orthogonal_oracle() -> tuple[Oracle, PyroCallable]:
    """Return an oracle whose posteriors are diagonal, and a CradleGuide that holds them exactly."""
    rng = np.random.default_rng(1)
    orthogonal = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    exact = LinearGaussianCradle(
        loading=1.3 * orthogonal[:3],
        intercept=rng.standard_normal(7),
        noise_sd=np.full(7, 0.6),
        effect=rng.standard_normal((3, 3)),
        artifact_effect=rng.standard_normal((2, 3)),
        artifact_loading=np.diag([0.9, 0.7, 0.0])[:2],
    )
    model, guide, globals_ = make_linear_pair(exact, n_cells=N_CELLS)
    cells = choose_cells(exact.sample(200, rng=rng))
    none, one = np.zeros((1, 2)), np.ones((1, 2))
    variance = exact.posterior_z(np.zeros((1, 7)), np.zeros((1, 3)), none).covariance[0]
    set_linear_encoder(guide, exact, exact.exact_gain(), np.diag(variance))
    # p(w | x, p, a) where there is a flag: its mean is linear in x - E[x].
    columns = [
        exact.posterior_w(exact.marginal(np.zeros((1, 3)), one).mean + row, np.zeros((1, 3)), one)
        for row in np.eye(7)
    ]
    gain = np.stack([column.mean[0] for column in columns])
    set_artifact_encoder(guide, exact, gain, np.diag(columns[0].covariance[0]))
    return Oracle(exact, cells, model, globals_), poutine.condition(guide, data=globals_)


def abducted(oracle: Oracle, guide: PyroCallable, seed: int = 0) -> Abduction:
    with seeded(seed):
        return abduct(oracle.model, guide, oracle.batch)


@cache
def exactly_abducted() -> Abduction:
    return abducted(make_oracle(), ExactGuide(make_oracle()))


# What is done, to d and a of the cells.
ACTS = {
    "nothing": lambda d, a: (d, a),
    "control": lambda d, a: (0 * d, a),
    "another perturbation": lambda d, a: (np.roll(d, 1, axis=1), a),
    "dosage": lambda d, a: (0.4 + 0 * d, a),
    "no artifact": lambda d, a: (d, 0 * a),
    "all flags": lambda d, a: (d, 1 + 0 * a),
    "severity": lambda d, a: (d, 0.3 + 0 * a),
    "perturbation and no artifact": lambda d, a: (np.roll(d, 1, axis=1), 0 * a),
    "perturbation and flag": lambda d, a: (1 - d, np.eye(2)[[1] * len(a)]),
}


@pytest.fixture(params=ACTS)
def act(request):
    return ACTS[request.param]


def done(oracle: Oracle, act) -> tuple[np.ndarray, np.ndarray]:
    return act(oracle.cells.d, oracle.cells.a)


def predicted(oracle: Oracle, abduction: Abduction, act, site: str = sites.COUNTS) -> np.ndarray:
    """Return draws of each cell's counterfactual value, shape (draws, cells, genes)."""
    d, a = done(oracle, act)
    acts = {sites.PERTURBATION: tensor(d), sites.ARTIFACT: tensor(a)}
    repeated = {name: value.repeat(N_DRAWS, 1) for name, value in acts.items()}
    value = predict(oracle.model, abduction, repeated)[site]
    return value.reshape(N_DRAWS, N_CELLS, -1).numpy()


def expected(oracle: Oracle, act) -> Gaussian:
    x, d, a = oracle.cells.x, oracle.cells.d, oracle.cells.a
    return oracle.exact.counterfactual(x, d, a, *done(oracle, act))


def expected_rate(oracle: Oracle, act) -> Gaussian:
    """Return the posterior of E[x' | z, w, do(d', a')], by the joint posterior of z and w."""
    exact, (d_new, a_new) = oracle.exact, done(oracle, act)
    joint = exact.posterior(oracle.cells.x, oracle.cells.d, oracle.cells.a)
    kind = exact.gate(a_new)[:, None, None] * exact.artifact_loading
    loading = np.concatenate([np.broadcast_to(np.eye(3), (N_CELLS, 3, 3)), kind], axis=1)
    loading = loading @ exact.loading
    fixed = d_new @ exact.effect + a_new @ exact.artifact_effect
    mean = exact.intercept + fixed @ exact.loading + np.einsum("nk,nkg->ng", joint.mean, loading)
    return Gaussian(mean, loading.transpose(0, 2, 1) @ joint.covariance @ loading)


def deviations(draws: np.ndarray, exact: Gaussian) -> dict[str, np.ndarray]:
    """Return how far moments and 95 % interval of draws are from exact ones, in standard errors.

    Entries without any variance are to be compared exactly, and are left out.
    """
    n_draws = len(draws)
    sd = np.sqrt(np.einsum("ngg->ng", exact.covariance))
    free = sd > 1e-9
    error = sd[free] / np.sqrt(n_draws)
    result = {
        "mean": (draws.mean(0) - exact.mean)[free] / error,
        "sd": (draws.std(0) - sd)[free] / (error / np.sqrt(2)),
    }
    edge_error = error * np.sqrt(INTERVAL[0] * INTERVAL[1]) / NORMAL_DENSITY
    for sign, share in zip((-1, 1), INTERVAL, strict=True):
        edge = exact.mean + sign * NORMAL_QUANTILE * sd
        result[f"{share}"] = (np.quantile(draws, share, axis=0) - edge)[free] / edge_error
        below = (draws < edge).mean(0)[free]
        result[f"below {share}"] = (below - share) / np.sqrt(share * (1 - share) / n_draws)
    return result


def largest(found: dict[str, np.ndarray]) -> float:
    return max((float(np.abs(values).max(initial=0)) for values in found.values()), default=0.0)


def test_counterfactual_values_have_the_oracles_mean_and_interval(act) -> None:
    oracle = make_oracle()
    draws, exact = predicted(oracle, exactly_abducted(), act), expected(oracle, act)
    assert largest(deviations(draws, exact)) < N_ERRORS


def test_where_the_artifact_stays_every_draw_is_the_one_value_of_the_oracle(act) -> None:
    """Whatever z, w and the noise are, they cancel: x' = x + (Δp + Δr) L."""
    oracle = make_oracle()
    draws, exact = predicted(oracle, exactly_abducted(), act), expected(oracle, act)
    _, a_new = done(oracle, act)
    fixed = oracle.exact.gate(a_new) == oracle.exact.gate(oracle.cells.a)
    assert (np.einsum("ngg->ng", exact.covariance)[fixed] == 0).all()
    off = np.abs(draws - exact.mean)[:, fixed]
    assert off.max(initial=0) < 1e-9
    assert fixed.sum() in (N_CELLS // 2, N_CELLS)


def test_genes_vary_together_as_the_oracle_says(act) -> None:
    oracle = make_oracle()
    draws, exact = predicted(oracle, exactly_abducted(), act), expected(oracle, act)
    centred = draws - draws.mean(0)
    found = np.einsum("sng,snh->ngh", centred, centred) / N_DRAWS
    variance = np.einsum("ngg->ng", exact.covariance)
    product = variance[:, :, None] * variance[:, None, :]
    error = np.sqrt((product + exact.covariance**2) / N_DRAWS)
    assert (np.abs(found - exact.covariance) <= N_ERRORS * error + 1e-12).all()


def test_rates_have_the_moments_of_the_joint_posterior(act) -> None:
    oracle = make_oracle()
    draws = predicted(oracle, exactly_abducted(), act, sites.RATE)
    assert largest(deviations(draws, expected_rate(oracle, act))) < N_ERRORS


def test_a_cradle_guide_with_exact_encoders_gives_the_oracles_counterfactuals(act) -> None:
    oracle, guide = make_orthogonal_oracle()
    abduction = abducted(oracle, guide)
    values = predicted(oracle, abduction, act)
    assert largest(deviations(values, expected(oracle, act))) < N_ERRORS
    rates = predicted(oracle, abduction, act, sites.RATE)
    assert largest(deviations(rates, expected_rate(oracle, act))) < N_ERRORS


@pytest.mark.parametrize("spread", [0.85, 1.15])
def test_a_posterior_that_is_too_wide_or_too_narrow_is_seen(spread) -> None:
    oracle = make_oracle()
    abduction = abducted(oracle, ExactGuide(oracle, spread=spread))
    act = ACTS["no artifact"]
    found = deviations(predicted(oracle, abduction, act), expected(oracle, act))
    assert np.abs(found["mean"]).max() < N_ERRORS
    assert np.abs(found["sd"]).min() > N_ERRORS
    rates = deviations(predicted(oracle, abduction, act, sites.RATE), expected_rate(oracle, act))
    assert np.abs(rates["sd"]).min() > N_ERRORS


def test_the_truth_lies_in_the_interval_as_often_as_it_should() -> None:
    """Over cells with known z, w and noise: x' of the cells whose artifact is removed."""
    exact = make_oracle().exact
    rng = np.random.default_rng(5)
    cells = exact.sample(4000, rng=rng)
    failing = cells.a.any(1)
    cells = LinearGaussianCells(*(values[failing] for values in cells))
    removed = (cells.a @ exact.artifact_effect + cells.w @ exact.artifact_loading) @ exact.loading
    n_cells, n_draws = len(cells.x), 200
    model, _, globals_ = make_linear_pair(exact, n_cells=n_cells)
    oracle = Oracle(exact, cells, model, globals_)
    truth, batch, draws = cells.x - removed, as_batch(cells), []
    with seeded(6):
        for _ in range(n_draws):
            abduction = abduct(model, ExactGuide(oracle), batch)
            acts = {sites.ARTIFACT: torch.zeros_like(batch.artifact)}
            draws.append(predict(model, abduction, acts)[sites.COUNTS].numpy())
    low, high = np.quantile(draws, INTERVAL, axis=0)
    inside = ((low <= truth) & (truth <= high)).mean(0)
    # Intervals from 200 draws cover a little less: (draws - 1) / (draws + 1) of the 95 %.
    error = np.sqrt(0.05 * 0.95 / n_cells)
    assert np.abs(inside - 0.95 * (n_draws - 1) / (n_draws + 1)).max() < 4 * error
    assert n_cells > 1000
