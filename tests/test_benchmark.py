"""The benchmark: checked before work, resumed, isolated failures, honest tuning, a whole page."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from fake_task import FakeTask
from report_page import chromium
from tiny import SETTINGS, make_config, make_screen

from cradle_pyro import cli
from cradle_pyro.baselines import learned
from cradle_pyro.data.fields import write_h5ad_atomic
from cradle_pyro.errors import ConfigError, CradleError, DataError, TrainingError
from cradle_pyro.evaluation import benchmark as running
from cradle_pyro.evaluation import grid_file, jobs, processes
from cradle_pyro.evaluation.benchmark import gather_benchmark, read_parts, run_benchmark
from cradle_pyro.evaluation.comparisons import rank_agreement
from cradle_pyro.evaluation.evaluate import evaluate
from cradle_pyro.evaluation.grid import Benchmark
from cradle_pyro.evaluation.grid_file import read_benchmark
from cradle_pyro.evaluation.metrics import score_effects
from cradle_pyro.evaluation.paired import EFFECT_METRICS, weighted_scores
from cradle_pyro.evaluation.processes import run_tasks
from cradle_pyro.evaluation.screens import build_screen
from cradle_pyro.reporting.benchmark_page import write_benchmark_report

BASELINES = [
    "no_change",
    "global_mean",
    "training_mean_all",
    "training_mean_passing",
    "additive",
    "empirical_bayes",
]
PAIR = "split.held_out_fraction=0.34"

GRID = f"""
name = "tiny"
seeds = [0, 1]
ours = "cradle"
diagnostics = false

[[screens]]
name = "simulated"
simulate = {{ n_cells = 240, n_genes = 60, n_perturbations = 3, n_pairs = 3, control_share = 0.3 }}
config = "tiny.toml"
settings = ["split.method=combinations", "{PAIR}"]

[[predictors]]
name = "cradle"
kind = "cradle"
"""


def write_grid(folder: Path, text: str = GRID) -> Path:
    """Write a grid and the configuration that it names; return the grid's path."""
    (folder / "tiny.toml").write_text(make_config(*SETTINGS).to_toml())
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def changed(old: str, new: str, text: str = GRID) -> str:
    assert old in text
    return text.replace(old, new)


