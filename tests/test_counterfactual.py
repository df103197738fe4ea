"""The public queries of single cells and of generated ones: what comes back, and for what."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from pyro import distributions as dist
from pyro import poutine, sample
from tiny import make_config, make_data, make_fit, make_screen, shared_fit

from cradle_pyro import (
    average_effect,
    cell_effect,
    counterfactual,
    do,
    effects,
    intervene,
    sites,
)
from cradle_pyro.data.prepare import prepare
from cradle_pyro.errors import DataError, QueryError
from cradle_pyro.inference.posterior import Posterior, ReferenceCells
from cradle_pyro.model.cradle import Cradle, cells_plate
from cradle_pyro.model.intervene import given_values
from cradle_pyro.model.likelihoods import NegativeBinomialLikelihood, PoissonLikelihood
from cradle_pyro.model.noise import count_elements
from cradle_pyro.model.quantiles import NegativeBinomialCounts
from cradle_pyro.queries import counterfactual as module
from cradle_pyro.queries.counterfactual import write_counterfactual
from cradle_pyro.queries.draws import over_draws, seed_of
from cradle_pyro.queries.effects import compare

FACTUAL = do(perturbation="factual", artifact="factual")
LAYERS = ("counts", "rate", "rate_sd")


@cache
def _cells() -> AnnData:
    # Every split and every kind of cell.
    return prepare(make_screen(), make_config()).adata[::4].copy()


def make_cells() -> AnnData:
    """Return some cells of the screen that the caller may change."""
    return _cells().copy()


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def asked(intervention=FACTUAL, cells=None, posterior=None, **options) -> AnnData:
    """Return a counterfactual of few draws."""
    cells = make_cells() if cells is None else cells
    return counterfactual(posterior or shared_fit(), cells, intervention, **{"draws": 2} | options)


def generated(intervention, n_cells: int, posterior=None, **options) -> AnnData:
    """Return generated cells of few draws."""
    return intervene(posterior or shared_fit(), intervention, n_cells, **{"draws": 2} | options)


def assert_same(first: AnnData, second: AnnData) -> None:
    """Raise unless two answers hold the same numbers, bit for bit."""
    assert first.layers.keys() == second.layers.keys()
    for name in first.layers:
        np.testing.assert_array_equal(dense(first.layers[name]), dense(second.layers[name]))
    pd.testing.assert_frame_equal(first.obs, second.obs)


def with_labels(**n_train: int) -> Posterior:
    """Return the posterior as if labels had had so many training cells."""
    labels = shared_fit().labels.set_index("label")
    for label, number in n_train.items():
        labels.loc[label.replace("_", "+"), "train"] = number
    return dataclasses.replace(shared_fit(), labels=labels.reset_index())


# ----------------------------------------------------------------------- the factual world


@pytest.mark.parametrize("intervention", [do(), FACTUAL, FACTUAL | do(library="factual")], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_the_factual_counts_come_back_exactly_in_chunks_of_any_size(intervention, chunk) -> None:
    cells = make_cells()[::4].copy()
    counts = dense(cells.layers["counts"])
    answer = asked(intervention, cells, chunk=chunk, count_draws=2)
    for layer in ("counts", "counts_1"):
        np.testing.assert_array_equal(dense(answer.layers[layer]), counts)
    np.testing.assert_array_equal(answer.obs["cradle_library"], counts.sum(1))


def test_missing_flags_are_filled_in_and_the_factual_counts_come_back() -> None:
    cells = make_cells()
    flags = [c for c in cells.obs if c.startswith("cradle_qc_") and not c.endswith("severity")]
    flags = [c for c in flags if "metric" not in c]
    cells.obs[flags] = cells.obs[flags].astype(float)
    cells.obs.loc[cells.obs_names[::3], flags] = np.nan
    answer = asked(FACTUAL, cells)
    np.testing.assert_array_equal(dense(answer.layers["counts"]), dense(cells.layers["counts"]))
    cleaned = asked(do(artifact=0), cells)
    assert np.isfinite(cleaned.layers["rate"]).all()
    assert (dense(cleaned.layers["counts"]) != dense(cells.layers["counts"]))[::3].any()


@cache
def lognormal_fit() -> tuple[Posterior, AnnData]:
    settings = ("data.layer=lognorm", "data.values=lognorm", "model.likelihood=normal")
    adata = prepare(make_screen(), make_config()).adata
    counts = dense(adata.layers["counts"])
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    adata.layers["lognorm"] = values.astype(np.float32)
    data = prepare(adata, make_config(*settings)).data
    return make_fit(*settings, data=data), adata[::4].copy()


def test_log_normalised_values_come_back_exactly_and_stay_dense() -> None:
    posterior, cells = lognormal_fit()
    answer = asked(FACTUAL, cells, posterior)
    assert isinstance(answer.layers["counts"], np.ndarray)
    np.testing.assert_array_equal(answer.layers["counts"], cells.layers["lognorm"])
    other = asked(do(perturbation="KLF1"), cells, posterior)
    assert (other.layers["counts"] != cells.layers["lognorm"]).any()
    effect = cell_effect(posterior, cells, do(perturbation="KLF1"), draws=2)
    moved = (other.layers["rate"] - answer.layers["rate"]) / np.log(2)
    np.testing.assert_allclose(effect.X, moved, atol=1e-5)


# ----------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("count_draws", [0, 1, 3])
def test_answers_have_the_documented_layers(count_draws) -> None:
    answer = asked(do(artifact=0), draws=3, count_draws=count_draws)
    counts = [f"counts_{k}" if k else "counts" for k in range(count_draws)]
    assert set(answer.layers) == {"rate", "rate_sd", *counts}
    assert all(answer.layers[name].dtype == np.float32 for name in answer.layers)
    for name in counts:
        assert sp.issparse(answer.layers[name])
        values = answer.layers[name].data
        assert (values > 0).all()
        assert (values == values.round()).all()
        # Each is a draw of the counterfactual ones, not the factual counts.
        assert (answer.layers[name] != make_cells().layers["counts"]).nnz
    if count_draws:
        assert (answer.layers["counts"] != answer.X).nnz == 0
    else:
        assert answer.X is None
    if count_draws == 3:
        assert (answer.layers["counts_1"] != answer.layers["counts_2"]).nnz
    assert (answer.layers["rate_sd"] > 0).all()


def test_cells_keep_their_order_and_their_columns() -> None:
    cells = make_cells()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    cells = cells[order].copy()
    cells.obs["mine"] = np.arange(cells.n_obs)
    answer = asked(do(artifact=0), cells)
    assert list(answer.obs_names) == list(cells.obs_names)
    added = ["cradle_out_of_support", "cradle_library"]
    pd.testing.assert_frame_equal(answer.obs.drop(columns=added), cells.obs)
    assert list(answer.var_names) == list(shared_fit().schema.genes)
    pd.testing.assert_frame_equal(answer.var, cells.var)
    same = asked(FACTUAL, cells)
    np.testing.assert_array_equal(dense(same.layers["counts"]), dense(cells.layers["counts"]))


def test_the_query_leaves_the_cells_as_they_were() -> None:
    cells, before = make_cells(), make_cells()
    answer = asked(do(artifact=0), cells)
    answer.obs["new"] = 1
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert cells.layers.keys() == before.layers.keys()
    np.testing.assert_array_equal(dense(cells.layers["counts"]), dense(before.layers["counts"]))


def test_cell_data_are_answered_like_their_anndata() -> None:
    answer = asked(do(artifact=0), make_data().subset(np.arange(0, 180, 4)))
    expected = asked(do(artifact=0))
    for name in LAYERS:
        np.testing.assert_array_equal(dense(answer.layers[name]), dense(expected.layers[name]))
    assert list(answer.obs_names) == list(expected.obs_names)
    assert list(answer.obs["perturbation"]) == list(make_data().labels[::4])


def test_the_answer_records_what_was_asked() -> None:
    intervention = do(perturbation="KLF1", artifact=0)
    answer = asked(intervention, draws=3, seed=7)
    record = answer.uns["cradle_query"]
    assert record["intervention"] == "do(perturbation=KLF1, artifact=0)"
    assert (record["draws"], record["seed"]) == (3, 7)
    assert record["out_of_support"] == []
    assert record["fingerprint"] == make_data().fingerprint
    assert record["version"]
    effect = cell_effect(shared_fit(), make_cells(), intervention, do(artifact=0), draws=2)
    record = effect.uns["cradle_query"]
    assert record["intervention"] == "do(perturbation=KLF1, artifact=0)"
    assert record["reference"] == "do(artifact=0)"
    assert "log2(1 + 1e4 rate)" in record["scale"]


@pytest.mark.parametrize("label", ["KLF1", "KLF1+CEBPA"])
def test_answers_can_be_written_and_read(tmp_path, label) -> None:
    act = do(perturbation=label)
    answers = {
        "counterfactual": asked(act, count_draws=2),
        "cell_effect": cell_effect(shared_fit(), make_cells(), act, draws=2),
        "intervene": generated(act, 6),
    }
    for name, answer in answers.items():
        path = tmp_path / f"{name}.h5ad"
        answer.write_h5ad(path)
        again = anndata.read_h5ad(path)
        assert list(again.obs_names) == list(answer.obs_names)
        assert set(again.obs) == set(answer.obs)
        for layer in answer.layers:
            expected = dense(answer.layers[layer])
            np.testing.assert_array_equal(dense(again.layers[layer]), expected)
        np.testing.assert_array_equal(dense(again.X), dense(answer.X))
        record, read = answer.uns["cradle_query"], again.uns["cradle_query"]
        assert read.keys() == record.keys()
        assert list(read["out_of_support"]) == record["out_of_support"]
        assert bool(record["out_of_support"]) == ("+" in label)


def test_an_answer_can_be_asked_again() -> None:
    """The counterfactual cells are cells: of the same columns and layers."""
    answer = asked(do(perturbation="KLF1"))
    again = asked(FACTUAL, answer)
    np.testing.assert_array_equal(dense(again.layers["counts"]), dense(answer.layers["counts"]))
    assert list(again.obs.columns) == list(answer.obs.columns)


# ----------------------------------------------------------------------- numbers


def test_rates_sum_to_one_where_all_genes_are_kept() -> None:
    for act in (do(), do(perturbation="KLF1", artifact=0), do(artifact="high_mito", library=10)):
        np.testing.assert_allclose(asked(act).layers["rate"].sum(1), 1, rtol=1e-5)


@cache
def panel_fit() -> tuple[Posterior, AnnData]:
    """Return a model of some of the genes, with libraries of all of them."""
    settings = ("data.library_key=total",)
    adata = prepare(make_screen(), make_config()).adata
    adata.obs["total"] = dense(adata.layers["counts"]).sum(1)
    adata = adata[:, 5:35].copy()
    return make_fit(*settings, data=prepare(adata, make_config(*settings)).data), adata[::4].copy()


def test_rates_sum_to_the_share_of_the_kept_genes() -> None:
    posterior, cells = panel_fit()
    kept = dense(cells.layers["counts"]).sum(1) / cells.obs["total"]
    for act in (FACTUAL, do(perturbation="KLF1", artifact=0)):
        answer = asked(act, cells, posterior)
        share = answer.layers["rate"].sum(1)
        assert (share < 1).all()
        assert share.mean() == pytest.approx(kept.mean(), abs=0.1)
        assert (answer.obs["cradle_library"] > dense(answer.layers["counts"]).sum(1)).all()
    answer = asked(FACTUAL, cells, posterior)
    np.testing.assert_array_equal(dense(answer.layers["counts"]), dense(cells.layers["counts"]))
    np.testing.assert_array_equal(answer.obs["cradle_library"], cells.obs["total"])


def recorded(monkeypatch) -> list[dict]:
    """Return a list that will hold all worlds that are predicted."""
    worlds, predict = [], module.predict

    def recording(*args):
        worlds.append(predict(*args))
        return worlds[-1]

    monkeypatch.setattr(module, "predict", recording)
    return worlds


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_rate_is_the_mean_over_draws_and_counts_are_the_first(monkeypatch, draws) -> None:
    worlds = recorded(monkeypatch)
    answer = asked(do(perturbation="KLF1", artifact=0), draws=draws)
    rates = torch.stack([world[sites.RATE] for world in worlds]).double().numpy()
    assert len(rates) == draws
    np.testing.assert_allclose(answer.layers["rate"], rates.mean(0), rtol=1e-5)
    sd = rates.std(0, ddof=1) if draws > 1 else 0 * rates[0]
    np.testing.assert_allclose(answer.layers["rate_sd"], sd, rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(dense(answer.X), worlds[0][sites.COUNTS].numpy())
    np.testing.assert_array_equal(answer.obs["cradle_library"], worlds[0][sites.LIBRARY].numpy())


def test_a_cells_effect_is_the_mean_difference_of_log_rates(monkeypatch) -> None:
    worlds = recorded(monkeypatch)
    effect = cell_effect(shared_fit(), make_cells(), do(perturbation="KLF1"), do(), draws=4)
    rates = torch.stack([world[sites.RATE] for world in worlds]).double().numpy()
    logs = np.log2(1 + 1e4 * rates)
    differences = logs[::2] - logs[1::2]
    assert len(differences) == 4
    np.testing.assert_allclose(effect.X, differences.mean(0), atol=1e-5)
    np.testing.assert_allclose(effect.layers["sd"], differences.std(0, ddof=1), atol=1e-5)
    assert list(effect.layers) == ["sd"]
    assert "cradle_library" not in effect.obs


def test_effects_are_differences_between_worlds_that_share_all_noise() -> None:
    posterior, cells = shared_fit(), make_cells()
    one, two, three = do(perturbation="KLF1"), do(perturbation="control"), do(perturbation="GATA1")

    def effect(first, second):
        return cell_effect(posterior, cells, first, second, draws=3).X

    np.testing.assert_array_equal(effect(one, one), 0)
    np.testing.assert_allclose(effect(one, two), -effect(two, one), atol=1e-6)
    np.testing.assert_allclose(effect(one, two) + effect(two, three), effect(one, three), atol=1e-5)
    assert np.abs(effect(one, two)).max() > 0.01


def test_the_reference_is_the_factual_world_unless_it_is_named() -> None:
    posterior, cells = shared_fit(), make_cells()
    default = cell_effect(posterior, cells, do(artifact=0), draws=2)
    named = cell_effect(posterior, cells, do(artifact=0), FACTUAL, draws=2)
    np.testing.assert_array_equal(default.X, named.X)
    passing = ~make_data().failing[::4]
    assert not default.X[passing].any()
    assert not default.layers["sd"][passing].any()
    assert np.abs(default.X[~passing]).max(1).min() > 0


def test_typical_flags_are_the_same_in_both_worlds_of_an_effect() -> None:
    act = do(artifact="typical")
    effect = cell_effect(shared_fit(), make_cells(), act, act, draws=2)
    np.testing.assert_array_equal(effect.X, 0)


def test_flags_that_appear_are_as_severe_as_those_of_training_cells(monkeypatch) -> None:
    pool = torch.zeros(3, 5)
    pool[:, 2] = torch.tensor([0.25, 0.5, 0.0])  # high_mito, where it is present
    posterior = dataclasses.replace(risky_fit(), failing_artifacts=pool)
    worlds = recorded(monkeypatch)
    asked(do(perturbation="KLF1"), posterior=posterior)
    new = ~make_data().failing & (make_data().labels != "KLF1")
    flag = worlds[0][sites.ARTIFACT][new[::4], 2]
    assert set(flag.tolist()) == {0.25, 0.5}


# ----------------------------------------------------------------------- seeds


QUERIES = {
    "counterfactual": lambda seed: asked(do(artifact="typical"), seed=seed),
    "cell_effect": lambda seed: cell_effect(
        shared_fit(), make_cells(), do(artifact="typical"), draws=2, seed=seed
    ),
    "intervene": lambda seed: generated(do(artifact="typical"), 8, seed=seed),
}


@pytest.mark.parametrize("query", QUERIES)
def test_the_same_seed_gives_the_same_answer_and_another_seed_other_draws(query) -> None:
    torch.manual_seed(1)
    first = QUERIES[query](3)
    torch.manual_seed(2)
    assert_same(QUERIES[query](3), first)
    other = QUERIES[query](4)
    assert not np.array_equal(dense(other.X), dense(first.X))


def test_all_interventions_meet_the_same_noise() -> None:
    """Of one seed: more depth never means fewer counts, and a rate is the same if it must be."""
    shallow, deep = (asked(do(library=size)) for size in (200, 400))
    assert (dense(shallow.X) <= dense(deep.X)).all()
    assert dense(shallow.X).sum() < dense(deep.X).sum()
    np.testing.assert_array_equal(shallow.layers["rate"], deep.layers["rate"])
    np.testing.assert_array_equal(shallow.layers["rate"], asked(do()).layers["rate"])
    # Nor does it matter how many counts are kept.
    kept = asked(do(library=200), count_draws=2)
    np.testing.assert_array_equal(dense(kept.X), dense(shallow.X))
    np.testing.assert_array_equal(kept.layers["rate"], shallow.layers["rate"])


def test_every_key_has_a_seed_of_its_own() -> None:
    keys = [(0,), (0, 0), (0, 1), (0, 1, 0), (0, 1, 0, 0), (1, 0), (0, 0, 1), (1, 0, 0), (0, 1, 1)]
    assert len({seed_of(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("chunk", [None, 9])
def test_globals_and_cells_have_random_numbers_of_their_own(chunk) -> None:
    """Else a posterior mean of their product is not that of independent draws."""

    def guide(batch):
        zero = torch.zeros(27)
        sample("spare", dist.Normal(zero, 1.0).to_event(1))
        with cells_plate(100, batch):
            sample(sites.Z_BASAL, dist.Normal(zero[:3], 1.0).expand([len(batch), 3]).to_event(1))

    posterior, parts = dataclasses.replace(shared_fit(), guide=guide), []
    cells = make_data().subset(np.arange(18))
    over_draws(posterior, cells, parts.append, draws=2, counts=0, seed=0, chunk=chunk)
    last = parts[-1].abduction.latents  # of a chunk that does not start with the first cell, if any
    assert not torch.isclose(last["spare"], last[sites.Z_BASAL].ravel()[:27]).any()


def test_a_latent_of_cells_that_the_guide_is_conditioned_on_is_no_global() -> None:
    """Else the first cell's value would be that of all cells of a chunk."""
    scale = torch.tensor([100.0, 200.0, 300.0])

    def guide(batch):
        values = batch.library.unsqueeze(-1) / scale
        return poutine.condition(shared_fit().guide, data={sites.Z_BASAL: values})(batch)

    cells, parts = make_data().subset(np.arange(6)), []
    edited = dataclasses.replace(shared_fit(), guide=guide)
    over_draws(edited, cells, parts.append, draws=1, counts=0, seed=0)
    expected = cells.batch().library.unsqueeze(-1) / scale
    assert torch.equal(parts[0].abduction.latents[sites.Z_BASAL], expected)


