"""The generative model: its sites, what switches do, and laws that hold for any parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import (
    COVARIATES,
    GLOBAL_SITES,
    N_ARTIFACT_LATENTS,
    N_ARTIFACTS,
    N_CELLS,
    N_GENES,
    N_LATENTS,
    N_PERTURBATIONS,
    make_batch,
    make_config,
    make_pair,
    make_schema,
    make_statistics,
)
from pyro import poutine
from pyro.poutine import Trace
from scipy import integrate, stats
from scipy.special import expit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cradle_pyro import sites
from cradle_pyro.config import Config
from cradle_pyro.inference.pair import build_pair
from cradle_pyro.model.cradle import Cradle, gate, sum_of_effects, with_combinations
from cradle_pyro.types import Batch, Schema

OFF = {
    "latent_effect": False,
    "gene_effect": "none",
    "artifact_risk": False,
    "depth_shift": False,
    "n_artifact_latents": 0,
}


SUMMARY_WEIGHT = "z_basal.network.inputs.4.weight"  # as many summaries as perturbations here


def trace_of(model: Any, batch: Batch, latents: dict[str, Tensor] | None = None) -> Trace:
    """Return the model's trace, with the log-probability of each site."""
    if latents is not None:
        model = poutine.condition(model, data=latents)
    trace = poutine.trace(model).get_trace(batch)
    trace.compute_log_prob()
    return trace


