"""Work on the counts alone, done once where a guide is run several times on the same cells."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["declare_rows", "done_once", "reused"]


class _Rows(NamedTuple):
    """A tensor that holds some rows of another."""

    part: Tensor
    whole: Tensor
    rows: Tensor


class _Done(NamedTuple):
    """Results with what they were made of. No other tensor has the id of one that is kept here."""

    results: dict[Hashable, tuple[Sequence[Tensor], Tensor]]
    rows: dict[int, _Rows]


_DONE: ContextVar[_Done | None] = ContextVar("work done on counts", default=None)


@contextmanager
def reused() -> Iterator[None]:
    """Keep what :func:`done_once` returns until the end of the block, which is one step's loss.

    Parameters and counts must not change within.
    """
    token = _DONE.set(_Done({}, {}))
    try:
        yield
    finally:
        _DONE.reset(token)


def declare_rows(part: Tensor, whole: Tensor, rows: Tensor) -> None:
    """Say that `part` is ``whole[rows]``, so that work done on `whole` need not be repeated."""
    done = _DONE.get()
    if done is not None:
        done.rows[id(part)] = _Rows(part, whole, rows)


def done_once(work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``work(*inputs)``; within :func:`reused`, do it once for the same tensors.

    Parameters
    ----------
    work
        A function of cells that treats each of them, a row of every input, alone.
    inputs
        First dimension: cells.
    """
    done = _DONE.get()
    if done is None:
        return work(*inputs)
    key = _key(work, inputs)
    if key not in done.results:
        done.results[key] = inputs, _of_the_whole(done, work, inputs)
    return done.results[key][1]


def _of_the_whole(done: _Done, work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return rows of a result where `inputs` are those rows of what it was made of."""
    origins = [done.rows[id(value)] for value in inputs if id(value) in done.rows]
    known = _key(work, [origin.whole for origin in origins])
    same_rows = len({id(origin.rows) for origin in origins}) == 1
    if len(origins) < len(inputs) or not same_rows or known not in done.results:
        return work(*inputs)
    whole, rows = done.results[known][1], origins[0].rows
    part = whole[rows]
    declare_rows(part, whole, rows)
    return part


def _key(work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Hashable:
    return (torch.is_grad_enabled(), work, *map(id, inputs))