def test_a_draws_globals_are_the_same_for_all_chunks() -> None:
    """One cell many times: what differs between chunks is the cell's own draw alone."""
    posterior = shared_fit()
    values = {
        name: dist.Delta(torch.zeros(shape)).sample()
        for name, shape in ((sites.Z_BASAL, (1, 3)), (sites.Z_ARTIFACT, (1, 2)))
    }

    def guide(batch):
        held = {name: value.expand(len(batch), -1) for name, value in values.items()}
        return poutine.condition(posterior.guide, data=held)(batch)

    held = dataclasses.replace(posterior, guide=guide)
    cells = make_data().subset(np.zeros(6, dtype=int))
    cells = dataclasses.replace(cells, obs_names=np.arange(6).astype(str))
    act = do(perturbation="KLF1", artifact="high_mito")
    rate = counterfactual(held, cells, act, draws=1, chunk=2, count_draws=0).layers["rate"]
    np.testing.assert_allclose(rate, rate[:1].repeat(6, 0), rtol=1e-6)
    other = counterfactual(held, cells, act, draws=1, seed=1, count_draws=0).layers["rate"]
    assert not np.allclose(other, rate, rtol=1e-3)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_value_for_each_cell_is_given_to_that_cell(chunk) -> None:
    """With the basal state given and no artifact, a cell's rate is that of the globals alone."""
    cells = make_data().subset(np.arange(6))
    values = torch.linspace(-2, 2, 18).reshape(6, 3)
    acts = do(perturbation="KLF1", artifact=0, sites={sites.Z_BASAL: values})
    found = asked(acts, cells, draws=1, chunk=chunk).layers["rate"]
    for row in range(6):
        alone = do(perturbation="KLF1", artifact=0, sites={sites.Z_BASAL: values[row]})
        expected = asked(alone, cells, draws=1).layers["rate"][row]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4)


