"""Arrays in, ArviZ object out: an InferenceData on ArviZ 0.2x, a DataTree on ArviZ 1.x.

Needs NumPy and ArviZ only, so that it also runs where there is no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["inference_data"]


def inference_data(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    *,
    coords: Mapping[str, Sequence[object] | np.ndarray],
    dims: Mapping[str, Sequence[str]],
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Return named arrays as the object that the installed ArviZ works on.

    Parameters
    ----------
    groups
        Group to variable to values. Shape (chains, draws, ...), but without the first two axes in
        the groups ``observed_data`` and ``constant_data``.
    coords
        Dimension to the labels along it.
    dims
        Variable to the names of its axes after chain and draw. A variable of ``log_likelihood``
        may have only the first of them.
    attrs
        Group to notes about it: strings and numbers.

    Returns
    -------
    InferenceData or DataTree
        By the major version of ArviZ: an ``arviz.InferenceData`` before 1, an ``xarray.DataTree``
        from 1 on. Groups are found by name in both, ``result["posterior"]``.

    Examples
    --------
    >>> draws = np.zeros((2, 50, 3))
    >>> result = inference_data(
    ...     {"posterior": {"depth_shift": draws}},
    ...     coords={"artifacts": ["low_counts", "high_mito", "doublet"]},
    ...     dims={"depth_shift": ["artifacts"]},
    ... )
    >>> dict(result["posterior"].sizes)
    {'chain': 2, 'draw': 50, 'artifacts': 3}
    """
    import arviz

    data = {group: dict(variables) for group, variables in groups.items()}
    names: dict[str, Any] = {
        "coords": dict(coords),
        "dims": {name: list(axes) for name, axes in dims.items()},
    }
    make: Any = arviz.from_dict  # whose signature depends on the version
    is_tree = int(arviz.__version__.split(".")[0]) >= 1
    result = make(data, **names) if is_tree else make(**data, **names)
    for group, notes in (attrs or {}).items():
        result[group].attrs.update(notes)
    return result
