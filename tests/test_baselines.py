"""Simple predictors: one contract for all, oracles for the shrinkage, laws of the sums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from scipy import integrate, sparse, stats

import cradle_pyro as cp
from cradle_pyro.baselines.predictor import Depth, GenerativePredictor, Predictor
from cradle_pyro.baselines.shrinkage import posterior_moments, shrink
from cradle_pyro.baselines.simple import (
    Additive,
    EmpiricalBayes,
    GlobalMean,
    NoChange,
    TrainingMean,
    default_baselines,
    effect_standard_errors,
)
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.groups import (
    cell_groups,
    group_moments,
    label_groups,
    log2_fraction,
    marginal_groups,
)
from cradle_pyro.errors import DataError, QueryError
from cradle_pyro.evaluation.metrics import ate_correlation, rmse
from cradle_pyro.evaluation.reference import group_effects
from cradle_pyro.types import Schema


@dataclass(frozen=True)
class Cells:
    """The part of CellData that predictors read."""

    schema: Schema
    counts: sparse.csr_array
    perturbation: sparse.csr_array
    library: np.ndarray
    labels: np.ndarray
    failing: np.ndarray
    values: str = "counts"
    split: None = None

    @property
    def n_cells(self) -> int:
        return len(self.library)

    @property
    def passing(self) -> np.ndarray:
        return ~self.failing

    def subset(self, rows: np.ndarray) -> Cells:
        return replace(
            self,
            **{
                name: getattr(self, name)[rows]
                for name in ("counts", "perturbation", "library", "labels", "failing")
            },
        )


@dataclass(frozen=True)
class Screen:
    """Cells and the truth behind them."""

    cells: Cells
    truth: dict[str, np.ndarray]

    def true(self, labels: list[str]) -> np.ndarray:
        return np.stack([self.truth[label] for label in labels])


def make_screen(
    seed: int = 0, *, n_genes: int = 200, n_targets: int = 10, cells_per_label: int = 60,
    density: float = 0.05,
) -> Screen:  # fmt: skip
    """Gamma-Poisson counts under sparse additive log-fold changes; a fifth of the cells fail."""
    rng = np.random.default_rng(seed)
    names = [f"T{i}" for i in range(n_targets)]
    combos = [(i,) for i in range(n_targets)] + [(0, 1), (1, 2), (2, 3), (0, 4)]
    code = np.concatenate([np.full(200, -1), np.repeat(np.arange(len(combos)), cells_per_label)])
    base = rng.normal(0.0, 1.5, n_genes)
    effect = rng.normal(0.0, 1.0, (n_targets, n_genes)) * (
        rng.random((n_targets, n_genes)) < density
    )
    multi = np.zeros((len(combos), n_targets))
    for row, combo in enumerate(combos):
        multi[row, list(combo)] = 1
    design = np.where(code[:, None] >= 0, multi[code], 0.0)
    profile = np.exp(base + design @ effect)
    profile /= profile.sum(axis=1, keepdims=True)
    library = np.exp(rng.normal(7.0, 0.4, len(code)))
    mean = library[:, None] * profile
    failing = rng.random(len(code)) < 0.2
    mean[np.ix_(failing, np.arange(5))] *= 8.0
    counts = rng.poisson(mean * rng.gamma(4.0, 0.25, mean.shape)).astype(np.float32)
    labels = np.array(["control" if c < 0 else "+".join(names[i] for i in combos[c]) for c in code])
    value = {c: np.log2(1 + 1e4 * profile[code == c][0]) for c in range(-1, len(combos))}
    truth = {
        "+".join(names[i] for i in combo): value[c] - value[-1] for c, combo in enumerate(combos)
    }
    schema = Schema(genes=tuple(f"G{i}" for i in range(n_genes)), perturbations=tuple(names))
    cells = Cells(
        schema=schema,
        counts=sparse.csr_array(counts),
        perturbation=sparse.csr_array(design.astype(np.float32)),
        library=counts.sum(axis=1) + 1.0,
        labels=labels,
        failing=failing,
    )
    return Screen(cells, truth)


def make_mixture(seed: int, *, shape: tuple[int, int] = (12, 400)) -> tuple[np.ndarray, ...]:
    """True sparse effects, their observation with unequal noise, and the noise's sd."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0.0, 1.0, shape) * (rng.random(shape) < 0.1)
    errors = rng.gamma(4.0, 0.1, shape) + 0.05
    return truth, truth + rng.normal(size=shape) * errors, errors


