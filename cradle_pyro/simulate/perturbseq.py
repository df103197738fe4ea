"""A mechanistic Perturb-seq screen with artifacts and a known truth for every cell.

The mechanism is deliberately not the model's own family. A cell has a type, a place in the cell
cycle, activities of a few gene programmes and a penetrance (how much of the guide's machinery works
in it). A knock-down lowers its target, moves programme activities that genes read through a
saturating (Hill) response, and changes a sparse regulon; all of it scales with penetrance, type and
cycle. Counts are gamma-Poisson. Artifacts act on the RNA molecules: lost capture, a leaking
membrane, ambient RNA, a second cell in the droplet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import gamma

from cradle_pyro.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Codes = NDArray[np.int64]

__all__ = ["ARTIFACT_KINDS", "DEMO_SETTINGS", "simulate_perturbseq"]

ARTIFACT_KINDS: tuple[str, ...] = ("low_capture", "leaking", "ambient", "doublet")

DEMO_SETTINGS = (
    "data.layer='counts'",
    "data.covariate_keys=['batch']",
    "split.method=combinations",
)
"""What these screens, that of the demo among them, need beside the default configuration."""

_CONTROL = "control"
_SCALE = 1e4
_CHUNK = 1024
_N_TYPES = 3
_POPULATION = 2048
_KIND_ODDS = (0.32, 0.38, 0.15, 0.15)
_INTERACTIONS = ("synergy", "buffering", "masking")

_MT = (
    *("MT-CO1", "MT-CO3", "MT-ND4", "MT-CYB", "MT-ND1", "MT-ATP6", "MT-CO2"),
    *("MT-ND2", "MT-ND3", "MT-ND5", "MT-ND4L", "MT-ATP8", "MT-ND6"),
)
_HB = ("HBA1", "HBB", "HBA2", "HBG1", "HBG2", "HBE1")
_TARGETS = (
    *("KLF1", "CEBPA", "GATA1", "SPI1", "RUNX1", "MYC", "TP53", "CEBPE", "IRF1"),
    *("JUN", "FOS", "STAT1", "STAT3", "ETS1", "FOXA1", "FOXO4", "EGR1", "TAL1"),
    *("LYL1", "IKZF1", "IKZF3", "MAPK1", "PTPN12", "TGFBR2", "CBL", "UBASH3B", "ZBTB10"),
    *("HOXA13", "KMT2A", "DUSP9", "SNAI1", "OSR2", "PRDM1", "TBX3", "MAP2K6", "BAK1"),
    *("CDKN1A", "CNN1", "SET", "TMSB4X", "COL2A1", "RHOXF2", "SGK1", "LHX1", "PRTG"),
    *("ISL2", "HK2", "NCL", "POU3F2"),
)


class _Pair(NamedTuple):
    first: int
    second: int
    kind: str


@dataclass(frozen=True)
class _World:
    """What is the same for all cells of one screen (genes G, types K, programmes P, targets T)."""

    genes: list[str]
    is_mt: NDArray[np.bool_]
    is_ribo: NDArray[np.bool_]
    is_hb: NDArray[np.bool_]
    target: Codes  # (T,) column of each perturbation's own gene
    pairs: list[_Pair]
    base: Floats  # (G,) log expression
    type_shift: Floats  # (K, G)
    batch_shift: Floats  # (B, G)
    cycle: Floats  # (2, G) cosine and sine loadings
    programme: Floats  # (P, G) loadings
    type_activity: Floats  # (K, P)
    access: Floats  # (K, G) how open a gene is to regulons in a type
    regulon: Floats  # (T, G) log-fold change at full strength
    neomorphic: Floats  # (n_pairs, G) genes that only the synergistic pair reaches
    push: Floats  # (T, P) change of programme activity at full strength
    knock_down: Floats  # (T,) share of the target lost at full penetrance
    type_response: Floats  # (T, K)
    cycle_response: Floats  # (T,) phase at which the response is largest
    strength: Floats  # (T,)
    drive: Floats  # (1 + labels, T) downstream weight of each target under each label
    hit: Floats  # (1 + labels, T) 1 where the label knocks the target down
    nuclear: Floats  # (G,) share of a gene's RNA kept in the nucleus
    dispersion: Floats  # (G,) shape of the gamma noise

    @property
    def labels(self) -> list[str]:
        names = [self.genes[i] for i in self.target]
        joined = ["+".join(sorted((names[p.first], names[p.second]))) for p in self.pairs]
        return [_CONTROL, *names, *joined]


@dataclass(frozen=True)
class _Cells:
    """What a cell is before it is perturbed (cells N)."""

    kind: Codes
    batch: Codes
    phase: Floats  # (N,) radians
    activity: Floats  # (N, P)
    penetrance: Floats  # (N,)
    mt_shift: Floats  # (N,)
    ribo_shift: Floats  # (N,)
    library: Floats  # (N,) expected UMIs without an artifact

    def rows(self, rows: slice | Codes) -> _Cells:
        return _Cells(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def simulate_perturbseq(
    *,
    n_cells: int = 6000,
    n_genes: int = 1000,
    n_perturbations: int = 24,
    n_pairs: int = 12,
    seed: int = 0,
    artifact_share: float = 0.2,
    effect_size: float = 1.4,
    effect_density: float = 0.03,
    interacting_share: float = 1 / 3,
    confounding: float = 1.5,
    control_share: float = 0.12,
    median_library: float = 3300.0,
    n_batches: int = 2,
    batch_effect: float = 0.05,
) -> AnnData:
    """Return a simulated CRISPR-interference screen with artifacts and its truth.

    Parameters
    ----------
    n_cells, n_genes : int
        Size of the screen. The genes include 13 mitochondrial, some ribosomal and haemoglobin
        ones (fewer in small panels) and every perturbation's target.
    n_perturbations, n_pairs : int
        Number of single perturbations, and of pairs of them.
    seed : int
        The same seed and settings give the same screen, bit for bit.
    artifact_share : float
        Expected share of cells with an artifact, in [0, 1).
    effect_size : float
        Standard deviation of the log-fold changes in a regulon at full strength (natural log).
        0 leaves only the knock-down of the targets.
    effect_density : float
        Share of genes in each perturbation's own regulon; 3 genes or more are expected in it.
    interacting_share : float
        Share of pairs whose effects do not add up.
    confounding : float
        Log-odds by which the strongest perturbation raises the risk of an artifact.
    control_share : float
        Share of control cells.
    median_library : float
        About the median of UMIs per cell without an artifact, at least 500.
    n_batches : int
        Number of batches, independent of the perturbations.
    batch_effect : float
        Standard deviation of a batch's log-fold change per gene.

    Returns
    -------
    AnnData
        ``X`` and ``layers["counts"]``: raw counts (float32 CSR).
        ``layers["true_rate"]``: expected fraction of each gene in the cell without an artifact;
        ``layers["true_rate_control"]``: the same cell under control (rows sum to one).
        ``obs``: ``perturbation``, ``cell_type``, ``batch``, ``true_artifact`` (``"none"`` or one
        of `ARTIFACT_KINDS`), ``true_artifact_degree`` in [0, 1], ``true_penetrance``,
        ``true_phase`` (radians), ``true_library`` (UMIs).
        ``var``: ``mt``, ``ribo``, ``hb``, ``target``, ``true_dispersion``.
        ``uns["cradle_truth"]``: ``ate`` (labels x genes, see Notes), ``ate_labels``, ``mask``
        (perturbations x genes: genes acted on before renormalisation), ``mask_labels``,
        ``strength``, ``knock_down``, ``interactions`` (``pair`` and ``kind``, one of additive,
        synergy, buffering, masking), ``artifact_probability`` per label of
        ``artifact_probability_labels``, ``settings``.

    Raises
    ------
    DataError
        A size or share is impossible (too few genes for the targets, more pairs than there are,
        too few cells for the labels).

    Notes
    -----
    ``ate[t, g]`` is the mean over a population of cells (up to 2,048 cells of the screen, each put
    under every label in silico; labels are assigned independently of what a cell is) of
    log2(1 + 1e4 · rate under t) - log2(1 + 1e4 · rate under control).

    Difficulty. With the default settings the effects read off the passing training cells (log of
    mean fractions) correlate 0.71 to 0.78 with ``ate`` (seeds 0 to 7), their spike-and-slab
    shrinkage about 0.92, sums of single effects for the pairs 0.65 to 0.75.

    Artifacts. low_capture keeps a random share of all molecules. leaking loses cytoplasmic RNA
    (mitochondria and nucleus hold theirs). Both also show some ambient RNA. ambient: much soup
    (cytoplasm of lysed cells, rich in haemoglobin), less of the cell. doublet: another cell of the
    screen in the same droplet, in part.

    Examples
    --------
    >>> adata = simulate_perturbseq(n_cells=300, n_genes=60, n_perturbations=4, n_pairs=2, seed=1)
    >>> adata.shape
    (300, 60)
    """
    settings = {name: value for name, value in locals().items()}
    _check(settings)
    rng = np.random.default_rng(seed)
    world = _make_world(rng, settings)
    label = _assign(rng, n_cells, len(world.labels), control_share)
    cells = _make_cells(rng, world, n_cells, median_library)
    risk = _artifact_risk(world, label, artifact_share, confounding)
    artifact, degree = _draw_artifacts(rng, world, label, risk)

    rate = np.empty((n_cells, n_genes), dtype=np.float32)
    rate_control = np.empty_like(rate)
    for rows in _chunks(n_cells):
        rate[rows] = _rates(world, cells.rows(rows), label[rows])
        rate_control[rows] = _rates(world, cells.rows(rows), np.zeros_like(label[rows]))
    soup = _soup(world, rate[rng.choice(n_cells, size=min(n_cells, _POPULATION), replace=False)])
    partner = (np.arange(n_cells) + rng.integers(1, n_cells, size=n_cells)) % n_cells
    counts = sparse.vstack(
        [
            _draw_counts(rng, world, cells, rate, soup, partner, artifact, degree, rows)
            for rows in _chunks(n_cells)
        ],
        format="csr",
    )
    population = cells.rows(np.sort(rng.permutation(n_cells)[:_POPULATION]))
    truth = _truth(world, risk) | {"ate": _average_effects(world, population)}
    truth["settings"] = settings
    return _as_anndata(world, cells, label, artifact, degree, counts, rate, rate_control, truth)


def _check(settings: dict[str, float]) -> None:
    """Raise a DataError for impossible sizes, before any work."""
    n_genes, n_targets = int(settings["n_genes"]), int(settings["n_perturbations"])
    n_pairs, n_cells = int(settings["n_pairs"]), int(settings["n_cells"])
    most = n_targets * (n_targets - 1) // 2
    n_least = 30 + 2 * n_targets
    if n_targets < 1 or n_genes < n_least:
        raise DataError(
            f"n_perturbations={n_targets} needs at least 1 perturbation and {n_least} genes, found "
            f"n_genes={n_genes}. Raise n_genes or lower n_perturbations."
        )
    if not 0 <= n_pairs <= most:
        raise DataError(
            f"{n_targets} perturbations make 0 to {most} pairs, found n_pairs={n_pairs}. "
            "Lower n_pairs or raise n_perturbations."
        )
    n_labels = 1 + n_targets + n_pairs
    if n_cells < 4 * n_labels:
        raise DataError(
            f"{n_labels} labels need at least {4 * n_labels} cells, found n_cells={n_cells}. "
            "Raise n_cells or lower n_perturbations and n_pairs."
        )
    for name in ("artifact_share", "effect_density", "interacting_share", "control_share"):
        low, high = (0.0, 1.0) if name != "control_share" else (0.01, 0.9)
        if not low <= settings[name] <= high or (name == "artifact_share" and settings[name] == 1):
            raise DataError(f"{name} must lie in [{low}, {high}], found {settings[name]}.")
    least = {"effect_size": 0, "batch_effect": 0, "n_batches": 1, "median_library": 500}
    for name, low in least.items():
        if not (settings[name] >= low and np.isfinite(settings[name])):
            raise DataError(f"{name} must be at least {low} and finite, found {settings[name]}.")


def _chunks(n_cells: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, n_cells)) for start in range(0, n_cells, _CHUNK)]


def _gene_names(n_genes: int, n_targets: int) -> tuple[list[str], int, int, int]:
    """Return the names (MT, ribosomal, HB, targets, others) and how many of the first three."""
    n_mt = min(len(_MT), max(3, n_genes // 20))
    n_ribo = max(4, n_genes // 20)
    n_hb = min(len(_HB), max(2, n_genes // 200))
    ribo = [f"RP{'LS'[i % 2]}{i // 2 + 3}" for i in range(n_ribo)]
    targets = [_TARGETS[i] if i < len(_TARGETS) else f"TF{i + 1:04d}" for i in range(n_targets)]
    n_rest = n_genes - n_mt - n_ribo - n_hb - n_targets
    rest = [f"GENE{i + 1:04d}" for i in range(n_rest)]
    return [*_MT[:n_mt], *ribo, *_HB[:n_hb], *targets, *rest], n_mt, n_ribo, n_hb


def _sparse_normal(
    rng: np.random.Generator, shape: tuple[int, int], density: float, scale: float
) -> Floats:
    """Return a matrix with a share `density` of non-zero Normal(0, scale²) entries.

    At least 3 are expected per row, so that small panels show effects too.
    """
    density = max(density, 3 / shape[1]) if density > 0 else 0.0
    values = rng.normal(0.0, scale, size=shape) * (rng.random(shape) < density)
    return values.astype(np.float32)


def _make_world(rng: np.random.Generator, settings: dict[str, float]) -> _World:
    n_genes, n_targets = int(settings["n_genes"]), int(settings["n_perturbations"])
    genes, n_mt, n_ribo, n_hb = _gene_names(n_genes, n_targets)
    index = np.arange(n_genes)
    is_mt, is_ribo = index < n_mt, (index >= n_mt) & (index < n_mt + n_ribo)
    first_target = n_mt + n_ribo + n_hb
    is_hb = (index >= n_mt + n_ribo) & (index < first_target)
    target = np.arange(first_target, first_target + n_targets)
    special = is_mt | is_ribo | is_hb

    base = rng.normal(0.0, 1.0, size=n_genes)
    base[target] = rng.normal(0.5, 0.5, size=n_targets)  # a knock-down has to be visible
    mass = np.exp(base)
    for group, share in ((is_mt, 0.07), (is_ribo, 0.18), (is_hb, 0.006)):
        mass[group] *= share / (1 - 0.256) * mass[~special].sum() / mass[group].sum()
    plain = (~special).astype(np.float32)

    n_programmes = 8
    phase = rng.uniform(0, 2 * np.pi, size=n_genes)
    size = np.abs(_sparse_normal(rng, (1, n_genes), 0.12, 0.5))[0] * plain
    programme = np.abs(_sparse_normal(rng, (n_programmes, n_genes), 0.025, 0.8)) * plain
    strength = _strengths(rng, n_targets)
    response = _make_response(rng, settings, strength, plain, target, n_programmes)
    pairs = _make_pairs(rng, settings, strength)
    drive, hit, neomorphic = _make_labels(rng, settings, pairs, plain)
    dispersion = rng.lognormal(1.7, 0.5, size=n_genes)
    dispersion[special] = 40.0
    return _World(
        genes=genes,
        is_mt=is_mt,
        is_ribo=is_ribo,
        is_hb=is_hb,
        target=target,
        pairs=pairs,
        base=np.log(mass).astype(np.float32),
        type_shift=_sparse_normal(rng, (_N_TYPES, n_genes), 0.15, 0.7) * plain,
        batch_shift=rng.normal(
            0, settings["batch_effect"], size=(int(settings["n_batches"]), n_genes)
        ).astype(np.float32),
        cycle=np.stack([size * np.cos(phase), size * np.sin(phase)]).astype(np.float32),
        programme=programme,
        type_activity=rng.normal(0, 0.8, size=(_N_TYPES, n_programmes)).astype(np.float32),
        access=np.where(rng.random((_N_TYPES, n_genes)) < 0.7, 1.0, 0.1).astype(np.float32),
        strength=strength,
        drive=drive,
        hit=hit,
        neomorphic=neomorphic,
        nuclear=rng.beta(1.5, 8.0, size=n_genes).astype(np.float32),
        dispersion=dispersion.astype(np.float32),
        **response,
    )


def _strengths(rng: np.random.Generator, n_targets: int) -> Floats:
    """Return how strong each perturbation is: 15 % do nothing, the others are gamma with mean 1.

    Evenly spaced quantiles in random order, so that screens of different seeds are equally hard.
    """
    n_idle = round(0.15 * n_targets)
    n_active = n_targets - n_idle
    active = gamma.ppf((np.arange(n_active) + 0.5) / n_active, 4.0, scale=0.25)
    return rng.permutation(np.concatenate([np.zeros(n_idle), active])).astype(np.float32)


def _make_response(
    rng: np.random.Generator,
    settings: dict[str, float],
    strength: Floats,
    plain: Floats,
    target: Codes,
    n_programmes: int,
) -> dict[str, Floats]:
    """Return what each perturbation does at full strength, and in which cells it does most."""
    n_targets, n_genes = len(strength), len(plain)
    effect_size = settings["effect_size"]
    regulon = _sparse_normal(rng, (n_targets, n_genes), settings["effect_density"], effect_size)
    regulon *= plain * strength[:, None]
    regulon[np.arange(n_targets), target] = 0.0  # the knock-down itself is separate
    push = np.zeros((n_targets, n_programmes), dtype=np.float32)
    moved = rng.permutation(np.arange(n_targets) % n_programmes)
    sign = rng.choice([-1.0, 1.0], size=n_targets)
    push[np.arange(n_targets), moved] = (
        2.5 * effect_size * sign * rng.lognormal(-0.1, 0.4, n_targets)
    )
    return {
        "regulon": regulon,
        "push": push * strength[:, None],
        "knock_down": rng.uniform(0.85, 0.97, size=n_targets).astype(np.float32),
        "type_response": rng.lognormal(-0.15, 0.55, size=(n_targets, _N_TYPES)).astype(np.float32),
        "cycle_response": rng.uniform(0, 2 * np.pi, size=n_targets).astype(np.float32),
    }


def _make_pairs(
    rng: np.random.Generator, settings: dict[str, float], strength: Floats
) -> list[_Pair]:
    """Return distinct pairs, those of two active perturbations first, with a kind each."""
    n_pairs, n_targets = int(settings["n_pairs"]), len(strength)
    first, second = np.triu_indices(n_targets, k=1)
    idle = (strength[first] == 0).astype(int) + (strength[second] == 0)
    order = np.lexsort((rng.random(len(first)), idle))[:n_pairs]
    n_interacting = round(settings["interacting_share"] * n_pairs)
    kinds = [_INTERACTIONS[i % len(_INTERACTIONS)] for i in range(n_interacting)]
    kinds += ["additive"] * (n_pairs - n_interacting)
    shuffled = rng.permutation(len(kinds))
    return [
        _Pair(int(first[i]), int(second[i]), kinds[k]) for i, k in zip(order, shuffled, strict=True)
    ]


def _make_labels(
    rng: np.random.Generator, settings: dict[str, float], pairs: list[_Pair], plain: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return downstream weights and hits of every label, and the synergistic pairs' own genes."""
    n_targets = int(settings["n_perturbations"])
    hit = np.zeros((1 + n_targets + len(pairs), n_targets), dtype=np.float32)
    hit[1 : 1 + n_targets] = np.eye(n_targets)
    drive = hit.copy()
    neomorphic = _sparse_normal(
        rng, (len(pairs), len(plain)), settings["effect_density"], settings["effect_size"]
    )
    for i, pair in enumerate(pairs):
        members, row = [pair.first, pair.second], 1 + n_targets + i
        hit[row, members] = 1.0
        factor = {"synergy": 1.4, "buffering": 0.5, "masking": 1.0, "additive": 1.0}[pair.kind]
        drive[row, members] = factor
        if pair.kind == "masking":  # the first is epistatic to the second
            drive[row, pair.second] = 0.0
        if pair.kind != "synergy":
            neomorphic[i] = 0.0
    return drive, hit, neomorphic * plain


