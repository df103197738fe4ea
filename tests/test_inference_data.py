"""Arrays become ArviZ objects: on the ArviZ installed here, on 1.x, and by 1.x's interface."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from cradle_pyro.reporting.inference_data import inference_data

ROOT = Path(__file__).resolve().parents[1]
ARVIZ1 = os.environ.get("CRADLE_ARVIZ1_PYTHON")

COORDS = {
    "genes": ["G0", "G1", "G2"],
    "cells": [f"cell{i}" for i in range(6)],
    "artifacts": ["low_counts", "doublet"],
    "perturbations": [],
}
DIMS = {"counts": ["cells", "genes"], "depth_shift": ["artifacts"], "dispersion": ("genes",)}
ATTRS = {"posterior": {"note": "draws of a guide"}, "log_likelihood": {"particles": 3}}


def make_groups(*, chains: int = 4, draws: int = 100) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = (chains, draws)
    counts = rng.poisson(3.0, size=(*shape, 6, 3)).astype(np.int32)
    return {
        "posterior": {
            "depth_shift": rng.normal(size=(*shape, 2)).astype(np.float32),
            "own": rng.normal(size=(*shape, 5)),
        },
        "prior": {"depth_shift": rng.normal(size=(*shape, 2)).astype(np.float32)},
        "posterior_predictive": {"counts": counts},
        "prior_predictive": {"counts": counts + 1},
        "log_likelihood": {"counts": rng.normal(-20, 0.1, size=(*shape, 6))},
        "observed_data": {"counts": counts[0, 0]},
        "constant_data": {"dispersion": np.ones(3, dtype=np.float32)},
    }


def check_names(result) -> None:
    """Assert that groups, values, names of axes and notes are those that were given."""
    for group, variables in make_groups().items():
        for name, value in variables.items():
            found = result[group][name]
            np.testing.assert_array_equal(found.values, value)
            assert found.dtype == value.dtype
    assert result["posterior"]["depth_shift"].dims == ("chain", "draw", "artifacts")
    assert result["prior"]["depth_shift"].dims == ("chain", "draw", "artifacts")
    assert result["posterior"]["own"].dims == ("chain", "draw", "own_dim_0")
    predictive = result["posterior_predictive"]["counts"]
    assert predictive.dims == ("chain", "draw", "cells", "genes")
    assert list(predictive.coords["cells"].values) == COORDS["cells"]
    assert result["log_likelihood"]["counts"].dims == ("chain", "draw", "cells")
    assert result["observed_data"]["counts"].dims == ("cells", "genes")
    assert list(result["constant_data"]["dispersion"].coords["genes"].values) == COORDS["genes"]
    for group, notes in ATTRS.items():
        assert notes.items() <= result[group].attrs.items()


def test_installed_arviz_has_the_names_and_values() -> None:
    check_names(inference_data(make_groups(), coords=COORDS, dims=DIMS, attrs=ATTRS))


def test_result_is_what_the_installed_arviz_works_on() -> None:
    import arviz
    import xarray

    result = inference_data(make_groups(), coords=COORDS, dims=DIMS)
    is_tree = int(arviz.__version__.split(".")[0]) >= 1
    assert isinstance(result, xarray.DataTree if is_tree else arviz.InferenceData)


def make_arviz1(calls: list[dict]) -> types.ModuleType:
    """Return a module with the documented signature of ``arviz.from_dict`` 1.x."""

    def from_dict(
        data, *, name=None, sample_dims=None, save_warmup=None, index_origin=None, coords=None,
        dims=None, pred_dims=None, pred_coords=None, check_conventions=True, attrs=None,
    ):  # fmt: skip
        calls.append({"data": data, "coords": coords, "dims": dims})
        return {group: types.SimpleNamespace(attrs={}) for group in data}

    module = types.ModuleType("arviz")
    module.__version__ = "1.2.0"
    module.from_dict = from_dict
    return module


def test_arviz_1_is_called_by_its_dictionary_interface(monkeypatch) -> None:
    calls: list[dict] = []
    monkeypatch.setitem(sys.modules, "arviz", make_arviz1(calls))
    groups = make_groups()
    result = inference_data(groups, coords=COORDS, dims=DIMS, attrs=ATTRS)
    (call,) = calls
    assert {group: list(of) for group, of in call["data"].items()} == {
        group: list(of) for group, of in groups.items()
    }
    for group, variables in groups.items():
        for name, value in variables.items():
            assert call["data"][group][name] is value
    assert call["coords"] == COORDS
    assert call["dims"] == {name: list(axes) for name, axes in DIMS.items()}
    assert {group: result[group].attrs for group in ATTRS} == ATTRS


def test_arrays_and_names_are_left_as_they_were() -> None:
    groups, coords, dims = make_groups(), dict(COORDS), dict(DIMS)
    inference_data(groups, coords=coords, dims=dims, attrs=ATTRS)
    assert coords == COORDS
    assert dims == DIMS
    assert list(groups) == list(make_groups())


def test_module_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'pyro', 'pandas', 'arviz'])); "
        "import cradle_pyro.reporting.inference_data"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


WORK = """
import warnings
import matplotlib
matplotlib.use("Agg")
import arviz as az
import xarray as xr

assert int(az.__version__.split(".")[0]) >= 1, az.__version__
warnings.simplefilter("error")
result = inference_data(make_groups(), coords=COORDS, dims=DIMS, attrs=ATTRS)
check_names(result)
assert isinstance(result, xr.DataTree)
table = az.summary(result, round_to=6)
assert len(table) == 7 and table["r_hat"].astype(float).between(0.9, 1.1).all()
loos = [az.loo(result, pointwise=True, reff=1.0), az.loo(result, pointwise=True)]
assert abs(loos[0].elpd + 120) < 2
assert len(az.compare({"a": loos[0], "b": loos[1]})) == 2
az.plot_forest(result)
az.plot_rank(result)
az.plot_ppc_dist(result, kind="ecdf")
az.plot_prior_posterior(result, var_names=["depth_shift"])
az.plot_khat(loos[0])
both = xr.concat([result["posterior"].to_dataset()] * 2, "chain")
assert both.sizes["chain"] == 8
"""


@pytest.mark.skipif(ARVIZ1 is None, reason="set CRADLE_ARVIZ1_PYTHON to a Python with ArviZ 1.x")
def test_arviz_1_summarises_compares_and_plots_without_a_warning() -> None:
    names = {"COORDS": COORDS, "DIMS": DIMS, "ATTRS": ATTRS}
    code = "\n".join([
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "import numpy as np",
        "from cradle_pyro.reporting.inference_data import inference_data",
        *(f"{name} = {value!r}" for name, value in names.items()),
        inspect.getsource(make_groups),
        inspect.getsource(check_names),
        WORK,
    ])  # fmt: skip
    ran = subprocess.run([ARVIZ1, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
