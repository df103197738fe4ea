"""cell-eval as an outside scorer, and this package's metrics against its own."""

from __future__ import annotations

import importlib.util

import anndata
import numpy as np
import pandas as pd
import pytest

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation import outside
from cradle_pyro.evaluation.cell_metrics import de_direction, de_overlap, differential_genes
from cradle_pyro.evaluation.metrics import (
    ate_correlation_per_perturbation,
    mae,
    perturbation_discrimination,
)
from cradle_pyro.evaluation.outside import cell_eval_scores
from cradle_pyro.evaluation.reference import group_effects

N_LABELS, N_GENES, N_CELLS = 8, 50, 60

needs_cell_eval = [
    pytest.mark.skipif(
        importlib.util.find_spec("cell_eval") is None,
        reason=f"needs the outside scorer: pip install {outside.CELL_EVAL}",
    ),
    # Of polars, pdex and cell-eval, not of this package.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


class Cells:
    """Counts of a screen, as arrays and as the AnnData that cell-eval reads."""

    def __init__(self, seed: int, fold: np.ndarray) -> None:
        rng = np.random.default_rng(seed)
        base = np.exp(np.random.default_rng(99).normal(1.0, 0.7, N_GENES))
        rate = np.vstack([base, base * fold])
        rate /= rate.sum(axis=1, keepdims=True)
        label = np.repeat(np.arange(N_LABELS + 1), N_CELLS)
        self.library = rng.integers(150, 400, len(label)).astype(float)
        self.counts = rng.poisson(self.library[:, None] * rate[label])
        self.control = np.flatnonzero(label == 0)
        self.groups = {f"P{i}": np.flatnonzero(label == i) for i in range(1, N_LABELS + 1)}
        names = np.array(["control", *self.groups])[label]
        self.adata = anndata.AnnData(
            np.log1p(1e4 * self.counts / self.library[:, None]),
            obs=pd.DataFrame({"guide": names}, index=[f"c{i}" for i in range(len(label))]),
            var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]),
        )

    @property
    def arrays(self):
        return self.counts, self.library, self.groups, self.control

    def effects(self) -> np.ndarray:
        return group_effects(*self.arrays, functional="mean_log")


@pytest.fixture(scope="module")
def screen() -> tuple[Cells, Cells]:
    """Predicted and real cells; the prediction is related to the truth, not equal to it."""
    rng = np.random.default_rng(0)
    log_fold = rng.normal(size=(N_LABELS, N_GENES)) * (rng.random((N_LABELS, N_GENES)) < 0.3)
    wrong = 0.5 * log_fold + rng.normal(0, 0.35, log_fold.shape)
    return Cells(1, np.exp(wrong)), Cells(2, np.exp(log_fold))


@pytest.fixture(scope="module")
def theirs(screen) -> dict[str, float]:
    predicted, real = screen
    return cell_eval_scores(
        predicted.adata, real.adata, perturbation_key="guide", control="control"
    )


# -------------------------------------------------------------------------------- against cell-eval


