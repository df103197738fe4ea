"""Configuration: one frozen, typed class per component, read from TOML and ``--set`` flags.

Sizes come from the data, never from here. TOML has no null, so a component that is switched off is
written ``"none"``, for example ``gene_effect = "none"`` in ``[model]``. An unknown key is an error
that names the nearest known one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from .errors import ConfigError, near

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "GeneEffectConfig",
    "GuideConfig",
    "KLTerm",
    "ModelConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "PartnerTerm",
    "QCConfig",
    "SleepTerm",
    "SplitConfig",
    "TrainConfig",
]

_NONE = "none"


def _none_from_text(value: object) -> object:
    return None if value == _NONE else value


def _text_from_none(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return _NONE if value is None else value


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Component(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# TOML has no null: a value that is absent is read and written as "none".
OptionalText: TypeAlias = Annotated[
    str | None, BeforeValidator(_none_from_text), PlainSerializer(_text_from_none)
]
OptionalScale: TypeAlias = Annotated[
    PositiveFloat | None, BeforeValidator(_none_from_text), PlainSerializer(_text_from_none)
]
OptionalCount: TypeAlias = Annotated[
    PositiveInt | None, BeforeValidator(_none_from_text), PlainSerializer(_text_from_none)
]


class DataConfig(_Component):
    """Which columns of the AnnData mean what; the CLI's flags set the same fields.

    `backed` leaves the counts of a file on disk: "auto" if they are large (1.5 GB in memory).
    """

    perturbation_key: str = "perturbation"
    control: str = "control"
    layer: OptionalText = None
    delimiter: str = "+"
    design_key: OptionalText = None
    covariate_keys: tuple[str, ...] = ()
    library_key: OptionalText = None
    artifact: Literal["each", "any", "severity", "none"] = "each"
    artifact_keys: tuple[str, ...] = ()
    values: Literal["counts", "lognorm"] = "counts"
    n_top_genes: OptionalCount = None
    backed: bool | Literal["auto"] = "auto"


class QCConfig(_Component):
    """Artifact annotation: median ± `n_mads` unscaled MADs, and scrublet's doublet score.

    `flags` names those to raise, all that can be computed if empty: leave out one that marks
    biology, such as high_hb in an erythroid screen.
    """

    n_mads: PositiveFloat = 3.0
    doublets: bool = True
    flags: tuple[str, ...] = ()
    counts_key: OptionalText = None
    genes_key: OptionalText = None
    pct_mito_key: OptionalText = None


class SplitConfig(_Component):
    """How cells are divided into training, validation and test."""

    method: Literal["cells", "combinations", "perturbations", "column"] = "cells"
    key: OptionalText = None
    train: Fraction = 0.64
    validation: Fraction = 0.16
    held_out_fraction: Fraction = 0.25
    held_out: tuple[str, ...] = ()
    seed: NonNegativeInt = 0


class NetworkConfig(_Component):
    """A residual MLP: `layers` hidden layers of width `hidden`."""

    hidden: PositiveInt = 256
    layers: NonNegativeInt = 2


class GeneEffectConfig(_Component):
    """Spike-and-slab scale mixture for the direct log-fold changes, in nats of the rate.

    `slab_probability` is the starting point, shared equally by the slabs; with `learn_weights`
    each perturbation's weights are fitted by marginal likelihood (empirical Bayes). With
    `response`, a cell's basal state scales how strongly it responds to each perturbation. A
    combination of at least `interaction_cells` training cells has an effect beyond the sum of its
    members, with a prior of the same kind.
    """

    spike_scale: PositiveFloat = 0.01
    slab_scales: tuple[PositiveFloat, ...] = (0.1, 0.3, 1.0)
    slab_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    learn_weights: bool = True
    response: bool = True
    interaction_cells: OptionalCount = 10


OptionalGeneEffect: TypeAlias = Annotated[
    GeneEffectConfig | None, BeforeValidator(_none_from_text), PlainSerializer(_text_from_none)
]


class ModelConfig(_Component):
    """The generative model, DESIGN section 2; the defaults switch every mechanism on.

    `loading_scale` is the scale of the Laplace prior of the linear path's loadings of z_basal.
    `combine` says which states the decoder has maps of its own for: "concat" for z_basal, the
    perturbation's shift and the artifact's, each by itself; "shift" for the sum of the first two,
    and the third; "sum" for the sum of all.
    """

    n_latents: PositiveInt = 16
    n_artifact_latents: NonNegativeInt = 6
    dilution: bool = True
    combine: Literal["concat", "shift", "sum"] = "shift"
    likelihood: Literal["nb", "poisson", "zinb", "normal"] = "nb"
    decoder: NetworkConfig = NetworkConfig(hidden=32, layers=0)
    linear_path: bool = True
    loading_scale: OptionalScale = 0.1
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    effect_scale: PositiveFloat = 1.0
    latent_effect: bool = True
    gene_effect: OptionalGeneEffect = GeneEffectConfig()
    artifact_effect_scale: PositiveFloat = 1.0
    artifact_risk: bool = True
    artifact_risk_scale: PositiveFloat = 1.0
    depth_shift: bool = True
    depth_shift_scale: PositiveFloat = 1.0


class GuideConfig(_Component):
    """The variational family: structured (default) or mean-field."""

    family: Literal["structured", "mean_field"] = "structured"
    encoder: NetworkConfig = NetworkConfig(layers=2)
    effect_encoder: NetworkConfig = NetworkConfig(hidden=64, layers=1)
    initial_scale: PositiveFloat = 0.1


class _AbstractConsistencyTerm(_Component):
    flip_artifact: Fraction = 0.5
    flip_perturbation: Fraction = 0.5
    generated_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5


class SleepTerm(_AbstractConsistencyTerm):
    """Consistency, sleep form: a cell's own counterfactual must abduct to its basal state."""

    kind: Literal["sleep"] = "sleep"


