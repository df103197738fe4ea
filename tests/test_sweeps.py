"""Sweeps: all combinations, each once; what is done is kept, what stopped goes on."""

from __future__ import annotations

import json
import os

import pandas as pd
import pytest
from tiny import SETTINGS, make_config, make_screen

from cradle_pyro import cli, sweeps
from cradle_pyro.data.fields import write_h5ad_atomic
from cradle_pyro.errors import ConfigError, CradleError, DataError
from cradle_pyro.inference.checkpoint import load
from cradle_pyro.sweeps import Trial, run_trial, summary, sweep, trials_of, varied_from

# A screen this small has few failing cells, and says so.
pytestmark = pytest.mark.filterwarnings("ignore::cradle_pyro.errors.DataWarning")

VARIED = {"model.n_latents": ["2", "3"]}


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    write_h5ad_atomic(make_screen(), path)
    return path


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that train, in order."""
    names, before = [], sweeps.train_run

    def train_run(path, out, config, **how):
        names.append(out.name)
        return before(path, out, config, **how)

    monkeypatch.setattr(sweeps, "train_run", train_run)
    return names


def test_every_combination_has_every_seed_and_a_name_of_its_own():
    varied = {"a.x": ["1", "2"], "b.y": ["{u=1}", "p q"]}
    trials = trials_of(varied, [0, 1])
    assert len(trials) == len(set(trials)) == len({trial.name for trial in trials}) == 8
    assert trials[0] == Trial((("a.x", "1"), ("b.y", "{u=1}")), 0)
    assert all(set(trial.name) <= set("xyupqsed=,0123456789_") for trial in trials)


@pytest.mark.parametrize("texts", [[], ["a.b"], ["=1"], ["a.b="], ["a.b=1,,2"]])
def test_what_varies_must_be_said(texts):
    with pytest.raises(ConfigError):
        varied_from(texts)


def test_values_of_a_repeated_setting_are_added():
    assert varied_from(["a.b=1,2", "a.b=[3, 4]"]) == {"a.b": ["1", "2", "[3, 4]"]}


def test_a_sweep_trains_once_and_its_figures_are_those_of_the_runs(screen, tmp_path, trained):
    config = make_config("train.max_epochs=2")
    table = sweep(screen, tmp_path, VARIED, config, seeds=[0, 1])
    assert trained == [f"n_latents={n},seed={seed}" for n in (2, 3) for seed in (0, 1)]
    assert (table["failed"] == "").all()
    for _, row in table.iterrows():
        run = load(tmp_path / "runs" / f"n_latents={row['model.n_latents']},seed={row['seed']}")
        assert run.config.model.n_latents == int(row["model.n_latents"])
        assert run.config.train.seed == row["seed"]
        best = run.history.loc[run.history["val_loss"].idxmin()]
        terms = best.filter(like="val_").drop("val_loss")
        assert row["loss"] == pytest.approx(best["val_loss"])
        assert row["bound"] == pytest.approx(terms.drop("val_counterfactual").sum())
        assert row["epochs"] == 2
    again = sweep(screen, tmp_path, VARIED, config, seeds=[0, 1])
    assert len(trained) == 4
    pd.testing.assert_frame_equal(again, table)
    as_text = {"model.n_latents": str}
    kept = pd.read_csv(tmp_path / "sweep.csv", dtype=as_text, keep_default_na=False)
    pd.testing.assert_frame_equal(kept, table)


def test_runs_in_other_processes_are_the_same(screen, tmp_path):
    one = sweep(screen, tmp_path / "one", VARIED, make_config())
    two = sweep(screen, tmp_path / "two", VARIED, make_config(), jobs=2)
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))


def test_other_settings_and_a_changed_screen_are_trained_anew(screen, tmp_path, trained):
    out = tmp_path / "run"
    run_trial(screen, out, make_config())
    run_trial(screen, out, make_config("model.n_latents=2"))
    assert load(out).config.model.n_latents == 2
    facts = os.stat(screen)
    os.utime(screen, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
    run_trial(screen, out, make_config("model.n_latents=2"))
    assert len(trained) == 3


def test_a_run_that_stopped_goes_on(screen, tmp_path, monkeypatch):
    config = make_config("train.max_epochs=3")
    whole = run_trial(screen, tmp_path / "whole", config)
    resumed, before = [], sweeps.train_run

    def stop_early(path, out, config, *, resume, progress):
        resumed.append(resume)
        if not resume:
            config = config.with_settings(["train.max_epochs=1"])
            before(path, out, config, resume=resume, progress=progress)
            raise KeyboardInterrupt
        return before(path, out, config, resume=resume, progress=progress)

    monkeypatch.setattr(sweeps, "train_run", stop_early)
    with pytest.raises(KeyboardInterrupt):
        run_trial(screen, tmp_path / "part", config)
    found = run_trial(screen, tmp_path / "part", config)
    assert resumed == [False, True]
    assert found["epochs"] == whole["epochs"] == 3


def test_a_directory_with_something_else_is_left_alone(screen, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="in the way"):
        run_trial(screen, tmp_path, make_config())
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_mistakes_come_before_any_training(screen, tmp_path, trained):
    for arguments in (
        (screen, {"model.n_latent": ["2"]}),
        (screen, {"model.n_latents": ["2", "2"]}),
        (tmp_path / "none.h5ad", VARIED),
    ):
        with pytest.raises(CradleError):
            sweep(arguments[0], tmp_path / "out", arguments[1], make_config())
    assert not trained


def test_a_run_that_fails_leaves_the_others(screen, tmp_path, capsys):
    out = tmp_path / "out"
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    code = cli.app(
        ["sweep", str(screen), "--out", str(out), "--vary", "data.control=control,nobody", *options]
    )
    assert code == 1
    printed = capsys.readouterr()
    assert "1 runs failed" in printed.err
    assert "data.control=nobody, seed=0:" in printed.err
    table = pd.read_csv(out / "sweep.csv", keep_default_na=False)
    assert [bool(reason) for reason in table["failed"]] == [False, True]
    record = json.loads((out / "runs" / "control=control,seed=0" / "trial.json").read_text())
    assert "figures" in record


def test_the_summary_is_over_seeds_best_first():
    table = pd.DataFrame(
        {"x": ["a", "a", "b", "b"], "bound": [3.0, 5.0, 1.0, None], "seconds": 1.0, "failed": ""}
    )
    found = summary(table, ["x"])
    assert found["bound"].to_dict() == {"b": 1.0, "a": 4.0}
    assert found["runs"].tolist() == [1, 2]
    assert summary(table.drop(columns="bound"), ["x"]).empty


def test_optuna_can_drive_it(screen, tmp_path):
    optuna = pytest.importorskip("optuna", reason="needs Optuna, an extra")

    def objective(trial):
        config = make_config(f"model.n_latents={trial.suggest_int('n_latents', 2, 3)}")
        return run_trial(screen, tmp_path / str(trial.number), config)["bound"]

    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    study.optimize(objective, n_trials=2)
    assert study.best_value == min(trial.value for trial in study.trials)
