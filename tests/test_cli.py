"""The command line: help, exit codes, one-line reasons, and whole stories on tiny screens."""

from __future__ import annotations

import json
import shutil
import tomllib
import warnings

import anndata
import numpy as np
import pytest
from conftest import ROOT
from scipy import sparse
from tiny import SETTINGS, make_screen

from cradle_pyro import cli, workflow
from cradle_pyro.config import Config
from cradle_pyro.data.fields import write_h5ad_atomic
from cradle_pyro.inference.checkpoint import load

COMMANDS = (
    "simulate", "annotate", "train", "evaluate", "query", "effects", "report", "sweep", "benchmark",
    "demo",
)  # fmt: skip
TINY = [part for setting in SETTINGS for part in ("--set", setting)]


GRID = """
name = "tiny"
seeds = [0]
ours = "empirical_bayes"

[[screens]]
name = "tiny"
path = "screen.h5ad"
settings = ["data.layer=counts", "qc.doublets=false", "evaluation.min_cells=2"]
"""


@pytest.fixture(scope="module")
def grid(screen):
    """A benchmark of simple predictors on the tiny screen."""
    path = screen.with_name("grid.toml")
    path.write_text(GRID)
    return path


def stored(adata, path):
    """Write a screen and return its path."""
    write_h5ad_atomic(adata, path)
    return path