def test_values_for_other_cells_than_there_are_are_an_error() -> None:
    acts = do(sites={sites.Z_BASAL: torch.zeros(3, 3)})
    with pytest.raises(QueryError, match=r"z_basal.*\(3, 3\)"):
        asked(acts, make_data().subset(np.arange(6)), draws=1, chunk=3)


# ----------------------------------------------------------------------- the cells' genes


def test_genes_in_another_order_are_aligned() -> None:
    cells = make_cells()
    order = np.random.default_rng(0).permutation(cells.n_vars)
    act = do(perturbation="KLF1", artifact=0)
    answer = asked(act, cells[:, order].copy())
    assert list(answer.var_names) == list(shared_fit().schema.genes)
    assert_same(answer, asked(act, cells))
    pd.testing.assert_frame_equal(answer.var, cells.var)


def test_genes_that_the_model_does_not_have_are_left_out() -> None:
    cells = make_cells()
    more = AnnData(
        sp.csr_matrix((cells.n_obs, 2), dtype=np.float32),
        obs=cells.obs,
        var=pd.DataFrame(index=["NEW1", "NEW2"]),
        layers={"counts": sp.csr_matrix((cells.n_obs, 2), dtype=np.float32)},
    )
    wide = anndata.concat([more, cells], axis=1, merge="first")
    assert_same(asked(do(artifact=0), wide), asked(do(artifact=0), cells))


def test_missing_genes_are_an_error_that_names_them() -> None:
    with pytest.raises(DataError, match=r"GENE0048"):
        asked(do(), make_cells()[:, :-1].copy())


def test_unknown_perturbations_of_the_cells_are_an_error() -> None:
    cells = make_cells()
    cells.obs["perturbation"] = cells.obs["perturbation"].astype(str).replace("KLF1", "TP53")
    with pytest.raises(DataError, match="TP53"):
        asked(do(), cells)


def test_cells_read_with_another_schema_are_an_error() -> None:
    data = make_data()
    other = dataclasses.replace(data, schema=dataclasses.replace(data.schema, control="NT"))
    for query in (counterfactual, cell_effect):
        with pytest.raises(QueryError, match=r"another schema than the model's.*schema=posterior"):
            query(shared_fit(), other, do())
    with pytest.raises(QueryError, match="another schema"):
        generated(do(), 5, population=other)


@pytest.mark.parametrize(("draws", "count_draws"), [(0, 0), (-1, 0), (2, 3), (2, -1)])
def test_impossible_numbers_of_draws_are_an_error(draws, count_draws) -> None:
    with pytest.raises(QueryError, match=rf"draws={draws} and count_draws={count_draws}"):
        asked(do(), draws=draws, count_draws=count_draws)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is a whole number of at least 0, found -1"),
        ({"seed": 0.5}, "seed is a whole number of at least 0, found 0.5"),
        ({"draws": 2.5}, "draws is a whole number of at least 1, found 2.5"),
        ({"chunk": 0}, "chunk is a whole number of at least 1, found 0"),
        ({"chunk": -3}, "chunk is a whole number of at least 1, found -3"),
    ],
    ids=str,
)
def test_impossible_numbers_are_an_error_before_cells_are_read(options, message) -> None:
    for query in (counterfactual, cell_effect):
        with pytest.raises(QueryError, match=message):
            query(shared_fit(), AnnData(), do(), **options)


