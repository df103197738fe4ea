"""A peer's own package: SCVI of scvi-tools, conditioned on the label, as a predictor of effects.

scvi-tools is no dependency: ``pip install scvi-tools==1.4.2``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch

from cradle_pyro.baselines.predictor import Depth
from cradle_pyro.baselines.simple import Cells
from cradle_pyro.data.groups import log2_fraction
from cradle_pyro.errors import DataError
from cradle_pyro.model.likelihoods import GeneNegativeBinomial
from cradle_pyro.model.log_expression import expected_log2_expression
from cradle_pyro.queries.interventions import label_design
from cradle_pyro.seeding import seeded

if TYPE_CHECKING:
    from anndata import AnnData

    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.types import Schema

__all__ = ["SCVI_TOOLS", "FittedSCVI", "SCVIPredictor", "check_scvi_tools"]

SCVI_TOOLS = "scvi-tools==1.4.2"
"""The requirement to install for `SCVIPredictor`."""

_LABEL = "label"
_MOST_CONTROLS = 500
_DRAWS = 10  # of each control cell's latent state


@dataclass(frozen=True)
class FittedSCVI:
    """A trained SCVI, and expected fractions of control cells under each label it has seen.

    Parameters
    ----------
    name
        Name in tables.
    schema
        Names of the screen.
    model
        The trained ``scvi.model.SCVI``.
    rates
        Label to the fractions of the library that control cells would have under it, shape
        (control cells, genes).
    inverse_dispersion
        Of each gene.
    """

    name: str
    schema: Schema
    model: Any
    rates: dict[str, np.ndarray]
    inverse_dispersion: np.ndarray

    def predict(self, labels: Sequence[str], depth: Depth | None = None) -> np.ndarray:
        """Return the effect of each label against control, shape (labels, genes), log2 units.

        The same control cells are decoded under the label and under control. A combination that
        was not seen has the sum of its members' log-fold changes; one of a perturbation that was
        never seen alone adds nothing.

        Raises
        ------
        QueryError
            When a label names a perturbation that the screen does not know.
        """
        if not len(labels):
            return np.zeros((0, self.schema.n_genes))
        control = self.schema.control
        at_rest = self._profile(control, None if depth is None else depth.control)
        libraries = [None] * len(labels) if depth is None else depth.labels
        rows = [
            self._profile(label, library) - at_rest
            if label_design(self.schema, label).any()
            else np.zeros_like(at_rest)
            for label, library in zip(labels, libraries, strict=True)
        ]
        return np.stack(rows)

    def generate(self, labels: Sequence[str], library: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Return negative-binomial counts of new cells, shape (cells, genes)."""
        rng = np.random.default_rng(seed)
        names, inverse = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
        profiles = [self._rate(name) for name in names.tolist()]
        cells = rng.integers(len(self.rates[self.schema.control]), size=len(inverse))
        rate = np.stack([profiles[k][cell] for k, cell in zip(inverse, cells, strict=True)])
        mean = rate * np.asarray(library, dtype=np.float64)[:, None]
        theta = self.inverse_dispersion
        return rng.poisson(mean * rng.gamma(theta, 1.0 / theta, mean.shape)).astype(np.float32)

    def _rate(self, label: str) -> np.ndarray:
        """Return the fractions of the control cells under a label, seen or not."""
        if label in self.rates:
            return self.rates[label]
        design, control = label_design(self.schema, label), self.rates[self.schema.control]
        members = [self.schema.perturbations[k] for k in design.nonzero().ravel().tolist()]
        change = sum(
            np.log(self.rates[one]) - np.log(control) for one in members if one in self.rates
        )
        return control * np.exp(change)

    def _profile(self, label: str, library: np.ndarray | None) -> np.ndarray:
        """Return the mean log expression under a label, as cells with these libraries show it."""
        rate = self._rate(label)
        if library is None:
            return log2_fraction(rate).mean(axis=0)
        # Each control cell at its place among the libraries.
        place = (np.arange(len(rate)) + 0.5) / len(rate)
        depth = torch.as_tensor(np.quantile(np.asarray(library, np.float64), place)).float()
        mean = depth.unsqueeze(-1) * torch.as_tensor(rate)
        counts = GeneNegativeBinomial(mean, torch.as_tensor(self.inverse_dispersion))
        return expected_log2_expression(counts, depth).mean(0).numpy()


