"""Randomness without global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's random state set from `seed`, and restore the caller's afterwards.

    torch's distributions take no generator, so everything in the package that draws through them
    does so inside this context. NumPy code takes a ``numpy.random.Generator`` instead.

    Examples
    --------
    >>> before = torch.random.get_rng_state()
    >>> with seeded(0):
    ...     first = torch.rand(3)
    >>> with seeded(0):
    ...     second = torch.rand(3)
    >>> bool((first == second).all()), bool((torch.random.get_rng_state() == before).all())
    (True, True)
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