def test_no_cells_are_an_error() -> None:
    for none in (make_cells()[:0], make_data().subset(np.arange(0))):
        for query in (counterfactual, cell_effect):
            with pytest.raises(DataError, match="at least one cell, found none"):
                query(shared_fit(), none, do())
        with pytest.raises(DataError, match="at least one cell, found none"):
            generated(do(), 5, population=none)
        with pytest.raises(DataError, match="at least one cell, found none"):
            compare(shared_fit(), do(artifact=0), do(), cells=none)


def test_a_bar_is_shown_on_request_only(capsys) -> None:
    asked(do(), progress=True)
    shown = capsys.readouterr()
    assert "Counterfactuals" in shown.err
    assert shown.out == ""
    asked(do())
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------- support


def assert_flagged(answer: AnnData, *sentences: str) -> None:
    """Raise unless the answer was given, and flagged with these sentences."""
    record = answer.uns["cradle_query"]["out_of_support"]
    assert len(record) == len(sentences)
    for found, expected in zip(record, sorted(sentences), strict=True):
        assert expected in found
    for name in answer.layers:
        assert np.isfinite(dense(answer.layers[name])).all()


def test_what_the_screen_has_shown_is_not_flagged() -> None:
    for act in (do(), do(perturbation="CEBPA+GATA1"), do(perturbation="control", artifact=0)):
        answer = asked(act)
        assert_flagged(answer)
        assert not answer.obs["cradle_out_of_support"].any()


def test_a_pair_that_was_never_screened_is_answered_and_flagged() -> None:
    answer = asked(do(perturbation="KLF1+CEBPA"))
    assert_flagged(answer, "the combination 'CEBPA+KLF1' was never screened: predicted from its")
    assert answer.obs["cradle_out_of_support"].all()


def test_a_held_out_combination_is_answered_and_flagged() -> None:
    posterior = with_labels(CEBPA_GATA1=0, GATA1=0)
    answer = asked(do(perturbation="GATA1+CEBPA"), posterior=posterior)
    assert_flagged(answer, "the combination 'CEBPA+GATA1' was held out: predicted from its members")
    assert "'GATA1' alone never trained" in answer.uns["cradle_query"]["out_of_support"][0]


def test_a_held_out_perturbation_is_answered_and_flagged() -> None:
    posterior = with_labels(KLF1=0)
    answer = asked(do(perturbation="KLF1"), posterior=posterior)
    assert_flagged(answer, "'KLF1' was held out: its effect is the prior's")
    assert answer.obs["cradle_out_of_support"].all()
    assert_flagged(asked(do(perturbation="GATA1"), posterior=posterior))


def test_cells_that_keep_a_held_out_perturbation_are_flagged_one_by_one() -> None:
    answer = asked(do(artifact=0), posterior=with_labels(KLF1=0))
    assert_flagged(answer, "'KLF1' was held out: its effect is the prior's")
    own = (answer.obs["perturbation"] == "KLF1").to_numpy()
    assert own.any()
    np.testing.assert_array_equal(answer.obs["cradle_out_of_support"], own)


def test_a_flag_never_seen_with_the_perturbation_is_answered_and_flagged() -> None:
    table = shared_fit().labels.set_index("label")
    assert table.at["CEBPA", "train with high_hb"] == 0 < table.at["KLF1", "train with high_hb"]
    answer = asked(do(perturbation="CEBPA", artifact="high_hb"))
    assert_flagged(answer, "no training cell with 'CEBPA' carries 'high_hb'")
    assert_flagged(asked(do(perturbation="KLF1", artifact="high_hb")))
    # Where cells keep their perturbation, those of CEBPA are flagged.
    answer = asked(do(artifact="high_hb"))
    assert_flagged(answer, "no training cell with 'CEBPA' carries 'high_hb'")
    own = (answer.obs["perturbation"] == "CEBPA").to_numpy()
    np.testing.assert_array_equal(answer.obs["cradle_out_of_support"], own)


@pytest.mark.parametrize(
    ("dosages", "dosage", "sentence"),
    [
        ({}, 0.5, "dosage 0.5 of 'KLF1' is outside the trained 1"),
        ({}, 1, None),
        ({"KLF1": [0.25, 2.0]}, 0.5, None),
        ({"KLF1": [0.25, 2.0]}, 2, None),
        ({"KLF1": [0.25, 2.0]}, 3, "dosage 3 of 'KLF1' is outside the trained 0.25 to 2"),
    ],
)
def test_a_dosage_outside_the_trained_is_answered_and_flagged(dosages, dosage, sentence) -> None:
    facts = dict(shared_fit().facts) | {"dosages": dosages}
    posterior = dataclasses.replace(shared_fit(), facts=facts)
    answer = asked(do(perturbation={"KLF1": dosage}), posterior=posterior)
    assert_flagged(answer, *([] if sentence is None else [sentence]))
    assert (answer.obs["cradle_out_of_support"] == (sentence is not None)).all()


def test_a_reference_that_was_never_screened_is_flagged() -> None:
    worlds = (do(perturbation="KLF1"), do(perturbation="KLF1+CEBPA"))
    answer = cell_effect(shared_fit(), make_cells(), *worlds, draws=1)
    assert_flagged(answer, "the combination 'CEBPA+KLF1' was never screened")


def test_generated_cells_and_effects_are_flagged_too() -> None:
    act = do(perturbation="KLF1+CEBPA")
    sentence = "the combination 'CEBPA+KLF1' was never screened"
    assert_flagged(generated(act, 5), sentence)
    assert_flagged(cell_effect(shared_fit(), make_cells(), act, draws=2), sentence)


# ----------------------------------------------------------------------- edited pairs


class PhasedCradle(Cradle):
    """A model with one more latent, which its guide does not know: a phase that moves all genes."""

    def library(self, batch, artifact, depth):
        self.phase = sample("phase", dist.Normal(batch.library.new_zeros(len(batch)), 1.0))
        return super().library(batch, artifact, depth)

    def log_fold_change(self, z_basal, perturbation, gene_effect):
        change = super().log_fold_change(z_basal, perturbation, gene_effect)
        return change + self.phase.unsqueeze(-1) * torch.linspace(-1, 1, self.schema.n_genes)


@cache
def phased() -> Posterior:
    posterior = shared_fit()
    model = PhasedCradle(posterior.schema, posterior.config.model, posterior.statistics)
    model.load_state_dict(posterior.model.state_dict())
    return dataclasses.replace(posterior, model=model)


def test_a_model_with_another_latent_keeps_answering() -> None:
    cells = make_cells()
    same = asked(FACTUAL, cells, phased())
    np.testing.assert_array_equal(dense(same.X), dense(cells.layers["counts"]))
    # The phase is the cell's own in both worlds, so that those without an artifact do not change.
    effect = cell_effect(phased(), cells, do(artifact=0), draws=2).X
    assert not effect[~make_data().failing[::4]].any()
    assert effect.any()
    rates = asked(do(), cells, phased(), draws=1).layers["rate"]
    assert np.abs(np.log(rates / asked(do(), cells, draws=1).layers["rate"])).max() > 0.5


def test_the_other_latent_can_be_intervened_upon() -> None:
    high, low = (do(sites={"phase": value}) for value in (1.0, -1.0))
    effect = cell_effect(phased(), make_cells(), high, low, draws=2).X
    assert np.corrcoef(effect.mean(0), np.linspace(-1, 1, effect.shape[1]))[0, 1] > 0.9
    worlds = generated(do(artifact=0) | high, 10, phased())
    assert worlds.n_obs == 10
    with pytest.raises(QueryError, match="no site 'phase'"):
        asked(high)


