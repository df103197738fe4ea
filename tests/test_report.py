"""The HTML report: its numbers are those it was given, it is one safe page, no panel is empty."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from report_page import FEW, NASTY, made_content, made_run, many_effects, with_labels

from cradle_pyro import workflow
from cradle_pyro.errors import CheckpointError, DataError
from cradle_pyro.evaluation.evaluate import CEILING, MODEL, Evaluation
from cradle_pyro.queries.calls import CALL_RATE
from cradle_pyro.reporting import figures, report
from cradle_pyro.reporting.figures import PageFigure, page_figure
from cradle_pyro.reporting.report import MOST_GENES, SIZEABLE, render_report, write_report

SECTIONS = (
    "summary data confounding fit effects cells pairs evaluation calibration settings"
).split()
VOID = {"meta", "link", "input", "br", "use", "path"}


class Page(HTMLParser):
    """The elements of a page: names, attributes, and the text of each section and table."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.texts: dict[str, str] = {}
        self.panels: Counter[str] = Counter()
        self.cells: list[list[str]] = []
        self._section, self._in = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section":
            self._section = dict(attrs)["id"]
        if tag in ("svg", "table", "pre"):
            self.panels[self._section] += 1
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")
        if tag not in VOID:
            self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = ""
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in in ("td", "th"):
            self.cells[-1][-1] += data
        if self._section and self._in != "script":
            self.texts[self._section] = f"{self.texts.get(self._section, '')} {data}"

    @property
    def effects(self):
        return json.loads(next(text for text in self.scripts if text.startswith("{")))


@pytest.fixture(scope="module")
def content():
    return made_content()


@pytest.fixture(scope="module")
def text(content):
    return render_report(content)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture
def quick(monkeypatch):
    """Leave figures out of the pages of a test: drawing them is what takes the time."""

    def blank(texts, draw, *, size=None):
        return [PageFigure(title, "<svg></svg>", caption) for title, caption in texts]

    for module in (figures, report):
        monkeypatch.setattr(module, "page_figures", blank)


@pytest.fixture
def unsaved(monkeypatch):
    """Draw figures, but leave them out of the page."""
    monkeypatch.setattr(figures, "_light", lambda figure: '<svg viewBox="0 0 9 9"></svg>')


# ---------------------------------------------------------------------------------------- numbers


def test_all_sections_are_there_in_order_and_none_is_empty(page):
    assert list(page.texts) == SECTIONS
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links == [f"#{name}" for name in SECTIONS]
    assert all(page.panels[name] for name in SECTIONS if name != "summary")


def test_the_table_of_effects_holds_the_numbers_of_the_effects(page, content):
    effects, shown = content.effects, page.effects
    assert shown["perturbations"] == list(effects.obs_names)
    assert shown["support"] == list(effects.obs["support"])
    seen = Counter()
    for i, g, mean, low, high, lfsr, called in shown["rows"]:
        label, gene = shown["perturbations"][i], shown["genes"][g]
        seen[label] += 1
        one = effects[label, gene]
        expected = [one.X, *(one.layers[name] for name in ("ci_low", "ci_high", "lfsr"))]
        assert [mean, low, high, lfsr] == pytest.approx(np.ravel(expected), abs=6e-5)
        assert called == int(one.layers["s_value"].item() <= CALL_RATE)
    assert seen == dict.fromkeys(effects.obs_names, MOST_GENES)


def test_the_table_of_effects_holds_the_largest_of_each_perturbation(page, content):
    size = np.abs(content.effects.to_df())
    for i, label in enumerate(page.effects["perturbations"]):
        genes = {page.effects["genes"][row[1]] for row in page.effects["rows"] if row[0] == i}
        others = size.loc[label].drop(sorted(genes))
        assert size.loc[label, sorted(genes)].min() >= others.max()
    means = [abs(row[2]) for row in page.effects["rows"]]
    assert means == sorted(means, reverse=True)


def test_the_summary_counts_cells_genes_perturbations_and_calls(page, content):
    summary, screen = page.texts["summary"], content.screen
    effects = content.effects
    called = int(((effects.layers["s_value"] <= CALL_RATE) & (abs(effects.X) >= SIZEABLE)).sum())
    assert called
    for number in (screen.n_cells, screen.n_genes, screen.n_controls, called):
        assert re.search(rf"\b{number:,}\b", summary)
    assert "3 single perturbations and 1 combination" in summary
    assert f"{100 * screen.failing_share:.1f}" in summary