def run(*arguments):
    return cli.app([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """The tiny screen as a file."""
    return stored(make_screen(), tmp_path_factory.mktemp("screen") / "screen.h5ad")


@pytest.fixture(scope="module")
def trained(screen, tmp_path_factory):
    """A run directory that no test may change."""
    path = tmp_path_factory.mktemp("runs") / "a"
    assert run("train", screen, "--out", path, "--quiet", *TINY) == 0
    return path


@pytest.fixture
def reason(capsys):
    """Run a command that must fail, and return its one line on standard error."""

    def failing(*arguments):
        capsys.readouterr()
        assert run(*arguments) == 2
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1, printed.err
        assert "Traceback" not in printed.err
        return lines[0]

    return failing


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    assert run(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: cradle-pyro {command}" in text
    assert "--quiet" in text


def test_the_help_lists_every_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    commands = {command.callback.__name__ for command in cli.cli.registered_commands}
    groups = {group.name for group in cli.cli.registered_groups}
    assert commands | groups == set(COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tarin"],
        ["train"],
        ["train", "screen.h5ad"],
        ["train", "screen.h5ad", "--out", "run", "--epochs", "3"],
        ["simulate", "--out", "a.h5ad", "--cells", "many"],
        ["simulate", "--out", "a.h5ad", "--cells", "1"],
    ],
)
def test_a_misused_command_exits_with_two(arguments, capsys):
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_console_script_leaves_with_the_exit_code(monkeypatch):
    for code in (0, 2):
        monkeypatch.setattr(cli, "app", lambda code=code: code)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code


# ------------------------------------------------------------------------------------ whole stories


def test_simulate_annotate_train_evaluate(tmp_path, capsys):
    raw, annotated, out = tmp_path / "a.h5ad", tmp_path / "b.h5ad", tmp_path / "run"
    sizes = ["--cells", 200, "--genes", 60, "--perturbations", 3, "--pairs", 1, "--seed", 1]
    assert run("simulate", "--out", raw, *sizes) == 0
    assert run("annotate", raw, "--out", annotated, "--n-mads", 4, *TINY) == 0
    assert run("train", annotated, "--out", out, *TINY) == 0
    assert run("evaluate", out, "--out", tmp_path / "metrics.json") == 0
    printed = capsys.readouterr().out
    for path in (raw, annotated, out, tmp_path / "metrics.json"):
        assert f"Wrote {path}" in printed
    assert "this model" in printed

    assert anndata.read_h5ad(raw).shape == (200, 60)
    assert anndata.read_h5ad(annotated).uns["cradle_qc"]["n_mads"] == 4
    posterior = load(out)
    assert {path.name for path in out.iterdir()} >= {
        "config.toml", "manifest.json", "model.safetensors", "history.csv", "checkpoints",
    }  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    references = {(row["reference"], row["predictor"]) for row in metrics["scores"]}
    assert {("cells", "ceiling"), ("cells", "cradle"), ("truth", "cradle")} <= references
    split = np.genfromtxt(out / "split.csv", delimiter=",", dtype=str, skip_header=1)
    assert len(split) == 200
    assert (split[:, 1] == "train").sum() == posterior.labels["train"].sum()


def test_evaluate_writes_into_the_run_by_default_and_gives_the_same_twice(trained, capsys):
    assert run("evaluate", trained) == 0
    first = (trained / "metrics.json").read_text()
    assert run("evaluate", trained) == 0
    assert (trained / "metrics.json").read_text() == first


FACTUAL = ["--do", "perturbation=factual", "--do", "artifact=factual"]


def test_a_query_of_what_was_returns_the_observed_counts(screen, trained, tmp_path, capsys):
    """The cells need no annotation: the run's thresholds find their flags."""
    out = tmp_path / "same.h5ad"
    assert run("query", trained, "--cells", screen, *FACTUAL, "--out", out, "--draws", 2) == 0
    assert f"Wrote {out}: 180 cells x 60 genes" in capsys.readouterr().out
    observed, same = anndata.read_h5ad(screen), anndata.read_h5ad(out)
    assert list(same.obs_names) == list(observed.obs_names)
    assert (same.layers["counts"] != observed.layers["counts"]).nnz == 0
    assert set(same.layers) == {"counts", "rate", "rate_sd"}
    assert same.uns["cradle_query"]["draws"] == 2


def test_a_query_intervenes_and_says_what_was_never_seen(screen, trained, tmp_path, capsys):
    out = tmp_path / "pair.h5ad"
    act = ["--do", "perturbation=CEBPA+KLF1", "--do", "artifact=0", "--do", "library=700"]
    arguments = ["query", trained, "--cells", screen, *act, "--out", out, "--draws", 3]
    assert run(*arguments, "--count-draws", 2, "--seed", 4) == 0
    printed = capsys.readouterr()
    assert "never screened" in " ".join(printed.err.split())
    answer = anndata.read_h5ad(out)
    assert answer.obs["cradle_out_of_support"].all()
    assert (answer.obs["cradle_library"] == 700).all()
    assert {"counts", "counts_1"} <= set(answer.layers)
    assert run(*arguments, "--count-draws", 2, "--seed", 4, "--quiet") == 0
    again = anndata.read_h5ad(out)
    assert (again.layers["counts_1"] != answer.layers["counts_1"]).nnz == 0


def test_effects_of_all_perturbations_and_of_some(trained, tmp_path, capsys):
    out = tmp_path / "effects.h5ad"
    assert run("effects", trained, "--out", out, "--draws", 5) == 0
    assert "4 perturbations x 60 genes" in capsys.readouterr().out
    table = anndata.read_h5ad(out)
    assert set(table.layers) == {"sd", "ci_low", "ci_high", "lfsr", "s_value"}
    some = ["--perturbation", "KLF1", "--perturbation", "GATA1", "--draws", 5, "--quiet"]
    assert run("effects", trained, "--out", out, *some) == 0
    few = anndata.read_h5ad(out)
    assert list(few.obs_names) == ["KLF1", "GATA1"]
    np.testing.assert_array_equal(few.X, table[["KLF1", "GATA1"]].X)
    assert run("effects", trained, "--out", out, "--total", *some) == 0
    assert (anndata.read_h5ad(out).X != few.X).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--do", "perturbation=KLF"], "did you mean 'KLF1'"),
        (["--do", "artifact=1"], "does not say which of the flags"),
        (["--do", "artefact=0"], "did you mean 'artifact'"),
        (["--do", "artifact"], "Expected site=value"),
        (["--do", "artifact=0", "--do", "artifact=typical"], "one value in a world"),
        (["--do", "library=-3"], "positive number"),
        (["--do", "artifact=0", "--count-draws", "30"], "count_draws=30"),
    ],
)
def test_a_mistake_in_a_query(reason, screen, trained, tmp_path, options, message):
    out = tmp_path / "a.h5ad"
    assert message in reason("query", trained, "--cells", screen, "--out", out, *options)
    assert not out.exists()


