"""Several processes train as one with a batch as large as theirs together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import SETTINGS, make_config, make_data, make_screen

import cradle_pyro as cp
from cradle_pyro.errors import ConfigError
from cradle_pyro.inference.batches import CellBatches, EpochBatches, Process, cell_loader
from cradle_pyro.inference.loop import OwnNoise

SCRIPT = Path(__file__).with_name("two_processes.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NOT_RANDOM = ["objective.counterfactual=none", "train.max_epochs=2"]


def run(command):
    own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    environment = os.environ | own
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes found, each, and what one found with the doubled batch: 115 cells."""
    out = tmp_path_factory.mktemp("devices")
    run([*TORCHRUN, SCRIPT, out, "train.batch_size=60", "train.devices=2", *NOT_RANDOM])
    run([sys.executable, SCRIPT, out, "train.batch_size=120", *NOT_RANDOM])
    return [torch.load(out / f"{name}.pt") for name in ("0", "1", "alone")]


def test_gradients_are_those_of_the_doubled_batch(both):
    first, _, alone = both
    assert first["gradients"].keys() == alone["gradients"].keys()
    for name, expected in alone["gradients"].items():
        torch.testing.assert_close(
            first["gradients"][name], expected, rtol=1e-3, atol=1e-5, msg=name
        )


def test_processes_end_with_the_same_parameters(both):
    first, second, _ = both
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name


def test_losses_are_means_over_all_cells(both):
    first, second, alone = (pd.DataFrame(found["history"]) for found in both)
    pd.testing.assert_frame_equal(first, second)
    pd.testing.assert_frame_equal(first, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_one_process_writes_the_run(tmp_path, launcher):
    make_screen().write_h5ad(tmp_path / "screen.h5ad")
    program = Path(sys.executable).with_name("cradle-pyro")
    start = [*TORCHRUN, "--no-python"] if launcher == "torchrun" else []
    settings = [part for setting in (*SETTINGS, "train.devices=2") for part in ("--set", setting)]
    command = [program, "train", tmp_path / "screen.h5ad", "--out", tmp_path / "run"]
    done = run([*start, *command, *settings])
    assert done.stdout.count("Wrote") == 1
    posterior = cp.load(tmp_path / "run")
    assert posterior.config.train.devices == 2
    split = pd.read_csv(tmp_path / "run" / "split.csv")
    assert len(split) == len(make_data().obs_names)


@pytest.mark.parametrize(("n_cells", "size"), [(20, 6), (19, 6), (18, 6), (13, 6), (4, 6)])
@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_processes_share_every_batch_without_padding(n_cells, size, n_processes):
    batches = list(EpochBatches(n_cells, size, seed=0, least=n_processes))
    assert sorted(np.concatenate(batches)) == list(range(n_cells))
    for batch in batches:
        shares = [batch[rank::n_processes] for rank in range(n_processes)]
        assert min(map(len, shares)) >= 1
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_all_processes_draw_the_effects_of_the_whole_batch():
    from cradle_pyro.inference.batches import Carriers

    data = make_data()
    train = data.where(split="train")
    carriers = Carriers.among(train, torch.zeros(0, data.schema.n_perturbations))
    rows, found = np.arange(train.n_cells), []
    for rank in range(2):
        cells = CellBatches(
            train, rows, partner=False, seed=0, carriers=carriers, process=Process(rank, 2)
        )
        found.append(cells[[0, 1, 2, 3, 4]])
    assert [len(batch) for batch in found] == [3, 2]
    for first, second in zip(*(batch.carried for batch in found), strict=True):
        assert torch.equal(first, second)


def test_more_processes_than_cells_is_an_error():
    data = make_data()
    few = data.subset(np.flatnonzero(data.split == "train")[:3])
    with pytest.raises(ConfigError, match="4 processes share 3 cells"):
        cell_loader(few, make_config(), "train", process=Process(0, 4))


def test_only_the_noise_of_cells_is_a_processs_own():
    import pyro
    from pyro import distributions as dist

    def draw(own):
        torch.manual_seed(0)
        with OwnNoise(own):
            shared = pyro.sample("global", dist.Normal(0, 1))
            with pyro.plate("cells", 3):
                first = pyro.sample("z_basal", dist.Normal(0, 1))
                second = pyro.sample("z_artifact", dist.Normal(0, 1))
        return shared, first, second

    (shared, *local), (other_shared, *other_local) = draw(1), draw(2)
    assert torch.equal(shared, other_shared)
    assert not any(torch.equal(a, b) for a, b in zip(local, other_local, strict=True))
    assert not torch.equal(*local)
