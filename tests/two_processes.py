"""What tests of several processes run in each of them, and once alone to compare with.

python tests/two_processes.py OUT SETTING ...; under torchrun, each process runs it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning as L
import torch
from pyro.poutine.messenger import Messenger
from tiny import make_data, make_fit

from cradle_pyro import sites
from cradle_pyro.inference import train


class LocalMeans(Messenger):
    """Takes the mean of the latents of cells for their draw."""

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in {sites.Z_BASAL, sites.Z_ARTIFACT} and not msg["is_observed"]:
            msg["value"], msg["done"] = msg["fn"].mean, True


class Gradients(L.Callback):
    """Keeps the gradients of the first step, before they are clipped."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not self.first:
            named = pl_module.named_parameters()
            found = {n: p.grad.clone() for n, p in named if p.grad is not None}
            self.first = {n: g.to_dense() if g.is_sparse else g for n, g in found.items()}


def main() -> None:
    """Fit the tiny screen; each process writes what it found."""
    out, settings = Path(sys.argv[1]), sys.argv[2:]
    train.FEW_EFFECTS = 0  # effects of what a batch carries, as with many
    gradients = Gradients()
    with LocalMeans():
        posterior = make_fit(*settings, data=make_data(), callbacks=[gradients])
    found = {
        "gradients": gradients.first,
        "parameters": posterior.model.state_dict() | posterior.guide.state_dict(),
        "history": posterior.history.to_dict("list"),
    }
    torch.save(found, out / f"{os.environ.get('RANK', 'alone')}.pt")


if __name__ == "__main__":
    main()