class KLTerm(_AbstractConsistencyTerm):
    """Consistency, KL form; over-disperses the posterior, offered for comparison."""

    kind: Literal["kl"] = "kl"


class PartnerTerm(_Component):
    """The published idea, corrected: an observed partner cell with the opposite artifact state."""

    kind: Literal["partner"] = "partner"


_TERMS: dict[int | str, type[_Component]] = {
    "sleep": SleepTerm,
    "kl": KLTerm,
    "partner": PartnerTerm,
}


def _term_from_name(value: object) -> object:
    return {"kind": value} if isinstance(value, str) and value != _NONE else value


CounterfactualTerm: TypeAlias = Annotated[
    Annotated[SleepTerm | KLTerm | PartnerTerm, Field(discriminator="kind")] | None,
    BeforeValidator(_none_from_text),
    BeforeValidator(_term_from_name),
    PlainSerializer(_text_from_none),
]


class ObjectiveConfig(_Component):
    """loss = -ELBO / N + beta * counterfactual term, in nats per cell."""

    counterfactual: CounterfactualTerm = SleepTerm()
    beta: NonNegativeFloat = 1.0
    particles: PositiveInt = 1
    balance_failing: bool = False


class TrainConfig(_Component):
    """Optimisation; everything here is passed to Lightning or to AdamW.

    `batch_size` is that of each process: there is one for each of the `devices` of each of the
    `nodes`. A step adds up the gradients of `accumulate` batches: as good as one batch of so many
    cells, in less memory. Cells are shuffled in blocks of `shuffle_block` neighbours: one by one
    if counts are in memory, and 32 on disk, unless it says otherwise. See :doc:`/devices`.
    """

    max_epochs: PositiveInt = 60
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    learning_rate: PositiveFloat = 5e-3
    effect_learning_rate: PositiveFloat = 1e-2
    weight_decay: NonNegativeFloat = 0.3
    gradient_clip: PositiveFloat = 100.0
    patience: PositiveInt = 30
    schedule: Literal["constant", "cosine"] = "cosine"
    seed: NonNegativeInt = 0
    shuffle_block: OptionalCount = None
    loader_workers: NonNegativeInt = 0
    accelerator: Literal["auto", "cpu", "cuda"] = "cpu"
    devices: PositiveInt = 1
    nodes: PositiveInt = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


class EvaluationConfig(_Component):
    """How a run is scored, DESIGN section 6."""

    draws: PositiveInt = 50
    n_controls: PositiveInt = 100
    density_draws: PositiveInt = 8
    density_particles: PositiveInt = 8
    n_density_cells: PositiveInt = 500
    grouping: Literal["label", "marginal"] = "label"
    min_cells: PositiveInt = 5
    split_half_repeats: PositiveInt = 20
    seed: NonNegativeInt = 0


class Config(_Component):
    """Everything a run needs beside the data; see the classes of its fields.

    Examples
    --------
    >>> Config().train.batch_size
    128
    >>> Config.from_mapping({"objective": {"counterfactual": "none"}}).objective.counterfactual
    >>> Config().with_settings(["model.n_latents=8"]).model.n_latents
    8
    """

    data: DataConfig = DataConfig()
    qc: QCConfig = QCConfig()
    split: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    guide: GuideConfig = GuideConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """Return the configuration that `values` (nested, as in TOML) describe.

        Raises
        ------
        ConfigError
            For an unknown key (naming the nearest known one) or an impossible value.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_readable(error)) from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """Read a configuration file.

        Raises
        ------
        ConfigError
            If the file is missing, is not TOML, or describes no valid configuration.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"Expected a TOML configuration file, found nothing at '{path}'.")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"'{path}' is not a valid TOML file: {error}.") from None
        try:
            return cls.from_mapping(values)
        except ConfigError as error:
            raise ConfigError(f"In '{path}': {error}") from None

    def with_settings(self, settings: Sequence[str]) -> Config:
        """Return a copy with ``section.key=value`` settings applied, values written as in TOML.

        A value that is not TOML is taken as text, so that quotes may be left out.

        Raises
        ------
        ConfigError
            For a setting without ``=``, an unknown key or an impossible value.
        """
        values = self.model_dump(mode="json")
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or not key.strip():
                raise ConfigError(
                    f"Expected section.key=value, found '{setting}'. Example: train.max_epochs=20"
                )
            target = values
            *sections, name = key.strip().split(".")
            for section in sections:
                inner = target.get(section)
                target[section] = inner if isinstance(inner, dict) else {}
                target = target[section]
            target[name] = _parse_value(text.strip())
        return type(self).from_mapping(values)

    def to_toml(self) -> str:
        """Return the whole configuration as TOML; ``from_toml`` reads it back unchanged."""
        return tomli_w.dumps(self.model_dump(mode="json"))


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the field names beside the unknown key at `location`."""
    component: Any = Config
    for part in location[:-1]:
        if part in _TERMS:  # pydantic names the kind of term that it read
            component = _TERMS[part]
        elif part in getattr(component, "model_fields", {}):
            component = type(component.model_fields[part].get_default())
    return list(getattr(component, "model_fields", {}))


def _readable(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        key = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(location)
            hint = near(str(location[-1]), known) or f"; known here: {', '.join(known)}."
            lines.append(f"Unknown setting '{key}'{hint}")
        else:
            lines.append(
                f"Setting '{key}': {problem['msg'].lower()}, found {problem.get('input')!r}."
            )
    return " ".join(lines)
