"""The number of threads that torch computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["torch_threads_kept"]


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Run a block, or a function that this decorates, and restore torch's number of threads.

    numba, which parts of scanpy run on, sets the number of OpenMP threads to that of the cores for
    whoever comes after it. Of several processes that share the cores, each then waits for others.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
