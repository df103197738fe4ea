"""Time our training step against the naive published one, in one run, alternating.

Run ``python tests/perf/step_ratio.py``: median seconds of each, the ratio of medians, and the
default objective beside the published one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from naive_step import NaiveSettings, make_screen, naive_step

from cradle_pyro.config import Config
from cradle_pyro.inference.objectives import CradleELBO, FlipPool
from cradle_pyro.inference.pair import build_pair
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch, Schema, Statistics

_PUBLISHED = Path(__file__).parents[2] / "configs" / "norman.toml"
_DEFAULT_OBJECTIVE = [
    "objective.counterfactual=sleep",
    "objective.beta=1.0",
]


def our_step(config: Config, settings: NaiveSettings) -> Callable[[], float]:
    """Return one optimiser step of our pair on a screen of the naive step's size."""
    screen = make_screen(settings)
    batch = Batch(
        counts=screen.counts,
        perturbation=screen.design,
        artifact=screen.failing,
        library=screen.counts.sum(-1),
        covariates=torch.zeros(settings.n_cells, 0),
    )
    statistics_ = _statistics(batch)
    schema = Schema(
        genes=tuple(f"gene{i}" for i in range(settings.n_genes)),
        perturbations=tuple(f"target{i}" for i in range(settings.n_perturbations)),
        artifacts=("any",),
    )
    model, guide = build_pair(schema, config, statistics_, seed=0)
    failing = (batch.artifact > 0).any(-1)
    partner = batch.replace(
        counts=screen.partner, artifact=1 - batch.artifact, library=screen.partner.sum(-1)
    )
    batch = batch.replace(partner=partner, partner_rows=torch.arange(settings.n_cells))
    pool = FlipPool(
        batch.perturbation.unique(dim=0),
        torch.ones(len(batch.perturbation.unique(dim=0))),
        torch.ones(1, 1),
        torch.ones(1),
        batch.library[~failing],
        batch.library[failing],
    )
    objective = CradleELBO(config.objective, pool)
    parameters = [*model.parameters(), *guide.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-4, weight_decay=1e-6)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.stack(list(objective.terms(model, guide, batch).values())).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.gradient_clip)
        optimizer.step()
        return loss.item()

    return step


def _statistics(batch: Batch) -> Statistics:
    logs = torch.log1p(batch.counts)
    log_library = batch.library.log()
    return Statistics(
        n_cells=10 * len(batch),
        log_mean=logs.mean(0),
        log_sd=logs.std(0),
        fraction=(batch.counts / batch.library.unsqueeze(-1)).mean(0),
        inverse_dispersion=torch.ones(batch.counts.shape[1]),
        log_library_mean=log_library.mean(),
        log_library_sd=log_library.std(),
        artifact_share=batch.artifact.mean(0),
        failing_share=batch.artifact.mean(),
        combinations=torch.zeros(0, batch.perturbation.shape[1]),
    )


def main() -> None:
    """Print the table of medians and ratios."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = NaiveSettings()
    published = Config.from_toml(_PUBLISHED)
    with seeded(0):
        steps = {
            "naive published step": naive_step(settings),
            "published settings, partner": our_step(published, settings),
            "published settings, no counterfactual term": our_step(
                published.with_settings(["objective.counterfactual=none"]), settings
            ),
            "published settings, default (sleep) objective": our_step(
                published.with_settings(_DEFAULT_OBJECTIVE), settings
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(options.rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    naive = statistics.median(seconds["naive published step"])
    for name, values in seconds.items():
        median = statistics.median(values)
        sys.stdout.write(
            f"{name:48s} {median:6.2f} s ({min(values):.2f} to {max(values):.2f})  "
            f"1/{naive / median:.1f} of the naive step\n"
        )
    sys.stdout.write(
        f"median of {options.rounds} alternating rounds, {options.threads} threads, "
        f"load average {os.getloadavg()[0]:.1f}\n"
    )


if __name__ == "__main__":
    main()
