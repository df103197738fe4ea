"""The documentation's pages name what there is: the public surface, and the keys of AnnData."""

from __future__ import annotations

import ast
import re
from collections import Counter
from importlib import import_module

import pytest
from conftest import ROOT

import cradle_pyro as cp

API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
KEYS = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "cradle_pyro").rglob("*.py"))


def listed(page: str) -> list[str]:
    """Return the names in a page's autosummary tables."""
    tables = re.findall(r"^```\{eval-rst\}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [name for table in tables for name in re.findall(r"^ {4}([\w.]+)$", table, re.MULTILINE)]


def public_names() -> set[str]:
    """Return the public names; of a public module, those of its functions, with a dot."""
    modules = cp._MODULES
    names = set(cp.__all__) - {"__version__"} - set(modules)
    return names | {
        f"{module}.{name}" for module in modules for name in getattr(cp, module).__all__
    }


def found(name: str) -> object:
    """Return what a name on the page stands for."""
    first, _, rest = name.partition(".")
    if not rest or first in cp._MODULES:
        value = getattr(cp, first)
        return getattr(value, rest) if rest else value
    module, _, last = name.rpartition(".")
    return getattr(import_module(f"cradle_pyro.{module}"), last)


def keys_in(text: str) -> set[str]:
    """Return the keys in a text, without what follows the part that is always the same."""
    keys = re.findall(r"\b(?:X_)?cradle_(?!pyro\b)[a-z_]*[a-z]", text)
    return {re.sub(r"^cradle_qc_.*", "cradle_qc", key) for key in keys}


def keys_written(source: str) -> set[str]:
    """Return the keys that code has as strings; docstrings and messages are not keys."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return set().union(*(keys_in(text) for text in strings if re.fullmatch(r"\w+", text)))


def test_every_public_name_is_on_the_page_once():
    page = listed(API)
    assert public_names() - set(page) == set()
    assert [name for name, times in Counter(page).items() if times > 1] == []


@pytest.mark.parametrize("name", listed(API))
def test_what_the_page_names_exists(name):
    assert found(name).__doc__
    # A public name is listed as such, not by the module it is defined in.
    assert "." not in name or name in public_names() or name.split(".")[-1] not in cp.__all__


def test_names_are_read_from_the_tables_only():
    page = (
        "`fit`\n```{eval-rst}\n.. autosummary::\n    :toctree: generated\n\n    a\n    b.c\n```\n"
    )
    assert listed(page) == ["a", "b.c"]


def test_every_key_is_on_the_page_of_keys():
    written = set().union(*(keys_written(path.read_text(encoding="utf-8")) for path in SOURCES))
    assert len(written) > 5
    assert written - keys_in(KEYS) == set()
    assert keys_in(KEYS) - written == set()


def test_keys_are_told_from_prose():
    source = '"""Writes cradle_no."""\nobs["cradle_yes"] = f"cradle_qc_{x}"\nm["X_cradle_basal"]'
    assert keys_written(source) == {"cradle_yes", "cradle_qc", "X_cradle_basal"}
