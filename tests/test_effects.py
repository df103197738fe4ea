"""Questions about effects and profiles: what the answers depend on, and what they leave alone."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from factories import N_LATENTS, make_config, make_pair, make_schema, make_statistics
from pandas.testing import assert_frame_equal
from tiny import make_config as tiny_config
from tiny import make_data, make_fit, make_screen, shared_fit

from cradle_pyro import sites
from cradle_pyro.data.prepare import prepare
from cradle_pyro.errors import QueryError
from cradle_pyro.inference.posterior import Posterior, ReferenceCells, flag_column
from cradle_pyro.queries import abduction as abductions
from cradle_pyro.queries import counterfactual as counterfactuals
from cradle_pyro.queries import draws as draws_of_cells
from cradle_pyro.queries import effects as queries
from cradle_pyro.queries.calls import s_values
from cradle_pyro.queries.counterfactual import counterfactual
from cradle_pyro.queries.effects import (
    average_effect,
    compare,
    count_effects,
    effect_draws,
    effects,
    interaction,
)
from cradle_pyro.queries.interventions import do
from cradle_pyro.queries.scale import log2_expression
from cradle_pyro.queries.worlds import intervene

LIBRARY = np.array([300.0, 500.0, 900.0], np.float32)
SUMMARY = ["mean", "sd", "ci_low", "ci_high", "lfsr"]
LINEAR = {"likelihood": "normal", "decoder": {"layers": 0}}
FEW = {"draws": 2, "n_cells": 5}
SCALES = {"rate": FEW, "counts": {"scale": "counts", "draws": 1, "n_cells": 5}}
TRAIN = {"control": 9, "P0": 5, "P1": 4, "P2": 3, "P0+P1": 2, "P1+P2": 0}  # P1+P2 is held out


@cache
def shared_posterior(likelihood: str = "nb") -> Posterior:
    """Return a posterior with random parameters for all tests that only read it."""
    return make_posterior(model={"likelihood": likelihood})


def make_posterior(*, n_reference: int = 8, seed: int = 0, **sections) -> Posterior:
    """Return a posterior with random parameters, which laws hold for as for any others."""
    schema = make_schema()
    model, guide = make_pair(schema, seed=seed, **sections)
    generator = torch.Generator().manual_seed(seed)
    reference = ReferenceCells(
        loc=torch.randn(n_reference, N_LATENTS, generator=generator),
        scale=torch.full((n_reference, N_LATENTS), 0.3),
        library=torch.linspace(40, 200, n_reference),
        covariates=torch.zeros(n_reference, 0),
    )
    labels = pd.DataFrame(TRAIN.items(), columns=["label", "train"]).assign(val=1, test=2)
    for flag in schema.artifacts:
        labels[flag_column(flag)] = labels["train"].clip(upper=1)
    return Posterior(
        model=model,
        guide=guide,
        schema=schema,
        config=make_config(**sections),
        statistics=make_statistics(schema),
        reference=reference,
        history=pd.DataFrame(),
        labels=labels,
        failing_artifacts=torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
    )


def set_risk(posterior: Posterior, *, control: float, perturbed: float) -> Posterior:
    """Return a copy in which these are the log-odds of every flag, known exactly."""
    changed = copy.deepcopy(posterior)
    risk = changed.guide.artifact_risk
    with torch.no_grad():
        changed.model.artifact_log_odds.fill_(control)
        risk.loc.fill_(perturbed - control)
        risk.raw_scale.fill_(-100.0)
    return changed


@cache
def annotated():
    """Return the cells of ``make_data`` as AnnData; not to be changed."""
    return prepare(make_screen(), tiny_config()).adata


def with_columns():
    """Return the cells with a column named like one of the answer, and one that lacks values."""
    cells = annotated().copy()
    cells.obs["gene"] = "KLF1"
    cells.obs["donor"] = [None] * 3 + ["one"] * (cells.n_obs - 7) + [np.nan] * 4
    return cells


def with_missing_flags(data):
    """Return the cells with every fifth cell's flags missing."""
    observed = np.arange(data.n_cells) % 5 > 0
    artifact = np.where(observed[:, None], data.artifact, 0).astype(np.float32)
    return dataclasses.replace(data, artifact=artifact, artifact_observed=observed)


@pytest.fixture(scope="module")
def missing():
    return with_missing_flags(make_data())


@pytest.fixture(scope="module")
def missing_fit(missing):
    return make_fit(data=missing)


def labels_of(posterior):
    first, second, *_ = posterior.schema.perturbations
    return [first, second, f"{first}+{second}"]


def on_counts(posterior, labels):
    libraries = [LIBRARY] * len(labels)
    return count_effects(posterior, labels, libraries, LIBRARY, draws=2, n_cells=9)


def profiles(posterior, cells, intervention, *, draws=2):
    found = counterfactual(posterior, cells, intervention, draws=draws, count_draws=0)
    return found.layers["rate"]


def recorded_worlds(monkeypatch):
    """Return a list that fills with the sites of every world that effects ask about."""
    worlds, predict_each = [], queries.predict_each

    def recording(model, abduction, acts):
        found = predict_each(model, abduction, acts)
        for number in range(len(acts)):
            of_cells = {name: value[number] for name, value in found.items()}
            worlds.append(abduction.latents | of_cells)
        return found

    monkeypatch.setattr(queries, "predict_each", recording)
    return worlds


def log2_scale(world, scale):
    if scale == "rate":
        return np.log2(1 + 1e4 * world[sites.RATE].double().numpy())
    fraction = world[sites.COUNTS].double() / world[sites.LIBRARY].double().unsqueeze(-1)
    return np.log2(1 + 1e4 * fraction.numpy())


def numbers(table):
    return table.select_dtypes("number").to_numpy()


PAIR, SINGLE = "CEBPA+GATA1", "KLF1"
QUESTIONS = {
    "effect_draws": lambda p: effect_draws(p, labels_of(p), draws=2, n_cells=9),
    "count_effects": lambda p: on_counts(p, labels_of(p)),
    "average_effect": lambda p: numbers(average_effect(p, SINGLE, **FEW)),
    "total": lambda p: numbers(average_effect(p, SINGLE, kind="total", **FEW)),
    "counts": lambda _: numbers(
        average_effect(shared_posterior("poisson"), "P0", scale="counts", **FEW)
    ),
    "group effects": lambda p: numbers(
        average_effect(p, SINGLE, cells=annotated(), by="batch", **FEW)
    ),
    "compare": lambda p: numbers(compare(p, do(artifact="typical"), do(), **FEW)),
    "interaction": lambda p: numbers(interaction(p, PAIR, draws=1, n_cells=5)),
    "effects": lambda p: effects(p, draws=1, n_cells=5).X,
    "profiles": lambda p: profiles(p, make_data().subset(np.arange(20)), do(artifact=0), draws=3),
}


@pytest.fixture(params=QUESTIONS, ids=str)
def question(request):
    return QUESTIONS[request.param]


