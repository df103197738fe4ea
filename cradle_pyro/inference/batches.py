"""Batches of cells for training: who is in them, their partners, and what they carry."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from cradle_pyro.config import Config, PartnerTerm
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.fields import BackedCounts
from cradle_pyro.data.matching import match_partners
from cradle_pyro.errors import ConfigError
from cradle_pyro.model.cradle import with_combinations
from cradle_pyro.types import Batch, Carried

if TYPE_CHECKING:
    from scdataset import scDataset

__all__ = [
    "Carriers",
    "CellBatches",
    "EpochBatches",
    "Process",
    "StreamedBatches",
    "cell_loader",
    "set_epoch",
]

_CELLS_AT_A_TIME: Final = 4096
_BLOCK: Final = 32  # neighbouring cells of a file that are read together
_BATCHES_AT_A_TIME: Final = 16
_SMALLEST_WEIGHT: Final = 1e-12


class Process(NamedTuple):
    """One of several processes that share every step.

    Parameters
    ----------
    rank
        Its number, from 0.
    n_processes
        How many there are.
    """

    rank: int = 0
    n_processes: int = 1


class Carriers(NamedTuple):
    """How many training cells carry each perturbation and combination.

    Parameters
    ----------
    combinations
        Members of each combination, 0 or 1, shape (combinations, perturbations).
    cells
        Number of cells that carry each perturbation, then each combination.
    n_cells
        Number of training cells.
    """

    combinations: Tensor
    cells: Tensor
    n_cells: int

    @classmethod
    def among(cls, train: CellData, combinations: Tensor) -> Carriers:
        """Count the carriers among training cells, some at a time."""
        total = torch.zeros(combinations.shape[1] + len(combinations))
        for start in range(0, train.n_cells, _CELLS_AT_A_TIME):
            some = train.perturbation[start : start + _CELLS_AT_A_TIME].toarray()
            total += (with_combinations(torch.as_tensor(some), combinations) > 0).sum(0)
        return cls(combinations, total, train.n_cells)

    def carried(self, perturbation: Tensor) -> Carried:
        """Return what the cells of a batch carry, given their design."""
        carries = (with_combinations(perturbation, self.combinations) > 0).sum(0)
        share = carries / self.cells.clamp(min=1) * (self.n_cells / len(perturbation))
        n_perturbations = perturbation.shape[1]
        parts = []
        for columns in (slice(0, n_perturbations), slice(n_perturbations, None)):
            rows = carries[columns].nonzero().ravel()
            if not len(rows) and len(carries[columns]):
                rows = rows.new_zeros(1)  # plates hold at least one
            parts += [rows, share[columns][rows].clamp(min=_SMALLEST_WEIGHT)]
        return Carried(*parts)


class CellBatches(Dataset):
    """Batches of cells by position, with partners where the objective wants them.

    With `carriers`, batches say what their cells carry, so that no other effects are drawn. Of
    several processes each takes every n-th cell of a batch, and all draw the effects of what the
    whole batch carries.
    """

    def __init__(
        self,
        data: CellData,
        rows: np.ndarray,
        *,
        partner: bool,
        seed: int,
        carriers: Carriers | None = None,
        process: Process | None = None,
    ) -> None:
        self.data = data
        self.cells = rows
        self.partner = partner
        self.seed = seed
        self.carriers = carriers
        self.process = process or Process()
        self.partners = np.empty(0, dtype=np.int64)
        self._is_train = np.zeros(data.n_cells, bool)
        if partner:
            self._is_train[np.flatnonzero(np.asarray(data.split) == "train")] = True

    def __len__(self) -> int:
        return len(self.cells)

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch's partners."""
        if self.partner:
            self.partners = match_partners(
                self.data.labels,
                self.data.failing,
                covariate_ids=self.data.covariates if self.data.covariates.shape[1] else None,
                eligible=self._is_train,
                observed=self.data.artifact_observed,
                rng=np.random.default_rng([self.seed, epoch]),
            )

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> Batch:
        """Return this process's part of the batch of the cells at `positions` of this set."""
        together = self.cells[np.asarray(positions)]
        rows = together[self.process.rank :: self.process.n_processes]
        batch = self.data.batch(rows)
        if self.carriers is not None:
            design = torch.from_numpy(self.data.perturbation[together].toarray())
            batch = batch.replace(carried=self.carriers.carried(design))
        if not self.partner:
            return batch
        partners = self.partners[rows]
        has = np.flatnonzero(partners >= 0)
        if not len(has):
            return batch
        partner = self.data.batch(partners[has]).replace(carried=batch.carried)
        return batch.replace(partner=partner, partner_rows=torch.as_tensor(has))

    def fetch(self, positions: np.ndarray) -> CellBatches:
        """Return the cells at increasing `positions` in memory, as a set of their own.

        Their partners are read with them.
        """
        rows = needed = self.cells[positions]
        if self.partner:
            partners = self.partners[rows]
            needed = np.unique(np.concatenate([rows, partners[partners >= 0]]))
        data = self.data.subset(needed)
        fetched = copy.copy(self)
        fetched.data = replace(data, counts=data.rows(slice(None)))
        fetched.cells = np.searchsorted(needed, rows)
        if self.partner:
            # Who is here as a partner only is not asked for its own, which may not be here.
            partners = self.partners[needed]
            place = np.searchsorted(needed, partners).clip(max=len(needed) - 1)
            fetched.partners = np.where(needed[place] == partners, place, -1)
        return fetched


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches that depend on the seed and the epoch only, so that a run can resume.

    Parameters
    ----------
    n_cells
        Cells of the set.
    batch_size
        Cells of a batch, of all processes together. The last batch may be smaller.
    seed
        Of the order; None keeps the order of the cells.
    least
        A last batch of fewer cells (of several processes, each needs one) joins the one before.
    """

    def __init__(self, n_cells: int, batch_size: int, *, seed: int | None, least: int = 1) -> None:
        self.n_cells = n_cells
        self.seed = seed
        self.epoch = 0
        full, rest = divmod(n_cells, batch_size)
        self.sizes = [batch_size] * full
        if rest >= least or not full:
            self.sizes += [rest] if rest else []
        else:
            self.sizes[-1] += rest

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.n_cells)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n_cells)
        for end, size in zip(np.cumsum(self.sizes), self.sizes, strict=True):
            yield order[end - size : end].tolist()


class StreamedBatches(IterableDataset):
    """Batches of cells on disk: blocks of neighbours are read together, some batches at a time.

    scDataset draws the order of the blocks and shuffles the cells of what it reads at a time; the
    order depends on the seed and the epoch only, wherever the counts are.

    Parameters
    ----------
    cells
        The set.
    batch_size
        Cells of a batch, of all processes together. The last batch may be smaller.
    block_size
        Neighbouring cells that are read together.
    seed
        Of the order; None keeps the order of the cells.

    Notes
    -----
    Cells of a last batch that not every process could have a share of are left out: fewer than
    there are processes, others in every epoch.
    """

    def __init__(
        self, cells: CellBatches, batch_size: int, block_size: int, *, seed: int | None
    ) -> None:
        self.cells = cells
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch
        self.cells.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[Batch]:
        yield from self._batches()

    def _batches(self) -> scDataset:
        from scdataset import BlockShuffling, Streaming, scDataset

        rest = len(self.cells) % self.batch_size
        n_left_out = rest if rest < self.cells.process.n_processes else 0
        kept = np.arange(len(self.cells))
        if n_left_out:
            rng = np.random.default_rng([self.seed or 0, self.epoch])
            kept = np.sort(rng.permutation(kept)[n_left_out:])
        shuffled = BlockShuffling(self.block_size, kept), [self.seed or 0, self.epoch]
        strategy, key = (Streaming(kept), [0]) if self.seed is None else shuffled
        return scDataset(
            self.cells,
            strategy,
            self.batch_size,
            fetch_factor=_BATCHES_AT_A_TIME,
            fetch_callback=CellBatches.fetch,
            rank=0,  # processes share every batch
            world_size=1,
            seed=int(np.random.SeedSequence(key).generate_state(1)[0]),
        )


def cell_loader(
    data: CellData,
    config: Config,
    split: str,
    carriers: Carriers | None = None,
    process: Process | None = None,
) -> DataLoader:
    """Return the batches of a split; those of training cells in a new order in every epoch.

    Raises
    ------
    ConfigError
        If there are cells, but fewer than processes.
    """
    options, process = config.train, process or Process()
    rows = np.flatnonzero(np.asarray(data.split) == split)
    if 0 < len(rows) < process.n_processes:
        raise ConfigError(
            f"{process.n_processes} processes share {len(rows)} cells of the split '{split}'; each "
            "needs one. Use fewer (train.devices, train.nodes)."
        )
    cells = CellBatches(
        data,
        rows,
        partner=isinstance(config.objective.counterfactual, PartnerTerm),
        seed=options.seed,
        carriers=carriers,
        process=process,
    )
    size = options.batch_size * process.n_processes
    seed = options.seed if split == "train" else None
    block = options.shuffle_block
    if block is None:
        block = _BLOCK if isinstance(data.counts, BackedCounts) else 1
    workers: dict[str, Any] = {"batch_size": None, "num_workers": options.loader_workers}
    if block > 1:
        loader = DataLoader(StreamedBatches(cells, size, block, seed=seed), **workers)
    else:
        batches = EpochBatches(len(rows), size, seed=seed, least=process.n_processes)
        loader = DataLoader(cells, sampler=batches, **workers)
    set_epoch(loader, 0)
    return loader


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Choose the epoch whose order of cells and whose partners come next."""
    for part in (loader.sampler, loader.dataset):
        if isinstance(part, EpochBatches | CellBatches | StreamedBatches):
            part.set_epoch(epoch)
