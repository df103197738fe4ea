"""The README: its Python runs as written, and what it names exists."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT
from typer.main import get_command

import cradle_pyro as cp
from cradle_pyro import sites
from cradle_pyro.cli import cli

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
LINKS = re.findall(r"\]\(([^)#:]+)\)", TEXT)


def flags_of(command):
    return {flag for option in command.params for flag in option.opts}


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    n_cells, n_genes = namespace["adata"].shape
    assert len(namespace["effect"]) == n_genes
    columns = re.search(r"The columns are `(gene, [^`]*)`", TEXT).group(1).split(", ")
    assert list(namespace["effect"]) == columns
    assert namespace["clean"].shape == namespace["there"].shape == namespace["failing"].shape
    assert namespace["world"].n_obs == 50
    assert len(namespace["basal"]) == n_cells
    assert namespace["data"].n_cells == n_cells
    assert namespace["rates"].shape == (10, *namespace["rate"].shape)
    assert (tmp_path / "runs" / "a" / "manifest.json").exists()


def test_names_of_the_package_exist():
    used = set(re.findall(r"\bcp\.(\w+)", TEXT))
    assert used
    assert used <= set(cp.__all__)


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_links_into_the_repository_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_commands_and_their_flags_exist():
    commands = get_command(cli).commands
    lines = re.findall(r"`cradle-pyro (\w+)([^`]*)`", TEXT)
    assert {command for command, _ in lines} == set(commands)
    for name, rest in lines:
        command, first = commands[name], rest.split()[:1]
        command = getattr(command, "commands", {}).get(*first, command) if first else command
        assert set(re.findall(r"--[a-z-]+", rest)) <= flags_of(command)
    elsewhere = set(re.findall(r"`(?:train )?(--[a-z-]+)", TEXT)) - {"--help"}
    assert elsewhere
    assert elsewhere <= set().union(*map(flags_of, commands.values()))


def test_settings_exist():
    defaults = cp.Config().model_dump()
    sections = "|".join(defaults)
    named = re.findall(rf"(?:`|\"|--set )({sections})\.(?!safetensors|csv)([a-z_]+) ?[=`]", TEXT)
    assert named
    missing = [f"{section}.{key}" for section, key in named if key not in defaults[section]]
    assert not missing


def test_picture_shows_every_site():
    picture = ElementTree.parse(ROOT / "docs" / "model.svg")
    shown = {"".join(text.itertext()).split()[0] for text in picture.iter() if "text" in text.tag}
    names = {value for name, value in vars(sites).items() if name.isupper()}
    assert names <= shown
