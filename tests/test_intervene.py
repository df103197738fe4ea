"""Worlds: given latents, an intervention moves what descends from it and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import COVARIATES, make_batch, make_pair, make_schema
from pyro import poutine
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.errors import QueryError
from cradle_pyro.inference.posterior import draw_latents
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.intervene import Do, run_world
from cradle_pyro.types import Batch

# Who moves when a site is intervened on, latents and counts' noise held: DESIGN section 2.
DESCENDANTS = {
    sites.PERTURBATION: {sites.PERTURBATION_SHIFT, sites.RATE},
    sites.ARTIFACT: {sites.ARTIFACT_SHIFT, sites.RATE},
    sites.LIBRARY: set(),
    sites.PERTURBATION_SHIFT: {sites.RATE},
    sites.ARTIFACT_SHIFT: {sites.RATE},
    sites.Z_BASAL: {sites.RATE},
    sites.RATE: set(),
}


def make_world(**model: Any) -> tuple[Cradle, Batch, dict[str, Tensor]]:
    """Return a model, cells, and all their latents and observed values."""
    schema = make_schema(covariates=COVARIATES, has_rest=True)
    pair, guide = make_pair(schema, model=model)
    batch = make_batch(schema)
    latents = draw_latents(guide, batch)
    observed = {
        sites.ARTIFACT: batch.artifact,
        sites.LIBRARY: batch.library,
        sites.COUNTS: batch.counts,
    }
    return pair, batch, latents | observed


def other(value: Tensor) -> Tensor:
    """Return another value of the same shape that every site here allows."""
    return 1 - value if set(value.unique().tolist()) <= {0.0, 1.0} else value * 0.5 + 1


@pytest.mark.parametrize("site", [*DESCENDANTS, sites.COUNTS])
def test_intervened_site_holds_the_value_and_only_descendants_move(site) -> None:
    model, batch, latents = make_world()
    before = run_world(model, batch, latents, {})
    value = other(before[site])
    after = run_world(model, batch, latents, {site: value})
    assert set(after) == set(before)
    assert torch.equal(after[site], value)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == DESCENDANTS.get(site, set()) | {site}


def test_doing_nothing_with_all_latents_is_the_factual_world() -> None:
    model, batch, latents = make_world()
    replayed = poutine.trace(poutine.condition(model, data=latents)).get_trace(batch)
    world = run_world(model, batch, latents, {})
    for name in (sites.RATE, sites.PERTURBATION_SHIFT, sites.ARTIFACT_SHIFT, sites.COUNTS):
        assert torch.equal(world[name], replayed.nodes[name]["value"]), name
    assert torch.equal(world[sites.PERTURBATION], batch.perturbation)


def test_doing_the_factual_values_changes_nothing() -> None:
    model, batch, latents = make_world()
    nothing = run_world(model, batch, latents, {})
    factual = {name: nothing[name] for name in DESCENDANTS}
    again = run_world(model, batch, latents, factual)
    assert all(torch.equal(nothing[name], again[name]) for name in nothing)


def test_interventions_on_different_sites_are_one_mapping_in_any_order() -> None:
    model, batch, latents = make_world()
    acts = {
        sites.ARTIFACT: torch.zeros_like(batch.artifact),
        sites.PERTURBATION: torch.ones_like(batch.perturbation),
        sites.LIBRARY: torch.full_like(batch.library, 50.0),
    }
    worlds = [
        run_world(model, batch, latents, dict(items))
        for items in (list(acts.items()), list(acts.items())[::-1])
    ]
    assert all(torch.equal(worlds[0][name], worlds[1][name]) for name in worlds[0])
    assert not worlds[0][sites.ARTIFACT_SHIFT].any()


@pytest.mark.parametrize("name", ["artefact", "z_basl", "cells_", "perturbations_shift"])
def test_misspelt_site_is_an_error_that_shows_the_sites(name) -> None:
    model, batch, latents = make_world()
    with pytest.raises(KeyError, match=rf"{name}.*artifact_shift"):
        run_world(model, batch, latents, {name: torch.zeros(10, 2)})


def test_a_site_of_a_mechanism_that_is_off_is_an_error() -> None:
    model, batch, latents = make_world(n_artifact_latents=0)
    with pytest.raises(KeyError, match="z_artifact"):
        run_world(model, batch, latents, {sites.Z_ARTIFACT: torch.zeros(10, 4)})


def test_what_is_observed_is_drawn_anew_unless_given() -> None:
    model, batch, latents = make_world()
    free = {k: v for k, v in latents.items() if k not in (sites.COUNTS, sites.LIBRARY)}
    worlds = [run_world(model, batch, free, {}) for _ in range(2)]
    assert not torch.equal(worlds[0][sites.COUNTS], batch.counts)
    assert not torch.equal(worlds[0][sites.COUNTS], worlds[1][sites.COUNTS])
    assert not torch.equal(worlds[0][sites.LIBRARY], worlds[1][sites.LIBRARY])
    assert torch.equal(worlds[0][sites.RATE], worlds[1][sites.RATE])
    assert (worlds[0][sites.COUNTS] >= 0).all()


def test_generated_counts_follow_the_intervened_library() -> None:
    model, batch, latents = make_world()
    free = {k: v for k, v in latents.items() if k not in (sites.COUNTS, sites.LIBRARY)}
    deep = run_world(model, batch, free, {sites.LIBRARY: torch.full_like(batch.library, 1e6)})
    share = deep[sites.COUNTS].sum(0) / 1e6
    expected = deep[sites.RATE].sum(0)
    assert torch.corrcoef(torch.stack([share, expected]))[0, 1] > 0.5
    shallow = run_world(model, batch, free, {sites.LIBRARY: torch.full_like(batch.library, 1e-6)})
    assert not shallow[sites.COUNTS].any()


def test_artifact_switched_on_draws_z_artifact_only_where_it_is_not_given() -> None:
    model, batch, latents = make_world()
    without = {k: v for k, v in latents.items() if k != sites.Z_ARTIFACT}
    acts = {sites.ARTIFACT: torch.ones_like(batch.artifact)}
    given = [run_world(model, batch, latents, acts)[sites.ARTIFACT_SHIFT] for _ in range(2)]
    drawn = [run_world(model, batch, without, acts)[sites.ARTIFACT_SHIFT] for _ in range(2)]
    assert torch.equal(*given)
    assert not torch.equal(*drawn)


def test_model_is_transformed_and_not_changed() -> None:
    model, batch, latents = make_world()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    world = run_world(model, batch, latents, {sites.ARTIFACT: torch.zeros_like(batch.artifact)})
    assert all(not value.requires_grad for value in world.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    trace = poutine.trace(model).get_trace(batch)
    assert trace.nodes[sites.COUNTS]["is_observed"]
    assert torch.equal(trace.nodes[sites.ARTIFACT]["value"], batch.artifact)


def test_an_edited_model_is_intervened_upon_alike() -> None:
    model, batch, latents = make_world()

    def halved(cells: Batch) -> Tensor:
        return poutine.do(model, data={sites.PERTURBATION: cells.perturbation * 0.5})(cells)

    world = run_world(halved, batch, latents, {sites.ARTIFACT: torch.zeros_like(batch.artifact)})
    plain = run_world(model, batch, latents, {sites.ARTIFACT: torch.zeros_like(batch.artifact)})
    torch.testing.assert_close(
        world[sites.PERTURBATION_SHIFT], plain[sites.PERTURBATION_SHIFT] * 0.5
    )
    assert not world[sites.ARTIFACT_SHIFT].any()


def test_a_site_that_the_model_intervenes_on_is_an_error_instead_of_endless() -> None:
    model, batch, latents = make_world()
    acts = {sites.PERTURBATION: torch.zeros_like(batch.perturbation)}
    edited = poutine.do(model, data=acts)
    with pytest.raises(QueryError, match="The model itself intervenes on 'perturbation'"):
        run_world(edited, batch, latents, acts)
    # Intervening is no part of the model, so that it can be asked again.
    assert run_world(model, batch, latents, acts)[sites.PERTURBATION].eq(0).all()


def test_a_site_that_the_model_intervenes_on_is_left_to_it_on_request() -> None:
    model, batch, latents = make_world()
    acts = {sites.ARTIFACT: torch.zeros_like(batch.artifact)}
    outer = {sites.ARTIFACT: torch.ones_like(batch.artifact)}
    world = poutine.condition(poutine.uncondition(poutine.do(model, data=acts)), data=latents)
    trace = poutine.trace(Do(outer, yields=True)(world)).get_trace(batch)
    assert not trace.nodes[sites.ARTIFACT_SHIFT]["value"].any()