def test_effects_are_on_the_log2_scale_of_ten_thousand():
    rate = torch.tensor([0.0, 1e-4, 7e-4])
    expected = torch.tensor([0.0, 1.0, 3.0])
    for name, value in (("nb", rate), ("normal", torch.log1p(1e4 * rate))):
        torch.testing.assert_close(log2_expression(shared_posterior(name), value), expected)
    torch.testing.assert_close(rate, torch.tensor([0.0, 1e-4, 7e-4]))  # left as it was


@pytest.mark.parametrize("ask", [effects, average_effect], ids=lambda ask: ask.__name__)
def test_the_posterior_is_completed_once(monkeypatch, ask):
    """Both runs, with and without the spike, are of one: completing draws all effects there are."""
    calls = []

    def counted(posterior):
        calls.append(posterior)
        return draws_of_cells.completed(posterior)

    monkeypatch.setattr(queries, "completed", counted)
    ask(shared_posterior(), "P0", **FEW)
    assert len(calls) == 1


# ------------------------------------------------------------------------------- random numbers


def test_answers_neither_depend_on_the_callers_random_state_nor_move_it(question):
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        answers.append(question(shared_fit()))
        assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(*answers)


def test_a_question_that_fails_half_way_leaves_the_callers_random_state(question, monkeypatch):
    predict, calls = abductions.predict, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise InterruptedError
        return predict(*args)

    monkeypatch.setattr(abductions, "predict", failing)
    monkeypatch.setattr(counterfactuals, "predict", failing)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with pytest.raises(InterruptedError):
        question(shared_fit())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_labels_asked_together_or_one_by_one_have_the_same_effects():
    posterior = shared_posterior()
    labels = labels_of(posterior)
    together = effect_draws(posterior, labels, draws=2, n_cells=9, seed=4)
    for column, label in enumerate(labels):
        alone = effect_draws(posterior, [label], draws=2, n_cells=9, seed=4)
        np.testing.assert_array_equal(alone[:, 0], together[:, column])
    backwards = effect_draws(posterior, labels[::-1], draws=2, n_cells=9, seed=4)
    np.testing.assert_array_equal(backwards[:, ::-1], together)


def test_more_draws_begin_with_the_fewer_and_another_seed_has_others():
    posterior = shared_posterior()
    labels = labels_of(posterior)
    few, many = (effect_draws(posterior, labels, draws=n, n_cells=9) for n in (2, 4))
    np.testing.assert_array_equal(many[:2], few)
    assert len(np.unique(many[:, 0, 0])) == 4
    other = effect_draws(posterior, labels, draws=4, n_cells=9, seed=1)
    assert not np.isin(other[:, 0, 0], many[:, 0, 0]).any()


# ------------------------------------------------------------------------------- average effects


@pytest.mark.parametrize("scale", ["rate", "counts"])
@pytest.mark.parametrize("kind", ["direct", "total"])
def test_an_effect_is_the_difference_of_mean_logs_over_the_same_cells(kind, scale, monkeypatch):
    """One draw by hand, from the worlds the model was asked for."""
    posterior, worlds = shared_posterior(), recorded_worlds(monkeypatch)
    found = average_effect(posterior, "P1", kind=kind, scale=scale, draws=1, n_cells=9)
    base, world = worlds[:2]
    assert world[sites.RATE].shape == (9, posterior.schema.n_genes)
    for site in (sites.Z_BASAL, sites.Z_ARTIFACT, sites.GENE_EFFECT, sites.EFFECT):
        assert torch.equal(world[site], base[site])
    assert not base[sites.PERTURBATION].any()
    assert world[sites.PERTURBATION].tolist() == [[0, 1, 0]] * 9
    expected = log2_scale(world, scale).mean(0) - log2_scale(base, scale).mean(0)
    assert np.abs(expected).max() > 0.02
    np.testing.assert_allclose(found["mean"], expected, atol=2e-5)


def test_draws_of_several_effects_are_differences_to_the_same_control_world(monkeypatch):
    posterior, worlds = shared_posterior(), recorded_worlds(monkeypatch)
    found = effect_draws(posterior, labels_of(posterior)[:2], draws=1, n_cells=9)[0]
    base, *others = (log2_scale(world, "rate").mean(0) for world in worlds)
    assert len(others) == 2
    np.testing.assert_allclose(found, np.stack(others) - base, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["direct", "total"])
def test_a_single_label_is_a_list_of_one(kind, scale):
    options = SCALES[scale] | {"kind": kind}
    one, several = (effects(shared_posterior("poisson"), k, **options) for k in ("P1", ["P1"]))
    assert list(one.obs_names) == ["P1"]
    np.testing.assert_array_equal(one.X, several.X)
    draws = [effect_draws(shared_posterior(), labels, **FEW) for labels in ("P1", ["P1"])]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["direct", "total"])
def test_control_has_no_effect(kind, scale):
    found = average_effect(shared_posterior("poisson"), "control", kind=kind, **SCALES[scale])
    assert not found[SUMMARY[:-1]].to_numpy().any()
    assert (found["lfsr"] == 1).all()
    assert not effect_draws(shared_posterior(), ["control"], **FEW).any()


def test_effects_are_averages_over_abducted_controls_each_at_most_once(monkeypatch):
    posterior = shared_posterior()
    narrow = torch.full_like(posterior.reference.scale, 1e-6)
    posterior = dataclasses.replace(posterior, reference=posterior.reference._replace(scale=narrow))
    worlds = recorded_worlds(monkeypatch)
    average_effect(posterior, "P0", draws=2, n_cells=6)
    loc, library = posterior.reference.loc, posterior.reference.library
    chosen = []
    for world in worlds:
        rows = torch.cdist(world[sites.Z_BASAL], loc).argmin(1)
        assert torch.allclose(world[sites.Z_BASAL], loc[rows], atol=1e-4)
        assert torch.allclose(world[sites.LIBRARY], library[rows])
        assert len(rows.unique()) == 6
        chosen.append(rows.tolist())
    assert chosen[0] != chosen[2]


def test_direct_effects_are_without_artifact_and_leave_the_library():
    posterior = shared_posterior()
    stated = do(artifact=0)
    first = compare(posterior, do(perturbation="P0") | stated, stated, **FEW)
    assert_frame_equal(average_effect(posterior, "P0", **FEW), first)


def test_flags_that_certainly_appear_have_the_total_effect_of_switching_them_on():
    """All flags are absent in controls and present under any perturbation."""
    posterior = set_risk(shared_posterior(), control=-60, perturbed=60)
    total = average_effect(posterior, "P0", kind="total", **FEW)
    on = do(perturbation="P0", artifact="+".join(posterior.schema.artifacts))
    expected = compare(posterior, on, do(artifact=0), **FEW)
    np.testing.assert_array_equal(total[SUMMARY], expected[SUMMARY])
    direct = average_effect(posterior, "P0", **FEW)
    assert np.abs(total["mean"] - direct["mean"]).max() > 0.05


