r"""The published CRADLE-VAE training, written naively from its description.

The bar that our own step is timed against. Written from the paper (Baek et al., "CRADLE-VAE:
Enhancing Single-Cell Gene Perturbation Modeling with Counterfactual Reasoning-based Artifact
Disentanglement", AAAI 2025) and the settings in its tables, not from its code: residual MLPs with
LeakyReLU, concatenated latents, negative binomial with observed library, straight-through masks,
particles as the leading dimension of everything, the factual and the counterfactual branch both
decoded, scored and sampled at every step, every term of the ELBO by sampling, a Gaussian KL between
two basal posteriors, Adam with weight decay, clipping at 100. Plain torch and Pyro's distributions,
without compilation and without artificial delays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from cradle_pyro.seeding import seeded

_MOST_PARTNERS: Final = 50


@dataclass(frozen=True)
class NaiveSettings:
    """Sizes of the published step (its Norman settings).

    Parameters
    ----------
    n_cells
        Batch size.
    n_genes, n_perturbations, n_latents, n_particles
        Sizes.
    hidden
        Width of every network.
    decoder_layers, basal_layers, effect_layers
        Hidden layers of the decoder, the basal encoder and the effect encoder.
    mask_probability
        Prior probability that a perturbation shifts a latent.
    beta
        Weight of the KL between the basal posteriors.
    learning_rate, weight_decay, clip
        Of Adam, and the largest gradient norm.
    failing_share
        Share of cells that carry the artifact.
    seed
        Seed of data and parameters.
    """

    n_cells: int = 512
    n_genes: int = 5000
    n_perturbations: int = 105
    n_latents: int = 200
    n_particles: int = 5
    hidden: int = 400
    decoder_layers: int = 2
    basal_layers: int = 1
    effect_layers: int = 4
    mask_probability: float = 0.01
    beta: float = 0.5
    learning_rate: float = 3e-4
    weight_decay: float = 1e-6
    clip: float = 100.0
    failing_share: float = 0.3
    seed: int = 0


class Screen(NamedTuple):
    """Cells of one step.

    Attributes
    ----------
    counts, partner
        Counts of the cells and of their counterfactual partners, shape (cells, genes).
    design
        One-hot perturbations, shape (cells, perturbations).
    failing
        Artifact flag, shape (cells, 1).
    """

    counts: Tensor
    partner: Tensor
    design: Tensor
    failing: Tensor


class World(NamedTuple):
    """One draw of the globals and what they do to each cell; particles lead every shape."""

    log_ratio: Tensor
    perturbation_shift: Tensor
    artifact: Tensor


class ResidualMLP(nn.Module):
    """Linear input, residual hidden layers with LeakyReLU, linear output."""

    def __init__(self, n_in: int, hidden: int, n_layers: int, n_out: int) -> None:
        super().__init__()
        self.input = nn.Linear(n_in, hidden)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(n_layers - 1))
        self.output = nn.Linear(hidden, n_out)
        self.activation = nn.LeakyReLU()

    def forward(self, value: Tensor) -> Tensor:
        """Return the output layer's values, shape (..., n_out)."""
        value = self.activation(self.input(value))
        for layer in self.hidden:
            value = value + self.activation(layer(value))
        return self.output(value)


