"""Blocks of large arrays that a core's cache holds, for work that reads each block many times."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TypeAlias

from torch import Tensor

__all__ = ["Block", "cache_blocks"]

Block: TypeAlias = tuple[int | slice, ...]

_ELEMENTS = 1 << 17  # half a megabyte in single precision


def cache_blocks(values: Tensor) -> Iterator[Block]:
    """Yield the places of blocks of rows; a single one, of everything, on a GPU.

    Parameters
    ----------
    values
        Shape (..., rows, columns).

    Yields
    ------
    tuple
        An index of `values` without its last dimension.
    """
    if values.dim() < 2 or values.is_cuda or values.numel() <= _ELEMENTS:
        yield (slice(None),) * max(values.dim() - 1, 0)
        return
    *leading, n_rows, n_columns = values.shape
    step = max(_ELEMENTS // n_columns, 1)
    for start in range(0, n_rows, step):
        for first in product(*map(range, leading)):
            yield (*first, slice(start, start + step))
