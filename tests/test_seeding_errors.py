"""Layer 0: error labels, scoped randomness, and the batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cradle_pyro import errors
from cradle_pyro.errors import CradleError, DataWarning, near, shown
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch, Schema


def make_batch(n_cells: int = 4, *, with_partner: bool = False) -> Batch:
    """Return a batch whose every row is recognisable by its library."""
    rows = torch.arange(n_cells, dtype=torch.float32)
    return Batch(
        counts=rows[:, None] + torch.arange(3.0),
        perturbation=torch.stack([rows % 2, 1 - rows % 2], dim=1),
        artifact=(rows[:, None] > 1).float(),
        library=100 + rows,
        covariates=torch.zeros(n_cells, 0),
        artifact_observed=rows < 3,
        partner=make_batch(2) if with_partner else None,
        partner_rows=torch.tensor([0, 3]) if with_partner else None,
    )


# errors


def test_every_error_is_a_cradle_error_and_the_warning_is_not() -> None:
    names = [name for name in errors.__all__ if name.endswith("Error")]
    assert len(names) == 6
    assert all(issubclass(getattr(errors, name), CradleError) for name in names)
    assert issubclass(DataWarning, UserWarning)
    assert not issubclass(DataWarning, CradleError)


@given(st.lists(st.integers(), max_size=12), st.integers(1, 8))
def test_shown_accounts_for_every_label(labels: list[int], most: int) -> None:
    text = shown(labels, most=most)
    more = int(text.split(" and ")[1].split()[0]) if " more" in text else 0
    assert text.count("'") // 2 + more == len(labels)
    assert all(repr(str(label)) in text for label in labels[:most])
    assert (more > 0) == (len(labels) > most)


def test_shown_takes_any_iterable_once() -> None:
    assert shown(name for name in ["A", "B", "C"]) == "'A', 'B', 'C'"
    assert shown([]) == ""


def test_near_ignores_case_and_returns_the_known_spelling() -> None:
    assert near("klf1", ["KLF1", "TP53"]) == "; did you mean 'KLF1'?"
    assert near("zzz", ["KLF1", "TP53"]) == ""
    assert near("anything", []) == ""


def test_near_names_the_closest_first_and_no_more_than_asked() -> None:
    known = ["CEBPB", "CEBPA", "CEBPE", "CEBPD"]
    assert near("CEBPA", known).startswith("; did you mean 'CEBPA'")
    assert near("CEBPA", known, most=2).count("CEBP") == 2


# seeding


def test_seeded_repeats_its_draws_and_seeds_differ() -> None:
    draws = []
    for seed in (3, 3, 4):
        with seeded(seed):
            draws.append(torch.distributions.Gamma(2.0, 1.0).sample((5,)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_seeded_leaves_the_callers_stream_untouched() -> None:
    with seeded(0):
        expected = torch.rand(6)
    with seeded(0):
        found = [torch.rand(3)]
        with seeded(7):
            torch.rand(100)
        found.append(torch.rand(3))
    assert torch.equal(torch.cat(found), expected)


def test_seeded_restores_the_state_after_an_error() -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError), seeded(1):
        torch.rand(2) @ torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)


# types


def test_schema_counts_its_names() -> None:
    schema = Schema(
        genes=("G1", "G2", "G3"),
        perturbations=("A", "B"),
        artifacts=("doublet",),
        covariates=(("batch", ("1", "2", "3")), ("line", ("K562", "RPE1"))),
    )
    sizes = schema.n_genes, schema.n_perturbations, schema.n_artifacts, schema.n_covariate_levels
    assert sizes == (3, 2, 1, 5)
    assert Schema(genes=(), perturbations=()).n_covariate_levels == 0


def test_take_keeps_rows_together_in_the_order_asked() -> None:
    taken = make_batch().take(torch.tensor([3, 0, 3]))
    assert len(taken) == 3
    assert taken.library.tolist() == [103, 100, 103]
    assert taken.counts[:, 0].tolist() == [3, 0, 3]
    assert taken.perturbation.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert taken.artifact.tolist() == [[1], [0], [1]]
    assert taken.artifact_observed.tolist() == [False, True, False]
    assert taken.covariates.shape == (3, 0)


def test_take_drops_partners_whose_rows_would_no_longer_fit() -> None:
    whole = make_batch(with_partner=True)
    taken = whole.take(torch.tensor([1]))
    assert taken.partner is None
    assert taken.partner_rows is None
    assert whole.partner is not None


def test_take_of_no_rows_is_an_empty_batch() -> None:
    assert len(make_batch().take(torch.zeros(0, dtype=torch.long))) == 0


def test_to_moves_every_tensor_and_the_partner() -> None:
    moved = make_batch(with_partner=True).to("meta")
    for batch in (moved, moved.partner):
        for field in dataclasses.fields(Batch):
            value = getattr(batch, field.name)
            if isinstance(value, torch.Tensor):
                assert value.device.type == "meta", field.name
    assert moved.partner_rows.device.type == "meta"


def test_to_keeps_missing_fields_missing() -> None:
    moved = make_batch().replace(artifact_observed=None).to("cpu")
    assert moved.artifact_observed is None
    assert moved.partner is None


def test_replace_changes_only_the_fields_named() -> None:
    batch = make_batch(with_partner=True)
    other = batch.replace(library=torch.ones(4))
    assert other.library.tolist() == [1, 1, 1, 1]
    assert batch.library.tolist() == [100, 101, 102, 103]
    same = [field.name for field in dataclasses.fields(Batch) if field.name != "library"]
    assert all(getattr(other, name) is getattr(batch, name) for name in same)


def test_replace_refuses_an_unknown_field() -> None:
    with pytest.raises(TypeError, match="artefact"):
        make_batch().replace(artefact=torch.ones(4, 1))


def test_batch_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_batch().library = torch.ones(4)
