"""Are counterfactuals sound: composition, reversibility, effectiveness, minimality; on arrays.

Counts are (cells, genes) arrays. Profiles are log(1 + 1e4 fraction), fractions of the cell's sum
over the genes given; log-normalised values are profiles already.

References
----------
Monteiro, Ribeiro, Pawlowski, Castro and Glocker, "Measuring axiomatic soundness of counterfactual
image models", ICLR 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from cradle_pyro.errors import DataError, shown
from cradle_pyro.types import SCALE

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

__all__ = [
    "FOLDS",
    "Change",
    "Effectiveness",
    "Minimality",
    "composition",
    "control_effectiveness",
    "effectiveness",
    "minimality",
    "out_of_fold",
    "reader_of",
    "reversibility",
]

Values = Literal["counts", "lognorm"]

FOLDS = 5


class Change(NamedTuple):
    """How far cells are from the cells they should equal.

    Parameters
    ----------
    entries
        Share of the cell x gene entries that are equal, in [0, 1]. Most entries of a screen are
        zero, so read it beside the next.
    cells
        Share of the cells equal in all genes.
    difference
        Mean absolute difference of the profiles, log(1 + 1e4 fraction).
    """

    entries: float
    cells: float
    difference: float


class Effectiveness(NamedTuple):
    """What a reader of real cells makes of counterfactual ones.

    Parameters
    ----------
    read
        Share of the counterfactual cells read as intended.
    before
        The same share of the factual cells they were made from; nan if not given.
    real
        Share of real cells read right, by readers that have not seen them; classes weighted as
        among the intended ones. The ceiling of `read`.
    auroc
        How well the reader's score tells the counterfactual cells apart by intended class. If one
        class alone is intended, the real cells of all other classes stand for the rest. nan when
        there are more than two classes and several of them are intended.
    real_auroc
        The same of real cells: the ceiling of `auroc`, whose floor is 0.5.
    chance
        What `read` would be if the counts said nothing: one over the number of classes, since the
        reader weighs classes alike.
    n
        Number of counterfactual cells that were read.
    """

    read: float
    before: float
    real: float
    auroc: float
    real_auroc: float
    chance: float
    n: int


class Minimality(NamedTuple):
    """How much an intervention changes.

    Parameters
    ----------
    untouched
        Mean absolute log2 change over the entries that it should leave alone; nan without any.
    touched
        The same over the entries that it should change.
    """

    untouched: float
    touched: float


def composition(
    observed: np.ndarray, null_counterfactual: np.ndarray, *, values: Values = "counts"
) -> Change:
    """Return how far a null intervention takes cells: nowhere, if the abduction is sound.

    Parameters
    ----------
    observed
        Counts of the cells, shape (cells, genes).
    null_counterfactual
        Counts of the same cells under do() or under do(factual), same shape.
    values
        ``"lognorm"`` when both hold log(1 + 1e4 fraction) instead.

    Raises
    ------
    DataError
        When the shapes differ, nothing is given, or a value is not finite.
    """
    return _change(observed, null_counterfactual, values)


def reversibility(
    observed: np.ndarray, there_and_back: np.ndarray, *, values: Values = "counts"
) -> Change:
    """Return how far cells are from themselves after an intervention and its reversal.

    With the noise of the first abduction kept, nowhere; with a fresh abduction of the
    counterfactual cell, as far as abduction is uncertain and wrong.

    Parameters
    ----------
    observed
        Counts of the cells, shape (cells, genes).
    there_and_back
        Counts of the same cells after both interventions, same shape.
    values
        ``"lognorm"`` when both hold log(1 + 1e4 fraction) instead.

    Raises
    ------
    DataError
        When the shapes differ, nothing is given, or a value is not finite.
    """
    return _change(observed, there_and_back, values)


def effectiveness(
    real: np.ndarray,
    real_labels: np.ndarray,
    counterfactual: np.ndarray,
    intended: np.ndarray,
    *,
    factual: np.ndarray | None = None,
    values: Values = "counts",
    n_components: int = 50,
    seed: int = 0,
) -> Effectiveness:
    """Return how often an independent reader sees in counterfactual cells what was intended.

    The reader is a logistic regression on standardised profiles (their principal components if
    there are many genes), with classes weighted alike. It learns from real cells alone.

    Parameters
    ----------
    real
        Counts of real cells that the model was not trained on and that the counterfactual cells
        were not made from, shape (real cells, genes).
    real_labels
        What they are, for example failing or not, or their perturbation; shape (real cells,).
    counterfactual
        Counts of the counterfactual cells, shape (cells, genes).
    intended
        What each was meant to become, among the real labels; shape (cells,).
    factual
        Counts of the cells they were made from, shape (cells, genes): what the reader says of
        them shows what the intervention added.
    values
        ``"lognorm"`` when the arrays hold log(1 + 1e4 fraction) instead.
    n_components
        With more genes than this, so many principal components are read.
    seed
        Seed of the folds and of the components.

    Raises
    ------
    DataError
        When shapes do not fit, there are fewer than two classes or five real cells of a class, or
        an intended class has no real cells.
    """
    real_labels, intended = np.asarray(real_labels), np.asarray(intended)
    real, made = _profiles(real, values), _profiles(counterfactual, values)
    _check_reading(real, real_labels, made, intended)
    classes = np.unique(real_labels)
    reader = reader_of(real.shape, n_components, seed)
    read = out_of_fold(reader, real, real_labels, seed)
    reader.fit(real, real_labels)
    score = reader.predict_proba(made)
    before = float("nan")
    if factual is not None:
        _same_shape(factual=np.asarray(factual), counterfactual=np.asarray(counterfactual))
        before = _agreement(reader.predict(_profiles(factual, values)), intended)
    right = classes[read.argmax(1)] == real_labels
    recall = {label: right[real_labels == label].mean() for label in classes}
    auroc, real_auroc = _aurocs(classes, read, real_labels, score, intended)
    return Effectiveness(
        read=_agreement(classes[score.argmax(1)], intended),
        before=before,
        real=float(np.mean([recall[label] for label in intended])),
        auroc=auroc,
        real_auroc=real_auroc,
        chance=1 / len(classes),
        n=len(made),
    )


def control_effectiveness(
    real: np.ndarray,
    real_labels: np.ndarray,
    counterfactual: np.ndarray,
    labels: np.ndarray,
    *,
    control: str,
    factual: np.ndarray | None = None,
    values: Values = "counts",
    n_components: int = 50,
    seed: int = 0,
) -> Effectiveness:
    """Return how often perturbed cells that were made controls are read as controls.

    Every perturbation has its own reader, of its real cells against real controls: one reader of
    all of them would learn little, since most perturbations change few genes.

    Parameters
    ----------
    real, counterfactual, factual, values, n_components, seed
        As in :func:`effectiveness`.
    real_labels
        Perturbation label of the real cells, controls included; shape (real cells,).
    labels
        Label that the counterfactual cells had before they were made controls; shape (cells,).
    control
        Label of a control.

    Returns
    -------
    Effectiveness
        Mean over the cells that could be read. Those whose label has fewer than five real cells
        are left out.

    Raises
    ------
    DataError
        When no label can be read, or as in :func:`effectiveness`.
    """
    real, counterfactual = np.asarray(real), np.asarray(counterfactual)
    real_labels, labels = np.asarray(real_labels), np.asarray(labels)
    found = []
    for label in np.unique(labels[labels != control]):
        if (real_labels == label).sum() < FOLDS:
            continue
        rows, own = np.isin(real_labels, (label, control)), labels == label
        result = effectiveness(
            real[rows],
            real_labels[rows] == control,
            counterfactual[own],
            np.ones(own.sum(), dtype=bool),
            factual=None if factual is None else np.asarray(factual)[own],
            values=values,
            n_components=n_components,
            seed=seed,
        )
        found.append(result)
    if not found:
        raise DataError(
            f"None of {shown(np.unique(labels))} is a perturbation with {FOLDS} real cells to "
            "learn from. Give more real cells."
        )
    sizes = [result.n for result in found]
    means = np.average(np.array(found), axis=0, weights=sizes)
    return Effectiveness._make([*means[:-1].tolist(), sum(sizes)])


def minimality(factual: np.ndarray, counterfactual: np.ndarray, touched: np.ndarray) -> Minimality:
    """Return how much genes change that an intervention does not touch, beside those it does.

    Parameters
    ----------
    factual, counterfactual
        Fractions (rates) of the same cells in both worlds, shape (cells, genes).
    touched
        Where a change is meant, bool; shape (genes,) or (cells, genes).

    Returns
    -------
    Minimality
        Means of | log2(1 + 1e4 counterfactual) - log2(1 + 1e4 factual) |.

    Raises
    ------
    DataError
        When shapes do not fit, nothing is given, or a value is negative or not finite.
    """
    factual, counterfactual = _checked(factual), _checked(counterfactual)
    _same_shape(factual=factual, counterfactual=counterfactual)
    touched = np.asarray(touched)
    if touched.dtype != bool or touched.shape not in (factual.shape, factual.shape[1:]):
        raise DataError(
            f"'touched' must be bool of shape (genes,) or (cells, genes), here "
            f"{factual.shape[1:]} or {factual.shape}; found {touched.dtype} of {touched.shape}."
        )
    change = np.abs(np.log1p(SCALE * counterfactual) - np.log1p(SCALE * factual)) / np.log(2)
    touched = np.broadcast_to(touched, change.shape)
    return Minimality(_mean(change[~touched]), _mean(change[touched]))


def _change(observed: np.ndarray, other: np.ndarray, values: Values) -> Change:
    observed, other = _checked(observed, values), _checked(other, values)
    _same_shape(observed=observed, counterfactual=other)
    equal = observed == other
    distance = np.abs(_profiles(observed, values) - _profiles(other, values))
    return Change(_mean(equal), _mean(equal.all(axis=1)), _mean(distance))


def reader_of(shape: tuple[int, ...], n_components: int, seed: int) -> Pipeline:
    """Return an untrained classifier of profiles."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n_cells, n_genes = shape
    steps = [StandardScaler()]
    if n_genes > n_components:
        # The readers of the folds have no more components than cells.
        n_kept = min(n_components, n_cells // 2)
        steps += [PCA(n_kept, whiten=True, svd_solver="randomized", random_state=seed)]
    return make_pipeline(*steps, LogisticRegression(class_weight="balanced", max_iter=5000))


def out_of_fold(reader: Pipeline, real: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Return class probabilities of real cells by readers that have not seen them."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return np.asarray(cross_val_predict(reader, real, labels, cv=folds, method="predict_proba"))


def _aurocs(
    classes: np.ndarray,
    real_score: np.ndarray,
    real_labels: np.ndarray,
    score: np.ndarray,
    intended: np.ndarray,
) -> tuple[float, float]:
    """Return AUROC of counterfactual cells by intended class, and of real cells."""
    from sklearn.metrics import roc_auc_score

    wanted = np.unique(intended)
    if len(wanted) > 1 and len(classes) > 2:
        return float("nan"), float("nan")
    positive = int(np.flatnonzero(classes == wanted[-1])[0])
    is_real = real_labels == classes[positive]
    is_made, made_score = intended == classes[positive], score[:, positive]
    if len(wanted) == 1:
        others = real_score[~is_real, positive]
        is_made = np.concatenate([is_made, np.zeros(len(others), dtype=bool)])
        made_score = np.concatenate([made_score, others])
    return (
        float(roc_auc_score(is_made, made_score)),
        float(roc_auc_score(is_real, real_score[:, positive])),
    )


def _check_reading(
    real: np.ndarray, real_labels: np.ndarray, made: np.ndarray, intended: np.ndarray
) -> None:
    if real.shape[1] != made.shape[1]:
        raise DataError(
            f"Real and counterfactual cells need the same genes, found {real.shape[1]} and "
            f"{made.shape[1]}; align them."
        )
    for name, labels, cells in (("real", real_labels, real), ("intended", intended, made)):
        if labels.shape != cells.shape[:1]:
            raise DataError(
                f"One {name} label per cell is required: {len(cells)} cells, labels of shape "
                f"{labels.shape}."
            )
    classes, sizes = np.unique(real_labels, return_counts=True)
    few = [f"{label} ({size})" for label, size in zip(classes, sizes, strict=True) if size < FOLDS]
    if len(classes) < 2 or few:
        raise DataError(
            f"A reader needs two classes with {FOLDS} real cells each; found {len(classes)}, too "
            f"small: {shown(few) or 'none'}. Merge or leave out small classes."
        )
    unknown = np.setdiff1d(intended, classes)
    if len(unknown):
        raise DataError(
            f"No real cell shows what was intended: {shown(unknown)}. Known: {shown(classes)}."
        )


def _profiles(values: np.ndarray, kind: Values) -> np.ndarray:
    """Return log(1 + 1e4 fraction), shape (cells, genes); empty cells are zero."""
    checked = _checked(values, kind)
    if kind == "lognorm":
        return checked
    totals = checked.sum(axis=1, keepdims=True)
    return np.log1p(SCALE * checked / np.where(totals > 0, totals, 1.0))


def _checked(values: np.ndarray, kind: Values = "counts") -> np.ndarray:
    checked = np.asarray(values, dtype=np.float64)
    if checked.ndim != 2 or checked.size == 0:
        raise DataError(
            f"An array (cells, genes) with at least one entry is required, found {checked.shape}."
        )
    wrong = ~np.isfinite(checked)
    if kind == "counts":
        wrong |= checked < 0
    if wrong.any():
        raise DataError(f"{wrong.sum()} of {checked.size} values are negative or not finite.")
    return checked


def _same_shape(**arrays: np.ndarray) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"The same cells and genes are required, found shapes {shapes}.")


def _agreement(read: np.ndarray, intended: np.ndarray) -> float:
    return _mean(read == intended)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
