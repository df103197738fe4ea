"""Readers of the published screens, on small files laid out like the originals."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pooch
import pytest
import scipy.sparse as sp

from cradle_pyro.data import public
from cradle_pyro.errors import DataError


def make_file(
    path: Path,
    obs: dict[str, list],
    *,
    var: pd.DataFrame | None = None,
    counts_in_layer: bool = False,
    container: type = sp.csr_matrix,
) -> tuple[Path, np.ndarray]:
    """Write a file with these obs columns and return it with the counts it holds."""
    n_cells = len(next(iter(obs.values())))
    var = pd.DataFrame(index=["MT-CO1", "KLF1", "ACTB", "GAPDH"]) if var is None else var
    counts = np.random.default_rng(0).poisson(2.0, (n_cells, len(var))).astype(np.float32)
    table = pd.DataFrame(obs, index=[f"cell{i}" for i in range(n_cells)])
    for name in table.select_dtypes(object):
        table[name] = table[name].astype("category")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")
        adata = anndata.AnnData(container(counts), obs=table, var=var)
    if counts_in_layer:
        adata.layers["counts"] = container(counts)
        adata.X = container(np.log1p(counts))
    adata.write_h5ad(path)
    return path, counts


NORMAN = {
    "guide_identity": [
        "NegCtrl10_NegCtrl0__NegCtrl10_NegCtrl0",
        "KLF1_NegCtrl0__KLF1_NegCtrl0",
        "NegCtrl0_AHR__NegCtrl0_AHR",
        "KLF1_AHR__KLF1_AHR",
    ],
    "guide_ids": ["", "KLF1", "AHR", "AHR,KLF1"],
    "guide_KLF1": [0.0, 1.0, 0.0, 1.0],
    "guide_AHR": [0.0, 0.0, 1.0, 1.0],
    "gemgroup": [1, 2, 1, 2],
}
DIXIT = {
    "cluster": ["a", "a", "b", "b", "b"],
    "guide": ["", "INTERGENIC393453", "sgEGR1_2", "sgEGR1_3,sgCREB1_4", "sgCREB1_4"],
    "combined_guides": ["", "INTERGENIC393453", "EGR1", "CREB1+EGR1", "CREB1"],
    "INTERGENIC393453": [False, True, False, False, False],
    "sgEGR1_2": [False, False, True, False, False],
    "EGR1": [False, False, True, True, False],
    "CREB1": ["False", "False", "False", "True", "True"],
    "batch": [0, 1, 1, 1, 0],
}
ADAMSON = {
    "perturbation": [
        "62(mod)_pBA581",
        "*",
        "HSPA5_pDS001",
        "Gal4-4(mod)_pBA582",
        None,
        "PERK_only_pMJ146",
        "3x_neg_ctrl_pMJ144-1",
    ],
    "read count": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
}
REPLOGLE = {
    "sgID_AB": [
        "AAAS_+_53715438.23-P1P2|AAAS_-_53715355.23-P1P2",
        "non-targeting_00025|non-targeting_03393",
        "RPL3_-_39715.23-P1P2|RPL3_+_39716.23-P1P2",
    ],
    "gene": ["AAAS", "non-targeting", "RPL3"],
    "gem_group": [1, 1, 2],
}


def without(columns: dict[str, list], *names: str) -> dict[str, list]:
    return {name: values for name, values in columns.items() if name not in names}


@pytest.mark.parametrize(
    ("name", "obs", "labels", "kept"),
    [
        ("norman", NORMAN, ["control", "KLF1", "AHR", "AHR+KLF1"], [0, 1, 2, 3]),
        (
            "norman",
            without(NORMAN, "guide_ids", "guide_KLF1", "guide_AHR"),
            ["control", "KLF1", "AHR", "AHR+KLF1"],
            [0, 1, 2, 3],
        ),
        (
            "norman",
            {"perturbation": ["MAP2K6_KLF1", "control", "KLF1"], "guide_id": ["a", "b", "c"]},
            ["KLF1+MAP2K6", "control", "KLF1"],
            [0, 1, 2],
        ),
        ("dixit", DIXIT, ["control", "control", "EGR1", "CREB1+EGR1", "CREB1"], [0, 1, 2, 3, 4]),
        (
            "dixit",
            DIXIT | {"combined_guides": ["", "", "sgEGR1_2", "sgCREB1_4,sgEGR1_3", "sgCREB1_4"]},
            ["control", "control", "EGR1", "CREB1+EGR1", "CREB1"],
            [0, 1, 2, 3, 4],
        ),
        ("adamson", ADAMSON, ["control", "HSPA5", "control", "PERK", "control"], [0, 2, 3, 5, 6]),
        ("replogle", REPLOGLE, ["AAAS", "control", "RPL3"], [0, 1, 2]),
        ("replogle", without(REPLOGLE, "gene"), ["AAAS", "control", "RPL3"], [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("counts_in_layer", [False, True])
def test_layout_gives_labels_and_raw_counts(
    tmp_path, name, obs, labels, kept, counts_in_layer
) -> None:
    path, counts = make_file(tmp_path / "a.h5ad", obs, counts_in_layer=counts_in_layer)
    adata = getattr(public, f"read_{name}")(path)
    assert list(adata.obs["perturbation"]) == labels
    assert list(adata.obs_names) == [f"cell{i}" for i in kept]
    assert sp.issparse(adata.X)
    np.testing.assert_array_equal(adata.X.toarray(), counts[kept])
    assert "counts" not in adata.layers
    assert adata.uns["cradle_public"]["n_cells_dropped"] == len(counts) - len(kept)
    n_genes = [0 if label == "control" else len(label.split("+")) for label in labels]
    assert list(adata.obs["nperts"]) == n_genes


@pytest.mark.parametrize("container", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_result_can_be_written_and_read_again(tmp_path, container) -> None:
    path, _ = make_file(tmp_path / "a.h5ad", ADAMSON, container=container)
    first = public.read_adamson(path)
    assert list(first.obs["perturbation_original"])[1] == "HSPA5_pDS001"
    first.write_h5ad(tmp_path / "b.h5ad")
    again = anndata.read_h5ad(tmp_path / "b.h5ad")
    assert list(again.obs["perturbation"]) == list(first.obs["perturbation"])
    np.testing.assert_array_equal(again.X.toarray(), first.X.toarray())


def test_genes_named_by_ensembl_get_their_unique_symbols(tmp_path) -> None:
    var = pd.DataFrame(
        {"gene_name": ["MT-CO1", "KLF1", "KLF1", ""]},
        index=pd.Index([f"ENSG0000000000{i}" for i in range(4)], name="gene_id"),
    )
    path, _ = make_file(tmp_path / "a.h5ad", REPLOGLE, var=var)
    adata = public.read_replogle(path)
    assert list(adata.var_names) == ["MT-CO1", "KLF1", "KLF1-1", "ENSG00000000003"]
    assert list(adata.var["gene_id"]) == [f"ENSG0000000000{i}" for i in range(4)]
    adata.write_h5ad(tmp_path / "b.h5ad")


def test_repeated_symbols_are_made_unique(tmp_path) -> None:
    var = pd.DataFrame(index=["MT-CO1", "KLF1", "KLF1", "ACTB"])
    path, _ = make_file(tmp_path / "a.h5ad", NORMAN, var=var)
    assert list(public.read_norman(path).var_names) == ["MT-CO1", "KLF1", "KLF1-1", "ACTB"]


def test_other_layout_is_refused_with_the_columns_found(tmp_path) -> None:
    path, _ = make_file(tmp_path / "a.h5ad", REPLOGLE)
    with pytest.raises(DataError, match=r"'combined_guides' and has 'sgID_AB', 'gene'.*figshare"):
        public.read_dixit(path)


def test_dixit_without_gene_columns_is_refused(tmp_path) -> None:
    path, _ = make_file(tmp_path / "a.h5ad", without(DIXIT, "EGR1", "CREB1"))
    with pytest.raises(DataError, match="one 0/1 column per perturbed gene"):
        public.read_dixit(path)


@pytest.mark.parametrize(
    ("genes", "lacks"),
    [(["AAAS", "RPL3"], "no controls"), (["non-targeting"] * 2, "no perturbed cells")],
)
def test_missing_controls_or_perturbations_are_refused(tmp_path, genes, lacks) -> None:
    path, _ = make_file(tmp_path / "a.h5ad", {"gene": genes})
    with pytest.raises(DataError, match=lacks):
        public.read_replogle(path)


def test_gene_with_the_delimiter_is_refused(tmp_path) -> None:
    path, _ = make_file(tmp_path / "a.h5ad", {"gene": ["A+B", "non-targeting"]})
    with pytest.raises(DataError, match=r"must not contain '\+'.*'A\+B'"):
        public.read_replogle(path)


def test_repeated_cell_names_are_refused(tmp_path) -> None:
    path, _ = make_file(tmp_path / "a.h5ad", REPLOGLE)
    adata = anndata.read_h5ad(path)
    adata.obs_names = ["x", "y", "y"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Observation names are not unique")
        adata.write_h5ad(path)
    with pytest.raises(DataError, match="Cell names must be unique"):
        public.read_replogle(path)


def test_normalised_values_are_refused(tmp_path) -> None:
    path, counts = make_file(tmp_path / "a.h5ad", REPLOGLE)
    adata = anndata.read_h5ad(path)
    adata.X = np.log1p(counts)
    adata.write_h5ad(path)
    with pytest.raises(DataError, match="not integers"):
        public.read_replogle(path)


def test_unknown_name_suggests_a_known_one() -> None:
    with pytest.raises(DataError, match="did you mean 'norman'"):
        public.read_public("normann", "a.h5ad")


@pytest.mark.parametrize("name", ["dixit", "replogle"])
def test_screen_without_checksum_is_not_downloaded(name) -> None:
    with pytest.raises(DataError, match=r"no checksum .* give its path"):
        public.read_public(name)


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """The file that a stand-in for the archive hands out under Adamson's name."""
    path, _ = make_file(tmp_path / "archive.h5ad", ADAMSON)
    checksum = hashlib.md5(path.read_bytes()).hexdigest()

    def load_registry(self: pooch.Pooch) -> None:
        assert self.base_url == "doi:10.5281/zenodo.7041849/"
        self.registry[public.PUBLIC_SCREENS["adamson"].file] = f"md5:{checksum}"

    def choose(url: str, progressbar: bool = False):
        return lambda url, output, pooch: shutil.copy(path, output)

    monkeypatch.setattr(pooch.Pooch, "load_registry_from_doi", load_registry)
    monkeypatch.setattr(pooch.core, "choose_downloader", choose)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    return path


def test_download_is_checked_and_read(archive, tmp_path) -> None:
    fetched = public.fetch_public("adamson", tmp_path / "folder")
    assert fetched.parent == tmp_path / "folder"
    assert fetched.read_bytes() == archive.read_bytes()
    assert public.read_adamson().n_obs == 5


def test_damaged_download_is_refused(archive, tmp_path) -> None:
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"could not be downloaded .* give its path"):
        public.fetch_public("adamson", tmp_path / "folder")