def test_the_tables_of_the_evaluation_hold_its_scores(page, content):
    metrics = ["ate_rho", "ate_r2", "ate_rho_top20"]
    table = content.evaluation.table(metrics)
    rows = [cells for cells in page.cells if cells and cells[0] == "this model"]
    model = table.xs(MODEL, level="predictor")
    assert len(rows) == len(model) == 2
    for cells, scores in zip(rows, model.to_numpy(), strict=True):
        assert cells[1:4] == [f"{value:.3f}".replace("-", "−") for value in scores]


def test_thresholds_of_flags_are_given_in_counts(page, content):
    cut = content.screen.thresholds.cuts["low_counts"].cut
    assert f"fewer than {np.expm1(cut):,.0f} counts" in page.texts["data"]


def made_scores(model, baseline):
    values = {MODEL: model, "empirical_bayes": baseline, CEILING: 0.9, "no_change": np.nan}
    rows = [
        {"reference": "cells", "labels": "seen", "predictor": k, "metric": "ate_rho", "value": v,
         "n_labels": 3}
        for k, v in values.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("model", "is_beaten"), [(0.5, True), (0.8, False), (np.nan, True)])
def test_a_better_baseline_is_said_plainly(quick, content, model, is_beaten):
    evaluation = Evaluation(made_scores(model, 0.7), content.evaluation.facts)
    summary = Page(render_report(dataclasses.replace(content, evaluation=evaluation)))
    said = "A simple baseline predicts average effects better" in summary.texts["summary"]
    assert said == is_beaten
    assert ("The simple baseline is better" in summary.texts["evaluation"]) == is_beaten


# ----------------------------------------------------------------------------------------- safety


def test_names_are_escaped(content, page):
    labels = [NASTY, "$a$_b^", *content.effects.obs_names[2:]]
    nasty = dataclasses.replace(
        with_labels(content, labels),
        name=NASTY,
        facts={NASTY: NASTY},
        commands=[NASTY, *content.commands[1:]],
        examples=[content.examples[0]._replace(cell=f'{NASTY}" onload="x', label=NASTY)],
    )
    found = Page(render_report(nasty))
    assert "b" not in found.tags
    assert "onload" not in {name for _, name, _ in found.attributes}
    assert found.tags["script"] == page.tags["script"] == 2
    assert found.effects["perturbations"][0] == NASTY
    assert NASTY in found.texts["settings"]
    assert NASTY in found.texts["cells"]


def test_nothing_is_loaded_from_elsewhere(page, text):
    loads = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
    for tag, name, value in page.attributes:
        if name in loads:
            assert value.startswith(("#", "data:")), (tag, name, value[:80])
    assert not re.search(r"url\((?!#)|@import", text)
    assert set(page.tags).isdisjoint({"iframe", "object", "embed"})
    (policy,) = [value for _, name, value in page.attributes if value.startswith("default-src")]
    assert "default-src 'none'" in policy


