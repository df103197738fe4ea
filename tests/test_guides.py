"""One contract for the structured and the mean-field guide, and what tells them apart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from factories import (
    COVARIATES,
    GLOBAL_SITES,
    make_batch,
    make_config,
    make_pair,
    make_pool,
    make_schema,
    make_statistics,
    with_partners,
)
from pyro import poutine
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from cradle_pyro import sites
from cradle_pyro.config import NetworkConfig
from cradle_pyro.inference.objectives import CradleELBO
from cradle_pyro.inference.pair import build_pair
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.guides import CradleGuide, response_summary
from cradle_pyro.model.networks import CellEncoder, ResidualMLP
from cradle_pyro.types import Batch, Schema

FAMILIES = ("structured", "mean_field")
PLATES = {sites.CELLS, sites.PERTURBATIONS, sites.ARTIFACTS}
UNUSED_WITH_ALL_FLAGS_OBSERVED = {"artifact_logits.weight", "artifact_logits.bias"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def make(family: str, schema: Schema | None = None, **sections: Any) -> tuple[Cradle, CradleGuide]:
    guide = sections.pop("guide", {}) | {"family": family}
    return make_pair(schema, guide=guide, **sections)


def nodes_of(
    guide: Any, batch: Batch, given: dict[str, Tensor] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the guide's sample sites; the noise is the same in every call."""
    torch.manual_seed(3)
    trace = poutine.trace(poutine.condition(guide, data=given or {})).get_trace(batch)
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and name not in PLATES
    }


def latent_nodes(model: Cradle, batch: Batch) -> dict[str, dict[str, Any]]:
    trace = poutine.trace(model).get_trace(batch)
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and name not in PLATES
    }


# ------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("covariates", [(), COVARIATES])
@pytest.mark.parametrize("n_artifacts", [0, 1, 2])
def test_same_sites_as_the_model(family, missing, covariates, n_artifacts) -> None:
    schema = make_schema(covariates=covariates, n_artifacts=n_artifacts)
    model, guide = make(family, schema)
    batch = make_batch(schema, missing=missing and n_artifacts > 0)
    expected, found = latent_nodes(model, batch), nodes_of(guide, batch)
    assert set(found) == set(expected)
    for name, node in found.items():
        assert node["value"].shape == expected[name]["value"].shape, name
        frames = [frame.name for frame in node["cond_indep_stack"]]
        assert frames == [frame.name for frame in expected[name]["cond_indep_stack"]], name
        assert node["scale"] == expected[name]["scale"], name
        assert node["fn"].has_rsample, name


MODEL_SETTINGS = [
    {},
    {"combine": "sum"},
    {"linear_path": False},
    {"latent_effect": False},
    {"gene_effect": "none"},
    {"artifact_risk": False, "depth_shift": False, "n_artifact_latents": 0},
    {"likelihood": "poisson"},
    {"likelihood": "zinb"},
    {"likelihood": "normal"},
    {"decoder": {"hidden": 8, "layers": 0}},
]


@pytest.mark.parametrize("settings", MODEL_SETTINGS, ids=str)
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("counterfactual", ["none", "sleep", "kl", "partner"])
def test_loss_and_every_gradient_are_finite(family, settings, particles, counterfactual) -> None:
    schema = make_schema(covariates=COVARIATES, has_rest=True)
    objective = {"particles": particles, "counterfactual": counterfactual}
    model, guide = make(family, schema, model=settings, objective=objective)
    batch = with_partners(make_batch(schema, severity=True))
    elbo = CradleELBO(make_config(objective=objective).objective, make_pool(batch))
    loss = torch.stack(list(elbo.terms(model, guide, batch).values())).sum()
    assert torch.isfinite(loss)
    loss.backward()
    without = set()
    for module in (model, guide):
        for name, parameter in module.named_parameters():
            if parameter.grad is None:
                without.add(name)
            else:
                assert torch.isfinite(parameter.grad).all(), name
    if settings.get("n_artifact_latents") == 0:
        without -= {"artifact_loading"}
    if settings.get("artifact_risk", True):
        without -= UNUSED_WITH_ALL_FLAGS_OBSERVED
    assert not without