class TestAgainstCellEval:
    pytestmark = needs_cell_eval

    def test_effects_score_as_in_cell_eval(self, screen, theirs):
        predicted, real = (cells.effects() for cells in screen)
        rho = ate_correlation_per_perturbation(predicted, real).mean()
        assert theirs["pearson_delta"] == pytest.approx(rho, abs=1e-6)
        assert theirs["mae_delta"] == pytest.approx(mae(predicted, real) * np.log(2), abs=1e-6)
        assert theirs["mae"] != pytest.approx(theirs["mae_delta"], rel=0.01)

    def test_discrimination_is_the_same_rank_on_another_scale(self, screen, theirs):
        predicted, real = (cells.effects() for cells in screen)
        ours = perturbation_discrimination(predicted, real).mean()
        expected = 1 - (1 - ours) * (N_LABELS - 1) / N_LABELS
        assert theirs["discrimination_score_l1"] == pytest.approx(expected, abs=1e-9)
        assert 0.5 < ours < 1  # ranks differ, or the comparison shows nothing

    def test_p_values_are_those_of_cell_eval(self, screen):
        from pdex import pdex

        _, real = screen
        ours = differential_genes(*real.arrays)
        table = pdex(
            real.adata.copy(), groupby="guide", reference="control", mode="ref",
            is_log1p=True, threads=1,
        ).to_pandas()  # fmt: skip
        wide = table.pivot(index="target", columns="feature", values="fdr")
        wide = wide.loc[list(real.groups), real.adata.var_names]
        np.testing.assert_allclose(ours.p_adjusted, wide.to_numpy(), rtol=1e-6)

    def test_direction_is_that_of_cell_eval(self, screen, theirs):
        predicted, real = (differential_genes(*cells.arrays) for cells in screen)
        ours = np.nanmean(de_direction(predicted, real))
        assert theirs["de_direction_match"] == pytest.approx(ours, abs=1e-6)
        assert 0.5 < ours < 1

    def test_overlap_is_that_of_cell_eval_given_its_fold_changes(self, screen, theirs):
        found = []
        for cells in screen:
            genes = differential_genes(*cells.arrays)
            value = np.log1p(1e4 * cells.counts / cells.library[:, None])
            mean = [value[rows].mean(0) for rows in (cells.control, *cells.groups.values())]
            ratio = np.expm1(np.array(mean))
            found.append(genes._replace(change=np.log2(ratio[1:] / ratio[0])))
        predicted, real = found
        assert (predicted.significant.sum(1) > real.significant.sum(1)).any()
        overlap = de_overlap(predicted, real)
        assert np.isfinite(overlap).all()  # else cell-eval would count zeros
        assert theirs["overlap_at_N"] == pytest.approx(overlap.mean(), abs=1e-6)
        assert 0 < overlap.mean() < 1

    def test_cells_are_not_changed_and_nothing_is_left_behind(self, screen, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        predicted, real = (
            anndata.AnnData(cells.counts.astype(np.float32), cells.adata.obs, cells.adata.var)
            for cells in screen
        )
        before = predicted.X.copy(), real.X.copy()
        scores = cell_eval_scores(
            predicted, real, perturbation_key="guide", control="control", profile="vcc"
        )
        assert set(scores) == {"mae", "discrimination_score_l1", "overlap_at_N"}
        np.testing.assert_array_equal(predicted.X, before[0])
        np.testing.assert_array_equal(real.X, before[1])
        assert list(tmp_path.iterdir()) == []

    def test_the_real_cells_are_a_perfect_prediction(self, screen):
        _, real = screen
        scores = cell_eval_scores(
            real.adata, real.adata, perturbation_key="guide", control="control", profile="minimal"
        )
        best = ("pearson_delta", "discrimination_score_l1", "overlap_at_N", "precision_at_N")
        assert {name: scores[name] for name in best} == pytest.approx(dict.fromkeys(best, 1.0))
        assert scores["mae"] == 0


# -------------------------------------------------------------------------------- without cell-eval


def test_without_cell_eval_the_error_says_what_to_install(screen, monkeypatch):
    predicted, real = screen

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(outside, "import_module", absent)
    with pytest.raises(DataError, match=r"pip install cell-eval==0\.8\.2"):
        cell_eval_scores(predicted.adata, real.adata, perturbation_key="guide", control="control")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells[:, 1:], "same genes"),
        (lambda cells: cells[:, ::-1], "same genes"),
        (lambda cells: cells[cells.obs["guide"] != "control"], "need controls 'control'"),
        (lambda cells: cells[cells.obs["guide"] != "P3"], "one side only has 'P3'"),
        (lambda cells: anndata.AnnData(cells.X, var=cells.var), "column 'guide'"),
    ],
)
def test_cells_that_do_not_fit_are_refused(screen, monkeypatch, change, message):
    def never(**_):
        pytest.fail("cell-eval was started")

    monkeypatch.setattr(outside, "_cell_eval", lambda: never)
    predicted, real = screen
    with pytest.raises(DataError, match=message):
        cell_eval_scores(
            change(predicted.adata), real.adata, perturbation_key="guide", control="control"
        )
