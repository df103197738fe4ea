"""Evaluation: what references, ceilings and baselines are made of, and how they are shown."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import sparse
from tiny import make_config, make_data, make_fit, make_screen, shared_fit

from cradle_pyro.data.prepare import prepare
from cradle_pyro.errors import CheckpointError, DataError
from cradle_pyro.evaluation.evaluate import CEILING, MODEL, Evaluation, evaluate
from cradle_pyro.evaluation.predictive import generated_qc
from cradle_pyro.evaluation.truth import truth_of
from cradle_pyro.reporting.table import markdown, render, write_text_report

BASELINES = {
    "no_change",
    "global_mean",
    "training_mean_all",
    "training_mean_passing",
    "additive",
    "empirical_bayes",
}
HELD_OUT = ("split.method=combinations", 'split.held_out=["CEBPA+GATA1"]')


@pytest.fixture(scope="module")
def evaluation():
    """A simulated screen with a held-out pair, scored against cells and against the truth."""
    prepared = prepare(make_screen(), make_config(*HELD_OUT))
    posterior = make_fit(*HELD_OUT, data=prepared.data)
    return evaluate(posterior, prepared.data, truth=truth_of(prepared.adata))


def with_other_counts(data, rows, *, seed=0):
    """Return the cells with other counts in `rows`, libraries to match."""
    counts = data.rows(slice(None)).toarray()
    counts[rows] = 2 * np.random.default_rng(seed).permuted(counts[rows], axis=1)
    library = counts.sum(1).astype(np.float32)
    return dataclasses.replace(data, counts=sparse.csr_array(counts), library=library)


def scores(evaluation, predictor, reference="cells"):
    """Return the scores of one predictor by label set and metric."""
    table = evaluation.scores.query("predictor == @predictor and reference == @reference")
    return table.set_index(["labels", "metric"])["value"].sort_index()


def same(first, second):
    return first.index.equals(second.index) and np.array_equal(first, second, equal_nan=True)


# ------------------------------------------------------------------ references come from test cells


@pytest.mark.parametrize("unseen", ["train", "val"])
def test_references_do_not_depend_on_training_or_validation_cells(unseen):
    """Published mistake 8. No change and the ceiling depend on the reference alone."""
    data = make_data()
    changed = with_other_counts(data, np.asarray(data.split) == unseen)
    before, after = evaluate(shared_fit(), data), evaluate(shared_fit(), changed)
    for predictor in ("no_change", CEILING, MODEL):
        assert same(scores(before, predictor), scores(after, predictor)), predictor
    is_refitted = not same(scores(before, "training_mean_all"), scores(after, "training_mean_all"))
    assert is_refitted == (unseen == "train")


def test_references_come_from_passing_test_cells():
    data = make_data()
    is_test = np.asarray(data.split) == "test"
    before = evaluate(shared_fit(), data)
    failing = evaluate(shared_fit(), with_other_counts(data, is_test & data.failing))
    passing = evaluate(shared_fit(), with_other_counts(data, is_test & ~data.failing))
    for predictor in ("no_change", CEILING):
        assert same(scores(before, predictor), scores(failing, predictor))
        assert not same(scores(before, predictor), scores(passing, predictor))


def test_a_prediction_equal_to_the_reference_scores_one():
    """The reference, handed in as a predictor: the same cells, functional and order."""

    class Oracle:
        name = "oracle"

        def fit(self, train):
            return self

        def predict(self, labels, depth=None):
            test = data.subset((np.asarray(data.split) == "test") & ~data.failing)
            values = np.log2(1 + 1e4 * test.rows(slice(None)).toarray() / test.library[:, None])
            means = {k: values[test.labels == k].mean(0) for k in {*labels, "control"}}
            return np.stack([means[label] - means["control"] for label in labels])

    data = make_data()
    found = scores(evaluate(shared_fit(), data, baselines=[Oracle()]), "oracle")["seen"]
    assert found["ate_rho"] == pytest.approx(1.0, abs=1e-6)
    assert found["ate_r2"] == pytest.approx(1.0, abs=1e-6)
    assert found["jaccard_top20"] == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_evaluation():
    first, second = (evaluate(shared_fit(), make_data()) for _ in range(2))
    assert first.scores.equals(second.scores)
    assert first.facts == second.facts


# ------------------------------------------------------------------------------- what the table has


def test_no_number_stands_without_its_ceiling_and_baselines(evaluation):
    found = evaluation.scores.groupby(["reference", "labels"])["predictor"].agg(set)
    assert found["cells", "seen"] == {MODEL, CEILING, *BASELINES}
    assert found["cells", "held_out"] == {MODEL, CEILING, *BASELINES}
    assert found["truth", "seen"] == {MODEL, *BASELINES}  # the truth has no noise, so no ceiling
    assert found["truth", "held_out"] == {MODEL, *BASELINES}


def test_held_out_labels_are_scored_apart(evaluation):
    sizes = evaluation.scores.groupby(["reference", "labels"])["n_labels"].unique()
    assert sizes["cells", "seen"].tolist() == [3]
    assert sizes["cells", "held_out"].tolist() == [1]
    assert sizes["truth", "seen"].tolist() == [3]
    assert sizes["truth", "held_out"].tolist() == [1]


def test_facts_describe_the_cells_and_the_errors_against_the_truth(evaluation):
    facts = evaluation.facts
    split = np.asarray(make_data(*HELD_OUT).split)
    assert facts["n_train"] == (split == "train").sum()
    assert facts["n_test"] == (split == "test").sum()
    assert np.isfinite(facts["density"]["iwelbo_nats_per_cell"])
    assert set(facts["generated_qc"]["pass_rate"]) == {"3", "4", "5"}
    profiles = facts["profiles"]
    assert profiles["n_cells"] == (make_data(*HELD_OUT).failing & (split == "test")).sum()
    assert profiles["cleaned_over_raw"] == pytest.approx(profiles["cleaned"] / profiles["raw"])
    assert 0 < profiles["mean_passing"] < profiles["raw"]


@pytest.mark.parametrize(("flags", "used"), [("low_genes", ["low_genes"]), ("doublet", None)])
def test_generated_cells_are_judged_by_the_flags_that_the_screen_uses(flags, used):
    posterior, data = shared_fit(), make_data()
    train, test = data.where(split="train"), data.where(split="test")
    assert posterior.config.qc.flags == ()
    config = posterior.config.with_settings([f"qc.flags=['{flags}']"])
    found = generated_qc(dataclasses.replace(posterior, config=config), train, test)
    if used is None:  # a flag that counts alone cannot raise: all others are used
        assert found == generated_qc(posterior, train, test)
        return
    detected = [np.log1p((cells.rows(slice(None)) > 0).sum(1)) for cells in (train, test)]
    median = np.median(detected[0])
    cut = median - 3 * np.median(np.abs(detected[0] - median))
    assert found.real_pass_rate["3"] == pytest.approx((detected[1] >= cut).mean())
    every = generated_qc(posterior, train, test)
    assert every.real_pass_rate["3"] < found.real_pass_rate["3"]
    assert every.pass_rate["3"] < found.pass_rate["3"]


def test_the_noise_of_generated_cells_is_small_however_few_are_real():
    posterior, data = shared_fit(), make_data()
    train, test = data.where(split="train"), data.where(split="test")
    assert test.n_cells < 50
    first, second = (generated_qc(posterior, train, test, seed=seed) for seed in (1, 2))
    assert first != second
    for metric, distance in first.ks.items():
        assert distance == pytest.approx(second.ks[metric], abs=0.05)


def test_a_real_screen_has_no_truth():
    adata = make_screen()
    assert truth_of(adata) is not None
    del adata.uns["cradle_truth"]
    assert truth_of(adata) is None
    evaluation = evaluate(shared_fit(), make_data())
    assert set(evaluation.scores["reference"]) == {"cells"}
    assert "profiles" not in evaluation.facts


def test_true_effects_handed_in_as_truth_are_those_of_the_clean_profiles(evaluation):
    adata = make_screen()
    truth = truth_of(adata)
    log2 = np.log2(1 + 1e4 * np.asarray(adata.layers["true_rate"]))
    control = np.log2(1 + 1e4 * np.asarray(adata.layers["true_rate_control"]))
    own = adata.obs["perturbation"].astype(str).to_numpy()
    for label, effect in zip(truth.labels, truth.effects, strict=True):
        rows = own == label
        observed = (log2[rows] - control[rows]).mean(0)
        # The same quantity over another sample of cells.
        assert np.corrcoef(effect, observed)[0, 1] > 0.9


def test_marginals_are_scored_over_all_cells_that_carry_a_target():
    posterior = make_fit("evaluation.grouping=marginal")
    found = evaluate(posterior, make_data())
    assert found.scores.query("labels == 'seen'")["n_labels"].unique().tolist() == [3]
    assert set(found.scores["labels"]) == {"seen"}
    assert set(found.scores["predictor"]) == {MODEL, CEILING, *BASELINES}


def test_log_normalised_values_are_scored_without_count_metrics():
    from test_train import lognorm_data

    data = lognorm_data()
    found = evaluate(make_fit("model.likelihood=normal", data=data), data)
    assert np.isfinite(scores(found, MODEL)["seen", "ate_rho"])
    assert "density" not in found.facts


def test_a_model_without_flags_is_evaluated():
    data = make_data("data.artifact=none")
    found = evaluate(make_fit("data.artifact=none"), data)
    assert found.facts["failing_share"] == 0
    assert np.isfinite(scores(found, MODEL)["seen", "ate_rho"])


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("split", [None, "train"])
def test_without_test_cells_there_is_no_evaluation(split):
    data = make_data()
    split = None if split is None else np.full(data.n_cells, split)
    with pytest.raises(DataError, match="needs test cells"):
        evaluate(shared_fit(), dataclasses.replace(data, split=split))


def test_labels_with_too_few_test_cells_are_an_error():
    posterior = make_fit("evaluation.min_cells=100")
    with pytest.raises(DataError, match="min_cells"):
        evaluate(posterior, make_data())


# ------------------------------------------------------------------------------- files and tables


def test_metrics_are_json_without_nan_and_are_written_whole(evaluation, tmp_path):
    path = evaluation.write(tmp_path / "new" / "metrics.json")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert set(content) == {"facts", "scores"}
    written = pd.DataFrame(content["scores"])
    np.testing.assert_allclose(
        written["value"].astype(float), evaluation.scores["value"], equal_nan=True
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.json"]


def test_metrics_that_cannot_be_written_leave_the_earlier_ones(evaluation, tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("{}")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        evaluation.write(path)
    assert path.read_text() == "{}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_metrics_in_an_impossible_place_are_a_users_error(evaluation, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Could not write"):
        evaluation.write(tmp_path / "file" / "metrics.json")


def test_tables_fit_a_terminal_of_80_columns(evaluation):
    console = Console(width=80, record=True, file=io.StringIO())
    for table in render(evaluation):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for name in ("this model", "mean, passing cells", "empirical Bayes", "ceiling (split-half)"):
        assert name in text
    for name in (MODEL, *BASELINES - {"additive"}):
        assert name not in text
    assert "held-out perturbations (1 label)" in text
    assert "seen perturbations (3 labels)" in text


def test_predictors_of_ones_own_are_shown_by_name(evaluation):
    frame = evaluation.scores.replace({"predictor": {"additive": "my_model"}})
    assert "my model" in markdown(Evaluation(frame, evaluation.facts))


def test_the_report_holds_the_numbers_of_the_table(evaluation, tmp_path):
    path = write_text_report(evaluation, tmp_path / "report.md")
    lines = path.read_text(encoding="utf-8").splitlines()
    rho = scores(evaluation, MODEL)["seen", "ate_rho"]
    row = next(line for line in lines if line.startswith("| **this model**"))
    assert row.split("|")[2].strip() == f"{rho:.3f}"
    headings = [line for line in lines if line.startswith("## ")]
    assert len(headings) == 5  # cells and truth, each seen and held out; then the facts
    assert any("–" in line for line in lines if line.startswith("| no change"))


def test_values_that_do_not_exist_are_dashes(evaluation):
    table = evaluation.table(["ate_rho"])
    assert np.isnan(table.loc[("cells", "seen", "no_change"), "ate_rho"])
    assert table.index.get_level_values("predictor")[0] == MODEL