class PyroPoisson(PoissonLikelihood):
    """Counts as a modeller writes them, by Pyro's own distributions."""

    def __init__(self):
        torch.nn.Module.__init__(self)

    def mean_of(self, rate, library):
        return library.unsqueeze(-1) * rate

    def forward(self, rate, library):
        return dist.Poisson(self.mean_of(rate, library)).to_event(1)


class PyroNegativeBinomial(PyroPoisson):
    def forward(self, rate, library):
        logits = (self.mean_of(rate, library) / 3).log()
        return dist.NegativeBinomial(torch.tensor(3.0), logits=logits).to_event(1)


class PyroGammaPoisson(PyroPoisson):
    def forward(self, rate, library):
        return dist.GammaPoisson(torch.tensor(3.0), 3 / self.mean_of(rate, library)).to_event(1)


class PyroZeroInflated(PyroPoisson):
    def forward(self, rate, library):
        logits = (self.mean_of(rate, library) / 3).log()
        theta, gate = torch.tensor(3.0), torch.tensor(0.1)
        zinb = dist.ZeroInflatedNegativeBinomial(theta, logits=logits, gate=gate)
        return zinb.to_event(1)


class SmallerDispersion(NegativeBinomialLikelihood):
    """A subclass of ours."""

    def __init__(self):
        super().__init__(shared_fit().statistics)

    @property
    def inverse_dispersion(self):
        return 10 * super().inverse_dispersion


class GeometricCounts(dist.Geometric):
    """A distribution that nobody has told the queries about."""


class OfGeometric(PyroPoisson):
    def forward(self, rate, library):
        return GeometricCounts(1 / (1 + self.mean_of(rate, library))).to_event(1)


class MaskedPoisson(PyroPoisson):
    def forward(self, rate, library):
        every = torch.ones(len(rate), dtype=torch.bool)
        return super().forward(rate, library).mask(every)


def with_likelihood(likelihood) -> Posterior:
    model = copy.deepcopy(shared_fit().model)
    model.likelihood = likelihood
    return dataclasses.replace(shared_fit(), model=model)


@pytest.mark.parametrize(
    "likelihood",
    [
        PyroPoisson,
        PyroNegativeBinomial,
        PyroGammaPoisson,
        PyroZeroInflated,
        SmallerDispersion,
        MaskedPoisson,
    ],
)
def test_a_model_with_another_likelihood_keeps_answering(likelihood) -> None:
    posterior, cells = with_likelihood(likelihood()), make_cells()
    same = asked(FACTUAL, cells, posterior)
    np.testing.assert_array_equal(dense(same.X), dense(cells.layers["counts"]))
    shallow, deep = (asked(do(library=size), cells, posterior) for size in (200, 400))
    assert (dense(shallow.X) <= dense(deep.X)).all()
    assert dense(shallow.X).sum() < dense(deep.X).sum()
    worlds = generated(do(perturbation="KLF1", library=1000), 20, posterior)
    assert dense(worlds.X).sum() == pytest.approx(20_000, rel=0.2)


def test_a_likelihood_without_known_quantiles_is_an_error_that_says_what_to_do() -> None:
    posterior = with_likelihood(OfGeometric())
    # Rates and generated cells need no noise of counts.
    assert cell_effect(posterior, make_cells(), do(artifact=0), draws=2).X.any()
    assert generated(do(artifact=0), 5, posterior).n_obs == 5
    if count_elements.dispatch(GeometricCounts) is count_elements.dispatch(object):
        with pytest.raises(QueryError, match=r"'counts'.*from a GeometricCounts.*count_elements"):
            asked(do(), posterior=posterior)

        @count_elements.register(GeometricCounts)
        def _(fn, shape):
            mean = (1 / fn.probs - 1).double().expand(shape).reshape(-1)
            return NegativeBinomialCounts(mean, torch.ones_like(mean))

    cells = make_cells()
    same = asked(FACTUAL, cells, posterior)
    np.testing.assert_array_equal(dense(same.X), dense(cells.layers["counts"]))


def test_a_plain_function_is_a_model() -> None:
    posterior = shared_fit()

    def halved(batch):
        acts = {sites.PERTURBATION_SHIFT: torch.zeros(len(batch), 3)}
        return poutine.do(posterior.model, data=acts)(batch)

    def guide(batch):
        return posterior.guide(batch)

    edited = dataclasses.replace(posterior, model=halved, guide=guide)
    cells = make_cells()
    same = asked(FACTUAL, cells, edited)
    np.testing.assert_array_equal(dense(same.X), dense(cells.layers["counts"]))
    assert np.isfinite(asked(do(perturbation="KLF1"), cells, edited).layers["rate"]).all()


def test_a_latent_that_the_model_is_conditioned_on_has_this_value() -> None:
    posterior = shared_fit()
    none = {sites.EFFECT: torch.zeros(3, 3), sites.GENE_EFFECT: torch.zeros(3, 60)}
    edited = dataclasses.replace(posterior, model=poutine.condition(posterior.model, data=none))
    worlds = (do(perturbation=label, artifact=0) for label in ("KLF1", "control"))
    assert not cell_effect(edited, make_cells(), *worlds, draws=2).X.any()


@pytest.mark.parametrize("population", ["controls", "prior"])
def test_generated_cells_have_the_latents_that_the_model_is_conditioned_on(population) -> None:
    posterior = shared_fit()
    held = {sites.EFFECT_MASK: torch.ones(3, 3), sites.EFFECT: torch.full((3, 3), 3.0)}
    pairs = [
        {part: poutine.condition(getattr(posterior, part), data=held)}
        for part in ("model", "guide")
    ]
    act = do(perturbation="KLF1", artifact=0, sites={sites.Z_BASAL: 0.0, sites.GENE_EFFECT: 0.0})
    found, expected = (
        generated(act, 4, dataclasses.replace(posterior, **pair), population=population)
        for pair in pairs
    )
    np.testing.assert_allclose(found.layers["rate"], expected.layers["rate"], rtol=1e-4)


