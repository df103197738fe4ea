"""The linear-Gaussian oracle written as a Cradle, with guides whose expectations are exact."""

from __future__ import annotations

import math

import numpy as np
import torch
from factories import make_config
from pyro import distributions as dist
from pyro import poutine, sample
from torch import Tensor, nn

from cradle_pyro import sites
from cradle_pyro.inference.pair import build_pair
from cradle_pyro.model.cradle import Cradle, cells_plate
from cradle_pyro.model.guides import CradleGuide
from cradle_pyro.model.networks import inverse_softplus
from cradle_pyro.simulate.linear_gaussian import LinearGaussianCells, LinearGaussianCradle
from cradle_pyro.types import Batch, Schema, Statistics


def tensor(values: np.ndarray | list) -> Tensor:
    return torch.as_tensor(np.array(values, dtype=np.float64))


def as_batch(cells: LinearGaussianCells) -> Batch:
    """Return the oracle's cells as a batch."""
    n_cells = len(cells.x)
    return Batch(
        counts=tensor(cells.x),
        perturbation=tensor(cells.d),
        artifact=tensor(cells.a),
        library=torch.ones(n_cells, dtype=torch.float64),
        covariates=torch.zeros(n_cells, 0, dtype=torch.float64),
    )


def make_linear_pair(
    oracle: LinearGaussianCradle, *, n_cells: int, artifact_risk: bool = False
) -> tuple[Cradle, CradleGuide, dict[str, Tensor]]:
    """Return a Cradle equal to `oracle`, a linear CradleGuide, and the values of the globals."""
    schema = Schema(
        genes=tuple(f"G{i}" for i in range(oracle.n_genes)),
        perturbations=tuple(f"P{i}" for i in range(oracle.n_perturbations)),
        artifacts=tuple(f"A{i}" for i in range(oracle.n_artifacts)),
    )
    one = torch.ones(oracle.n_genes)
    statistics = Statistics(
        n_cells=n_cells,
        log_mean=torch.zeros_like(one),
        log_sd=one,
        fraction=one,
        inverse_dispersion=one,
        log_library_mean=torch.tensor(0.0),
        log_library_sd=torch.tensor(1.0),
        artifact_share=torch.full((oracle.n_artifacts,), 0.5),
        failing_share=torch.tensor(0.5),
        combinations=torch.zeros(0, oracle.n_perturbations),
    )
    config = make_config(
        model={
            "n_latents": oracle.n_latents,
            "n_artifact_latents": oracle.n_artifact_latents,
            "dilution": False,
            "combine": "sum",
            "likelihood": "normal",
            "decoder": {"layers": 0},
            "gene_effect": "none",
            "artifact_risk": artifact_risk,
            "depth_shift": False,
        },
        guide={
            "encoder": {"hidden": oracle.n_latents, "layers": 0},
            "effect_encoder": {"hidden": 4, "layers": 1},
        },
    )
    model, guide = build_pair(schema, config, statistics, seed=0)
    model, guide = model.double(), guide.double()
    with torch.no_grad():
        model.decoder.linear[0].weight.copy_(tensor(oracle.loading.T))
        model.decoder.bias.copy_(tensor(oracle.intercept))
        model.likelihood.log_scale.copy_(tensor(np.log(oracle.noise_sd)))
        model.artifact_loading.copy_(tensor(oracle.artifact_loading))
    globals_ = {
        sites.EFFECT_MASK: torch.ones(oracle.effect.shape, dtype=torch.float64),
        sites.EFFECT: tensor(oracle.effect),
    }
    if oracle.n_artifacts:
        globals_[sites.ARTIFACT_EFFECT] = tensor(oracle.artifact_effect)
    return model, guide, globals_


