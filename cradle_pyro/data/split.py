"""Assign cells to training, validation and test: by cell, combination, perturbation or column.

All functions return one array of ``"train"``, ``"val"`` and ``"test"``, in the order of the cells.
What is held out depends on the set of labels and the seed only, not on the order of the cells or
of the names within a label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cradle_pyro.data.encode import control_names, split_label
from cradle_pyro.errors import DataError, near, shown

__all__ = [
    "FRACTIONS",
    "SPLITS",
    "split_cells",
    "split_column",
    "split_combinations",
    "split_perturbations",
]

SPLITS: Final = ("train", "val", "test")
FRACTIONS: Final = (0.64, 0.16, 0.20)


def split_cells(
    n_cells: int,
    *,
    seed: int,
    fractions: Sequence[float] = FRACTIONS,
    stratify: ArrayLike | None = None,
) -> NDArray[np.str_]:
    """Return a random split of cells, optionally with the same fractions in each stratum.

    Parameters
    ----------
    n_cells
        Number of cells.
    seed
        Seed of the split.
    fractions
        Shares of training, validation and test, each >= 0, with sum one and training > 0. The
        sizes are the shares rounded by the largest remainder, so they add up to `n_cells`.
    stratify
        Label of each cell, shape (cells,). Within a label each share is kept to within about one
        cell; labels with one or two cells are placed at random.

    Returns
    -------
    ndarray of str
        ``"train"``, ``"val"`` or ``"test"`` per cell, shape (cells,).

    Raises
    ------
    DataError
        If there are no cells, the fractions are impossible, or `stratify` has another length.

    Examples
    --------
    >>> split = split_cells(100, seed=0)
    >>> [int((split == name).sum()) for name in SPLITS]
    [64, 16, 20]
    """
    shares = _checked_fractions(fractions)
    if n_cells < 1:
        raise DataError(f"A split needs at least one cell, found {n_cells}.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(n_cells)
    if stratify is not None:
        codes = _codes(stratify)
        if len(codes) != n_cells:
            raise DataError(
                f"stratify must have one label per cell ({n_cells}), found {len(codes)}."
            )
        # Labels in random order: else the names of rare labels would decide where they fall.
        rank = rng.permutation(int(codes.max()) + 1)[codes]
        order = order[np.argsort(rank[order], kind="stable")]
    split = np.empty(n_cells, dtype="<U5")
    split[order] = _interleaved(n_cells, shares)
    return split


def split_combinations(
    labels: ArrayLike,
    *,
    seed: int,
    held_out: float | Sequence[str] = 0.25,
    fractions: Sequence[float] = FRACTIONS,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
) -> NDArray[np.str_]:
    """Return a split in which whole combinations are in test, and other cells split at random.

    Parameters
    ----------
    labels
        Perturbation label of each cell, for example ``"KLF1+CEBPA"``; shape (cells,).
    seed
        Seed of the choice of combinations and of the cell split.
    held_out
        Share of the combinations (labels of two or more perturbations) to hold out, or their
        labels, for example ``["KLF1+CEBPA"]`` to leave one pair out. A random choice never takes
        the last label that contains a perturbation, so that each stays seen; it may therefore
        hold out fewer combinations than asked.
    fractions
        Shares of the remaining cells, split at random within each label (see `split_cells`), so
        that seen perturbations are scored on test cells too.
    control, delimiter
        Label or labels of unperturbed cells, and what joins the names in a label.

    Returns
    -------
    ndarray of str
        ``"train"``, ``"val"`` or ``"test"`` per cell, shape (cells,).

    Raises
    ------
    DataError
        If there are no combinations, or a label to hold out is not one.

    Examples
    --------
    >>> labels = ["control", "A", "B", "A+B"] * 5
    >>> split = split_combinations(labels, held_out=["B+A"], seed=0)
    >>> set(split[3::4].tolist())
    {'test'}
    """
    codes, members = _parsed(labels, control, delimiter)
    combinations = sorted({names for names in members if len(names) > 1})
    if not combinations:
        raise DataError(
            f"Held-out combinations need labels of two or more names joined by {delimiter!r}, "
            f"found {shown(dict.fromkeys(delimiter.join(names) for names in members))}. "
            "Give the delimiter of your labels, or use split_cells or split_perturbations."
        )
    rng = np.random.default_rng(seed)
    if isinstance(held_out, float | int):
        n_held = _n_held_out(held_out, len(combinations))
        chosen = _choose_combinations(combinations, set(members), n_held, rng)
    else:
        chosen = _named_combinations(held_out, combinations, control, delimiter)
    held = np.array([names in chosen for names in members], dtype=bool)[codes]
    return _hold_out(held, codes, fractions, seed)


def split_perturbations(
    labels: ArrayLike,
    *,
    seed: int,
    held_out: float | Sequence[str] = 0.25,
    fractions: Sequence[float] = FRACTIONS,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
) -> NDArray[np.str_]:
    """Return a split in which all cells that carry a held-out perturbation are in test.

    Parameters
    ----------
    labels
        Perturbation label of each cell, shape (cells,).
    seed
        Seed of the choice of perturbations and of the cell split.
    held_out
        Share of the perturbations (single names, never a control) to hold out, or their names.
    fractions
        Shares of the remaining cells, split at random within each label (see `split_cells`).
    control, delimiter
        Label or labels of unperturbed cells, and what joins the names in a label.

    Returns
    -------
    ndarray of str
        ``"train"``, ``"val"`` or ``"test"`` per cell, shape (cells,).

    Raises
    ------
    DataError
        If there are no perturbations, a name is unknown or a control, or nothing is left to train
        on.

    Examples
    --------
    >>> labels = ["control", "A", "B", "A+B"] * 5
    >>> split = split_perturbations(labels, held_out=["B"], seed=0)
    >>> set(split[2::4].tolist()) | set(split[3::4].tolist())
    {'test'}
    """
    codes, members = _parsed(labels, control, delimiter)
    known = sorted({name for names in members for name in names})
    if not known:
        raise DataError(
            "Held-out perturbations need perturbed cells, found controls only "
            f"({shown(control_names(control))}). Check the label column and `control`."
        )
    rng = np.random.default_rng(seed)
    if isinstance(held_out, float | int):
        n_held = _n_held_out(held_out, len(known))
        chosen = {known[i] for i in rng.permutation(len(known))[:n_held]}
    else:
        chosen = _named_perturbations(held_out, known, control)
    held = np.array([bool(chosen & set(names)) for names in members], dtype=bool)[codes]
    return _hold_out(held, codes, fractions, seed)


def split_column(values: ArrayLike, *, names: Mapping[str, str] | None = None) -> NDArray[np.str_]:
    """Return a split given as a column, checked.

    Parameters
    ----------
    values
        Split of each cell, shape (cells,), for example ``adata.obs["split"]``.
    names
        Translates other words, for example ``{"ood": "test", "valid": "val"}``.

    Returns
    -------
    ndarray of str
        ``"train"``, ``"val"`` or ``"test"`` per cell, shape (cells,).

    Raises
    ------
    DataError
        If a value is missing or is none of the three words, or no cell is in training.

    Examples
    --------
    >>> split_column(["train", "ood"], names={"ood": "test"}).tolist()
    ['train', 'test']
    """
    column = pd.Series(np.asarray(values, dtype=object))
    n_missing = int(column.isna().sum())
    if n_missing:
        raise DataError(
            f"Each cell needs a split ({shown(SPLITS)}); {n_missing} of {len(column)} have none. "
            "Fill them in or drop these cells."
        )
    column = column.astype(str).replace(dict(names or {}))
    unknown = sorted(set(column) - set(SPLITS))
    if unknown:
        raise DataError(
            f"A split column holds {shown(SPLITS)}, found {shown(unknown)}. Rename them, or give "
            "their meaning, for example names={'valid': 'val', 'ood': 'test'}."
        )
    if not (column == "train").any():
        raise DataError(f"A split needs training cells, found only {shown(sorted(set(column)))}.")
    return column.to_numpy().astype("<U5")


def _checked_fractions(fractions: Sequence[float]) -> NDArray[np.float64]:
    shares = np.asarray(fractions, dtype=np.float64)
    possible = (
        shares.shape == (3,) and bool(np.isfinite(shares).all()) and bool((shares >= 0).all())
    )
    if not possible or shares[0] <= 0 or abs(shares.sum() - 1) > 1e-6:
        raise DataError(
            "fractions are the shares of train, val and test: three numbers >= 0 with sum one and "
            f"train > 0; found {tuple(fractions)}."
        )
    return shares


def _interleaved(n_cells: int, shares: NDArray[np.float64]) -> NDArray[np.str_]:
    """Return the split words in exact numbers, each spread evenly over the positions.

    A run of consecutive positions (a stratum) then has each word in about its share.
    """
    exact = shares * n_cells
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: n_cells - sizes.sum()]] += 1
    keys = np.concatenate([(np.arange(size) + 0.5) / max(size, 1) for size in sizes])
    return np.repeat(np.array(SPLITS), sizes)[np.argsort(keys, kind="stable")]


def _codes(labels: ArrayLike) -> NDArray[np.intp]:
    return np.unique(np.asarray(labels).astype(str), return_inverse=True)[1]


def _parsed(
    labels: ArrayLike, control: str | Sequence[str], delimiter: str
) -> tuple[NDArray[np.intp], list[tuple[str, ...]]]:
    """Return codes of the cells into the sorted distinct name tuples, and these tuples."""
    column = np.asarray(labels, dtype=object)
    if column.ndim != 1 or len(column) == 0:
        raise DataError(f"A split needs one label per cell, found an array of {column.shape}.")
    n_missing = int(pd.isna(column).sum())
    if n_missing:
        raise DataError(
            f"Each cell needs a perturbation label; {n_missing} of {len(column)} have none. "
            "Fill them in or drop these cells."
        )
    distinct, inverse = np.unique(column.astype(str), return_inverse=True)
    tuples = [split_label(label, delimiter, control) for label in distinct]
    members = sorted(set(tuples))
    position = {names: i for i, names in enumerate(members)}
    return np.array([position[names] for names in tuples], dtype=np.intp)[inverse], members


def _n_held_out(share: float, n_labels: int) -> int:
    if not 0 < share < 1:
        raise DataError(f"held_out is a share between 0 and 1, or a list of labels; found {share}.")
    return max(1, round(share * n_labels))


def _choose_combinations(
    combinations: Sequence[tuple[str, ...]],
    labels: Iterable[tuple[str, ...]],
    n_held: int,
    rng: np.random.Generator,
) -> set[tuple[str, ...]]:
    """Return random combinations that leave each perturbation in at least one other label."""
    uses: dict[str, int] = {}
    for names in labels:
        for name in names:
            uses[name] = uses.get(name, 0) + 1
    chosen: set[tuple[str, ...]] = set()
    for i in rng.permutation(len(combinations)):
        names = combinations[i]
        if len(chosen) < n_held and all(uses[name] > 1 for name in names):
            chosen.add(names)
            for name in names:
                uses[name] -= 1
    if not chosen:
        raise DataError(
            "No combination can be held out: each has a perturbation found in no other label "
            f"({shown('+'.join(names) for names in combinations)}). Name those to hold out."
        )
    return chosen


def _named_combinations(
    held_out: Sequence[str],
    combinations: Sequence[tuple[str, ...]],
    control: str | Sequence[str],
    delimiter: str,
) -> set[tuple[str, ...]]:
    wanted = [held_out] if isinstance(held_out, str) else list(held_out)
    parsed = {label: split_label(label, delimiter, control) for label in wanted}
    known = set(combinations)
    unknown = [label for label, names in parsed.items() if names not in known]
    if unknown or not wanted:
        labels = [delimiter.join(names) for names in combinations]
        raise DataError(
            f"held_out names combinations of the data; {shown(unknown) or 'an empty list'} "
            f"is none{near(unknown[0], labels) if unknown else ''}. There are {len(labels)}: "
            f"{shown(labels)}."
        )
    return set(parsed.values())


def _named_perturbations(
    held_out: Sequence[str], known: Sequence[str], control: str | Sequence[str]
) -> set[str]:
    wanted = [held_out] if isinstance(held_out, str) else [str(name) for name in held_out]
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        raise DataError(
            f"held_out names single perturbations of the data, and no control "
            f"({shown(control_names(control))}); {shown(unknown) or 'an empty list'} is none"
            f"{near(unknown[0], known) if unknown else ''}. There are {len(known)}: {shown(known)}."
        )
    return set(wanted)


def _hold_out(
    held: NDArray[np.bool_], codes: NDArray[np.intp], fractions: Sequence[float], seed: int
) -> NDArray[np.str_]:
    """Return ``"test"`` for the held-out cells and a stratified random split of the others."""
    if held.all():
        raise DataError(
            f"All {len(held)} cells would be held out, and none is left to train on. "
            "Hold out fewer labels."
        )
    split = np.full(len(held), "test", dtype="<U5")
    split[~held] = split_cells(
        int((~held).sum()), seed=seed, fractions=fractions, stratify=codes[~held]
    )
    return split
