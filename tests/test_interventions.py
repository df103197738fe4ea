"""Interventions by name: what may be written, what it means to the model, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tiny import make_data, parameters, shared_fit

from cradle_pyro import cell_effect, counterfactual, intervene, sites
from cradle_pyro.errors import QueryError
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.queries.abduction import Abduction, abduct
from cradle_pyro.queries.interventions import Intervention, check, do, parse_do
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Schema

N_CELLS = 9


@cache
def cells() -> Abduction:
    """Return some cells and all their factual values."""
    posterior = shared_fit()
    batch = make_data().batch(np.arange(N_CELLS))
    with seeded(0):
        return abduct(posterior.model, posterior.guide, batch)


def acts_of(intervention: Intervention, posterior: Posterior | None = None):
    """Return the values of the intervened sites for the cells."""
    checked = check(posterior or shared_fit(), intervention)
    return checked.acts(cells().batch, cells().values)


def design_of(perturbation) -> dict[str, float]:
    """Return the dosages that all cells get."""
    rows = acts_of(do(perturbation=perturbation))[sites.PERTURBATION]
    assert rows.shape == (N_CELLS, 3)
    assert (rows == rows[0]).all()
    return nonzero(shared_fit().schema.perturbations, rows[0])


def flags_of(artifact, posterior: Posterior | None = None) -> dict[str, float]:
    """Return the flags that all cells get."""
    posterior = posterior or shared_fit()
    rows = acts_of(do(artifact=artifact), posterior)[sites.ARTIFACT]
    assert rows.shape == (N_CELLS, posterior.schema.n_artifacts)
    assert (rows == rows[0]).all()
    return nonzero(posterior.schema.artifacts, rows[0])


def nonzero(names, row: torch.Tensor) -> dict[str, float]:
    return {name: value for name, value in zip(names, row.tolist(), strict=True) if value}


def with_flags(*names: str) -> Posterior:
    """Return a posterior of a model with these flags only, as far as interventions see it."""
    posterior = shared_fit()
    failing = torch.ones(3, len(names))
    return replace(
        posterior, schema=replace(posterior.schema, artifacts=names), failing_artifacts=failing
    )


def with_schema(**fields) -> Posterior:
    posterior = shared_fit()
    schema = replace(posterior.schema, **fields)
    assert isinstance(schema, Schema)
    return replace(posterior, schema=schema)


# ----------------------------------------------------------------------- perturbation


@pytest.mark.parametrize(
    ("perturbation", "expected"),
    [
        ("KLF1", {"KLF1": 1}),
        ("CEBPA+GATA1", {"CEBPA": 1, "GATA1": 1}),
        ("GATA1+CEBPA", {"CEBPA": 1, "GATA1": 1}),
        (" KLF1 + CEBPA ", {"CEBPA": 1, "KLF1": 1}),
        ("KLF1+GATA1+CEBPA", {"CEBPA": 1, "GATA1": 1, "KLF1": 1}),
        ("KLF1+KLF1", {"KLF1": 1}),
        ("control", {}),
        ("KLF1+control", {"KLF1": 1}),
        ({"KLF1": 0.5}, {"KLF1": 0.5}),
        ({"KLF1": 2, "CEBPA": 0.25}, {"CEBPA": 0.25, "KLF1": 2}),
        ({"KLF1": 0}, {}),
        ({"control": 1}, {}),
        ({"control": 1, "KLF1": 0.5}, {"KLF1": 0.5}),
        ({}, {}),
    ],
)
def test_perturbation_is_a_row_of_the_design(perturbation, expected) -> None:
    assert design_of(perturbation) == expected


def test_combinations_are_the_same_in_any_order() -> None:
    names = shared_fit().schema.perturbations
    designs = [design_of("+".join(order)) for order in itertools.permutations(names)]
    assert all(design == designs[0] for design in designs)
    assert len(designs[0]) == 3


def test_the_factual_perturbation_is_each_cells_own() -> None:
    acts = acts_of(do(perturbation="factual"))
    assert torch.equal(acts[sites.PERTURBATION], cells().batch.perturbation)
    assert len(acts[sites.PERTURBATION].unique(dim=0)) > 2


def test_labels_are_split_at_the_models_delimiter_and_know_its_control() -> None:
    posterior = with_schema(delimiter="_", control="NT")
    for label in ("CEBPA_KLF1", "KLF1_CEBPA", "KLF1_NT_CEBPA"):
        (row,) = check(posterior, do(perturbation=label)).design.unsqueeze(0).tolist()
        assert row == [1, 0, 1]
    assert not check(posterior, do(perturbation="NT")).design.any()
    with pytest.raises(QueryError, match=r"no perturbation 'CEBPA\+KLF1'.*'NT' for none"):
        check(posterior, do(perturbation="CEBPA+KLF1"))


@pytest.mark.parametrize(
    ("label", "unknown", "near"),
    [
        ("KLF2", "KLF2", "KLF1"),
        ("CEBPA+klf1", "klf1", "KLF1"),
        ("CEBPB+KLF1", "CEBPB", "CEBPA"),
        ("Control", "Control", None),
        ("", "", None),
        ("KLF1+", "", None),
        ({"GATA2": 0.5}, "GATA2", "GATA1"),
        ("ZZZ", "ZZZ", None),
    ],
)
def test_unknown_perturbation_is_an_error_that_names_near_ones(label, unknown, near) -> None:
    with pytest.raises(QueryError, match=f"no perturbation '{unknown}'") as error:
        check(shared_fit(), do(perturbation=label))
    text = str(error.value)
    assert ("did you mean" in text) == (near is not None)
    assert near is None or f"did you mean '{near}'?" in text
    assert "Known: 'CEBPA', 'GATA1', 'KLF1', and 'control' for none." in text
    assert "?." not in text


@pytest.mark.parametrize("dosage", [-0.5, float("nan"), float("inf")])
def test_a_dosage_is_a_number_from_zero(dosage) -> None:
    with pytest.raises(QueryError, match=rf"dosage is a number >= 0, found {dosage} for 'KLF1'"):
        check(shared_fit(), do(perturbation={"KLF1": dosage}))


# ----------------------------------------------------------------------- artifact


@pytest.mark.parametrize(
    ("artifact", "expected"),
    [
        (0, {}),
        (0.0, {}),
        (False, {}),
        (np.int64(0), {}),
        ("high_mito", {"high_mito": 1}),
        ("high_mito+low_counts", {"high_mito": 1, "low_counts": 1}),
        (" low_counts + high_mito ", {"high_mito": 1, "low_counts": 1}),
        ({"high_mito": 0.5}, {"high_mito": 0.5}),
        ({"high_mito": 0.25, "low_genes": 1}, {"high_mito": 0.25, "low_genes": 1}),
        ({"high_mito": 0}, {}),
        ({}, {}),
    ],
)
def test_artifact_is_a_row_of_flags(artifact, expected) -> None:
    assert flags_of(artifact) == expected


def test_the_factual_artifact_is_each_cells_own() -> None:
    acts = acts_of(do(artifact="factual"))
    assert torch.equal(acts[sites.ARTIFACT], cells().batch.artifact)


def test_typical_flags_are_those_of_failing_training_cells() -> None:
    posterior = shared_fit()
    checked = check(posterior, do(artifact="typical"))
    rows = []
    for seed in range(40):
        with seeded(seed):
            rows.append(checked.acts(*cells()[::3])[sites.ARTIFACT])
            # All worlds of a draw meet the same ones.
            assert torch.equal(checked.acts(*cells()[::3])[sites.ARTIFACT], rows[-1])
    rows = torch.cat(rows)
    pool = {tuple(row) for row in posterior.failing_artifacts.tolist()}
    found = [tuple(row) for row in rows.tolist()]
    assert set(found) == pool
    assert len(pool) > 2
    # As often as they have them, not each kind alike.
    share = rows.mean(0) - posterior.failing_artifacts.mean(0)
    assert share.abs().max() < 5 * np.sqrt(0.25 / len(rows))


def test_typical_flags_need_failing_training_cells() -> None:
    posterior = replace(shared_fit(), failing_artifacts=torch.zeros(0, 5))
    with pytest.raises(QueryError, match="needs failing training cells, and there were none"):
        check(posterior, do(artifact="typical"))
    assert flags_of(0, posterior) == {}


@pytest.mark.parametrize("artifact", [1, 1.0, True, 0.5])
def test_a_bare_number_is_a_flag_only_where_there_is_one(artifact) -> None:
    assert flags_of(artifact, with_flags("any")) == {"any": float(artifact)}
    with pytest.raises(QueryError, match=r"does not say which.*'low_counts', .*'typical'"):
        check(shared_fit(), do(artifact=artifact))


def test_a_model_without_flags_knows_only_none() -> None:
    posterior = replace(
        shared_fit(),
        schema=replace(shared_fit().schema, artifacts=()),
        failing_artifacts=torch.zeros(0, 0),
    )
    assert check(posterior, do(artifact=0)).flags.shape == (0,)
    assert check(posterior, do(artifact="factual")).flags == "factual"
    for artifact in (1, "high_mito", "typical", {"high_mito": 1}):
        with pytest.raises(QueryError, match="trained without artifact flags; only 0 and 'fact"):
            check(posterior, do(artifact=artifact))


@pytest.mark.parametrize(
    ("artifact", "unknown", "near"),
    [
        ("high_mit", "high_mit", "high_mito"),
        ("HIGH_MITO", "HIGH_MITO", "high_mito"),
        ("high_mito+lowcounts", "lowcounts", "low_counts"),
        ({"low_gene": 0.5}, "low_gene", "low_genes"),
        ("any", "any", None),
        ("", "", None),
        ("0", "0", None),
    ],
)
def test_unknown_flag_is_an_error_that_names_near_ones(artifact, unknown, near) -> None:
    with pytest.raises(QueryError, match=f"no artifact flag '{unknown}'") as error:
        check(shared_fit(), do(artifact=artifact))
    assert ("did you mean" in str(error.value)) == (near is not None)
    assert near is None or f"'{near}'" in str(error.value).split("Known:")[0]
    assert "or 0, 'factual', 'typical'." in str(error.value)
    assert "?." not in str(error.value)


@pytest.mark.parametrize("severity", [-0.1, 1.1, float("nan")])
def test_a_severity_lies_between_zero_and_one(severity) -> None:
    with pytest.raises(QueryError, match=rf"in \[0, 1\], found {severity} for 'high_mito'"):
        check(shared_fit(), do(artifact={"high_mito": severity}))
    with pytest.raises(QueryError, match=rf"in \[0, 1\], found {severity} for 'any'"):
        check(with_flags("any"), do(artifact=severity))


@pytest.mark.parametrize(
    "given", [{"perturbation": {"KLF1": "high"}}, {"artifact": {"high_mito": "much"}}], ids=str
)
def test_a_dosage_or_severity_that_is_no_number_is_an_error(given) -> None:
    with pytest.raises(QueryError, match=r"high|much"):
        check(shared_fit(), do(**given))


# ----------------------------------------------------------------------- library


@pytest.mark.parametrize("library", [5000, 0.5, np.float32(12)])
def test_library_is_a_number_of_counts_for_every_cell(library) -> None:
    acts = acts_of(do(library=library))
    assert acts.keys() == {sites.LIBRARY}
    assert acts[sites.LIBRARY].tolist() == [float(library)] * N_CELLS


def test_the_factual_library_is_each_cells_own() -> None:
    acts = acts_of(do(library="factual"))
    assert torch.equal(acts[sites.LIBRARY], cells().batch.library)


@pytest.mark.parametrize("library", [0, -1, float("nan"), float("inf"), "typical", "5000"])
def test_an_impossible_library_is_an_error(library) -> None:
    with pytest.raises(QueryError, match=rf"library is a .*number of counts.*found '?{library}"):
        do(library=library)


@pytest.mark.parametrize(
    "given",
    [
        {"perturbation": 1},
        {"perturbation": ["KLF1", "CEBPA"]},
        {"artifact": [1, 0]},
        {"artifact": torch.zeros(2)},
        {"library": [5000]},
        {"library": {"all": 1}},
        {"sites": 3},
        {"sites": "z_basal"},
        {"sites": {sites.Z_BASAL: "typical"}},
        {"sites": {sites.Z_BASAL: [0.0, 1.0]}},
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_an_error(given) -> None:
    name, value = next(iter(given.items()))
    if name == "sites" and isinstance(value, dict):
        name, value = next(iter(value.items()))
    with pytest.raises(QueryError, match=f"{name} cannot be a {type(value).__name__}"):
        do(**given)


# ----------------------------------------------------------------------- further sites


@pytest.mark.parametrize(
    ("site", "value"),
    [
        (sites.Z_BASAL, 0.5),
        (sites.Z_BASAL, 2),
        (sites.Z_BASAL, torch.tensor([1.0, 2.0, 3.0])),
        (sites.Z_BASAL, torch.arange(3 * N_CELLS).reshape(N_CELLS, 3)),
        (sites.Z_ARTIFACT, torch.tensor([1.0, 2.0])),
        (sites.PERTURBATION_SHIFT, 0.0),
        (sites.RATE, torch.linspace(0, 1, 60)),
        (sites.EFFECT, torch.zeros(3, 3)),
        (sites.DEPTH_SHIFT, -0.5),
        (sites.COUNTS, 3.0),
    ],
    ids=str,
)
def test_further_sites_get_their_full_shape(site, value) -> None:
    acts = acts_of(do(sites={site: value}))
    assert acts.keys() == {site}
    expected = torch.as_tensor(value).float().expand(cells().values[site].shape)
    assert torch.equal(acts[site], expected)
    assert acts[site].dtype == torch.float32


@pytest.mark.parametrize(
    ("site", "near"),
    [("z_basl", "z_basal"), ("Z_BASAL", "z_basal"), ("artefact_shift", "artifact_shift")],
)
def test_a_misspelt_site_is_an_error_that_names_near_ones(site, near) -> None:
    with pytest.raises(QueryError, match=f"no site '{site}'; did you mean '{near}'.*'rate'"):
        check(shared_fit(), do(sites={site: 0}))
    with pytest.raises(QueryError, match=r"'\? Its sites"):
        check(shared_fit(), do(sites={site: 0}))


@pytest.mark.parametrize("site", [sites.CELLS, sites.PERTURBATIONS, "qqq"])
def test_what_is_no_site_is_an_error_that_shows_the_sites(site) -> None:
    with pytest.raises(QueryError, match=f"no site '{site}'.*'z_basal', .*'rate', 'counts'"):
        check(shared_fit(), do(sites={site: 0}))


@pytest.mark.parametrize("shape", [(4,), (N_CELLS + 1, 3), (N_CELLS, 4), (1, N_CELLS, 3)])
def test_a_value_of_another_shape_is_an_error(shape) -> None:
    with pytest.raises(QueryError, match=r"Site 'z_basal'.*of shape \(.*"):
        acts_of(do(sites={sites.Z_BASAL: torch.zeros(shape)}))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), torch.tensor([0.0, float("nan"), 0])]
)
def test_a_value_that_is_not_finite_is_an_error(value) -> None:
    with pytest.raises(QueryError, match=r"z_basal.*(nan|inf)"):
        check(shared_fit(), do(sites={sites.Z_BASAL: value}))


@pytest.mark.parametrize("site", ["perturbation", "artifact", "library"])
def test_sites_with_words_of_their_own_are_given_by_keyword(site) -> None:
    with pytest.raises(QueryError, match=f"Give '{site}' as a keyword of do"):
        do(sites={site: 1.0})


def test_interventions_of_a_caller_are_not_those_of_the_mapping_it_changes_later() -> None:
    given = {sites.Z_BASAL: 0.0}
    intervention = do(sites=given)
    given[sites.Z_BASAL] = 5.0
    assert not acts_of(intervention)[sites.Z_BASAL].any()


# ----------------------------------------------------------------------- several interventions


PARTS = {
    "perturbation": do(perturbation="KLF1"),
    "artifact": do(artifact=0),
    "library": do(library=5000),
    sites.Z_BASAL: do(sites={sites.Z_BASAL: 1.0}),
    sites.EFFECT: do(sites={sites.EFFECT: 0.5}),
}


def test_joined_interventions_are_one_in_any_order() -> None:
    together = do(
        perturbation="KLF1", artifact=0, library=5000, sites={sites.Z_BASAL: 1, sites.EFFECT: 0.5}
    )
    expected = acts_of(together)
    assert expected.keys() == PARTS.keys()
    for order in itertools.permutations(PARTS.values()):
        joined = do()
        for part in order:
            joined = joined | part
        assert joined == together
    found = acts_of(joined)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", PARTS)
def test_two_values_of_one_site_are_an_error(name) -> None:
    rest = PARTS["library" if name != "library" else "artifact"]
    with pytest.raises(QueryError, match=f"Both .* act on '{name}'. Leave one of them out"):
        _ = (PARTS[name] | rest) | PARTS[name]


def test_joining_leaves_its_parts_as_they_were() -> None:
    first, second = do(perturbation="KLF1"), do(sites={sites.Z_BASAL: 1.0})
    _ = first | second
    assert (str(first), str(second)) == ("do(perturbation=KLF1)", "do(z_basal=1)")


def test_nothing_is_joined_without_a_trace() -> None:
    assert do() | do() == do()
    assert PARTS["artifact"] | do() == PARTS["artifact"] == do() | PARTS["artifact"]
    assert acts_of(do()) == {}


@pytest.mark.parametrize("given", ["perturbation=KLF1", {"perturbation": "KLF1"}, None, 0])
def test_what_is_no_intervention_is_an_error(given) -> None:
    kind = type(given).__name__
    with pytest.raises(QueryError, match=rf"an intervention such as do\(.*, found {kind}\."):
        check(shared_fit(), given)


# ----------------------------------------------------------------------- as text


@pytest.mark.parametrize(
    ("intervention", "text"),
    [
        (do(), "do()"),
        (do(perturbation="KLF1+CEBPA"), "do(perturbation=KLF1+CEBPA)"),
        (do(perturbation={"KLF1": 0.5, "CEBPA": 1}), "do(perturbation=KLF1=0.5+CEBPA=1)"),
        (do(perturbation={}), "do(perturbation={})"),
        (do(artifact=0), "do(artifact=0)"),
        (do(artifact="typical", library=5000.0), "do(artifact=typical, library=5000)"),
        (do(artifact={"high_mito": 0.25}), "do(artifact=high_mito=0.25)"),
        (do(library="factual"), "do(library=factual)"),
        (do(sites={"z_basal": 0.5, "rate": torch.ones(60)}), "do(z_basal=0.5, rate=tensor(60,))"),
        (do(sites={"z_basal": torch.tensor([2.0])}), "do(z_basal=2)"),
    ],
    ids=str,
)
def test_an_intervention_says_what_it_does(intervention, text) -> None:
    assert str(intervention) == text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], do()),
        (["perturbation=KLF1+CEBPA"], do(perturbation="KLF1+CEBPA")),
        (["perturbation=control"], do(perturbation="control")),
        (["perturbation=KLF1=0.5"], do(perturbation={"KLF1": 0.5})),
        (["perturbation=KLF1=0.5+CEBPA"], do(perturbation={"KLF1": 0.5, "CEBPA": 1.0})),
        (["perturbation = KLF1 = 0.5 + CEBPA = 2"], do(perturbation={"KLF1": 0.5, "CEBPA": 2.0})),
        (["perturbation=factual"], do(perturbation="factual")),
        (["perturbation=7"], do(perturbation="7")),  # a label, even if it looks like a number
        (["artifact=0"], do(artifact=0)),
        ([" artifact = 0 "], do(artifact=0)),
        (["artifact=1"], do(artifact=1)),
        (["artifact=factual"], do(artifact="factual")),
        (["artifact=typical"], do(artifact="typical")),
        (["artifact=high_mito+doublet"], do(artifact="high_mito+doublet")),
        (["artifact=high_mito=0.5"], do(artifact={"high_mito": 0.5})),
        (["library=5e3"], do(library=5000)),
        (["library=factual"], do(library="factual")),
        (["z_basal=-1.5"], do(sites={"z_basal": -1.5})),
        (
            ["library=10", "rate=0", "artifact=0", "perturbation=A", "z_basal=1"],
            do(perturbation="A", artifact=0, library=10, sites={"rate": 0, "z_basal": 1}),
        ),
    ],
    ids=str,
)
def test_texts_of_the_command_line_are_interventions(settings, expected) -> None:
    assert parse_do(settings) == expected


@pytest.mark.parametrize("text", ["", " ", "=", "artifact", "artifact=", "=0", " = ", "artifact= "])
def test_a_text_that_is_not_site_and_value_is_an_error(text) -> None:
    with pytest.raises(QueryError, match=rf"Expected site=value, found '{text}'. Example: --do"):
        parse_do([text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perturbation=KLF1=", "Expected perturbation levels such as A=0.5"),
        ("perturbation==0.5", "Expected perturbation levels such as A=0.5"),
        ("perturbation=KLF1=much", "Expected perturbation levels such as A=0.5"),
        ("perturbation=KLF1=0.5+", "Expected perturbation levels such as A=0.5"),
        ("perturbation=KLF1=0.5=2", "Expected perturbation levels such as A=0.5"),
        ("perturbation=KLF1=0.5+KLF1=0.7", "one perturbation level of each, found 'KLF1' twice"),
        ("perturbation=KLF1 = 0.5 + KLF1", "one perturbation level of each, found 'KLF1' twice"),
        ("artifact=high_mito=0.5+high_mito=0.5", "one artifact level of each, found 'high_mito'"),
        ("artifact=high_mito=bad", "Expected artifact levels such as A=0.5"),
        ("library=many", "library is a number of counts or 'factual', found 'many'"),
        ("library=-5", "library is a positive number of counts, found -5"),
        ("library=nan", "library is a positive number of counts, found nan"),
        ("z_basal=high", "Site 'z_basal' is set to a number, found 'high'"),
    ],
)
def test_a_text_with_an_impossible_value_is_an_error(text, message) -> None:
    with pytest.raises(QueryError, match=message):
        parse_do([text])


def test_two_texts_about_one_site_are_an_error() -> None:
    with pytest.raises(QueryError, match="act on 'artifact'"):
        parse_do(["artifact=0", "perturbation=KLF1", "artifact=high_mito"])


# ----------------------------------------------------------------------- what a query leaves alone


QUERIES = {
    "check": lambda p, act: check(p, act),
    "counterfactual": lambda p, act: counterfactual(p, some_cells(), act, draws=2),
    "cell_effect": lambda p, act: cell_effect(p, some_cells(), act, draws=2),
    "intervene": lambda p, act: intervene(p, act, 4),
    "intervene cells": lambda p, act: intervene(p, act, 4, population=some_cells()),
}
ASKED = {
    "typical": do(perturbation="KLF1", artifact="typical"),
    "nothing": do(),
    "site": do(sites={sites.Z_BASAL: 0.5}),
}


def some_cells():
    return make_data().subset(np.arange(N_CELLS))


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("asked", ASKED)
def test_a_query_leaves_the_callers_random_state(query, asked) -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    QUERIES[query](shared_fit(), ASKED[asked])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()  # noqa: NPY002


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_leaves_the_pair_as_it_was(query) -> None:
    posterior = shared_fit()
    before = parameters(posterior)
    training = [module.training for module in (posterior.model, posterior.guide)]
    for asked in ASKED.values():
        QUERIES[query](posterior, asked)
    assert parameters(posterior) == before
    assert [module.training for module in (posterior.model, posterior.guide)] == training
    assert all(value.grad is None for value in posterior.model.parameters())