GIVEN = {
    "effect": {sites.EFFECT_MASK: torch.ones(3, 3), sites.EFFECT: torch.full((3, 3), 3.0)},
    "gene effect": {sites.GENE_EFFECT: torch.linspace(-1, 1, 180).reshape(3, 60)},
    "depth": {sites.DEPTH_SHIFT: torch.full((5,), -2.0)},
}
OF_EDITED = {
    "counterfactual": lambda p: asked(do(perturbation="KLF1"), posterior=p),
    "cell_effect": lambda p: cell_effect(p, make_cells(), do(artifact=0), draws=2),
    "controls": lambda p: generated(do(perturbation="KLF1"), 6, p),
    "prior": lambda p: generated(do(perturbation="KLF1"), 6, p, population="prior"),
    "cells": lambda p: generated(do(perturbation="KLF1"), 6, p, population=make_cells()),
    "effects": lambda p: effects(p, "KLF1", kind="total", scale="counts", draws=2, n_cells=9),
    "effects of cells": lambda p: compare(
        p, do(perturbation="KLF1"), do(), cells=make_cells(), draws=2, n_cells=9
    ),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("query", OF_EDITED)
def test_conditioning_the_model_on_a_global_is_conditioning_the_guide(query, given) -> None:
    """The model's value comes before the guide's, and the guide draws the rest given this value."""
    posterior, data = shared_fit(), GIVEN[given]
    found, expected = (
        OF_EDITED[query](
            dataclasses.replace(
                posterior, **{part: poutine.condition(getattr(posterior, part), data=data)}
            )
        )
        for part in ("model", "guide")
    )
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
        return
    assert_same(found, expected)
    np.testing.assert_array_equal(dense(found.X), dense(expected.X))


@pytest.mark.parametrize("part", ["model", "guide"])
def test_an_effect_that_the_pair_is_conditioned_on_has_no_uncertainty(part) -> None:
    """Nor is it drawn from the slab for the interval."""
    posterior = shared_fit()
    none = {sites.EFFECT: torch.zeros(3, 3), sites.GENE_EFFECT: torch.zeros(3, 60)}
    pair = {part: poutine.condition(getattr(posterior, part), data=none)}
    found = average_effect(dataclasses.replace(posterior, **pair), "KLF1", draws=3, n_cells=5)
    assert not found[["mean", "sd", "ci_low", "ci_high"]].to_numpy().any()


def with_model(model) -> Posterior:
    return dataclasses.replace(shared_fit(), model=model)


def held_at(model, **values: float):
    """Return a model conditioned on values of latents of cells."""

    def conditioned(batch):
        shapes = {sites.Z_BASAL: (len(batch), 3), sites.Z_ARTIFACT: (len(batch), 2)}
        data = {
            name: torch.full(shapes.get(name, (len(batch),)), value)
            for name, value in values.items()
        }
        return poutine.condition(model, data=data)(batch)

    return conditioned


@pytest.mark.parametrize("population", ["controls", "prior", "cells"])
@pytest.mark.parametrize("site", [sites.Z_BASAL, sites.Z_ARTIFACT, "phase"])
def test_latents_of_cells_that_the_model_is_conditioned_on_are_held(population, site) -> None:
    """With no other latent left to chance, they give the rate of doing them."""
    population = make_cells() if population == "cells" else population
    values = {sites.Z_BASAL: 0.5, sites.Z_ARTIFACT: -1.0, "phase": 1.5}
    rest = {name: value for name, value in values.items() if name != site}
    rest[sites.ARTIFACT_EFFECT] = 0.5
    act = do(perturbation="control", artifact="high_mito", sites=rest)
    edited = with_model(held_at(phased().model, **{site: values[site]}))
    found = generated(act, 4, edited, population=population)
    expected = generated(act | do(sites={site: values[site]}), 4, phased(), population=population)
    np.testing.assert_allclose(found.layers["rate"], expected.layers["rate"], rtol=1e-4)


class CountingCradle(Cradle):
    """A model with one more observation of the cells: how much was seen of them."""

    def library(self, batch, artifact, depth):
        sample("n_seen", dist.Poisson(batch.library), obs=batch.counts.sum(-1))
        return super().library(batch, artifact, depth)


def test_only_what_is_not_read_from_the_cells_is_given_by_the_model() -> None:
    posterior, batch = shared_fit(), make_data().batch(np.arange(6))
    counting = CountingCradle(posterior.schema, posterior.config.model, posterior.statistics)
    assert given_values(posterior.model, batch) == {}
    assert given_values(counting, batch) == {}
    held = given_values(held_at(counting, **{sites.Z_BASAL: 1.0}), batch)
    assert held.keys() == {sites.Z_BASAL}
    assert torch.equal(held[sites.Z_BASAL], torch.ones(6, 3))


class TiltedCradle(Cradle):
    """A model with one more global latent, which its guide does not know."""

    def perturbation_effects(self):
        genes = self.artifact_loading.new_zeros(self.schema.n_genes)
        self.tilt = sample("tilt", dist.Normal(genes, 1.0).to_event(1))
        return super().perturbation_effects()

    def log_fold_change(self, z_basal, perturbation, gene_effect):
        return super().log_fold_change(z_basal, perturbation, gene_effect) + self.tilt


def test_a_global_latent_that_the_guide_lacks_is_the_same_for_all_chunks_of_a_draw() -> None:
    posterior, parts = shared_fit(), []
    model = TiltedCradle(posterior.schema, posterior.config.model, posterior.statistics)
    model.load_state_dict(posterior.model.state_dict())
    cells = make_data().subset(np.arange(9))
    over_draws(with_model(model), cells, parts.append, draws=2, counts=0, seed=0, chunk=4)
    tilts = {(part.draw, part.rows.start): part.abduction.latents["tilt"] for part in parts}
    assert len(tilts) == 6
    for draw in (0, 1):
        assert torch.equal(tilts[draw, 0], tilts[draw, 4])
        assert torch.equal(tilts[draw, 0], tilts[draw, 8])
    assert not torch.isclose(tilts[0, 0], tilts[1, 0]).any()
    same = asked(FACTUAL, make_cells(), with_model(model), chunk=7)
    np.testing.assert_array_equal(dense(same.X), dense(make_cells().layers["counts"]))
    assert np.isfinite(average_effect(with_model(model), "KLF1", draws=2, n_cells=4)["mean"]).all()


def cleaned_model():
    """Return a model that intervenes itself: no cell has an artifact."""

    def without_artifact(batch):
        acts = {sites.ARTIFACT: torch.zeros_like(batch.artifact)}
        return poutine.do(shared_fit().model, data=acts)(batch)

    return without_artifact


SECOND_TIME = {
    "counterfactual": lambda p: asked(do(artifact=0), posterior=p),
    "cell_effect": lambda p: cell_effect(p, make_cells(), do(artifact="high_mito")),
    "intervene": lambda p: generated(do(artifact=0), 5, p),
    "average_effect": lambda p: average_effect(p, "KLF1", draws=1, n_cells=3),
    "effects": lambda p: effects(p, draws=1, n_cells=3),
}


@pytest.mark.parametrize("query", SECOND_TIME)
def test_a_site_that_the_model_intervenes_on_cannot_be_intervened_on_again(query) -> None:
    with pytest.raises(QueryError, match=r"The model itself intervenes on 'artifact'.*Leave"):
        SECOND_TIME[query](with_model(cleaned_model()))


def test_a_model_that_intervenes_is_asked_about_other_sites() -> None:
    edited, label = with_model(cleaned_model()), do(perturbation="KLF1")
    rate = generated(label, 6, edited).layers["rate"]
    np.testing.assert_array_equal(rate, generated(label | do(artifact=0), 6).layers["rate"])
    options = {"draws": 2, "n_cells": 5}
    found, expected = (
        average_effect(posterior, "KLF1", kind=kind, **options)["mean"]
        for posterior, kind in ((edited, "total"), (shared_fit(), "direct"))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pairs_in_double_precision_are_asked_alike() -> None:
    posterior = shared_fit()
    double = dataclasses.replace(
        posterior,
        model=copy.deepcopy(posterior.model).double(),
        guide=copy.deepcopy(posterior.guide).double(),
    )
    cells = make_cells()
    acts = do(artifact="typical", sites={sites.Z_BASAL: 0.5})
    same = asked(FACTUAL, cells, double)
    np.testing.assert_array_equal(dense(same.X), dense(cells.layers["counts"]))
    for answer in (asked(acts, cells, double), generated(acts, 5, double)):
        assert all(answer.layers[name].dtype == np.float32 for name in answer.layers)
    for scale in ("rate", "counts"):
        assert average_effect(double, "KLF1", scale=scale, draws=2, n_cells=3)["mean"].any()
    group = compare(double, do(artifact=0), do(), cells=cells, by="batch", draws=1, n_cells=3)
    assert group["mean"].any()


# ----------------------------------------------------------------------- generated cells


def risky_fit() -> Posterior:
    """Return a posterior in which KLF1 brings high_mito, and nothing brings anything else."""
    posterior = shared_fit()
    model = copy.deepcopy(posterior.model)
    risk = torch.zeros(posterior.schema.n_artifacts, posterior.schema.n_perturbations)
    risk[posterior.schema.artifacts.index("high_mito"), 2] = 60.0
    with torch.no_grad():
        model.artifact_log_odds.fill_(-30.0)
    held = {sites.ARTIFACT_RISK: risk, sites.DEPTH_SHIFT: torch.full((len(risk),), -1.0)}
    guide = poutine.condition(posterior.guide, data=held)
    return dataclasses.replace(posterior, model=model, guide=guide)


@pytest.mark.parametrize("population", ["controls", "prior", "cells"])
def test_unnamed_flags_of_generated_cells_follow_the_perturbation(population) -> None:
    posterior = risky_fit()
    population = make_cells() if population == "cells" else population
    answers = {
        label: generated(do(perturbation=label), 400, posterior, population=population).obs
        for label in ("control", "KLF1", "KLF1+GATA1")
    }
    for label, obs in answers.items():
        assert (obs["cradle_qc_high_mito"] == ("KLF1" in label)).all()
        assert (obs["cradle_artifact"] == ("KLF1" in label)).all()
        assert not obs[[f"cradle_qc_{k}" for k in ("low_counts", "high_hb")]].to_numpy().any()
    # And the library follows the flags.
    logs = [np.log(answers[label]["cradle_library"]) for label in ("KLF1", "control")]
    error = posterior.model.log_library_log_scale.exp().item() * np.sqrt(2 / 400)
    assert logs[0].mean() - logs[1].mean() == pytest.approx(-1, abs=4.5 * error)


def test_named_flags_of_generated_cells_are_those() -> None:
    posterior = risky_fit()
    clean = generated(do(perturbation="KLF1", artifact=0), 30, posterior).obs
    assert not clean["cradle_artifact"].any()
    assert not clean.filter(like="cradle_qc_").to_numpy().any()
    some = generated(do(artifact={"low_counts": 0.5, "high_hb": 1}), 30, posterior).obs
    assert (some["cradle_qc_low_counts"] == 0.5).all()
    assert (some["cradle_qc_high_hb"] == 1).all()
    assert not some["cradle_qc_high_mito"].any()
    typical = generated(do(artifact="typical"), 300, posterior).obs
    pool = {tuple(row) for row in posterior.failing_artifacts.tolist()}
    assert {tuple(row) for row in typical.filter(like="cradle_qc_").to_numpy().tolist()} <= pool


def test_generated_cells_are_spread_over_draws_and_named() -> None:
    answer = intervene(shared_fit(), do(perturbation="GATA1+CEBPA", artifact=0), 31, draws=4)
    assert answer.shape == (31, 60)
    sizes = answer.obs["cradle_draw"].value_counts().sort_index()
    assert list(sizes.index) == [0, 1, 2, 3]
    assert set(sizes) <= {7, 8}
    assert set(answer.obs["perturbation"]) == {"CEBPA+GATA1"}
    assert answer.obs_names.is_unique
    assert list(answer.var_names) == list(shared_fit().schema.genes)
    assert set(answer.layers) == {"counts", "rate"}
    assert sp.issparse(answer.X)
    np.testing.assert_allclose(answer.layers["rate"].sum(1), 1, rtol=1e-5)
    record = answer.uns["cradle_query"]
    assert record["intervention"] == "do(perturbation=GATA1+CEBPA, artifact=0)"
    assert (record["population"], record["draws"], record["seed"]) == ("controls", 4, 0)
    # Each draw has its own globals, and one draw is enough for any number of cells.
    assert generated(do(artifact=0), 9, draws=1).obs["cradle_draw"].nunique() == 1
    assert intervene(shared_fit(), do(artifact=0), 60).obs["cradle_draw"].nunique() == 50
    assert intervene(shared_fit(), do(artifact=0), 3).obs["cradle_draw"].nunique() == 3


def test_generated_counts_have_the_models_mean() -> None:
    answer = intervene(shared_fit(), do(perturbation="KLF1"), 3000, draws=1, seed=2)
    mean = answer.layers["rate"] * answer.obs["cradle_library"].to_numpy()[:, None]
    theta = shared_fit().model.likelihood.inverse_dispersion.detach().numpy()
    variance = mean + mean**2 / theta
    off = (dense(answer.X) - mean).sum(0) / np.sqrt(variance.sum(0))
    assert np.abs(off).max() < 4.5
    scaled = ((dense(answer.X) - mean) ** 2 / variance).mean()
    assert scaled == pytest.approx(1, abs=0.1)


def one_reference_cell() -> tuple[Posterior, torch.Tensor]:
    """Return a posterior with one kept control, whose basal state is known."""
    loc = torch.tensor([[1.0, -2.0, 0.5]])
    reference = ReferenceCells(
        loc, torch.full_like(loc, 1e-6), torch.tensor([777.0]), torch.zeros(1, 0)
    )
    return dataclasses.replace(shared_fit(), reference=reference), loc


def test_basal_states_are_those_of_the_population() -> None:
    posterior, loc = one_reference_cell()
    act = do(perturbation="KLF1", artifact=0)
    rates = intervene(posterior, act, 6, draws=1).layers["rate"]
    np.testing.assert_allclose(rates, rates[:1].repeat(6, 0), rtol=1e-3)
    at = act | do(sites={sites.Z_BASAL: loc[0]})
    for population in ("controls", "prior", make_cells()):
        held = intervene(posterior, at, 6, draws=1, population=population).layers["rate"]
        np.testing.assert_allclose(held[:1].repeat(6, 0), held, rtol=1e-5)
    held = intervene(posterior, at, 6, draws=1).layers["rate"]
    np.testing.assert_allclose(rates, held, rtol=1e-3)
    prior = intervene(posterior, act, 6, draws=1, population="prior").layers["rate"]
    assert np.abs(np.log(prior[1:] / prior[:1])).max(1).min() > 0.01


def test_a_population_of_cells_keeps_what_is_not_named() -> None:
    cells = make_cells()
    cells = cells[cells.obs["perturbation"].isin(["GATA1", "CEBPA"])].copy()
    answer = generated(do(artifact=0), 200, population=cells, library="cells")
    shares = answer.obs["perturbation"].value_counts(normalize=True)
    expected = cells.obs["perturbation"].astype(str).value_counts(normalize=True)
    assert set(shares.index) == set(expected.index)
    assert (shares - expected).abs().max() < 5 * np.sqrt(0.25 / 200)
    assert set(answer.obs["cradle_library"]) == set(dense(cells.layers["counts"]).sum(1))
    assert answer.uns["cradle_query"]["population"] == "cells"


def test_a_factual_population_of_cells_gets_new_counts() -> None:
    cells = make_cells()[:1].copy()
    act = do(perturbation="factual", artifact="factual", library="factual")
    answer = generated(act, 5, population=cells)
    counts = dense(cells.layers["counts"])
    assert (answer.obs["cradle_library"] == counts.sum()).all()
    assert (answer.obs["perturbation"] == cells.obs["perturbation"].iloc[0]).all()
    assert (dense(answer.X) != counts).any(1).all()
    assert len(np.unique(dense(answer.X), axis=0)) == 5


@pytest.mark.parametrize("population", ["controls", "prior"])
def test_libraries_of_generated_cells(population) -> None:
    posterior, act = shared_fit(), do(artifact=0)

    def libraries(library, act=act):
        answer = generated(act, 300, population=population, library=library)
        return answer.obs["cradle_library"].to_numpy()

    assert set(libraries("cells")) <= set(posterior.reference.library.tolist())
    assert (libraries(750) == 750).all()
    found, counts = np.unique(libraries(np.array([100, 300])), return_counts=True)
    assert found.tolist() == [100, 300]
    assert counts.min() > 100
    assert set(libraries([50.0, 60.0, 70.0])) == {50, 60, 70}
    modelled = libraries("model")
    np.testing.assert_array_equal(modelled, libraries(None))
    loc = posterior.model.log_library_loc.item()
    scale = posterior.model.log_library_log_scale.exp().item()
    assert np.log(modelled).mean() == pytest.approx(loc, abs=4.5 * scale / np.sqrt(300))
    assert np.log(modelled).std() == pytest.approx(scale, rel=0.2)
    for library in ("cells", "model", 750, [50.0, 60.0], None):
        assert (libraries(library, act | do(library=123)) == 123).all()


@pytest.mark.parametrize(
    ("library", "recorded"),
    [(None, "model"), ("model", "model"), ("cells", "cells"), (750, [750]), ([50, 60], [50, 60])],
    ids=str,
)
def test_the_record_says_where_libraries_come_from(library, recorded) -> None:
    answer = generated(do(artifact=0), 4, library=library)
    assert answer.uns["cradle_query"]["library"] == recorded


@pytest.mark.parametrize("draws", [2, 3, 5])
@pytest.mark.parametrize("population", ["controls", "prior", "cells"])
def test_a_value_for_each_generated_cell_is_given_to_that_cell(population, draws) -> None:
    """Of controls without artifact, rates depend on the basal state alone."""
    values = torch.linspace(-2, 2, 15).reshape(5, 3)
    population = make_cells() if population == "cells" else population
    act = do(perturbation="control", artifact=0)
    each = act | do(sites={sites.Z_BASAL: values})
    found = generated(each, 5, draws=draws, population=population).layers["rate"]
    for row in range(5):
        alone = generated(act | do(sites={sites.Z_BASAL: values[row]}), 1, draws=1)
        np.testing.assert_allclose(found[row], alone.layers["rate"][0], rtol=1e-4)
    with pytest.raises(QueryError, match=r"z_basal.*\(5, 3\)"):
        generated(each, 6, draws=draws, population=population)


def test_without_a_model_of_libraries_they_are_the_cells() -> None:
    posterior = shared_fit()
    model = Cradle(
        posterior.schema,
        posterior.config.model.model_copy(update={"depth_shift": False}),
        posterior.statistics,
    )
    posterior = dataclasses.replace(posterior, model=model)
    for library in (None, "model", "cells"):
        answer = generated(do(artifact=0), 20, posterior, library=library)
        assert answer.uns["cradle_query"]["library"] == "cells"
        assert set(answer.obs["cradle_library"]) <= set(posterior.reference.library.tolist())


def test_flags_that_are_not_modelled_must_be_named() -> None:
    posterior = shared_fit()
    config = posterior.config.model.model_copy(update={"artifact_risk": False})
    model = Cradle(posterior.schema, config, posterior.statistics)
    posterior = dataclasses.replace(posterior, model=model)
    with pytest.raises(QueryError, match=r"artifact_risk is off.*artifact=0"):
        generated(do(perturbation="KLF1"), 5, posterior)
    assert not generated(do(artifact=0), 5, posterior).obs["cradle_artifact"].any()
    factual = generated(do(artifact="factual"), 60, posterior, population=make_cells())
    assert 0 < factual.obs["cradle_artifact"].mean() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_cells": 0}, "n_cells >= 1 .* found 0 and 0"),
        ({"n_cells": 5, "draws": 0}, "1 <= draws <= n_cells, found 5 and 0"),
        ({"n_cells": 2.5}, "n_cells is a whole number of at least 1, found 2.5"),
        ({"seed": -1}, "seed is a whole number of at least 0, found -1"),
        ({"n_cells": 5, "draws": 6}, "1 <= draws <= n_cells, found 5 and 6"),
        ({"population": "cells"}, "population is 'controls', 'prior' or cells, found 'cells'"),
        ({"library": "deep"}, "'model', 'cells', or positive numbers of counts, found 'deep'"),
        ({"library": 0}, "positive numbers of counts, found 0"),
        ({"library": [100, -1]}, "positive numbers of counts"),
        ({"library": [100, np.nan]}, "positive numbers of counts"),
        ({"library": []}, "positive numbers of counts"),
    ],
    ids=str,
)
def test_impossible_settings_of_generated_cells_are_errors(options, message) -> None:
    with pytest.raises(QueryError, match=message):
        intervene(shared_fit(), do(artifact=0), **{"n_cells": 5} | options)