def test_ids_are_unique_and_their_links_lead_somewhere(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {v[1:] for _, name, v in page.attributes if name == "href" and v.startswith("#")}
    clips = {m for _, _, v in page.attributes for m in re.findall(r"url\(#([^)]*)\)", v)}
    assert links | clips <= set(ids)


def test_figures_take_the_colours_of_the_page(text):
    drawings = "".join(re.findall(r"<svg role.*?</svg>|<svg .*?</svg>", text, re.DOTALL))
    assert "currentColor" in drawings
    assert not re.search(r"(fill|stroke): #(000000|ffffff)", drawings)
    assert "font-family" not in drawings


def test_a_large_screen_stays_small(unsaved, content, text):
    effects = many_effects(500, 1000)
    large = render_report(dataclasses.replace(content, effects=effects))
    assert len(Page(large).effects["rows"]) == 500 * MOST_GENES
    assert len(large.encode()) < 1e6
    assert len(text.encode()) < 1e6


def test_a_figure_of_many_points_stays_small():
    x = np.random.default_rng(0).normal(size=(2, 20_000))
    figure = page_figure("many", lambda *, ax: ax.scatter(*x), "")
    assert "data:image/png" in figure.svg
    assert len(figure.svg) < 4e5


# ---------------------------------------------------------------------------- screens that differ


def without_flags(content):
    screen = content.screen._replace(
        flags=content.screen.flags.iloc[:0], failing_share=0.0, thresholds=None
    )
    examples = [one._replace(flags=()) for one in content.examples]
    return dataclasses.replace(
        content, screen=screen, quality=None, embedding=None, examples=examples
    )


@pytest.mark.parametrize(
    ("change", "section", "sentence"),
    [
        (without_flags, "data", "trained without artifact flags"),
        (without_flags, "confounding", "No cell carries an artifact flag"),
        (without_flags, "cells", "no cleaned cells to compare"),
        (lambda c: dataclasses.replace(c, interactions=None), "pairs", "no pairs"),
        (lambda c: dataclasses.replace(c, examples=[]), "cells", "No test cell"),
        (
            lambda c: dataclasses.replace(c, calibration=c.calibration._replace(coverage=None)),
            "calibration",
            "truth of this screen is not known",
        ),
    ],
)
def test_a_panel_with_nothing_to_show_says_why(quick, content, change, section, sentence):
    found = Page(render_report(change(content)))
    assert sentence in found.texts[section]
    assert list(found.texts) == SECTIONS


def test_a_run_without_validation_cells_says_so(unsaved, content):
    history = content.history.loc[:, ~content.history.columns.str.startswith("val")]
    found = Page(render_report(dataclasses.replace(content, history=history)))
    assert "without validation cells" in found.texts["fit"]


def test_without_calls_nothing_is_called(quick, content):
    effects = content.effects.copy()
    effects.layers["s_value"][:] = 0.5
    found = Page(render_report(dataclasses.replace(content, effects=effects)))
    assert "No effect of at least 0.1 (log2) is called" in found.texts["summary"]
    assert not any(row[-1] for row in found.effects["rows"])


# ------------------------------------------------------------------------------ writing and reading


def test_a_failed_write_leaves_the_old_page_alone(quick, content, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("before")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DataError, match="No space left"):
        write_report(content, out)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert out.read_text() == "before"


def test_a_figure_is_the_same_every_time():
    one, other = (page_figure("a", lambda *, ax: ax.plot([1, 2]), "") for _ in range(2))
    assert one == other


@pytest.fixture
def run(tmp_path):
    """A copy of the run that a test may change; the screen stays where it was."""
    return shutil.copytree(made_run(), tmp_path / "run")


def stop(*_, **__):
    raise InterruptedError("far enough")


def test_metrics_of_an_earlier_training_are_not_used(run, monkeypatch):
    monkeypatch.setattr(workflow, "effects", stop)
    monkeypatch.setattr(workflow, "evaluate_posterior", mocked := Mocked(made_content().evaluation))
    later = (run / "manifest.json").stat().st_mtime + 10
    os.utime(run / "metrics.json", (later, later))
    with pytest.raises(InterruptedError):
        workflow.report_run(run, **FEW)
    assert mocked.calls == 0
    os.utime(run / "manifest.json", (later + 10, later + 10))
    with pytest.raises(InterruptedError):
        workflow.report_run(run, **FEW)
    assert mocked.calls == 1


class Mocked:
    """A function that counts its calls."""

    def __init__(self, answer):
        self.answer, self.calls = answer, 0

    def __call__(self, *_, **__):
        self.calls += 1
        return self.answer


def test_stored_metrics_are_those_of_the_evaluation(run):
    stored, fresh = workflow._stored_evaluation(run), made_content().evaluation
    pd.testing.assert_frame_equal(stored.scores, fresh.scores)
    (run / "metrics.json").write_text('{"facts": {}}')
    with pytest.raises(CheckpointError, match="damaged"):
        workflow._stored_evaluation(run)


def test_examples_are_failing_test_cells_and_a_control(content):
    split = pd.read_csv(made_run() / "split.csv").set_index("cell")["split"]
    assert content.examples
    for example in content.examples:
        assert split[example.cell] == "test"
        assert example.flags
        assert list(example.worlds)[:2] == ["factual", "cleaned"]
        assert all(len(values) == content.screen.n_genes for values in example.worlds.values())
    assert content.examples[-1].label == content.screen.control
