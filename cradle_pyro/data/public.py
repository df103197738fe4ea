"""Readers for the four published screens, each in the layout its authors distribute.

Every reader returns the same layout: raw counts in ``X``, gene symbols as gene names where the
file has them, and ``obs["perturbation"]`` in the package's label form (sorted names joined by
``+``, or ``control``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from cradle_pyro.data.encode import canonical_label
from cradle_pyro.data.fields import check_names, read_counts, read_screen, scan_counts
from cradle_pyro.errors import DataError, near, shown

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "PUBLIC_SCREENS",
    "PublicScreen",
    "fetch_public",
    "read_adamson",
    "read_dixit",
    "read_norman",
    "read_public",
    "read_replogle",
]

CONTROL: Final = "control"
DELIMITER: Final = "+"
COUNTS_LAYER: Final = "counts"
SYMBOL_COLUMNS: Final = ("gene_symbols", "gene_symbol", "gene_name")


@dataclass(frozen=True)
class PublicScreen:
    """Where a published screen comes from, and how its file names perturbations.

    Parameters
    ----------
    name
        Key in ``PUBLIC_SCREENS``.
    study
        Authors, title and year.
    source
        Where the file is to be had.
    label_columns
        Columns of ``obs`` that can carry the label, of which one at least is required.
    labels
        Function from ``obs`` to one label per cell; missing for cells that must be dropped.
    doi, file
        Archive and file that can be downloaded: its registry gives the checksum. None where no
        checksum is to be had, so that the file must be given by path.
    """

    name: str
    study: str
    source: str
    label_columns: tuple[str, ...]
    labels: Callable[[pd.DataFrame], pd.Series]
    doi: str | None = None
    file: str | None = None


# ---------------------------------------------------------------------------------------- labels


def _indicator(column: pd.Series) -> np.ndarray | None:
    """Return a column of 0/1 (or true/false, also as text) as booleans, None for any other."""
    text = column.astype(str).str.lower()
    is_on = text.isin(["1", "1.0", "true"])
    is_off = text.isin(["0", "0.0", "false"])
    return is_on.to_numpy() if bool((is_on | is_off).all()) else None


def _indicator_labels(obs: pd.DataFrame, indicators: dict[str, np.ndarray]) -> pd.Series:
    """Return labels from one column of booleans per gene; cells without any are controls."""
    genes = np.array(list(indicators), dtype=object)
    table = np.column_stack(list(indicators.values()))
    # Cells share a few hundred combinations: a label is made once for each.
    combinations, which = np.unique(table, axis=0, return_inverse=True)
    labels = [_joined(genes[row]) for row in combinations]
    return pd.Series(np.array(labels, dtype=object)[which.ravel()], index=obs.index)


def _joined(names: np.ndarray | list[str]) -> str:
    """Return the label of a combination of genes, ``control`` for none.

    Raises
    ------
    DataError
        A gene's name contains the delimiter.
    """
    ambiguous = [name for name in names if DELIMITER in name]
    if ambiguous:
        raise DataError(
            f"Names of perturbed genes must not contain {DELIMITER!r}, which joins combinations; "
            f"found {shown(ambiguous)}. Rename them in obs first."
        )
    return canonical_label(list(names), DELIMITER, CONTROL)


def _mapped(column: pd.Series, label: Callable[[str], str | None]) -> pd.Series:
    """Return `label` of each value, computed once per distinct value; missing stays missing."""
    known = {value: label(str(value)) for value in column.dropna().unique()}
    return column.astype(object).map(known)


def _norman_labels(obs: pd.DataFrame) -> pd.Series:
    """Return Norman's labels: one-hot ``guide_*`` columns, else ``guide_identity``, else names.

    ``guide_identity`` reads ``KLF1_NegCtrl0__KLF1_NegCtrl0``: the pair of guides, twice.
    """
    indicators = {
        name.removeprefix("guide_"): values
        for name in obs.columns
        if name.startswith("guide_") and name not in ("guide_identity", "guide_ids", "guide_id")
        if (values := _indicator(obs[name])) is not None
    }
    if indicators:
        return _indicator_labels(obs, indicators)

    def label(value: str) -> str:
        names = value.split("__")[0].split("_")
        return _joined([name for name in names if name != CONTROL and "NegCtrl" not in name])

    column = "guide_identity" if "guide_identity" in obs else "perturbation"
    return _mapped(obs[column], label)


def _dixit_labels(obs: pd.DataFrame) -> pd.Series:
    """Return Dixit's labels from its 0/1 columns, one per gene.

    Columns per guide have an underscore (``sgCREB1_2``), controls are called INTERGENIC; that a
    gene occurs in ``combined_guides`` tells its column from other 0/1 columns such as a batch.
    """
    guides = " ".join(obs["combined_guides"].dropna().astype(str).unique())
    indicators = {
        name: values
        for name in obs.columns
        if "_" not in name and "INTERGENIC" not in name and name in guides
        if (values := _indicator(obs[name])) is not None
    }
    if not indicators:
        raise DataError(
            "Dixit's file has one 0/1 column per perturbed gene in obs, named as in "
            f"'combined_guides'; none was found among {shown(obs.columns, 10)}. Use the file from "
            f"{PUBLIC_SCREENS['dixit'].source}."
        )
    return _indicator_labels(obs, indicators)


def _adamson_labels(obs: pd.DataFrame) -> pd.Series:
    """Return Adamson's labels: the part before ``_``; ``*`` marks a cell without a guide."""

    def label(value: str) -> str | None:
        if value in ("*", "", "nan", "None"):
            return None
        if "(mod)" in value or "neg_ctrl" in value or value == CONTROL:
            return CONTROL
        return _joined([value.split("_")[0]])

    return _mapped(obs["perturbation"], label)


