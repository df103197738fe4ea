"""Draws of counts against scipy's negative binomial."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cradle_pyro.model import blocks, sampling
from cradle_pyro.model.sampling import draw_counts

MEANS = (0.0, 1e-3, 0.05, 0.8, 6.0, 90.0)
THETAS = (0.02, 0.5, 3.0, 4000.0)
N_CELLS = 20_000


def world():
    """Return means and inverse dispersions of genes: all combinations."""
    mean, theta = np.meshgrid(MEANS, THETAS)
    return (torch.as_tensor(values.ravel(), dtype=torch.float32) for values in (mean, theta))


@pytest.fixture(params=["clusters", "gamma"])
def counts(request, monkeypatch):
    """Return many cells' counts, drawn in the one way or the other."""
    most = np.inf if request.param == "clusters" else -1.0
    monkeypatch.setattr(sampling, "_MOST_CLUSTERS", most)
    torch.manual_seed(0)
    mean, theta = world()
    return draw_counts(mean.expand(N_CELLS, -1), theta).numpy()


def test_each_gene_follows_its_distribution(counts):
    for gene, (mean, theta) in enumerate(zip(*world(), strict=True)):
        law = stats.nbinom(float(theta), float(theta / (theta + mean)))
        if mean == 0:
            assert not counts[:, gene].any()
            continue
        # Bins of about equal probability, each expected at least a few times.
        edges = np.unique(law.ppf(np.linspace(0.02, 0.98, 12)))
        edges = np.concatenate([[-1.0], edges, [np.inf]])
        expected = N_CELLS * np.diff(law.cdf(edges))
        observed, _ = np.histogram(counts[:, gene], bins=edges + 0.5)
        kept = expected > 1
        statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
        assert stats.chi2(max(kept.sum() - 1, 1)).sf(statistic) > 1e-5, (float(mean), float(theta))
        assert abs(counts[:, gene].mean() - law.mean()) < 5 * law.std() / N_CELLS**0.5


def test_genes_and_cells_are_independent(counts):
    ranks = stats.rankdata(counts[:, [2, 3, 4, 9, 10, 15]], axis=0)
    across = np.corrcoef(ranks, rowvar=False)
    along = [np.corrcoef(rank[:-1], rank[1:])[0, 1] for rank in ranks.T]
    bound = 5 / N_CELLS**0.5
    assert np.abs(across - np.eye(len(across))).max() < bound
    assert np.abs(along).max() < bound


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 1, 5, 3)])
def test_shapes_and_whole_numbers(shape, monkeypatch):
    monkeypatch.setattr(blocks, "_ELEMENTS", 6)
    found = draw_counts(torch.full(shape, 0.4), torch.tensor([0.5, 1.0, 2.0]))
    assert found.shape == shape
    assert (found == found.round()).all()
    assert (found >= 0).all()


def test_the_cheaper_way_is_taken(monkeypatch):
    taken = []
    monkeypatch.setattr(
        sampling, "_gamma_poisson", lambda mean, theta: taken.append(mean.shape) or mean
    )
    draw_counts(torch.full((10, 4), 0.1), torch.ones(4))
    assert not taken
    draw_counts(torch.full((10, 4), 100.0), torch.ones(4))
    assert taken == [(10, 4)]


def test_the_state_decides_the_draw():
    mean, theta = world()
    first, second = (
        (torch.manual_seed(seed), draw_counts(mean.expand(50, -1), theta))[1] for seed in (3, 3)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, draw_counts(mean.expand(50, -1), theta))


def test_means_that_are_no_numbers_are_refused():
    with pytest.raises((RuntimeError, ValueError)):
        draw_counts(torch.tensor([[1.0, torch.nan]]), torch.ones(2))
