"""Predictors with a network: this model and its peers, all Pyro models made of the same parts.

A peer that differs in its mechanisms only is a list of settings (`PEERS`); one that needs an
equation of its own is a pair (`conditional_pair`). All are trained as the screen's configuration
says, by `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cradle_pyro.baselines.glm import NegativeBinomialGLM
from cradle_pyro.baselines.linear import LinearRegression
from cradle_pyro.baselines.predictor import Depth, FittedPredictor, Predictor
from cradle_pyro.baselines.scvi_tools import SCVIPredictor
from cradle_pyro.baselines.shrinkage import shrink
from cradle_pyro.baselines.simple import (
    Additive,
    Cells,
    EmpiricalBayes,
    GlobalMean,
    NoChange,
    TrainingMean,
    effect_standard_errors,
    raw_effects,
    training_cells,
    training_moments,
)
from cradle_pyro.config import Config
from cradle_pyro.data.groups import Grouping, cell_groups
from cradle_pyro.errors import ConfigError, QueryError, near
from cradle_pyro.inference.pair import PairBuilder
from cradle_pyro.inference.train import fit
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.guides import CradleGuide
from cradle_pyro.queries.effects import count_effects, effect_draws
from cradle_pyro.queries.interventions import do, label_design
from cradle_pyro.queries.worlds import intervene
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch, Carried, Schema, Statistics

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.inference.posterior import Posterior

__all__ = [
    "CANDIDATES",
    "KINDS",
    "PAIRS",
    "PEERS",
    "FittedModel",
    "Trained",
    "conditional_pair",
    "make_predictor",
    "shrunken_residuals",
    "with_flags",
]

Flags = Literal["each", "any", "none"]

_DRAWS: Final = 20  # of the globals, that the cells made of a label are spread over

_NO_ARTIFACT: Final = (
    "model.n_artifact_latents=0",
    "model.artifact_risk=false",
    "model.depth_shift=false",
    "objective.counterfactual=none",
)
_PLAIN: Final = (
    *_NO_ARTIFACT,
    "model.gene_effect='none'",
    "model.loading_scale='none'",
    "model.linear_path=false",
    "model.decoder.hidden=256",
    "model.decoder.layers=2",
    "train.learning_rate=1e-3",
    "train.weight_decay=1e-6",
)
PEERS: Final[dict[str, tuple[str, ...]]] = {
    # Decoder of basal state and design; see `conditional_pair`.
    "conditional_vae": (*_PLAIN, "model.combine=concat", "model.latent_effect=false"),
    # z + sum of embeddings, every one of them active: CPA-VAE as Bereket and Karaletsos have it.
    "cpa_vae": (*_PLAIN, "model.combine=sum", "model.mask_probability=0.999999"),
    # z + sum of masked embeddings.
    "sams_vae": (*_PLAIN, "model.combine=sum"),
    "sams_vae_mean_field": (*_PLAIN, "model.combine=sum", "guide.family=mean_field"),
    # As Baek et al. describe it: one flag, library held, partners; mistakes corrected.
    "published_cradle": (
        *_PLAIN,
        "model.combine=concat",
        "objective.counterfactual=partner",
        "objective.beta=0.5",
        "objective.particles=5",
    ),
    "cradle": (),
}
"""Kind to the settings that make it what it is, on top of a screen's configuration.