def test_flags_that_the_perturbation_leaves_alone_are_the_same_in_both_worlds(monkeypatch):
    posterior = set_risk(shared_posterior(), control=0, perturbed=0)
    worlds = recorded_worlds(monkeypatch)
    average_effect(posterior, "P0", kind="total", draws=1, n_cells=40)
    base, world = (one[sites.ARTIFACT] for one in worlds[:2])
    assert torch.equal(base, world)
    assert 0.2 < base.mean() < 0.8


def test_flags_are_kept_or_gained_where_the_perturbation_raises_their_risk(monkeypatch):
    """P(flag) rises from 1/2 to 3/4: those that had it keep it, half of the others gain it."""
    posterior = set_risk(shared_posterior(), control=0, perturbed=float(np.log(3)))
    worlds = recorded_worlds(monkeypatch)
    average_effect(posterior, "P0", kind="total", draws=1, n_cells=500)
    base, world = (one[sites.ARTIFACT] for one in worlds[:2])
    assert (world >= base).all()
    assert abs(float(world[base == 0].mean()) - 0.5) < 0.1


def set_depth(posterior, shift):
    """Return a copy in which every flag changes the log library by so much, known exactly."""
    changed = copy.deepcopy(posterior)
    with torch.no_grad():
        changed.guide.depth_shift.loc.fill_(shift)
        changed.guide.depth_shift.raw_scale.fill_(-100.0)
    return changed


def test_libraries_belong_to_the_flags_that_cells_are_drawn_with(monkeypatch):
    """Without the shift of its flags, a library does not tell which flags a cell has."""
    shift = -3.0
    posterior = set_depth(set_risk(shared_posterior(), control=0, perturbed=60), shift)
    worlds = recorded_worlds(monkeypatch)
    average_effect(posterior, "P0", kind="total", scale="counts", draws=1, n_cells=400)
    base, world = worlds[:2]
    rests = [
        one[sites.LIBRARY].log() - shift * one[sites.ARTIFACT].sum(-1) for one in (base, world)
    ]
    # Both worlds share the residual: the shift of flags that appear counts once.
    torch.testing.assert_close(rests[0], rests[1], atol=1e-4, rtol=1e-4)
    assert world[sites.ARTIFACT].all()
    flagged = base[sites.ARTIFACT].any(-1)
    assert 200 < flagged.sum() < 380
    scale = posterior.model.log_library_log_scale.exp().item()
    loc = posterior.model.log_library_loc.item()
    for some in (flagged, ~flagged):
        error = scale / np.sqrt(int(some.sum()))
        assert abs(float(rests[0][some].mean()) - loc) < 4.5 * error


@pytest.mark.parametrize(
    ("first", "kept"),
    [
        (do(perturbation="P0", artifact=0), True),
        (do(artifact="low_0"), False),
        (do(artifact="typical"), False),
        (do(artifact="factual"), False),
        (do(perturbation="P0"), False),
    ],
    ids=str,
)
def test_observed_libraries_of_controls_are_used_where_no_flag_moves_them(first, kept, monkeypatch):
    posterior, worlds = shared_posterior(), recorded_worlds(monkeypatch)
    compare(posterior, first, do(artifact=0), scale="counts", **FEW)
    known = set(posterior.reference.library.tolist())
    assert (set(worlds[0][sites.LIBRARY].tolist()) <= known) == kept


def test_an_artifact_that_does_not_reach_expression_adds_nothing_to_the_total_effect():
    posterior = make_posterior(model={"dilution": False})
    posterior = set_risk(posterior, control=-1, perturbed=3)
    direct, total = (
        average_effect(posterior, "P0", kind=kind, **FEW)["mean"] for kind in ("direct", "total")
    )
    assert np.abs(direct - total).max() > 0.02
    decoder = posterior.model.decoder
    with torch.no_grad():
        for weight in (decoder.linear[1].weight, decoder.network.inputs[1].weight):
            weight.zero_()  # what the artifact shift goes through
    direct, total = (
        average_effect(posterior, "P0", kind=kind, **FEW) for kind in ("direct", "total")
    )
    np.testing.assert_array_equal(direct[SUMMARY], total[SUMMARY])
    assert np.abs(direct["mean"]).max() > 0.02


def test_without_a_model_of_flags_total_effects_are_direct():
    posterior = make_posterior(model={"artifact_risk": False})
    direct, total = (
        average_effect(posterior, "P0", kind=kind, **FEW) for kind in ("direct", "total")
    )
    np.testing.assert_array_equal(direct[SUMMARY], total[SUMMARY])


def test_counts_of_deep_cells_without_dispersion_have_the_effects_of_the_rates():
    posterior = make_posterior(model={"likelihood": "poisson"})
    deep = torch.full_like(posterior.reference.library, 1e5)
    posterior = dataclasses.replace(posterior, reference=posterior.reference._replace(library=deep))
    rate, counts = (
        average_effect(posterior, "P0+P1", scale=scale, draws=2, n_cells=3)
        for scale in ("rate", "counts")
    )
    assert np.abs(rate["mean"]).max() > 0.05
    np.testing.assert_allclose(counts[SUMMARY[:2]], rate[SUMMARY[:2]], atol=0.01)


def test_log_normalised_values_move_with_their_expectation(monkeypatch):
    """Their noise is additive, so that it cancels between the worlds of a cell."""
    posterior, worlds = shared_posterior("normal"), recorded_worlds(monkeypatch)
    rate, counts = (
        average_effect(posterior, "P0", scale=scale, draws=1, n_cells=5)["mean"]
        for scale in ("rate", "counts")
    )
    base, world = (one[sites.RATE].mean(0) for one in worlds[:2])
    assert np.abs(rate).max() > 0.05
    np.testing.assert_allclose(rate, (world - base) / np.log(2), atol=1e-5)
    np.testing.assert_allclose(counts, rate, atol=1e-5)


def test_count_effects_of_deep_cells_without_dispersion_are_those_of_the_rates():
    posterior = make_fit("model.likelihood=poisson")
    labels = labels_of(posterior)
    deep = np.array([1e9], np.float32)
    found = count_effects(posterior, labels, [deep] * 3, deep, draws=2, n_cells=9)
    expected = effect_draws(posterior, labels, draws=2, n_cells=9).mean(0)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=5e-3)


def drawn_effects(posterior, labels, library, n):
    """Return count effects by brute force, and their standard error."""
    worlds = []
    for label in ("control", *labels):
        act = do(perturbation=label, artifact=0)
        made = intervene(posterior, act, n, library=library, draws=50, seed=3)
        counts = made.layers["counts"].toarray() / made.obs["cradle_library"].to_numpy()[:, None]
        worlds.append(np.log2(1 + 1e4 * counts))
    effects = np.stack([world.mean(0) - worlds[0].mean(0) for world in worlds[1:]])
    return effects, np.sqrt(2 / n) * worlds[0].std(0)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_count_effects_are_those_of_drawn_counts(likelihood):
    posterior = make_fit(f"model.likelihood={likelihood}")
    labels = labels_of(posterior)
    found = count_effects(posterior, labels, [LIBRARY] * 3, LIBRARY, draws=50, n_cells=60)
    expected, error = drawn_effects(posterior, labels, LIBRARY, 4000)
    assert np.abs(found).max() > 5 * error.max()
    assert np.abs(found - expected).max() < 5 * error.max()


