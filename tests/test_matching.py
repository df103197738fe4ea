"""Partner cells: laws on random tables, and the two published mistakes about them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from cradle_pyro.data.matching import match_partners
from cradle_pyro.errors import DataError


class Table(NamedTuple):
    perturbation: np.ndarray
    failing: np.ndarray
    batch: np.ndarray
    is_train: np.ndarray


def make_table(seed: int = 0, n_cells: int = 200, n_labels: int = 7, n_batches: int = 2) -> Table:
    rng = np.random.default_rng(seed)
    return Table(
        np.array([f"P{i}" for i in rng.integers(0, n_labels, n_cells)]),
        rng.random(n_cells) < 0.3,
        rng.integers(0, n_batches, n_cells),
        rng.random(n_cells) < 0.6,
    )


def match(table: Table, seed: int = 0) -> np.ndarray:
    return match_partners(
        table.perturbation,
        table.failing,
        covariate_ids=table.batch,
        eligible=table.is_train,
        rng=np.random.default_rng(seed),
    )


def candidates(table: Table, cell: int) -> np.ndarray:
    """The definition, cell by cell: the oracle of the vectorised search."""
    return np.flatnonzero(
        table.is_train
        & (table.perturbation == table.perturbation[cell])
        & (table.batch == table.batch[cell])
        & (table.failing != table.failing[cell])
    )


tables = st.builds(
    make_table,
    seed=st.integers(0, 10_000),
    n_cells=st.integers(1, 120),
    n_labels=st.integers(1, 12),
    n_batches=st.integers(1, 4),
)


@given(tables)
def test_partner_is_one_of_the_candidates_and_minus_one_only_without_any(table):
    partner = match(table)
    for cell, found in enumerate(partner):
        possible = candidates(table, cell)
        assert (found in possible) if len(possible) else (found == -1)


@given(tables)
def test_same_seed_same_partners(table):
    np.testing.assert_array_equal(match(table, seed=3), match(table, seed=3))


def test_other_seed_other_partners():
    table = make_table()
    assert (match(table, seed=1) != match(table, seed=2)).any()


def test_mistake_01_partners_are_positions_in_the_full_table_and_training_cells_only():
    # Published: positions in the filtered training table index the full matrix. Here the training
    # cells come last, so that such positions would name test cells of other perturbations.
    table = make_table(n_cells=400)._replace(is_train=np.arange(400) >= 250)
    partner = match(table)
    has = partner >= 0
    assert has.mean() > 0.9
    assert table.is_train[partner[has]].all()
    assert (table.perturbation[partner[has]] == table.perturbation[has]).all()
    assert (table.batch[partner[has]] == table.batch[has]).all()


def test_mistake_02_failing_cells_get_passing_partners_and_passing_cells_failing_ones():
    table = make_table(n_cells=1000)
    partner = match(table)
    has = partner >= 0
    assert has.any()
    assert (table.failing[partner[has]] != table.failing[has]).all()
    assert table.failing[has].any()
    assert not table.failing[has].all()


def test_partners_are_drawn_uniformly(rng):
    n_cells, n_candidates = 6000, 6
    failing = np.arange(n_cells) < n_candidates
    partner = match_partners(np.zeros(n_cells, int), failing, rng=rng)
    drawn = np.bincount(partner[n_candidates:], minlength=n_candidates)
    assert drawn.sum() == n_cells - n_candidates
    assert len(drawn) == n_candidates
    assert chisquare(drawn).pvalue > 1e-4


def test_covariates_in_several_columns_match_jointly(rng):
    columns = rng.integers(0, 3, size=(500, 3))
    joint = columns @ np.array([9, 3, 1])
    labels, failing = rng.integers(0, 3, 500), rng.random(500) < 0.5
    draws = [
        match_partners(labels, failing, covariate_ids=ids, rng=np.random.default_rng(0))
        for ids in (columns, joint)
    ]
    has = draws[0] >= 0
    np.testing.assert_array_equal(has, draws[1] >= 0)
    np.testing.assert_array_equal(joint[draws[0][has]], joint[has])


def test_labels_and_codes_give_the_same_partners(rng):
    codes, failing = rng.integers(0, 5, 300), rng.random(300) < 0.5
    names = np.array(["b", "a", "e", "d", "c"])[codes]
    first = match_partners(codes, failing, rng=np.random.default_rng(1))
    second = match_partners(names, failing, rng=np.random.default_rng(1))
    np.testing.assert_array_equal(first, second)


def test_cells_of_unknown_state_have_no_partner_and_are_nobodys(rng):
    table = make_table()
    observed = rng.random(200) < 0.5
    partner = match_partners(table.perturbation, table.failing, observed=observed, rng=rng)
    assert (partner[~observed] == -1).all()
    assert observed[partner[partner >= 0]].all()


def test_no_cells_no_partners(rng):
    assert match_partners([], np.zeros(0, bool), rng=rng).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"artifact_state": [True]}, "artifact_state"),
        ({"artifact_state": [0.5, 0, 1]}, "artifact_state"),
        ({"eligible": [0, 1, 2]}, "eligible"),
        ({"covariate_ids": [0, 1]}, "covariate_ids"),
        ({"perturbation_ids": np.eye(3)}, "one label or code per cell"),
    ],
)
def test_arrays_of_the_wrong_shape_are_refused(arguments, words, rng):
    default = {"perturbation_ids": ["A", "A", "B"], "artifact_state": [True, False, True]}
    with pytest.raises(DataError, match=words):
        match_partners(**{**default, **arguments}, rng=rng)
