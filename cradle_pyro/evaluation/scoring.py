"""Score one fitted predictor on a screen: tidy rows, whatever the predictor is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial.distance import pdist

from cradle_pyro.baselines.predictor import Depth, FittedPredictor, GenerativePredictor
from cradle_pyro.config import EvaluationConfig
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.groups import cell_groups
from cradle_pyro.errors import DataError
from cradle_pyro.evaluation.cell_metrics import (
    de_direction,
    de_overlap,
    differential_genes,
    energy_distance,
    log_pca,
    mmd,
)
from cradle_pyro.evaluation.criticism import latent_diagnostics
from cradle_pyro.evaluation.metrics import (
    ate_correlation_per_perturbation,
    ate_r2_per_perturbation,
    perturbation_discrimination,
    score_effects,
)
from cradle_pyro.evaluation.outside import cell_eval_scores
from cradle_pyro.evaluation.predictive import (
    GeneratedQC,
    generated_qc,
    held_out_density,
    qc_of,
)
from cradle_pyro.evaluation.reference import Ceiling, group_effects, split_half_ceiling
from cradle_pyro.evaluation.soundness import (
    FOLDS,
    composition,
    effectiveness,
    out_of_fold,
    reader_of,
    reversibility,
)
from cradle_pyro.evaluation.truth import (
    Truth,
    control_errors,
    effect_calibration,
    profile_errors,
)
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.queries.counterfactual import counterfactual
from cradle_pyro.queries.interventions import Intervention, do
from cradle_pyro.queries.latent import latent
from cradle_pyro.types import SCALE

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "COLUMNS",
    "Block",
    "Prediction",
    "Score",
    "ceiling_of",
    "density_of",
    "reference_blocks",
    "score",
    "score_ceiling",
    "seen_by",
]

COLUMNS = ("reference", "labels", "label", "metric", "value", "n_labels")
"""Columns of the rows: what is compared with, which labels, one label or "" for all of them."""

Embedding: TypeAlias = Callable[[Any, np.ndarray], np.ndarray]

_SETS = ("seen", "held_out")
_MOST_CELLS = 100  # cells of a label that generated ones are compared with
_COMPONENTS = 30
_AT_REST = "\0control"
_LABEL = "label"
_SOUND_CELLS = 300
_SOUND_LABELS = 3
_LEAKAGE_CELLS = 1000  # and neighbours, as in latent_diagnostics
_NEIGHBOURS = 30


class Block(NamedTuple):
    """A reference that predictions are compared with.

    Parameters
    ----------
    reference
        "cells" (passing test cells) or "truth".
    labels
        "seen" or "held_out".
    names
        The labels.
    effects
        Their effects, shape (labels, genes), log2 units.
    depth
        Libraries of the cells; None for the truth.
    rows
        Rows of each label among the test cells, then of the control; empty for the truth.
    """

    reference: str
    labels: str
    names: list[str]
    effects: np.ndarray
    depth: Depth | None
    rows: dict[str, np.ndarray]


class Prediction(NamedTuple):
    """What a predictor says of the labels of a block; effects have shape (labels, genes)."""

    reference: str
    labels: str
    names: list[str]
    predicted: np.ndarray
    effects: np.ndarray


class Score(NamedTuple):
    """Tidy rows with `COLUMNS`, and the predictions that they judge."""

    rows: pd.DataFrame
    predictions: list[Prediction]
    genes: tuple[str, ...]


def reference_blocks(data: CellData, truth: Truth | None, options: EvaluationConfig) -> list[Block]:
    """Return what predictions are compared with: passing test cells, and the truth where known.

    Parameters
    ----------
    data
        All cells with their split.
    truth
        Of a simulated screen.
    options
        Grouping and the least number of cells of a label.

    Raises
    ------
    DataError
        If no label has enough passing test cells.
    """
    train, test = data.where(split="train"), data.where(split="test")
    control = test.schema.control
    groups = cell_groups(test, options.grouping, min_cells=options.min_cells, passing=True)
    at_rest = groups.pop(control)
    if not groups:
        raise DataError(
            f"No perturbation has {options.min_cells} passing test cells; lower "
            "evaluation.min_cells or enlarge the test split."
        )
    seen = set(cell_groups(train, options.grouping))
    blocks = []
    for name in _SETS:
        chosen = {k: rows for k, rows in groups.items() if (k in seen) == (name == "seen")}
        if not chosen:
            continue
        effects = group_effects(
            test.counts, test.library, chosen, at_rest, functional="mean_log", values=test.values
        )
        depth = Depth([test.library[rows] for rows in chosen.values()], test.library[at_rest])
        rows = chosen | {control: at_rest}
        blocks.append(Block("cells", name, list(chosen), effects, depth, rows))
    if truth is not None:
        trained = set(train.labels.tolist())
        for name in _SETS:
            some = [i for i, k in enumerate(truth.labels) if (k in trained) == (name == "seen")]
            if some:
                names = [truth.labels[i] for i in some]
                blocks.append(Block("truth", name, names, truth.effects[some], None, {}))
    return blocks


def score(
    fitted: FittedPredictor,
    data: CellData,
    truth: Truth | None,
    options: EvaluationConfig,
    *,
    view: CellData | None = None,
    diagnostics: bool = True,
    outside: bool = False,
) -> Score:
    """Return all scores of a fitted predictor.

    Parameters
    ----------
    fitted
        Fitted on training (and validation) cells of `data`.
    data
        All cells with their split and the screen's flags, which decide what the reference is.
    truth
        Of a simulated screen.
    options
        How to score.
    view
        The same cells with the flags that the predictor was fitted with, where they differ.
    diagnostics
        For a predictor with a posterior: density, leakage, soundness and calibration too.
    outside
        Have generated cells scored by cell-eval too, which has to be installed.

    Returns
    -------
    Score
        References "cells" and "truth" (effects), "generated" (cells made from nothing), "model"
        (a posterior's own checks), "cell-eval" (generated cells, by another program).
    """
    rows: list[tuple[Any, ...]] = []
    predictions = []
    test = data.where(split="test")
    embedding: Embedding | None = None
    if data.values == "counts" and isinstance(fitted, GenerativePredictor):
        embedding = _embedding(data, options.seed)
    for block in reference_blocks(data, truth, options):
        predicted = np.asarray(fitted.predict(block.names, block.depth))
        rows += _effect_rows(block, predicted)
        predictions.append(
            Prediction(block.reference, block.labels, block.names, predicted, block.effects)
        )
        if block.rows and embedding is not None:
            assert isinstance(fitted, GenerativePredictor)
            real, labels = _real_sample(test, block, options.seed)
            counts = fitted.generate(labels.tolist(), real.library, seed=options.seed)
            made = real._replace(counts=sp.csr_array(counts))
            rows += _cells_compared(block, embedding, made, real)
            if outside:
                rows += _outside_rows(block, data.schema.genes, made, real)
    posterior = getattr(fitted, "posterior", None)
    if diagnostics and isinstance(posterior, Posterior):
        seen = seen_by(fitted, data if view is None else view)
        rows += _model_rows(posterior, seen, np.asarray(data.failing), truth, options)
    return Score(_table(rows), predictions, data.schema.genes)


def ceiling_of(data: CellData, block: Block, options: EvaluationConfig) -> Ceiling:
    """Return how well the test cells of a block agree with themselves."""
    test = data.where(split="test")
    groups = {name: block.rows[name] for name in block.names}
    return split_half_ceiling(
        test.counts, test.library, groups, block.rows[test.schema.control], functional="mean_log",
        values=test.values, n_repeats=options.split_half_repeats, seed=options.seed,
    )  # fmt: skip


def score_ceiling(
    data: CellData, truth: Truth | None, options: EvaluationConfig, *, flags: Sequence[str] = ()
) -> Score:
    """Return how well the references agree with themselves.

    Rows of "cells" are the split-half ceiling, Spearman-Brown corrected, that another sample of as
    many cells would reach; those with "_noise_free" the score of the exact expected effects.
    Against the truth, the truth itself. Of "generated", one half of the real cells judged by the
    other: a ceiling on the careful side, since halves are smaller. Of "model", QC of real passing
    training cells, by `flags`, those that the screen uses.
    """
    train, test = data.where(split="train"), data.where(split="test")
    rows: list[tuple[Any, ...]] = []
    for block in reference_blocks(data, truth, options):
        place = (block.reference, block.labels, "")
        n_labels = len(block.names)
        if block.reference == "truth":
            rows += _effect_rows(block, block.effects)
            continue
        ceiling = ceiling_of(data, block, options)
        rows += [(*place, name, value, n_labels) for name, value in ceiling.replicate.items()]
        rows += [
            (*place, f"{name}_noise_free", value, n_labels)
            for name, value in ceiling.noise_free.items()
        ]
        if data.values == "counts":
            real, _ = _real_sample(test, block, options.seed)
            halves = real.halves(options.seed)
            rows += _cells_compared(block, _embedding(data, options.seed), *halves)
    if data.values == "counts" and train.passing.any():
        found = _qc_scores(qc_of(train.rows(train.passing), train, test, flags=flags))
        rows += [("model", "all", "", name, value, 0) for name, value in found.items()]
    return Score(_table(rows), [], data.schema.genes)


def _table(rows: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"value": float, "n_labels": int})


def _effect_rows(block: Block, predicted: np.ndarray) -> Iterator[tuple[Any, ...]]:
    n_labels = len(block.names)
    for metric, value in score_effects(predicted, block.effects).items():
        yield block.reference, block.labels, "", metric, value, n_labels
    each = {
        "ate_rho": ate_correlation_per_perturbation(predicted, block.effects),
        "ate_r2": ate_r2_per_perturbation(predicted, block.effects),
        "rmse": np.sqrt(np.mean((predicted - block.effects) ** 2, axis=1)),
        "discrimination": perturbation_discrimination(predicted, block.effects),
    }
    for metric, values in each.items():
        for label, value in zip(block.names, values, strict=True):
            yield block.reference, block.labels, label, metric, value, 1


# -------------------------------------------------------------------------------- generated cells


class _Sample(NamedTuple):
    """Cells of several labels, and of controls under `_AT_REST`."""

    counts: sp.csr_array
    library: np.ndarray
    rows: dict[str, np.ndarray]

    def halves(self, seed: int) -> tuple[_Sample, _Sample]:
        """Return random halves of each label's cells."""
        rng = np.random.default_rng(seed)
        mixed = {name: rng.permutation(rows) for name, rows in self.rows.items()}
        first = {name: rows[: len(rows) // 2] for name, rows in mixed.items()}
        second = {name: rows[len(rows) // 2 :] for name, rows in mixed.items()}
        return self._replace(rows=first), self._replace(rows=second)

    def log_expression(self, names: Sequence[str], genes: Sequence[str]) -> AnnData:
        """Return log(1 + 1e4 fraction) of the cells of some labels, label by label."""
        from anndata import AnnData

        rows = np.concatenate([self.rows[name] for name in names])
        fraction = self.counts[rows].multiply(SCALE / self.library[rows][:, None])
        labels = np.repeat(list(names), [len(self.rows[name]) for name in names])
        return AnnData(
            sp.csr_matrix(fraction).log1p().astype(np.float32),
            obs=pd.DataFrame({_LABEL: labels}, index=[str(i) for i in range(len(rows))]),
            var=pd.DataFrame(index=list(genes)),
        )


def _real_sample(test: CellData, block: Block, seed: int) -> tuple[_Sample, np.ndarray]:
    """Return at most so many real cells of each label and of control, and their labels."""
    rng = np.random.default_rng(seed)
    rows: dict[str, np.ndarray] = {}
    chosen: list[np.ndarray] = []
    start = 0
    for name, all_rows in block.rows.items():
        some = np.sort(rng.permutation(all_rows)[:_MOST_CELLS])
        key = _AT_REST if name == test.schema.control else name
        rows[key] = np.arange(start, start + len(some))
        chosen.append(some)
        start += len(some)
    together = np.concatenate(chosen)
    sample = _Sample(test.rows(together), np.asarray(test.library)[together], rows)
    return sample, test.labels[together]


def _outside_rows(
    block: Block, genes: Sequence[str], made: _Sample, real: _Sample
) -> Iterator[tuple[Any, ...]]:
    """Yield cell-eval's scores of generated cells, means over labels."""
    names = [name for name in block.names if len(real.rows[name]) >= 2]
    if not names:
        return
    found = cell_eval_scores(
        *(sample.log_expression([*names, _AT_REST], genes) for sample in (made, real)),
        perturbation_key=_LABEL,
        control=_AT_REST,
    )
    for metric, value in found.items():
        yield "cell-eval", block.labels, "", metric, value, len(names)


def _cells_compared(
    block: Block, embedding: Embedding, made: _Sample, real: _Sample
) -> Iterator[tuple[Any, ...]]:
    """Yield distances, and agreement of effects and differential genes, by label and their means.

    Effects are those of the cells of each side, noise and all, against its own controls.
    """
    names = [name for name in block.names if min(len(made.rows[name]), len(real.rows[name])) >= 2]
    if not names:
        return
    predicted, reference = (
        group_effects(
            sample.counts,
            sample.library,
            {name: sample.rows[name] for name in names},
            sample.rows[_AT_REST],
            functional="mean_log",
        )
        for sample in (made, real)
    )
    places = [embedding(sample.counts, sample.library) for sample in (made, real)]
    used = np.concatenate([real.rows[name] for name in (*names, _AT_REST)])
    width = float(np.median(pdist(places[1][used])))
    each: dict[str, list[float]] = {
        "ate_rho_per_perturbation": ate_correlation_per_perturbation(predicted, reference).tolist(),
        "mae": np.abs(predicted - reference).mean(axis=1).tolist(),
        "discrimination": perturbation_discrimination(predicted, reference).tolist(),
        "energy_distance": [],
        "mmd": [],
    }
    for name in names:
        pair = places[0][made.rows[name]], places[1][real.rows[name]]
        each["energy_distance"].append(energy_distance(*pair))
        each["mmd"].append(mmd(*pair, bandwidth=width))
    ours, theirs = (
        differential_genes(
            sample.counts,
            sample.library,
            {name: sample.rows[name] for name in names},
            sample.rows[_AT_REST],
        )
        for sample in (made, real)
    )
    each["de_overlap"] = de_overlap(ours, theirs).tolist()
    each["de_direction"] = de_direction(ours, theirs).tolist()
    for metric, values in each.items():
        known = [value for value in values if np.isfinite(value)]
        if known:
            yield "generated", block.labels, "", metric, float(np.mean(known)), len(known)
        for name, value in zip(names, values, strict=True):
            yield "generated", block.labels, name, metric, value, 1


def _embedding(data: CellData, seed: int) -> Embedding:
    """Return principal components of passing training cells."""
    train = data.where(split="train")
    train = train.subset(train.passing)
    counts = train.rows(slice(None))
    return log_pca(counts, train.library, n_components=_COMPONENTS, seed=seed)


# -------------------------------------------------------------------------- checks of a posterior


def seen_by(fitted: FittedPredictor, data: CellData) -> CellData:
    """Return cells with the artifact flags that a predictor knows."""
    see = getattr(fitted, "see", None)
    return data if see is None else see(data)


def _model_rows(
    posterior: Posterior,
    data: CellData,
    failing: np.ndarray,
    truth: Truth | None,
    options: EvaluationConfig,
) -> Iterator[tuple[Any, ...]]:
    """Yield a posterior's own checks; `failing` by the screen's flags, which it may not know."""
    found: dict[str, float] = {}
    is_test = np.asarray(data.split) == "test"
    if data.values == "counts":
        found |= _density(posterior, data, options)
        passing_test = data.subset(is_test & ~failing)
        found |= _quality(posterior, data.where(split="train"), passing_test, options)
        found |= _soundness(posterior, data, options)
    found |= _leakage(posterior, data.subset(is_test), failing[is_test], options)
    if truth is not None:
        drawn = {"draws": options.draws, "seed": options.seed}
        found |= _named("profile", profile_errors(posterior, data, truth, **drawn))
        kept = ~(is_test & failing)
        control = truth.rate_control
        passing = truth._replace(
            rate=truth.rate[kept], rate_control=None if control is None else control[kept]
        )
        found |= _named("control", control_errors(posterior, data.subset(kept), passing, **drawn))
        intervals = effect_calibration(
            posterior, truth, draws=2 * options.draws, n_cells=options.n_controls,
            seed=options.seed,
        )  # fmt: skip
        found |= _named("interval", intervals)
    for metric, value in found.items():
        name, _, label = metric.partition("/")
        yield "model", "all", label, name, float(value), 1 if label else 0


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _density(posterior: Posterior, data: CellData, options: EvaluationConfig) -> dict[str, float]:
    found = {}
    for split in ("test", "val"):
        if not (np.asarray(data.split) == split).any():
            continue
        cells = data.where(split=split).random_subset(options.n_density_cells, seed=options.seed)
        density = density_of(posterior, cells, options)
        found[f"iwelbo_{split}"] = float(density.mean())
    return found


def density_of(posterior: Posterior, cells: CellData, options: EvaluationConfig) -> np.ndarray:
    """Return the held-out density of each cell, in nats; options of the configuration."""
    return held_out_density(
        posterior,
        cells,
        global_draws=options.density_draws,
        particles=options.density_particles,
        seed=options.seed,
    )


def _quality(
    posterior: Posterior, train: CellData, test: CellData, options: EvaluationConfig
) -> dict[str, float]:
    return _qc_scores(generated_qc(posterior, train, test, seed=options.seed))


def _qc_scores(qc: GeneratedQC) -> dict[str, float]:
    found = {f"qc_pass_{mads}mad": rate for mads, rate in qc.pass_rate.items()}
    return found | {f"qc_ks_{name}": value for name, value in qc.ks.items()}


def _leakage(
    posterior: Posterior, test: CellData, failing: np.ndarray, options: EvaluationConfig
) -> dict[str, float]:
    """Return AUROCs of draws of z_basal, 0.5 being none, with standard errors; and its spread.

    AUROCs of its means have names of their own.
    """
    found: dict[str, float] = {}
    units, leakage = latent_diagnostics(posterior, test, seed=options.seed)
    for _, row in leakage[leakage["target"].isin(["artifact", "perturbation"])].iterrows():
        name = f"leakage_{row['target']}_{row['method']}"
        if row["source"] == "means":
            found[f"{name}_means"] = float(row["auroc"])
        else:
            found |= {name: float(row["auroc"]), f"{name}_se": float(row["se"])}
    if not posterior.schema.artifacts:
        found |= _leakage_unknown(posterior, test, failing, options)
    found["basal_sd"] = float(units["mean_sd"].mean())
    found["basal_kl"] = float(units["kl"].sum())
    found["basal_active"] = float(units["active"].sum())
    return found


def _leakage_unknown(
    posterior: Posterior, test: CellData, failing: np.ndarray, options: EvaluationConfig
) -> dict[str, float]:
    """Return AUROCs of the screen's flag for a model without flags, by the same classifiers."""
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline

    rows = np.random.default_rng(options.seed).permutation(test.n_cells)[:_LEAKAGE_CELLS]
    labels = failing[rows].astype(int)
    if min(labels.sum(), len(labels) - labels.sum()) < 2 * FOLDS:
        return {}
    values = latent(posterior, test.subset(rows), draws=1, seed=options.seed)[0]
    readers = {
        "knn": make_pipeline(KNeighborsClassifier(min(_NEIGHBOURS, len(values) // 2))),
        "logistic": reader_of(values.shape, values.shape[1], options.seed),
    }
    return {
        f"leakage_artifact_{method}": float(
            roc_auc_score(labels, out_of_fold(reader, values, labels, options.seed)[:, 1])
        )
        for method, reader in readers.items()
    }


def _soundness(posterior: Posterior, data: CellData, options: EvaluationConfig) -> dict[str, float]:
    """Return composition, reversibility and effectiveness of counterfactuals of some test cells."""
    seed = options.seed
    cells = data.where(split="test").random_subset(_SOUND_CELLS, seed=seed)
    observed = cells.rows(slice(None)).toarray()
    null = composition(observed, _world(posterior, cells, do(), seed))
    found = {
        "composition_entries": null.entries,
        "composition_difference": null.difference,
    }
    for label, rows in _largest(cells):
        own = cells.subset(rows)
        control = do(perturbation=cells.schema.control, library="factual")
        away = _world(posterior, own, control, seed)
        home = do(perturbation=label, library="factual")
        back = _world(posterior, _as_control(own, away), home, seed)
        change = reversibility(own.rows(slice(None)).toarray(), back)
        found[f"reversibility_difference/{label}"] = change.difference
    found |= _effectiveness(posterior, data, seed)
    return found


def _effectiveness(posterior: Posterior, data: CellData, seed: int) -> dict[str, float]:
    """Return what readers of real validation cells see in test cells that were given a state."""
    real, test = data.where(split="val"), data.where(split="test")
    known = real.subset(real.artifact_observed)
    enough = min(int(known.failing.sum()), int(known.passing.sum())) >= FOLDS
    if not posterior.schema.artifacts or not enough:
        return {}
    found = {}
    acts = {"typical": (test.passing, True), "removed": (test.failing, False)}
    for name, (rows, is_failing) in acts.items():
        if not rows.any():
            continue
        cells = test.subset(rows).random_subset(_SOUND_CELLS, seed=seed)
        made = _world(posterior, cells, do(artifact="typical" if is_failing else 0), seed)
        result = effectiveness(
            known.rows(slice(None)).toarray(),
            known.failing,
            made,
            np.full(cells.n_cells, is_failing),
            factual=cells.rows(slice(None)).toarray(),
            seed=seed,
        )
        for part in ("read", "before", "real"):
            found[f"effectiveness_{name}_{part}"] = getattr(result, part)
    return found


def _world(posterior: Posterior, cells: CellData, act: Intervention, seed: int) -> np.ndarray:
    """Return one coupled draw of the counts of cells under an intervention."""
    answer = counterfactual(posterior, cells, act, draws=1, count_draws=1, seed=seed)
    return np.asarray(answer.layers["counts"].toarray())


def _largest(cells: CellData) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the labels with most passing cells, and their rows."""
    labels = cells.labels
    names, sizes = np.unique(
        labels[cells.passing & (labels != cells.schema.control)], return_counts=True
    )
    for label in names[np.argsort(-sizes, kind="stable")][:_SOUND_LABELS]:
        yield str(label), np.flatnonzero((labels == label) & cells.passing)


def _as_control(cells: CellData, counts: np.ndarray) -> CellData:
    """Return the cells with other counts, as controls."""
    return dataclasses.replace(
        cells,
        counts=sp.csr_array(counts.astype(np.float32)),
        perturbation=sp.csr_array(cells.perturbation.shape, dtype=np.float32),
    )
