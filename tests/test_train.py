"""Training: units, seeds, isolation, resuming, early stopping, and what stops a run."""

from __future__ import annotations

import random

import anndata
import lightning as L
import numpy as np
import pyro
import pytest
import torch
from scipy import sparse
from tiny import N_CELLS, N_GENES, make_config, make_data, make_fit, make_screen, parameters
from two_processes import Gradients, LocalMeans

from cradle_pyro.data.dataset import CellData
from cradle_pyro.errors import CheckpointError, ConfigError, DataError, TrainingError
from cradle_pyro.inference import loop
from cradle_pyro.inference.batches import EpochBatches
from cradle_pyro.inference.loop import PRIOR
from cradle_pyro.inference.train import fit

GLOBALS = (
    "effect_mask",
    "effect",
    "gene_effect",
    "interaction",
    "artifact_effect",
    "artifact_risk",
    "depth_shift",
)
LOCALS = ("artifact", "library", "z_artifact", "z_basal", "counts", "counterfactual")


class At(L.Callback):
    """Calls a function at the start of the batch with this global step."""

    def __init__(self, step, action):
        self.step = step
        self.action = action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.action(pl_module)


class Recorder(L.Callback):
    """Keeps the parameters after each epoch, and spoils them from one epoch on."""

    def __init__(self, spoil_from=None):
        self.states = []
        self.spoil_from = spoil_from

    def on_train_epoch_start(self, trainer, pl_module):
        if self.spoil_from is not None and trainer.current_epoch >= self.spoil_from:
            with torch.no_grad():
                pl_module.model.decoder.bias += 3 * torch.randn_like(pl_module.model.decoder.bias)

    def on_validation_end(self, trainer, pl_module):
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


# ----------------------------------------------------------------------------------------- units


def test_history_has_every_term_and_they_sum_to_the_loss():
    history = make_fit("train.max_epochs=2").history
    for stage in ("train", "val"):
        terms = {c.removeprefix(f"{stage}_") for c in history if c.startswith(f"{stage}_")}
        # The parameters' prior is learned under; it is no part of what predicts new cells.
        parts = {*GLOBALS, *LOCALS} | ({PRIOR} if stage == "train" else set())
        assert terms == {"loss", *parts}
        total = history[[f"{stage}_{term}" for term in parts]].sum(axis=1)
        np.testing.assert_allclose(total, history[f"{stage}_loss"], rtol=1e-5)
    assert history["epoch"].tolist() == [0, 1]
    assert history["step"].tolist() == [2, 4]  # 115 training cells in batches of 64


@pytest.mark.parametrize("counterfactual", ["sleep", "partner"])
def test_training_and_validation_are_in_the_same_unit(counterfactual):
    """The same cells as training and as validation set; a rate too low to learn anything."""
    adata = make_screen()
    twice = anndata.concat([adata, adata], index_unique="-")
    flags = np.tile(make_data().artifact.any(1), 2).astype(float)
    twice.obs["bad"] = flags
    data = CellData.from_anndata(twice, layer="counts", artifact_keys=["bad"])
    data = data.with_split(np.repeat(["train", "val"], N_CELLS))
    history = make_fit(
        f"objective.counterfactual={counterfactual}",
        "train.learning_rate=1e-12",
        "train.effect_learning_rate=1e-12",
        data=data,
    ).history.iloc[0]
    for term in ("effect_mask", "artifact_effect", "artifact_risk", "depth_shift"):  # closed forms
        assert history[f"train_{term}"] == pytest.approx(history[f"val_{term}"], rel=1e-4)
    for term in ("counts", "library", "artifact", "z_basal", "loss"):
        expected = pytest.approx(history[f"val_{term}"], rel=0.05, abs=0.01)
        assert history[f"train_{term}"] == expected


@pytest.mark.parametrize("batch_size", [16, N_CELLS])
def test_the_loss_per_cell_does_not_depend_on_the_batch_size(batch_size):
    history = make_fit(
        f"train.batch_size={batch_size}",
        "train.learning_rate=1e-12",
        "train.effect_learning_rate=1e-12",
    ).history.iloc[0]
    whole = make_fit("train.learning_rate=1e-12", "train.effect_learning_rate=1e-12").history.iloc[
        0
    ]
    assert history["train_loss"] == pytest.approx(whole["train_loss"], rel=0.02)
    assert history["train_effect_mask"] == pytest.approx(whole["train_effect_mask"], rel=1e-3)


