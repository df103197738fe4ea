"""Doing an artifact is not seeing it: a screen small enough to compute by hand.

One perturbation d, one flag a, two genes, every other latent held. Half the cells are perturbed.
The odds of the flag are 1/4, times 4 under the perturbation. The odds that a transcript is of the
first gene are 1, times 2 under the perturbation, times 3 under the artifact:

====  ====  ====  ========  ===========
d     a     rate  P(a | d)  P(d, a)
====  ====  ====  ========  ===========
0     0     1/2   4/5       8/20
0     1     3/4   1/5       2/20
1     0     2/3   1/2       5/20
1     1     6/7   1/2       5/20
====  ====  ====  ========  ===========

Rates and probabilities are those of the real model, at one cell per row of this table, so that sums
over cells are exact expectations.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from factories import make_config, make_schema, make_statistics
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.inference.pair import build_pair
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.intervene import run_world
from cradle_pyro.types import Batch

ASSIGNED = "assigned"
LIBRARY = 840.0
D, A = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.float64)


class Truth(NamedTuple):
    """Probability of d, odds of a flag, and the factors by which d and a change odds."""

    assigned: Fraction = Fraction(1, 2)
    flag_odds: Fraction = Fraction(1, 4)
    flag_by_perturbation: Fraction = Fraction(4)
    gene_by_perturbation: Fraction = Fraction(2)
    gene_by_artifact: Fraction = Fraction(3)

    def rate(self, d: int, a: int) -> Fraction:
        """Return the first gene's share of the transcripts."""
        return _from_odds(self.gene_by_perturbation**d * self.gene_by_artifact**a)

    def risk(self, d: int) -> Fraction:
        """Return P(a = 1 | d)."""
        return _from_odds(self.flag_odds * self.flag_by_perturbation**d)

    def assigned_given_passing(self) -> Fraction:
        """Return P(d = 1 | a = 0), by Bayes' rule."""
        passing = [(1 - self.assigned) * (1 - self.risk(0)), self.assigned * (1 - self.risk(1))]
        return passing[1] / sum(passing)


TRUTHS = {
    "as above": Truth(),
    "few perturbed": Truth(assigned=Fraction(1, 10), gene_by_perturbation=Fraction(1, 5)),
    "protective": Truth(flag_by_perturbation=Fraction(1, 6), flag_odds=Fraction(2)),
    "no risk": Truth(flag_by_perturbation=Fraction(1)),
    "no effect of the perturbation": Truth(gene_by_perturbation=Fraction(1)),
    "harmless artifact": Truth(gene_by_artifact=Fraction(1)),
}


def _from_odds(odds: Fraction) -> Fraction:
    return odds / (1 + odds)


def _log(value: Fraction) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64).log()


class Screen:
    """An edited model: the experimenter tosses a coin for each cell, then the cell is a Cradle."""

    def __init__(self, truth: Truth) -> None:
        self.assigned = torch.tensor(float(truth.assigned), dtype=torch.float64)
        self.cradle = make_cradle(truth)

    def __call__(self, batch: Batch) -> Tensor:
        with pyro.plate("assignment", len(batch), dim=-1):
            assigned = pyro.sample(ASSIGNED, dist.Bernoulli(self.assigned))
        return self.cradle(batch.replace(perturbation=assigned.unsqueeze(-1)))


