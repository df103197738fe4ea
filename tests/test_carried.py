"""Steps that draw the effects of what their cells carry only: the same bound, in expectation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from factories import make_batch, make_config, make_pool, make_schema, make_statistics
from pyro import poutine
from tiny import make_data, make_fit

from cradle_pyro import sites
from cradle_pyro.inference import train as training
from cradle_pyro.inference.batches import Carriers
from cradle_pyro.inference.objectives import CradleELBO, elbo_terms
from cradle_pyro.inference.pair import build_pair
from cradle_pyro.model.intervene import sample_nodes
from cradle_pyro.queries.effects import effect_draws
from cradle_pyro.seeding import seeded

N_CELLS, N_PERTURBATIONS = 24, 9
COMBINATIONS = torch.zeros(2, N_PERTURBATIONS)
COMBINATIONS[0, [0, 1]] = 1
COMBINATIONS[1, [2, 5]] = 1


def make_cells():
    """Return cells with singles, both combinations and controls."""
    batch = make_batch(make_schema(n_perturbations=N_PERTURBATIONS), n_cells=N_CELLS)
    design = torch.zeros(N_CELLS, N_PERTURBATIONS)
    design[torch.arange(N_CELLS), torch.arange(N_CELLS) % N_PERTURBATIONS] = 1
    design[:4] = COMBINATIONS[[0, 1, 0, 0]]
    design[4:7] = 0
    design[7] *= 0.5  # a dosage
    return batch.replace(perturbation=design)


def make_carried_pair(family="mean_field"):
    schema = make_schema(n_perturbations=N_PERTURBATIONS)
    statistics = make_statistics(schema, n_cells=N_CELLS)._replace(combinations=COMBINATIONS)
    model, guide = build_pair(schema, make_config(guide={"family": family}), statistics, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*model.parameters(), *guide.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double(), guide.double()


def make_carriers(cells):
    design = cells.perturbation
    return Carriers(COMBINATIONS.to(design), carried_counts(cells).to(design), len(cells))


def carried_counts(cells):
    design = cells.perturbation
    pairs = torch.stack([design[:, [0, 1]].prod(1), design[:, [2, 5]].prod(1)], 1)
    return (torch.cat([design, pairs], 1) > 0).sum(0).double()


def as_double(batch):
    fields = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return batch.replace(**{name: value.double() for name, value in fields.items()})


def traces(model, guide, batch):
    guide_trace = poutine.trace(guide).get_trace(batch)
    return poutine.trace(poutine.replay(model, guide_trace)).get_trace(batch), guide_trace


def parts_of(cells, sizes):
    """Return the batches of one epoch, with what they carry."""
    carriers, order = make_carriers(cells), torch.randperm(len(cells))
    for rows in order.split(sizes):
        part = cells.take(rows)
        yield part.replace(carried=carriers.carried(part.perturbation))


@pytest.mark.parametrize("sizes", [[24], [5, 5, 5, 5, 4], [1] * 24, [20, 3, 1]])
@pytest.mark.parametrize(
    ("family", "closed"),
    [
        ("structured", (sites.EFFECT_MASK, sites.GENE_EFFECT, sites.INTERACTION)),
        ("mean_field", (sites.EFFECT_MASK, sites.EFFECT)),
    ],
)
def test_divergences_and_their_gradients_add_up_over_an_epoch(family, closed, sizes):
    """Those that depend on no draw: a batch stands for its share of every effect."""
    model, guide = make_carried_pair(family)
    cells = as_double(make_cells())
    parameters = guide.global_parameters()

    def divergence(batch):
        terms = elbo_terms(*traces(model, guide, batch))
        return -sum(terms[name] for name in closed)

    whole = divergence(cells)
    of_batches = [len(part) * divergence(part) for part in parts_of(cells, sizes)]
    together = sum(of_batches) / len(cells)
    torch.testing.assert_close(together, whole, rtol=1e-9, atol=1e-9)
    found, expected = (
        torch.autograd.grad(value, parameters, allow_unused=True) for value in (together, whole)
    )
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert len(pairs) >= 3
    for one, other in pairs:
        torch.testing.assert_close(one.to_dense(), other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", ["structured", "mean_field"])
def test_cells_are_as_likely_as_with_all_effects(family):
    model, guide = make_carried_pair(family)
    cells = as_double(make_cells())
    for part in parts_of(cells, [6, 6, 6, 6]):
        model_trace, guide_trace = traces(model, guide, part)
        carried = part.carried
        values = {name: node["value"] for name, node in sample_nodes(guide_trace).items()}
        for name, rows, size in (
            (sites.EFFECT_MASK, carried.perturbations, N_PERTURBATIONS),
            (sites.EFFECT, carried.perturbations, N_PERTURBATIONS),
            (sites.GENE_EFFECT, carried.perturbations, N_PERTURBATIONS),
            (sites.INTERACTION, carried.combinations, len(COMBINATIONS)),
        ):
            full = values[name].new_full((size, values[name].shape[-1]), 7.0)
            full[rows] = values[name]
            values[name] = full
        given = poutine.condition(model, data=values)
        whole = poutine.trace(given).get_trace(part.replace(carried=None))
        for trace in (model_trace, whole):
            trace.compute_log_prob(lambda name, site: name == sites.COUNTS)
        found, expected = (trace.nodes[sites.COUNTS]["log_prob"] for trace in (model_trace, whole))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_what_is_carried_is_counted():
    cells = make_cells()
    carriers = Carriers.among(make_data(), torch.zeros(0, make_data().schema.n_perturbations))
    assert carriers.cells.tolist() == (make_data().perturbation > 0).sum(0).tolist()
    part = cells.take(torch.arange(4, 10))
    found = make_carriers(cells).carried(part.perturbation)
    on = part.perturbation > 0
    assert found.perturbations.tolist() == on.any(0).nonzero().ravel().tolist()
    share = on.sum(0) / carried_counts(cells)[:N_PERTURBATIONS] * len(cells) / len(part)
    expected = share[found.perturbations].to(found.perturbation_weights)
    torch.testing.assert_close(found.perturbation_weights, expected)
    assert len(found.combinations) == 1  # none: one stands in, with next to no weight
    assert found.combination_weights < 1e-6


def test_a_batch_of_controls_can_be_learned_from():
    cells = as_double(make_cells())
    model, guide = make_carried_pair("structured")
    controls = cells.take(torch.arange(4, 7))
    controls = controls.replace(carried=make_carriers(cells).carried(controls.perturbation))
    objective = CradleELBO(make_config().objective, make_pool(cells))
    terms = objective.terms(model, guide, controls)
    assert all(torch.isfinite(value) for value in terms.values())


def test_flipped_cells_carry_what_others_of_the_batch_carry():
    cells = as_double(make_cells())
    model, guide = make_carried_pair("structured")
    for part in parts_of(cells, [8, 8, 8]):
        with seeded(3):
            terms = CradleELBO(make_config().objective, make_pool(cells)).terms(model, guide, part)
        assert torch.isfinite(terms["counterfactual"])


def test_training_with_carried_effects_learns_the_same(monkeypatch):
    data = make_data("split.method=cells")
    labels = list(data.schema.perturbations)
    settings = ("split.method=cells", "train.max_epochs=8")
    whole = make_fit(*settings, data=data)
    seen = []
    carried = Carriers.carried
    monkeypatch.setattr(
        Carriers, "carried", lambda self, design: seen.append(1) or carried(self, design)
    )
    monkeypatch.setattr(training, "FEW_EFFECTS", 0)
    few = make_fit(*settings, data=data)
    assert len(seen) > 8
    first, second = (effect_draws(one, labels, draws=20).mean(0) for one in (whole, few))
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.9
    losses = [one.history["val_loss"].min() for one in (whole, few)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_batch_keeps_what_it_carries_as_cells_are_taken_and_moved():
    cells = make_cells()
    carried = make_carriers(cells).carried(cells.perturbation)
    batch = cells.replace(carried=carried)
    assert batch.take(torch.tensor([0, 3])).carried is carried
    moved = batch.to("cpu").carried
    assert all(torch.equal(a, b) for a, b in zip(moved, carried, strict=True))
    assert dataclasses.replace(batch, carried=None).to("cpu").carried is None
