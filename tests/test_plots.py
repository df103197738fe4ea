"""Plots draw the numbers they are given, on the axes they are given, at 5 and 500 perturbations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.colors import to_hex, to_rgba
from matplotlib.legend import Legend
from matplotlib.text import Annotation, Text

from cradle_pyro.data.confounding import confounding_report
from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.evaluate import CEILING, MODEL
from cradle_pyro.reporting import plots

SIZES = (5, 500)
N_GENES = 60


@pytest.fixture(autouse=True)
def _figures_closed():
    yield
    plt.close("all")


# ---------------------------------------------------------------------------------- made-up data


def make_history(n_epochs: int = 40) -> pd.DataFrame:
    epoch = np.arange(n_epochs)
    train, val = 100 + 300 / (1 + epoch), 120 + 300 / (1 + epoch) + 0.02 * (epoch - 25) ** 2
    columns = {"epoch": epoch, "train_loss": train, "val_loss": val}
    for number in range(10):
        columns[f"train_term_{number}"] = 10.0**-number / (1 + epoch)
        columns[f"val_term_{number}"] = 10.0 ** (number - 9) * (1 + 1 / (1 + epoch))
    return pd.DataFrame(columns)


def make_effects(n: int, *, seed: int = 0) -> AnnData:
    rng = np.random.default_rng(seed)
    mean = rng.normal(0, 0.01, (n, N_GENES))
    strong = rng.random(mean.shape) < 0.1
    mean[strong] += rng.choice([-1, 1], strong.sum()) * rng.uniform(0.5, 2, strong.sum())
    s_value = np.where(strong, 0.01, 0.4)
    return AnnData(
        mean.astype(np.float32),
        obs=pd.DataFrame(index=[f"PERT{i}" for i in range(n)]),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]),
        layers={"s_value": s_value.astype(np.float32)},
    )


def make_gene_table(n: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    mean = rng.normal(0, 1, n)
    lfsr = np.round(0.5 * np.exp(-4 * np.abs(mean)), 2)
    return pd.DataFrame(
        {
            "gene": [f"GENE{i}" for i in range(n)],
            "mean": mean,
            "ci_low": mean - 0.3,
            "ci_high": mean + 0.3,
            "lfsr": lfsr,
        }
    )


def make_report(n: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    labels = np.repeat(["control", *(f"PERT{i}" for i in range(n))], [400, *[40] * n])
    rate = np.repeat([0.4, *rng.uniform(0.02, 0.6, n)], [400, *[40] * n])
    return confounding_report(labels, rng.random(len(labels)) < rate)


def make_pairs(n: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    every = [(f"PERT{i}", f"PERT{j}") for i in range(n) for j in range(i + 1, n)]
    chosen = rng.permutation(len(every))[: 2 * n]
    return pd.DataFrame(
        {
            "first": [every[k][0] for k in chosen],
            "second": [every[k][1] for k in chosen],
            "strength": rng.gamma(1, 0.1, len(chosen)),
            "n_called": rng.poisson(4, len(chosen)),
            "out_of_support": rng.random(len(chosen)) < 0.3,
        }
    )


def make_predictive(n: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    mean = rng.gamma(0.5, 2, n)
    tables = []
    for name, value in {"mean": mean, "variance": mean + mean**2, "zeros": np.exp(-mean)}.items():
        observed = value * rng.uniform(0.7, 1.3, n)
        columns = {"observed": observed, "low": 0.8 * value, "median": value, "high": 1.2 * value}
        genes = [f"GENE{i}" for i in range(n)]
        tables.append(pd.DataFrame({"statistic": name, "gene": genes, **columns, "tail": 0.5}))
    return pd.concat(tables, ignore_index=True)


def make_leakage(n: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        (f"PERT{i}", source, method)
        for i in range(n)
        for source in ("z_basal", "counts")
        for method in ("knn", "logistic")
    ]
    table = pd.DataFrame(rows, columns=["target", "source", "method"])
    return table.assign(auroc=rng.uniform(0.45, 0.9, len(table)), se=0.02)


def make_scores(n: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    names = [MODEL, CEILING, *(f"baseline_{i}" for i in range(n))]
    rows = [
        (reference, labels, name, metric)
        for reference in ("cells", "truth")
        for labels in ("seen", "held_out")
        for name in names
        for metric in ("ate_rho", "ate_r2")
        if not (reference == "truth" and name == CEILING)
    ]
    table = pd.DataFrame(rows, columns=["reference", "labels", "predictor", "metric"])
    return table.assign(value=rng.uniform(0, 1, len(table)), n_labels=7)


def make_worlds(n: int, *, seed: int = 0) -> dict[str, pd.Series]:
    rng = np.random.default_rng(seed)
    genes = [f"GENE{i}" for i in range(n)]
    base = rng.uniform(0, 8, n)
    names = ("observed", "artifact = 0", "KLF1")
    return {name: pd.Series(base + k * rng.normal(0, 1, n), genes) for k, name in enumerate(names)}


def make_embeddings(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(n, 2))
    return before, 0.5 * before - 1, rng.random(n) < 0.3


def make_units(n: int) -> pd.DataFrame:
    kl = np.random.default_rng(0).gamma(0.5, 1, n)
    columns = {"latent": np.arange(n), "kl": kl, "mean_variance": 0.5, "mean_sd": 0.4}
    return pd.DataFrame(columns | {"active": kl > 0.1})


def make_curve() -> pd.DataFrame:
    level = np.linspace(0.05, 0.95, 19)
    return pd.DataFrame({"level": level, "coverage": level**1.2, "n": 300})


def make_band() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grid = np.linspace(0, 1, 11)
    return grid, -0.1 * np.sqrt(grid * (1 - grid)), 0.1 * np.sqrt(grid * (1 - grid))


def make_ranks(n: int, n_draws: int = 99) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n_draws + 1, n)


def metric_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=n), rng.normal(size=(8, n))


Draw = Callable[..., Any]

PLOTS: dict[str, Callable[[int], Draw]] = {
    "training_history": lambda n: lambda **o: plots.training_history(make_history(n), **o),
    "loss_terms": lambda n: lambda **o: plots.loss_terms(make_history(n), **o),
    "effect_heatmap": lambda n: lambda **o: plots.effect_heatmap(make_effects(n), **o),
    "volcano": lambda n: lambda **o: plots.volcano(make_gene_table(n), **o),
    "interaction_matrix": lambda n: lambda **o: plots.interaction_matrix(make_pairs(n), **o),
    "confounding": lambda n: lambda **o: plots.confounding(make_report(n), **o),
    "rank_histogram": lambda n: lambda **o: plots.rank_histogram(make_ranks(n), 99, **o),
    "rank_ecdf": lambda n: lambda **o: plots.rank_ecdf(make_ranks(n), 99, make_band(), **o),
    "pit_histogram": lambda n: lambda **o: plots.pit_histogram(make_ranks(n) / 99, **o),
    "coverage": lambda n: lambda **o: plots.coverage(make_curve(), **o),
    "predictive_genes": lambda n: (
        lambda **o: plots.predictive_genes(make_predictive(n), "mean", **o)
    ),
    "mean_variance": lambda n: lambda **o: plots.mean_variance(make_predictive(n), **o),
    "predictive_metric": lambda n: (
        lambda **o: plots.predictive_metric(*metric_of(n), name="log counts", **o)
    ),
    "latent_units": lambda n: lambda **o: plots.latent_units(make_units(n), **o),
    "leakage": lambda n: lambda **o: plots.leakage(make_leakage(n), **o),
    "scores": lambda n: lambda **o: plots.scores(make_scores(n), "ate_rho", **o),
    "before_after": lambda n: lambda **o: plots.before_after(*make_embeddings(n), **o),
    "counterfactual_cell": lambda n: lambda **o: plots.counterfactual_cell(make_worlds(n), **o),
}
TWO_AXES = ("before_after", "counterfactual_cell")


def labels_of(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def offsets(ax, number: int = 0) -> np.ndarray:
    return np.asarray(ax.collections[number].get_offsets())


def same_points(found: np.ndarray, expected: np.ndarray) -> None:
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    order = [np.lexsort(points.T) for points in (found.round(9), expected.round(9))]
    np.testing.assert_allclose(found[order[0]], expected[order[1]], rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------- all the plots


def test_every_public_plot_is_tested():
    assert set(PLOTS) == set(plots.__all__)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_draws_on_the_axes_given_and_changes_nothing_else(name, n):
    before = mpl.rcParams.copy()
    other, one = plt.subplots(), plt.subplots(1, 2, figsize=(12, 6))
    given = {"axes": one[1]} if name in TWO_AXES else {"ax": one[1][0]}
    found = PLOTS[name](n)(**given)
    if name in TWO_AXES:
        assert list(found) == list(one[1])
    else:
        assert found is one[1][0]
    one[0].canvas.draw()
    assert mpl.rcParams == before
    assert plt.get_fignums() == [other[0].number, one[0].number]
    assert not other[1].has_data()


def visible_texts(ax) -> list[Text]:
    legend = ax.get_legend()
    inside = [] if legend is None else legend.get_texts()
    titles = [ax.title, ax._left_title, ax._right_title, ax.xaxis.label, ax.yaxis.label]
    ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
    return [t for t in (*inside, *titles, *ticks, *ax.texts) if t.get_text() and t.get_visible()]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", PLOTS)
def test_a_figure_of_its_own_cuts_no_text_and_names_of_ticks_do_not_overlap(name, n):
    found = PLOTS[name](n)()
    axes = list(found) if name in TWO_AXES else [found]
    figure = axes[0].figure
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()
    page = figure.bbox.padded(1.5)
    for ax in figure.axes:
        inside = ax.bbox.padded(1)
        texts = [t.get_window_extent() for t in visible_texts(ax)]
        ticks = [
            (axis, label.get_window_extent())
            for axis, labels in (("x", ax.get_xticklabels()), ("y", ax.get_yticklabels()))
            for label in labels
            if label.get_text()
        ]
        seen = [box for box in texts if box.width]
        # Ticks outside of the range are not drawn.
        seen = [b for b in seen if not any(b.bounds == t.bounds for _, t in ticks)]
        seen += [
            box
            for axis, box in ticks
            if getattr(inside, f"{axis}0")
            <= sum(getattr(box, f"interval{axis}")) / 2
            <= getattr(inside, f"{axis}1")
        ]
        for box in seen:
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, (name, box)
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, (name, box)
        for axis in ("x", "y"):
            spans = sorted(
                tuple(getattr(box, f"interval{axis}")) for which, box in ticks if which == axis
            )
            inner = [s for s in spans if s[1] > s[0]]
            assert all(a[1] <= b[0] + 1 for a, b in pairwise(inner)), name


def colours_of(artist) -> set[str]:
    found = set()
    for getter in ("get_facecolors", "get_edgecolors", "get_colors"):
        if hasattr(artist, getter):
            found |= {to_hex(colour) for colour in np.atleast_2d(getattr(artist, getter)())}
    return found


def test_categories_are_told_apart_by_colour_blind_readers():
    """Machado et al. 2009 (deuteranopia, protanopia): no two categories fall together."""
    simulated = {
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                   [-0.011820, 0.042940, 0.968881]],
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    }  # fmt: skip
    colours = np.array([to_rgba(colour)[:3] for colour in plots.CATEGORIES])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for matrix in simulated.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distance[np.triu_indices(len(seen), 1)].min() > 0.15


# -------------------------------------------------------------------------------------- training


def test_the_best_epoch_is_that_of_the_lowest_validation_loss():
    history = make_history()
    ax = plots.training_history(history)
    best = history["val_loss"].idxmin()
    assert 0 < best < len(history) - 1
    same_points(offsets(ax), [[history["epoch"][best], history["val_loss"][best]]])
    lines = {line.get_label(): line for line in ax.lines}
    for name, column in {"training": "train_loss", "validation": "val_loss"}.items():
        np.testing.assert_array_equal(lines[name].get_ydata(), history[column])
    low, high = ax.get_ylim()
    late = history.loc[4:, ["train_loss", "val_loss"]].to_numpy()
    assert low < late.min()
    assert np.quantile(late, 0.97) < high < history["val_loss"][0]


def test_one_bad_epoch_does_not_squeeze_the_others():
    history = make_history()
    history.loc[20, "train_loss"] = 1e6
    assert plots.training_history(history).get_ylim()[1] < 400


@pytest.mark.parametrize("missing", ["absent", "never measured"])
def test_without_validation_the_training_loss_judges(missing):
    history = make_history()
    if missing == "absent":
        history = history.drop(columns="val_loss")
    else:
        history["val_loss"] = np.nan
    ax = plots.training_history(history)
    same_points(offsets(ax), [[39, history["train_loss"][39]]])
    assert "validation" not in {line.get_label() for line in ax.lines}


def test_terms_are_sorted_by_their_last_value():
    history = make_history()
    ax = plots.loss_terms(history)
    names = [text.get_text().split("  ")[0] for text in ax.get_legend().get_texts()]
    assert names == [f"term {k}" for k in reversed(range(10))]
    for line, name in zip(ax.lines, names, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), history[f"val_{name.replace(' ', '_')}"])
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 10
    assert ax.get_yscale() == "log"


def test_terms_of_training_are_shown_without_validation_and_negative_ones_too():
    history = make_history().filter(regex="epoch|train_")
    history["train_term_3"] *= -1
    ax = plots.loss_terms(history)
    assert ax.get_ylabel().startswith("training")
    assert ax.get_yscale() == "symlog"
    assert len(ax.lines) == 10


# --------------------------------------------------------------------------------------- effects


def drawn_matrix(ax, effects: AnnData) -> tuple[np.ndarray, list[str], list[str]]:
    rows, columns = labels_of(ax.yaxis), labels_of(ax.xaxis)
    return np.asarray(ax.images[0].get_array()), rows, columns


def test_a_heat_map_shows_the_effects_of_the_rows_and_columns_it_names():
    effects = make_effects(12)
    ax = plots.effect_heatmap(effects, n_genes=10)
    values, rows, columns = drawn_matrix(ax, effects)
    assert sorted(rows) == sorted(effects.obs_names)
    assert len(columns) == 10
    np.testing.assert_array_equal(values, effects[rows, columns].X)
    low, high = ax.images[0].get_clim()
    assert low == -high < 0


def test_the_genes_called_most_often_are_shown():
    effects = make_effects(12)
    counts = (effects.layers["s_value"] <= 0.1).sum(0)
    columns = set(labels_of(plots.effect_heatmap(effects, n_genes=8).xaxis))
    chosen = effects.var_names.isin(columns)
    assert counts[chosen].min() >= counts[~chosen].max()


def test_small_effects_get_no_mark_however_sure():
    effects = make_effects(8)
    effects.layers["s_value"][:] = 0
    for least in (0.05, 1.0):
        ax = plots.effect_heatmap(effects, least_effect=least)
        values, _, _ = drawn_matrix(ax, effects)
        large = np.argwhere(np.abs(values) >= least)
        assert 0 < len(large) < values.size
        same_points(offsets(ax), large[:, ::-1])


def test_marks_stand_at_the_called_entries():
    effects = make_effects(8)
    effects.layers["s_value"][0] = 0.2
    for rate in (0.1, 0.3):
        ax = plots.effect_heatmap(effects, called=rate, least_effect=0)
        _, rows, columns = drawn_matrix(ax, effects)
        called = np.argwhere(effects[rows, columns].layers["s_value"] <= rate)
        assert len(called)
        same_points(offsets(ax), called[:, ::-1])


def test_inclusion_makes_marks_full_or_open():
    effects = make_effects(8)
    effects.layers["inclusion"] = np.random.default_rng(1).random(effects.shape)
    ax = plots.effect_heatmap(effects)
    _, rows, columns = drawn_matrix(ax, effects)
    part = effects[rows, columns]
    called, included = part.layers["s_value"] <= 0.1, part.layers["inclusion"] >= 0.5
    same_points(offsets(ax, 0), np.argwhere(called & included)[:, ::-1])
    same_points(offsets(ax, 1), np.argwhere(called & ~included)[:, ::-1])


def test_similar_perturbations_stand_side_by_side():
    effects = make_effects(6)
    effects.X[:] = np.tile([[3.0], [-3.0]], (3, N_GENES)) + 0.01 * effects.X
    rows = labels_of(plots.effect_heatmap(effects).yaxis)
    even = [int(name.removeprefix("PERT")) % 2 for name in rows]
    assert even in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_labels_are_shown_in_the_order_asked_for():
    labels = ["PERT4", "PERT1", "PERT3"]
    assert labels_of(plots.effect_heatmap(make_effects(6), labels=labels).yaxis) == labels


def test_many_perturbations_have_no_marks_and_fewer_names():
    effects = make_effects(500)
    ax = plots.effect_heatmap(effects)
    assert not ax.collections
    assert 20 <= len(labels_of(ax.yaxis)) <= 80
    assert ax.images[0].get_array().shape == (500, 30)
    for place, name in zip(ax.get_yticks(), labels_of(ax.yaxis), strict=True):
        row = ax.images[0].get_array()[int(place)]
        np.testing.assert_array_equal(row, effects[name, labels_of(ax.xaxis)].X[0])


def test_a_volcano_draws_every_gene_and_no_rate_of_zero():
    table = make_gene_table(200)
    table.attrs["cradle_query"] = {"draws": 50}
    assert (table["lfsr"] == 0).any()
    ax = plots.volcano(table)
    rate = np.where(table["lfsr"] == 0, 0.01 / 2, table["lfsr"])  # the least rate in the table
    np.testing.assert_allclose(offsets(ax), np.c_[table["mean"], -np.log10(rate)])
    table.attrs["cradle_query"] = {"draws": 1000}
    assert offsets(plots.volcano(table))[:, 1].max() == pytest.approx(-np.log10(0.0005))


def test_a_volcano_names_the_surest_genes_with_their_intervals():
    table = make_gene_table(200)
    ax = plots.volcano(table, n_labels=7)
    assert (table["lfsr"] <= 0.1).sum() > 7
    surest = table.sort_values(["lfsr", "mean"], key=lambda c: c if c.name == "lfsr" else -c.abs())
    names = {text.get_text() for text in ax.texts}
    assert names == set(surest["gene"][:7])
    segments = np.array(ax.collections[1].get_segments())
    ends = table[table["gene"].isin(names)][["ci_low", "ci_high"]]
    same_points(segments[:, :, 0], ends.to_numpy())
    for text in ax.texts:
        assert isinstance(text, Annotation)
        assert text.xy[0] == table.set_index("gene")["mean"][text.get_text()]


@pytest.mark.parametrize("n_labels", [0, 1, 10, 60])
def test_names_in_a_volcano_do_not_overlap(n_labels):
    table = make_gene_table(300)
    table["mean"] = 1 + 0.01 * table["mean"]  # all in one place
    table["gene"] = "LONGNAME" + table["gene"]
    ax = plots.volcano(table, n_labels=n_labels)
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    boxes.sort(key=lambda box: box.x0)
    assert all(a.x1 <= b.x0 + 0.5 for a, b in pairwise(boxes))
    assert all(ax.bbox.x0 - 1 <= box.x0 and box.y1 <= ax.bbox.y1 + 2 for box in boxes)
    assert min(n_labels, 20) <= len(boxes) <= n_labels


def test_genes_whose_sign_is_open_have_no_name():
    table = make_gene_table(50)
    table.loc[3:, "lfsr"] = 0.2
    assert {text.get_text() for text in plots.volcano(table).texts} <= {"GENE0", "GENE1", "GENE2"}
    table["lfsr"] = 0.2
    assert not plots.volcano(table).texts


def test_an_interaction_matrix_is_symmetric_and_blank_where_nothing_was_asked():
    table = make_pairs(8)
    ax = plots.interaction_matrix(table)
    names = labels_of(ax.yaxis)
    assert names == labels_of(ax.xaxis)
    values = np.ma.filled(ax.images[0].get_array().astype(float), np.nan)
    expected = np.full(values.shape, np.nan)
    for row in table.itertuples():
        i, j = names.index(row.first), names.index(row.second)
        expected[i, j] = expected[j, i] = row.strength
    np.testing.assert_array_equal(values, expected)
    total = np.nansum(expected, 0)
    assert (np.diff(total) <= 1e-12).all()
    written = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in ax.texts}
    for row in table.itertuples():
        assert written[names.index(row.first), names.index(row.second)] == str(row.n_called)
    assert len(written) == 2 * len(table)
    corners = offsets(ax).round().astype(int)
    outside = table[table["out_of_support"]]
    expected_corners = [(names.index(r.first), names.index(r.second)) for r in outside.itertuples()]
    assert {tuple(c) for c in corners} == {
        pair for i, j in expected_corners for pair in ((i, j), (j, i))
    }


def test_an_interaction_matrix_of_hundreds_shows_members_with_pairs_as_points():
    table = make_pairs(400).iloc[:150]
    ax = plots.interaction_matrix(table)
    members = pd.unique(table[["first", "second"]].to_numpy().ravel())
    assert ax.images[0].get_array().shape == (len(members), len(members))
    assert not ax.texts
    assert len(labels_of(ax.yaxis)) < len(members)
    drawn = np.asarray(ax.collections[0].get_array())
    np.testing.assert_allclose(np.sort(drawn), np.sort(np.repeat(table["strength"], 2)))


def test_names_of_a_matrix_do_not_overlap_on_wide_axes():
    ax = plt.subplots(figsize=(12, 3))[1]
    plots.interaction_matrix(make_pairs(30), ax=ax)
    ax.figure.canvas.draw()
    spans = sorted(label.get_window_extent().intervalx.tolist() for label in ax.get_xticklabels())
    assert all(a[1] <= b[0] + 1 for a, b in pairwise(spans))


# ----------------------------------------------------------------------------------------- cells


def test_cells_before_and_after_have_the_colour_of_their_flag_and_one_range():
    before, after, flags = make_embeddings(50)
    axes = plots.before_after(before, after, flags)
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert axes[0].get_ylim() == axes[1].get_ylim()
    for ax, points in zip(axes, (before, after), strict=True):
        colours = ax.collections[0].get_facecolors()
        is_failing = np.array([to_hex(colour) == plots.ORANGE.lower() for colour in colours])
        same_points(offsets(ax)[is_failing], points[flags])
        same_points(offsets(ax)[~is_failing], points[~flags])
    legend = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert legend == [f"passing ({(~flags).sum()})", f"failing ({flags.sum()})"]


def test_a_cell_page_shows_the_genes_that_differ_most():
    worlds = make_worlds(100)
    left, right = plots.counterfactual_cell(worlds, n_genes=15)
    table = pd.DataFrame(worlds)
    spread = (table.max(axis=1) - table.min(axis=1)).sort_values(ascending=False)
    genes = labels_of(left.yaxis)
    assert genes == spread.index[:15].tolist()
    assert left.yaxis_inverted()
    for number, (name, values) in enumerate(worlds.items()):
        drawn = left.collections[number + 1]
        assert drawn.get_label() == name
        np.testing.assert_allclose(offsets(left, number + 1), np.c_[values[genes], range(15)])
    widths = [bar.get_width() for bar in right.patches]
    expected = [(values - worlds["observed"]).abs() for values in list(worlds.values())[1:]]
    np.testing.assert_allclose(widths, [values.mean() for values in expected])
    for text, values in zip(right.texts, expected, strict=True):
        assert f"{(values > 1).sum()} genes" in text.get_text()


def test_genes_of_worlds_may_come_in_any_order():
    worlds = make_worlds(30)
    shuffled = worlds | {"KLF1": worlds["KLF1"].sample(frac=1, random_state=0)}
    plain, other = (plots.counterfactual_cell(w)[0] for w in (worlds, shuffled))
    np.testing.assert_array_equal(offsets(plain, 3), offsets(other, 3))


def test_confounding_shows_the_perturbations_that_deviate_most():
    report = make_report(80)
    ax = plots.confounding(report, n_most=12)
    names = labels_of(ax.yaxis)
    others = report.iloc[1:]
    farthest = others["difference"].abs().nlargest(12)
    assert others["difference"][farthest.index].min() < 0 < others["difference"].max()
    assert names[0] == "control"
    assert others["difference"].abs()[names[1:]].min() >= farthest.min()
    assert len(names) == 13
    share = 100 * report.loc[names, "failing_share"]
    np.testing.assert_allclose(offsets(ax, -1), np.c_[share, range(13)])
    assert (np.diff(share[1:]) >= 0).all()
    segments = np.array(ax.collections[-2].get_segments())[:, :, 0]
    np.testing.assert_allclose(segments, 100 * report.loc[names, ["share_low", "share_high"]])
    assert ax.get_title(loc="left").startswith("12 of 80 perturbations")
    assert "of" not in plots.confounding(make_report(5)).get_title(loc="left").split("\n")[0]


# ----------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(("n_draws", "n_bins"), [(99, 20), (100, 20), (49, 10), (4, 5)])
def test_ranks_are_counted_whole(n_draws, n_bins):
    ranks = make_ranks(3000, n_draws)
    ax = plots.rank_histogram(ranks, n_draws, bins=20 if n_draws > 60 else 13)
    bars = [bar for bar in ax.patches if hasattr(bar, "get_height")]
    assert len(bars) == n_bins
    assert sum(bar.get_height() for bar in bars) == len(ranks)
    for bar in bars:
        low, high = bar.get_x(), bar.get_x() + bar.get_width()
        assert ((ranks > low) & (ranks < high)).sum() == bar.get_height()


def test_the_band_of_ranks_accepts_uniform_ones_and_no_others():
    rng = np.random.default_rng(0)
    notes = {}
    for name, ranks in {
        "uniform": rng.integers(0, 100, 4000),
        "narrow": rng.binomial(99, rng.beta(0.6, 0.6, 4000)),
        "wide": rng.binomial(99, rng.beta(1.6, 1.6, 4000)),
    }.items():
        notes[name] = int(plots.rank_histogram(ranks, 99).get_title(loc="right").split()[0])
    assert notes["uniform"] <= 2
    assert min(notes["narrow"], notes["wide"]) >= 4
    values = rng.random(4000)
    assert int(plots.pit_histogram(values).get_title(loc="right").split()[0]) <= 2
    assert int(plots.pit_histogram(values**1.3).get_title(loc="right").split()[0]) >= 4


def test_the_ecdf_of_every_rank_once_is_flat():
    band = make_band()
    ax = plots.rank_ecdf(np.arange(100), 99, band)
    x, y = next(line for line in ax.lines if len(line.get_xdata()) > 2).get_data()
    np.testing.assert_allclose(y, 0, atol=1e-12)
    assert (x[0], x[-1]) == (0, 1)


def test_the_ecdf_is_that_of_the_fractional_ranks():
    ranks = make_ranks(40, 9)
    ax = plots.rank_ecdf(ranks, 9, make_band())
    x, y = next(line for line in ax.lines if len(line.get_xdata()) > 2).get_data()
    expected = [((ranks + 1) / 10 <= u + 1e-9).mean() - u for u in x]
    np.testing.assert_allclose(y, expected, atol=1e-12)
    corners = ax.collections[0].get_paths()[0].vertices
    for grid, low, high in zip(*make_band(), strict=True):
        for end in (low, high):
            assert np.isclose(corners, [grid, end]).all(axis=1).any()


def test_coverage_is_drawn_against_its_level():
    curve = make_curve()
    ax = plots.coverage(curve.sample(frac=1, random_state=0))
    line = next(line for line in ax.lines if line.get_label() == "intervals")
    np.testing.assert_allclose(np.c_[line.get_data()], curve[["level", "coverage"]])


# ------------------------------------------------------------------------------------ predictive


@pytest.mark.parametrize(("statistic", "scale"), [("mean", "log"), ("zeros", "linear")])
def test_genes_outside_of_their_interval_stand_out(statistic, scale):
    table = make_predictive(200)
    ax = plots.predictive_genes(table, statistic)
    rows = table[table["statistic"] == statistic]
    points = ax.collections[1]
    np.testing.assert_allclose(points.get_offsets(), rows[["observed", "median"]])
    outside = ~rows["observed"].between(rows["low"], rows["high"])
    colours = [to_hex(colour) for colour in points.get_facecolors()]
    assert [c == plots.VERMILION.lower() for c in colours] == outside.tolist()
    assert ax.get_title(loc="left").startswith(f"{outside.sum()} of 200")
    assert ax.get_xscale() == ax.get_yscale() == scale


def test_genes_without_counts_are_drawn_at_zero():
    table = make_predictive(50)
    table.loc[table["gene"] == "GENE3", ["observed", "low", "median", "high"]] = 0.0
    for ax in (plots.predictive_genes(table, "mean"), plots.mean_variance(table)):
        ax.figure.canvas.draw()
        assert ax.get_xscale() == "symlog"
        assert ax.get_xlim()[0] < 0


def test_mean_and_variance_of_the_same_gene_meet():
    table = make_predictive(50).sample(frac=1, random_state=0)
    ax = plots.mean_variance(table)
    wide = table.pivot(index="gene", columns="statistic")
    for number, column in enumerate(("observed", "median")):
        same_points(offsets(ax, number), wide[column][["mean", "variance"]].to_numpy())


def test_a_metric_is_drawn_as_densities():
    observed, replicated = metric_of(400)
    ax = plots.predictive_metric(observed, replicated, name="log counts", bins=12)
    band, middle, seen = (patch.get_data() for patch in ax.patches)
    np.testing.assert_allclose((np.diff(seen.edges) * seen.values).sum(), 1)
    np.testing.assert_array_equal(seen.values, np.histogram(observed, seen.edges, density=True)[0])
    assert (band.baseline <= middle.values).all()
    assert (middle.values <= band.values).all()
    assert ax.get_xlabel() == "log counts"


# --------------------------------------------------------------------------------- model, scores


def test_latent_units_come_in_the_order_of_what_they_say():
    units = make_units(12)
    ax = plots.latent_units(units)
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_array_equal(heights, np.sort(units["kl"])[::-1])
    names = [int(name) for name in labels_of(ax.xaxis)]
    assert units["kl"][names].tolist() == heights
    is_blue = [to_hex(bar.get_facecolor()) == plots.BLUE.lower() for bar in ax.patches]
    assert is_blue == units["active"][names].tolist()


def test_leakage_draws_every_reader_of_every_target():
    table = make_leakage(4)
    ax = plots.leakage(table)
    assert labels_of(ax.yaxis) == [f"PERT{i}" for i in range(4)]
    points = np.concatenate([c.get_offsets() for c in ax.collections[1:]])
    points = points[np.isfinite(points).all(axis=1)]
    same_points(np.sort(points[:, :1], axis=0), np.sort(table[["auroc"]], axis=0))
    for auroc, place in points:
        row = table.iloc[(table["auroc"] - auroc).abs().argmin()]
        assert round(place) == int(row["target"].removeprefix("PERT"))
    assert len({round(place, 6) for place in points[:, 1]}) == len(table)


def test_of_many_targets_those_that_leak_most_are_shown():
    table = make_leakage(100)
    ax = plots.leakage(table, n_most=10)
    most = table.groupby("target")["auroc"].max().nlargest(10)
    assert labels_of(ax.yaxis) == most.index.tolist()
    assert ax.get_title(loc="left").startswith("10 of 100 targets")


def test_readers_and_units_without_a_number_are_left_blank():
    table = make_leakage(40)
    table.loc[:5, ["auroc", "se"]] = np.nan
    for n_most in (10, 50):
        plots.leakage(table, n_most=n_most).figure.canvas.draw()
    units = make_units(5)
    units["kl"] = units["kl"].where(units["latent"] != 2)
    ax = plots.latent_units(units)
    ax.figure.canvas.draw()
    assert labels_of(ax.xaxis)[-1] == "2"


def test_scores_are_sorted_with_the_ceiling_on_top():
    table = make_scores(5)
    ax = plots.scores(table, "ate_rho")
    rows = table[table["metric"] == "ate_rho"]
    names = [name.replace(" ", "_") for name in labels_of(ax.yaxis)]
    mean = rows.groupby("predictor")["value"].mean()
    assert names[-1] == CEILING
    assert (np.diff(mean[names[:-1]]) >= 0).all()
    for (reference, labels), block in rows.groupby(["reference", "labels"]):
        name = f"{reference}, {labels.replace('_', ' ')}"
        drawn = next(c for c in ax.collections if c.get_label() == name)
        expected = [(row.value, names.index(row.predictor)) for row in block.itertuples()]
        same_points(drawn.get_offsets(), expected)
    assert isinstance(ax.get_legend(), Legend)


def test_seeds_and_missing_values_of_scores_are_drawn_as_they_are():
    table = make_scores(2)
    twice = pd.concat([table, table.assign(value=table["value"] / 2)])
    twice.loc[twice["predictor"] == "baseline_0", "value"] = np.nan
    ax = plots.scores(twice, "ate_r2")
    assert "baseline 0" not in labels_of(ax.yaxis)
    expected = twice[(twice["metric"] == "ate_r2") & twice["value"].notna()]
    assert sum(len(c.get_offsets()) for c in ax.collections if c.get_label()[0] != "_") == len(
        expected
    )


# ---------------------------------------------------------------------------------------- errors

NO_GENES = pd.Series(dtype=float)


def one_gene(**names: str) -> dict[str, pd.Series]:
    return {world: pd.Series([1.0], [gene]) for world, gene in names.items()}


TABLES: dict[str, tuple[Callable[[pd.DataFrame], Any], pd.DataFrame, str]] = {
    "training_history": (plots.training_history, make_history(), "train_loss"),
    "loss_terms": (plots.loss_terms, make_history(), "epoch"),
    "volcano": (plots.volcano, make_gene_table(5), "lfsr"),
    "interaction_matrix": (plots.interaction_matrix, make_pairs(5), "n_called"),
    "confounding": (plots.confounding, make_report(5), "share_low"),
    "coverage": (plots.coverage, make_curve(), "level"),
    "predictive_genes": (
        lambda t: plots.predictive_genes(t, "mean"), make_predictive(5), "median"
    ),
    "mean_variance": (plots.mean_variance, make_predictive(5), "statistic"),
    "latent_units": (plots.latent_units, make_units(5), "active"),
    "leakage": (plots.leakage, make_leakage(5), "se"),
    "scores": (lambda t: plots.scores(t, "ate_rho"), make_scores(2), "predictor"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_an_empty_table_or_a_missing_column_is_named(name):
    draw, table, column = TABLES[name]
    with pytest.raises(DataError, match=f"'{column}' missing, found '"):
        draw(table.drop(columns=column))
    with pytest.raises(DataError, match="is empty"):
        draw(table.iloc[:0])
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.training_history(pd.DataFrame({"epoch": [0], "train_loss": [np.nan]})),
         "holds no loss"),
        (lambda: plots.loss_terms(make_history()[["epoch", "val_loss"]]), "no terms"),
        (lambda: plots.effect_heatmap(make_effects(5), labels=["PERT9"]), "No effects of 'PERT9'"),
        (lambda: plots.effect_heatmap(make_effects(5), labels=[]), "needs perturbations"),
        (lambda: plots.effect_heatmap(make_effects(5), n_genes=0), "needs perturbations"),
        (lambda: plots.effect_heatmap(AnnData(np.ones((2, 2), np.float32))), "'s_value'"),
        (lambda: plots.volcano(pd.concat([make_gene_table(3)] * 2)), "'GENE0', 'GENE1'"),
        (lambda: plots.interaction_matrix(pd.concat([make_pairs(4)] * 2)), "one row for each pair"),
        (lambda: plots.before_after(np.zeros((3, 2)), np.zeros((4, 2)), np.zeros(3)),
         r"\(3, 2\), \(4, 2\)"),
        (lambda: plots.before_after(np.zeros((0, 2)), np.zeros((0, 2)), []), r"\(0,"),
        (lambda: plots.before_after(*make_embeddings(4), axes=[plt.figure().gca()]), "2 axes.*1"),
        (lambda: plots.counterfactual_cell({"observed": pd.Series([1.0])}), "found 'observed'"),
        (lambda: plots.counterfactual_cell(one_gene(a="A", b="B")),
         "'a' and 'b' differ in 'A', 'B'"),
        (lambda: plots.counterfactual_cell({"a": NO_GENES, "b": NO_GENES}), "no genes"),
        (lambda: plots.rank_histogram([], 9), "found none"),
        (lambda: plots.rank_histogram([0, 10], 9), "found 0 to 10"),
        (lambda: plots.rank_histogram([0.5], 9), "whole numbers"),
        (lambda: plots.rank_ecdf([-1], 9, make_band()), "found -1"),
        (lambda: plots.rank_ecdf([1], 9, ([0, 1], [0], [1])), r"\(2,\), \(1,\)"),
        (lambda: plots.pit_histogram([0.2, np.nan]), "found nan"),
        (lambda: plots.pit_histogram([]), "found none"),
        (lambda: plots.predictive_genes(make_predictive(3), "means"), "did you mean 'mean'"),
        (lambda: plots.predictive_metric([], [[1.0]], name="counts"), "'counts' needs"),
        (lambda: plots.predictive_metric([np.inf], [[1.0]], name="counts"), "not finite"),
        (lambda: plots.scores(make_scores(2), "ate_rhoo"), "did you mean 'ate_rho'"),
        (lambda: plots.scores(make_scores(2).assign(value=np.nan), "ate_rho"), "are missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(DataError, match=message):
        draw()
