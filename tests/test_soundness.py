"""Soundness metrics on arrays whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.soundness import (
    composition,
    control_effectiveness,
    effectiveness,
    minimality,
    reversibility,
)

N_GENES = 12


def make_cells(
    rng: np.random.Generator, labels: np.ndarray, *, fold: float = 8.0, depth: float = 400.0
) -> np.ndarray:
    """Poisson counts; cells of class k (0: none) have gene k multiplied by `fold`."""
    rate = np.linspace(1.0, 2.0, N_GENES) * np.ones((len(labels), 1))
    marked = np.flatnonzero(labels > 0)
    rate[marked, labels[marked]] *= fold
    rate /= rate.sum(axis=1, keepdims=True)
    return rng.poisson(depth * rate)


def make_labels(sizes: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


# --- composition and reversibility ---------------------------------------------------------------


@pytest.mark.parametrize("metric", [composition, reversibility])
def test_equal_cells_have_not_changed(metric, rng: np.random.Generator) -> None:
    counts = rng.poisson(2.0, size=(6, 5))
    counts[0] = 0
    assert metric(counts, counts.copy()) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("metric", [composition, reversibility])
def test_change_of_a_hand_made_example(metric) -> None:
    observed = np.array([[1, 1, 2], [0, 3, 3], [0, 0, 5]])
    other = np.array([[1, 1, 2], [3, 0, 3], [0, 0, 9]])
    change = metric(observed, other)
    assert change.entries == pytest.approx(6 / 9)
    assert change.cells == pytest.approx(1 / 3)
    # The second cell swaps two halves; the third has another depth but the same fractions.
    assert change.difference == pytest.approx(2 * np.log1p(1e4 / 2) / 9)
    lognorm = metric(observed, other, values="lognorm")
    assert lognorm == (change.entries, change.cells, pytest.approx(10 / 9))


def test_wrong_cells_are_errors() -> None:
    ones = np.ones((2, 3))
    with pytest.raises(DataError, match=r"\(2, 3\).*\(1, 3\)"):
        composition(ones, ones[:1])
    with pytest.raises(DataError, match="1 of 6 values are negative or not finite"):
        composition(ones, np.array([[1, 1, np.nan], [1, 1, 1]]))
    with pytest.raises(DataError, match=r"found \(0, 3\)"):
        reversibility(ones[:0], ones[:0])


# --- effectiveness -------------------------------------------------------------------------------


def test_cells_that_became_what_was_intended_are_read_so(rng: np.random.Generator) -> None:
    real_labels = make_labels((90, 30))
    real = make_cells(rng, real_labels)
    made, factual = make_cells(rng, np.zeros(40, int)), make_cells(rng, np.ones(40, int))
    result = effectiveness(real, real_labels, made, np.zeros(40, int), factual=factual)
    assert (result.read, result.before, result.real) == (1.0, 0.0, 1.0)
    assert (result.auroc, result.real_auroc) == (1.0, 1.0)
    assert (result.chance, result.n) == (0.5, 40)


def test_the_reader_learns_from_real_cells_alone(rng: np.random.Generator) -> None:
    """Counterfactual cells that did not change keep being read as what they are."""
    real_labels = make_labels((60, 60))
    real = make_cells(rng, real_labels)
    intended = make_labels((60, 60))
    unchanged = make_cells(rng, 1 - intended)
    result = effectiveness(real, real_labels, unchanged, intended, factual=unchanged)
    # A reader that saw these cells with their intended labels would find them readable.
    assert result.read == result.before == 0.0
    assert result.auroc == 0.0
    assert result.real == 1.0
    # Nor do they move what the reader makes of others.
    alone = effectiveness(real, real_labels, real[:1], intended[:1])
    assert (alone.read, alone.real_auroc) == (1.0, result.real_auroc)


def test_real_cells_without_signal_are_read_at_chance(rng: np.random.Generator) -> None:
    """The ceiling is cross-validated: a reader that remembers its cells would score far higher."""
    real_labels = make_labels((60, 60))
    real = np.hstack([make_cells(rng, np.zeros(120, int)) for _ in range(4)])
    made = np.hstack([make_cells(rng, np.zeros(400, int)) for _ in range(4)])
    result = effectiveness(real, real_labels, made, make_labels((200, 200)))
    assert result.chance == 0.5
    assert result.real == pytest.approx(0.5, abs=0.2)
    assert result.real_auroc == pytest.approx(0.5, abs=0.2)
    assert result.auroc == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("label", [0, 1])
def test_a_common_class_is_not_read_by_default(rng: np.random.Generator, label: int) -> None:
    real_labels = make_labels((1000, 100))
    real = make_cells(rng, np.zeros(1100, int))
    made = make_cells(rng, np.zeros(400, int))
    result = effectiveness(real, real_labels, made, np.full(400, label))
    assert (result.read, result.real) == pytest.approx((0.5, 0.5), abs=0.2)


def test_the_ceiling_weighs_classes_as_intended(rng: np.random.Generator) -> None:
    """Class 2 looks like class 0, class 1 does not: what is intended decides the ceiling."""
    real_labels = make_labels((60, 60, 60))
    real = make_cells(rng, np.where(real_labels == 1, 1, 0))
    made = make_cells(rng, np.ones(20, int))
    easy = effectiveness(real, real_labels, made, np.full(20, 1))
    hard = effectiveness(real, real_labels, made, np.full(20, 2))
    assert (easy.read, easy.real, easy.auroc, easy.real_auroc) == (1.0, 1.0, 1.0, 1.0)
    assert hard.read == 0.0
    assert hard.real == pytest.approx(0.5, abs=0.2)
    assert easy.chance == pytest.approx(1 / 3)
    both = effectiveness(real, real_labels, made, np.repeat([1, 2], [15, 5]))
    assert both.read == 0.75
    assert both.real == pytest.approx(0.75 * easy.real + 0.25 * hard.real)
    assert np.isnan([both.auroc, both.real_auroc]).all()


def test_auroc_of_both_classes_is_that_of_the_reader(rng: np.random.Generator) -> None:
    """With a weak mark, AUROC lies between 0.5 and 1 and agrees with the score that is optimal."""
    real_labels = make_labels((600, 600))
    real = make_cells(rng, real_labels, fold=1.4, depth=150)
    intended = make_labels((600, 600))
    made = make_cells(rng, intended, fold=1.4, depth=150)
    result = effectiveness(real, real_labels, made, intended)
    best = roc_auc_score(intended, made[:, 1] / made.sum(axis=1))
    assert 0.6 < best < 0.9
    assert result.auroc == pytest.approx(best, abs=0.03)
    assert result.real_auroc == pytest.approx(best, abs=0.05)


def test_one_intended_class_is_held_against_real_cells_of_the_others(
    rng: np.random.Generator,
) -> None:
    real_labels = make_labels((400, 400))
    real = make_cells(rng, real_labels, fold=1.4, depth=150)
    like_real = make_cells(rng, np.zeros(400, int), fold=1.4, depth=150)
    untouched = make_cells(rng, np.ones(400, int), fold=1.4, depth=150)
    intended = np.zeros(400, int)
    good = effectiveness(real, real_labels, like_real, intended)
    assert good.auroc == pytest.approx(good.real_auroc, abs=0.05)
    bad = effectiveness(real, real_labels, untouched, intended)
    assert bad.auroc == pytest.approx(0.5, abs=0.05)
    assert good.auroc > 0.6


def test_many_genes_are_read_by_components_of_standardised_profiles(
    rng: np.random.Generator,
) -> None:
    """A nuisance is the first component, the label the second; one wild gene is neither."""
    labels = make_labels((60, 60))
    nuisance = rng.normal(size=(120, 1)) + 0.3 * rng.normal(size=(120, 40))
    signal = 2.0 * labels[:, None] + 0.3 * rng.normal(size=(120, 20))
    wild = 100.0 * rng.normal(size=(120, 1))
    cells = np.hstack([nuisance, signal, wild])
    real, made = cells[::2], cells[1::2]

    def read(n_components: int) -> float:
        result = effectiveness(
            real, labels[::2], made, labels[1::2], values="lognorm", n_components=n_components
        )
        return result.read

    assert read(1) < 0.7
    assert read(2) == 1.0


def test_few_cells_of_many_genes_are_read(rng: np.random.Generator) -> None:
    labels = make_labels((5, 5, 6))
    cells = np.hstack([make_cells(rng, labels) for _ in range(9)])
    assert effectiveness(cells, labels, cells, labels).read == 1.0


def test_the_same_seed_gives_the_same_reading(rng: np.random.Generator) -> None:
    labels = make_labels((40, 40))
    cells = make_cells(rng, labels, fold=1.5)
    first, second = (
        effectiveness(cells, labels, cells, labels, factual=cells, n_components=5) for _ in range(2)
    )
    assert first == second


def test_labels_may_be_words(rng: np.random.Generator) -> None:
    labels = np.array(["control", "A"])
    codes = make_labels((30, 30))
    made = make_cells(rng, np.zeros(5, int))
    result = effectiveness(make_cells(rng, codes), labels[codes], made, np.full(5, "control"))
    assert (result.read, result.auroc) == (1.0, 1.0)


def test_readers_that_cannot_learn_are_errors(rng: np.random.Generator) -> None:
    labels = make_labels((10, 10))
    real = make_cells(rng, labels)
    with pytest.raises(DataError, match=r"shows what was intended: '7'"):
        effectiveness(real, labels, real[:2], np.array([0, 7]))
    with pytest.raises(DataError, match=r"too small: '1 \(4\)'"):
        effectiveness(real[:14], labels[:14], real, labels)
    with pytest.raises(DataError, match="found 1, too small: none"):
        effectiveness(real[:10], labels[:10], real, labels)
    with pytest.raises(DataError, match=r"20 cells, labels of shape \(19,\)"):
        effectiveness(real, labels[:-1], real, labels)
    with pytest.raises(DataError, match=r"same genes, found 12 and 11"):
        effectiveness(real, labels, real[:, 1:], labels)
    with pytest.raises(DataError, match=r"\(1, 12\)"):
        effectiveness(real, labels, real, labels, factual=real[:1])


def test_each_perturbation_is_read_against_control_by_itself(rng: np.random.Generator) -> None:
    names = np.array(["control", "A", "B", "rare"])
    codes = make_labels((60, 40, 40, 4))
    real, real_labels = make_cells(rng, codes), names[codes]
    before = make_labels((0, 30, 10, 5))
    # All of A became controls, none of B did; nothing is known of the rare one.
    made = make_cells(rng, np.where(before == 1, 0, before))
    factual = make_cells(rng, before)
    result = control_effectiveness(
        real, real_labels, made, names[before], control="control", factual=factual
    )
    assert (result.read, result.before, result.real, result.chance) == (0.75, 0.0, 1.0, 0.5)
    # Cells of B are held against real cells of B: not told apart.
    assert result.auroc == pytest.approx(0.75 * 1.0 + 0.25 * 0.5, abs=0.1)
    assert result.real_auroc == 1.0
    assert result.n == 40
    with pytest.raises(DataError, match="None of 'rare' is a perturbation with 5 real cells"):
        control_effectiveness(real, real_labels, made[-5:], names[before][-5:], control="control")


# --- minimality ----------------------------------------------------------------------------------


def test_minimality_of_a_hand_made_example() -> None:
    factual = np.array([[3e-4, 0.0, 1e-4], [0.0, 7e-4, 1e-4]])
    other = np.array([[7e-4, 1e-4, 1e-4], [0.0, 3e-4, 7e-4]])
    # |log2| changes: [[1, 1, 0], [0, 1, 2]].
    by_gene = minimality(factual, other, np.array([True, False, False]))
    assert by_gene == (pytest.approx(1.0), pytest.approx(0.5))
    by_cell = minimality(factual, other, np.array([[1, 1, 0], [0, 1, 0]], dtype=bool))
    assert by_cell == (pytest.approx(2 / 3), pytest.approx(1.0))
    everything = minimality(factual, other, np.ones(3, dtype=bool))
    assert np.isnan(everything.untouched)
    assert everything.touched == pytest.approx(5 / 6)


def test_wrong_touched_genes_are_errors() -> None:
    ones = np.ones((2, 3))
    with pytest.raises(DataError, match=r"found float64 of \(3,\)"):
        minimality(ones, ones, np.ones(3))
    with pytest.raises(DataError, match=r"found bool of \(2,\)"):
        minimality(ones, ones, np.ones(2, dtype=bool))
    with pytest.raises(DataError, match="The same cells and genes"):
        minimality(ones, ones[:1], np.ones(3, dtype=bool))
