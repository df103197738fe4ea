"""Training: Lightning runs the loop, the objective comes from the (model, guide) pair."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from cradle_pyro.config import Config
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.prepare import assign_split
from cradle_pyro.data.statistics import regression_effects, training_statistics
from cradle_pyro.errors import ConfigError, DataError
from cradle_pyro.inference.allocation import freed_memory_kept
from cradle_pyro.inference.batches import Carriers, Process, cell_loader
from cradle_pyro.inference.objectives import CradleELBO, FlipPool
from cradle_pyro.inference.pair import PairBuilder, build_pair
from cradle_pyro.inference.posterior import (
    Posterior,
    failing_artifacts,
    flag_column,
    reference_cells,
)
from cradle_pyro.seeding import seeded

if TYPE_CHECKING:
    import lightning as L

__all__ = ["fit", "flip_pool"]

FEW_EFFECTS: Final = 200


def fit(
    data: CellData,
    config: Config | None = None,
    *,
    pair: PairBuilder | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[L.Callback] = (),
) -> Posterior:
    """Train a model/guide pair by SVI and return its posterior.

    Parameters
    ----------
    data
        The screen. Without a split, cells are divided as ``config.split`` says; only training
        cells are learned from, early stopping sees validation cells only.
    config
        Settings; the defaults if omitted.
    pair
        Builds an edited model and guide: a function of schema, configuration and training
        statistics that returns both, as modules that are called with a batch. By default the pair
        that `config` describes. See :doc:`/editing`.
    progress
        Show Lightning's progress bar.
    checkpoint_dir
        Where to keep the best and the last checkpoint; a temporary directory if omitted.
    resume
        Continue from the last checkpoint in `checkpoint_dir`.
    callbacks
        Further Lightning callbacks.

    Returns
    -------
    Posterior
        Parameters of the epoch with the lowest validation loss (of the last, without validation).

    Raises
    ------
    DataError
        If there are no training cells.
    ConfigError
        If the likelihood does not fit the values, there is nothing to resume from, or the sites of
        an edited pair do not fit each other.
    TrainingError
        If a term of the loss is not finite.

    Examples
    --------
    >>> import cradle_pyro as cp
    >>> adata = cp.simulate_perturbseq(n_cells=200, n_genes=40, n_perturbations=3, n_pairs=1)
    >>> data = cp.CellData.from_anndata(adata, layer="counts", artifact="none")
    >>> config = cp.Config().with_settings(["train.max_epochs=1", "model.n_latents=2"])
    >>> posterior = cp.fit(data, config, progress=False)
    >>> posterior.schema.n_perturbations
    3
    """
    config = config or Config()
    _check(data, config)
    if data.split is None:
        data = assign_split(data, config.split)
    train = data.where(split="train")
    if not train.n_cells:
        raise DataError("Expected training cells, found none: the split marks no cell 'train'.")
    effects = config.model.gene_effect
    statistics = training_statistics(
        train, interaction_cells=None if effects is None else effects.interaction_cells
    )
    model, guide = build_pair(data.schema, config, statistics, seed=config.train.seed, pair=pair)
    if hasattr(guide, "start_effects"):
        guide.start_effects(regression_effects(train, statistics))
    objective = CradleELBO(
        config.objective, flip_pool(train), failing_share=float(statistics.failing_share)
    )
    carriers = None
    # With few, a batch carries nearly all of them; an edited pair may not know of them.
    if pair is None and data.schema.n_perturbations + len(statistics.combinations) > FEW_EFFECTS:
        carriers = Carriers.among(train, statistics.combinations)
    history = _train_pair(
        model, guide, objective, data, config, carriers=carriers, progress=progress,
        checkpoint_dir=checkpoint_dir, resume=resume, callbacks=callbacks,
    )  # fmt: skip
    return Posterior(
        model=model,
        guide=guide,
        schema=data.schema,
        config=config,
        statistics=statistics,
        reference=reference_cells(guide, train, seed=config.train.seed),
        history=history,
        labels=_label_table(data),
        failing_artifacts=failing_artifacts(train, seed=config.train.seed),
        facts={
            "fingerprint": data.fingerprint,
            "seed": config.train.seed,
            "dosages": _dosages(train),
        },
        pair=pair,
    )


def flip_pool(train: CellData) -> FlipPool:
    """Return the states that the consistency terms give to intervened cells."""
    designs, design_counts = _distinct_designs(train.perturbation)
    flags, flag_counts = _distinct(train.artifact[train.failing])
    library = torch.as_tensor(train.library)
    failing, passing = torch.as_tensor(train.failing), torch.as_tensor(train.passing)
    return FlipPool(designs, design_counts, flags, flag_counts, library[passing], library[failing])


def _distinct_designs(design: sp.csr_array) -> tuple[Tensor, Tensor]:
    """Return the distinct rows, without making all of them dense."""
    rows = sp.csr_array(design)
    rows.sort_indices()
    starts = zip(rows.indptr[:-1], rows.indptr[1:], strict=True)
    keys = [rows.indices[a:b].tobytes() + rows.data[a:b].tobytes() for a, b in starts]
    code = pd.factorize(np.array(keys, dtype=object))[0]
    _, first = np.unique(code, return_index=True)
    dense = rows[first].toarray()
    values, place = np.unique(dense, axis=0, return_inverse=True)
    counts = np.bincount(place[code])
    return torch.as_tensor(values), torch.as_tensor(counts, dtype=torch.float32)


def _distinct(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    values, counts = np.unique(rows, axis=0, return_counts=True)
    return torch.as_tensor(values), torch.as_tensor(counts, dtype=torch.float32)


def _check(data: CellData, config: Config) -> None:
    is_normal = config.model.likelihood == "normal"
    if is_normal != (data.values == "lognorm"):
        raise ConfigError(
            f"The '{config.model.likelihood}' likelihood needs "
            f"{'log-normalised values' if is_normal else 'raw counts'}, but the data hold "
            f"'{data.values}'. Change model.likelihood or data.values."
        )
    if not data.artifact_observed.all() and not config.model.artifact_risk:
        raise ConfigError(
            f"{(~data.artifact_observed).sum()} cells have missing artifact flags, which need "
            "model.artifact_risk = true. Switch it on, or drop these cells with data.subset(...)."
        )


def _label_table(data: CellData) -> pd.DataFrame:
    table = pd.crosstab(data.labels, np.asarray(data.split))
    table = table.reindex(columns=["train", "val", "test"], fill_value=0)
    train = data.where(split="train")
    for column, flag in enumerate(data.schema.artifacts):
        carriers = pd.Series(train.labels[train.artifact[:, column] > 0]).value_counts()
        table[flag_column(flag)] = carriers.reindex(table.index, fill_value=0)
    return table.rename_axis("label").rename_axis(None, axis=1).reset_index()


def _dosages(train: CellData) -> dict[str, list[float]]:
    """Return the least and largest dosage of each trained perturbation, where one is not 1."""
    columns = train.perturbation.tocsc()
    parts = (columns.data[a:b] for a, b in pairwise(columns.indptr))
    ranges = {
        name: [float(part.min()), float(part.max())]
        for name, part in zip(train.schema.perturbations, parts, strict=True)
        if len(part)
    }
    return {name: ends for name, ends in ranges.items() if ends != [1.0, 1.0]}


def _train_pair(
    model: torch.nn.Module,
    guide: torch.nn.Module,
    objective: CradleELBO,
    data: CellData,
    config: Config,
    *,
    carriers: Carriers | None,
    progress: bool,
    checkpoint_dir: str | Path | None,
    resume: bool,
    callbacks: Sequence[L.Callback],
) -> pd.DataFrame:
    """Train in place, load the best parameters, return the history."""
    from cradle_pyro.inference.checkpoint import last_checkpoint
    from cradle_pyro.inference.loop import History, TrainingLoop, make_trainer, quiet_lightning

    with ExitStack() as stack:
        if checkpoint_dir is None:
            checkpoint_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="cradle-"))
        directory = Path(checkpoint_dir)
        stack.enter_context(seeded(config.train.seed))
        stack.enter_context(quiet_lightning())
        by_row = carriers is not None
        loop = TrainingLoop(model, guide, objective, config.train, by_row=by_row)
        resume_from = last_checkpoint(directory, loop.state_dict()) if resume else None
        history = History()
        validate = bool((np.asarray(data.split) == "val").any())
        trainer, best = make_trainer(
            config.train, directory, history, progress=progress, validate=validate,
            callbacks=callbacks,
        )  # fmt: skip
        process = Process(trainer.global_rank, trainer.world_size)
        train, validation = (
            cell_loader(data, config, part, carriers, process) for part in ("train", "val")
        )
        with freed_memory_kept():
            trainer.fit(loop, train, [validation] if validate else None, ckpt_path=resume_from)
        if best.best_model_path:
            loop.load_best(best.best_model_path)
    model.cpu().eval()
    guide.cpu().eval()
    return history.table()
