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
