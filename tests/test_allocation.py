"""Freed memory is kept inside the block, and given back after it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import os, sys
import torch
from contextlib import nullcontext
from cradle_pyro.inference.allocation import freed_memory_kept

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

torch.ones(10)
start = resident()
with freed_memory_kept() if sys.argv[1] == "kept" else nullcontext():
    large = torch.ones(25_000_000)
    del large
    inside = resident() - start
print(inside, resident() - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize(("mode", "least", "most"), [("kept", 90, 200), ("usual", -10, 20)])
def test_freed_memory_stays_with_the_process_only_inside_the_block(mode, least, most):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=True
    )
    inside, after = map(float, done.stdout.split())
    assert least < inside < most
    assert after < 20


def test_another_c_library_is_left_alone(monkeypatch):
    from cradle_pyro.inference import allocation

    called = []

    class Library:
        malloc_trim = called.append  # and no mallopt

    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda _: Library)
    with allocation.freed_memory_kept():
        pass
    assert not called