def test_every_gradient_is_there_with_missing_flags(family) -> None:
    schema = make_schema()
    model, guide = make(family, schema)
    batch = make_batch(schema, missing=True)
    elbo = CradleELBO(make_config().objective, make_pool(batch))
    torch.stack(list(elbo.terms(model, guide, batch).values())).sum().backward()
    for module in (model, guide):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_kl_of_z_artifact_is_exactly_zero_without_an_artifact(family) -> None:
    schema = make_schema()
    model, guide = make(family, schema)
    batch = make_batch(schema)
    q = nodes_of(guide, batch)[sites.Z_ARTIFACT]["fn"]
    p = latent_nodes(model, batch)[sites.Z_ARTIFACT]["fn"]
    divergence = kl_divergence(q, p)
    failing = (batch.artifact > 0).any(-1)
    assert torch.equal(divergence[~failing], torch.zeros_like(divergence[~failing]))
    assert (divergence[failing] > 0).all()


def test_z_artifact_does_not_reach_passing_cells(family) -> None:
    schema = make_schema()
    _, guide = make(family, schema)
    batch = make_batch(schema)
    nodes = nodes_of(guide, batch)
    given = {name: nodes[name]["value"] for name in nodes if name != sites.Z_BASAL}
    other = given | {sites.Z_ARTIFACT: given[sites.Z_ARTIFACT] + 3}
    before = nodes_of(guide, batch, given)[sites.Z_BASAL]["fn"].mean
    after = nodes_of(guide, batch, other)[sites.Z_BASAL]["fn"].mean
    failing = (batch.artifact > 0).any(-1)
    assert torch.equal(before[~failing], after[~failing])
    if family == "structured":
        assert (before[failing] != after[failing]).any(-1).all()


def test_constants_of_the_input_are_those_of_training(family) -> None:
    """A query cell is read the same way alone, among others, and after saving."""
    schema = make_schema()
    statistics = make_statistics(schema)
    _, guide = build_pair(schema, make_config(guide={"family": family}), statistics, seed=0)
    batch = make_batch(schema)
    expression = guide.expression(batch)
    expected = (torch.log1p(batch.counts) - statistics.log_mean) / statistics.log_sd
    torch.testing.assert_close(expression[:, :-1], expected.clamp(-10, 10))
    depth = (batch.library.log() - statistics.log_library_mean) / statistics.log_library_sd
    torch.testing.assert_close(expression[:, -1], depth)
    alone = guide.expression(batch.take(torch.tensor([3])))
    assert torch.equal(alone[0], expression[3])
    assert "expression.log_mean" in guide.state_dict()
    _, other = build_pair(
        schema, make_config(guide={"family": family}), make_statistics(schema, seed=9), seed=1
    )
    other.load_state_dict(guide.state_dict())
    assert torch.equal(other.expression(batch), expression)


def test_normal_values_are_not_logged_again(family) -> None:
    schema = make_schema()
    _, guide = make(family, schema, model={"likelihood": "normal"})
    batch = make_batch(schema)
    expected = (batch.counts - guide.expression.log_mean) / guide.expression.log_sd
    torch.testing.assert_close(guide.expression(batch)[:, :-1], expected.clamp(-10, 10))


def test_a_gene_that_never_varies_does_no_harm(family) -> None:
    schema = make_schema()
    statistics = make_statistics(schema)
    flat = statistics._replace(log_sd=torch.zeros(schema.n_genes))
    _, guide = build_pair(schema, make_config(guide={"family": family}), flat, seed=0)
    assert torch.isfinite(guide.expression(make_batch(schema))).all()


def test_guide_reloads_to_the_same_distributions(family) -> None:
    schema = make_schema(covariates=COVARIATES)
    model, guide = make(family, schema)
    other_model, other = make(family, schema, seed=7)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(guide.state_dict())
    batch = make_batch(schema, missing=True)
    before, after = nodes_of(guide, batch), nodes_of(other, batch)
    assert all(torch.equal(before[name]["value"], after[name]["value"]) for name in before)


def test_particles_have_their_own_draws(family) -> None:
    import pyro

    schema = make_schema()
    _, guide = make(family, schema)
    batch = make_batch(schema)

    def vectorised(cells: Batch) -> None:
        with pyro.plate("particles", 4, dim=-2):
            guide(cells)

    nodes = nodes_of(vectorised, batch)
    for name in (sites.EFFECT, sites.ARTIFACT_EFFECT, sites.Z_ARTIFACT, sites.Z_BASAL):
        value = nodes[name]["value"]
        assert value.shape[0] == 4
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(value, 2))


