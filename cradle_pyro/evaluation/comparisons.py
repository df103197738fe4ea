"""Tables that compare predictors: paired differences, and shares of the way to the ceiling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.paired import (
    EFFECT_METRICS,
    Difference,
    LabelParts,
    Unit,
    paired_difference,
    weighted_mean,
    weighted_scores,
)

__all__ = [
    "AGREEMENT_COLUMNS",
    "COMPARISON_COLUMNS",
    "ERRORS",
    "compare",
    "normalise",
    "rank_agreement",
]

COMPARISON_COLUMNS = (
    "screen", "reference", "labels", "metric", "ours", "other", "mean", "sd", "ci_low", "ci_high",
    "t_low", "t_high", "n_seeds", "n_splits", "n_labels", "resampled",
)  # fmt: skip

ERRORS = ("rmse", "mae", "energy_distance", "mmd")
"""Metrics of which less is better."""

AGREEMENT_COLUMNS = (
    "screen", "labels", "reference", "metric", "cell_eval", "spearman", "n_predictors", "best_here",
    "best_there",
)  # fmt: skip

_OUTSIDE = {
    ("cells", "ate_rho_per_perturbation"): "pearson_delta",
    ("generated", "ate_rho_per_perturbation"): "pearson_delta",
    ("cells", "mae"): "mae_delta",
    ("generated", "mae"): "mae_delta",
    ("cells", "discrimination"): "discrimination_score_l1",
    ("generated", "discrimination"): "discrimination_score_l1",
    ("generated", "de_overlap"): "overlap_at_N",
    ("generated", "de_direction"): "de_direction_match",
}
_OUTSIDE_ERRORS = ("mae_delta",)

_PLACE = ["screen", "reference", "labels"]


def compare(
    scores: pd.DataFrame,
    parts: Mapping[tuple[object, ...], LabelParts],
    ours: str,
    *,
    crossed: Sequence[str] = (),
    without: Sequence[str] = (),
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return differences of a predictor and every other, with `COMPARISON_COLUMNS`.

    Parameters
    ----------
    scores
        Tidy scores with columns screen, split, seed, predictor, reference, labels, label, metric,
        value.
    parts
        Of the scores of effects, by (screen, split, seed, predictor, reference, labels).
    ours
        The predictor from whose scores those of others are taken.
    crossed
        Screens whose seeds share perturbations, see `paired_difference`.
    without
        Predictors that are not compared, such as a ceiling.
    draws, seed
        As in `paired_difference`.
    """
    rows: list[dict[str, object]] = []
    scores = scores[~scores["reference"].isin(["run", "cell-eval"])]
    for place, block in scores.groupby(_PLACE, sort=False):
        here = dict(zip(_PLACE, place, strict=True))
        names = [name for name in block["predictor"].unique() if name not in (ours, *without)]
        for other in names:
            pair = block[block["predictor"].isin((ours, other))]
            for metrics, units, resampled in _comparable(pair, parts, here, ours, other):
                is_crossed = here["screen"] in crossed
                found = paired_difference(units, crossed=is_crossed, draws=draws, seed=seed)
                way = resampled if resampled == "seeds" else f"{resampled}, " + (
                    "crossed" if is_crossed else "nested"
                )  # fmt: skip
                for i, metric in enumerate(metrics):
                    values = {name: getattr(found, name)[i] for name in Difference._fields[:6]}
                    if not np.isfinite(values["mean"]):
                        continue
                    sizes = {name: getattr(found, name) for name in Difference._fields[6:]}
                    own = {"metric": metric, "ours": ours, "other": other, "resampled": way}
                    rows.append(here | own | values | sizes)
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def normalise(
    scores: pd.DataFrame, *, floor: str = "global_mean", ceiling: str = "ceiling"
) -> pd.DataFrame:
    """Return scores of all labels together as shares of the way from a floor to the ceiling.

    (value - floor) / (ceiling - floor), within each screen, split, seed, reference, set of labels
    and metric; metrics without a ceiling, or whose ceiling is no better than the floor, are left
    out. A column ``normalised`` stands beside ``value``.
    """
    keys = ["screen", "split", "seed", "reference", "labels", "metric"]
    pooled = scores[(scores["label"] == "") & ~scores["reference"].isin(["run", "model"])]
    wide = pooled.pivot_table(index=keys, columns="predictor", values="value", sort=False)
    wide = wide.reindex(columns=wide.columns.union([floor, ceiling], sort=False))
    # Errors have their ceiling below.
    better = np.where(wide.index.get_level_values("metric").isin(ERRORS), -1, 1)
    usable = better * (wide[ceiling] - wide[floor]) > 0
    ends = wide.loc[usable, [floor, ceiling]].set_axis(["_floor", "_ceiling"], axis=1)
    found = pooled.merge(ends.reset_index(), on=keys)
    found["normalised"] = (found["value"] - found["_floor"]) / (found["_ceiling"] - found["_floor"])
    return found.drop(columns=["_floor", "_ceiling", "label"])