# --- contract of every predictor ----------------------------------------------------------------


def depth_of(functional: str, labels: list[str] | None = None) -> Depth | None:
    """What asks a predictor for a functional; the depth itself does not matter to tables."""
    one = np.array([1000.0])
    return None if functional == "log_mean" else Depth([one] * len(labels or []), one)


@pytest.mark.parametrize("functional", ["log_mean", "mean_log"])
@pytest.mark.parametrize("grouping", ["label", "marginal"])
@pytest.mark.parametrize("position", range(6))
def test_predictor_contract(position: int, functional: str, grouping: str) -> None:
    screen = make_screen(n_genes=40, n_targets=6, cells_per_label=10)
    predictor = default_baselines(grouping)[position]
    assert isinstance(predictor, Predictor)
    assert not hasattr(predictor, "predict")
    fitted = predictor.fit(screen.cells)
    assert isinstance(fitted, GenerativePredictor)
    assert fitted.name == predictor.name
    labels = ["T1", "T0+T1", "control", "T3+T4", "T0+T4+T5"]
    depth = depth_of(functional)
    effects = fitted.predict(labels, depth)
    assert effects.shape == (5, 40)
    assert np.isfinite(effects).all()
    np.testing.assert_array_equal(effects[2], 0.0)
    np.testing.assert_array_equal(fitted.predict(labels[::-1], depth), effects[::-1])
    np.testing.assert_array_equal(fitted.predict(["T1+T0"], depth), effects[1:2])
    assert fitted.predict([], depth).shape == (0, 40)
    with pytest.raises(QueryError, match="did you mean 'T1'"):
        fitted.predict(["T1+t1x"], depth)


@pytest.mark.parametrize("position", range(6))
def test_generated_cells_have_the_predicted_profile_and_the_cells_noise(position: int) -> None:
    cells = make_screen(n_genes=40, n_targets=6, cells_per_label=60, density=0.3).cells
    predictor = default_baselines()[position]
    passing = predictor.cells == "passing"
    fitted = predictor.fit(cells)
    labels, library = ["control", "T1", "T0+T1"], 1e4
    drawn = fitted.generate(np.repeat(labels, 4000), np.full(12_000, library), seed=1)
    assert (drawn == np.round(drawn)).all()
    drawn = drawn.reshape(3, 4000, 40)
    profile = log2_fraction(drawn.mean(1) / library)
    expected = fitted.predict(labels)
    np.testing.assert_allclose(profile - profile[0], expected, atol=0.15)
    groups = label_groups(cells, passing=passing)
    moments = group_moments(cells.counts, cells.library, groups)
    control = moments.fraction[moments.row("control")]
    np.testing.assert_allclose(drawn[0].mean(0) / library, control, rtol=0.1, atol=1e-4)
    # Gamma-Poisson with shape 4: a squared coefficient of variation of 0.25 beyond Poisson noise.
    variation = (drawn[0].var(0) - drawn[0].mean(0)) / drawn[0].mean(0) ** 2
    assert np.median(variation[control > 1e-3]) == pytest.approx(0.25, abs=0.08)
    np.testing.assert_array_equal(
        fitted.generate(["T1"] * 5, np.full(5, library), seed=3),
        fitted.generate(["T1"] * 5, np.full(5, library), seed=3),
    )


@pytest.mark.parametrize("position", range(6))
def test_only_training_cells_are_learned_from(position: int) -> None:
    adata = cp.simulate_perturbseq(n_cells=300, n_genes=40, n_perturbations=3, n_pairs=1, seed=0)
    data = CellData.from_anndata(adata, layer="counts", artifact="none")
    split = np.where(np.arange(data.n_cells) % 2, "train", "test")
    split[:10] = "val"
    one = default_baselines()[position].fit(data.with_split(split))
    other = default_baselines()[position].fit(data.subset(split == "train"))
    labels = list(np.unique(data.labels))
    np.testing.assert_array_equal(one.predict(labels), other.predict(labels))