def test_a_fresh_guide_is_close_to_the_prior(family) -> None:
    schema = make_schema()
    guide_config = {"family": family, "initial_scale": 0.1}
    pair = build_pair(schema, make_config(guide=guide_config), make_statistics(schema), seed=0)
    nodes = nodes_of(pair[1], make_batch(schema))
    # Masks start undecided: closed ones would hide their effects from the gradient.
    torch.testing.assert_close(nodes[sites.EFFECT_MASK]["fn"].mean, torch.full((3, 5), 0.5))
    for name in (sites.ARTIFACT_EFFECT, sites.ARTIFACT_RISK, sites.DEPTH_SHIFT):
        q = nodes[name]["fn"]
        scale = torch.full_like(q.stddev, 0.1)
        torch.testing.assert_close(q.stddev, scale, rtol=0, atol=2e-3)
        assert not q.mean.any()
    z_basal: Normal = nodes[sites.Z_BASAL]["fn"].base_dist
    assert z_basal.loc.abs().max() < 1
    assert (z_basal.scale - 1).abs().max() < 0.5


def test_global_parameters_are_those_of_the_global_sites(family) -> None:
    _, guide = make(family)
    free = {id(p) for p in guide.global_parameters()}
    names = {name.split(".")[0] for name, p in guide.named_parameters() if id(p) in free}
    expected = {"mask_logits", "effect", "gene_effect", "artifact_effect", "artifact_risk"}
    assert names == expected | {"depth_shift"}


# --------------------------------------------------------------------- what tells them apart


@pytest.mark.parametrize("combine", ["sum", "shift", "concat"])
def test_the_encoder_tells_the_sum_that_the_decoder_sees(combine: str) -> None:
    schema = make_schema()
    _, guide = make("structured", schema, model={"combine": combine})
    with torch.no_grad():
        guide.z_basal.network.inputs[1].weight.zero_()  # what the encoder reads of the shift
    batch, locs = make_batch(schema), []
    w = nodes_of(guide, batch)[sites.Z_ARTIFACT]["value"]
    for size in (0.0, 2.0):
        shift = torch.full((3, 5), size)
        held = {sites.EFFECT_MASK: torch.ones(3, 5), sites.EFFECT: shift, sites.Z_ARTIFACT: w}
        own = nodes_of(guide, batch, held)[sites.Z_BASAL]["fn"].mean
        locs.append(own + batch.perturbation @ shift if combine != "concat" else own)
    torch.testing.assert_close(*locs)


def dependence(family: str, changed: str, on: str) -> bool:
    """Return whether q(`on`) changes when the value of `changed` does, all else held."""
    schema = make_schema()
    _, guide = make(family, schema)
    batch = make_batch(schema).replace(perturbation=torch.ones(10, schema.n_perturbations))
    nodes = nodes_of(guide, batch)
    given = {name: node["value"].detach() for name, node in nodes.items() if name != on}
    moved = 1 - given[changed] if changed == sites.EFFECT_MASK else given[changed] + 2
    q = nodes_of(guide, batch, given)[on]["fn"].base_dist
    other = nodes_of(guide, batch, given | {changed: moved})[on]["fn"].base_dist
    return not (torch.equal(q.loc, other.loc) and torch.equal(q.scale, other.scale))


@pytest.mark.parametrize(
    ("changed", "on"),
    [
        (sites.EFFECT_MASK, sites.EFFECT),
        (sites.EFFECT, sites.Z_BASAL),
        (sites.ARTIFACT_EFFECT, sites.Z_BASAL),
        (sites.Z_ARTIFACT, sites.Z_BASAL),
        (sites.EFFECT, sites.Z_ARTIFACT),
    ],
)
def test_only_the_structured_guide_depends_on(changed, on) -> None:
    assert dependence("structured", changed, on)
    assert not dependence("mean_field", changed, on)


def test_effect_of_a_perturbation_depends_on_its_own_mask_only() -> None:
    schema = make_schema()
    _, guide = make("structured", schema)
    batch = make_batch(schema)
    mask = torch.zeros(3, 5)
    flipped = mask.clone()
    flipped[1, 2] = 1
    before = nodes_of(guide, batch, {sites.EFFECT_MASK: mask})[sites.EFFECT]["fn"].mean
    after = nodes_of(guide, batch, {sites.EFFECT_MASK: flipped})[sites.EFFECT]["fn"].mean
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] != after[1]).any()


