"""Run directories and checkpoints: what is written, what loads, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_config, make_data, make_fit, parameters, shared_fit

from cradle_pyro.config import Config
from cradle_pyro.errors import CheckpointError
from cradle_pyro.evaluation.evaluate import evaluate
from cradle_pyro.inference import checkpoint
from cradle_pyro.inference.checkpoint import SafeCheckpointIO, load, read_checkpoint
from cradle_pyro.queries.effects import average_effect
from cradle_pyro.queries.latent import latent

FILES = {"config.toml", "manifest.json", "model.safetensors", "history.csv"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory that no test may change."""
    return shared_fit().save(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it that the test may damage."""
    return shutil.copytree(saved, tmp_path / "run")


def names(path):
    return {entry.name for entry in path.iterdir()}


def edit_manifest(run, change):
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------ round trip


def test_a_loaded_posterior_is_the_one_that_was_saved(saved):
    posterior, loaded = shared_fit(), load(saved)
    assert parameters(loaded) == parameters(posterior)
    assert loaded.schema == posterior.schema
    assert loaded.config == posterior.config
    for stored in ("statistics", "reference"):
        for before, after in zip(getattr(posterior, stored), getattr(loaded, stored), strict=True):
            assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))
    np.testing.assert_allclose(loaded.history, posterior.history, rtol=1e-12)
    assert loaded.labels.equals(posterior.labels)
    assert dict(loaded.facts) == dict(posterior.facts)
    assert not loaded.model.training
    assert not loaded.guide.training


def test_save_load_evaluate_gives_identical_numbers(saved):
    before, after = evaluate(shared_fit(), make_data()), evaluate(load(saved), make_data())
    assert after.scores.equals(before.scores)
    assert after.facts == before.facts


def test_queries_need_no_training_data_and_give_identical_numbers(saved):
    loaded = load(saved)
    before = average_effect(shared_fit(), "CEBPA+GATA1", draws=4, n_cells=5)
    assert average_effect(loaded, "CEBPA+GATA1", draws=4, n_cells=5).equals(before)
    np.testing.assert_array_equal(latent(loaded, make_data()), latent(shared_fit(), make_data()))


def test_held_out_labels_are_kept(tmp_path):
    held_out = "CEBPA+GATA1"
    posterior = make_fit("split.method=combinations", f'split.held_out=["{held_out}"]')
    labels = load(posterior.save(tmp_path)).labels.set_index("label")
    assert labels.loc[held_out, "train"] == 0
    assert labels.loc[held_out, "test"] > 0
    assert set(labels.index) == {"control", "KLF1", "CEBPA", "GATA1", held_out}


def test_a_second_save_replaces_the_first(run):
    other = make_fit("model.n_latents=2")
    other.save(run)
    assert parameters(load(run)) == parameters(other)
    assert names(run) == FILES


@pytest.mark.parametrize(
    "settings",
    [
        ["data.artifact=none"],
        ["model.gene_effect=none", "model.likelihood=zinb", "guide.family=mean_field"],
        ['data.covariate_keys=["batch"]', "data.artifact=any"],
    ],
    ids=" ".join,
)
def test_every_kind_of_pair_loads(tmp_path, settings):
    posterior = make_fit(*settings)
    loaded = load(posterior.save(tmp_path))
    assert parameters(loaded) == parameters(posterior)
    assert loaded.schema == posterior.schema


# ------------------------------------------------------------------------------ what is on disk


def test_a_run_directory_holds_plain_files(saved):
    assert names(saved) == FILES
    assert Config.from_toml(saved / "config.toml") == shared_fit().config
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format_version"] == checkpoint.FORMAT_VERSION
    assert {"cradle-pyro", "torch", "pyro-ppl"} <= manifest["versions"].keys()
    assert manifest["schema"]["genes"] == list(make_data().schema.genes)
    assert manifest["facts"]["fingerprint"] == make_data().fingerprint
    assert manifest["facts"]["seed"] == 0
    with pytest.raises(UnicodeDecodeError):  # the one binary file is safetensors, not a pickle
        (saved / "model.safetensors").read_text(encoding="ascii")
    assert load_file(saved / "model.safetensors")


def test_every_file_may_be_read_by_the_same_people(saved):
    modes = {path.name: path.stat().st_mode for path in saved.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_other_content_of_the_directory_is_kept(tmp_path):
    run = tmp_path / "run"
    posterior = make_fit(checkpoint_dir=run / "checkpoints")
    (run / "metrics.json").write_text("{}")
    posterior.save(run)
    assert names(run) == FILES | {"checkpoints", "metrics.json"}
    assert names(run / "checkpoints") == {"best.ckpt", "last.ckpt"}
    assert (run / "metrics.json").read_text() == "{}"


# ------------------------------------------------------------------------------------ bad content


def cut(run):
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def replace_weights(run):
    tensors = load_file(run / "model.safetensors")
    name = next(name for name in tensors if name.startswith("model/"))
    save_file(tensors | {name: tensors[name] + 1}, run / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "not the file that manifest.json describes"),
        (replace_weights, "not the file that manifest.json describes"),
        (lambda run: (run / "model.safetensors").unlink(), "is damaged"),
        (lambda run: (run / "config.toml").unlink(), "is damaged"),
        (lambda run: (run / "config.toml").write_text("[model]\nlatents = 3"), "is damaged"),
        (lambda run: (run / "history.csv").unlink(), "is damaged"),
        (lambda run: (run / "manifest.json").write_text('{"format_version"'), "is damaged"),
        (lambda run: (run / "manifest.json").write_text("[]"), "is damaged"),
        (lambda run: edit_manifest(run, lambda m: m.pop("schema")), "is damaged"),
        (lambda run: edit_manifest(run, lambda m: m.pop("weights_sha256")), "is damaged"),
        (lambda run: (run / "manifest.json").unlink(), "Expected a run directory with manifest"),
        (shutil.rmtree, "Expected a run directory with manifest"),
        (
            lambda run: edit_manifest(run, lambda m: m.update(format_version=99)),
            "has format 99; this version of cradle-pyro reads up to 5. Update cradle-pyro",
        ),
        (
            lambda run: edit_manifest(run, lambda m: m.update(format_version=1)),
            "has format 1, of an earlier version with other parameters (now 5). Train it again",
        ),
    ],
)
def test_a_damaged_run_is_refused_with_its_path_and_what_to_do(run, damage, message):
    damage(run)
    with pytest.raises(CheckpointError) as caught:
        load(run)
    assert message in str(caught.value)
    assert str(run) in str(caught.value)


def test_a_configuration_of_another_model_is_refused(run):
    changed = make_config("train.max_epochs=2", "model.n_latents=2")
    (run / "config.toml").write_text(changed.to_toml())
    with pytest.raises(CheckpointError, match="do not fit together"):
        load(run)


# ---------------------------------------------------------------------------------- failed writes


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_write_leaves_the_earlier_run(run, monkeypatch):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        make_fit("model.n_latents=2").save(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert parameters(load(run)) == parameters(shared_fit())


def test_a_failed_first_write_leaves_nothing_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="free space or choose another"):
        shared_fit().save(tmp_path / "new")
    assert names(tmp_path / "new") == set()
    with pytest.raises(CheckpointError, match="Expected a run directory"):
        load(tmp_path / "new")


@pytest.mark.parametrize("moved", range(4))
def test_a_write_cut_short_between_files_never_loads_as_a_mixture(run, monkeypatch, moved):
    other = make_fit("model.n_latents=2")
    replace, done = checkpoint.os.replace, []

    def stop(source, target):
        if len(done) == moved:
            full_disk()
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", stop)
    with pytest.raises(CheckpointError, match="No space left"):
        other.save(run)
    monkeypatch.undo()
    assert not [name for name in names(run) if name.startswith(".")]
    with pytest.raises(CheckpointError):
        load(run)


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Could not write the run directory"):
        shared_fit().save(tmp_path / "file")


def test_a_full_disk_during_training_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"Could not write the checkpoint.*No space left"):
        make_fit(checkpoint_dir=tmp_path)
    assert names(tmp_path) == set()


# -------------------------------------------------------------------------------- checkpoint files


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path):
    content = {
        "state_dict": {"w": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "betas": (0.9, 0.999)}],
        "callbacks": {"a": {"best": None, "path": "x", "count": 2, "ok": True}},
        "nothing": {},
        "shared": [],
    }
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(found["state_dict"].pop("w"), content["state_dict"].pop("w"))
    assert found == content
    assert found["optimizer_states"][0]["state"].keys() == {0}
    assert isinstance(found["optimizer_states"][0]["betas"], tuple)


def test_a_checkpoint_refuses_what_only_a_pickle_could_hold(tmp_path):
    with pytest.raises(CheckpointError, match="cannot hold a function"):
        SafeCheckpointIO().save_checkpoint({"f": full_disk}, tmp_path / "a.ckpt")
    assert names(tmp_path) == set()


def test_a_failed_checkpoint_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    SafeCheckpointIO().save_checkpoint({"epoch": 1}, path)
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError):
        SafeCheckpointIO().save_checkpoint({"epoch": 2}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    assert names(tmp_path) == {"a.ckpt"}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x80\x04 a pickle"])
def test_a_file_of_another_kind_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_checkpoint(path)