def _replogle_labels(obs: pd.DataFrame) -> pd.Series:
    """Return Replogle's labels: the gene, from ``gene`` or from the first guide of ``sgID_AB``."""

    def label(value: str) -> str:
        if "non-targeting" in value or value == CONTROL:
            return CONTROL
        return _joined([value.split("|")[0].split("_")[0]])

    return _mapped(obs["gene" if "gene" in obs else "sgID_AB"], label)


_SCPERTURB_DOI: Final = "10.5281/zenodo.7041849"

PUBLIC_SCREENS: Final[dict[str, PublicScreen]] = {
    screen.name: screen
    for screen in (
        PublicScreen(
            name="norman",
            study="Norman et al., Exploring genetic interaction manifolds (2019)",
            source=(
                "the SAMS-VAE authors' bucket (obs 'guide_identity' and one-hot 'guide_*'; the "
                f"published setting), or scPerturb, doi:{_SCPERTURB_DOI} (obs 'perturbation')"
            ),
            label_columns=("guide_identity", "perturbation"),
            labels=_norman_labels,
            doi=_SCPERTURB_DOI,
            file="NormanWeissman2019_filtered.h5ad",
        ),
        PublicScreen(
            name="dixit",
            study="Dixit et al., Perturb-Seq: dissecting molecular circuits (2016)",
            source="https://ndownloader.figshare.com/files/34011689",
            label_columns=("combined_guides",),
            labels=_dixit_labels,
        ),
        PublicScreen(
            name="adamson",
            study="Adamson et al., A multiplexed single-cell CRISPR screening platform (2016)",
            source=f"scPerturb, doi:{_SCPERTURB_DOI}",
            label_columns=("perturbation",),
            labels=_adamson_labels,
            doi=_SCPERTURB_DOI,
            file="AdamsonWeissman2016_GSM2406681_10X010.h5ad",
        ),
        PublicScreen(
            name="replogle",
            study="Replogle et al., Mapping information-rich genotype-phenotype landscapes (2022)",
            source="the SAMS-VAE authors' bucket (the filtered screen)",
            label_columns=("gene", "sgID_AB"),
            labels=_replogle_labels,
        ),
    )
}


