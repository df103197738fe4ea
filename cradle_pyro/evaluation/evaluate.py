"""A run's evaluation: scores beside ceilings and baselines, never alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cradle_pyro.baselines.learned import FittedModel
from cradle_pyro.baselines.predictor import Predictor
from cradle_pyro.baselines.simple import default_baselines
from cradle_pyro.data.dataset import CellData
from cradle_pyro.errors import CheckpointError, DataError
from cradle_pyro.evaluation.metrics import score_effects
from cradle_pyro.evaluation.predictive import generated_qc, held_out_density
from cradle_pyro.evaluation.scoring import ceiling_of, reference_blocks
from cradle_pyro.evaluation.truth import (
    Truth,
    control_errors,
    effect_calibration,
    profile_errors,
)
from cradle_pyro.inference.posterior import Posterior

__all__ = ["Evaluation", "evaluate"]

MODEL = "cradle"
CEILING = "ceiling"


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Parameters
    ----------
    scores
        Tidy table: reference ("cells" or "truth"), labels ("seen" or "held_out"), predictor,
        metric, value, n_labels.
    facts
        Everything else: densities, generated QC, profile errors, sizes and settings.
    """

    scores: pd.DataFrame
    facts: dict[str, Any]

    def table(
        self, metrics: Sequence[str] = ("ate_rho", "ate_r2", "ate_rho_top20", "jaccard_top20")
    ) -> pd.DataFrame:
        """Return a readable table, one row per reference, label set and predictor."""
        keys = ["reference", "labels", "predictor"]
        # As ordered categories, names sort as they first appear.
        names = {
            key: pd.Categorical(self.scores[key], self.scores[key].unique(), ordered=True)
            for key in keys
        }
        wide = self.scores.assign(**names).pivot(index=keys, columns="metric", values="value")
        return wide.reindex(columns=list(metrics))

    def write(self, path: str | Path) -> Path:
        """Write ``metrics.json`` atomically and return its path."""
        path = Path(path)
        content = {"facts": self.facts, "scores": self.scores.to_dict("records")}
        staging = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staging.write_text(json.dumps(_plain(content), indent=1), encoding="utf-8")
            os.replace(staging, path)
        except OSError as error:
            raise CheckpointError(f"Could not write '{path}': {error}.") from error
        finally:
            with suppress(OSError):
                staging.unlink(missing_ok=True)
        return path


def evaluate(
    posterior: Posterior,
    data: CellData,
    *,
    truth: Truth | None = None,
    baselines: Sequence[Predictor] | None = None,
) -> Evaluation:
    """Score a posterior on held-out cells, beside a ceiling and baselines.

    Parameters
    ----------
    posterior
        A fitted pair.
    data
        All cells with the split the model was trained under. References come from passing test
        cells only; baselines are fitted on training cells.
    truth
        Known truth of a simulated screen, see :func:`~cradle_pyro.evaluation.truth.truth_of`.
    baselines
        Predictors to compare with; the default set if omitted.

    Returns
    -------
    Evaluation
        Effects are compared as means over cells of log2(1 + 1e4 counts / library): the model's in
        expectation over counts at the libraries of the cells compared with (DESIGN section 6).

    Raises
    ------
    DataError
        If there are no test cells, or no label has enough of them.
    """
    if data.split is None or not (np.asarray(data.split) == "test").any():
        raise DataError("Evaluation needs test cells: give the data the split it was trained with.")
    train, test = data.where(split="train"), data.where(split="test")
    scores = _scores(posterior, data, truth, baselines)
    options = posterior.config.evaluation
    facts: dict[str, Any] = {
        "n_train": train.n_cells,
        "n_test": test.n_cells,
        "failing_share": float(data.failing.mean()),
        "settings": options.model_dump(mode="json"),
    }
    if data.values == "counts":
        facts |= _predictive_facts(posterior, train, test)
    if truth is not None:
        drawn = {"draws": options.draws, "seed": options.seed}
        facts["profiles"] = profile_errors(posterior, data, truth, **drawn)
        facts["controls"] = control_errors(posterior, data, truth, **drawn)
        facts["intervals"] = effect_calibration(
            posterior, truth, draws=2 * options.draws, n_cells=options.n_controls,
            seed=options.seed,
        )  # fmt: skip
    return Evaluation(scores, facts)


def _scores(
    posterior: Posterior,
    data: CellData,
    truth: Truth | None,
    baselines: Sequence[Predictor] | None,
) -> pd.DataFrame:
    options = posterior.config.evaluation
    train = data.where(split="train")
    fitted = [b.fit(train) for b in baselines or default_baselines(options.grouping)]
    predictors = [FittedModel(MODEL, posterior), *fitted]
    rows = []
    for block in reference_blocks(data, truth, options):
        scores = {
            one.name: score_effects(one.predict(block.names, block.depth), block.effects)
            for one in predictors
        }
        if block.rows:
            scores[CEILING] = ceiling_of(data, block, options).replicate
        rows += _tidy(block.reference, block.labels, scores, len(block.names))
    return pd.DataFrame(rows)


def _predictive_facts(posterior: Posterior, train: CellData, test: CellData) -> dict[str, Any]:
    options = posterior.config.evaluation
    cells = test.random_subset(options.n_density_cells, seed=options.seed)
    size = cells.n_cells
    density = held_out_density(
        posterior,
        cells,
        global_draws=options.density_draws,
        particles=options.density_particles,
        seed=options.seed,
    )
    qc = generated_qc(posterior, train, test, seed=options.seed)
    return {
        "density": {
            "iwelbo_nats_per_cell": float(density.mean()),
            "standard_error": float(density.std(ddof=1) / np.sqrt(size)) if size > 1 else None,
            "n_cells": size,
        },
        "generated_qc": qc._asdict(),
    }


def _tidy(
    reference: str, labels: str, scores: Mapping[str, Mapping[str, float]], n_labels: int
) -> list[dict[str, Any]]:
    return [
        {
            "reference": reference,
            "labels": labels,
            "predictor": predictor,
            "metric": metric,
            "value": float(value),
            "n_labels": n_labels,
        }
        for predictor, values in scores.items()
        for metric, value in values.items()
    ]


def _plain(value: Any) -> Any:
    """Return `value` for JSON: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
