"""The shape of the package, read from its source: layers, what each layer may see, no pickle."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cradle_pyro"

LAYERS = (
    ("types", "sites", "errors", "config", "seeding", "threads"),
    ("data", "simulate"),
    ("model",),
    ("inference",),
    ("queries", "baselines"),
    ("evaluation",),
    ("reporting",),
    ("cli", "workflow", "sweeps", "__init__", "__main__"),
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}

# What a part of the package must never see, however it is imported.
UNSEEN = {
    "simulate": ("cradle_pyro.model",),
    "model": ("anndata", "scanpy", "pandas", "cradle_pyro.data"),
    "evaluation.metrics": ("anndata", "scanpy", "torch", "pyro"),
}
_BY_JOBLIB = ("joblib.dump", "joblib.load")
PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", *_BY_JOBLIB)
PICKLE_CALLS = (
    "torch.save", "read_pickle", "to_pickle", "pyro.get_param_store().load", *_BY_JOBLIB,
)  # fmt: skip
HEAVY = ("scanpy", "lightning", "pytorch_lightning", "matplotlib", "arviz", "sklearn", "skimage")

SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the dotted name of a source file, packages by their ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_modules(module: str, source: str) -> Iterator[str]:
    """Yield the absolute name of everything `source` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def part_of(name: str) -> str:
    """Return the part of the package a dotted name lies in; the bare package is its surface."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def direction_faults(module: str, source: str) -> list[str]:
    own = LAYER[part_of(module)]
    faults = []
    for name in sorted(set(imported_modules(module, source))):
        # ``from cradle_pyro import errors`` names the package, then the module that is meant.
        if is_within(name, PACKAGE) and part_of(name) in LAYER and name != PACKAGE:
            other = LAYER[part_of(name)]
            if other > own:
                faults.append(f"{module} (layer {own}) imports {name} (layer {other})")
        elif is_within(name, PACKAGE) and name != PACKAGE:
            faults.append(f"{module} imports {name} from the public surface")
    for part, unseen in UNSEEN.items():
        if is_within(module, f"{PACKAGE}.{part}"):
            faults += [
                f"{module} imports {name}, which {part} never sees"
                for name in sorted(set(imported_modules(module, source)))
                if any(is_within(name, other) for other in unseen)
            ]
    return faults


def pickle_faults(module: str, source: str) -> list[str]:
    faults = [
        f"{module} imports {name}"
        for name in sorted(set(imported_modules(module, source)))
        if any(is_within(name, other) for other in PICKLES)
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called.endswith(PICKLE_CALLS):
            faults.append(f"{module}:{node.lineno} calls {called}")
        if called.endswith("torch.load") and keywords.get("weights_only") != "True":
            faults.append(f"{module}:{node.lineno} calls torch.load without weights_only=True")
        if keywords.get("allow_pickle") == "True":
            faults.append(f"{module}:{node.lineno} allows pickles in {called}")
    return faults


def undocumented(module: str, source: str) -> list[str]:
    """Return the public modules, classes, functions and methods that have no docstring."""
    tree = ast.parse(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)

    def missing(owner: str, body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if not isinstance(node, (*functions, ast.ClassDef)) or node.name.startswith("_"):
                continue
            exempt = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
            if not ast.get_docstring(node) and not exempt & {"overload", "override", "setter"}:
                yield f"{owner}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from missing(f"{owner}.{node.name}", node.body)

    return ([] if ast.get_docstring(tree) else [module]) + list(missing(module, tree.body))


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_module_belongs_to_a_layer() -> None:
    homeless = [name for name in map(module_name, SOURCES) if part_of(name) not in LAYER]
    assert not homeless, f"add these to LAYERS in {__file__}: {homeless}"
    assert len(SOURCES) > 5


def test_every_folder_is_a_package_that_is_installed() -> None:
    folders = {path.parent for path in SOURCES}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_module_imports_its_own_layer_or_an_earlier_one(path: Path) -> None:
    assert direction_faults(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cradle_pyro.types", "from .data.dataset import CellData"),
        ("cradle_pyro.data.fields", "import cradle_pyro.inference.train"),
        ("cradle_pyro.data.__init__", "from ..model import cradle"),
        ("cradle_pyro.model.cradle", "def f():\n    from cradle_pyro import inference"),
        ("cradle_pyro.model.cradle", "import pandas as pd"),
        ("cradle_pyro.model.cradle", "from cradle_pyro.data.dataset import CellData"),
        ("cradle_pyro.simulate.corrupt", "from cradle_pyro.model.likelihoods import NB"),
        ("cradle_pyro.evaluation.metrics", "from anndata import AnnData"),
        ("cradle_pyro.queries.effects", "from cradle_pyro import Posterior"),
    ],
)
def test_wrong_direction_is_found(module: str, source: str) -> None:
    assert direction_faults(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cradle_pyro.data.dataset", "from cradle_pyro import errors\nfrom ..types import Batch"),
        ("cradle_pyro.data.__init__", "from .dataset import CellData"),
        ("cradle_pyro.simulate.corrupt", "from cradle_pyro.data.qc import annotate_artifacts"),
        ("cradle_pyro.cli", "from cradle_pyro.reporting import report"),
    ],
)
def test_right_direction_is_accepted(module: str, source: str) -> None:
    assert direction_faults(module, source) == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_module_reads_and_writes_no_pickle(path: Path) -> None:
    assert pickle_faults(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import dump",
        "torch.save(x, path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "table.to_pickle(path)",
    ],
)
def test_pickle_is_found(source: str) -> None:
    assert pickle_faults("cradle_pyro.data.x", source)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_public_names_are_documented(path: Path) -> None:
    assert undocumented(module_name(path), path.read_text()) == []


def test_missing_docstring_is_found() -> None:
    source = '"""M."""\nclass A:\n    """A."""\n    def f(self): ...\ndef _g(): ...\ndef h(): ...\n'
    assert undocumented("m", source) == ["m.A.f", "m.h"]


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in project["dependencies"]
    }
    distributions = importlib.metadata.packages_distributions()
    undeclared = {}
    for path in SOURCES:
        for name in imported_modules(module_name(path), path.read_text()):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in (PACKAGE, ""):
                continue
            if not declared & {normalised(found) for found in distributions.get(top, [top])}:
                undeclared.setdefault(top, module_name(path))
    assert undeclared == {}


def python(code: str) -> str:
    """Return what `code` writes, run by a fresh interpreter in the repository."""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    assert python(code) == ""


def test_importing_the_package_changes_nothing() -> None:
    code = f"""
import logging, random, warnings
import numpy, pyro, torch

def state():
    return (
        random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        numpy.geterr(), pyro.settings.get(), list(pyro.get_param_store()),
        logging.getLogger().level, logging.getLogger().handlers[:],
    )

before = state()
import {PACKAGE}
print(state() == before)
"""
    assert python(code) == "True"


def test_qc_leaves_the_number_of_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba, under scanpy, sets it for the whole process the first time."""
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    code = """
import warnings
warnings.simplefilter("ignore")
import cradle_pyro as cp, torch
from cradle_pyro.data.genes import select_genes

torch.set_num_threads(1)
adata = cp.simulate_perturbseq(n_cells=300, n_genes=100, n_perturbations=3, n_pairs=1)
cp.annotate_artifacts(adata, layer="counts")
select_genes(adata, 50, layer="counts")
print(torch.get_num_threads())
"""
    assert python(code) == "1"