def test_validation_meets_the_same_noise_in_every_epoch():
    """Where nothing is learned, the validation loss stands still and the training loss does not."""
    still = ("train.learning_rate=1e-12", "train.effect_learning_rate=1e-12")
    history = make_fit("train.max_epochs=3", *still).history
    assert np.ptp(history["val_loss"]) < 1e-3
    assert np.ptp(history["train_loss"]) > 1e-2


# ----------------------------------------------------------------------------- seeds, isolation


def test_the_same_seed_gives_the_same_posterior_and_another_does_not():
    first, second = make_fit(), make_fit()
    assert parameters(first) == parameters(second)
    assert first.history.equals(second.history)
    assert torch.equal(first.reference.loc, second.reference.loc)
    assert parameters(make_fit("train.seed=1")) != parameters(first)


def test_the_callers_random_state_is_untouched():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 (the global state is what is tested)
    torch.manual_seed(1)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    make_fit()
    assert states() == before


def test_what_the_caller_drew_before_does_not_matter():
    first = make_fit()
    torch.manual_seed(99)
    torch.rand(5)
    assert parameters(make_fit()) == parameters(first)


def test_two_fits_in_one_process_do_not_meet():
    first = make_fit()
    alone = parameters(first)
    make_fit("model.n_latents=2", "objective.counterfactual=partner", "train.seed=3")
    assert parameters(first) == alone
    assert parameters(make_fit()) == alone
    assert not dict(pyro.get_param_store())


def test_a_fit_leaves_the_cells_as_they_are():
    data = make_data()
    counts, artifact = data.rows(slice(None)).toarray(), data.artifact.copy()
    make_fit(data=data)
    np.testing.assert_array_equal(data.rows(slice(None)).toarray(), counts)
    np.testing.assert_array_equal(data.artifact, artifact)