References
----------
Sohn, Lee and Yan, "Learning structured output representation using deep conditional generative
models", NeurIPS 2015 (conditional VAE). Lotfollahi et al., "Predicting cellular responses to
complex perturbations in high-throughput screens", Molecular Systems Biology 2023 (CPA). Bereket and
Karaletsos, "Modelling cellular perturbations with the sparse additive mechanism shift variational
autoencoder", NeurIPS 2023. Baek et al., "CRADLE-VAE", AAAI 2025.
"""

_RATES: Final = (
    (),
    ("train.learning_rate=3e-3",),
    ("train.learning_rate=3e-3", "train.weight_decay=0.3"),
    ("model.n_latents=32",),
)
CANDIDATES: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    **dict.fromkeys(
        ("conditional_vae", "cpa_vae", "sams_vae", "sams_vae_mean_field", "published_cradle"),
        _RATES,
    ),
    "cradle": (
        (),
        ("train.effect_learning_rate=3e-2",),
        ("model.mask_probability=0.1",),
        ("model.n_latents=32",),
    ),
}
"""Settings of each kind to choose from on validation cells: the same number for all."""

_FLAGS: Final[dict[str, Flags]] = {"cradle": "each", "published_cradle": "any"}


class ConditionalVAE(Cradle):
    """Counts from basal state and design: the perturbations' embeddings are parameters."""

    def __init__(self, schema: Schema, config: Config, statistics: Statistics) -> None:
        super().__init__(schema, config.model, statistics)
        self.embedding = nn.Parameter(torch.randn(schema.n_perturbations, config.model.n_latents))

    def perturbation_effects(self, carried: Carried | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings; nothing is sampled."""
        rows = slice(None) if carried is None else carried.perturbations
        return self.embedding[rows], None


class ConditionalGuide(CradleGuide):
    """q(z_basal | x, d), with embeddings of the design of its own."""

    def __init__(self, model: Cradle, config: Config, statistics: Statistics) -> None:
        super().__init__(model, config.guide, statistics)
        self.embedding = nn.Parameter(torch.randn(self.schema.n_perturbations, self.n_latents))

    def global_latents(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the embeddings; nothing is sampled."""
        return self.embedding, None, self.embedding.new_zeros(0, self.n_latents)


def conditional_pair(
    schema: Schema, config: Config, statistics: Statistics
) -> tuple[Cradle, CradleGuide]:
    """Return a conditional VAE and its guide, for ``fit(pair=)``."""
    model = ConditionalVAE(schema, config, statistics)
    return model, ConditionalGuide(model, config, statistics)


def with_flags(data: CellData, flags: Flags) -> CellData:
    """Return the cells with each flag of its own, with one flag for any, or without flags."""
    if flags == "each" or not data.schema.n_artifacts:
        return data
    names = ("any",) if flags == "any" else ()
    failing = data.failing[:, None].astype(data.artifact.dtype)
    return replace(
        data,
        schema=replace(data.schema, artifacts=names),
        artifact=failing[:, : len(names)],
        artifact_observed=data.artifact_observed | (flags == "none"),
    )


@dataclass(frozen=True)
class Trained:
    """A model that is trained by SVI.

    Parameters
    ----------
    name
        Name in tables.
    config
        Everything about model, guide, objective and training.
    pair
        Builds an edited pair, as in :func:`~cradle_pyro.fit`.
    cells
        ``"passing"``: failing cells are discarded first, the usual practice; their flags go, too.
    flags
        How the model sees the flags: ``"each"``, one for ``"any"``, or ``"none"``.
    assisted
        Predictions for cells with given libraries are corrected by what passing training cells
        show beyond the model (`shrunken_residuals`).
    """

    name: str
    config: Config
    pair: PairBuilder | None = None
    cells: Cells = "all"
    flags: Flags = "each"
    assisted: bool = False

    def fit(self, data: CellData) -> FittedModel:
        """Return the posterior of the training cells; validation cells stop early.

        Test cells are dropped before anything is read. Without a split all cells are training
        cells, and training ends with the last epoch.
        """
        if data.split is None:
            data = data.with_split(np.full(data.n_cells, "train"))
        data = data.subset(np.asarray(data.split) != "test")
        flags: Flags = self.flags
        if self.cells == "passing":
            data, flags = data.subset(data.passing), "none"
        data = with_flags(data, flags)
        posterior = fit(data, self.config, pair=self.pair, progress=False)
        fitted = FittedModel(self.name, posterior, flags)
        if not self.assisted:
            return fitted
        grouping = self.config.evaluation.grouping
        return replace(fitted, residuals=shrunken_residuals(fitted, data, grouping))


@dataclass(frozen=True)
class Residuals:
    """What training cells show beyond a model, by label.

    Parameters
    ----------
    schema
        Names of the screen.
    own
        Residual effect of each label with training cells, each of shape (genes,), log2 units.
    shared
        What all labels have in common: the control's part, which is in every effect once.
    """

    schema: Schema
    own: Mapping[str, np.ndarray]
    shared: np.ndarray

    def of(self, labels: Sequence[str]) -> np.ndarray:
        """Return the residual of each label, shape (labels, genes).

        That of a label without training cells is the sum of its perturbations', what they share
        counted once; a perturbation without cells adds nothing to it.
        """
        return np.stack([self._of(label) for label in labels])

    def _of(self, label: str) -> np.ndarray:
        if label in self.own:
            return self.own[label]
        parts = [self.own[name] for name in label.split(self.schema.delimiter) if name in self.own]
        if not parts:
            return np.zeros_like(self.shared)
        return self.shared + np.sum([part - self.shared for part in parts], axis=0)


@dataclass(frozen=True)
class FittedModel:
    """A posterior as a predictor.

    Parameters
    ----------
    name
        Name in tables.
    posterior
        What was trained.
    flags
        How it sees the flags of cells; `see` shows cells in this way.
    residuals
        What is added to predictions with a `depth`, from `shrunken_residuals`.
    """

    name: str
    posterior: Posterior
    flags: Flags = "each"
    residuals: Residuals | None = None

    def see(self, data: CellData) -> CellData:
        """Return cells with the flags that the model knows."""
        return with_flags(data, self.flags)

    def predict(self, labels: Sequence[str], depth: Depth | None = None) -> np.ndarray:
        """Return the posterior mean of each label's direct effect, shape (labels, genes), log2.

        With `depth`, as the effect shows in counts at these libraries, plus the residuals if there
        are any; the control has no effect here either, although two groups of controls differ.
        Draws, cells and seed are those of the configuration's ``evaluation``.

        Raises
        ------
        QueryError
            When a label names a perturbation that the screen does not know.
        """
        if not len(labels):
            return np.zeros((0, self.posterior.schema.n_genes))
        options = self.posterior.config.evaluation
        if depth is None:
            return effect_draws(
                self.posterior, list(labels),
                draws=options.draws, n_cells=options.n_controls, seed=options.seed,
            ).mean(0)  # fmt: skip
        changes = [bool(label_design(self.posterior.schema, label).any()) for label in labels]
        effects = count_effects(
            self.posterior, list(labels), *depth,
            draws=options.draws, n_cells=options.n_controls, seed=options.seed,
        )  # fmt: skip
        if self.residuals is not None:
            effects = effects + self.residuals.of(labels)
        return np.where(np.array(changes)[:, None], effects, 0.0)

    def generate(self, labels: Sequence[str], library: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Return counts of new cells without artifact, over abducted controls: (cells, genes)."""
        names = np.asarray(labels, dtype=str)
        library = np.asarray(library, dtype=np.float64)
        if library.shape != names.shape or not len(names):
            raise QueryError(
                f"One library for each of the labels is needed, found {len(labels)} labels and "
                f"libraries of shape {library.shape}."
            )
        rate = np.empty((len(names), self.posterior.schema.n_genes), dtype=np.float32)
        for label in np.unique(names):
            rows = np.flatnonzero(names == label)
            act = do(perturbation=str(label), artifact=0, library=1.0)
            rate[rows] = intervene(
                self.posterior, act, len(rows), draws=min(len(rows), _DRAWS), seed=seed
            ).layers["rate"]
        depth = torch.as_tensor(library, dtype=torch.float32)
        with seeded(seed), torch.no_grad():
            return self.posterior.model.likelihood(torch.as_tensor(rate), depth).sample().numpy()


def shrunken_residuals(
    fitted: FittedPredictor, data: CellData, grouping: Grouping = "label"
) -> Residuals:
    """Return what the passing training cells of each label show beyond a prediction.

    The prediction for training cells, at their own libraries, is taken off their mean effect, and
    the rest is shrunken by a sparse prior as effects are by `EmpiricalBayes`: noise goes, what the
    model has wrong stays. Added to predictions at a depth, this makes them model-assisted: as cells
    get many they tend to the mean of the cells, whatever is wrong with the model, and where cells
    are few, to the model.

    References
    ----------
    Cassel, Sarndal and Wretman, "Some results on generalized difference estimation and generalized
    regression estimation for finite populations", Biometrika 1976. Efron and Morris, "Data analysis
    using Stein's estimator and its generalizations", JASA 1975.
    """
    train, control = training_cells(data), data.schema.control
    groups = cell_groups(train, grouping, passing=True)
    moments = training_moments(data, "passing", grouping, 1)
    raw = raw_effects(moments, control, "mean_log")
    if not raw:
        return Residuals(data.schema, {}, np.zeros(data.schema.n_genes))
    library = {label: train.library[rows] for label, rows in groups.items()}
    depth = Depth([library[label] for label in raw], library[control])
    left = np.stack(list(raw.values())) - fitted.predict(list(raw), depth)
    noise = effect_standard_errors(moments, control, functional="mean_log")
    found = shrink(left, noise.total, scale=noise.scale).mean
    return Residuals(data.schema, dict(zip(raw, found, strict=True)), found.mean(axis=0))


PAIRS: Final[dict[str, PairBuilder]] = {
    "conditional_vae": conditional_pair,
}
"""Kind to what builds its pair; the standard one for others. ``load`` needs it for a saved run."""

_SIMPLE: Final[dict[str, Callable[..., Predictor]]] = {
    "no_change": NoChange,
    "global_mean": GlobalMean,
    "training_mean": TrainingMean,
    "additive": Additive,
    "empirical_bayes": EmpiricalBayes,
    "linear": LinearRegression,
}
KINDS: Final = (*_SIMPLE, "glm", "scvi", *PEERS)
"""All kinds of predictors that `make_predictor` knows."""


def make_predictor(
    kind: str,
    *,
    name: str | None = None,
    config: Config | None = None,
    settings: Sequence[str] = (),
    cells: Cells | None = None,
    assisted: bool = False,
) -> Predictor:
    """Return a predictor by its kind.

    Parameters
    ----------
    kind
        One of `KINDS`.
    name
        Name in tables; the kind if omitted.
    config
        The screen's configuration; what makes the kind (`PEERS`) and then `settings` are put on
        top of it.
    settings
        Further settings, ``section.key=value``.
    cells
        Train on ``"all"`` cells or those ``"passing"``; by default passing cells for predictors
        without a network, which cannot tell artifacts, and all cells for those with one.
    assisted
        For predictors with a network: predictions for observed cells are model-assisted, see
        `shrunken_residuals`.

    Raises
    ------
    ConfigError
        If there is no such kind, a setting is wrong, or one without a network is to be assisted.
    """
    if kind not in KINDS:
        raise ConfigError(f"No predictor '{kind}'{near(kind, KINDS)}. Known: {', '.join(KINDS)}.")
    if assisted and kind not in PEERS:
        raise ConfigError(
            f"only a model can be assisted, found kind '{kind}'; models: {', '.join(PEERS)}."
        )
    config = (config or Config()).with_settings([*PEERS.get(kind, ()), *settings])
    if kind == "glm":
        return NegativeBinomialGLM(cells=cells or "passing", name=name or kind)
    if kind == "scvi":
        return SCVIPredictor(cells or "passing", seed=config.train.seed, name=name or kind)
    if kind in _SIMPLE:
        grouping = config.evaluation.grouping
        return _SIMPLE[kind](cells=cells or "passing", grouping=grouping, name=name or kind)
    flags = _FLAGS.get(kind, "none")
    return Trained(name or kind, config, PAIRS.get(kind), cells or "all", flags, assisted)
