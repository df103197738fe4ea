"""Work on counts is done once within a step, and is never taken for that of other counts."""

from __future__ import annotations

import pytest
import torch
from factories import make_batch, make_pair, make_schema, with_partners
from torch import nn

from cradle_pyro.inference.objectives import partner_term
from cradle_pyro.inference.posterior import draw_latents
from cradle_pyro.model.reuse import declare_rows, done_once, reused


class Counting(nn.Module):
    """Doubles its input and counts how often it did."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, *values):
        self.calls += 1
        return 2 * sum(values)


@pytest.fixture
def work():
    return Counting()


def test_the_same_tensor_is_worked_on_once(work):
    value = torch.arange(6.0).reshape(3, 2)
    with reused():
        first, second = done_once(work, value), done_once(work, value)
        assert first is second
        assert work.calls == 1
        assert torch.equal(done_once(work, value.clone()), first)  # equal, but another tensor
        assert done_once(Counting(), value) is not first
    assert work.calls == 2
    assert done_once(work, value) is not first  # nothing outlives the block
    with reused():
        done_once(work, value)
    assert work.calls == 4


def test_a_result_without_gradient_is_not_taken_where_there_should_be_one(work):
    value = torch.ones(3, 2, requires_grad=True)
    with reused():
        with torch.no_grad():
            assert not done_once(work, value).requires_grad
        assert done_once(work, value).requires_grad


def test_rows_of_a_result_are_taken_through_several_steps_of_work(work):
    value, rows = torch.arange(6.0).reshape(3, 2), torch.tensor([2, 0])
    part, after = value[rows], Counting()
    with reused():
        whole = done_once(after, done_once(work, value))
        declare_rows(part, value, rows)
        assert torch.equal(done_once(after, done_once(work, part)), whole[rows])
    assert (work.calls, after.calls) == (1, 1)


def test_rows_are_not_taken_where_inputs_have_different_ones(work):
    value, other = torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)
    first, second = torch.tensor([2, 0]), torch.tensor([1, 1])
    with reused():
        done_once(work, value, other)
        parts = value[first], other[second]
        declare_rows(parts[0], value, first)
        assert torch.equal(done_once(work, *parts), 2 * sum(parts))  # of one, nothing is known
        declare_rows(parts[1], other, second)
        parts = parts[0], parts[1].clone()
        declare_rows(parts[1], other, second)
        assert torch.equal(done_once(work, *parts), 2 * sum(parts))
    assert work.calls == 3


def test_the_partner_term_and_its_gradient_are_the_same_with_reuse():
    schema = make_schema()
    _, guide = make_pair(schema, dtype=torch.float64)
    batch = with_partners(make_batch(schema, dtype=torch.float64))
    latents = draw_latents(guide, batch)
    products = []
    guide.z_basal.network.inputs[0].register_forward_hook(lambda *_: products.append(1))

    def term():
        guide.zero_grad()
        torch.manual_seed(6)
        guide(batch)
        found = partner_term(guide, latents, batch)
        found.backward()
        return found, [p.grad.clone() for p in guide.parameters() if p.grad is not None]

    expected = term()
    n_products = len(products)
    with reused():
        torch.testing.assert_close(term(), expected)
    assert (n_products, len(products) - n_products) == (3, 2)