# ---------------------------------------------------------------------------------------- resume


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("counterfactual", ["sleep", "partner"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, counterfactual):
    settings = ["train.max_epochs=3", f"objective.counterfactual={counterfactual}"]
    whole = make_fit(*settings)

    def interrupt(module):
        raise Interrupted

    with pytest.raises(Interrupted):  # in the middle of the second epoch
        make_fit(*settings, checkpoint_dir=tmp_path, callbacks=[At(3, interrupt)])
    resumed = make_fit(*settings, checkpoint_dir=tmp_path, resume=True)
    assert resumed.history["epoch"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(resumed.history, whole.history)
    assert parameters(resumed) == parameters(whole)


def test_a_resumed_run_whose_steps_have_several_batches_equals_an_uninterrupted_one(tmp_path):
    settings = ["train.max_epochs=3", "train.batch_size=30", "train.accumulate=2"]
    whole = make_fit(*settings)

    def stop(_):
        raise Interrupted

    with pytest.raises(Interrupted):
        make_fit(*settings, checkpoint_dir=tmp_path, callbacks=[At(5, stop)])
    assert parameters(make_fit(*settings, checkpoint_dir=tmp_path, resume=True)) == parameters(
        whole
    )
    assert whole.history["step"].tolist() == [2, 4, 6]  # 115 cells: 30 and 30, 30 and 25


def test_batches_of_a_step_are_as_good_as_a_larger_one(monkeypatch):
    """With the same draws of the globals and the means of the latents, to the last digits."""
    monkeypatch.setattr(loop, "_seed", lambda *_: 0)
    found = []
    for settings in (["train.batch_size=20", "train.accumulate=2"], ["train.batch_size=40"]):
        gradients = Gradients()
        with LocalMeans():
            make_fit(*settings, "objective.counterfactual=none", callbacks=[gradients])
        found.append(gradients.first)
    several, one = found
    assert several.keys() == one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(several[name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_batches_of_a_step_have_noise_of_their_own(monkeypatch):
    seeds = []
    seed = loop._seed
    monkeypatch.setattr(loop, "_seed", lambda *key: seeds.append(seed(*key)) or seeds[-1])
    make_fit("train.batch_size=20", "train.accumulate=3", "train.max_epochs=2")
    assert len(seeds) == len(set(seeds)) == 12  # six batches an epoch


def test_half_precision_costs_little_of_the_loss():
    """Encoders run in bfloat16, all else in single precision."""
    settings = ["train.max_epochs=4", "objective.counterfactual=none"]
    single, half = (
        make_fit(*settings, f"train.precision={precision}").history
        for precision in ("32-true", "bf16-mixed")
    )
    assert (half["val_loss"] != single["val_loss"]).all()
    np.testing.assert_allclose(half["val_loss"], single["val_loss"], rtol=1e-3)
    for name in ("val_gene_effect", "val_effect_mask", "val_artifact_effect"):
        np.testing.assert_allclose(half[name], single[name], rtol=0.02, atol=1e-3)


def test_a_finished_run_resumes_to_itself(tmp_path):
    whole = make_fit(checkpoint_dir=tmp_path)
    again = make_fit(checkpoint_dir=tmp_path, resume=True)
    assert parameters(again) == parameters(whole)
    assert again.history.equals(whole.history)


def test_nothing_to_resume_from_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="found none"):
        make_fit(checkpoint_dir=tmp_path, resume=True)


def test_resuming_with_another_model_is_an_error(tmp_path):
    make_fit(checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="another model or screen"):
        make_fit("model.n_latents=2", checkpoint_dir=tmp_path, resume=True)


def test_a_truncated_checkpoint_is_an_error(tmp_path):
    make_fit(checkpoint_dir=tmp_path)
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        make_fit(checkpoint_dir=tmp_path, resume=True)


# ------------------------------------------------------------------------ early stopping and best


def test_training_stops_early_and_gives_back_the_best_epoch():
    recorder = Recorder(spoil_from=2)
    posterior = make_fit("train.max_epochs=9", "train.patience=2", callbacks=[recorder])
    losses = posterior.history["val_loss"]
    best = int(losses.argmin())
    assert best < 2
    assert len(losses) == best + 3  # two epochs of patience
    expected = {k: v.tolist() for k, v in recorder.states[best].items()}
    assert parameters(posterior) == expected
    assert parameters(posterior) != {k: v.tolist() for k, v in recorder.states[-1].items()}


def test_without_validation_cells_the_last_epoch_is_kept():
    data = make_data()
    split = np.where(np.asarray(data.split) == "val", "test", data.split)
    posterior = make_fit("train.max_epochs=2", data=data.with_split(split))
    assert not [column for column in posterior.history if column.startswith("val_")]
    assert len(posterior.history) == 2


def test_only_training_and_validation_cells_matter(monkeypatch):
    """Test cells, replaced by others, leave the parameters as they are."""
    adata = make_screen()
    data = make_data()
    is_test = np.asarray(data.split) == "test"
    first = make_fit(data=data)
    counts = adata.layers["counts"].toarray()
    counts[is_test] = counts[is_test][:, ::-1] * 3
    adata.layers["counts"] = sparse.csr_matrix(counts)
    adata.obs["bad"] = data.failing.astype(float)
    for index, name in enumerate(data.schema.artifacts):
        adata.obs[name] = data.artifact[:, index]
    changed = CellData.from_anndata(
        adata, layer="counts", artifact_keys=list(data.schema.artifacts)
    )
    changed = changed.with_split(data.split)
    assert changed.fingerprint != data.fingerprint
    second = make_fit(data=changed)
    assert parameters(second) == parameters(first)


# -------------------------------------------------------------------------------------- mistakes


def test_a_loss_that_is_not_finite_stops_with_step_term_and_parameter():
    def spoil(module):
        with torch.no_grad():
            module.model.decoder.bias[0] = torch.nan

    with pytest.raises(TrainingError) as caught:
        make_fit("train.max_epochs=3", callbacks=[At(3, spoil)])
    message = str(caught.value)
    assert "at step 3 (epoch 1)" in message
    assert "counts" in message.partition("term")[2]
    assert "model.decoder.bias" in message


def test_a_parameter_that_is_not_finite_is_named_in_the_first_step_too():
    def spoil(module):
        with torch.no_grad():
            module.guide.depth_shift.loc[:] = torch.inf

    with pytest.raises(TrainingError, match=r"guide\.depth_shift\.loc"):
        make_fit(callbacks=[At(0, spoil)])


def test_a_split_without_training_cells_is_an_error():
    data = make_data()
    with pytest.raises(DataError, match="Expected training cells, found none"):
        make_fit(data=data.with_split(np.full(data.n_cells, "test")))


def test_likelihood_and_values_must_agree():
    with pytest.raises(ConfigError, match=r"'normal' likelihood needs log-normalised values"):
        make_fit("model.likelihood=normal")


def test_missing_flags_need_a_model_of_flags():
    data = make_data()
    missing = with_missing_flags(data)
    with pytest.raises(ConfigError, match=r"missing artifact flags.*artifact_risk"):
        make_fit("model.artifact_risk=false", data=missing)
    posterior = make_fit(data=missing)
    assert "train_artifact_unobserved" in posterior.history


def with_missing_flags(data):
    import dataclasses

    observed = np.arange(data.n_cells) % 5 > 0
    return dataclasses.replace(data, artifact_observed=observed)


def test_a_fit_without_a_split_makes_the_configured_one():
    data = make_data()
    bare = data.with_split(np.asarray(data.split))
    import dataclasses

    bare = dataclasses.replace(data, split=None)
    config = make_config("split.train=0.5", "split.validation=0.25")
    labels = fit(bare, config, progress=False).labels
    sizes = labels[["train", "val", "test"]].sum()
    assert abs(sizes["train"] - N_CELLS / 2) <= 2
    assert abs(sizes["val"] - N_CELLS / 4) <= 2


# ----------------------------------------------------------------- published mistakes 10 and 11


def lognorm_data():
    adata = make_screen()
    counts = adata.layers["counts"].toarray()
    adata.layers["log"] = sparse.csr_matrix(
        np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)
    )
    adata.obs["bad"] = make_data().failing.astype(float)
    data = CellData.from_anndata(
        adata, layer="log", values="lognorm", artifact_keys=["bad"], artifact="each"
    )
    return data.with_split(make_data().split)


@pytest.mark.parametrize(
    "settings",
    [
        ["objective.particles=1"],
        ["objective.particles=3"],
        ["data.artifact=none"],
        ["data.artifact=none", "objective.particles=3", "objective.counterfactual=partner"],
        ["data.artifact=any", "objective.counterfactual=partner", "objective.particles=3"],
        ["data.artifact=severity"],
        ["guide.family=mean_field"],
        ["guide.family=mean_field", "objective.counterfactual=partner", "data.artifact=any"],
        ["model.likelihood=poisson"],
        ["model.likelihood=zinb", "objective.particles=3"],
        ["objective.counterfactual=kl"],
        ["objective.counterfactual=kl", "guide.family=mean_field", "model.combine=sum"],
        ["objective.counterfactual=none", "objective.balance_failing=true"],
        ["objective.beta=0"],
        ["objective.counterfactual.generated_fraction=0.5"],
        ["model.gene_effect=none", "model.n_artifact_latents=0", "model.artifact_risk=false"],
        ["model.latent_effect=false"],
        ["model.latent_effect=false", "guide.family=mean_field", "model.depth_shift=false"],
        ["model.linear_path=false", "train.schedule=constant"],
        ["model.decoder.layers=0", "guide.encoder.layers=0", "guide.effect_encoder.layers=0"],
        ['data.covariate_keys=["batch"]', "objective.counterfactual=partner"],
        ["split.method=combinations", 'split.held_out=["CEBPA+GATA1"]'],
    ],
    ids=" ".join,
)
def test_every_option_trains(settings):
    posterior = make_fit(*settings)
    assert np.isfinite(posterior.history).all(axis=None)
    assert all(torch.isfinite(p).all() for p in posterior.model.parameters())
    has_term = "train_counterfactual" in posterior.history
    assert has_term == (
        posterior.config.objective.counterfactual is not None
        and posterior.config.objective.beta > 0
    )


def test_log_normalised_values_train():
    posterior = make_fit("model.likelihood=normal", data=lognorm_data())
    assert np.isfinite(posterior.history).all(axis=None)


def test_counts_are_never_made_dense_as_a_whole(monkeypatch):
    data = make_data()
    largest = []

    def watch(kind):
        original = kind.toarray

        def toarray(self, *args, **kwargs):
            if self.shape[1] == N_GENES:
                largest.append(self.shape[0])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "toarray", toarray)

    watch(type(data.counts))
    make_fit("train.batch_size=16", data=data)
    assert largest
    assert max(largest) < N_CELLS / 2


def test_checkpoints_hold_no_pickle(tmp_path):
    from safetensors import safe_open

    make_fit("train.max_epochs=2", checkpoint_dir=tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["best.ckpt", "last.ckpt"]
    for name in files:
        with safe_open(tmp_path / name, framework="pt") as file:  # would refuse a zip or a pickle
            assert "structure" in file.metadata()


def test_an_epochs_order_depends_on_seed_and_epoch_only():
    batches = EpochBatches(10, 4, seed=0)
    batches.set_epoch(1)
    first = list(batches)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(np.concatenate(first)) == list(range(10))
    assert list(batches) == first
    batches.set_epoch(2)
    assert list(batches) != first
    assert np.concatenate(list(EpochBatches(10, 4, seed=None))).tolist() == list(range(10))
