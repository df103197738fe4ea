"""The speed benchmark measures what it says, at sizes whose numbers mean nothing."""

from __future__ import annotations

import re
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch

from cradle_pyro import cli
from cradle_pyro.data.fields import BackedCounts, read_counts, read_screen
from cradle_pyro.errors import CradleError
from cradle_pyro.evaluation import speed
from cradle_pyro.evaluation.naive import (
    NaiveSettings,
    make_screen,
    median_partners,
    naive_step,
    naive_training,
)
from cradle_pyro.evaluation.speed import Case, cases_of, run_case, run_speed
from cradle_pyro.reporting.speed_page import render_speed, write_speed_report
from cradle_pyro.simulate.large import simulate_large

SMALL = {"n_genes": 60, "n_perturbations": 5}


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """All cases at their small sizes, in this process."""
    folder = tmp_path_factory.mktemp("screens")
    threads = torch.get_num_threads()
    found = [figure for case in cases_of(folder, smoke=True) for figure in run_case(case)]
    torch.set_num_threads(threads)
    return pd.DataFrame(found)


def test_every_part_is_measured(figures):
    assert set(figures["part"]) == set(speed.PARTS)
    assert np.isfinite(figures["value"]).all()
    assert (figures.loc[figures["figure"] != "above the imports, GB", "value"] > 0).all()
    assert not figures.duplicated(["part", "case", "figure"]).any()


def test_ratios_are_to_the_naive_step(figures, tmp_path):
    values = figures[figures["part"] == "published step"].set_index("figure")["value"]
    one_round = values["naive, s"] / values["partner term, s"]
    assert values["naive / partner term"] == pytest.approx(one_round)
    changed = figures.copy()
    changed.loc[changed["figure"] == "partner term, s", "value"] = 0.5
    changed.loc[changed["figure"] == "naive / partner term", "value"] = 12.0
    write_speed_report(changed, tmp_path)
    (row,) = re.findall(r"\| partner term \|(.*)\|", (tmp_path / "speed.md").read_text())
    assert [cell.strip() for cell in row.split("|")][:2] == ["0.5", "12"]


def test_no_share_of_memory_that_was_not_seen(figures, tmp_path):
    """A step so small that the process does not grow has no ratio, and breaks nothing."""
    changed = figures.copy()
    changed.loc[changed["figure"] == "above the imports, GB", "value"] = 0.0
    write_speed_report(changed, tmp_path)
    (row,) = re.findall(r"\| partner term \|(.*)\|", (tmp_path / "speed.md").read_text())
    assert [cell.strip() for cell in row.split("|")][-2:] == ["0", ""]


def test_the_page_shows_every_case(figures, tmp_path):
    page = write_speed_report(figures, tmp_path)
    text = (tmp_path / "speed.md").read_text()
    for case in figures["case"].unique():
        if case not in {"published sizes", "side by side"}:
            assert case in text
    assert page.read_text() == render_speed(figures)
    assert len(re.findall("<svg", page.read_text())) == 5
    assert "nan" not in text


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def measured(case):
        asked.append(case.name)
        if case.part == "roofline":
            raise CradleError("no")
        return [speed.Figure(case.part, case.name, "a, s", 1.0)]

    monkeypatch.setattr(speed, "_in_a_process", measured)
    with pytest.raises(CradleError):
        run_speed(tmp_path, smoke=True)
    n_cases = len(asked)
    with pytest.raises(CradleError):
        run_speed(tmp_path, smoke=True)
    assert len(asked) == n_cases + 1
    assert len(pd.read_csv(tmp_path / "speed.csv")) == n_cases - 1


def test_a_case_runs_in_a_process_of_its_own(tmp_path):
    case = Case(
        "annotation", "a", SMALL | {"n_cells": 50, "naive_cells": 3, "folder": str(tmp_path)}
    )
    found = {figure.figure: figure.value for figure in speed._in_a_process(case)}
    assert 0.05 < found["peak memory, GB"] < 20
    with pytest.raises(CradleError, match=r"'annotation: a' failed: .*n_cells"):
        speed._in_a_process(case._replace(options=SMALL))


