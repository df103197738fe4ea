"""Sphinx builds the documentation from the README, the docstrings, the notebooks and the CLI.

`make docs` writes docs/_build/html; a warning is an error. Nothing is fetched from the network.
CRADLE_DOCS_EXECUTE=1 runs the notebooks (at smoke size, unless CRADLE_NOTEBOOK_SIZE says "full").
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import cradle_pyro as cp

if TYPE_CHECKING:
    from docutils.nodes import Element, reference
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "cradle_pyro"
author = "The cradle_pyro authors"
copyright = author
version = release = cp.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates", "**.ipynb_checkpoints"]
highlight_language = "none"

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

nb_execution_mode = "force" if os.environ.get("CRADLE_DOCS_EXECUTE") == "1" else "off"
nb_execution_in_temp = True
nb_execution_timeout = 3600
nb_execution_raise_on_error = True
os.environ.setdefault("CRADLE_NOTEBOOK_SIZE", "smoke")
os.environ.setdefault("CRADLE_SCREENS", str(ROOT.parent / "shared" / "data"))

html_theme = "sphinx_book_theme"
html_title = "cradle_pyro"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}

# A reference to a name of ours must lead somewhere; other projects' pages are not at hand.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!cradle_pyro\.).*")]
nitpick_ignore = [("py:class", "cradle_pyro.data.fields.BackedCounts")]

# Pages that show what lies outside of docs/, by the place it has in the repository.
PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
CONFIGURATIONS = sorted((ROOT / "configs").glob("*.toml"))
# Where public names are defined, and by which name the reference lists them.
HOMES = {f"cradle_pyro.{home}.{name}": f"cradle_pyro.{name}" for name, home in cp._HOMES.items()}
HOMES |= {f"cradle_pyro.{home}": f"cradle_pyro.{name}" for name, home in cp._MODULES.items()}
HOMES |= {
    f"cradle_pyro.{home}.{name}": f"cradle_pyro.{module}.{name}"
    for module, home in cp._MODULES.items()
    for name in getattr(cp, module).__all__
}


def relinked(text: str) -> str:
    """Return a page of the repository's root with its links as seen from docs/."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if target in PAGES:
            return f"]({PAGES[target]}.md)"
        if target.startswith("configs"):
            return "](configurations.md)"
        if target.startswith("notebooks"):
            return f"]({target})" if target.endswith(".ipynb") else "](notebooks.md)"
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')})"
        return f"](../{target})"

    return re.sub(r"\]\(([^)#:]+)\)", link, text)


def commands() -> str:
    """Return a section for each command of the command line: what --help prints."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from cradle_pyro.cli import cli

    plain = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}

    def section(name: str) -> str:
        shown = CliRunner().invoke(cli, [name, "--help"], prog_name="cradle-pyro", env=plain)
        return f"## cradle-pyro {name}\n\n```text\n{shown.output.strip()}\n```\n"

    return "\n".join(section(name) for name in get_command(cli).commands)


def configurations() -> str:
    """Return a section for each file in configs/, with its text."""
    return "\n".join(
        f"## {path.name}\n\n```toml\n{path.read_text(encoding='utf-8')}```\n"
        for path in CONFIGURATIONS
    )


def complete(app: Sphinx, docname: str, source: list[str]) -> None:
    """Add what is generated, or lies elsewhere, to the pages that show it."""
    for origin, page in PAGES.items():
        if docname == page:
            app.env.note_dependency(str(ROOT / origin))  # read the page again when it changes
            source[0] = relinked((ROOT / origin).read_text(encoding="utf-8")) + source[0]
    if docname == "command_line":
        app.env.note_dependency(str(ROOT / "cradle_pyro" / "cli.py"))
        source[0] += commands()
    if docname == "configurations":
        for path in CONFIGURATIONS:
            app.env.note_dependency(str(path))
        source[0] += configurations()


def find_home(
    app: Sphinx, env: BuildEnvironment, node: Element, content: Element
) -> reference | None:
    """Return a link for a public name that is referred to by the module it is defined in."""
    target = HOMES.get(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or target is None:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, content
    )


def setup(app: Sphinx) -> None:
    """Bring in the notebooks and connect the pages that are completed."""
    shutil.copytree(ROOT / "notebooks", HERE / "notebooks", dirs_exist_ok=True)
    app.connect("source-read", complete)
    app.connect("missing-reference", find_home)
