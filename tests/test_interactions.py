"""What pairs do beyond the sum of their members, asked about all at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from tiny import shared_fit

from cradle_pyro.errors import QueryError
from cradle_pyro.queries import effects as queries
from cradle_pyro.queries.calls import sign_calls
from cradle_pyro.queries.effects import interaction, interactions

FEW = {"draws": 4, "n_cells": 6, "seed": 3}


def all_pairs() -> list[str]:
    first, second, third = shared_fit().schema.perturbations
    return [f"{first}+{second}", f"{third}+{first}", f"{second}+{third}"]


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Worlds as they are evaluated, one entry for each draw of each."""
    seen: list[str] = []
    expression = queries._expression

    def counted(posterior, abduction, worlds, scale):
        seen.extend(str(one.intervention) for one in worlds)
        return expression(posterior, abduction, worlds, scale)

    monkeypatch.setattr(queries, "_expression", counted)
    return seen


@pytest.mark.parametrize("kind", ["direct", "total"])
def test_each_row_summarises_the_interaction_of_its_pair(kind):
    table = interactions(shared_fit(), all_pairs(), kind=kind, least_effect=0.01, **FEW)
    assert table["label"].tolist() == all_pairs()
    for row in table.itertuples():
        alone = interaction(shared_fit(), row.label, kind=kind, **FEW)
        mean = alone["mean"].to_numpy()
        assert {row.first, row.second} == set(row.label.split("+"))
        assert row.strength == pytest.approx(np.sqrt((mean**2).mean()), rel=1e-4, abs=1e-6)
        assert row.strength > 1e-5
        called = sign_calls(alone["lfsr"].to_numpy()) & (np.abs(mean) >= 0.01)
        # A draw of exactly zero may be a rounding error off in another order of summation.
        assert abs(row.n_called - called.sum()) <= 1
        assert row.largest_mean == pytest.approx(mean[np.abs(mean).argmax()], rel=1e-4, abs=1e-6)
        assert row.largest_gene == alone["gene"][np.abs(mean).argmax()]
        assert row.out_of_support == alone["out_of_support"].all()


def test_only_pairs_that_were_not_screened_are_out_of_support():
    table = interactions(shared_fit(), all_pairs(), **FEW)
    screened = shared_fit().labels.query("train > 0")["label"]
    expected = ["+".join(sorted(pair.split("+"))) not in set(screened) for pair in all_pairs()]
    assert table["out_of_support"].tolist() == expected
    assert 0 < sum(expected) < 3
    assert len(table.attrs["cradle_query"]["out_of_support"]) == sum(expected)


def test_pairs_of_a_member_that_was_never_screened_alone_are_out_of_support():
    posterior = shared_fit()
    labels = posterior.labels.copy()
    labels.loc[labels["label"] == "KLF1", "train"] = 0
    table = interactions(dataclasses.replace(posterior, labels=labels), all_pairs(), **FEW)
    with_klf1 = table["label"].str.split("+").map(lambda members: "KLF1" in members)
    assert with_klf1.any()
    assert table.loc[with_klf1, "out_of_support"].all()


def test_all_pairs_of_the_screen_are_asked_about():
    labels = shared_fit().labels["label"]
    table = interactions(shared_fit(), **FEW)
    assert table["label"].tolist() == labels[labels.str.contains("+", regex=False)].tolist()


def test_pairs_share_the_worlds_of_their_members(predictions):
    interactions(shared_fit(), all_pairs(), **FEW)
    assert len(predictions) == FEW["draws"] * (1 + 3 + 3)  # control, members, pairs
    assert len(set(predictions)) == 7


def test_pairs_answered_in_blocks_are_the_same(predictions, monkeypatch):
    whole = interactions(shared_fit(), all_pairs(), **FEW)
    predictions.clear()
    three_worlds = 3 * FEW["draws"] * shared_fit().schema.n_genes
    monkeypatch.setattr(queries, "_ENTRIES_AT_A_TIME", three_worlds)
    blocks = interactions(shared_fit(), all_pairs(), **FEW)
    assert len(predictions) == FEW["draws"] * 3 * (1 + 3)
    assert_frame_equal(blocks, whole)


def test_blocks_hold_as_many_worlds_as_they_may_and_every_pair_once():
    members = [(f"P{i}", f"P{j}") for i in range(9) for j in range(i)]
    blocks = list(queries._blocks_of_pairs(members, 12))
    assert [k for block in blocks for k in block] == list(range(len(members)))
    sizes = [len(b) + len({name for k in b for name in members[k]}) for b in blocks]
    assert max(sizes) <= 12
    assert min(sizes[:-1]) >= 10


def test_genes_of_a_sure_sign_are_counted_if_they_are_large():
    schema = shared_fit().schema
    sign = np.where(np.arange(20) % 2, 1.0, -1.0)[:, None]
    values = np.tile(0.9 * sign, schema.n_genes)  # open sign
    values[:, :5], values[:, 5:9] = -0.5, 0.05
    values[0, 4] = 0.1  # one draw of 20
    counts = [queries._strength(schema, values, least)["n_called"] for least in (0, 0.1, 0.6)]
    assert counts == [9, 5, 0]
    found = queries._strength(schema, values, 0)
    assert found["largest_gene"] in schema.genes[:4]
    assert found["largest_mean"] == pytest.approx(-0.5)


def test_the_query_is_recorded():
    record = interactions(shared_fit(), **FEW).attrs["cradle_query"]
    assert record["reference"] == "do(perturbation=control, artifact=0)"
    assert {name: record[name] for name in FEW} == FEW
    assert record["kind"] == "direct"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["{0}"], "labels of two perturbations, found '{0}'"),
        (["{0}+{1}+{2}"], "For more than two, ask for one interaction"),
        (["{0}+{1}", "{1}+{0}"], "different pairs"),
        ([], "none in the screen"),
        (["{0}+KLF99"], "KLF99"),
    ],
)
def test_labels_that_are_no_pairs_are_refused(pairs, message):
    names = shared_fit().schema.perturbations
    pairs = [pair.format(*names) for pair in pairs]
    with pytest.raises(QueryError) as caught:
        interactions(shared_fit(), pairs, **FEW)
    assert message.format(*names) in str(caught.value)


@pytest.mark.parametrize("option", [{"kind": "all"}, {"draws": 0}, {"n_cells": 0}])
def test_impossible_settings_are_refused(option):
    with pytest.raises(QueryError):
        interactions(shared_fit(), all_pairs(), **FEW | option)


def test_progress_is_shown_on_request(capsys):
    table = interactions(shared_fit(), all_pairs()[:1], **FEW, progress=True)
    assert "Interactions" in capsys.readouterr().err
    assert isinstance(table, pd.DataFrame)