def _assign(rng: np.random.Generator, n_cells: int, n_labels: int, control_share: float) -> Codes:
    """Return a label code per cell (0 is control); every label has at least two cells."""
    share = rng.dirichlet(np.full(n_labels - 1, 40.0)) * (1 - control_share)
    spare = rng.multinomial(n_cells - 2 * n_labels, [control_share, *share])
    return rng.permutation(np.repeat(np.arange(n_labels), spare + 2))


def _make_cells(
    rng: np.random.Generator, world: _World, n_cells: int, median_library: float
) -> _Cells:
    kind = rng.choice(_N_TYPES, size=n_cells, p=[0.5, 0.3, 0.2])
    batch = rng.integers(len(world.batch_shift), size=n_cells)
    activity = world.type_activity[kind] + rng.normal(0, 0.6, size=(n_cells, len(world.programme)))
    escaped = rng.random(n_cells) < 0.1  # the guide did nothing in these
    penetrance = np.where(escaped, rng.beta(1, 9, size=n_cells), rng.beta(6, 2, size=n_cells))
    # Cells spend most of their time in one phase: a von Mises around zero, not a uniform.
    phase = rng.vonmises(0.0, 0.7, size=n_cells)
    depth = 1.0 - 0.1 * (batch % 2) + 0.1 * np.cos(phase)
    library = median_library * depth * rng.lognormal(0.0, 0.3, size=n_cells)
    return _Cells(
        kind=kind,
        batch=batch,
        phase=phase.astype(np.float32),
        activity=activity.astype(np.float32),
        penetrance=penetrance.astype(np.float32),
        mt_shift=rng.normal(0, 0.15, size=n_cells).astype(np.float32),
        ribo_shift=rng.normal(0, 0.1, size=n_cells).astype(np.float32),
        library=library.astype(np.float32),
    )


