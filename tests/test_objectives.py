"""The loss against Pyro's own ELBOs and the linear-Gaussian closed form, and its laws."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from factories import (
    COVARIATES,
    make_batch,
    make_config,
    make_pair,
    make_pool,
    make_schema,
    with_partners,
)
from linear_gaussian_pair import (
    CubatureGuide,
    as_batch,
    given,
    make_linear_pair,
    set_artifact_encoder,
    set_linear_encoder,
    tensor,
)
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from scipy import optimize
from torch import Tensor, nn
from torch.distributions import kl_divergence

from cradle_pyro import sites
from cradle_pyro.config import ObjectiveConfig
from cradle_pyro.inference.objectives import (
    COUNTERFACTUAL,
    CradleELBO,
    FlipPool,
    kl_term,
    partner_term,
    sleep_term,
)
from cradle_pyro.inference.posterior import draw_latents
from cradle_pyro.model.cradle import cells_plate, gate
from cradle_pyro.model.guides import CradleGuide
from cradle_pyro.simulate.linear_gaussian import LinearGaussianCradle, simulate_linear_gaussian
from cradle_pyro.types import Batch


def make_objective(**settings: Any) -> ObjectiveConfig:
    return make_config(objective={"counterfactual": "none"} | settings).objective


def elbo(batch: Batch | None = None, *, failing_share: float = 0.5, **settings: Any) -> CradleELBO:
    pool = None if batch is None else make_pool(batch)
    return CradleELBO(make_objective(**settings), pool, failing_share=failing_share)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def particles(n: int) -> dict[str, Any]:
    return {"num_particles": n, "vectorize_particles": n > 1, "max_plate_nesting": 1}


SETTINGS = [
    {},
    {"gene_effect": "none"},
    {"likelihood": "poisson", "combine": "sum"},
    {"likelihood": "zinb", "artifact_risk": False},
    {"likelihood": "normal", "depth_shift": False},
]


# ------------------------------------------------------------------------------ Pyro's own bounds


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["structured", "mean_field"])
@pytest.mark.parametrize("n_particles", [1, 4])
def test_loss_and_gradient_are_those_of_the_mean_field_elbo(settings, family, n_particles) -> None:
    schema = make_schema(covariates=COVARIATES, has_rest=True)
    model, guide = make_pair(schema, model=settings, guide={"family": family}, dtype=torch.float64)
    missing = settings.get("artifact_risk", True)
    batch = make_batch(schema, missing=missing, dtype=torch.float64)
    parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.numel()]
    results = []
    for objective in (elbo(particles=n_particles), TraceMeanField_ELBO(**particles(n_particles))):
        torch.manual_seed(4)
        loss = objective.differentiable_loss(model, guide, batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append((loss, [g for g in gradients if g is not None]))
        torch.manual_seed(4)
        assert objective.loss(model, guide, batch) == pytest.approx(loss.item())
    (found, gradients), (expected, others) = results
    torch.testing.assert_close(found, expected)
    assert len(gradients) == len(others)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other)


def test_loss_agrees_with_the_sampled_elbo_in_expectation() -> None:
    """Closed forms against scores at the draws, with masks, missing flags and sparse effects."""
    schema = make_schema()
    model, guide = make_pair(schema, dtype=torch.float64)
    batch = make_batch(schema, missing=True, dtype=torch.float64)
    with torch.no_grad():
        values = [
            [objective.loss(model, guide, batch) / model.n_cells for _ in range(60)]
            for objective in (elbo(particles=50), Trace_ELBO(**particles(50)))
        ]
    ours, sampled = np.array(values)
    error = np.sqrt(ours.var() / 60 + sampled.var() / 60)
    assert abs(ours.mean() - sampled.mean()) < 4.5 * error
    assert error < 0.01 * abs(ours.mean())


def test_svi_of_pyro_gives_the_same_number_and_trains() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = make_batch(schema)

    def registered_model(cells: Batch) -> Tensor:
        return pyro.module("model", model)(cells)

    def registered_guide(cells: Batch) -> None:
        return pyro.module("guide", guide)(cells)

    for objective in (elbo(), elbo(batch, counterfactual="sleep")):
        torch.manual_seed(2)
        expected = total(objective.terms(model, guide, batch)).item()
        svi = SVI(registered_model, registered_guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective)
        torch.manual_seed(2)
        assert svi.evaluate_loss(batch) / model.n_cells == pytest.approx(expected, rel=1e-5)
        torch.manual_seed(2)
        before = model.decoder.bias.detach().clone(), guide.mask_logits.detach().clone()
        assert svi.step(batch) / model.n_cells == pytest.approx(expected, rel=1e-5)
        assert not torch.equal(before[0], model.decoder.bias)
        assert not torch.equal(before[1], guide.mask_logits)
        first = np.mean([svi.evaluate_loss(batch) for _ in range(20)])
        for _ in range(60):
            svi.step(batch)
        assert np.mean([svi.evaluate_loss(batch) for _ in range(20)]) < 0.98 * first


def test_the_same_pair_runs_under_pyros_module_interface() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = make_batch(schema)
    module = elbo()(model, guide)
    torch.manual_seed(2)
    loss = module(batch)
    torch.manual_seed(2)
    expected = total(elbo().terms(model, guide, batch)) * model.n_cells
    torch.testing.assert_close(loss, expected)


def test_terms_are_named_and_sum_to_the_loss() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = make_batch(schema, missing=True)
    objective = elbo(batch, counterfactual="sleep", beta=0.5)
    torch.manual_seed(1)
    terms = objective.terms(model, guide, batch)
    flags = {f"{sites.ARTIFACT}_observed", f"{sites.ARTIFACT}_unobserved"}
    latent = {
        sites.EFFECT_MASK, sites.EFFECT, sites.GENE_EFFECT, sites.ARTIFACT_EFFECT,
        sites.ARTIFACT_RISK, sites.DEPTH_SHIFT, sites.Z_BASAL, sites.Z_ARTIFACT,
    }  # fmt: skip
    assert set(terms) == latent | flags | {sites.COUNTS, sites.LIBRARY, COUNTERFACTUAL}
    divergences = (latent | flags) - {f"{sites.ARTIFACT}_observed"}
    assert all(terms[name] >= 0 for name in divergences)
    torch.manual_seed(1)
    loss = objective.loss(model, guide, batch)
    assert loss == pytest.approx(model.n_cells * total(terms).item(), rel=1e-5)


def test_beta_weights_the_counterfactual_term_only() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = make_batch(schema)
    results = []
    for beta in (0.0, 1.0, 2.0):
        torch.manual_seed(1)
        results.append(elbo(batch, counterfactual="sleep", beta=beta).terms(model, guide, batch))
    assert COUNTERFACTUAL not in results[0]
    torch.testing.assert_close(results[2][COUNTERFACTUAL], 2 * results[1][COUNTERFACTUAL])
    assert all(torch.equal(results[0][name], results[2][name]) for name in results[0])


# ------------------------------------------------------------------ batches: what must not matter


def fixed(latents: dict[str, Tensor], rows: Tensor, guide: CradleGuide) -> Any:
    """Return the guide with its draws fixed: their distributions stay, for the closed forms."""

    class Fixed(nn.Module):
        def forward(self, cells: Batch) -> None:
            local = {sites.Z_BASAL, sites.Z_ARTIFACT}
            values = {k: v[rows] if k in local else v for k, v in latents.items()}
            with FixedDraws(values):
                guide(cells)

    return Fixed()


class FixedDraws(poutine.messenger.Messenger):
    """Gives sites these values without marking them as observed."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        if message["name"] in self.values:
            message["value"], message["done"] = self.values[message["name"]], True


