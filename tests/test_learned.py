"""Every kind of predictor: one contract, on a tiny screen with short training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import sparse

import cradle_pyro as cp
from cradle_pyro.baselines.learned import (
    CANDIDATES,
    KINDS,
    PAIRS,
    PEERS,
    FittedModel,
    make_predictor,
    shrunken_residuals,
    with_flags,
)
from cradle_pyro.baselines.predictor import Depth, FittedPredictor, GenerativePredictor, Predictor
from cradle_pyro.baselines.scvi_tools import SCVIPredictor
from cradle_pyro.baselines.simple import TrainingMean
from cradle_pyro.data.dataset import CellData
from cradle_pyro.errors import ConfigError, QueryError
from cradle_pyro.inference.checkpoint import load
from cradle_pyro.queries.effects import effect_draws

TINY = (
    "data.layer='counts'",
    "split.method=combinations",
    "qc.doublets=false",
    "train.max_epochs=2",
    "model.n_latents=3",
    "evaluation.draws=2",
    "evaluation.n_controls=10",
)
SMALLER = (
    "model.n_latents=3",
    "model.decoder.hidden=8",
    "guide.encoder.hidden=8",
    "guide.effect_encoder.hidden=8",
)


@cache
def make_data() -> CellData:
    adata = cp.simulate_perturbseq(n_cells=400, n_genes=60, n_perturbations=4, n_pairs=3, seed=1)
    return cp.prepare(adata, cp.Config().with_settings(TINY)).data


def learned_part(data: CellData) -> CellData:
    return data.subset(np.asarray(data.split) != "test")


def predictor_of(kind: str, **options: object) -> Predictor:
    config = cp.Config().with_settings(TINY)
    predictor = make_predictor(kind, config=config, settings=SMALLER, **options)
    return replace(predictor, max_epochs=3) if isinstance(predictor, SCVIPredictor) else predictor


INSTALLED = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            kind == "scvi" and find_spec("scvi") is None, reason="scvi-tools is not installed"
        ),
    )
    for kind in KINDS
]


@cache
def fitted_of(kind: str) -> FittedPredictor:
    return predictor_of(kind).fit(make_data())


@pytest.mark.parametrize("kind", INSTALLED)
def test_every_kind_fulfils_the_contract(kind: str) -> None:
    data, predictor, fitted = make_data(), predictor_of(kind), fitted_of(kind)
    assert isinstance(predictor, Predictor)
    assert isinstance(fitted, GenerativePredictor)
    assert fitted.name == predictor.name == kind
    names, n_genes = data.schema.perturbations, data.schema.n_genes
    never = "+".join(sorted(names[:3]))
    labels = [names[0], data.schema.control, never]
    library = np.array([2000.0, 3000.0])
    for depth in (None, Depth([library] * 3, library)):
        effects = fitted.predict(labels, depth)
        assert effects.shape == (3, n_genes)
        assert np.isfinite(effects).all()
        assert not effects[1].any()
        assert fitted.predict([], depth).shape == (0, n_genes)
    with pytest.raises(QueryError, match=f"'{names[0]}x'"):
        fitted.predict([f"{names[0]}x"])
    depth = np.repeat([1000.0, 4000.0], 40)
    counts = fitted.generate(np.tile([names[0], data.schema.control], 40), depth, seed=3)
    assert counts.shape == (80, n_genes)
    assert (counts == np.round(counts)).all()
    assert (counts >= 0).all()
    sums = counts.sum(1)
    assert sums[40:].mean() / sums[:40].mean() == pytest.approx(4, rel=0.25)
    assert sums[40:].mean() == pytest.approx(4000, rel=0.25)
    again = fitted.generate(np.tile([names[0], data.schema.control], 40), depth, seed=3)
    np.testing.assert_array_equal(counts, again)


@pytest.mark.parametrize("kind", INSTALLED)
def test_test_cells_are_not_learned_from(kind: str) -> None:
    data = make_data()
    counts = data.rows(slice(None)).toarray()
    counts[np.asarray(data.split) == "test"] = 999.0
    spoilt = replace(data, counts=sparse.csr_array(counts))
    labels = list(data.schema.perturbations)
    found, other = fitted_of(kind), predictor_of(kind).fit(spoilt)
    np.testing.assert_array_equal(other.predict(labels), found.predict(labels))
    if isinstance(found, FittedModel) and isinstance(other, FittedModel):
        assert not found.posterior.labels["test"].any()
        assert found.posterior.facts == other.posterior.facts


def test_failing_cells_are_discarded_with_their_flags() -> None:
    data = make_data()
    fitted = predictor_of("cradle", cells="passing").fit(data)
    assert isinstance(fitted, FittedModel)
    train = data.where(split="train")
    assert fitted.posterior.statistics.n_cells == train.passing.sum() < train.n_cells
    assert fitted.posterior.schema.artifacts == ()
    assert fitted.see(data).artifact.shape == (data.n_cells, 0)


def test_without_a_split_all_cells_are_training_cells() -> None:
    data = replace(make_data(), split=None)
    fitted = predictor_of("sams_vae").fit(data)
    assert isinstance(fitted, FittedModel)
    assert fitted.posterior.statistics.n_cells == data.n_cells


def test_cells_of_a_trained_model_are_those_of_its_posterior() -> None:
    """Generated cells have the mean profile that the posterior expects of their label."""
    fitted = fitted_of("cradle")
    assert isinstance(fitted, FittedModel)
    label = fitted.posterior.schema.perturbations[0]
    library = np.full(1000, 3000.0)
    made = fitted.generate([label] * 1000, library, seed=1).mean(0) / 3000
    control = fitted.generate(["control"] * 1000, library, seed=1).mean(0) / 3000
    change = np.log2(1 + 1e4 * made) - np.log2(1 + 1e4 * control)
    expected = effect_draws(fitted.posterior, [label], draws=50, n_cells=100).mean(0)[0]
    # The mean over cells of a logarithm is not the logarithm of the mean, where effects are large.
    assert np.corrcoef(change, expected)[0, 1] > 0.95


def test_flags_are_merged_or_left_out() -> None:
    data = make_data()
    assert with_flags(data, "each") is data
    one = with_flags(data, "any")
    assert one.schema.artifacts == ("any",)
    np.testing.assert_array_equal(one.artifact[:, 0] > 0, data.failing)
    none = with_flags(data, "none")
    assert none.passing.all()
    np.testing.assert_array_equal(none.labels, data.labels)


@pytest.mark.parametrize(
    ("kind", "sites", "flags"),
    [
        ("conditional_vae", {"z_basal"}, 0),
        ("cpa_vae", {"z_basal", "effect", "effect_mask"}, 0),
        ("sams_vae", {"z_basal", "effect", "effect_mask"}, 0),
        ("sams_vae_mean_field", {"z_basal", "effect", "effect_mask"}, 0),
        ("published_cradle", {"z_basal", "effect", "effect_mask", "artifact_effect"}, 1),
    ],
)
def test_peers_have_the_latents_that_their_papers_give_them(
    kind: str, sites: set[str], flags: int
) -> None:
    fitted = fitted_of(kind)
    assert isinstance(fitted, FittedModel)
    latents = {
        column.removeprefix("train_")
        for column in fitted.posterior.history
        if column.startswith("train_")
    } - {"loss", "counts", "counterfactual", "prior"}
    assert latents == sites
    assert fitted.posterior.schema.n_artifacts == flags


def test_a_conditional_vae_has_the_design_in_decoder_and_encoder() -> None:
    fitted = fitted_of("conditional_vae")
    assert isinstance(fitted, FittedModel)
    posterior = fitted.posterior
    first, second = fitted.predict(list(posterior.schema.perturbations[:2]))
    assert first.any()
    assert not np.allclose(first, second)
    cells = fitted.see(make_data()).batch(np.arange(5))
    other = cells.replace(perturbation=1 - cells.perturbation)
    loc, changed = (
        poutine.trace(posterior.guide).get_trace(batch).nodes["z_basal"]["fn"].mean
        for batch in (cells, other)
    )
    assert not torch.allclose(loc, changed)


def mask_shares(kind: str, *settings: str) -> np.ndarray:
    fitted = make_predictor(
        kind, config=cp.Config().with_settings(TINY), settings=[*SMALLER, *settings]
    ).fit(make_data())
    assert isinstance(fitted, FittedModel)
    logits = fitted.posterior.guide.mask_logits
    assert logits is not None
    return logits.detach().sigmoid().numpy()


@pytest.mark.parametrize(
    ("kind", "share"),
    [("cpa_vae", 1.0), ("sams_vae", 0.5), ("sams_vae_mean_field", 0.5), ("cradle", 0.5)],
)
def test_masks_start_open_for_cpa_and_undecided_for_others(kind: str, share: float) -> None:
    still = mask_shares(kind, "train.effect_learning_rate=1e-9")
    np.testing.assert_allclose(still, share, atol=1e-4)


def test_masks_are_learned() -> None:
    assert (mask_shares("sams_vae", "train.effect_learning_rate=0.1") < 0.49).any()


def test_an_edited_peer_can_be_saved_and_read(tmp_path) -> None:
    fitted = fitted_of("conditional_vae")
    assert isinstance(fitted, FittedModel)
    found = load(fitted.posterior.save(tmp_path / "run"), pair=PAIRS["conditional_vae"])
    labels = list(found.schema.perturbations)
    np.testing.assert_array_equal(
        FittedModel("read", found, "none").predict(labels), fitted.predict(labels)
    )


def test_all_tuned_kinds_have_as_many_candidates_and_all_can_be_built() -> None:
    assert set(CANDIDATES) == set(PEERS)
    assert len({len(candidates) for candidates in CANDIDATES.values()}) == 1
    for kind, candidates in CANDIDATES.items():
        built = [make_predictor(kind, settings=settings) for settings in candidates]
        assert len({predictor.config for predictor in built}) == len(candidates)


def test_an_unknown_kind_names_a_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sams_vae'"):
        make_predictor("sams-vae")


def test_a_library_for_every_cell_is_needed() -> None:
    fitted = fitted_of("cradle")
    assert isinstance(fitted, FittedModel)
    with pytest.raises(QueryError, match="2 labels"):
        fitted.generate(["control", "control"], np.array([1000.0]))


# ------------------------------------------------------------------------------ model assistance


@dataclass(frozen=True)
class Wrong:
    """A predictor that is off by a given amount from what training cells show."""

    data: cp.CellData
    error: np.ndarray
    name: str = "wrong"

    def predict(self, labels, depth=None):
        train = TrainingMean(cells="passing").fit(self.data)
        return train.predict(labels, depth) + self.error


def screen_of_many_cells() -> cp.CellData:
    adata = cp.simulate_perturbseq(
        n_cells=1500, n_genes=60, n_perturbations=3, n_pairs=1, artifact_share=0.0, seed=2
    )
    return cp.CellData.from_anndata(adata, layer="counts", artifact="none")


def test_residuals_mend_what_is_clearly_wrong_and_leave_what_is_noise() -> None:
    data = screen_of_many_cells()
    singles = list(data.schema.perturbations)
    mean = TrainingMean(cells="passing").fit(data)
    depth = Depth([data.library] * 3, data.library)
    error = np.zeros(data.schema.n_genes)
    error[:5] = 3.0
    residuals = shrunken_residuals(Wrong(data, error), data)
    mended = Wrong(data, error).predict(singles, depth) + residuals.of(singles)
    np.testing.assert_allclose(mended[:, :5], mean.predict(singles, depth)[:, :5], atol=0.3)
    # A model that is right but for noise stays as it is.
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.normal(size=data.schema.n_genes)
    nothing = shrunken_residuals(Wrong(data, noise), data).of(singles)
    assert np.abs(nothing).max() < 0.03


def test_residuals_of_a_pair_never_seen_add_up_and_count_what_all_share_once() -> None:
    data = screen_of_many_cells()
    pair = next(label for label in np.unique(data.labels) if "+" in label)
    data = data.subset(data.labels != pair)
    error = np.zeros(data.schema.n_genes)
    error[:5] = 3.0
    found = shrunken_residuals(Wrong(data, error), data)
    first, second = (found.of([name])[0] for name in pair.split("+"))
    np.testing.assert_allclose(found.of([pair])[0], first + second - found.shared)
    # All labels are wrong alike here: so is the pair.
    np.testing.assert_allclose(found.of([pair])[0, :5], -3.0, atol=0.2)
    assert not found.of(["control"]).any()


def test_only_predictions_for_observed_cells_are_assisted() -> None:
    data = make_data()
    plain, assisted = (predictor_of("cradle", assisted=some).fit(data) for some in (False, True))
    labels = list(data.schema.perturbations)
    np.testing.assert_array_equal(plain.predict(labels), assisted.predict(labels))
    both = [*labels, "control"]
    depth = Depth([data.library] * len(both), data.library)
    change = assisted.predict(both, depth) - plain.predict(both, depth)
    expected = assisted.residuals.of(labels)
    assert expected.any()
    np.testing.assert_allclose(change[:-1], expected, atol=1e-6)
    assert not change[-1].any()
    with pytest.raises(ConfigError, match="only a model can be assisted"):
        make_predictor("glm", assisted=True)