def test_the_large_screen_is_sparse_and_the_same_again(tmp_path):
    for name in "ab":
        simulate_large(tmp_path / f"{name}.h5ad", 300, **SMALL, chunk=64)
    first, second = (read_screen(tmp_path / f"{name}.h5ad") for name in "ab")
    assert (first.X != second.X).nnz == 0
    assert first.shape == (300, 60)
    assert set(first.obs["perturbation"]) == {"control", *(f"T{i:04d}" for i in range(5))}
    lazily = read_screen(tmp_path / "a.h5ad", backed=True)
    assert isinstance(read_counts(lazily), BackedCounts)


def test_the_density_of_the_large_screen_is_five_percent(tmp_path):
    simulate_large(tmp_path / "a.h5ad", 200, n_genes=5000, n_perturbations=5)
    counts = read_screen(tmp_path / "a.h5ad").X
    assert 0.03 < counts.nnz / np.prod(counts.shape) < 0.07


def test_the_naive_step_learns():
    torch.manual_seed(0)
    settings = NaiveSettings(
        n_cells=32, n_genes=40, n_perturbations=4, n_latents=4, hidden=8, learning_rate=1e-2
    )
    step = naive_step(settings)
    losses = [step() for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert make_screen(settings).counts.shape == (32, 40)


def test_the_naive_training_learns_and_repeats_itself():
    settings = NaiveSettings(
        n_cells=32, n_genes=40, n_perturbations=4, n_latents=4, hidden=8, learning_rate=1e-2
    )
    torch.manual_seed(0)
    screen = make_screen(settings)
    seconds, losses = zip(*islice(naive_training(screen, screen, settings), 40), strict=True)
    assert np.diff(seconds).min() > 0
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert next(naive_training(screen, screen, settings))[1] == losses[0]


def test_partners_are_medians_of_failing_cells_of_the_label():
    counts = np.array([[0.0, 9.0], [2.0, 1.0], [4.0, 5.0], [7.0, 7.0]])
    labels, failing = np.array(["a", "a", "a", "b"]), np.array([False, True, True, False])
    found = median_partners(counts, labels, failing)
    np.testing.assert_array_equal(found, [[3, 3], [3, 3], [3, 3], [7, 7]])
    many = median_partners(np.arange(100.0)[:, None], np.zeros(100), np.ones(100, bool))
    assert (many == np.median(np.arange(50))).all()


def test_a_gpu_is_asked_about_steps_only(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, found in (("cuda", "found none"), ("mps", "found 'mps'")):
        with pytest.raises(CradleError, match=found):
            run_speed(tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()
    cases = cases_of(tmp_path, device="cuda")
    assert {case.options["device"] for case in cases} == {"cuda"}
    assert {case.part for case in cases} < set(speed.PARTS)


@pytest.mark.gpu
def test_steps_of_a_gpu_are_measured(tmp_path):
    figures = run_speed(tmp_path, smoke=True, device="cuda")
    assert (figures.loc[figures["figure"] == "GPU memory, GB", "value"] > 0).all()
    write_speed_report(figures, tmp_path)


def test_the_command_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    nothing = pd.DataFrame(columns=list(speed.Figure._fields))
    monkeypatch.setattr(speed, "run_speed", lambda *_, **__: nothing)
    assert cli.app(["benchmark", "speed", "--out", str(tmp_path), "--smoke"]) == 0
    assert "speed.html" in capsys.readouterr().out
    assert (tmp_path / "speed.html").exists()


def test_the_grid_still_needs_its_options(capsys):
    assert cli.app(["benchmark", "--out", "x"]) == 2
    assert "--config" in capsys.readouterr().err