def _rates(world: _World, cells: _Cells, label: Codes) -> Floats:
    """Return each cell's expected fractions under its label, without an artifact."""
    n_targets = len(world.target)
    cycle = 1.0 + 0.6 * np.cos(cells.phase[:, None] - world.cycle_response)
    susceptible = cells.penetrance[:, None] * world.type_response.T[cells.kind] * cycle
    strength = world.drive[label] * susceptible

    direct = strength @ world.regulon
    is_pair = label > n_targets
    if is_pair.any():
        own = world.neomorphic[label[is_pair] - n_targets - 1]
        direct[is_pair] += cells.penetrance[is_pair, None] * own
    direct *= world.access[cells.kind]
    activity = cells.activity + strength @ world.push
    log_rate = world.base + world.type_shift[cells.kind] + world.batch_shift[cells.batch]
    log_rate += np.stack([np.cos(cells.phase), np.sin(cells.phase)], axis=1) @ world.cycle
    log_rate += (4.0 / (1.0 + np.exp(-activity)) - 2.0) @ world.programme
    log_rate += 3.0 * np.tanh(direct / 3.0)  # transcription cannot rise or fall without bound
    log_rate += cells.mt_shift[:, None] * world.is_mt + cells.ribo_shift[:, None] * world.is_ribo
    lost = world.hit[label] * cells.penetrance[:, None] * world.knock_down
    log_rate[:, world.target] += np.log1p(-lost)
    rate = np.exp(log_rate - log_rate.max(axis=1, keepdims=True))
    return (rate / rate.sum(axis=1, keepdims=True)).astype(np.float32)