# ------------------------------------------------------------------------------------- downloads


def _screen(name: str) -> PublicScreen:
    """Return a published screen by name, or raise with the names there are."""
    if name not in PUBLIC_SCREENS:
        raise DataError(
            f"There is no published screen {name!r}{near(name, list(PUBLIC_SCREENS))}. "
            f"Known are {shown(PUBLIC_SCREENS)}."
        )
    return PUBLIC_SCREENS[name]


def fetch_public(
    name: str, folder: str | os.PathLike[str] | None = None, *, progress: bool = False
) -> Path:
    """Return the path of a published screen's file, downloaded once and checked.

    Parameters
    ----------
    name
        A key of ``PUBLIC_SCREENS``; those without a DOI cannot be downloaded.
    folder
        Where files are kept; by default the user's cache directory.
    progress
        Show a progress bar.

    Raises
    ------
    DataError
        The name is unknown, the screen has no download with a checksum, the archive cannot be
        reached, or the file does not have the checksum its archive states.

    Notes
    -----
    The checksum is the MD5 sum in the archive's own record of the DOI, asked for at the time of
    the download: it finds truncated and damaged files, and it is what the archive says today.
    """
    import pooch

    screen = _screen(name)
    if screen.doi is None or screen.file is None:
        raise DataError(
            f"{screen.study} cannot be downloaded: no checksum of its file is known. Get it from "
            f"{screen.source} and give its path, read_public({name!r}, path)."
        )
    archive = pooch.create(
        path=pooch.os_cache("cradle_pyro") if folder is None else folder,
        base_url=f"doi:{screen.doi}/",
        registry=None,
    )
    try:
        archive.load_registry_from_doi()
        return Path(archive.fetch(screen.file, progressbar=progress))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{screen.file!r} could not be downloaded from doi:{screen.doi} ({error}). Try again, "
            f"or get it from {screen.source} and give its path."
        ) from error


# --------------------------------------------------------------------------------------- reading


def read_public(name: str, path: str | os.PathLike[str] | None = None) -> AnnData:
    """Return a published screen: raw counts in ``X`` and ``obs["perturbation"]`` as labels.

    Parameters
    ----------
    name
        "norman", "dixit", "adamson" or "replogle".
    path
        The file as its authors distribute it; without it, the file is downloaded where a checksum
        is to be had (see ``fetch_public``).

    Returns
    -------
    AnnData
        ``X`` raw counts (cells, genes) as CSR; ``obs["perturbation"]`` sorted names joined by
        ``+``, or ``control``; ``obs["nperts"]`` how many; a column ``perturbation`` the file
        already has is kept as ``perturbation_original``. Gene names are symbols, with the
        file's own names in ``var["gene_id"]``, where it names genes by Ensembl identifiers.
        ``uns["cradle_public"]`` says what was read and how many cells without a label were
        dropped.

    Raises
    ------
    DataError
        The name is unknown, there is no such file, or it is not laid out as this screen is.

    Notes
    -----
    In Dixit's screen a cell without any detected targeting guide is a control, as in the published
    settings, and cells can carry more than two guides; the published settings keep those with
    ``obs["nperts"] <= 2``.
    """
    screen = _screen(name)
    path = fetch_public(name) if path is None else Path(path)
    adata = read_screen(path)
    found = [column for column in screen.label_columns if column in adata.obs]
    if not found:
        raise DataError(
            f"{str(path)!r} is not laid out as {screen.study}: obs needs "
            f"{' or '.join(map(repr, screen.label_columns))} and has {shown(adata.obs, 10)}. "
            f"Use the file from {screen.source}."
        )
    check_names(adata.obs_names, "cell")
    labels = screen.labels(adata.obs)
    _check_labels(labels, screen, path)
    _name_genes_by_symbol(adata)
    _move_counts_to_x(adata)
    return _labelled(adata, labels, screen)