def set_linear_encoder(
    guide: CradleGuide, oracle: LinearGaussianCradle, gain: np.ndarray, variance: np.ndarray
) -> None:
    """Set q(z | x, p, r) = Normal((x - μ - (p + r) L) gain, variance) in the guide's z encoder.

    The encoder tells z + p, from which the guide takes p.
    """
    to_latent = -oracle.loading @ gain
    own = to_latent + np.eye(oracle.n_latents)
    weights = [np.concatenate([gain, np.zeros((1, oracle.n_latents))]), own, to_latent]
    if oracle.n_artifacts and oracle.n_artifact_latents:
        weights.append(oracle.artifact_loading @ to_latent)
    _set_linear(guide.z_basal, weights, -oracle.intercept @ gain, np.sqrt(variance))


def set_artifact_encoder(
    guide: CradleGuide, oracle: LinearGaussianCradle, gain: np.ndarray, variance: np.ndarray
) -> None:
    """Set q(w | x, p, a) = Normal((x - μ - (p + a U) L) gain, variance) where there is a flag."""
    to_latent = -oracle.loading @ gain
    weights = [
        np.concatenate([gain, np.zeros((1, gain.shape[1]))]),
        to_latent,
        oracle.artifact_effect @ to_latent,
    ]
    _set_linear(guide.z_artifact, weights, -oracle.intercept @ gain, np.sqrt(variance))


def _set_linear(
    encoder: nn.Module, weights: list[np.ndarray], bias: np.ndarray, scale: np.ndarray
) -> None:
    n_outputs, hidden = len(bias), encoder.head.loc.in_features
    expression, *others = encoder.network.inputs
    of_counts, of_library = np.split(weights[0], [-1])
    parameters = [expression.counts, expression.library, *(linear.weight for linear in others)]
    with torch.no_grad():
        for own, weight in zip(parameters, [of_counts, of_library, *weights[1:]], strict=True):
            own.zero_()
            own[:n_outputs] = tensor(weight.T)
        encoder.network.bias.zero_()
        encoder.network.bias[:n_outputs] = tensor(bias)
        encoder.head.loc.weight.copy_(torch.eye(n_outputs, hidden, dtype=torch.float64))
        encoder.head.loc.bias.zero_()
        encoder.head.raw_scale.weight.zero_()
        encoder.head.raw_scale.bias.copy_(
            tensor([inverse_softplus(float(s) - 1e-4) for s in scale])
        )


class CubatureNormal(dist.Normal):
    """A Normal whose draw is the given standard noise, so that averages can be made exact."""

    noise: Tensor

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> CubatureNormal:
        new = CubatureNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))
        new.noise = self.noise
        return new

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.loc + self.scale * self.noise


class CubatureGuide(nn.Module):
    """q(z, w) with free diagonal moments per cell, drawn at points that are exact for quadratics.

    Particles stand at ± sqrt(k) along each axis of the joint latent: the moments up to the third
    are those of a standard normal, and every term of the oracle's ELBO is quadratic.
    """

    def __init__(
        self, oracle: LinearGaussianCradle, mean: np.ndarray, variance: np.ndarray
    ) -> None:
        super().__init__()
        self.n_latents = oracle.n_latents
        self.mean = nn.Parameter(tensor(mean))
        self.variance = nn.Parameter(tensor(variance))
        k = mean.shape[1]
        axes = math.sqrt(k) * torch.eye(k, dtype=torch.float64)
        self.points = torch.cat([axes, -axes]).unsqueeze(1)

    @property
    def n_points(self) -> int:
        return len(self.points)

    def forward(self, batch: Batch) -> None:
        scale, k = self.variance.sqrt(), self.n_latents
        with cells_plate(len(batch), batch):
            for name, part in ((sites.Z_ARTIFACT, slice(k, None)), (sites.Z_BASAL, slice(k))):
                normal = CubatureNormal(self.mean[:, part], scale[:, part])
                normal.noise = self.points[..., part]
                sample(name, normal.to_event(1))


def given(model: nn.Module, values: dict[str, Tensor]) -> object:
    """Return the model with the globals fixed."""
    return poutine.condition(model, data=values)
