"""Recovery of a known truth by a whole fit; slow."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cradle_pyro.baselines.simple import TrainingMean
from cradle_pyro.config import Config
from cradle_pyro.data.prepare import prepare
from cradle_pyro.evaluation.metrics import ate_correlation
from cradle_pyro.inference.train import fit
from cradle_pyro.queries.effects import effect_draws
from cradle_pyro.simulate.perturbseq import simulate_perturbseq

pytestmark = pytest.mark.slow

SETTINGS = (
    "data.layer=counts",
    "qc.doublets=false",
    "model.n_latents=8",
    "model.decoder={hidden=64, layers=1}",
    "guide.encoder={hidden=64, layers=1}",
    "train.max_epochs=30",
)


@pytest.fixture(scope="module")
def fitted():
    """A simulated screen, its truth, and a posterior."""
    adata = simulate_perturbseq(n_cells=2000, n_genes=300, n_perturbations=10, n_pairs=0, seed=0)
    config = Config().with_settings(SETTINGS)
    data = prepare(adata, config).data
    return data, adata.uns["cradle_truth"], fit(data, config, progress=False)


def test_effects_are_closer_to_the_truth_than_means_of_passing_cells(fitted):
    data, truth, posterior = fitted
    labels = [str(label) for label in truth["ate_labels"]]
    estimate = effect_draws(posterior, labels, draws=20, n_cells=200).mean(0)
    passing = TrainingMean().fit(data).predict(labels)
    found, raw = (ate_correlation(values, truth["ate"]) for values in (estimate, passing))
    assert found >= raw
    assert found > 0.93  # 0.96 when written, and 0.88 raw


def test_inclusion_of_gene_effects_ranks_the_genes_acted_on(fitted):
    _, truth, posterior = fitted
    rows = [list(truth["mask_labels"]).index(name) for name in posterior.schema.perturbations]
    mask = np.asarray(truth["mask"])[rows]
    inclusion = 1 - posterior.guide.gene_effect().inclusion[..., 0].detach().numpy()
    assert roc_auc_score(mask.ravel(), inclusion.ravel()) > 0.75
    # The wrong perturbation's genes are ranked worse.
    assert roc_auc_score(np.roll(mask, 1, axis=0).ravel(), inclusion.ravel()) < 0.7
