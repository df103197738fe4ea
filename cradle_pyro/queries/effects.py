"""Effects of interventions on populations of cells: average, by group, and of pairs.

Both worlds of an effect are asked about with the same posterior draws and the same cells (common
random numbers). Draws of the globals give the interval; cells are averaged over within a draw.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.data.encode import canonical_label
from cradle_pyro.errors import QueryError, near, shown
from cradle_pyro.inference.allocation import freed_memory_kept
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.model.log_expression import expected_log2_expression
from cradle_pyro.queries.abduction import Abduction, predict_each
from cradle_pyro.queries.calls import s_values, sign_calls
from cradle_pyro.queries.counterfactual import query_cells, query_record
from cradle_pyro.queries.draws import (
    Part,
    check_whole,
    completed,
    has_slab,
    over_draws,
    reference_draw,
    seed_of,
)
from cradle_pyro.queries.interventions import (
    FACTUAL,
    CheckedIntervention,
    Intervention,
    check,
    do,
    empty_batch,
    label_design,
)
from cradle_pyro.queries.progress import progress_bar
from cradle_pyro.queries.scale import SCALES, is_log_normalised, log2_expression
from cradle_pyro.queries.support import support_notes
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Schema

if TYPE_CHECKING:
    from anndata import AnnData

    from cradle_pyro.data.dataset import CellData

__all__ = [
    "average_effect",
    "compare",
    "count_effects",
    "effect_draws",
    "effects",
    "interaction",
    "interactions",
]

Kind = Literal["direct", "total"]
Scale = Literal["rate", "counts"]

_INTERVAL = (0.025, 0.975)
_COLUMNS = ("gene", "mean", "sd", "ci_low", "ci_high", "lfsr", "out_of_support")
_ENTRIES_AT_A_TIME = 20_000_000
# Runs of the model take some time whatever their size; the noise of counts needs more memory.
_ENTRIES_OF_WORLDS = {"rate": 4_000_000, "counts": 1_000_000}


def average_effect(
    posterior: Posterior,
    perturbation: str,
    *,
    kind: Kind = "direct",
    scale: Scale = "rate",
    cells: AnnData | CellData | None = None,
    by: str | None = None,
    draws: int = 100,
    n_cells: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the average effect of a perturbation on every gene against control (ATE, CATE).

    Parameters
    ----------
    posterior
        A fitted pair.
    perturbation
        A label, for example "KLF1" or "KLF1+CEBPA"; the combination need not have been trained.
    kind
        "direct": artifact = 0 in both worlds. "total": flags follow the perturbation, as failing
        cells are part of what it does.
    scale, cells, by, draws, n_cells, seed
        As in :func:`compare`.

    Returns
    -------
    pandas.DataFrame
        As in :func:`compare`.

    Raises
    ------
    QueryError
        If the model does not know one of the perturbations, or as in :func:`compare`.
    """
    schema = posterior.schema
    label_design(schema, perturbation)
    first, second = (_world(schema, label, kind) for label in (perturbation, schema.control))
    return compare(
        posterior, first, second, scale=scale, cells=cells, by=by, draws=draws, n_cells=n_cells,
        seed=seed,
    )  # fmt: skip