def rank_agreement(scores: pd.DataFrame, *, without: Sequence[str] = ()) -> pd.DataFrame:
    """Return how far cell-eval ranks predictors as this package does.

    Parameters
    ----------
    scores
        As in `compare`, with rows of reference "cell-eval".
    without
        Predictors that are not ranked.

    Returns
    -------
    pandas.DataFrame
        For each screen, set of labels and pair of metrics of one idea: ``spearman``, the rank
        correlation of the predictors' means over the splits and seeds that cell-eval has seen
        (signs such that one is agreement), ``n_predictors``, and ``best_here`` and ``best_there``.
        ``reference`` tells what is scored here: "cells", expected effects, or "generated", the
        cells that cell-eval scores.
    """
    pooled = scores[(scores["label"] == "") & ~scores["predictor"].isin(without)]
    places = ["screen", "split", "seed"]
    both_scored = pooled.loc[pooled["reference"] == "cell-eval", places].drop_duplicates()
    pooled = pooled.merge(both_scored, on=places)
    rows = []
    for (screen, labels), block in pooled.groupby(["screen", "labels"], sort=False):
        columns = ["reference", "metric"]
        means = block.pivot_table(index="predictor", columns=columns, values="value")
        for here, there in _OUTSIDE.items():
            if here not in means or ("cell-eval", there) not in means:
                continue
            both = means[[here, ("cell-eval", there)]].dropna().set_axis(["here", "there"], axis=1)
            both["here"] *= -1 if here[1] in ERRORS else 1
            both["there"] *= -1 if there in _OUTSIDE_ERRORS else 1
            if len(both) < 3 or both.nunique().min() < 2:
                continue
            rows.append(
                {
                    "screen": screen,
                    "labels": labels,
                    "reference": here[0],
                    "metric": here[1],
                    "cell_eval": there,
                    "spearman": both.rank()["here"].corr(both.rank()["there"]),
                    "n_predictors": len(both),
                    "best_here": both["here"].idxmax(),
                    "best_there": both["there"].idxmax(),
                }
            )
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def _comparable(
    pair: pd.DataFrame,
    parts: Mapping[tuple[object, ...], LabelParts],
    here: Mapping[str, object],
    ours: str,
    other: str,
) -> Iterator[tuple[list[str], list[Unit], str]]:
    """Yield metrics that are compared alike, their units, and what is resampled."""
    keys = [key[:2] for key in zip(pair["split"], pair["seed"], pair["predictor"], strict=True)]
    places = list(dict.fromkeys(keys))
    units = []
    for split, seed in places:
        both = [
            parts.get((here["screen"], split, seed, name, here["reference"], here["labels"]))
            for name in (ours, other)
        ]
        if both[0] is not None and both[1] is not None:
            units.append(_effect_unit(int(seed), str(split), both[0], both[1]))
    if units:
        yield list(EFFECT_METRICS), units, "seeds and perturbations"
    rest = pair[~pair["metric"].isin([*EFFECT_METRICS])]
    for metric, table in rest.groupby("metric", sort=False):
        is_each = bool((table["label"] != "").any())
        table = table[(table["label"] != "") == is_each]
        wide = table.pivot_table(
            index=["split", "seed", "label"], columns="predictor", values="value", sort=False
        )
        if ours not in wide or other not in wide:
            continue
        gap = (wide[ours] - wide[other]).dropna()
        found = [
            _mean_unit(int(seed), str(split), gap.xs((split, seed), level=("split", "seed")))
            for split, seed in dict.fromkeys(key[:2] for key in gap.index)
        ]
        if found:
            yield [str(metric)], found, "seeds and perturbations" if is_each else "seeds"


def _effect_unit(seed: int, split: str, ours: LabelParts, other: LabelParts) -> Unit:
    if list(ours.labels) != list(other.labels):
        raise DataError(
            f"Seed {seed}, split '{split}': two predictors were judged on different labels. "
            "Delete the cells of that seed and run the benchmark again."
        )
    return Unit(
        seed, split, list(ours.labels),
        lambda weights: weighted_scores(ours, weights) - weighted_scores(other, weights),
    )  # fmt: skip


def _mean_unit(seed: int, split: str, gap: pd.Series) -> Unit:
    values = gap.to_numpy(dtype=float)
    labels = gap.index.get_level_values("label").astype(str).tolist()
    if labels == [""]:
        return Unit(seed, split, [], lambda w: np.full((len(w), 1), values[0]))
    return Unit(seed, split, labels, lambda w: weighted_mean(w, values)[:, None])