def run(path: Path, out: Path, *, workers: int = 0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_benchmark(read_benchmark(path), out, workers=workers, progress=False, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The grid, its results and its directory, which no test may change."""
    folder = tmp_path_factory.mktemp("benchmark")
    path = write_grid(folder, changed("diagnostics = false", "diagnostics = true\neffects = true"))
    return read_benchmark(path), run(path, folder / "out"), folder / "out"


def costless(scores: pd.DataFrame) -> pd.DataFrame:
    """Leave out what depends on the machine."""
    return scores[scores["reference"] != "run"].reset_index(drop=True)


# -------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('ours = "cradle"', 'our = "cradle"', "unknown key 'our'; did you mean 'ours'?"),
        ("kind =", "knd = 'x'\nkind =", "unknown key 'predictors.0.knd'; did you mean 'kind'?"),
        ("config =", "confg =", "unknown key 'screens.0.confg'; did you mean 'config'?"),
        ("n_genes", "n_gens", "no argument 'n_gens' of simulate_perturbseq; did you mean"),
        ("simulate = {", "path = 'x.h5ad'\nsimulate = {", "either simulate = {...} or path"),
        ('kind = "cradle"', 'kind = "cradel"', "did you mean 'cradle'"),
        ('ours = "cradle"', 'ours = "cradl"', "none of the predictors; did you mean 'cradle'"),
        ('"tiny.toml"', '"tin.toml"', "no configuration file 'tin.toml'"),
        ("split.method", "split.metod", "Unknown setting 'split.metod'; did you mean 'method'?"),
        ("seeds = [0, 1]", "seeds = []", "'seeds'"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "each seed needs a name of its own"),
        ('name = "simulated"', 'name = "a/b"', "'screens.0.name'"),
        (
            'kind = "cradle"',
            'kind = "cradle"\nsettings = ["qc.n_mads=5"]',
            "settings may not change the screen, found changes of 'qc'",
        ),
        (
            'kind = "cradle"',
            'kind = "cradle"\nscreens = ["simulatd"]',
            "unknown screen 'simulatd'; did you mean 'simulated'?",
        ),
        (
            "settings = [",
            "corrupt = { share = 0.2, kinds = ['leakng'] }\nsettings = [",
            "no kind of artifact 'leakng'; did you mean 'leaking'?",
        ),
        (
            'kind = "cradle"',
            'kind = "cradle"\ncandidates = [["train.max_epochs=x"]]',
            "train.max_epochs",
        ),
    ],
)
def test_a_mistake_in_the_grid_is_one_line_that_names_what_is_near(tmp_path, old, new, expected):
    path = write_grid(tmp_path, changed(old, new))
    with pytest.raises(ConfigError) as caught:
        read_benchmark(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_tuned_predictors_have_equal_budgets_unless_it_is_said(tmp_path):
    text = GRID + 'candidates = [[], ["model.n_latents=2"]]\n'
    text += '[[predictors]]\nname = "b"\nkind = "cradle"\ncandidates = [[]]\n'
    with pytest.raises(ConfigError, match=r"equally many candidates, found .*'cradle': 2, 'b': 1"):
        read_benchmark(write_grid(tmp_path, text))
    loose = changed("seeds =", "unequal_budget = true\nseeds =", text)
    assert read_benchmark(write_grid(tmp_path, loose)).unequal_budget


def test_baselines_and_ceilings_need_no_entry_and_can_be_replaced(tmp_path):
    benchmark = read_benchmark(write_grid(tmp_path))
    assert [p.name for p in benchmark.all_predictors] == ["ceiling", *BASELINES, "cradle"]
    own = GRID + '[[predictors]]\nname = "additive"\nkind = "additive"\ncells = "all"\n'
    predictors = read_benchmark(write_grid(tmp_path, own)).all_predictors
    assert [p.cells for p in predictors if p.name == "additive"] == ["all"]
    bare = changed("seeds =", "baselines = false\nseeds =")
    predictors = read_benchmark(write_grid(tmp_path, bare)).all_predictors
    assert [p.name for p in predictors] == ["ceiling", "cradle"]


def test_a_seed_sets_the_split_the_training_and_the_simulation(tmp_path):
    benchmark = read_benchmark(write_grid(tmp_path))
    screen, (split,) = benchmark.screens[0], benchmark.screens[0].splits
    cell = next(c for c in benchmark.cells() if c.seed == 1 and c.predictor.name == "cradle")
    config = benchmark.predictor(cell)[1]
    assert (config.split.seed, config.train.seed) == (1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second, again = (build_screen(benchmark, screen, split, s) for s in (0, 1, 1))
    assert (second.data.rows([0, 1]) != again.data.rows([0, 1])).nnz == 0
    assert (first.data.rows(slice(None)) != second.data.rows(slice(None))).nnz > 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs/benchmarks").glob("*.toml")), ids=str)
def test_every_benchmark_that_is_shipped_is_valid(path, monkeypatch):
    # What a machine lacks, screens or cell-eval, does not make a file wrong.
    monkeypatch.setattr(Benchmark, "screen_path", lambda self, screen: Path(screen.path))
    monkeypatch.setattr(grid_file, "check_cell_eval", lambda: None)
    benchmark = read_benchmark(path)
    assert len(list(benchmark.cells())) > 10
    assert f"configs/benchmarks/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", ["norman", "dixit", "adamson", "replogle"])
def test_a_published_screen_that_is_missing_says_where_to_get_it(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"{name}\.h5ad.* Get it from .*read_public\('{name}'"):
        read_benchmark(ROOT / "configs" / "benchmarks" / f"{name}.toml", screens=tmp_path)


def test_screens_are_found_beside_the_grid_in_the_environment_and_where_it_is_said(
    tmp_path, monkeypatch
):
    text = re.sub("simulate = .*", "path = 's.h5ad'", GRID)
    folders = {name: tmp_path / name for name in ("grid", "environment", "said")}
    for folder in folders.values():
        folder.mkdir()
    path = write_grid(folders["grid"], text)
    monkeypatch.setenv("CRADLE_SCREENS", str(folders["environment"]))
    with pytest.raises(ConfigError, match=r"no file 's\.h5ad'"):
        read_benchmark(path)
    for name in ("environment", "grid", "said"):
        (folders[name] / "s.h5ad").touch()
        benchmark = read_benchmark(path, screens=folders["said"])
        assert benchmark.screen_path(benchmark.screens[0]).parent == folders[name]


# ---------------------------------------------------------------------------- checked before work


def with_screen(folder: Path, adata, *more: str) -> Path:
    """Write a grid with a second screen, read from a file, that is the last of its cells."""
    write_h5ad_atomic(adata, folder / "real.h5ad")
    screen = ['[[screens]]\nname = "real"\npath = "real.h5ad"\nconfig = "tiny.toml"', *more, ""]
    return write_grid(folder, changed("[[predictors]]", "\n".join(screen) + "\n[[predictors]]"))


def without_controls():
    adata = make_screen()
    return adata[adata.obs["perturbation"] != "control"].copy()


@pytest.mark.parametrize(
    ("adata", "more", "expected"),
    [
        (without_controls, (), "control"),
        (make_screen, ('settings = ["data.layer=spliced"]',), "spliced"),
        (make_screen, ('settings = ["split.train=1.0", "split.validation=0.0"]',), "'val'"),
        (make_screen, ('settings = ["evaluation.min_cells=500"]',), "min_cells"),
        (make_screen, ("keep = { train_pairs = 1.0 }", 'settings = ["split.method=combinations"]'),
         "train_pairs"),
    ],
)  # fmt: skip
def test_a_screen_that_cannot_be_used_stops_before_anything_is_trained(
    tmp_path, monkeypatch, adata, more, expected
):
    def never(*_, **__):
        raise AssertionError("something was trained")

    monkeypatch.setattr(learned, "fit", never)
    monkeypatch.setattr(jobs, "score_ceiling", never)
    path = with_screen(tmp_path, adata(), *more)
    with pytest.raises(CradleError, match=expected) as caught:
        run(path, tmp_path / "out")
    assert "Screen 'real'" in str(caught.value)
    assert not (tmp_path / "out" / "cells").exists()


def test_a_pair_that_another_seed_does_not_have_is_found_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "score_ceiling", lambda *_: 1 / 0)
    text = changed("n_pairs = 3", "n_pairs = 1")
    benchmark = read_benchmark(write_grid(tmp_path, text))
    screen = benchmark.screens[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = build_screen(benchmark, screen, screen.splits[0], 0).data.labels
    pair = next(label for label in labels if "+" in label)
    path = write_grid(tmp_path, changed(PAIR, f"split.held_out=['{pair}']", text))
    with pytest.raises(DataError, match=r"Screen 'simulated'.*is none"):
        run(path, tmp_path / "out")


def test_a_simulation_that_is_not_possible_and_a_folder_that_cannot_be_written(tmp_path):
    path = write_grid(tmp_path, changed("n_genes = 60", "n_genes = 20"))
    with pytest.raises(DataError, match=r"Screen 'simulated'.*n_genes=20"):
        run(path, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Choose another --out"):
        run(write_grid(tmp_path), tmp_path / "file" / "out")


# ------------------------------------------------------------------------------ what is measured


def test_scores_are_those_of_an_evaluation_of_the_same_run(done):
    """One predictor at a time, but by the same references as `evaluate`."""
    benchmark, result, _ = done
    cell = next(c for c in benchmark.cells() if c.seed == 1 and c.predictor.name == "cradle")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = build_screen(benchmark, cell.screen, cell.split, 1)
    predictor, _ = benchmark.predictor(cell)
    learnt = built.data.subset(np.isin(np.asarray(built.data.split), ["train", "val"]))
    posterior = predictor.fit(learnt).posterior
    expected = evaluate(posterior, built.data, truth=built.truth).scores
    keys = ["reference", "labels", "predictor", "metric"]
    ours = result.scores.query("seed == 1 and label == ''").set_index(keys)["value"]
    expected = expected.set_index(keys)["value"]
    shared = expected.index.intersection(ours.index)
    assert len(shared) == len(expected)
    assert np.allclose(ours[shared], expected[shared], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_cell_has_scores_of_labels_and_effects_for_other_scorers(done):
    benchmark, result, out = done
    keys = result.scores[["split", "seed", "predictor"]].drop_duplicates()
    assert len(keys) == len(list(benchmark.cells())) == 16
    assert not result.failures
    with np.load(out / "cells/simulated/default/0/cradle.effects.npz") as file:
        labels = file["truth/held_out/labels"].tolist()
        predicted, effects = (file[f"truth/held_out/{x}"] for x in ("predicted", "reference"))
        assert len(file["genes"]) == effects.shape[1] == 60
    assert len(labels) == 1
    assert "+" in labels[0]
    here = "seed == 0 and predictor == 'cradle' and reference == 'truth' and labels == 'held_out'"
    rows = result.scores.query(f"{here} and label == ''").set_index("metric")["value"]
    for name, value in score_effects(predicted, effects).items():
        assert rows[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
    each = result.scores.query(f"{here} and label != ''")
    assert set(each["label"]) == set(labels)
    # The small parts that comparisons are made of give the same scores.
    parts = read_parts(benchmark, out)["simulated", "default", 0, "cradle", "truth", "held_out"]
    assert parts.labels == labels
    found = dict(zip(EFFECT_METRICS, weighted_scores(parts, np.ones((1, 1)))[0], strict=True))
    for name in {"ate_rho", "mae", "jaccard_top20"} & set(rows.index):
        assert found[name] == pytest.approx(rows[name], rel=1e-4, abs=1e-5), name


def test_a_model_is_checked_beside_its_effects(done):
    _, result, _ = done
    rows = result.scores.query("predictor == 'cradle' and seed == 0").set_index("metric")["value"]
    for name in (
        "iwelbo_test", "iwelbo_val", "qc_pass_3mad", "qc_ks_counts", "composition_entries",
        "leakage_perturbation_knn", "basal_sd", "profile_cleaned", "control_individual",
        "interval_coverage", "seconds_to_fit", "peak_memory_mb", "epochs",
    ):  # fmt: skip
        assert np.isfinite(rows[name]), name
    assert rows["composition_entries"] == 1


def test_a_single_predictor_may_go_unchecked(tmp_path):
    other = '[[predictors]]\nname = "unchecked"\nkind = "cradle"\ndiagnostics = false\n'
    text = changed("diagnostics = false", "diagnostics = true", changed("[0, 1]", "[0]")) + other
    result = run(write_grid(tmp_path, text), tmp_path / "out")
    checked = result.scores.query("reference == 'model'")
    assert set(checked["predictor"]) == {"cradle", "ceiling"}
    # The ceiling of how cells pass QC is how real training cells do.
    of_ceiling = checked.query("predictor == 'ceiling'").set_index("metric")["value"]
    assert {"qc_pass_3mad", "qc_ks_counts"} <= set(of_ceiling.index)
    assert of_ceiling["qc_pass_5mad"] == 1
    assert of_ceiling.filter(like="qc_ks").max() < 0.5
    assert "unchecked" in set(result.scores.query("reference == 'truth'")["predictor"])


def test_generated_cells_are_compared_label_by_label_with_halves_as_a_ceiling(done):
    _, result, _ = done
    rows = result.scores.query("reference == 'generated'")
    assert set(rows["metric"]) == {
        "ate_rho_per_perturbation", "mae", "discrimination",
        "energy_distance", "mmd", "de_overlap", "de_direction",
    }  # fmt: skip
    assert {"ceiling", "cradle", *BASELINES} <= set(rows["predictor"])
    one = rows.query("predictor == 'cradle' and seed == 0 and labels == 'seen'")
    distances = one[one["metric"] == "energy_distance"]
    each = distances[distances["label"] != ""]["value"]
    assert distances[distances["label"] == ""]["value"].iloc[0] == pytest.approx(each.mean())
    assert len(each) == len(set(one["label"]) - {""}) > 2
    compared = result.comparisons.query("reference == 'generated' and metric == 'mmd'")
    assert set(compared["resampled"]) == {"seeds and perturbations, nested"}


def test_ceilings_and_baselines_are_in_every_block(done):
    _, result, _ = done
    effects = result.scores[result.scores["reference"].isin(["cells", "truth"])]
    for _, block in effects.groupby(["seed", "reference", "labels"]):
        assert {"ceiling", "cradle", *BASELINES} <= set(block["predictor"])
    shares = result.normalised.query("metric == 'ate_rho' and reference == 'truth'")
    means = shares.groupby("predictor")["normalised"].mean()
    assert means["ceiling"] == pytest.approx(1)
    assert means["global_mean"] == pytest.approx(0)


def test_tables_are_written_as_they_are_returned(done):
    _, result, out = done
    is_pooled = result.scores["label"] == ""
    for name, expected in {
        "scores": result.scores[is_pooled].drop(columns="label"),
        "labels": result.scores[~is_pooled],
        "normalised": result.normalised,
        "comparisons": result.comparisons,
    }.items():
        table = pd.read_csv(out / f"{name}.csv", keep_default_na=False, na_values=[""])
        assert list(table.columns) == list(expected.columns)
        assert len(table) == len(expected) > 0
    others = set(result.comparisons["other"])
    assert others == {"no_change", *BASELINES} - {"cradle", "ceiling"}
    # A score that is not defined in a seed, as one label's discrimination, is left out there.
    main = result.comparisons["metric"] == "ate_rho"
    assert set(result.comparisons.loc[main, "n_seeds"]) == {2}


# ----------------------------------------------------------------------------- stopped and gone on


@pytest.fixture
def worked(monkeypatch):
    """Names of the cells that were computed."""
    names = []
    scored = jobs._scored

    def noted(task, built, cell, chosen):
        names.append(str(cell))
        return scored(task, built, cell, chosen)

    monkeypatch.setattr(jobs, "_scored", noted)
    return names


@contextmanager
def stopping_after(monkeypatch, number):
    """Interrupt a benchmark, as by Ctrl-C, when so many cells have ended."""
    with monkeypatch.context() as patch:

        @contextmanager
        def bar(what, total, *, show):
            ended = 0

            def advance():
                nonlocal ended
                ended += what == "Benchmark"
                if ended == number:
                    raise KeyboardInterrupt

            yield advance

        patch.setattr(running, "progress_bar", bar)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_benchmark_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch, worked, done):
    path = write_grid(tmp_path, changed("diagnostics = false", "diagnostics = true"))
    with stopping_after(monkeypatch, 1):
        run(path, tmp_path / "out")
    first = list(worked)
    assert 0 < len(first) < 16
    so_far = gather_benchmark(read_benchmark(path), tmp_path / "out")
    keys = ["split", "seed", "predictor"]
    assert len(so_far.scores[keys].drop_duplicates()) == len(first)
    assert len(worked) == len(first)
    assert not so_far.failures
    said = []
    result = run(path, tmp_path / "out", say=said.append)
    pd.testing.assert_frame_equal(
        gather_benchmark(read_benchmark(path), tmp_path / "out").comparisons, result.comparisons
    )
    assert sorted(worked) == sorted({*worked})
    assert len(worked) == 16
    assert any(f"{len(first)} of 16 cells are there already" in line for line in said)
    pd.testing.assert_frame_equal(costless(result.scores), costless(done[1].scores))
    worked.clear()
    again = run(path, tmp_path / "out")
    assert worked == []
    pd.testing.assert_frame_equal(again.scores, result.scores)


def test_only_what_a_change_touches_is_computed_again_and_that_is_said(tmp_path, worked):
    out, said = tmp_path / "out", []
    text = changed("seeds = [0, 1]", "seeds = [0]")
    run(write_grid(tmp_path, text), out)
    worked.clear()
    kind = 'kind = "cradle"'
    more = changed(kind, f'{kind}\nsettings = ["objective.beta=0.5"]', text)
    run(write_grid(tmp_path, more), out, say=said.append)
    assert worked == ["simulated/default/0/cradle"]
    assert any("1 cells on disk were made with other settings" in line for line in said)
    worked.clear()
    run(write_grid(tmp_path, changed("n_cells = 240", "n_cells = 250", more)), out)
    assert len(worked) == 8


def test_a_damaged_cell_is_computed_again(tmp_path, worked):
    path = write_grid(tmp_path, changed("seeds = [0, 1]", "seeds = [0]"))
    run(path, tmp_path / "out")
    worked.clear()
    (tmp_path / "out/cells/simulated/default/0/additive.csv").write_text("reference,lab")
    run(path, tmp_path / "out")
    assert worked == ["simulated/default/0/additive"]


# -------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(tmp_path, done):
    path = write_grid(tmp_path, changed("diagnostics = false", "diagnostics = true"))
    for workers in (1, 2):
        result = run(path, tmp_path / str(workers), workers=workers)
        # Sums of float32 may differ in the last digit with where the arrays lie.
        pd.testing.assert_frame_equal(
            costless(result.scores), costless(done[1].scores), rtol=1e-5, atol=1e-6
        )


def test_digests_are_not_read_as_numbers(tmp_path, done, monkeypatch):
    benchmark, _, out = done
    copy = shutil.copytree(out, tmp_path / "out")
    like_a_number = "0e45861206506f62"
    for path in copy.rglob("cells/**/*.csv"):
        text = path.read_text().replace(jobs.stored_digest(path), like_a_number)
        path.write_text(text)
    monkeypatch.setattr(jobs, "cell_digest", lambda *_: like_a_number)
    monkeypatch.setattr("cradle_pyro.evaluation.benchmark.cell_digest", lambda *_: like_a_number)
    assert len(gather_benchmark(benchmark, copy).scores) == len(done[1].scores)


def test_a_process_that_is_killed_takes_no_other_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_PRELOADED", ())
    tasks = [FakeTask(tmp_path / name, dies=name == "b") for name in "abc"]
    ended = []
    failures = list(run_tasks(tasks, 2, lambda: ended.append(1)))
    assert [failure.name for failure in failures] == ["b"]
    assert "signal 9 (too little memory?)" in failures[0].reason
    assert len(ended) == 3
    pids = {(tmp_path / name).read_text() for name in "ac"}
    assert len(pids) == 2
    assert str(os.getpid()) not in pids


# -------------------------------------------------------------------------------------- failures


@pytest.fixture
def failing_model(monkeypatch):
    def fail(*_, **__):
        raise TrainingError("the loss is nan\nat step 3")

    monkeypatch.setattr(learned, "fit", fail)


def test_a_cell_that_fails_leaves_its_reason_and_the_others_go_on(tmp_path, failing_model, worked):
    path = write_grid(tmp_path)
    result = run(path, tmp_path / "out")
    names = [f"simulated/default/{seed}/cradle" for seed in (0, 1)]
    assert result.failures == dict.fromkeys(names, "the loss is nan at step 3")
    assert set(result.scores["predictor"]) == {"ceiling", *BASELINES}
    assert result.comparisons.empty
    stored = json.loads((tmp_path / "out/cells/simulated/default/0/cradle.failed.json").read_text())
    assert "TrainingError" in stored["traceback"]
    worked.clear()
    run(path, tmp_path / "out")
    assert worked == names  # tried again, and nothing else
    page = write_benchmark_report(read_benchmark(path), result, tmp_path / "out").read_text()
    assert "the loss is nan at step 3" in page


def test_a_cell_that_worked_leaves_no_old_reason(tmp_path):
    path = write_grid(tmp_path, changed("seeds = [0, 1]", "seeds = [0]"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "fit", lambda *_, **__: 1 / 0)
        result = run(path, tmp_path / "out")
        assert list(result.failures.values()) == ["ZeroDivisionError: division by zero"]
    assert not run(path, tmp_path / "out").failures
    assert not list((tmp_path / "out").rglob("*.failed.json"))


def test_the_command_writes_everything_and_exits_with_one_after_a_failure(
    tmp_path, monkeypatch, capsys
):
    path = write_grid(tmp_path, changed("seeds = [0, 1]", "seeds = [0]"))
    monkeypatch.setattr(
        running, "run_benchmark",
        lambda *a, **k: run_benchmark(*a, **(k | {"workers": 0, "progress": False})),
    )  # fmt: skip
    arguments = ["benchmark", "--config", str(path), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(learned, "fit", lambda *_, **__: 1 / 0)
        assert cli.app(arguments) == 1
        printed = capsys.readouterr()
        assert "simulated/default/0/cradle: ZeroDivisionError" in printed.err
    assert cli.app(arguments) == 0
    tables = ("scores.csv", "labels.csv", "normalised.csv", "comparisons.csv")
    files = (*tables, "report.md", "report.html")
    assert all((tmp_path / "out" / name).is_file() for name in files)
    path.write_text(changed("seeds = [0, 1]", "sedes = [0]"))
    assert cli.app(arguments) == 2
    assert "did you mean 'seeds'" in capsys.readouterr().err


# -------------------------------------------------------------------------------- another program


def test_a_missing_outside_program_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cell_eval", None)
    path = write_grid(tmp_path, changed("diagnostics = false", "cell_eval = [0]"))
    with pytest.raises(DataError, match=r"pip install cell-eval=="):
        read_benchmark(path)


def test_another_program_scores_the_same_cells(tmp_path):
    pytest.importorskip("cell_eval", reason="cell-eval is not installed")
    text = changed("[0, 1]", "[0]", changed("diagnostics", "cell_eval = [0]\ndiagnostics"))
    result = run(write_grid(tmp_path, text), tmp_path / "out")
    outside = result.scores.query("reference == 'cell-eval'")
    assert {"cradle", *BASELINES} <= set(outside["predictor"])
    assert {"pearson_delta", "mae_delta", "overlap_at_N"} <= set(outside["metric"])
    agreement = rank_agreement(result.scores)
    assert set(agreement["screen"]) == {"simulated"}
    assert agreement["spearman"].between(-1, 1).all()
    pooled = result.scores.query("label == '' and predictor != 'ceiling'")
    by_metric = pooled.pivot_table(
        index=["predictor", "labels"], columns=["reference", "metric"], values="value"
    )
    generated, theirs = by_metric["generated"], by_metric["cell-eval"]
    np.testing.assert_allclose(theirs["mae_delta"], np.log(2) * generated["mae"], rtol=1e-4)
    correlation = generated["ate_rho_per_perturbation"]
    np.testing.assert_allclose(theirs["pearson_delta"], correlation, rtol=1e-4)
    of_cells = agreement[agreement["reference"] == "generated"].set_index(["labels", "metric"])
    assert of_cells.loc[("seen", "mae"), "spearman"] == pytest.approx(1)


# ----------------------------------------------------------------------------------------- tuning


TUNED = """
candidates = [["model.n_latents=2"], ["train.learning_rate=0.03"], ["train.batch_size=16"]]
"""


def with_other_test_cells(adata):
    """Return the screen with counts of other cells, and fewer of them, in its test cells."""
    changed, rng = adata.copy(), np.random.default_rng(0)
    rows = np.flatnonzero(changed.obs["split"] == "test")
    counts = changed.layers["counts"].toarray()
    counts[rows] = rng.binomial(counts[rng.permutation(rows)].astype(int), 0.8)
    changed.layers["counts"] = type(adata.layers["counts"])(counts)
    return changed


def split_screen():
    adata = make_screen()
    rng = np.random.default_rng(1)
    adata.obs["split"] = rng.choice(["train", "val", "test"], p=[0.6, 0.2, 0.2], size=adata.n_obs)
    return adata


def test_tuning_never_sees_test_cells(tmp_path):
    text = changed("[0, 1]", "[0]", re.sub("simulate = .*", "path = 'real.h5ad'", GRID)) + TUNED
    text = changed(
        PAIR, "split.method=column", changed("split.method=combinations", "split.key=split", text)
    )
    adata = split_screen()
    found = []
    for name, screen in (("a", adata), ("b", with_other_test_cells(adata))):
        folder = tmp_path / name
        folder.mkdir()
        path = write_grid(folder, text)
        write_h5ad_atomic(screen, folder / "real.h5ad")
        found.append(run(path, folder / "out"))
    first, second = (result.choices for result in found)
    pd.testing.assert_frame_equal(first, second)
    assert first["n_candidates"].tolist() == [3]
    # The scores themselves do see them.
    assert not costless(found[0].scores)["value"].equals(costless(found[1].scores)["value"])


def test_the_candidate_of_highest_density_is_used_for_all_seeds(tmp_path, worked):
    path = write_grid(tmp_path, GRID + TUNED)
    result = run(path, tmp_path / "out")
    folder = tmp_path / "out" / "tuning" / "simulated"
    tried = [json.loads((folder / "cradle" / f"{n}.json").read_text()) for n in range(3)]
    best = max(tried, key=lambda one: one["density"])
    assert result.choices["settings"].tolist() == [best["settings"]]
    assert json.loads((folder / "cradle.json").read_text())["settings"] == best["settings"]
    fixed = GRID + f"settings = {json.dumps(best['settings'])}\n"
    plain = run(write_grid(tmp_path, fixed), tmp_path / "plain")
    pd.testing.assert_frame_equal(costless(plain.scores), costless(result.scores))
    worked.clear()
    run(write_grid(tmp_path, GRID + TUNED), tmp_path / "out")
    assert worked == []


OTHER = """
[[screens]]
name = "fewer"
simulate = { n_cells = 160, n_genes = 60, n_perturbations = 3, n_pairs = 3, control_share = 0.3 }
config = "tiny.toml"
settings = ["split.method=combinations", "PAIR"]
tuned_on = "simulated"
""".replace("PAIR", PAIR)


def test_a_screen_takes_over_what_was_chosen_on_another(tmp_path):
    text = changed("[0, 1]", "[0]", changed("[[predictors]]", OTHER + "\n[[predictors]]") + TUNED)
    result = run(write_grid(tmp_path, text), tmp_path / "out")
    assert result.choices["screen"].tolist() == ["simulated"]
    chosen = result.choices["settings"].iloc[0]
    own = re.sub(r"candidates = .*", f"settings = {json.dumps(chosen)}", text)
    plain = run(write_grid(tmp_path, own), tmp_path / "plain")
    pd.testing.assert_frame_equal(costless(plain.scores), costless(result.scores))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('= "simulated"\n\n', '= "simulatd"\n\n', "no screen that is tuned itself; did you mean"),
        ('= "simulated"\n\n', '= "fewer"\n\n', "no screen that is tuned itself"),
        ("candidates", 'screens = ["fewer"]\ncandidates', "has candidates but is not tried on"),
    ],
)
def test_choices_cannot_come_from_a_screen_without_any(tmp_path, old, new, expected) -> None:
    text = changed("[[predictors]]", OTHER + "\n[[predictors]]") + TUNED
    with pytest.raises(ConfigError, match=expected):
        read_benchmark(write_grid(tmp_path, changed(old, new, text)))


def test_candidates_that_cannot_be_trained_fail_their_cells_alone(tmp_path, failing_model):
    result = run(write_grid(tmp_path, GRID + TUNED), tmp_path / "out")
    assert set(result.failures) == {f"simulated/default/{seed}/cradle" for seed in (0, 1)}
    assert "none of 3 candidates could be judged: the loss is nan" in result.failures.popitem()[1]


# ------------------------------------------------------------------------------ variants of screens


def built(folder: Path, line: str, *, seed: int = 0, text: str = GRID):
    path = write_grid(folder, changed("settings = [", f"{line}\nsettings = [", text))
    benchmark = read_benchmark(path)
    screen = benchmark.screens[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_screen(benchmark, screen, screen.splits[0], seed)


def test_few_training_cells_leave_test_cells_and_controls_as_they_are(tmp_path):
    whole = built(tmp_path, "keep = {}")
    few = built(tmp_path, "keep = { cells_per_perturbation = 6 }")
    for split, most in (("train", 6), ("val", 2)):
        counts = pd.Series(few.data.where(split=split).labels).value_counts()
        assert counts.drop("control").max() == most
        n_controls = (whole.data.where(split=split).labels == "control").sum()
        assert counts["control"] == n_controls
    tests = [set(one.data.where(split="test").obs_names) for one in (whole, few)]
    assert tests[0] == tests[1]
    other = built(tmp_path, "keep = { cells_per_perturbation = 6 }", seed=1)
    assert set(other.data.obs_names) != set(few.data.obs_names)


def test_fewer_training_pairs_are_tested_on_the_same_pairs(tmp_path):
    text = changed("n_perturbations = 3, n_pairs = 3", "n_perturbations = 4, n_pairs = 6")
    trained, tested = [], []
    for share in (0.0, 0.35, 0.65):
        data = built(tmp_path, f"keep = {{ train_pairs = {share} }}", text=text).data
        pairs = {split: {k for k in data.where(split=split).labels if "+" in k}
                 for split in ("train", "val", "test")}  # fmt: skip
        trained.append(pairs["train"])
        tested.append(pairs["test"] - pairs["train"])
        assert pairs["val"] <= pairs["train"]
    assert [len(pairs) for pairs in trained] == [0, 2, 4]
    assert trained[0] < trained[1] < trained[2]
    assert tested[0] == tested[1] == tested[2]
    assert len(tested[0]) == 2


def test_a_screen_judged_on_validation_cells_has_no_test_cells(tmp_path):
    plain = built(tmp_path, "")
    judged = built(tmp_path, 'judged_on = "validation"')
    names = {
        (which, split): set(one.data.where(split=split).obs_names)
        for which, one in (("plain", plain), ("judged", judged))
        for split in ("train", "val", "test")
    }
    assert names["judged", "test"] == names["plain", "val"]
    assert names["judged", "train"] | names["judged", "val"] == names["plain", "train"]
    assert len(names["judged", "val"]) == len(names["plain", "val"])
    held_out = {k for k in plain.data.labels if k not in plain.data.where(split="train").labels}
    assert held_out
    assert not held_out & set(judged.truth.labels)


def test_what_a_screen_is_judged_on_changes_its_digest_only_where_it_is_not_the_test(tmp_path):
    texts = ["", "judged_on = 'test'", "judged_on = 'validation'"]
    digests = []
    for text in texts:
        path = write_grid(tmp_path, changed("settings = [", f"{text}\nsettings = ["))
        benchmark = read_benchmark(path)
        digests.append(jobs.cell_digest(benchmark, next(iter(benchmark.cells())), ()))
    assert digests[0] == digests[1] != digests[2]


def test_artifacts_are_added_to_passing_cells_that_are_learned_from(tmp_path):
    write_h5ad_atomic(make_screen(), tmp_path / "real.h5ad")
    text = re.sub("simulate = .*", "path = 'real.h5ad'", GRID)
    plain = built(tmp_path, "", text=text)
    bad = built(tmp_path, "corrupt = { share = 0.5, kinds = ['low_capture'] }", text=text)
    split = np.asarray(bad.data.split)
    hit = (bad.adata.obs["corruption"] != "none").to_numpy()
    assert np.array_equal(split, np.asarray(plain.data.split))
    assert not hit[split == "test"].any()
    learned_passing = plain.data.passing & (split != "test")
    assert not hit[~learned_passing].any()
    assert hit.sum() == round(0.5 * learned_passing.sum())
    assert (bad.data.library[hit] < plain.data.library[hit]).all()


def test_a_predictor_may_see_other_flags_but_is_judged_by_the_same_cells(tmp_path):
    text = (
        changed("[0, 1]", "[0]")
        + """
[[predictors]]
name = "flags_any"
kind = "cradle"
settings = ["data.artifact=any"]

[[predictors]]
name = "flags_none"
kind = "cradle"
settings = ["data.artifact=none", "objective.counterfactual=none"]
"""
    )
    out = tmp_path / "out"
    path = write_grid(tmp_path, changed("diagnostics = false", "diagnostics = true", text))
    result = run(path, out)
    assert not result.failures
    stored = read_parts(read_benchmark(path), out)
    place = ("simulated", "default", 0)
    for name in ("flags_any", "flags_none"):
        for block in (("cells", "seen"), ("truth", "held_out")):
            ours, other = stored[*place, "cradle", *block], stored[*place, name, *block]
            assert ours.labels == other.labels
            # Number, sum and sum of squares of the reference; sum of the prediction.
            assert np.array_equal(ours.moments[0][:, [0, 2, 4]], other.moments[0][:, [0, 2, 4]])
            assert not np.array_equal(ours.moments[0][:, 1], other.moments[0][:, 1])


# ------------------------------------------------------------------------------------------ page


@pytest.fixture(scope="module")
def page(done, tmp_path_factory):
    benchmark, result, _ = done
    folder = tmp_path_factory.mktemp("page")
    return write_benchmark_report(benchmark, result, folder)


TITLES = (
    "simulated: held-out cells, seen perturbations",
    "simulated: known truth, held-out perturbations",
    "Held-out cells, seen perturbations",
    "Held-out cells, held-out perturbations",
    "Known truth, seen perturbations",
    "Known truth, held-out perturbations",
    "Generated cells, seen perturbations",
    "Generated cells, held-out perturbations",
    "Held-out density and use of the latents",
    "Leakage into draws of z_basal (AUROC; 0.5 is none)",
    "Known truth: cleaned cells, single cells, intervals",
)


def test_the_page_and_the_text_have_every_table(page, done):
    html, text = page.read_text(), page.with_name("report.md").read_text()
    for title in TITLES:
        assert f"<h3>{title}" in html, title
        assert f"### {title}" in text, title
    for title in TITLES[2:6]:
        block = text.split(f"### {title}\n")[1].split("###")[0]
        for name in ("ceiling", "**cradle**", *BASELINES):
            assert f"| {name} |" in block, (title, name)
    value = done[1].scores.query(
        "predictor == 'cradle' and reference == 'truth' and labels == 'seen' and label == '' "
        "and metric == 'ate_rho'"
    )["value"]
    assert f"{value.mean():.3f} ± {value.std():.3f}".replace("-", "−") in text
    assert "Claims need five seeds" in text


def test_the_page_loads_nothing_and_its_figures_are_in_it(page):
    html = page.read_text()
    assert html.count("<svg") == 8
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", html)


@pytest.mark.skipif(chromium() is None, reason="needs Chromium and its driver")
@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_page_fits_a_desk_and_a_telephone(page, tmp_path, width, theme):
    from test_report_browser import opened, show

    with opened(tmp_path / "profile") as window:
        show(window, page, width=width, theme=theme)
        assert window.get_log("browser") == []
        overflow = "return document.documentElement.scrollWidth - window.innerWidth"
        assert window.execute_script(overflow) <= 0


def test_the_stored_grid_can_be_read_back(done):
    benchmark, _, out = done
    stored = json.loads((out / "benchmark.json").read_text())
    assert Benchmark.model_validate(stored).seeds == benchmark.seeds