@pytest.mark.parametrize("population", ["controls", "prior"])
@pytest.mark.parametrize("act", [do(artifact="factual"), do(library="factual")], ids=str)
def test_there_is_no_factual_artifact_or_library_without_cells(act, population) -> None:
    with pytest.raises(QueryError, match=r"holds what cells had.*population=adata"):
        generated(act, 5, population=population)
    assert generated(act, 5, population=make_cells()).n_obs == 5


# ----------------------------------------------------------------------- memory


MEMORY = """
    import resource, sys
    import numpy as np, pandas as pd, scipy.sparse as sp, torch
    from factories import make_config, make_pair, make_schema, make_statistics
    from cradle_pyro import CellData, counterfactual, do
    from cradle_pyro.inference.posterior import Posterior, ReferenceCells

    n_cells, n_genes, n_each = 20_000, 2_000, 60
    unit = 1 if sys.platform == "darwin" else 1024

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    rng = np.random.default_rng(0)
    columns = np.sort(rng.integers(0, n_genes, (n_cells, n_each)), axis=1).ravel()
    values = rng.geometric(0.4, columns.size).astype(np.float32)
    starts = n_each * np.arange(n_cells + 1)
    counts = sp.csr_array((values, columns, starts), shape=(n_cells, n_genes))
    counts.sum_duplicates()
    schema = make_schema(n_genes=n_genes)
    data = CellData(
        schema=schema,
        counts=counts,
        perturbation=sp.csr_array((rng.random((n_cells, 3)) < 0.3).astype(np.float32)),
        artifact=(rng.random((n_cells, 2)) < 0.2).astype(np.float32),
        artifact_observed=np.ones(n_cells, dtype=bool),
        library=counts.sum(1).astype(np.float32),
        covariates=np.zeros((n_cells, 0), dtype=np.int64),
        obs_names=np.arange(n_cells).astype(str),
    )
    model, guide = make_pair(schema)
    posterior = Posterior(
        model=model, guide=guide, schema=schema, config=make_config(),
        statistics=make_statistics(schema),
        reference=ReferenceCells(*(torch.zeros(1, k) for k in (5, 5, 1, 0))),
        history=pd.DataFrame(),
        labels=pd.DataFrame(
            {"label": ["control"], "train": [1], "train with low_0": [1], "train with low_1": [1]}
        ),
        failing_artifacts=torch.ones(1, 2),
    )
    ask = lambda cells: counterfactual(posterior, cells, do(artifact=0), draws=2, count_draws=2)
    ask(data.subset(np.arange(1500)))  # whatever is loaded or kept on first use
    before = peak()
    answer = ask(data)
    print(peak() - before)
    assert answer.shape == (n_cells, n_genes)
    assert answer.layers["counts_1"].nnz < 0.1 * n_cells * n_genes
"""