def _average_effects(world: _World, cells: _Cells) -> Floats:
    """Return (labels, genes): every cell under every label against itself under control."""
    n_cells, n_labels = len(cells.kind), len(world.labels) - 1
    total = np.zeros((n_labels, len(world.genes)))
    for rows in _chunks(n_cells):
        part = cells.rows(rows)
        codes = np.zeros(len(part.kind), dtype=np.int64)
        control = np.log2(1 + _SCALE * _rates(world, part, codes))
        for i in range(n_labels):
            effect = np.log2(1 + _SCALE * _rates(world, part, codes + i + 1)) - control
            total[i] += effect.sum(axis=0, dtype=np.float64)
    return (total / n_cells).astype(np.float32)


def _artifact_risk(world: _World, label: Codes, share: float, confounding: float) -> Floats:
    """Return each label's probability of an artifact; their mean over cells is `share`."""
    if share == 0:
        return np.zeros(len(world.labels), dtype=np.float32)
    harm = np.clip(world.hit @ world.strength / 1.5, 0.0, 1.3) * confounding
    low, high = -30.0, 30.0
    for _ in range(80):
        middle = (low + high) / 2
        mean = (1 / (1 + np.exp(-(middle + harm))))[label].mean()
        low, high = (middle, high) if mean < share else (low, middle)
    return (1 / (1 + np.exp(-(middle + harm)))).astype(np.float32)


