"""The noise of observed values: the same world gives them back, another what the cell had there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from scipy import special, stats
from torch import Tensor

from cradle_pyro.errors import QueryError
from cradle_pyro.model.intervene import run_world
from cradle_pyro.model.likelihoods import (
    GeneNegativeBinomial,
    GeneNormal,
    GenePoisson,
    GeneZeroInflatedNegativeBinomial,
)
from cradle_pyro.model.noise import (
    AbstractNoise,
    CountSiteNoise,
    DropoutSiteNoise,
    PresenceNoise,
    ResidualNoise,
    WithNoise,
    abduct_noise,
    count_elements,
)
from cradle_pyro.model.quantiles import Counts, NegativeBinomialCounts
from cradle_pyro.model.relaxed import PresenceBernoulli

N_GENES = 5
THETAS = (0.3, 1.0, 4.0, 50.0, 2000.0)
DROPOUT = (-4.0, -1.0, 0.0, 0.5, 2.0)
SCALES = (0.02, 0.3, 1.0, 2.0, 7.0)


# ---------------------------------------------------------------------------------- the helpers


@dataclass(frozen=True)
class World:
    """Parameters of cells x genes; those of genes are as they would be in the package."""

    mean: Tensor
    theta: Tensor
    logits: Tensor
    scale: Tensor

    def numpy(self) -> tuple[np.ndarray, ...]:
        """Return all four in cells x genes, double."""
        shape = self.mean.shape
        parts = (self.mean, self.theta, self.logits, self.scale)
        return tuple(part.double().expand(shape).numpy() for part in parts)


def make_world(
    n_cells: int = 6,
    *,
    seed: int = 0,
    log_mean: tuple[float, float] = (-2, 2),
    dtype: torch.dtype = torch.float64,
) -> World:
    """Return random means, uniform in the logarithm; a gene's parameters are always the same."""
    # Not the seed of the tests, whose draws would be these.
    generator = torch.Generator().manual_seed(1000 + seed)
    low, high = log_mean
    share = torch.rand(n_cells, N_GENES, generator=generator, dtype=torch.float64)
    genes = (torch.tensor(values, dtype=dtype) for values in (THETAS, DROPOUT, SCALES))
    return World((10 ** (low + (high - low) * share)).to(dtype), *genes)


def with_mean(world: World, mean: Tensor) -> World:
    return dataclasses.replace(world, mean=mean)


@dataclass(frozen=True)
class Case:
    """A distribution in a world; for counts, scipy's before dropout and the odds of dropout."""

    make: Callable[[World], Any]
    scipy: Callable[[World], Any]
    dropout: bool = False

    def gate(self, world: World) -> np.ndarray:
        """Return the probability of dropout."""
        return special.expit(world.numpy()[2]) * self.dropout

    def cdf(self, world: World, value: Tensor | np.ndarray) -> np.ndarray:
        """Return P(X <= value) by scipy."""
        value, gate = np.asarray(value, dtype=float), self.gate(world)
        return (gate + (1 - gate) * self.scipy(world).cdf(value)) * (value >= 0)

    def ppf(self, world: World, u: np.ndarray) -> np.ndarray:
        """Return the smallest value with P(X <= value) >= u by scipy."""
        inside = (u - self.gate(world)) / (1 - self.gate(world))
        return np.where(inside > 0, self.scipy(world).ppf(inside.clip(1e-300, 1)), 0.0)


def scipy_poisson(world: World) -> Any:
    return stats.poisson(world.numpy()[0])


def scipy_negative_binomial(world: World) -> Any:
    mean, theta, *_ = world.numpy()
    return stats.nbinom(theta, theta / (theta + mean))


def odds(world: World) -> Tensor:
    """Return torch's logits of a negative binomial: the log of mean over total count."""
    return (world.mean / world.theta).log()


