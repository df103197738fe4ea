"""The parts of the negative binomial against scipy's gamma functions and plain autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import digamma, gammaln

from cradle_pyro.model import blocks, special
from cradle_pyro.model.special import fractions, log_choose, mean_terms

COUNTS = np.array([0, 1, 2, 3, 7, 20, 99, 1e3, 1e4, 1e6])
START = np.geomspace(np.exp(-6), np.exp(9), 31)


def elementwise(counts, start):
    """Return the terms one by one, shape (counts, starts)."""
    columns = [log_choose(counts.unsqueeze(-1), one) for one in start.split(1)]
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
    error = np.abs(found.detach().numpy() - (exact - gammaln(x + 1)))
    assert (error <= rtol * (1 + np.abs(exact) + gammaln(x + 1))).all()
    (slope,) = torch.autograd.grad(found.sum(), start)
    expected = (digamma(x + theta) - digamma(theta)).sum(0)
    np.testing.assert_allclose(slope, expected, rtol=max(rtol, 1e-8))


def test_nothing_is_lost_where_counts_are_nearly_poisson():
    """There lgamma(x+θ) - lgamma(θ) is near x log θ, a small difference of large numbers."""
    found = log_choose(torch.tensor([[3.0]]), torch.tensor([8000.0]))
    exact = np.log([8000.0, 8001.0, 8002.0]).sum() - np.log(6)
    assert abs(float(found) - exact) < 1e-5
    naive = torch.lgamma(torch.tensor(8003.0)) - torch.lgamma(torch.tensor(8000.0)) - np.log(6)
    assert abs(float(naive) - exact) > 1e-4


@pytest.mark.parametrize("leaves_zeros_out", [True, False])
def test_genes_are_summed_and_cells_kept_apart(leaves_zeros_out, monkeypatch):
    monkeypatch.setattr(special, "_leaves_zeros_out", lambda _: leaves_zeros_out)
    counts = torch.tensor([[0.0, 2.0, 5.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    expected = np.log([3 * 4 * 5 * 6 * 7 / 120, 0.5])  # 2! / 2!, times 3 4 5 6 7 / 5!
    np.testing.assert_allclose(log_choose(counts, start).detach(), expected, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda theta: log_choose(counts, theta), start)


# ------------------------------------------------------------------------- what depends on the mean


def plain_terms(mean, theta, counts):
    """Return the terms as they are written, with torch's own gradient."""
    ratio = mean / theta
    return (torch.xlogy(counts, ratio) - (counts + theta) * torch.log1p(ratio)).sum(-1)


def draw(*shape, counts_shape=None, dtype=torch.float64, seed=0):
    """Return means, inverse dispersions and counts; no entry is special but the zeros."""
    rng = np.random.default_rng(seed)
    mean = torch.as_tensor(rng.gamma(0.3, 5.0, shape) + 1e-3, dtype=dtype).requires_grad_()
    theta = torch.as_tensor(rng.uniform(0.1, 9.0, shape[-1]), dtype=dtype).requires_grad_()
    counts = rng.poisson(2.0, counts_shape or shape) * rng.integers(0, 2, counts_shape or shape)
    return mean, theta, torch.as_tensor(counts, dtype=dtype)