def _draw_artifacts(
    rng: np.random.Generator, world: _World, label: Codes, risk: Floats
) -> tuple[Codes, Floats]:
    """Return per cell the artifact (0 none, then as in ARTIFACT_KINDS) and its degree in [0, 1]."""
    n_cells = len(label)
    has = rng.random(n_cells) < risk[label]
    kind = rng.choice(len(ARTIFACT_KINDS), size=n_cells, p=_KIND_ODDS) + 1
    # Dying cells leak: half of what strong perturbations add in low capture is leakage instead.
    strong = (world.hit @ world.strength)[label] > 1.0
    kind = np.where(strong & (kind == 1) & (rng.random(n_cells) < 0.5), 2, kind)
    degree = np.where(has, rng.beta(5.0, 2.0, size=n_cells), 0.0)
    return np.where(has, kind, 0), degree.astype(np.float32)


def _soup(world: _World, rate: Floats) -> Floats:
    """Return the ambient profile: cytoplasm of lysed cells, rich in haemoglobin."""
    soup = rate.mean(axis=0) * (1 - world.nuclear)
    soup = soup * np.where(world.is_hb, 12.0, np.where(world.is_mt, 0.4, 1.0))
    return (soup / soup.sum()).astype(np.float32)


def _draw_counts(
    rng: np.random.Generator,
    world: _World,
    cells: _Cells,
    rate: Floats,
    soup: Floats,
    partner: Codes,
    artifact: Codes,
    degree: Floats,
    rows: slice,
) -> sparse.csr_matrix:
    """Return gamma-Poisson counts of some rows; artifacts act on the expected molecules."""
    library, kind, much = cells.library[rows, None], artifact[rows], degree[rows]
    shape = np.broadcast_to(world.dispersion, rate[rows].shape)
    molecules = library * rate[rows] * rng.standard_gamma(shape, dtype=np.float32) / shape
    median = float(np.median(cells.library))

    low, leak, ambient, double = (np.flatnonzero(kind == code) for code in range(1, 5))
    molecules[low] *= 1 - 0.95 * much[low, None]
    held = np.where(world.is_mt, 1.0, world.nuclear)
    molecules[leak] *= held + (1 - held) * (1 - much[leak, None])
    molecules[ambient] *= 1 - 0.7 * much[ambient, None]
    molecules[ambient] += 0.7 * median * much[ambient, None] * soup
    bad = np.concatenate([low, leak])
    molecules[bad] += 0.03 * median * much[bad, None] * soup
    other = partner[rows][double]
    second = cells.library[other, None] * rate[other]
    noise = rng.standard_gamma(shape[double], dtype=np.float32) / shape[double]
    molecules[double] += (0.4 + 0.6 * much[double, None]) * second * noise
    return sparse.csr_matrix(rng.poisson(molecules).astype(np.float32))


