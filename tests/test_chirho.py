"""ChiRho, an independent client: its interventions and worlds give the same values as ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from factories import COVARIATES, make_batch, make_pair, make_schema
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform

from cradle_pyro import sites
from cradle_pyro.inference.posterior import draw_latents
from cradle_pyro.model.intervene import run_world
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch

pytest.importorskip("chirho", reason="ChiRho is not installed: pip install 'cradle-pyro[test]'")

from chirho.counterfactual.handlers import MultiWorldCounterfactual, TwinWorldCounterfactual
from chirho.indexed.ops import IndexSet, gather
from chirho.interventional.handlers import do
from chirho.observational.handlers import condition

Values = dict[str, Tensor]

MODELS: dict[str, dict[str, Any]] = {
    "nb": {},
    "poisson": {"likelihood": "poisson"},
    "zinb": {"likelihood": "zinb"},
    "normal": {"likelihood": "normal"},
    "no gene effect": {"gene_effect": None},
    "no response": {"gene_effect": {"response": False}},
    "no latent effect": {"latent_effect": False},
    "no dilution": {"dilution": False},
    "no z_artifact": {"n_artifact_latents": 0},
    "no risk": {"artifact_risk": False},
    "no depth shift": {"depth_shift": False},
    "sum": {"combine": "sum"},
    "no linear path": {"linear_path": False},
    "missing flags": {},
    "nb without covariates": {},
    "normal without covariates": {"likelihood": "normal"},
}


class World(NamedTuple):
    """A model, its cells, and a value of each site that is random or observed."""

    model: Callable[[Batch], Tensor]
    batch: Batch
    latents: Values


@cache
def make_world(name: str) -> World:
    """Return random parameters and cells in double precision, with latents drawn from the guide."""
    bare = name.endswith("without covariates")
    schema = make_schema(covariates=() if bare else COVARIATES, has_rest=not bare)
    model, guide = make_pair(schema, dtype=torch.float64, model=MODELS[name])
    missing = name == "missing flags"
    batch = make_batch(schema, missing=missing, dtype=torch.float64)
    # Pyro splits a site with missing values; the guide draws those, and `do` acts on the whole.
    flags = f"{sites.ARTIFACT}_observed" if missing else sites.ARTIFACT
    observed = {
        flags: batch.artifact,
        sites.LIBRARY: batch.library,
        sites.COUNTS: batch.counts,
    }
    return World(model, batch, draw_latents(guide, batch) | observed)


def _moved(world: World, *names: str) -> Values:
    """Return the factual values of the named sites plus one third."""
    factual = run_world(*world, {})
    return {name: factual[name] + 1 / 3 for name in names}


# Values of intervened sites, of full shape, as functions of the world.
ACTS: dict[str, Callable[[World], Values]] = {
    "control": lambda w: {sites.PERTURBATION: torch.zeros_like(w.batch.perturbation)},
    "another perturbation": lambda w: {sites.PERTURBATION: w.batch.perturbation.roll(1, 0)},
    "dosage": lambda w: {sites.PERTURBATION: 0.3 + 0.5 * w.batch.perturbation},
    "no artifact": lambda w: {sites.ARTIFACT: torch.zeros_like(w.batch.artifact)},
    "all flags": lambda w: {sites.ARTIFACT: torch.ones_like(w.batch.artifact)},
    "severity": lambda w: {sites.ARTIFACT: torch.full_like(w.batch.artifact, 0.25)},
    "library": lambda w: {sites.LIBRARY: torch.full_like(w.batch.library, 500.0)},
    "z_basal": lambda w: _moved(w, sites.Z_BASAL),
    "perturbation_shift": lambda w: _moved(w, sites.PERTURBATION_SHIFT),
    "artifact_shift": lambda w: _moved(w, sites.ARTIFACT_SHIFT),
    "artifact_effect": lambda w: _moved(w, sites.ARTIFACT_EFFECT),
}
ACTS |= {
    "perturbation and artifact": lambda w: ACTS["control"](w) | ACTS["all flags"](w),
    "all at once": lambda w: (
        ACTS["dosage"](w) | ACTS["no artifact"](w) | ACTS["library"](w) | ACTS["z_basal"](w)
    ),
}


def chirho_world(world: World, actions: Values) -> Values:
    """Return the sites' values under ChiRho's `do`; of all worlds at once if a handler splits them.

    The trace is inside the `do`, so that an intervened site shows the value its children see.
    """
    tracer = poutine.trace(poutine.condition(world.model, data=world.latents))
    with torch.no_grad():
        do(tracer, actions)(world.batch)
    return {
        name: node["value"]
        for name, node in tracer.trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def in_one_world(found: Values, factual: Values, **world: int) -> Values:
    """Return the values in the world with these indices, in the shapes of the factual ones."""
    chosen = IndexSet(**{name: {index} for name, index in world.items()})
    # Every site is in one plate, that of the cells or of a global: its other dimensions are events.
    one = {
        name: gather(value, chosen, event_dim=factual[name].dim() - 1)
        for name, value in found.items()
    }
    return {name: value.reshape(factual[name].shape) for name, value in one.items()}


def assert_same(found: Values, expected: Values) -> None:
    """Raise unless every site of `found` holds the expected value."""
    assert {sites.RATE, sites.ARTIFACT_SHIFT, sites.PERTURBATION_SHIFT, sites.LIBRARY} <= set(found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", MODELS)
def test_chirho_do_gives_the_same_world(name, act) -> None:
    world = make_world(name)
    actions = ACTS[act](world)
    assert_same(chirho_world(world, actions), run_world(*world, actions))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", MODELS)
def test_chirho_do_generates_the_same_counts_from_the_same_seed(name, act) -> None:
    world = make_world(name)
    actions = ACTS[act](world)
    held = {key: value for key, value in world.latents.items() if key != sites.COUNTS}
    # Of what descends from the library, the counts are all that there is.
    free = World(poutine.uncondition(world.model), world.batch, held)
    with seeded(0):
        found = chirho_world(free, actions)[sites.COUNTS]
    with seeded(0):
        ours = run_world(*free, actions)[sites.COUNTS]
    assert torch.equal(found, ours)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", MODELS)
def test_twin_worlds_are_the_factual_one_and_our_counterfactual(name, act) -> None:
    world = make_world(name)
    actions = ACTS[act](world)
    factual = run_world(*world, {})
    with TwinWorldCounterfactual(first_available_dim=-2) as handler:
        found = chirho_world(world, actions)
        (twin,) = handler.plates
        worlds = [in_one_world(found, factual, **{twin: index}) for index in (0, 1)]
    assert_same(worlds[0], factual)
    assert_same(worlds[1], run_world(*world, actions))


@pytest.mark.parametrize("name", MODELS)
def test_every_one_of_many_worlds_is_ours(name) -> None:
    world = make_world(name)
    several = {
        sites.PERTURBATION: [ACTS["control"], ACTS["dosage"]],
        sites.ARTIFACT: [ACTS["no artifact"], ACTS["all flags"], ACTS["severity"]],
    }
    acts = {site: [act(world)[site] for act in those] for site, those in several.items()}
    factual = run_world(*world, {})
    rates = []
    with MultiWorldCounterfactual(first_available_dim=-2):
        found = chirho_world(world, {site: tuple(those) for site, those in acts.items()})
        for p, a in itertools.product(range(3), range(4)):  # zero is the factual world
            chosen = {sites.PERTURBATION: p, sites.ARTIFACT: a}
            ours = {site: acts[site][index - 1] for site, index in chosen.items() if index}
            one = in_one_world(found, factual, **chosen)
            assert_same(one, run_world(*world, ours))
            rates.append(one[sites.RATE])
    assert all(not torch.allclose(x, y) for x, y in itertools.combinations(rates, 2))


class StandardNoise(Messenger):
    """Writes the library as a transformed standard Normal, whose noise ChiRho abducts."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == sites.LIBRARY and isinstance(msg["fn"], dist.LogNormal):
            loc, scale = msg["fn"].loc, msg["fn"].scale
            steps = [AffineTransform(loc, scale), ExpTransform()]
            noise = dist.Normal(torch.zeros_like(loc), 1.0)
            msg["fn"] = dist.TransformedDistribution(noise, steps)


@pytest.mark.parametrize("name", ["nb", "normal", "nb without covariates", "no risk"])
@pytest.mark.parametrize("act", ["no artifact", "all flags", "severity", "artifact_effect"])
def test_chirho_abducts_the_residual_of_the_library(name, act) -> None:
    model, batch, latents = world = make_world(name)
    actions = ACTS[act](world)
    free = {key: value for key, value in latents.items() if key != sites.LIBRARY}
    factual = run_world(*world, {})
    with TwinWorldCounterfactual(first_available_dim=-2) as handler:
        with condition(data={sites.LIBRARY: batch.library}):
            found = chirho_world(World(StandardNoise()(model), batch, free), actions)
        (twin,) = handler.plates
        named = {key: value for key, value in found.items() if key in factual}
        worlds = [in_one_world(named, factual, **{twin: index}) for index in (0, 1)]
    assert_same(worlds[0], factual)
    change = (actions.get(sites.ARTIFACT, batch.artifact) - batch.artifact) @ latents[
        sites.DEPTH_SHIFT
    ]
    library = {sites.LIBRARY: batch.library * change.exp()}
    assert_same(worlds[1], run_world(model, batch, free | library, actions))