class NaiveCradle(nn.Module):
    """The published generative model and guide; one method per conditional."""

    def __init__(self, settings: NaiveSettings) -> None:
        super().__init__()
        self.settings = settings
        t, k, hidden = settings.n_perturbations, settings.n_latents, settings.hidden
        self.mask_logits = nn.Parameter(torch.zeros(t, k))
        self.embedding = nn.Parameter(0.1 * torch.randn(t, k))
        self.artifact_mean = nn.Parameter(torch.zeros(k))
        self.artifact_log_scale = nn.Parameter(torch.full((k,), -2.0))
        self.log_dispersion = nn.Parameter(torch.zeros(settings.n_genes))
        self.effect_encoder = ResidualMLP(2 * k, hidden, settings.effect_layers, 2 * k)
        self.basal_encoder = ResidualMLP(
            settings.n_genes + 2 * k, hidden, settings.basal_layers, 2 * k
        )
        self.decoder = ResidualMLP(3 * k, hidden, settings.decoder_layers, settings.n_genes)

    def draw_world(self, design: Tensor) -> World:
        """Return straight-through masks, effects given masks, artifact, and log p - log q."""
        s = self.settings
        shape = (s.n_particles, s.n_perturbations, s.n_latents)
        probability = torch.sigmoid(self.mask_logits).expand(shape)
        hard = torch.bernoulli(probability.detach())
        mask = hard + probability - probability.detach()
        q_mask = dist.Bernoulli(logits=self.mask_logits, validate_args=False)
        p_mask = dist.Bernoulli(
            probs=torch.full_like(self.mask_logits, s.mask_probability), validate_args=False
        )

        location, raw = self.effect_encoder(
            torch.cat([mask, self.embedding.expand(shape)], dim=-1)
        ).chunk(2, dim=-1)
        q_effect = dist.Normal(location, nn.functional.softplus(raw) + 1e-4)
        effect = q_effect.rsample()
        q_artifact = dist.Normal(self.artifact_mean, self.artifact_log_scale.exp())
        artifact = q_artifact.rsample((s.n_particles,))

        log_ratio = (p_mask.log_prob(mask) - q_mask.log_prob(mask)).sum((-2, -1))
        log_ratio = log_ratio + (dist.Normal(0.0, 1.0).log_prob(effect)).sum((-2, -1))
        log_ratio = log_ratio - q_effect.log_prob(effect).sum((-2, -1))
        log_ratio = log_ratio + dist.Normal(0.0, 1.0).log_prob(artifact).sum(-1)
        log_ratio = log_ratio - q_artifact.log_prob(artifact).sum(-1)
        return World(log_ratio, design @ (mask * effect), artifact)

    def basal(self, counts: Tensor, perturbation: Tensor, artifact: Tensor) -> dist.Normal:
        """Return q(z | x, p, r); counts standardised after log1p, once per particle."""
        standard = torch.log1p(counts)
        standard = (standard - standard.mean(0)) / (standard.std(0) + 1e-3)
        standard = standard.expand(len(perturbation), *counts.shape)
        location, raw = self.basal_encoder(
            torch.cat([standard, perturbation, artifact], dim=-1)
        ).chunk(2, dim=-1)
        return dist.Normal(location, nn.functional.softplus(raw) + 1e-4)

    def counts(
        self, z: Tensor, perturbation: Tensor, artifact: Tensor, library: Tensor
    ) -> dist.GammaPoisson:
        """Return the negative binomial with mean library · softmax(decoder)."""
        logits = self.decoder(torch.cat([z, perturbation, artifact], dim=-1))
        mean = library * torch.softmax(logits, dim=-1)
        dispersion = self.log_dispersion.exp()
        # Medians of an even number of cells may end in a half.
        return dist.GammaPoisson(dispersion, dispersion / mean, validate_args=False)


def gaussian_kl(q: dist.Normal, p: dist.Normal) -> Tensor:
    """Return KL(q ‖ p) summed over latents, with the squared difference over p's variance."""
    ratio = (q.scale / p.scale) ** 2
    return 0.5 * (ratio + ((q.loc - p.loc) / p.scale) ** 2 - 1 - ratio.log()).sum(-1)


