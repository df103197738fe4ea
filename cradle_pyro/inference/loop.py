"""What Lightning needs to run the loop: a module, a history, and a trainer."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pandas as pd
import pyro
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pyro.poutine.messenger import Messenger
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cradle_pyro import sites
from cradle_pyro.config import TrainConfig
from cradle_pyro.errors import TrainingError
from cradle_pyro.inference.batches import set_epoch
from cradle_pyro.inference.checkpoint import SafeCheckpointIO, read_checkpoint
from cradle_pyro.inference.objectives import CradleELBO
from cradle_pyro.inference.optimizer import clip_gradients, make_optimizer
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch

__all__ = [
    "PRIOR",
    "History",
    "OwnNoise",
    "TrainingLoop",
    "is_first_process",
    "make_trainer",
    "quiet_lightning",
]

PRIOR = "prior"
"""Term of the training loss: minus the log-prior of the model's parameters, nats per cell."""

_TRAIN, _VALIDATION = "train", "val"
# What Lightning remarks on although it is as intended, or its own affair.
_NOTES = (
    ".*does not have many workers.*",
    ".*Checkpoint directory.*exists.*",
    ".*GPU available but not used.*",
    ".*smaller than the logging interval.*",
    ".*but have no `val_dataloader`.*",
    ".*`IterableDataset` has `__len__` defined.*",  # scDataset divides cells among workers
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 with torch 2.13
)