@pytest.mark.slow
def test_memory_is_that_of_the_answer() -> None:
    """Rates and their deviations are 160 MB each; three such arrays more are in use at the end."""
    folder = Path(__file__).parent
    paths = [str(folder), str(folder.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5 * 160


@pytest.mark.parametrize("count_draws", [0, 1, 2])
def test_what_is_written_is_what_is_answered(tmp_path, count_draws):
    posterior, cells = shared_fit(), make_data().subset(np.arange(23))
    options = {"draws": 3, "count_draws": count_draws, "seed": 1, "chunk": 5}
    act = do(artifact=0)
    expected = counterfactual(posterior, cells, act, **options)
    path = tmp_path / "answer.h5ad"
    on_disk = write_counterfactual(posterior, cells, act, path, **options)
    assert on_disk.shape == expected.shape
    found = anndata.read_h5ad(path)
    assert sorted(found.layers) == sorted(expected.layers)
    for name, layer in expected.layers.items():
        written = found.layers[name]
        assert type(written) is type(layer)
        assert (written != layer).sum() == 0
    if count_draws:
        assert (found.X != expected.X).nnz == 0
    else:
        assert found.X is None
    pd.testing.assert_frame_equal(found.obs.astype(str), expected.obs.astype(str))
    assert found.var_names.equals(expected.var_names)
    assert found.uns["cradle_query"]["intervention"] == expected.uns["cradle_query"]["intervention"]


def test_nothing_is_left_of_an_answer_that_fails(tmp_path, monkeypatch):
    import h5py

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(h5py.Dataset, "__setitem__", full)
    with pytest.raises(DataError, match="No space left"):
        write_counterfactual(
            shared_fit(), make_data().subset([0, 1]), do(), tmp_path / "a.h5ad", draws=1
        )
    assert list(tmp_path.iterdir()) == []