def test_names_of_the_default_baselines_are_distinct() -> None:
    names = [predictor.name for predictor in default_baselines()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("predictor", [TrainingMean(), EmpiricalBayes(), GlobalMean()])
def test_permuting_cells_and_genes_permutes_predictions(predictor: Predictor) -> None:
    cells = make_screen(n_genes=50).cells
    rng = np.random.default_rng(0)
    order, genes = rng.permutation(cells.n_cells), rng.permutation(50)
    shuffled = cells.subset(order)
    schema = replace(cells.schema, genes=tuple(np.array(cells.schema.genes)[genes]))
    shuffled = replace(shuffled, schema=schema, counts=shuffled.counts[:, genes])
    labels = ["T0", "T0+T1", "T5+T6"]
    np.testing.assert_allclose(
        predictor.fit(shuffled).predict(labels),
        predictor.fit(cells).predict(labels)[:, genes],
        atol=1e-8,
    )


# --- raw means and sums -------------------------------------------------------------------------


def test_training_mean_is_the_effect_of_the_chosen_cells() -> None:
    cells = make_screen().cells
    for which, kept in (("all", np.ones(cells.n_cells, bool)), ("passing", ~cells.failing)):
        for functional in ("log_mean", "mean_log"):
            rows = np.flatnonzero((cells.labels == "T0+T1") & kept)
            control = np.flatnonzero((cells.labels == "control") & kept)
            expected = group_effects(
                cells.counts, cells.library, {"x": rows}, control, functional=functional
            )
            found = TrainingMean(cells=which).fit(cells).predict(["T0+T1"], depth_of(functional))
            np.testing.assert_allclose(found, expected, atol=1e-10)


def test_unseen_pairs_are_sums_of_singles_and_take_what_is_there() -> None:
    cells = make_screen().cells
    cells = cells.subset(np.flatnonzero(cells.labels != "T3"))
    for predictor in (TrainingMean(), EmpiricalBayes(), Additive()):
        fitted = predictor.fit(cells)
        single = dict(zip(("T5", "T6"), fitted.predict(["T5", "T6"]), strict=True))
        np.testing.assert_allclose(
            fitted.predict(["T5+T6", "T3+T5"]), [single["T5"] + single["T6"], single["T5"]]
        )
        np.testing.assert_array_equal(fitted.predict(["T3"]), 0.0)


def test_additive_ignores_the_cells_of_the_pair() -> None:
    cells = make_screen().cells
    singles = TrainingMean().fit(cells).predict(["T0", "T1"])
    np.testing.assert_allclose(Additive().fit(cells).predict(["T0+T1"])[0], singles.sum(axis=0))
    assert not np.allclose(TrainingMean().fit(cells).predict(["T0+T1"])[0], singles.sum(axis=0))


def test_global_mean_is_the_mean_of_the_training_effects() -> None:
    cells = make_screen().cells
    labels = sorted(set(cells.labels) - {"control"})
    expected = TrainingMean().fit(cells).predict(labels).mean(axis=0)
    np.testing.assert_allclose(
        GlobalMean().fit(cells).predict(["T0", "T8+T9"]), [expected, expected]
    )
    np.testing.assert_array_equal(NoChange().fit(cells).predict(["T0"]), 0.0)


def test_passing_cells_recover_what_the_artifact_moved() -> None:
    screen = make_screen()
    passing = TrainingMean(cells="passing").fit(screen.cells)
    groups = label_groups(screen.cells, passing=True)
    assert all(not screen.cells.failing[rows].any() for rows in groups.values())
    assert ate_correlation(passing.predict(["T0"]), screen.true(["T0"])) > 0.5


@pytest.mark.parametrize("position", range(6))
def test_controls_alone_predict_no_change(position: int) -> None:
    cells = make_screen(n_genes=20, n_targets=6, cells_per_label=5).cells
    fitted = default_baselines()[position].fit(
        cells.subset(np.flatnonzero(cells.labels == "control"))
    )
    np.testing.assert_array_equal(fitted.predict(["T0", "T0+T1"]), 0.0)


# --- groups -------------------------------------------------------------------------------------


def test_label_groups_partition_the_cells_and_marginal_groups_overlap() -> None:
    cells = make_screen().cells
    groups = label_groups(cells)
    rows = np.sort(np.concatenate(list(groups.values())))
    np.testing.assert_array_equal(rows, np.arange(cells.n_cells))
    marginal = marginal_groups(cells)
    for name in cells.schema.perturbations:
        carries = np.array([name in label.split("+") for label in cells.labels])
        np.testing.assert_array_equal(marginal[name], np.flatnonzero(carries))
    np.testing.assert_array_equal(marginal["control"], np.flatnonzero(cells.labels == "control"))


def test_small_groups_are_left_out_but_the_control_stays() -> None:
    cells = make_screen().cells
    kept = np.flatnonzero((cells.labels != "T0") & (cells.labels != "control"))
    few = np.concatenate([kept, np.flatnonzero(cells.labels == "T0")[:3], [0]])
    small = cells.subset(np.sort(few))
    groups = label_groups(small, min_cells=5)
    assert "T0" not in groups
    assert len(groups["control"]) == 1


def test_missing_controls_and_wrong_options_are_errors() -> None:
    cells = make_screen().cells
    with pytest.raises(DataError, match="control cells"):
        TrainingMean().fit(cells.subset(np.flatnonzero(cells.labels != "control")))
    with pytest.raises(DataError, match="grouping"):
        cell_groups(cells, "labels")
    moments = group_moments(cells.counts, cells.library, label_groups(cells))
    with pytest.raises(DataError, match="functional"):
        moments.value("mean")
    with pytest.raises(DataError, match="'all' or 'passing'"):
        TrainingMean(cells="failing").fit(cells)


def test_mistake_08_reference_and_fit_see_only_the_cells_they_are_given() -> None:
    """The published reference effects contained training cells."""
    cells = make_screen().cells
    test = np.random.default_rng(0).random(cells.n_cells) < 0.3
    rows = {"T0": np.flatnonzero((cells.labels == "T0") & test)}
    control = np.flatnonzero((cells.labels == "control") & test)
    before = group_effects(cells.counts, cells.library, rows, control)
    dense = cells.counts.toarray()
    dense[~test] += 100.0
    spoiled = replace(cells, counts=sparse.csr_array(dense))
    np.testing.assert_array_equal(
        group_effects(spoiled.counts, cells.library, rows, control), before
    )
    training = np.flatnonzero(~test)
    assert not np.allclose(
        TrainingMean().fit(spoiled.subset(training)).predict(["T0"]),
        TrainingMean().fit(cells.subset(training)).predict(["T0"]),
    )


def make_anndata(screen: Screen) -> AnnData:
    cells = screen.cells
    obs = pd.DataFrame(
        {"perturbation": cells.labels, "cradle_artifact": cells.failing},
        index=[f"cell{i}" for i in range(cells.n_cells)],
    )
    var = pd.DataFrame(index=list(cells.schema.genes))
    return AnnData(sparse.csr_matrix(cells.counts), obs=obs, var=var)


@pytest.mark.filterwarnings("ignore::cradle_pyro.errors.DataWarning")
def test_cell_data_in_memory_and_on_disk_give_the_same_predictions(tmp_path: Path) -> None:
    screen = make_screen(n_genes=30, n_targets=6, cells_per_label=15)
    adata = make_anndata(screen)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = read_h5ad(tmp_path / "screen.h5ad", backed="r")
    options = {"artifact": "any", "artifact_keys": ["cradle_artifact"]}
    order = np.random.default_rng(0).permutation(adata.n_obs)[:-20]
    labels = ["T0", "T0+T1", "T4+T5"]
    expected = TrainingMean().fit(screen.cells.subset(order))
    for source in (adata, backed):
        data = CellData.from_anndata(source, **options)
        library = screen.cells.library[order]
        fitted = TrainingMean().fit(replace(data.subset(order), library=library))
        np.testing.assert_allclose(fitted.predict(labels), expected.predict(labels), atol=1e-5)
        groups = marginal_groups(data)
        np.testing.assert_array_equal(groups["T0"], marginal_groups(screen.cells)["T0"])
    backed.file.close()


def test_a_dosage_stored_as_zero_is_no_dosage() -> None:
    cells = make_screen().cells
    design = sparse.csr_array(cells.perturbation, copy=True)
    design.data[:5] = 0.0
    assert len(marginal_groups(cells)["control"]) > 0
    marginal = marginal_groups(replace(cells, perturbation=design))
    assert len(marginal["control"]) == len(marginal_groups(cells)["control"]) + 5


# --- empirical Bayes ----------------------------------------------------------------------------


def test_posterior_under_a_known_prior_equals_numerical_integration() -> None:
    effects = np.array([[-1.3, 0.05, 0.8], [2.5, 0.0, -0.2]])
    errors = np.array([[0.5, 0.2, 0.9], [1.0, 0.3, 0.1]])
    weights, sds, scale = np.array([0.7, 0.2, 0.1]), np.array([0.3, 1.5]), np.array([1.0, 0.5, 0.8])
    result = posterior_moments(effects, errors, sds, weights, scale=scale)
    for (row, gene), value in np.ndenumerate(effects):

        def density(theta: float, row: int = row, gene: int = gene, value: float = value) -> float:
            slab = weights[1:] @ stats.norm.pdf(theta, scale=sds * scale[gene])
            return slab * stats.norm.pdf(value, theta, errors[row, gene])

        spike = weights[0] * stats.norm.pdf(value, 0.0, errors[row, gene])
        moments = [
            integrate.quad(lambda t, k=k: t**k * density(t), -12, 12, points=[0, value], limit=200)
            for k in range(3)
        ]
        mass, first, second = (moment[0] for moment in moments)
        mean = first / (spike + mass)
        assert result.mean[row, gene] == pytest.approx(mean, abs=1e-6)
        assert result.sd[row, gene] == pytest.approx(
            np.sqrt(second / (spike + mass) - mean**2), abs=1e-6
        )
        assert result.null_probability[row, gene] == pytest.approx(spike / (spike + mass))


def test_fitted_prior_is_close_to_the_oracle_and_beats_the_raw_effects() -> None:
    truth, observed, errors = make_mixture(0)
    fitted = shrink(observed, errors)
    oracle = posterior_moments(observed, errors, np.array([1.0]), np.array([0.9, 0.1]))
    assert rmse(fitted.mean, truth) < 1.03 * rmse(oracle.mean, truth)
    assert rmse(fitted.mean, truth) < 0.6 * rmse(observed, truth)
    assert fitted.weights.sum(axis=1) == pytest.approx(np.ones(len(truth)))


def test_em_never_lowers_the_marginal_likelihood() -> None:
    _, observed, errors = make_mixture(1)
    grid = np.array([0.1, 0.3, 1.0, 3.0])
    likelihood = [
        shrink(
            observed, errors, slab_sds=grid, n_iterations=steps, pseudo_entries=np.inf
        ).log_likelihood
        for steps in (1, 2, 5, 20, 100)
    ]
    assert (np.diff(likelihood) > -1e-9).all()


def test_shrinkage_moves_towards_zero_and_keeps_the_order_of_equals() -> None:
    _, observed, _ = make_mixture(2)
    result = shrink(observed, np.full(observed.shape, 0.4), pseudo_entries=np.inf)
    assert (np.abs(result.mean) <= np.abs(observed)).all()
    assert (np.sign(result.mean) * np.sign(observed) >= 0).all()
    order = np.argsort(observed.ravel())
    assert (np.diff(result.mean.ravel()[order]) >= -1e-12).all()


def test_pure_noise_is_shrunken_away_and_strong_effects_are_kept() -> None:
    rng = np.random.default_rng(3)
    noise = shrink(rng.normal(size=(10, 500)), np.ones((10, 500)))
    assert np.sqrt(np.mean(noise.mean**2)) < 0.1
    strong = rng.normal(scale=50.0, size=(10, 500))
    kept = shrink(strong + rng.normal(size=strong.shape), np.ones(strong.shape))
    assert rmse(kept.mean, strong) < 1.02


def test_labels_get_their_own_sparsity() -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(0, 1.0, (2, 2000)) * (rng.random((2, 2000)) < np.array([[0.5], [0.01]]))
    observed = truth + rng.normal(0, 0.5, truth.shape)
    own = shrink(observed, np.full(truth.shape, 0.5))
    pooled = shrink(observed, np.full(truth.shape, 0.5), pseudo_entries=np.inf)
    assert own.weights[0, 0] < own.weights[1, 0]
    assert rmse(own.mean, truth) < rmse(pooled.mean, truth)


def test_shared_control_noise_under_a_normal_prior_equals_the_joint_gaussian_posterior() -> None:
    rng = np.random.default_rng(5)
    effects, errors = rng.normal(size=(6, 4)), rng.gamma(4.0, 0.1, (6, 4)) + 0.1
    control, prior = np.array([0.1, 0.5, 1.0, 0.0]), 0.7
    result = posterior_moments(
        effects, errors, np.array([prior]), np.array([0.0, 1.0]), control_errors=control
    )
    evidence = 0.0
    for gene in range(4):
        noise = np.diag(errors[:, gene] ** 2) + control[gene] ** 2
        gain = prior**2 * np.linalg.inv(noise + prior**2 * np.eye(6))
        np.testing.assert_allclose(result.mean[:, gene], gain @ effects[:, gene], atol=1e-5)
        spread = np.sqrt(np.diag(prior**2 * (np.eye(6) - gain)))
        np.testing.assert_allclose(result.sd[:, gene], spread, atol=1e-5)
        evidence += stats.multivariate_normal.logpdf(
            effects[:, gene], cov=noise + prior**2 * np.eye(6)
        )
    assert result.log_likelihood == pytest.approx(evidence, abs=1e-4)


def test_shared_control_noise_under_a_sparse_prior_equals_numerical_integration() -> None:
    effects, errors = np.array([[0.9], [1.1], [-2.0]]), np.array([[0.4], [0.3], [0.5]])
    weights, sds, control = np.array([0.6, 0.3, 0.1]), np.array([0.5, 2.0]), 0.8
    result = posterior_moments(effects, errors, sds, weights, control_errors=np.array([control]))
    shifts = np.linspace(-6 * control, 6 * control, 4001)
    mass = stats.norm.pdf(shifts, scale=control)
    parts = []
    for value, error in zip(effects[:, 0], errors[:, 0], strict=True):
        spread = np.sqrt(error**2 + np.append(0.0, sds) ** 2)
        density = weights[:, None] * stats.norm.pdf(value + shifts, scale=spread[:, None])
        gain = np.append(0.0, sds) ** 2 / spread**2
        parts.append((gain @ density * (value + shifts) / density.sum(axis=0), density.sum(axis=0)))
    mass *= np.prod([density for _, density in parts], axis=0)
    expected = [(mass * mean).sum() / mass.sum() for mean, _ in parts]
    np.testing.assert_allclose(result.mean[:, 0], expected, atol=1e-6)


def test_many_labels_tell_the_error_of_the_control() -> None:
    rng = np.random.default_rng(6)
    truth = rng.normal(0, 1.0, (60, 300)) * (rng.random((60, 300)) < 0.05)
    control = np.full(300, 0.3)
    observed = truth + rng.normal(0, 0.3, truth.shape) - rng.normal(0, control)
    joint = shrink(observed, np.full(truth.shape, 0.3), control_errors=control)
    apart = shrink(observed, np.full(truth.shape, np.hypot(0.3, 0.3)))
    assert rmse(joint.mean, truth) < 0.85 * rmse(apart.mean, truth)


def test_an_offset_beyond_the_controls_noise_is_an_effect() -> None:
    """What all perturbations share is not explained away as an error of a precise control."""
    rng = np.random.default_rng(7)
    observed = 1.0 + rng.normal(0, 0.1, (30, 200))
    result = shrink(observed, np.full(observed.shape, 0.1), control_errors=np.full(200, 0.02))
    assert np.abs(result.mean - 1.0).max() < 0.5
    assert result.mean.mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_standard_errors_must_be_positive_numbers(bad: float) -> None:
    with pytest.raises(DataError, match="standard errors"):
        shrink(np.zeros((2, 3)), np.full((2, 3), bad))


@pytest.mark.parametrize("functional", ["log_mean", "mean_log"])
def test_standard_errors_are_the_spread_over_screens(functional: str) -> None:
    """Median ratio of the stated error to the spread over repeated draws of the same cells."""
    cells = make_screen(density=0.0, cells_per_label=120).cells
    cells = cells.subset(np.flatnonzero(~cells.failing))
    moments = group_moments(cells.counts, cells.library, label_groups(cells))
    noise = effect_standard_errors(moments, "control", functional=functional)
    errors, scale = noise.total, noise.scale
    value = moments.value(functional)
    at = moments.row("control")
    effects = np.delete(value - value[at], at, axis=0)
    spread = np.sqrt(np.mean(effects**2, axis=0))
    ratio = np.median(errors, axis=0) / spread
    assert 0.8 < np.median(ratio) < 1.25
    assert ((scale > 0) & (scale <= 1)).all()


@pytest.mark.parametrize("functional", ["log_mean", "mean_log"])
def test_each_arms_error_is_its_bootstrap_spread_for_expressed_genes(functional: str) -> None:
    cells = make_screen(density=0.0, cells_per_label=120).cells
    cells = cells.subset(np.flatnonzero(~cells.failing))
    groups = label_groups(cells)
    moments = group_moments(cells.counts, cells.library, groups)
    noise = effect_standard_errors(moments, "control", functional=functional)
    labels = [label for label in moments.labels if label != "control"]
    expressed = moments.fraction.mean(axis=0) > 3e-3
    rng = np.random.default_rng(0)
    for label, stated in (("control", noise.control), ("T0", noise.own[labels.index("T0")])):
        rows = groups[label]
        draws = {str(i): rng.choice(rows, len(rows)) for i in range(100)}
        spread = group_moments(cells.counts, cells.library, draws).value(functional).std(axis=0)
        ratio = stated[expressed] / spread[expressed]
        assert 0.85 < np.median(ratio) < 1.18


def test_a_few_cells_without_a_count_are_not_certainty() -> None:
    screen = make_screen(cells_per_label=4)
    cells = screen.cells
    moments = group_moments(cells.counts, cells.library, label_groups(cells))
    unseen = (moments.fraction == 0) & (moments.fraction[moments.row("control")] > 1e-4)
    unseen = np.delete(unseen, moments.row("control"), axis=0)
    assert unseen.any()
    for functional in ("log_mean", "mean_log"):
        noise = effect_standard_errors(moments, "control", functional=functional)
        assert noise.own[unseen].min() > 0.05


@pytest.mark.parametrize("functional", ["log_mean", "mean_log"])
def test_empirical_bayes_beats_the_raw_mean_and_the_additive_sum(functional: str) -> None:
    gains = []
    for seed in range(3):
        screen = make_screen(seed)
        held_out = ["T0+T1", "T2+T3"]
        training = screen.cells.subset(np.flatnonzero(~np.isin(screen.cells.labels, held_out)))
        seen = sorted(set(training.labels) - {"control"})
        depth = depth_of(functional)
        fitted = EmpiricalBayes().fit(training)
        raw = TrainingMean().fit(training)
        gains.append(
            [
                ate_correlation(fitted.predict(labels, depth), screen.true(labels))
                - ate_correlation(raw.predict(labels, depth), screen.true(labels))
                for labels in (seen, held_out)
            ]
        )
    assert np.mean(gains, axis=0)[0] > 0.05
    assert np.mean(gains, axis=0)[1] > 0.05