def test_count_effects_of_a_distribution_that_is_not_known_are_of_drawn_counts(monkeypatch):
    def unknown(fn, library):
        raise TypeError

    posterior = make_fit()
    labels = labels_of(posterior)
    known = count_effects(posterior, labels, [LIBRARY] * 3, LIBRARY, draws=40, n_cells=100)
    monkeypatch.setattr(queries, "expected_log2_expression", unknown)
    drawn = count_effects(posterior, labels, [LIBRARY] * 3, LIBRARY, draws=40, n_cells=100)
    assert not np.allclose(drawn, known)
    assert np.corrcoef(drawn.ravel(), known.ravel())[0, 1] > 0.9


def test_a_label_like_the_control_has_no_effect_at_the_same_libraries():
    posterior = make_fit()
    found = count_effects(posterior, ["control"], [LIBRARY[::-1]], LIBRARY, draws=3, n_cells=9)
    np.testing.assert_array_equal(found, 0)


# ------------------------------------------------------------------------------------- summaries


@pytest.fixture(scope="module")
def seven_draws():
    """Draws of an effect, and the table that summarises them."""
    options = {"draws": 7, "n_cells": 2}
    draws = effect_draws(shared_posterior(), ["P0"], **options)[:, 0]
    return draws, average_effect(shared_posterior(), "P0", **options)