def compare(
    posterior: Posterior,
    first: Intervention,
    second: Intervention,
    *,
    scale: Scale = "rate",
    cells: AnnData | CellData | None = None,
    by: str | None = None,
    draws: int = 100,
    n_cells: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the average difference between two interventions on every gene, with uncertainty.

    Parameters
    ----------
    posterior
        A fitted pair.
    first, second
        The two worlds; effects are `first` minus `second`.
    scale
        "rate": log2(1 + 1e4 rate), the expected fraction of the library. "counts": the same of
        generated counts over their library, for comparison with observed cells; its interval
        includes the count noise of `n_cells` cells. See Notes for the libraries.
    cells
        Average over these cells, abducted; by default over abducted training controls.
    by
        Column of ``cells.obs``: one effect for each of its values (CATE).
    draws
        Posterior draws.
    n_cells
        Cells per draw; of `cells`, at most so many of each group, chosen once.
    seed
        Seed of the draws.

    Returns
    -------
    pandas.DataFrame
        Columns gene, mean, sd, ci_low, ci_high (95 %), lfsr (local false sign rate: the posterior
        probability that the sign is not that of most draws), out_of_support (see
        ``attrs["cradle_query"]``); first a column `by`, if given. ``attrs["cradle_query"]``
        records the query.

    Raises
    ------
    QueryError
        If an intervention names something that the model does not have, `scale` is unknown, or
        `by` is not a column of the cells, lacks values, or is named like a column of the answer.
    DataError
        If the cells do not fit the model, or there are none.

    Notes
    -----
    Libraries matter to the scale "counts" alone. A cell keeps its own, moved by the flags that it
    gains or loses, and an intervention on the library fixes it. Of the training controls the
    libraries are kept, but not the flags that belong to them. They are used as observed where both
    worlds are without flags. Where either has flags, or lets them follow the perturbation, a
    control's library is drawn from the model given the flags that it is drawn with; otherwise a
    library that a flag has lowered already could be lowered again.
    """
    checked, base = check(posterior, first), check(posterior, second)
    _check_scale(scale)
    _check_sizes(draws, n_cells, seed)
    groups = _groups(posterior, cells, by, n_cells, seed)
    values, slab = _both_contrasts(
        completed(posterior), [checked], base, groups=groups, scale=scale, draws=draws,
        n_cells=n_cells, seed=seed,
    )  # fmt: skip
    labels = [posterior.schema.control] if groups is None else groups.data.labels
    support = [support_notes(posterior, one, labels) for one in (checked, base)]
    record = query_record(
        posterior, checked, support, reference=str(second), scale=SCALES[scale], draws=draws,
        n_cells=n_cells, seed=seed,
    )  # fmt: skip
    tables = [
        _table(posterior.schema, values[:, 0, group], slab[:, 0, group])
        for group in range(values.shape[2])
    ]
    for table in tables:
        table["out_of_support"] = bool(record["out_of_support"])
    if by is not None and groups is not None:
        for table, name in zip(tables, groups.names, strict=True):
            table.insert(0, by, name)
    result = pd.concat(tables, ignore_index=True)
    result.attrs["cradle_query"] = record
    return result


def interaction(
    posterior: Posterior,
    pair: str,
    *,
    kind: Kind = "direct",
    draws: int = 100,
    n_cells: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what a combination does beyond the sum of its members, on every gene.

    Parameters
    ----------
    posterior
        A fitted pair.
    pair
        A label of two or more perturbations.
    kind, draws, n_cells, seed
        As in :func:`average_effect`.

    Returns
    -------
    pandas.DataFrame
        As in :func:`compare`, of effect(A+B) - effect(A) - effect(B), on the log2 scale.

    Raises
    ------
    QueryError
        If the model does not know one of the perturbations, or the label names a single one.

    Notes
    -----
    The model adds perturbations in latent state and in log-rates. What it can say of an
    interaction comes from a decoder with hidden layers, from rates that sum to one, and from the
    scale (log2(1 + 1e4 rate) bends near zero), not from a term of its own for the pair. A cell's
    response is no source of it: each member's log-fold changes are scaled apart, and their sum
    stays a sum. Support is that of the pair and of every member alone.
    """
    schema = posterior.schema
    members = _members(schema, pair)
    if len(members) < 2:
        raise QueryError(f"An interaction needs two or more perturbations, found '{pair}'.")
    worlds = [check(posterior, _world(schema, label, kind)) for label in (pair, *members)]
    base = check(posterior, _world(schema, schema.control, kind))
    values, slab = (
        part[:, 0, 0] - part[:, 1:, 0].sum(1)
        for part in _both_contrasts(
            completed(posterior), worlds, base, groups=None, scale="rate", draws=draws,
            n_cells=n_cells, seed=seed,
        )
    )  # fmt: skip
    result = _table(schema, values, slab)
    support = [support_notes(posterior, one) for one in (*worlds, base)]
    record = query_record(
        posterior, worlds[0], support, reference=f"sum of {' and '.join(members)}",
        scale=SCALES["rate"], draws=draws, n_cells=n_cells, seed=seed,
    )  # fmt: skip
    result["out_of_support"] = bool(record["out_of_support"])
    result.attrs["cradle_query"] = record
    return result


def interactions(
    posterior: Posterior,
    pairs: Sequence[str] | None = None,
    *,
    kind: Kind = "direct",
    least_effect: float = 0.1,
    draws: int = 100,
    n_cells: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return how much pairs do beyond the sum of their members, one row for each pair.

    Parameters
    ----------
    posterior
        A fitted pair.
    pairs
        Labels of two perturbations each; by default all such labels of the screen, held out or
        not.
    kind, draws, n_cells, seed
        As in :func:`interaction`; every pair is answered with the same numbers as there.
    least_effect
        Genes whose posterior mean is smaller in size (log2) do not count as called, however sure
        their sign is: rates sum to one, so that a strong effect on some genes moves all others.
    progress
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        Columns first, second (the members), label, strength (root mean square over genes of the
        posterior mean interaction, log2), n_called (genes of at least `least_effect` whose sign
        is called at an expected false sign rate of 10 %, among those of the pair), largest_gene
        and largest_mean (the greatest posterior mean in size, log2), out_of_support.
        ``attrs["cradle_query"]`` records the query.

    Raises
    ------
    QueryError
        If the model does not know one of the perturbations, a label does not name two of them, a
        pair is asked about twice, or there is none.

    Notes
    -----
    All pairs share the draws and the effects of their members. What the model can say of an
    interaction, and what not, see :func:`interaction`. A pair is out of support where itself or one
    of its members alone is.
    """
    schema = posterior.schema
    _check_sizes(draws, n_cells, seed)
    asked = _pairs(posterior) if pairs is None else list(pairs)
    members = _members_of_pairs(schema, asked)
    base = check(posterior, _world(schema, schema.control, kind))
    blocks = list(_blocks_of_pairs(members, _ENTRIES_AT_A_TIME // (draws * schema.n_genes)))
    whole = completed(posterior)
    rows = []
    with progress_bar("Interactions", len(blocks) * draws, show=progress) as advance:
        for block in blocks:
            labels = {name: None for k in block for name in (asked[k], *members[k])}
            column = {label: k for k, label in enumerate(labels)}
            values = _contrasts(
                whole, [check(posterior, _world(schema, one, kind)) for one in labels], base,
                groups=None, scale="rate", draws=draws, n_cells=n_cells, seed=seed, advance=advance,
            )[:, :, 0]  # fmt: skip
            for k in block:
                first, second = members[k]
                sum_of_both = values[:, column[first]] + values[:, column[second]]
                beyond = values[:, column[asked[k]]] - sum_of_both
                found = _strength(schema, beyond, least_effect)
                rows.append({"first": first, "second": second, "label": asked[k], **found})
    result = pd.DataFrame(rows)
    support = {
        label: support_notes(posterior, check(posterior, _world(schema, label, kind)))
        for label in {name: None for k, one in enumerate(asked) for name in (one, *members[k])}
    }
    unshown = {label for label, notes in support.items() if any(notes.values())}
    result["out_of_support"] = [
        not unshown.isdisjoint((one, *members[k])) for k, one in enumerate(asked)
    ]
    record = query_record(
        posterior, base, [*support.values()], kind=kind, scale=SCALES["rate"],
        least_effect=least_effect, draws=draws, n_cells=n_cells, seed=seed,
    )  # fmt: skip
    record["reference"] = record.pop("intervention")
    result.attrs["cradle_query"] = record
    return result


def effects(
    posterior: Posterior,
    labels: str | Sequence[str] | None = None,
    *,
    kind: Kind = "direct",
    scale: Scale = "rate",
    draws: int = 100,
    n_cells: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> AnnData:
    """Return the average effects of many perturbations on all genes, as one AnnData.

    Parameters
    ----------
    posterior
        A fitted pair.
    labels
        Perturbation labels, or one of them; by default all single perturbations and all labels of
        the screen, held out or not.
    kind, scale, draws, n_cells, seed
        As in :func:`average_effect`; every label is answered with the same numbers as there.
    progress
        Show a progress bar.

    Returns
    -------
    AnnData
        Perturbations x genes. ``X``: mean effects; layers ``sd``, ``ci_low``, ``ci_high``,
        ``lfsr`` and ``s_value`` (expected false sign rate of calling an entry and all surer ones,
        over the whole table). ``obs``: ``perturbation`` (the names again, categorical, for plots
        of scanpy), ``n_train`` cells, ``out_of_support`` and ``support`` (in words).
        ``uns["cradle_query"]`` records the query.

    Raises
    ------
    QueryError
        If the model does not know one of the perturbations.
    """
    from anndata import AnnData

    schema = posterior.schema
    _check_scale(scale)
    labels = _all_labels(posterior) if labels is None else _as_labels(schema, labels)
    _check_sizes(draws, n_cells, seed)
    worlds = [check(posterior, _world(schema, label, kind)) for label in labels]
    spelled = [canonical_label(label, schema.delimiter, schema.control) for label in labels]
    if len(set(spelled)) < len(labels) or not labels:
        raise QueryError(f"Expected different labels, at least one; found {shown(labels)}.")
    base = check(posterior, _world(schema, schema.control, kind))
    block = max(_ENTRIES_AT_A_TIME // (draws * schema.n_genes), 1)
    whole = completed(posterior)
    passes = 1 + has_slab(whole.guide, empty_batch(whole, 1))
    with (
        progress_bar("Effects", passes * draws, show=progress) as advance,
        _room_for_draws() as room,
    ):
        values, slab = _both_contrasts(
            whole, worlds, base, groups=None, scale=scale, draws=draws, n_cells=n_cells,
            seed=seed, advance=advance, room=room,
        )  # fmt: skip
        parts = [slice(start, start + block) for start in range(0, len(worlds), block)]
        summaries = [_summary(values[:, part, 0], slab[:, part, 0]) for part in parts]
    support = [support_notes(posterior, one) for one in worlds]
    sentences = ["; ".join(s for part in notes.values() for s in part) for notes in support]
    n_train = posterior.labels.set_index("label")["train"].reindex(spelled, fill_value=0)
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(labels, categories=labels),
            "n_train": n_train.to_numpy(),
            "out_of_support": [bool(text) for text in sentences],
            "support": sentences,
        },
        index=pd.Index(labels),
    )
    layers = {
        name: np.concatenate([summary[name] for summary in summaries]).astype(np.float32)
        for name in summaries[0]
    }
    mean = layers.pop("mean")
    layers["s_value"] = s_values(layers["lfsr"]).astype(np.float32)
    record = query_record(
        posterior, base, [], kind=kind, scale=SCALES[scale], draws=draws, n_cells=n_cells,
        seed=seed,
    )  # fmt: skip
    record["reference"] = record.pop("intervention")
    record["out_of_support"] = [
        label for label, text in zip(labels, sentences, strict=True) if text
    ]
    var = pd.DataFrame(index=pd.Index(schema.genes, name="gene"))
    return AnnData(mean, obs=obs, var=var, layers=layers, uns={"cradle_query": record})


def effect_draws(
    posterior: Posterior,
    labels: str | Sequence[str],
    *,
    draws: int = 50,
    n_cells: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Return posterior draws of direct average effects, shape (draws, labels, genes), log2 scale.

    All labels share the draws, so that labels asked about together or one by one are answered with
    the same numbers.

    Raises
    ------
    QueryError
        If the model does not know one of the perturbations.
    """
    schema = posterior.schema
    worlds = [
        check(posterior, _world(schema, label, "direct")) for label in _as_labels(schema, labels)
    ]
    base = check(posterior, _world(schema, schema.control, "direct"))
    return _contrasts(
        completed(posterior), worlds, base, groups=None, scale="rate", draws=draws,
        n_cells=n_cells, seed=seed,
    )[:, :, 0]  # fmt: skip


def count_effects(
    posterior: Posterior,
    labels: Sequence[str],
    libraries: Sequence[np.ndarray],
    control_library: np.ndarray,
    *,
    draws: int = 50,
    n_cells: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Return average effects as they show in counts, shape (labels, genes), log2 scale.

    An effect is the difference of the mean over cells of log2(1 + 1e4 counts / library), in
    expectation over the noise of the counts, for comparison with observed cells: libraries are
    drawn from the cells compared with.

    Parameters
    ----------
    posterior
        A fitted pair.
    labels
        Perturbation labels.
    libraries
        For each label, libraries of the observed cells it is compared with.
    control_library
        Libraries of the observed control cells.
    draws, n_cells, seed
        As in :func:`effect_draws`.

    Notes
    -----
    All worlds share cells, globals, and each cell's place among the libraries, so that their noise
    cancels. The noise of counts is integrated out
    (:func:`~cradle_pyro.model.log_expression.expected_log2_expression`); counts of a distribution
    for which that is not known are drawn instead.
    """
    _check_sizes(draws, n_cells, seed)
    schema, posterior = posterior.schema, completed(posterior)
    totals = np.zeros((len(labels) + 1, schema.n_genes))
    depths = [np.sort(np.asarray(one, np.float32)) for one in (control_library, *libraries)]
    checked = [
        check(posterior, _world(schema, label, "direct")) for label in (schema.control, *labels)
    ]
    with freed_memory_kept():
        for draw in range(draws):
            with seeded(seed_of(seed, draw)):
                cells = reference_draw(posterior, n_cells)
                place = (torch.randperm(n_cells) + torch.rand(n_cells)).numpy() / n_cells
            for some in _at_a_time(len(checked), n_cells * schema.n_genes, "counts"):
                acts = []
                for library, one in zip(depths[some], checked[some], strict=True):
                    depth = torch.as_tensor(library[(place * len(library)).astype(np.int64)])
                    depth = depth.to(cells.batch.library)
                    acts.append(one.acts(cells.batch, cells.values) | {sites.LIBRARY: depth})
                found = _count_expression(posterior, cells, acts, seed_of(seed, draw, 0))
                totals[some] += found.cpu().numpy() / draws
    return totals[1:] - totals[:1]


class _Counts(Messenger):
    """Keeps the distribution of the counts of the world that is run inside."""

    fn: Any

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == sites.COUNTS:
            self.fn = msg["fn"]


def _count_expression(
    posterior: Posterior, cells: Abduction, worlds: Sequence[Mapping[str, Tensor]], seed: int
) -> Tensor:
    """Return the mean log expression of counts in each world, shape (worlds, genes).

    In expectation over the counts, or of counts that are drawn alike in all worlds.
    """
    with _Counts() as counts:
        predict_each(posterior.model, cells, worlds)
    library = torch.cat([acts[sites.LIBRARY] for acts in worlds])
    try:
        with torch.no_grad():
            values = expected_log2_expression(counts.fn, library)
    except TypeError:
        if len(worlds) > 1:
            return torch.cat([_count_expression(posterior, cells, [w], seed) for w in worlds])
        with seeded(seed), torch.no_grad():
            world = {sites.COUNTS: counts.fn.sample(), sites.LIBRARY: library}
            values = log2_expression(posterior, _fraction(posterior, world))
    return values.unflatten(0, (len(worlds), len(cells.batch))).mean(1)


class _Groups(NamedTuple):
    """The cells to average over, and which of them form a group."""

    data: CellData
    codes: np.ndarray
    names: list[str]


def _groups(
    posterior: Posterior, cells: AnnData | CellData | None, by: str | None, n_cells: int, seed: int
) -> _Groups | None:
    if cells is None:
        if by is not None:
            raise QueryError(f"by={by!r} groups cells: give them, cells=adata.")
        return None
    data = query_cells(posterior, cells)
    names, codes = ["all"], np.zeros(data.n_cells, dtype=np.int64)
    if by is not None:
        column = _group_column({} if data is cells else cells.obs, by)  # type: ignore[union-attr]
        found, codes = np.unique(column, return_inverse=True)
        names = found.tolist()
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(codes == code))[:n_cells] for code in range(len(names))
    ]
    rows = np.sort(np.concatenate(chosen))
    return _Groups(data.subset(rows), codes[rows], names)


def _group_column(columns: Mapping[str, pd.Series] | pd.DataFrame, by: str) -> np.ndarray:
    """Return each cell's group, as text."""
    if by not in columns:
        known = [str(name) for name in columns]
        raise QueryError(
            f"by={by!r} is not a column of the cells{near(by, known) or '.'} Found "
            f"{shown(known, 12) or 'none: give an AnnData'}."
        )
    if by in _COLUMNS:
        raise QueryError(
            f"by={by!r} is also the name of a column of the answer. Rename it in cells.obs."
        )
    n_missing = int(columns[by].isna().sum())
    if n_missing:
        raise QueryError(
            f"Expected a group for each cell, found {n_missing} of {len(columns[by])} cells without"
            f" a value of {by!r}. Fill them in, or leave these cells out."
        )
    return columns[by].astype(str).to_numpy(dtype=str)


def _in_memory(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


@contextmanager
def _room_for_draws() -> Iterator[Callable[[tuple[int, ...]], Any]]:
    """Yield what makes room for draws: in memory, or on disk if they are many, until the end."""
    import h5py

    with tempfile.TemporaryDirectory(prefix="cradle-") as folder, ExitStack() as files:

        def room(shape: tuple[int, ...]) -> Any:
            if math.prod(shape) <= _ENTRIES_AT_A_TIME:
                return _in_memory(shape)
            path = Path(folder) / f"{len(os.listdir(folder))}.h5"
            file = files.enter_context(h5py.File(path, "w"))
            return file.create_dataset("draws", shape, np.float32, chunks=(1, 1, *shape[2:]))

        yield room


def _contrasts(
    posterior: Posterior,
    worlds: Sequence[CheckedIntervention],
    base: CheckedIntervention,
    *,
    groups: _Groups | None,
    scale: Scale,
    draws: int,
    n_cells: int,
    seed: int,
    given_slab: bool = False,
    advance: Callable[[], object] = lambda: None,
    room: Callable[[tuple[int, ...]], Any] = _in_memory,
) -> np.ndarray:
    """Return draws of mean differences to `base`, shape (draws, worlds, groups, genes).

    The posterior is :func:`completed`. Draws lie in what `room` makes of their shape, all zeros.
    """
    _check_sizes(draws, n_cells, seed)
    n_groups = 1 if groups is None else len(groups.names)
    shape = (draws, len(worlds), n_groups, posterior.schema.n_genes)
    totals = room(shape)

    def add(abduction: Abduction, draw: int, codes: np.ndarray, sizes: np.ndarray) -> None:
        reference = _expression(posterior, abduction, [base], scale)
        share = reference.new_zeros(n_groups, len(codes))
        share[codes, np.arange(len(codes))] = torch.as_tensor(1 / sizes[codes]).to(share)
        for some in _at_a_time(len(worlds), reference.numel(), scale):
            change = _expression(posterior, abduction, worlds[some], scale).sub_(reference)
            totals[draw, some] += (share @ change).cpu().numpy()

    if groups is None:
        flags = [one.flags for one in (*worlds, base)]
        artifacts = any(not isinstance(one, Tensor) and one in (None, FACTUAL) for one in flags)
        flagged = any(not isinstance(one, Tensor) or bool(one.any()) for one in flags)
        codes, sizes = np.zeros(n_cells, dtype=np.int64), np.array([n_cells])
        with freed_memory_kept():
            for draw in range(draws):
                with seeded(seed_of(seed, draw)):
                    cells = reference_draw(
                        posterior, n_cells, artifacts=artifacts, libraries=flagged,
                        counts=scale == "counts", given_slab=given_slab,
                    )  # fmt: skip
                    add(cells, draw, codes, sizes)
                advance()
        return totals
    sizes = np.bincount(groups.codes, minlength=n_groups)

    def use(part: Part) -> None:
        add(part.abduction, part.draw, groups.codes[part.rows], sizes)

    over_draws(
        posterior, groups.data, use, draws=draws, counts=draws if scale == "counts" else 0,
        seed=seed, given_slab=given_slab,
    )  # fmt: skip
    return totals


def _both_contrasts(
    posterior: Posterior,
    worlds: Sequence[CheckedIntervention],
    base: CheckedIntervention,
    **how: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Return draws of the posterior, and of the posterior given that there are effects.

    Arguments as of :func:`_contrasts`.
    """
    values = _contrasts(posterior, worlds, base, given_slab=False, **how)
    if not has_slab(posterior.guide, empty_batch(posterior, 1)):
        return values, values
    return values, _contrasts(posterior, worlds, base, given_slab=True, **how)


def _at_a_time(n_worlds: int, n_entries: int, scale: Scale) -> Iterator[slice]:
    """Yield runs of worlds of `n_entries` each that are few enough to be predicted together."""
    size = max(_ENTRIES_OF_WORLDS[scale] // n_entries, 1)
    for start in range(0, n_worlds, size):
        yield slice(start, min(start + size, n_worlds))


def _expression(
    posterior: Posterior,
    abduction: Abduction,
    worlds: Sequence[CheckedIntervention],
    scale: Scale,
) -> Tensor:
    """Return the log expression of the cells in each world, shape (worlds, cells, genes)."""
    acts = [one.acts(abduction.batch, abduction.values) for one in worlds]
    values = predict_each(posterior.model, abduction, acts)
    value = values[sites.RATE] if scale == "rate" else _fraction(posterior, values)
    return log2_expression(posterior, value)


def _fraction(posterior: Posterior, world: dict[str, Tensor]) -> Tensor:
    """Return generated counts over their library (log-normalised values as they are)."""
    if is_log_normalised(posterior):
        return world[sites.COUNTS]
    return world[sites.COUNTS] / world[sites.LIBRARY].unsqueeze(-1)


def _world(schema: Schema, label: str, kind: Kind) -> Intervention:
    if kind not in ("direct", "total"):
        raise QueryError(f"kind is 'direct' or 'total', found {kind!r}.")
    return do(perturbation=label, artifact=0 if kind == "direct" else None)


def _as_labels(schema: Schema, labels: str | Iterable[str]) -> list[str]:
    """Return a list of labels that the schema knows, of one label or of several."""
    if not isinstance(labels, str | Iterable):
        raise QueryError(f"Expected labels such as ['KLF1', 'KLF1+CEBPA'], found {labels!r}.")
    names = [labels] if isinstance(labels, str) else list(labels)
    for name in names:
        label_design(schema, name)
    return names


def _check_sizes(draws: int, n_cells: int, seed: int) -> None:
    if draws < 1 or n_cells < 1:
        raise QueryError(f"Expected draws >= 1 and n_cells >= 1, found {draws} and {n_cells}.")
    check_whole("draws", draws, 1)
    check_whole("n_cells", n_cells, 1)
    check_whole("seed", seed, 0)


def _check_scale(scale: str) -> None:
    if scale not in SCALES:
        raise QueryError(
            f"scale is {shown(SCALES)}, found {scale!r}{near(scale, list(SCALES)) or '.'}"
        )


def _all_labels(posterior: Posterior) -> list[str]:
    schema = posterior.schema
    others = [str(label) for label in posterior.labels["label"]]
    known = {*schema.perturbations, schema.control}
    return [*schema.perturbations, *(label for label in others if label not in known)]


def _members(schema: Schema, label: str) -> list[str]:
    row = label_design(schema, label).tolist()
    return [name for name, on in zip(schema.perturbations, row, strict=True) if on]


def _pairs(posterior: Posterior) -> list[str]:
    schema = posterior.schema
    labels = [str(label) for label in posterior.labels["label"]]
    return [label for label in labels if len(_members(schema, label)) == 2]


def _members_of_pairs(schema: Schema, pairs: Sequence[str]) -> list[tuple[str, ...]]:
    """Return both members of each pair, after checking that they are different pairs."""
    members = [tuple(_members(schema, pair)) for pair in pairs]
    wrong = [pair for pair, names in zip(pairs, members, strict=True) if len(names) != 2]
    if wrong:
        raise QueryError(
            f"Expected labels of two perturbations, found {shown(wrong)}. For more than two, ask "
            "for one interaction at a time."
        )
    if len(set(members)) < len(members) or not members:
        raise QueryError(
            f"Expected different pairs, at least one; found {shown(pairs) or 'none in the screen'}."
        )
    return members


def _blocks_of_pairs(members: Sequence[tuple[str, ...]], most: int) -> Iterator[list[int]]:
    """Yield runs of pairs that, with their different members, are about `most` worlds."""
    block: list[int] = []
    names: set[str] = set()
    for k, pair in enumerate(members):
        if block and len(block) + 1 + len(names.union(pair)) > most:
            yield block
            block, names = [], set()
        block.append(k)
        names.update(pair)
    yield block


def _strength(schema: Schema, values: np.ndarray, least_effect: float) -> dict[str, Any]:
    """Return the summary of draws of one interaction, shape (draws, genes)."""
    summary = _summary(values, values)
    mean = summary["mean"]
    largest = int(np.abs(mean).argmax())
    return {
        "strength": float(np.sqrt(np.square(mean, dtype=np.float64).mean())),
        "n_called": int((sign_calls(summary["lfsr"]) & (np.abs(mean) >= least_effect)).sum()),
        "largest_gene": schema.genes[largest],
        "largest_mean": float(mean[largest]),
    }


def _table(schema: Schema, values: np.ndarray, slab: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"gene": schema.genes} | _summary(values, slab))


def _summary(values: np.ndarray, slab: np.ndarray) -> dict[str, np.ndarray]:
    """Return moments, interval and sign of draws, and of draws given an effect, draws first."""
    ends = [np.quantile(part, _INTERVAL, axis=0) for part in (values, slab)]
    low, high = np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])
    return {
        "mean": values.mean(0),
        "sd": values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(low),
        "ci_low": low,
        "ci_high": high,
        "lfsr": np.minimum((values <= 0).mean(0), (values >= 0).mean(0)),
    }