@pytest.mark.parametrize("changed", ["covariates", "counts", "library"])
def test_encoders_see_the_cell(family, changed) -> None:
    schema = make_schema(covariates=COVARIATES)
    _, guide = make(family, schema)
    batch = make_batch(schema)
    nodes = nodes_of(guide, batch)
    given = {name: nodes[name]["value"] for name in nodes if name in GLOBAL_SITES}
    values = getattr(batch, changed)
    other = batch.replace(**{changed: values.roll(1, dims=0)})
    for name in (sites.Z_BASAL, sites.Z_ARTIFACT):
        before = nodes_of(guide, batch, given)[name]["fn"].mean
        after = nodes_of(guide, other, given)[name]["fn"].mean
        assert not torch.equal(before, after)


# ----------------------------------------------------------------- summary of a cell's response


def make_summary_input(n_cells: int = 6, n_genes: int = 9) -> tuple[Tensor, Tensor]:
    """Return an encoder's input and direct effects."""
    generator = torch.Generator().manual_seed(2)
    expression = torch.randn(n_cells, n_genes + 1, generator=generator)
    return expression, 0.5 * torch.randn(n_cells, n_genes, generator=generator)


def test_summary_by_hand() -> None:
    expression = torch.tensor([[2.0, 1.0, 5.0, 100.0]])  # the last is the library
    summary = response_summary(expression, torch.tensor([[3.0, 4.0, 0.0]]))
    torch.testing.assert_close(summary, torch.tensor([[10 / 5, 5.0, 10 / 26]]))


def test_summary_of_a_control_is_zero() -> None:
    expression, change = make_summary_input()
    summary = response_summary(1e3 * expression, torch.zeros_like(change))
    torch.testing.assert_close(summary, torch.zeros_like(summary), atol=2e-3, rtol=0)


def test_summary_grows_with_expression_along_the_effect_and_not_across() -> None:
    expression, change = make_summary_input()
    zero = torch.zeros(len(change), 1)
    step = torch.cat([change, zero], -1)
    low, high = (response_summary(expression + by * step, change) for by in (0.0, 1.0))
    assert (high[:, [0, 2]] > low[:, [0, 2]]).all()
    assert torch.equal(high[:, 1], low[:, 1])
    other = torch.randn_like(change)
    across = other - (other * change).sum(-1, keepdim=True) / (change**2).sum(-1, True) * change
    moved = response_summary(expression + torch.cat([across, zero + 7], -1), change)
    torch.testing.assert_close(moved, low, atol=1e-4, rtol=1e-4)


def test_summary_has_the_shape_of_the_particles() -> None:
    expression, change = make_summary_input()
    changes = torch.stack([change, 2 * change, -change]).unsqueeze(1)
    summary = response_summary(expression, changes)
    assert summary.shape == (3, 1, 6, 3)
    for by, one in zip(changes[:, 0], summary[:, 0], strict=True):
        assert torch.equal(one, response_summary(expression, by))


def test_summary_does_not_depend_on_the_order_of_genes() -> None:
    expression, change = make_summary_input()
    order = torch.randperm(change.shape[-1])
    moved = torch.cat([expression[:, order], expression[:, -1:]], -1)
    summary = response_summary(moved, change[:, order])
    torch.testing.assert_close(summary, response_summary(expression, change))


def test_summary_stays_within_bounds() -> None:
    expression, change = make_summary_input()
    summary = response_summary(10 * expression.sign(), 100 * change)
    assert summary.abs().max() == 10


def test_only_the_structured_guide_sees_how_far_a_cell_follows_its_effects() -> None:
    assert dependence("structured", sites.GENE_EFFECT, sites.Z_BASAL)
    assert not dependence("mean_field", sites.GENE_EFFECT, sites.Z_BASAL)


def test_an_encoder_starts_as_one_map_of_counts_and_library():
    """The library's weight is kept apart, but is a column as any other."""
    torch.manual_seed(0)
    encoder = CellEncoder(8, [3], 2, NetworkConfig(hidden=5, layers=1))
    torch.manual_seed(0)
    network = ResidualMLP([8, 3], NetworkConfig(hidden=5, layers=1))
    expression, context = torch.randn(4, 8), torch.randn(2, 4, 3)
    found = encoder.network(expression, context)
    torch.testing.assert_close(found, network(expression, context))
    assert len([*encoder.network.parameters()]) == len([*network.parameters()]) + 1