def make_fixed() -> tuple[nn.Module, CradleGuide, Batch, dict[str, Tensor]]:
    schema = make_schema(covariates=COVARIATES)
    model, guide = make_pair(schema, n_cells=12, dtype=torch.float64)
    batch = make_batch(schema, n_cells=12, dtype=torch.float64)
    return model, guide, batch, draw_latents(guide, batch)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_mean_of_mini_batch_losses_is_the_full_loss(size) -> None:
    model, guide, batch, latents = make_fixed()
    rows = torch.randperm(12)
    whole = elbo().terms(model, fixed(latents, torch.arange(12), guide), batch)
    parts = [
        elbo().terms(model, fixed(latents, part, guide), batch.take(part))
        for part in rows.split(size)
    ]
    for name, expected in whole.items():
        mean = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(mean, expected)


def test_duplicating_a_batch_leaves_every_term() -> None:
    model, guide, batch, latents = make_fixed()
    once, twice = torch.arange(12), torch.arange(12).repeat(2)
    before = elbo().terms(model, fixed(latents, once, guide), batch)
    after = elbo().terms(model, fixed(latents, twice, guide), batch.take(twice))
    for name in before:
        torch.testing.assert_close(after[name], before[name])


@pytest.mark.parametrize("counterfactual", ["sleep", "kl", "partner"])
def test_duplicating_a_batch_leaves_the_expected_counterfactual_term(counterfactual) -> None:
    schema = make_schema()
    model, guide = make_pair(schema, dtype=torch.float64)
    batch = with_partners(make_batch(schema, dtype=torch.float64))
    copies = torch.arange(10).repeat(30)
    many = batch.take(copies)
    size = len(batch.partner_rows)
    shift = torch.arange(30).repeat_interleave(size) * 10
    many = many.replace(
        partner=batch.partner.take(torch.arange(size).repeat(30)),
        partner_rows=batch.partner_rows.repeat(30) + shift,
    )
    objective = elbo(batch, counterfactual=counterfactual)
    with torch.no_grad():
        values = np.array([
            [objective.terms(model, guide, cells)[COUNTERFACTUAL].item() for _ in range(40)]
            for cells in (batch, many)
        ])  # fmt: skip
    error = np.sqrt((values.var(1) / 40).sum())
    assert abs(values[0].mean() - values[1].mean()) < 4.5 * error


