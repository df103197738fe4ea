"""Cells on disk: batches read in blocks, the same as in memory where they are drawn alike."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from tiny import make_config, make_data, make_fit, make_screen, parameters

from cradle_pyro.data.fields import BackedCounts, read_screen
from cradle_pyro.data.prepare import prepare
from cradle_pyro.inference.batches import (
    CellBatches,
    Process,
    StreamedBatches,
    cell_loader,
    set_epoch,
)
from cradle_pyro.inference.train import fit, flip_pool

PARTNERS = "objective.counterfactual=partner"


@pytest.fixture(scope="module", params=["h5ad", "zarr"])
def on_disk(request, tmp_path_factory):
    """The tiny screen, its counts left in a file."""
    path = tmp_path_factory.mktemp("disk") / f"screen.{request.param}"
    screen = make_screen()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Writing zarr v2 data")
        (screen.write_h5ad if request.param == "h5ad" else screen.write_zarr)(path)
    data = prepare(read_screen(path, backed=True), make_config()).data
    assert isinstance(data.counts, BackedCounts)
    return data


def epoch_of(data, *settings, epoch=0, process=None):
    loader = cell_loader(data, make_config(*settings), "train", process=process)
    set_epoch(loader, epoch)
    return list(loader)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in ("counts", "perturbation", "artifact", "library", "partner_rows"):
            found, expected = getattr(batch, name), getattr(other, name)
            assert (found is None and expected is None) or torch.equal(found, expected), name
        if batch.partner is not None:
            assert torch.equal(batch.partner.counts, other.partner.counts)


@pytest.mark.parametrize("settings", [(), (PARTNERS,), ("train.loader_workers=2",)])
def test_batches_from_disk_are_those_from_memory(on_disk, settings):
    options = ["train.shuffle_block=4", "train.batch_size=16", *settings]
    assert_same(epoch_of(on_disk, *options), epoch_of(make_data(), *options))


def test_partners_come_with_what_is_read():
    batches = epoch_of(make_data(), PARTNERS, "train.shuffle_block=4", "train.batch_size=16")
    seen = 0
    for batch in batches:
        if batch.partner is None:
            continue
        seen += len(batch.partner)
        own = batch.take(batch.partner_rows)
        assert torch.equal(own.perturbation, batch.partner.perturbation)
        assert ((own.artifact > 0).any(1) != (batch.partner.artifact > 0).any(1)).all()
    assert seen > 0


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_an_epoch_holds_every_cell_once(n_processes):
    data = make_data()
    train = data.where(split="train")
    found = []
    for rank in range(n_processes):
        options = ("train.shuffle_block=4", "train.batch_size=8")
        batches = epoch_of(data, *options, process=Process(rank, n_processes))
        found.append(np.concatenate([batch.library.numpy() for batch in batches]))
        assert min(map(len, batches)) > 0
    together = np.sort(np.concatenate(found))
    left_out = train.n_cells % (8 * n_processes)
    expected = train.n_cells - (left_out if left_out < n_processes else 0)
    assert len(together) == expected
    if expected == train.n_cells:
        np.testing.assert_array_equal(together, np.sort(train.library))


def test_a_share_for_every_process_or_for_none():
    data = make_data()
    rows = np.flatnonzero(data.split == "train")[:17]
    shares = []
    for rank in range(2):
        cells = CellBatches(data, rows, partner=False, seed=0, process=Process(rank, 2))
        shares.append(list(StreamedBatches(cells, 8, 4, seed=0)))
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4], [4, 4]]


def test_epochs_differ_and_repeat():
    first, second = (epoch_of(make_data(), "train.shuffle_block=4", epoch=e) for e in (1, 2))
    assert_same(first, epoch_of(make_data(), "train.shuffle_block=4", epoch=1))
    assert not torch.equal(first[0].library, second[0].library)


def test_validation_cells_keep_their_order():
    data = make_data()
    loader = cell_loader(data, make_config("train.shuffle_block=4"), "val")
    found = np.concatenate([batch.library.numpy() for batch in loader])
    np.testing.assert_array_equal(found, data.where(split="val").library)


def test_training_from_disk_is_training_in_memory(on_disk):
    settings = ["train.shuffle_block=4", "train.max_epochs=2", "train.batch_size=32"]
    from_disk = fit(on_disk, make_config(*settings), progress=False)
    assert parameters(from_disk) == parameters(make_fit(*settings))


def test_large_counts_stay_on_disk(tmp_path, monkeypatch):
    from cradle_pyro.data import fields

    make_screen().write_h5ad(tmp_path / "screen.h5ad")
    path = tmp_path / "screen.h5ad"
    n_bytes = 8 * make_screen().layers["counts"].nnz
    for limit, is_backed in ((n_bytes, False), (n_bytes - 1, True)):
        monkeypatch.setattr(fields, "_MOST_BYTES_IN_MEMORY", limit)
        screen = read_screen(path, backed="auto", layer="counts")
        found = fields.read_counts(screen, "counts")
        assert isinstance(found, BackedCounts) == is_backed


def test_genes_of_counts_on_disk_are_selected_as_in_memory(tmp_path):
    make_screen().write_h5ad(tmp_path / "screen.h5ad")
    config = make_config("data.n_top_genes=20")
    expected = prepare(make_screen(), config).data
    found = prepare(read_screen(tmp_path / "screen.h5ad", backed=True), config).data
    assert found.fingerprint == expected.fingerprint


def test_the_pool_of_designs_is_that_of_dense_rows():
    train = make_data().where(split="train")
    pool = flip_pool(train)
    values, counts = np.unique(train.perturbation.toarray(), axis=0, return_counts=True)
    np.testing.assert_array_equal(pool.designs.numpy(), values)
    np.testing.assert_array_equal(pool.design_weights.numpy(), counts)
