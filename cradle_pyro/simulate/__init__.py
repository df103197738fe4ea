"""Screens with known truth: simulated ones, and real ones with known artifacts added."""

from __future__ import annotations

from cradle_pyro.simulate.corrupt import corrupt
from cradle_pyro.simulate.perturbseq import ARTIFACT_KINDS, simulate_perturbseq

__all__ = ["ARTIFACT_KINDS", "corrupt", "simulate_perturbseq"]
