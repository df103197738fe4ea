"""The optimiser is AdamW, and where it moves rows only it leaves the others as they are."""

from __future__ import annotations

import pytest
import torch
from tiny import make_config
from torch import nn
from torch.nn import functional

from cradle_pyro.inference.optimizer import AdamWByRow, clip_gradients, make_optimizer


def make_values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(6, 4, generator=generator))


def seen_rows(n_steps, share=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.nonzero(torch.rand(6, generator=generator) < share)[:, 0] for _ in range(n_steps)]
    return [some if len(some) else torch.tensor([0]) for some in rows]


def train(optimizer, values, rows, target, *, sparse, noise=0.1):
    """Move the rows that each step sees towards a target."""
    generator = torch.Generator().manual_seed(2)
    for some in rows:
        optimizer.zero_grad()
        aim = target[some] + noise * torch.randn(len(some), 4, generator=generator)
        found = functional.embedding(some, values, sparse=sparse)
        (0.5 * (found - aim).square()).sum().backward()
        optimizer.step()


def test_without_rows_it_is_adamw():
    ours, theirs = make_values(), make_values()
    groups = [{"params": [ours], "lr": 0.1, "weight_decay": 0.3}]
    rows = seen_rows(20)
    target = torch.ones(6, 4)
    train(AdamWByRow(groups, fused=True), ours, rows, target, sparse=False)
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3, fused=True)
    train(other, theirs, rows, target, sparse=False)
    assert torch.equal(ours, theirs)


def test_rows_that_a_step_did_not_see_stay():
    values = make_values()
    optimizer = AdamWByRow([{"params": [values], "by_row": True, "lr": 0.1}], weight_decay=0.0)
    train(optimizer, values, [torch.tensor([0, 3])], torch.ones(6, 4), sparse=True)
    before = values.detach().clone()
    train(optimizer, values, [torch.tensor([1, 3])], torch.ones(6, 4), sparse=True)
    moved = (values != before).any(1)
    assert moved.tolist() == [False, True, False, True, False, False]


def test_a_first_step_is_as_long_as_the_rate():
    values = make_values()
    before = values.detach().clone()
    optimizer = AdamWByRow([{"params": [values], "by_row": True, "lr": 0.1}])
    train(optimizer, values, [torch.tensor([2])], torch.full((6, 4), 9.0), sparse=True)
    torch.testing.assert_close(values[2] - before[2], torch.full((4,), 0.1))


def test_a_row_comes_to_where_adam_would_bring_it():
    """One gradient, then none: all steps of Adam's mean gradient are the one step of the row."""
    ours, theirs = make_values(), make_values()
    start = ours.detach().clone()
    lazily = AdamWByRow([{"params": [ours], "by_row": True, "lr": 1e-3}])
    adam = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    # Long before, so that nothing is left of the corrections of the first steps.
    train(lazily, ours, [torch.arange(6)] * 3000, start, sparse=True)
    train(adam, theirs, [torch.arange(6)] * 3000, start, sparse=False)
    moves = []
    for optimizer, values in ((lazily, ours), (adam, theirs)):
        for moved in range(200):
            optimizer.zero_grad()
            values.grad = torch.zeros_like(values)
            if moved == 100:
                before = values.detach().clone()
                values.grad[1] = 0.5
            optimizer.step()
        moves.append((values - before).detach()[1])
    torch.testing.assert_close(*moves, rtol=0.1, atol=0)


@pytest.mark.parametrize("sparse", [True, False])
def test_seldom_seen_rows_learn_as_with_adam(sparse):
    target = torch.linspace(-2, 2, 24).reshape(6, 4)
    rows = seen_rows(3000, share=0.1)
    ours, theirs = make_values(), make_values()
    lazily = AdamWByRow([{"params": [ours], "by_row": True, "lr": 1e-2}])
    train(lazily, ours, rows, target, sparse=sparse)
    train(torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0), theirs, rows, target,
          sparse=False)  # fmt: skip
    assert (ours - target).abs().max() < 0.1
    assert (ours - theirs).abs().max() < 0.1


def test_dense_and_sparse_gradients_move_the_same():
    first, second = make_values(), make_values()
    target, rows = torch.ones(6, 4), seen_rows(30)
    for values, sparse in ((first, True), (second, False)):
        optimizer = AdamWByRow([{"params": [values], "by_row": True, "lr": 0.1}])
        train(optimizer, values, rows, target, sparse=sparse)
    torch.testing.assert_close(first, second)


def test_it_goes_on_from_its_state():
    whole, parts = make_values(), make_values()
    target, rows = torch.ones(6, 4), [torch.tensor([0, 2]), torch.tensor([2, 5]), torch.arange(6)]

    def make(values):
        return AdamWByRow([{"params": [values], "by_row": True, "lr": 0.1}])

    train(make(whole), whole, rows, target, sparse=True, noise=0.0)
    optimizer = make(parts)
    train(optimizer, parts, rows[:2], target, sparse=True, noise=0.0)
    again = make(parts)
    again.load_state_dict(optimizer.state_dict())
    train(again, parts, rows[2:], target, sparse=True, noise=0.0)
    assert torch.equal(whole, parts)


def test_gradients_are_clipped_as_by_torch():
    sparse, dense, other = make_values(), make_values(), make_values(3)
    for values in (sparse, dense):
        rows = torch.tensor([1, 1, 4])
        functional.embedding(rows, values, sparse=values is sparse).square().sum().backward()
    other.grad = torch.ones_like(other)
    fellow = nn.Parameter(torch.zeros(6, 4))
    fellow.grad = torch.ones_like(fellow)
    clip_gradients([sparse, other, nn.Parameter(torch.zeros(1))], 0.5)
    nn.utils.clip_grad_norm_([dense, fellow], 0.5)
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    torch.testing.assert_close(other.grad, fellow.grad)


def test_parameters_fall_into_groups():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias, self.loading = (
                nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,), (2, 2))
            )

        def parameters_with_prior(self):
            return [self.loading]

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.effects = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))

        def global_parameters(self):
            return [self.effects]

        row_parameters = global_parameters

    model, guide, config = Model(), Guide(), make_config().train

    def groups(**options):
        found = make_optimizer(model, guide, config, **options).param_groups
        return [
            ({id(p) for p in g["params"]}, g["lr"], g["weight_decay"], g.get("by_row", False))
            for g in found
        ]

    def ids(*values):
        return {id(value) for value in values}

    slow, fast = config.learning_rate, config.effect_learning_rate
    network = [
        (ids(model.weight, guide.encoder), slow, config.weight_decay, False),
        (ids(model.bias, model.loading), slow, 0.0, False),
    ]
    assert groups() == [*network, (ids(guide.effects), fast, 0.0, False)]
    assert groups(by_row=True) == [*network, (ids(guide.effects), fast, 0.0, True)]