@dataclass(frozen=True)
class SCVIPredictor:
    """Trains SCVI with the label as the batch it is conditioned on; settings are its authors'.

    Effects compare the same control cells decoded under two labels (counterfactual decoding by
    ``transform_batch``). Covariates of the screen are categorical covariates.

    Parameters
    ----------
    cells
        Train on ``"passing"`` cells only, or on ``"all"``: SCVI does not know artifacts.
    seed
        Of training and decoding.
    max_epochs
        By default as many as SCVI chooses for the number of cells; it stops early.
    name
        Name in tables.

    References
    ----------
    Lopez, Regier, Cole, Jordan and Yosef, "Deep generative modeling for single-cell
    transcriptomics", Nature Methods 2018; https://scvi-tools.org.
    """

    cells: Cells = "passing"
    seed: int = 0
    max_epochs: int | None = None
    name: str = "scvi"

    def fit(self, data: CellData) -> FittedSCVI:
        """Return SCVI fitted to training cells; validation cells stop it.

        Raises
        ------
        DataError
            When scvi-tools is not installed, values are no counts, or no training cell is a
            control.
        """
        scvi = _scvi_tools()
        if data.values != "counts":
            raise DataError(f"SCVI needs raw counts, found '{data.values}'.")
        if self.cells == "passing":
            data = data.subset(data.passing)
        schema = data.schema
        split = np.full(data.n_cells, "train") if data.split is None else np.asarray(data.split)
        adata = _anndata(data)
        # A label of validation cells only cannot be conditioned on.
        known = np.isin(data.labels, data.labels[split == "train"]) & (split != "test")
        adata, split = adata[known].copy(), split[known]
        controls = np.flatnonzero((split == "train") & (adata.obs[_LABEL] == schema.control))
        if not len(controls):
            raise DataError(
                f"effects need control cells ({schema.control!r}), found none among "
                f"{(split == 'train').sum()} training cells."
            )
        with _quiet(), seeded(self.seed):
            scvi.settings.seed = self.seed
            scvi.model.SCVI.setup_anndata(
                adata,
                batch_key=_LABEL,
                categorical_covariate_keys=[name for name, _ in schema.covariates] or None,
            )
            model = scvi.model.SCVI(adata, gene_likelihood="nb")
            parts = [np.flatnonzero(split == part) for part in ("train", "val")]
            model.train(
                max_epochs=self.max_epochs,
                accelerator="cpu",
                early_stopping=len(parts[1]) > 0,
                datasplitter_kwargs={"external_indexing": [*parts, np.array([], dtype=int)]},
                enable_progress_bar=False,
                enable_checkpointing=False,
                logger=False,
            )
            few = np.random.default_rng(self.seed).permutation(controls)[:_MOST_CONTROLS]
            rates = {
                str(label): model.get_normalized_expression(
                    indices=few.tolist(),
                    transform_batch=str(label),
                    library_size=1,
                    n_samples=_DRAWS,
                    return_numpy=True,
                )[:, : schema.n_genes].astype(np.float32)
                for label in adata.obs[_LABEL].cat.categories
            }
        theta = model.module.px_r.detach().exp().cpu().numpy()[: schema.n_genes]
        return FittedSCVI(self.name, schema, model, rates, theta)


def check_scvi_tools() -> None:
    """Raise a DataError unless scvi-tools can be used."""
    _scvi_tools()


def _scvi_tools() -> Any:
    # By name: it is no dependency, declared or not, of anything else here.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("scvi")
    except ImportError as missing:
        raise DataError(
            f"The predictor 'scvi' needs scvi-tools, which is not installed or lacks a part "
            f"({missing}). Run: pip install {SCVI_TOOLS}"
        ) from missing


def _anndata(data: CellData) -> AnnData:
    """Return counts, with one more gene for all that were not kept, labels and covariates."""
    import pandas as pd
    from anndata import AnnData

    counts = sp.csr_matrix(data.rows(slice(None)))
    if data.schema.has_rest:
        rest = np.maximum(np.round(data.library - counts.sum(axis=1).A1), 0)
        counts = sp.hstack([counts, sp.csr_matrix(rest[:, None])], format="csr")
    obs = {_LABEL: pd.Categorical(data.labels)}
    for k, (name, levels) in enumerate(data.schema.covariates):
        obs[name] = pd.Categorical(np.asarray(levels)[data.covariates[:, k]], categories=levels)
    index = pd.Index(np.asarray(data.obs_names).astype(str))
    return AnnData(counts.astype(np.float32), obs=pd.DataFrame(obs, index=index))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep notes of Lightning and of scvi-tools from the terminal."""
    names = ("lightning.pytorch", "lightning.fabric", "scvi")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