def test_loss_per_cell_does_not_depend_on_the_training_set_but_for_the_globals() -> None:
    schema = make_schema()
    batch = make_batch(schema)
    small, guide = make_pair(schema, n_cells=10)
    terms = []
    for n_cells in (10, 1000):
        small.n_cells = guide.n_cells = n_cells
        torch.manual_seed(1)
        terms.append(elbo().terms(small, guide, batch))
    few, many = terms
    for name in (sites.COUNTS, sites.Z_BASAL, sites.Z_ARTIFACT, sites.LIBRARY):
        torch.testing.assert_close(few[name], many[name])
    for name in (sites.EFFECT, sites.EFFECT_MASK, sites.ARTIFACT_EFFECT, sites.GENE_EFFECT):
        torch.testing.assert_close(few[name], 100 * many[name])


# -------------------------------------------------------------------- weights of failing cells


def test_class_weights_have_mean_one_over_the_training_set() -> None:
    schema = make_schema()
    batch = make_batch(schema, n_cells=100)
    failing = (batch.artifact > 0).any(-1)
    for rows in (torch.arange(100), failing.nonzero().ravel()[:20], (~failing).nonzero().ravel()):
        cells = batch.take(rows)
        share = 0.5
        weights = elbo(failing_share=share, balance_failing=True)._class_weights(cells)
        assert (weights == 1).all()  # half fail: nothing to balance
    unbalanced = torch.cat([failing.nonzero().ravel()[:10], (~failing).nonzero().ravel()[:30]])
    cells = batch.take(unbalanced)
    weights = elbo(failing_share=0.25, balance_failing=True)._class_weights(cells)
    assert weights.mean().item() == pytest.approx(1)
    assert weights[:10].sum().item() == pytest.approx(weights[10:].sum().item())
    assert elbo(failing_share=0.25)._class_weights(cells) is None


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_balancing_one_class_changes_nothing(share) -> None:
    cells = make_batch(make_schema())
    assert elbo(failing_share=share, balance_failing=True)._class_weights(cells) is None


def test_weights_multiply_the_local_terms_of_each_cell() -> None:
    model, guide, batch, latents = make_fixed()
    failing = gate(batch.artifact).squeeze(-1) > 0

    def terms(rows: Tensor, **options: Any) -> dict[str, Tensor]:
        pair = fixed(latents, rows, guide)
        return elbo(failing_share=0.2, **options).terms(model, pair, batch.take(rows))

    groups = [group.nonzero().ravel() for group in (failing, ~failing)]
    weighted = terms(torch.arange(12), balance_failing=True)
    apart = [terms(rows) for rows in groups]
    factors = [0.5 / 0.2 * len(groups[0]) / 12, 0.5 / 0.8 * len(groups[1]) / 12]
    for name in (sites.COUNTS, sites.Z_BASAL, sites.Z_ARTIFACT, sites.LIBRARY):
        expected = sum(f * t[name] for f, t in zip(factors, apart, strict=True))
        torch.testing.assert_close(weighted[name], expected)
    assert weighted[sites.EFFECT] == apart[0][sites.EFFECT]


# ---------------------------------------------------------------- the closed form: linear-Gaussian