def latents_of(model: Cradle, batch: Batch) -> dict[str, Tensor]:
    """Return a draw of the latents from the prior."""
    trace = poutine.trace(model).get_trace(batch)
    return {
        name: node["value"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and type(node["fn"]).__name__ != "_Subsample"
    }


def stack_of(node: dict[str, Any]) -> list[str]:
    return [frame.name for frame in node["cond_indep_stack"]]


# -------------------------------------------------------------------------------------- sites


def test_every_latent_and_structural_variable_is_a_site_in_its_plate() -> None:
    schema = make_schema()
    model, _ = make_pair(schema)
    trace = trace_of(model, make_batch(schema))
    expected = {
        sites.EFFECT_MASK: (sites.PERTURBATIONS, (N_PERTURBATIONS, N_LATENTS)),
        sites.EFFECT: (sites.PERTURBATIONS, (N_PERTURBATIONS, N_LATENTS)),
        sites.GENE_EFFECT: (sites.PERTURBATIONS, (N_PERTURBATIONS, N_GENES)),
        sites.ARTIFACT_EFFECT: (sites.ARTIFACTS, (N_ARTIFACTS, N_LATENTS)),
        sites.ARTIFACT_RISK: (sites.ARTIFACTS, (N_ARTIFACTS, N_PERTURBATIONS)),
        sites.DEPTH_SHIFT: (sites.ARTIFACTS, (N_ARTIFACTS,)),
        sites.PERTURBATION: (sites.CELLS, (N_CELLS, N_PERTURBATIONS)),
        sites.ARTIFACT: (sites.CELLS, (N_CELLS, N_ARTIFACTS)),
        sites.PERTURBATION_SHIFT: (sites.CELLS, (N_CELLS, N_LATENTS)),
        sites.Z_ARTIFACT: (sites.CELLS, (N_CELLS, N_ARTIFACT_LATENTS)),
        sites.ARTIFACT_SHIFT: (sites.CELLS, (N_CELLS, N_LATENTS)),
        sites.LIBRARY: (sites.CELLS, (N_CELLS,)),
        sites.Z_BASAL: (sites.CELLS, (N_CELLS, N_LATENTS)),
        sites.RATE: (sites.CELLS, (N_CELLS, N_GENES)),
        sites.COUNTS: (sites.CELLS, (N_CELLS, N_GENES)),
    }
    for name, (plate, shape) in expected.items():
        assert stack_of(trace.nodes[name]) == [plate], name
        assert trace.nodes[name]["value"].shape == shape, name
    sampled = {name for name, node in trace.nodes.items() if node["type"] == "sample"}
    plates = {sites.CELLS, sites.PERTURBATIONS, sites.ARTIFACTS}
    assert sampled - plates == set(expected)


def test_cells_plate_has_the_size_of_the_training_set() -> None:
    schema = make_schema()
    model, _ = make_pair(schema, n_cells=40)
    trace = trace_of(model, make_batch(schema, n_cells=8))
    assert trace.nodes[sites.COUNTS]["scale"] == 40 / 8
    assert trace.nodes[sites.EFFECT]["scale"] == 1.0


@pytest.mark.parametrize(
    ("setting", "gone"),
    [
        ({"latent_effect": False}, {sites.EFFECT, sites.EFFECT_MASK}),
        ({"gene_effect": "none"}, {sites.GENE_EFFECT}),
        ({"artifact_risk": False}, {sites.ARTIFACT_RISK}),
        ({"depth_shift": False}, {sites.DEPTH_SHIFT}),
        ({"n_artifact_latents": 0}, {sites.Z_ARTIFACT}),
    ],
)
def test_a_mechanism_switched_off_has_no_site(setting, gone) -> None:
    schema = make_schema()
    batch = make_batch(schema)
    whole = set(trace_of(make_pair(schema)[0], batch).nodes)
    model, guide = make_pair(schema, model=make_config().model.model_dump(mode="json") | setting)
    assert whole - set(trace_of(model, batch).nodes) == gone
    assert not gone & set(poutine.trace(guide).get_trace(batch).nodes)


def test_without_artifacts_in_the_schema_nothing_about_them_is_sampled() -> None:
    schema = make_schema(n_artifacts=0)
    trace = trace_of(make_pair(schema)[0], make_batch(schema))
    absent = {sites.ARTIFACT_EFFECT, sites.ARTIFACT_RISK, sites.DEPTH_SHIFT, sites.Z_ARTIFACT}
    assert not absent & set(trace.nodes)
    assert not trace.nodes[sites.ARTIFACT_SHIFT]["value"].any()


def test_prior_scales_are_those_of_the_configuration() -> None:
    values = {
        "mask_probability": 0.07,
        "effect_scale": 1.3,
        "artifact_effect_scale": 0.4,
        "artifact_risk_scale": 0.6,
        "depth_shift_scale": 0.9,
    }
    schema = make_schema()
    model, _ = make_pair(schema, model=values, shaken=False)
    trace = trace_of(model, make_batch(schema))
    priors = {name: trace.nodes[name]["fn"] for name in GLOBAL_SITES}
    found = {
        "mask_probability": priors[sites.EFFECT_MASK].mean,
        "effect_scale": priors[sites.EFFECT].stddev,
        "artifact_effect_scale": priors[sites.ARTIFACT_EFFECT].stddev,
        "artifact_risk_scale": priors[sites.ARTIFACT_RISK].stddev,
        "depth_shift_scale": priors[sites.DEPTH_SHIFT].stddev,
    }
    for name, value in values.items():
        torch.testing.assert_close(found[name], torch.full_like(found[name], value))
    gene_effect = make_config().model.gene_effect
    slab = sum(scale**2 for scale in gene_effect.slab_scales) / len(gene_effect.slab_scales)
    share, spike = gene_effect.slab_probability, gene_effect.spike_scale
    expected = torch.full((N_PERTURBATIONS, N_GENES), share * slab + (1 - share) * spike**2)
    torch.testing.assert_close(priors[sites.GENE_EFFECT].variance, expected)


# ----------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("combine", ["concat", "shift", "sum"])
@pytest.mark.parametrize("linear_path", [True, False])
@pytest.mark.parametrize("has_rest", [True, False])
@pytest.mark.parametrize("covariates", [(), COVARIATES])
def test_structural_equations_by_hand(combine, linear_path, has_rest, covariates) -> None:
    schema = make_schema(has_rest=has_rest, covariates=covariates)
    settings = make_config().model.model_dump(mode="json")
    settings |= {"combine": combine, "linear_path": linear_path}
    model, _ = make_pair(schema, model=settings, dtype=torch.float64)
    batch = make_batch(schema, dtype=torch.float64, severity=True)
    latents = latents_of(model, batch)
    nodes = trace_of(model, batch, latents).nodes
    effect = latents[sites.EFFECT_MASK] * latents[sites.EFFECT]
    for n in range(len(batch)):
        d, a = batch.perturbation[n], batch.artifact[n]
        p = sum(d[t] * effect[t] for t in range(N_PERTURBATIONS))
        r = sum(a[k] * latents[sites.ARTIFACT_EFFECT][k] for k in range(N_ARTIFACTS))
        if a.sum() > 0:
            r = r + latents[sites.Z_ARTIFACT][n] @ model.artifact_loading
        torch.testing.assert_close(nodes[sites.PERTURBATION_SHIFT]["value"][n], p)
        torch.testing.assert_close(nodes[sites.ARTIFACT_SHIFT]["value"][n], r)
        z, own = latents[sites.Z_BASAL][n], 1.0
        if a.sum() > 0:  # foreign RNA dilutes what is the cell's own
            dilution = latents[sites.Z_ARTIFACT][n] @ model.dilution_loading + model.dilution_bias
            own = 1 - torch.sigmoid(dilution)
        states = {
            "concat": [own * z, own * p, r],
            "shift": [own * (z + p), r],
            "sum": [own * (z + p) + r],
        }[combine]
        if covariates:
            states.append(batch.covariates[n])
        logits = model.decoder(*(state[None] for state in states))[0]
        shift = torch.zeros(N_GENES, dtype=torch.float64)
        for t in range(N_PERTURBATIONS):
            loading, bias = response_parameters(model, t)
            response = torch.sigmoid(z @ loading + bias) / mean_response(model, t)
            shift = shift + d[t] * response * latents[sites.GENE_EFFECT][t]
        weights = (logits[:N_GENES] + own * shift).exp()
        total = weights.sum() + (logits[N_GENES].exp() if has_rest else 0)
        rate = nodes[sites.RATE]["value"][n]
        torch.testing.assert_close(rate, weights / total)
        assert rate.sum() < 1 if has_rest else rate.sum().item() == pytest.approx(1)
        # An artifact is a descendant of the perturbation; severity is exogenous given presence.
        log_odds = model.artifact_log_odds + latents[sites.ARTIFACT_RISK] @ d
        present = (a > 0).double()
        log_prob = (present * log_odds - torch.nn.functional.softplus(log_odds)).sum()
        torch.testing.assert_close(nodes[sites.ARTIFACT]["unscaled_log_prob"][n], log_prob)
        loc = a @ latents[sites.DEPTH_SHIFT]
        loc = loc + (
            batch.covariates[n] @ model.log_library_loc if covariates else model.log_library_loc[0]
        )
        library = torch.distributions.LogNormal(loc, model.log_library_log_scale.exp())
        torch.testing.assert_close(
            nodes[sites.LIBRARY]["unscaled_log_prob"][n], library.log_prob(batch.library[n])
        )
        counts = model.likelihood(rate[None], batch.library[n][None]).log_prob(
            batch.counts[n][None]
        )
        torch.testing.assert_close(nodes[sites.COUNTS]["unscaled_log_prob"][n], counts[0])


def response_parameters(model: Cradle, perturbation: int) -> tuple[Tensor, Tensor]:
    """Return loading and bias of the response to one perturbation."""
    own = model.response_deviation[perturbation]
    return model.response_loading + own[:-1], model.response_bias + own[-1]


def mean_response(model: Cradle, perturbation: int) -> float:
    """Return the mean response of a cell over the prior, by integration."""
    loading, bias = response_parameters(model, perturbation)
    loc, scale = bias.item(), loading.norm().item()
    return integrate.quad(
        lambda x: expit(x) * stats.norm(loc, scale).pdf(x), -40, 40, points=[loc]
    )[0]


def test_decoder_is_a_residual_network_and_a_linear_path() -> None:
    model, _ = make_pair(model={"combine": "concat"}, dtype=torch.float64)
    decoder = model.decoder
    states = [torch.randn(4, N_LATENTS, dtype=torch.float64) for _ in range(3)]
    joined = torch.cat(states, -1)
    first = torch.cat([linear.weight for linear in decoder.network.inputs], 1)
    hidden = torch.nn.functional.leaky_relu(joined @ first.T + decoder.network.bias)
    (block,) = decoder.network.blocks
    hidden = hidden + torch.nn.functional.leaky_relu(block.linear(block.norm(hidden)))
    linear = torch.cat([layer.weight for layer in decoder.linear], 1)
    expected = hidden @ decoder.output.weight.T + joined @ linear.T + decoder.bias
    torch.testing.assert_close(decoder(*states), expected)


@pytest.mark.parametrize("severity", [False, True])
def test_artifact_shift_is_exactly_zero_without_an_artifact(severity) -> None:
    schema = make_schema()
    model, _ = make_pair(schema)
    batch = make_batch(schema, severity=severity)
    shift = trace_of(model, batch).nodes[sites.ARTIFACT_SHIFT]["value"]
    failing = (batch.artifact > 0).any(-1)
    assert failing.any()
    assert not failing.all()
    assert torch.equal(shift[~failing], torch.zeros_like(shift[~failing]))
    assert (shift[failing] != 0).all()
    assert torch.equal(gate(batch.artifact).squeeze(-1), failing.float())


def test_given_libraries_are_deterministic_and_modelled_ones_are_scored() -> None:
    schema = make_schema()
    batch = make_batch(schema)
    given = trace_of(make_pair(schema, model={"depth_shift": False})[0], batch).nodes[sites.LIBRARY]
    assert given["infer"].get("_deterministic")
    assert torch.equal(given["value"], batch.library)
    scored = trace_of(make_pair(schema)[0], batch).nodes[sites.LIBRARY]
    assert scored["is_observed"]
    assert not scored["infer"].get("_deterministic")


def test_fresh_model_starts_at_the_training_profile() -> None:
    for has_rest in (False, True):
        schema = make_schema(has_rest=has_rest)
        statistics = make_statistics(schema)
        model, _ = build_pair(schema, make_config(), statistics, seed=0)
        zero = torch.zeros(1, N_LATENTS)
        bias = model.decoder.bias[None]
        rate = model.likelihood.rate(bias, has_rest=has_rest)[0]
        share = statistics.fraction / (1 if has_rest else statistics.fraction.sum())
        torch.testing.assert_close(rate, share)
        assert model.decoder(zero, zero).shape == (1, N_GENES + has_rest)
        torch.testing.assert_close(model.artifact_log_odds.sigmoid(), statistics.artifact_share)


# ------------------------------------------------------------------------------------- response


def log_fold_change(model: Cradle, batch: Batch, z_basal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the direct change and the plain sum of the gene effects, for random effects."""
    shape = model.schema.n_perturbations, model.schema.n_genes
    effect = torch.randn(shape, dtype=batch.counts.dtype)
    found = model.log_fold_change(z_basal, batch.perturbation, effect)
    return found, batch.perturbation @ effect


@pytest.mark.parametrize("size", [0.1, 1.0])
def test_gene_effects_are_averages_over_the_cells_of_the_prior(size) -> None:
    schema = make_schema()
    model, _ = make_pair(schema, dtype=torch.float64)
    with torch.no_grad():
        model.response_loading.copy_(size * torch.randn(N_LATENTS))
        model.response_bias.fill_(0.3)
        model.response_deviation.mul_(size)
    batch = make_batch(schema, n_cells=1, dtype=torch.float64).take(torch.zeros(20_000).long())
    batch = batch.replace(perturbation=torch.eye(N_PERTURBATIONS)[[1]].expand(20_000, -1).double())
    change, plain = log_fold_change(model, batch, torch.randn(20_000, N_LATENTS).double())
    ratio = (change / plain)[:, 0].detach()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / len(ratio) ** 0.5
    assert ratio.std() > 0.02
    assert (ratio > 0).all()
    # One response for all genes of a cell, whatever its effects.
    torch.testing.assert_close((change / plain).detach(), ratio[:, None].expand_as(change))


def test_without_response_the_direct_change_is_the_plain_sum() -> None:
    schema = make_schema()
    settings = {"gene_effect": {"response": False}}
    model, _ = make_pair(schema, model=settings, dtype=torch.float64)
    batch = make_batch(schema, dtype=torch.float64)
    change, plain = log_fold_change(model, batch, torch.randn(N_CELLS, N_LATENTS).double())
    torch.testing.assert_close(change, plain)
    assert not any(name.startswith("response") for name, _ in model.named_parameters())


def test_each_perturbation_has_its_own_response() -> None:
    schema = make_schema()
    model, _ = make_pair(schema, dtype=torch.float64)
    batch = make_batch(schema, dtype=torch.float64)
    z_basal = torch.randn(N_CELLS, N_LATENTS).double()
    singles = []
    for t in range(N_PERTURBATIONS):
        alone = torch.eye(N_PERTURBATIONS)[t].expand(N_CELLS, -1).double()
        torch.manual_seed(0)
        change, plain = log_fold_change(model, batch.replace(perturbation=alone), z_basal)
        singles.append(change)
        torch.testing.assert_close(change / plain, (change / plain)[:, :1].expand_as(plain))
    ratios = model.response(z_basal).detach()
    assert (ratios.diff(dim=1).abs() > 1e-3).any(1).all()
    torch.manual_seed(0)
    together = batch.replace(perturbation=torch.ones_like(batch.perturbation))
    both, _ = log_fold_change(model, together, z_basal)
    torch.testing.assert_close(both, sum(singles))


# --------------------------------------------------------------------------------- interactions


def test_a_combination_is_present_where_all_its_members_are() -> None:
    pairs = torch.tensor([[1.0, 1, 0], [0, 1, 1]])
    cells = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1], [0.5, 0.4, 0]])
    design = with_combinations(cells, pairs)
    torch.testing.assert_close(design[:, :3], cells)
    expected = torch.tensor([[0.0, 0], [0, 0], [1, 0], [0, 1], [1, 1], [0.2, 0]])
    torch.testing.assert_close(design[:, 3:], expected)
    assert with_combinations(cells, pairs[:0]) is cells


def test_an_interaction_moves_cells_of_its_combination_and_no_others() -> None:
    schema = make_schema()
    statistics = make_statistics(schema)._replace(combinations=torch.tensor([[1.0, 1.0, 0.0]]))
    config = make_config(model={"gene_effect": {"response": False}})
    model = Cradle(schema, config.model, statistics)
    batch = make_batch(schema)
    members = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]])
    batch = batch.take(torch.arange(4)).replace(
        perturbation=members, artifact=torch.zeros(4, N_ARTIFACTS)
    )
    site = poutine.trace(model).get_trace(batch).nodes[sites.INTERACTION]
    assert site["value"].shape == (1, schema.n_genes)
    values = {
        name: node["value"]
        for name, node in poutine.trace(model).get_trace(batch).nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }

    def log_rate(interaction: float) -> Tensor:
        given = values | {sites.INTERACTION: torch.full((1, schema.n_genes), interaction)}
        given[sites.INTERACTION][:, 1:] = 0
        trace = poutine.trace(poutine.condition(model, data=given)).get_trace(batch)
        rate = trace.nodes[sites.RATE]["value"].log()
        return rate[:, 0] - rate[:, 1]  # the softmax moves all genes alike

    change = log_rate(0.7) - log_rate(0.0)
    torch.testing.assert_close(change, torch.tensor([0.7, 0, 0, 0.7]))


def test_interactions_can_be_switched_off() -> None:
    schema = make_schema()
    statistics = make_statistics(schema)._replace(combinations=torch.ones(1, N_PERTURBATIONS))
    model = Cradle(schema, make_config(model={"gene_effect": "none"}).model, statistics)
    assert model.interaction_prior is None
    assert sites.INTERACTION not in poutine.trace(model).get_trace(make_batch(schema)).nodes


def test_loadings_of_the_basal_state_have_a_laplace_prior() -> None:
    settings = {"loading_scale": 0.5, "gene_effect": {"response": False}}
    model, _ = make_pair(n_cells=40, model=settings)
    weight = model.decoder.linear[0].weight
    assert [p is weight for p in model.parameters_with_prior()] == [True]
    expected = torch.distributions.Laplace(0.0, 0.5).log_prob(weight).sum() / 40
    constant = torch.distributions.Laplace(0.0, 0.5).log_prob(torch.zeros(())) * weight.numel() / 40
    torch.testing.assert_close(model.log_prior(), expected - constant)


@pytest.mark.parametrize("settings", [{"loading_scale": None}, {"linear_path": False}])
def test_without_a_scale_or_a_linear_path_loadings_have_no_prior(settings) -> None:
    model, _ = make_pair(model=settings | {"gene_effect": {"response": False}})
    assert not model.parameters_with_prior()
    assert model.log_prior() == 0


def test_what_is_special_to_a_response_has_a_normal_prior() -> None:
    model, _ = make_pair(n_cells=40, model={"loading_scale": None})
    own = model.response_deviation
    with torch.no_grad():
        own.normal_()
    assert [p is own for p in model.parameters_with_prior()] == [True]
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = (standard.log_prob(own) - standard.log_prob(torch.zeros(()))).sum() / 40
    torch.testing.assert_close(model.log_prior(), expected)


def test_controls_have_no_direct_change_whatever_their_state() -> None:
    schema = make_schema()
    model, _ = make_pair(schema, dtype=torch.float64)
    batch = make_batch(schema, dtype=torch.float64)
    batch = batch.replace(perturbation=torch.zeros_like(batch.perturbation))
    change, _ = log_fold_change(model, batch, 5 * torch.randn(N_CELLS, N_LATENTS).double())
    assert not change.any()


def test_cells_respond_apart_by_their_basal_state_and_less_along_the_loading() -> None:
    schema = make_schema()
    model, _ = make_pair(schema, dtype=torch.float64)
    batch = make_batch(schema, dtype=torch.float64)
    with torch.no_grad():
        model.response_deviation.zero_()
    loading = model.response_loading.detach()
    along = torch.linspace(-8, 8, N_CELLS, dtype=torch.float64)[:, None] * loading / loading.norm()
    batch = batch.replace(perturbation=torch.ones_like(batch.perturbation))
    change, plain = log_fold_change(model, batch, along)
    ratio = (change / plain)[:, 0]
    assert (ratio.diff() > 0).all()
    assert ratio[0] < 1e-3  # escapes
    assert ratio[-1].item() == pytest.approx(1 / mean_response(model, 0), rel=1e-3)  # in full


# ------------------------------------------------------------------------------------ permuting


def permuted(state: dict[str, Tensor], size: int, order: Tensor) -> dict[str, Tensor]:
    """Return the parameters with every dimension of length `size` (or one more) permuted."""
    longer = torch.cat([order, torch.tensor([size])])
    result = {}
    for name, value in state.items():
        for dim, length in enumerate(value.shape):
            if length in (size, size + 1):
                value = value.index_select(dim, order if length == size else longer)
        result[name] = value
    return result


def log_probs(trace: Trace) -> dict[str, Tensor]:
    return {
        name: node["unscaled_log_prob"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and "unscaled_log_prob" in node
    }


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "zinb", "normal"])
def test_permuting_cells_permutes_results(likelihood) -> None:
    schema = make_schema(covariates=COVARIATES)
    model, _ = make_pair(schema, model={"likelihood": likelihood}, dtype=torch.float64)
    batch = make_batch(schema, dtype=torch.float64)
    order = torch.randperm(len(batch))
    latents = latents_of(model, batch)
    local = {sites.Z_BASAL, sites.Z_ARTIFACT}
    moved = {name: v[order] if name in local else v for name, v in latents.items()}
    before, after = trace_of(model, batch, latents), trace_of(model, batch.take(order), moved)
    for name, value in log_probs(before).items():
        if stack_of(before.nodes[name]) == [sites.CELLS]:
            torch.testing.assert_close(after.nodes[name]["unscaled_log_prob"], value[order])
            moved_value = before.nodes[name]["value"][order]
            torch.testing.assert_close(after.nodes[name]["value"], moved_value)


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "zinb", "normal"])
@pytest.mark.parametrize("what", ["genes", "perturbations", "artifacts"])
@pytest.mark.parametrize("has_rest", [True, False])
def test_permuting_genes_perturbations_or_flags_permutes_results(
    likelihood, what, has_rest
) -> None:
    schema = make_schema(has_rest=has_rest)
    settings = make_config().model.model_dump(mode="json") | {"likelihood": likelihood}
    model, guide = make_pair(schema, model=settings, dtype=torch.float64)
    batch = make_batch(schema, dtype=torch.float64)
    size = {"genes": N_GENES, "perturbations": N_PERTURBATIONS, "artifacts": N_ARTIFACTS}[what]
    order = torch.arange(size).roll(1)
    field = {"genes": "counts", "perturbations": "perturbation", "artifacts": "artifact"}[what]
    other_batch = batch.replace(**{field: getattr(batch, field)[:, order]})
    other, other_guide = make_pair(schema, model=settings, dtype=torch.float64)
    if what == "genes":
        other.load_state_dict(permuted(model.state_dict(), size, order))
        other_guide.load_state_dict(permuted(guide.state_dict(), size, order))
    else:
        # Sizes one larger belong to something else here.
        for source, target in ((model, other), (guide, other_guide)):
            target.load_state_dict({
                name: value if name == SUMMARY_WEIGHT else reorder(value, size, order)
                for name, value in source.state_dict().items()
            })  # fmt: skip
    latents = latents_of(model, batch)
    globals_ = {name: value for name, value in latents.items() if name in GLOBAL_SITES}
    moved = {name: reorder(value, size, order) for name, value in globals_.items()}
    before, after = trace_of(model, batch, latents), trace_of(other, other_batch, latents | moved)
    rate = before.nodes[sites.RATE]["value"]
    expected = rate[:, order] if what == "genes" else rate
    torch.testing.assert_close(after.nodes[sites.RATE]["value"], expected)
    torch.testing.assert_close(after.log_prob_sum(), before.log_prob_sum())
    for name in (sites.Z_BASAL, sites.Z_ARTIFACT):
        given = latents if name == sites.Z_BASAL else globals_
        fixed = {k: v for k, v in given.items() if k != sites.Z_BASAL}
        own = poutine.condition(guide, data=fixed)
        of_other = poutine.condition(other_guide, data=fixed | moved)
        q = poutine.trace(own).get_trace(batch).nodes[name]["fn"]
        of_other_q = poutine.trace(of_other).get_trace(other_batch).nodes[name]["fn"]
        torch.testing.assert_close(of_other_q.base_dist.loc, q.base_dist.loc)
        torch.testing.assert_close(of_other_q.base_dist.scale, q.base_dist.scale)


def reorder(value: Tensor, size: int, order: Tensor) -> Tensor:
    """Return `value` with its dimensions of length `size` permuted."""
    for dim, length in enumerate(value.shape):
        if length == size:
            value = value.index_select(dim, order)
    return value


# ------------------------------------------------------------------------- flags that are missing


def test_missing_flags_split_the_site_and_do_sets_it() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = make_batch(schema, missing=True)
    trace = trace_of(model, batch)
    observed, unobserved = f"{sites.ARTIFACT}_observed", f"{sites.ARTIFACT}_unobserved"
    known = batch.artifact_observed
    assert trace.nodes[observed]["is_observed"]
    assert not trace.nodes[unobserved]["is_observed"]
    assert not trace.nodes[observed]["log_prob"][~known].any()
    assert not trace.nodes[unobserved]["log_prob"][known].any()
    value = trace.nodes[sites.ARTIFACT]["value"]
    assert torch.equal(value[known], batch.artifact[known])
    assert torch.equal(value[~known], trace.nodes[unobserved]["value"][~known])
    assert unobserved in poutine.trace(guide).get_trace(batch).nodes
    zero = torch.zeros_like(batch.artifact)
    world = trace_of(poutine.do(model, {sites.ARTIFACT: zero}), batch)
    assert not world.nodes[sites.ARTIFACT_SHIFT]["value"].any()
    ones = trace_of(poutine.do(model, {sites.ARTIFACT: zero + 1}), batch)
    assert ones.nodes[sites.ARTIFACT_SHIFT]["value"].any(-1).all()


def test_values_of_missing_flags_are_ignored() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = make_batch(schema, missing=True)
    garbage = torch.where(batch.artifact_observed[:, None], batch.artifact, 0.7)
    results = []
    for cells in (batch, batch.replace(artifact=garbage)):
        torch.manual_seed(1)
        guide_trace = poutine.trace(guide).get_trace(cells)
        replayed = poutine.trace(poutine.replay(model, guide_trace)).get_trace(cells)
        results.append(replayed.log_prob_sum() - guide_trace.log_prob_sum())
    assert torch.equal(*results)


def test_missing_flags_need_the_risk_mechanism() -> None:
    schema = make_schema()
    model, _ = make_pair(schema, model={"artifact_risk": False})
    with pytest.raises(ValueError, match="artifact_risk"):
        model(make_batch(schema, missing=True))


# --------------------------------------------------------------------------------- configuration


def published(n_latents: int, probability: float) -> Config:
    """Return the published model: its mechanisms, and nothing of ours."""
    return make_config(
        model={
            "n_latents": n_latents,
            "n_artifact_latents": 0,
            "combine": "concat",
            "linear_path": False,
            "gene_effect": "none",
            "artifact_risk": False,
            "depth_shift": False,
            "mask_probability": probability,
            "effect_scale": 1.0,
            "decoder": {"hidden": 400, "layers": 2},
        },
        guide={
            "encoder": {"hidden": 400, "layers": 1},
            "effect_encoder": {"hidden": 400, "layers": 4},
        },
        objective={"counterfactual": "partner", "beta": 0.5, "particles": 5},
        train={"learning_rate": 3e-4, "batch_size": 512, "max_epochs": 2000, "patience": 50,
               "gradient_clip": 100.0, "weight_decay": 1e-6},
    )  # fmt: skip


def test_published_settings_are_reachable() -> None:
    schema: Schema = make_schema(n_artifacts=1)
    config = published(200, 0.01)
    model, guide = build_pair(schema, config, make_statistics(schema), seed=0)
    trace = trace_of(model, make_batch(schema))
    sampled = {name for name, node in trace.nodes.items() if node["type"] == "sample"}
    plates = {sites.CELLS, sites.PERTURBATIONS, sites.ARTIFACTS}
    latent = {sites.EFFECT_MASK, sites.EFFECT, sites.ARTIFACT_EFFECT, sites.Z_BASAL}
    structural = {
        sites.PERTURBATION, sites.ARTIFACT, sites.PERTURBATION_SHIFT, sites.ARTIFACT_SHIFT,
        sites.LIBRARY, sites.RATE, sites.COUNTS,
    }  # fmt: skip
    assert sampled - plates == latent | structural
    assert len(model.decoder.linear) == 0
    assert len(model.decoder.network.blocks) == 1
    assert len(guide.effect.network.blocks) == 3
    assert Config.from_mapping(config.model_dump(mode="json")) == config


def test_all_mechanisms_off_still_generates() -> None:
    schema = make_schema()
    model, _ = make_pair(schema, model=OFF)
    trace = trace_of(model, make_batch(schema))
    assert not trace.nodes[sites.PERTURBATION_SHIFT]["value"].any()
    assert torch.isfinite(trace.log_prob_sum())


def test_foreign_rna_dilutes_failing_cells_only():
    batch = make_batch(make_schema())
    model, _ = make_pair(make_schema(), model={"dilution": True})
    latents = latents_of(model, batch)
    own = model.own_share(batch.artifact, latents[sites.Z_ARTIFACT])
    failing = gate(batch.artifact).squeeze(-1) > 0
    assert failing.any()
    assert (~failing).any()
    assert (own[~failing] == 1).all()
    assert ((own[failing] > 0) & (own[failing] < 1)).all()
    # Without dilution nothing is lost; a cell that is all foreign RNA shows nothing of its own.
    assert (
        make_pair(make_schema(), model={"dilution": False})[0].own_share(batch.artifact, None) == 1
    )
    with torch.no_grad():
        model.dilution_bias.fill_(50.0)
    first = trace_of(model, batch, latents).nodes[sites.RATE]["value"]
    moved = latents | {sites.Z_BASAL: latents[sites.Z_BASAL] + 1}
    second = trace_of(model, batch, moved).nodes[sites.RATE]["value"]
    torch.testing.assert_close(first[failing], second[failing])
    assert (first[~failing] - second[~failing]).abs().max() > 1e-4


# ------------------------------------------------------------------------------ many perturbations


@pytest.mark.parametrize("shape", [(5, 40), (3, 5, 40)])
def test_sum_of_effects_is_the_product_with_and_without_gradients(shape):
    design = torch.zeros(shape, dtype=torch.float64)
    design[..., 0, 7], design[..., 2, 39], design[..., 2, 7] = 1.0, 0.5, -2.0
    effects = torch.randn(*shape[:-2], 40, 6, dtype=torch.float64)
    expected = design @ effects
    assert torch.equal(sum_of_effects(design, effects), expected)
    with torch.no_grad():
        torch.testing.assert_close(sum_of_effects(design, effects), expected)
        assert not sum_of_effects(0 * design, effects).any()


def test_a_query_does_not_work_on_perturbations_that_no_cell_carries():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        sum_of_effects(torch.eye(400)[:3], torch.ones(400, 50))
    assert counter.get_total_flops() == 2 * 3 * 3 * 50