def test_a_mistake_in_the_cells_of_a_query(reason, trained, tmp_path):
    def unknown(adata):
        adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("KLF1", "KLF9")

    out = ["--do", "artifact=0", "--out", tmp_path / "a.h5ad"]
    assert "absent from training" in reason(
        "query", trained, "--cells", write(tmp_path, unknown), *out
    )
    assert "no file at" in reason("query", trained, "--cells", tmp_path / "none.h5ad", *out)
    assert "did you mean" in reason("effects", trained, *out[2:], "--perturbation", "KLF")


def test_a_report_is_one_page_in_the_run(screen, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "run")
    moved = stored(anndata.read_h5ad(screen), tmp_path / "moved.h5ad")
    assert run("report", out, "--data", moved, "--draws", 2, "--seed", 3) == 0
    assert f"Wrote {out / 'report.html'}: one page of" in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"cradle-pyro report {out} --data {moved} --draws 2 --seed 3" in page
    assert (out / "metrics.json").is_file()


def test_a_mistake_in_a_report(reason, screen, trained, tmp_path):
    def another(adata):
        adata.layers["counts"] = adata.layers["counts"] * 2

    arguments = ["report", trained, "--out", tmp_path / "a.html"]
    assert "its fingerprint differs" in reason(*arguments, "--data", write(tmp_path, another))
    assert "no file at" in reason(*arguments, "--data", tmp_path / "none.h5ad")
    assert "create it first" in reason("report", trained, "--out", tmp_path / "no" / "a.html")
    assert "is a directory" in reason("report", trained, "--out", tmp_path)
    assert "a run directory" in reason("report", tmp_path / "no", "--out", tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()
    assert run(*arguments, "--draws", 0) == 2


def test_a_report_when_the_screen_has_moved(reason, tmp_path):
    path = stored(make_screen(), tmp_path / "screen.h5ad")
    out = tmp_path / "run"
    assert run("train", path, "--out", out, "--quiet", *TINY) == 0
    path.unlink()
    assert "Give it with --data" in reason("report", out)


def test_resume_goes_on_to_more_epochs(screen, tmp_path):
    arguments = ["train", screen, "--out", tmp_path, "--quiet", *TINY]
    arguments += ["--set", "train.schedule=constant"]
    assert run(*arguments) == 0
    assert run(*arguments, "--set", "train.max_epochs=3", "--resume") == 0
    assert load(tmp_path).history["epoch"].tolist() == [0, 1, 2]


def test_demo_smoke(tmp_path, capsys):
    assert run("demo", "--smoke", "--out", tmp_path / "demo") == 0
    printed = capsys.readouterr().out
    assert f"Report: {tmp_path / 'demo' / 'report.md'}" in printed
    assert "Known truth, held-out perturbations" in printed
    report = (tmp_path / "demo" / "report.md").read_text(encoding="utf-8")
    assert "**this model**" in report
    assert "What would failing cells be without their artifact?" in printed
    assert report.startswith("# Answers")
    assert anndata.read_h5ad(tmp_path / "demo" / "clean.h5ad").obs["cradle_artifact"].all()
    effects = anndata.read_h5ad(tmp_path / "demo" / "effects.h5ad")
    assert effects.layers["truth"].shape == effects.shape
    # What the demo leaves behind is an ordinary run on an ordinary screen.
    assert (tmp_path / "demo" / "screen.h5ad").is_file()
    assert load(tmp_path / "demo" / "run").history["epoch"].tolist() == [0, 1]
    assert run("evaluate", tmp_path / "demo" / "run", "--quiet") == 0


def test_thresholds_can_be_fitted_on_chosen_cells(tmp_path):
    adata = make_screen()
    adata.obs["fold"] = np.where(np.arange(adata.n_obs) % 2, "test", "train")
    path = stored(adata, tmp_path / "a.h5ad")
    found = []
    for index, options in enumerate(([], ["--fit-on", "fold=train"])):
        out = tmp_path / f"{index}.h5ad"
        assert run("annotate", path, "--out", out, "--quiet", *options, *TINY) == 0
        found.append(anndata.read_h5ad(out).uns["cradle_qc"]["thresholds"])
    assert str(found[0]) != str(found[1])


def test_a_screen_on_disk_is_annotated_as_one_in_memory(tmp_path):
    adata = make_screen()
    adata.raw = adata.copy()
    path = stored(adata, tmp_path / "a.h5ad")
    found = []
    for backed in ("false", "true"):
        out, setting = tmp_path / f"{backed}.h5ad", f"data.backed={backed}"
        assert run("annotate", path, "--out", out, "--quiet", *TINY, "--set", setting) == 0
        found.append(anndata.read_h5ad(out))
    here, there = found
    assert here.obs.equals(there.obs)
    assert str(here.uns["cradle_qc"]) == str(there.uns["cradle_qc"])
    assert (here.X != there.X).sum() == (here.raw.X != there.raw.X).sum() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.h5ad", "false.h5ad", "true.h5ad"}


def test_zarr_stores_are_screens_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata on the version of the format
        make_screen().write_zarr(tmp_path / "a.zarr")
    assert run("train", tmp_path / "a.zarr", "--out", tmp_path / "run", "--quiet", *TINY) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_prints_nothing(command, screen, trained, grid, tmp_path, capfd):
    arguments = {
        "simulate": ["--out", tmp_path / "a.h5ad", "--cells", 100, "--genes", 80,
                     "--perturbations", 3, "--pairs", 0],
        "annotate": [screen, "--out", tmp_path / "b.h5ad", *TINY],
        "train": [screen, "--out", tmp_path / "run", *TINY],
        "evaluate": [trained, "--out", tmp_path / "metrics.json"],
        "query": [trained, "--cells", screen, "--do", "artifact=0", "--out", tmp_path / "c.h5ad"],
        "effects": [trained, "--out", tmp_path / "e.h5ad", "--draws", 2],
        "report": [trained, "--out", tmp_path / "report.html", "--draws", 2],
        "sweep": [screen, "--out", tmp_path / "sweep", "--vary", "model.n_latents=2", *TINY],
        "benchmark": ["--config", grid, "--out", tmp_path / "tables"],
        "demo": ["--out", tmp_path / "demo", "--smoke"],
    }[command]  # fmt: skip
    capfd.readouterr()
    assert run(command, *arguments, "--quiet") == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_warnings_about_the_data_are_shown_on_one_line(tmp_path, capsys):
    adata = make_screen()
    counts = adata.layers["counts"].toarray()
    counts[:, 3] = 0
    adata.layers["counts"] = sparse.csr_matrix(counts)
    path = stored(adata, tmp_path / "a.h5ad")
    assert run("train", path, "--out", tmp_path / "run", *TINY) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning:" in line]
    assert any(adata.var_names[3] in line for line in lines)


# ----------------------------------------------------------- a file sets exactly what the flags set


@pytest.fixture
def resolved(monkeypatch, screen):
    """Return the configuration that `train` would use, given its options."""
    seen = []

    class Seen(Exception):
        pass

    def catch(data, out, config, **options):
        seen.append(config)
        raise Seen

    def configuration(*options):
        with pytest.raises(Seen):
            run("train", screen, "--out", "nowhere", *options)
        return seen[-1]

    monkeypatch.setattr(workflow, "train_run", catch)
    return configuration


FLAGS = {
    "--perturbation-key": ("condition", "[data]\nperturbation_key = 'condition'"),
    "--control": ("non-targeting", "[data]\ncontrol = 'non-targeting'"),
    "--layer": ("counts", "[data]\nlayer = 'counts'"),
    "--library-key": ("n_counts_full", "[data]\nlibrary_key = 'n_counts_full'"),
    "--covariate-key": ("batch", "[data]\ncovariate_keys = ['batch']"),
    "--split-key": ("fold", "[split]\nmethod = 'column'\nkey = 'fold'"),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_file_sets_exactly_what_the_flag_sets(resolved, tmp_path, flag):
    value, text = FLAGS[flag]
    path = tmp_path / "config.toml"
    path.write_text(text)
    by_flag, by_file = resolved(flag, value), resolved("--config", path)
    assert by_flag == by_file != Config()
    settings = [f"{section}.{key}={json.dumps(setting)}"
                for section, values in tomllib.loads(text).items()
                for key, setting in values.items()]  # fmt: skip
    assert by_flag == resolved(*[part for s in settings for part in ("--set", s)])


def test_all_flags_together_are_the_file_with_all_of_them(resolved, tmp_path):
    path = tmp_path / "config.toml"
    data = "\n".join(text.removeprefix("[data]\n") for _, text in FLAGS.values() if "data" in text)
    path.write_text(f"[data]\n{data}\n{FLAGS['--split-key'][1]}")
    options = [part for flag, (value, _) in FLAGS.items() for part in (flag, value)]
    assert resolved(*options) == resolved("--config", path)


def test_flags_win_over_the_file_and_settings_over_both(resolved, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[data]\ncontrol = 'file'\nlayer = 'file'\nlibrary_key = 'file'")
    config = resolved(
        "--config", path, "--control", "flag", "--layer", "flag", "--set", "data.layer=set"
    )
    assert config.data.library_key == "file"
    assert config.data.control == "flag"
    assert config.data.layer == "set"


def test_labels_that_look_like_numbers_stay_text(resolved):
    assert resolved("--control", "0").data.control == "0"
    assert resolved("--control", "true").data.control == "true"


def test_no_option_means_the_defaults(resolved):
    assert resolved() == Config()
    assert resolved("--config", ROOT / "configs" / "default.toml") == Config()


# ----------------------------------------------------------------------------------------- mistakes


def write(tmp_path, change=None):
    adata = make_screen()
    if change is not None:
        change(adata)
    return stored(adata, tmp_path / "own.h5ad")


def test_a_screen_that_is_not_there(reason, tmp_path, screen):
    for command in ("train", "annotate"):
        assert "no file at" in reason(command, tmp_path / "none.h5ad", "--out", tmp_path / "x")
    found = reason("train", screen.with_name("scren.h5ad"), "--out", tmp_path / "x")
    assert "did you mean 'screen.h5ad'" in found


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_screen(reason, tmp_path, screen, keep):
    content = screen.read_bytes()
    size = keep if isinstance(keep, int) else int(keep * len(content))
    path = tmp_path / "cut.h5ad"
    path.write_bytes(content[:size])
    for command in ("train", "annotate"):
        found = reason(command, path, "--out", tmp_path / "x", *TINY)
        assert str(path) in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--perturbation-key", "conditon"], "conditon"),
        (["--set", "data.layer=count"], "did you mean 'counts'"),
        (["--library-key", "n_counts_full"], "n_counts_full"),
        (["--covariate-key", "donor"], "donor"),
        (["--split-key", "fold"], "fold"),
        (["--control", "ctrl"], "ctrl"),
        (["--set", "train.max_epoch=3"], "did you mean 'max_epochs'"),
        (["--set", "train.max_epochs=0"], "train.max_epochs"),
        (["--set", "train.max_epochs"], "Expected section.key=value"),
        (["--set", "qc.counts_key=depth"], "depth"),
        (["--set", "model.likelihood=normal"], "log-normalised"),
        (["--set", "split.train=0.9", "--set", "split.validation=0.2"], "0.9"),
        (["--set", "split.method=combinations", "--set", 'split.held_out=["KLF1+X"]'], "KLF1+X"),
        (["--config", "absent.toml"], "absent.toml"),
        (["--resume"], "checkpoint to resume from"),
    ],
)
def test_a_mistake_in_the_options_of_train(reason, screen, tmp_path, options, message):
    assert message in reason("train", screen, "--out", tmp_path / "x", *TINY, *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.layers["counts"].data.__imul__(0.5), "integer"),
        (lambda a: a.layers["counts"].data.__imul__(-1), "negative"),
        (lambda a: a.layers["counts"].data.__setitem__(3, np.nan), "NaN"),
        (lambda a: setattr(a, "var_names", ["G"] * a.n_vars), "G"),
        (lambda a: a.obs.__setitem__("perturbation", "KLF1"), "control"),
    ],
)
def test_a_mistake_in_the_screen(reason, tmp_path, change, message):
    path = tmp_path / "own.h5ad"
    adata = make_screen()
    change(adata)
    adata.write_h5ad(path)
    assert message.lower() in reason("train", path, "--out", tmp_path / "x", *TINY).lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written(
    reason, command, screen, trained, grid, tmp_path, monkeypatch
):
    """Found before long work, and nothing else is written."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    arguments = {
        "simulate": ["--out", blocked / "a.h5ad"],
        "annotate": [screen, "--out", blocked / "a.h5ad", *TINY],
        "train": [screen, "--out", blocked / "run", *TINY],
        "evaluate": [trained, "--out", blocked / "metrics.json"],
        "query": [trained, "--cells", screen, "--do", "artifact=0", "--out", blocked / "a.h5ad"],
        "effects": [trained, "--out", blocked / "a.h5ad"],
        "report": [trained, "--out", blocked / "a.html"],
        "sweep": [screen, "--out", blocked / "sweep", "--vary", "model.n_latents=2", *TINY],
        "benchmark": ["--config", grid, "--out", blocked / "tables"],
        "demo": ["--out", blocked / "demo", "--smoke"],
    }[command]

    def never(*args, **kwargs):
        raise AssertionError("long work was begun")

    monkeypatch.setattr("cradle_pyro.simulate.perturbseq.simulate_perturbseq", never)
    monkeypatch.setattr("cradle_pyro.workflow.simulate_perturbseq", never)
    monkeypatch.setattr("cradle_pyro.data.prepare.annotate_artifacts", never)
    monkeypatch.setattr("cradle_pyro.workflow.evaluate_posterior", never)
    monkeypatch.setattr("cradle_pyro.workflow.counterfactual", never)
    monkeypatch.setattr("cradle_pyro.workflow.effects", never)
    assert str(blocked) in reason(command, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_is_not_a_run(reason, tmp_path):
    assert "Expected a run directory" in reason("evaluate", tmp_path)
    assert "Expected a run directory" in reason("evaluate", tmp_path / "none")


def test_evaluation_with_another_screen(reason, trained, tmp_path):
    def other(adata):
        adata.layers["counts"].data += 1

    path = write(tmp_path, other)
    assert "not the screen this run was trained on" in reason("evaluate", trained, "--data", path)
    assert "no file at" in reason("evaluate", trained, "--data", tmp_path / "none.h5ad")


def test_evaluation_when_the_screen_has_moved(reason, tmp_path, capsys):
    path = write(tmp_path)
    out = tmp_path / "run"
    assert run("train", path, "--out", out, "--quiet", *TINY) == 0
    moved = path.rename(tmp_path / "moved.h5ad")
    assert "--data" in reason("evaluate", out)
    assert run("evaluate", out, "--data", moved, "--quiet") == 0


def test_reasons_keep_their_brackets_and_stay_on_one_line(monkeypatch, capsys):
    from cradle_pyro.errors import DataError

    def fail(*args, **kwargs):
        raise DataError("Expected [red] and [/x],\n  found ['a'].")

    monkeypatch.setattr(workflow, "evaluate_run", fail)
    assert run("evaluate", "anywhere") == 2
    assert capsys.readouterr().err.splitlines() == ["Error: Expected [red] and [/x], found ['a']."]


def test_a_fault_of_ours_is_not_hidden_as_a_users_mistake(monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(workflow, "evaluate_run", fail)
    with pytest.raises(ZeroDivisionError):
        run("evaluate", "anywhere")