class TrainingLoop(L.LightningModule):
    """A (model, guide) pair with its objective, as a Lightning module.

    Parameters
    ----------
    model, guide
        The pair; trained in place.
    objective
        Gives the named terms of the loss in nats per cell.
    config
        Optimiser, schedule and seed.
    by_row
        Batches carry their effects (``Batch.carried``); a step moves these only.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        objective: CradleELBO,
        config: TrainConfig,
        *,
        by_row: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.guide = guide
        self.objective = objective
        self.config = config
        self.by_row = by_row
        self.sums: dict[str, dict[str, Tensor]] = {_TRAIN: {}, _VALIDATION: {}}
        self.sizes = dict.fromkeys(self.sums, 0)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the loss in nats per cell, with noise that depends on seed, batch and rank only.

        So a resumed run repeats an uninterrupted one, whatever drew random numbers in between. Of
        several processes each counts as many cells as it has: the mean of their gradients is that
        of the whole batch.
        """
        number = self.current_epoch * int(self.trainer.num_training_batches) + index
        torch.manual_seed(_seed(self.config.seed, number, 0))
        loss = self._step(batch, _TRAIN, number)
        if self.trainer.world_size == 1:
            return loss
        size = loss.new_tensor(float(len(batch)))
        return loss * (size / cast("Tensor", self.trainer.strategy.reduce(size.clone())))

    def validation_step(self, batch: Batch, index: int) -> None:
        """Add the batch to the validation loss, with the same noise in every epoch."""
        with seeded(self.config.seed + index):
            self._step(batch, _VALIDATION, index)

    def on_train_start(self) -> None:
        """Bring the pool of training states to the device."""
        if self.objective.pool is not None:
            self.objective.pool = self.objective.pool.to(self.device)

    on_sanity_check_start = on_train_start

    def on_train_epoch_start(self) -> None:
        """Choose the epoch's order of cells and its partners."""
        set_epoch(cast("DataLoader", self.trainer.train_dataloader), self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        """Report the validation loss, which early stopping and the best checkpoint watch."""
        self.log("val_loss", sum(self.means(_VALIDATION).values()), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser (:func:`~cradle_pyro.inference.optimizer.make_optimizer`)."""
        optimizer = make_optimizer(self.model, self.guide, self.config, by_row=self.by_row)
        if self.config.schedule == "constant":
            return {"optimizer": optimizer}
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / total, 1))),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale the gradients to a total norm of at most ``train.gradient_clip``."""
        clip_gradients(self.parameters(), self.config.gradient_clip)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Return the batch on `device`."""
        return batch.to(device)

    def load_best(self, path: str) -> None:
        """Load the parameters of a checkpoint, which the first process reads for all."""
        state = read_checkpoint(path)["state_dict"] if self.trainer.is_global_zero else {}
        self.load_state_dict(self.trainer.strategy.broadcast(state))

    def take_means(self, stage: str) -> dict[str, float]:
        """Return the mean terms since the last call, in nats per cell, and start anew."""
        means = self.means(stage)
        self.sums[stage], self.sizes[stage] = {}, 0
        return means

    def _step(self, batch: Batch, stage: str, index: int) -> Tensor:
        with ExitStack() as stack:
            if self.trainer.world_size > 1:
                key = (self.config.seed, index, 1 + (stage == _VALIDATION), self.global_rank)
                stack.enter_context(OwnNoise(_seed(*key)))
            terms = self._terms(batch)
        log_prior: Any = getattr(self.model, "log_prior", None)
        if stage == _TRAIN and log_prior is not None:
            terms[PRIOR] = -log_prior()
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            bad = [name for name, value in terms.items() if not torch.isfinite(value)]
            raise TrainingError(_describe(f"term {', '.join(bad) or 'sum'}", self))
        size, sums = len(batch), self.sums[stage]
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + size * value.detach()
        self.sizes[stage] += size
        return loss

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        # Pyro checks shapes and values in the first step; later, values that are not finite reach
        # the loss, which tells their term.
        with pyro.validation_enabled(self.global_step == 0):
            try:
                return self.objective.terms(self.model, self.guide, batch)
            except (ValueError, RuntimeError) as error:  # a draw from such values fails at once
                if not _broken(self):
                    raise
                reason = str(error).strip().splitlines()[0]
                raise TrainingError(
                    _describe(f"no term could be computed ({reason})", self)
                ) from error

    def means(self, stage: str) -> dict[str, float]:
        """Return the mean terms since the last `take_means`, over the cells of all processes."""
        names, size = list(self.sums[stage]), self.sizes[stage]
        if not names:
            return {}
        sums = torch.stack([self.sums[stage][name] for name in names]).double()
        mine = torch.cat([sums, sums.new_tensor([size])])
        found = cast("Tensor", self.trainer.strategy.reduce(mine, reduce_op="sum"))
        return dict(zip(names, (found[:-1] / found[-1]).tolist(), strict=True))


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class OwnNoise(Messenger):
    """Draws that the cells of this process have for themselves.

    Global latents come first in a guide, from the state that all processes share; from the first
    draw in the cells plate on, numbers come from `seed`.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed: int | None = seed

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        in_plate = any(frame.name == sites.CELLS for frame in msg["cond_indep_stack"])
        if self.seed is not None and in_plate and not msg["is_observed"]:
            torch.manual_seed(self.seed)
            self.seed = None


def is_first_process() -> bool:
    """Return whether this process is the one that writes files and speaks."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _broken(loop: TrainingLoop) -> list[str]:
    """Return the names of parameters that are not finite."""
    return [name for name, p in loop.named_parameters() if not torch.isfinite(p).all()]


def _describe(what: str, loop: TrainingLoop) -> str:
    broken = _broken(loop)
    parameters = f" Parameters that are not finite: {', '.join(broken[:5])}." if broken else ""
    return (
        f"The loss is not finite at step {loop.global_step} (epoch {loop.current_epoch}): {what}."
        f"{parameters} Try a lower train.learning_rate or train.gradient_clip, and look for "
        "extreme counts or libraries."
    )


class History(Callback):
    """Collects every term of the loss per epoch, in nats per cell."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what the sanity check added."""
        if trainer.sanity_checking:
            cast("TrainingLoop", pl_module).take_means(_VALIDATION)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a row, and report the training loss (this runs before the module's own hook)."""
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        loop = cast("TrainingLoop", pl_module)
        for stage in (_TRAIN, _VALIDATION):
            means = loop.take_means(stage)
            if means:
                row[f"{stage}_loss"] = sum(means.values())
                row |= {f"{stage}_{name}": value for name, value in means.items()}
        self.epochs.append(row)
        loop.log("train_loss", row["train_loss"], prog_bar=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, for the checkpoint."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of a checkpoint."""
        self.epochs = list(state_dict["epochs"])

    def table(self) -> pd.DataFrame:
        """Return one row per epoch."""
        return pd.DataFrame(self.epochs)


class TrainingProgress(Callback):
    """One bar over all epochs, with the time left and the validation loss."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self.bar = Progress(
            TextColumn("Epoch {task.fields[epoch]}/{task.total:.0f}"),
            BarColumn(bar_width=14),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[loss]}"),
            disable=not trainer.is_global_zero,
        )
        start = trainer.current_epoch
        self.task = self.bar.add_task(
            "", total=trainer.max_epochs, completed=start, epoch=start, loss=""
        )
        self.bar.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        index: int,
    ) -> None:
        """Move on by a batch."""
        self.bar.advance(self.task, 1 / trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch and its loss."""
        loss = trainer.callback_metrics.get("val_loss")
        text = "" if loss is None else f"validation {float(loss):.2f} nats"
        self.bar.update(self.task, epoch=trainer.current_epoch + 1, loss=text)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar as it is."""
        self.bar.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        if hasattr(self, "bar"):
            self.bar.stop()


def make_trainer(
    config: TrainConfig,
    directory: Path,
    history: History,
    *,
    progress: bool,
    validate: bool,
    callbacks: Sequence[Callback] = (),
) -> tuple[L.Trainer, ModelCheckpoint]:
    """Return Lightning's trainer and the callback that keeps the best and the last checkpoint."""
    monitor = "val_loss" if validate else None
    best = ModelCheckpoint(
        directory, filename="best", monitor=monitor, save_last=True, enable_version_counter=False
    )
    extra: list[Callback] = [history, best, *callbacks]
    if validate:
        extra.append(EarlyStopping("val_loss", patience=config.patience, check_finite=False))
    if progress:
        extra.append(TrainingProgress())
    is_shared = config.devices * config.nodes > 1
    trainer = L.Trainer(
        accelerator="gpu" if config.accelerator == "cuda" else config.accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        # Which parameters a step uses depends on its cells (flags that are missing, for example).
        strategy=DDPStrategy(find_unused_parameters=True) if is_shared else "auto",
        precision=config.precision,
        max_epochs=config.max_epochs,
        accumulate_grad_batches=config.accumulate,
        callbacks=extra,
        plugins=[SafeCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    return trainer, best


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notes on hardware and workers from the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for text in _NOTES:
            warnings.filterwarnings("ignore", text)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