def _check_labels(labels: pd.Series, screen: PublicScreen, path: Path) -> None:
    """Raise unless there are both controls and perturbed cells."""
    kinds = set(labels.dropna())
    if CONTROL not in kinds or len(kinds) < 2:
        lacks = "perturbed cells" if CONTROL in kinds else "controls"
        raise DataError(
            f"{str(path)!r} is not laid out as {screen.study}: no {lacks} among {len(labels)} "
            f"cells with the labels {shown(sorted(kinds))}. Use the file from {screen.source}."
        )


def _name_genes_by_symbol(adata: AnnData) -> None:
    """Name genes by symbol where the file names them by identifier, and make names unique."""
    import anndata

    names = adata.var_names.astype(str)
    column = next((name for name in SYMBOL_COLUMNS if name in adata.var), None)
    if column is not None and names.str.match(r"ENS[A-Z]*G\d").mean() > 0.5:
        adata.var["gene_id"] = names
        symbols = adata.var[column].astype(object)
        names = pd.Index(symbols.where(symbols.notna() & (symbols != ""), names).astype(str))
    names.name = None  # an index named after a column cannot be written
    adata.var_names = anndata.utils.make_index_unique(names)


def _move_counts_to_x(adata: AnnData) -> None:
    """Put raw counts into X, from the layer ``counts`` where there is one, and validate them."""
    layer = COUNTS_LAYER if COUNTS_LAYER in adata.layers else None
    counts = read_counts(adata, layer)
    scan_counts(
        counts,
        values="counts",
        cell_names=adata.obs_names.to_numpy(dtype=str),
        gene_names=list(adata.var_names),
    )
    adata.X = counts
    if layer is not None:
        del adata.layers[layer]
    if adata.raw is not None:
        adata.raw = None  # its gene names would no longer be those of X


def _labelled(adata: AnnData, labels: pd.Series, screen: PublicScreen) -> AnnData:
    """Return the cells that have a label, with the label in ``obs["perturbation"]``."""
    if "perturbation" in adata.obs:
        adata.obs["perturbation_original"] = adata.obs["perturbation"]
    adata.obs["perturbation"] = labels.astype("category")
    is_labelled = labels.notna().to_numpy()
    n_dropped = int((~is_labelled).sum())
    if n_dropped:
        adata = adata[is_labelled].copy()
    n_genes = {
        label: 0 if label == CONTROL else label.count(DELIMITER) + 1
        for label in adata.obs["perturbation"].cat.categories
    }
    adata.obs["nperts"] = adata.obs["perturbation"].astype(str).map(n_genes).astype("int64")
    adata.uns["cradle_public"] = {
        "name": screen.name,
        "study": screen.study,
        "n_cells_dropped": n_dropped,
    }
    return adata


def read_norman(path: str | os.PathLike[str] | None = None) -> AnnData:
    """Return Norman 2019 (CRISPRa singles and pairs); see ``read_public``.

    Raises
    ------
    DataError
        See ``read_public``.
    """
    return read_public("norman", path)


def read_dixit(path: str | os.PathLike[str]) -> AnnData:
    """Return Dixit 2016 (knock-outs of transcription factors); see ``read_public``.

    Raises
    ------
    DataError
        See ``read_public``.
    """
    return read_public("dixit", path)


def read_adamson(path: str | os.PathLike[str] | None = None) -> AnnData:
    """Return Adamson 2016 (CRISPRi of the unfolded protein response); see ``read_public``.

    Raises
    ------
    DataError
        See ``read_public``.
    """
    return read_public("adamson", path)


def read_replogle(path: str | os.PathLike[str]) -> AnnData:
    """Return Replogle 2022, filtered (genome-scale CRISPRi); see ``read_public``.

    Raises
    ------
    DataError
        See ``read_public``.
    """
    return read_public("replogle", path)