def make_cradle(truth: Truth) -> Cradle:
    """Return the model whose parameters are the logarithms of the odds."""
    settings = {
        "n_latents": 1,
        "n_artifact_latents": 0,
        "latent_effect": False,
        "gene_effect": {"response": False},
        "decoder": {"layers": 0},
        "combine": "sum",
        "depth_shift": False,
    }
    schema = make_schema(n_genes=2, n_perturbations=1, n_artifacts=1)
    model, _ = build_pair(schema, make_config(model=settings), make_statistics(schema), seed=0)
    model = model.double()
    with torch.no_grad():
        model.decoder.bias.zero_()
        model.decoder.linear[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model.artifact_log_odds.fill_(_log(truth.flag_odds))
    return model


def make_cells() -> Batch:
    """Return one cell per row of the table; what it says of d and a is not looked at."""
    ones = torch.ones(len(D), 1, dtype=torch.float64)
    return Batch(
        counts=ones.expand(-1, 2),
        perturbation=ones,
        artifact=ones,
        library=LIBRARY * ones[:, 0],
        covariates=ones[:, :0],
    )


class World(NamedTuple):
    """All (d, a) of the screen under an intervention: their probabilities, and what follows."""

    probability: Tensor
    perturbation: Tensor
    artifact: Tensor
    rate: Tensor
    counts: Tensor

    def mean(self, what: str, *, given: Tensor | None = None) -> float:
        """Return E[what | given] by summing over the rows of the table."""
        weight = self.probability if given is None else self.probability * given
        return float((weight * getattr(self, what)).sum() / weight.sum())


def trace_of(
    screen: Screen, batch: Batch, latents: Mapping[str, Tensor], done: Mapping[str, Tensor]
) -> Mapping[str, Any]:
    """Return the nodes of the program that ``run_world`` runs, for their distributions."""
    world = poutine.condition(poutine.uncondition(screen), data=dict(latents))
    with torch.no_grad():
        return poutine.trace(poutine.do(world, data=dict(done))).get_trace(batch).nodes


def make_world(truth: Truth | None = None, **interventions: float) -> World:
    """Enumerate the screen under ``do`` of the named sites to one value in every cell.

    The rows are the values that d and a would take of themselves. An intervened site leaves them
    their probabilities, whatever it does to their descendants.
    """
    truth = Truth() if truth is None else truth
    screen, batch = Screen(truth), make_cells()
    gene_effect = torch.stack([_log(truth.gene_by_perturbation), torch.tensor(0.0)])
    latents = {
        ASSIGNED: D,
        sites.ARTIFACT: A.unsqueeze(-1),
        sites.Z_BASAL: torch.zeros(len(D), 1, dtype=torch.float64),
        sites.GENE_EFFECT: gene_effect.unsqueeze(0),
        sites.ARTIFACT_EFFECT: _log(truth.gene_by_artifact).reshape(1, 1),
        sites.ARTIFACT_RISK: _log(truth.flag_by_perturbation).reshape(1, 1),
    }
    done = {name: torch.full_like(batch.artifact, value) for name, value in interventions.items()}
    values = run_world(screen, batch, latents, done)
    nodes = trace_of(screen, batch, latents, done)
    # P(d, a): a product of the sites' own probabilities, without the scale of the plate.
    log_probability = sum(
        nodes[name]["fn"].log_prob(nodes[name]["value"]) for name in (ASSIGNED, sites.ARTIFACT)
    )
    torch.testing.assert_close(nodes[sites.RATE]["value"], values[sites.RATE], rtol=0, atol=0)
    return World(
        probability=log_probability.exp(),
        perturbation=values[sites.PERTURBATION].squeeze(-1),
        artifact=values[sites.ARTIFACT].squeeze(-1),
        rate=values[sites.RATE][:, 0],
        counts=nodes[sites.COUNTS]["fn"].mean[:, 0],
    )


def close(value: Fraction) -> object:
    """Return what equals `value` to double precision."""
    return pytest.approx(float(value), rel=1e-12, abs=1e-14)


def test_the_table_is_the_model() -> None:
    world = make_world()
    assert world.rate.tolist() == [close(Fraction(r)) for r in ("1/2", "3/4", "2/3", "6/7")]
    probability = [close(Fraction(n, 20)) for n in (8, 2, 5, 5)]
    assert world.probability.tolist() == probability
    assert torch.equal(world.perturbation, D)
    assert torch.equal(world.artifact, A)


def test_seeing_no_artifact_is_not_doing_none() -> None:
    seen, done = make_world(), make_world(artifact=0.0)
    # P(d = 1 | a = 0) = (5/20) / (13/20): passing cells are less often perturbed than cells are.
    assert seen.mean("perturbation", given=1 - A) == close(Fraction(5, 13))
    assert done.mean("perturbation") == close(Fraction(1, 2))
    # 8/13 · 1/2 + 5/13 · 2/3 against 1/2 · 1/2 + 1/2 · 2/3, and so for counts.
    assert seen.mean("rate", given=1 - A) == close(Fraction(22, 39))
    assert done.mean("rate") == close(Fraction(7, 12))
    assert done.mean("counts") == close(840 * Fraction(7, 12))


def test_seeing_an_artifact_is_not_doing_one() -> None:
    seen, done = make_world(), make_world(artifact=1.0)
    # P(d = 1 | a = 1) = 5/7: 2/7 · 3/4 + 5/7 · 6/7 against 1/2 · 3/4 + 1/2 · 6/7.
    assert seen.mean("rate", given=A) == close(Fraction(81, 98))
    assert done.mean("rate") == close(Fraction(45, 56))


def test_total_effect_is_the_direct_one_and_what_the_artifact_adds() -> None:
    total = [make_world(perturbation=d).mean("rate") for d in (0.0, 1.0)]
    direct = [make_world(perturbation=d, artifact=0.0).mean("rate") for d in (0.0, 1.0)]
    # 4/5 · 1/2 + 1/5 · 3/4 and 1/2 · 2/3 + 1/2 · 6/7, against 1/2 and 2/3.
    assert total == [close(Fraction(11, 20)), close(Fraction(16, 21))]
    assert direct == [close(Fraction(1, 2)), close(Fraction(2, 3))]
    assert total[1] - total[0] == close(Fraction(89, 420))
    assert direct[1] - direct[0] == close(Fraction(70, 420))


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("a", [0, 1])
def test_given_the_perturbation_seeing_and_doing_agree(name, a) -> None:
    truth = TRUTHS[name]
    seen, done = make_world(truth), make_world(truth, artifact=float(a))
    flag = A if a else 1 - A
    for d, arm in enumerate((1 - D, D)):
        assert seen.mean("rate", given=arm * flag) == close(truth.rate(d, a))
        assert done.mean("rate", given=arm) == close(truth.rate(d, a))


@pytest.mark.parametrize("name", TRUTHS)
def test_seeing_and_doing_differ_by_what_a_flag_says_of_the_perturbation(name) -> None:
    truth = TRUTHS[name]
    seen = make_world(truth).mean("rate", given=1 - A)
    done = make_world(truth, artifact=0.0).mean("rate")
    shift = truth.assigned_given_passing() - truth.assigned
    assert seen - done == close(shift * (truth.rate(1, 0) - truth.rate(0, 0)))
    alike = name in ("no risk", "no effect of the perturbation")
    assert (abs(seen - done) < 1e-12) == alike


@pytest.mark.parametrize("name", TRUTHS)
def test_the_perturbation_moves_the_flag_and_the_flag_does_not_move_the_perturbation(name) -> None:
    truth = TRUTHS[name]
    for d in (0, 1):
        world = make_world(truth, perturbation=float(d))
        assert world.mean("artifact") == close(truth.risk(d))
        # Seeing the perturbation says the same: nothing else decides who is perturbed.
        arm = D if d else 1 - D
        assert make_world(truth).mean("artifact", given=arm) == close(truth.risk(d))
    for a in (0.0, 1.0):
        assert make_world(truth, artifact=a).mean("perturbation") == close(truth.assigned)


@pytest.mark.parametrize("name", TRUTHS)
def test_total_and_direct_effect_differ_by_the_change_of_risk(name) -> None:
    truth = TRUTHS[name]
    for d in (0, 1):
        total = make_world(truth, perturbation=float(d)).mean("rate")
        direct = make_world(truth, perturbation=float(d), artifact=0.0).mean("rate")
        harm = truth.rate(d, 1) - truth.rate(d, 0)
        assert total - direct == close(truth.risk(d) * harm)