def test_a_table_summarises_the_draws(seven_draws):
    draws, found = seven_draws
    assert list(found.columns) == ["gene", *SUMMARY, "out_of_support"]
    assert tuple(found["gene"]) == shared_posterior().schema.genes
    np.testing.assert_allclose(found["mean"], draws.mean(0), atol=1e-6)
    squares = ((draws - draws.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(found["sd"], np.sqrt(squares / 6), atol=1e-6)


def test_the_local_false_sign_rate_is_the_share_of_draws_with_the_other_sign(seven_draws):
    draws, found = seven_draws
    rises = (draws > 0).sum(0)
    minority = np.where(rises > 3, 7 - rises, rises)
    assert {0, 1, 2, 3} >= set(minority)
    assert len(set(minority)) > 2
    np.testing.assert_allclose(found["lfsr"], minority / 7, atol=1e-12)


def test_intervals_without_a_spike_are_quantiles_of_the_draws():
    """Of 11 sorted draws, 2.5 % lie below a quarter of the way from the first to the second."""
    posterior = make_posterior(model={"gene_effect": "none"})
    draws = np.sort(effect_draws(posterior, ["P0"], draws=11, n_cells=2)[:, 0], axis=0)
    found = average_effect(posterior, "P0", draws=11, n_cells=2)
    np.testing.assert_allclose(found["ci_low"], 0.75 * draws[0] + 0.25 * draws[1], atol=1e-6)
    np.testing.assert_allclose(found["ci_high"], 0.25 * draws[-2] + 0.75 * draws[-1], atol=1e-6)


def test_intervals_with_a_spike_hold_those_of_the_draws_and_of_what_an_effect_would_be():
    """Where the spike is all but certain, draws hardly vary and their interval is too narrow."""
    posterior = copy.deepcopy(shared_posterior())
    with torch.no_grad():
        posterior.model.gene_effect_prior.logits[:, 0] = 20
    draws = effect_draws(posterior, ["P0"], draws=8, n_cells=2)[:, 0]
    found = average_effect(posterior, "P0", draws=8, n_cells=2)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    assert (found["ci_low"] <= low + 1e-6).all()
    assert (found["ci_high"] >= high - 1e-6).all()
    assert np.median(found["ci_high"] - found["ci_low"]) > 2 * np.median(high - low)


def test_a_single_draw_has_no_spread():
    found = average_effect(shared_posterior(), "P0", draws=1, n_cells=6)
    assert (found["sd"] == 0).all()
    assert (found["lfsr"] == 0).all()


def test_the_record_says_what_was_asked():
    posterior = shared_posterior("poisson")
    found = average_effect(posterior, "P0", kind="total", **SCALES["counts"], seed=3)
    record = found.attrs["cradle_query"]
    expected = {
        "intervention": "do(perturbation=P0)",
        "reference": "do(perturbation=control)",
        "scale": "difference of log2(1 + 1e4 counts / library)",
        "draws": 1,
        "n_cells": 5,
        "seed": 3,
        "out_of_support": [],
    }
    assert record | expected == record
    record = average_effect(posterior, "P0", **FEW).attrs["cradle_query"]
    assert record["intervention"] == "do(perturbation=P0, artifact=0)"
    assert record["reference"] == "do(perturbation=control, artifact=0)"
    assert record["scale"] == "difference of log2(1 + 1e4 rate)"


# --------------------------------------------------------------------------------------- compare

WORLDS = {
    "perturbed": do(perturbation="P0", artifact=0),
    "dosage": do(perturbation={"P1": 0.5}, artifact=0),
    "flagged": do(artifact="low_1"),
    "severity": do(perturbation="P2", artifact={"low_0": 0.4}),
    "total": do(perturbation="P1"),
    "library": do(perturbation="P1", artifact=0, library=5000),
    "basal": do(artifact=0, sites={sites.Z_BASAL: 0.5}),
    "nothing": do(),
    "typical": do(artifact="typical"),
}
ASKED = [(name, "rate") for name in WORLDS]
ASKED += [(name, "counts") for name in ("total", "library", "typical")]


@pytest.mark.parametrize(("name", "scale"), ASKED)
def test_a_world_does_not_differ_from_itself(name, scale):
    found = compare(shared_posterior("poisson"), WORLDS[name], WORLDS[name], **SCALES[scale])
    assert not found[SUMMARY[:-1]].to_numpy().any()


@pytest.mark.parametrize(
    ("name", "scale"),
    [asked for asked in ASKED if asked[0] not in ("nothing", "dosage", "severity")],
)
def test_comparing_the_other_way_round_turns_every_sign(name, scale):
    posterior, worlds = shared_posterior("poisson"), [WORLDS[name], WORLDS["nothing"]]
    there = compare(posterior, *worlds, **SCALES[scale])
    back = compare(posterior, *worlds[::-1], **SCALES[scale])
    assert np.abs(there["mean"]).max() > 0.01
    np.testing.assert_array_equal(back[["mean", "sd"]], there[["mean", "sd"]] * [-1, 1])
    np.testing.assert_array_equal(back["lfsr"], there["lfsr"])


def test_typical_flags_are_those_of_failing_cells_and_the_same_in_both_worlds(monkeypatch):
    posterior, worlds = shared_posterior(), recorded_worlds(monkeypatch)
    typical = do(artifact="typical")
    compare(posterior, do(perturbation="P0") | typical, typical, draws=3, n_cells=8)
    flags = [world[sites.ARTIFACT] for world in worlds]
    for base, world in zip(flags[::2], flags[1::2], strict=True):
        assert torch.equal(base, world)
    pool = set(map(tuple, posterior.failing_artifacts.tolist()))
    assert {tuple(row) for one in flags for row in one.tolist()} == pool
    assert not torch.equal(flags[0], flags[2])


def test_typical_flags_are_independent_of_the_cells_they_are_given_to(monkeypatch):
    """Of 8 cells and 8 flag vectors, numbers agree in one case of 8."""
    posterior = make_posterior(model={"gene_effect": "none"})
    severity = torch.arange(1, 9) / 10
    posterior = dataclasses.replace(
        posterior,
        reference=posterior.reference._replace(scale=torch.full((8, N_LATENTS), 1e-6)),
        failing_artifacts=torch.stack([severity, torch.zeros(8)], 1),
    )
    worlds = recorded_worlds(monkeypatch)
    compare(posterior, do(artifact="typical"), do(artifact=0), draws=25, n_cells=8)
    agree = [
        torch.cdist(world[sites.Z_BASAL], posterior.reference.loc).argmin(1)
        == torch.cdist(world[sites.ARTIFACT][:, :1], severity.unsqueeze(1)).argmin(1)
        for world in worlds[1::2]
    ]
    assert len(agree) == 25
    assert abs(float(torch.cat(agree).float().mean()) - 1 / 8) < 0.1  # four standard errors


def test_intervals_turn_round_too():
    there = compare(shared_posterior(), WORLDS["perturbed"], WORLDS["dosage"], **FEW)
    back = compare(shared_posterior(), WORLDS["dosage"], WORLDS["perturbed"], **FEW)
    np.testing.assert_allclose(back["ci_low"], -there["ci_high"], atol=1e-6)
    np.testing.assert_allclose(back["ci_high"], -there["ci_low"], atol=1e-6)


@pytest.mark.parametrize("cells", [None, annotated], ids=["reference", "cells"])
def test_groups_of_cells_obey_the_same_laws(cells):
    """Cells that were observed have flags of their own, which the reference has not."""
    given = {} if cells is None else {"cells": cells()}
    options = {"draws": 2, "n_cells": 20, **given}
    first, second = do(perturbation="KLF1"), do(artifact="high_mito")
    there, back, same = (
        compare(shared_fit(), one, other, **options)["mean"].to_numpy()
        for one, other in [(first, second), (second, first), (first, first)]
    )
    assert np.abs(there).max() > 0.001
    np.testing.assert_array_equal(there, -back)
    assert not same.any()


@pytest.mark.parametrize(
    "names",
    [
        ("perturbed", "flagged", "severity"),
        ("perturbed", "total", "nothing"),
        ("total", "perturbed", "flagged"),
        ("severity", "nothing", "flagged"),
    ],
    ids="-".join,
)
def test_differences_add_up_over_a_world_between(names):
    first, middle, last = (WORLDS[name] for name in names)
    direct, one, other = (
        compare(shared_posterior(), *worlds, **FEW)["mean"].to_numpy()
        for worlds in [(first, last), (first, middle), (middle, last)]
    )
    assert np.abs(one).max() > 0.01
    assert np.abs(other).max() > 0.01
    np.testing.assert_allclose(direct, one + other, atol=1e-5)


def test_factual_flags_are_those_that_cells_have_where_nothing_is_done():
    """do(artifact="factual") and do() are the same world, so they differ alike from a third."""
    factual, nothing = (
        compare(shared_posterior(), one, do(artifact=0), **FEW)
        for one in (do(artifact="factual"), do())
    )
    np.testing.assert_array_equal(factual[SUMMARY], nothing[SUMMARY])


# ------------------------------------------------------------------------------ groups of cells


def test_cells_given_as_anndata_or_as_arrays_are_the_same():
    options = {"draws": 2, "n_cells": 30}
    first, second = (
        average_effect(shared_fit(), SINGLE, cells=cells, **options)
        for cells in (annotated(), make_data())
    )
    assert_frame_equal(first, second)


@pytest.mark.parametrize("by", ["batch", "number", "truth", "category"])
def test_group_effects_are_differences_of_mean_logs_of_their_cells(by, monkeypatch):
    cells = annotated().copy()
    cells.obs["number"] = np.arange(cells.n_obs) % 3 * 5
    cells.obs["truth"] = np.arange(cells.n_obs) % 4 == 0
    levels = np.array(["x", "y"])[np.arange(cells.n_obs) // 100]
    cells.obs["category"] = pd.Categorical(levels, categories=["y", "unused", "x"])
    before = cells.obs.copy()
    worlds = recorded_worlds(monkeypatch)
    found = average_effect(shared_fit(), SINGLE, cells=cells, by=by, draws=1, n_cells=1000)
    assert_frame_equal(cells.obs, before)
    base, world = (log2_scale(one, "rate") for one in worlds[:2])
    expected = pd.DataFrame(world - base).groupby(cells.obs[by].astype(str).to_numpy()).mean()
    assert len(expected) > 1
    assert list(found.columns) == [by, "gene", *SUMMARY, "out_of_support"]
    by_gene = found.pivot(index=by, columns="gene", values="mean")[list(cells.var_names)]
    assert list(by_gene.index) == list(expected.index)
    np.testing.assert_allclose(by_gene, expected, atol=2e-5)


def test_group_effects_weighted_by_group_sizes_are_the_effect_over_all():
    cells = annotated()[:40]
    options = {"cells": cells, "kind": "total", "draws": 2, "n_cells": 1000}
    groups = average_effect(shared_fit(), SINGLE, by="perturbation", **options)
    overall = average_effect(shared_fit(), SINGLE, **options)
    sizes = cells.obs["perturbation"].value_counts()
    assert sizes.nunique() > 1
    means = groups.pivot(index="gene", columns="perturbation", values="mean")
    average = (means[sizes.index] * sizes / sizes.sum()).sum(axis=1)
    np.testing.assert_allclose(average[overall["gene"]], overall["mean"], atol=2e-6)
    assert np.ptp(means.to_numpy(), axis=1).max() > 1e-3


def test_cells_in_different_chunks_share_the_globals_of_a_draw(monkeypatch):
    monkeypatch.setattr(draws_of_cells, "_MOST_CELLS_AT_A_TIME", 4)
    worlds = recorded_worlds(monkeypatch)
    average_effect(shared_fit(), SINGLE, cells=annotated()[:7], draws=2)
    effect = [world[sites.GENE_EFFECT] for world in worlds[:8]]  # by chunk, draw, world
    assert [len(world[sites.RATE]) for world in worlds[:8]] == [4] * 4 + [3] * 4
    for number in range(4):
        assert torch.equal(effect[number], effect[4 + number])
    assert not torch.equal(effect[0], effect[2])


def test_of_every_group_at_most_so_many_cells_are_asked_about(monkeypatch):
    cells = annotated()[:60]
    sizes = cells.obs["perturbation"].value_counts()
    limit = int(sizes.median())
    assert sizes.min() < limit < sizes.max()
    worlds = recorded_worlds(monkeypatch)
    average_effect(shared_fit(), SINGLE, cells=cells, by="perturbation", draws=2, n_cells=limit)
    assert {len(world[sites.RATE]) for world in worlds} == {int(sizes.clip(upper=limit).sum())}
    worlds.clear()
    average_effect(shared_fit(), SINGLE, cells=cells, draws=2, n_cells=limit)
    assert {len(world[sites.RATE]) for world in worlds} == {limit}


# ----------------------------------------------------------------------------------- interaction


@pytest.mark.parametrize(("pair", "kind"), [("P2+P0", "total"), ("P0+P1+P2", "direct")])
def test_an_interaction_is_what_is_beyond_the_sum_of_the_members(pair, kind):
    posterior = shared_posterior()
    found = interaction(posterior, pair, kind=kind, **FEW)
    expected, *members = (
        average_effect(posterior, label, kind=kind, **FEW)["mean"].to_numpy()
        for label in (pair, *pair.split("+"))
    )
    assert list(found.columns) == ["gene", *SUMMARY, "out_of_support"]
    assert np.abs(found["mean"]).max() > 0.005
    np.testing.assert_allclose(found["mean"], expected - sum(members), atol=1e-5)


def test_draws_of_an_interaction_are_those_of_the_effects():
    posterior = shared_posterior()
    pair, first, second = effect_draws(posterior, ["P0+P1", "P0", "P1"], **FEW).transpose(1, 0, 2)
    draws = pair - first - second
    found = interaction(posterior, "P0+P1", **FEW)
    np.testing.assert_allclose(found["sd"], draws.std(0, ddof=1), atol=1e-6)
    rises = (draws > 0).mean(0)
    np.testing.assert_allclose(found["lfsr"], np.minimum(rises, 1 - rises), atol=1e-12)


@pytest.mark.parametrize("response", [False, True])
def test_nothing_interacts_where_values_are_linear_in_what_perturbations_do(response):
    """A cell's response scales what each member does; a sum stays a sum."""
    posterior = make_posterior(model=LINEAR | {"gene_effect": {"response": response}})
    found = interaction(posterior, "P0+P1", **FEW)
    assert np.abs(average_effect(posterior, "P0+P1", **FEW)["mean"]).max() > 0.05
    np.testing.assert_allclose(found["mean"], 0, atol=2e-6)
    np.testing.assert_allclose(found["sd"], 0, atol=2e-6)


@pytest.mark.parametrize(
    "model", [LINEAR | {"decoder": {"layers": 2}}, LINEAR | {"likelihood": "nb"}],
    ids=["bent decoder", "bent scale"],
)  # fmt: skip
def test_members_interact_where_decoder_or_scale_bend(model):
    posterior = make_posterior(model=model, seed=5)
    with torch.no_grad():
        posterior.model.decoder.linear[1].weight.mul_(5)  # what the perturbation shift goes through
    found = interaction(posterior, "P0+P1", draws=20, n_cells=5)
    assert np.abs(found["mean"]).max() > 1e-3


def test_an_interaction_records_its_members():
    found = interaction(shared_posterior(), "P2+P1", **FEW)
    record = found.attrs["cradle_query"]
    assert record["intervention"] == "do(perturbation=P2+P1, artifact=0)"
    assert record["reference"] == "sum of P1 and P2"
    assert record["out_of_support"] == [
        "the combination 'P1+P2' was held out: predicted from its members"
    ]
    assert found["out_of_support"].all()
    assert not interaction(shared_posterior(), "P0+P1", **FEW)["out_of_support"].any()


# --------------------------------------------------------------------------- tables of effects


@pytest.mark.parametrize(("kind", "scale"), [("direct", "rate"), ("total", "counts")])
def test_rows_are_the_average_effects_of_their_labels(kind, scale):
    posterior = shared_posterior("poisson")
    options = SCALES[scale] | {"kind": kind, "seed": 2}
    found = effects(posterior, ["P1", "P0+P2", "control"], **options)
    assert list(found.obs_names) == ["P1", "P0+P2", "control"]
    assert tuple(found.var_names) == posterior.schema.genes
    for row, label in enumerate(found.obs_names):
        table = average_effect(posterior, label, **options)
        for name in SUMMARY:
            values = found.X if name == "mean" else found.layers[name]
            np.testing.assert_array_equal(values[row], table[name].to_numpy(np.float32))
        assert found.obs["out_of_support"].iloc[row] == table["out_of_support"].all()


def test_draws_that_wait_on_disk_give_the_same_effects(monkeypatch):
    whole = effects(shared_posterior(), draws=1, n_cells=5)
    worlds = recorded_worlds(monkeypatch)
    two = 2 * shared_posterior().schema.n_genes  # of the five labels
    monkeypatch.setattr(queries, "_ENTRIES_AT_A_TIME", two)
    blocks = effects(shared_posterior(), draws=1, n_cells=5)
    controls = sum(not world[sites.PERTURBATION].any() for world in worlds)
    assert len(worlds) == controls * (1 + len(blocks))  # each label once for each draw
    np.testing.assert_array_equal(blocks.X, whole.X)
    for name in whole.layers:
        np.testing.assert_array_equal(blocks.layers[name], whole.layers[name])


def test_all_labels_are_asked_about_those_held_out_included():
    found = effects(shared_posterior(), **FEW)
    assert list(found.obs_names) == ["P0", "P1", "P2", "P0+P1", "P1+P2"]
    assert found.obs["n_train"].tolist() == [5, 4, 3, 2, 0]
    assert found.obs["out_of_support"].tolist() == [False] * 4 + [True]
    screen = effects(shared_fit(), draws=1, n_cells=2)
    assert set(screen.obs_names) == set(annotated().obs["perturbation"]) - {"control"}


def test_perturbations_seen_in_combinations_only_are_asked_about_alone():
    posterior = shared_posterior()
    labels = posterior.labels[posterior.labels["label"] != "P1"]
    posterior = dataclasses.replace(posterior, labels=labels)
    found = effects(posterior, **FEW)
    assert found.obs.loc["P1", "n_train"] == 0
    assert found.obs.loc["P1", "support"] == "'P1' was never screened: its effect is the prior's"
    alone = found.obs.loc["P1+P2", "support"]
    assert alone == (
        "the combination 'P1+P2' was held out: predicted from its members, and 'P1' alone never "
        "trained"
    )


def test_s_values_are_those_of_the_whole_table():
    found = effects(shared_posterior(), draws=5, n_cells=3)
    lfsr = found.layers["lfsr"]
    assert set(found.layers) == {"sd", "ci_low", "ci_high", "lfsr", "s_value"}
    np.testing.assert_array_equal(found.layers["s_value"], s_values(lfsr).astype(np.float32))
    surest = lfsr == lfsr.min()
    np.testing.assert_allclose(found.layers["s_value"][surest], lfsr.min(), atol=1e-7)
    most = found.layers["s_value"].max()
    np.testing.assert_allclose(most, lfsr.mean(dtype=float), rtol=1e-6)


def test_the_table_says_what_the_screen_does_not_support():
    found = effects(shared_posterior(), ["P0", "P1+P2", "P0+P2"], **FEW)
    assert found.obs["out_of_support"].tolist() == [False, True, True]
    assert found.obs["support"].tolist() == [
        "",
        "the combination 'P1+P2' was held out: predicted from its members",
        "the combination 'P0+P2' was never screened: predicted from its members",
    ]
    record = found.uns["cradle_query"]
    assert record["out_of_support"] == ["P1+P2", "P0+P2"]


def test_the_table_records_the_query():
    found = effects(shared_fit(), ["KLF1"], kind="total", scale="counts", draws=2, n_cells=3)
    record = found.uns["cradle_query"]
    assert record.pop("version")
    assert record == {
        "reference": "do(perturbation=control)",
        "kind": "total",
        "scale": "difference of log2(1 + 1e4 counts / library)",
        "draws": 2,
        "n_cells": 3,
        "seed": 0,
        "out_of_support": [],
        "fingerprint": make_data().fingerprint,
    }


@pytest.mark.parametrize("labels", [["P0", "P0+P2"], ["P0"]], ids=["some unsupported", "all known"])
def test_tables_are_written_and_read(labels, tmp_path):
    found = effects(shared_posterior(), labels, **FEW)
    found.write_h5ad(tmp_path / "effects.h5ad")
    again = anndata.read_h5ad(tmp_path / "effects.h5ad")
    np.testing.assert_array_equal(again.X, found.X)
    for name in found.layers:
        np.testing.assert_array_equal(again.layers[name], found.layers[name])
    assert_frame_equal(again.obs, found.obs)
    assert list(again.var_names) == list(found.var_names)
    record = dict(again.uns["cradle_query"])
    record["out_of_support"] = list(record["out_of_support"])
    assert record == found.uns["cradle_query"]


SPIKES = {"spike": {}, "no spike": {"gene_effect": "none"}}


@pytest.mark.parametrize("kind", SPIKES)
def test_a_progress_bar_goes_to_the_error_stream_and_changes_nothing(kind, capsys):
    posterior = make_posterior(model=SPIKES[kind])
    found = effects(posterior, ["P0"], **FEW, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Effects" in err
    np.testing.assert_array_equal(found.X, effects(posterior, ["P0"], **FEW).X)
    assert "100 %" in err


def test_the_order_of_members_does_not_matter():
    usual = effects(shared_posterior(), ["P0+P1"], **FEW)
    other = effects(shared_posterior(), ["P1 + P0"], **FEW)
    np.testing.assert_array_equal(other.X, usual.X)
    assert other.obs["n_train"].tolist() == [2]


# --------------------------------------------------------------------------------------- support


@pytest.mark.parametrize("label", ["P0+P2", "P1+P2"])
def test_effects_of_combinations_that_never_trained_are_answered_and_flagged(label):
    found = average_effect(shared_posterior(), label, **FEW)
    assert np.isfinite(found["mean"]).all()
    assert found["out_of_support"].all()
    (note,) = found.attrs["cradle_query"]["out_of_support"]
    assert label in note
    assert "predicted from its members" in note
    known = average_effect(shared_posterior(), "P0+P1", **FEW)
    assert not known["out_of_support"].any()


def test_cells_that_keep_their_perturbation_are_flagged_by_what_they_are():
    """No training cell with KLF1 carries low_counts in this table; controls do."""
    posterior = shared_fit()
    labels = posterior.labels.copy()
    column = flag_column("low_counts")
    labels[column] = np.where(labels["label"] == "KLF1", 0, 1)
    posterior = dataclasses.replace(posterior, labels=labels)
    perturbation = annotated().obs["perturbation"]
    options = {"draws": 1, "n_cells": 3}
    for label, flagged in [("KLF1", True), ("control", False)]:
        cells = annotated()[perturbation == label]
        found = compare(posterior, do(artifact="low_counts"), do(), cells=cells, **options)
        assert (found["out_of_support"] == flagged).all()


@pytest.mark.parametrize("pair", ["P0+P1", "P1+P0"])
def test_support_of_an_interaction_is_that_of_every_member_too(pair):
    """The pair was trained; one of its members alone never was."""
    posterior = shared_posterior()
    labels = posterior.labels[posterior.labels["label"] != "P1"]
    found = interaction(dataclasses.replace(posterior, labels=labels), pair, **FEW)
    assert found["out_of_support"].all()
    assert found.attrs["cradle_query"]["out_of_support"] == [
        "'P1' was never screened: its effect is the prior's"
    ]


def test_flags_that_no_training_control_carries_are_flagged_for_the_kept_controls():
    posterior = shared_posterior()
    labels = posterior.labels.copy()
    labels.loc[labels["label"] == "control", flag_column("low_1")] = 0
    posterior = dataclasses.replace(posterior, labels=labels)
    for flag, flagged in [("low_1", True), ("low_0", False)]:
        for worlds in [(do(artifact=flag), do()), (do(), do(artifact=flag))]:
            found = compare(posterior, *worlds, **FEW)
            assert (found["out_of_support"] == flagged).all()
    (note,) = compare(posterior, do(artifact="low_1"), do(), **FEW).attrs["cradle_query"][
        "out_of_support"
    ]
    assert note == "no training cell with 'control' carries 'low_1'"


def test_support_is_that_of_both_worlds():
    first, second = do(perturbation="P0", artifact=0), do(perturbation="P0+P2", artifact=0)
    assert compare(shared_posterior(), first, second, **FEW)["out_of_support"].all()


# ---------------------------------------------------------------------------------------- errors


def test_a_perturbation_the_model_does_not_know_is_an_error():
    with pytest.raises(QueryError, match="knows no perturbation 'KLF9'"):
        effect_draws(shared_fit(), ["KLF9"])


MISTAKES = {
    "unknown perturbation": (
        lambda p: average_effect(p, "KLF2"),
        "knows no perturbation 'KLF2'.*did you mean 'KLF1'",
    ),
    "unknown member": (
        lambda p: interaction(p, "GATA1+KLF9"),
        r"'KLF9' \(in 'GATA1\+KLF9'\).*did you mean 'KLF1'",
    ),
    "unknown label": (lambda p: effects(p, ["KLF1", "GATA2"]), "'GATA2'.*did you mean 'GATA1'"),
    "no intervention": (lambda p: compare(p, "KLF1", do()), r"such as do\(.*found str"),
    "no reference": (lambda p: compare(p, do(), None), r"such as do\(.*found NoneType"),
    "unknown flag": (
        lambda p: compare(p, do(artifact="high_mitto"), do()),
        "no artifact flag 'high_mitto'; did you mean 'high_mito'",
    ),
    "scale": (
        lambda p: average_effect(p, "KLF1", scale="count"),
        "scale is 'rate', 'counts', found 'count'; did you mean 'counts'",
    ),
    "scale of a comparison": (lambda p: compare(p, do(), do(), scale="log"), "found 'log'"),
    "scale of a table": (lambda p: effects(p, scale="rates"), "did you mean 'rate'"),
    "kind": (lambda p: average_effect(p, "KLF1", kind="all"), "'direct' or 'total', found 'all'"),
    "kind of a table": (lambda p: effects(p, kind="all"), "'direct' or 'total', found 'all'"),
    "kind of an interaction": (
        lambda p: interaction(p, PAIR, kind="all"),
        "'direct' or 'total', found 'all'",
    ),
    "one member": (lambda p: interaction(p, "KLF1"), "two or more perturbations, found 'KLF1'"),
    "no member": (lambda p: interaction(p, "control"), "two or more.*found 'control'"),
    "twice the same": (lambda p: interaction(p, "KLF1+KLF1"), r"found 'KLF1\+KLF1'"),
    "no draws": (lambda p: average_effect(p, "KLF1", draws=0), "draws >= 1.*found 0 and 100"),
    "no cells": (lambda p: average_effect(p, "KLF1", n_cells=0), "n_cells >= 1.*100 and 0"),
    "no draws of cells": (
        lambda p: compare(p, do(), do(), cells=annotated(), draws=0),
        "found 0 and 100",
    ),
    "no cells of a group": (
        lambda p: compare(p, do(), do(), cells=annotated(), by="batch", n_cells=0),
        "found 100 and 0",
    ),
    "no draws of an interaction": (lambda p: interaction(p, PAIR, draws=0), "found 0 and 100"),
    "no draws at all": (lambda p: effect_draws(p, ["KLF1"], draws=0), "found 0 and 100"),
    "no draws of a table": (lambda p: effects(p, draws=0), "found 0 and 100"),
    "no draws of count effects": (
        lambda p: count_effects(p, ["KLF1"], [LIBRARY], LIBRARY, draws=0),
        "found 0 and 100",
    ),
    "same label twice": (
        lambda p: effects(p, ["KLF1", "GATA1", "KLF1"]),
        "different labels, at least one; found 'KLF1', 'GATA1', 'KLF1'",
    ),
    "same combination twice": (
        lambda p: effects(p, ["CEBPA+GATA1", "GATA1+CEBPA"], draws=1),
        "different labels",
    ),
    "no label": (lambda p: effects(p, []), "at least one"),
    "number as label": (lambda p: average_effect(p, 3), "A label is a text such as .*found 3"),
    "list as pair": (lambda p: interaction(p, ["KLF1", "CEBPA"]), "A label is a text"),
    "number as labels": (lambda p: effects(p, 3), "Expected labels such as .*found 3"),
    "number among labels": (lambda p: effect_draws(p, ["KLF1", 3]), "A label is a text"),
    "letters of a label": (lambda p: effects(p, "KLF9"), "knows no perturbation 'KLF9'"),
    "seed": (lambda p: average_effect(p, "KLF1", seed=-1), "seed is a whole .* 0, found -1"),
    "seed of groups": (
        lambda p: compare(p, do(artifact=0), do(), cells=annotated(), seed=-1),
        "seed is a whole number",
    ),
    "seed of an interaction": (lambda p: interaction(p, PAIR, seed=-1), "seed is a whole number"),
    "seed of a table": (lambda p: effects(p, seed=-1), "seed is a whole number"),
    "half a draw": (lambda p: average_effect(p, "KLF1", draws=1.5), "draws is a whole.*1.5"),
    "half a cell": (lambda p: average_effect(p, "KLF1", n_cells=1.5), "n_cells is a whole.*1.5"),
    "column of the answer": (
        lambda p: compare(p, do(artifact=0), do(), cells=with_columns(), by="gene"),
        "by='gene' is also the name of a column of the answer. Rename it",
    ),
    "cells without a group": (
        lambda p: compare(p, do(artifact=0), do(), cells=with_columns(), by="donor"),
        "found 7 of 180 cells without a value of 'donor'",
    ),
    "groups of what": (
        lambda p: average_effect(p, "KLF1", by="batch"),
        "by='batch' groups cells: give them, cells=adata",
    ),
    "unknown column": (
        lambda p: average_effect(p, "KLF1", cells=annotated(), by="cell_typ"),
        "by='cell_typ' is not a column.*did you mean 'cell_type'.*'perturbation', 'cell_type'",
    ),
    "arrays have no columns": (
        lambda p: average_effect(p, "KLF1", cells=make_data(), by="batch"),
        "by='batch' is not a column of the cells.*none: give an AnnData",
    ),
    "cells of another schema": (
        lambda p: average_effect(p, "KLF1", cells=make_data("data.artifact=any")),
        "another schema",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_before_any_work(mistake, monkeypatch):
    question, message = MISTAKES[mistake]
    posterior, worlds = shared_fit(), recorded_worlds(monkeypatch)
    with pytest.raises(QueryError, match=message):
        question(posterior)
    assert not worlds


# ------------------------------------------------------------------------------------- profiles

OTHER_WORLDS = [do(), do(artifact=0), do(perturbation="control")]


def test_profiles_are_rates_of_the_other_world():
    posterior, data = shared_fit(), make_data()
    factual, without, unperturbed = (profiles(posterior, data, world) for world in OTHER_WORLDS)
    for rate in (factual, without, unperturbed):
        assert rate.shape == (data.n_cells, data.schema.n_genes)
        np.testing.assert_allclose(rate.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(without[~data.failing], factual[~data.failing], atol=1e-6)
    assert (without[data.failing] != factual[data.failing]).any(1).all()
    held = do(perturbation="control", artifact="factual")
    held = profiles(posterior, data, held)
    is_control = data.labels == "control"
    np.testing.assert_allclose(unperturbed[is_control], factual[is_control], atol=1e-6)
    np.testing.assert_allclose(held[is_control], factual[is_control], atol=1e-6)
    assert (held[~is_control] != factual[~is_control]).any(1).all()
    assert (unperturbed[~is_control] != factual[~is_control]).any(1).all()


def test_profiles_of_cells_with_missing_flags_follow_the_flags_drawn(missing, missing_fit):
    posterior = copy.deepcopy(missing_fit)
    unknown = missing.subset(~missing.artifact_observed)
    rates = {}
    for log_odds in (-20.0, 20.0):
        with torch.no_grad():
            posterior.guide.artifact_logits.weight.zero_()
            posterior.guide.artifact_logits.bias.fill_(log_odds)
        own = profiles(posterior, unknown, do(), draws=3)
        rates[log_odds] = own
        flags = 0 if log_odds < 0 else dict.fromkeys(posterior.schema.artifacts, 1.0)
        stated = profiles(posterior, unknown, do(artifact=flags), draws=3)
        np.testing.assert_allclose(own, stated, atol=1e-6)
        np.testing.assert_allclose(own.sum(1), 1, atol=1e-4)
    assert (rates[-20.0] != rates[20.0]).any(1).all()


def test_values_of_missing_flags_do_not_move_profiles_or_effects(missing, missing_fit):
    garbage = np.where(missing.artifact_observed[:, None], missing.artifact, 1)
    other = dataclasses.replace(missing, artifact=garbage.astype(np.float32))
    for world in OTHER_WORLDS:
        first, second = (profiles(missing_fit, d, world) for d in (missing, other))
        np.testing.assert_array_equal(first, second)
    first, second = (
        average_effect(missing_fit, SINGLE, kind="total", cells=d, draws=1)
        for d in (missing, other)
    )
    assert_frame_equal(first, second)