def naive_loss(
    model: NaiveCradle, screen: Screen, n_train: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the published loss of a batch, in nats per cell, and both branches' samples.

    The divergence of the globals is shared by the `n_train` training cells.

    The samples are part of the published step, though its loss does not use them.
    The globals of the factual and the counterfactual pass are separate draws, as published.
    """
    settings = model.settings
    library = screen.counts.sum(-1, keepdim=True)
    partner_library = screen.partner.sum(-1, keepdim=True)

    # Factual and counterfactual branch of the model, at one draw of the guide.
    world = model.draw_world(screen.design)
    factual_shift = screen.failing * world.artifact[:, None]
    counterfactual_shift = (1 - screen.failing) * world.artifact[:, None]
    q_z = model.basal(screen.counts, world.perturbation_shift, factual_shift)
    z = q_z.rsample()
    factual = model.counts(z, world.perturbation_shift, factual_shift, library)
    counterfactual = model.counts(
        z, world.perturbation_shift, counterfactual_shift, partner_library
    )
    share = screen.failing.mean()
    weight = torch.where(screen.failing[:, 0] > 0, 1 - share, share)
    reconstruction = factual.log_prob(screen.counts).sum(-1)
    branch = counterfactual.log_prob(screen.partner).sum(-1)
    generated = factual.sample(), counterfactual.sample()
    z_ratio = (dist.Normal(0.0, 1.0).log_prob(z) - q_z.log_prob(z)).sum(-1)
    elbo = (weight * (reconstruction + branch) + z_ratio).mean(-1)
    elbo = (elbo + world.log_ratio / n_train).mean()

    # The two basal posteriors that should agree, at a second draw of the guide.
    other = model.draw_world(screen.design)
    factual_shift = screen.failing * other.artifact[:, None]
    counterfactual_shift = (1 - screen.failing) * other.artifact[:, None]
    q_factual = model.basal(screen.counts, other.perturbation_shift, factual_shift)
    q_partner = model.basal(screen.partner, other.perturbation_shift, counterfactual_shift)
    agreement = gaussian_kl(q_partner, q_factual).mean()
    return settings.beta * agreement - elbo, generated


def make_screen(settings: NaiveSettings) -> Screen:
    """Return random counts with Perturb-seq's depth: about a tenth of the entries above zero."""
    rates = torch.distributions.Gamma(0.15, 1.0).sample((settings.n_genes,))
    rates = rates / rates.sum()
    depth = torch.distributions.LogNormal(8.0, 0.4)
    size = (settings.n_cells, 1)
    counts, partner = (torch.poisson(depth.sample(size) * rates) + 0.0 for _ in range(2))
    counts[:, 0] += 1
    partner[:, 0] += 1
    labels = torch.randint(settings.n_perturbations, (settings.n_cells,))
    design = nn.functional.one_hot(labels, settings.n_perturbations).float()
    return Screen(counts, partner, design, (torch.rand(size) < settings.failing_share).float())


def naive_step(
    settings: NaiveSettings | None = None, *, device: str = "cpu"
) -> Callable[[], float]:
    """Return a function that takes one optimiser step and returns the loss in nats per cell.

    Data and parameters are built here, so that a call times the step alone. The caller's random
    state is left as it was; the step itself draws from it (see `cradle_pyro.seeding.seeded`).
    """
    settings = settings or NaiveSettings()
    with seeded(settings.seed):
        screen, model = make_screen(settings), NaiveCradle(settings).to(device)
    screen = Screen(*(part.to(device) for part in screen))
    optimiser = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    return lambda: _take_step(model, optimiser, screen, settings.n_cells)


def naive_training(
    train: Screen, validation: Screen, settings: NaiveSettings
) -> Iterator[tuple[float, float]]:
    """Train the naive model; yield seconds of training so far and the loss of held-out cells.

    Parameters
    ----------
    train
        Training cells with their partners; batches of ``settings.n_cells``.
    validation
        Held-out cells; their partners are not used.
    settings
        Sizes and optimiser.

    Yields
    ------
    tuple
        After each epoch: seconds, validation not counted, and -ELBO in nats per cell.
    """
    n_train = len(train.counts)
    with seeded(settings.seed):
        model = NaiveCradle(settings)
        optimiser = torch.optim.Adam(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        seconds = 0.0
        while True:
            start = time.perf_counter()
            for rows in torch.randperm(n_train).split(settings.n_cells):
                _take_step(model, optimiser, Screen(*(part[rows] for part in train)), n_train)
            seconds += time.perf_counter() - start
            with torch.no_grad():
                yield seconds, _held_out_loss(model, validation, n_train)


def median_partners(counts: np.ndarray, labels: np.ndarray, failing: np.ndarray) -> np.ndarray:
    """Return the published partners: medians of up to 50 failing cells of each cell's label.

    Parameters
    ----------
    counts
        Dense, shape (cells, genes).
    labels
        Perturbation of each cell.
    failing
        Whether each cell failed QC.

    Returns
    -------
    ndarray
        Shape (cells, genes); a cell whose label has no failing cells is its own partner. The
        published choice is random for each cell; here it is made once for a label, which is faster.
    """
    partners = counts.copy()
    for label in np.unique(labels):
        of_label = labels == label
        failed = np.flatnonzero(of_label & failing)[:_MOST_PARTNERS]
        if len(failed):
            partners[of_label] = np.median(counts[failed], axis=0)
    return partners


def _take_step(
    model: NaiveCradle, optimiser: torch.optim.Optimizer, screen: Screen, n_train: int
) -> float:
    optimiser.zero_grad()
    loss, _generated = naive_loss(model, screen, n_train)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), model.settings.clip)
    optimiser.step()
    return float(loss.detach())


def _held_out_loss(model: NaiveCradle, screen: Screen, n_train: int) -> float:
    """Return -ELBO of the factual cells, nats per cell; every cell counts the same."""
    world = model.draw_world(screen.design)
    shift = screen.failing * world.artifact[:, None]
    q_z = model.basal(screen.counts, world.perturbation_shift, shift)
    z = q_z.rsample()
    library = screen.counts.sum(-1, keepdim=True)
    density = model.counts(z, world.perturbation_shift, shift, library).log_prob(screen.counts)
    density = density.sum(-1) + (dist.Normal(0.0, 1.0).log_prob(z) - q_z.log_prob(z)).sum(-1)
    return -float((density.mean(-1) + world.log_ratio / n_train).mean())