COUNTS = {
    "gene_poisson": Case(lambda w: GenePoisson(w.mean), scipy_poisson),
    "gene_nb": Case(lambda w: GeneNegativeBinomial(w.mean, w.theta), scipy_negative_binomial),
    "gene_zinb": Case(
        lambda w: GeneZeroInflatedNegativeBinomial(w.mean, w.theta, w.logits),
        scipy_negative_binomial,
        dropout=True,
    ),
    "poisson": Case(lambda w: dist.Poisson(w.mean).to_event(1), scipy_poisson),
    "nb": Case(
        lambda w: dist.NegativeBinomial(w.theta, logits=odds(w)).to_event(1),
        scipy_negative_binomial,
    ),
    "nb_probs": Case(
        lambda w: dist.NegativeBinomial(w.theta, probs=w.mean / (w.mean + w.theta)).to_event(1),
        scipy_negative_binomial,
    ),
    "gamma_poisson": Case(
        lambda w: dist.GammaPoisson(w.theta, w.theta / w.mean).to_event(1),
        scipy_negative_binomial,
    ),
    "zip": Case(
        lambda w: dist.ZeroInflatedPoisson(w.mean, gate=torch.sigmoid(w.logits)).to_event(1),
        scipy_poisson,
        dropout=True,
    ),
    "zinb": Case(
        lambda w: dist.ZeroInflatedNegativeBinomial(
            w.theta, logits=odds(w), gate_logits=w.logits
        ).to_event(1),
        scipy_negative_binomial,
        dropout=True,
    ),
}


def scipy_normal(world: World) -> Any:
    mean, _, _, scale = world.numpy()
    return stats.norm(mean, scale)


def scipy_log_normal(world: World) -> Any:
    mean, _, _, scale = world.numpy()
    return stats.lognorm(scale, scale=np.exp(mean))


REALS = {
    "gene_normal": Case(lambda w: GeneNormal(w.mean, w.scale), scipy_normal),
    "normal": Case(lambda w: dist.Normal(w.mean, w.scale).to_event(1), scipy_normal),
    "log_normal": Case(lambda w: dist.LogNormal(w.mean, w.scale).to_event(1), scipy_log_normal),
}
FLAGS: dict[str, Callable[[Tensor], Any]] = {
    "bernoulli": lambda logits: dist.Bernoulli(logits=logits).to_event(1),
    "probs": lambda logits: dist.Bernoulli(probs=torch.sigmoid(logits)).to_event(1),
    "presence": lambda logits: PresenceBernoulli(logits=logits).to_event(1),
}
# Values far from the mean, in standard deviations, and logarithms of values, must stay in range.
REAL_MEANS = (-2.0, 0.5)


@pytest.fixture(params=COUNTS)
def counts(request: pytest.FixtureRequest) -> Case:
    return COUNTS[request.param]


@pytest.fixture(params=REALS)
def reals(request: pytest.FixtureRequest) -> Case:
    return REALS[request.param]


@pytest.fixture(params=FLAGS)
def flags(request: pytest.FixtureRequest) -> Callable[[Tensor], Any]:
    return FLAGS[request.param]


def uniform_of(noise: AbstractNoise, gate: np.ndarray | float = 0.0) -> np.ndarray:
    """Return the noise of counts as uniform numbers, dropped ones lowest."""
    assert isinstance(noise, CountSiteNoise | DropoutSiteNoise)
    tail, is_upper = noise.quantile
    u = torch.where(is_upper, -torch.expm1(tail), tail.exp())
    u = u.reshape(noise.shape).numpy()
    if isinstance(noise, CountSiteNoise):
        return u
    dropout = noise.dropout.reshape(noise.shape).numpy()
    return np.where(dropout < gate, dropout, gate + (1 - gate) * u)


def is_uniform(values: np.ndarray) -> bool:
    return stats.kstest(np.ravel(values), "uniform").pvalue > 1e-3


