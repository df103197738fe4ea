"""Screens with known truth: simulated ones, and real ones with known artifacts added."""

from __future__ import annotations

from cradle_pyro.simulate.perturbseq import simulate_perturbseq

__all__ = ["simulate_perturbseq"]
