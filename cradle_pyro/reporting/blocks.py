"""What a page is made of, and the page as HTML; nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cradle_pyro.reporting.figures import PageFigure

__all__ = [
    "Block",
    "Browser",
    "Code",
    "Figures",
    "Findings",
    "Section",
    "Table",
    "Text",
    "Tiles",
    "Warned",
    "as_markdown",
    "render_page",
]


class Text(NamedTuple):
    """A paragraph."""

    text: str
    kind: str = "text"


class Warned(NamedTuple):
    """A paragraph that must not be overlooked."""

    text: str
    kind: str = "warning"


class Findings(NamedTuple):
    """A list of sentences."""

    rows: Sequence[str]
    kind: str = "list"


class Tiles(NamedTuple):
    """Name, value and note of a few numbers."""

    tiles: Sequence[tuple[str, str, str]]
    kind: str = "tiles"


class Figures(NamedTuple):
    """Drawings side by side."""

    figures: Sequence[PageFigure]
    kind: str = "figures"


class Table(NamedTuple):
    """A table whose first column names its rows; `strong` ones stand out."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: Sequence[str] = ()
    strong: Sequence[str] = ()
    kind: str = "table"


class Browser(NamedTuple):
    """A table to search and sort: name, key and whether it is a number, of each column."""

    title: str
    caption: str
    columns: Sequence[tuple[str, str, bool]]
    data: Mapping[str, Any]
    kind: str = "browser"


class Code(NamedTuple):
    """Text as it stands, folded away unless it is open."""

    title: str
    text: str
    is_open: bool = False
    kind: str = "code"


Block = Text | Warned | Findings | Tiles | Figures | Table | Browser | Code


class Section(NamedTuple):
    """A part of the page."""

    id: str
    title: str
    blocks: Sequence[Block]


def render_page(*, title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """Return a page as HTML. All names are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    page = environment.get_template("report.html")
    return str(page.render(title=title, lead=lead, sections=sections, footer=footer))


def as_markdown(block: Block) -> list[str]:
    """Return the lines of a block as Markdown; figures are left out."""
    if isinstance(block, Text):
        return [block.text, ""]
    if isinstance(block, Warned):
        return [f"> {block.text}", ""]
    if isinstance(block, Findings):
        return [*(f"- {row}" for row in block.rows), ""]
    if isinstance(block, Tiles):
        return [*(f"- {name}: {value} ({note})" for name, value, note in block.tiles), ""]
    if isinstance(block, Table):
        return _markdown_table(block)
    return []


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rows = [
        [f"**{row[0]}**", *row[1:]] if row[0] in table.strong else list(row) for row in table.rows
    ]
    rule = "|---|" + "---:|" * (len(table.head) - 1)
    note = [table.caption, ""] if table.caption else []
    return [f"### {table.title}", "", line(table.head), rule, *map(line, rows), "", *note]
