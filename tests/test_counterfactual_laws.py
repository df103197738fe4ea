"""Laws of counterfactuals: true for any parameters, so they are tested on untrained models."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from factories import COVARIATES, make_batch, make_config, make_pair, make_schema, make_statistics
from pyro import poutine
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.inference.posterior import Posterior, ReferenceCells
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.likelihoods import NormalLikelihood
from cradle_pyro.model.noise import (
    CountSiteNoise,
    DropoutSiteNoise,
    PresenceNoise,
    abduct_noise,
    count_elements,
)
from cradle_pyro.model.quantiles import count_noise
from cradle_pyro.queries.abduction import Abduction, abduct, hold_noise, predict, predict_each
from cradle_pyro.queries.interventions import Intervention, check, do, parse_do
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch

N_CELLS = 24
COUNT_LIKELIHOODS = ("nb", "poisson", "zinb")
LIKELIHOODS = (*COUNT_LIKELIHOODS, "normal")
GUIDES = ("structured", "mean_field")
FLAGS: dict[str, dict[str, bool]] = {
    "flags": {},
    "severities": {"severity": True},
    "missing flags": {"missing": True},
}

Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class World:
    """A fitted pair, its cells as they are, and one abduction of them."""

    posterior: Posterior
    batch: Batch
    abduction: Abduction
    fresh: Tensor
    _known: dict[str, Values] = field(default_factory=dict)

    @property
    def model(self) -> Cradle:
        return self.posterior.model

    def acts(self, intervention: Intervention) -> Values:
        """Return the values of the intervened sites; `typical` flags are the same each time."""
        with seeded(0):
            checked = check(self.posterior, intervention)
            return checked.acts(self.abduction.batch, self.abduction.values)

    def under(self, intervention: Intervention) -> Values:
        """Return the counterfactual values of all sites; worked out once."""
        key = str(intervention)
        if key not in self._known:
            acts = self.acts(intervention)
            self._known[key] = predict(self.model, self.abduction, acts)
        return self._known[key]

    def distribution(self, world: Values) -> Any:
        """Return the distribution of the counts of a world."""
        return self.model.likelihood(world[sites.RATE], world[sites.LIBRARY])


def make_cells(posterior: Posterior, likelihood: str, dtype: torch.dtype, **cells: Any) -> Batch:
    """Return random cells, with values instead of counts where the likelihood is Normal."""
    batch = make_batch(posterior.schema, n_cells=N_CELLS, dtype=dtype, **cells)
    if likelihood == "normal":
        noise = torch.randn(batch.counts.shape, generator=torch.Generator().manual_seed(2))
        batch = batch.replace(counts=torch.log1p(batch.counts) + 0.1 * noise.to(dtype))
    return batch


@cache
def make_world(
    likelihood: str = "nb",
    family: str = "structured",
    flags: str = "flags",
    *,
    dtype: torch.dtype = torch.float32,
    bare: bool = False,
    model: tuple[tuple[str, Any], ...] = (),
    risk: float = 3.0,
) -> World:
    """Return cells abducted under random parameters, flags depending much on the perturbation.

    `bare`: without covariates, and all genes kept.
    """
    schema = make_schema(covariates=() if bare else COVARIATES, has_rest=not bare)
    sections: dict[str, Any] = {
        "model": {"likelihood": likelihood} | dict(model),
        "guide": {"family": family},
    }
    pair = make_pair(schema, dtype=dtype, **sections)
    posterior = make_posterior(pair, **sections)
    batch = make_cells(posterior, likelihood, dtype, **FLAGS[flags])
    with seeded(3):
        guide = pair[1]
        if pair[0].has_artifact_risk:
            values = risk * torch.randn(schema.n_artifacts, schema.n_perturbations, dtype=dtype)
            guide = poutine.condition(guide, data={sites.ARTIFACT_RISK: values})
        # What a flag is worth that appears; one unless the query says otherwise.
        fresh = torch.linspace(0.2, 0.9, batch.artifact.numel(), dtype=dtype)
        given = fresh.reshape(batch.artifact.shape) if flags == "severities" else None
        fresh = torch.ones_like(batch.artifact) if given is None else given
        return World(posterior, batch, abduct(pair[0], guide, batch, fresh_artifact=given), fresh)


def make_posterior(pair: Any, **sections: Any) -> Posterior:
    """Return a posterior of an untrained pair."""
    schema = pair[0].schema
    failing = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    return Posterior(
        model=pair[0],
        guide=pair[1],
        schema=schema,
        config=make_config(**sections),
        statistics=make_statistics(schema),
        reference=ReferenceCells(*(torch.zeros(1, k) for k in (5, 5, 1, 1))),
        history=pd.DataFrame(),
        labels=pd.DataFrame({"label": []}),
        failing_artifacts=failing,
    )


ACTS: dict[str, Intervention] = {
    "control": do(perturbation="control"),
    "pair": do(perturbation="P0+P2"),
    "no artifact": do(artifact=0),
    "severity": do(artifact={"low_0": 0.25, "low_1": 0.5}),
    "all": do(perturbation={"P1": 0.3}, artifact="low_0", library=1e4),
}
MORE_ACTS: dict[str, Intervention] = ACTS | {
    "dosage": do(perturbation={"P1": 0.3}),
    "one flag": do(artifact="low_1"),
    "typical": do(artifact="typical"),
    "library": do(library=50),
    "z_basal": do(sites={sites.Z_BASAL: 0.5}),
    "perturbation_shift": do(sites={sites.PERTURBATION_SHIFT: -1.0}),
    "artifact_shift": do(sites={sites.ARTIFACT_SHIFT: 1.0}),
    "artifact_effect": do(sites={sites.ARTIFACT_EFFECT: 0.7}),
}
FACTUAL = do(perturbation="factual", artifact="factual", library="factual")


def named(key: tuple[str, ...]) -> str:
    return "-".join(key)


@pytest.fixture(params=list(itertools.product(LIKELIHOODS, GUIDES, FLAGS)), ids=named)
def world(request) -> World:
    return make_world(*request.param)


@pytest.fixture(params=list(itertools.product(COUNT_LIKELIHOODS, GUIDES, FLAGS)), ids=named)
def counted(request) -> World:
    return make_world(*request.param)


@pytest.fixture(params=LIKELIHOODS)
def one(request) -> World:
    """One of the worlds for each likelihood, where a law has many cases."""
    return make_world(request.param, "structured", "severities")


def assert_same(found: Values, expected: Values) -> None:
    """Raise unless all sites hold the same values, bit for bit."""
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# ----------------------------------------------------------------------- what changes nothing


def test_doing_nothing_returns_the_observed_cells(world) -> None:
    same = world.under(do())
    assert_same(same, world.abduction.values)
    assert torch.equal(same[sites.COUNTS], world.batch.counts)
    assert torch.equal(same[sites.LIBRARY], world.batch.library)
    assert torch.equal(same[sites.PERTURBATION], world.batch.perturbation)
    observed = world.batch.artifact_observed
    observed = slice(None) if observed is None else observed
    assert torch.equal(same[sites.ARTIFACT][observed], world.batch.artifact[observed])


def test_doing_the_factual_returns_the_observed_cells(world) -> None:
    assert_same(world.under(FACTUAL), world.abduction.values)
    assert_same(world.under(do(perturbation="factual")), world.abduction.values)


def test_doing_any_part_of_the_factual_returns_the_observed_cells(one) -> None:
    texts = ("perturbation=factual", "artifact=factual", "library=factual")
    for k in (1, 2, 3):
        for some in itertools.combinations(texts, k):
            assert_same(one.under(parse_do(some)), one.abduction.values)


def test_doing_the_factual_value_of_any_site_changes_nothing(one) -> None:
    assert len(one.abduction.values) > 10
    for name, value in one.abduction.values.items():
        assert_same(predict(one.model, one.abduction, {name: value}), one.abduction.values)


@pytest.mark.parametrize("likelihood", ["nb", "normal"])
@pytest.mark.parametrize(
    "model",
    [
        {"artifact_risk": False},
        {"depth_shift": False},
        {"gene_effect": "none", "latent_effect": False},
        {"n_artifact_latents": 0},
        {"combine": "sum", "dilution": False, "linear_path": False},
    ],
    ids=str,
)
def test_doing_nothing_returns_the_observed_cells_whatever_mechanisms_there_are(
    likelihood, model
) -> None:
    world = make_world(likelihood, model=tuple(model.items()), bare=True)
    assert torch.equal(world.under(do())[sites.COUNTS], world.batch.counts)
    assert torch.equal(world.under(FACTUAL)[sites.COUNTS], world.batch.counts)
    assert not torch.equal(world.under(ACTS["all"])[sites.COUNTS], world.batch.counts)


@pytest.mark.parametrize("library", [1e-6, 1.0, 1e8])
@pytest.mark.parametrize("likelihood", COUNT_LIKELIHOODS)
def test_counts_that_the_model_did_not_expect_come_back_too(likelihood, library) -> None:
    """Far in either tail: thousands where none are expected, none where millions are."""
    world = make_world(likelihood, bare=True)
    counts = world.batch.counts.clone()
    counts[::2] *= 1000
    batch = world.batch.replace(counts=counts, library=torch.full((N_CELLS,), library))
    far = abduct(world.model, world.posterior.guide, batch)
    for acts in ({}, {sites.PERTURBATION: batch.perturbation, sites.ARTIFACT: batch.artifact}):
        assert torch.equal(predict(world.model, far, acts)[sites.COUNTS], counts)


def test_interventions_do_change_something(world) -> None:
    for name, act in ACTS.items():
        assert not torch.equal(world.under(act)[sites.COUNTS], world.batch.counts), name


def test_every_site_that_is_done_changes_something(one) -> None:
    for name, act in MORE_ACTS.items():
        inert = isinstance(one.model.likelihood, NormalLikelihood) and name == "library"
        assert torch.equal(one.under(act)[sites.COUNTS], one.batch.counts) == inert, name


# ----------------------------------------------------------------------- several interventions


def test_interventions_on_different_sites_commute(one) -> None:
    several = [MORE_ACTS[name] for name in ("pair", "severity", "library", "artifact_effect")]
    for first, second in itertools.combinations(several, 2):
        assert_same(one.under(first | second), one.under(second | first))
        assert not torch.equal(one.under(first | second)[sites.RATE], one.under(do())[sites.RATE])


def test_one_intervention_after_the_other_is_both_together(one) -> None:
    """The second asked of the model in which the first is done already."""
    for first, second in itertools.permutations(("pair", "severity", "library"), 2):
        acts = one.acts(MORE_ACTS[first])
        done = poutine.do(one.model, data=acts)
        found = predict(done, one.abduction, one.acts(MORE_ACTS[second]))
        expected = one.under(MORE_ACTS[first] | MORE_ACTS[second])
        assert all(torch.equal(found[name], expected[name]) for name in set(found) - set(acts))


def test_an_intervention_blocks_what_lies_above_it(one) -> None:
    """With the rate and the library held, nothing above them matters to the counts."""
    held = {name: one.abduction.values[name] for name in (sites.RATE, sites.LIBRARY)}
    for act in ("pair", "severity", "z_basal"):
        other = predict(one.model, one.abduction, one.acts(MORE_ACTS[act]) | held)
        assert torch.equal(other[sites.COUNTS], one.batch.counts)


# ----------------------------------------------------------------------- what is kept


def test_latents_are_those_of_the_factual_world(world) -> None:
    for act in ACTS.values():
        other, acts = world.under(act), world.acts(act)
        assert {sites.Z_BASAL, sites.Z_ARTIFACT, sites.EFFECT} <= set(world.abduction.latents)
        for name in set(world.abduction.latents) - set(acts):
            assert torch.equal(other[name], world.abduction.latents[name]), name


def test_predicting_leaves_the_abduction_as_it_was(world) -> None:
    for act in ACTS.values():
        world.under(act)
    assert_same(world.under(do()), world.abduction.values)
    assert torch.equal(world.abduction.batch.counts, world.batch.counts)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("flags", FLAGS)
def test_worlds_that_are_predicted_together_are_the_same_as_one_by_one(likelihood, flags) -> None:
    world = make_world(likelihood, "structured", flags, dtype=torch.float64)
    for names in (("control", "pair", "dosage"), ("no artifact", "severity", "typical")):
        alone = [world.under(MORE_ACTS[name]) for name in names]
        acts = [world.acts(MORE_ACTS[name]) for name in names]
        together = predict_each(world.model, world.abduction, acts)
        of_cells = {sites.COUNTS, sites.LIBRARY, sites.RATE, sites.ARTIFACT, sites.Z_BASAL}
        assert of_cells <= set(together)
        assert sites.EFFECT not in together
        for name, values in together.items():
            expected = torch.stack([one[name] for one in alone])
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)


def test_the_same_noise_read_in_another_world_and_back_returns_the_observed_counts(world) -> None:
    """The counterfactual cells take the place of the factual ones; their noise is kept."""
    factual = {n: world.abduction.values[n] for n in (sites.PERTURBATION, sites.ARTIFACT)}
    for act in ("pair", "severity", "all"):
        other = world.under(ACTS[act])
        batch = Batch(
            counts=other[sites.COUNTS],
            perturbation=other[sites.PERTURBATION],
            artifact=other[sites.ARTIFACT],
            library=other[sites.LIBRARY],
            covariates=world.batch.covariates,
        )
        moved = world.abduction._replace(batch=batch, values=other)
        back = predict(world.model, moved, factual)
        assert torch.equal(back[sites.COUNTS], world.batch.counts)
        assert torch.equal(back[sites.LIBRARY], world.batch.library)


def test_the_counterfactual_count_abducts_to_the_noise_it_was_made_with(counted) -> None:
    """The number u of the factual world lies in [F'(x' - 1), F'(x')]."""
    noise = counted.abduction.noise[sites.COUNTS]
    assert isinstance(noise, CountSiteNoise | DropoutSiteNoise)
    log_tail, is_upper = noise.quantile
    for act in ACTS.values():
        other = counted.under(act)
        elements = count_elements(counted.distribution(other), noise.shape)
        count = other[sites.COUNTS].double().ravel()
        if isinstance(noise, DropoutSiteNoise):  # u is the place before dropout
            dropped = noise.dropout < torch.sigmoid(elements.dropout_logits)
            assert (count[dropped] == 0).all()
            count, elements = count[~dropped], elements.counts.take(~dropped)
            log_tail, is_upper = (part[~dropped] for part in noise.quantile)
        at, below = elements.log_tails(count), elements.log_tails(count - 1)
        reaches = torch.where(is_upper, at.upper <= log_tail, at.lower >= log_tail)
        before = torch.where(is_upper, below.upper > log_tail, below.lower < log_tail)
        assert (count == count.round()).all()
        assert (count >= 0).all()
        assert reaches.all()
        assert before.all()


def test_the_residual_of_a_counterfactual_value_is_the_factual_one() -> None:
    """Abducted anew in the other world, a Normal value and a library lead back."""
    world = make_world("normal", dtype=torch.float64)
    other = world.under(ACTS["pair"] | ACTS["severity"])
    for name, distribution in (
        (sites.COUNTS, world.distribution),
        (sites.LIBRARY, lambda values: library_of(world, values)),
    ):
        anew = abduct_noise(name, distribution(other), other[name])
        back = anew.value_under(distribution(world.abduction.values))
        torch.testing.assert_close(back, world.abduction.values[name], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(other[name], back)


def library_of(world: World, values: Values) -> Any:
    """Return the distribution of the library in a world."""
    trace = poutine.trace(poutine.condition(world.model, data=values))
    return trace.get_trace(world.abduction.batch).nodes[sites.LIBRARY]["fn"]


def test_rates_do_not_depend_on_whether_the_noise_of_counts_is_abducted(one) -> None:
    latents, rates = one.abduction.latents, []
    for counts in (True, False):
        with seeded(4):
            held = hold_noise(one.model, one.abduction.batch, latents, counts=counts)
        rates.append(predict(one.model, held, one.acts(ACTS["pair"]))[sites.RATE])
    assert torch.equal(*rates)


# ----------------------------------------------------------------------- counts follow their mean


def test_a_gene_whose_distribution_stays_keeps_its_count_while_others_change(world) -> None:
    rate = world.abduction.values[sites.RATE].clone()
    stays = torch.arange(rate.shape[1]) % 3 == 0
    rate[:, ~stays] *= 3
    other = predict(world.model, world.abduction, {sites.RATE: rate})[sites.COUNTS]
    assert torch.equal(other[:, stays], world.batch.counts[:, stays])
    assert (other != world.batch.counts)[:, ~stays].any(0).all()


def test_a_count_does_not_fall_where_its_mean_rises_nor_rise_where_it_falls(world) -> None:
    follow_their_means(world, ACTS)


def test_counts_follow_their_means_whatever_site_is_done(one) -> None:
    follow_their_means(one, MORE_ACTS)


def follow_their_means(world: World, acts: dict[str, Intervention]) -> None:
    """Raise unless counts move in the direction of their means, and stay where these stay."""
    for act in acts.values():
        other = world.under(act)
        change = world.distribution(other).loc - world.distribution(world.abduction.values).loc
        moved = other[sites.COUNTS] - world.batch.counts
        assert (moved[change >= 0] >= 0).all()
        assert (moved[change <= 0] <= 0).all()
        assert (moved[change == 0] == 0).all()


@pytest.mark.parametrize("likelihood", COUNT_LIKELIHOODS)
def test_counts_of_a_gene_are_in_the_order_of_its_means(likelihood) -> None:
    world = make_world(likelihood)
    counts = [
        predict(world.model, world.abduction, {sites.LIBRARY: world.batch.library * factor})
        for factor in (0.01, 0.5, 0.99, 1.0, 1.01, 2.0, 100.0)
    ]
    for lower, higher in itertools.pairwise(world[sites.COUNTS] for world in counts):
        assert (lower <= higher).all()
        assert (lower < higher).any() or torch.equal(lower, counts[3][sites.COUNTS])


@pytest.mark.parametrize("likelihood", COUNT_LIKELIHOODS)
def test_counts_at_the_edge_of_their_interval_move_with_a_tiny_change_of_the_mean(
    likelihood,
) -> None:
    """Which a shortcut for means that are 'the same' up to rounding would miss."""
    world = make_world(likelihood, dtype=torch.float64, bare=True)
    library, rate = 500.0, world.abduction.values[sites.RATE]
    batch = world.abduction.batch.replace(
        library=torch.full((N_CELLS,), library, dtype=torch.float64)
    )
    held = hold_noise(world.model, batch, world.abduction.latents, counts=True)
    elements = count_elements(world.model.likelihood(rate, batch.library), rate.shape)
    counts = batch.counts.ravel()
    some = ((counts > 0) & (elements.mean > 1)).reshape(rate.shape)
    for edge, factor, step in ((1.0, 1 + 1e-6, 1), (0.0, 1 - 1e-6, -1)):
        quantile = count_noise(elements, counts, torch.full_like(counts, edge))
        noise = CountSiteNoise(quantile, rate.shape, rate.dtype)
        there = held._replace(noise=held.noise | {sites.COUNTS: noise})
        assert torch.equal(predict(world.model, there, {})[sites.COUNTS], batch.counts)
        acts = {sites.LIBRARY: batch.library * factor}
        moved = predict(world.model, there, acts)[sites.COUNTS] - batch.counts
        assert some.sum() > 100
        assert (moved[some] == step).all()


@pytest.mark.parametrize("likelihood", COUNT_LIKELIHOODS)
def test_large_counts_follow_a_change_of_the_mean_by_millionths(likelihood) -> None:
    world = make_world(likelihood, dtype=torch.float64, bare=True)
    few = torch.arange(4)
    counts = world.batch.counts[few] * 4e5
    batch = world.batch.take(few).replace(counts=counts, library=counts.sum(-1))
    # The rate that explains the counts, so that they are not far in a tail.
    rate = (counts + 1) / batch.library.unsqueeze(-1)
    explained = poutine.do(world.model, data={sites.RATE: rate})
    held = abduct(explained, world.posterior.guide, batch)
    other = predict(explained, held, {sites.LIBRARY: batch.library * (1 + 5e-6)})[sites.COUNTS]
    expected = (counts * 5e-6)[counts > 0]
    assert expected.min() == pytest.approx(2)
    assert ((other - counts)[counts > 0] - expected).abs().max() < 1.5


def test_a_normal_value_moves_as_its_mean_does() -> None:
    world = make_world("normal", dtype=torch.float64)
    factual = world.abduction.values
    for act in ("control", "pair", "severity", "all"):
        other = world.under(ACTS[act])
        moved = other[sites.COUNTS] - factual[sites.COUNTS]
        torch.testing.assert_close(moved, other[sites.RATE] - factual[sites.RATE])


# ----------------------------------------------------------------------- flags


def flag_probability(world: World, perturbation: Tensor) -> Tensor:
    """Return the probability of each flag under a design, by hand."""
    risk = world.abduction.latents[sites.ARTIFACT_RISK]
    return torch.sigmoid(world.model.artifact_log_odds + perturbation @ risk.T).detach()


@pytest.mark.parametrize("act", ["control", "pair"])
def test_unnamed_flags_respond_to_the_perturbation_through_their_own_noise(world, act) -> None:
    own = world.abduction.values[sites.ARTIFACT] > 0
    acts = world.acts(ACTS[act])
    other = world.under(ACTS[act])[sites.ARTIFACT] > 0
    before = flag_probability(world, world.batch.perturbation)
    after = flag_probability(world, acts[sites.PERTURBATION])
    assert (other | ~own)[after >= before].all()  # what was present stays present
    assert (~other | own)[after <= before].all()
    noise = world.abduction.noise[sites.ARTIFACT]
    assert isinstance(noise, PresenceNoise)
    assert torch.equal(own, noise.uniform < before)
    assert torch.equal(other, noise.uniform < after)
    assert not torch.equal(own, other)


@pytest.mark.parametrize("flags", FLAGS)
def test_named_flags_do_not_respond_to_the_perturbation(flags) -> None:
    world = make_world(flags=flags)
    for held in ("factual", 0, "low_1"):
        both = world.under(do(perturbation="P0+P2", artifact=held))
        alone = world.under(do(artifact=held))
        assert torch.equal(both[sites.ARTIFACT], alone[sites.ARTIFACT])
    own = world.under(do(perturbation="P0+P2", artifact="factual"))[sites.ARTIFACT]
    assert torch.equal(own, world.abduction.values[sites.ARTIFACT])


def test_flags_without_a_model_of_them_are_kept() -> None:
    world = make_world(model=(("artifact_risk", False),))
    other = world.under(do(perturbation="P0+P2"))
    assert torch.equal(other[sites.ARTIFACT], world.batch.artifact)
    assert not torch.equal(other[sites.COUNTS], world.batch.counts)


def test_flags_change_as_often_as_their_posterior_says() -> None:
    """P(none stays none) and P(a flag stays), by hand, over many abductions of the same cells."""
    world, n_draws = make_world(risk=1.5), 400
    rows = torch.arange(N_CELLS).repeat(n_draws)
    many = world.abduction.take(rows)
    held = hold_noise(world.model, many.batch, many.latents, counts=False)
    design = world.acts(ACTS["pair"])[sites.PERTURBATION]
    other = predict(world.model, held, {sites.PERTURBATION: design[rows]})[sites.ARTIFACT]
    found = other.reshape(n_draws, N_CELLS, -1).double().mean(0)
    before = flag_probability(world, world.batch.perturbation).double()
    after = flag_probability(world, design).double()
    stays = (after / before).clamp(max=1)
    appears = ((after - before) / (1 - before)).clamp(min=0)
    expected = torch.where(world.batch.artifact > 0, stays, appears)
    error = (expected * (1 - expected) / n_draws).sqrt()
    assert ((found - expected).abs() <= 4.5 * error + 1e-9).all()
    assert ((expected > 0.05) & (expected < 0.95)).sum() > 10


def test_severities_keep_their_value_while_present(world) -> None:
    own = world.abduction.values[sites.ARTIFACT]
    kept = appeared = gone = 0
    for act in ("control", "pair"):
        other = world.under(ACTS[act])[sites.ARTIFACT]
        stays, new = (own > 0) & (other > 0), (own == 0) & (other > 0)
        assert torch.equal(other[stays], own[stays])
        assert torch.equal(other[new], world.fresh[new])
        kept, appeared = kept + int(stays.sum()), appeared + int(new.sum())
        gone += int(((own > 0) & (other == 0)).sum())
    assert min(kept, appeared, gone) > 0


def test_missing_flags_are_drawn_once_and_then_are_the_cells_own() -> None:
    world = make_world(flags="missing flags")
    missing = ~world.batch.artifact_observed
    drawn = world.abduction.values[sites.ARTIFACT]
    assert set(drawn[missing].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(drawn[missing], world.batch.artifact[missing])
    for act in (do(), do(artifact="factual"), do(library=50), do(perturbation="factual")):
        assert torch.equal(world.under(act)[sites.ARTIFACT], drawn)
    assert not world.under(do(artifact=0))[sites.ARTIFACT].any()


# ----------------------------------------------------------------------- library


@pytest.mark.parametrize("act", ["control", "pair", "no artifact", "severity"])
def test_an_unnamed_library_follows_the_depth_shift_of_its_flags(world, act) -> None:
    other = world.under(ACTS[act])
    change = other[sites.ARTIFACT] - world.abduction.values[sites.ARTIFACT]
    shift = change @ world.abduction.latents[sites.DEPTH_SHIFT]
    torch.testing.assert_close(
        other[sites.LIBRARY], world.batch.library * shift.exp(), rtol=3e-6, atol=0
    )
    same = (change == 0).all(-1)
    assert torch.equal(other[sites.LIBRARY][same], world.batch.library[same])
    assert not torch.equal(other[sites.LIBRARY], world.batch.library)


@pytest.mark.parametrize("act", ["pair", "no artifact", "one flag", "typical"])
def test_a_named_library_overrides_the_depth_shift(one, act) -> None:
    held = one.under(MORE_ACTS[act] | do(library="factual"))
    assert torch.equal(held[sites.LIBRARY], one.batch.library)
    fixed = one.under(MORE_ACTS[act] | do(library=321))
    assert (fixed[sites.LIBRARY] == 321).all()
    free = one.under(MORE_ACTS[act])
    assert not torch.equal(free[sites.LIBRARY], one.batch.library)
    for other in (held, fixed):
        assert torch.equal(other[sites.RATE], free[sites.RATE])


def test_without_a_depth_shift_the_library_is_the_cells_own() -> None:
    world = make_world(model=(("depth_shift", False),))
    other = world.under(do(artifact="low_0", perturbation="P1"))
    assert torch.equal(other[sites.LIBRARY], world.batch.library)
    assert (world.under(do(library=10))[sites.LIBRARY] == 10).all()


# ----------------------------------------------------------------------- artifact and its kind


def test_without_an_artifact_its_shift_is_exactly_zero(world) -> None:
    assert not world.under(ACTS["no artifact"])[sites.ARTIFACT_SHIFT].any()
    assert world.under(ACTS["severity"])[sites.ARTIFACT_SHIFT].abs().min() > 0


def test_passing_cells_do_not_change_when_their_artifact_is_removed(world) -> None:
    passing = (world.abduction.values[sites.ARTIFACT] == 0).all(-1)
    clean = world.under(do(artifact=0))
    assert passing.any()
    for name in (sites.COUNTS, sites.RATE, sites.LIBRARY):
        assert torch.equal(clean[name][passing], world.abduction.values[name][passing])
    assert (clean[sites.RATE] != world.abduction.values[sites.RATE])[~passing].any(-1).all()


def test_controls_do_not_change_when_they_are_made_control(world) -> None:
    controls = (world.batch.perturbation == 0).all(-1)
    other = world.under(do(perturbation="control"))
    assert controls.any()
    for name in (sites.COUNTS, sites.RATE, sites.LIBRARY, sites.ARTIFACT):
        assert torch.equal(other[name][controls], world.abduction.values[name][controls])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_cells_do_not_meet(likelihood) -> None:
    """A cell's counterfactual is the same whatever other cells are asked about beside it."""
    world = make_world(likelihood, flags="severities", dtype=torch.float64)
    rows = torch.tensor([7, 2, 2, 19])
    few = world.abduction.take(rows)
    for act in ("pair", "severity", "all"):
        acts = {name: value[rows] for name, value in world.acts(ACTS[act]).items()}
        found, expected = predict(world.model, few, acts), world.under(ACTS[act])
        for name in (sites.COUNTS, sites.RATE, sites.LIBRARY, sites.ARTIFACT):
            torch.testing.assert_close(found[name], expected[name][rows], rtol=1e-9, atol=1e-9)
