"""The rising factorial of counts against scipy's gamma functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import digamma, gammaln

from cradle_pyro.model.special import log_rising

COUNTS = np.array([0, 1, 2, 3, 7, 20, 99, 1e3, 1e4, 1e6])
START = np.geomspace(np.exp(-6), np.exp(9), 31)


def elementwise(counts, start):
    """Return the terms one by one, shape (counts, starts)."""
    columns = [log_rising(counts.unsqueeze(-1), one) for one in start.split(1)]
    return torch.stack(columns, -1)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_terms_and_slopes_are_those_of_gamma_functions(dtype, rtol):
    counts = torch.as_tensor(COUNTS, dtype=dtype)
    start = torch.as_tensor(START, dtype=dtype).requires_grad_()
    found = elementwise(counts, start)
    x, theta = np.meshgrid(COUNTS, start.detach().double().numpy(), indexing="ij")
    # Sums of logarithms where they are short: gammaln loses digits in the difference.
    exact = np.where(x < 1e3, 0.0, gammaln(x + theta) - gammaln(theta))
    for k in range(99):
        exact += np.where((x < 1e3) & (k < x), np.log(theta + k), 0.0)
    np.testing.assert_allclose(found.detach(), exact, rtol=rtol, atol=rtol)
    (slope,) = torch.autograd.grad(found.sum(), start)
    expected = (digamma(x + theta) - digamma(theta)).sum(0)
    np.testing.assert_allclose(slope, expected, rtol=max(rtol, 1e-8))


def test_nothing_is_lost_where_counts_are_nearly_poisson():
    """There lgamma(x+θ) - lgamma(θ) is near x log θ, a small difference of large numbers."""
    found = log_rising(torch.tensor([[3.0]]), torch.tensor([8000.0]))
    exact = np.log([8000.0, 8001.0, 8002.0]).sum()
    assert abs(float(found) - exact) < 1e-5
    naive = torch.lgamma(torch.tensor(8003.0)) - torch.lgamma(torch.tensor(8000.0))
    assert abs(float(naive) - exact) > 1e-4


def test_genes_are_summed_and_cells_kept_apart():
    counts = torch.tensor([[0.0, 2.0, 5.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    expected = np.log([1 * 2 * 3 * 4 * 5 * 6 * 7, 0.5])  # 2!, times 3 4 5 6 7
    np.testing.assert_allclose(log_rising(counts, start).detach(), expected, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda theta: log_rising(counts, theta), start)