def place(case: Case, world: World, value: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Return numbers that are uniform if `value` is distributed as in `world`, by scipy."""
    low, high = case.cdf(world, value - 1), case.cdf(world, value)
    return low + (high - low) * rng.random(value.shape)


# -------------------------------------------------------------------------------- the same world


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_come_back_in_their_own_world(counts, dtype) -> None:
    world = make_world(60, dtype=dtype)
    fn = counts.make(world)
    value = fn.sample()
    value[::5] = torch.ceil(30 * world.mean[::5]) + 3  # outliers
    noise = abduct_noise("x", fn, value)
    assert isinstance(noise, CountSiteNoise | DropoutSiteNoise)
    found = noise.value_under(counts.make(world))
    assert found.dtype == value.dtype == dtype
    assert torch.equal(found, value)


@pytest.mark.parametrize("name", ["gene_zinb", "zip", "zinb"])
def test_counts_below_all_expectation_come_back_from_zero_inflated_worlds(name) -> None:
    """They were not dropped, although that was by far the likelier way to so few."""
    world = make_world(8, log_mean=(2.5, 3.5))
    world = dataclasses.replace(world, theta=torch.full_like(world.theta, 1000.0))
    value = torch.round(world.mean * torch.linspace(0.01, 0.6, 8).double().unsqueeze(1)) + 1
    fn = COUNTS[name].make(world)
    assert torch.equal(abduct_noise("x", fn, value).value_under(fn), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reals_come_back_in_their_own_world_bit_for_bit(reals, dtype) -> None:
    world = make_world(60, log_mean=REAL_MEANS, dtype=dtype)
    value = reals.make(world).sample()
    noise = abduct_noise("x", reals.make(world), value)
    assert isinstance(noise, ResidualNoise)
    found = noise.value_under(reals.make(world))
    assert found.dtype == dtype
    assert torch.equal(found, value)


@pytest.mark.parametrize("fresh", [None, 0.25])
def test_flags_come_back_in_their_own_world_bit_for_bit(flags, fresh) -> None:
    logits = 3 * torch.randn(400, N_GENES)
    fn = flags(logits)
    value = fn.sample()
    severity = value * (0.01 + 0.99 * torch.rand(400, N_GENES))
    for observed in (value, severity):
        own = None if fresh is None else torch.full_like(observed, fresh)
        noise = abduct_noise("artifact", fn, observed, fresh=own)
        assert isinstance(noise, PresenceNoise)
        found = noise.value_under(flags(logits))
        assert found.dtype == observed.dtype
        assert torch.equal(found, observed)


def test_flags_that_are_sure_come_back() -> None:
    """At probabilities that round to nothing and to one in single precision."""
    logits = torch.tensor([-60.0, -17.0, 17.0, 60.0]).repeat(1000, 1)
    fn = dist.Bernoulli(logits=logits).to_event(1)
    for observed in (torch.zeros_like(logits), torch.ones_like(logits)):
        noise = abduct_noise("artifact", fn, observed)
        assert torch.equal(noise.value_under(fn), observed)


# ------------------------------------------------------------------------------ another world


def test_noise_of_counts_lies_between_scipys_probabilities(counts) -> None:
    world = make_world(60)
    value = counts.make(world).sample()
    gate = counts.gate(world)
    u = uniform_of(abduct_noise("x", counts.make(world), value), gate)
    assert (u >= counts.cdf(world, value - 1) - 1e-10).all()
    assert (u <= counts.cdf(world, value) + 1e-10).all()
    # The place within is drawn anew every time.
    again = uniform_of(abduct_noise("x", counts.make(world), value), gate)
    assert (u != again).mean() > 0.9


@pytest.mark.parametrize("name", ["gene_zinb", "zip", "zinb"])
def test_noise_of_zero_inflated_counts_is_two_independent_uniform_numbers(name) -> None:
    """A zero was dropped as often as its posterior says: no more, no less."""
    fn = COUNTS[name].make(make_world(4000))
    noise = abduct_noise("x", fn, fn.sample())
    assert isinstance(noise, DropoutSiteNoise)
    tail, is_upper = noise.quantile
    u = torch.where(is_upper, -torch.expm1(tail), tail.exp())
    for first, second in ((u, noise.dropout), (noise.dropout, u)):
        assert is_uniform(first.numpy())
        for half in (second < 0.5, second >= 0.5):
            assert is_uniform(first[half].numpy())


def test_counts_in_another_world_are_scipys_quantiles(counts) -> None:
    here, there = make_world(60), make_world(60, seed=1)
    there = dataclasses.replace(there, logits=there.logits + 0.5, theta=2 * there.theta)
    noise = abduct_noise("x", counts.make(here), counts.make(here).sample())
    found = noise.value_under(counts.make(there))
    assert found.shape == there.mean.shape
    expected = counts.ppf(there, uniform_of(noise, counts.gate(there)))
    assert (expected > 0).mean() > 0.2
    np.testing.assert_array_equal(found.numpy(), expected)


def test_reals_in_another_world_keep_their_residual(reals) -> None:
    here = make_world(60, log_mean=REAL_MEANS)
    there = make_world(60, seed=1, log_mean=REAL_MEANS)
    there = dataclasses.replace(there, scale=0.3 + there.scale)
    value = reals.make(here).sample()
    found = abduct_noise("x", reals.make(here), value).value_under(reals.make(there))
    is_log = reals is REALS["log_normal"]
    residual = ((value.log() if is_log else value) - here.mean) / here.scale
    expected = there.mean + there.scale * residual
    torch.testing.assert_close(found, expected.exp() if is_log else expected, rtol=1e-9, atol=1e-9)
    # Which is the same quantile.
    u = reals.scipy(here).cdf(value.numpy())
    np.testing.assert_allclose(reals.scipy(there).cdf(found.numpy()), u, 0, 1e-9)


def test_counts_of_one_world_are_distributed_in_another_as_there(counts, rng) -> None:
    here, there = make_world(4000), make_world(4000, seed=1)
    there = dataclasses.replace(there, logits=there.logits - 0.5)
    value = counts.make(here).sample()
    found = abduct_noise("x", counts.make(here), value).value_under(counts.make(there))
    assert is_uniform(place(counts, here, value, rng))
    assert is_uniform(place(counts, there, found, rng))
    assert not is_uniform(place(counts, here, found, rng))  # the test can tell


def test_reals_of_one_world_are_distributed_in_another_as_there(reals) -> None:
    here = make_world(4000, log_mean=REAL_MEANS)
    there = dataclasses.replace(
        make_world(4000, seed=1, log_mean=REAL_MEANS), scale=1.5 * here.scale
    )
    value = reals.make(here).sample()
    found = abduct_noise("x", reals.make(here), value).value_under(reals.make(there)).numpy()
    assert is_uniform(reals.scipy(there).cdf(found))
    assert not is_uniform(reals.scipy(here).cdf(found))


def test_counts_do_not_fall_where_the_mean_grows_and_stay_where_it_stays(counts) -> None:
    here = make_world(200)
    change = torch.rand(here.mean.shape, dtype=torch.float64)
    factor = torch.where(change < 0.3, 1.0, torch.where(change < 0.6, 0.2, 5.0)).double()
    value = counts.make(here).sample()
    noise = abduct_noise("x", counts.make(here), value)
    found = noise.value_under(counts.make(with_mean(here, factor * here.mean)))
    assert torch.equal(found[factor == 1], value[factor == 1])
    assert (found[factor < 1] <= value[factor < 1]).all()
    assert (found[factor > 1] >= value[factor > 1]).all()
    assert (found[factor < 1] < value[factor < 1]).any()
    assert (found[factor > 1] > value[factor > 1]).any()


# ------------------------------------------------------------------------------ presence of flags


def test_flags_appear_and_vanish_as_the_coupling_says(flags) -> None:
    """P(1 there | 1 here) = min(1, q / p) and P(1 there | 0 here) = max(0, (q - p) / (1 - p))."""
    n = 20_000
    p = torch.tensor([0.2, 0.2, 0.7, 0.5, 0.9]).expand(n, N_GENES)
    q = torch.tensor([0.6, 0.05, 0.2, 0.5, 0.99])
    value = flags(p.logit()).sample()
    noise = abduct_noise("artifact", flags(p.logit()), value)
    found = noise.value_under(flags(q.logit().expand(n, N_GENES)))
    assert set(found.unique().tolist()) == {0.0, 1.0}
    for flag in range(N_GENES):
        here, there = p[0, flag].item(), q[flag].item()
        stay = found[value[:, flag] > 0, flag]
        appear = found[value[:, flag] == 0, flag]
        cases = (
            (stay, min(1, there / here)),
            (appear, max(0, (there - here) / (1 - here))),
            (found[:, flag], there),
        )
        for drawn, share in cases:
            error = (share * (1 - share) / len(drawn)) ** 0.5
            assert abs(drawn.mean().item() - share) <= 4.5 * error + 1e-6


def test_flags_that_stay_keep_their_severity_and_those_that_appear_are_fresh() -> None:
    n = 500
    logits, fresh = torch.zeros(n, N_GENES), 0.1 + 0.8 * torch.rand(n, N_GENES)
    severity = PresenceBernoulli(logits=logits).sample() * (0.2 + 0.7 * torch.rand(n, N_GENES))
    noise = abduct_noise("artifact", PresenceBernoulli(logits=logits), severity, fresh=fresh)
    everywhere = noise.value_under(PresenceBernoulli(logits=logits + 40))
    assert torch.equal(everywhere, torch.where(severity > 0, severity, fresh))
    assert not noise.value_under(PresenceBernoulli(logits=logits - 40)).any()
    more = noise.value_under(PresenceBernoulli(logits=logits + 1))
    assert torch.equal(more[severity > 0], severity[severity > 0])
    appeared = (severity == 0) & (more > 0)
    assert 0 < appeared.sum() < (severity == 0).sum()
    assert torch.equal(more[appeared], fresh[appeared])
    fewer = noise.value_under(PresenceBernoulli(logits=logits - 1))
    assert torch.equal(fewer[fewer > 0], severity[fewer > 0])
    assert 0 < (fewer > 0).sum() < (severity > 0).sum()


def test_flags_that_appear_are_ones_unless_told() -> None:
    value = torch.zeros(50, N_GENES)
    noise = abduct_noise("artifact", dist.Bernoulli(logits=value), value)
    assert (noise.value_under(dist.Bernoulli(logits=value + 40)) == 1).all()


# ------------------------------------------------------------------------- wrappers and unknowns


@pytest.mark.parametrize("wrap", ["to_event", "mask", "expand", "masked_event", "expanded"])
@pytest.mark.parametrize("name", ["poisson", "zinb", "normal", "log_normal", "bernoulli"])
def test_wrappers_change_nothing(name, wrap) -> None:
    mean = torch.tensor([0.3, 2.0, 1.4], dtype=torch.float64)

    def wrapped(mean: Tensor) -> Any:
        fn = {
            "poisson": lambda: dist.Poisson(mean),
            "zinb": lambda: dist.ZeroInflatedNegativeBinomial(
                2 * torch.ones_like(mean), logits=mean, gate=0.2 * torch.ones_like(mean)
            ),
            "normal": lambda: dist.Normal(mean, 1.0),
            "log_normal": lambda: dist.LogNormal(mean, 1.0),
            "bernoulli": lambda: dist.Bernoulli(logits=mean),
        }[name]()
        if wrap == "to_event":
            return fn.to_event(1)
        if wrap == "mask":
            return fn.mask(torch.tensor([True, False, True]))
        if wrap == "expand":
            return fn.expand([2, 3])
        if wrap == "masked_event":
            return fn.mask(torch.tensor(True)).to_event(1)
        return dist.ExpandedDistribution(fn, torch.Size([2, 3])).to_event(1)

    value = wrapped(mean).sample()
    noise = abduct_noise("x", wrapped(mean), value)
    assert torch.equal(noise.value_under(wrapped(mean)), value)
    assert noise.value_under(wrapped(mean + 5)).shape == value.shape
    assert not torch.equal(noise.value_under(wrapped(mean + 5)), value)


def test_values_may_be_drawn_many_at_a_time() -> None:
    """A particle dimension on the left of that of the parameters."""
    world = make_world(4)
    fn = GeneNegativeBinomial(world.mean, world.theta)
    value = fn.sample(torch.Size([3]))
    noise = abduct_noise("x", fn, value)
    assert torch.equal(noise.value_under(fn), value)
    more = noise.value_under(GeneNegativeBinomial(4 * world.mean, world.theta))
    assert more.shape == (3, 4, N_GENES)
    assert (more >= value).all()


@pytest.mark.parametrize(
    "fn",
    [
        dist.Gamma(torch.ones(3), 1.0),
        dist.Gamma(torch.ones(3), 1.0).to_event(1),
        dist.Gamma(torch.ones(3), 1.0).mask(torch.tensor(True)),
    ],
    ids=["plain", "event", "mask"],
)
def test_unknown_distribution_is_an_error_that_names_site_and_type(fn) -> None:
    with pytest.raises(QueryError, match=r"'dose'.*Gamma.*count_elements"):
        abduct_noise("dose", fn, torch.ones(3))


@pytest.mark.parametrize("name", ["binomial", "delta", "mixture"])
def test_what_only_resembles_a_known_distribution_is_unknown(name) -> None:
    ones = torch.ones(3)
    fn = {
        "binomial": dist.Binomial(5, probs=0.5 * ones),
        "delta": dist.Delta(ones),
        "mixture": dist.MaskedMixture(
            torch.tensor([True, False, True]), dist.Poisson(ones), dist.Poisson(2 * ones)
        ),
    }[name]
    with pytest.raises(QueryError, match="'dose'"):
        abduct_noise("dose", fn, ones)


def test_a_registered_distribution_takes_part() -> None:
    class Attempts(dist.Geometric):
        """Failures before the first success; of this test, so that others do not know it."""

    probability = torch.tensor([0.9, 0.5, 0.2, 0.05], dtype=torch.float64).expand(200, 4)
    here, there = Attempts(probability), Attempts(probability.flip(1))
    value = here.sample()
    with pytest.raises(QueryError, match=r"'tries'.*Attempts"):
        abduct_noise("tries", here, value)

    @count_elements.register(Attempts)
    def _(fn: Any, shape: torch.Size) -> Counts:
        mean = ((1 - fn.probs) / fn.probs).expand(shape).reshape(-1)
        return NegativeBinomialCounts(mean, torch.ones_like(mean))

    noise = abduct_noise("tries", here.to_event(1), value)
    assert torch.equal(noise.value_under(here), value)
    expected = stats.geom(probability.flip(1).numpy()).ppf(uniform_of(noise)) - 1
    np.testing.assert_array_equal(noise.value_under(there).numpy(), expected)


def test_a_subclass_of_a_known_distribution_is_known() -> None:
    class Reads(GeneNegativeBinomial):
        pass

    world = make_world(20)
    fn = Reads(world.mean, world.theta)
    value = fn.sample()
    assert torch.equal(abduct_noise("x", fn, value).value_under(fn), value)


def test_noise_comes_from_the_callers_random_state() -> None:
    world = make_world(20)
    fn = GenePoisson(world.mean)
    value = fn.sample()
    tails = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        noise = abduct_noise("x", fn, value)
        assert isinstance(noise, CountSiteNoise)
        tails.append(noise.quantile.log_tail)
    assert torch.equal(tails[0], tails[1])
    assert not torch.equal(tails[0], tails[2])


# ------------------------------------------------------------------------------- in a Pyro model


def dosing(dose: Tensor) -> Tensor:
    """A model: cells have a state, which with the dose makes them fail, grow and count."""
    with pyro.plate("cells", len(dose)):
        given = pyro.sample("dose", dist.Normal(dose, 1.0))
        state = pyro.sample("state", dist.Normal(torch.zeros_like(dose), 1.0))
        flag = pyro.sample("flag", dist.Bernoulli(logits=state + given - 1))
        size = pyro.sample("size", dist.LogNormal(0.3 * state - flag, 0.5))
        pyro.sample("other", dist.Normal(state, 1.0))
        return pyro.sample("counts", dist.Poisson(20 * size * torch.exp(0.5 * given)))


OBSERVED = ("flag", "size", "counts")


def make_factual(n_cells: int = 300) -> tuple[Tensor, dict[str, Tensor], dict[str, AbstractNoise]]:
    """Return doses, latents and the noise of what was observed; the latter by name."""
    dose = torch.linspace(-1, 1, n_cells).double()
    trace = poutine.trace(dosing).get_trace(dose)
    latents = {name: trace.nodes[name]["value"] for name in ("dose", "state")}
    noise = {
        name: abduct_noise(name, trace.nodes[name]["fn"], trace.nodes[name]["value"])
        for name in OBSERVED
    }
    observed = {name: trace.nodes[name]["value"] for name in (*OBSERVED, "other")}
    return dose, latents | observed, noise


def test_sites_with_noise_have_their_factual_values_in_the_factual_world() -> None:
    dose, factual, noise = make_factual()
    latents = {name: factual[name] for name in ("dose", "state")}
    world = WithNoise(noise)(poutine.condition(dosing, data=latents))
    trace = poutine.trace(world).get_trace(dose)
    for name in (*OBSERVED, *latents):
        assert torch.equal(trace.nodes[name]["value"], factual[name]), name
        assert trace.nodes[name]["is_observed"], name
    assert torch.equal(trace.nodes["_RETURN"]["value"], factual["counts"])
    # Noise of others is their own: they are drawn anew.
    assert not trace.nodes["other"]["is_observed"]
    assert not torch.equal(trace.nodes["other"]["value"], factual["other"])


def test_sites_with_noise_follow_an_intervention_through_the_model() -> None:
    dose, factual, noise = make_factual()
    latents = {name: factual[name] for name in ("dose", "state")}
    acts = {"dose": factual["dose"] + 1.5}
    world = WithNoise(noise)(poutine.condition(dosing, data=latents))
    trace = poutine.trace(poutine.do(world, data=acts)).get_trace(dose)
    found = {name: trace.nodes[name]["value"] for name in OBSERVED}
    # The flag: the same uniform number, a larger probability.
    assert isinstance(noise["flag"], PresenceNoise)
    probability = torch.sigmoid(factual["state"] + acts["dose"] - 1)
    assert torch.equal(found["flag"], (noise["flag"].uniform < probability).double())
    assert (found["flag"] >= factual["flag"]).all()
    assert (found["flag"] > factual["flag"]).any()
    # The size: moved by the flag alone, in the logarithm.
    change = factual["flag"] - found["flag"]
    torch.testing.assert_close(found["size"], factual["size"] * change.exp())
    assert torch.equal(found["size"][change == 0], factual["size"][change == 0])
    # The counts: scipy's quantile at the new size and dose.
    rate = 20 * found["size"] * torch.exp(0.5 * acts["dose"])
    expected = stats.poisson(rate.numpy()).ppf(uniform_of(noise["counts"]))
    np.testing.assert_array_equal(found["counts"].numpy(), expected)
    assert (found["counts"] != factual["counts"]).float().mean() > 0.5


def test_an_intervened_site_needs_no_noise_and_has_its_value() -> None:
    dose, factual, noise = make_factual()
    latents = {name: factual[name] for name in ("dose", "state", "other")}
    acts = {"flag": torch.ones_like(dose)}
    world: Any = run_world(dosing, dose, latents, acts, noise)  # type: ignore[arg-type]
    assert torch.equal(world["flag"], acts["flag"])
    assert torch.equal(world["other"], factual["other"])
    had = factual["flag"] == 1
    for name in ("size", "counts"):
        assert torch.equal(world[name][had], factual[name][had])
        assert (world[name][~had] <= factual[name][~had]).all()
        assert (world[name][~had] < factual[name][~had]).float().mean() > 0.8
    nothing = run_world(dosing, dose, latents, {}, noise)  # type: ignore[arg-type]
    assert all(torch.equal(nothing[name], factual[name]) for name in factual)


def test_observed_sites_of_a_model_take_their_noise_too() -> None:
    """What a model observes itself gives way to the value of the noise."""
    rate = torch.tensor([2.0, 30.0, 400.0], dtype=torch.float64)
    seen = torch.tensor([5.0, 31.0, 350.0], dtype=torch.float64)

    def model(rate: Tensor) -> Tensor:
        return pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=seen)

    noise = abduct_noise("counts", dist.Poisson(rate).to_event(1), seen)
    with WithNoise({"counts": noise}):
        assert torch.equal(model(rate), seen)
        moved = model(3 * rate)
    expected = stats.poisson(3 * rate.numpy()).ppf(uniform_of(noise))
    np.testing.assert_array_equal(moved.numpy(), expected)