@pytest.mark.parametrize("with_library", [False, True])
@pytest.mark.parametrize("block", [1, 13, 40, 1 << 17])
@pytest.mark.parametrize(
    ("shape", "counts_shape"),
    [((7,), (7,)), ((11, 7), (11, 7)), ((2, 3, 11, 7), (11, 7)), ((11, 7), (2, 11, 7)),
     ((2, 1, 11, 7), (2, 3, 11, 7)), ((7,), (3, 7))],
)  # fmt: skip
def test_terms_and_gradients_are_those_of_the_plain_expression(
    shape, counts_shape, block, with_library, monkeypatch
):
    monkeypatch.setattr(blocks, "_ELEMENTS", block)
    rate, theta, counts = draw(*shape, counts_shape=counts_shape)
    learned, library = [rate, theta], None
    if with_library:
        cells = torch.broadcast_shapes(shape, counts_shape)[:-1][-1:]
        library = torch.as_tensor(np.random.default_rng(1).uniform(0.5, 9, cells)).requires_grad_()
        learned.append(library)
    mean = rate if library is None else library.unsqueeze(-1) * rate
    found = mean_terms(rate, theta, counts, library)
    expected = plain_terms(mean, theta, counts)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).reshape(found.shape)
    gradients = [torch.autograd.grad((t * weights).sum(), learned) for t in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_means_of_zero_have_finite_terms_and_are_pulled_up_by_counts():
    mean = torch.zeros(1, 3, requires_grad=True)
    counts = torch.tensor([[0.0, 1.0, 0.0]])
    found = mean_terms(mean, torch.ones(3), counts)
    assert found.item() == pytest.approx(np.log(1e-12), rel=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), mean)
    torch.testing.assert_close(slope, torch.tensor([[-1.0, 1e12, -1.0]]))


def test_single_precision_keeps_its_digits():
    double = draw(40, 900)
    single = [part.detach().float().requires_grad_(part.requires_grad) for part in double]
    found, exact = mean_terms(*single), mean_terms(*double)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
    ours = torch.autograd.grad(found.sum(), single[:2])
    theirs = torch.autograd.grad(exact.sum(), double[:2])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------- the short cut past the softmax


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("block", [1, 13, 1 << 17])
@pytest.mark.parametrize("shape", [(11, 7), (2, 3, 11, 7)])
def test_the_short_cut_passes_what_the_softmax_would(shape, block, drop_last, monkeypatch):
    monkeypatch.setattr(blocks, "_ELEMENTS", block)
    _, theta, counts = draw(*shape, counts_shape=shape[-2:])
    theta, counts = (value[..., : 7 - drop_last] for value in (theta, counts))
    logits = torch.as_tensor(np.random.default_rng(2).normal(size=shape)).requires_grad_()
    library = torch.linspace(3, 90, 11, dtype=logits.dtype).requires_grad_()
    rate, short_cut = fractions(logits, drop_last=drop_last)
    every = torch.softmax(logits, -1)[..., : 7 - drop_last]
    torch.testing.assert_close(rate, every)
    found = mean_terms(rate, theta, counts, library, short_cut)
    expected = plain_terms(library.unsqueeze(-1) * every, theta, counts)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).reshape(found.shape)
    learned = [logits, theta, library]
    # The fractions themselves are used, too.
    other = torch.linspace(0, 1, rate.numel(), dtype=rate.dtype).reshape(rate.shape)
    for also in (0.0, 1.0):
        losses = [
            (terms * weights).sum() + also * (some * other).sum()
            for terms, some in ((found, rate), (expected, every))
        ]
        gradients = [torch.autograd.grad(loss, learned, retain_graph=True) for loss in losses]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_short_cut_is_not_taken_by_what_broadcasts():
    """Its shape is that of the logits, not of their copies."""
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    rate, short_cut = fractions(logits)
    counts = torch.ones(3, 4, 5, dtype=torch.float64)
    found = mean_terms(rate, torch.ones(5, dtype=torch.float64), counts, short_cut=short_cut)
    one = mean_terms(torch.softmax(logits, -1), torch.ones(5, dtype=torch.float64), counts[0])
    ours, theirs = (torch.autograd.grad(terms.sum(), logits)[0] for terms in (found, one))
    torch.testing.assert_close(ours, 3 * theirs)


def test_fractions_alone_have_the_gradient_of_a_softmax():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for drop_last in (False, True):

        def alone(x, drop_last=drop_last):
            return fractions(x, drop_last=drop_last)[0]

        assert torch.autograd.gradcheck(alone, logits)
        assert torch.autograd.gradgradcheck(alone, logits)