@pytest.mark.parametrize("n_artifacts", [1, 2])
def test_terms_and_gradients_are_the_oracles(n_artifacts) -> None:
    oracle, cells = simulate_linear_gaussian(
        n_cells=9, n_genes=6, n_latents=3, n_perturbations=4, n_artifacts=n_artifacts, seed=3
    )
    gated = oracle.gate(cells.a)
    assert 0 < gated.sum() < 9
    rng = np.random.default_rng(0)
    mean, variance = rng.standard_normal((9, 5)), rng.uniform(0.2, 2.0, (9, 5))
    guide = CubatureGuide(oracle, mean, variance)
    model, _, globals_ = make_linear_pair(oracle, n_cells=9)
    objective = elbo(particles=guide.n_points)
    terms = objective.terms(given(model, globals_), guide, as_batch(cells))
    args = cells.x, cells.d, cells.a, mean, variance
    likelihood = oracle.expected_log_likelihood(*args)
    assert terms[sites.COUNTS].item() == pytest.approx(-likelihood.mean(), rel=1e-10)
    local = total({n: terms[n] for n in (sites.COUNTS, sites.Z_BASAL, sites.Z_ARTIFACT)})
    assert local.item() == pytest.approx(-oracle.elbo(*args).mean(), rel=1e-10)
    local.backward()
    expected = oracle.elbo_gradient(*args)
    np.testing.assert_allclose(-9 * guide.mean.grad, expected.mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(-9 * guide.variance.grad, expected.covariance, rtol=1e-8, atol=1e-10)


def test_gradients_of_the_model_are_the_oracles() -> None:
    """By central differences of the closed form, for loadings, effects and noise."""
    oracle, cells = simulate_linear_gaussian(
        n_cells=7, n_genes=4, n_latents=2, n_perturbations=3, n_artifacts=2, seed=5
    )
    rng = np.random.default_rng(0)
    mean, variance = rng.standard_normal((7, 4)), rng.uniform(0.2, 2.0, (7, 4))
    guide = CubatureGuide(oracle, mean, variance)
    model, _, globals_ = make_linear_pair(oracle, n_cells=7)
    globals_ = {name: value.requires_grad_() for name, value in globals_.items()}
    objective = elbo(particles=guide.n_points)
    terms = objective.terms(given(model, globals_), guide, as_batch(cells))
    terms[sites.COUNTS].backward()
    gradients = {
        "loading": model.decoder.linear[0].weight.grad.T,
        "intercept": model.decoder.bias.grad,
        "effect": globals_[sites.EFFECT].grad,
        "artifact_effect": globals_[sites.ARTIFACT_EFFECT].grad,
        "artifact_loading": model.artifact_loading.grad,
        "noise_sd": model.likelihood.log_scale.grad / tensor(oracle.noise_sd),
    }
    for name, found in gradients.items():
        expected = np.zeros(found.shape)
        for index in np.ndindex(*found.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = np.array(getattr(oracle, name))
                moved[index] += step
                other = LinearGaussianCradle(**(vars(oracle) | {name: moved}))
                args = cells.x, cells.d, cells.a, mean, variance
                values.append(-other.expected_log_likelihood(*args).mean())
            expected[index] = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8, err_msg=name)


def test_bound_is_the_evidence_at_the_exact_posterior() -> None:
    oracle, cells = orthogonal_oracle(n_cells=8)
    exact = oracle.posterior(cells.x, cells.d, cells.a)
    # The exact posterior of passing cells is diagonal here, and the guide can hold it.
    passing = np.flatnonzero(oracle.gate(cells.a) == 0)
    cells = type(cells)(*(value[passing] for value in cells))
    variance = np.einsum("nii->ni", exact.covariance)[passing]
    guide = CubatureGuide(oracle, exact.mean[passing], variance)
    model, _, globals_ = make_linear_pair(oracle, n_cells=len(passing))
    terms = elbo(particles=guide.n_points).terms(given(model, globals_), guide, as_batch(cells))
    local = total({n: terms[n] for n in (sites.COUNTS, sites.Z_BASAL, sites.Z_ARTIFACT)})
    evidence = oracle.log_evidence(cells.x, cells.d, cells.a).mean()
    assert local.item() == pytest.approx(-evidence, rel=1e-10)


# --------------------------------------------------------------------------- consistency, sleep


def orthogonal_oracle(n_cells: int, seed: int = 0) -> tuple[LinearGaussianCradle, Any]:
    """Return an oracle whose conditional posteriors are diagonal, so that the guide holds them."""
    rng = np.random.default_rng(seed)
    k, a, genes = 3, 2, 6
    directions = np.linalg.qr(rng.standard_normal((genes, k)))[0].T
    turned = np.linalg.qr(rng.standard_normal((k, k)))[0]
    oracle = LinearGaussianCradle(
        loading=1.5 * directions,
        intercept=0.3 * rng.standard_normal(genes),
        noise_sd=np.full(genes, 0.8),
        effect=rng.standard_normal((4, k)),
        artifact_effect=rng.standard_normal((2, k)),
        artifact_loading=1.2 * turned[:a],
    )
    return oracle, oracle.sample(n_cells, rng=rng)


def exact_artifact_encoder(oracle: LinearGaussianCradle) -> tuple[np.ndarray, np.ndarray]:
    """Return gain and variance of p(w | x, p, a) for a failing cell."""
    joint = np.concatenate([oracle.loading, oracle.artifact_loading @ oracle.loading])
    scaled = joint / oracle.noise_sd
    covariance = np.linalg.inv(np.eye(len(joint)) + scaled @ scaled.T)
    gain = ((joint / oracle.noise_sd**2).T @ covariance)[:, oracle.n_latents :]
    variance = covariance[oracle.n_latents :, oracle.n_latents :]
    assert np.allclose(variance, np.diag(np.diag(variance)))
    return gain, np.diag(variance)


def exact_basal_encoder(oracle: LinearGaussianCradle) -> tuple[np.ndarray, np.ndarray]:
    """Return gain and variance of p(z | x, p, r)."""
    precision = np.eye(oracle.n_latents) + (oracle.loading / oracle.noise_sd**2) @ oracle.loading.T
    return oracle.exact_gain(), 1 / np.diag(precision)


def as_pool(cells: Any) -> FlipPool:
    return make_pool(as_batch(cells))


def sleep_gradients(
    oracle: LinearGaussianCradle, cells: Any, guide_gain: np.ndarray, guide_variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error of the term's gradient over repeats, by parameter of q."""
    model, guide, globals_ = make_linear_pair(oracle, n_cells=len(cells.x))
    set_linear_encoder(guide, oracle, guide_gain, guide_variance)
    set_artifact_encoder(guide, oracle, *exact_artifact_encoder(oracle))
    term = {"kind": "sleep", "generated_fraction": 1.0}
    objective = CradleELBO(make_objective(counterfactual=term), as_pool(cells))
    batch, gradients = as_batch(cells), []
    parameters = [p for p in (*guide.z_basal.parameters(), *guide.z_artifact.parameters())]
    for rows in torch.arange(len(batch)).split(len(batch) // 40):
        pair = model, FixedGlobals(guide, globals_)
        term = objective.terms(*pair, batch.take(rows))[COUNTERFACTUAL]
        found = torch.autograd.grad(term, parameters)
        gradients.append(torch.cat([g.ravel() for g in found]).numpy())
    values = np.array(gradients)
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))


class FixedGlobals(nn.Module):
    """A guide with its globals at known values, still among its sites."""

    def __init__(self, guide: CradleGuide, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.guide = guide
        self.values = values

    def forward(self, batch: Batch) -> None:
        with FixedDraws(self.values):
            self.guide(batch)


def test_sleep_term_is_stationary_at_the_exact_posterior() -> None:
    oracle, cells = orthogonal_oracle(n_cells=20_000)
    gain, variance = exact_basal_encoder(oracle)
    mean, error = sleep_gradients(oracle, cells, gain, variance)
    free = error > 0
    assert free.sum() > 40
    assert (np.abs(mean[free]) / error[free]).max() < 4.5
    assert error.max() < 0.05
    for wrong in ((0.8 * gain, variance), (gain, 1.3 * variance)):
        mean, error = sleep_gradients(oracle, cells, *wrong)
        free = error > 0
        assert (np.abs(mean[free]) / error[free]).max() > 10


def test_sleep_term_and_gradient_are_the_oracles_anywhere() -> None:
    """At z from the prior, whatever the intervention: p' and r' are given to the guide."""
    oracle, cells = orthogonal_oracle(n_cells=20_000, seed=1)
    gain, variance = exact_basal_encoder(oracle)
    gain, variance = 0.7 * gain + 0.05, 1.4 * variance
    _, guide, globals_ = make_linear_pair(oracle, n_cells=20_000)
    set_linear_encoder(guide, oracle, gain, variance)
    set_artifact_encoder(guide, oracle, *exact_artifact_encoder(oracle))
    latents = globals_ | {sites.Z_BASAL: tensor(cells.z), sites.Z_ARTIFACT: tensor(cells.w)}
    passing = cells.a.any(1) == 0
    flipped = as_batch(cells)
    term = sleep_term(guide, latents, flipped)
    # Failing cells add the term of w, whose guide is exact: E -log q(w | x, p, a) is its entropy.
    _, w_variance = exact_artifact_encoder(oracle)
    entropy = 0.5 * np.log(2 * np.pi * np.e * w_variance).sum()
    expected = oracle.sleep_loss(gain, np.diag(variance)) + (~passing).mean() * entropy
    assert term.item() == pytest.approx(expected, abs=0.08)
    (found,) = torch.autograd.grad(term, [guide.z_basal.network.inputs[0].counts])
    by_gain, _ = oracle.sleep_gradient(gain, np.diag(variance))
    np.testing.assert_allclose(found.T, by_gain, atol=0.06)
    assert np.abs(by_gain).max() > 0.5


def test_sleep_term_is_blind_to_the_model_and_to_globals() -> None:
    """Only encoders learn from it: counts are generated without gradient."""
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = make_batch(schema)
    term = elbo(batch, counterfactual="sleep").terms(model, guide, batch)[COUNTERFACTUAL]
    term.backward()
    touched = {name.split(".")[0] for name, p in guide.named_parameters() if p.grad is not None}
    assert touched == {"z_basal", "z_artifact"}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_sleep_term_is_the_mean_over_generated_cells(fraction) -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = make_batch(schema, n_cells=10)
    settings = {"kind": "sleep", "generated_fraction": fraction}
    objective = elbo(batch, counterfactual=settings)
    seen: list[int] = []

    class Spy(nn.Module):
        def forward(self, cells: Batch) -> None:
            seen.append(len(cells))
            guide(cells)

    objective.terms(model, Spy(), batch)
    assert seen == [10, int(10 * fraction)]


class Slope(nn.Module):
    """q(z | x) = Normal(slope x, variance)."""

    def __init__(self, slope: float = 0.4, variance: float = 0.5) -> None:
        super().__init__()
        self.slope = nn.Parameter(tensor([slope])[0])
        self.log_scale = nn.Parameter(0.5 * tensor([variance])[0].log())

    def forward(self, batch: Batch) -> None:
        with cells_plate(N_SLOPE_CELLS, batch):
            loc = self.slope * batch.counts
            scale = self.log_scale.exp().expand(loc.shape)
            pyro.sample(sites.Z_BASAL, dist.Normal(loc, scale).to_event(1))


N_SLOPE_CELLS = 4000


def slope_model(batch: Batch) -> Tensor:
    """z ~ Normal(0, 1), x ~ Normal(z, 2): posterior slope 0.2, variance 0.8."""
    one = torch.ones(len(batch), 1, dtype=torch.float64)
    with cells_plate(N_SLOPE_CELLS, batch):
        perturbation = pyro.deterministic(sites.PERTURBATION, batch.perturbation, event_dim=1)
        artifact = pyro.deterministic(sites.ARTIFACT, batch.artifact, event_dim=1)
        pyro.deterministic(sites.LIBRARY, batch.library)
        z = pyro.sample(sites.Z_BASAL, dist.Normal(0 * one, one).to_event(1))
        loc = z + 0 * perturbation + 0 * artifact.sum(-1, keepdim=True)
        return pyro.sample(sites.COUNTS, dist.Normal(loc, 2 * one).to_event(1), obs=batch.counts)


def train_slope(
    counterfactual: str, *, beta: float = 1.0, only: bool = False
) -> tuple[float, float]:
    """Return slope and variance that a linear guide reaches, averaged over the last steps."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((N_SLOPE_CELLS, 1))
    x = z + 2 * rng.standard_normal((N_SLOPE_CELLS, 1))
    x *= np.sqrt(5) / x.std()
    zeros = torch.zeros(N_SLOPE_CELLS, 1, dtype=torch.float64)
    batch = Batch(tensor(x), zeros, zeros, zeros[:, 0] + 1, zeros[:, :0])
    guide = Slope()
    objective = elbo(batch, counterfactual=counterfactual, beta=beta)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    path = []
    for step in range(300):
        terms = objective.terms(slope_model, guide, batch)
        loss = terms[COUNTERFACTUAL] if only else total(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 200:
            path.append((guide.slope.item(), np.exp(2 * guide.log_scale.item())))
    slope, variance = np.mean(path, axis=0)
    return float(slope), float(variance)


def test_sleep_recovers_the_exact_posterior() -> None:
    slope, variance = train_slope("sleep")
    assert slope == pytest.approx(0.2, abs=0.01)
    assert variance == pytest.approx(0.8, abs=0.02)


def kl_form_optimum(beta: float) -> tuple[float, float]:
    """Return slope and variance where the gradient of -ELBO + beta * KL term vanishes.

    With x ~ Normal(0, 5), precision 1.25, z ~ q(z | x), x' ~ Normal(z, 2) and the target fixed:
    by slope, 6.25 (s - 0.2) + beta s/v (E x'² - E x x'); by variance,
    1.25 - 1/v - beta s² E(x - x')² / v².
    """

    def gradient(at: np.ndarray) -> list[float]:
        s, v = at
        new, joint = 5 * s**2 + v + 4, 5 * s
        by_slope = 6.25 * (s - 0.2) + beta * s / v * (new - joint)
        return [by_slope, 1.25 - 1 / v - beta * (s / v) ** 2 * (5 + new - 2 * joint)]

    slope, variance = optimize.fsolve(gradient, [0.1, 0.9])
    return float(slope), float(variance)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_kl_form_over_disperses_as_its_stationary_point_says(beta) -> None:
    slope, variance = train_slope("kl", beta=beta)
    expected = kl_form_optimum(beta)
    assert slope == pytest.approx(expected[0], abs=0.01)
    assert variance == pytest.approx(expected[1], abs=0.02)
    assert slope < 0.13
    assert variance > 0.85


# ------------------------------------------------------------------------------- the other forms


def test_kl_term_is_torchs_divergence_per_cell() -> None:
    schema = make_schema()
    _, guide = make_pair(schema)
    batch, flipped = make_batch(schema), make_batch(schema, seed=8)
    latents = draw_latents(guide, batch)
    found = kl_term(guide, latents, batch, flipped)
    q, other = (
        poutine.trace(poutine.condition(guide, data=latents)).get_trace(cells).nodes[sites.Z_BASAL]
        for cells in (batch, flipped)
    )
    expected = kl_divergence(q["fn"], other["fn"])
    assert expected.shape == (10,)
    torch.testing.assert_close(found, expected.mean())
    found.backward()
    assert all(p.grad is None for p in (guide.mask_logits, *guide.effect.parameters()))


def test_kl_term_passes_no_gradient_through_its_target() -> None:
    schema = make_schema()
    _, guide = make_pair(schema)
    batch = make_batch(schema)
    latents = draw_latents(guide, batch)
    same = kl_term(guide, latents, batch, batch)
    assert same.item() == pytest.approx(0, abs=1e-5)
    gradients = torch.autograd.grad(same, guide.z_basal.head.loc.weight)
    assert gradients[0].abs().max() < 1e-5


def make_partners() -> tuple[CradleGuide, Batch, dict[str, Tensor]]:
    schema = make_schema(covariates=COVARIATES)
    _, guide = make_pair(schema)
    batch = with_partners(make_batch(schema))
    return guide, batch, draw_latents(guide, batch)


def partner_term_given(guide: CradleGuide, latents: dict[str, Tensor], batch: Batch) -> Tensor:
    torch.manual_seed(6)
    return partner_term(guide, latents, batch)


def test_partner_term_is_zero_where_the_partner_has_the_cells_own_counts() -> None:
    guide, batch, latents = make_partners()
    own = batch.take(batch.partner_rows)
    twin = batch.partner.replace(counts=own.counts, library=own.library)
    assert partner_term_given(guide, latents, batch) > 0.01
    found = partner_term_given(guide, latents, batch.replace(partner=twin))
    assert found.item() == pytest.approx(0, abs=1e-6)


def test_cells_without_a_partner_contribute_nothing_and_are_not_counted() -> None:
    guide, batch, latents = make_partners()
    found = partner_term_given(guide, latents, batch)
    others = torch.tensor([i for i in range(10) if i not in batch.partner_rows.tolist()])
    changed = batch.counts.clone()
    changed[others] += 50
    assert partner_term_given(guide, latents, batch.replace(counts=changed)) == found
    none = batch.replace(partner=None, partner_rows=None)
    assert partner_term_given(guide, latents, none).item() == 0.0
    alone = batch.replace(
        partner=batch.partner.take(torch.tensor([1])), partner_rows=batch.partner_rows[1:2]
    )
    again = torch.arange(2)
    twice = alone.replace(
        partner=alone.partner.take(0 * again), partner_rows=alone.partner_rows[0 * again]
    )
    locals_ = {sites.Z_ARTIFACT, sites.Z_BASAL}
    globals_ = {name: value for name, value in latents.items() if name not in locals_}
    if (alone.partner.artifact > 0).any():
        pytest.fail("the partner should pass, so that nothing is drawn")
    one = partner_term_given(guide, globals_, alone)
    torch.testing.assert_close(partner_term_given(guide, globals_, twice), one)


def test_partner_term_depends_on_the_partners_flags_and_not_on_the_cells_own() -> None:
    guide, batch, latents = make_partners()
    found = partner_term_given(guide, latents, batch)
    own = batch.replace(artifact=1 - batch.artifact)
    assert partner_term_given(guide, latents, own) == found
    flags = batch.partner.replace(artifact=torch.ones_like(batch.partner.artifact))
    assert partner_term_given(guide, latents, batch.replace(partner=flags)) != found


# ------------------------------------------------------------------- interventions of the terms


def capture(monkeypatch: pytest.MonkeyPatch, batch: Batch, **settings: Any) -> tuple[Batch, Any]:
    """Return the flipped cells that a consistency term generates from, and their latents."""
    from cradle_pyro.inference import objectives

    found: dict[str, Any] = {}
    original = objectives.sleep_term

    def spy(guide: Any, latents: dict[str, Tensor], flipped: Batch) -> Tensor:
        found.update(latents=latents, flipped=flipped)
        return original(guide, latents, flipped)

    monkeypatch.setattr(objectives, "sleep_term", spy)
    model, guide = make_pair(make_schema(), **settings.pop("pair", {}))
    term = {"kind": "sleep", "generated_fraction": 1.0} | settings
    elbo(batch, counterfactual=term).terms(model, guide, batch)
    return found["flipped"], found["latents"]


def test_flipping_everything_turns_failing_into_passing_and_back(monkeypatch) -> None:
    batch = make_batch(make_schema(), n_cells=200)
    flipped, _ = capture(monkeypatch, batch, flip_artifact=1.0, flip_perturbation=0.0)
    failing, now = (gate(cells.artifact).squeeze(-1) > 0 for cells in (batch, flipped))
    assert torch.equal(now, ~failing)
    seen = {tuple(row) for row in batch.artifact[failing].tolist()}
    assert {tuple(row) for row in flipped.artifact[now].tolist()} <= seen
    assert torch.equal(flipped.perturbation, batch.perturbation)
    assert not torch.equal(flipped.counts, batch.counts)


def test_no_flip_keeps_the_cell_but_for_its_counts(monkeypatch) -> None:
    batch = make_batch(make_schema(), n_cells=50)
    flipped, _ = capture(monkeypatch, batch, flip_artifact=0.0, flip_perturbation=0.0)
    for name in ("artifact", "perturbation", "library"):
        assert torch.equal(getattr(flipped, name), getattr(batch, name))


def test_half_are_flipped_by_default_and_designs_are_those_of_training(monkeypatch) -> None:
    batch = make_batch(make_schema(), n_cells=400)
    flipped, _ = capture(monkeypatch, batch)
    failing, now = (gate(cells.artifact).squeeze(-1) > 0 for cells in (batch, flipped))
    assert abs((failing != now).float().mean().item() - 0.5) < 0.12
    moved = (flipped.perturbation != batch.perturbation).any(-1)
    assert 0.2 < moved.float().mean() < 0.6
    seen = {tuple(row) for row in batch.perturbation.tolist()}
    assert {tuple(row) for row in flipped.perturbation.tolist()} <= seen


def test_missing_flags_are_flipped_from_what_the_guide_drew(monkeypatch) -> None:
    """Not from the rows of the batch, which say nothing."""
    batch = make_batch(make_schema(), n_cells=60, missing=True)
    unknown = ~batch.artifact_observed
    batch.artifact[unknown] = 1.0
    flipped, latents = capture(monkeypatch, batch, flip_artifact=0.0, flip_perturbation=0.0)
    drawn = latents[f"{sites.ARTIFACT}_unobserved"]
    assert not (drawn[unknown] == 1).all()
    assert flipped.artifact_observed is None
    assert torch.equal(flipped.artifact[unknown], drawn[unknown])
    assert torch.equal(flipped.artifact[~unknown], batch.artifact[~unknown])


def test_library_follows_the_artifact(monkeypatch) -> None:
    """By its learned shift, else from training cells of that state; as it was if the flags are."""
    batch = make_batch(make_schema(), n_cells=300)
    flipped, latents = capture(monkeypatch, batch)
    shift = (flipped.artifact - batch.artifact) @ latents[sites.DEPTH_SHIFT]
    torch.testing.assert_close(flipped.library, batch.library * shift.exp())
    same = (flipped.artifact == batch.artifact).all(-1)
    assert same.any()
    assert torch.equal(flipped.library[same], batch.library[same])
    monkeypatch.undo()
    off = {"model": {"depth_shift": False}}
    flipped, _ = capture(monkeypatch, batch, pair=off, flip_artifact=1.0)
    failing = gate(batch.artifact).squeeze(-1) > 0
    assert set(flipped.library[failing].tolist()) <= set(batch.library[~failing].tolist())
    assert set(flipped.library[~failing].tolist()) <= set(batch.library[failing].tolist())


def test_screen_without_artifacts_is_flipped_by_perturbation_only(monkeypatch) -> None:
    schema = make_schema(n_artifacts=0)
    batch = make_batch(schema, n_cells=30)
    model, guide = make_pair(schema)
    assert torch.isfinite(total(elbo(batch, counterfactual="sleep").terms(model, guide, batch)))


def test_consistency_without_a_pool_is_an_error() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    with pytest.raises(ValueError, match="pool of training states"):
        elbo(counterfactual="sleep").terms(model, guide, make_batch(schema))


# ---------------------------------------------------------------------------------- edited pairs


def test_an_edited_pair_trains_to_its_own_bound() -> None:
    """Another prior, another global latent: the bound is that of the edited pair."""
    schema = make_schema()
    model, guide = make_pair(schema, dtype=torch.float64)
    batch = make_batch(schema, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)

    def edited(cells: Batch) -> Tensor:
        pyro.sample("extra", dist.Gamma(2 * one, one))
        return poutine.scale(model, scale=1.0)(cells)

    def edited_guide(cells: Batch) -> None:
        pyro.sample("extra", dist.LogNormal(0.1 * one, 0.3 * one))
        guide(cells)

    ours, pyros = (
        [objective.loss(edited, edited_guide, batch) for _ in range(100)]
        for objective in (elbo(particles=20), Trace_ELBO(**particles(20)))
    )
    error = np.sqrt(np.var(ours) / 100 + np.var(pyros) / 100)
    assert abs(np.mean(ours) - np.mean(pyros)) < 4.5 * error
    terms = elbo(particles=20).terms(edited, edited_guide, batch)
    assert "extra" in terms


def test_guide_without_a_latent_of_the_model_is_an_error() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)

    def partial(batch: Batch) -> None:
        poutine.block(guide, hide=[sites.DEPTH_SHIFT])(batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=sites.DEPTH_SHIFT):
            elbo().terms(model, partial, make_batch(schema))


def test_guide_that_is_not_reparameterised_is_an_error() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)

    class Stock(poutine.messenger.Messenger):
        def _pyro_sample(self, message: dict[str, Any]) -> None:
            if message["name"] == sites.EFFECT_MASK:
                message["fn"] = dist.Bernoulli(logits=guide.mask_logits).to_event(1)

    with pytest.raises(ValueError, match=r"effect_mask.*reparameterised"):
        elbo().terms(model, Stock()(guide), make_batch(schema))


def test_pair_without_a_cells_plate_is_an_error() -> None:
    def model(batch: Batch) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=sites.CELLS):
        elbo().terms(model, model, make_batch(make_schema()))
