"""CRADLE in Pyro: perturbation effects of single-cell CRISPR screens, freed from artifacts.

The public surface; everything is imported on first use, so that importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cradle_pyro.config import Config
    from cradle_pyro.data.confounding import confounding_report
    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.data.prepare import prepare
    from cradle_pyro.data.public import read_public
    from cradle_pyro.data.qc import annotate_artifacts
    from cradle_pyro.evaluation import calibration, criticism
    from cradle_pyro.evaluation.evaluate import evaluate
    from cradle_pyro.inference.checkpoint import load
    from cradle_pyro.inference.posterior import Posterior
    from cradle_pyro.inference.train import fit
    from cradle_pyro.model.cradle import Cradle
    from cradle_pyro.model.guides import CradleGuide
    from cradle_pyro.model.likelihoods import AbstractLikelihood
    from cradle_pyro.queries.calls import sign_calls
    from cradle_pyro.queries.counterfactual import cell_effect, counterfactual
    from cradle_pyro.queries.effects import (
        average_effect,
        compare,
        effects,
        interaction,
        interactions,
    )
    from cradle_pyro.queries.interventions import do
    from cradle_pyro.queries.latent import latent
    from cradle_pyro.queries.worlds import intervene
    from cradle_pyro.reporting import plots
    from cradle_pyro.reporting.to_anndata import to_anndata
    from cradle_pyro.reporting.to_arviz import to_arviz
    from cradle_pyro.simulate.corrupt import corrupt
    from cradle_pyro.simulate.perturbseq import simulate_perturbseq
    from cradle_pyro.sweeps import run_trial, sweep
    from cradle_pyro.types import Batch, Schema

__version__ = "0.1.0"

_HOMES = {
    "AbstractLikelihood": "model.likelihoods",
    "Batch": "types",
    "CellData": "data.dataset",
    "Config": "config",
    "Cradle": "model.cradle",
    "CradleGuide": "model.guides",
    "Posterior": "inference.posterior",
    "Schema": "types",
    "annotate_artifacts": "data.qc",
    "average_effect": "queries.effects",
    "cell_effect": "queries.counterfactual",
    "compare": "queries.effects",
    "confounding_report": "data.confounding",
    "corrupt": "simulate.corrupt",
    "counterfactual": "queries.counterfactual",
    "do": "queries.interventions",
    "effects": "queries.effects",
    "evaluate": "evaluation.evaluate",
    "fit": "inference.train",
    "interaction": "queries.effects",
    "interactions": "queries.effects",
    "intervene": "queries.worlds",
    "latent": "queries.latent",
    "load": "inference.checkpoint",
    "prepare": "data.prepare",
    "read_public": "data.public",
    "run_trial": "sweeps",
    "sign_calls": "queries.calls",
    "simulate_perturbseq": "simulate.perturbseq",
    "sweep": "sweeps",
    "to_anndata": "reporting.to_anndata",
    "to_arviz": "reporting.to_arviz",
}

_MODULES = {
    "calibration": "evaluation.calibration",
    "criticism": "evaluation.criticism",
    "plots": "reporting.plots",
}

__all__ = [
    "AbstractLikelihood",
    "Batch",
    "CellData",
    "Config",
    "Cradle",
    "CradleGuide",
    "Posterior",
    "Schema",
    "__version__",
    "annotate_artifacts",
    "average_effect",
    "calibration",
    "cell_effect",
    "compare",
    "confounding_report",
    "corrupt",
    "counterfactual",
    "criticism",
    "do",
    "effects",
    "evaluate",
    "fit",
    "interaction",
    "interactions",
    "intervene",
    "latent",
    "load",
    "plots",
    "prepare",
    "read_public",
    "run_trial",
    "sign_calls",
    "simulate_perturbseq",
    "sweep",
    "to_anndata",
    "to_arviz",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"cradle_pyro.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'cradle_pyro' has no attribute '{name}'")
    value = getattr(import_module(f"cradle_pyro.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
