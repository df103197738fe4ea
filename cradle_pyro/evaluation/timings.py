"""What the speed benchmark measures: steps, epochs, queries and QC, beside the published way.

Every function measures one case in this process, in seconds of wall time. Steps and products of
matrices are measured on a device, ``"cpu"`` unless told.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import lightning as L
import numpy as np
import pyro
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cradle_pyro import sites
from cradle_pyro.config import Config
from cradle_pyro.data.fields import read_screen
from cradle_pyro.data.matching import match_partners
from cradle_pyro.data.prepare import prepare
from cradle_pyro.data.qc import annotate_artifacts
from cradle_pyro.evaluation.evaluate import evaluate
from cradle_pyro.evaluation.naive import (
    NaiveSettings,
    Screen,
    make_screen,
    median_partners,
    naive_step,
    naive_training,
)
from cradle_pyro.inference.allocation import freed_memory_kept
from cradle_pyro.inference.batches import Carriers
from cradle_pyro.inference.objectives import COUNTERFACTUAL, CradleELBO, FlipPool
from cradle_pyro.inference.optimizer import clip_gradients, make_optimizer
from cradle_pyro.inference.pair import build_pair
from cradle_pyro.inference.train import FEW_EFFECTS, fit
from cradle_pyro.queries.counterfactual import write_counterfactual
from cradle_pyro.queries.effects import effects
from cradle_pyro.queries.interventions import do
from cradle_pyro.simulate.large import simulate_large
from cradle_pyro.simulate.perturbseq import simulate_perturbseq
from cradle_pyro.types import Batch, Schema, Statistics

if TYPE_CHECKING:
    from cradle_pyro.data.dataset import CellData
    from cradle_pyro.inference.loop import TrainingLoop
    from cradle_pyro.inference.posterior import Posterior

__all__ = [
    "NAIVE",
    "ROUNDS",
    "VARIANTS",
    "annotation",
    "default_step",
    "evaluation",
    "many_effects",
    "published_memory",
    "published_steps",
    "query_screen",
    "roofline",
    "time_to_loss",
    "training_step",
]

ROUNDS: Final = 5
NAIVE: Final = "naive"
_STEPS_OF_A_TURN: Final = 3
_GIGA: Final = 1e9
_NOT_OF_THE_COUNTS: Final = (sites.ARTIFACT, sites.LIBRARY, COUNTERFACTUAL)
_ONE_EPOCH: Final = (
    "train.max_epochs=1",
    "split.train=0.9",
    "split.validation=0.02",
    "qc.doublets=false",
    "model.gene_effect.interaction_cells=none",
)
_QUERY_CELLS: Final = 10_000
_QUERY_DRAWS: Final = 5
# The published sizes (Norman), on top of what is published_cradle among the predictors.
_PUBLISHED_SIZES: Final = (
    "model.n_latents=200",
    "model.decoder={hidden=400, layers=2}",
    "guide.encoder={hidden=400, layers=1}",
    "guide.effect_encoder={hidden=400, layers=4}",
    "train.batch_size=512",
)
_TWO_PARTS: Final = ("train.batch_size=256", "train.accumulate=2")
_NO_TERM: Final = ("objective.counterfactual=none",)
_SLEEP: Final = ("objective.counterfactual=sleep", "objective.beta=1.0")
VARIANTS: Final[dict[str, tuple[str, ...]]] = {
    "partner term": (),
    "partner term, in two parts": _TWO_PARTS,
    "no counterfactual term": _NO_TERM,
    "generation": _SLEEP,
}


# ----------------------------------------------------------------------------------------- steps


def training_step(
    config: Config, sizes: NaiveSettings, *, device: str = "cpu"
) -> Callable[[], float]:
    """Return one optimiser step of our pair, on a batch as the naive step's.

    Parameters
    ----------
    config
        Sections model, guide, objective, and the optimiser's settings; the batch is gone through
        in ``train.accumulate`` parts.
    sizes
        Cells, genes and perturbations.
    device
        Where batch and pair are.
    """
    screen = make_screen(sizes)
    batch = Batch(
        counts=screen.counts,
        perturbation=screen.design,
        artifact=screen.failing,
        library=screen.counts.sum(-1),
        covariates=torch.zeros(sizes.n_cells, 0),
    )
    schema = Schema(
        genes=tuple(f"G{i}" for i in range(sizes.n_genes)),
        perturbations=tuple(f"T{i}" for i in range(sizes.n_perturbations)),
        artifacts=("any",),
    )
    statistics_ = _statistics(batch)
    model, guide = build_pair(schema, config, statistics_, seed=0)
    failing = (batch.artifact > 0).any(-1)
    designs = batch.perturbation.unique(dim=0)
    pool = FlipPool(
        designs, torch.ones(len(designs)), torch.ones(1, 1), torch.ones(1),
        batch.library[~failing], batch.library[failing],
    )  # fmt: skip
    partner = batch.replace(
        counts=screen.partner, artifact=1 - batch.artifact, library=screen.partner.sum(-1)
    )
    parts = _parts(batch, partner, config.train.accumulate)
    by_row = sizes.n_perturbations > FEW_EFFECTS
    if by_row:
        cells = torch.full((sizes.n_perturbations,), 10.0)
        carriers = Carriers(statistics_.combinations, cells, statistics_.n_cells)
        parts = [part.replace(carried=carriers.carried(part.perturbation)) for part in parts]
    parts = [part.to(device) for part in parts]
    objective = CradleELBO(config.objective, pool.to(device))
    optimizer = make_optimizer(model.to(device), guide.to(device), config.train, by_row=by_row)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            # As in all steps of training but the first.
            with pyro.validation_enabled(is_validate=False):
                loss = torch.stack(list(objective.terms(model, guide, part).values())).sum()
            (loss / len(parts)).backward()
            total += loss.item() / len(parts)
        clip_gradients(parameters, config.train.gradient_clip)
        optimizer.step()
        return total

    return step


def _parts(batch: Batch, partner: Batch, n_parts: int) -> list[Batch]:
    """Return parts of a batch, in which every cell has a partner."""
    found = []
    for rows in torch.arange(len(batch)).chunk(n_parts):
        mates, places = partner.take(rows), torch.arange(len(rows))
        found.append(batch.take(rows).replace(partner=mates, partner_rows=places))
    return found


def _statistics(batch: Batch) -> Statistics:
    logs, log_library = torch.log1p(batch.counts), batch.library.log()
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


def _published(settings: Sequence[str]) -> Config:
    from cradle_pyro.baselines.learned import PEERS

    return Config().with_settings([*PEERS["published_cradle"], *_PUBLISHED_SIZES, *settings])


def _seconds(
    steps: dict[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, float]:
    """Return the median time of each step, after one to warm up, in alternating rounds."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def published_steps(*, rounds: int, device: str = "cpu", **sizes: int) -> dict[str, float]:
    """Time the naive step and ours of the published settings (`VARIANTS`) side by side.

    A machine that others share is not equally fast for long: in every round each has its turn, with
    a step to warm up and the median of those that follow. Ratios are medians over the rounds.
    """
    shape = NaiveSettings(**sizes)
    steps = {NAIVE: naive_step(shape, device=device)} | {
        name: training_step(_published(settings), shape, device=device)
        for name, settings in VARIANTS.items()
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            with nullcontext() if name == NAIVE else freed_memory_kept():
                found[name].append(_seconds({name: step}, _STEPS_OF_A_TURN, device)[name])
    seconds = {f"{name}, s": statistics.median(values) for name, values in found.items()}
    return seconds | {
        f"{NAIVE} / {name}": statistics.median(np.divide(found[NAIVE], found[name]))
        for name in VARIANTS
    }


def published_memory(*, variant: str, device: str = "cpu", **sizes: int) -> dict[str, float]:
    """Take steps of the naive kind, or of one of ours, for the memory of their process."""
    shape = NaiveSettings(**sizes)
    if variant == NAIVE:
        return {
            "step, s": _seconds({variant: naive_step(shape, device=device)}, 2, device)[variant]
        }
    with freed_memory_kept():
        step = training_step(_published(VARIANTS[variant]), shape, device=device)
        return {"step, s": _seconds({variant: step}, ROUNDS, device)[variant]}


def default_step(*, rounds: int, device: str = "cpu", **sizes: int) -> dict[str, float]:
    """Time a step of the default settings, with and without generated cells."""
    shape = NaiveSettings(**sizes)
    variants = {"default": (), "no counterfactual term": _NO_TERM}
    steps = {
        name: training_step(Config().with_settings(list(settings)), shape, device=device)
        for name, settings in variants.items()
    }
    with freed_memory_kept():
        seconds = _seconds(dict(steps), rounds, device)
    return {f"{name}, s": value for name, value in seconds.items()} | {
        "default / no term": seconds["default"] / seconds["no counterfactual term"]
    }


# ------------------------------------------------------------------------------------ time to loss


class _Arrival(L.Callback):
    """When training came to a validation loss of the counts."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.seconds: float | None = None
        self.epochs = 0
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.seconds is not None:
            return
        terms = cast("TrainingLoop", pl_module).means("val")
        loss = sum(value for name, value in terms.items() if name not in _NOT_OF_THE_COUNTS)
        self.epochs = trainer.current_epoch + 1
        if loss <= self.target:
            self.seconds = time.perf_counter() - self._start
            trainer.should_stop = True


def time_to_loss(
    *, epochs: int, patience: int, screen: dict[str, int], settings: Sequence[str], **sizes: int
) -> dict[str, float]:
    """Time the naive run until its best validation loss, and ours until that loss.

    Both are -ELBO of the counts of the demo screen's validation cells. What our model says of
    flags and libraries beyond that is left out; its divergences are not. Our time is that of
    :func:`~cradle_pyro.inference.train.fit`, with the regression that effects start from and with
    validation; the naive time is that of its steps.
    """
    config = Config().with_settings(settings)
    _, data = prepare(simulate_perturbseq(**screen), config)
    train, validation = (_naive_screen(data.where(split=part)) for part in ("train", "val"))
    shape = NaiveSettings(
        n_genes=data.schema.n_genes, n_perturbations=data.schema.n_perturbations, **sizes
    )
    best, best_seconds, since = float("inf"), 0.0, 0
    for seconds, loss in islice(naive_training(train, validation, shape), epochs):
        since += 1
        if loss < best:
            best, best_seconds, since = loss, seconds, 0
        if since >= patience:
            break
    arrival = _Arrival(best)
    fit(data, config, progress=False, callbacks=[arrival])
    ours = float("nan") if arrival.seconds is None else arrival.seconds
    return {
        "naive, nats per cell": best,
        "naive, s": best_seconds,
        "ours, s": ours,
        "ours, epochs": float(arrival.epochs),
        "naive / ours": best_seconds / ours,
    }


def _naive_screen(cells: CellData) -> Screen:
    batch = cells.batch()
    partners = median_partners(batch.counts.numpy(), cells.labels, cells.failing)
    failing = torch.as_tensor(cells.failing).float().unsqueeze(-1)
    return Screen(batch.counts, torch.as_tensor(partners), batch.perturbation, failing)


# ---------------------------------------------------------------------------- screens, QC, queries


class _Epochs(L.Callback):
    """Times the training epochs, without validation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def query_screen(*, n_cells: int, folder: str, backed: bool, **sizes: int) -> dict[str, float]:
    """Annotate a screen, train one epoch, ask about 10,000 of its cells."""
    path = _screen_file(folder, n_cells, **sizes)
    config = Config().with_settings(_ONE_EPOCH)
    clock = _Clock()
    adata = read_screen(path, backed=backed)
    clock.stop("load")
    adata, data = prepare(adata, config)
    clock.stop("annotate")
    epochs = _Epochs()
    posterior = fit(data, config, progress=False, callbacks=[epochs])
    n_train = int((np.asarray(data.split) == "train").sum())
    clock.stop("train")
    with tempfile.TemporaryDirectory() as answers:
        cells = data.random_subset(_QUERY_CELLS, seed=0)
        write_counterfactual(
            posterior, cells, do(artifact=0), Path(answers) / "answer.h5ad", draws=_QUERY_DRAWS
        )
    clock.stop("query")
    return clock.seconds | {
        "cells": float(n_cells),
        "epoch, s": epochs.seconds[0],
        "epoch, ms per cell": 1e3 * epochs.seconds[0] / n_train,
        "query, ms per cell": 1e3 * clock.seconds["query, s"] / cells.n_cells,
    }


def many_effects(
    *, n_cells: int, folder: str, draws: int, query_cells: int, **sizes: int
) -> dict[str, float]:
    """Train one epoch, then ask for the average effects of all perturbations on all genes."""
    clock = _Clock()
    posterior, _ = _after_one_epoch(folder, n_cells, **sizes)
    clock.stop("train")
    found = effects(posterior, draws=draws, n_cells=query_cells)
    clock.stop("effects")
    return clock.seconds | {"effects, ms per label": 1e3 * clock.seconds["effects, s"] / len(found)}


def evaluation(*, n_cells: int, folder: str, **sizes: int) -> dict[str, float]:
    """Train one epoch, then score the model and the default baselines on test cells."""
    posterior, data = _after_one_epoch(folder, n_cells, **sizes)
    clock = _Clock()
    found = evaluate(posterior, data)
    clock.stop("evaluate")
    return clock.seconds | {"test cells": float(found.facts["n_test"])}


def _after_one_epoch(folder: str, n_cells: int, **sizes: int) -> tuple[Posterior, CellData]:
    config = Config().with_settings(_ONE_EPOCH)
    _, data = prepare(read_screen(_screen_file(folder, n_cells, **sizes)), config)
    return fit(data, config, progress=False), data


def _screen_file(folder: str, n_cells: int, *, n_genes: int, n_perturbations: int) -> Path:
    """Return a simulated screen of these sizes, made where there is none yet."""
    path = Path(folder) / f"{n_cells}x{n_genes}x{n_perturbations}.h5ad"
    if not path.exists():
        simulate_large(path, n_cells, n_genes=n_genes, n_perturbations=n_perturbations)
    return path


class _Clock:
    """Names the time since it was last asked."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{name}, s"] = now - self._last
        self._last = now


def annotation(*, n_cells: int, folder: str, naive_cells: int, **sizes: int) -> dict[str, float]:
    """QC flags and partners of all cells, and the published way for some, per cell.

    The published way makes the counts dense and, for every cell, takes the gene-wise median of up
    to 50 failing cells of its perturbation.
    """
    adata = read_screen(_screen_file(folder, n_cells, **sizes))
    clock = _Clock()
    annotate_artifacts(adata, doublets=False)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    failing = adata.obs["cradle_artifact"].to_numpy()
    match_partners(labels, failing, rng=np.random.default_rng(0))
    clock.stop("ours")
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(adata.X)
    for cell in rng.choice(n_cells, naive_cells, replace=False):
        partners = np.flatnonzero((labels == labels[cell]) & failing)[:50]
        if len(partners):
            np.median(counts[partners].toarray(), axis=0)
    clock.stop("naive")
    per_cell = clock.seconds["naive, s"] / naive_cells
    return {
        "ours, s": clock.seconds["ours, s"],
        "naive partners, ms per cell": 1e3 * per_cell,
        "naive partners of all cells / ours": per_cell * n_cells / clock.seconds["ours, s"],
    }


# --------------------------------------------------------------------------------------- roofline


class _Traffic(TorchDispatchMode):
    """Adds up what operations read and write, whether a cache holds it or not."""

    n_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            values = tree_leaves((args, kwargs, found))
            arrays = [value for value in values if isinstance(value, Tensor)]
            self.n_bytes += sum(value.numel() * value.element_size() for value in arrays)
        return found


def roofline(*, device: str = "cpu", **sizes: int) -> dict[str, float]:
    """Arithmetic and traffic of the published step (generation off), and the machine's ceilings."""
    shape = NaiveSettings(**sizes)
    step = training_step(_published(_NO_TERM), shape, device=device)
    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        step()
    with freed_memory_kept():
        seconds = _seconds({"step": step}, ROUNDS, device)["step"]
    size = 2048
    left, right = (torch.rand(size, size, device=device) for _ in range(2))
    product = _seconds({"product": lambda: left @ right}, 9, device)["product"]
    large = torch.rand(50_000_000, device=device)
    copied = torch.empty_like(large)
    copy = _seconds({"copy": lambda: copied.copy_(large)}, 9, device)["copy"]
    flops = float(counter.get_total_flops())
    ceiling = 2 * size**3 / product
    return {
        "step, s": seconds,
        "products of a step, GFLOP": flops / _GIGA,
        "read and written by a step, GB": traffic.n_bytes / _GIGA,
        "machine, GFLOP/s": ceiling / _GIGA,
        "machine, GB/s": 2 * large.numel() * 4 / copy / _GIGA,
        "products alone at that rate, s": flops / ceiling,
        "fraction of the ceiling": flops / ceiling / seconds,
    }
