"""What is wanted of speed and memory, measured at full size: `pytest -m perf`, on quiet cores.

Every bound is a ratio of two figures of one run; `cradle-pyro benchmark speed` shows them all.
"""

from __future__ import annotations

import pytest

from cradle_pyro.evaluation import speed
from cradle_pyro.evaluation.speed import cases_of
from cradle_pyro.evaluation.timings import NAIVE

pytestmark = pytest.mark.perf


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure a case by its part and name, once."""
    folder = tmp_path_factory.mktemp("screens")
    cases = {(case.part, case.name): case for case in cases_of(folder)}
    known = {}

    def measure(part, name):
        if (part, name) not in known:
            figures = speed._in_a_process(cases[part, name])
            known[part, name] = {figure.figure: figure.value for figure in figures}
        return known[part, name]

    return measure


def test_published_step_is_twelve_times_as_fast(measured):
    assert measured("published step", "side by side")["naive / partner term"] > 12


def test_published_step_takes_a_third_of_the_memory(measured):
    naive, ours = (measured("published memory", name) for name in (NAIVE, "partner term"))
    assert ours["above the imports, GB"] < naive["above the imports, GB"] / 3


@pytest.mark.parametrize("name", ["1000 genes", "5000 genes", "20000 genes"])
def test_generation_at_most_doubles_the_default_step(measured, name):
    assert measured("default step", name)["default / no term"] < 2


def test_step_does_not_grow_with_perturbations_that_no_cell_carries(measured):
    many, few = (measured("default step", f"{n} perturbations") for n in (2000, 100))
    assert many["default, s"] < 1.3 * few["default, s"]


def test_naive_loss_is_reached_thirty_times_as_soon(measured):
    assert measured("time to loss", "demo screen")["naive / ours"] > 30


def test_annotation_and_partners_are_fifty_times_as_fast(measured):
    assert measured("annotation", "100,000 cells")["naive partners of all cells / ours"] > 50


@pytest.mark.parametrize("n_cells", ["50,000", "200,000", "1,000,000"])
def test_screens_on_disk_cost_time_in_proportion_and_memory_within_bounds(measured, n_cells):
    on_disk = measured("screen", f"{n_cells} cells on disk")
    in_memory = measured("screen", "50,000 cells in memory")
    assert on_disk["peak memory, GB"] < 4
    for figure in ("epoch, ms per cell", "query, ms per cell"):
        assert on_disk[figure] < 1.5 * in_memory[figure]
