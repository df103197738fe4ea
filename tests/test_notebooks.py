"""The notebooks: committed clean, written with the public surface only, and they run."""

from __future__ import annotations

import ast
import base64
import re
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

import cradle_pyro as cp

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NEEDS_SCREENS = {"02_a_real_screen.ipynb", "06_combinations.ipynb"}
ALLOWED = {"anndata", "arviz", "matplotlib", "numpy", "pandas", "pyro", "scanpy", "torch"}
LONGEST_CELL = 25
SECONDS = 300  # for one notebook; a hang is found, a slow machine is not


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_of(book: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def imports_of(source: str) -> set[str]:
    """Return the dotted names that `source` imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def private_names(source: str) -> set[str]:
    """Return what `source` uses of cradle_pyro beside ``import cradle_pyro as cp``."""
    inner = {name for name in imports_of(source) if name.startswith("cradle_pyro.")}
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cp"
    }
    return inner | {f"cp.{name}" for name in used - set(cp.__all__)}


def run(book: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in `folder` and return it with its outputs."""
    client = NotebookClient(book, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def figures_of(book: nbformat.NotebookNode) -> list[bytes]:
    return [
        base64.b64decode(output["data"]["image/png"])
        for cell in book.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def complaints_of(book: nbformat.NotebookNode) -> str:
    """Return what the notebook wrote to stderr, where warnings go."""
    return "".join(
        output.text
        for cell in book.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    )


def stray_objects(book: nbformat.NotebookNode) -> list[str]:
    """Return what plotting calls left below a cell, for want of a semicolon."""
    texts = [
        output["data"].get("text/plain", "")
        for cell in book.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
    ]
    return [text for text in texts if "matplotlib" in text or "<Axes" in text]


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with a kernel of this interpreter and smoke sizes."""
    write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")
    settings = {
        "JUPYTER_PATH": str(tmp_path / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "CRADLE_NOTEBOOK_SIZE": "smoke",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures as PNG
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def name_of(path: Path) -> str:
    return path.stem


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
    assert {path.name for path in NOTEBOOKS} >= {"01_simulate_and_recover.ipynb"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_committed_without_output(path):
    book = read(path)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in cells if cell.outputs or cell.execution_count is not None]
    assert book.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_uses_only_the_public_surface(path):
    source = "\n".join(code_of(read(path)))
    assert private_names(source) == set()
    tops = {name.split(".")[0] for name in imports_of(source)} - set(sys.stdlib_module_names)
    assert tops - {"cradle_pyro"} <= ALLOWED
    assert "cradle_pyro" in tops


@pytest.mark.parametrize(
    "source",
    [
        "from cradle_pyro.queries.calls import sign_calls",
        "import cradle_pyro.sites as sites",
        "from cradle_pyro import _HOMES",
        "import cradle_pyro as cp\ncp.reporting.table",
    ],
)
def test_a_private_name_is_found(source):
    assert private_names(source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_can_be_read(path):
    book = read(path)
    assert book.cells[0].cell_type == "markdown"
    assert re.match(r"# \w", book.cells[0].source)
    long = [cell.id for cell in book.cells if cell.source.count("\n") >= LONGEST_CELL]
    assert not long
    assert "CRADLE_NOTEBOOK_SIZE" in code_of(book)[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_runs(path, kernel, monkeypatch, request):
    if path.name in NEEDS_SCREENS:
        monkeypatch.setenv("CRADLE_SCREENS", str(request.getfixturevalue("screens")))
    book = run(read(path), kernel)
    assert figures_of(book)
    assert complaints_of(book) == ""
    assert stray_objects(book) == []


def test_a_missing_screen_is_said(kernel, monkeypatch):
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv("CRADLE_SCREENS", str(kernel))
    with pytest.raises(CellExecutionError, match="Set CRADLE_SCREENS to the folder"):
        run(read(FOLDER / "02_a_real_screen.ipynb"), kernel)


def test_kernel_is_this_interpreter_and_complaints_are_seen(kernel):
    code = (
        "import sys, warnings, cradle_pyro; print(sys.executable, cradle_pyro.__file__)",
        "warnings.warn('x')",
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line) for line in code])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    done = run(book, kernel)
    assert done.cells[0].outputs[0].text.split() == [sys.executable, cp.__file__]
    assert "UserWarning: x" in complaints_of(done)
