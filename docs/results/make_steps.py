"""Measure how batch size and particles change the time to a given validation loss.

    python docs/results/make_steps.py --screens ../shared/data

Prints one line per run and writes them to ``steps.csv`` beside this file, which it goes on with
where it stopped. Validation cells only. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import anndata
import lightning as L
import pandas as pd

import cradle_pyro as cp
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.prepare import prepare
from cradle_pyro.simulate.perturbseq import DEMO_SETTINGS

TABLE = Path(__file__).parent / "steps.csv"
CONFIGS = Path(__file__).parents[2] / "configs"
SIMULATION_SEED = 100  # one of those that settings are chosen on
NATS = 1.0  # from the lowest loss of the default settings
DEFAULT = "batch 128"
SETTINGS: dict[str, tuple[str, ...]] = {
    DEFAULT: ("train.batch_size=128",),
    "batch 64": ("train.batch_size=64",),
    "batch 256": ("train.batch_size=256",),
    "batch 512": ("train.batch_size=512",),
    "batch 256, twice the rates": (
        "train.batch_size=256", "train.learning_rate=0.01", "train.effect_learning_rate=0.02",
    ),
    "batch 128, 2 particles": ("train.batch_size=128", "objective.particles=2"),
    "batch 128, 5 particles": ("train.batch_size=128", "objective.particles=5"),
}  # fmt: skip


class Progress(L.Callback):
    """Seconds since the start, and the validation loss, after each epoch."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note time and loss."""
        if not trainer.sanity_checking:
            seconds = time.perf_counter() - self._start
            self.rows.append((seconds, float(trainer.callback_metrics["val_loss"])))


def screens(folder: Path) -> Iterator[tuple[str, CellData, cp.Config]]:
    """Yield each screen's name, cells and configuration."""
    config = cp.Config().with_settings(DEMO_SETTINGS)
    for n_cells in (6000, 3000):
        adata = cp.simulate_perturbseq(seed=SIMULATION_SEED, n_cells=n_cells)
        yield f"simulated, {n_cells:,} cells", prepare(adata, config)[1], config
    config = cp.Config.from_toml(CONFIGS / "papalexi.toml")
    adata = anndata.read_h5ad(folder / "papalexi2021_eccite.h5ad")
    yield "papalexi", prepare(adata, config)[1], config


def run(data: CellData, config: cp.Config, target: float | None) -> dict[str, float]:
    """Train; return when the loss came to `target`, or within `NATS` of its lowest."""
    progress = Progress()
    cp.fit(data, config, progress=False, callbacks=[progress])
    lowest = min(loss for _, loss in progress.rows)
    target = lowest + NATS if target is None else target
    there = [k for k, (_, loss) in enumerate(progress.rows) if loss <= target]
    return {
        "loss asked for": target,
        "seconds to it": progress.rows[there[0]][0] if there else float("nan"),
        "epochs to it": there[0] + 1 if there else float("nan"),
        "lowest loss": lowest,
        "seconds": progress.rows[-1][0],
    }


def main() -> None:
    """Train with each of the settings, one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--screens", type=Path, default=Path("../shared/data"))
    rows = pd.read_csv(TABLE).to_dict("records") if TABLE.exists() else []
    for screen, data, config in screens(parser.parse_args().screens):
        target = None
        for name, settings in SETTINGS.items():
            done = [row for row in rows if (row["screen"], row["settings"]) == (screen, name)]
            if not done:
                found = run(data, config.with_settings(settings), target)
                done = [{"screen": screen, "settings": name, **found}]
                print(done[0], flush=True)  # noqa: T201
                rows += done
                pd.DataFrame(rows).round(3).to_csv(TABLE, index=False)
            target = float(done[0]["loss asked for"])


if __name__ == "__main__":
    main()