def _truth(world: _World, risk: Floats) -> dict[str, object]:
    """Return the part of ``uns["cradle_truth"]`` that does not depend on cells."""
    labels, n_targets = world.labels, len(world.target)
    mask = (world.regulon != 0) | ((np.abs(world.push) @ np.abs(world.programme)) > 0)
    mask[np.arange(n_targets), world.target] = True
    return {
        "ate_labels": np.array(labels[1:], dtype=np.str_),
        "mask": mask,
        "mask_labels": np.array(labels[1 : 1 + n_targets], dtype=np.str_),
        "strength": world.strength,
        "knock_down": world.knock_down,
        "interactions": {
            "pair": np.array(labels[1 + n_targets :], dtype=np.str_),
            "kind": np.array([pair.kind for pair in world.pairs], dtype=np.str_),
        },
        "artifact_probability": risk,
        "artifact_probability_labels": np.array(labels, dtype=np.str_),
    }


def _as_anndata(
    world: _World,
    cells: _Cells,
    label: Codes,
    artifact: Codes,
    degree: Floats,
    counts: sparse.csr_matrix,
    rate: Floats,
    rate_control: Floats,
    truth: dict[str, object],
) -> AnnData:
    from anndata import AnnData

    n_cells = len(label)
    labels = pd.Index(world.labels)
    types = pd.Index([f"type{i + 1}" for i in range(_N_TYPES)])
    batches = pd.Index([f"batch{i + 1}" for i in range(len(world.batch_shift))])
    kinds = pd.Index(["none", *ARTIFACT_KINDS])
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(label, categories=labels),
            "cell_type": pd.Categorical.from_codes(cells.kind, categories=types),
            "batch": pd.Categorical.from_codes(cells.batch, categories=batches),
            "true_artifact": pd.Categorical.from_codes(artifact, categories=kinds),
            "true_artifact_degree": degree,
            "true_penetrance": cells.penetrance,
            "true_phase": cells.phase,
            "true_library": cells.library,
        },
        index=[f"CELL{i + 1:06d}" for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {
            "mt": world.is_mt,
            "ribo": world.is_ribo,
            "hb": world.is_hb,
            "target": np.isin(np.arange(len(world.genes)), world.target),
            "true_dispersion": world.dispersion,
        },
        index=world.genes,
    )
    adata = AnnData(counts, obs=obs, var=var, uns={"cradle_truth": truth})
    adata.layers["counts"] = counts.copy()
    adata.layers["true_rate"] = rate
    adata.layers["true_rate_control"] = rate_control
    return adata
