"""Splits: partitions with the asked fractions, held-out labels in test only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cradle_pyro.data.split import (
    FRACTIONS,
    SPLITS,
    split_cells,
    split_column,
    split_combinations,
    split_perturbations,
)
from cradle_pyro.errors import DataError

NAMES = ("control", "A", "B", "C", "D", "A+B", "A+C", "B+C", "C+D")
seeds = st.integers(0, 10_000)


def make_labels(n_cells: int = 900, names: tuple[str, ...] = NAMES, seed: int = 0) -> np.ndarray:
    labels = np.resize(np.array(names), n_cells)
    return np.random.default_rng(seed).permutation(labels)


def shares(split: np.ndarray) -> list[float]:
    return [float((split == name).mean()) for name in SPLITS]


@given(n_cells=st.integers(1, 500), seed=seeds)
def test_cell_split_has_exact_sizes(n_cells, seed):
    split = split_cells(n_cells, seed=seed)
    assert split.shape == (n_cells,)
    assert set(split) <= set(SPLITS)
    sizes = np.array(shares(split)) * n_cells
    assert (np.abs(sizes - np.array(FRACTIONS) * n_cells) < 1).all()


@given(seed=seeds, n_labels=st.integers(1, 20))
def test_stratified_split_keeps_the_fractions_in_each_label(seed, n_labels):
    labels = np.random.default_rng(seed).integers(0, n_labels, 400)
    split = split_cells(400, seed=seed, stratify=labels)
    for label in np.unique(labels):
        inside = split[labels == label]
        sizes = np.array(shares(inside)) * len(inside)
        assert (np.abs(sizes - np.array(FRACTIONS) * len(inside)) <= 1.5).all()


@pytest.mark.parametrize("labels", [np.repeat(np.arange(4), 5), np.arange(20)])
def test_every_cell_is_equally_likely_to_be_in_test(labels):
    in_test = np.mean(
        [split_cells(20, seed=seed, stratify=labels) == "test" for seed in range(2000)], axis=0
    )
    # Standard error 0.009: five of them.
    np.testing.assert_allclose(in_test, 0.2, atol=0.045)


def test_seed_decides():
    np.testing.assert_array_equal(split_cells(50, seed=4), split_cells(50, seed=4))
    assert (split_cells(50, seed=4) != split_cells(50, seed=5)).any()


@given(seed=seeds, held_out=st.floats(0.05, 0.9))
def test_held_out_combinations_are_in_test_and_nothing_else_is_held_out(seed, held_out):
    labels = make_labels()
    split = split_combinations(labels, held_out=held_out, seed=seed)
    by_label = {label: set(split[labels == label]) for label in NAMES}
    held = {label for label, parts in by_label.items() if parts == {"test"}}
    assert 1 <= len(held) <= max(1, round(held_out * 4))
    assert all("+" in label for label in held)
    for label in set(NAMES) - held:
        np.testing.assert_allclose(shares(split[labels == label]), FRACTIONS, atol=0.02)


@given(seed=seeds)
def test_a_random_choice_of_combinations_leaves_each_perturbation_seen(seed):
    # Y occurs in one combination only, which can never be held out; X in two, of which one can.
    labels = make_labels(names=("control", "A", "B", "A+B", "X+Y", "A+X", "Z+A", "Z+B"))
    split = split_combinations(labels, held_out=0.9, seed=seed)
    trained = {name for label in set(labels[split == "train"]) for name in label.split("+")}
    assert {"A", "B", "X", "Y", "Z"} <= trained


def test_leave_one_pair_out_in_any_order_of_names():
    labels = make_labels()
    split = split_combinations(labels, held_out=["C+A"], seed=0)
    assert set(split[labels == "A+C"]) == {"test"}
    assert set(split[labels == "A+B"]) == set(SPLITS)


@given(seed=seeds)
def test_order_of_names_in_labels_is_irrelevant(seed):
    labels = make_labels()
    turned = np.array(["+".join(reversed(label.split("+"))) for label in labels])
    for function in (split_combinations, split_perturbations):
        np.testing.assert_array_equal(function(labels, seed=seed), function(turned, seed=seed))


@given(seed=seeds)
def test_order_of_cells_does_not_change_what_is_held_out(seed):
    first, second = make_labels(seed=1), make_labels(seed=2)
    for function in (split_combinations, split_perturbations):
        held = [
            {label for label in NAMES if set(split[labels == label]) == {"test"}}
            for labels in (first, second)
            for split in [function(labels, seed=seed)]
        ]
        assert held[0] == held[1]


@given(seed=seeds, held_out=st.floats(0.1, 0.6))
def test_held_out_perturbations_are_in_test_wherever_they_occur(seed, held_out):
    labels = make_labels()
    split = split_perturbations(labels, held_out=held_out, seed=seed)
    trained = {name for label in set(labels[split != "test"]) for name in label.split("+")}
    held = set("ABCD") - trained
    assert len(held) == max(1, round(held_out * 4))
    assert "control" in trained
    np.testing.assert_allclose(shares(split[labels == "control"]), FRACTIONS, atol=0.02)
    for label in NAMES:
        if held & set(label.split("+")):
            assert set(split[labels == label]) == {"test"}


def test_named_perturbations_with_another_delimiter_and_two_controls():
    labels = np.resize(np.array(["NT1", "NT2", "A|B", "B|NT1", "A"]), 200)
    split = split_perturbations(
        labels, held_out=["B"], control=["NT1", "NT2"], delimiter="|", seed=0
    )
    assert set(split[np.isin(labels, ["A|B", "B|NT1"])]) == {"test"}
    assert set(split[labels == "NT2"]) == set(SPLITS)


def test_given_column_is_kept_and_translated():
    column = np.array(["train", "ood", "val", "test"], dtype=object)
    split = split_column(column, names={"ood": "test"})
    assert split.tolist() == ["train", "test", "val", "test"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: split_cells(0, seed=0), "at least one cell"),
        (lambda: split_cells(9, seed=0, fractions=(0.5, 0.2, 0.2)), "sum one"),
        (lambda: split_cells(9, seed=0, fractions=(0.0, 0.5, 0.5)), "train > 0"),
        (lambda: split_cells(9, seed=0, fractions=(0.5, 0.5)), "three numbers"),
        (lambda: split_cells(9, seed=0, stratify=["a"]), "one label per cell"),
        (lambda: split_combinations(["control", "A"], seed=0), "two or more names"),
        (lambda: split_combinations(["A+B", "A", "B"], seed=0, held_out=1.0), "between 0 and 1"),
        (lambda: split_combinations(["A+B", "A"], seed=0, held_out=["A"]), "names combinations"),
        (lambda: split_combinations(["A+B", "A"], seed=0, held_out=[]), "an empty list"),
        (lambda: split_combinations(["A+B"], seed=0), "No combination can be held out"),
        (lambda: split_perturbations(["control"] * 5, seed=0), "controls only"),
        (
            lambda: split_perturbations(["control", "KLF1"], seed=0, held_out=["KLF2"]),
            "did you mean 'KLF1'",
        ),
        (lambda: split_perturbations(["A", "B"], seed=0, held_out=["control"]), "no control"),
        (lambda: split_perturbations(["A", "A"], seed=0, held_out=["A"]), "none is left"),
        (lambda: split_perturbations(["A", None], seed=0), "1 of 2 have none"),
        (lambda: split_column(["train", "valid"]), "'valid'"),
        (lambda: split_column(["train", None]), "1 of 2 have none"),
        (lambda: split_column(["test", "val"]), "training cells"),
    ],
)
def test_impossible_splits_are_refused_with_a_reason(call, words):
    with pytest.raises(DataError, match=words):
        call()
