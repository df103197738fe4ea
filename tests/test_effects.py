"""Questions about effects and profiles: what the answers depend on, and what they leave alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import make_data, make_fit, shared_fit

from cradle_pyro import sites
from cradle_pyro.errors import QueryError
from cradle_pyro.queries import effects, profiles
from cradle_pyro.queries.effects import average_effect, effect_draws, generated_effects
from cradle_pyro.queries.profiles import expected_rate

LIBRARY = np.array([300.0, 500.0, 900.0], np.float32)


def with_missing_flags(data):
    """Return the cells with every fifth cell's flags missing."""
    observed = np.arange(data.n_cells) % 5 > 0
    artifact = np.where(observed[:, None], data.artifact, 0).astype(np.float32)
    return dataclasses.replace(data, artifact=artifact, artifact_observed=observed)


def labels_of(posterior):
    first, second, *_ = posterior.schema.perturbations
    return [first, second, f"{first}+{second}"]


def generated(posterior, labels, **options):
    libraries = [LIBRARY] * len(labels)
    return generated_effects(posterior, labels, libraries, LIBRARY, draws=3, n_cells=9, **options)


QUESTIONS = {
    "effect_draws": lambda p: effect_draws(p, labels_of(p), draws=3, n_cells=9),
    "generated_effects": lambda p: generated(p, labels_of(p)),
    "average_effect": lambda p: average_effect(p, labels_of(p)[0], draws=3, n_cells=9).to_numpy(),
    "expected_rate": lambda p: expected_rate(p, make_data().subset(np.arange(20)), draws=3),
}


@pytest.fixture(params=QUESTIONS, ids=str)
def question(request):
    return QUESTIONS[request.param]


# ------------------------------------------------------------------------------- random numbers


def test_asking_leaves_the_callers_random_state(question):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    question(shared_fit())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_answers_do_not_depend_on_what_was_drawn_before(question):
    torch.manual_seed(1)
    first = question(shared_fit())
    torch.manual_seed(2)
    np.testing.assert_array_equal(question(shared_fit()), first)


def test_a_question_that_fails_half_way_leaves_the_callers_random_state(question, monkeypatch):
    world, calls = effects.run_world, []

    def run_world(*args):
        calls.append(args)
        if len(calls) == 3:
            raise InterruptedError
        return world(*args)

    monkeypatch.setattr(effects, "run_world", run_world)
    monkeypatch.setattr(profiles, "run_world", run_world)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with pytest.raises(InterruptedError):
        question(shared_fit())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_labels_asked_together_or_one_by_one_have_the_same_effects():
    posterior = shared_fit()
    labels = labels_of(posterior)
    together = effect_draws(posterior, labels, draws=3, n_cells=9, seed=4)
    for column, label in enumerate(labels):
        alone = effect_draws(posterior, [label], draws=3, n_cells=9, seed=4)
        np.testing.assert_array_equal(alone[:, 0], together[:, column])
    backwards = effect_draws(posterior, labels[::-1], draws=3, n_cells=9, seed=4)
    np.testing.assert_array_equal(backwards[:, ::-1], together)


def test_more_draws_begin_with_the_fewer_and_another_seed_has_others():
    posterior = shared_fit()
    labels = labels_of(posterior)
    few, many = (effect_draws(posterior, labels, draws=n, n_cells=9) for n in (2, 4))
    np.testing.assert_array_equal(many[:2], few)
    assert len(np.unique(many[:, 0, 0])) == 4
    other = effect_draws(posterior, labels, draws=4, n_cells=9, seed=1)
    assert not np.isin(other[:, 0, 0], many[:, 0, 0]).any()


def test_control_has_no_effect():
    draws = effect_draws(shared_fit(), ["control"], draws=3, n_cells=9)
    assert not draws.any()


def test_an_effect_is_the_difference_of_mean_logs_over_the_same_cells(monkeypatch):
    """One draw by hand, from the rates the model was asked for."""
    posterior = shared_fit()
    rates = []

    def run_world(*args):
        rates.append(world(*args)[sites.RATE].double().numpy())
        return {sites.RATE: torch.as_tensor(rates[-1])}

    world = effects.run_world
    monkeypatch.setattr(effects, "run_world", run_world)
    found = effect_draws(posterior, labels_of(posterior)[:2], draws=1, n_cells=9)[0]
    base, *worlds = (np.log2(1 + 1e4 * rate).mean(0) for rate in rates)
    assert len(rates) == 3
    assert rates[0].shape == (9, posterior.schema.n_genes)
    np.testing.assert_allclose(found, np.stack(worlds) - base, atol=1e-5)


def test_generated_effects_of_deep_cells_without_dispersion_are_those_of_the_rates():
    posterior = make_fit("model.likelihood=poisson")
    labels = labels_of(posterior)
    deep = np.array([1e9], np.float32)
    found = generated_effects(posterior, labels, [deep] * 3, deep, draws=2, n_cells=9)
    expected = effect_draws(posterior, labels, draws=2, n_cells=9).mean(0)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_a_perturbation_the_model_does_not_know_is_an_error():
    with pytest.raises(QueryError, match="knows no perturbation 'KLF9'"):
        effect_draws(shared_fit(), ["KLF9"])


# ------------------------------------------------------------------------------------- profiles


def test_profiles_are_rates_of_the_other_world():
    posterior, data = shared_fit(), make_data()
    for options in ({}, {"artifact": 0.0}, {"control": True}):
        rate = expected_rate(posterior, data, draws=2, **options)
        assert rate.shape == (data.n_cells, data.schema.n_genes)
        np.testing.assert_allclose(rate.sum(1), 1, atol=1e-4)
    factual = expected_rate(posterior, data, draws=2)
    without = expected_rate(posterior, data, artifact=0.0, draws=2)
    np.testing.assert_allclose(without[~data.failing], factual[~data.failing], atol=1e-6)
    assert (without[data.failing] != factual[data.failing]).any(1).all()
    unperturbed = expected_rate(posterior, data, control=True, draws=2)
    is_control = data.labels == "control"
    np.testing.assert_allclose(unperturbed[is_control], factual[is_control], atol=1e-6)
    assert (unperturbed[~is_control] != factual[~is_control]).any(1).all()


def test_profiles_of_cells_with_missing_flags_follow_the_flags_drawn():
    missing = with_missing_flags(make_data())
    posterior = make_fit(data=missing)
    unknown = missing.subset(~missing.artifact_observed)
    rates = {}
    for log_odds in (-20.0, 20.0):
        with torch.no_grad():
            posterior.guide.artifact_logits.weight.zero_()
            posterior.guide.artifact_logits.bias.fill_(log_odds)
        own = expected_rate(posterior, unknown, draws=3)
        rates[log_odds] = own
        value = float(log_odds > 0)
        stated = expected_rate(posterior, unknown, artifact=value, draws=3)
        np.testing.assert_allclose(own, stated, atol=1e-6)
        np.testing.assert_allclose(own.sum(1), 1, atol=1e-4)
    assert (rates[-20.0] != rates[20.0]).any(1).all()


def test_values_of_missing_flags_do_not_move_profiles():
    missing = with_missing_flags(make_data())
    posterior = make_fit(data=missing)
    garbage = np.where(missing.artifact_observed[:, None], missing.artifact, 1)
    other = dataclasses.replace(missing, artifact=garbage.astype(np.float32))
    for options in ({}, {"artifact": 0.0}, {"control": True}):
        first, second = (expected_rate(posterior, d, draws=2, **options) for d in (missing, other))
        np.testing.assert_array_equal(first, second)
